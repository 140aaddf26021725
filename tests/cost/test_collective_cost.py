from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.clusters import made_up

from shardwise.cluster.model import Cluster
from shardwise.cluster.rates import IMPLEMENTATIONS, CollectiveRate
from shardwise.cost.collectives import Shares, collective_cost, collective_seconds, collective_shares, step_of
from shardwise.planner.choices import measured_choices
from shardwise.planner.plan import Chooser
from shardwise.simulate.costs import graph_seconds


def test_the_fastest_implementation_depends_on_the_message(cluster: Cluster) -> None:
    small, large = collective_cost("all_reduce", 1e3, 2, cluster), collective_cost("all_reduce", 1e6, 2, cluster)
    assert (small.impl, large.impl) == ("native", "exchange")
    assert small.seconds == pytest.approx(1e-4 + 1.9e-6)
    assert large.seconds == pytest.approx(1e-3)


def test_a_group_of_one_communicates_nothing(cluster: Cluster) -> None:
    assert collective_cost("all_reduce", 1e9, 1, cluster).seconds == 0.0
    assert collective_seconds("all_reduce", "native", 1e9, 1, cluster) == 0.0


def test_groups_that_were_not_measured_are_scaled(cluster: Cluster) -> None:
    """From 4 ranks (nearer to 8 than 2 is): 7/3 of the latency, (7/8)/(3/4) of the rest."""
    found = collective_seconds("all_reduce", "native", 1e6, 8, cluster)
    assert found == pytest.approx(3e-4 * 7 / 3 + (6e-3 - 3e-4) * (7 / 8) / (3 / 4))
    assert collective_seconds("all_reduce", "native", 1e6, 3, cluster) < collective_seconds("all_reduce", "native", 1e6, 4, cluster)
    assert collective_seconds("broadcast", "native", 1e6, 4, cluster) == pytest.approx(3e-4 + 9e-4)
    assert collective_seconds("send_recv", "native", 1e6, 8, cluster) == 1e-3


def test_a_shift_costs_what_was_measured_whatever_the_group(cluster: Cluster) -> None:
    rate = CollectiveRate(kind="shift", impl="native", ranks=2, message_bytes=(0, 1e6), seconds=(1e-3, 5e-3), busy_s=(2e-4, 1e-3))
    measured = replace(cluster, cores=2, rates=cluster.rates.model_copy(update={"collectives": (*cluster.rates.collectives, rate)}))
    assert collective_cost("shift", 1e6, 4, measured).seconds == collective_seconds("shift", "native", 1e6, 2, measured) == 5e-3
    assert collective_shares("shift", "native", 5e5, 4, measured).compute_s == pytest.approx(6e-4)


def test_what_was_not_measured_is_never_chosen(cluster: Cluster) -> None:
    assert collective_seconds("all_reduce", "other", 1e6, 2, cluster) == float("inf")
    with pytest.raises(AssertionError, match="no all_to_all among the rates of round"):
        collective_cost("all_to_all", 1e6, 2, cluster)


def busy(cluster: Cluster, *, cores: int | None, busy_s: tuple[float, ...]) -> Cluster:
    """Four ranks whose all-reduces keep cores busy for so long."""
    rate = CollectiveRate(kind="all_reduce", impl="native", ranks=4, message_bytes=(0, 1e6), seconds=(3e-4, 6e-3), busy_s=busy_s)
    return replace(cluster, cores=cores, rates=cluster.rates.model_copy(update={"collectives": (rate,)}))


def test_on_shared_cores_a_collective_takes_a_core(cluster: Cluster) -> None:
    """Four ranks, each 2 ms of a core, keep two cores busy for 4 of the 6 ms that it takes all of them together."""
    found = collective_shares("all_reduce", "native", 1e6, 4, busy(cluster, cores=2, busy_s=(1e-4, 2e-3)))
    assert (found.compute_s, found.communicate_s) == pytest.approx((2e-3, 6e-3 - 4e-3))
    alone = collective_shares("all_reduce", "native", 1e6, 4, busy(cluster, cores=8, busy_s=(1e-4, 2e-3)))
    assert (alone.compute_s, alone.communicate_s) == pytest.approx((2e-3, 4e-3))


