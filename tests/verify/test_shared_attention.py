"""Attention that the ranks of a context axis do together: the same numbers as one device, whichever way they do it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.clusters import made_up
from tests.models import Example, bert, gpt2, llama
from tests.program.support import only_stage
from tests.verify.test_context_parallel import Model, collectives, planned, programs_of, verified
from torch import Tensor, fx, nn
from torch.nn import functional as F

import shardwise as sw
from shardwise.cost.compute import op_flops
from shardwise.errors import LayoutError, PlanError
from shardwise.planner.plan import Plan
from shardwise.simulate.traffic import graph_traffic

WAYS = ("gather", "ring", "ulysses")


def attending(heads: int = 4, key_heads: int | None = None, tokens: int = 12, *, causal: bool = True, window: int = 0) -> Example:
    """One layer of attention, of grouped queries where there are fewer key heads, over a window of the last tokens where one is given."""
    keys, size = key_heads or heads, 4
    width = heads * size

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(2, (-1, size)).transpose(1, 2) for part in (model.q, model.k, model.v))
        place = torch.arange(x.shape[1])
        near = (place[:, None] >= place) & (place[:, None] - place < window) if window else None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=near, is_causal=causal and not window, enable_gqa=keys != heads)
        return F.mse_loss(model.out(out.transpose(1, 2).flatten(2)) + x, y)

    torch.manual_seed(0)
    parts = {name: nn.Linear(width, each * size) for name, each in (("q", heads), ("k", keys), ("v", keys), ("out", heads))}
    return Model(loss, **parts), {"x": torch.randn(4, tokens, width), "y": torch.randn(4, tokens, width)}


# -- whole models ------------------------------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[Callable[[], Example], str]] = {
    "gpt2": (lambda: gpt2(layers=2), "cp=2"),
    "gpt2, 31 tokens on 4": (lambda: gpt2(layers=1, sequence=31), "cp=4"),
    "gpt2 with tp and microbatches": (lambda: gpt2(layers=1), "cp=2,tp=2,microbatches=2"),
    "gpt2, dropout, with dp": (lambda: gpt2(layers=1, dropout=0.1), "dp=2,cp=2,microbatches=2"),
    "llama, 29 tokens, with tp and pp": (lambda: llama(layers=2, sequence=29), "cp=2,tp=2,pp=2,microbatches=2"),
    "bert with tp": (lambda: bert(layers=1, sequence=27), "cp=2,tp=2"),
    "causal, 3 heads on 2": (lambda: attending(3), "cp=2"),
    "causal, 6 heads on 2 × 2": (lambda: attending(6, tokens=11), "cp=2,tp=2"),
    "causal on 3, zero, computed again": (attending, "dp=2,cp=3,zero=3,recompute=full"),
    "both ways": (lambda: attending(causal=False, tokens=13), "cp=4"),
    "a window": (lambda: attending(window=3, tokens=14), "cp=2,tp=2"),
    "grouped": (lambda: attending(8, 4), "cp=2,tp=2"),
    "grouped, a key head on 2": (lambda: attending(8, 2), "cp=2,tp=2"),
    "grouped, a key head for all": (lambda: attending(4, 1, tokens=10), "cp=3"),
}


@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers_as_one_device(case: str, way: str) -> None:
    make, layout = CASES[case]
    report = verified(make(), f"{layout},attention={way}")
    assert f"attention={way}" in report.layout and report.plan.attention == way


# -- in a ring ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_keys_and_values_go_round(causal: bool) -> None:
    """Two blocks of keys and values are sent forward, the same again backward, and three times what the gradients of a block are."""
    programs = programs_of(attending(tokens=24, causal=causal), "cp=3,attention=ring,microbatches=1")
    block = 4 * 4 * (24 // 3) * 2 * 4 * 4  # samples, heads, tokens, key and value, features, bytes
    for program in programs.values():
        stage = only_stage(program)
        assert collectives(stage.forward) == {"shift": 2} and collectives(stage.backward) == {"shift": 5}
        assert {each.nbytes for graph in (stage.forward, stage.backward) for each in graph_traffic(graph, {})} == {block}


def test_of_what_goes_round_two_blocks_are_held() -> None:
    """Whatever the number of ranks; where keys and values are gathered all of them are, from the forward pass to the backward one."""
    sizes = {}
    for way in WAYS[:2]:
        for ranks in (3, 6):
            example = attending(tokens=32 * ranks, causal=False)
            use = planned(example, f"cp={ranks},microbatches=1,attention={way}").predicted.by_kind[0]
            sizes[way, ranks] = use["saved"] + use["transient"]
    assert sizes["ring", 6] <= sizes["ring", 3]
    assert sizes["gather", 6] > 1.4 * sizes["gather", 3]


def test_under_a_causal_mask_all_ranks_have_as_much_to_do() -> None:
    """By the products that they do; where keys and values are gathered the last rank has most."""

    def flops(way: str) -> list[float]:
        programs = programs_of(attending(tokens=64), f"cp=4,attention={way},microbatches=1")
        graphs = [(only_stage(program).forward, only_stage(program).backward) for program in programs.values()]
        return [sum(map(products, each)) for each in graphs]

    def products(graph: Any) -> float:
        total = 0.0
        for node in graph.nodes:
            if node.op == "call_function" and "attention" in str(node.target):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
                causal = args[7:8] if "backward" in str(node.target) else args[4:5]
                total += op_flops(node.target, args, kwargs, node.meta.get("val")) / (2 if any(causal) else 1)
        return total

    ring = flops("ring")
    assert min(ring) > 0 and max(ring) < 1.01 * min(ring)


def test_what_cannot_go_round_is_gathered() -> None:
    """And the plan says why."""

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (2, -1)).transpose(1, 2) for part in model.qkv(x).chunk(3, 2))
        near = model.near[torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1]) + x.shape[1]].movedim(-1, 0)
        out = F.scaled_dot_product_attention(q, k, v, near)
        out = F.scaled_dot_product_attention(out, k, v, is_causal=True)
        return F.mse_loss(out.transpose(1, 2).flatten(2), y)

    torch.manual_seed(0)
    model = Model(loss, qkv=nn.Linear(8, 24))
    model.near = nn.Parameter(torch.randn(24, 2))
    example = model, {"x": torch.randn(4, 12, 8), "y": torch.randn(4, 12, 8)}
    report = verified(example, "cp=2,attention=ring")
    text = " ".join(str(report.plan).split())
    assert "attention (ring): keys and values go round, 1 ×" in text
    assert "attention: keys and values are gathered, 1 ×: its mask has a gradient" in text


# -- by heads ----------------------------------------------------------------------------------------------------------------------------


def test_heads_are_divided_between_all_to_alls() -> None:
    """Of a layer three before attention and one behind it, and in the backward pass the other way; none of them goes along tp."""
    for layout, sums in (("cp=2", {}), ("cp=2,tp=2", {"all_reduce": 2})):
        for program in programs_of(gpt2(layers=1), f"{layout},attention=ulysses,microbatches=2").values():
            forward, backward = (collectives(graph) for graph in (only_stage(program).forward, only_stage(program).backward))
            assert forward["all_to_all"] == backward["all_to_all"] == 4
            assert forward["all_gather"] == backward["reduce_scatter"] == 0 or sums
            moved = [node for node in only_stage(program).forward.nodes if "all_to_all" in str(node.target)]
            assert all(str(node.args[1]).startswith("cp:") for node in moved)


def test_too_few_heads_are_refused() -> None:
    message = (
        r"attention=ulysses in layout .*: no attention can be so: it has 2 heads, of which 4 ranks cannot have some each; use attention="
    )
    with pytest.raises(LayoutError, match=message):
        sw.plan(*attending(2), made_up(4), "cp=4,attention=ulysses")
    message = "it has 2 key heads with 2 query heads each, of which 3 ranks cannot"
    with pytest.raises(LayoutError, match=message):
        sw.plan(*attending(4, 2), made_up(3), "cp=3,attention=ulysses")
    plan = sw.plan(*attending(2), made_up(4), "cp=4")
    assert isinstance(plan, Plan) and plan.attention != "ulysses"


# -- what may be said --------------------------------------------------------------------------------------------------------------------


def test_all_ways_are_tried_and_the_fastest_is_taken() -> None:
    plan = planned(gpt2(layers=1), "cp=2,microbatches=1,zero=0")
    tried = {each.layout.split("attention=")[1].split(",")[0]: each for each in plan.considered}
    assert set(tried) == set(WAYS)
    assert tried[plan.attention].estimate_s == min(each.estimate_s or 0.0 for each in tried.values())
    pinned = planned(gpt2(layers=1), "cp=2,microbatches=1,attention=gather,zero=0")
    assert pinned.attention == "gather" and len(pinned.considered) == 1


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("attention=ulysses,tp=2", r"^attention=ulysses in the layout says how the ranks of cp share it: name cp=2 or more, too$"),
        ("cp=2,attention=flash", r"^attention=flash in the layout is unknown; there are gather, ring, ulysses"),
    ],
)
def test_what_is_not_understood_is_refused(layout: str, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        sw.plan(*gpt2(layers=1), made_up(2), layout)


def test_a_plan_says_how_attention_is_shared() -> None:
    text = " ".join(str(planned(gpt2(layers=2), "cp=2,attention=ulysses")).split())
    assert "attention (ulysses): heads are divided, between all-to-alls, 2 ×" in text
    alone = planned(gpt2(layers=1), "dp=2").model_copy(update={"attention": "ulysses"}).model_dump_json()
    with pytest.raises(PlanError, match="attention=ulysses says how the ranks of cp share it, and cp is 1; use attention=gather"):
        Plan.parse(alone)
