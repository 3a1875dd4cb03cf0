"""The tasks: problems, prompts and graders.

What a task is: any object with the seven members below. Nothing here knows about models, rewards or trees (that is
`lse.py`), so this file can be copied away alone.

    name                                   a short word for folders and logs
    seed_instructions                      the editable field before the first edit (the paper's c_0)
    domains(split)                         names of the domains: split is "train", "test" or "all"
    problems(domain)                       its problems, all of one database / subject
    solve_chat(instructions, problem)      the chat the frozen solver answers             (x under context c)
    grade(problem, response) -> Grade      right or wrong, and why                        (R(x, y))
    edit_chat(instructions, summary)       the chat the editor answers with new instructions  ((c, S) -> c')
"""

from __future__ import annotations

import ast
import csv
import io
import json
import math
import random
import re
from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One question of one domain. `gold` is the right answer as the grader reads it (SQL, a letter, a string)."""

    id: str
    question: str
    gold: str
    domain: str = ""
    split: str = ""  # "pool", "holdout" or "test" where the task prescribes it; "" lets evolve.py draw the splits
    evidence: str = ""  # BIRD's hint, shown before the question
    choices: tuple[str, ...] = ()  # multiple choice: the options, in order


@dataclass(frozen=True)
class Grade:
    """A verdict: is it right, what the grader took as the answer, and one line for the editor on what went wrong."""

    correct: bool
    answer: str
    feedback: str = ""


@dataclass(frozen=True)
class Answer:
    """One graded answer, flat and JSON-ready: an element (x, y, y*, r) of the paper's summary S."""

    id: str
    question: str
    response: str  # the solver's full text
    answer: str  # what the grader extracted from it
    gold: str
    correct: bool
    feedback: str = ""
    truncated: bool = False


def extract_tag(text: str, tag: str) -> str | None:
    """The content of the last closed, innermost `<tag>...</tag>`, stripped; None if there is none.

    Tag names match in any case. An unclosed tag counts for nothing: a response cut off at the token limit is invalid.

    >>> extract_tag("<think> <answer>A</answer>? </think> <ANSWER> B </ANSWER>", "answer")
    'B'
    >>> extract_tag("<answer> never closed", "answer") is None
    True
    """
    name = re.escape(tag)
    pairs = re.findall(rf"<{name}>((?:(?!</?{name}>).)*)</{name}>", text, re.DOTALL | re.IGNORECASE)
    return pairs[-1].strip() if pairs else None


# ---------------------------------------------------------------------------------------------------------------------
# The miniature: databases with a hidden glossary
# ---------------------------------------------------------------------------------------------------------------------

# ---------------------------------------------------------------------------------------------------------------------
# Text-to-SQL: BIRD and everything in its format
# ---------------------------------------------------------------------------------------------------------------------


