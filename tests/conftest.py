"""Helpers of the tests (`tests.models`, `tests.sharding.brute_force`, …) are found beside the tests that import them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
