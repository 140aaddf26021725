"""Sums and exchanges of tensors between the ranks of a group, in several implementations of each.

Which implementation is fastest depends on the backend, the message and the group, so it is chosen by measurement
(`shardwise.cost.collectives`); all of them give the same result:

    native      the backend's own collective
    exchange    every pair of ranks swaps pieces by sends and receives; sums are taken in the order of the ranks
    all_reduce  (all-gather, reduce-scatter) an all-reduce of the whole tensor, zero-padded before or sliced after

`begin_…` start a message and return what ends it: until that has been called the input must stay as it is and the result is not there. All
ranks of a group begin messages in one order; `number` tells those apart that are under way at the same time.

No function modifies its input (but for ``inplace=True``) and none returns an alias of it. Sizes may be uneven and zero. A sum
is taken in one place or in one order, so that all ranks hold bitwise equal results. Waits end after the group's own time-out.

Arguments that the functions share: ``group`` is a process group or None for all ranks; ``sizes[r]`` is the size, along ``dim``,
of the slice of group rank ``r``; the shape beside ``dim`` is the same on all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.errors import ShardwiseError
from shardwise.heap import join_freed_memory

__all__ = [
    "Finish",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "begin_all_gather",
    "begin_all_reduce",
    "begin_reduce_scatter",
    "begin_shift",
    "reduce_scatter",
]

Group = dist.ProcessGroup | None
Reduction = Literal["sum", "max"]
Function = TypeVar("Function")
Finish = Callable[[], object]

_TAG_OF_SHIFTS = 7000
_TAG = 7001  # keeps our pairwise messages apart from an executor's own sends between the same two ranks
# torch 2.13 renamed both and warns of the old names
_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_NATIVE_OP: Mapping[str, Any] = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
_PAIR_OP: Mapping[str, Callable[..., Tensor]] = {"sum": torch.add, "max": torch.maximum}


def all_reduce(tensor: Tensor, group: Group = None, impl: str = "native", *, inplace: bool = False, reduction: Reduction = "sum") -> Tensor:
    """The elementwise sum (or maximum) over the group, bitwise equal on all its ranks.

    ``inplace=True`` leaves the result in ``tensor`` and returns it, which saves a copy.
    """
    function = _chosen("all_reduce", impl, {"native": _all_reduce_native, "exchange": _all_reduce_exchange})
    if dist.get_world_size(group) == 1 or tensor.numel() == 0:
        return tensor if inplace else tensor.clone()
    result = function(tensor, group, inplace, reduction)
    return tensor.copy_(result) if inplace and result is not tensor else result


def begin_all_reduce(tensor: Tensor, group: Group, impl: str, number: int) -> Finish:
    """Begins to sum a contiguous `tensor` over the group, in place."""
    if impl != "exchange" or tensor.numel() == 0:
        return dist.all_reduce(tensor, group=group, async_op=True).wait
    rank, ranks, tag = dist.get_rank(group), dist.get_world_size(group), _TAG + number
    if ranks == 2:
        other = torch.empty_like(tensor)
        join_freed_memory()
        works = _post({1 - rank: tensor}, {1 - rank: other}, group, tag)

        def add() -> None:
            _wait(works)
            tensor.add_(other)

        return add
    shards = tensor.view(-1).tensor_split(ranks)
    piece = torch.empty_like(shards[rank])
    join_freed_memory()
    reduced = _begin_reduced_piece(shards, piece, group, torch.add, tag)

    def hand_round() -> None:
        reduced()
        shards[rank].copy_(piece)
        _wait(_post(_to_others(rank, [piece] * ranks), _to_others(rank, shards), group, tag))

    return hand_round


def begin_shift(tensor: Tensor, received: Tensor, group: Group) -> Finish:
    """Begins to send a contiguous `tensor` to the next rank of the group, the last one's to the first, and to fill `received` with that of
    the one before; the function returned waits for both.

    Shifts are received in the order in which they were begun. Until the end neither tensor must be touched.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    works = _post({(rank + 1) % ranks: tensor}, {(rank - 1) % ranks: received}, group, _TAG_OF_SHIFTS)
    return lambda: _wait(works)


