"""Optimizer states, gradients and parameters divided over data ranks, and what is recomputed: the same numbers as one device, in every mix.

`verify` compares every gradient, and the parameters after a step of AdamW on one device's gradients, gathered or in parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from examples.models.vision import pvt
from tests.clusters import made_up
from tests.models import Example, bert, gpt2, llama, mlp, unet, vit
from torch import Tensor, nn
from torch.nn import functional as F

import shardwise as sw
from shardwise.planner.layout import Layout
from shardwise.program.reductions import Reduction
from shardwise.runtime.gradients import Gradients
from shardwise.verify.verify import Report


def verified(example: Example, layout: str, **more: Any) -> Report:
    """Verified to be equal, on as many ranks as the layout takes."""
    report = sw.verify(*example, cluster=made_up(Layout.parse(layout).ranks), layout=layout, processes=False, **more)
    assert isinstance(report, Report)
    assert report.ok, f"{report.first_difference}\n{report}"
    return report


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


class Routed(nn.Module):
    """Each token goes through its best two of four experts, weighed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.gate = nn.LayerNorm(width), nn.Linear(width, 4, bias=False)
        self.experts = nn.ModuleList(Expert(width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        chances = self.gate(normed).softmax(-1)
        best = torch.topk(chances, 2).indices
        weights = torch.zeros_like(chances).scatter(-1, best, chances.gather(-1, best))
        return x + sum(weights[..., [number]] * expert(normed) for number, expert in enumerate(self.experts))


class Routing(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed, self.layers, self.head = nn.Embedding(16, width), nn.ModuleList(Routed(width) for _ in range(2)), nn.Linear(width, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return F.cross_entropy(self.head(hidden)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def moe() -> Example:
    torch.manual_seed(0)
    return Routing(), {"tokens": torch.randint(16, (4, 6))}


class Odd(nn.Module):
    """Parameters that no number of ranks divides: of 1, 3 and 5 elements, a scalar, one of a single row; a frozen one, one that is read
    twice, and one that the loss does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(5, 3), nn.Linear(3, 1)
        self.scale, self.shift = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.randn(1, 5))
        self.frozen = nn.Parameter(torch.randn(5, 5), requires_grad=False)
        self.shared = nn.Parameter(torch.randn(5, 5))
        self.unused = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = torch.tanh(x @ self.shared @ self.frozen + self.shift)
        x = torch.tanh(x @ self.shared.t() * self.scale) + 0.0 * self.unused.detach().sum()
        return F.mse_loss(self.out(torch.relu(self.inner(x))), y)


def odd() -> Example:
    torch.manual_seed(0)
    return Odd(), {"x": torch.randn(6, 5), "y": torch.randn(6, 1)}


CASES: dict[str, tuple[Callable[[], Example], str]] = {
    "tied decoder, zero 1": (lambda: gpt2(layers=1), "dp=2,zero=1"),
    "tied decoder, zero 2, microbatches": (lambda: gpt2(layers=1), "dp=2,zero=2,microbatches=2"),
    "tied decoder, zero 3, full": (lambda: gpt2(layers=1), "dp=2,zero=3,recompute=full,microbatches=2"),
    "dropout, zero 3 with tp, full": (lambda: gpt2(layers=1, dropout=0.1), "dp=2,tp=2,zero=3,recompute=full"),
    "dropout, selective, tp and microbatches": (lambda: gpt2(layers=1, dropout=0.1), "tp=2,recompute=selective,microbatches=2"),
    "tied stages, zero 1": (lambda: gpt2(layers=2), "dp=2,pp=2,zero=1,microbatches=2"),
    "dropout, selective in the first block of each stage": (
        lambda: gpt2(layers=4, dropout=0.1),
        "tp=2,pp=2,recompute=selective,recompute_blocks=1,microbatches=2",
    ),
    "zero 3, full in the first block": (lambda: gpt2(layers=3), "dp=2,zero=3,recompute=full,recompute_blocks=1,microbatches=2"),
    "tied stages, zero 2, selective": (lambda: gpt2(layers=2), "dp=2,pp=2,zero=2,recompute=selective,microbatches=2"),
    "tied stages, dropout, zero 3, full": (
        lambda: gpt2(layers=2, dropout=0.1),
        "dp=2,pp=2,zero=3,recompute=full,microbatches=2,schedule=gpipe",
    ),
    "tied stages, zero-bubble, zero 3, full": (
        lambda: gpt2(layers=2),
        "dp=2,pp=2,zero=3,recompute=full,microbatches=2,schedule=zb-h1",
    ),
    "several stages a rank, dropout, zero 1, selective": (
        lambda: gpt2(layers=4, dropout=0.1),
        "dp=2,pp=2,zero=1,recompute=selective,microbatches=2,schedule=interleaved",
    ),
    "zero-bubble in a V, zero 2": (lambda: gpt2(layers=4), "dp=2,pp=2,zero=2,microbatches=2,schedule=zb-v"),
    "llama, zero 2 with tp, full": (lambda: llama(layers=1), "dp=2,tp=2,zero=2,recompute=full"),
    "vit on 3, 5 samples, zero 1": (lambda: vit(layers=2, samples=5), "dp=3,zero=1"),
    "vit on 3, zero 3, full": (lambda: vit(layers=1, samples=5), "dp=3,zero=3,recompute=full"),
    "experts, zero 3, selective": (moe, "dp=2,zero=3,recompute=selective"),
    "experts, zero 1 with tp, full": (moe, "dp=2,tp=2,zero=1,recompute=full"),
    "batch norm on 3, zero 2, full": (lambda: unet(samples=5), "dp=3,zero=2,recompute=full"),
    "batch norm, zero 3 with tp, selective": (unet, "dp=2,tp=2,zero=3,recompute=selective"),
    "gradients of convolutions with their channels last, zero 2": (pvt, "dp=2,zero=2"),
    "gradients of convolutions with their channels last, zero 3, full": (pvt, "dp=2,zero=3,recompute=full"),
    "both data axes, zero 1": (lambda: bert(layers=1, sequence=15), "dp=2,cp=2,zero=1"),
    "both data axes, zero 3, dropout, full": (lambda: gpt2(layers=1, sequence=15, dropout=0.1), "dp=2,cp=2,zero=3,recompute=full"),
    "cp alone, zero 2": (lambda: gpt2(layers=1, sequence=15), "cp=2,zero=2"),
    "groups of 2 of 4, zero 1": (mlp, "dp=4,zero=1,shard=2"),
    "groups of 2 of 4, zero 2": (mlp, "dp=4,zero=2,shard=2,microbatches=2"),
    "groups over both data axes, zero 3": (lambda: gpt2(layers=1), "dp=2,cp=2,zero=3,shard=2"),
    "parameters that go alone, zero 1": (lambda: mlp(hidden=160), "dp=3,zero=1"),
    "parameters that go alone, zero 2": (lambda: mlp(hidden=160), "dp=3,zero=2"),
    "parameters that go alone, zero 3": (lambda: mlp(hidden=160), "dp=3,zero=3"),
    "odd sizes on 3, zero 1": (odd, "dp=3,zero=1,microbatches=2"),
    "odd sizes on 3, zero 2": (odd, "dp=3,zero=2"),
    "odd sizes on 6, zero 3": (odd, "dp=6,zero=3"),
    "odd sizes, groups of 3 of 6, zero 3": (odd, "dp=6,zero=3,shard=3"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers_as_one_device(case: str) -> None:
    make, layout = CASES[case]
    report = verified(make(), layout)
    assert all(item in report.layout for item in layout.split(",") if item.startswith(("zero", "recompute")))


def differs(layout: str) -> str:
    """The first quantity that is not one device's."""
    report = sw.verify(*mlp(), cluster=made_up(2), layout=layout, processes=False)
    assert isinstance(report, Report) and not report.ok
    return str(report.first_difference)


@pytest.mark.parametrize("zero", [1, 2])
def test_parameters_that_are_not_gathered_are_found(zero: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardwise.runtime.parameters.Parameters.gather", lambda self: None)
    assert differs(f"dp=2,zero={zero}") == "the optimizer's step"


def test_gradients_that_are_not_summed_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(self: Gradients, number: int, reduction: Reduction) -> Callable[[], object]:
        self.scattered[number] = torch.cat(
            [division.take(self.of[p.name]).reshape(-1) for p, division in zip(reduction.parameters, reduction.divisions, strict=True)]
        )
        return lambda: None

    monkeypatch.setattr("shardwise.runtime.gradients.Gradients._begin_scatter", alone)
    assert differs("dp=2,zero=1").startswith("gradient of net")
