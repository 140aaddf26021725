"""The explanation names the operators without a rule: what was found of them, and what it costs to keep them whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.clusters import made_up
from torch import Tensor, nn

import shardwise as sw
from shardwise.sharding import declare, discover


def _gate(x: Tensor, weight: Tensor) -> Tensor:
    return torch.softmax(x, -1) * weight


def _mix(x: Tensor) -> Tensor:
    return x.cumsum(0).cumsum(1).cumsum(2) * x.mean()


def _register(name: str, function: object, schema: str) -> None:
    operator = torch.library.custom_op(f"shardwise_test::{name}", function, mutates_args=(), schema=schema)  # type: ignore[call-overload]
    operator.register_fake(lambda x, *more: torch.empty_like(x))
    operator.register_autograd(
        lambda ctx, gradient: _gradients(function, ctx.saved_tensors, gradient),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )


def _gradients(function: object, tensors: tuple[Tensor, ...], gradient: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [each.detach().requires_grad_() for each in tensors]
        return torch.autograd.grad(function(*leaves), leaves, gradient)  # type: ignore[operator]


_register("explained_gate", _gate, "(Tensor x, Tensor weight) -> Tensor")
_register("explained_mix", _mix, "(Tensor x) -> Tensor")


class Block(nn.Module):
    def __init__(self, mix: bool) -> None:
        super().__init__()
        self.up, self.down, self.weight, self.mix = nn.Linear(16, 32), nn.Linear(32, 16), nn.Parameter(torch.ones(32)), mix

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.ops.shardwise_test.explained_gate(self.up(x), self.weight))
        return torch.ops.shardwise_test.explained_mix(x) if self.mix else x


class Model(nn.Module):
    def __init__(self, mix: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(mix) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SHARDWISE_CACHE", str(tmp_path))
    monkeypatch.setattr(declare, "_DECLARED", {})
    monkeypatch.setattr(discover, "_found", {})
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def explained(layout: str, *, mix: bool) -> str:
    plan = sw.plan(Model(mix), {"x": torch.randn(4, 6, 16)}, made_up(2), layout)
    assert isinstance(plan, sw.Plan), str(plan)
    assert all(len(line) <= 110 for line in plan.explanation)
    return " ".join(" ".join(plan.explanation).split())


def test_rules_that_were_found_are_named() -> None:
    text = explained("tp=2", mix=False)
    assert "shardwise_test.explained_gate.default, 3 ×, found by execution: a b c, c -> a b c, splits a, b" in text
    assert "Kept whole" not in text


def test_declared_rules_are_named() -> None:
    sw.declare_rule("shardwise_test::explained_gate", "... n, n -> ... n", whole="n")
    assert "explained_gate.default, 3 ×, declared: e0 e1 n, n -> e0 e1 n, splits e0, e1" in explained("tp=2", mix=False)


@pytest.mark.parametrize("layout", ["tp=2", "dp=2"])
def test_what_is_kept_whole_is_named_with_its_cost(layout: str) -> None:
    text = explained(layout, mix=True)
    assert "Kept whole on every rank, for want of a rule (shardwise.declare_rule adds one)" in text
    assert (
        "shardwise_test.explained_mix.default in layers.*, 3 ×: no way of splitting it was found by running it on parts; split over" in text
    )
    cost = text.split("split over 2 ranks a step would take ")[1].split(" less")[0]
    value, unit = cost.split()
    assert float(value) > 0 and unit in ("ms", "s")


def test_one_rank_keeps_nothing_whole() -> None:
    assert "Kept whole" not in explained("pp=2", mix=True)


def test_the_numbers_are_one_device_s(tmp_path: Path) -> None:
    for layout in ("tp=2", "dp=2"):
        report = sw.verify(Model(True), {"x": torch.randn(4, 6, 16)}, cluster=made_up(2), layout=layout, processes=False)
        assert report.ok, str(report)
