"""Multiple choice: which letter is gold, which files can be read, which answers count, what people are told."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import data
from data import Problem, Questions, choice_letter

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmark subsets of ../shared/data are not here")


def record(question: str = "2 + 2?", choices: object = "3456", answer: object = 1, **more: object) -> dict:
    return {"question": question, "choices": list(choices), "answer": answer, **more}


def write_jsonl(path: Path, *records: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def choice(path: Path | str | None = None) -> Questions:
    return Questions("mmlu", path)


def choice_problem(row: dict) -> Problem:
    (record,) = data.read_records([row], "here", "d")
    return data.choice_problem(record)


def everything(task: Questions) -> list[Problem]:
    return [problem for domain in task.domains("all") for problem in task.problems(domain)]


# --- the gold letter --------------------------------------------------------------------------------------------------


def second_rule(row: dict) -> str | None:
    """The same rule from a table instead of parsing: every string that is a single option, spelt out."""
    table = {"0": "A", "1": "B", "2": "C", "3": "D", "A": "A", "B": "B", "C": "C", "D": "D"}
    if row["error_type"].replace("_", " ").casefold() == "no correct answer":
        return None
    return table.get(row["correct_answer"]) or table[str(row["answer"])]


def published(name: str) -> list[dict]:
    lines = "\n".join(path.read_text(encoding="utf-8") for path in sorted((SHARED / name).glob("*.jsonl"))).split("\n")
    return [json.loads(line) for line in lines if line]


@needs_shared
def test_choice_letter_agrees_with_a_second_rule_on_every_record():
    rows = published("mmlu_redux")
    assert len(rows) == 800
    assert [choice_letter(row) for row in rows] == [second_rule(row) for row in rows]
    # Counted with grep in the files: 9 have no right option, 66 of the others name a single one of their own.
    assert sum(choice_letter(row) is None for row in rows) == 9
    assert sum(len(row["correct_answer"]) == 1 and choice_letter(row) is not None for row in rows) == 66


@needs_shared
@pytest.mark.parametrize("name", ["mmlu_pro_redux", "supergpqa_subfield"])
def test_choice_letter_is_the_answer_where_nothing_was_re_annotated(name: str):
    rows = published(name)
    assert len(rows) > 1000
    assert [choice_letter(row) for row in rows] == ["ABCD"[row["answer"]] for row in rows]


@needs_shared
def test_choice_letter_reads_the_raw_spellings():
    kinds = set()
    for path in sorted(SHARED.glob("mmlu_redux_raw_csv/*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            delimiter = ";" if file.readline().startswith("question;") else ","
            file.seek(0)
            for row in csv.DictReader(file, delimiter=delimiter):
                kinds.add(row["error_type"])
                assert choice_letter(row) == second_rule(row), row
    assert {"No correct answer", "No Correct Answer"} <= kinds


@pytest.mark.parametrize(
    "fixed, letter",
    [("", "B"), (None, "B"), ("2", "C"), (2, "C"), ("D", "D"), (" D ", "D"), ("d", "D"), ("1, 3", "B"), ("A,C", "B"),
     ("2 and 3", "B"), ("4", "B"), ("E", "B"), ("6", "B"), ("-1", "B"), ("depends", "B"), ("AB", "B"),
     ("²", "B"), ("٣", "B")],
)  # fmt: skip
def test_correct_answer_wins_only_if_it_is_one_option(fixed: object, letter: str):
    assert choice_letter(record(error_type="wrong_groundtruth", correct_answer=fixed)) == letter


def test_a_record_without_choices_or_answer_has_no_letter():
    assert data.choice_letter({}) is None and data.choice_letter({"choices": None, "answer": "A"}) is None


def test_records_without_a_right_option_are_dropped():
    for kind in ("no_correct_answer", "No correct answer", "No Correct Answer", "NO-CORRECT-ANSWER "):
        assert choice_letter(record(error_type=kind, correct_answer="A")) is None
    for kind in ("ok", "multiple_correct_answers", "expert", "", None):
        assert choice_letter(record(error_type=kind)) == "B"
    three = {"choices": ["x", "y", "z"], "error_type": "ok"}
    assert choice_letter({**three, "answer": 2, "correct_answer": ""}) == "C"
    assert choice_letter({**three, "answer": 3, "correct_answer": ""}) is None
    assert choice_letter({**three, "answer": 0, "correct_answer": "D"}) is None


# --- ten options become four ------------------------------------------------------------------------------------------


def ten(question: str, answer: int) -> dict:
    return {"question": question, "options": [f"option {i}" for i in range(10)], "answer_index": answer}


def test_the_cut_keeps_the_right_option_and_is_the_same_everywhere():
    problem = choice_problem(ten("Which?", 7))
    assert problem.choices == ("option 1", "option 3", "option 8", "option 7")  # in any process
    gold = set()
    for i in range(200):
        problem = choice_problem(ten(f"Which? {i}", i % 10))
        assert len(set(problem.choices)) == 4
        assert problem.choices["ABCD".index(problem.gold)] == f"option {i % 10}"
        gold.add(problem.gold)
    assert gold == set("ABCD")  # shuffled: the right one stands everywhere


def test_the_cut_never_keeps_a_second_right_option():
    row = {"question": "Which?", "options": ["yes", "no", "yes", "no", "never", "yes"], "answer_letter": "C"}
    problem = choice_problem(row)
    assert sorted(problem.choices) == ["never", "no", "yes"] and problem.choices["ABCD".index(problem.gold)] == "yes"


def test_up_to_four_options_stay_as_they_are():
    for n in (2, 3, 4):
        problem = choice_problem(record(choices="wxyz"[:n], answer=1))
        assert problem.choices == tuple("wxyz"[:n]) and problem.gold == "B"


# --- grading ----------------------------------------------------------------------------------------------------------

FOUR = Problem("1", "Capital of France?", "B", choices=("Rome", "Paris", "Bern", "Oslo"))


@pytest.mark.parametrize(
    "said, correct",
    [("B", True), ("b", True), ("B.", True), ("(B)", True), ("[B]", True), (" B\n", True), ("**B**", True),
     ("`B`", True), ("B)", True), ('"B"', True), ("A", False), ("A or B", False), ("B or A", False), ("AB", False),
     ("A, B", False), ("BB", False), ("B B", False), ("", False), ("Paris", False), ("B. Paris", False),
     ("1", False), ("not B", False), ("≠B", False), ("¬B", False), ("-B", False),
     ("\N{CYRILLIC CAPITAL LETTER VE}", False), ("E", False), ("b2", False), ("?", False)],
)  # fmt: skip
def test_one_letter_counts(said: str, correct: bool):
    assert Questions.grade(None, FOUR, f"Let me think. <answer>{said}</answer>").correct is correct


def test_grades_say_what_was_wrong():
    def grade(response: str, problem: Problem = FOUR):
        return Questions.grade(None, problem, response)

    assert grade("<answer>B</answer>") == data.Grade(True, "B", "")
    missing = data.Grade(False, "", "There is no closed pair of <answer> tags.", readable=False)
    assert grade("The letter is B") == missing == grade("<answer>B")
    assert grade("B") == data.Grade(True, "B", lenient=True)
    unclear = "The tags must hold the letter of one option and nothing else."
    assert grade("<answer>A or B</answer>") == data.Grade(False, "A or B", unclear, readable=False)
    assert grade("<answer>d</answer>") == data.Grade(False, "D", "D is 'Oslo'; the right option, B, is 'Paris'.")
    assert grade("<answer>A</answer> no, <answer>B</answer>").correct  # the last one counts
    beyond = grade("<answer>D</answer>", Problem("2", "?", "B", choices=("x", "y", "z")))
    assert beyond.answer == "D" and not beyond.correct and "the letter of one option" in beyond.feedback


def test_the_chats_show_everything_and_need_no_system_message(tmp_path: Path):
    task = choice(write_jsonl(tmp_path / "first_aid.jsonl", record("A lone sheep?", error_type="ok")))
    problem = task.problems("first_aid")[0]
    (message,) = task.solve_chat("MY RULES", problem)
    assert message["role"] == "user"
    for part in ("first aid", "MY RULES", "A lone sheep?", "A. 3\nB. 4\nC. 5\nD. 6", "<answer>"):
        assert part in message["content"]
    assert task.grade(problem, message["content"]).correct is False  # echoing the form wins nothing
    grade = task.grade(problem, "<answer>A</answer>")
    (message,) = task.edit_chat("OLD RULES", [data.Answer("1", "Q?", "r", grade.answer, "B", False, grade.feedback)])
    for part in ("OLD RULES", "Q?", "A is '3'; the right option, B, is '4'.", "<prompt>"):
        assert part in message["content"]


# --- local copies -----------------------------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize(
    "name, domains, problems",
    [("mmlu_redux", 8, 791), ("mmlu_pro_redux", 4, 1346), ("supergpqa_subfield", 12, 2299)],
)
def test_jsonl_and_saved_datasets_give_the_same_problems(name: str, domains: int, problems: int):
    jsonl, arrow = choice(SHARED / name), choice(SHARED / f"{name}_arrow")
    assert len(jsonl.domains("all")) == domains and len(everything(jsonl)) == problems
    for split in ("train", "test", "all"):
        assert jsonl.domains(split) == arrow.domains(split)
    assert everything(jsonl) == everything(arrow)
    assert all(p.gold in "ABCD"[: len(p.choices)] and p.question and p.domain for p in everything(jsonl))
    assert len({(p.domain, p.id) for p in everything(jsonl)}) == problems


@needs_shared
def test_the_authors_csv_files_give_the_problems_of_the_normalised_files():
    raw, jsonl = choice(SHARED / "mmlu_redux_raw_csv"), choice(SHARED / "mmlu_redux")
    assert raw.domains("all") == ["anatomy", "formal_logic", "virology"]
    for domain in raw.domains("all"):
        assert raw.problems(domain) == jsonl.problems(domain)


@pytest.mark.parametrize("n, test", [(1, 1), (2, 1), (5, 1), (6, 2), (10, 2), (11, 3)])
def test_the_last_fifth_of_the_subjects_is_for_testing(tmp_path: Path, n: int, test: int):
    names = [f"s{i:02}" for i in range(n)]
    for name in names:
        write_jsonl(tmp_path / f"{name}.jsonl", record())
    task = choice(tmp_path)
    assert task.domains("all") == names and task.domains("test") == names[-test:]
    assert task.domains("train") == (names[:-test] if n > 1 else names)
    with pytest.raises(ValueError, match="expected the split 'train', 'test' or 'all', found 'dev'"):
        task.domains("dev")
    with pytest.raises(ValueError, match="expected one of the domains s00.*, found 'nope'"):
        task.problems("nope")


def save(path: Path, *records: dict) -> Path:
    import datasets

    datasets.Dataset.from_list(list(records)).save_to_disk(str(path))
    return path


def folders(root: Path) -> None:
    write_jsonl(root / "train/physics.jsonl", record())
    write_jsonl(root / "test/law.jsonl", record())


def one_level_higher(root: Path) -> None:
    folders(root / "unpacked")


def files(root: Path) -> None:
    write_jsonl(root / "train.jsonl", record(subject="Physics"))
    write_jsonl(root / "test.jsonl", record(subject="Law"))


def saved_dataset_dict(root: Path) -> None:
    save(root / "train", record(category="physics"))
    save(root / "test", record(category="law"))


def parts_of_subjects(root: Path) -> None:
    save(root / "physics/train", record())
    write_jsonl(root / "law/test.jsonl", record())
    write_jsonl(root / "law/dev.jsonl", record())


LAYOUTS = [folders, one_level_higher, files, saved_dataset_dict, parts_of_subjects]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_train_and_test_parts_are_found_at_any_depth(tmp_path: Path, layout: Callable):
    layout(tmp_path)
    task = choice(tmp_path)
    assert (task.domains("train"), task.domains("test")) == (["physics"], ["law"])
    assert task.domains("all") == ["law", "physics"]
    assert len(task.problems("physics")) == len(task.problems("law")) == 1


def test_train_never_shares_a_domain_with_test(tmp_path: Path):
    write_jsonl(tmp_path / "train/law.jsonl", record("Q1"))
    write_jsonl(tmp_path / "test/law.jsonl", record("Q2"))
    task = choice(tmp_path)
    assert [task.domains(s) for s in ("train", "test", "all")] == [["law_train"], ["law"], ["law", "law_train"]]
    assert [p.question for p in task.problems("law_train")] == ["Q1"]


@pytest.mark.parametrize("make", [
    lambda root: write_jsonl(root / "law.jsonl", record()),
    lambda root: (write_jsonl(root / "law.jsonl", record()), root)[1],
    lambda root: (write_jsonl(root / "a/b/law.jsonl", record()), root)[1],
    lambda root: (save(root / "law", record()), root)[1],
    lambda root: save(root / "law", record()),
    lambda root: (save(root / "law/test", record()), save(root / "law/validation", record()), root / "law")[2],
], ids=["file", "folder", "too high", "saved, too high", "saved", "saved DatasetDict"])  # fmt: skip
def test_one_subject_is_found_at_any_depth(tmp_path: Path, make: Callable):
    task = choice(make(tmp_path))
    assert task.domains("train") == task.domains("test") == ["law"] and len(task.problems("law")) == 1


def test_a_prefix_is_no_part_of_the_subject_and_makes_no_test(tmp_path: Path):
    write_jsonl(tmp_path / "mmlu_law.jsonl", record())
    write_jsonl(tmp_path / "mmlu_test.jsonl", record())
    assert choice(tmp_path).domains("all") == ["law", "test"] and choice(tmp_path).domains("train") == ["law"]


def test_hidden_files_are_no_subjects(tmp_path: Path):
    write_jsonl(tmp_path / "law.jsonl", record())
    write_jsonl(tmp_path / ".ipynb_checkpoints/law-checkpoint.jsonl", record())
    (tmp_path / "._law.csv").write_bytes(b"\x00\xff")
    assert choice(tmp_path).domains("all") == ["law"]


def test_dropped_records_do_not_move_the_ids(tmp_path: Path):
    rows = [record("Q0"), record("Q1", error_type="no_correct_answer"), record("Q2")]
    assert [p.id for p in choice(write_jsonl(tmp_path / "law.jsonl", *rows)).problems("law")] == ["law-1", "law-3"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_files_with_any_delimiter_and_either_list(tmp_path: Path, delimiter: str):
    fields = ["question", "choices", "answer", "error_type", "correct_answer"]
    with (tmp_path / "mmlu_law.csv").open("w", encoding="utf-8-sig", newline="") as file:
        rows = csv.writer(file, delimiter=delimiter)
        rows.writerows([fields, ["a, b; c\r\nd?", str(["it's", 'a "b"']), "1", "OK", ""],
                        ["é?", json.dumps(["x, y", "z; w", "v"]), "0", "wrong groundtruth", "C"]])  # fmt: skip
    first, second = choice(tmp_path).problems("law")
    assert (first.question, first.choices, first.gold) == ("a, b; c\nd?", ("it's", 'a "b"'), "B")
    assert (second.question, second.choices, second.gold) == ("é?", ("x, y", "z; w", "v"), "C")


def test_line_separators_inside_a_string_do_not_split_it(tmp_path: Path):
    path = tmp_path / "law.jsonl"
    path.write_text(json.dumps(record("a\u2028b\x85c"), ensure_ascii=False) + "\r\n\n", encoding="utf-8")
    assert choice(path).problems("law")[0].question == "a\u2028b\x85c"


def jsonl_with_halves(root: Path) -> None:
    row = record("half \ud800?", choices=["\udfff", "b"], answer=1, id="\ud83d", note=[{"\ud800": "\ud800"}])
    write_jsonl(root / "law.jsonl", row)
    raw = b'{"question": "raw \xed\xa0\x80?", "choices": ["a", "b"], "answer": 1}'  # read as JSON, not as UTF-8
    (root / "law.jsonl").write_bytes((root / "law.jsonl").read_bytes() + b"\n" + raw)


def csv_with_halves(root: Path) -> None:
    choices = r"['\ud800', 'b']"  # Python's escapes in the text of a list
    (root / "law.csv").write_text(f'question,choices,answer\nhalf?,"{choices}",1\n', encoding="utf-8")


def saved_with_halves(root: Path) -> None:
    save(root / "law", record("half?", choices=[], answer=1) | {"choices": r"['\ud800', 'b']"})


@pytest.mark.parametrize("write", [jsonl_with_halves, csv_with_halves, saved_with_halves])
@pytest.mark.parametrize("name", ["mmlu", "jsonl"])
def test_what_is_read_holds_no_lone_surrogate(tmp_path: Path, write: Callable, name: str):
    write(tmp_path)
    task = Questions(name, tmp_path)
    for problem in everything(task):
        assert str(problem).encode() and problem.choices[1] == "b" and problem.gold == "B"
        assert problem.choices[0] in ("?", "a")
        assert task.solve_chat("MY RULES", problem)[0]["content"].encode()
    assert [p.id for p in everything(task)][0] in ("?", "law-1")


def test_a_file_name_that_is_no_text_makes_no_lone_surrogate(tmp_path: Path):
    if not sys.platform.startswith("linux"):
        pytest.skip("such names are not possible here")
    name = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff.jsonl"))
    (problem,) = everything(choice(write_jsonl(name, record())))
    assert (problem.id, problem.domain) == ("a?-1", "a")


BROKEN = {  # file contents -> what people read
    b"": "line 1: expected question, answer and any list of choices .*, found b''",
    b'{"question": "?"': "line 1: expected question, .*column 17.*, found b'{\"question",
    b'{"question": "?", "choices": ["a", "b"], "answer": 0}\n[1, 2]\n': r"line 2: expected question, .*found \[1, 2\]",
    b'{"question": "caf\xe9"}': "line 1: expected .*UnicodeDecodeError",
    b'{"prompt": "?", "choices": ["a", "b"], "answer": 0}': r"line 1: expected .*KeyError.'question'",
    b'{"question": " ", "choices": ["a", "b"], "answer": 0}': r"line 1: expected .*KeyError.'question'",
    b'{"question": "?", "answer": 0}': r"line 1: expected choices, and a letter or a number from 0, found \(0, \(\)\)",
    b'{"question": "?", "choices": ["a", "b"], "answer": null}': r"KeyError.'answer'",
    b'{"question": "?", "choices": "a, b", "answer": 0}': "expected question, answer and any list of choices",
    b'{"question": "?", "choices": 5, "answer": 0}': "expected question, answer and any list of choices",
    b'{"question": "?", "choices": ["a", "b"], "answer": "Paris"}': "a letter or a number from 0, found .'Paris'",
    b'{"question": "?", "choices": ["a", "b"], "answer": true}': "a letter or a number from 0, found .True",
}  # fmt: skip


@pytest.mark.parametrize("content", BROKEN, ids=[str(i) for i in range(len(BROKEN))])
def test_a_broken_file_is_named_with_line_and_value(tmp_path: Path, content: bytes):
    (tmp_path / "law.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=BROKEN[content]) as error:
        choice(tmp_path)
    assert "\n" not in str(error.value) and "law" in str(error.value)


def test_a_broken_csv_row_is_named(tmp_path: Path):
    (tmp_path / "law.csv").write_text("question;choices;answer\nQ;['a', 'b'];0\nQ;['a' b'];0\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"law.csv, line 3: expected question, answer and any list of choices"):
        choice(tmp_path)


def test_missing_and_empty_folders_say_what_was_looked_for(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        choice(tmp_path / "nowhere")
    write_jsonl(tmp_path / "a/law.jsonl", record(error_type="No correct answer"))
    with pytest.raises(FileNotFoundError, match="holds no usable question in .jsonl or .csv files or saved `datasets`"):
        choice(tmp_path)
    write_jsonl(tmp_path / "a/law.jsonl", record())
    write_jsonl(tmp_path / "b/law.jsonl", record())
    with pytest.raises(ValueError, match="b/law.jsonl, line 1: expected one file for law .*, found 'law-1'"):
        choice(tmp_path)


# --- the hub ----------------------------------------------------------------------------------------------------------


class FakeHub:
    """The three data sets with the fields they have on the hub."""

    def __init__(self):
        from datasets import Dataset

        def gpqa(subfield: str, field: str, n: int) -> list[dict]:
            return [{"uuid": f"{subfield}{i}", "question": f"{subfield} {i}?", "options": list("abcdefghij"),
                     "answer": "c", "answer_letter": "C", "discipline": "Science", "field": field, "subfield": subfield,
                     "difficulty": "hard", "is_calculation": False} for i in range(n)]  # fmt: skip

        pro = [{"question_id": i, "question": f"{i}?", "options": list("abcdef"), "answer": "F", "answer_index": 5,
                "cot_content": "", "category": "computer science", "src": ""} for i in range(3)]  # fmt: skip
        notes = {"source": "", "correct_answer": None, "potential_reason": None}
        redux = [record(error_type=kind, **notes) for kind in ("ok", "no_correct_answer")]
        self.tables = {
            (data.SUPERGPQA, "default", "train"): gpqa("Number Theory", "Mathematics", 100)
            + gpqa("Set Theory", "Mathematics", 99) + gpqa("Graph Theory", "Mathematics", 1)
            + gpqa("Anatomy", "Medicine", 100),
            (data.MMLU_PRO, "default", "test"): pro,
            (data.REDUX, "anatomy", "test"): redux,
            (data.REDUX, "virology", "test"): redux,
        }  # fmt: skip
        self.Dataset = Dataset

    def load_dataset(self, *names: str, split: str) -> object:
        return self.Dataset.from_list(self.tables[(*names, split)])

    def get_dataset_config_names(self, name: str) -> list[str]:
        return ["anatomy", "virology"] if name == data.REDUX else ["default"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr("datasets.load_dataset", fake.load_dataset)
    monkeypatch.setattr("datasets.get_dataset_config_names", fake.get_dataset_config_names)
    return fake


def test_mmlu_redux_is_the_test(hub: FakeHub):
    task = choice()
    assert task.domains("test") == ["anatomy", "virology"]
    (problem,) = task.problems("virology")
    assert (problem.id, problem.gold, problem.domain) == ("virology-1", "B", "virology")


def test_supergpqa_is_grouped_by_subfield_and_small_ones_by_field(hub: FakeHub):
    task = choice()
    assert task.domains("train") == ["anatomy_train", "mathematics", "number_theory"]  # MMLU has an anatomy as well
    assert [len(task.problems(d)) for d in task.domains("train")] == [100, 100, 100]
    for problem in task.problems("mathematics"):
        assert len(problem.choices) == 4 and problem.choices["ABCD".index(problem.gold)] == "c"
    assert task.domains("all") == ["anatomy", "anatomy_train", "mathematics", "number_theory", "virology"]


def test_mmlu_pro_is_grouped_by_category(hub: FakeHub):
    task = choice("TIGER-Lab/MMLU-Pro")
    assert task.domains("train") == ["computer_science"] and task.domains("test") == ["anatomy", "virology"]
    problems = task.problems("computer_science")
    assert len({p.id for p in problems}) == 3 and all(p.choices["ABCD".index(p.gold)] == "f" for p in problems)


def test_a_local_copy_of_supergpqa_is_grouped_like_the_hub(hub: FakeHub, tmp_path: Path):
    write_jsonl(tmp_path / "SuperGPQA-all.jsonl", *hub.tables[data.SUPERGPQA, "default", "train"])
    task = choice(tmp_path)
    assert task.domains("all") == ["anatomy", "mathematics", "number_theory"]
    assert [p.choices for p in task.problems("mathematics")] == [p.choices for p in choice().problems("mathematics")]


def test_without_a_network_one_sentence_says_what_to_do(hub: FakeHub):
    del hub.tables[data.REDUX, "virology", "test"]
    with pytest.raises(ConnectionError, match="mmlu-redux-2.0: no download; go online or give --data FOLDER .KeyError"):
        choice()


def test_the_file_loads_fast():
    program = 'import sys, data; assert not {"torch", "datasets", "transformers"} & set(sys.modules)'
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], check=True)
