"""Learning to self-evolve: teach an editor, by reinforcement, to rewrite a frozen solver's instructions.

    python train.py                     the miniature: everything from scratch, on a laptop, in three minutes
    python train.py --advantage grpo    the same with another advantage
    python train.py --task bird --data DIR --model Qwen/Qwen3-4B-Instruct-2507 --gradient-checkpointing --out runs/bird

The steps, in the order of `main`: a base model (warmed up from scratch, or --model) serves as frozen solver and as editor;
trees of edits are grown to get start states; every step samples G edits for each of N start states, scores them by what
the solver gains on the holdout, and moves the editor along the policy gradient; last, untrained and trained editor evolve
instructions for domains that training never saw.

Left out on purpose: a critic, a KL term, several epochs per batch, a separate inference engine.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

import data
from evolve import (
    Settings,
    command_line,
    draw_batch,
    edit_chat,
    evolve_all,
    final_test,
    load_model,
    mean_error,
    open_run,
    option,
    plant,
    read_edit,
    score_all,
    solve_all,
    solver_sampling,
    split_problems,
    tree_name,
    tree_text,
    with_presets,
    write_report,
    write_text,
)
from lse import LocalModel, MasterAdamW, advantages, delta_reward, group_logprobs, policy_loss


@dataclass
class Config(Settings):
    """Everything that can be set. `--help` prints these words."""

    model: str = option("", "checkpoint folder or hub name of solver and editor; empty: warm up a tiny one (mini only)")
    out: str = option("", "the run's folder; empty: runs/<task>")
    advantage: Literal["delta", "grpo", "score", "line", "node", "batch"] = option(
        "delta", "delta is the paper's; the others are explained in lse.advantages")
    search: Literal["ucb", "chain", "best", "pareto"] = option("ucb", "search rule of growing and of the evaluation")
    steps: int | None = option(None, "RL steps")
    states: int | None = option(None, "N, start states per step")
    group: int | None = option(None, "G, edits sampled per start state")
    lr: float | None = option(None, "learning rate; falls linearly to 0")
    grow_every: int | None = option(None, "grow fresh start-state trees every so many steps; 0: only once")
    grow_rounds: int | None = option(None, "T of the trees that start states are taken from")
    micro_batch: int = option(8, "groups per forward and backward pass; 1 needs the least memory")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: for long prompts")
    max_batch_tokens: int = option(65536, "tokens per batch of generation, padding and new tokens included")
    save_every: int = option(1, "steps between checkpoints (a 4B model writes 48 GB each)")
    resume: bool = option(False, "go on from the last finished step of the run in --out")
    overwrite: bool = option(False, "delete the run in --out first")
    warmup_seed: int = option(0, "seed of the miniature's base model")
    hidden: int = option(64, "width of the miniature's base model")
    patience: float = option(1.0, "scales the longest that the lessons of the warm-up may take (tests: 0.01)")


# What a training field left at None becomes: the miniature's, tuned on its dev domains; the paper's; and a rehearsal.
TRAIN_PRESETS = {
    "mini": dict(steps=120, states=24, group=4, lr=4e-4, grow_every=20, grow_rounds=10),
    "paper": dict(steps=500, states=32, group=4, lr=1e-5, grow_every=0, grow_rounds=20),
    "rehearsal": dict(steps=2, states=2, group=2, lr=1e-5, grow_every=0, grow_rounds=2),
}


# ---------------------------------------------------------------------------------------------------------------------
# The warm-up: a tiny Qwen3 from scratch (miniature only). It stands in for pretraining.
# ---------------------------------------------------------------------------------------------------------------------


def tiny_qwen3(tokenizer, hidden: int = 64):
    """A Qwen3 of 129k parameters (hidden 64), random weights from the current torch seed."""
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, head_dim=hidden // 2, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    ))


def encode_row(tokenizer, messages: list[dict]) -> tuple[list[int], list[int]]:
    """Token ids of a chat, and its labels: what the assistant says and its end of turn; -100 elsewhere."""
    ids, labels = [], []
    for message in messages:
        part = tokenizer(f"<|{message['role']}|> {message['content']} <|end|>")["input_ids"]
        ids += part
        labels += [-100, *part[1:]] if message["role"] == "assistant" else [-100] * len(part)
    return ids, labels


def imitate(model, tokenizer, optimizer, *batches: list[list[dict]]) -> tuple[torch.Tensor, torch.Tensor]:
    """One supervised step on batches of chat rows. For the first batch: which tokens came out right, which had a label."""
    losses, labels, first = [], 0, None
    for rows in batches:
        encoded = zip(*(encode_row(tokenizer, row) for row in rows))
        ids, targets = (torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in part], True, padding_value=fill)
                        for part, fill in zip(encoded, (tokenizer.pad_token_id, -100)))
        logits, targets = model(ids).logits[:, :-1], targets[:, 1:]  # (B, T, V), (B, T)
        losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"))
        labels += (targets != -100).sum()
        first = first or (logits.argmax(-1) == targets, targets != -100)
    (sum(losses) / labels).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return first


def warm_up(task, tokenizer, seed: int, hidden: int = 64, patience: float = 1.0):
    """Teach a fresh tiny model its two jobs: to look words up in a glossary, and to edit a glossary, well or badly.

    Both skills form suddenly or not at all in long rows, where a fresh model attends to everything at once. So each begins
    with short rows that grow as fast as they are mastered: recall with 2 to 8 words, edits with 1 to 4 problems.
    `patience` scales the most steps that the lessons may take.
    """
    torch.manual_seed(seed)
    rng, model = random.Random(seed), tiny_qwen3(tokenizer, hidden)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98))
    recall, answers, clean, noisy = (math.ceil(patience * n) for n in (800, 300, 700, 400))  # the first three end early
    bar = tqdm(total=recall + answers + clean + noisy, desc="1. warm-up", unit="step", leave=False)

    size, mastery = 2, 0.0  # mastery: running share of rows that are right
    for step in range(recall):  # rows that end with an entry seen before, and some short solver chats
        bar.update()
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 30)
        sizes = [size - 1, size]  # about 1,400 tokens of recall, 600 of answers
        recalls = [data.recall_row(rng, rng.choice(sizes), size + 2) for _ in range(1400 // (2 * size + 6))]
        solves = [data.solve_row(rng, rng.choice(sizes), questions=2) for _ in range(600 // (2 * size + 41))]
        right, labelled = imitate(model, tokenizer, optimizer, recalls, solves)
        last = torch.where(labelled, torch.arange(labelled.shape[1]), 0).amax(1, keepdim=True) - 1  # before end of turn
        mastery = 0.8 * mastery + 0.2 * right.gather(1, last).float().mean().item()
        if mastery > 0.9 and size == 8:
            break
        if mastery > 0.9:
            size, mastery = size + 1, 0.0
    bar.total -= recall - step - 1

    for step in range(answers):  # whole solver chats
        bar.update()
        imitate(model, tokenizer, optimizer, [data.solve_row(rng, rng.randint(1, 10), questions=2) for _ in range(30)],
                [data.recall_row(rng, 8, 12) for _ in range(20)])
        if step % 25 == 24 and lookup(task, LocalModel(model, tokenizer)) > 0.97:
            break
    bar.total -= answers - step - 1

    size, mastery = 1, 0.0
    for step in range(clean):  # edits as they should be: keep all, add all
        bar.update()
        edits = [data.edit_row(rng, task, noisy=False, k=rng.randint(1, size), known=2 * size)
                 for _ in range(2000 // (12 + 28 * size))]
        solves = [data.solve_row(rng, rng.randint(1, 12)) for _ in range(4)]
        right, labelled = imitate(model, tokenizer, optimizer, edits, solves)
        mastery = 0.8 * mastery + 0.2 * (right | ~labelled).all(1).float().mean().item()
        if mastery > 0.75 and size == 4:
            break
        if mastery > 0.75:
            size, mastery = size + 1, 0.0
    bar.total -= clean - step - 1

    for step in range(noisy):  # edits as they often are
        bar.update()
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (noisy - step) / (0.7 * noisy))
        imitate(model, tokenizer, optimizer, [
            data.edit_row(rng, task, noisy=True) if rng.random() < 0.7 else data.solve_row(rng, rng.randint(1, 12))
            for _ in range(16)])
    bar.close()
    return model.eval()


def lookup(task, solver) -> float:
    """Share of right answers when the instructions are the true glossary, on domains used for nothing else."""
    domains = task.domains("dev")
    jobs = [(data.lines(task.glossary(d)), [p for p in task.problems(d) if p.split == "holdout"]) for d in domains]
    return fmean(map(fmean, score_all(task, solver, jobs, with_presets(Settings()))))


def warm_base(task, s: Config, out: Path) -> Path:
    """Warm up and save. A base that cannot look words up is no base: then another seed, and the time counts."""
    tokenizer = data.mini_tokenizer()
    for seed in range(s.warmup_seed, s.warmup_seed + 300, 100):
        model = warm_up(task, tokenizer, seed, s.hidden, s.patience)
        share = lookup(task, LocalModel(model, tokenizer))
        say(f"1. Warm-up, seed {seed}: with the true glossary as instructions the solver answers {share:.1%} right.")
        if share >= 0.97:
            break
        say("   Below 97%: once more with another seed.")
    for part in (model, tokenizer):
        part.save_pretrained(out / "base")
    return out / "base"


# ---------------------------------------------------------------------------------------------------------------------
# Reinforcement learning: one edit is one pull of a bandit
# ---------------------------------------------------------------------------------------------------------------------


def grow_states(task, solver, editor, s: Config, step: int) -> list[dict]:
    """Start states (c_0, R̄(c_0)): the scored nodes of one tree per training domain, grown by the loop of test time."""
    seed = s.seed * 1_000_003 + step  # fresh splits and batches each time
    own = replace(s, rounds=s.grow_rounds, test=0, seed=seed)
    trees = plant(task, task.domains("train"), solver, own)
    evolve_all(task, trees, solver, editor, own, s.search, progress="growing trees")
    return [{"domain": d, "instructions": node.instructions, "score": node.score, "seed": seed,
             "potential": tree.best().score - node.score}
            for d, tree in trees.items() for node in tree.nodes if node.score is not None]


def state_splits(task, state: dict, s: Config) -> dict:
    """Pool and holdout of a start state's domain, as its tree had them. Training keeps no test problems back."""
    return split_problems(task.problems(state["domain"]), replace(s, test=0, seed=state["seed"]))


