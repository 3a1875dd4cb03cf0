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

# The browser brings dark on light or light on dark, as the reader prefers; every colour here is readable on both, and
# has a number, a sign or a link beside it for the colour-blind. One column, so that it fits a phone.
# .way: the edges to the best node; .run: a line of the chart, in the colour .c0 to .c4 (the sixth run begins again).
CSS = """:root{color-scheme:light dark}body{margin:auto;max-width:56rem;padding:1rem;font:16px/1.5 system-ui,sans-serif;
overflow-wrap:anywhere}h2{margin-top:3rem}figure{margin:0;overflow-x:auto}text{fill:currentColor;font-size:13px}
path{fill:none;stroke:#888}circle{stroke:currentColor}.way{stroke:currentColor;stroke-width:4}
.run path{stroke:currentColor;stroke-width:2.5}.run circle{fill:currentColor}.c0{color:#0072b2}.c1{color:#d55e00}
.c2{color:#009e73}.c3{color:#cc79a7}.c4{color:#888}ins{background:#0072b255}del{background:#d55e0055}
pre{background:#8882;padding:.6rem;margin:.2rem 0;white-space:pre-wrap}summary{cursor:pointer}
details{border-bottom:1px solid #8888;padding:.3rem 0}details details{margin-left:1rem}"""


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


def lineages(tree: Any) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """The ids from the seed down to each node, the tree depth first with children by age; and those to the best node.

    A lineage ends in its node, and its length is the node's depth, the seed's being 1.
    """
    found: list[tuple[int, ...]] = []
    for node in tree.nodes:
        found.append((*found[node.parent], node.id) if node.id else (0,))
    return sorted(found), found[tree.best().id]


def fate(tree: Any, node: Any) -> str:
    """How an edit turned out, as in "0.750 (+0.125) ★ best": its score, and the change from its parent's (eq. 7)."""
    if node.score is None:
        return "✗ invalid"
    change = f" ({node.score - tree.nodes[node.parent].score:+.3f})" if node.id else ""
    return f"{node.score:.3f}{change}{' ★ best' if node is tree.best() else ''}"


def tree_text(tree: Any) -> str:
    """The tree as text for a terminal, one row a node, indented under its parent: id, fate, visits.

    Signs: `*` on the way to the best node, `x` an invalid edit, whose reason is named, `o` any other.

    >>> tree = EvolutionTree("seed", 0.5)
    >>> nodes = tree.add(0, "worse", 0.25), tree.add(0, "better", 0.75), tree.add(2, "", None, note="no tags")
    >>> print(tree_text(tree))
    *       0  0.500  visits 0
      o     1  0.250 (-0.250)  visits 0
      *     2  0.750 (+0.250) ★ best  visits 0
        x   3  ✗ invalid  visits 0  no tags
    """
    (paths, way), rows = lineages(tree), []
    for path in paths:
        node = tree.nodes[path[-1]]
        mark = "x" if node.score is None else "*" if node.id in way else "o"
        branch = ("  " * (len(path) - 1) + mark).ljust(2 * max(map(len, paths)))
        note = " ".join(clean(node.note).split())[:60]  # may quote what a model wrote: one short line of it
        rows.append(f"{branch}{node.id:>3}  {fate(tree, node)}  visits {node.visits}  {note}".rstrip())
    return "\n".join(rows)


def share(score: float, span: tuple[float, float]) -> float:
    """Where a score lies between the lowest (0) and the highest (1) of the page, which are `span`."""
    return (score - span[0]) / (span[1] - span[0] or 1)  # or 1: all scores are the same


def colour(score: float, span: tuple[float, float]) -> str:
    """From dark blue for the lowest score to yellow for the highest, lighter all the way: it works in grey as well."""
    return f"color-mix(in srgb, #ffea46 {share(score, span):.0%}, #00205a)"


def tree_svg(tree: Any, name: str, span: tuple[float, float]) -> str:
    """`tree_text` as a picture: score as colour and number, the way to the best node thick, invalid edits hollow.

    Every node is a link to its details, whose ids are "{name}-{id of the node}". Units are pixels: the picture is not
    shrunk to a narrow window, where nobody could read it, but scrolled.
    """
    (paths, way), row, edges, dots = lineages(tree), {}, ["", ""], ""  # edges: all others, and those of the way
    for path in paths:
        node, x = tree.nodes[path[-1]], 14 * len(path)
        y = row[node.id] = 26 * len(row) + 14
        if node.id:  # down from the parent, then right
            edges[node.id in way] += f"M{x - 14} {row[node.parent]}V{y}H{x}"
        fill = "Canvas" if node.score is None else colour(node.score, span)
        dots += (f'<a href="#{name}-{node.id}"><circle cx="{x}" cy="{y}" r="8" fill="{fill}"/>'
                 f'<text x="{x + 14}" y="{y + 5}">#{node.id} · {fate(tree, node)}</text></a>')
    return (f'<svg width="{14 * max(map(len, paths)) + 230}" height="{26 * len(row)}" role="img" aria-label="tree">'
            f'<path d="{edges[0]}"/><path class="way" d="{edges[1]}"/>{dots}</svg>')


