"""Text-to-SQL: verdicts, hostile queries, the worker processes, the prompts and the loader."""

import hashlib
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

import data
from data import Answer, Bird, edit_messages, execution_match, extract_sql, match_many, shorten, untagged_sql

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real databases in ../shared/data")
LINUX = sys.platform.startswith("linux")


def make_db(path: Path, script: str = "") -> Path:
    """Three small tables with NULLs, duplicates, text numbers and reals; `script` adds to them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("""
            CREATE TABLE singer (id INTEGER PRIMARY KEY, singer_name TEXT, age INTEGER, score REAL);
            INSERT INTO singer VALUES (1, 'Ann', 20, 1.0), (2, 'Bob', 30, 2.5), (3, 'Cy', NULL, NULL),
                (4, 'Ann', 20, 7);
            CREATE TABLE song (song_id INTEGER, title TEXT, singer_id INTEGER REFERENCES singer (id));
            INSERT INTO song VALUES (1, 'a  b', 1), (2, 'a b', 2), (3, '1', 2);
            CREATE TABLE "odd ""name" ("a column" BLOB);
            INSERT INTO "odd ""name" VALUES (x'00ff');
        """ + script)
        connection.commit()
    return path


@pytest.fixture(scope="module")
def db(tmp_path_factory):
    return make_db(tmp_path_factory.mktemp("db") / "pop.sqlite")


# -- the verdict ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predicted", "gold", "right"),
    [
        ("SELECT id FROM singer ORDER BY id DESC", "SELECT id FROM singer", True),  # order
        ("SELECT singer_name FROM singer", "SELECT DISTINCT singer_name FROM singer", True),  # duplicates
        ("SELECT 1.0", "SELECT 1", True),
        ("SELECT '1'", "SELECT 1", False),
        ("SELECT 0.1 + 0.2", "SELECT 0.3", False),  # no tolerance
        ("SELECT NULL", "SELECT age FROM singer WHERE id = 3", True),
        ("SELECT ''", "SELECT NULL", False),
        ("SELECT 1, 2", "SELECT 2, 1", False),  # column order
        ("SELECT 1", "SELECT 1, 1", False),  # column count
        ("SELECT id FROM singer WHERE 0", "SELECT title, song_id FROM song WHERE 0", True),  # both empty
        ("SELECT id FROM singer WHERE 0", "SELECT id FROM singer", False),
        ("SELECT id FROM singer", "SELECT id FROM singer WHERE 0", False),
        ("SELECT id FROM singer WHERE id < 4", "SELECT id FROM singer", False),  # a part of gold
        ("SELECT id FROM singer UNION SELECT 9", "SELECT id FROM singer", False),  # gold and more
        ("SELECT x'61'", "SELECT 'a'", False),  # bytes are not text
        ("SELECT 9007199254740993", "SELECT 9007199254740992.0", False),
        ("  select ID from SINGER ; -- done\n", "SELECT id FROM singer", True),
        ("WITH t AS (SELECT * FROM singer) SELECT id FROM t", "SELECT id FROM singer", True),
        ("VALUES (1), (2), (3), (4)", "SELECT id FROM singer", True),
        ("SELECT title FROM song WHERE title = 'a b'", "SELECT title FROM song WHERE title = 'a  b'", False),
        ("SELECT 'A'", "SELECT 'a'", False),
        ("", "SELECT id FROM singer WHERE 0", False),  # no query is no answer, even where gold is empty
        ("-- nothing", "SELECT id FROM singer WHERE 0", False),
    ],
)
def test_verdict(db, predicted, gold, right):
    grade = execution_match(db, predicted, gold)
    assert grade.correct is right, grade
    assert bool(grade.feedback) is not right


def test_white_space_in_gold_is_never_folded(db):
    """Two golds that differ only in white space inside a literal have two results, in either order of asking."""
    for title in ("a  b", "a b"):
        assert execution_match(db, f"SELECT '{title}'", f"SELECT title FROM song WHERE title = '{title}'").correct


@pytest.mark.parametrize("name", ["we?ird.sqlite", "a#b.sqlite", "100%41.sqlite", "sp ace & ü'\".sqlite", "?mode=rwc"])
def test_any_file_name(tmp_path, name):
    path = make_db(tmp_path / name)
    assert execution_match(path, "SELECT count(*) FROM singer", "SELECT 4").correct
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


def test_missing_database_is_an_error_and_is_not_made(tmp_path):
    with pytest.raises(FileNotFoundError):
        execution_match(tmp_path / "no.sqlite", "SELECT 1", "SELECT 1")
    assert not list(tmp_path.iterdir())


def test_rows_still_in_a_write_ahead_log_count(tmp_path):
    path = make_db(tmp_path / "wal.sqlite")
    with closing(sqlite3.connect(path)) as writer:
        writer.execute("PRAGMA journal_mode = wal")
        writer.execute("INSERT INTO singer VALUES (5, 'Dee', 1, 1)")
        writer.commit()
        assert execution_match(path, "SELECT 5", "SELECT count(*) FROM singer").correct


def test_failing_gold_is_wrong_and_named(db):
    grade = execution_match(db, "SELECT 1", "SELECT x FROM nowhere")
    assert not grade.correct and "gold SQL fails" in grade.feedback and "nowhere" in grade.feedback
    assert data.gold_result(str(db), "SELECT x FROM nowhere", 30.0).error == "no such table: nowhere"


# -- hostile and broken queries ---------------------------------------------------------------------------------------

COUNT = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c)"
CROSS = "FROM singer a, singer b, singer c, singer d, singer e, singer f, singer g, singer h, singer i, singer j"
CATALOGUE = [  # (query, part of the feedback or None where the verdict is right); {dir} is the folder of the database
    ("DELETE FROM singer", "DELETE"),
    ("DROP TABLE singer", "DROP"),
    ("UPDATE singer SET age = 1", "UPDATE"),
    ("INSERT INTO singer VALUES (9, 'x', 1, 1)", "INSERT"),
    ("INSERT INTO singer SELECT 9, 'x', 1, 1 RETURNING id", "not authorized"),
    ("REPLACE INTO singer VALUES (1, 'x', 1, 1)", "not authorized"),
    ("CREATE TABLE evil (x)", "CREATE"),
    ("CREATE TEMP TABLE evil AS SELECT 1", "CREATE"),
    ("CREATE TEMP TRIGGER t AFTER INSERT ON singer BEGIN SELECT 1; END", "not authorized"),
    ("CREATE VIRTUAL TABLE v USING fts5(x)", "not authorized"),
    ("ALTER TABLE singer RENAME TO x", "ALTER"),
    ("WITH x AS (SELECT 1) DELETE FROM singer", "DELETE"),
    ("ATTACH '{dir}/evil.sqlite' AS evil", "not authorized"),
    ("ATTACH 'file:{dir}/evil.sqlite?mode=rwc' AS evil", "not authorized"),
    ("DETACH main", "not authorized"),
    ("VACUUM", "VACUUM|COMMAND"),
    ("VACUUM INTO '{dir}/evil.sqlite'", "authorization denied"),
    ("REINDEX", "no query"),
    ("ANALYZE", "not authorized"),
    ("BEGIN EXCLUSIVE", "not authorized"),
    ("SAVEPOINT s", "not authorized"),
    ("PRAGMA writable_schema = 1", "PRAGMA"),
    ("PRAGMA journal_mode = wal", "PRAGMA"),
    ("PRAGMA temp_store_directory = '{dir}'", "not authorized"),
    ("SELECT * FROM pragma_database_list", "not authorized"),
    ("SELECT load_extension('{dir}/evil')", "not authorized"),
    ("SELECT readfile('{dir}/secret')", "no such function|not authorized"),
    ("SELECT writefile('{dir}/evil', 'x')", "no such function|not authorized"),
    ("SELECT edit('x', 'touch {dir}/evil')", "no such function|not authorized"),
    ("SELECT fts3_tokenizer('simple', x'4141414141414141')", "not authorized|no such function"),
    ("SELECT count(*) FROM singer; DROP TABLE singer", "one statement"),
    ("SELECT count(*) FROM singer; SELECT count(*) FROM singer", "one statement"),
    ("SELECT length(zeroblob(1000000000))", "returned"),
    ("SELECT zeroblob(1000000000)", "out of memory|too big"),
    ("SELECT randomblob(1000000000)", "out of memory|too big"),
    ("SELECT length(hex(zeroblob(400000000)))", "out of memory|too big"),
    ("SELECT replace(hex(zeroblob(20000000)), '0', '0123456789')", "out of memory|too big"),
    ("SELECT printf('%.*c', 900000000, 'x')", "timeout|out of memory|too big"),
    ("SELECT length(printf('%900000000d', 1))", "out of memory|too big"),
    ("SELECT a.x, a.x, a.x, a.x, a.x, a.x, a.x, a.x FROM (SELECT hex(zeroblob(9000000)) AS x) a", "out of memory"),
    ("SELECT char(128512) || hex(zeroblob(15000000))", "out of memory"),  # four bytes a character in Python
    ("SELECT replace(hex(zeroblob(5000000)), '00', 'a') || char(128512)", "out of memory|returned"),
    (f"{COUNT} SELECT group_concat(hex(zeroblob(1000))) FROM c", "out of memory|too big|timeout"),
    (f"{COUNT} SELECT json_group_array(x) FROM c", "out of memory|too big|timeout"),
    (f"{COUNT} SELECT x FROM c", "query returned"),  # endless rows, refuted at the first
    (f"{COUNT} SELECT 4 FROM c", "timeout"),  # endless rows, every one right so far
    (f"{COUNT} SELECT 5 FROM c WHERE x < 3", "query returned"),  # refuted, then endless
    (f"{COUNT} SELECT count(*) FROM c", "timeout"),
    (f"{COUNT} SELECT x FROM c ORDER BY x DESC", "timeout|full|I/O"),
    (f"{COUNT} SELECT DISTINCT x, hex(zeroblob(100)) FROM c WHERE x < 0", "timeout|memory"),
    (f"SELECT count(*) {CROSS}, singer k, singer l, singer m, singer n, singer o", "timeout"),
    (f"SELECT a.id {CROSS}, singer k, singer l ORDER BY random()", "timeout|full|I/O|memory"),
    ("SELECT count(*) FROM singer WHERE hex(zeroblob(50000)) LIKE '" + "%0" * 20 + "1'", "timeout|returned"),
    ("SELECT hex(zeroblob(50000)) GLOB '" + "*0" * 40 + "1'", "timeout|returned"),
    ("SELECT length(replace(hex(zeroblob(9000000)), '0', ''))", "returned"),
    ("SELECT instr(hex(zeroblob(9000000)), hex(zeroblob(4500000)) || '1')", "timeout|returned"),
    ("SELECT abs(-9223372036854775808)", "integer overflow"),
    ("SELECT " + "(" * 5000 + "1" + ")" * 5000, "SQL error|syntax error"),
    ("SELECT 1" + " + 1" * 100_000, "SQL error"),
    ("SELECT 1 WHERE 1 IN (" + "1," * 400_000 + "1)", "returned"),
    ("SELECT " + "x" * 1_000_000, "no such column"),
    ("SELECT \x00 4", "null character"),
    ("SELECT 4 -- \ud800", "surrogates"),
    ("SELECT '\ud83d\ude00'", "surrogates"),
    ("\ufeffSELECT", "SQL error"),
    ("SELECT 'open", "SQL error"),
    ("```", "SQL error|syntax error"),
    ("I do not know.", "syntax error"),
    ("", "no query"),
    (";", "no query"),
    ("/* */", "no query"),
    ("SELECT ?", "binding|returned|supplied"),
    ("SELECT :x", "binding|returned|supplied"),
    ("SELECT raise(abort, 'x')", "RAISE|error"),
    ("EXPLAIN SELECT count(*) FROM singer", "query returned"),
    ("SELECT count(*) FROM singer", None),
    ("SELECT count(*) FROM singer ; ", None),
    ("/* DROP TABLE */ SELECT 4 -- ; DELETE", None),
    ("WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 4) SELECT max(x) FROM c", None),
    ("SELECT 4 FROM sqlite_master", None),
    ("SELECT length(hex(zeroblob(1000000))) / 500000", None),
]


def status_kib(pid: int, field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


def children() -> set[int]:
    """The worker processes of this process and the children that they forked for a query."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    workers = {pid for pid, parent in parents.items() if parent == os.getpid()}
    return workers | {pid for pid, parent in parents.items() if parent in workers}


