"""Does an editor that sees what was rejected write better edits? No, and so evolve.py has no option for it.

    python tests/bench_rejected.py                      the miniature, results/rejected.csv: ten minutes of one core
    python tests/bench_rejected.py --shop MODEL         16 shops, results/rejected-shop.csv: eight with 135M weights
    python tests/bench_rejected.py --shop MODEL --editor EDITOR         the same with a trained editor

Where a node is edited that has children which were rejected or scored no better than it, the editor's chat ends with
the last SHOWN of them, one line each. What is shown, at equal rounds:

    none      nothing, as in the paper: what the others are compared with
    words     "tried: profit c5 rank c1 -> 0.25, no better than 0.50". The miniature's tokenizer knows 77 words: of
              such a line only the entries, all else is <unk>
    entries   for the miniature alone, in words that it knows: what such an edit added or changed, "answer profit c5
              wrong". Of six such forms tried on its dev domains the one that hurt the trained editor least over
              both samplings
    placebo   the lines of "words" about the newest instructions of another domain, which can tell the editor nothing:
              what "words" has in common with it is no use of what was rejected

Measured by test accuracy, and by the gain (eq. 7) of one edit at the nodes that the run without had edited again after
a failure: all variants are asked there, from the same trees. An edit that cannot be read gains 0, as in a tree. Both
are paired with "none", ± s.e. over domains, each domain a mean over seeds.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests" / "results"
sys.path.insert(0, str(ROOT))

import data
import evolve

SHOWN = 3  # failed edits of a node, the newest
SHOP_DOMAINS = 16
NOISY = dict(editor_temperature=1.0, top_p=1.0, top_k=0)  # as in training
ROUNDS = 25  # on the miniature
EARLIER = 10  # after which the growing trees are tested, too: as a run of 10 rounds would be


@dataclass
class Line:
    """Of the table and of the CSV file."""

    task: str
    editor: str
    sampling: str
    rounds: int
    seeds: int
    domains: int
    shows: str
    shown: int  # rounds, of all, in which there was something to show
    of: int
    early: float  # test accuracy after EARLIER rounds
    early_error: float
    early_gain: float  # over "none"
    early_gain_error: float
    test: float  # and after all
    test_error: float
    test_gain: float
    test_gain_error: float
    edits: int  # asked for at the nodes of "none"
    edit: float  # gain of one edit
    edit_error: float
    edit_gain: float  # over "none"
    edit_gain_error: float
    better: float  # share of these edits with a gain above 0
    valid: float
    repeats: float  # share that is word for word one of the failed edits


class Remembering:
    """A greedy solver that is asked everything once: its answers are always the same."""

    def __init__(self, model) -> None:
        self.model, self.known = model, {}

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def sample(self, chats, n=1, **sampling):
        """As LocalModel.sample."""
        assert sampling["temperature"] == 0, "only a greedy solver repeats itself"
        new = {str(chat): chat for chat in chats if str(chat) not in self.known}
        for key, row in zip(new, self.model.sample(list(new.values()), **sampling) if new else []):
            self.known[key] = row
        return [self.known[str(chat)] * n for chat in chats]


# -- what is shown ----------------------------------------------------------------------------------------------------


def failed(r: evolve.Round) -> list:
    """The last children of the round's node that have no score, or none above the node's."""
    children = [node for node in r.tree.nodes if node.parent == r.parent.id]
    return [node for node in children if node.score is None or node.score <= r.parent.score][
        -SHOWN:
    ]


def words(r: evolve.Round, other: evolve.Round) -> str:
    """One line for each failed edit."""
    return tried(r, [node.instructions for node in failed(r)])


def placebo(r: evolve.Round, other: evolve.Round) -> str:
    """The same lines about instructions of another domain."""
    count = len(failed(r))
    return tried(r, [node.instructions for node in other.tree.nodes[-count:]])


def tried(r: evolve.Round, texts: list[str]) -> str:
    """The lines: these texts, and the fates of the failed edits."""
    lines = ["\n"]
    for node, text in zip(failed(r), texts):
        fate = f"rejected: {data.shorten(node.note, 100)}"
        if node.score is not None:
            fate = f"{node.score:.2f}, no better than {r.parent.score:.2f}"
        lines.append(f"tried: {data.shorten(' '.join(text.split()), 200)} -> {fate}")
    return "\n".join(lines)


def entries(r: evolve.Round, other: evolve.Round) -> str:
    """What each failed edit added or changed, in words that the miniature knows."""
    old = data.read_glossary(r.parent.instructions)
    text = ""
    for node in failed(r):
        new = data.read_glossary(node.instructions)
        changed = {word: column for word, column in new.items() if old.get(word) != column}
        text += f" answer {' '.join(data.glossary_text(changed).split()) or 'none'} wrong"
    return text


def chats(task, editor, rounds: list[evolve.Round], s, show: Callable | None) -> list:
    """The editor's chats, with what is shown at the end of the last message."""
    out = []
    for i, r in enumerate(rounds):
        chat, _ = evolve.edit_chat(
            task, editor, r.parent.instructions, r.summary, **evolve.limits(s)
        )
        if show and failed(r):
            last = chat[-1]
            chat = [*chat[:-1], {**last, "content": last["content"] + show(r, rounds[i - 1])}]
        out.append(chat)
    return out


