"""Readers of model output, on hostile text: they never raise and never report what was not said."""

from __future__ import annotations

import math
import re
import time
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import (
    LETTERS,
    Problem,
    Questions,
    choice_letter,
    extract_tag,
    gold_letter,
    read_letter,
    read_number,
    untagged_answer,
)

settings.register_profile("here", deadline=None, max_examples=60)
settings.load_profile("here")

# Every character there is, lone surrogates (Cs) included, mixed with the pieces that matter.
CHARACTERS = st.characters(codec=None, categories=("L", "M", "N", "P", "S", "Z", "C"))
PIECES = ["<answer>", "</answer>", "<ANSWER>", "</Answer>", "<answer", "</answer", "< answer>", "<answer/>", "<prompt>",
          "</prompt>", "```", "```sql\n", "\ud800", "\udfff", "\x00", "\u200f", "\u202e", "\u2028", "\ufeff", "B",
          "(B)", "A or B", "12", "-3.5", "1,234", "1e9999", "1/0", "½", "²", "٣", " ", "\n", "\\boxed{B}"]  # fmt: skip
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(CHARACTERS, max_size=8)), max_size=12).map("".join)
# Text without any complete answer tag: what may stand inside a pair or around it.
PLAIN = TEXTS.map(lambda text: re.sub("<|>", "", text))


@given(TEXTS)
@example("<answer>" * 50 + "A" + "</answer>" * 50)
def test_extract_tag_returns_what_stands_between_tags(text: str):
    found = extract_tag(text, "answer")
    pairs = re.findall("(?=<answer>(.*?)</answer>)", text, re.DOTALL | re.IGNORECASE)  # from every opening tag
    if found is None:
        assert not pairs
    else:
        assert found in [inside.strip() for inside in pairs]
        assert "<answer>" not in found.lower() and "</answer>" not in found.lower()


@given(TEXTS, PLAIN)
def test_extract_tag_reads_the_last_pair_whatever_came_before(before: str, inside: str):
    assert extract_tag(f"{before}<answer>{inside}</answer>", "answer") == inside.strip()
    assert extract_tag(f"{before}<AnsWer>{inside}</ANSWER> trailing", "answer") == inside.strip()
    assert extract_tag(f"{before}<prompt>{inside}</prompt>", "prompt") == inside.strip()


@given(TEXTS, PLAIN)
def test_an_unclosed_tag_changes_nothing(before: str, cut_off: str):
    assert extract_tag(f"{before}<answer>{cut_off}", "answer") == extract_tag(before + " ", "answer")


@given(PLAIN, PLAIN, PLAIN)
def test_tags_without_a_partner_are_nothing(a: str, b: str, c: str):
    for text in (f"{a}<answer>{b}", f"{a}</answer>{b}", f"{a}</answer>{b}<answer>{c}", f"{a}<answers>{b}</answers>{c}",
                 f"{a}<answer >{b}</answer>{c}", f"{a}<prompt>{b}</answer>{c}", f"{a}<answer/>{b}"):  # fmt: skip
        assert extract_tag(text, "answer") is None


def test_nested_repeated_and_fenced_tags():
    for text, content in [
        ("<answer>A<answer>B</answer>C</answer>", "B"),
        ("<answer>A</answer></answer>", "A"),
        ("<answer><answer>A</answer>", "A"),
        ("<answer>A</answer> <answer>B", "A"),
        ("```\n<answer>\n```sql\nSELECT 1\n```\n</answer>\n```", "```sql\nSELECT 1\n```"),
        ("<answer></answer>", ""),
        ("<answer>A</answer><answer></answer>", ""),
        ("\u202e<answer>\u200fA\u200f</answer>", "\u200fA\u200f"),
        ("<answer>\x00\ud800</answer>", "\x00\ud800"),
    ]:
        assert extract_tag(text, "answer") == content, text


