"""The page about a layout for many devices: what it takes, where it sits, how its step goes, and all others that were looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path

from shardwise.cluster.topology import Machines
from shardwise.report.layouts import Point
from shardwise.report.markup import Markup, element
from shardwise.report.page import cluster_section, document, memory_section, scatter, section, timeline_section
from shardwise.report.placement import Sizes
from shardwise.report.units import bytes_text, count_text, rate_text, seconds_text
from shardwise.simulate.profile import Profile, StageProfile
from shardwise.simulate.simulator import Mesh, Simulation

__all__ = ["Choice", "Prospect", "write_prospect"]

_OPEN_ROWS = 12  # of the table of layouts; the others are folded away


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A layout of the comparison. use: share of the devices' peak; bubble: of the ranks' time; runs: whether the runtime can run it."""

    layout: str
    seconds: float
    memory_bytes: int
    use: float
    bubble: float | None
    runs: bool


@dataclass(frozen=True, kw_only=True)
class Prospect:
    """What the page is about.

    words: the layout, part by part, such as `tp 8`; mesh, profile: of its simulation; limit_bytes: what a rank may hold; use: share of the
    devices' peak that the model's arithmetic takes; dollars: of a step; choices: layouts that fit, the chosen one first; points: every
    layout that was put together; what_if: change → what it would give; explanation: lines.
    """

    model: str
    machines: Machines
    words: Sequence[str]
    sizes: Sizes
    mesh: Mesh
    profile: Profile
    simulation: Simulation
    global_batch: int
    limit_bytes: float
    use: float
    choices: Sequence[Choice]
    points: Sequence[Point]
    tokens: int | None = None
    dollars: float | None = None
    what_if: Sequence[tuple[str, str]] = ()
    explanation: Sequence[str] = ()


def write_prospect(path: str | Path, found: Prospect) -> None:
    """Writes the page; about 5 MB, most of it plotly.js."""
    sections = [
        cluster_section(found.machines, found.sizes),
        section("Stages", _stages_caption(found), _stages(found.profile)),
        timeline_section(found.mesh, found.simulation),
        memory_section(found.mesh, found.simulation, found.limit_bytes),
        section("Layouts considered", _considered(found), scatter(list(found.points), found.limit_bytes), _choices(found)),
        *([section("What if", "The same layout, simulated again.", _pairs(found.what_if))] if found.what_if else []),
        *([section("Why", "", element("pre", "\n".join(found.explanation)))] if found.explanation else []),
    ]
    title = f"{found.model} on {found.machines.name}"
    Path(path).write_text(document(title, _header(found), *sections), encoding="utf-8")


# ---- header ------------------------------------------------------------------------------------------------------------------------


def _header(found: Prospect) -> Markup:
    title = element("h1", found.model, element("span", f" on {found.machines.name}", class_="soft"))
    chips = element("p", *(element("span", word, class_="chip") for word in found.words), class_="chips")
    return element(
        "header", element("p", "shardwise report", class_="kicker"), title, chips, element("div", *_cards(found), class_="cards")
    )


def _cards(found: Prospect) -> list[Markup]:
    step, fullest = found.simulation, max(found.simulation.memory, key=lambda use: sum(use.values()))
    peak = sum(fullest.values())
    kinds = sorted(fullest.items(), key=lambda pair: -pair[1])[:2]
    rate = rate_text(found.global_batch / step.step_time_s, "samples")
    tokens = "" if found.tokens is None else f", {count_text(found.tokens * found.global_batch / step.step_time_s)} tokens/s"
    dollars = "" if found.dollars is None else f", ${found.dollars:,.3g} a step"
    return [
        _card("Step time, predicted", seconds_text(step.step_time_s), rate + tokens),
        _card("Of the devices' peak", f"{found.use:.0%}", f"the model's own arithmetic on {found.machines.ranks:,} devices{dollars}"),
        _card(
            "Peak memory, predicted",
            bytes_text(peak),
            f"of {bytes_text(found.limit_bytes)}: {', '.join(f'{kind} {bytes_text(size)}' for kind, size in kinds)}",
        ),
        _card("Ranks wait, of their time", f"{step.bubble:.0%}", f"the busiest communicates {seconds_text(step.communication_s)} a step"),
    ]


