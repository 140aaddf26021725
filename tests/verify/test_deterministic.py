"""A program that runs twice gives the same bits, also where ranks are held up at random before each message and each action."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.clusters import made_up
from tests.models import Example, bert, gpt2, llama, unet
from torch import Tensor

import shardwise as sw
from shardwise.planner.layout import Layout
from shardwise.runtime.executor import Executor
from shardwise.runtime.in_process import InProcess
from shardwise.runtime.launch import launch
from shardwise.runtime.transport import Distributed
from shardwise.verify.one_device import prepare
from shardwise.verify.ranks import Part, Work, on_threads
from shardwise.verify.verify import lowered

MESSAGES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "begin_all_gather", "begin_reduce_scatter", "begin_sum")
PAUSES_S = (0.0, 0.0, 0.001, 0.008)

LAYOUTS: dict[str, tuple[Callable[[], Example], str]] = {
    "tp": (lambda: llama(layers=1), "tp=4,microbatches=1"),
    "pp and tp, recomputed": (lambda: gpt2(layers=2, dropout=0.1), "tp=2,pp=2,microbatches=4,schedule=1f1b,recompute=full"),
    "interleaved": (lambda: gpt2(layers=4), "pp=2,microbatches=4,schedule=interleaved,recompute=selective"),
    "zero-bubble with zero 2": (lambda: gpt2(layers=2), "dp=2,pp=2,zero=2,microbatches=2,schedule=zb-h1"),
    "zero 3, recomputed": (lambda: gpt2(layers=2, dropout=0.1), "dp=4,zero=3,recompute=full,microbatches=1"),
    "zero 3 in groups with tp": (lambda: llama(layers=1), "dp=4,tp=2,zero=3,shard=2"),
    "zero 1, batch norm": (unet, "dp=2,zero=1"),
    "cp": (lambda: bert(layers=1), "cp=2,dp=2,zero=3"),
}


def bits(parts: list[Part]) -> list[Tensor]:
    """Everything that the ranks report."""
    found = [torch.tensor([part.loss, part.update_error], dtype=torch.float64) for part in parts]
    return found + [each for part in parts for values in (part.gradients, part.buffers) for _, each in sorted(values.items())]


def held_up(patch: pytest.MonkeyPatch, kind: type, seed: int) -> None:
    """Every message and action of this process's ranks comes late."""
    draw = random.Random(seed)

    def late(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **more: Any) -> Any:
            time.sleep(draw.choice(PAUSES_S))
            return function(*args, **more)

        return wrapped

    for owner, names in ((kind, MESSAGES), (Executor, ("_perform",))):
        for name in names:
            patch.setattr(owner, name, late(getattr(owner, name)))


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_bits_whatever_the_delays(name: str) -> None:
    make, layout = LAYOUTS[name]
    model, batch = make()
    reference = prepare(model, batch)
    plan = sw.plan(model, batch, made_up(Layout.parse(layout).ranks), layout=layout)
    assert isinstance(plan, sw.Plan)
    built = lowered(reference, plan, torch.float32)
    whole = reference.step(torch.float32)
    work = Work.of(built.graph, plan, reference.state, reference.batch, torch.float32, reference.seed, whole.gradients)
    first = bits(on_threads(work, built.programs))
    for seed in (0, 1):
        with pytest.MonkeyPatch.context() as patch:
            held_up(patch, InProcess, seed)
            again = bits(on_threads(work, built.programs))
        assert len(first) == len(again)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def trained(plan: sw.Plan, seed: int) -> tuple[list[float], dict[str, Tensor]]:
    """Three steps on a rank that is held up at random; seed 0: that is not."""
    with pytest.MonkeyPatch.context() as patch:
        if seed:
            held_up(patch, Distributed, 7 * torch.distributed.get_rank() + seed)
        model, batch = gpt2(layers=2, dropout=0.1, samples=12)
        job = sw.parallelize(model, batch, plan=plan, optimizer=lambda named: torch.optim.AdamW(named, lr=1e-2))
        losses = [job.step(batch) for _ in range(3)]
        return losses, {name: tensor.clone() for name, tensor in job.state.items()}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("impl", ["native", "exchange"])
@pytest.mark.parametrize(
    "layout", ["dp=2,zero=3,recompute=full,microbatches=2", "dp=2,zero=1,microbatches=2", "dp=3,zero=0,microbatches=1"]
)
def test_the_same_bits_on_processes(layout: str, impl: str) -> None:
    """Messages under way beside other work, over gloo, in each implementation that a plan may choose."""
    model, batch = gpt2(layers=2, dropout=0.1, samples=12)
    ranks = Layout.parse(layout).ranks
    plan = sw.plan(model, batch, made_up(ranks), layout=layout)
    assert isinstance(plan, sw.Plan)
    plan = plan.model_copy(update={"collectives": {name: [(1e18, impl)] for name in plan.collectives}})
    calm, late = (launch(trained, (plan, seed), ranks=ranks, threads=1) for seed in (0, 1))
    for one, other in zip(calm, late, strict=True):
        assert one[0] == other[0] and all(torch.equal(one[1][name], other[1][name]) for name in one[1])
