"""The training loop that `shardwise train` and the demo run on each rank."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Subset, default_collate

from shardwise.data.corpus import Corpus, first_samples
from shardwise.data.loader import Loader
from shardwise.environment import rank_environment
from shardwise.runtime.executor import Event
from shardwise.runtime.interrupts import Interrupts
from shardwise.runtime.launch import launch
from shardwise.runtime.memory import PeakMemory
from shardwise.runtime.metrics import Metrics
from shardwise.runtime.preload import preload
from shardwise.runtime.progress import TrainingDisplay

if TYPE_CHECKING:
    from shardwise import Plan

__all__ = ["WAIT_S", "RankResult", "RecordedAction", "Settings", "TrainingRun", "train", "train_rank"]

_TRIAL_STEPS = 6  # after these it is known how many more can be afforded
_WARM_UP_STEPS = 2  # their times are not typical: memory is taken and connections are made
WAIT_S = 300.0  # a collective, send or receive may take so long

_SAVE_S = 120  # an interrupted run may take so long to end its step and to save
_LOOK_EVERY = 10  # steps between two looks at all ranks' memory

Build = Callable[[], nn.Module]
Read = Callable[[], Corpus]
RecordedAction = tuple[
    str, int, int, str, int, float, float
]  # kind, stage, microbatch, edge, peer, start and end in seconds of time.perf_counter


class Job(Protocol):
    """What the loop needs of `parallelize`'s result. batch_slice: this rank's samples; grad_norm: of the last step, nan if not known."""

    steps: int
    grad_norm: float

    @property
    def events(self) -> list[Event]: ...

    @property
    def batch_slice(self) -> slice: ...

    def step(self, batch: Any, *, local: bool = False) -> float: ...

    def eval(self, batch: Any, *, local: bool = False) -> float: ...

    def save(self, folder: Path, **others: Any) -> None: ...

    def load(self, folder: Path, **others: Any) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Settings:
    """steps: optimizer steps, fewer where they would take more than most_s seconds; batch_size: samples in the global batch;
    shown: whether rank 0 displays progress. evaluate_every: steps between two evaluations on held-out data, 0: only before and after;
    evaluated: batches of it. workers: of each rank, to read data. out: where rank 0 writes metrics, also for TensorBoard if asked for.
    weights: files to begin from, compile: as of `parallelize`. resume: a checkpoint to go on from, to `steps` in all; save: where one is
    written every save_every steps, at the end, and when the run is interrupted.
    """

    steps: int
    batch_size: int
    learning_rate: float = 1e-3
    most_s: float | None = None
    seed: int = 0
    shown: bool = True
    evaluate_every: int = 0
    evaluated: int = 4
    workers: int = 0
    out: Path | None = None
    tensorboard: bool = False
    weights: Path | None = None
    compile: bool = False
    save: Path | None = None
    save_every: int = 0
    resume: Path | None = None


@dataclass(frozen=True, kw_only=True)
class RankResult:
    """What one rank saw. Losses are equal on all ranks; the held-out ones, by the number of steps before them, are means over batches.

    first_step: its number, 1 but where the run goes on from a checkpoint. actions: of the last step, plain so that they travel.
    """

    rank: int
    losses: list[float]
    step_times_s: list[float]
    peak_memory_bytes: int
    held_out: dict[int, float]
    first_step: int = 1
    actions: list[RecordedAction] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """The ranks' results as one.

    held_out: number of steps before it → mean loss on held-out data; empty where there is none. memory_bytes: peak of each rank;
    step_time_s: median, of the slowest rank in each step; actions: of the last step, for each rank.
    """

    losses: list[float]
    held_out: dict[int, float]
    step_times_s: list[float]
    memory_bytes: list[int]
    actions: list[list[RecordedAction]] = field(default_factory=list)
    first_step: int = 1
    step_time_s: float = field(init=False)

    def __post_init__(self) -> None:
        typical = self.step_times_s[_WARM_UP_STEPS:] or self.step_times_s
        object.__setattr__(self, "step_time_s", statistics.median(typical))

    @property
    def held_out_before(self) -> float | None:
        """The mean loss on held-out data before the first step."""
        return self.held_out.get(self.first_step - 1)

    @property
    def held_out_after(self) -> float | None:
        """The last one."""
        return self.held_out[max(self.held_out)] if self.held_out else None

    @classmethod
    def of(cls, results: Sequence[RankResult]) -> TrainingRun:
        """Of the results of all ranks."""
        first = results[0]
        return cls(
            losses=first.losses,
            held_out=first.held_out,
            step_times_s=[max(times) for times in zip(*(result.step_times_s for result in results), strict=True)],
            memory_bytes=[result.peak_memory_bytes for result in results],
            actions=[result.actions for result in results],
            first_step=first.first_step,
        )


def train(build: Build, *, plan: Plan, ranks: int, read: Read, settings: Settings, port: int = 0) -> TrainingRun:
    """Train on `ranks` local ranks that this process starts. read: what a rank learns from, called there.

    Raises RankFailed with the first failing rank's error.
    """
    results = launch(
        train_rank, (build, plan, read, settings), ranks=ranks, timeout_s=WAIT_S, port=port, end_s=_SAVE_S if settings.save else None
    )
    return TrainingRun.of(results)


def train_rank(build: Build, plan: Plan, read: Read, settings: Settings) -> RankResult:
    """One rank's part, inside a process group. Raises SystemExit where a signal ended it after it had saved."""
    import shardwise as sw

    place = rank_environment()
    assert place is not None, "train_rank runs on a rank"
    corpus = read()
    preload()
    memory = PeakMemory()
    torch.manual_seed(settings.seed)
    example = example_of(corpus, settings.batch_size)
    adamw, weights = _adamw(settings.learning_rate), settings.weights
    job = sw.parallelize(build, example, plan=plan, optimizer=adamw, weights=weights, compile=settings.compile)
    first = place.rank == 0
    loop = _Loop(job=job, corpus=corpus, settings=settings, memory=memory)
    kind = (settings.batch_size, "samples") if corpus.tokens is None else (settings.batch_size * corpus.tokens, "tokens")
    predicted = plan.predicted.step_time_s if plan is not None else None
    with (
        TrainingDisplay(steps=settings.steps, per_step=kind, shown=settings.shown and first, predicted_s=predicted) as display,
        Metrics(settings.out if first else None, tensorboard=settings.tensorboard) as metrics,
    ):
        loop.run(display, metrics, kind)
    if loop.stopped_by:
        raise SystemExit(128 + loop.stopped_by)
    return RankResult(
        rank=place.rank,
        losses=loop.losses,
        step_times_s=loop.times,
        peak_memory_bytes=memory.peak_bytes(),
        held_out=loop.held_out,
        actions=loop.actions,
        first_step=loop.first_step,
    )


