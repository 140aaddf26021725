"""Builds a stage's forward and backward computation as one graph, call by call.

apply(call, inputs) ──▶ forward nodes, and an entry on the tape
backward(seeds)     ──▶ the tape from its end: each call's backward nodes, gradients of a value read twice added up
split()             ──▶ a forward graph, a backward graph (in two parts, if asked for), and the values that each saves for the next
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from shardwise.program.grouping import group_rows
from shardwise.program.overlap import overlap_messages
from shardwise.program.recompute import choose_saved
from shardwise.program.reuse import reuse_memory
from shardwise.program.trace import Function, Tracer, differentiable
from shardwise.program.weights import split_backward
from shardwise.sharding.collectives import COLLECTIVES

__all__ = ["Halves", "JointGraph"]


@dataclass(frozen=True, kw_only=True)
class _Entry:
    function: Function
    key: Hashable
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    nodes: dict[str, fx.Node]  # name in the call's own trace → node here
    last: fx.Node  # the graph's last node after the call
    module: str
    segment: str | None
    gathers: bool


@dataclass(frozen=True, kw_only=True)
class Halves:
    """forward: its placeholders → (outputs, saved). backward: (saved, gradient placeholders) → its outputs.

    weight: where the backward pass is in two parts, the second: `kept` values, which backward then returns, too → outputs number `later`.
    """

    forward: fx.Graph
    backward: fx.Graph
    forward_inputs: list[str]
    backward_inputs: list[str]
    saved: int
    weight: fx.Graph | None = None
    later: list[int] = field(default_factory=list)
    kept: int = 0


@dataclass(kw_only=True)
class JointGraph:
    """A computation under construction; see the module. segment: the block of the model that calls belong to from now on."""

    tracer: Tracer
    graph: fx.Graph = field(default_factory=fx.Graph)
    forward_nodes: set[fx.Node] = field(default_factory=set)
    tracked: set[fx.Node] = field(default_factory=set)
    cotangents: dict[fx.Node, fx.Node] = field(default_factory=dict)
    tape: list[_Entry] = field(default_factory=list)
    last_placeholder: fx.Node | None = None
    segment: str | None = None

    def placeholder(self, name: str, meta: Tensor, *, grad: bool = False, forward: bool = True) -> fx.Node:
        """An input of the computation."""
        with (
            self.graph.inserting_after(self.last_placeholder)
            if self.last_placeholder
            else self.graph.inserting_before(next(iter(self.graph.nodes), None))
        ):
            node = self.last_placeholder = self.graph.placeholder(name)
        node.meta["val"] = meta
        if forward:
            self.forward_nodes.add(node)
        if grad:
            self.tracked.add(node)
        return node

    def apply(
        self, function: Function, key: Hashable, inputs: Sequence[fx.Node], *, grad: bool, module: str, gathers: bool = False
    ) -> list[fx.Node]:
        """Appends a call; returns its results. `grad`: whether it is differentiated in its floating inputs that need it.

        gathers: whether it gathers parameters, which are not kept for the backward pass. Its messages travel beside other work.
        """
        tensors = [node.meta["val"] for node in inputs]
        grads = [grad and node in self.tracked for node in inputs]
        traced = self.tracer.forward(function, key, tensors, grads)
        nodes = _bind(traced.graph, inputs)
        marks = {"module": module, "segment": self.segment} | ({"gathered": True} if gathers else {})
        self._copy(traced.graph, nodes, set(traced.forward), marks, forward=True)
        outputs = [self._own(nodes[result.name], inputs, module) for result in traced.results]
        if any(grads):
            self.tracked.update(node for node in outputs if differentiable(node.meta["val"]))
            self.tape.append(
                _Entry(
                    function=function,
                    key=key,
                    inputs=list(inputs),
                    outputs=outputs,
                    nodes=nodes,
                    last=next(reversed(self.graph.nodes)),
                    module=module,
                    segment=self.segment,
                    gathers=gathers,
                )
            )
        return outputs

    def _own(self, node: fx.Node, inputs: Sequence[fx.Node], module: str) -> fx.Node:
        """A call may return its input (a cast to the dtype that it has): a value of its own all the same, whose gradient is the call's."""
        if node not in inputs:
            return node
        alias = self.graph.call_function(torch.ops.aten.alias.default, (node,))
        alias.meta = {"val": node.meta["val"], "module": module, "segment": self.segment}
        self.forward_nodes.add(alias)
        return alias

    def backward(self, seeds: Sequence[tuple[fx.Node, fx.Node]]) -> None:
        """Appends the backward computation, given (value, its gradient) pairs."""
        for node, gradient in seeds:
            self._accumulate(node, gradient)
        while self.tape:
            entry = self.tape.pop()
            incoming = [self.cotangents.get(node) for node in entry.outputs]
            if any(node is not None for node in incoming):
                self._backward_call(entry, incoming)

    def _backward_call(self, entry: _Entry, incoming: Sequence[fx.Node | None]) -> None:
        tensors = [node.meta["val"] for node in entry.inputs]
        grads = [node in self.tracked for node in entry.inputs]
        given = [None if node is None else node.meta["val"] for node in incoming]
        traced = self.tracer.joint(entry.function, entry.key, tensors, grads, given)
        nodes = dict(entry.nodes) | _bind(traced.graph, [*entry.inputs, *(node for node in incoming if node is not None)])
        marks: dict[str, Any] = {"module": entry.module, "segment": entry.segment}
        with self.graph.inserting_after(entry.last):
            self._copy(traced.graph, nodes, set(traced.forward) - set(entry.nodes), marks, forward=True)
        marks |= {"scattered": True} if entry.gathers else {}
        self._copy(traced.graph, nodes, {node.name for node in traced.graph.nodes} - set(traced.forward), marks, forward=False)
        for node, gradient in zip(entry.inputs, traced.gradients, strict=True):
            if gradient is not None:
                self._accumulate(node, nodes[gradient.name])

    def read_whole(self, triples: Sequence[tuple[fx.Node, fx.Node, fx.Node]]) -> None:
        """For each (part, gathered, whole) reads `whole`, an input, instead of what was gathered of the input `part`; whose gradient it
        gets."""
        for part, gathered, whole in triples:
            gathered.replace_all_uses_with(whole)
            if part in self.cotangents:
                self.cotangents[whole] = self.cotangents.pop(part)
        parts = {part for part, _, _ in triples}
        for node in reversed(list(self.graph.nodes)):
            if (node in parts or node.meta.get("gathered")) and not node.users:
                self.graph.erase_node(node)
                self.forward_nodes.discard(node)

    def _accumulate(self, node: fx.Node, gradient: fx.Node) -> None:
        if (known := self.cotangents.get(node)) is None:
            self.cotangents[node] = gradient
            return
        total = self.graph.call_function(torch.ops.aten.add.Tensor, (known, gradient))
        with self.tracer.mode:
            total.meta["val"] = known.meta["val"] + gradient.meta["val"]
        total.meta["module"] = gradient.meta.get("module", "")
        self.cotangents[node] = total

    def _copy(self, source: fx.Graph, nodes: dict[str, fx.Node], names: set[str], marks: Mapping[str, Any], *, forward: bool) -> None:
        """Copies the named nodes of a trace, whose inputs `nodes` knows. marks: for their meta."""
        for node in source.nodes:
            if node.op != "call_function" or node.name not in names or node.name in nodes:
                continue
            copied = self.graph.node_copy(node, lambda n: nodes[n.name])
            copied.meta = {"val": node.meta.get("val"), **marks}
            nodes[node.name] = copied
            if forward:
                self.forward_nodes.add(copied)

    def split(
        self,
        outputs: Sequence[fx.Node],
        gradients: Sequence[fx.Node | None],
        recompute: str = "none",
        *,
        for_parameters: Sequence[bool] | None = None,
    ) -> Halves:
        """The forward graph (returns `outputs`, then what it saves) and the backward graph (returns `gradients`).

        recompute: as of `shardwise.program.recompute`.
        for_parameters: which of the gradients may come later, if the backward graph is wanted in two parts.
        """
        merged = self._merge_equal()
        outputs, gradients = [merged.get(node, node) for node in outputs], [_renamed(node, merged) for node in gradients]
        ordered = group_rows(self.graph, self.forward_nodes, self.tracer.mode, {*outputs, *gradients})
        outputs, gradients = [ordered.get(node, node) for node in outputs], [_renamed(node, ordered) for node in gradients]
        _mark_uncounted(self.graph)
        backward_nodes = _ancestors([node for node in gradients if node is not None], self.forward_nodes)
        forward_order = [node for node in self.graph.nodes if node in self.forward_nodes]
        backward_order = [
            node for node in self.graph.nodes if node not in self.forward_nodes and (node in backward_nodes or node.op == "placeholder")
        ]
        returned = [node for node in gradients if node in self.forward_nodes]
        saving = choose_saved(forward_order, backward_order, returned, recompute)
        saved = saving.saved
        needed = _ancestors([*outputs, *saved], set())
        forward = _extract([node for node in forward_order if node in needed or node.op == "placeholder"], [], [*outputs, *saved])
        backward = _extract(saving.backward, saved, list(gradients))
        parts = None if for_parameters is None else split_backward(backward, for_parameters)
        backward = backward if parts is None else parts.backward
        for graph in (forward, backward, *([parts.weight] if parts else [])):
            overlap_messages(graph)
            reuse_memory(graph)
        return Halves(
            forward=forward,
            backward=backward,
            weight=parts.weight if parts else None,
            later=parts.later if parts else [],
            kept=parts.kept if parts else 0,
            forward_inputs=[node.name for node in forward_order if node.op == "placeholder"],
            backward_inputs=[node.name for node in backward_order if node.op == "placeholder"],
            saved=len(saved),
        )

    def _merge_equal(self) -> dict[fx.Node, fx.Node]:
        """Replaces nodes that compute what an earlier one of the same half did; returns replaced → kept."""
        known: dict[Any, fx.Node] = {}
        renamed: dict[fx.Node, fx.Node] = {}
        for node in list(self.graph.nodes):
            if node.op != "call_function":
                continue
            key = (node.target, _hashable(node.args), _hashable(node.kwargs), node in self.forward_nodes)
            if (kept := known.setdefault(key, node)) is not node:
                node.replace_all_uses_with(kept)
                renamed[node] = kept
                self.graph.erase_node(node)
                self.forward_nodes.discard(node)
        return renamed


