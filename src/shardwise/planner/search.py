"""Chooses a plan: every layout is estimated, the best few are lowered and simulated, the fastest that fits is taken and explained.

Layouts ──intra, stages, estimate──▶ ranking ──lower, simulate──▶ the best few ──▶ Plan | Infeasible
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace

import torch

from shardwise.capture.graph import Graph, Op, Value, call
from shardwise.capture.precision import LOW
from shardwise.cluster.model import Cluster
from shardwise.cost.collectives import collective_cost, fastest, step_of
from shardwise.cost.compute import op_flops, op_seconds
from shardwise.cost.optimizer import optimizer_seconds
from shardwise.errors import BatchError, LayoutError
from shardwise.planner.apply import Analysis, Applied, analyse, assign
from shardwise.planner.estimate import context_work, reshard_seconds, ring_seconds
from shardwise.planner.garbage import young_garbage_alone
from shardwise.planner.intra import Costs, representatives, split_tensors
from shardwise.planner.layout import Layout, completions
from shardwise.planner.plan import Candidate, Chooser, Infeasible, Plan, Prediction, Random, by_pattern, choice_text
from shardwise.planner.shares import batch_shares
from shardwise.planner.stages import StageCosts, cut_stages
from shardwise.program.build import build_programs, rank_of
from shardwise.program.lower import Cut
from shardwise.program.recompute import RECOMPUTE
from shardwise.program.tables import placed
from shardwise.program.trace import Tracer
from shardwise.sharding.assignment import Assignment
from shardwise.sharding.context import ATTENTION
from shardwise.sharding.data import microbatch_obstacle
from shardwise.sharding.experts import refuse_experts
from shardwise.sharding.types import Shard
from shardwise.simulate.costs import OPTIMIZER_STATES, memory_use
from shardwise.simulate.profile import Profile, computing_ranks, profile_programs
from shardwise.simulate.simulator import Mesh, Simulation, simulate_profile

__all__ = ["FULL_MEMORY", "PREFER_SPLIT", "make_plan", "search"]

_MESHES, _NEIGHBOURS = 3, 1  # layouts that are lowered and simulated: of unlike meshes, and beside the best
_HOPELESS = 1.25  # times the best: an estimate is not further off than that
_THIN = 4  # layouts that are tried to say how much memory would do
PREFER_SPLIT = 100.0  # times what it takes: a matrix product or parameter that stays whole, where all is to be split that can be
_THRIFTS = 5  # layouts that divide or compute again more, tried where one does not fit
_MOST_ZERO = 3  # optimizer states, gradients and parameters divided
FULL_MEMORY = 0.92  # of a rank's memory that a plan may take; the rest is for the libraries and what is not foreseen


def _choices(cluster: Cluster, layout: Layout) -> dict[str, list[tuple[float, str]]]:
    """For the groups that a layout has."""
    dp, cp, tp, _ = layout.mesh
    ep = layout.ep or 1
    groups = {layout.shard, dp * cp // layout.shard} if layout.shard else set()
    groups |= {ep, dp // ep, dp // ep * cp} if ep > 1 else set()
    return measured_choices(cluster, {dp, cp, dp * cp, tp, 2} | groups if layout.ranks > 1 else set())


def measured_choices(cluster: Cluster, sizes: set[int]) -> dict[str, list[tuple[float, str]]]:
    """For each kind of collective and group size, which implementation is fastest up to how many bytes."""
    tables: dict[str, list[tuple[float, str]]] = {}
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
        for ranks in sorted(sizes - {1}):
            table: list[tuple[float, str]] = []
            for power in range(step_of(0), step_of(float("inf")) + 1):
                impl = fastest(kind, 2.0**power, ranks, cluster)
                table = [*(table[:-1] if table and table[-1][1] == impl else table), (2.0**power, impl)]
            tables[f"{kind}/{ranks}"] = [*table[:-1], (1e18, table[-1][1])]
    return tables


@dataclass(kw_only=True)
class OpCosts:
    """Seconds of each operator of the graph on the whole batch, forward and backward, from its own traces; equal calls are traced once."""

    cluster: Cluster
    tracer: Tracer
    known: dict[Op, tuple[float, bool]] = field(default_factory=dict)
    total_s: float | None = None  # of all operators, once somebody has asked

    def of(self, op: Op) -> tuple[float, bool]:
        """(seconds, whether it multiplies matrices)."""
        if op not in self.known:
            tensors = [self.tracer.tensor(value.shape, value.dtype) for value in op.inputs]
            grads = [op.requires_grad and value.requires_grad for value in op.inputs]
            key = (op.name, repr((op.args, op.kwargs)))
            if any(grads):
                cotangents = [self.tracer.tensor(v.shape, v.dtype) if v.requires_grad else None for v in op.outputs]
                traced = self.tracer.joint(lambda t: call(op, list(t)), key, tensors, grads, cotangents)
            else:
                traced = self.tracer.forward(lambda t: call(op, list(t)), key, tensors, grads)
            self.known[op] = self._sum(traced.graph)
        return self.known[op]

    def _sum(self, graph: torch.fx.Graph) -> tuple[float, bool]:
        seconds, flops = 0.0, 0.0
        for node in graph.nodes:
            if node.op == "call_function":
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
                seconds += op_seconds(node.target, args, kwargs, node.meta.get("val"), self.cluster)
                flops += op_flops(node.target, args, kwargs, node.meta.get("val"))
        return seconds, flops > 0


@dataclass(kw_only=True)
class _Trial:
    """A complete layout on the way to a plan. lean: whether everything is split that can be, since memory binds; memory_binds: whether even
    so parameters, gradients and states do not fit."""

    layout: Layout
    applied: Applied | None = None
    gap: float = 0.0
    estimate_s: float = float("inf")
    profile: Profile | None = None
    simulation: Simulation | None = None
    note: str = ""
    lean: bool = False
    memory_binds: bool = False

    @property
    def mesh(self) -> Mesh:
        """The layout's sizes, as the simulator takes them: ranks along cp do alike, as those along dp."""
        layout = self.layout
        assert layout.dp and layout.tp and layout.pp and layout.microbatches and layout.schedule, f"{layout} is not complete"
        data = layout.dp * (layout.cp or 1)
        return Mesh(
            dp=data, tp=layout.tp, pp=layout.pp, chunks=layout.chunks or 1, microbatches=layout.microbatches, schedule=layout.schedule
        )

    def become(self, other: _Trial) -> None:
        """Goes on as another trial."""
        for each in fields(self):
            setattr(self, each.name, getattr(other, each.name))

    @property
    def simulated_s(self) -> float:
        return self.simulation.step_time_s if self.simulation else float("inf")

    def candidate(self) -> Candidate:
        simulation = self.simulation
        return Candidate(
            layout=str(self.layout),
            estimate_s=self.estimate_s if self.applied else None,
            step_time_s=simulation.step_time_s if simulation else None,
            memory_bytes=max(simulation.memory_bytes) if simulation else None,
            note=self.note,
        )


