"""A run that goes wrong says so: how answers turned out, which flag helps, and when nothing can come of it any more."""

from __future__ import annotations

import json
import sys
from itertools import count
from pathlib import Path

import pytest
from scripted import WRONG, scripted
from server import Fault, serve

import evolve
from evolve import Config, Settings
from lse import EvolutionTree, LocalModel, Usage

GOLD = {f"How much is {a} and {b}?": str(a + b) for a in range(10, 20) for b in range(20, 24)}
SETTINGS = dict(task="jsonl", rounds=2, k=2, holdout=6, test=4, samples=1, domains="", solver_tokens=100,
                editor_model="good-editor", solver_model="solver")  # fmt: skip
THINKS = Fault("null", finish="length")  # null content: all tokens went into thinking
LOST = "Not one of the solver's 6 responses can be used"


@pytest.fixture
def run(tmp_path: Path, monkeypatch):
    """run(reply, **settings): evolve.py's main with both models behind a server; the run's folder."""
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"question": question, "answer": int(answer)}) for question, answer in GOLD.items()]
    Path("own.jsonl").write_text("\n".join(rows))

    def run(reply, **settings) -> Path:
        with serve(reply, models=("solver", "good-editor", "mute-editor")) as server:
            urls = dict(solver=server.url, editor=server.url, data="own.jsonl", out="run")
            evolve.main(Config(**SETTINGS | urls | settings))
        return Path("run")

    return run


def with_solver(answer):
    """The scripted editor, and a solver that answers `answer(text of the scripted solver)`."""
    script = scripted(GOLD, base=0.5)

    def reply(messages, body):
        text = script(messages, body).replace(WRONG, "7")
        return answer(text) if body["model"] == "solver" else text

    return reply


def flags(url: str) -> list[str]:
    line = f"--task jsonl --data own.jsonl --solver {url} --editor {url} --holdout 6 --k 2 --test 4 --samples 1"
    return line.split()


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def test_a_solver_that_always_thinks_to_its_limit_ends_the_run_after_the_seed_score(run) -> None:
    """The first six answers tell; no edit is asked for, and the sentence names the flag."""
    asked = []

    def reply(messages, body):
        asked.append(body["model"])
        return THINKS

    with pytest.raises(SystemExit) as stopped:
        run(reply)
    said = str(stopped.value)
    assert said.startswith(f"{LOST} (0 failed, 6 cut off, 6 with nothing to read), so the run stops here.")
    assert "cut off at 100 tokens: give it more by --solver-tokens, or switch its thinking off" in said
    assert asked == ["solver"] * 6 and not Path("run/trees").exists()


def test_the_same_on_the_command_line_is_one_sentence(run, monkeypatch, capsys) -> None:
    with serve(lambda *_: THINKS, models=("solver",)) as server:
        monkeypatch.setattr(sys, "argv", ["evolve.py", *flags(server.url)])
        with pytest.raises(SystemExit, match=LOST):
            evolve.start(evolve.main, Config, "")
    assert "Plan: 1 tree of" in capsys.readouterr().out


def test_a_comparison_stops_as_well(run) -> None:
    with pytest.raises(SystemExit, match=LOST):
        run(lambda *_: THINKS, compare=True, seeds=1)


@pytest.mark.parametrize("answer, words", [
    (Fault(status=400, message="no"), "Most of what the solver was asked for never came: look into the log"),
    ("I would rather not say.", "there was nothing to read: try another model (--solver) or more --solver-tokens"),
    ("word " * 200, "give it more by --solver-tokens"),
])  # fmt: skip
def test_each_way_to_lose_all_answers_has_its_remedy(run, answer, words) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(lambda messages, body: "Hello" if messages[0]["content"] == "Hello" else answer)
    assert LOST in str(stopped.value) and words in str(stopped.value)


def test_a_grader_that_does_not_say_what_it_could_not_read(run, monkeypatch) -> None:
    """All cut and nothing right is as good as all lost."""
    monkeypatch.setattr(evolve, "grade_all", lambda task, solver, pairs: [
        evolve.Answer(p.id, p.question, sample.text, "", p.gold, False) for p, sample in pairs])
    with pytest.raises(SystemExit, match=LOST):
        run(lambda *_: THINKS)


def test_where_most_answers_are_lost_the_run_goes_on_and_says_so_twice(run, capsys) -> None:
    numbers = count()
    out = run(with_solver(lambda text: THINKS if next(numbers) % 3 else text))
    said = capsys.readouterr().out
    counted = results(out)["cost"]["solver"]
    assert counted["answers"] > 6 and counted["cut"] == counted["unreadable"]
    assert counted["answers"] / 2 < counted["cut"] < counted["answers"]
    assert "The 6 answers under the seed instructions: 0 failed, " in said
    assert said.count("was cut off at 100 tokens: give it more by --solver-tokens") == 2
    assert f"Cost of the solver: {counted['answers']} answers, 0 failed, {counted['cut']} cut" in said


