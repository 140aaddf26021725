"""Runs a graph captured for inference on the ranks that train, with the parameters as they are there.

forward, of each microbatch     joined over microbatches     joined over data ranks     handed on along the pipeline
S(0) 0 1 | 2 3                  0 1 2 3                      0 1 2 3 4 5 6 7            the same on every rank
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.capture.graph import Graph, Value
from shardwise.planner.inference import Answering
from shardwise.program.program import Program
from shardwise.runtime.executor import Executor
from shardwise.runtime.gradients import Gradients
from shardwise.runtime.regions import Compiler
from shardwise.runtime.transport import Transport, using
from shardwise.sharding.collectives import group_name
from shardwise.sharding.reshard import Axis, Choose, Reshard
from shardwise.sharding.types import I, P, Placement, Shard, join, take

__all__ = ["Inference"]


@dataclass(frozen=True, kw_only=True)
class Inference:
    """One rank of it.

    state: the rank's parts of parameters and buffers, as the programs read them; those that training changes are read anew in each run.
    """

    answering: Answering
    program: Program
    state: dict[str, Tensor]
    transport: Transport
    choose: Choose
    device: torch.device
    executor: Executor

    @staticmethod
    def of(
        answering: Answering,
        program: Program,
        state: dict[str, Tensor],
        transport: Transport,
        choose: Choose,
        device: torch.device,
        compiler: Compiler | None = None,
    ) -> Inference:
        """`program`: this rank's of the answering's assignment and tables. compiler: as of `Executor`."""
        gradients = Gradients(program, transport, device)  # none
        executor = Executor(program, state, gradients, transport, device, compiler)
        return Inference(
            answering=answering,
            program=program,
            state=state,
            transport=transport,
            choose=choose,
            device=device,
            executor=executor,
        )

    @property
    def graph(self) -> Graph:
        return self.answering.applied.assignment.graph

    def part(self, value: Value, whole: Tensor) -> Tensor:
        """What this rank reads of a batch's tensor."""
        placement = self._type(value)["dp"]
        if isinstance(placement, Shard):
            whole = take(whole, placement, self.program.mesh["dp"], self.program.coordinates["dp"])
        return whole.to(self.device, value.dtype if whole.is_floating_point() else None).contiguous()

    @torch.no_grad()
    def run(self, batch: Mapping[str, Tensor], step_key: int) -> list[Tensor]:
        """The graph's outputs for this rank's part of a batch, whole, on every rank."""
        made, graph, found = self.executor.evaluate(batch, step_key), self.graph, dict[Value, Tensor]()
        with using(self.transport):
            for number, value in enumerate(graph.outputs):
                if value not in found:
                    found[value] = self._whole(value, made.get(str(number)))
        return [found[value] for value in graph.outputs]

    def _whole(self, value: Value, microbatches: list[Tensor] | None) -> Tensor:
        """An output, from what this rank's stage made of it in each microbatch (None: another stage made it)."""
        home = self.program.placement[self.answering.applied.cut.returned_by(value)]
        if microbatches is None:
            received = torch.empty(value.shape, dtype=value.dtype, device=self.device)
            self.transport.receive(received, self._rank(home)).wait()
            return received
        type_ = self._type(value)
        whole = self._over_data_ranks(value, _joined(microbatches, type_["mb"]), type_["dp"]).contiguous()
        for pipe in range(self.program.mesh["pp"]):
            if pipe != home:
                self.transport.send(whole, self._rank(pipe)).wait()
        return whole

    def _over_data_ranks(self, value: Value, part: Tensor, placement: Placement) -> Tensor:
        ranks, group = self.program.mesh["dp"], self.program.groups["dp"]
        if ranks == 1 or not (placement == P or isinstance(placement, Shard)):
            return part
        axis = Axis(name="dp", group=group_name("dp", group), ranks=ranks, rank=self.program.coordinates["dp"])
        size = value.shape[placement.dim] if isinstance(placement, Shard) else 0
        return Reshard(source=placement, target=I, axis=axis, source_size=size, choose=self.choose).forward(part.contiguous())

    def _type(self, value: Value) -> dict[str, Placement]:
        return self.answering.applied.assignment.produced(value)

    def _rank(self, pipe: int) -> int:
        """The rank at this one's place on another stage."""
        return self.program.rank + (pipe - self.program.coordinates["pp"]) * self.program.stage_ranks


def _joined(microbatches: list[Tensor], placement: Placement) -> Tensor:
    if len(microbatches) == 1 or not (placement == P or isinstance(placement, Shard)):
        return microbatches[0]
    if isinstance(placement, Shard):
        return join(microbatches, placement)
    return torch.stack(microbatches).sum(0)
