"""Bytes that a graph's computation holds, by liveness: each tensor from where it is made to its last use; views hold their base."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from shardwise.cost.operators import is_inplace, is_view
from shardwise.sharding.collectives import is_end_of_shift, is_shift

__all__ = ["Request", "bases", "made_bytes", "most_bytes", "requests", "tensor_bytes"]

Request = tuple[Hashable, int]
"""Whose memory, and bytes: more than 0 of what is taken, less of what is given back."""


def tensor_bytes(meta: Any) -> int:
    """Bytes of a tensor's elements; of all of a tuple's."""
    if isinstance(meta, torch.Tensor):
        return meta.numel() * meta.element_size()
    if isinstance(meta, (tuple, list)):
        return sum(tensor_bytes(item) for item in meta)
    return 0


def made_bytes(node: fx.Node) -> int:
    """Bytes that a node takes when it is made: of its result, and of what arrives by a shift that it begins."""
    if not is_shift(node.target):
        return tensor_bytes(node.meta.get("val"))
    x, _, dim, sizes, step, rank, _ = node.args
    whole = x.meta["val"]  # type: ignore[union-attr]
    return tensor_bytes(whole) // whole.shape[dim] * sizes[(rank - step - 1) % len(sizes)]  # type: ignore[operator, index, arg-type]


def requests(
    graph: fx.Graph,
    frees: Callable[[fx.Node], int] = lambda node: 0,
    aliases: Mapping[fx.Node, fx.Node] | None = None,
    *,
    unwritten: Collection[fx.Node] = (),
    keeps: Collection[fx.Node] | None = None,
    beside: Mapping[fx.Node, Sequence[Request]] | None = None,
) -> Iterator[Request]:
    """What the graph's computation asks an allocator for, in order, when each value is freed at its last use.

    frees: bytes of a placeholder that are given back at its last use (values saved for the backward pass); 0 for what others keep.
    aliases: placeholder → the placeholder in whose memory it lies, where that is known.
    unwritten: nodes whose results never reach memory, being inside a fused kernel. keeps: what is held to the end, where that is not what
    the graph returns. beside: node → what is asked for just before it runs.
    """
    base = bases(graph, aliases or {})
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for parent in node.all_input_nodes if node.op != "output" or keeps is None else keeps:
            last[base[parent]] = node
    dying: dict[fx.Node, list[fx.Node]] = {}
    for owner, node in last.items():
        dying.setdefault(node, []).append(owner)
    held: dict[fx.Node, int] = {}
    for node in graph.nodes:
        yield from (beside or {}).get(node, ())
        if node.op == "call_function" and base[node] is node:
            held[node] = 0 if node in unwritten else made_bytes(node)
            if held[node]:
                yield node, held[node]
        unread = [] if node in last or node not in held else [node]
        for owner in [*unread, *(dying.get(node, ()) if node.op != "output" else ())]:
            if nbytes := frees(owner) if owner.op == "placeholder" else held[owner]:
                yield owner, -nbytes


def most_bytes(asked: Iterable[Request]) -> int:
    """The most that is held at once."""
    return max(accumulate(nbytes for _, nbytes in asked), default=0)


def bases(graph: fx.Graph, known: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
    """Node → the node whose memory it lies in."""
    base: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        first = node.all_input_nodes[0] if node.all_input_nodes else None
        is_item = node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"
        shared = node.op == "call_function" and (is_item or _shares_memory(node.target))
        base[node] = base[first] if shared and first is not None else known.get(node, node)
    return base


def _shares_memory(target: Any) -> bool:
    """Whether an operator's result lies in its first argument's memory."""
    return isinstance(target, torch._ops.OpOverload) and (is_view(target) or is_inplace(target) or is_end_of_shift(target))
