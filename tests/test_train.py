"""`python train.py` from end to end, and that what it calls learning is learning."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate import Accelerator
from make_base import mini_tokenizer, tiny_qwen3
from tiny import SETTINGS, flags, log_lines, small_world
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import data
import evolve
import train
from lse import EvolutionTree, LocalModel, MasterAdamW, Sample, logprobs
from train import EditGroup, StartState

ROOT = Path(__file__).resolve().parents[1]
ALONE = Accelerator(cpu=True)  # one process
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.random_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def small(monkeypatch, base):
    """run(out, **settings): train in the tiny world."""
    small_world(monkeypatch.setattr)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return lambda out, **settings: train.main(train.Config(**SETTINGS | dict(model=str(base), out=str(out)) | settings))


@pytest.fixture
def command(monkeypatch, capsys):
    """command(*args) -> (exit code or message, all it printed): `python train.py ARGS` without a new interpreter."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(*args) -> tuple[int | str | None, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
        code = None
        try:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().out

    return run


# ---------------------------------------------------------------------------------------------------------------------
# As a user would
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`python train.py`, shortened: its folder and what it said."""
    out = tmp_path_factory.mktemp("user") / "runs" / "first"
    # By default checkpoints are saved by the clock: a slow disk would leave others.
    args = flags(steps=3, states=4, group=2, rounds=2, grow_rounds=2, save_every=1, out=out)
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *args], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_a_run_leaves_what_the_design_promises(run):
    out, said = run
    names = {"config.json", "log.jsonl", "trees", "editor", "results.json", "report.html"}
    assert {path.name for path in out.iterdir()} == names | {"checkpoint-000002.pt", "checkpoint-000003.pt"}
    results = json.loads((out / "results.json").read_text())
    assert {"untrained", "trained", "seconds", "config"} <= set(results)
    for editor in ("untrained", "trained"):
        assert 0 <= results[editor]["test_accuracy"] <= 1 and results[editor]["domains"] == 32
        assert results[editor]["stderr"] >= 0
    assert set(results["seconds"]) == {"rl", "evaluation"} and min(results["seconds"].values()) > 0
    assert results["config"] == json.loads((out / "config.json").read_text())
    assert len(list((out / "trees").glob("test*.json"))) == 32
    assert "test000" in (out / "report.html").read_text()
    for words in ("start states", "an edit for", "untrained editor", "seed instructions", f"in {out}:"):
        assert words in said, words


@pytest.mark.parametrize("settings, shown", [({}, True), (dict(seed=3, out="x"), True), (dict(steps=20), False),
                                             (dict(advantage="grpo"), False), (dict(task="bird"), False)])
def test_what_to_expect_is_said_of_the_usual_run_alone(run, tmp_path, capsys, settings, shown):
    results = json.loads((run[0] / "results.json").read_text())
    config = asdict(evolve.with_presets(train.Config())) | settings
    trees = {"test000": EvolutionTree.load(run[0] / "trees" / "test000.json", data.Answer)}
    train.finish(results | {"config": config}, trees, trees, [], tmp_path)
    assert (train.EXPECT in capsys.readouterr().out) == shown


def test_a_log_line_says_everything(run):
    lines = [json.loads(line) for line in (run[0] / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert [line["lr"] for line in lines] == pytest.approx([4e-4, 4e-4 * 2 / 3, 4e-4 / 3])
    for line in lines:
        assert {"reward", "better", "valid"} <= set(line) and not line["skipped"]
        assert set(line["seconds"]) == {"sample", "score", "learn"}
        assert 0 < line["entropy"] < math.log(100) and line["grad_norm"] >= 0
        assert 0 < line["tokens"] <= 4 * 2 * 40 and line["cut"] <= 8 and line["flat"] <= 4


def test_the_editor_that_is_saved_is_the_one_that_was_trained(run):
    """editor/ loads as any checkpoint does, equals the last checkpoint's weights, and is not the base."""
    out, _ = run
    folders = (out / "editor", evolve.MINIATURE / "base")
    editor, base = (evolve.load_model(folder).model for folder in folders)
    checkpoint = torch.load(out / "checkpoint-000003.pt", weights_only=True)
    for weight, master in zip(editor.parameters(), checkpoint["optimizer"]["masters"], strict=True):
        assert torch.equal(weight, master)
    moved = [not torch.equal(a, b) for a, b in zip(editor.parameters(), base.parameters())]
    assert all(moved)
    vocabularies = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in folders]
    assert vocabularies[0] == vocabularies[1]


