"""Verdicts per second on the real questions, 8 repeated predictions each, against a plain evaluator. Run by hand.

    python tests/bench_sql.py [rounds]

The two alternate in one run. The plain evaluator opens a read-only connection for the prediction and one for gold and
compares sets; it has no time limit and no sandbox. "cold" forgets every gold result first, "warm" keeps them.
"""

import json
import os
import sqlite3
import statistics
import sys
import time
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import data

SHARED = Path(__file__).parents[1].parent / "shared" / "data"


def plain(path: Path, predicted: str, gold: str) -> bool:
    results = []
    for sql in (predicted, gold):
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            try:
                results.append(set(connection.execute(sql).fetchall()))
            except sqlite3.Error:
                return False
    return results[0] == results[1]


def main(rounds: int) -> None:
    golds = []
    for folder in ("bird", "spider", "kaggledbqa"):
        base = SHARED / folder / "dev_databases"
        for entry in json.loads((SHARED / folder / "dev.json").read_text()):
            golds.append((base / entry["db_id"] / f"{entry['db_id']}.sqlite", entry["SQL"]))
    repeated = [(path, gold, gold) for path, gold in golds for _ in range(8)]
    # eight texts that differ: nothing to save but the gold result
    distinct = [(path, f"{gold.rstrip().rstrip(';')} -- {i}", gold) for path, gold in golds for i in range(8)]

    def cold(jobs):
        data.gold_result.cache_clear()
        return [grade.correct for grade in data.match_many(jobs)]

    def warm(jobs):
        return [grade.correct for grade in data.match_many(jobs)]

    def reference(jobs):
        return [plain(*job) for job in jobs]

    contenders = {"plain evaluator": reference, "match_many, cold": cold, "match_many, warm": warm}
    print(f"{len(golds)} gold x 8 predictions, {os.cpu_count()} cores; verdicts per second, median of {rounds} rounds")
    data.match_many(repeated[:16])  # the workers start
    for name, jobs in (("identical", repeated), ("all different", distinct)):
        rates = {contender: [] for contender in contenders}
        verdicts = {}
        for _ in range(rounds):
            for contender, run in contenders.items():
                start = time.perf_counter()
                verdicts[contender] = run(jobs)
                rates[contender].append(len(jobs) / (time.perf_counter() - start))
        assert len({tuple(v) for v in verdicts.values()}) == 1
        base = statistics.median(rates["plain evaluator"])
        for contender, values in rates.items():
            rate = statistics.median(values)
            spread = f"({min(values):.0f}-{max(values):.0f})"
            print(f"8 predictions, {name:13}  {contender:16} {rate:8.0f} {spread:>15}  {rate / base:5.1f}x")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
