"""Self-evolution at test time: Algorithm 1 of the paper, three baselines in the same loop, and their comparison.

    python evolve.py                                  the editor of `python train.py` on unseen mini domains
    python evolve.py --compare                        untrained and trained editor x all methods, as one table
    python evolve.py --task bird --data DIR --solver Qwen/Qwen3-4B-Instruct-2507 --editor runs/bird/editor
    python evolve.py --task jsonl --data my.jsonl --solver http://localhost:8000/v1 --editor https://api.openai.com/v1
                     --editor-model gpt-5             any OpenAI-compatible server, key in $LSE_API_KEY
    python evolve.py ... --dry-run                    check everything, say what it would cost, ask no model

Symbols of the paper: instructions are c, a summary (graded answers to k problems) S, a score R̄(c) (eq. 4), the solver
π_θ, the editor f_ψ; T rounds grow a tree, and a node is chosen by R̄_n + C sqrt(ln N / v_n).

One round: pick a node of the tree, let the frozen solver answer k fresh problems under its instructions, show the
graded answers to the editor, score what it writes on the holdout, attach it. No weights change here.

What a run says twice: the best holdout score over the rounds, as the paper reports it, is optimistic, since the search
chose by it; the test split, touched once at the end, is honest.

Left out on purpose: parallel rounds of one tree (each edit reads the one before), early stopping, merging of branches.
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
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from data import Answer, Problem, cut, extract_tag, load_task
from lse import EvolutionTree, LocalModel, RemoteModel, Sample


def option(default, text: str):
    """A config field with its help text: `--help` and the source are the same words."""
    return field(default=default, metadata={"help": text})


@dataclass
class Settings:
    """What training and test time share. A field left at None takes the task's preset below."""

    task: str = option("mini", "mini, bird, mmlu or jsonl")
    data: str = option("", "folder or file with the task's data (not for mini)")
    # What is drawn, and how often. Problems of a domain: k + holdout + test of them at least.
    seed: int = option(0, "seed of the splits, the problem batches and all sampling")
    rounds: int | None = option(None, "T, rounds of evolution per tree")
    k: int | None = option(None, "problems answered per round and shown to the editor")
    holdout: int | None = option(None, "problems that score a node")
    test: int | None = option(None, "problems kept for one honest look at the end; 0: none")
    samples: int | None = option(None, "answers per holdout problem; a score is the mean over both")
    c: float | None = option(None, "C of the UCB rule: 0 is best-first, large is exploration")
    # How the two models sample. Training samples its edits at temperature 1 with nothing cut off.
    solver_tokens: int | None = option(None, "new tokens per answer")
    editor_tokens: int | None = option(None, "new tokens per edit")
    solver_temperature: float | None = option(None, "temperature of the solver; 0 is greedy")
    editor_temperature: float | None = option(None, "temperature of the editor at test time")
    top_p: float | None = option(None, "nucleus of the solver, and of the editor at test time")
    top_k: int | None = option(None, "top-k of the solver, and of the editor at test time; 0: off")
    max_prompt_tokens: int = option(0, "longest editor prompt: problems are left out to fit; 0: what the model reads")
    max_batch_tokens: int = option(65536, "tokens per batch of local generation, padding and new tokens included")
    # How a script runs, and where.
    search: Literal["ucb", "chain", "best", "pareto"] = option("ucb", "which node to edit next (not for baselines)")
    out: str = option("", "the run's folder; empty: runs/<task>, of evolve.py runs/<task>-evolve")
    resume: bool = option(False, "go on from the last finished step or round of the run in --out")
    overwrite: bool = option(False, "delete the run in --out first")
    dry_run: bool = option(False, "check everything that can be checked, print the plan and its cost, and stop")


PRESETS = {  # what a field left at None becomes
    # The miniature's solver is so sure of itself that one greedy answer loses nothing; c was chosen on its dev domains.
    "mini": dict(rounds=10, k=4, holdout=8, test=32, samples=1, c=0.3, solver_tokens=16, editor_tokens=40,
                 solver_temperature=0.0, editor_temperature=0.7, top_p=0.8, top_k=20),
    # The paper keeps no test split. 30 is what a subject of MMLU-Redux (95 problems) has left for one.
    "paper": dict(rounds=25, k=10, holdout=50, test=30, samples=8, c=2.0, solver_tokens=2048, editor_tokens=4096,
                  solver_temperature=0.7, editor_temperature=0.7, top_p=0.8, top_k=20),
}
# A real task on a CPU: every line of code runs, in minutes, and nothing can be learned.
PRESETS["rehearsal"] = PRESETS["paper"] | dict(rounds=2, k=2, holdout=4, test=4, samples=1, solver_tokens=32,
                                               editor_tokens=64)


def with_presets(settings: Settings, presets: dict[str, dict] = PRESETS, remote: bool = False) -> Any:
    """The same settings with every None filled in: the miniature's values, the paper's, or without a GPU a rehearsal's.

    `remote`: the models run elsewhere, so this machine needs no GPU. `presets` adds to those that both scripts share.
    ValueError names what no run could work with.
    """
    kind = "mini" if settings.task == "mini" else "paper" if remote or torch.cuda.is_available() else "rehearsal"
    paper = presets[kind].get("rounds") == PRESETS["paper"]["rounds"]  # --paper-protocol
    if kind == "rehearsal" and not paper and os.environ.get("RANK", "0") == "0":
        print("No GPU here: what you do not set is a rehearsal's. Every line of code runs, and nothing can be learned.")
    given = {name: value for name, value in asdict(settings).items() if value is not None}
    s = replace(settings, **PRESETS[kind] | presets[kind] | given)
    for name, value in asdict(s).items():
        least = name in ("k", "holdout", "samples", "solver_tokens", "editor_tokens", "seeds")  # 1, else 0
        if isinstance(value, (int, float)) and (value < least or name == "top_p" and not 0 < value <= 1):
            raise ValueError(f"--{name.replace('_', '-')} cannot be {value}.")
    return s


def solver_sampling(s: Settings) -> dict:
    return dict(max_new_tokens=s.solver_tokens, temperature=s.solver_temperature, top_p=s.top_p, top_k=s.top_k)


