"""Performs all ranks' actions on virtual clocks.

Computing takes a core: where more ranks compute than there are cores, each is slowed accordingly, and a rank that waits leaves its core
to the others. A send costs its rank nothing and arrives after the message's time; a receive ends when its message is there; a reduction begins
when the last rank of its group is there.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from shardwise.program.actions import Action, Kind
from shardwise.program.build import rank_of
from shardwise.program.schedules import schedule
from shardwise.program.transfers import matching, order_transfers, with_transfers
from shardwise.simulate.profile import Profile, StageProfile

__all__ = ["Mesh", "Simulation", "Span", "simulate_profile", "trace_of"]

_TINY_S = 1e-12
_DRAWN = 64  # ranks that have a timeline each; of more, the first of each stage has one


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

    step_time_s: of the slowest rank; timeline: every action of every rank (of more than 64 ranks on devices of their own: of the first of
    each stage, the others doing as it does); memory: each rank's bytes by kind at its peak.
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
    """One step of all ranks of a plan. Ranks of a stage that share no cores with others do alike: one of them is simulated."""
    shared = profile.cores is not None
    places = [(d, t) for d in range(mesh.dp) for t in range(mesh.tp)] if shared else [(0, 0)]
    ranks = {
        rank_of(stage, d, t, mesh.dp, mesh.tp): _Rank(stage=stage, place=(d, t), actions=actions)
        for stage, actions in _actions(profile, mesh).items()
        for d, t in places
    }
    timeline = _Clock(profile=profile, mesh=mesh, ranks=dict(sorted(ranks.items()))).play()
    total = max(span.end_s for span in timeline)
    busy = {rank: _busy(state, profile.stages[state.stage]) for rank, state in ranks.items()}
    crowd = max(1.0, len(ranks) / profile.cores) if profile.cores else 1.0
    waiting = 1 - min(1.0, sum(sum(each) for each in busy.values()) * crowd / (total * len(ranks)))
    each = mesh.dp * mesh.tp
    memory = [profile.stages[stage].memory for stage in range(mesh.pp) for _ in range(each)]
    if not shared and len(memory) <= _DRAWN:
        timeline = [_on_rank(span, each, offset) for offset in range(each) for span in timeline]
    return Simulation(
        step_time_s=total, timeline=timeline, memory=memory, bubble=waiting, communication_s=max(talk for _, talk in busy.values())
    )


def _on_rank(span: Span, each: int, offset: int) -> Span:
    """The same on another rank of the stage; it talks to the ranks at its own place."""
    action = replace(span.action, peer=span.action.peer + offset) if span.action.peer >= 0 else span.action
    return replace(span, rank=span.stage * each + offset, action=action) if offset else span


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
    """at: the action that it stands at; phase: what it does there."""

    stage: int
    place: tuple[int, int]
    actions: list[Action]
    at: int = 0
    phase: Literal["", "computing", "waiting", "communicating"] = ""
    start_s: float = 0.0
    compute_s: float = 0.0  # left of the action

    @property
    def done(self) -> bool:
        return self.at >= len(self.actions)


@dataclass(kw_only=True)
class _Clock:
    """events: (when, which in order of making, rank whose computing or communicating ends then). Computing on shared cores has no event
    of its own: how long it takes depends on who else computes."""

    profile: Profile
    mesh: Mesh
    ranks: dict[int, _Rank]
    now_s: float = 0.0
    events: list[tuple[float, int, int]] = field(default_factory=list)
    computing: dict[int, _Rank] = field(default_factory=dict)
    arrivals: dict[tuple[int, Action], float] = field(default_factory=dict)
    reducing: dict[int, list[int]] = field(default_factory=dict)
    timeline: list[Span] = field(default_factory=list)
    made: int = 0

    def __post_init__(self) -> None:
        self.transfer_s: Mapping[str, float] = {edge.name: edge.transfer_s for edge in self.profile.edges}
        self.of_stage: dict[int, int] = {}
        for state in self.ranks.values():
            self.of_stage[state.stage] = self.of_stage.get(state.stage, 0) + 1

    def play(self) -> list[Span]:
        for rank in self.ranks:
            self._go_on(rank)
        while self.events or self.computing:
            for rank in self._next():
                self._go_on(rank)
        stuck = {rank: str(state.actions[state.at]) for rank, state in self.ranks.items() if not state.done}
        assert not stuck, f"the simulated ranks wait for each other: {stuck}"
        return self.timeline

    def _go_on(self, rank: int) -> None:
        """Lets a rank do what it can without time passing."""
        state = self.ranks[rank]
        while not state.done:
            action = state.actions[state.at]
            if state.phase == "":
                self._begin(rank, state, action)
                if state.compute_s > _TINY_S:
                    return self._compute(rank, state)
                state.phase = "waiting"
            if state.phase == "waiting":
                if not self._ready(rank, state, action):
                    return None
                state.phase = "communicating"
                until_s = max(self.now_s + self._seconds(state, action)[1], self.arrivals.get((rank, action), 0.0))
                if until_s > self.now_s + _TINY_S:
                    return self._wake(rank, until_s)
            self._end(rank, state, action)
        return None

    def _begin(self, rank: int, state: _Rank, action: Action) -> None:
        state.start_s, state.compute_s = self.now_s, self._seconds(state, action)[0]
        if action.sends:
            peer = rank_of(action.peer, *state.place, self.mesh.dp, self.mesh.tp)
            self.arrivals[peer, matching(action, state.stage)] = self.now_s + self.transfer_s[action.edge]
            other = self.ranks[peer]
            if other.phase == "waiting" and other.actions[other.at] == matching(action, state.stage):
                self._wake(peer, self.now_s)

    def _compute(self, rank: int, state: _Rank) -> None:
        state.phase = "computing"
        if self.profile.cores:
            self.computing[rank] = state
        else:
            self._wake(rank, self.now_s + state.compute_s)

    def _ready(self, rank: int, state: _Rank, action: Action) -> bool:
        if action.receives:
            return (rank, action) in self.arrivals
        if action.kind is Kind.REDUCE and self.profile.stages[state.stage].reduces:
            here = self.reducing.setdefault(state.stage, [])
            if rank not in here:
                here.append(rank)
                if len(here) == self.of_stage[state.stage]:
                    for other in here:
                        if other != rank:
                            self._wake(other, self.now_s)
            return len(here) == self.of_stage[state.stage]
        return True

    def _end(self, rank: int, state: _Rank, action: Action) -> None:
        if action.peer >= 0:
            action = replace(action, peer=rank_of(action.peer, *state.place, self.mesh.dp, self.mesh.tp))
        self.timeline.append(Span(rank=rank, stage=state.stage, action=action, start_s=state.start_s, end_s=self.now_s))
        state.at, state.phase = state.at + 1, ""

    def _wake(self, rank: int, when_s: float) -> None:
        heapq.heappush(self.events, (when_s, self.made, rank))
        self.made += 1

    def _next(self) -> list[int]:
        """Lets time pass until the next end; whose."""
        rate = min(1.0, self.profile.cores / len(self.computing)) if self.profile.cores and self.computing else 1.0
        soonest = min((state.compute_s for state in self.computing.values()), default=float("inf")) / rate
        passed = min(soonest, self.events[0][0] - self.now_s if self.events else float("inf"))
        self.now_s += max(passed, 0.0)
        for state in self.computing.values():
            state.compute_s -= passed * rate
        ended = [rank for rank, state in self.computing.items() if state.compute_s <= _TINY_S]
        for rank in ended:
            self.computing.pop(rank).phase = "waiting"
        while self.events and self.events[0][0] <= self.now_s:
            rank = heapq.heappop(self.events)[2]
            if self.ranks[rank].phase == "computing":
                self.ranks[rank].phase = "waiting"
            ended.append(rank)
        return ended

    def _seconds(self, state: _Rank, action: Action) -> tuple[float, float]:
        return self.profile.stages[state.stage].seconds.get(action.kind.value, (0.0, 0.0))
