"""What a proposal says of the runtime, against the layouts that plans of the runtime take."""

from __future__ import annotations

from dataclasses import fields

import pytest
from tests.clusters import made_up
from tests.models import llama

import shardwise as sw
from shardwise.capture.export import capture
from shardwise.cost.routing import Routing
from shardwise.planner.compose import Scheme
from shardwise.planner.lacking import lacking
from shardwise.planner.layout import Layout, completions
from shardwise.planner.preflight import preflight
from shardwise.planner.space import Space

BATCH = 8
SPACE = Space(ranks=4, near=4, blocks=8, global_batch=BATCH, most_samples=4, routing=Routing(experts=4, chosen=2))
NAMED = ("dp", "cp", "ep", "tp", "pp", "chunks", "microbatches", "schedule", "zero", "recompute")


def every_scheme() -> list[Scheme]:
    return list(dict.fromkeys(scheme for split in SPACE.splits() for scheme in SPACE.schemes(split)))


def as_layout(scheme: Scheme) -> str:
    """In the words of `--layout`; sizes and kinds that are as usual are left out."""
    usual = {each.name: each.default for each in fields(Scheme) if each.name not in ("microbatches", "schedule")}
    return ",".join(f"{name}={value}" for name in NAMED if (value := getattr(scheme, name)) != usual.get(name))


def taken(scheme: Scheme) -> bool:
    """Whether a plan of the runtime may have this layout."""
    try:
        found = completions(Layout.parse(as_layout(scheme)), SPACE.ranks, BATCH, "")
    except sw.LayoutError:
        return False
    return len(found) == 1 and len(found[0].tables) == scheme.pp


def test_what_is_lacking_is_what_layouts_of_plans_do_not_take() -> None:
    schemes = every_scheme()
    assert {scheme.zero for scheme in schemes} == {0, 1, 2, 3} and len({scheme.schedule for scheme in schemes}) == 6
    for scheme in schemes:
        if scheme.ep > 1 and scheme.tp * scheme.cp > 1:  # there ep counts tensor and context ranks, in a plan data ranks alone
            assert lacking(scheme), as_layout(scheme)
        else:
            assert taken(scheme) == (not lacking(scheme)), as_layout(scheme)
    assert any(scheme.ep > 1 and not lacking(scheme) for scheme in schemes), "some divide experts and run"


@pytest.mark.parametrize(
    "layout",
    [
        "dp=4,zero=1,recompute=selective",
        "dp=4,zero=3,recompute=full",
        "dp=4,zero=2,shard=2",
        "dp=2,cp=2,zero=3",
        "dp=2,pp=2,microbatches=4,schedule=zb-h1,zero=2",
        "pp=4,microbatches=4,schedule=gpipe,recompute=full",
        "tp=2,pp=2,microbatches=4,schedule=zb-2p",
        "dp=2,pp=2,microbatches=4,schedule=interleaved,chunks=2,zero=1",
        "pp=2,tp=2,microbatches=4,schedule=zb-v,chunks=2,recompute=selective",
    ],
)
def test_what_is_not_lacking_has_checked_programs(layout: str) -> None:
    """Of each kind of what proposals hold: all ranks' programs, proved to go together."""
    model, batch = llama(layers=4, samples=BATCH)
    plan = sw.plan(model, batch, made_up(4), layout)
    assert isinstance(plan, sw.Plan), str(plan)
    assert len(preflight(plan, capture(model, batch))) == 4
