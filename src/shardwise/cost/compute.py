"""Seconds, flops and bytes of one ATen call, from the shapes, strides and dtypes of its arguments and results.

    products, attention, convolutions    flops ÷ rate of that shape, with the operands in cache
    all others                           elements × what the kernel takes per element in cache beyond streaming
    both        + bytes read ÷ read rate + bytes written ÷ write rate, both rates of that working set: between two uses of a
                  tensor a step touches more than the caches hold
    views       a call
    each        + a call's fixed time, + the time of mapping new pages for results so large that the allocator asks for them anew

Rates are those of `shardwise.cluster.rates`, of one rank while all are busy. The results of an operator written in place are
lines that it has read anyway: they cost no write.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from torch import Tensor
from torch.utils.flop_counter import flop_registry

from shardwise.cluster.model import Cluster
from shardwise.cluster.rates import KERNEL_WORKING_SET_BYTES, Rates
from shardwise.cost.operators import FREE, MATMULS, is_inplace, is_view, kernel_of, name_of, reads_only_rows, writes_only
from shardwise.cost.tensors import dtype_name, reordered, tensors_in, touched_bytes

__all__ = ["op_flops", "op_seconds", "streaming_seconds"]

_Args = tuple[Any, ...]
_Kwargs = Mapping[str, Any]
_ATTENTION_BACKWARD: Final = "_scaled_dot_product_flash_attention_for_cpu_backward"
_PASSES: Final = {"native_batch_norm": 3, "native_batch_norm_backward": 2}  # over what no cache holds: mean, variance, result
_EXPERTS: Final = ("expert_mm", "expert_outer")
_CONVOLUTIONS: Final = ("convolution", "conv1d", "conv2d", "conv3d", "convolution_backward")
_INDEX_OF_CAUSAL: Final = {"scaled_dot_product_attention": 5, "_scaled_dot_product_flash_attention_for_cpu": 4, _ATTENTION_BACKWARD: 7}


def op_seconds(target: Any, args: Sequence[Any], kwargs: _Kwargs, output: Any, cluster: Cluster) -> float:
    """Time, s, of one call on one rank while all ranks are busy; 0 for what is no ATen operator (``getitem``, symbolic sizes)."""
    name, rates = name_of(target), cluster.rates
    if not name or name in FREE:
        return 0.0
    if is_view(target):
        return rates.view_s
    compute = _COMPUTE_BOUND.get(name)
    if compute is None:
        seconds = _SPECIAL.get(name, _streaming_seconds)(name, tuple(args), kwargs, output, rates)
    else:
        arithmetic = compute(name, tuple(args), kwargs, output, rates)
        memory = _memory_seconds(*_traffic(name, tuple(args), kwargs, output), rates)
        seconds = max(arithmetic, memory) if rates.overlaps_memory else arithmetic + memory
    return seconds + rates.call_s + _fresh_seconds(target, output, rates)


def streaming_seconds(read: int, written: int, cluster: Cluster) -> float:
    """Time, s, of one kernel that does little but read and write so many bytes; nothing for a part of another kernel."""
    return _memory_seconds(read, written, cluster.rates) + cluster.rates.call_s if read + written else 0.0


def op_flops(target: Any, args: Sequence[Any], kwargs: _Kwargs, output: Any) -> float:
    """Floating-point operations of products, convolutions and attention (a multiply-add is two, causal masks are not taken off);
    0 for all other operators. Formulas: torch.utils.flop_counter where it has one."""
    name = name_of(target)
    if name in _INDEX_OF_CAUSAL:
        return _attention_flops(name, args)
    if name in _EXPERTS:
        return _expert_flops(name, args, output)
    if name in ("linear", "matmul"):
        return float(2 * args[0].shape[-1] * output.numel())
    formula = flop_registry.get(getattr(target, "overloadpacket", target))
    return float(formula(*args, **kwargs, out_val=output)) if formula is not None else 0.0


_Cost = Callable[[str, _Args, _Kwargs, Any, Rates], float]


# --- products -------------------------------------------------------------------------------------------------------------


def _product_seconds(name: str, args: _Args, _kwargs: _Kwargs, output: Tensor, rates: Rates) -> float:
    operands = [arg for arg in args if isinstance(arg, Tensor)]
    left, right = operands[-2:] if name in ("addmm", "baddbmm") else operands[:2]
    rate = rates.matmul_of(dtype_name(operands))
    k, n = left.shape[-1], output.shape[-1] if output.dim() > 1 else 1
    if right.dim() > 2 and name != "linear":
        m = left.shape[-2] if left.dim() > 1 else 1
        speed = rate.batched_flops_per_s(m, n, k)
    else:
        m = output.numel() // max(n, 1)
        speed = rate.flops_per_s(m, n, k)
    speed *= next((share for number, share in reversed(rates.product_ragged) if m % number or n % number or k % number), 1.0)
    return float(2 * output.numel() * k) / speed


def _expert_seconds(name: str, args: _Args, _kwargs: _Kwargs, output: Tensor, rates: Rates) -> float:
    """Rows, each times the matrix of its expert: a product for each expert that has rows, all of one shape on average.

    As one grouped kernel (Gale et al., MegaBlocks, 2022), starting, ending and uneven waves cost what they do in a product as large as all
    of them, thin tiles what they do in each. Gradients of weights take rows that were cast already. Where rows are not
    in the order of their experts, they are brought into it, and results back, as part of the operator: it takes time where memory traffic
    does not overlap.
    """
    flops, shape = _expert_flops(name, args, output), _expert_shape(name, args, output)
    rate = rates.matmul_of(dtype_name([args[0]]))
    together = flops if rates.groups else 2.0 * math.prod(shape)
    cast = rates.cast_bytes * args[0].numel() if name == "expert_mm" else 0.0
    grouped = len(args) > (3 if name == "expert_mm" else 4) and args[-1]
    moved = 0 if rates.overlaps_memory or grouped else sum(map(touched_bytes, (args[0], output if name == "expert_mm" else args[1])))
    products_s = flops / (rate.cubes_flops.at(together) * rate.thinness.at(min(shape)))
    return products_s + cast / rates.read_bytes_per_s.at(cast) + _memory_seconds(moved, moved, rates)


def _expert_flops(name: str, args: Sequence[Any], output: Tensor) -> float:
    return float(2 * args[0].shape[0] * args[0].shape[-1] * output.shape[-1])


def _expert_shape(name: str, args: Sequence[Any], output: Tensor) -> tuple[int, int, int]:
    """(m, n, k) of one expert's product."""
    rows, inner, last = args[0].shape[0], args[0].shape[-1], output.shape[-1]
    experts = args[1].shape[0] if name == "expert_mm" else output.shape[0]
    each = max(1, rows // max(1, experts))
    return (each, last, inner) if name == "expert_mm" else (inner, last, each)


# --- attention ------------------------------------------------------------------------------------------------------------


def _attention_flops(name: str, args: Sequence[Any]) -> float:
    """Two products forward, five backward (Dao, FlashAttention-2, 2023, section 3.1)."""
    query, key = (args[1], args[2]) if name == _ATTENTION_BACKWARD else (args[0], args[1])
    return float((10 if name == _ATTENTION_BACKWARD else 4) * query.numel() * key.shape[-2])


def _attention_seconds(name: str, args: _Args, kwargs: _Kwargs, _output: Any, rates: Rates) -> float:
    place = _INDEX_OF_CAUSAL[name]
    causal = bool(args[place]) if len(args) > place else bool(kwargs.get("is_causal", False))
    key = args[2] if name == _ATTENTION_BACKWARD else args[1]
    curve = ("backward" if name == _ATTENTION_BACKWARD else "forward") + ("_causal" if causal else "")
    speed = rates.attention_flops[curve].at(key.shape[-2]) * _against_float32(rates, dtype_name([key]))
    if key.shape[-2] % 16:
        speed *= rates.attention_ragged
    return _attention_flops(name, args) / speed


def _against_float32(rates: Rates, dtype: str) -> float:
    """How much faster large products of a dtype are than float32's."""
    return rates.matmul_of(dtype).cubes_flops.values[-1] / rates.matmul_of("float32").cubes_flops.values[-1]


# --- convolution ----------------------------------------------------------------------------------------------------------


def _convolution_seconds(name: str, args: _Args, kwargs: _Kwargs, output: Any, rates: Rates) -> float:
    backward = name == "convolution_backward"
    weight, groups = (args[2], args[9]) if backward else (args[1], args[8] if len(args) > 8 else kwargs.get("groups", 1))
    transposed = bool(args[7] if backward else len(args) > 8 and args[6])
    image = (args[1] if transposed else args[0]) if backward else (args[0] if transposed else output)
    depth = math.prod(weight.shape[1:])
    flops = float(2 * image.numel() * depth)
    width = min(weight.shape[0] // groups, depth)
    factor = _against_float32(rates, dtype_name([weight]))
    if backward:
        wanted = [part for part, use in zip(("backward_input", "backward_weight"), args[10], strict=False) if use]
    else:
        wanted = ["forward"]
    curves = [rates.convolution_flops[part + ("_transposed" if transposed else "")] for part in wanted]
    return sum(flops / (curve.at(width) * factor) for curve in curves)


# --- memory-bound ---------------------------------------------------------------------------------------------------------


def _streaming_seconds(name: str, args: _Args, kwargs: _Kwargs, output: Any, rates: Rates) -> float:
    inputs, outputs = tensors_in(*args, kwargs), tensors_in(output)
    kernel = kernel_of(name, args, kwargs)
    if kernel == "clone" and inputs and outputs and reordered(inputs[-1], outputs[0]):
        kernel = "transposed"
    count = max((tensor.numel() for tensor in (outputs if reads_only_rows(name) else inputs + outputs)), default=0)
    read, written = _traffic(name, args, kwargs, output)
    passes = _PASSES.get(kernel, 1)
    excess = _excess_seconds(kernel, count, inputs + outputs, (passes * read, written), rates)
    return excess + _memory_seconds(passes * read, written, rates)


def _excess_seconds(kernel: str, count: int, tensors: list[Tensor], traffic: tuple[int, int], rates: Rates) -> float:
    """What a kernel takes in cache beyond streaming through it. In cache and beyond, only the streaming differs."""
    dtype = dtype_name(tensors)
    in_cache = count * (rates.kernel_s(kernel, dtype) or rates.kernel_s("add", dtype))
    read, write = rates.cached_bytes_per_s or (
        curve.at(KERNEL_WORKING_SET_BYTES) for curve in (rates.read_bytes_per_s, rates.write_bytes_per_s)
    )
    return max(0.0, in_cache - traffic[0] / read - traffic[1] / write)


def _traffic(name: str, args: _Args, kwargs: _Kwargs, output: Any) -> tuple[int, int]:
    """Bytes read and bytes written."""
    inputs, outputs = tensors_in(*args, kwargs), tensors_in(output)
    written = 0 if name.endswith("_") and not writes_only(name) else sum(touched_bytes(tensor) for tensor in outputs)
    if writes_only(name):
        return 0, written
    if reads_only_rows(name):
        return sum(touched_bytes(tensor) for tensor in inputs[1:]) + written, written
    return sum(touched_bytes(tensor) for tensor in inputs), written


def _memory_seconds(read: int, written: int, rates: Rates) -> float:
    working_set = read + written
    return read / rates.read_bytes_per_s.at(working_set) + written / rates.write_bytes_per_s.at(working_set)


def _embedding_backward_seconds(_name: str, args: _Args, _kwargs: _Kwargs, output: Tensor, rates: Rates) -> float:
    """A table of zeros, and the rows added to it."""
    size = touched_bytes(args[0])
    rows = _excess_seconds("embedding_dense_backward", args[0].numel(), [args[0]], (2 * size, 0), rates)
    return _memory_seconds(0, touched_bytes(output), rates) + rows + _memory_seconds(2 * size, 0, rates)


def _slice_backward_seconds(_name: str, args: _Args, _kwargs: _Kwargs, output: Tensor, rates: Rates) -> float:
    """A tensor of zeros, and the slice copied into it."""
    return _memory_seconds(touched_bytes(args[0]), touched_bytes(output), rates) + _memory_seconds(0, touched_bytes(args[0]), rates)


_SPECIAL: Final[Mapping[str, _Cost]] = {
    "embedding_dense_backward": _embedding_backward_seconds,
    "slice_backward": _slice_backward_seconds,
    "select_backward": _slice_backward_seconds,
}

_COMPUTE_BOUND: Final[Mapping[str, _Cost]] = {
    **dict.fromkeys(MATMULS, _product_seconds),
    **dict.fromkeys(_EXPERTS, _expert_seconds),
    **dict.fromkeys(_INDEX_OF_CAUSAL, _attention_seconds),
    **dict.fromkeys(_CONVOLUTIONS, _convolution_seconds),
}


def _fresh_seconds(target: Any, output: Any, rates: Rates) -> float:
    if is_inplace(target):
        return 0.0
    sizes = (tensor.numel() * tensor.element_size() for tensor in tensors_in(output))
    return sum(size for size in sizes if size >= rates.fresh_from_bytes) / rates.fresh_bytes_per_s
