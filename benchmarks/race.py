"""The race: all contestants take each training step in turn, in a new random order every round.

round 0:  ddp ours tp fsdp2 …      while one steps, the others wait on their pipes; so a slow minute of the
round 1:  tp fsdp2 ours ddp …      machine falls on all of them, and a round compares like with like
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil

from benchmarks.processes import ChildFailed
from benchmarks.quiet import others_share, read_cpu
from benchmarks.ranks import RankStep, Team
from benchmarks.verdict import Sample, WrongNumbers, check_losses, furthest_off, quiet_steps


@dataclass(kw_only=True)
class Record:
    """All that was measured of one contestant; bytes for each rank. failure: why it does not take part any more."""

    samples: list[Sample] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    set_up_peak_bytes: list[int] = field(default_factory=list)
    failure: str = ""


def race(teams: dict[str, Team], records: dict[str, Record], *, steps: int, limit_s: float, report: Callable[[str], None]) -> None:
    """Step all `teams` in turn, adding to `records`, until each has `steps` that count or `limit_s` is over.

    Raises `WrongNumbers` when a loss differs, `ChildFailed` when a rank does not answer of a contestant that may not fail; one that may is
    ended, and taken out of `teams`.
    """
    deadline = time.monotonic() + limit_s
    shuffle = random.Random(0)
    round_ = 0
    while time.monotonic() < deadline and any(quiet_steps(records[name].samples) < steps for name in teams):
        for name in shuffle.sample(list(teams), len(teams)):
            with spared(name, teams, records[name]):
                _step(teams[name], records[name], round_)
        if not teams:
            return
        latest = {name: records[name].samples[-1] for name in teams}
        report(_line(round_, latest))
        _agree({name: sample.loss for name, sample in latest.items()}, teams, records, round_)
        round_ += 1


def _agree(losses: dict[str, float], teams: dict[str, Team], records: dict[str, Record], round_: int) -> None:
    """Whoever may fail is ended where its loss is another than the others'."""
    while True:
        name = furthest_off(losses)
        with spared(name, teams, records[name]):
            return check_losses(losses, round_)
        del losses[name]


@contextmanager
def spared(name: str, teams: dict[str, Team], record: Record) -> Iterator[None]:
    """A contestant that may fail or go wrong does so alone: it is ended, leaves `teams`, and its record says why."""
    try:
        yield
    except (ChildFailed, WrongNumbers) as error:
        if not teams[name].contestant.may_fail:
            raise
        record.failure = str(error).strip().splitlines()[-1]
        teams.pop(name).end()


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
