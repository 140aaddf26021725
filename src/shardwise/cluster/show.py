"""Machines as tables for people and as JSON for programs: figures, levels, totals, and the source of every constant."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Group as Stack
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from shardwise.cluster.catalog import DTYPES, Catalog, DeviceSpec, LinkSpec, NodeSpec, catalog
from shardwise.cluster.topology import Group, Level, Machines

__all__ = ["as_json", "catalog_json", "listing", "show"]

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_UNITS = {"memory_bytes": "B", "memory_bytes_per_s": "B/s", "link_bytes_per_s": "B/s", "peak_flops": "flop/s", "power_w": "W"}


def show(machines: Machines) -> Stack:
    """Tables of the devices, of what joins them, of totals and of sources."""
    return Stack(
        Text(f"{machines.name}: {machines.ranks:,} devices in {_counted(machines.nodes, 'node')}", style="bold"),
        "",
        _devices(machines),
        "",
        _levels(machines),
        "",
        _totals(machines),
        "",
        _sources(_specs(machines)),
    )


def as_json(machines: Machines) -> dict[str, Any]:
    """The same, in bytes, seconds, flop/s and US dollars."""
    return {
        "name": machines.name,
        "ranks": machines.ranks,
        "nodes": machines.nodes,
        "memory_bytes": machines.memory_bytes,
        "peak_flops": {dtype: machines.peak_flops(dtype) for dtype in _dtypes(machines)},
        "price_per_hour": machines.price_per_hour,
        "groups": [_group_json(group) for group in machines.groups],
        "devices": {spec.name: spec.model_dump(mode="json") for spec in machines.devices},
        "links": {spec.name: spec.model_dump(mode="json") for spec in _links(machines)},
    }


def listing(known: Catalog | None = None) -> Stack:
    """Tables of all devices, links and nodes that can be named."""
    names = known or catalog()
    devices = _table("device", "memory", "rate", *DTYPES, "$/h", title="Devices (flop/s are dense)", gap=1)
    for device in names.devices.values():
        _row(devices, *_device_row(device), _price(device.price_per_hour))
    links = _table("link", "other names…", "what…", "of a device", "latency", "SHARP", title="Links (rates in each direction)")
    for link in names.links.values():
        rate = _si(link.bytes_per_s, "B/s")
        _row(links, link.name, ", ".join(link.aliases), link.label, rate, _seconds(link.latency_s), _sharp(link))
    nodes = _table("node", "what…", "devices", "joined by", "network", title="Nodes")
    for node in names.nodes.values():
        _row(nodes, node.name, node.label, f"{node.devices} {node.device}", node.link, _network(node))
    return Stack(devices, "", links, "", nodes)


def catalog_json(known: Catalog | None = None) -> dict[str, Any]:
    """All devices, links and nodes, with sources."""
    names = known or catalog()
    return {
        kind: {name: spec.model_dump(mode="json") for name, spec in specs.items()}
        for kind, specs in (("devices", names.devices), ("links", names.links), ("nodes", names.nodes))
    }


# ---- tables ------------------------------------------------------------------------------------------------------------------------


def _table(*headings: str, title: str, gap: int = 2) -> Table:
    """Columns whose heading ends in … may wrap; the others say where they are cut."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, gap, 0, 0))
    for heading in headings:
        wraps = heading.endswith("…")
        table.add_column(heading.removesuffix("…"), no_wrap=not wraps, overflow="fold" if wraps else "ellipsis", header_style="dim")
    return table


def _row(table: Table, *cells: str) -> None:
    table.add_row(*map(escape, cells))


def _devices(machines: Machines) -> Table:
    """A column for each group."""
    groups = machines.groups
    table = _table("", *(f"{group.device.name}…" for group in groups), title="Devices (flop/s are dense)")
    first = [sum(group.ranks for group in groups[:index]) for index in range(len(groups))]
    _row(table, "ranks", *(f"{start:,} to {start + group.ranks - 1:,}" for start, group in zip(first, groups, strict=True)))
    _row(table, "nodes", *(f"{group.nodes:,} of {group.per_node} ({group.node})" for group in groups))
    _row(table, "memory", *(_si(group.device.memory_bytes, "B") for group in groups))
    _row(table, "memory rate", *(_si(group.device.memory_bytes_per_s, "B/s") for group in groups))
    for dtype in DTYPES:
        if any(dtype in group.device.peak_flops for group in groups):
            _row(table, f"{dtype} peak", *(_peak(group.device, dtype) for group in groups))
    _row(table, "list price", *(f"{_price(group.device.price_per_hour)} $/h" for group in groups))
    return table