def _card(title: str, big: str, line: str) -> Markup:
    return element(
        "section", element("h2", title), element("p", big, class_="big"), element("p", line, class_="soft"), class_="card figure"
    )


# ---- stages ------------------------------------------------------------------------------------------------------------------------


def _stages_caption(found: Prospect) -> str:
    each = found.sizes.stage_ranks
    many = f" Each of {found.sizes.pp} pipeline ranks has {found.sizes.chunks} of them." if found.sizes.chunks > 1 else ""
    ranks = f"{each:,} ranks" if each > 1 else "one rank"
    return f"In the order in which data passes them; each on {ranks}; equal ones together. Seconds are of one microbatch.{many}"


def _stages(profile: Profile) -> Markup:
    rows = []
    for _, run in groupby(enumerate(profile.stages), key=lambda pair: _figures(pair[1])):
        numbers = [number for number, _ in run]
        stage = profile.stages[numbers[0]]
        named = f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"
        sent = next((bytes_text(edge.nbytes) for edge in profile.edges if edge.source == numbers[0]), "—")
        cells = (named, count_text(stage.parameters) if stage.parameters else "—", *_figures(stage)[1:], sent)
        rows.append(element("tr", *(element("td", cell) for cell in cells)))
    names = ("stage", "parameters", "forward", "backward", "saved", "reduces gradients", "sends on")
    return _table(names, rows, "figures")


def _figures(stage: StageProfile) -> tuple[str, ...]:
    """What makes stages equal to a reader."""
    backward = sum(sum(stage.seconds.get(kind, (0.0, 0.0))) for kind in ("backward", "weight"))
    seconds = [seconds_text(each) for each in (sum(stage.seconds["forward"]), backward)]
    return count_text(stage.parameters), *seconds, bytes_text(stage.saved_bytes), seconds_text(sum(stage.seconds["reduce"]))


# ---- layouts -----------------------------------------------------------------------------------------------------------------------


def _considered(found: Prospect) -> str:
    kinds = [each.kind for each in found.points]
    unfit = kinds.count("does not fit")
    simulated = sum(kind in ("chosen", "simulated") for kind in kinds)
    text = f"{len(kinds):,} layouts were put together, {simulated:,} of them simulated; {unfit:,} do not fit."
    return f"{text} Hold the pointer on a point to read it; drag over a part to enlarge it."


def _choices(found: Prospect) -> Markup:
    best = found.choices[0].seconds if found.choices else 1.0
    rows = [_choice(each, best, chosen=place == 0) for place, each in enumerate(found.choices)]
    names = ("", "layout", "step", "longer", "of the peak", "ranks wait", "memory", "runs today")
    if len(rows) <= _OPEN_ROWS + 2:
        return _table(names, rows)
    rest = element("details", element("summary", f"{len(rows) - _OPEN_ROWS} more"), _table(names, rows[_OPEN_ROWS:]))
    return Markup(_table(names, rows[:_OPEN_ROWS]) + rest)


def _choice(each: Choice, best_s: float, *, chosen: bool) -> Markup:
    cells = (
        seconds_text(each.seconds),
        "—" if chosen else f"{each.seconds / best_s - 1:.1%}",
        f"{each.use:.0%}",
        "—" if each.bubble is None else f"{each.bubble:.0%}",
        bytes_text(each.memory_bytes),
        "yes" if each.runs else "no",
    )
    layout = Markup(escape(each.layout).replace(",", ",<wbr>"))
    first = (element("td", "★" if chosen else "", class_="star"), element("td", element("code", layout), class_="layout"))
    return element("tr", *first, *(element("td", cell) for cell in cells), class_="chosen" if chosen else None)


def _pairs(pairs: Sequence[tuple[str, str]]) -> Markup:
    rows = [element("tr", element("td", change), element("td", verdict)) for change, verdict in pairs]
    return _table(("change", "what it gives"), rows, "figures")


def _table(names: Sequence[str], rows: Sequence[Markup], kind: str = "layouts") -> Markup:
    head = element("thead", element("tr", *(element("th", name) for name in names)))
    return element("div", element("table", head, element("tbody", *rows)), class_=f"scroll {kind}")
