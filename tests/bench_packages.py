"""GEPA's and TextGrad's own packages beside our loop, at equal numbers of solver answers.

    python -m venv ../packages       # a scratch environment: nothing of this goes into requirements.txt
    ../packages/bin/pip install -r requirements.txt gepa==0.1.4 textgrad==0.1.8
    export OMP_NUM_THREADS=1
    ../packages/bin/python tests/bench_packages.py mini --domains 8 --seeds 2
    ../packages/bin/python tests/bench_packages.py words --domains 3 --seeds 1
    ../packages/bin/python tests/bench_packages.py house --seeds 20

"mini" is the miniature with its real, tiny models, "words" the same with the packages' own prompts.
"house" is a jsonl task about the units of a house style, with a scripted solver and editor behind
tests/server.py. Each writes its lines into results/packages.csv. No network is used.

What is a package's own: with GEPA everything (choice of candidate, minibatches, gate, budget) but
the reflection prompt, which is its own in "words" and "house" only; with TextGrad the graph, the
backward pass, the gradients and the optimizer, and in "words" and "house" all of its prompts. The
package holds no loop, so that is the one of its repository's evaluation/prompt_optimization.py: an
edit that lowers the validation score is reverted. Where the package would give up for missing tags,
the loop goes on. Its batches are ours.

The miniature's editor knows one form of prompt and no English. So in "mini" it is asked for an edit
in that form: GEPA's through the hook `propose_new_texts` (see bench_gepa.py), TextGrad's through
the engine. There a gradient is no critique by a model but the graded answer itself, which the
package carries back to the instructions.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests" / "results"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench_gepa import Adapter
from scripted import draw
from server import serve

import evolve
from data import Answer, load_task
from lse import RemoteModel

# (task, domains, solver, editor, s, budget) -> per domain the instructions it chose, and their
# holdout score. All loops end with the iteration that uses a domain's budget of answers up.
Choice = tuple[str, float]
Loop = Callable[..., dict[str, Choice]]


# -------------------------------------------------------------------------------------------------
# Ours
# -------------------------------------------------------------------------------------------------


def ours(method: str, c: float | None = None) -> Loop:
    """Our loop with one of evolve.METHODS, all domains in step.

    `c` is C of the UCB rule, None the task's.
    """

    def loop(task, domains, solver, editor, s, budget) -> dict[str, Choice]:
        s = s if c is None else replace(s, c=c)
        trees = evolve.seed_trees(task, domains, solver, s)
        spent = dict.fromkeys(domains, s.holdout)
        while going := {d: tree for d, tree in trees.items() if spent[d] < budget}:
            one_more = replace(s, rounds=evolve.rounds_done(going) + 1)
            evolve.evolve_all(task, going, solver, editor, one_more, "ucb", method, stop=False)
            for d, tree in going.items():
                node = tree.nodes[-1]
                scored = node.scores is not None
                gated = method == "gepa" and (scored or "minibatch" in node.note)
                spent[d] += s.k * (1 + gated) + s.holdout * scored
        return {d: (tree.best().instructions, tree.best().score) for d, tree in trees.items()}

    return loop


def one_by_one(loop: Callable[..., Choice]) -> Loop:
    """A package takes a domain at a time."""

    def over_domains(task, domains, *more) -> dict[str, Choice]:
        return {domain: loop(task, domain, *more) for domain in domains}

    return over_domains


# -------------------------------------------------------------------------------------------------
# GEPA
# -------------------------------------------------------------------------------------------------


class OwnWords(Adapter):
    """GEPA writes the reflection prompt itself, from records like those of its DefaultAdapter."""

    propose_new_texts = None

    def make_reflective_dataset(self, candidate, eval_batch, components) -> dict[str, list[dict]]:
        records = []
        for a in eval_batch.trajectories:
            verdict = "Correct." if a.correct else f"Wrong. Right is: {a.gold}. {a.feedback}"
            records.append(
                {"Inputs": a.question, "Generated Outputs": a.response, "Feedback": verdict}
            )
        return {"instructions": records}


def ask(editor, s: evolve.Settings, prompt: str, system_prompt: str = "") -> str:
    """What the editor says to a package's prompt."""
    chat = [{"role": "user", "content": prompt}]
    if system_prompt:
        chat.insert(0, {"role": "system", "content": system_prompt})
    [[sample]] = editor.sample([chat], **evolve.editor_sampling(s))
    return sample.text


