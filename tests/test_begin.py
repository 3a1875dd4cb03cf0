"""Where a search begins, and when it is over: --instructions, domains of one's own, a finished run."""

from __future__ import annotations

import json
import re

import cli
import pytest
from server import serve

import evolve

COUNT = {"answers": 0}


def reply(messages: list[dict], body: dict) -> str:
    """A solver that answers right where its instructions say so, and an editor that writes just that."""
    text = messages[-1]["content"]
    if "You improve the instructions" in text:
        seen = re.search(r"Question: (.*?)\nAnswer", text, re.DOTALL)
        return f"<prompt>Take the second option. ({len(seen[1].splitlines())} lines seen)</prompt>"
    COUNT["answers"] += 1
    return f"<answer>{'B' if 'second option' in text else 'A'}</answer>"


def problems(domains: int) -> str:
    lines = []
    for number in range(12 * domains):
        record = {"question": f"Which, {number}?", "answer": "B", "choices": ["x", "y"]}
        record["domain"] = f"d{number % domains}"
        lines.append(json.dumps(record))
    return "\n".join(lines)


BUDGET = ["--k", "2", "--holdout", "4", "--test", "4", "--samples", "1", "--rounds", "1"]


def run(folder, url: str, *more: str) -> tuple[int, str]:
    words = ["--task", "jsonl", "--data", "own.jsonl", "--solver", url, "--editor", url, "--out", "run"]
    return cli.run([*words, *BUDGET, *more], folder, script="evolve.py")


def test_ones_own_prompt_is_where_the_search_begins_and_a_finished_run_stays_finished(tmp_path) -> None:
    (tmp_path / "own.jsonl").write_text(problems(1))
    (tmp_path / "mine.txt").write_text("You are a careful clerk.\n")
    with serve(reply) as server:
        code, said = run(tmp_path, server.url, "--instructions", "mine.txt")
        assert code == 0, said
        tree = json.loads((tmp_path / "run/trees/d0.json").read_text())
        assert tree["nodes"][0]["instructions"] == "You are a careful clerk."
        # the editor has seen the question with both options
        assert tree["nodes"][1]["instructions"] == "Take the second option. (3 lines seen)"
        before = (tmp_path / "run/results.json").read_text()
        assert json.loads(before)["test"]["best"] == 1

        COUNT["answers"] = 0
        code, said = run(tmp_path, server.url, "--instructions", "mine.txt", "--resume")
        assert code == 0 and "This run is finished" in said and COUNT["answers"] == 0
        assert (tmp_path / "run/results.json").read_text() == before
    code, said = run(tmp_path, "http://localhost:1/v1", "--instructions", "other.txt", "--overwrite")
    assert code != 0 and "--instructions other.txt: there is no such file." in said


def test_domains_that_are_left_out_are_named(tmp_path) -> None:
    (tmp_path / "own.jsonl").write_text(problems(5))
    with serve(reply) as server:
        code, said = run(tmp_path, server.url, "--dry-run")
    assert code == 0 and "4 of the task's 5 domains are left out, kept to train on: --domains all" in said, said
    assert "What the solver would be asked, for one:\n[user] " in said and "tags, as in <answer>" in said
    with serve(reply) as server:
        code, said = run(tmp_path, server.url, "--dry-run", "--domains", "all")
    assert code == 0 and "Plan: 5 trees of" in said and "left out" not in said, said
    code, said = run(tmp_path, "http://localhost:1/v1", "--dry-run", "--domains", "5")
    assert code != 0 and "has 1 test domains" in said and "d0, d1" in said


@pytest.mark.parametrize("given, begun", [("", "old"), ("Be brief.", "Be brief."), ("long " * 2000, "long " * 2000)])
def test_text_is_taken_as_it_is(given: str, begun: str) -> None:
    class Task:
        seed_instructions = "old"

    evolve.begin_with(Task, given)
    assert Task.seed_instructions == begun


@pytest.mark.parametrize("settings, usual", [({}, True), ({"seed": 3, "out": "x"}, True), ({"rounds": 5}, False),
                                             ({"solver": "x"}, False), ({"search": "chain"}, False)])  # fmt: skip
def test_what_to_expect_is_said_of_the_usual_run_alone(settings: dict, usual: bool) -> None:
    assert evolve.is_usual(evolve.with_presets(evolve.Config(**settings))) == usual


@pytest.mark.parametrize("rounds, score, reported, finished", [
    (2, 0.5, 2, True),
    (1, 0.5, 2, False),  # a round to go
    (1, 1.0, 2, True),  # none is needed
    (2, 0.5, 1, False),  # the results are of a shorter run
    (2, 0.5, None, False),  # killed before the test
])  # fmt: skip
def test_when_a_run_is_finished(tmp_path, rounds: int, score: float, reported: int | None, finished: bool) -> None:
    tree = evolve.EvolutionTree("", score)
    tree.rounds = rounds
    if reported:
        (tmp_path / "results.json").write_text(json.dumps({"config": {"rounds": reported}}))
    s = evolve.with_presets(evolve.Config(rounds=2))
    assert evolve.is_finished({"d": tree}, s, tmp_path) == finished
