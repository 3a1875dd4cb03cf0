"""Learning to self-evolve: teach an editor, by reinforcement, to rewrite a frozen solver's instructions.

    python train.py                     the miniature: a tiny model learns to edit, on a laptop, in two minutes
    python train.py --advantage grpo    the same with another advantage
    python train.py --dry-run           every check and the plan of a run, without a model call
    python train.py --task bird --data DIR --model Qwen/Qwen3-4B-Instruct-2507 --gradient-checkpointing --out runs/bird
    python train.py --task bird ... --solver http://localhost:8000/v1     the frozen solver on a server, vLLM for one
    torchrun --nproc_per_node 8 train.py --task bird ...   the same on eight GPUs: each takes an eighth of the states

The order of this file: one step of training; the loop; where start states come from; untrained and trained editor
compared on domains that training never saw. Below the banner *From here on only plumbing*: settings, plan,
checkpoints, `main`.

For readers who know PyTorch but not RL, the whole of it: sample from the model, weight the log-probability of each
sample by how much better than a baseline it did (its *advantage*), and follow the gradient. The samples are the
training data and change with the model, so the loss says nothing about progress; the reward does.

Left out on purpose: a critic, a KL term, several epochs per batch, a separate inference engine.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import psutil  # comes with accelerate
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

import data
import evolve
from data import Answer, Problem
from evolve import Edit, Settings, option
from lse import Check, MasterAdamW, advantages, delta_reward, policy_loss

# ---------------------------------------------------------------------------------------------------------------------
# One step: one edit is one pull of a bandit
# ---------------------------------------------------------------------------------------------------------------------
# What is maximised, and by which gradient, stands in lse.py, "What an edit is worth". The other words of RL: a *state*
# is a pair of instructions c_0 and summary S_0, an *action* a whole edit c_1, and the episode is over after one action
# (a contextual bandit). What edits lead to in the long run is left to the search at test time. *On-policy*: a batch is
# drawn by the very weights that it then changes, serves one step and is thrown away; there is no data set, no epoch.


@dataclass
class StartState:
    """Where an edit begins: instructions c_0 of a domain, with their score. `grow_states` makes them of nodes of trees.

    There is no summary in it: S_0 is drawn anew at each step, so a state that comes again shows other problems.
    """

    domain: str
    instructions: str
    # 0 to 1. Known before the edit is made, which is why it may serve as the baseline.
    score: float  # R̄(c_0)
    seed: int  # draws the same splits again: the holdout that gave the score must judge the edits, too
    # the best score of its tree minus its own, how much more is known to be possible: 0 for the best itself
    potential: float


@dataclass
class EditGroup:
    """One start state in one step, with the G edits sampled for it. Filled from top to bottom.

    One object per state, not five parallel lists: so no edit can get the reward of another one's prompt.
    """

    state: StartState
    problems: list[Problem]  # k fresh ones, for the summary
    holdout: list[Problem]
    summary: list[Answer] = field(default_factory=list)  # S_0
    dropped: int = 0  # problems that did not fit into the editor's prompt
    edits: list[Edit] = field(default_factory=list)  # G edits c_1
    # R̄(c_1) of each; NaN for an invalid edit
    after: list[float] = field(default_factory=list)


def train_step(
    task,
    solver,
    editor,
    optimizer: MasterAdamW,
    start_states: list[StartState],
    s: Config,
    step: int,
    accelerator: Accelerator,
) -> tuple[dict, list[EditGroup]]:
    """One step of Section 2 of the paper. Returns (the line for the log, this process's states with their edits).

    With several processes each takes a share of the states. Advantages are computed on the batch of all, and gradients
    are summed, so that all take the step that one process would have taken with the same edits.

    N is `s.states`, G is `s.group`. The line holds scores from 0 to 1, rewards in the same unit, entropy in nats per
    token, and seconds. There is no loss in it: with one update per batch its value is minus the mean advantage of
    the tokens, whatever the editor has learned.
    """
    rank = accelerator.process_index
    processes = accelerator.num_processes
    # With the rank, or all processes would draw by the same random numbers.
    evolve.seed_draws(s.seed, step, rank)  # so resuming needs no random state
    started = time.time()

    # 1. States: N instructions to start from. Those with more to gain are drawn more often.
    # Process 1 of 4 takes the states 1, 5, 9, ...: `plan` has made sure that all get equally many.
    groups = draw_states(task, start_states, s, step)[rank::processes]

    # 2. Summaries: the frozen solver answers k fresh problems under c_0, as it would at test time.
    jobs = [(each.state.instructions, each.problems) for each in groups]
    answers = evolve.solve_all(task, solver, jobs, **evolve.solver_sampling(s))
    for group, summary in zip(groups, answers):
        group.summary = summary

    # 3. Edits: c_1 ~ f_ψ(c_0, S_0), G of each, at temperature 1 and with nothing cut off, the defaults of `sample`.
    # With the top-p and top-k of test time the sampler would be one policy and the scorer, `group_logprobs`, another,
    # and no message would tell.
    chats = [editor_chat(task, editor, group, s) for group in groups]
    drawn = editor.sample(chats, n=s.group, max_new_tokens=s.editor_tokens)
    for group, samples in zip(groups, drawn):
        group.edits = [evolve.read_edit(task, sample) for sample in samples]
        evolve.reject_long(solver, group.edits, s.max_instruction_tokens)
    sampled = time.time()

    # 4. Scores: R̄(c_1) on the holdout that also scored c_0. An invalid edit is not scored.
    jobs = []
    for group in groups:
        jobs += [(edit.instructions, group.holdout) for edit in group.edits if edit.valid]
    # All edits of all states in one call of the solver. Another holdout for c_1 than for c_0 would add the difference
    # between two sets of problems to every reward.
    scores = iter(evolve.score_all(task, solver, jobs, s))
    # The scores come back in the order of the jobs. NaN, not 0: an edit that was never scored is not one that answered
    # everything wrong, and a NaN that is forgotten somewhere shows.
    for group in groups:
        for edit in group.edits:
            group.after.append(fmean(next(scores)) if edit.valid else math.nan)

    # 5. Advantages, from the edits of all processes.
    # "line" fits a line through the whole batch, and the loss divides by its tokens: both need all edits.
    everyone = gather_object(groups)
    scored = time.time()
    before = torch.tensor([each.state.score for each in everyone])  # (N,)
    after = torch.tensor([each.after for each in everyone])  # (N, G)
    all_advantages = advantages(s.advantage, after, before, ~after.isnan(), s.invalid_reward)  # (N, G)
    # Gathered process by process: the chunk of this rank belongs to this process's groups.
    my_advantages = all_advantages.chunk(processes)[rank]  # (N / processes, G)

    # 6. Loss and step. The log-probs of the edits are computed again, differentiably, a few groups at a time: their
    # gradients add up to that of the mean over the tokens of the whole batch.
    # Tokens of the whole batch, of every process. If each micro-batch took its own mean instead, a token in a batch of
    # short edits would weigh more than one in a batch of long ones: not the same gradient. Invalid edits count, too,
    # and are learned from: their advantage is what makes tags and length be kept.
    n_tokens = sum(len(edit.sample.ids) for each in everyone for edit in each.edits)
    # A function of the step, so that resuming needs no scheduler.
    lr = s.lr * (1 - step / s.steps)
    optimizer.adamw.param_groups[0]["lr"] = lr
    # Gradient checkpointing needs train mode. Otherwise eval mode: what sampled had no dropout, either.
    editor.model.train(s.gradient_checkpointing)
    negative_logprobs = 0.0
    for batch, batch_advantages in micro_batches(groups, my_advantages, s.micro_batch):
        # Scored are the very ids that were sampled: text that is decoded and encoded again may become other tokens.
        logps = sum(editor.group_logprobs(batch), [])  # one tensor (T,) per edit
        # `backward` adds to the gradients that are there, and frees the activations of this micro-batch.
        policy_loss(logps, batch_advantages.flatten(), n_tokens).backward()
        negative_logprobs -= sum(float(logp.detach().sum()) for logp in logps)
    if processes > 1:
        # The sum, where data-parallel training usually takes the mean: each process has divided by everyone's tokens
        # already.
        for parameter in optimizer.params:
            parameter.grad = accelerator.reduce(parameter.grad, "sum")
    norm = optimizer.step()  # of the gradients, which it clips, follows, and clears

    line = {"step": step, "tokens": n_tokens, "lr": lr, "grad_norm": norm}
    line["skipped"] = not math.isfinite(norm)
    line["spread"] = float(all_advantages.max() - all_advantages.min())  # 0: no edit was better than another
    # How unsure the editor is. It falls as edits become alike (in the miniature from 0.88 to 0.30); at 0 all G edits
    # are the same, and there is nothing left to choose from.
    # E[−log p] = H, in nats per token.
    line["entropy"] = sum(gather_object([negative_logprobs])) / n_tokens
    line["seconds"] = {"sample": sampled - started, "score": scored - sampled}
    line["seconds"]["learn"] = time.time() - scored
    return line | edit_figures(everyone, before, after, s.invalid_reward), groups


def draw_states(task, start_states: list[StartState], s: Config, step: int) -> list[EditGroup]:
    """N of the start states, the same in every process, each with k fresh problems and its holdout.

    Drawn with replacement, by weights: the paper sorts by the same potential and takes the highest first.
    """
    # Curriculum: where the tree shows that more is possible, there is more to learn. The 0.1 leaves no state out: a
    # node of 0.3 in a tree whose best has 0.9 is drawn seven times as often as that best one (0.7 to 0.1).
    odds = [state.potential + 0.1 for state in start_states]
    chosen = random.Random(f"{s.seed}/{step}").choices(start_states, odds, k=s.states)
    number = -1 - step  # rounds of trees count from 0: these draws are not those that grew the trees
    groups = []
    for place, state in enumerate(chosen):  # its place: a state drawn twice gets other problems
        # The splits of the tree that this state comes from: a problem of its holdout must not appear in its summary.
        own = training_settings(s, state.seed)
        splits = evolve.split_problems(task.problems(state.domain), own)
        problems = evolve.draw_batch(splits["pool"], s, state.domain, number, place)
        groups.append(EditGroup(state, problems, splits["holdout"]))
    return groups


def editor_chat(task, editor, group: EditGroup, s: Config) -> list[dict]:
    """What the editor reads, (c_0, S_0): the same chat as at test time, or training would teach another task.

    Problems that do not fit into its prompt are counted.
    """
    instructions = group.state.instructions
    chat, group.dropped = evolve.edit_chat(
        task, editor, instructions, group.summary, **evolve.limits(s)
    )
    return chat


def micro_batches(edit_groups: list[EditGroup], weights: Tensor, size: int):
    """The groups that `group_logprobs` takes, `size` at a time, each with the (size, G) advantages of its edits.

    Sorted by the length of the prompt, so that little is padded. The order changes nothing else: the losses of the
    micro-batches are sums over their tokens, and add up. One item is ([(prompt ids (P,), [response ids (T,)] * G)] *
    size, (size, G)); the last one may hold fewer groups.
    """
    groups = []
    for each in edit_groups:
        responses = [edit.sample.ids for edit in each.edits]
        groups.append((each.edits[0].sample.prompt_ids, responses))
    order = sorted(range(len(groups)), key=lambda i: len(groups[i][0]))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        # Both are taken in the same order: else each edit would be rewarded for another one's score.
        yield [groups[i] for i in chosen], weights[chosen]


def edit_figures(
    groups: list[EditGroup], before: Tensor, after: Tensor, invalid_reward: float
) -> dict:
    """What the log says of the edits of a step; `before` is (N,), `after` (N, G) with NaN for an edit not valid.

    "reward" is the paper's (eq. 7) whatever --advantage trains on, so that runs can be compared. "before" and "after"
    are mean scores, "after" of the valid edits only; "better" and "valid" are shares of all edits; the rest are counts.
    """
    valid = ~after.isnan()
    old = before[:, None]
    score = torch.where(valid, after, invalid_reward)
    edits = [edit for group in groups for edit in group.edits]
    return {
        "reward": float(delta_reward(after, old, valid, invalid_reward).mean()),
        # No comparison with NaN is true, so an invalid edit is never among them.
        # share of edits better than what they edited
        "better": float((after > old).float().mean()),
        "before": float(before.mean()),
        "after": float(after[valid].mean()),
        "valid": float(valid.float().mean()),
        "cut": sum(edit.sample.truncated for edit in edits),  # edits cut off at the token limit
        "dropped_problems": sum(group.dropped for group in groups),
        # groups of equal scores: they teach "grpo" nothing
        "flat": int((score.amax(1) == score.amin(1)).sum()),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a run has come. With the optimizer, whose masters are the editor's weights, all that resuming needs:
    randomness is a function of seed and step, the learning rate one of the step.

    (Saved random states would have to cover torch, Python and every process.)
    """

    lines: list[dict] = field(default_factory=list)  # of the log, one per finished step
    start_states: list[StartState] = field(default_factory=list)
    noise: float | None = None  # standard deviation of the reward when nothing is edited


def reinforce(
    task, solver, editor, s: Config, out: Path, accelerator: Accelerator, check: Check
) -> Progress:
    """The RL loop, from the last checkpoint if there is one. Another --steps stretches the schedule.

    `check` is what was found of the editor; its figure stands in the first line of the log.
    """
    # Only the editor has an optimizer: the solver stays as it was.
    optimizer = MasterAdamW(editor.model, lr=s.lr)
    progress = Progress()
    if s.resume:
        progress = load_checkpoint(out, s, optimizer, accelerator) or progress
    # One line per finished step: the log itself says where to go on.
    done = len(progress.lines)
    main_process = accelerator.is_main_process
    saved = time.time()  # the last checkpoint, and the seconds that it took
    saving = 0.0
    # drawn after the first step: what comes before is "0." and "1."
    bar = {"desc": "2. RL", "unit": "step", "disable": not main_process, "delay": 1e-3}
    for step in tqdm(range(done, s.steps), total=s.steps, initial=done, **bar):
        if step == 0:
            # If perfect instructions score no better than none, hours of training could not show it more clearly.
            check_headroom(task, solver, s, accelerator)
        # Start states, grown with the current editor: at test time it will edit its own earlier edits.
        if step == 0 or (s.grow_every and step % s.grow_every == 0):
            older = progress.start_states if s.keep_states else []
            progress.start_states = grow_states(task, solver, editor, s, step, accelerator) + older
        if step == 0 and main_process:
            # The unit in which rewards should be read: an edit that gains less than this may have been lucky.
            progress.noise = reward_noise(task, solver, progress.start_states[: s.states], s)
            print(
                f"1. {len(progress.start_states)} start states. "
                f"Unchanged instructions, scored twice, differ by "
                f"{progress.noise:.3f} (s.d.).",
                flush=True,
            )
        line, groups = train_step(
            task, solver, editor, optimizer, progress.start_states, s, step, accelerator
        )
        if step == 0:
            line["sampler_error"] = check.error
        # JSON knows no NaN: it becomes None.
        progress.lines.append(json.loads(json.dumps(line), parse_constant=lambda _: None))
        if main_process:
            tqdm.write(step_text(line))
            if step % 20 == 0:
                tqdm.write(show_edit(groups[0]))
            save_log(out, progress.lines)
        # A step without a finite gradient is skipped, weights untouched. One may pass; three in a row do not.
        if len(progress.lines) > 2 and all(each["skipped"] for each in progress.lines[-3:]):
            raise SystemExit(
                "Three steps in a row had no finite gradient: start again with a lower --lr."
            )
        check_learning(progress.lines, groups, s)
        if main_process and checkpoint_due(step, s, time.time() - saved, saving):
            started = time.time()
            save_checkpoint(out, s, optimizer, progress)
            saved = time.time()
            saving = saved - started
    return progress


def step_text(line: dict) -> str:
    """A log line for people. `|g|` is the norm of the gradient before clipping; tok/s counts the tokens of edits in all
    seconds of the step, those of scoring included, so it is no measure of the sampler.
    """
    text = (
        "{step:4d}  reward {reward:+.3f}  better {better:4.0%}  valid {valid:4.0%}  cut {cut}  "
        "flat {flat}  entropy {entropy:.2f}  |g| {grad_norm:.3f}"
    ).format(**line)
    for name, seconds in line["seconds"].items():
        text += f"  {name} {seconds:.2f}s"
    text += f"  {line['tokens'] / sum(line['seconds'].values()):.0f} tok/s"
    if line["skipped"]:
        text += "  SKIPPED: the gradient is not finite"
    return text


def show_edit(group: EditGroup) -> str:
    """The first edit of a group in words, with the score before and after it: numbers alone hide what is learned."""
    state = group.state
    edit = group.edits[0]
    score = f"{group.after[0]:.2f}" if edit.valid else "invalid"
    return (
        f"\n   an edit for {state.domain}, holdout {state.score:.2f} -> {score}\n"
        f"     old: {one_line(state.instructions)}\n"
        f"     new: {one_line(edit.instructions if edit.valid else edit.text)}"
    )


def one_line(instructions: str) -> str:
    """Instructions, shortened to a line for the terminal.

    >>> one_line("profit c5\\nrank c1"), one_line("")
    ('profit c5 / rank c1', '(empty)')
    """
    return evolve.printable(instructions.replace("\n", " / "))[:300] or "(empty)"


# ---------------------------------------------------------------------------------------------------------------------
# Growing start states
# ---------------------------------------------------------------------------------------------------------------------


def grow_states(
    task, solver, editor, s: Config, step: int, accelerator: Accelerator
) -> list[StartState]:
    """Start states (c_0, R̄(c_0)): the scored nodes of one tree per training domain, grown by the loop of test time.

    Training from the seed instructions alone would not match deployment, where the editor edits its own earlier edits.
    Each process grows its share of the domains; all get all states. A state's potential is what its own tree has
    shown to be possible in this domain: 0 for the best node, 0.6 for a node with 0.3 where the best has 0.9.
    """
    own = training_settings(
        s, seed=s.seed * 1_000_003 + step
    )  # no two growths share a seed, nor draws
    own = replace(own, rounds=s.grow_rounds)
    mine = large_domains(task, "train", s)[accelerator.process_index :: accelerator.num_processes]
    started = time.time()
    # Roots first: every tree begins with the same seed instructions, scored on the holdout of its domain.
    trees = evolve.seed_trees(task, mine, solver, own)
    if step == 0:  # the first real work of a run
        accelerator.print(evolve.seed_outcome(solver, trees, s), flush=True)
        # The plan counts the answers of all processes; this one has its share of them still to ask for.
        answers, _ = count_calls(s, len(task.domains("train")), len(task.domains("test")))
        left = answers // accelerator.num_processes - solver.usage.answers
        accelerator.print(evolve.pace_text(solver, time.time() - started, left), flush=True)
    bar = "1. growing trees" if accelerator.is_main_process else ""
    evolve.evolve_all(task, trees, solver, editor, own, s.search, progress=bar)
    advice = evolve.edit_outcome(editor, trees, s)
    if step == 0 and advice:
        accelerator.print(advice, flush=True)
    states = []
    for domain, tree in trees.items():
        best = tree.best().score
        # An invalid edit has no score, and nothing that the solver could work under: it is no start state.
        for node in tree.scored():
            states.append(
                StartState(domain, node.instructions, node.score, own.seed, best - node.score)
            )
    return gather_object(states)


def training_settings(s: Config, seed: int) -> Config:
    """The settings for a training domain: the seed of its tree, and no problems kept back for a test.

    What is tested in the end are other domains. So here the test problems go to the pool (where the task prescribes the
    splits, they are not used at all).
    """
    return replace(s, test=0, seed=seed)


def large_domains(task, split: str, s: Config) -> list[str]:
    """The domains of a split. ValueError if any has too few problems, unless --skip-small leaves those out."""
    wanted = s if split == "test" else training_settings(s, s.seed)
    names = task.domains(split)
    good: list[str] = []
    faults: list[str] = []
    for domain in names:
        try:
            evolve.split_problems(task.problems(domain), wanted)
            good.append(domain)
        except ValueError as error:
            faults.append(str(error))
    if not good or (faults and not s.skip_small):
        raise ValueError(
            f"{len(faults)} of {len(names)} {split} domains are too small (--skip-small leaves them out): "
            + " ".join(faults)[:500]
        )
    return good


def reward_noise(task, solver, states: list[StartState], s: Config) -> float:
    """Standard deviation of the reward of the null edit: unchanged instructions, scored again. 0 if all is greedy.

    Its true reward is 0, so the root of the mean square is taken around 0. With a solver at temperature 2 the
    miniature has 0.11, and 0.03 if --samples 8 answers are averaged (tests/RESULTS.md).
    """
    jobs = []
    for state in states:
        splits = evolve.split_problems(
            task.problems(state.domain), training_settings(s, state.seed)
        )
        jobs.append((state.instructions, splits["holdout"]))
    squares = []
    for state, scores in zip(states, evolve.score_all(task, solver, jobs, s)):
        squares.append((fmean(scores) - state.score) ** 2)
    return fmean(squares) ** 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Before and after, on domains that training never saw
# ---------------------------------------------------------------------------------------------------------------------


def evaluate(
    task, solver, editor, s: Config, progress: str, accelerator: Accelerator
) -> tuple[dict, dict]:
    """Evolve each unseen domain, take the node that is best on its holdout, and ask it what nobody has asked before.

    The holdout guided the search, so its best score is optimistic ("holdout_best"); the test split is touched once.
    Returns ({"test_accuracy", "stderr", "domains", ...}, trees); the standard error is over domains.

    Called once with the untrained and once with the trained editor. Both get the same domains, splits and batches of
    problems, since they depend on seed, domain and round alone: so their scores can be compared domain by domain.
    """
    mine = large_domains(task, "test", s)[accelerator.process_index :: accelerator.num_processes]
    trees = evolve.seed_trees(task, mine, solver, s)
    bar = progress if accelerator.is_main_process else ""
    evolve.evolve_all(task, trees, solver, editor, s, s.search, progress=bar)
    tests = evolve.final_test(task, trees, solver, s)
    facts = evolve.domain_facts(task, trees, tests, solver, s)
    # From here on each process has the results of all.
    seed_scores: list[float] = []
    best_scores: dict[str, float] = {}
    all_trees = {}
    all_facts = {}
    for part_trees, part_tests, part_facts in gather_object([(trees, tests, facts)]):
        all_trees |= part_trees
        all_facts |= part_facts
        for domain, (seed, best) in part_tests.items():
            seed_scores.append(fmean(seed))
            best_scores[domain] = fmean(best)
    # A domain counts once, whatever its number of problems: domains are what the editor has to generalise over.
    mean, error = evolve.mean_error(list(best_scores.values()))
    results = {
        "test_accuracy": mean,
        "stderr": None if math.isnan(error) else error,
        "domains": len(all_trees),
        "seed_instructions": fmean(seed_scores),
        "holdout_best": fmean(tree.best().score for tree in all_trees.values()),
        "scores": best_scores,
        "by_domain": all_facts,
    }
    return results, all_trees


def paired_gain(before: dict[str, float], after: dict[str, float]) -> dict:
    """What training gained, from the test score of each domain with either editor: domain by domain, so that easy and
    hard ones do not count as noise. `stderr` is over domains, None if there is only one.

    >>> paired_gain({"a": 0.0, "b": 0.5}, {"a": 0.5, "b": 0.5})
    {'mean': 0.25, 'stderr': 0.25, 'better': 1, 'worse': 0}
    """
    gains = [after[domain] - before[domain] for domain in before]
    mean, error = evolve.mean_error(gains)
    return {
        "mean": mean,
        "stderr": None if math.isnan(error) else error,
        "better": sum(gain > 0 for gain in gains),
        "worse": sum(gain < 0 for gain in gains),
    }


def finish(results: dict, trees_before: dict, trees: dict, log: list[dict], out: Path) -> None:
    """Save, then say what came out: one tree, the table of before and after, what the edits were worth.

    Saved first: a terminal that breaks off must not cost the results.
    """
    evolve.save_text(out / "results.json", json.dumps(results, indent=1))
    evolve.save_trees(out / "trees", trees)
    table = before_and_after(results)
    domain, tree = next(iter(trees.items()))
    # One domain stands for all: the same seed instructions, evolved by the one editor and by the other.
    pair = {"untrained editor": trees_before[domain], "trained editor": tree}
    title = f"Self-evolution on {domain}"
    verdict = f"{table}\nThe first of them, {domain}:"
    evolve.write_report(out / "report.html", pair, title, log=log, verdict=verdict)
    print(
        f"\nThe evolution of {evolve.printable(domain)} with the trained editor (* leads to the best node)\n"
        f"{evolve.tree_text(tree)}\nIts best instructions:\n"
        f"{evolve.printable(tree.best().instructions) or '(empty)'}\n"
    )
    trained = results["trained"]
    print(table)
    # What a reader's own run should look like, if nothing that matters was changed.
    if evolve.is_usual(Config(**results["config"])):
        print(f"  {EXPECT}")
    print(worth_of_edits(trees))
    print(evolve.facts_text(trained["by_domain"]))
    print(evolve.account_text(results, Config(**results["config"])))
    if results["skipped_steps"]:
        print(f"{results['skipped_steps']} steps were skipped: no finite gradient.")
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in results["seconds"].items())
    print(
        f"Seconds: {seconds}\n"
        f"Saved in {out}: editor/ (loads with from_pretrained), results.json, log.jsonl, trees/, report.html."
    )


