"""A plan at work: `parallelize` makes a Job on each rank, `job.step(batch)` does one optimizer step on the global batch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.capture.batch import map_tensors, named_tensors
from shardwise.capture.graph import Graph
from shardwise.capture.precision import LOW
from shardwise.errors import BatchError, LayoutError, PlanError
from shardwise.planner.apply import Applied
from shardwise.planner.plan import Plan
from shardwise.program.build import Places, build_programs
from shardwise.program.check import check_own
from shardwise.program.program import Program
from shardwise.program.reductions import DATA_AXES, joined_ranks
from shardwise.runtime.answers import Answers
from shardwise.runtime.executor import Event, Executor
from shardwise.runtime.exhausted import explained, held_bytes, wanted_bytes
from shardwise.runtime.gradients import Gradients
from shardwise.runtime.group import create_groups
from shardwise.runtime.needs import Need, needs
from shardwise.runtime.norm import GradientNorm
from shardwise.runtime.optimizer import OptimizerFactory, absent, make_on_parts, make_optimizers, make_states, prefer_fused
from shardwise.runtime.parameters import Parameters
from shardwise.runtime.regions import Compiler
from shardwise.runtime.saving import Positioned, load_job, save_job
from shardwise.runtime.scale import LossScale, Scaler
from shardwise.runtime.source import Source
from shardwise.runtime.state import load_state, state_of_job
from shardwise.runtime.transport import Distributed, Transport
from shardwise.runtime.weights import Weights, read_parts
from shardwise.runtime.whole import WholeParameters, is_split
from shardwise.sharding.types import Shard
from shardwise.sharding.types import part as part_of

__all__ = ["Job", "Step", "batch_part", "step_key"]

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step that was done. number: the first is 1; grad_norm: as `Job.grad_norm`; time_s: seconds on this rank."""

    number: int
    loss: float
    grad_norm: float
    time_s: float


