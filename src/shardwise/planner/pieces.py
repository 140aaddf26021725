"""What the parts of a deep model take on a rank, from a shallow twin of it.

    thin graph   head │ block │ block │ block │ tail          captured with a few blocks of each run
    model        head │ block × 96            │ tail          the same blocks, as often as the model has them

Each piece is lowered as a stage of its own, so that what a stage of any blocks takes is the sum of its pieces. A layout for thousands of
devices is so costed from the Program of a few blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from torch import fx

from shardwise.capture.graph import Graph, Op
from shardwise.cluster.model import Cluster
from shardwise.cost.compute import op_flops
from shardwise.cost.operators import name_of
from shardwise.errors import PlanError
from shardwise.planner.keeping import Kept, kept, of_the_batch
from shardwise.program.build import lower_ranks, rank_of
from shardwise.program.lower import Cut
from shardwise.program.program import ParameterPart, Program, StageProgram
from shardwise.program.recompute import WEIGHED
from shardwise.program.reuse import as_torch_would
from shardwise.program.trace import Tracer
from shardwise.program.weights import edges_need
from shardwise.sharding.assignment import Assignment
from shardwise.sharding.collectives import COLLECTIVES
from shardwise.simulate.costs import node_seconds, sink_seconds

__all__ = ["Outline", "Piece", "PieceCost", "Work", "outline", "piece_costs", "piece_costs_on"]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of the model: its operators in the thin graph, and how many such parts follow one another in the model."""

    name: str
    ops: tuple[Op, ...] = field(repr=False)
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Outline:
    """The pieces of a model in order. stages: every operator of the thin graph → number of its part there; shown: piece → that number."""

    graph: Graph = field(repr=False)
    pieces: tuple[Piece, ...]
    stage_of: dict[Op, int] = field(repr=False)
    shown: tuple[int, ...]

    @property
    def blocks(self) -> int:
        """Of the model, all runs together."""
        return sum(piece.count for piece in self.pieces if piece.count > 1)


def outline(graph: Graph, prelude: set[Op], counts: Sequence[int] = ()) -> Outline:
    """The pieces of a graph. counts: for each run of repeated blocks how many the model has, as many as the graph where not given.

    PlanError where there are more counts than runs.
    """
    body = [op for op in graph.ops if op not in prelude]
    place = {op: index for index, op in enumerate(body)}
    runs = sorted(([[op for op in block if op in place] for block in run] for run in graph.blocks), key=lambda run: place[run[0][0]])
    if len(counts) > len(runs):
        raise PlanError(f"{len(counts)} numbers of blocks are given, but the model has {len(runs)} runs of equal blocks")
    pieces: list[Piece] = []
    stage_of: dict[Op, int] = {}
    shown: list[int] = []
    at = stages = 0

    def between(end: int) -> None:
        nonlocal stages
        rest = [op for op in body[at:end] if op not in stage_of]
        if rest:
            pieces.append(Piece(name=rest[-1].module or rest[0].module or "model", ops=tuple(rest)))
            stage_of.update(dict.fromkeys(rest, stages))
            shown.append(stages)
            stages += 1

    for number, run in enumerate(runs):
        between(place[run[0][0]])
        for index, block in enumerate(run):
            stage_of.update(dict.fromkeys(block, stages + index))
        at = place[run[-1][-1]] + 1
        count = counts[number] if number < len(counts) else len(run)
        pieces.append(Piece(name=run[0][0].module.rsplit(".", 1)[0], ops=tuple(run[0]), count=count))
        shown.append(stages + min(1, len(run) - 1))
        stages += len(run)
    between(len(body))
    return Outline(graph=graph, pieces=tuple(pieces), stage_of=_in_order(body, stage_of), shown=tuple(shown))


def _in_order(body: Sequence[Op], stage_of: dict[Op, int]) -> dict[Op, int]:
    """An operator that stands outside the blocks, between two of them, belongs to the one before it."""
    found: dict[Op, int] = {}
    last = 0
    for op in body:
        last = found[op] = max(last, stage_of.get(op, last))
    return found


@dataclass(frozen=True, kw_only=True)
class Work:
    """Seconds of computing and of communicating among the ranks of the tensor and sequence axes."""

    compute_s: float = 0.0
    communicate_s: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(compute_s=self.compute_s + other.compute_s, communicate_s=self.communicate_s + other.communicate_s)


@dataclass(frozen=True, kw_only=True)
class PieceCost:
    """One piece, one microbatch, one rank.

    backward_input, backward_weight: the backward pass in two, what its predecessor waits for and the rest. held: bytes kept for the
    backward pass; sent: bytes that go on to the next piece; flops: of products and attention, both passes.
    light: of the forward pass what is no product with weights; pointwise: of that what is neither attention nor communication.
    shared: of a forward pass, beside, once for all equal pieces of a stage: masks and the like, made of the batch alone.
    routed, row: rows that go to experts and come back from them, and numbers of one; experts: numbers of their weights.
    parameters: numbers that the rank holds, nearly all in so many matrices; frozen: of them, without gradient; item: bytes of one.
    pending: numbers whose gradients are summed over the tensor axis once a step; pending_experts: of them, those of experts.
    tied: earlier piece → how many of the numbers it has, too.
    """

    forward: Work
    backward_input: Work
    backward_weight: Work
    prelude: Work
    light: Work
    pointwise: Work
    shared: Work
    held: Kept
    routed: int
    row: int
    experts: int
    sent: int
    flops: float
    parameters: int
    matrices: int
    frozen: int
    item: int
    pending: int
    pending_experts: int
    tied: Mapping[int, int]