def before_and_after(results: dict) -> str:
    """The table of the README: test accuracies, and the gain, paired over domains."""
    trained = results["trained"]
    lines = [f"Test accuracy, mean ± s.e. over {trained['domains']} domains that training never saw"]
    lines.append(f"  seed instructions   {trained['seed_instructions']:.3f}")
    for name in ("untrained", "trained"):
        error = "" if results[name]["stderr"] is None else f" ± {results[name]['stderr']:.3f}"
        lines.append(f"  {name + ' editor':19} {results[name]['test_accuracy']:.3f}{error}")
    # The gain has an error of its own, smaller than the two of the scores where domains differ in difficulty.
    gain = results["gain"]
    error = "" if gain["stderr"] is None else f" ± {gain['stderr']:.3f}"
    line = f"  gain, paired       {gain['mean']:+.3f}{error}   "
    lines.append(line + f"({gain['better']} domains better, {gain['worse']} worse)")
    return "\n".join(lines)


def worth_of_edits(trees: dict) -> str:
    """A sentence: how many of the trained editor's edits can be used, and how many are better than what they edited."""
    edits = valid = better = 0
    for tree in trees.values():
        for node in tree.nodes[1:]:
            edits += 1
            if node.score is not None:
                valid += 1
                better += node.score > tree.nodes[node.parent].score
    text = f"Of the trained editor's {edits} edits, {valid} are valid and {better} better "
    text += "than what they edited."
    if not better:
        text += "\nSo its edits are invalid or worth nothing: "
        text += "nothing here shows that it can evolve instructions."
    return text


