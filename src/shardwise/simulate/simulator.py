"""Performs all ranks' actions on virtual clocks.

Computing takes a core: where more ranks compute than there are cores, each is slowed accordingly, and a rank that waits leaves its core
to the others. A send costs its rank nothing: messages take a rank's way out, and the receiver's way in, one after the other, each for its
time (the gap of LogGP, Alexandrov et al. 1995). A receive ends when its message is there, and has been posted before; what ranks
communicate in another action begins when the last of their group is there.

Ranks that do alike are simulated once. A slow rank sets the pace of those that it does each microbatch with (`Mesh.coupled`), holds the
others of its stage up where they sum gradients, and other stages where they wait for its messages: simulated is one pipeline for each pace.

A pipeline rank has one stage, or several (chunks) whose computations its schedule's table puts in order. It performs the prelude, the
reduction and the update once for all of them.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Literal

from shardwise.errors import LayoutError
from shardwise.program.actions import Action, Kind, Message
from shardwise.program.tables import Tables, check_table, in_flight, placed, rank_tables, splits
from shardwise.program.transfers import rank_actions
from shardwise.simulate.profile import Profile, StageProfile

__all__ = ["Column", "Mesh", "Simulation", "Span", "peak_memory", "simulate_columns", "simulate_profile", "trace_of"]

_TINY_S = 1e-12
_ONCE = ("transient", "cached", "gathered", "runtime")  # memory that a rank's stages use in turn, or share
_DRAWN = 64  # ranks that have a timeline each; of more, the first of each stage has one
_TOGETHER = (Kind.PRELUDE, Kind.FORWARD, Kind.BACKWARD, Kind.WEIGHT)


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """The sizes of a plan. pp: pipeline ranks, each with so many stages as there are chunks.

    coupled: so many neighbouring ranks of a stage do each microbatch together (on the tensor and context axes; with ZeRO-3 on those of the
    data axis that gather parameters from each other); 0: those of the tensor axis.
    """

    dp: int
    tp: int
    pp: int
    microbatches: int
    schedule: str
    chunks: int = 1
    coupled: int = 0

    @property
    def stage_ranks(self) -> int:
        """Of each place in the pipeline."""
        return self.dp * self.tp

    @property
    def together(self) -> int:
        """Neighbours that do each microbatch together; all ranks of a stage where their number is no multiple of `coupled`."""
        found = self.coupled or self.tp
        return found if self.stage_ranks % found == 0 else self.stage_ranks


@dataclass(frozen=True, kw_only=True)
class Span:
    """One action on one rank; seconds from the beginning of the step. stage: of all the plan's stages; what a rank with several does once
    for all of them is of its first."""

    rank: int
    stage: int
    action: Action
    start_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """A simulated step.

    step_time_s: of the slowest rank; timeline: every action of every rank (of more than 64 ranks on devices of their own: of the first of
    each stage and of each pace, the others doing as these do); memory: each rank's bytes by kind at its peak.
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

    @property
    def period_s(self) -> float:
        """Seconds from step to step where no rank waits at a step's end for ranks of other stages.

        That is the longest that a rank takes from its first forward to its end, and its prelude: shifted by so much, a step's timeline
        fits behind the last one's (Qi et al. 2023, section 4). At most step_time_s. Ranks that share cores with others are not shifted.
        """
        begin: dict[int, float] = {}
        end: dict[int, float] = {}
        for span in self.timeline:
            if span.action.kind is Kind.FORWARD:
                begin[span.rank] = min(begin.get(span.rank, span.start_s), span.start_s)
            end[span.rank] = max(end.get(span.rank, 0.0), span.end_s)
        prelude = {span.rank: span.end_s - span.start_s for span in self.timeline if span.action.kind is Kind.PRELUDE}
        return max(end[rank] - begin[rank] + prelude.get(rank, 0.0) for rank in begin)

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


