"""Calls that exporting would not follow become operators that it follows, with the model's results and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from shardwise.capture.export import capture
from shardwise.capture.opaque import Opaque
from shardwise.errors import CaptureError
from shardwise.verify.one_device import prepare


class Applied(nn.Module):
    """A linear layer and then `code`, with buffers that code may change."""

    def __init__(self, code: Callable[..., Tensor]) -> None:
        super().__init__()
        self.linear, self.code = nn.Linear(4, 6).double(), code
        self.register_buffer("mean", torch.linspace(0, 1, 6, dtype=torch.float64))

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        return self.code(self, self.linear(x), place)


def bincount(self: Applied, h: Tensor, place: Tensor) -> Tensor:
    counts = torch.bincount(place, minlength=6)
    weighted = place.bincount(h.detach()[:, 0], minlength=7)
    return (h * (counts.double().mean() - counts)).sum() + (weighted[:6] * h).sum()


def places(self: Applied, h: Tensor, place: Tensor) -> Tensor:
    return (h[:, place[0]] * h[place[1]].sum()).sum() + (h[..., None, -place[2]] * h[1, place[0]]).square().sum()


def written_to_a_buffer(self: Applied, h: Tensor, place: Tensor) -> Tensor:
    with torch.no_grad():
        F.normalize(h.sum(0), dim=0, out=self.mean)
    return (h * self.mean.clone()).square().sum()


def data_of_a_buffer(self: Applied, h: Tensor, place: Tensor) -> Tensor:
    self.mean.data.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
    self.mean.data *= 2
    return (h - self.mean).square().sum()


def data_of_a_result(self: Applied, h: Tensor, place: Tensor) -> Tensor:
    h = h * 2
    h.data.masked_fill_(h.data > 1, -3.0)
    h.data[:, 2].mul_(3.0)
    h.detach().t()[0].add_(1.0).sub_(0.5)
    return (h.sigmoid() * h.data).sum()


def variance(self: Applied, h: Tensor, place: Tensor) -> Tensor:
    loss = F.gaussian_nll_loss(h, self.mean.expand_as(h), h.square().clamp(min=0) * 1e-2, full=True, eps=1e-3)
    return loss + F.gaussian_nll_loss(h, h.detach() + 1, h[:, 0].exp(), reduction="sum") + F.gaussian_nll_loss(h, h.detach() + 1, 2.0)


def distributions(self: Applied, h: Tensor, place: Tensor) -> Tensor:
    normal = torch.distributions.Normal(h[:, :3], h[:, 3:].exp())
    chosen = torch.distributions.Categorical(logits=h).log_prob(place)
    standard = torch.distributions.Normal(torch.zeros_like(h[:, :3]), 1.0)
    return torch.distributions.kl_divergence(normal, standard).sum() - chosen.mean() + normal.entropy().mean()


def members(self: Applied, h: Tensor, place: Tensor) -> Tensor:
    weights = torch.stack([self.linear.weight, self.linear.weight.flip(0)])
    each = torch.vmap(lambda weight, scale: F.linear(h[:, :4], weight) * scale, in_dims=(0, None))(weights, self.mean[0] + 1)
    return each.tanh().sum() + torch.vmap(torch.dot)(h, h).square().mean()


@pytest.mark.parametrize(
    "code", [members, bincount, places, written_to_a_buffer, data_of_a_buffer, data_of_a_result, variance, distributions]
)
def test_numbers_are_the_models_own(code: Callable[..., Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    model = Applied(code)
    batch = {"x": torch.randn(5, 4, dtype=torch.float64, generator=generator), "place": torch.tensor([3, 0, 5, 2, 2])}
    graph = capture(model, batch)
    assert not graph.kept and not graph.checks and not any(isinstance(op.target, Opaque) for op in graph.ops)
    state = {name: each.detach().clone() for name, each in (*model.named_parameters(), *model.named_buffers())} | graph.constants
    weights = [state[name].requires_grad_() for name in ("linear.weight", "linear.bias")]
    results = graph.run(state, batch)
    loss = model(**batch)
    assert torch.distributions.Distribution._validate_args
    torch.testing.assert_close(results[graph.loss], loss, rtol=1e-13, atol=1e-13)
    wanted = torch.autograd.grad(loss, [model.linear.weight, model.linear.bias])
    for mine, own in zip(torch.autograd.grad(results[graph.loss], weights), wanted, strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-12, atol=1e-13)
    for name, value in graph.updates.items():
        torch.testing.assert_close(results[value], dict(model.named_buffers())[name])
    assert ("mean" in graph.updates) == (code in (data_of_a_buffer, written_to_a_buffer))


class Recomputed(nn.Module):
    """A batch whose names have capitals, and which is changed; recomputation the older way: a function with a backward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, X: Tensor, y_True: Tensor) -> Tensor:
        X.mul_(2)
        return F.mse_loss(checkpoint(lambda x: self.second(x.tanh()), self.first(X), use_reentrant=True), y_True)