# Untrained: five bases (tests/miniature/README.md). Trained: three of them, three RL seeds each ("Advantages" in
# tests/RESULTS.md).
EXPECT = "expect              untrained 0.33-0.43, trained 0.90-0.97, from base to base"


# ---------------------------------------------------------------------------------------------------------------------
# From here on only plumbing. The settings
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Config(Settings):
    """Everything that can be set. `--help` prints these words."""

    model: str = option(
        "", "the editor: checkpoint folder or hub name; empty: the miniature's base"
    )
    solver: str = option(
        "", "the frozen solver: folder, hub name or http(s)://...; empty: --model's"
    )
    solver_model: str = option("", "the solver's name on its server; empty: the first it lists")
    advantage: Literal["delta", "grpo", "score", "line"] = option(
        "delta", "delta is the paper's; the others are explained in lse.advantages"
    )
    # An invalid edit, one that cannot be read or is too long, needs a reward below that of a useless one, but no
    # more: rewards are differences of scores, about 0.1 here, and beside the official code's −1 for one edit in twenty
    # the gradient hardly sees the rest. (Measured: "Advantages" in tests/RESULTS.md.)
    invalid_reward: float = option(
        -0.2, "reward of an invalid edit, 0 or less; the official code's is -1"
    )
    steps: int | None = option(None, "RL steps")
    states: int | None = option(None, "N, start states per step")
    group: int | None = option(None, "G, edits sampled per start state")
    lr: float | None = option(None, "learning rate; falls linearly to 0")
    grow_every: int | None = option(
        None, "grow fresh start-state trees every so many steps; 0: only once"
    )
    grow_rounds: int | None = option(None, "T of the trees that start states are taken from")
    keep_states: bool | None = option(
        None, "true or false: whether the start states of earlier growths stay"
    )
    skip_small: bool = option(False, "leave out domains with too few problems instead of stopping")
    micro_batch: int = option(8, "groups per forward and backward pass; 1 needs the least memory")
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: for long prompts"
    )
    save_every: int = option(
        0, "steps between checkpoints (of a 4B model 48 GB each); 0: they take under a twentieth of the time"
    )


