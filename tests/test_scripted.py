"""The scripted solver and editors do what the end-to-end tests rely on."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripted import RULES, WRONG, accuracy, bird_gold, level, scripted
from server import serve

from data import extract_tag
from lse import RemoteModel

GOLD = {f"How many items of kind {i} are there?": f"SELECT {i}" for i in range(30)}
SHARED = Path(__file__).parents[1].parent / "shared" / "data" / "bird"


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def editor_chat(instructions: str, seen: str = "How many items of kind 3 are there?") -> list[dict[str, str]]:
    return chat(f"Instructions:\n{instructions}\nProblem: {seen}\nSELECT 4\nWrite them between <prompt> and </prompt>.")


def share_right(gold: dict[str, str], instructions: str) -> float:
    reply = scripted(gold)
    answers = [reply(chat(f"{instructions}\n\nHint: none\n{question}\nUse <answer> tags."), {}) for question in gold]
    assert all((sql in answer) != (WRONG in answer) for sql, answer in zip(gold.values(), answers))
    return sum(WRONG not in answer for answer in answers) / len(gold)


@pytest.mark.parametrize("reached", range(len(RULES) + 1))
def test_the_solver_is_as_good_as_its_instructions(reached: int) -> None:
    assert share_right(GOLD, "\n".join(RULES[:reached])) == pytest.approx(accuracy(reached), abs=1 / len(GOLD))


def test_a_question_once_right_stays_right_with_more_rules() -> None:
    reply, before = scripted(GOLD), set()
    for reached in range(len(RULES) + 1):
        rules = " ".join(RULES[:reached])
        right = {q for q in GOLD if WRONG not in reply(chat(f"{rules} {q}"), {})}
        assert before <= right
        before = right
    assert before == set(GOLD)


def test_longer_questions_are_not_mistaken_for_shorter_ones() -> None:
    gold = {"How many?": "SELECT 1", "How many? And why?": "SELECT 2"}
    assert "SELECT 2" in scripted(gold, base=1.0)(chat("Q: How  many?\nAnd why?"), {})
    assert "2 questions" in scripted({"How many?": "", "And why?": ""})(chat("How many? And why?"), {})


def test_the_good_editor_adds_a_rule_and_the_others_fail() -> None:
    reply = scripted(GOLD)
    old = "\n".join(RULES[:2])
    assert level(reply(editor_chat(old), {"model": "good-editor"})) == 3
    assert level(reply(editor_chat("\n".join(RULES)), {"model": "good-editor"})) == len(RULES)
    assert "</prompt>" in reply(editor_chat(old), {"model": "ruin"})
    assert level(reply(editor_chat(old), {"model": "ruin"})) == 0
    assert "<prompt>" not in reply(editor_chat(old), {"model": "mute"})
    bad = [level(reply(editor_chat(old, question), {"model": "bad-editor"})) for question in GOLD]
    assert set(bad) == {0, 3} and 5 < bad.count(0) < 25
    fickle = ["</prompt>" in reply(editor_chat(old, question), {"model": "fickle"}) for question in GOLD]
    assert 5 < sum(fickle) < 25
    assert reply.roles == {"editor": 5 + 2 * len(GOLD)}


def test_other_tags_are_honoured() -> None:
    reply = scripted(GOLD)
    improved = reply(chat(f"{RULES[0]} Answer in <IMPROVED_VARIABLE> text </IMPROVED_VARIABLE>."), {"model": "good"})
    assert improved.endswith("</IMPROVED_VARIABLE>") and level(improved) == 2
    lesson = reply(chat(f"{RULES[0]} Write one <lesson> and close it: </lesson>"), {"model": "good"})
    assert level(lesson) == 1 and RULES[1] in lesson


def test_through_the_server_both_roles_climb_to_the_top(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    instructions, scores = "Write SQL.", []
    with serve(scripted(GOLD), models=("solver", "good-editor")) as server:
        solver, editor = RemoteModel(server.url), RemoteModel(server.url, "good-editor")
        for _ in range(len(RULES)):
            [[edited]] = editor.sample([editor_chat(instructions)])
            instructions = extract_tag(edited.text, "prompt")
            answers = solver.sample([chat(f"{instructions}\n{question}") for question in GOLD], n=2)
            scores.append(sum(WRONG not in sample.text for row in answers for sample in row) / (2 * len(GOLD)))
    assert scores == sorted(scores) and scores[-1] == 1.0 and scores[0] < 0.5


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data/bird")
def test_on_bird() -> None:
    gold = bird_gold(SHARED, "university")
    assert len(gold) > 100 and len(bird_gold(SHARED)) > len(gold)
    assert share_right(gold, "none") == pytest.approx(0.2, abs=0.01) and share_right(gold, " ".join(RULES)) == 1.0
