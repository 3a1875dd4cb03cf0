"""The tasks: problems, prompts and graders.

A task is an object with the seven members of `Task` below. Five come with this file:

    mini     the miniature: databases with a hidden glossary, for models so small that a laptop trains them
    shop     hidden facts in plain words: a first task for a small pretrained model
    mmlu     multiple choice: MMLU-Redux, SuperGPQA, MMLU-Pro
    jsonl    questions of your own
    bird     text-to-SQL: BIRD and everything in its format

In this order: what a task is, the miniature, the shop, question tasks, text-to-SQL; below the last banner the sandbox
in which SQL of a model runs, and the reading of files. Left out on purpose: models, rewards and trees, the matter of
`lse.py`. This file knows nothing of them and can be copied away alone.

    python -c "import data; print(data.load_task('mini').problems('train000')[0])"
    python -m pytest data.py
"""

import ast
import csv
import difflib
import functools
import importlib.util
import io
import json
import logging
import math
import os
import pickle
import random
import re
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Protocol

import sqlglot
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# What a task is
# ---------------------------------------------------------------------------------------------------------------------
# One problem on its way through the members of a task:
#
#     problems(domain)                   a Problem: question x and gold answer y*
#     solve_chat(instructions, problem)  the solver's prompt; what it samples is the response y
#     grade(problem, response)           a Grade: right or wrong (the paper's r of an answer), what was read, why
#     Answer                             problem, response and grade in one: an element of the summary S
#     edit_chat(instructions, summary)   the editor's prompt; what it samples holds the new instructions


@dataclass(frozen=True)
class Problem:
    """One question of one domain. Only the first three fields are needed; the others serve some tasks.

    Frozen, here and below: a problem is shared by every tree and round, and nobody may change it under the others.
    """

    id: str
    question: str
    gold: str  # the right answer as the grader reads it: SQL, a letter, a number, a text
    domain: str = ""
    split: str = ""  # "pool", "holdout" or "test" where the task says so, else evolve.py draws the splits
    evidence: str = ""  # BIRD's hint, shown before the question
    choices: tuple[str, ...] = ()  # multiple choice: the options, in order
    grader: str = "choice"  # question tasks: one of GRADERS
    tolerance: float = 0.0  # absolute, for the grader "number"


@dataclass(frozen=True)
class Grade:
    """The verdict on one response, r = R(x, y), and its reason.

    Three things that are easily taken for one: wrong, unreadable (wrong too, but it is the form that failed), lenient
    (graded on what it says, though not in the form that was asked for).
    """

    correct: bool
    answer: str  # what the grader took as the answer
    feedback: str = ""  # one line for the editor on what went wrong
    readable: bool = True  # False: nothing to take as an answer (no closed tags, no query, no letter, ...)
    lenient: bool = False  # the answer stands where it was not asked for: without the tags, say


@dataclass(frozen=True)
class Answer:
    """One graded answer, flat and ready for JSON: an element (x, y, y*, r) of the paper's summary S."""

    id: str
    question: str
    response: str  # all that the solver wrote
    answer: str  # what the grader took of it
    gold: str
    correct: bool
    feedback: str = ""
    truncated: bool = False  # the response was cut off at the token limit
    readable: bool = True
    lenient: bool = False  # see Grade


Summary = list[Answer]  # S: the k graded problems that the editor sees
Chat = list[dict[str, str]]  # [{"role": "user", "content": "..."}, ...]


class Task(Protocol):
    """What evolve.py and train.py ask of a task. Write a class with these members; there is nothing to inherit.

    Three more members are optional:
        grade_many(pairs, progress="")    the list of `grade(problem, response)` for all pairs, where there is a faster
                                          way than one by one; `progress` is the title of its progress bar
        read_edit(text), or               the new instructions in an editor's text, None if there are none; without this
        read_edit(text, cut)              member they are what stands between <prompt> and </prompt>. A reader that
                                          takes `cut` is told whether the text was cut off at the token limit.
        perfect_instructions(domain)      instructions with all that can be known of a domain: how they score shows,
                                          before a run begins, whether edits have anything to reach
    """

    name: str  # a short word for folders and logs
    seed_instructions: str  # the editable field before the first edit

    def domains(self, split: str) -> list[str]:
        """The names of the domains of a split: "train", "test" or "all". (Mini and Shop have "dev", too.)"""

    def problems(self, domain: str) -> list[Problem]:
        """All problems of a domain, that is of one database or one subject."""

    def solve_chat(self, instructions: str, problem: Problem) -> Chat:
        """The chat that the frozen solver answers: the question x under the context c."""

    def grade(self, problem: Problem, response: str) -> Grade:
        """Is the response right, and why: R(x, y)."""

    def edit_chat(self, instructions: str, summary: Summary) -> Chat:
        """The chat that the editor answers with new instructions: (c_0, S) -> c_1."""


def extract_tag(text: str, tag: str) -> str | None:
    """The content of the last closed, innermost `<tag>...</tag>`, stripped; None if there is none.

    Tag names match in any case. An unclosed tag counts for nothing: a response cut off at the token limit is invalid.

    >>> extract_tag("<think> <answer>A</answer>? </think> <ANSWER> B </ANSWER>", "answer")
    'B'
    >>> extract_tag("<answer> never closed", "answer") is None
    True
    """
    # The last and the innermost: a model that thinks aloud quotes the tags before it means them.
    name = re.escape(tag)
    content = rf"(?:(?!</?{name}>).)*"  # any text in which no tag of this name opens or closes
    found = re.findall(rf"<{name}>({content})</{name}>", text, re.DOTALL | re.IGNORECASE | re.ASCII)
    if not found:
        return None
    return found[-1].strip()


# ---------------------------------------------------------------------------------------------------------------------
# The miniature: databases with a hidden glossary
# ---------------------------------------------------------------------------------------------------------------------
# BIRD, very small. A domain is a real SQLite table with columns c0..c7; its users ask for "profit" or "rank", and only
# a hidden glossary says which column that is. What instructions can carry is exactly this knowledge: lines of "word
# column". The seed instructions are empty, so the solver starts at zero, and every point is an edit's doing.
#
#     instructions   profit c5            after two edits, say
#                    rank c1
#     question       total profit         or: item 3 rank, that is the rank in the row with id 3
#     response       profit c5 <answer> SELECT SUM ( c5 ) FROM t </answer>
#     summary        question total profit gold SELECT SUM ( c5 ) FROM t answer SELECT SUM ( c1 ) FROM t wrong

# What users may ask for; 8 of these words have a meaning in a domain.
WORDS = ("profit rank price stock margin weight age rating cost score sales tax "
         "height volume speed quota debt bonus salary budget growth income loss share").split()
COLUMNS = [f"c{i}" for i in range(8)]  # of the table t, beside `id`
ROWS = range(1, 17)  # values of the column `id`
QUESTIONS = {"total": "SUM", "highest": "MAX", "lowest": "MIN"}  # kind of question -> function of SQL


def mini_sql(question: str, column: str) -> str:
    """The SQL for a question of the miniature. Tokens are separated by spaces: its tokenizer is word-level.

    >>> mini_sql("item 3 profit", "c5"), mini_sql("total profit", "c5")
    ('SELECT c5 FROM t WHERE id = 3', 'SELECT SUM ( c5 ) FROM t')
    """
    kind, item, *_ = question.split()
    if kind == "item":
        return f"SELECT {column} FROM t WHERE id = {item}"
    return f"SELECT {QUESTIONS[kind]} ( {column} ) FROM t"


def read_glossary(text: str) -> dict[str, str]:
    """Pairs "word column" found in any text, in order; the last line about a word wins. What is no pair is passed over.

    >>> read_glossary("profit c5 rank c1 nonsense profit c2")
    {'profit': 'c2', 'rank': 'c1'}
    """
    glossary = {}
    tokens = text.split()
    for word, column in zip(tokens, tokens[1:]):
        if word in WORDS and column in COLUMNS:
            glossary[word] = column
    return glossary


def glossary_text(glossary: dict[str, str]) -> str:
    """A glossary as instructions: one line "word column" per word."""
    return "\n".join(f"{word} {column}" for word, column in glossary.items())


def mini_chat(system: str, *turns: str) -> Chat:
    """A chat of one system message and any turns, of the user and the assistant in turn."""
    chat = [{"role": "system", "content": system}]
    for i, text in enumerate(turns):
        role = "user" if i % 2 == 0 else "assistant"
        chat.append({"role": role, "content": text})
    return chat


def numbered_names(sizes: dict[str, int], split: str) -> list[str]:
    """The domains of a generated task, `sizes[split]` for each split.

    >>> numbered_names({"train": 2, "test": 1}, "all")
    ['train000', 'train001', 'test000']
    """
    splits = list(sizes) if split == "all" else [split]
    names = []
    for prefix in splits:
        for i in range(sizes[prefix]):
            names.append(f"{prefix}{i:03d}")
    return names


