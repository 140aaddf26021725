"""What a sweep over all layouts found out of one model: rows, findings, the table and the JSON."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.heats import Heat, together
from benchmarks.intervals import Interval, least_count, median_interval
from benchmarks.published_stats import kendall_tau, median_absolute_percentage_error
from benchmarks.race import Record
from benchmarks.sweep_layouts import Planned, Refused
from benchmarks.verdict import Finding, Outcome, Sample, overall, worst_error
from benchmarks.workloads import Workload

MAX_LOSS = 0.05
MIN_TAU = 0.8
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Row:
    """One layout. seconds: its steps that count, as if the machine had been equally fast in all heats; actions: seconds by kind."""

    plan: Planned
    seconds: tuple[float, ...]
    peak_bytes: tuple[int, ...] = ()
    actions: Mapping[str, float] = field(default_factory=dict)

    @property
    def interval(self) -> Interval | None:
        """Of the median; None of too few steps."""
        return median_interval(self.seconds)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All that was measured of one model."""

    workload: Workload
    ranks: int
    rows: tuple[Row, ...]
    refused: tuple[Refused, ...]

    @property
    def measured(self) -> list[tuple[Row, Interval]]:
        """The rows with enough steps, the fastest first."""
        found = [(row, interval) for row in self.rows if (interval := row.interval) is not None]
        return sorted(found, key=lambda pair: pair[1].median)

    @property
    def tau(self) -> float | None:
        """Rank correlation of predicted and measured."""
        pairs = self.measured
        return kendall_tau([row.plan.step_time_s for row, _ in pairs], [interval.median for _, interval in pairs])

    @property
    def repeatability(self) -> float | None:
        """Rank correlation of the measurements with themselves, every other step against those between: what noise leaves possible."""
        halves = [(statistics.median(row.seconds[::2]), statistics.median(row.seconds[1::2])) for row, _ in self.measured]
        return kendall_tau([one for one, _ in halves], [other for _, other in halves])

    def findings(self) -> list[Finding]:
        """Judge the choice and the order."""
        if missing := [row.plan.name for row in self.rows if row.interval is None]:
            text = f"fewer than {least_count()} quiet steps of {len(missing)} of {len(self.rows)} layouts, among them {missing[0]}"
            return [Finding(text=text, outcome=Outcome.INCONCLUSIVE)]
        return [choice_finding(self.measured), tau_finding(self.tau)]

    def outcome(self) -> Outcome:
        """The verdict over all findings."""
        return overall(self.findings())


def choice_finding(measured: Sequence[tuple[Row, Interval]]) -> Finding:
    """Whether the chosen layout is as good as the best, as far as that can be told. measured: the fastest first."""
    best_row, best = measured[0]
    row, chosen = next(pair for pair in measured if pair[0].plan.chosen)
    loss = chosen.median / best.median - 1
    text = f"chosen {row.plan.name}: {loss:+.1%} from the best, {best_row.plan.name} (bound: {MAX_LOSS:.0%}, or overlapping intervals)"
    return Finding(text=text, outcome=Outcome.PASS if loss <= MAX_LOSS or chosen.overlaps(best) else Outcome.FAIL)


def tau_finding(tau: float | None) -> Finding:
    """Whether predictions put the layouts in the measured order."""
    if tau is None:
        return Finding(text="nothing to rank", outcome=Outcome.INCONCLUSIVE)
    return Finding(
        text=f"rank correlation of predicted and measured {tau:.2f} (bound: at least {MIN_TAU})",
        outcome=Outcome.PASS if tau >= MIN_TAU else Outcome.FAIL,
    )


def rows_of(plans: Iterable[Planned], done: Sequence[Heat]) -> tuple[Row, ...]:
    """What each layout came to over the heats that it took part in, the chosen one in all of them."""
    planned = list(plans)
    records = together(done, next(plan.name for plan in planned if plan.chosen))
    return tuple(_row(plan, records.get(plan.name, Record())) for plan in planned)


def _row(plan: Planned, record: Record) -> Row:
    samples = [sample for sample in record.samples if sample.counts]
    seconds = tuple(sample.seconds for sample in samples)
    return Row(plan=plan, seconds=seconds, peak_bytes=tuple(record.peak_bytes), actions=_median_actions(samples))


def _median_actions(samples: Sequence[Sample]) -> dict[str, float]:
    kinds = dict.fromkeys(kind for sample in samples for kind in sample.actions)
    return {kind: statistics.median(sample.actions.get(kind, 0.0) for sample in samples) for kind in kinds}