def rollout(task, solver, editor, states: list[dict], s: Config, step: int) -> dict:
    """G edits for each of N start states, and the scores before and after them. Shapes (N, G), `before` (N,)."""
    start, splits = time.time(), [state_splits(task, x, s) for x in states]
    # S_0: k fresh problems of the state's domain, answered under c_0 as they would be at test time.
    jobs = [(x["instructions"], draw_batch(split["pool"], s, f"{x['domain']}/{i}", -1 - step))
            for i, (x, split) in enumerate(zip(states, splits))]
    summaries = solve_all(task, solver, jobs, **solver_sampling(s))
    # c_1 ~ f_ψ(c_0, S_0), at temperature 1 and with nothing cut off: else the gradient would be another policy's.
    chats = [edit_chat(task, editor, c_0, summary, s.max_prompt_tokens) for (c_0, _), summary in zip(jobs, summaries)]
    samples = editor.sample([chat for chat, _ in chats], n=s.group, max_new_tokens=s.editor_tokens)
    sampled, edits = time.time(), [[read_edit(task, sample)[0] for sample in row] for row in samples]
    # R̄(c_1) on the holdout that also scored c_0.
    jobs = [(text, split["holdout"]) for row, split in zip(edits, splits) for text in row if text is not None]
    scores = iter(score_all(task, solver, jobs, s))
    after = [[math.nan if text is None else fmean(next(scores)) for text in row] for row in edits]
    seconds = {"sample": sampled - start, "score": time.time() - sampled}
    after, before = torch.tensor(after), torch.tensor([x["score"] for x in states])  # (N, G), (N,)
    return dict(samples=samples, edits=edits, after=after, before=before, valid=~after.isnan(),
                dropped=sum(n for _, n in chats), seconds=seconds)


