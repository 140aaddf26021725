"""Puts sends and receives into the ranks' action lists so that they cannot deadlock even where a send blocks until it is received.

Every forward is preceded by the receives of what it reads and followed by the sends of what it makes; backward likewise. Played under the
strictest reading (a send ends only when its receiver is at the matching receive), ranks may then stand at sends to each other in a circle;
there one of them posts its receive before its send: it begins to receive and goes on, and waits for the message where it did before.

    rank 0  … makes x at 3  send x …  receive y      both stand at their sends: with `post x` before `send y` rank 1 is ready for x when
    rank 1  … makes y at 9  send y …  receive x      it comes, and rank 0 goes on

What comes out is played again by `shardwise.program.order`, where a post blocks as a receive would.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from shardwise.program.actions import Action, Kind, Message
from shardwise.program.tables import Slot

__all__ = ["meet", "order_transfers", "rank_actions"]

Lists = dict[int, list[Action]]


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


def rank_actions(slots: Sequence[Slot], edges: Sequence[Link], peer: Callable[[int], int]) -> list[Action]:
    """A rank's slots as actions; it has one stage or several, between which nothing is sent. `peer`: stage → its rank."""
    own = {slot.stage for slot in slots}
    between = sorted((edge for edge in edges if (edge.source in own) != (edge.target in own)), key=_order)
    around = {(kind, stage): _around(kind, stage, between, peer) for kind in _RECEIVED_BY for stage in own}
    actions: list[Action] = []
    for kind, stage, microbatch in slots:
        get, before, put, after = around.get((kind, stage), _NOTHING)
        actions += [Action(kind=get, microbatch=microbatch, stage=stage, edge=name, peer=rank) for name, rank in before]
        actions.append(Action(kind=kind, microbatch=microbatch, stage=stage))
        actions += [Action(kind=put, microbatch=microbatch, stage=stage, edge=name, peer=rank) for name, rank in after]
    return actions


_Ends = list[tuple[str, int]]  # (edge, rank at its other end)
_RECEIVED_BY = {Kind.FORWARD: Kind.RECV, Kind.BACKWARD: Kind.RECV_GRAD}
_SENT_AFTER = {Kind.FORWARD: Kind.SEND, Kind.BACKWARD: Kind.SEND_GRAD}
_NOTHING: tuple[Kind, _Ends, Kind, _Ends] = (Kind.RECV, [], Kind.SEND, [])


def _around(kind: Kind, stage: int, edges: Sequence[Link], peer: Callable[[int], int]) -> tuple[Kind, _Ends, Kind, _Ends]:
    """What is received before a stage's forward or backward, and what is sent after it."""
    inward = [edge for edge in edges if edge.target == stage]
    outward = [edge for edge in edges if edge.source == stage]
    get, put = _RECEIVED_BY[kind], _SENT_AFTER[kind]
    if kind is Kind.FORWARD:
        return get, [(edge.name, peer(edge.source)) for edge in inward], put, [(edge.name, peer(edge.target)) for edge in outward]
    before = [(edge.name, peer(edge.target)) for edge in outward if edge.requires_grad]
    return get, before, put, [(edge.name, peer(edge.source)) for edge in inward if edge.requires_grad]


def _order(edge: Link) -> tuple[int, int, str]:
    return edge.source, edge.target, edge.name


def meet(action: Action, other: Action, rank: int) -> bool:
    """Whether `other` is the other side of the transfer that `rank` performs: a send's is a receive or a post."""
    return other.message == action.message and other.peer == rank and other.sends != action.sends


_POSTED = {Kind.RECV: Kind.POST, Kind.RECV_GRAD: Kind.POST_GRAD}


def order_transfers(lists: Lists) -> Lists:
    """The lists with receives posted before sends until no rank waits for ever, and with what each receive proves."""
    play = _Play(lists=lists)
    moving = list(lists)
    while True:
        play.advance(moving)
        if not any(play.waiting.values()):
            return _with_proofs(play.done)
        moving = play.post_one()
        if not moving:
            raise AssertionError(f"no receive can be posted to free {[str(a[0]) for a in play.waiting.values() if a]}")


def _with_proofs(lists: Lists) -> Lists:
    """The lists with what each receive proves to have arrived."""
    place = {
        rank: {action.message: n for n, action in enumerate(actions) if action.sends or action.receives} for rank, actions in lists.items()
    }
    found: Lists = {}
    for rank, actions in lists.items():
        sent: dict[int, list[Message]] = {}
        found[rank] = []
        for action in actions:
            if action.sends:
                sent.setdefault(action.peer, []).append(action.message)
            elif action.receives:
                there, open_ = place[action.peer], sent.get(action.peer, [])
                proves = tuple(message for message in open_ if there[message] < there[action.message])
                sent[action.peer] = [message for message in open_ if message not in proves]
                action = replace(action, proves=proves)
            found[rank].append(action)
    return found


@dataclass(kw_only=True)
class _Play:
    """waiting: what each rank has yet to do; posted: (rank, message) whose receive was begun early."""

    lists: Lists
    posted: set[tuple[int, Message]] = field(default_factory=set)
    made: Mapping[Message, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.waiting = {rank: deque(actions) for rank, actions in self.lists.items()}
        self.done: Lists = {rank: [] for rank in self.lists}

    def advance(self, moving: list[int]) -> None:
        """Lets the ranks in `moving`, and those that they meet, go on until each stands at a transfer whose other side is elsewhere."""
        waiting, done = self.waiting, self.done
        while moving:
            rank = moving.pop()
            actions = waiting[rank]
            while actions:
                first = actions[0]
                if first.edge and not (first.receives and (rank, first.message) in self.posted):
                    other = waiting[first.peer]
                    if not other or not meet(first, other[0], rank):
                        break
                    done[first.peer].append(other.popleft())
                    moving.append(first.peer)
                done[rank].append(actions.popleft())

    def post_one(self) -> list[int]:
        """Has one receive, for which a rank stands at its send, posted by its receiver; the two ranks, none where there is none.

        Only within a circle of ranks that wait for each other: a rank outside of it waits for something that is still to come. What is
        made first is posted first, so that a transport that keeps the order of messages need not hold up the earlier one.
        """
        self.made = self.made or _made(self.lists)
        sending = [(rank, self.waiting[rank][0]) for rank in _circle(self.waiting) if self.waiting[rank][0].sends]
        for rank, first in sorted(sending, key=lambda each: (self.made.get(each[1].message, 0), each[1].kind is Kind.SEND_GRAD, -each[0])):
            other = self.waiting[first.peer]
            if (wanted := next((action for action in other if action.receives and meet(first, action, rank)), None)) is not None:
                other.appendleft(replace(wanted, kind=_POSTED[wanted.kind]))
                self.posted.add((first.peer, first.message))
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


def _circle(waiting: Mapping[int, deque[Action]]) -> list[int]:
    """Ranks of which each waits for the next and the last for the first."""
    path = [next(rank for rank, actions in waiting.items() if actions)]
    while True:
        following = waiting[path[-1]][0].peer
        if following in path:
            return path[path.index(following) :]
        if not waiting[following]:
            return []
        path.append(following)
