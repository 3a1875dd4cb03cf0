"""Self-evolution at test time: Algorithm 1 of the paper, three baselines in the same loop, and their comparison.

    python evolve.py                                      the editor that `python train.py` made, on unseen mini domains
    python evolve.py --compare                            untrained and trained editor x every search, as one table
    python evolve.py --task bird --data DIR --solver Qwen/Qwen3-4B-Instruct-2507 --editor runs/bird/editor
    python evolve.py --task jsonl --data my.jsonl --solver http://localhost:8000/v1 --editor https://api.openai.com/v1 \\
                     --editor-model gpt-5                 any OpenAI-compatible server, key in $LSE_API_KEY

One round: pick a node of the tree, let the frozen solver answer k fresh problems under its instructions, show the graded
answers to the editor, score what it writes on the holdout, attach it. No weights change here.

Left out on purpose: parallel rounds of one tree (each edit reads the one before), early stopping, merging of branches.
"""

from __future__ import annotations

import html
import os
import random
import re
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import SequenceMatcher
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import Answer, Problem, extract_tag
from lse import EvolutionTree, LocalModel, Sample


def option(default, text: str):
    """A config field with its help text: `--help` and the source are the same words."""
    return field(default=default, metadata={"help": text})


@dataclass
class Settings:
    """What training and test time share. A field left at None takes the task's preset below."""

    task: str = option("mini", "mini, bird, mmlu or jsonl")
    data: str = option("", "folder or file with the task's data (not for mini)")
    seed: int = option(0, "seed of the splits, the problem batches and all sampling")
    rounds: int | None = option(None, "T, rounds of evolution per tree")
    k: int | None = option(None, "problems answered per round and shown to the editor")
    holdout: int | None = option(None, "problems that score a node")
    test: int | None = option(None, "problems kept for one honest look at the end; 0: none")
    samples: int | None = option(None, "answers per holdout problem; a score is the mean over both")
    c: float | None = option(None, "C of the UCB rule: 0 is best-first, large is exploration")
    solver_tokens: int | None = option(None, "new tokens per answer")
    editor_tokens: int | None = option(None, "new tokens per edit")
    solver_temperature: float | None = option(None, "temperature of the solver; 0 is greedy")
    editor_temperature: float | None = option(None, "temperature of the editor at test time (training samples at 1)")
    top_p: float | None = option(None, "nucleus of the solver, and of the editor at test time")
    top_k: int | None = option(None, "top-k of the solver, and of the editor at test time; 0: off")
    max_prompt_tokens: int = option(0, "longest editor prompt; problems are dropped from the summary to fit. 0: no limit")


PRESETS = {  # what a field left at None becomes
    # The miniature's solver is so sure of itself that one greedy answer loses nothing; c was chosen on its dev domains.
    "mini": dict(rounds=10, k=4, holdout=8, test=32, samples=1, c=0.3, solver_tokens=16, editor_tokens=40,
                 solver_temperature=0.0, editor_temperature=0.7, top_p=0.8, top_k=20),
    "paper": dict(rounds=25, k=10, holdout=50, test=50, samples=8, c=2.0, solver_tokens=2048, editor_tokens=4096,
                  solver_temperature=0.7, editor_temperature=0.7, top_p=0.8, top_k=20),
    # A real task on a CPU: every line of code runs, in minutes, and nothing can be learned.
    "rehearsal": dict(rounds=2, k=2, holdout=4, test=4, samples=1, c=2.0, solver_tokens=32, editor_tokens=64,
                      solver_temperature=0.7, editor_temperature=0.7, top_p=0.8, top_k=20),
}


def with_presets(settings: Settings, presets: dict[str, dict] = PRESETS, remote: bool = False) -> Settings:
    """The same settings with every None filled in: the miniature's values, the paper's, or without a GPU a rehearsal's.

    `remote`: the models run elsewhere, so this machine needs no GPU. `presets` adds to those that both scripts share.
    """
    kind = "mini" if settings.task == "mini" else "paper" if remote or torch.cuda.is_available() else "rehearsal"
    values = PRESETS[kind] | presets[kind]
    return replace(settings, **{f.name: values[f.name] for f in fields(settings) if getattr(settings, f.name) is None})


def solver_sampling(s: Settings) -> dict:
    return dict(max_new_tokens=s.solver_tokens, temperature=s.solver_temperature, top_p=s.top_p, top_k=s.top_k)


