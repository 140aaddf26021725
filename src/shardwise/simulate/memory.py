"""What a rank holds at its peak: bytes, by what its steps ask an allocator for and how a heap answers that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod

import torch

from shardwise.cost.heap import Heap
from shardwise.cost.memory import most_bytes, tensor_bytes
from shardwise.program.actions import COMPUTES
from shardwise.program.program import ParameterPart, Program, StageProgram
from shardwise.program.tables import Slot, in_flight
from shardwise.simulate.passes import Passes
from shardwise.simulate.requests import step_requests

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


# What a process takes beside what it asks for, on a CPU with glibc and gloo (measured: benchmarks/predicted_memory.py): its own objects and
# the transport's buffers, and holes that small blocks keep apart, which last between tensors.
RUNTIME_BYTES = 36 * 2**20
_APART = 0.05  # of what the heap has for passes and messages
_STEPS = 2  # that are played: the first leaves its heap to the second, which leaves it as it found it


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
    saved, kept = ({number: getattr(stage, name) for number, stage in stages.items()} for name in ("saved_bytes", "kept_bytes"))
    return MemoryUse(**summed, **shared, saved=_flying_bytes(program, saved, kept))


def _flying_bytes(program: Program, saved: Mapping[int, int], kept: Mapping[int, int]) -> int:
    """The most that microbatches in flight keep. saved, kept: by stage, as of `StageMemory`."""
    row = [Slot(action.kind, action.stage, action.microbatch) for action in program.actions if action.kind in COMPUTES]
    return in_flight([row], saved, kept)[0]


def stage_memory(program: Program, optimizer: str) -> dict[int, StageMemory]:
    """Of each stage of a rank; a parameter that several of them read counts with the first."""
    found: dict[int, StageMemory] = {}
    passes = {number: Passes(stage=stage) for number, stage in program.stages.items()}
    saved, kept = ({number: getattr(each, name).nbytes for number, each in passes.items()} for name in ("saved", "kept"))
    transient, holes = _played(program, passes, _flying_bytes(program, saved, kept))
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
            transient=transient,
            runtime=RUNTIME_BYTES + holes,
        )
        found[number] = StageMemory(use=use, saved_bytes=saved[number], kept_bytes=kept[number])
    return found


def _played(program: Program, passes: Mapping[int, Passes], flying: int) -> tuple[int, int]:
    """Of a rank's steps, the most that passes and messages hold beside what microbatches in flight keep, and the holes that the heap has
    beside all these. The update itself holds nothing: torch's optimizers run as one kernel over each parameter."""
    asked, heap = step_requests(program, passes), Heap()
    for _ in range(_STEPS):
        heap.play(asked)
    most = most_bytes(asked)
    return max(0, most - flying), int((1 + _APART) * heap.peak_bytes) - most


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
