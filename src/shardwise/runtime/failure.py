"""Which rank's error is the cause: every dying rank leaves a report, and the launcher picks the first that is no consequence.

When a rank dies, its peers soon fail as well: their connection to it closes. Such a consequence is reported as one, and that
rank stays alive for a moment so that the launcher sees the silent death (a signal, `os._exit`) that caused it first.
"""

from __future__ import annotations

import json
import re
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from shardwise.errors import RankFailed

__all__ = ["Death", "FailureReport", "first_cause", "read_reports", "report_failure"]

_PEER_IS_GONE = re.compile(r"connection (was )?(closed|reset|refused)|broken pipe|socket closed", re.IGNORECASE)
_GRACE_S = 3.0  # thirty of the launcher's looks: it may be starved of the processor
_TRACE_LINES = 12


class FailureReport(BaseModel):
    """What a rank says of its own end."""

    model_config = ConfigDict(frozen=True)

    rank: int
    time_ns: int
    kind: str
    reason: str
    trace: str
    consequence: bool


class Death(BaseModel):
    """What the launcher saw: a rank's exit code, negative for a signal."""

    model_config = ConfigDict(frozen=True)

    rank: int
    exit_code: int


def report_failure(error: BaseException, *, rank: int, directory: Path) -> None:
    """Write this rank's report; returns late when the error is only a consequence of another rank's death."""
    consequence = any(_PEER_IS_GONE.search(str(one)) for one in _chain(error))
    report = FailureReport(
        rank=rank,
        time_ns=time.time_ns(),
        kind=type(error).__name__,
        reason=str(error) or "(no message)",
        trace=_last_lines(error),
        consequence=consequence,
    )
    draft = directory / f"rank-{rank}.tmp"
    draft.write_text(report.model_dump_json())
    draft.rename(directory / f"rank-{rank}.json")
    if consequence:
        time.sleep(_GRACE_S)


def read_reports(directory: Path) -> list[FailureReport]:
    """All reports in `directory`, earliest first."""
    found = [FailureReport.model_validate(json.loads(path.read_text())) for path in directory.glob("rank-*.json")]
    return sorted(found, key=lambda report: report.time_ns)


def first_cause(reports: Sequence[FailureReport], death: Death | None, *, ranks: int) -> RankFailed:
    """The error to show. reports: earliest first; death: the exit that the launcher noticed first."""
    causes = [report for report in reports if not report.consequence]
    if causes:
        return _from_report(causes[0], ranks)
    if death is not None and death.rank not in {report.rank for report in reports}:
        return _from_death(death, ranks)
    if reports:
        return _from_report(reports[0], ranks)
    return RankFailed(rank=-1, ranks=ranks, kind="unknown", reason="the job ended early and no rank said why")


def _from_report(report: FailureReport, ranks: int) -> RankFailed:
    return RankFailed(rank=report.rank, ranks=ranks, kind=report.kind, reason=report.reason, trace=report.trace)


def _from_death(death: Death, ranks: int) -> RankFailed:
    if death.exit_code >= 0:
        return RankFailed(rank=death.rank, ranks=ranks, kind=f"exit code {death.exit_code}", reason="it ended without a Python error")
    number = -death.exit_code
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    hint = " (often the system's out-of-memory killer: see `dmesg`)" if number == signal.SIGKILL else ""
    return RankFailed(rank=death.rank, ranks=ranks, kind=name, reason=f"a signal ended it{hint}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _last_lines(error: BaseException) -> str:
    lines = "".join(traceback.format_exception(error)).splitlines()
    return "\n".join(lines[-_TRACE_LINES:])
