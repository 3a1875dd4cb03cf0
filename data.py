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

import ast
import csv
import difflib
import functools
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import sqlglot
from tqdm import tqdm


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
    pairs = re.findall(rf"<{name}>((?:(?!</?{name}>).)*)</{name}>", text, re.DOTALL | re.IGNORECASE | re.ASCII)
    return pairs[-1].strip() if pairs else None


def need(ok: object, where: object, wanted: str, found: object) -> None:
    """One sentence for the owner of the data, unless `ok`."""
    if not ok:
        raise ValueError(f"{where}: expected {wanted}, found {found!r:.200}.") from None


def files_below(root: Path) -> Iterator[Path]:
    """All files below a folder, or the file itself. Links are followed, and no folder is entered twice."""
    yield from [root] * root.is_file()
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
        else:
            yield from (Path(folder, name) for name in names)
        seen.add(real)


def split_names(names: Iterable[str], split: str, test: Iterable[str] = ()) -> list[str]:
    """The sorted domains of a split. `test` are those that the data itself keeps for testing; where these are none or
    all of the n names, the last n/5 of them, rounded up, are "test".

    >>> [split_names(["law", "anatomy", "virology"], split) for split in ("train", "test")]
    [['anatomy', 'law'], ['virology']]
    >>> split_names(["law"], "train"), split_names(["law"], "test")  # one domain must serve both
    (['law'], ['law'])
    """
    names, test = sorted(names), sorted(test)
    test = test if 0 < len(test) < len(names) else names[len(names) - math.ceil(len(names) / 5) :]
    splits = {"train": [name for name in names if name not in test] or names, "test": test, "all": names}
    need(split in splits, "domains", "the split 'train', 'test' or 'all'", split)
    return splits[split]


def authorize(harmless: Callable[[str | None], bool], action: int, _: str | None, name: str | None, *__: str) -> int:
    """What model-written SQL may do; SQLite asks while it compiles a query. To read is allowed, a function if
    `harmless(name)` says so, a recursive query if `harmless(None)` does, and nothing else."""
    reads = action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ)
    calls = action in (sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE) and harmless(name)
    return sqlite3.SQLITE_OK if reads or calls else sqlite3.SQLITE_DENY


# ---------------------------------------------------------------------------------------------------------------------
# The miniature: databases with a hidden glossary
# ---------------------------------------------------------------------------------------------------------------------
# BIRD, very small. A domain is a real SQLite table with columns c0..c7; its users ask for "profit" or "rank", and only
# a hidden glossary says which column that is. What instructions can carry is exactly this knowledge: lines of "word
# column". The seed instructions are empty, so the solver starts at zero, and every point is an edit's doing.

WORDS = ("profit rank price stock margin weight age rating cost score sales tax "
         "height volume speed quota debt bonus salary budget growth income loss share").split()
COLUMNS = [f"c{i}" for i in range(8)]
ROWS = range(1, 17)  # values of the column `id`
QUESTIONS = {"total": "SUM", "highest": "MAX", "lowest": "MIN"}


def mini_sql(question: str, column: str) -> str:
    """The SQL for a question of the miniature. Tokens are separated by spaces: its tokenizer is word-level.

    >>> mini_sql("item 3 profit", "c5"), mini_sql("total profit", "c5")
    ('SELECT c5 FROM t WHERE id = 3', 'SELECT SUM ( c5 ) FROM t')
    """
    kind, item, *_ = question.split()
    what, where = (column, f" WHERE id = {item}") if kind == "item" else (f"{QUESTIONS[kind]} ( {column} )", "")
    return f"SELECT {what} FROM t{where}"


def read_glossary(text: str) -> dict[str, str]:
    """Pairs "word column" found in any text, in order; the last line about a word wins.

    >>> read_glossary("profit c5 rank c1 nonsense profit c2")
    {'profit': 'c2', 'rank': 'c1'}
    """
    tokens = text.split()
    return {word: column for word, column in zip(tokens, tokens[1:]) if word in WORDS and column in COLUMNS}


def mini_chat(system: str, *turns: str) -> list[dict]:
    """A chat of one system message and any turns, the user's first."""
    roles = ["system"] + ["user", "assistant"] * len(turns)
    return [{"role": role, "content": text} for role, text in zip(roles, [system, *turns])]


class Mini:
    """The miniature task. Domain names carry their seed, so a domain is the same on every machine."""

    name = "mini"
    seed_instructions = ""

    def __init__(self, train: int = 24, test: int = 32, dev: int = 16):
        self.sizes = {"train": train, "test": test, "dev": dev}  # dev: for tuning; never trained on, never reported

    def domains(self, split: str = "all") -> list[str]:
        splits = self.sizes if split == "all" else [split]
        return [f"{name}{i:03d}" for name in splits for i in range(self.sizes[name])]

    def glossary(self, domain: str) -> dict[str, str]:
        """The hidden truth of a domain: 8 of 24 words, each meaning one column."""
        rng = random.Random(domain)
        return dict(zip(rng.sample(WORDS, 8), rng.sample(COLUMNS, 8)))

    def problems(self, domain: str) -> list[Problem]:
        """19 questions about each of 8 words: 2 in the holdout, 4 in the test split, 13 in the pool."""
        rng, glossary, out = random.Random(domain), self.glossary(domain), []
        kinds = [f"item {i}" for i in ROWS] + [*QUESTIONS]
        shuffled = {word: rng.sample(kinds, len(kinds)) for word in glossary}
        for i, split in enumerate(["holdout"] * 2 + ["test"] * 4 + ["pool"] * 13):
            for word, column in glossary.items():  # inside, so that the first 8 of any split ask for every word once
                question = f"{shuffled[word][i]} {word}"
                out.append(Problem(f"{domain}/{question}", question, mini_sql(question, column), domain, split))
        return out

    def solve_chat(self, instructions: str, problem: Problem) -> list[dict]:
        # The word asked for is the last token before the answer, which restates it: that is what lets a three-layer
        # model learn to look it up (an induction head).
        return mini_chat("solve", f"{instructions} {problem.question}")

    def edit_chat(self, instructions: str, summary: list[Answer]) -> list[dict]:
        graded = [f"question {a.question} gold {a.gold} answer {a.answer} {'correct' if a.correct else 'wrong'}"
                  for a in summary]
        return mini_chat("edit", " ".join([instructions, *graded]))

    def read_edit(self, text: str) -> str | None:
        """New instructions as stored: one line per word. None if the tags are missing or hold no entry."""
        return lines(read_glossary(extract_tag(text, "prompt") or "")) or None

    @staticmethod
    @functools.cache
    def rows(domain: str, sql: str) -> list | None:
        """The result of one query on the domain's database, None on any error."""
        with suppress(sqlite3.Error, sqlite3.Warning, ValueError):
            return mini_database(domain).execute(sql).fetchall()

    def grade(self, problem: Problem, response: str) -> Grade:
        sql = extract_tag(response, "answer") or ""
        rows = self.rows(problem.domain, sql) if sql else None
        correct = rows is not None and rows == self.rows(problem.domain, problem.gold)
        return Grade(correct, sql, "" if correct else "SQL error" if rows is None else "wrong result")