def gepa_package(translated: bool) -> Loop:
    def loop(task, domain, solver, editor, s, budget) -> Choice:
        import gepa

        torch.manual_seed(s.seed)
        parts = evolve.split_problems(task.problems(domain), s)
        adapter = (Adapter if translated else OwnWords)(task, solver, editor, s)
        found = gepa.optimize(
            {"instructions": task.seed_instructions},
            parts["pool"],
            parts["holdout"],
            adapter,
            reflection_lm=None if translated else partial(ask, editor, s),
            reflection_minibatch_size=s.k,
            max_metric_calls=budget,
            seed=s.seed,
            logger=adapter,
        )
        return found.best_candidate["instructions"], max(found.val_aggregate_scores)

    return one_by_one(loop)


# -------------------------------------------------------------------------------------------------
# TextGrad
# -------------------------------------------------------------------------------------------------

# As in evaluation/prompt_optimization.py and in the package's task BBH_object_counting.
ROLE = (
    "structured system prompt to a somewhat capable language model that specifies the behavior "
    "and strategies for the QA task"
)
PURPOSE = "The runtime of string-based function that checks if the prediction is correct."
GRADED = "<GRADED>{}</GRADED>"


def textgrad_package(translated: bool) -> Loop:
    def loop(task, domain, solver, editor, s, budget) -> Choice:
        os.environ.setdefault("TEXTGRAD_LOG_DIR", tempfile.gettempdir())  # made at the import
        os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network
        import textgrad as tg
        from textgrad.autograd import StringBasedFunction

        tg.logger.disabled = True
        torch.manual_seed(s.seed)
        start = solver.usage.answers
        parts = evolve.split_problems(task.problems(domain), s)
        problems = {p.question: p for p in task.problems(domain)}
        graded: dict[str, Answer] = {}  # by question: the newest answer

        def answer(question: str, system_prompt: str) -> str:
            """The engine of the solver: the instructions are its system prompt."""
            sampling = evolve.solver_sampling(s)
            found = evolve.solve(task, solver, system_prompt, [problems[question]], **sampling)
            graded[question] = found[0]
            return found[0].response

        def verdict(question: str, prediction, ground_truth_answer) -> str:
            """The string-based function: "1" for a right answer and "0" for a wrong one."""
            a = graded[question]
            return GRADED.format(json.dumps(asdict(a))) if translated else str(int(a.correct))

        def translate(prompt: str, system_prompt: str) -> str:
            """The editor's engine. A critic hands the graded answer on, the optimizer edits."""
            found = re.findall(GRADED.format("(.*?)"), prompt)
            if "IMPROVED_VARIABLE" not in system_prompt:
                return GRADED.format(found[0])
            # sorted: the package keeps gradients in a set, whose order differs from run to run
            summary = [Answer(**json.loads(each)) for each in sorted(found)]
            chat = task.edit_chat(instructions.value, summary)
            [[sample]] = editor.sample([chat], **evolve.editor_sampling(s))
            edit = evolve.read_edit(task, sample)
            tagged = f"<IMPROVED_VARIABLE>{edit.instructions}</IMPROVED_VARIABLE>"
            return tagged if edit.valid else sample.text

        def score() -> float:
            return fmean(
                evolve.score_all(task, solver, [(instructions.value, parts["holdout"])], s)[0]
            )

        engine = translate if translated else partial(ask, editor, s)
        instructions = tg.Variable(task.seed_instructions, role_description=ROLE)
        model = tg.BlackboxLLM(answer, instructions)
        optimizer = tg.TextualGradientDescent([instructions], engine=engine)
        best, number = score(), 0
        while solver.usage.answers - start < budget:
            optimizer.zero_grad()
            losses = []
            for p in evolve.draw_batch(parts["pool"], s, domain, number):
                question = tg.Variable(
                    p.question, requires_grad=False, role_description="query to the language model"
                )
                gold = tg.Variable(
                    p.gold, requires_grad=False, role_description="correct answer for the query"
                )
                inputs = {"prediction": model(question), "ground_truth_answer": gold}
                losses.append(StringBasedFunction(partial(verdict, p.question), PURPOSE)(inputs))
            tg.sum(losses).backward(engine)
            number += 1
            before = instructions.value
            try:
                optimizer.step()
            except IndexError:  # the tags are missing: the package gives up, we go on
                continue
            if (new := score()) < best:
                instructions.set_value(before)
            else:
                best = new
        return instructions.value, best

    return one_by_one(loop)