def cut(text: str, limit: int) -> str:
    """`text` if it has at most `limit` characters, else its head and tail around a note that says so, `limit` in all.

    >>> cut("SELECT " + "x, " * 40 + "y FROM t", 60)
    'SELECT x, x, x, x,[... cut from 135 characters ...] y FROM t'
    """
    text = text.encode("utf-8", "replace").decode()  # a lone surrogate would stop the tokenizer
    note = f"[... cut from {len(text)} characters ...]"
    keep = max(0, limit - len(note))
    return text if len(text) <= limit else (text[: keep - keep // 3] + note + text[len(text) - keep // 3 :])[:limit]


def edit_messages(
    role: str, instructions: str, summary: list[Answer], budget: int = 1500, reasoning: bool = False
) -> list[dict]:
    """The editor's chat, shared by every task: f_psi reads (c, S) and writes c'. One user message and no system
    message, because some chat templates refuse one.

    `role` ends "You improve the instructions of ..." and says what the solver does. Each field of a problem is cut to
    `budget` characters and the old instructions to four times that: k problems take about (4 + 5k) * budget characters
    at most. `reasoning` adds the solver's full text.

    >>> chat = edit_messages("a solver", "Add.", [Answer("1", "1+1?", "<answer>3</answer>", "3", "2", False)])
    >>> print(chat[0]["content"][:40])
    You improve the instructions of a solver
    """
    problems = []
    for i, a in enumerate(summary, 1):
        verdict = "right" if a.correct else "WRONG, cut off at the token limit" if a.truncated else "WRONG"
        fields = {"Question": a.question, "Full response": a.response if reasoning else "",
                  "Model's answer": a.answer or "(none)", "Right answer": a.gold, "Verdict": verdict,
                  "Feedback": a.feedback}  # fmt: skip
        problems.append(f"## Problem {i}\n" + "\n".join(f"{k}: {cut(v, budget)}" for k, v in fields.items() if v))
    content = f"""You improve the instructions of {role}. The model itself never changes; its instructions do.

# Current instructions
{cut(instructions, 4 * budget)}

# What the model did under them: {sum(a.correct for a in summary)} of {len(summary)} right
{chr(10).join(problems)}

# Your task
Work out why the wrong answers are wrong and what the right ones got right. Then write the full new instructions: they
replace the old ones and will be judged on other questions of the same domain. Keep what works, add the rules and facts
of this domain that these problems reveal, name likely mistakes, and do not merely repeat the questions above.
Write them between <prompt> and </prompt>; only what stands between the tags counts."""
    return [{"role": "user", "content": content}]


# ---------------------------------------------------------------------------------------------------------------------
# Multiple choice: MMLU-Redux, SuperGPQA, MMLU-Pro
# ---------------------------------------------------------------------------------------------------------------------

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER, NO_TAGS = "the letter of the one right option", "There is no closed pair of <answer> tags."
REDUX, SUPERGPQA, MMLU_PRO = "edinburgh-dawg/mmlu-redux-2.0", "m-a-p/SuperGPQA", "TIGER-Lab/MMLU-Pro"  # on the hub
Records = list[tuple[str, dict]]  # each with the place it stands at ("law.jsonl, line 3"), for the error messages
Domains = dict[str, list[Problem]]


def need(ok: object, where: object, wanted: str, found: object) -> None:
    """One sentence for the owner of the data, unless `ok`."""
    if not ok:
        raise ValueError(f"{where}: expected {wanted}, found {found!r:.200}.")


def read_letter(text: str, n: int) -> str | None:
    """The one letter that `text` says, in upper case, if it is among the first `n`; None for anything else.

    >>> [read_letter(text, 4) for text in ("b", "B.", "(B)", "**B**", "A or B", "B. Paris", "E", "")]
    ['B', 'B', 'B', 'B', None, None, None, None]
    """
    # Only harmless punctuation may stand around the letter: "≠B", "¬B" and "-B" do not say B.
    around = r"""[\s.,:;()\[\]{}*_`'"$]*"""
    found = re.fullmatch(f"{around}([A-Za-z]){around}", text)
    return found[1].upper() if found and LETTERS.index(found[1].upper()) < n else None


def gold_letter(value: object, n: int) -> str | None:
    """A published answer, an option's letter or its number counted from 0, as a letter; None if it is neither.

    >>> [gold_letter(value, 4) for value in (1, "1", " b ", "B", 1.0, 4, "E", "1, 3", None, "")]
    ['B', 'B', 'B', 'B', 'B', None, None, None, None, None]
    """
    text = str(value).strip().upper().removesuffix(".0")  # a numeric column with gaps comes back as floats
    index = int(text) if re.fullmatch("[0-9]{1,2}", text) else LETTERS.find(text) if len(text) == 1 else -1
    return LETTERS[index] if 0 <= index < n else None


def choice_letter(record: dict) -> str | None:
    """The gold letter of a MMLU-Redux record; None if the record must be dropped.

    Dropped are records whose annotators found no right option ("No Correct Answer", "no_correct_answer", ...) and those
    whose gold lies beyond their own options. `correct_answer` wins over `answer` where it is one of 0-3 or A-D; '1, 3'
    or free text is not.

    >>> choice_letter({"choices": ["x", "y", "z"], "answer": 0, "error_type": "ok", "correct_answer": ""})
    'A'
    >>> choice_letter({"choices": ["x", "y", "z"], "answer": 0, "error_type": "Wrong", "correct_answer": "C"})
    'C'
    """
    if re.sub("[^a-z]", "", str(record.get("error_type")).lower()) == "nocorrectanswer":
        return None
    n = 4 if isinstance(record["choices"], str) else len(record["choices"])  # the raw CSV has the list as text
    letter = gold_letter(record.get("correct_answer"), 4) or gold_letter(record["answer"], n)
    return letter if letter and LETTERS.index(letter) < n else None


def numbered(source: object, rows: Iterable[dict]) -> Records:
    """Rows of a table, each with its place."""
    return [(f"{source}, row {i}", row) for i, row in enumerate(rows, 1)]


def read_records(path: Path) -> Records:
    """The records of a JSONL, CSV or parquet file or a folder that `datasets` saved; ValueError names file and line."""
    if path.is_dir() or path.suffix == ".parquet":
        import datasets

        load = datasets.load_from_disk if path.is_dir() else datasets.Dataset.from_parquet
        return numbered(path, load(str(path)).to_list())
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8.") from None
    records: Records = []
    if path.suffix == ".csv":
        delimiter = max(",;\t", key=text.split("\n", 1)[0].count)  # some of the authors' files use ';'
        records = numbered(path, csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
    else:
        for i, line in enumerate(text.split("\n"), 1):  # splitlines() would also split at U+2028 inside a string
            if line.strip():
                try:
                    record = json.loads(line)
                except ValueError as error:
                    record = f"{line[:60]} ({error})"
                need(isinstance(record, dict), f"{path}, line {i}", "a JSON object {...}", record)
                records.append((f"{path}, line {i}", record))
    need(records, path, "at least one record", text[:60])
    return records


def field(record: dict, where: str, *names: str) -> Any:
    """The first of these fields that is filled; ValueError with the fields there are if none is."""
    filled = [record[name] for name in names if record.get(name) is not None and str(record[name]).strip()]
    need(filled, where, f"a filled field {' or '.join(names)}", [*record])
    return filled[0]


def options(record: dict, where: str, *names: str) -> list[str]:
    """The record's list of choices, which a raw CSV holds as text."""
    choices = field(record, where, *names)
    if isinstance(choices, str):
        with suppress(ValueError, SyntaxError):
            choices = ast.literal_eval(choices.strip())
    need(isinstance(choices, list) and 1 < len(choices) <= len(LETTERS), where, "a list of 2 to 26 choices", choices)
    return [str(choice) for choice in choices]


def choice_problem(record: dict, where: str, domain: str, id: str) -> Problem | None:
    """A record of MMLU-Redux, SuperGPQA or MMLU-Pro as a problem of at most four options; None if it is dropped."""
    question, choices = str(field(record, where, "question")).strip(), options(record, where, "choices", "options")
    answer = field(record, where, "answer_letter", "answer_index", "answer")
    need(gold_letter(answer, len(LETTERS)), where, "an option's letter or its number from 0 as the answer", answer)
    letter = choice_letter({**record, "choices": choices, "answer": answer})
    if letter and len(choices) > 4:
        # Seeded by the question, so that the cut is the same everywhere, whatever else is loaded beside it.
        rng, right = random.Random(ascii(question)), choices[LETTERS.index(letter)]
        wrong = [choice for choice in dict.fromkeys(choices) if choice != right]
        choices = rng.sample(wrong, min(3, len(wrong))) + [right]
        rng.shuffle(choices)
        letter = LETTERS[choices.index(right)]
    return Problem(id, question, letter, domain, choices=tuple(choices)) if letter else None


def by_domain(found: dict[str, Records], source: object, taken: Collection[str] = ()) -> Domains:
    """The usable problems by domain: SuperGPQA's subfield (its field where a subfield has under 100 questions),
    MMLU-Pro's category, else the collection. A name that is `taken` gets "_train" added."""
    sizes = Counter(record.get("subfield") for records in found.values() for _, record in records)
    domains: Domains = {}
    for name, records in found.items():
        for i, (where, record) in enumerate(records):
            topic = record.get("subfield" if sizes[record.get("subfield")] >= 100 else "field")
            topic = str(topic or record.get("category") or record.get("subject") or name)
            domain = re.sub(r"\W+", "_", topic.lower()).strip("_")
            domain += "_train" if domain in taken else ""
            id = f"{name}-{record.get('uuid') or record.get('question_id') or i}"
            if problem := choice_problem(record, where, domain, id):
                domains.setdefault(domain, []).append(problem)
    need(domains, source, "questions in *.jsonl, *.csv, *.parquet or folders that `datasets` saved", [*found])
    return domains


def split_names(names: Iterable[str], split: str) -> list[str]:
    """Domains where the data names no split: of the n sorted names the last n/5, rounded up, are "test".

    >>> names = ["law", "anatomy", "virology"]
    >>> [split_names(names, split) for split in ("train", "test", "all")]
    [['anatomy', 'law'], ['virology'], ['anatomy', 'law', 'virology']]
    >>> split_names(["law"], "train"), split_names(["law"], "test")  # one domain must serve both
    (['law'], ['law'])
    """
    names = sorted(names)
    k = len(names) - math.ceil(len(names) / 5)
    splits = {"train": names[:k] or names, "test": names[k:], "all": names}
    need(split in splits, "domains", "the split 'train', 'test' or 'all'", split)
    return splits[split]


def read_folder(root: Path) -> tuple[Domains, Domains]:
    """Train and test domains of a local copy: JSONL, CSV and parquet files and folders that `datasets` saved, at any
    depth, one per subject or part. Where there are both "train" and "test" folders or files, they are the two; else
    `split_names` decides. "validation" and "dev" hold few-shot examples and are left out, hidden files too."""
    if not root.exists():
        raise FileNotFoundError(f"--data {root} does not exist; give a folder of questions, one file per subject.")
    root, found = root.resolve(), {}  # (part, name) -> paths
    for file in sorted(root.rglob("*")) if root.is_dir() else [root]:
        path = file.parent if file.name == "state.json" else file
        stems = [re.sub(r"-\d+-of-\d+$", "", Path(part).stem) for part in path.relative_to(root.parent).parts]
        skipped = stems[-1] in ("validation", "dev") or any(stem.startswith(".") for stem in stems[1:])
        if skipped or (path == file and file.suffix not in (".jsonl", ".csv", ".parquet")):
            continue
        part = next((stem for stem in stems[1:] if stem in ("train", "test")), "")
        name = path.parent.name if stems[-1] in ("train", "test") else stems[-1].removeprefix("mmlu_")
        found.setdefault((part, name), []).append(path)
    both = {"train", "test"} <= {part for part, _ in found}
    collections: dict[str, dict[str, Records]] = {"train": {}, "test": {}, "": {}}
    for (part, name), paths in found.items():
        group = collections[part if both else ""]
        places = {(path.parent, path.suffix) for path in paths}  # several are the shards of one table
        need(name not in group and len(places) == 1, root, "each subject once", f"{name} again in {paths[-1]}")
        group[name] = [record for path in paths for record in read_records(path)]
    if both:
        test = by_domain(collections["test"], root)
        return by_domain(collections["train"], root, taken=test), test
    domains = by_domain(collections[""], root)
    train, test = ({name: domains[name] for name in split_names(domains, split)} for split in ("train", "test"))
    return train, test


def from_hub(function: str, name: str, *args: str, **kwargs: str) -> Any:
    """What a function of `datasets` returns for a data set of the hub; ConnectionError, one sentence, if it fails."""
    import datasets

    try:
        return getattr(datasets, function)(name, *args, **kwargs)
    except Exception as error:  # offline, moved, gated, half a download: datasets raises a dozen kinds
        remedy = "go online, or download it elsewhere and give that folder with --data FOLDER"
        raise ConnectionError(f"{name} could not be fetched from the hub: {remedy} ({error!r:.200}).") from error


def ask(role: str, instructions: str, problem: Problem, wanted: str) -> list[dict]:
    """The solver's chat, one user message: its role, the editable instructions, the question, what the tags hold."""
    lines = [problem.question, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, problem.choices))]
    form = f"Think briefly, then finish with {wanted} in answer tags: <answer>...</answer>. Only the tags are read."
    content = "\n\n".join([role, instructions, "Question: " + "\n".join(lines), form])
    return [{"role": "user", "content": content.encode("utf-8", "replace").decode()}]  # lone surrogates: see `cut`


def grade_letter(problem: Problem, response: str) -> Grade:
    """Right if the last answer tags hold the one gold letter. The feedback quotes the options, which `Answer` lacks."""
    answer = extract_tag(response, "answer")
    if answer is None:
        return Grade(False, "", NO_TAGS)
    letter, last = read_letter(answer, len(problem.choices)), LETTERS[len(problem.choices) - 1]
    if letter is None:
        return Grade(False, answer, f"The tags must hold one letter from A to {last} and nothing else.")
    said, gold = (problem.choices[LETTERS.index(option)] for option in (letter, problem.gold))
    wrong = f"{letter} is {said!r}; the right option, {problem.gold}, is {gold!r}."
    return Grade(letter == problem.gold, letter, "" if letter == problem.gold else wrong)


class Choice:
    """Multiple choice. Without a path: SuperGPQA to train, MMLU-Redux 2.0 to test, fetched from the hub when first
    needed (the path "TIGER-Lab/MMLU-Pro" trains on that instead). With a path: a local copy, see `read_folder`."""

    name = "mmlu"
    seed_instructions = "Read the question and every option with care, rule out the wrong ones, and choose the best."

    def __init__(self, path: str | Path | None = None) -> None:
        self.hub = str(path or SUPERGPQA)
        if self.hub not in (SUPERGPQA, MMLU_PRO):
            self.train, self.test = read_folder(Path(self.hub).expanduser())

    @cached_property
    def train(self) -> Domains:
        rows = from_hub("load_dataset", self.hub, split="train" if self.hub == SUPERGPQA else "test")
        return by_domain({"hub": numbered(self.hub, rows)}, self.hub, taken=self.test)

    @cached_property
    def test(self) -> Domains:  # one download per subject: `problems` fills them in
        return {subject: [] for subject in from_hub("get_dataset_config_names", REDUX)}

    def domains(self, split: str) -> list[str]:
        """The subjects of "train", "test" or "all"; ValueError for another split."""
        split_names((), split)
        return sorted({*(self.train if split != "test" else ()), *(self.test if split != "train" else ())})

    def problems(self, domain: str) -> list[Problem]:
        """The problems of one subject; ValueError names the subjects if this is none."""
        if domain in self.test and not self.test[domain]:
            rows = from_hub("load_dataset", REDUX, domain, split="test")
            self.test.update(by_domain({domain: numbered(REDUX, rows)}, REDUX))
        group = self.test if domain in self.test else self.train
        need(domain in group, self.name, f"one of the subjects {', '.join({**group, **self.test})}", domain)
        return group[domain]

    def solve_chat(self, instructions: str, problem: Problem) -> list[dict]:
        return ask(f"You answer questions on {problem.domain.replace('_', ' ')}.", instructions, problem, LETTER)

    def grade(self, problem: Problem, response: str) -> Grade:
        return grade_letter(problem, response)

    def edit_chat(self, instructions: str, summary: list[Answer]) -> list[dict]:
        role = f"a model that answers multiple-choice questions of one subject with {LETTER}, in <answer> tags"
        return edit_messages(role, instructions, summary)


# ---------------------------------------------------------------------------------------------------------------------
# Your own problems: a JSONL file
# ---------------------------------------------------------------------------------------------------------------------

# What the answer tags must hold, by grader: the same text (white space aside); a number within `tolerance`; the gold
# letter; a text in which the gold one occurs (in any case).
GRADERS = {"exact": "the answer alone", "number": "the number alone", "choice": LETTER, "contains": "the answer"}


@dataclass(frozen=True)
class OwnProblem(Problem):
    """A problem that brings its grader along. `tolerance` is absolute and for "number"."""

    grader: str = "exact"
    tolerance: Fraction = Fraction(0)


def read_number(text: str) -> Fraction | None:
    """The one number that `text` holds, exactly; None if there is none or more than one.

    >>> [str(read_number(text)) for text in ("42", "-1,234.50 km", "= $5.", "1/3", "6e-2", "3 or 4", "1.2.3", "ten")]
    ['42', '-2469/2', '5', '1/3', '3/50', 'None', 'None', 'None']
    """
    text = text.replace("\N{MINUS SIGN}", "-")
    plain = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
    found = re.search(rf"[-+]?\s*(?:{plain})(?:[eE][-+]?[0-9]{{1,3}}|\s*/\s*[0-9]+)?", text[:400])
    # Any further digit, also "²" or "½", means that more was said than this one number.
    if not found or any(c.isnumeric() for c in text[: found.start()] + text[found.end() :]):
        return None
    try:
        return Fraction(re.sub(r"[\s,]", "", found[0]))
    except (ValueError, ZeroDivisionError):  # 1.5/2, 1/0
        return None


def own_problem(record: dict, where: str, default: str | None, domain: str, id: str) -> OwnProblem:
    """One line of the file as a problem; ValueError with the place and the value if it does not fit its grader."""
    question, answer = str(field(record, where, "question")), field(record, where, "answer")
    need(type(answer) in (str, int, float), where, "text or a number as the answer", answer)
    choices = options(record, where, "choices") if record.get("choices") else []
    usual = "choice" if choices else default or ("exact" if isinstance(answer, str) else "number")
    grader, gold, tolerance = record.get("grader") or usual, str(answer), Fraction(0)
    need(grader in [*GRADERS], where, f"one of the graders {', '.join(GRADERS)}", grader)
    if grader == "choice":
        letters = {gold_letter(answer, len(choices))} | {a for a, c in zip(LETTERS, choices) if c == gold}
        letters.discard(None)
        need(len(letters) == 1, where, f"one of the {len(choices)} choices, its letter or its number from 0", answer)
        gold = letters.pop()
    if grader == "number":
        value, given = read_number(gold), read_number(str(record.get("tolerance", 0)))
        need(value is not None, where, "one number as the answer", answer)
        need(given is not None and given >= 0, where, "a tolerance of 0 or more", record.get("tolerance"))
        # A whole number must be hit exactly, another one to five digits: 0.333333 is meant to be a third.
        tolerance = given if "tolerance" in record or value.denominator == 1 else abs(value) / 10**5
    return OwnProblem(id, question, gold, domain, choices=tuple(choices), grader=grader, tolerance=tolerance)


class Jsonl:
    """Problems of your own: a JSONL file of {"question", "answer"} and, if you like, "domain", "choices", "id",
    "grader" and "tolerance"; or a folder of such files. `grader` serves the lines that neither name one nor have
    choices."""

    name = "jsonl"
    seed_instructions = "Read the question with care and answer exactly what it asks."

    def __init__(self, path: str | Path | None = None, grader: str | None = None) -> None:
        files = sorted(Path(path).glob("*.jsonl")) if path and Path(path).is_dir() else [Path(path or "")]
        if not files or not files[0].is_file():
            raise FileNotFoundError(f'--data must be a file of {{"question": ..., "answer": ...}} lines, not {path}.')
        self.groups: Domains = {}
        places: dict[str, str] = {}
        for file in files:
            for i, (where, record) in enumerate(read_records(file), 1):
                id = f"{file.stem}-{i}" if record.get("id") is None else str(record["id"])
                domain = str(record.get("domain") or file.stem)
                need(places.setdefault(id, where) == where, where, f"an id other than that of {places[id]}", id)
                self.groups.setdefault(domain, []).append(own_problem(record, where, grader, domain, id))

    def domains(self, split: str) -> list[str]:
        """The file's domains; see `split_names`."""
        return split_names(self.groups, split)

    def problems(self, domain: str) -> list[Problem]:
        """The problems of one domain; ValueError names the domains if this is none."""
        need(domain in self.groups, self.name, f"one of the domains {', '.join(self.groups)}", domain)
        return self.groups[domain]

    def solve_chat(self, instructions: str, problem: OwnProblem) -> list[dict]:
        return ask("You answer questions.", instructions, problem, GRADERS[problem.grader])

    def grade(self, problem: OwnProblem, response: str) -> Grade:
        """By the problem's own grader, on what stands in the last answer tags."""
        answer = extract_tag(response, "answer")
        if problem.grader == "choice" or answer is None:
            return grade_letter(problem, response)
        if problem.grader == "number":
            value = read_number(answer)
            right = value is not None and abs(value - read_number(problem.gold)) <= problem.tolerance
            return Grade(right, answer, "" if value is not None else "The tags must hold one number, no other digit.")
        said, gold = " ".join(answer.split()), " ".join(problem.gold.split())
        return Grade(gold.casefold() in said.casefold() if problem.grader == "contains" else gold == said, answer)

    def edit_chat(self, instructions: str, summary: list[Answer]) -> list[dict]:
        return edit_messages("a model that answers questions and ends with <answer> tags", instructions, summary)


# ---------------------------------------------------------------------------------------------------------------------
# Finding a task by its name
# ---------------------------------------------------------------------------------------------------------------------
