"""Sampling and learning with a shared prompt, measured: naive, ours and (if importable) TRL's GRPOTrainer, alternated.

    python tests/bench_learner.py                              every shape on both models, one thread: about 15 minutes
    python tests/bench_learner.py --hidden 64 --repeats 3      the small model only: about a minute
    python tests/bench_learner.py --shapes 2048/64 --groups 8  one line per model

One prompt, G responses of fixed length, random weights. "sample" is what it takes to draw them, "learn" one forward
and backward of the loss, "MB" the peak of resident memory above the start of "learn" (Linux). Times are medians of
processor seconds, so that other work on the machine disturbs them little.
"""

import argparse
import ctypes
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from test_sampling import tiny_model, tiny_tokenizer, user

from lse import LocalModel, logprobs, policy_loss


def naive(model, tokenizer, chat, g, t):
    """What most small repositories do: the prompt G times, in sampling and in learning."""
    ids = torch.tensor([LocalModel(model, tokenizer).encode(chat)]).expand(g, -1)

    def sample():
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0, max_new_tokens=t
        )

    def learn(out):
        logits = model(out, attention_mask=torch.ones_like(out), logits_to_keep=t + 1).logits[:, :-1]
        logp = logits.log_softmax(-1).gather(2, out[:, -t:, None])[:, :, 0]
        policy_loss(list(logp), weights(g), g * t).backward()

    return sample, learn


def ours(model, tokenizer, chat, g, t):
    local = LocalModel(model, tokenizer)
    local.eos = []  # fixed length

    def learn(row):
        rows = logprobs(model, row[0].prompt_ids, [s.ids for s in row])
        assert sum(map(len, rows)) == g * t
        policy_loss(rows, weights(g), g * t).backward()

    return lambda: local.sample([chat], n=g, max_new_tokens=t)[0], learn


def trl(model, tokenizer, chat, g, t):
    """GRPOTrainer's own generation and loss, without its optimizer step and logging."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        num_generations=g, per_device_train_batch_size=g, max_completion_length=t, beta=0.0,
        generation_kwargs={"min_new_tokens": t},
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, args=config, processing_class=tokenizer, train_dataset=Dataset.from_dict({"prompt": [chat] * g}),
        reward_funcs=lambda completions, **_: [float(i) for i in range(len(completions))],
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    model.train()

    def learn(inputs):
        assert inputs["completion_mask"].sum() == g * t
        trainer.compute_loss(model, inputs).backward()

    return lambda: trainer._generate_and_score_completions([{"prompt": chat}] * g), learn


def weights(g: int) -> list[float]:
    return [1.0 - 2.0 * i / (g - 1) for i in range(g)]


def status(field: str) -> float:
    """A size from /proc/self/status in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def measure(sample, learn, model) -> tuple[float, float, float]:
    """Processor seconds to sample and to learn, peak MB while learning."""
    start = time.process_time()
    drawn = sample()
    sampled = time.process_time()
    linux = sys.platform == "linux"
    if linux:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = status("VmRSS")
    begin = time.process_time()
    learn(drawn)
    end = time.process_time()
    peak = status("VmHWM") - before if linux else float("nan")
    model.zero_grad()
    return sampled - start, end - begin, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 512], help="64: 2 layers; 512: 4 layers")
    parser.add_argument("--shapes", nargs="+", default=["512/64", "2048/64", "2048/256"], help="prompt/response tokens")
    parser.add_argument("--groups", type=int, nargs="+", default=[4, 8], help="responses per prompt")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    methods = {"naive": naive, "ours": ours}
    try:
        __import__("trl")

        methods["TRL"] = trl
    except ImportError:
        print("TRL is not importable here: its columns are left out.\n")
    heads = [f"{name} {what}" for name in methods for what in ("sample s", "learn s", "MB")]
    gains = [f"{name}/ours {what}" for name in methods if name != "ours" for what in ("sample", "learn", "both", "MB")]
    print("| model | P/T | G |", " | ".join(heads + gains), "|")
    print("|---" * (3 + len(heads) + len(gains)) + "|")
    for hidden in args.hidden:
        tokenizer = tiny_tokenizer()
        for shape in args.shapes:
            p, t = map(int, shape.split("/"))
            for g in args.groups:
                runs = {}
                for name, method in methods.items():
                    model = tiny_model(
                        hidden, 2 if hidden == 64 else 4, initializer_range=0.02, eos_token_id=None,
                        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 64, head_dim=32,
                    )  # fmt: skip
                    chat = user(" ".join(f"w{i % 80}" for i in range(p - 2)))
                    runs[name] = (*method(model, tokenizer, chat, g, t), model)
                results = {name: [] for name in runs}
                for repeat in range(args.repeats + (hidden == 64)):  # the first run of the small model warms up
                    for name, run in runs.items():
                        result = measure(*run)
                        if repeat or hidden != 64:
                            results[name].append(result)
                median = {name: [statistics.median(column) for column in zip(*rows)] for name, rows in results.items()}
                cells = [f"{x:.2f}" if i < 2 else f"{x:.0f}" for row in median.values() for i, x in enumerate(row)]
                s, learn, mb = median["ours"]
                for name, (a, b, c) in median.items():
                    if name != "ours":
                        cells += [f"{r:.1f}×" for r in (a / s, b / learn, (a + b) / (s + learn), c / mb)]
                print(f"| h{hidden} | {shape} | {g} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
