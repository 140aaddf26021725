"""Performs a rank's actions, one after the other: the only loop of the runtime."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shardwise.errors import TransferError
from shardwise.program.actions import Action, Kind
from shardwise.program.program import Binding, Program
from shardwise.runtime.gradients import Gradients
from shardwise.runtime.graphs import Prelude, accumulating, callable_of, with_gradient
from shardwise.runtime.transport import Transport, using
from shardwise.sharding.types import take

__all__ = ["Event", "Executor"]

_WAITED_IN_VAIN = re.compile(r"timed out|connection (was )?(closed|reset)", re.IGNORECASE)  # gloo's and NCCL's words
_FORWARD_ONLY = (Kind.PRELUDE, Kind.RECV, Kind.FORWARD, Kind.SEND)


@dataclass(frozen=True, kw_only=True)
class Event:
    """One performed action; times in seconds of `time.perf_counter`."""

    action: Action
    start_s: float
    end_s: float


class Executor:
    """Runs a program's steps on the tensors of this rank.

    state: the rank's parts of parameters and buffers, by name; they are read, and updated buffers are put there.
    """

    def __init__(
        self, program: Program, state: dict[str, Tensor], gradients: Gradients, transport: Transport, device: torch.device
    ) -> None:
        self.program, self.state, self.gradients, self.transport, self.device = program, state, gradients, transport, device
        stage = program.stage
        buffers = {part.name: state[part.name] for part in stage.buffers}
        with torch.no_grad():
            self.prelude = Prelude(stage, buffers)
        self.forward = callable_of(stage.forward)
        begin: dict[Callable[[], None], set[str]] = {partial(gradients.start, number): names for number, names in gradients.early().items()}
        one = program.microbatches == 1
        self.backward = {
            (True, one): accumulating(stage, first=True, begin=begin if one else None),
            (False, True): accumulating(stage, first=False, begin=begin),
            (False, False): accumulating(stage, first=False),
        }  # (is the step's first, is its last) → function
        self.with_gradient = with_gradient(stage)
        self.edges = {edge.name: edge for edge in program.edges}
        self.seed = torch.ones((), dtype=self._loss_dtype(), device=device)
        self.events: list[Event] = []
        self.act: dict[Kind, Callable[[Action], None]] = {
            Kind.PRELUDE: self._prelude,
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.SEND: self._send,
            Kind.RECV: self._receive,
            Kind.SEND_GRAD: self._send,
            Kind.RECV_GRAD: self._receive,
            Kind.REDUCE: lambda action: self.gradients.reduce(),
        }

    def _loss_dtype(self) -> torch.dtype:
        seeds = [node for node in self.program.stage.backward.nodes if node.op == "placeholder" and node.name == "seed"]
        return seeds[0].meta["val"].dtype if seeds else torch.float32

    def step(self, batch: Mapping[str, Tensor], step_key: int, update: Callable[[], None]) -> float:
        """One training step on this rank's part of the batch; returns what this rank adds to the loss."""
        self.act[Kind.UPDATE] = lambda action: update()
        return self._run(self.program.actions, batch, step_key)

    def evaluate(self, batch: Mapping[str, Tensor], step_key: int) -> float:
        """The forward pass alone, with the buffers left as they are."""
        kept = {name: self.state[name] for name in self._updated()}
        actions = [action for action in self.program.actions if action.kind in _FORWARD_ONLY]
        loss = self._run(actions, batch, step_key, backward=False)
        self.state.update(kept)
        return loss

    def _updated(self) -> list[str]:
        return [binding.name for binding in self.program.stage.forward_outputs if binding.kind == "buffer"]

    @torch.no_grad()
    def _run(self, actions: list[Action], batch: Mapping[str, Tensor], step_key: int, *, backward: bool = True) -> float:
        self.batch, self.step_key, self.saving = batch, step_key, backward
        self.crossings: dict[str, Tensor] = {}
        self.values: dict[tuple[str, int, bool], Tensor] = {}  # (edge, microbatch, is a gradient) → tensor
        self.saved: dict[int, list[Any]] = {}
        self.losses: list[Tensor] = []
        self.pending: list[tuple[Action, Any, Tensor]] = []
        self.events = []
        self.backwarded = 0
        with using(self.transport):
            for action in actions:
                start = time.perf_counter()
                self._perform(action)
                self.events.append(Event(action=action, start_s=start, end_s=time.perf_counter()))
            for action, work, _ in self.pending:
                self._wait(action, work)
        self.pending.clear()
        return sum(loss.item() for loss in self.losses)

    def _perform(self, action: Action) -> None:
        """The action; where a collective in it ends because other ranks do not come, the error says so."""
        try:
            self.act[action.kind](action)
        except RuntimeError as error:
            if not _WAITED_IN_VAIN.search(str(error)):
                raise
            raise TransferError(f"{self._who()} waited in vain in {action} for other ranks of a group: {_first_line(error)}") from error

    def _who(self) -> str:
        return f"rank {self.program.rank} (stage {self.program.stage.stage})"

    def _prelude(self, action: Action) -> None:
        self.crossings = self.prelude.run(self.batch)

    def _forward(self, action: Action) -> None:
        stage, microbatch = self.program.stage, action.microbatch
        results = self.forward([self._input(binding, microbatch) for binding in stage.forward_inputs])
        if self.saving:
            self.saved[microbatch] = results[len(stage.forward_outputs) :]
        for binding, value in zip(stage.forward_outputs, results, strict=False):
            if binding.kind == "edge":
                self.values[binding.name, microbatch, False] = value
            elif binding.kind == "buffer":
                self.state[binding.name] = value  # not copied there: the backward pass may read the old one
            else:
                self.losses.append(value)

    def _input(self, binding: Binding, microbatch: int) -> Tensor:
        if binding.kind == "edge":
            return self.values.pop((binding.name, microbatch, False))
        if binding.kind == "crossing":
            return self._crossing(binding.name, microbatch)
        if binding.kind == "random":
            return torch.tensor([self.step_key, microbatch])  # on the cpu, where the draws read it
        return self.state[binding.name]

    def _crossing(self, name: str, microbatch: int) -> Tensor:
        split = next(crossing.split for crossing in self.program.stage.crossings if crossing.name == name)
        value = self.crossings[name]
        return value if split is None else take(value, split, self.program.microbatches, microbatch).contiguous()

    def _backward(self, action: Action) -> None:
        stage, microbatch = self.program.stage, action.microbatch
        inputs: list[Any] = self.saved.pop(microbatch)
        for binding in stage.backward_inputs:
            inputs.append(self.seed if binding.kind == "seed" else self.values.pop((binding.name, microbatch, True)))
        inputs += [self.gradients.of[name] for name in self.with_gradient]
        self.backwarded += 1
        results = self.backward[self.backwarded == 1, self.backwarded == self.program.microbatches](inputs)
        names = [binding.name for binding in stage.backward_outputs if binding.kind == "edge"]
        for name, value in zip(names, results, strict=True):
            self.values[name, microbatch, True] = self._zeros(name) if value is None else value

    def _zeros(self, edge: str) -> Tensor:
        return torch.zeros(self.edges[edge].shape, dtype=self.edges[edge].dtype, device=self.device)

    def _send(self, action: Action) -> None:
        value = self.values.pop((action.edge, action.microbatch, action.kind is Kind.SEND_GRAD)).contiguous()
        self.pending.append((action, self.transport.send(value, action.peer), value))

    def _receive(self, action: Action) -> None:
        edge = self.edges[action.edge]
        value = torch.empty(edge.shape, dtype=edge.dtype, device=self.device)
        self._wait(action, self.transport.receive(value, action.peer))
        self.values[action.edge, action.microbatch, action.kind is Kind.RECV_GRAD] = value

    def _wait(self, action: Action, work: Any) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise TransferError(
                f"{self._who()} waited in vain for {action}: {_first_line(error)}. "
                f"Look at what rank {action.peer} did last, or allow more time"
            ) from error


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(".")