def learn(editor, batch: dict, weights: torch.Tensor, n_tokens: int, s: Config, optimizer: MasterAdamW) -> dict:
    """One policy-gradient step on groups with advantages `weights` (N, G); n_tokens counts those of all processes.

    The gradients of micro-batches add up to that of the batch, those of several processes are summed.
    """
    samples, entropy, drift = batch["samples"], 0.0, 0.0
    order = sorted(range(len(samples)), key=lambda i: len(samples[i][0].prompt_ids))  # alike lengths: little padding
    groups = [(samples[i][0].prompt_ids, [sample.ids for sample in samples[i]]) for i in order]
    editor.model.train()  # gradient checkpointing only works in this mode
    for i in range(0, len(groups), s.micro_batch):
        logps = [logp for group in group_logprobs(editor.model, groups[i : i + s.micro_batch]) for logp in group]
        policy_loss(logps, weights[order[i : i + s.micro_batch]].flatten(), n_tokens).backward()
        entropy -= sum(float(logp.detach().sum()) for logp in logps) / n_tokens  # E[-log p] = H
        if i == 0:  # one group again, in a batch of another shape: the ratio is 1 but for rounding, plenty in bf16
            with torch.no_grad():
                alone = group_logprobs(editor.model, groups[:1])[0]
            drift = max(float((new.exp() / old.detach().exp() - 1).abs().max()) for new, old in zip(alone, logps))
    if world() > 1:
        for parameter in optimizer.params:
            torch.distributed.all_reduce(parameter.grad)
    return {"entropy": entropy, "max_ratio_drift": drift, "grad_norm": optimizer.step()}


