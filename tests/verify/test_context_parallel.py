"""Sequences split over an axis: the same numbers as one device, whatever the model does along its sequences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.clusters import made_up
from tests.models import Example, bert, gpt2, llama, mlp, t5, unet, vit
from tests.program.support import only_stage
from torch import Tensor, nn
from torch.nn import functional as F

import shardwise as sw
from shardwise.capture.export import capture
from shardwise.errors import BatchError, LayoutError, PlanError
from shardwise.planner.layout import Layout
from shardwise.planner.plan import Plan
from shardwise.planner.preflight import preflight
from shardwise.program.program import Program
from shardwise.program.reductions import reductions
from shardwise.sharding.collectives import COLLECTIVES
from shardwise.sharding.types import R
from shardwise.verify.verify import Report

SAMPLES, TOKENS, WIDTH = 4, 12, 8


def verified(example: Example, layout: str, **more: Any) -> Report:
    """Verified to be equal, on as many ranks as the layout takes."""
    report = sw.verify(*example, cluster=made_up(Layout.parse(layout).ranks), layout=layout, processes=False, **more)
    assert isinstance(report, Report)
    assert report.ok, f"{report.first_difference}\n{report}"
    return report


class Model(nn.Module):
    """Parts by name, and a function of them and the batch that makes the loss."""

    def __init__(self, loss: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, **batch: Tensor) -> Tensor:
        return self.loss(self, **batch)


# -- whole models ------------------------------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[Callable[[], Example], str]] = {
    "gpt2": (lambda: gpt2(layers=1), "cp=2"),
    "gpt2 on 4": (lambda: gpt2(layers=1), "cp=4"),
    "gpt2, 30 tokens on 4": (lambda: gpt2(layers=1, sequence=30), "cp=4"),
    "gpt2, 31 tokens, with tp": (lambda: gpt2(layers=1, sequence=31), "cp=2,tp=2"),
    "gpt2 with dp and microbatches": (lambda: gpt2(layers=1), "dp=2,cp=2,microbatches=2"),
    "gpt2, 3 samples, with dp": (lambda: gpt2(layers=1, samples=3), "dp=2,cp=2"),
    "gpt2 with pp and microbatches": (lambda: gpt2(layers=2), "cp=2,pp=2,microbatches=4"),
    "gpt2 with tp and pp": (lambda: gpt2(layers=2), "cp=2,tp=2,pp=2,microbatches=2"),
    "gpt2, dropout, microbatches": (lambda: gpt2(layers=1, dropout=0.1), "cp=2,microbatches=2"),
    "gpt2, dropout, 31 tokens, with tp": (lambda: gpt2(layers=1, dropout=0.1, sequence=31), "cp=2,tp=2"),
    "llama": (lambda: llama(layers=1), "cp=2"),
    "llama, 29 tokens, with tp": (lambda: llama(layers=1, sequence=29), "cp=2,tp=2"),
    "llama, 31 tokens, with pp": (lambda: llama(layers=2, sequence=31), "cp=2,pp=2,microbatches=2"),
    "bert": (lambda: bert(layers=1), "cp=2"),
    "bert, 27 tokens, with tp and microbatches": (lambda: bert(layers=1, sequence=27), "cp=2,tp=2,microbatches=2"),
    "bert, dropout, with dp": (lambda: bert(layers=1, dropout=0.1), "dp=2,cp=2"),
    "t5": (t5, "cp=2"),
    "t5 with tp": (t5, "cp=2,tp=2"),
    "t5 with dp and pp": (t5, "dp=2,cp=2,pp=2,microbatches=2"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers_as_one_device(case: str) -> None:
    make, layout = CASES[case]
    report = verified(make(), layout)
    assert f"cp={layout.split('cp=')[1][0]}" in report.layout


# -- losses and statistics over the sequence ---------------------------------------------------------------------------------------------


def labelled(valid: Callable[[Tensor], Tensor]) -> Example:
    """A mean over the valid labels alone; valid: of positions [samples, tokens]."""

    def loss(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model.head(model.mix(model.embed(ids)).relu()).flatten(0, 1), labels.flatten(), ignore_index=-1)

    torch.manual_seed(0)
    ids, labels = torch.randint(32, (SAMPLES, TOKENS)), torch.randint(32, (SAMPLES, TOKENS))
    labels[~valid(torch.arange(TOKENS).expand(SAMPLES, -1))] = -1
    parts = {"embed": nn.Embedding(32, WIDTH), "mix": nn.Linear(WIDTH, WIDTH), "head": nn.Linear(WIDTH, 32)}
    return Model(loss, **parts), {"ids": ids, "labels": labels}


@pytest.mark.parametrize("layout", ["cp=4", "dp=2,cp=2,microbatches=2", "cp=2,tp=2"])
def test_a_mean_is_one_over_all_valid_labels(layout: str) -> None:
    verified(labelled(lambda place: place < 2), layout)  # some ranks have none
    verified(labelled(lambda place: place % 5 > 1), layout)


def sequences(features: int = WIDTH) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"x": torch.randn(SAMPLES, TOKENS, features), "y": torch.randn(SAMPLES, TOKENS, features)}


def batch_normalised() -> Example:
    """Over all tokens of all samples; the running statistics, too."""

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(model.last(model.norm(model.first(x).transpose(1, 2)).transpose(1, 2).relu()), y)

    return Model(loss, first=nn.Linear(WIDTH, 16), norm=nn.BatchNorm1d(16), last=nn.Linear(16, WIDTH)), sequences()


def contrastive() -> Example:
    """Between the means of samples."""

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        first, second = F.normalize(model.left(x).mean(1), dim=1), F.normalize(model.right(y).amax(1), dim=1)
        return F.cross_entropy(first @ second.t() / 0.1, torch.arange(len(x)))

    return Model(loss, left=nn.Linear(WIDTH, 6), right=nn.Linear(WIDTH, 6)), sequences()


def routed() -> Example:
    """With the balance of experts over all tokens."""

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        probabilities = model.router(x).softmax(-1)
        best, chosen = probabilities.max(-1)
        share = F.one_hot(chosen, 4).to(x.dtype).mean((0, 1))
        return F.mse_loss(model.out(x) * best[..., None], y) + 0.4 * (share * probabilities.mean((0, 1))).sum()

    return Model(loss, router=nn.Linear(WIDTH, 4), out=nn.Linear(WIDTH, WIDTH)), sequences()


def shifted() -> Example:
    """Each token predicts the next one's features; sums along the sequence, a convolution, a first token in front."""

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.cat([model.start(y[:, :1]), x], 1)
        hidden = model.mix(hidden.transpose(1, 2)).transpose(1, 2) + hidden.cumsum(1) / TOKENS
        hidden = hidden + torch.roll(hidden, 1, 1)
        return F.mse_loss(model.last(hidden)[:, :-1], y)

    parts = {"start": nn.Linear(WIDTH, WIDTH), "mix": nn.Conv1d(WIDTH, WIDTH, 3, padding=1), "last": nn.Linear(WIDTH, WIDTH)}
    return Model(loss, **parts), sequences()


