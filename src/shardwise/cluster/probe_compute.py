"""Measures what one rank computes a second. Runs inside a rank, while the other ranks do the same."""

from __future__ import annotations

import mmap
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate, cycle

import torch
from torch import Tensor

from shardwise.cluster.probe_kernels import KERNELS
from shardwise.cluster.rates import KERNEL_WORKING_SET_BYTES, Curve, MatmulRate, OptimizerRate
from shardwise.cluster.timing import Stopwatch

__all__ = [
    "attention_flops",
    "attention_ragged",
    "cached_bytes_per_s",
    "call_seconds",
    "convolution_flops",
    "element_seconds",
    "fresh_bytes_per_s",
    "matmul_rate",
    "optimizer_rates",
    "streaming_bytes_per_s",
]

aten = torch.ops.aten

_CUBES = {torch.float32: (16, 32, 64, 128, 256, 512, 1024), torch.float64: (32, 128, 512), torch.bfloat16: (32, 128, 512, 1024)}
_THIN = (1, 4, 16, 64, 256)
_THIN_OTHERS = 768
_MOST_THINNESS = 1.2  # a thin product is hardly faster than a cube; more than this is noise
_BATCHED = ((32, 16, 16, 16), (32, 64, 32, 64), (32, 128, 64, 128), (32, 256, 64, 256), (16, 512, 64, 512))
_KEYS = (32, 128, 256, 512, 1024)
_HEAD, _HEADS, _TOKENS, _RAGGED_KEYS = 64, 4, 1024, 197
_WORKING_SETS = tuple(3 << shift for shift in (15, 18, 20, 22, 24, 26))  # 96 KiB to 192 MiB: all caches and beyond
_COLD_BYTES = 96 << 20  # between two uses of a tensor
_OTHER_WORK_BYTES = 1 << 20  # between two calls of an operator
_FRESH_BYTES = 64 << 20
_KERNEL_COLUMNS, _KERNEL_BYTES = 512, KERNEL_WORKING_SET_BYTES // 3
_OPTIMIZER_NUMELS, _OPTIMIZER_TOTAL = (1 << 14, 1 << 18, 1 << 20, 1 << 22), 1 << 22
_CONVOLUTIONS: tuple[tuple[int, ...], ...] = (  # batch, channels in, size, channels out, kernel, stride, groups
    (4, 32, 64, 32, 3, 1, 32),
    (4, 3, 64, 16, 3, 1, 1),
    (4, 32, 64, 32, 3, 1, 1),
    (4, 64, 64, 64, 3, 1, 1),
    (4, 128, 32, 128, 3, 1, 1),
    (4, 3, 224, 384, 16, 16, 1),
)


def matmul_rate(dtype: torch.dtype, watch: Stopwatch) -> MatmulRate:
    """Products of a dtype: cubes, thin ones (each of m, n, k in turn, against the cube of as many flops), batches."""
    measured = [_product_flops(n, n, n, dtype, watch) for n in _CUBES[dtype]]
    rising = accumulate(measured, max)  # a larger cube that seems slower was disturbed
    cubes = Curve.through({2.0 * n**3: rate for n, rate in zip(_CUBES[dtype], rising, strict=True)})
    return MatmulRate(cubes_flops=cubes, thinness=_thinness(cubes, dtype, watch), batched_flops=_batched(dtype, watch))


def _thinness(cubes: Curve, dtype: torch.dtype, watch: Stopwatch) -> Curve:
    parts = {float(size): min(_thin_part(cubes, size, dtype, watch), _MOST_THINNESS) for size in _THIN}
    return Curve.through({**parts, _THIN_OTHERS: 1.0})


def _thin_part(cubes: Curve, size: int, dtype: torch.dtype, watch: Stopwatch) -> float:
    shapes = ((size, _THIN_OTHERS, _THIN_OTHERS), (_THIN_OTHERS, size, _THIN_OTHERS), (_THIN_OTHERS, _THIN_OTHERS, size))
    rates = [_product_flops(*shape, dtype, watch) for shape in shapes]
    return statistics.geometric_mean(rates) / cubes.at(2.0 * size * _THIN_OTHERS * _THIN_OTHERS)