def train_step(task, solver, editor, optimizer, pool: list[dict], s: Config, step: int) -> tuple[dict, dict, list[dict]]:
    """One step of Section 2 of the paper. Returns (what to log, the batch of this process, its start states)."""
    for group in optimizer.adamw.param_groups:
        group["lr"] = s.lr * (1 - step / s.steps)
    # Every random draw is a function of (seed, step): resuming needs no random state. Groups never span processes.
    torch.manual_seed(hash((s.seed, step, rank())))
    # Curriculum: where the tree shows that more is possible, there is more to learn. The 0.1 leaves no state out.
    rng, potential = random.Random(f"{s.seed}/{step}"), [x["potential"] + 0.1 for x in pool]
    states = rng.choices(pool, potential, k=s.states)[rank() :: world()]
    batch = rollout(task, solver, editor, states, s, step)
    samples = [sample for row in batch["samples"] for sample in row]
    counts = {"tokens": sum(len(x.ids) for x in samples), "truncated": sum(x.truncated for x in samples)}
    parts = gather({name: batch[name] for name in ("after", "before", "valid", "dropped")} | counts)
    after, before, valid = (torch.cat([part[name] for part in parts]) for name in ("after", "before", "valid"))
    n_tokens, start = sum(part["tokens"] for part in parts), time.time()
    weights = advantages(s.advantage, after, before, valid)  # (N, G), some kinds need the whole batch
    n = len(states)
    learned = learn(editor, batch, weights[rank() * n : (rank() + 1) * n], n_tokens, s, optimizer)
    seconds = batch["seconds"] | {"learn": time.time() - start}
    reward, score = delta_reward(after, before[:, None], valid), torch.where(valid, after, -1.0)
    gains = torch.where(valid, after - before[:, None], 0.0)
    return {
        "step": step, "reward": float(reward.mean()), "positive": float((gains > 0).float().mean()),
        "before": float(before.mean()), "after": float(after[valid].mean()) if valid.any() else None,
        "valid": float(valid.float().mean()), "truncated": sum(part["truncated"] for part in parts),
        "dropped_problems": sum(part["dropped"] for part in parts),
        "zero_variance": int((score.amax(1) == score.amin(1)).sum()), "tokens": n_tokens, **learned,
        "lr": optimizer.adamw.param_groups[0]["lr"], "skipped": not math.isfinite(learned["grad_norm"]),
        "seconds": seconds,
    }, batch, states


def evaluate(task, solver, editor, s: Config, progress: str) -> tuple[dict, dict]:
    """Evolve each unseen domain, take the node that is best on its holdout, and ask it what nobody has asked before.

    Returns ({"test_accuracy", "stderr", "domains", ...}, trees); the standard error is over domains.
    """
    trees = plant(task, task.domains("test"), solver, s)
    evolve_all(task, trees, solver, editor, s, s.search, progress=progress)
    scores = final_test(task, trees, solver, s).values()
    mean, error = mean_error([fmean(best) for _, best in scores])
    return {"test_accuracy": mean, "stderr": None if math.isnan(error) else error, "domains": len(trees),
            "seed_instructions": fmean(fmean(seed) for seed, _ in scores),
            "holdout_best": fmean(tree.best().score for tree in trees.values())}, trees


