"""The predicted and the measured timeline in one trace, for ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from shardwise.report.measured import Measured
from shardwise.simulate.simulator import Simulation, Span, trace_of

__all__ = ["save_traces"]


def save_traces(path: str | Path, simulation: Simulation, measured: Measured | None = None) -> None:
    """Writes both; a rank is two processes, `rank 0 predicted` and beneath it `rank 0 measured`."""
    events = _events(simulation.timeline, "predicted", place=0)
    if measured is not None:
        events += _events(measured.timeline, "measured", place=1)
    Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def _events(timeline: list[Span], name: str, *, place: int) -> list[dict[str, Any]]:
    """Chrome's events with process ids that keep a rank's two processes apart and together."""
    events = cast(list[dict[str, Any]], trace_of(timeline, name)["traceEvents"])
    moved = [{**event, "pid": 2 * event["pid"] + place} for event in events]
    order = [
        {"name": "process_sort_index", "ph": "M", "pid": event["pid"], "args": {"sort_index": event["pid"]}}
        for event in moved
        if event["ph"] == "M"
    ]
    return moved + order
