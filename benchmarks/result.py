"""What one run found out: the findings, the table and the JSON."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.context import OURS, SINGLE, Contestant, missing_packages
from benchmarks.ours import Prediction
from benchmarks.race import Record
from benchmarks.verdict import (
    MAX_DRIFT,
    MAX_MEMORY_ALIKE,
    MAX_MEMORY_ERROR,
    MAX_TIME_ERROR,
    MIN_QUIET_STEPS,
    MIN_SPEED,
    MIN_SPEED_ALIKE,
    MIN_SPEED_IDEAL,
    MIN_SPEED_SCENARIO,
    Finding,
    Outcome,
    Timing,
    best_peer,
    enough,
    error_finding,
    memory_finding,
    overall,
    relative_error,
    speed_finding,
    timing,
    worst_error,
)
from benchmarks.workloads import Workload

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Result:
    """Measurements of all contestants of one workload.

    prediction: where ours took part; afterwards: what is predicted of the same layout with the machine as it was after the race; layout:
    where it was pinned; scenario: its name.
    """

    workload: Workload
    contestants: dict[str, Contestant]
    records: dict[str, Record]
    prediction: Prediction | None
    afterwards: Prediction | None = None
    layout: str | None = None
    scenario: str | None = None

    @property
    def timings(self) -> dict[str, Timing | None]:
        """The steps that count, by contestant that ran to the end."""
        return {name: timing(record.samples) for name, record in self.records.items() if not record.failure}

    @property
    def best_peer(self) -> str | None:
        """The fastest of the peers, as it is or compiled; where our layout is pinned, of those that divide the model alike."""
        ran = [self.contestants[name] for name in self.timings]
        peers = [each.name for each in ran if each.is_peer and (self.layout is None or each.divides_as(self.layout))]
        return best_peer(self.timings, peers)

    def better_of(self, base: str) -> str | None:
        """The contestant of that name as it is, or compiled where that took part and is faster; None where neither was timed."""
        found = {name: timing.median_s for name, timing in self.timings.items() if timing and self.contestants[name].base == base}
        return min(found, key=found.__getitem__, default=None)

    def findings(self) -> list[Finding]:
        """Judge ours; nothing to judge gives an empty list."""
        ours = self.timings.get(OURS)
        if self.prediction is None:
            return []
        if ours is None or not enough(self.timings):
            text = f"fewer than {MIN_QUIET_STEPS} quiet steps for some contestant"
            return [Finding(text=text, outcome=Outcome.INCONCLUSIVE)]
        memory = error_finding("peak memory", worst_error(self.prediction.memory_bytes, self.records[OURS].peak_bytes), MAX_MEMORY_ERROR)
        return [*self._speed(), self._step_time(self.prediction, ours), memory]

    def _step_time(self, prediction: Prediction, ours: Timing) -> Finding:
        """A step that is not as predicted says nothing where the machine is not what it was."""
        found = error_finding("step time", relative_error(prediction.step_time_s, ours.median_s), MAX_TIME_ERROR)
        drift = relative_error(self.afterwards.step_time_s, prediction.step_time_s) if self.afterwards else 0.0
        if found.outcome is not Outcome.FAIL or abs(drift) <= MAX_DRIFT:
            return found
        text = f"{found.text}; meanwhile the machine changed: measured after the race, {drift:+.1%} is predicted (at most {MAX_DRIFT:.0%})"
        return Finding(text=text, outcome=Outcome.INCONCLUSIVE)

    def _speed(self) -> list[Finding]:
        own, best, alone = self.better_of(OURS), self.best_peer, self.better_of(SINGLE)
        ours = self.timings[own] if own else None
        assert own is not None and ours is not None, "there are enough steps"
        found = []
        if best and (peer := self.timings[best]):
            title = self.contestants[best].title
            found.append(speed_finding(ours, title, peer, self._bound()))
            if self.layout:
                peaks = self.records[own].peak_bytes, self.records[best].peak_bytes
                found.append(memory_finding(peaks[0], title, peaks[1], MAX_MEMORY_ALIKE))
        elif self.scenario:
            found.append(Finding(text="none of the peers runs here", outcome=Outcome.INCONCLUSIVE))
        if alone and (ideal := self.timings[alone]) and not self.layout and not self.scenario:
            found.append(speed_finding(ours, self.contestants[alone].title, ideal, MIN_SPEED_IDEAL))
        return found

    def _bound(self) -> float:
        if self.layout:
            return MIN_SPEED_ALIKE
        return MIN_SPEED_SCENARIO if self.scenario else MIN_SPEED

    def outcome(self) -> Outcome:
        """The verdict over all findings."""
        return overall(self.findings())


def show(result: Result, console: Console) -> None:
    """Print the table, the prediction beside the measurement, and the findings."""
    console.print(_table(result))
    for name, record in result.records.items():
        if record.failure:
            console.print(f"{result.contestants[name].title} did not run to the end: {record.failure}", markup=False, soft_wrap=True)
    for package in missing_packages():
        console.print(f"{package}: not installed")
    if result.prediction is not None:
        console.print(_prediction_table(result, result.prediction))
    for finding in result.findings():
        console.print(f"{finding.outcome.value}: {finding.text}")
    console.print(f"result: {result.outcome().value}" if result.prediction else "result: ours did not take part; nothing to judge")


def _table(result: Result) -> Table:
    shape, ranks = result.workload, max(each.ranks for each in result.contestants.values())
    size = f"channels {list(shape.channels)}" if shape.channels else f"{shape.layers} layers, hidden {shape.hidden}"
    where = f" ({result.scenario})" if result.scenario else ""
    table = Table(title=f"{shape.family}, {size}, batch {shape.batch_size}: one training step, {ranks} ranks{where}")
    columns = ("contestant", "median s", "min – max s", "speed × best peer", "quiet steps", "peak MiB a rank", "set-up MiB", "loss")
    for column in columns:
        table.add_column(column, justify="left" if column == "contestant" else "right")
    peer = result.timings[result.best_peer] if result.best_peer else None
    for name, found in result.timings.items():
        table.add_row(result.contestants[name].title, *_speed_cells(found, peer), *_other_cells(result.records[name], found))
    return table


def _speed_cells(found: Timing | None, peer: Timing | None) -> tuple[str, str, str]:
    if found is None:
        return "–", "–", "–"
    ratio = f"{peer.median_s / found.median_s:.3f}" if peer else "–"
    return f"{found.median_s:.3f}", f"{found.min_s:.3f} – {found.max_s:.3f}", ratio


def _other_cells(record: Record, found: Timing | None) -> tuple[str, str, str, str]:
    steps = f"{found.steps if found else 0} of {len(record.samples)}"
    losses = f"{record.samples[0].loss:.4f} → {record.samples[-1].loss:.4f}"
    return steps, mib(record.peak_bytes), mib(record.set_up_peak_bytes), losses


def mib(sizes: Sequence[float]) -> str:
    """Sizes in MiB, of one rank after the other."""
    return " / ".join(f"{size / MIB:.0f}" for size in sizes)


def _prediction_table(result: Result, prediction: Prediction) -> Table:
    table = Table("ours", "predicted", "measured", "error", title="prediction")
    ours, record = result.timings[OURS], result.records[OURS]
    if ours is not None:
        for title, each in (("step time s", prediction), ("… of the machine after the race", result.afterwards)):
            if each is not None:
                error = relative_error(each.step_time_s, ours.median_s)
                table.add_row(title, f"{each.step_time_s:.3f}", f"{ours.median_s:.3f}", f"{error:+.1%}")
    error = worst_error(prediction.memory_bytes, record.peak_bytes)
    table.add_row("peak MiB a rank", mib(prediction.memory_bytes), mib(record.peak_bytes), f"{error:+.1%}")
    return table


def as_json(result: Result) -> dict[str, Any]:
    """Return everything, every sample included, for a JSON file."""
    return {
        "workload": dataclasses.asdict(result.workload),
        "scenario": result.scenario,
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "contestants": {name: _record_json(record) for name, record in result.records.items()},
        "prediction": None if result.prediction is None else dataclasses.asdict(result.prediction),
        "afterwards": None if result.afterwards is None else dataclasses.asdict(result.afterwards),
        "findings": [{"text": finding.text, "outcome": finding.outcome.value} for finding in result.findings()],
        "outcome": result.outcome().value,
    }


def _record_json(record: Record) -> dict[str, Any]:
    found = timing(record.samples)
    samples = [dataclasses.asdict(sample) | {"counts": sample.counts} for sample in record.samples]
    return {
        "timing": None if found is None else dataclasses.asdict(found),
        "peak_bytes": record.peak_bytes,
        "set_up_peak_bytes": record.set_up_peak_bytes,
        "failure": record.failure or None,
        "samples": samples,
    }
