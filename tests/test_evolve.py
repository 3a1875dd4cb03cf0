"""The loop of evolve.py: its steps by hand on a toy task, the whole command against a scripted server, its errors."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

import cli
import make_base
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted import RULES, bird_gold, level, scripted
from server import Fault, serve
from transformers import AutoModelForCausalLM

import data
import evolve
import train
from data import Answer, Grade, Problem
from evolve import Config, Edit, Round, Settings, with_presets
from lse import EvolutionTree, LocalModel, Node, Sample, Usage

SHARED = Path(__file__).parents[1].parent / "shared" / "data" / "bird"


# A toy task: problem i of a domain is answered rightly under instructions that hold a number above i.


class Toy:
    name, seed_instructions = "toy", "Answer with skill 0."

    def __init__(self, **sizes: int) -> None:
        self.sizes = sizes

    def domains(self, split: str) -> list[str]:
        return list(self.sizes)

    def problems(self, domain: str) -> list[Problem]:
        numbers = range(self.sizes[domain])
        return [Problem(f"{domain}{i}", f"question {i} of {domain}?", str(i), domain) for i in numbers]

    def solve_chat(self, instructions: str, problem: Problem) -> list[dict]:
        return [{"role": "user", "content": f"{instructions}\n{problem.question}"}]

    def grade(self, problem: Problem, response: str) -> Grade:
        return Grade(response == problem.gold, response, "" if response == problem.gold else f"not {response}")

    def edit_chat(self, instructions: str, summary: list[Answer]) -> list[dict]:
        return [{"role": "user", "content": f"edit: {instructions}\n" + "\n".join(a.question for a in summary)}]


class Scribe:
    """A model that answers by a function of the chat's text, and remembers what it was asked."""

    def __init__(self, answer) -> None:
        self.answer, self.asked, self.options, self.usage = answer, [], [], Usage()

    def sample(self, chats: list, n: int = 1, **options) -> list[list[Sample]]:
        self.asked += [chat[-1]["content"] for chat in chats for _ in range(n)]
        self.options.append(options)
        self.usage.answers += n * len(chats)
        return [[Sample(self.answer(chat[-1]["content"]), None, None, False) for _ in range(n)] for chat in chats]


def skilled(text: str) -> str:
    """The toy's solver."""
    skill, questions = max(map(int, re.findall(r"skill (\d+)", text))), re.findall(r"question (\d+)", text)
    return questions[0] if questions and int(questions[0]) < skill else "?"


def editor_of(*skills: int | None) -> Scribe:
    """An editor whose edits have these skills, one after the other; None: an edit without tags."""
    following = iter(skills)

    def write(_: str) -> str:
        skill = next(following)
        return "I will not." if skill is None else f"<prompt>Answer with skill {skill}.</prompt>"

    return Scribe(write)


def settings(**changes) -> Settings:
    few = Settings(task="toy", k=3, holdout=6, test=6, samples=1, rounds=4)
    return with_presets(replace(few, **changes), remote=True)


def answer(question: str, correct: bool = False, feedback: str = "") -> Answer:
    return Answer(question, question, "the response", f"answer to {question}", f"gold of {question}", correct, feedback)


# ---------------------------------------------------------------------------------------------------------------------
# The steps of a round
# ---------------------------------------------------------------------------------------------------------------------


def test_splits_are_disjoint_complete_and_depend_on_seed_and_domain() -> None:
    task, s = Toy(a=30, b=30), settings()
    parts = evolve.split_problems(task.problems("a"), s)
    assert {name: len(part) for name, part in parts.items()} == {"holdout": 6, "test": 6, "pool": 18}
    ids = [p.id for part in parts.values() for p in part]
    assert sorted(ids) == sorted(p.id for p in task.problems("a"))
    assert parts == evolve.split_problems(task.problems("a"), s)

    def test_numbers(domain: str, seed: int) -> list[str]:
        return [p.gold for p in evolve.split_problems(task.problems(domain), replace(s, seed=seed))["test"]]

    assert test_numbers("a", 0) != test_numbers("b", 0) and test_numbers("a", 0) != test_numbers("a", 1)


def test_prescribed_splits_are_kept_and_an_empty_one_is_an_error() -> None:
    marks = ["holdout"] * 8 + ["pool"] * 3 + ["test"] * 4
    problems = [replace(p, split=mark) for p, mark in zip(Toy(a=15).problems("a"), marks)]
    parts = evolve.split_problems(problems, settings())
    assert [p.id for p in parts["holdout"]] == [f"a{i}" for i in range(6)]  # at most --holdout of them
    assert [p.split for p in parts["pool"] + parts["test"]] == ["pool"] * 3 + ["test"] * 4
    for gone in ("holdout", "pool", "test"):
        with pytest.raises(ValueError, match="of a name their splits, and one of pool, holdout, test is empty"):
            evolve.split_problems([p for p in problems if p.split != gone], settings())
    assert evolve.split_problems([p for p in problems if p.split != "test"], settings(test=0))["test"] == []


def test_too_few_problems_are_an_error_with_the_numbers() -> None:
    s = settings()
    assert len(evolve.split_problems(Toy(a=15).problems("a"), s)["pool"]) == 3
    with pytest.raises(ValueError, match=r"a has 14 problems, fewer than k \+ holdout \+ test = 3 \+ 6 \+ 6: .*--k"):
        evolve.split_problems(Toy(a=14).problems("a"), s)
    with pytest.raises(ValueError, match="this domain has 0 problems"):
        evolve.split_problems([], s)


def test_a_repeated_problem_is_in_one_split_only() -> None:
    problems = Toy(a=15).problems("a")
    twins = [replace(p, id=f"{p.id}-again") for p in problems]
    parts = evolve.split_problems(problems + twins, settings())
    questions = [p.question for part in parts.values() for p in part]
    assert len(questions) == len(set(questions)) == 15
    with pytest.raises(ValueError, match="a has 14 problems"):
        evolve.split_problems(problems[:14] + twins[:14], settings())


def test_batches_depend_on_seed_domain_and_round_only() -> None:
    pool, s = Toy(a=40).problems("a"), settings(k=10)
    batches = {(seed, d, r): tuple(p.id for p in evolve.draw_batch(pool, replace(s, seed=seed), d, r))
               for seed in (0, 1) for d in "ab" for r in (0, 1)}
    assert len(set(batches.values())) == 8 and all(len(batch) == 10 for batch in batches.values())
    other = replace(s, rounds=9, holdout=1, editor_tokens=1)
    assert tuple(p.id for p in evolve.draw_batch(pool, other, "a", 0)) == batches[0, "a", 0]
    assert len(evolve.draw_batch(pool[:1], s, "a", 0)) == 10  # with replacement: a pool of one would do
    places = [tuple(p.id for p in evolve.draw_batch(pool, s, "a", 0, place)) for place in (0, 1)]
    assert len({batches[0, "a", 0], *places}) == 3
    for where, drawn in (("0/a/0", batches[0, "a", 0]), ("0/a/1/0", places[1])):
        assert tuple(p.id for p in random.Random(where).choices(pool, k=10)) == drawn


def test_answers_in_which_nothing_can_be_read_are_counted() -> None:
    """One of them: the second cannot be read, the third never came."""
    task, solver = Toy(a=5), Scribe(lambda _: "?")
    task.grade = lambda problem, text: Grade(False, "", readable=problem.id == "a0")
    solver.sample = lambda chats, n, **_: [[Sample("", None, None, False, error)] for error in ("", "", "lost")]
    answers = evolve.solve(task, solver, "", task.problems("a")[:3])
    assert [a.readable for a in answers] == [True, False, False] and solver.usage.unreadable == 1


def test_answers_come_back_by_job_and_problem_with_all_samples_together() -> None:
    task = Toy(a=5, b=5)
    jobs = [("skill 3", task.problems("a")[1:5]), ("skill 0", []), ("skill 5", task.problems("b")[4:])]
    found = evolve.solve_all(task, Scribe(skilled), jobs, samples=2, temperature=0.5)
    assert [[(a.id, a.correct) for a in job] for job in found] == [
        [("a1", True), ("a1", True), ("a2", True), ("a2", True), ("a3", False), ("a3", False), ("a4", False),
         ("a4", False)], [], [("b4", True), ("b4", True)]]
    task.grade_many = lambda pairs: [Grade(True, "together") for _ in pairs]
    assert all(a.correct and a.answer == "together" for a in evolve.solve(task, Scribe(skilled), "skill 0", jobs[0][1]))


def test_scores_are_shares_per_problem() -> None:
    right = iter([True, False, True, True, False, False] * 2)
    task, jobs = Toy(a=5), [("", Toy(a=5).problems("a")[:3])]
    task.grade = lambda *_: Grade(next(right), "")
    assert evolve.score_all(task, Scribe(lambda _: ""), jobs, settings(samples=2)) == [[0.5, 1.0, 0.0]]
    jobs[0][1].pop()
    assert evolve.score_all(task, Scribe(lambda _: ""), jobs, settings(samples=3)) == [[2 / 3, 1 / 3]]


