"""What a rank holds at its peak: bytes, by liveness on its graphs and by how many microbatches are in flight."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import prod

import torch
from torch import fx

from shardwise.cost.memory import bases, liveness, tensor_bytes
from shardwise.program.actions import COMPUTES, Kind
from shardwise.program.program import ParameterPart, Program, StageProgram
from shardwise.program.reductions import Reduction, Regathering, reductions, regatherings
from shardwise.program.tables import Slot, in_flight

__all__ = [
    "OPTIMIZER_STATES",
    "MemoryUse",
    "Passed",
    "StageMemory",
    "kept_values",
    "memory_use",
    "own_parameters",
    "saved_values",
    "stage_memory",
]

OPTIMIZER_STATES = {"adamw": 2, "adam": 2, "sgd": 0, "sgd_momentum": 1}


# Memory that freed tensors leave with the allocator, the transport's buffers and the program's own objects: measured peaks less the
# tensors' own, on a CPU with glibc and gloo (GPT-2, Llama and ViT steps of 130 to 1,550 MiB were 35 to 60 MiB above).
_RUNTIME_BYTES = 40 * 2**20


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes of a rank at its peak."""

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    saved: int
    transient: int
    runtime: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.buffers + self.saved + self.transient + self.runtime

    def by_kind(self) -> dict[str, int]:
        return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes of one of a rank's stages.

    use: at the peak, without what microbatches in flight keep; saved_bytes: that one microbatch keeps from its forward to its backward
    pass; kept_bytes: from there to the weights' part of it, where that is apart.
    """

    use: MemoryUse
    saved_bytes: int
    kept_bytes: int


def memory_use(program: Program, optimizer: str) -> MemoryUse:
    """The peak of a rank, by liveness on its graphs and by how many microbatches are in flight."""
    stages = stage_memory(program, optimizer)
    uses = [stage.use for stage in stages.values()]
    summed = {kind: sum(getattr(use, kind) for use in uses) for kind in ("parameters", "gradients", "optimizer", "buffers")}
    shared = {kind: max(getattr(use, kind) for use in uses) for kind in ("transient", "runtime")}
    return MemoryUse(**summed, **shared, saved=_flying_bytes(program, stages))


def _flying_bytes(program: Program, stages: Mapping[int, StageMemory]) -> int:
    """The most that microbatches in flight keep."""
    row = [Slot(action.kind, action.stage, action.microbatch) for action in program.actions if action.kind in COMPUTES]
    saved, kept = ({number: getattr(stage, name) for number, stage in stages.items()} for name in ("saved_bytes", "kept_bytes"))
    return in_flight([row], saved, kept)[0]


def stage_memory(program: Program, optimizer: str) -> dict[int, StageMemory]:
    """Of each stage of a rank; a parameter that several of them read counts with the first."""
    found: dict[int, StageMemory] = {}
    for number, parameters in own_parameters(program).items():
        stage = program.stages[number]
        trained = [p for p in parameters if p.requires_grad]
        transient, saved, kept = _passes(stage)
        use = MemoryUse(
            parameters=sum(_bytes(p, p.stored, p.stored_dtype) for p in parameters)
            + sum(_bytes(p, p.updated) for p in trained if p.has_copy)
            + _copied_bytes([p for p in trained if not p.has_copy], zero=(1, 2)),
            gradients=sum(_bytes(p, p.gradient) for p in trained) + _copied_bytes(trained, zero=(1,)),
            optimizer=OPTIMIZER_STATES.get(optimizer, 2) * sum(_bytes(p, p.updated) for p in trained),
            buffers=sum(_bytes(p, p.local) for p in stage.buffers) + _crossing_bytes(stage),
            saved=0,
            transient=transient,
            runtime=_RUNTIME_BYTES,
        )
        found[number] = StageMemory(use=use, saved_bytes=saved, kept_bytes=kept)
    return _with_update(program, found)


def _with_update(program: Program, stages: dict[int, StageMemory]) -> dict[int, StageMemory]:
    """The update needs twice the largest part, and what is sent around it a message, when no microbatch is in flight any more."""
    flying, message = _flying_bytes(program, stages), _message_bytes(program)
    for number, parameters in own_parameters(program).items():
        largest = max((_bytes(p, p.updated) for p in parameters if p.requires_grad), default=0)
        use = stages[number].use
        stages[number] = replace(stages[number], use=replace(use, transient=max(use.transient, max(2 * largest, message) - flying)))
    return stages


def _passes(stage: StageProgram) -> tuple[int, int, int]:
    """(the most that a graph holds beside what is saved, bytes that forward saves, bytes that backward keeps for the weights' part)."""
    saved = saved_values(stage)
    peaks = [liveness(stage.forward).peak_bytes - saved.nbytes, _peak_after(stage.backward, saved, _sunk(stage, Kind.BACKWARD)), 0]
    if stage.weight is None:
        return max(peaks), saved.nbytes, 0
    kept = kept_values(stage, saved)
    return max(*peaks, _peak_after(stage.weight, kept, _sunk(stage, Kind.WEIGHT))), saved.nbytes, kept.nbytes


def _sunk(stage: StageProgram, kind: Kind) -> set[fx.Node]:
    """Parameters' gradients, which go into their buffers."""
    return set(stage.gradients(kind).values())


def _peak_after(graph: fx.Graph, passed: Passed, sunk: Collection[fx.Node] = ()) -> int:
    """The most that a graph holds beside what was passed to it, which it frees. sunk: outputs that are added to buffers as soon as they are
    made (gradients of parameters) and not held to the end."""
    held = [node for node in graph.output_node().all_input_nodes if node not in sunk]
    return liveness(graph, lambda node: passed.sizes.get(node, 0), passed.aliases, keeps=held).peak_bytes


def saved_values(stage: StageProgram) -> Passed:
    """What forward leaves for backward: parameters and what else lasts counts nothing."""
    lasting = {node: 0 for node, each in zip(_placeholders(stage.forward), stage.forward_inputs, strict=True) if each.kind != "edge"}
    given = Passed(aliases={}, sizes=lasting)
    return _passed_on(stage.forward, len(stage.forward_outputs), given, _placeholders(stage.backward)[: stage.saved])


def kept_values(stage: StageProgram, saved: Passed) -> Passed:
    """What backward leaves for the weights' part of it."""
    assert stage.weight is not None
    return _passed_on(stage.backward, len(stage.backward_outputs), saved, _placeholders(stage.weight))


@dataclass(frozen=True, kw_only=True)
class Passed:
    """What one graph leaves for the next. aliases: of the next one's inputs, those that share memory with an earlier one, and with which;
    sizes: bytes of the others, 0 for what is kept in any case."""

    aliases: dict[fx.Node, fx.Node]
    sizes: dict[fx.Node, int]

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())


