"""Runs as timelines, and both timelines as one trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardwise.planner.plan import Plan
from shardwise.report import Measured, save_traces
from shardwise.report.units import bytes_text, count_text, error_text, seconds_text
from shardwise.runtime.train import RecordedAction, TrainingRun
from shardwise.simulate.simulator import Simulation


def run(actions: list[list[RecordedAction]]) -> TrainingRun:
    return TrainingRun(losses=[2.0], held_out={0: 3.0, 1: 2.0}, step_times_s=[0.5], memory_bytes=[1, 2, 3, 4], actions=actions)


def records(start_s: float) -> list[RecordedAction]:
    return [("forward", -1, 0, "", -1, start_s, start_s + 0.1), ("send", -1, 0, "h", 2, start_s + 0.1, start_s + 0.3)]


def test_one_machines_ranks_keep_their_shifts(plan: Plan) -> None:
    measured = Measured.of(run([records(100.0 + rank / 100) for rank in range(4)]), plan, same_numbers=1e-15)
    begins = [span.start_s for span in measured.timeline if span.action.kind == "forward"]
    assert begins == pytest.approx([0.0, 0.01, 0.02, 0.03])
    assert [span.stage for span in measured.timeline[::2]] == [0, 0, 1, 1]
    assert str(measured.timeline[1].action) == "send 0 h to rank 2"
    assert (measured.step_time_s, measured.same_numbers, measured.losses) == (0.5, 1e-15, [2.0])


def test_clocks_of_several_machines_are_not_compared(plan: Plan) -> None:
    measured = Measured.of(run([records(100.0), records(100.0), records(5.0), records(5.0)]), plan)
    assert {span.start_s for span in measured.timeline if span.action.kind == "forward"} == {0.0}


def test_no_records_no_timeline(plan: Plan) -> None:
    assert Measured.of(run([]), plan).timeline == []


def test_a_trace_holds_both(tmp_path: Path, plan: Plan, simulation: Simulation, measured: Measured) -> None:
    save_traces(tmp_path / "trace.json", simulation, measured)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert [names[pid] for pid in sorted(names)] == [f"rank {rank} {which}" for rank in range(4) for which in ("predicted", "measured")]
    complete = [event for event in events if event["ph"] == "X"]
    assert len(complete) == len(simulation.timeline) + len(measured.timeline)
    assert {event["pid"] for event in complete} == set(names)


def test_a_trace_without_a_run(tmp_path: Path, simulation: Simulation) -> None:
    save_traces(tmp_path / "trace.json", simulation)
    assert "measured" not in (tmp_path / "trace.json").read_text()


def test_units() -> None:
    said = [seconds_text(1.2345), seconds_text(0.0993), seconds_text(2e-5), bytes_text(262144), bytes_text(999_999), count_text(857_000)]
    assert [text.replace("\u00a0", " ") for text in said] == ["1.23 s", "99.3 ms", "20 µs", "262 kB", "1.00 MB", "857 k"]
    assert error_text(0.9, 1.0) == "−10.0\u00a0%" and error_text(1.0, 0.0) == "—"
