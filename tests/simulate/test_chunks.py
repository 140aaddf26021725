"""Simulated schedules: their bubbles against the papers' formulas, what ranks with several stages hold, and how long simulating takes."""

from __future__ import annotations

import re
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.errors import LayoutError
from shardwise.program.actions import Kind
from shardwise.program.tables import NAMES, Slot, in_flight, placement, rank_tables, read_tables, splits_backward
from shardwise.simulate.profile import EdgeProfile, Profile, StageProfile
from shardwise.simulate.simulator import Mesh, Simulation, simulate_profile

F, B, W = 1.0, 1.5, 1.0  # seconds of a rank's forward, inputs' part and weights' part of one microbatch


def stage(forward: float = F, backward: float = B, weight: float | None = W, saved: int = 0, kept: int = 0, **kinds: float) -> StageProfile:
    seconds = {"forward": (forward, 0.0), "backward": (backward, 0.0)} | {kind: (each, 0.0) for kind, each in kinds.items()}
    return StageProfile(
        seconds=seconds | ({} if weight is None else {"weight": (weight, 0.0)}),
        memory={"parameters": 7, "saved": 1000, "transient": 20, "runtime": 5},
        saved_bytes=saved,
        kept_bytes=kept,
    )


def chain(stages: list[StageProfile], transfer_s: float = 0.0, cores: int | None = None) -> Profile:
    edges = [
        EdgeProfile(name=f"h→{target}", source=target - 1, target=target, nbytes=8, transfer_s=transfer_s, requires_grad=True)
        for target in range(1, len(stages))
    ]
    return Profile(stages=stages, edges=edges, cores=cores)


def simulated(profile: Profile, ranks: int, microbatches: int, schedule: str, dp: int = 1) -> Simulation:
    chunks = len(profile.stages) // ranks
    return simulate_profile(profile, Mesh(dp=dp, tp=1, pp=ranks, microbatches=microbatches, schedule=schedule, chunks=chunks))


def equal(
    ranks: int, chunks: int, transfer_s: float = 0.0, times: tuple[float, float, float] = (F, B, W), cores: int | None = None
) -> Profile:
    """A model that takes a rank the same time however many stages it is cut into."""
    forward, backward, weight = (each / chunks for each in times)
    return chain([stage(forward, backward, weight)] * (ranks * chunks), transfer_s, cores)


# -- bubbles -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (4, 24), (5, 15)])
@pytest.mark.parametrize(
    ("schedule", "chunks", "bubble"),
    [
        ("gpipe", 1, F + B + W),  # Huang et al. 2019, section 2.3
        ("1f1b", 1, F + B + W),  # Narayanan et al. 2021, section 2.2.1
        ("interleaved", 2, (F + B + W) / 2),  # the same, section 2.2.2
        ("interleaved", 4, (F + B + W) / 4),
        ("zb-h1", 1, F + B - W),  # Qi et al. 2023, table 2
    ],
)
def test_a_step_takes_the_time_of_the_formula(schedule: str, chunks: int, bubble: float, ranks: int, microbatches: int) -> None:
    """m (F + B + W), and so many seconds for each rank beside the first."""
    step = simulated(equal(ranks, chunks), ranks, microbatches, schedule)
    assert step.step_time_s == pytest.approx(microbatches * (F + B + W) + (ranks - 1) * bubble)
    assert step.period_s == pytest.approx(step.step_time_s)
    assert step.bubble == pytest.approx(1 - microbatches * (F + B + W) / step.step_time_s)


