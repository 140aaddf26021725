"""Bugs that were found, each with its story."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import gpt2
from torch import Tensor, fx, nn

import shardwise as sw
from shardwise.capture.blocks import block_pattern
from shardwise.cost.memory import most_bytes, requests
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
    assert most_bytes(requests(graph)) == 4 * 256


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


def proven(model: nn.Module, batch: dict[str, Tensor], layout: str) -> None:
    """A step split over threads is one device's, and the captured graph is the model."""
    ranks = 4 if "," in layout else 2
    report = sw.verify(model, batch, cluster=f"local:{ranks}", layout=layout, processes=False)
    assert isinstance(report, Report) and report.ok, str(report)


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


class Rescaled(nn.Module):
    """Multiplies by a buffer, then changes it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)
        self.register_buffer("scale", torch.full((8,), 2.0))
        self.register_buffer("written", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x) * self.scale.clone()
        with torch.no_grad():
            self.scale.mul_(0.5).add_(hidden.abs().mean(0))
            self.written.copy_(hidden[0])
        return (self.last(hidden) / self.scale.mean()).square().mean()


def test_the_backward_pass_reads_a_buffer_as_it_was() -> None:
    """A buffer's new value was copied over the old one, which the backward pass of its readers still needed: wrong gradients, right loss.

    One that is only written had no place in any stage.
    """
    torch.manual_seed(0)
    proven(Rescaled(), {"x": rows(4, 6)}, "dp=2")


def test_a_region_without_gradient_stays_one_beside_changes_in_place() -> None:
    """torch's functionalisation forgets `no_grad`: what was computed there had a gradient as soon as anything changed in place."""
    torch.manual_seed(0)
    proven(Rescaled(), {"x": rows(4, 6)}, "tp=2")


class Recast(nn.Module):
    """Casts to the dtype that its activations have in the proof."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).to(torch.bfloat16).float()
        return (self.last(hidden).double() * self.last(hidden)).mean()


def test_a_cast_that_does_nothing_has_a_gradient_once() -> None:
    """`to` returned its input itself, whose gradient was then added to itself: all gradients before it were doubled."""
    torch.manual_seed(0)
    proven(Recast(), {"x": rows(4, 6)}, "tp=2")


class Idle(nn.Module):
    """A parameter that nothing reads, and one whose reader passes no gradient on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.unread, self.detached = nn.Linear(6, 4), nn.Linear(3, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.first(x) - self.detached(x).detach()).square().mean()


@pytest.mark.parametrize("layout", ["tp=2", "dp=2", "pp=2"])
def test_parameters_without_gradient(layout: str) -> None:
    """Planning knew no operator that reads the parameter and failed with a KeyError."""
    torch.manual_seed(0)
    proven(Idle(), {"x": rows(4, 6)}, layout)


def test_what_depends_on_the_batch_alone_is_split_in_each_microbatch() -> None:
    """A tensor computed before the first microbatch was split over tp as a whole, its reader wanted each microbatch's part split."""
    path = Path(__file__).parent.parent / "examples" / "models" / "graphs.py"
    spec = importlib.util.spec_from_file_location("example_graphs", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    proven(*module.message_passing(), "tp=2,pp=2,microbatches=2")


def test_a_batch_that_the_ranks_do_not_divide() -> None:
    """Three samples on two ranks were refused, though the types can say it."""
    torch.manual_seed(0)
    proven(Rescaled(), {"x": rows(3, 6)}, "dp=2")


def test_inputs_in_another_order_of_memory() -> None:
    """Programs are traced for contiguous tensors; a channels-last image made their views fail."""
    torch.manual_seed(0)
    image = rows(4, 3, 8, 8).to(memory_format=torch.channels_last)

    class Convolved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(256, 2)

        def forward(self, image: Tensor) -> Tensor:
            return self.last(self.conv(image).relu().flatten(1)).square().mean()

    proven(Convolved(), {"image": image}, "dp=2")


class Times(torch.autograd.Function):
    """x · w, with a gradient of its own; the power of w is a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, power: int) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.power = power
        return x * w**power

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, w = ctx.saved_tensors
        return gradient * w**ctx.power, (gradient * x * ctx.power * w ** (ctx.power - 1)).sum(0), None


class WithConstants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)
        self.w = nn.Parameter(torch.full((8,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        hidden = Times.apply(self.first(x), self.w, 2)
        return self.last(Times.apply(hidden, self.w, -1)).square().mean()


@pytest.mark.parametrize("layout", ["tp=2", "dp=2"])
def test_calls_of_one_function_with_unlike_constants(layout: str) -> None:
    """Both calls had one name, so that the second got the first one's trace: gradients wrong by 90 %."""
    torch.manual_seed(0)
    proven(WithConstants(), {"x": rows(4, 6)}, layout)


class TwoTerms(nn.Module):
    """Two parameters with one gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(rows(4, 6)), nn.Parameter(rows(4, 6) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.a + self.b).square().mean()


def test_unequal_shares_of_the_batch_do_not_break_the_tensor_axis() -> None:
    """GPT-2's q, k, v of 3 samples on one rank and 2 on the other: blocks were counted on the first, and the second's did not come out."""
    proven(*gpt2(layers=1, samples=5), "dp=2,tp=2")


def test_two_parameters_may_have_one_gradient() -> None:
    """The product was computed in the first one's buffer and taken out of the graph, where the second one still read it."""
    proven(TwoTerms(), {"x": rows(4, 6)}, "dp=2")
