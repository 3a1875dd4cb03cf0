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

import atexit
import contextlib
import csv
import difflib
import faulthandler
import functools
import glob
import io
import json
import logging
import math
import os
import pickle
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path


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
    answer = predicted.encode("utf-8", "replace").decode()  # lone surrogates cannot be logged; the verdict sees them
    ok, expected = gold_result(db_path, gold, timeout)
    if not ok:
        return Grade(False, answer, f"the gold SQL fails: {expected}")
    correct, feedback = _ask_worker(os.path.abspath(db_path), predicted, expected, timeout)
    return Grade(correct, answer, feedback)


def match_many(jobs: list[tuple], timeout: float = 30.0, progress: str = "") -> list[Grade]:
    """`execution_match` of every (db_path, predicted, gold), side by side on all cores; identical jobs are run once.

    `progress` names the progress bar, "" shows none. Gold queries go first: no two threads compute the same one.
    """
    in_parallel(lambda job: gold_result(*job, timeout), [(db, gold) for db, _, gold in jobs])
    return in_parallel(lambda job: execution_match(*job, timeout), jobs, progress)


def gold_result(db_path: str | Path, gold: str, timeout: float = 30.0) -> tuple[bool, bytes | str]:
    """(True, its pickled result) or (False, why it fails), computed once per database file and exact SQL text."""
    db = os.path.abspath(db_path)
    return _gold_result(db, os.stat(db).st_mtime_ns, gold, timeout)


def in_parallel(work: Callable, items: list, progress: str = "") -> list:
    """[work(item) for item in items], equal items once, in a thread per core that waits for a worker of its own."""
    from tqdm import tqdm

    unique = list(dict.fromkeys(items))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPool(min(cores, len(unique)) or 1) as pool:  # its threads are daemons: Ctrl-C need not wait for them
        bar = tqdm(pool.imap(work, unique), desc=progress, total=len(unique), disable=not progress, leave=False)
        results = dict(zip(unique, bar))
    return [results[item] for item in items]


@functools.lru_cache(maxsize=20_000)
def _gold_result(db: str, modified: int, gold: str, timeout: float) -> tuple[bool, bytes | str]:
    """`modified` tells a rewritten file from the old one. `gold` stays as it is: white space counts in its literals."""
    return _ask_worker(db, gold, None, timeout)


@functools.cache
def _idle_workers() -> list[subprocess.Popen]:
    """The worker processes that wait for work, the one list of this process."""
    return []


def _start_worker() -> subprocess.Popen:
    """A fresh interpreter that runs `sql_worker`: not a fork, which is unsafe beside torch's threads and CUDA."""
    here = Path(__file__).resolve()
    code = f"import sys; sys.path.insert(0, {str(here.parent)!r}); import {here.stem} as d; d.sql_worker()"
    # its own session: Ctrl-C is for the parent, which kills its workers at exit (a dead parent closes their stdin);
    # one malloc arena: else the watchdog's thread reserves 64 MiB of address space
    options = {"start_new_session": True, "env": {**os.environ, "MALLOC_ARENA_MAX": "1"}}
    worker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)
    atexit.register(worker.kill)
    if worker.stdout.read(1) != b"+":
        raise RuntimeError(f"the SQL worker did not start: run {sys.executable} -c {code!r} to see why")
    return worker


def _ask_worker(db: str, sql: str, gold: bytes | None, timeout: float) -> tuple[bool, bytes | str]:
    """One request to an idle or a new worker: (verdict, feedback), or without `gold` (ran, pickled result or error)."""
    idle, worker = _idle_workers(), None
    while worker is None or worker.poll() is not None:  # it died, or this is a fork, which must not use its parent's
        try:
            worker = idle.pop()
        except IndexError:
            worker = _start_worker()
    start, finished = time.monotonic(), True
    try:
        pickle.dump((db, sql, gold, timeout), worker.stdin)
        worker.stdin.flush()
        ok, answer, finished = pickle.load(worker.stdout)
        return ok, answer
    except (EOFError, OSError, pickle.UnpicklingError):  # the watchdog ended it, or the query did
        late = time.monotonic() - start >= timeout
        return False, f"timeout: the query ran for more than {timeout:g} s" if late else "the query crashed SQLite"
    finally:
        if finished:
            atexit.unregister(worker.kill)
            with contextlib.suppress(OSError), worker:  # leaving closes its pipes and reaps it
                worker.kill()
        else:
            idle.append(worker)


