"""Code that exporting cannot follow, or would change, is kept as one operator: its results and gradients are the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwise.capture.export import capture
from shardwise.capture.graph import Graph
from shardwise.capture.normalize import RANDOM_STATE
from shardwise.capture.opaque import Opaque
from shardwise.errors import BatchError, CaptureError

Batch = dict[str, Tensor]


def state_of(model: nn.Module, graph: Graph) -> Batch:
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {**{name: named[name].detach().clone() for name in (*graph.parameters, *graph.buffers) if name in named}, **graph.constants}


def check(model: nn.Module, batch: Batch, *, kept: set[str], opaque: int) -> Graph:
    """The captured graph gives the model's loss, gradients and buffers; `kept` and so many operators are opaque."""
    graph = capture(model, batch)
    assert set(graph.kept) == kept
    assert sum(isinstance(op.target, Opaque) for op in graph.ops) == opaque
    state = state_of(model, graph)
    for name, value in graph.parameters.items():
        state[name].requires_grad_(value.requires_grad)
    results = graph.run(state, batch)
    names = list(graph.parameters)
    found = torch.autograd.grad(results[graph.loss], [state[name] for name in names], allow_unused=True)
    loss = model(**batch)
    wanted = torch.autograd.grad(loss, [dict(model.named_parameters())[name] for name in names], allow_unused=True)
    torch.testing.assert_close(results[graph.loss], loss, rtol=1e-6, atol=0.0)
    for name, mine, own in zip(names, found, wanted, strict=True):
        own = torch.zeros_like(state[name]) if own is None else own
        torch.testing.assert_close(torch.zeros_like(own) if mine is None else mine, own, msg=f"gradient of {name}")
    for name, value in graph.updates.items():
        torch.testing.assert_close(results[value], dict(model.named_buffers())[name])
    return graph


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# -- functions with a backward of their own ------------------------------------------------------------------------------------------------


class Scaled(torch.autograd.Function):
    """Doubles one tensor and sums another; the backward is not the one that autograd would derive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float, y: Tensor) -> tuple[Tensor, Tensor]:
        ctx.factor = factor
        return factor * x, y.sum(1)

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor, None, Tensor]:
        return 10 * ctx.factor * first, None, second[:, None].expand(-1, 4) * 3


class WithFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = Scaled.apply(self.first(x), 3.0, self.second(x))
        return (a * b[:, None]).square().mean()


def test_a_function_keeps_its_own_backward() -> None:
    torch.manual_seed(0)
    check(WithFunction(), {"x": inputs(3, 4)}, kept=set(), opaque=1)


class Rounding(torch.autograd.Function):
    """Needs the values of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x.max().item()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class WithRounding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return Rounding.apply(self.linear(x)).sum()


def test_a_function_that_needs_values_is_named() -> None:
    with pytest.raises(CaptureError, match=r"test_keep\.Rounding cannot be kept as one operator: on tensors without values"):
        capture(WithRounding(), {"x": inputs(3, 4)})


# -- submodules ----------------------------------------------------------------------------------------------------------------------------


class Branching(nn.Module):
    """Goes one way or another, as its input's values say; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, None, dict[str, Tensor]]:
        self.calls.add_(1)
        chosen = self.up if x.sum() > 0 else self.down
        return chosen(x), None, {"twice": 2 * x}


class Selecting(nn.Module):
    """Works on the rows that a mask selects."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result = x.clone()
        chosen = x[:, 0] > 0
        result[chosen] = self.linear(x[chosen])
        return result


class Outer(nn.Module):
    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.inner = nn.ModuleList(inner)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.inner:
            found = layer(x)
            x = x + (found[0] + found[2]["twice"] if isinstance(found, tuple) else found)
        return self.last(x).square().mean()


def test_submodules_that_depend_on_values_are_kept_whole() -> None:
    torch.manual_seed(0)
    graph = check(Outer(Branching(), Selecting(), Branching()), {"x": inputs(5, 4)}, kept={"inner.0", "inner.1", "inner.2"}, opaque=3)
    assert "values that training changes" in graph.kept["inner.0"]
    assert "size or value depends on the data" in graph.kept["inner.1"]
    assert set(graph.updates) == {"inner.0.calls", "inner.2.calls"}


