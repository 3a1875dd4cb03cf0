"""Learning to self-evolve: teach an editor, by reinforcement, to rewrite a frozen solver's instructions.

    python train.py                     the miniature: everything from scratch, on a laptop, in three minutes
    python train.py --advantage grpo    the same with another advantage
    python train.py --dry-run           every check and the plan of a run, without a model call
    python train.py --task bird --data DIR --model Qwen/Qwen3-4B-Instruct-2507 --gradient-checkpointing --out runs/bird
    torchrun --nproc_per_node 8 train.py --task bird ...   the same on eight GPUs: each takes an eighth of the states

The steps, in the order of this file: a base model (warmed up from scratch, or --model) serves as frozen solver and as
editor; trees of edits are grown to get start states; every step samples G edits for each of N start states, scores them
by what the solver gains on the holdout, and moves the editor along the policy gradient; last, untrained and trained
editor evolve instructions for domains that training never saw.

For readers who know PyTorch but not RL, the whole of it: sample from the model, weight the log-probability of each
sample by how much better than expected it did (its *advantage*), and follow the gradient. The samples are the training
data and change with the model, so the loss says nothing about progress; the reward does.

Left out on purpose: a critic, a KL term, several epochs per batch, a separate inference engine.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

import data
import evolve
from evolve import Settings, option
from lse import LocalModel, MasterAdamW, advantages, delta_reward, group_logprobs, policy_loss


@dataclass
class Config(Settings):
    """Everything that can be set. `--help` prints these words."""

    model: str = option("", "checkpoint folder or hub name of solver and editor; empty: warm up a tiny one (mini only)")
    advantage: Literal["delta", "grpo", "score", "line", "node", "batch"] = option(
        "delta", "delta is the paper's; the others are explained in lse.advantages")
    steps: int | None = option(None, "RL steps")
    states: int | None = option(None, "N, start states per step")
    group: int | None = option(None, "G, edits sampled per start state")
    lr: float | None = option(None, "learning rate; falls linearly to 0")
    grow_every: int | None = option(None, "grow fresh start-state trees every so many steps; 0: only once")
    grow_rounds: int | None = option(None, "T of the trees that start states are taken from")
    skip_small: bool = option(False, "leave out domains with too few problems instead of stopping")
    micro_batch: int = option(8, "groups per forward and backward pass; 1 needs the least memory")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: for long prompts")
    save_every: int = option(1, "steps between checkpoints (a 4B model writes 48 GB each)")
    warmup_seed: int = option(0, "seed of the miniature's base model")
    hidden: int = option(64, "width of the miniature's base model")
    patience: float = option(1.0, "scales the longest that the lessons of the warm-up may take (tests: 0.01)")


# What a training field left at None becomes: the miniature's values, tuned on its dev domains; the paper's; and a
# rehearsal's, for a real task on a machine without a GPU. `evolve.PRESETS` holds those that both scripts share.
TRAIN_PRESETS = {
    "mini": dict(steps=120, states=24, group=4, lr=4e-4, grow_every=20, grow_rounds=10),
    "paper": dict(steps=500, states=32, group=4, lr=1e-5, grow_every=0, grow_rounds=20),
    "rehearsal": dict(steps=2, states=2, group=2, lr=1e-5, grow_every=0, grow_rounds=2),
}
# What may differ when a run is resumed: its length, how often it saves, and where its folder has been moved to.
FREE = ["steps", "save_every", "out", "dry_run", "resume", "overwrite"]


# ---------------------------------------------------------------------------------------------------------------------
# Step 1. The warm-up: a tiny Qwen3 from scratch (miniature only). It stands in for pretraining.
# ---------------------------------------------------------------------------------------------------------------------
# Reinforcement learning creates no skill: it makes more frequent what the model already does now and then. So the base
# must be able to use a glossary, as a solver, and to write one in all qualities, as an editor. With --model, none of
# this section runs.


def tiny_qwen3(tokenizer, hidden: int = 64):
    """A Qwen3 of 129k parameters (hidden 64), random weights from the current torch seed.

    Three layers: looking a word up takes two (find where it stood before, copy what stood behind it) and one to spare.
    """
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, head_dim=hidden // 2, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None))


def encode_row(tokenizer, messages: list[dict]) -> tuple[list[int], list[int]]:
    """Token ids of a chat, and its labels: what the assistant says and its end of turn; -100 (no label) elsewhere.

    The ids are those that the chat template of `data.mini_tokenizer` gives; cross_entropy leaves out what is -100.
    """
    ids = [tokenizer(f"<|{m['role']}|> {m['content']} <|end|>")["input_ids"] for m in messages]
    labels = [[-100, *part[1:]] if m["role"] == "assistant" else [-100] * len(part) for m, part in zip(messages, ids)]
    return sum(ids, []), sum(labels, [])


def imitate(model, tokenizer, optimizer, *batches: list[list[dict]]) -> torch.Tensor:
    """One supervised step on batches of chat rows. Returns which tokens of the first came out right, (B, T).

    A token without a label counts as right. Rows of a kind make a batch of their own, so that short ones need no
    padding; the losses of all batches add up to one token mean.
    """
    outputs = []
    for rows in batches:
        encoded = zip(*(encode_row(tokenizer, row) for row in rows))
        ids, targets = (torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in part], True, padding_value=fill)
                        for part, fill in zip(encoded, (tokenizer.pad_token_id, -100)))
        outputs.append((model(ids).logits[:, :-1], targets[:, 1:]))  # (B, T, V), (B, T)
    losses = [F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") for logits, targets in outputs]
    (torch.stack(losses).sum() / sum((targets != -100).sum() for _, targets in outputs)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    logits, targets = outputs[0]
    return (logits.argmax(-1) == targets) | (targets == -100)


def practise(bar, steps: int, lesson: Callable[[int, int], float], size: int, last: int, enough: float) -> None:
    """At most `steps` times lesson(step, size) -> share of rows that came out right.

    The size grows by one when the running share passes `enough`; once it does so at size `last`, the lesson is learned.
    """
    mastery = 0.0
    for step in range(steps):
        bar.update()
        mastery = 0.8 * mastery + 0.2 * lesson(step, size)
        if mastery > enough:
            size, mastery = size + 1, 0.0
        if size > last:
            break
    bar.total -= steps - step - 1


def warm_up(task, tokenizer, seed: int, hidden: int = 64, patience: float = 1.0):
    """Teach a fresh tiny model its two jobs: to look words up in a glossary, and to edit a glossary, well or badly.

    Both skills form suddenly or not at all in long rows, where a fresh model attends to everything at once. So each
    begins with short rows that grow as fast as they are mastered: recall with 2 to 8 words, edits with 1 to 4 problems.
    `patience` scales the most steps that the lessons may take.
    """
    torch.manual_seed(seed)
    rng, model = random.Random(seed), tiny_qwen3(tokenizer, hidden)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98))
    teach, schedule = partial(imitate, model, tokenizer, optimizer), optimizer.param_groups[0]
    most = [math.ceil(patience * steps) for steps in (800, 300, 700, 400)]  # the first three end early

    def recall(step: int, size: int) -> float:  # rows that end with an entry seen before, and some short solver chats
        schedule["lr"], sizes = 2e-3 * min(1, (step + 1) / 30), [size - 1, size]
        rows = [data.recall_row(rng, rng.choice(sizes), size + 2) for _ in range(1400 // (2 * size + 6))]  # tokens
        chats = [data.solve_row(rng, rng.choice(sizes), questions=2) for _ in range(600 // (2 * size + 41))]
        return teach(rows, chats)[:, -2].float().mean().item()  # the last word before the end; equally long rows

    def answer(step: int, _) -> float:  # whole solver chats, until lookup works on real domains
        teach([data.solve_row(rng, rng.randint(1, 10), questions=2) for _ in range(30)],
              [data.recall_row(rng, 8, 12) for _ in range(20)])
        return step % 25 == 24 and lookup(task, LocalModel(model, tokenizer)) > 0.97

    def clean_edit(step: int, size: int) -> float:  # edits as they should be: keep all, add all
        edits = [data.edit_row(rng, task, noisy=False, k=rng.randint(1, size), known=2 * size)
                 for _ in range(2000 // (12 + 28 * size))]
        return teach(edits, [data.solve_row(rng, rng.randint(1, 12)) for _ in range(4)]).all(1).float().mean().item()

    def noisy_edit(step: int, _) -> float:  # edits as they often are, to the last step: the habit that RL has to break
        schedule["lr"] = 2e-3 * min(1, (most[3] - step) / (0.7 * most[3]))
        teach([data.edit_row(rng, task, noisy=True) if rng.random() < 0.7 else data.solve_row(rng, rng.randint(1, 12))
               for _ in range(16)])
        return 0.0

    with tqdm(total=sum(most), desc="1. warm-up", unit="step", leave=False) as bar:
        practise(bar, most[0], recall, size=2, last=8, enough=0.9)
        practise(bar, most[1], answer, size=0, last=0, enough=0.0)
        practise(bar, most[2], clean_edit, size=1, last=4, enough=0.75)
        practise(bar, most[3], noisy_edit, size=0, last=0, enough=1.0)
    return model.eval()


def lookup(task, solver) -> float:
    """Share of right answers when the instructions are the true glossary: what perfect instructions would be worth.

    On the dev domains, which neither training nor the evaluation sees.
    """
    domains = task.domains("dev")
    jobs = [(data.lines(task.glossary(d)), [p for p in task.problems(d) if p.split == "holdout"]) for d in domains]
    return fmean(map(fmean, evolve.score_all(task, solver, jobs, evolve.with_presets(Settings()))))


def warm_base(task, s: Config, folder: Path) -> None:
    """Warm up and save to `folder`.

    A base that cannot look words up is no base: no instructions could help it, so no edit would be worth anything. Then
    another seed is tried, three in all, and the time counts.
    """
    tokenizer = data.mini_tokenizer()
    for seed in range(s.warmup_seed, s.warmup_seed + 300, 100):
        model = warm_up(task, tokenizer, seed, s.hidden, s.patience)
        share = lookup(task, LocalModel(model, tokenizer))
        say(f"1. Warm-up, seed {seed}: with the true glossary as instructions the solver answers {share:.1%} right "
            "(97% are enough).")
        if share >= 0.97:
            break
    save_model(LocalModel(model, tokenizer), folder)


# ---------------------------------------------------------------------------------------------------------------------
# Step 2. Start states: where an edit begins
# ---------------------------------------------------------------------------------------------------------------------
# In the words of RL: a *state* is a pair of instructions c_0 and summary S_0, an *action* a whole edit c_1, and the
# episode ends after one action (T = 1 in the paper, a contextual bandit). What edits lead to in the long run is left to
# the search at test time. What training can choose is the states it starts from.


def enough_problems(task, split: str, s: Config) -> list[str]:
    """The domains of a split. ValueError if any has too few problems, unless --skip-small leaves those out."""
    names, small = task.domains(split), {}
    for d in names:
        try:  # training keeps no test problems back
            evolve.split_problems(task.problems(d), s if split == "test" else replace(s, test=0))
        except ValueError as error:
            small[d] = str(error)
    if len(small) == len(names) or (small and not s.skip_small):
        raise ValueError(f"{len(small)} of {len(names)} {split} domains are too small (--skip-small leaves them out): "
                         + " ".join(small.values())[:500])
    return [d for d in names if d not in small]


def grow_states(task, solver, editor, s: Config, step: int) -> list[dict]:
    """Start states (c_0, R̄(c_0)): the scored nodes of one tree per training domain, grown by the loop of test time.

    Training from the seed instructions alone would not match deployment, where the editor edits its own earlier edits.
    `potential` is the best score of the tree minus the node's. Each process grows its share of the domains.
    """
    own = replace(s, rounds=s.grow_rounds, test=0, seed=s.seed * 1_000_003 + step)  # fresh splits and batches each time
    trees = evolve.plant(task, enough_problems(task, "train", s)[rank() :: world()], solver, own)
    evolve.evolve_all(task, trees, solver, editor, own, s.search, progress="2. growing trees" * (rank() == 0))
    return [{"domain": d, "instructions": node.instructions, "score": node.score, "seed": own.seed,
             "potential": tree.best().score - node.score} for d, tree in trees.items() for node in tree.scored()]


def state_splits(task, state: dict, s: Config) -> dict:
    """Pool and holdout of a start state's domain, as its tree had them. Training keeps no test problems back."""
    return evolve.split_problems(task.problems(state["domain"]), replace(s, test=0, seed=state["seed"]))


