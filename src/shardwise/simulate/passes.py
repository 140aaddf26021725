"""What a stage's graphs hold while they run, and what one leaves for the next: bytes, by liveness."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from shardwise.cost.memory import bases, liveness, tensor_bytes
from shardwise.cost.scratch import node_scratch_bytes
from shardwise.program.actions import Kind
from shardwise.program.program import StageProgram
from shardwise.program.sinks import product_of
from shardwise.sharding.collectives import ARRIVED, BEGINS, COLLECTIVES

__all__ = ["Changes", "Passed", "Passes", "kept_values", "peak_after", "saved_values"]

Changes = Mapping[fx.Node, Sequence[int]]
"""Node → by how much what is held beside all values changes just before it runs."""


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

    def working_bytes(self, kind: Kind, changes: Changes | None = None) -> int:
        """The most that a graph holds beside what microbatches in flight keep, its own included. changes: of what is held beside it."""
        graph = self.stage.graphs[kind]
        beside = _with_scratch(graph, changes or {})
        if kind is Kind.FORWARD:
            return liveness(graph, beside=beside).peak_bytes - self.saved.nbytes
        gradients = self.stage.gradients(kind)
        narrow = {part.name for part in self.stage.parameters if part.wide == part.dtype}
        returned: list[fx.Node | None] = list(graph.output_node().args[0])  # type: ignore[arg-type]
        read = Counter(node for node in returned if node is not None)
        straight = [product_of(node, read) for name, node in gradients.items() if name in narrow]
        unwritten = {found[0] for found in straight if found}
        return peak_after(graph, self.saved if kind is Kind.BACKWARD else self.kept, set(gradients.values()), unwritten, beside)


def peak_after(
    graph: fx.Graph,
    passed: Passed,
    sunk: Collection[fx.Node] = (),
    unwritten: Collection[fx.Node] = (),
    beside: Changes | None = None,
) -> int:
    """The most that a graph holds beside what was passed to it, which it frees. sunk: outputs that are added to buffers as soon as they are
    made (gradients of parameters) and not held to the end; unwritten: what is computed straight into them."""
    held = [node for node in graph.output_node().all_input_nodes if node not in sunk]
    given = passed.sizes
    return liveness(graph, lambda node: given.get(node, 0), passed.aliases, unwritten=unwritten, keeps=held, beside=beside).peak_bytes


def _with_scratch(graph: fx.Graph, changes: Changes) -> Changes:
    """And what the graph's messages hold from their beginning until they have arrived."""
    found: dict[fx.Node, list[int]] = defaultdict(list)
    for node, each in changes.items():
        found[node] += each
    for node in graph.nodes:
        if node.op == "call_function" and node.target in COLLECTIVES and (scratch := node_scratch_bytes(node)):
            begun = node.target in BEGINS.values()
            found[node].append(scratch)
            found[next(user for user in node.users if user.target is ARRIVED) if begun else node.next].append(-scratch)
    return found


def saved_values(stage: StageProgram) -> Passed:
    """What forward leaves for backward: parameters and what else lasts counts nothing."""
    lasting = {node: 0 for node, each in zip(_placeholders(stage.forward), stage.forward_inputs, strict=True) if each.kind != "edge"}
    given = Passed(aliases={}, sizes=lasting)
    return _passed_on(stage.forward, len(stage.forward_outputs), given, _placeholders(stage.backward)[: stage.saved])


def kept_values(stage: StageProgram, saved: Passed) -> Passed:
    """What backward leaves for the weights' part of it."""
    assert stage.weight is not None
    return _passed_on(stage.backward, len(stage.backward_outputs), saved, _placeholders(stage.weight))


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


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]
