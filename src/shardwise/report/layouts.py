"""The layouts that were considered: a table, and time against memory of those that were simulated."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from shardwise.planner.plan import Candidate, Plan
from shardwise.report.charts import Figure
from shardwise.report.markup import Markup, element
from shardwise.report.units import bytes_text, seconds_text, time_unit

__all__ = ["layouts_table", "simulated", "tradeoff_figure"]

_COLUMNS = ("dp", "cp", "tp", "pp", "microbatches", "schedule")
_OPEN_ROWS = 10  # the others are folded away


def simulated(plan: Plan) -> list[Candidate]:
    """Those whose step was simulated."""
    return [each for each in plan.considered if each.step_time_s is not None and each.memory_bytes is not None]


def layouts_table(plan: Plan) -> Markup:
    """The chosen one first, then by time."""
    ordered = sorted(plan.considered, key=lambda each: (each.layout != plan.layout, each.step_time_s is None, _seconds(each)))
    columns = [name for name in _COLUMNS if name != "cp" or plan.cp > 1]
    rows = [_row(each, plan, columns) for each in ordered]
    more = len(rows) - _OPEN_ROWS
    if more <= 2:
        return _table(rows, columns)
    rest = element("details", element("summary", f"{more} more"), _table(rows[_OPEN_ROWS:], columns))
    return Markup(_table(rows[:_OPEN_ROWS], columns) + rest)


def _table(rows: list[Markup], columns: list[str]) -> Markup:
    names = ("", *columns, "estimated", "simulated", "memory", "note")
    head = element("thead", element("tr", *(element("th", name) for name in names)))
    return element("div", element("table", head, element("tbody", *rows), class_="layouts"), class_="scroll")


def _row(each: Candidate, plan: Plan, columns: list[str]) -> Markup:
    chosen = each.layout == plan.layout
    cells = [element("td", "★" if chosen else "", title="chosen" if chosen else None)]
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


def tradeoff_figure(plan: Plan) -> Figure:
    """Time × memory, a point for each simulated layout."""
    points = simulated(plan)
    scale, unit = time_unit(max(each.step_time_s or 0.0 for each in points))
    chosen = [each.layout == plan.layout for each in points]
    marker = {
        "size": [17 if mine else 11 for mine in chosen],
        "symbol": ["star" if mine else "circle" for mine in chosen],
        "color": ["#f2b705" if mine else "#3b7dc4" for mine in chosen],
        "line": {"width": 1, "color": "#1b2430"},
    }
    return {
        "data": [
            {
                "type": "scatter",
                "mode": "markers+text",
                "cliponaxis": False,
                "x": [(each.step_time_s or 0.0) * scale for each in points],
                "y": [each.memory_bytes for each in points],
                "text": [escape(_short(each.layout)) for each in points],
                "textposition": "top center",
                "hovertext": [_hover(each) for each in points],
                "hovertemplate": "%{hovertext}<extra></extra>",
                "marker": marker | {"opacity": 1},
            }
        ],
        "layout": {
            "height": 280,
            "showlegend": False,
            "hovermode": "closest",
            "margin": {"l": 10, "r": 40, "t": 26, "b": 46},
            "xaxis": {"title": {"text": f"step time, simulated ({unit})"}, "rangemode": "tozero", "automargin": True},
            "yaxis": {"title": {"text": "peak memory"}, "rangemode": "tozero", "tickformat": "~s", "ticksuffix": "B", "automargin": True},
        },
    }


def _short(layout: str) -> str:
    """`tp2 pp2 · 4`: what is not 1."""
    parts = dict(zip(_COLUMNS, _parts(layout), strict=True))
    axes = " ".join(f"{name}{parts[name]}" for name in ("dp", "cp", "tp", "pp") if parts[name] not in ("", "1"))
    return f"{axes or 'one rank'} · {parts['microbatches']} mb" if parts["microbatches"] else layout


def _hover(each: Candidate) -> str:
    step, memory = seconds_text(each.step_time_s or 0.0), bytes_text(each.memory_bytes or 0)
    return f"<b>{escape(each.layout)}</b><br>{step} a step, {memory} on the fullest rank"
