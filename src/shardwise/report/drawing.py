"""The plan drawn: stages from left to right, in each its mesh of ranks, between them what is sent.

┌ stage 0 ┐   262 kB →   ┌ stage 1 ┐      one grid: stages in the odd columns, arrows in the even ones;
│ r0  r1  │   ← 262 kB   │ r2  r3  │      an edge that skips stages is a line of its own below, as wide as
└─────────┘              └─────────┘      the stages that it spans
"""

from __future__ import annotations

from collections.abc import Iterable

from shardwise.planner.plan import Plan
from shardwise.program.build import rank_of
from shardwise.report.markup import Markup, element
from shardwise.report.units import bytes_text, count_text, seconds_text
from shardwise.simulate.profile import EdgeProfile, StageProfile
from shardwise.simulate.simulator import Simulation

__all__ = ["drawing"]

_MOST_PLACES = 8  # of a mesh axis that are drawn
_MOST_MODULES = 8
_WIDE_PLACES = 4  # of the tensor axis that are drawn with their memory; more get their number alone


def drawing(plan: Plan, simulation: Simulation) -> Markup:
    """All stages and edges."""
    pairs = _by_ends(plan.profile.edges)
    cells = [_stage(plan, simulation, stage) for stage in range(len(plan.stages))]
    cells += [_arrow(source, pairs.get((source, source + 1), [])) for source in range(len(plan.stages) - 1)]
    far = sorted(ends for ends in pairs if ends[1] != ends[0] + 1)
    lines = [_far(source, target, row, pairs[source, target]) for row, (source, target) in enumerate(far, start=2)]
    stage_rem = 10 if plan.tp <= _WIDE_PLACES else 5 + 2.4 * min(plan.tp, _MOST_PLACES)
    columns = " 6.5rem ".join([f"minmax({stage_rem}rem, 1fr)"] * len(plan.stages))
    return element(
        "div", element("div", *_in_order(cells, len(plan.stages)), *lines, class_="plan", style=f"--columns:{columns}"), class_="scroll"
    )


def _in_order(cells: list[Markup], stages: int) -> list[Markup]:
    """Stage, arrow, stage, …: the order in which they are read in a narrow window."""
    arrows = [*cells[stages:], Markup("")]
    return [each for pair in zip(cells[:stages], arrows, strict=True) for each in pair]


def _by_ends(edges: Iterable[EdgeProfile]) -> dict[tuple[int, int], list[EdgeProfile]]:
    pairs: dict[tuple[int, int], list[EdgeProfile]] = {}
    for edge in edges:
        pairs.setdefault((edge.source, edge.target), []).append(edge)
    return pairs


# ---- a stage


def _stage(plan: Plan, simulation: Simulation, stage: int) -> Markup:
    profile = plan.profile.stages[stage]
    size = f"{count_text(profile.parameters)} parameters, " if profile.parameters else ""
    return element(
        "section",
        element("h3", f"Stage {stage}" if len(plan.stages) > 1 else "All of the model"),
        _modules(profile.modules or [plan.stages[stage].partition(":")[0] or plan.model]),
        element("p", f"{size}{bytes_text(profile.memory.get('parameters', 0))} of them on each rank", class_="soft"),
        _mesh(plan, simulation, stage),
        element("p", _busy(profile), class_="soft"),
        class_="stage",
        style=f"grid-column:{2 * stage + 1}",
    )


def _modules(modules: list[str]) -> Markup:
    items = [element("li", element("code", module)) for module in modules[:_MOST_MODULES]]
    if more := len(modules) - len(items):
        items.append(element("li", f"and {more} more", class_="soft", title=", ".join(modules[_MOST_MODULES:])))
    return element("ul", *items)


def _busy(profile: StageProfile) -> str:
    parts = [f"{kind}\u00a0{seconds_text(sum(profile.seconds[kind]))}" for kind in ("forward", "backward") if kind in profile.seconds]
    return f"each microbatch: {', '.join(parts)}"


def _mesh(plan: Plan, simulation: Simulation, stage: int) -> Markup:
    """The stage's ranks: a row for each place along dp and cp, a column for each along tp."""
    data = plan.dp * plan.cp
    rows, columns = min(data, _MOST_PLACES), min(plan.tp, _MOST_PLACES)
    home = plan.placement[stage]
    numbers = [[rank_of(home, row, t, data, plan.tp) for t in range(columns)] for row in range(rows)]
    alone = plan.tp > _WIDE_PLACES
    cells = [[_rank(rank, bytes_text(simulation.memory_bytes[rank]), alone=alone) for rank in row] for row in numbers]
    body = [element("tr", _axis(_data_place(plan, number), data), *row) for number, row in enumerate(cells)]
    top = [element("tr", _axis("", data), *(element("th", f"tp {t}") for t in range(columns)))] if plan.tp > 1 else []
    note = (
        []
        if (rows, columns) == (data, plan.tp)
        else [element("caption", f"the first of {data * plan.tp} ranks: {_data_axes(plan)} × tp {plan.tp}")]
    )
    return element("table", *note, *top, *body, class_="mesh")


def _data_axes(plan: Plan) -> str:
    return f"dp {plan.dp}" + (f" × cp {plan.cp}" if plan.cp > 1 else "")


def _data_place(plan: Plan, row: int) -> str:
    """`dp 0`, `cp 1`, or `dp 0 cp 1` where both have several."""
    d, c = divmod(row, plan.cp)
    return " ".join(([f"dp {d}"] if plan.dp > 1 or plan.cp == 1 else []) + ([f"cp {c}"] if plan.cp > 1 else []))


def _axis(text: str, ranks: int) -> Markup:
    return element("th", text, class_="side") if ranks > 1 else Markup("")


def _rank(rank: int, memory: str, *, alone: bool) -> Markup:
    said = f"rank {rank}: predicted peak memory {memory}"
    return element("td", str(rank), title=said) if alone else element("td", f"rank {rank}", element("small", memory), title=said)


# ---- edges


def _arrow(source: int, edges: list[EdgeProfile]) -> Markup:
    return element("div", *_sent(edges), class_="arrow", style=f"grid-column:{2 * source + 2}", title=_names(edges))


def _sent(edges: list[EdgeProfile]) -> list[Markup]:
    if not edges:
        return [element("small", "nothing is sent")]
    forward = sum(edge.nbytes for edge in edges)
    back = sum(edge.nbytes for edge in edges if edge.requires_grad)
    seconds = seconds_text(sum(edge.transfer_s for edge in edges))
    lines = [element("span", bytes_text(forward), class_="forth")]
    lines += [element("span", bytes_text(back), class_="back")] if back else []
    values = "" if len(edges) == 1 else f"{len(edges)} values, "
    return [*lines, element("small", f"{values}{seconds} each microbatch")]


def _far(source: int, target: int, row: int, edges: list[EdgeProfile]) -> Markup:
    ends = element("b", f"stage {source} → stage {target} ")
    place = f"grid-column:{2 * source + 1}/{2 * target + 2};grid-row:{row}"
    return element("div", ends, *_sent(edges), class_="far", style=place, title=_names(edges))


def _names(edges: list[EdgeProfile]) -> str:
    return "\n".join(f"{edge.name}: {bytes_text(edge.nbytes)}" for edge in edges)
