"""What a step computes from its batch alone: equal in every step, whatever memory the step before wrote over; and gradients that products
compute straight into their buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from shardwise.capture.experts import expert_mm
from shardwise.program.program import Binding, Crossing, StageProgram
from shardwise.program.reuse import reuse_memory
from shardwise.runtime import graphs
from shardwise.runtime.graphs import Function, Prelude, accumulating, callable_of

aten = torch.ops.aten
OPERATORS = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor)


@st.composite
def recipes(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """(operator, operand, operand) of each result; operands 0 and 1 are constants, 2 the batch, others earlier results."""
    count = draw(st.integers(1, 8))
    return [(draw(st.integers(0, 2)), draw(st.integers(0, 2 + n)), draw(st.integers(0, 2 + n))) for n in range(count)]


def traced(recipe: list[tuple[int, int, int]]) -> fx.Graph:
    """Constants are made in the graph, as code that calls torch.ones does; the last result is returned."""
    graph = fx.Graph()
    like = torch.zeros(3)
    batch = graph.placeholder("batch")
    values = [graph.call_function(aten.full.default, ([3], 2.0)), graph.call_function(aten.full.default, ([3], 0.5)), batch]
    for operator, first, second in recipe:
        values.append(graph.call_function(OPERATORS[operator], (values[first], values[second])))
    graph.output([values[-1]])
    for node in graph.nodes:
        node.meta["val"] = like
    graph.eliminate_dead_code()
    return graph


def stage(prelude: fx.Graph) -> StageProgram:
    """One that has nothing but a prelude, which is given the batch."""
    empty = {name: fx.Graph() for name in ("forward", "backward")}
    lists: dict[str, Any] = {f"{name}_{end}": [] for name in empty for end in ("inputs", "outputs")}
    inputs = [Binding(kind="crossing", name="batch")]
    crossings = [Crossing(name="result", split=None)]
    return StageProgram(
        stage=0, parameters=[], buffers=[], crossings=crossings, prelude=prelude, prelude_inputs=inputs, saved=0, **empty, **lists
    )


@settings(max_examples=200, deadline=None)
@given(recipes())
def test_a_prelude_gives_the_same_every_time(recipe: list[tuple[int, int, int]]) -> None:
    batch = torch.tensor([1.0, -2.0, 3.0])
    values = [torch.full((3,), 2.0), torch.full((3,), 0.5), batch.clone()]
    for operator, first, second in recipe:
        values.append(OPERATORS[operator](values[first], values[second]))
    graph = traced(recipe)
    reuse_memory(graph)
    prelude = Prelude(stage(graph), {})
    for _ in range(3):
        torch.testing.assert_close(prelude.run({"batch": batch})["result"], values[-1], rtol=0, atol=0)
    assert torch.equal(batch, torch.tensor([1.0, -2.0, 3.0]))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("experts", [0, 4])
def test_products_are_computed_straight_into_their_buffers(experts: int, turned: bool) -> None:
    """A product of matrices and one of rows at their experts (of which the third has none), whatever the buffer held; later ones add."""
    x, gradient, expert = torch.randn(9, 3).double(), torch.randn(9, 5).double(), torch.tensor([3, 0, -1, 3, 1, 4, 0, 9, 3])
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in ("x", "gradient", "expert")]
    if experts:
        weight = torch.zeros(experts, 3, 5, dtype=torch.float64, requires_grad=True)
        (wanted,) = torch.autograd.grad(expert_mm(x, weight, expert), weight, gradient)
        product = graph.call_function(torch.ops.shardwise.expert_outer.default, (*inputs, experts))
    else:
        wanted = x.T @ gradient
        product = graph.call_function(aten.mm.default, (graph.call_function(aten.t.default, (inputs[0],)), inputs[1]))
    if turned:
        wanted = wanted.transpose(-2, -1)
        product.meta["val"] = wanted
        product = graph.call_function(aten.transpose.int, (product, -1, -2))
    product.meta["val"] = wanted
    graph.output([product])
    made: list[fx.Graph] = []

    def make(each: fx.Graph) -> Function:
        made.append(each)
        return callable_of(each)

    buffer = torch.full_like(wanted, float("nan")).contiguous()
    for times, first in enumerate(({"w"}, set[str]()), start=1):
        accumulating(graph, [Binding(kind="parameter", name="w")], first=first, make=make)([x, gradient, expert, buffer])
        torch.testing.assert_close(buffer, times * wanted)
    assert not any(node.target in (aten.copy_.default, aten.add_.Tensor) for each in made for node in each.nodes)


def test_freed_memory_is_joined_before_a_large_value_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1 MiB or more: not before small ones, nor before views; the graph that was given stays as it is."""
    done: list[str] = []
    monkeypatch.setattr(graphs, "small_blocks_are_set_aside", lambda: True)
    monkeypatch.setattr(graphs, "join_freed_memory", lambda quickly: done.append("joined"))
    shapes = {"large": (256, 1024), "small": (256, 1)}

    def noted(name: str, value: torch.Tensor) -> torch.Tensor:
        done.append(name)
        return value

    def made(name: str, first: fx.Node, second: fx.Node) -> fx.Node:
        node = graph.call_function(aten.add.Tensor, (first, second))
        node.meta["val"] = torch.empty(shapes[name], device="meta")
        graph.call_function(lambda value: noted(name, value), (node,))
        return node

    graph = fx.Graph()
    batch, column = graph.placeholder("batch"), graph.placeholder("column")
    large = made("large", batch, column)
    small = made("small", column, column)
    turned = graph.call_function(aten.t.default, (large,))
    turned.meta["val"] = torch.empty(1024, 256, device="meta")
    graph.output([batch, made("large", large, small), turned, None])
    before = str(graph)
    inputs = [torch.randn(256, 1024), torch.randn(256, 1)]
    results = callable_of(graph, in_heap=True)(list(inputs))
    assert done == ["joined", "large", "small", "joined", "large"] and str(graph) == before
    sum_of_both = inputs[0] + inputs[1]
    torch.testing.assert_close(results[:3], [inputs[0], sum_of_both + 2 * inputs[1], sum_of_both.T])
    assert results[3] is None

    done.clear()
    callable_of(graph)(list(inputs))
    assert done == ["large", "small", "large"], "a GPU's memory has no such holes"
