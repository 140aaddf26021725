"""Collectives over links: the fastest protocol, never faster than the wire, never slower for less."""

from __future__ import annotations

import pytest

from shardwise.cluster.specs import machines
from shardwise.cost.links import link_seconds


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter", "all_to_all"])
@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_more_bytes_take_longer_and_the_wire_is_the_bound(kind: str, ranks: int) -> None:
    crossing = machines("h100:8x8").span(1, ranks)
    found = [link_seconds(kind, float(nbytes), crossing) for nbytes in (1e3, 1e5, 1e7, 1e9)]
    assert found == sorted(found)
    fastest = max(hop.level.bytes_per_s for hop in crossing.hops) * min(8, ranks)
    assert found[-1] >= 0.5 * 1e9 / fastest


def test_long_messages_use_the_whole_rate_and_short_ones_wait_least() -> None:
    crossing = machines("h100:192x8").span(1, 1536)
    short, long = link_seconds("all_gather", 1e3, crossing), link_seconds("all_gather", 4e9, crossing)
    latency = sum(hop.parts * hop.level.latency_s for hop in crossing.hops)
    assert short >= latency
    half = link_seconds("all_gather", 8e9, crossing) - long
    assert half == pytest.approx(4e9 / (8 * crossing.hops[-1].level.bytes_per_s * 0.88), rel=0.1), "the slope is the network's rate"