@functools.cache
def mini_database(domain: str) -> sqlite3.Connection:
    """The table of a domain, in memory. Model-written SQL may read, and call three functions, nothing else."""
    rng, db = random.Random(domain), sqlite3.connect(":memory:", check_same_thread=False)
    db.execute(f"CREATE TABLE t (id, {', '.join(COLUMNS)})")
    db.executemany(f"INSERT INTO t VALUES ({'?,' * 8}?)", [(i, *rng.choices(range(1000), k=8)) for i in ROWS])
    db.set_authorizer(functools.partial(authorize, lambda name: str(name).upper() in QUESTIONS.values()))
    db.set_progress_handler(lambda: 1, 100_000)  # any query that takes longer is aborted
    return db


def mini_tokenizer():
    """A word-level `PreTrainedTokenizerFast` with a chat template; saved and loaded like any other tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ("<unk> solve edit question gold answer correct wrong none item SELECT FROM t WHERE id = SUM MAX MIN ( ) "
             "<answer> </answer> <prompt> </prompt>").split() + [*QUESTIONS, *map(str, ROWS), *COLUMNS, *WORDS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="<|end|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template="{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
                      "{% if add_generation_prompt %}<|assistant|>{% endif %}")


# The warm-up: rows of chat from which a tiny model learns to answer and to edit. It stands in for pretraining, and like
# pretraining it shows good and bad work: the base has seen careless edits, and RL selects among what it has seen.


def mini_answer(question: str, glossary: dict[str, str]) -> str:
    """What a solver that reads its glossary answers. For an unknown word, SQL that fails: luck earns nothing."""
    word = question.split()[-1]
    return f"{word} {glossary.get(word, 'none')} <answer> {mini_sql(question, glossary.get(word, word))} </answer>"


def mini_question(rng: random.Random, word: str) -> str:
    return f"{rng.choice([f'item {rng.choice(ROWS)}'] * 3 + list(QUESTIONS))} {word}"


def lines(glossary: dict[str, str]) -> str:
    return "\n".join(f"{word} {column}" for word, column in glossary.items())


def recall_row(rng: random.Random, size: int, length: int) -> list[dict]:
    """A glossary of `size` words, then entries of it again, `length` entries in all: bare practice in looking words up.

    Short rows on purpose: a fresh model attends evenly to all it sees, and in a short row that is hint enough to start.
    """
    pairs = list(zip(rng.sample(WORDS, size), rng.sample(COLUMNS, size)))
    again = rng.choices(pairs, k=length - size)
    return [{"role": "assistant", "content": " ".join(f"{word} {column}" for word, column in pairs + again)}]


def solve_row(rng: random.Random, size: int, questions: int = 8) -> list[dict]:
    """A solver chat of several turns: some words stand in the glossary, a quarter of those asked for do not."""
    words = rng.sample(WORDS, min(len(WORDS), size + max(1, size // 3)))
    glossary = dict(zip(words, rng.choices(COLUMNS, k=size)))
    asked = [mini_question(rng, rng.choice(words)) for _ in range(questions)]
    first, *texts = [text for question in asked for text in (question, mini_answer(question, glossary))]
    return mini_chat("solve", f"{lines(glossary)} {first}", *texts)


def edit_row(rng: random.Random, task: Mini, noisy: bool, k: int = 4, known: int = 8) -> list[dict]:
    """An editor chat and one edit of it.

    A clean edit keeps every entry and adds all that the gold answers teach. A noisy one has a quality of its own: how
    much it keeps and adds, whether it trusts gold and repairs conflicts; and three of four stop after three lines. What
    the base does most often is therefore mediocre, and what is better is in it.
    """
    truth = dict(zip(rng.sample(WORDS, 8), rng.sample(COLUMNS, 8)))
    known = dict(rng.sample(sorted(truth.items()), rng.randint(0, known)))
    if noisy:  # wrong entries, and words that nobody asks about
        known = {w: c if rng.random() < 0.85 else rng.choice(COLUMNS) for w, c in known.items()}
        others = rng.sample([w for w in WORDS if w not in truth], rng.randint(0, 4))
        known |= {w: rng.choice(COLUMNS) for w in others}
        known = dict(rng.sample(sorted(known.items()), len(known)))
    keep, add, most = (rng.uniform(0.5, 1), rng.uniform(0.2, 1), rng.choice([3, 3, 3, 12])) if noisy else (1, 1, 12)
    trust, repair = (rng.random() < 0.6, rng.random() < 0.5) if noisy else (True, True)
    summary, edit = [], {w: c for w, c in known.items() if rng.random() < keep}
    for word in rng.choices(sorted(truth), k=k):
        question = mini_question(rng, word)
        gold, answer = mini_sql(question, truth[word]), mini_sql(question, known.get(word, word))
        summary.append(Answer("", question, "", answer, gold, answer == gold))
        seen = truth[word] if trust else known.get(word, rng.choice(COLUMNS))
        if repair if word in edit else rng.random() < add:
            edit[word] = seen
    text = lines(dict(list(edit.items())[:most]))
    return task.edit_chat(lines(known), summary) + [{"role": "assistant", "content": f"<prompt> {text} </prompt>"}]


# ---------------------------------------------------------------------------------------------------------------------
# Text-to-SQL: BIRD and everything in its format
# ---------------------------------------------------------------------------------------------------------------------
# A domain is a SQLite file. A prediction is right iff it returns the gold query's set of rows. It counts as hostile, so
# it never runs in this process but in one of a few workers, small Pythons that live on from query to query. There the
# file is opened read-only, and time, memory and what SQLite may do are limited.


def cut(text: str, limit: int) -> str:
    """`text` if it has at most `limit` characters, else its head and tail around a note that says so, `limit` in all.

    >>> cut("SELECT " + "x, " * 40 + "y FROM t", 60)
    'SELECT x, x, x, x,[... cut from 135 characters ...] y FROM t'
    """
    text = text.encode("utf-8", "replace").decode()  # a lone surrogate would stop the tokenizer
    note = f"[... cut from {len(text)} characters ...]"
    keep = max(0, limit - len(note))
    return text if len(text) <= limit else (text[: keep - keep // 3] + note + text[len(text) - keep // 3 :])[:limit]


def edit_messages(role: str, instructions: str, summary: list[Answer], budget: int = 1500,
                  reasoning: bool = False) -> list[dict]:  # fmt: skip
    """The editor's chat, shared by every task: f_psi reads (c, S) and writes c'. One user message and no system
    message, because some chat templates refuse one.

    `role` ends "You improve the instructions of ..." and says what the solver does. Each field of a problem is cut to
    `budget` characters and the old instructions to four times that: k problems take about (4 + 5k) * budget characters
    at most. `reasoning` adds the solver's full text.

    >>> chat = edit_messages("a solver", "Add.", [Answer("1", "1+1?", "<answer>3</answer>", "3", "2", False)])
    >>> print(chat[0]["content"][:40])
    You improve the instructions of a solver
    """
    problems = ""
    for i, a in enumerate(summary, 1):
        verdict = "right" if a.correct else "WRONG, cut off at the token limit" if a.truncated else "WRONG"
        fields = {"Question": a.question, "Full response": a.response * reasoning, "Answer": a.answer or "(none)",
                  "Right answer": a.gold, "Verdict": verdict, "Feedback": a.feedback}  # fmt: skip
        problems += f"## Problem {i}\n" + "".join(f"{k}: {cut(v, budget)}\n" for k, v in fields.items() if v)
    content = f"""You improve the instructions of {role}. The model itself never changes; its instructions do.