def chart_svg(runs: dict[str, Any], span: tuple[float, float]) -> str:
    """Holdout score over the rounds: per run a stepped line for the best so far, a dot for each round's own edit.

    x runs from 50 to 350 over the rounds, y from 190 up to 10 over the scores. A line is a link to its run.
    """
    rounds = max(1, *(len(tree.nodes) - 1 for tree in runs.values()))
    out = f'<text x="50" y="215">round 0</text><text x="350" y="215" text-anchor="end">round {rounds}</text>'

    def y(score: float) -> float:
        return round(190 - 180 * share(score, span), 1)

    for i in range(5):  # the axis is also the key to the colours of the trees
        level = span[0] + i / 4 * (span[1] - span[0])
        out += (f'<path d="M50 {y(level)}H350"/><circle cx="8" cy="{y(level)}" r="6" fill="{colour(level, span)}"/>'
                f'<text x="18" y="{y(level) + 4}">{level:.2f}</text>')
    for k, tree in enumerate(runs.values()):
        best, line, dots = tree.nodes[0].score, "", ""
        for node in tree.nodes:
            x = round(50 + 300 * node.id / rounds, 1)
            best = max(best, node.score or 0.0)
            line += f"H{x}V{y(best)}" if node.id else f"M{x} {y(best)}"
            if node.score is not None:
                dots += f'<circle cx="{x}" cy="{y(node.score)}" r="3"/>'
        out += f'<a class="run c{k % 5}" href="#t{k}"><path d="{line}"/>{dots}</a>'
    return f'<svg viewBox="0 0 360 220" style="max-width:34rem" role="img" aria-label="runs">{out}</svg>'


def diff(old: str, new: str) -> str:
    """What changed between two texts, sentence by sentence, as <del> and <ins>; leaving either out gives the other.

    >>> diff("Be brief. Be kind.", "Be brief. Be exact.")
    'Be brief.<del> Be kind.</del><ins> Be exact.</ins>'
    """
    a, b = (re.split(r"(?<=[.:;!?\n])", text) for text in (old, new))  # loses nothing: it splits between characters
    out = ""
    for kind, i, j, k, m in SequenceMatcher(None, a, b).get_opcodes():
        was, now = esc("".join(a[i:j])), esc("".join(b[k:m]))
        out += was if kind == "equal" else f"<del>{was}</del><ins>{now}</ins>"
    return out


def node_html(tree: Any, node: Any, name: str) -> str:
    """What is behind one node, folded: what changed, its text in full, the graded problems that its editor saw.

    The id is inside the fold, so that a link to it makes the browser open it.
    """
    origin = f"from #{node.parent}" if node.id else "seed"
    out = (f"<details><summary><b>#{node.id}</b> {origin} · {fate(tree, node)} · visits {node.visits}</summary>"
           f'<div id="{name}-{node.id}">')
    if node.score is None:
        out += f"<p>Invalid edit: {esc(node.note)}. What the editor wrote is below.</p>"
    elif node.id:
        out += f"<h3>Changed {origin}</h3><pre>{diff(tree.nodes[node.parent].instructions, node.instructions)}</pre>"
    right = sum(one["correct"] for one in node.summary)
    out += f"<h3>In full</h3><pre>{esc(node.instructions)}</pre>"
    out += f"<h3>Summary the editor saw: {right} of {len(node.summary)} problems right</h3>" if node.summary else ""
    for one in node.summary:
        mark = ("✓" if one["correct"] else "✗") + (" (cut off)" if one["truncated"] else "")
        said = [key for key in ("answer", "gold", "feedback", "response") if one[key]]
        facts = "".join(f"{key}<pre>{esc(one[key][:4000])}</pre>" for key in said)  # a model in a loop fills pages
        out += f"<details><summary>{mark} {esc(one['question'])}</summary>{facts}</details>"
    return out + "</div></details>"


def write_report(path: str | Path, runs: dict[str, Any], title: str = "Learning to self-evolve") -> None:
    """One self-contained page on `runs`, label -> EvolutionTree: the runs side by side, then each with all its nodes.

    It is HTML and XML at once, has no scripts, and loads nothing: should hostile text ever get past `esc`, the policy
    in its head still forbids the browser to run or fetch anything.
    """
    scores = [node.score for tree in runs.values() for node in tree.nodes if node.score is not None]
    span, legend, body = (min(scores), max(scores)), "", ""
    for k, (label, tree) in enumerate(runs.items()):
        seed, best, invalid = tree.nodes[0].score, tree.best(), sum(node.score is None for node in tree.nodes)
        headline = f"{esc(label)}: {seed:.3f} → {best.score:.3f}, {invalid} of {len(tree.nodes) - 1} edits invalid"
        legend += f'<br/><b class="c{k % 5}">━●━</b> <a href="#t{k}">{headline}</a>'
        nodes = "".join(node_html(tree, node, f"t{k}") for node in tree.nodes)
        body += f"""<h2 id="t{k}">{headline}</h2><figure>{tree_svg(tree, f"t{k}", span)}</figure>
<h3>Best instructions (#{best.id})</h3><pre>{esc(best.instructions)}</pre><h3>All nodes</h3>{nodes}"""
    Path(path).write_text(f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'"/>
<title>{esc(title)}</title><style>{CSS}</style></head><body><h1>{esc(title)}</h1>{chart_svg(runs, span)}
<p>Line: best so far. Dot: each round's own edit. The holdout guided the search: trust the test split.{legend}</p>
{body}</body></html>""", encoding="utf-8")
