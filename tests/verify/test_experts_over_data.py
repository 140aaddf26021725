"""Experts divided over data ranks (ep): the same numbers as one device, whatever the routing."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from tests.clusters import made_up
from tests.examples.test_models import FILES, load
from tests.models import Example, gpt2
from tests.runtime.test_inference import answered, check
from torch import Tensor, nn
from torch.nn import functional as F

import shardwise as sw
from shardwise.errors import BatchError, LayoutError, PlanError
from shardwise.planner.apply import analyse, apply_plan
from shardwise.planner.layout import Layout
from shardwise.planner.plan import Infeasible, Plan
from shardwise.planner.preflight import preflight
from shardwise.program.program import Program
from shardwise.runtime.in_process import InProcess
from shardwise.sharding.collectives import COLLECTIVES
from shardwise.sharding.types import R, Shard
from shardwise.simulate.memory import RUNTIME_BYTES
from shardwise.verify.one_device import prepare
from shardwise.verify.verify import Report, check_lowered, lowered

SAMPLES, TOKENS, WIDTH, EXPERTS = 8, 6, 8, 4
EXPERT_MODELS = next(path for path in FILES if path.stem == "experts")


def verified(example: Example, layout: str, **more: Any) -> Report:
    """Verified to be equal, on as many ranks as the layout takes."""
    more = {"processes": False, "cluster": made_up(max(Layout.parse(layout).ranks, Layout.parse(layout).ep or 1)), **more}
    report = sw.verify(*example, layout=layout, **more)
    assert isinstance(report, Report)
    assert report.ok, f"{report.first_difference}\n{report}"
    return report


class Experts(nn.Module):
    """Each token goes through its best two of four experts, weighed; one matrix looked up for each row.

    favoured: is added to the experts' scores.
    """

    def __init__(self, favoured: Sequence[float], *, gated: bool = False, biased: bool = False, wide: int = 2 * WIDTH) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.gate.bias.data = torch.tensor(favoured)
        self.gated, self.wide = gated, wide
        self.up = nn.Parameter(torch.randn(EXPERTS, self.wide * (1 + gated), WIDTH) / 3)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, self.wide) / 3)
        self.up_bias = nn.Parameter(torch.randn(EXPERTS, self.wide * (1 + gated))) if biased else None
        self.down_bias = nn.Parameter(torch.randn(EXPERTS, WIDTH)) if biased else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.flatten(0, 1)
        chances = self.gate(tokens).softmax(-1)
        best, index = chances.topk(2)
        expert = index.flatten()
        rows = self._product(self.up, self.up_bias, tokens.repeat_interleave(2, 0), expert)
        if self.gated:
            left, right = rows.chunk(2, -1)
            rows = F.silu(left) * right
        else:
            rows = rows.relu()
        rows = self._product(self.down, self.down_bias, rows, expert)
        made = (rows.view(-1, 2, WIDTH) * best[..., None]).sum(1)
        share = F.one_hot(index, EXPERTS).to(x.dtype).mean((0, 1))
        return x + made.view_as(x), EXPERTS * (share * chances.mean(0)).sum()

    def _product(self, weight: Tensor, bias: Tensor | None, rows: Tensor, expert: Tensor) -> Tensor:
        made = torch.bmm(weight[expert], rows.unsqueeze(-1)).squeeze(-1)
        return made if bias is None else made + bias[expert]


class Model(nn.Module):
    """Layers that return (hidden, the router's loss), norms between; balance: how much of the router's losses is added."""

    def __init__(self, layers: Sequence[nn.Module], balance: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in layers)
        self.layers = nn.ModuleList(layers)
        self.last, self.balance = nn.Linear(WIDTH, 3), balance

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, extra = self.first(x), x.new_zeros(())
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x, router = layer(norm(x))
            extra = extra + router
        loss = F.cross_entropy(self.last(x).flatten(0, 1), y.flatten(), ignore_index=-1)
        return loss + self.balance * extra if self.balance else loss


def batch(samples: int = SAMPLES) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"x": torch.randn(samples, TOKENS, WIDTH), "y": torch.randint(-1, 3, (samples, TOKENS))}


def example(*, layers: int = 1, favoured: Sequence[float] = (0.0, 0.2, 0.4, -0.3), balance: float = 0.0, **settings: Any) -> Example:
    torch.manual_seed(0)
    return Model([Experts(favoured, **settings) for _ in range(layers)], balance), batch()


ROUTINGS: dict[str, Sequence[float]] = {
    "uneven": (0.0, 0.5, 2.0, -0.5),
    "two unused": (0.0, 1.0, -9.0, -9.0),  # a rank of ep=2 gets no row
    "three unused but for second choices": (9.0, 0.0, 0.0, 0.0),
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("layout", ["ep=4", "dp=4,ep=2"])
def test_the_same_numbers_whatever_the_routing(routing: str, layout: str) -> None:
    report = verified(example(favoured=ROUTINGS[routing], gated=True), layout)
    assert f"ep={Layout.parse(layout).ep}" in report.layout


@pytest.mark.parametrize(
    "layout",
    [
        "dp=2,ep=2,tp=2",
        "dp=4,ep=2,tp=2",
        "dp=2,ep=2,pp=2,microbatches=4",
        "dp=2,ep=2,microbatches=2",
        "dp=4,ep=2,pp=2,microbatches=2,schedule=zb-h1",
        "dp=2,ep=2,cp=2",
        "dp=2,ep=2,cp=2,tp=2",
        "dp=2,ep=2,recompute=full",
        "dp=2,ep=2,recompute=selective",
    ],
)
def test_beside_other_axes(layout: str) -> None:
    verified(example(layers=2, gated=True, biased=True), layout)


@pytest.mark.parametrize("layout", ["dp=4,ep=2,zero=1", "dp=4,ep=2,zero=2", "dp=4,ep=2,zero=3", "dp=2,ep=2,zero=3"])
def test_data_ranks_divide_what_they_have_in_common(layout: str) -> None:
    verified(example(gated=True, biased=True), layout)


@pytest.mark.parametrize("layout", ["dp=4,ep=2", "dp=2,ep=2,cp=2", "dp=2,ep=2,pp=2"])
def test_the_routers_loss_is_that_of_all_tokens(layout: str) -> None:
    verified(example(layers=2, balance=0.3), layout)


def test_on_processes() -> None:
    verified(example(gated=True, favoured=ROUTINGS["two unused"]), "dp=4,ep=2", processes=True)


def test_evaluation() -> None:
    """Of other numbers of samples, too, which the data ranks divide evenly."""
    model, given = example(gated=True)
    for samples in (SAMPLES, 4):
        some = {name: tensor[:samples].contiguous() for name, tensor in given.items()}
        with torch.no_grad():
            whole = model(**some)
        assert all(torch.allclose(found, whole, rtol=1e-5) for found in answered((model, given), "dp=2,ep=2,pp=2,microbatches=2", some))
    with pytest.raises(
        PlanError, match=r"^a batch of 5 is not divided evenly over dp=2, .* and ep=2 needs that; give batches of a multiple"
    ):
        answered((model, given), "dp=2,ep=2", {name: tensor[:5].contiguous() for name, tensor in given.items()})


class Dense(Experts):
    """In eval mode one expert after the other computes all tokens."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.training:
            return super().forward(x)
        tokens = x.flatten(0, 1)
        best, index = self.gate(tokens).softmax(-1).topk(2)
        weights = tokens.new_zeros(len(tokens), EXPERTS).scatter(1, index, best)
        made = sum(
            (tokens @ up.T).relu() @ down.T * weights[:, number, None]
            for number, (up, down) in enumerate(zip(self.up, self.down, strict=True))
        )
        return x + made.view_as(x), x.new_zeros(())


@pytest.mark.parametrize("layout", ["dp=2,ep=2", "dp=4,ep=2,zero=3"])
def test_evaluation_that_does_not_divide_the_experts(layout: str) -> None:
    """Their matrices stay where training keeps them, and are gathered."""
    torch.manual_seed(0)
    check((Model([Dense((0.0, 0.2, 0.4, -0.3))]), batch()), layout, batch(), bound=1e-5)


# -- the models of the matrix ------------------------------------------------------------------------------------------------------------

LIBRARY = ["mixtral", "mixtral_batched", "gpt_oss", "deepseek_v3", "capacity_experts", "bmm_experts", "dense_experts"]


@pytest.mark.parametrize(("name", "layout"), [*((name, "dp=2,ep=2") for name in LIBRARY), ("mixtral", "dp=2,ep=2,tp=2")])
def test_models_of_the_matrix(name: str, layout: str) -> None:
    model, given = getattr(load(EXPERT_MODELS), name)()
    report = verified((model, given), layout)
    parts = [value for value, text in of_ep(report, model, given).items() if isinstance(text, Shard)]
    assert parts, f"no parameter of {name} is divided over ep"


def one_sided(name: str) -> Example:
    """The model with all tokens at its first experts, in all layers: the hidden states' first dim is large, and the routers look at that
    alone. So of ranks that divide the experts the last one has no rows."""
    model, given = getattr(load(EXPERT_MODELS), name)()
    table = model.get_input_embeddings().weight
    routers = [each for path, each in model.named_parameters() if path.endswith(("gate.weight", "router.weight")) and len(each) > 1]
    with torch.no_grad():
        table[:, 0] = 4.0
        for router in routers:
            assert router.shape[1] == table.shape[1]
            router.zero_()
            router[:, 0] = torch.linspace(0.3, -0.3, len(router))
    assert routers
    return model, given


@pytest.mark.parametrize(
    ("name", "layout"),
    [*((name, "dp=2,ep=2") for name in ("mixtral", "qwen3_next", "deepseek_v2")), ("qwen2_moe", "dp=4,ep=4,microbatches=1")],
)
def test_all_tokens_at_the_first_experts(name: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank joins in every exchange, also those to which no row goes in any layer, forward and backward."""
    rows: dict[int, list[int]] = {}  # at their experts, of each exchange
    exchange_rows = InProcess.exchange_rows

    def counted(self: InProcess, x: Tensor, group: str, send: Sequence[int], receive: Sequence[int], impl: str) -> Tensor:
        rows.setdefault(self.rank, []).append(min(sum(send), sum(receive)))
        return exchange_rows(self, x, group, send, receive, impl)

    monkeypatch.setattr(InProcess, "exchange_rows", counted)
    verified(one_sided(name), layout)
    last = Layout.parse(layout).ranks - 1
    assert sorted(rows) == [*range(last + 1)] and len({len(each) for each in rows.values()}) == 1
    assert min(rows[0]) > 0 and max(rows[last]) == 0


@pytest.mark.parametrize("name", ["mixtral", "qwen3_next", "deepseek_v2", "qwen2_moe"])
def test_all_tokens_at_the_first_experts_in_eval_mode(name: str) -> None:
    """All that they return; of half as many samples, too."""
    model, given = one_sided(name)
    for inputs in (given, {"input_ids": given["input_ids"][:2]}):
        check((model, given), "dp=2,ep=2,microbatches=1", inputs, bound=1e-4)


def of_ep(report: Report, model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """Parameter → its type on ep."""
    programs = preflight(report.plan, prepare(model, given).graph)
    return {part.name: part.type["ep"] for part in programs[0].parameters}


# -- what ranks say to each other --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["ep=4", "dp=2,ep=2,pp=2,microbatches=4"])
def test_every_rank_does_the_same_collectives_whatever_the_routing(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where ranks are late by chance."""
    exchange = InProcess._exchange
    said: dict[int, list[tuple[str, torch.dtype]]] = {}

    def late(self: InProcess, x: Tensor, group: str) -> tuple[list[Tensor], int]:
        time.sleep(random.random() * 2e-3)
        said.setdefault(self.rank, []).append((group, x.dtype))
        return exchange(self, x, group)

    monkeypatch.setattr(InProcess, "_exchange", late)
    every = []
    for favoured in (ROUTINGS["uneven"], ROUTINGS["two unused"]):
        said.clear()
        verified(example(favoured=favoured, layers=2), layout)
        every.append({rank: list(words) for rank, words in said.items()})
    assert every[0] and all(each == every[0] for each in every)


def collectives(program: Program) -> list[str]:
    stage = next(iter(program.stages.values()))
    return [COLLECTIVES[node.target] for node in stage.forward.nodes if node.target in COLLECTIVES]


def test_rows_travel_there_and_back_once() -> None:
    """Between the products, where rows are treated alone, they stay with their experts."""
    every: list[dict[str, bool]] = [{"gated": True}, {"biased": True}, {"gated": True, "biased": True}]
    for settings in every:
        reference = prepare(*example(**settings))  # type: ignore[arg-type]
        plan = planned(example(**settings), "ep=2")  # type: ignore[arg-type]
        for program in lowered(reference, plan).programs.values():
            # which expert each row has goes with them
            assert sorted(collectives(program)) == ["all_to_all", *["exchange_rows"] * 3]


def test_a_capacity_of_each_expert_travels_by_all_to_all() -> None:
    """Groups of tokens with a capacity for each expert (GShard): that dim is split, and ordinary reshards carry the tokens."""
    torch.manual_seed(0)
    given = {"x": torch.randn(4, 12, WIDTH), "y": torch.randint(3, (4, 12))}
    model = Model([Capacity()])
    reference = prepare(model, given)
    for layout in ("ep=2", "dp=4,ep=2", "dp=2,ep=2,microbatches=2", "dp=2,ep=2,tp=2"):
        ranks = max(Layout.parse(layout).ranks, 2)
        plan = sw.plan(model, given, made_up(ranks), layout)
        assert isinstance(plan, Plan)
        built = lowered(reference, plan)
        report = check_lowered(reference, plan, built, processes=False)
        assert report.ok, str(report)
        assert collectives(built.programs[0]).count("all_to_all") >= 2, layout
        assert {part.name: part.type["ep"] for part in built.programs[0].parameters}["layers.0.up"] == Shard(0)


class Capacity(nn.Module):
    """Top-1 routing with a capacity, in groups of a sample's tokens (Lepikhin et al., GShard, 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * WIDTH) / 3)
        self.down = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, WIDTH) / 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        chances = self.gate(x).softmax(-1)
        chosen = F.one_hot(chances.argmax(-1), EXPERTS)
        place = (chosen.cumsum(1) - 1) * chosen
        slots = F.one_hot(place.clamp(max=3), 4) * (chosen * (place < 4))[..., None]
        sent = torch.einsum("gtec,gtm->egcm", slots.to(x.dtype), x)
        made = torch.einsum("egch,ehm->egcm", torch.einsum("egcm,emh->egch", sent, self.up).relu(), self.down)
        return x + torch.einsum("gtec,egcm->gtm", slots * chances[..., None], made), chances.sum() * 0


# -- plans -------------------------------------------------------------------------------------------------------------------------------


def planned(given: Example, layout: str) -> Plan:
    plan = sw.plan(*given, made_up(max(Layout.parse(layout).ranks, Layout.parse(layout).ep or 1)), layout)
    assert isinstance(plan, Plan)
    return plan


def test_a_rank_holds_its_experts_and_reduces_what_others_hold_too() -> None:
    given = example(gated=True)
    plan = planned(given, "dp=4,ep=2")
    programs = preflight(plan, prepare(*given).graph)
    for program in programs.values():
        parts = {part.name: part for part in program.parameters}
        up = parts["layers.0.up"]
        assert up.local == (EXPERTS // 2, 4 * WIDTH, WIDTH) and up.reduce == ("dp",)
        assert up.type["ep"] == Shard(0) and parts["first.weight"].type["ep"] == R
        assert parts["first.weight"].reduce == ("dp", "ep")
        assert program.groups["ep"] == (program.rank // 2 * 2, program.rank // 2 * 2 + 1)
        assert program.groups["dp"] == (program.rank % 2, program.rank % 2 + 2)


def test_prediction_and_explanation_know_of_experts() -> None:
    given = example(gated=True)
    apart, together = planned(given, "dp=2,ep=2"), planned(given, "dp=2")
    experts = sum(parameter.numel() for name, parameter in given[0].named_parameters() if name in ("layers.0.up", "layers.0.down"))
    held = [plan.predicted.by_kind[0]["parameters"] for plan in (together, apart)]
    assert held[0] - held[1] == 4 * experts // 2
    assert apart.layout == "dp=2,tp=1,ep=2,pp=1,microbatches=1,schedule=1f1b"
    text = " ".join(str(apart).split())
    assert "2 copies, each on 1/2 of the batch (dp), of which 2 divide the experts (ep)" in text
    assert "Experts (4) divided over 2 ranks" in text and "2 products with rows at their experts" in text
    assert Plan.parse(apart.model_dump_json()) == apart
    assert [each.layout for each in apart.considered if each.layout == apart.layout]


def test_expert_matrices_may_be_too_many_for_a_rank() -> None:
    """Divided they fit, which is found where nothing is said of it."""
    model = Model([Experts([0.0] * EXPERTS, wide=1 << 15)])
    state = 16 * sum(parameter.numel() for parameter in model.parameters())  # with gradients and AdamW's
    small = made_up(2, memory_gb=(RUNTIME_BYTES + 2 * 2**20 + 1.1 * state) / 0.92 / 1e9)  # a part is kept free
    pins = "dp=2,zero=0,recompute=none,microbatches=1"
    assert isinstance(sw.plan(model, batch(), small, f"{pins},ep=1"), Infeasible)
    for more in (",ep=2", ""):
        found = sw.plan(model, batch(), small, pins + more)
        assert isinstance(found, Plan) and found.ep == 2


# -- what is refused ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "layout", "ranks", "message"),
    [
        (
            gpt2,
            "ep=2",
            2,
            r"^ep=2 divides experts, but the model has none: no product in it takes tokens to one of several matrices; use ep=1",
        ),
        (example, "ep=3", 3, r"^ep=3 divides experts evenly, but layers\.0 has 4; use ep=2 or 4$"),
        (example, "dp=3,ep=2", 3, r"^ep=2 divides the experts among data ranks, of which layout dp=3,ep=2 has 3; pin dp=2 or a multiple"),
        (example, "ep=2,shares=3:1", 2, r"^shares in layout .* is not possible with ep=2: experts' ranks take equal parts; leave it out"),
        (example, "dp=4,ep=2,zero=1,shard=2", 4, r"^shard in layout .* is not possible with ep=2"),
    ],
)
def test_refused(make: Callable[..., Example], layout: str, ranks: int, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        sw.plan(*make(), made_up(ranks), layout)


def test_a_loop_over_experts_is_kept_whole_and_the_way_out_is_named() -> None:
    with pytest.raises(
        LayoutError, match=r"^ep=2 divides experts, but the model has none.*; model\.layers\.\d\.mlp\.experts is kept as one operator"
    ):
        planned(load(EXPERT_MODELS).mixtral_loop(), "ep=2")


def test_a_batch_that_is_not_divided_evenly_is_refused() -> None:
    model, _ = example()
    with pytest.raises(BatchError, match=r"^a batch of 5 cannot be split over dp=2; change the global batch or dp$"):
        sw.plan(model, batch(5), made_up(2), "dp=2,ep=2")


def test_stages_begin_where_no_rows_are_at_their_experts() -> None:
    """Also where there are so many that they begin inside modules."""
    given = example()
    plan = planned(given, "dp=2,ep=2,pp=4")
    analysed = analyse(graph := prepare(*given).graph)
    ((_, ops),) = analysed.experts.together.items()
    cut = apply_plan(plan, graph).cut
    assert len({cut.stage_of[op] for op in ops}) == 1 and len(ops) == 3


def test_an_edited_plan_cannot_split_rows_at_their_experts() -> None:
    given = example()
    plan = planned(given, "dp=2,ep=2,tp=2")
    key = next(op.key for op in prepare(*given).graph.ops if op.name == "shardwise.expert_mm")
    with pytest.raises(PlanError, match=r"s are the rows that ep takes to their experts: tp cannot split them; choose another, I or R$"):
        preflight(plan.model_copy(update={"operators": plan.operators | {key: "s"}}), prepare(*given).graph)
    halves = planned(given, "dp=2,ep=2,pp=2,microbatches=2,schedule=1f1b")
    body = [op.key for op in prepare(*given).graph.ops]
    with pytest.raises(PlanError, match=r"^stages 0 and 1 part what is done to rows at the experts that .* names; let the later one begin"):
        preflight(halves.model_copy(update={"stages": [halves.stages[0], body[body.index(key) + 1]]}), prepare(*given).graph)
    with pytest.raises(PlanError, match=r"ep=3 must divide dp=2 data ranks with equal parts of global_batch=8"):
        Plan.parse(plan.model_copy(update={"ep": 3}).model_dump_json())
