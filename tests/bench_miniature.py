"""The README's tables on the miniature: bases (by make_base.py) x RL seeds x advantages, as ordinary runs of train.py.

    python tests/bench_miniature.py                                   # 3 bases x 3 seeds x delta, grpo, score: an hour
    python tests/bench_miniature.py --advantages delta,line,node,batch --seeds 0
    python tests/bench_miniature.py --reward runs/bench/base-0        # the delta as a function of the score before

Runs that are in the folder already are not repeated, so it can be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, pvariance

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def start(log: Path, script: str, *flags: str) -> None:
    """A script of the repository on one thread, as a user would start it."""
    with open(log, "w") as file:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, script, *flags], cwd=ROOT, env=env, stdout=file, stderr=file, check=True)


def make_base(out: Path, seed: int) -> None:
    """A base of that seed, unless it is there."""
    if not (out / "config.json").exists():
        start(Path(f"{out}.log"), "tests/miniature/make_base.py", "--seed", str(seed), "--out", str(out))


def run(out: Path, *flags: str) -> dict:
    """One run of train.py, unless it is there; its results."""
    if not (out / "results.json").exists():
        start(Path(f"{out}.log"), "train.py", "--out", str(out), "--overwrite", *flags)
    return json.loads((out / "results.json").read_text())


def table(out: Path, bases: list[int], seeds: list[int], kinds: list[str], jobs: int) -> None:
    """Mean over all runs of a kind; the standard error is over runs (the domains are the same 32 in each)."""
    from evolve import mean_error

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda b: make_base(out / f"base-{b}", b), bases))
        wanted = [(kind, b, seed) for seed in seeds for kind in kinds for b in bases]
        results = dict(zip(wanted, pool.map(
            lambda w: run(out / f"{w[0]}-b{w[1]}-s{w[2]}", "--model", str(out / f"base-{w[1]}"),
                          "--advantage", w[0], "--seed", str(w[2])), wanted)))
    print("| advantage | " + " | ".join(f"base {b}" for b in bases) + " | all runs |")
    print("|---|" + "---|" * (len(bases) + 1))
    for label in ["untrained", *kinds]:
        kind, key = (kinds[0], "untrained") if label == "untrained" else (label, "trained")
        cells = [[results[kind, b, s][key]["test_accuracy"] for s in seeds] for b in bases]
        rows = [*cells, [x for cell in cells for x in cell]]
        print(f"| {label} | " + " | ".join("{:.3f} ± {:.3f}".format(*mean_error(row)) for row in rows) + " |")


def reward(base: Path) -> None:
    """Mean and spread of the delta as a function of R̄(c_0), untrained editor, 16 edits for each of 240 start states."""
    import random
    from dataclasses import replace

    import torch
    from accelerate import Accelerator

    import data
    import train
    from evolve import load_model, with_presets
    from lse import MasterAdamW, delta_reward

    s = with_presets(train.Config(group=16, states=240))
    task, solver, editor = data.Mini(), load_model(base), load_model(base)
    accelerator = Accelerator(cpu=True)
    pool = train.grow_states(task, solver, editor, s, step=0, accelerator=accelerator)
    # All states alike, and a step that moves nothing: only what it sampled and scored is of interest.
    pool = [replace(state, potential=0.0) for state in random.Random(0).sample(pool, min(240, len(pool)))]
    optimizer = MasterAdamW(editor.model, lr=0.0)
    s = replace(s, lr=0.0)
    _, rollouts = train.train_step(task, solver, editor, optimizer, pool, s, 0, accelerator)
    before = torch.tensor([each.state.score for each in rollouts])  # (N,)
    after = torch.tensor([each.after for each in rollouts])  # (N, G)
    delta = delta_reward(after, before[:, None], ~after.isnan())  # (N, G)
    print("| R̄(c_0) | start states | mean delta | s.d. of delta among the edits of a state | share better |")
    print("|---" * 5 + "|")
    for low, high in ((0, 0.01), (0.01, 0.2), (0.2, 0.3), (0.3, 0.45), (0.45, 1.01)):
        rows = delta[(before >= low) & (before < high)]
        if len(rows):
            print(f"| {low:.2f} to {high:.2f} | {len(rows)} | {rows.mean():+.3f} | {rows.std(1).mean():.3f} | "
                  f"{(rows > 0).float().mean():.0%} |")
    total, x = pvariance(delta.flatten().tolist()), before - before.mean()
    line = (x[:, None] * delta).mean() / (x * x).mean() * x
    by_line, by_state = pvariance(line.tolist()) / total, pvariance(delta.mean(1).tolist()) / total
    print(f"\nVariance of the delta {total:.4f}, of which R̄(c_0) explains by a line {by_line:.0%}, the start state "
          f"{by_state:.0%}. Mean delta {fmean(delta.flatten().tolist()):+.3f}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench")
    parser.add_argument("--bases", default="0,1,2")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--advantages", default="delta,grpo,score")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--reward", type=Path)
    args = parser.parse_args()
    if args.reward:
        reward(args.reward)
    else:
        bases, seeds = ([int(x) for x in text.split(",")] for text in (args.bases, args.seeds))
        args.out.mkdir(parents=True, exist_ok=True)
        table(args.out, bases, seeds, args.advantages.split(","), args.jobs)