# -------------------------------------------------------------------------------------------------
# A jsonl task, and a server that plays solver and editor
# -------------------------------------------------------------------------------------------------
# House style: every kind of quantity has its unit. The solver knows the numbers; with the rule for
# a unit in its instructions it is right nine times in ten, without it once in ten. What it says
# depends on the request alone, as at temperature 0.

UNITS = dict(
    length="m",
    weight="kg",
    price="EUR",
    speed="km/h",
    area="ha",
    volume="l",
    power="kW",
    age="years",
)
RULES = {kind: f"State every {kind} in {unit}." for kind, unit in UNITS.items()}


def house_problems() -> list[dict]:
    """20 problems of each of 8 kinds."""
    problems = []
    for i in range(20):
        for kind, unit in UNITS.items():
            question = f"What is the {kind} of item {i}?"
            problems.append(
                {"question": question, "answer": f"{7 * i + 1} {unit}", "domain": "house"}
            )
    return problems


def house_reply(messages: list[dict], body: dict) -> str:
    text = "\n".join(message["content"] for message in messages)
    held = [kind for kind, rule in RULES.items() if rule in text]
    return house_answer(text, held) if body["model"] == "solver" else house_edit(text, held)


def house_answer(text: str, held: list[str]) -> str:
    kind, item = re.findall(r"What is the (\w+) of item (\d+)\?", text)[-1]
    right = draw(f"{kind} {item} {held}") < (0.9 if kind in held else 0.1)
    said = UNITS[kind] if right else f"({kind} without unit)"
    return f"<answer>{7 * int(item) + 1} {said}</answer>"


def house_edit(text: str, held: list[str]) -> str:
    """An edit in the form that is asked for, or a critique where none is.

    Five in ten edits add the rule of a kind that went wrong before its eyes, two add one and lose
    one, three lose one. The words of the request decide, whatever their order.
    """
    luck = random.Random(" ".join(sorted(text.split())))
    wrong = sorted(set(re.findall(r"\((\w+) without unit\)", text)))
    if missing := [kind for kind in wrong if kind not in held]:
        added = luck.choice(missing)
    move = luck.random()
    rules = list(held)
    if move >= 0.5 and rules:
        rules.remove(luck.choice(rules))
    if move < 0.7 and missing:
        rules.append(added)
    new = "\n".join(["Answer what is asked.", *(RULES[kind] for kind in rules)])
    if "IMPROVED_VARIABLE" in text:  # TextGrad's form, its package's and ours
        return f"<IMPROVED_VARIABLE>{new}</IMPROVED_VARIABLE>"
    if "within ``` blocks" in text:  # GEPA's
        return f"I read the feedback.\n```\n{new}\n```"
    if "<prompt>" in text:
        return f"<prompt>\n{new}\n</prompt>"
    return "Wrong: " + ", ".join(f"({kind} without unit)" for kind in wrong)


# -------------------------------------------------------------------------------------------------
# The tables
# -------------------------------------------------------------------------------------------------


@dataclass
class Line:
    """Of the table and of the CSV file: means over domains and seeds.

    Errors are over domains, each averaged over seeds; of a single domain over seeds.
    """

    part: str
    editor: str
    loop: str
    domains: int
    seeds: int
    holdout: float
    test: float
    error: float
    gain: float  # over our UCB loop, paired
    gain_error: float
    answers: float  # of the solver per domain and seed, the test left out
    calls: float  # of the editor


def measure(task, domains: list[str], solver, editor, s, loop: Loop, seeds: int) -> list[dict]:
    """One line per seed and domain."""
    budget = s.holdout + s.rounds * (s.k + s.holdout)
    rows = []
    for seed in range(seeds):
        own = replace(s, seed=seed)
        answers, calls = solver.usage.answers, editor.usage.answers
        chosen = loop(task, domains, solver, editor, own, budget)
        cost = {
            "answers": (solver.usage.answers - answers) / len(domains),
            "calls": (editor.usage.answers - calls) / len(domains),
        }
        for domain, (text, holdout) in chosen.items():
            problems = evolve.split_problems(task.problems(domain), own)["test"]
            test = fmean(evolve.score_all(task, solver, [(text, problems)], own)[0])
            rows.append({"domain": domain, "holdout": holdout, "test": test, **cost})
    return rows


