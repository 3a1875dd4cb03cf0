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
from dataclasses import dataclass
from pathlib import Path

from figure import Curve, Panel, Point, save_figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests" / "results"
sys.path.insert(0, str(ROOT))


@dataclass(frozen=True)
class Kind:
    """What a curve shows: all runs with this advantage and penalty."""

    advantage: str
    invalid_reward: float
    look: int

    @property
    def label(self) -> str:
        return f"{self.advantage}, {self.invalid_reward:g}"

    def fits(self, row: dict) -> bool:
        same = row["advantage"] == self.advantage
        return same and float(row["invalid_reward"]) == self.invalid_reward and row["group"] == "4"


def main(a: argparse.Namespace) -> None:
    with open(RESULTS / "learning.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    untrained = {}  # base -> accuracy
    for row in rows:
        if row["steps"] == "0":
            untrained[row["base"]] = float(row["test"])
    rewards = Panel("reward", "step of RL", [], high=a.high)
    accuracies = Panel("test accuracy", "step of RL", [])
    for look, name in enumerate(a.kinds.split(",")):
        advantage, penalty = name.split(":")
        kind = Kind(advantage, float(penalty), look)
        own = [row for row in rows if row["steps"] == str(a.steps) and kind.fits(row)]
        runs = {(row["base"], row["seed"]) for row in own}
        print(f"{kind.label}: {len(runs)} runs, (base, seed) {sorted(runs)}")
        if not own:
            continue
        rewards.curves.append(Curve(kind.label, average(own, reward_of), look))
        start = [untrained[base] for base, _ in runs if base in untrained]
        first = [Point(0, *mean_error(start))] if start else []
        later = average([row for row in own if row["test"]], lambda row: float(row["test"]))
        accuracies.curves.append(Curve(kind.label, first + later, look))
    save_figure(RESULTS / "learning.svg", "Learning to edit", [rewards, accuracies])
    print(f"Saved: {RESULTS / 'learning.svg'}.")


def reward_of(row: dict) -> float:
    """The mean reward of ten steps, invalid edits counted as 0."""
    return float(row["reward"]) - (1 - float(row["valid"])) * float(row["invalid_reward"])


def average(rows: list[dict], value) -> list[Point]:
    """Mean and standard error over runs, at each step that the rows name."""
    of_steps: dict[int, list[float]] = {}
    for row in rows:
        of_steps.setdefault(int(row["step"]), []).append(value(row))
    return [Point(step, *mean_error(values)) for step, values in sorted(of_steps.items())]


def mean_error(values: list[float]) -> tuple[float, float]:
    """As in evolve.py, with an error of 0 where one value cannot tell."""
    from evolve import mean_error

    mean, error = mean_error(values)
    return mean, error if len(values) > 1 else 0.0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", default="delta:-1,grpo:-1,score:-1", help="advantage:penalty, ...")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--high", type=float, default=0.25, help="the highest reward of the axis")
    main(parser.parse_args())