class InPlace(nn.Module):
    """Changes its argument, and asks for values."""

    def forward(self, x: Tensor) -> Tensor:
        x *= 2
        return x.relu() if x.sum() > 0 else x


class AroundInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.inner = nn.Linear(4, 4), InPlace()

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        z = self.inner(y)
        return (y * z).sum()


def test_an_argument_changed_in_place_is_changed() -> None:
    torch.manual_seed(0)
    check(AroundInPlace(), {"x": inputs(5, 4)}, kept={"inner"}, opaque=1)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5) if x.sum() > 0 else F.dropout(x, 0.4)


def test_random_numbers_inside_depend_on_step_and_microbatch_alone() -> None:
    torch.manual_seed(0)
    model, batch = Outer(Noisy()), {"x": inputs(6, 4)}
    graph = capture(model, batch)
    state = {name: each.requires_grad_() for name, each in state_of(model, graph).items()}

    def step(number: int) -> tuple[Tensor, Tensor]:
        loss = graph.run(state, {**batch, RANDOM_STATE: torch.tensor([number, 0])})[graph.loss]
        return loss.detach(), torch.autograd.grad(loss, state["first.weight"])[0]

    first, again, other = step(1), step(1), step(2)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])  # the backward pass sees the same mask
    assert not torch.equal(first[0], other[0])


# -- the end of a module -------------------------------------------------------------------------------------------------------------------


class SelectingLoss(nn.Module):
    """The loss is taken where a label is; its weight belongs to the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.body(x).relu()) * self.scale
        valid = labels >= 0
        return {"loss": F.cross_entropy(logits[valid], labels[valid]), "logits": logits}


class Loss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> Tensor:
        return self.model(**batch)["loss"]


def test_the_end_of_the_model_is_kept_alone() -> None:
    torch.manual_seed(0)
    batch = {"x": inputs(5, 4), "labels": torch.tensor([0, -100, 2, 1, -100])}
    graph = check(Loss(SelectingLoss()), batch, kept={"model (its end)"}, opaque=1)
    assert sum(op.name == "aten.linear.default" for op in graph.ops) == 2
    bare = capture(SelectingLoss(), batch)
    assert list(bare.kept) == ["SelectingLoss (its end)"]


class Counting(SelectingLoss):
    """Whose own code and whose child change buffers before its end, and its own code one after it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        for name in ("steps", "seen"):
            self.register_buffer(name, torch.ones(()))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.steps.mul_(3.0)
        logits = self.head(self.body(x).relu()) * self.scale * self.steps
        valid = labels >= 0
        self.seen += valid.sum()
        return {"loss": F.cross_entropy(logits[valid], labels[valid]), "logits": logits}


def test_the_end_changes_what_its_own_code_changes() -> None:
    """Each buffer once; what a child changes is changed there, not by the end that follows it."""
    torch.manual_seed(0)
    batch = {"x": inputs(5, 4), "labels": torch.tensor([0, -100, 2, 1, -100])}
    model = Loss(Counting())
    graph = check(model, batch, kept={"model (its end)"}, opaque=1)
    made = {name: value.producer.name for name, value in graph.updates.items() if value.producer is not None}
    ends = {name for name, producer in made.items() if "opaque" in producer}
    assert ends == {"model.steps", "model.seen"}
    assert made["model.body.1.running_mean"] == "shardwise.batch_norm"


class Both(Counting):
    """Whose own code changes a buffer that its child changes, too."""

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.body[1].running_mean.add_(0.5)
        return super().forward(x, labels)


def test_a_buffer_that_the_end_and_a_child_change_is_refused() -> None:
    batch = {"x": inputs(5, 4), "labels": torch.tensor([0, -100, 2, 1, -100])}
    with pytest.raises(CaptureError, match=r"buffer body\.1\.running_mean of Both is changed by the module's own code and by a submodule"):
        capture(Loss(Both()), batch)


def test_another_number_of_selected_rows_still_works() -> None:
    torch.manual_seed(0)
    model = Loss(SelectingLoss())
    graph = capture(model, {"x": inputs(5, 4), "labels": torch.tensor([0, -100, 2, 1, -100])})
    other = {"x": inputs(5, 4), "labels": torch.tensor([0, 1, 2, 1, -100])}
    torch.testing.assert_close(graph.run(state_of(model, graph), other)[graph.loss], model(**other).detach())


