"""What an operator's arguments and results are made of, as far as their cost goes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["dtype_name", "reordered", "tensors_in", "touched_bytes"]


def tensors_in(*values: Any) -> list[Tensor]:
    """All tensors among arguments, in lists and tuples as well."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, Mapping):
            found.extend(tensors_in(*value.values()))
        elif isinstance(value, list | tuple):
            found.extend(tensors_in(*value))
    return found


def touched_bytes(tensor: Tensor) -> int:
    """Bytes of the elements that a tensor really has: a dim expanded from one (stride 0) counts once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride or size == 0:
            count *= size
    return count * tensor.element_size()


def reordered(source: Tensor, result: Tensor) -> bool:
    """Whether a copy must walk ``source`` out of the order of its memory, element by element, to write ``result`` in order."""
    if source.dim() == 0 or source.shape != result.shape:
        return False
    inner = max(range(source.dim()), key=lambda dim: (source.shape[dim] > 1 and -_stride(result, dim), dim))
    return source.shape[inner] > 1 and _stride(result, inner) == 1 and _stride(source, inner) > 1


def _stride(tensor: Tensor, dim: int) -> int:
    return tensor.stride(dim)


def dtype_name(tensors: Iterable[Tensor]) -> str:
    """The dtype that an operator computes in, without the ``torch.``: its first floating one, else float32."""
    for tensor in tensors:
        if tensor.dtype.is_floating_point:
            return str(tensor.dtype).removeprefix("torch.")
    return str(torch.float32).removeprefix("torch.")