\n# Current instructions\n{cut(instructions, 4 * budget)}
\n# What the model did under them: {sum(a.correct for a in summary)} of {len(summary)} right\n{problems}
# Your task
Work out why the wrong answers are wrong and what the right ones got right. Then write the full new instructions: they
replace the old ones and will be judged on other questions of the same domain. Keep what works, add the rules and facts
of this domain that these problems reveal, name likely mistakes, and do not merely repeat the questions above.
Write them between <prompt> and </prompt>; only what stands between the tags counts."""
    return [{"role": "user", "content": content}]


def execution_match(db_path: str | Path, predicted: str, gold: str, timeout: float = 30.0) -> Grade:
    """BIRD's verdict: `predicted` is right iff it returns the set of rows of `gold`, within `timeout` seconds each.

    Rows are tuples of what SQLite returns, compared as Python compares them: order and duplicates do not count, column
    order and number do; NULL equals NULL, 1 equals 1.0, '1' differs from 1; two empty results are equal. An error, a
    timeout, text that holds no query and a gold query that fails are wrong. The database file must exist
    (FileNotFoundError). Nothing in `predicted` can write, read another file, or outlast its limits: see `sql_worker`.
    """
    db = str(Path(db_path).resolve(strict=True))
    ok, result = gold_result(db, gold, timeout)
    correct, feedback = _ask_worker(db, predicted, result, timeout) if ok else (False, f"the gold SQL fails: {result}")
    return Grade(correct, predicted.encode("utf-8", "replace").decode(), feedback)


@functools.lru_cache(maxsize=20_000)
def gold_result(db: str, gold: str, timeout: float) -> tuple[bool, Any]:
    """(True, its pickled result) or (False, why it fails), once per database and exact text: a literal's white space
    counts."""
    return _ask_worker(db, gold, None, timeout)


def match_many(jobs: list[tuple], timeout: float = 30.0, progress: str = "") -> list[Grade]:
    """`execution_match` of every (db_path, predicted, gold), side by side; identical jobs are run once.

    `progress` names the progress bar, "" shows none. Gold queries go first, so that no two threads compute the same.
    """
    golds = [(str(Path(db).resolve(strict=True)), gold) for db, _, gold in jobs]
    in_parallel(lambda job: gold_result(*job, timeout), golds)
    return in_parallel(lambda job: execution_match(job[0], job[1], job[2], timeout), jobs, progress)


def in_parallel(work: Callable, items: list, progress: str = "") -> list:
    """[work(item) for item in items], equal items once, in one thread per core. Each thread waits for a worker, so the
    cores are busy although Python runs one thread at a time; daemon threads do not hold up Ctrl-C."""
    unique = list(dict.fromkeys(items))
    with ThreadPool(os.cpu_count()) as pool:
        bar = tqdm(pool.imap(work, unique), desc=progress, total=len(unique), disable=not progress, leave=False)
        results = dict(zip(unique, bar))
    return [results[item] for item in items]


IDLE: list[subprocess.Popen] = []  # the workers that wait for a query


def _ask_worker(db: str, sql: str, gold: bytes | None, timeout: float) -> tuple[bool, Any]:
    """One query to an idle or a new worker, and the reply of `_run`.

    Any number of threads may ask at once: each takes a worker off the list, and so has its pipes for itself.
    """
    try:
        worker = IDLE.pop()
    except IndexError:
        # A fresh interpreter: this process must not fork itself, for it may hold torch and CUDA. In a session of its
        # own Ctrl-C does not reach it. It ends when this process does, for then its stdin closes.
        command = [sys.executable, "-c", f"import {Path(__file__).stem} as d; d.sql_worker()"]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
                                  cwd=Path(__file__).resolve().parent)
    try:
        pickle.dump((db, sql, gold, timeout), worker.stdin)
        worker.stdin.flush()
        reply = pickle.load(worker.stdout)
        IDLE.append(worker)  # not after Ctrl-C: the reply to that query would be taken for the next one's
        return reply
    except (EOFError, OSError):
        return False, f"timeout after {timeout:g} s" if worker.wait() == -signal.SIGALRM else "the query crashed SQLite"


def sql_worker() -> None:
    """The loop of a worker: queries from stdin, replies to stdout, until stdin closes. POSIX only.

    SIGALRM kills it at the time limit, even inside one endless C function. After a query that left it much larger it
    starts afresh on the same pipes, for the next one must not start from that memory.
    """
    logging.disable()  # sqlglot would warn on stderr
    clean = _allow(None)
    with suppress(EOFError):
        while _allow(None) < clean + (32 << 20):
            db, sql, gold, timeout = pickle.load(sys.stdin.buffer)
            signal.setitimer(signal.ITIMER_REAL, timeout)
            reply = _run(db, sql, gold)
            signal.setitimer(signal.ITIMER_REAL, 0)  # a reply is written whole or not at all
            _allow(None)
            pickle.dump(reply, sys.stdout.buffer)
            sys.stdout.flush()
        os.execv(sys.executable, sys.orig_argv)


def _allow(extra: int | None) -> int:
    """Let this process grow by `extra` bytes (None: without limit); returns the bytes that it has now.

    Where there is no /proc, as on a Mac, SQLite's own heap limit is the only one. Files, which can only be those of
    large sorts, may have 1 GiB.
    """
    import resource

    used, hard = 0, resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
    with suppress(OSError, ValueError):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (hard if extra is None else used + extra, hard))
    return used


def _run(db: str, sql: str, gold: bytes | None) -> tuple[bool, bytes | str]:
    """In a worker: (verdict, feedback), or without `gold` (True, pickled result) or (False, error).

    A result is a dict of distinct rows and a sentence on them. A prediction marks the rows that it returns, and the
    first that is not there refutes it: beyond the gold result it needs no memory, however much it would return.
    """
    rows, expected = ({}, "") if gold is None else pickle.loads(gold)
    _allow(4 << 30 if gold is None else 96 << 20)
    try:
        with closing(_open_readonly(db)) as connection:
            unsafe = ("load_extension", "fts3_tokenizer")
            connection.set_authorizer(functools.partial(authorize, lambda name: name not in unsafe))
            cursor = connection.execute(sql)
            if cursor.description is None:
                return False, "no query found, it belongs between <answer> and </answer>"
            if gold is None:
                rows = dict.fromkeys(cursor, False)
                return True, pickle.dumps((rows, f"{len(rows)} distinct rows: {_brief(rows)}"))
            for row in cursor:
                if row not in rows:
                    return False, f"your query returned {_brief([row])}, which is wrong; expected {expected}"
                rows[row] = True
    except Exception as error:  # sqlite3.Error, MemoryError, a NUL or a lone surrogate in the text: all are just wrong
        message = cut(str(error), 300) or "out of memory"
        return False, message if gold is None else _explain(db, sql, message)
    found = sum(rows.values())
    return found == len(rows), "" if found == len(rows) else f"your query returned only {found} of {expected}"


def _open_readonly(db: str) -> sqlite3.Connection:
    """`immutable` takes no locks and makes no files; a database with a write-ahead log beside it is opened without."""
    immutable = "" if os.path.exists(db + "-wal") else "&immutable=1"
    connection = sqlite3.connect(f"{Path(db).as_uri()}?mode=ro{immutable}", uri=True)
    connection.execute(f"PRAGMA hard_heap_limit = {96 << 20}")
    return connection


def _brief(rows: Iterable[tuple | list]) -> str:
    """The first five rows in at most 400 characters, without a copy of a huge value.

    >>> _brief([(1, None, "x" * 10**6), (2,)])
    "(1, None, 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx'), (2,)"
    """
    short = [tuple(v[:40] if isinstance(v, (str, bytes)) else v for v in row[:8]) for row in list(rows)[:5]]
    return cut(str(short)[1:-1], 400)


ALL_NAMES = """SELECT name, lower(name) FROM sqlite_master WHERE type <> 'index' UNION ALL
SELECT m.name || '.' || c.name, lower(c.name) FROM sqlite_master m, pragma_table_info(m.name) c"""  # as shown, to match


def _explain(db: str, sql: str, error: str) -> str:
    """SQLite's `error` for the editor, and what helps: not a SELECT, the place of a syntax error, the nearest names."""
    # The error decides the verdict, the rest is help: where sqlglot and SQLite disagree, SQLite is right.
    notes, (kind, _, name) = [f"SQL error: {error}"], error.partition(": ")
    try:
        trees = [tree for tree in sqlglot.parse(sql[:20_000], read="sqlite") if tree]
        if [isinstance(tree, sqlglot.exp.Query) for tree in trees] != [True]:
            notes.append("not a single SELECT but " + ", ".join(tree.key.upper() for tree in trees[:5]))
    except Exception as e:  # sqlglot also gives up on stray quotes, deep nesting and some queries that SQLite can read
        if (errors := getattr(e, "errors", ())) and re.search("syntax error|incomplete input", error):
            notes.append("line {line}, column {col}, near {highlight:.80}".format(**errors[0]))
    if kind in ("no such table", "no such column"):
        with closing(_open_readonly(db)) as connection:
            real = dict(connection.execute(ALL_NAMES))
        # "T1.titel" is looked up as "titel": a column that exists in another table is then the nearest of all
        near = difflib.get_close_matches(name.lower().rpartition(".")[2][:100], set(real.values()), 2, 0.5)
        notes.append("nearest: " + (", ".join([full for full, short in real.items() if short in near][:5]) or "none"))
    return "; ".join(notes)


