"""The layouts that were considered: a table, and time against memory of those whose memory is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

from shardwise.planner.plan import Candidate, Plan
from shardwise.report.charts import Figure
from shardwise.report.markup import Markup, element
from shardwise.report.units import bytes_text, seconds_text, time_unit

__all__ = ["KINDS", "Point", "layouts_table", "limit_is_drawn", "points_of", "tradeoff_figure"]

_COLUMNS = ("dp", "cp", "tp", "ep", "pp", "microbatches", "attention", "schedule")
_WHERE = {"cp": "cp", "ep": "ep", "attention": "cp"}  # a column → the axis without which it says nothing
_OPEN_ROWS = 10  # the others are folded away
_NAMED = 8  # points that have their names beside them; of more, the pointer tells

KINDS = {"chosen": "#f2b705", "simulated": "#3b7dc4", "estimated": "#93b7dc", "does not fit": "#d64545"}
_SYMBOLS = {"chosen": "star", "simulated": "circle", "estimated": "circle-open", "does not fit": "x-thin-open"}
_SIZES = {"chosen": 17, "simulated": 10, "estimated": 7, "does not fit": 7}


@dataclass(frozen=True, kw_only=True)
class Point:
    """A layout of the search. kind: one of `KINDS`; note: what else there is to say."""

    layout: str
    seconds: float
    memory_bytes: int
    kind: str
    note: str = ""


def points_of(plan: Plan) -> list[Point]:
    """The plan's candidates whose step was simulated."""
    return [
        Point(layout=each.layout, seconds=each.step_time_s, memory_bytes=each.memory_bytes, kind=_kind(each, plan), note=each.note)
        for each in plan.considered
        if each.step_time_s is not None and each.memory_bytes is not None
    ]


def _kind(each: Candidate, plan: Plan) -> str:
    return "chosen" if each.layout == plan.layout else "does not fit" if each.note else "simulated"


# ---- the table ---------------------------------------------------------------------------------------------------------------------


def layouts_table(plan: Plan) -> Markup:
    """The chosen one first, then by time."""
    ordered = sorted(plan.considered, key=lambda each: (each.layout != plan.layout, each.step_time_s is None, _seconds(each)))
    columns = [name for name in _COLUMNS if name not in _WHERE or getattr(plan, _WHERE[name]) > 1]
    rows = [_row(each, plan, columns) for each in ordered]
    more = len(rows) - _OPEN_ROWS
    if more <= 2:
        return _table(rows, columns)
    rest = element("details", element("summary", f"{more} more"), _table(rows[_OPEN_ROWS:], columns))
    return Markup(_table(rows[:_OPEN_ROWS], columns) + rest)


def _table(rows: list[Markup], columns: list[str]) -> Markup:
    names = ("", *columns, "estimated", "simulated", "memory", "note")
    head = element("thead", element("tr", *(element("th", name) for name in names)))
    return element("div", element("table", head, element("tbody", *rows)), class_="scroll layouts")


def _row(each: Candidate, plan: Plan, columns: list[str]) -> Markup:
    chosen = each.layout == plan.layout
    cells = [element("td", "★" if chosen else "", title="chosen" if chosen else None, class_="star")]
    cells += [element("td", text) for text in _parts(each.layout, columns)]
    cells += [element("td", "—" if value is None else seconds_text(value)) for value in (each.estimate_s, each.step_time_s)]
    cells.append(element("td", "—" if each.memory_bytes is None else bytes_text(each.memory_bytes)))
    cells.append(element("td", each.note or ("chosen" if chosen else _slower(each, plan)), class_="note"))
    return element("tr", *cells, class_="chosen" if chosen else None)


def _parts(layout: str, columns: Sequence[str] = _COLUMNS) -> list[str]:
    """The layout's columns; a layout in other words fills the last."""
    found = dict(part.partition("=")[::2] for part in layout.split(",") if "=" in part)
    if not set(found) <= set(_COLUMNS):
        return [*("" for _ in columns[1:]), layout]
    return [found.get(name, "") for name in columns]


def _slower(each: Candidate, plan: Plan) -> str:
    if each.step_time_s is None:
        return "estimated only"
    return f"{each.step_time_s / plan.predicted.step_time_s - 1:+.0%} time".replace("-", "−")