class Mini:
    """The miniature task. A domain's name is the seed of all that is in it, so it is the same on every machine."""

    name = "mini"
    seed_instructions = ""

    def __init__(self, train: int = 24, test: int = 32, dev: int = 16):
        """The numbers of domains. "dev" is for tuning: never trained on, never reported."""
        self.sizes = {"train": train, "test": test, "dev": dev}

    def domains(self, split: str = "all") -> list[str]:
        """The domains of "train", "test", "dev" or "all"."""
        return numbered_names(self.sizes, split)

    def glossary(self, domain: str) -> dict[str, str]:
        """The hidden truth of a domain: 8 of 24 words, each meaning one column."""
        # Words and columns drawn apart, so nothing in a word tells its column: only answers of the domain do.
        rng = random.Random(domain)
        words = rng.sample(WORDS, 8)
        columns = rng.sample(COLUMNS, 8)
        return dict(zip(words, columns))

    def perfect_instructions(self, domain: str) -> str:
        """The whole glossary: what the solver makes of it is the most that edits can reach."""
        return glossary_text(self.glossary(domain))

    def problems(self, domain: str) -> list[Problem]:
        """19 questions about each of 8 words: 2 in the holdout (--holdout 8 takes one), 4 in test, 13 in the pool."""
        rng = random.Random(domain)
        glossary = self.glossary(domain)
        kinds = [f"item {row}" for row in ROWS] + list(QUESTIONS)
        shuffled = {word: rng.sample(kinds, len(kinds)) for word in glossary}  # each has its own order
        splits = ["holdout"] * 2 + ["test"] * 4 + ["pool"] * 13
        problems = []
        for i, split in enumerate(splits):
            # Pool and holdout share words and never a question: new instructions must carry over to be worth anything.
            for word, column in glossary.items():  # inside: the first 8 of any split ask for every word once
                question = f"{shuffled[word][i]} {word}"
                gold = mini_sql(question, column)
                problems.append(Problem(f"{domain}/{question}", question, gold, domain, split))
        return problems

    def solve_chat(self, instructions: str, problem: Problem) -> Chat:
        """The instructions and, behind them, the question.

        The word asked for is the last token before the answer, which restates it: that is what lets a three-layer
        model learn to look it up: to copy what followed the same word earlier (an induction head).
        """
        return mini_chat("solve", f"{instructions} {problem.question}")

    def grade(self, problem: Problem, response: str) -> Grade:
        """Right if the SQL in the answer tags returns the rows of the gold SQL."""
        sql = extract_tag(response, "answer")
        # For a word that it does not know the solver writes SELECT and that word, which is an error: luck earns
        # nothing.
        if not sql:
            return Grade(False, "", "SQL error", readable=False)
        rows = self.rows(problem.domain, sql)
        if rows is None:
            return Grade(False, sql, "SQL error")
        if rows != self.rows(problem.domain, problem.gold):
            return Grade(False, sql, "wrong result")
        return Grade(True, sql)

    def edit_chat(self, instructions: str, summary: Summary) -> Chat:
        """The old instructions and, behind them, each graded problem in one line."""
        parts = [instructions]
        for a in summary:
            verdict = "correct" if a.correct else "wrong"
            parts.append(f"question {a.question} gold {a.gold} answer {a.answer} {verdict}")
        return mini_chat("edit", " ".join(parts))

    def read_edit(self, text: str) -> str | None:
        """New instructions as they are stored: one line per word. None if the tags are missing or hold no entry."""
        inside = extract_tag(text, "prompt") or ""
        return glossary_text(read_glossary(inside)) or None

    @staticmethod
    @functools.cache
    def rows(domain: str, sql: str) -> list | None:
        """The result of one query on the domain's database, None on any error."""
        try:
            return mini_database(domain).execute(sql).fetchall()
        except (sqlite3.Error, sqlite3.Warning, ValueError):  # ValueError: a NUL or a lone surrogate
            return None


@functools.cache
def mini_database(domain: str) -> sqlite3.Connection:
    """The table of a domain, in memory. SQL that a model wrote may read, and call three functions, nothing else.

    There are columns c0..c7 and 16 rows of numbers below 1000, so that a wrong column gives a wrong answer.
    """
    rng = random.Random(domain)
    database = sqlite3.connect(":memory:", check_same_thread=False)
    database.execute(f"CREATE TABLE t (id, {', '.join(COLUMNS)})")
    for row in ROWS:
        values = rng.choices(range(1000), k=8)
        database.execute("INSERT INTO t VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (row, *values))
    database.set_authorizer(authorizer(lambda name: name.upper() in QUESTIONS.values(), recursive=False))
    database.set_progress_handler(lambda: 1, 100_000)  # any query that takes longer is aborted
    return database


# ---------------------------------------------------------------------------------------------------------------------
# The shop: hidden facts in plain words, for small models that have read
# ---------------------------------------------------------------------------------------------------------------------
# The miniature's twin in natural language, for real models from 135 million parameters on. A domain is a shop. Six
# facts about it, of six kinds, are drawn from its name, and no model can know them. Customers ask in plain words:
#
#     instructions   The manager is Clara.            after an edit, say
#                    The door is green.
#     question       Which colour is the door?
#     response       The door is green.
#     summary        Which colour is the door? green
#
# As in the miniature the seed instructions are empty, and but for a lucky guess (a cat, a blue door) every point is an
# edit's doing.


@dataclass(frozen=True)
class Fact:
    """One kind of fact: what it may be, how notes say it, and how customers ask for it."""

    values: tuple[str, ...]  # single words
    sentence: str  # with {} for the value
    questions: tuple[str, ...]  # six ways to ask


FACTS = {
    "manager": Fact(
        ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "Jack"),
        "The manager is {}.",
        (
            "Who is the manager?",
            "What is the name of the manager?",
            "Who manages the shop?",
            "Who is the manager of the shop?",
            "How is the manager called?",
            "What is the manager's name?",
        ),
    ),
    "city": Fact(
        ("Oslo", "Lima", "Cairo", "Paris", "Tokyo", "Delhi", "Rome", "Berlin", "Madrid", "Dublin"),
        "The shop is in {}.",
        (
            "In which city is the shop?",
            "Where is the shop?",
            "What city is the shop in?",
            "In what city is the shop?",
            "Which city is the shop in?",
            "Where can I find the shop?",
        ),
    ),
    "door": Fact(
        ("red", "blue", "green", "yellow", "purple", "orange", "pink", "brown", "black", "white"),
        "The door is {}.",
        (
            "What colour is the door?",
            "Which colour does the door have?",
            "What is the colour of the door?",
            "Which colour is the door?",
            "What colour is the door of the shop?",
            "What is the door's colour?",
        ),
    ),
    "pet": Fact(
        ("cat", "dog", "parrot", "rabbit", "turtle", "goat", "snake", "monkey", "horse", "frog"),
        "The pet is a {}.",
        (
            "What is the pet?",
            "Which animal is the pet?",
            "Which pet does the shop have?",
            "What pet does the shop have?",
            "What animal is the pet of the shop?",
            "What kind of animal is the pet?",
        ),
    ),
    "day": Fact(
        ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
        "The shop is closed on {}.",
        (
            "On which day is it closed?",
            "When is the shop closed?",
            "Which day is it closed?",
            "On what day of the week is the shop closed?",
            "On which day is the shop closed?",
            "What day is the shop closed?",
        ),
    ),
    "product": Fact(
        ("shoes", "books", "lamps", "hats", "cakes", "coats", "toys", "clocks", "chairs", "knives"),
        "The shop sells {}.",
        (
            "What does the shop sell?",
            "What does it sell?",
            "Which product does it sell?",
            "What is sold in the shop?",
            "What is sold there?",
            "Which things does the shop sell?",
        ),
    ),
}

# The editor's one example is about a lake: other kinds of facts, which answer no question on a shop.
LAKE_QUESTIONS = "- How long is the lake? nine miles\n- What is the name of the bridge? Long Bridge"
LAKE_BEFORE = "The lake is forty metres deep."
LAKE_AFTER = f"{LAKE_BEFORE}\nThe lake is nine miles long.\nThe bridge is named Long Bridge."