def _renamed(node: fx.Node | None, names: Mapping[fx.Node, fx.Node]) -> fx.Node | None:
    return None if node is None else names.get(node, node)


def _mark_uncounted(graph: fx.Graph) -> None:
    """Marks as "uncounted" what holds rows at their experts, of which there are as many as the router decides."""
    for node in graph.nodes:
        away = any(parent.meta.get("uncounted") for parent in node.all_input_nodes)
        if away != (COLLECTIVES.get(node.target) == "exchange_rows"):  # an exchange of rows takes them there, or those that are there back
            node.meta["uncounted"] = True


def _bind(graph: fx.Graph, values: Sequence[fx.Node]) -> dict[str, fx.Node]:
    """A trace's placeholders as nodes here: its tensors, then (in the backward part) the incoming gradients."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    return {placeholder.name: value for placeholder, value in zip(placeholders, values, strict=False)}


def _hashable(tree: Any) -> Any:
    if isinstance(tree, (list, tuple)):
        return tuple(_hashable(item) for item in tree)
    if isinstance(tree, dict):
        return tuple((name, _hashable(item)) for name, item in sorted(tree.items()))
    return (type(tree).__name__, tree) if isinstance(tree, (bool, int, float)) else tree


def _ancestors(nodes: Sequence[fx.Node], stop: set[fx.Node]) -> set[fx.Node]:
    """The nodes and everything they are computed from, not going into `stop`."""
    found: set[fx.Node] = set()
    pending = [node for node in nodes if node not in stop]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(parent for parent in node.all_input_nodes if parent not in stop and parent not in found)
    return found


def _extract(nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node | None]) -> fx.Graph:
    """A graph of its own from some nodes of another; `inputs` become placeholders before the nodes' own."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in [*inputs, *(node for node in nodes if node.op == "placeholder")]:
        copied[node] = graph.placeholder(node.name)
        copied[node].meta = dict(node.meta)
    for node in nodes:
        if node.op == "call_function":
            copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output([None if node is None else copied[node] for node in outputs])
    return graph