# -- what it is worth -------------------------------------------------------------------------------------------------


@dataclass
class State:
    """A node that is edited again after a failure, in the run that shows nothing."""

    round: evolve.Round
    failed: list[str]  # by then
    chats: dict[str, list]  # by what is shown


def grow(task, solver, editor, s, domains, show, shows, states) -> tuple[dict, dict, int, int]:
    """(test accuracy by domain after EARLIER rounds, after all, rounds with something to show, rounds).

    `states` collects the rounds with something to show.
    """
    counts = [0, 0]
    tests: dict[int, dict] = {}

    def test(trees) -> None:  # what it draws moves no run: every round seeds its own draws
        if (rounds := evolve.rounds_done(trees)) in (EARLIER, s.rounds):
            pairs = evolve.final_test(task, trees, solver, s)
            tests[rounds] = {domain: fmean(best) for domain, (_, best) in pairs.items()}

    def propose(task, editor, rounds, s) -> None:
        asked = chats(task, editor, rounds, s, show)
        variants = {name: chats(task, editor, rounds, s, each) for name, each in shows.items()}
        for i, r in enumerate(rounds):
            counts[0] += bool(failed(r))
            counts[1] += 1
            if failed(r):
                texts = [node.instructions for node in failed(r)]
                states.append(State(r, texts, {name: variants[name][i] for name in shows}))
        evolve.ask_for_edits(task, editor, rounds, asked, s, "prompt")

    evolve.METHODS["shown"] = evolve.Method(propose, evolve.accept_lse)
    trees = evolve.seed_trees(task, domains, solver, s)
    evolve.evolve_all(task, trees, solver, editor, s, s.search, "shown", on_round=test, stop=False)
    return tests.get(EARLIER, {}), tests[s.rounds], *counts


def one_edit(task, solver, editor, s, states: list[State], name: str) -> list[dict]:
    """For each state the gain of one edit, and whether it is better, valid, a repetition."""
    evolve.seed_draws(s.seed, 0, 3)
    drawn = editor.sample([state.chats[name] for state in states], **evolve.editor_sampling(s))
    edits = [evolve.read_edit(task, samples[0]) for samples in drawn]
    valid = [(state, edit) for state, edit in zip(states, edits) if edit.valid]
    jobs = [(edit.instructions, state.round.holdout) for state, edit in valid]
    scores = iter(evolve.score_all(task, solver, jobs, s))
    out = []
    for state, edit in zip(states, edits):
        gain = fmean(next(scores)) - state.round.parent.score if edit.valid else 0.0
        repeated = edit.instructions in state.failed
        out.append(dict(gain=gain, better=gain > 0, valid=edit.valid, repeats=repeated))
    return out


def against(values: dict[str, list[float]], base: dict[str, list[float]]) -> list[float]:
    """Mean, its error, and the same of the paired differences; values by domain, over seeds and states."""
    if not values:
        return [math.nan] * 4
    means = {domain: fmean(many) for domain, many in values.items()}
    differences = [means[domain] - fmean(base[domain]) for domain in means]
    return [*evolve.mean_error(list(means.values())), *evolve.mean_error(differences)]


