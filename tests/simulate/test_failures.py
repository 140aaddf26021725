"""Failures: the formula against a job whose failures are drawn."""

from __future__ import annotations

import math
import random

import pytest

import shardwise as sw
from shardwise.simulate.failures import Failures, Goodput, goodput, optimal_interval_s

DAY_S = 86400.0


def lived(failures: Failures, steps: int, step_time_s: float, intervals: int, seed: int) -> Goodput:
    """The shares of a job that goes through so many intervals, failure by failure."""
    dice = random.Random(seed)
    interval_s = steps * step_time_s
    spent = dict.fromkeys(("useful", "checkpoints", "lost", "restarts"), 0.0)
    for _ in range(intervals):
        while True:
            failure_s = dice.expovariate(1 / failures.mtbf_s)
            if failure_s >= interval_s + failures.checkpoint_s:
                break
            spent["lost"] += failure_s
            while (again_s := dice.expovariate(1 / failures.mtbf_s)) < failures.restart_s:
                spent["restarts"] += again_s
            spent["restarts"] += failures.restart_s
        spent["useful"] += interval_s
        spent["checkpoints"] += failures.checkpoint_s
    total_s = sum(spent.values())
    shares = {name: seconds / total_s for name, seconds in spent.items()}
    return Goodput(steps=steps, interval_s=interval_s, step_time_s=step_time_s / shares["useful"], **shares)


@pytest.mark.parametrize(
    ("mtbf_s", "checkpoint_s", "restart_s"), [(10_000.0, 30.0, 300.0), (2_000.0, 120.0, 600.0), (500.0, 60.0, 0.0), (300.0, 200.0, 300.0)]
)
@pytest.mark.parametrize("share", [0.3, 1.0, 2.0])
def test_the_shares_are_those_of_drawn_failures(mtbf_s: float, checkpoint_s: float, restart_s: float, share: float) -> None:
    every_s = share * optimal_interval_s(mtbf_s, checkpoint_s)
    failures = Failures(mtbf_s=mtbf_s, checkpoint_s=checkpoint_s, restart_s=restart_s, every_s=every_s)
    found = goodput(failures, 5.0)
    drawn = lived(failures, found.steps, 5.0, 20_000, seed=1)
    for name in ("useful", "checkpoints", "lost", "restarts"):
        assert getattr(found, name) == pytest.approx(getattr(drawn, name), abs=0.006), name
    assert found.step_time_s == pytest.approx(drawn.step_time_s, rel=0.03)


@pytest.mark.parametrize("ratio", [1e-5, 1e-3, 0.02, 0.1, 0.5, 1.5])
def test_no_interval_is_much_better_than_the_optimal_one(ratio: float) -> None:
    """Against all intervals, one by one."""
    mtbf_s, step_time_s = 20_000.0, 1.0
    failures = Failures(mtbf_s=mtbf_s, checkpoint_s=ratio * mtbf_s, restart_s=100.0)
    found = goodput(failures, step_time_s)
    every = [0.01 * mtbf_s * 1.03**power for power in range(-200, 200)]
    best = max(
        goodput(Failures(mtbf_s=mtbf_s, checkpoint_s=ratio * mtbf_s, restart_s=100.0, every_s=each), step_time_s).useful for each in every
    )
    assert found.useful >= best * (1 - 1e-3 if ratio <= 0.5 else 0.97)


def test_youngs_interval_is_the_limit_of_short_checkpoints() -> None:
    assert optimal_interval_s(1e6, 1.0) == pytest.approx(math.sqrt(2e6), rel=1e-3)


def test_shares_add_up() -> None:
    for mtbf_s in (1e1, 1e2, 1e4, 1e7):
        found = goodput(Failures(mtbf_s=mtbf_s, checkpoint_s=20.0, restart_s=200.0), 4.0)
        assert found.useful + found.checkpoints + found.lost + found.restarts == pytest.approx(1.0)
        assert found.interval_s == found.steps * 4.0


def test_a_job_that_never_gets_through_an_interval() -> None:
    found = goodput(Failures(mtbf_s=1.0, checkpoint_s=1000.0, restart_s=5.0), 4.0)
    assert found.useful == 0.0 and found.step_time_s == math.inf and found.restarts > 0.99


def test_without_failures_only_checkpoints_cost() -> None:
    found = goodput(Failures(mtbf_s=1e15, checkpoint_s=10.0, every_s=90.0), 1.0)
    assert found.useful == pytest.approx(0.9) and found.checkpoints == pytest.approx(0.1) and found.steps == 90


def test_an_interval_is_of_whole_steps() -> None:
    found = goodput(Failures(mtbf_s=1e4, checkpoint_s=0.0), 7.0)
    assert found.steps == 1, "free checkpoints are written after every step"
    assert goodput(Failures(mtbf_s=1e4, checkpoint_s=1.0, every_s=3.0), 7.0).interval_s == 7.0


def test_devices_fail_together_as_often_as_their_number() -> None:
    """466 interruptions in 54 days on 16,384 devices, of which 419 unexpected: one each 3.1 hours (Llama 3, Dubey et al. 2024, 3.3.4)."""
    of_one_s = 16_384 * 54 * DAY_S / 419
    job = Failures.of_devices(of_one_s, 16_384, checkpoint_s=30.0)
    assert job.mtbf_s == pytest.approx(3.1 * 3600, rel=0.01)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"mtbf_s": 0.0, "checkpoint_s": 1.0}, r"mtbf_s=0 is no time between events; give more than 0"),
        ({"mtbf_s": 1.0, "checkpoint_s": -1.0}, r"checkpoint_s=-1 is no duration; give 0 seconds or more"),
        ({"mtbf_s": 1.0, "checkpoint_s": 1.0, "restart_s": math.nan}, r"restart_s=nan is no duration"),
        ({"mtbf_s": 1.0, "checkpoint_s": 1.0, "every_s": 0.0}, r"every_s=0 is no time between events"),
    ],
)
def test_impossible_times_are_refused(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(sw.ShardwiseError, match=said):
        Failures(**wrong)


@pytest.mark.parametrize(("mtbf_min", "interval_min"), [(24 * 60, 117), (6 * 60, 57), (15, 9.1)])
def test_published_intervals(mtbf_min: float, interval_min: float) -> None:
    """Daly 2006, figures 3 to 5: checkpoints of 5 minutes."""
    assert optimal_interval_s(mtbf_min * 60, 5 * 60) == pytest.approx(interval_min * 60, rel=0.01)
