"""Ties: what a user gets if the oldest of equal nodes is the best one, and if the newest is.

    python tests/bench_ties.py         results/ties.csv and a table: about four minutes of one core

Everything else is the same: 32 test domains of the miniature, UCB with 10 rounds, default sampling, 3 seeds. A tie to
the newest gives a user other instructions although nothing was gained, so three things are counted: the test accuracy,
how many domains end with other instructions than an older node's that scores as much, and their length.
"""

from __future__ import annotations

import csv
import sys
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
OLDEST_FIRST = evolve.EvolutionTree.scored


def newest_first(tree: evolve.EvolutionTree) -> list:
    """The nodes in the order in which `max` takes the newest of equals."""
    return OLDEST_FIRST(tree)[::-1]


@dataclass
class Line:
    """Of the table and of the CSV file."""

    editor: str
    ties: str
    test: float
    error: float
    for_nothing: str  # domains whose instructions were replaced by others that score the same
    tokens: float  # of the best instructions


def measure(task, solver, editor, s) -> tuple[list[float], int, float]:
    """(test accuracy of each domain, a mean over seeds; domains changed for nothing; tokens of the best)."""
    rows = []
    for_nothing = 0
    tokens = []
    for seed in range(SEEDS):
        own = replace(s, seed=seed)
        trees = evolve.seed_trees(task, task.domains("test"), solver, own)
        evolve.evolve_all(task, trees, solver, editor, own, s.search, stop=False)
        tests = evolve.final_test(task, trees, solver, own)
        rows.append([fmean(best) for _, best in tests.values()])
        for tree in trees.values():
            best = tree.best()
            older = [node for node in tree.nodes[: best.id] if node.score == best.score]
            other = [node for node in older if node.instructions != best.instructions]
            for_nothing += bool(other)
            tokens.append(len(solver.tokenizer(best.instructions)["input_ids"]))
    return [fmean(column) for column in zip(*rows)], for_nothing, fmean(tokens)


def main() -> None:
    torch.set_num_threads(1)
    task = data.Mini()
    solver = evolve.load_model(evolve.MINIATURE / "base")
    lines = []
    for name in ("base", "editor"):
        editor = evolve.load_model(evolve.MINIATURE / name)
        s = evolve.with_presets(evolve.Settings())
        scores = {}
        for ties, order in (("oldest", OLDEST_FIRST), ("newest", newest_first)):
            evolve.EvolutionTree.scored = order
            scores[ties], changed, tokens = measure(task, solver, editor, s)
            mean, error = evolve.mean_error(scores[ties])
            share = f"{changed} of {SEEDS * len(scores[ties])}"
            lines.append(Line(name, ties, round(mean, 4), round(error, 4), share, round(tokens, 2)))
        differences = [old - new for old, new in zip(scores["oldest"], scores["newest"])]
        mean, error = evolve.mean_error(differences)
        print(f"{name}: oldest minus newest, paired: {mean:+.4f} ± {error:.4f}")
    with open(RESULTS / "ties.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(lines[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(line) for line in lines)
    print("| editor | ties go to the | test accuracy | changed for nothing | tokens |")
    print("|---|---|---|---|---|")
    for line in lines:
        accuracy = f"{line.test:.3f} ± {line.error:.3f}"
        print(
            f"| {line.editor} | {line.ties} | {accuracy} | {line.for_nothing} | {line.tokens:.1f} |"
        )


if __name__ == "__main__":
    main()
