"""Operators of our own that a captured graph may hold beside ATen's.

Each says in one call what ATen hides in several or as a side effect, so that a sharding rule can be written for it: a loss as sum and
count, batch normalisation with its new statistics as results, random numbers as a function of where an element lies in the whole tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "KEYED",
    "bag_of_rows",
    "bag_of_runs",
    "batch_norm",
    "batch_norm_alone",
    "batch_norm_fixed",
    "cross_entropy_each",
    "cross_entropy_sum",
    "instance_norm",
    "keyed_draw",
    "keyed_dropout",
    "keyed_multinomial",
    "keyed_permutation",
    "nll_each",
    "nll_sum",
    "random_bits",
    "valid_count",
    "weight_norm",
]


def cross_entropy_sum(logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float) -> Tensor:
    """Sum over all elements of the cross-entropy of `logits` [n, classes, …] and `target` [n, …]; a scalar.

    A real target holds probabilities, [n, classes, …].
    """
    return torch.nn.functional.cross_entropy(
        logits, target, weight, reduction="sum", ignore_index=ignore_index, label_smoothing=label_smoothing
    )


def cross_entropy_each(logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float) -> Tensor:
    """As `cross_entropy_sum`, but each element for itself: [n, …]."""
    return torch.nn.functional.cross_entropy(
        logits, target, weight, reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing
    )


def nll_sum(scores: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """Sum over all elements of minus the score [n, classes, …] of the target [n, …], times its class's weight; a scalar."""
    return torch.nn.functional.nll_loss(scores, target, weight, reduction="sum", ignore_index=ignore_index)


