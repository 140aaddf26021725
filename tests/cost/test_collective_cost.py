from __future__ import annotations

import pytest

from shardwise.cluster.model import Cluster
from shardwise.cost.collectives import collective_cost, collective_seconds


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


def test_what_was_not_measured_is_never_chosen(cluster: Cluster) -> None:
    assert collective_seconds("all_reduce", "other", 1e6, 2, cluster) == float("inf")
    with pytest.raises(AssertionError, match="no all_to_all among the rates of round"):
        collective_cost("all_to_all", 1e6, 2, cluster)
