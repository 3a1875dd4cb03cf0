"""The answers to the README's exercises: one line of the four files changed, and the miniature run again.

    python tests/bench_exercises.py               the table of results/exercises.csv
    python tests/bench_exercises.py --run         runs what is not in it yet: two to three minutes of one core a run

Each exercise is a line, as it stands in its file, and what to put in its place. The four files are copied to a folder
of their own, changed there, and run as a reader would: `python train.py` or `python evolve.py`, from the committed
base. Accuracies are those of the 32 test domains, as the scripts report them.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests" / "results" / "exercises.csv"
FILES = ("lse.py", "data.py", "evolve.py", "train.py")


@dataclass(frozen=True)
class Exercise:
    """A change of one line."""

    name: str
    command: str  # what is run
    file: str = "lse.py"  # what is changed
    old: str = ""
    new: str = ""


NOISY = "evolve.py --search chain --editor tests/miniature/base --rounds 25"
NOISY += " --editor-temperature 1 --top-p 1 --top-k 0"
EXERCISES = (
    Exercise("nothing changed", "train.py"),
    Exercise(
        "1: the raw score as reward",
        "train.py",
        "lse.py",
        "    return torch.where(valid, after - before, invalid_reward)\n",
        "    return torch.where(valid, after, invalid_reward)\n",
    ),
    Exercise(
        "2: only the seed instructions as start states",
        "train.py",
        "train.py",
        "        for node in tree.scored():\n            states.append(",
        "        for node in tree.nodes[:1]:\n            states.append(",
    ),
    Exercise(
        "3: the batch mean as a second baseline",
        "train.py",
        "lse.py",
        '    if kind == "delta":\n        return reward\n',
        '    if kind == "delta":\n        return reward - reward.mean()\n',
    ),
    Exercise(
        "4: no penalty for an invalid edit",
        "train.py",
        "train.py",
        '        -0.2, "reward of an invalid',
        '        0.0, "reward of an invalid',
    ),
    Exercise("nothing changed, a chain and a noisy untrained editor", NOISY),
    Exercise(
        "5: its newest node instead of its best",
        NOISY,
        "lse.py",
        "        return max(self.scored(), key=lambda node: node.score)\n",
        "        return self.scored()[-1]\n",
    ),
)


@dataclass
class Answer:
    """A line of the CSV file."""

    exercise: str
    seed: int
    untrained: str  # test accuracy of the untrained editor; exercise 5 has no other
    trained: str
    valid: str  # share of valid edits in the last ten steps


def carry_out(exercise: Exercise, seed: int) -> Answer:
    """Copy the four files, change the line, run the script, and read what it found."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in FILES:
            shutil.copy(ROOT / file, folder / file)
        shutil.copytree(ROOT / "tests" / "miniature", folder / "tests" / "miniature")
        text = (folder / exercise.file).read_text(encoding="utf-8")
        (folder / exercise.file).write_text(changed(text, exercise), encoding="utf-8")
        command = [sys.executable, *exercise.command.split(), "--seed", str(seed), "--out", "run"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=folder, check=True, env=environment, capture_output=True)
        results = json.loads((folder / "run" / "results.json").read_text())
        if exercise.command.startswith("evolve.py"):
            return Answer(exercise.name, seed, f"{results['test']['best']:.4f}", "", "")
        lines = (folder / "run" / "log.jsonl").read_text().splitlines()[-10:]
        valid = sum(json.loads(line)["valid"] for line in lines) / len(lines)
        untrained, trained = (
            results["untrained"]["test_accuracy"],
            results["trained"]["test_accuracy"],
        )
        return Answer(exercise.name, seed, f"{untrained:.4f}", f"{trained:.4f}", f"{valid:.3f}")


def changed(text: str, exercise: Exercise) -> str:
    """The file with the line changed. ValueError if the line is not there exactly once."""
    if not exercise.old:
        return text
    if text.count(exercise.old) != 1:
        raise ValueError(f"{exercise.file} does not hold this once: {exercise.old!r}")
    return text.replace(exercise.old, exercise.new)


def read_answers() -> list[Answer]:
    """All that the CSV file holds."""
    if not TABLE.exists():
        return []
    with open(TABLE, newline="") as file:
        return [Answer(**{**row, "seed": int(row["seed"])}) for row in csv.DictReader(file)]


def show(answers: list[Answer]) -> None:
    """The table, a line per exercise: mean and standard error over seeds."""
    from evolve import mean_error

    print("| one line changed | runs | test accuracy | valid edits |")
    print("|---|---|---|---|")
    for exercise in EXERCISES:
        own = [answer for answer in answers if answer.exercise == exercise.name]
        if not own:
            continue
        mean, error = mean_error([float(answer.trained or answer.untrained) for answer in own])
        valid = [float(answer.valid) for answer in own if answer.valid]
        share = f"{sum(valid) / len(valid):.1%}" if valid else "–"
        accuracy = f"{mean:.3f}" if len(own) == 1 else f"{mean:.3f} ± {error:.3f}"
        print(f"| {exercise.name} | {len(own)} | {accuracy} | {share} |")


def main(a: argparse.Namespace) -> None:
    sys.path.insert(0, str(ROOT))
    answers = read_answers()
    done = {(answer.exercise, answer.seed) for answer in answers}
    for seed in range(a.seeds if a.run else 0):
        for exercise in EXERCISES:
            wanted = exercise.name.startswith(a.only)
            if not wanted or (exercise.name, seed) in done:
                continue
            answers.append(carry_out(exercise, seed))
            print(answers[-1], flush=True)
            with open(TABLE, "w", newline="") as file:
                writer = csv.DictWriter(file, list(asdict(answers[0])), lineterminator="\n")
                writer.writeheader()
                writer.writerows(asdict(answer) for answer in answers)
    show(answers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", action="store_true", help="what is not in the table yet")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", default="", help="how the exercises' names begin")
    main(parser.parse_args())
