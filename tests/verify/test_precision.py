"""16 bits: the captured model is the one that computes so, and split it is equal in float64 and as near as one device in 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.clusters import made_up
from tests.models import Example, bert, gpt2, llama, mlp, unet
from torch import Tensor, nn

import shardwise as sw
from shardwise.capture.export import capture, compute_loss
from shardwise.capture.precision import Precision, in_precision
from shardwise.errors import CaptureError, LayoutError, PlanError, VerifyError
from shardwise.planner.layout import Layout
from shardwise.planner.preflight import preflight
from shardwise.simulate.memory import memory_use
from shardwise.verify.one_device import prepare
from shardwise.verify.verify import Report

MODELS: dict[str, Callable[[], Example]] = {
    "gpt2": lambda: gpt2(layers=2, samples=4),
    "llama": lambda: llama(layers=2),
    "bert": lambda: bert(layers=1),
    "mlp": mlp,
    "unet": unet,
}
CASES = [
    ("gpt2", "tp=2", "bf16"),
    ("gpt2", "dp=2,zero=2,microbatches=2", "bf16"),
    ("gpt2", "pp=2,microbatches=2,recompute=full", "bf16"),
    ("gpt2", "dp=2,tp=2,zero=3", "fp16"),
    ("llama", "dp=2,zero=3,recompute=selective", "bf16"),
    ("llama", "tp=2,pp=2,microbatches=2", "bf16"),
    ("llama", "tp=4", "fp16"),
    ("bert", "dp=2,tp=2,zero=1", "bf16"),
    ("mlp", "dp=4,zero=3,shard=2", "bf16"),
    ("mlp", "tp=3", "fp16"),
    ("unet", "dp=2,zero=3", "bf16"),
    ("unet", "pp=2", "fp16"),
]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def verified(name: str, layout: str, **more: Any) -> Report:
    report = sw.verify(*MODELS[name](), cluster=made_up(Layout.parse(layout).ranks), layout=layout, processes=False, **more)
    assert isinstance(report, Report)
    return report


@pytest.mark.parametrize(("name", "layout", "precision"), CASES)
def test_split_steps_are_those_of_one_device(name: str, layout: str, precision: Precision) -> None:
    for dtype in (torch.float64, DTYPES[precision]):
        report = verified(name, layout, precision=precision, dtype=dtype)
        assert report.ok, f"{report.first_difference}\n{report}"
        assert report.plan.precision == precision


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_operators_compute_in_16_bits_and_the_loss_in_32(name: str, precision: Precision) -> None:
    graph = capture(*MODELS[name](), precision=precision)
    counts = dict.fromkeys((True, False), 0)
    for op in graph.ops:
        if op.requires_grad and op.outputs[0].dtype.is_floating_point:
            counts[op.outputs[0].dtype is DTYPES[precision]] += 1
    assert counts[True] > counts[False]
    assert graph.loss.dtype is torch.float32
    assert graph.precision == precision and graph.master is torch.float32


def test_what_is_summed_over_steps_stays_in_float32() -> None:
    """BatchNorm's statistics."""
    graph = capture(*unet(), precision="bf16")
    running = {name: value.dtype for name, value in graph.buffers.items() if "running" in name}
    assert running and set(running.values()) == {torch.float32}


class Positions(nn.Module):
    """`strict`: adds a table to the input of a linear layer, which takes one dtype only."""

    def __init__(self, strict: bool) -> None:
        super().__init__()
        self.strict, self.linear = strict, nn.Linear(8, 8)
        self.register_buffer("table", torch.linspace(0, 1, 8))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = x + self.table if self.strict else x + self.table.to(x.dtype)
        return nn.functional.mse_loss(self.linear(hidden), y)