def all_gather(tensor: Tensor, dim: int, sizes: Sequence[int], group: Group = None, impl: str = "native") -> Tensor:
    """The slices of all ranks joined along ``dim``: size ``sizes[own rank]`` in, ``sum(sizes)`` out, contiguous."""
    result, finish = begin_all_gather(tensor, dim, sizes, group, impl)
    finish()
    return result


def begin_all_gather(
    tensor: Tensor, dim: int, sizes: Sequence[int], group: Group = None, impl: str = "native", number: int = 0
) -> tuple[Tensor, Finish]:
    """As `all_gather`, begun: its result, and what ends it."""
    functions = {"native": _all_gather_native, "exchange": _all_gather_exchange, "all_reduce": _all_gather_all_reduce}
    function = _chosen("all_gather", impl, functions)
    _check_count("all_gather", sizes, group)
    dim = dim % tensor.dim()
    _check_dim("all_gather", tensor.shape, dim, sizes, sizes[dist.get_rank(group)])
    result = tensor.new_empty(_with_size(tensor.shape, dim, sum(sizes)))
    if result.numel() == 0:
        return result, _nothing
    if len(sizes) == 1:
        return result.copy_(tensor), _nothing
    return result, function(tensor, result, dim, sizes, group, _TAG + number)


def reduce_scatter(tensor: Tensor, dim: int, sizes: Sequence[int], group: Group = None, impl: str = "native") -> Tensor:
    """This rank's slice of the sum over the group: size ``sum(sizes)`` along ``dim`` in, ``sizes[own rank]`` out, contiguous."""
    result, finish = begin_reduce_scatter(tensor, dim, sizes, group, impl)
    finish()
    return result


def begin_reduce_scatter(
    tensor: Tensor, dim: int, sizes: Sequence[int], group: Group = None, impl: str = "native", number: int = 0
) -> tuple[Tensor, Finish]:
    """As `reduce_scatter`, begun: its result, and what ends it."""
    functions = {"native": _reduce_scatter_native, "exchange": _reduce_scatter_exchange, "all_reduce": _reduce_scatter_all_reduce}
    function = _chosen("reduce_scatter", impl, functions)
    _check_count("reduce_scatter", sizes, group)
    dim = dim % tensor.dim()
    _check_dim("reduce_scatter", tensor.shape, dim, sizes, sum(sizes))
    result = tensor.new_empty(_with_size(tensor.shape, dim, sizes[dist.get_rank(group)]))
    if tensor.numel() == 0:
        return result, _nothing
    if len(sizes) == 1:
        return result.copy_(tensor), _nothing
    return result, function(tensor, result, dim, sizes, group, _TAG + number)


def all_to_all(
    tensor: Tensor,
    split_dim: int,
    split_sizes: Sequence[int],
    cat_dim: int,
    cat_sizes: Sequence[int],
    group: Group = None,
    impl: str = "native",
) -> Tensor:
    """Piece ``r`` along ``split_dim`` goes to rank ``r``; the pieces received are joined along ``cat_dim`` in the order of the ranks.

    ``split_sizes[r]`` is the size of the piece for rank ``r``, the same on all ranks; ``cat_sizes[r]`` is rank ``r``'s size along
    ``cat_dim``. So ``S(cat_dim)`` becomes ``S(split_dim)``: out, ``split_dim`` has size ``split_sizes[own rank]`` and ``cat_dim``
    has ``sum(cat_sizes)``. With ``split_dim == cat_dim`` each rank has sizes of its own (a ragged dispatch): ``split_sizes`` are
    those it sends, ``cat_sizes`` those it receives.
    """
    function = _chosen("all_to_all", impl, {"native": _all_to_all_native, "exchange": _all_to_all_exchange})
    _check_count("all_to_all", split_sizes, group)
    _check_count("all_to_all", cat_sizes, group)
    split_dim, cat_dim, rank = split_dim % tensor.dim(), cat_dim % tensor.dim(), dist.get_rank(group)
    _check_dim("all_to_all", tensor.shape, split_dim, split_sizes, sum(split_sizes))
    if split_dim != cat_dim:
        _check_dim("all_to_all", tensor.shape, cat_dim, cat_sizes, cat_sizes[rank])
    pieces = [piece.contiguous() for piece in tensor.split_with_sizes(list(split_sizes), split_dim)]
    shapes = [_with_size(pieces[rank].shape, cat_dim, size) for size in cat_sizes]
    if len(pieces) == 1:
        return tensor.clone(memory_format=torch.contiguous_format)
    return torch.cat(function(pieces, shapes, group), cat_dim)


