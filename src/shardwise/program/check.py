"""Proves before any rank starts that the ranks' programs fit together.

    _operators     every operator is in exactly one stage, and reads only what its own or an earlier stage makes
    _rank          a rank is where its number says, performs every forward and backward once, after what it reads was received
    _buffers       what a forward pass changes is read on the rank that changes it alone
    _parameters    the parts of the ranks of each stage tile every parameter that the stage reads, and the data ranks' parts of these, where
                   they are divided; pending gradients are reduced
    _edges         both ends of an edge, and the graphs there, agree with the type in which the value is made
    check_order    no rank waits for ever, even where a send blocks until it is received (`shardwise.program.order`)
    check_memory   what is predicted for each rank is within what it has

What is wrong is a CheckError that names the place and both sides. A plan that shardwise made never gets one; an edited plan may.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from math import prod
from typing import Any

import torch
from torch import fx

from shardwise.capture.graph import Graph, Op, Value
from shardwise.errors import CheckError
from shardwise.program.actions import COMPUTES, Action, Kind
from shardwise.program.buffers import far_buffer
from shardwise.program.build import Places
from shardwise.program.edges import edge_type
from shardwise.program.lower import Cut
from shardwise.program.order import check_order, drawn
from shardwise.program.program import Binding, Edge, ParameterPart, Program
from shardwise.sharding.assignment import Assignment
from shardwise.sharding.collectives import group_ranks
from shardwise.sharding.division import Division
from shardwise.sharding.types import Placement, R, Shard, local_shape, part

__all__ = ["check_memory", "check_own", "check_programs"]

Choose = Callable[[str, int, int], str]
Piece = tuple[tuple[int, int, int], ...]  # of each dim: blocks, first and last index in a block


def check_programs(programs: Mapping[int, Program], assignment: Assignment, cut: Cut, choose: Choose) -> None:
    """All ranks' programs. choose: as in `build_programs`, for the collectives at the end of a step. Raises CheckError."""
    whole = _Whole(programs=programs, assignment=assignment, cut=cut)
    _operators(assignment.graph, cut)
    whole.ranks()
    for program in programs.values():
        _rank(program)
    whole.buffers()
    whole.parameters()
    whole.edges()
    check_order(programs, choose)


def check_own(program: Program, assignment: Assignment, cut: Cut) -> None:
    """What a rank can check without the others' programs. Raises CheckError."""
    whole = _Whole(programs={program.rank: program}, assignment=assignment, cut=cut)
    _operators(assignment.graph, cut)
    _rank(program)
    whole.buffers()
    whole.own_parts(program)
    whole.own_edges(program)


def check_memory(predicted_bytes: Sequence[int], limit_bytes: Sequence[int | None]) -> None:
    """predicted_bytes, limit_bytes: of each rank, None without limit. Raises CheckError when a rank needs more than it has."""
    over = [need - (need if have is None else have) for need, have in zip(predicted_bytes, limit_bytes, strict=True)]
    fullest = max(range(len(over)), key=over.__getitem__)
    if over[fullest] > 0:
        raise CheckError(
            f"rank {fullest} needs {predicted_bytes[fullest] / 1e9:.3g} GB, it has {(limit_bytes[fullest] or 0) / 1e9:.3g} GB; "
            "plan again with more tp or pp, more microbatches or a smaller global batch"
        )


# -- operators -----------------------------------------------------------------------------------------------------------------------------


def _operators(graph: Graph, cut: Cut) -> None:
    for op in graph.ops:
        stage = cut.stage_of.get(op)
        if op in cut.prelude:
            if stage is not None:
                raise CheckError(f"{op.key} is in stage {stage} and in the prelude too; it would be computed twice")
        elif stage is None:
            raise CheckError(f"{op.key} is in no stage; there are stages 0 to {cut.stages - 1}")
        elif stage < 0:
            raise CheckError(f"{op.key} is in stage {stage}; there are stages 0 to {cut.stages - 1}")
        for value in op.inputs:
            _read(op, value, cut)
    if empty := sorted(set(range(cut.stages)) - set(cut.stage_of.values())):
        raise CheckError(f"stage {empty[0]} of {cut.stages} has no operators")


