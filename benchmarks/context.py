"""What a contestant is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from benchmarks.workloads import Batch, Workload

StepFunction = Callable[[Batch], float | None]
"""Takes one optimizer step on the *global* batch; returns the mean loss of this rank's part, or None if it has none.
The parts are equal, so the mean over the ranks that have one is the global loss."""


@runtime_checkable
class Recording(Protocol):
    """A step function that can say more."""

    def __call__(self, batch: Batch) -> float | None:
        """As of `StepFunction`."""

    def actions(self) -> Mapping[str, float]:
        """What each kind of action took in the last step, s."""


@dataclass(frozen=True, kw_only=True)
class RankContext:
    """One rank's place: `plan_path` is the saved plan for ours, and None for the peers."""

    rank: int
    world_size: int
    workload: Workload
    plan_path: Path | None = None

    def part(self, batch: Batch) -> Batch:
        """Return this rank's slice of the global batch."""
        return {name: value.chunk(self.world_size)[self.rank] for name, value in batch.items()}


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to train the model: `builder` is `module:function`, called in each rank with its context."""

    name: str
    title: str
    builder: str
    ranks: int = 2
    threads: int = 1
    is_peer: bool = True


OURS = "ours"
CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant(name=OURS, title="shardwise", builder="benchmarks.ours:build", is_peer=False),
        Contestant(name="ddp", title="torch DDP", builder="benchmarks.peers:ddp"),
        Contestant(name="fsdp2", title="torch FSDP2", builder="benchmarks.peers:fsdp2"),
        Contestant(name="tp", title="torch tensor-parallel", builder="benchmarks.peers:tensor_parallel"),
        Contestant(name="1f1b", title="torch 1F1B pipeline", builder="benchmarks.peers:pipeline"),
        Contestant(name="single", title="one process, 2 threads", builder="benchmarks.peers:single", ranks=1, threads=2, is_peer=False),
    )
}