def sql_worker() -> None:
    """The loop of a worker process: requests from stdin, replies (ok, answer, last) to stdout, until stdin closes.

    Hostile SQL meets four walls. The connection is read-only, and its authorizer allows to read and to call functions,
    nothing else. A C watchdog ends the process at the time limit, even inside one endless function. The address space
    may grow by 96 MiB beyond what the gold result needs (Linux; elsewhere only SQLite's own heap is limited). The
    temporary files of large sorts, which SQLite deletes, stop at 1 GiB.
    """
    import sqlglot  # noqa: F401 - here, so that the first wrong query need not load it within its time limit

    ask, tell, quiet = sys.stdin.buffer, sys.stdout.buffer, open(os.devnull, "w")
    logging.disable()  # sqlglot would warn on stderr
    sqlite3.connect(":memory:").execute(f"PRAGMA hard_heap_limit = {96 << 20}")  # for the whole process
    idle = _grow_by(None)
    tell.write(b"+")
    while True:
        tell.flush()
        try:
            db, sql, gold, timeout = pickle.load(ask)
        except EOFError:
            return
        faulthandler.dump_traceback_later(timeout, exit=True, file=quiet)
        ok, answer = _run_request(db, sql, gold)
        faulthandler.cancel_dump_traceback_later()
        last = _grow_by(None) > idle + (32 << 20)  # the next query must not start from this one's memory
        pickle.dump((ok, answer, last), tell)


def _grow_by(extra: int | None) -> int:
    """Allow `extra` more bytes of address space (None: any) and files of 1 GiB. Returns bytes in use, 0 if unknown."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (hard if extra is None else used + extra, hard))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return used
    return 0


def _run_request(db: str, sql: str, gold: bytes | None) -> tuple[bool, bytes | str]:
    """In the worker: `_ask_worker`'s answer."""
    rows, expected = ({}, "") if gold is None else pickle.loads(gold)
    _grow_by(4 << 30 if gold is None else 96 << 20)
    try:
        refuted, returned = _fetch(db, sql, rows, gold is None)
    except Exception as error:  # sqlite3.Error, MemoryError, a NUL or a lone surrogate in the text: all are just wrong
        _grow_by(None)
        message = cut(str(error), 300) or "out of memory"
        return False, message if gold is None else _explain(db, sql, message)
    if gold is None:
        return True, pickle.dumps((rows, returned))
    correct = not refuted and all(rows.values())
    return correct, "" if correct else f"your query returned {returned}; expected {expected}"


def _fetch(db: str, sql: str, rows: dict[tuple, bool], is_gold: bool) -> tuple[bool, str]:
    """Enter the rows of gold into `rows` as False; mark there as True those that a prediction returns.

    A row that is not there refutes the prediction and ends the reading: no memory is needed beyond the gold result.
    Returns (refuted, the rows in words).
    """
    shown, refuted = [], False
    with contextlib.closing(_open_readonly(db)) as connection:
        connection.set_authorizer(_authorize)
        cursor = connection.execute(sql)
        if cursor.description is None:
            raise sqlite3.ProgrammingError("no query found, it belongs between <answer> and </answer>")
        try:
            for row in cursor:
                if len(shown) < 5:
                    shown.append(_brief(row))
                if is_gold or row in rows:
                    rows[row] = not is_gold
                elif not refuted:  # wrong; a few more rows, if they come at once, make the better feedback
                    refuted, soon = True, time.monotonic() + 0.2
                    connection.set_progress_handler(lambda: time.monotonic() > soon, 1000)
                if refuted and len(shown) == 5:
                    break
        except sqlite3.Error:
            if not refuted:
                raise
    n = len(rows) if is_gold else sum(rows.values())
    count = "rows such as" if refuted else f"{n} distinct row{'s' * (n != 1)}:"
    return refuted, f"{count} {cut(', '.join(shown), 400)}{', ...' * (len(shown) == 5)}" if shown else "no rows"


