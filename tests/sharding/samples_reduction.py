"""Sample calls of operators that reduce dims, or run along one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tests.sharding.brute_force import Sample, sample
from tests.sharding.make import bools, complex_numbers, ints, positive, x

__all__ = ["reduction_samples"]

aten = torch.ops.aten


def reduction_samples() -> Iterator[Sample]:
    yield from _sums()
    yield from _extremes()
    yield from _combined()
    yield from _norms()
    yield from _variances()
    yield from _whole()
    yield from _along()
    yield from _between()


def _sums() -> Iterator[Sample]:
    yield sample(aten.sum.default, x(4, 5))
    yield sample(aten.sum.default, x())
    yield sample(aten.sum.default, bools(4, 5))
    yield sample(aten.sum.default, complex_numbers(4, 5))
    yield sample(aten.sum.dim_IntList, x(4, 3, 5), [-1], True)
    yield sample(aten.sum.dim_IntList, x(4, 3, 5), [0, 2])
    yield sample(aten.sum.dim_IntList, x(4, 5), None)
    yield sample(aten.sum.dim_IntList, x(4, 5), [], keepdim=True)
    yield sample(aten.sum.dim_IntList, x(4, 1, 5), dim=[1])
    yield sample(aten.mean.default, x(4, 5))
    yield sample(aten.mean.default, x())
    yield sample(aten.mean.dim, x(4, 3, 5), [-1], True)
    yield sample(aten.mean.dim, x(4, 3, 5), [0, 1])
    yield sample(aten.mean.dim, x(4, 5), None)
    yield sample(aten.mean.dim, x(4, 5), [], dtype=torch.float32)
    holes = torch.where(bools(4, 5), x(4, 5), float("nan"))
    yield sample(aten.nansum.default, holes, [1])
    yield sample(aten.nansum.default, holes)
    yield sample(aten.count_nonzero.default, ints(2, 4, 5))
    yield sample(aten.count_nonzero.default, ints(2, 4, 5), -1)
    yield sample(aten.count_nonzero.dim_IntList, ints(2, 4, 5), [0])
    yield sample(aten.sum_to_size.default, x(3, 4, 5), [4, 1], rewrites=[{1: [2, 1]}, {1: [1, 1]}])
    yield sample(aten.histc.default, x(4, 5), 6, -1, 1, frozen=(0,))
    yield sample(aten.histc.default, x(9), 6, frozen=(0,))
    yield sample(aten.bincount.default, ints(4, 9), minlength=5)
    yield sample(aten.bincount.default, ints(4, 9), x(9), frozen=(1,))


def _extremes() -> Iterator[Sample]:
    tied = ints(3, 4, 6).double()
    for target in (aten.amax.default, aten.amin.default):
        yield sample(target, x(4, 5), [-1], True)
        yield sample(target, x(4, 5))
        yield sample(target, tied, [0])
        yield sample(target, ints(9, 4, 3, 5), [0, 2])
    for name in ("max", "min"):
        yield sample(getattr(aten, name).default, x(4, 5))
        yield sample(getattr(aten, name).default, tied)
        yield sample(getattr(aten, name).default, x(), frozen=(0,))
        yield sample(getattr(aten, name).dim, x(4, 5), 1)
        yield sample(getattr(aten, name).dim, tied, 0, True)
    for target in (aten.argmax.default, aten.argmin.default):
        yield sample(target, x(4, 5), -1)
        yield sample(target, tied, 0, True)
        yield sample(target, x(4, 5))
        yield sample(target, x(4, 5), keepdim=True)


def _combined() -> Iterator[Sample]:
    for target in (aten.any, aten.all):
        yield sample(target.default, bools(4, 5))
        yield sample(target.dim, bools(4, 5), -1)
        yield sample(target.dims, bools(4, 3, 5), [0, 2], True)
        yield sample(target.dims, bools(4, 5))
    yield sample(aten._is_all_true.default, bools(4, 5))
    yield sample(aten._is_any_true.default, bools(4, 5))
    yield sample(aten.prod.default, x(2, 5))
    yield sample(aten.prod.default, ints(3, 4))
    yield sample(aten.prod.dim_int, x(4, 5), -1, True)
    for target in (aten.logsumexp.default, aten.special_logsumexp.default):
        yield sample(target, x(4, 5), [1])
        yield sample(target, x(4, 3, 5), [0, -1], True)


def _norms() -> Iterator[Sample]:
    yield sample(aten.linalg_vector_norm.default, x(4, 5))
    yield sample(aten.linalg_vector_norm.default, x(4, 3, 5), 3, [-1], True)
    yield sample(aten.linalg_vector_norm.default, x(4, 5), 1, [0])
    yield sample(aten.linalg_vector_norm.default, complex_numbers(4, 5), 2, [0])
    yield sample(aten.linalg_vector_norm.default, x(4, 5), float("inf"), [0])
    yield sample(aten.linalg_vector_norm.default, x(4, 5), 0, [0], frozen=(0,))
    yield sample(aten.norm.Scalar, x(4, 5))
    yield sample(aten.norm.ScalarOpt_dim, x(4, 5), None, [1], True)
    yield sample(aten.norm.ScalarOpt_dim_dtype, x(4, 5), 2, [1], False, dtype=torch.float64)
    yield sample(aten.norm.ScalarOpt_dtype, x(4, 5), 2, dtype=torch.float64)
    yield sample(aten.frobenius_norm.dim, x(4, 3, 5), [0, 1])
    yield sample(aten.linalg_norm.default, x(4, 5))
    yield sample(aten.linalg_norm.default, x(4, 5), 1)
    yield sample(aten.linalg_norm.default, x(4, 5), 3, [-1])
    yield sample(aten.linalg_norm.ord_str, x(4, 5), "fro")
    yield sample(aten.linalg_norm.ord_str, x(4, 3, 5), "nuc", [0, 1])
    yield sample(aten.linalg_matrix_norm.default, x(4, 3, 5), 1)
    yield sample(aten.linalg_matrix_norm.str_ord, x(4, 3, 5), "fro", [0, 1])
    yield sample(aten.nuclear_norm.default, x(4, 3))
    yield sample(aten.nuclear_norm.dim, x(4, 3, 5), [0, 2])


def _variances() -> Iterator[Sample]:
    for name in ("var", "std", "var_mean", "std_mean"):
        target = getattr(aten, name)
        yield sample(target.default, x(4, 5))
        yield sample(target.default, x(4, 5), False)
        yield sample(target.dim, x(4, 5), [-1], unbiased=False, keepdim=True)
        yield sample(target.correction, x(4, 3, 5), [1], correction=1, keepdim=True)
        yield sample(target.correction, x(4, 5), correction=0)
        yield sample(target.correction, x(4, 5), [], frozen=(0,))  # torch's own gradient of it is wrong
    yield sample(aten.var.correction, complex_numbers(4, 5), [0])


def _whole() -> Iterator[Sample]:
    for name in ("median", "nanmedian"):
        yield sample(getattr(aten, name).default, x(4, 5))
        yield sample(getattr(aten, name).dim, x(4, 5), -1, True)
    yield sample(aten.nanmean.default, torch.where(bools(4, 5), x(4, 5), float("nan")), [1])
    yield sample(aten.mode.default, x(4, 5))
    yield sample(aten.aminmax.default, x(4, 5))
    yield sample(aten.aminmax.default, x(4, 5), dim=1, keepdim=True)
    quantiles = torch.tensor([0.1, 0.5, 0.7], dtype=torch.float64)
    for name in ("quantile", "nanquantile"):
        yield sample(getattr(aten, name).scalar, x(4, 5), 0.3, 1)
        yield sample(getattr(aten, name).default, x(4, 5), quantiles, -1, True, frozen=(1,))
    yield sample(aten.quantile.default, x(4, 5), quantiles, frozen=(1,))


def _along() -> Iterator[Sample]:
    for name in ("softmax", "log_softmax"):
        yield sample(getattr(aten, name).int, x(4, 3, 5), -1)
        yield sample(getattr(aten, name).int, x(), 0, frozen=(0,))
        yield sample(getattr(aten, f"_{name}").default, x(4, 5), 0, False)
        yield sample(getattr(aten, f"special_{name}").default, x(4, 5), 0)
    yield sample(aten._safe_softmax.default, x(4, 5), -1)
    yield sample(aten.cumsum.default, x(4, 5), 1)
    yield sample(aten.cumsum.default, x(), 0)
    yield sample(aten.cumsum.default, x(12), 0, dtype=torch.float32)
    yield sample(aten.cumsum.default, ints(5, 4, 5), -2)
    for name in ("cumprod", "cummax", "cummin", "logcumsumexp"):
        yield sample(getattr(aten, name).default, positive(4, 5), -1)
    yield sample(aten.renorm.default, x(4, 3, 5), 2, -2, 0.5)
    yield sample(aten.diff.default, x(4, 6))
    yield sample(aten.diff.default, x(4, 6), 1, 0, x(1, 6), x(2, 6))
    yield sample(aten.diff.default, x(4, 6), 1, -1, x(4, 2))
    yield sample(aten.diff.default, x(4, 6), append=x(4, 2))


def _between() -> Iterator[Sample]:
    yield sample(aten.dist.default, x(4, 5), x(4, 5))
    yield sample(aten.dist.default, x(4, 5), x(5), 1)
    yield sample(aten.cdist.default, x(4, 6), x(5, 6))
    yield sample(aten.cdist.default, x(3, 1, 4, 6), x(2, 5, 6), 1.0)
    yield sample(aten._cdist_forward.default, x(3, 4, 6), x(3, 5, 6), 2.0, None, frozen=(0, 1))
    yield sample(aten._euclidean_dist.default, x(4, 6), x(5, 6))
    yield sample(aten.cosine_similarity.default, x(4, 6), x(4, 6))
    yield sample(aten.cosine_similarity.default, x(4, 1, 5), x(3, 5), -1)
    yield sample(aten.pairwise_distance.default, x(4, 6), x(6))
    yield sample(aten.pairwise_distance.default, x(4, 6), x(4, 6), 1.0, keepdim=True)