def _passed_on(graph: fx.Graph, others: int, given: Passed, takers: Sequence[fx.Node]) -> Passed:
    """others: how many results the graph has before those that it leaves; given: what is known of its inputs; takers: the next one's."""
    base = bases(graph, given.aliases)
    left: list[fx.Node] = list(graph.output_node().args[0])[others:]  # type: ignore[arg-type]
    first: dict[fx.Node, fx.Node] = {}
    aliases: dict[fx.Node, fx.Node] = {}
    sizes: dict[fx.Node, int] = {}
    for node, taker in zip(left, takers, strict=True):
        owner = base[node]
        if owner in first:
            aliases[taker] = first[owner]
        else:
            first[owner] = taker
            sizes[taker] = given.sizes.get(owner, tensor_bytes(owner.meta.get("val")))
    return Passed(aliases=aliases, sizes=sizes)


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _crossing_bytes(stage: StageProgram) -> int:
    return sum(tensor_bytes(node.meta.get("val")) for node in stage.prelude.output_node().all_input_nodes)


def _bytes(part: ParameterPart, shape: Sequence[int], dtype: torch.dtype | None = None) -> int:
    """dtype: by default that of gradients and of what is updated."""
    return prod(shape) * (dtype or part.wide).itemsize


def _copied_bytes(trained: Sequence[ParameterPart], zero: tuple[int, ...]) -> int:
    """Of the rank's parts that are no run of memory in the whole and lie by themselves, where the whole is there too."""
    copied = [p for p in trained if p.division is not None and p.zero in zero and prod(p.local[: p.division.dim]) > 1]
    return sum(_bytes(p, p.updated) for p in copied)


def _message_bytes(program: Program) -> int:
    """The largest message at the end of a step that reduces to parts or gathers: what is received, and what is put together to be sent."""
    scattered = [reduction.nbytes * (1 if _in_place(reduction) else 2) for reduction in reductions(program) if reduction.scatter]
    gathered = [message.nbytes * (1 if _in_place(message) else 2) for message in regatherings(program)]
    return max([*scattered, *gathered], default=0)


def _in_place(message: Reduction | Regathering) -> bool:
    """Whether it is sent from where it is: one parameter whose parts are runs of memory."""
    return len(message.parameters) == 1 and prod(message.parameters[0].local[: message.divisions[0].dim]) == 1


def own_parameters(program: Program) -> dict[int, list[ParameterPart]]:
    """Stage of a rank → its parameters, without those that an earlier stage of the rank has, too."""
    seen: set[str] = set()
    found: dict[int, list[ParameterPart]] = {}
    for number, stage in program.stages.items():
        found[number] = [part for part in stage.parameters if part.name not in seen]
        seen |= {part.name for part in found[number]}
    return found