def piece_costs(
    shape: Outline, assignment: Assignment, prelude: set[Op], cluster: Cluster, tracer: Tracer, place: int = 0
) -> tuple[PieceCost, ...]:
    """Of every piece in the assignment, whose mesh has one data rank. place: of the rank along cp."""
    (costs,) = piece_costs_on(shape, assignment, prelude, (cluster,), tracer, place)
    return costs


def piece_costs_on(
    shape: Outline, assignment: Assignment, prelude: set[Op], clusters: Sequence[Cluster], tracer: Tracer, place: int = 0
) -> list[tuple[PieceCost, ...]]:
    """For each of several clusters the costs of every piece, which are lowered once. place: of the rank along cp."""
    assert assignment.mesh["dp"] == 1
    cut = Cut(stage_of=shape.stage_of, prelude=frozenset(prelude))
    tp, cp = assignment.mesh["tp"], assignment.mesh["cp"]
    ranks = [rank_of(stage, 0, 0, 1, tp, c=place, cp=cp) for stage in shape.shown]
    programs = lower_ranks(assignment, cut, ranks, lambda *_: "native", tracer=tracer)
    for graph in (graph for program in programs.values() for stage in program.stages.values() for graph in stage.graphs.values()):
        as_torch_would(graph)
    ties = [_tied([programs[each] for each in ranks[: index + 1]]) for index in range(len(ranks))]
    return [tuple(_cost(programs[rank], tied, cluster) for rank, tied in zip(ranks, ties, strict=True)) for cluster in clusters]


def _tied(programs: Sequence[Program]) -> dict[int, int]:
    """Of the last, what the others hold."""
    held = [{part.name: prod(part.local) for stage in program.stages.values() for part in stage.parameters} for program in programs]
    found = {index: sum(size for name, size in held[-1].items() if name in other) for index, other in enumerate(held[:-1])}
    return {index: size for index, size in found.items() if size}


def _cost(program: Program, tied: Mapping[int, int], cluster: Cluster) -> PieceCost:
    (stage,) = program.stages.values()
    weights = _only_for_weights(stage)
    ahead, backward = node_seconds(stage.forward, cluster), node_seconds(stage.backward, cluster)
    common = of_the_batch(stage)
    forward = {node: each for node, each in ahead.items() if node not in common}
    trained = [part for part in stage.parameters if part.requires_grad]
    sizes = [prod(part.local) for part in stage.parameters]
    experts, (routed, row) = _expert_parameters(stage), _routed(stage.forward)
    return PieceCost(
        forward=_work(forward),
        backward_input=_work({node: seconds for node, seconds in backward.items() if node not in weights}),
        backward_weight=_work({node: seconds for node, seconds in backward.items() if node in weights})
        + Work(compute_s=sink_seconds(stage.parameters, cluster)),
        prelude=_work(node_seconds(stage.prelude, cluster)),
        light=_work({node: seconds for node, seconds in forward.items() if name_of(node.target) not in WEIGHED}),
        pointwise=Work(compute_s=sum(seconds for node, seconds in forward.items() if node.target not in COLLECTIVES and not _flops(node))),
        shared=_work({node: each for node, each in ahead.items() if node in common}),
        held=kept(stage, weights),
        routed=routed,
        row=row,
        experts=sum(prod(part.local) for part in experts),
        sent=sum(edge.nbytes for edge in program.edges if edge.source == stage.stage and edge.target == stage.stage + 1),
        flops=sum(_flops(node) for node in (*ahead, *backward)),
        parameters=sum(sizes),
        matrices=sum(len(part.local) > 1 for part in stage.parameters),
        frozen=sum(sizes) - sum(prod(part.local) for part in trained),
        item=max((part.dtype.itemsize for part in stage.parameters), default=0),
        pending=sum(prod(part.local) for part in trained if part.reduce),
        pending_experts=sum(prod(part.local) for part in experts if part.reduce),
        tied=tied,
    )


def _work(seconds: dict[fx.Node, float]) -> Work:
    talk = sum(each for node, each in seconds.items() if node.target in COLLECTIVES)
    return Work(compute_s=sum(seconds.values()) - talk, communicate_s=talk)


def _expert_calls(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if name_of(node.target) == "expert_mm"]


def _expert_parameters(stage: StageProgram) -> list[ParameterPart]:
    """The parameters that products with experts take as matrices."""
    inputs = [node for node in stage.forward.nodes if node.op == "placeholder"]
    names = {node: binding.name for node, binding in zip(inputs, stage.forward_inputs, strict=True) if binding.kind == "parameter"}
    read = {names.get(_origin(call.all_input_nodes[1])) for call in _expert_calls(stage.forward)}
    return [part for part in stage.parameters if part.name in read]


def _origin(node: fx.Node) -> fx.Node:
    """What a tensor was before it was turned, cast or gathered."""
    while node.op == "call_function":
        node = node.all_input_nodes[0]
    return node


def _routed(graph: fx.Graph) -> tuple[int, int]:
    """The rows that the first product with experts takes, and numbers of one of them."""
    for call in _expert_calls(graph):
        rows, row = call.all_input_nodes[0].meta["val"].shape
        return rows, row
    return 0, 0


def _flops(node: fx.Node) -> float:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    return op_flops(node.target, args, kwargs, node.meta.get("val"))


def _only_for_weights(stage: StageProgram) -> set[fx.Node]:
    """The nodes of the backward graph that only gradients of parameters need."""
    needed = edges_need(stage.backward, [binding.kind == "parameter" for binding in stage.backward_outputs])
    return {node for node in stage.backward.nodes if node.op == "call_function" and node not in needed}