class Words(Scribe):
    """Encodes a word as a token."""

    def encode(self, chat: list[dict]) -> list[str]:
        return chat[-1]["content"].split()


def test_whole_problems_are_dropped_to_fit_a_limit() -> None:
    task, editor, summary = Toy(a=9), Words(None), [answer(f"one two three {i}") for i in range(4)]
    for limit, kept in ((0, 4), (19, 4), (18, 3), (15, 3), (14, 2), (7, 1), (2, 1)):  # "edit: be good" and 4 words each
        chat, dropped = evolve.edit_chat(task, editor, "be good", summary, limit)
        assert dropped == 4 - kept, limit
        assert chat == task.edit_chat("be good", summary[:kept])
    # Of a server's tokenizer nothing is known: four characters are a token, and the whole chat has 77.
    assert [evolve.edit_chat(task, Scribe(None), "be good", summary, limit)[1] for limit in (19, 18)] == [0, 1]


def test_a_local_editor_is_never_asked_more_than_it_can_read() -> None:
    tokenizer, task = make_base.mini_tokenizer(), data.Mini()
    editor = LocalModel(make_base.tiny_qwen3(tokenizer), tokenizer)
    assert evolve.context_length(editor) == 2048 and evolve.context_length(Scribe(None)) == 0
    summary = evolve.solve(task, Scribe(lambda _: ""), "", task.problems("dev000")[:110])
    chat, dropped = evolve.edit_chat(task, editor, "", summary)
    assert 0 < dropped < 110 and 1500 < len(editor.encode(chat)) <= 1536


@pytest.mark.parametrize("text, truncated, expected", [
    ("<prompt>ten chars.</prompt>", False, ("ten chars.", "")),
    ("<prompt>ten chars.</prompt> and on", True, ("ten chars.", "")),
    ("<prompt>nine char</prompt>", False, (None, "9 characters in <prompt> tags, fewer than 10")),
    ("<prompt>  </prompt>", False, (None, "0 characters in <prompt> tags, fewer than 10")),
    ("no tags at all", False, (None, "nothing usable in <prompt> tags")),
    ("<prompt>never closed", True, (None, "cut off before </prompt>")),
    ("", False, (None, "nothing usable in <prompt> tags")),
])
def test_what_counts_as_an_edit(text: str, truncated: bool, expected: tuple) -> None:
    sample = Sample(text, None, None, truncated)
    edit = evolve.read_edit(Toy(), sample)
    assert (edit.instructions, edit.note) == expected and edit.valid == (expected[0] is not None)
    assert edit.text == text and edit.sample is sample


def test_an_edit_that_never_came_says_why() -> None:
    edit = evolve.read_edit(Toy(), Sample("", None, None, False, "503: too busy"))
    assert not edit.valid and edit.note == "no response: 503: too busy"


def test_a_task_may_read_edits_in_its_own_way() -> None:
    def read(text: str) -> tuple:
        edit = evolve.read_edit(data.Mini(), Sample(text, None, None, False))
        return edit.instructions, edit.note

    assert read("<prompt> tax c1 </prompt>") == ("tax c1", "")  # shorter than 10 characters
    assert read("<prompt> nothing known </prompt>") == (None, "nothing usable in <prompt> tags")


# ---------------------------------------------------------------------------------------------------------------------
# Writing edits
# ---------------------------------------------------------------------------------------------------------------------


def test_the_critic_sees_six_failures_with_diverse_feedback_first() -> None:
    summary = [answer("a", feedback="x"), answer("b", feedback="x"), answer("c", True, "y"), answer("d", feedback="y"),
               *[answer(f"e{i}", feedback="x") for i in range(6)], answer("z", feedback="z")]
    shown = [block.split("\n") for block in evolve.failures(summary).split("\n\n")]
    assert [block[0] for block in shown] == ["a", "d", "z", "b", "e0", "e1"]
    assert shown[1] == ["d", "answer: answer to d", "expected: gold of d", "y"]
    assert evolve.failures([answer("a", True)]) == "(none)"
    assert len(evolve.failures([answer("long " * 10**5)])) < 6000


JOBS = [("old rules", [answer("q1"), answer("q2", True)]), ("more old rules", [answer("q3")])]


def propose(method: str, editor: Scribe, s: Settings, jobs: list = JOBS) -> list[Edit]:
    """The edits that a method writes for (instructions, summary)."""
    rounds = [Round("a", None, [], Node(0, None, old, 0.0), [], summary) for old, summary in jobs]
    evolve.METHODS[method].propose(Toy(), editor, rounds, s)
    return [r.edit for r in rounds]


@pytest.mark.parametrize("method", ["lse", "gepa"])
def test_lse_and_gepa_ask_for_a_rewrite(method: str) -> None:
    editor = Scribe(lambda text: f"<prompt>new {text[6:9]} rules</prompt>" if "q1" in text else "none")
    edits = propose(method, editor, settings(editor_tokens=7, editor_temperature=0.3))
    assert [(edit.instructions, edit.note, edit.text) for edit in edits] == [
        ("new old rules", "", "<prompt>new old rules</prompt>"),
        (None, "nothing usable in <prompt> tags", "none")]
    assert editor.asked == ["edit: old rules\nq1\nq2", "edit: more old rules\nq3"]
    assert editor.options == [dict(max_new_tokens=7, temperature=0.3, top_p=0.8, top_k=20)]
    assert editor.usage.unreadable == 1


def test_the_editors_prompt_keeps_to_its_limit() -> None:
    editor = Words(lambda _: "")
    propose("lse", editor, settings(max_prompt_tokens=4))
    assert editor.asked == ["edit: old rules\nq1", "edit: more old rules\nq3"]


def test_textgrad_criticises_first_and_rewrites_then() -> None:
    def write(text: str) -> str:
        return "<IMPROVED_VARIABLE>better rules</IMPROVED_VARIABLE>" if "<IMPROVED" in text else f"vague: {len(text)}"

    editor = Scribe(write)
    edits = propose("textgrad", editor, settings())
    assert [(edit.instructions, edit.note) for edit in edits] == [("better rules", "")] * 2
    first, second, third, fourth = editor.asked
    assert "old rules" in first and "expected: gold of q1" in first and "q2" not in first and "q3" in second
    assert "old rules" in third and f"vague: {len(first)}" in third and f"vague: {len(second)}" in fourth
    assert "more old rules" in fourth


def test_reflexion_keeps_the_head_and_the_last_lessons() -> None:
    lessons = [f"lesson number {i}" for i in range(evolve.LESSONS + 2)]
    old = "Be brief.\nAlways."
    for i, lesson in enumerate(lessons):
        editor = Scribe(lambda text, lesson=lesson: f"<lesson>{lesson}\n twice</lesson>")  # one line each
        [edit] = propose("reflexion", editor, settings(), [(old, [answer("q")])])
        old = edit.instructions
        assert edit.note == "" and editor.asked[0].startswith("edit: Be brief.") and "</lesson>" in editor.asked[0]
        kept = [f"{one} twice" for one in lessons[: i + 1]][-evolve.LESSONS:]
        assert old.split("\nLesson: ") == ["Be brief.\nAlways.", *kept]
    assert old.count("Lesson: ") == evolve.LESSONS
    editor = Scribe(lambda _: "<prompt>rules, no lesson</prompt>")
    [edit] = propose("reflexion", editor, settings(), [("", [])])
    assert edit.instructions is None and "lesson" in edit.note and editor.usage.unreadable == 1


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1
# ---------------------------------------------------------------------------------------------------------------------


def grow(editor: Scribe, method: str = "lse", search: str = "ucb", **changes) -> tuple[EvolutionTree, Scribe]:
    """A tree over a domain in which a holdout problem is right under skill n iff its number is below n."""
    solver = Scribe(skilled)
    return evolve.evolve(Toy(a=20), "a", solver, editor, settings(), method, search=search, **changes), solver


def holdout_score(skill: int) -> float:
    holdout = evolve.split_problems(Toy(a=20).problems("a"), settings())["holdout"]
    return fmean(int(p.gold) < skill for p in holdout)


