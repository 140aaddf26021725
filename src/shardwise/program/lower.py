"""Assignment, stage, rank ──▶ the stage's graphs on that rank

Every operator becomes its rule's local code on what the rank holds; every difference between the type in which a value is made and the type
in which it is read becomes a reshard, shared by all readers that want the same type. Parameters that data ranks divide are gathered where
they are first read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx

from shardwise.capture.graph import Op, Value
from shardwise.capture.normalize import RANDOM_STATE
from shardwise.capture.precision import LOW
from shardwise.program.edges import at_home, edge_type
from shardwise.program.gather import Gathering, gatherings
from shardwise.program.implementations import choose_implementations
from shardwise.program.joint import JointGraph
from shardwise.program.program import Binding, Crossing, Edge, ParameterPart, StageProgram
from shardwise.program.recompute import Recompute, blocks_of
from shardwise.program.reductions import DATA_AXES, joined_ranks
from shardwise.program.trace import Tracer
from shardwise.sharding.assignment import Assignment, over_microbatches
from shardwise.sharding.collectives import group_ranks
from shardwise.sharding.division import Division, division_of
from shardwise.sharding.experts import local_code
from shardwise.sharding.reshard import Axis, Reshard, moves, reshard, within
from shardwise.sharding.routes import Journey, Route
from shardwise.sharding.signature import AxisSplit, Call, Signature, factor_part
from shardwise.sharding.types import I, P, Placement, R, Routed, Shard, local_shape

__all__ = ["Cut", "lower_stage", "parameter_part"]

Type = dict[str, Placement]
Choose = Callable[[str, int, int], str]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Which stage computes each operator that depends on parameters; the prelude's are computed wherever they are read.

    recompute: what the backward pass computes again instead of keeping it (`shardwise.program.recompute`).
    recompute_blocks: in the first so many blocks of each stage, 0: in all.
    """

    stage_of: Mapping[Op, int]
    prelude: frozenset[Op]
    recompute: Recompute = "none"
    recompute_blocks: int = 0

    @property
    def stages(self) -> int:
        return max(self.stage_of.values(), default=0) + 1

    def returned_by(self, output: Value) -> int:
        """The stage that returns an output of a graph for inference; those of the prelude are the first one's."""
        return self.stage_of.get(output.producer, 0)  # type: ignore[arg-type]


def parameter_part(assignment: Assignment, value: Value, coordinates: Mapping[str, int], stages: tuple[int, ...] = ()) -> ParameterPart:
    """What the rank at `coordinates` keeps of a parameter or buffer."""
    type_ = assignment.produced(value)
    reduce = tuple(axis for axis, placement in type_.items() if placement == R and axis != "mb" and assignment.mesh[axis] > 1)
    return ParameterPart(
        name=value.name,
        type=type_,
        shape=value.shape,
        local=local_shape(value.shape, type_, assignment.mesh, coordinates),
        dtype=value.dtype,
        master=assignment.graph.master if value.requires_grad and value.dtype in LOW else None,
        requires_grad=value.requires_grad,
        reduce=reduce if value.requires_grad else (),
        stages=stages,
    )


def lower_stage(
    assignment: Assignment,
    cut: Cut,
    stage: int,
    axes: Mapping[str, Axis],
    tracer: Tracer,
    choose: Choose,
    *,
    splits_backward: bool = False,
) -> tuple[StageProgram, list[Edge], tuple[str, ...]]:
    """The stage's graphs on the rank that sees the mesh as `axes`, the edges that touch it, and the axes over which the loss is a sum.

    splits_backward: whether the backward pass is wanted in two parts.
    """
    return _Stage(
        assignment=assignment, cut=cut, stage=stage, axes=axes, tracer=tracer, choose=choose, splits_backward=splits_backward
    ).lower()