def _product_flops(m: int, n: int, k: int, dtype: torch.dtype, watch: Stopwatch) -> float:
    left, right, out = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype).t(), torch.empty(m, n, dtype=dtype)
    return 2.0 * m * n * k / watch.seconds(partial(torch.mm, left, right, out=out))


def _batched(dtype: torch.dtype, watch: Stopwatch) -> Curve:
    return Curve.through({2.0 * m * k * n: _batched_flops(batch, m, k, n, dtype, watch) for batch, m, k, n in _BATCHED})


def _batched_flops(batch: int, m: int, k: int, n: int, dtype: torch.dtype, watch: Stopwatch) -> float:
    left, right = torch.randn(batch, m, k).to(dtype), torch.randn(batch, k, n).to(dtype)
    return 2.0 * batch * m * n * k / watch.seconds(partial(torch.bmm, left, right, out=torch.empty(batch, m, n, dtype=dtype)))


def attention_flops(watch: Stopwatch) -> dict[str, Curve]:
    """Fused attention of float32 by number of keys (as many queries), heads of 64 cut out of one packed projection, as models do."""
    found: dict[str, dict[float, float]] = {}
    for keys in _KEYS:
        for suffix, causal in (("", False), ("_causal", True)):
            forward, backward = _attention_rates(keys, causal, watch)
            found.setdefault("forward" + suffix, {})[keys] = forward
            found.setdefault("backward" + suffix, {})[keys] = backward
    return {name: Curve.through(points) for name, points in found.items()}


def attention_ragged(curves: Mapping[str, Curve], watch: Stopwatch) -> float:
    """What is left of attention's rate when the number of keys is no multiple of a vector's width."""
    parts = zip(("forward", "backward"), _attention_rates(_RAGGED_KEYS, False, watch), strict=True)
    return min(1.0, statistics.mean(rate / curves[name].at(_RAGGED_KEYS) for name, rate in parts))