def simulate_profile(
    profile: Profile,
    mesh: Mesh,
    tables: Tables | None = None,
    *,
    slow: Mapping[int, float] | None = None,
    recorded: bool = True,
) -> Simulation:
    """One step of all ranks of a plan. Ranks that share no cores with others and do alike are simulated once.

    profile: of the mesh's pp · chunks stages; tables: each pipeline rank's slots, instead of those of the mesh's schedule; slow: rank → how
    many times as long it computes; recorded: whether a timeline is wanted, which takes as long to write down as a step to play.
    Raises LayoutError for a schedule that is unknown or does not take these sizes, for tables that contradict themselves, for a slow rank
    that is not there, and for a schedule that splits the backward pass where the profile does not say what its parts take.
    """
    shared, each = profile.cores is not None, mesh.stage_ranks
    tables = _tables(mesh, tables)
    rows = _rows(profile, tables)
    paces = _paces(mesh, slow or {}, apart=shared)
    ranks = {pipe * each + pace.first: _placed(row, pipe, pace, mesh, profile) for pace in paces for pipe, row in rows.items()}
    clock = _Clock(
        cores=None if profile.cores is None else profile.cores / profile.nodes,
        node_ranks=each * mesh.pp // profile.nodes,
        ranks=dict(sorted(ranks.items())),
        together=mesh.together if shared else 1,
        recorded=recorded,
    )
    timeline, total = clock.play(), clock.end_s
    crowd = max(1.0, len(ranks) / profile.cores) if profile.cores else 1.0
    waiting = 1 - min(1.0, _busy_s(rows, mesh, slow or {}) * crowd / (total * each * mesh.pp))
    copies = [_memories(copy, tables) for copy in profile.by_copy()]
    memory = [copies[place * len(copies) // each][pipe] for pipe in rows for place in range(each)]
    if not shared and len(memory) <= _DRAWN:
        timeline = [_on_rank(span, place - pace.first) for pace in paces for place in pace.places for span in _of(pace, timeline, each)]
    talk = max(_added(row.seconds)[1] for row in rows.values())
    return Simulation(step_time_s=total, timeline=timeline, memory=memory, bubble=waiting, communication_s=talk)


def peak_memory(profile: Profile, mesh: Mesh) -> list[dict[str, int]]:
    """Bytes by kind that the ranks at each place of the pipeline hold at their peak, as `simulate_profile` says; no clock runs for it."""
    return _memories(profile, _tables(mesh, None))


@dataclass(frozen=True, kw_only=True)
class _Pace:
    """Places of a stage whose ranks do alike, the same in all stages.

    factors: place in the pipeline → how many times as long they compute.
    """

    places: Sequence[int]
    factors: Mapping[int, float]

    @property
    def first(self) -> int:
        """The place that is simulated."""
        return self.places[0]


def _paces(mesh: Mesh, slow: Mapping[int, float], *, apart: bool) -> list[_Pace]:
    """All places of a stage, those together that do alike; apart: one by one, for ranks that share cores."""
    each = mesh.stage_ranks
    for rank in slow:
        if not 0 <= rank < each * mesh.pp:
            raise LayoutError(f"slow rank {rank} is not among the {each * mesh.pp} ranks; they are counted from 0")
    size = 1 if apart else mesh.together
    factors: dict[int, dict[int, float]] = {}  # block of places → place in the pipeline → the slowest's factor
    for rank, factor in slow.items():
        pipe, place = divmod(rank, each)
        known = factors.setdefault(place // size, {})
        known[pipe] = max(known.get(pipe, 1.0), factor)
    alike: dict[tuple[tuple[int, float], ...] | int, list[int]] = {}
    for block in range(each // size):
        pace = block if apart else tuple(sorted(factors.get(block, {}).items()))
        alike.setdefault(pace, []).extend(range(block * size, (block + 1) * size))
    return [_Pace(places=places, factors=factors.get(places[0] // size, {})) for places in alike.values()]


def _busy_s(rows: Mapping[int, _Row], mesh: Mesh, slow: Mapping[int, float]) -> float:
    """Computing and communicating of all ranks."""
    more = dict.fromkeys(rows, 0.0)
    for rank, factor in slow.items():
        more[rank // mesh.stage_ranks] += factor - 1
    works = {pipe: _added(row.seconds) for pipe, row in rows.items()}
    return sum(compute_s * (mesh.stage_ranks + more[pipe]) + talk_s * mesh.stage_ranks for pipe, (compute_s, talk_s) in works.items())


def _of(pace: _Pace, timeline: Iterable[Span], each: int) -> list[Span]:
    """The spans of its simulated ranks."""
    return [span for span in timeline if span.rank % each == pace.first]


@dataclass(frozen=True, kw_only=True)
class Column:
    """Copies of the pipeline that do alike: how many there are, what their stages take, and how many microbatches each of them has."""

    profile: Profile
    copies: int
    microbatches: int


def simulate_columns(columns: Sequence[Column], mesh: Mesh) -> Simulation:
    """One step of copies of the pipeline that do not all do alike: those on slower devices take longer, or have fewer microbatches.

    columns: in the order of the data axis; the ranks of one do alike, each with a device of its own, so that one of each stage is
    simulated, and its timeline is that of the column's first copy. Ranks of a stage that reduce gradients wait for each other.
    mesh: dp as many as the columns have copies; its microbatches mean nothing. LayoutError as of `simulate_profile`.
    """
    copies = sum(column.copies for column in columns)
    if copies != mesh.dp or any(column.profile.cores for column in columns):
        raise LayoutError(f"{copies} copies on devices of their own make no dp={mesh.dp}; give as many columns' copies as the mesh has")
    folded = replace(mesh, dp=len(columns), tp=1)
    firsts = [0, *accumulate(column.copies for column in columns)]
    tables = [_tables(replace(mesh, microbatches=column.microbatches), None) for column in columns]
    rows = [_rows(column.profile, table) for column, table in zip(columns, tables, strict=True)]
    memories = [_memories(column.profile, table) for column, table in zip(columns, tables, strict=True)]
    ranks = {
        pipe * folded.dp + number: _placed(row, pipe, _Pace(places=[number], factors={}), folded, column.profile)
        for number, column in enumerate(columns)
        for pipe, row in rows[number].items()
    }
    clock = _Clock(cores=None, node_ranks=len(ranks), ranks=dict(sorted(ranks.items())))
    timeline, total = clock.play(), clock.end_s

    def real(rank: int) -> int:
        pipe, number = divmod(rank, folded.dp)
        return pipe * mesh.stage_ranks + firsts[number] * mesh.tp

    each = [(row, column.copies) for pipe in range(mesh.pp) for column, row in zip(columns, (r[pipe] for r in rows), strict=True)]
    busy = sum(sum(map(sum, row.seconds)) * copies for row, copies in each)
    return Simulation(
        step_time_s=total,
        timeline=[_renumbered(span, real) for span in timeline],
        memory=[
            memory[pipe]
            for pipe in range(mesh.pp)
            for column, memory in zip(columns, memories, strict=True)
            for _ in range(column.copies * mesh.tp)
        ],
        bubble=1 - min(1.0, busy / (total * mesh.pp * mesh.dp)),
        communication_s=max(sum(talk for _, talk in row.seconds) for row, _ in each),
    )


def _renumbered(span: Span, real: Callable[[int], int]) -> Span:
    action = span.action if span.action.peer < 0 else replace(span.action, peer=real(span.action.peer))
    return replace(span, rank=real(span.rank), action=action)


def _on_rank(span: Span, offset: int) -> Span:
    """The same on another rank of the stage; it talks to the ranks at its own place."""
    if not offset:
        return span
    action = replace(span.action, peer=span.action.peer + offset) if span.action.peer >= 0 else span.action
    return replace(span, rank=span.rank + offset, action=action)


# -- what the ranks do ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Row:
    """What the ranks of one place in the pipeline do. stages, seconds (computing, communicating): of each action; peers are pipeline ranks.

    reduces: whether they wait for each other to reduce gradients; tied: the places in the pipeline for which they wait then, too.
    """

    actions: list[Action]
    stages: list[int]
    seconds: list[tuple[float, float]]
    reduces: bool
    tied: frozenset[int]


def _tables(mesh: Mesh, given: Tables | None) -> Tables:
    """Each pipeline rank's slots: those given, else those of the mesh's schedule."""
    if given is None:
        return rank_tables(mesh.schedule, mesh.pp, mesh.chunks, mesh.microbatches)
    check_table(given, mesh.pp, mesh.chunks, mesh.microbatches)
    return given


def _rows(profile: Profile, tables: Tables) -> dict[int, _Row]:
    """Pipeline rank → what it does."""
    home = placed(tables)
    assert len(profile.stages) == len(home), f"the profile has {len(profile.stages)} stages, the tables {len(home)}"
    lists = {rank: rank_actions(row, profile.edges, home.__getitem__) for rank, row in enumerate(tables)}
    seconds = _seconds(profile, splits(tables))
    return {rank: _row(actions, _own(home, rank), profile, seconds, home) for rank, actions in lists.items()}


def _own(home: Mapping[int, int], rank: int) -> list[int]:
    """The stages of a pipeline rank. home: stage → rank."""
    return sorted(stage for stage in home if home[stage] == rank)


def _row(inner: list[Action], own: list[int], profile: Profile, seconds: list[_Times], home: Mapping[int, int]) -> _Row:
    """Of the rank that has the stages `own`. home: stage → rank."""
    actions = [Action(kind=Kind.PRELUDE), *inner, Action(kind=Kind.REDUCE), Action(kind=Kind.UPDATE)]
    stages = [action.stage if action.stage >= 0 else own[0] for action in actions]
    once = {kind: _added(seconds[stage].get(kind, _NO_TIME) for stage in own) for kind in (Kind.PRELUDE, Kind.REDUCE, Kind.UPDATE)}
    messages = {edge.name: (edge.busy_s, 0.0) for edge in profile.edges}

    def times(action: Action, stage: int) -> tuple[float, float]:
        if action.sends or action.receives:
            return messages[action.edge]
        return once[action.kind] if action.kind in once else seconds[stage].get(action.kind, _NO_TIME)

    return _Row(
        actions=actions,
        stages=stages,
        seconds=[times(action, stage) for action, stage in zip(actions, stages, strict=True)],
        reduces=any(profile.stages[stage].reduces for stage in own),
        tied=frozenset(home[other] for stage in own for other in profile.stages[stage].tied) - {home[own[0]]},
    )


_Times = dict[str, tuple[float, float]]
_NO_TIME = (0.0, 0.0)


def _added(times: Iterable[tuple[float, float]]) -> tuple[float, float]:
    each = list(times)
    return sum(compute for compute, _ in each), sum(talk for _, talk in each)


def _seconds(profile: Profile, split: bool) -> list[_Times]:
    """Of each stage the seconds by kind; a backward pass that is not split takes both its parts' time."""
    found = []
    for number, stage in enumerate(profile.stages):
        seconds = dict(stage.seconds)
        if split and Kind.WEIGHT not in seconds:
            raise LayoutError(
                f"the schedule splits the backward pass, but the profile of stage {number} has only the seconds of the whole of it; "
                "give it `weight`, and `backward` without that, or choose a schedule that does not split"
            )
        if not split and Kind.WEIGHT in seconds:
            seconds[Kind.BACKWARD] = _added([seconds[Kind.BACKWARD], seconds.pop(Kind.WEIGHT)])
        found.append(seconds)
    return found


def _memories(profile: Profile, tables: Tables) -> list[dict[str, int]]:
    """The bytes by kind of each pipeline rank."""
    home = placed(tables)
    saved, kept = ({stage: getattr(each, name) for stage, each in enumerate(profile.stages)} for name in ("saved_bytes", "kept_bytes"))
    held = in_flight(tables, saved, kept)
    return [_memory([profile.stages[stage] for stage in _own(home, rank)], held[rank]) for rank in range(len(tables))]


def _memory(stages: Sequence[StageProfile], held_bytes: int) -> dict[str, int]:
    """A rank's bytes by kind. held_bytes: the most that its microbatches in flight keep, on the stages that say how much that is."""
    memory: dict[str, int] = {}
    for stage in stages:
        for kind, nbytes in stage.memory.items():
            if kind == "saved" and stage.saved_bytes:
                nbytes = 0
            memory[kind] = max(memory.get(kind, 0), nbytes) if kind in _ONCE else memory.get(kind, 0) + nbytes
    if held_bytes:
        memory["saved"] = memory.get("saved", 0) + held_bytes
    return memory


# -- the clock -----------------------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Rank:
    """pipe: its place in the pipeline; place: in its stage, of so many ranks each; transfer_s: of what it sends, by edge; factor: how many
    times as long it computes; at: the action that it stands at; phase: what it does there."""

    pipe: int
    place: int
    each: int
    row: _Row
    transfer_s: Mapping[str, float]
    factor: float = 1.0
    at: int = 0
    phase: Literal["", "computing", "waiting", "communicating"] = ""
    start_s: float = 0.0
    compute_s: float = 0.0  # left of the action

    def __post_init__(self) -> None:
        self.actions = self.row.actions  # whose peers are places in the pipeline

    @property
    def done(self) -> bool:
        return self.at >= len(self.actions)

    def peer(self, action: Action) -> int:
        """The rank that it talks to: the one at its own place."""
        return action.peer * self.each + self.place

    def told(self, action: Action) -> Action:
        """The action, with the rank that it talks to."""
        return action if self.each == 1 or action.peer < 0 else replace(action, peer=self.peer(action))


def _placed(row: _Row, pipe: int, pace: _Pace, mesh: Mesh, profile: Profile) -> _Rank:
    """The rank at the pace's place."""
    transfer_s = {edge.name: edge.transfer_s for edge in profile.edges}
    factor = pace.factors.get(pipe, 1.0)
    return _Rank(pipe=pipe, place=pace.first, each=mesh.stage_ranks, row=row, transfer_s=transfer_s, factor=factor)


def _meets(ranks: Mapping[int, _Rank]) -> dict[int, frozenset[int]]:
    """Rank → all, itself included, that end their reduction together: those of its stage, where they sum gradients, and those at its own
    place in the stages with which weights are shared; and theirs."""
    at = {(state.pipe, state.place): rank for rank, state in ranks.items()}
    first: dict[int, int] = {}
    group = {rank: frozenset({rank}) for rank in ranks}

    def join(one: int, other: int) -> None:
        together = group[one] | group[other]
        group.update(dict.fromkeys(together, together))

    for rank, state in ranks.items():
        for pipe in state.row.tied:
            join(rank, at[pipe, state.place])
        if state.row.reduces:
            join(rank, first.setdefault(state.pipe, rank))
    return group


@dataclass(kw_only=True)
class _Clock:
    """events: (when, which in order of making, rank whose computing or communicating ends then). Computing on shared cores has no event
    of its own: how long it takes depends on who else computes.

    cores: of each node of `node_ranks` ranks.
    together: neighbouring ranks that communicate in every action that computes; 1 where one of them stands for all.
    sent, received: rank → until when its way out, and in, is taken; gathered: those who are there, of each group and action.
    recorded: whether the timeline is written down; end_s: when the last action ended.
    """

    cores: float | None
    node_ranks: int
    ranks: dict[int, _Rank]
    together: int = 1
    now_s: float = 0.0
    events: list[tuple[float, int, int]] = field(default_factory=list)
    computing: dict[int, _Rank] = field(default_factory=dict)
    arrivals: dict[tuple[int, Message], float] = field(default_factory=dict)  # (receiver, message) → when
    reducing: set[int] = field(default_factory=set)  # ranks that stand at their reduction, or have passed it
    sent: dict[int, float] = field(default_factory=dict)
    received: dict[int, float] = field(default_factory=dict)
    gathered: dict[tuple[int, int, int], list[int]] = field(default_factory=dict)
    recorded: bool = True
    timeline: list[Span] = field(default_factory=list)
    end_s: float = 0.0
    made: int = 0

    def __post_init__(self) -> None:
        self.meets = _meets(self.ranks)

    def play(self) -> list[Span]:
        for rank in self.ranks:
            self._go_on(rank)
        while self.events or self.computing:
            for rank in self._next():
                self._go_on(rank)
        stuck = {rank: str(state.told(state.actions[state.at])) for rank, state in self.ranks.items() if not state.done}
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
                until_s = self.now_s + state.row.seconds[state.at][1]
                if action.receives:
                    until_s = max(until_s, self.arrivals[rank, action.message])
                if until_s > self.now_s + _TINY_S:
                    return self._wake(rank, until_s)
            self._end(rank, state, action)
        return None

    def _begin(self, rank: int, state: _Rank, action: Action) -> None:
        state.start_s, state.compute_s = self.now_s, state.row.seconds[state.at][0] * state.factor
        if action.sends:
            message, peer = action.message, state.peer(action)
            self.arrivals[peer, message] = self._carried(rank, peer, state.transfer_s[action.edge])
            other = self.ranks[peer]
            if other.phase == "waiting" and other.actions[other.at].receives and other.actions[other.at].message == message:
                self._wake(peer, self.now_s)

    def _carried(self, source: int, target: int, seconds: float) -> float:
        """When a message that is sent now is there: the switches between hold what the receiver's way in cannot take yet."""
        self.sent[source] = max(self.now_s, self.sent.get(source, 0.0)) + seconds
        self.received[target] = max(self.sent[source], self.received.get(target, 0.0) + seconds)
        return self.received[target]

    def _compute(self, rank: int, state: _Rank) -> None:
        state.phase = "computing"
        if self.cores:
            self.computing[rank] = state
        else:
            self._wake(rank, self.now_s + state.compute_s)

    def _ready(self, rank: int, state: _Rank, action: Action) -> bool:
        if action.receives:
            return (rank, action.message) in self.arrivals
        if action.kind is Kind.REDUCE:
            return self._all_reduce(rank)
        return self.together == 1 or action.kind not in _TOGETHER or self._gathered(rank, state)

    def _gathered(self, rank: int, state: _Rank) -> bool:
        """Whether all that do this together with the rank are there; the last to come wakes the others."""
        here = self.gathered.setdefault((state.pipe, rank // self.together, state.at), [])
        if rank not in here:
            here.append(rank)
            if len(here) == self.together:
                for other in here:
                    if other != rank:
                        self._wake(other, self.now_s)
        return len(here) == self.together

    def _all_reduce(self, rank: int) -> bool:
        """Whether all whose gradients are summed with this rank's are there; the last to come wakes the others."""
        group = self.meets[rank]
        complete = group <= self.reducing | {rank}
        if complete and rank not in self.reducing:
            for other in group - {rank}:
                self._wake(other, self.now_s)
        self.reducing.add(rank)
        return complete

    def _end(self, rank: int, state: _Rank, action: Action) -> None:
        self.end_s = max(self.end_s, self.now_s)
        if self.recorded:
            stage = state.row.stages[state.at]
            self.timeline.append(Span(rank=rank, stage=stage, action=state.told(action), start_s=state.start_s, end_s=self.now_s))
        state.at, state.phase = state.at + 1, ""

    def _wake(self, rank: int, when_s: float) -> None:
        heapq.heappush(self.events, (when_s, self.made, rank))
        self.made += 1

    def _rates(self) -> dict[int, float]:
        """Of each rank that computes, its part of a core: those of a node share the node's."""
        if not self.cores:
            return dict.fromkeys(self.computing, 1.0)
        crowds = Counter(rank // self.node_ranks for rank in self.computing)
        return {rank: min(1.0, self.cores / crowds[rank // self.node_ranks]) for rank in self.computing}

    def _next(self) -> list[int]:
        """Lets time pass until the next end; whose."""
        ended = self._computed() if self.computing else []
        if not ended:
            self.now_s = max(self.now_s, self.events[0][0])
        while self.events and self.events[0][0] <= self.now_s:
            rank = heapq.heappop(self.events)[2]
            if rank in self.computing:  # woken for what it had found by itself at this very moment
                continue
            if self.ranks[rank].phase == "computing":
                self.ranks[rank].phase = "waiting"
            ended.append(rank)
        return ended

    def _computed(self) -> list[int]:
        """Lets those on shared cores compute until one of them, or an event, ends; those of them that do."""
        rates = self._rates()
        soonest = min(state.compute_s / rates[rank] for rank, state in self.computing.items())
        passed = min(soonest, self.events[0][0] - self.now_s if self.events else float("inf"))
        self.now_s += max(passed, 0.0)
        for rank, state in self.computing.items():
            state.compute_s -= passed * rates[rank]
        ended = [rank for rank, state in self.computing.items() if state.compute_s <= _TINY_S]
        for rank in ended:
            self.computing.pop(rank).phase = "waiting"
        return ended