def example_of(corpus: Corpus, samples: int) -> dict[str, Tensor]:
    """A batch of the first samples, again and again where there are too few."""
    few = first_samples(corpus.training, samples)
    return default_collate([few[index % len(few)] for index in range(samples)])


def evaluate(job: Job, batches: Loader) -> float:
    """The mean loss over batches, weighted by their samples; each rank reads its own samples of them."""
    total = count = 0.0
    for batch in batches:
        samples = min(batches.batch_size, len(batches.dataset) - int(count))
        total += samples * job.eval(batch, local=True)
        count += samples
    return total / count


def _recorded(event: Event) -> RecordedAction:
    action = event.action
    return action.kind.value, action.stage, action.microbatch, action.edge, action.peer, event.start_s, event.end_s


def _adamw(learning_rate: float) -> Callable[[object], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=learning_rate)  # type: ignore[arg-type]


@dataclass(kw_only=True)
class _Loop:
    """held_out, first_step: as of `RankResult`. stopped_by: the signal that ended it on all ranks, 0 where none did."""

    job: Job
    corpus: Corpus
    settings: Settings
    memory: PeakMemory
    losses: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)
    actions: list[RecordedAction] = field(default_factory=list)
    first_step: int = 1
    stopped_by: int = 0

    def run(self, display: TrainingDisplay, metrics: Metrics, kind: tuple[int, str]) -> None:
        """All steps, with an evaluation before, after and at intervals."""
        settings, steps = self.settings, self.settings.steps
        loader = Loader(self.corpus.training, settings.batch_size, part=self.job.batch_slice, seed=settings.seed, workers=settings.workers)
        if settings.resume is not None:
            self.job.load(settings.resume, loader=loader)
            display.say(f"goes on after step {self.job.steps} from {settings.resume}")
        done = self.job.steps
        self.first_step = done + 1
        batches = loader.forever()
        self._evaluate(done, display)
        metrics.write(done, {"held_out_loss": self.held_out.get(done)})
        with Interrupts(heeded=settings.save is not None) as interrupts:
            for step in range(self.first_step, settings.steps + 1):
                if len(self.times) == _TRIAL_STEPS and settings.most_s is not None:
                    steps = _affordable_steps(settings, sum(self.times))
                    display.expect(steps)
                if step > steps:
                    break
                batch = next(batches)
                started = time.perf_counter()
                self.losses.append(self.job.step(batch, local=True))
                self.times.append(time.perf_counter() - started)
                self.stopped_by = max(_every_rank(interrupts.number)) if settings.save is not None else 0
                self._after(step, step == steps or bool(self.stopped_by), display, metrics, kind)
                self._save(loader, step, step == steps, display)
                if self.stopped_by:
                    break
        batches.close()

    def _after(self, step: int, last: bool, display: TrainingDisplay, metrics: Metrics, kind: tuple[int, str]) -> None:
        """What is looked at after a step."""
        every = self.settings.evaluate_every
        if last:
            self.actions = [_recorded(event) for event in self.job.events]
        if last or (every and step % every == 0):
            self._evaluate(step, display)
        used = _every_rank(self.memory.peak_bytes()) if last or step % _LOOK_EVERY == 1 else None
        if used is not None:
            display.memory(used)
        display.update(step, self.losses[-1], self.times[-1])
        metrics.write(step, self._values(kind) | {"held_out_loss": self.held_out.get(step), "memory_bytes": used})

    def _save(self, loader: Loader, step: int, last: bool, display: TrainingDisplay) -> None:
        folder, every, stop = self.settings.save, self.settings.save_every, bool(self.stopped_by)
        if folder is None or not (last or stop or (every and step % every == 0)):
            return
        self.job.save(folder, loader=loader)
        how = f"; go on with the same options and --resume {folder}" if stop and not last else ""
        display.say(f"{'interrupted, ' if stop else ''}saved after step {step} in {folder}{how}")

    def _evaluate(self, step: int, display: TrainingDisplay) -> None:
        data = self.corpus.held_out
        if data is None:
            return
        count, wanted = len(data), self.settings.evaluated * self.settings.batch_size  # type: ignore[arg-type]
        spread = data if count <= wanted else Subset(data, torch.linspace(0, count - 1, wanted).long().tolist())
        batches = Loader(spread, self.settings.batch_size, part=self.job.batch_slice, shuffle=False, drop_last=False)
        self.held_out[step] = evaluate(self.job, batches)
        display.held_out(self.held_out[step])

    def _values(self, kind: tuple[int, str]) -> dict[str, float | list[int] | None]:
        norm, taken_s = self.job.grad_norm, self.times[-1]
        return {
            "loss": self.losses[-1],
            "grad_norm": norm if norm == norm else None,
            "step_time_s": taken_s,
            f"{kind[1]}_per_s": kind[0] / taken_s,
        }


def _every_rank(value: int) -> list[int]:
    """The value on each rank."""
    mine, every = torch.tensor([value]), [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    return [int(each) for each in every]


def _affordable_steps(settings: Settings, taken_s: float) -> int:
    """How many steps fit the time, by rank 0's clock."""
    assert settings.most_s is not None
    count = int(settings.most_s / taken_s * _TRIAL_STEPS)
    agreed = torch.tensor([min(settings.steps, max(_TRIAL_STEPS, count))])
    dist.broadcast(agreed, 0)
    return int(agreed)
