"""Nothing is lost: training that is killed, interrupted, or meets a full disk or a torn file ends as if it had not."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import tiny
import torch
from tiny import SETTINGS, end_state, flags, log_lines, small_world

import train

KILLS = 10
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


class Zygote:
    """The other end of zygote.py."""

    def __init__(self, folder: Path) -> None:
        script = Path(__file__).with_name("zygote.py")
        env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True)
        self.process = subprocess.Popen([sys.executable, "-W", "ignore", str(script)], **pipes)
        self.output = folder / "said"
        assert self.process.stdout.readline() == "ready\n"

    def start(self, **order) -> int:
        """The pid of a child that runs train.py with order["args"]."""
        self.process.stdin.write(json.dumps({"out": str(self.output), **order}) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> tuple[int, str]:
        """(exit status, negative for a signal; all it said)."""
        return int(self.process.stdout.readline()), self.output.read_text(errors="replace")

    def run(self, **order) -> tuple[int, str]:
        self.start(**order)
        return self.wait()


def cpu_seconds(pid: int) -> float | None:
    """CPU time of a process; None when it has ended. Unlike the clock, it does not depend on what else is running."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def zygote(folder):
    zygote = Zygote(folder)
    yield zygote
    zygote.process.stdin.close()
    zygote.process.wait(30)


@pytest.fixture(scope="module")
def base(folder):
    return tiny.random_base(folder / "base")


@pytest.fixture(scope="module")
def arguments(base):
    return flags(**SETTINGS, model=base)


@pytest.fixture(scope="module")
def whole(folder, zygote, arguments):
    """The run that nothing happened to."""
    status, said = zygote.run(args=[*arguments, "--out", str(folder / "whole")])
    assert status == 0, said
    return folder / "whole"


def kill_and_resume(zygote, arguments: list[str], out: Path, kills: int, rng: random.Random, longest: float) -> None:
    """Kill the run after up to `longest` CPU seconds and go on, until `kills` of them have hit it; then let it end."""
    arguments, hits = [*arguments, "--out", str(out)], 0
    while hits < kills:
        pid = zygote.start(args=[*arguments, *(["--resume"] if (out / "config.json").exists() else [])])
        deadline = rng.uniform(0, longest)
        while (used := cpu_seconds(pid)) is not None and used < deadline:
            time.sleep(0.002)
        if used is not None:
            os.kill(pid, signal.SIGKILL)
        status, said = zygote.wait()
        assert status in (0, -signal.SIGKILL), said
        hits += status != 0
    status, said = zygote.run(args=[*arguments, "--resume"])
    assert status == 0, said


def test_killed_ten_times_it_ends_as_if_it_had_not(zygote, folder, arguments, whole):
    """SIGKILL at ten random moments of two runs, spread over loading, growing, RL, checkpoints and evaluation."""
    total, rng = 0.0, random.Random(7)
    pid = zygote.start(args=[*arguments, "--out", str(folder / "timed")])  # how long it takes
    while (used := cpu_seconds(pid)) is not None:
        total = used
        time.sleep(0.01)
    assert zygote.wait()[0] == 0
    assert end_state(folder / "timed") == end_state(whole)  # two runs with one seed
    for out, more in ((folder / "a", []), (folder / "b", ["--save-every", "3"])):
        kill_and_resume(zygote, [*arguments, *more], out, KILLS // 2, rng, total * 0.7)
        assert end_state(out) == end_state(whole)


# ---------------------------------------------------------------------------------------------------------------------
# In this process, in a smaller world
# ---------------------------------------------------------------------------------------------------------------------

SHORT = SETTINGS | dict(steps=2, rounds=1, grow_rounds=1, grow_every=0, states=2)


class Killed(BaseException):
    """Stands in for SIGKILL: nothing in the program catches it."""


@pytest.fixture
def small(monkeypatch, base):
    """run(out, **settings): train in the tiny world of one training and one test domain."""
    small_world(monkeypatch.setattr, domains=(1, 1))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda out, **settings: train.main(train.Config(**SHORT | dict(model=str(base), out=str(out)) | settings))
    torch.set_num_threads(threads)


def test_killed_before_or_after_any_file_appears(small, monkeypatch, tmp_path):
    """Every file comes into being by one os.replace. Killed right before or after it, nothing is lost or doubled."""
    small(tmp_path / "whole")
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) == fatal and before:
            raise Killed
        real(source, target)
        if len(calls) == fatal:
            raise Killed

    monkeypatch.setattr(os, "replace", replace)
    fatal = 0
    small(tmp_path / "counted")
    names = [Path(name).name for name in calls]
    assert names[:5] == ["config.json", "log.jsonl", "checkpoint-000001.pt", "log.jsonl", "checkpoint-000002.pt"]
    moments = [(fatal, before) for fatal in range(2, names.index("results.json") + 2) for before in (True, False)]
    for fatal, before in moments[:: 1 if len(moments) < 14 else 2]:
        out = tmp_path / f"{fatal}-{before}"
        calls.clear()
        with pytest.raises(Killed):
            small(out)
        fatal = 0
        small(out, resume=True)
        assert end_state(out) == end_state(tmp_path / "whole")
        shutil.rmtree(out)


