"""The same numbers on a GPU as on the CPU: log-probs, sampling, one optimizer step, one step of training.

    python -m pytest tests/test_gpu.py          skipped, with the reason, where there is no GPU
    python tests/test_gpu.py cuda               the checks alone; "cpu" tries the checks themselves, without a GPU

All other tests see no GPU (conftest.py). So the checks run in one process of their own, which reports as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "miniature")]

# ---------------------------------------------------------------------------------------------------------------------
# Checks: each takes the device, and fails by an assertion
# ---------------------------------------------------------------------------------------------------------------------


def shipped(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """One of the miniature's models: trained, so sure of much that it says, and of different lengths."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lse import LocalModel

    folder = TESTS / "miniature" / name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    return LocalModel(model.eval(), AutoTokenizer.from_pretrained(folder))


def solver_chats() -> list[list[dict]]:
    """Two questions each of eight domains, under glossaries of one to eight lines: prompts of many lengths."""
    from data import Mini

    task, chats = Mini(), []
    for i, domain in enumerate(task.domains("dev")[:8]):
        entries = list(task.glossary(domain).items())[: i + 1]
        instructions = "\n".join(f"{word} {column}" for word, column in entries)
        chats += [task.solve_chat(instructions, problem) for problem in task.problems(domain)[:2]]
    return chats


def ragged_groups() -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Prompts with three responses each, sampled on the CPU at temperature 1."""
    torch.manual_seed(0)
    rows = shipped("base").sample(solver_chats(), n=3, max_new_tokens=16)
    return [(row[0].prompt_ids, [sample.ids for sample in row]) for row in rows]


def flat_logprobs(model, groups) -> torch.Tensor:
    """log p of every response token of all groups, on the CPU, (tokens,)."""
    from lse import group_logprobs

    with torch.no_grad():
        rows = group_logprobs(model, groups)
    return torch.cat([logp.float().cpu() for row in rows for logp in row])


def check_logprobs_in_float32(device: str) -> None:
    from lse import plain_logprobs

    groups = ragged_groups()
    expected = flat_logprobs(shipped("base").model, groups)
    model = shipped("base", device).model
    torch.testing.assert_close(flat_logprobs(model, groups), expected, atol=1e-3, rtol=0)
    with torch.no_grad():
        plain = [torch.cat(plain_logprobs(model, *group)).cpu() for group in groups]
    torch.testing.assert_close(torch.cat(plain), expected, atol=1e-3, rtol=0)


def check_logprobs_in_bf16(device: str) -> None:
    """bf16 has 8 bits of precision: single tokens may be off by some tenths, the mean by little."""
    groups = ragged_groups()
    expected = flat_logprobs(shipped("base").model, groups)
    found = flat_logprobs(shipped("base", device, torch.bfloat16).model, groups)
    off = (found - expected).abs()
    assert off.mean() < 0.03, f"off by {off.mean():.4f} in the mean"
    assert off.max() < 1.0, f"off by up to {off.max():.3f}"


def check_greedy_samples(device: str) -> None:
    """The same answers, token by token, as on the CPU."""
    chats = solver_chats()
    expected = shipped("base").sample(chats, temperature=0, max_new_tokens=16)
    found = shipped("base", device).sample(chats, temperature=0, max_new_tokens=16)
    assert [row[0].ids.tolist() for row in found] == [row[0].ids.tolist() for row in expected]
    assert all(row[0].ids.device.type == "cpu" for row in found)


def check_sampling_against_scoring(device: str) -> None:
    """Of 4,000 first tokens, each comes as often as `logprobs` says it should, within five standard deviations."""
    import make_base

    from lse import LocalModel, logprobs

    torch.manual_seed(0)
    tokenizer = make_base.mini_tokenizer()
    network = make_base.tiny_qwen3(tokenizer, 16)
    for parameter in network.parameters():
        parameter.data *= 8  # a fresh model finds all words alike
    model = LocalModel(network.to(device).eval(), tokenizer)
    n = 4000
    [row] = model.sample([[{"role": "user", "content": "total profit"}]], n=n, max_new_tokens=1)
    words = [torch.tensor([word]) for word in range(len(tokenizer))]
    with torch.no_grad():
        scored = logprobs(model.model, row[0].prompt_ids, words)
    expected = torch.cat([logp.float().cpu() for logp in scored]).exp()  # (V,)
    assert abs(expected.sum() - 1) < 1e-3 and expected.max() > 3 / len(words)
    found = torch.bincount(torch.cat([sample.ids for sample in row]), minlength=len(words)) / n
    deviation = (expected * (1 - expected) / n).sqrt() + 1 / n
    assert ((found - expected).abs() < 5 * deviation).all()


def check_one_step_of_master_adamw(device: str) -> None:
    """A bf16 model with its masters on the CPU takes the step of the same weights in float32, too small for bf16."""
    from lse import MasterAdamW

    torch.manual_seed(0)
    small = torch.nn.Linear(8, 8).to(device, torch.bfloat16)
    exact = torch.nn.Linear(8, 8)
    exact.load_state_dict({name: tensor.float().cpu() for name, tensor in small.state_dict().items()})
    optimizers = MasterAdamW(small, lr=1e-6), MasterAdamW(exact, lr=1e-6)
    before = [weight.clone() for weight in optimizers[0].masters]
    for low, high in zip(small.parameters(), exact.parameters()):
        low.grad = torch.randn(low.shape).to(device, torch.bfloat16)
        high.grad = low.grad.float().cpu()
    norms = [optimizer.step() for optimizer in optimizers]
    assert abs(norms[0] - norms[1]) < 0.02 * norms[1]
    for old, master, high, low in zip(before, optimizers[0].masters, exact.parameters(), small.parameters()):
        assert master.device.type == "cpu" and master.dtype == torch.float32
        assert not torch.equal(master, old)
        torch.testing.assert_close(master, high.detach(), atol=1e-7, rtol=0)
        assert torch.equal(low.detach().cpu(), master.bfloat16())


def check_one_train_step(device: str) -> None:
    """A random model in bf16, with gradient checkpointing: the weights move, and every figure of the log is finite."""
    import math

    import make_base
    import tiny
    from accelerate import Accelerator

    import data
    import evolve
    import train
    from lse import LocalModel, MasterAdamW

    tiny.small_world()  # a random model writes nothing that the miniature would accept
    torch.manual_seed(0)
    tokenizer = make_base.mini_tokenizer()
    solver = LocalModel(make_base.tiny_qwen3(tokenizer, 16).to(device, torch.bfloat16), tokenizer)
    editor = LocalModel(make_base.tiny_qwen3(tokenizer, 16).to(device, torch.bfloat16), tokenizer)
    s = evolve.with_presets(train.Config(**tiny.SETTINGS | {"gradient_checkpointing": True}))
    editor.model.activation_checkpointing_enable()
    optimizer = MasterAdamW(editor.model, lr=s.lr)
    before = [master.clone() for master in optimizer.masters]
    pool = [train.StartState(name, "profit c1", 0.0, 0, 1.0) for name in data.Mini().domains("train")]
    accelerator = Accelerator(cpu=device == "cpu")
    line, rollouts = train.train_step(data.Mini(), solver, editor, optimizer, pool, s, 0, accelerator)
    assert len(rollouts) == s.states and not line["skipped"]
    for name in ("reward", "entropy", "grad_norm", "valid", "before"):
        assert math.isfinite(line[name]), name
    assert line["grad_norm"] > 0 and 0 < line["entropy"] < math.log(len(tokenizer)) + 0.1
    assert any(not torch.equal(old, new) for old, new in zip(before, optimizer.masters))
    for master, weight in zip(optimizer.masters, editor.model.parameters()):
        assert weight.device.type == torch.device(device).type and torch.equal(weight.cpu(), master.bfloat16())


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}

# ---------------------------------------------------------------------------------------------------------------------
# The process that runs them, and the tests that read its report
# ---------------------------------------------------------------------------------------------------------------------


def run_checks(device: str) -> dict[str, str]:
    """Per check "" or its traceback; {"skip": reason} where torch finds no GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        return {"skip": "torch.cuda.is_available() is False"}
    report = {}
    for name, check in CHECKS.items():
        try:
            check(device)
            report[name] = ""
        except Exception:
            report[name] = traceback.format_exc()
    return report


