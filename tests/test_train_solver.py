"""Training with another solver than the editor's own base: a folder, or a model behind a server."""

from __future__ import annotations

import json

import pytest
import tiny
from scripted import scripted
from server import serve
from tiny import end_state, log_lines, luck

import data
import evolve
import train

WORDS = data.WORDS + data.COLUMNS  # what the miniature's tokenizer knows
GOLD = {f"total {a} {b}": f"{b} {a}" for a in WORDS[:12] for b in WORDS[12:14]}
SETTINGS = dict(task="jsonl", steps=2, states=2, group=2, k=2, rounds=1, grow_rounds=1, holdout=4, test=4,
                solver_tokens=8, editor_tokens=6, lr=1e-3)  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(name, **settings): train on problems of our own, with edits that are valid by luck."""
    base = tiny.random_base(tmp_path / "base")
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in GOLD.items()))
    monkeypatch.setattr(data.Questions, "read_edit", lambda self, text: text if luck(text) % 4 else None, raising=False)

    def run(name: str, **settings):
        config = train.Config(**SETTINGS | dict(data=str(file), model=str(base), out=str(tmp_path / name)) | settings)
        return train.main(config)

    return run


def test_a_solver_behind_a_server_grows_scores_and_tests(run, tmp_path, capsys):
    """Every answer of a run is the server's: none of the editor's own base; and a resumed run ends as a whole one."""
    reply = scripted(GOLD, base=0.5)
    with serve(reply, models=("solver",)) as server:
        results = run("whole", solver=server.url)
        said = capsys.readouterr().out
        asked = sum(reply.roles.values())
        assert results["cost"]["solver"]["answers"] == asked == reply.roles["solver"] > 50
        assert results["untrained"]["seed_instructions"] == pytest.approx(0.5, abs=0.3)
        assert "Measured: 4 answers in" in said and "solver" in said
        assert [line["step"] for line in log_lines(tmp_path / "whole")] == [0, 1]
        run("again", solver=server.url, steps=1)
        again = run("again", solver=server.url, steps=2, resume=True)
        assert again["config"] == results["config"] | {"out": str(tmp_path / "again"), "resume": True}
    # The first step of the shorter run had another learning rate; its draws, and so its edits, were the same.
    first, resumed = log_lines(tmp_path / "whole")[0], log_lines(tmp_path / "again")[0]
    assert first == resumed | {"lr": first["lr"]}


def test_a_solver_from_another_folder_is_not_the_editors_base(run, tmp_path):
    other = tiny.random_base(tmp_path / "wide", hidden=24)
    results = run("run", solver=str(other))
    state = end_state(tmp_path / "run")
    assert state["log"] and results["config"]["solver"] == str(other)
    editor = evolve.load_model(tmp_path / "run/editor").model
    assert editor.config.hidden_size == 16  # trained from --model, whoever solves