def test_the_command_line(command):
    """Every field's help is there, an unknown flag is an error, and so is a word that is none of the choices."""
    code, said = command("--help")
    text = " ".join(said.split())
    assert code == 0 and "python train.py --advantage grpo" in text
    for field in fields(train.Config):
        assert f"--{field.name}" in text, field.name
        assert " ".join(field.metadata["help"].split()) in text, field.name
    assert "(mini 1, shop 1, else 8 or in train.py 1, of that without a GPU 1)" in text  # --samples
    assert "(default: -0.2)" in text and "all sampling (default: 0)" in text and "default: None" not in text
    for args in (["--steeps", "3"], ["--step", "3"], ["--advantage", "ppo"], ["--steps", "many"], ["stray"]):
        assert command(*args) == (2, "")


def test_two_runs_with_one_seed_are_the_same_and_another_seed_is_not(small, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        small(tmp_path / name, seed=seed)
    assert log_lines(tmp_path / "a") == log_lines(tmp_path / "b") != log_lines(tmp_path / "c")
    assert tiny.end_state(tmp_path / "a") == tiny.end_state(tmp_path / "b")


def test_before_and_after_are_the_base_and_the_editor_on_unseen_domains(small, base, tmp_path):
    """The results come again when the two saved models evolve the test domains; the trees are the trained editor's."""
    results = small(tmp_path / "run", lr=0.03)
    task, s = data.Mini(), train.Config(**results["config"])
    solver, editor = evolve.load_model(base), evolve.load_model(tmp_path / "run/editor")
    for name, model in (("untrained", solver), ("trained", editor)):
        again, trees = train.evaluate(task, solver, model, s, "", ALONE)
        assert again == results[name]
        files = (tmp_path / "run/trees").glob("*.json")
        saved = {file.stem: EvolutionTree.load(file, data.Answer).nodes for file in files}
        assert ({d: tree.nodes for d, tree in trees.items()} == saved) == (name == "trained")
        assert set(trees) == set(task.domains("test"))


def test_threads_and_batch_size_change_no_greedy_answer(base):
    """On a model with weights large enough that its answers differ."""
    task, answers = data.Mini(2, 0, 0), []
    asked = [(i, p) for domain in task.domains("train") for i, p in enumerate(task.problems(domain)[:9])]
    chats = [task.solve_chat("profit c1 " * i, problem) for i, problem in asked]
    for threads, tokens in ((1, 65536), (2, 65536), (1, 100), (2, 1)):
        torch.set_num_threads(threads)
        model = evolve.load_model(base, tokens)
        for parameter in model.model.parameters():
            parameter.data *= 20
        rows = model.sample(chats, temperature=0, max_new_tokens=12)
        answers.append([tuple(sample.ids.tolist()) for row in rows for sample in row])
    torch.set_num_threads(1)
    assert answers[0] == answers[1] == answers[2] == answers[3] and len(set(answers[0])) > 3


# ---------------------------------------------------------------------------------------------------------------------
# Learning
# ---------------------------------------------------------------------------------------------------------------------


class Echo:
    """A solver that answers with its instructions."""

    def sample(self, chats, n=1, **_):
        return [[Sample(chat[0]["content"], None, None, False)] * n for chat in chats]


class Columns:
    """A rigged task: instructions are worth the share of their first 8 words that are columns. Any edit is valid."""

    name, seed_instructions = "columns", ""

    def problems(self, domain):
        return [data.Problem(str(i), "", "", domain, split) for split in ("pool", "holdout") for i in range(8)]

    def solve_chat(self, instructions, problem):
        return [{"role": "user", "content": instructions}]

    def edit_chat(self, instructions, summary):
        return [{"role": "user", "content": f"edit {instructions}"}]

    def read_edit(self, text):
        return text

    def grade(self, problem, response):
        return data.Grade((response.split() + ["-"] * 8)[int(problem.id)] in data.COLUMNS, response)


def learned(sign: int, monkeypatch, steps: int = 25) -> tuple[float, float]:
    """Mean reward of the first and of the last step on the rigged task."""
    monkeypatch.setattr(train, "advantages", lambda *args: sign * ADVANTAGES(*args))
    torch.manual_seed(0)
    tokenizer = mini_tokenizer()
    editor = LocalModel(tiny_qwen3(tokenizer, 16), tokenizer)
    s = evolve.with_presets(train.Config(steps=steps, states=8, group=8, lr=0.02, editor_tokens=8))
    pool = [StartState("d", "", score=0.0, seed=0, potential=1.0)]
    optimizer = MasterAdamW(editor.model, lr=s.lr)
    rewards = []
    for i in range(steps):
        line, _ = train.train_step(Columns(), Echo(), editor, optimizer, pool, s, i, ALONE)
        rewards.append(line["reward"])
    return fmean(rewards[:2]), fmean(rewards[-2:])


ADVANTAGES = train.advantages


def test_a_policy_learns_and_with_the_sign_flipped_it_unlearns(monkeypatch):
    """25 steps of 64 edits: from 9% (8 of 85 words) to most words; with −A instead of A, to none."""
    first, last = learned(+1, monkeypatch)
    assert first < 0.15 and last > 0.5
    first, last = learned(-1, monkeypatch)
    assert 0.05 < first < 0.15 and last < 0.03


def test_states_with_more_to_gain_are_drawn_more_often():
    """In proportion to potential + 0.1: of 2,000 draws from (0, 0.1, 0.7), shares of 0.1, 0.2 and 0.7 (s.d. 0.01)."""
    pool = [StartState("d", "", 0.0, 0, potential) for potential in (0.0, 0.1, 0.7)]
    s = evolve.with_presets(train.Config(states=2000))
    drawn = [rollout.state.potential for rollout in train.draw_states(Columns(), pool, s, step=0)]
    shares = [drawn.count(state.potential) / 2000 for state in pool]
    assert shares == pytest.approx([0.1, 0.2, 0.7], abs=0.05)


@pytest.mark.parametrize("keep, growths", [(True, [1, 1, 2, 2]), (False, [1, 1, 1, 1])])
def test_start_states_of_earlier_growths_stay_or_go(small, monkeypatch, tmp_path, keep, growths):
    """Four steps, trees grown before the first and the third; each growth has a seed of its own."""
    seen = []
    real = train.train_step

    def step(task, solver, editor, optimizer, pool, *rest):
        seen.append(len({state.seed for state in pool}))
        return real(task, solver, editor, optimizer, pool, *rest)

    monkeypatch.setattr(train, "train_step", step)
    small(tmp_path / "run", steps=4, grow_every=2, keep_states=keep)
    assert seen == growths


def test_a_state_drawn_twice_sees_other_problems_the_second_time():
    s = evolve.with_presets(train.Config(states=2, k=8))
    first, second = train.draw_states(Columns(), [StartState("d", "", 0.0, 0, 1.0)], s, step=0)
    assert first.state is second.state and first.problems != second.problems and first.holdout == second.holdout
    again, _ = train.draw_states(Columns(), [StartState("d", "", 0.0, 0, 1.0)], s, step=0)
    assert again.problems == first.problems


class Scribe:
    """An editor whose edits say which chat they answer: "state i edit j", or nothing readable where i + j is 3."""

    def sample(self, chats, n=1, **_):
        def say(chat, j):
            i = int(chat[0]["content"].split()[-1])
            text = "?" if i + j == 3 else f"state {i} edit {j}"
            return Sample(text, torch.tensor([i, j]), torch.tensor([i]), False)

        return [[say(chat, j) for j in range(n)] for chat in chats]

    def group_logprobs(self, groups):
        return [[torch.zeros(len(ids), requires_grad=True) for ids in responses] for _, responses in groups]


class Numbers(Columns):
    """The edit "state i edit j" is worth (2i + j) / 8; instructions "state i" nothing."""

    def read_edit(self, text):
        return None if text == "?" else text

    def grade(self, problem, response):
        words = response.split()
        return data.Grade(len(words) == 4 and int(problem.id) < 2 * int(words[1]) + int(words[3]), response)


def test_prompts_samples_and_rewards_stay_aligned(monkeypatch):
    """The reward tells the state and the edit, so a transposed or sorted batch shows; invalid edits shift nothing."""
    s = evolve.with_presets(train.Config(group=3, steps=1, invalid_reward=-0.25))
    seen = {}

    def capture(kind, after, before, valid, invalid_reward):
        seen.update(after=after, before=before, valid=valid, invalid_reward=invalid_reward)
        return ADVANTAGES(kind, after, before, valid, invalid_reward)

    monkeypatch.setattr(train, "advantages", capture)
    order = (2, 0, 3, 1)
    states = [StartState("d", f"state {i}", i / 8, 0, 0.0) for i in order]
    monkeypatch.setattr(train, "draw_states", lambda task, pool, s, step: [
        EditGroup(state, [], task.problems("d")[8:]) for state in pool])
    editor = Scribe()
    editor.model = torch.nn.Linear(1, 1)
    optimizer = MasterAdamW(editor.model, lr=1.0)
    line, rollouts = train.train_step(Numbers(), Echo(), editor, optimizer, states, s, 0, ALONE)
    for row, i in enumerate(order):
        assert seen["before"][row] == i / 8
        for j in range(3):
            edit, valid = rollouts[row].edits[j], i + j != 3
            assert edit.sample.ids.tolist() == [i, j] and edit.sample.prompt_ids.tolist() == [i]
            assert bool(seen["valid"][row, j]) == valid == edit.valid
            assert edit.instructions == (f"state {i} edit {j}" if valid else None)
            worth = (2 * i + j) / 8 if valid else math.nan
            assert seen["after"][row, j].item() == pytest.approx(worth, nan_ok=True)
            assert rollouts[row].after[j] == pytest.approx(worth, nan_ok=True)
    assert line["valid"] == pytest.approx(9 / 12) and line["tokens"] == 24
    # The penalty of an invalid edit is the setting's, in the advantages and in the log.
    assert seen["invalid_reward"] == -0.25
    deltas = [(2 * i + j) / 8 - i / 8 for i in order for j in range(3) if i + j != 3]
    assert line["reward"] == pytest.approx((sum(deltas) - 3 * 0.25) / 12)


def test_a_penalty_that_would_be_a_reward_is_refused():
    assert evolve.with_presets(train.Config(invalid_reward=0.0)).invalid_reward == 0
    with pytest.raises(ValueError, match="--invalid-reward cannot be 0.5"):
        evolve.with_presets(train.Config(invalid_reward=0.5))


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_step_follows_the_gradient_of_its_own_samples(monkeypatch, micro_batch, checkpointing):
    """Part 6 sorts by length and splits into micro-batches: its gradient is that of the naive loop as given."""
    torch.manual_seed(1)
    tokenizer = mini_tokenizer()
    editor = LocalModel(tiny_qwen3(tokenizer, 16), tokenizer)
    ids, captured = lambda n: torch.randint(5, 80, (n,)), []
    shapes = ((9, (2, 5)), (3, (4, 1)), (12, (3, 3)), (5, (1, 6)))  # tokens of the prompt, of its two responses
    groups = [(ids(n), [ids(m) for m in lengths]) for n, lengths in shapes]
    weights = torch.tensor([[1.0, -2.0], [0.5, 0.0], [-1.0, 3.0], [2.0, -0.5]])
    n_tokens = sum(len(r) for _, responses in groups for r in responses)
    loss = sum(-(a * logprobs(editor.model, prompt, [r])[0]).sum() / n_tokens
               for (prompt, responses), row in zip(groups, weights) for r, a in zip(responses, row))
    loss.backward()
    naive = torch.cat([p.grad.flatten() for p in editor.model.parameters()])
    editor.model.zero_grad()

    class Capture:
        params = list(editor.model.parameters())
        adamw = torch.optim.SGD(params)

        def step(self):
            captured.append(torch.cat([p.grad.flatten() for p in self.params]))
            return 1.0

    if checkpointing:
        editor.model.activation_checkpointing_enable()
    samples = [[Sample("text", response, prompt, False) for response in responses] for prompt, responses in groups]
    monkeypatch.setattr(editor, "sample", lambda chats, **_: samples)
    monkeypatch.setattr(train, "advantages", lambda *_: weights)
    settings = dict(micro_batch=micro_batch, gradient_checkpointing=checkpointing, states=4, group=2)
    s = evolve.with_presets(train.Config(**settings))
    pool = [StartState("d", "", 0.0, 0, 1.0)]
    line, _ = train.train_step(Columns(), Echo(), editor, Capture(), pool, s, 0, ALONE)
    assert torch.allclose(captured[0], naive, atol=1e-6)
    assert line["entropy"] == pytest.approx(math.log(85), rel=0.1) and line["tokens"] == n_tokens


# ---------------------------------------------------------------------------------------------------------------------
# What is not finite
# ---------------------------------------------------------------------------------------------------------------------


def test_a_step_without_a_finite_gradient_is_skipped_and_counted(small, monkeypatch, tmp_path, capsys):
    """NaN in two steps: weights and moments stay, the log says so with strict JSON, the run goes on."""
    real, steps = train.policy_loss, []

    def loss(*args):
        steps.append(1)
        return real(*args) * {2: math.nan, 3: math.inf}.get(len(steps), 1)

    monkeypatch.setattr(train, "policy_loss", loss)
    results = small(tmp_path / "run")
    lines = log_lines(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [False, True, True, False] and results["skipped_steps"] == 2
    assert lines[1]["grad_norm"] is None and not re.search("NaN|Inf", (tmp_path / "run/log.jsonl").read_text())
    said = capsys.readouterr().out
    assert said.count("SKIPPED") == 2 and "2 steps were skipped" in said


@pytest.mark.parametrize("checkpoint", [False, True])
def test_three_skipped_steps_in_a_row_stop_with_advice(small, monkeypatch, tmp_path, checkpoint):
    """Logits that turn NaN, as a learning rate beyond all bounds makes them: sampling survives, learning refuses."""
    if checkpoint:
        real = train.train_step

        def step(task, solver, editor, optimizer, pool, s, i, accelerator):
            if i == 1:
                with torch.no_grad():
                    optimizer.params[0].fill_(math.nan)
            return real(task, solver, editor, optimizer, pool, s, i, accelerator)

        monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(SystemExit, match="Three steps in a row had no finite gradient: .*lower --lr"):
        small(tmp_path / "run", lr=1e-3 if checkpoint else 1e38, steps=9, grow_every=0)
    assert [line["skipped"] for line in log_lines(tmp_path / "run")] == [False, True, True, True]


# ---------------------------------------------------------------------------------------------------------------------
# What a run says of itself, and when it stops
# ---------------------------------------------------------------------------------------------------------------------


def test_without_headroom_a_run_stops_before_it_starts(small, monkeypatch, tmp_path, capsys):
    """Where nothing is ever right, perfect instructions are worth nothing; where they are not, the run goes on."""
    small_world(monkeypatch.setattr)
    monkeypatch.setattr(data.Mini, "perfect_instructions", lambda self, domain: "perfect")
    monkeypatch.setattr(data.Mini, "grade", lambda self, problem, text: data.Grade(False, text))
    with pytest.raises(SystemExit, match="There is no headroom: .* --solver"):
        small(tmp_path / "none", steps=2)
    assert "the seed instructions score 0.000, perfect instructions 0.000" in capsys.readouterr().out
    assert not (tmp_path / "none/log.jsonl").exists()

    monkeypatch.setattr(evolve, "headroom", lambda *args: (0.0, 0.5))
    small(tmp_path / "some", steps=1, grow_every=0)
    assert (tmp_path / "some/log.jsonl").exists()


def lines_of(valid: float, spread: float, cut: int = 0) -> list[dict]:
    return [{"valid": valid, "spread": spread, "cut": cut} for _ in range(train.EARLY)]


@pytest.mark.parametrize("lines, settings, sentences", [
    (lines_of(0.0, 0.0), {}, ["no edit of the first 3 steps could be used (no tags)", "<a sample>", "larger --model"]),
    (lines_of(0.0, 0.0, cut=8), {}, ["most edits were cut off", "--editor-tokens than 6"]),
    (lines_of(1.0, 0.0), {}, ["no edit was better than another", "score 0.250 to 0.250", "--holdout"]),
    (lines_of(1.0, 0.0), dict(group=1, advantage="grpo"), ["--group 2 or more"]),
    (lines_of(1.0, 0.1), {}, []), (lines_of(0.5, 0.1), {}, []), (lines_of(0.0, 0.0)[1:], {}, []),
    (lines_of(0.0, 0.0) + lines_of(0.0, 0.0), {}, []),  # it has been let through before
    (lines_of(0.0, 0.0), dict(steps=3), []), (lines_of(0.0, 0.0), dict(states=1, group=1), []),
])  # fmt: skip
def test_a_run_that_cannot_learn_stops_with_a_sample_and_a_flag(lines, settings, sentences):
    s = evolve.with_presets(train.Config(**SETTINGS | dict(steps=9) | settings))
    edit = evolve.Edit("<a sample>", None, "no tags")
    rollout = train.EditGroup(StartState("d", "", 0.0, 0, 1.0), [], [], edits=[edit], after=[0.25, math.nan])
    if not sentences:
        return train.check_learning(lines, [rollout], s)
    with pytest.raises(SystemExit) as stop:
        train.check_learning(lines, [rollout], s)
    for sentence in ["This run cannot learn", "An edit for d: <a sample>", *sentences]:
        assert sentence in str(stop.value)


def test_training_notices_that_all_edits_are_worth_the_same(small, monkeypatch, tmp_path):
    monkeypatch.setattr(data.Mini, "grade", lambda self, problem, text: data.Grade(False, text))
    monkeypatch.setattr(data.Mini, "read_edit", lambda self, text: text or "-")
    with pytest.raises(SystemExit, match="no edit was better than another; the last ones score 0.000 to 0.000"):
        small(tmp_path / "run", steps=9)
    assert [line["spread"] for line in log_lines(tmp_path / "run")] == [0, 0, 0]


def test_a_rejected_edit_is_shown_where_all_are_lost():
    trees = {"a": EvolutionTree("seed", 0.5), "b": EvolutionTree("seed", 0.5)}
    trees["b"].add(0, "no  tags\nat all", None, note="nothing usable")
    assert evolve.rejected_edit(trees) == "\nAn edit for b (nothing usable): no tags at all"
    assert evolve.rejected_edit({"a": trees["a"]}) == ""
    editor = LocalModel.__new__(LocalModel)
    editor.usage = evolve.Usage(answers=10, unreadable=10)
    s = evolve.with_presets(evolve.Settings())
    with pytest.raises(SystemExit, match="(?s)Not one of the editor's 10 .*try another model.*An edit for b .*no tags"):
        evolve.edit_outcome(editor, trees, s)
    editor.usage.unreadable = 6
    assert "An edit for b" in evolve.edit_outcome(editor, trees, s)
    editor.usage.unreadable = 1
    assert evolve.edit_outcome(editor, trees, s) == ""


@pytest.mark.parametrize("step, every, since, saving, due", [
    (0, 0, 1.0, 0.0, True),  # the first one shows what it costs
    (5, 0, 19.0, 1.0, False), (5, 0, 21.0, 1.0, True), (9, 0, 0.0, 1.0, True),  # the last one
    (1, 3, 99.0, 0.0, False), (2, 3, 0.0, 9.0, True), (9, 3, 0.0, 9.0, True),
])  # fmt: skip
def test_checkpoints_take_a_twentieth_of_the_time_or_come_as_asked(step, every, since, saving, due):
    s = train.Config(steps=10, save_every=every)
    assert train.checkpoint_due(step, s, since, saving) is due


def test_a_slow_disk_gets_few_checkpoints(small, monkeypatch, tmp_path):
    real, saved = train.save_checkpoint, []

    def slow(out, s, optimizer, progress):
        saved.append(len(progress.lines))
        real(out, s, optimizer, progress)
        clock[0] += 10  # seconds

    def now() -> float:
        clock[0] += 0.01
        return clock[0]

    clock = [0.0]
    monkeypatch.setattr(train.time, "time", now)
    monkeypatch.setattr(train, "save_checkpoint", slow)
    small(tmp_path / "run", steps=4, save_every=0)
    assert saved == [1, 4]


def test_the_gain_is_paired(small, tmp_path, capsys):
    results = small(tmp_path / "run", steps=1)
    said = capsys.readouterr().out
    before, after = results["untrained"]["scores"], results["trained"]["scores"]
    assert before.keys() == after.keys() == {"test000", "test001"}
    assert results["trained"]["test_accuracy"] == pytest.approx(fmean(after.values()))
    assert results["gain"]["mean"] == pytest.approx(fmean(after[d] - before[d] for d in before))
    assert f"gain, paired       {results['gain']['mean']:+.3f} ± {results['gain']['stderr']:.3f}" in said
    assert train.paired_gain({"a": 0.5}, {"a": 0.25}) == {"mean": -0.25, "stderr": None, "better": 0, "worse": 1}


# ---------------------------------------------------------------------------------------------------------------------
# Early failure
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_calls(monkeypatch):
    def sample(*_, **__):
        raise AssertionError("a model was called")

    monkeypatch.setattr(LocalModel, "sample", sample)


def test_a_dry_run_calls_no_model_writes_nothing_and_counts_right(small, monkeypatch, tmp_path, capsys):
    """Its plan is what the run then does, to the last answer, when every edit is valid."""
    monkeypatch.setattr(data.Mini, "read_edit", lambda self, text: text or "-")
    # at most: where the seed instructions stay the best, the test asks once instead of twice
    monkeypatch.setattr(EvolutionTree, "best", lambda tree: tree.scored()[-1])
    real, counts = LocalModel.sample, []
    monkeypatch.setattr(LocalModel, "sample", lambda *_, **__: pytest.fail("a model was called"))
    assert small(tmp_path / "run", dry_run=True) is None and not (tmp_path / "run").exists()
    plan = capsys.readouterr().out
    assert "A dry run: no model was asked, nothing was written." in plan
    answers, edits = (int(n.replace(",", "")) for n in re.findall(r"(?:solver|editor) +([\d,]+)", plan))

    def sample(self, chats, n=1, max_new_tokens=512, **options):
        counts.append((max_new_tokens, n * len(chats)))
        return real(self, chats, n, max_new_tokens, **options)

    monkeypatch.setattr(LocalModel, "sample", sample)
    small(tmp_path / "run")
    assert answers == sum(n for tokens, n in counts if tokens == SETTINGS["solver_tokens"])
    assert edits == sum(n for tokens, n in counts if tokens == SETTINGS["editor_tokens"])


@pytest.mark.parametrize("settings, sentence", [
    (dict(states=0), "must be 1 or more"), (dict(test=0), "must be 1 or more"), (dict(k=0), "--k"),
    (dict(states=3, processes=2), "--states 3 cannot be shared by 2 processes"),
    (dict(editor_tokens=1900, solver_tokens=200), "reads 2048 tokens"),
    (dict(free=100), "may grow by .* MB, and its disk has 0 left"), (dict(nan=True), "not finite"),
    (dict(memory=100), "takes up to .* MB of this machine's memory, besides the GPU's, and 0 MB are left"),
    (dict(model="/no/where"), "No model can be loaded from /no/where"),
    (dict(task="bird"), "needs --data"), (dict(task="mmlu", data="/no/where"), "/no/where does not exist"),
    (dict(task="jsonl", data=__file__, model=""), "needs --model"), (dict(task="chess"), "No task 'chess'"),
])  # fmt: skip
def test_what_cannot_work_fails_at_once(small, monkeypatch, no_calls, base, tmp_path, settings, sentence):
    out = tmp_path / "run"
    if processes := settings.pop("processes", None):
        model = evolve.load_model(base)
        s = evolve.with_presets(train.Config(**SETTINGS | settings))
        with pytest.raises(ValueError, match=sentence):
            train.plan(data.Mini(), model, model, s, out, ["train000"], ["test000"], processes)
        return
    if free := settings.pop("free", None):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, free))
    if memory := settings.pop("memory", None):
        monkeypatch.setattr(train, "memory_free", lambda: memory)
    if settings.pop("nan", None):
        model = evolve.load_model(base)
        model.model.model.norm.weight.data[0] = math.inf
        evolve.save_model(model, tmp_path / "odd")
        settings = {"model": str(tmp_path / "odd")}
    if settings.get("task") == "jsonl":
        settings["data"] = str(tmp_path / "own.jsonl")
        (tmp_path / "own.jsonl").write_text('{"question": "1+1?", "answer": 2}\n')
    with pytest.raises((SystemExit, ValueError, OSError), match=f"(?s){sentence}"):  # __main__ makes one of all three
        small(out, **settings)
    assert not out.exists()


