"""Chain against tree: test accuracy over the rounds of evolution, on the miniature's unseen domains.

    python tests/figure_search.py           results/search.csv, then results/search.svg: about ten minutes of one core
    python tests/figure_search.py --draw    only the figure, from the CSV file that is there

A chain goes on from its newest edit, good or bad, and its user has the newest; a tree goes back to what was better, and
its user has the best. Setting: 25 rounds as in the paper; the editor samples at temperature 1 with nothing cut off, as
in training (at the default 0.7/0.8/20 its edits seldom hurt); all else default. Means over 32 test domains, each
averaged over 3 seeds; the standard errors are over domains.
"""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from figure import Curve, Panel, Point, save_figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests" / "results"
sys.path.insert(0, str(ROOT))

ROUNDS = (0, 1, 2, 3, 5, 7, 10, 13, 16, 20, 25)  # at which the instructions are tested
CURVES = {"UCB's best": 0, "best of a chain": 1, "newest of a chain": 2}  # and their looks
EDITORS = {"untrained": "base", "trained": "editor"}  # and their folders


@dataclass
class Accuracy:
    """Of the instructions that a user has after some rounds: a line of the CSV file."""

    editor: str
    curve: str
    round: int
    mean: float
    error: float


def measure(seeds: int, domains: int) -> list[Accuracy]:
    """All curves. The last round's paired differences are printed."""
    import torch

    import data
    import evolve

    torch.set_num_threads(1)
    task = data.Mini()
    names = task.domains("test")[:domains]
    solver = evolve.load_model(evolve.MINIATURE / "base")
    s = evolve.Settings(rounds=ROUNDS[-1], editor_temperature=1.0, top_p=1.0, top_k=0)
    s = evolve.with_presets(s)
    out = []
    for editor_name, folder in EDITORS.items():
        editor = evolve.load_model(evolve.MINIATURE / folder)
        tested: dict[tuple, list[list[float]]] = {}  # (curve, round) -> over seeds, over domains
        for seed in range(seeds):
            own = replace(s, seed=seed)
            for rule in ("chain", "ucb"):
                trees = evolve.seed_trees(task, names, solver, own)
                evolve.evolve_all(task, trees, solver, editor, own, rule, stop=False)
                for place, scores in test_rounds(task, trees, solver, own, rule).items():
                    tested.setdefault(place, []).append(scores)
            print(f"{editor_name} editor, seed {seed}: done", flush=True)
        for (curve, number), of_seeds in tested.items():
            of_domains = [fmean(scores) for scores in zip(*of_seeds)]
            mean, error = evolve.mean_error(of_domains)
            out.append(Accuracy(editor_name, curve, number, round(mean, 4), round(error, 4)))
        say_differences(editor_name, tested)
    return out


def test_rounds(task, trees: dict, solver, s, rule: str) -> dict[tuple, list[float]]:
    """{(curve, round): the test accuracy of each domain} of trees grown by one rule."""
    import evolve

    chosen: dict[tuple, list[tuple]] = {}  # (curve, round) -> (domain, instructions) of each domain
    for number in ROUNDS:
        for domain, tree in trees.items():
            young = evolve.EvolutionTree("", None)
            young.nodes = tree.nodes[: number + 1]
            if rule == "ucb":
                users = {"UCB's best": young.best()}
            else:
                users = {"best of a chain": young.best(), "newest of a chain": young.scored()[-1]}
            for curve, node in users.items():
                chosen.setdefault((curve, number), []).append((domain, node.instructions))
    distinct = list(dict.fromkeys(pair for pairs in chosen.values() for pair in pairs))
    jobs = []
    for domain, instructions in distinct:
        jobs.append((instructions, evolve.split_problems(task.problems(domain), s)["test"]))
    scores = {}
    for pair, shares in zip(distinct, evolve.score_all(task, solver, jobs, s)):
        scores[pair] = fmean(shares)
    return {place: [scores[pair] for pair in pairs] for place, pairs in chosen.items()}


def say_differences(editor: str, tested: dict[tuple, list[list[float]]]) -> None:
    """After the last round, paired over domains: what a tree's user has more than a chain's."""
    import evolve

    def last(curve: str) -> list[float]:
        return [fmean(scores) for scores in zip(*tested[curve, ROUNDS[-1]])]

    for better, worse in (
        ("UCB's best", "newest of a chain"),
        ("UCB's best", "best of a chain"),
        ("best of a chain", "newest of a chain"),
    ):
        differences = [a - b for a, b in zip(last(better), last(worse))]
        mean, error = evolve.mean_error(differences)
        print(f"{editor} editor: {better} minus {worse} {mean:+.3f} ± {error:.3f}")


def draw(path: Path, out: Path) -> None:
    """The figure of a CSV file."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    panels = []
    for editor in EDITORS:
        curves = []
        for label, look in CURVES.items():
            points = []
            for row in rows:
                if (row["editor"], row["curve"]) == (editor, label):
                    values = (float(row["round"]), float(row["mean"]), float(row["error"]))
                    points.append(Point(*values))
            curves.append(Curve(label, points, look))
        panels.append(Panel(f"{editor} editor: test accuracy", "round of evolution", curves))
    save_figure(out, "A chain keeps its bad edits, a tree goes back", panels)


def main(a: argparse.Namespace) -> None:
    path = RESULTS / "search.csv"
    if not a.draw:
        RESULTS.mkdir(exist_ok=True)
        lines = measure(a.seeds, a.domains)
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(vars(lines[0])), lineterminator="\n")
            writer.writeheader()
            writer.writerows(vars(line) for line in lines)
    draw(path, RESULTS / "search.svg")
    print(f"Saved in {RESULTS}: search.csv, search.svg.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draw", action="store_true", help="from the CSV file that is there")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--domains", type=int, default=32)
    main(parser.parse_args())
