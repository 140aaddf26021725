"""Copies of a pipeline that do not do alike: only equal ones are folded, and those that reduce gradients wait for each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.errors import LayoutError
from shardwise.program.actions import Kind
from shardwise.simulate.profile import EdgeProfile, Profile, StageProfile
from shardwise.simulate.simulator import Column, Mesh, simulate_columns, simulate_profile

REDUCE_S, UPDATE_S = 0.25, 0.125


def copy(works: Sequence[float], transfer_s: float = 0.0, saved: int = 3) -> Profile:
    """Stages whose forwards take so long, and their backwards twice that."""
    stages = [
        StageProfile(
            seconds={"forward": (work, 0.0), "backward": (2 * work, 0.0), "reduce": (0.0, REDUCE_S), "update": (UPDATE_S, 0.0)},
            memory={"parameters": 10, "saved": 0},
            saved_bytes=saved,
            reduces=["dp"],
        )
        for work in works
    ]
    edges = [
        EdgeProfile(name=f"h→{stage}", source=stage - 1, target=stage, nbytes=1, transfer_s=transfer_s, requires_grad=True)
        for stage in range(1, len(works))
    ]
    return Profile(stages=stages, edges=edges, cores=None)


def mesh(dp: int, pp: int, tp: int = 1) -> Mesh:
    return Mesh(dp=dp, tp=tp, pp=pp, microbatches=1, schedule="1f1b")


def test_single_stage_copies_wait_for_the_slowest() -> None:
    """Three samples at 1 s and one at 2.5 s, three times that with the backward pass: the slower copy is done first and waits."""
    columns = [Column(profile=copy([1.0]), copies=2, microbatches=3), Column(profile=copy([2.5]), copies=1, microbatches=1)]
    step = simulate_columns(columns, mesh(3, 1))
    assert step.step_time_s == pytest.approx(9.0 + REDUCE_S + UPDATE_S)
    reductions = {span.rank: (span.start_s, span.end_s) for span in step.timeline if span.action.kind is Kind.REDUCE}
    assert reductions == {0: pytest.approx((9.0, 9.25)), 2: pytest.approx((7.5, 9.25))}, "of each sort the first copy is drawn"
    busy = 2 * (9 + REDUCE_S + UPDATE_S) + 7.5 + REDUCE_S + UPDATE_S
    assert step.bubble == pytest.approx(1 - busy / (3 * step.step_time_s))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.floats(0.1, 3.0), st.integers(1, 3), st.integers(1, 6)), min_size=1, max_size=3),
    st.floats(0.0, 0.5),
)
def test_folded_copies_do_as_the_copies_one_by_one(pp: int, sorts: list[tuple[float, int, int]], transfer_s: float) -> None:
    columns = [
        Column(profile=copy([speed * (stage + 1) for stage in range(pp)], transfer_s * speed), copies=copies, microbatches=count)
        for speed, copies, count in sorts
    ]
    each = [replace(column, copies=1) for column in columns for _ in range(column.copies)]
    folded, whole = (simulate_columns(found, mesh(len(each), pp, tp=2)) for found in (columns, each))
    assert folded.step_time_s == pytest.approx(whole.step_time_s)
    assert folded.bubble == pytest.approx(whole.bubble)
    assert folded.memory == whole.memory and len(folded.memory) == 2 * pp * len(each)


@pytest.mark.parametrize("microbatches", [1, 4])
def test_equal_copies_do_as_one(microbatches: int) -> None:
    profile = copy([1.0, 2.0, 0.5], 0.1)
    one = simulate_profile(profile, replace(mesh(4, 3), microbatches=microbatches))
    columns = [Column(profile=profile, copies=1, microbatches=microbatches), Column(profile=profile, copies=3, microbatches=microbatches)]
    several = simulate_columns(columns, mesh(4, 3))
    assert several.step_time_s == pytest.approx(one.step_time_s)
    assert several.memory == one.memory
    assert several.bubble == pytest.approx(one.bubble)


def test_messages_go_to_the_own_copy() -> None:
    columns = [Column(profile=copy([1.0, 1.0]), copies=2, microbatches=2), Column(profile=copy([3.0, 3.0]), copies=1, microbatches=1)]
    step = simulate_columns(columns, mesh(3, 2))
    peers = {(span.rank, span.action.peer) for span in step.timeline if span.action.kind is Kind.SEND}
    assert peers == {(0, 3), (2, 5)}


def test_copies_make_the_mesh() -> None:
    with pytest.raises(LayoutError, match="2 copies on devices of their own make no dp=3"):
        simulate_columns([Column(profile=copy([1.0]), copies=2, microbatches=1)], mesh(3, 1))
