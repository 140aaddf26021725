"""Which implementation each collective of a graph has: for its kind, message and group the one that a plan's tables name.

Reshards know the tables when they are made; the local code of rules (a loss over a split vocabulary, statistics of a split batch) does not.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from torch import fx

from shardwise.cost.memory import tensor_bytes
from shardwise.sharding.collectives import COLLECTIVES, group_ranks

__all__ = ["choose_implementations"]

Choose = Callable[[str, int, int], str]
_CHOSEN = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")


def choose_implementations(graph: fx.Graph, choose: Choose) -> None:
    """choose: (kind, bytes of the message as `shardwise.cost.collectives` counts them, ranks) → implementation."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in COLLECTIVES:
            kind, (_, group, *_) = COLLECTIVES[node.target], node.args
            if kind not in _CHOSEN or (kind == "all_to_all" and node.args[2] == node.args[4]):
                continue  # there is one way to do it, or ranks send unlike numbers of rows: who made it chose for all of them
            node.args = (*node.args[:-1], choose(kind, _message_bytes(kind, node), len(group_ranks(group))))


def _message_bytes(kind: str, node: fx.Node) -> int:
    """Equal on all ranks of the group, also where their parts are uneven."""
    source: Any = node.args[0]
    meta = source.meta["val"]
    if kind == "all_gather":
        return tensor_bytes(node.meta["val"])
    if kind == "all_to_all":
        *_, dim, sizes, _, _ = node.args
        others = prod(size for place, size in enumerate(meta.shape) if place != dim)
        return others * sum(sizes) * meta.element_size() // len(sizes)  # type: ignore[arg-type]
    return tensor_bytes(meta)
