"""The cluster drawn, and where the ranks of a layout sit on it: which links each axis crosses, nodes with their devices, a map of all.

┌ node 0 ───────┐ ┌ node 1 ───────┐   62 nodes   ┌ node 64 ──────┐
│ 0 1 2 3       │ │ 8 9 10 11     │   like these │ 512 513 …     │      a colour for each place in the pipeline
│ NVSwitch      │ │ NVSwitch      │              │ NVSwitch      │
└───────────────┘ └───────────────┘              └───────────────┘
═══ NDR InfiniBand ══════════════════════════════════════════════

Ranks are numbered stage by stage, then along dp, cp and tp; nodes hold consecutive ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shardwise.cluster.topology import Crossing, Level, Machines
from shardwise.report.markup import Markup, element, join
from shardwise.report.units import bytes_text

__all__ = ["Sizes", "placement"]

_MOST_NODES = 6  # drawn with their devices
_MOST_DEVICES = 16  # of a node, drawn with what they hold; of more the number alone
_MOST_SHOWN = 144  # devices of a node
_MOST_LETTERS = 12  # below a device's number
_MAP_WIDTH, _MOST_SQUARES = 1160, 4096


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A layout's axes. stages: of each place in the pipeline, several where a rank has chunks."""

    dp: int
    cp: int
    tp: int
    pp: int
    ep: int = 1
    chunks: int = 1

    @property
    def stage_ranks(self) -> int:
        """Of each place in the pipeline."""
        return self.dp * self.cp * self.tp

    def place(self, rank: int) -> tuple[int, int, int, int]:
        """(place in the pipeline, d, c, t)."""
        rest, t = divmod(rank, self.tp)
        rest, c = divmod(rest, self.cp)
        pipe, d = divmod(rest, self.dp)
        return pipe, d, c, t

    def words(self, rank: int) -> str:
        """`stage 1 · dp 3 · tp 7`: its place on the axes that have several."""
        pipe, *others = self.place(rank)
        named = [(self.stage(pipe), self.pp)] + [
            (f"{name} {at}", size) for name, at, size in zip(("dp", "cp", "tp"), others, (self.dp, self.cp, self.tp), strict=True)
        ]
        return " · ".join(text for text, size in named if size > 1) or "all of the model"

    def stage(self, pipe: int) -> str:
        """What a place in the pipeline is called."""
        return f"stage {pipe}" if self.chunks == 1 else f"pipeline rank {pipe}"


def placement(machines: Machines, sizes: Sizes) -> Markup:
    """All three; the machines have as many ranks as the layout."""
    assert machines.ranks == sizes.stage_ranks * sizes.pp, "a layout takes all ranks"
    parts = [_nodes(machines, sizes), _axes(machines, sizes)]
    if machines.nodes > _MOST_NODES:
        parts.append(_map(machines, sizes))
    return join(*parts)


def _colour(pipe: int, sizes: Sizes) -> str:
    """Round the circle of hues, so that neighbours differ; dark enough for white numbers."""
    return f"hsl({(212 + 300 * pipe / max(sizes.pp, 2)) % 360:.0f} 52% {40 + 8 * (pipe % 2)}%)"


# ---- nodes -------------------------------------------------------------------------------------------------------------------------


def _nodes(machines: Machines, sizes: Sizes) -> Markup:
    firsts = _first_ranks(machines)
    shown = _shown_nodes(machines, sizes, firsts)
    cells: list[Markup] = []
    before = -1
    for node in shown:
        if node > before + 1:
            cells.append(_left_out(node - before - 1))
        cells.append(_node(machines, sizes, node, firsts[node], firsts[node + 1]))
        before = node
    if before < machines.nodes - 1:
        cells.append(_left_out(machines.nodes - 1 - before))
    bands = [_band(level) for level in machines.groups[0].outside]
    return element("div", element("div", *cells, class_="nodes"), *bands, class_="cluster")