# What may differ when a run is resumed: its length, how often it saves, and where its folder has been moved to.
FREE = ["steps", "save_every", "out", "dry_run", "resume", "overwrite"]


def plan(
    task, solver, editor, s: Config, out: Path, train: list[str], test: list[str], processes: int
) -> str:
    """The plan of the run. ValueError names what cannot work: all that can be known before the first model call."""
    if min(s.states, s.group, s.test, s.micro_batch) < 1:
        raise ValueError("--states, --group, --test and --micro-batch must be 1 or more.")
    # Else the chunks of advantages in `train_step` would not line up with the processes' states.
    if s.states % processes:
        raise ValueError(
            f"--states {s.states} cannot be shared by {processes} processes: choose a multiple."
        )
    if not all(parameter.isfinite().all() for parameter in editor.model.parameters()):
        raise ValueError(f"{s.model} holds weights that are not finite.")
    # A run that is longer than --steps has nothing to go on to.
    log = out / "log.jsonl"
    if s.resume and log.exists():
        done = len(log.read_text().splitlines())
        if done > s.steps:
            raise ValueError(f"{out} is {done} steps old: give --steps as many or more.")
    answers, edits = count_calls(s, len(train), len(test))
    # Disk: for a moment there are three checkpoints, each with float32 masters and two moments.
    weights = sum(parameter.numel() for parameter in editor.model.parameters())
    size = 36 * weights - sum(file.stat().st_size for file in out.glob("checkpoint-*.pt"))
    # What both scripts plan alike: calls, tokens, contexts, disk. A context that is too small shows here, not after
    # hours.
    problems = [problem for domain in train + test for problem in task.problems(domain)]
    models = (solver, editor)
    lines = evolve.plan_lines(task, models, (answers, edits), problems, s, out, size)
    return f"Plan\n  {lines}\n  {memory_line(editor.model, s.resume)}"