def test_a_torn_checkpoint_is_refused_and_the_one_before_it_used(small, monkeypatch, tmp_path, capsys):
    small(tmp_path / "whole")
    for torn in (lambda data: data[: len(data) // 2], lambda data: b"", lambda data: bytes(len(data))):
        out = Path(shutil.copytree(tmp_path / "whole", tmp_path / "torn", dirs_exist_ok=True))
        newest = out / "checkpoint-000002.pt"
        newest.write_bytes(torn(newest.read_bytes()))
        capsys.readouterr()
        small(out, resume=True)
        said = capsys.readouterr().out
        assert f"{newest} is refused (" in said and "checkpoint-000001.pt: going on after 1 steps" in said
        assert end_state(out) == end_state(tmp_path / "whole")
    for file in out.glob("*.pt"):
        file.write_bytes(b"torn")
    small(out, resume=True)
    assert "starting with the first step" in capsys.readouterr().out
    assert end_state(out) == end_state(tmp_path / "whole")


@pytest.mark.parametrize("settings", [dict(lr=0.5), dict(seed=3), dict(wide=True)])
def test_a_foreign_checkpoint_is_refused(small, base, tmp_path, capsys, settings):
    """Other settings, or another model's weights: never loaded, never deleted."""
    if settings.pop("wide", False):  # the same name for another model
        wide = tiny.random_base(tmp_path / "wide", hidden=24)
        small(tmp_path / "foreign", steps=3, model=str(wide), rounds=1)
        state = torch.load(tmp_path / "foreign/checkpoint-000003.pt", weights_only=True)
        torch.save(state | {"run": state["run"] | {"model": str(base)}}, tmp_path / "foreign/checkpoint-000003.pt")
    else:
        small(tmp_path / "foreign", steps=3, **settings)
    small(tmp_path / "run")
    before = end_state(tmp_path / "run")
    foreign = Path(shutil.copy(tmp_path / "foreign/checkpoint-000003.pt", tmp_path / "run/checkpoint-000003.pt"))
    small(tmp_path / "run", resume=True)
    assert f"{foreign} is refused (ValueError('it belongs to another run'))" in capsys.readouterr().out
    foreign.unlink()
    assert end_state(tmp_path / "run") == before


def test_settings_on_resume(small, tmp_path):
    """A length may change, the folder may move; any other change is refused by name. A run is never overwritten."""
    small(tmp_path / "long", steps=3)
    small(tmp_path / "run")
    config = (tmp_path / "run/config.json").read_text()
    with pytest.raises(SystemExit, match="--lr was 0.001, is now 0.01"):
        small(tmp_path / "run", resume=True, lr=0.01)
    with pytest.raises(SystemExit, match="--resume.*--overwrite"):
        small(tmp_path / "run")
    with pytest.raises(SystemExit, match="no run to resume"):
        small(tmp_path / "none", resume=True)
    assert (tmp_path / "run/config.json").read_text() == config and not (tmp_path / "none").exists()
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    small(moved, resume=True, steps=3, save_every=2)
    assert [line["step"] for line in log_lines(moved)] == [0, 1, 2]
    assert log_lines(moved)[2]["lr"] == log_lines(tmp_path / "long")[2]["lr"]
    with pytest.raises(ValueError, match="moved is 3 steps old: give --steps as many or more"):
        small(moved, resume=True, steps=2)
    assert json.loads((moved / "config.json").read_text())["steps"] == 3
    small(moved, overwrite=True, lr=0.01)
    assert len(log_lines(moved)) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Disks and people
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("write failed\nat line 1")])
def test_a_full_disk_leaves_the_last_checkpoint(small, monkeypatch, tmp_path, error):
    """One sentence, nothing half written in sight, and the run goes on once there is room."""
    small(tmp_path / "whole")
    real, saved = torch.save, []

    def save(state, file):
        saved.append(file)
        if len(saved) == 2:
            Path(file).write_bytes(b"half a checkpoint")
            raise error
        real(state, file)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(SystemExit) as stop:
        small(tmp_path / "run")
    assert "checkpoint-000002.pt cannot be written" in stop.value.code and "--resume" in stop.value.code
    assert "\n" not in stop.value.code
    assert [file.name for file in tmp_path.glob("run/*checkpoint*")] == ["checkpoint-000001.pt"]
    small(tmp_path / "run", resume=True)
    assert end_state(tmp_path / "run") == end_state(tmp_path / "whole")


