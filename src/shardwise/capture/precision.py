"""A model as it computes in a smaller precision: parameters and floating inputs in 16 bits, what must not be in float32.

    parameters, floating inputs        bf16 or fp16, as `model.bfloat16()(x.bfloat16())`
    normalization over the batch       its parameters and statistics in float32: sums over many steps do not add up in 16 bits
    other buffers                      float32 (tables of positions), or 16 bits where an operator would mix them with the rest
    parameters that `forward` casts    what it casts them to, from the start (`self.router = self.router.float()`)
    losses, the loss itself            computed in float32, as torch.autocast does

The parameters that an optimizer updates are float32 all the same: operators read copies of them (`ParameterPart.master`).
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from shardwise.capture.batch import map_tensors
from shardwise.errors import LayoutError

__all__ = ["LOW", "PRECISIONS", "Precision", "checked_precision", "dtype_of", "in_precision", "losses_in_float32", "mixes"]

Precision = Literal["float32", "bf16", "fp16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)

_DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}
LOW: Final = frozenset(_DTYPES.values())
_WIDE: Final = (torch.float32, torch.float64)
_LOSSES: Final = frozenset(
    {
        *(F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.kl_div, F.ctc_loss, F.poisson_nll_loss),
        *(F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.gaussian_nll_loss, F.soft_margin_loss, F.triplet_margin_loss),
        *(F.cosine_embedding_loss, F.hinge_embedding_loss, F.margin_ranking_loss, F.multi_margin_loss, F.multilabel_margin_loss),
        *(F.multilabel_soft_margin_loss, F.triplet_margin_with_distance_loss),
    }
)


def checked_precision(precision: str) -> Precision:
    """Raises LayoutError for one that is not known."""
    if precision not in PRECISIONS:
        raise LayoutError(f"precision={precision!r} is not known; choose {', '.join(PRECISIONS)}")
    return precision  # type: ignore[return-value]


def dtype_of(precision: Precision) -> torch.dtype | None:
    """In which operators compute; None where the model's own dtypes are left."""
    return _DTYPES.get(precision)


def losses_in_float32(precision: Precision) -> AbstractContextManager[object]:
    """Inside, functional losses get their 16-bit inputs as float32; nothing changes for "float32"."""
    return nullcontext() if precision == "float32" else _LossesInFloat32()


class _LossesInFloat32(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LOSSES:
            args, kwargs = tree_map(_widened, args), tree_map(_widened, kwargs or {})
        return func(*args, **(kwargs or {}))


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in LOW else value


def in_precision(
    model: nn.Module, batch: Mapping[str, Any], precision: Precision, *, buffers: bool = False, kept: Container[str] = ()
) -> tuple[nn.Module, dict[str, Any]]:
    """A copy of the model, and the batch, as they compute in the precision; as they are for "float32".

    buffers: whether these are cast. kept: names of parameters that are not.
    """
    dtype = dtype_of(precision)
    if dtype is None:
        return model, dict(batch)
    return _copied(model, dtype, buffers=buffers, kept=kept), map_tensors(lambda name, tensor: _cast(tensor, dtype), batch)


def mixes(op: str, dtypes: Iterable[torch.dtype]) -> bool:
    """Whether an operator that takes one dtype only (`aten.linear.default`) is given several."""
    return op.split(".")[1] in _ONE_DTYPE and len({dtype for dtype in dtypes if dtype.is_floating_point}) > 1


_ONE_DTYPE: Final = frozenset(
    {
        *("linear", "matmul", "mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addmv", "addbmm", "einsum", "bilinear", "prelu"),
        *("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        *("scaled_dot_product_attention", "layer_norm", "group_norm", "native_layer_norm", "native_group_norm"),
    }
)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.dtype in _WIDE else tensor


def _copied(model: nn.Module, dtype: torch.dtype, *, buffers: bool, kept: Container[str]) -> nn.Module:
    """With parameters cast, but for those kept, and buffers, if asked."""
    wide = {id(each) for module in model.modules() if isinstance(module, _BatchNorm) for each in (*module.parameters(), *module.buffers())}
    wide |= {id(each) for name, each in model.named_parameters(remove_duplicate=False) if name in kept}

    def cast(tensor: Tensor) -> Tensor:
        return tensor.detach() if id(tensor) in wide else _cast(tensor.detach(), dtype)

    memo: dict[int, Any] = {id(each): nn.Parameter(cast(each), requires_grad=each.requires_grad) for each in model.parameters()}
    memo |= {id(each): cast(each) if buffers else each.detach() for each in model.buffers()}
    return copy.deepcopy(model, memo)
