"""Operators of our own that a captured graph may hold beside ATen's.

Each says in one call what ATen hides in several or as a side effect, so that a sharding rule can be written for it: a loss as sum and
count, batch normalisation with its new statistics as results, random numbers as a function of where an element lies in the whole tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["batch_norm", "cross_entropy_sum", "keyed_dropout", "random_bits", "valid_count"]


def cross_entropy_sum(logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float) -> Tensor:
    """Sum over all elements of the cross-entropy of `logits` [n, classes, …] and `target` [n, …]; a scalar."""
    return torch.nn.functional.cross_entropy(
        logits, target, weight, reduction="sum", ignore_index=ignore_index, label_smoothing=label_smoothing
    )


def valid_count(target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """What a mean cross-entropy divides by: the number (or class weight) of targets other than `ignore_index`; a scalar of `dtype`."""
    valid = target != ignore_index
    if weight is None:
        return valid.sum().to(dtype)
    return torch.where(valid, weight[target.clamp(0, weight.shape[0] - 1)], torch.zeros((), dtype=weight.dtype, device=weight.device)).sum()


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation in training over all dims but 1; returns the result and the new running mean and (unbiased) variance."""
    dims = [dim for dim in range(x.dim()) if dim != 1]
    count = x.numel() // x.shape[1]
    mean = x.mean(dims)
    var = ((x - _channels(mean, x)) ** 2).mean(dims)
    result = normalise(x, mean, var, weight, bias, eps)
    with torch.no_grad():
        new_mean = running_mean + momentum * (mean - running_mean)
        new_var = running_var + momentum * (var * (count / max(count - 1, 1)) - running_var)
    return result, new_mean, new_var


def normalise(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x − mean) / √(var + eps) · weight + bias, with statistics and weights for each channel (dim 1)."""
    result = (x - _channels(mean, x)) * _channels(torch.rsqrt(var + eps), x)
    if weight is not None:
        result = result * _channels(weight, x)
    return result if bias is None else result + _channels(bias, x)


def _channels(vector: Tensor, like: Tensor) -> Tensor:
    return vector.reshape([1, -1] + [1] * (like.dim() - 2))


def keyed_dropout(x: Tensor, random_state: Tensor, probability: float, *, key: int) -> Tensor:
    """Dropout whose mask is a pure function of (step, `key`, index of the element in the whole tensor).

    random_state: int64 [2]: a number that changes every step (seed and step mixed), and which microbatch this is.
    key: which random operator of the graph this is.
    """
    index = torch.arange(x.numel(), device=x.device).reshape(x.shape)
    return drop(x, index, random_state[0], probability, key)


def drop(x: Tensor, index: Tensor, step_key: Tensor, probability: float, key: int) -> Tensor:
    """Zeroes the elements whose random bits at global `index` fall under `probability`, scales the others."""
    keep = random_bits(index, step_key, key) >= int(probability * 2**31)
    return x * (keep.to(x.dtype) * (1.0 / (1.0 - probability)))


def random_bits(index: Tensor, step_key: Tensor, key: int) -> Tensor:
    """31 random bits for each int64 index: two rounds of the 32-bit finaliser `lowbias32` (C. Wellons, hash-prospector)."""
    state = (index ^ (index >> 32) ^ step_key ^ (key * 0x9E3779B9)) & 0xFFFFFFFF
    state = _mix(state)
    return _mix((state + (step_key >> 32) + index) & 0xFFFFFFFF) >> 1


def _mix(x: Tensor) -> Tensor:
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