def measure(
    task, solver, editor, s, domains, seeds: range, shows: dict, grown: list[str]
) -> list[list]:
    """The numbers of one Line for each thing that is shown; trees are grown with those of `grown`, "none" first."""
    early, late, gains = ({name: defaultdict(list) for name in shows} for _ in range(3))
    edits: dict = {name: [] for name in shows}
    counts = {name: [0, 0] for name in shows}
    for seed in seeds:
        own = replace(s, seed=seed)
        states: list[State] = []
        for name in grown:
            plain = name == "none"
            to_ask = (shows, states) if plain else ({}, [])
            *tests, shown, of = grow(task, solver, editor, own, domains, shows[name], *to_ask)
            counts[name] = [counts[name][0] + shown, counts[name][1] + of]
            for place, test in zip((early, late), tests):
                for domain, accuracy in test.items():
                    place[name][domain].append(accuracy)
        for name in shows:
            found = one_edit(task, solver, editor, own, states, name)
            edits[name] += found
            for state, edit in zip(states, found):
                gains[name][state.round.domain].append(edit["gain"])
    rows = []
    for name in shows:
        numbers = [each for by in (early, late) for each in against(by[name], by["none"])]
        numbers += [len(edits[name]), *against(gains[name], gains["none"])]
        numbers += [
            fmean(edit[key] for edit in edits[name]) for key in ("better", "valid", "repeats")
        ]
        rows.append([name, *counts[name], *(round(x, 4) for x in numbers)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--shop", help="a checkpoint: measure it on the shop instead of the miniature"
    )
    parser.add_argument("--editor", help="another one, that edits")
    parser.add_argument("--seeds", type=int, default=0, help="0: three, and one for the shop")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shows: dict = {"none": None, "words": words, "placebo": placebo}
    grown = ["none", "words"]
    seeds = range(args.seeds or (1 if args.shop else 3))
    runs = []  # (name of the editor, editor, sampling, settings)
    if args.shop:
        task = data.load_task("shop")
        domains = task.domains("test")[:SHOP_DOMAINS]
        model = evolve.load_model(args.shop, dtype="bfloat16")
        editor = evolve.load_model(args.editor, dtype="bfloat16") if args.editor else model
        s = evolve.with_presets(evolve.Settings(task="shop"))
        runs.append(("trained" if args.editor else "untrained", editor, "default", s))
    else:
        task = data.Mini()
        domains = task.domains("test")
        shows["entries"] = entries
        grown = list(shows)
        model = evolve.load_model(evolve.MINIATURE / "base")
        for name in ("base", "editor"):
            editor = evolve.load_model(evolve.MINIATURE / name)
            for sampling, changes in (("default", {}), ("noisy", NOISY)):
                s = evolve.with_presets(evolve.Settings(rounds=ROUNDS, **changes))
                runs.append((name, editor, sampling, s))
    solver = Remembering(model)
    titles = ["editor", "sampling", "shows", "shown in", f"after {EARLIER} rounds", "minus none"]
    titles += [
        "after all",
        "minus none",
        "gain of one edit",
        "minus none",
        "better, valid, repeats",
    ]
    print(f"| {' | '.join(titles)} |\n" + "|---" * len(titles) + "|", flush=True)
    lines = []
    for name, editor, sampling, s in runs:
        for row in measure(task, solver, editor, s, domains, seeds, shows, grown):
            line = Line(task.name, name, sampling, s.rounds, len(seeds), len(domains), *row)
            lines.append(line)
            print(table_row(line), flush=True)
    RESULTS.mkdir(exist_ok=True)
    name = "rejected" + ("-shop" if args.shop else "") + ("-trained" if args.editor else "")
    with open(RESULTS / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(lines[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(line) for line in lines)


def table_row(line: Line) -> str:
    """In Markdown."""
    cells = [line.editor, line.sampling, line.shows, f"{line.shown} of {line.of}"]
    for name in ("early", "test", "edit"):
        for mean in (name, f"{name}_gain"):
            value, error = getattr(line, mean), getattr(line, f"{mean}_error")
            cells.append("" if math.isnan(value) else f"{value:+.3f} ± {error:.3f}")
    cells.append(f"{line.better:.0%}, {line.valid:.0%}, {line.repeats:.0%}")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
