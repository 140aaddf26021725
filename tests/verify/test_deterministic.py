"""A program that runs twice gives the same bits, also where ranks are held up at random before each message and each action."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tests.clusters import made_up
from tests.models import Example, bert, gpt2, llama, mixtral, unet
from tests.program.support import Built, build
from tests.verify.test_experts_over_data import example as experts
from torch import Tensor

import shardwise as sw
from shardwise.capture.state import state_of
from shardwise.planner.layout import Layout
from shardwise.runtime.executor import Executor
from shardwise.runtime.gradients import Gradients
from shardwise.runtime.in_process import InProcess, run_ranks
from shardwise.runtime.job import batch_part, step_key
from shardwise.runtime.launch import launch
from shardwise.runtime.parameters import Parameters
from shardwise.runtime.transport import Distributed, Transport
from shardwise.runtime.weights import own_part

CPU = torch.device("cpu")
MESSAGES = (
    *("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "exchange_rows", "begin_shift", "begin_all_gather"),
    *("begin_reduce_scatter", "begin_sum", "send", "receive"),
)
PAUSES_S = (0.0, 0.0, 0.001, 0.008)
STEPS = 3

small = partial(gpt2, hidden=32, sequence=16, dropout=0.1)
short = partial(llama, layers=1, hidden=32, sequence=16)
LAYOUTS: dict[str, tuple[Callable[[], Example], str]] = {
    "tp": (short, "tp=4,microbatches=1"),
    "gpipe": (small, "pp=2,microbatches=4,schedule=gpipe"),
    "1f1b and tp, recomputed": (small, "tp=2,pp=2,microbatches=4,schedule=1f1b,recompute=full"),
    "interleaved": (lambda: small(layers=4), "pp=2,microbatches=4,schedule=interleaved,recompute=selective"),
    "zb-h1 with zero 2": (small, "dp=2,pp=2,zero=2,microbatches=2,schedule=zb-h1"),
    "zb-2p with zero 3": (small, "dp=2,pp=2,zero=3,microbatches=2,schedule=zb-2p"),
    "zb-v": (small, "pp=2,microbatches=4,schedule=zb-v"),
    "zero 1, batch norm": (unet, "dp=2,zero=1"),
    "zero 2": (small, "dp=4,zero=2,microbatches=1"),
    "zero 3, recomputed": (small, "dp=4,zero=3,recompute=full,microbatches=1"),
    "zero 3 in groups with tp": (short, "dp=4,tp=2,zero=3,shard=2"),
    "cp, gathered": (lambda: bert(layers=1, hidden=32, sequence=16), "cp=2,dp=2,zero=3,attention=gather"),
    "cp, in a ring": (short, "cp=4,attention=ring,microbatches=2"),
    "cp, by heads": (lambda: short(key_heads=4), "cp=2,tp=2,zero=1,attention=ulysses"),
    "ep": (lambda: experts(layers=2, gated=True, biased=True), "dp=4,ep=2,microbatches=2"),
    "ep, no row for one rank": (lambda: experts(favoured=(0.0, 1.0, -9.0, -9.0)), "dp=2,ep=2,pp=2,microbatches=2,schedule=zb-h1"),
}


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


Ran = tuple[list[float], list[Tensor]]
"""A rank's losses, and after each step its gradients, at the end its parameters and buffers."""


def run(example: Example, built: Built) -> list[Ran]:
    """Some steps of AdamW."""
    model, batch = example
    whole = state_of(model, built.graph)

    def steps(number: int, transport: Transport) -> Ran:
        program = built.programs[number]
        parts = [*program.parameters, *program.buffers]
        state = {part.name: own_part(whole[part.name], part, program, CPU).clone() for part in parts}
        gradients = Gradients(program, transport, CPU)
        parameters = Parameters(program, state, {}, gradients.parts, transport)
        optimizer = torch.optim.AdamW([*(each for _, each in parameters.trained), torch.zeros(0, requires_grad=True)], lr=1e-2)
        executor = Executor(program, state, gradients, transport, CPU)
        mine = batch_part(built.graph, built.plan, program, batch, CPU)

        def update() -> None:
            optimizer.step()
            parameters.gather()

        losses, found = list[float](), list[Tensor]()
        for step in range(STEPS):
            losses.append(executor.step(mine, step_key(0, step), update))
            found += [gradients.parts[name].clone() for name in sorted(gradients.parts)]
        return losses, found + [state[name].clone() for name in sorted(state)]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run_ranks(built.plan.ranks, steps)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_bits_whatever_the_delays(name: str) -> None:
    make, layout = LAYOUTS[name]
    built = build(make(), layout)
    first = run(make(), built)
    assert any(len(set(losses)) == STEPS for losses, _ in first)
    for seed in (0, 1):
        with pytest.MonkeyPatch.context() as patch:
            held_up(patch, InProcess, seed)
            again = run(make(), built)
        for one, other in zip(first, again, strict=True):
            assert one[0] == other[0] and all(map(torch.equal, one[1], other[1]))


def trained(make: Callable[[], Example], plan: sw.Plan, seed: int) -> Ran:
    """Three steps on a rank that is held up at random; seed 0: that is not."""
    with pytest.MonkeyPatch.context() as patch:
        if seed:
            held_up(patch, Distributed, 7 * torch.distributed.get_rank() + seed)
        model, batch = make()
        job = sw.parallelize(model, batch, plan=plan, optimizer=lambda named: torch.optim.AdamW(named, lr=1e-2))
        losses = [job.step(batch) for _ in range(STEPS)]
        return losses, [tensor.clone() for _, tensor in (*sorted(job.gradient().items()), *sorted(job.state.items()))]


dropping = partial(gpt2, layers=2, dropout=0.1, samples=12)
ON_PROCESSES: list[tuple[Callable[[], Example], str, str]] = [
    *((dropping, "dp=2,zero=3,recompute=full,microbatches=2", impl) for impl in ("native", "exchange")),
    *((dropping, "dp=2,zero=1,microbatches=2", impl) for impl in ("native", "exchange")),
    *((dropping, "dp=3,zero=0,microbatches=1", impl) for impl in ("native", "exchange")),
    (dropping, "tp=2,pp=2,microbatches=4,schedule=zb-v", "exchange"),
    (short, "dp=2,cp=2,attention=ring,microbatches=1", "native"),
    (partial(mixtral, layers=1, hidden=32, sequence=16), "dp=2,ep=2,zero=1,microbatches=1", "native"),
]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("make", "layout", "impl"), ON_PROCESSES)
def test_the_same_bits_on_processes(make: Callable[[], Example], layout: str, impl: str) -> None:
    """Messages under way beside other work, over gloo, in each implementation that a plan may choose."""
    ranks = Layout.parse(layout).ranks
    plan = sw.plan(*make(), made_up(ranks), layout=layout)
    assert isinstance(plan, sw.Plan)
    plan = plan.model_copy(update={"collectives": {name: [(1e18, impl)] for name in plan.collectives}})
    calm, late = (launch(trained, (make, plan, seed), ranks=ranks, threads=1) for seed in (0, 1))
    for one, other in zip(calm, late, strict=True):
        assert len(set(one[0])) == STEPS and one[0] == other[0] and all(map(torch.equal, one[1], other[1]))