def editor_sampling(s: Settings) -> dict:
    return dict(max_new_tokens=s.editor_tokens, temperature=s.editor_temperature, top_p=s.top_p, top_k=s.top_k)


ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}  # layers whose cache prompts can share


def load_model(name: str | Path, max_batch_tokens: int = 65536) -> LocalModel:
    """A checkpoint folder or hub name: bf16 on a GPU if there is one, else float32 on the CPU.

    Under torchrun each process takes the GPU of its own rank. SystemExit says what cannot be loaded, and why.
    """
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        if not tokenizer("a")["input_ids"]:  # half a download: transformers makes an empty one without a word
            raise ValueError("its tokenizer files are missing")
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
        odd = {*(getattr(model.config.get_text_config(), "layer_types", None) or [])} - ATTENTION
        if odd:
            raise ValueError(f"its layers of {', '.join(odd)} have no cache that prompts could share: choose another")
        return LocalModel(model.to(device), tokenizer, max_batch_tokens)  # type: ignore[arg-type]
    except Exception as error:  # half a download, no chat template, ...: every library has errors of its own
        why = (str(error) or repr(error)).strip().splitlines()[0]
        raise SystemExit(f"No model can be loaded from {name} (`python train.py` makes runs/...): {why}") from None


# ---------------------------------------------------------------------------------------------------------------------
# The steps of a round
# ---------------------------------------------------------------------------------------------------------------------


def split_problems(problems: list[Problem], s: Settings) -> dict[str, list[Problem]]:
    """Disjoint pool, holdout and test of one domain: as the task prescribes them, else drawn with the seed.

    The pool feeds summaries, the holdout scores nodes, and the test split is touched once, at the end. A problem that
    occurs twice is taken once: else its twin in the pool could give a test problem away. Batches are drawn with
    replacement, so a pool of one problem would do; but k different ones are what an editor should see.
    ValueError with the numbers where there are too few.
    """
    domain, h, t = problems[0].domain if problems else "this domain", s.holdout, s.test
    if problems and all(p.split for p in problems):  # then --holdout and --test can only make a split smaller
        pool, holdout, test = ([p for p in problems if p.split == name] for name in ("pool", "holdout", "test"))
        if not pool or not holdout or (t and not test):
            raise ValueError(f"The problems of {domain} name their splits, and one of pool, holdout, test is empty.")
        return {"pool": pool, "holdout": holdout[:h], "test": test[:t]}
    distinct = list({(p.question, p.evidence, p.choices, p.gold): p for p in reversed(problems)}.values())[::-1]
    if len(distinct) < s.k + h + t:
        raise ValueError(f"{domain} has {len(distinct)} problems, fewer than k + holdout + test = {s.k} + {h} + {t}: "
                         "choose smaller --k, --holdout or --test, or other --domains.")
    shuffled = random.Random(f"{s.seed}/{domain}").sample(distinct, len(distinct))
    return {"pool": shuffled[h + t :], "holdout": shuffled[:h], "test": shuffled[h : h + t]}


def draw_batch(pool: list[Problem], s: Settings, domain: str, round_: int) -> list[Problem]:
    """k problems, with replacement as in the paper.

    They depend on seed, domain and round alone: every method and every search rule sees the same, a resumed run too.
    """
    return random.Random(f"{s.seed}/{domain}/{round_}").choices(pool, k=s.k)


def solve_all(task, solver, jobs: list[tuple[str, list[Problem]]], samples: int = 1, **sampling) -> list[list[Answer]]:
    """Answer and grade many jobs (instructions, problems) in one batch of the solver.

    Returns one list per job: `samples` answers for each problem, those of one problem together. One call for many
    domains and edits is what keeps a GPU or a server busy.
    """
    asked = [(instructions, problem) for instructions, problems in jobs for problem in problems]
    drawn = solver.sample([task.solve_chat(i, problem) for i, problem in asked], n=samples, **sampling)
    pairs = [(problem, sample) for (_, problem), row in zip(asked, drawn) for sample in row]
    texts = [(problem, sample.text) for problem, sample in pairs]
    # A task may grade side by side on all cores.
    grades = task.grade_many(texts) if hasattr(task, "grade_many") else [task.grade(*pair) for pair in texts]
    answers = iter([Answer(p.id, p.question, s.text, g.answer, p.gold, g.correct, g.feedback, s.truncated)
                    for (p, s), g in zip(pairs, grades)])
    return [[next(answers) for _ in range(len(problems) * samples)] for _, problems in jobs]


def solve(task, solver, instructions: str, problems: list[Problem], samples: int = 1, **sampling) -> list[Answer]:
    """Graded answers of the solver to problems of one domain under some instructions: y ~ π_θ(x, c) and R(x, y)."""
    return solve_all(task, solver, [(instructions, problems)], samples, **sampling)[0]


def score_all(task, solver, jobs: list[tuple[str, list[Problem]]], s: Settings) -> list[list[float]]:
    """Per job, the share of right answers to each problem; the mean of a job's shares is R̄ (eq. 4)."""
    return [[fmean(a.correct for a in answers[i : i + s.samples]) for i in range(0, len(answers), s.samples)]
            for answers in solve_all(task, solver, jobs, s.samples, **solver_sampling(s))]


def count_tokens(model, chat: list[dict]) -> int:
    """Tokens of a prompt; for a remote model, whose tokenizer is not here, a quarter of the characters."""
    return len(model.encode(chat)) if hasattr(model, "encode") else sum(len(m["content"]) for m in chat) // 4


def context(model) -> int:
    """Tokens that a local model reads, prompt and response together; 0 where nobody knows, as with a server."""
    config = model.model.config.get_text_config() if isinstance(model, LocalModel) else None
    return getattr(config, "max_position_embeddings", 0)


def edit_chat(task, editor, instructions: str, summary: list[Answer], limit: int = 0) -> tuple[list[dict], int]:
    """The editor's chat and the number of problems dropped from the end of the summary to fit `limit` tokens.

    Problems go whole, since half a query teaches nothing, and one always stays. 0: three quarters of what a local model
    reads; the rest is for writing.
    """
    kept, limit = list(summary), limit or context(editor) * 3 // 4
    while limit and len(kept) > 1 and count_tokens(editor, task.edit_chat(instructions, kept)) > limit:
        kept.pop()
    return task.edit_chat(instructions, kept), len(summary) - len(kept)