def extract_sql(response: str) -> str | None:
    """The query of a response: what its last `<answer>` holds, a fence around it removed, else its last ```sql block.

    >>> extract_sql("```sql\\nSELECT 1;\\n``` or <answer>```sqlite\\nSELECT 2\\n```</answer>"), extract_sql("SELECT 3")
    ('SELECT 2', None)
    """
    tagged = extract_tag(response, "answer")
    sql = [tagged, *re.findall(r"```sql(?:ite)?\b(.*?)```", tagged or response, re.DOTALL | re.IGNORECASE)][-1]
    return sql and sql.removeprefix("```").removesuffix("```").strip()


BIRD_FILES = ("mini_dev_sqlite.json", "dev.json", "train.json")
BIRD_FIELDS = ("db_id", "question", "SQL", "evidence", "question_id", "difficulty")  # the first three are required
BIRD_REMEDY = "unpack https://bird-bench.oss-cn-beijing.aliyuncs.com/train.zip (or dev.zip, minidev.zip)"


def column_meanings(folder: Path) -> Iterator[str]:
    """Lines "-- table.column: meaning" from BIRD's `database_description/<table>.csv`; none without the folder."""
    for file in sorted(folder.glob("*.csv")):
        raw = file.read_bytes()
        try:
            text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        except UnicodeError:  # some were saved by Windows programs
            text = raw.decode("cp1252", "replace")
        with suppress(csv.Error):  # an unclosed quote swallows the file: what came before it stays
            for row in csv.DictReader(io.StringIO(text.replace("\0", ""), newline="")):
                row = {str(key).strip().lower(): " ".join(str(value or "").split()) for key, value in row.items()}
                told = map(row.get, ("column_name", "column_description", "value_description"))
                if meaning := "; ".join(filter(None, told)):
                    yield f"-- {file.stem}.{row.get('original_column_name')}: {cut(meaning, 200)}"


