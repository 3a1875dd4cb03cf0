"""Tests import the four files from the folder above, whatever folder pytest is started in, and see no GPU.

Results on a GPU are rounded otherwise, and a model of a few thousand weights is slower there. Only tests/test_gpu.py
uses one, in a process of its own; what CUDA_VISIBLE_DEVICES was before is kept for it in LSE_TEST_GPUS.
"""

import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "miniature")]

if "LSE_TEST_GPUS" not in os.environ:  # a test may start pytest itself
    os.environ["LSE_TEST_GPUS"] = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anybody imports torch
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small gain nothing by more, and wait for each other