def mixed() -> Example:
    """A product along the sequence."""

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(x + model.tokens(x.transpose(1, 2)).relu().transpose(1, 2) * model.gate(x), y)

    return Model(loss, tokens=nn.Linear(TOKENS, TOKENS), gate=nn.Linear(WIDTH, WIDTH)), sequences()


def recurrent() -> Example:
    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(model.last(model.layers(x)[0]), y)

    return Model(loss, layers=nn.LSTM(WIDTH, 6, num_layers=2, batch_first=True), last=nn.Linear(6, WIDTH)), sequences()


def pointing() -> Example:
    """The tokens are the classes of the loss, over which one axis may split it, but not two."""

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        scores = model.last(model.first(x).tanh()).squeeze(-1)
        return F.cross_entropy(scores + scores.softmax(-1), y)

    batch = {"x": sequences()["x"], "y": torch.randint(TOKENS, (SAMPLES,))}
    return Model(loss, first=nn.Linear(WIDTH, 16), last=nn.Linear(16, 1)), batch


COUPLED: dict[str, Callable[[], Example]] = {
    "BatchNorm": batch_normalised,
    "InfoNCE": contrastive,
    "router balance": routed,
    "shifts and sums": shifted,
    "token mixer": mixed,
    "LSTM": recurrent,
    "pointers": pointing,
}


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("layout", ["cp=2", "dp=2,cp=2", "cp=3,tp=2"])
def test_what_couples_tokens_is_exact(name: str, layout: str) -> None:
    verified(COUPLED[name](), layout)