def test_a_tree_grows_by_a_node_a_round_with_scores_and_summaries() -> None:
    tree, solver = grow(editor_of(5, 10, 15, 20), search="chain")
    assert [node.parent for node in tree.nodes] == [None, 0, 1, 2, 3]
    assert [node.score for node in tree.nodes] == [holdout_score(skill) for skill in (0, 5, 10, 15, 20)]
    assert tree.nodes[2].instructions == "Answer with skill 10." and tree.nodes[2].visits == 1
    assert all(fmean(node.scores) == node.score and len(node.scores) == 6 for node in tree.nodes)
    pool = evolve.split_problems(Toy(a=20).problems("a"), settings())["pool"]
    for round_, node in enumerate(tree.nodes[1:]):  # what the editor saw: this round's batch, under the parent
        batch = evolve.draw_batch(pool, settings(), "a", round_)
        assert [a.id for a in node.summary] == [p.id for p in batch]
        assert [a.correct for a in node.summary] == [int(p.gold) < 5 * round_ for p in batch]
    assert solver.usage.answers == 6 + 4 * (3 + 6)


def test_ucb_steps_back_from_a_bad_edit_and_a_chain_does_not() -> None:
    assert [node.parent for node in grow(editor_of(15, 0, 0, 0), search="best")[0].nodes] == [None, 0, 1, 1, 1]
    assert [node.parent for node in grow(editor_of(15, 0, 0, 0), search="ucb", c=0.0)[0].nodes] == [None, 0, 1, 1, 1]
    assert [node.parent for node in grow(editor_of(15, 0, 0, 0), search="chain")[0].nodes] == [None, 0, 1, 2, 3]


@pytest.mark.parametrize("method, editor", [
    ("lse", lambda: editor_of(5, 20)), ("gepa", lambda: editor_of(5, 20)),
    ("textgrad", lambda: Scribe(lambda _: "<IMPROVED_VARIABLE>Answer with skill 20.</IMPROVED_VARIABLE>")),
    ("reflexion", lambda: Scribe(lambda _: "<lesson>Answer with skill 20.</lesson>"))])
def test_a_solved_tree_stops_growing_with_every_method(method: str, editor) -> None:
    """Nothing can beat an instruction under which the whole holdout is right. No model is asked again."""
    writer = editor()
    tree, solver = grow(writer, method=method)
    assert tree.best() is tree.nodes[-1] and tree.best().score == 1 and tree.rounds == len(tree.nodes) - 1 < 4
    asked = solver.usage.answers, writer.usage.answers
    evolve.evolve_all(Toy(a=20), {"a": tree}, solver, writer, settings(rounds=40), method=method)
    assert (solver.usage.answers, writer.usage.answers) == asked and tree.rounds < 4


def test_the_other_trees_go_on_and_a_comparison_never_stops() -> None:
    """A solved tree is left out of the batches; with `stop` false, as in a comparison, it takes every round."""
    task, s = Toy(a=20, b=20), settings(rounds=3)

    def write(text: str) -> str:
        return f"<prompt>Answer with skill {20 if 'of a?' in text else 5}.</prompt>"

    for stop, sizes in ((True, [2, 4]), (False, [4, 4])):
        solver, editor = Scribe(skilled), Scribe(write)
        trees = evolve.seed_trees(task, ["a", "b"], solver, s)
        evolve.evolve_all(task, trees, solver, editor, s, stop=stop)
        assert [len(tree.nodes) for tree in trees.values()] == sizes
        assert editor.usage.answers == sum(sizes) - 2 and trees["a"].best().id == 1


def test_one_wrong_sample_of_one_problem_is_not_solved() -> None:
    assert evolve.solved(EvolutionTree("seed", 1.0, [1.0] * 50))
    assert not evolve.solved(EvolutionTree("seed", fmean([1.0] * 49 + [7 / 8]), [1.0] * 49 + [7 / 8]))


@pytest.mark.parametrize("stop", [True, False])
def test_restoring_leaves_solved_trees_behind_only_where_they_stop(tmp_path: Path, stop: bool) -> None:
    """Killed while saving round 3: tree b was saved, c not yet, and a was solved in round 1."""
    trees = {name: EvolutionTree("seed", 0.5, [0.5]) for name in "abc"}
    for name, rounds in (("a", 1), ("b", 3), ("c", 2)):
        for _ in range(rounds):
            trees[name].add(trees[name].select(), "edit", 1.0 if name == "a" else 0.25, [0.25])
    evolve.save_trees(tmp_path, trees)
    restored = evolve.restore_trees(tmp_path, list("abc"), stop)
    rounds = [1, 2, 2] if stop else [1, 1, 1]
    assert [tree.rounds for tree in restored.values()] == rounds
    assert [len(tree.nodes) - 1 for tree in restored.values()] == rounds
    assert [sum(node.visits for node in tree.nodes) for tree in restored.values()] == rounds


def test_who_gains_nothing_gets_the_seed_instructions_and_is_told(tmp_path: Path, capsys) -> None:
    """Edits as good as the seed's instructions, and worse ones: the seed's are returned. Tree b is solved at once."""
    task, s = Toy(a=20, b=20), Config(**asdict(settings(rounds=3)))

    def write(text: str) -> str:
        return f"<prompt>Answer with skill {20 if 'of b?' in text else 0}.</prompt>"

    solver, editor = Scribe(skilled), Scribe(write)
    trees = evolve.seed_trees(task, ["a", "b"], solver, s)
    evolve.evolve_all(task, trees, solver, editor, s)
    evolve.finish(task, trees, solver, editor, s, tmp_path, {})
    said = capsys.readouterr().out
    assert "Nothing beat the seed instructions in 1 of 2 domains, and there you get the seed instructions: a." in said
    assert "1 of 2 trees stopped before round 3: a node answers its whole holdout right" in said
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["instructions"] == {"a": "Answer with skill 0.", "b": "Answer with skill 20."}
    assert results["test"]["domains"]["a"] == [0.0, 0.0]
    page = (tmp_path / "report.html").read_text()
    assert page.count("Nothing beat the seed instructions") == page.count("answers its whole holdout right") == 1


def test_an_invalid_edit_costs_its_round_and_is_recorded() -> None:
    tree, solver = grow(editor_of(None, 5, None, None), search="chain")
    assert [node.score is None for node in tree.nodes] == [False, True, False, True, True]
    assert [node.parent for node in tree.nodes] == [None, 0, 0, 2, 2]  # the old instructions stay
    assert tree.nodes[1].instructions == "I will not." and tree.nodes[1].scores is None
    assert tree.nodes[1].note == "nothing usable in <prompt> tags" and tree.nodes[2].note == ""
    assert solver.usage.answers == 6 + 4 * 3 + 6 and tree.rounds == 4


def test_all_domains_grow_in_step_even_if_no_edit_of_a_round_is_valid() -> None:
    task, solver, s = Toy(a=20, b=20), Scribe(skilled), settings(rounds=2)
    seen = []
    trees = evolve.seed_trees(task, ["a", "b"], solver, s)
    evolve.evolve_all(task, trees, solver, editor_of(None, None, None, 7), s,
                      on_round=lambda trees: seen.append([len(tree.nodes) for tree in trees.values()]))
    assert seen == [[2, 2], [3, 3]]
    assert [[node.score is None for node in tree.nodes] for tree in trees.values()] == [
        [False, True, True], [False, True, False]]
    assert trees["b"].nodes[2].instructions == "Answer with skill 7."


def test_gepa_scores_only_what_is_strictly_better_on_the_minibatch() -> None:
    # its search is pareto all the same; under 19 the holdout is not all right, so that the tree goes on
    tree, solver = grow(editor_of(0, 19, 19, 0), method="gepa", search="chain")
    root, same, better, no_better, worse = tree.nodes
    assert same.score is None and same.note == "no better on its minibatch than 0 of 3"
    assert same.instructions == "Answer with skill 0."
    assert better.score == holdout_score(19) == 5 / 6 and better.parent == 0
    assert no_better.parent == worse.parent == better.id  # the root is dominated now
    # no edit of a batch that was all right could pass, so none is asked for
    assert no_better.note == worse.note == "not asked for: the whole minibatch was right"
    assert no_better.instructions == worse.instructions == ""
    assert solver.usage.answers == 6 + 2 * (3 + 3) + 6 + 2 * 3


def test_textgrad_reverts_what_lowers_the_holdout_score() -> None:
    following = iter(["vague", 15, "vague", 5, "vague", 15, "vague", 20])

    def write(_: str) -> str:
        skill = next(following)
        return f"<IMPROVED_VARIABLE>Answer with skill {skill}.</IMPROVED_VARIABLE>"

    tree, _ = grow(Scribe(write), method="textgrad")
    _, kept, reverted, equal, last = tree.nodes
    assert kept.score == equal.score == holdout_score(15) and last.score == 1.0
    assert reverted.score is None and fmean(reverted.scores) == holdout_score(5)
    assert reverted.note == f"reverted: the holdout score fell from {holdout_score(15):.3f} to {holdout_score(5):.3f}"
    assert [node.parent for node in tree.nodes] == [None, 0, 1, 1, 3]


