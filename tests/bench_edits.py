"""Several edits of a node per round, at equal numbers of solver answers: `--edits` P = 1, 2, 4 on the miniature.

    python tests/bench_edits.py         results/edits.csv and a table: about five minutes of one core

A round costs k + P x holdout answers, so more edits per round mean fewer rounds. Test accuracy on 32 unseen domains,
each averaged over 3 seeds, ± s.e. over domains; the difference from P = 1 is paired. "noisy": the editor samples at
temperature 1 with nothing cut off, as in training, and many of its edits hurt.
"""

from __future__ import annotations

import csv
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests" / "results"
sys.path.insert(0, str(ROOT))

import data
import evolve

SEEDS = 3
NOISY = dict(editor_temperature=1.0, top_p=1.0, top_k=0)
SHORT = ((1, 10), (2, 6), (4, 3))  # (P, rounds): 128, 128 and 116 answers per tree
LONG = ((1, 25), (2, 15), (4, 8))  # 308, 308 and 296


@dataclass
class Line:
    """Of the table and of the CSV file."""

    editor: str
    sampling: str
    edits: int
    rounds: int
    answers: int  # of the solver per tree, the test left out
    test: float
    error: float
    gain: float  # over one edit per round
    gain_error: float
    seconds: int  # of one core


def measure(task, solver, editor, s) -> tuple[list[float], int]:
    """(test accuracy of each domain, a mean over seeds; solver answers per tree)."""
    domains = task.domains("test")
    rows = []
    answers = 0
    for seed in range(SEEDS):
        own = replace(s, seed=seed)
        before = solver.usage.answers
        trees = evolve.seed_trees(task, domains, solver, own)
        evolve.evolve_all(task, trees, solver, editor, own, s.search, stop=False)
        answers += solver.usage.answers - before
        tests = evolve.final_test(task, trees, solver, own)
        rows.append([fmean(best) for _, best in tests.values()])
    accuracies = [fmean(of_seeds) for of_seeds in zip(*rows)]
    return accuracies, round(answers / SEEDS / len(domains))


def main() -> None:
    torch.set_num_threads(1)
    task = data.Mini()
    solver = evolve.load_model(evolve.MINIATURE / "base")
    lines = []
    print("| editor | sampling | P | rounds | answers | test | minus P = 1 | seconds |\n" + "|---" * 8 + "|")
    for name in ("base", "editor"):
        editor = evolve.load_model(evolve.MINIATURE / name)
        for sampling, plans in (("default", SHORT), ("default", LONG), ("noisy", LONG)):
            single: list[float] = []  # accuracies with P = 1
            for edits, rounds in plans:
                changes = NOISY if sampling == "noisy" else {}
                s = evolve.with_presets(evolve.Settings(rounds=rounds, edits=edits, **changes))
                started = time.process_time()
                accuracies, answers = measure(task, solver, editor, s)
                single = single or accuracies
                test, error = evolve.mean_error(accuracies)
                differences = [a - b for a, b in zip(accuracies, single)]
                gain, gain_error = evolve.mean_error(differences)
                numbers = [round(x, 4) for x in (test, error, gain, gain_error)]
                seconds = round(time.process_time() - started)
                line = Line(name, sampling, edits, rounds, answers, *numbers, seconds)
                lines.append(line)
                print(
                    f"| {name} | {sampling} | {edits} | {rounds} | {answers} | {test:.3f} ± {error:.3f} "
                    f"| {gain:+.3f} ± {gain_error:.3f} | {seconds} |",
                    flush=True,
                )
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / "edits.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(lines[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(line) for line in lines)


if __name__ == "__main__":
    main()