class Shop:
    """The task "shop". A domain's name is the seed of all that is in it, so it is the same on every machine."""

    name = "shop"
    seed_instructions = ""

    def __init__(self, train: int = 12, test: int = 32, dev: int = 16) -> None:
        """The numbers of domains. "dev" is for tuning: never trained on, never reported."""
        self.sizes = {"train": train, "test": test, "dev": dev}

    def domains(self, split: str = "all") -> list[str]:
        """The domains of "train", "test", "dev" or "all"."""
        return numbered_names(self.sizes, split)

    def facts(self, domain: str) -> dict[str, str]:
        """The hidden truth of a domain: the value of each kind of fact."""
        # "shop/" keeps these draws apart from those of the miniature, whose domains have the same names.
        rng = random.Random(f"shop/{domain}")
        return {kind: rng.choice(fact.values) for kind, fact in FACTS.items()}

    def problems(self, domain: str) -> list[Problem]:
        """Six questions for each of six facts: one in the holdout, two in the test split, three in the pool."""
        rng = random.Random(f"shop/{domain}/questions")
        shuffled = {kind: rng.sample(fact.questions, 6) for kind, fact in FACTS.items()}
        splits = ["holdout"] + ["test"] * 2 + ["pool"] * 3
        problems = []
        for i, split in enumerate(splits):
            for kind, value in self.facts(domain).items():  # inside: any six in a row ask for all facts
                identifier = f"{domain}/{kind}/{i}"
                problems.append(Problem(identifier, shuffled[kind][i], value, domain, split))
        return problems

    def perfect_instructions(self, domain: str) -> str:
        """All that there is to know of a domain: what the solver makes of it is the most that edits can reach."""
        return "\n".join(FACTS[kind].sentence.format(value) for kind, value in self.facts(domain).items())

    def solve_chat(self, instructions: str, problem: Problem) -> Chat:
        """One user message: the instructions and, behind them, the question."""
        content = f"""These are notes on a shop:

{instructions}

Question: {problem.question}
Answer from the notes in one short sentence."""
        return [{"role": "user", "content": content}]

    def grade(self, problem: Problem, response: str) -> Grade:
        """Right if the first line holds the gold word and no other value of that fact: naming them all is no answer."""
        said = first_line(response)
        if not said:
            return Grade(False, "", "There is no answer.", readable=False)
        # By whole words and not by substrings: "cats" is no "cat".
        words = set(re.findall(r"\w+", said.casefold()))
        kind = problem.id.split("/")[1]
        named = [value for value in FACTS[kind].values if value.casefold() in words]
        if named == [problem.gold]:
            return Grade(True, said)
        return Grade(False, said, said_and_right(said, problem.gold))

    def edit_chat(self, instructions: str, summary: Summary) -> Chat:
        """The example as a turn that has been, then the old instructions and each question with its gold answer.

        What the solver said is not shown: short prompts are all that such small models can use.
        """
        questions = "\n".join(f"- {a.question} {a.gold}" for a in summary)
        return [
            {"role": "user", "content": shop_request(LAKE_BEFORE, LAKE_QUESTIONS)},
            {"role": "assistant", "content": LAKE_AFTER},
            {"role": "user", "content": shop_request(instructions, questions)},
        ]

    def read_edit(self, text: str, cut: bool = False) -> str | None:
        """New instructions as they are stored: each line once, those of the example left out. None if nothing is left.

        An edit that was cut off is not used: half a sentence is worse than none, and it would be rewarded to ramble.
        """
        if cut:
            return None
        lines = dict.fromkeys(line.strip() for line in text.split("\n"))
        kept = [line for line in lines if line and line not in LAKE_AFTER.split("\n")]
        return "\n".join(kept) or None


def shop_request(notes: str, questions: str) -> str:
    """What the editor of shops is asked."""
    return f"""Notes:
{notes or "(none)"}

Questions and right answers:
{questions}

Write the new notes: keep what is known and add what the answers tell."""


def first_line(text: str) -> str:
    """The first line of a text that is not empty, stripped; "" if there is none."""
    return text.strip().partition("\n")[0].strip()


def said_and_right(said: str, gold: str) -> str:
    """The feedback on a wrong text: what was said, and what is right."""
    return f"The answer was {shorten(said, 200)!r}; right is {shorten(gold, 200)!r}."


# ---------------------------------------------------------------------------------------------------------------------
# A task by its name, and the editor's chat that all but the miniature share
# ---------------------------------------------------------------------------------------------------------------------


def load_task(name: str, path: str | Path | None = None) -> Task:
    """The task of that name, or of a class of your own: FILE.py:CLASS.

    `path` is the data: "bird" and "jsonl" need one, "mmlu" downloads its questions without. ValueError for an unknown
    name or a missing path; the tasks say what else may be wrong with their data.

    >>> load_task("mini").domains("train")[:2]
    ['train000', 'train001']
    """
    if ".py:" in name:
        return own_task(name, path)
    if name == "mini":
        return Mini()
    if name == "shop":
        return Shop()
    if name == "mmlu":
        return Questions(name, path)
    if name not in ("bird", "jsonl"):
        advice = "choose mini, shop, bird, mmlu, jsonl, or FILE.py:CLASS, a class of your own"
        raise ValueError(f"No task {name!r}; {advice}.")
    if path is None:
        remedy = BIRD_REMEDY if name == "bird" else "a JSONL file"
        raise ValueError(f"Task {name!r} needs --data: {remedy}.")
    if name == "bird":
        return Bird(path)
    return Questions(name, path)


# What a Task must have.
MEMBERS = ("name", "seed_instructions", "domains", "problems", "solve_chat", "grade", "edit_chat")


def own_task(name: str, path: str | Path | None) -> Task:
    """An object of the class that FILE.py:CLASS names, made with the path as its argument if there is one.

    FileNotFoundError without the file; ValueError names the class or the members of `Task` that are missing.
    """
    place, _, class_name = name.rpartition(":")
    file = Path(place).resolve()
    if not file.exists():
        raise FileNotFoundError(f"--task {name}: there is no file {file}.")
    # The user's own code, run as an import would run it.
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as an import would, for the dataclasses in it
    spec.loader.exec_module(module)
    own = getattr(module, class_name, None)
    if not isinstance(own, type):
        found = [word for word, value in vars(module).items() if isinstance(value, type)]
        raise ValueError(f"--task {name}: no class {class_name!r}, there is {', '.join(found) or 'none'}.")
    if own.__init__ is Questions.__init__:  # which asks for a name first, and would download without a path
        if path is None:
            raise ValueError(f"Task {name!r} needs --data: a JSONL file.")
        task = own(class_name, path)
    elif path is None:
        task = own()
    else:
        task = own(path)
    # Whether it has all members is asked now: a task that lacks `edit_chat` would fail in the first round only.
    missing = [member for member in MEMBERS if not hasattr(task, member)]
    if missing:
        raise ValueError(f"--task {name}: {class_name} lacks {', '.join(missing)}; see Task in data.py.")
    return task


def edit_messages(
    role: str, instructions: str, summary: Summary, budget: int = 1500, reasoning: bool = False
) -> Chat:
    """The editor reads (c, S) and writes c'. One user message; a system message would be refused by some templates.

    `role` ends "You improve the instructions of ..." and says what the solver does. Each field of a problem is
    shortened to `budget` characters and the old instructions to four times that: k problems take about
    (4 + 5k) * budget characters at most. `reasoning` adds the solver's full text.

    >>> chat = edit_messages("a solver", "Add.", [Answer("1", "1+1?", "<answer>3</answer>", "3", "2", False)])
    >>> print(chat[0]["content"][:40])
    You improve the instructions of a solver
    """
    # Right answers are shown as well as wrong ones: what works is to be kept.
    right = sum(answer.correct for answer in summary)
    problems = ""
    for number, answer in enumerate(summary, 1):
        problems += f"## Problem {number}\n" + shown_answer(answer, budget, reasoning)
    # In prompts, here and below, a backslash at the end of a line joins it to the next.
    content = f"""You improve the instructions of {role}. The model itself never changes; its instructions do.

# Current instructions
{shorten(instructions, 4 * budget)}

# What the model did under them: {right} of {len(summary)} right
{problems}
# Your task
Work out why the wrong answers are wrong and what the right ones got right. \
Then write the full new instructions: they
replace the old ones and will be judged on other questions of the same domain. \
Keep what works, add the rules and facts
of this domain that these problems reveal, name likely mistakes, and do not merely repeat the questions above.
Write them in tags, as in this example from another domain; only what stands in the tags counts:
<prompt>
Give every name in full and every date as day, month, year. Where a report says "net", it means after tax.
</prompt>"""
    return [{"role": "user", "content": content}]


def shown_answer(answer: Answer, budget: int, reasoning: bool) -> str:
    """One graded problem as the editor sees it: "field: content" for each field that is not empty.

    >>> print(shown_answer(Answer("1", "1+1?", "", "3", "2", False), 1500, False), end="")
    Question: 1+1?
    Answer: 3
    Right answer: 2
    Verdict: WRONG
    """
    verdict = "right" if answer.correct else "WRONG"
    if answer.truncated and not answer.correct:
        verdict = "WRONG, cut off at the token limit"
    fields = [("Question", answer.question)]
    if reasoning:
        fields.append(("Full response", answer.response))
    fields.append(("Answer", answer.answer or "(none)"))
    fields.append(("Right answer", answer.gold))
    fields.append(("Verdict", verdict))
    fields.append(("Feedback", answer.feedback))
    return "".join(f"{name}: {shorten(text, budget)}\n" for name, text in fields if text)


def shorten(text: str, limit: int) -> str:
    """`text` if it has at most `limit` characters, else its head and tail around a note that says so, `limit` in all.

    >>> shorten("SELECT " + "x, " * 40 + "y FROM t", 60)
    'SELECT x, x, x, x,[... cut from 135 characters ...] y FROM t'
    """
    if len(text) <= limit:
        return text
    # Head and tail, since a query ends in its conditions and an answer in its result; the note, so that nobody takes it
    # for whole.
    note = f"[... cut from {len(text)} characters ...]"
    keep = max(0, limit - len(note))
    tail = keep // 3
    head = keep - tail
    shortened = text[:head] + note + text[len(text) - tail :]
    return shortened[:limit]  # where not even the note has room