def test_a_tree_grown_in_two_goes_is_the_tree_grown_in_one() -> None:
    task, s = Toy(a=20, b=20), settings(rounds=4)

    def trees(*stops: int) -> list:
        solver, editor = Scribe(skilled), Scribe(lambda text: f"<prompt>Answer with skill {len(text) % 20}.</prompt>")
        grown = evolve.seed_trees(task, ["a", "b"], solver, s)
        for stop in stops:
            evolve.evolve_all(task, grown, solver, editor, replace(s, rounds=stop), "pareto")
        return [[asdict(node) for node in tree.nodes] for tree in grown.values()]

    assert trees(4) == trees(1, 3, 4)


def test_local_sampling_repeats_itself_at_every_step() -> None:
    """Planting, each round and the final test draw from a generator of their own: resuming repeats them."""
    task, s = Toy(a=20), settings(rounds=2)
    drawn = []

    class Gambler(Scribe):
        def sample(self, chats: list, n: int = 1, **options) -> list[list[Sample]]:
            drawn.append(torch.rand(()).item())
            return super().sample(chats, n, **options)

    for rounds in ((2,), (1, 2)):
        torch.rand(3 * len(rounds))
        solver = Gambler(skilled)
        trees = evolve.seed_trees(task, ["a"], solver, s)
        for stop in rounds:
            torch.rand(5 * len(rounds))
            evolve.evolve_all(task, trees, solver, editor_of(9, 9), replace(s, rounds=stop))
        torch.rand(7 * len(rounds))
        evolve.final_test(task, trees, solver, s)
    once, again = drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]
    assert once == again and len(set(once)) == len(once) == 1 + 2 * 2 + 1


def test_methods_and_rules_that_do_not_exist_are_named() -> None:
    with pytest.raises(ValueError, match="magic does not fit the task toy: choose lse, gepa, textgrad, reflexion"):
        grow(editor_of(), method="magic")
    with pytest.raises(ValueError, match="--method textgrad does not fit the task mini: choose lse, gepa"):
        evolve.search_rule(data.Mini(), "textgrad")
    with pytest.raises(ValueError, match="magic"):
        grow(editor_of(), search="magic")


def test_evolve_takes_the_presets_of_the_task_it_is_given() -> None:
    solver = Scribe(lambda _: "")
    evolve.evolve(Toy(a=90), "a", solver, editor_of(), rounds=0)
    assert solver.usage.answers == 50 * 8 and solver.options[0]["max_new_tokens"] == 2048
    solver = Scribe(lambda _: "")
    evolve.evolve(data.Mini(), "dev000", solver, editor_of(), rounds=0)
    assert solver.usage.answers == 8


def test_the_final_test_asks_unseen_problems_under_both_instructions() -> None:
    task, s, solver = Toy(a=20, b=20), settings(), Scribe(skilled)
    trees = {d: EvolutionTree("Answer with skill 0.", 0.0) for d in "ab"}
    trees["a"].add(0, "Answer with skill 10.", 0.5)
    trees["b"].add(0, "Answer with skill 20.", None)
    tested = evolve.final_test(task, trees, solver, s)
    unseen = {d: evolve.split_problems(task.problems(d), s)["test"] for d in "ab"}
    assert tested["a"] == ([0.0] * 6, [float(int(p.gold) < 10) for p in unseen["a"]])
    assert tested["b"] == ([0.0] * 6, [0.0] * 6) and solver.usage.answers == 18  # the root is best: asked once
    assert {text.split("\n")[1] for text in solver.asked} == {p.question for part in unseen.values() for p in part}


def test_mean_and_standard_error() -> None:
    assert evolve.mean_error([1.0, 2.0, 3.0, 6.0]) == (3.0, pytest.approx((14 / 3 / 4) ** 0.5))
    mean, error = evolve.mean_error([0.5])
    assert mean == 0.5 and error != error


# ---------------------------------------------------------------------------------------------------------------------
# The command line, in parts
# ---------------------------------------------------------------------------------------------------------------------


