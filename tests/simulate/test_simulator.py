"""Simulated steps against timelines worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.program.actions import Kind
from shardwise.simulate.profile import EdgeProfile, Profile, StageProfile
from shardwise.simulate.simulator import Mesh, Simulation, simulate_profile

F, B = 1.0, 2.0  # seconds


def stage(
    forward: float = F, backward: float = B, reduce: float = 0.0, update: float = 0.0, memory: int = 7, tied: list[int] | None = None
) -> StageProfile:
    seconds = {
        "prelude": (0.0, 0.0),
        "forward": (forward, 0.0),
        "backward": (backward, 0.0),
        "reduce": (0.0, reduce),
        "update": (update, 0.0),
    }
    return StageProfile(seconds=seconds, memory={"parameters": memory}, reduces=["dp"] if reduce else [], tied=tied or [])


def chain(stages: list[StageProfile], transfer_s: float = 0.0, cores: int | None = None) -> Profile:
    edges = [
        EdgeProfile(name=f"h→{target}", source=target - 1, target=target, nbytes=8, transfer_s=transfer_s, requires_grad=True)
        for target in range(1, len(stages))
    ]
    return Profile(stages=stages, edges=edges, cores=cores)


def simulated(profile: Profile, microbatches: int, schedule: str = "1f1b", dp: int = 1, tp: int = 1) -> Simulation:
    return simulate_profile(profile, Mesh(dp=dp, tp=tp, pp=len(profile.stages), microbatches=microbatches, schedule=schedule))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (2, 1), (2, 4), (4, 4), (4, 9), (3, 2)])
def test_equal_stages_take_the_time_of_the_formula(schedule: str, stages: int, microbatches: int) -> None:
    """(m + p − 1) · (f + b), of which (p − 1) / (m + p − 1) is waiting (Huang et al. 2019, section 2.3)."""
    step = simulated(chain([stage()] * stages), microbatches, schedule)
    slots = microbatches + stages - 1
    assert step.step_time_s == pytest.approx(slots * (F + B))
    assert step.bubble == pytest.approx((stages - 1) / slots)


def test_the_slowest_stage_sets_the_pace() -> None:
    step = simulated(chain([stage(), stage(2 * F, 2 * B)]), 8)
    assert step.step_time_s == pytest.approx(F + 8 * (2 * F + 2 * B) + B)


def test_messages_take_their_time() -> None:
    """One microbatch through three stages and back waits for four messages."""
    assert simulated(chain([stage()] * 3, transfer_s=0.5), 1).step_time_s == pytest.approx(3 * (F + B) + 4 * 0.5)


def test_a_send_does_not_hold_its_rank_up() -> None:
    """While a message is under way its sender computes on."""
    step = simulated(chain([stage(), stage()], transfer_s=0.25), 2, "gpipe")
    ends = {(span.rank, str(span.action)): span.end_s for span in step.timeline}
    assert ends[0, "forward 1 of stage 0"] == pytest.approx(2 * F)
    assert ends[1, "forward 0 of stage 1"] == pytest.approx(2 * F + 0.25)


def test_one_core_does_one_thing_at_a_time() -> None:
    """Two stages that share a core: what one waits, the other computes; nothing is lost and nothing is won."""
    step = simulated(chain([stage(), stage()], cores=1), 4)
    assert step.step_time_s == pytest.approx(4 * 2 * (F + B))
    assert step.bubble == pytest.approx(0.0)


def test_messages_take_the_core_of_both_ends() -> None:
    profile = chain([stage(), stage()], cores=1)
    busy = profile.model_copy(update={"edges": [edge.model_copy(update={"busy_s": 0.25}) for edge in profile.edges]})
    assert simulated(busy, 4).step_time_s == pytest.approx(4 * 2 * (F + B) + 4 * 2 * 2 * 0.25)


@pytest.mark.parametrize(("ranks", "cores"), [(2, 1), (4, 2), (4, 3), (3, 4)])
def test_copies_on_fewer_cores_are_slowed_alike(ranks: int, cores: int) -> None:
    step = simulated(chain([stage()], cores=cores), 1, dp=ranks)
    assert step.step_time_s == pytest.approx((F + B) * max(1.0, ranks / cores))


def test_a_waiting_rank_leaves_its_core() -> None:
    """Three stages on two cores: with one microbatch only one of them ever computes."""
    assert simulated(chain([stage()] * 3, cores=2), 1).step_time_s == pytest.approx(3 * (F + B))


def test_reductions_and_updates_come_at_the_end() -> None:
    step = simulated(chain([stage(reduce=0.5, update=0.25)]), 2, dp=2)
    assert step.step_time_s == pytest.approx(2 * (F + B) + 0.5 + 0.25)
    assert step.communication_s == pytest.approx(0.5)


def test_stages_reduce_when_they_are_done() -> None:
    """The last stage ends its backwards first, and reduces while the first still computes."""
    step = simulated(chain([stage(reduce=0.5), stage(reduce=0.5)]), 2, dp=2)
    ends = {(span.rank, span.action.kind): span.end_s for span in step.timeline}
    assert ends[2, Kind.REDUCE] == pytest.approx(step.step_time_s - B)
    assert step.step_time_s == pytest.approx(3 * (F + B) + 0.5)


def test_stages_that_share_a_weight_end_their_reduction_together() -> None:
    """The last stage is done before the first, and waits for its gradient; the stage between them does not."""
    profile = chain([stage(reduce=0.5, tied=[2]), stage(reduce=0.5), stage(reduce=0.5, tied=[0])])
    ends = {span.rank: span.end_s for span in simulated(profile, 2).timeline if span.action.kind is Kind.REDUCE}
    assert ends[0] == ends[2] == pytest.approx(4 * (F + B) + 0.5)
    assert ends[1] == pytest.approx(4 * (F + B) - B + 0.5)


@pytest.mark.parametrize(("dp", "tp"), [(1, 2), (2, 1), (2, 2)])
def test_a_shared_weight_makes_whole_stages_wait(dp: int, tp: int) -> None:
    """Each copy of the one stage waits for its peer in the other, and so for all copies there. Cores enough for all of them."""
    profile = chain([stage(reduce=0.5, tied=[1]), stage(reduce=0.5, tied=[0])], cores=8)
    ends = [span.end_s for span in simulated(profile, 2, dp=dp, tp=tp).timeline if span.action.kind is Kind.REDUCE]
    assert ends == pytest.approx([3 * (F + B) + 0.5] * 2 * dp * tp)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.1, 3), st.floats(0.1, 3)), min_size=1, max_size=4),
    st.integers(1, 6),
    st.floats(0, 1),
    st.sampled_from([None, 1, 2, 3]),
    st.sampled_from(["gpipe", "1f1b"]),
    st.integers(1, 2),
)
def test_no_step_is_faster_than_its_work(
    times: list[tuple[float, float]], microbatches: int, transfer_s: float, cores: int | None, schedule: str, dp: int
) -> None:
    step = simulated(chain([stage(f, b) for f, b in times], transfer_s, cores), microbatches, schedule, dp=dp)
    work = [microbatches * (f + b) for f, b in times]
    through = sum(f + b for f, b in times) + 2 * (len(times) - 1) * transfer_s
    least = max(max(work), through, dp * sum(work) / cores if cores else 0.0)
    assert step.step_time_s >= least - 1e-6
    assert step.step_time_s <= dp * sum(work) + 2 * microbatches * (len(times) - 1) * transfer_s + 1e-6
    by_rank: dict[int, float] = {}
    for span in step.timeline:
        assert span.end_s >= span.start_s >= by_rank.get(span.rank, 0.0) - 1e-9, "a rank does one thing after the other"
        by_rank[span.rank] = span.end_s
    assert len(step.memory_bytes) == dp * len(times) and set(step.memory_bytes) == {7}


def test_the_trace_is_one_that_viewers_read(tmp_path: Path) -> None:
    step = simulated(chain([stage(), stage()], transfer_s=0.5), 2, tp=2)
    step.save_trace(tmp_path / "trace.json")
    document = json.loads((tmp_path / "trace.json").read_text())
    events = document["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1, 2, 3}
    whole = [event for event in events if event["ph"] == "X"]
    assert len(whole) == len(step.timeline)
    for event in whole:
        assert event["ts"] >= 0 and event["dur"] >= 0 and isinstance(event["name"], str) and event["tid"] == 0
    assert max(event["ts"] + event["dur"] for event in whole) == pytest.approx(1e6 * step.step_time_s)
    sends = {(event["pid"], event["name"]) for event in whole if event["cat"] == "send"}
    assert sends == {(rank, f"send {m} h→1 to rank {rank + 2}") for rank in (0, 1) for m in (0, 1)}