def reward_noise(task, solver, states: list[dict], s: Config) -> float:
    """Standard deviation of the delta of the null edit: unchanged instructions, scored again. 0 for a greedy solver."""
    jobs = [(x["instructions"], state_splits(task, x, s)["holdout"]) for x in states]
    deltas = [fmean(scores) - x["score"] for scores, x in zip(evolve.score_all(task, solver, jobs, s), states)]
    return fmean(delta**2 for delta in deltas) ** 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Step 3. Reinforcement learning: one edit is one pull of a bandit
# ---------------------------------------------------------------------------------------------------------------------
# The objective is J = E[R̄(c_1) − R̄(c_0)] over edits c_1 ~ f_ψ(c_0, S_0), and its gradient (eq. 8-10)
#
#     ∇J = E[A ∇ log f_ψ(c_1 | c_0, S_0)]        with the advantage A = R̄(c_1) − R̄(c_0)
#
# where log f_ψ of an edit is the sum over its tokens. Subtracting anything that does not depend on c_1, a *baseline*,
# leaves the expectation as it is, since E[∇ log f] = 0, and can lower the variance. The score before the edit is such
# a baseline, known for free. `rollout` draws c_1 and scores it, `lse.advantages` makes A, `learn` follows the gradient.


def rollout(task, solver, editor, states: list[dict], s: Config, step: int) -> dict:
    """G edits for each of N start states, and the scores before and after them. Shapes (N, G), `before` (N,).

    An edit that cannot be read is not scored: `valid` is False and `after` NaN there. Nothing here needs a gradient:
    what was sampled is scored again, differentiably, in `learn`.
    """
    start, splits = time.time(), [state_splits(task, x, s) for x in states]
    # S_0: k fresh problems of the state's domain, answered under c_0 as they would be at test time. The place in the
    # batch of all processes goes into the draw: a state that comes twice sees other problems the second time.
    jobs = [(x["instructions"], evolve.draw_batch(split["pool"], s, f"{x['domain']}/{i * world() + rank()}", -1 - step))
            for i, (x, split) in enumerate(zip(states, splits))]
    summaries = evolve.solve_all(task, solver, jobs, **evolve.solver_sampling(s))
    # c_1 ~ f_ψ(c_0, S_0), at temperature 1 and with nothing cut off: else the gradient would be another policy's.
    chats = [evolve.edit_chat(task, editor, c_0, S_0, s.max_prompt_tokens) for (c_0, _), S_0 in zip(jobs, summaries)]
    samples = editor.sample([chat for chat, _ in chats], n=s.group, max_new_tokens=s.editor_tokens)
    sampled, edits = time.time(), [[evolve.read_edit(task, sample)[0] for sample in row] for row in samples]
    # R̄(c_1) on the holdout that also scored c_0.
    jobs = [(text, split["holdout"]) for row, split in zip(edits, splits) for text in row if text is not None]
    scores = iter(evolve.score_all(task, solver, jobs, s))
    after = torch.tensor([[math.nan if text is None else fmean(next(scores)) for text in row] for row in edits])
    return {"samples": samples, "edits": edits, "before": torch.tensor([x["score"] for x in states]), "after": after,
            "valid": ~after.isnan(), "dropped": sum(n for _, n in chats),
            "seconds": {"sample": sampled - start, "score": time.time() - sampled}}


