"""The second rung: what a real language model of 135 million parameters learns on the shops.

    python train.py --task shop --model SMOLLM2_DIR --dtype bfloat16 --advantage grpo --micro-batch 2 \\
        --seed 0 --out runs/seed-0                    the same with seeds 1 and 2
    python tests/bench_shop.py --model SMOLLM2_DIR --run runs/seed-0 runs/seed-1 runs/seed-2
    python tests/bench_shop.py                        the tables of results/shop.csv and results/shop_learning.csv

Every editor, the untrained one first, evolves instructions for all shops of a split in five rounds, twice: with edits
sampled at temperature 1 with nothing cut off, as in training, and with the default of test time, 0.7 and top-k 20. What
is best on the holdout after three and after five rounds is asked the test questions. Gains are paired, shop by shop,
and their standard errors are over shops. About five minutes of one core for an editor, a way to sample, and 32 shops.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from pathlib import Path
from statistics import fmean

from bench_miniature import append

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests" / "results"
sys.path.insert(0, str(ROOT))

SAMPLING = {
    "temperature 1": {"editor_temperature": 1.0, "top_k": 0},
    "default": {},
}
ROUNDS = (3, 5)
UNTRAINED = "untrained"

Scores = dict[str, float]  # of each shop


def evaluate(task, solver, editor, s, domains: list[str]) -> tuple[dict[int, Scores], str]:
    """({round: test accuracy of each shop}, a sentence on the edits)."""
    import evolve

    trees = evolve.seed_trees(task, domains, solver, s)
    evolve.evolve_all(task, trees, solver, editor, s, s.search)
    jobs = []
    for number in ROUNDS:
        for domain, tree in trees.items():
            young = evolve.EvolutionTree("", None)
            young.nodes = tree.nodes[: number + 1]
            problems = evolve.split_problems(task.problems(domain), s)["test"]
            jobs.append((young.best().instructions, problems))
    shares = iter(evolve.score_all(task, solver, jobs, s))
    scores: dict[int, Scores] = {}
    for number in ROUNDS:
        scores[number] = {domain: fmean(next(shares)) for domain in trees}
    return scores, count_edits(trees)


def count_edits(trees: dict) -> str:
    """How many edits were valid, better and worse than what they edited."""
    edits = valid = better = worse = 0
    for tree in trees.values():
        for node in tree.nodes[1:]:
            edits += 1
            if node.score is not None:
                before = tree.nodes[node.parent].score
                valid += 1
                better += node.score > before
                worse += node.score < before
    return f"{edits} edits: {valid} valid, {better} better, {worse} worse"


def carry_out(a: argparse.Namespace) -> None:
    """All editors, appended to the CSV files."""
    import torch

    import data
    import evolve

    torch.set_num_threads(a.threads)
    task = data.load_task("shop")
    domains = task.domains(a.split)
    solver = evolve.load_model(a.model, dtype=a.dtype)
    editors = {UNTRAINED: solver}
    if a.only_trained:
        editors = {}
    for folder in a.run:
        editors[Path(folder).name] = evolve.load_model(f"{folder}/editor", dtype=a.dtype)
    for way, settings in SAMPLING.items():
        s = evolve.Settings(task="shop", rounds=max(ROUNDS), **settings)
        s = evolve.with_presets(s)
        for name, editor in editors.items():
            started = time.process_time()
            scores, edits = evaluate(task, solver, editor, s, domains)
            seconds = time.process_time() - started
            print(f"{name}, {way}: {edits}; {seconds:.0f} s", flush=True)
            rows = []
            for number, of_shops in scores.items():
                for domain, score in of_shops.items():
                    place = {"split": a.split, "editor": name, "sampling": way, "rounds": number}
                    rows.append(place | {"shop": domain, "accuracy": round(score, 4)})
            append(RESULTS / "shop.csv", rows)
    if a.split == "test":
        for folder in a.run:
            append(RESULTS / "shop_learning.csv", learning_curve(Path(folder)))


def learning_curve(folder: Path) -> list[dict]:
    """The rows of a run's log."""
    rows = []
    for line in (folder / "log.jsonl").read_text().splitlines():
        step = json.loads(line)
        row = {"editor": folder.name, "step": step["step"]}
        for name in ("reward", "better", "before", "after", "valid", "cut", "entropy"):
            row[name] = round(step[name], 4) if step[name] is not None else ""
        rows.append(row)
    return rows


def show_tables(split: str) -> None:
    """Accuracy of every editor, and its gain over the untrained one; then rewards by tens of steps."""
    import evolve

    scores: dict[tuple, Scores] = {}  # (sampling, rounds, editor) -> of each shop
    with open(RESULTS / "shop.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row["split"] == split:
                place = (row["sampling"], row["rounds"], row["editor"])
                scores.setdefault(place, {})[row["shop"]] = float(row["accuracy"])
    print(
        f"| {split} shops: sampling of edits, rounds | editor | accuracy | gain, paired | better, worse |"
    )
    print("|---|---|---|---|---|")
    for (way, rounds, editor), own in scores.items():
        mean, error = evolve.mean_error(list(own.values()))
        cells = [f"{way}, {rounds}", editor, f"{mean:.3f} ± {error:.3f}", "", ""]
        before = scores.get((way, rounds, UNTRAINED))
        if before and editor != UNTRAINED:
            gains = [own[shop] - before[shop] for shop in own]
            mean, error = evolve.mean_error(gains)
            cells[3] = f"{mean:+.3f} ± {error:.3f}"
            cells[4] = f"{sum(gain > 0 for gain in gains)}, {sum(gain < 0 for gain in gains)}"
        print(f"| {' | '.join(cells)} |")
    path = RESULTS / "shop_learning.csv"
    if not path.exists():
        return
    tens: dict[tuple, list[dict]] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            tens.setdefault((row["editor"], int(row["step"]) // 10), []).append(row)
    print("\n| run, steps | reward | better | valid | score before | entropy |")
    print("|---|---|---|---|---|---|")
    for (editor, ten), rows in tens.items():
        cells = [f"{editor}, {10 * ten} to {10 * ten + 9}"]
        for name in ("reward", "better", "valid", "before", "entropy"):
            cells.append(f"{fmean(float(row[name]) for row in rows):.3f}")
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="SmolLM2: a folder, a .gguf file, or a hub name")
    parser.add_argument("--run", nargs="*", default=[], help="folders of train.py's runs")
    parser.add_argument("--split", default="test", help="test, or dev to choose settings by")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--only-trained", action="store_true", help="the untrained editor is in the table already"
    )
    arguments = parser.parse_args()
    if arguments.model:
        carry_out(arguments)
    show_tables(arguments.split)
