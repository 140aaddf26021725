"""What failures leave of a job's time: checkpoints, work done again, restarts.

    ├─ interval ─┤ck├─ interval ─┤ck├─ inter ✗ restart ├─ interval ─┤ck├ …
                                     └ lost ┘

Failures come at random with a constant rate, also while a checkpoint is written and while the job restarts (a Poisson process). Then, with
M the mean time between failures, τ the interval, δ a checkpoint and R a restart, an interval takes on average

    T = M · e^(R/M) · (e^((τ + δ)/M) − 1)

(Daly 2006, "A higher order estimate of the optimum checkpoint interval for restart dumps", section 3). Of it τ is useful, δ the checkpoint,
(e^((τ + δ)/M) − 1) · M · (e^(R/M) − 1) restarts, and the rest lost. The interval that wastes least is √(2δM) to first order (Young 1974,
"A first order approximation to the optimum checkpoint interval"); `optimal_interval_s` takes Daly's higher order (the same, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, expm1, inf, sqrt

from shardwise.errors import ShardwiseError

__all__ = ["Failures", "Goodput", "goodput", "optimal_interval_s"]

_MOST = 700.0  # beyond, e^x is no number: nothing useful is ever done


@dataclass(frozen=True, kw_only=True)
class Failures:
    """How often a job is interrupted, and what it does about it. Seconds.

    mtbf_s: mean time between failures of the whole job. checkpoint_s: training stands still for one checkpoint. restart_s: from a failure
    to training on from the last checkpoint. every_s: training between checkpoints; None: what wastes least.
    """

    mtbf_s: float
    checkpoint_s: float
    restart_s: float = 0.0
    every_s: float | None = None

    def __post_init__(self) -> None:
        least = {"mtbf_s": self.mtbf_s, "every_s": 1.0 if self.every_s is None else self.every_s}
        for name, value in least.items():
            if not 0 < value < inf:
                raise ShardwiseError(f"{name}={value:g} is no time between events; give more than 0 seconds")
        for name, value in {"checkpoint_s": self.checkpoint_s, "restart_s": self.restart_s}.items():
            if not 0 <= value < inf:
                raise ShardwiseError(f"{name}={value:g} is no duration; give 0 seconds or more")

    @classmethod
    def of_devices(
        cls, mtbf_s: float, devices: int, *, checkpoint_s: float, restart_s: float = 0.0, every_s: float | None = None
    ) -> Failures:
        """Of a job that any of its devices stops: so many times as often as one device fails."""
        return cls(mtbf_s=mtbf_s / devices, checkpoint_s=checkpoint_s, restart_s=restart_s, every_s=every_s)


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """Shares of all time, which add up to 1: useful (steps that last), checkpoints, lost (steps done again), restarts.

    steps: between checkpoints; interval_s: what they take; step_time_s: of a step that lasts, all else spread over them.
    """

    steps: int
    interval_s: float
    step_time_s: float
    useful: float
    checkpoints: float
    lost: float
    restarts: float


def optimal_interval_s(mtbf_s: float, checkpoint_s: float) -> float:
    """Of training between checkpoints, seconds; as much as a mean time between failures where a checkpoint takes twice that or more."""
    ratio = checkpoint_s / (2 * mtbf_s)
    if ratio >= 1:
        return mtbf_s
    return sqrt(2 * checkpoint_s * mtbf_s) * (1 + sqrt(ratio) / 3 + ratio / 9) - checkpoint_s


def goodput(failures: Failures, step_time_s: float) -> Goodput:
    """What is left of the time of a job with such steps; checkpoints are written after whole steps, one at least."""
    wanted_s = optimal_interval_s(failures.mtbf_s, failures.checkpoint_s) if failures.every_s is None else failures.every_s
    steps = max(1, round(wanted_s / step_time_s))
    mtbf_s, interval_s = failures.mtbf_s, steps * step_time_s
    taken_s = interval_s + failures.checkpoint_s
    if (taken_s + failures.restart_s) / mtbf_s > _MOST:
        restarts = -expm1(-failures.restart_s / mtbf_s)
        return Goodput(
            steps=steps, interval_s=interval_s, step_time_s=inf, useful=0.0, checkpoints=0.0, lost=1 - restarts, restarts=restarts
        )
    failed = expm1(taken_s / mtbf_s)  # times that an interval fails, on average
    total_s = failed * mtbf_s * exp(failures.restart_s / mtbf_s)
    useful = interval_s / total_s
    return Goodput(
        steps=steps,
        interval_s=interval_s,
        step_time_s=step_time_s / useful,
        useful=useful,
        checkpoints=failures.checkpoint_s / total_s,
        lost=(failed * mtbf_s - taken_s) / total_s,
        restarts=failed * mtbf_s * expm1(failures.restart_s / mtbf_s) / total_s,
    )