def _device_row(device: DeviceSpec) -> list[str]:
    peaks = [_si(device.peak_flops[dtype], "", 3) if dtype in device.peak_flops else "–" for dtype in DTYPES]
    return [device.name, _si(device.memory_bytes, "B", 3), _si(device.memory_bytes_per_s, "B/s", 3), *peaks]


def _peak(device: DeviceSpec, dtype: str) -> str:
    return _si(device.peak_flops[dtype], "flop/s") if dtype in device.peak_flops else "–"


def _levels(machines: Machines) -> Table:
    headings = ("level…", "ranks", "link…", "of a device", "latency", "less", "SHARP", "torus")
    table = _table(*headings, title="Levels, innermost first (rates in each direction, all devices sending)")
    for group in machines.groups[:1] if machines.uniform else machines.groups:
        for level in group.levels:
            name = level.name if machines.uniform else f"{level.name} of {group.device.name}"
            _row(table, name, *_level_row(level))
    return table


def _level_row(level: Level) -> list[str]:
    ports = "" if level.ports == 1 else f" × {level.ports:g}"
    oversubscribed = f"{level.oversubscription:g} : 1" if level.oversubscription != 1 else ""
    shape = "x".join(map(str, level.torus or ()))
    sharp = "yes" if level.sharp else ""
    rate = _si(level.bytes_per_s, "B/s")
    return [f"{level.ranks:,}", f"{level.link.label}{ports}", rate, _seconds(level.latency_s), oversubscribed, sharp, shape]


def _totals(machines: Machines) -> Table:
    table = _table("total", "", title="Totals")
    _row(table, "memory", _si(machines.memory_bytes, "B"))
    for dtype in _dtypes(machines):
        _row(table, f"{dtype} peak", _si(machines.peak_flops(dtype), "flop/s"))
    price = machines.price_per_hour
    unknown = ", ".join(device.name for device in machines.devices if device.price_per_hour is None)
    _row(table, "list price", f"{price:,.2f} $/h" if price is not None else f"unknown: no price of {unknown}")
    return table


def _sources(specs: Iterable[DeviceSpec | LinkSpec]) -> Table:
    """Figures of one source in one row."""
    table = _table("of", "figures…", "source…", title="Sources")
    for spec in specs:
        by_source: dict[str, list[str]] = {}
        for figure, value in spec.figures().items():
            by_source.setdefault(spec.source(figure), []).append(f"{figure} {_figure(figure, value)}")
        for source, figures in by_source.items():
            _row(table, spec.name, ", ".join(figures), source)
        if spec.note:
            _row(table, spec.name, "note", spec.note)
    return table


def _dtypes(machines: Machines) -> list[str]:
    """Those that all devices have."""
    return [dtype for dtype in DTYPES if all(dtype in device.peak_flops for device in machines.devices)]


def _specs(machines: Machines) -> list[DeviceSpec | LinkSpec]:
    return [*machines.devices, *_links(machines)]


def _links(machines: Machines) -> list[LinkSpec]:
    return list(dict.fromkeys(level.link for group in machines.groups for level in group.levels))


def _network(node: NodeSpec) -> str:
    return f"{node.ports} {node.network}" if node.network else "none"


def _sharp(link: LinkSpec) -> str:
    return "" if link.reduction == "never" else link.reduction


# ---- JSON --------------------------------------------------------------------------------------------------------------------------


def _group_json(group: Group) -> dict[str, Any]:
    return {
        "device": group.device.name,
        "node": group.node,
        "nodes": group.nodes,
        "per_node": group.per_node,
        "levels": [_level_json(level) for level in group.levels],
    }


def _level_json(level: Level) -> dict[str, Any]:
    return {
        "name": level.name,
        "ranks": level.ranks,
        "link": level.link.name,
        "ports": level.ports,
        "oversubscription": level.oversubscription,
        "sharp": level.sharp,
        "torus": level.torus,
        "bytes_per_s": level.bytes_per_s,
        "latency_s": level.latency_s,
    }


# ---- numbers -----------------------------------------------------------------------------------------------------------------------


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _figure(name: str, value: float) -> str:
    if name == "latency_s":
        return _seconds(value)
    if name == "price_per_hour":
        return f"{_price(value)} $"
    return _si(value, _UNITS.get(name.split(".")[0], ""))


def _si(value: float, unit: str, digits: int = 4) -> str:
    """A few digits and a prefix: 3.35 TB/s."""
    factor, prefix = next(((factor, prefix) for factor, prefix in _PREFIXES if value >= factor), (1.0, ""))
    return f"{float(f'{value / factor:.{digits}g}'):g} {prefix}{unit}".rstrip()


def _seconds(value: float) -> str:
    return f"{value * 1e6:.3g} µs"


def _price(value: float | None) -> str:
    return "–" if value is None else f"{value:,.2f}"