@functools.cache
def schema_text(db: Path, limit: int) -> str:
    """The CREATE statements in the file, with sample values and the meanings of columns as comments.

    At most `limit` characters: what does not fit goes in the order meanings, samples, middle, and the text says so.
    """
    lines = []  # (rank, line): where space is short, the higher rank goes first
    with closing(_open_readonly(str(db))) as connection:
        connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
        for table, create in connection.execute("SELECT name, sql FROM sqlite_master WHERE type IN ('table', 'view')"):
            lines.append((0, f"{create};"))
            with suppress(sqlite3.Error):  # a view may be broken
                cursor = connection.execute('SELECT * FROM "{}" LIMIT 100'.format(table.replace('"', '""')))
                for (column, *_), values in zip(cursor.description, zip(*cursor)):
                    samples = [value for value in dict.fromkeys(values) if value is not None][:3]
                    lines.append((1, f"-- {column}: e.g. {_brief([samples])}"))
    lines += [(2, line) for line in column_meanings(db.parent / "database_description")]
    note = "-- The schema is long: comments on columns are left out.\n"
    texts = [note * (most < 2) + "\n".join(line for rank, line in lines if rank <= most) for most in (2, 1, 0)]
    return cut(next((text for text in texts if len(text) <= limit), texts[-1]), limit)