def _open_readonly(db: str) -> sqlite3.Connection:
    """`immutable` takes no locks and makes no files; a database with a live log beside it is opened without it."""
    live = any(os.path.exists(db + end) and os.path.getsize(db + end) for end in ("-wal", "-journal"))
    uri = Path(db).as_uri() + "?mode=ro" + ("" if live else "&immutable=1")  # as_uri escapes ?, # and %
    return sqlite3.connect(uri, uri=True, isolation_level=None)


def _authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    """SQLite asks once per table, column and function while it compiles a query."""
    allowed = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE)
    harmless = action == sqlite3.SQLITE_FUNCTION and second.lower() not in ("load_extension", "fts3_tokenizer")
    return sqlite3.SQLITE_OK if action in allowed or harmless else sqlite3.SQLITE_DENY


def _brief(row: tuple) -> str:
    """A result row in at most about 400 characters, without a copy of a huge value.

    >>> _brief((1, None, "x" * 10**6))[:30]
    "(1, None, 'xxxxxxxxxxxxxxxxxxx"
    """
    values = [repr(v[:40]) + "..." * (len(v) > 40) if isinstance(v, (str, bytes)) else repr(v) for v in row[:8]]
    return f"({', '.join(values)}{', ...' * (len(row) > 8)})"


def _explain(db: str, sql: str, error: str) -> str:
    """SQLite's `error` for the editor: not a SELECT, a syntax error with its place, an unknown name and the nearest."""
    import sqlglot
    from sqlglot import exp

    try:
        trees = [tree for tree in sqlglot.parse(sql[:20_000], read="sqlite") if tree]
    except Exception as e:  # sqlglot also gives up on stray quotes, deep nesting and some queries that SQLite can read
        if not getattr(e, "errors", ()) or not re.search("syntax error|incomplete input", error):
            return f"SQL error: {error}"
        at = e.errors[0]
        place = f"line {at['line']}, column {at['col']}, near {at['highlight'][:80]!r}"
        return f"syntax error at {place}: {at['description'].split(' but got <')[0].rstrip('.')} (SQLite: {error})"
    if trees and (len(trees) > 1 or not isinstance(trees[0], exp.Query)):
        kinds = ", ".join(tree.key.upper() if tree.key in sql.lower() else sql.split()[0][:40] for tree in trees[:5])
        return f"not a single SELECT but {kinds}: a query can only read (SQLite: {error})"
    kind, _, name = error.lower().partition(": ")
    if kind not in ("no such table", "no such column") or not trees:
        return f"SQL error: {error}"
    with contextlib.closing(_open_readonly(db)) as connection:
        pairs = "SELECT m.name, c.name FROM sqlite_master m, pragma_table_info(m.name) c WHERE m.type <> 'index'"
        columns = connection.execute(pairs).fetchall()
    owner, _, name = name.rpartition(".")
    used = {table.alias_or_name.lower(): table.name.lower() for table in trees[0].find_all(exp.Table)}
    inside = [used[owner]] if owner in used else used.values()  # a qualifier narrows the search to its table
    real = {t.lower(): t for t, _ in columns}
    if kind == "no such column":
        real = {c.lower(): f"{t}.{c}" for t, c in columns if t.lower() in inside}
    near = difflib.get_close_matches(name[:100], real, 1, 0.4)
    homes = ", ".join(t for t, c in columns if c.lower() == name)
    hint = f"; the nearest is {real[near[0]]}" if near else ""
    return error + hint + (f"; {name} is a column of {homes}" if homes else "")


