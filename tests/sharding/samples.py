"""Sample calls of every operator that has a sharding rule.

Sizes differ from dim to dim, so that a rule that mixes two dims up is caught; some are divided by 2 and 3, some by neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from tests.sharding.brute_force import Sample, sample
from tests.sharding.make import bools, ints, positive, seed, x
from tests.sharding.samples_create import create_samples
from tests.sharding.samples_fourier import fourier_samples
from tests.sharding.samples_indexing import indexing_samples
from tests.sharding.samples_layers import layer_samples
from tests.sharding.samples_pointwise import pointwise_samples
from tests.sharding.samples_reduction import reduction_samples
from tests.sharding.samples_shape import shape_samples
from torch import Tensor

from shardwise.capture import operators

aten = torch.ops.aten


def samples() -> list[Sample]:
    """All of them, the same in every run."""
    seed()
    return [
        *(*matmuls(), *pointwise_samples(), *shape_samples(), *create_samples(), *fourier_samples(), *reduction_samples(), *norms()),
        *(*attentions(), *convolutions(), *pools(), *lookups(), *indexing_samples(), *losses(), *random()),
        *layer_samples(),
    ]


def matmuls() -> Iterator[Sample]:
    yield sample(aten.linear.default, x(4, 5, 6), x(9, 6), x(9))
    yield sample(aten.linear.default, x(7, 6), x(4, 6))
    yield sample(aten.linear.default, x(6), x(4, 6), x(4))
    yield sample(aten.addmm.default, x(5), x(4, 6), x(6, 5))
    yield sample(aten.addmm.default, x(4, 1), x(4, 6), x(6, 5), beta=0.5, alpha=2)
    yield sample(aten.addmm.default, x(4, 5), x(4, 6), x(6, 5))
    yield sample(aten.mm.default, x(4, 6), x(6, 5))
    yield sample(aten.bmm.default, x(3, 4, 6), x(3, 6, 5))
    yield sample(aten.baddbmm.default, x(1, 4, 5), x(3, 4, 6), x(3, 6, 5))
    yield sample(aten.baddbmm.default, x(3, 4, 1), x(3, 4, 6), x(3, 6, 5), beta=2)
    yield sample(aten.matmul.default, x(4, 5, 6), x(6, 7))
    yield sample(aten.matmul.default, x(4, 3, 5, 6), x(4, 3, 6, 7))
    yield sample(aten.matmul.default, x(4, 1, 5, 6), x(3, 6, 7))
    yield sample(aten.matmul.default, x(5, 6), x(4, 6, 7))
    yield sample(aten.matmul.default, x(6), x(4, 6, 5))
    yield sample(aten.matmul.default, x(4, 5, 6), x(6))
    yield sample(aten.matmul.default, x(6), x(6))
    yield sample(aten.matmul.default, x(1, 5, 6), x(4, 6, 7))


def norms() -> Iterator[Sample]:
    yield sample(aten.layer_norm.default, x(4, 3, 5), [5], x(5), x(5))
    yield sample(aten.layer_norm.default, x(4, 3, 5), [3, 5], x(3, 5))
    yield sample(aten.layer_norm.default, x(4, 5), [5])
    yield sample(aten.rms_norm.default, x(4, 3, 5), [5], x(5), 1e-6)
    yield sample(aten.rms_norm.default, x(4, 5), [5])
    yield sample(aten.group_norm.default, x(4, 6, 3), 3, x(6), x(6))
    yield sample(aten.group_norm.default, x(5, 8, 3, 2), 4)
    for bare in (False, True):
        arguments = (None, None) if bare else (x(5), x(5))
        frozen = (1, 2) if bare else (3, 4)
        yield sample(operators.batch_norm, x(4, 5, 3, 6), *arguments, x(5), positive(5), 0.1, 1e-5, frozen=frozen)
    yield sample(operators.batch_norm, x(7, 4), x(4), x(4), x(4), positive(4), 0.1, 1e-5, frozen=(3, 4))


def attentions() -> Iterator[Sample]:
    target = aten.scaled_dot_product_attention.default
    yield sample(target, x(4, 3, 5, 6), x(4, 3, 7, 6), x(4, 3, 7, 2))
    yield sample(target, x(4, 3, 5, 6), x(4, 3, 5, 6), x(4, 3, 5, 6), None, 0.0, True)
    yield sample(target, x(4, 3, 5, 6), x(4, 3, 7, 6), x(4, 3, 7, 2), _mask(4, 1, 5, 7), scale=0.3)
    yield sample(target, x(4, 3, 5, 6), x(4, 3, 7, 6), x(4, 3, 7, 2), x(5, 7))
    yield sample(target, x(4, 3, 5, 6), x(4, 3, 7, 6), x(4, 3, 7, 2), x(4, 3, 5, 7))
    yield sample(target, x(2, 12, 5, 6), x(2, 3, 7, 6), x(2, 3, 7, 2), enable_gqa=True)
    yield sample(target, x(2, 8, 5, 6), x(2, 2, 5, 6), x(2, 2, 5, 6), None, 0.0, True, enable_gqa=True)
    yield sample(target, x(2, 12, 5, 6), x(2, 4, 7, 6), x(2, 4, 7, 2), _mask(2, 12, 5, 7), enable_gqa=True)
    yield sample(target, x(2, 6, 5, 6), x(2, 1, 7, 6), x(2, 1, 7, 2), _mask(2, 1, 1, 7), enable_gqa=True)
    yield sample(target, x(4, 5, 6), x(4, 7, 6), x(4, 7, 2))
    yield sample(target, x(4, 3, 5, 6), x(1, 3, 7, 6), x(1, 3, 7, 2))


def _mask(*shape: int) -> Tensor:
    """Of booleans; every query sees some key."""
    mask = bools(*shape)
    mask[..., 0] = True
    return mask


def convolutions() -> Iterator[Sample]:
    yield sample(aten.conv1d.default, x(4, 6, 9), x(5, 6, 3), x(5))
    yield sample(aten.conv2d.default, x(4, 6, 7, 9), x(5, 6, 3, 2), x(5), [2, 1], [1, 0])
    yield sample(aten.conv2d.default, x(4, 6, 7, 9), x(5, 6, 1, 1))
    yield sample(aten.conv2d.default, x(2, 6, 5, 7), x(6, 1, 3, 3), x(6), [1, 1], [1, 1], [1, 1], 6)
    yield sample(aten.conv2d.default, x(2, 6, 5, 7), x(12, 2, 3, 3), None, [1, 1], [0, 0], [1, 1], 3)
    yield sample(aten.conv2d.padding, x(4, 6, 5, 7), x(5, 6, 3, 3), x(5), [1, 1], "same")
    yield sample(aten.conv3d.default, x(2, 4, 3, 5, 6), x(5, 4, 2, 2, 2), x(5))
    yield sample(aten.conv_transpose1d.default, x(4, 6, 5), x(6, 3, 2), x(3), [2])
    yield sample(aten.conv_transpose2d.input, x(4, 6, 5, 3), x(6, 5, 2, 2), x(5), [2, 2])
    yield sample(aten.conv_transpose2d.input, x(2, 6, 5, 3), x(6, 2, 2, 2), None, [2, 2], [0, 0], [0, 0], 3)


def pools() -> Iterator[Sample]:
    yield sample(aten.max_pool2d.default, x(4, 3, 8, 10), [2, 2], [2, 2])
    yield sample(aten.avg_pool2d.default, x(4, 3, 8, 10), [2, 2])
    yield sample(aten.adaptive_avg_pool1d.default, x(4, 3, 8), [2])
    yield sample(aten.adaptive_avg_pool2d.default, x(4, 3, 8, 10), [1, 1])
    yield sample(aten.adaptive_avg_pool2d.default, x(3, 8, 10), [2, 5])
    yield sample(aten.upsample_nearest2d.vec, x(4, 3, 5, 6), None, [2.0, 2.0])
    yield sample(aten.upsample_bilinear2d.vec, x(4, 3, 5, 6), [10, 9], False, None)
    yield sample(aten.upsample_bicubic2d.vec, x(4, 3, 5, 6), None, False, [2.0, 2.0])


def lookups() -> Iterator[Sample]:
    yield sample(aten.embedding.default, x(7, 6), ints(7, 4, 5))
    yield sample(aten.embedding.default, x(8, 6), ints(8, 9), 3)
    yield sample(aten.embedding.default, x(8, 6), ints(3, 9), -1, True)


def losses() -> Iterator[Sample]:
    yield sample(operators.cross_entropy_sum, x(6, 7), _labels(7, 6), None, -100, 0.0)
    yield sample(operators.cross_entropy_sum, x(5, 8), ints(8, 5), None, 3, 0.0)
    yield sample(operators.cross_entropy_sum, x(4, 7), _labels(7, 4), None, -100, 0.1)
    yield sample(operators.cross_entropy_sum, x(4, 7), _labels(7, 4), positive(7), -100, 0.0, frozen=(2,))
    yield sample(operators.cross_entropy_sum, x(4, 7, 3, 5), _labels(7, 4, 3, 5), None, -100, 0.0)
    yield sample(operators.cross_entropy_sum, x(7), torch.tensor(2), None, -100, 0.0)
    yield sample(operators.valid_count, _labels(7, 4, 5), None, -100, torch.float64)
    yield sample(operators.valid_count, _labels(7, 4), positive(7), -100, torch.float64, frozen=(1,))
    for name in ("mse_loss", "smooth_l1_loss", "l1_loss"):
        for reduction in (0, 1, 2):
            yield sample(getattr(aten, name).default, x(4, 5), x(4, 5), reduction)
    yield sample(aten.mse_loss.default, x(4, 5), x(4, 5))
    yield sample(aten.binary_cross_entropy_with_logits.default, x(4, 5), bools(4, 5).double(), frozen=(1,))
    yield sample(aten.binary_cross_entropy_with_logits.default, x(4, 5), bools(4, 5).double(), positive(5), None, 2, frozen=(1, 2))


def _labels(classes: int, *shape: int) -> Tensor:
    """With ignored ones, most in the first rows."""
    labels = ints(classes, *shape)
    return torch.where(torch.arange(prod(shape)).reshape(shape) % 5 == 1, -100, labels)


def random() -> Iterator[Sample]:
    state = torch.tensor([123456789012345, 0])
    yield from (sample(operators.keyed_dropout, x(*shape), state, 0.3, key=5) for shape in ((24,), (4, 5), (4, 3, 6)))
    for mask, causal in ((None, True), (_mask(2, 1, 6, 6), False), (x(6, 6), False)):
        yield sample(operators.dropped_attention, x(2, 4, 6, 3), x(2, 2, 6, 3), x(2, 2, 6, 4), mask, 0.3, causal, 0.4, state, key=5)
