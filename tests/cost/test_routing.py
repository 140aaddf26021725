"""Routing of tokens to experts, against counting every way to choose them and against published measurements."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations
from statistics import fmean

import pytest

from shardwise.cluster.model import Cluster
from shardwise.cluster.topology import Crossing
from shardwise.cost.links import level_rate
from shardwise.cost.routing import Dispatch, Routing, expected_parts, routing_seconds, token_seconds


def choices(routing: Routing) -> list[tuple[int, ...]]:
    """Every way to choose the experts of a token, each as often as it is likely."""
    size = routing.experts // routing.groups
    found = []
    for groups in combinations(range(routing.groups), routing.limit):
        allowed = [group * size + expert for group in groups for expert in range(size)]
        found += list(combinations(allowed, routing.chosen))
    return found


@pytest.mark.parametrize(
    ("experts", "chosen", "groups", "limit"), [(12, 1, 1, 1), (12, 3, 1, 1), (12, 3, 4, 2), (16, 3, 4, 1), (12, 4, 6, 3)]
)
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_expected_parts_are_those_of_all_choices(experts: int, chosen: int, groups: int, limit: int, parts: int) -> None:
    routing = Routing(experts=experts, chosen=chosen, groups=groups, limit=limit)
    if groups % parts and parts % groups:
        pytest.skip("groups are not whole")
    exact = fmean(len({expert * parts // experts for expert in each}) for each in choices(routing))
    assert expected_parts(parts, routing) == pytest.approx(exact, rel=1e-12)


def test_many_draws_agree() -> None:
    """DeepSeek-V3 on 64 ranks of 8 nodes: 8 of 256 experts, of 4 of 8 groups."""
    routing = Routing(experts=256, chosen=8, groups=8, limit=4)
    draw, nodes, ranks = random.Random(0), [], []
    for _ in range(20_000):
        allowed = [group * 32 + expert for group in draw.sample(range(8), 4) for expert in range(32)]
        chosen = draw.sample(allowed, 8)
        nodes.append(len({expert // 32 for expert in chosen}))
        ranks.append(len({expert // 4 for expert in chosen}))
    assert expected_parts(8, routing) == pytest.approx(fmean(nodes), rel=0.01)
    assert expected_parts(64, routing) == pytest.approx(fmean(ranks), rel=0.01)
    assert expected_parts(8, routing) <= 4


def test_copies_of_experts_are_not_sent_to() -> None:
    assert expected_parts(32, Routing(experts=8, chosen=2)) == pytest.approx(2.0)


def sent(ranks: int, per_node: int, routing: Routing) -> tuple[float, float]:
    """Copies of a token that a rank sends inside its node and between nodes, drawn and forwarded one by one."""
    draw, inside, between, tokens = random.Random(1), 0, 0, 400
    held = routing.experts // ranks
    for rank in range(ranks):
        for _ in range(tokens):
            wanted = {expert // held for expert in draw.sample(range(routing.experts), routing.chosen)}
            for node in {each // per_node for each in wanted}:
                arrived = node * per_node + rank % per_node
                between += node != rank // per_node
                inside += sum(each // per_node == node and each != arrived for each in wanted)
    return inside / ranks / tokens, between / ranks / tokens


@pytest.mark.parametrize(("ranks", "per_node"), [(8, 8), (16, 8), (32, 8), (4, 1)])
def test_time_is_that_of_the_copies_on_the_slowest_level(ranks: int, per_node: int) -> None:
    routing = Routing(experts=64, chosen=6)
    machines = Cluster.parse(f"h100:{ranks // per_node}x{per_node}").machines
    assert machines is not None
    crossing = machines.span(1, ranks)
    inside, between = sent(ranks, per_node, routing)
    nbytes = 1e9
    rates = [level_rate(hop.level) for hop in crossing.hops]
    times = ([inside * nbytes / rates[0] / 0.9] if per_node > 1 else []) + ([between * nbytes / rates[-1]] if ranks > per_node else [])
    assert token_seconds(routing, 1.0, nbytes, crossing) == pytest.approx(max(times), rel=0.02)


def span(cluster: str, ranks: int) -> Crossing:
    machines = Cluster.parse(cluster).machines
    assert machines is not None
    return machines.span(1, ranks)


# 4,096 tokens of 7,168 numbers in 16 bits, 8 of 8 experts a rank: kernels' GB/s, copies to the own rank or node counted
# (deepseek-ai/DeepEP, Hybrid-EP_Implementation.md; H100 in one node: NVIDIA-NeMo/Automodel, docs/deepep_vs_hybridep_benchmark.md).
@pytest.mark.parametrize(
    ("cluster", "ranks", "nodes", "gigabytes_per_s"),
    [
        ("h100:1x8", 8, None, 364),
        ("h100:2x8", 16, 2, 72),
        ("h100:4x8", 32, 4, 57),
        ("h100:8x8", 64, 8, 50),
        ("b200:1x8", 8, None, 704),
        ("gb200:1x36", 36, None, 615),
    ],
)
def test_published_rates_are_met(cluster: str, ranks: int, nodes: int | None, gigabytes_per_s: float) -> None:
    routing, tokens, row = Routing(experts=8 * ranks, chosen=8), 4096, 14336
    counted = tokens * row * expected_parts(nodes or ranks, routing)
    measured = counted / (gigabytes_per_s * 1e9)
    assert token_seconds(routing, tokens, row, span(cluster, ranks)) == pytest.approx(measured, rel=0.2)


def test_rows_of_their_own_take_longer_between_nodes() -> None:
    """With 8 experts on 2 nodes a token goes to one other node, not to four other rows' ranks there."""
    cluster = Cluster.parse("h100:2x8")

    def seconds(dispatch: Dispatch) -> float:
        return routing_seconds(Routing(experts=128, chosen=8, dispatch=dispatch), 4096, 4096, 2, 16, cluster)

    assert 3 < seconds("rows") / seconds("tokens") < 4.5


def test_short_rows_are_slower_and_one_rank_sends_nothing() -> None:
    cluster, routing = Cluster.parse("h100:1x8"), Routing(experts=128, chosen=8)
    crossing = span("h100:1x8", 8)
    assert token_seconds(routing, 7 * 4096, 2048, crossing) > 1.2 * token_seconds(routing, 4096, 14336, crossing)
    assert routing_seconds(routing, 4096, 7168, 2, 1, cluster) == 0.0


def test_eight_bits_there_take_three_quarters_of_both_ways() -> None:
    cluster, routing = Cluster.parse("h100:4x8"), Routing(experts=256, chosen=8)
    both, narrow = (routing_seconds(replace(routing, there_bits=bits), 1e6, 7168, 2, 32, cluster) for bits in (None, 8))
    assert narrow / both == pytest.approx((1 + (1 + 4 / 128) / 2) / 2, rel=0.02)
