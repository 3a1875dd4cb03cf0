"""Sampling for rows that share prompts, measured on a CPU: plain `generate`, the way before, the way now.

    python tests/bench_sampling.py               all shapes, one thread: about 8 minutes
    python tests/bench_sampling.py --shape tiny  the miniature's shapes only: about a minute
    python tests/bench_sampling.py --run now 16 4 2000 60 48 512     one run (what the above starts): seconds and MB

A shape: D prompts of P + Q tokens, P of them common to all, n rows for each prompt, T new tokens, a model of random
weights. Every run is a process of its own, the ways alternate, and the medians are printed: processor seconds to sample
(the process's start and a first small sample not counted), MB the peak of resident memory above what was held before.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import DynamicCache, DynamicLayer, Qwen3Config, Qwen3ForCausalLM

sys.path[:0] = [str(Path(__file__).parents[1])]
from lse import blank_generation, shared_sample, until_end

WORDS = 512
SHAPES = {  # name: [(prompts, rows of each, common tokens, own tokens, new tokens, width of the model), ...]
    "wide": [(16, 4, 2000, 60, 48, 512)],
    "tiny": [(8, 4, 60, 40, 40, 64), (8, 1, 60, 40, 40, 64), (64, 4, 5, 6, 16, 64), (24, 8, 5, 6, 16, 64)],
}


class RoomyLayer(DynamicLayer):
    """The way before: every row has a copy of its prompt, with room for all that will be sampled."""

    def __init__(self, layer, owner, room):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.stores = [F.pad(old[owner], (0, 0, 0, room)) for old in (layer.keys, layer.values)]
        self.keys, self.values = (store[:, :, : layer.keys.shape[2]] for store in self.stores)

    def update(self, key_states, value_states, *args, **kwargs):
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        for store, new in zip(self.stores, (key_states, value_states)):
            store[:, :, start:end] = new
        self.keys, self.values = (store[:, :, :end] for store in self.stores)
        return self.keys, self.values


@torch.no_grad()
def before_sample(model, rows, eos, pad, **options):
    distinct = {prompt: i for i, prompt in enumerate(sorted(set(rows)))}
    owner = torch.tensor([distinct[row] for row in rows])
    prefix = len(os.path.commonprefix([min(rows)[:-1], max(rows)[:-1]]))
    gaps = [max(map(len, distinct)) - len(prompt) for prompt in distinct]
    ids = torch.tensor([[*prompt[:-1], *[pad] * gap, prompt[-1]] for prompt, gap in zip(distinct, gaps)])
    mask = torch.tensor([[1] * (len(p) - 1) + [0] * gap + [1] for p, gap in zip(distinct, gaps)])
    cache = DynamicCache(config=model.config)
    with blank_generation(model, eos, pad):
        if prefix:
            model(ids[:1, :prefix], past_key_values=cache, logits_to_keep=1)
            cache.batch_repeat_interleave(len(distinct))
        if prefix < ids.shape[1] - 1:
            model(ids[:, prefix:-1], past_key_values=cache, logits_to_keep=1)
        for i, layer in enumerate(cache.layers):
            cache.layers[i] = RoomyLayer(layer, owner, options["max_new_tokens"])
        out = model.generate(ids[owner], attention_mask=mask[owner], past_key_values=cache, **options)
    return [until_end(row, eos) for row in out[:, ids.shape[1] :]]


@torch.no_grad()
def plain_sample(model, rows, eos, pad, **options):
    """What most small repositories do: `generate` with every prompt repeated, padded on the left, in one batch."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + [*row] for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    with blank_generation(model, eos, pad):
        out = model.generate(ids, attention_mask=mask, **options)
    return [until_end(row, eos) for row in out[:, longest:]]


WAYS = {"plain": plain_sample, "before": before_sample, "now": shared_sample}


def status(field: str) -> float:
    """A size from /proc/self/status in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def run(way: str, prompts: int, n: int, common: int, own: int, new: int, width: int) -> dict:
    torch.manual_seed(0)
    heads = 8 if width == 512 else 2
    config = Qwen3Config(
        vocab_size=WORDS, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4 if width == 512 else 3,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=width // heads, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    head = torch.randint(3, WORDS, (common,)).tolist()
    rows = [tuple(head + torch.randint(3, WORDS, (own + i % 5,)).tolist()) for i in range(prompts)]
    rows = sorted(rows * n)
    options = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    WAYS[way](model, [row[:9] for row in rows[:2]], [], 0, max_new_tokens=2, **options)  # what is loaded at first use
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    held = status("VmRSS")
    times = []
    for _ in range(1 if width == 512 else 5):
        torch.manual_seed(1)
        begin = time.process_time()
        out = WAYS[way](model, rows, [], 0, max_new_tokens=new, **options)
        times.append(time.process_time() - begin)
    same = hash(tuple(tuple(row.tolist()) for row in out)) % 10**6
    return {"seconds": min(times), "MB": status("VmHWM") - held, "tokens": sum(map(len, out)), "same": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run", nargs=7, metavar=("WAY", "D", "n", "P", "Q", "T", "WIDTH"))
    args = parser.parse_args()
    if args.run:
        torch.set_num_threads(1)
        print(json.dumps(run(args.run[0], *map(int, args.run[1:]))))
        return
    print("| prompts x rows | common + own | new | width |", " | ".join(f"{way} s | MB" for way in WAYS),
          "| plain / now | before / now | same tokens |")  # fmt: skip
    print("|---" * (4 + 2 * len(WAYS) + 3) + "|")
    for name, shapes in SHAPES.items():
        for shape in shapes if args.shape in (name, "all") else []:
            found = {way: [] for way in WAYS}
            for _ in range(args.repeats):
                for way, results in found.items():
                    command = [sys.executable, __file__, "--run", way, *map(str, shape)]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    results.append(json.loads(done.stdout.splitlines()[-1]))
            seconds = {way: statistics.median(r["seconds"] for r in results) for way, results in found.items()}
            peak = {way: statistics.median(r["MB"] for r in results) for way, results in found.items()}
            same = len({r["same"] for results in found.values() for r in results}) == 1
            d, n, common, own, new, width = shape
            cells = [f"{d} x {n} | {common} + {own} | {new} | {width}"]
            cells += [f"{seconds[way]:.3f} | {peak[way]:.0f}" for way in WAYS]
            cells += [f"{seconds[way] / seconds['now']:.2f}" for way in ("plain", "before")]
            print("|", " | ".join(cells), "|", same, "|", flush=True)


if __name__ == "__main__":
    main()
