"""Which of several failures is the cause."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardwise.runtime import failure
from shardwise.runtime.failure import Death, FailureReport, first_cause, read_reports, report_failure


def report(rank: int, time_ns: int, *, consequence: bool = False) -> FailureReport:
    return FailureReport(rank=rank, time_ns=time_ns, kind="ValueError", reason=f"of {rank}", trace="", consequence=consequence)


def test_the_earliest_cause_wins_over_earlier_consequences() -> None:
    reports = [report(0, 1, consequence=True), report(2, 2), report(1, 3)]
    assert first_cause(reports, Death(rank=0, exit_code=1), ranks=4).rank == 2


def test_a_silent_death_wins_over_its_consequences() -> None:
    error = first_cause([report(0, 1, consequence=True)], Death(rank=3, exit_code=-11), ranks=4)
    assert (error.rank, error.kind) == (3, "SIGSEGV")


def test_a_death_without_a_name_keeps_its_number() -> None:
    assert first_cause([], Death(rank=0, exit_code=-63), ranks=1).kind == "signal 63"


def test_a_consequence_alone_is_better_than_nothing() -> None:
    assert first_cause([report(1, 1, consequence=True)], Death(rank=1, exit_code=1), ranks=2).rank == 1


def test_the_whole_chain_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure, "_GRACE_S", 0.0)
    error = RuntimeError("rank 0 waited for rank 1")
    error.__cause__ = RuntimeError("Connection closed by peer [127.0.0.1]:1234")
    report_failure(error, rank=0, directory=tmp_path)
    report_failure(KeyError("x"), rank=1, directory=tmp_path)
    assert [(one.rank, one.consequence) for one in read_reports(tmp_path)] == [(0, True), (1, False)]
