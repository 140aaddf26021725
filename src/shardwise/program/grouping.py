"""Brings rows into the order of their experts once, where several products with experts follow each other.

    before    up(x, e) · silu · down(·, e)                      each product picks its experts' rows, and puts them back
    after     x[order] · up · silu · down · [order⁻¹]           with e[order], in which each expert's rows lie together

What is done to each row by itself between the products is done in that order, too, and so is their backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from operator import getitem
from typing import Any

import torch
from torch import fx

import shardwise.capture.experts  # noqa: F401  defines the products with experts
from shardwise._torch import FakeTensorMode

__all__ = ["group_rows"]

aten = torch.ops.aten
_ops = torch.ops.shardwise
_PRODUCT, _OUTER = _ops.expert_mm.default, _ops.expert_outer.default
_ALONG = {
    aten.cat.default: 1,
    aten.split_with_sizes.default: 2,
    aten.split.Tensor: 2,
    aten.slice.Tensor: 1,
    aten.slice_backward.default: 2,
}
"""Operators that leave rows alone unless they go along them, and the place of the argument that says along what."""
_ELEMENTWISE = (aten._to_copy.default, aten.alias.default)
"""Those that torch does not tag as pointwise."""


def group_rows(
    graph: fx.Graph, forward: set[fx.Node], mode: FakeTensorMode, returned: Collection[fx.Node | None]
) -> dict[fx.Node, fx.Node]:
    """Changes the graph of a forward and backward pass where that moves fewer rows; returns value → the same in the order of before.

    forward: the nodes of the forward pass, which is kept true; mode: of the nodes' descriptions.
    returned: what the graph will return, which need not have an output yet.
    """
    by_expert: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target in (_PRODUCT, _OUTER):
            by_expert.setdefault(node.args[2], []).append(node)
    found: dict[fx.Node, fx.Node] = {}
    for expert, products in by_expert.items():
        run = _Run(graph=graph, forward=forward, mode=mode, expert=expert, products=products, returned=returned)
        if run.moved_after() < run.moved_before():
            found |= run.change()
    return found


@dataclass(kw_only=True)
class _Run:
    """Products with the same experts, and what is done to rows by themselves on the way from one of them to another: they are `inside`."""

    graph: fx.Graph
    forward: set[fx.Node]
    mode: FakeTensorMode
    expert: fx.Node
    products: Sequence[fx.Node]
    returned: Collection[fx.Node | None]

    def __post_init__(self) -> None:
        self.rows = self.expert.meta["val"].shape[0]
        self.read = [value for node in self.products for value in self._rows_of(node)]
        self.made = [node for node in self.products if node.target is _PRODUCT]
        after = self._reached([user for node in self.made for user in node.users], lambda node: node.users)
        between = after & self._reached(self.read, lambda node: node.all_input_nodes)
        parts = {user for node in between if not _is_tensor(node) for user in node.users}  # of a cut, one of which goes on
        self.inside = {*self.products, *between, *parts}
        ordered = [node for node in self.graph.nodes if node in self.inside]
        self.entering = dict.fromkeys(value for node in ordered for value in self._rows_of(node) if value not in self.inside)
        self.leaving = [node for node in ordered if node.target is not _OUTER and _is_tensor(node) and self._leaves(node)]

    def _leaves(self, node: fx.Node) -> bool:
        return node in self.returned or any(user not in self.inside for user in node.users)

    def _reached(self, start: Iterable[fx.Node], following: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
        """What treats rows by themselves and is among these, or reached from them through nothing else."""
        found: set[fx.Node] = set()
        pending = list(start)
        while pending:
            node = pending.pop()
            if node not in found and self._rowwise(node):
                found.add(node)
                pending.extend(following(node))
        return found

    def _rows_of(self, node: fx.Node) -> list[fx.Node]:
        """The inputs that have a row for each row."""
        if node.target in (_PRODUCT, _OUTER):
            return [value for value in node.args[: 1 if node.target is _PRODUCT else 2] if isinstance(value, fx.Node)]
        if node.target is getitem:
            return [node.args[0]]  # type: ignore[list-item]
        dims = _first(node).ndim
        return [value for value in node.all_input_nodes if value.meta["val"].ndim == dims and value.meta["val"].shape[0] == self.rows]

    def _rowwise(self, node: fx.Node) -> bool:
        if node.op != "call_function" or node in self.products:
            return False
        made = _first(node)
        if made is None or made.ndim == 0 or made.shape[0] != self.rows:
            return False
        if node.target is getitem:
            return self._rowwise(node.args[0])  # type: ignore[arg-type]
        if not isinstance(node.target, torch._ops.OpOverload) or not all(_is_tensor(value) for value in node.all_input_nodes):
            return False
        if node.target in _ALONG:
            place = _ALONG[node.target]
            return made.ndim > 1 and len(node.args) > place and int(node.args[place]) % made.ndim != 0  # type: ignore[arg-type]
        tags = node.target.tags
        return node.target in _ELEMENTWISE or (torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags)

    def moved_before(self) -> int:
        """Elements of rows that the products pick and put back."""
        return sum(prod(value.meta["val"].shape) for value in (*self.read, *self.made))

    def moved_after(self) -> int:
        """Of those that are brought into the order of their experts, and back."""
        return sum(prod(value.meta["val"].shape) for value in (*self.entering, *self.leaving))

    def change(self) -> dict[fx.Node, fx.Node]:
        """Does it."""
        place = {node: number for number, node in enumerate(self.graph.nodes)}
        experts = max(_experts(node) for node in self.products)  # where others have fewer, rows of those that they lack are behind theirs
        order = self._add(self.expert, _ops.expert_order.default, (self.expert, experts))
        ordered = self._add(order, aten.index_select.default, (self.expert, 0, order), like=self.expert)
        back = self._add(ordered, aten.argsort.default, (order,))
        for value in self.entering:
            last = value if value.op != "placeholder" and place[value] > place[self.expert] else back
            users = [user for user in value.users if user in self.inside and value in self._rows_of(user)]
            self._bring(value, order, last, users)
        for node in self.products:
            args = list(node.args)
            args[2] = ordered
            node.args = (*args[: 3 if node.target is _PRODUCT else 4], True)
        return {value: self._bring(value, back, value, [user for user in value.users if user not in self.inside]) for value in self.leaving}

    def _bring(self, value: fx.Node, order: fx.Node, after: fx.Node, users: Iterable[fx.Node]) -> fx.Node:
        """A value's rows in that order, which these read from now on."""
        moved = self._add(after, aten.index_select.default, (value, 0, order), like=value)
        for user in users:
            user.replace_input_with(value, moved)
        return moved

    def _add(self, after: fx.Node, target: Any, args: tuple[Any, ...], like: fx.Node | None = None) -> fx.Node:
        """A call behind a node; of the pass, and the part of the model, that what it reads first belongs to."""
        first = args[0]
        while after.next.op == "placeholder":
            after = after.next
        with self.graph.inserting_after(after):
            node = self.graph.call_function(target, args)
        of = like or first
        with self.mode:
            value = of.meta["val"]
            made = value.new_empty(value.shape, dtype=value.dtype if like else torch.int64)
        node.meta = {"val": made, **{name: first.meta[name] for name in ("module", "segment") if name in first.meta}}
        if first in self.forward:
            self.forward.add(node)
        return node


def _experts(product: fx.Node) -> int:
    of: Any = product.args
    return int(of[1].meta["val"].shape[0] if product.target is _PRODUCT else of[3])


def _first(node: fx.Node) -> Any:
    """The description of its result, or of the first of several."""
    made = node.meta.get("val")
    return made[0] if isinstance(made, (tuple, list)) and made else made


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)
