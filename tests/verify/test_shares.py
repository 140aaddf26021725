"""Copies with unequal shares of the batch: the same numbers as one device, whatever the operators do with the samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from examples.models.graphs import set_transformer
from tests.clusters import made_up
from tests.models import Example, bert, gpt2, llama, mlp, unet, vit
from torch import Tensor, nn

import shardwise as sw
from shardwise.capture.export import capture
from shardwise.planner.apply import analyse, assign
from shardwise.planner.preflight import preflight
from shardwise.simulate.memory import memory_use
from shardwise.verify.verify import Report


def planned(example: Example, layout: str, ranks: int = 4) -> sw.Plan:
    plan = sw.plan(*example, made_up(ranks), layout)
    assert isinstance(plan, sw.Plan), str(plan)
    return plan


def verified(example: Example, layout: str) -> Report:
    report = sw.verify(*example, plan=planned(example, layout), processes=False)
    assert isinstance(report, Report)
    return report


@pytest.mark.parametrize(
    "layout",
    ["shares=3:1,tp=1,pp=1", "shares=1:3,tp=1,pp=1,microbatches=2", "shares=5:1:2,tp=1,pp=1", "shares=3:1,tp=2,pp=1,microbatches=2"]
    + ["shares=1:3,tp=1,pp=2,chunks=2,microbatches=2", "shares=3:1,cp=2,tp=1,pp=1"]
    + ["shares=3:1,tp=1,pp=1,zero=2,microbatches=2", "shares=1:3,tp=1,pp=1,zero=3,recompute=full"],
)
@pytest.mark.parametrize("model", [llama, gpt2])
def test_every_axis_beside_shares(model: Callable[..., Example], layout: str) -> None:
    report = verified(model(layers=1, samples=8), layout)
    assert report.ok, str(report)


@pytest.mark.parametrize("layout", ["shares=3:1,tp=1,pp=1", "shares=1:2:1,tp=1,pp=1"])
@pytest.mark.parametrize(
    "example",
    [lambda: bert(samples=8, layers=1, dropout=0.1), lambda: vit(samples=8, layers=1), lambda: unet(samples=8), lambda: mlp(samples=8)],
    ids=["dropout", "vit", "unet", "mlp"],
)
def test_families(example: Callable[[], Example], layout: str) -> None:
    report = verified(example(), layout)
    assert report.ok, str(report)


class Normalised(nn.Module):
    """Statistics of the whole batch, and a mean over the labels that count, of which the copies have unlike parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Linear(10, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.last(self.norm(self.first(x)).relu()), y)


def test_statistics_and_means_are_the_whole_batchs() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([-100, 1, -100, -100, 0, 4, 2, -100, 3, 1, 1, 0])
    report = verified((Normalised(), {"x": torch.randn(12, 6), "y": labels}), "shares=1:2:3,tp=1,pp=1")
    assert report.ok and {"buffer norm.running_mean", "buffer norm.running_var"} <= {each.name for each in report.differences}, str(report)


