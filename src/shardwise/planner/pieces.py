"""What the parts of a deep model take on a rank, from a shallow twin of it.

    thin graph   head │ block │ block │ block │ tail          captured with a few blocks of each run
    model        head │ block × 96            │ tail          the same blocks, as often as the model has them

Each piece is lowered as a stage of its own, so that what a stage of any blocks takes is the sum of its pieces. A layout for thousands of
devices is so costed from the Program of a few blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import fx

from shardwise.capture.graph import Graph, Op
from shardwise.cluster.model import Cluster
from shardwise.cost.compute import op_flops
from shardwise.cost.fusion import is_fused_kernel
from shardwise.cost.memory import bases, liveness, tensor_bytes
from shardwise.cost.operators import name_of
from shardwise.errors import PlanError
from shardwise.program.build import build_programs, rank_of
from shardwise.program.lower import Cut
from shardwise.program.program import Program, StageProgram
from shardwise.program.recompute import WEIGHED
from shardwise.program.trace import Tracer
from shardwise.program.weights import edges_need
from shardwise.sharding.assignment import Assignment
from shardwise.sharding.collectives import COLLECTIVES
from shardwise.simulate.costs import node_seconds, sink_seconds

__all__ = ["Outline", "Piece", "PieceCost", "Work", "outline", "piece_costs", "piece_costs_on"]


_GATHER = torch.ops.shardwise.all_gather.default


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

    backward_input, backward_weight: the backward pass in two, what its predecessor waits for and the rest. saved: bytes kept for the
    backward pass; entered: bytes of what it is given by other pieces and keeps; sent: bytes that go on to the next piece;
    flops: of products and attention, both passes.
    transient: most bytes beside. light: of the forward pass what is no product with weights; made: bytes that these products make.
    routed: bytes of what goes to experts and comes back from them; experts: numbers of their weights.
    parameters: numbers that the rank holds, in so many tensors; frozen: of them, without gradient; item: bytes of one.
    pending: numbers whose gradients are summed over the tensor axis once a step.
    """

    forward: Work
    backward_input: Work
    backward_weight: Work
    prelude: Work
    light: Work
    saved: int
    entered: int
    made: int
    routed: int
    experts: int
    sent: int
    flops: float
    transient: int
    parameters: int
    tensors: int
    frozen: int
    item: int
    pending: int


def piece_costs(shape: Outline, assignment: Assignment, prelude: set[Op], cluster: Cluster, tracer: Tracer) -> tuple[PieceCost, ...]:
    """Of every piece in the assignment, whose mesh has one data rank."""
    (costs,) = piece_costs_on(shape, assignment, prelude, (cluster,), tracer)
    return costs


