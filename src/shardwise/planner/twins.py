"""A shallow twin of a model, split over the ranks of one replica: the costs of its pieces.

thin graph + tp ──candidates, integer program──▶ assignment ──lower──▶ costs of pieces
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from shardwise.capture.experts import expert_mm
from shardwise.capture.graph import Graph, Op
from shardwise.cluster.model import Cluster
from shardwise.cost.collectives import collective_cost
from shardwise.planner.apply import Analysis, analyse, assign
from shardwise.planner.intra import Costs, representatives, split_tensors
from shardwise.planner.pieces import Outline, PieceCost, outline, piece_costs_on
from shardwise.planner.search import PREFER_SPLIT, OpCosts
from shardwise.program.trace import Tracer

__all__ = ["Twin", "TwinLayout", "split_twin"]

_DEAR = 3.0  # times its cost: an all-reduce where the sequence is to be split between products, what replaces one where it is not


@dataclass(frozen=True, kw_only=True)
class TwinLayout:
    """tp, cp: ranks; sequence_parallel: whether tp splits the sequence where it does not split products, instead of holding it whole.

    whole_experts: whether tp leaves the matrices of experts whole and splits their rows.
    """

    tp: int = 1
    cp: int = 1
    sequence_parallel: bool = True
    whole_experts: bool = False


@dataclass(frozen=True, kw_only=True)
class Twin:
    """A thin graph and how many blocks each of its runs really has; what all splits have in common is made once."""

    graph: Graph
    counts: Sequence[int]
    cluster: Cluster
    tracer: Tracer

    @cached_property
    def analysis(self) -> Analysis:
        """Rules, batch and sequence of its operators."""
        return analyse(self.graph, "fast")

    @cached_property
    def shape(self) -> Outline:
        """Its pieces."""
        return outline(self.graph, self.analysis.prelude, self.counts)

    @cached_property
    def _each(self) -> OpCosts:
        return OpCosts(cluster=self.cluster, tracer=self.tracer)

    @cached_property
    def _first(self) -> dict[Op, Op]:
        return representatives(self.graph)

    def split(self, layout: TwinLayout, microbatches: int = 1) -> tuple[Outline, tuple[PieceCost, ...]]:
        """The pieces and what they cost a rank for one of so many microbatches of the graph's batch.

        Raises LayoutError where the model cannot be split so.
        """
        shape, (costs,) = self.split_on(layout, (self.cluster,), microbatches)
        return shape, costs

    def split_on(
        self, layout: TwinLayout, clusters: Sequence[Cluster], microbatches: int = 1
    ) -> tuple[Outline, list[tuple[PieceCost, ...]]]:
        """As `split`, with the costs on each of several clusters: the split is the best one on the twin's own, and the same on all."""
        analysis = self.analysis
        assignment = assign(analysis, 1, microbatches, layout.tp, layout.cp)
        dear = dict.fromkeys(["all_reduce"] if layout.sequence_parallel else ["reduce_scatter", "all_gather"], _DEAR)
        costs = Costs(
            operator=lambda op: self._each.of(self._first[op])[0] / microbatches,
            heavy=lambda op: self._each.of(op)[1],
            collective=lambda kind, message, ranks: collective_cost(kind, message, ranks, self.cluster).seconds * dear.get(kind, 1.0),
            update=lambda nbytes: nbytes / 1e12,
            state_bytes=lambda value: value.nbytes * 8.0,
            limit_bytes=None,
            prefer_split=PREFER_SPLIT,
            forbidden=_forbidden(analysis, layout),
        )
        split_tensors(assignment, analysis.batch, analysis.prelude, costs)
        return self.shape, piece_costs_on(self.shape, assignment, analysis.prelude, clusters, self.tracer)


def split_twin(
    graph: Graph, counts: Sequence[int], layout: TwinLayout, cluster: Cluster, tracer: Tracer, *, microbatches: int = 1
) -> tuple[Outline, tuple[PieceCost, ...]]:
    """The pieces of a thin graph in one split; see `Twin`."""
    return Twin(graph=graph, counts=counts, cluster=cluster, tracer=tracer).split(layout, microbatches)


def _forbidden(analysis: Analysis, layout: TwinLayout) -> dict[Op, set[str]]:
    """Factors that the tensor axis is not to split."""
    found = {} if layout.sequence_parallel else {op: {choice.factor} for op, choice in analysis.sequence.items()}
    if layout.whole_experts:
        for op in (each for each in analysis.graph.ops if each.target is expert_mm):
            found[op] = found.get(op, set()) | set(analysis.signatures[op].splits) - {"s"}
            view = op.inputs[1].producer
            while view is not None:  # of the matrices
                found[view] = set(analysis.signatures[view].splits)
                view = view.inputs[0].producer
    return found
