"""Run `python evolve.py ...` as a process of its own, without paying for the import of torch and transformers again.

A fork server (a process that has imported evolve.py's modules and does nothing) forks a child for each command; the
child executes evolve.py, or another script, from its first line as `__main__`. What it prints goes to a file.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub

ROOT = Path(__file__).resolve().parents[1]


def in_child(script: str, args: list[str], folder: str, env: dict[str, str], rename: int) -> None:
    """What the child does; `rename` > 0 kills it, as a power cut would, just before it renames its n-th file."""
    log = os.open(os.path.join(folder, "output.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.chdir(folder)
    os.environ.update(env)
    # Offline, huggingface_hub would not even reach this machine's own servers.
    huggingface_hub.constants.HF_HUB_OFFLINE = env.get("HF_HUB_OFFLINE") == "1"
    replace, renames = os.replace, iter(range(1, 10**6))

    def replace_or_die(*paths: str) -> None:
        if next(renames) == rename:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    os.replace = replace_or_die
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores it
    sys.argv, sys.stdout = [script, *args], open(1, "w", encoding="utf-8", closefd=False)
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.stdout.flush()


class Command:
    """A running `python evolve.py`, in `folder`."""

    def __init__(self, args: list[object], folder: Path, env: Mapping[str, str] = {}, rename: int = 0,
                 script: str = "evolve.py") -> None:
        self.folder = folder
        fork = multiprocessing.get_context("forkserver")
        os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"  # for the preloading
        fork.set_forkserver_preload(["evolve", "cli", "pytest"])  # pytest: what the children's parent runs
        self.process = fork.Process(target=in_child, args=(script, [*map(str, args)], str(folder), dict(env), rename))
        self.process.start()

    def wait(self, seconds: float = 120) -> tuple[int, str]:
        """(exit code, all that it printed)"""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running: {self.output()[-2000:]}"
        return self.process.exitcode, self.output()

    def output(self) -> str:
        return (self.folder / "output.txt").read_text(encoding="utf-8", errors="replace")


def run(args: list[object], folder: Path, env: Mapping[str, str] = {}, rename: int = 0,
        script: str = "evolve.py") -> tuple[int, str]:
    return Command(args, folder, env, rename, script).wait()
