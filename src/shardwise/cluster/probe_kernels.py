"""The kernels whose time per element is measured, under the names of ATen's operators (``…_tanh``: of that approximation).

Each is made from an input of (rows, columns) and comes with the number of elements to divide by: those of its largest tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

__all__ = ["KERNELS"]

_Kernel = tuple[Callable[[], object], int]
_aten = torch.ops.aten
_ROWS = 1024  # of the table that embeddings look up
_EPS = 1e-5


def _of_one(operator: Callable[..., object], *more: object, positive: bool = False) -> Callable[[Tensor], _Kernel]:
    def make(x: Tensor) -> _Kernel:
        source = x.abs() + _EPS if positive else x
        return lambda: operator(source, *more), x.numel()

    return make


def _of_two(operator: Callable[..., object], *more: object) -> Callable[[Tensor], _Kernel]:
    def make(x: Tensor) -> _Kernel:
        other = x.flip(0)
        return lambda: operator(other, x, *more), x.numel()

    return make


def _gelu_tanh(x: Tensor) -> _Kernel:
    return lambda: _aten.gelu(x, approximate="tanh"), x.numel()


def _gelu_backward_tanh(x: Tensor) -> _Kernel:
    return lambda: _aten.gelu_backward(x, x, approximate="tanh"), x.numel()


def _softmax_backward(operator: Callable[..., object]) -> Callable[[Tensor], _Kernel]:
    return lambda x: (lambda: operator(x, x, -1, x.dtype), x.numel())


def _layer_norm(x: Tensor) -> _Kernel:
    weight = x[0].clone()
    return lambda: _aten.native_layer_norm(x, [x.shape[1]], weight, weight, _EPS), x.numel()


def _layer_norm_backward(x: Tensor) -> _Kernel:
    weight = x[0].clone()
    _, mean, rstd = _aten.native_layer_norm(x, [x.shape[1]], weight, weight, _EPS)
    return lambda: _aten.native_layer_norm_backward(x, x, [x.shape[1]], mean, rstd, weight, weight, [True] * 3), x.numel()


def _image(x: Tensor) -> Tensor:
    return x.view(-1, 16, 16, 16)


def _batch_norm(x: Tensor) -> _Kernel:
    image, weight = _image(x), torch.ones(16, dtype=x.dtype)
    return lambda: _aten.native_batch_norm(image, weight, weight, None, None, True, 0.1, _EPS), x.numel()


def _batch_norm_backward(x: Tensor) -> _Kernel:
    image, weight = _image(x), torch.ones(16, dtype=x.dtype)
    _, mean, rstd = _aten.native_batch_norm(image, weight, weight, None, None, True, 0.1, _EPS)
    backward = _aten.native_batch_norm_backward
    return lambda: backward(image, image, weight, None, None, mean, rstd, True, _EPS, [True] * 3), x.numel()


def _group_norm(x: Tensor) -> _Kernel:
    image, weight = _image(x), torch.ones(16, dtype=x.dtype)
    return lambda: _aten.native_group_norm(image, weight, weight, image.shape[0], 16, 256, 4, _EPS), x.numel()


def _max_pool(x: Tensor) -> _Kernel:
    image = _image(x)
    return lambda: _aten.max_pool2d_with_indices(image, [2, 2], [2, 2]), x.numel()


def _max_pool_backward(x: Tensor) -> _Kernel:
    image = _image(x)
    out, indices = _aten.max_pool2d_with_indices(image, [2, 2], [2, 2])
    backward = _aten.max_pool2d_with_indices_backward
    return lambda: backward(out, image, [2, 2], [2, 2], [0, 0], [1, 1], False, indices), x.numel()


def _upsample(x: Tensor) -> _Kernel:
    image = _image(x)
    return lambda: _aten.upsample_nearest2d(image, [32, 32]), 4 * x.numel()


def _upsample_backward(x: Tensor) -> _Kernel:
    image = _image(x)
    shape = list(image.shape[:2])
    return lambda: _aten.upsample_nearest2d_backward(image, [16, 16], [*shape, 8, 8]), x.numel()


def _with_mask(operator: Callable[[Tensor, Tensor], object]) -> Callable[[Tensor], _Kernel]:
    """Masks as models have them: a triangle, not noise, which the processor could not predict."""

    def make(x: Tensor) -> _Kernel:
        mask = torch.ones(x.shape, dtype=torch.bool).tril()
        return lambda: operator(mask, x), x.numel()

    return make


def _transposed(x: Tensor) -> _Kernel:
    turned = x.t()
    return lambda: _aten.clone(turned, memory_format=torch.contiguous_format), x.numel()


def _rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros(_ROWS, x.shape[1], dtype=x.dtype), (torch.arange(x.shape[0]) * 7919) % _ROWS


def _embedding(x: Tensor) -> _Kernel:
    table, rows = _rows(x)
    return lambda: _aten.embedding(table, rows), x.numel()


def _embedding_backward(x: Tensor) -> _Kernel:
    """The addition of rows alone; the rest of the operator is to fill a table with zeros."""
    table, rows = _rows(x)
    return lambda: _aten.index_add_(table, 0, rows, x), x.numel()


def _index(x: Tensor) -> _Kernel:
    table, rows = _rows(x)
    return lambda: _aten.index(table, [rows]), x.numel()


def _gather(x: Tensor) -> _Kernel:
    places = (torch.arange(x.numel()) * 7919).remainder(x.shape[1]).view(x.shape)
    return lambda: _aten.gather(x, 1, places), x.numel()


def _cat(x: Tensor) -> _Kernel:
    return lambda: _aten.cat([x, x], 1), 2 * x.numel()


KERNELS: Final[Mapping[str, Callable[[Tensor], _Kernel]]] = {
    "add": _of_two(_aten.add),
    "clone": _of_one(_aten.clone),
    "transposed": _transposed,
    "cat": _cat,
    "zeros": _of_one(_aten.zeros_like),
    "div": _of_two(_aten.div),
    "sqrt": _of_one(_aten.sqrt, positive=True),
    "rsqrt": _of_one(_aten.rsqrt, positive=True),
    "pow": _of_one(_aten.pow, 0.37, positive=True),
    "exp": _of_one(_aten.exp),
    "log": _of_one(_aten.log, positive=True),
    "erf": _of_one(_aten.erf),
    "sin": _of_one(_aten.sin),
    "tanh": _of_one(_aten.tanh),
    "tanh_backward": _of_two(_aten.tanh_backward),
    "sigmoid": _of_one(_aten.sigmoid),
    "sigmoid_backward": _of_two(_aten.sigmoid_backward),
    "gelu": _of_one(_aten.gelu),
    "gelu_backward": _of_two(_aten.gelu_backward),
    "gelu_tanh": _gelu_tanh,
    "gelu_backward_tanh": _gelu_backward_tanh,
    "silu": _of_one(_aten.silu),
    "silu_backward": _of_two(_aten.silu_backward),
    "threshold_backward": _of_two(_aten.threshold_backward, 0),
    "gt": _of_one(_aten.gt, 0),
    "where": _with_mask(lambda mask, x: _aten.where(mask, x, x)),
    "masked_fill": _with_mask(lambda mask, x: _aten.masked_fill(x, mask, 0.0)),
    "bernoulli_": _of_one(lambda x: x.bernoulli_(0.9)),
    "native_dropout": _of_one(_aten.native_dropout, 0.1, True),
    "normal_": _of_one(lambda x: x.normal_()),
    "_softmax": _of_one(_aten._softmax, -1, False),
    "_safe_softmax": _of_one(_aten._safe_softmax, -1),
    "_softmax_backward_data": _softmax_backward(_aten._softmax_backward_data),
    "_log_softmax": _of_one(_aten._log_softmax, -1, False),
    "_log_softmax_backward_data": _softmax_backward(_aten._log_softmax_backward_data),
    "native_layer_norm": _layer_norm,
    "native_layer_norm_backward": _layer_norm_backward,
    "native_batch_norm": _batch_norm,
    "native_batch_norm_backward": _batch_norm_backward,
    "native_group_norm": _group_norm,
    "max_pool2d_with_indices": _max_pool,
    "max_pool2d_with_indices_backward": _max_pool_backward,
    "upsample_nearest2d": _upsample,
    "upsample_nearest2d_backward": _upsample_backward,
    "sum": _of_one(_aten.sum),
    "sum_rows": _of_one(_aten.sum, [1]),
    "sum_columns": _of_one(_aten.sum, [0]),
    "amax": _of_one(_aten.amax, [1]),
    "argmax": _of_one(_aten.argmax, 1),
    "var_mean": _of_one(_aten.var_mean, [1]),
    "cumsum": _of_one(_aten.cumsum, 1),
    "embedding": _embedding,
    "embedding_dense_backward": _embedding_backward,
    "index": _index,
    "gather": _gather,
}
"""By name: what makes, of a 2-d tensor of the dtype, the call and the number of elements to divide its time by."""