def stop_workers() -> None:
    while data.IDLE:
        worker = data.IDLE.pop()
        worker.kill()
        worker.wait()


class PeakMemory(threading.Thread):
    """The largest resident memory of this process and its workers together, in MiB, read every 2 ms."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.running = 0.0, True

    def now(self) -> float:
        total = 0
        mine = Path(f"/proc/{os.getpid()}/cmdline").read_bytes()
        for pid in [os.getpid(), *children()]:
            try:
                if pid != os.getpid() and Path(f"/proc/{pid}/cmdline").read_bytes() == mine:
                    continue  # between fork and exec: it is this process's own memory, seen twice
                total += status_kib(pid, "VmRSS")
            except (OSError, TypeError):  # ended meanwhile
                pass
        return total / 1024

    def run(self):
        while self.running:
            self.peak = max(self.peak, self.now())
            time.sleep(0.002)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.running = False
        self.join()


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_hostile_catalogue(tmp_path):
    """Every query has its outcome in time and in memory; the file and its folder stay as they were."""
    gold = "SELECT count(*) FROM singer"
    path = make_db(tmp_path / "pop.sqlite")
    (tmp_path / "secret").write_text("secret")
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    stop_workers()
    idle = PeakMemory().now()  # without any worker: what a worker takes for itself counts too
    seen = []
    for sql, expected in CATALOGUE:
        sql = sql.replace("{dir}", str(tmp_path))
        limit = 0.6 if "timeout" in (expected or "") else 30.0  # a busy machine must not make a timeout of an error
        with PeakMemory() as memory:
            start = time.monotonic()
            grade = execution_match(path, sql, gold, timeout=limit)
            took = time.monotonic() - start
        seen.append((took - limit, memory.peak - idle, sql[:60].encode("ascii", "replace").decode()))
        if expected is None:
            assert grade.correct and grade.feedback == "", (sql[:80], grade.feedback)
        else:
            assert not grade.correct and re.search(expected, grade.feedback), (sql[:80], grade.feedback)
        assert len(grade.feedback.encode()) < 2000
        assert execution_match(path, "SELECT 4", gold).correct  # gold is untouched
    slowest, fattest = max(seen), max(seen, key=lambda row: row[1])
    print(f"\n{len(seen)} queries; the slowest took its limit and {slowest[0]:.2f} s: {slowest[2]}")
    print(f"peak {fattest[1]:.0f} MiB above idle: {fattest[2]}")
    assert len(seen) >= 40
    assert slowest[0] < 1
    assert fattest[1] < 200
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pop.sqlite", "secret"]


def test_a_large_gold_result_is_no_memory_error(db):
    """The 96 MiB of a prediction come on top of its gold result, and it keeps no second copy of that."""
    big = f"{COUNT} SELECT x, 'row number ' || x || hex(zeroblob(600)) FROM c LIMIT 100000"
    assert execution_match(db, big, big).correct
    assert not execution_match(db, big.replace("100000", "99999"), big).correct
    assert execution_match(db, "SELECT 1", "SELECT 1").correct


# -- feedback ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sql", "parts"),
    [
        ("SELECT singer_nam FROM singer", ["no such column: singer_nam", "nearest: ", "singer.singer_name"]),
        ("SELECT T1.titel FROM song AS T1, singer", ["no such column: T1.titel", "nearest: song.title"]),
        ("SELECT T1.title FROM singer AS T1", ["no such column: T1.title", "nearest: song.title"]),
        ("SELECT 1 FROM singers", ["no such table: singers", "nearest: singer"]),
        ("SELECT 1 FROM zzzz", ["no such table: zzzz", "nearest: none"]),
        ("SELECT id FROM singer WHERE\n  id = = 3", ["syntax error", "line 2, column", "near ="]),
        ("SELECT id,, age FROM singer", ['near ",": syntax error']),
        ("DELETE FROM singer", ["not a single SELECT but DELETE"]),
        ("SELECT nope(1)", ["no such function: nope"]),
        ("SELECT id FROM singer INDEXED BY x", ["SQL error: no such index: x"]),
        ("SELECT id FROM singer, (SELECT id FROM singer)", ["ambiguous column name: id"]),
        ("SELECT id FROM singer", ["returned (1,), which is wrong", "expected 2 distinct rows: (20,), (30,)"]),
        ("SELECT 20", ["returned only 1 of 2 distinct rows: (20,), (30,)"]),
        ("SELECT 1 WHERE 0", ["returned only 0 of 2"]),
        (f"{COUNT} SELECT 1 FROM c WHERE x < 0", ["timeout", "0.3 s"]),
    ],
)
def test_feedback(db, sql, parts):
    limit = 0.3 if "timeout" in parts else 30.0
    feedback = execution_match(db, sql, "SELECT DISTINCT age FROM singer WHERE age > 0", limit).feedback
    assert all(part in feedback for part in parts), feedback


def test_feedback_is_short_for_wide_and_long_values(db):
    wide = "SELECT " + ", ".join(["hex(zeroblob(100000))"] * 500) + " FROM singer"
    grade = execution_match(db, wide, wide.replace("500", "499") + " WHERE 0")
    assert not grade.correct and len(grade.feedback) < 1000


@pytest.mark.parametrize(
    ("response", "sql"),
    [
        ("<answer>SELECT 1;</answer>", "SELECT 1;"),
        ("<think><answer>SELECT 0</answer></think> so <ANSWER>\nSELECT 1\n</ANSWER>", "SELECT 1"),
        ("<answer>```sql\nSELECT 1\n```</answer>", "SELECT 1"),
        ("<answer>\n```\nSELECT 1\n```\n</answer> ```sql\nSELECT 2```", "SELECT 1"),
        ("```sql\nSELECT 0\n```\nbetter:\n```SQL\nSELECT 1\n```", "SELECT 1"),
        ("```sql\nSELECT 1\n```\nwhich prints\n```\n1\n```", "SELECT 1"),  # the last sql block, not the last block
        ("```sqlite\nSELECT 1```", "SELECT 1"),
        ("```sql SELECT 1```", "SELECT 1"),
        ("<answer>SELECT 1", None),
        ("```sql\nSELECT 1", None),
        ("SELECT 1", None),
        ("", None),
        ("<answer></answer>", ""),
    ],
)
def test_extract_sql(response, sql):
    assert extract_sql(response) == sql


@pytest.mark.parametrize(
    ("response", "sql"),
    [
        ("So:\n```\nSELECT 1\n```\nThat is it.", "SELECT 1"),
        ("```\nsql\nSELECT 1\n```", "SELECT 1"),
        ("```\nSELECT 0\n```\nor\n```\nSELECT 1\n```", "SELECT 1"),
        ("sql\nSELECT 1", "SELECT 1"),
        (" SQL \nSELECT 1\nFROM a", "SELECT 1\nFROM a"),
        ("SELECT 1", None),
        ("```\nSELECT 1", None),
        ("sql is a language", None),
        ("", None),
    ],
)
def test_untagged_sql(response, sql):
    """Read only where there are no tags and no ```sql block, and then it is counted as lenient."""
    assert untagged_sql(response) == sql and extract_sql(response) is None


def test_bird_reads_leniently_judges_strictly_and_says_so(tmp_path):
    task = Bird(make_bird(tmp_path))
    problem = task.problems("a")[1]  # the gold is SELECT 1
    strict, loose = task.grade(problem, "<answer>SELECT 1</answer>"), task.grade(problem, "```\nSELECT 1\n```")
    assert (strict.correct, strict.lenient) == (True, False) and (loose.correct, loose.lenient) == (True, True)
    wrong = task.grade(problem, "sql\nSELECT oops")
    assert (wrong.correct, wrong.lenient, wrong.readable) == (False, True, True) and "no such column" in wrong.feedback
    assert task.grade(problem, "<answer>sql\nSELECT 1</answer>") == strict
    nothing = task.grade(problem, "I do not know.")
    assert (nothing.correct, nothing.lenient, nothing.readable) == (False, False, False)


# -- many verdicts, worker processes ----------------------------------------------------------------------------------


def test_match_many_agrees_with_one_by_one_and_runs_each_query_once(db, monkeypatch):
    golds = [f"SELECT id FROM singer WHERE id > {i}" for i in range(4)]
    jobs = [(db, predicted, gold) for gold in golds for predicted in golds + ["SELECT oops", ""]] * 3
    random.Random(0).shuffle(jobs)
    single = [execution_match(*job) for job in jobs]
    asked, ask = [], data.ask_worker
    monkeypatch.setattr(data, "ask_worker", lambda *request: asked.append(request[:3]) or ask(*request))
    data.gold_result.cache_clear()
    assert match_many(jobs, progress="grading") == single
    assert len(asked) == len(set(asked)) == 4 + 4 * 6  # golds, then the different (prediction, gold)
    assert sum(grade.correct for grade in single) == 3 * 4


def test_where_no_signal_can_end_a_query_the_sandbox_says_what_to_use(db, monkeypatch):
    monkeypatch.delattr(signal, "SIGALRM")
    monkeypatch.setattr(data, "IDLE", [])
    with pytest.raises(OSError, match="use Linux, macOS or WSL"):
        execution_match(db, "SELECT 12345", "SELECT 12345")


def test_a_worker_finds_packages_where_this_process_does(db, tmp_path, monkeypatch):
    """As in a notebook that says sys.path.append: without it every query would "crash SQLite"."""
    seen = tmp_path / "seen"
    (tmp_path / "sitecustomize.py").write_text(f"open({str(seen)!r}, 'w').close()")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(data, "IDLE", [])
    assert execution_match(db, "SELECT 1", "SELECT 1").correct
    assert seen.exists()
    stop_workers()


def test_match_many_of_nothing():
    assert match_many([]) == []


def run_python(code: str, *args: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *args], cwd=ROOT, **pipes)


def gone(pid: int, within: float) -> bool:
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.skipif(not LINUX, reason="reads /proc")
@pytest.mark.parametrize("end", ["normal", "interrupt", "kill"])
def test_no_worker_outlives_its_parent(db, end):
    """A normal exit ends workers at once, Ctrl-C and SIGKILL end a busy one at the time limit of its query."""
    code = (
        "import sys, os, threading, data\n"
        "data.execution_match(sys.argv[1], 'SELECT 1', 'SELECT 1')\n"
        "print(data.IDLE[0].pid, flush=True)\n"
        "if sys.argv[2] != 'normal': data.match_many([(sys.argv[1], sys.argv[3], 'SELECT 1')], timeout=1.5)\n"
    )
    parent = run_python(code, str(db), end, f"{COUNT} SELECT count(*) FROM c")
    worker = int(parent.stdout.readline())
    if end != "normal":
        time.sleep(0.4)
        parent.send_signal(signal.SIGINT if end == "interrupt" else signal.SIGKILL)
    parent.wait(30)
    assert gone(worker, within=1 if end == "normal" else 6)


def test_importing_data_loads_nothing_heavy():
    """The workers import this module: torch there would cost seconds and hundreds of megabytes each."""
    heavy = "{'torch', 'transformers', 'datasets', 'numpy'}"
    assert run_python(f"import data, sys; print({heavy} & set(sys.modules))").communicate()[0] == "set()\n"


# -- real questions ---------------------------------------------------------------------------------------------------


def reference(path: Path, sql: str, steps: int = 5000) -> set | str:
    """The plain evaluator's result: a fresh read-only connection, a set of rows; "error", or "slow" if it is too long.

    A step is 10,000 instructions of SQLite's machine, so that the load of this one decides nothing.
    """
    left = iter(range(steps))
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        connection.set_progress_handler(lambda: next(left, None) is None, 10_000)
        try:
            return set(connection.execute(sql).fetchall())
        except Exception:
            return "slow" if next(left, None) is None else "error"


MUTATIONS = [
    (r"\bDISTINCT\b", ""), (r"\bDESC\b", "ASC"), (r"\bLIMIT 1\b", "LIMIT 2"), (r" = ", " <> "), (r" > ", " >= "),
    (r" < ", " > "), (r"\bCOUNT\(", "SUM("), (r"\bAND\b", "OR"), (r"\bAVG\(", "MAX("), (r"'(\w+)'", r"'\1 '"),
    (r"\b(\d+)\b", r"\1.0"), (r"\b(\d+)\b", r"'\1'"), (r"\bSELECT\b", "SELECT NULL,"), (r"$", " LIMIT 0"), (r"\)", ""),
    (r"^(.*)$", r"SELECT * FROM (\1)"), (r"^(.*)$", r"\1 UNION ALL \1"), (r"\bFROM (\w+)", r"FROM \1_x"), (r"$", ";"),
    (r"\bORDER BY .*$", ""), (r"\bGROUP BY .*$", ""), (r"\bWHERE .*$", ""),
    (r"SELECT (\S+), (\S+) ", r"SELECT \2, \1 "),
]  # fmt: skip


@pytest.fixture(scope="module")
def real():
    """(database file, gold SQL) of all 603 questions."""
    found = []
    for folder in ("bird", "spider", "kaggledbqa"):
        entries = json.loads((SHARED / folder / "dev.json").read_text())
        base = SHARED / folder / "dev_databases"
        found += [(base / e["db_id"] / f"{e['db_id']}.sqlite", e["SQL"]) for e in entries]
    return found


@needs_shared
def test_verdicts_on_real_questions_agree_with_a_plain_evaluator(real):
    rng = random.Random(0)
    sums = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path, _ in real}
    jobs = [(path, gold, gold) for path, gold in real]
    for path, gold in real:
        jobs += [(path, rng.choice([g for p, g in real if p == path]), gold)]
    for path, gold in rng.sample(real, 200):
        fitting = [(old, new) for old, new in MUTATIONS if re.search(old, gold, re.I)]
        jobs += [(path, re.sub(*rule, gold, count=1, flags=re.I | re.S), gold) for rule in rng.sample(fitting, 2)]
    results = {key: reference(*key) for path, *pair in jobs for key in [(path, sql) for sql in pair]}
    quick = [job for job in jobs if "slow" not in (results[job[:2]], results[job[::2]])]
    right = [isinstance(results[job[:2]], set) and results[job[:2]] == results[job[::2]] for job in quick]
    grades = match_many(quick)
    wrong = [(job, grade) for job, grade, want in zip(quick, grades, right) if grade.correct is not want]
    mutated = right[2 * len(real) :]
    print(f"\n{len(real)} gold, {len(quick)} verdicts compared, {len(jobs) - len(quick)} too slow for the reference")
    print(f"{len(mutated)} mutations, {sum(mutated)} of them still right; disagreements: {len(wrong)}")
    assert len(real) == 603 and all(grade.correct for grade in grades[:603])
    assert not wrong, wrong[:3]
    assert len(quick) > 0.97 * len(jobs) and 0.1 < sum(mutated) / len(mutated) < 0.9
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == sums[path] for path in sums)


# -- the task -------------------------------------------------------------------------------------------------------


def entries(db_id: str, n: int = 2, **more) -> list[dict]:
    return [
        {"db_id": db_id, "question": f"How many {db_id} {i}?", "evidence": f"hint {i}", "SQL": f"SELECT {i}"} | more
        for i in range(n)
    ]


def make_bird(root: Path, kind="dev", names: tuple[str, ...] = ("a", "b"), file="", questions=None) -> Path:
    """A folder as BIRD's archives unpack, with one small database per name."""
    for name in names:
        path = root / f"{kind}_databases" / name / f"{name}.sqlite"
        path.exists() or make_db(path)
    questions = [e for name in names for e in entries(name)] if questions is None else questions
    (root / (file or f"{kind}.json")).write_text(json.dumps(questions))
    return root


@pytest.mark.parametrize("file", ["dev.json", "mini_dev_sqlite.json", "train.json"])
@pytest.mark.parametrize("inside", ["", "dev_20240627", "minidev/MINIDEV"])
def test_layouts(tmp_path, file, inside):
    root = make_bird(tmp_path / inside, file.split(".")[0].split("_")[0].replace("mini", "dev"), file=file)
    databases = next(root.glob("*_databases"))
    assert databases.is_dir()
    for path in (tmp_path, root, root / file, str(root)):
        task = Bird(path)
        assert task.domains("all") == ["a", "b"]
        problem = task.problems("a")[1]
        assert (problem.id, problem.question, problem.gold) == ("1", "How many a 1?", "SELECT 1")
        assert (problem.evidence, problem.domain) == ("hint 1", "a")
        assert task.grade(problem, "<answer>SELECT 1</answer>").correct


def test_one_folder_too_deep_says_what_was_looked_for(tmp_path):
    make_bird(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no mini_dev_sqlite.json or dev.json or train.json: unpack http"):
        Bird(tmp_path / "dev_databases")


def test_links_are_followed(tmp_path):
    """A folder of data is often a link to a bigger disk; a link to a folder above must not go round for ever."""
    make_bird(tmp_path / "disk" / "bird")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "bird").symlink_to(tmp_path / "disk" / "bird")
    (tmp_path / "disk" / "bird" / "round").symlink_to(tmp_path / "disk")
    assert [len(Bird(tmp_path / "data").problems(name)) for name in ("a", "b")] == [2, 2]


def test_a_database_in_two_files_belongs_to_mini_dev(tmp_path):
    make_bird(tmp_path, "dev", file="mini_dev_sqlite.json", questions=entries("a", 3))
    make_bird(tmp_path, "dev")
    assert [len(Bird(tmp_path).problems(name)) for name in ("a", "b")] == [3, 2]


def test_domains_of_both_archives(tmp_path):
    make_bird(tmp_path / "train", "train", ("t1", "t2"))
    make_bird(tmp_path / "dev", "dev", ("d1", "d2"))
    task = Bird(tmp_path)
    assert (task.domains("train"), task.domains("test")) == (["t1", "t2"], ["d1", "d2"])
    assert task.domains("all") == ["d1", "d2", "t1", "t2"]
    with pytest.raises(ValueError, match="'train', 'test' or 'all', found 'dev'"):
        task.domains("dev")


@pytest.mark.parametrize(("n", "held_out"), [(1, 1), (6, 2)])
def test_domains_of_one_archive_hold_out_the_last_fifth(tmp_path, n, held_out):
    names = tuple(f"db{i:02}" for i in range(n))
    for kind in ("train", "dev"):
        task = Bird(make_bird(tmp_path / kind, kind, names))
        assert task.domains("test") == list(names[n - held_out :])
        assert task.domains("train") == list(names[: n - held_out] or names)


ADDRESS = "https://bird-bench.oss-cn-beijing.aliyuncs.com"


def test_other_databases_go_on(tmp_path, capsys):
    """A missing database and a missing field leave their database out, each in one sentence."""
    bad = entries("nosql", 2)
    bad[1]["query"] = bad[1].pop("SQL")
    questions = entries("good") + entries("gone") + bad + entries("typo", evidense="x") + entries("null", evidence=None)
    make_bird(tmp_path, "dev", ("good", "nosql", "typo", "null"), questions=questions)
    task = Bird(tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert task.domains("all") == ["good", "null", "typo"] and len(lines) == 4
    gone, query, nosql, typo = lines
    assert "'gone.sqlite' is missing" in gone and ADDRESS in gone and str(tmp_path / "dev.json") in gone
    assert "left out: 'SQL' is missing" in nosql and "['query'] are unknown" in query
    assert "['evidense'] are unknown" in typo
    for name in ("gone", "nosql"):
        with pytest.raises(ValueError, match=f"one of the databases good, null, typo, found '{name}'"):
            task.problems(name)
    assert task.problems("null")[0].evidence == ""


@pytest.mark.parametrize("text", ["[{", "", "{}", '{"a": 1}', "[1]", "3", b"\xff\xfe\x00"])
def test_broken_json(tmp_path, text, capsys):
    make_bird(tmp_path, "dev", ("a",))
    path = tmp_path / "dev.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="at least one usable database"):
        Bird(tmp_path)
    assert f"{path}: not a JSON list" in capsys.readouterr().err or text == "{}"
    make_bird(tmp_path, "train", ("t",))  # the other archive goes on
    assert Bird(tmp_path).domains("all") == ["t"]
    assert str(path) in capsys.readouterr().err or text == "{}"


def test_nothing_there(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match=f"dev.json.*{ADDRESS}"):
            Bird(path)


def test_byte_order_mark_and_missing_ids(tmp_path):
    questions = entries("a", 1, question_id=7) + entries("a", 1)
    make_bird(tmp_path, "dev", ("a",))
    (tmp_path / "dev.json").write_text(json.dumps(questions), "utf-8-sig")
    assert [p.id for p in Bird(tmp_path).problems("a")] == ["7", "1"]


def test_failing_gold_is_dropped_named_and_counted_once(tmp_path, capsys):
    questions = entries("a") + [{"db_id": "a", "question": "?", "SQL": "SELECT zzz", "question_id": "bad"}]
    task = Bird(make_bird(tmp_path, "dev", ("a", "b"), questions=questions + entries("b", SQL="SELECT zzz")))
    assert [p.id for p in task.problems("a")] == [p.id for p in task.problems("a")] == ["0", "1"]
    error = capsys.readouterr().err
    assert error.count("1 of 3 problems dropped") == 1 and "bad: no such column: zzz" in error
    with pytest.raises(ValueError, match="b.sqlite: expected gold queries that run .*zzz"):
        task.problems("b")


def test_a_file_that_is_no_database(tmp_path):
    questions = entries("a", SQL="SELECT count(*) FROM singer")
    task = Bird(make_bird(tmp_path, "dev", ("a",), questions=questions))
    task.files["a"].write_text("version https://git-lfs.github.com/spec/v1, not a database " * 20)
    with pytest.raises(ValueError, match="a.sqlite: expected gold queries.*train.zip.*file is not a database"):
        task.problems("a")


def test_grade_many_equals_grade(tmp_path):
    task = Bird(make_bird(tmp_path))
    problems = task.problems("a") + task.problems("b")
    responses = ["<answer>SELECT 0</answer>", "```sql\nSELECT 1\n```", "SELECT 1", "<answer>SELECT x</answer>", ""]
    pairs = [(problem, response) for problem in problems for response in responses] * 2
    grades = task.grade_many(pairs, progress="grading")
    assert grades == [task.grade(*pair) for pair in pairs]
    assert sum(grade.correct for grade in grades) == 8
    assert "<answer>" in task.grade(problems[0], "no tags").feedback


def test_solve_chat(tmp_path):
    task = Bird(make_bird(tmp_path))
    problem = task.problems("a")[0]
    chat = task.solve_chat("Be brave.", problem)
    assert [message["role"] for message in chat] == ["user"]
    text = chat[0]["content"]
    parts = ["CREATE TABLE singer", "Be brave.", "hint 0", "How many a 0?", "<answer>"]
    assert [text.index(part) for part in parts] == sorted(text.index(part) for part in parts)
    assert extract_sql(text.split("Think first")[1]) != "SELECT 1"


def test_schema_text(tmp_path):
    """Samples, meanings in three encodings, and the stated cut at every budget."""
    long = "INSERT INTO song VALUES (4, '" + "y" * 500 + "', 1); CREATE VIEW broken AS SELECT * FROM gone;"
    path = make_db(tmp_path / "a" / "a.sqlite", long)
    folder = tmp_path / "a" / "database_description"
    folder.mkdir()
    head = "original_column_name,column_name,column_description,data_format,value_description\n"
    (folder / "Singer.csv").write_bytes(f"{head}singer_name ,name,the singer\u2019s n\u00e4me,text,\n".encode("cp1252"))
    (folder / "song.csv").write_text(head + 'title,title,"words\nof it",text,caf\u00e9\n', "utf-8-sig")
    (folder / 'odd "name.csv').write_text(head + "a column,,wide,blob,\n,,\n", "utf-16")
    full = data.schema_text(path, 10**6)
    assert "-- singer_name: e.g. ('Ann', 'Bob', 'Cy')" in full and "-- age: e.g. (20, 30)" in full
    assert "-- Singer.singer_name: name; the singer\u2019s n\u00e4me" in full
    assert "-- song.title: title; words of it; caf\u00e9" in full
    assert '-- odd "name.a column: wide' in full and "-- a column: e.g. (b'\\x00\\xff',)" in full
    assert "CREATE VIEW broken" in full and "left out" not in full
    lengths = set()
    for limit in range(len(full) + 5, 160, -7):
        text = data.schema_text(path, limit)
        assert len(text) <= limit and (text == full or "left out" in text)
        assert ("e.g." in text) >= ("; " in text)
        lengths.add(len(text))
    assert len(lengths) > 10


def test_edit_chat(tmp_path):
    task = Bird(make_bird(tmp_path))
    summary = [
        Answer("1", "Who?", "long thought", "SELECT 0", "SELECT 1", False, "your query returned"),
        Answer("2", "Where?" * 1000, "cut thought", "", "SELECT 2", False, truncated=True),
        Answer("3", "When?", "", "SELECT 3", "SELECT 3", True),
    ]
    text = task.edit_chat("Old rules." + "x" * 50_000, summary)[0]["content"]
    for part in ("Old rules.", "Who?", "SELECT 0", "SELECT 1", "WRONG", "query returned", "1 of 3 right", "<prompt>"):
        assert part in text
    assert "long thought" not in text and "cut off at the token limit" in text and "cut from 6000 characters" in text
    assert len(text) < (4 + 3 * 5) * 1500
    assert "long thought" in edit_messages("a solver", "I", summary, reasoning=True)[0]["content"]


@pytest.mark.parametrize("limit", [0, 1, 30, 60, 99, 100])
def test_shorten_never_exceeds_its_limit(limit):
    assert len(shorten("x" * 100, limit)) <= limit and (shorten("x" * 100, limit) == "x" * 100) == (limit == 100)


def test_what_is_read_holds_no_lone_surrogate(tmp_path):
    """BIRD's JSON, the text of a database and the descriptions of its columns: whatever they hold can be encoded."""
    questions = [{"db_id": "a", "question": "How \ud800?", "evidence": "\udfff", "SQL": "SELECT '\ud83d'"}]
    root = make_bird(tmp_path, "dev", ("a",), questions=questions)
    odd = "CREATE TABLE odd (x TEXT); INSERT INTO odd VALUES (CAST(x'61eda08062ff' AS TEXT)), (char(55296));"
    make_db(tmp_path / "more.sqlite", odd).replace(root / "dev_databases" / "a" / "a.sqlite")
    folder = root / "dev_databases" / "a" / "database_description"
    folder.mkdir()
    head = b"original_column_name,column_name\n"
    (folder / "odd.csv").write_bytes(head + b"x,half \xed\xa0\x80 a character\n")
    utf16 = (head.decode() + "x,half ").encode("utf-16") + b"\x00\xd8" + "\n".encode("utf-16-le")
    (folder / "utf16.csv").write_bytes(utf16)
    if LINUX:
        Path(os.fsdecode(os.fsencode(folder) + b"/\xff.csv")).write_bytes(head + b"x,what\n")
    task = Bird(root)
    (problem,) = task.problems("a")
    assert (problem.question, problem.evidence, problem.gold) == ("How ??", "?", "SELECT '?'")
    text = task.solve_chat("Be brave.", problem)[0]["content"]
    assert text.encode() and "half" in text and ("-- ?.x: what" in text or not LINUX)
    assert task.grade(problem, "<answer>SELECT '?'</answer>").correct


def test_responses_without_a_query_are_unreadable(tmp_path):
    task = Bird(make_bird(tmp_path))
    problem = task.problems("a")[0]
    for response in ("", "SELECT 0", "<answer>SELECT 0", "<answer></answer>", "<answer>-- SELECT 0</answer>"):
        assert not task.grade(problem, response).readable, response
    for response in ("```sql\nSELECT 0\n```", "<answer>SELECT oops</answer>", "<answer>I do not know.</answer>"):
        assert task.grade(problem, response).readable, response


@pytest.mark.parametrize("sql", ["SELECT '\ud800'", "\udfff", "SELECT 1 \x00", "\x00", "SELECT \ud83d\ude00 FROM \x00"])
def test_hostile_characters_are_wrong_and_crash_no_worker(db, sql):
    """One by one and among others, as a prediction and as gold."""
    assert execution_match(db, "SELECT 1", "SELECT 1").correct
    worker = data.IDLE[-1].pid
    for predicted, gold in ((sql, "SELECT 1"), ("SELECT 1", sql)):
        grade = execution_match(db, predicted, gold)
        assert not grade.correct and grade.answer == predicted and grade.feedback.encode()
    assert data.IDLE[-1].pid == worker  # it lives
    grades = match_many([(db, sql, "SELECT 1"), (db, "SELECT 1", "SELECT 1")])
    assert [grade.correct for grade in grades] == [False, True]


@needs_shared
@pytest.mark.parametrize(("folder", "counts"), [
    ("bird", {"university": 120, "video_games": 152}),
    ("spider", {"car_1": 92, "concert_singer": 45, "pets_1": 42, "world_1": 120}),
    ("kaggledbqa", {"GeoNuclearData": 32}),
])  # fmt: skip
def test_real_folders(folder, counts):
    task = Bird(SHARED / folder)
    assert {name: len(task.problems(name)) for name in task.domains("all")} == counts
    text = task.solve_chat(task.seed_instructions, task.problems(task.domains("test")[0])[0])[0]["content"]
    assert "left out" not in text and text.count("CREATE TABLE") >= 1
