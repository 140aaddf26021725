"""What this machine is: processor, cores, memory."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil

__all__ = ["available_cores", "available_memory_bytes", "processor_name"]

_CGROUP = Path("/sys/fs/cgroup")  # version 2, as containers have it


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory_bytes() -> int:
    """Memory that processes could still take: of the machine, and of the container around us where it is limited."""
    machine = int(psutil.virtual_memory().available)
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    return machine if limit is None or used is None else max(1, min(machine, limit - used))


def processor_name() -> str:
    """The processor's model, as exactly as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("model name", "cpu family", "model", "stepping")
    fields = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    return " ".join(fields[name] for name in wanted if name in fields) or platform.machine()


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
