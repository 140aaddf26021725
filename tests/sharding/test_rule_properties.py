"""Rules hold for any shape, dtype and memory layout, and for any way of naming dims, not only for the samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.sharding.brute_force import Sample, check_shape, sample
from tests.sharding.emulate import run_ranks
from torch import Tensor

from shardwise.sharding.rules import signature_of
from shardwise.sharding.trial import check_choice, choices, reference

aten = torch.ops.aten
Draw = st.DataObject

_SETTINGS = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
_DTYPES = (torch.float64, torch.float32, torch.complex128, torch.int64, torch.bool)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- tensors -----------------------------------------------------------------------------------------------------------------------------


def shape(data: Draw, least: int = 0, most: int = 4) -> list[int]:
    return data.draw(st.lists(st.integers(1, 6), min_size=least, max_size=most))


def tensor(data: Draw, sizes: list[int], *dtypes: torch.dtype) -> Tensor:
    """In memory the dims stand in any order, and every second element may be left out."""
    dtype = data.draw(st.sampled_from(dtypes or _DTYPES))
    order = data.draw(st.permutations(range(len(sizes))))
    steps = [data.draw(st.integers(1, 2)) for _ in sizes]
    made = _numbers([sizes[dim] * steps[dim] for dim in order], dtype)
    back = made.permute([order.index(dim) for dim in range(len(sizes))])
    return back[tuple(slice(None, None, step) for step in steps)]


def _numbers(sizes: list[int], dtype: torch.dtype) -> Tensor:
    if dtype == torch.bool:
        return torch.rand(sizes) > 0.5
    return torch.randn(sizes, dtype=dtype) if dtype.is_floating_point or dtype.is_complex else torch.randint(-5, 6, sizes)


def floating(data: Draw, sizes: list[int]) -> Tensor:
    return tensor(data, sizes, torch.float64, torch.float32)


def a_dim(data: Draw, rank: int) -> int:
    return data.draw(st.integers(-rank, rank - 1)) if rank else data.draw(st.sampled_from((0, -1)))


def some_dims(data: Draw, rank: int) -> list[int]:
    """Different dims, some of them counted from the end; perhaps none."""
    chosen = data.draw(st.lists(st.integers(0, rank - 1), unique=True, max_size=rank)) if rank else []
    return [dim - rank if data.draw(st.booleans()) else dim for dim in chosen]


def broadcast_with(data: Draw, sizes: list[int]) -> list[int]:
    """A shape that is broadcast to `sizes`."""
    kept = sizes[data.draw(st.integers(0, len(sizes))) :]
    return [1 if data.draw(st.booleans()) else size for size in kept]


# -- calls -------------------------------------------------------------------------------------------------------------------------------


def unary(data: Draw) -> Sample:
    target = data.draw(st.sampled_from((aten.neg, aten.exp, aten.sigmoid, aten.clone, aten.square)))
    dtypes = (torch.float64, torch.float32, torch.complex128)
    return sample(target.default, tensor(data, shape(data), *dtypes))


def binary(data: Draw) -> Sample:
    sizes = shape(data)
    first, second = tensor(data, sizes), tensor(data, broadcast_with(data, sizes))
    target = data.draw(st.sampled_from((aten.add.Tensor, aten.mul.Tensor, aten.eq.Tensor)))
    operands = [first, second] if data.draw(st.booleans()) else [second, first]
    return sample(target, *operands)


def scalar(data: Draw) -> Sample:
    target = data.draw(st.sampled_from((aten.add.Tensor, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.pow.Tensor_Scalar)))
    return sample(target, floating(data, shape(data)).abs() + 1, data.draw(st.sampled_from((2, 0.5, 3))))


def choose(data: Draw) -> Sample:
    sizes = shape(data)
    mask = tensor(data, broadcast_with(data, sizes), torch.bool)
    first, second = (tensor(data, each, torch.float64) for each in (sizes, broadcast_with(data, sizes)))
    return sample(aten.where.self, mask, first, second)


def summed(data: Draw) -> Sample:
    sizes = shape(data)
    target = data.draw(st.sampled_from((aten.sum.dim_IntList, aten.mean.dim)))
    dims = data.draw(st.sampled_from((None, some_dims(data, len(sizes)))))
    return sample(target, floating(data, sizes), dims, keepdim=data.draw(st.booleans()))


def reduced(data: Draw) -> Sample:
    sizes = shape(data)
    target = data.draw(st.sampled_from((aten.amax, aten.amin, aten.linalg_vector_norm, aten.any.dims, aten.logsumexp)))
    dims, keepdim = some_dims(data, len(sizes)), data.draw(st.booleans())
    if target is aten.linalg_vector_norm:
        return sample(target.default, floating(data, sizes), 2, dims or None, keepdim)
    dims = dims or list(range(len(sizes)))
    return sample(target if target is aten.any.dims else target.default, floating(data, sizes), dims, keepdim)


def varied(data: Draw) -> Sample:
    sizes = shape(data, 1)
    dims = some_dims(data, len(sizes)) or None
    target = data.draw(st.sampled_from((aten.var.correction, aten.std_mean.correction)))
    return sample(target, tensor(data, sizes, torch.float64) * 3, dims, correction=0, keepdim=data.draw(st.booleans()))


def along(data: Draw) -> Sample:
    sizes = shape(data)
    targets = (aten.cumsum.default, aten.sort.default, aten.argmax.default, aten.max.dim, aten.softmax.int)
    return sample(data.draw(st.sampled_from(targets)), tensor(data, sizes, torch.float64), a_dim(data, len(sizes)))


def moved(data: Draw) -> Sample:
    sizes = shape(data, 1)
    rank = len(sizes)
    first, second = a_dim(data, rank), a_dim(data, rank)
    order = data.draw(st.permutations(range(rank)))
    calls: list[tuple[Any, ...]] = [
        (aten.transpose.int, first, second),
        (aten.movedim.int, first, second),
        (aten.permute.default, [dim - rank if data.draw(st.booleans()) else dim for dim in order]),
        (aten.flip.default, some_dims(data, rank)),
        (aten.roll.default, [1], [first]),
        (aten.unsqueeze.default, first),
        (aten.squeeze.dims, some_dims(data, rank)),
        (aten.unbind.int, first),
        (aten.select.int, first, data.draw(st.integers(-sizes[first], sizes[first] - 1))),
    ]
    target, *arguments = data.draw(st.sampled_from(calls))
    return sample(target, tensor(data, sizes), *arguments)


def sliced(data: Draw) -> Sample:
    sizes = shape(data, 1)
    dim = a_dim(data, len(sizes))
    bounds = st.one_of(st.none(), st.integers(-7, 7))
    start, end, step = data.draw(bounds), data.draw(bounds), data.draw(st.integers(1, 3))
    return sample(aten.slice.Tensor, tensor(data, sizes), dim, start, end, step)


def reshaped(data: Draw) -> Sample:
    """The same prime factors, grouped anew."""
    primes = data.draw(st.lists(st.sampled_from((2, 2, 3)), max_size=5))
    sizes, out = (_grouped(data, primes) for _ in range(2))
    return sample(aten.reshape.default, tensor(data, sizes), out)


def _grouped(data: Draw, primes: list[int]) -> list[int]:
    groups = [1]
    for prime in data.draw(st.permutations(primes)):
        if data.draw(st.booleans()):
            groups.append(prime)
        else:
            groups[-1] *= prime
    return groups


def copied(data: Draw) -> Sample:
    sizes = shape(data, 0, 3)
    times = data.draw(st.lists(st.integers(1, 3), min_size=len(sizes), max_size=len(sizes) + 1))
    if data.draw(st.booleans()):
        return sample(aten.repeat.default, tensor(data, sizes), times)
    return sample(aten.expand.default, tensor(data, broadcast_with(data, sizes)), sizes)


def pieces(data: Draw) -> Sample:
    sizes = shape(data, 1)
    dim = a_dim(data, len(sizes))
    if data.draw(st.booleans()):
        return sample(aten.split.Tensor, tensor(data, sizes), data.draw(st.integers(1, 4)), dim)
    others = [[*sizes] for _ in range(data.draw(st.integers(1, 3)))]
    for other in others:
        other[dim] = data.draw(st.integers(1, 4))
    return sample(aten.cat.default, [tensor(data, each, torch.float64) for each in others], dim)


def cornered(data: Draw) -> Sample:
    sizes = shape(data, 2)
    offset = data.draw(st.integers(-3, 3))
    if data.draw(st.booleans()):
        return sample(data.draw(st.sampled_from((aten.tril.default, aten.triu.default))), tensor(data, sizes, torch.float64), offset)
    return sample(aten.constant_pad_nd.default, tensor(data, sizes, torch.float64), [0, 0, 1, 2])


_CALLS = (unary, binary, scalar, choose, summed, reduced, varied, along, moved, sliced, reshaped, copied, pieces, cornered)


# -- the property ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", _CALLS, ids=lambda make: make.__name__)
def test_rule_holds_for(make: Callable[[Draw], Sample]) -> None:
    @_SETTINGS
    @given(st.data())
    def holds(data: Draw) -> None:
        torch.manual_seed(0)
        _check_on_two(make(data))

    holds()


def _check_on_two(case: Sample) -> None:
    sig = signature_of(case.op)
    check_shape(case, sig)
    whole = reference(case)
    for choice in choices(sig, 2):
        communicates = choice.mode == "split" and not sig.splits[choice.factor].microbatches
        run = (run_ranks,) if communicates else ()
        check_choice(case, sig, {"tp": (2, choice)}, whole, *run)
