"""The report: one HTML file that needs nothing else, neither network nor server."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from shardwise.planner.plan import Plan
from shardwise.report.charts import chart, legend
from shardwise.report.drawing import drawing
from shardwise.report.header import header
from shardwise.report.layouts import layouts_table, simulated, tradeoff_figure
from shardwise.report.markup import Markup, element, join
from shardwise.report.measured import Measured
from shardwise.report.memory import KINDS, MEASURED, limit_is_drawn, memory_figure
from shardwise.report.ranks import omitted_text
from shardwise.report.splits import splits
from shardwise.report.timeline import COLOURS, timeline_figure
from shardwise.report.units import bytes_text, seconds_text
from shardwise.simulate.simulator import Simulation

__all__ = ["write_report"]

# The browser itself refuses whatever would be loaded from elsewhere.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def write_report(path: str | Path, plan: Plan, simulation: Simulation, measured: Measured | None = None) -> None:
    """Writes the page about a plan, its simulated step and, where there is one, the run; about 5 MB, most of it plotly.js."""
    Path(path).write_text(_page(plan, simulation, measured), encoding="utf-8")


def _page(plan: Plan, simulation: Simulation, measured: Measured | None) -> str:
    sections = [
        _section(
            "The plan", "Stages from left to right, each on its own ranks; arrows show what a microbatch sends.", drawing(plan, simulation)
        ),
        _section("What each axis splits", "", splits(plan)),
        _timeline(plan, simulation, measured),
        _memory(plan, simulation, measured),
        _layouts(plan),
        _section("The plan in words", "", element("pre", "\n".join(plan.explanation) or plan.layout)),
    ]
    body = [
        element("noscript", element("p", "The charts need JavaScript; it is all in this file.", class_="failed")),
        element("main", header(plan, simulation, measured), *sections),
        _script(_plotly()),
        _script(_resource("page.js")),
    ]
    return "<!doctype html>\n" + element("html", _head(plan), element("body", *body), lang="en") + "\n"


def _head(plan: Plan) -> Markup:
    metas = Markup(
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    )
    return element(
        "head", metas, element("title", f"{plan.model} on {plan.cluster} · shardwise"), element("style", Markup(_resource("page.css")))
    )


def _section(title: str, caption: str, *children: str) -> Markup:
    said = [element("p", caption, class_="soft")] if caption else []
    return element("section", element("h2", title), *said, *children, class_="card")


def _timeline(plan: Plan, simulation: Simulation, measured: Measured | None) -> Markup:
    caption = f"One step on every rank; numbers are microbatches. Predicted: {seconds_text(simulation.step_time_s)}."
    if measured is not None and measured.timeline:
        last = max(span.end_s for span in measured.timeline)
        caption += f" Measured: the last step, {seconds_text(last)} (a typical one took {seconds_text(measured.step_time_s)})."
    caption += f"{omitted_text(plan)} Drag over a part to enlarge it, double-click to go back, hold the pointer on a bar to read it."
    figure = timeline_figure(plan, simulation, measured)
    return _section(
        "Timeline",
        caption,
        legend(COLOURS, {"receive and wait": "hatched", "send": "triangle"}),
        chart("timeline", figure, "timeline of all ranks"),
    )


def _memory(plan: Plan, simulation: Simulation, measured: Measured | None) -> Markup:
    limit = plan.predicted.limit_bytes
    caption = "Each rank's predicted bytes at its peak, by kind"
    caption += "; the diamond is the measured peak." if measured is not None else "."
    if limit is not None and not limit_is_drawn(plan, simulation):
        caption += f" A rank has {bytes_text(limit)}, far beyond what is drawn."
    figure = memory_figure(plan, simulation, measured)
    colours = KINDS if measured is None else KINDS | {"measured": MEASURED}
    return _section(
        "Memory", caption + omitted_text(plan), legend(colours, {"measured": "diamond"}), chart("memory", figure, "memory of all ranks")
    )


def _layouts(plan: Plan) -> Markup:
    if not plan.considered:
        return Markup("")
    caption = f"{len(plan.considered)} layouts were considered; those with the best estimates were simulated."
    drawn = [chart("layouts", tradeoff_figure(plan), "time and memory of layouts")] if len(simulated(plan)) > 1 else []
    return _section("Layouts considered", caption, *drawn, layouts_table(plan))


def _script(text: str) -> Markup:
    return element("script", Markup(text.replace("</script", "<\\/script")))


def _resource(name: str) -> str:
    return files("shardwise.report").joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return join(Markup(get_plotlyjs()))