# ---------------------------------------------------------------------------------------------------------------------
# Question tasks: MMLU-Redux, SuperGPQA, MMLU-Pro and your own
# ---------------------------------------------------------------------------------------------------------------------
# From a file to a grade:
#     read_folder, from_hub          a JSONL or CSV file, a folder that `datasets` saved, the hub -> records: flat dicts
#                                    with the fields as published, in one form (see `read_records`, below the banner)
#     choice_problem, own_problem    a record -> a problem: of the published data sets, of your own file
#     by_domain                      problems -> domains
#     grade_choice, grade_number     what stands in the answer tags -> a grade

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
REDUX = "edinburgh-dawg/mmlu-redux-2.0"  # these three are names on the hub
SUPERGPQA = "m-a-p/SuperGPQA"
MMLU_PRO = "TIGER-Lab/MMLU-Pro"
GRADERS = {  # what the answer tags must hold, as the prompt says it
    "choice": "one letter",  # the letter of the gold option
    "exact": "the answer alone",  # the gold text; white space may differ
    "number": "the number alone",  # a number within `tolerance` of the gold one
    "contains": "the answer",  # a text in which the gold one occurs, in any case
}
# The tags, filled: a small model copies what stands in a prompt's tags, so that must be an answer.
FILLED = {
    "choice": "<answer>{}</answer>",  # the letter behind the last option's: to copy it wins nothing
    "exact": "<answer>Lake Geneva</answer>",
    "number": "<answer>-7.25</answer>",
    "contains": "<answer>Lake Geneva</answer>",
}


class Questions:
    """The tasks "mmlu", multiple choice, and "jsonl", problems of your own (see `own_problem`).

    `path` is a file or folder, see `read_folder`. It may have a part to train and a part to test. Unless it has both,
    the last fifth of the sorted domains, rounded up, is for testing; a single domain serves both. A domain of both
    parts is called "..._train" in training.
    "mmlu" without a path trains on SuperGPQA, with the path "TIGER-Lab/MMLU-Pro" on that, and tests on MMLU-Redux, from
    the hub. FileNotFoundError if there is no question, ValueError if a file holds something else.
    """

    seed_instructions = (
        "Read the question with care, rule out what cannot be right, and answer exactly what is asked."
    )

    def __init__(self, name: str, path: str | Path | None = None) -> None:
        self.name = name
        source = str(path or SUPERGPQA)
        if source in (SUPERGPQA, MMLU_PRO):
            train_records = from_hub(source)
            test_records = from_hub(REDUX)
        else:
            train_records, test_records = read_folder(source)
        # Training and testing come from different data sets or parts where there are some: what is learned must carry
        # over.
        make = choice_problem if name == "mmlu" else own_problem
        train = by_domain(train_records, make)
        self.test = by_domain(test_records, make)  # domain -> its problems
        self.groups = dict(self.test)  # domain -> its problems
        for domain, problems in train.items():
            if domain in self.test:
                domain += "_train"
            self.groups[domain] = problems
        if not self.groups:
            kinds = ".jsonl or .csv files or saved `datasets`"
            raise FileNotFoundError(f"{source} holds no usable question in {kinds}.")

    def domains(self, split: str) -> list[str]:
        """The sorted domains of "train", "test" or "all"."""
        return split_names(self.groups, split, self.test)

    def problems(self, domain: str) -> list[Problem]:
        """The problems of one domain; ValueError names the domains if this is none."""
        if domain not in self.groups:
            raise data_error(self.name, f"one of the domains {', '.join(sorted(self.groups))}", domain)
        return self.groups[domain]

    def solve_chat(self, instructions: str, problem: Problem) -> Chat:
        """One user message: its role, the editable instructions, the question, what the tags must hold."""
        example = FILLED[problem.grader].format(LETTERS[len(problem.choices) % 26])
        content = f"""You answer questions on {problem.domain.replace('_', ' ')}.

{instructions}

Question: {question_text(problem)}

Think briefly, then end with {GRADERS[problem.grader]} in tags, as in {example}."""
        return [{"role": "user", "content": content}]

    def grade(self, problem: Problem, response: str) -> Grade:
        """By the problem's own grader, on what stands in the last answer tags; without tags see `untagged_answer`."""
        answer = extract_tag(response, "answer")
        if answer is not None:
            return grade_answer(problem, answer)
        answer = untagged_answer(problem, response)
        if answer is None:
            return Grade(False, "", "There is no closed pair of <answer> tags.", readable=False)
        grade = grade_answer(problem, answer)
        return replace(grade, lenient=grade.readable)

    def edit_chat(self, instructions: str, summary: Summary) -> Chat:
        """See `edit_messages`."""
        role = "a model that answers questions, by a letter if it has options"
        return edit_messages(role, instructions, summary)


def question_text(problem: Problem) -> str:
    """The question with its options, as the solver reads it, and the editor: a letter alone would tell it nothing.

    >>> print(question_text(Problem("1", "Which?", "B", choices=("x", "y"))))
    Which?
    A. x
    B. y
    """
    lines = [problem.question]
    for letter, choice in zip(LETTERS, problem.choices):
        lines.append(f"{letter}. {choice}")
    return "\n".join(lines)


def grade_answer(problem: Problem, answer: str) -> Grade:
    """The verdict on an answer, by the problem's grader."""
    if problem.grader == "choice":
        return grade_choice(problem, answer)
    if problem.grader == "number":
        return grade_number(problem, answer)
    said = " ".join(answer.split())
    gold = " ".join(problem.gold.split())
    correct = said == gold
    if problem.grader == "contains":
        correct = gold.casefold() in said.casefold()
    feedback = "" if correct else said_and_right(said, gold)
    return Grade(correct, answer, feedback, readable=said != "")


def untagged_answer(problem: Problem, response: str) -> str | None:
    """What a response without closed tags says: its first line, of a choice the letter that this begins with.

    None where that is no answer: a line that begins with "<" is an open tag or a reasoning model's thinking, and lines
    that begin with several letters are the list of the options.

    >>> choice = Problem("1", "Which?", "B", choices=("x", "y"))
    >>> [untagged_answer(choice, text) for text in ("B. Functional", "(b) y", "B", "A cat", "E. z", "A. x\\nB. y")]
    ['B', 'B', 'B', None, None, None]
    """
    line = first_line(response)
    if not line or line.startswith("<"):
        return None
    if problem.grader != "choice":
        return line
    if read_letter(line, len(problem.choices)):
        return read_letter(line, len(problem.choices))
    # The letters at the beginnings of lines: one is an answer, several are the options copied.
    letters = re.findall(r"^\s*[(\[*]*([A-Za-z])[.):\]*]", response, re.MULTILINE)
    said = {gold_letter(letter, len(problem.choices)) for letter in letters}
    if len(said) != 1 or not re.match(r"[(\[*]*[A-Za-z][.):\]*]", line):
        return None
    return said.pop()


def grade_choice(problem: Problem, answer: str) -> Grade:
    """Right if `answer` says the letter of the gold option, and no other."""
    letter = read_letter(answer, len(problem.choices))
    if letter is None:
        feedback = "The tags must hold the letter of one option and nothing else."
        return Grade(False, answer, feedback, readable=False)
    if letter == problem.gold:
        return Grade(True, letter)
    options = dict(zip(LETTERS, problem.choices))
    said = f"{letter} is {options[letter]!r}"
    return Grade(False, letter, f"{said}; the right option, {problem.gold}, is {options[problem.gold]!r}.")


def grade_number(problem: Problem, answer: str) -> Grade:
    """Right if `answer` holds one number, and that is within the problem's tolerance of the gold one."""
    value = read_number(answer)
    if value is None:
        return Grade(False, answer, "The tags must hold one number, no other digit.", readable=False)
    gold = read_number(problem.gold)
    slack = problem.tolerance + 1e-9 * abs(gold)  # the last digits of floats: 0.1 + 0.2 is not quite 0.3
    if abs(value - gold) <= slack:
        return Grade(True, answer)
    return Grade(False, answer, said_and_right(answer, problem.gold))


def read_letter(text: str, n: int) -> str | None:
    """The one letter that `text` says, in upper case, if it is among the first `n`; None for anything else.

    >>> [read_letter(text, 4) for text in ("b", "B.", "(B)", "**B**", "A or B", "B. Paris", "E", "")]
    ['B', 'B', 'B', 'B', None, None, None, None]
    """
    # Only harmless punctuation may stand around the letter: "≠B", "¬B" and "-B" do not say B.
    around = r"""[\s.,:;()\[\]{}*_`'"$]*"""
    found = re.fullmatch(f"{around}([A-Za-z]){around}", text)
    if not found:
        return None
    return gold_letter(found[1], n)


def read_number(text: str) -> float | None:
    """The one number that `text` holds; None if there is none, more than one, or one too large for a float.

    >>> [read_number(text) for text in ("42", "-1,234.50 km", "= $5.", "1/4", "6e-2", "3 or 4", "1.2.3", "ten")]
    [42.0, -1234.5, 5.0, 0.25, 0.06, None, None, None]
    """
    text = text.replace("\N{MINUS SIGN}", "-")
    digits = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"  # 1234 or 1,234
    plain = rf"(?:{digits}(?:\.[0-9]*)?|\.[0-9]+)"  # 12 or 12.5 or .5
    numerator = rf"((?:[-+]\s*)?{plain}(?:[eE][-+]?[0-9]+)?)"
    denominator = r"(?:\s*/\s*([1-9][0-9]*))?"
    found = re.search(numerator + denominator, text)
    if not found:
        return None
    rest = text[: found.start()] + text[found.end() :]
    if any(character.isnumeric() for character in rest):
        return None  # a further digit, also "²" or "½": more was said than this one number
    value = float(re.sub(r"[\s,]", "", found[1]))
    if found[2]:
        value /= float(found[2])
    if not math.isfinite(value):
        return None
    return value