def learn(editor, batch: dict, weights: torch.Tensor, n_tokens: int, s: Config, optimizer: MasterAdamW) -> dict:
    """One policy-gradient step on groups with advantages `weights` (N, G); n_tokens counts those of all processes.

    The gradients of micro-batches add up to that of the batch, those of several processes are summed. A gradient that
    is not finite changes nothing; the norm that comes back tells.
    """
    samples, entropy, drift = batch["samples"], 0.0, 0.0
    order = sorted(range(len(samples)), key=lambda i: len(samples[i][0].prompt_ids))  # alike lengths: little padding
    groups = [(samples[i][0].prompt_ids, [sample.ids for sample in samples[i]]) for i in order]
    editor.model.train(s.gradient_checkpointing)  # checkpointing needs train mode; without it, no dropout either
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
    return {"entropy": sum(gather(entropy)), "max_ratio_drift": max(gather(drift)), "grad_norm": optimizer.step()}


def train_step(task, solver, editor, optimizer, pool: list[dict], s: Config, step: int) -> tuple[dict, dict, list]:
    """One step of Section 2 of the paper. Returns (what to log, the batch of this process, its start states).

    In the log: `positive` is the share of edits better than what they edited, `zero_variance` counts groups whose edits
    all score the same, which teach "grpo" and "node" nothing; the reward is a flat −1 for an invalid edit.
    """
    optimizer.adamw.param_groups[0]["lr"] = lr = s.lr * (1 - step / s.steps)
    # Every random draw is a function of (seed, step): resuming needs no random state. Groups never span processes.
    torch.manual_seed(hash((s.seed, step, rank())))
    # Curriculum: where the tree shows that more is possible, there is more to learn. The 0.1 leaves no state out.
    rng, potential = random.Random(f"{s.seed}/{step}"), [x["potential"] + 0.1 for x in pool]
    states = rng.choices(pool, potential, k=s.states)[rank() :: world()]
    batch = rollout(task, solver, editor, states, s, step)
    # What all processes have drawn: the loss is a mean over the tokens of all, and some kinds of advantages need all.
    parts, start = gather(batch), time.time()
    after, before, valid = (torch.cat([part[name] for part in parts]) for name in ("after", "before", "valid"))
    samples = [sample for part in parts for row in part["samples"] for sample in row]
    n_tokens = sum(len(sample.ids) for sample in samples)
    weights = advantages(s.advantage, after, before, valid)  # (N, G)
    learned = learn(editor, batch, weights.chunk(world())[rank()], n_tokens, s, optimizer)
    reward, score = delta_reward(after, before[:, None], valid), torch.where(valid, after, -1.0)
    return {
        "step": step, "reward": float(reward.mean()), "positive": float((after > before[:, None]).float().mean()),
        "before": float(before.mean()), "after": float(after[valid].mean()), "valid": float(valid.float().mean()),
        "truncated": sum(x.truncated for x in samples), "dropped_problems": sum(part["dropped"] for part in parts),
        "zero_variance": int((score.amax(1) == score.amin(1)).sum()), "tokens": n_tokens, **learned, "lr": lr,
        "skipped": not math.isfinite(learned["grad_norm"]),
        "seconds": batch["seconds"] | {"learn": time.time() - start},
    }, batch, states


