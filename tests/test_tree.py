"""EvolutionTree: its four rules against a second, naive implementation, the corners by hand, save and load."""

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lse import EvolutionTree, Node


def naive_ucb(tree):
    """Straight from Algorithm 1, as a loop; ties go to the oldest, so `>`."""
    winner, top = None, -math.inf
    for node in tree.nodes:
        if node.score is None:
            continue
        n, v = (tree.rounds or 1), (node.visits if node.visits > 0 else 1)
        value = node.score + tree.c * (math.log(n) / v) ** 0.5
        if value > top:
            winner, top = node, value
    return winner


def naive_best(tree):
    ordered = sorted((n for n in tree.nodes if n.score is not None), key=lambda n: n.id)
    return [n for n in ordered if n.score == max(m.score for m in ordered)][0]


def naive_chain(tree):
    for node in reversed(tree.nodes):
        if node.score is not None:
            return node


def naive_front(tree):
    """Candidate id -> number of problems it is best on, dominated candidates left out."""
    alive = [n for n in tree.nodes if n.score is not None]
    weights = {}
    for node in alive:
        beaten = False
        for other in alive:
            no_worse = all(o >= s for o, s in zip(other.scores, node.scores))
            better = any(o > s for o, s in zip(other.scores, node.scores))
            beaten = beaten or (no_worse and better)
        wins = sum(all(other.scores[i] <= node.scores[i] for other in alive) for i in range(len(node.scores)))
        if wins and not beaten:
            weights[node.id] = wins
    return weights


def random_tree(rng):
    """A tree of up to 12 nodes with ties and invalid edits, and a random history of selections."""
    problems, steps = rng.randint(1, 4), rng.choice([1, 2, 4])

    def scores():
        return [rng.randint(0, steps) / steps for _ in range(problems)]

    first = scores()
    tree = EvolutionTree("seed", sum(first) / problems, first, c=rng.choice([0.0, 0.3, 2.0]))
    for _ in range(rng.randint(0, 11)):
        row = scores()
        valid = rng.random() < 0.8
        tree.add(rng.randrange(len(tree.nodes)), "x", sum(row) / problems if valid else None, row if valid else None)
    for node in tree.nodes:
        node.visits = 0 if node.score is None else rng.choice([0, 0, 1, 2, 5])
    tree.rounds = sum(node.visits for node in tree.nodes)
    return tree


def test_selections_equal_the_naive_ones_on_1000_random_trees():
    rng = random.Random(0)
    for _ in range(1000):
        tree = random_tree(rng)
        assert tree.best() is naive_best(tree)
        nodes, wins = tree.pareto_front()
        assert dict(zip([n.id for n in nodes], wins)) == naive_front(tree)
        for rule, naive in (("ucb", naive_ucb), ("best", naive_best), ("chain", naive_chain)):
            expected, rounds = naive(tree), tree.rounds
            visits = expected.visits
            assert tree.select(rule) is expected
            assert (tree.rounds, expected.visits) == (rounds + 1, visits + 1)
        assert tree.select("pareto", seed=3).id in naive_front(tree)


def test_ucb_by_hand():
    tree = EvolutionTree("seed", 0.5, c=2.0)
    assert tree.select("ucb").id == 0  # N = 0: nothing to explore, the only node
    tree.add(0, "worse", 0.4)
    assert tree.rounds == 1 and tree.select("ucb").id == 0  # N = 1: ln 1 = 0, so the better score wins
    # N = 2, root visited twice: 0.5 + 2 sqrt(ln 2 / 2) = 1.677; child, v = 0, counts as 1: 0.4 + 1.665 = 2.065
    assert tree.select("ucb").id == 1
    # N = 3: root 0.5 + 2 sqrt(ln 3 / 2) = 1.982; child, v = 1: 0.4 + 2 sqrt(ln 3) = 2.496
    assert tree.select("ucb").id == 1
    # N = 4: root 0.5 + 2 sqrt(ln 4 / 2) = 2.165, child, v = 2: 0.4 + 1.665 = 2.065
    assert tree.select("ucb").id == 0
    assert [node.visits for node in tree.nodes] == [3, 2] and tree.rounds == 5


def test_unvisited_counts_as_visited_once():
    tree = EvolutionTree("seed", 0.5)
    tree.add(0, "a", 0.5)
    tree.nodes[0].visits, tree.rounds = 1, 9
    assert tree.select("ucb").id == 0  # equal values, not an infinite bonus: the oldest


def test_ties_go_to_the_oldest_node_except_in_a_chain():
    tree = EvolutionTree("seed", 0.5, [0.5])
    tree.add(0, "a", 0.5, [0.5])
    tree.add(0, "b", 0.5, [0.5])
    assert tree.best().id == tree.select("best").id == tree.select("ucb").id == 0
    assert tree.select("chain").id == 2
    tree.add(2, "c", 0.75, [0.75])
    tree.add(3, "d", 0.75, [0.75])
    assert tree.best().id == tree.select("best").id == 3 and tree.select("chain").id == 4