def nll_each(scores: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """As `nll_sum`, but each element for itself: [n, …]."""
    return torch.nn.functional.nll_loss(scores, target, weight, reduction="none", ignore_index=ignore_index)


def is_soft(dtype: torch.dtype) -> bool:
    """Whether targets of this type are probabilities, not labels."""
    return dtype.is_floating_point


def valid_count(target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """What a mean cross-entropy divides by: the number (or class weight) of targets other than `ignore_index`; a scalar of `dtype`."""
    valid = target != ignore_index
    if weight is None:
        return valid.sum().to(dtype)
    return torch.where(valid, weight[target.clamp(0, weight.shape[0] - 1)], torch.zeros((), dtype=weight.dtype, device=weight.device)).sum()


def bag_of_rows(weight: Tensor, index: Tensor, scale: Tensor | None, mode: str, padding: int | None, by_frequency: bool) -> Tensor:
    """Sum, mean or max of the table's rows that each bag, a row of `index` [bags, n], names; in a sum times `scale` [bags, n].

    A row `padding` counts for nothing; by_frequency: a row's gradient is divided by how often it is named.
    """
    return torch.nn.functional.embedding_bag(
        index, weight, mode=mode, padding_idx=padding, per_sample_weights=scale, scale_grad_by_freq=by_frequency
    )


def bag_of_runs(
    weight: Tensor, index: Tensor, starts: Tensor, scale: Tensor | None, mode: str, padding: int | None, by_frequency: bool, last: bool
) -> Tensor:
    """As `bag_of_rows`, for bags that are runs of `index` [n], each beginning at one of `starts`; last: with the end of the last."""
    return torch.nn.functional.embedding_bag(
        index,
        weight,
        starts,
        mode=mode,
        padding_idx=padding,
        per_sample_weights=scale,
        scale_grad_by_freq=by_frequency,
        include_last_offset=last,
    )


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation in training over all dims but 1; returns the result and the new running mean and (unbiased) variance."""
    mean, var = statistics(x)
    result = normalise(x, mean, var, weight, bias, eps)
    return result, *moved(running_mean, running_var, mean, var, momentum, x.numel() // x.shape[1])


def batch_norm_alone(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Batch normalisation with the batch's own statistics, and no running ones."""
    return normalise(x, *statistics(x), weight, bias, eps)


def batch_norm_fixed(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Batch (or instance) normalisation with given statistics of each channel, as in evaluation."""
    return normalise(x, mean, var, weight, bias, eps)


def instance_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Instance normalisation that keeps running statistics: the means over the samples of each one's mean and unbiased variance."""
    result: Tensor = torch.nn.functional.instance_norm(x, weight=weight, bias=bias, eps=eps)
    with torch.no_grad():
        mean, var = of_instances(x)
    return result, *moved(running_mean, running_var, mean.mean(0), var.mean(0), momentum, x[0, 0].numel())


def of_instances(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of each channel of each sample."""
    var, mean = torch.var_mean(x, list(range(2, x.dim())), correction=0)
    return mean, var


def weight_norm(v: Tensor, g: Tensor, dim: int) -> Tensor:
    """v · g / ‖v‖, the norm taken for each index of `dim` (Salimans and Kingma, 2016); of all of v where dim is −1."""
    others = [each for each in range(v.dim()) if each != dim]
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=dim >= 0))


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance over all dims but 1."""
    dims = [dim for dim in range(x.dim()) if dim != 1]
    mean = x.mean(dims)
    return mean, ((x - _channels(mean, x)) ** 2).mean(dims)


def moved(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float, count: int) -> tuple[Tensor, Tensor]:
    """The running statistics after one more of `count` elements."""
    with torch.no_grad():
        new_mean = running_mean + momentum * (mean - running_mean)
        new_var = running_var + momentum * (var * (count / max(count - 1, 1)) - running_var)
    return new_mean, new_var


def normalise(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x − mean) / √(var + eps) · weight + bias, with statistics and weights for each channel (dim 1)."""
    result = (x - _channels(mean, x)) * _channels(torch.rsqrt(var + eps), x)
    if weight is not None:
        result = result * _channels(weight, x)
    return result if bias is None else result + _channels(bias, x)


def _channels(vector: Tensor, like: Tensor) -> Tensor:
    return along(vector, like, 1)


def along(vector: Tensor, like: Tensor, dim: int) -> Tensor:
    """A vector as a tensor that broadcasts along one dim of `like`."""
    return vector.reshape([-1 if each == dim else 1 for each in range(like.dim())])


def keyed_dropout(x: Tensor, random_state: Tensor, probability: float, *, key: int) -> Tensor:
    """Dropout whose mask is a pure function of (step, `key`, index of the element in the whole tensor).

    random_state: int64 [2]: a number that changes every step (seed and step mixed), and which microbatch this is.
    key: which random operator of the graph this is.
    """
    return drop(x, _counted(x.shape, x.device), random_state[0], probability, key)


def drop(x: Tensor, index: Tensor, step_key: Tensor, probability: float, key: int) -> Tensor:
    """Zeroes the elements whose random bits at global `index` fall under `probability`, scales the others."""
    keep = random_bits(index, step_key, key) >= int(probability * 2**31)
    return x * (keep.to(x.dtype) * (1.0 / (1.0 - probability) if probability < 1 else 0.0))


def keyed_draw(
    random_state: Tensor, shape: Sequence[int], distribution: str, parameters: Sequence[float], dtype: torch.dtype, *, key: int
) -> Tensor:
    """Independent random numbers, each a pure function of (step, `key`, its index); `draw` says of which distributions."""
    return draw(_counted(shape, random_state.device), random_state[0], distribution, parameters, dtype, key)


def draw(index: Tensor, step_key: Tensor, distribution: str, parameters: Sequence[float], dtype: torch.dtype, key: int) -> Tensor:
    """The random number at each global `index`. Made in float64, so that the same index has the same number in every precision.

    uniform (low, high): in [low, high) · normal (mean, deviation) · exponential (rate) · cauchy (median, scale) · log_normal (mean,
    deviation) · geometric (probability) · integers (low, high): in [low, high) · bernoulli (probability of 1, value for 1), 0 otherwise.
    """
    first, second = (*parameters, 0.0)[:2]
    if distribution == "integers":
        return _integers(index, step_key, int(first), int(second), key).to(dtype)
    if distribution == "bernoulli":
        return (random_bits(index, step_key, key) < round(first * 2**31)).to(dtype) * second
    if distribution == "uniform":
        return uniform(index, step_key, key, dtype) * (second - first) + first
    if distribution in ("normal", "log_normal"):
        value = normal(index, step_key, key) * second + first
        return (value if distribution == "normal" else value.exp()).to(dtype)
    above_zero = 1.0 - uniform(index, step_key, key, torch.float64)
    if distribution == "exponential":
        return (-torch.log(above_zero) / first).to(dtype).clamp_min(torch.finfo(dtype).tiny)
    if distribution == "geometric":
        return torch.ceil(torch.log(above_zero) / math.log1p(-first)).clamp_min(1.0).to(dtype)
    assert distribution == "cauchy", distribution
    return (first + second * torch.tan(math.pi * (above_zero - 0.5))).to(dtype)


def _integers(index: Tensor, step_key: Tensor, low: int, high: int, key: int) -> Tensor:
    count = high - low
    bits = random_bits(index, step_key, key)
    if count <= 2**31:
        return low + ((bits * count) >> 31)
    return low + ((bits << 31) | random_bits(index, step_key, key + SECOND)) % count


def uniform(index: Tensor, step_key: Tensor, key: int, dtype: torch.dtype) -> Tensor:
    """Numbers in [0, 1) with as many random bits as `dtype` has digits: in a smaller type those of float64, cut off."""
    digits = min(1 - round(math.log2(torch.finfo(dtype).eps)), 53)
    bits = (random_bits(index, step_key, key) << 22) | (random_bits(index, step_key, key + SECOND) >> 9)
    return ((bits >> (53 - digits)).to(torch.float64) * 2.0**-digits).to(dtype)


def normal(index: Tensor, step_key: Tensor, key: int) -> Tensor:
    """Standard normal numbers in float64 (Box and Muller, 1958)."""
    radius = torch.sqrt(-2.0 * torch.log(1.0 - uniform(index, step_key, key, torch.float64)))
    return radius * torch.cos((2.0 * math.pi) * uniform(index, step_key, key + THIRD, torch.float64))


def keyed_multinomial(probabilities: Tensor, random_state: Tensor, count: int, replacement: bool, *, key: int) -> Tensor:
    """`count` classes for each row of `probabilities` [rows, classes] (or [classes], not necessarily normalised), int64."""
    columns = count if replacement else probabilities.shape[-1]
    return choose(
        probabilities, _counted((*probabilities.shape[:-1], columns), probabilities.device), random_state[0], count, replacement, key
    )


def choose(probabilities: Tensor, index: Tensor, step_key: Tensor, count: int, replacement: bool, key: int) -> Tensor:
    """With replacement the random number of each draw falls into the running sum; without, the classes race: the first `count` arrive."""
    weights = probabilities.detach().to(torch.float64)
    number = uniform(index, step_key, key, torch.float64)
    if not replacement:
        times = -torch.log1p(-number) / weights
        return torch.topk(times, count, -1, largest=False).indices
    sums = weights.cumsum(-1)
    found = torch.searchsorted(sums, number * sums[..., -1:], right=True)
    last = (weights > 0).to(torch.int64).cumsum(-1).argmax(-1, keepdim=True)  # rounding may lead beyond the last possible class
    return torch.minimum(found, last)


def keyed_permutation(random_state: Tensor, count: int, dtype: torch.dtype, *, key: int) -> Tensor:
    """The numbers from 0 to `count` − 1 in random order."""
    index = torch.arange(count, device=random_state.device)
    return torch.argsort(_integers(index, random_state[0], 0, 2**62, key), stable=True).to(dtype)


def _counted(shape: Sequence[int], device: torch.device) -> Tensor:
    """The index of each element in the whole tensor."""
    return torch.arange(math.prod(shape), device=device).reshape(tuple(shape))


def random_bits(index: Tensor, step_key: Tensor, key: int) -> Tensor:
    """31 random bits for each int64 index: two rounds of the 32-bit finaliser `lowbias32` (C. Wellons, hash-prospector)."""
    state = (index ^ (index >> 32) ^ step_key ^ (key * 0x9E3779B9)) & 0xFFFFFFFF
    state = _mix(state)
    return _mix((state + (step_key >> 32) + index) & 0xFFFFFFFF) >> 1


# Operators that need more than 31 bits draw again under keys that no operator has.
SECOND, THIRD = 1 << 20, 1 << 21

# Operators that draw random numbers → which of their inputs is the random state.
KEYED: dict[Any, int] = {keyed_dropout: 1, keyed_draw: 0, keyed_multinomial: 1, keyed_permutation: 0}


def _mix(x: Tensor) -> Tensor:
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