class Bird:
    """The task "bird": one domain is one database of a folder in BIRD's format.

    `path` is a folder that holds, at any depth, `train.json` beside `train_databases/`, or `dev.json` or
    `mini_dev_sqlite.json` beside `dev_databases/`, with `<db>.sqlite` inside; or one such JSON file. A database named
    by several files belongs to the first of mini-dev, dev, train. What cannot be used is named in one sentence on
    stderr and left out; ValueError if nothing is left.
    """

    name = "bird"
    seed_instructions = "Find the tables and columns that matter, and how they join. Return just the columns asked for."
    schema_chars, timeout = 16_000, 30.0  # the longest schema in a prompt; seconds for a query
    reasoning = False  # whether the editor sees the solver's full text

    def __init__(self, path: str | Path) -> None:
        self.files, self._problems = dict[str, Path](), dict[str, list[Problem]]()  # of each database
        root = Path(path).resolve()
        found = sorted(files_below(root))
        files = [root] if root.is_file() else [file for name in BIRD_FILES for file in found if file.name == name]
        if not files:
            raise FileNotFoundError(f"{path} holds no {' or '.join(BIRD_FILES)}: {BIRD_REMEDY}.")
        faults = [f"bird: {file}: {fault}; {BIRD_REMEDY}." for file in files for fault in self._read(file)]
        print("\n".join(faults), end="\n" * bool(faults), file=sys.stderr)
        need(self.files, path, "at least one usable database", cut(" ".join(faults), 180))

    def _read(self, file: Path) -> Iterable[str]:
        """Take the databases of one question file; yields what is wrong, one sentence each.

        A fault of one database leaves the others alone; an unknown field is reported, because it may be a misspelt
        one, and otherwise ignored.
        """
        try:
            entries = [{"question_id": i, **e} for i, e in enumerate(json.loads(file.read_text("utf-8-sig")))]
            names = {entry["db_id"] for entry in entries}
        except (ValueError, KeyError, TypeError) as error:
            yield f"not a JSON list of questions with a db_id ({error!r:.200})"
            return
        paths = {db.name: db for folder in file.parent.glob("*databases") for db in files_below(folder)}
        for db in sorted(names - self.files.keys()):
            own = [entry for entry in entries if entry["db_id"] == db]
            if unknown := sorted(set().union(*own) - {*BIRD_FIELDS}):
                yield f"database {db}: the fields {unknown} are unknown, the known are {', '.join(BIRD_FIELDS)}"
            try:
                self._problems[db] = [Problem(str(e["question_id"]), e["question"], e["SQL"], db,
                                              evidence=e.get("evidence") or "") for e in own]
                self.files[db] = paths[f"{db}.sqlite"]
            except KeyError as missing:  # a field or the file
                yield f"database {db} is left out: {missing} is missing"

    def domains(self, split: str) -> list[str]:
        """The sorted databases of a split: "train", those of the train archive; "test", of dev or mini-dev; "all". A
        folder that has only one of the two is divided by `split_names`."""
        test = [db for db, file in self.files.items() if "train_databases" not in file.parts]
        return split_names(self.files, split, test)

    def problems(self, domain: str) -> list[Problem]:
        """Its problems. The first call runs every gold query; those that fail are named on stderr and dropped."""
        need(domain in self.files, self.name, f"one of the databases {', '.join(sorted(self.files))}", domain)
        problems, db = self._problems[domain], str(self.files[domain])
        golds = in_parallel(lambda problem: gold_result(db, problem.gold, self.timeout), problems)
        errors = [f"{problem.id}: {error}" for problem, (ok, error) in zip(problems, golds) if not ok]
        need(len(errors) < len(problems), db, f"gold queries that run ({BIRD_REMEDY})", errors)
        if errors:
            what = f"{len(errors)} of {len(problems)} problems dropped, their gold SQL fails: {'; '.join(errors):.1000}"
            print(f"bird: {db}: {what}", file=sys.stderr)
        self._problems[domain] = [problem for problem, (ok, _) in zip(problems, golds) if ok]
        return self._problems[domain]

    def solve_chat(self, instructions: str, problem: Problem) -> list[dict]:
        """One user message (some chat templates refuse a system message); what a domain shares comes first."""
        return [{"role": "user", "content": f"""Answer a question about a database with one SQLite query.
\n# Database\n{schema_text(self.files[problem.domain], self.schema_chars)}
\n# Instructions\n{instructions}
\n# Question\n{problem.evidence}\n{problem.question}
\nThink first if it helps. Then write the query, and nothing but the query, between <answer> and </answer>."""}]

    def grade(self, problem: Problem, response: str) -> Grade:
        """BIRD's verdict on the query in `response`; a response without one is wrong."""
        return self.grade_many([(problem, response)])[0]

    def grade_many(self, pairs: list[tuple[Problem, str]], progress: str = "") -> list[Grade]:
        """`grade` of every (problem, response), side by side; identical queries to a problem run once."""
        jobs = [(str(self.files[p.domain]), extract_sql(response) or "", p.gold) for p, response in pairs]
        return match_many(jobs, self.timeout, progress)

    def edit_chat(self, instructions: str, summary: list[Answer]) -> list[dict]:
        return edit_messages("a model that writes SQLite queries", instructions, summary, reasoning=self.reasoning)


# ---------------------------------------------------------------------------------------------------------------------
# Questions: MMLU-Redux, SuperGPQA, MMLU-Pro and your own
# ---------------------------------------------------------------------------------------------------------------------
# Every source (a JSONL or CSV file, a folder that `datasets` saved, the hub) becomes a list of records: flat dicts with
# the fields as published and "where" each stands. `choice_problem` or `own_problem` makes problems of them.

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
REDUX, SUPERGPQA, MMLU_PRO = "edinburgh-dawg/mmlu-redux-2.0", "m-a-p/SuperGPQA", "TIGER-Lab/MMLU-Pro"  # on the hub
# What the answer tags must hold, by grader: the letter of the gold option; the same text (white space aside); a number
# within `tolerance`; a text in which the gold one occurs (in any case).
GRADERS = {"choice": "one letter", "exact": "the answer alone", "number": "the number alone", "contains": "the answer"}


@dataclass(frozen=True)
class Question(Problem):
    """A problem that brings its grader along. `tolerance` is absolute and for "number"."""

    grader: str = "choice"
    tolerance: float = 0.0


def read_letter(text: str, n: int) -> str | None:
    """The one letter that `text` says, in upper case, if it is among the first `n`; None for anything else.

    >>> [read_letter(text, 4) for text in ("b", "B.", "(B)", "**B**", "A or B", "B. Paris", "E", "")]
    ['B', 'B', 'B', 'B', None, None, None, None]
    """
    # Only harmless punctuation may stand around the letter: "≠B", "¬B" and "-B" do not say B.
    around = r"""[\s.,:;()\[\]{}*_`'"$]*"""
    found = re.fullmatch(f"{around}([A-Za-z]){around}", text)
    return gold_letter(found[1], n) if found else None


def read_number(text: str) -> float | None:
    """The one number that `text` holds; None if there is none, more than one, or one too large for a float.

    >>> [read_number(text) for text in ("42", "-1,234.50 km", "= $5.", "1/4", "6e-2", "3 or 4", "1.2.3", "ten")]
    [42.0, -1234.5, 5.0, 0.25, 0.06, None, None, None]
    """
    text = text.replace("\N{MINUS SIGN}", "-")
    plain = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
    found = re.search(rf"((?:[-+]\s*)?(?:{plain})(?:[eE][-+]?[0-9]+)?)(?:\s*/\s*([1-9][0-9]*))?", text)
    # Any further digit, also "²" or "½", means that more was said than this one number.
    if not found or any(c.isnumeric() for c in text[: found.start()] + text[found.end() :]):
        return None
    value = float(re.sub(r"[\s,]", "", found[1])) / float(found[2] or 1)
    return value if math.isfinite(value) else None