def piece_costs_on(
    shape: Outline, assignment: Assignment, prelude: set[Op], clusters: Sequence[Cluster], tracer: Tracer
) -> list[tuple[PieceCost, ...]]:
    """For each of several clusters the costs of every piece, which are lowered once."""
    assert assignment.mesh["dp"] == 1
    cut = Cut(stage_of=shape.stage_of, prelude=frozenset(prelude))
    tp, cp = assignment.mesh["tp"], assignment.mesh["cp"]
    middle = max(0, cp // 2 - 1)  # of a causal model's sequence: what comes before it is half of what the last rank attends to
    ranks = [rank_of(stage, 0, 0, 1, tp, c=middle, cp=cp) for stage in shape.shown]
    programs = build_programs(assignment, cut, "1f1b", lambda *_: "native", device=torch.device("cpu"), tracer=tracer, ranks=ranks)
    return [tuple(_cost(programs[rank], cluster) for rank in ranks) for cluster in clusters]


def _cost(program: Program, cluster: Cluster) -> PieceCost:
    (stage,) = program.stages.values()
    weights = _only_for_weights(stage)
    forward, backward = node_seconds(stage.forward, cluster), node_seconds(stage.backward, cluster)
    saved, entered = _saved(stage, fuses=cluster.rates.fuses)
    trained = [part for part in stage.parameters if part.requires_grad]
    sizes = [prod(part.local) for part in stage.parameters]
    peaks = liveness(stage.forward).peak_bytes - saved, liveness(stage.backward).peak_bytes
    return PieceCost(
        forward=_work(forward),
        backward_input=_work({node: seconds for node, seconds in backward.items() if node not in weights}),
        backward_weight=_work({node: seconds for node, seconds in backward.items() if node in weights})
        + Work(compute_s=sink_seconds(stage.parameters, cluster)),
        prelude=_work(node_seconds(stage.prelude, cluster)),
        light=_work({node: seconds for node, seconds in forward.items() if name_of(node.target) not in WEIGHED}),
        saved=saved,
        entered=entered,
        routed=_routed(stage.forward),
        experts=sum(tensor_bytes(each) // each.element_size() for each in _expert_weights(stage.forward)),
        made=sum(tensor_bytes(node.meta["val"]) for node in forward if name_of(node.target) in WEIGHED),
        sent=sum(edge.nbytes for edge in program.edges if edge.source == stage.stage and edge.target == stage.stage + 1),
        flops=sum(_flops(node) for node in (*forward, *backward)),
        transient=max(0, *peaks),
        parameters=sum(sizes),
        tensors=len(sizes),
        frozen=sum(sizes) - sum(prod(part.local) for part in trained),
        item=max((part.dtype.itemsize for part in stage.parameters), default=0),
        pending=sum(prod(part.local) for part in trained if part.reduce),
    )


def _work(seconds: dict[fx.Node, float]) -> Work:
    talk = sum(each for node, each in seconds.items() if node.target in COLLECTIVES)
    return Work(compute_s=sum(seconds.values()) - talk, communicate_s=talk)


def _expert_calls(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if name_of(node.target) == "expert_mm"]


def _expert_weights(graph: fx.Graph) -> list[torch.Tensor]:
    return [node.args[1].meta["val"] for node in _expert_calls(graph) if isinstance(node.args[1], fx.Node)]


def _routed(graph: fx.Graph) -> int:
    """Bytes of the rows that the first product with experts takes, and of those that the last one makes."""
    calls = _expert_calls(graph)
    if not calls or not isinstance(calls[0].args[0], fx.Node):
        return 0
    return tensor_bytes(calls[0].args[0].meta["val"]) + tensor_bytes(calls[-1].meta["val"])


def _flops(node: fx.Node) -> float:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    return op_flops(node.target, args, kwargs, node.meta.get("val"))


def _only_for_weights(stage: StageProgram) -> set[fx.Node]:
    """The nodes of the backward graph that only gradients of parameters need."""
    needed = edges_need(stage.backward, [binding.kind == "parameter" for binding in stage.backward_outputs])
    return {node for node in stage.backward.nodes if node.op == "call_function" and node not in needed}


def _saved(stage: StageProgram, *, fuses: bool) -> tuple[int, int]:
    """Bytes that the forward pass keeps for the backward pass, and of these what came in from other pieces.

    Where elementwise chains are fused a value is not kept that such a chain makes again from fewer bytes that are kept, nor a gathered one
    that is gathered again (Korthikanti et al. 2022, section 4.2.2).
    """
    base = bases(stage.forward, {})
    returned = stage.forward.output_node().args[0]
    assert isinstance(returned, (list, tuple))
    kept = dict.fromkeys(base[node] for node in returned[len(stage.forward_outputs) :] if isinstance(node, fx.Node))
    inputs = [node for node in stage.forward.nodes if node.op == "placeholder"]
    bindings = dict(zip(inputs, stage.forward_inputs, strict=True))
    if fuses:
        kept = _remade(kept, base)
    arrived = {node for node, binding in bindings.items() if binding.kind == "edge"}
    lasting = {node for node in inputs if node not in arrived}
    size = {node: tensor_bytes(node.meta.get("val")) for node in kept if node not in lasting}
    return sum(size.values()), sum(nbytes for node, nbytes in size.items() if node in arrived)


def _remade(kept: dict[fx.Node, None], base: dict[fx.Node, fx.Node]) -> dict[fx.Node, None]:
    """Without the values that fused kernels make again from what is kept, or from no more bytes than they take themselves."""
    found = dict(kept)
    for node in list(kept):
        sources = _sources(node, base)
        if sources is None:
            continue
        new = [each for each in sources if each not in found and each.op != "placeholder"]
        if sum(tensor_bytes(each.meta.get("val")) for each in new) <= tensor_bytes(node.meta.get("val")) and node not in sources:
            del found[node]
            found |= dict.fromkeys(sources)
    return found


def _sources(node: fx.Node, base: dict[fx.Node, fx.Node]) -> set[fx.Node] | None:
    """What a chain of fused kernels that ends at `node` reads; None where the node is no such kernel."""
    if not is_fused_kernel(node) and node.target is not _GATHER:
        return None
    found: set[fx.Node] = set()
    pending, seen = [node], {node}
    while pending:
        for parent in {base[each] for each in pending.pop().all_input_nodes} - seen:
            seen.add(parent)
            if is_fused_kernel(parent) or parent.target is _GATHER:
                pending.append(parent)
            else:
                found.add(parent)
    return found