def _first_ranks(machines: Machines) -> list[int]:
    """Of each node, and the number of ranks."""
    firsts = [0]
    for group in machines.groups:
        for _ in range(group.nodes):
            firsts.append(firsts[-1] + group.per_node)
    return firsts


def _shown_nodes(machines: Machines, sizes: Sizes, firsts: list[int]) -> list[int]:
    """All of few; else the first two, those where the next places in the pipeline and other devices begin, and the last."""
    if machines.nodes <= _MOST_NODES:
        return list(range(machines.nodes))
    begins = [machines.node_of(pipe * sizes.stage_ranks) for pipe in range(1, sizes.pp)]
    begins = [
        machines.node_of(sum(group.ranks for group in machines.groups[:number])) for number in range(1, len(machines.groups))
    ] + begins
    wanted = list(dict.fromkeys([0, machines.nodes - 1, *begins, 1]))
    return sorted(wanted[:_MOST_NODES])


def _left_out(nodes: int) -> Markup:
    return element("div", element("b", f"{nodes:,}"), f" more node{'s' if nodes > 1 else ''}", class_="gap")


def _node(machines: Machines, sizes: Sizes, node: int, first: int, end: int) -> Markup:
    group = machines.group_of(first)
    told = end - first <= _MOST_DEVICES
    cells = [
        _device(rank, sizes, group.device.title or group.device.name, told=told) for rank in range(first, min(end, first + _MOST_SHOWN))
    ]
    more = [element("small", f"and {end - first - _MOST_SHOWN:,} more")] if end - first > _MOST_SHOWN else []
    return element(
        "section",
        element("h3", f"Node {node:,}", element("span", f" {group.device.name}", class_="soft")),
        element("div", *cells, *more, class_="devices" if told else "devices many"),
        *(_band(level) for level in group.inside),
        class_="node",
    )


def _device(rank: int, sizes: Sizes, device: str, *, told: bool) -> Markup:
    words = sizes.words(rank)
    pipe = sizes.place(rank)[0]
    small = [element("small", _short(rank, sizes))] if told else []
    return element(
        "span", f"{rank}", *small, title=f"rank {rank:,}: {words}; {device}", style=f"--stage:{_colour(pipe, sizes)}", class_="device"
    )


def _short(rank: int, sizes: Sizes) -> str:
    """`s1 d3 t7`."""
    names = zip("sdct", sizes.place(rank), (sizes.pp, sizes.dp, sizes.cp, sizes.tp), strict=True)
    words = [f"{name}{at}" for name, at, size in names if size > 1]
    return " ".join(words) if sum(map(len, words)) + len(words) <= _MOST_LETTERS else "".join(words)


def _band(level: Level) -> Markup:
    return element("div", _link(level), class_="band", title=f"{level.name}: joins {level.ranks:,} devices")


def _link(level: Level) -> str:
    """`cluster: NDR, 50 GB/s a device`."""
    slower = f", oversubscribed {level.oversubscription:g}" if level.oversubscription != 1 else ""
    return f"{level.name}: {level.link.name}, {bytes_text(level.bytes_per_s)}/s a device each way{slower}"


# ---- axes --------------------------------------------------------------------------------------------------------------------------

_CARRIES = {
    "tp": "parts of every operator's results, in each microbatch",
    "cp": "keys and values of each attention, in each microbatch",
    "ep": "rows to their experts and back, in each microbatch",
    "dp": "gradients, once a step",
    "pp": "a microbatch's activations and their gradients, from stage to stage",
}


def _axes(machines: Machines, sizes: Sizes) -> Markup:
    rows = [_axis(machines, name, size, stride) for name, size, stride in _strides(sizes) if size > 1]
    if not rows:
        return Markup("")
    head = element("thead", element("tr", *(element("th", name) for name in ("axis", "ranks", "apart", "crosses", "carries"))))
    return element("div", element("table", head, element("tbody", *rows)), class_="scroll axes-table")


