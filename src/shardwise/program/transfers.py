"""Puts sends and receives into the ranks' action lists so that they cannot deadlock even where a send blocks until it is received.

Every forward is preceded by the receives of what it reads and followed by the sends of what it makes; backward likewise. Played under the
strictest reading (a send ends only when its receiver is at the matching receive), two ranks may then stand at sends to each other; there
the receive of one is moved before its send. What comes out is played again by `shardwise.program.check`.

A receive that is moved forward holds its rank up until the message is there:

    rank 0  … makes x at 3 [send x] … receive y      both stand at their sends: with `receive y` before `send x` rank 0 waits from 3 to 9,
    rank 1  … makes y at 9 [send y] … receive x      with `receive x` before `send y` nobody waits

With one stage a rank and a whole backward pass the two are made at about the same time; for other schedules `in_time` finds out when.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from shardwise.program.actions import Action, Kind
from shardwise.program.schedules import Table
from shardwise.program.tables import Slot

__all__ = ["matching", "order_transfers", "rank_actions", "with_transfers"]

Lists = dict[int, list[Action]]
Waiting = dict[int, deque[Action]]
Message = tuple[str, int, bool]  # as of `Action.message`


class Link(Protocol):
    """A value that goes from stage to stage."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> int: ...
    @property
    def target(self) -> int: ...
    @property
    def requires_grad(self) -> bool: ...


_OTHER = {Kind.SEND: Kind.RECV, Kind.RECV: Kind.SEND, Kind.SEND_GRAD: Kind.RECV_GRAD, Kind.RECV_GRAD: Kind.SEND_GRAD}


def with_transfers(table: Table, stage: int, edges: Sequence[Link], peer: Callable[[int], int]) -> list[Action]:
    """A stage's table as actions. `peer`: stage → the rank there that holds the same part."""
    return rank_actions([Slot(kind, stage, microbatch) for kind, microbatch in table], edges, peer)


def rank_actions(slots: Sequence[Slot], edges: Sequence[Link], peer: Callable[[int], int]) -> list[Action]:
    """A rank's slots as actions; it has one stage or several, between which nothing is sent. `peer`: stage → its rank."""
    own = {slot.stage for slot in slots}
    between = sorted((edge for edge in edges if (edge.source in own) != (edge.target in own)), key=_order)
    around = {(kind, stage): _around(kind, stage, between, peer) for kind in _RECEIVED_BY for stage in own}
    actions: list[Action] = []
    for kind, stage, microbatch in slots:
        get, before, put, after = around.get((kind, stage), _NOTHING)
        actions += [Action(kind=get, microbatch=microbatch, edge=name, peer=rank) for name, rank in before]
        actions.append(Action(kind=kind, microbatch=microbatch, stage=stage if len(own) > 1 else -1))
        actions += [Action(kind=put, microbatch=microbatch, edge=name, peer=rank) for name, rank in after]
    return actions


_Ends = list[tuple[str, int]]  # (edge, rank at its other end)
_RECEIVED_BY = {Kind.FORWARD: Kind.RECV, Kind.BACKWARD: Kind.RECV_GRAD}
_NOTHING: tuple[Kind, _Ends, Kind, _Ends] = (Kind.RECV, [], Kind.SEND, [])


def _around(kind: Kind, stage: int, edges: Sequence[Link], peer: Callable[[int], int]) -> tuple[Kind, _Ends, Kind, _Ends]:
    """What is received before a stage's forward or backward, and what is sent after it."""
    inward = [edge for edge in edges if edge.target == stage]
    outward = [edge for edge in edges if edge.source == stage]
    get = _RECEIVED_BY[kind]
    if kind is Kind.FORWARD:
        return get, [(edge.name, peer(edge.source)) for edge in inward], _OTHER[get], [(edge.name, peer(edge.target)) for edge in outward]
    before = [(edge.name, peer(edge.target)) for edge in outward if edge.requires_grad]
    return get, before, _OTHER[get], [(edge.name, peer(edge.source)) for edge in inward if edge.requires_grad]


