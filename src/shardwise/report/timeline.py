"""The timeline: a row for each rank, predicted above measured, a bar for each action."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from shardwise.program.actions import Action, Kind
from shardwise.report.charts import Figure
from shardwise.report.measured import Measured
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
_WAIT = "receive and wait"
_SENT = "send"  # takes a rank no time to speak of: drawn as a mark, not as a bar
_NOT_DRAWN = "not drawn"
_MOST_BARS, _MOST_OF_ROW, _MOST_NUMBERS = 6000, 600, 1500  # more are thinner than a pixel
_IN_TURN = {"shape": "|", "fgcolor": COLOURS["backward"], "bgcolor": COLOURS["forward"], "size": 5, "solidity": 0.6}
_THIN = 1 / 2000  # of what is drawn: shorter waits are left out where there are too many bars


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A rank's row of one timeline; place: how far down; spans: those drawn; hidden: those in the middle that are not."""

    rank: int
    name: str
    place: float
    spans: list[Span]
    hidden: list[Span]

    @property
    def label(self) -> str:
        return f"<b>rank {self.rank}</b> {self.name}".rstrip() if self.name != "measured" else self.name


def timeline_figure(ranks: Sequence[int], simulation: Simulation, measured: Measured | None = None) -> Figure:
    """The plotly figure of these ranks; its x axis is that of both timelines. Of very many actions the middle is not drawn."""
    rows = _rows(ranks, simulation, measured)
    longest = max(span.end_s for row in rows for span in (*row.hidden, *row.spans))
    scale, unit = time_unit(longest)
    data = [_bars(group, rows, scale) for group in COLOURS if group != _SENT] + [_marks(rows, scale)]
    data += [_gaps(rows, scale)] if any(row.hidden for row in rows) else []
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


def _rows(ranks: Sequence[int], simulation: Simulation, measured: Measured | None) -> list[_Row]:
    both = [("", simulation.timeline)]
    if measured is not None and measured.timeline:
        both = [("predicted", simulation.timeline), ("measured", measured.timeline)]
    rows: list[_Row] = []
    place = 0.0
    most = min(_MOST_OF_ROW, _MOST_BARS // (len(ranks) * len(both)))
    for rank in ranks:
        for name, timeline in both:
            spans, hidden = _drawn([span for span in timeline if span.rank == rank], most)
            rows.append(_Row(rank=rank, name=name, place=place, spans=spans, hidden=hidden))
            place += 1
        place += _BETWEEN_RANKS
    return rows


def _drawn(spans: list[Span], most: int) -> tuple[list[Span], list[Span]]:
    """What is drawn of a row, and what is not: of too many, short waits and the middle of the step."""
    if len(spans) <= most:
        return spans, []
    short_s = max(span.end_s for span in spans) * _THIN
    spans = [span for span in spans if _GROUPS[span.action.kind] not in (_SENT, _WAIT) or span.end_s - span.start_s > short_s]
    if len(spans) <= most:
        return spans, []
    half = most // 2
    return spans[:half] + spans[-half:], spans[half:-half]


def _bars(group: str, rows: list[_Row], scale: float) -> Figure:
    chosen = _chosen(group, rows)
    waiting = group == _WAIT
    numbered = sum(len(row.spans) for row in rows) <= _MOST_NUMBERS and not waiting
    return {
        "type": "bar",
        "name": group,
        "orientation": "h",
        "y": [row.place for row, _ in chosen],
        "x": [(span.end_s - span.start_s) * scale for _, span in chosen],
        "base": [span.start_s * scale for _, span in chosen],
        "width": 0.86,
        "text": [str(span.action.microbatch) if numbered and span.action.microbatch >= 0 else "" for _, span in chosen],
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


def _gaps(rows: list[_Row], scale: float) -> Figure:
    """What stands for the actions that are not drawn."""
    cut = [row for row in rows if row.hidden]
    begins = [row.hidden[0].start_s for row in cut]
    return {
        "type": "bar",
        "name": _NOT_DRAWN,
        "orientation": "h",
        "y": [row.place for row in cut],
        "x": [(row.hidden[-1].end_s - begin) * scale for row, begin in zip(cut, begins, strict=True)],
        "base": [begin * scale for begin in begins],
        "width": 0.86,
        "hovertext": [f"{len(row.hidden):,} more actions of rank {row.rank}, in the same order, are not drawn" for row in cut],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {"color": COLOURS["forward"], "opacity": 0.45, "line": {"width": 0}, "pattern": _IN_TURN},
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
