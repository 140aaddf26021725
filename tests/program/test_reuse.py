"""What is written over memory that nobody reads afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models import gpt2
from tests.program.support import build

from shardwise.cost.operators import is_inplace, kernel_of, name_of
from shardwise.program.reuse import as_torch_would, into_fresh_memory, reuse_memory

aten = torch.ops.aten
SHAPES = [((7, 8192), -1), ((3, 50, 17), 1), ((64, 33), 1), ((5, 4097), 0), ((300, 1001), 1)]
SOFTMAX = {"_log_softmax": torch.log_softmax, "_softmax": torch.softmax}
ELEMENTWISE = {
    "gelu_backward": (),
    "sigmoid_backward": (),
    "silu_backward": (),
    "tanh_backward": (),
    "threshold_backward": (0.1,),
}


def overwrites(name: str, *args: Any, **kwargs: Any) -> None:
    """Compares, bit for bit, with what the ATen operator makes, alone and after it on threads."""
    fresh = getattr(aten, name).default
    expected, first = fresh(*args, **kwargs), args[0].clone()
    changed = getattr(torch.ops.shardwise, f"{name}_").default
    result = changed(first, *args[1:], **kwargs)
    assert into_fresh_memory(changed) is fresh and is_inplace(changed)
    assert result.data_ptr() == first.data_ptr() and torch.equal(result, expected)
    assert kernel_of(name_of(changed), args, kwargs) == kernel_of(name, args, kwargs)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_over_the_first_argument_comes_what_the_operator_returns(
    shape: tuple[int, ...], dim: int, dtype: torch.dtype, threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, gradient = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        for name, function in SOFTMAX.items():
            overwrites(name, x, dim, False)
            overwrites(f"{name}_backward_data", gradient, function(x, dim), dim, dtype)
        for name, more in ELEMENTWISE.items():
            overwrites(name, gradient, x, *more)
        overwrites("gelu_backward", gradient, x, approximate="tanh")
    finally:
        torch.set_num_threads(before)


def test_logits_are_written_over_by_their_logarithms_and_their_gradient_likewise() -> None:
    stage = build(gpt2(layers=1), "dp=2,tp=1,pp=1,microbatches=1").programs[0].stages[0]
    names = [name_of(node.target) for graph in (stage.forward, stage.backward) for node in graph.nodes]
    assert [name for name in names if "softmax" in name] == ["_log_softmax_", "_log_softmax_backward_data_"]


def graph_of(reads_logits: bool) -> torch.fx.Graph:
    graph = torch.fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    logits = graph.call_function(aten.mm.default, (x, weight))
    result = graph.call_function(aten._log_softmax.default, (logits, -1, False))
    graph.output([result, logits] if reads_logits else [result])
    for node in graph.nodes:
        node.meta["val"] = torch.empty(4, 4, device="meta")
    return graph


def test_what_others_run_has_torchs_own_operators() -> None:
    graph = graph_of(False)
    with graph.inserting_before(graph.output_node()):
        graph.call_function(aten.neg_.default, (graph.find_nodes(op="placeholder")[0],))
    reuse_memory(graph)
    as_torch_would(graph)
    assert [str(node.target) for node in graph.nodes if node.op == "call_function"] == [
        "aten.mm.default",
        "aten._log_softmax.default",
        "aten.neg_.default",
    ]


@pytest.mark.parametrize("reads_logits", [True, False])
def test_what_is_read_later_is_not_written_over(reads_logits: bool) -> None:
    graph = graph_of(reads_logits)
    reuse_memory(graph)
    targets = [name_of(node.target) for node in graph.nodes if node.op == "call_function"]
    assert targets == ["mm", "_log_softmax" if reads_logits else "_log_softmax_"]


@pytest.mark.parametrize("name", SOFTMAX)
def test_what_is_not_contiguous_is_left_as_it_is(name: str) -> None:
    x = torch.randn(2, 5, 4, 3).contiguous(memory_format=torch.channels_last)
    before, expected = x.clone(), getattr(aten, name).default(x, 1, False)
    result = getattr(torch.ops.shardwise, f"{name}_").default(x, 1, False)
    assert torch.equal(x, before) and torch.equal(result, expected) and result.stride() == expected.stride()