def _strides(sizes: Sizes) -> Iterator[tuple[str, int, int]]:
    """(axis, ranks, how far apart), nearest first."""
    yield "tp", sizes.tp, 1
    yield "cp", sizes.cp, sizes.tp
    yield "ep", sizes.ep, sizes.tp
    yield "dp", sizes.dp, sizes.tp * sizes.cp
    yield "pp", sizes.pp, sizes.stage_ranks


def _axis(machines: Machines, name: str, size: int, stride: int) -> Markup:
    cells = (name, f"{size:,}", f"{stride:,}", _crossed(_crossing(machines, size, stride)), _CARRIES[name])
    return element("tr", *(element("td", cell) for cell in cells))


def _crossing(machines: Machines, size: int, stride: int) -> Crossing:
    """Of the slowest group; of the first where groups do not tile all ranks."""
    if machines.ranks % (size * stride) == 0:
        return machines.span(stride, size)
    return machines.crossing(range(0, min(size * stride, machines.ranks), stride))


def _crossed(crossing: Crossing) -> str:
    return ", then ".join(f"{hop.level.name} ({hop.level.link.name}, {bytes_text(hop.level.bytes_per_s)}/s)" for hop in crossing.hops)


# ---- the map -----------------------------------------------------------------------------------------------------------------------


def _map(machines: Machines, sizes: Sizes) -> Markup:
    """A square for each node, or for several; one row after the other."""
    each = -(-machines.nodes // _MOST_SQUARES)
    squares = -(-machines.nodes // each)
    columns = min(squares, 64 if squares <= 512 else 128)
    side = min(26.0, _MAP_WIDTH / columns)
    firsts = _first_ranks(machines)
    drawn = [_square(number, each, columns, side, machines, sizes, firsts) for number in range(squares)]
    rows = -(-squares // columns)
    box = f"0 0 {columns * side:.1f} {rows * side:.1f}"
    label = "one square a node" if each == 1 else f"one square for {each} nodes"
    svg = element(
        "svg",
        *drawn,
        class_="map",
        viewBox=box,
        width=f"{columns * side:.0f}",
        height=f"{rows * side:.0f}",
        role="img",
        aria_label="all nodes",
    )
    return element(
        "div", element("p", f"All {machines.nodes:,} nodes, {label}. ", *_keys(sizes), class_="soft legend"), svg, class_="whole"
    )


def _square(number: int, each: int, columns: int, side: float, machines: Machines, sizes: Sizes, firsts: list[int]) -> Markup:
    start, end = number * each, min((number + 1) * each, machines.nodes)
    first, last = firsts[start], firsts[end] - 1
    pipes = sorted({sizes.place(first)[0], sizes.place(last)[0]})
    named = f"nodes {start:,} to {end - 1:,}" if end > start + 1 else f"node {start:,}"
    stages = " to ".join(sizes.stage(pipe) for pipe in pipes)
    said = element("title", f"{named}: ranks {first:,} to {last:,}; {stages}; from {sizes.words(first)} to {sizes.words(last)}")
    row, column = divmod(number, columns)
    place = {"x": f"{column * side + 1:.1f}", "y": f"{row * side + 1:.1f}", "width": f"{side - 2:.1f}", "height": f"{side - 2:.1f}"}
    return element("rect", said, **place, rx="2", fill=_colour(pipes[0], sizes))


def _keys(sizes: Sizes) -> Iterator[Markup]:
    """Colours of the places in the pipeline: all of few, else the first and the last."""
    if sizes.pp == 1:
        return
    shown = range(sizes.pp) if sizes.pp <= 16 else (0, sizes.pp // 4, sizes.pp // 2, 3 * sizes.pp // 4, sizes.pp - 1)
    for pipe in shown:
        yield element("span", element("i", class_="patch", style=f"--patch:{_colour(pipe, sizes)}"), sizes.stage(pipe))
