"""Every implementation on real ranks against a reference made of concatenation and sums, in one launch for each number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.errors import ShardwiseError
from shardwise.runtime import collectives
from shardwise.runtime.launch import launch

pytestmark = pytest.mark.distributed

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64)
SIZES = {2: ((3, 3), (5, 2), (0, 4), (0, 0)), 3: ((2, 2, 2), (4, 1, 2), (0, 3, 0), (1, 0, 5)), 4: ((2, 2, 2, 2), (3, 0, 1, 6))}


def _tensor(shape: Sequence[int], dtype: torch.dtype, seed: int, *, strided: bool) -> Tensor:
    """Whole numbers, so that sums are exact in every dtype and order."""
    generator = torch.Generator().manual_seed(seed)
    flipped = torch.randint(-8, 9, tuple(reversed(shape)), generator=generator).to(dtype).permute(*reversed(range(len(shape))))
    return flipped if strided else flipped.contiguous()


def _with(shape: Sequence[int], dim: int, size: int) -> list[int]:
    return [size if at == dim else old for at, old in enumerate(shape)]


def _unchanged(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    before = tensor.clone()
    result = function(tensor)
    assert torch.equal(tensor, before), "the input was modified"
    assert result.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr() or not result.numel(), "an alias of the input"
    assert result.dtype == tensor.dtype
    return result


def _cases() -> Iterator[tuple[int, Sequence[int], torch.dtype, bool]]:
    return iter(product((0, 1, -1), SIZES[dist.get_world_size()], DTYPES, (False, True)))


def _check_all_reduce() -> int:
    rank, ranks, count = dist.get_rank(), dist.get_world_size(), 0
    for impl, dtype, strided, shape in product(("native", "exchange"), DTYPES, (False, True), ((5, 3, 2), (1,), (0, 4))):
        tensors = [_tensor(shape, dtype, seed, strided=strided) for seed in range(ranks)]
        for reduction, expected in (("sum", torch.stack(tensors).sum(0).to(dtype)), ("max", torch.stack(tensors).amax(0))):
            result = _unchanged(lambda t, i=impl, r=reduction: collectives.all_reduce(t, None, i, reduction=r), tensors[rank])
            assert torch.equal(result, expected), (impl, dtype, strided, shape, reduction)
            mutable = tensors[rank].clone()
            assert collectives.all_reduce(mutable, None, impl, inplace=True, reduction=reduction) is mutable
            assert torch.equal(mutable, expected)
            count += 1
    return count


def _check_all_gather() -> int:
    rank, count = dist.get_rank(), 0
    for dim, sizes, dtype, strided in _cases():
        whole = _tensor(_with((4, 3, 2), dim % 3, sum(sizes)), dtype, 1, strided=False)
        own = whole.split(list(sizes), dim)[rank]
        own = own.mT.contiguous().mT if strided else own.contiguous()
        for impl in ("native", "exchange", "all_reduce"):
            result = _unchanged(lambda t, a=(dim, sizes, None, impl): collectives.all_gather(t, *a), own)
            assert torch.equal(result, whole), (impl, dim, sizes, dtype)
            assert result.is_contiguous()
            count += 1
    return count


def _check_reduce_scatter() -> int:
    rank, ranks, count = dist.get_rank(), dist.get_world_size(), 0
    for dim, sizes, dtype, strided in _cases():
        tensors = [_tensor(_with((4, 3, 2), dim % 3, sum(sizes)), dtype, seed, strided=strided) for seed in range(ranks)]
        expected = torch.stack(tensors).sum(0).to(dtype).split(list(sizes), dim)[rank]
        for impl in ("native", "exchange", "all_reduce"):
            result = _unchanged(lambda t, a=(dim, sizes, None, impl): collectives.reduce_scatter(t, *a), tensors[rank])
            assert torch.equal(result, expected), (impl, dim, sizes, dtype)
            assert result.is_contiguous()
            count += 1
    return count


def _check_all_to_all() -> int:
    rank, ranks, count = dist.get_rank(), dist.get_world_size(), 0
    for (split_dim, cat_dim), cat_sizes, split_sizes, dtype in product(
        ((0, 1), (1, 0), (-1, 0), (0, 2)), SIZES[ranks], reversed(SIZES[ranks]), DTYPES
    ):
        shape = _with(_with((4, 3, 2), split_dim % 3, sum(split_sizes)), cat_dim % 3, sum(cat_sizes))
        whole = _tensor(shape, dtype, 2, strided=False)
        own, expected = whole.split(list(cat_sizes), cat_dim)[rank], whole.split(list(split_sizes), split_dim)[rank]
        for impl in ("native", "exchange"):
            result = _unchanged(lambda t, a=(split_dim, split_sizes, cat_dim, cat_sizes, None, impl): collectives.all_to_all(t, *a), own)
            assert torch.equal(result, expected), (impl, split_dim, cat_dim, split_sizes, cat_sizes, dtype)
            count += 1
    return count


def _check_ragged_dispatch() -> int:
    """split_dim == cat_dim: rank i sends i + j rows to rank j."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    rows = [[torch.full((i + j, 2), 10.0 * i + j) for j in range(ranks)] for i in range(ranks)]
    for impl in ("native", "exchange"):
        sent, received = [rank + j for j in range(ranks)], [i + rank for i in range(ranks)]
        result = collectives.all_to_all(torch.cat(rows[rank]), 0, sent, 0, received, None, impl)
        assert torch.equal(result, torch.cat([rows[i][rank] for i in range(ranks)])), impl
    return 2


