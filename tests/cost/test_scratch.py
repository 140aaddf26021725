"""What messages hold beside their input and result, against what lives while the runtime's implementations run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tests.alone import Group, Living, alone
from torch import Tensor

from shardwise.cost.scratch import gathering_bytes, scattering_bytes, summing_bytes
from shardwise.runtime.collectives import all_reduce, begin_all_gather, begin_all_reduce, begin_reduce_scatter

SIZES = ([4, 4], [6, 2], [4, 4, 4], [4, 3, 3], [5, 4, 0])
AROUND = (([], []), ([], [6]), ([6], []), ([3], [2]))  # dims before and after the one that is divided
CASES = [(sizes, before, after, rank) for sizes in SIZES for before, after in AROUND for rank in range(len(sizes))]


def beside(given: Tensor, begin: Callable[..., Any], *arguments: Any, **options: Any) -> int:
    """The most that lives until a message has arrived, without its input and result; begin: returns these results, and what ends it."""
    living = Living([given])
    with alone(), living:
        results, finish = begin(given, *arguments, **options)
        finish()
    owned = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in results if tensor is not given}
    return living.peak_bytes - living.start_bytes - sum(owned.values())


def ended(begin: Callable[..., tuple[Tensor, Callable[[], object]]], *arguments: Any) -> tuple[list[Tensor], Callable[[], object]]:
    result, finish = begin(*arguments)
    return [result], finish


@pytest.mark.parametrize("impl", ["native", "exchange", "all_reduce"])
def test_gathering(impl: str) -> None:
    for sizes, before, after, rank in CASES:
        part, whole = ([*before, size, *after] for size in (sizes[rank], sum(sizes)))
        gather = partial(ended, begin_all_gather)
        found = beside(torch.zeros(part), gather, len(before), sizes, Group(rank, len(sizes)), impl)
        assert found == gathering_bytes(impl, whole, 4, len(before), sizes, rank), (sizes, whole, rank)


@pytest.mark.parametrize("impl", ["native", "exchange", "all_reduce"])
@pytest.mark.parametrize("contiguous", [True, False])
def test_scattering(impl: str, contiguous: bool) -> None:
    for sizes, before, after, rank in CASES:
        shape = [*before, sum(sizes), *after]
        whole = torch.zeros(shape) if contiguous else torch.zeros(shape[::-1]).permute(*reversed(range(len(shape))))
        found = beside(whole, partial(ended, begin_reduce_scatter), len(before), sizes, Group(rank, len(sizes)), impl)
        predicted = scattering_bytes(impl, shape, 4, len(before), sizes, rank, contiguous=whole.is_contiguous())
        assert found == predicted, (sizes, shape, rank)


@pytest.mark.parametrize("impl", ["native", "exchange"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_summing(impl: str, ranks: int) -> None:
    def at_once(x: Tensor, **options: Any) -> tuple[list[Tensor], Callable[[], object]]:
        return [all_reduce(x, group, impl, **options)], lambda: None

    group, x = Group(0, ranks), torch.zeros(25)
    assert beside(x, at_once) == summing_bytes(impl, 25, 4, ranks)
    assert beside(x, at_once, inplace=True) == summing_bytes(impl, 25, 4, ranks, inplace=True)
    assert beside(x, lambda x: ([], begin_all_reduce(x, group, impl, 0))) == summing_bytes(impl, 25, 4, ranks, inplace=True, begun=True)  # type: ignore[arg-type]
