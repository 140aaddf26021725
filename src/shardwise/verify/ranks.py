"""Runs one step of a plan on ranks: processes of their own, or threads of this one; each rank's share of the results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from shardwise.capture.graph import Graph
from shardwise.capture.precision import dtype_of
from shardwise.planner.apply import apply_plan
from shardwise.planner.plan import Plan
from shardwise.program.program import ParameterPart, Program
from shardwise.runtime.executor import Executor
from shardwise.runtime.gradients import Gradients
from shardwise.runtime.in_process import run_ranks
from shardwise.runtime.job import Job, batch_part, step_key
from shardwise.runtime.launch import launch
from shardwise.runtime.optimizer import prefer_fused
from shardwise.runtime.parameters import Parameters
from shardwise.runtime.regions import Compiler
from shardwise.runtime.scale import LossScale
from shardwise.runtime.transport import Transport
from shardwise.runtime.weights import LiveWeights, local_part, own_part
from shardwise.verify.cast import cast_tensor
from shardwise.verify.compare import relative_error
from shardwise.verify.one_device import RATE, adamw_step

__all__ = ["Part", "on_processes", "on_threads"]

_WAIT_S = 120.0
_CPU = torch.device("cpu")
Losses = tuple[float, float]
"""Of the step, and after it."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One rank's share of a step. update_error: the largest of a parameter after the optimizer's step on one device's gradients;
    loss_after: the next step's loss on the same batch."""

    loss: float
    loss_after: float
    coordinates: dict[str, int]
    mesh: dict[str, int]
    parts: dict[str, ParameterPart]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    update_error: float


@dataclass(frozen=True, kw_only=True)
class Work:
    """A step to be done.

    state, batch: whole, in the precision of the graph; reference: one device's gradients, for the optimizer's step; compile: whether what
    the ranks run is compiled.
    """

    graph: Graph
    plan: Plan
    state: dict[str, Tensor]
    batch: dict[str, Tensor]
    seed: int
    reference: dict[str, Tensor]
    compile: bool = False

    @staticmethod
    def of(
        graph: Graph,
        plan: Plan,
        state: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        dtype: torch.dtype,
        seed: int,
        reference: Mapping[str, Tensor],
        *,
        compile: bool = False,
    ) -> Work:
        """With state and batch cast to `dtype`, but where that is what the graph computes in: they are as a job would get them."""
        as_they_are = dtype is dtype_of(graph.precision)
        return Work(
            graph=graph,
            plan=plan,
            state={name: tensor if as_they_are else cast_tensor(tensor, dtype) for name, tensor in state.items()},
            batch={name: tensor if as_they_are else cast_tensor(tensor, dtype) for name, tensor in batch.items()},
            seed=seed,
            reference=dict(reference),
            compile=compile,
        )


def on_processes(work: Work) -> list[Part]:
    """Starts a process for each rank. Raises RankFailed."""
    return launch(_process, (work,), ranks=work.plan.ranks, timeout_s=_WAIT_S)


def _process(work: Work) -> Part:
    applied = apply_plan(work.plan, work.graph, same_fingerprint=False)
    state, optimizer = {name: tensor.clone() for name, tensor in work.state.items()}, _Optimizer(work=work)
    scale = LossScale(initial=1.0) if work.plan.precision == "fp16" else None  # as one device's step, to which it is compared
    weights = LiveWeights(state)
    job = Job(
        work.graph,
        work.plan,
        applied,
        weights,
        optimizer,
        device=_CPU,
        seed=work.seed,
        timeout_s=_WAIT_S,
        loss_scale=scale,
        compile=work.compile,
    )
    optimizer.program = job.program
    loss = job.step(work.batch)
    found = _part(job.program, work, loss, job.state, job.parameters, job.gradient())
    return replace(found, loss_after=job.step(work.batch))