def test_where_nothing_is_wrong_nothing_is_advised(run, capsys) -> None:
    out = run(with_solver(lambda text: text))
    said = capsys.readouterr().out
    assert "The 6 answers under the seed instructions: 0 failed, 0 cut off, 0 with nothing to read.\n" in said
    assert "Most of" not in said and "In most" not in said
    unsolved = results(out)["never_solved"]
    assert unsolved["of"] == 6 and 0 <= unsolved["problems"] < 6
    assert f"Holdout problems that no candidate ever solved: {unsolved['problems']} of 6" in said
    assert results(out)["dropped"] == {"solver": {}, "editor": {}} and results(out)["check"] == {}


def test_an_editor_that_never_writes_anything_usable_ends_the_run_at_ten_edits(run) -> None:
    """Its trees stay. A few bad edits are bad luck."""
    reply = with_solver(lambda text: text)
    run(reply, editor_model="mute-editor", rounds=9, out="short")
    with pytest.raises(SystemExit, match="Not one of the editor's 10 responses can be used"):
        run(reply, editor_model="mute-editor", rounds=12)
    (file,) = Path("run/trees").glob("*.json")
    assert len(EvolutionTree.load(file).nodes) == 11


def test_settings_that_a_server_turns_down_stand_in_the_results(run, capsys) -> None:
    script = with_solver(lambda text: text)

    def reply(messages, body):
        if body["model"] == "solver" and "top_k" in body:
            return Fault(status=400, message="top_k is not known here")
        return script(messages, body)

    with pytest.warns(UserWarning, match="turns down top_k"):
        out = run(reply)
    dropped = results(out)["dropped"]
    assert "top_k is not known here" in dropped["solver"]["top_k"] and dropped["editor"] == {}
    assert "The solver's server turned down top_k: it was left out." in capsys.readouterr().out


def test_a_failed_edit_is_rejected_with_the_servers_words(run) -> None:
    script = with_solver(lambda text: text)

    def reply(messages, body):
        if body["model"] == "solver" or messages[0]["content"] == "Hello":
            return script(messages, body)
        return Fault(status=422, message="filtered, because of the moon")

    out = run(reply)
    (file,) = (out / "trees").glob("*.json")
    notes = [node.note for node in EvolutionTree.load(file).nodes[1:]]
    assert len(notes) == 2 and all("no response: 422: filtered, because of the moon" in note for note in notes)
    assert results(out)["cost"]["editor"]["failed"] == 2


def test_a_server_lost_on_the_way_says_that_resume_goes_on(run, monkeypatch) -> None:
    """Lost after the seed's score: the tree is saved, and the sentence says how to go on. Never there: it does not."""
    script, asked = with_solver(lambda text: text), []

    def reply(messages, body):
        asked.append(1)
        return script(messages, body) if len(asked) <= 6 else Fault(status=401, message="the key has expired")

    with serve(reply, models=("solver",)) as server:
        monkeypatch.setattr(sys, "argv", ["evolve.py", *flags(server.url), "--out", "run"])
        with pytest.raises(SystemExit) as lost:
            evolve.start(evolve.main, Config, "")
    assert "the key has expired" in str(lost.value) and "--resume goes on" in str(lost.value)
    assert list(Path("run/trees").glob("*.json"))
    with pytest.raises(SystemExit) as never:
        evolve.start(evolve.main, Config, "")
    assert "--resume goes on" not in str(never.value)


def test_a_rehearsal_goes_on_whatever_is_lost() -> None:
    trees = {"a": EvolutionTree("", 0.0, [0.0])}
    solver, remote = LocalModel.__new__(LocalModel), type("Remote", (), {})()
    solver.usage = remote.usage = Usage(answers=4, cut=4, unreadable=4)
    settings = evolve.with_presets(Settings(task="jsonl"))
    assert "4 cut off, 4 with nothing to read. Most of" in evolve.seed_outcome(solver, trees, settings)
    with pytest.raises(SystemExit):
        evolve.seed_outcome(remote, trees, settings)
    with pytest.raises(SystemExit):
        evolve.seed_outcome(solver, trees, evolve.with_presets(Settings()))


def test_what_is_counted() -> None:
    tree = EvolutionTree("", 0.5, [1.0, 0.0, 0.0, 0.0])
    tree.add(0, "better", 0.5, [0.0, 0.0, 0.25, 0.0])
    tree.add(0, "rejected", None, note="no tags")
    assert evolve.never_solved({"a": tree, "b": EvolutionTree("", 1.0, [1.0])}) == {"problems": 2, "of": 5}
    assert evolve.total([Usage(1, 2, 3, 4, 5, 6), Usage(10, 20, 30, 40, 50, 60)]) == Usage(11, 22, 33, 44, 55, 66)