@pytest.mark.parametrize("text", [
    "<answer>" * 50_000, "</answer>" * 50_000, "<answer>" + "x" * 400_000, "<" * 400_000,
    "<answer>" * 20_000 + "</answer>" * 20_000, "<answer>" + " " * 200_000 + "</answer>",
], ids=["openings", "closings", "unclosed", "brackets", "nested", "blanks"])  # fmt: skip
def test_long_hostile_text_takes_no_time(text: str):
    start = time.process_time()  # a busy machine is no failure
    found = extract_tag(text, "answer")
    read_letter(found or text, 4), read_number(found or text)
    assert time.process_time() - start < 2  # quadratic time would be minutes


@given(st.one_of(TEXTS, st.text(CHARACTERS)), st.integers(2, 26))
@example("ſ", 26)  # lower-cases to s only when case is folded
@example("\u212a", 26)  # the Kelvin sign
@example("B\u200f", 4)
def test_read_letter_reads_only_a_letter_that_stands_alone(text: str, n: int):
    letter = read_letter(text, n)
    if letter is None:
        return
    assert letter in LETTERS[:n]
    assert [c for c in text if c.isalnum() or ord(c) > 127 and not c.isspace()] in ([letter], [letter.lower()])


@given(st.sampled_from(LETTERS), st.sampled_from(["{}", "{}.", "({})", "[{}]", "**{}**", " {} ", "`{}`", '"{}"']))
def test_read_letter_reads_every_letter(letter: str, form: str):
    index = LETTERS.index(letter)
    for said in (letter, letter.lower()):
        assert read_letter(form.format(said), 26) == letter
        assert read_letter(form.format(said), index + 1) == letter
        assert read_letter(form.format(said), index) is None  # beyond the record's own options


@given(st.one_of(TEXTS, st.text(CHARACTERS)))
@example("9" * 10_000)
@example("1e999")
@example("0" * 399 + "12")
@example("1.5/2")
@example("1e5/2")
def test_read_number_reads_the_only_digits_there_are(text: str):
    number = read_number(text)
    if number is None:
        return
    assert math.isfinite(number)
    groups = re.findall(r"[0-9]+", text)
    assert groups and all(c in "0123456789" for c in text if c.isnumeric())  # no other digit was passed over
    if len(groups) == 1 and "." not in text:
        assert abs(number) == float(groups[0])


@given(st.integers(-(10**30), 10**30), st.sampled_from(["{}", "= {}", "${}", "{} km", "{}.", "about {}", "**{}**"]))
def test_read_number_round_trips_integers(value: int, form: str):
    assert read_number(form.format(value)) == read_number(form.format(f"{value:,}")) == float(value)
    assert read_number(form.format(value) + " or 1") is None


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_read_number_round_trips_floats(value: float):
    assert read_number(repr(value)) == value


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(CHARACTERS), st.lists(st.integers())))
def test_gold_letters_never_raise(value: object):
    letter = gold_letter(value, 4)
    assert letter is None or str(value).strip().upper().removesuffix(".0") in (letter, str("ABCD".index(letter)),
                                                                               f"0{'ABCD'.index(letter)}")  # fmt: skip
    record = {"choices": ["w", "x", "y", "z"], "answer": 2, "error_type": value, "correct_answer": value}
    assert choice_letter(record) in (letter or "C", None)


@given(TEXTS)
def test_grading_never_raises_and_is_right_only_for_the_gold_answer(text: str):
    problem = Problem("1", "Q?", "B", choices=("w", "x", "y", "z"))
    grade = Questions.grade(None, problem, text)
    tagged = extract_tag(text, "answer")
    assert grade.correct or grade.feedback and "\n" not in grade.feedback
    if tagged is None:
        assert grade.lenient == grade.readable == (untagged_answer(problem, text) is not None)
    else:
        assert not grade.lenient and grade.correct == (read_letter(tagged, 4) == "B")
        assert grade.readable == (read_letter(tagged, 4) is not None)
    said = tagged
    if tagged is None:
        said = untagged_answer(replace(problem, grader="exact"), text) or ""
    for kind, gold, right in (("exact", "B", said == "B"), ("contains", "B", "b" in said.lower()),
                              ("number", "12", read_number(said) == 12)):  # fmt: skip
        assert Questions.grade(None, Problem("1", "Q?", gold, grader=kind), text).correct == right