def reinforce(task, solver, editor, s: Config, out: Path) -> dict:
    """The RL loop, from the last checkpoint if there is one. Returns its state: log lines, start states, noise.

    That state and the optimizer (whose masters are the editor's weights) are all that a checkpoint needs: randomness
    is a function of seed and step, the learning rate one of the step. Another --steps stretches the schedule.
    """
    optimizer = MasterAdamW(editor.model, lr=s.lr)
    state = (s.resume and load_checkpoint(out, s, optimizer)) or {"lines": [], "pool": [], "noise": None}
    lines, done = state["lines"], len(state["lines"])
    for step in tqdm(range(done, s.steps), "3. RL", s.steps, initial=done, unit="step", disable=rank() > 0):
        # Start states, grown with the current editor: at test time it will edit its own earlier edits.
        if step == 0 or (s.grow_every and step % s.grow_every == 0):
            state["pool"] = sum(gather(grow_states(task, solver, editor, s, step)), []) + state["pool"]
        if step == 0 and rank() == 0:
            state["noise"] = reward_noise(task, solver, state["pool"][: s.states], s)
            say(f"2. {len(state['pool'])} start states. Unchanged instructions, scored twice, differ by "
                f"{state['noise']:.3f} (s.d.).")
        line, batch, states = train_step(task, solver, editor, optimizer, state["pool"], s, step)
        lines.append(json.loads(json.dumps(line), parse_constant=lambda _: None))  # JSON knows no NaN: None
        if rank() == 0:
            tqdm.write(step_text(line) + (show_edit(batch, states) if step % 20 == 0 else ""))
            # All lines at once, and the checkpoint has them too: killed at any moment and resumed, each is there once.
            write(out / "log.jsonl", partial(Path.write_text, data="".join(json.dumps(each) + "\n" for each in lines)))
        if len(lines) > 2 and all(each["skipped"] for each in lines[-3:]):
            raise SystemExit("Three steps in a row had no finite gradient: start again with a lower --lr.")
        if rank() == 0 and ((step + 1) % s.save_every == 0 or step + 1 == s.steps):
            save_checkpoint(out, s, optimizer, state)
    return state


