"""Plays all ranks' programs under the strictest reading, to see that none waits for ever.

A send ends only when its receiver stands at the matching receive; a collective, when all ranks of its group stand at it, with the same
message, dtype, operation and implementation. What gets through this gets through any real transport, which lets some of them end earlier.

Where it gets stuck, the schedule is drawn around the place, `[…]` marking where each rank stands:

    rank 0   F0   F0→1  [F1]   F1→1      F1 forward of microbatch 1, F1→1 its result sent to rank 1, F1←0 received from rank 0
    rank 1  [F0←0] F0    B0    B0→0      B1, B1→0, B1←1 likewise backward, (B1←1) posted ahead; F1.1, W1.1 of the rank's chunk 1;
                                         W1 the weights' part; P prelude, R reduction, U update
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from shardwise.errors import CheckError
from shardwise.program.actions import Action, Kind, Message
from shardwise.program.program import Program
from shardwise.program.reductions import Reduction, Regathering, reductions, regatherings
from shardwise.program.transfers import meet
from shardwise.sharding.collectives import COLLECTIVES, group_ranks

__all__ = ["Meeting", "check_order", "drawn", "grid"]

Choose = Callable[[str, int, int], str]
_SHOWN = 3  # details of a collective
_AROUND = 5  # actions drawn before and after the place where a rank stands


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """A collective as one rank sees it; it must be equal on all ranks of the group.

    message: shape over the whole group; details: dims, sizes, operation, or the parameters whose gradients it sums.
    """

    group: str
    kind: str
    message: tuple[int, ...]
    dtype: str
    details: tuple[Any, ...]
    impl: str
    module: str = ""

    def __str__(self) -> str:
        shown = [str(each) for each in self.details]
        details = "".join(f", {each}" for each in (shown if len(shown) <= _SHOWN else [*shown[: _SHOWN - 1], f"… {len(shown)} in all"]))
        return f"{self.kind} of {self.dtype} {list(self.message)} over {self.group} ({self.impl}{details})"


@dataclass(kw_only=True)
class _Rank:
    """actions with what they wait for: transfers themselves, then the collectives inside."""

    program: Program
    steps: list[tuple[int, Action | Meeting]]
    at: int = 0

    @property
    def done(self) -> bool:
        return self.at >= len(self.steps)

    @property
    def now(self) -> Action | Meeting:
        return self.steps[self.at][1]

    @property
    def place(self) -> int:
        """Number of the action it stands at."""
        return len(self.program.actions) if self.done else self.steps[self.at][0]

    def __str__(self) -> str:
        if self.done:
            return f"rank {self.program.rank} has ended its step"
        inside = f" in `{self.program.actions[self.place]}`" if isinstance(self.now, Meeting) else ""
        module = f" of {self.now.module}" if isinstance(self.now, Meeting) and self.now.module else ""
        return f"rank {self.program.rank} ({self.program.where}) stands at `{self.now}`{inside}{module}"


def check_order(programs: Mapping[int, Program], choose: Choose) -> None:
    """Raises CheckError where the programs of all ranks do not go together. choose: of the implementation of a reduction's collective."""
    ranks = {rank: _Rank(program=program, steps=list(_steps(program, choose))) for rank, program in sorted(programs.items())}
    pending = deque(ranks)
    while pending:
        rank = pending.popleft()
        while (met := _meets(rank, ranks)) is not None:
            for other in met:
                ranks[other].at += 1
            pending.extend(other for other in met if other != rank)
    if stuck := [rank for rank, state in ranks.items() if not state.done]:
        raise CheckError(_stuck_text(stuck, ranks))


def _steps(program: Program, choose: Choose) -> Iterator[tuple[int, Action | Meeting]]:
    inside = {
        (kind, number): [_meeting(node, program) for node in _collectives(graph)]
        for number, stage in program.stages.items()
        for kind, graph in stage.graphs.items()
    }
    once = {
        Kind.PRELUDE: [meeting for number in program.stages for meeting in inside[Kind.PRELUDE, number]],
        Kind.REDUCE: list(_reduction_meetings(program, choose)),
        Kind.UPDATE: list(_update_meetings(program, choose)),
    }
    posted: set[Message] = set()
    for number, action in enumerate(program.actions):
        if action.posts:
            posted.add(action.message)
        if action.sends or action.posts or (action.receives and action.message not in posted):
            yield number, action
        for meeting in once.get(action.kind, inside.get((action.kind, action.stage), ())):
            yield number, meeting


def _collectives(graph: fx.Graph) -> Iterator[fx.Node]:
    return (node for node in graph.nodes if node.op == "call_function" and node.target in COLLECTIVES)


def _meeting(node: fx.Node, program: Program) -> Meeting:
    kind = COLLECTIVES[node.target]  # type: ignore[index]
    source, group, *rest = node.args
    assert isinstance(source, fx.Node) and isinstance(group, str)
    members = group_ranks(group)
    if program.rank not in members:
        raise CheckError(f"rank {program.rank} calls {kind} over {group}, of which it is no member")
    message, details = _message(kind, node, source.meta["val"].shape, list(rest[:-1]), members.index(program.rank), program)
    return Meeting(
        group=group,
        kind=kind,
        message=message,
        dtype=str(source.meta["val"].dtype).removeprefix("torch."),
        details=details,
        impl=str(rest[-1]),
        module=str(node.meta.get("module", "")),
    )