def extract_sql(response: str) -> str | None:
    """The query of a response: what its last `<answer>` holds, else its last ```sql block, else its last block.

    >>> extract_sql("```sql\\nSELECT 1;\\n``` or <answer>```sqlite\\nSELECT 2\\n```</answer>"), extract_sql("SELECT 3")
    ('SELECT 2', None)
    """
    tagged = extract_tag(response, "answer")
    blocks = re.findall(r"```[ \t]*(sql(?:ite3?)?\b|\w*(?=[ \t]*\n))?(.*?)```", tagged or response, re.DOTALL | re.I)
    sql = [text for language, text in blocks if language.lower().startswith("sql")] or [text for _, text in blocks]
    return sql[-1].strip() if sql else tagged


BIRD_FILES = ("mini_dev_sqlite.json", "dev.json", "train.json")
BIRD_FIELDS = ("db_id", "question", "SQL", "evidence", "question_id", "difficulty")  # the first three are required
BIRD_REMEDY = (
    "get BIRD from https://bird-bench.github.io: https://bird-bench.oss-cn-beijing.aliyuncs.com/train.zip, dev.zip or "
    "minidev.zip there, and unpack the databases beside the questions"
)


def find_bird_files(path: Path) -> list[Path]:
    """The question files in a folder, else up to two levels below, else up to two above; FileNotFoundError if none."""
    if path.is_file():
        return [path.resolve()]
    for level in (".", "*", "*/*", "..", "../.."):
        pattern = os.path.join(glob.escape(str(path)), level)
        files = [file for name in BIRD_FILES for file in sorted(glob.glob(os.path.join(pattern, name)))]
        if files:
            return [Path(file).resolve() for file in files]
    raise FileNotFoundError(f"{path} holds no {' or '.join(BIRD_FILES)}: {BIRD_REMEDY}.")


def column_meanings(folder: Path) -> dict[tuple[str, str], str]:
    """(table, column), lower case -> meaning, from BIRD's `database_description/<table>.csv`; {} without the folder."""
    meanings = {}
    for file in sorted(folder.glob("*.csv")):
        raw = file.read_bytes()
        wide = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
        try:
            text = raw.decode("utf-16" if wide else "utf-8-sig")
        except UnicodeError:  # some were saved by Windows programs
            text = raw.decode("cp1252", "replace")
        for row in csv.DictReader(io.StringIO(text.replace("\0", ""), newline="")):
            row = {k.strip().lower(): " ".join(v.split()) for k, v in row.items() if k and isinstance(v, str)}
            column = row.get("original_column_name", "").lower()
            parts = [row.get(k, "") for k in ("column_name", "column_description", "value_description")]
            kept = [p for p in dict.fromkeys(parts) if p and p.lower() != column]
            meanings[file.stem.lower(), column] = cut("; ".join(kept), 200)
    return meanings


def schema_text(db: Path, limit: int) -> str:
    """The CREATE statements in the file, with sample values and the meanings of columns as comments.

    At most `limit` characters: what does not fit goes in the order meanings, samples, middle, and the text says so.
    """
    meanings = column_meanings(db.parent / "database_description")
    full, sampled, bare = [], [], []  # lines with everything, without meanings, without comments
    with contextlib.closing(_open_readonly(str(db))) as connection:
        connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
        found = connection.execute("SELECT name, sql FROM sqlite_master WHERE type IN ('table', 'view')").fetchall()
        for table, create in [row for row in found if row[1] and not row[0].startswith("sqlite_")]:
            for lines in (full, sampled, bare):
                lines.append(create.strip() + ";")
            with contextlib.suppress(sqlite3.Error):  # a view may be broken
                cursor = connection.execute('SELECT * FROM "{}" LIMIT 100'.format(table.replace('"', '""')))
                rows = cursor.fetchall()
                for i, (column, *_) in enumerate(cursor.description):
                    values = dict.fromkeys(row[i] for row in rows if row[i] is not None)
                    meaning = meanings.get((table.lower(), column.lower()), "")
                    sampled.append(f"-- {column}: e.g. {_brief(tuple(values)[:3])}")
                    full.append(sampled[-1] + f" | {meaning}" * bool(meaning))
    for lines, gone in ((full, ""), (sampled, "meanings"), (bare, "meanings and sample values")):
        text = "\n".join([f"-- left out, the schema is long: {gone} of columns"] * bool(gone) + lines)
        if len(text) <= limit:
            break
    return cut(text, limit)