def _bits() -> list[Tensor]:
    """Sums that depend on their order, and values that a sum with zeros would change."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    uneven = torch.rand(1001, generator=torch.Generator().manual_seed(rank)) * 10.0**rank
    sums = [collectives.all_reduce(uneven, None, impl) for impl in ("native", "exchange")]
    odd = torch.tensor([-0.0, float("nan"), float("inf")])
    gathered = [collectives.all_gather(odd, 0, [3] * ranks, None, impl) for impl in ("native", "exchange", "all_reduce")]
    flags = collectives.all_gather(torch.tensor([True, False]), 0, [2] * ranks, None, "all_reduce")
    return [*sums, *gathered, flags.to(torch.float32)]


def _raw(tensors: Sequence[Tensor]) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in tensors]


def _check_shifts() -> int:
    """Several under way at once arrive in their order, whatever their sizes; the tensors that are sent stay as they are."""
    rank, ranks, count = dist.get_rank(), dist.get_world_size(), 0
    for sizes, dtype in product(SIZES[ranks], DTYPES):
        sent = [
            [_tensor((3, size, 2), dtype, 10 * place + number, strided=False) for number in range(3)] for place, size in enumerate(sizes)
        ]
        received = [torch.empty_like(each) for each in sent[rank - 1]]
        copies = [each.clone() for each in sent[rank]]
        waits = [collectives.begin_shift(x, into, None) for x, into in zip(copies, received, strict=True)]
        for number in (1, 0, 2):
            waits[number]()
        assert all(torch.equal(got, gave) for got, gave in zip(received, sent[rank - 1], strict=True))
        assert all(torch.equal(copy, gave) for copy, gave in zip(copies, sent[rank], strict=True))
        count += 1
    return count


def _check_subgroup() -> None:
    """Group ranks are not global ranks: the last two ranks alone, the others stand by."""
    ranks = dist.get_world_size()
    group = dist.new_group([ranks - 2, ranks - 1])
    if dist.get_rank() >= ranks - 2:
        own = torch.full((2,), float(dist.get_rank(group)))
        for impl in ("native", "exchange", "all_reduce"):
            assert collectives.all_gather(own, 0, [2, 2], group, impl).tolist() == [0.0, 0.0, 1.0, 1.0]
            assert collectives.reduce_scatter(own, 0, [1, 1], group, impl).tolist() == [1.0]
        for impl in ("native", "exchange"):
            assert collectives.all_reduce(own, group, impl).tolist() == [1.0, 1.0]
            assert collectives.all_to_all(own, 0, [1, 1], 0, [1, 1], group, impl).tolist() == [0.0, 1.0]
    dist.barrier()


def _check_errors() -> None:
    with pytest.raises(ShardwiseError, match=r"all_reduce: there is no implementation 'ring'; choose one of native, exchange"):
        collectives.all_reduce(torch.ones(2), None, "ring")
    with pytest.raises(ShardwiseError, match=r"all_gather: 1 sizes \(2,\) for a group of \d ranks"):
        collectives.all_gather(torch.ones(2), 0, [2] if dist.get_rank() == 0 else [2, 2, 2, 2, 2])
    with pytest.raises(ShardwiseError, match=r"reduce_scatter: dim 0 of shape \(5,\) has size 5, but sizes .* want"):
        collectives.reduce_scatter(torch.ones(5), 0, [9] * dist.get_world_size())


def _everything() -> tuple[int, list[bytes]]:
    count = (
        _check_all_reduce()
        + _check_all_gather()
        + _check_reduce_scatter()
        + _check_all_to_all()
        + _check_ragged_dispatch()
        + _check_shifts()
    )
    _check_subgroup()
    if dist.get_rank() == 0:
        _check_errors()
    return count, _raw(_bits())


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_implementations_agree_with_the_reference(ranks: int) -> None:
    results = launch(_everything, ranks=ranks, threads=1, timeout_s=30)
    assert all(count > 200 for count, _ in results)
    assert all(bits == results[0][1] for _, bits in results), "ranks differ in some bit"


def _alone() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    for impl in ("native", "exchange"):
        assert torch.equal(_unchanged(lambda t, i=impl: collectives.all_reduce(t, None, i), tensor), tensor)
        assert torch.equal(_unchanged(lambda t, i=impl: collectives.all_gather(t, 1, [3], None, i), tensor), tensor)
        assert torch.equal(_unchanged(lambda t, i=impl: collectives.reduce_scatter(t, 0, [2], None, i), tensor), tensor)
        assert torch.equal(_unchanged(lambda t, i=impl: collectives.all_to_all(t, 0, [2], 1, [3], None, i), tensor), tensor)


def test_group_of_one_copies() -> None:
    launch(_alone, ranks=1, threads=1, timeout_s=30)
