"""Machines made of nodes: how many of each, and what joins them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from shardwise.cluster.catalog import Catalog, LinkSpec, NodeSpec
from shardwise.cluster.topology import Group, Level, Machines
from shardwise.errors import ClusterError

__all__ = ["MOST_RANKS", "Fabric", "Part", "assemble", "torus_shape"]

MOST_RANKS = 1_000_000
"""More than any machine has; beyond it a number is a slip of the finger."""

_OUTERMOST = "cluster"


@dataclass(frozen=True, kw_only=True)
class Part:
    """``nodes`` nodes of one kind, ``per_node`` devices of each."""

    node: NodeSpec
    nodes: int
    per_node: int


@dataclass(frozen=True, kw_only=True)
class Fabric:
    """A level between nodes.

    nodes: how many it joins, None for all. link: None for that of the level inside it, or what the nodes have themselves.
    ports: of the link that a node has; None for those of the level inside it, or as many as the node has of a network of that kind,
    else one.
    """

    name: str = _OUTERMOST
    nodes: int | None = None
    link: LinkSpec | None = None
    ports: int | None = None
    oversubscription: float = 1.0
    sharp: bool = False


def assemble(name: str, parts: Sequence[Part], fabrics: Sequence[Fabric], catalog: Catalog) -> Machines:
    """The machines; ClusterError where parts do not fit together. fabrics: innermost first, the last joins all; none for a single node."""
    ranks = sum(part.nodes * part.per_node for part in parts)
    if ranks > MOST_RANKS:
        raise ClusterError(f"cluster {name!r} has {ranks:,} devices, over {MOST_RANKS:,}")
    for part in parts:
        _holds(name, part, catalog)
    joined = _resolved(name, parts, fabrics, catalog)
    groups = [
        Group(
            device=catalog.device(part.node.device),
            nodes=part.nodes,
            per_node=part.per_node,
            node=part.node.name,
            inside=tuple(_inside(name, part, catalog)),
            outside=tuple(_outside(part, fabric, ranks, catalog) for fabric in joined),
        )
        for part in parts
    ]
    return Machines(name=name, groups=tuple(groups))


def torus_shape(ranks: int, largest: Sequence[int]) -> tuple[int, ...] | None:
    """The shape nearest to a cube that ``ranks`` chips can have within ``largest``; None where there is none."""
    shapes = [shape for shape in _factors(ranks, len(largest)) if all(a <= b for a, b in zip(sorted(shape), sorted(largest), strict=True))]
    return min((tuple(sorted(shape)) for shape in shapes), key=lambda shape: (sum(shape), shape), default=None)


def _factors(number: int, dims: int) -> Iterator[tuple[int, ...]]:
    if dims == 1:
        yield (number,)
        return
    for factor in range(1, number + 1):
        if number % factor == 0:
            yield from ((factor, *rest) for rest in _factors(number // factor, dims - 1))


def _holds(name: str, part: Part, catalog: Catalog) -> None:
    node = part.node
    if part.nodes < 1 or part.per_node < 1:
        raise ClusterError(f"cluster {name!r}: {part.nodes} nodes of {part.per_node} devices are none; give 1 or more of each")
    if part.per_node > node.devices:
        larger = [each.name for each in catalog.nodes.values() if each.device == node.device and each.devices >= part.per_node]
        way = f"take {' or '.join(larger)}" if larger else f"take more nodes of up to {node.devices}, or describe the node in a file"
        raise ClusterError(f"cluster {name!r}: {node.label} holds {node.devices} {node.device}, not {part.per_node}; {way}")


# ---- inside a node -----------------------------------------------------------------------------------------------------------------


def _inside(name: str, part: Part, catalog: Catalog) -> Iterator[Level]:
    node = part.node
    for inner in node.inner:
        if inner.devices < part.per_node:
            yield _level(inner.name, inner.devices, catalog.link(inner.link))
    if part.per_node > 1:
        yield _level(node.joins, part.per_node, catalog.link(node.link), torus=_torus(name, part))


def _torus(name: str, part: Part) -> tuple[int, ...] | None:
    largest = part.node.torus
    if largest is None or part.per_node == part.node.devices:
        return largest
    shape = torus_shape(part.per_node, largest)
    if shape is None:
        fits = (count for count in range(part.per_node + 1, part.node.devices + 1) if torus_shape(count, largest))
        raise ClusterError(f"cluster {name!r}: {part.per_node} chips form no torus within {'x'.join(map(str, largest))}; {next(fits)} do")
    return shape


def _level(name: str, ranks: int, link: LinkSpec, torus: tuple[int, ...] | None = None) -> Level:
    return Level(name=name, ranks=ranks, link=link, sharp=link.reduction == "always", torus=torus)


# ---- between nodes -----------------------------------------------------------------------------------------------------------------


def _resolved(name: str, parts: Sequence[Part], fabrics: Sequence[Fabric], catalog: Catalog) -> list[Fabric]:
    nodes = sum(part.nodes for part in parts)
    if nodes == 1:
        if fabrics:
            raise ClusterError(f"cluster {name!r} is one node, so what joins nodes has no effect: leave it out")
        return []
    chosen = _inherited(fabrics or [Fabric()])
    for fabric in chosen[:-1]:
        if fabric.nodes is None or not 1 < fabric.nodes < nodes:
            raise ClusterError(f"cluster {name!r}: level {fabric.name!r} is not the outermost: it joins 2 to {nodes - 1} of {nodes} nodes")
    if chosen[-1].nodes not in (None, nodes):
        outermost = chosen[-1]
        raise ClusterError(
            f"cluster {name!r}: level {outermost.name!r} is the outermost: it joins all {nodes} nodes, not {outermost.nodes}"
        )
    if any(fabric.link is None for fabric in chosen):
        _alike(name, parts)
    for fabric in chosen:
        _reduces(name, parts, fabric, catalog)
    return chosen


def _inherited(fabrics: Sequence[Fabric]) -> list[Fabric]:
    """A level without a link has that of the level inside it, and with the same kind of link its ports."""
    found: list[Fabric] = []
    for fabric in fabrics:
        inner = found[-1] if found else Fabric()
        link = fabric.link or inner.link
        same = fabric.ports is None and link is not None and inner.link is not None and link.kind == inner.link.kind
        found.append(replace(fabric, link=link, ports=inner.ports if same else fabric.ports))
    return found


def _alike(name: str, parts: Sequence[Part]) -> None:
    """Nodes can say themselves what joins them where they say the same."""
    networks = {part.node.network: part.node for part in parts}
    without = networks.get(None)
    if without is not None:
        raise ClusterError(f"cluster {name!r}: {without.label} has no network of its own; name one, such as NDR or 25 GbE")
    if len(networks) > 1:
        said = ", ".join(f"{node.label} {network}" for network, node in networks.items())
        raise ClusterError(f"cluster {name!r}: its nodes have different networks ({said}); name what joins them, such as NDR or 25 GbE")


def _reduces(name: str, parts: Sequence[Part], fabric: Fabric, catalog: Catalog) -> None:
    link = _link(parts[0], fabric, catalog)
    if fabric.sharp and link.reduction == "never":
        raise ClusterError(f"cluster {name!r}: switches of {link.label} do not add up what passes through them: leave SHARP out")


def _link(part: Part, fabric: Fabric, catalog: Catalog) -> LinkSpec:
    assert fabric.link or part.node.network
    return fabric.link or catalog.link(part.node.network or "")


def _outside(part: Part, fabric: Fabric, ranks: int, catalog: Catalog) -> Level:
    link = _link(part, fabric, catalog)
    return Level(
        name=fabric.name,
        ranks=ranks if fabric.nodes is None or fabric.nodes * part.per_node >= ranks else fabric.nodes * part.per_node,
        link=link,
        ports=_ports(part, fabric, link, catalog),
        oversubscription=fabric.oversubscription,
        sharp=fabric.sharp or link.reduction == "always",
    )


def _ports(part: Part, fabric: Fabric, link: LinkSpec, catalog: Catalog) -> float:
    """Of each device. A node that is used in part keeps the ports of those devices, or shares one."""
    if fabric.ports is not None:
        return fabric.ports / part.per_node
    own = part.node.network
    count = part.node.ports if own is not None and catalog.link(own).kind == link.kind else 1
    return min(count / part.per_node, max(1.0, count / part.node.devices))
