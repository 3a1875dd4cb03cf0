"""The trained editor inside somebody else's loop: the `gepa` package, its reflection model behind an HTTP server.

    pip install gepa                                  # in a scratch environment; run by hand, four minutes on two cores
    python tests/bench_gepa.py [--base DIR] [--editor DIR] [--domains 16] [--seeds 3]        # behind tests/server.py
    transformers serve --port 8124 &                                          # pip install fastapi uvicorn openai
    python tests/bench_gepa.py --server http://localhost:8124/v1

`--base` is the solver, and the untrained editor. The budget is that of our UCB run, holdout + rounds x (k + holdout) =
128 answers per domain. Both GEPAs end with the iteration that uses it up, so they may ask for a few more.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import fmean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evolve
from data import Answer, load_task
from lse import RemoteModel


class Adapter:
    """A task as GEPA sees it: a candidate is {"instructions": text}, an example is a Problem."""

    def __init__(self, task, solver, editor, s: evolve.Settings) -> None:
        self.task, self.solver, self.editor, self.s = task, solver, editor, s

    def evaluate(self, batch: list, candidate: dict, capture_traces: bool = False):
        from gepa.core.adapter import EvaluationBatch

        sampling = evolve.solver_sampling(self.s)
        answers = evolve.solve(self.task, self.solver, candidate["instructions"], batch, **sampling)
        return EvaluationBatch([a.answer for a in answers], [float(a.correct) for a in answers], answers)

    def make_reflective_dataset(self, candidate: dict, eval_batch, components: list[str]) -> dict[str, list[dict]]:
        return {"instructions": [asdict(answer) for answer in eval_batch.trajectories]}

    def propose_new_texts(self, candidate: dict, dataset: dict, components: list[str]) -> dict[str, str]:
        """The edit, asked for in the words the editor was trained on. An invalid one is no proposal: {}."""
        chat = self.task.edit_chat(candidate["instructions"], [Answer(**a) for a in dataset["instructions"]])
        [[sample]] = self.editor.sample([chat], **evolve.editor_sampling(self.s))
        edit = evolve.read_edit(self.task, sample)
        return {"instructions": edit.instructions} if edit.valid else {}

    def log(self, message: str) -> None:
        """GEPA's logger, silent. What a proposer raises GEPA would log and go on without: here it ends the run."""
        if "reflection failed" in message:
            raise RuntimeError(message)


def gepa_package(task, domains: list[str], solver, editor, s: evolve.Settings, budget: int) -> dict[str, str]:
    """The instructions that the `gepa` package chose for each domain."""
    import gepa

    torch.manual_seed(s.seed)  # for tests/server.py; another server has a seed of its own
    parts, adapter = {d: evolve.split_problems(task.problems(d), s) for d in domains}, Adapter(task, solver, editor, s)
    return {d: gepa.optimize({"instructions": task.seed_instructions}, parts[d]["pool"], parts[d]["holdout"], adapter,
                             reflection_minibatch_size=s.k, max_metric_calls=budget, seed=s.seed, logger=adapter,
                             ).best_candidate["instructions"] for d in domains}


def our_ucb(task, domains: list[str], solver, editor, s: evolve.Settings, budget: int) -> dict[str, str]:
    """Solved trees go on, as GEPA does: the numbers of answers stay equal."""
    trees = evolve.seed_trees(task, domains, solver, s)
    evolve.evolve_all(task, trees, solver, editor, s, stop=False)
    return {d: tree.best().instructions for d, tree in trees.items()}


def our_gepa(task, domains: list[str], solver, editor, s: evolve.Settings, budget: int) -> dict[str, str]:
    """All domains in step; a tree leaves when its budget is used up."""
    trees, spent = evolve.seed_trees(task, domains, solver, s), dict.fromkeys(domains, s.holdout)
    while going := {d: tree for d, tree in trees.items() if spent[d] < budget}:
        one_more = replace(s, rounds=len(next(iter(going.values())).nodes))
        evolve.evolve_all(task, going, solver, editor, one_more, "pareto", "gepa", stop=False)
        for d, tree in going.items():
            scored, gated = tree.nodes[-1].score is not None, "minibatch" in tree.nodes[-1].note
            spent[d] += s.k + s.k * (scored or gated) + s.holdout * scored
    return {d: tree.best().instructions for d, tree in trees.items()}


def main(a: argparse.Namespace) -> None:
    """The table: test accuracy, mean ± s.e. over domains, each averaged over seeds; counts per domain and seed."""
    if not find_spec("gepa"):
        raise SystemExit("Skipped: there is no gepa here. In a scratch environment: pip install gepa")
    from server import serve  # beside this script
    task, s, solver = load_task("mini"), evolve.with_presets(evolve.Settings()), evolve.load_model(a.base)
    domains, models = task.domains("test")[: a.domains], {n: evolve.load_model(n) for n in (a.base, a.editor)}

    def reply(messages: list[dict], body: dict) -> str:
        sampling = {name: body[name] for name in ("temperature", "top_p", "top_k") if name in body}
        return models[body["model"]].sample([messages], max_new_tokens=body["max_tokens"], **sampling)[0][0].text

    # `transformers serve` knows no top_k, and is greedy unless a generation_config says otherwise.
    extra = {"top_k": None, "generation_config": f'{{"do_sample": true, "top_k": {s.top_k}}}'} if a.server else {}
    print(f"gepa {version('gepa')}, transformers {version('transformers')}, {a.server or 'tests/server.py'}\n"
          "| editor | loop | test | solver answers | edits |\n|---|---|---|---|---|")
    with serve(reply) as own:
        for name, loop in product(models, (gepa_package, our_gepa, our_ucb)):
            editor = RemoteModel(a.server or own.url, name, extra=extra) if loop is gepa_package else models[name]
            answers, edits, test = solver.usage.answers, editor.usage.answers, []
            budget = s.holdout + s.rounds * (s.k + s.holdout)
            for seeded in (replace(s, seed=seed) for seed in range(a.seeds)):
                chosen = loop(task, domains, solver, editor, seeded, budget)
                test += [(text, evolve.split_problems(task.problems(d), seeded)["test"]) for d, text in chosen.items()]
            answers, edits = (solver.usage.answers - answers) / len(test), (editor.usage.answers - edits) / len(test)
            right = [fmean(scores) for scores in evolve.score_all(task, solver, test, s)]  # (seeds * domains,)
            mean, error = evolve.mean_error([fmean(right[i :: len(domains)]) for i in range(len(domains))])
            print(f"| {name} | {loop.__name__} | {mean:.3f} ± {error:.3f} | {answers:.1f} | {edits:.1f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = {name: str(evolve.MINIATURE / name) for name in ("base", "editor")}
    for flag, default in (models | dict(server="", domains=16, seeds=3)).items():
        parser.add_argument(f"--{flag}", type=type(default), default=default)
    main(parser.parse_args())
