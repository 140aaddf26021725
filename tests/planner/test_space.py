"""Layouts of many devices: every one that there is, and what pins leave of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

import shardwise as sw
from shardwise.cost.routing import Routing
from shardwise.planner.space import Pins, Space, Split, layout_text
from shardwise.program.tables import rank_tables

SPACE = Space(ranks=16, near=8, blocks=12, global_batch=32, most_samples=4)


def test_every_division_is_there_once() -> None:
    """Against trying every size."""
    found = [(s.tp, s.cp, s.samples, dp, pp) for s in SPACE.splits() for dp, pp in SPACE.meshes(s)]
    assert len(found) == len(set(found))
    tried = product((1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 4), range(1, 17), range(1, 13))
    wanted = {(t, c, k, d, p) for t, c, k, d, p in tried if t * c * d * p == 16 and 32 % (d * k) == 0}
    assert set(found) == wanted


def test_schemes_are_ones_that_their_schedule_takes() -> None:
    seen = set()
    for scheme in SPACE.schemes(Split(tp=2)):
        assert scheme.dp * scheme.tp * scheme.pp == 16 and scheme.dp * scheme.microbatches == 32
        assert scheme.stages <= SPACE.blocks
        rank_tables(scheme.schedule, scheme.pp, scheme.chunks, scheme.microbatches)
        assert scheme not in seen
        seen.add(scheme)
    assert {each.schedule for each in seen} == {"1f1b", "gpipe", "interleaved", "zb-h1", "zb-2p", "zb-v"}
    assert {each.zero for each in seen} == {0, 1, 2, 3}
    assert {each.recompute for each in seen} == {"none", "selective", "full"}


def test_pins_hold() -> None:
    space = replace(SPACE, pins=Pins.parse("tp=4,pp=2,zero=1,recompute=full,microbatch=2"))
    schemes = [(split, each) for split in space.splits() for each in space.schemes(split)]
    assert schemes
    for split, each in schemes:
        assert (split.tp, split.samples, each.pp, each.zero, each.recompute) == (4, 2, 2, 1, "full")


def test_experts_are_divided_among_data_ranks() -> None:
    space = replace(SPACE, routing=Routing(experts=8, chosen=2))
    assert {split.ep for split in space.splits()} == {1, 2, 4, 8}
    for split in space.splits():
        assert all(split.tp * split.cp * dp % split.ep == 0 for dp, _ in space.meshes(split))


def test_attention_is_shared_in_each_way_that_is_possible() -> None:
    space = replace(SPACE, shares=lambda attention, cp, tp: attention != "ulysses" or cp * tp <= 4)
    ways = {(split.cp, split.tp, split.attention) for split in space.splits()}
    assert {way for cp, tp, way in ways if (cp, tp) == (2, 2)} == {"gather", "ring", "ulysses"}
    assert {way for cp, tp, way in ways if (cp, tp) == (4, 2)} == {"gather", "ring"}
    assert {way for cp, _, way in ways if cp == 1} == {"gather"}
    pinned = replace(space, pins=Pins.parse("attention=ring"))
    assert {(split.cp > 1, split.attention) for split in pinned.splits()} == {(True, "ring")}
    scheme = next(scheme for split in pinned.splits() for scheme in pinned.schemes(split))
    assert scheme.attention == "ring" and "attention=ring" in layout_text(scheme, 1)
    assert Split.of(scheme, 2).attention == "ring"


@pytest.mark.parametrize(
    ("pins", "names", "why"),
    [
        ("tp=8,pp=4,recompute=full", "tp=8 and pp=4 contradict", "they take 32 devices, the cluster has 16"),
        ("tp=4,pp=3,zero=1", "pp=3 cannot be", "3 does not divide the cluster's 16 devices"),
        ("dp=16,microbatches=4,tp=1", "dp=16 and microbatches=4 contradict", "dp=16 × microbatches=4 must divide a batch of 32"),
        ("schedule=interleaved,chunks=1,pp=4", "chunks=1 and schedule=interleaved contradict", "interleaved two or more"),
        ("schedule=zb-h1,pp=1", "pp=1 and schedule=zb-h1 contradict", "need pp of 2 or more"),
        ("pp=4,chunks=4", "pp=4 and chunks=4 contradict", "12 blocks"),
        ("tp=8,pp=2,zero=2", "tp=8 and pp=2 and zero=2 contradict", "there is only one"),
        ("ep=4", "ep=4 cannot be", "this model has none"),
        ("attention=ring", "attention=ring cannot be", "says how the ranks of cp share it"),
        ("attention=gather,cp=1", "cp=1 and attention=gather contradict", "says how the ranks of cp share it"),
        ("microbatch=3", "microbatch=3 cannot be", "32 samples"),
        ("dp=1,cp=1,tp=2,pp=2", "dp=1 and cp=1 and tp=2 and pp=2 contradict", "they take 4 devices, the cluster has 16"),
    ],
)
def test_contradictory_pins_are_named(pins: str, names: str, why: str) -> None:
    """The fewest that exclude each other, and no others."""
    with pytest.raises(sw.LayoutError) as error:
        replace(SPACE, pins=Pins.parse(pins)).check()
    assert str(error.value).startswith(names), str(error.value)
    assert why in str(error.value)


def test_what_does_not_run_contradicts_runnable() -> None:
    with pytest.raises(sw.LayoutError, match=r"tp=2 and ep=4 and --runnable contradict each other: the runtime lacks experts divided"):
        replace(SPACE, routing=Routing(experts=8, chosen=2), pins=Pins.parse("tp=2,ep=4,pp=2"), runnable=True).check()
    replace(SPACE, routing=Routing(experts=8, chosen=2), pins=Pins.parse("ep=4,pp=2"), runnable=True).check()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp", "'tp' in layout 'tp' is no NAME=VALUE pair"),
        ("tp=2,tp=4", "tp is named twice"),
        ("tp=0", "tp=0 in the layout is not a whole number of 1 or more"),
        ("zero=4", "zero=4 in the layout is not 0, 1, 2 or 3"),
        ("schedule=fast", "schedule=fast in the layout is unknown; there are gpipe, 1f1b"),
        ("recompute=some", "recompute=some in the layout is unknown; there are none, selective, full"),
        ("width=3", "'width' in the layout is unknown; there are dp, cp, tp"),
    ],
)
def test_pins_that_are_not_understood(text: str, message: str) -> None:
    with pytest.raises(sw.LayoutError, match=message):
        Pins.parse(text)


def test_a_batch_that_nothing_divides() -> None:
    with pytest.raises(sw.LayoutError, match="no layout is left: no mesh of 16 devices divides a batch of 1 samples"):
        replace(SPACE, global_batch=1, blocks=1, near=1, sequences=False).check()