def read_edit(task, sample: Sample, tag: str = "prompt") -> tuple[str | None, str]:
    """(new instructions, "") or (None, why the edit is invalid). A task may bring its own reader, `task.read_edit`.

    An edit that was cut off has no closing tag, so it is invalid: half an instruction is worse than none.
    """
    reader = getattr(task, "read_edit", None)
    text = reader(sample.text) if reader else extract_tag(sample.text, tag)
    if text is None:
        return None, f"cut off before </{tag}>" if sample.truncated else f"nothing usable in <{tag}> tags"
    if not reader and len(text) < 10:  # the official code's rule
        return None, f"{len(text)} characters in <{tag}> tags, fewer than 10"
    return text, ""


# ---------------------------------------------------------------------------------------------------------------------
# Writing edits: LSE, and the baselines of Section 7 in PAPER order
# ---------------------------------------------------------------------------------------------------------------------

SEARCH_OF = {"gepa": "pareto", "textgrad": "chain", "reflexion": "chain"}
LESSONS = 10  # how many Reflexion remembers

CRITIC = """A model failed on problems under the instructions below. Say, in a few sentences, what in the instructions
led to these failures and what should change. Do not write new instructions yet.
\n# Instructions\n{}\n\n# Failures\n{}"""
REWRITE = """Improve the instructions below with the help of the feedback. Write the full new instructions between
<IMPROVED_VARIABLE> and </IMPROVED_VARIABLE>.\n\n# Instructions\n{}\n\n# Feedback\n{}"""
LESSON = "Do not rewrite them: write only the one lesson most worth adding, between <lesson> and </lesson>."


def methods(task) -> list[str]:
    """The methods that fit a task. One that reads edits in its own way, such as the miniature, has but one tag."""
    return ["lse", "gepa"] if hasattr(task, "read_edit") else ["lse", *SEARCH_OF]


def search_rule(task, method: str, search: str = "ucb") -> str:
    """The rule that a method searches by: "lse" takes any, a baseline brings its own. ValueError if it does not fit."""
    if method not in methods(task):
        raise ValueError(f"--method {method} does not fit the task {task.name}: choose {', '.join(methods(task))}.")
    return SEARCH_OF.get(method, search)


def failures(summary: list[Answer], most: int = 6) -> str:
    """Up to six wrong answers for TextGrad's critic, one of each feedback first: six times the same error says little.

    Long fields are cut short, as in the editor's other prompts.
    """
    wrong = [a for a in summary if not a.correct]
    first = {a.feedback: a for a in reversed(wrong)}
    chosen = sorted(wrong, key=lambda a: first[a.feedback] is not a)[:most]
    parts = ((a.question, f"answer: {a.answer}", f"expected: {a.gold}", a.feedback) for a in chosen)
    return "\n\n".join("\n".join(cut(text, 1500) for text in fields) for fields in parts) or "(none)"


def add_lesson(instructions: str, lesson: str) -> str:
    """Reflexion's instructions: what they begin with, and under it the last LESSONS lessons, a line each.

    >>> add_lesson("Be brief.\\nLesson: Join by id.", "Round \\n to cents.")
    'Be brief.\\nLesson: Join by id.\\nLesson: Round to cents.'
    """
    head, *lessons = instructions.split("\nLesson: ")
    return "\nLesson: ".join([head, *[*lessons, " ".join(lesson.split())][-LESSONS:]])


def write_edits(task, editor, method: str, jobs: list[tuple[str, list[Answer]]], s: Settings) -> list[tuple]:
    """One edit per job (old instructions, summary): (new instructions or None, why not, what the editor wrote).

    "lse" and "gepa" ask in the task's own words for a rewrite. Reflexion adds a lesson to what is there, and forgets
    the oldest. TextGrad's "gradient" is text: a critique, which a second call applies.
    """
    tag, sampling = {"textgrad": "IMPROVED_VARIABLE", "reflexion": "lesson"}.get(method, "prompt"), editor_sampling(s)
    if method == "textgrad":
        asked = [[{"role": "user", "content": CRITIC.format(old, failures(summary))}] for old, summary in jobs]
        critiques = [row[0].text for row in editor.sample(asked, **sampling)]
        chats = [[{"role": "user", "content": REWRITE.format(old, c)}] for (old, _), c in zip(jobs, critiques)]
    else:
        chats = [edit_chat(task, editor, old, summary, s.max_prompt_tokens)[0] for old, summary in jobs]
    if method == "reflexion":
        chats = [[*chat[:-1], chat[-1] | {"content": chat[-1]["content"] + "\n\n" + LESSON}] for chat in chats]
    edits = [(*read_edit(task, sample, tag), sample.text) for (sample,) in editor.sample(chats, **sampling)]
    if method == "reflexion":
        edits = [(text and add_lesson(old, text), *more) for (old, _), (text, *more) in zip(jobs, edits)]
    return edits


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1
# ---------------------------------------------------------------------------------------------------------------------


def plant(task, domains: list[str], solver, s: Settings) -> dict[str, EvolutionTree]:
    """One tree per domain: the seed instructions c_0, scored on the holdout."""
    torch.manual_seed(hash((s.seed, 0, 0)))  # every draw depends on seed and place alone: resuming repeats it
    jobs = [(task.seed_instructions, split_problems(task.problems(d), s)["holdout"]) for d in domains]
    scores = score_all(task, solver, jobs, s)
    return {d: EvolutionTree(task.seed_instructions, fmean(x), x, c=s.c) for d, x in zip(domains, scores)}