def step_text(line: dict) -> str:
    """A log line for people. `cut`: responses that met the token limit; `flat`: groups of equal scores."""
    text = ("{step:4d}  reward {reward:+.3f}  better {positive:4.0%}  valid {valid:4.0%}  cut {truncated}  flat "
            "{zero_variance}  entropy {entropy:.2f}  |g| {grad_norm:.3f}  |r-1| {max_ratio_drift:.0e}").format(**line)
    text += "".join(f"  {name} {seconds:.2f}s" for name, seconds in line["seconds"].items())
    rate = line["tokens"] / sum(line["seconds"].values())
    return text + f"  {rate:.0f} tok/s" + "  SKIPPED: the gradient is not finite" * line["skipped"]


def show_edit(batch: dict, states: list[dict]) -> str:
    """The batch's first edit in words, with the score before and after it: numbers alone hide what is learned."""
    old, new, after = states[0], batch["edits"][0][0], float(batch["after"][0, 0])
    new, score = (new, f"{after:.2f}") if new is not None else (batch["samples"][0][0].text, "invalid")
    was, now = (evolve.clean(text.replace("\n", " / "))[:300] or "(empty)" for text in (old["instructions"], new))
    return f"\n   an edit for {old['domain']}, holdout {old['score']:.2f} -> {score}\n     old: {was}\n     new: {now}"


