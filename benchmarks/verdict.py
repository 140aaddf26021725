"""From samples to a verdict: pure functions, without torch."""

from __future__ import annotations

import enum
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.quiet import is_quiet

WARM_UP_STEPS = 2
MIN_QUIET_STEPS = 5
LOSS_TOLERANCE = 1e-4
MIN_SPEED = 1.0
"""Of the chosen layout, times the fastest of torch's own."""
MIN_SPEED_SCENARIO = 1.25
"""Of the chosen layout, times the fastest peer that runs at all, where the layout matters."""
MIN_SPEED_ALIKE = 0.97
"""Of a pinned layout, times torch's own way of the same."""
MIN_SPEED_IDEAL = 0.95
"""Of the chosen layout, times one process with all the cores."""
MAX_MEMORY_ALIKE = 1.05
"""Peak of the fullest rank in a pinned layout, times that of torch's own way of the same."""
MAX_TIME_ERROR = 0.15
MAX_MEMORY_ERROR = 0.08
MAX_DRIFT = 0.10
"""Of the predicted step time between this machine before and after a race."""


class WrongNumbers(Exception):
    """Contestants that should compute the same do not: there is nothing to compare."""


class Outcome(enum.Enum):
    """What a check can come to."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One step of one contestant: seconds of its slowest rank, the global loss, and others' share of the CPU meanwhile; `actions`: seconds
    by kind of action, the mean over the ranks."""

    round: int
    seconds: float
    loss: float
    others_share: float
    actions: Mapping[str, float] = field(default_factory=dict)

    @property
    def counts(self) -> bool:
        """Whether the step is a result: warm and quiet."""
        return self.round >= WARM_UP_STEPS and is_quiet(self.others_share)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The steps of one contestant that count."""

    median_s: float
    min_s: float
    max_s: float
    steps: int


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One bound, and what was measured against it."""

    text: str
    outcome: Outcome


def timing(samples: Iterable[Sample]) -> Timing | None:
    """Return the timing over the steps that count, or None when there are none."""
    seconds = [sample.seconds for sample in samples if sample.counts]
    if not seconds:
        return None
    return Timing(median_s=statistics.median(seconds), min_s=min(seconds), max_s=max(seconds), steps=len(seconds))


def quiet_steps(samples: Iterable[Sample]) -> int:
    """Return how many steps count."""
    return sum(sample.counts for sample in samples)


def check_losses(losses: Mapping[str, float], round_: int) -> None:
    """Raise `WrongNumbers` unless the contestants' losses of one step agree to a relative 1e-4."""
    low, high = min(losses, key=losses.__getitem__), max(losses, key=losses.__getitem__)
    middle = statistics.median(losses.values())
    if not losses[high] - losses[low] <= LOSS_TOLERANCE * abs(middle):
        told = ", ".join(f"{name} {loss:.7g}" for name, loss in losses.items())
        raise WrongNumbers(f"step {round_}: losses differ by more than a relative {LOSS_TOLERANCE:g}: {told}")


def furthest_off(losses: Mapping[str, float]) -> str:
    """Return whose loss is furthest from the median; what is no number is further than any."""
    middle = statistics.median([loss for loss in losses.values() if not math.isnan(loss)] or [0.0])
    return max(losses, key=lambda name: math.inf if math.isnan(losses[name]) else abs(losses[name] - middle))


def best_peer(timings: Mapping[str, Timing | None], peers: Sequence[str]) -> str | None:
    """Return the fastest of `peers`, or None when one of them has no timing."""
    medians = {name: found.median_s for name in peers if (found := timings.get(name)) is not None}
    return min(medians, key=medians.__getitem__) if medians and len(medians) == len(peers) else None


def enough(timings: Mapping[str, Timing | None], needed: int = MIN_QUIET_STEPS) -> bool:
    """Whether every contestant has at least `needed` steps that count."""
    return all(found is not None and found.steps >= needed for found in timings.values())


def relative_error(predicted: float, measured: float) -> float:
    """Return how far the prediction is off, as a part of what was measured; negative when it is too low."""
    return predicted / measured - 1


def worst_error(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Return the relative error of the rank whose prediction is furthest off."""
    return max(map(relative_error, predicted, measured), key=abs)


def speed_finding(ours: Timing, peer_name: str, peer: Timing, bound: float) -> Finding:
    """Ours against a peer."""
    ratio = peer.median_s / ours.median_s
    return Finding(text=f"speed {ratio:.3f} x {peer_name} (bound: at least {bound})", outcome=_passes(ratio >= bound))


def memory_finding(ours: Sequence[int], peer_name: str, peer: Sequence[int], bound: float) -> Finding:
    """The fullest rank of ours against that of a peer, bytes."""
    ratio = max(ours) / max(peer)
    return Finding(text=f"peak memory {ratio:.3f} x {peer_name} (bound: at most {bound})", outcome=_passes(ratio <= bound))


def error_finding(what: str, error: float, bound: float) -> Finding:
    """A prediction against its bound."""
    return Finding(text=f"predicted {what} off by {error:+.1%} (bound: {bound:.0%})", outcome=_passes(abs(error) <= bound))


def _passes(holds: bool) -> Outcome:
    return Outcome.PASS if holds else Outcome.FAIL


def overall(findings: Sequence[Finding]) -> Outcome:
    """Inconclusive when there is nothing to judge or something could not be judged, else fail when any bound is broken."""
    outcomes = {finding.outcome for finding in findings}
    if not outcomes or Outcome.INCONCLUSIVE in outcomes:
        return Outcome.INCONCLUSIVE
    return Outcome.FAIL if Outcome.FAIL in outcomes else Outcome.PASS