def gold_letter(value: object, n: int) -> str | None:
    """A published answer, the letter of one of `n` options or its number from 0, as a letter; None if it is neither.

    >>> [gold_letter(value, 4) for value in (1, "1", " b ", "B", 1.0, 4, "E", "1, 3", None, "")]
    ['B', 'B', 'B', 'B', 'B', None, None, None, None, None]
    """
    text = str(value).strip().upper()
    text = text.removesuffix(".0")  # a numeric column with gaps comes back as floats
    for i, letter in enumerate(LETTERS[:n]):
        if text in (letter, str(i)):
            return letter
    return None


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
    error_type = str(record.get("error_type")).lower()
    if re.sub("[^a-z]", "", error_type) == "nocorrectanswer":
        return None
    choices = record.get("choices") or []
    n = 4 if isinstance(choices, str) else len(choices)  # the raw CSV has the list as text
    corrected = gold_letter(record.get("correct_answer"), 4)
    return gold_letter(corrected or record.get("answer"), n)


def choice_problem(record: dict) -> Problem | None:
    """A record of MMLU-Redux, SuperGPQA or MMLU-Pro as a problem of at most four options; None if it is dropped."""
    answer = record["answer"]
    choices = record["choices"]
    if not choices or not gold_letter(answer, 26):
        raise data_error(record["where"], "choices, and a letter or a number from 0", (answer, choices))
    letter = choice_letter(record)
    if not letter:
        return None
    if len(choices) > 4:
        # Seeded by the question: the same four remain everywhere, whatever else is loaded beside it.
        rng = random.Random(ascii(record["question"]))
        right = choices[LETTERS.index(letter)]
        wrong = [choice for choice in dict.fromkeys(choices) if choice != right]
        # Four options as in MMLU, and the right one at a place drawn anew: its old letter says nothing.
        choices = rng.sample(wrong, min(3, len(wrong))) + [right]
        rng.shuffle(choices)
        letter = LETTERS[choices.index(right)]
    return Problem(record["id"], record["question"], letter, record["domain"], choices=tuple(choices))


OPTIONAL_COLUMNS = ("choices", "options", "domain", "tolerance")


@functools.cache
def misspelt(key: str | None) -> str:
    """The optional column that a key was to be: a letter is wrong, letters have changed places, or capitals are there.

    >>> misspelt("choises"), misspelt("domian"), misspelt("domain"), misspelt("domain_id"), misspelt("main")
    ('choices', 'domain', '', '', '')
    """
    for column in OPTIONAL_COLUMNS:
        if not key or key == column or len(key) != len(column):
            continue
        letters = key.lower()
        wrong = sum(letter != right for letter, right in zip(letters, column))
        if wrong < 2 or sorted(letters) == sorted(column):
            return column
    return ""


def own_problem(record: dict) -> Problem:
    """A line of {"question", "answer"} and, if you like, "choices", "domain", "id", "grader" (else "choice" with
    choices, "number" for a number, "exact" for text) and "tolerance" (else 0); ValueError if they do not fit.

    With choices the answer is the letter of one, its number from 0 or its text, but nothing that fits two of them.

        {"question": "Capital of France?", "answer": "Paris"}                               exact
        {"question": "Pi?", "answer": 3.14, "tolerance": 0.01}                              number
        {"question": "Capital of France?", "answer": "B", "choices": ["Rome", "Paris"]}     choice
    """
    # More fields in a line of CSV than in its head: a comma in a text without quotes, and all after it shifted.
    if None in record:
        wanted = "as many fields as the head has (a text with a comma in it needs quotes)"
        raise data_error(record["where"], wanted, record[None])
    # A word misspelt would be a column of no meaning, and the problem another one: asked without its options, say.
    for key in record:
        meant = misspelt(key)
        if meant:
            raise data_error(record["where"], f"{meant!r}, or a column of another name", key)
    # How it is graded follows from the type of the answer, unless the record says so itself.
    answer = record["answer"]
    choices = record["choices"]
    gold = str(answer)
    default = "exact" if isinstance(answer, str) else "number"
    grader = record.get("grader", "choice" if choices else default)
    tolerance = record.get("tolerance", 0)
    # A gold answer that its own grader cannot read would make every response wrong, and nobody would notice.
    fits = grader in list(GRADERS) and isinstance(tolerance, int | float) and tolerance >= 0
    if grader == "number":
        fits = fits and read_number(gold) is not None
    if not fits:
        wanted = f"one of {list(GRADERS)}, an answer like it, tolerance from 0"
        raise data_error(record["where"], wanted, (grader, answer, tolerance))
    if grader == "choice":
        # An answer that is the text of one option and the letter of another could mean both.
        letters = {letter for letter, choice in zip(LETTERS, choices) if choice == gold}
        named = gold_letter(answer, len(choices))
        if named:
            letters.add(named)
        if len(letters) != 1:
            wanted = f"the letter, the number from 0 or the text of one of {choices}"
            raise data_error(record["where"], wanted, answer)
        gold = letters.pop()
    return Problem(record["id"], record["question"], gold, record["domain"],
                   choices=choices, grader=grader, tolerance=tolerance)  # fmt: skip


def by_domain(records: list[dict], make: Callable[[dict], Problem | None]) -> dict[str, list[Problem]]:
    """The problems by domain: SuperGPQA's subfield (its field where a subfield has under 100 questions), MMLU-Pro's
    category, else the record's domain or file. ValueError if an id comes twice in a domain."""
    sizes = Counter(record.get("subfield") for record in records)
    domains: dict[str, dict[str, Problem]] = {}  # domain -> id -> problem
    for record in records:
        topic = record.get("subfield")
        if sizes[topic] < 100:
            topic = record.get("field")
        topic = topic or record.get("category") or record.get("subject") or record["domain"]
        domain = re.sub(r"\W+", "_", str(topic).lower()).strip("_")
        problem = make({**record, "domain": domain})
        if problem is None:
            continue
        group = domains.setdefault(domain, {})
        if problem.id in group:
            raise data_error(record["where"], f"one file for {domain} and every id once in it", problem.id)
        group[problem.id] = problem
    return {domain: list(group.values()) for domain, group in domains.items()}


def split_names(names: Iterable[str], split: str, test: Iterable[str] = ()) -> list[str]:
    """The sorted domains of a split, "train", "test" or "all". `test` are those that the data itself keeps for testing;
    where these are none or all of the n names, the last n/5 of them, rounded up, are "test".

    >>> [split_names(["law", "anatomy", "virology"], split) for split in ("train", "test")]
    [['anatomy', 'law'], ['virology']]
    >>> split_names(["law"], "train"), split_names(["law"], "test")  # one domain must serve both
    (['law'], ['law'])
    """
    every = sorted(names)
    held_out = sorted(test)
    if len(held_out) in (0, len(every)):
        fifth = math.ceil(len(every) / 5)
        held_out = every[len(every) - fifth :]
    if split == "all":
        return every
    if split == "test":
        return held_out
    if split == "train":
        return [name for name in every if name not in held_out] or every
    raise data_error("domains", "the split 'train', 'test' or 'all'", split)


# ---------------------------------------------------------------------------------------------------------------------
# Text-to-SQL: BIRD and everything in its format
# ---------------------------------------------------------------------------------------------------------------------

BIRD_FILES = ("mini_dev_sqlite.json", "dev.json", "train.json")
BIRD_FIELDS = ("db_id", "question", "SQL", "evidence", "question_id", "difficulty")  # three are required
BIRD_REMEDY = "unpack https://bird-bench.oss-cn-beijing.aliyuncs.com/train.zip (or dev.zip, minidev.zip)"


