"""Killed and resumed, `python evolve.py` ends where an uninterrupted run ends: against a scripted server, 10 kills."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import cli
import pytest
from scripted import scripted
from server import serve

GOLD = {f"How many items of kind {i} are there in {domain}?": f"SELECT {i}" for i in range(20) for domain in "ab"}
# Half of the problems nobody ever solves: so no tree is solved, and all grow to the last round.
ANSWERS = {question: sql if int(sql.split()[1]) % 2 else "SELECT 99" for question, sql in GOLD.items()}
LINES = [json.dumps({"question": q, "answer": sql, "domain": q[-2]}) for q, sql in ANSWERS.items()]
ROUNDS = 16


@pytest.fixture
def scene(tmp_path: Path):
    """(a server, arguments); at its n-th request from then the server signals `server.victim` = (pid, signal, n)"""
    script = scripted(GOLD)

    def reply(messages: list, body: dict) -> str:
        with server.lock:
            server.count += 1
            if server.victim and server.count == server.victim[2]:
                os.kill(*server.victim[:2])
        return script(messages, body)

    (tmp_path / "own.jsonl").write_text("\n".join(LINES))
    with serve(reply, models=("solver", "fickle-good-editor")) as server:
        server.count, server.victim = 0, None
        yield server, ["--task", "jsonl", "--data", tmp_path / "own.jsonl", "--domains", "a,b", "--solver", server.url,
                       "--editor", server.url, "--editor-model", "fickle-good-editor", "--k", 2, "--holdout", 4,
                       "--test", 4, "--samples", 1, "--rounds", ROUNDS, "--out", "run", "--c", 0.2]


def start(scene, folder: Path, *more: object, rename: int = 0, sign: int = 0, request: int = 0) -> tuple[int, str]:
    """Run the command; kill it before its `rename`-th rename, or send it `sign` at its `request`-th request."""
    server, args = scene
    folder.mkdir(exist_ok=True)
    command = cli.Command([*args, *more], folder, rename=rename)
    server.count, server.victim = 0, (command.process.pid, sign, request) if sign else None
    return command.wait()


def end_state(folder: Path) -> tuple[dict[str, bytes], dict, str]:
    """Trees byte for byte, results but for the cost, the report."""
    run = folder / "run"
    results = json.loads((run / "results.json").read_text())
    del results["cost"], results["config"]["resume"]
    trees = {file.name: file.read_bytes() for file in (run / "trees").iterdir()}
    return trees, results, (run / "report.html").read_text()


def test_ten_kills_leave_no_trace(scene, tmp_path: Path) -> None:
    straight, torn, rng, kills = tmp_path / "straight", tmp_path / "torn", random.Random(1), []
    code, output = start(scene, straight)
    assert code == 0, output
    for kill in range(10):
        more = ["--resume"] if (torn / "run" / "config.json").exists() else []
        moment = {"rename": rng.randint(1, 9)} if kill % 2 else {"sign": signal.SIGKILL, "request": rng.randint(1, 40)}
        code, output = start(scene, torn, *more, **moment)
        assert code == -signal.SIGKILL, output
        kills.append((moment, [len(json.loads(file.read_text())["nodes"]) for file in sorted(torn.rglob("[ab].json"))]))
    assert not (torn / "run" / "results.json").exists()
    assert any(len(set(sizes)) == 2 for _, sizes in kills), kills  # some died between the trees of one round
    assert len({tuple(sizes) for _, sizes in kills}) >= 6, kills  # at different stages
    code, output = start(scene, torn, "--resume")
    assert code == 0 and "Cost of the solver since --resume" in output, output
    assert end_state(torn) == end_state(straight)
    assert not [file for file in end_state(torn)[0] if not file.endswith(".json")] and len(end_state(torn)[0]) == 2


def test_killed_while_testing_only_the_test_is_repeated(scene, tmp_path: Path) -> None:
    server, _ = scene
    code, output = start(scene, tmp_path / "straight", "--rounds", 2)
    assert code == 0, output
    all_calls = server.count
    code, _ = start(scene, tmp_path / "torn", "--rounds", 2, sign=signal.SIGKILL, request=all_calls - 3)
    assert code == -signal.SIGKILL
    code, _ = start(scene, tmp_path / "torn", "--rounds", 2, "--resume")
    assert code == 0 and server.count <= 16 and end_state(tmp_path / "torn") == end_state(tmp_path / "straight")


def test_more_rounds_go_on_and_other_settings_are_refused(scene, tmp_path: Path) -> None:
    for folder, rounds in (("once", 4), ("twice", 2)):
        assert start(scene, tmp_path / folder, "--rounds", rounds)[0] == 0
    before = end_state(tmp_path / "twice")
    code, output = start(scene, tmp_path / "twice", "--rounds", 4)
    assert code != 0 and "run holds a run: continue it by --resume, delete it by --overwrite" in output
    code, output = start(scene, tmp_path / "twice", "--rounds", 4, "--resume", "--seed", 1, "--search", "best")
    assert code != 0 and "--seed was 0, is now 1; --search was 'ucb', is now 'best'" in output
    assert "Traceback" not in output and end_state(tmp_path / "twice") == before
    assert start(scene, tmp_path / "twice", "--rounds", 4, "--resume")[0] == 0
    assert end_state(tmp_path / "twice") == end_state(tmp_path / "once")
    code, output = start(scene, tmp_path / "twice", "--rounds", 4, "--seed", 1, "--overwrite")
    assert code == 0 and end_state(tmp_path / "twice")[0] != end_state(tmp_path / "once")[0]


def test_ctrl_c_says_how_to_go_on(scene, tmp_path: Path) -> None:
    assert start(scene, tmp_path / "straight", "--rounds", 3)[0] == 0
    code, output = start(scene, tmp_path / "stopped", "--rounds", 3, sign=signal.SIGINT, request=25)
    assert code == 1 and "Traceback" not in output, output
    assert output.rstrip().endswith("run the same command with --resume.")
    assert start(scene, tmp_path / "stopped", "--rounds", 3, "--resume")[0] == 0
    assert end_state(tmp_path / "stopped") == end_state(tmp_path / "straight")