def test_the_sequence_may_come_before_the_samples() -> None:
    """Tokens of all samples in one dim, whose outer part cp splits; 5 tokens are not divided evenly."""

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        hidden = model.first(x.flatten(0, 1)).relu()
        return F.cross_entropy(model.last(hidden), y.flatten(), ignore_index=-1)

    torch.manual_seed(0)
    model = Model(loss, first=nn.Linear(6, 16), last=nn.Linear(16, 10))
    labels = torch.randint(-1, 10, (5, 4))
    batch = {"x": torch.randn(5, 4, 6), "y": labels}
    for layout in ("cp=2,microbatches=2", "dp=2,cp=2,microbatches=2", "cp=2,tp=2,microbatches=4"):
        verified((model, batch), layout, batch_dims={"x": 1, "y": 1})


# -- where there is no sequence ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [vit, unet, mlp])
def test_a_batch_without_sequences_is_refused(make: Callable[[], Example]) -> None:
    with pytest.raises(LayoutError, match=r"^cp=2 splits the sequence, but no input of the batch has one \(.*\); use cp=1, or say"):
        verified(make(), "cp=2")


def test_too_short_a_sequence_is_refused() -> None:
    message = r"^cp=8 splits the sequence, but the longest has 4 elements \(input_ids \[4, 4\], labels \[4, 4\]\); use cp=4 or less, or say"
    with pytest.raises(LayoutError, match=message):
        sw.plan(*gpt2(layers=1, sequence=4), made_up(8), "cp=8")


@pytest.mark.parametrize("layout", ["cp=2", "cp=2,tp=2", "dp=2,cp=2"])
def test_a_dim_that_is_named_is_split(layout: str) -> None:
    """Rows of images: convolutions, batch normalisation, a class for each pixel."""
    report = verified(unet(), layout, sequence_dims={"x": 2, "y": 1})
    assert report.plan.sequence_dims == {"x": 2, "y": 1}
    verified(vit(layers=1), "cp=2", sequence_dims={"pixel_values": 3})


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"ids": 1}, r"sequence_dims names 'ids', which is no input with samples; there are \['input_ids', 'labels'\]"),
        ({"labels": 0}, r"sequence_dims=\{'labels': 0\} is no dim of labels \[4, 32\] beside that of its samples"),
        ({"labels": 2}, r"sequence_dims=\{'labels': 2\} is no dim of labels"),
    ],
)
def test_a_dim_that_is_not_there(named: dict[str, int], message: str) -> None:
    with pytest.raises(BatchError, match=message):
        sw.plan(*gpt2(layers=1), made_up(2), "cp=2", sequence_dims=named)


def test_sequence_dims_without_effect_are_refused() -> None:
    with pytest.raises(LayoutError, match=r'^sequence_dims says what cp splits, but cp is 1: pin it \(layout="cp=2"\) or leave'):
        sw.plan(*gpt2(layers=1), made_up(2), "tp=2", sequence_dims={"labels": 1})
    plan = planned(gpt2(layers=1), "cp=2")
    with pytest.raises(PlanError, match=r"^the plan says already what cp splits: leave sequence_dims out$"):
        sw.verify(*gpt2(layers=1), plan=plan, sequence_dims={"labels": 1})


# -- plans and programs ------------------------------------------------------------------------------------------------------------------


def planned(example: Example, layout: str, **more: Any) -> Plan:
    plan = sw.plan(*example, made_up(Layout.parse(layout).ranks), layout, **more)
    assert isinstance(plan, Plan)
    return plan


def programs_of(example: Example, layout: str) -> dict[int, Program]:
    return preflight(planned(example, layout), capture(*example))


def collectives(graph: Any) -> Counter[str]:
    return Counter(COLLECTIVES[node.target] for node in graph.nodes if node.target in COLLECTIVES)


@pytest.mark.parametrize("make", [gpt2, lambda: gpt2(dropout=0.1), llama, bert])
def test_only_keys_and_values_are_gathered(make: Callable[[], Example]) -> None:
    """Of two layers: those of each layer forward, their gradients backward, and nothing of what depends on the batch alone."""
    programs = programs_of(make(), "cp=2,attention=gather,microbatches=2")
    for program in programs.values():
        assert collectives(only_stage(program).prelude) == {}
        assert collectives(only_stage(program).forward) == {"all_gather": 4}
        assert collectives(only_stage(program).backward) == {"reduce_scatter": 4}