def test_reentrant_recomputation_and_names_in_capitals() -> None:
    model, batch = Recomputed(), {"y_True": torch.randn(5, 4), "X": torch.randn(5, 4)}
    graph = capture(model, batch)
    assert set(graph.inputs) == {"X", "y_True"} == set(graph.batch_dims)
    state = {name: each.detach().clone().requires_grad_() for name, each in model.named_parameters()}
    found = torch.autograd.grad(graph.run(state, batch)[graph.loss], list(state.values()))
    model(y_True=batch["y_True"], X=batch["X"].clone()).backward()
    for mine, own in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(mine, own.grad)
    assert prepare(model, batch).captured


def test_whole_numbers_that_become_real_are_cast() -> None:
    """In a graph in float64 they are float64, as its weights are."""
    model = Applied(lambda self, h, place: F.linear(place[:4] / 3 + (place * 0.5)[0], self.linear.weight.float()).sum() + h.sum()).float()
    reference = prepare(model, {"x": torch.randn(5, 4), "place": torch.tensor([3, 0, 5, 2, 2])})
    assert reference.widest is torch.float64
    assert all(each.ok for each in reference.captured)


class Particular(nn.Module):
    """Kept since its way depends on values; it does not take what tracing hands it."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_exporting():
            raise ValueError("no gradient here")
        return x * 2


def test_code_that_fails_when_it_runs_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Particular())
    graph = capture(model, {"input": torch.randn(5, 4)}, loss=torch.sum)
    (kept,) = (op.target for op in graph.ops if isinstance(op.target, Opaque))
    with pytest.raises(CaptureError, match=r"1 is kept as one operator, and its code raised ValueError: no gradient here\. If the model"):
        kept.run([torch.randn(5, 4, requires_grad=True)])


def test_averages_over_all_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.Flatten(), nn.Linear(64, 1)).double()
    model(torch.randn(5, 2, 6, 6, dtype=torch.float64))  # one batch is seen already
    batch = {"input": torch.randn(5, 2, 6, 6, dtype=torch.float64)}
    graph = capture(model, batch, loss=torch.mean)
    assert not graph.kept and not graph.checks
    state = {name: each.detach().clone() for name, each in (*model.named_parameters(), *model.named_buffers())} | graph.constants
    results = graph.run(state, batch)
    torch.testing.assert_close(results[graph.loss], model(**batch).mean())
    assert {name.split(".")[1] for name in graph.updates} == {"running_mean", "running_var", "num_batches_tracked"}
    for name, value in graph.updates.items():
        torch.testing.assert_close(results[value], dict(model.named_buffers())[name], rtol=1e-14, atol=1e-14)


def test_a_sparse_buffer_is_refused() -> None:
    model = Applied(lambda self, h, place: torch.sparse.mm(self.links, h.float()).sum())
    model.register_buffer("links", torch.eye(5).to_sparse())
    with pytest.raises(CaptureError, match=r"links is a tensor of layout torch.sparse_coo.*index_add"):
        capture(model, {"x": torch.randn(5, 4, dtype=torch.float64), "place": torch.arange(5)})


def test_a_parameter_changed_in_place_is_refused() -> None:
    def halved(self: Applied, h: Tensor, place: Tensor) -> Tensor:
        self.linear.weight.data *= 0.5
        return h.sum()

    with pytest.raises(CaptureError, match=r"changes linear.weight in place.*a changed copy of it"):
        capture(Applied(halved), {"x": torch.randn(5, 4, dtype=torch.float64), "place": torch.arange(5)})
