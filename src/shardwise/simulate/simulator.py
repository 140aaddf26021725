"""Performs all ranks' actions on virtual clocks.

Computing takes a core: where more ranks compute than there are cores, each is slowed accordingly, and a rank that waits leaves its core
to the
others. A send costs its rank nothing and arrives after the message's time; a receive ends when its message is there; a reduction begins
when the last rank of its group is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from shardwise.program.actions import Action, Kind
from shardwise.program.build import rank_of
from shardwise.program.schedules import schedule
from shardwise.program.transfers import matching, order_transfers, with_transfers
from shardwise.simulate.profile import Profile, StageProfile

__all__ = ["Mesh", "Simulation", "Span", "simulate_profile", "trace_of"]

_TINY_S = 1e-12


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """The sizes of a plan."""

    dp: int
    tp: int
    pp: int
    microbatches: int
    schedule: str


@dataclass(frozen=True, kw_only=True)
class Span:
    """One action on one rank; seconds from the beginning of the step."""

    rank: int
    stage: int
    action: Action
    start_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """A simulated step.

    step_time_s: of the slowest rank; timeline: every action of every rank; memory: each rank's bytes by kind at its peak.
    bubble: share of the ranks' time spent waiting; communication_s: of the busiest rank.
    """

    step_time_s: float
    timeline: list[Span]
    memory: list[dict[str, int]]
    bubble: float
    communication_s: float

    @property
    def memory_bytes(self) -> list[int]:
        """Peak of each rank."""
        return [sum(use.values()) for use in self.memory]

    def save_trace(self, path: str | Path) -> None:
        """Writes the timeline for Perfetto (ui.perfetto.dev) or chrome://tracing."""
        Path(path).write_text(json.dumps(trace_of(self.timeline)))


