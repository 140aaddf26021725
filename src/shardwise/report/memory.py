"""Memory of each rank by kind, with what was measured and what there is."""

from __future__ import annotations

from collections.abc import Sequence

from shardwise.report.charts import Figure
from shardwise.report.measured import Measured
from shardwise.report.units import bytes_text
from shardwise.simulate.simulator import Simulation

__all__ = ["KINDS", "MEASURED", "limit_is_drawn", "memory_figure"]

KINDS = {
    "parameters": "#3b7dc4",
    "gradients": "#d9742b",
    "optimizer": "#c2417c",
    "buffers": "#64748b",
    "saved": "#12a594",
    "transient": "#a3b83b",
    "runtime": "#94a3b8",
}
MEASURED = "#f2b705"
_LIMIT = "#d64545"
_ROW_PX, _AROUND_PX = 30, 70


def memory_figure(
    ranks: Sequence[int], simulation: Simulation, measured: Measured | None = None, limit_bytes: float | None = None
) -> Figure:
    """Stacked bars, a row for each of these ranks. limit_bytes: what a rank has."""
    labels = [f"<b>rank {rank}</b>" for rank in ranks]
    data = [_bars(kind, [simulation.memory[rank].get(kind, 0) for rank in ranks], labels) for kind in KINDS]
    if measured is not None and len(measured.memory_bytes) == len(simulation.memory):
        data.append(_marks([measured.memory_bytes[rank] for rank in ranks], labels))
    return {
        "data": data,
        "layout": {
            "height": _AROUND_PX + _ROW_PX * len(ranks),
            "barmode": "stack",
            "bargap": 0.3,
            "showlegend": False,
            "hovermode": "closest",
            "margin": {"l": 10, "r": 16, "t": 22, "b": 34},
            "xaxis": {"rangemode": "tozero", "tickformat": "~s", "ticksuffix": "B", "fixedrange": True},
            "yaxis": {"autorange": "reversed", "type": "category", "automargin": True, "fixedrange": True},
            **(_limit(limit_bytes) if limit_bytes and limit_is_drawn(limit_bytes, simulation) else {}),
        },
    }


def limit_is_drawn(limit_bytes: float, simulation: Simulation) -> bool:
    """A limit far above all bars would only make them small."""
    return limit_bytes <= 3 * max(simulation.memory_bytes)


def _limit(x: float) -> Figure:
    """A line where a rank's memory ends."""
    line = {"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "line": {"color": _LIMIT, "width": 2, "dash": "dash"}}
    text = {
        "x": x,
        "y": 1,
        "yref": "paper",
        "yanchor": "bottom",
        "text": f"limit {bytes_text(x)}",
        "showarrow": False,
        "font": {"color": _LIMIT},
    }
    return {"shapes": [line], "annotations": [text]}


def _bars(kind: str, sizes: list[int], labels: list[str]) -> Figure:
    return {
        "type": "bar",
        "name": kind,
        "orientation": "h",
        "y": labels,
        "x": sizes,
        "hovertext": [f"{label}, predicted<br>{kind}: {bytes_text(size)}" for label, size in zip(labels, sizes, strict=True)],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {"color": KINDS[kind], "line": {"width": 0}},
    }


def _marks(sizes: list[int], labels: list[str]) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "measured",
        "y": labels,
        "x": sizes,
        "hovertext": [f"{label}, measured peak<br>{bytes_text(size)}" for label, size in zip(labels, sizes, strict=True)],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {"symbol": "diamond", "size": 12, "color": MEASURED, "line": {"width": 1.5, "color": "#1b2430"}},
    }
