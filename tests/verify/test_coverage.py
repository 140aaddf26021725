"""What a model's coverage says: which layouts were verified, what a rank has of the work, and why not where not."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from tests.clusters import made_up
from tests.models import gpt2
from torch import Tensor, nn
from torch.nn import functional as F

from shardwise.cluster.model import Cluster
from shardwise.errors import VerifyError
from shardwise.planner.plan import Plan
from shardwise.verify.coverage import ALL_LAYOUTS, LAYOUTS, Coverage, Row, coverage


@pytest.fixture(autouse=True)
def _made_up_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """`local:N` is a made-up machine: nothing is measured, and plans are the same everywhere."""
    monkeypatch.setattr(Cluster, "parse", lambda text: made_up(int(text.removeprefix("local:"))))


class Net(nn.Module):
    """A layer, something between, a layer."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.up, self.between, self.down = nn.Linear(16, 32), between, nn.Linear(32, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.down(self.between(self.up(x))), y)


class Clipped(nn.Module):
    """What it does depends on the values that it is given: it cannot be captured, and every element depends on all."""

    def forward(self, x: Tensor) -> Tensor:
        norm = x.norm()
        return x * 2 if norm < 3 else x / norm


def net(between: nn.Module, samples: int = 4) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Net(between), {"x": torch.randn(samples, 16), "y": torch.randn(samples, 8)}


def only(found: Coverage) -> Row:
    assert len(found.rows) == 1
    return found.rows[0]


# -- rows --------------------------------------------------------------------------------------------------------------------------------


def test_every_layout_has_a_row_in_order() -> None:
    told: list[str] = []
    found = coverage(*net(nn.ReLU()), progress=told.append)
    assert [row.layout for row in found.rows] == list(LAYOUTS)
    assert found.ok and all(row.status == "verified" and row.error is not None and row.error < 1e-10 for row in found.rows)
    assert [row.plan.split(",microbatches")[0] for row in found.rows[:4]] == [
        "dp=1,tp=2,pp=1",
        "dp=1,tp=1,pp=2",
        "dp=2,tp=1,pp=1",
        "dp=1,tp=2,pp=2",
    ]
    assert told[-5:] == list(LAYOUTS) and found.dtype == "float64" and found.model == "Net"


def test_shares_are_given_where_only_the_tensor_axis_splits() -> None:
    found = coverage(*net(nn.ReLU()), layouts=("tp=2", "dp=2", "tp=2,pp=2"))
    first, *others = found.rows
    assert first.parameters == pytest.approx(0.5) and first.flops == pytest.approx(0.5)
    assert [(row.parameters, row.flops) for row in others] == [(None, None)] * 2


def test_a_rank_has_half_of_a_transformers_blocks() -> None:
    row = only(coverage(*gpt2(), layouts=("tp=2",)))
    assert row.status == "verified" and row.replicated == {}
    assert row.parameters is not None and row.parameters <= 0.55
    assert row.flops is not None and row.flops <= 0.60


def test_a_layout_that_does_not_fit_says_why() -> None:
    found = coverage(*net(nn.ReLU(), samples=1), layouts=("dp=2", "pp=9"))
    assert found.ok, "a layout that is refused with a reason is no fault"
    assert [row.status for row in found.rows] == ["infeasible", "infeasible"]
    assert "a batch of 1 cannot be" in found.rows[0].why and "dp=2" in found.rows[0].why
    assert "stages" in found.rows[1].why
    assert found.rows[0].error is None and found.rows[0].plan == ""


def test_too_little_memory_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cluster, "parse", lambda text: made_up(2, memory_gb=1e-4))
    row = only(coverage(*net(nn.ReLU()), layouts=("tp=2",)))
    assert row.status == "infeasible" and row.why


def test_an_operator_without_a_rule_is_listed() -> None:
    found = coverage(*net(Clipped()), layouts=("tp=2", "pp=2"))
    assert found.ok
    assert "values that training changes" in found.kept["between"]
    assert found.without_rule == {"shardwise.opaque[between]": 1} and found.found == []
    assert found.rows[0].replicated == {"shardwise.opaque[between]": 1} and found.rows[1].replicated == {}


