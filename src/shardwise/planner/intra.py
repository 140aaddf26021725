"""Chooses how every operator is split over the tensor axis: an integer linear program.

    minimise    Σ_op Σ_k  x[op,k] · seconds(op,k)                                     (compute, `_operators`)
              + Σ_param Σ_t y[param,t] · seconds(param,t)                             (pending gradients, update; `_parameters`)
              + Σ_value Σ_(a,w) z[value,a,w] · reshard(value,a→w)                     (communication, `_edges`)
    such that   Σ_k x[op,k] = 1, Σ_t y[param,t] = 1                                   every operator and parameter has one choice
                Σ_w f[edge,a,w] = made in type a,  Σ_a f[edge,a,w] = read in type w   f is the joint choice of an edge's two ends
                z[value,a,w] ≥ f[edge,a,w] for all edges of the value                 one reshard serves all readers of a type
                f[edge,a,w] = 0 where reshard(value,a→w) is infinite                  it may not be
                Σ_param Σ_t y[param,t] · bytes(param,t) ≤ limit                       (`_memory`)

x and y are integers; f and z need not be: with the flow form of f the relaxation comes out integral nearly always. Equal blocks share their
variables, so the size does not grow with depth.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace
from math import inf

from shardwise.capture.graph import Graph, Op, Value
from shardwise.planner.candidates import candidates
from shardwise.planner.ilp import Problem, Solution
from shardwise.planner.tables import table_owners
from shardwise.sharding.assignment import Assignment, set_choice
from shardwise.sharding.reshard import collective_of, dual
from shardwise.sharding.signature import Choice, Variant
from shardwise.sharding.types import I, P, Placement, R, Shard

__all__ = ["PREFER_SPLIT", "Costs", "Tensor", "split_tensors", "whole_on_one_rank"]

PREFER_SPLIT = 100.0
_MEMORY_S = 1e-3 / 1e9  # seconds that a byte kept on a rank counts for where nothing else decides: a tie-breaker
_LEFT_WHOLE = 1.01  # how much dearer a message counts that leaves each rank with the whole tensor: a tie goes to what keeps less


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What the choice costs.

    heavy(op): whether it multiplies matrices.
    operator(op): seconds, forward and backward, of the whole call in one microbatch on a rank's share of the batch.
    collective(kind, message bytes, ranks): seconds. update(bytes): seconds of the optimizer on parameters of so many bytes.
    state_bytes(value): of a whole parameter with gradient and optimizer state. limit_bytes: for all states, None without limit.
    prefer_split: how many times over an unsplit matrix product, with the messages of a split one, or parameter counts; > 0 (`PREFER_SPLIT`)
    where the user pinned the axis, to split what can be. forbidden: operator → factors of it that are not to be split.
    """

    operator: Callable[[Op], float]
    heavy: Callable[[Op], bool]
    collective: Callable[[str, float, int], float]
    update: Callable[[float], float]
    state_bytes: Callable[[Value], float]
    limit_bytes: float | None = None
    prefer_split: float = 0.0
    forbidden: Mapping[Op, Container[str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """The result: seconds of the objective (with preferences), its proven gap, variables of the problem."""

    objective_s: float
    gap: float
    variables: int


def split_tensors(assignment: Assignment, batch: Mapping[Op, Choice], prelude: set[Op], costs: Costs) -> Tensor | None:
    """Makes every operator and parameter choose on axis `tp`; None when no choice keeps within the memory limit."""
    for op in prelude:
        assignment.variants[op]["tp"] = _whole(assignment, op)
    if assignment.mesh["tp"] == 1:
        whole_on_one_rank(assignment)
        return Tensor(objective_s=0.0, gap=0.0, variables=0)
    return _Intra(assignment=assignment, batch=batch, prelude=prelude, costs=costs).solve()


def whole_on_one_rank(assignment: Assignment) -> None:
    """What there is to choose on a tensor axis of one rank."""
    for op in assignment.graph.ops:
        assignment.variants[op].setdefault("tp", _whole(assignment, op, "I"))
    for value in assignment.graph.parameters.values():
        assignment.sources.setdefault(value, {})["tp"] = I


def _whole(assignment: Assignment, op: Op, mode: str = "R") -> Variant:
    keep: Placement = I if mode == "I" else R
    inputs = tuple(keep if value.requires_grad else R for value in op.inputs)
    outputs = tuple(keep if value.requires_grad else R for value in op.outputs)
    return Variant(Choice("I" if mode == "I" else "R"), inputs, outputs)


@dataclass(kw_only=True)
class _Intra:
    assignment: Assignment
    batch: Mapping[Op, Choice]
    prelude: set[Op]
    costs: Costs
    problem: Problem = field(default_factory=Problem)
    choose: dict[Op, list[int]] = field(default_factory=dict)
    keep: dict[Value, dict[Placement, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graph: Graph = self.assignment.graph
        self.ranks = self.assignment.mesh["tp"]
        self.microbatches = self.assignment.mesh["mb"]
        self.share = 1 / (self.assignment.mesh["dp"] * self.assignment.mesh.get("ep", 1) * self.microbatches)
        self.first = representatives(self.graph, self._decided)
        self.readers = self.graph.consumers()
        self.count: dict[Op, int] = defaultdict(int)
        for op in self.graph.ops:
            self.count[self.first[op]] += 1
        self.ops = [op for op in self.graph.ops if self.first[op] is op and op not in self.prelude]
        self.parameter_of = parameter_representatives(self.graph, self.first)
        self.owners = table_owners(self.graph, self.assignment.signatures, self.ranks)
        self.variants = candidates(self.assignment, self.ops, self.batch, self.first.__getitem__, self.owners, self.costs.forbidden)

    def _decided(self, op: Op) -> object:
        """What the axes outside do to an operator, but for which tensor names the experts of its rows."""
        variants = self.assignment.variants[op]
        return variants["cp"], replace(variants["ep"].choice, routed=None) if "ep" in variants else None

    def solve(self) -> Tensor | None:
        self._operators()
        self._parameters()
        self._edges()
        self._memory()
        solution = self.problem.solve()
        if solution is None:
            return None
        self._store(solution)
        return Tensor(objective_s=solution.objective, gap=solution.gap, variables=len(self.problem.costs))

    def _operators(self) -> None:
        for op in self.ops:
            times = self.microbatches * self.count[op]
            splits = [v.choice.mode == "split" for v in self.variants[op]]
            whole, dear = self.costs.operator(op), 0.0
            if self.costs.prefer_split and self.costs.heavy(op) and any(splits):
                dear = self.costs.prefer_split * (whole + self._moved_s(op))
            costs = [times * (whole / self.ranks if split else whole + dear) for split in splits]
            self.choose[op] = [self.problem.variable(cost, integer=True) for cost in costs]
            self.problem.constrain([(x, 1.0) for x in self.choose[op]], 1.0, 1.0)

    def _moved_s(self, op: Op) -> float:
        """Of summing up all that an operator reads and makes: no reshard that a split may need takes longer."""
        tensors = [value for value in (*op.inputs, *op.outputs) if value.kind != "parameter"]
        return sum(self.costs.collective("all_reduce", value.nbytes * self._part(value), self.ranks) for value in tensors)

    def _parameters(self) -> None:
        counts: dict[Value, int] = defaultdict(int)
        for value in self.graph.parameters.values():
            counts[self.parameter_of[value]] += 1
        for value, count in counts.items():
            wanted = {v.inputs[index] for op, index in self._body_readers(value) for v in self.variants[op]}
            kept: set[Placement] = {R, I}
            options = kept | {placement for placement in wanted if isinstance(placement, Shard)}
            self.keep[value] = {
                t: self.problem.variable(count * self._parameter_cost(value, t), integer=True) for t in sorted(options, key=repr)
            }
            self.problem.constrain([(y, 1.0) for y in self.keep[value].values()], 1.0, 1.0)

    def _parameter_cost(self, value: Value, kept: Placement) -> float:
        part = 1 / self.ranks if isinstance(kept, Shard) else 1.0
        dear = 1.0 if isinstance(kept, Shard) else 1 + self.costs.prefer_split
        pending = self.costs.collective("all_reduce", value.nbytes, self.ranks) if kept == R and value.requires_grad else 0.0
        return pending + dear * part * (self.costs.update(value.nbytes) + self.costs.state_bytes(value) * _MEMORY_S)

    def _body_readers(self, value: Value) -> list[tuple[Op, int]]:
        return list(dict.fromkeys((self.first[op], index) for op, index in self.readers[value] if op not in self.prelude))

    def _made(self, value: Value) -> dict[Placement, list[tuple[int, float]]]:
        """Type → the variables whose choice makes the value in it; no variables where it has that type anyway."""
        if value in self.keep:
            return {placement: [(y, 1.0)] for placement, y in self.keep[value].items()}
        maker = value.producer
        if maker is None or maker in self.prelude:
            return {R: []}
        made: dict[Placement, list[tuple[int, float]]] = defaultdict(list)
        index = maker.outputs.index(value)
        for x, v in zip(self.choose[self.first[maker]], self.variants[self.first[maker]], strict=True):
            made[v.outputs[index]].append((x, 1.0))
        return made

    def _edges(self) -> None:
        """Each value between representatives once, counting how often it occurs."""
        seen: dict[tuple[object, int, Op, int], int] = defaultdict(int)
        places: dict[tuple[object, int, Op, int], Value] = {}
        for value in self.graph.values():
            for op, index in self.readers[value]:
                if op in self.prelude:
                    continue
                maker = value.producer
                source = (self.first[maker], maker.outputs.index(value)) if maker is not None else (self.parameter_of.get(value, value), 0)
                key = (*source, self.first[op], index)
                seen[key] += 1
                places.setdefault(key, value)
        shared: dict[tuple[object, int, Placement, Placement], int] = {}
        for key, value in places.items():
            representative = self.parameter_of.get(value, value)
            self._edge(representative, key, seen[key], shared)

    def _edge(
        self, value: Value, key: tuple[object, int, Op, int], count: int, shared: dict[tuple[object, int, Placement, Placement], int]
    ) -> None:
        source, output, op, index = key
        made = self._made(value)
        read: dict[Placement, list[int]] = defaultdict(list)
        for x, v in zip(self.choose[op], self.variants[op], strict=True):
            read[v.inputs[index]].append(x)
        flows = {(a, w): self.problem.variable(0.0) for a in made for w in read}
        for a, makers in made.items():
            terms = [(flows[a, w], 1.0) for w in read]
            self.problem.constrain([*terms, *((x, -c) for x, c in makers)], *((0.0, 0.0) if makers else (1.0, 1.0)))
        for w, takers in read.items():
            self.problem.constrain([*((flows[a, w], 1.0) for a in made), *((x, -1.0) for x in takers)], 0.0, 0.0)
        for (a, w), flow in flows.items():
            if (cost := self._reshard_cost(value, a, w)) == inf:
                self.problem.constrain([(flow, 1.0)], high=0.0)
            elif cost > 0:
                name = (source, output, a, w)
                if name not in shared:
                    shared[name] = self.problem.variable(cost * count * self.microbatches)
                self.problem.constrain([(shared[name], 1.0), (flow, -1.0)], 0.0)

    def _reshard_cost(self, value: Value, source: Placement, target: Placement) -> float:
        """Seconds of one reshard, forward and backward, inf where it may not be; the whole is what a rank's share of a microbatch holds."""
        if source == target or (not value.requires_grad and {source, target} == {R, I}):
            return 0.0
        if target == P and source != P and not value.requires_grad:
            return inf  # nothing is gained by making summands of a constant
        whole = value.nbytes * self._part(value)
        moves = [collective_of(source, target)] + ([collective_of(dual(target), dual(source))] if value.requires_grad else [])
        seconds = sum(
            self.costs.collective(kind, whole / self.ranks if kind == "all_to_all" else whole, self.ranks) for kind in moves if kind
        )
        return seconds * (1.0 if isinstance(target, Shard) else _LEFT_WHOLE) + 1e-7

    def _part(self, value: Value) -> float:
        """What the data, microbatch and context axes leave a rank of the value."""
        part = self.share if value.kind != "parameter" else 1.0
        if value.producer is None or self.assignment.mesh["cp"] == 1:
            return part
        made = self.assignment.variants[value.producer]["cp"].outputs[value.producer.outputs.index(value)]
        return part / self.assignment.mesh["cp"] if isinstance(made, Shard) else part

    def _memory(self) -> None:
        if self.costs.limit_bytes is None:
            return
        counts: dict[Value, int] = defaultdict(int)
        for value in self.graph.parameters.values():
            counts[self.parameter_of[value]] += 1
        terms = [
            (y, counts[value] * self.costs.state_bytes(value) * (1 / self.ranks if isinstance(kept, Shard) else 1.0) / 1e9)
            for value, options in self.keep.items()
            for kept, y in options.items()
        ]
        self.problem.constrain(terms, high=self.costs.limit_bytes / 1e9)

    def _store(self, solution: Solution) -> None:
        for op in self.graph.ops:
            if op in self.prelude:
                continue
            first = self.first[op]
            best = max(range(len(self.choose[first])), key=lambda k: solution.values[self.choose[first][k]])
            chosen = self.variants[first][best]
            if chosen.choice.owner is None:
                self.assignment.variants[op]["tp"] = chosen
            else:  # equal tables share their variables, not their ranks
                set_choice(self.assignment, op, "tp", replace(chosen.choice, owner=self.owners[op]))
        for value in self.graph.parameters.values():
            options = self.keep[self.parameter_of[value]]
            kept = max(options, key=lambda t: solution.values[options[t]])
            if isinstance(kept, Shard) and kept.owner is not None:
                kept = replace(kept, owner=next(self.owners[op] for op, _ in self.readers[value] if op in self.owners))
            self.assignment.sources.setdefault(value, {})["tp"] = kept


def representatives(graph: Graph, decided: Callable[[Op], object] = lambda op: None) -> dict[Op, Op]:
    """Every operator → the one at its place in the first of its run of equal blocks (itself outside such runs).

    decided: what was decided about an operator already; blocks that differ in it are not equal.
    """
    first = {op: op for op in graph.ops}
    for run in graph.blocks:
        known: dict[tuple[object, ...], list[Op]] = {}
        for block in run:
            alike = known.setdefault(tuple(map(decided, block)), block)
            first |= dict(zip(block, alike, strict=True))
    return first


def parameter_representatives(graph: Graph, first: Mapping[Op, Op]) -> dict[Value, Value]:
    """Every parameter → the one that stands at its place in the first block (itself when nothing reads it)."""
    found: dict[Value, Value] = {}
    for op in graph.ops:
        for index, value in enumerate(op.inputs):
            if value.kind == "parameter":
                found.setdefault(value, first[op].inputs[index])
    return {value: value for value in graph.parameters.values()} | found
