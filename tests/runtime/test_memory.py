"""Peak memory of a process."""

from __future__ import annotations

import sys

import psutil
import pytest
import torch
from tests.clusters import made_up
from tests.models import gpt2

import shardwise as sw
from shardwise.runtime.launch import launch
from shardwise.runtime.memory import PeakMemory, give_back_freed_memory

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


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def test_freed_memory_is_given_back() -> None:
    """Small pieces lie in the allocator's heap; one that lives at its end keeps all of those before it there."""
    pieces = [torch.ones(100_000, dtype=torch.uint8) for _ in range(1000)]
    last = torch.ones(100_000, dtype=torch.uint8)
    del pieces
    held = resident_bytes()
    give_back_freed_memory()
    assert held - resident_bytes() > 80 * MB
    del last


def _left_after_set_up(plan: sw.Plan) -> int:
    job = sw.parallelize(*gpt2(layers=4), plan=plan, optimizer=torch.optim.SGD)
    held = resident_bytes()
    give_back_freed_memory()
    assert job.steps == 0
    return held - resident_bytes()


@pytest.mark.distributed
def test_setting_up_leaves_no_freed_memory_behind() -> None:
    """Capturing and lowering take some 100 MB for a while, which a rank's first step would find in pieces."""
    plan = sw.plan(*gpt2(layers=4), cluster=made_up(2), layout="pp=2,microbatches=2")
    assert isinstance(plan, sw.Plan)
    assert max(launch(_left_after_set_up, (plan,), ranks=2, threads=1)) < 8 * MB
