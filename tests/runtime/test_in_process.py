"""Ranks as threads: what they exchange is what the definition says, and one that fails ends all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwise.errors import TransferError
from shardwise.runtime.in_process import run_ranks
from shardwise.runtime.transport import Transport
from shardwise.sharding import collectives
from shardwise.sharding.collectives import group_name, group_ranks

GROUPS = [("tp:0,1", 2), ("tp:0,1,2", 3), ("dp:0,2", 3)]  # and how many ranks the job has
UNEVEN = {2: [3, 1], 3: [3, 2, 1]}  # ranks of the group → sizes of their parts


def held(rank: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def on_group(group: str, ranks: int, work: Callable[[int, Transport], Any]) -> list[Any]:
    """`work` on the ranks of the group alone; their results."""
    members = group_ranks(group)
    found = run_ranks(ranks, lambda rank, transport: work(rank, transport) if rank in members else None)
    return [found[rank] for rank in members]


# -- collectives -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "ranks"), GROUPS)
def test_all_reduce_is_the_sum_and_equal_bit_by_bit(group: str, ranks: int) -> None:
    found = on_group(group, ranks, lambda rank, transport: transport.all_reduce(held(rank, 4, 5), group, "sum", "native"))
    torch.testing.assert_close(found[0], sum(held(rank, 4, 5) for rank in group_ranks(group)))
    assert all(torch.equal(each, found[0]) for each in found)


def test_all_reduce_takes_the_largest() -> None:
    found = run_ranks(3, lambda rank, transport: transport.all_reduce(held(rank, 7), "tp:0,1,2", "max", "native"))
    wanted = torch.stack([held(rank, 7) for rank in range(3)]).amax(0)
    assert all(torch.equal(each, wanted) for each in found)


@pytest.mark.parametrize(("group", "ranks"), GROUPS)
@pytest.mark.parametrize("dim", [0, 1])
def test_all_gather_joins_parts_of_uneven_size(group: str, ranks: int, dim: int) -> None:
    sizes = UNEVEN[len(group_ranks(group))]
    parts = {rank: held(rank, *((size, 2) if dim == 0 else (2, size))) for rank, size in zip(group_ranks(group), sizes, strict=True)}
    found = on_group(group, ranks, lambda rank, transport: transport.all_gather(parts[rank], group, dim, sizes, "native"))
    assert all(torch.equal(each, torch.cat(list(parts.values()), dim)) for each in found)


@pytest.mark.parametrize(("group", "ranks"), GROUPS)
def test_reduce_scatter_gives_each_rank_its_part_of_the_sum(group: str, ranks: int) -> None:
    sizes = UNEVEN[len(group_ranks(group))]
    found = on_group(group, ranks, lambda rank, transport: transport.reduce_scatter(held(rank, 2, sum(sizes)), group, 1, sizes, "native"))
    whole = torch.stack([held(rank, 2, sum(sizes)) for rank in group_ranks(group)]).sum(0)
    for each, wanted in zip(found, whole.split(sizes, 1), strict=True):
        torch.testing.assert_close(each, wanted)


@pytest.mark.parametrize(("group", "ranks"), GROUPS)
def test_all_to_all_moves_the_split_to_another_dim(group: str, ranks: int) -> None:
    sizes = UNEVEN[len(group_ranks(group))]
    whole = held(9, sum(sizes), sum(sizes))
    rows = dict(zip(group_ranks(group), whole.split(sizes, 0), strict=True))
    found = on_group(group, ranks, lambda rank, transport: transport.all_to_all(rows[rank], group, 1, sizes, 0, sizes, "native"))
    for each, wanted in zip(found, whole.split(sizes, 1), strict=True):
        assert torch.equal(each, wanted)


def test_gradients_are_summed_in_place() -> None:
    def work(rank: int, transport: Transport) -> tuple[Tensor, Tensor]:
        at_once, begun = held(rank, 6), held(rank, 6)
        transport.sum_in_place(at_once, "dp:0,1", "native")
        transport.begin_sum(begun, "dp:0,1", "native")()
        return at_once, begun

    for pair in run_ranks(2, work):
        assert all(torch.equal(each, held(0, 6) + held(1, 6)) for each in pair)


def test_operators_of_a_program_use_the_threads_own_transport() -> None:
    def work(rank: int, transport: Transport) -> list[Tensor]:
        x = held(rank, 3, 4)
        return [
            collectives.all_reduce(x, "tp:0,1"),
            collectives.all_gather(x, "tp:0,1", 0, [3, 3]),
            collectives.reduce_scatter(x, "tp:0,1", 1, [2, 2], rank),
            collectives.all_to_all(x, "tp:0,1", 1, [2, 2], 0, [3, 3], rank),
        ]

    a, b = held(0, 3, 4), held(1, 3, 4)
    for rank, found in enumerate(run_ranks(2, work)):
        part = slice(2 * rank, 2 * rank + 2)
        for each, wanted in zip(found, [a + b, torch.cat([a, b]), (a + b)[:, part], torch.cat([a[:, part], b[:, part]])], strict=True):
            assert torch.equal(each, wanted)


def test_two_groups_do_not_meet() -> None:
    def work(rank: int, transport: Transport) -> Tensor:
        pair = [0, 1] if rank < 2 else [2, 3]
        return transport.all_reduce(torch.tensor([float(rank)]), group_name("tp", pair), "sum", "native")

    assert [each.item() for each in run_ranks(4, work)] == [1.0, 1.0, 5.0, 5.0]


# -- messages ----------------------------------------------------------------------------------------------------------------------------


def test_messages_arrive_in_order_and_are_copies() -> None:
    def work(rank: int, transport: Transport) -> list[float]:
        if rank == 0:
            x = torch.zeros(1)
            for number in range(3):
                x.fill_(number)
                transport.send(x, 1).wait()
            x.fill_(99)
            return []
        found = [torch.empty(1) for _ in range(3)]
        for each in found:
            transport.receive(each, 0).wait()
        return [each.item() for each in found]

    assert run_ranks(2, work)[1] == [0.0, 1.0, 2.0]


# -- failures ----------------------------------------------------------------------------------------------------------------------------


class Broken(Exception):
    pass


def raised_by(ranks: int, work: Callable[[int, Transport], Any], *, within_s: float = 20.0) -> BaseException:
    start = time.monotonic()
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - which one is the question
        run_ranks(ranks, work)
    assert time.monotonic() - start < within_s
    assert not [each for each in threading.enumerate() if each.name.startswith("rank ")], "a rank is still running"
    return caught.value


def test_an_error_ends_ranks_that_wait_in_a_collective_and_is_the_one_raised() -> None:
    waiting = threading.Event()

    def work(rank: int, transport: Transport) -> None:
        if rank == 2:
            waiting.wait(10)
            time.sleep(0.2)  # until the others stand at the barrier
            raise Broken("rank 2's own")
        waiting.set()
        transport.all_reduce(torch.ones(1), "tp:0,1,2", "sum", "native")

    assert str(raised_by(3, work)) == "rank 2's own"


def test_an_error_ends_a_receive_that_never_comes() -> None:
    def work(rank: int, transport: Transport) -> None:
        if rank == 0:
            transport.receive(torch.empty(1), 1).wait()
        else:
            time.sleep(0.2)
            raise Broken("rank 1's own")

    assert isinstance(raised_by(2, work), Broken)


def test_a_receive_without_a_sender_says_who_waits_for_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardwise.runtime.in_process._PATIENCE_S", 0.3)

    def work(rank: int, transport: Transport) -> None:
        if rank == 0:
            transport.receive(torch.empty(1), 1).wait()

    error = raised_by(2, work)
    assert isinstance(error, TransferError) and "rank 0 waited" in str(error) and "in vain for rank 1" in str(error)


def test_without_errors_results_come_in_the_order_of_ranks() -> None:
    def work(rank: int, transport: Transport) -> int:
        time.sleep(0.05 * (3 - rank))
        return rank * rank

    assert run_ranks(3, work) == [0, 1, 4]
