"""Peak memory of a process."""

from __future__ import annotations

import sys

import pytest
import torch

from shardwise.runtime.memory import PeakMemory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peaks can be reset on Linux only")

MB = 10**6


def test_a_peak_counts_even_after_it_is_over() -> None:
    memory = PeakMemory()
    big = torch.ones(100 * MB, dtype=torch.uint8)
    del big
    assert 95 * MB < memory.peak_bytes() < 130 * MB


def test_what_was_there_before_does_not_count() -> None:
    before = torch.ones(200 * MB, dtype=torch.uint8)
    memory = PeakMemory()
    assert memory.peak_bytes() < 20 * MB
    del before


def test_an_earlier_peak_does_not_count() -> None:
    big = torch.ones(200 * MB, dtype=torch.uint8)
    del big
    assert PeakMemory().peak_bytes() < 20 * MB