class Doubled(torch.autograd.Function):
    """Each element alone; its backward is its own."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return 3 * gradient


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(x)


def test_an_operator_whose_rule_was_found_is_listed(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDWISE_CACHE", str(tmp_path))
    found = coverage(*net(Doubling()), layouts=("tp=2",))
    assert found.ok and found.without_rule == {} and len(found.found) == 1
    assert found.found[0].startswith("shardwise.opaque[") and found.found[0].endswith("Doubled]")
    assert only(found).replicated == {}


def test_a_model_that_is_not_deterministic_is_refused() -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * self.calls

    with pytest.raises(VerifyError, match=r"Net is not deterministic: .* the first submodule that gave another result is between"):
        coverage(*net(Counting()), layouts=("tp=2",))


def test_gradients_that_are_not_finite_on_one_device_are_named() -> None:
    class Steep(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (0 * x).square().sum(1, keepdim=True).sqrt() + x

    with pytest.raises(VerifyError, match=r"^Net has gradients that are not finite on one device in float32, of up\.weight first"):
        coverage(*net(Steep()), layouts=("tp=2",))


def test_a_bug_of_ours_fails_its_layout_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def lowered(reference: object, plan: Plan, *more: object) -> object:
        assert plan.tp == 1, "two things that should be equal are not"
        return whole(reference, plan, *more)  # type: ignore[arg-type]

    whole = sys.modules["shardwise.verify.coverage"].lowered  # type: ignore[attr-defined]
    monkeypatch.setattr(sys.modules["shardwise.verify.coverage"], "lowered", lowered)
    found = coverage(*net(nn.ReLU()), layouts=("tp=2", "dp=2"))
    assert [row.status for row in found.rows] == ["failed", "verified"] and not found.ok
    assert found.rows[0].why.startswith("AssertionError: two things that should be equal are not")


# -- how it is shown ---------------------------------------------------------------------------------------------------------------------

MADE = Coverage(
    model="Net",
    dtype="float64",
    rows=[
        Row(layout="tp=2", status="verified", plan="dp=1,tp=2,pp=1", error=2e-16, replicated={"a.b": 2}, parameters=0.5, flops=0.625),
        Row(layout="chosen on 4", status="verified", plan="dp=4,tp=1,pp=1", error=1e-16),
        Row(layout="pp=2", status="infeasible", why="one part only"),
        Row(layout="dp=2", status="differs", error=0.1, why="loss is the first that differs"),
    ],
    kept={"inner": "a reason"},
    without_rule={"a.b": 2},
    found=["c.d"],
)


def test_as_text() -> None:
    lines = str(MADE).splitlines()
    assert lines[1:4] == [
        "  inner is kept as one operator: a reason",
        "  without a rule, done whole by every rank: a.b ×2",
        "  rule found by running the operator: c.d",
    ]
    words = [line.split() for line in lines[5:]]
    assert words[0] == ["tp=2", "verified", "2.0e-16", "50%", "62%", "a.b", "×2"]
    assert words[1] == ["chosen", "on", "4", "verified", "1.0e-16", "dp=4,tp=1,pp=1"]
    assert words[2] == ["pp=2", "infeasible", "one", "part", "only"]
    assert words[3][:3] == ["dp=2", "differs", "1.0e-01"]
    assert not MADE.ok


def test_as_json() -> None:
    again = json.loads(json.dumps(coverage(*net(nn.ReLU(), samples=1), layouts=("tp=2", "dp=2")).as_dict()))
    assert set(again) == {"model", "dtype", "rows", "kept", "without_rule", "found"}
    verified, refused = again["rows"]
    assert verified["status"] == "verified" and verified["error"] < 1e-10 and verified["parameters"] == pytest.approx(0.5)
    assert refused["status"] == "infeasible" and refused["error"] is None and refused["why"]


def test_all_layouts_hold_the_usual_ones() -> None:
    assert set(LAYOUTS) <= set(ALL_LAYOUTS) and len(set(ALL_LAYOUTS)) == len(ALL_LAYOUTS)
