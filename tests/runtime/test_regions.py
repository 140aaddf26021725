"""Stage graphs compiled in regions: the same numbers, equal blocks once, what is not compiled is said, and no compiler is an error."""

from __future__ import annotations

import operator
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from math import prod
from typing import Any, ClassVar

import pytest
import torch
import torch._inductor.config
from tests.clusters import made_up
from tests.models import Example, gpt2, llama, unet, vit
from tests.program.support import build
from tests.verify.test_experts_over_data import example as experts
from torch import Tensor, fx
from torch._inductor import cpp_builder

import shardwise as sw
from shardwise.capture.state import state_of
from shardwise.errors import ClusterError, ShardwiseWarning
from shardwise.planner.layout import Layout
from shardwise.runtime.executor import Executor
from shardwise.runtime.gradients import Gradients
from shardwise.runtime.graphs import callable_of
from shardwise.runtime.job import step_key
from shardwise.runtime.regions import Compiler
from shardwise.runtime.transport import Distributed, using
from shardwise.verify.verify import Report

CPU = torch.device("cpu")
aten = torch.ops.aten


@cache
def compiler() -> Compiler:
    """One for many tests: what it has compiled once it knows."""
    return Compiler(device=CPU)


CASES: dict[str, tuple[Callable[[], Example], str]] = {
    "gpt2, tp, dropout": (lambda: gpt2(layers=2, dropout=0.1), "tp=2,microbatches=2"),
    "llama, zero 3, full": (lambda: llama(layers=2), "dp=2,zero=3,recompute=full"),
    "vit, pp": (lambda: vit(layers=2), "pp=2,microbatches=2"),
    "gpt2, tied stages, zero-bubble": (lambda: gpt2(layers=2), "pp=2,microbatches=2,schedule=zb-h1"),
    "batch norm and convolutions, dp": (unet, "dp=2"),
    "experts, some without a row": (
        partial(experts, gated=True, biased=True, favoured=(0.0, 1.0, -9.0, -9.0)),
        "dp=2,ep=2,recompute=full",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers_as_one_device(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64: loss, every gradient, buffers, the optimizer's step; copies on several ranks equal bit by bit."""
    make, layout = CASES[case]
    monkeypatch.setattr(sys.modules["shardwise.verify.ranks"], "Compiler", lambda device: compiler())
    before = len(compiler().regions)
    report = sw.verify(*make(), cluster=made_up(Layout.parse(layout).ranks), layout=layout, processes=False, compile=True)
    assert isinstance(report, Report)
    assert report.ok, f"{report.first_difference}\n{report}"
    found = compiler().regions[before:]
    assert sum(not region.kept for region in found) >= 4 and not any(region.failure for region in found), compiler()
    assert any("rows at their experts" in region.kept for region in found) == ("ep=" in layout)


@pytest.mark.slow
def test_random_numbers_are_those_of_the_uncompiled_program() -> None:
    """Masks are drawn by operators of ours, outside of regions: whole steps agree to rounding, though a mask that differed would show."""
    built = build(gpt2(layers=1, dropout=0.3), "dp=1,tp=1,pp=1,microbatches=2")
    program = built.programs[0]
    losses = []
    for compiled in (False, True):
        state = {part.name: torch.linspace(-0.3, 0.3, prod(part.local)).reshape(part.local) for part in program.parameters}
        state |= {part.name: state_of(gpt2(layers=1)[0], built.graph)[part.name] for part in program.buffers}
        gradients = Gradients(program, Distributed(), CPU)
        executor = Executor(program, state, gradients, Distributed(), CPU, compiler() if compiled else None)
        _, batch = gpt2(layers=1)
        losses.append([executor.step(batch, step_key(0, step), lambda: None) for step in (1, 2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0][0] != losses[0][1]


def looped(layers: int) -> fx.Graph:
    """Equal blocks with a message in each, a random mask, and a sum whose order depends on threads."""
    graph = fx.Graph()

    def call(target: Any, *args: Any, module: str = "") -> fx.Node:
        node = graph.call_function(target, args)
        values = fx.map_arg(args, lambda each: each.meta["val"])
        node.meta = {"val": torch.zeros(4, 4) if "shardwise" in str(target) else target(*values), "module": module}
        return node

    x, w, rows = (graph.placeholder(name) for name in ("x", "w", "rows"))
    for node, value in ((x, torch.zeros(4, 4)), (w, torch.zeros(4, 4)), (rows, torch.zeros(4, dtype=torch.int64))):
        node.meta["val"] = value
    for layer in range(layers):
        module = f"layers.{layer}.mlp"
        x = call(aten.mm.default, x, w, module=module)
        x = call(aten.gelu.default, x, module=module)
        x = call(torch.ops.shardwise.all_reduce.default, x, "tp:0", "sum", "native", module=module)
        x = call(aten.mul.Tensor, x, 2.0, module=module)
        x = call(aten.tanh.default, x, module=module)
    table = call(aten.embedding_dense_backward.default, x, rows, 4, -1, False)
    last = call(aten.var_mean.correction, x, [1])
    first, second = (call(operator.getitem, last, place) for place in (0, 1))
    graph.output([table, first, second, None, w])
    return graph


class Alone:
    """A transport to nobody."""

    under_way: ClassVar[dict[int, Callable[[], object]]] = {}

    def all_reduce(self, x: Tensor, group: str, op: str, impl: str) -> Tensor:
        return x.clone()


def test_equal_regions_are_compiled_once_and_the_rest_is_said() -> None:
    made = Compiler(device=CPU)
    function = made.function(looped(3), "the graph")
    inputs = [torch.randn(4, 4), torch.randn(4, 4), torch.tensor([0, 2, 2, 1])]
    with using(Alone()):  # type: ignore[arg-type]
        expected, given = callable_of(looped(3))(list(inputs)), list(inputs)
        found = function(given)
    assert given == [], "inputs are freed where they are used for the last time"
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    compiled = [region for region in made.regions if not region.kept]
    assert [(region.block, region.calls) for region in compiled] == [(f"layers.{n}", 2) for n in (0, 0, 1, 1, 2, 2)]
    assert made.distinct == 2
    kept = Counter(region.kept for region in made.regions if region.kept)
    assert sorted(kept.values()) == [1, 1, 3] and not any(region.failure for region in made.regions)
    assert f"compiled 6 of {len(made.regions)} regions (2 distinct)" in str(made)
    assert "3 operators of shardwise's" in str(made) and "1 sums whose order" in str(made)


def test_inputs_with_other_strides_are_copied() -> None:
    made = Compiler(device=CPU)
    function = made.function(looped(1), "the graph")
    x, w = torch.randn(4, 4), torch.randn(4, 4)
    with using(Alone()):  # type: ignore[arg-type]
        one, other = (function([x, each, torch.zeros(4, dtype=torch.int64)]) for each in (w.t().contiguous().t(), w))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True) if a is not None)


def test_what_the_compiler_fails_on_is_warned_of_and_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_args: object) -> None:
        raise NotImplementedError("no kernel for that\nand a long trace")

    monkeypatch.setattr("shardwise.runtime.regions.compiled_by_inductor", fails)
    made = Compiler(device=CPU)
    with pytest.warns(ShardwiseWarning, match=r"the graph, layers\.0: 2 calls run as torch's own kernels.*no kernel for that$"):
        function = made.function(looped(1), "the graph")
    inputs = [torch.randn(4, 4), torch.randn(4, 4), torch.zeros(4, dtype=torch.int64)]
    with using(Alone()):  # type: ignore[arg-type]
        expected, found = callable_of(looped(1))(list(inputs)), function(list(inputs))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True) if a is not None)
    assert [region.failure for region in made.regions if region.failure] == ["NotImplementedError: no kernel for that"] * 2


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_builder, "cpp_compiler_search", cpp_builder.cpp_compiler_search.__wrapped__)
    refused = pytest.raises(ClusterError, match=r"compile=True.*inductor needs a C\+\+ compiler: install one .*or leave compile out")
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}), refused:
        Compiler(device=CPU)
