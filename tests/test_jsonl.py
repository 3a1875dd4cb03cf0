"""Problems of one's own: what a line may say, how each grader judges, which sentence a mistake earns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data import Answer, Grade, Questions, extract_tag


def task_of(folder: Path, *records: dict) -> Questions:
    path = folder / "own.jsonl"
    path.write_text("\n".join(json.dumps({"question": "Q?", **record}) for record in records), encoding="utf-8")
    return Questions("jsonl", path)


def verdict(folder: Path, record: dict, said: str) -> bool:
    task = task_of(folder, record)
    (problem,) = task.problems("own")
    return task.grade(problem, f"I think so. <answer>{said}</answer>").correct


@pytest.mark.parametrize(
    "gold, said, correct",
    [("Paris", "Paris", True), ("Paris", " Paris\n", True), ("New  York", "New York", True), ("Paris", "paris", False),
     ("Paris", "Paris.", False), ("Paris", "It is Paris", False), ("42", "42", True), ("42", "42.0", False)],
)  # fmt: skip
def test_exact(tmp_path: Path, gold: str, said: str, correct: bool):
    assert verdict(tmp_path, {"answer": gold}, said) is correct


@pytest.mark.parametrize(
    "gold, said, correct",
    [("Paris", "It is paris, France.", True), ("Paris", "Par is", False), ("new york", "in New\nYork", True),
     ("a", "", False)],
)  # fmt: skip
def test_contains(tmp_path: Path, gold: str, said: str, correct: bool):
    assert verdict(tmp_path, {"answer": gold, "grader": "contains"}, said) is correct


@pytest.mark.parametrize(
    "gold, tolerance, said, correct",
    [
        # exactly, in any notation
        (42, None, "42", True), (42, None, "42.0", True), (42, None, "+42 apples", True), (42, None, "43", False),
        (42, None, "42.0000001", False), (1234567, None, "1,234,567", True), (5000, None, "5e3", True),
        (-3, None, "-3", True), (-3, None, "−3", True), (-3, None, "- 3", True), (-3, None, "3", False),
        ("$1,000", None, "1000", True), (0.3, None, "1/3", False), (-0.5, None, "0.5", False), (0.5, None, "1/2", True),
        (6.626e-34, None, "6.626e-34", True), (6.626e-34, None, "0", False), (0, None, "0", True),
        # a tolerance is absolute and its edge belongs to it
        (0.333, 0.001, "1/3", True), (3.1416, 1e-4, "3.14159265", True), (3.1416, 1e-4, "3.1414", False),
        (0.3, 0.1, "0.4", True), (0.3, 0.1, "0.2", True), (0.3, 0.1, "0.41", False), (100, 5, "95", True),
        (100, 5, "94.9", False), (0.5, 0, "0.5", True), (0.5, 0, "0.5000001", False),
        # not one number
        (3, None, "3 or 4", False), (3, None, "three", False), (3, None, "", False), (1, None, "1/0", False),
        (3, None, "1.2.3", False), (1, None, "1_000", False), (10, None, "10²", False), (5, None, "5½", False),
        (5, None, "5e9999", False), (5, None, "5" + " " * 1000 + "6", False), (5, None, "5" + "0" * 500, False),
        (1, None, "1 000", False), (1234, None, "1,23,4", False), (0, None, "NaN", False), (1, None, "inf", False),
        (3, None, "٣", False),
    ],
)  # fmt: skip
def test_number(tmp_path: Path, gold: object, tolerance: object, said: str, correct: bool):
    record = {"answer": gold, "grader": "number"} | ({} if tolerance is None else {"tolerance": tolerance})
    assert verdict(tmp_path, record, said) is correct


@pytest.mark.parametrize("answer", ["Paris", "B", "b", 1, "1"])
def test_choice_takes_the_text_the_letter_or_the_number(tmp_path: Path, answer: object):
    record = {"choices": ["Rome", "Paris", "Bern"], "answer": answer}
    assert verdict(tmp_path, record, "(b)") is True
    for said in ("A", "D", "A or B", "Paris"):  # the letter grader, whatever the gold answer looks like
        assert verdict(tmp_path, record, said) is False


def test_choices_that_are_numbers(tmp_path: Path):
    assert verdict(tmp_path, {"choices": [10, 20, 30], "answer": 20}, "B") is True
    with pytest.raises(ValueError, match="expected the letter, the number from 0 or the text of one of .*, found 1"):
        task_of(tmp_path, {"choices": [0, 2, 1], "answer": 1})  # the second or the third?


def test_the_grader_follows_from_the_line_unless_it_says_so(tmp_path: Path):
    lines = [{"answer": "x"}, {"answer": 1}, {"answer": "A", "choices": ["a", "b"]}]
    lines += [{"answer": "1", "grader": "number"}]
    kinds = [problem.grader for problem in task_of(tmp_path, *lines).problems("own")]
    assert kinds == ["exact", "number", "choice", "number"]


def test_only_the_last_closed_tags_count(tmp_path: Path):
    task = task_of(tmp_path, {"answer": "yes"})
    (problem,) = task.problems("own")
    assert task.grade(problem, "<answer>no</answer> wait <answer>yes</answer>") == Grade(True, "yes")
    missing = Grade(False, "", "There is no closed pair of <answer> tags.", readable=False)
    assert task.grade(problem, "<answer>yes") == task.grade(problem, " \n") == missing
    number = task_of(tmp_path, {"answer": 3})
    grade = number.grade(number.problems("own")[0], "<answer>2 or 3</answer>")
    assert grade == Grade(False, "2 or 3", "The tags must hold one number, no other digit.", readable=False)


CHOICE = {"answer": "B", "choices": ["a", "b"]}


@pytest.mark.parametrize("record, response, correct, answer", [
    ({"answer": "Paris"}, "\n Paris \nbecause it is.", True, "Paris"),
    ({"answer": "Paris"}, "It is Paris", False, "It is Paris"),
    ({"answer": "Paris", "grader": "contains"}, "It is Paris.\nNo, Rome.", True, "It is Paris."),
    ({"answer": "Paris", "grader": "contains"}, "It is Rome.\nNo, Paris.", False, "It is Rome."),
    ({"answer": 3}, "3 apples", True, "3 apples"), ({"answer": 3}, "4\n3", False, "4"),
    (CHOICE, "B. Functional", True, "B"), (CHOICE, "(b) c", True, "B"), (CHOICE, "**A**: so", False, "A"),
    (CHOICE, "B) it is.\nB. is right.", True, "B"),
])  # fmt: skip
def test_without_tags_the_first_line_is_read(tmp_path: Path, record: dict, response: str, correct: bool, answer: str):
    """And it is said that it was read only so."""
    task = task_of(tmp_path, record)
    problem = task.problems("own")[0]
    grade = task.grade(problem, response)
    assert (grade.correct, grade.answer, grade.readable, grade.lenient) == (correct, answer, True, True)
    tagged = task.grade(problem, f"{response}\n<answer>{answer}</answer>")
    assert (tagged.correct, tagged.lenient) == (correct, False)  # what stands in tags goes before


@pytest.mark.parametrize("record, response", [
    ({"answer": "x"}, "<think> x is it"), ({"answer": "x"}, "<answer>x"), ({"answer": "x"}, "</answer>"),
    ({"answer": 3}, "three"), (CHOICE, "A man"), (CHOICE, "C. none"), (CHOICE, "The answer is B."),
    (CHOICE, "Both.\nB."), (CHOICE, "Both.\nB. of them"), (CHOICE, "B. is one\nA. is the other"),
])  # fmt: skip
def test_leniency_has_its_end(tmp_path: Path, record: dict, response: str):
    task = task_of(tmp_path, record)
    grade = task.grade(task.problems("own")[0], response)
    assert not grade.correct and not grade.readable and not grade.lenient  # it counts once


@pytest.mark.parametrize("record, said, right", [
    ({"answer": "Paris"}, "Rome", "Paris"), ({"answer": 3}, "4", "3"),
    ({"answer": "Paris", "grader": "contains"}, "Rome", "Paris"),
])  # fmt: skip
def test_a_wrong_text_is_told_what_was_said_and_what_is_right(tmp_path: Path, record: dict, said: str, right: str):
    task = task_of(tmp_path, record)
    problem = task.problems("own")[0]
    assert task.grade(problem, f"<answer>{said}</answer>").feedback == f"The answer was {said!r}; right is {right!r}."
    assert task.grade(problem, f"<answer>{right}</answer>").feedback == ""


def test_the_form_is_shown_filled_and_copying_it_wins_nothing(tmp_path: Path):
    """A small model copies what stands between the tags of its prompt."""
    lines = [{"answer": "x"}, {"answer": 1}, {"answer": "x", "grader": "contains"}]
    lines += [{"answer": letter, "choices": ["one", "two", "three", "four"]} for letter in "ABCD"]
    task = task_of(tmp_path, *lines)
    for problem in task.problems("own"):
        (message,) = task.solve_chat("MY RULES", problem)
        copied = extract_tag(message["content"], "answer")
        assert copied and not task.grade(problem, message["content"]).correct
    (message,) = task.edit_chat("OLD RULES", [])
    assert len(extract_tag(message["content"], "prompt")) > 40


@pytest.mark.parametrize("record, said, readable", [
    ({"answer": "yes"}, "no", True), ({"answer": "yes"}, " \n", False), ({"answer": 3}, "4", True),
    ({"answer": 3}, "three", False), ({"answer": "yes", "grader": "contains"}, "", False),
    ({"answer": "yes", "grader": "contains"}, "no", True), ({"answer": "A", "choices": ["a", "b"]}, "B", True),
    ({"answer": "A", "choices": ["a", "b"]}, "C", False),
])  # fmt: skip
def test_an_answer_is_readable_if_there_is_something_to_grade(tmp_path: Path, record: dict, said: str, readable: bool):
    task = task_of(tmp_path, record)
    grade = task.grade(task.problems("own")[0], f"<answer>{said}</answer>")
    assert (grade.correct, grade.readable) == (False, readable)


def test_domains_ids_and_splits(tmp_path: Path):
    lines = [{"answer": "x", "domain": f"d{i}", "id": i} for i in range(6)] + [{"answer": "y", "id": None}]
    task = task_of(tmp_path, *lines)
    assert task.domains("all") == ["d0", "d1", "d2", "d3", "d4", "d5", "own"]
    assert task.domains("train") == ["d0", "d1", "d2", "d3", "d4"] and task.domains("test") == ["d5", "own"]
    assert [problem.id for problem in task.problems("d3") + task.problems("own")] == ["3", "own-7"]
    assert task_of(tmp_path, {"answer": "x"}).domains("train") == task_of(tmp_path, {"answer": "x"}).domains("test")
    with pytest.raises(ValueError, match="expected one of the domains d0, d1, .*, found 'd9'"):
        task.problems("d9")


def test_a_folder_of_files_is_one_task(tmp_path: Path):
    for name in ("algebra", "botany"):
        (tmp_path / f"{name}.jsonl").write_text('{"question": "?", "answer": 1}')
    task = Questions("jsonl", tmp_path)
    assert task.domains("all") == ["algebra", "botany"] and task.problems("botany")[0].id == "botany-1"


def test_the_chats_say_what_the_tags_must_hold(tmp_path: Path):
    lines = [{"answer": "x"}, {"answer": 1}, {"answer": "A", "choices": ["one", "two"]}]
    task = task_of(tmp_path, *lines)
    exact, number, choice = (task.solve_chat("MY RULES", problem)[0]["content"] for problem in task.problems("own"))
    assert all("MY RULES" in chat and "Q?" in chat and "<answer>" in chat for chat in (exact, number, choice))
    assert "the number alone" in number and "the number alone" not in exact
    assert "A. one\nB. two" in choice and "letter" in choice
    (message,) = task.edit_chat("OLD RULES", [Answer("1", "Q?", "r", "2", "1", False)])
    assert message["role"] == "user" and "OLD RULES" in message["content"] and "<prompt>" in message["content"]


MISTAKES = [
    ('{"question": "Q?"}', r"line 1: expected question, answer and any list of choices \(KeyError.'answer'\)"),
    ('{"answer": "x"}', r"line 1: expected .*KeyError.'question'.*, found {'answer': 'x'}"),
    ('{"question": "Q?", "answer": " "}', r"line 1: expected .*KeyError.'answer'"),
    ('{"question": "Q?", "answer": ["x"]}', r"line 1: expected one of .*, found \('number', \['x'\], 0\)"),
    ('{"question": "Q?", "answer": true}', r"line 1: expected one of .*, found \('number', True, 0\)"),
    ('{"question": "Q?", "answer": "x", "grader": "fuzzy"}',
     r"line 1: expected one of \['choice', 'exact', 'number', 'contains'\], .*, found \('fuzzy', 'x', 0\)"),
    ('{"question": "Q?", "answer": "x", "grader": ["exact"]}', r"expected one of .*found \(\['exact'\]"),
    ('{"question": "Q?", "answer": "ten", "grader": "number"}', "an answer like it, .*, found .'number', 'ten', 0"),
    ('{"question": "Q?", "answer": NaN}', "an answer like it, .*, found .'number', nan, 0"),
    ('{"question": "Q?", "answer": 1, "tolerance": -0.1}', "line 1: .*tolerance from 0, found .*-0.1"),
    ('{"question": "Q?", "answer": 1, "tolerance": "1%"}', "line 1: .*tolerance from 0, found .*'1%'"),
    ('{"question": "Q?", "answer": "C", "choices": ["a", "b"]}', "text of one of .'a', 'b'., found 'C'"),
    ('{"question": "Q?", "answer": "A", "choices": "ab"}', "expected question, answer and any list of choices"),
    ('{"question": "Q?", "answer": "A", "grader": "choice"}', r"text of one of \(\), found 'A'"),
    ('{"question": "Q?", "answer": "A", "choises": ["a", "b"]}', "line 1: expected 'choices', .*, found 'choises'"),
    ('{"question": "Q?", "answer": "x", "Domain": "law"}', "line 1: expected 'domain', .*, found 'Domain'"),
    ('{"question": "Q?", "answer": "x", "domian": "law"}', "line 1: expected 'domain', .*, found 'domian'"),
    ('{"question": "Q?", "answer": "x", "id": 1}\n{"question": "Q?", "answer": "y", "id": "1"}',
     r"line 2: expected one file for own and every id once in it, found '1'"),
    ('{"question": "Q?", "answer": "x"}\n{oops', "line 2: expected .*column 2.*, found b'{oops"),
    ('"Q?"', "line 1: expected .* found 'Q.'"),
    ("", "line 1: expected .*, found b''"),
]  # fmt: skip


@pytest.mark.parametrize("text, sentence", MISTAKES, ids=[str(i) for i in range(len(MISTAKES))])
def test_a_mistake_is_named_with_file_line_and_value(tmp_path: Path, text: str, sentence: str):
    (tmp_path / "own.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=sentence) as error:
        Questions("jsonl", tmp_path / "own.jsonl")
    assert str(tmp_path / "own.jsonl") in str(error.value) and "\n" not in str(error.value)


def test_other_columns_are_left_alone_and_a_shifted_line_of_csv_is_named(tmp_path: Path):
    names = ("subdomain", "domain_id", "main", "optional", "opinions", "option_a", "choice", "grade", "id2")
    line = {"question": "Q?", "answer": "x"} | dict.fromkeys(names, "y")
    assert [problem.gold for problem in task_of(tmp_path, line).problems("own")] == ["x"]
    (tmp_path / "shifted.csv").write_text("question,answer\nWhat, exactly?,x\n")
    with pytest.raises(ValueError, match="shifted.csv, line 2: expected as many fields as the head has .*needs quotes"):
        Questions("jsonl", tmp_path / "shifted.csv")


def test_no_file_says_what_is_needed(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="holds no usable question in .jsonl or .csv files"):
        Questions("jsonl", tmp_path)
    with pytest.raises(FileNotFoundError, match="missing.jsonl"):
        Questions("jsonl", tmp_path / "missing.jsonl")
