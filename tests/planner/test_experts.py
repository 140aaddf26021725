"""Experts divided over ranks: what a rank holds and computes, who holds the same, what is sent."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from math import prod

import pytest
import torch
from tests.clusters import made_up
from tests.models import mixtral

import shardwise as sw
from shardwise.capture.experts import expert_mm
from shardwise.capture.export import capture
from shardwise.capture.graph import Graph
from shardwise.cluster.model import Cluster
from shardwise.cost.collectives import collective_cost
from shardwise.cost.routing import Routing, routing_seconds
from shardwise.planner.compose import Scheme, compose
from shardwise.planner.pieces import Outline, PieceCost, Work
from shardwise.planner.twins import TwinLayout, experts_over, split_twin
from shardwise.program.trace import Tracer

SAMPLES, SEQUENCE, HIDDEN, LAYERS, HELD, CHOSEN = 4, 32, 64, 3, 4, 2
CLUSTER = Cluster.parse("h100:2x8")
ROUTING = Routing(experts=16, chosen=CHOSEN)


@cache
def graph() -> Graph:
    return capture(*mixtral(layers=LAYERS, hidden=HIDDEN, samples=SAMPLES, sequence=SEQUENCE, experts=HELD))


@cache
def pieces(tp: int, *, whole: bool = True) -> tuple[Outline, tuple[PieceCost, ...]]:
    tracer = Tracer(device=torch.device("cpu"))
    return split_twin(graph(), (LAYERS,), TwinLayout(tp=tp, whole_experts=whole), CLUSTER, tracer)


def weights() -> int:
    return HELD * 3 * HIDDEN * 2 * HIDDEN


@pytest.mark.parametrize("tp", [1, 2])
def test_ranks_hold_experts_whole_and_share_their_rows(tp: int) -> None:
    _, costs = pieces(tp)
    assert (costs[1].experts, costs[1].routed, costs[1].row) == (weights(), SAMPLES * SEQUENCE * CHOSEN // tp, HIDDEN)
    assert costs[1].pending_experts == (weights() if tp > 1 else 0)
    assert costs[0].experts == costs[0].routed == costs[-1].experts == 0


def test_experts_of_one_rank_may_be_split_like_any_product() -> None:
    _, costs = pieces(2, whole=False)
    assert costs[1].experts == weights() // 2 and costs[1].pending_experts == 0


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("ep", [2, 4])
def test_a_rank_with_a_share_of_the_experts_costs_what_a_model_with_so_many_does(ep: int, tp: int) -> None:
    """A graph of which all but a share of the experts were taken, against one captured with so few: the router alone differs, and on this
    cluster it takes as long, being thin."""
    layout, tracer, experts = TwinLayout(tp=tp, whole_experts=True), Tracer(device=torch.device("cpu")), 8
    many, few = (
        capture(*mixtral(layers=LAYERS, hidden=HIDDEN, samples=SAMPLES, sequence=SEQUENCE, experts=held))
        for held in (experts, experts // ep)
    )
    (_, found), (_, exact) = (split_twin(each, (LAYERS,), layout, made_up(16), tracer) for each in (experts_over(many, ep), few))
    router = HIDDEN * (experts - experts // ep)
    block, other = found[1], exact[1]
    assert block.flops - other.flops == 3 * 2 * SAMPLES * SEQUENCE // tp * router
    assert (block.experts, block.routed, block.row, block.matrices) == (other.experts, other.routed, other.row, other.matrices)
    assert router // tp <= block.parameters - other.parameters <= router, "divided over tensor ranks or not"
    for kind in ("forward", "backward_input", "backward_weight"):
        seconds, wanted = (sum((getattr(each, kind).compute_s, getattr(each, kind).communicate_s)) for each in (block, other))
        assert seconds == pytest.approx(wanted, rel=0.01), kind
    assert block.held.saved["none"] == pytest.approx(other.held.saved["none"], rel=0.05)
    assert {op.inputs[1].shape[0] for op in many.ops if op.target is expert_mm} == {experts}, "the whole graph is as it was"


def test_a_number_that_does_not_divide_the_experts_is_refused() -> None:
    with pytest.raises(sw.LayoutError, match=r"ep=3 does not divide the 4 experts of .*mlp"):
        experts_over(graph(), 3)


@pytest.mark.parametrize(("tp", "dp", "ep"), [(1, 16, 8), (2, 8, 8), (2, 8, 4), (4, 4, 16), (8, 2, 4)])
def test_who_holds_the_same_experts(tp: int, dp: int, ep: int) -> None:
    """Consecutive ranks hold one another's experts: rank r those of r mod ep."""
    scheme = Scheme(tp=tp, dp=dp, ep=ep, routing=ROUTING)
    held = Counter(rank % ep for rank in range(tp * dp))
    assert set(held.values()) == {scheme.expert_copies}
    same = [rank for rank in range(tp * dp) if rank % ep == 1]
    assert same == list(range(1, tp * dp, scheme.expert_stride))


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_zero_divides_experts_over_their_copies_alone(zero: int) -> None:
    shape, costs = pieces(1)
    scheme = Scheme(dp=16, ep=8, zero=zero, routing=ROUTING)
    held, experts = sum(cost.parameters * piece.count for piece, cost in zip(shape.pieces, costs, strict=True)), LAYERS * weights()
    assert held == sum(prod(value.shape) for value in graph().parameters.values())
    memory = compose(shape, costs, scheme, CLUSTER).stages[0].memory
    divided = (held - experts) / 16 + experts / 2
    assert memory["optimizer"] == pytest.approx(12 * (divided if zero else held), rel=1e-6)
    assert memory["parameters"] == pytest.approx(4 * (divided if zero == 3 else held), rel=1e-6)


