"""What the README says can be run, runs: its commands (shortened, with local models and servers) and its snippets."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import cli
import pytest
from server import serve

import data
import evolve
import train

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
# Commands in blocks, and those within a sentence; "..." stands for what has been said before.
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.startswith("python ")]
PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL).replace("\n", " ")
WITHIN = re.findall(r"`(?:python )?([\w/]+\.py --[^`]*)`", PROSE)
COMMANDS += [f"python {command.replace('...', '').strip()}" for command in WITHIN]
PARSERS = {"train.py": (train.Config, train.__doc__), "evolve.py": (evolve.Config, evolve.__doc__)}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A folder with what the commands name: the tiny models in runs/, and two databases in BIRD's layout."""
    folder = tmp_path_factory.mktemp("readme")
    for role in ("base", "editor"):
        shutil.copytree(evolve.MINIATURE / role, folder / "runs" / "mini" / role)
    shutil.copytree(folder / "runs" / "mini" / "editor", folder / "runs" / "bird" / "editor")
    for db in ("shop", "zoo"):
        (folder / "bird" / "dev_databases" / db).mkdir(parents=True)
        with closing(sqlite3.connect(folder / "bird" / "dev_databases" / db / f"{db}.sqlite")) as base, base:
            base.execute("CREATE TABLE item (id, price)")
    questions = [{"db_id": db, "question": f"{i}?", "SQL": f"SELECT {i}"} for db in ("shop", "zoo") for i in range(9)]
    (folder / "bird" / "dev.json").write_text(json.dumps(questions))
    return folder


PAGES = (ROOT / "README.md", ROOT / "tests" / "RESULTS.md", ROOT / "tests" / "miniature" / "README.md")


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings: "What a real run costs" is #what-a-real-run-costs."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8"))
        for file, anchor in links:
            target = page.parent / file if file else page
            assert target.exists(), f"{page.name}: {file}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {file}#{anchor}"


def test_the_minutes_to_read_are_those_of_the_lines_above_the_banner() -> None:
    rows = re.findall(r"^\| \[(\w+\.py)\]\(\w+\.py\) \| (\d+)", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    assert [file for file, _ in rows] == ["lse.py", "data.py", "evolve.py", "train.py"]
    for file, minutes in rows:
        heart, _, plumbing = (ROOT / file).read_text("utf-8").partition("\n# From here on only")
        assert plumbing and abs(heart.count("\n") / 40 - int(minutes)) < 1.5, file


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 4 and "python train.py" in COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_is_one_that_the_scripts_take(command: str, monkeypatch) -> None:
    words = shlex.split(command)
    if words[1] in PARSERS:
        monkeypatch.setattr(sys, "argv", words[1:])
        evolve.command_line(*PARSERS[words[1]])  # SystemExit on an unknown flag or value
    else:
        assert words[1] == "-m" or (ROOT / words[1]).exists()


SHORT = ["--rounds", "1", "--k", "2", "--holdout", "2", "--solver-tokens", "16", "--editor-tokens", "40"]
SHORTER = {"train.py": ["--steps", "1", "--states", "2", "--grow-rounds", "1", "--test", "2",
                        "--max-prompt-tokens", "1900"],
           "evolve.py": ["--domains", "1", "--max-prompt-tokens", "1900"]}
PLACES = {"BIRD_DIR": "bird", "Qwen/Qwen3-4B-Instruct-2507": "runs/mini/base", "DIR": "runs/mini/base",
          "tests/miniature/base": "runs/mini/base"}  # fmt: skip
# The commands with problems of one's own and with a real language model run below.
RUNNABLE = [one for one in COMMANDS if one.split()[1] in SHORTER and "jsonl" not in one and "shop" not in one]


@pytest.mark.parametrize("number", range(len(RUNNABLE)), ids=RUNNABLE)
def test_every_command_of_the_readme_runs(number: int, run_folder: Path) -> None:
    """With a shortened budget, and small things of the same kind in the place of downloads. The last flag wins."""
    _, script, *words = shlex.split(RUNNABLE[number])
    places = [PLACES.get(word, word) for word in words]
    out = f"run-{number}"
    code, said = cli.run([*places, *SHORT, *SHORTER[script], "--out", out], run_folder, script=script)
    assert code == 0 and (run_folder / out / "config.json").exists(), said
    assert "Saved in" in said


def test_the_command_of_the_second_rung_plans_its_run(run_folder: Path) -> None:
    """Dry, and with the miniature's model in the place of one that knows English; test_shop.py runs the task."""
    command = next(one for one in COMMANDS if "--task shop" in one)
    words = [word.replace("SMOLLM2_DIR", "runs/mini/base") for word in shlex.split(command)[2:]]
    code, said = cli.run([*words, "--dry-run"], run_folder, script="train.py")
    assert code == 0 and "A dry run" in said, said
    assert re.search(r"solver +\d+,\d+", said), said


def test_every_flag_named_anywhere_is_a_field_of_a_config() -> None:
    known = {name.replace("_", "-") for config, _ in PARSERS.values() for name in config.__dataclass_fields__}
    known |= {"out", "nproc-per-node", "no-deps"}  # of tests/miniature/make_base.py, torchrun and pip
    named = {flag.replace("_", "-") for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", README)}
    assert named and named <= known, named - known


def test_every_function_named_in_the_table_exists() -> None:
    import lse

    modules = {"lse.py": lse, "data.py": data, "evolve.py": evolve, "train.py": train}
    where = re.findall(r"`(\w+\.py): ([\w.]+)`", README)
    assert len(where) >= 10
    for file, name in where:
        target = modules[file]
        for part in name.split("."):
            target = getattr(target, part)


def test_the_python_snippets_run(run_folder: Path) -> None:
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert snippets
    for snippet in snippets:
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + snippet
        done = subprocess.run([sys.executable, "-c", code], cwd=run_folder, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr


def test_problems_of_ones_own_evolve_as_the_readme_says(tmp_path: Path) -> None:
    lines = [json.dumps({"question": f"What is {i} plus {i}?", "answer": str(2 * i)}) for i in range(60)]
    (tmp_path / "problems.jsonl").write_text("\n".join(lines))

    def reply(messages: list[dict], body: dict) -> str:
        text = messages[-1]["content"]
        if body["model"] == "gpt-5":
            return "<prompt>Add the two numbers.</prompt>"
        first = re.search(r"What is (\d+) plus", text)[1]
        return f"<answer>{2 * int(first) * ('Add the two' in text)}</answer>"

    command = next(c for c in COMMANDS if "--task jsonl" in c)
    with serve(reply, models=("solver", "gpt-5")) as server:
        words = [re.sub(r"https?://\S+", server.url, word) for word in shlex.split(command)]
        done = subprocess.run([sys.executable, str(ROOT / words[1]), *words[2:], "--out", str(tmp_path / "run"),
                               "--samples", "1"], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["test"]["best"] == 1.0 and results["test"]["seed"] < 0.1, done.stdout
