"""Performs a rank's actions, one after the other: the only loop of the runtime."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from shardwise.errors import TransferError
from shardwise.program.actions import Action, Kind, Message
from shardwise.program.program import Binding, Program, StageProgram
from shardwise.program.reductions import beginnings
from shardwise.program.reuse import without_reuse
from shardwise.runtime.gradients import Gradients
from shardwise.runtime.graphs import Function, Prelude, accumulating, callable_of
from shardwise.runtime.regions import Compiler
from shardwise.runtime.transport import Transport, using
from shardwise.sharding.types import take

__all__ = ["Event", "Executor"]

_WAITED_IN_VAIN = re.compile(r"timed out|connection (was )?(closed|reset)", re.IGNORECASE)  # gloo's and NCCL's words


@dataclass(frozen=True, kw_only=True)
class Event:
    """One performed action; times in seconds of `time.perf_counter`."""

    action: Action
    start_s: float
    end_s: float


class Executor:
    """Runs a program's steps on the tensors of this rank.

    state: the rank's parts of parameters and buffers, by name; they are read, and updated buffers are put there.
    current: the action that it performs, or performed last. compiler: of the stages' forward and backward graphs, None where torch's
    kernels run them as they are.
    """

    def __init__(
        self,
        program: Program,
        state: dict[str, Tensor],
        gradients: Gradients,
        transport: Transport,
        device: torch.device,
        compiler: Compiler | None = None,
    ) -> None:
        self.program, self.state, self.gradients, self.transport, self.device = program, state, gradients, transport, device
        self.renew()
        as_it_is = partial(callable_of, in_heap=device.type == "cpu")
        self.forward = {number: _forward_function(program, number, compiler, as_it_is) for number in program.stages}
        self.backward = _backward_functions(program, gradients, compiler, as_it_is)
        self.buffers = {
            (kind, number): [gradients.of[name] for name in stage.gradients(kind)]
            for number, stage in program.stages.items()
            for kind in stage.graphs
            if kind in (Kind.BACKWARD, Kind.WEIGHT)
        }
        self.edges = {edge.name: edge for edge in program.edges}
        self.local_edges = program.local_edges
        self.seeds = {
            number: torch.ones((), dtype=_loss_dtype(stage), device=device)
            for number, stage in program.stages.items()
            if any(binding.kind == "seed" for binding in stage.backward_inputs)
        }
        self.events: list[Event] = []
        self.current: Action | None = None
        self.outputs: dict[str, list[Tensor]] = {}  # of a program for inference: number of the output → one of each microbatch
        self.act: dict[Kind, Callable[[Action], None]] = {
            Kind.PRELUDE: self._prelude,
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.WEIGHT: self._weight,
            Kind.SEND: self._send,
            Kind.POST: self._post,
            Kind.RECV: self._receive,
            Kind.SEND_GRAD: self._send,
            Kind.POST_GRAD: self._post,
            Kind.RECV_GRAD: self._receive,
            Kind.REDUCE: lambda action: self.gradients.reduce(),
        }

    @torch.no_grad()
    def renew(self) -> None:
        """Computes what depends on fixed buffers alone, or on nothing."""
        self.preludes = {
            number: Prelude(stage, {part.name: self.state[part.name] for part in stage.buffers})
            for number, stage in self.program.stages.items()
        }

    def step(self, batch: Mapping[str, Tensor], step_key: int, update: Callable[[], None]) -> float:
        """One training step on this rank's part of the batch; returns what this rank adds to the loss."""
        self.act[Kind.UPDATE] = lambda action: update()
        loss = self._run(self.program.actions, batch, step_key)
        self.state.update(self.changed)
        return loss

    def scale_gradients(self, scale: float) -> None:
        """From now on gradients are so many times as large."""
        for seed in self.seeds.values():
            seed.fill_(scale)

    @property
    def loss(self) -> float:
        """What this rank has added to the loss in the present or last run."""
        return sum(loss.item() for loss in self.losses)

    def evaluate(self, batch: Mapping[str, Tensor], step_key: int) -> dict[str, list[Tensor]]:
        """A program for inference: the number of each output that this rank's stages make → one of each microbatch."""
        self._run(self.program.actions, batch, step_key, backward=False)
        found = self.outputs
        self.outputs = {}
        return found

    @torch.no_grad()
    def _run(self, actions: list[Action], batch: Mapping[str, Tensor], step_key: int, *, backward: bool = True) -> float:
        self.batch, self.step_key, self.saving = batch, step_key, backward
        self.crossings: dict[int, dict[str, Tensor]] = {}
        self.values: dict[Message, Tensor] = {}
        self.saved: dict[tuple[Kind, int, int], list[Any]] = {}  # (who takes it, stage, microbatch) → what the part before it saved
        self.changed: dict[str, Tensor] = {}  # buffers, from the next step on
        self.losses: list[Tensor] = []
        self.outputs = {}
        self.pending: list[tuple[Action, Any, Tensor]] = []
        self.posted: dict[Message, tuple[Any, Tensor]] = {}
        self.events = []
        with using(self.transport):
            for action in actions:
                start = time.perf_counter()
                self._perform(action)
                self.events.append(Event(action=action, start_s=start, end_s=time.perf_counter()))
            self._free_sent(lambda sent, work: True)
        return self.loss

    def _perform(self, action: Action) -> None:
        """The action; where a collective in it ends because other ranks do not come, the error says so."""
        self.current = action
        try:
            self.act[action.kind](action)
        except RuntimeError as error:
            if not _WAITED_IN_VAIN.search(str(error)):
                raise
            raise TransferError(f"{self._who()} waited in vain in {action} for other ranks of a group: {_first_line(error)}") from error

    def _who(self) -> str:
        return f"rank {self.program.rank} ({self.program.where})"

    # -- computing -------------------------------------------------------------------------------------------------------------------------

    def _prelude(self, action: Action) -> None:
        self.crossings = {number: prelude.run(self.batch) for number, prelude in self.preludes.items()}

    def _forward(self, action: Action) -> None:
        stage, microbatch = self.program.stages[action.stage], action.microbatch
        results = self.forward[action.stage]([self._input(stage, binding, microbatch) for binding in stage.forward_inputs])
        if self.saving:
            self.saved[Kind.BACKWARD, action.stage, microbatch] = results[len(stage.forward_outputs) :]
        for binding, value in zip(stage.forward_outputs, results, strict=False):
            if binding.kind == "edge":
                self._made(binding.name, microbatch, value, gradient=False)
            elif binding.kind == "buffer":
                self.changed[binding.name] = value  # not put into the state: other stages and the backward pass may read the old one
            elif binding.kind == "output":
                self.outputs.setdefault(binding.name, []).append(value)
            else:
                self.losses.append(value)

    def _input(self, stage: StageProgram, binding: Binding, microbatch: int) -> Tensor:
        if binding.kind == "edge":
            return self.values.pop((binding.name, microbatch, False))
        if binding.kind == "crossing":
            return self._crossing(stage, binding.name, microbatch)
        if binding.kind == "random":
            return torch.tensor([self.step_key, microbatch])  # on the cpu, where the draws read it
        return self.state[binding.name]

    def _crossing(self, stage: StageProgram, name: str, microbatch: int) -> Tensor:
        split = next(crossing.split for crossing in stage.crossings if crossing.name == name)
        value = self.crossings[stage.stage][name]
        return value if split is None else take(value, split, self.program.microbatches, microbatch).contiguous()

    def _backward(self, action: Action) -> None:
        number, microbatch = action.stage, action.microbatch
        stage = self.program.stages[number]
        inputs: list[Any] = self.saved.pop((Kind.BACKWARD, number, microbatch))
        for binding in stage.backward_inputs:
            inputs.append(self.seeds[number] if binding.kind == "seed" else self.values.pop((binding.name, microbatch, True)))
        inputs += self.buffers[Kind.BACKWARD, number]
        results = self.backward[action](inputs)
        names = [binding.name for binding in stage.backward_outputs if binding.kind == "edge"]
        for name, value in zip(names, results, strict=False):
            self._made(name, microbatch, self._zeros(name) if value is None else value, gradient=True)
        if stage.weight is not None:
            self.saved[Kind.WEIGHT, number, microbatch] = results[len(names) :]

    def _weight(self, action: Action) -> None:
        inputs = self.saved.pop((Kind.WEIGHT, action.stage, action.microbatch))
        inputs += self.buffers[Kind.WEIGHT, action.stage]
        self.backward[action](inputs)

    def _zeros(self, edge: str) -> Tensor:
        return torch.zeros(self.edges[edge].shape, dtype=self.edges[edge].dtype, device=self.device)

    def _made(self, edge: str, microbatch: int, value: Tensor, *, gradient: bool) -> None:
        """Graphs are made for edges' tensors without gaps, as they come out of a transfer."""
        self.values[edge, microbatch, gradient] = value.contiguous() if edge in self.local_edges else value

    # -- transfers -------------------------------------------------------------------------------------------------------------------------

    def _send(self, action: Action) -> None:
        self._free_sent(lambda sent, work: work.is_completed())
        value = self.values.pop(action.message).contiguous()
        self.pending.append((action, self.transport.send(value, action.peer), value))

    def _post(self, action: Action) -> None:
        edge = self.edges[action.edge]
        value = torch.empty(edge.shape, dtype=edge.dtype, device=self.device)
        self.posted[action.message] = self.transport.receive(value, action.peer), value

    def _receive(self, action: Action) -> None:
        if action.message not in self.posted:
            self._post(action)
        work, value = self.posted.pop(action.message)
        self._wait(action, work)
        self.values[action.message] = value
        if action.proves:
            self._free_sent(lambda sent, work: sent.message in action.proves)

    def _free_sent(self, arrived: Callable[[Action, Any], bool]) -> None:
        """Lets go of sent values that are known to have arrived; gloo tells of none until it is waited for."""
        kept = []
        for action, work, value in self.pending:
            if arrived(action, work):
                self._wait(action, work)
            else:
                kept.append((action, work, value))
        self.pending = kept

    def _wait(self, action: Action, work: Any) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise TransferError(
                f"{self._who()} waited in vain for {action}: {_first_line(error)}. "
                f"Look at what rank {action.peer} did last, or allow more time"
            ) from error