def test_gradients_are_summed_once_over_samples_and_sequences() -> None:
    programs = programs_of(llama(layers=1), "dp=2,cp=2,tp=2,microbatches=1,zero=0")
    assert dict(programs[3].coordinates) == {"dp": 0, "cp": 1, "tp": 1, "pp": 0}
    assert programs[3].groups == {"dp": (3, 7), "cp": (1, 3), "tp": (2, 3)}
    for part in programs[3].parameters:
        assert part.type["cp"] == R and part.reduce[:2] == ("dp", "cp")
    groups = {group for reduction in reductions(programs[3]) for group in reduction.groups}
    assert "dp+cp:1,3,5,7" in groups and not any(group.startswith(("dp:", "cp:")) for group in groups)


def test_a_rank_holds_its_part_of_what_is_saved() -> None:
    example = llama(layers=1, sequence=64)
    whole, half = (planned(example, layout).predicted.by_kind[0]["saved"] for layout in ("cp=1,dp=1,tp=1,pp=1,microbatches=1", "cp=2"))
    assert half < 0.6 * whole


def test_a_plan_says_what_is_split_over_the_sequence() -> None:
    plan = planned(gpt2(layers=1), "cp=2,tp=2,attention=gather,microbatches=1,zero=0")
    assert plan.layout == "dp=1,cp=2,tp=2,pp=1,microbatches=1,attention=gather,schedule=1f1b"
    assert plan.sequence_dims == {"input_ids": 1, "labels": 1} and plan.ranks == 4
    text = " ".join(str(plan).split())
    assert "2 ranks share each sequence (cp) × 2 ranks share each operator (tp)" in text
    assert "Sequences split over 2 ranks: dim 1 of input_ids, dim 1 of labels; 42 of 42 operators work on their part alone" in text
    assert "forward pass communicates 2 all_gathers over cp" in text
    again = Plan.parse(plan.model_dump_json())
    assert again == plan


def test_a_plan_without_cp_is_read() -> None:
    """As plans were written before there was such an axis."""
    plan = planned(gpt2(layers=1), "dp=2,microbatches=1")
    before = plan.model_dump(exclude={"cp", "sequence_dims", "attention"})
    assert Plan.model_validate(before) == plan and plan.cp == 1 and "cp" not in plan.layout


def test_the_plan_decides_which_dim_is_split() -> None:
    """Whoever applies it need not name the dims again; and it may be edited."""
    example = gpt2(layers=1)
    plan = planned(example, "cp=2", sequence_dims={"labels": None})
    assert plan.sequence_dims == {"input_ids": 1}
    for edited in (plan, plan.model_copy(update={"sequence_dims": {"labels": 1}}), plan.model_copy(update={"sequence_dims": {}})):
        report = sw.verify(*example, plan=edited, processes=False)
        assert isinstance(report, Report) and report.ok, str(report)


def test_ranks_must_be_the_product_of_all_axes() -> None:
    plan = planned(gpt2(layers=1), "cp=2")
    with pytest.raises(PlanError, match=r"dp=1 × cp=3 × tp=1 × pp=1 are 3 ranks, not ranks=2"):
        Plan.parse(plan.model_copy(update={"cp": 3}).model_dump_json())


def test_what_is_sent_along_the_sequence_counts() -> None:
    """A slow link makes the layout's estimate and its simulated step longer."""
    example = gpt2(layers=1)
    fast, slow = (sw.plan(*example, made_up(2, link_bytes_per_s=speed), "cp=2,microbatches=1") for speed in (1e11, 1e6))
    assert isinstance(fast, Plan) and isinstance(slow, Plan)
    assert fast.considered[0].estimate_s and slow.considered[0].estimate_s
    assert slow.considered[0].estimate_s > fast.considered[0].estimate_s + 0.05
    assert slow.predicted.communication_s > fast.predicted.communication_s + 0.05


def test_cp_is_not_searched() -> None:
    plan = sw.plan(*gpt2(layers=1), made_up(4))
    assert isinstance(plan, Plan)
    assert plan.cp == 1 and all("cp" not in each.layout for each in plan.considered)
    both = sw.plan(*gpt2(layers=1), made_up(4), "cp=2")
    assert isinstance(both, Plan)
    assert {",".join(each.layout.split(",")[:4]) for each in both.considered} == {
        "dp=2,cp=2,tp=1,pp=1",
        "dp=1,cp=2,tp=2,pp=1",
        "dp=1,cp=2,tp=1,pp=2",
    }
