"""`python train.py ...` many times for the price of one import: a fresh interpreter that forks a child for each run.

Each line of stdin is a JSON object {"args": [...], "out": file, "fsize": bytes or null, "user": uid or null}; the reply
is the child's pid, and later its exit status as another line. The children live in the tiny world of `tiny.py`, on one
thread and without a GPU, so that runs repeat bit for bit.
"""

import json
import os
import resource
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def child(order: dict) -> None:
    """Be `python train.py ARGS`, as little privileged as the order says."""
    file = os.open(order["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if order.get("fsize"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["fsize"], order["fsize"]))
    if order.get("user"):
        os.setuid(order["user"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["train.py", *order["args"]]
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        status = 0
    except SystemExit as error:  # what the interpreter would make of it
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    import tiny
    import torch

    torch.set_num_threads(1)
    tiny.small_world()
    # What is loaded late, a child without rights could not load.
    tiny.make_base.mini_tokenizer().apply_chat_template([{"role": "user", "content": ""}])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(json.loads(line))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
