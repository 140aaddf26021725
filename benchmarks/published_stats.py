"""How near predictions come to measurements: median error, rank correlation and regret.

`predicted` and `measured` are positive numbers of one unit, pair by pair; lower is better where one is chosen.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import combinations


def median_absolute_percentage_error(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """The median of |predicted / measured − 1| (0.1 is 10 %), NaN of nothing. Raises ValueError for other lengths or a measurement ≤ 0."""
    errors = [abs(guess / truth - 1) for guess, truth in _pairs(predicted, measured)]
    return statistics.median(errors) if errors else math.nan


def kendall_tau(predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Kendall's tau-b, between −1 and 1: (concordant − discordant) / √((pairs − ties in one) · (pairs − ties in the other)).

    None where either side is constant: there is nothing to rank. (M. G. Kendall, "The treatment of ties in ranking problems", 1945.)
    """
    pairs = _pairs(predicted, measured)
    signs = [(_sign(one[0] - other[0]), _sign(one[1] - other[1])) for one, other in combinations(pairs, 2)]
    untied = [sum(side != 0 for side in sides) for sides in zip(*signs, strict=True)] if signs else [0, 0]
    if 0 in untied:
        return None
    return sum(one * other for one, other in signs) / math.sqrt(untied[0] * untied[1])


def ranked_pairs(predicted: Sequence[float], measured: Sequence[float], margin: float) -> tuple[int, int]:
    """(ranked right, all) of the pairs whose measurements are more than `margin` (0.03 is 3 %) apart: those that noise does not decide."""
    pairs = combinations(_pairs(predicted, measured), 2)
    apart = [(one, other) for one, other in pairs if max(one[1], other[1]) / min(one[1], other[1]) > 1 + margin]
    return sum((one[0] - other[0]) * (one[1] - other[1]) > 0 for one, other in apart), len(apart)


def regret(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """What it costs to trust the prediction: measured time of the one predicted fastest ÷ fastest measured − 1; 0 is the right choice.

    Of several that are predicted equally fast the mean counts, as if one were drawn. Raises ValueError for no pair at all.
    """
    pairs = _pairs(predicted, measured)
    if not pairs:
        raise ValueError("regret of nothing: give at least one pair")
    best = min(guess for guess, _ in pairs)
    return statistics.fmean(truth for guess, truth in pairs if guess == best) / min(truth for _, truth in pairs) - 1


def mean(values: Iterable[float | None]) -> float:
    """Of the values that are numbers: None and NaN are left out, NaN of nothing."""
    kept = [value for value in values if value is not None and not math.isnan(value)]
    return statistics.fmean(kept) if kept else math.nan


def _pairs(predicted: Sequence[float], measured: Sequence[float]) -> list[tuple[float, float]]:
    if len(predicted) != len(measured):
        raise ValueError(f"{len(predicted)} predictions for {len(measured)} measurements")
    if any(not truth > 0 for truth in measured):
        raise ValueError(f"a measurement is {min(measured)}: all must be positive")
    return list(zip(predicted, measured, strict=True))


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
