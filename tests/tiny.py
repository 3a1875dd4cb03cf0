"""A tiny world for tests of training: a random base, a miniature of few domains, and luck for a grader.

A random model writes nothing that the miniature would accept, so an edit's worth and an answer's truth are drawn from
their text: every step has rewards of both signs, and whatever is not repeated exactly shows.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "miniature"))  # for those who import this without pytest

import make_base

import data
import train

SETTINGS = dict(task="mini", steps=4, states=4, group=2, k=2, rounds=2, grow_rounds=2, grow_every=3, holdout=4, test=4,
                solver_tokens=3, editor_tokens=6, solver_temperature=0.7, lr=1e-3, save_every=1)  # fmt: skip


def luck(text: str) -> int:
    return zlib.crc32(text.encode())


def small_world(patch=setattr, domains: tuple[int, int] = (3, 2)) -> None:
    """Make `data.Mini` small and lucky, for good or by a monkeypatch's setattr."""
    train_domains, test_domains = domains

    def init(self):
        self.sizes = {"train": train_domains, "test": test_domains, "dev": 1}

    patch(data.Mini, "__init__", init)
    # Random models never stop by themselves, so that all answers are cut off: no reason to end a run here.
    patch(train.evolve, "stop_if_lost", lambda *_: None)
    patch(data.Mini, "grade", lambda self, p, text: data.Grade(luck(p.id + text) % 3 == 0, text))
    patch(data.Mini, "read_edit", lambda self, text: text if luck(text) % 4 else None)
    patch(data.Mini, "perfect_instructions", None)  # luck has no headroom


def random_base(folder: Path, hidden: int = 16) -> Path:
    """A checkpoint folder with the miniature's tokenizer and random weights."""
    torch.manual_seed(0)
    tokenizer = make_base.mini_tokenizer()
    make_base.save_checkpoint(make_base.tiny_qwen3(tokenizer, hidden), tokenizer, folder)
    return folder


def flags(**settings) -> list[str]:
    """Settings as a command line."""
    pairs = ((f"--{name.replace('_', '-')}", value) for name, value in settings.items())
    return [word for flag, value in pairs for word in ([flag] if value is True else [flag, str(value)])]


def log_lines(out: Path) -> list[dict]:
    """The log without the clock."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def end_state(out: Path) -> dict:
    """All that a run leaves behind, but for clocks and the folder's own name; tensors as lists, to compare by ==."""
    newest = sorted(out.glob("checkpoint-*.pt"))[-1]
    checkpoint = torch.load(newest, weights_only=True)
    lines = [{name: value for name, value in line.items() if name != "seconds"} for line in checkpoint.pop("lines")]
    results = json.loads((out / "results.json").read_text())
    del results["seconds"], results["config"], results["cost"]  # the cost is counted since the start or --resume
    editor = train.evolve.load_model(out / "editor").model.state_dict()
    trees = {file.name: json.loads(file.read_text()) for file in sorted((out / "trees").glob("*.json"))}
    plain = json.dumps(checkpoint, default=lambda x: x.tolist())
    return {"checkpoint": newest.name, "state": plain, "lines": lines, "log": log_lines(out), "results": results,
            "editor": {name: tensor.tolist() for name, tensor in editor.items()}, "trees": trees}  # fmt: skip
