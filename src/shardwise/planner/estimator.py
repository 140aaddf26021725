"""What layouts there are to try, and how long a step takes with each, estimated without lowering it: the split of the operators over the
tensor axis, the stages, and a formula for what lies between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch

from shardwise.capture.graph import Graph, Op, Value
from shardwise.capture.precision import LOW
from shardwise.cluster.model import Cluster
from shardwise.cost.collectives import collective_cost
from shardwise.cost.optimizer import optimizer_seconds
from shardwise.errors import BatchError, LayoutError
from shardwise.planner.apply import Analysis, Applied, assign
from shardwise.planner.estimate import context_work, reshard_seconds, ring_seconds, waiting_share
from shardwise.planner.intra import PREFER_SPLIT, Costs, representatives, split_tensors
from shardwise.planner.layout import Layout, completions
from shardwise.planner.op_costs import OpCosts
from shardwise.planner.plan import Random
from shardwise.planner.shares import batch_shares
from shardwise.planner.stages import StageCosts, cut_stages
from shardwise.planner.trial import Trial, gigabytes
from shardwise.program.build import rank_of
from shardwise.program.lower import Cut
from shardwise.program.tables import placed
from shardwise.program.trace import Tracer
from shardwise.sharding.assignment import Assignment
from shardwise.sharding.context import ATTENTION
from shardwise.sharding.experts import refuse_experts
from shardwise.sharding.types import Shard
from shardwise.simulate.memory import OPTIMIZER_STATES, RUNTIME_BYTES

__all__ = ["FULL_MEMORY", "MOST_ZERO", "Estimator", "data_ranks"]

MOST_ZERO = 3  # optimizer states, gradients and parameters divided
_LAST = 24  # layouts that are tried where nothing else fits
FULL_MEMORY = 0.92  # of a rank's memory that a plan may take; the rest is for the libraries and what is not foreseen


@dataclass(kw_only=True)
class Estimator:
    """Of one model on one cluster. pinned: what is not to be searched; costs: of operators; devices: those of unlike devices."""

    graph: Graph
    cluster: Cluster
    pinned: Layout
    optimizer: str
    random: Random
    analysis: Analysis
    tracer: Tracer
    costs: OpCosts
    devices: dict[int, OpCosts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.first = representatives(self.graph)
        if (self.pinned.cp or 1) > 1:
            _check_sequence(self.analysis, self.pinned)
        if (self.pinned.ep or 1) > 1:
            refuse_experts(self.graph, self.analysis.experts, self.pinned.ep or 1)

    def trials(self) -> list[Trial]:
        """All complete layouts, in the usual schedule where none is pinned. Ranks share sequences where that is pinned, or where each copy
        has one sample and there are more ranks than copies."""
        obstacle, samples = self.analysis.obstacle, self.graph.global_batch
        along = self._attended([layout for layout in self._completed(self._along_sequences(self.pinned)) if layout.dp == samples])
        layouts: list[Layout] = []
        try:
            layouts = self._attended(completions(self.pinned, self.cluster.ranks, samples, obstacle))
        except (BatchError, LayoutError):
            if not along:
                raise
        shared = [] if self.pinned.shares is not None or self.pinned.ep or not self.cluster.unlike else self._shared(layouts, obstacle)
        return [Trial(layout=layout) for layout in (*layouts, *along, *shared)]

    def last_trials(self) -> list[Trial]:
        """A few that are tried where nothing else fits: in microbatches of one sample a copy, also with sequences shared, also with experts
        divided; of these the ones that leave a rank the smallest part of a sample."""
        samples = self.graph.global_batch
        counts = [count for count in range(1, samples + 1) if samples % count == 0]
        thin = [replace(self.pinned, microbatches=count) for count in counts] if self.pinned.microbatches is None else [self.pinned]
        pinned = [each for pins in thin for each in (pins, *self._along_sequences(pins), *self._over_experts(pins))]
        found = [
            layout
            for layout in self._completed(pinned)
            if self.pinned.microbatches is not None or (layout.dp or 1) * (layout.microbatches or 1) == samples
        ]
        thinnest = sorted(found, key=lambda each: -(each.cp or 1) * (each.tp or 1))[:_LAST]
        return [Trial(layout=layout) for layout in self._attended(thinnest)[:_LAST]]

    def _along_sequences(self, pinned: Layout) -> list[Layout]:
        """With ranks that share sequences, where nothing is pinned of that or against it."""
        free = pinned.cp is None and not pinned.ep and not pinned.shares and None in (pinned.dp, pinned.tp, pinned.pp)
        longest = max(_sequences(self.analysis).values(), default=1)
        return [replace(pinned, cp=cp) for cp in range(2, min(longest, self.cluster.ranks) + 1)] if free else []

    def _over_experts(self, pinned: Layout) -> list[Layout]:
        """With experts divided, where nothing is pinned of that or against it."""
        counts = set(self.analysis.experts.counts.values())
        if not counts or pinned.ep is not None or pinned.shares or pinned.shard:
            return []
        return [replace(pinned, ep=ep) for ep in range(2, min(counts) + 1) if not any(count % ep for count in counts)]

    def _completed(self, pinned: Iterable[Layout]) -> list[Layout]:
        """Those complete layouts that there are."""
        found: list[Layout] = []
        for each in pinned:
            with suppress(LayoutError, BatchError):  # it takes more ranks than there are, or leaves no even parts
                found += completions(each, self.cluster.ranks, self.graph.global_batch, self.analysis.obstacle)
        return found

    def _attended(self, layouts: Sequence[Layout]) -> list[Layout]:
        """Each layout with cp in the ways in which its ranks can do attention together."""
        found = []
        for layout in layouts:
            ways = [layout.attention] if layout.attention else ATTENTION if (layout.cp or 1) > 1 else [None]
            found += [replace(layout, attention=way) for way in ways if not self._unshared(layout, way)]
        return found

    def _unshared(self, layout: Layout, attention: str | None) -> str:
        """Why no attention can be shared so; LayoutError where it is pinned."""
        if attention in (None, "gather"):
            return ""
        shared = self.analysis.shared(attention, layout.cp or 1, layout.tp or 1)
        reasons = list(dict.fromkeys(shared.refused.values()))
        why = "" if shared.choices else f"no attention can be so: {'; '.join(reasons) or 'none of the model is along its sequences'}"
        if why and self.pinned.attention:
            raise LayoutError(f"attention={attention} in layout {layout}: {why}; use attention=gather")
        return why

    def _shared(self, layouts: Sequence[Layout], obstacle: str) -> Iterator[Layout]:
        """The layouts whose copies are on unlike devices, with shares of the batch by their speed."""
        samples = self.graph.global_batch
        for dp, cp, tp, pp in dict.fromkeys(layout.mesh for layout in layouts):
            layout = replace(self.pinned, dp=dp, cp=cp, tp=tp, pp=pp)
            copies = [[self._costs_on(self.block(layout, pipe, d)) for d in range(dp)] for pipe in range(pp)]
            each_s = [max(self._total_s(costs) for costs in column) for column in zip(*copies, strict=True)]
            shares = batch_shares([0.0] * dp, each_s, samples)
            if len(set(shares)) > 1:
                shared = Layout.parse(replace(layout, shares=tuple(shares)))
                with suppress(BatchError):  # pinned microbatches that do not divide the shares
                    yield from self._attended(completions(shared, self.cluster.ranks, samples, obstacle))

    def estimate(self, trial: Trial) -> None:
        """Decides the tensor axis and the stages of a layout and estimates its step; where its parameters and their state do not fit, with
        as much of these divided over data ranks as they must be. Nothing is decided where even so no rank would hold its part."""
        given = trial.layout
        limit, least = max(self.limits(given)), self.least_bytes(self.thriftiest(given))
        if least > limit:
            trial.memory_binds, trial.note = True, f"needs {gigabytes(least)} a rank at least, {gigabytes(limit)} may be used"
            return
        most = MOST_ZERO if self.pinned.zero is None and data_ranks(given) > 1 else 0
        for zero in dict.fromkeys((given.zero, *range((given.zero or 0) + 1, most + 1))):
            trial.layout, trial.note = replace(given, zero=zero), ""
            self.estimate_as_it_is(trial)
            if trial.applied or not trial.memory_binds:
                return
        trial.layout = given

    def estimate_as_it_is(self, trial: Trial) -> None:
        """As `estimate`, with nothing divided but what the layout says."""
        layout = trial.layout
        assert layout.dp and layout.tp and layout.pp and layout.microbatches
        zero, shard = layout.zero or 0, layout.shard or 0
        shares = layout.shares or ()
        try:
            sizes = layout.dp, layout.microbatches, layout.tp, layout.cp or 1
            attention = layout.attention or "gather"
            assignment = assign(self.analysis, *sizes, shares, ep=layout.ep or 1, attention=attention, zero=zero, shard=shard)
        except LayoutError as error:
            if self.pinned.shares:
                raise
            trial.note = str(error)
            return
        trial.memory_binds = False
        tensor = split_tensors(assignment, self.analysis.batch, self.analysis.prelude, self._intra_costs(trial, assignment))
        try:
            stage_of = None if tensor is None else self._stages(assignment, layout)
        except LayoutError as error:
            if self.pinned.pp:
                raise
            trial.note = str(error)
            return
        if tensor is None or stage_of is None:
            trial.memory_binds = True
            state = sum(self._state_bytes(value, layout) for value in self.graph.parameters.values())
            held = f"{gigabytes(state)} of parameters, gradients and optimizer state"
            trial.note = f"{held} cannot be spread so that {gigabytes(min(self.limits(layout)))} a rank hold them"
            return
        if layout.tp > 1 and not self.pinned.tp and not any(v["tp"].choice.mode == "split" for v in assignment.variants.values()):
            trial.note = "no operator is worth splitting over tp: every rank would do all of the work"
            return
        trial.gap = tensor.gap
        cut = Cut(
            stage_of=stage_of,
            prelude=frozenset(self.analysis.prelude),
            recompute=layout.recompute or "none",  # type: ignore[arg-type]
            recompute_blocks=layout.recompute_blocks or 0,
        )
        trial.applied = Applied(assignment=assignment, cut=cut)
        trial.estimate_s = self._estimate(assignment, layout, stage_of)

    def promise(self, base: Trial, layout: Layout) -> float:
        """Seconds of a step with another layout of the same mesh and microbatches, estimated from the base's split of the operators;
        infinite where the model cannot be cut so."""
        assert base.applied is not None
        try:
            stage_of = self._stages(base.applied.assignment, layout)
        except LayoutError:
            return float("inf")
        return float("inf") if stage_of is None else self._estimate(base.applied.assignment, layout, stage_of)

    def thriftiest(self, layout: Layout) -> Layout:
        """With all divided and computed again that is not pinned otherwise."""
        zero = MOST_ZERO if self.pinned.zero is None and data_ranks(layout) > 1 else layout.zero
        return replace(layout, zero=zero, recompute="full" if self.pinned.recompute is None else layout.recompute)

    def least_bytes(self, layout: Layout) -> float:
        """What the fullest rank holds at least: parameters, gradients and states as if tp and pp divided all of them evenly, and what a
        process takes beside."""
        states = sum(self._state_bytes(value, layout) for value in self.graph.parameters.values())
        return states / ((layout.tp or 1) * (layout.pp or 1)) + RUNTIME_BYTES

    def limits(self, layout: Layout) -> list[float]:
        """Of a rank at each place of the pipeline."""
        dp, _, _, pp = layout.mesh
        places = [[rank for d in range(dp) for rank in self.block(layout, pipe, d)] for pipe in range(pp)]
        return [self.cluster.seen_by(ranks).memory_bytes * FULL_MEMORY for ranks in places]

    def _share(self, layout: Layout, d: int | None = None) -> float:
        """Of the batch, what a microbatch is of a copy: of the copy with most where none is named."""
        if not layout.shares:
            return 1 / (layout.dp * layout.microbatches)  # type: ignore[operator]
        share = max(layout.shares) if d is None else layout.shares[d]
        return share / sum(layout.shares) / layout.microbatches  # type: ignore[operator]

    # -- unlike devices ----------------------------------------------------------------------------------------------------------------

    def block(self, layout: Layout, pipe: int, d: int) -> range:
        """The ranks at a place of the pipeline of a copy: they compute together and wait for each other in every operator."""
        dp, cp, tp, _ = layout.mesh
        first = rank_of(pipe, d, 0, dp, tp, cp=cp)
        return range(first, first + cp * tp)

    def _costs_on(self, ranks: Iterable[int]) -> OpCosts:
        """What operators take the slowest of the ranks."""
        seen = self.cluster.seen_by(ranks)
        own = self.costs if seen.rates is self.costs.cluster.rates else OpCosts(cluster=seen, tracer=self.tracer)
        return self.devices.setdefault(id(seen.rates), own)

    def _total_s(self, costs: OpCosts) -> float:
        """Of the whole batch on one rank."""
        if costs.total_s is None:
            costs.total_s = sum(costs.of(self.first[op])[0] for op in self.graph.ops)
        return costs.total_s

    def _slowest(self, layout: Layout, pipe: int) -> tuple[float, OpCosts]:
        """(share of the batch, costs) of the copy that takes longest for a microbatch at a place of the pipeline."""
        if not self.cluster.unlike:
            return self._share(layout), self.costs
        copies = [(self._share(layout, d), self._costs_on(self.block(layout, pipe, d))) for d in range(layout.mesh[0])]
        return max(copies, key=lambda each: each[0] * self._total_s(each[1]))

    def whole_s(self, op: Op) -> float:
        """Of an operator on the whole batch."""
        return self.costs.of(self.first[op])[0]

    def _state_bytes(self, value: Value, layout: Layout) -> float:
        """Of a parameter on each of the ranks that share its data axes."""
        ep = self._expert_ranks(value, layout)
        ranks, zero = layout.shard or data_ranks(layout) // ep, layout.zero or 0
        wide = self._master_bytes(value)
        states = OPTIMIZER_STATES.get(self.optimizer, 2) * wide
        kinds = [states, wide, value.nbytes] if value.requires_grad else [0, 0, value.nbytes]
        if wide != value.nbytes and zero == MOST_ZERO:
            kinds[2] = wide  # operators read what is gathered
        elif wide != value.nbytes:
            kinds[0] += wide  # they read a copy of what is updated
        return sum(nbytes / ranks if zero >= level else nbytes for level, nbytes in enumerate(kinds, start=1)) / ep

    def _master_bytes(self, value: Value) -> int:
        """Of a parameter as it is updated, and of its gradient."""
        master = self.graph.master if value.requires_grad and value.dtype in LOW else None
        return value.nbytes // value.dtype.itemsize * (master or value.dtype).itemsize

    def _expert_ranks(self, value: Value, layout: Layout) -> int:
        """Over how many data ranks a parameter is split because it is of experts."""
        return layout.ep if layout.ep and value in self.analysis.experts.parameters else 1

    def _update_s(self, nbytes: float) -> float:
        return optimizer_seconds(int(nbytes) // 4, torch.float32, self.optimizer, self.cluster)

    def _intra_costs(self, trial: Trial, assignment: Assignment) -> Costs:
        layout, share = trial.layout, self._share(trial.layout)
        return Costs(
            operator=lambda op: self.whole_s(op) * share * _split_share(assignment, op, "cp"),
            heavy=lambda op: self.costs.of(op)[1],
            collective=lambda kind, message, ranks: collective_cost(kind, message, ranks, self.cluster).seconds,
            update=self._update_s,
            state_bytes=lambda value: self._state_bytes(value, layout),
            limit_bytes=sum(self.limits(layout)),
            prefer_split=PREFER_SPLIT if self.pinned.tp or trial.lean else 0.0,
        )

    def _stages(self, assignment: Assignment, layout: Layout) -> dict[Op, int] | None:
        body = [op for op in self.graph.ops if op not in self.analysis.prelude]
        assert layout.pp and layout.dp and layout.microbatches
        sent = self._share(layout) / (layout.cp or 1)
        apart = data_ranks(layout) * (layout.tp or 1)  # ranks between neighbouring stages
        home, of_rank = placed(layout.tables), self.limits(layout)
        limits = [of_rank[home[stage]] for stage in range(layout.stages)]
        slowest = [self._slowest(layout, home[stage]) for stage in range(layout.stages)]

        def seconds(op: Op, stage: int) -> float:
            share, each = slowest[stage]
            return each.of(self.first[op])[0] * share * _own_share(assignment, op)

        costs = StageCosts(
            seconds=seconds,
            transfer=lambda nbytes: collective_cost("send_recv", nbytes * sent, 2, self.cluster, apart).seconds if nbytes else 0.0,
            state_bytes=lambda value: self._state_bytes(value, layout) * self._kept_share(assignment, value),
            limit_bytes=limits,
        )
        together = self.analysis.experts.together if layout.ep else None
        stages = [0] * len(body) if layout.stages == 1 else cut_stages(self.graph, self.analysis.prelude, layout.stages, costs, together)
        if layout.stages == 1 and sum(map(costs.state_bytes, self.graph.parameters.values())) > limits[0]:
            return None
        return None if stages is None else dict(zip(body, stages, strict=True))

    def _kept_share(self, assignment: Assignment, value: Value) -> float:
        return 1 / assignment.mesh["tp"] if isinstance(assignment.sources[value]["tp"], Shard) else 1.0

    def _estimate(self, assignment: Assignment, layout: Layout, stage_of: dict[Op, int]) -> float:
        """Slowest rank × (microbatches + what it waits for), gradients' reductions, the update; cores shared where there are fewer."""
        assert layout.pp and layout.microbatches and layout.dp and layout.tp
        home = placed(layout.tables)
        rank_s = [0.0] * layout.pp
        again = 4 / 3 if layout.recompute == "full" else 1.0  # of a forward and a backward pass of twice its length
        slowest = [self._slowest(layout, pipe) for pipe in range(layout.pp)]
        for op, stage in stage_of.items():
            share, costs = slowest[home[stage]]
            rank_s[home[stage]] += costs.of(self.first[op])[0] * share * _own_share(assignment, op) * again
        talk_s = self._talk_s(assignment, layout) / layout.pp
        crowd = max(1.0, layout.ranks / self.cluster.cores) if self.cluster.cores else 1.0
        slots = layout.microbatches + (layout.pp - 1) * _waiting(layout)
        work = crowd * (sum(rank_s) / layout.pp * layout.microbatches) if crowd > 1 else max(rank_s) * slots
        if crowd > 1 and self.cluster.network is not None:
            work = self._on_nodes_s(layout, rank_s, self.cluster.network.node_ranks)
        held = (
            self._master_bytes(value) * self._kept_share(assignment, value) / self._expert_ranks(value, layout)
            for value in self.graph.parameters.values()
        )
        kept = sum(held) / layout.pp
        updated = kept / (layout.shard or data_ranks(layout)) if layout.zero else kept
        sums_s = self._data_s(layout, kept) + self._tied_s(assignment, layout, stage_of)
        return work + talk_s * layout.microbatches + sums_s + crowd * self._update_s(updated)

    def _on_nodes_s(self, layout: Layout, rank_s: Sequence[float], node_ranks: int) -> float:
        """Computing of a step where a node's ranks share its cores: its stages take turns, and the nodes are a pipeline.

        rank_s: of a microbatch, for each place of the pipeline.
        """
        assert layout.pp and layout.microbatches and self.cluster.cores
        stage_ranks = layout.ranks // layout.pp
        places, cores = max(1, node_ranks // stage_ranks), self.cluster.cores * node_ranks / self.cluster.ranks
        in_node = [sum(rank_s[first : first + places]) for first in range(0, layout.pp, places)]
        return max(in_node) * min(stage_ranks, node_ranks) / cores * (layout.microbatches + (len(in_node) - 1) * _waiting(layout))

    def _data_s(self, layout: Layout, kept: float) -> float:
        """Reducing gradients and gathering parameters of so many bytes over the data ranks, in a step."""
        data, count, zero, stride = data_ranks(layout), layout.microbatches or 1, layout.zero or 0, layout.tp or 1
        if not zero:
            return collective_cost("all_reduce", kept, data, self.cluster, stride).seconds
        ranks = layout.shard or data
        scatter = collective_cost("reduce_scatter", kept, ranks, self.cluster, stride).seconds * (1 if zero == 1 else count)
        gather = collective_cost("all_gather", kept, ranks, self.cluster, stride).seconds * (2 * count if zero == MOST_ZERO else 1)
        return scatter + gather + collective_cost("all_reduce", kept / ranks, data // ranks, self.cluster, stride * ranks).seconds

    def _tied_s(self, assignment: Assignment, layout: Layout, stage_of: Mapping[Op, int]) -> float:
        """Summing, at a step's end, the gradients of weights that several ranks of the pipeline have because stages of theirs read them."""
        home, places = placed(layout.tables), dict[Value, set[int]]()
        for op, stage in stage_of.items():
            for value in op.inputs:
                if value.kind == "parameter" and value.requires_grad:
                    places.setdefault(value, set()).add(home[stage])
        apart, total = data_ranks(layout) * (layout.tp or 1), 0.0
        for value, found in places.items():
            held = self._master_bytes(value) * self._kept_share(assignment, value)
            far = (max(found) - min(found)) // max(len(found) - 1, 1)
            total += collective_cost("all_reduce", held, len(found), self.cluster, apart * far).seconds
        return total

    def _talk_s(self, assignment: Assignment, layout: Layout) -> float:
        """In one microbatch, over the expert, the context and the tensor axis."""
        share, ep = self._share(layout), layout.ep or 1
        around_s = ring_seconds(assignment, share, lambda op: self.whole_s(op) * share * _own_share(assignment, op), self.cluster)
        inside = around_s + sum(reshard_seconds(assignment, axis, share, self.cluster) for axis in ("cp", "tp"))
        return inside + (reshard_seconds(assignment, "ep", share * ep, self.cluster) if ep > 1 else 0.0)


def data_ranks(layout: Layout) -> int:
    """Ranks that compute the same parameters' gradients on other parts of the batch."""
    return (layout.dp or 1) * (layout.cp or 1)


def _waiting(layout: Layout) -> float:
    return waiting_share(layout.schedule or "", layout.chunks or 1)


def _sequences(analysis: Analysis) -> dict[str, int]:
    """Input → elements of its sequences."""
    return {name: analysis.graph.inputs[name].shape[dim] for name, dim in analysis.sequence_dims.items()}


def _check_sequence(analysis: Analysis, pinned: Layout) -> None:
    sizes = _sequences(analysis)
    if max(sizes.values(), default=0) < (pinned.cp or 1):
        shapes = ", ".join(f"{name} {list(analysis.graph.inputs[name].shape)}" for name in analysis.graph.batch_dims)
        longest = max(sizes.values(), default=1)
        what = f"the longest has {longest} elements" if sizes else "no input of the batch has one"
        raise LayoutError(
            f"cp={pinned.cp} splits the sequence, but {what} ({shapes}); use cp={longest}{' or less' if sizes else ''}, or say which dim "
            "is one with sequence_dims={input: dim}"
        )


def _own_share(assignment: Assignment, op: Op) -> float:
    """What a rank of the context and the tensor axis does of an operator, the one that does most."""
    return _split_share(assignment, op, "cp") * _split_share(assignment, op, "tp") * context_work(assignment, op)


def _split_share(assignment: Assignment, op: Op, axis: str) -> float:
    return 1 / assignment.mesh[axis] if assignment.variants[op][axis].choice.mode == "split" else 1.0
