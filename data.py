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

import random
import re
import sqlite3
from dataclasses import dataclass


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
# BIRD at 1/30,000 of the size. A domain is a real SQLite table with columns c0..c7; its users ask for "profit" or "rank",
# and only a hidden glossary says which column that is. What instructions can carry is exactly this knowledge: lines of
# "word column". The seed instructions are empty, so the solver starts at zero and every point is an edit's doing.

WORDS = (
    "profit rank price stock margin weight age rating cost score sales tax "
    "height volume speed quota debt bonus salary budget growth income loss share"
).split()
COLUMNS = [f"c{i}" for i in range(8)]
ROWS = range(1, 17)  # values of the column `id`
QUESTIONS = {"total": "SUM", "highest": "MAX", "lowest": "MIN"}


def mini_sql(question: str, column: str) -> str:
    """The SQL for a question of the miniature. Tokens are separated by spaces: its tokenizer is word-level.

    >>> mini_sql("item 3 profit", "c5"), mini_sql("total profit", "c5")
    ('SELECT c5 FROM t WHERE id = 3', 'SELECT SUM ( c5 ) FROM t')
    """
    kind, *rest = question.split()
    if kind == "item":
        return f"SELECT {column} FROM t WHERE id = {rest[0]}"
    return f"SELECT {QUESTIONS[kind]} ( {column} ) FROM t"


def read_glossary(text: str) -> dict[str, str]:
    """Pairs "word column" found in any text, in order; the last line about a word wins.

    >>> read_glossary("profit c5 rank c1 nonsense profit c2")
    {'profit': 'c2', 'rank': 'c1'}
    """
    tokens = text.split()
    return {word: column for word, column in zip(tokens, tokens[1:]) if word in WORDS and column in COLUMNS}


class Mini:
    """The miniature task. Domain names carry their seed, so a domain is the same on every machine."""

    name = "mini"
    seed_instructions = ""

    def __init__(self, train: int = 24, test: int = 32, dev: int = 16):
        self.sizes = {"train": train, "test": test, "dev": dev}  # dev: for tuning; never trained on, never reported
        self.databases: dict[str, sqlite3.Connection] = {}
        self.results: dict[tuple[str, str], list | None] = {}  # (domain, SQL) -> rows; None is an error

    def domains(self, split: str = "all") -> list[str]:
        splits = ("train", "test", "dev") if split == "all" else (split,)
        return [f"{name}{i:03d}" for name in splits for i in range(self.sizes[name])]

    def glossary(self, domain: str) -> dict[str, str]:
        """The hidden truth of a domain: 8 of 24 words, each meaning one column."""
        rng = random.Random(domain)
        return dict(zip(rng.sample(WORDS, 8), rng.sample(COLUMNS, 8)))

    def problems(self, domain: str) -> list[Problem]:
        """19 questions about each of 8 words: 2 in the holdout, 4 in the test split, 13 in the pool."""
        rng, glossary = random.Random(domain), self.glossary(domain)
        kinds = [f"item {i}" for i in ROWS] + list(QUESTIONS)
        shuffled = {word: rng.sample(kinds, len(kinds)) for word in glossary}
        out = []
        for i in range(len(kinds)):  # word by word inside: the first 8 of any split ask for every word once
            for word, column in glossary.items():
                split, question = "holdout" if i < 2 else "test" if i < 6 else "pool", f"{shuffled[word][i]} {word}"
                out.append(Problem(f"{domain}/{question}", question, mini_sql(question, column), domain, split))
        return out

    def solve_chat(self, instructions: str, problem: Problem) -> list[dict]:
        # The word asked for is the last token before the answer, which restates it: that is what lets a three-layer
        # model learn to look it up (an induction head).
        return [{"role": "system", "content": "solve"}, {"role": "user", "content": f"{instructions} {problem.question}"}]

    def edit_chat(self, instructions: str, summary: list[Answer]) -> list[dict]:
        graded = [
            f"question {a.question} gold {a.gold} answer {a.answer} {'correct' if a.correct else 'wrong'}" for a in summary
        ]
        return [{"role": "system", "content": "edit"}, {"role": "user", "content": f"{instructions} " + " ".join(graded)}]

    def read_edit(self, text: str) -> str | None:
        """New instructions as stored: one line per word. None if the tags are missing or hold no entry."""
        glossary = read_glossary(extract_tag(text, "prompt") or "")
        return "\n".join(f"{word} {column}" for word, column in glossary.items()) or None

    def rows(self, domain: str, sql: str) -> list | None:
        """The result of one query on the domain's database, None on any error. Read-only: the authorizer refuses."""
        if domain not in self.databases:
            rng, db = random.Random(domain), sqlite3.connect(":memory:", check_same_thread=False)
            db.execute(f"CREATE TABLE t (id, {', '.join(COLUMNS)})")
            db.executemany(f"INSERT INTO t VALUES ({'?,' * 8}?)", [(i, *rng.choices(range(1000), k=8)) for i in ROWS])
            allowed = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION}
            db.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in allowed else sqlite3.SQLITE_DENY)
            db.set_progress_handler(lambda: 1, 100_000)  # any query that takes longer is aborted
            self.databases[domain] = db
        if (domain, sql) not in self.results:
            try:
                self.results[domain, sql] = self.databases[domain].execute(sql).fetchall()
            except (sqlite3.Error, sqlite3.Warning, ValueError):
                self.results[domain, sql] = None
        return self.results[domain, sql]

    def grade(self, problem: Problem, response: str) -> Grade:
        sql = extract_tag(response, "answer") or ""
        rows = self.rows(problem.domain, sql) if sql else None
        correct = rows is not None and rows == self.rows(problem.domain, problem.gold)
        return Grade(correct, sql, "" if correct else "SQL error" if rows is None else "wrong result")


