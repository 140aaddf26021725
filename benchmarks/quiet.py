"""Was the machine quiet during a step? The CPU time that other processes took, from the kernel's own counters.

    others = (CPU time of the whole machine) - (CPU time of the benchmark's process tree)

Time in interrupts is left out: the network's loopback runs there, on behalf of the contestants themselves. Time stolen by a
hypervisor is counted as others'.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import psutil

QUIET_SHARE = 0.05
"""A step counts when other processes took no more than this share of the machine's CPU time."""


@dataclass(frozen=True, kw_only=True)
class CpuReading:
    """Counters at one moment, in seconds: the clock, the machine's busy time, and the benchmark's part of it."""

    clock_s: float
    busy_s: float
    own_s: float


def read_cpu(root: psutil.Process) -> CpuReading:
    """Read the counters; `root` and all its descendants are the benchmark."""
    machine = psutil.cpu_times()
    busy = machine.user + machine.nice + machine.system + getattr(machine, "steal", 0.0)
    return CpuReading(clock_s=time.monotonic(), busy_s=busy, own_s=_tree_seconds(root))


def _tree_seconds(root: psutil.Process) -> float:
    return sum(_process_seconds(process) for process in [root, *root.children(recursive=True)])


def _process_seconds(process: psutil.Process) -> float:
    """CPU time of a process and of its ended children, which it has inherited; 0 when it ended meanwhile."""
    try:
        return sum(process.cpu_times()[:4])
    except psutil.Error:
        return 0.0


def others_share(before: CpuReading, after: CpuReading, cpus: int | None = None) -> float:
    """Return the share (0 to 1) of the machine's CPU time that other processes took between two readings."""
    available_s = (after.clock_s - before.clock_s) * (cpus or os.cpu_count() or 1)
    if available_s <= 0:
        raise ValueError(f"the second reading ({after.clock_s} s) must be later than the first ({before.clock_s} s)")
    others_s = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
    return min(1.0, max(0.0, others_s / available_s))


def is_quiet(share: float) -> bool:
    """Whether a step with this share of others' CPU time counts."""
    return share <= QUIET_SHARE
