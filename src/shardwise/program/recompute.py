"""Which forward values are kept for the backward pass, and which it makes again.

    none        everything that the backward pass reads is kept
    selective   each block keeps what it is given, what its products with weights make, and sums over ranks
    full        each block keeps what it is given (Chen et al. 2016)

A block is a member of a list of modules (`layers.3`), or, in a model without such lists, a child of the model. What is outside of blocks is
kept, and of blocks that are not asked for: the first of each stage may do, whose values are held longest. The backward pass makes a block's
values again just before it first needs one of them, so that one block's are there at a time:

    forward    x₀ ──block 0──▶ x₁ ──block 1──▶ x₂            keeps x₀, x₁
    backward   block 1 again from x₁, backward of block 1, block 0 again from x₀, backward of block 0

Parameters that data ranks gather before use (ZeRO-3) are never kept: each is gathered again just before its first use in the backward pass.

Making a value again must give the same value. Random numbers depend on step, microbatch and place alone, and a buffer that the forward pass
updates is read as it was. Code that is kept as one operator may do anything: its results are kept, and it runs once.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import fx

from shardwise.capture.blocks import list_member
from shardwise.capture.graph import Graph, Op
from shardwise.capture.opaque import OPERATOR
from shardwise.cost.operators import name_of
from shardwise.sharding.collectives import COLLECTIVES

__all__ = ["RECOMPUTE", "WEIGHED", "Recompute", "Saving", "blocks_of", "choose_saved"]

Recompute = Literal["none", "selective", "full"]
RECOMPUTE: tuple[str, ...] = get_args(Recompute)
WEIGHED = frozenset({"mm", "addmm", "expert_mm", "convolution"})  # products with weights, as linear layers and convolutions are lowered
_MAYBE_WEIGHED = frozenset({"bmm", "baddbmm"})  # where one of the factors is made of parameters alone
_SUMS = ("all_reduce", "reduce_scatter")


def blocks_of(graph: Graph) -> dict[Op, str]:
    """Operator → its block, of those that are in one."""
    members = {op: member for op in graph.ops if (member := list_member(op.module)) is not None}
    lists = {place[0] for op, place in members.items() if op.module != _path(place)}  # of modules with submodules, not of single layers
    found = {op: _path(place) for op, place in members.items() if place[0] in lists}
    return found or {op: op.module.partition(".")[0] for op in graph.ops if op.module}


def _path(place: tuple[str, int]) -> str:
    return f"{place[0]}.{place[1]}".removeprefix(".")


@dataclass(frozen=True, kw_only=True)
class Saving:
    """saved: what the forward graph returns for the backward pass, in its order. backward: the nodes of the backward graph in their order,
    forward nodes that it makes again among them."""

    saved: list[fx.Node]
    backward: list[fx.Node]


def choose_saved(forward: Sequence[fx.Node], backward: Sequence[fx.Node], returned: Iterable[fx.Node], recompute: str) -> Saving:
    """forward, backward: the nodes of both passes in order; returned: forward nodes that the backward pass returns as they are.

    Of a node's meta, "segment" is its block (None: it has none), "gathered" marks what gathers parameters, "parameter" a parameter.
    """
    run = _Choice(forward=forward, recompute=recompute)
    saved, again = run.reached(backward)
    saved |= set(returned)
    order = run.placed(backward, again - saved)
    read = {parent for node in order for parent in node.all_input_nodes} | set(returned)
    return Saving(saved=[node for node in forward if node in saved and node in read], backward=order)


class _Choice:
    def __init__(self, *, forward: Sequence[fx.Node], recompute: str) -> None:
        self.forward, self.recompute = set(forward), recompute
        self.position = {node: index for index, node in enumerate(forward)}
        self.gathered: set[fx.Node] = set()  # and what is made of gathered parameters alone
        self.constant: set[fx.Node] = set()  # made of parameters alone
        for node in forward:
            self._classify(node)

    def _classify(self, node: fx.Node) -> None:
        inputs = node.all_input_nodes
        if node.meta.get("parameter") or (inputs and all(each in self.constant for each in inputs)):
            self.constant.add(node)
            if node.meta.get("gathered") or any(each in self.gathered for each in inputs):
                self.gathered.add(node)

    def reached(self, backward: Sequence[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
        """Forward nodes that are kept, and those that are made again unless they are kept for another block."""
        saved: set[fx.Node] = set()
        again: set[fx.Node] = set()
        pending = [(parent, node.meta.get("segment")) for node in backward for parent in node.all_input_nodes if parent in self.forward]
        seen = set(pending)
        while pending:
            node, reader = pending.pop()
            if self._keeps(node) or (node not in self.gathered and self._segment(node) != reader):
                saved.add(node)
                continue
            again.add(node)
            wanted = {(parent, self._segment(node)) for parent in node.all_input_nodes} - seen
            seen |= wanted
            pending.extend(wanted)
        return saved, again

    def _segment(self, node: fx.Node) -> Hashable:
        """What is made again together: a block; a gathered parameter alone, and as late as can be."""
        if node in self.gathered:
            return node
        return self._segment(node.all_input_nodes[0]) if _is_item(node) else node.meta.get("segment")

    def _keeps(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            return True
        if node in self.gathered:
            return False
        if self._segment(node) is None or self.recompute == "none" or _runs_once(node):
            return True
        return self.recompute == "selective" and self._weighed(node)

    def _weighed(self, node: fx.Node) -> bool:
        """A product with weights, or a sum over ranks: of such products, and of what was added to them before."""
        if COLLECTIVES.get(node.target) in _SUMS:  # type: ignore[call-overload]
            return True
        name = name_of(node.target)
        return name in WEIGHED or (name in _MAYBE_WEIGHED and any(each in self.constant for each in node.all_input_nodes))

    # -- where ---------------------------------------------------------------------------------------------------------------------------

    def placed(self, backward: Sequence[fx.Node], again: set[fx.Node]) -> list[fx.Node]:
        """The backward nodes, each block's forward nodes before the first that needs one of them.

        What a node needs is made in the forward pass's order, above all what gathers parameters: ranks with unlike shares of the batch may
        read them in unlike orders, and must meet in the same messages.
        """
        members = self._members(backward, again)
        order: list[fx.Node] = []
        done: set[fx.Node] = set()

        def make_inputs(node: fx.Node) -> None:
            for parent in sorted((each for each in node.all_input_nodes if each in again), key=self.position.__getitem__):
                if parent not in done:
                    make(parent)

        def make(node: fx.Node) -> None:
            for each in self._needed([node], again) if node in self.gathered else members[self._segment(node)]:
                if each not in done:
                    make_inputs(each)
                    done.add(each)
                    order.append(each)

        for node in backward:
            make_inputs(node)
            order.append(node)
        return order

    def _members(self, backward: Sequence[fx.Node], again: set[fx.Node]) -> Mapping[Hashable, list[fx.Node]]:
        """Of each block the nodes that are needed again, in order."""
        found: dict[Hashable, list[fx.Node]] = {}
        read = [parent for node in backward for parent in node.all_input_nodes if parent in again]
        for node in self._needed(read, again):
            found.setdefault(self._segment(node), []).append(node)
        return found

    def _needed(self, nodes: Iterable[fx.Node], again: set[fx.Node]) -> list[fx.Node]:
        """These and what they are made of, of what is made again, in order."""
        needed: set[fx.Node] = set()
        pending = list(nodes)
        while pending:
            node = pending.pop()
            if node not in needed:
                needed.add(node)
                pending.extend(parent for parent in node.all_input_nodes if parent in again)
        return sorted(needed, key=self.position.__getitem__)


def _is_item(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


def _runs_once(node: fx.Node) -> bool:
    """Code of the user's that is kept as one operator."""
    if _is_item(node):
        return _runs_once(node.all_input_nodes[0])
    return node.target is OPERATOR