def trace_of(timeline: list[Span], name: str = "") -> dict[str, object]:
    """Chrome's trace event format ("Trace Event Format", Google): complete events, microseconds."""
    events: list[dict[str, object]] = [
        {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank} {name}".strip()}}
        for rank in sorted({span.rank for span in timeline})
    ]
    events += [
        {
            "name": str(span.action),
            "cat": span.action.kind.value,
            "ph": "X",
            "pid": span.rank,
            "tid": 0,
            "ts": span.start_s * 1e6,
            "dur": (span.end_s - span.start_s) * 1e6,
            "args": {"stage": span.stage, "microbatch": span.action.microbatch},
        }
        for span in timeline
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def simulate_profile(profile: Profile, mesh: Mesh) -> Simulation:
    """One step of all ranks of a plan."""
    ranks = {
        rank_of(stage, d, t, mesh.dp, mesh.tp): _Rank(stage=stage, place=(d, t), actions=actions)
        for stage, actions in _actions(profile, mesh).items()
        for d in range(mesh.dp)
        for t in range(mesh.tp)
    }
    timeline = _Clock(profile=profile, mesh=mesh, ranks=dict(sorted(ranks.items()))).play()
    total = max(span.end_s for span in timeline)
    busy = {rank: _busy(state, profile.stages[state.stage]) for rank, state in ranks.items()}
    crowd = max(1.0, len(ranks) / profile.cores) if profile.cores else 1.0
    waiting = 1 - min(1.0, sum(sum(each) for each in busy.values()) * crowd / (total * len(ranks)))
    memory = [profile.stages[ranks[rank].stage].memory for rank in sorted(ranks)]
    return Simulation(
        step_time_s=total, timeline=timeline, memory=memory, bubble=waiting, communication_s=max(talk for _, talk in busy.values())
    )


def _actions(profile: Profile, mesh: Mesh) -> dict[int, list[Action]]:
    """Each stage's actions; peers are stages here."""
    lists = {
        stage: with_transfers(schedule(mesh.schedule, stage, mesh.pp, mesh.microbatches), stage, profile.edges, lambda other: other)
        for stage in range(mesh.pp)
    }
    ends = [Action(kind=Kind.REDUCE), Action(kind=Kind.UPDATE)]
    return {stage: [Action(kind=Kind.PRELUDE), *actions, *ends] for stage, actions in order_transfers(lists).items()}


def _busy(state: _Rank, stage: StageProfile) -> tuple[float, float]:
    seconds = [stage.seconds[action.kind.value] for action in state.actions if action.kind.value in stage.seconds]
    return sum(compute for compute, _ in seconds), sum(talk for _, talk in seconds)


@dataclass(kw_only=True)
class _Rank:
    stage: int
    place: tuple[int, int]
    actions: list[Action]
    at: int = 0
    begun: bool = False
    start_s: float = 0.0
    compute_s: float = 0.0  # left of the action
    until_s: float | None = None  # a wait or a communication in progress ends then

    @property
    def done(self) -> bool:
        return self.at >= len(self.actions)

    @property
    def computing(self) -> bool:
        return not self.done and self.begun and self.compute_s > _TINY_S


@dataclass(kw_only=True)
class _Clock:
    profile: Profile
    mesh: Mesh
    ranks: dict[int, _Rank]
    now_s: float = 0.0
    arrivals: dict[tuple[int, tuple[int, int], Action], float] = field(default_factory=dict)
    timeline: list[Span] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.transfer_s: Mapping[str, float] = {edge.name: edge.transfer_s for edge in self.profile.edges}

    def play(self) -> list[Span]:
        while not all(state.done for state in self.ranks.values()):
            moved = True
            while moved:
                moved = sum(self._advance(rank, state) for rank, state in self.ranks.items()) > 0
            self._tick()
        return self.timeline

    def _advance(self, rank: int, state: _Rank) -> bool:
        """Begins or ends what can begin or end now; whether anything happened."""
        if state.done:
            return False
        action = state.actions[state.at]
        if not state.begun:
            self._begin(state, action)
            return True
        if state.computing or not self._ready(state, action):
            return False
        if state.until_s is None:
            state.until_s = max(self.now_s + self._seconds(state, action)[1], self.arrivals.get((state.stage, state.place, action), 0.0))
        if state.until_s > self.now_s + _TINY_S:
            return False
        self.timeline.append(
            Span(rank=rank, stage=state.stage, action=self._between_ranks(state, action), start_s=state.start_s, end_s=self.now_s)
        )
        state.at, state.begun, state.until_s = state.at + 1, False, None
        return True

    def _between_ranks(self, state: _Rank, action: Action) -> Action:
        """With the rank in place of the stage that it sends to or receives from."""
        if action.peer < 0:
            return action
        return replace(action, peer=rank_of(action.peer, *state.place, self.mesh.dp, self.mesh.tp))

    def _seconds(self, state: _Rank, action: Action) -> tuple[float, float]:
        return self.profile.stages[state.stage].seconds.get(action.kind.value, (0.0, 0.0))

    def _begin(self, state: _Rank, action: Action) -> None:
        state.begun, state.start_s = True, self.now_s
        state.compute_s = self._seconds(state, action)[0]
        if action.sends:
            self.arrivals[action.peer, state.place, matching(action, state.stage)] = self.now_s + self.transfer_s[action.edge]

    def _ready(self, state: _Rank, action: Action) -> bool:
        if action.receives:
            return (state.stage, state.place, action) in self.arrivals
        if action.kind is Kind.REDUCE and self.profile.stages[state.stage].reduces:
            return all(other.at >= state.at for other in self.ranks.values() if other.stage == state.stage)
        return True

    def _tick(self) -> None:
        """Lets time pass until the next end."""
        computing = [state for state in self.ranks.values() if state.computing]
        rate = min(1.0, self.profile.cores / len(computing)) if self.profile.cores and computing else 1.0
        ends = [state.compute_s / rate for state in computing]
        ends += [state.until_s - self.now_s for state in self.ranks.values() if state.until_s is not None]
        if not ends:
            stuck = {rank: str(state.actions[state.at]) for rank, state in self.ranks.items() if not state.done}
            assert not stuck, f"the simulated ranks wait for each other: {stuck}"
            return
        passed = max(min(ends), 0.0)
        self.now_s += passed
        for state in computing:
            state.compute_s -= passed * rate
