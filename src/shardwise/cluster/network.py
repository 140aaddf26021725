"""What joins the nodes of a cluster whose ranks are described by figures of their own."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Network"]


@dataclass(frozen=True, kw_only=True)
class Network:
    """Links between nodes of `node_ranks` ranks, which are counted node by node.

    latency_s: of one message; bytes_per_s: of a node, in each direction, all its ranks together.
    """

    node_ranks: int
    latency_s: float
    bytes_per_s: float

    def inside(self, ranks: int, stride: int) -> int:
        """How many ranks of a group, each `stride` after the one before, one node holds; of several such groups that tile the cluster, of
        the one that is spread most."""
        block = ranks * stride
        if self.node_ranks % block == 0:
            return ranks
        firsts = range(0, block * self.node_ranks, block)  # from there on all repeats
        groups = [[self.node(first + place + each * stride) for each in range(ranks)] for first in firsts for place in range(stride)]
        return min(max(group.count(node) for node in set(group)) for group in groups)

    def node(self, rank: int) -> int:
        """The node that a rank is in."""
        return rank // self.node_ranks