def _order(edge: Link) -> tuple[int, int, str]:
    return edge.source, edge.target, edge.name


def matching(action: Action, rank: int) -> Action:
    """The other side of a transfer that `rank` takes part in."""
    return Action(kind=_OTHER[action.kind], microbatch=action.microbatch, edge=action.edge, peer=rank)


def _meet(action: Action, other: Action, rank: int) -> bool:
    """Whether `other` is the other side of `rank`'s transfer."""
    return other.edge == action.edge and other.microbatch == action.microbatch and other.peer == rank and other.kind is _OTHER[action.kind]


def order_transfers(lists: Lists, *, in_time: bool = False) -> Lists:
    """The lists with receives moved forward until no rank waits for ever.

    in_time: move first what is made first, if each computation takes one unit of time and messages none.
    """
    made = _made(lists) if in_time else {}
    waiting = {rank: deque(actions) for rank, actions in lists.items()}
    done: Lists = {rank: [] for rank in lists}
    moving = list(waiting)
    while True:
        _advance(waiting, done, moving)
        if not any(waiting.values()):
            return done
        moving = _hoist(waiting, made)
        if not moving:
            raise AssertionError(f"no receive can be moved to free {[str(a[0]) for a in waiting.values() if a]}")


def _advance(waiting: Waiting, done: Lists, moving: list[int]) -> None:
    """Lets the ranks in `moving`, and those that they meet, go on until each stands at a transfer whose other side is elsewhere."""
    while moving:
        rank = moving.pop()
        actions = waiting[rank]
        while actions:
            first = actions[0]
            if first.edge:
                other = waiting[first.peer]
                if not other or not _meet(first, other[0], rank):
                    break
                done[first.peer].append(other.popleft())
                moving.append(first.peer)
            done[rank].append(actions.popleft())


def _hoist(waiting: Waiting, made: Mapping[Message, int]) -> list[int]:
    """Moves one receive, for which a rank stands at its send, to the front of its receiver's list; the two ranks, none where there is none.

    Only within a circle of ranks that wait for each other: a rank outside of it waits for something that is still to come, and moving its
    receive forward would make others wait for that, too. What is made first goes first, where that is known; then results go before
    gradients: they keep more stages busy.
    """
    sending = [(rank, waiting[rank][0]) for rank in _circle(waiting) if waiting[rank][0].sends]
    for rank, first in sorted(sending, key=lambda each: (made.get(each[1].message, 0), each[1].kind is Kind.SEND_GRAD, -each[0])):
        wanted, other = matching(first, rank), waiting[first.peer]
        if wanted in other:
            other.remove(wanted)
            other.appendleft(wanted)
            return [rank, first.peer]
    return []


def _made(lists: Lists) -> dict[Message, int]:
    """When each message is made, in units of one computation, where sends do not block."""
    made: dict[Message, int] = {}
    now = dict.fromkeys(lists, 0)
    left = {rank: iter(actions) for rank, actions in lists.items()}
    wanted: dict[Message, int] = {}
    moving = list(lists)
    while moving:
        rank = moving.pop()
        for action in left[rank]:
            if not action.edge:
                now[rank] += 1
                continue
            message = action.message
            if action.sends:
                made[message] = now[rank]
                if message in wanted:
                    other = wanted.pop(message)
                    now[other] = max(now[other], made[message])
                    moving.append(other)
            elif message in made:
                now[rank] = max(now[rank], made[message])
            else:
                wanted[message] = rank
                break
    return made


def _circle(waiting: Waiting) -> list[int]:
    """Ranks of which each waits for the next and the last for the first."""
    path = [next(rank for rank, actions in waiting.items() if actions)]
    while True:
        following = waiting[path[-1]][0].peer
        if following in path:
            return path[path.index(following) :]
        if not waiting[following]:
            return []
        path.append(following)