class Tokened(nn.Module):
    """A token for each sample, whose gradient a rank with one sample need not sum: it comes elsewhere in that rank's backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.token = nn.Parameter(torch.randn(1, 5, 8)), nn.Parameter(torch.randn(1, 1, 8))
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        tokens = tokens + torch.cat([self.place[:, :1], self.place[:, 1:].permute(0, 2, 1).sigmoid().permute(0, 2, 1)], dim=1)
        return nn.functional.cross_entropy(self.last(tokens.square().mean(1)), y)


@pytest.mark.parametrize("layout", ["shares=3:1,tp=1,pp=1", "shares=1:3,tp=1,pp=1,zero=1", "shares=3:1,tp=1,pp=1,zero=2"])
def test_messages_are_ordered_alike_where_backward_passes_are_not(layout: str) -> None:
    torch.manual_seed(0)
    report = verified((Tokened(), {"x": torch.randn(4, 4, 8), "y": torch.tensor([0, 2, 1, 1])}), layout)
    assert report.ok, str(report)


@pytest.mark.parametrize("layout", ["shares=3:1,tp=1,pp=1,zero=3", "shares=3:1,tp=1,pp=1,zero=3,recompute=full"])
def test_what_is_gathered_again_is_ordered_alike(layout: str) -> None:
    """Queries made of parameters alone are gathered again, and computed again, for the backward pass: of one sample in another order."""
    report = verified(set_transformer(), layout)
    assert report.ok, str(report)


@pytest.mark.parametrize(
    ("layout", "ranks", "unlike"),
    [
        ("shares=5:1:2,tp=1,pp=1", 3, 3),
        ("shares=1:3,tp=1,pp=2,microbatches=2", 4, 4),
        ("shares=3:1:1:3,tp=1,pp=2,chunks=2,microbatches=2", 8, 4),
    ],
)
def test_memory_is_predicted_for_each_copy(layout: str, ranks: int, unlike: int) -> None:
    example = gpt2(layers=4, samples=16)
    plan = planned(example, layout, ranks)
    programs = preflight(plan, capture(*example))
    uses = [memory_use(programs[rank], plan.optimizer).total for rank in range(ranks)]
    assert plan.predicted.memory_bytes == uses and len(set(uses)) == unlike


def test_a_rank_works_on_its_share() -> None:
    model, batch = mlp(samples=8)
    plan = planned((model, batch), "shares=5:1:2,tp=1,pp=1")
    assert plan.shares == [5, 1, 2] and plan.layout.endswith(",shares=5:1:2") and "3 copies, in shares of 5:1:2 (dp)" in str(plan)
    assert sw.Plan.parse(plan.model_dump_json()) == plan
    programs = preflight(plan, capture(model, batch))
    sizes = []
    for program in programs.values():
        (stage,) = program.stages.values()
        inputs = [node for node in stage.prelude.nodes if node.op == "placeholder"]
        sizes.append({node.meta["val"].shape[0] for node in inputs if node.meta["val"].dim() > 0})
    assert sizes == [{5}, {1}, {2}]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shares": [3, 2]}, r"shares=\[3, 2\] do not divide global_batch=8 among the ranks of dp=2"),
        ({"shares": [2, 1, 1]}, r"shares=\[2, 1, 1\] do not divide global_batch=8 among the ranks of dp=2"),
        ({"shares": [3, 1], "microbatches": 4}, r"microbatches=4 do not divide the data ranks' samples, \[6, 2\]"),
    ],
)
def test_edited_shares_that_cannot_be(changed: dict[str, object], message: str) -> None:
    plan = planned(mlp(samples=8), "dp=2,tp=1,pp=1", ranks=2)
    with pytest.raises(sw.PlanError, match=message):
        sw.Plan.parse((plan.model_copy(update=changed)).model_dump_json())


class Folding(nn.Module):
    """Samples of one half of the batch meet those of the other, which other copies have."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).unflatten(0, (2, -1)).prod(0).mean()


def test_samples_that_meet_across_copies() -> None:
    report = verified((Folding(), {"x": torch.randn(8, 4)}), "shares=3:1,tp=1,pp=1,microbatches=1")
    assert report.ok, str(report)


def test_an_operator_that_takes_equal_parts_only() -> None:
    model, batch = mlp(samples=8)
    analysis = analyse(capture(model, batch))
    op, choice = next(iter(analysis.batch.items()))
    equal = replace(analysis.signatures[op].splits[choice.factor], uneven=False)
    signature = replace(analysis.signatures[op], splits={choice.factor: equal})
    told = replace(analysis, signatures={**analysis.signatures, op: signature})
    with pytest.raises(sw.LayoutError, match=r"shares=3:1 divides the batch unevenly, but .* takes equal parts only; leave them out"):
        assign(told, 2, 1, 1, shares=(3, 1))