@dataclass(kw_only=True)
class _Search:
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

    def trials(self) -> list[_Trial]:
        obstacle = microbatch_obstacle(self.graph, self.analysis.signatures, self.analysis.batch, self.analysis.prelude)
        self.obstacle = obstacle
        layouts = self._attended(completions(self.pinned, self.cluster.ranks, self.graph.global_batch, obstacle))
        shared = [] if self.pinned.shares is not None or self.pinned.ep or not self.cluster.unlike else self._shared(layouts, obstacle)
        return [_Trial(layout=layout) for layout in (*layouts, *shared)]

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
            copies = [[self._costs_on(self._block(layout, pipe, d)) for d in range(dp)] for pipe in range(pp)]
            each_s = [max(self._total_s(costs) for costs in column) for column in zip(*copies, strict=True)]
            shares = batch_shares([0.0] * dp, each_s, samples)
            if len(set(shares)) > 1:
                shared = Layout.parse(replace(layout, shares=tuple(shares)))
                with suppress(BatchError):  # pinned microbatches that do not divide the shares
                    yield from self._attended(completions(shared, self.cluster.ranks, samples, obstacle))

    def estimate(self, trial: _Trial) -> None:
        """Decides the tensor axis and the stages of a layout and estimates its step; where its parameters and their state do not fit, with
        as much of these divided over data ranks as they must be."""
        given = trial.layout
        most = _MOST_ZERO if self.pinned.zero is None and _data(given) > 1 else 0
        for zero in dict.fromkeys((given.zero, *range((given.zero or 0) + 1, most + 1))):
            trial.layout, trial.note = replace(given, zero=zero), ""
            self._estimated(trial)
            if trial.applied or not trial.memory_binds:
                return
        trial.layout = given

    def _estimated(self, trial: _Trial) -> None:
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
            held = f"{_gb(state)} of parameters, gradients and optimizer state"
            trial.note = f"{held} cannot be spread so that {_gb(min(self._limits(layout)))} a rank hold them"
            return
        if layout.tp > 1 and not self.pinned.tp and not any(v["tp"].choice.mode == "split" for v in assignment.variants.values()):
            trial.note = "no operator is worth splitting over tp: every rank would do all of the work"
            return
        trial.gap = tensor.gap
        cut = Cut(stage_of=stage_of, prelude=frozenset(self.analysis.prelude), recompute=layout.recompute or "none")  # type: ignore[arg-type]
        trial.applied = Applied(assignment=assignment, cut=cut)
        trial.estimate_s = self._estimate(assignment, layout, stage_of)

    def _limits(self, layout: Layout) -> list[float]:
        """Of a rank at each place of the pipeline."""
        dp, _, _, pp = layout.mesh
        places = [[rank for d in range(dp) for rank in self._block(layout, pipe, d)] for pipe in range(pp)]
        return [self.cluster.seen_by(ranks).memory_bytes * FULL_MEMORY for ranks in places]

    def _share(self, layout: Layout, d: int | None = None) -> float:
        """Of the batch, what a microbatch is of a copy: of the copy with most where none is named."""
        if not layout.shares:
            return 1 / (layout.dp * layout.microbatches)  # type: ignore[operator]
        share = max(layout.shares) if d is None else layout.shares[d]
        return share / sum(layout.shares) / layout.microbatches  # type: ignore[operator]

    # -- unlike devices ----------------------------------------------------------------------------------------------------------------

    def _block(self, layout: Layout, pipe: int, d: int) -> range:
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
        copies = [(self._share(layout, d), self._costs_on(self._block(layout, pipe, d))) for d in range(layout.mesh[0])]
        return max(copies, key=lambda each: each[0] * self._total_s(each[1]))

    def _whole_s(self, op: Op) -> float:
        return self.costs.of(self.first[op])[0]

    def _state_bytes(self, value: Value, layout: Layout) -> float:
        """Of a parameter on each of the ranks that share its data axes."""
        ep = self._expert_ranks(value, layout)
        ranks, zero = layout.shard or _data(layout) // ep, layout.zero or 0
        wide = self._master_bytes(value)
        states = OPTIMIZER_STATES.get(self.optimizer, 2) * wide
        kinds = [states, wide, value.nbytes] if value.requires_grad else [0, 0, value.nbytes]
        if wide != value.nbytes and zero == _MOST_ZERO:
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

    def _intra_costs(self, trial: _Trial, assignment: Assignment) -> Costs:
        layout, share = trial.layout, self._share(trial.layout)
        return Costs(
            operator=lambda op: self._whole_s(op) * share * _split_share(assignment, op, "cp"),
            heavy=lambda op: self.costs.of(op)[1],
            collective=lambda kind, message, ranks: collective_cost(kind, message, ranks, self.cluster).seconds,
            update=self._update_s,
            state_bytes=lambda value: self._state_bytes(value, layout),
            limit_bytes=sum(self._limits(layout)),
            prefer_split=PREFER_SPLIT if self.pinned.tp or trial.lean else 0.0,
        )

    def _stages(self, assignment: Assignment, layout: Layout) -> dict[Op, int] | None:
        body = [op for op in self.graph.ops if op not in self.analysis.prelude]
        assert layout.pp and layout.dp and layout.microbatches
        sent = self._share(layout) / (layout.cp or 1)
        apart = _data(layout) * (layout.tp or 1)  # ranks between neighbouring stages
        home, of_rank = placed(layout.tables), self._limits(layout)
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
        """Slowest rank × (microbatches + (pp − 1) / chunks), the gradients' reduction, the update; cores shared where there are fewer."""
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
        slots = layout.microbatches + (layout.pp - 1) / (layout.chunks or 1)
        work = crowd * (sum(rank_s) / layout.pp * layout.microbatches) if crowd > 1 else max(rank_s) * slots
        if crowd > 1 and self.cluster.network is not None:
            work = self._on_nodes_s(layout, rank_s, self.cluster.network.node_ranks)
        held = (
            self._master_bytes(value) * self._kept_share(assignment, value) / self._expert_ranks(value, layout)
            for value in self.graph.parameters.values()
        )
        kept = sum(held) / layout.pp
        updated = kept / (layout.shard or _data(layout)) if layout.zero else kept
        return work + talk_s * layout.microbatches + self._data_s(layout, kept) + crowd * self._update_s(updated)

    def _on_nodes_s(self, layout: Layout, rank_s: Sequence[float], node_ranks: int) -> float:
        """Computing of a step where a node's ranks share its cores: its stages take turns, and the nodes are a pipeline.

        rank_s: of a microbatch, for each place of the pipeline.
        """
        assert layout.pp and layout.microbatches and self.cluster.cores
        stage_ranks = layout.ranks // layout.pp
        places, cores = max(1, node_ranks // stage_ranks), self.cluster.cores * node_ranks / self.cluster.ranks
        in_node = [sum(rank_s[first : first + places]) for first in range(0, layout.pp, places)]
        return max(in_node) * min(stage_ranks, node_ranks) / cores * (layout.microbatches + len(in_node) - 1)

    def _data_s(self, layout: Layout, kept: float) -> float:
        """Reducing gradients and gathering parameters of so many bytes over the data ranks, in a step."""
        data, count, zero, stride = _data(layout), layout.microbatches or 1, layout.zero or 0, layout.tp or 1
        if not zero:
            return collective_cost("all_reduce", kept, data, self.cluster, stride).seconds
        ranks = layout.shard or data
        scatter = collective_cost("reduce_scatter", kept, ranks, self.cluster, stride).seconds * (1 if zero == 1 else count)
        gather = collective_cost("all_gather", kept, ranks, self.cluster, stride).seconds * (2 * count if zero == _MOST_ZERO else 1)
        return scatter + gather + collective_cost("all_reduce", kept / ranks, data // ranks, self.cluster, stride * ranks).seconds

    def _talk_s(self, assignment: Assignment, layout: Layout) -> float:
        """In one microbatch, over the expert, the context and the tensor axis."""
        share, ep = self._share(layout), layout.ep or 1
        around_s = ring_seconds(assignment, share, lambda op: self._whole_s(op) * share * _own_share(assignment, op), self.cluster)
        inside = around_s + sum(reshard_seconds(assignment, axis, share, self.cluster) for axis in ("cp", "tp"))
        return inside + (reshard_seconds(assignment, "ep", share * ep, self.cluster) if ep > 1 else 0.0)

    def simulate(self, trial: _Trial) -> None:
        """Lowers a layout and simulates it; where it does not fit, once more with everything split that can be, then with more divided over
        data ranks and more computed again."""
        self._simulate(trial)
        if trial.note and trial.layout.tp != 1 and not (trial.lean or self.pinned.tp):
            trial.lean, trial.note = True, ""
            self.estimate(trial)
            self._simulate(trial)
        for thrifty in self._thriftier(trial) if trial.note else ():
            other = _Trial(layout=thrifty, lean=trial.lean)
            self._estimated(other)
            if other.applied:
                self._simulate(other)
            if not other.note:
                trial.become(other)
                return

    def thriftiest(self, layout: Layout) -> Layout:
        """With all divided and computed again that is not pinned otherwise."""
        zero = _MOST_ZERO if self.pinned.zero is None and _data(layout) > 1 else layout.zero
        return replace(layout, zero=zero, recompute="full" if self.pinned.recompute is None else layout.recompute)

    def _thriftier(self, trial: _Trial) -> list[Layout]:
        """Layouts that differ in what is divided and computed again alone and may fit, those that cost least first."""
        assert trial.simulation is not None
        layout, ranks = trial.layout, trial.layout.shard or _data(trial.layout)
        peak = max(trial.simulation.memory, key=lambda use: sum(use.values()))
        zeros = range(layout.zero or 0, _MOST_ZERO + 1) if self.pinned.zero is None and ranks > 1 else [layout.zero or 0]
        kinds = RECOMPUTE if self.pinned.recompute is None else [layout.recompute or "none"]
        found = []
        for recompute in kinds:
            for zero in zeros:
                thrifty = replace(layout, zero=zero or None, recompute=None if recompute == "none" else recompute)
                divided = ("optimizer", "gradients", "parameters")[layout.zero or 0 : zero]
                saved = sum(peak[kind] for kind in divided) * (1 - 1 / ranks) + (peak["saved"] if recompute != "none" else 0)
                if thrifty != layout and sum(peak.values()) - saved <= min(self._limits(layout)):
                    found.append(thrifty)
        return found if len(found) <= _THRIFTS else [*found[: _THRIFTS - 1], found[-1]]

    def _simulate(self, trial: _Trial) -> None:
        assert trial.applied is not None
        mesh, applied, tables = trial.mesh, trial.applied, trial.layout.tables
        (dp, cp, tp, pp), last = trial.layout.mesh, (trial.layout.cp or 1) - 1
        # at each place of the pipeline, of each sort of copy, the rank with the largest parts, and the one whose queries have the most keys
        # before them
        ranks = {rank_of(pipe, d, 0, dp, tp, c=c, cp=cp) for pipe in range(pp) for d in self._sorts(trial.layout, pipe) for c in (0, last)}
        programs = build_programs(
            applied.assignment,
            applied.cut,
            tables,
            Chooser.of(_choices(self.cluster, trial.layout)),
            device=torch.device("cpu"),
            ranks=ranks,
            tracer=self.tracer,
        )
        trial.profile = profile_programs(programs, self.cluster, self.optimizer)
        trial.simulation = simulate_profile(trial.profile, mesh, tables)
        for program in programs.values():
            peak, have = memory_use(program, self.optimizer).total, self.cluster.seen_by(computing_ranks(program)).memory_bytes
            if peak > have * FULL_MEMORY:
                trial.note = f"needs {_gb(peak)} a rank, {_gb(have * FULL_MEMORY)} of {_gb(have)} may be used"

    def _sorts(self, layout: Layout, pipe: int) -> list[int]:
        """The first copy of each share and device."""
        found: dict[object, int] = {}
        for d in range(layout.mesh[0]):
            seen = self.cluster.seen_by(self._block(layout, pipe, d))
            found.setdefault((id(seen.rates), seen.memory_bytes, layout.shares and layout.shares[d]), d)
        return list(found.values())


def _data(layout: Layout) -> int:
    """Ranks that compute the same parameters' gradients on other parts of the batch."""
    return (layout.dp or 1) * (layout.cp or 1)


def _check_sequence(analysis: Analysis, pinned: Layout) -> None:
    sizes = {name: analysis.graph.inputs[name].shape[dim] for name, dim in analysis.sequence_dims.items()}
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


def search(
    graph: Graph,
    cluster: Cluster,
    pinned: Layout,
    optimizer: str,
    model: str,
    *,
    random: Random = "keyed",
    tracer: Tracer | None = None,
    sequence_dims: Mapping[str, int | None] | None = None,
) -> Plan | Infeasible:
    """The best plan for the graph on the cluster.

    random: as of `Plan`; tracer: one that has traced calls of this model before; sequence_dims: batch input → the dim that cp splits.
    """
    if sequence_dims and (pinned.cp or 1) == 1:
        raise LayoutError('sequence_dims says what cp splits, but cp is 1: pin it (layout="cp=2") or leave sequence_dims out')
    start, tracer = time.perf_counter(), tracer or Tracer(device=torch.device("cpu"))
    with young_garbage_alone():
        run = _Search(
            graph=graph,
            cluster=cluster,
            pinned=pinned,
            optimizer=optimizer,
            random=random,
            analysis=analyse(graph, random, sequence_dims),
            tracer=tracer,
            costs=OpCosts(cluster=cluster, tracer=tracer),
        )
        return _search(run, model, start)


def _search(run: _Search, model: str, start: float) -> Plan | Infeasible:
    trials = run.trials()
    for trial in trials:
        run.estimate(trial)
    ranked = sorted((trial for trial in trials if trial.applied), key=lambda trial: trial.estimate_s)
    best = _simulate_best(run, ranked)
    if best is None:
        return _infeasible(run, trials)
    return make_plan(run, best, trials, time.perf_counter() - start, model)


def _simulate_best(run: _Search, ranked: list[_Trial]) -> _Trial | None:
    """Simulates the best of each mesh in the order of the estimates, then the winner's other numbers of microbatches, while they may be
    better."""
    seen: list[_Trial] = []

    def look_at(trials: Iterable[_Trial], most: int) -> None:
        for trial in trials:
            fitting = [each for each in seen if not each.note]
            best_s = min((each.simulated_s for each in fitting), default=float("inf"))
            if len(fitting) >= most or trial.estimate_s > _HOPELESS * best_s:
                return
            if trial.simulation is None:
                run.simulate(trial)
                seen.append(trial)

    look_at(_first_of_each(ranked), _MESHES)
    if fitting := [trial for trial in seen if not trial.note]:
        best = min(fitting, key=lambda trial: trial.simulated_s)
        look_at([trial for trial in ranked if trial.layout.mesh == best.layout.mesh], len(fitting) + _NEIGHBOURS)
    else:
        look_at(ranked, 1)
    return min((trial for trial in seen if not trial.note), key=lambda trial: trial.simulated_s, default=None)


def _first_of_each(ranked: list[_Trial]) -> list[_Trial]:
    found: dict[tuple[int, ...], _Trial] = {}
    for trial in ranked:
        found.setdefault(trial.layout.mesh, trial)
    return list(found.values())


def _infeasible(run: _Search, trials: list[_Trial]) -> Infeasible:
    reasons = [f"{trial.layout}: {trial.note}" for trial in trials if trial.note]
    have, need = run.cluster.memory_bytes, _least_bytes(run, trials) / FULL_MEMORY
    more = max(run.cluster.ranks + 1, -(-int(run.cluster.ranks * need) // have))
    remedy = f"ranks with {_gb(need)} of memory instead of {_gb(have)}, or about {more} ranks, or a smaller global batch"
    return Infeasible(reasons=reasons[:8], remedy=remedy)


def _least_bytes(run: _Search, trials: list[_Trial]) -> float:
    """What a rank needs in the layouts that spread the model most thinly, found with memory enough."""
    roomy = replace(run, cluster=run.cluster.with_memory(1 << 62))
    thin = sorted(trials, key=lambda trial: (trial.mesh.dp, -trial.mesh.microbatches))
    again = [_Trial(layout=run.thriftiest(trial.layout), lean=True) for trial in _first_of_each(thin)[:_THIN]]
    for trial in again:
        roomy.estimate(trial)
        if trial.applied:
            roomy.simulate(trial)
    return min(max(trial.simulation.memory_bytes) for trial in again if trial.simulation)


def make_plan(run: _Search, best: _Trial, trials: list[_Trial], seconds: float, model: str) -> Plan:
    """The trial as a Plan, explained."""
    from shardwise.planner.explain import explain

    assert best.applied and best.simulation and best.profile
    assignment, cut, mesh = best.applied.assignment, best.applied.cut, best.mesh
    body = [op for op in run.graph.ops if op not in cut.prelude]
    starts = [next(op.key for op in body if cut.stage_of[op] == stage) for stage in range(cut.stages)]
    operators = by_pattern((op.key, choice_text(assignment.variants[op]["tp"].choice)) for op in body) if mesh.tp != 1 else {}
    parameters = (
        by_pattern((name, repr(assignment.sources[value]["tp"])) for name, value in run.graph.parameters.items()) if mesh.tp != 1 else {}
    )
    simulation = best.simulation
    limits = [device.memory_bytes for device in run.cluster.devices[: best.layout.ranks]] if run.cluster.unlike else []
    predicted = Prediction(
        step_time_s=simulation.step_time_s,
        memory_bytes=simulation.memory_bytes,
        by_kind=simulation.memory,
        bubble=simulation.bubble,
        communication_s=simulation.communication_s,
        limit_bytes=max(limits, default=run.cluster.memory_bytes),
        limits=limits,
    )
    plan = Plan(
        model=model,
        fingerprint=run.graph.fingerprint(),
        cluster=run.cluster.name,
        backend=run.cluster.backend,
        ranks=best.layout.ranks,
        dp=best.layout.dp or 1,
        cp=best.layout.cp or 1,
        ep=best.layout.ep or 1,
        tp=mesh.tp,
        pp=mesh.pp,
        microbatches=mesh.microbatches,
        chunks=mesh.chunks,
        schedule=mesh.schedule,
        table=best.layout.table.splitlines(),
        global_batch=run.graph.global_batch,
        optimizer=run.optimizer,
        random=run.random,
        precision=run.graph.precision,
        zero=best.layout.zero or 0,  # type: ignore[arg-type]
        shard=best.layout.shard or 0,
        recompute=best.layout.recompute or "none",  # type: ignore[arg-type]
        sequence_dims=run.analysis.sequence_dims if (best.layout.cp or 1) > 1 else {},
        attention=best.layout.attention or "gather",  # type: ignore[arg-type]
        shares=list(best.layout.shares or ()),
        stages=starts,
        operators=operators,
        collectives=_choices(run.cluster, best.layout),
        parameters=parameters,
        profile=best.profile,
        predicted=predicted,
        gap=best.gap,
        considered=[trial.candidate() for trial in sorted(trials, key=lambda t: t.estimate_s)],
    )
    return plan.model_copy(update={"explanation": explain(plan, best.applied, run.graph, run.cluster, run.obstacle, seconds, run._whole_s)})


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.3g} GB"