@pytest.mark.parametrize(("strict", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_buffers_are_cast_only_where_the_model_needs_it(strict: bool, dtype: torch.dtype) -> None:
    batch = {"x": torch.randn(4, 8), "y": torch.randn(4, 8)}
    assert capture(Positions(strict), batch, precision="bf16").buffers["table"].dtype is dtype


class Widening(nn.Module):
    """Casts a submodule of its own on each call, as routers of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.router = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.inside(x)
        self.router = self.router.to(torch.float32)
        return nn.functional.mse_loss(self.router(hidden.float()).softmax(-1).to(x.dtype), y)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_parameters_that_forward_casts_are_read_as_it_casts_them(precision: Precision) -> None:
    model, batch = Widening(), {"x": torch.randn(8, 8), "y": torch.randn(8, 4)}
    graph = capture(model, batch, precision=precision)
    low = DTYPES[precision]
    assert {name: value.dtype for name, value in graph.parameters.items()} == {
        "inside.weight": low,
        "inside.bias": low,
        "router.weight": torch.float32,
        "router.bias": torch.float32,
    }
    assert not graph.kept, "it is followed"
    for dtype in (torch.float64, low):
        report = sw.verify(model, batch, cluster=made_up(2), layout="tp=2", processes=False, precision=precision, dtype=dtype)
        assert isinstance(report, Report)
        assert report.ok, report.first_difference
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}, "the user's own is left"


class Centred(nn.Module):
    """A running mean that is zero but for rounding, in which 16 bits on one device are off by percents, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.Linear(16, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.last(self.norm(self.first(10 * (x - x.mean(0))))), y)


def test_buffers_are_held_to_what_one_device_is_off() -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(16, 8), "y": torch.randn(16, 4)}
    report = sw.verify(Centred(), batch, cluster=made_up(2), layout="dp=2", processes=False, precision="bf16", dtype=torch.bfloat16)
    assert isinstance(report, Report)
    assert report.ok, str(report)
    mean = next(each for each in report.differences if each.name == "buffer norm.running_mean")
    assert mean.error > 2 * torch.finfo(torch.bfloat16).eps, "else this shows nothing"


def test_the_users_model_is_left_as_it_is() -> None:
    model, batch = mlp()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    low, inputs = in_precision(model, batch, "bf16")
    compute_loss(low, inputs, None, "bf16").backward()
    assert {parameter.dtype for parameter in low.parameters()} == {torch.bfloat16}
    assert all(torch.equal(parameter, before[name]) and parameter.grad is None for name, parameter in model.named_parameters())


def test_tied_parameters_stay_tied() -> None:
    low, _ = in_precision(*gpt2(), "bf16")
    assert low.lm_head.weight is low.transformer.wte.weight  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("layout", "bytes_each"),
    [
        ("dp=2,zero=0", (2 + 4, 4, 8)),
        ("dp=2,zero=1", (2 + 2, 4, 4)),
        ("dp=2,zero=2", (2 + 2, 2, 4)),
        ("dp=2,zero=3", (2, 2, 4)),
        ("tp=2", (6 / 2, 4 / 2, 8 / 2)),
    ],
)
def test_memory_counts_copies_masters_gradients_and_states(layout: str, bytes_each: tuple[float, float, float]) -> None:
    model, batch = mlp(hidden=128)
    plan = sw.plan(model, batch, made_up(2), layout=layout, precision="bf16")
    assert isinstance(plan, sw.Plan)
    use = memory_use(preflight(plan, capture(model, batch, precision="bf16"))[0], "adamw")
    count = sum(parameter.numel() for parameter in model.parameters())
    found = use.parameters / count, use.gradients / count, use.optimizer / count
    assert found == pytest.approx(bytes_each, rel=0.02)
    assert plan.predicted.by_kind[0]["parameters"] == use.parameters


def test_activations_take_half_the_memory() -> None:
    model, batch = gpt2(layers=2, hidden=128, samples=16, sequence=64)
    saved = {}
    for precision in ("float32", "bf16"):
        plan = sw.plan(model, batch, made_up(2), layout="dp=2,microbatches=1", precision=precision)  # type: ignore[arg-type]
        assert isinstance(plan, sw.Plan)
        saved[precision] = plan.predicted.by_kind[0]["saved"]
    assert 0.4 < saved["bf16"] / saved["float32"] < 0.7, saved


def test_a_plan_keeps_its_precision_and_is_refused_in_another(tmp_path: Any) -> None:
    model, batch = mlp()
    plan = sw.plan(model, batch, made_up(2), layout="dp=2", precision="bf16")
    assert isinstance(plan, sw.Plan)
    plan.save(tmp_path / "plan.json")
    assert sw.Plan.load(tmp_path / "plan.json").precision == "bf16"
    with pytest.raises(PlanError, match="the plan computes in bf16, the model was captured in float32"):
        preflight(plan, capture(model, batch))
    with pytest.raises(PlanError, match=r"dtype=torch.float16 compares steps in it, but the plan computes in bf16"):
        sw.verify(model, batch, plan=plan, dtype=torch.float16)
    with pytest.raises(PlanError, match="the plan computes in bf16: leave precision='fp16' out"):
        sw.verify(model, batch, plan=plan, precision="fp16")


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(LayoutError, match="precision='fp8' is not known; choose float32, bf16, fp16"):
        sw.plan(*mlp(), made_up(2), precision="fp8")  # type: ignore[arg-type]


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.linear(x + torch.ones(8)), y)


class Asking(nn.Module):
    """Its code asks for a value, so the model around it is run on values."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 100 else 2 * x


class Around(Mixed):
    def __init__(self) -> None:
        super().__init__()
        self.asking = Asking()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(self.asking(x), y)


def test_a_model_that_does_not_run_in_16_bits_is_refused_with_the_place() -> None:
    batch = {"x": torch.randn(4, 8), "y": torch.randn(4, 8)}
    with pytest.raises(
        CaptureError, match=r"precision='bf16': the model does not run in it \(.*test_precision\.py:\d+\): RuntimeError: .*; cast"
    ):
        capture(Around(), batch, precision="bf16")


class Distances(nn.Module):
    """torch has no kernel of this operator for 16 bits on CPUs, which its description does not say."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        found = self.linear(x)
        return torch.cdist(found, found + 1).mean()


def test_a_model_without_kernels_for_16_bits_is_refused() -> None:
    model, batch = Distances(), {"x": torch.randn(4, 8)}
    with pytest.raises(VerifyError, match=r"Distances does not run in bf16 on one device: .*cdist.*; widen what this operator reads"):
        prepare(model, batch, precision="bf16")


def test_a_mixture_that_no_cast_of_buffers_helps_is_refused_with_the_place() -> None:
    batch = {"x": torch.randn(4, 8), "y": torch.randn(4, 8)}
    with pytest.raises(CaptureError, match=r"precision='bf16': aten.linear.default in linear is given bfloat16 and float32; cast there"):
        capture(Mixed(), batch, precision="bf16")