# ---------------------------------------------------------------------------------------------------------------------
# Step 4. Before and after, on domains that training never saw
# ---------------------------------------------------------------------------------------------------------------------


def evaluate(task, solver, editor, s: Config, progress: str) -> tuple[dict, dict]:
    """Evolve each unseen domain, take the node that is best on its holdout, and ask it what nobody has asked before.

    The holdout guided the search, so its best score is optimistic ("holdout_best"); the test split is touched once.
    Returns ({"test_accuracy", "stderr", "domains", ...}, trees); the standard error is over domains.
    """
    trees = evolve.plant(task, enough_problems(task, "test", s)[rank() :: world()], solver, s)
    evolve.evolve_all(task, trees, solver, editor, s, s.search, progress=progress * (rank() == 0))
    scores = evolve.final_test(task, trees, solver, s)
    trees, scores = ({d: x for part in gather(mine) for d, x in part.items()} for mine in (trees, scores))
    mean, error = evolve.mean_error([fmean(best) for _, best in scores.values()])
    return {"test_accuracy": mean, "stderr": None if math.isnan(error) else error, "domains": len(trees),
            "seed_instructions": fmean(fmean(seed) for seed, _ in scores.values()),
            "holdout_best": fmean(tree.best().score for tree in trees.values())}, trees


def finish(results: dict, trees_before: dict, trees: dict, out: Path) -> None:
    """Save, then say what came out: one tree, the table of before and after, what the edits were worth."""
    trained, (domain, tree) = results["trained"], next(iter(trees.items()))
    evolve.write_text(out / "results.json", json.dumps(results, indent=1))
    for name, each in trees.items():
        each.save(out / "trees" / f"{evolve.tree_name(name)}.json")
    pair = {"untrained editor": trees_before[domain], "trained editor": tree}
    evolve.write_report(out / "report.html", pair, f"Self-evolution on {domain}")
    print(f"\nThe evolution of {evolve.clean(domain)} with the trained editor (* leads to the best node)\n"
          f"{evolve.tree_text(tree)}\nIts best instructions:\n{evolve.clean(tree.best().instructions) or '(empty)'}\n\n"
          f"Test accuracy, mean ± s.e. over {trained['domains']} domains that training never saw\n"
          f"  seed instructions   {trained['seed_instructions']:.3f}")
    for name in ("untrained", "trained"):
        error = "" if results[name]["stderr"] is None else f" ± {results[name]['stderr']:.3f}"
        print(f"  {name + ' editor':19} {results[name]['test_accuracy']:.3f}{error}")
    usual = asdict(evolve.with_presets(Config(), TRAIN_PRESETS)).items()
    changed = {name for name, value in usual if results["config"][name] != value}
    if changed <= {*FREE, "seed", "warmup_seed"} - {"steps"}:
        print(f"  {EXPECT}")
    edits = [(each.nodes[node.parent].score, node.score) for each in trees.values() for node in each.nodes[1:]]
    valid, better = sum(new is not None for _, new in edits), sum((new or 0.0) > old for old, new in edits)
    print(f"Of the trained editor's {len(edits)} edits, {valid} are valid and {better} better than what they edited."
          + f" {results['skipped_steps']} steps were skipped: no finite gradient." * (results["skipped_steps"] > 0))
    if not better:
        print("So its edits are invalid or worth nothing: nothing here shows that it can evolve instructions.")
    print("Seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in results["seconds"].items())
          + f"\nSaved in {out}: editor/ (loads with from_pretrained), results.json, log.jsonl, trees/, report.html.")


