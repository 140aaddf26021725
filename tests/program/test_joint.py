"""Forward and backward graphs built call by call give autograd's numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from shardwise.program.joint import Halves, JointGraph
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
    """trained: which of the inputs need a gradient. calls: (name, indices of what it reads among inputs and all earlier results)."""

    trained: tuple[bool, ...]
    calls: tuple[tuple[str, tuple[int, ...]], ...]


@st.composite
def computations(draw: st.DrawFn) -> Computation:
    trained = tuple(draw(st.lists(st.booleans(), min_size=1, max_size=3)))
    known, calls = len(trained), []
    for _ in range(draw(st.integers(1, 7))):
        name = draw(st.sampled_from(sorted(CALLS)))
        calls.append((name, tuple(draw(st.integers(0, known - 1)) for _ in range(CALLS[name][0]))))
        known += 2 if name == "halves" else 1
    return Computation(trained, tuple(calls))


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


def built(computation: Computation) -> Halves:
    tracer = Tracer(device=torch.device("cpu"))
    joint = JointGraph(tracer=tracer)
    meta = tracer.tensor((SIZE, SIZE), torch.float64)
    sources = [joint.placeholder(f"x{number}", meta, grad=grad) for number, grad in enumerate(computation.trained)]
    nodes = list(sources)
    for name, indices in computation.calls:
        nodes += joint.apply(CALLS[name][1], name, [nodes[index] for index in indices], grad=True, module="")
    seed = joint.placeholder("seed", meta, forward=False)
    joint.backward([(nodes[-1], seed)])
    return joint.split([nodes[-1]], [joint.cotangents.get(node) if node in joint.tracked else None for node in sources])


def run(graph: fx.Graph, inputs: Sequence[Tensor]) -> list[Any]:
    with torch.no_grad():
        return list(fx.GraphModule(torch.nn.Module(), graph)(*inputs))


def check(computation: Computation) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(SIZE, SIZE, dtype=torch.float64, generator=generator) for _ in computation.trained]
    cotangent = torch.randn(SIZE, SIZE, dtype=torch.float64, generator=generator)
    expected, gradients = eager(computation, inputs, cotangent)
    halves = built(computation)
    before = [tensor.clone() for tensor in inputs]
    result, *saved = run(halves.forward, inputs)
    assert len(saved) == halves.saved
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    found = run(halves.backward, [*saved, cotangent])
    for mine, right in zip(found, gradients, strict=True):
        if right is None:
            assert mine is None or not mine.any()
        else:
            torch.testing.assert_close(torch.zeros_like(right) if mine is None else mine, right, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True)), "inputs are left as they were"


@settings(max_examples=60, deadline=None)
@given(computations())
def test_gradients_are_those_of_autograd(computation: Computation) -> None:
    check(computation)


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
