"""Tests import the four files from the folder above, whatever folder pytest is started in."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
