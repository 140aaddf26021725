"""Puts sends and receives into the ranks' action lists so that they cannot deadlock even where a send blocks until it is received.

Every forward is preceded by the receives of what it reads and followed by the sends of what it makes; backward likewise. Played under the
strictest reading (a send ends only when its receiver is at the matching receive), two ranks may then stand at sends to each other; there
the receive of one is moved before its send. What comes out is played again by `shardwise.program.check`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from shardwise.program.actions import Action, Kind
from shardwise.program.schedules import Table

__all__ = ["matching", "order_transfers", "with_transfers"]

Lists = dict[int, list[Action]]
Waiting = dict[int, deque[Action]]


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
    inward = [edge for edge in edges if edge.target == stage]
    outward = [edge for edge in edges if edge.source == stage]
    actions: list[Action] = []
    for kind, microbatch in table:
        forward = kind is Kind.FORWARD
        before = inward if forward else [edge for edge in outward if edge.requires_grad]
        after = outward if forward else [edge for edge in inward if edge.requires_grad]
        get, put = (Kind.RECV, Kind.SEND) if forward else (Kind.RECV_GRAD, Kind.SEND_GRAD)
        actions += [
            Action(kind=get, microbatch=microbatch, edge=edge.name, peer=peer(_far(edge, stage))) for edge in sorted(before, key=_order)
        ]
        actions.append(Action(kind=kind, microbatch=microbatch))
        actions += [
            Action(kind=put, microbatch=microbatch, edge=edge.name, peer=peer(_far(edge, stage))) for edge in sorted(after, key=_order)
        ]
    return actions


def _far(edge: Link, stage: int) -> int:
    return edge.source if edge.target == stage else edge.target


def _order(edge: Link) -> tuple[int, int, str]:
    return edge.source, edge.target, edge.name


def matching(action: Action, rank: int) -> Action:
    """The other side of a transfer that `rank` takes part in."""
    return Action(kind=_OTHER[action.kind], microbatch=action.microbatch, edge=action.edge, peer=rank)


def order_transfers(lists: Lists) -> Lists:
    """The lists with receives moved forward until no rank waits for ever."""
    waiting = {rank: deque(actions) for rank, actions in lists.items()}
    done: Lists = {rank: [] for rank in lists}
    moving = list(waiting)
    while True:
        _advance(waiting, done, moving)
        if not any(waiting.values()):
            return done
        moving = _hoist(waiting)
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
                if not other or other[0] != matching(first, rank):
                    break
                done[first.peer].append(other.popleft())
                moving.append(first.peer)
            done[rank].append(actions.popleft())


def _hoist(waiting: Waiting) -> list[int]:
    """Moves one receive, for which a rank stands at its send, to the front of its receiver's list; the two ranks, none where there is none.

    Only within a circle of ranks that wait for each other: a rank outside of it waits for something that is still to come, and moving its
    receive forward would make others wait for that, too. Results go before gradients: they keep more stages busy.
    """
    circle = _circle(waiting)
    for kind in (Kind.SEND, Kind.SEND_GRAD):
        for rank in sorted(circle, reverse=True):
            first = waiting[rank][0]
            wanted, other = matching(first, rank), waiting[first.peer]
            if first.kind is kind and wanted in other:
                other.remove(wanted)
                other.appendleft(wanted)
                return [rank, first.peer]
    return []


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