# Measured: `python train.py --warmup-seed 0` to 4, see README.md.
EXPECT = "expect              untrained 0.33-0.43, trained 0.86-0.98, from base to base"


# ---------------------------------------------------------------------------------------------------------------------
# Several processes (torchrun): each takes a share of the groups, all take the same step
# ---------------------------------------------------------------------------------------------------------------------
# Every process holds the whole editor, solver and optimizer. States are drawn by all alike and dealt out; advantages
# are computed on the batch of all; gradients are summed, so that all take the step that one would have taken. Trees, of
# training and of the evaluation, are shared by domains. Rank 0 alone writes files and speaks.


def rank() -> int:
    """The number of this process, as torchrun or `accelerate launch` has set it."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def gather(part: Any) -> list:
    """The parts of all processes, by rank. No process goes on before all have come here."""
    parts = [part] * world()
    if world() > 1:
        torch.distributed.all_gather_object(parts, part)
    return parts


def say(*words) -> None:
    """Print once, not once per process."""
    if rank() == 0:
        print(*words, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Files: a kill, a full disk or a torn file costs the step that was under way, never the run
# ---------------------------------------------------------------------------------------------------------------------
# Whatever a run reads again (base, checkpoints, config, log, trees) is written under another name and renamed when it
# is complete, so that it is there as a whole or not at all.


def write(path: Path, *savers: Callable[[Path], object]) -> None:
    """A file or folder that the savers fill under a temporary name, and then `path`: a kill leaves the old or the new.

    SystemExit, in one sentence, if it cannot be written; what was there before stays.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        for save in savers:
            save(temporary)
        shutil.rmtree(path, ignore_errors=True)  # an old folder; an old file is replaced
        os.replace(temporary, path)
    except Exception as error:  # a full disk is an OSError, a RuntimeError (torch.save) or a SafetensorError
        if temporary.is_file():
            temporary.unlink()  # what it holds is room
        raise SystemExit(f"{path} cannot be written ({error!r:.200}): make room or give access, then go on with the "
                         "same command and --resume.") from None


def save_model(model: LocalModel, folder: Path) -> None:
    """A folder that `from_pretrained` loads, tokenizer included."""
    write(folder, model.model.save_pretrained, model.tokenizer.save_pretrained)


def identity(s: Config) -> dict:
    """What a run and its checkpoints have in common. A checkpoint of an equal run elsewhere is as good as its own."""
    return {name: value for name, value in asdict(s).items() if name not in FREE}


def save_checkpoint(out: Path, s: Config, optimizer: MasterAdamW, state: dict) -> None:
    """The state after its last step, weights included (they are the optimizer's masters). The newest two stay."""
    path = out / f"checkpoint-{len(state['lines']):06d}.pt"
    write(path, partial(torch.save, {"run": identity(s), "optimizer": optimizer.state_dict(), **state}))
    for old in [each for each in sorted(out.glob("checkpoint-*.pt")) if each <= path][:-2]:
        old.unlink()


