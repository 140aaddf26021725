"""How sure a median is: intervals by order statistics, which assume nothing of the distribution.

Of n independent values the median lies between the j-th smallest and the j-th largest with probability

    1 − 2 · P(Binomial(n, ½) < j)

(David and Nagaraja, "Order statistics", 3rd edition, 2003, section 7.1). Fewer than 6 values allow no interval of 95 %.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A median and where it lies with a probability of at least `LEVEL`."""

    median: float
    low: float
    high: float

    def overlaps(self, other: Interval) -> bool:
        """Whether the two have a value in common."""
        return self.low <= other.high and other.low <= self.high


def coverage(count: int, place: int) -> float:
    """Probability that the median lies between the `place`-th smallest and the `place`-th largest of `count` values (place ≥ 1)."""
    return 1 - 2 * sum(math.comb(count, below) for below in range(place)) / 2**count


def least_count(level: float = LEVEL) -> int:
    """How many values an interval of that level needs."""
    return next(count for count in range(1, 64) if coverage(count, 1) >= level)


def median_interval(values: Sequence[float], level: float = LEVEL) -> Interval | None:
    """The narrowest such interval of at least that level; None of too few values."""
    count, ordered = len(values), sorted(values)
    places = [place for place in range(1, (count + 1) // 2 + 1) if coverage(count, place) >= level]
    if not places:
        return None
    return Interval(median=statistics.median(ordered), low=ordered[places[-1] - 1], high=ordered[-places[-1]])
