"""How the probe takes times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

__all__ = ["Stopwatch"]

_MOST, _LEAST = 200, 3


@dataclass(kw_only=True)
class Stopwatch:
    """Times of calls, each repeated for about ``budget_s``: the lower quartile, for whatever disturbs a call only ever lengthens it.

    A single-threaded call is timed by the CPU time of this thread: what it takes whatever else the machine does meanwhile.
    With several threads it is the wall time. The sums of both tell how much else there was.
    """

    budget_s: float
    wall_s: float = field(default=0.0, init=False)
    cpu_s: float = field(default=0.0, init=False)
    returned_s: float = field(default=0.0, init=False)  # of single-threaded calls, had each taken the time that was returned

    @property
    def contention(self) -> float:
        """Wall time ÷ CPU time of all calls so far."""
        return self.wall_s / self.cpu_s if self.cpu_s else 1.0

    @property
    def unsteadiness(self) -> float:
        """How many times as long as the lower quartile a call takes on average.

        A virtual machine's caches and memory are not always as fast; a step takes the mean. Of all single-threaded calls together, since a
        few of a kind are too few for a mean; 1 with several threads, where other processes lengthen the wall time.
        """
        return self.cpu_s / self.returned_s if self.returned_s else 1.0

    def seconds(self, function: Callable[[], object], before: Callable[[], object] | None = None) -> float:
        """Time of a call, s; the first call is not counted. before: called before each, not timed."""
        function()
        alone = torch.get_num_threads() == 1
        clock = time.thread_time if alone else time.perf_counter
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < _LEAST or (time.perf_counter() - begin < self.budget_s and len(times) < _MOST):
            if before is not None:
                before()
            start = clock()
            function()
            times.append(clock() - start)
        self.wall_s += time.perf_counter() - begin
        self.cpu_s += sum(times)
        quartile = max(statistics.quantiles(times, n=4, method="inclusive")[0], 1e-9)
        if alone:
            self.returned_s += quartile * len(times)
        return quartile
