"""How much of the work unlike devices get: blocks for unlike stages, samples for unlike copies. Both exactly.

stages   [ 0 1 2 3 4 5 │ 6 7 │ 8 ]       the units of a model in as many runs as there are stages, each stage with times of its own
copies     6 microbatches │ 2            as many microbatches as each copy can do while the others do theirs
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shardwise.errors import BatchError

__all__ = ["batch_shares", "cut_unlike"]

Table = npt.NDArray[np.float64]


def cut_unlike(tables: Sequence[Table], microbatches: int) -> list[int] | None:
    """The end of each stage's run of units for which a pipeline's step is shortest; None where no cut fits.

    tables: for each stage [units + 1, units + 1]: seconds of a microbatch, both ways, of the units from the row's to before the column's;
    infinite where they do not fit there or are none. No stage is without a unit.

    Minimises (microbatches − 1) × the slowest stage + all stages, which is what 1F1B takes (Narayanan et al. 2019) where sends are short.
    Each round finds the shortest sum among cuts whose slowest stage is faster than that of the round before (dynamic programming), until
    none is left or none can be better: a cut that no round finds has neither a shorter sum nor a faster slowest stage.
    """
    fastest, _ = _path(tables, np.maximum)
    if not np.isfinite(fastest):
        return None
    best, best_s, limit = None, np.inf, np.inf
    while True:
        total, ends = _path([np.where(table < limit, table, np.inf) for table in tables], np.add)
        if not np.isfinite(total) or (microbatches - 1) * fastest + total >= best_s:
            return best
        limit = max(table[start, end] for table, start, end in zip(tables, [0, *ends], ends, strict=False))
        if (seconds := (microbatches - 1) * limit + total) < best_s:
            best, best_s = ends, seconds


def _path(tables: Sequence[Table], join: Callable[..., Any]) -> tuple[float, list[int]]:
    """The least value of all stages' joined by sum or maximum, and the ends of the runs that have it."""
    value: Table = tables[0][0]
    back: list[npt.NDArray[np.intp]] = []
    for table in tables[1:]:
        options: Table = join(value[:, None], table)
        back.append(options.argmin(axis=0))
        value = options.min(axis=0)
    ends = [len(value) - 1]
    for came in reversed(back):
        ends.append(int(came[ends[-1]]))
    return float(value[-1]), ends[::-1]


def batch_shares(fill_s: Sequence[float], each_s: Sequence[float], units: int) -> list[int]:
    """How many of `units` microbatches each copy gets, one or more, so that the last, after fill_s + count × each_s, ends as early as can.

    Each goes to the copy that would end first with it: since more never end earlier, no other way ends before. Those that all have by any
    reckoning are given at once. BatchError where there are fewer microbatches than copies.
    """
    copies = range(len(each_s))
    if units < len(each_s):
        raise BatchError(f"{units} microbatches leave some of {len(each_s)} copies without one; take fewer copies or a larger batch")
    level = (units + sum(fill_s[d] / each_s[d] for d in copies)) / sum(1 / each_s[d] for d in copies)
    counts = [max(1, int((level - fill_s[d]) / each_s[d] * (1 - 1e-9))) for d in copies]
    if sum(counts) > units:
        counts = [1] * len(each_s)
    nexts = [(fill_s[d] + (counts[d] + 1) * each_s[d], d) for d in copies]
    heapq.heapify(nexts)
    for _ in range(units - sum(counts)):
        end_s, d = nexts[0]
        counts[d] += 1
        heapq.heapreplace(nexts, (end_s + each_s[d], d))
    return counts