# --- all-reduce -----------------------------------------------------------------------------------------------------------


def _all_reduce_native(tensor: Tensor, group: Group, inplace: bool, reduction: Reduction) -> Tensor:
    result = tensor if inplace and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, op=_NATIVE_OP[reduction], group=group)
    return result


def _all_reduce_exchange(tensor: Tensor, group: Group, inplace: bool, reduction: Reduction) -> Tensor:
    """Two ranks swap whole tensors; more of them each reduce one shard and hand it round.

    Two need one message each instead of two in turn, for the same bytes, and a sum of two is the same in either order.
    """
    source, pair = tensor.contiguous(), _PAIR_OP[reduction]
    if dist.get_world_size(group) == 2:
        other = torch.empty_like(source)
        peer = 1 - dist.get_rank(group)
        _swap({peer: source}, {peer: other}, group)
        return pair(source, other, out=source if inplace else other)
    return _all_reduce_by_shards(source, group, pair)


def _all_reduce_by_shards(source: Tensor, group: Group, pair: Callable[..., Tensor]) -> Tensor:
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    result = torch.empty_like(source)
    shards = result.view(-1).tensor_split(ranks)
    _begin_reduced_piece(source.view(-1).tensor_split(ranks), shards[rank], group, pair, _TAG)()
    _swap(_to_others(rank, [shards[rank]] * ranks), _to_others(rank, shards), group)
    return result


def _begin_reduced_piece(pieces: Sequence[Tensor], result: Tensor, group: Group, pair: Callable[..., Tensor], tag: int) -> Finish:
    """Sends piece ``r`` to rank ``r``; into ``result`` the reduction, in the order of the ranks, of what all hold for this rank."""
    rank = dist.get_rank(group)
    received = [piece if peer == rank else torch.empty_like(pieces[rank]) for peer, piece in enumerate([pieces[rank]] * len(pieces))]
    works = _post(_to_others(rank, pieces), _to_others(rank, received), group, tag)

    def reduce() -> None:
        _wait(works)
        pair(received[0], received[1], out=result)
        for piece in received[2:]:
            pair(result, piece, out=result)

    return reduce


# --- all-gather -----------------------------------------------------------------------------------------------------------


def _all_gather_native(tensor: Tensor, result: Tensor, dim: int, sizes: Sequence[int], group: Group, _tag: int) -> Finish:
    """Slices padded to the largest, since the backend's gather wants equal ones; the rows of the gather's result are then joined."""
    largest = max(sizes)
    padded = tensor.contiguous() if tensor.shape[dim] == largest else _padded(tensor, dim, 0, largest)
    direct = largest * len(sizes) == sum(sizes) and math.prod(result.shape[:dim]) == 1
    rows = result.view(len(sizes), -1) if direct else padded.new_empty(len(sizes), padded.numel())
    work = _GATHER(_bytes(rows.view(-1)), _bytes(padded.view(-1)), group=group, async_op=True)

    def join() -> None:
        work.wait()
        if not direct:
            torch.cat([row.view(padded.shape).narrow(dim, 0, size) for row, size in zip(rows, sizes, strict=True)], dim, out=result)

    return join


