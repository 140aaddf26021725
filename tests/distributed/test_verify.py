"""Whole steps on real ranks equal one device's; and verify fails where something is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.clusters import made_up
from tests.models import Example, bert, gpt2, llama, mlp, unet

import shardwise as sw
from shardwise.runtime.launch import launch
from shardwise.verify.verify import Report

pytestmark = pytest.mark.distributed

FLOAT64_BOUND = 1e-10


def verified(example: Example, ranks: int, layout: str, dtype: torch.dtype = torch.float64) -> Report:
    model, batch = example
    report = sw.verify(model, batch, cluster=made_up(ranks), layout=layout, dtype=dtype)
    assert isinstance(report, Report)
    return report


CASES: dict[str, tuple[Callable[[], Example], int, str]] = {
    "llama tp2": (lambda: llama(layers=1), 2, "tp=2"),
    "gpt2 pp2": (lambda: gpt2(layers=2), 2, "pp=2,microbatches=2"),
    "gpt2 pp2 gpipe": (lambda: gpt2(layers=1), 2, "pp=2,microbatches=4,schedule=gpipe"),
    "bert dp2, labels ignored unevenly": (lambda: bert(layers=1), 2, "dp=2,microbatches=2"),
    "unet dp2": (unet, 2, "dp=2"),
    "unet tp2": (unet, 2, "tp=2"),
    "gpt2 dropout tp2": (lambda: gpt2(layers=1, dropout=0.1), 2, "tp=2"),
    "gpt2 dropout dp2": (lambda: gpt2(layers=1, dropout=0.1), 2, "dp=2,microbatches=2"),
    "gpt2, 31 tokens, dp2 cp2": (lambda: gpt2(layers=1, sequence=31), 4, "dp=2,cp=2,microbatches=2,attention=ring"),
    "gpt2 tp2 pp2": (lambda: gpt2(layers=1), 4, "tp=2,pp=2"),
}


@pytest.mark.parametrize("case", CASES)
def test_same_numbers_as_one_device(case: str) -> None:
    example, ranks, layout = CASES[case]
    report = verified(example(), ranks, layout)
    assert report.ok, f"{report.first_difference}\n{report}"
    assert report.max_relative_error <= FLOAT64_BOUND
    assert report.first_difference is None
    assert report.loss == pytest.approx(report.reference_loss, rel=FLOAT64_BOUND)
    assert "same numbers as one device: yes" in str(report)


def _trained(plan: sw.Plan) -> tuple[slice, list[float]]:
    """Three steps on a rank, the last two on its own samples."""
    model, batch = gpt2(layers=1, sequence=13)
    job = sw.parallelize(model, batch, plan=plan, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
    mine = {name: tensor[job.batch_slice] for name, tensor in batch.items()}
    return job.batch_slice, [job.step(batch), job.step(mine, local=True), job.step(mine, local=True)]


def test_ranks_that_share_sequences_take_the_same_samples() -> None:
    model, batch = gpt2(layers=1, sequence=13)
    plan = sw.plan(model, batch, made_up(4), "dp=2,cp=2,microbatches=1")
    found = launch(_trained, (plan,), ranks=4, threads=1)
    assert [samples for samples, _ in found] == [slice(0, 2), slice(0, 2), slice(2, 4), slice(2, 4)]
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    for _, each in found:
        assert each == pytest.approx(losses, rel=1e-5)


def test_same_numbers_in_float32() -> None:
    report = verified(gpt2(layers=1), 4, "tp=2,pp=2", torch.float32)
    assert report.ok, str(report)
    assert FLOAT64_BOUND < report.max_relative_error < 1e-4, "it was computed in float32, and well"
    assert max(each.bound for each in report.differences) < 1e-3


# -- verify can fail -----------------------------------------------------------------------------------------------------------------------


class Dropping(torch.nn.Module):
    """A linear layer, dropout, another one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Dropout(0.5), torch.nn.Linear(32, 4))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.net(x), y)


def dropping() -> Example:
    torch.manual_seed(0)
    return Dropping().train(), {"x": torch.randn(8, 16), "y": torch.randn(8, 4)}


def test_a_mean_over_the_local_count_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardwise.sharding.rules.loss._loss", lambda call, tensors: call.run(tensors))
    report = verified(mlp(), 2, "dp=2")
    assert not report.ok and report.first_difference == "loss"
    assert report.loss == pytest.approx(2 * report.reference_loss)
    assert "same numbers as one device: NO" in str(report) and "gradient of net." in str(report)


def test_a_dropped_gradient_reduction_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardwise.runtime.gradients.Gradients.start", lambda self, number: None)
    monkeypatch.setattr("shardwise.runtime.gradients.Gradients.reduce", lambda self: None)
    report = verified(mlp(), 2, "dp=2,zero=0")
    assert not report.ok and report.first_difference == "gradient of net.0.weight"
    copies = {each.name: each.error for each in report.differences if each.name.startswith("copies of")}
    assert all(error > 0 for error in copies.values()), "the ranks' copies differ, too"


def test_a_reshard_with_a_wrong_backward_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is right and gradients are not."""
    from shardwise.sharding import reshard
    from shardwise.sharding.types import P

    right = reshard.Reshard.backward

    def wrong(self: Any, gradient: torch.Tensor) -> torch.Tensor:
        return right(self, gradient) * (0.5 if reshard.dual(self.target) == P else 1.0)

    monkeypatch.setattr(reshard.Reshard, "backward", wrong)
    report = verified(llama(layers=1), 2, "tp=2")
    assert not report.ok and report.loss == pytest.approx(report.reference_loss)
    assert report.first_difference is not None and report.first_difference.startswith("gradient of model.")


def test_a_draw_that_depends_on_the_rank_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verified(dropping(), 2, "dp=2").ok
    monkeypatch.setattr(
        "shardwise.sharding.rules.random.global_indices",
        lambda size, splits, microbatch, device: torch.arange(splits[-1].part.length if splits else size),
    )
    assert verified(dropping(), 2, "dp=2").first_difference == "loss"