class Bird:
    """The task "bird": one domain is one database of a folder in BIRD's format.

    `path` is a folder that holds, at any depth, `train.json` beside `train_databases/`, or `dev.json` or
    `mini_dev_sqlite.json` beside `dev_databases/`, with `<db>.sqlite` inside; or one such JSON file. A database named
    by several files belongs to the first of mini-dev, dev, train. What cannot be used is named in one sentence on
    stderr and left out; ValueError if nothing is left.
    """

    name = "bird"
    seed_instructions = (
        "Find the tables and columns that matter, and how they join. Return just the columns asked for."
    )
    schema_chars = 16_000  # the longest schema in a prompt
    timeout = 30.0  # seconds for a query
    reasoning = False  # whether the editor sees the solver's full text

    def __init__(self, path: str | Path) -> None:
        self.files: dict[str, Path] = {}  # domain -> its database file
        self._problems: dict[str, list[Problem]] = {}  # domain -> its problems
        root = Path(path).resolve()
        found = sorted(files_below(root))
        files = [file for name in BIRD_FILES for file in found if file.name == name]
        if root.is_file():
            files = [root]
        if not files:
            raise FileNotFoundError(f"{path} holds no {' or '.join(BIRD_FILES)}: {BIRD_REMEDY}.")
        faults = []
        for file in files:
            for fault in self._read(file):
                faults.append(f"bird: {file}: {fault}; {BIRD_REMEDY}.")
        for sentence in faults:
            print(sentence, file=sys.stderr)
        if not self.files:
            raise data_error(path, "at least one usable database", shorten(" ".join(faults), 180))

    def _read(self, file: Path) -> Iterator[str]:
        """Take the databases of one question file; yields what is wrong, one sentence each.

        A fault of one database leaves the others alone. An unknown field is reported, for it may be a misspelt one, and
        otherwise ignored.
        """
        try:
            # The question file: a list of dicts. Where no question_id is given, the place in the list serves.
            rows = replace_surrogates(json.loads(file.read_text("utf-8-sig")))
            entries = [{"question_id": i, **row} for i, row in enumerate(rows)]
            domains = {entry["db_id"] for entry in entries}
        except (ValueError, KeyError, TypeError) as error:
            yield f"not a JSON list of questions with a db_id ({error!r:.200})"
            return
        # The databases beside it, by file name, at any depth: archives differ in how they nest them.
        databases = {}
        for folder in file.parent.glob("*databases"):
            for path in files_below(folder):
                databases[path.name] = path
        for domain in sorted(domains - self.files.keys()):
            own = [entry for entry in entries if entry["db_id"] == domain]
            unknown = set().union(*own) - set(BIRD_FIELDS)
            if unknown:
                known = ", ".join(BIRD_FIELDS)
                yield f"database {domain}: the fields {sorted(unknown)} are unknown, the known are {known}"
            try:
                self._problems[domain] = [bird_problem(entry) for entry in own]
                self.files[domain] = databases[f"{domain}.sqlite"]
            except KeyError as missing:  # a field or the file
                yield f"database {domain} is left out: {missing} is missing"

    def domains(self, split: str) -> list[str]:
        """The sorted databases of a split: "train", those of the train archive; "test", of dev or mini-dev; "all". A
        folder that has only one of the two is divided by `split_names`."""
        test = [domain for domain, file in self.files.items() if "train_databases" not in file.parts]
        return split_names(self.files, split, test)

    def problems(self, domain: str) -> list[Problem]:
        """Its problems. The first call runs every gold query; those that fail are named on stderr and dropped."""
        if domain not in self.files:
            raise data_error(self.name, f"one of the databases {', '.join(sorted(self.files))}", domain)
        problems = self._problems[domain]
        db = str(self.files[domain])
        # A problem whose gold query fails can be answered by nobody: it would lower all scores alike, and hide what
        # edits gain.
        golds = in_parallel(lambda problem: gold_result(db, problem.gold, self.timeout), problems)
        good, errors = [], []
        for problem, gold in zip(problems, golds):
            if gold.error:
                errors.append(f"{problem.id}: {gold.error}")
            else:
                good.append(problem)
        if not good:
            raise data_error(db, f"gold queries that run ({BIRD_REMEDY})", errors)
        if errors:
            count = f"{len(errors)} of {len(problems)} problems dropped"
            print(f"bird: {db}: {count}, their gold SQL fails: {'; '.join(errors):.1000}", file=sys.stderr)
        self._problems[domain] = good
        return good

    def solve_chat(self, instructions: str, problem: Problem) -> Chat:
        """One user message (some chat templates refuse a system message); what a domain shares comes first."""
        content = f"""Answer a question about a database with one SQLite query.

# Database
{schema_text(self.files[problem.domain], self.schema_chars)}

# Instructions
{instructions}

# Question
{problem.evidence}
{problem.question}

Think first if it helps. Then write the query, and nothing but the query, in tags, as in this example \
for another database:
<answer>SELECT COUNT(*) FROM ships WHERE harbour = 'Oslo'</answer>"""
        return [{"role": "user", "content": content}]

    def grade(self, problem: Problem, response: str) -> Grade:
        """BIRD's verdict on the query in `response`; a response without one is wrong."""
        return self.grade_many([(problem, response)])[0]

    def grade_many(self, pairs: Sequence[tuple[Problem, str]], progress: str = "") -> list[Grade]:
        """`grade` of every (problem, response), side by side; identical queries to a problem run once.

        A training step on BIRD grades 1,680 by default (tests/RESULTS.md), and one may run for `timeout` seconds.
        """
        jobs, lenient = [], []
        for problem, response in pairs:
            predicted = extract_sql(response)
            lenient.append(predicted is None)
            if predicted is None:
                predicted = untagged_sql(response)
            jobs.append((str(self.files[problem.domain]), predicted or "", problem.gold))
        grades = []
        for grade, loosely in zip(match_many(jobs, self.timeout, progress), lenient):
            grades.append(replace(grade, lenient=loosely and grade.readable))
        return grades

    def edit_chat(self, instructions: str, summary: Summary) -> Chat:
        """See `edit_messages`."""
        role = "a model that writes SQLite queries"
        return edit_messages(role, instructions, summary, reasoning=self.reasoning)


def bird_problem(entry: dict) -> Problem:
    """An entry of BIRD's JSON as a problem; KeyError names a missing field."""
    return Problem(
        id=str(entry["question_id"]),
        question=entry["question"],
        gold=entry["SQL"],
        domain=entry["db_id"],
        evidence=entry.get("evidence") or "",
    )


def extract_sql(response: str) -> str | None:
    """The query of a response: what its last `<answer>` holds, a fence around it removed, else its last ```sql block.

    >>> extract_sql("```sql\\nSELECT 1;\\n``` or <answer>```sqlite\\nSELECT 2\\n```</answer>"), extract_sql("SELECT 3")
    ('SELECT 2', None)
    """
    sql = extract_tag(response, "answer")
    blocks = re.findall(r"```sql(?:ite)?\b(.*?)```", sql or response, re.DOTALL | re.IGNORECASE)
    if blocks:
        sql = blocks[-1]
    if sql is None:
        return None
    return without_sql_line(sql.removeprefix("```").removesuffix("```").strip())


def untagged_sql(response: str) -> str | None:
    """The query of a response that `extract_sql` finds none in: its last bare fence, or all of it below a line "sql".

    >>> untagged_sql("So:\\n```\\nSELECT 1\\n```"), untagged_sql("sql\\nSELECT 2"), untagged_sql("SELECT 3")
    ('SELECT 1', 'SELECT 2', None)
    """
    blocks = re.findall(r"```\s*\n(.*?)```", response, re.DOTALL)
    if blocks:
        return without_sql_line(blocks[-1].strip())
    sql = without_sql_line(response.strip())
    return sql if sql != response.strip() else None


def without_sql_line(sql: str) -> str:
    """The query without a first line that only names the language."""
    head, _, rest = sql.partition("\n")
    if head.strip().lower() in ("sql", "sqlite"):
        return rest.strip()
    return sql


def execution_match(db_path: str | Path, predicted: str, gold: str, timeout: float = 30.0) -> Grade:
    """BIRD's verdict: `predicted` is right iff it returns the set of rows of `gold`, within `timeout` seconds each.

    Rows are tuples of what SQLite returns, compared as Python compares them: order and duplicates do not count, column
    order and number do; NULL equals NULL, 1 equals 1.0, '1' differs from 1; two empty results are equal. An error, a
    timeout, text that holds no query and a gold query that fails are wrong. The database file must exist
    (FileNotFoundError). The gold query has run before, on a connection of its own: on the same one, as in BIRD's own
    evaluator, a prediction that deletes all rows would meet a gold result without rows, and be right.
    Nothing in `predicted` can write, read another file, or outlast its limits: see `sql_worker`.
    """
    db = str(Path(db_path).resolve(strict=True))
    expected = gold_result(db, gold, timeout)
    if expected.error:
        return Grade(False, predicted, f"the gold SQL fails: {expected.error}")
    correct, feedback, _ = ask_worker(db, predicted, expected.rows, timeout)
    return Grade(correct, predicted, feedback, readable=feedback != NO_QUERY)


def match_many(jobs: list[tuple], timeout: float = 30.0, progress: str = "") -> list[Grade]:
    """`execution_match` of every (db_path, predicted, gold), side by side; identical jobs are run once.

    `progress` names the progress bar, "" shows none. Gold queries go first, so that no two threads compute the same.
    """
    golds = [(str(Path(db).resolve(strict=True)), gold) for db, _, gold in jobs]
    in_parallel(lambda job: gold_result(job[0], job[1], timeout), golds)
    return in_parallel(lambda job: execution_match(job[0], job[1], job[2], timeout), jobs, progress)


TABLES = "SELECT name, sql FROM sqlite_master WHERE type IN ('table', 'view')"


@functools.cache
def schema_text(db: Path, limit: int) -> str:
    """The CREATE statements in the file, with sample values and the meanings of columns as comments.

    At most `limit` characters. What does not fit is dropped, and the text says so: first meanings, then samples, then
    the middle.
    """
    create, sample, meaning = range(3)  # kinds of lines: where space is short, the last kind is dropped first
    lines = []  # (kind, line)
    with closing(open_readonly(str(db))) as connection:
        connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
        for table, statement in connection.execute(TABLES):
            lines.append((create, f"{statement};"))
            with suppress(sqlite3.Error):  # a view may be broken
                for line in sample_values(connection, table):
                    lines.append((sample, line))
    for line in column_meanings(db.parent / "database_description"):
        lines.append((meaning, line))
    text = "\n".join(line for _, line in lines)
    for last in (sample, create):  # first without meanings, then without samples
        if len(text) <= limit:
            return text
        text = "-- The schema is long: comments on columns are left out.\n"
        text += "\n".join(line for kind, line in lines if kind <= last)
    return shorten(text, limit)


