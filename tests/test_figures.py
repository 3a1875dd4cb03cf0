"""The committed figures are what their scripts draw of the committed data, and the exercises can be carried out."""

from __future__ import annotations

import shutil
from pathlib import Path

import bench_exercises
import figure_learning
import figure_search
import pytest

TESTS = Path(__file__).resolve().parent
RESULTS = TESTS / "results"


@pytest.mark.parametrize("name, figure", [("learning", figure_learning), ("search", figure_search)])
def test_a_figure_is_that_of_the_committed_data(name: str, figure, tmp_path: Path, monkeypatch) -> None:
    shutil.copy(RESULTS / f"{name}.csv", tmp_path)
    monkeypatch.setattr(figure, "RESULTS", tmp_path)
    if name == "search":
        figure.draw(tmp_path / "search.csv", tmp_path / "search.svg")
    else:
        figure.main(figure.options([]))
    drawn = (tmp_path / f"{name}.svg").read_text(encoding="utf-8")
    assert drawn == (RESULTS / f"{name}.svg").read_text(encoding="utf-8")
    assert drawn.count('class="curve"') == drawn.count('class="band"') >= 6  # two panels of three curves or more


@pytest.mark.parametrize("exercise", bench_exercises.EXERCISES, ids=lambda exercise: exercise.name[:30])
def test_an_exercise_changes_one_place(exercise: bench_exercises.Exercise) -> None:
    text = (TESTS.parent / exercise.file).read_text(encoding="utf-8")
    changed = bench_exercises.changed(text, exercise)
    assert (changed != text) == bool(exercise.old)
    compile(changed, exercise.file, "exec")
