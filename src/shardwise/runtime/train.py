"""The training loop that `shardwise train` and the demo run on each rank."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from shardwise.environment import rank_environment
from shardwise.runtime.data import ByteText
from shardwise.runtime.executor import Event
from shardwise.runtime.launch import launch
from shardwise.runtime.memory import PeakMemory
from shardwise.runtime.preload import preload
from shardwise.runtime.progress import TrainingDisplay

if TYPE_CHECKING:
    from shardwise import Plan

__all__ = ["WAIT_S", "RankResult", "RecordedAction", "Settings", "TrainingRun", "train", "train_rank"]

_TRIAL_STEPS = 6  # after these it is known how many more can be afforded
_WARM_UP_STEPS = 2  # their times are not typical: memory is taken and connections are made
WAIT_S = 300.0  # a collective, send or receive may take so long

Build = Callable[[], nn.Module]
RecordedAction = tuple[
    str, int, int, str, int, float, float
]  # kind, stage, microbatch, edge, peer, start and end in seconds of time.perf_counter


class Job(Protocol):
    """What the loop needs of `parallelize`'s result. events: the last step's actions."""

    @property
    def events(self) -> list[Event]: ...

    def step(self, batch: dict[str, torch.Tensor]) -> float:
        """One optimizer step on the global batch; the loss."""

    def eval(self, batch: dict[str, torch.Tensor]) -> float:
        """The loss on the global batch, nothing changed."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """steps: optimizer steps, fewer where they would take more than most_s seconds; batch_size: sequences in the global batch;
    shown: whether rank 0 displays progress; weights: files to begin from, as of `parallelize`.
    """

    steps: int
    batch_size: int
    learning_rate: float = 1e-3
    most_s: float | None = None
    seed: int = 0
    shown: bool = True
    weights: Path | None = None


@dataclass(frozen=True, kw_only=True)
class RankResult:
    """What one rank saw. Losses are equal on all ranks; the held-out ones are means over one batch of held-out text.

    actions: of the last step, plain so that they travel between processes.
    """

    rank: int
    losses: list[float]
    step_times_s: list[float]
    peak_memory_bytes: int
    held_out_before: float
    held_out_after: float
    actions: list[RecordedAction] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """The ranks' results as one.

    memory_bytes: peak of each rank; step_time_s: median, of the slowest rank in each step; actions: of the last step, for each rank.
    """

    losses: list[float]
    held_out_before: float
    held_out_after: float
    step_times_s: list[float]
    memory_bytes: list[int]
    actions: list[list[RecordedAction]] = field(default_factory=list)
    step_time_s: float = field(init=False)

    def __post_init__(self) -> None:
        typical = self.step_times_s[_WARM_UP_STEPS:] or self.step_times_s
        object.__setattr__(self, "step_time_s", statistics.median(typical))

    @classmethod
    def of(cls, results: Sequence[RankResult]) -> TrainingRun:
        """Of the results of all ranks."""
        first = results[0]
        return cls(
            losses=first.losses,
            held_out_before=first.held_out_before,
            held_out_after=first.held_out_after,
            step_times_s=[max(times) for times in zip(*(result.step_times_s for result in results), strict=True)],
            memory_bytes=[result.peak_memory_bytes for result in results],
            actions=[result.actions for result in results],
        )


def train(build: Build, *, plan: Plan, ranks: int, text: ByteText, settings: Settings, port: int = 0) -> TrainingRun:
    """Train on `ranks` local ranks that this process starts. Raises RankFailed with the first failing rank's error."""
    results = launch(train_rank, (build, plan, text, settings), ranks=ranks, timeout_s=WAIT_S, port=port)
    return TrainingRun.of(results)


def train_rank(build: Build, plan: Plan, text: ByteText, settings: Settings) -> RankResult:
    """One rank's part, inside a process group."""
    import shardwise as sw

    place = rank_environment()
    assert place is not None, "train_rank runs on a rank"
    preload()
    memory = PeakMemory()
    torch.manual_seed(settings.seed)
    held_out = text.held_out_batch(size=settings.batch_size)
    job = sw.parallelize(build, held_out, plan=plan, optimizer=_adamw(settings.learning_rate), weights=settings.weights)
    before = job.eval(held_out)
    losses, times = _loop(job, text, settings, shown=settings.shown and place.rank == 0)
    actions = [_recorded(event) for event in job.events]
    return RankResult(
        rank=place.rank,
        losses=losses,
        step_times_s=times,
        peak_memory_bytes=memory.peak_bytes(),
        held_out_before=before,
        held_out_after=job.eval(held_out),
        actions=actions,
    )


def _recorded(event: Event) -> RecordedAction:
    action = event.action
    return action.kind.value, action.stage, action.microbatch, action.edge, action.peer, event.start_s, event.end_s


def _adamw(learning_rate: float) -> Callable[[object], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=learning_rate)  # type: ignore[arg-type]


def _loop(job: Job, text: ByteText, settings: Settings, *, shown: bool) -> tuple[list[float], list[float]]:
    losses: list[float] = []
    times: list[float] = []
    with TrainingDisplay(steps=settings.steps, tokens_per_step=settings.batch_size * text.sequence, shown=shown) as display:
        steps = settings.steps
        for step in range(settings.steps):
            if step == _TRIAL_STEPS and settings.most_s is not None:
                steps = _affordable_steps(settings, sum(times))
                display.expect(steps)
            if step >= steps:
                break
            batch = text.batch(step, size=settings.batch_size, seed=settings.seed)
            started = time.perf_counter()
            losses.append(job.step(batch))
            times.append(time.perf_counter() - started)
            display.update(step + 1, losses[-1], times[-1])
    return losses, times


def _affordable_steps(settings: Settings, taken_s: float) -> int:
    """How many steps fit the time, by rank 0's clock."""
    assert settings.most_s is not None
    count = int(settings.most_s / taken_s * _TRIAL_STEPS)
    agreed = torch.tensor([min(settings.steps, max(_TRIAL_STEPS, count))])
    torch.distributed.broadcast(agreed, 0)
    return int(agreed)
