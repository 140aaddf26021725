"""Processes at a part of their speed: stopped and continued in turn, a hundred times a second.

    speed 0.7     ▁▁▁▇▇▇▇▇▇▇▁▁▁▇▇▇▇▇▇▇        stopped for 3 ms of 10, whatever the process does, waiting included

All threads of a process stop, as those of a slower device would be slower. Needs no rights; the same for whoever is throttled.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from types import TracebackType

PERIOD_S = 0.01


class Throttled:
    """A context: meanwhile the processes `pids` run for a part `speed` (0 to 1, exclusive) of the time; afterwards all of it."""

    def __init__(self, pids: Sequence[int], speed: float) -> None:
        if not 0 < speed < 1:
            raise ValueError(f"a speed of {speed:g} is none between 0 and 1")
        self._pids, self._speed = pids, speed
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._alternate, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _alternate(self) -> None:
        """By the clock and not by pauses: one that lasts too long is no gain or loss."""
        start = time.monotonic()
        while not self._ended.is_set():
            into = (time.monotonic() - start) % PERIOD_S
            stopped_s = (1 - self._speed) * PERIOD_S
            self._send(signal.SIGSTOP if into < stopped_s else signal.SIGCONT)
            time.sleep((stopped_s if into < stopped_s else PERIOD_S) - into)
        self._send(signal.SIGCONT)

    def _send(self, number: signal.Signals) -> None:
        for pid in self._pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:  # it failed: who waits for it will tell
                self._ended.set()