@dataclass(kw_only=True)
class _Stage:
    assignment: Assignment
    cut: Cut
    stage: int
    axes: Mapping[str, Axis]
    tracer: Tracer
    choose: Choose
    splits_backward: bool
    nodes: dict[tuple[Value, tuple[Placement, ...]], fx.Node] = field(default_factory=dict)
    early: dict[tuple[Value, tuple[Placement, ...]], fx.Node] = field(default_factory=dict)
    inputs: dict[fx.Node, Binding] = field(default_factory=dict)
    early_inputs: dict[fx.Node, Binding] = field(default_factory=dict)
    crossings: dict[str, tuple[Crossing, fx.Node]] = field(default_factory=dict)
    edges: list[Edge] = field(default_factory=list)
    scattered: list[tuple[Value, fx.Node, fx.Node]] = field(default_factory=list)  # parameter, its part, what was gathered
    routes: dict[tuple[Routed, Any], list[fx.Node]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graph = self.assignment.graph
        self.coordinates = {name: axis.rank for name, axis in self.axes.items()}
        self.body = JointGraph(tracer=self.tracer)
        self.prelude = JointGraph(tracer=self.tracer)
        self.ops = [op for op in self.graph.ops if self.cut.stage_of.get(op) == self.stage]
        self.readers = self.graph.consumers()
        self.values = {value.name: value for value in self.readers}
        self.blocks = blocks_of(self.graph) if self.cut.recompute != "none" or self.assignment.zero > 1 else {}
        mine = list(dict.fromkeys(self.blocks[op] for op in self.ops if op in self.blocks))
        self.again = frozenset(mine[: self.cut.recompute_blocks or len(mine)])

    def lower(self) -> tuple[StageProgram, list[Edge], tuple[str, ...]]:
        self._run_prelude()
        for op in self.ops:
            block = self.blocks.get(op)
            self.body.segment = block if block in self.again else None
            self._call(op, self.body, self._body_input)
        self.body.segment = None
        outputs, seeds, loss_axes = self._outputs()
        self.body.backward(seeds)
        self._read_whole()
        return self._program(outputs), self.edges, loss_axes

    # -- operators ---------------------------------------------------------------------------------------------------------------------

    def _run_prelude(self) -> None:
        """The prelude's operators that this stage reads, and what they read."""
        needed = {value for op in self.ops for value in op.inputs} | set(self._given())
        wanted: list[Op] = []
        for op in reversed(self.graph.ops):
            if op in self.cut.prelude and any(value in needed for value in op.outputs):
                wanted.append(op)
                needed.update(op.inputs)
        for op in reversed(wanted):
            self._call(op, self.prelude, self._early_input)

    def _call(self, op: Op, joint: JointGraph, read: Callable[[Op, int], fx.Node]) -> None:
        sig = self.assignment.signatures[op]
        call, local = self._local_call(op, sig), local_code(self.assignment, op)
        key = (
            op.name,
            _name(local),
            repr((op.args, op.kwargs)),
            tuple(value.shape for value in op.inputs),
            call.shapes,
            repr(call.splits),
        )
        inputs = [read(op, index) for index in range(len(op.inputs))]
        results = joint.apply(lambda tensors: local(call, tensors), key, inputs, grad=op.requires_grad, module=op.module)
        store = self.early if joint is self.prelude else self.nodes
        for value, node, shape in zip(op.outputs, results, call.shapes, strict=True):
            assert tuple(node.meta["val"].shape) == shape, (
                f"{op.key} makes {tuple(node.meta['val'].shape)} on rank {self.coordinates}, not {shape}"
            )
            store[self._named(value, self.assignment.produced(value))] = node

    def _local_call(self, op: Op, sig: Signature) -> Call:
        sizes = dict(sig.sizes)
        splits: dict[str, list[AxisSplit]] = {}
        for name, axis in self.axes.items():
            choice = self.assignment.variants[op][name].choice.parts
            if choice is None or axis.ranks == 1:
                continue
            held = factor_part(choice, sizes[choice.factor], axis.ranks, axis.rank)
            split = AxisSplit(axis=name, group=axis.group, ranks=axis.ranks, rank=None if name == "mb" else axis.rank, part=held)
            splits.setdefault(choice.factor, []).append(split)
            sizes[choice.factor] = held.length
        shapes = tuple(self._local_shape(value, self.assignment.produced(value)) for value in op.outputs)
        return Call(
            op=op, shapes=shapes, sizes=sig.sizes, splits={name: tuple(found) for name, found in splits.items()}, device=self.tracer.device
        )

    def _local_shape(self, value: Value, type_: Mapping[str, Placement]) -> tuple[int, ...]:
        return local_shape(value.shape, type_, self.assignment.mesh, self.coordinates)

    def _named(self, value: Value, type_: Mapping[str, Placement]) -> tuple[Value, tuple[Placement, ...]]:
        return value, tuple(type_[axis] for axis in self.axes)

    # -- reading values ----------------------------------------------------------------------------------------------------------------

    def _early_input(self, op: Op, index: int) -> fx.Node:
        return self._early_value(op.inputs[index], self.assignment.wanted(op, index))

    def _early_value(self, value: Value, wanted: Type) -> fx.Node:
        """A value of the prelude, over all microbatches."""
        wanted = wanted | {"mb": R}
        made = self.assignment.produced(value) | {"mb": R}
        if value.producer is None and self._named(value, made) not in self.early:
            meta = self.tracer.tensor(self._local_shape(value, made), value.dtype)
            node = self.prelude.placeholder(_identifier(f"{value.kind}_{value.name}"), meta)
            self.early[self._named(value, made)] = node
            self.early_inputs[node] = Binding("buffer" if value.kind == "buffer" else "crossing", value.name)
        return self._resharded(self.prelude, self.early, value, made, wanted, "")

    def _body_input(self, op: Op, index: int) -> fx.Node:
        return self._body_value(op.inputs[index], self.assignment.wanted(op, index), op.module)

    def _body_value(self, value: Value, wanted: Type, module: str) -> fx.Node:
        """A value in the type in which it is wanted."""
        if value.name == RANDOM_STATE:
            return self._placeholder(value, self.assignment.produced(value), Binding("random"))
        if value.kind == "input" or (value.producer in self.cut.prelude):
            home = at_home(wanted)
            node = self._crossing(value, home)
            return node if home == wanted else self._resharded(self.body, self.nodes, value, home, wanted, module)
        made = self.assignment.produced(value)
        if value.kind == "parameter":
            self._parameter(value, made, module)
        elif value.producer is None:
            self._placeholder(value, made, Binding("buffer", value.name))
        elif self.cut.stage_of[value.producer] != self.stage:
            made = self._edge_type(value, self.stage)
            self._receive(value, made)
        return self._resharded(self.body, self.nodes, value, made, wanted, module)

    def _placeholder(self, value: Value, type_: Type, binding: Binding) -> fx.Node:
        key = self._named(value, type_)
        if key not in self.nodes:
            meta = self.tracer.tensor(self._local_shape(value, type_), value.dtype)
            self.nodes[key] = node = self.body.placeholder(_identifier(f"{binding.kind}_{value.name}"), meta, grad=value.requires_grad)
            self.inputs[node] = binding
        return self.nodes[key]

    def _parameter(self, value: Value, type_: Type, module: str) -> None:
        """A parameter as operators read it: as it is stored, or gathered from the data ranks' parts."""
        key = self._named(value, type_)
        if key in self.nodes:
            return
        gathering = self.gathered.get(value.name)
        if gathering is None:
            self._placeholder(value, type_, Binding("parameter", value.name))
            self.nodes[key].meta["parameter"] = True
            return
        values = [self.graph.parameters[part.name] for part in gathering.parts]
        given = [self._part_of(each, part) for each, part in zip(values, gathering.parts, strict=True)]
        results = self.body.apply(gathering, gathering.key, given, grad=value.requires_grad, module=module, gathers=True)
        for each, node, result in zip(values, given, results, strict=True):
            self.nodes[self._named(each, self.assignment.produced(each))] = result
            self.scattered.append((each, node, result))

    def _part_of(self, value: Value, part: ParameterPart) -> fx.Node:
        """The rank's part of a parameter that is gathered before it is read."""
        assert part.division is not None
        meta = self.tracer.tensor(part.division.shape(part.local), part.wide)
        node = self.body.placeholder(_identifier(f"parameter_{value.name}"), meta, grad=value.requires_grad)
        node.meta["parameter"] = True
        self.inputs[node] = Binding("parameter", value.name)
        return node

    def _read_whole(self) -> None:
        """ZeRO-2: parameters are there whole, gradients are reduced to parts: nothing is gathered, the rest is as if it had been."""
        if self.assignment.zero != 2:
            return
        triples = []
        for value, part, gathered in self.scattered:
            whole = self.body.placeholder(f"{part.name}_whole", gathered.meta["val"], grad=value.requires_grad)
            whole.meta["parameter"] = True
            self.inputs[whole] = self.inputs.pop(part)
            triples.append((part, gathered, whole))
        self.body.read_whole(triples)

    def _receive(self, value: Value, type_: Type) -> None:
        if self._named(value, type_) not in self.nodes:
            assert value.producer is not None
            edge = self._edge(value, self.cut.stage_of[value.producer], self.stage)
            self._placeholder(value, type_, Binding("edge", edge.name))

    def _edge(self, value: Value, source: int, target: int) -> Edge:
        edge = Edge(
            name=f"{value.name}→{target}",
            source=source,
            target=target,
            shape=self._local_shape(value, self._edge_type(value, target)),
            dtype=value.dtype,
            requires_grad=value.requires_grad,
        )
        self.edges.append(edge)
        return edge

    def _edge_type(self, value: Value, target: int) -> Type:
        return edge_type(self.assignment, self.cut.stage_of, self.readers[value], value, target)

    def _crossing(self, value: Value, wanted: Type) -> fx.Node:
        """A prelude value in the body: made in its wanted type over all microbatches, of which the executor hands over one's part."""
        key = self._named(value, wanted)
        if key not in self.nodes:
            lifted, split = over_microbatches(self.assignment, value, wanted, self.coordinates)
            whole = self._early_value(value, lifted)
            name = _identifier(f"{value.name}_{len(self.crossings)}")
            self.crossings[name] = (Crossing(name=name, split=split), whole)
            meta = self.tracer.tensor(self._local_shape(value, wanted), value.dtype) if split else whole.meta["val"]
            self.nodes[key] = node = self.body.placeholder(f"crossing_{name}", meta)
            self.inputs[node] = Binding("crossing", name)
        return self.nodes[key]

    def _resharded(self, joint: JointGraph, store: dict[Any, fx.Node], value: Value, made: Type, wanted: Type, module: str) -> fx.Node:
        """The value in its wanted type."""
        here = [name for name in self.axes if self.axes[name].ranks > 1]
        now = dict(made)
        mesh = {axis: self.axes[axis].ranks for axis in here}
        for name, target in moves({axis: made[axis] for axis in here}, {axis: wanted[axis] for axis in here}, mesh):
            source, before = now[name], store[self._named(value, now)]
            now[name] = target
            key = self._named(value, now)
            if key in store:
                continue
            if not value.requires_grad and {source, target} == {R, I}:
                store[key] = before
                continue
            assert name != "mb", f"{value.name} is {source} over microbatches, {target} is wanted"
            if isinstance(source, Routed) or isinstance(target, Routed):
                store[key] = self._journey(value, before, now, name, source, target, module)
                continue
            inner = {axis: now[axis] for axis in here[here.index(name) + 1 :]}
            step = Reshard(
                source=within(source, inner, mesh),
                target=within(target, inner, mesh),
                axis=self.axes[name],
                source_size=self._size_over(value, now, name, source),
                target_size=self._size_over(value, now, name, target),
                choose=self.choose,
            )
            described = (step.source, step.target, self.axes[name], step.source_size, step.target_size, self.choose)
            (store[key],) = joint.apply(_move(step), described, [before], grad=value.requires_grad, module=module)
        return store[self._named(value, now)]

    def _journey(self, value: Value, before: fx.Node, type_: Type, axis: str, source: Placement, target: Placement, module: str) -> fx.Node:
        """Rows on their way to their experts or back. type_: what they become."""
        routed = target if isinstance(target, Routed) else source
        assert isinstance(routed, Routed), f"{value.name} is not routed"
        rows = self._local_shape(value, type_)[0]
        journey = Journey(axis=self.axes[axis], there=routed is target, rows=rows, choose=self.choose)
        route = self._route(routed, type_ | {axis: routed.home}, axis, module)
        (node,) = self.body.apply(journey, journey, [before, *route], grad=value.requires_grad, module=module)
        return node

    def _route(self, routed: Routed, type_: Type, axis: str, module: str) -> list[fx.Node]:
        """Of rows that lie as type_ says; the same for all tensors with these rows."""
        rows: Type = {name: each if isinstance(each, Shard) and each.dim == 0 else R for name, each in type_.items()}
        key = (routed, tuple(rows.items()))
        if key not in self.routes:
            expert = self._body_value(self.values[routed.by], rows, module)
            make = Route(axis=self.axes[axis], experts=routed.experts, choose=self.choose)
            self.routes[key] = self.body.apply(make, make, [expert], grad=False, module=module)
        return self.routes[key]

    def _size_over(self, value: Value, type_: Type, axis: str, placement: Placement) -> int:
        """How long the placement's dim is over all ranks of the axis."""
        if not isinstance(placement, Shard):
            return 0
        outer = {name: each for name, each in type_.items() if name != axis}
        return self._local_shape(value, outer)[placement.dim]

    # -- outputs -----------------------------------------------------------------------------------------------------------------------

    def _outputs(self) -> tuple[list[tuple[Binding, fx.Node]], list[tuple[fx.Node, fx.Node]], tuple[str, ...]]:
        """What the forward graph returns, and the gradients that come back for it."""
        outputs: list[tuple[Binding, fx.Node]] = []
        seeds: list[tuple[fx.Node, fx.Node]] = []
        for op in self.ops:
            for value in op.outputs:
                targets = sorted(
                    {self.cut.stage_of[reader] for reader, _ in self.readers[value] if reader in self.cut.stage_of} - {self.stage}
                )
                for target in targets:
                    self._send(value, target, outputs, seeds)
        for name, value in self.graph.updates.items():
            if value.producer is not None and self.cut.stage_of.get(value.producer) == self.stage:
                kept = self.assignment.produced(self.graph.buffers[name])
                made = self.assignment.produced(value)
                outputs.append((Binding("buffer", name), self._resharded(self.body, self.nodes, value, made, kept, value.producer.module)))
        loss_axes: tuple[str, ...] = ()
        if self.graph.outputs:
            outputs += [(Binding("output", str(self.graph.outputs.index(value))), self._output(value)) for value in self._given()]
        elif self.cut.stage_of[self.graph.loss.producer] == self.stage:  # type: ignore[index]
            loss_axes = self._loss(outputs, seeds)
        return outputs, seeds, loss_axes

    def _send(self, value: Value, target: int, outputs: list[Any], seeds: list[Any]) -> None:
        assert value.producer is not None
        made, sent = self.assignment.produced(value), self._edge_type(value, target)
        node = self._resharded(self.body, self.nodes, value, made, sent, value.producer.module)
        edge = self._edge(value, self.stage, target)
        outputs.append((Binding("edge", edge.name), node))
        if value.requires_grad:
            meta = self.tracer.tensor(edge.shape, edge.dtype)
            seeds.append((node, self._gradient_input(f"gradient_{edge.name}", meta, Binding("edge", edge.name))))

    def _loss(self, outputs: list[Any], seeds: list[Any]) -> tuple[str, ...]:
        loss = self.graph.loss
        made = self.assignment.produced(loss)
        wanted = {axis: placement if placement == P or axis == "mb" else I for axis, placement in made.items()}
        node = self._resharded(self.body, self.nodes, loss, made, wanted, "")
        outputs.append((Binding("loss"), node))
        seeds.append((node, self._gradient_input("seed", self.tracer.tensor((), loss.dtype), Binding("seed"))))
        return tuple(axis for axis, placement in wanted.items() if placement == P and axis != "mb")

    def _given(self) -> list[Value]:
        """The outputs that this stage returns, each once."""
        return [value for value in dict.fromkeys(self.graph.outputs) if self.cut.returned_by(value) == self.stage]

    def _output(self, value: Value) -> fx.Node:
        """An output as it is to be joined: whole but for the samples, of which there are parts over data ranks and microbatches."""
        made = self.assignment.produced(value)
        wanted = {axis: placement if axis in ("dp", "mb") else I for axis, placement in made.items()}
        if value.producer in self.cut.prelude:
            return self._crossing(value, wanted)
        return self._resharded(self.body, self.nodes, value, made, wanted, "")

    def _gradient_input(self, name: str, meta: torch.Tensor, binding: Binding) -> fx.Node:
        node = self.body.placeholder(_identifier(name), meta, forward=False)
        self.inputs[node] = binding
        return node

    def _program(self, outputs: Sequence[tuple[Binding, fx.Node]]) -> StageProgram:
        sources = [(node, binding) for node, binding in self.inputs.items() if node in self.body.tracked]
        halves = self.body.split(
            [node for _, node in outputs],
            [self.body.cotangents.get(node) for node, _ in sources],
            self.cut.recompute,
            for_parameters=[binding.kind == "parameter" for _, binding in sources] if self.splits_backward else None,
        )
        bindings = {node.name: binding for node, binding in self.inputs.items()}
        crossings = list(self.crossings.values())
        early = self.prelude.split([node for _, node in crossings], [])
        for graph in (early.forward, halves.forward, halves.backward, *([halves.weight] if halves.weight else [])):
            choose_implementations(graph, self.choose)
        early_bindings = {node.name: binding for node, binding in self.early_inputs.items()}
        forward_inputs = [bindings[name] for name in halves.forward_inputs]
        values = {"parameter": self.graph.parameters, "buffer": self.graph.buffers}
        parts = {
            kind: [
                self._held_part(group[name])
                for name in self._held(kind, [*forward_inputs, *(binding for binding, _ in outputs)], early_bindings)
            ]
            for kind, group in values.items()
        }
        return StageProgram(
            stage=self.stage,
            parameters=parts["parameter"],
            buffers=parts["buffer"],
            crossings=[crossing for crossing, _ in crossings],
            prelude=early.forward,
            prelude_inputs=[early_bindings[name] for name in early.forward_inputs],
            forward=halves.forward,
            forward_inputs=forward_inputs,
            forward_outputs=[binding for binding, _ in outputs],
            backward=halves.backward,
            backward_inputs=[bindings[name] for name in halves.backward_inputs],
            backward_outputs=[binding for _, binding in sources],
            saved=halves.saved,
            weight=halves.weight,
            weight_outputs=[sources[number][1] for number in halves.later],
            kept=halves.kept,
        )

    def _held(self, kind: str, bindings: Sequence[Binding], early: Mapping[str, Binding]) -> list[str]:
        names = [binding.name for binding in (*bindings, *early.values()) if binding.kind == kind]
        return list(dict.fromkeys(names))

    def _held_part(self, value: Value) -> ParameterPart:
        part = parameter_part(self.assignment, value, self.coordinates, self._stages_of(value))
        zero = self.assignment.zero if value.kind == "parameter" and (value.requires_grad or self.assignment.zero == 3) else 0
        division = self._division(part.local, part.type) if zero else None
        return replace(part, division=division, zero=zero) if division else part

    def _division(self, local: Sequence[int], type_: Mapping[str, Placement]) -> Division | None:
        data = [axis for axis in DATA_AXES if axis in self.axes and self.axes[axis].ranks > 1 and type_[axis] == R]
        if not data:
            return None
        groups = [tuple(group_ranks(self.axes[axis].group)) for axis in data]
        rank = groups[0][self.axes[data[0]].rank]
        return division_of(local, data, joined_ranks(rank, groups), rank, self.assignment.shard)

    @cached_property
    def gathered(self) -> dict[str, Gathering]:
        """The parameters of this stage that are gathered before they are read, or would be if they were stored in parts (ZeRO-2)."""
        here = set(self.ops)
        held: dict[Value, set[str | None]] = {}
        for op in self.ops if self.assignment.zero > 1 else ():
            for value in op.inputs:
                if value.kind == "parameter" and value not in held:
                    held[value] = {self.blocks.get(reader) for reader, _ in self.readers[value] if reader in here}
        parts = [part for value in held if (part := self._held_part(value)).division is not None]
        home = {value.name: block for value, blocks in held.items() if len(blocks) == 1 and (block := next(iter(blocks))) is not None}
        return gatherings(parts, home, self.choose)

    def _stages_of(self, value: Value) -> tuple[int, ...]:
        return tuple(sorted({self.cut.stage_of[op] for op, _ in self.readers[value] if op in self.cut.stage_of}))


def _move(step: Reshard) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
    return lambda tensors: reshard(tensors[0], step)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", "")


def _identifier(name: str) -> str:
    return "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in name)
