"""`job.eval` and `job.predict`: the model captured in eval mode, once for each shape of batch, and run where it trains."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shardwise.capture.batch import map_tensors, named_tensors
from shardwise.capture.export import Structure, capture_inference, loss_of
from shardwise.capture.graph import Graph
from shardwise.errors import BatchError, PlanError, ShardwiseWarning
from shardwise.planner.apply import Applied
from shardwise.planner.inference import apply_to_inference
from shardwise.planner.plan import Plan
from shardwise.program.build import build_programs
from shardwise.program.program import Program
from shardwise.runtime.inference import Inference
from shardwise.runtime.regions import Compiler
from shardwise.runtime.source import Source
from shardwise.runtime.state import every_whole
from shardwise.runtime.transport import Transport
from shardwise.runtime.weights import own_part

__all__ = ["Answers"]

_KEPT = 4  # shapes of batches whose programs are kept


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    inference: Inference
    structure: Structure


class Answers:
    """One rank's. trained: the program that trains, state: its tensors, which are read as they are. compiler: as of `Executor`."""

    def __init__(
        self,
        source: Source,
        plan: Plan,
        applied: Applied,
        trained: Program,
        state: dict[str, Tensor],
        transport: Transport,
        device: torch.device,
        compiler: Compiler | None = None,
    ) -> None:
        self.source, self.plan, self.applied, self.trained = source, plan, applied, trained
        self.state, self.transport, self.device, self.compiler = state, transport, device, compiler
        self.prepared: OrderedDict[tuple[Any, ...], _Prepared] = OrderedDict()

    def loss(self, batch: Mapping[str, Any], step_key: int) -> float:
        """The loss on a batch in eval mode, on every rank."""
        (found,) = self._run(self._prepare("eval", self.source.constants | dict(batch)), batch, step_key)
        return found.item()

    def output(self, inputs: Mapping[str, Any], step_key: int) -> Any:
        """What the model returns in eval mode, on every rank."""
        prepared = self._prepare("predict", inputs)
        return prepared.structure.filled(self._run(prepared, inputs, step_key))

    def forget(self) -> None:
        """What was prepared may hold values that have changed."""
        self.prepared.clear()

    def _prepare(self, kind: str, batch: Mapping[str, Any]) -> _Prepared:
        key = (kind, *((name, repr(map_tensors(_described, {name: value}))) for name, value in sorted(batch.items())))
        if key in self.prepared:
            self.prepared.move_to_end(key)
            return self.prepared[key]
        if self.trained.rank == 0 and any(known[0] == kind for known in self.prepared):
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in named_tensors(batch).items())
            warnings.warn(
                f"job.{kind} was given another shape of batch and compiles for it: {shapes}; it keeps {_KEPT} of them. Batches of one "
                "shape, the last one aside, take less time",
                ShardwiseWarning,
                stacklevel=6,  # the caller of job.eval or job.predict
            )
        while len(self.prepared) >= _KEPT:
            self.prepared.popitem(last=False)
        self.prepared[key] = found = self._made(kind, batch)
        return found

    def _made(self, kind: str, batch: Mapping[str, Any]) -> _Prepared:
        source, trained = self.source, self.applied.assignment.graph
        wanted = None if kind == "predict" else partial(_loss, source)
        dims = {name: dim for name, dim in source.batch_dims.items() if name.partition(".")[0] in batch}
        fill = None if source.on_meta else lambda: source.fill(every_whole(self.trained, self.state, self.device))
        with source.answering() as model:
            graph, structure = capture_inference(
                model, batch, wanted=wanted, batch_dims=dims, changing=trained.updates, fill=fill, precision=self.plan.precision
            )
        answering = apply_to_inference(self.plan, graph, self.applied)
        applied, rank = answering.applied, self.trained.rank
        programs = build_programs(applied.assignment, applied.cut, answering.tables, self.plan.chooser(), device=self.device, ranks=[rank])
        state = self._state(graph, programs[rank])
        with nullcontext() if self.compiler is None else self.compiler.watched(shown=rank == 0):
            inference = Inference.of(answering, programs[rank], state, self.transport, self.plan.chooser(), self.device, self.compiler)
        return _Prepared(inference=inference, structure=structure)

    def _state(self, graph: Graph, program: Program) -> dict[str, Tensor]:
        """The job's own tensors, and those that only inference reads."""
        found, here = dict[str, Tensor](), {part.name: part for part in (*self.trained.parameters, *self.trained.buffers)}
        fixed = self.source.fixed([part.name for part in program.buffers if part.name not in here]) | dict(graph.constants)
        for part in (*program.parameters, *program.buffers):
            if part.name in here and not part.name.startswith("constant."):
                assert here[part.name].stored == part.stored, f"{part.name}: {here[part.name].stored} in training, {part.stored} here"
                found[part.name] = self.state[part.name].to(part.stored_dtype)  # itself, but where it is cast when it is gathered
            elif part.name in fixed and part.name not in self.applied.assignment.graph.updates:
                found[part.name] = own_part(fixed[part.name], part, program, self.device)
            else:
                raise PlanError(
                    f"{part.name} is read in eval mode, but not in training, on rank {program.rank} ({program.where}): this rank does not "
                    "hold it; plan with pp=1, or let train() and eval() read the same"
                )
        return found

    def _run(self, prepared: _Prepared, batch: Mapping[str, Any], step_key: int) -> list[Tensor]:
        inference = prepared.inference
        graph, whole = inference.graph, named_tensors(batch)
        for check, found in graph.wrong_checks(self.source.fixed(graph.buffers) | dict(graph.constants), whole) if graph.checks else ():
            raise BatchError(
                f"{check.module or 'the model'} asks for a value of the batch that was {check.expected:g} when captured in eval "
                f"mode and is {found:g} now: it would do something else; make batches alike in this (padding, masks)"
            )
        for name, read in inference.state.items():
            if name in self.state and read.dtype is not self.state[name].dtype:
                read.copy_(self.state[name])
        parts = {name: inference.part(value, whole[name]) for name, value in graph.inputs.items() if not name.startswith("__")}
        return inference.run(parts, step_key)


def _loss(source: Source, output: Any) -> Tensor:
    return loss_of(output, source.loss, source.model)


def _described(name: str, tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype
