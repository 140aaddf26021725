"""Ranks that die or stall in the middle of a step: the job ends within seconds, with the cause first, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from tests.clusters import made_up
from tests.models import mlp

import shardwise as sw
from shardwise.errors import RankFailed
from shardwise.runtime.executor import Executor
from shardwise.runtime.launch import launch

pytestmark = pytest.mark.distributed

PATIENCE_S = 15


@pytest.fixture(scope="module")
def pipeline() -> sw.Plan:
    model, batch = mlp()
    plan = sw.plan(model, batch, made_up(2), "pp=2,microbatches=2,schedule=1f1b")
    assert isinstance(plan, sw.Plan)
    return plan


@pytest.fixture(scope="module")
def tensors() -> sw.Plan:
    model, batch = mlp()
    plan = sw.plan(model, batch, made_up(2), "tp=2")
    assert isinstance(plan, sw.Plan)
    return plan


@pytest.fixture(autouse=True)
def no_orphans() -> Iterator[None]:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before and child.status() != "zombie"]
    assert left == []


def trained(plan: sw.Plan, steps: int, stop: str, timeout_s: float) -> float:
    """Steps on one rank; rank 0 or 1 stops in its second step as `stop` says."""
    model, batch = mlp()
    job = sw.parallelize(model, batch, plan=plan, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01), timeout_s=timeout_s)
    loss = job.step(batch)
    if stop == "kill 1" and dist.get_rank() == 1:
        replace_forwards(job.executor, lambda inputs: os.kill(os.getpid(), signal.SIGKILL))
    if stop == "raise 1" and dist.get_rank() == 1:
        replace_forwards(job.executor, lambda inputs: 1 / 0)
    if stop == "stall 0" and dist.get_rank() == 0:
        stall(job.executor)
    for _ in range(steps - 1):
        loss = job.step(batch)
    return loss


def replace_forwards(executor: Executor, forward: Callable[[Any], Any]) -> None:
    executor.forward = dict.fromkeys(executor.forward, forward)


def stall(executor: Executor) -> None:
    (forward,) = executor.forward.values()

    def late(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        time.sleep(60)
        return forward(inputs)

    replace_forwards(executor, late)


def failure(plan: sw.Plan, stop: str, timeout_s: float = 30.0) -> RankFailed:
    started = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        launch(trained, (plan, 3, stop, timeout_s), ranks=2, threads=1, timeout_s=timeout_s)
    assert time.monotonic() - started < PATIENCE_S
    return caught.value


def test_steps_without_a_death_lower_the_loss(pipeline: sw.Plan) -> None:
    first, last = (launch(trained, (pipeline, steps, "", 30.0), ranks=2, threads=1) for steps in (1, 4))
    assert first[0] == first[1] and last[0] == last[1]
    assert last[0] < first[0]


@pytest.mark.parametrize("plan", ["pipeline", "tensors"])
def test_a_killed_rank_is_named(plan: str, request: pytest.FixtureRequest) -> None:
    error = failure(request.getfixturevalue(plan), "kill 1")
    assert (error.rank, error.kind) == (1, "SIGKILL")


@pytest.mark.parametrize("plan", ["pipeline", "tensors"])
def test_a_rank_that_raises_is_the_one_shown(plan: str, request: pytest.FixtureRequest) -> None:
    error = failure(request.getfixturevalue(plan), "raise 1")
    assert (error.rank, error.kind) == (1, "ZeroDivisionError")


def test_a_transfer_that_times_out_names_rank_and_action(pipeline: sw.Plan) -> None:
    error = failure(pipeline, "stall 0", timeout_s=2.0)
    assert (error.rank, error.kind) == (1, "TransferError")
    assert "rank 1 (stage 1) waited in vain for recv 0" in error.reason and "from rank 0" in error.reason


def test_a_collective_that_times_out_names_rank_and_action(tensors: sw.Plan) -> None:
    error = failure(tensors, "stall 0", timeout_s=2.0)
    assert (error.rank, error.kind) == (1, "TransferError")
    assert "rank 1 (stage 0) waited in vain in forward 0" in error.reason
