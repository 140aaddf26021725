"""Peak memory of this process over what it held before: resident size on a CPU, allocated bytes on a GPU."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from pathlib import Path

import psutil
import torch

__all__ = ["PeakMemory", "give_back_freed_memory"]

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): resets the peak resident set size


class PeakMemory:
    """Measures from its construction on: build it before the model exists."""

    def __init__(self) -> None:
        give_back_freed_memory()
        self._resettable = _reset_peak()
        self._before = psutil.Process().memory_info().rss
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        """The most that was held at once since, less what was held before."""
        if torch.cuda.is_initialized():
            return torch.cuda.max_memory_allocated()
        peak = _peak_resident() if self._resettable else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _maxrss_unit()
        return max(0, peak - self._before)


def give_back_freed_memory() -> None:
    """Gives the system what is freed but kept by the allocator (glibc's), which lies between what lives and need not fit what comes."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)


def _reset_peak() -> bool:
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return _STATUS.exists()


def _peak_resident() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM in /proc/self/status")


def _maxrss_unit() -> int:
    return 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB on Linux