@pytest.mark.parametrize("schedule", NAMES)
def test_sends_that_block_cost_nothing_where_messages_take_no_time(schedule: str) -> None:
    """Ranks of one machine receive in an order that serves sends which block, too: what is made first is received first."""
    chunks = 2 if schedule in ("interleaved", "zb-v") else 1
    one, other = (simulated(equal(4, chunks, times=(1, 1, 1), cores=cores), 4, 12, schedule) for cores in (None, 4))
    assert one.step_time_s == pytest.approx(other.step_time_s)


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (4, 24), (5, 15)])
def test_zb_2p(ranks: int, microbatches: int) -> None:
    """From step to step (p − 1)(F + B − 2W) are lost (Qi et al. 2023, table 2): with equal times nothing. A step alone waits for its first
    forwards besides."""
    assert simulated(equal(ranks, 1), ranks, microbatches, "zb-2p").period_s == pytest.approx(
        microbatches * (F + B + W) + (ranks - 1) * (F + B - 2 * W)
    )
    step = simulated(equal(ranks, 1, times=(1, 1, 1)), ranks, microbatches, "zb-2p")
    assert step.period_s == pytest.approx(3 * microbatches)
    assert step.step_time_s == pytest.approx(3 * microbatches + ranks - 1)


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (4, 24), (5, 15)])
def test_zb_v(ranks: int, microbatches: int) -> None:
    """With equal times nothing is lost from step to step (Qi et al. 2023, section 6)."""
    step = simulated(equal(ranks, 2, times=(1, 1, 1)), ranks, microbatches, "zb-v")
    assert step.period_s == pytest.approx(3 * microbatches)
    assert step.step_time_s == pytest.approx(3 * microbatches + (ranks - 1) / 2)


def test_the_schedules_in_order() -> None:
    """Seconds lost from step to step on 4 ranks with 12 microbatches."""
    lost = {
        name: simulated(equal(4, 2 if name in ("interleaved", "zb-v") else 1, times=(1, 1, 1)), 4, 12, name).period_s - 36 for name in NAMES
    }
    assert lost == pytest.approx({"gpipe": 9, "1f1b": 9, "interleaved": 4.5, "zb-h1": 3, "zb-2p": 0, "zb-v": 0})


@pytest.mark.parametrize("microbatches", [1, 2, 3, 5, 6, 7, 9])
def test_where_the_ranks_do_not_divide_the_microbatches(microbatches: int) -> None:
    """The rounds are filled up: more is lost than the formula says, but never more than 1f1b loses, and a last forward per chunk."""
    step = simulated(equal(4, 2, times=(1, 1, 1)), 4, microbatches, "interleaved")
    lost = step.step_time_s - 3 * microbatches
    assert lost >= 4.5 - 1e-9
    assert step.step_time_s <= simulated(equal(4, 1, times=(1, 1, 1)), 4, microbatches, "1f1b").step_time_s + 1e-9


# -- ranks with several stages -------------------------------------------------------------------------------------------------------------


def test_stages_of_one_rank_send_each_other_nothing() -> None:
    """In a V the last rank's two stages follow each other: two messages on, two back, each of half a second. Two weights' parts are waited
    for: the last rank's second stage has its own before its first stage's backward, and the first rank ends with one."""
    step = simulated(equal(2, 2, transfer_s=0.5), 2, 1, "zb-v")
    assert [span.action.edge for span in step.timeline if span.action.sends] == ["h→1", "h→3", "h→3", "h→1"]
    assert step.step_time_s == pytest.approx(2 * (F + B) + 2 * (W / 2) + 4 * 0.5)
    alone = simulated(equal(1, 2, transfer_s=0.5), 1, 3, "zb-v")
    assert not any(span.action.edge for span in alone.timeline) and alone.bubble == pytest.approx(0)


def test_a_span_names_its_stage() -> None:
    step = simulated(equal(2, 2), 2, 2, "interleaved")
    home = placement("interleaved", 2, 2)
    assert {(span.stage, span.rank) for span in step.timeline} == set(enumerate(home))
    for span in step.timeline:
        if span.action.kind in (Kind.FORWARD, Kind.BACKWARD):
            assert span.stage == span.action.stage
        elif span.action.edge:
            target = int(span.action.edge.removeprefix("h→"))
            assert span.stage == (target - 1 if span.action.kind in (Kind.SEND, Kind.RECV_GRAD) else target)
        else:
            assert span.stage == span.rank, "what is done once a rank is of its first stage"


