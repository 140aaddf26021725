"""Forward and backward graphs built call by call give autograd's numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from shardwise.program.joint import Halves, JointGraph
from shardwise.program.recompute import RECOMPUTE
from shardwise.program.trace import Tracer

SIZE = 4

Function = Callable[[Sequence[Tensor]], Any]


class Tripled(torch.autograd.Function):
    """Its backward is not that of its forward: only a kept hand-written backward gives three times the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * 3 * x


CALLS: dict[str, tuple[int, Function]] = {
    "add": (2, lambda t: t[0] + t[1]),
    "multiply": (2, lambda t: t[0] * t[1]),
    "matrix product": (2, lambda t: t[0] @ t[1] / SIZE),
    "tanh": (1, lambda t: torch.tanh(t[0])),
    "softmax": (1, lambda t: torch.softmax(t[0], 0)),
    "transpose": (1, lambda t: t[0].t()),
    "column, expanded": (1, lambda t: t[0].sum(1, keepdim=True).expand(SIZE, SIZE)),
    "halves": (1, lambda t: tuple(half.repeat(2, 1) for half in t[0].split(SIZE // 2))),
    "identity": (1, lambda t: t[0].view_as(t[0])),
    "hand-written": (1, lambda t: Tripled.apply(t[0])),
    "constant": (1, lambda t: t[0] + torch.arange(SIZE, dtype=t[0].dtype)),
    "norm": (1, lambda t: torch.nn.functional.layer_norm(t[0], (SIZE,))),
}


@dataclass(frozen=True)
class Computation:
    """trained: which of the inputs need a gradient. calls: (name, indices of what it reads among inputs and all earlier results).

    segments: the block that each call belongs to, "" for none; recompute: what the blocks keep.
    """

    trained: tuple[bool, ...]
    calls: tuple[tuple[str, tuple[int, ...]], ...]
    segments: tuple[str, ...] = ()
    recompute: str = "none"


@st.composite
def computations(draw: st.DrawFn) -> Computation:
    trained = tuple(draw(st.lists(st.booleans(), min_size=1, max_size=3)))
    known, calls = len(trained), []
    for _ in range(draw(st.integers(1, 7))):
        name = draw(st.sampled_from(sorted(CALLS)))
        calls.append((name, tuple(draw(st.integers(0, known - 1)) for _ in range(CALLS[name][0]))))
        known += 2 if name == "halves" else 1
    segments = tuple(draw(st.sampled_from(["", "a", "b", "c"])) for _ in calls)  # in any order, so that blocks read each other's
    return Computation(trained, tuple(calls), segments, draw(st.sampled_from(RECOMPUTE)))


def eager(computation: Computation, inputs: list[Tensor], cotangent: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    leaves = [x.clone().requires_grad_(grad) for x, grad in zip(inputs, computation.trained, strict=True)]
    values = list(leaves)
    for name, indices in computation.calls:
        found = CALLS[name][1]([values[index] for index in indices])
        values += found if isinstance(found, tuple) else [found]
    if not values[-1].requires_grad:
        return values[-1], [None] * len(leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found_gradients = iter(torch.autograd.grad(values[-1], wanted, cotangent, allow_unused=True))
    return values[-1].detach(), [next(found_gradients) if leaf.requires_grad else None for leaf in leaves]


def built(computation: Computation, parameters: Sequence[bool] | None = None) -> Halves:
    """parameters: which of the inputs are, where the backward pass is wanted in two parts."""
    tracer = Tracer(device=torch.device("cpu"))
    joint = JointGraph(tracer=tracer)
    meta = tracer.tensor((SIZE, SIZE), torch.float64)
    sources = [joint.placeholder(f"x{number}", meta, grad=grad) for number, grad in enumerate(computation.trained)]
    nodes = list(sources)
    for (name, indices), segment in zip_longest(computation.calls, computation.segments, fillvalue=""):
        joint.segment = segment or None  # type: ignore[assignment]
        nodes += joint.apply(CALLS[name][1], name, [nodes[index] for index in indices], grad=True, module="")
    joint.segment = None
    seed = joint.placeholder("seed", meta, forward=False)
    joint.backward([(nodes[-1], seed)])
    gradients = [joint.cotangents.get(node) if node in joint.tracked else None for node in sources]
    return joint.split([nodes[-1]], gradients, computation.recompute, for_parameters=parameters)


def run(graph: fx.Graph, inputs: Sequence[Tensor]) -> list[Any]:
    with torch.no_grad():
        return list(fx.GraphModule(torch.nn.Module(), graph)(*inputs))


def check(computation: Computation, parameters: Sequence[bool] | None = None) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(SIZE, SIZE, dtype=torch.float64, generator=generator) for _ in computation.trained]
    cotangent = torch.randn(SIZE, SIZE, dtype=torch.float64, generator=generator)
    expected, gradients = eager(computation, inputs, cotangent)
    halves = built(computation, parameters)
    before = [tensor.clone() for tensor in inputs]
    result, *saved = run(halves.forward, inputs)
    assert len(saved) == halves.saved
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    found = run(halves.backward, [*saved, cotangent])
    if parameters is not None:
        found = in_two_parts(halves, parameters, found)
    for mine, right in zip(found, gradients, strict=True):
        if right is None:
            assert mine is None or not mine.any()
        else:
            torch.testing.assert_close(torch.zeros_like(right) if mine is None else mine, right, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True)), "inputs are left as they were"


def in_two_parts(halves: Halves, parameters: Sequence[bool], found: list[Any]) -> list[Any]:
    """The gradients, of what backward returned and what the weights' part makes of what it kept."""
    first, kept = found[: len(parameters)], found[len(parameters) :]
    assert halves.weight is not None and len(kept) == halves.kept
    assert all(parameters[number] and first[number] is None for number in halves.later)
    kept_before = [tensor.clone() for tensor in kept]
    second = dict(zip(halves.later, run(halves.weight, kept), strict=True))
    assert all(torch.equal(x, y) for x, y in zip(kept, kept_before, strict=True)), "kept values are left as they were"
    return [second.get(number, gradient) for number, gradient in enumerate(first)]


@settings(max_examples=150, deadline=None)
@given(computations())
def test_gradients_are_those_of_autograd(computation: Computation) -> None:
    check(computation)


@settings(max_examples=100, deadline=None)
@given(computations(), st.lists(st.booleans(), min_size=3, max_size=3))
def test_gradients_in_two_parts_are_those_of_autograd(computation: Computation, parameters: list[bool]) -> None:
    check(computation, parameters[: len(computation.trained)])


def test_what_only_parameters_need_comes_later() -> None:
    """x1 a weight: a product's gradient in x0 is made at once, that in x1 later, of what came in and x0."""
    halves = built(Computation((True, True), (("matrix product", (0, 1)), ("tanh", (2,)))), [False, True])
    assert halves.weight is not None and halves.later == [1] and halves.kept == 2
    products = [[str(node.target) for node in graph.nodes].count("aten.mm.default") for graph in (halves.backward, halves.weight)]
    assert products == [1, 1]
    assert [node.op for node in halves.weight.nodes].count("placeholder") == 2


def test_a_first_stage_leaves_everything_for_later() -> None:
    halves = built(Computation((True, True), (("matrix product", (0, 1)),)), [True, True])
    assert halves.later == [0, 1] and not [node for node in halves.backward.nodes if node.op == "call_function"]


def test_a_gradient_that_is_there_on_the_way_is_not_put_off() -> None:
    """A norm's backward makes all its gradients in one operator."""
    halves = built(Computation((True, True), (("multiply", (0, 1)), ("norm", (2,)))), [False, False])
    assert halves.later == [] and halves.kept == 0
    assert halves.weight is not None and not [node for node in halves.weight.nodes if node.op != "output"]


@pytest.mark.parametrize(
    "calls",
    [
        (("tanh", (0,)), ("multiply", (0, 2)), ("add", (2, 3)), ("multiply", (4, 3))),
        (("column, expanded", (0,)), ("transpose", (2,)), ("matrix product", (3, 1))),
        (("halves", (0,)), ("tanh", (2,))),
        (("halves", (0,)), ("multiply", (2, 3))),
        (("hand-written", (0,)), ("hand-written", (2,)), ("add", (2, 3))),
        (("multiply", (0, 0)), ("multiply", (2, 2))),
    ],
    ids=["read by many", "strides of zero", "a result not read", "both results read", "a hand-written backward", "the same input twice"],
)
def test_gradients_of(calls: tuple[tuple[str, tuple[int, ...]], ...]) -> None:
    check(Computation((True, True), calls))


def test_what_is_frozen_has_no_backward() -> None:
    halves = built(Computation((False,), (("tanh", (0,)), ("multiply", (0, 1)))))
    assert halves.saved == 0
    assert not [node for node in halves.backward.nodes if node.op == "call_function"]


def test_only_what_the_backward_reads_is_saved() -> None:
    """tanh needs its result, a sum nothing."""
    assert built(Computation((True, True), (("add", (0, 1)),))).saved == 0
    assert built(Computation((True,), (("tanh", (0,)),))).saved == 1
    assert built(Computation((True, False), (("multiply", (0, 1)),))).saved == 1, "the frozen factor alone"


def test_equal_calls_are_traced_once() -> None:
    tracer = Tracer(device=torch.device("cpu"))
    x = tracer.tensor((SIZE, SIZE), torch.float64)
    counted: list[int] = []

    def function(tensors: Sequence[Tensor]) -> Tensor:
        counted.append(1)
        return torch.tanh(tensors[0])

    first = tracer.forward(function, "tanh", [x], [True])
    calls = len(counted)
    assert tracer.forward(function, "tanh", [x], [True]) is first and len(counted) == calls
    assert tracer.forward(function, "tanh", [x.t()], [True]) is not first, "other strides"
    assert tracer.forward(function, "tanh", [x], [False]) is not first, "no gradient"


def test_equal_computations_are_done_once() -> None:
    """A reshard that two readers want alike, or masks that every layer makes."""
    halves = built(Computation((True,), (("transpose", (0,)), ("tanh", (1,)), ("transpose", (0,)), ("tanh", (3,)), ("multiply", (2, 4)))))
    assert [str(node.target) for node in halves.forward.nodes].count("aten.tanh.default") == 1
    check(Computation((True,), (("transpose", (0,)), ("tanh", (1,)), ("transpose", (0,)), ("tanh", (3,)), ("multiply", (2, 4)))))
