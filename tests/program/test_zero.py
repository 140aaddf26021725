"""Parameters that data ranks divide: parts, programs, and what is refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.models import mlp
from tests.program.support import Built, build, copied_programs, only_stage
from torch import fx

from shardwise.errors import CheckError, LayoutError, PlanError
from shardwise.planner.layout import Layout, completions
from shardwise.planner.plan import Plan
from shardwise.program.check import check_programs
from shardwise.program.gather import packed, packed_sizes, unpacked
from shardwise.program.order import check_order
from shardwise.program.program import Program
from shardwise.program.reductions import reductions, regatherings
from shardwise.sharding.collectives import COLLECTIVES, group_ranks
from shardwise.sharding.division import Division, divided_dim, division_of
from shardwise.simulate.memory import memory_use


def divisions(shape: tuple[int, ...], ranks: int) -> list[Division] | None:
    found = [division_of(shape, ("dp",), range(ranks), rank) for rank in range(ranks)]
    return None if None in found else [each for each in found if each is not None]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(2, 6))
def test_parts_are_disjoint_and_together_the_whole(sizes: list[int], ranks: int) -> None:
    shape = tuple(sizes)
    whole = torch.arange(prod(shape)).reshape(shape)
    found = divisions(shape, ranks)
    assert found is not None
    parts = [division.take(whole) for division in found]
    assert [tuple(part.shape) for part in parts] == [division.shape(shape) for division in found]
    assert torch.equal(torch.cat(parts, found[0].dim), whole)
    assert found[0].lengths(shape) == [part.shape[found[0].dim] for part in parts]
    longest = max(shape)
    assert shape[found[0].dim] >= min(ranks, longest), "where all ranks can have something, they do"


@pytest.mark.parametrize(
    ("shape", "ranks", "dim"), [((7, 4), 4, 0), ((3, 8), 4, 1), ((1, 2, 3), 4, 2), ((2, 2), 4, 0), ((), 4, None), ((0, 5), 2, 1)]
)
def test_the_dim_that_is_divided(shape: tuple[int, ...], ranks: int, dim: int | None) -> None:
    assert divided_dim(shape, ranks) == dim


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=4), st.integers(2, 4))
def test_packing_is_undone(shapes: list[list[int]], ranks: int) -> None:
    wholes = [torch.randn(shape) for shape in shapes]
    every = [divisions(tuple(shape), ranks) for shape in shapes]
    mine = [found[0] for found in every if found is not None]
    flat = packed(mine, wholes)
    assert sum(packed_sizes(mine, shapes)) == flat.numel()
    for whole, again in zip(wholes, unpacked(flat, mine, shapes), strict=True):
        assert torch.equal(whole, again)


def test_groups_of_neighbours_and_their_copies() -> None:
    found = [division_of((12,), ("dp",), [0, 2, 4, 6, 8, 10], rank, shard=3) for rank in (0, 2, 4, 6, 8, 10)]
    assert [(d.rank, d.group, d.copies) for d in found if d] == [
        (0, "shard:0,2,4", "copies:0,6"),
        (1, "shard:0,2,4", "copies:2,8"),
        (2, "shard:0,2,4", "copies:4,10"),
        (0, "shard:6,8,10", "copies:0,6"),
        (1, "shard:6,8,10", "copies:2,8"),
        (2, "shard:6,8,10", "copies:4,10"),
    ]
    assert division_of((12,), ("dp",), [0, 1], 0, shard=1) is None


# -- programs ------------------------------------------------------------------------------------------------------------------------------


def built(more: str, hidden: int = 160) -> Built:
    return build(mlp(hidden=hidden), f"dp=4,tp=1,pp=1,microbatches=1,{more}")


def counted(graph: fx.Graph) -> Counter[str]:
    return Counter(COLLECTIVES[node.target] for node in graph.nodes if node.target in COLLECTIVES)  # type: ignore[index]


def test_what_each_stage_of_zero_divides() -> None:
    program = built("zero=0").programs[0]
    numbers = 4 * sum(prod(part.shape) for part in program.parameters)
    whole = memory_use(program, "adamw")
    for zero in (1, 2, 3):
        use = memory_use(built(f"zero={zero}").programs[0], "adamw")
        assert use.optimizer == pytest.approx(2 * numbers / 4, rel=0.01)
        assert use.gradients == pytest.approx(numbers / (4 if zero > 1 else 1), rel=0.01)
        assert use.parameters == pytest.approx(numbers / (4 if zero > 2 else 1), rel=0.01)
        assert use.saved == whole.saved, "what is gathered is not saved"


def test_messages() -> None:
    """Six parameters of four layers and their biases: four of them large, one weight and four biases small, in one block."""
    found = {zero: built(f"zero={zero}").programs[0] for zero in (0, 1, 2, 3)}
    graphs = {zero: (only_stage(program).forward, only_stage(program).backward) for zero, program in found.items()}
    usual = {zero: counted(graphs[zero][1])["all_reduce"] for zero in graphs}
    assert len(set(usual.values())) == 1
    assert counted(graphs[1][0]) == counted(graphs[2][0]) == counted(graphs[0][0])
    assert counted(graphs[1][1])["reduce_scatter"] == 0
    large = sum(4 * prod(part.shape) >= 2**20 for part in found[0].parameters)
    assert large == 2
    for zero in (2, 3):
        assert counted(graphs[zero][1])["reduce_scatter"] == large + 1
        assert not any(reduction.groups or reduction.scatter for reduction in reductions(found[zero]))
    assert counted(graphs[3][0])["all_gather"] == counted(graphs[3][1])["all_gather"] == large + 1
    assert counted(graphs[2][1])["all_gather"] == 0
    assert [len(reduction.parameters) for reduction in reductions(found[1])] == [1, 1, len(found[1].parameters) - 2]
    assert all(group_ranks(message.group) == [0, 1, 2, 3] for zero in (1, 2) for message in regatherings(found[zero]))
    assert len(regatherings(found[1])) == len(regatherings(found[2])) == large + 1 and not regatherings(found[3])


def spoiled(what: Built, number: int, **changes: object) -> dict[int, Program]:
    programs = copied_programs(what.programs)
    stage = only_stage(programs[number])
    part = stage.parameters[0]
    assert part.division is not None
    stage.parameters[0] = replace(part, division=replace(part.division, **changes))
    return programs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, r"the ranks of dp:0,1,2,3 divide .* as numbers \[0, 0, 2, 3\]; they must be 0 to 3"),
        ({"dim": 1}, "the ranks of dp:0,1,2,3 divide .* in unlike ways: .*rank 1 dim 1"),
        ({"group": "dp:0,1"}, "the ranks of dp:0,1,2,3 divide .* as numbers .*None"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(changes: dict[str, object], message: str) -> None:
    what = built("zero=3")
    check_programs(what.programs, what.applied.assignment, what.applied.cut, what.choose)
    with pytest.raises(CheckError, match=message):
        check_programs(spoiled(what, 1, **changes), what.applied.assignment, what.applied.cut, what.choose)


def test_ranks_meet_in_what_they_gather_after_the_update() -> None:
    what = built("zero=1", hidden=16)
    programs = copied_programs(what.programs)
    only_stage(programs[2]).parameters.pop()
    with pytest.raises(CheckError, match="two ranks meet in unlike collectives"):
        check_order(programs, what.choose)


# -- layouts and plans ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("tp=4,zero=1", "zero=1 divides over data ranks, of which layout tp=4,zero=1 has 1; pin dp=2 or more, or zero=0"),
        ("dp=4,zero=1,shard=3", "shard=3 in layout .* divides no number of data ranks that there can be"),
    ],
)
def test_layouts_that_cannot_be(layout: str, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        completions(Layout.parse(layout), 4, 8, "")


def test_a_layout_without_data_ranks_is_left_out() -> None:
    assert {(each.dp, each.zero) for each in completions(Layout.parse("zero=2,pp=1"), 4, 8, "")} == {(2, 2), (4, 2)}
    assert {each.shard for each in completions(Layout.parse("dp=4,zero=2,shard=4"), 4, 8, "")} == {None}, "all of them: no groups"


def test_plans_say_it_and_are_checked() -> None:
    plan = built("zero=3,shard=2,recompute=full", hidden=16).plan
    again = Plan.parse(plan.model_dump_json())
    assert (again.zero, again.shard, again.recompute) == (3, 2, "full")
    assert plan.layout.endswith("zero=3,shard=2,recompute=full") and Layout.parse(plan.layout).shard == 2
    text = plan.model_dump_json()
    for old, new, message in (
        ('"zero":3', '"zero":4', "zero"),
        ('"shard":2', '"shard":3', "shard=3 must divide dp · cp=4 data ranks into several groups"),
        ('"recompute":"full"', '"recompute":"some"', "recompute"),
    ):
        with pytest.raises(PlanError, match=message):
            Plan.parse(text.replace(old, new))
