"""Calls that are rewritten while capturing compute what they did: the same loss and gradients as the model itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwise.capture import operators
from shardwise.capture.export import capture
from shardwise.capture.normalize import RANDOM_STATE


class Model(nn.Module):
    """A linear layer, then `rest`, which may have parameters; the loss is the mean of squares unless it is a number already."""

    def __init__(self, rest: Callable[..., Tensor], inner: nn.Module | None = None) -> None:
        super().__init__()
        self.linear, self.rest, self.inner = nn.Linear(6, 6), rest, inner
        self.register_buffer("weight", torch.tensor([1.0, 2.0, 0.5, 1.5, 3.0, 0.1]))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        found = self.rest(self, self.linear(x), labels)
        return found if found.dim() == 0 else found.square().mean()


def entropy(**more: Any) -> Callable[..., Tensor]:
    def loss(model: Model, x: Tensor, labels: Tensor) -> Tensor:
        weight = model.weight if more.get("weighted") else None
        rest = {name: value for name, value in more.items() if name not in ("weighted", "soft", "image")}
        if more.get("soft"):
            return F.cross_entropy(x.flatten(0, 1), torch.softmax(x.detach().flatten(0, 1).cos(), -1), weight, **rest)
        if more.get("image"):
            return F.cross_entropy(x.transpose(1, 2), labels, weight, **rest)
        return F.cross_entropy(x.flatten(0, 1), labels.flatten(), weight, **rest)

    return loss


def nll(**more: Any) -> Callable[..., Tensor]:
    return lambda model, x, labels: F.nll_loss(x.log_softmax(-1).transpose(1, 2), labels, model.weight, **more)


def through(model: Model, x: Tensor, labels: Tensor) -> Tensor:
    assert model.inner is not None
    return model.inner(x)  # type: ignore[no-any-return]


def looked_up(model: Model, x: Tensor, labels: Tensor) -> Tensor:
    return x.mean(1) + through(model, labels, labels).sum(-1, keepdim=True)


CASES: dict[str, Callable[[], Model]] = {
    **{f"entropy {reduction}": lambda reduction=reduction: Model(entropy(reduction=reduction)) for reduction in ("none", "mean", "sum")},
    "entropy weighted": lambda: Model(entropy(weighted=True)),
    "entropy smoothed": lambda: Model(entropy(label_smoothing=0.1, ignore_index=2)),
    "entropy smoothed and weighted": lambda: Model(entropy(label_smoothing=0.1, weighted=True, ignore_index=2)),
    "entropy smoothed and weighted, each": lambda: Model(entropy(label_smoothing=0.1, weighted=True, reduction="none")),
    "entropy of images": lambda: Model(entropy(image=True, weighted=True)),
    "entropy of probabilities": lambda: Model(entropy(soft=True)),
    "entropy of probabilities, weighted": lambda: Model(entropy(soft=True, weighted=True, label_smoothing=0.2)),
    "entropy of probabilities, sum": lambda: Model(entropy(soft=True, reduction="sum")),
    **{f"nll {reduction}": lambda reduction=reduction: Model(nll(reduction=reduction)) for reduction in ("none", "mean", "sum")},
    "nll ignoring": lambda: Model(nll(ignore_index=2)),
    "batch norm": lambda: Model(through, nn.BatchNorm1d(3)),
    "batch norm without statistics": lambda: Model(through, nn.BatchNorm1d(3, track_running_stats=False)),
    "batch norm in evaluation": lambda: Model(through, nn.BatchNorm1d(3)).eval(),
    "instance norm": lambda: Model(through, nn.InstanceNorm1d(3, affine=True)),
    "instance norm in evaluation": lambda: Model(through, nn.InstanceNorm1d(3, affine=True, track_running_stats=True)).eval(),
    "weight norm": lambda: Model(through, nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))),
    "weight norm of columns": lambda: Model(through, nn.utils.parametrizations.weight_norm(nn.Linear(6, 4), dim=1)),
    **{f"bags, {mode}": lambda mode=mode: Model(looked_up, nn.EmbeddingBag(6, 5, mode=mode)) for mode in ("sum", "mean", "max")},
    "bags with padding": lambda: Model(looked_up, nn.EmbeddingBag(6, 5, padding_idx=1)),
    "sparse embedding": lambda: Model(looked_up, nn.Sequential(nn.Embedding(6, 5, sparse=True), nn.Flatten(1))),
    "recurrent": lambda: Model(lambda model, x, labels: model.inner(x)[0], nn.LSTM(6, 4, 2, bidirectional=True)),  # type: ignore[misc]
}


@pytest.mark.parametrize("name", CASES)
def test_the_captured_graph_is_the_model(name: str) -> None:
    torch.manual_seed(0)
    model = CASES[name]().double()
    batch = {"x": torch.randn(4, 3, 6, dtype=torch.float64), "labels": torch.randint(0, 6, (4, 3))}
    state = {key: value.clone().requires_grad_(value.requires_grad) for key, value in model.named_parameters()}
    state |= {key: value.clone() for key, value in model.named_buffers()}
    graph = capture(model, batch)
    found, wanted = graph.run(state, batch)[graph.loss], model(**batch)
    assert torch.allclose(found, wanted, rtol=1e-10)
    leaves = {key: value for key, value in state.items() if value.requires_grad}
    own = torch.autograd.grad(found, leaves.values(), allow_unused=True)
    whole = dict(zip(leaves, torch.autograd.grad(wanted, [dict(model.named_parameters())[key] for key in leaves]), strict=True))
    for key, gradient in zip(leaves, own, strict=True):
        dense = whole[key].to_dense() if whole[key].is_sparse else whole[key]
        assert torch.allclose(gradient, dense, rtol=1e-8, atol=1e-12), key


def test_attention_dropout_of_grouped_heads() -> None:
    def attend(model: Model, x: Tensor, labels: Tensor) -> Tensor:
        query, key = x.view(4, 3, 3, 2).transpose(1, 2), x[..., :2].reshape(4, 1, 3, 2)
        return F.scaled_dot_product_attention(query, key, key, dropout_p=0.3, is_causal=True, enable_gqa=True)

    model = Model(attend)
    batch = {"x": torch.randn(4, 3, 6), "labels": torch.randint(0, 6, (4, 3))}
    graph = capture(model, batch)
    for op in graph.ops:
        if op.target is operators.dropped_attention:
            op.args = (*op.args[:4], 0.0, *op.args[5:])
    query = model.linear(batch["x"])
    heads, keys = query.view(4, 3, 3, 2).transpose(1, 2), query[..., :2].reshape(4, 1, 3, 2)
    wanted = F.scaled_dot_product_attention(heads, keys, keys, is_causal=True, enable_gqa=True).square().mean()
    found = graph.run(dict(model.named_parameters()), batch | {RANDOM_STATE: torch.tensor([1, 0])})[graph.loss]
    assert torch.allclose(found, wanted, rtol=1e-5)