# -- what is shown -------------------------------------------------------------------------------------------------------------------------


def show(sweep: Sweep, console: Console, *, breakdown: bool = False) -> None:
    """Print the table, the summary and the findings."""
    console.print(_table(sweep))
    if breakdown:
        console.print(_breakdown(sweep))
    for reason in dict.fromkeys(each.reason for each in sweep.refused):
        layouts = [each.layout for each in sweep.refused if each.reason == reason]
        console.print(f"not run: {len(layouts)} layouts, such as {layouts[0]}: {reason}", markup=False, soft_wrap=True)
    console.print(_summary(sweep), markup=False, soft_wrap=True)
    for finding in sweep.findings():
        console.print(f"{finding.outcome.value}: {finding.text}", markup=False, soft_wrap=True)


def _table(sweep: Sweep) -> Table:
    shape = sweep.workload
    model = f"{shape.family}, {shape.layers} layers, hidden {shape.hidden}, batch {shape.batch_size}"
    table = Table(title=f"{model}: one step in the layouts of local:{sweep.ranks}; * is chosen")
    for column in ("layout", "predicted s", "measured s", "95 % interval", "ratio", "steps", "peak MiB", "ratio"):
        table.add_column(column, justify="left" if column == "layout" else "right", no_wrap=column == "layout")
    for row in sorted(sweep.rows, key=lambda row: row.plan.step_time_s):
        table.add_row(*_cells(row), style="bold" if row.plan.chosen else None)
    return table


def _cells(row: Row) -> tuple[str, ...]:
    name, predicted, interval = row.plan.name + (" *" if row.plan.chosen else ""), row.plan.step_time_s, row.interval
    timed = ("–", "–", "–")
    if interval is not None:
        timed = (f"{interval.median:.3f}", f"{interval.low:.3f} – {interval.high:.3f}", f"{predicted / interval.median:.2f}")
    memory = ("–", "–")
    if row.peak_bytes:
        memory = (f"{max(row.peak_bytes) / MIB:.0f}", f"{1 + worst_error(row.plan.memory_bytes, row.peak_bytes):.2f}")
    return name, f"{predicted:.3f}", *timed, str(len(row.seconds)), *memory


def _breakdown(sweep: Sweep) -> Table:
    """Seconds by kind of action, the mean over the ranks, waiting included."""
    kinds = dict.fromkeys(kind for row in sweep.rows for kind in row.plan.actions)
    table = Table(title="predicted / measured s by kind of action, the ranks' mean")
    for column in ("layout", *kinds):
        table.add_column(column, justify="left" if column == "layout" else "right", no_wrap=column == "layout")
    for row in sorted(sweep.rows, key=lambda row: row.plan.step_time_s):
        both = [(row.plan.actions.get(kind, 0.0), row.actions.get(kind)) for kind in kinds]
        cells = [f"{predicted:.3f} / {'–' if measured is None else f'{measured:.3f}'}" for predicted, measured in both]
        table.add_row(row.plan.name, *cells)
    return table


def _summary(sweep: Sweep) -> str:
    pairs = sweep.measured
    error = median_absolute_percentage_error([row.plan.step_time_s for row, _ in pairs], [interval.median for _, interval in pairs])
    again = sweep.repeatability
    ceiling = "" if again is None else f"; the measurements' own repeatability {again:.2f}"
    return f"{len(pairs)} of {len(sweep.rows)} layouts measured; median error of the predicted step time {error:.1%}{ceiling}"


def as_json(sweep: Sweep) -> dict[str, Any]:
    """Everything, every step included, for a JSON file."""
    return {
        "workload": dataclasses.asdict(sweep.workload),
        "ranks": sweep.ranks,
        "rows": [_row_json(row) for row in sweep.rows],
        "refused": [dataclasses.asdict(each) for each in sweep.refused],
        "tau": sweep.tau,
        "repeatability": sweep.repeatability,
        "findings": [{"text": finding.text, "outcome": finding.outcome.value} for finding in sweep.findings()],
        "outcome": sweep.outcome().value,
    }


def _row_json(row: Row) -> dict[str, Any]:
    interval = row.interval
    return {
        "layout": row.plan.name,
        "chosen": row.plan.chosen,
        "predicted_s": row.plan.step_time_s,
        "measured": None if interval is None else dataclasses.asdict(interval),
        "seconds": row.seconds,
        "predicted_bytes": row.plan.memory_bytes,
        "peak_bytes": row.peak_bytes,
        "predicted_actions_s": row.plan.actions,
        "actions_s": dict(row.actions),
    }