def test_the_plan_says_what_host_memory_the_optimizer_takes(base, monkeypatch):
    """8 bytes per weight in float32, on a resume or not; masters, moments and two passages for weights in 16 bits."""
    model = evolve.load_model(base).model
    weights = model.num_parameters()
    assert train.memory_line(model, True).startswith(f"host memory: up to {8 * weights / 1e6:.1f} MB")
    model.bfloat16()
    sizes = [float(train.memory_line(model, resume).split()[4]) for resume in (False, True)]
    assert sizes == pytest.approx([MasterAdamW.host_bytes(model) / 1e6, sizes[0] + 4e-6 * weights], abs=0.1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert float(train.memory_line(model, False).split()[4]) == pytest.approx(8 * sizes[0], abs=1)


def test_a_container_has_less_memory_than_its_machine(monkeypatch):
    there = {"memory.max": "9000000000\n", "memory.stat": "anon 4000000000\nfile 5000000000\n"}
    monkeypatch.setattr(train.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**10))
    monkeypatch.setattr(Path, "read_text", lambda path: there[path.name])
    assert train.memory_free() == 5 * 10**9
    there["memory.max"] = "max\n"
    assert train.memory_free() == 10**10


def test_too_few_problems_is_an_error_with_the_numbers_or_left_out(small, no_calls, tmp_path, capsys):
    """One of the domains is small: named with its size, before a model is called; --skip-small goes without it."""
    sizes = {"a": 12, "b": 12, "c": 3, "d": 12, "e": 12, "f": 12}
    lines = [{"question": f"{d}{i}?", "answer": "c", "domain": d} for d, size in sizes.items() for i in range(size)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = dict(task="jsonl", data=str(tmp_path / "own.jsonl"), dry_run=True)
    with pytest.raises(ValueError, match=r"1 of 4 train domains are too small \(--skip-small.* c has 3 problems"):
        small(tmp_path / "run", **settings)
    small(tmp_path / "run", skip_small=True, **settings)
    assert "Plan\n" in capsys.readouterr().out


def test_wrong_paths_end_in_a_sentence_not_in_a_traceback(command, base, tmp_path):
    """As the shell sees it: a message, which is exit code 1, and no traceback."""
    for args, sentence in (
        (["--task", "mmlu", "--data", tmp_path / "none", "--model", base], "train.py: --data .*none does not exist"),
        (["--task", "bird", "--model", base], "train.py: Task 'bird' needs --data"),
        (["--model", tmp_path], "No model can be loaded from"),
        (["--model", base, "--out", base / "config.json" / "x"], "cannot be written"),
    ):
        code, _ = command(*args)
        assert isinstance(code, str) and re.search(sentence, code) and "\n" not in code.strip(), code


def test_a_model_without_a_chat_template_is_refused(small, no_calls, base, tmp_path):
    bare = Path(shutil.copytree(base, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(SystemExit, match="no chat template"):
        small(tmp_path / "run", model=str(bare))


# ---------------------------------------------------------------------------------------------------------------------
# Real tasks without a GPU: a rehearsal
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_base(tmp_path_factory):
    """A small random Qwen3 with the real tokenizer."""
    if not (SHARED / "tokenizer/qwen3").exists():
        pytest.skip("needs ../shared")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizer/qwen3")
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, tie_word_embeddings=True, max_position_embeddings=32768,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("real") / "base"
    evolve.save_model(LocalModel(Qwen3ForCausalLM(config), tokenizer), folder)
    return folder


# By hand, without these: `python train.py --task bird --data ../shared/data/bird --model DIR --steps 2`, one minute.
SHORTER = dict(steps=2, rounds=1, grow_rounds=1, holdout=2, test=2, solver_tokens=6, editor_tokens=12)


@pytest.mark.parametrize("task, folder, domain", [
    ("bird", "bird", "video_games"), ("mmlu", "mmlu_redux", "public_relations"),
])  # fmt: skip
def test_a_rehearsal_of_a_real_task_runs_through(command, real_base, tmp_path, task, folder, domain):
    """Real data, real tokenizer, random weights: everything runs, nothing is learned, and it says so plainly."""
    out = tmp_path / "run"
    code, said = command(*flags(task=task, data=SHARED / folder, model=real_base, out=out, **SHORTER))
    assert code is None, code
    assert "No GPU here: what you do not set is a rehearsal's." in said
    assert "So its edits are invalid or worth nothing" in said and domain in said
    results = json.loads((out / "results.json").read_text())
    assert results["trained"]["test_accuracy"] == results["untrained"]["test_accuracy"] == 0.0
    assert [line["valid"] for line in log_lines(out)] == [0.0, 0.0]
    assert evolve.load_model(out / "editor").model.config.vocab_size > 150_000
