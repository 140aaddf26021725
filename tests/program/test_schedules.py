"""Schedule tables, and transfers that cannot deadlock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.program import schedules
from shardwise.program.actions import Action, Kind, Message
from shardwise.program.schedules import SCHEDULES, Table
from shardwise.program.tables import NAMES, Tables, placement, rank_tables, splits_backward
from shardwise.program.transfers import meet, order_transfers, rank_actions

stages_and_microbatches = st.tuples(st.integers(1, 6), st.integers(1, 12))


@given(stages_and_microbatches, st.sampled_from(sorted(SCHEDULES)))
def test_every_stage_does_every_microbatch_once_each_way(sizes: tuple[int, int], name: str) -> None:
    stages, microbatches = sizes
    for stage in range(stages):
        table = SCHEDULES[name](stage, stages, microbatches)
        assert sorted(table) == sorted((kind, m) for kind in (Kind.FORWARD, Kind.BACKWARD) for m in range(microbatches))
        for kind in (Kind.FORWARD, Kind.BACKWARD):
            assert [m for k, m in table if k is kind] == list(range(microbatches)), "in order, so that messages are in order"
        for m in range(microbatches):
            assert table.index((Kind.FORWARD, m)) < table.index((Kind.BACKWARD, m))


def drawn(name: str) -> list[str]:
    """The rows of a schedule's picture in the module's docstring."""
    lines = (schedules.__doc__ or "").splitlines()
    start = next(number for number, line in enumerate(lines) if "gpipe, 3 stages" in line)
    column = lines[start].index("1f1b") if name == "1f1b" else lines[start].index("gpipe")
    end = None if name == "1f1b" else lines[start].index("1f1b")
    return [line[column:end].rstrip() for line in lines[start + 1 : start + 4]]


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_the_tables_are_those_of_the_picture(name: str) -> None:
    """Played in unit time, an idle slot is a dot."""
    stages, microbatches = 3, 4
    rows = played({stage: SCHEDULES[name](stage, stages, microbatches) for stage in range(stages)})
    for stage, row in rows.items():
        picture = drawn(name)[stage].split()[1:]
        assert row == picture[: len(row)], f"{name}, stage {stage}"


def played(tables: dict[int, Table]) -> dict[int, list[str]]:
    """What each stage does in each unit of time, when a forward waits for the stage before and a backward for the stage after."""
    at = dict.fromkeys(tables, 0)
    done: set[tuple[int, Kind, int]] = set()
    rows: dict[int, list[str]] = {stage: [] for stage in tables}
    while any(at[stage] < len(table) for stage, table in tables.items()):
        now = []
        for stage, table in tables.items():
            if at[stage] == len(table):
                continue
            kind, m = table[at[stage]]
            needs = (stage - 1, kind, m) if kind is Kind.FORWARD else (stage + 1, kind, m)
            if needs in done or needs[0] not in tables:
                rows[stage].append(f"{'F' if kind is Kind.FORWARD else 'B'}{m}")
                now.append((stage, kind, m))
                at[stage] += 1
            else:
                rows[stage].append(".")
        assert now, "the schedule is stuck"
        done.update(now)
    return rows


# -- transfers -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    name: str
    source: int
    target: int
    requires_grad: bool


@st.composite
def chunked(draw: st.DrawFn) -> tuple[str, int, int, int, list[Link]]:
    """Schedule, ranks, chunks, microbatches and edges: at least one between neighbouring stages, and any that skip stages."""
    name = draw(st.sampled_from(NAMES))
    ranks, chunks = draw(st.integers(2, 5)), {"interleaved": draw(st.integers(2, 3)), "zb-v": 2}.get(name, 1)
    stages = ranks * chunks
    pairs = [(source, target) for source in range(stages) for target in range(source + 1, stages)]
    chosen = [(s, s + 1) for s in range(stages - 1)] + draw(st.lists(st.sampled_from(pairs), max_size=6))
    links = [Link(f"v{number}", source, target, draw(st.booleans())) for number, (source, target) in enumerate(chosen)]
    return name, ranks, chunks, draw(st.integers(1, 9)), links


@settings(max_examples=300, deadline=None)
@given(chunked())
def test_no_rank_waits_for_ever_where_sends_block(pipeline: tuple[str, int, int, int, list[Link]]) -> None:
    name, ranks, chunks, microbatches, links = pipeline
    home = placement(name, ranks, chunks)
    tables = rank_tables(name, ranks, chunks, microbatches)
    lists = {rank: rank_actions(row, links, home.__getitem__) for rank, row in enumerate(tables)}
    ordered = order_transfers(lists)
    for rank, actions in ordered.items():
        assert [action for action in actions if not action.posts] == lists[rank], "nothing is moved, lost or invented"
        assert [(a.kind, a.stage, a.microbatch) for a in actions if not a.edge] == tables[rank]
        assert all(a.peer != rank for a in actions), "nothing is sent between stages of one rank"
        posts_come_before_their_receives(actions)
        for stage in {slot.stage for slot in tables[rank]}:
            of_stage = [action for action in actions if action.stage == stage]
            received_before_use(stage, of_stage, [link for link in links if home[link.source] != home[link.target]])
    blocking(ordered)
    assert splits_backward(name) or not any(a.kind is Kind.WEIGHT for actions in lists.values() for a in actions)


@settings(max_examples=200, deadline=None)
@given(chunked(), st.randoms(use_true_random=False))
def test_a_receive_proves_what_its_sender_had_received(pipeline: tuple[str, int, int, int, list[Link]], random: Random) -> None:
    """Ranks go on in any order, sends do not block. What a rank knows the other to have is what that one had when it sent what came, and
    nothing more."""
    name, ranks, chunks, microbatches, links = pipeline
    home = placement(name, ranks, chunks)
    tables = rank_tables(name, ranks, chunks, microbatches)
    left = {rank: deque(actions) for rank, actions in actions_of(tables, links, home).items()}
    got: dict[int, set[Message]] = {rank: set() for rank in left}
    under_way: dict[Message, frozenset[Message]] = {}  # and what its sender had received
    known: dict[tuple[int, int], set[Message]] = {}  # (rank, other) → what the other is proved to have
    had: dict[tuple[int, int], set[Message]] = {}  # what the other had when it sent what came
    sent: dict[tuple[int, int], set[Message]] = {}
    while moving := [
        rank for rank, actions in left.items() if actions and not (actions[0].receives and actions[0].message not in under_way)
    ]:
        rank = random.choice(moving)
        action = left[rank].popleft()
        if action.sends:
            under_way[action.message] = frozenset(got[rank])
            sent.setdefault((rank, action.peer), set()).add(action.message)
        elif action.receives:
            pair = rank, action.peer
            known.setdefault(pair, set()).update(action.proves)
            got[rank].add(action.message)
            assert set(action.proves) <= got[action.peer]
            had.setdefault(pair, set()).update(under_way[action.message] & sent.get(pair, set()))
            assert known[pair] == had[pair]
    assert not any(left.values())


def actions_of(tables: Tables, links: list[Link], home: dict[int, int]) -> dict[int, list[Action]]:
    return order_transfers({rank: rank_actions(row, links, home.__getitem__) for rank, row in enumerate(tables)})


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "zb-2p", "zb-v", "interleaved"])
def test_gradients_that_were_sent_are_not_kept_to_the_end(name: str) -> None:
    """However many microbatches: a rank keeps a few of the gradients that it sent until it knows that they have arrived."""
    chunks = {"zb-v": 2, "interleaved": 2}.get(name, 1)
    home = placement(name, 3, chunks)
    links = [Link(f"v{stage}", stage, stage + 1, True) for stage in range(3 * chunks - 1)]
    for actions in actions_of(rank_tables(name, 3, chunks, 24), links, home).values():
        held: set[Message] = set()
        for action in actions:
            held |= {action.message} if action.kind is Kind.SEND_GRAD else set()
            held -= set(action.proves)
            assert len(held) <= 2 * 3 * chunks  # as many microbatches as are in flight


def posts_come_before_their_receives(actions: list[Action]) -> None:
    for number, action in enumerate(actions):
        if action.posts:
            assert [a.message for a in actions[:number] if a.receives or a.posts].count(action.message) == 0
            assert [a.message for a in actions[number:] if a.receives].count(action.message) == 1


def test_what_is_made_first_is_posted_first() -> None:
    """Both ranks stand at their sends. Rank 1 makes y later than rank 0 makes x: the receive of x is posted, not that of y."""
    compute = Action(kind=Kind.FORWARD, microbatch=0, stage=0)
    x, y = (Action(kind=Kind.SEND, microbatch=0, edge=name, peer=peer) for name, peer in (("x", 1), ("y", 0)))
    got_x, got_y = (Action(kind=Kind.RECV, microbatch=0, edge=name, peer=peer) for name, peer in (("x", 0), ("y", 1)))
    lists = {0: [compute, x, got_y], 1: [compute, compute, y, got_x]}
    assert order_transfers(lists) == {0: lists[0], 1: [compute, compute, replace(got_x, kind=Kind.POST), y, got_x]}


def test_an_action_says_its_stage_where_a_rank_has_several() -> None:
    assert str(Action(kind=Kind.WEIGHT, microbatch=3, stage=5)) == "weight 3 of stage 5"
    assert str(Action(kind=Kind.WEIGHT, microbatch=3)) == "weight 3"
    assert [str(a) for a in rank_actions(rank_tables("zb-v", 1, 2, 1)[0], [Link("h", 0, 1, True)], lambda stage: 0)] == [
        "forward 0 of stage 0",
        "forward 0 of stage 1",
        "backward 0 of stage 1",
        "weight 0 of stage 1",
        "backward 0 of stage 0",
        "weight 0 of stage 0",
    ]


def received_before_use(stage: int, actions: list[Action], links: list[Link]) -> None:
    for number, action in enumerate(actions):
        if action.kind in (Kind.FORWARD, Kind.BACKWARD):
            before = {(a.kind, a.edge) for a in actions[:number] if a.microbatch == action.microbatch}
            if action.kind is Kind.FORWARD:
                assert all((Kind.RECV, link.name) in before for link in links if link.target == stage)
            else:
                assert all((Kind.RECV_GRAD, link.name) in before for link in links if link.source == stage and link.requires_grad)
        if action.sends:
            made = Kind.FORWARD if action.kind is Kind.SEND else Kind.BACKWARD
            assert (made, action.microbatch) in [(a.kind, a.microbatch) for a in actions[:number]]


def blocking(lists: dict[int, list[Action]]) -> None:
    """Plays the lists; a send ends only together with its receive, or the post of it."""
    at = dict.fromkeys(lists, 0)
    posted: set[tuple[int, tuple[str, int, bool]]] = set()

    def now(rank: int) -> Action | None:
        return lists[rank][at[rank]] if at[rank] < len(lists[rank]) else None

    moved = True
    while moved:
        moved = False
        for rank in lists:
            action = now(rank)
            if action is None:
                continue
            if action.peer < 0 or (action.receives and (rank, action.message) in posted):
                at[rank] += 1
                moved = True
            elif (other := now(action.peer)) is not None and meet(action, other, rank):
                posted |= {(each, a.message) for each, a in ((rank, action), (action.peer, other)) if a.posts}
                at[rank] += 1
                at[action.peer] += 1
                moved = True
    assert all(at[rank] == len(actions) for rank, actions in lists.items()), {rank: str(now(rank)) for rank in lists}


def test_a_transfer_and_its_other_side() -> None:
    send = Action(kind=Kind.SEND, microbatch=2, edge="h→1", peer=3, stage=0)
    receive = Action(kind=Kind.RECV, microbatch=2, edge="h→1", peer=1, stage=1)
    assert (str(send), str(receive)) == ("send 2 h→1 to rank 3", "recv 2 h→1 from rank 1")
    assert meet(send, receive, 1) and meet(receive, send, 3) and meet(send, replace(receive, kind=Kind.POST), 1)
    assert not meet(send, receive, 2), "the receive is of another rank's message"
    assert not meet(send, replace(receive, kind=Kind.RECV_GRAD), 1)
    assert not meet(send, replace(receive, microbatch=3), 1)
    assert not meet(send, replace(send, peer=1), 1), "two sends"