def sample_values(connection: sqlite3.Connection, table: str) -> list[str]:
    """A line for each column: its first three values, of the first 100 rows. sqlite3.Error for a broken view."""
    quoted = table.replace('"', '""')
    cursor = connection.execute(f'SELECT * FROM "{quoted}" LIMIT 100')
    names = [column[0] for column in cursor.description]
    lines = []
    for name, values in zip(names, zip(*cursor)):
        distinct = [value for value in dict.fromkeys(values) if value is not None]
        lines.append(f"-- {name}: e.g. {brief([distinct[:3]])}")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# From here on only plumbing: first the sandbox, then the files
# ---------------------------------------------------------------------------------------------------------------------
# A predicted query counts as hostile, so it never runs in this process but in one of a few workers, small Pythons that
# live on from query to query. What stops what there:
#     to write, to attach a file, a pragma      `authorizer`, and the file is opened read-only
#     a function that reads files or runs code  `authorizer`
#     an endless query                          a timer kills the worker (`sql_worker`)
#     a huge result, value or sort              `limit_memory`, SQLite's own heap limit, the first wrong row ends it
#     a crash of SQLite                         only the worker dies, and the next query gets a new one
# The way of a query: execution_match -> ask_worker -> (pipe) -> sql_worker -> run_gold or run_predicted -> (pipe) back.

NO_QUERY = "no query found, it belongs in <answer> tags"
Reply = tuple[bool, str, bytes]  # of a worker: does it run and is it right; why not; the rows of a gold query
IDLE: list[subprocess.Popen] = []  # the workers that wait for a query


@dataclass(frozen=True)
class GoldResult:
    """What a gold query returned: `rows` as `run_gold` pickled them, or why it fails."""

    rows: bytes
    error: str


@functools.lru_cache(maxsize=20_000)
def gold_result(db: str, gold: str, timeout: float) -> GoldResult:
    """The result of a gold query, asked once per database and exact text: white space in a literal counts."""
    _, error, rows = ask_worker(db, gold, None, timeout)
    return GoldResult(rows, error)


def in_parallel(work: Callable, items: list, progress: str = "") -> list:
    """[work(item) for item in items], equal items once, in one thread per core. Each thread waits for a worker, so the
    cores are busy although Python runs one thread at a time; daemon threads do not hold up Ctrl-C."""
    unique = list(dict.fromkeys(items))
    with ThreadPool(os.cpu_count()) as pool:
        done = pool.imap(work, unique)
        done = tqdm(done, desc=progress, total=len(unique), disable=not progress, leave=False)
        results = dict(zip(unique, done))
    return [results[item] for item in items]


def ask_worker(db: str, sql: str, gold: bytes | None, timeout: float) -> Reply:
    """One query to an idle or a new worker: the gold query itself (`gold` is None) or a prediction.

    Any number of threads may ask at once: each takes a worker off the list, and so has its pipes for itself.
    """
    try:
        worker = IDLE.pop()
    except IndexError:
        worker = start_worker()
    try:
        # Out as a pickle and back as one. Both ends are this file; what a model wrote is text in it, never the pickle.
        pickle.dump((db, sql, gold, timeout), worker.stdin)
        worker.stdin.flush()
        reply = pickle.load(worker.stdout)
        IDLE.append(worker)  # not after Ctrl-C: the reply to that query would be taken for the next one's
        return reply
    except (EOFError, OSError):  # it has died
        if worker.wait() == -signal.SIGALRM:
            return False, f"timeout after {timeout:g} s", b""
        return False, "the query crashed SQLite", b""


def start_worker() -> subprocess.Popen:
    """A fresh interpreter that runs `sql_worker`: this process must not fork itself, for it may hold torch and CUDA.

    In a session of its own Ctrl-C does not reach it. It ends when this process does, for then its stdin closes.
    OSError on Windows, which has no signal that could end a query.
    """
    if not hasattr(signal, "SIGALRM"):
        raise OSError(
            "SQL that a model wrote runs in a sandbox of processes, limits and signals which Windows does "
            "not have: use Linux, macOS or WSL for --task bird. All other tasks run here."
        )
    here = Path(__file__).resolve()
    command = [sys.executable, "-c", f"import {here.stem} as d; d.sql_worker()"]
    # Packages are where this process finds them, even if only a notebook's sys.path.append says so.
    places = [os.path.abspath(place) for place in sys.path if isinstance(place, str)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdin=pipe, stdout=pipe, start_new_session=True, cwd=here.parent, env=environment
    )


def sql_worker() -> None:
    """The loop of a worker: queries from stdin, replies to stdout, until stdin closes. POSIX only.

    SIGALRM kills it at the time limit, even inside one endless C function. After a query that left it much larger it
    starts afresh on the same pipes, for the next one must not start from that memory.
    """
    logging.disable()  # sqlglot would warn on stderr
    clean = limit_memory(None)
    with suppress(EOFError):
        while limit_memory(None) < clean + (32 << 20):
            db, sql, gold, timeout = pickle.load(sys.stdin.buffer)
            # The clock runs while the query does, not while the worker waits for one.
            signal.setitimer(signal.ITIMER_REAL, timeout)
            reply = run_gold(db, sql) if gold is None else run_predicted(db, sql, gold)
            signal.setitimer(signal.ITIMER_REAL, 0)  # a reply is written whole or not at all
            limit_memory(None)
            pickle.dump(reply, sys.stdout.buffer)
            sys.stdout.flush()
        os.execv(sys.executable, sys.orig_argv)


def limit_memory(extra: int | None) -> int:
    """Let this process grow by `extra` bytes (None: without limit); returns the bytes that it has now.

    Where there is no /proc, as on a Mac, SQLite's own heap limit is the only one. Files, which can only be those of
    large sorts, may have 1 GiB.
    """
    import resource  # not on Windows: see `start_worker`

    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    used = 0
    with suppress(OSError, ValueError):
        pages = Path("/proc/self/statm").read_text().split()[0]
        used = int(pages) * resource.getpagesize()
        limit = hard if extra is None else used + extra
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    return used


def run_gold(db: str, sql: str) -> Reply:
    """In a worker: the gold query. Its rows are a pickled pair: a dict of the distinct rows, and a sentence on them."""
    limit_memory(4 << 30)
    try:
        with closing(open_guarded(db)) as connection:
            cursor = connection.execute(sql)
            if cursor.description is None:
                return False, NO_QUERY, b""
            rows = dict.fromkeys(cursor, False)  # row -> whether a prediction has returned it
            sentence = f"{len(rows)} distinct rows: {brief(rows)}"
            return True, "", pickle.dumps((rows, sentence))
    except Exception as error:
        return False, error_text(error), b""


def run_predicted(db: str, sql: str, gold: bytes) -> Reply:
    """In a worker: a prediction. It marks the gold rows that it returns, and the first row that is not among them
    refutes it: beyond the gold result it needs no memory, however much it would return."""
    # The gold rows came from `run_gold`, not from a model. The 96 MiB are for the prediction alone.
    rows, sentence = pickle.loads(gold)
    limit_memory(96 << 20)
    try:
        with closing(open_guarded(db)) as connection:
            cursor = connection.execute(sql)
            if cursor.description is None:
                return False, NO_QUERY, b""
            # Row by row: the first wrong one decides, so a huge result need never be held.
            for row in cursor:
                if row not in rows:
                    wrong = f"your query returned {brief([row])}, which is wrong"
                    return False, f"{wrong}; expected {sentence}", b""
                rows[row] = True
    except Exception as error:  # sqlite3.Error, MemoryError, a NUL or a lone surrogate: all just wrong
        return False, explain(db, sql, error_text(error)), b""
    # All returned rows are right. Were all right ones returned?
    found = sum(rows.values())
    if found < len(rows):
        return False, f"your query returned only {found} of {sentence}", b""
    return True, "", b""


def error_text(error: Exception) -> str:
    """What an exception says, in at most 300 characters; a MemoryError says nothing."""
    return shorten(str(error), 300) or "out of memory"


def open_guarded(db: str) -> sqlite3.Connection:
    """`open_readonly`, and its queries may read and call harmless functions, nothing else."""
    connection = open_readonly(db)
    unsafe = ("load_extension", "fts3_tokenizer")
    connection.set_authorizer(authorizer(lambda name: name not in unsafe, recursive=True))
    return connection


def open_readonly(db: str) -> sqlite3.Connection:
    """`immutable` takes no locks and makes no files; a database with a write-ahead log beside it is opened without."""
    immutable = "" if os.path.exists(db + "-wal") else "&immutable=1"
    connection = sqlite3.connect(f"{Path(db).as_uri()}?mode=ro{immutable}", uri=True)
    connection.execute(f"PRAGMA hard_heap_limit = {96 << 20}")
    return connection


def authorizer(harmless: Callable[[str], bool], recursive: bool) -> Callable:
    """What SQL may do; SQLite asks while it compiles a query. To read is allowed, a function if `harmless(its name)`,
    a recursive query if `recursive`, and nothing else."""

    # Deny by default: what SQLite learns to do in a later version is forbidden until somebody allows it here.
    def verdict(action: int, _: str | None, function: str | None, *__: str | None) -> int:
        allowed = action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ)
        if action == sqlite3.SQLITE_FUNCTION:
            allowed = harmless(function)
        if action == sqlite3.SQLITE_RECURSIVE:
            allowed = recursive
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY

    return verdict


