"""Sample calls of operators that make a tensor from nothing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tests.sharding.brute_force import Sample, sample
from tests.sharding.make import x

__all__ = ["create_samples"]

aten = torch.ops.aten


def create_samples() -> Iterator[Sample]:
    yield from _constants()
    yield from _counting()


def _constants() -> Iterator[Sample]:
    for target in (aten.zeros.default, aten.ones.default):
        yield sample(target, [4, 5])
        yield sample(target, [])
        yield sample(target, size=[5, 6], dtype=torch.int64)
    yield sample(aten.full.default, [4, 5], 2.0)
    # Of no elements: what else they hold is not defined.
    yield sample(aten.empty.memory_format, [0, 5])
    yield sample(aten.empty_permuted.default, [0, 5], [1, 0])
    yield sample(aten.empty_strided.default, [0, 5], [5, 1])
    like = x(4, 5)
    yield sample(aten.new_empty.default, like, [0, 3], frozen=(0,))
    yield sample(aten.new_empty_strided.default, like, [0, 3], [3, 1], frozen=(0,))
    for target in (aten.new_ones.default, aten.new_zeros.default):
        yield sample(target, like, [3, 6])
    yield sample(aten.new_full.default, like, [3], 2.0, frozen=(0,))


def _counting() -> Iterator[Sample]:
    yield sample(aten.arange.default, 6)
    yield sample(aten.arange.start, 1, 6)
    yield sample(aten.arange.start_step, 1, 9, 2)
    yield sample(aten.range.default, 1, 6)
    yield sample(aten.range.step, 1, 6, 2)
    yield sample(aten.eye.default, 4)
    yield sample(aten.eye.m, 4, 5)
    yield sample(aten.scalar_tensor.default, 2.0)
    for target in (aten.tril_indices.default, aten.triu_indices.default):
        yield sample(target, 4, 5)
    for target in (aten.linspace, aten.logspace):
        yield sample(target.default, 0, 1, 6)
        yield sample(target.Tensor_Tensor, torch.tensor(0.0), torch.tensor(1.0), 6, frozen=(0, 1))
        yield sample(target.Tensor_Scalar, torch.tensor(0.0), 1, 6, frozen=(0,))
        yield sample(target.Scalar_Tensor, 0, torch.tensor(1.0), 6, frozen=(0,))
    for name in ("bartlett", "blackman", "hamming", "hann", "kaiser"):
        yield sample(getattr(aten, f"{name}_window").default, 6)
        yield sample(getattr(aten, f"{name}_window").periodic, 6, False)
    yield sample(aten.hamming_window.periodic_alpha, 6, True, 0.5)
    yield sample(aten.hamming_window.periodic_alpha_beta, 6, True, 0.5, 0.4)
    yield sample(aten.kaiser_window.beta, 6, True, 10.0)
    yield sample(aten.fft_fftfreq.default, 6)
    yield sample(aten.fft_rfftfreq.default, 6)
