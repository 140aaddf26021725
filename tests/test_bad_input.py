"""What bad input gets: a clear error that names the thing, both numbers and the way out, before any process starts or memory is taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.clusters import made_up
from tests.models import Batch, Example, llama, mlp
from torch import Tensor, nn

import shardwise as sw
from shardwise.capture.export import capture
from shardwise.planner.apply import apply_plan
from shardwise.runtime.launch import launch
from shardwise.sharding import declare


def planned(example: Example, ranks: int, layout: str) -> sw.Plan:
    plan = sw.plan(*example, made_up(ranks), layout)
    assert isinstance(plan, sw.Plan), str(plan)
    return plan


def test_more_ranks_in_the_layout_than_devices() -> None:
    with pytest.raises(
        sw.LayoutError, match=r"layout tp=2,pp=2 takes 4 ranks, the cluster has 2; lower one of the sizes or name a larger cluster"
    ):
        sw.plan(*mlp(), made_up(2), "tp=2,pp=2")


def test_ranks_that_do_not_divide() -> None:
    with pytest.raises(sw.LayoutError, match=r"layout tp=3 takes 3 ranks, which do not divide the cluster's 4"):
        sw.plan(*mlp(), made_up(4), "tp=3")


def test_fewer_ranks_than_devices_are_refused_or_used() -> None:
    """A layout that pins everything uses as many ranks as it says."""
    assert planned(mlp(), 4, "dp=2,tp=1,pp=1").ranks == 2


def test_a_batch_that_the_microbatches_do_not_divide() -> None:
    with pytest.raises(sw.BatchError, match=r"a batch of 8 cannot be cut into microbatches=3 on dp=1: 8 is no multiple of 3"):
        sw.plan(*mlp(), made_up(2), "pp=2,tp=1,microbatches=3")


def test_a_batch_that_the_copies_do_not_divide() -> None:
    with pytest.raises(sw.BatchError, match=r"a batch of 3 cannot be split over dp=4; change the global batch or dp"):
        sw.plan(*mlp(samples=3), made_up(4), "dp=4")


def test_microbatches_that_would_change_the_numbers() -> None:
    from tests.models import unet

    with pytest.raises(
        sw.LayoutError, match=r"microbatches=2 would change the numbers: the forward pass changes the buffer .*; use microbatches=1"
    ):
        sw.plan(*unet(), made_up(2), "dp=2,microbatches=2")


def test_more_stages_than_parts() -> None:
    with pytest.raises(sw.LayoutError, match=r"32 stages are more than the \d+ parts that the model can be cut into; use \d+ or fewer"):
        sw.plan(*mlp(samples=32), made_up(32), "pp=32")


class Gated(nn.Module):
    """Holds an operator of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"up": nn.Linear(4, 8)})
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.shardwise_test.bad_input_gate(self.inner["up"](x), self.weight).sum()


@torch.library.custom_op("shardwise_test::bad_input_gate", mutates_args=())
def gate(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight


gate.register_fake(lambda x, weight: torch.empty_like(x))


def test_a_declared_rule_that_does_not_describe_its_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(declare, "_DECLARED", {})
    sw.declare_rule("shardwise_test::bad_input_gate", "b n -> b n")
    with pytest.raises(sw.RuleError, match=r"declared rule 'b n -> b n' of .*bad_input_gate\.default has 1 tensors where .* reads 2"):
        sw.plan(Gated(), {"x": torch.randn(2, 4)}, made_up(2))


def test_a_plan_for_another_model_or_batch() -> None:
    plan = planned(mlp(), 2, "tp=2")
    for other in (mlp(hidden=32), mlp(samples=4)):
        with pytest.raises(
            sw.PlanError, match=rf"the plan was made for Mlp with fingerprint {plan.fingerprint} and a batch of 8; .* plan again"
        ):
            apply_plan(plan, capture(*other))
        with pytest.raises(sw.PlanError, match="plan again"):
            sw.verify(*other, plan=plan)


def test_a_layout_that_does_not_fit_memory() -> None:
    found = sw.plan(*llama(), made_up(2, memory_gb=1e-4), "tp=2")
    assert isinstance(found, sw.Infeasible) and not found
    assert str(found).startswith("No layout fits:\n  dp=1,tp=2,pp=1,microbatches=1,schedule=1f1b: ")
    assert "GB a rank" in str(found) and "Smallest change that fits: " in str(found)


# -- on ranks ------------------------------------------------------------------------------------------------------------------------------


def stepped(plan: sw.Plan, batch: Batch) -> float:
    model, example = mlp()
    job = sw.parallelize(model, example, plan=plan, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    return float(job.step(batch))


def with_lbfgs(plan: sw.Plan) -> None:
    sw.parallelize(*mlp(), plan=plan, optimizer=lambda parameters: torch.optim.LBFGS([p for _, p in parameters]))


@pytest.mark.distributed
def test_a_step_on_another_batch() -> None:
    plan, (_, batch) = planned(mlp(), 1, ""), mlp()
    with pytest.raises(
        sw.RankFailed, match=r"BatchError: x in the global batch is torch.float32 \[3, 64\], the plan was made for .* \[8, 64\]"
    ):
        launch(stepped, (plan, batch | {"x": torch.randn(3, 64)}), ranks=1, threads=1)
    with pytest.raises(sw.RankFailed, match=r"BatchError: the batch lacks 'y'; it holds \['x'\]"):
        launch(stepped, (plan, {"x": batch["x"]}), ranks=1, threads=1)


@pytest.mark.distributed
def test_a_plan_for_another_number_of_ranks() -> None:
    with pytest.raises(sw.RankFailed, match=r"PlanError: the plan is for 2 ranks, this job has 1; start 2 ranks or plan for 1"):
        launch(stepped, (planned(mlp(), 2, "tp=2"), mlp()[1]), ranks=1, threads=1)


@pytest.mark.distributed
def test_an_optimizer_that_no_layout_can_run() -> None:
    with pytest.raises(sw.RankFailed, match="LBFGS"):
        launch(with_lbfgs, (planned(mlp(), 2, "tp=2"),), ranks=2, threads=1)


def test_a_plan_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(sw.PlanError, match=r"plan .*none\.json cannot be read: No such file"):
        sw.Plan.load(tmp_path / "none.json")