def load_checkpoint(out: Path, s: Config, optimizer: MasterAdamW) -> dict | None:
    """The state of the newest checkpoint that is whole and this run's; weights and moments go into `optimizer`.

    Any other is named with the reason, left where it is, and the one before it tried. None if none is left.
    """
    for path in sorted(out.glob("checkpoint-*.pt"), reverse=True):
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            saved, run = state.pop("optimizer"), state.pop("run")
            if run != identity(s) or [x.shape for x in saved["masters"]] != [x.shape for x in optimizer.masters]:
                raise ValueError("it belongs to another run")
            optimizer.load_state_dict(saved)
            say(f"{path}: going on after {len(state['lines'])} steps.")
            return state
        except Exception as error:  # whatever a torn file makes of the unpickler
            say(f"{path} is refused ({error!r:.200}): trying the one before it.")
    say("There is no checkpoint to go on from: starting with the first step.")
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def check(task, model: LocalModel, s: Config, out: Path, train: list[str], test: list[str]) -> str:
    """The plan of the run. ValueError names what cannot work: all that can be known before the first model call.

    Calls and tokens are upper bounds.
    """
    weights, odd = (sum(map(f, model.model.parameters())) for f in (torch.numel, lambda p: not p.isfinite().all()))
    done = len((out / "log.jsonl").read_text().splitlines()) if s.resume and (out / "log.jsonl").exists() else 0
    faults = {
        f"{out} is {done} steps old: give --steps as many or more.": done > s.steps,
        "--states, --group, --test, --micro-batch and --save-every must be 1 or more.":
            min(s.states, s.group, s.test, s.micro_batch, s.save_every) < 1,
        f"--states {s.states} cannot be shared by {world()} processes: choose a multiple.": s.states % world(),
        f"{s.model} holds weights that are not finite.": odd,
    }
    if any(faults.values()):
        raise ValueError(" ".join(sentence for sentence, found in faults.items() if found))
    # A score takes `one` answers; a tree takes that and, in each round, k problems, an edit and a score.
    one, grown = s.holdout * s.samples, len(train) * (1 + (s.steps - 1) // s.grow_every if s.grow_every else 1)
    answers = (grown * (one + s.grow_rounds * (s.k + one)) + s.states * (one + s.steps * (s.k + s.group * one))
               + 2 * len(test) * (one + s.rounds * (s.k + one) + 2 * s.test * s.samples))
    edits = grown * s.grow_rounds + s.steps * s.states * s.group + 2 * len(test) * s.rounds
    # Disk: for a moment there are three checkpoints, each with float32 masters and two moments.
    size = 36 * weights - sum(file.stat().st_size for file in out.glob("checkpoint-*.pt"))
    problems = [problem for d in train + test for problem in task.problems(d)]
    return "Plan\n  " + evolve.afford(task, (model, model), (answers, edits), problems, s, out, size)


def main(s: Config) -> dict | None:
    """The paper, from start to end. Returns what results.json holds; None after --dry-run."""
    if world() > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group(timeout=timedelta(days=7))  # some grow trees for hours while others wait
    clocks = [time.time()]

    # 0. Everything that can fail early fails here.
    s = evolve.with_presets(s, TRAIN_PRESETS)
    task, out = data.load_task(s.task, s.data or None), Path(s.out or f"runs/{s.task}")
    if s.task != "mini" and not s.model:
        raise SystemExit(f"--task {s.task} needs --model, a checkpoint folder or hub name: only mini makes its own.")
    train, test, tokenizer = enough_problems(task, "train", s), enough_problems(task, "test", s), data.mini_tokenizer()
    solver = evolve.load_model(s.model, s.max_batch_tokens) if s.model else LocalModel(tiny_qwen3(tokenizer), tokenizer)
    say(check(task, solver, s, out, train, test))
    if rank() == 0:
        evolve.open_run(s, out, FREE, look=s.dry_run)
    if s.dry_run:
        return None

    # 1. A base model, twice: π_θ, the solver, stays as it is; f_ψ, the editor, starts from the same weights.
    if rank() == 0 and not s.model and not (out / "base").exists():
        warm_base(task, s, out / "base")
    gather(None)  # the others wait until the folder and the base are there
    solver = solver if s.model else evolve.load_model(out / "base", s.max_batch_tokens)
    editor = evolve.load_model(s.model or out / "base", s.max_batch_tokens)
    if s.gradient_checkpointing:
        editor.model.gradient_checkpointing_enable()
    clocks.append(time.time())

    # 2. Start states, and 3. reinforcement learning on them.
    state = reinforce(task, solver, editor, s, out)
    if rank() == 0:
        save_model(editor, out / "editor")
    clocks.append(time.time())

    # 4. Before and after, on domains that training never saw.
    untrained, trees_before = evaluate(task, solver, solver, s, "4. untrained editor")
    trained, trees = evaluate(task, solver, editor, s, "4. trained editor")
    clocks.append(time.time())
    results = {"untrained": untrained, "trained": trained, "reward_noise": state["noise"], "config": asdict(s),
               "skipped_steps": sum(line["skipped"] for line in state["lines"]),
               "seconds": {name: b - a for name, a, b in zip(("warm_up", "rl", "evaluation"), clocks, clocks[1:])}}
    if rank() == 0:
        finish(results, trees_before, trees, out)
    if world() > 1:
        torch.distributed.destroy_process_group()
    return results


if __name__ == "__main__":
    evolve.start(main, Config, __doc__)