def _forward_function(program: Program, number: int, compiler: Compiler | None, as_it_is: Callable[[fx.Graph], Function]) -> Function:
    graph = program.stages[number].forward
    if compiler is None:
        return as_it_is(graph)
    trains = any(action.kind is Kind.BACKWARD for action in program.actions)
    return compiler.function(without_reuse(graph), f"forward of stage {number}" + ("" if trains else " in eval mode"))


def _backward_functions(
    program: Program, gradients: Gradients, compiler: Compiler | None, as_it_is: Callable[[fx.Graph], Function]
) -> dict[Action, Function]:
    """What each BACKWARD and WEIGHT runs: the first in a step to make a parameter's gradient puts it into its buffer, later ones add to it,
    and the last one that a message of gradients waits for begins to send it. Those alike share a function.

    as_it_is: what makes a graph callable that is not compiled.
    """
    writers = program.writers()
    first = {name: actions[0] for name, actions in writers.items()}
    begins = beginnings(program)
    wide = {part.name for part in program.parameters if part.wide != part.dtype}
    known: dict[tuple[Any, ...], Function] = {}
    found: dict[Action, Function] = {}
    for action in program.actions:
        if action.kind not in (Kind.BACKWARD, Kind.WEIGHT):
            continue
        stage = program.stages[action.stage]
        fresh = frozenset(name for name in stage.gradients(action.kind) if first[name] is action)
        begun = begins.get(action, {})
        key = (action.kind, action.stage, fresh, tuple(begun))
        if key not in known:
            outputs = stage.backward_outputs if action.kind is Kind.BACKWARD else stage.weight_outputs
            begin: dict[Callable[[], None], set[str]] = {partial(gradients.start, message): names for message, names in begun.items()}
            graph = stage.graphs[action.kind]
            if compiler is None:
                known[key] = accumulating(graph, outputs, first=fresh, wide=wide, begin=begin, make=as_it_is)
            else:
                make = partial(compiler.function, where=f"{action.kind.value} of stage {action.stage}")
                known[key] = accumulating(without_reuse(graph), outputs, first=fresh, wide=wide, begin=begin, make=make)
        found[action] = known[key]
    return found


def _loss_dtype(stage: StageProgram) -> torch.dtype:
    return next(node.meta["val"].dtype for node in stage.backward.nodes if node.op == "placeholder" and node.name == "seed")


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(".")