def evolve_all(task, trees: dict[str, EvolutionTree], solver, editor, s: Settings, search: str = "ucb",
               method: str = "lse", on_round=lambda trees: None, progress: str = "") -> dict[str, EvolutionTree]:
    """Grow every domain's tree to `s.rounds` rounds, all in step, so that each model call is one large batch.

    Each round adds one node to each tree, so an interrupted run goes on where the trees stand. A baseline brings its
    own search rule. `on_round(trees)` is called after each round; `progress` names the progress bar, "" shows none.
    """
    search = search_rule(task, method, search)
    splits = {d: split_problems(task.problems(d), s) for d in trees}
    first = min((len(tree.nodes) - 1 for tree in trees.values()), default=0)
    for round_ in tqdm(range(first, s.rounds), initial=first, total=s.rounds, desc=progress, unit="round",
                       disable=not progress, leave=False):
        torch.manual_seed(hash((s.seed, round_)))
        # 1. Select a node n* of each tree. 2. The solver answers k fresh problems under its instructions.
        parents = {d: tree.select(search, seed=s.seed) for d, tree in trees.items()}
        jobs = [(parents[d].instructions, draw_batch(splits[d]["pool"], s, d, round_)) for d in trees]
        summaries = solve_all(task, solver, jobs, **solver_sampling(s))
        # 3. The editor reads (c, S) and writes new instructions.
        seen = [(old, summary) for (old, _), summary in zip(jobs, summaries)]
        edits = dict(zip(trees, write_edits(task, editor, method, seen, s)))
        if method == "gepa":  # its gate: only what is strictly better on the minibatch is worth a full scoring
            tried = [(d, text, batch) for (d, (text, *_)), (_, batch) in zip(edits.items(), jobs) if text is not None]
            again = solve_all(task, solver, [(text, batch) for _, text, batch in tried], **solver_sampling(s))
            before = {d: sum(a.correct for a in summary) for d, summary in zip(trees, summaries)}
            for (d, text, batch), answers in zip(tried, again):
                if sum(a.correct for a in answers) <= before[d]:
                    edits[d] = (None, f"no better on its minibatch than {before[d]} of {len(batch)}", text)
        # 4. Score it on the holdout. 5. Attach it. A rejected edit costs its round and is recorded with the reason.
        valid = [d for d in trees if edits[d][0] is not None]
        scores = dict(zip(valid, score_all(task, solver, [(edits[d][0], splits[d]["holdout"]) for d in valid], s)))
        for (d, (text, note, wrote)), summary in zip(edits.items(), summaries):
            score = fmean(scores[d]) if d in scores else None
            if method == "textgrad" and score is not None and score < parents[d].score:  # equal is kept
                score, note = None, f"reverted: the holdout score fell from {parents[d].score:.3f} to {score:.3f}"
            trees[d].add(parents[d], text or wrote, score, scores.get(d), [asdict(a) for a in summary], note)
        on_round(trees)
    return trees


def evolve(task, domain: str, solver, editor, settings: Settings | None = None, method: str = "lse",
           **changes) -> EvolutionTree:
    """Evolve the instructions of one domain; `changes` are fields of Settings, such as rounds=5 or search="chain".

    What stays None takes the preset of the task's name (see with_presets); a task of your own gets the paper's values.
    Nothing is written: fields that say how a script runs, from `out` to `dry_run`, play no part.
    """
    s = with_presets(replace(settings or Settings(), **{"task": task.name} | changes), remote=True)
    return evolve_all(task, plant(task, [domain], solver, s), solver, editor, s, s.search, method)[domain]


def final_test(task, trees: dict[str, EvolutionTree], solver, s: Settings) -> dict[str, tuple[list, list]]:
    """Per domain, the test scores under the seed instructions and under the best node's: problems not touched before.

    Where no edit beat the seed instructions both are the same answers, and the gain is exactly 0.
    """
    torch.manual_seed(hash((s.seed, 0, 1)))
    pairs = {d: [(d, tree.nodes[0].instructions), (d, tree.best().instructions)] for d, tree in trees.items()}
    asked = list(dict.fromkeys(sum(pairs.values(), [])))
    jobs = [(text, split_problems(task.problems(d), s)["test"]) for d, text in asked]
    scores = dict(zip(asked, score_all(task, solver, jobs, s)))
    return {d: (scores[seed], scores[best]) for d, (seed, best) in pairs.items()}