def test_a_rehearsal_is_said_once_and_not_of_the_papers_protocol(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    own = Config(task="jsonl")
    assert with_presets(own).rounds == 2 and "No GPU here" in capsys.readouterr().out
    paper = with_presets(replace(own, paper_protocol=True))
    assert (paper.rounds, paper.holdout, paper.test) == (25, 50, 0) and capsys.readouterr().out == ""
    mini = with_presets(Config(paper_protocol=True, k=3))
    assert (mini.rounds, mini.k, mini.c, mini.test) == (25, 3, 2.0, 0)
    monkeypatch.setenv("RANK", "1")
    with_presets(own)
    assert capsys.readouterr().out == ""


def test_presets_fill_only_what_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    mini, real = with_presets(Settings(k=7)), settings(task="bird", k=None)
    rehearsal = with_presets(Settings(task="bird"))
    assert (mini.k, mini.holdout, real.k, real.c, rehearsal.k, rehearsal.c) == (7, 8, 10, 2.0, 2, 2.0)
    assert not [name for s in (mini, real, rehearsal) for name, value in asdict(s).items() if value is None]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert with_presets(Settings(task="bird")).k == 10


def test_every_setting_left_open_has_a_preset() -> None:
    unset = {name for name, value in asdict(train.Config()).items() if value is None}
    assert unset == evolve.PRESETS.keys() and {"k", "steps"} <= unset
    kinds = [asdict(preset) for preset in evolve.PRESETS.values()]
    assert all(list(kind) == ["mini", "shop", "paper", "rehearsal", "training"] for kind in kinds)


def test_training_has_smaller_values_of_the_papers_kind(monkeypatch) -> None:
    """One answer per problem and short ones, as a step must end; the search at test time takes the paper's."""
    monkeypatch.setattr(evolve, "is_rehearsal", lambda *_: False)
    learn = evolve.with_presets(train.Config(task="bird"))
    search = evolve.with_presets(evolve.Config(task="bird"))
    assert (learn.samples, learn.solver_tokens, learn.holdout) == (1, 512, 50)
    assert (search.samples, search.solver_tokens, search.holdout) == (8, 2048, 50)


@pytest.mark.parametrize("change", [
    dict(k=0), dict(samples=0), dict(holdout=0), dict(rounds=-1), dict(test=-1), dict(top_p=0.0), dict(top_p=1.5),
    dict(solver_temperature=-1.0)])
def test_numbers_that_cannot_be_are_named(change: dict) -> None:
    [(name, value)] = change.items()
    with pytest.raises(ValueError, match=re.escape(f"--{name.replace('_', '-')} cannot be {value}")):
        settings(**change)


def test_picking_domains() -> None:
    task = Toy(**{"a": 1, "b": 1, "2": 1, "x, y": 1})
    task.domains = lambda split: ["b", "2"] if split == "test" else list(task.sizes)
    for wanted, expected in (("", ["b", "2"]), ("1", ["b"]), ("2", ["2"]), ("x, y", ["x, y"]), ("b, a,b", ["b", "a"])):
        assert evolve.pick_domains(task, wanted) == expected, wanted
    with pytest.raises(SystemExit, match="No domain c, d in toy; there are: a, b, 2, x, y"):
        evolve.pick_domains(task, "a,c,d")
    with pytest.raises(SystemExit, match="No domain"):
        evolve.pick_domains(Toy(), "")


@given(st.lists(st.text(max_size=6), min_size=2, max_size=2, unique=True))
def test_different_domains_have_different_file_names(names: list[str]) -> None:
    one, other = map(evolve.tree_name, names)
    assert one != other and not set("/\\:*?\"<>|\0") & set(one)
    assert evolve.tree_name("/") != evolve.tree_name("\x02f") and evolve.tree_name("a/b") != evolve.tree_name("a_b")


def test_trees_that_are_a_round_ahead_are_cut_back(tmp_path: Path) -> None:
    task, s = Toy(**{"a/b": 20, "c": 20}), settings()

    def planted() -> dict[str, EvolutionTree]:
        return evolve.seed_trees(task, ["a/b", "c"], Scribe(skilled), s)

    assert evolve.restore_trees(tmp_path, ["a/b", "c"]) == {}
    late, early = planted(), planted()
    for trees, rounds in ((early, 2), (late, 3)):
        own = replace(s, rounds=rounds)
        evolve.evolve_all(task, trees, Scribe(skilled), editor_of(9, 2, 4, None, 3, 3), own, "best")
    late["a/b"].save(tmp_path / f"{evolve.tree_name('a/b')}.json")
    assert evolve.restore_trees(tmp_path, ["a/b", "c"]) == {}
    early["c"].save(tmp_path / "c.json")  # killed between the two
    found = evolve.restore_trees(tmp_path, ["a/b", "c"])
    assert {d: (tree.rounds, [asdict(n) for n in tree.nodes]) for d, tree in found.items()} == {
        d: (2, [asdict(n) for n in tree.nodes]) for d, tree in early.items()}
    (tmp_path / "c.json").write_text('{"nodes": [')
    with pytest.raises(ValueError, match="a file that is no tree .*: start over with --overwrite"):
        evolve.restore_trees(tmp_path, ["a/b", "c"])


def test_a_run_folder_is_never_mistaken_for_another(tmp_path: Path, monkeypatch) -> None:
    out, s = tmp_path / "run", Config(task="jsonl", rounds=5)
    with pytest.raises(SystemExit, match="holds no run to resume: leave --resume out"):
        evolve.open_run(replace(s, resume=True), out, free=["rounds"])
    evolve.open_run(s, out, [], look=True)
    assert not out.exists()
    evolve.open_run(s, out, free=["rounds"])
    (out / "results.json").write_text("{}")
    with pytest.raises(SystemExit, match="holds a run: continue it by --resume, delete it by --overwrite"):
        evolve.open_run(s, out, free=["rounds"])
    with pytest.raises(SystemExit, match=r"was run otherwise \(--k was None, is now 3\): give the same"):
        evolve.open_run(replace(s, resume=True, rounds=9, k=3), out, free=["rounds"])
    evolve.open_run(replace(s, resume=True, rounds=9), out, free=["rounds"])
    assert (out / "results.json").exists() and json.loads((out / "config.json").read_text())["rounds"] == 9
    evolve.open_run(replace(s, overwrite=True), out, free=[], look=True)
    assert (out / "results.json").exists()
    evolve.open_run(replace(s, overwrite=True), out, free=[])
    assert not (out / "results.json").exists()
    with pytest.raises(SystemExit, match=r"config.json.* cannot be written .*: name another --out"):
        evolve.open_run(s, out / "config.json" / "run", free=[])
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(SystemExit, match="new/run cannot be written: name another --out"):
        evolve.open_run(s, tmp_path / "new" / "run", free=[], look=True)


def test_overwrite_deletes_no_checkpoint_and_no_training_run(tmp_path: Path) -> None:
    make_base.tiny_qwen3(make_base.mini_tokenizer()).save_pretrained(tmp_path / "editor")  # it has a config.json, too
    evolve.open_run(train.Config(), tmp_path / "training", [])
    for kept in ("editor", "training"):
        with pytest.raises(SystemExit, match="is no run of this script: name another --out"):
            evolve.open_run(Config(overwrite=True), tmp_path / kept, [])
        assert (tmp_path / kept / "config.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Local models: tiny random checkpoints
# ---------------------------------------------------------------------------------------------------------------------

TINY = dict(rounds=2, k=2, holdout=2, test=2, solver_tokens=4, editor_tokens=4, domains="2")


@pytest.fixture(autouse=True)
def random_models_may_ramble(request, monkeypatch) -> None:
    """They never end an answer by themselves, so that all are cut off: no reason to end a test."""
    if "checkpoints" in request.fixturenames:
        monkeypatch.setattr(evolve, "stop_if_lost", lambda *_: None)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A folder with "narrow" and "wide", tiny random models, and "mute", one without a chat template."""
    folder, tokenizer = tmp_path_factory.mktemp("checkpoints"), make_base.mini_tokenizer()
    for name, hidden in (("narrow", 32), ("wide", 64)):
        torch.manual_seed(hidden)
        for part in (make_base.tiny_qwen3(tokenizer, hidden), tokenizer):
            part.save_pretrained(folder / name)
    shutil.copytree(folder / "narrow", folder / "mute", ignore=shutil.ignore_patterns("*.jinja"))
    config = json.loads((folder / "mute" / "tokenizer_config.json").read_text())
    (folder / "mute" / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": None}))
    return folder


def test_one_checkpoint_in_both_roles_is_loaded_once(checkpoints: Path) -> None:
    s = Config(solver=str(checkpoints / "narrow"), editor=str(checkpoints / "narrow"))
    solver, editor = evolve.load_models(s)
    assert solver.model is editor.model and solver is not editor
    solver.sample([[{"role": "user", "content": "tax"}]], max_new_tokens=1)
    assert (solver.usage.answers, editor.usage.answers) == (1, 0)
    solver, editor = evolve.load_models(replace(s, editor=str(checkpoints / "wide")))
    assert solver.model.config.hidden_size == 32 and editor.model.config.hidden_size == 64


def test_models_that_are_not_named_are_the_miniatures_or_the_runs_own(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    opened = []
    monkeypatch.setattr(evolve, "load_model", lambda name, *_: opened.append(str(name)) or name)
    evolve.load_models(Config())
    Path("runs/mini/editor").mkdir(parents=True)
    evolve.load_models(Config())
    base = str(evolve.MINIATURE / "base")
    assert opened == [base, str(evolve.MINIATURE / "editor"), base, "runs/mini/editor"]
    for role, s in (("solver", Config(task="bird", editor="x")), ("editor", Config(task="bird", solver="x"))):
        with pytest.raises(ValueError, match=f"--task bird needs --{role}"):
            evolve.load_models(s)


def test_tiny_models_run_on_the_cpu_in_float32_on_few_threads(checkpoints: Path, monkeypatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: threads.append(n))
    threads: list[int] = []
    model = evolve.load_model(checkpoints / "wide").model
    assert model.dtype == torch.float32 and model.device.type == "cpu" and threads == [1]
    saved = AutoModelForCausalLM.from_pretrained(checkpoints / "wide").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())  # not rounded to bf16
    monkeypatch.undo()
    assert torch.get_num_threads() == before


def test_a_file_or_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def half(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    evolve.save_text(tmp_path / "a.txt", "old")
    with pytest.raises(SystemExit, match=r"a.txt cannot be written \(.*No space left.*same command and --resume"):
        evolve.atomic_write(tmp_path / "a.txt", half)
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"
    evolve.save_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    for word in ("one", "two"):  # a folder that is there is replaced
        evolve.atomic_write(tmp_path / "b", lambda folder, word=word: folder.mkdir() or (folder / word).touch())
    assert [file.name for file in (tmp_path / "b").iterdir()] == ["two"]


def test_transfer_an_editor_of_another_width_guides_the_solver(checkpoints: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    evolve.main(Config(solver=str(checkpoints / "narrow"), editor=str(checkpoints / "wide"), out="run", **TINY))
    results = json.loads(Path("run/results.json").read_text())
    assert results["cost"]["editor"]["answers"] == 4 and results["cost"]["solver"]["answers"] >= 4 + 2 * 4 + 4
    assert len(EvolutionTree.load("run/trees/test001.json").nodes) == 3


def test_a_solver_on_a_server_and_an_editor_here(checkpoints: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("own.jsonl").write_text("\n".join(json.dumps({"question": f"Say {i}!", "answer": i}) for i in range(12)))
    with serve(lambda messages, _: f"<answer>{re.search('Say (.*)!', messages[-1]['content'])[1]}</answer>") as server:
        evolve.main(Config(task="jsonl", data="own.jsonl", solver=server.url, editor=str(checkpoints / "wide")))
    assert "No GPU here: what you do not set is a rehearsal's" in capsys.readouterr().out
    results = json.loads(Path("runs/jsonl-evolve/results.json").read_text())
    assert results["test"]["best"] == 1.0 and results["cost"]["editor"]["answers"] == 0  # nothing can be better


def test_the_tree_that_is_printed_is_one_that_steps_back() -> None:
    def grown(*parents: int, edits: int = 1, invalid: int = 0) -> EvolutionTree:
        tree = EvolutionTree("", 0.1)
        for i, parent in enumerate(parents, 1):
            tree.add(tree.nodes[parent], str(i), None if i == invalid else 0.2)
        tree.rounds = len(parents) // edits
        return tree

    chain, back, again = grown(0, 1, 2), grown(0, 0, 2), grown(0, 0, 2, invalid=1)
    assert evolve.first_with_a_step_back({"chain": chain, "again": again, "back": back}) == "back"
    pairs, pairs_back = grown(0, 0, 2, 2, edits=2), grown(0, 0, 0, 0, edits=2)
    assert evolve.first_with_a_step_back({"chain": chain, "pairs": pairs, "back": pairs_back}) == "back"
    older_twin = grown(0, 0, 1, 1, edits=2)  # both of a round are its newest
    trees = {"chain": chain, "again": again, "pairs": pairs, "older twin": older_twin}
    assert evolve.first_with_a_step_back(trees) == "chain"


def table_rows(run: Path) -> list[str]:
    """The table of compare.md, without its head and the notes below it."""
    lines = (run / "compare.md").read_text().splitlines()[2:]
    return [line for line in lines if line.startswith("| ")]


def test_compare_has_all_rows(checkpoints: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    s = Config(solver=str(checkpoints / "narrow"), editor=str(checkpoints / "wide"), out="run", compare=True, seeds=2,
               **TINY)
    evolve.main(s)
    head, rule = Path("run/compare.md").read_text().splitlines()[:2]
    rows = table_rows(Path("run"))
    assert head.count("|") == rule.count("|") == 7 and rule == "|---|---|---|---|---|---|"
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[:2] for row in cells] == [[editor, method] for editor in ("untrained", "trained") for method in (
        "lse (chain)", "lse (best)", "lse (ucb)", "gepa (pareto)")]
    for row in cells:
        for cell in row[2:5]:
            mean, error = map(float, cell.split(" ± "))
            assert 0 <= mean <= 1 and 0 <= error <= 1
        assert int(row[5]) >= 4 + 8  # two domains: the seed on the holdout, two batches
    assert Path("run/report.html").read_text().count("<h2") == 8
    evolve.main(replace(s, test=0, seeds=1, out="paper"))
    assert all(" | – | – | " in row for row in table_rows(Path("paper")))
    evolve.main(replace(s, editor=s.solver, test=0, seeds=1, rounds=1, out="itself"))  # one model in both roles
    rows = table_rows(Path("itself"))
    assert [row.split(" | ")[0] for row in rows] == ["| untrained"] * 4
    assert "Plan: 8 trees of 1 round on 2 domains" in capsys.readouterr().out


TAGS = ("prompt", "prompt", "prompt", "prompt", "IMPROVED_VARIABLE", "lesson")  # of the methods, as compared


def test_the_numbers_of_compare(tmp_path: Path, monkeypatch, capsys) -> None:
    """The toy's solver writes no edits; the trained editor always knows what is best."""
    best, seeds = "Answer with skill 20.", []
    always = Scribe(lambda _: "".join(f"<{tag}>{best}</{tag}>" for tag in ("prompt", "lesson", "IMPROVED_VARIABLE")))
    real = evolve.seed_trees
    monkeypatch.setattr(evolve, "seed_trees", lambda *args: seeds.append(args[-1].seed) or real(*args))
    s = Config(**asdict(settings(rounds=2, seed=5)), seeds=2)
    evolve.compare(Toy(a=20, b=20), ["a", "b"], Scribe(skilled), always, s, tmp_path)
    rows = table_rows(tmp_path)
    nothing, everything = (f"| {x:.3f} ± 0.000 | {x:.3f} ± 0.000 | 0.000 ± 0.000" for x in (0, 1))
    methods = ["lse (chain)", "lse (best)", "lse (ucb)", "gepa (pareto)", "textgrad (chain)", "reflexion (chain)"]
    once = 2 * (6 + 2 * 3)  # two domains: the seed's score, two batches
    calls = {"gepa (pareto)": 2 * (3 + 6)}  # better at once, through its gate; then all is right, and no edit asked for
    assert rows == [f"| untrained | {method} {nothing} | {once} |" for method in methods] + [
        f"| trained | {method} {everything} | {once + calls.get(method, 2 * 2 * 6)} |" for method in methods]
    printed = capsys.readouterr().out.splitlines()[2:-1]
    assert seeds == [5, 6] * 12 and printed[: len(rows)] == rows
    # The untrained one has written no edit in any form, which the table alone would not show.
    notes = [line for line in printed[len(rows) :] if line]
    assert notes == [line for line in (tmp_path / "compare.md").read_text().splitlines() if "rejected" in line]
    rejected = "all edits were rejected, the last one for: nothing usable in <"
    assert [note.partition(">")[0] for note in notes] == [
        f"untrained | {method}: {rejected}{tag}" for method, tag in zip(methods, TAGS)]


def test_compare_goes_on_where_it_was_killed(checkpoints: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """No edit is asked for twice: an interrupted comparison ends with the trees and the means of a whole one."""
    monkeypatch.chdir(tmp_path)
    s = Config(solver=str(checkpoints / "narrow"), editor=str(checkpoints / "wide"), compare=True, seeds=2, **TINY)
    evolve.main(replace(s, out="whole"))
    real, saves = evolve.save_trees, []

    def save_or_stop(folder: Path, trees: dict) -> None:
        if len(saves) == 5:
            raise KeyboardInterrupt
        saves.append(folder)
        real(folder, trees)

    monkeypatch.setattr(evolve, "save_trees", save_or_stop)
    with pytest.raises(KeyboardInterrupt):
        evolve.main(replace(s, out="cut"))
    monkeypatch.setattr(evolve, "save_trees", real)
    sampled = []
    real_ask = evolve.ask_for_edits
    monkeypatch.setattr(evolve, "ask_for_edits", lambda *args: sampled.append(1) or real_ask(*args))
    evolve.main(replace(s, out="cut", resume=True))
    whole, cut = (sorted(Path(run).rglob("trees/**/*.json")) for run in ("whole", "cut"))
    assert len(whole) == len(cut) >= 16 and [a.read_bytes() for a in whole] == [b.read_bytes() for b in cut]
    means = [[row.rpartition(" | ")[0] for row in table_rows(Path(run))] for run in ("whole", "cut")]
    assert means[0] == means[1] and len(sampled) == 8 * 2 * TINY["rounds"] - 5
    rows = table_rows(Path("cut"))
    counts = [row.rstrip("| ").rpartition(" | ")[2] for row in rows]
    known = [count != "–" for count in counts]
    assert known[0] is False and known[-1] is True and known == sorted(known), counts  # those from before the kill
    capsys.readouterr()


def test_a_full_disk_is_a_sentence_that_says_how_to_go_on(monkeypatch) -> None:
    def main(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "argv", ["evolve.py"])
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
    with pytest.raises(SystemExit, match="No space left on device: make room or give access, then go on with --resume"):
        evolve.start(main, Config, "")


def test_the_plan_counts_the_length_of_the_questions(checkpoints: Path) -> None:
    models = evolve.load_models(Config(solver=str(checkpoints / "wide"), editor=str(checkpoints / "wide")))
    s, sizes = with_presets(Config(rounds=3, test=0)), []
    for words in (1, 100_001):
        problems = [Problem(f"{i}", f"item {i} profit " + "x" * words, "", "a", "pool") for i in range(3)]
        splits = {"a": {"pool": problems, "holdout": problems, "test": []}}
        text = evolve.plan(data.Mini(), splits, *models, s, Path("x"))
        sizes.append(float(re.search(r"up to ([\d.]+) MB", text)[1]))
    assert sizes[1] == pytest.approx(sizes[0] + 2 * 3 * 4 * 0.1, abs=0.1)


def test_fewer_rounds_than_there_are_are_refused(checkpoints: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    s = Config(solver=str(checkpoints / "narrow"), editor=str(checkpoints / "wide"), out="run", **TINY)
    evolve.main(s)
    config = Path("run/config.json").read_text()
    with pytest.raises(ValueError, match=f"run is {TINY['rounds']} rounds old: give --rounds as many or more"):
        evolve.main(replace(s, resume=True, rounds=1))
    assert Path("run/config.json").read_text() == config
    capsys.readouterr()


def planned(text: str, role: str) -> list[str]:
    """The plan's row of one model: how many responses, tokens to read, tokens to write, its weights, its name."""
    [row] = [line for line in text.splitlines() if line.split()[:1] == [role]]
    return row.replace(" MB", "MB").split()[1:]


def test_the_plan_checks_contexts_disk_and_grader(checkpoints: Path, monkeypatch) -> None:
    task, out = data.Mini(), Path("nowhere/yet")
    solver, editor = evolve.load_models(Config(solver=str(checkpoints / "wide"), editor=str(checkpoints / "wide")))
    s = with_presets(Config(domains="1", rounds=3))
    splits = {"test000": evolve.split_problems(task.problems("test000"), s)}
    text = evolve.plan(task, splits, solver, editor, s, out)
    assert "1 tree of 3 rounds on 1 domain, the smallest with problems: 104 pool, 8 holdout, 32 test" in text
    prompt = len(solver.encode(task.solve_chat("", splits["test000"]["pool"][0]))) + 40
    weights = f"{4 * solver.model.num_parameters() / 1e6:.1f}MB"
    row = ["108", f"{108 * prompt:,}", f"{108 * 16:,}", weights, str(checkpoints / "wide")]
    assert planned(text, "solver") == row
    assert 108 == 8 + 3 * (8 + 4) + 2 * 32
    assert planned(text, "editor")[0] == "3" and "nowhere/yet" in text and not out.parent.exists()
    small = splits["test000"] | {"pool": splits["test000"]["pool"][:5]}
    assert "on 2 domains, the smallest with problems: 5 pool, 8 holdout" in evolve.plan(
        task, splits | {"test001": small}, solver, editor, s, out)
    for method, role, calls in (("gepa", "solver", "120"), ("textgrad", "editor", "6")):
        text = evolve.plan(task, splits, solver, editor, replace(s, method=method), out)
        assert planned(text, role)[0] == calls
    with pytest.raises(ValueError, match=r"The solver reads 2048 tokens, .* 2030 more \(--solver-tokens\)"):
        evolve.plan(task, splits, solver, editor, replace(s, solver_tokens=2030), out)
    with pytest.raises(ValueError, match="The solver reads 2048 tokens, .*instructions of 2040 .--editor-tokens"):
        evolve.plan(task, splits, solver, editor, replace(s, editor_tokens=2040), out)
    monkeypatch.setattr(Scribe, "model", "far away", raising=False)
    with pytest.raises(ValueError, match="The editor reads 2048 tokens, too little for a prompt of .* 1005 more"):
        evolve.plan(task, splits, Scribe(None), editor, replace(s, editor_tokens=1005), out)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(ValueError, match="nowhere/yet may grow by .* MB, and its disk has 0 left: make room"):
        evolve.plan(task, splits, solver, editor, s, out)
    monkeypatch.undo()
    monkeypatch.setattr(task, "grade", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evolve.plan(task, splits, solver, editor, s, out)
    for other, rows in ((editor, 4), (evolve.load_model(checkpoints / "narrow"), 8)):
        text = evolve.plan(data.Mini(), splits, solver, other, replace(s, compare=True), out)
        assert planned(text, "solver")[0] == f"{rows * 3 * (8 + 3 * (2 * 4 + 8) + 2 * 32):,}"


# ---------------------------------------------------------------------------------------------------------------------
# End to end: the command against a scripted server
# ---------------------------------------------------------------------------------------------------------------------

FEW = ["--rounds", 4, "--k", 3, "--holdout", 6, "--test", 6, "--samples", 1]
EDITORS = ("solver", "good-editor", "bad-editor", "ruin-editor", "mute-editor", "fickle-editor")


@pytest.fixture(scope="module")
def bird(tmp_path_factory) -> Path:
    """Two small databases in BIRD's layout, and the same questions as a JSONL file: no SQL is run for that one."""
    folder, questions = tmp_path_factory.mktemp("bird"), []
    for db in ("shop", "zoo"):
        (folder / "dev_databases" / db).mkdir(parents=True)
        with sqlite3.connect(folder / "dev_databases" / db / f"{db}.sqlite") as base:
            base.execute("CREATE TABLE item (id INTEGER PRIMARY KEY, price INTEGER)")
            base.executemany("INSERT INTO item VALUES (?, ?)", [(i, 100 + i) for i in range(20)])
        base.close()
        questions += [{"db_id": db, "question": f"What does item {i} of the {db} cost?", "evidence": "cost is price",
                       "SQL": f"SELECT price FROM item WHERE id = {i}"} for i in range(20)]
    (folder / "dev.json").write_text(json.dumps(questions))
    own = [{"question": q["question"], "answer": q["SQL"], "domain": q["db_id"]} for q in questions]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, own)))
    return folder


@pytest.fixture(scope="module")
def scene(bird: Path):
    """A scripted server for those databases."""
    with serve(scripted(bird_gold(bird)), models=EDITORS) as server:
        yield server


def evolved(data: Path, url: str, folder: Path, editor: str, *more: object) -> tuple[dict, dict, str]:
    """(results, trees, output) of one run on both domains."""
    task = "jsonl" if data.suffix else "bird"
    code, output = cli.run(["--task", task, "--data", data, "--domains", "shop,zoo", "--solver", url, "--editor", url,
                            "--editor-model", editor, "--out", "run", *FEW, *more], folder)
    assert code == 0 and "Traceback" not in output, output
    trees = {file.stem: EvolutionTree.load(file) for file in (folder / "run" / "trees").iterdir()}
    return json.loads((folder / "run" / "results.json").read_text()), trees, output


@pytest.mark.parametrize("more", [
    ["--search", "ucb"], ["--search", "chain"], ["--search", "best"], ["--search", "pareto"], ["--method", "textgrad"],
    ["--method", "gepa", "--k", 8, "--holdout", 4, "--test", 4], ["--method", "reflexion"]], ids=lambda more: more[1])
def test_with_a_good_editor_scores_rise(bird: Path, scene, tmp_path: Path, more: list) -> None:
    asked = len(scene.requests)
    results, trees, output = evolved(bird, scene.url, tmp_path, "good-editor", *more)
    for tree in trees.values():
        assert len(tree.nodes) == 5 and tree.best().score > tree.nodes[0].score
        assert level(tree.best().instructions) >= 1
    if more[1] in ("chain", "best", "textgrad", "reflexion"):  # each edit adds a rule to the one before
        assert {level(tree.best().instructions) for tree in trees.values()} == {4}
    for part in ("holdout", "test"):
        r = results[part]
        assert r["best"] - r["seed"] == pytest.approx(r["gain"]) and r["stderr"] >= 0
        assert r["gain"] > 0.1 or (more[1], part) == ("gepa", "test")  # one rule more may turn none of its 8 problems
        assert f"{r['seed']:.3f} -> {r['best']:.3f}, gain {r['gain']:+.3f} ± {r['stderr']:.3f} (paired" in output
        assert r["domains"]["zoo"][1] >= r["domains"]["zoo"][0]
    assert results["holdout"]["domains"]["zoo"] == [trees["zoo"].nodes[0].score, trees["zoo"].best().score]
    assert results["instructions"]["shop"] == trees["shop"].best().instructions
    calls = Counter(request["body"].get("model") for request in scene.requests[asked:])
    assert results["cost"]["solver"]["answers"] == calls["solver"]
    assert results["cost"]["editor"]["answers"] == calls["good-editor"] == (16 if "textgrad" in more else 8)
    cost = results["cost"]["solver"]
    assert list(cost) == ["answers", "failed", "cut", "unreadable", "read leniently", "tokens read", "tokens written"]
    assert cost["failed"] == cost["cut"] == cost["unreadable"] == 0 < cost["tokens written"]
    counts = "0 failed, 0 cut, 0 unreadable, 0 read leniently, "
    assert f"Cost of the solver: {cost['answers']:,} answers, {counts}" in output
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(f'id="t{i}-{n}"' in page for i in (0, 1) for n in range(5))
    assert "shop (* leads to the best node, visits: how often it was selected)" in output
    assert results["instructions"]["zoo"] in output
    assert RULES[0] in output.split("Best instructions:")[1] and "Saved in run: instructions/" in output
    for domain, instructions in results["instructions"].items():
        assert (tmp_path / "run" / "instructions" / f"{domain}.txt").read_text() == instructions + "\n"


def test_a_fresh_clone_evolves_the_miniature_with_the_shipped_models(tmp_path: Path) -> None:
    code, output = cli.run(["--domains", 4], tmp_path)
    assert code == 0, output
    results = json.loads((tmp_path / "runs" / "mini-evolve" / "results.json").read_text())
    assert results["test"]["seed"] == 0.0 and results["test"]["best"] > 0.5
    rounds = [fact["rounds"] for fact in results["domains"].values()]
    assert f"Cost of the editor: {sum(rounds)} answers" in output and len(rounds) == 4 and max(rounds) <= 10
    assert "it was selected)\n*" in output and "Best instructions:\n" in output
    assert "Holdout (optimistic" in output and "Test (never touched" in output
    assert output.rstrip().endswith("Saved in runs/mini-evolve: instructions/, trees/, results.json, report.html.")


@pytest.mark.parametrize("search", ["ucb", "best", "chain"])
def test_from_a_bad_edit_the_tree_steps_back(bird: Path, scene, tmp_path: Path, search: str) -> None:
    more = ["--search", search, "--rounds", 6, "--c", 0.1]
    results, trees, _ = evolved(bird / "own.jsonl", scene.url, tmp_path, "bad-editor", *more)
    falls = [(tree, node) for tree in trees.values() for node in tree.nodes[1:]
             if level(node.instructions) < level(tree.nodes[node.parent].instructions)]
    assert falls and results["holdout"]["gain"] > 0
    for tree, node in falls:
        assert node.score <= tree.nodes[node.parent].score and tree.best().id != node.id
        following = tree.nodes[node.id + 1].parent if node.id + 1 < len(tree.nodes) else None
        if search == "chain":
            assert following in (node.id, None)
        elif search == "best":
            assert following != node.id
    assert search == "chain" or any(tree.nodes[node.id + 1].parent != node.id for tree, node in falls
                                    if node.id + 1 < len(tree.nodes))


def test_editors_that_ruin_all_or_say_nothing_gain_exactly_nothing(bird: Path, scene, tmp_path: Path) -> None:
    for editor in ("ruin-editor", "mute-editor"):
        (tmp_path / editor).mkdir()
        more = ["--search", "best", "--rounds", 2]
        results, trees, output = evolved(bird / "own.jsonl", scene.url, tmp_path / editor, editor, *more)
        assert results["test"]["gain"] == results["test"]["stderr"] == 0.0 and "gain +0.000" in output
        for tree in trees.values():
            assert [node.score is None for node in tree.nodes] == [False] + [editor == "mute-editor"] * 2
    assert "rejected" in output and trees["zoo"].nodes[2].note == "nothing usable in <prompt> tags"
    assert results["cost"]["editor"]["unreadable"] == results["cost"]["editor"]["answers"] == 4  # the mute one's
    more = ["--rounds", 12, "--test", 0, "--domains", "zoo"]
    results, trees, _ = evolved(bird / "own.jsonl", scene.url, tmp_path, "fickle-editor", *more)
    assert "test" not in results and results["holdout"]["stderr"] > 0  # over the problems of the one domain
    assert {node.score is None for node in trees["zoo"].nodes[1:]} == {True, False}


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data/bird")
def test_on_bird(tmp_path: Path) -> None:
    with serve(scripted(bird_gold(SHARED)), models=EDITORS) as server:
        args = ["--task", "bird", "--data", SHARED, "--domains", "university", "--solver", server.url,
                "--editor", server.url, *FEW, "--rounds", 3]
        for editor in ("good-editor", "ruin-editor"):
            code, output = cli.run([*args, "--out", editor, "--editor-model", editor], tmp_path)
            assert code == 0, output
    good, ruin = (json.loads((tmp_path / f"{name}-editor" / "results.json").read_text()) for name in ("good", "ruin"))
    assert good["holdout"]["gain"] > 0.1 and ruin["holdout"]["gain"] == ruin["test"]["gain"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# A dry run, and what goes wrong
# ---------------------------------------------------------------------------------------------------------------------


def test_a_dry_run_asks_nothing_and_writes_nothing(bird: Path, scene, tmp_path: Path) -> None:
    asked = len(scene.requests)
    code, output = cli.run(["--task", "bird", "--data", bird, "--solver", scene.url, "--editor", scene.url, *FEW,
                            "--editor-model", "good-editor", "--dry-run", "--domains", "shop"], tmp_path)
    assert code == 0 and {request["path"] for request in scene.requests[asked:]} == {"/v1/models"}
    assert [file.name for file in tmp_path.iterdir()] == ["output.txt"]
    assert "problems: 8 pool, 6 holdout, 6 test" in output
    assert planned(output, "editor")[0] == "4" and planned(output, "editor")[3:] == ["elsewhere", "good-editor"]
    assert planned(output, "solver")[0] == str(6 + 4 * (3 + 6) + 2 * 6) and planned(output, "solver")[-1] == "solver"
    head, _, chat = output.partition("What the solver would be asked, for one:\n")
    assert len(head.splitlines()) == 5 and "CREATE TABLE" in chat
    assert chat.splitlines()[-1] == "A dry run: no model was asked, nothing was written."
    code, output = cli.run(["--task", "bird", "--data", bird, "--solver", scene.url, "--editor", scene.url,
                            "--paper-protocol", "--holdout", 6, "--dry-run", "--domains", "1"], tmp_path)
    assert code == 0 and "14 pool, 6 holdout, 0 test" in output and "of 25 rounds" in output
    assert planned(output, "solver")[0] == f"{8 * 6 * 26 + 25 * 10:,}"


SECRET = "sk-hush-4711"


def test_the_key_goes_to_the_server_and_nowhere_else(bird: Path, tmp_path: Path) -> None:
    right, denied = scripted(bird_gold(bird)), Fault(status=401, message=f"no such key: {SECRET}")

    def reply(messages: list, body: dict):
        return denied if body["model"] == "locked" else right(messages, body)

    with serve(reply, models=EDITORS) as server:
        args = ["--task", "jsonl", "--data", bird / "own.jsonl", "--domains", "shop", "--solver", server.url,
                "--editor", server.url, *FEW, "--rounds", 2]
        code, output = cli.run([*args, "--out", "run"], tmp_path, {"LSE_API_KEY": SECRET})
        assert code == 0 and {request["key"] for request in server.requests} == {SECRET}
        args += ["--solver-model", "locked", "--out", "locked"]
        code, failed = cli.run(args, tmp_path, {"LSE_API_KEY": SECRET})
        assert code == 1 and "no such key: ***" in failed and "Traceback" not in failed
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) >= 6 and SECRET not in output + failed
    assert not [file for file in written if SECRET.encode() in file.read_bytes()]


def no_server() -> str:
    with serve(lambda *_: "") as server:
        return server.url


CASES = {
    "a wrong path": (["--data", "no/such/folder"], ["no/such/folder", "bird-bench"]),
    "no data": (["--task", "jsonl", "--data", ""], ["needs --data", "jsonl"]),
    "an unknown task": (["--task", "brid"], ["brid", "bird"]),
    "an unknown domain": (["--domains", "shop,shoe"], ["shoe", "shop, zoo"]),
    "too few problems": (["--holdout", "12"], ["has 20 problems", "3 + 12 + 6", "--holdout"]),
    "k of 0": (["--k", "0"], ["--k cannot be 0"]),
    "no server": (["--editor", "NOWHERE"], ["NOWHERE", "see that the server is up"]),
    "no server, with a name": (["--editor", "NOWHERE", "--editor-model", "x"], ["NOWHERE", "that the server is up"]),
    "no checkpoint": (["--solver", "some/folder"], ["some/folder", "python train.py"]),
    "no tokenizer": (["--editor", "BARE"], ["bare", "tokenizer files are missing"]),
    "no template": (["--editor", "MUTE"], ["mute", "chat template", "instruct model"]),
    "an unknown flag": (["--rouns", "3"], ["--rouns"]),
    "a method that does not fit": (["--task", "mini", "--method", "textgrad"], ["textgrad", "mini", "lse, gepa"]),
    "nothing to resume": (["--resume"], ["runs/bird-evolve", "--resume"]),
    "no solver": (["--solver", ""], ["--task bird needs --solver"]),
    "no editor": (["--editor", ""], ["--task bird needs --editor"]),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_said_in_a_sentence(bird: Path, scene, checkpoints: Path, tmp_path: Path, case: str) -> None:
    more, said = CASES[case]
    bare = tmp_path / "bare"  # half a download
    shutil.copytree(checkpoints / "wide", bare, ignore=shutil.ignore_patterns("tokenizer*"))
    names = {"NOWHERE": no_server(), "MUTE": str(checkpoints / "mute"), "BARE": str(bare)}
    asked = len(scene.requests)
    code, output = cli.run(["--task", "bird", "--data", bird, "--solver", scene.url, "--editor", scene.url, *FEW,
                            *(names.get(word, word) for word in more)], tmp_path, {"HF_HUB_OFFLINE": "1"} if
                           case == "no checkpoint" else {})
    assert code != 0 and "Traceback" not in output, output
    for words in said:
        assert names.get(words, words) in output, output
    assert not [request for request in scene.requests[asked:] if request["path"] != "/v1/models"]  # before any call
    assert not (tmp_path / "runs").exists()


def test_a_terminal_without_the_plus_minus_sign_loses_no_results(tmp_path: Path) -> None:
    """`python evolve.py` itself, as a user starts it."""
    gold = {f"How many items of kind {i} are there?": f"SELECT {i}" for i in range(12)}
    lines = [json.dumps({"question": q, "answer": a, "domain": "größe"}) for q, a in gold.items()]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    with serve(scripted(gold), models=("solver", "good-editor")) as server:
        done = subprocess.run(
            [sys.executable, cli.ROOT / "evolve.py", "--task", "jsonl", "--data", "own.jsonl", "--solver", server.url,
             "--editor", server.url, "--editor-model", "good-editor", *map(str, FEW), "--test", "3", "--rounds", "1"],
            cwd=tmp_path, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "gain +" in done.stdout and "?" in done.stdout and done.stdout.isascii()
    assert (tmp_path / "runs" / "jsonl-evolve" / "trees" / "größe.json").exists()


def test_a_server_that_lists_no_models_will_do_if_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with serve(lambda *_: "yes", models=()) as mute, serve(lambda *_: "yes") as server:
        named = evolve.load_models(Config(solver=mute.url, solver_model="a", editor=server.url))
        assert [model.model for model in named] == ["a", "test-model"]
        elsewhere = server.url.removesuffix("/v1") + "/elsewhere"  # a 404, for chats as well
        with pytest.raises(ConnectionError, match="404"):
            evolve.load_models(Config(solver=elsewhere, solver_model="a", editor=server.url))
        with pytest.raises(ConnectionError, match="no models are listed"):
            evolve.load_models(Config(solver=mute.url, editor=server.url))
        with pytest.raises(ConnectionError, match="404"):
            evolve.load_models(Config(solver=elsewhere, editor=server.url))
