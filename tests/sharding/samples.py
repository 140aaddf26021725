"""Sample calls of every operator that has a sharding rule.

Sizes differ from dim to dim, so that a rule that mixes two dims up is caught; some are divided by 2 and 3, some by neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from tests.sharding.brute_force import Sample, sample
from torch import Tensor

from shardwise.capture import operators
from shardwise.capture.graph import Op, Value

aten = torch.ops.aten
_generator = torch.Generator()


def samples() -> list[Sample]:
    """All of them, the same in every run."""
    _generator.manual_seed(0)
    return [
        *(*matmuls(), *pointwise(), *shapes(), *pieces(), *ends(), *created(), *reductions(), *norms()),
        *(*attentions(), *convolutions(), *pools(), *lookups(), *losses(), *random()),
    ]


def x(*shape: int) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(shape, dtype=torch.float64, generator=_generator)


def positive(*shape: int) -> Tensor:
    return x(*shape).abs() + 0.5


def ints(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=_generator)


def bools(*shape: int) -> Tensor:
    return torch.rand(shape, generator=_generator) > 0.4


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


_UNARY = (
    *("abs", "bitwise_not", "ceil", "cos", "elu", "erf", "exp", "floor", "gelu", "leaky_relu", "log", "log_sigmoid", "logical_not", "neg"),
    *("reciprocal", "relu", "rsqrt", "sigmoid", "sign", "silu", "sin", "softplus", "sqrt", "square", "tanh"),
)
_COMPARISONS = ("eq", "ne", "ge", "gt", "le", "lt")


def pointwise() -> Iterator[Sample]:
    for name in _UNARY:
        argument = ints(9, 4, 5) if name == "bitwise_not" else positive(4, 5) if name in ("log", "sqrt", "rsqrt") else x(4, 5)
        yield sample(getattr(aten, name).default, argument)
    for name in ("add", "sub", "rsub", "mul", "div"):
        yield sample(getattr(aten, name).Scalar, x(4, 5), 3)
    for name in _COMPARISONS:
        yield sample(getattr(aten, name).Scalar, ints(3, 4, 5), 1)
        yield sample(getattr(aten, name).Tensor, ints(3, 4, 5), ints(3, 5))
    for name in ("bitwise_and", "bitwise_or", "__and__", "__or__"):
        yield sample(getattr(aten, name).Tensor, bools(4, 1, 5), bools(3, 5))
    for name in ("logical_and", "logical_or"):
        yield sample(getattr(aten, name).default, bools(4, 5), bools(4, 1))
    yield sample(aten.clamp.default, x(4, 5), -0.5, 0.5)
    yield sample(aten.clamp_min.default, x(4, 5), -0.5)
    yield sample(aten.clamp_max.default, x(4, 5), 0.5)
    yield sample(aten.floor_divide.default, ints(30, 4, 5), ints(4, 5) + 1)
    yield sample(aten.maximum.default, x(4, 5), x(5))
    yield sample(aten.minimum.default, x(4, 5), x(4, 1))
    yield sample(aten.pow.Scalar, 2.0, x(4, 5))
    yield sample(aten.pow.Tensor_Scalar, positive(4, 5), 3)
    yield sample(aten.pow.Tensor_Tensor, positive(4, 5), x(4, 1))
    for name in ("Scalar", "ScalarOther", "ScalarSelf"):
        branches = [1.0 if name != "ScalarOther" else x(4, 5), 0.0 if name != "ScalarSelf" else x(4, 5)]
        yield sample(getattr(aten.where, name), bools(4, 5), *branches)
    for name in ("zeros_like", "ones_like"):
        yield sample(getattr(aten, name).default, x(4, 5))
    yield sample(aten.full_like.default, x(4, 5), 2.0)
    yield sample(aten.to.dtype, x(4, 5), torch.float32)
    yield sample(aten.to.dtype, ints(9, 4, 5), torch.float64)
    yield sample(aten.to.dtype, x(4, 5), torch.int64)
    yield sample(aten.to.dtype_layout, x(4, 5), dtype=torch.float32)
    yield sample(aten.to.device, x(4, 5), torch.device("cpu"), torch.float32)
    yield sample(aten._to_copy.default, x(4, 5), dtype=torch.float32)
    yield sample(aten.type_as.default, x(4, 5).float(), x(7))
    yield sample(aten.masked_fill.Scalar, x(4, 3, 5), bools(3, 1), 0.0)
    yield sample(aten.masked_fill.Scalar, x(4, 3, 5), bools(4, 3, 5), -7.0)
    for name in ("add", "sub"):
        yield sample(getattr(aten, name).Tensor, x(4, 5), x(4, 5), alpha=2)
        yield sample(getattr(aten, name).Tensor, x(4, 1, 5), x(3, 1))
        yield sample(getattr(aten, name).Tensor, x(4, 5), 3)
    yield sample(aten.add.Tensor, x(6), x())
    for name in ("mul", "div"):
        yield sample(getattr(aten, name).Tensor, x(4, 5), positive(4, 5))
        yield sample(getattr(aten, name).Tensor, x(4, 1, 5), positive(3, 1))
        yield sample(getattr(aten, name).Tensor, x(4, 5), 3)
    yield sample(aten.where.self, bools(4, 1), x(4, 5), x(5))
    yield sample(aten.where.self, bools(4, 5), x(4, 5), x())


def shapes() -> Iterator[Sample]:
    """Dims moved, joined, opened and broadcast."""
    yield sample(aten.transpose.int, x(4, 3, 5), 0, -1)
    yield sample(aten.t.default, x(4, 5))
    yield sample(aten.t.default, x(5))
    yield sample(aten.numpy_T.default, x(4, 3, 5))
    yield sample(aten.permute.default, x(4, 3, 5), [1, -1, 0])
    for target in (aten.alias, aten.contiguous, aten.clone, aten.detach, aten.lift_fresh_copy):
        yield sample(target.default, x(4, 5))
    yield sample(aten.unsqueeze.default, x(4, 5), -1)
    yield sample(aten.unsqueeze.default, x(4, 5), 1)
    yield sample(aten.squeeze.dim, x(4, 1, 5), 1)
    yield sample(aten.squeeze.dim, x(4, 1, 5), 0)
    yield sample(aten.squeeze.dims, x(4, 1, 5, 1), [-1, 1])
    yield sample(aten.squeeze.default, x(1, 4, 1, 5))
    yield sample(aten.expand.default, x(4, 1, 5), [4, 3, 5], rewrites=[{1: [-1, 3, -1]}])
    yield sample(aten.expand.default, x(4, 5), [6, -1, 5], rewrites=[{1: [6, -1, -1]}])
    yield sample(aten.expand.default, x(1, 5), [4, 1, 5], rewrites=[{1: [4, -1, -1]}])
    yield sample(aten.broadcast_to.default, x(4, 1), [4, 5], rewrites=[{1: [-1, 5]}])
    yield sample(aten.expand_as.default, x(4, 1), x(3, 4, 5))
    yield from (_reshape(*each) for each in _RESHAPES)
    yield sample(aten.view_as.default, x(4, 6), x(4, 2, 3))
    yield sample(aten.flatten.using_ints, x(4, 3, 5), 1, 2)
    yield sample(aten.flatten.using_ints, x(4, 3, 5))
    yield sample(aten.unflatten.int, x(4, 6), 1, [2, 3], rewrites=[{2: [2, -1]}, {2: [-1, 3]}])


_RESHAPES: tuple[tuple[list[int], list[int]], ...] = (
    ([4, 6], [24]),
    ([24], [4, 6]),
    ([4, 6, 5], [24, 5]),
    ([4, 6, 5], [4, 30]),
    ([4, 5, 12], [4, 5, 3, 4]),
    ([4, 5, 3, 4], [20, 12]),
    ([6, 4], [4, 6]),
    ([4, 6, 5], [4, 10, 3]),
    ([1, 4, 5], [4, 1, 5]),
    ([4, 5], [4, 5]),
    ([2, 4, 3], [8, 3]),
    ([6], [2, 3, 1]),
    ([5, 7], [35]),
    ([8, 9], [6, 12]),
)


def _reshape(source: list[int], out: list[int]) -> Sample:
    one_open = [{1: [-1 if place == dim else size for place, size in enumerate(out)]} for dim in range(len(out))]
    return sample(aten.reshape.default, x(*source), out, rewrites=one_open)


def pieces() -> Iterator[Sample]:
    """One tensor into several, several into one."""
    yield sample(aten.split.Tensor, x(4, 12), 4, 1, rewrites=[{1: 2}])
    yield sample(aten.split.Tensor, x(7, 5), 3)
    yield sample(aten.split_with_sizes.default, x(4, 12, 5), [4, 4, 4], -2, rewrites=[{1: [2, 2, 2]}])
    yield sample(aten.split_with_sizes.default, x(4, 9), [2, 3, 4], 1)
    yield sample(aten.chunk.default, x(4, 8), 2, -1)
    yield sample(aten.chunk.default, x(8, 5), 2)
    yield sample(aten.unbind.int, x(4, 3, 5), 1)
    yield sample(aten.unbind.int, x(3, 5))
    yield sample(aten.cat.default, [x(4, 3), x(4, 3)], -1)
    yield sample(aten.cat.default, [x(4, 3), x(4, 5)], 1)
    yield sample(aten.cat.default, [x(4, 5), x(4, 5), x(4, 5)])
    yield sample(aten.stack.default, [x(4, 5), x(4, 5)])
    yield sample(aten.stack.default, [x(4, 5), x(4, 5), x(4, 5)], -1)


def ends() -> Iterator[Sample]:
    """Parts of a dim, padding, repetition, and runs along a dim."""
    yield sample(aten.slice.Tensor, x(4, 5, 6), 1, 1, 4)
    yield sample(aten.slice.Tensor, x(8, 5), 0, 0, 9223372036854775807, 2)
    yield sample(aten.slice.Tensor, x(8, 5), -1, -2)
    yield sample(aten.slice.Tensor, x(8, 5))
    yield sample(aten.select.int, x(4, 5, 6), 1, -1)
    yield sample(aten.pad.default, x(4, 3, 5), [1, 2])
    yield sample(aten.pad.default, x(4, 3, 5), [0, 0, 1, 0], "constant", 2.0)
    yield sample(aten.pad.default, x(4, 3, 5), [2, 1], "reflect")
    yield sample(aten.constant_pad_nd.default, x(4, 5), [0, 0, 1, 1], -1.0)
    yield sample(aten.constant_pad_nd.default, x(4, 5), [0, -1])
    yield sample(aten.repeat.default, x(4, 5), [3, 1, 2])
    yield sample(aten.repeat.default, x(4, 5), [2, 1])
    yield sample(aten.repeat_interleave.self_int, x(4, 5), 3, 0)
    yield sample(aten.repeat_interleave.self_int, x(4, 5), 2, -1, output_size=10)
    yield sample(aten.repeat_interleave.self_int, x(4, 5), 2)
    yield sample(aten.roll.default, x(4, 5, 6), [1], [-2])
    yield sample(aten.roll.default, x(4, 5), [2])
    yield sample(aten.diff.default, x(4, 6))
    yield sample(aten.diff.default, x(4, 6), 1, 0, x(1, 6), x(2, 6))
    yield sample(aten.diff.default, x(4, 6), 1, -1, x(4, 2))
    yield sample(aten.cumsum.default, x(4, 5), 1)
    yield sample(aten.cumsum.default, ints(5, 4, 5), -2)


def created() -> Iterator[Sample]:
    yield sample(aten.arange.default, 6)
    yield sample(aten.arange.start, 1, 6)
    yield sample(aten.arange.start_step, 1, 9, 2)
    yield sample(aten.zeros.default, [4, 5])
    yield sample(aten.ones.default, [4, 5])
    yield sample(aten.full.default, [4, 5], 2.0)
    yield sample(aten.eye.default, 4)
    yield sample(aten.scalar_tensor.default, 2.0)
    yield sample(aten.new_ones.default, x(4, 5), [3])
    yield sample(aten.new_zeros.default, x(4, 5), [3])
    yield sample(aten.new_full.default, x(4, 5), [3], 2.0)


def reductions() -> Iterator[Sample]:
    yield sample(aten.sum.default, x(4, 5))
    yield sample(aten.sum.default, bools(4, 5))
    yield sample(aten.sum.dim_IntList, x(4, 3, 5), [-1], True)
    yield sample(aten.sum.dim_IntList, x(4, 3, 5), [0, 2])
    yield sample(aten.sum.dim_IntList, x(4, 5), None)
    yield sample(aten.mean.default, x(4, 5))
    yield sample(aten.mean.dim, x(4, 3, 5), [-1], True)
    yield sample(aten.mean.dim, x(4, 3, 5), [0, 1])
    yield sample(aten.mean.dim, x(4, 5), None)
    yield sample(aten.amax.default, x(4, 5), [-1], True)
    yield sample(aten.amax.default, x(4, 5))
    yield sample(aten.max.dim, x(4, 5), 1)
    yield sample(aten.argmax.default, x(4, 5), -1)
    yield sample(aten.argmax.default, x(4, 5), 0, True)
    yield sample(aten.argmin.default, x(4, 5))
    yield sample(aten.var.correction, x(4, 3, 5), [1], correction=1, keepdim=True)
    yield sample(aten.var.correction, x(4, 5), None, correction=0)
    for name in ("softmax", "log_softmax"):
        yield sample(getattr(aten, name).int, x(4, 3, 5), -1)
        yield sample(getattr(aten, f"_{name}").default, x(4, 5), 0, False)


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
    yield sample(aten.gather.default, x(4, 5, 6), 1, ints(5, 4, 3, 6))
    yield sample(aten.gather.default, x(5, 6), -1, ints(6, 4, 3))
    yield sample(aten.index.Tensor, x(6, 5), [ints(6, 4, 3)])
    yield sample(aten.index.Tensor, x(6, 5, 2), [ints(6, 4, 1), ints(5, 3)])
    yield sample(aten.index.Tensor, x(4, 6, 5), [None, ints(6, 3)])
    yield sample(aten.index.Tensor, x(4, 6, 5), [ints(4, 3), None, ints(5, 3)])
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