def on_threads(work: Work, programs: Mapping[int, Program]) -> list[Part]:
    """The ranks' programs on threads of this process: the same executor, with messages through memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    compiler = Compiler(device=_CPU) if work.compile else None
    try:
        done = run_ranks(work.plan.ranks, lambda rank, transport: _thread(programs[rank], work, transport, compiler))
    finally:
        torch.set_num_threads(threads)
    totals = sum(losses[0] for losses, _ in done), sum(losses[1] for losses, _ in done)
    return [make(totals) for _, make in done]


def _thread(program: Program, work: Work, transport: Transport, compiler: Compiler | None) -> tuple[Losses, Callable[[Losses], Part]]:
    """What this rank adds to the losses (nothing where others add the same), and its part, given the whole losses."""
    parts = [*program.parameters, *program.buffers]
    state = {part.name: own_part(work.state[part.name], part, program, _CPU).clone() for part in parts}
    gradients = Gradients(program, transport, _CPU)
    masters = {
        part.name: own_part(work.state[part.name], part.updated_part, program, _CPU).clone() for part in program.parameters if part.has_copy
    }
    parameters = Parameters(program, state, masters, gradients.parts, transport)
    optimizer = _Optimizer(work=work, program=program)

    def update() -> None:
        if parameters.trained:
            prefer_fused(optimizer(parameters.trained)).step()
        parameters.gather()

    executor = Executor(program, state, gradients, transport, _CPU, compiler)
    batch = batch_part(work.graph, work.plan, program, work.batch, _CPU)
    loss = executor.step(batch, step_key(work.seed, 1), update)
    found = _part(program, work, loss, state, parameters, gradients.parts)
    after = executor.step(batch, step_key(work.seed, 2), lambda: None)
    return (loss, after) if program.counts_loss else (0.0, 0.0), lambda totals: replace(found, loss=totals[0], loss_after=totals[1])


def _part(
    program: Program, work: Work, loss: float, state: Mapping[str, Tensor], parameters: Parameters, gradients: Mapping[str, Tensor]
) -> Part:
    return Part(
        loss=loss,
        loss_after=math.nan,
        coordinates=dict(program.coordinates),
        mesh=dict(program.mesh),
        parts={part.name: part for part in program.parameters if part.requires_grad},
        gradients={name: gradient.clone() for name, gradient in gradients.items()},
        buffers={
            binding.name: state[binding.name]
            for stage in program.stages.values()
            for binding in stage.forward_outputs
            if binding.kind == "buffer"
        },
        update_error=max(
            (_update_error(part, program, work, state, parameters) for part in program.parameters if part.requires_grad), default=0.0
        ),
    )


@dataclass(kw_only=True)
class _Optimizer:
    """Makes an AdamW that steps on one device's gradients instead of the parameters' own. program: of this rank, known before the step."""

    work: Work
    program: Program | None = None

    def __call__(self, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        trained = dict(named)
        optimizer = torch.optim.AdamW(trained.values(), lr=RATE)
        optimizer.register_step_pre_hook(lambda *_: self._give(trained))
        return optimizer

    def _give(self, trained: Mapping[str, nn.Parameter]) -> None:
        if self.program is None:
            return  # asked whether it works on shards
        for part in self.program.parameters:
            if part.name in trained:
                mine = local_part(self.work.reference[part.name], part, self.program)
                mine = part.division.take(mine) if part.division else mine
                trained[part.name].grad = mine.to(part.wide).clone(memory_format=torch.contiguous_format)


def _update_error(part: ParameterPart, program: Program, work: Work, state: Mapping[str, Tensor], parameters: Parameters) -> float:
    """What this rank holds of a parameter after the step, against AdamW on the whole; a copy that operators read need only be one."""
    whole = adamw_step(work.state[part.name], work.reference[part.name].to(work.state[part.name].dtype))
    held = relative_error(state[part.name], own_part(whole, part, program, _CPU), 1e-30)
    if not part.has_copy:
        return held
    updated = relative_error(parameters.of[part.name].detach(), own_part(whole, part.updated_part, program, _CPU), 1e-30)
    return updated if held <= torch.finfo(part.dtype).eps else held
