"""tests/bench_gpu.py, which few can run at its real sizes, runs at sizes that take seconds, whatever happens."""

from __future__ import annotations

import sys
from dataclasses import replace

import bench_gpu
import pytest
import torch

import train
from lse import MasterAdamW


@pytest.fixture
def bench(monkeypatch, capsys):
    """bench(*args) -> what `python tests/bench_gpu.py ARGS` prints, with everything tiny."""
    full = bench_gpu.small_sizes
    tiny = dict(vocabulary=128, common=24, question=8, edit_prompt=96, answer=3, longest_answer=9, edit=6, new=3)
    tiny |= dict(learned=4, learner_prompts=(24, 12, 36), problems=3, k=2)
    monkeypatch.setattr(bench_gpu, "small_sizes", lambda hidden, layers: replace(full(hidden, layers), **tiny))
    monkeypatch.setattr(bench_gpu.gc, "collect", lambda: 0)  # most of the time

    def run(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--hidden", "64", "--layers", "1", *args])
        bench_gpu.main()
        return capsys.readouterr().out

    return run


def test_every_table_is_filled_and_the_whole_step_is_the_default_one(bench) -> None:
    out = bench("--profile")
    for name in ("Sampling", "Reading the prompts", "Learner", "MasterAdamW", "One whole train_step", "Profile"):
        assert f"### {name}" in out
    assert "Error" not in out and "left out" not in out and "memory |" not in out and "–" not in out
    assert "8 states x 4 edits x 3 problems x 1 answer" in out
    # 8 states: k answers of 3 tokens for the summary, 4 edits of 6 tokens, 3 answers to score each
    for part in (f"| {8 * 2 * 3} |", f"| {8 * 4 * 6} |", f"| {8 * 4 * 3 * 3} |", f"| {8 * 4 * 6} learned |"):
        assert part in out


def test_lengths_can_be_spread(bench) -> None:
    out = bench("--spread", "--states", "2")
    scores = next(line for line in out.splitlines() if line.startswith("| scores"))
    tokens = int(scores.split("|")[3].replace(",", ""))
    assert 2 * 4 * 3 <= tokens < 2 * 4 * 3 * 9  # between one token an answer and the longest
    assert "One whole train_step: 2 states" in out and "Error" not in out


def test_a_row_without_memory_says_so_and_the_others_go_on(bench, monkeypatch) -> None:
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def other_error(*args, **kwargs):
        raise ValueError("something else\nand more")

    monkeypatch.setattr(bench_gpu, "plain_sample", out_of_memory)
    monkeypatch.setattr(bench_gpu, "plain_logprobs", other_error)
    out = bench("--states", "1")
    assert out.count("out of memory") == 2 and out.count("| ValueError: something else |") == 1
    assert "**the step**" in out


def test_what_there_is_no_time_or_no_host_memory_for_is_left_out(bench, monkeypatch) -> None:
    out = bench("--seconds", "0.001")
    assert out.count("left out: 0 s are over") + out.count("left out: 1 s are over") >= 12
    assert "left out: no optimizer" in out
    monkeypatch.setattr(train, "memory_free", lambda: 10)
    monkeypatch.setattr(MasterAdamW, "step", None)
    assert "left out: too little host memory" in bench("--states", "1")
