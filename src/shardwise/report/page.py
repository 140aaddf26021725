"""The report: one HTML file that needs nothing else, neither network nor server."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from shardwise.cluster.specs import machines
from shardwise.cluster.topology import Machines
from shardwise.errors import ClusterError
from shardwise.planner.plan import Plan
from shardwise.report.charts import chart, legend
from shardwise.report.drawing import drawing
from shardwise.report.header import header
from shardwise.report.layouts import KINDS as CANDIDATES
from shardwise.report.layouts import Point, layouts_table, points_of, tradeoff_figure
from shardwise.report.layouts import limit_is_drawn as near_limit
from shardwise.report.markup import Markup, element, join
from shardwise.report.measured import Measured
from shardwise.report.memory import KINDS, MEASURED, limit_is_drawn, memory_figure
from shardwise.report.placement import Sizes, placement
from shardwise.report.ranks import omitted_text, shown_ranks
from shardwise.report.splits import splits
from shardwise.report.timeline import COLOURS, timeline_figure
from shardwise.report.units import bytes_text, seconds_text
from shardwise.simulate.simulator import Mesh, Simulation

__all__ = ["cluster_section", "document", "memory_section", "scatter", "section", "timeline_section", "write_report"]

# The browser itself refuses whatever would be loaded from elsewhere.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def write_report(path: str | Path, plan: Plan, simulation: Simulation, measured: Measured | None = None) -> None:
    """Writes the page about a plan, its simulated step and, where there is one, the run; about 5 MB, most of it plotly.js."""
    sections = [
        section(
            "The plan", "Stages from left to right, each on its own ranks; arrows show what a microbatch sends.", drawing(plan, simulation)
        ),
        *_cluster(plan),
        section("What each axis splits", "", splits(plan)),
        timeline_section(plan.mesh, simulation, measured),
        memory_section(plan.mesh, simulation, plan.predicted.limit_bytes, measured),
        _layouts(plan),
        section("The plan in words", "", element("pre", "\n".join(plan.explanation) or plan.layout)),
    ]
    Path(path).write_text(document(f"{plan.model} on {plan.cluster}", header(plan, simulation, measured), *sections), encoding="utf-8")


def document(title: str, *parts: Markup) -> str:
    """The whole page: its style, its scripts, and these parts."""
    body = [
        element("noscript", element("p", "The charts need JavaScript; it is all in this file.", class_="failed")),
        element("main", *parts),
        _script(_plotly()),
        _script(_resource("page.js")),
    ]
    return "<!doctype html>\n" + element("html", _head(title), element("body", *body), lang="en") + "\n"


def _head(title: str) -> Markup:
    metas = Markup(
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    )
    return element("head", metas, element("title", f"{title} · shardwise"), element("style", Markup(_resource("page.css"))))


def section(title: str, caption: str, *children: str) -> Markup:
    """A card."""
    said = [element("p", caption, class_="soft")] if caption else []
    return element("section", element("h2", title), *said, *children, class_="card")


def cluster_section(found: Machines, sizes: Sizes) -> Markup:
    """The machines and who sits where."""
    caption = f"{found.name}: {found.ranks:,} devices in {found.nodes:,} node{'s' if found.nodes > 1 else ''}"
    caption += (
        ", coloured by stage." if sizes.pp > 1 and sizes.chunks == 1 else ", coloured by place in the pipeline." if sizes.pp > 1 else "."
    )
    return section("The cluster", caption + " Hold the pointer on a device to read what it holds.", placement(found, sizes))


def _cluster(plan: Plan) -> list[Markup]:
    """For plans on devices of the catalog."""
    try:
        found = machines(plan.cluster)
    except ClusterError:
        return []
    sizes = Sizes(dp=plan.dp, cp=plan.cp, tp=plan.tp, pp=plan.pp, ep=plan.ep if plan.cp == 1 else 1, chunks=plan.chunks)
    return [cluster_section(found, sizes)] if found.ranks == plan.ranks else []


def timeline_section(mesh: Mesh, simulation: Simulation, measured: Measured | None = None) -> Markup:
    """The step, a row for each rank."""
    caption = f"One step on every rank; numbers are microbatches. Predicted: {seconds_text(simulation.step_time_s)}."
    if measured is not None and measured.timeline:
        last = max(span.end_s for span in measured.timeline)
        caption += f" Measured: the last step, {seconds_text(last)} (a typical one took {seconds_text(measured.step_time_s)})."
    caption += f"{omitted_text(mesh)} Drag over a part to enlarge it, double-click to go back, hold the pointer on a bar to read it."
    figure = timeline_figure(shown_ranks(mesh), simulation, measured)
    return section(
        "Timeline",
        caption,
        legend(COLOURS, {"receive and wait": "hatched", "send": "triangle"}),
        chart("timeline", figure, "timeline of all ranks"),
    )


def memory_section(mesh: Mesh, simulation: Simulation, limit: float | None, measured: Measured | None = None) -> Markup:
    """Bytes by rank and kind."""
    caption = "Each rank's predicted bytes at its peak, by kind"
    caption += "; the diamond is the measured peak." if measured is not None else "."
    if limit is not None and not limit_is_drawn(limit, simulation):
        caption += f" A rank has {bytes_text(limit)}, far beyond what is drawn."
    figure = memory_figure(shown_ranks(mesh), simulation, measured, limit)
    colours = KINDS if measured is None else KINDS | {"measured": MEASURED}
    return section(
        "Memory", caption + omitted_text(mesh), legend(colours, {"measured": "diamond"}), chart("memory", figure, "memory of all ranks")
    )


def scatter(points: list[Point], limit_bytes: float | None) -> Markup:
    """Time against memory of all layouts whose memory is known."""
    kinds = {kind: colour for kind, colour in CANDIDATES.items() if any(each.kind == kind for each in points)}
    shapes = {"chosen": "star", "simulated": "disc", "estimated": "ring", "does not fit": "cross"}
    if limit_bytes is not None and near_limit(points, limit_bytes):
        said = f"limit {bytes_text(limit_bytes)}"
        kinds[said], shapes[said] = CANDIDATES["does not fit"], "dashed"
    drawn = chart("layouts", tradeoff_figure(points, limit_bytes), "time and memory of layouts")
    return join(legend(kinds, shapes), drawn)


def _layouts(plan: Plan) -> Markup:
    if not plan.considered:
        return Markup("")
    caption = f"{len(plan.considered)} layouts were considered; those with the best estimates were simulated."
    points = points_of(plan)
    drawn = [scatter(points, plan.predicted.limit_bytes)] if len(points) > 1 else []
    return section("Layouts considered", caption, *drawn, layouts_table(plan))


def _script(text: str) -> Markup:
    return element("script", Markup(text.replace("</script", "<\\/script")))


def _resource(name: str) -> str:
    return files("shardwise.report").joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return join(Markup(get_plotlyjs()))