def gold_letter(value: object, n: int) -> str | None:
    """A published answer, an option's letter or its number counted from 0, as a letter; None if it is neither.

    >>> [gold_letter(value, 4) for value in (1, "1", " b ", "B", 1.0, 4, "E", "1, 3", None, "")]
    ['B', 'B', 'B', 'B', 'B', None, None, None, None, None]
    """
    text = str(value).strip().upper().removesuffix(".0")  # a numeric column with gaps comes back as floats
    return {name: letter for i, letter in enumerate(LETTERS[:n]) for name in (letter, str(i))}.get(text)


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
    choices = record.get("choices") or []
    n = 4 if isinstance(choices, str) else len(choices)  # the raw CSV has the list as text
    return gold_letter(gold_letter(record.get("correct_answer"), 4) or record.get("answer"), n)


def read_rows(path: Path) -> Iterable[dict | bytes]:
    """The rows of a folder that `datasets` saved or of a CSV file, or the lines of a JSONL file."""
    if path.is_dir():
        import datasets

        return datasets.load_from_disk(str(path))
    if path.suffix == ".csv":
        text = path.read_text("utf-8-sig")
        return csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=text.split("\n", 1)[0].count))
    return path.read_bytes().rstrip().split(b"\n")  # splitlines() would also split at U+2028 inside a string


def read_records(rows: Iterable[dict | bytes], source: str, table: str) -> Iterator[dict]:
    """Rows of any source in one form: "question", "answer", "choices" (() for none), "id", "domain", "where".

    `table` is the domain and numbers the ids where a row does not say better. Its other fields stay, but empty ones are
    left out. ValueError names the line.
    """
    for i, row in enumerate(rows, 1):
        where = f"{source}, line {i}"
        try:
            row = json.loads(row) if isinstance(row, bytes) else row
            filled = {name: value for name, value in row.items() if value is not None and str(value).strip()}
            given = next((name for name in ("answer_letter", "answer_index") if name in filled), "answer")
            choices = filled.get("choices", filled.get("options", ()))
            # A CSV has the list as text.
            choices = tuple(map(str, ast.literal_eval(choices) if isinstance(choices, str) else choices))
            yield {"domain": table, **filled, "choices": choices, "answer": filled[given], "where": where,
                   "question": str(filled["question"]).strip(), "id": str(filled.get("id", f"{table}-{i}"))}
        except (AttributeError, KeyError, SyntaxError, TypeError, ValueError) as error:
            need(False, where, f"question, answer and any list of choices ({error!r:.90})", row)


def read_folder(source: str) -> tuple[list[dict], list[dict]]:
    """The records of a local copy: JSONL, CSV files and folders that `datasets` saved, one per subject, at any depth.

    Two lists, to train and to test: folders and files named "test" go to the second, all others to the first.
    "validation" and "dev" hold few-shot examples and are left out, hidden files too.
    """
    root, train, test = Path(source).expanduser().resolve(), list[dict](), list[dict]()
    if not root.exists():
        raise FileNotFoundError(f"--data {source} does not exist; give a file or folder of questions.")
    for file in sorted(files_below(root)):
        path = file.parent if file.name == "state.json" else file  # what marks a folder that `datasets` saved
        names = [Path(name).stem for name in path.relative_to(root.parent).parts]
        hidden = names[-1] in ("validation", "dev") or any(name.startswith(".") for name in names[1:])
        if not hidden and (path != file or file.suffix in (".jsonl", ".csv")):
            table = path.parent.name if names[-1] in ("train", "test") else names[-1].removeprefix("mmlu_")
            (test if "test" in names[1:] else train).extend(read_records(read_rows(path), str(path), table))
    return train, test


def from_hub(name: str) -> list[dict]:
    """The records of a data set of the hub, all its configurations; ConnectionError, one sentence, if that fails."""
    import datasets

    split = "train" if name == SUPERGPQA else "test"  # where its questions are
    try:
        tables = {t: datasets.load_dataset(name, t, split=split) for t in datasets.get_dataset_config_names(name)}
    except Exception as error:  # offline, moved, gated, half a download: datasets raises a dozen kinds
        raise ConnectionError(f"{name}: no download; go online or give --data FOLDER ({error!r:.200}).") from error
    return [record for t, rows in tables.items() for record in read_records(rows, f"{name}, {t}", t)]


def choice_problem(record: dict) -> Question | None:
    """A record of MMLU-Redux, SuperGPQA or MMLU-Pro as a problem of at most four options; None if it is dropped."""
    letter, answer, choices, where = choice_letter(record), record["answer"], record["choices"], record["where"]
    need(choices and gold_letter(answer, 26), where, "choices, and a letter or a number from 0", (answer, choices))
    if letter and len(choices) > 4:
        # Seeded by the question, so that the cut is the same everywhere, whatever else is loaded beside it.
        rng, right = random.Random(ascii(record["question"])), choices[LETTERS.index(letter)]
        wrong = [choice for choice in dict.fromkeys(choices) if choice != right]
        choices = rng.sample(wrong, min(3, len(wrong))) + [right]
        rng.shuffle(choices)
        letter = LETTERS[choices.index(right)]
    problem = Question(record["id"], record["question"], letter, record["domain"], choices=tuple(choices))
    return problem if letter else None


def own_problem(record: dict) -> Question:
    """A line of {"question", "answer"} and, if you like, "choices", "domain", "id", "grader" (else "choice" with
    choices, "number" for a number, "exact" for text) and "tolerance" (else 0); ValueError if they do not fit.

    With choices the answer is the letter of one, its number from 0 or its text, but nothing that fits two of them.
    """
    where, answer, choices, gold = record["where"], record["answer"], record["choices"], str(record["answer"])
    grader = record.get("grader", "choice" if choices else "exact" if isinstance(answer, str) else "number")
    tolerance, fits = record.get("tolerance", 0), grader != "number" or read_number(gold) is not None
    fits = fits and grader in [*GRADERS] and isinstance(tolerance, int | float) and tolerance >= 0
    need(fits, where, f"one of {[*GRADERS]}, an answer like it, tolerance from 0", (grader, answer, tolerance))
    if grader == "choice":
        letters = {gold_letter(answer, len(choices)), *(a for a, c in zip(LETTERS, choices) if c == gold)} - {None}
        need(len(letters) == 1, where, f"the letter, the number from 0 or the text of one of {choices}", answer)
        gold = letters.pop()
    return Question(record["id"], record["question"], gold, record["domain"], "", "", choices, grader, tolerance)


