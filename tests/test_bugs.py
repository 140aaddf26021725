"""Bugs that were found, each with its story."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from shardwise.capture.blocks import block_pattern
from shardwise.cost.memory import liveness
from shardwise.errors import LayoutError
from shardwise.planner.layout import Layout
from shardwise.program.trace import Tracer
from shardwise.sharding.reshard import Axis, Reshard
from shardwise.sharding.types import R, Shard
from shardwise.verify.compare import Difference
from shardwise.verify.verify import Report


def test_operators_that_a_block_makes_itself_have_one_entry() -> None:
    """A plan listed every layer's residual sums one by one: in `model.layers.3:aten.add.Tensor:0` a colon follows the number."""
    assert block_pattern("model.layers.3:aten.add.Tensor:0") == "model.layers.*:aten.add.Tensor:0"
    assert block_pattern("model.layers.3.mlp:aten.linear.default:1") == "model.layers.*.mlp:aten.linear.default:1"


def test_operators_in_place_take_no_memory() -> None:
    """An activation written over its input was counted as a tensor of its own, a fifth too much for an MLP."""
    graph = fx.Graph()
    with Tracer(device=torch.device("cpu")).mode:
        meta = torch.empty(256)
    x = graph.placeholder("x")
    made = graph.call_function(torch.ops.aten.exp.default, (x,))
    written = graph.call_function(torch.ops.aten.relu_.default, (made,))
    graph.output([written])
    for node in (x, made, written):
        node.meta["val"] = meta
    assert liveness(graph).peak_bytes == 4 * 256


def test_ranks_with_uneven_parts_choose_one_implementation() -> None:
    """Each rank asked for the implementation that suits its own part's bytes; with unequal parts two ranks could wait for each other."""
    asked = []
    for rank, rows in enumerate((3, 2)):
        axis = Axis(name="tp", group="tp:0,1", ranks=2, rank=rank)
        step = Reshard(
            source=Shard(0), target=R, axis=axis, source_size=5, choose=lambda kind, nbytes, ranks: asked.append((kind, nbytes)) or "native"
        )
        tracer = Tracer(device=torch.device("cpu"))
        tracer.forward(lambda t, step=step: step.forward(t[0]), "gather", [tracer.tensor((rows, 4), torch.float32)], [False])
    assert set(asked) == {("all_gather", 5 * 4 * 4)}


def test_a_layout_says_nothing_twice_and_no_halves() -> None:
    """Of `tp=2,tp=4` the second won, and dp=2.5 was 2, both in silence."""
    for layout in ("tp=2,tp=4", {"dp": 2.5}):
        with pytest.raises(LayoutError):
            Layout.parse(layout)


def test_a_report_with_unequal_copies_can_be_printed() -> None:
    """Copies must be equal to the bit, so their bound is 0, and printing how far they are from it divided by that."""

    class Planned:
        model = "Mlp"

    unequal = Difference(name="copies of the gradient of w", error=0.5, bound=0.0)
    report = Report(
        layout="dp=2",
        dtype=torch.float64,
        loss=1.0,
        reference_loss=1.0,
        differences=[unequal],
        captured=[],
        plan=Planned(),  # type: ignore[arg-type]
    )
    assert "copies of the gradient of w: 5.00e-01, allowed 0e+00" in str(report)