# ---------------------------------------------------------------------------------------------------------------------
# Several processes (torchrun): each takes a share of the groups, all take the same step
# ---------------------------------------------------------------------------------------------------------------------


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def gather(part) -> list:
    """The parts of all processes, by rank."""
    parts = [part] * world()
    if world() > 1:
        torch.distributed.all_gather_object(parts, part)
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def save_checkpoint(out: Path, step: int, optimizer, pool: list[dict], noise: float) -> None:
    """State after `step` steps, first under another name, so that a kill leaves whole files; the newest two stay."""
    path = out / f"checkpoint-{step:06d}.pt"
    state = {"step": step, "optimizer": optimizer.state_dict(), "pool": pool, "noise": noise}  # optimizer: weights too
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)
    for old in sorted(out.glob("checkpoint-*.pt"))[:-2]:
        old.unlink()


def load_checkpoint(out: Path) -> dict | None:
    """The newest checkpoint that can be read; a torn one is named and the one before it taken."""
    for path in sorted(out.glob("checkpoint-*.pt"), reverse=True):
        try:
            return torch.load(path, weights_only=True)
        except Exception as error:  # whatever a torn file makes of the unpickler
            print(f"{path} cannot be read ({str(error)[:100]}): trying the one before it.")
    return None


def show_edit(batch: dict, states: list[dict]) -> str:
    """One sampled edit in words, with the score before and after it."""
    before, after = states[0]["score"], float(batch["after"][0, 0])
    new = batch["edits"][0][0] if batch["edits"][0][0] is not None else "INVALID: " + batch["samples"][0][0].text
    old = " / ".join(states[0]["instructions"].split("\n"))[:300] or "(empty)"
    return (f"   an edit for {states[0]['domain']}, holdout {before:.2f} -> {after:.2f}\n     old: {old}\n"
            f"     new: {' / '.join(new.split(chr(10)))[:300]}")


def reinforce(task, solver, editor, s: Config, out: Path) -> float:
    """The RL loop, from the last checkpoint if there is one. Returns the noise of the reward."""
    optimizer, pool, noise, first = MasterAdamW(editor.model, lr=s.lr), [], math.nan, 0
    saved = load_checkpoint(out) if s.resume else None
    if saved:
        first, pool, noise = saved["step"], saved["pool"], saved["noise"]
        optimizer.load_state_dict(saved["optimizer"])
    log = out / "log.jsonl"
    lines = log.read_text().splitlines()[:first] if log.exists() else []
    if rank() == 0:
        log.write_text("".join(line + "\n" for line in lines))
    bar = tqdm(range(first, s.steps), initial=first, total=s.steps, desc="3. RL", unit="step", disable=rank() > 0)
    skipped = 0
    for step in bar:
        # Start states, grown with the current editor: at test time it will edit its own earlier edits.
        if step == 0 or (s.grow_every and step % s.grow_every == 0):
            pool = gather(grow_states(task, solver, editor, s, step) if rank() == 0 else None)[0] + pool
        if step == 0:
            noise = reward_noise(task, solver, pool[: s.states], s)
            say(f"2. {len(pool)} start states. Unchanged instructions, scored twice, differ by {noise:.3f} (s.d.).")
        line, batch, states = train_step(task, solver, editor, optimizer, pool, s, step)
        skipped = skipped + 1 if line["skipped"] else 0
        if skipped == 3:
            raise SystemExit("Three steps in a row had no finite gradient: lower --lr, or look for NaN in the checkpoint.")
        if rank() == 0:
            if (step + 1) % s.save_every == 0 or step + 1 == s.steps:
                save_checkpoint(out, step + 1, optimizer, pool, noise)
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            tqdm.write(step_text(line))
            if step % 20 == 0:
                tqdm.write(show_edit(batch, states))
    return noise


