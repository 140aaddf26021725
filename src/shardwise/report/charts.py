"""Puts plotly figures into the page: the data as JSON, drawn by `page.js`, which knows the page's colours."""

from __future__ import annotations

import json
from typing import Any

from shardwise.report.markup import Markup, element

__all__ = ["Figure", "chart", "legend"]

Figure = dict[str, Any]  # plotly's: data, layout


def chart(name: str, figure: Figure, label: str) -> Markup:
    """A place for the figure and its data; label: what a screen reader says."""
    data = Markup(json.dumps(figure, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"))
    holder = element(
        "div", class_="chart", data_figure=f"{name}-data", role="img", aria_label=label, style=f"height:{figure['layout']['height']}px"
    )
    return Markup(holder + element("script", data, type="application/json", id=f"{name}-data"))


def legend(entries: dict[str, str], shapes: dict[str, str] | None = None) -> Markup:
    """Names and their colours; shapes: of patches that are no squares, `hatched`, `triangle` or `diamond`."""
    items = [
        element("span", element("i", class_=f"patch {(shapes or {}).get(name, '')}".strip(), style=f"--patch:{colour}"), name)
        for name, colour in entries.items()
    ]
    return element("div", *items, class_="legend")