def _all_gather_exchange(tensor: Tensor, result: Tensor, dim: int, sizes: Sequence[int], group: Group, tag: int) -> Finish:
    """Everybody sends its slice to everybody, straight into the result where the slices of it are contiguous."""
    rank, source = dist.get_rank(group), tensor.contiguous()
    slices = result.split_with_sizes(list(sizes), dim)
    direct = all(piece.is_contiguous() for piece in slices)
    buffers = list(slices) if direct else [torch.empty_like(piece, memory_format=torch.contiguous_format) for piece in slices]
    works = _post(_to_others(rank, [source] * len(sizes)), _to_others(rank, buffers), group, tag)

    def join() -> None:
        if direct:
            buffers[rank].copy_(source)
        _wait(works)
        if not direct:
            torch.cat([*buffers[:rank], source, *buffers[rank + 1 :]], dim, out=result)

    return join


def _all_gather_all_reduce(tensor: Tensor, result: Tensor, dim: int, sizes: Sequence[int], group: Group, _tag: int) -> Finish:
    """A sum with zeros, taken over integers of the same width, so that the bits come through as they are."""
    start = sum(sizes[: dist.get_rank(group)])
    result.zero_().narrow(dim, start, tensor.shape[dim]).copy_(tensor)
    return dist.all_reduce(_integers(result.view(-1)), group=group, async_op=True).wait


# --- reduce-scatter -------------------------------------------------------------------------------------------------------


def _reduce_scatter_native(tensor: Tensor, result: Tensor, dim: int, sizes: Sequence[int], group: Group, _tag: int) -> Finish:
    """Slices padded to the largest, since the backend's reduce-scatter wants equal ones."""
    largest = max(sizes)
    even = largest * len(sizes) == sum(sizes)
    if even and math.prod(tensor.shape[:dim]) == 1:
        rows = tensor.contiguous()
    else:
        rows = tensor.new_zeros([len(sizes), *_with_size(tensor.shape, dim, largest)])
        for row, piece in zip(rows, tensor.split_with_sizes(list(sizes), dim), strict=True):
            row.narrow(dim, 0, piece.shape[dim]).copy_(piece)
    own = result if even else tensor.new_empty(_with_size(tensor.shape, dim, largest))
    work = _SCATTER(own.view(-1), rows.view(-1), group=group, async_op=True)

    def cut() -> None:
        work.wait()
        if not even:
            result.copy_(own.narrow(dim, 0, result.shape[dim]))

    return cut


def _reduce_scatter_exchange(tensor: Tensor, result: Tensor, dim: int, sizes: Sequence[int], group: Group, tag: int) -> Finish:
    pieces = [piece.contiguous() for piece in tensor.split_with_sizes(list(sizes), dim)]
    return _begin_reduced_piece(pieces, result, group, torch.add, tag)


def _reduce_scatter_all_reduce(tensor: Tensor, result: Tensor, dim: int, sizes: Sequence[int], group: Group, _tag: int) -> Finish:
    total = tensor.clone(memory_format=torch.contiguous_format)
    work = dist.all_reduce(total, group=group, async_op=True)
    rank = dist.get_rank(group)

    def cut() -> None:
        work.wait()
        result.copy_(total.narrow(dim, sum(sizes[:rank]), sizes[rank]))

    return cut


# --- all-to-all -----------------------------------------------------------------------------------------------------------