def step_text(line: dict) -> str:
    """A log line for people."""
    seconds = line["seconds"]
    return (f"{line['step']:4d}  reward {line['reward']:+.3f}  better {line['positive']:4.0%}  valid {line['valid']:4.0%}"
            f"  cut {line['truncated']}  flat {line['zero_variance']}  entropy {line['entropy']:.2f}"
            f"  |g| {line['grad_norm']:.3f}  |ratio-1| {line['max_ratio_drift']:.0e}"
            f"  {line['tokens'] / sum(seconds.values()):.0f} tok/s  "
            + "  ".join(f"{name} {value:.2f}s" for name, value in seconds.items()) + "  SKIPPED" * line["skipped"])


def reward_noise(task, solver, states: list[dict], s: Config) -> float:
    """Standard deviation of the delta of the null edit: unchanged instructions, scored again."""
    jobs = [(x["instructions"], state_splits(task, x, s)["holdout"]) for x in states]
    deltas = [fmean(scores) - x["score"] for scores, x in zip(score_all(task, solver, jobs, s), states)]
    return fmean(delta**2 for delta in deltas) ** 0.5


def say(*words) -> None:
    if rank() == 0:
        print(*words, flush=True)


def main(s: Config) -> dict:
    """The paper, from start to end. Returns what results.json holds."""
    seconds, clock = {}, time.time()
    s = with_presets(s, TRAIN_PRESETS)
    task, out = data.load_task(s.task, s.data or None), Path(s.out or f"runs/{s.task}")
    open_run(s, out, free=["steps", "save_every"])

    # 1. A base model, twice: π_θ, the solver, stays as it is; f_ψ, the editor, starts from the same weights.
    base = s.model or (out / "base" if (out / "base").exists() else warm_base(task, s, out))
    solver, editor = (load_model(base, s.max_batch_tokens) for _ in range(2))
    if s.gradient_checkpointing:
        editor.model.gradient_checkpointing_enable()
    seconds["warm_up"], clock = time.time() - clock, time.time()

    # 2. Start states, and 3. reinforcement learning on them.
    noise = reinforce(task, solver, editor, s, out)
    for part in (editor.model, editor.tokenizer):
        part.save_pretrained(out / "editor")
    seconds["rl"], clock = time.time() - clock, time.time()

    # 4. Before and after, on domains that training never saw.
    untrained, trees_before = evaluate(task, solver, solver, s, "4. untrained editor")
    trained, trees = evaluate(task, solver, editor, s, "4. trained editor")
    seconds["evaluation"] = time.time() - clock
    results = {"untrained": untrained, "trained": trained, "reward_noise": noise, "seconds": seconds,
               "config": asdict(s)}
    write_text(out / "results.json", json.dumps(results, indent=1))
    for name, tree in trees.items():
        tree.save(out / "trees" / f"{tree_name(name)}.json")
    domain = next(iter(trees))
    pair = {"untrained editor": trees_before[domain], "trained editor": trees[domain]}
    write_report(out / "report.html", pair, f"Self-evolution on {domain}")
    print_results(results, domain, trees[domain], out)
    return results


def print_results(results: dict, domain: str, tree, out: Path) -> None:
    """The table of before and after, one tree, and where things are."""
    say(f"\nThe evolution of {domain} with the trained editor (* leads to the best node)\n{tree_text(tree)}")
    say(f"Its best instructions:\n{tree.best().instructions or '(empty)'}\n")
    say(f"Test accuracy on {results['trained']['domains']} unseen domains (mean ± s.e. over domains)")
    say(f"  seed instructions   {results['trained']['seed_instructions']:.3f}")
    for name in ("untrained", "trained"):
        error = results[name]["stderr"]
        spread = f" ± {error:.3f}" if error is not None else ""
        say(f"  {name + ' editor':19} {results[name]['test_accuracy']:.3f}{spread}")
    if results["config"]["task"] == "mini":
        say(f"  {EXPECT}")
    say("Seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in results["seconds"].items()))
    say(f"Saved in {out}: editor/ (loads with from_pretrained), results.json, log.jsonl, trees/, report.html.")


EXPECT = "expect"  # measured: see README.md

if __name__ == "__main__":
    try:
        main(command_line(Config, __doc__))
    except (ValueError, OSError) as error:  # wrong paths and values: a sentence, no traceback
        raise SystemExit(f"train.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("\nStopped. Every finished step is saved: go on with the same command and --resume.") from None