def _read(op: Op, value: Value, cut: Cut) -> None:
    here = cut.stage_of.get(op, -1)  # the prelude comes before all stages
    made = -1 if value.producer is None else cut.stage_of.get(value.producer, -1)
    if made > here:
        where = f"in stage {here}" if here >= 0 else "in the prelude"
        raise CheckError(f"{op.key} {where} reads {value.name}, which stage {made} makes; values go to later stages only")


# -- one rank ------------------------------------------------------------------------------------------------------------------------------


def _rank(program: Program) -> None:
    kinds = [action.kind for action in program.actions]
    ends = [Kind.PRELUDE, Kind.REDUCE, Kind.UPDATE]
    if kinds[:1] + kinds[-2:] != ends:
        raise CheckError(
            f"rank {program.rank} does not begin with the prelude and end with reduce and update: {', '.join(kinds[:1] + kinds[-2:])}"
        )
    _once(program)
    _dataflow(program)
    for number, stage in program.stages.items():
        where = f"rank {program.rank}" + (f", stage {number}" if len(program.stages) > 1 else "")
        _passed_on(where, "forward", "saves", stage.forward, len(stage.forward_outputs), "backward", stage.backward, stage.saved)
        if stage.weight is not None:
            _passed_on(where, "backward", "keeps", stage.backward, len(stage.backward_outputs), "weight", stage.weight, stage.kept)


def _once(program: Program) -> None:
    kinds = {number: [kind for kind in stage.graphs if kind in COMPUTES] for number, stage in program.stages.items()}
    wanted = {
        Action(kind=kind, microbatch=m, stage=number) for number in kinds for kind in kinds[number] for m in range(program.microbatches)
    }
    seen: set[Action] = set()
    for at, action in enumerate(program.actions):
        if action in seen:
            raise CheckError(f"rank {program.rank} performs `{action}` twice:\n{drawn(program, at)}")
        if action.kind in COMPUTES and action not in wanted:
            raise CheckError(f"rank {program.rank} performs `{action}`, {_not_there(program, action)}:\n{drawn(program, at)}")
        seen.add(action)
    if missing := wanted - seen:
        first = min(missing, key=lambda action: (action.microbatch, action.stage, COMPUTES.index(action.kind)))
        end = drawn(program, len(program.actions))
        raise CheckError(f"rank {program.rank} never performs `{first}`, one of {program.microbatches} microbatches:\n{end}")


def _not_there(program: Program, action: Action) -> str:
    if action.stage not in program.stages:
        return f"but it has {program.where}"
    if action.kind not in program.stages[action.stage].graphs:
        return "but the backward pass is whole there"
    return f"but there are {program.microbatches} microbatches"


def _dataflow(program: Program) -> None:
    """Every action comes after what it reads, and every value is read."""
    there: set[str] = set()
    for at, action in enumerate(program.actions):
        for need in _needs(program, action):
            if need not in there:
                raise CheckError(f"rank {program.rank} performs `{action}` before {need}:\n{drawn(program, at)}")
            there.discard(need)
        there.update(_makes(program, action))
    if left := sorted(what for what in there if what.startswith(_HAS)):
        end = drawn(program, len(program.actions))
        raise CheckError(f"rank {program.rank} never sends or reads {left[0].removeprefix(_HAS)}:\n{end}")


_HAS = "it has "


def _value(edge: str, microbatch: int, *, gradient: bool) -> str:
    return f"{_HAS}{'the gradient of ' if gradient else ''}{edge} of microbatch {microbatch}"


