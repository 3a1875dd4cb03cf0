"""Learning to self-evolve: teach an editor, by reinforcement, to rewrite a frozen solver's instructions.

    python train.py                     the miniature: everything from scratch, on a laptop, in three minutes
    python train.py --advantage grpo    the same with another advantage
    python train.py --task bird --data DIR --model Qwen/Qwen3-4B-Instruct-2507 --gradient-checkpointing --out runs/bird

The steps, each a section of `main`: a base model (warmed up from scratch, or --model) serves as frozen solver and as editor;
trees of edits are grown to get start states; then every step samples G edits for each of N start states, scores them by
what the solver gains on the holdout, and moves the editor along the policy gradient; last, untrained and trained editor
evolve instructions for domains that training never saw.

Left out on purpose: a critic, a KL term, several epochs per batch, a separate inference engine.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev

import torch
from tqdm import tqdm
from transformers import HfArgumentParser, Qwen3Config, Qwen3ForCausalLM

import data
from evolve import (Settings, draw_batch, edit_chat, evolve_all, option, plant, read_edit, score_all, solve_all,
                    solver_sampling, split_problems, with_presets)
from lse import LocalModel, MasterAdamW, advantages, delta_reward, group_logprobs, policy_loss


@dataclass
class Config(Settings):
    """Everything that can be set. `--help` prints these words."""

    model: str = option("", "checkpoint folder or hub name of solver and editor; empty: warm up a tiny one (mini only)")
    out: str = option("", "the run's folder; empty: runs/<task>")
    advantage: str = option("delta", "delta (the paper), grpo, score, or line, node, batch (see lse.advantages)")
    steps: int = option(80, "RL steps")
    states: int = option(24, "N, start states per step")
    group: int = option(4, "G, edits sampled per start state")
    lr: float | None = option(None, "learning rate, falling linearly to 0; default 4e-4 for mini, 1e-5 (the paper) else")
    grow_every: int = option(20, "grow fresh start-state trees with the current editor every so many steps")
    search: str = option("ucb", "search rule, for growing trees and for the final evaluation")
    micro_batch: int = option(8, "groups per forward and backward pass")
    warmup_seed: int = option(0, "seed of the miniature's base model")
    hidden: int = option(64, "width of the miniature's base model")


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


def imitate(model, tokenizer, rows: list[list[dict]], optimizer) -> float:
    """One supervised step on rows of chat. Returns the share of the rows' last two copied tokens that came out right."""
    encoded = [encode_row(tokenizer, row) for row in rows]
    ids, targets = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in part], batch_first=True, padding_value=fill)
        for part, fill in zip(zip(*encoded), (tokenizer.pad_token_id, -100))
    )
    logits, targets = model(ids).logits[:, :-1], targets[:, 1:]  # (B, T, V), (B, T)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    last = (targets != -100).sum(1) + (targets == -100).int().argmin(1) - 2  # the token before the end of turn
    row = torch.arange(len(rows))
    return (logits[row, last].argmax(-1) == targets[row, last]).float().mean().item()