def test_prelude_reduction_and_update_of_all_stages() -> None:
    stages = [stage(prelude=0.1 * (1 + number), update=0.5) for number in range(4)]
    step = simulated(chain(stages), 2, 2, "interleaved")
    times = {(span.rank, span.action.kind): span.end_s - span.start_s for span in step.timeline}
    assert times[0, Kind.PRELUDE] == pytest.approx(0.1 + 0.3) and times[1, Kind.PRELUDE] == pytest.approx(0.2 + 0.4)
    assert times[0, Kind.UPDATE] == pytest.approx(2 * 0.5)


def test_ranks_of_several_stages_reduce_together() -> None:
    """Two replicas on shared cores: the reduction of a rank's stages begins when both are there."""
    one = stage().model_copy(update={"seconds": dict(stage().seconds) | {"reduce": (0.0, 0.25)}, "reduces": ["dp"]})
    step = simulated(chain([stage(), stage(), one, stage()], cores=8), 2, 4, "interleaved", dp=2)
    spans = [span for span in step.timeline if span.action.kind is Kind.REDUCE]
    assert [round(span.end_s - span.start_s, 6) for span in sorted(spans, key=lambda span: span.rank)] == [0.25, 0.25, 0, 0]
    assert step.communication_s == pytest.approx(0.25)


def test_replicas_do_alike() -> None:
    step = simulated(equal(2, 2, transfer_s=0.1), 2, 4, "zb-v", dp=2)
    assert {span.rank for span in step.timeline} == {0, 1, 2, 3} and len(step.memory) == 4
    assert {(span.rank, span.action.peer) for span in step.timeline if span.action.edge} == {(0, 2), (2, 0), (1, 3), (3, 1)}


# -- a backward pass in two parts ----------------------------------------------------------------------------------------------------------


def test_a_backward_pass_that_is_not_split_takes_both_parts() -> None:
    split, whole = chain([stage()] * 3, 0.1), chain([stage(backward=B + W, weight=None)] * 3, 0.1)
    one, other = simulated(split, 3, 5, "1f1b"), simulated(whole, 3, 5, "1f1b")
    assert one == other
    assert not any(span.action.kind is Kind.WEIGHT for span in one.timeline)
    assert any(span.action.kind is Kind.WEIGHT for span in simulated(split, 3, 5, "zb-h1").timeline)


def test_a_schedule_that_splits_needs_both_parts() -> None:
    said = "the schedule splits the backward pass, but the profile of stage 1 has only the seconds of the whole of it; give it `weight`"
    with pytest.raises(LayoutError, match=re.escape(said)):
        simulated(chain([stage(), stage(weight=None)]), 2, 4, "zb-h1")


def test_an_unknown_schedule() -> None:
    with pytest.raises(LayoutError, match="schedule 'zigzag' is unknown; there are gpipe, 1f1b, interleaved"):
        simulated(equal(2, 1), 2, 4, "zigzag")


# -- memory --------------------------------------------------------------------------------------------------------------------------------


def test_what_ranks_of_several_stages_hold() -> None:
    """Their stages' bytes together, of saved values the most that is held at once; what stages use in turn, or share, once."""
    stages = [stage(saved=saved) for saved in (10, 1, 100, 5)]
    step = simulated(chain(stages), 2, 4, "interleaved")
    assert step.memory == [
        {"parameters": 14, "saved": 230, "transient": 20, "runtime": 5},
        {"parameters": 14, "saved": 7, "transient": 20, "runtime": 5},
    ]
    assert step.memory_bytes == [269, 46]


def test_a_profile_that_has_counted_what_is_saved() -> None:
    assert [use["saved"] for use in simulated(chain([stage()] * 2), 2, 4, "1f1b").memory] == [1000, 1000]
    mixed = chain([stage(saved=10), stage()])
    assert [use["saved"] for use in simulated(mixed, 2, 4, "1f1b").memory] == [20, 1000]