def _needs(program: Program, action: Action) -> list[str]:
    """What an action reads, which nobody else does."""
    m = action.microbatch
    if action.sends:
        return [_value(action.edge, m, gradient=action.kind is Kind.SEND_GRAD)]
    if action.kind not in COMPUTES:
        return []
    stage = program.stages[action.stage]
    if action.kind is Kind.FORWARD:
        return [_value(edge, m, gradient=False) for edge in _of(stage.forward_inputs, "edge")]
    before = Kind.BACKWARD if action.kind is Kind.WEIGHT else Kind.FORWARD
    done = f"`{Action(kind=before, microbatch=m, stage=action.stage)}`"
    gradients = _of(stage.backward_inputs, "edge") if action.kind is Kind.BACKWARD else []
    return [done, *(_value(edge, m, gradient=True) for edge in gradients)]


def _makes(program: Program, action: Action) -> list[str]:
    m = action.microbatch
    if action.receives:
        return [_value(action.edge, m, gradient=action.kind is Kind.RECV_GRAD)]
    if action.kind not in COMPUTES:
        return []
    stage = program.stages[action.stage]
    edges = {Kind.FORWARD: _of(stage.forward_outputs, "edge"), Kind.BACKWARD: _of(stage.backward_outputs, "edge")}.get(action.kind, [])
    return [f"`{action}`", *(_value(edge, m, gradient=action.kind is Kind.BACKWARD) for edge in edges)]


def _of(bindings: Sequence[Binding], kind: str) -> list[str]:
    return [binding.name for binding in bindings if binding.kind == kind]


def _passed_on(where: str, before: str, does: str, giver: fx.Graph, others: int, after: str, taker: fx.Graph, count: int) -> None:
    """What one graph returns behind its own results, `others` of them, is what the next takes first, `count` of it."""
    given, taken = _returned(giver)[others:], _placeholders(taker)[:count]
    if len(given) != count or len(taken) != count:
        raise CheckError(f"{where}: the {before} graph {does} {len(given)} values, the {after} graph takes {len(taken)} of {count}")
    for number, (one, other) in enumerate(zip(given, taken, strict=True)):
        if _described(one) != _described(other):
            what = f"{'saved' if does == 'saves' else 'kept'} value {number}"
            raise CheckError(f"{where}: {what} is {_text(one)} where it is made, {_text(other)} where it is read")


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _returned(graph: fx.Graph) -> list[fx.Node | None]:
    return list(graph.output_node().args[0])  # type: ignore[arg-type]


def _described(node: fx.Node | None) -> tuple[tuple[int, ...], torch.dtype] | None:
    return None if node is None else (tuple(node.meta["val"].shape), node.meta["val"].dtype)


def _text(node: fx.Node | None) -> str:
    return "nothing" if node is None else _tensor_text(*_described(node))  # type: ignore[misc]