def _message(
    kind: str, node: fx.Node, given: Sequence[int], rest: list[Any], index: int, program: Program
) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """Shape over the whole group, and the arguments that are equal on all of its ranks; `index`: this rank's place in it."""
    shape = list(given)
    if kind == "exchange_rows":
        rest = rest[2:]  # how many rows the routing sends is known when it runs
    if kind in ("reduce_scatter", "all_to_all", "shift"):
        place = rest.pop()
        if place != index:
            raise CheckError(f"rank {program.rank} is number {index} of {node.args[1]}, {node.name} takes it for number {place}")
    if kind == "reduce_scatter":
        _expect(program, node, shape[rest[0]], sum(rest[1]))
    elif kind in ("all_gather", "all_to_all"):
        dim, sizes = rest[-2:]
        _expect(program, node, shape[dim], sizes[index])
        shape[dim] = sum(sizes)
    elif kind == "shift":
        dim, sizes, step = rest
        _expect(program, node, shape[dim], sizes[(index - step) % len(sizes)])
        shape[dim] = sum(sizes)
    return tuple(shape), tuple(tuple(each) if isinstance(each, list) else each for each in rest)


def _expect(program: Program, node: fx.Node, given: int, expected: int) -> None:
    if given != expected:
        raise CheckError(f"rank {program.rank} gives {given} elements to {node.name} over {node.args[1]}, which expects {expected} of it")


def _reduction_meetings(program: Program, choose: Choose) -> Iterator[Meeting]:
    for reduction in reductions(program):
        if reduction.scatter:
            yield _meeting_of("reduce_scatter", reduction.scatter, sum(reduction.sizes), reduction, choose)
        for group in reduction.groups:
            yield _meeting_of("all_reduce", group, reduction.summed, reduction, choose)


def _update_meetings(program: Program, choose: Choose) -> Iterator[Meeting]:
    for gathered in regatherings(program):
        yield _meeting_of("all_gather", gathered.group, gathered.numel, gathered, choose)


def _meeting_of(kind: str, group: str, numel: int, message: Reduction | Regathering, choose: Choose) -> Meeting:
    return Meeting(
        group=group,
        kind=kind,
        message=(numel,),
        dtype=str(message.dtype).removeprefix("torch."),
        details=tuple(parameter.name for parameter in message.parameters),
        impl=choose(kind, numel * message.dtype.itemsize, len(group_ranks(group))),
    )


def _meets(rank: int, ranks: Mapping[int, _Rank]) -> list[int] | None:
    """The ranks that go on together with this one; None when it must wait."""
    state = ranks[rank]
    if state.done:
        return None
    now = state.now
    if isinstance(now, Meeting):
        members = group_ranks(now.group)
        others = [ranks[other] for other in members]
        if any(other.done or not isinstance(other.now, Meeting) or other.now.group != now.group for other in others):
            return None
        for other in others:
            if other.now != now and _without_module(other.now) != _without_module(now):
                raise CheckError(_unlike_text(state, other, ranks))
        return members
    other = ranks[now.peer]
    here = None if other.done else other.now
    return [rank, now.peer] if isinstance(here, Action) and meet(now, here, rank) else None


def _without_module(meeting: Action | Meeting) -> tuple[Any, ...]:
    assert isinstance(meeting, Meeting)
    return meeting.group, meeting.kind, meeting.message, meeting.dtype, meeting.details, meeting.impl


# -- what is said --------------------------------------------------------------------------------------------------------------------------


def _unlike_text(one: _Rank, other: _Rank, ranks: Mapping[int, _Rank]) -> str:
    return f"two ranks meet in unlike collectives:\n  {one}\n  {other}\n{grid(ranks, [one.program.rank, other.program.rank])}"


def _stuck_text(stuck: list[int], ranks: Mapping[int, _Rank]) -> str:
    lines = [f"{len(stuck)} of {len(ranks)} ranks would wait for ever:"]
    lines += [f"  {ranks[rank]}" for rank in stuck[:8]]
    return "\n".join([*lines, grid(ranks, stuck[:8])])


def grid(ranks: Mapping[int, _Rank], shown: list[int]) -> str:
    """The actions around the place where each rank stands, one line a rank."""
    rows = {rank: _row(ranks[rank]) for rank in sorted(shown)}
    columns = max(len(row) for row in rows.values())
    widths = [max((len(row[column]) for row in rows.values() if column < len(row)), default=0) for column in range(columns)]
    return "\n".join(
        f"  rank {rank:<3} " + " ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
        for rank, row in rows.items()
    )


def _row(state: _Rank) -> list[str]:
    """The marked action in the middle column."""
    return _around(state.program, state.place)


def drawn(program: Program, place: int) -> str:
    """A rank's actions around the marked one, as in the grid; its end where `place` is their number."""
    return f"  rank {program.rank:<3} " + " ".join(_around(program, place)).strip()


def _around(program: Program, place: int) -> list[str]:
    chunk = {stage: f".{number}" if number else "" for number, stage in enumerate(program.stages)}
    cells = [_cell(action, chunk) for action in program.actions] + ["end"]
    cells[place] = f"[{cells[place]}]"
    first, last = place - _AROUND, place + _AROUND
    before = ["…" if first > 0 else "", *([""] * max(0, -first))]
    return [*before, *cells[max(0, first) : last + 1], *(["…"] if last + 1 < len(cells) else [])]


_LETTERS = {
    Kind.PRELUDE: "P",
    Kind.FORWARD: "F",
    Kind.SEND: "F",
    Kind.RECV: "F",
    Kind.POST: "F",
    Kind.WEIGHT: "W",
    Kind.REDUCE: "R",
    Kind.UPDATE: "U",
}


def _cell(action: Action, chunk: Mapping[int, str]) -> str:
    letter = _LETTERS.get(action.kind, "B")
    if action.microbatch < 0:
        return letter
    arrow = f"→{action.peer}" if action.sends else f"←{action.peer}" if action.edge else ""
    cell = f"{letter}{action.microbatch}{chunk.get(action.stage, '')}{arrow}"
    return f"({cell})" if action.posts else cell
