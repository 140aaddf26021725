"""Sample calls of look-ups by index, of writing at indices, and of sorting."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tests.sharding.brute_force import Sample, sample
from tests.sharding.make import bools, distinct, ints, x

from shardwise.capture.graph import Op, Value

__all__ = ["indexing_samples"]

aten = torch.ops.aten


def indexing_samples() -> Iterator[Sample]:
    yield from _index_tensors()
    yield from _along()
    yield from _searches()
    yield from _puts()
    yield from _rows()
    yield from _scatters()
    yield from _flat()
    yield from _sorted()


def _index_tensors() -> Iterator[Sample]:
    yield sample(aten.index.Tensor, x(6, 5), [ints(6, 4, 3)])
    yield sample(aten.index.Tensor, x(6, 5), [ints(6, 4) - 6])
    yield sample(aten.index.Tensor, x(6, 5), [torch.tensor(2)])
    yield sample(aten.index.Tensor, x(6, 5, 2), [ints(6, 4, 1), ints(5, 3)])
    yield sample(aten.index.Tensor, x(4, 6, 5), [None, ints(6, 3)])
    yield sample(aten.index.Tensor, x(4, 6, 5), [ints(4, 3), None, ints(5, 3)])
    yield sample(aten.index.Tensor, x(4, 5), [bools(4)])
    yield sample(aten._unsafe_index.Tensor, x(6, 5), [None, ints(5, 4, 3)])
    counting = torch.arange(4)
    yield sample(aten.index.Tensor, x(4, 6), [counting, ints(6, 4)], producers={1: _counter(4)})
    yield sample(aten.index.Tensor, x(4, 6, 3), [counting[:, None], ints(6, 4, 5)], producers={1: _unsqueezed(_counter(4))})


def _counter(size: int) -> Op:
    value = Value(name="counter", shape=(size,), dtype=torch.int64)
    return _producing(value, Op(target=aten.arange.default, args=(size,), kwargs={}, inputs=(), outputs=(value,), module="sample"))


def _unsqueezed(counter: Op) -> Op:
    value = Value(name="column", shape=(*counter.outputs[0].shape, 1), dtype=torch.int64)
    op = Op(target=aten.unsqueeze.default, args=(None, -1), kwargs={}, inputs=counter.outputs, outputs=(value,), module="sample")
    return _producing(value, op)


def _producing(value: Value, op: Op) -> Op:
    value.producer = op
    return op


def _along() -> Iterator[Sample]:
    yield sample(aten.index_select.default, x(4, 6, 5), 1, ints(6, 3))
    yield sample(aten.index_select.default, x(4, 6), -1, torch.tensor(2))
    yield sample(aten.index_select.default, x(), 0, torch.tensor([0]))
    yield sample(aten.gather.default, x(4, 5, 6), 1, ints(5, 4, 3, 6))
    yield sample(aten.gather.default, x(5, 6), -1, ints(6, 4, 3))
    yield sample(aten.gather.default, bools(4, 6), 1, ints(6, 4, 3))
    yield sample(aten.gather.default, x(), 0, torch.tensor(0))
    yield sample(aten.take_along_dim.default, x(4, 5, 6), ints(5, 4, 3, 6), 1)
    yield sample(aten.take_along_dim.default, x(4, 5, 6), ints(5, 1, 3, 6), -2)
    yield sample(aten.take_along_dim.default, x(1, 6), ints(6, 4, 3), 1)
    yield sample(aten.take_along_dim.default, x(4, 5), ints(20, 6, 2))
    yield sample(aten.take.default, x(4, 5), ints(20, 6, 3))


def _searches() -> Iterator[Sample]:
    rising = x(7).sort().values
    yield sample(aten.searchsorted.Tensor, rising, x(4, 5), frozen=(0, 1))
    yield sample(aten.searchsorted.Tensor, x(4, 7).sort().values, x(4, 5), right=True, frozen=(0, 1))
    mixed = x(4, 7)
    yield sample(aten.searchsorted.Tensor, mixed, x(4, 5), sorter=mixed.argsort(), frozen=(0, 1))
    yield sample(aten.searchsorted.Scalar, rising, 0.3, frozen=(0,))
    yield sample(aten.bucketize.Tensor, x(4, 5), rising, frozen=(0, 1))
    yield sample(aten.bucketize.Scalar, 0.3, rising, frozen=(0,))
    yield sample(aten.isin.Tensor_Tensor, ints(9, 4, 5), ints(9, 3, 2))
    yield sample(aten.isin.Tensor_Scalar, ints(9, 4, 5), 3)
    yield sample(aten.isin.Scalar_Tensor, 3, ints(9, 4, 5))
    yield sample(aten.one_hot.default, ints(3, 4, 5))
    yield sample(aten.one_hot.default, ints(3, 4), 6)
    yield sample(aten.nonzero_static.default, bools(4, 5), size=6)


def _puts() -> Iterator[Sample]:
    for target in (aten.index_put.default, aten._unsafe_index_put.default):
        yield sample(target, x(6, 5), [ints(6, 4)], x(4, 5), True)
        yield sample(target, x(6, 5), [distinct(6, 4)], x(4, 5))
    yield sample(aten.index_put.default, x(4, 6, 5), [None, ints(6, 8)], x(8, 5), True)
    yield sample(aten.index_put.default, x(4, 6, 5), [None, None, distinct(5, 3)], x(4, 1, 1))
    yield sample(aten.index_put.default, x(6, 5), [ints(6, 4, 1), ints(5, 3)], x(3), accumulate=True)
    yield sample(aten.index_put.default, x(4, 5), [distinct(4, 3)], x())
    yield sample(aten.index_put.default, x(4, 6), [torch.arange(4), ints(6, 4)], x(4), producers={1: _counter(4)})
    yield sample(aten.index_put.default, x(4, 5), [bools(4, 5)], x())
    yield sample(aten.index_put.default, x(4, 6, 5), [None, bools(6)], x(1), True)
    yield sample(aten.index_put.default, x(4, 5), [torch.tensor([True, False, True, False])], x(2, 5))


def _rows() -> Iterator[Sample]:
    yield sample(aten.index_add.default, x(6, 5), 0, ints(6, 8), x(8, 5))
    yield sample(aten.index_add.default, x(4, 6, 5), -2, ints(6, 9), x(4, 9, 5), alpha=2)
    yield sample(aten.index_add.default, x(6), 0, torch.tensor(3), x(1))
    yield sample(aten.index_copy.default, x(6, 5), 0, distinct(6, 4), x(4, 5))
    yield sample(aten.index_fill.int_Scalar, x(4, 6), 1, distinct(6, 3), 0.0)
    yield sample(aten.index_fill.int_Scalar, x(4, 6), 1, distinct(6, 3), 2.0)
    yield sample(aten.index_fill.int_Tensor, x(4, 6), -1, distinct(6, 3), x())
    yield sample(aten.index_reduce.default, x(6, 5), 0, ints(6, 8), x(8, 5), "mean")
    yield sample(aten.index_reduce.default, x(6, 5), 0, ints(6, 8), x(8, 5), "amax", include_self=False)


def _scatters() -> Iterator[Sample]:
    yield sample(aten.scatter_add.default, x(6, 5), 0, ints(6, 8, 5), x(8, 5))
    yield sample(aten.scatter_add.default, x(4, 6), -1, ints(6, 4, 8), x(4, 8))
    yield sample(aten.scatter_add.default, x(4, 6), 1, ints(6, 3, 4), x(5, 7), frozen=(2,))
    yield sample(aten.scatter_add.default, x(), 0, torch.tensor(0), x())
    yield sample(aten.scatter.src, x(4, 6), 1, distinct(6, 4, 3), x(4, 3))
    yield sample(aten.scatter.src, x(4, 6), 1, distinct(6, 4, 3), x(4, 5), frozen=(2,))
    yield sample(aten.scatter.value, x(4, 6), 1, distinct(6, 4, 3), 0.0)
    yield sample(aten.scatter.value, x(4, 6), -1, distinct(6, 4, 3), 2.0)
    for kind in ("add", "multiply"):
        yield sample(aten.scatter.reduce, x(4, 6), 1, ints(6, 4, 8), x(4, 8), reduce=kind, frozen=(0, 2))
        yield sample(aten.scatter.value_reduce, x(4, 6), 1, ints(6, 4, 8), 2.0, reduce=kind, frozen=(0,))
    for kind in ("sum", "mean", "amax", "amin", "prod"):
        yield sample(aten.scatter_reduce.two, x(4, 6), 1, ints(6, 4, 8), x(4, 8), kind)
        yield sample(aten.scatter_reduce.two, x(4, 6), 1, ints(6, 4, 8), x(4, 8), kind, include_self=False)


def _flat() -> Iterator[Sample]:
    yield sample(aten.put.default, x(4, 5), ints(20, 6, 2), x(6, 2), True)
    yield sample(aten.put.default, x(4, 5), distinct(20, 6), x(6))
    yield sample(aten.masked_scatter.default, x(4, 5), bools(4, 5), x(20))
    yield sample(aten.masked_scatter.default, x(4, 3, 5), bools(4, 3, 1), x(12, 5))
    yield sample(aten.masked_scatter.default, x(1, 6), bools(6), x(7))


def _sorted() -> Iterator[Sample]:
    yield sample(aten.sort.default, x(4, 5))
    yield sample(aten.sort.default, x(4, 5), 0, True)
    yield sample(aten.sort.default, x(), frozen=(0,))
    yield sample(aten.sort.stable, ints(3, 4, 5), stable=True, dim=0)
    yield sample(aten.argsort.default, x(4, 5), dim=-2)
    yield sample(aten.argsort.stable, ints(3, 4, 5), stable=True)
    yield sample(aten.msort.default, x(4, 5))
    yield sample(aten.topk.default, x(4, 6), 2)
    yield sample(aten.topk.default, x(4, 6, 5), 3, 1, False)
    yield sample(aten.kthvalue.default, x(4, 5), 2)
    yield sample(aten.kthvalue.default, x(4, 5), 3, 0, True)
