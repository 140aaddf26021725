"""Operators of our own that a captured graph may hold beside ATen's.

Each says in one call what ATen hides in several or as a side effect, so that a sharding rule can be written for it: a loss as sum and
count, batch normalisation with its new statistics as results, random numbers as a function of where an element lies in the whole tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.capture.draws import Held, dropped, keyed_keep, whole
from shardwise.capture.draws import keyed_draw as draw
from shardwise.capture.precision import LOW

__all__ = [
    "KEYED",
    "bag_of_rows",
    "bag_of_runs",
    "batch_norm",
    "batch_norm_alone",
    "batch_norm_fixed",
    "cross_entropy_each",
    "cross_entropy_sum",
    "dropped_attention",
    "instance_norm",
    "keyed_draw",
    "keyed_dropout",
    "keyed_multinomial",
    "keyed_permutation",
    "nll_each",
    "nll_sum",
    "strided",
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
    """Mean and (biased) variance over all dims but 1; of 16 bits in float32."""
    x = widened(x)
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
    """(x − mean) / √(var + eps) · weight + bias, with statistics and weights for each channel (dim 1), in the dtype of x."""
    result = (widened(x) - _channels(mean, x)) * _channels(torch.rsqrt(var + eps), x)
    if weight is not None:
        result = result * _channels(weight, x)
    return (result if bias is None else result + _channels(bias, x)).to(x.dtype)


def widened(x: Tensor) -> Tensor:
    """16 bits as float32, others as they are."""
    return x.float() if x.dtype in LOW else x


def _channels(vector: Tensor, like: Tensor) -> Tensor:
    return along(vector, like, 1)


def along(vector: Tensor, like: Tensor, dim: int) -> Tensor:
    """A vector as a tensor that broadcasts along one dim of `like`."""
    return vector.reshape([-1 if each == dim else 1 for each in range(like.dim())])


def keyed_dropout(x: Tensor, random_state: Tensor, probability: float, *, key: int) -> Tensor:
    """Dropout whose mask is a pure function of (step, `key`, index of the element in the whole tensor), in steps of 2⁻¹⁶ of `probability`.

    random_state: int64 [2]: a number that changes every step (seed and step mixed), and which microbatch this is.
    key: which random operator of the graph this is.
    """
    return dropped(x, keyed_keep(whole(x.shape, x.device), random_state, probability, key), probability)


def dropped_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    probability: float,
    causal: bool,
    scale: float,
    random_state: Tensor,
    *,
    key: int,
) -> Tensor:
    """softmax(q kᵀ · scale + mask), dropout as `keyed_dropout`, · v; mask and causal are scaled_dot_product_attention's.

    queries [..., h, q, d], keys [..., g, k, d], values [..., g, k, e] → [..., h, q, e], where each head of keys serves h / g of queries.
    """
    weights = attention_weights(queries, keys, mask, causal=causal, scale=scale)
    keep = keyed_keep(whole(weights.shape, weights.device), random_state, probability, key)
    return dropped(weights, keep, probability) @ each_head(values, queries)


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None, *, causal: bool, scale: float) -> Tensor:
    """softmax(q kᵀ · scale + mask); a mask of truth values says which keys are seen."""
    scores = query @ each_head(key, query).transpose(-2, -1) * scale
    if causal:
        rows, columns = (torch.arange(size, device=query.device) for size in scores.shape[-2:])
        mask = columns <= rows[:, None]
    if mask is not None:
        scores = scores.masked_fill(mask.logical_not(), float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


def each_head(x: Tensor, query: Tensor) -> Tensor:
    """Of keys, or values, with fewer heads than the queries those of each query head."""
    each = query.shape[-3] // x.shape[-3] if x.dim() > 2 else 1
    return x if each == 1 else x.repeat_interleave(each, -3)


def keyed_draw(
    random_state: Tensor, shape: Sequence[int], distribution: str, parameters: Sequence[float], dtype: torch.dtype, *, key: int
) -> Tensor:
    """Independent random numbers, each a pure function of (step, `key`, its index); `draws.keyed_draw` says of which distributions."""
    return draw(whole(shape, random_state.device), random_state, distribution, parameters, dtype, key)


def keyed_multinomial(probabilities: Tensor, random_state: Tensor, count: int, replacement: bool, *, key: int) -> Tensor:
    """`count` classes for each row of `probabilities` [rows, classes] (or [classes], not necessarily normalised), int64."""
    columns = count if replacement else probabilities.shape[-1]
    held = whole((*probabilities.shape[:-1], columns), probabilities.device)
    return choose(probabilities, held, random_state, count, replacement, key)


def choose(probabilities: Tensor, held: Held, random_state: Tensor, count: int, replacement: bool, key: int) -> Tensor:
    """With replacement the random number of each draw falls into the running sum; without, the classes race: the first `count` arrive.

    held: which draws (or which classes' races) of the whole tensor's are made here.
    """
    weights = probabilities.detach().to(torch.float64)
    number = draw(held, random_state, "uniform", (0.0, 1.0), torch.float64, key)
    if not replacement:
        times = -torch.log1p(-number) / weights
        return torch.topk(times, count, -1, largest=False).indices
    sums = weights.cumsum(-1)
    found = torch.searchsorted(sums, number * sums[..., -1:], right=True)
    last = (weights > 0).to(torch.int64).cumsum(-1).argmax(-1, keepdim=True)  # rounding may lead beyond the last possible class
    return torch.minimum(found, last)


def keyed_permutation(random_state: Tensor, count: int, dtype: torch.dtype, *, key: int) -> Tensor:
    """The numbers from 0 to `count` − 1 in random order."""
    numbers = draw(whole((count,), random_state.device), random_state, "integers", (0, 2**62), torch.int64, key)
    return torch.argsort(numbers, stable=True).to(dtype)


# Operators that draw random numbers → which of their inputs is the random state.
KEYED: dict[Any, int] = {keyed_dropout: 1, keyed_draw: 0, keyed_multinomial: 1, keyed_permutation: 0, dropped_attention: -1}


def strided(x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
    """A tensor of `size` whose element (i, j, …) is element offset + i·stride[0] + j·stride[1] + … of x, counted in the order of its dims.

    What `as_strided` says of the memory, said of the tensor: how a rank's part lies in memory is its own matter.
    """
    return x.contiguous().view(-1).as_strided(list(size), list(stride), offset)
