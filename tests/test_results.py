"""results.json against a hand count: one run of evolve.py on a jsonl task, with a server that does as it is told."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import cli
import pytest
from server import Fault, serve
from test_evolve import Scribe, editor_of, grow, settings

import data
import evolve
from data import Problem
from lse import EvolutionTree

# Two domains of twelve problems, worded by the split that each falls into, so that every count can be made by hand.
POOL = [f"Name the {i}. moon of {{}}, please?" for i in range(4)]
HOLDOUT = [f"How far away is moon {i} of {{}}?" for i in range(4)]
TEST = ["Name the 0. moon of {}, please!", *(f"Which colour has the {i}. ring of {{}}?" for i in range(3))]
K = 3


def records() -> list[dict]:
    """The lines of the file. Which split a problem falls into depends on its place in its domain alone."""
    out = []
    for domain in ("mars", "jupiter"):
        places = [Problem(str(place), str(place), "", domain) for place in range(12)]
        lines: dict[int, dict] = {}
        parts = evolve.split_problems(places, settings(k=K, holdout=4, test=4))
        for split, questions in (("pool", POOL), ("holdout", HOLDOUT), ("test", TEST)):
            for i, (problem, question) in enumerate(zip(parts[split], questions, strict=True)):
                gold = f"the answer {i} of {split} in {domain}"
                lines[int(problem.id)] = {"question": question.format(domain), "answer": gold, "domain": domain}
        out += [lines[place] for place in range(12)]
    return out


def reply_of(log: list[tuple[str, str]]):
    """A solver that is right iff its instructions hold GOOD, and an editor: first tags are missing, then GOOD comes.

    For mars the second edit is GOOD, and quotes a question and two golds. For jupiter no edit ever is.
    """
    gold = {record["question"]: record["answer"] for record in records()}
    edits = {"mars": 0, "jupiter": 0}
    lock = threading.Lock()

    def reply(messages: list[dict], body: dict) -> str | Fault:
        text = messages[-1]["content"]
        with lock:
            if body["model"] == "editor":
                domain = "mars" if "mars" in text else "jupiter"
                edits[domain] += 1
                said = edit(domain, edits[domain])
            else:
                question = next(q for q in gold if q in text)
                said = "<answer>wrong</answer>"
                if "moon 3" in question:
                    said = "<answer>never closed"
                if "moon 2" in question:
                    said = "wrong, and without tags"
                if "GOOD" in text and "ring" not in question:
                    said = f"<answer>{gold[question]}</answer>"
            log.append((body["model"], said))
            return said

    return reply


def edit(domain: str, number: int) -> str:
    if number == 1:
        return "I forgot the tags."
    if domain == "jupiter":
        return "<prompt>Answer as you like, in tags.</prompt>"
    copied = "name the 2. MOON of mars, please? It is the answer 2 of pool in mars, or The answer 1 of holdout in mars."
    return f"<prompt>GOOD: {copied}</prompt>"


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[dict, str, list, Path]:
    folder, log = tmp_path_factory.mktemp("results"), []
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, records())))
    with serve(reply_of(log), models=("solver", "editor")) as server:
        code, output = cli.run(
            ["--task", "jsonl", "--data", "own.jsonl", "--domains", "mars,jupiter", "--solver", server.url,
             "--solver-model", "solver", "--editor", server.url, "--editor-model", "editor", "--k", K, "--holdout", 4,
             "--test", 4, "--samples", 2, "--rounds", 5, "--out", "run"], folder)
    assert code == 0, output
    return json.loads((folder / "run" / "results.json").read_text()), output, log, folder / "run"


def test_scores_and_rounds_per_domain(ran) -> None:
    results, output, _, _ = ran
    mars, jupiter = results["domains"]["mars"], results["domains"]["jupiter"]
    # mars: invalid, then GOOD, which answers the whole holdout: solved after 2 of 5 rounds
    assert mars["holdout"] == [0.0, 1.0] and mars["rounds"] == 2
    assert mars["test"] == [0.0, 0.25]  # one of four test problems is about no ring
    assert jupiter["holdout"] == [0.0, 0.0] and jupiter["test"] == [0.0, 0.0] and jupiter["rounds"] == 5
    assert "Nothing beat the seed instructions in 1 of 2 domains, and there you get the seed instructions: jupiter." \
        in output
    assert "1 of 2 trees stopped before round 5" in output
    assert results["never_solved"] == {"problems": 4, "of": 8}


def test_answers_and_unreadable_per_role(ran) -> None:
    results, _, log, _ = ran  # a local model would have been tried first; nobody can look behind a server
    solver, editor = results["cost"]["solver"], results["cost"]["editor"]
    # the seed's scoring 4 x 2 in each domain; rounds: 2 + 5 batches of 3; scored edits: 1 + 4, each 4 x 2;
    # the test: 4 x 2 under the seed instructions of each, and under the best ones of mars
    asked = 2 * 8 + 7 * K + 5 * 8 + 3 * 8
    assert solver["answers"] == asked == sum(role == "solver" for role, _ in log)
    assert editor["answers"] == 2 + 5 == sum(role == "editor" for role, _ in log)
    said = [text for role, text in log if role == "solver"]
    assert solver["unreadable"] == said.count("<answer>never closed") == 2 * (2 + 4)  # jupiter's four edits too
    assert solver["read leniently"] == said.count("wrong, and without tags") == 2 * (2 + 4)
    words = [len(text.split()) for role, text in log if role == "editor"]  # the server's tokens are words
    assert editor["tokens written"] == sum(words) and solver["tokens written"] == sum(len(t.split()) for t in said)
    assert editor["unreadable"] == 2 and solver["failed"] == editor["failed"] == solver["cut"] == editor["cut"] == 0


def test_tokens_copies_and_twins_per_domain(ran) -> None:
    results, output, _, run = ran
    mars, jupiter = results["domains"]["mars"], results["domains"]["jupiter"]
    best, seed = results["instructions"]["mars"], results["instructions"]["jupiter"]
    assert mars["tokens"] == [len(seed) // 4, len(best) // 4] and jupiter["tokens"] == [len(seed) // 4] * 2
    assert mars["copies"] == {"questions": 1, "answers": 2} and jupiter["copies"] == {"questions": 0, "answers": 0}
    assert mars["near_twins"] == jupiter["near_twins"] == 1  # "please!" instead of "please?"
    said = [
        f"Instructions, mean over domains: {len(seed) // 4} -> {(len(seed) // 4 + len(best) // 4) / 2:.0f} tokens; "
        "rounds used: 3.5",
        "Copied word for word into the best instructions: 1 questions, 2 gold answers. "
        "Test problems with a near-twin in their pool: 2 of 8.",
    ]
    assert "\n".join(said) in output
    page = (run / "report.html").read_text()
    assert "1 questions, 2 gold answers. Test problems with a near-twin in their pool: 1 of 4." in page


# ---------------------------------------------------------------------------------------------------------------------
# Copies and twins
# ---------------------------------------------------------------------------------------------------------------------


def test_what_is_no_copy() -> None:
    seen = [Problem("1", "Who wrote Emma?", "Jane Austen", "x"), Problem("2", "Who?", "B", "x")]
    none = {"questions": 0, "answers": 0}
    assert evolve.copies("Who wrote Emmas? Jane Austenite. B.", "", seen) == none  # other words, and too short ones
    assert evolve.copies("Jane Austen", "Ask about Jane Austen.", seen) == none  # it stood in the seed already
    assert evolve.copies("Jane Austen", "Ask.", seen + seen) == {"questions": 0, "answers": 1}  # each once


def test_near_twins_share_four_fifths_of_their_words() -> None:
    def problem(text: str, *choices: str) -> Problem:
        return Problem("x", text, "gold", "d", choices=choices)

    pool = [problem("a b c d e")]
    assert evolve.near_twins([problem("E d c b, a!")], pool) == 1
    assert evolve.near_twins([problem("a b c d")], pool) == 1  # 4 of 5
    assert evolve.near_twins([problem("a b c x e")], pool) == 0  # 4 of 6
    # the same stem with other choices is another question
    stem = "Which is true?"
    assert evolve.near_twins([problem(stem, "p", "q", "r")], [problem(stem, "s", "t", "u")]) == 0


# ---------------------------------------------------------------------------------------------------------------------
# A budget for instructions
# ---------------------------------------------------------------------------------------------------------------------


def test_the_budget_is_told_and_enforced() -> None:
    long = "Answer with skill 15, " + "please " * 20
    following = iter([long, "Answer with skill 10.", "Answer with skill 12."])
    editor = Scribe(lambda _: f"<prompt>{next(following)}</prompt>")
    tree, solver = grow(editor, search="best", rounds=3, max_instruction_tokens=10)
    rejected = tree.nodes[1]
    assert rejected.score is None and rejected.note == f"{len(long.strip()) // 4} tokens, more than the 10 of " \
        "--max-instruction-tokens"
    assert rejected.instructions == long.strip() and rejected.scores is None
    assert [node.score is None for node in tree.nodes] == [False, True, False, False]
    assert solver.usage.answers == 6 + 3 * 3 + 2 * 6  # the long edit was not scored
    assert all(text.endswith("at most 10 tokens (about 7 words). Longer ones are thrown away: keep what helps most.")
               for text in editor.asked)
    assert not any("at most" in text for text in solver.asked)
    grow(untold := editor_of(5), rounds=1)
    assert "at most" not in untold.asked[0]


@pytest.mark.parametrize(
    "method, tag", [("gepa", "prompt"), ("reflexion", "lesson"), ("textgrad", "IMPROVED_VARIABLE")])
def test_every_method_keeps_the_budget(method: str, tag: str) -> None:
    editor = Scribe(lambda _: f"<{tag}>Answer with skill 15, {'please ' * 20}</{tag}>")
    tree, _ = grow(editor, method=method, rounds=1, max_instruction_tokens=10)
    assert "more than the 10" in tree.nodes[1].note and tree.best().id == 0
    assert "at most 10 tokens" in editor.asked[-1]


def test_a_local_solver_counts_with_its_tokenizer() -> None:
    solver = evolve.load_model(evolve.MINIATURE / "base")
    edits = [evolve.Edit("", "profit c1\nrank c2"), evolve.Edit("", "profit c1")]
    tokens = [len(solver.tokenizer(edit.instructions)["input_ids"]) for edit in edits]
    evolve.reject_long(solver, edits, tokens[1])
    assert [edit.valid for edit in edits] == [False, True]
    assert edits[0].note.startswith(f"{tokens[0]} tokens, more than the {tokens[1]} of")
    chat = [{"role": "user", "content": "x"}]
    assert evolve.add_budget(data.Mini(), chat, 5) is chat  # its editor knows no such words


# ---------------------------------------------------------------------------------------------------------------------
# Several edits of a node per round
# ---------------------------------------------------------------------------------------------------------------------


def test_several_edits_are_asked_for_and_scored_in_one_batch_and_all_attached() -> None:
    editor = editor_of(5, 10, 3, 12, None, 15)
    tree, solver = grow(editor, search="best", rounds=2, edits=3)
    assert [node.parent for node in tree.nodes] == [None, 0, 0, 0, 2, 2, 2] and tree.rounds == 2
    assert [node.visits for node in tree.nodes] == [1, 0, 1, 0, 0, 0, 0]
    assert len(editor.options) == 2 and len(solver.options) == 1 + 2 * 2  # calls: seed, then summaries and scores
    assert solver.usage.answers == 6 + 2 * 3 + 5 * 6
    assert tree.nodes[1].summary == tree.nodes[3].summary and "skill 15" in tree.best().instructions
    s = evolve.Config(**vars(settings(rounds=2, edits=3, test=0)))
    assert evolve.count_calls(1, s) == (6 + 2 * (3 + 3 * 6), 6)


def test_a_killed_run_with_several_edits_is_cut_back_by_whole_rounds(tmp_path: Path) -> None:
    trees = {}
    for name, rounds in (("a", 3), ("b", 2)):
        trees[name] = EvolutionTree("seed", 0.5, [0.5])
        for _ in range(rounds):
            parent = trees[name].select("chain")
            for _ in range(4):
                trees[name].add(parent, "edit", 0.25, [0.25])
    evolve.save_trees(tmp_path, trees)
    restored = evolve.restore_trees(tmp_path, ["a", "b"])
    assert [(tree.rounds, len(tree.nodes)) for tree in restored.values()] == [(2, 9), (2, 9)]
    assert [sum(node.visits for node in tree.nodes) for tree in restored.values()] == [2, 2]


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------


def test_the_report_shows_training_and_the_newest_instructions(tmp_path: Path) -> None:
    tree = EvolutionTree("seed", 0.25, [0.25])
    tree.add(0, "better", 0.75, [0.75])
    tree.add(1, "newest and worse", 0.5, [0.5])
    log = [{"reward": -0.5 if step < 10 else 0.1, "better": None, "valid": 0.9} for step in range(20)]
    notes = {"run": "a <note>\nand another"}
    evolve.write_report(tmp_path / "r.html", {"run": tree}, "t", notes, log, verdict="Test: 0 <-> 1")
    page = (tmp_path / "r.html").read_text()
    assert page.index("<pre>Test: 0 &lt;-&gt; 1</pre>") < page.index("Training") < page.index("Best instructions")
    assert "<h3>Best instructions (#1)</h3><pre>better</pre>" in page
    assert "<h3>Newest instructions (#2, 0.500)</h3><pre>newest and worse</pre>" in page
    assert "<p>a &lt;note&gt;</p><p>and another</p>" in page
    assert "step 20" in page and all(f">{name}</text>" in page for name in ("reward", "better", "valid"))
    # y: −0.5 is at the bottom, 190; reward 0.1 is 180 * 0.6 / 1.5 = 72 above it
    assert '<path class="line" d="M50.0 190.0 350.0 118.0 "/>' in page
    # the newest: 0.25 at the bottom, 0.75 at the top, then halfway down
    assert '<path class="thin" d="M50.0 190.0 200.0 10.0 350.0 100.0 "/>' in page
    assert '<path class="line" d="M50.0 190.0 200.0 10.0 350.0 10.0 "/>' in page
    tree.nodes.pop()
    evolve.write_report(tmp_path / "r.html", {"run": tree})
    page = (tmp_path / "r.html").read_text()
    assert "Newest instructions" not in page and "Training" not in page
