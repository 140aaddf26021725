"""What a rank holds at its peak: bytes, by liveness on its graphs and by how many microbatches are in flight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import prod

import torch

from shardwise.cost.memory import tensor_bytes
from shardwise.program.actions import COMPUTES, Kind
from shardwise.program.program import ParameterPart, Program, StageProgram
from shardwise.program.tables import Slot, in_flight
from shardwise.simulate.messages import reducing_bytes, regathering_bytes
from shardwise.simulate.passes import Passes

__all__ = [
    "OPTIMIZER_STATES",
    "RUNTIME_BYTES",
    "MemoryUse",
    "StageMemory",
    "memory_use",
    "own_parameters",
    "stage_memory",
]

OPTIMIZER_STATES = {"adamw": 2, "adam": 2, "sgd": 0, "sgd_momentum": 1}


# What a process takes beside its tensors: measured peaks less the tensors' own, on a CPU with glibc and gloo (benchmarks/step_time.py: GPT,
# Llama, ViT, BERT, U-Net and Mixtral steps of 190 to 2,000 MiB at dp=2, tp=2 and pp=2, one or several microbatches, in six schedules). Its
# own objects and the transport's buffers; and holes that the allocator has between tensors which passes make and free, too small for the
# next. Where microbatches pass the loss one after the other each finds the holes of the one before: 13 to 38 % of what passes hold (with
# mixtures of experts up to 54), else 3 to 18 (up to 43; a U-Net in stages now and then over 100).
RUNTIME_BYTES = 40 * 2**20
_HOLES = 0.10  # of what passes hold
_HOLES_OF_SEVERAL = 0.22


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


def _row(program: Program) -> list[Slot]:
    return [Slot(action.kind, action.stage, action.microbatch) for action in program.actions if action.kind in COMPUTES]


def _flying_bytes(program: Program, stages: Mapping[int, StageMemory]) -> int:
    """The most that microbatches in flight keep."""
    row = _row(program)
    saved, kept = ({number: getattr(stage, name) for number, stage in stages.items()} for name in ("saved_bytes", "kept_bytes"))
    return in_flight([row], saved, kept)[0]


def stage_memory(program: Program, optimizer: str) -> dict[int, StageMemory]:
    """Of each stage of a rank; a parameter that several of them read counts with the first."""
    found: dict[int, StageMemory] = {}
    passes = {number: Passes(stage=stage) for number, stage in program.stages.items()}
    for number, parameters in own_parameters(program).items():
        stage = program.stages[number]
        trained = [p for p in parameters if p.requires_grad]
        use = MemoryUse(
            parameters=sum(_bytes(p, p.stored, p.stored_dtype) for p in parameters)
            + sum(_bytes(p, p.updated) for p in trained if p.has_copy)
            + _copied_bytes([p for p in trained if not p.has_copy], zero=(1, 2)),
            gradients=sum(_bytes(p, p.gradient) for p in trained) + _copied_bytes(trained, zero=(1,)),
            optimizer=OPTIMIZER_STATES.get(optimizer, 2) * sum(_bytes(p, p.updated) for p in trained),
            buffers=sum(_bytes(p, p.local) for p in stage.buffers) + _crossing_bytes(stage),
            saved=0,
            transient=max(passes[number].working_bytes(kind) for kind in COMPUTES if kind in stage.graphs),
            runtime=0,
        )
        found[number] = StageMemory(use=use, saved_bytes=passes[number].saved.nbytes, kept_bytes=passes[number].kept.nbytes)
    return _with_messages(program, found, passes)


def _with_messages(program: Program, stages: dict[int, StageMemory], passes: Mapping[int, Passes]) -> dict[int, StageMemory]:
    """What is held while messages are under way, most of it when fewer microbatches are in flight than at the peak, and around the update,
    when none is. The update itself holds nothing: torch's optimizers run as one kernel over each parameter. And holes between all these."""
    flying = _flying_bytes(program, stages)
    late = max(reducing_bytes(program, passes), regathering_bytes(program)) - flying
    transient = {number: max(stage.use.transient, late) for number, stage in stages.items()}
    share = _HOLES_OF_SEVERAL if _ends_several(program) else _HOLES
    runtime = RUNTIME_BYTES + int(share * (flying + max(transient.values())))
    return {
        number: replace(stage, use=replace(stage.use, transient=transient[number], runtime=runtime)) for number, stage in stages.items()
    }


def _ends_several(program: Program) -> bool:
    """Whether the rank has the stage with the loss, and microbatches begin there when others have ended."""
    ended = False
    for slot in _row(program):
        if any(binding.kind == "loss" for binding in program.stages[slot.stage].forward_outputs):
            if slot.kind is Kind.FORWARD and ended:
                return True
            ended |= slot.kind is not Kind.FORWARD
    return False


def _crossing_bytes(stage: StageProgram) -> int:
    return sum(tensor_bytes(node.meta.get("val")) for node in stage.prelude.output_node().all_input_nodes)


def _bytes(part: ParameterPart, shape: Sequence[int], dtype: torch.dtype | None = None) -> int:
    """dtype: by default that of gradients and of what is updated."""
    return prod(shape) * (dtype or part.wide).itemsize


def _copied_bytes(trained: Sequence[ParameterPart], zero: tuple[int, ...]) -> int:
    """Of the rank's parts that are no run of memory in the whole and lie by themselves, where the whole is there too."""
    copied = [p for p in trained if p.division is not None and p.zero in zero and prod(p.local[: p.division.dim]) > 1]
    return sum(_bytes(p, p.updated) for p in copied)


def own_parameters(program: Program) -> dict[int, list[ParameterPart]]:
    """Stage of a rank → its parameters, without those that an earlier stage of the rank has, too."""
    seen: set[str] = set()
    found: dict[int, list[ParameterPart]] = {}
    for number, stage in program.stages.items():
        found[number] = [part for part in stage.parameters if part.name not in seen]
        seen |= {part.name for part in found[number]}
    return found
