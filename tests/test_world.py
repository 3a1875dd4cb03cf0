"""The miniature: a world that is the same everywhere, whose every gold answer is right and whose text stays text."""

from __future__ import annotations

from collections import Counter

import pytest

import data
from data import COLUMNS, WORDS, Mini, mini_sql


@pytest.fixture(scope="module")
def task():
    return Mini()


def test_a_domain_has_eight_words_with_a_column_each_and_is_the_same_everywhere(task):
    for domain in task.domains("all"):
        glossary = task.glossary(domain)
        assert len(glossary) == 8 == len(set(glossary.values()))
        assert set(glossary) <= set(WORDS) and set(glossary.values()) <= set(COLUMNS)
        assert glossary == Mini().glossary(domain)
    # Pinned: another platform or version that draws otherwise would train in another world.
    assert data.glossary_text(task.glossary("train000")) == (
        "volume c5\nrating c0\nweight c6\ntax c2\nrank c1\nquota c7\nheight c4\nshare c3")
    assert task.rows("train000", "SELECT c0, c7 FROM t WHERE id = 1") == [(410, 346)]
    assert len({tuple(sorted(task.glossary(d).items())) for d in task.domains("all")}) == len(task.domains("all"))


def test_the_splits_share_no_problem_and_ask_for_every_word(task):
    assert not set(task.domains("train")) & set(task.domains("test")) | set(task.domains("dev")) & set(
        task.domains("train") + task.domains("test"))  # fmt: skip
    assert [len(task.domains(split)) for split in ("train", "test", "dev")] == [24, 32, 16]
    for domain in ("train003", "test031", "dev000"):
        problems = task.problems(domain)
        assert len({p.question for p in problems}) == len(problems) == len({p.id for p in problems})
        assert Counter(p.split for p in problems) == {"holdout": 16, "test": 32, "pool": 104}
        first = [p for p in problems if p.split == "holdout"][:8]  # what the reward uses
        assert {p.question.split()[-1] for p in first} == set(task.glossary(domain))


def test_every_gold_query_runs_and_is_right_and_no_other_column_is(task):
    """On the real database, for every problem; and a wrong column is graded as wrong: a guess is worth nothing."""
    lucky = total = 0
    for domain in task.domains("all"):
        for problem in task.problems(domain):
            rows = task.rows(domain, problem.gold)
            assert rows is not None and len(rows) == 1 and isinstance(rows[0][0], int), problem
            grade = task.grade(problem, f"... <answer> {problem.gold} </answer>")
            assert grade == data.Grade(True, problem.gold, "")
        own = task.glossary(domain)[problem.question.split()[-1]]
        for column in set(COLUMNS) - {own}:
            total += 1
            lucky += task.grade(problem, f"<answer>{mini_sql(problem.question, column)}</answer>").correct
    assert lucky <= 0.02 * total


@pytest.mark.parametrize("response, feedback", [
    ("", "SQL error"), ("<answer></answer>", "SQL error"), ("SELECT c0 FROM t", "SQL error"),
    ("<answer>SELECT profit FROM t WHERE id = 3</answer>", "SQL error"),
    ("<answer>SELECT 1</answer>", "wrong result"), ("<answer>DROP TABLE t</answer>", "SQL error"),
    ("<answer>DELETE FROM t</answer>", "SQL error"), ("<answer>ATTACH 'x.db' AS x</answer>", "SQL error"),
    ("<answer>PRAGMA writable_schema = 1</answer>", "SQL error"), ("<answer>SELECT 1; SELECT 2</answer>", "SQL error"),
    ("<answer>SELECT \x00 FROM t</answer>", "SQL error"), ("<answer>SELECT '\ud800'</answer>", "SQL error"),
    ("<answer>WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(i) FROM n</answer>",
     "SQL error"),
])  # fmt: skip
def test_strange_answers_are_wrong_and_change_nothing(task, response, feedback):
    problem = task.problems("train001")[0]
    before = task.rows("train001", "SELECT COUNT(*), SUM(c0), SUM(c7) FROM t")
    grade = task.grade(problem, response)
    assert not grade.correct and grade.feedback == feedback
    assert grade.readable == (grade.answer != "") == ("<answer>" in response and "<answer></answer>" != response)
    task.rows.cache_clear()
    assert task.rows("train001", "SELECT COUNT(*), SUM(c0), SUM(c7) FROM t") == before


def test_an_edit_is_stored_as_one_line_per_word_and_the_last_one_wins(task):
    assert task.read_edit("<prompt> profit c5 rank c1 profit c2 nonsense c3 </prompt>") == "profit c2\nrank c1"
    for text in ("profit c5", "<prompt>profit c5", "<prompt></prompt>", "<prompt> profit profit c9 </prompt>"):
        assert task.read_edit(text) is None
