"""Two processes of torchrun (gloo, on a CPU) take the step that one takes, and leave one set of files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import Accelerator
from tiny import SETTINGS, log_lines, luck, small_world

import data
import evolve
import train
from lse import LocalModel, MasterAdamW
from train import StartState

POOL = [StartState(d, f"profit c{i}", score=i / 8, seed=0, potential=i / 8)
        for d in ("train000", "train001", "train002") for i in range(8)]  # fmt: skip


def same_draws(self, chats, n=1, **options):
    """`LocalModel.sample` one chat at a time, with a seed from the chat: what is drawn does not depend on who draws."""
    rows = []
    for chat in chats:
        torch.manual_seed(luck(str(chat)))
        rows += SAMPLE(self, [chat], n, **options)
    return rows


SAMPLE = LocalModel.sample


def three_steps(base: Path, advantage: str) -> tuple[torch.Tensor, list[dict]]:
    """The editor's weights after three steps on a fixed pool, and what was logged."""
    editor, solver, task, lines = evolve.load_model(base), evolve.load_model(base), data.Mini(), []
    s = evolve.with_presets(train.Config(**SETTINGS | dict(states=8, advantage=advantage, micro_batch=3, lr=0.01)))
    optimizer = MasterAdamW(editor.model, lr=s.lr)
    accelerator = Accelerator(cpu=True)
    for step in range(3):
        line, rollouts = train.train_step(task, solver, editor, optimizer, POOL, s, step, accelerator)
        assert len(rollouts) == 8 // accelerator.num_processes
        lines.append({name: value for name, value in line.items() if name != "seconds"})
    return torch.cat([p.detach().flatten() for p in editor.model.parameters()]), lines


def worker(base: Path, out: Path) -> None:
    """What each of the two processes does: a whole run, then the steps that are compared."""
    torch.set_num_threads(1)
    small_world(domains=(3, 1))  # one test domain: a process has none to evaluate
    # One group for both: a second would sometimes read the addresses of the first, and wait for a closed door.
    end = Accelerator.end_training
    Accelerator.end_training = lambda self: None
    train.main(train.Config(**SETTINGS, model=str(base), out=str(out / "run")))
    LocalModel.sample = same_draws
    for advantage in ("delta", "line"):
        weights, lines = three_steps(base, advantage)
        torch.save({"weights": weights, "lines": lines}, out / f"{advantage}-{Accelerator(cpu=True).process_index}.pt")
    end(Accelerator(cpu=True))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder that two processes have written, and what they said."""
    out = tmp_path_factory.mktemp("two")
    tiny.random_base(out / "base")
    script = out / "worker.py"
    script.write_text(f"""import sys
sys.path[:0] = {[str(Path(__file__).parents[1]), str(Path(__file__).parent)]!r}
from pathlib import Path
import test_two_processes
test_two_processes.worker(Path({str(out / "base")!r}), Path({str(out)!r}))
""")
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout


@pytest.mark.parametrize("advantage", ["delta", "line"])
def test_two_processes_take_the_step_of_one(two, monkeypatch, advantage):
    """Same global batch, same weights within float error, same log; "line" needs the mean over both halves."""
    out, _ = two
    small_world(monkeypatch.setattr)
    monkeypatch.setattr(LocalModel, "sample", same_draws)
    weights, lines = three_steps(out / "base", advantage)
    start = torch.cat([p.detach().flatten() for p in evolve.load_model(out / "base").model.parameters()])
    moved = (weights - start).abs().mean()
    for rank in (0, 1):
        theirs = torch.load(out / f"{advantage}-{rank}.pt", weights_only=True)
        assert (theirs["weights"] - weights).abs().mean() < 1e-3 * moved
        for ours, line in zip(lines, theirs["lines"], strict=True):
            assert {k: pytest.approx(v, rel=1e-4, abs=1e-6) for k, v in ours.items()} == line
    both = [torch.load(out / f"{advantage}-{rank}.pt", weights_only=True)["weights"] for rank in (0, 1)]
    assert torch.equal(*both)


def test_two_processes_leave_one_set_of_files(two):
    """One log with every step once, whole checkpoints, each message once."""
    out, said = two
    run = out / "run"
    assert [line["step"] for line in log_lines(run)] == [0, 1, 2, 3]
    assert {path.name for path in run.iterdir()} == {
        "config.json", "log.jsonl", "trees", "editor", "results.json", "report.html", "checkpoint-000003.pt",
        "checkpoint-000004.pt"}  # fmt: skip
    checkpoint = torch.load(run / "checkpoint-000004.pt", weights_only=True)
    editor = evolve.load_model(run / "editor").model
    for weight, master in zip(editor.parameters(), checkpoint["optimizer"]["masters"], strict=True):
        assert torch.equal(weight, master)
    assert {state["domain"] for state in checkpoint["start_states"]} == {"train000", "train001", "train002"}
    assert json.loads((run / "results.json").read_text())["trained"]["domains"] == 1
    for words in ("Plan\n", "start states", "Saved in"):
        assert said.count(words) == 1
    assert all(said.count(f"{step:4d}  reward") == 1 for step in range(4))


def test_states_that_cannot_be_shared_are_refused(two):
    """Before any model is asked, with the numbers."""
    model = evolve.load_model(two[0] / "base")
    s = evolve.with_presets(train.Config(**SETTINGS | dict(states=3)))
    with pytest.raises(ValueError, match="--states 3 cannot be shared by 2 processes"):
        train.plan(data.Mini(), model, model, s, two[0] / "none", ["train000"], ["test000"], processes=2)
