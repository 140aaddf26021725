"""The race: all contestants take each training step in turn, in a new random order every round.

round 0:  ddp ours tp fsdp2 …      while one steps, the others wait on their pipes; so a slow minute of the
round 1:  tp fsdp2 ours ddp …      machine falls on all of them, and a round compares like with like
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from benchmarks.quiet import others_share, read_cpu
from benchmarks.ranks import RankStep, Team
from benchmarks.verdict import Sample, check_losses, quiet_steps


@dataclass(kw_only=True)
class Record:
    """All that was measured of one contestant; bytes for each rank."""

    samples: list[Sample] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    set_up_peak_bytes: list[int] = field(default_factory=list)


def race(teams: dict[str, Team], records: dict[str, Record], *, steps: int, limit_s: float, report: Callable[[str], None]) -> None:
    """Step all `teams` in turn, adding to `records`, until each has `steps` that count or `limit_s` is over.

    Raises `WrongNumbers` when losses differ, `ChildFailed` when a rank does not answer.
    """
    deadline = time.monotonic() + limit_s
    shuffle = random.Random(0)
    round_ = 0
    while time.monotonic() < deadline and any(quiet_steps(record.samples) < steps for record in records.values()):
        for name in shuffle.sample(list(teams), len(teams)):
            _step(teams[name], records[name], round_)
        latest = {name: record.samples[-1] for name, record in records.items()}
        report(_line(round_, latest))
        check_losses({name: sample.loss for name, sample in latest.items()}, round_)
        round_ += 1


def _step(team: Team, record: Record, round_: int) -> None:
    driver = psutil.Process()
    before = read_cpu(driver)
    ranks = team.step(round_)
    share = others_share(before, read_cpu(driver))
    record.peak_bytes = [rank.peak_bytes for rank in ranks]
    seconds = max(rank.seconds for rank in ranks)
    record.samples.append(Sample(round=round_, seconds=seconds, loss=_loss(ranks), others_share=share, actions=_actions(ranks)))


def _loss(ranks: list[RankStep]) -> float:
    return statistics.fmean(rank.loss for rank in ranks if rank.loss is not None)


def _actions(ranks: list[RankStep]) -> dict[str, float]:
    kinds = dict.fromkeys(kind for rank in ranks for kind in rank.actions)
    return {kind: statistics.fmean(rank.actions.get(kind, 0.0) for rank in ranks) for kind in kinds}


def _line(round_: int, latest: dict[str, Sample]) -> str:
    times = "  ".join(f"{name} {sample.seconds:.2f} s{'' if sample.counts else '*'}" for name, sample in latest.items())
    return f"round {round_}: {times}"
