"""Learning: reward and test accuracy over the steps of RL, for the paper's advantage and its rivals.

    python tests/bench_miniature.py --run ...     trains, and writes results/learning.csv: a minute of one core a run
    python tests/figure_learning.py               results/learning.svg, from that file

Rewards are means over ten steps, with the penalty taken out: an invalid edit counts as one that changes nothing,
so that runs with different penalties can be compared. Accuracies are those of the instructions that the editor evolves
for the first 16 test domains. Lines are means over runs (bases x RL seeds), bands one standard error of that mean.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from figure import Curve, Panel, Point, save_figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests" / "results"
sys.path.insert(0, str(ROOT))


Rows = list[dict[str, str]]


def main(a: argparse.Namespace) -> None:
    with open(RESULTS / "learning.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    untrained = [row for row in rows if row["steps"] == "0"]
    rewards = Panel("reward", "step of RL", [], a.low, a.high, steps=4)
    accuracies = Panel("test accuracy", "step of RL", [], steps=4)
    kinds = a.kinds.split(",")
    one_penalty = len({kind.partition(":")[2] for kind in kinds}) == 1
    for look, kind in enumerate(kinds):
        own = pick(rows, kind, a.steps)
        runs = {(row["base"], row["seed"]) for row in own}
        label = kind.partition(":")[0] if one_penalty else kind.replace(":", ", ")
        print(f"{label}: {len(runs)} runs, (base, seed) {sorted(runs)}")
        if not own:
            continue
        rewards.curves.append(Curve(label, average(own, reward_of), look))
        # every run of a base starts with the same editor
        starts = [row for base, _ in runs for row in untrained if row["base"] == base]
        tested = [row for row in own if row["test"]]
        accuracies.curves.append(Curve(label, average(starts + tested, accuracy_of), look))
    save_figure(RESULTS / "learning.svg", "Learning to edit", [rewards, accuracies])
    print(f"Saved: {RESULTS / 'learning.svg'}.")


def pick(rows: Rows, kind: str, steps: int) -> Rows:
    """The rows of all runs of one kind, "advantage:penalty", with four edits per state."""
    advantage, penalty = kind.split(":")
    out = []
    for row in rows:
        trained = row["steps"] == str(steps) and row["group"] == "4"
        same_penalty = float(row["invalid_reward"]) == float(penalty)
        if trained and same_penalty and row["advantage"] == advantage:
            out.append(row)
    return out


def reward_of(row: dict) -> float:
    """The mean reward of ten steps, invalid edits counted as 0."""
    invalid = 1 - float(row["valid"])
    return float(row["reward"]) - invalid * float(row["invalid_reward"])


def accuracy_of(row: dict) -> float:
    return float(row["test"])


def average(rows: Rows, value) -> list[Point]:
    """Mean and standard error over runs, at each step that the rows name."""
    from evolve import mean_error

    of_steps: dict[int, list[float]] = {}
    for row in rows:
        of_steps.setdefault(int(row["step"]), []).append(value(row))
    points = []
    for step, values in sorted(of_steps.items()):
        mean, error = mean_error(values)
        if len(values) == 1:
            error = 0.0  # one run has no spread: no band
        points.append(Point(step, mean, error))
    return points


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Of the command line, if none are given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = "delta:-0.2,line:-0.2,grpo:-0.2,score:-0.2"
    parser.add_argument("--kinds", default=kinds, help="advantage:penalty, ...")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--low", type=float, default=0.0, help="the lowest reward of the axis")
    parser.add_argument("--high", type=float, default=0.25, help="the highest reward of the axis")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(options())