def _seconds(each: Candidate) -> float:
    found = each.estimate_s if each.step_time_s is None else each.step_time_s
    return float("inf") if found is None else found


# ---- the figure --------------------------------------------------------------------------------------------------------------------


def tradeoff_figure(points: Sequence[Point], limit_bytes: float | None = None) -> Figure:
    """Time × memory, a point for each layout; times that lie far apart on a logarithmic axis. limit_bytes: what a rank may hold."""
    times = [each.seconds for each in points]
    scale, unit = time_unit(max(times))
    wide = max(times) > 8 * min(times)
    drawn = [kind for kind in reversed(KINDS) if any(each.kind == kind for each in points)]  # the chosen one last, on top
    heights = [each.memory_bytes for each in points]
    near = limit_bytes is not None and limit_is_drawn(points, limit_bytes)
    high = max(heights) > 8 * (limit_bytes or max(heights))
    return {
        "data": [_trace(kind, [each for each in points if each.kind == kind], scale, named=len(points) <= _NAMED) for kind in drawn],
        "layout": {
            "height": 280 if len(points) <= _NAMED else 460,
            "showlegend": False,
            "hovermode": "closest",
            "margin": {"l": 10, "r": 40, "t": 26, "b": 46},
            "xaxis": {
                "title": {"text": f"step time ({unit})"},
                "automargin": True,
                **_scale(times, lambda each: f"{each:g}", scale, wide=wide),
            },
            "yaxis": {
                "title": {"text": "peak memory"},
                "tickformat": "~s",
                "ticksuffix": "B",
                "automargin": True,
                **_scale(heights, bytes_text, wide=high),
            },
            **({"shapes": [_limit(limit_bytes)]} if near and limit_bytes else {}),
        },
    }


def limit_is_drawn(points: Sequence[Point], limit_bytes: float) -> bool:
    """A limit far above all points would only press them together."""
    return limit_bytes <= 3 * max(each.memory_bytes for each in points)


def _scale(values: Sequence[float], said: Callable[[float], str], scale: float = 1.0, *, wide: bool) -> Figure:
    """Of an axis; a logarithmic one has ticks at 1, 2 and 5."""
    if not wide:
        return {"rangemode": "tozero"}
    low, high = min(values) * scale, max(values) * scale
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    ticks = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    return {"type": "log", "tickvals": ticks, "ticktext": [said(tick) for tick in ticks]}


def _limit(y: float) -> Figure:
    """A line where the memory ends."""
    line = {"color": KINDS["does not fit"], "width": 1.5, "dash": "dash"}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": line}


def _trace(kind: str, points: Sequence[Point], scale: float, *, named: bool) -> Figure:
    return {
        "type": "scatter",
        "name": kind,
        "mode": "markers+text" if named else "markers",
        "cliponaxis": False,
        "x": [each.seconds * scale for each in points],
        "y": [each.memory_bytes for each in points],
        "text": [escape(_short(each.layout)) for each in points] if named else [],
        "textposition": "top center",
        "hovertext": [_hover(each) for each in points],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {
            "size": _SIZES[kind],
            "symbol": _SYMBOLS[kind],
            "color": KINDS[kind],
            "line": {"width": 1.5 if "open" in _SYMBOLS[kind] else 1, "color": KINDS[kind] if "open" in _SYMBOLS[kind] else "#1b2430"},
        },
    }


def _short(layout: str) -> str:
    """`tp2 pp2 · 4`: what is not 1."""
    parts = dict(zip(_COLUMNS, _parts(layout), strict=True))
    axes = " ".join(f"{name}{parts[name]}" for name in ("dp", "cp", "tp", "ep", "pp") if parts[name] not in ("", "1"))
    axes += f" {parts['attention']}" if parts["attention"] else ""
    return f"{axes or 'one rank'} · {parts['microbatches']} mb" if parts["microbatches"] else layout


def _hover(each: Point) -> str:
    step, memory = seconds_text(each.seconds), bytes_text(each.memory_bytes)
    lines = [f"<b>{escape(each.layout)}</b>", f"{step} a step, {memory} on the fullest rank", each.kind]
    return "<br>".join([*lines, *([escape(each.note)] if each.note else [])])