def by_domain(records: list[dict], make: Callable[[dict], Question | None]) -> dict[str, list[Question]]:
    """The problems by domain: SuperGPQA's subfield (its field where a subfield has under 100 questions), MMLU-Pro's
    category, else the record's domain or file. ValueError if an id comes twice in a domain."""
    sizes = Counter(record.get("subfield") for record in records)
    domains: dict[str, dict[str, Question]] = {}
    for record in records:
        topic = record.get("subfield" if sizes[record.get("subfield")] >= 100 else "field") or record.get("category")
        name = re.sub(r"\W+", "_", str(topic or record.get("subject") or record["domain"]).lower()).strip("_")
        if problem := make({**record, "domain": name}):
            first = domains.setdefault(name, {}).setdefault(problem.id, problem)
            need(first is problem, record["where"], f"one file for {name} and every id once in it", problem.id)
    return {name: list(group.values()) for name, group in domains.items()}


class Questions:
    """The tasks "mmlu", multiple choice, and "jsonl", problems of your own (see `own_problem`).

    `path` is a file or folder, see `read_folder`. Unless it has both parts, the last fifth of the sorted domains,
    rounded up, is for testing; a single domain serves both. A domain of both parts is "..._train" in training.
    "mmlu" without a path trains on SuperGPQA, with the path "TIGER-Lab/MMLU-Pro" on that, and tests on MMLU-Redux, from
    the hub. FileNotFoundError if there is no question.
    """

    seed_instructions = "Read the question with care, rule out what cannot be right, and answer exactly what is asked."

    def __init__(self, name: str, path: str | Path | None = None) -> None:
        self.name, source = name, str(path or SUPERGPQA)
        parts = (from_hub(source), from_hub(REDUX)) if source in (SUPERGPQA, MMLU_PRO) else read_folder(source)
        train, test = (by_domain(records, choice_problem if name == "mmlu" else own_problem) for records in parts)
        self.test, self.groups = test, test | {d + "_train" * (d in test): problems for d, problems in train.items()}
        if not self.groups:
            raise FileNotFoundError(f"{source} holds no usable question in .jsonl or .csv files or saved `datasets`.")

    def domains(self, split: str) -> list[str]:
        """The sorted domains of "train", "test" or "all"."""
        return split_names(self.groups, split, self.test)

    def problems(self, domain: str) -> list[Question]:
        """The problems of one domain; ValueError names the domains if this is none."""
        need(domain in self.groups, self.name, f"one of the domains {', '.join(sorted(self.groups))}", domain)
        return self.groups[domain]

    def solve_chat(self, instructions: str, problem: Question) -> list[dict]:
        """One user message: its role, the editable instructions, the question, what the tags must hold."""
        options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, problem.choices))
        content = f"""You answer questions on {problem.domain.replace('_', ' ')}.
\n{instructions}
\nQuestion: {problem.question}{options}
\nThink briefly, then end with {GRADERS[problem.grader]} in tags: <answer>...</answer>. Only the tags are read."""
        return [{"role": "user", "content": content.encode("utf-8", "replace").decode()}]  # lone surrogates: see `cut`

    def grade(self, problem: Question, response: str) -> Grade:
        """By the problem's own grader, on what stands in the last answer tags."""
        answer = extract_tag(response, "answer")
        if answer is None:
            return Grade(False, "", "There is no closed pair of <answer> tags.")
        if problem.grader == "choice":
            letter, options = read_letter(answer, len(problem.choices)), dict(zip(LETTERS, problem.choices))
            if letter is None:
                return Grade(False, answer, "The tags must hold the letter of one option and nothing else.")
            wrong = f"{letter} is {options[letter]!r}; the right option, {problem.gold}, is {options[problem.gold]!r}."
            return Grade(letter == problem.gold, letter, "" if letter == problem.gold else wrong)
        if problem.grader == "number":
            value, gold = read_number(answer), read_number(problem.gold)
            right = value is not None and abs(value - gold) <= problem.tolerance + 1e-9 * abs(gold)  # 0.4 is 0.3 + 0.1
            return Grade(right, answer, "" if value is not None else "The tags must hold one number, no other digit.")
        said, gold = " ".join(answer.split()), " ".join(problem.gold.split())
        return Grade(gold.casefold() in said.casefold() if problem.grader == "contains" else gold == said, answer)

    def edit_chat(self, instructions: str, summary: list[Answer]) -> list[dict]:
        """See `edit_messages`."""
        return edit_messages("a model that answers questions, by a letter if it has options", instructions, summary)


# ---------------------------------------------------------------------------------------------------------------------
# Finding a task by its name
# ---------------------------------------------------------------------------------------------------------------------


def load_task(name: str, path: str | Path | None = None):
    """The task of that name: "mini" needs no path, "mmlu" takes the hub without one; "bird" and "jsonl" need theirs.

    >>> load_task("mini").domains("train")[:2]
    ['train000', 'train001']
    """
    remedies = {"mini": "", "bird": BIRD_REMEDY, "mmlu": "", "jsonl": "a JSONL file"}  # where a path must be given
    if name not in remedies:
        raise ValueError(f"No task {name!r}; choose {', '.join(remedies)}, or pass an object of your own to evolve().")
    if remedies[name] and path is None:
        raise ValueError(f"Task {name!r} needs --data: {remedies[name]}.")
    return Mini() if name == "mini" else Bird(path) if name == "bird" else Questions(name, path)