def test_it_waits_for_nothing_where_cores_are_what_limits_it(cluster: Cluster) -> None:
    found = collective_shares("all_reduce", "native", 1e6, 4, busy(cluster, cores=2, busy_s=(1e-4, 5e-3)))
    assert (found.compute_s, found.communicate_s) == pytest.approx((5e-3, 0.0))
    capped = collective_shares("all_reduce", "native", 1e6, 4, busy(cluster, cores=2, busy_s=(1e-4, 9e-3)))
    assert capped.compute_s == pytest.approx(6e-3), "several threads of a rank may each take a core; it is not longer than the whole"


@pytest.mark.parametrize(("cores", "busy_s"), [(None, (1e-4, 2e-3)), (2, ())])
def test_elsewhere_it_only_waits(cluster: Cluster, cores: int | None, busy_s: tuple[float, ...]) -> None:
    found = collective_shares("all_reduce", "native", 1e6, 4, busy(cluster, cores=cores, busy_s=busy_s))
    assert found == Shares(compute_s=0.0, communicate_s=6e-3)
    assert collective_shares("all_reduce", "native", 1e6, 1, cluster) == Shares(compute_s=0.0, communicate_s=0.0)


def test_other_groups_are_busy_in_proportion(cluster: Cluster) -> None:
    shared = busy(cluster, cores=2, busy_s=(1e-4, 2e-3))
    found = collective_shares("all_reduce", "native", 1e6, 8, shared)
    assert found.compute_s == pytest.approx(1e-4 * 7 / 3 + (2e-3 - 1e-4) * (7 / 8) / (3 / 4))


def test_a_graph_computes_while_it_communicates(cluster: Cluster) -> None:
    graph = torch.fx.Graph()
    source = graph.placeholder("x")
    source.meta["val"] = torch.empty(250_000, device="meta")
    summed = graph.call_function(torch.ops.shardwise.all_reduce.default, (source, "tp:0,1,2,3", "sum", "native"))
    summed.meta["val"] = source.meta["val"]
    graph.output([summed])
    shared = graph_seconds(graph, busy(cluster, cores=2, busy_s=(1e-4, 2e-3)))
    assert (shared.compute_s, shared.communicate_s) == pytest.approx((2e-3, 2e-3))
    apart = graph_seconds(graph, busy(cluster, cores=None, busy_s=(1e-4, 2e-3)))
    assert (apart.compute_s, apart.communicate_s) == pytest.approx((0.0, 6e-3))


@given(st.sampled_from(["all_reduce", "all_gather", "reduce_scatter"]), st.floats(1, 2**40), st.integers(2, 5), st.randoms())
def test_what_is_costed_is_what_a_plan_runs(kind: str, message: float, ranks: int, random: Random) -> None:
    """For random measurements: the implementation of the plan's table, and its own seconds."""
    sizes = (2.0**10, 2.0**15, 2.0**21, 2.0**24)
    rates = tuple(
        CollectiveRate(
            kind=each, impl=impl, ranks=size, message_bytes=sizes, seconds=tuple(sorted(random.uniform(1e-5, 1e-1) for _ in sizes))
        )
        for each in IMPLEMENTATIONS
        for impl in IMPLEMENTATIONS[each]
        for size in (2, 4)
    )
    measured = made_up(4)
    measured = replace(measured, rates=measured.rates.model_copy(update={"collectives": rates}))
    found = collective_cost(kind, message, ranks, measured)
    assert found.impl == Chooser.of(measured_choices(measured, {ranks}))(kind, int(message), ranks)
    assert found.seconds == collective_seconds(kind, found.impl, message, ranks, measured)
    top = 2.0 ** step_of(message)
    assert collective_seconds(kind, found.impl, top, ranks, measured) == min(
        collective_seconds(kind, impl, top, ranks, measured) for impl in IMPLEMENTATIONS[kind]
    )
