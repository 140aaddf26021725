"""Helpers of the tests (`tests.models`, `tests.sharding.brute_force`, …) are found beside the tests that import them. Each of the processes
that run tests computes with one thread: GNU OpenMP hangs in a forked child whose parent has used several."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)
