"""Bytes that a graph's computation holds, by liveness: each tensor from where it is made to its last use; views hold their base."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from shardwise.cost.operators import is_inplace, is_view
from shardwise.sharding.collectives import is_end_of_shift, is_shift

__all__ = ["Liveness", "bases", "changes", "liveness", "made_bytes", "tensor_bytes"]


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


class Liveness:
    """held_bytes: of the outputs that the graph made itself (not its inputs). peak_bytes: the most that it holds at once beside its
    inputs."""

    def __init__(self, *, peak_bytes: int, outputs: dict[fx.Node, int]) -> None:
        self.peak_bytes, self.outputs = peak_bytes, outputs

    @property
    def held_bytes(self) -> int:
        return sum(self.outputs.values())


def liveness(
    graph: fx.Graph,
    frees: Callable[[fx.Node], int] = lambda node: 0,
    aliases: Mapping[fx.Node, fx.Node] | None = None,
    *,
    unwritten: Collection[fx.Node] = (),
    keeps: Collection[fx.Node] | None = None,
    beside: Mapping[fx.Node, Sequence[int]] | None = None,
) -> Liveness:
    """The graph's memory when each value is freed at its last use.

    frees: bytes of a placeholder that are given back at its last use (values saved for the backward pass); 0 for what others keep.
    aliases: placeholder → the placeholder in whose memory it lies, where that is known.
    unwritten: nodes whose results never reach memory, being inside a fused kernel. keeps: what is held to the end, where that is not what
    the graph returns. beside: node → by how much what is held beside all values changes just before it runs, one change after the other.
    """
    base = bases(graph, aliases or {})
    sizes = {owner: 0 if owner in unwritten else made_bytes(owner) for owner in set(base.values())}
    now = peak = 0
    for node, made, freed in _steps(graph, base, keeps):
        for change in (*(beside or {}).get(node, ()), sizes[node] if made else 0):
            now += change
            peak = max(peak, now)
        now -= sum(frees(owner) if owner.op == "placeholder" else sizes[owner] for owner in freed)
    returned = {base[node]: sizes[base[node]] for node in graph.output_node().all_input_nodes if base[node].op == "call_function"}
    return Liveness(peak_bytes=peak, outputs=returned)


def changes(graph: fx.Graph, base: Mapping[fx.Node, fx.Node], keeps: Collection[fx.Node] | None = None) -> Iterator[tuple[fx.Node, bool]]:
    """Whose memory is made (True) or used for the last time (False), in order. keeps: as in `liveness`."""
    for node, made, freed in _steps(graph, base, keeps):
        if made:
            yield node, True
        yield from ((owner, False) for owner in freed)


def _steps(
    graph: fx.Graph, base: Mapping[fx.Node, fx.Node], keeps: Collection[fx.Node] | None
) -> Iterator[tuple[fx.Node, bool, list[fx.Node]]]:
    """Each node, whether it takes memory for its result, and whose memory is used for the last time."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for parent in node.all_input_nodes if node.op != "output" or keeps is None else keeps:
            last[base[parent]] = node
    dying: dict[fx.Node, list[fx.Node]] = {}
    for owner, node in last.items():
        dying.setdefault(node, []).append(owner)
    for node in graph.nodes:
        made = node.op == "call_function" and base[node] is node
        unread = [node] if made and node not in last else []
        yield node, made, [*unread, *(dying.get(node, ()) if node.op != "output" else ())]


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
