"""Which kernel an ATen operator runs, by name: what the cost of it depends on beside its bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final

import torch

__all__ = ["FREE", "MATMULS", "is_inplace", "is_view", "kernel_of", "name_of", "reads_only_rows", "writes_only"]

MATMULS: Final = frozenset({"mm", "addmm", "bmm", "baddbmm", "linear", "matmul"})
FREE: Final = frozenset(
    {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_assert_tensor_metadata", "sym_size", "end_shift"}
)

_VIEWS: Final = frozenset({"_unsafe_view", "detach", "lift_fresh_copy", "_reshape_alias"})
_MAYBE_COPIES: Final = frozenset({"reshape", "contiguous", "flatten", "to", "dropout"})
_ROWS: Final = frozenset({"embedding", "index", "index_select", "gather", "nll_loss_forward", "take_along_dim", "_unsafe_index"})
_WRITERS: Final = frozenset({"zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "new_full"})
_WRITERS_TOO: Final = frozenset({"arange", "fill_", "zero_", "fill", "nll_loss_backward", "eye", "scalar_tensor", "bernoulli_", "normal_"})

_ALIKE: Final[Mapping[str, str]] = {
    **dict.fromkeys(("layer_norm", "rms_norm", "_fused_rms_norm"), "native_layer_norm"),
    **dict.fromkeys(("_fused_rms_norm_backward",), "native_layer_norm_backward"),
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional"), "native_batch_norm"),
    **dict.fromkeys(("_batch_norm_with_update", "_batch_norm_with_update_functional"), "native_batch_norm"),
    **dict.fromkeys(("batch_norm_backward",), "native_batch_norm_backward"),
    **dict.fromkeys(("group_norm",), "native_group_norm"),
    **dict.fromkeys(("native_group_norm_backward",), "native_layer_norm_backward"),
    **dict.fromkeys(("softmax",), "_softmax"),
    **dict.fromkeys(("log_softmax", "logsumexp", "cross_entropy_loss"), "_log_softmax"),
    **dict.fromkeys(("max_pool2d",), "max_pool2d_with_indices"),
    **dict.fromkeys(("bernoulli", "rand", "rand_like", "uniform_"), "bernoulli_"),
    **dict.fromkeys(("randn", "randn_like", "normal", "fast_draw"), "normal_"),
    **dict.fromkeys(("keyed_keep", "fast_keep"), "argmax"),  # as long, an element
    **dict.fromkeys(("keyed_draw",), "bernoulli_"),  # likewise
    **dict.fromkeys(("cos", "sinc"), "sin"),
    **dict.fromkeys(("log2", "log10", "log1p"), "log"),
    **dict.fromkeys(("exp2", "expm1"), "exp"),
    **dict.fromkeys(("reciprocal",), "div"),
    **dict.fromkeys(("softplus", "mish", "log_sigmoid_forward", "elu", "celu"), "silu"),
    **dict.fromkeys(("hardswish", "leaky_relu", "hardtanh", "hardtanh_backward", "relu", "clamp", "clamp_min", "maximum"), "add"),
    **dict.fromkeys(("hardswish_backward", "leaky_relu_backward", "elu_backward"), "threshold_backward"),
    **dict.fromkeys(("eq", "ne", "lt", "le", "ge", "logical_and", "logical_or", "logical_not", "isnan"), "gt"),
    **dict.fromkeys(("tril", "triu", "masked_scatter"), "masked_fill"),
    **dict.fromkeys(("max", "min", "amin", "aminmax"), "amax"),
    **dict.fromkeys(("argmin", "topk", "sort"), "argmax"),
    **dict.fromkeys(("var", "std", "std_mean", "native_norm", "linalg_vector_norm"), "var_mean"),
    **dict.fromkeys(("upsample_bilinear2d", "_upsample_bilinear2d_aa"), "upsample_nearest2d"),
    **dict.fromkeys(("index_select", "_unsafe_index"), "index"),
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce", "take_along_dim"), "gather"),
    **dict.fromkeys(("index_put", "index_add"), "embedding_dense_backward"),
    **dict.fromkeys(("stack",), "cat"),
    **dict.fromkeys(("copy", "copy_", "_to_copy", "contiguous", "reshape", "slice_scatter", "constant_pad_nd"), "clone"),
    **dict.fromkeys(
        ("zeros", "zero_", "new_zeros", "fill", "fill_", "full", "full_like", "ones", "ones_like", "nll_loss_backward"), "zeros"
    ),
}


@lru_cache(maxsize=4096)
def name_of(target: Any) -> str:
    """An operator's name without namespace and overload: ``aten.add_.Tensor`` is ``add_``; "" for what is no operator."""
    return target.overloadpacket.__name__ if isinstance(target, torch._ops.OpOverload) else getattr(target, "_opname", "")


@lru_cache(maxsize=4096)
def is_view(target: Any) -> bool:
    """Whether the results are views of the arguments."""
    name = name_of(target)
    if name in _VIEWS or not isinstance(target, torch._ops.OpOverload):
        return name in _VIEWS
    aliases = [result.alias_info for result in target._schema.returns]
    return name not in _MAYBE_COPIES and any(alias is not None and not alias.is_write for alias in aliases)


@lru_cache(maxsize=4096)
def is_inplace(target: Any) -> bool:
    """Whether the result is written over an argument."""
    name = name_of(target)
    return name.endswith("_") and not name.endswith("__")


def reads_only_rows(name: str) -> bool:
    """Whether of its first argument an operator reads no more than it returns."""
    return name in _ROWS


def writes_only(name: str) -> bool:
    """Whether an operator writes its result without reading arguments of that size."""
    return name in _WRITERS or name in _WRITERS_TOO


def kernel_of(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """The measured kernel (`shardwise.cluster.probe_kernels`) nearest to an operator; ``add`` for those without a peculiarity."""
    base = name[:-1] if name.endswith("_") and name not in _ALIKE else name
    special = _SPECIAL.get(base)
    if special is not None:
        return special(args, kwargs)
    return _ALIKE.get(name) or _ALIKE.get(base, base)


def _power(args: tuple[Any, ...], _kwargs: Mapping[str, Any]) -> str:
    """ATen writes out the powers that are products or roots (PowKernel.cpp)."""
    exponent = args[1] if len(args) > 1 else None
    if isinstance(exponent, torch.Tensor):
        return "pow"
    if exponent in (0, 1, 2, 3):
        return "add"
    if exponent in (-1, -2):
        return "div"
    return {0.5: "sqrt", -0.5: "rsqrt"}.get(exponent, "pow") if isinstance(exponent, float) else "pow"


def _gelu(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    return "gelu_tanh" if kwargs.get("approximate", "none") == "tanh" or "tanh" in args[1:] else "gelu"


def _gelu_backward(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    return "gelu_backward_tanh" if kwargs.get("approximate", "none") == "tanh" or "tanh" in args[2:] else "gelu_backward"


def _sum(args: tuple[Any, ...], _kwargs: Mapping[str, Any]) -> str:
    """Rows are summed along the innermost dim, columns across it."""
    dims = args[1] if len(args) > 1 else None
    if not isinstance(dims, list | tuple) or not dims:
        return "sum"
    return "sum_rows" if any(dim % args[0].dim() == args[0].dim() - 1 for dim in dims) else "sum_columns"


_SPECIAL: Final[Mapping[str, Callable[[tuple[Any, ...], Mapping[str, Any]], str]]] = {
    "pow": _power,
    "gelu": _gelu,
    "gelu_backward": _gelu_backward,
    "sum": _sum,
    "mean": _sum,
}
