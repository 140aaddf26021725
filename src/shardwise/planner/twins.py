"""A shallow twin of a model, split over the ranks of one replica: the costs of its pieces.

thin graph + tp ──candidates, integer program──▶ assignment ──lower──▶ costs of pieces

Where experts are divided over ranks, the graph is first made one of a rank's share of them: as many rows, and fewer matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from math import prod

import torch

from shardwise.capture.experts import expert_mm
from shardwise.capture.graph import Graph, Op, Value
from shardwise.cluster.model import Cluster
from shardwise.cost.collectives import collective_cost
from shardwise.errors import LayoutError
from shardwise.planner.apply import Analysis, analyse, assign
from shardwise.planner.compose import Scheme
from shardwise.planner.intra import PREFER_SPLIT, Costs, representatives, split_tensors
from shardwise.planner.op_costs import OpCosts
from shardwise.planner.pieces import Outline, PieceCost, outline, piece_costs_on
from shardwise.program.trace import Tracer
from shardwise.sharding.context import Attention

__all__ = ["Twin", "TwinLayout", "costed_place", "experts_over", "split_twin"]

_DEAR = 3.0  # times its cost: an all-reduce where the sequence is to be split between products, what replaces one where it is not


@dataclass(frozen=True, kw_only=True)
class TwinLayout:
    """tp, cp: ranks; attention: how those of cp do it together, the slowest of them being costed; None: keys and values are gathered, and a
    rank is costed that does the mean, as frameworks of others balance it.

    sequence_parallel: whether tp splits the sequence where it does not split products, instead of holding it whole;
    whole_experts: whether tp leaves the matrices of experts whole and splits their rows.
    """

    tp: int = 1
    cp: int = 1
    attention: Attention | None = None
    sequence_parallel: bool = True
    whole_experts: bool = False


@dataclass(frozen=True, kw_only=True)
class Twin:
    """A thin graph and how many blocks each of its runs really has; what all splits on all clusters have in common is made once."""

    graph: Graph
    counts: Sequence[int]
    tracer: Tracer = field(default_factory=lambda: Tracer(device=torch.device("cpu")))
    _known: dict[object, tuple[PieceCost, ...]] = field(default_factory=dict, init=False, repr=False)
    _each: dict[int, OpCosts] = field(default_factory=dict, init=False, repr=False)
    _over: dict[int, Twin] = field(default_factory=dict, init=False, repr=False)
    _shares: dict[tuple[str, int, int], bool] = field(default_factory=dict, init=False, repr=False)

    def over(self, ep: int) -> Twin:
        """With one of ep parts of the experts. LayoutError as of `experts_over`."""
        if ep == 1:
            return self
        if ep not in self._over:
            self._over[ep] = Twin(graph=experts_over(self.graph, ep), counts=self.counts, tracer=self.tracer)
        return self._over[ep]

    @cached_property
    def analysis(self) -> Analysis:
        """Rules, batch and sequence of its operators."""
        return analyse(self.graph, "fast")

    def shares(self, attention: str, cp: int, tp: int) -> bool:
        """Whether some of its attention can be done so by the ranks of cp."""
        key = attention, cp, tp
        if key not in self._shares:
            self._shares[key] = attention == "gather" or bool(self.analysis.shared(attention, cp, tp).choices)
        return self._shares[key]

    @cached_property
    def shape(self) -> Outline:
        """Its pieces."""
        return outline(self.graph, self.analysis.prelude, self.counts)

    def state_bytes(self, scheme: Scheme) -> int:
        """Of the whole model's parameters, their gradients and the optimizer's states, each once."""
        counts = {value: piece.count for piece in self.shape.pieces for op in piece.ops for value in op.inputs if value.kind == "parameter"}
        trained = scheme.gradient_bytes + scheme.state_bytes
        return sum(count * (value.nbytes + trained * prod(value.shape) * value.requires_grad) for value, count in counts.items())

    @cached_property
    def _first(self) -> dict[Op, Op]:
        return representatives(self.graph)

    def split(self, layout: TwinLayout, cluster: Cluster, microbatches: int = 1) -> tuple[Outline, tuple[PieceCost, ...]]:
        """The pieces and what they cost a rank of the cluster for one of so many microbatches of the graph's batch.

        What was asked before is known, on whatever cluster of the same devices whose links between these ranks are the same.
        Raises LayoutError where the model cannot be split so.
        """
        machines, rates = cluster.machines, cluster.rates
        spans = (machines.span(1, layout.tp), machines.span(1, layout.tp * layout.cp), machines.devices) if machines else cluster.name
        key = (layout, microbatches, spans, id(rates))
        if key not in self._known:
            (self._known[key],) = self.split_on(layout, (cluster,), microbatches)[1]
        return self.shape, self._known[key]

    def split_on(
        self, layout: TwinLayout, clusters: Sequence[Cluster], microbatches: int = 1, *, best_on: Cluster | None = None
    ) -> tuple[Outline, list[tuple[PieceCost, ...]]]:
        """As `split`, with the costs on each of several clusters: the split is the same on all, the best one on one of them, the first
        where none is named."""
        analysis, cluster = self.analysis, best_on or clusters[0]

        @cache
        def collective(kind: str, message: float, ranks: int) -> float:
            return collective_cost(kind, message, ranks, cluster).seconds * dear.get(kind, 1.0)

        each = self._each.setdefault(id(cluster.rates), OpCosts(cluster=cluster, tracer=self.tracer))
        assignment = assign(analysis, 1, microbatches, layout.tp, layout.cp, attention=layout.attention or "gather")
        dear = dict.fromkeys(["all_reduce"] if layout.sequence_parallel else ["reduce_scatter", "all_gather"], _DEAR)
        costs = Costs(
            operator=lambda op: each.of(self._first[op])[0] / microbatches,
            heavy=lambda op: each.of(op)[1],
            collective=collective,
            update=lambda nbytes: nbytes / 1e12,
            state_bytes=lambda value: value.nbytes * 8.0,
            limit_bytes=None,
            prefer_split=PREFER_SPLIT,
            forbidden=_forbidden(analysis, layout),
        )
        split_tensors(assignment, analysis.batch, analysis.prelude, costs)
        return self.shape, piece_costs_on(
            self.shape, assignment, analysis.prelude, clusters, self.tracer, costed_place(layout.attention, layout.cp)
        )


def costed_place(attention: Attention | None, cp: int) -> int:
    """Of the rank along cp that is costed: the one with most to do under a causal mask, a middle one where no way is said."""
    if attention is None:
        return max(0, cp // 2 - 1)
    return 0 if attention == "ring" else cp - 1


def split_twin(
    graph: Graph, counts: Sequence[int], layout: TwinLayout, cluster: Cluster, tracer: Tracer, *, microbatches: int = 1
) -> tuple[Outline, tuple[PieceCost, ...]]:
    """The pieces of a thin graph in one split; see `Twin`."""
    return Twin(graph=graph, counts=counts, tracer=tracer).split(layout, cluster, microbatches)


def experts_over(graph: Graph, ranks: int) -> Graph:
    """The same graph with one of so many equal parts of every layer's experts; rows are as many as before.

    ranks: a divisor of the number of experts. LayoutError where it is none, or where matrices of experts are no parameters by themselves.
    """
    shapes: dict[Value, tuple[int, ...]] = {}
    for op in (each for each in graph.ops if each.target is expert_mm):
        value: Value | None = op.inputs[1]
        while value is not None:
            if value.shape[0] % ranks:
                raise LayoutError(f"ep={ranks} does not divide the {value.shape[0]} experts of {op.module or 'the model'}")
            shapes[value] = (value.shape[0] // ranks, *value.shape[1:])
            made = value.producer
            if made is not None and (len(made.inputs) != 1 or made.inputs[0].shape[0] != value.shape[0]):
                where = op.module or "the model"
                raise LayoutError(f"the experts of {where} are made by {made.name}, and ep divides matrices that are parameters")
            value = made.inputs[0] if made is not None else None
    values = {value: replace(value, shape=shapes.get(value, value.shape)) for value in graph.values()}
    ops = {op: replace(op, args=_sized(op, shapes), inputs=_all(op.inputs, values), outputs=_all(op.outputs, values)) for op in graph.ops}
    for op in ops.values():
        for each in op.outputs:
            each.producer = op
    return replace(
        graph,
        parameters={name: values[value] for name, value in graph.parameters.items()},
        buffers={name: values[value] for name, value in graph.buffers.items()},
        inputs={name: values[value] for name, value in graph.inputs.items()},
        ops=list(ops.values()),
        loss=values[graph.loss],
        updates={name: values[value] for name, value in graph.updates.items()},
        blocks=[[[ops[op] for op in block] for block in run] for run in graph.blocks],
        checks=[replace(check, value=values[check.value]) for check in graph.checks],
    )


def _all(given: Sequence[Value], values: dict[Value, Value]) -> tuple[Value, ...]:
    return tuple(values[value] for value in given)


def _sized(op: Op, shapes: dict[Value, tuple[int, ...]]) -> tuple[object, ...]:
    """Its arguments, with the number of matrices in lists of sizes."""
    if not op.outputs or op.outputs[0] not in shapes:
        return op.args
    before, now = op.outputs[0].shape[0], shapes[op.outputs[0]][0]
    sizes = (list(op.outputs[0].shape), op.outputs[0].shape)
    return tuple([now, *arg[1:]] if isinstance(arg, (list, tuple)) and arg in sizes and arg[0] == before else arg for arg in op.args)


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