def test_a_limit_on_file_size_ends_with_a_sentence(zygote, folder, arguments, whole):
    """The same with the real torch.save and the real system call, for a checkpoint and for the editor."""
    size = sorted(whole.glob("*.pt"))[0].stat().st_size
    weights = (whole / "editor/model.safetensors").stat().st_size
    first = size - 5000  # the pool and the log are small at first: one checkpoint may fit and the next not
    assert weights < first
    status, said = zygote.run(args=[*arguments, "--out", str(folder / "full")], fsize=first)
    assert status == 1 and "Traceback" not in said
    assert "cannot be written" in said.splitlines()[-1] and "make room" in said.splitlines()[-1]
    assert not list((folder / "full").glob("*.tmp"))
    status, said = zygote.run(args=[*arguments, "--out", str(folder / "full"), "--resume", "--save-every", "99"],
                              fsize=weights - 100)
    assert status == 1 and "Traceback" not in said and "cannot be written" in said.splitlines()[-1]
    status, said = zygote.run(args=[*arguments, "--out", str(folder / "full"), "--resume"])
    assert status == 0 and end_state(folder / "full") == end_state(whole)


@pytest.mark.skipif(os.name == "nt" or os.getuid() != 0, reason="needs root to become somebody else")
def test_a_read_only_folder(zygote, base):
    """Somebody else's folder, for a new run and for one to go on with: refused with a sentence, and nothing changes."""
    shared = Path(tempfile.mkdtemp())  # pytest's own folders are closed to others
    shutil.copytree(base, shared / "base")
    arguments = flags(**SHORT | dict(steps=1), model=shared / "base")
    try:
        assert zygote.run(args=[*arguments, "--out", str(shared / "run")])[0] == 0
        for path in (shared, *shared.rglob("*")):
            path.chmod(0o755)
        before = [(path, path.stat().st_mtime_ns) for path in sorted(shared.rglob("*"))]
        for out, more in ((shared / "new", []), (shared / "run", ["--resume", "--steps", "2"])):
            status, said = zygote.run(args=[*arguments, "--out", str(out), *more], user=65534)
            assert status == 1 and "Traceback" not in said and f"{out} cannot be written" in said.splitlines()[-1]
        assert [(path, path.stat().st_mtime_ns) for path in sorted(shared.rglob("*"))] == before
    finally:
        shutil.rmtree(shared)


def test_ctrl_c(zygote, folder, arguments, whole):
    """It says how to go on, and going on ends where the whole run did."""
    out = folder / "interrupted"
    pid = zygote.start(args=[*arguments, "--out", str(out)])
    while not (out / "log.jsonl").exists():
        time.sleep(0.005)
    os.kill(pid, signal.SIGINT)
    status, said = zygote.wait()
    assert status == 1 and "Traceback" not in said
    assert said.splitlines()[-1] == "Stopped. What is finished is saved: run the same command with --resume."
    status, said = zygote.run(args=[*arguments, "--out", str(out), "--resume"])
    assert status == 0 and end_state(out) == end_state(whole)