def mean_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error; nan where one value cannot tell.

    >>> mean_error([1.0, 3.0])
    (2.0, 1.0)
    """
    return fmean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------

# The browser brings dark on light or light on dark, as the reader prefers; every colour here is readable on both, and
# has a number, a sign or a link beside it for the colour-blind. One column, so that it fits a phone.
# circle: from dark blue for the page's lowest score (--share: 0%) to yellow for the highest, lighter all the way: works
# in grey as well. .way: the edges to the best node. .run: a line of the chart, in the colour .c0 to .c4 (the sixth run
# begins again). .dots: its dots, which are the round ends of lines without length.
CSS = """:root{color-scheme:light dark}body{margin:auto;max-width:56rem;padding:1rem;font:16px/1.5 system-ui,sans-serif;
overflow-wrap:anywhere}h2{margin-top:3rem}figure{margin:0;overflow-x:auto}text{fill:currentColor;font-size:13px}
circle{stroke:currentColor;fill:color-mix(in srgb,#ffea46 var(--share),#00205a)}path{fill:none;stroke:#888}
.way,.run path{stroke:currentColor;stroke-width:3}.run .dots{stroke-width:8;stroke-linecap:round}.c0{color:#0072b2}
.c1{color:#d55e00}.c2{color:#009e73}.c3{color:#cc79a7}.c4{color:#888}ins{background:#0072b255}del{background:#d55e0055}
pre{background:#8882;margin:0;padding:.6rem;white-space:pre-wrap}summary{cursor:pointer}details{margin:.6rem}"""


def clean(text: str) -> str:
    """Without what neither XML nor a terminal may be shown: control characters, lone surrogates, non-characters."""
    return re.sub("[^\t\n -~\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text.replace("\r\n", "\n"))


def esc(value: object) -> str:
    """A value as text that stays text inside HTML and XML, in elements and in quoted attributes.

    All that a model, a data set or a user wrote goes through here on its way into the page.

    >>> esc('<b> & "\\0"')
    '&lt;b&gt; &amp; &quot;\ufffd&quot;'
    """
    return html.escape(clean(str(value)))


def outline(tree: Any) -> list[tuple[Any, int, bool]]:
    """The tree depth first, children by age: each node, its depth (1 for the seed), if it leads to the best node."""
    paths: list[tuple[int, ...]] = []  # per node the ids from the seed down to it: sorted, they are depth first
    for node in tree.nodes:
        paths.append((*paths[node.parent], node.id) if node.id else (0,))
    return [(tree.nodes[path[-1]], len(path), path[-1] in paths[tree.best().id]) for path in sorted(paths)]


def fate(tree: Any, node: Any) -> str:
    """How an edit turned out, as in "0.750 (+0.125) ★ best": its score, and the change from its parent's (eq. 7)."""
    if node.score is None:
        return "✗ rejected"
    before = tree.nodes[node.parent].score if node.id else None
    change = "" if before is None else f" ({node.score - before:+.3f})"
    return f"{node.score:.3f}{change}{' ★ best' if node is tree.best() else ''}"


def tree_text(tree: Any) -> str:
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
    rows, lines = outline(tree), []
    for node, depth, way in rows:
        sign = "x" if node.score is None else "*" if way else "o"
        branch = ("  " * (depth - 1) + sign).ljust(2 * max(depth for _, depth, _ in rows))
        note = " ".join(clean(node.note).split())[:60]  # may quote what a model wrote: one short line of it
        lines.append(f"{branch}{node.id:>3}  {fate(tree, node)}  visits {node.visits}  {note}".rstrip())
    return "\n".join(lines)


def tree_svg(tree: Any, name: str, low: float, high: float) -> str:
    """`tree_text` as a picture: score as colour and number, the way to the best node thick, rejected edits hollow.

    Every node is a link to its details, whose ids are "{name}-{id of the node}". Units are pixels: the picture is not
    shrunk to a narrow window, where nobody could read it, but scrolled.
    """
    at, edges, dots = dict[int, tuple[int, int]](), ["", ""], ""  # edges: all others, and those of the way
    for node, depth, way in outline(tree):
        x, y = at[node.id] = 14 * depth, 26 * len(at) + 14
        if node.id:  # down from the parent, then right
            edges[way] += "M{} {}V{}H{}".format(*at[node.parent], y, x)
        style = "fill:Canvas" if node.score is None else f"--share:{(node.score - low) / (high - low):.0%}"
        dots += (f'<a href="#{name}-{node.id}"><circle cx="{x}" cy="{y}" r="8" style="{style}"/>'
                 f'<text x="{x + 14}" y="{y + 5}">#{node.id} · {fate(tree, node)}</text></a>')
    return (f'<svg width="{max(at.values())[0] + 230}" height="{26 * len(at)}" role="img" aria-label="tree">'
            f'<path d="{edges[0]}"/><path class="way" d="{edges[1]}"/>{dots}</svg>')


def chart_svg(runs: dict[str, Any], low: float, high: float) -> str:
    """Holdout score over the rounds: per run a line for the best so far, a dot for each round's own edit.

    x runs from 50 to 350 over the rounds, y from 190 up to 10 over the scores. A line is a link to its run.
    """
    rounds = max(1, *(len(tree.nodes) - 1 for tree in runs.values()))
    out = f'<text x="50" y="215">round 0</text><text x="350" y="215" text-anchor="end">round {rounds}</text>'
    for i, y in enumerate((190, 145, 100, 55, 10)):  # the axis is also the key to the colours of the trees
        out += (f'<path d="M50 {y}H350"/><circle cx="8" cy="{y}" r="6" style="--share:{25 * i}%"/>'
                f'<text x="18" y="{y + 4}">{low + i / 4 * (high - low):.2f}</text>')

    def at(i: int, score: float) -> str:
        return f"{50 + 300 * i / rounds:.1f} {190 - 180 * (score - low) / (high - low):.1f}"

    for k, tree in enumerate(runs.values()):
        scores = [node.score for node in tree.nodes]  # None, a rejected edit, never raises the best so far
        line = " ".join(at(i, max(score or 0.0 for score in scores[: i + 1])) for i in range(len(scores)))
        dots = "".join(f"M{at(i, score)}h0" for i, score in enumerate(scores) if score is not None)
        out += f'<a class="run c{k % 5}" href="#t{k}"><path d="M{line}"/><path class="dots" d="{dots}"/></a>'
    return f'<svg viewBox="0 0 360 220" style="max-width:34rem" role="img" aria-label="runs">{out}</svg>'


def diff(old: str, new: str) -> str:
    """What changed between two texts, sentence by sentence, as <del> and <ins>; leaving either out gives the other.

    >>> diff("Be brief. Be kind.", "Be brief. Be exact.")
    'Be brief.<del> Be kind.</del><ins> Be exact.</ins>'
    >>> diff("rank c1", "rank c1\\nage c2")  # a line that only gets a successor is unchanged
    'rank c1<ins>\\nage c2</ins>'
    """
    a, b = (re.split(r"(?<=[.:;!?\n])|(?=\n)", text) for text in (old, new))  # splits between characters
    steps = [(kind, esc("".join(a[i:j])), esc("".join(b[k:m])))
             for kind, i, j, k, m in SequenceMatcher(None, a, b).get_opcodes()]
    marks = {"equal": "{0}", "delete": "<del>{0}</del>", "insert": "<ins>{1}</ins>"}
    marks["replace"] = marks["delete"] + marks["insert"]
    return "".join(marks[kind].format(was, now) for kind, was, now in steps)


def node_html(tree: Any, node: Any, name: str) -> str:
    """What is behind one node, folded: what changed, its text in full, the graded problems that its editor saw.

    The id is inside the fold, so that a link to it makes the browser open it.
    """
    origin = f"from #{node.parent}" if node.id else "seed"
    changed = (f"<p>Rejected: {esc(node.note)}. What the editor wrote is below.</p>" if node.score is None else
               f"<h3>Changed {origin}</h3><pre>{diff(tree.nodes[node.parent].instructions, node.instructions)}</pre>"
               if node.id else "")
    right = sum(one["correct"] for one in node.summary)
    seen = f"<h3>Summary the editor saw: {right} of {len(node.summary)} problems right</h3>" if node.summary else ""
    for one in node.summary:
        mark = ("✓" if one["correct"] else "✗") + " (cut off)" * one["truncated"]
        facts = "".join(f"{key}<pre>{esc(one[key][:4000])}</pre>"  # a model in a loop fills pages
                        for key in ("answer", "gold", "feedback", "response") if one[key])
        seen += f"<details><summary>{mark} {esc(one['question'])}</summary>{facts}</details>"
    return f"""<details><summary><b>#{node.id}</b> {origin} · {fate(tree, node)} · visits {node.visits}</summary>
<div id="{name}-{node.id}">{changed}<h3>In full</h3><pre>{esc(node.instructions)}</pre>{seen}</div></details>"""


def write_report(path: str | Path, runs: dict[str, Any], title: str = "Learning to self-evolve") -> None:
    """One self-contained page on `runs`, label -> EvolutionTree: the runs side by side, then each with all its nodes.

    It is HTML and XML at once, has no scripts, and loads nothing: should hostile text ever get past `esc`, the policy
    in its head still forbids the browser to run or fetch anything.
    """
    scores = [node.score for tree in runs.values() for node in tree.nodes if node.score is not None]
    low, high, legend, body = min(scores), max(scores) + 1e-9, "", ""  # 1e-9: all scores may be the same
    for k, (label, tree) in enumerate(runs.items()):
        seed, best, rejected = tree.nodes[0].score, tree.best(), sum(node.score is None for node in tree.nodes)
        headline = f"{esc(label)}: {seed:.3f} → {best.score:.3f}, {rejected} of {len(tree.nodes) - 1} edits rejected"
        legend += f'<br/><b class="c{k % 5}">━●━</b> <a href="#t{k}">{headline}</a>'
        nodes = "".join(node_html(tree, node, f"t{k}") for node in tree.nodes)
        body += f"""<h2 id="t{k}">{headline}</h2><figure>{tree_svg(tree, f"t{k}", low, high)}</figure>
<h3>Best instructions (#{best.id})</h3><pre>{esc(best.instructions)}</pre><h3>All nodes</h3>{nodes}"""
    Path(path).write_text(f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'"/>
<title>{esc(title)}</title><style>{CSS}</style></head><body><h1>{esc(title)}</h1>{chart_svg(runs, low, high)}
<p>Line: best so far. Dot: each round's own edit. The holdout guided the search: trust the test split.{legend}</p>
{body}</body></html>""", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Config(Settings):
    """Everything that can be set. `--help` prints these words."""

    # Who. The two are independent of each other: an editor that was trained with one solver may guide another.
    solver: str = option("", "checkpoint folder, hub name or http(s)://.../v1; empty: runs/<task>/base")
    editor: str = option("", "the same for the editor; empty: runs/<task>/editor")
    solver_model: str = option("", "the solver's name on its server; empty: the first that the server lists")
    editor_model: str = option("", "the editor's name on its server; empty: the first that the server lists")
    # What.
    method: Literal["lse", "textgrad", "gepa", "reflexion"] = option("lse", "lse, or a baseline in the same loop")
    domains: str = option("", "domains by name, separated by commas, or how many of the test domains; empty: all")
    compare: bool = option(False, "untrained (the solver) and trained editor x all methods, as a table")
    seeds: int = option(3, "seeds of --compare")
    paper_protocol: bool = option(False, "the paper's values where you give none: holdout 50 x 8, T = 25, k = 10")


def open_run(s, out: Path, free: list[str], look: bool = False) -> None:
    """Make the run's folder, or find it as these settings left it. SystemExit in one sentence where that cannot be.

    `free` names the settings that may differ when a run is resumed. `look` only finds out. A folder is deleted only if
    it holds a config.json of this very script: a checkpoint, which has one too, never is.
    """
    file, settings = out / "config.json", asdict(s)
    old = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    changed = [f"--{name.replace('_', '-')} was {old.get(name)!r}, is now {value!r}" for name, value in settings.items()
               if name not in {*free, "resume", "overwrite"} and old.get(name) != value]
    fault = ("is no run of this script: name another --out" if old and not old.keys() >= settings.keys() - {*free} else
             "holds a run: continue it by --resume, delete it by --overwrite, or name another --out"
             if old and not s.resume and not s.overwrite else
             "holds no run to resume: leave --resume out to start one" if s.resume and not old else
             f"was run otherwise ({'; '.join(changed)}): give the same or another --out" if s.resume and changed else
             "cannot be written: name another --out" if not os.access(nearest(out), os.W_OK) else 0)
    if fault:
        raise SystemExit(f"{out} {fault}.")
    if look:
        return
    try:
        if old and not s.resume:
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(settings, indent=1))
    except OSError as error:
        raise SystemExit(f"{out} cannot be written ({error}): name another --out.") from None


def nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(at for at in (path.absolute(), *path.absolute().parents) if at.exists())


def write_text(path: Path, text: str) -> None:
    """First under another name, so that a kill leaves the old file or the new one."""
    path.with_name(path.name + ".tmp").write_text(text, encoding="utf-8")
    os.replace(path.with_name(path.name + ".tmp"), path)


def load_models(s: Config) -> list[LocalModel | RemoteModel]:
    """Solver and editor. One checkpoint in both roles is loaded once, behind two counters."""
    models = list[LocalModel | RemoteModel]()
    names = [s.solver or f"runs/{s.task}/base", s.editor or f"runs/{s.task}/editor"]
    for name, served in zip(names, (s.solver_model, s.editor_model)):
        if "://" in name:
            try:  # is anybody there? A server that is, but lists no models, will do if it need not choose one
                first = RemoteModel(name, timeout=20, retries=1).model
            except ConnectionError as error:
                if not served or "no answer" in str(error):
                    raise
            models.append(RemoteModel(name, served or first))  # with the patience that hours of work deserve
        else:  # a copy shares the weights and counts for itself
            models.append(copy(models[0]) if models and name == names[0] else load_model(name, s.max_batch_tokens))
    return models


def pick_domains(task, wanted: str) -> list[str]:
    """All test domains, the first n of them, or those named, from any split. SystemExit names what there is not.

    A name goes first: it may itself be a number, or hold a comma.
    """
    known, count = task.domains("all"), (wanted or "0").isdecimal()
    named = [wanted] if wanted in known else list(dict.fromkeys(name.strip() for name in wanted.split(",")))
    names = task.domains("test")[: int(wanted or 0) or None] if count and wanted not in known else named
    if not names or not {*names} <= {*known}:
        missing = ", ".join(name for name in names if name not in known)
        raise SystemExit(f"No domain {missing} in {task.name}; there are: {', '.join(known)[:2000]}.")
    return names


def afford(task, models, calls: tuple[int, int], problems, s: Settings, out: Path, size: float) -> str:
    """What a run asks for at most, in a few lines. ValueError if a context or the disk is too small.

    `models` are solver and editor, `calls` their numbers of answers, `size` the bytes that `out` may grow by. With what
    was checked before, the grader here, nothing fails after hours that could have failed before the first model call.
    The time is a guess from 2 operations per weight and token, at a usual speed of a GPU or of two cores.
    """
    longest = max(problems, key=lambda problem: len(str(task.solve_chat("", problem))))
    task.grade(longest, "")
    # The longest prompts: of instructions and answers, too, as many words as an edit and an answer may have tokens.
    rules, reply = task.seed_instructions + " word" * s.editor_tokens, "word " * s.solver_tokens
    seen = [Answer("", longest.question, reply, reply, longest.gold, False)] * s.k
    chats = task.solve_chat(rules, longest), edit_chat(task, models[1], rules, seen, s.max_prompt_tokens)[0]
    lines, work, speed = [], 0.0, 5e13 if torch.cuda.is_available() else 1e10
    for role, model, chat, asked in zip(("solver", "editor"), models, chats, calls):
        prompt, new, reads = count_tokens(model, chat), getattr(s, f"{role}_tokens"), context(model)
        if 0 < reads < prompt + new:  # beyond its context a model answers nonsense without a warning
            raise ValueError(f"The {role} reads {reads} tokens, too little for a prompt of {prompt}, with instructions "
                             f"of {s.editor_tokens} (--editor-tokens), and {new} more (--{role}-tokens).")
        weights = sum(map(torch.numel, model.model.parameters())) if isinstance(model, LocalModel) else 0
        work += 2 * weights * asked * (prompt + new) / int(os.environ.get("WORLD_SIZE", 1))
        name = getattr(model.model, "name_or_path", model.model) or "made here"
        lines.append(f"{role} {name}: up to {asked:,} answers, {asked * prompt:,} tokens to read and {asked * new:,} "
                     "to write")
    free = shutil.disk_usage(nearest(out)).free
    if free < size:
        raise ValueError(f"{out} may grow by {size / 1e6:,.0f} MB, and its disk has {free / 1e6:,.0f} left: make room.")
    time = f"very roughly {work / speed / 60:,.0f} minutes of computing on this machine"
    return "\n  ".join([*lines, f"up to {size / 1e6:,.1f} MB in {out}", time])


def plan(task, splits: dict[str, dict], solver, editor, s: Config, out: Path) -> str:
    """How many trees, and what they cost at most, in a few lines. ValueError as `afford`."""
    trees = len(splits) * (s.seeds * 2 * (2 + len(methods(task))) if s.compare else 1)
    # A tree scores its root and every edit; GEPA answers each batch twice, and TextGrad asks twice for an edit.
    batches, score = s.k * (1 + (s.compare or s.method == "gepa")), s.holdout * s.samples
    answers = trees * (score + s.rounds * (batches + score) + 2 * s.test * s.samples)
    edits = trees * s.rounds * (1 + (s.compare or s.method == "textgrad"))
    problems = [problem for parts in splits.values() for part in parts.values() for problem in part]
    longest = max(len(problem.question + problem.gold) for problem in problems)  # a node keeps what the editor saw
    size = 2 * edits * (s.k * (longest + 5 * s.solver_tokens + 2000) + 5 * s.editor_tokens)
    least = ", ".join(f"{min(len(p[name]) for p in splits.values())} {name}" for name in ("pool", "holdout", "test"))
    return (f"Plan\n  {trees} trees of {s.rounds} rounds on {len(splits)} domains, the smallest with problems: {least}"
            "\n  " + afford(task, (solver, editor), (answers, edits), problems, s, out, size))


def restore_trees(folder: Path, domains: list[str]) -> dict[str, EvolutionTree]:
    """The saved trees of a killed run, {} unless all are there.

    One that was killed while saving has left some trees a round ahead of the others: they are cut back.
    """
    try:
        trees = {d: EvolutionTree.load(folder / f"{tree_name(d)}.json") for d in domains}
    except FileNotFoundError:
        return {}
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{folder} holds a file that is no tree ({error}): start over with --overwrite.") from None
    size = min(len(tree.nodes) for tree in trees.values())  # a round is a node more than the seed's
    for tree in trees.values():
        for node in tree.nodes[size:]:
            tree.nodes[node.parent].visits -= 1
        tree.rounds, tree.nodes = size - 1, tree.nodes[:size]
    return trees


def save_trees(folder: Path, trees: dict[str, EvolutionTree]) -> None:
    """One file per tree; what `restore_trees` reads."""
    for domain, tree in trees.items():
        tree.save(folder / f"{tree_name(domain)}.json")


def tree_name(domain: str) -> str:
    """A file name for a domain of any name, another one for another domain.

    >>> tree_name("high school math"), tree_name("a/b"), tree_name("a_b")
    ('high school math', 'a%2f%b', 'a_b')
    """
    return re.sub(r"[^\w. -]", lambda odd: f"%{ord(odd[0]):x}%", domain)


def compare(task, domains: list[str], solver, editor, s: Config, out: Path) -> None:
    """{untrained, trained} x methods as a Markdown table: mean ± s.e. over domains, each averaged over seeds.

    The untrained editor is the solver itself. All rows see the same splits and batches. Table and report are saved
    after each row, trees after each round, so that --resume repeats no edit (it counts the answers since then); the
    report shows the first domain under the last seed.
    """
    head = "| editor | method | holdout best (optimistic) | test | test, seed instructions | solver answers |"
    table, runs = [head, "|---" * 6 + "|"], {}
    print("\n".join(table), flush=True)
    for label, model in (("untrained", copy(solver)), ("trained", editor)):  # a copy counts for itself
        for method, search in [("lse", "chain"), ("lse", "best"), *((method, "ucb") for method in methods(task))]:
            name = f"{label} | {method} ({search_rule(task, method, search)})"
            calls, rows = solver.calls, []  # rows[seed][domain]: holdout best, test, test of the seed instructions
            for seed in range(s.seed, s.seed + s.seeds):
                own = replace(s, seed=seed)
                folder = out / "trees" / f"{label}-{method}-{search}-{seed}"
                trees = restore_trees(folder, domains) or plant(task, domains, solver, own)
                evolve_all(task, trees, solver, model, own, search, method, on_round=partial(save_trees, folder),
                           progress=f"{name}, seed {seed}")
                tested = final_test(task, trees, solver, own) if s.test else dict.fromkeys(trees, ())
                rows.append([[fmean(x) for x in (tree.best().scores, *tested[d][::-1])] for d, tree in trees.items()])
            runs[name] = trees[domains[0]]
            columns = torch.tensor(rows, dtype=torch.float64).mean(0).T.tolist()  # (seeds, domains, 3) -> (3, domains)
            cells = ["{:.3f} ± {:.3f}".format(*mean_error(column)) for column in columns] + ["–", "–"]
            table.append(f"| {name} | {' | '.join(cells[:3])} | {(solver.calls - calls) // s.seeds:,} |")
            print(table[-1], flush=True)
            write_text(out / "compare.md", "\n".join(table) + "\n")
            write_report(out / "report.html", runs, f"{s.task}: {domains[0]}, seed {s.seed + s.seeds - 1}")
    print(f"Saved in {out}: compare.md, report.html.")


def finish(task, trees: dict[str, EvolutionTree], solver, editor, s: Config, out: Path) -> None:
    """Save, then say what came out: the optimistic and the honest number, the cost, the trees.

    Gains are paired: before and after are the same problems, so that hard ones do not count as noise.
    """
    parts = {"holdout": {d: (tree.nodes[0].scores, tree.best().scores) for d, tree in trees.items()}}
    parts |= {"test": final_test(task, trees, solver, s)} if s.test else {}
    results, text = {"config": asdict(s), "instructions": {d: t.best().instructions for d, t in trees.items()}}, ""
    for (part, pairs), remark in zip(parts.items(), ("optimistic: the search chose by it", "never touched before")):
        means = {d: [fmean(scores) for scores in pair] for d, pair in pairs.items()}  # domain -> [before, after]
        over, of = (means.values(), "domains") if len(means) > 1 else (zip(*[*pairs.values()][0]), "problems")
        (gain, se), (before, after) = mean_error([b - a for a, b in over]), map(fmean, zip(*means.values()))
        results[part] = dict(seed=before, best=after, gain=gain, stderr=None if math.isnan(se) else se, domains=means)
        text += (f"{part.capitalize()} ({remark}): {before:.3f} -> {after:.3f}, "
                 f"gain {gain:+.3f} ± {se:.3f} (paired, over {of})\n")
    results["cost"] = {role: {"answers": m.calls, "tokens read": m.prompt_tokens, "tokens written": m.completion_tokens}
                       for role, m in (("solver", solver), ("editor", editor))}
    write_text(out / "results.json", json.dumps(results, indent=1))
    write_report(out / "report.html", dict([*trees.items()][:20]), f"{s.task}: {s.method}")
    for d, tree in [*trees.items()][: 3 if len(trees) <= 3 else 1]:
        print(f"\n{clean(d)} (* leads to the best node)\n{tree_text(tree)}\nBest instructions:\n"
              f"{clean(tree.best().instructions) or '(empty)'}\n")
    print(f"{text}Cost{' since --resume' * s.resume}: {json.dumps(results['cost'])[1:-1]}\n"
          f"Saved in {out}: trees/, results.json, report.html.")


def main(s: Config) -> None:
    """Check everything, then evolve some domains and say what was gained, or compare."""
    presets = dict.fromkeys(PRESETS, PRESETS["paper"] | {"test": 0}) if s.paper_protocol else PRESETS
    s = with_presets(s, presets, remote="://" in s.solver and "://" in s.editor)
    task, out = load_task(s.task, s.data or None), Path(s.out or f"runs/{s.task}-evolve")
    splits = {d: split_problems(task.problems(d), s) for d in pick_domains(task, s.domains)}
    rule = search_rule(task, s.method, s.search)
    solver, editor = load_models(s)
    print(plan(task, splits, solver, editor, s, out), flush=True)
    trees = restore_trees(out / "trees", list(splits)) if s.resume and not s.compare else {}
    done = max((tree.rounds for tree in trees.values()), default=0)
    if done > s.rounds:
        raise ValueError(f"{out} is {done} rounds old: give --rounds as many or more.")
    open_run(s, out, free=["rounds", "out", "dry_run"], look=s.dry_run)
    if s.dry_run:
        return print("A dry run: no model was asked, nothing was written.")
    if s.compare:
        return compare(task, list(splits), solver, editor, s, out)
    save = partial(save_trees, out / "trees")
    if not trees:
        save(trees := plant(task, list(splits), solver, s))  # from here on, a kill costs a round at most
    evolve_all(task, trees, solver, editor, s, rule, s.method, on_round=save, progress=f"{s.method} {rule}")
    finish(task, trees, solver, editor, s, out)


def command_line(config: Any, doc: str) -> Any:
    """The config that the command line asks for. Unknown flags are errors, and so is what breaks a rule of the data."""
    layout = {"description": doc, "formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    return config(**vars(HfArgumentParser(config, **layout).parse_args()))


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def start(main, config: type, doc: str) -> None:
    """A script from the shell: main(config), and what ends it early is said in a sentence instead of a traceback."""
    # A terminal without ± must not cost a run its last lines.
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        main(command_line(config, doc))
    except (ValueError, OSError) as error:  # wrong paths and values, a lost server, a full disk
        full = ": make room or give access, then go on with --resume" * (getattr(error, "errno", 0) in DISK_ERRORS)
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}{full}") from None
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"{error} Try a smaller --max-batch-tokens; to train, --gradient-checkpointing and "
                         "--micro-batch 1.") from None
    except KeyboardInterrupt:
        raise SystemExit("\nStopped. What is finished is saved: run the same command with --resume.") from None


if __name__ == "__main__":
    start(main, Config, __doc__)