def mini_tokenizer():
    """A word-level `PreTrainedTokenizerFast` with a chat template; saved and loaded like any other tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = "<unk> solve edit question gold answer correct wrong none item SELECT FROM t WHERE id = SUM MAX MIN ( )".split()
    words += ["<answer>", "</answer>", "<prompt>", "</prompt>", *QUESTIONS, *map(str, ROWS), *COLUMNS, *WORDS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="<|end|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return tokenizer


# The warm-up: rows of chat from which a tiny model learns to answer and to edit. It stands in for pretraining, and like
# pretraining it shows good and bad work: the base has seen careless edits, and RL selects among what it has seen.


def mini_answer(question: str, glossary: dict[str, str]) -> str:
    """What a solver that reads its glossary answers. For an unknown word, SQL that fails: luck earns nothing."""
    word = question.split()[-1]
    column = glossary.get(word)
    return f"{word} {column or 'none'} <answer> {mini_sql(question, column or word)} </answer>"


def mini_question(rng: random.Random, word: str) -> str:
    return f"{rng.choice([f'item {rng.choice(ROWS)}'] * 3 + list(QUESTIONS))} {word}"


def lines(glossary: dict[str, str]) -> str:
    return "\n".join(f"{word} {column}" for word, column in glossary.items())


def recall_row(rng: random.Random, size: int) -> list[dict]:
    """A glossary, then some of its entries again: bare practice in looking things up. Short rows on purpose: a fresh
    model attends evenly over all it sees, and in a short row that is enough of a hint to start from."""
    pairs = list(zip(rng.sample(WORDS, size), rng.sample(COLUMNS, size)))
    return [{"role": "assistant", "content": " ".join(f"{w} {c}" for w, c in pairs + rng.choices(pairs, k=4))}]


def solve_row(rng: random.Random, size: int, questions: int = 8) -> list[dict]:
    """A solver chat of several turns: some words stand in the glossary, a quarter of those asked for do not."""
    words = rng.sample(WORDS, min(len(WORDS), size + max(1, size // 3)))
    glossary = dict(zip(words[:size], rng.choices(COLUMNS, k=size)))
    messages = [{"role": "system", "content": "solve"}]
    for turn in range(questions):
        question = mini_question(rng, rng.choice(words))
        content = f"{lines(glossary)} {question}" if turn == 0 else question
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": mini_answer(question, glossary)}]
    return messages


def edit_row(rng: random.Random, task: Mini, noisy: bool, k: int = 4) -> list[dict]:
    """An editor chat and one edit of it. A clean edit keeps every entry and adds all that the gold answers teach; a noisy
    one has a quality of its own: how much it keeps and adds, whether it trusts gold, whether it repairs conflicts."""
    truth = dict(zip(rng.sample(WORDS, 8), rng.sample(COLUMNS, 8)))
    known = dict(rng.sample(sorted(truth.items()), rng.randint(0, 8)))
    if noisy:  # wrong entries, and words that nobody asks about
        known = {w: c if rng.random() < 0.85 else rng.choice(COLUMNS) for w, c in known.items()}
        others = [w for w in WORDS if w not in truth]
        known.update({w: rng.choice(COLUMNS) for w in rng.sample(others, rng.randint(0, 4))})
        known = dict(rng.sample(sorted(known.items()), len(known)))
    keep, add = (rng.uniform(0.5, 1), rng.uniform(0, 1)) if noisy else (1, 1)
    trust, repair = (rng.random() < 0.6, rng.random() < 0.5) if noisy else (True, True)
    summary, edit = [], {w: c for w, c in known.items() if rng.random() < keep}
    for word in rng.choices(sorted(truth), k=k):
        question = mini_question(rng, word)
        gold, response = mini_sql(question, truth[word]), mini_answer(question, known)
        answer = extract_tag(response, "answer")
        summary.append(Answer("", question, response, answer, gold, answer == gold))
        seen = truth[word] if trust else known.get(word, rng.choice(COLUMNS))
        if (word in edit and repair) or (word not in edit and rng.random() < add):
            edit[word] = seen
    return task.edit_chat(lines(known), summary) + [{"role": "assistant", "content": f"<prompt> {lines(edit)} </prompt>"}]


# ---------------------------------------------------------------------------------------------------------------------
# Text-to-SQL: BIRD and everything in its format
# ---------------------------------------------------------------------------------------------------------------------

# ---------------------------------------------------------------------------------------------------------------------
# Multiple choice: MMLU-Redux, SuperGPQA, MMLU-Pro
# ---------------------------------------------------------------------------------------------------------------------

# ---------------------------------------------------------------------------------------------------------------------
# Your own problems: a JSONL file
# ---------------------------------------------------------------------------------------------------------------------

# ---------------------------------------------------------------------------------------------------------------------
# Finding a task by its name
# ---------------------------------------------------------------------------------------------------------------------