def why_not() -> str:
    """A reason to skip that costs nothing to find; "" if there may be a GPU."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch was built for the CPU"
    if os.environ.get("LSE_TEST_GPUS") == "":
        return "CUDA_VISIBLE_DEVICES hides all GPUs"
    if not any(shutil.which(tool) for tool in ("nvidia-smi", "rocm-smi", "rocminfo")):
        return "no driver of a GPU is installed"
    return ""


@pytest.fixture(scope="module")
def report() -> dict[str, str]:
    """What the checks say, from a process that sees the GPUs which conftest.py has hidden."""
    if reason := why_not():
        pytest.skip(f"needs a GPU: {reason}")
    env = os.environ.copy()
    del env["CUDA_VISIBLE_DEVICES"]
    if env["LSE_TEST_GPUS"] != "all":
        env["CUDA_VISIBLE_DEVICES"] = env["LSE_TEST_GPUS"]
    done = subprocess.run([sys.executable, __file__, "cuda"], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    if "skip" in found:
        pytest.skip(f"needs a GPU: {found['skip']}")
    return found


@pytest.mark.parametrize("name", CHECKS)
def test_on_a_gpu(report: dict[str, str], name: str) -> None:
    assert report[name] == "", report[name]


if __name__ == "__main__":
    print(json.dumps(run_checks(sys.argv[1])))
