"""The timeline: a row for each rank, predicted above measured, a bar for each action."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from shardwise.planner.plan import Plan
from shardwise.program.actions import Action, Kind
from shardwise.report.charts import Figure
from shardwise.report.measured import Measured
from shardwise.report.ranks import shown_ranks
from shardwise.report.units import seconds_text, time_unit
from shardwise.simulate.simulator import Simulation, Span

__all__ = ["COLOURS", "timeline_figure"]

# Light enough for a dark page, dark enough for white numbers on them; told apart by brightness, too.
COLOURS = {
    "forward": "#3b7dc4",
    "backward": "#d9742b",
    "weights": "#b45309",
    "send": "#12a594",
    "receive and wait": "#9aa7b5",
    "reduce gradients": "#8b5cc7",
    "update": "#c2417c",
    "prelude": "#64748b",
}
_GROUPS = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.WEIGHT: "weights",
    Kind.SEND: "send",
    Kind.SEND_GRAD: "send",
    Kind.RECV: "receive and wait",
    Kind.POST: "receive and wait",
    Kind.POST_GRAD: "receive and wait",
    Kind.RECV_GRAD: "receive and wait",
    Kind.REDUCE: "reduce gradients",
    Kind.UPDATE: "update",
    Kind.PRELUDE: "prelude",
}
_ROW_PX, _AROUND_PX = 26, 70
_BETWEEN_RANKS = 0.35  # of a row
_SENT = "send"  # takes a rank no time to speak of: drawn as a mark, not as a bar


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A rank's row of one timeline; place: how far down."""

    rank: int
    name: str
    place: float
    spans: list[Span]

    @property
    def label(self) -> str:
        return f"<b>rank {self.rank}</b> {self.name}".rstrip() if self.name != "measured" else self.name


def timeline_figure(plan: Plan, simulation: Simulation, measured: Measured | None) -> Figure:
    """The plotly figure; its x axis is that of both timelines."""
    rows = _rows(plan, simulation, measured)
    longest = max(span.end_s for row in rows for span in row.spans)
    scale, unit = time_unit(longest)
    data = [_bars(group, rows, scale) for group in COLOURS if group != _SENT] + [_marks(rows, scale)]
    depth = rows[-1].place
    return {
        "data": data,
        "layout": {
            "height": round(_AROUND_PX + _ROW_PX * (depth + 1)),
            "barmode": "overlay",
            "bargap": 0,
            "showlegend": False,
            "hovermode": "closest",
            "uniformtext": {"minsize": 8, "mode": "hide"},
            "margin": {"l": 10, "r": 12, "t": 8, "b": 46},
            "xaxis": {"title": {"text": f"time since the step began ({unit})"}, "range": [0, longest * scale * 1.01], "zeroline": False},
            "yaxis": {
                "tickvals": [row.place for row in rows],
                "ticktext": [row.label for row in rows],
                "range": [depth + 0.6, -0.6],
                "fixedrange": True,
                "automargin": True,
                "showgrid": False,
                "zeroline": False,
            },
        },
    }


def _rows(plan: Plan, simulation: Simulation, measured: Measured | None) -> list[_Row]:
    both = [("", simulation.timeline)]
    if measured is not None and measured.timeline:
        both = [("predicted", simulation.timeline), ("measured", measured.timeline)]
    rows: list[_Row] = []
    place = 0.0
    for rank in shown_ranks(plan):
        for name, timeline in both:
            rows.append(_Row(rank=rank, name=name, place=place, spans=[span for span in timeline if span.rank == rank]))
            place += 1
        place += _BETWEEN_RANKS
    return rows


def _bars(group: str, rows: list[_Row], scale: float) -> Figure:
    chosen = _chosen(group, rows)
    waiting = group == "receive and wait"
    return {
        "type": "bar",
        "name": group,
        "orientation": "h",
        "y": [row.place for row, _ in chosen],
        "x": [(span.end_s - span.start_s) * scale for _, span in chosen],
        "base": [span.start_s * scale for _, span in chosen],
        "width": 0.86,
        "text": ["" if waiting or span.action.microbatch < 0 else str(span.action.microbatch) for _, span in chosen],
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "textfont": {"color": "#ffffff"},
        "hovertext": [_hover(row, span) for row, span in chosen],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {"color": COLOURS[group], "opacity": 0.35 if waiting else 1, "line": {"width": 0}}
        | ({"pattern": {"shape": "/", "size": 5}} if waiting else {}),
    }


def _marks(rows: list[_Row], scale: float) -> Figure:
    chosen = _chosen(_SENT, rows)
    return {
        "type": "scatter",
        "mode": "markers",
        "name": _SENT,
        "y": [row.place + 0.3 for row, _ in chosen],
        "x": [span.start_s * scale for _, span in chosen],
        "hovertext": [_hover(row, span) for row, span in chosen],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {"color": COLOURS[_SENT], "symbol": "triangle-up", "size": 9, "line": {"width": 1, "color": "#ffffff"}},
    }


def _chosen(group: str, rows: list[_Row]) -> list[tuple[_Row, Span]]:
    return [(row, span) for row in rows for span in row.spans if _GROUPS[span.action.kind] == group]


def _hover(row: _Row, span: Span) -> str:
    lines = [
        f"<b>{escape(_action_words(span.action))}</b>",
        f"rank {span.rank}, stage {span.stage}, {row.name or 'predicted'}",
        f"start {seconds_text(span.start_s)}, takes {seconds_text(span.end_s - span.start_s)}",
    ]
    return "<br>".join(lines)


_WORDS = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.WEIGHT: "gradients of the weights",
    Kind.SEND: "send {edge} to rank {peer}",
    Kind.SEND_GRAD: "send the gradient of {edge} to rank {peer}",
    Kind.RECV: "receive {edge} from rank {peer}",
    Kind.POST: "begin to receive {edge} from rank {peer}",
    Kind.POST_GRAD: "begin to receive the gradient of {edge} from rank {peer}",
    Kind.RECV_GRAD: "receive the gradient of {edge} from rank {peer}",
    Kind.REDUCE: "add up gradients",
    Kind.UPDATE: "optimizer's update",
    Kind.PRELUDE: "prelude: what all microbatches share",
}


def _action_words(action: Action) -> str:
    words = _WORDS[action.kind].format(edge=action.edge, peer=action.peer)
    return words if action.microbatch < 0 else f"{words}, microbatch {action.microbatch}"
