"""The peak resident size of this process since a chosen moment."""

from __future__ import annotations

import resource
import threading
from pathlib import Path
from typing import Protocol

import psutil

SAMPLE_EVERY_S = 0.005


class PeakMeter(Protocol):
    """Measures the highest resident size since the last reset."""

    def reset(self) -> None:
        """Forget the past: the peak is now the present size."""

    def peak_bytes(self) -> int:
        """Return the highest resident size since the last reset."""


def peak_meter() -> PeakMeter:
    """Return the kernel's exact meter, or one that samples where the kernel does not permit its reset."""
    try:
        meter = KernelPeak()
        meter.reset()
    except OSError:
        return SampledPeak()
    return meter


def resident_bytes() -> int:
    """Return the resident size of this process."""
    return int(psutil.Process().memory_info().rss)


def limit_data(more_bytes: int) -> None:
    """From now on this process may map so much more private memory than it has; the system refuses what is beyond (RLIMIT_DATA)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (1024 * kib + more_bytes, resource.RLIM_INFINITY))


class KernelPeak:
    """Linux keeps the peak itself (`VmHWM`); writing 5 to `clear_refs` resets it (proc(5))."""

    def reset(self) -> None:
        """Forget the past."""
        Path("/proc/self/clear_refs").write_text("5")

    def peak_bytes(self) -> int:
        """Return the peak since the last reset."""
        lines = Path("/proc/self/status").read_text().splitlines()
        kib = next(line.split()[1] for line in lines if line.startswith("VmHWM:"))
        return int(kib) * 1024


class SampledPeak:
    """A thread that looks at the resident size every few milliseconds."""

    def __init__(self) -> None:
        self._peak = resident_bytes()
        threading.Thread(target=self._watch, daemon=True).start()

    def reset(self) -> None:
        """Forget the past."""
        self._peak = resident_bytes()

    def peak_bytes(self) -> int:
        """Return the peak since the last reset."""
        return max(self._peak, resident_bytes())

    def _watch(self) -> None:
        pause = threading.Event()
        while not pause.wait(SAMPLE_EVERY_S):
            self._peak = max(self._peak, resident_bytes())
