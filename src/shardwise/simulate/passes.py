"""What a stage's graphs ask an allocator for while they run, and what one leaves for the next."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from shardwise.cost.memory import Request, bases, requests, tensor_bytes
from shardwise.cost.scratch import node_scratch_bytes
from shardwise.program.actions import Kind
from shardwise.program.program import StageProgram
from shardwise.program.sinks import product_of
from shardwise.sharding.collectives import ARRIVED, BEGINS, COLLECTIVES

__all__ = ["Beside", "Passed", "Passes", "arriving", "kept_values", "placeholders", "saved_values"]

Beside = Mapping[fx.Node, Sequence[Request]]
"""Node → what is asked for beside all values just before it runs."""


@dataclass(frozen=True, kw_only=True)
class Passed:
    """What one graph leaves for the next. aliases: of the next one's inputs, those that share memory with an earlier one, and with which;
    sizes: bytes of the others, 0 for what is kept in any case."""

    aliases: dict[fx.Node, fx.Node]
    sizes: dict[fx.Node, int]

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())


@dataclass(frozen=True, kw_only=True)
class Passes:
    """A stage's graphs. saved: what forward leaves for backward; kept: what backward leaves for the weights' part, where that is apart."""

    stage: StageProgram

    @cached_property
    def saved(self) -> Passed:
        return saved_values(self.stage)

    @cached_property
    def kept(self) -> Passed:
        return Passed(aliases={}, sizes={}) if self.stage.weight is None else kept_values(self.stage, self.saved)

    def requests(self, kind: Kind, beside: Beside | None = None) -> list[Request]:
        """What a graph asks an allocator for. What other graphs and messages left for it is given back at its last use, and what it leaves
        for others is not. beside: what is asked for just before a node runs."""
        stage, graph = self.stage, self.stage.graphs[kind]
        beside = _with_scratch(graph, beside or {})
        given = {node: tensor_bytes(node.meta.get("val")) for node in arriving(stage, kind).values()}
        if kind is Kind.FORWARD:
            return list(requests(graph, lambda node: given.get(node, 0), beside=beside))
        gradients = stage.gradients(kind)
        narrow = {part.name for part in stage.parameters if part.wide == part.dtype}
        returned: list[fx.Node | None] = list(graph.output_node().args[0])  # type: ignore[arg-type]
        read = Counter(node for node in returned if node is not None)
        straight = [product_of(node, read) for name, node in gradients.items() if name in narrow]
        unwritten = {found[0] for found in straight if found}
        sunk = set(gradients.values())  # added to buffers as soon as they are made
        held = [node for node in graph.output_node().all_input_nodes if node not in sunk]
        passed = self.saved if kind is Kind.BACKWARD else self.kept
        given |= passed.sizes
        return list(requests(graph, lambda node: given.get(node, 0), passed.aliases, unwritten=unwritten, keeps=held, beside=beside))


def arriving(stage: StageProgram, kind: Kind) -> dict[str, fx.Node]:
    """Edge → the input of a graph that takes what comes over it."""
    if kind is Kind.WEIGHT:
        return {}
    bindings = stage.forward_inputs if kind is Kind.FORWARD else stage.backward_inputs
    inputs = placeholders(stage.graphs[kind])
    takers = inputs if kind is Kind.FORWARD else inputs[stage.saved :]
    return {binding.name: node for binding, node in zip(bindings, takers, strict=True) if binding.kind == "edge"}


def _with_scratch(graph: fx.Graph, beside: Beside) -> Beside:
    """And what the graph's messages hold from their beginning until they have arrived."""
    found: dict[fx.Node, list[Request]] = defaultdict(list)
    for node, each in beside.items():
        found[node] += each
    for node in graph.nodes:
        if node.op == "call_function" and node.target in COLLECTIVES and (scratch := node_scratch_bytes(node)):
            begun = node.target in BEGINS.values()
            found[node].append((("scratch", node), scratch))
            found[next(user for user in node.users if user.target is ARRIVED) if begun else node.next].append((("scratch", node), -scratch))
    return found


def saved_values(stage: StageProgram) -> Passed:
    """What forward leaves for backward: parameters and what else lasts counts nothing."""
    lasting = {node: 0 for node, each in zip(placeholders(stage.forward), stage.forward_inputs, strict=True) if each.kind != "edge"}
    given = Passed(aliases={}, sizes=lasting)
    return _passed_on(stage.forward, len(stage.forward_outputs), given, placeholders(stage.backward)[: stage.saved])


def kept_values(stage: StageProgram, saved: Passed) -> Passed:
    """What backward leaves for the weights' part of it."""
    assert stage.weight is not None
    return _passed_on(stage.backward, len(stage.backward_outputs), saved, placeholders(stage.weight))


def _passed_on(graph: fx.Graph, others: int, given: Passed, takers: Sequence[fx.Node]) -> Passed:
    """others: how many results the graph has before those that it leaves; given: what is known of its inputs; takers: the next one's."""
    base = bases(graph, given.aliases)
    left: list[fx.Node] = list(graph.output_node().args[0])[others:]  # type: ignore[arg-type]
    first: dict[fx.Node, fx.Node] = {}
    aliases: dict[fx.Node, fx.Node] = {}
    sizes: dict[fx.Node, int] = {}
    for node, taker in zip(left, takers, strict=True):
        owner = base[node]
        if owner in first:
            aliases[taker] = first[owner]
        else:
            first[owner] = taker
            sizes[taker] = given.sizes.get(owner, tensor_bytes(owner.meta.get("val")))
    return Passed(aliases=aliases, sizes=sizes)


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The graph's inputs."""
    return [node for node in graph.nodes if node.op == "placeholder"]