def _all_to_all_native(pieces: Sequence[Tensor], shapes: Sequence[Sequence[int]], group: Group) -> list[Tensor]:
    """One flat message of bytes; the backend takes uneven and zero counts."""
    width = pieces[0].element_size()
    sent, received = [piece.numel() * width for piece in pieces], [math.prod(shape) * width for shape in shapes]
    source = torch.cat([_bytes(piece.view(-1)) for piece in pieces])
    flat = source.new_empty(sum(received))
    dist.all_to_all_single(flat, source, output_split_sizes=received, input_split_sizes=sent, group=group)
    parts = flat.split_with_sizes(received)
    return [part.view(pieces[0].dtype).view(list(shape)) for part, shape in zip(parts, shapes, strict=True)]


def _all_to_all_exchange(pieces: Sequence[Tensor], shapes: Sequence[Sequence[int]], group: Group) -> list[Tensor]:
    rank = dist.get_rank(group)
    received = [pieces[0].new_empty(shape) if peer != rank else pieces[rank] for peer, shape in enumerate(shapes)]
    _swap(_to_others(rank, pieces), _to_others(rank, received), group)
    return received


# --- shared ---------------------------------------------------------------------------------------------------------------


def _swap(sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], group: Group) -> None:
    """Sends and receives contiguous tensors by group rank, all at once; both sides leave out the empty ones."""
    _wait(_post(sends, receives, group, _TAG))


def _wait(works: Sequence[Any]) -> None:
    for work in works:
        work.wait()


def _nothing() -> None:
    """Nothing is under way."""


def _post(sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], group: Group, tag: int) -> list[Any]:
    """Begins the sends and receives."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    operations = []
    for step in range(1, ranks):
        source, target = (rank - step) % ranks, (rank + step) % ranks
        if source in receives and receives[source].numel():
            operations.append(dist.P2POp(dist.irecv, _bytes(receives[source]), group=group, tag=tag, group_peer=source))
        if target in sends and sends[target].numel():
            operations.append(dist.P2POp(dist.isend, _bytes(sends[target]), group=group, tag=tag, group_peer=target))
    return dist.batch_isend_irecv(operations) if operations else []


def _to_others(rank: int, tensors: Sequence[Tensor]) -> dict[int, Tensor]:
    return {peer: tensor for peer, tensor in enumerate(tensors) if peer != rank}


def _bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor as the flat bytes that it is: moving data needs no dtype that the backend knows."""
    return tensor.view(-1).view(torch.uint8)


def _integers(flat: Tensor) -> Tensor:
    """A flat tensor as integers that a backend can sum, of the same width where there are such."""
    width = flat.element_size()
    if width == 4:
        return flat.view(torch.int32)
    return flat.view(torch.int64) if width % 8 == 0 else flat.view(torch.uint8)


def _padded(tensor: Tensor, dim: int, start: int, size: int) -> Tensor:
    """A contiguous tensor of ``size`` along ``dim``, zero but for ``tensor`` from ``start`` on."""
    result = tensor.new_zeros(_with_size(tensor.shape, dim, size))
    result.narrow(dim, start, tensor.shape[dim]).copy_(tensor)
    return result


def _with_size(shape: Sequence[int], dim: int, size: int) -> list[int]:
    return [*shape[:dim], size, *shape[dim + 1 :]]


def _chosen(kind: str, impl: str, functions: Mapping[str, Function]) -> Function:
    if impl not in functions:
        raise ShardwiseError(f"{kind}: there is no implementation {impl!r}; choose one of {', '.join(functions)}")
    return functions[impl]


def _check_count(kind: str, sizes: Sequence[int], group: Group) -> None:
    ranks = dist.get_world_size(group)
    if len(sizes) != ranks:
        raise ShardwiseError(f"{kind}: {len(sizes)} sizes {tuple(sizes)} for a group of {ranks} ranks; give one a rank")


def _check_dim(kind: str, shape: Sequence[int], dim: int, sizes: Sequence[int], expected: int) -> None:
    if shape[dim] != expected:
        raise ShardwiseError(f"{kind}: dim {dim} of shape {tuple(shape)} has size {shape[dim]}, but sizes {tuple(sizes)} want {expected}")