def warm_up(task, tokenizer, seed: int, hidden: int = 64):
    """Teach a fresh tiny model the two jobs: look a word up in a glossary, and edit a glossary, well or badly.

    Looking things up (an induction head) forms suddenly or not at all, so it comes first: bare recall in short rows, whose
    glossary grows from 2 to 8 words as fast as they are mastered.
    """
    torch.manual_seed(seed)
    rng, model = random.Random(seed), tiny_qwen3(tokenizer, hidden)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98))
    size, mastery = 2, 0.0
    lesson = dict(recall=600, solve=200, clean=400, noisy=450)
    bar = tqdm(total=sum(lesson.values()), desc="warm-up", unit="step")
    for step in range(lesson["recall"]):
        sizes = [rng.choice([max(2, size - 1), size]) for _ in range(1536 // (2 * size + 10))]
        right = imitate(model, tokenizer, [data.recall_row(rng, n) for n in sizes], optimizer)
        mastery = 0.8 * mastery + 0.2 * right
        bar.update()
        if mastery > 0.9 and size == 8:
            break
        if mastery > 0.9:
            size, mastery = size + 1, 0.0
    print("recall", step, size)
    bar.total -= lesson["recall"] - step
    edits = lesson["clean"] + lesson["noisy"]
    for step in range(-lesson["solve"], edits):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (edits - step) / (0.4 * edits))
        p = 0.7 if step >= 0 else 0.0
        rows = [data.edit_row(rng, task, step >= lesson["clean"]) if rng.random() < p else data.solve_row(rng, rng.randint(1, 12)) for _ in range(16)]
        imitate(model, tokenizer, rows, optimizer)
        bar.update()
    bar.close()
    return model.eval()


def lookup(task, solver) -> float:
    """Share of right answers when the instructions are the true glossary, on domains used for nothing else."""
    domains = task.domains("dev")
    jobs = [(data.lines(task.glossary(d)), [p for p in task.problems(d) if p.split == "holdout"]) for d in domains]
    return fmean(map(fmean, score_all(task, solver, jobs, with_presets(Settings()))))


# ---------------------------------------------------------------------------------------------------------------------
# Reinforcement learning
# ---------------------------------------------------------------------------------------------------------------------


def grow_states(task, solver, editor, domains: list[str], s: Config) -> list[dict]:
    """Start states: every scored node of one tree per domain, grown by the very loop of test time."""
    trees = evolve_all(task, plant(task, domains, solver, s), solver, editor, s, s.search, progress="growing trees")
    return [
        {"domain": d, "instructions": n.instructions, "score": n.score, "potential": tree.best().score - n.score}
        for d, tree in trees.items() for n in tree.nodes if n.score is not None
    ]


def rollout(task, solver, editor, states: list[dict], s: Config, step: int) -> dict:
    """G edits for each of N start states, and what they are worth. One edit is one pull of a bandit (T = 1)."""
    clock = [time.time()]
    splits = {d: split_problems(task.problems(d), s) for d in {state["domain"] for state in states}}
    # The summary S_0: k fresh problems of the domain, answered under c_0.
    jobs = [(x["instructions"], draw_batch(splits[x["domain"]]["pool"], s, f"{x['domain']}/{i}", -1 - step)) for i, x in enumerate(states)]
    summaries = solve_all(task, solver, jobs, **solver_sampling(s))
    # The action c_1 ~ f_ψ(c_0, S_0): temperature 1, nothing cut off, or the gradient would be that of another policy.
    chats = [edit_chat(task, editor, x["instructions"], summary, s.max_prompt_tokens)[0] for x, summary in zip(states, summaries)]
    samples = editor.sample(chats, n=s.group, max_new_tokens=s.editor_tokens)
    clock.append(time.time())
    edits = [[read_edit(task, sample)[0] for sample in row] for row in samples]
    jobs = [(text, splits[x["domain"]]["holdout"]) for x, row in zip(states, edits) for text in row if text is not None]
    scores = iter(score_all(task, solver, jobs, s))
    after = torch.tensor([[0.0 if text is None else fmean(next(scores)) for text in row] for row in edits])  # (N, G)
    clock.append(time.time())
    return dict(samples=samples, edits=edits, after=after, before=torch.tensor([x["score"] for x in states]),
                valid=torch.tensor([[text is not None for text in row] for row in edits]), clock=clock)


def learn(editor, batch: dict, s: Config, optimizer: MasterAdamW) -> dict:
    """One policy-gradient step on a batch of groups; returns what there is to log."""
    weights = advantages(s.advantage, batch["after"], batch["before"], batch["valid"])
    n_tokens = sum(len(sample.ids) for row in batch["samples"] for sample in row)
    entropy = 0.0
    order = sorted(range(len(weights)), key=lambda i: len(batch["samples"][i][0].prompt_ids))
    for start in range(0, len(order), s.micro_batch):
        rows = [batch["samples"][i] for i in order[start : start + s.micro_batch]]
        groups = [(row[0].prompt_ids, [sample.ids for sample in row]) for row in rows]
        logp = [x for group in group_logprobs(editor.model, groups) for x in group]
        loss = policy_loss(logp, weights[order[start : start + s.micro_batch]].flatten(), n_tokens)
        loss.backward()
        entropy -= sum(float(x.detach().sum()) for x in logp) / n_tokens
    return dict(entropy=entropy, grad_norm=optimizer.step(), n_tokens=n_tokens)


def test_accuracy(task, solver, editor, domains, s: Config, search: str, progress: str = "") -> tuple[dict, dict]:
    """Evolve each domain, take the node that is best on the holdout, and score it on problems nobody has touched."""
    trees = evolve_all(task, plant(task, domains, solver, s), solver, editor, s, search, progress=progress)
    jobs = [(trees[d].best().instructions, split_problems(task.problems(d), s)["test"]) for d in domains]
    per = [fmean(x) for x in score_all(task, solver, jobs, s)]
    return dict(test_accuracy=fmean(per), stderr=stdev(per) / len(per) ** 0.5, domains=len(per),
                holdout=fmean(t.best().score for t in trees.values())), trees