def _tensor_text(shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


# -- all ranks -----------------------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Whole:
    programs: Mapping[int, Program]
    assignment: Assignment
    cut: Cut

    def __post_init__(self) -> None:
        self.graph = self.assignment.graph
        self.readers = self.graph.consumers()
        self.mesh = self.assignment.mesh
        self.pipes = max((program.mesh["pp"] for program in self.programs.values()), default=0)

    def ranks(self) -> None:
        """There is one program for each place, and its number is the place's."""
        places = Places.of(self.assignment, self.pipes)
        each = places.dp * places.cp * places.tp
        count = each * self.pipes
        if missing := [rank for rank in range(count) if rank not in self.programs]:
            raise CheckError(f"rank {missing[0]} of {count} has no program")
        for rank, program in self.programs.items():
            pipe, place = divmod(rank, each)
            expected = places.coordinates(places.place(place)) | {"pp": pipe}
            if program.rank != rank or dict(program.coordinates) != expected:
                raise CheckError(f"rank {rank} must be at {expected}, its program is rank {program.rank}'s at {dict(program.coordinates)}")
            own = [stage for stage, home in enumerate(program.placement) if home == pipe]
            if len(program.placement) != self.cut.stages or program.placement != self.programs[0].placement or [*program.stages] != own:
                raise CheckError(
                    f"rank {rank} has {program.where} and says that the stages are on the pipeline's ranks {list(program.placement)}; "
                    f"rank 0 says {list(self.programs[0].placement)}, and there are {self.cut.stages} stages"
                )

    def buffers(self) -> None:
        """No rank reads what another one changes."""
        for placement in {program.placement for program in self.programs.values()}:
            if far := far_buffer(self.graph, self.cut.stage_of, placement):
                raise CheckError(f"{far}, which would not see the change; cut the stages so that one rank has both")

    # -- parameters ------------------------------------------------------------------------------------------------------------------------

    def parameters(self) -> None:
        for program in self.programs.values():
            self.own_parts(program)
        for value in (*self.graph.parameters.values(), *self.graph.buffers.values()):
            for stage in self._stages_of(value):
                members = [program for program in self.programs.values() if stage in program.stages]
                _tiles(value, [_part_of(program, value) for program in members], members, self.mesh, stage)
                _divided(value, [_part_of(program, value) for program in members], members)

    def own_parts(self, program: Program) -> None:
        """A rank's parts are those that its operators read, in the types that these have."""
        for kind, group in (("parameter", self.graph.parameters), ("buffer", self.graph.buffers)):
            held = {each.name: each for each in (program.parameters if kind == "parameter" else program.buffers)}
            for name, value in group.items():
                if reading := sorted(set(self._stages_of(value)) & set(program.stages)):
                    if name not in held:
                        raise CheckError(f"rank {program.rank} holds no part of {kind} {name}, which stage {reading[0]} reads")
                    self._own_part(program, value, held[name])

    def _own_part(self, program: Program, value: Value, held: ParameterPart) -> None:
        if held.dtype != value.dtype or held.shape != value.shape:
            is_, should = _tensor_text(held.shape, held.dtype), _tensor_text(value.shape, value.dtype)
            raise CheckError(f"rank {program.rank} holds a part of {value.name} as {is_}, the model has {should}")
        made = self.assignment.produced(value)
        if dict(held.type) != made:
            raise CheckError(f"rank {program.rank} keeps {value.name} as {_type_text(held.type)}, the assignment says {_type_text(made)}")
        expected = local_shape(value.shape, held.type, self.mesh, _coordinates(program))
        if held.local != expected:
            raise CheckError(
                f"rank {program.rank} holds {list(held.local)} of {value.name} {list(value.shape)}; "
                f"as {_type_text(held.type)} it must hold {list(expected)}"
            )
        self._pending(program, value, held)

    def _pending(self, program: Program, value: Value, held: ParameterPart) -> None:
        """Gradients that are summands are reduced, over axes and between tied stages."""
        pending = (
            {axis for axis, kept in held.type.items() if kept == R and axis != "mb" and self.mesh[axis] > 1}
            if value.requires_grad
            else set()
        )
        if set(held.reduce) != pending:
            raise CheckError(
                f"rank {program.rank} sums the gradient of {value.name} over {_names(held.reduce)}; "
                f"kept as {_type_text(held.type)} it is pending over {_names(pending)}"
            )
        stages = self._stages_of(value)
        if value.kind == "parameter" and tuple(held.stages) != stages:
            raise CheckError(
                f"rank {program.rank} ties {value.name} between stages {list(held.stages)}; its operators are in stages {list(stages)}"
            )

    def _stages_of(self, value: Value) -> tuple[int, ...]:
        return tuple(sorted({self.cut.stage_of[op] for op, _ in self.readers[value] if op in self.cut.stage_of}))

    # -- edges -----------------------------------------------------------------------------------------------------------------------------

    def edges(self) -> None:
        for program in self.programs.values():
            transfers = {(action.edge, action.peer): action for action in program.actions if action.sends or action.receives}
            for action in transfers.values():
                self._both_ends(program, action)
        for program in self.programs.values():
            self.own_edges(program)

    def _both_ends(self, program: Program, action: Action) -> None:
        mine, theirs = _edge_of(program, action.edge), self._far_edge(program, action)
        if mine != theirs:
            raise CheckError(
                f"edge {action.edge}: rank {program.rank} has it as {_edge_text(mine)}, rank {action.peer} as {_edge_text(theirs)}"
            )

    def _far_edge(self, program: Program, action: Action) -> Edge:
        if action.peer not in self.programs:
            raise CheckError(f"rank {program.rank} performs `{action}`, but there are {len(self.programs)} ranks")
        return _edge_of(self.programs[action.peer], action.edge)

    def own_edges(self, program: Program) -> None:
        """A rank's edges are those that its stage needs, and its graphs make and read what they say."""
        expected = {f"{value.name}→{target}": (value, target) for value, target in self._crossing(program.stages)}
        edges = {edge.name: edge for edge in program.edges}
        for name, (value, target) in expected.items():
            if name not in edges:
                raise CheckError(f"rank {program.rank} has no edge {name}, although {value.name} is made in one stage and read in another")
            type_ = edge_type(self.assignment, self.cut.stage_of, self.readers[value], value, target)
            shape = local_shape(value.shape, type_, self.mesh, _coordinates(program))
            edge = edges[name]
            if (edge.shape, edge.dtype) != (shape, value.dtype):
                is_, made = _tensor_text(edge.shape, edge.dtype), _type_text(type_)
                raise CheckError(
                    f"edge {name} on rank {program.rank} is {is_}; {value.name} is sent as {_tensor_text(shape, value.dtype)} ({made})"
                )
        if extra := sorted(set(edges) - set(expected)):
            raise CheckError(f"rank {program.rank} has an edge {extra[0]} that no operator of its stage reads or makes")
        for name, node, what in _ends(program):
            if name not in edges:
                raise CheckError(f"rank {program.rank} {what} {name}, which is no edge of its")
            if node is not None and _described(node) != (edges[name].shape, edges[name].dtype):
                raise CheckError(f"edge {name}: rank {program.rank} {what} {_text(node)}, the edge is {_edge_text(edges[name])}")

    def _crossing(self, stages: Container[int]) -> Iterator[tuple[Value, int]]:
        """Every value that goes from or to one of the stages, and where it goes."""
        for value, readers in self.readers.items():
            source = self.cut.stage_of.get(value.producer) if value.producer is not None else None
            if source is not None:
                targets = {self.cut.stage_of[op] for op, _ in readers if op in self.cut.stage_of} - {source}
                yield from ((value, target) for target in targets if source in stages or target in stages)


def _ends(program: Program) -> Iterator[tuple[str, fx.Node | None, str]]:
    """Every edge's value and gradient in the graphs of a rank."""
    for stage in program.stages.values():
        sides: list[tuple[Sequence[Binding], Sequence[Any], str]] = [
            (stage.forward_inputs, _placeholders(stage.forward), "reads"),
            (stage.forward_outputs, _returned(stage.forward)[: len(stage.forward_outputs)], "makes"),
            (stage.backward_inputs, _placeholders(stage.backward)[stage.saved :], "reads as gradient"),
            (stage.backward_outputs, _returned(stage.backward)[: len(stage.backward_outputs)], "makes as gradient"),
        ]
        for bindings, nodes, what in sides:
            for binding, node in zip(bindings, nodes, strict=True):
                if binding.kind == "edge":
                    yield binding.name, node, what


def _edge_of(program: Program, name: str) -> Edge:
    for edge in program.edges:
        if edge.name == name:
            return edge
    raise CheckError(f"rank {program.rank} has no edge {name}, which another rank sends to it or awaits from it")


def _edge_text(edge: Edge) -> str:
    gradient = "" if edge.requires_grad else " without gradient"
    return f"{_tensor_text(edge.shape, edge.dtype)}{gradient} from stage {edge.source} to {edge.target}"


# -- tiling --------------------------------------------------------------------------------------------------------------------------------


def _tiles(value: Value, parts: Sequence[ParameterPart], members: Sequence[Program], mesh: Mapping[str, int], stage: int) -> None:
    """The different pieces that the ranks of a stage hold are disjoint and together the whole."""
    pieces: dict[Piece, int] = {}
    for held, program in zip(parts, members, strict=True):
        pieces.setdefault(_piece(held, program, mesh), program.rank)
    for (one, rank), (other, other_rank) in combinations(pieces.items(), 2):
        if all(_overlap(a, b) for a, b in zip(one, other, strict=True)):
            raise CheckError(
                f"ranks {rank} and {other_rank} hold overlapping, unlike parts of {value.name}: {_piece_text(one)} and {_piece_text(other)}"
            )
    covered = sum(prod(blocks * (stop - start) for blocks, start, stop in piece) for piece in pieces)
    if covered != value.numel:
        held_by = ", ".join(f"rank {rank} {_piece_text(piece)}" for piece, rank in pieces.items())
        raise CheckError(f"the ranks of stage {stage} hold {covered} of the {value.numel} elements of {value.name}: {held_by}")


def _divided(value: Value, parts: Sequence[ParameterPart], members: Sequence[Program]) -> None:
    """The ranks of each group that divides a part hold disjoint pieces of it, in their order and together all of it."""
    groups: dict[str, dict[int, tuple[Division, ParameterPart]]] = {}
    for held, program in zip(parts, members, strict=True):
        if held.division is not None:
            groups.setdefault(held.division.group, {})[program.rank] = held.division, held
    for group, found in groups.items():
        ranks = group_ranks(group)
        places = [found[rank][0].rank if rank in found else None for rank in ranks]
        if places != list(range(len(ranks))) or set(found) != set(ranks):
            raise CheckError(f"the ranks of {group} divide {value.name}, as numbers {places}; they must be 0 to {len(ranks) - 1}")
        if len({(division.dim, division.ranks, held.local, held.zero) for division, held in found.values()}) > 1:
            ways = [f"rank {rank} dim {d.dim} of {list(h.local)} among {d.ranks}" for rank, (d, h) in found.items()]
            raise CheckError(f"the ranks of {group} divide {value.name} in unlike ways: {', '.join(ways)}")


def _piece(held: ParameterPart, program: Program, mesh: Mapping[str, int]) -> Piece:
    coordinates = _coordinates(program)
    splits: dict[int, list[tuple[Shard, int, int]]] = {}
    for axis, placement in held.type.items():
        if isinstance(placement, Shard):
            splits.setdefault(placement.dim, []).append((placement, mesh[axis], coordinates[axis]))
    return tuple(_range(size, tuple(splits.get(dim, ()))) for dim, size in enumerate(held.shape))


@cache
def _range(size: int, splits: tuple[tuple[Shard, int, int], ...]) -> tuple[int, int, int]:
    """(blocks, first, last) of what one rank has of a dim."""
    if not splits:
        return 1, 0, size
    mine, start = part(size, *splits[0]), 0
    for inner in splits[1:]:
        assert mine.blocks == inner[0].blocks == 1, "parts of blocks are not split further"
        start += mine.start
        mine = part(mine.length, *inner)
    return mine.blocks, start + mine.start, start + mine.stop


def _overlap(one: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    return one[0] != other[0] or max(one[1], other[1]) < min(one[2], other[2])


def _piece_text(piece: Piece) -> str:
    return (
        "[" + ", ".join(f"{start}:{stop}" + (f" in each of {blocks} blocks" if blocks > 1 else "") for blocks, start, stop in piece) + "]"
    )


def _part_of(program: Program, value: Value) -> ParameterPart:
    return next(each for each in (*program.parameters, *program.buffers) if each.name == value.name)


def _coordinates(program: Program) -> dict[str, int]:
    return dict(program.coordinates) | {"mb": 0}


def _type_text(type_: Mapping[str, Placement]) -> str:
    return ", ".join(f"{placement!r} on {axis}" for axis, placement in type_.items() if axis != "mb")


def _names(axes: Any) -> str:
    return " and ".join(sorted(axes)) or "no axis"