def memory_line(model, resume: bool) -> str:
    """What the optimizer takes of this machine's own memory. ValueError if that is not there."""
    size = MasterAdamW.host_bytes(model)
    if resume:  # for a moment, the masters are there twice
        size += sum(4 * p.numel() for p in model.parameters() if p.dtype.itemsize < 4)
    size *= int(
        os.environ.get("LOCAL_WORLD_SIZE", 1)
    )  # torchrun's word for the processes on this machine
    free = memory_free()
    if free < size:
        raise ValueError(
            f"The optimizer takes up to {size / 1e6:,.0f} MB of this machine's memory, besides the GPU's, "
            f"and {free / 1e6:,.0f} MB are left: choose a smaller --model or a machine with more."
        )
    return f"host memory: up to {size / 1e6:,.1f} MB for the optimizer, of {free / 1e6:,.0f} MB that are left"


def memory_free() -> int:
    """Bytes of memory that this machine has left, or the container that this runs in."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        # not memory.current, which counts what was read from files, and is given up when needed
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return min(free, limit - int(used["anon"]))
    except (OSError, ValueError, KeyError):  # no container, or one without a limit: "max"
        return free


def count_calls(s: Config, train: int, test: int) -> tuple[int, int]:
    """Responses (answers, edits) that solver and editor are asked for at most, with `train` and `test` domains.

    Fewer where edits are invalid, which are not scored, and where trees are solved early. Sampling is most of what a
    run costs, so this is what the plan and the pace are made of.
    """
    score = s.holdout * s.samples  # answers to score one version of the instructions
    per_round = s.k + s.edits * score
    # Start states: each training domain's tree, grown anew every `grow_every` steps.
    growths = 1 + (s.steps - 1) // s.grow_every if s.grow_every else 1
    grown = train * growths  # trees
    answers = grown * (score + s.grow_rounds * per_round)
    edits = grown * s.grow_rounds * s.edits
    # Then the steps themselves: a summary and G scores for each of N states.
    answers += s.states * score  # the noise of the reward
    answers += s.steps * s.states * (s.k + s.group * score)
    edits += s.steps * s.states * s.group
    # Before and after: two editors; each domain has a seed and a best node to test.
    answers += 2 * test * (score + s.rounds * per_round + 2 * s.test * s.samples)
    edits += 2 * test * s.rounds * s.edits
    return answers, edits


# ---------------------------------------------------------------------------------------------------------------------
# Guards
# ---------------------------------------------------------------------------------------------------------------------
# Both are guards against runs that cannot learn: they stop it early, with a remedy, instead of letting it end in a flat
# curve.
# Perfect instructions must beat the seed instructions by that much.
HEADROOM = 0.1
# A run in which nothing can be learned shows it in so many steps.
EARLY = 3


def check_headroom(task, solver, s: Config, accelerator: Accelerator) -> None:
    """Say what edits can reach at most, where the task knows. SystemExit if there is nothing to reach.

    Scores are means over the holdouts of the first eight training domains: enough to see, and cheap.
    """
    domains = large_domains(task, "train", s)[:8]
    scores = evolve.headroom(task, solver, domains, training_settings(s, s.seed))
    if scores is None:
        return
    seed, perfect = scores
    accelerator.print(
        f"0. Headroom: the seed instructions score {seed:.3f}, perfect instructions {perfect:.3f} "
        f"(holdout of {len(domains)} training domains).",
        flush=True,
    )
    if perfect - seed < HEADROOM:
        raise SystemExit(
            "There is no headroom: the solver does no better with all that can be known, so no edit can "
            "help. Choose another --model, or a --solver that uses what its instructions say."
        )


def check_learning(lines: list[dict], groups: list[EditGroup], s: Config) -> None:
    """SystemExit with the reason and a sample, if after EARLY steps nothing has told a good edit from a bad one."""
    # Looked at once, not at every step. With a single edit per step there is nothing that it could be better than.
    if len(lines) != EARLY or s.steps <= EARLY or s.states * s.group == 1:
        return
    edit = groups[0].edits[0]
    # Invalid throughout: all rewards are the same penalty, and say nothing of what to write.
    if not any(line["valid"] for line in lines):
        why = f"no edit of the first {EARLY} steps could be used ({edit.note})"
        remedy = "a larger --model, one that follows the form which the prompt asks for"
        if sum(line["cut"] for line in lines) > EARLY * s.states * s.group / 2:
            remedy = f"a larger --editor-tokens than {s.editor_tokens}: most edits were cut off"
    elif not any(line["spread"] for line in lines):
        scores = [score for each in groups for score in each.after if not math.isnan(score)]
        why = f"in the first {EARLY} steps no edit was better than another"
        why += f"; the last ones score {min(scores):.3f} to {max(scores):.3f}" if scores else ""
        remedy = "a larger --holdout or --states, or a --solver that its instructions can help"
        if s.advantage == "grpo" and s.group == 1:
            remedy = "--group 2 or more: grpo compares the edits of one start state"
    else:
        return
    raise SystemExit(
        f"This run cannot learn: {why}.\nAn edit for {evolve.printable(groups[0].state.domain)}: "
        f"{one_line(edit.text)}\nTry {remedy}."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Files: a kill, a full disk or a torn file costs the step that was under way, never the run
# ---------------------------------------------------------------------------------------------------------------------


def save_log(out: Path, lines: list[dict]) -> None:
    """All lines at once, and a checkpoint has them too: killed at any moment and resumed, each is there once."""
    evolve.save_text(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def identity(s: Config) -> dict:
    """What a run and its checkpoints have in common. A checkpoint of an equal run elsewhere is as good as its own."""
    return {name: value for name, value in asdict(s).items() if name not in FREE}


def checkpoint_due(step: int, s: Config, since: float, saving: float) -> bool:
    """After the last step, every `save_every` steps, else so seldom that saving takes less than 5% of the time.

    `since` are the seconds since the last checkpoint, `saving` those that it took. Before the first one they are the
    seconds since the loop began, and 0: so the first step is saved at once, and shows what saving takes.

    >>> s = Config(steps=100)
    >>> checkpoint_due(0, s, since=9.0, saving=0.0), checkpoint_due(5, s, since=50.0, saving=4.0)
    (True, False)
    """
    if step + 1 == s.steps:
        return True
    if s.save_every:
        return (step + 1) % s.save_every == 0
    return since > 20 * saving


def save_checkpoint(out: Path, s: Config, optimizer: MasterAdamW, progress: Progress) -> None:
    """The state after its last step, weights included (they are the optimizer's masters). The newest two stay.

    12 bytes per weight: a float32 master and two moments. Two, because the newest may turn out to be torn.
    """
    path = out / f"checkpoint-{len(progress.lines):06d}.pt"
    state = {"run": identity(s), "optimizer": optimizer.state_dict(), **asdict(progress)}
    evolve.atomic_write(path, partial(torch.save, state))
    older = [each for each in sorted(out.glob("checkpoint-*.pt")) if each <= path]
    for old in older[:-2]:
        old.unlink()


def load_checkpoint(
    out: Path, s: Config, optimizer: MasterAdamW, accelerator: Accelerator
) -> Progress | None:
    """The state of the newest checkpoint that is whole and this run's; weights and moments go into `optimizer`.

    Any other is named with the reason, left where it is, and the one before it tried. None if none is left.
    """
    for path in sorted(out.glob("checkpoint-*.pt"), reverse=True):
        try:
            # `weights_only`: a checkpoint is data, and no code in it may run. To the CPU, whatever device it was saved
            # from: masters belong there.
            state = torch.load(path, weights_only=True, map_location="cpu")
            saved = state["optimizer"]
            shapes = [master.shape for master in saved["masters"]]
            # Settings that shape what is learned must be the same, and the model as large: else two runs would be
            # mixed.
            if state["run"] != identity(s) or shapes != [
                master.shape for master in optimizer.masters
            ]:
                raise ValueError("it belongs to another run")
            states = [StartState(**each) for each in state["start_states"]]
            progress = Progress(state["lines"], states, state["noise"])
            optimizer.load_state_dict(saved)
            accelerator.print(f"{path}: going on after {len(progress.lines)} steps.")
            return progress
        except Exception as error:  # whatever a torn file makes of the unpickler
            accelerator.print(f"{path} is refused ({error!r:.200}): trying the one before it.")
    accelerator.print("There is no checkpoint to go on from: starting with the first step.")
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def make_accelerator() -> Accelerator:
    """accelerate's view of this process: its rank, its device, how many others there are.

    Started by torchrun or `accelerate launch`, a process may grow trees for hours while others wait. Tiny models stay
    on the CPU also where there are GPUs, so tensors of both kinds must find their way.
    """
    # Seven days: torch's own patience with a process that waits is minutes.
    cuda = torch.cuda.is_available()
    group = InitProcessGroupKwargs(timeout=timedelta(days=7))
    if cuda and "LOCAL_RANK" in os.environ:
        group.backend = "cuda:nccl,cpu:gloo"
    return Accelerator(cpu=not cuda, kwargs_handlers=[group])


def main(s: Config) -> dict | None:
    """The paper, from start to end. Returns what results.json holds; None after --dry-run."""
    accelerator = make_accelerator()
    clocks = [time.time()]

    # 0. Everything that can fail early fails here. The solver stays as it is; the editor starts from the same weights.
    s = evolve.with_presets(s)
    out = Path(s.out or evolve.run_folder(s.task))
    name = s.model
    if not name and s.task == "mini":
        name = str(evolve.MINIATURE / "base")
    if not name:
        raise SystemExit(
            f"--task {s.task} needs --model, a checkpoint folder or hub name: only mini brings its own."
        )
    # The data first: large models take minutes to load, and a wrong folder need not wait for them.
    task = data.load_task(s.task, s.data or None)
    evolve.begin_with(task, s.instructions)
    train, test = large_domains(task, "train", s), large_domains(task, "test", s)
    # Two copies of one checkpoint, not one in two roles as in evolve.py: here the editor's weights change.
    editor = evolve.load_model(name, s.max_batch_tokens, s.dtype)
    solver = evolve.open_model(s.solver or name, s.solver_model, s, "solver")
    accelerator.print(
        plan(task, solver, editor, s, out, train, test, accelerator.num_processes), flush=True
    )
    if accelerator.is_main_process:
        evolve.open_run(s, out, FREE, look=s.dry_run)
    if s.dry_run:
        accelerator.print("A dry run: no model was asked, nothing was written.")
        return None
    accelerator.wait_for_everyone()  # until the folder is there
    if s.gradient_checkpointing:
        editor.model.activation_checkpointing_enable()

    # Is what each model samples what it computes? Of all silent mistakes this is the first: checked on the run's own
    # prompts.
    splits = evolve.split_problems(task.problems(train[0]), training_settings(s, s.seed))
    checks = evolve.check_models(task, splits["pool"], solver, editor, s, s.gradient_checkpointing)
    accelerator.print(evolve.check_text(checks), flush=True)

    # 1. Start states, and 2. reinforcement learning on them.
    progress = reinforce(task, solver, editor, s, out, accelerator, checks["editor"])
    if accelerator.is_main_process:
        evolve.save_model(editor, out / "editor")
    clocks.append(time.time())

    # 3. Before and after, on domains that training never saw.
    # The solver's weights have never changed, so it is the untrained editor as well.
    base = evolve.twin(solver)  # in both roles, unless the solver is another model
    if s.solver:
        base = evolve.load_model(name, s.max_batch_tokens, s.dtype)
        # The same checkpoint: what the check said of the editor goes for it.
        base.share = editor.share
    untrained, trees_before = evaluate(task, solver, base, s, "3. untrained editor", accelerator)
    trained, trees = evaluate(task, solver, editor, s, "3. trained editor", accelerator)
    clocks.append(time.time())
    results: dict[str, Any] = {
        "untrained": untrained,
        "trained": trained,
        "gain": paired_gain(untrained["scores"], trained["scores"]),
        "reward_noise": progress.noise,
        "config": asdict(s),
        "skipped_steps": sum(line["skipped"] for line in progress.lines),
        "seconds": {"rl": clocks[1] - clocks[0], "evaluation": clocks[2] - clocks[1]},
    }
    # The cost is that of all processes, and of both editors.
    solver.usage = evolve.total(gather_object([solver.usage]))
    editor.usage = evolve.total(gather_object([editor.usage, base.usage]))
    results |= evolve.account(trees, solver, editor, checks)
    if accelerator.is_main_process:
        finish(results, trees_before, trees, progress.lines, out)
    accelerator.end_training()
    return results


if __name__ == "__main__":
    evolve.start(main, Config, __doc__)