def accuracies(rows: list[dict]) -> list[float]:
    """Test accuracy of each domain, a mean over seeds; of a single domain, of each seed."""
    domains = dict.fromkeys(row["domain"] for row in rows)
    if len(domains) == 1:
        return [row["test"] for row in rows]
    return [fmean(row["test"] for row in rows if row["domain"] == domain) for domain in domains]


def compare(a, task, domains, solver, editors: dict, s, loops: dict[str, Loop]) -> list[Line]:
    """All loops with each editor; the first loop is what the others are compared with."""
    heads = ["editor", "loop", "holdout", "test", "minus our UCB", "answers", "editor calls"]
    print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|")
    lines = []
    for name, editor in editors.items():
        first: list[float] = []
        for label, loop in loops.items():
            rows = measure(task, domains, solver, editor, s, loop, a.seeds)
            own = accuracies(rows)
            first = first or own
            numbers = [
                fmean(row["holdout"] for row in rows),
                *evolve.mean_error(own),
                *evolve.mean_error([x - y for x, y in zip(own, first)]),
                fmean(row["answers"] for row in rows),
                fmean(row["calls"] for row in rows),
            ]
            rounded = [round(number, 4) for number in numbers]
            one = Line(a.part, name, label, len(domains), a.seeds, *rounded)
            lines.append(one)
            print(
                f"| {name} | {label} | {one.holdout:.3f} | {one.test:.3f} ± {one.error:.3f} "
                f"| {one.gain:+.3f} ± {one.gain_error:.3f} | {one.answers:.1f} | {one.calls:.1f} |",
                flush=True,
            )
    return lines


def mini(a: argparse.Namespace) -> list[Line]:
    task, s = load_task("mini"), evolve.with_presets(evolve.Settings())
    solver = evolve.load_model(evolve.MINIATURE / "base")
    names = {"untrained": "base", "trained": "editor"}
    editors = {role: evolve.load_model(evolve.MINIATURE / name) for role, name in names.items()}
    packages = {
        "gepa package": gepa_package(translated=a.part == "mini"),
        "textgrad package": textgrad_package(translated=a.part == "mini"),
    }
    loops = {"ours, lse (UCB)": ours("lse")}
    if a.part == "mini":
        loops["ours, gepa"] = ours("gepa")
        loops["ours, textgrad's rules"] = ours("textgrad's rules")
    domains = task.domains("test")[: a.domains]
    return compare(a, task, domains, solver, editors, s, loops | packages)


def house(a: argparse.Namespace) -> list[Line]:
    settings = evolve.Settings(task="jsonl", rounds=10, k=4, holdout=24, test=48, samples=1)
    s = evolve.with_presets(settings, remote=True)
    loops = {
        f"ours, lse (UCB, C = {s.c:g})": ours("lse"),
        "ours, lse (UCB, C = 0.3)": ours("lse", c=0.3),
        "ours, gepa": ours("gepa"),
        "ours, textgrad": ours("textgrad"),
        "gepa package": gepa_package(translated=False),
        "textgrad package": textgrad_package(translated=False),
    }
    with tempfile.TemporaryDirectory() as folder, serve(house_reply) as server:
        path = Path(folder) / "house.jsonl"
        path.write_text("\n".join(json.dumps(problem) for problem in house_problems()))
        task = load_task("jsonl", path)
        solver, editor = RemoteModel(server.url, "solver"), RemoteModel(server.url, "editor")
        return compare(a, task, ["house"], solver, {"scripted": editor}, s, loops)


def save(lines: list[Line]) -> None:
    """Into packages.csv, in the place of what it held of the same part."""
    path = RESULTS / "packages.csv"
    kept = []
    if path.exists():
        with open(path, newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["part"] != lines[0].part]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(lines[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *(asdict(line) for line in lines)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["mini", "words", "house"])
    parser.add_argument("--domains", type=int, default=8, help="of the miniature")
    parser.add_argument("--seeds", type=int, default=2)
    a = parser.parse_args()
    for name in ("gepa", "textgrad"):
        if not find_spec(name):
            raise SystemExit(f"Skipped: there is no {name} here. See the top of this file.")
    print(f"gepa {version('gepa')}, textgrad {version('textgrad')}, torch {version('torch')}")
    torch.set_num_threads(1)
    # TextGrad's rules in the task's own words, for the miniature, whose editor knows no others.
    own_words = evolve.Method(evolve.propose_lse, evolve.accept_textgrad, "chain")
    evolve.METHODS["textgrad's rules"] = own_words
    save(house(a) if a.part == "house" else mini(a))


if __name__ == "__main__":
    main()