def editor_sampling(s: Settings) -> dict:
    return dict(max_new_tokens=s.editor_tokens, temperature=s.editor_temperature, top_p=s.top_p, top_k=s.top_k)


def load_model(name: str | Path, max_batch_tokens: int = 65536) -> LocalModel:
    """A checkpoint folder or hub name: bf16 on a GPU if there is one, else float32 on the CPU."""
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        dtype = torch.bfloat16 if device != "cpu" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)
    except (OSError, ValueError) as error:
        where = "a folder without a checkpoint" if Path(name).is_dir() else "neither a folder here nor to be had from the hub"
        raise SystemExit(f"{name} is {where}: {str(error).splitlines()[0]}") from None
    return LocalModel(model, tokenizer, max_batch_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# The steps of a round
# ---------------------------------------------------------------------------------------------------------------------


def split_problems(problems: list[Problem], s: Settings) -> dict[str, list[Problem]]:
    """Disjoint pool, holdout and test of one domain: as the task prescribes them, else drawn with the seed.

    The pool feeds summaries, the holdout scores nodes, and the test split is touched once, at the end.
    """
    if problems and all(p.split for p in problems):
        parts = {name: [p for p in problems if p.split == name] for name in ("pool", "holdout", "test")}
        return parts | {"holdout": parts["holdout"][: s.holdout], "test": parts["test"][: s.test]}
    domain = problems[0].domain if problems else "this domain"
    if len(problems) < s.k + s.holdout + s.test:
        raise SystemExit(
            f"{domain} has {len(problems)} problems, fewer than k + holdout + test = {s.k} + {s.holdout} + {s.test}: "
            "choose smaller --k, --holdout or --test, or leave the domain out with --domains."
        )
    shuffled = random.Random(f"{s.seed}/{domain}").sample(problems, len(problems))
    held, tested = s.holdout, s.holdout + s.test
    return {"holdout": shuffled[:held], "test": shuffled[held:tested], "pool": shuffled[tested:]}


def draw_batch(pool: list[Problem], s: Settings, domain: str, round_: int) -> list[Problem]:
    """k problems, with replacement as in the paper. They depend on seed, domain and round: every method sees the same."""
    return random.Random(f"{s.seed}/{domain}/{round_}").choices(pool, k=s.k)


def solve_all(task, solver, jobs: list[tuple[str, list[Problem]]], samples: int = 1, **sampling) -> list[list[Answer]]:
    """Answer and grade many jobs (instructions, problems) in one batch of the solver.

    Returns one list per job: `samples` answers for each problem, those of one problem together.
    """
    asked = [(instructions, problem) for instructions, problems in jobs for problem in problems]
    drawn = solver.sample([task.solve_chat(i, problem) for i, problem in asked], n=samples, **sampling)
    pairs = [(problem, sample) for (_, problem), row in zip(asked, drawn) for sample in row]
    texts = [(problem, sample.text) for problem, sample in pairs]
    many = getattr(task, "grade_many", None)  # a task may grade side by side on all cores
    grades = many(texts) if many else [task.grade(problem, text) for problem, text in texts]
    answers = iter(
        Answer(p.id, p.question, s.text, g.answer, p.gold, g.correct, g.feedback, s.truncated)
        for (p, s), g in zip(pairs, grades)
    )
    return [[next(answers) for _ in range(len(problems) * samples)] for _, problems in jobs]


def solve(task, solver, instructions: str, problems: list[Problem], samples: int = 1, **sampling) -> list[Answer]:
    """Graded answers of the solver to the problems of one domain under some instructions (y ~ π_θ(x, c) and R(x, y))."""
    return solve_all(task, solver, [(instructions, problems)], samples, **sampling)[0]


def problem_scores(answers: list[Answer], samples: int) -> list[float]:
    """Share of right answers per problem; their mean is R̄ (eq. 4)."""
    right = [float(a.correct) for a in answers]
    return [fmean(right[i : i + samples]) for i in range(0, len(right), samples)]


def score_all(task, solver, jobs: list[tuple[str, list[Problem]]], s: Settings) -> list[list[float]]:
    """R̄ of many instructions at once, as one list of per-problem scores per job."""
    return [problem_scores(a, s.samples) for a in solve_all(task, solver, jobs, s.samples, **solver_sampling(s))]


def edit_chat(task, editor, instructions: str, summary: list[Answer], limit: int = 0) -> tuple[list[dict], int]:
    """The editor's chat and the number of problems dropped from the end of the summary to fit `limit` tokens."""
    kept = list(summary)
    while limit and hasattr(editor, "encode") and len(kept) > 1:
        if len(editor.encode(task.edit_chat(instructions, kept))) <= limit:
            break
        kept.pop()
    return task.edit_chat(instructions, kept), len(summary) - len(kept)


def read_edit(task, sample: Sample) -> tuple[str | None, str]:
    """(new instructions, "") or (None, why the edit is invalid). A task may bring its own reader, `task.read_edit`."""
    reader = getattr(task, "read_edit", None)
    text = reader(sample.text) if reader else extract_tag(sample.text, "prompt")
    if text is None:
        return None, "cut off before </prompt>" if sample.truncated else "no <prompt> tags with instructions inside"
    if not reader and len(text) < 10:  # the official code's rule
        return None, f"instructions of {len(text)} characters, fewer than 10"
    return text, ""


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1
# ---------------------------------------------------------------------------------------------------------------------


def plant(task, domains: list[str], solver, s: Settings) -> dict[str, EvolutionTree]:
    """One tree per domain: the seed instructions, scored on the holdout."""
    jobs = [(task.seed_instructions, split_problems(task.problems(d), s)["holdout"]) for d in domains]
    scores = score_all(task, solver, jobs, s)
    return {d: EvolutionTree(task.seed_instructions, fmean(x), x, c=s.c) for d, x in zip(domains, scores)}


def evolve_all(task, trees: dict[str, EvolutionTree], solver, editor, s: Settings, search: str = "ucb",
               on_round=None, progress: str = "") -> dict[str, EvolutionTree]:
    """Grow the tree of every domain to `s.rounds` rounds, all in step, so that each model call is one large batch."""
    splits = {d: split_problems(task.problems(d), s) for d in trees}
    first = min(len(tree.nodes) - 1 for tree in trees.values())
    for round_ in tqdm(range(first, s.rounds), desc=progress, unit="round", disable=not progress, leave=False):
        torch.manual_seed(hash((s.seed, round_)))
        # 1. Select a node n* of each tree, 2. let the solver answer k fresh problems under its instructions.
        parents = {d: tree.select(search, seed=s.seed) for d, tree in trees.items()}
        jobs = [(parents[d].instructions, draw_batch(splits[d]["pool"], s, d, round_)) for d in trees]
        summaries = dict(zip(trees, solve_all(task, solver, jobs, **solver_sampling(s))))
        # 3. The editor reads (c, S) and writes new instructions.
        chats = [edit_chat(task, editor, parents[d].instructions, summaries[d], s.max_prompt_tokens)[0] for d in trees]
        samples = [row[0] for row in editor.sample(chats, **editor_sampling(s))]
        edits = {d: read_edit(task, sample) for d, sample in zip(trees, samples)}
        # 4. Score them on the holdout, 5. attach them. An invalid edit costs its round and is recorded with the reason.
        valid = [d for d in trees if edits[d][0] is not None]
        scores = dict(zip(valid, score_all(task, solver, [(edits[d][0], splits[d]["holdout"]) for d in valid], s)))
        for d, sample in zip(trees, samples):
            text, note = edits[d]
            mean = fmean(scores[d]) if d in scores else None
            summary = [asdict(answer) for answer in summaries[d]]
            trees[d].add(parents[d], text or sample.text, mean, scores.get(d), summary, note)
        if on_round:
            on_round(round_, trees)
    return trees


def evolve(task, domain: str, solver, editor, settings: Settings | None = None, search: str = "ucb", **changes) -> EvolutionTree:
    """Evolve the instructions of one domain; `changes` are fields of Settings, such as rounds=5."""
    s = with_presets(replace(settings or Settings(task=task.name), **changes))
    return evolve_all(task, plant(task, [domain], solver, s), solver, editor, s, search)[domain]


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------

# Wide and narrow, light and dark; colours that the colour-blind can tell apart, each with a number or a sign beside it.
CSS = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--dim:#5b6570;--rule:#ccd3da;--box:#f4f6f8;--up:#005f9e;
--down:#a84300;--ins:#cfe6fa;--del:#fbdcc4;--c0:#0072b2;--c1:#d55e00;--c2:#008060;--c3:#a8428f}
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--fg:#e4e8ec;--dim:#9aa5b0;--rule:#39424a;--box:#1d2226;
--up:#6cb8ef;--down:#f2a35e;--ins:#174a70;--del:#6b3a12;--c0:#56b4e9;--c1:#f08c3a;--c2:#2fc39a;--c3:#e39acb}}
body{margin:auto;max-width:76rem;padding:1rem;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,sans-serif;
overflow-wrap:anywhere}a{color:var(--up)}h2{margin:2rem 0 1rem;padding-top:1rem;border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:1rem 0 .3rem}.cols{display:grid;gap:1rem 2.5rem;grid-template-columns:24rem minmax(0,1fr)}
figure{margin:0;align-self:start;position:sticky;top:1rem}
@media(max-width:50rem){.cols{grid-template-columns:minmax(0,1fr)}figure{position:static}}
svg{max-width:100%;height:auto}text{fill:var(--fg);font:13px system-ui,sans-serif}
path,line{fill:none;stroke:var(--rule)}circle{stroke:var(--fg)}.edge{stroke:var(--dim);stroke-width:1.5}
.way{stroke:var(--fg);stroke-width:4}.dim,figcaption{color:var(--dim);fill:var(--dim)}
.up{color:var(--up);fill:var(--up)}.down{color:var(--down);fill:var(--down)}
pre{background:var(--box);padding:.6rem;border-radius:.4rem;margin:.2rem 0;font:14px/1.5 ui-monospace,monospace;
white-space:pre-wrap}ins{background:var(--ins)}del{background:var(--del)}:target{scroll-margin-top:4rem}
details{border-bottom:1px solid var(--rule);padding:.3rem 0}summary{cursor:pointer}
details details{border:0;margin-left:1rem}td,th{padding:.2rem .8rem .2rem 0;text-align:left}td+td{white-space:nowrap}
i{display:inline-block;width:.9em;height:.9em;border:1px solid var(--fg);border-radius:50%;vertical-align:-.1em}"""


def clean(text: str) -> str:
    """Without what neither XML nor a terminal may be shown: control characters, lone surrogates, non-characters."""
    return re.sub("[^\t\n -~\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text.replace("\r\n", "\n"))


def esc(value: object) -> str:
    """A value as text that stays text inside HTML and XML, in elements and in quoted attributes.

    >>> esc('<b> & "\\0"')
    '&lt;b&gt; &amp; &quot;\ufffd&quot;'
    """
    return html.escape(clean(str(value)))


def layout(tree: Any) -> tuple[list[int], dict[int, int], set[int]]:
    """The tree drawn as `git log --graph` would, one row a node, oldest first: (column of each node, each node's last
    child, ids on the way to the best node).

    The last child stays in its parent's column. Earlier children leave to the right, into the first column that is free
    until their branch ends: whatever leaves a column comes from the nearest node above in it.
    """
    heir = {node.parent: node.id for node in tree.nodes[1:]}  # later children overwrite earlier ones
    columns: list[int] = []
    taken: list[tuple[int, int, int]] = []  # (column, first row, last row)
    for node in tree.nodes:
        if node.id and heir[node.parent] == node.id:
            columns.append(columns[node.parent])
            continue
        last, column = node.id, columns[node.parent] if node.id else 0
        while last in heir:
            last = heir[last]
        while any(column == other and node.id <= end and begin <= last for other, begin, end in taken):
            column += 1
        taken.append((column, node.id, last))
        columns.append(column)
    node, way = tree.best(), {0}
    while node.id:
        way.add(node.id)
        node = tree.nodes[node.parent]
    return columns, heir, way


def tree_text(tree: Any) -> str:
    """The tree as text, a row for each node, oldest first: branches, id, score, visits; * the way to the best node."""
    (columns, heir, way), rows = layout(tree), []
    for node in tree.nodes:
        cells = [" "] * (2 * max(columns) + 1)
        for above in range(node.id):
            if heir.get(above, 0) > node.id:
                cells[2 * columns[above]] = "│"
        if node.id and columns[node.id] > columns[node.parent]:
            begin, end = 2 * columns[node.parent], 2 * columns[node.id]
            cells[begin:end] = ["├"] + ["┼" if cell == "│" else "─" for cell in cells[begin + 1 : end]]
        cells[2 * columns[node.id]] = "*" if node.id in way else "x" if node.score is None else "o"
        score = " ".join(clean(f"invalid: {node.note}").split())[:60] if node.score is None else f"{node.score:.3f}"
        rows.append(f"{''.join(cells)} {node.id:>3}  {score}  visits {node.visits}")
    return "\n".join(rows)


def colour(score: float, low: float, high: float) -> str:
    """From dark blue at `low` to yellow at `high`, lighter all the way."""
    t = (score - low) / ((high - low) or 1)
    return "#" + "".join(f"{round(a + (b - a) * t):02x}" for a, b in ((0, 255), (32, 234), (90, 70)))


def fate(tree: Any, node: Any) -> tuple[str, str]:
    """How an edit turned out: its score, and its distance from the parent's score, coloured (a tspan, for SVG)."""
    if node.score is None:
        return "invalid", ""
    before = tree.nodes[node.parent or 0].score
    by = node.score - before if before is not None else 0.0
    change = f'<tspan class="{"up" if by > 0 else "down"}">{by:+.3f}</tspan>' if by else ""
    return f"{node.score:.3f}", change + (" ★ best" if node is tree.best() else "")


def diff(old: list[str], new: list[str], deeper: bool = True) -> str:
    """What changed between two lists of lines, as <del> and <ins>; in lines that were only altered, word by word."""
    out = ""
    for op, i, j, k, m in SequenceMatcher(None, old, new).get_opcodes():
        was, now = "".join(old[i:j]), "".join(new[k:m])
        words = [re.findall(r"\s+|\w+|.", text) for text in (was, now)]
        if op == "equal":
            out += esc(was)
        elif deeper and len(was + now) < 20_000 and SequenceMatcher(None, *words).ratio() > 0.5:  # quadratic in length
            out += diff(*words, deeper=False)
        else:
            out += (f"<del>{esc(was)}</del>" if was else "") + (f"<ins>{esc(now)}</ins>" if now else "")
    return out


def tree_svg(tree: Any, name: str, low: float, high: float) -> str:
    """`layout` as a picture: score as colour and number, the way to the best node thick, invalid edits crossed."""
    (columns, _, way), edges, dots = layout(tree), ["", ""], ""  # edges: the others, and the way to the best
    x, y = [12 + 20 * column for column in columns], [14 + 26 * node.id for node in tree.nodes]
    text = max(x) + 18
    for node, at, row in zip(tree.nodes, x, y):
        if node.id:
            bend = f"V{row}" if at == x[node.parent] else f"V{row - 10}q0 10 10 10H{at}"
            kind = "way" if node.id in way else "edge"
            edges[kind == "way"] += f'<path class="{kind}" d="M{x[node.parent]} {y[node.parent]}{bend}"/>'
        mark = (f'<path class="edge" d="M{at - 5} {row - 5}l10 10m0 -10l-10 10"/>' if node.score is None else
                f'<circle cx="{at}" cy="{row}" r="8" fill="{colour(node.score, low, high)}"/>')
        score, change = fate(tree, node)
        dots += (f'<a href="#{name}-{node.id}">{mark}<text x="{text}" y="{row + 5}"><tspan class="dim">#{node.id}'
                 f'</tspan><tspan x="{text + 34}">{score}</tspan><tspan x="{text + 82}">{change}</tspan></text></a>')
    return (f'<svg viewBox="0 0 {text + 190} {y[-1] + 14}" width="{text + 190}" role="img" aria-label="tree of edits">'
            f'{"".join(edges)}{dots}</svg>')


def chart_svg(trees: list, low: float, high: float) -> str:
    """Holdout score over the rounds: a stepped line for the best so far, a dot for each round's own score."""
    rounds, out = max(4, *(len(tree.nodes) - 1 for tree in trees)), ""
    bottom, top = int(10 * low), int(10 * high) + 1  # the axis, in tenths
    x = [36 + 410 * i / rounds for i in range(rounds + 1)]

    def y(score: float) -> float:
        return round(220 - 200 * (10 * score - bottom) / (top - bottom), 1)

    for tenth in range(bottom, top + 1, 1 + (top - bottom) // 6):
        level = y(tenth / 10)
        out += f'<line x1="36" x2="446" y1="{level}" y2="{level}"/><text x="0" y="{level + 4}">{tenth / 10:.1f}</text>'
    for i in range(0, rounds + 1, 1 + rounds // 7):
        out += f'<text x="{x[i]:.1f}" y="240" text-anchor="middle">{i}</text>'
    for k, tree in enumerate(trees):
        best = list(accumulate((node.score or 0.0 for node in tree.nodes), max))
        steps = "".join(f"H{at:.1f}V{y(score)}" for at, score in zip(x, best))
        out += f'<path style="{stroke(k)}" d="M{x[0]} {y(best[0])}{steps}"/>'
        out += "".join(f'<circle cx="{at:.1f}" cy="{y(node.score)}" r="3" style="fill:var(--c{k % 4});stroke:none"/>'
                       for at, node in zip(x, tree.nodes) if node.score is not None)
    return f'<svg viewBox="0 0 460 245" width="620" role="img" aria-label="score over the rounds">{out}</svg>'


def stroke(k: int) -> str:
    """The line of run k: 4 colours and 5 dash patterns make 20 different ones."""
    dashes = ("none", "7 3", "2 3", "9 3 2 3", "14 4")[k % 5]
    return f"stroke:var(--c{k % 4});stroke-width:2.5;stroke-dasharray:{dashes}"


def node_html(tree: Any, node: Any, name: str, chip: str) -> str:
    """What is behind one node: what changed, its instructions in full, its graded problems."""
    parent, (score, change) = tree.nodes[node.parent] if node.id else None, fate(tree, node)
    origin = "seed" if parent is None else f"from #{parent.id}"
    out = (f"<details><summary>{chip} <b>#{node.id}</b> {origin} · {score} {change.replace('tspan', 'span')} · visits "
           f'{node.visits}</summary><div id="{name}-{node.id}">')
    if node.score is None:
        out += f"<p>Invalid edit: {esc(node.note)}</p>"
    elif parent is not None:
        was, now = ((each.instructions + "\n").splitlines(keepends=True) for each in (parent, node))
        out += f"<h3>Changed from #{parent.id}</h3><pre>{diff(was, now)}</pre>"
    heading = "Instructions" if node.score is not None else "What the editor wrote"
    out += f"<h3>{heading}</h3><pre>{esc(node.instructions)}</pre>"
    if node.summary:
        right = sum(one["correct"] for one in node.summary)
        out += f"<h3>Summary the editor saw: {right} of {len(node.summary)} problems right</h3>"
    for one in node.summary:
        facts = "".join(f'<div class="dim">{key}</div><pre>{esc(one[key][:4000])}</pre>'
                        for key in ("answer", "gold", "feedback", "response") if one[key])
        mark = ("✓" if one["correct"] else "✗") + (" (cut off)" if one["truncated"] else "")
        out += f"<details><summary>{mark} {esc(one['question'])}</summary>{facts}</details>"
    return out + "</div></details>"


def write_report(path: str | Path, runs: dict[str, Any], title: str = "Learning to self-evolve") -> None:
    """One self-contained page (HTML and XML at once) on `runs`, label -> EvolutionTree: no scripts, nothing loaded."""
    scores = [node.score for tree in runs.values() for node in tree.nodes if node.score is not None]
    low, high = min(scores), max(scores)

    def chip(score: float | None) -> str:
        return "✗" if score is None else f'<i style="background:{colour(score, low, high)}"></i>'

    legend = " ".join(f"{chip(low + (high - low) * i / 4)} {low + (high - low) * i / 4:.2f}" for i in range(5))
    rows, body = "<tr><th>run</th><th>seed</th><th>best</th><th>gain</th><th>invalid</th></tr>", ""
    for k, (label, tree) in enumerate(runs.items()):
        seed, best, name, rounds = tree.nodes[0], tree.best(), f"t{k}", len(tree.nodes) - 1
        line = f'<svg width="28" height="10"><path style="{stroke(k)}" d="M0 5H28"/></svg>'
        cells = (f'{line} <a href="#{name}">{esc(label)}</a>', f"{seed.score:.3f}", f"{best.score:.3f}",
                 f"{best.score - seed.score:+.3f}", f"{sum(node.score is None for node in tree.nodes)} of {rounds}")
        rows += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        nodes = "".join(node_html(tree, node, name, chip(node.score)) for node in tree.nodes)
        body += f"""<h2 id="{name}">{esc(label)}: {seed.score:.3f} → {best.score:.3f}</h2><div class="cols"><figure>
{tree_svg(tree, name, low, high)}<figcaption>{legend}<br/>One row a round, oldest on top. Thick: the way to the best
node. ✗: invalid edit.</figcaption></figure><div><h3>Best instructions (#{best.id})</h3>
<pre>{esc(best.instructions)}</pre><h3>All nodes</h3>{nodes}</div></div>"""
    Path(path).write_text(f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'"/>
<title>{esc(title)}</title><style>{CSS}</style></head><body><h1>{esc(title)}</h1><div class="cols"><div>
<table>{rows}</table><p class="dim">Holdout scores. They guided the search, so the best one is optimistic: trust the
test split.</p></div><div>{chart_svg(list(runs.values()), low, high)}<br/><span class="dim">Line: best so far. Dot: the
round's own edit.</span></div></div>{body}</body></html>
""", encoding="utf-8")
