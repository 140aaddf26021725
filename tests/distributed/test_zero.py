"""Divided states, gradients and parameters on real ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.clusters import made_up
from tests.models import Example, gpt2, mlp, unet

import shardwise as sw
from shardwise.planner.layout import Layout
from shardwise.runtime.launch import launch
from shardwise.verify.verify import Report

pytestmark = pytest.mark.distributed

CASES: dict[str, tuple[Callable[[], Example], str]] = {
    "zero 1": (lambda: gpt2(layers=1), "dp=2,zero=1"),
    "zero 2, microbatches, batch parts of 3 ranks": (lambda: mlp(samples=9), "dp=3,zero=2,microbatches=3"),
    "zero 3 with tp, full, dropout": (lambda: gpt2(layers=1, dropout=0.1), "dp=2,tp=2,zero=3,recompute=full"),
    "groups of 2 of 4, zero 3": (mlp, "dp=4,zero=3,shard=2"),
    "batch norm, zero 3, full": (unet, "dp=2,zero=3,recompute=full"),
}


@pytest.mark.parametrize("case", CASES)
def test_same_numbers_as_one_device(case: str) -> None:
    make, layout = CASES[case]
    report = sw.verify(*make(), cluster=made_up(Layout.parse(layout).ranks), layout=layout)
    assert isinstance(report, Report)
    assert report.ok, f"{report.first_difference}\n{report}"


def trained(plan: sw.Plan) -> tuple[list[float], dict[str, torch.Tensor], list[int]]:
    """Losses of four steps, this rank's parts after them, and elements of the parameter, gradient and optimizer's state."""
    model, batch = gpt2(layers=1, samples=4, dropout=0.1)
    job = sw.parallelize(model, batch, plan=plan, optimizer=lambda named: torch.optim.AdamW([p for _, p in named], lr=1e-2))
    losses = [job.step(batch) for _ in range(4)]
    name = "transformer.h.0.mlp.c_fc.weight"
    moments = job.optimizer.state[job.parameters.of[name]]["exp_avg"]
    sizes = [job.state[name].numel(), job.gradients.of[name].numel(), moments.numel()]
    return losses, {each: tensor.clone() for each, tensor in job.state.items()}, sizes


Trained = list[tuple[list[float], dict[str, torch.Tensor], list[int]]]
ELEMENTS = 64 * 256


def run(layout: str) -> Trained:
    model, batch = gpt2(layers=1, samples=4, dropout=0.1)
    plan = sw.plan(model, batch, made_up(2), layout=layout)
    assert isinstance(plan, sw.Plan)
    return launch(trained, (plan,), ranks=2, timeout_s=60.0)


@pytest.fixture(scope="module")
def whole() -> Trained:
    return run("dp=2,microbatches=1,zero=0")


@pytest.mark.parametrize(
    ("zero", "recompute", "sizes"),
    [
        (1, "none", [ELEMENTS, ELEMENTS, ELEMENTS // 2]),
        (2, "selective", [ELEMENTS, ELEMENTS // 2, ELEMENTS // 2]),
        (3, "full", [ELEMENTS // 2] * 3),
    ],
)
def test_training_goes_the_same_way(zero: int, recompute: str, sizes: list[int], whole: Trained) -> None:
    """Four steps of AdamW."""
    assert whole[0][2] == [ELEMENTS, ELEMENTS, ELEMENTS]
    divided = run(f"dp=2,microbatches=1,zero={zero},recompute={recompute}")
    assert divided[0][0] == divided[1][0] == pytest.approx(whole[0][0], rel=1e-6)
    assert divided[0][2] == sizes
    for name, tensor in whole[0][1].items() if zero < 3 else ():
        parts = [rank[1][name] for rank in divided]
        assert torch.equal(parts[0], parts[1]), f"{name}: ranks gather the same"
        torch.testing.assert_close(parts[0], tensor, rtol=1e-4, atol=1e-6)


def test_a_second_run_is_the_same_bit_by_bit() -> None:
    one, other = (run("dp=2,microbatches=2,zero=3,recompute=full") for _ in range(2))
    assert [rank[0] for rank in one] == [rank[0] for rank in other]
    assert all(torch.equal(one[rank][1][name], other[rank][1][name]) for rank in (0, 1) for name in one[rank][1])