def test_invalid_edits_are_recorded_and_never_chosen():
    tree = EvolutionTree("seed", 0.1, [0.1])
    for score in (None, math.nan):
        node = tree.add(0, "broken", score, note="no <prompt> tags")
        assert node.score is None and node.note == "no <prompt> tags"
    for rule in ("ucb", "chain", "best", "pareto"):
        assert tree.select(rule).id == 0
    assert tree.best().id == 0 and len(tree.nodes) == 3


def test_without_any_score_nothing_can_be_chosen():
    tree = EvolutionTree("seed", None)
    with pytest.raises(ValueError, match="No node has a score"):
        tree.best()
    with pytest.raises(ValueError, match="No node has a score"):
        tree.select("ucb")
    assert tree.rounds == 0


def test_wrong_rule_parent_and_scores_are_named():
    tree = EvolutionTree("seed", 0.5)
    with pytest.raises(ValueError, match="'greedy'"):
        tree.select("greedy")
    assert tree.rounds == 0 and tree.nodes[0].visits == 0
    with pytest.raises(ValueError, match="No node 7"):
        tree.add(7, "x", 0.5)
    with pytest.raises(ValueError, match="No node None"):
        tree.add(None, "x", 0.5)
    with pytest.raises(ValueError, match="per holdout problem"):
        tree.select("pareto")
    scored = EvolutionTree("seed", 0.5, [0.5, 0.5])
    scored.add(0, "x", 0.5, [0.5])
    with pytest.raises(ValueError, match="per holdout problem"):
        scored.select("pareto")


def test_pareto_by_hand():
    tree = EvolutionTree("seed", 1 / 3, [1.0, 0.0, 0.0])  # dominated by node 1: ties on the first, loses the second
    tree.add(0, "a", 2 / 3, [1.0, 1.0, 0.0])  # best on two problems
    tree.add(0, "b", 1 / 3, [0.0, 0.0, 1.0])  # best on one
    tree.add(0, "c", 0.2, [0.2, 0.2, 0.2])  # dominated by nobody, but best on nothing
    nodes, wins = tree.pareto_front()
    assert [n.id for n in nodes] == [1, 2] and wins == [2, 1]
    picks = [tree.select("pareto", seed=0).id for _ in range(3000)]
    assert abs(picks.count(1) / 3000 - 2 / 3) < 0.04  # 4.6 standard errors
    assert set(picks) == {1, 2}


def test_pareto_repeats_after_a_resume(tmp_path):
    def grow(tree, rounds):
        for _ in range(rounds):
            parent = tree.select("pareto", seed=5)
            tree.add(parent, f"{parent.id}", 0.5, [float(parent.id % 2), float(len(tree.nodes) % 2)])
        return tree

    def start():
        return EvolutionTree("seed", 0.5, [1.0, 0.0])

    whole = grow(start(), 12)
    grow(start(), 5).save(tmp_path / "tree.json")
    resumed = grow(EvolutionTree.load(tmp_path / "tree.json"), 7)
    assert resumed.nodes == whole.nodes and resumed.rounds == whole.rounds
    other = EvolutionTree("seed", 0.5, [1.0, 0.0])
    other.add(0, "x", 0.5, [0.0, 1.0])
    draws = [[other.select("pareto", seed=seed).id for _ in range(20)] for seed in (1, 2)]
    assert draws[0] != draws[1]


anything = st.text(st.characters(codec="utf-8"), max_size=30)  # lone surrogates are kept out at the entrances
score = st.none() | st.floats(0, 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(anything, score, st.lists(st.floats(0, 1), max_size=3) | st.none(), anything), max_size=5))
def test_save_and_load_round_trip_exactly(tmp_path_factory, edits):
    path = tmp_path_factory.mktemp("trees") / "deep" / "tree.json"
    tree = EvolutionTree(
        "Grüße, 世界 </script>\u2028", 1 / 3, [0.1 + 0.2], c=0.3, summary=[{"id": "é", "r": True}]
    )
    for text, value, scores, note in edits:
        tree.add(tree.nodes[-1], text, value, scores, [{"question": text}], note)
    tree.select("ucb")
    tree.save(path)
    loaded = EvolutionTree.load(path)
    assert loaded.nodes == tree.nodes and (loaded.c, loaded.rounds) == (tree.c, tree.rounds)
    assert [type(node) for node in loaded.nodes] == [Node] * len(tree.nodes)
    assert loaded.select("ucb").id == tree.select("ucb").id
    assert [p.name for p in path.parent.iterdir()] == ["tree.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "tree.json"
    tree = EvolutionTree("seed", 0.5)
    tree.save(path)
    before = path.read_text()
    tree.add(0, "x", 0.6, summary=[{"not": object()}])
    with pytest.raises(TypeError):
        tree.save(path)
    tree.nodes.pop()
    tree.add(0, "y", 0.7)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)  # the moment between writing and renaming
    with pytest.raises(KeyboardInterrupt):
        tree.save(path)
    assert path.read_text() == before and json.loads(before)["nodes"][0]["instructions"] == "seed"
