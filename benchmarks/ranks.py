"""A contestant's ranks: processes that build the model once and then take one step whenever told to.

Between steps a rank waits on its pipe and uses no CPU, so contestants can take turns on the same cores.
"""

from __future__ import annotations

import datetime
import importlib
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from benchmarks.context import Contestant, RankContext, Recording, StepFunction
from benchmarks.hosts import enter
from benchmarks.memory import PeakMeter, limit_data, peak_meter, resident_bytes
from benchmarks.processes import Child, receive
from benchmarks.throttle import Throttled
from benchmarks.workloads import SMALL, Batch, optimizer

SET_UP_TIMEOUT_S = 300.0
STEP_TIMEOUT_S = 180.0


@dataclass(frozen=True, kw_only=True)
class RankStep:
    """What one rank measured in one step; `peak_bytes` is its peak since the first step, less its size before the model existed;
    `actions`: seconds by kind of action, of contestants that say so."""

    seconds: float
    loss: float | None
    peak_bytes: int
    actions: Mapping[str, float] = field(default_factory=dict)


class Team:
    """All ranks of one contestant."""

    def __init__(self, contestant: Contestant, contexts: list[RankContext]) -> None:
        self.contestant = contestant
        port = _free_port()
        self._ranks = [Child(f"{contestant.name} rank {context.rank}", _serve, contestant, context, port) for context in contexts]
        self._speeds = contexts[0].speeds

    def wait_ready(self) -> list[int]:
        """Wait until all ranks have built their model; return each rank's peak bytes meanwhile."""
        return receive(self._ranks, SET_UP_TIMEOUT_S, "building the model")

    def step(self, index: int) -> list[RankStep]:
        """Let all ranks take training step `index`."""
        with ExitStack() as stack:
            for rank, speed in zip(self._ranks, self._speeds, strict=True):
                if speed < 1:
                    stack.enter_context(Throttled([rank.pid], speed))
            for rank in self._ranks:
                rank.send(index)
            return receive(self._ranks, STEP_TIMEOUT_S, f"step {index}")

    def end(self) -> None:
        """End all processes."""
        for rank in self._ranks:
            rank.end()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(pipe: Connection, contestant: Contestant, context: RankContext, port: int) -> None:
    if context.host is not None:
        enter(context.host.namespace)
    torch.set_num_threads(contestant.threads)
    builder = _resolve(contestant.builder)
    _join_group(context, port)
    _touch_libraries(context)
    before, meter = resident_bytes(), peak_meter()
    meter.reset()
    if context.scenario.data_bytes is not None:
        limit_data(context.scenario.data_bytes)
    step = builder(context)
    pipe.send(meter.peak_bytes() - before)
    _answer_steps(pipe, context, step, meter, before)


def _answer_steps(pipe: Connection, context: RankContext, step: StepFunction, meter: PeakMeter, before: int) -> None:
    meter.reset()
    while True:
        batch = context.workload.batch(pipe.recv())
        if context.world_size > 1:
            dist.barrier()
        seconds, loss = _timed(step, batch)
        actions = step.actions() if isinstance(step, Recording) else {}
        pipe.send(RankStep(seconds=seconds, loss=loss, peak_bytes=meter.peak_bytes() - before, actions=actions))


def _timed(step: StepFunction, batch: Batch) -> tuple[float, float | None]:
    start = time.perf_counter()
    loss = step(batch)
    return time.perf_counter() - start, loss


def _resolve(builder: str) -> Callable[[RankContext], StepFunction]:
    module, _, function = builder.partition(":")
    found: Callable[[RankContext], StepFunction] = getattr(importlib.import_module(module), function)
    return found


def _join_group(context: RankContext, port: int) -> None:
    """Set what `torchrun` sets, and join the process group."""
    place = {"RANK": context.rank, "LOCAL_RANK": context.rank, "WORLD_SIZE": context.world_size}
    place |= {"LOCAL_WORLD_SIZE": context.world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    if context.host is not None:
        os.environ.update(MASTER_ADDR=context.host.first_address, GLOO_SOCKET_IFNAME=context.host.device)
    if context.plan_path is not None:  # as it does where it starts the ranks or joins the group itself
        from shardwise.environment import record_no_messages

        record_no_messages()
    if context.world_size > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=STEP_TIMEOUT_S))


def _touch_libraries(context: RankContext) -> None:
    """Train a tiny model of the family once, so that the code it runs is resident before the size is taken."""
    if context.plan_path is not None:  # ours
        from shardwise.runtime.preload import preload

        preload()
    workload = SMALL[context.workload.family]
    model = workload.build()
    model(**workload.batch(0)).loss.backward()
    optimizer(model.parameters()).step()
    if context.world_size > 1:
        dist.all_reduce(torch.zeros(1))