def _attention_rates(keys: int, causal: bool, watch: Stopwatch) -> tuple[float, float]:
    batch = max(1, _TOKENS // keys)
    packed = torch.randn(batch, keys, 3, _HEADS, _HEAD)
    query, key, value = (packed[:, :, part].transpose(1, 2) for part in range(3))
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, logsumexp = attend(query, key, value, 0.0, causal)
    differentiate = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    flops = 4.0 * batch * _HEADS * keys * keys * _HEAD
    forward = watch.seconds(lambda: attend(query, key, value, 0.0, causal))
    backward = watch.seconds(lambda: differentiate(out, query, key, value, out, logsumexp, 0.0, causal))
    return flops / forward, 2.5 * flops / backward


def convolution_flops(watch: Stopwatch) -> dict[str, Curve]:
    """Float32 convolutions as products, by the smaller of output channels a group and input channels a group × kernel size."""
    found: dict[str, dict[float, float]] = {"forward": {}, "backward_input": {}, "backward_weight": {}}
    for batch, channels, size, outputs, kernel, stride, groups in _CONVOLUTIONS:
        image, weight = torch.randn(batch, channels, size, size), torch.randn(outputs, channels // groups, kernel, kernel)
        arguments = ([stride, stride], [kernel // 2 if stride == 1 else 0] * 2, [1, 1], False, [0, 0], groups)
        convolve = partial(torch.ops.aten.convolution, image, weight, None, *arguments)
        result = convolve()
        differentiate = partial(torch.ops.aten.convolution_backward, result, image, weight, None, *arguments)
        calls = (convolve, partial(differentiate, [True, False, False]), partial(differentiate, [False, True, False]))
        for rates, call in zip(found.values(), calls, strict=True):
            rates[float(min(outputs // groups, weight[0].numel()))] = 2.0 * result.numel() * weight[0].numel() / watch.seconds(call)
    return {**{name: Curve.through(rates) for name, rates in found.items()}, **_transposed_flops(watch)}


def _transposed_flops(watch: Stopwatch) -> dict[str, Curve]:
    """One upsampling by 2 as U-Nets do it; its kernels are others than those of plain convolutions."""
    image, weight = torch.randn(4, 64, 32, 32), torch.randn(64, 32, 2, 2)
    arguments = ([2, 2], [0, 0], [1, 1], True, [0, 0], 1)
    convolve = partial(torch.ops.aten.convolution, image, weight, None, *arguments)
    differentiate = partial(torch.ops.aten.convolution_backward, convolve(), image, weight, None, *arguments, [True, True, False])
    flops = 2.0 * image.numel() * weight[0].numel()
    backward = Curve.constant(2 * flops / watch.seconds(differentiate))
    forward = Curve.constant(flops / watch.seconds(convolve))
    return {"forward_transposed": forward, "backward_input_transposed": backward, "backward_weight_transposed": backward}


def streaming_bytes_per_s(watch: Stopwatch) -> tuple[Curve, Curve]:
    """Rates of reading and of writing, by working set.

    Between two uses of a tensor a training step touches far more than any cache holds, and what it makes lies where nothing was for
    long. So working sets are met cold, however small: each call takes the next of many.
    """
    pairs = {float(size): _read_write(size, watch, cold=True) for size in _WORKING_SETS}
    return Curve.through({size: read for size, (read, _) in pairs.items()}), Curve.through(
        {size: write for size, (_, write) in pairs.items()}
    )


def cached_bytes_per_s(watch: Stopwatch) -> tuple[float, float]:
    """Rates of reading and of writing what the call before this one used, of the working set of `KERNELS`."""
    return _read_write(KERNEL_WORKING_SET_BYTES, watch, cold=False)


def _read_write(working_set: int, watch: Stopwatch, *, cold: bool) -> tuple[float, float]:
    """Those that explain an in-place scaling (only reads: the lines it writes are there already), a copy and a sum of two best, in the
    least-squares sense of relative errors."""
    makers: tuple[Callable[..., Tensor], ...] = (_scale, _copy, _add)
    calls = [_streaming(working_set, tensors, call, cold=cold) for tensors, call in enumerate(makers, start=1)]
    times = [watch.seconds(call) for call in calls]
    read = (working_set, working_set / 2, working_set * 2 / 3)
    write = (0.0, working_set / 2, working_set / 3)
    rows = torch.tensor([[r / t, w / t] for r, w, t in zip(read, write, times, strict=True)], dtype=torch.float64)
    per_read, per_write = torch.linalg.lstsq(rows, torch.ones(3, 1, dtype=torch.float64)).solution.flatten().tolist()
    fastest = times[0] / working_set / 10  # neither is free, whatever the noise says
    return 1 / max(per_read, fastest), 1 / max(per_write, fastest)


def _streaming(working_set: int, tensors: int, call: Callable[..., Tensor], *, cold: bool) -> Callable[[], Tensor]:
    count = max(2, _COLD_BYTES // working_set) if cold else 1
    sets = cycle([[torch.ones(working_set // 4 // tensors) for _ in range(tensors)] for _ in range(count)])
    return lambda: call(*next(sets))


def _scale(one: Tensor) -> Tensor:
    return one.mul_(1.0)


def _copy(source: Tensor, target: Tensor) -> Tensor:
    return target.copy_(source)


def _add(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    return torch.add(left, right, out=out)


def fresh_bytes_per_s(watch: Stopwatch) -> float:
    """Rate of mapping and zeroing the pages of a large result: what a sum takes longer when its result is new.

    The result is mapped here: the allocator maps none while a hole of the heap, or its free end, is large enough.
    """
    left, right, out = (torch.ones(_FRESH_BYTES // 4) for _ in range(3))
    new = watch.seconds(lambda: torch.add(left, right, out=_mapped(_FRESH_BYTES)))
    old = watch.seconds(lambda: torch.add(left, right, out=out))
    return _FRESH_BYTES / max(new - old, 0.01 * old)


def _mapped(size: int) -> Tensor:
    """A float32 tensor of so many bytes in pages that nobody has touched; they are unmapped with it."""
    return torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.float32)


def call_seconds(watch: Stopwatch) -> tuple[float, float]:
    """Fixed time of an operator that computes next to nothing, and of a view, each after other work.

    In a step an operator's code was last used some operators ago: it takes several times as long as called again and again.
    """
    tensor, other = torch.ones(4, 4), torch.ones(_OTHER_WORK_BYTES // 4)
    calls = (
        lambda: aten.add.Tensor(tensor, tensor),
        lambda: aten.mul.Tensor(tensor, tensor),
        lambda: aten.mm.default(tensor, tensor),
        lambda: aten.tanh.default(tensor),
        lambda: aten.sum.dim_IntList(tensor, [0]),
        lambda: aten.cat.default([tensor, tensor]),
        lambda: aten._softmax.default(tensor, -1, False),
        lambda: aten.clone.default(tensor),
    )
    views = (
        lambda: aten.view.default(tensor, [16]),
        lambda: aten.t.default(tensor),
        lambda: aten.unsqueeze.default(tensor, 0),
        lambda: aten.slice.Tensor(tensor, 0, 0, 2),
    )

    def after(call: Callable[[], Tensor]) -> float:
        return watch.seconds(call, before=partial(other.mul_, 1.0))

    return statistics.fmean(map(after, calls)), statistics.fmean(map(after, views))


def _repeated_call_seconds(watch: Stopwatch) -> float:
    tensor, calls = torch.ones(4), range(100)
    return watch.seconds(lambda: [aten.add.Tensor(tensor, tensor) for _ in calls]) / len(calls)


def element_seconds(dtype: torch.dtype, watch: Stopwatch) -> dict[str, float]:
    """Seconds per element of each kernel of `probe_kernels`, its data in cache, less the call's fixed time."""
    rows, found, call_s = _KERNEL_BYTES // _KERNEL_COLUMNS // dtype.itemsize, {}, _repeated_call_seconds(watch)
    for name, make in KERNELS.items():
        call, elements = make(torch.randn(rows, _KERNEL_COLUMNS).to(dtype))
        found[name] = max(watch.seconds(call) - call_s, 1e-9) / elements
    return found


def optimizer_rates(watch: Stopwatch) -> dict[str, OptimizerRate]:
    """A step of torch's fused optimizers, which the runtime uses, on float32 parameters too many for the caches."""
    makers: dict[str, Callable[[Sequence[Tensor]], torch.optim.Optimizer]] = {
        "adamw": partial(torch.optim.AdamW, lr=1e-3, fused=True),
        "adam": partial(torch.optim.Adam, lr=1e-3, fused=True),
        "sgd": partial(torch.optim.SGD, lr=1e-3, fused=True),
        "sgd_momentum": partial(torch.optim.SGD, lr=1e-3, momentum=0.9, fused=True),
    }
    return {kind: _optimizer_rate(make, watch) for kind, make in makers.items()}


def _optimizer_rate(make: Callable[[Sequence[Tensor]], torch.optim.Optimizer], watch: Stopwatch) -> OptimizerRate:
    fixed = _step_seconds(make, 16, 32, watch)
    steps = {numel: _step_seconds(make, numel, _OPTIMIZER_TOTAL // numel, watch) for numel in _OPTIMIZER_NUMELS}
    element_s = {4.0 * numel: max(step - fixed, 1e-9) / numel for numel, step in steps.items()}
    return OptimizerRate(fixed_s=fixed, element_s=Curve.through(element_s))


def _step_seconds(make: Callable[[Sequence[Tensor]], torch.optim.Optimizer], numel: int, count: int, watch: Stopwatch) -> float:
    parameters = [torch.nn.Parameter(torch.randn(numel)) for _ in range(count)]
    for parameter in parameters:
        parameter.grad = torch.randn(numel)
    return watch.seconds(make(parameters).step) / count