class Job:
    """One rank of a running plan.

    batch_slice: which samples of the global batch this rank works on. program: what it performs; print it to read it.
    events: the last step's actions with their times. grad_norm: of all gradients of the last step, before they were clipped; nan where
    neither clip_norm nor check_finite asks for it, infinite where a step was skipped. optimizers: what `optimizer` made, with the same
    groups on every rank. compiler: what was compiled and what was not; None where that was not asked for.
    """

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        applied: Applied,
        weights: Weights,
        optimizer: OptimizerFactory,
        *,
        device: torch.device,
        seed: int = 0,
        timeout_s: float = 300.0,
        clip_norm: float | None = None,
        check_finite: bool = True,
        source: Source | None = None,
        loss_scale: LossScale | None = None,
        compile: bool = False,
    ) -> None:
        self.compiler = Compiler(device=device) if compile else None
        self.graph, self.plan, self.device, self.seed = graph, plan, device, seed
        self.steps = 0
        self.fixed = weights.whole(graph.buffers) if graph.checks else {}
        rank = _checked_rank(plan)
        programs = build_programs(applied.assignment, applied.cut, plan.tables, plan.chooser(), device=device, ranks=[rank])
        self.program: Program = programs[rank]
        check_own(self.program, applied.assignment, applied.cut)
        create_groups(_all_groups(self.program, plan, graph, applied), timeout_s)
        transport = Distributed()
        self.named: dict[str, nn.Parameter] = {}  # every trained parameter as an optimizer of this rank has it
        self._within_memory(lambda: self._set_up(weights, optimizer, transport), lambda: "setting up")
        self.scaler = _scaler(plan, loss_scale)
        self.norm = self._norm(clip_norm) if clip_norm is not None or check_finite or self.scaler else None
        self.loss = self.grad_norm = math.nan
        self._source = source
        self._hooks: list[Callable[[Step], object]] = []
        self._answers = (
            Answers(source, plan, applied, self.program, self.state, transport, device, self.compiler) if source is not None else None
        )

    def _set_up(self, weights: Weights, optimizer: OptimizerFactory, transport: Distributed) -> None:
        self.state, masters = read_parts(weights, self.program, self.device)
        self.gradients = Gradients(self.program, transport, self.device)
        self.parameters = Parameters(self.program, self.state, masters, self.gradients.parts, transport)
        self.whole, self.optimizers = self._optimizers(optimizer, transport)
        self.executor = self._executor(transport)

    def _within_memory(self, work: Callable[[], Result], doing: Callable[[], str]) -> Result:
        """Raises OutOfMemory where the system gives none; the job has let go of what it held then, and is at its end."""
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            wanted = wanted_bytes(error)
            if wanted is None:
                raise
        held, what = held_bytes(), doing()  # the error is gone here, and with it the tensors that its traceback held
        for name in ("executor", "whole", "optimizers", "parameters", "gradients", "state", "norm"):
            self.__dict__.pop(name, None)
        rank, where = self.program.rank, self.program.where
        raise explained(self.plan, self.graph, rank=rank, where=where, doing=what, wanted=wanted, held=held)

    def _doing(self) -> str:
        return f"{self.executor.current or 'making the states of its optimizers'} of step {self.steps}"

    def _executor(self, transport: Transport) -> Executor:
        if self.compiler is None:
            return Executor(self.program, self.state, self.gradients, transport, self.device)
        with self.compiler.watched(shown=self.program.rank == 0):
            return Executor(self.program, self.state, self.gradients, transport, self.device, self.compiler)

    def _norm(self, most: float | None) -> GradientNorm:
        sizes = {name: prod(value.shape) for name, value in self.graph.parameters.items() if value.requires_grad}
        return GradientNorm({name: each for name, each in self.gradients.parts.items() if name in sizes}, sizes, most, self.device)

    def _optimizers(self, factory: OptimizerFactory, transport: Distributed) -> tuple[WholeParameters, list[torch.optim.Optimizer]]:
        """The user's optimizers of this rank's parts of parameters, and of those that it updates whole for others."""
        shapes = {name: value.shape for name, value in self.graph.parameters.items() if value.requires_grad}
        split = {part.name for part in self.program.parameters if part.requires_grad and is_split(part)}
        need = needs(factory, shapes) if self.plan.ranks > 1 else {}
        if self.plan.pp > 1 or split:
            _refuse_coupled(need)
        gathered = {name for name in split if need[name] == "parameter"}
        whole = WholeParameters(self.program, self.parameters.of, gathered, transport, self.device)
        here = {name: each for name, each in self.parameters.of.items() if name not in gathered} | whole.of
        dtypes = {
            name: self.graph.master if self.graph.master and value.dtype in LOW else value.dtype
            for name, value in self.graph.parameters.items()
        }
        mine = [(name, here[name] if name in here else absent(shape, dtypes[name], self.device)) for name, shape in shapes.items()]
        self.named = dict(mine)
        made = make_on_parts(factory, shapes, mine) if self.plan.ranks > 1 else make_optimizers(factory, mine)
        whole.release()
        return whole, [prefer_fused(optimizer) for optimizer in made]

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer, for a schedule of its learning rate. Raises LayoutError where there are several (`optimizers`)."""
        if len(self.optimizers) > 1:
            kinds = ", ".join(type(optimizer).__name__ for optimizer in self.optimizers)
            raise LayoutError(f"the job has {len(self.optimizers)} optimizers ({kinds}): take one of job.optimizers")
        return self.optimizers[0]

    @property
    def skipped(self) -> int:
        """How many steps were left out because gradients had overflowed in fp16; the same number on every rank."""
        return 0 if self.scaler is None else self.scaler.skipped

    @property
    def loss_scale(self) -> float:
        """By which the gradients of the next step are scaled while they are computed."""
        return 1.0 if self.scaler is None else self.scaler.scale

    @property
    def batch_slice(self) -> slice:
        """The samples of the global batch that this rank reads; ranks that divide experts (ep) read the same and work on a part each."""
        return _batch_slice(self.plan, self.program)

    @property
    def events(self) -> list[Event]:
        """The last step's actions and when they ran."""
        return self.executor.events

    def step(self, batch: Mapping[str, Any], *, local: bool = False) -> float:
        """One optimizer step on the global batch; its loss, equal on all ranks.

        batch: the global batch, the same on every rank; with local=True this rank's `batch_slice` of it.
        Raises BatchError when names, shapes or dtypes are not those that the plan was made for, NotFiniteError when the loss or a gradient
        is infinite or not a number: the parameters are then as they were before the step.
        """
        started = time.perf_counter()
        part = batch_part(self.graph, self.plan, self.program, named_tensors(batch), self.device, local=local)
        if self.graph.checks:
            self._check_answers(self._gathered(batch) if local else batch)
        self.steps += 1
        if self.scaler is not None:
            self.executor.scale_gradients(self.scaler.scale)
        loss = self._within_memory(lambda: self._passes_and_update(part), self._doing)
        if self.norm is None:
            self.loss = self._total(loss)
        done = Step(number=self.steps, loss=self.loss, grad_norm=self.grad_norm, time_s=time.perf_counter() - started)
        for hook in self._hooks:
            hook(done)
        return self.loss

    def _passes_and_update(self, part: Mapping[str, Tensor]) -> float:
        if not self.events:
            for optimizer in self.optimizers:
                make_states(optimizer)
        return self.executor.step(part, step_key(self.seed, self.steps), self._update)

    def _update(self) -> None:
        if self.norm is not None:
            loss = self.executor.loss if self.program.counts_loss else 0.0
            self.loss, norm = self.norm.apply(loss, self.steps, self.scaler)
            self.grad_norm = math.inf if norm is None else norm
            if norm is None:
                return
        self.whole.collect()
        for optimizer in self.optimizers:
            optimizer.step()
        self.whole.spread()
        self.parameters.gather()

    def eval(self, batch: Mapping[str, Any], *, local: bool = False) -> float:
        """The loss in eval mode (no dropout, BatchNorm with its running statistics), equal on all ranks; nothing is changed.

        batch: the whole one, the same on every rank, of any number of samples; with local=True the samples that this rank has read (data
        ranks have those that follow each other). Another shape than before is compiled for, with a ShardwiseWarning.
        Raises CaptureError, BatchError, and PlanError where eval mode reads what training keeps on other ranks.
        """
        whole = self._gathered(batch) if local else batch
        return self._within_memory(lambda: self.answers.loss(whole, step_key(self.seed, self.steps)), lambda: "evaluating")

    def predict(self, inputs: Mapping[str, Any]) -> Any:
        """What the model returns in eval mode for these keyword arguments of its forward, as on one device, on every rank.

        inputs, raises: as `eval`; the labels may be left out where the model can do without.
        """
        return self._within_memory(lambda: self.answers.output(inputs, step_key(self.seed, self.steps)), lambda: "predicting")

    @property
    def answers(self) -> Answers:
        """Runs the model in eval mode."""
        assert self._answers is not None, "the job was made without its model"
        return self._answers

    @property
    def source(self) -> Source:
        """The model that the job was made from."""
        assert self._source is not None, "the job was made without its model"
        return self._source

    def on_step(self, function: Callable[[Step], object]) -> None:
        """Has `function` called after each step, on this rank; functions are called in the order in which they were given."""
        self._hooks.append(function)

    def gradient(self) -> dict[str, Tensor]:
        """This rank's part of each gradient of the last step."""
        return dict(self.gradients.parts)

    def state_dict(self, *, sharded: bool = False) -> dict[str, Any]:
        """Parameters, buffers, the optimizer's state and what the next step's random numbers follow from. Call it on every rank.

        {"model": …, "optimizer": {"state": name → …, "groups": […]}, "steps": …, "seed": …}, whole and in CPU memory on rank 0, {} on
        others; "model" has the keys of the model's own state_dict(). sharded: this rank's own parts instead, not copied.
        Raises PlanError for a split parameter's optimizer state that is not split like it.
        """
        return state_of_job(self, sharded=sharded)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` returned: a whole one, given on every rank, of any layout; or a rank's own part, of the same plan.

        Raises PlanError for the state of another model, optimizer or rank.
        """
        load_state(self, state)

    def save(self, folder: str | Path, **others: Positioned) -> None:
        """Writes the state into a checkpoint, a folder that any layout loads; call it on every rank. The one before goes when it is whole.

        Parameters and buffers are whole tensors under their names in safetensors files (tied ones once), of which each rank writes what
        it holds; the folder must be one that all hosts share. others: what has state_dict() and load_state_dict(), equal on all ranks, such
        as loader=… and schedule=…; their states may be numbers, strings, lists and dicts.
        Raises WeightsError, the same on all ranks, for what cannot be written: the last good checkpoint is as it was.
        """
        save_job(self, Path(folder), others)

    def load(self, folder: str | Path, **others: Positioned) -> None:
        """Goes on from a checkpoint, of any layout; each rank reads what it will hold. others: as they were given to `save`.

        Raises WeightsError, the same on all ranks, where a tensor, shape or dtype is not that of the model, or the optimizer another,
        before anything is changed.
        """
        load_job(self, Path(folder), others)

    def renew(self) -> None:
        """Computes again what was computed when the job was made: values that never change have been changed after all."""
        self.executor.renew()
        self.fixed = {name: self.state.get(name, value) for name, value in self.fixed.items()}
        if self._answers is not None:
            self._answers.forget()

    def _gathered(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The whole batch, from the samples that data ranks have read."""
        place = self.program.coordinates
        first = all(place[axis] == 0 for axis in place if axis != "dp")
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (place["dp"], dict(batch)) if first else None)
        parts = [named_tensors(part) for _, part in sorted((each for each in found if each is not None), key=lambda each: each[0])]
        dims = {name: self.graph.batch_dims.get(name) for name in self.graph.inputs}

        def whole(name: str, tensor: Tensor) -> Tensor:
            return tensor if (dim := dims.get(name)) is None else torch.cat([part[name] for part in parts], dim)

        return map_tensors(whole, batch)

    def _check_answers(self, batch: Mapping[str, Any]) -> None:
        """Whether the model's own control flow would go the captured way for this batch."""
        for check, found in self.graph.wrong_checks(self.fixed, named_tensors(batch)):
            raise BatchError(
                f"{check.module or 'the model'} asks for a value of the batch that was {check.expected:g} on the example batch and is "
                f"{found:g} now: it would do something else than what was captured; make batches alike in this (padding, masks)"
            )

    def _total(self, loss: float) -> float:
        """The sum over microbatches, data ranks and stages of what each adds."""
        total = torch.tensor([loss if self.program.counts_loss else 0.0], dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item()


def batch_part(
    graph: Graph, plan: Plan, program: Program, batch: Mapping[str, Tensor], device: torch.device, *, local: bool = False
) -> dict[str, Tensor]:
    """This rank's samples of the global batch, on the device; local=True: `batch` holds no others.

    Raises BatchError when names, shapes or dtypes are not those that the plan was made for.
    """
    found: dict[str, Tensor] = {}
    for name, value in graph.inputs.items():
        if name.startswith("__"):
            continue
        if name not in batch:
            raise BatchError(f"the batch lacks {name!r}; it holds {sorted(batch)}")
        dim = graph.batch_dims.get(name)
        tensor = batch[name].to(device)
        if value.dtype in LOW and tensor.is_floating_point():
            tensor = tensor.to(value.dtype)
        expected = list(value.shape)
        cut = _batch_slice(plan, program)
        if dim is not None and local:
            expected[dim] = cut.stop - cut.start
        if list(tensor.shape) != expected or tensor.dtype != value.dtype:
            whose = "this rank's part of the batch" if local else "the global batch"
            raise BatchError(
                f"{name} in {whose} is {tensor.dtype} {list(tensor.shape)}, the plan was made for {value.dtype} {expected}; "
                "plan for this shape or pad the batch to it"
            )
        mine = tensor if dim is None or local else tensor.narrow(dim, cut.start, cut.stop - cut.start)
        found[name] = mine.contiguous()  # programs are made for tensors without gaps, in the usual order of dims
    return found


def _batch_slice(plan: Plan, program: Program) -> slice:
    mine = part_of(plan.global_batch, Shard(0, shares=tuple(plan.shares)), program.mesh["dp"], program.coordinates["dp"])
    return slice(mine.start, mine.stop)


def _scaler(plan: Plan, rule: LossScale | None) -> Scaler | None:
    if plan.precision != "fp16":
        if rule is not None:
            raise LayoutError(f"loss_scale has no effect with precision={plan.precision!r}; leave it out, or plan with precision='fp16'")
        return None
    return Scaler(rule or LossScale())


def _refuse_coupled(need: Mapping[str, Need]) -> None:
    coupled = [name for name, each in need.items() if each == "all"]
    if coupled:
        raise LayoutError(
            f"the optimizer does not treat {coupled[0]} alone: its step depends on the gradients of other parameters, some of which are on "
            "other ranks in this layout. Use dp alone (tp=1, pp=1, zero=0) or another optimizer; to clip by the norm of all "
            "gradients pass clip_norm to parallelize"
        )


def _checked_rank(plan: Plan) -> int:
    ranks = dist.get_world_size()
    if ranks != plan.ranks:
        raise PlanError(f"the plan is for {plan.ranks} ranks, this job has {ranks}; start {plan.ranks} ranks or plan for {ranks}")
    return dist.get_rank()


def _all_groups(program: Program, plan: Plan, graph: Graph, applied: Applied) -> list[tuple[str, tuple[int, ...]]]:
    """Every process group of the job, in one order on all ranks."""
    places = Places.of(applied.assignment, plan.pp)
    seats = [(pipe, place) for pipe in range(plan.pp) for place in places.columns()]
    along = {seat: places.groups(*seat) for seat in seats}
    groups = [(axis, along[seat][axis]) for axis in along[seats[0]] for seat in seats]
    shared = [axis for axis in DATA_AXES if len(along[seats[0]].get(axis, ())) > 1]
    for axes in (shared, [axis for axis in shared if axis != "ep"]):
        if len(axes) > 1:
            groups += [("+".join(axes), joined_ranks(places.rank(*seat), [along[seat][axis] for axis in axes])) for seat in seats]
    if plan.shard:
        for seat in seats:
            data = joined_ranks(places.rank(*seat), [along[seat][axis] for axis in shared])
            groups += [("shard", data[first : first + plan.shard]) for first in range(0, len(data), plan.shard)]
            groups += [("copies", data[first :: plan.shard]) for first in range(plan.shard)]
    readers = graph.consumers()
    ties: set[tuple[int, ...]] = set()
    for value in graph.parameters.values():
        pipes = sorted({program.placement[applied.cut.stage_of[op]] for op, _ in readers[value] if op in applied.cut.stage_of})
        if len(pipes) > 1:
            ties |= {tuple(places.rank(pipe, place) for pipe in pipes) for place in places.columns()}
    return list(dict.fromkeys(groups)) + [("tie", ranks) for ranks in sorted(ties)]


def step_key(seed: int, step: int) -> int:
    """The number from which the random operators of a step draw (constants: splitmix64)."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9) & 0x7FFFFFFFFFFFFFFF
