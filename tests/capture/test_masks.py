"""Masks made of constants alone: attention is told what they say, and the numbers stay the model's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.clusters import made_up
from tests.models import bert, gpt2, llama
from torch import Tensor, nn

from shardwise.capture.export import capture
from shardwise.capture.graph import Graph, Op
from shardwise.capture.masks import without_masks
from shardwise.planner.layout import Layout
from shardwise.verify.verify import verify

N = 6
Mask = Callable[[Tensor], Tensor]


def rows(n: int = N) -> Tensor:
    return torch.arange(n)[:, None]


def columns(n: int = N) -> Tensor:
    return torch.arange(n)[None]


def packed(x: Tensor) -> Tensor:
    """As transformers makes it: the causal mask, within sequences that are packed; here there is one."""
    positions = torch.arange(N)[None].expand(len(x), -1)
    segments = (torch.diff(positions, prepend=positions[:, :1] - 1) != 1).cumsum(-1)
    sample, q, k = torch.arange(len(x))[:, None, None], rows()[None], columns()[None]
    same = torch.ones((), dtype=torch.bool) & (segments[sample, q] == segments[sample, k])
    return (same & (k <= q))[:, None]


CAUSAL: dict[str, Mask] = {
    "<=": lambda x: columns() <= rows(),
    "<": lambda x: columns() < rows() + 1,
    ">=": lambda x: rows() >= columns(),
    ">": lambda x: rows() + 1 > columns(),
    "of samples": lambda x: (columns() <= rows())[None, None].expand(len(x), 1, N, N),
    "and all": lambda x: (columns() <= rows()) & (columns() > rows() - N),
    "far apart": lambda x: 10 * columns() < 10 * rows() + 3,
    "packed": packed,
    "added": lambda x: torch.full((N, N), float("-inf"), dtype=x.dtype).triu(1),
    "added, finite": lambda x: torch.full((N, N), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1),
    "lower triangle": lambda x: torch.ones(N, N, dtype=torch.bool).tril(),
}
ALL: dict[str, Mask] = {
    "ones": lambda x: torch.ones(N, N, dtype=torch.bool),
    "expanded": lambda x: (columns() >= 0)[None, None].expand(len(x), 1, N, N),
    "nothing added": lambda x: torch.zeros(N, N, dtype=x.dtype),
    "a wide window": lambda x: (rows() - columns()).abs() < N,
}
OTHER: dict[str, Mask] = {
    "a window": lambda x: (columns() <= rows()) & (columns() > rows() - 3),
    "strictly before": lambda x: (columns() < rows()) | (columns() == 0),
    "later keys": lambda x: columns() >= rows(),
    "one more": lambda x: columns() <= rows() + 1,
    "added": lambda x: -(rows() - columns()).abs().to(x.dtype),
    "the batch's": lambda x: x[:, :1, :, :1].transpose(-1, -2) > -9,
    "columns twice": lambda x: torch.div(columns(), 2, rounding_mode="floor") <= torch.div(rows(), 2, rounding_mode="floor"),
    "not alike for all": lambda x: (columns() <= rows())[None, None] & (torch.arange(len(x)) > 0)[:, None, None, None] | (columns() == 0),
}


class Attends(nn.Module):
    def __init__(self, mask: Mask, dropout: float = 0.0, keys: int = N) -> None:
        super().__init__()
        self.project, self.mask, self.dropout, self.keys = nn.Linear(4, 12), mask, dropout, keys

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, -1)
        out = F.scaled_dot_product_attention(
            q, k[:, :, : self.keys], v[:, :, : self.keys], attn_mask=self.mask(x), dropout_p=self.dropout, scale=0.7
        )
        return out.square().sum()


def attention_of(graph: Graph) -> Op:
    (op,) = [each for each in graph.ops if "attention" in each.name]
    return op


def captured(mask: Mask, dropout: float = 0.0, keys: int = N) -> tuple[nn.Module, Tensor, Graph]:
    torch.manual_seed(0)
    model, x = Attends(mask, dropout, keys).double(), torch.randn(3, 2, N, 4, dtype=torch.float64)
    return model, x, capture(model, {"x": x})


def assert_same_gradients(model: nn.Module, x: Tensor, graph: Graph) -> None:
    expected = torch.autograd.grad(model(x), list(model.parameters()))
    found = torch.autograd.grad(graph.run(dict(model.named_parameters()), {"x": x})[graph.loss], list(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_masks_are_said(name: str, dropout: float) -> None:
    model, x, graph = captured(CAUSAL[name], dropout)
    op = attention_of(graph)
    assert op.argument(3, "attn_mask") is None
    assert op.argument(5, "is_causal") is True
    assert not [each for each in graph.ops if each.name == "aten.arange.default"], "what only the mask needed is gone"
    if not dropout:
        assert_same_gradients(model, x, graph)


@pytest.mark.parametrize("name", ALL)
def test_masks_that_hide_nothing_are_left_out(name: str) -> None:
    model, x, graph = captured(ALL[name])
    op = attention_of(graph)
    assert op.argument(3, "attn_mask") is None
    assert not op.argument(5, "is_causal", False)
    assert_same_gradients(model, x, graph)


@pytest.mark.parametrize("name", OTHER)
def test_other_masks_stay(name: str) -> None:
    model, x, graph = captured(OTHER[name])
    op = attention_of(graph)
    assert op.argument(3, "attn_mask") is not None
    assert not op.argument(5, "is_causal", False)
    assert_same_gradients(model, x, graph)


def test_fewer_keys_than_queries_are_not_causal() -> None:
    model, x, graph = captured(lambda x: columns(4) <= rows(), keys=4)
    assert attention_of(graph).argument(3, "attn_mask") is not None
    assert_same_gradients(model, x, graph)


@pytest.mark.parametrize("name", ["<=", "<", ">=", ">", "of samples", "and all", "far apart", "packed"])
def test_large_masks_are_followed_without_being_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 3 * N  # positions of three samples; a mask has more
    monkeypatch.setattr("shardwise.capture.export.without_masks", lambda ops, constants: without_masks(ops, constants, largest))
    _, _, graph = captured(CAUSAL[name])
    assert attention_of(graph).argument(5, "is_causal") is True


@pytest.mark.parametrize("name", ["a window", "later keys", "one more", "columns twice", "not alike for all", "the batch's"])
def test_other_large_masks_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardwise.capture.export.without_masks", lambda ops, constants: without_masks(ops, constants, 3 * N))
    _, _, graph = captured(OTHER[name])
    assert attention_of(graph).argument(3, "attn_mask") is not None


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_transformers_models_are_given_no_mask(kind: str) -> None:
    model, batch = {"gpt2": gpt2, "llama": llama, "bert": bert}[kind]()
    batch.pop("attention_mask", None)
    graph = capture(model, batch)
    found = [op for op in graph.ops if "attention" in op.name]
    assert found
    assert all(op.argument(3, "attn_mask") is None for op in found)
    assert all(bool(op.argument(5, "is_causal", False)) == (kind != "bert") for op in found)


@pytest.mark.parametrize("layout", ["tp=2", "cp=2,attention=ring", "cp=2,attention=gather", "cp=2,attention=ulysses"])
def test_a_step_split_over_ranks_is_that_of_one_device(layout: str) -> None:
    report = verify(*gpt2(layers=1), cluster=made_up(Layout.parse(layout).ranks), layout=layout, processes=False)
    assert report.ok, f"{layout}: {report}"