def test_gradients_of_experts_are_summed_over_their_copies_alone() -> None:
    """Where nothing else is to be done, what reduction takes is that of both parts, each in its groups."""
    shape, costs = pieces(1)
    idle = tuple(replace(cost, forward=Work(), backward_input=Work(), backward_weight=Work()) for cost in costs)
    found = compose(shape, idle, Scheme(dp=16, ep=8, routing=ROUTING), CLUSTER).stages[0].seconds["reduce"]
    held, experts = sum(cost.parameters * piece.count for piece, cost in zip(shape.pieces, costs, strict=True)), LAYERS * weights()
    dense = collective_cost("all_reduce", 4 * (held - experts), 16, CLUSTER).seconds
    assert found[1] == pytest.approx(dense + collective_cost("all_reduce", 4 * experts, 2, CLUSTER, 8).seconds, rel=1e-3)


def communicated(routing: Routing, recompute: str = "none") -> dict[str, tuple[float, float]]:
    shape, costs = pieces(1)
    return dict(compose(shape, costs, Scheme(dp=16, ep=16, routing=routing, recompute=recompute), CLUSTER).stages[0].seconds)


def test_tokens_go_there_and_back_in_each_pass() -> None:
    each = LAYERS * routing_seconds(ROUTING, SAMPLES * SEQUENCE, HIDDEN, 4, 16, CLUSTER)
    plain, again = communicated(ROUTING), communicated(ROUTING, "full")
    assert plain["forward"][1] == pytest.approx(each) and plain["backward"][1] == pytest.approx(each)
    assert again["backward"][1] == pytest.approx(2 * each)


def test_routing_beside_other_work_is_hidden_but_takes_some_of_the_device() -> None:
    plain, beside = communicated(ROUTING), communicated(replace(ROUTING, overlapped=True))
    for kind in ("forward", "backward"):
        assert beside[kind][1] < plain[kind][1]
        assert beside[kind][0] > plain[kind][0]
        assert sum(beside[kind]) >= sum(plain[kind]) - plain[kind][1]


@pytest.mark.parametrize(
    ("ep", "routing", "message"), [(8, None, r"ep=8 without its routing"), (3, ROUTING, r"ep=3 does not divide tp·cp·dp = 16")]
)
def test_divided_experts_want_a_routing_and_a_divisor(ep: int, routing: Routing | None, message: str) -> None:
    with pytest.raises(sw.LayoutError, match=message):
        Scheme(dp=8, tp=2, ep=ep, routing=routing)
