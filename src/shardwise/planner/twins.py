"""A shallow twin of a model, split over the ranks of one replica: the costs of its pieces.

thin graph + tp ──candidates, integer program──▶ assignment ──lower──▶ costs of pieces
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardwise.capture.graph import Graph, Op
from shardwise.cluster.model import Cluster
from shardwise.cost.collectives import collective_cost
from shardwise.planner.apply import analyse, assign
from shardwise.planner.intra import Costs, representatives, split_tensors
from shardwise.planner.pieces import Outline, PieceCost, outline, piece_costs_on
from shardwise.planner.search import PREFER_SPLIT, OpCosts
from shardwise.program.trace import Tracer

__all__ = ["TwinLayout", "split_twin", "split_twin_on"]

_DEAR = 3.0  # times its cost: an all-reduce where the sequence is to be split between products, what replaces one where it is not


@dataclass(frozen=True, kw_only=True)
class TwinLayout:
    """tp, cp: ranks; sequence_parallel: whether tp splits the sequence where it does not split products, instead of holding it whole."""

    tp: int = 1
    cp: int = 1
    sequence_parallel: bool = True


def split_twin(
    graph: Graph, counts: Sequence[int], layout: TwinLayout, cluster: Cluster, tracer: Tracer, *, microbatches: int = 1
) -> tuple[Outline, tuple[PieceCost, ...]]:
    """The pieces of a thin graph (counts: how many blocks each of its runs really has) and what they cost a rank for one of so many
    microbatches of the graph's batch."""
    shape, (costs,) = split_twin_on(graph, counts, layout, (cluster,), tracer, microbatches=microbatches)
    return shape, costs


def split_twin_on(
    graph: Graph, counts: Sequence[int], layout: TwinLayout, clusters: Sequence[Cluster], tracer: Tracer, *, microbatches: int = 1
) -> tuple[Outline, list[tuple[PieceCost, ...]]]:
    """As `split_twin`, with the costs on each of several clusters; the split is the best one on the first, and the same on all."""
    analysis, cluster = analyse(graph, "fast"), clusters[0]
    assignment = assign(analysis, 1, microbatches, layout.tp, layout.cp)
    each, first = OpCosts(cluster=cluster, tracer=tracer), representatives(graph)

    def seconds(op: Op) -> float:
        return each.of(first[op])[0] / microbatches

    dear = dict.fromkeys(["all_reduce"] if layout.sequence_parallel else ["reduce_scatter", "all_gather"], _DEAR)
    costs = Costs(
        operator=seconds,
        heavy=lambda op: each.of(op)[1],
        collective=lambda kind, message, ranks: collective_cost(kind, message, ranks, cluster).seconds * dear.get(kind, 1.0),
        update=lambda nbytes: nbytes / 1e12,
        state_bytes=lambda value: value.nbytes * 8.0,
        limit_bytes=None,
        prefer_split=PREFER_SPLIT,
        forbidden={} if layout.sequence_parallel else analysis.sequence,
    )
    split_tensors(assignment, analysis.batch, analysis.prelude, costs)
    shape = outline(graph, analysis.prelude, counts)
    return shape, piece_costs_on(shape, assignment, analysis.prelude, clusters, tracer)