@settings(deadline=None)
@given(st.sampled_from(NAMES), st.integers(1, 4), st.integers(1, 8))
def test_saved_bytes_are_those_in_flight(schedule: str, ranks: int, microbatches: int) -> None:
    chunks = 2 if schedule in ("interleaved", "zb-v") else 1
    tables = rank_tables(schedule, ranks, chunks, microbatches)
    step = simulated(chain([stage(saved=3, kept=3)] * (ranks * chunks)), ranks, microbatches, schedule)
    assert [use["saved"] for use in step.memory] == [3 * each for each in in_flight(tables)]
    step = simulated(chain([stage(saved=3, kept=2)] * (ranks * chunks)), ranks, microbatches, schedule)
    assert [use["saved"] for use in step.memory] == [max(held_after(row)) for row in tables]


def held_after(row: list[Slot]) -> list[int]:
    """What a rank holds after each slot: 3 from forward to backward, from there 2 until the weights' part, where there is one."""
    ways = {slot.kind for slot in row}
    found = []
    for end in range(1, len(row) + 1):
        counts = Counter(slot.kind for slot in row[:end])
        forward, backward, weight = (counts[kind] for kind in (Kind.FORWARD, Kind.BACKWARD, Kind.WEIGHT))
        found.append(3 * (forward - backward) + (2 * (backward - weight) if Kind.WEIGHT in ways else 0))
    return found


# -- any schedule --------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_step_is_faster_than_its_work(data: st.DataObject) -> None:
    schedule = data.draw(st.sampled_from(NAMES))
    ranks, microbatches, transfer_s = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6)), data.draw(st.floats(0, 1))
    chunks = {"interleaved": data.draw(st.integers(2, 3)), "zb-v": 2}.get(schedule, 1)
    seconds = st.floats(0.1, 3)
    stages = [stage(data.draw(seconds), data.draw(seconds), data.draw(seconds)) for _ in range(ranks * chunks)]
    step = simulated(chain(stages, transfer_s), ranks, microbatches, schedule)
    home = placement(schedule, ranks, chunks)
    work = [0.0] * ranks
    for number, each in enumerate(stages):
        work[home[number]] += microbatches * sum(compute for compute, _ in each.seconds.values())
    messages = sum(home[number] != home[number + 1] for number in range(len(stages) - 1))
    through = sum(each.seconds["forward"][0] + each.seconds["backward"][0] for each in stages) + 2 * messages * transfer_s
    assert step.step_time_s >= step.period_s - 1e-9 >= max(work) - 1e-6
    assert step.step_time_s >= through - 1e-6
    assert step.step_time_s <= sum(work) + 2 * microbatches * messages * transfer_s + 1e-6
    kinds = (Kind.FORWARD, Kind.BACKWARD, Kind.WEIGHT) if splits_backward(schedule) else (Kind.FORWARD, Kind.BACKWARD)
    ran = {(span.action.kind, span.stage, span.action.microbatch) for span in step.timeline if span.action.kind in kinds}
    assert len(ran) == len(kinds) * len(stages) * microbatches


def test_a_users_own_table() -> None:
    """1f1b with the weights' parts put off to the end: the last rank's two fill nothing, the first rank's fill what it waits."""
    tables = read_tables("""
        0  F0 F1 B0 B1 W0 W1
        1  F0 B0 F1 B1 W0 W1
    """)
    mesh = Mesh(dp=1, tp=1, pp=2, microbatches=2, schedule="by hand")
    step = simulate_profile(equal(2, 1), mesh, tables)
    assert step.step_time_s == pytest.approx(F + F + B + F + B + B + 2 * W)
    with pytest.raises(LayoutError, match="rank 0 never does F2 of stage 0"):
        simulate_profile(equal(2, 1), Mesh(dp=1, tp=1, pp=2, microbatches=3, schedule="by hand"), tables)


# -- how long it takes ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "ranks", "chunks", "microbatches", "limit_s"), [("1f1b", 64, 1, 512, 3.0), ("interleaved", 16, 8, 64, 1.0)]
)
def test_simulating_is_fast(schedule: str, ranks: int, chunks: int, microbatches: int, limit_s: float) -> None:
    """Seconds of a processor, twice the limit allowed for slower ones; the limits held on the machine of 2 cores where they were set."""
    profile = equal(ranks, chunks, transfer_s=0.01)
    start = time.process_time()
    simulated(profile, ranks, microbatches, schedule)
    assert time.process_time() - start < 2 * limit_s