def brief(rows: Iterable[Sequence]) -> str:
    """The first five rows in at most 400 characters, without a copy of a huge value.

    >>> brief([(1, None, "x" * 10**6), (2,)])
    "(1, None, 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx'), (2,)"
    """
    short = []
    for row in list(rows)[:5]:
        values = [value[:40] if isinstance(value, (str, bytes)) else value for value in row[:8]]
        short.append(tuple(values))
    return shorten(str(short)[1:-1], 400)


def explain(db: str, sql: str, error: str) -> str:
    """SQLite's `error` for the editor, and what helps: not a SELECT, the place of a syntax error, the nearest names."""
    notes = [f"SQL error: {error}", syntax_note(sql, error)]
    kind, _, name = error.partition(": ")
    if kind in ("no such table", "no such column"):
        notes.append(f"nearest: {nearest_names(db, name)}")
    return "; ".join(note for note in notes if note)


def syntax_note(sql: str, error: str) -> str:
    """What sqlglot's parser adds to SQLite's `error`; "" if nothing.

    The error decides the verdict, this is help only: where sqlglot and SQLite disagree, SQLite is right.
    """
    try:
        trees = [tree for tree in sqlglot.parse(sql[:20_000], read="sqlite") if tree]
    except Exception as fault:  # it also gives up on stray quotes, deep nesting and some good queries
        places = getattr(fault, "errors", ())
        if places and re.search("syntax error|incomplete input", error):
            return "line {line}, column {col}, near {highlight!s:.80}".format(**places[0])
        return ""
    if len(trees) == 1 and isinstance(trees[0], sqlglot.exp.Query):
        return ""
    return "not a single SELECT but " + ", ".join(tree.key.upper() for tree in trees[:5])


ALL_NAMES = """
SELECT name, lower(name) FROM sqlite_master WHERE type <> 'index'
UNION ALL
SELECT m.name || '.' || c.name, lower(c.name) FROM sqlite_master m, pragma_table_info(m.name) c
"""  # of tables and columns, as it is shown and as it is compared


def nearest_names(db: str, name: str) -> str:
    """The tables and columns whose names are most like `name`, "none" if none is."""
    with closing(open_readonly(db)) as connection:
        real = dict(connection.execute(ALL_NAMES))
    # "T1.titel" is looked up as "titel": a column that exists in another table is then the nearest of all.
    last = name.lower().rpartition(".")[2]
    near = difflib.get_close_matches(last[:100], set(real.values()), n=2, cutoff=0.5)
    shown = [full for full, short in real.items() if short in near]
    return ", ".join(shown[:5]) or "none"


# -- files ------------------------------------------------------------------------------------------------------------


def data_error(where: object, wanted: str, found: object) -> ValueError:
    """One sentence for the owner of the data."""
    return ValueError(f"{where}: expected {wanted}, found {found!r:.200}.")


def replace_surrogates(value: Any) -> Any:
    """A JSON value with "?" for every lone surrogate, that is half a character, which no tokenizer or file can take.

    JSON can carry them as escapes. They are replaced here, where records are read, and nowhere else.

    >>> replace_surrogates({"choices": ["a\\ud800"]})
    {'choices': ['a?']}
    """
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {replace_surrogates(key): replace_surrogates(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(replace_surrogates(item) for item in value)
    return value


def files_below(root: Path) -> Iterator[Path]:
    """All files below a folder, or the file itself. Links are followed, and no folder is entered twice."""
    if root.is_file():
        yield root
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()  # os.walk goes no deeper here
            continue
        seen.add(real)
        for name in names:
            yield Path(folder, name)


def read_folder(source: str) -> tuple[list[dict], list[dict]]:
    """The records of a local copy: JSONL, CSV files and folders that `datasets` saved, one per subject, at any depth.

    Two lists, to train and to test: folders and files named "test" go to the second, all others to the first.
    "validation" and "dev" hold few-shot examples and are left out, hidden files too.
    """
    root = Path(source).expanduser().resolve()
    if not root.exists():
        raise FileNotFoundError(f"--data {source} does not exist; give a file or folder of questions.")
    train: list[dict] = []
    test: list[dict] = []
    for file in sorted(files_below(root)):
        path = file
        if file.name == "state.json":  # what marks a folder that `datasets` saved
            path = file.parent
        elif file.suffix not in (".jsonl", ".csv"):
            continue
        # The path tells the part, train or test, and the subject: its file's name, or the folder's where the file is a
        # part.
        names = [Path(name).stem for name in path.relative_to(root.parent).parts]
        if names[-1] in ("validation", "dev") or any(name.startswith(".") for name in names[1:]):
            continue
        table = names[-1].removeprefix("mmlu_")
        if names[-1] in ("train", "test"):
            table = path.parent.name
        part = test if "test" in names[1:] else train
        part.extend(read_records(read_rows(path), str(path), table))
    return train, test


def from_hub(name: str) -> list[dict]:
    """The records of a data set of the hub, all its configurations; ConnectionError, one sentence, if that fails."""
    import datasets  # here, because the workers of the sandbox import this file

    split = "train" if name == SUPERGPQA else "test"  # where its questions are
    tables = {}
    try:
        for table in datasets.get_dataset_config_names(name):
            tables[table] = datasets.load_dataset(name, table, split=split)
    except Exception as error:  # offline, moved, gated, half a download: datasets raises a dozen kinds
        advice = "go online or give --data FOLDER"
        raise ConnectionError(f"{name}: no download; {advice} ({error!r:.200}).") from error
    records: list[dict] = []
    for table, rows in tables.items():
        records.extend(read_records(rows, f"{name}, {table}", table))
    return records


def read_rows(path: Path) -> Iterable[dict]:
    """The rows of a folder that `datasets` saved, of a CSV file or of a JSONL file."""
    if path.is_dir():
        import datasets

        return datasets.load_from_disk(str(path))
    # `datasets` could read the other two as well. But it gives all values of a column one type, and where it cannot,
    # or a line is broken, it does not name the line.
    if path.suffix == ".csv":
        text = path.read_text("utf-8-sig")
        head = text.split("\n", 1)[0]
        delimiter = max(",;\t", key=head.count)
        return csv.DictReader(io.StringIO(text), delimiter=delimiter)
    return read_jsonl(path)


def read_jsonl(path: Path) -> Iterator[Any]:
    """The value of each line; ValueError names a line that is not JSON."""
    lines = path.read_bytes().rstrip().split(b"\n")  # splitlines() would also split at U+2028 inside a string
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise record_error(f"{path}, line {number}", error, line) from None
        yield row


def record_error(where: str, error: Exception, row: object) -> ValueError:
    """What is wrong with a row that is no record."""
    return data_error(where, f"question, answer and any list of choices ({error!r:.90})", row)


def read_records(rows: Iterable[dict], source: str, table: str) -> Iterator[dict]:
    """Rows of any source in one form: "question", "answer", "choices" (() for none), "id", "domain", "where".

    `source` says where the rows stand, for messages. `table` is the domain and numbers the ids where a row does not say
    better. Its other fields stay, but empty ones are left out. ValueError names the line.
    """
    for number, row in enumerate(rows, 1):
        line = getattr(rows, "line_num", number)  # a CSV has a head, and texts of several lines
        where = f"{source}, line {line}"
        try:
            record = read_record(row)
        except (AttributeError, KeyError, SyntaxError, TypeError, ValueError) as error:
            raise record_error(where, error, row) from None
        defaults = {"domain": table, "id": f"{table}-{number}"}
        record = replace_surrogates({**defaults, **record, "where": where})
        record["id"] = str(record["id"])
        yield record


def read_record(row: dict) -> dict:
    """The fields of `row` that are not empty, with "question", "answer" and "choices" as `read_records` promises."""
    record = {name: value for name, value in row.items() if value is not None and str(value).strip()}
    choices = record.get("choices", record.get("options", ()))
    if isinstance(choices, str):  # a CSV has the list as text
        choices = ast.literal_eval(choices)
    record["choices"] = tuple(str(choice) for choice in choices)
    given = "answer"
    for name in ("answer_index", "answer_letter"):  # of MMLU-Pro and SuperGPQA, surer than their "answer"
        if name in record:
            given = name
    record["answer"] = record[given]
    record["question"] = str(record["question"]).strip()
    return record


MEANINGS = ("column_name", "column_description", "value_description")  # what such a file says of a column


def column_meanings(folder: Path) -> Iterator[str]:
    """Lines "-- table.column: meaning" from BIRD's `database_description/<table>.csv`; none without the folder."""
    for file in sorted(folder.glob("*.csv")):
        table = replace_surrogates(file.stem)
        text = decode(file.read_bytes()).replace("\0", "")
        with suppress(csv.Error):  # an unclosed quote swallows the file: what came before it stays
            for row in csv.DictReader(io.StringIO(text, newline="")):
                fields = {}
                for key, value in row.items():
                    fields[str(key).strip().lower()] = " ".join(str(value or "").split())
                told = [fields.get(name) for name in MEANINGS]
                meaning = "; ".join(part for part in told if part)
                if meaning:
                    yield f"-- {table}.{fields.get('original_column_name')}: {shorten(meaning, 200)}"


def decode(raw: bytes) -> str:
    """The text of a file that is UTF-16, UTF-8 or, if it is neither, from a Windows program."""
    encoding = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return raw.decode(encoding)
    except UnicodeError:
        return raw.decode("cp1252", "replace")