class Sized(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x[:, 0] > 0]


class AroundSized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.inner = nn.Linear(4, 4), Sized()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.inner(x)).sum()


def test_a_result_of_another_size_is_refused_when_it_runs() -> None:
    torch.manual_seed(0)
    model, x = AroundSized(), inputs(6, 4)
    graph = check(model, {"x": x}, kept={"inner"}, opaque=1)
    with pytest.raises(BatchError, match=r"inner made a tensor of shape \[6, 4\] as result 0, the plan was made for \[\d, 4\]"):
        graph.run(state_of(model, graph), {"x": x.abs()})


# -- questions about the batch -------------------------------------------------------------------------------------------------------------


class Masking(nn.Module):
    """Does something else when nothing is masked."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        assert torch.all(mask >= 0).item()
        if mask.any():
            x = x * mask[:, None]
        return self.linear(x).sum() * int(mask.sum())


def test_questions_about_the_batch_become_checks() -> None:
    torch.manual_seed(0)
    model, batch = Masking(), {"x": inputs(3, 4), "mask": torch.tensor([1, 0, 1])}
    graph = check(model, batch, kept=set(), opaque=0)
    assert [check.expected for check in graph.checks] == [1.0, 1.0, 2.0]
    assert graph.wrong_checks({}, batch) == []
    assert graph.wrong_checks({}, {**batch, "mask": torch.tensor([0, 1, 1])}) == []
    wrong = graph.wrong_checks({}, {**batch, "mask": torch.tensor([0, 0, 0])})
    assert [(check.expected, found) for check, found in wrong] == [(1.0, 0.0), (2.0, 0.0)]


# -- what cannot be kept -------------------------------------------------------------------------------------------------------------------


def test_values_are_needed_to_keep_a_module() -> None:
    with torch.device("meta"):
        model = Outer(Branching())
    with pytest.raises(CaptureError, match=r"Outer cannot be captured from shapes alone: .*Build the model and the batch on cpu"):
        capture(model, {"x": torch.empty(5, 4, device="meta")})


class Stuck(nn.Module):
    """The trouble comes between its children."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(y if y.sum() > 0 else -y).sum()


def test_module_and_line_are_named_where_nothing_helps() -> None:
    with pytest.raises(CaptureError, match=r"Stuck cannot be captured in Stuck.*Move that code into a submodule"):
        capture(Stuck(), {"x": inputs(5, 4)})


class Forces(nn.Module):
    """Takes a gradient in its forward pass, to be differentiated again."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        places = x.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(self.net(places).sum(), places, create_graph=True)
        return slope.square().mean()


def test_gradients_within_the_outermost_forward_pass_are_refused() -> None:
    with pytest.raises(
        CaptureError, match=r"Forces cannot be captured in Forces \(.*py:\d+\): it takes gradients in its forward pass.*submodule"
    ):
        capture(Forces(), {"x": inputs(5, 3)})


class ForcesAndMore(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lift, self.forces = nn.Linear(3, 3), Forces()

    def forward(self, x: Tensor) -> Tensor:
        return self.forces(self.lift(x)) + self.lift(x).square().sum()


def test_a_submodule_that_takes_gradients_is_kept() -> None:
    graph = check(ForcesAndMore(), {"x": inputs(5, 3)}, kept={"forces"}, opaque=1)
    assert graph.kept["forces"].startswith("it takes gradients in its forward pass")


class Queue(nn.Module):
    """The end begins in a region without gradient, and asks for the value of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(4, 4), nn.Tanh()
        self.register_buffer("queue", torch.randn(6, 4, generator=torch.Generator().manual_seed(3)))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x)
        with torch.no_grad():
            k = self.key(x) * 2
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.clone().t()], 1)
        with torch.no_grad():
            at = int(self.place)
            self.queue[at : at + 2] = k[:2]
            self.place[0] = (at + 2) % 6
        return F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long))


def test_an_end_that_begins_without_gradient_has_gradients() -> None:
    graph = check(Queue(), {"x": inputs(5, 4)}, kept={"Queue (its end)"}, opaque=1)
    assert graph.parameters["query.weight"].requires_grad
    assert torch.is_grad_enabled()