class Bird:
    """The task "bird": one domain is one database of a folder in BIRD's format.

    `path` holds `train.json` and `train_databases/`, or `dev.json` or `mini_dev_sqlite.json` and `dev_databases/`, with
    `<db>/<db>.sqlite` inside; it may be up to two folders above or below, or the JSON file itself. A database named by
    several files belongs to the first of mini-dev, dev, train. What cannot be used is named in one sentence on stderr
    and left out; ValueError if nothing is left. `schema_chars` bounds the schema in a prompt, `edit_chars` each field
    of a problem in the editor's prompt, which holds the solver's full text if `reasoning`; `timeout` is in seconds.
    """

    name = "bird"
    seed_instructions = (
        "Find the tables and columns that the question and its hint speak of, and how they join. Return exactly the "
        "columns that are asked for, in the order asked, and nothing else."
    )

    def __init__(self, path: str | Path, schema_chars: int = 16_000, edit_chars: int = 1500, reasoning: bool = False,
                 timeout: float = 30.0):  # fmt: skip
        self.schema_chars, self.edit_chars, self.reasoning, self.timeout = schema_chars, edit_chars, reasoning, timeout
        self.files: dict[str, Path] = {}  # database -> its SQLite file
        self.faults: dict[str, str] = {}  # database or question file -> one sentence for a person
        self.train: set[str] = set()  # the databases of the train archive
        self._entries: dict[str, list[tuple[int, dict]]] = {}  # database -> its entries with their place in the file
        self._problems: dict[str, list[Problem]] = {}
        self._schema = functools.cache(schema_text)
        for file in find_bird_files(Path(path)):
            self._read(file)
        if not self.files:
            raise ValueError(f"no usable database under {path}: " + cut(" ".join(self.faults.values()), 1000))
        for sentence in self.faults.values():
            print(f"bird: {sentence}", file=sys.stderr)

    def _read(self, file: Path) -> None:
        """Take the databases of one question file; note in `faults` what is wrong."""
        try:
            entries = json.loads(file.read_text("utf-8-sig"))
            names = {str(entry.get("db_id")) for entry in entries} - set(self.files)
        except (ValueError, AttributeError, TypeError) as error:
            self.faults[str(file)] = f"{file} is not a JSON list of questions ({error}): {BIRD_REMEDY}."
            return
        paths = {db.stem: db for db in sorted(file.parent.glob("*databases/**/*.sqlite"))}
        for db in sorted(names):
            mine = [(i, entry) for i, entry in enumerate(entries) if str(entry.get("db_id")) == db]
            lacks = [(i, f) for i, entry in mine for f in BIRD_FIELDS[:3] if not isinstance(entry.get(f), str)]
            odd = sorted({field for _, entry in mine for field in entry} - set(BIRD_FIELDS))
            if lacks:
                what = f"entry {lacks[0][0]} (db_id {db}) has no text in {lacks[0][1]}, unknown fields: {odd}"
            elif db not in paths:
                what = f"no {db}.sqlite under {file.parent}{os.sep}*databases, so the database {db} is left out"
            else:
                self.files[db], self._entries[db] = paths[db], mine
                self.train |= {db} if file.name == "train.json" else set()
                what = f"the unknown fields {odd} of database {db} are ignored" if odd else ""
            if what:
                self.faults[db] = f"{file}: {what}; the fields are {', '.join(BIRD_FIELDS)}: {BIRD_REMEDY}."

    def domains(self, split: str) -> list[str]:
        """The sorted databases of a split: "train", those of the train archive; "test", of dev or mini-dev; "all".

        A folder that has only one of the two is divided: the last fifth of the names, at least one, is "test" and the
        rest is "train". A single database is both.
        """
        if split not in ("train", "test", "all"):
            raise ValueError(f"no split {split!r}: choose train, test or all")
        names = sorted(self.files)
        train, test = sorted(self.train), sorted(set(names) - self.train)
        if not test or not train:
            first = len(names) - math.ceil(len(names) / 5)
            train, test = names[:first] or names, names[first:]
        return {"train": train, "test": test, "all": names}[split]

    def problems(self, domain: str) -> list[Problem]:
        """Its problems. The first call runs every gold query; those that fail are named on stderr and dropped."""
        if domain in self._problems:
            return list(self._problems[domain])
        if domain not in self.files:
            raise ValueError(self.faults.get(domain, f"no database {domain!r}: choose {', '.join(sorted(self.files))}"))
        problems: dict[str, Problem] = {}
        for i, entry in self._entries[domain]:
            number = str(i if entry.get("question_id") is None else entry["question_id"])
            number += f"#{i}" * (number in problems)  # some files repeat an id
            evidence = str(entry.get("evidence") or "")
            problems[number] = Problem(number, entry["question"], entry["SQL"], domain, evidence=evidence)
        file, golds = self.files[domain], [problem.gold for problem in problems.values()]
        golds = in_parallel(lambda gold: gold_result(file, gold, self.timeout), golds)
        failed = {number: error for number, (ok, error) in zip(problems, golds) if not ok}
        if failed:
            what = f"{len(failed)} of {len(problems)} problems dropped, their gold SQL fails: {cut(str(failed), 1000)}"
            print(f"bird: {file}: {what}", file=sys.stderr)
        if len(failed) == len(problems):
            raise ValueError(f"every gold query fails on {file}: {cut(str(failed), 300)}: {BIRD_REMEDY}.")
        self._problems[domain] = [problem for number, problem in problems.items() if number not in failed]
        return list(self._problems[domain])

    def solve_chat(self, instructions: str, problem: Problem) -> list[dict]:
        """One user message (some chat templates refuse a system message); what a domain shares comes first."""
        hint = f"Hint: {problem.evidence}\n" if problem.evidence else ""
        content = f"""Answer a question about a database with one SQLite query.
\n# Database\n{self._schema(self.files[problem.domain], self.schema_chars)}
\n# Instructions\n{instructions}
\n# Question\n{hint}{problem.question}
\nThink first if it helps. Then write the query between <answer> and </answer>, and nothing but the query: only what
stands between the tags is run."""
        return [{"role": "user", "content": content}]

    def grade(self, problem: Problem, response: str) -> Grade:
        """BIRD's verdict on the query in `response`; a response without one is wrong."""
        return self.grade_many([(problem, response)])[0]

    def grade_many(self, pairs: list[tuple[Problem, str]], progress: str = "") -> list[Grade]:
        """`grade` of every (problem, response), side by side; identical queries to a problem run once."""
        jobs = [(self.files[p.domain], extract_sql(response) or "", p.gold) for p, response in pairs]
        return match_many(jobs, self.timeout, progress)

    def edit_chat(self, instructions: str, summary: list[Answer]) -> list[dict]:
        """See `edit_messages`."""
        role = "a model that answers questions about one SQLite database by writing a query"
        return edit_messages(role, instructions, summary, self.edit_chars, self.reasoning)


# ---------------------------------------------------------------------------------------------------------------------
# Multiple choice: MMLU-Redux, SuperGPQA, MMLU-Pro
# ---------------------------------------------------------------------------------------------------------------------

# ---------------------------------------------------------------------------------------------------------------------
# Your own problems: a JSONL file
# ---------------------------------------------------------------------------------------------------------------------

# ---------------------------------------------------------------------------------------------------------------------
# Finding a task by its name
# ---------------------------------------------------------------------------------------------------------------------
