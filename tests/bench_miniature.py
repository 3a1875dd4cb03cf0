"""The README's tables on the miniature: bases x RL seeds x advantages x penalties of invalid edits.

    python tests/bench_miniature.py                                 the table of results/penalty.csv
    python tests/bench_miniature.py --steps 40 --against line:-1    the same of shorter runs, compared with line at -1
    python tests/bench_miniature.py --run --bases 0,1,2 --seeds 0,1 --advantages delta,line --penalties=-1,-0.2
    python tests/bench_miniature.py --reward tests/miniature/base   the delta as a function of the score before

A run trains an editor as train.py does, and appends two things when it is over: a line to results/penalty.csv (test
accuracy as train.py reports it, and the same on the dev domains, by which settings are chosen) and one for every ten
steps to results/learning.csv (the mean reward, the shares of edits better and valid, and four times in a run the
accuracy on the first 16 test domains). Runs that are in penalty.csv already are not repeated, so it can be stopped and
started again. Base 0 is the committed one; others are made by miniature/make_base.py in --folder if they are missing.

A run takes one to three minutes of one core. Nothing here is needed to use the four files.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, astuple, dataclass, fields, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, pvariance

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests" / "results"
sys.path.insert(0, str(ROOT))

CURVE_DOMAINS = 16  # of the test domains, for the accuracy while training goes on


@dataclass(frozen=True)
class Run:
    """What is varied. `steps` 0 is the untrained editor."""

    base: int
    seed: int
    advantage: str
    invalid_reward: float
    group: int
    states: int
    steps: int


@dataclass
class Outcome:
    """What came out of a run, as it stands in penalty.csv."""

    dev: float  # accuracy on the dev domains
    test: float
    valid: float  # share of the edits of the last ten steps that can be used
    seconds: float  # of one core


# ---------------------------------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------------------------------


def carry_out(run: Run, base: Path) -> tuple[Outcome, list[dict]]:
    """Train an editor from a base, evaluate it, and return the outcome and the lines of its learning curve."""
    import torch
    from accelerate import Accelerator

    import data
    import evolve
    import train
    from lse import MasterAdamW

    torch.set_num_threads(1)
    task, accelerator = data.Mini(), Accelerator(cpu=True)
    solver, editor = evolve.load_model(base), evolve.load_model(base)
    s = train.Config(seed=run.seed, advantage=run.advantage, invalid_reward=run.invalid_reward)
    s = replace(s, group=run.group, states=run.states, steps=run.steps)
    s = evolve.with_presets(s)
    optimizer = MasterAdamW(editor.model, lr=s.lr)
    pool: list[train.StartState] = []
    lines: list[dict] = []
    curve: list[dict] = []
    few = task.domains("test")[:CURVE_DOMAINS]
    for step in range(s.steps):
        if step % s.grow_every == 0:
            pool = train.grow_states(task, solver, editor, s, step, accelerator) + pool
        line, _ = train.train_step(task, solver, editor, optimizer, pool, s, step, accelerator)
        lines.append(line)
        if len(lines) % 10 == 0:
            point: dict = {"step": len(lines)}
            for name in ("reward", "better", "valid"):
                point[name] = round(fmean(line[name] for line in lines[-10:]), 4)
            if len(lines) % (s.steps // 4) == 0:
                point["test"] = round(accuracy(task, solver, editor, s, few), 4)
            curve.append(point)
    dev = accuracy(task, solver, editor, s, task.domains("dev"))
    test = accuracy(task, solver, editor, s, task.domains("test"))
    valid = 1.0
    if lines:
        valid = fmean(line["valid"] for line in lines[-10:])
    else:
        curve.append({"step": 0, "test": round(accuracy(task, solver, editor, s, few), 4)})
    seconds = round(time.process_time())
    return Outcome(round(dev, 4), round(test, 4), round(valid, 4), seconds), curve


def accuracy(task, solver, editor, s, domains: list[str]) -> float:
    """Test accuracy of the instructions that the editor evolves for each domain, as in train.evaluate."""
    import evolve

    trees = evolve.seed_trees(task, domains, solver, s)
    evolve.evolve_all(task, trees, solver, editor, s, s.search)
    tests = evolve.final_test(task, trees, solver, s)
    return fmean(fmean(best) for _, best in tests.values())


# ---------------------------------------------------------------------------------------------------------------------
# Many runs
# ---------------------------------------------------------------------------------------------------------------------


def find_base(number: int, folder: Path) -> Path:
    """The folder of a base, made first if need be."""
    if number == 0:
        return ROOT / "tests" / "miniature" / "base"
    base = folder / f"base{number}"
    if not (base / "config.json").exists():
        script = str(ROOT / "tests" / "miniature" / "make_base.py")
        command = [sys.executable, script, "--seed", str(number), "--out", str(base)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return base


def carry_out_all(wanted: list[Run], folder: Path, jobs: int) -> None:
    """Those runs that are not in the table yet, `jobs` at a time, each on one thread."""
    left = [run for run in wanted if run not in read_runs()]
    bases = {number: find_base(number, folder) for number in sorted({run.base for run in left})}
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        waiting = {pool.submit(carry_out, run, bases[run.base]): run for run in left}
        for future in as_completed(waiting):
            run = waiting[future]
            outcome, curve = future.result()
            append(RESULTS / "penalty.csv", [asdict(run) | asdict(outcome)])
            for point in curve:
                point.setdefault("test", "")
            append(RESULTS / "learning.csv", [asdict(run) | LEARNING | point for point in curve])
            print(run, outcome, flush=True)


LEARNING = {"step": 0, "reward": "", "better": "", "valid": "", "test": ""}


def append(path: Path, rows: list[dict]) -> None:
    """Rows to a CSV file, which gets its head with the first of them."""
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read_runs() -> dict[Run, Outcome]:
    """All that penalty.csv holds."""
    path = RESULTS / "penalty.csv"
    runs: dict[Run, Outcome] = {}
    if not path.exists():
        return runs
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            runs[from_row(Run, row)] = from_row(Outcome, row)
    return runs


def from_row(kind: type, row: dict[str, str]):
    """A Run or an Outcome from the line of a CSV file."""
    types = {"int": int, "float": float, "str": str}
    values = {}
    for each in fields(kind):
        values[each.name] = types[each.type](row[each.name])
    return kind(**values)


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def show_table(steps: int, against: str) -> None:
    """Per setting the mean test accuracy on each base, dev and test over all runs, and their differences from the
    setting `against`, over the runs that both have.

    The standard errors are over runs (base, RL seed): the domains are the same in each.
    """
    from evolve import mean_error

    runs = {run: outcome for run, outcome in read_runs().items() if run.steps == steps}
    bases = sorted({run.base for run in runs})
    places: dict[Run, dict[tuple, Outcome]] = {}  # setting -> (base, seed) -> outcome
    for run, outcome in runs.items():
        setting = replace(run, base=0, seed=0)
        places.setdefault(setting, {})[run.base, run.seed] = outcome
    heads = ["G x N", "advantage", "invalid", *(f"base {base} (runs)" for base in bases)]
    heads += ["test", "dev", f"test minus {against} (pairs)", f"dev minus {against}", "valid"]
    kind, _, penalty = against.partition(":")
    print(f"{steps} steps\n\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for setting, own in sorted(places.items(), key=lambda item: astuple(item[0])[2:]):
        cells = [f"{setting.group} x {setting.states}", setting.advantage, f"{setting.invalid_reward:g}"]
        for base in bases:
            scores = [outcome.test for place, outcome in own.items() if place[0] == base]
            cells.append(f"{fmean(scores):.3f} ({len(scores)})" if scores else "–")
        for name in ("test", "dev"):
            cells.append(plus_minus(mean_error([getattr(outcome, name) for outcome in own.values()]), "{:.3f}"))
        # the other has G = 4, whatever this one has: the paper's
        other_setting = Run(0, 0, kind, float(penalty), 4, 24, steps)
        others = places.get(other_setting, {})
        pairs = [(outcome, others[place]) for place, outcome in own.items() if place in others]
        for name in ("test", "dev"):
            differences = [getattr(outcome, name) - getattr(other, name) for outcome, other in pairs]
            cell = "–"
            if differences and setting != other_setting:
                cell = plus_minus(mean_error(differences), "{:+.3f}")
                cell += f" ({len(differences)})" if name == "test" else ""
            cells.append(cell)
        cells.append(f"{fmean(outcome.valid for outcome in own.values()):.3f}")
        print(f"| {' | '.join(cells)} |")


def plus_minus(both: tuple[float, float], form: str) -> str:
    """A mean and its standard error; the mean alone where one run cannot tell."""
    mean, error = both
    text = form.format(mean)
    return text if error != error else f"{text} ± {error:.3f}"


# ---------------------------------------------------------------------------------------------------------------------
# The delta as a function of the score before
# ---------------------------------------------------------------------------------------------------------------------


def reward(base: Path) -> None:
    """Mean and spread of the delta as a function of R̄(c_0), untrained editor, 16 edits for each of 240 start states."""
    import random

    import torch
    from accelerate import Accelerator

    import data
    import train
    from evolve import load_model, with_presets
    from lse import MasterAdamW, delta_reward

    s = with_presets(train.Config(group=16, states=240))
    task = data.Mini()
    solver = load_model(base)
    editor = load_model(base)
    accelerator = Accelerator(cpu=True)
    pool = train.grow_states(task, solver, editor, s, step=0, accelerator=accelerator)
    # All states alike, and a step that moves nothing: only what it sampled and scored is of interest.
    pool = random.Random(0).sample(pool, min(240, len(pool)))
    pool = [replace(state, potential=0.0) for state in pool]
    optimizer = MasterAdamW(editor.model, lr=0.0)
    s = replace(s, lr=0.0)
    _, rollouts = train.train_step(task, solver, editor, optimizer, pool, s, 0, accelerator)
    before = torch.tensor([each.state.score for each in rollouts])  # (N,)
    after = torch.tensor([each.after for each in rollouts])  # (N, G)
    delta = delta_reward(after, before[:, None], ~after.isnan())  # (N, G)
    print("| R̄(c_0) | start states | mean delta | s.d. of delta within a state | share better |")
    print("|---" * 5 + "|")
    edges = [0, 0.01, 0.2, 0.3, 0.45, 1.01]
    for low, high in zip(edges, edges[1:]):
        rows = delta[(before >= low) & (before < high)]
        if not len(rows):
            continue
        better = (rows > 0).float().mean()
        spread = rows.std(1).mean()
        line = f"| {low:.2f} to {high:.2f} | {len(rows)} | {rows.mean():+.3f} | {spread:.3f} | "
        print(line + f"{better:.0%} |")
    total = pvariance(delta.flatten().tolist())
    x = before - before.mean()
    line = (x[:, None] * delta).mean() / (x * x).mean() * x
    by_line = pvariance(line.tolist()) / total
    by_state = pvariance(delta.mean(1).tolist()) / total
    print(
        f"\nVariance of the delta {total:.4f}, of which R̄(c_0) explains by a line {by_line:.0%}, "
        f"the start state {by_state:.0%}. Mean delta {delta.mean():+.3f}."
    )


def numbers(text: str) -> list[int]:
    """Of "0,1,2"."""
    return [int(number) for number in text.split(",")]


def main(a: argparse.Namespace) -> None:
    if a.reward:
        reward(a.reward)
        return
    if a.run:
        wanted = []
        penalties = [float(text) for text in a.penalties.split(",")]
        places = product(numbers(a.seeds), numbers(a.bases), numbers(a.groups))
        settings = list(product(a.advantages.split(","), penalties))
        for (seed, base, group), (advantage, penalty) in product(places, settings):
            states = 96 // group  # the same number of edits for all
            wanted.append(Run(base, seed, advantage, penalty, group, states, a.steps))
        carry_out_all(wanted, a.folder, a.jobs)
    show_table(a.steps, a.against)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", action="store_true", help="carry out what is not in the table yet")
    parser.add_argument("--bases", default="0,1,2")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--advantages", default="delta,grpo,line,score")
    parser.add_argument("--penalties", default="-1,-0.2", help="reward of an edit that is not valid")
    parser.add_argument("--groups", default="4", help="G; the states are 96 / G")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--against", default="delta:-1", help="setting that the table's differences are from")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench", help="of bases")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--reward", type=Path, help="a base")
    main(parser.parse_args())
