"""Where ranks are: which levels of links join them, and what a group of them crosses.

    rank      0 1 2 3 4 5 6 7   8 9 …          h100:2x8
    node     └──── NVSwitch ───┘└───────┘      Level(name="node", ranks=8)
    cluster  └────────── NDR ───────────┘      Level(name="cluster", ranks=16)

Ranks are counted node by node. A level joins blocks of so many consecutive ranks: inside a node counted from the first rank of the
node's group, outside from rank 0. Levels nest.

A group of ranks *crosses* a level where a block of it joins at least two parts of the group that no inner level joins. All groups
of an axis communicate at once, so a rate is what one device has while all devices use their links.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from shardwise.cluster.catalog import DeviceSpec, LinkSpec
from shardwise.errors import ClusterError

__all__ = ["Crossing", "Group", "Hop", "Level", "Machines"]

_Ranks = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Level:
    """Blocks of ``ranks`` consecutive ranks, joined by ``link``.

    ports: of the link that each device has, 0.5 where two share one. oversubscription: how many times less leaves a switch upwards
    than enters it. sharp: switches add up what passes through them. torus: the shape of the block, where it is one.
    """

    name: str
    ranks: int
    link: LinkSpec
    ports: float = 1.0
    oversubscription: float = 1.0
    sharp: bool = False
    torus: tuple[int, ...] | None = None

    @property
    def bytes_per_s(self) -> float:
        """Of each device, in each direction, all of them sending at once."""
        return self.link.bytes_per_s * self.ports / self.oversubscription

    @property
    def latency_s(self) -> float:
        """Of one step between neighbours."""
        return self.link.latency_s


@dataclass(frozen=True, kw_only=True)
class Group:
    """Equal nodes of equal devices.

    inside: the levels within a node, innermost first, the last of which joins all of it; none where a node holds one device.
    outside: the levels between nodes, as these devices see them: names and ranks are those of all groups, ports their own.
    """

    device: DeviceSpec
    nodes: int
    per_node: int
    node: str
    inside: tuple[Level, ...] = ()
    outside: tuple[Level, ...] = ()

    @property
    def ranks(self) -> int:
        """How many."""
        return self.nodes * self.per_node

    @property
    def levels(self) -> tuple[Level, ...]:
        """All, innermost first."""
        return (*self.inside, *self.outside)


@dataclass(frozen=True, kw_only=True)
class Hop:
    """A level that a group of ranks crosses, and how many parts of the group one block of it joins (the largest number)."""

    level: Level
    parts: int


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """What a group of ranks crosses: hops, innermost first. A hierarchical collective does one step for each.

    size: of the group; nodes: that it touches; ranks_in_node: the most of its ranks that one node holds.
    """

    size: int
    nodes: int
    ranks_in_node: int
    hops: tuple[Hop, ...]

    @property
    def level(self) -> Level | None:
        """The outermost level that is crossed; None for a single rank."""
        return self.hops[-1].level if self.hops else None

    @property
    def bytes_per_s(self) -> float:
        """Of the slowest level that is crossed, of each device in each direction; infinite for a single rank."""
        return min((hop.level.bytes_per_s for hop in self.hops), default=math.inf)

    @property
    def latency_s(self) -> float:
        """The longest latency among the levels that are crossed."""
        return max((hop.level.latency_s for hop in self.hops), default=0.0)


@dataclass(frozen=True, kw_only=True)
class Machines:
    """Groups of nodes and what joins them. name: as it was asked for, or as its file says. ClusterError where levels do not nest."""

    name: str
    groups: tuple[Group, ...]

    def __post_init__(self) -> None:
        if not self.groups:
            raise ClusterError(f"cluster {self.name!r} has no devices")
        assert bool(self.groups[0].outside) == (self.nodes > 1), "nodes are joined by something"
        if len(self.groups[0].outside) > 1 and len({group.per_node for group in self.groups}) > 1:
            raise ClusterError(f"cluster {self.name!r}: several levels between nodes want nodes of equally many devices")
        assert len({tuple((level.name, level.ranks) for level in group.outside) for group in self.groups}) == 1
        for group in self.groups:
            self._nested(group)

    def _nested(self, group: Group) -> None:
        """Each level is made of whole blocks of the one inside it, but for the last block of the outermost."""
        inside = [level.ranks for level in group.inside] or [1]
        assert inside[-1] == group.per_node, "the last level inside a node joins all of it"
        sizes = [1, *(level.ranks for level in group.levels)]
        assert sizes[-1] == (self.ranks if self.nodes > 1 else group.per_node), "the last level joins all ranks"
        for small, large in pairwise(sizes):
            if large <= small or (large % small and large != self.ranks):
                raise ClusterError(f"cluster {self.name!r}: blocks of {large} ranks are not made of whole blocks of {small} ranks")

    @cached_property
    def ranks(self) -> int:
        """How many."""
        return sum(group.ranks for group in self.groups)

    @property
    def nodes(self) -> int:
        """How many."""
        return sum(group.nodes for group in self.groups)

    @property
    def devices(self) -> tuple[DeviceSpec, ...]:
        """The kinds, each once."""
        return tuple(dict.fromkeys(group.device for group in self.groups))

    @property
    def kinds(self) -> tuple[tuple[int, ...], ...]:
        """The numbers of the groups that have each kind of device, in the order of `devices`."""
        return tuple(tuple(number for number, group in enumerate(self.groups) if group.device == device) for device in self.devices)

    @property
    def uniform(self) -> bool:
        """Whether all ranks have the same device and the same links."""
        return len({(group.device, group.per_node, group.levels) for group in self.groups}) == 1

    @property
    def levels(self) -> tuple[Level, ...]:
        """Those of uniform machines, innermost first; else those that join the nodes, as the slowest group sees them."""
        if self.uniform:
            return self.groups[0].levels
        return tuple(min(seen, key=lambda level: level.bytes_per_s) for seen in zip(*(group.outside for group in self.groups), strict=True))

    @property
    def memory_bytes(self) -> int:
        """Of all devices."""
        return sum(group.ranks * group.device.memory_bytes for group in self.groups)

    @property
    def price_per_hour(self) -> float | None:
        """US dollars, list price of all devices; None where that of one kind is unknown."""
        prices = [(group.ranks, group.device.price_per_hour) for group in self.groups]
        return None if any(price is None for _, price in prices) else sum(ranks * (price or 0.0) for ranks, price in prices)

    def peak_flops(self, dtype: str) -> float:
        """Dense flop/s of all devices."""
        return sum(group.ranks * group.device.peak(dtype) for group in self.groups)

    def only(self, numbers: Sequence[int]) -> Machines:
        """The groups with these numbers, in this order, joined as they are here: a part of the machines, or all in another order.

        A level between nodes that joins all that is left becomes the outermost one. ClusterError for another order where there are
        levels of several sizes between nodes: a node's place says there which switch it hangs on.
        """
        chosen = [self.groups[number] for number in numbers]
        depths = len(self.groups[0].outside)
        if depths > 1 and list(numbers) != sorted(numbers):
            raise ClusterError(f"cluster {self.name!r}: nodes under several levels of switches cannot be put in another order")
        total = sum(group.ranks for group in chosen)
        ranks = np.concatenate([np.arange(self._firsts[number], self._firsts[number] + self.groups[number].ranks) for number in numbers])
        first = self._inside
        joins = next((depth for depth in range(depths) if len(set(self._blocks[first + depth][ranks])) == 1), depths)

        def outside(group: Group) -> tuple[Level, ...]:
            inner = [level for level in group.outside[:joins] if level.ranks < total]
            return (*inner, *(replace(level, ranks=total) for level in group.outside[joins : joins + 1]))

        single = sum(group.nodes for group in chosen) == 1
        groups = tuple(replace(group, outside=() if single else outside(group)) for group in chosen)
        return Machines(name=" + ".join(f"{group.nodes}x{group.per_node} {group.device.name}" for group in groups), groups=groups)

    def slowed(self, shares: Mapping[str, float]) -> Machines:
        """With levels that keep a share of their rate. Names: of a level, of a link, or "network" for all between nodes; ClusterError for
        one that is none of these."""
        known = dict.fromkeys(name for group in self.groups for level in group.levels for name in self._names(level, group))
        for name in shares:
            if name not in known:
                raise ClusterError(f"cluster {self.name!r} has no links {name!r}; there are {', '.join(known) or 'none'}")
        return replace(self, groups=tuple(self._slowed(group, shares) for group in self.groups))

    def _slowed(self, group: Group, shares: Mapping[str, float]) -> Group:
        def left(level: Level) -> Level:
            return replace(level, ports=level.ports * min(shares.get(name, 1.0) for name in self._names(level, group)))

        return replace(group, inside=tuple(map(left, group.inside)), outside=tuple(map(left, group.outside)))

    @staticmethod
    def _names(level: Level, group: Group) -> tuple[str, ...]:
        return (level.name, level.link.name, *(("network",) if level in group.outside else ()))

    def group_of(self, rank: int) -> Group:
        """The group that holds a rank."""
        return self.groups[self._index(rank)]

    def node_of(self, rank: int) -> int:
        """The number of the node that holds a rank."""
        index = self._index(rank)
        return self._nodes_before[index] + (rank - self._firsts[index]) // self.groups[index].per_node

    def crossing(self, ranks: Sequence[int]) -> Crossing:
        """What these ranks cross among themselves."""
        members = sorted(set(ranks))
        if not members:
            raise ValueError("a group has at least one rank")
        hops = []
        parts = {rank: [rank] for rank in members}
        for depth in range(self._depth):
            joined: dict[int, list[list[int]]] = {}
            for part in parts.values():
                joined.setdefault(int(self._blocks[depth, part[0]]), []).append(part)
            parts = {block: [rank for part in inner for rank in part] for block, inner in joined.items()}
            crossed = [rank for inner in joined.values() if len(inner) > 1 for part in inner for rank in part]
            if crossed:
                seen = {self._paths[index][depth] for index in map(self._index, crossed)}
                slowest = min((level for level in seen if level), key=lambda level: (level.bytes_per_s, -level.latency_s))
                hops.append(Hop(level=slowest, parts=max(map(len, joined.values()))))
        nodes = Counter(map(self.node_of, members))
        return Crossing(size=len(members), nodes=len(nodes), ranks_in_node=max(nodes.values()), hops=tuple(hops))

    def span(self, stride: int, size: int, *, first: int = 0, ranks: int | None = None) -> Crossing:
        """What the slowest of the groups of an axis crosses: ``size`` ranks, ``stride`` apart.

        The groups tile the ``ranks`` ranks (all, where it is None) from ``first`` on, as the axis of a mesh does. ValueError where they
        cannot.
        """
        count = self.ranks - first if ranks is None else ranks
        if stride < 1 or size < 1 or count < 1 or count % (stride * size) or first < 0 or first + count > self.ranks:
            raise ValueError(f"groups of {size} ranks, {stride} apart, do not tile ranks {first} to {first + count - 1} of {self.ranks}")
        key = (stride, size, first, count)
        if key not in self._spans:
            tiles = np.arange(first, first + count).reshape(-1, size, stride).swapaxes(1, 2).reshape(-1, size)
            found = [self.crossing(row) for row in self._kinds(tiles)]
            self._spans[key] = min(found, key=lambda each: (each.bytes_per_s, -each.latency_s, -len(each.hops), -each.nodes))
        return self._spans[key]

    def _kinds(self, tiles: _Ranks) -> list[list[int]]:
        """One row of each kind: rows that meet the same levels at the same places cross the same."""
        blocks = [self._blocks[depth][tiles] for depth in range(self._depth)]
        meets = [each[:, 1:] == each[:, :-1] for each in blocks]
        _, rows = np.unique(np.concatenate([self._numbers[tiles], *meets], axis=1), axis=0, return_index=True)
        return [list(map(int, tiles[row])) for row in rows]

    @cached_property
    def _spans(self) -> dict[tuple[int, int, int, int], Crossing]:
        return {}

    @cached_property
    def _firsts(self) -> list[int]:
        """The first rank of each group."""
        return [0, *accumulate(group.ranks for group in self.groups)][:-1]

    @cached_property
    def _nodes_before(self) -> list[int]:
        return [0, *accumulate(group.nodes for group in self.groups)][:-1]

    @cached_property
    def _inside(self) -> int:
        return max(len(group.inside) for group in self.groups)

    @property
    def _depth(self) -> int:
        return self._inside + len(self.groups[0].outside)

    def _index(self, rank: int) -> int:
        if not 0 <= rank < self.ranks:
            raise ValueError(f"there is no rank {rank} among {self.ranks}")
        return bisect_right(self._firsts, rank) - 1

    @cached_property
    def _numbers(self) -> _Ranks:
        """For each rank, the number of its group."""
        return np.repeat(np.arange(len(self.groups)), [group.ranks for group in self.groups])

    @cached_property
    def _paths(self) -> list[list[Level | None]]:
        """For each group its level at each depth; none where other groups have more levels inside a node."""
        return [[*[None] * (self._inside - len(group.inside)), *group.levels] for group in self.groups]

    @cached_property
    def _blocks(self) -> _Ranks:
        """At each depth, for each rank, the first rank of its block."""
        return np.stack([np.concatenate([self._starts(index, depth) for index in range(len(self.groups))]) for depth in range(self._depth)])

    def _starts(self, index: int, depth: int) -> _Ranks:
        first, level = self._firsts[index], self._paths[index][depth]
        ranks = np.arange(first, first + self.groups[index].ranks)
        if level is None:
            return ranks
        origin = first if depth < self._inside else 0
        return ranks - (ranks - origin) % level.ranks
