"""Calls that are rewritten while capturing, so that later parts meet one form of each thing.

- no effect: assertions, casts to the same type, aliases, dropout of nothing
- mean cross-entropy = sum / count, since the two are split differently (the count depends on inputs alone)
- dropout and attention dropout use keyed random numbers
- batch normalisation returns its new statistics
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch

from shardwise.capture import operators
from shardwise.capture.graph import Value

__all__ = ["NOISE", "RANDOM_STATE", "normalize", "passes_through"]

aten = torch.ops.aten

NOISE = {"aten._assert_tensor_metadata.default", "aten._assert_scalar.default", "aten._assert_async.msg"}

RANDOM_STATE = "__random_state__"

_ALIASES = {
    aten.alias.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.lift_fresh_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.type_as.default,
    aten.view.default,
    aten.reshape.default,
    aten.slice.Tensor,
    aten.expand.default,
}
_DROPOUT = {aten.dropout.default, aten.native_dropout.default}


class Builder(Protocol):
    """Appends to the graph under construction."""

    def add(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], metas: list[torch.Tensor]) -> tuple[Value, ...]:
        """Appends one operator call; returns its results, described by `metas`."""

    def random_state(self) -> Value:
        """The input from which random numbers are made, int64 [2]: a number for the step, the microbatch."""

    def random_key(self) -> int:
        """A number for a random operator that no other one of the graph has."""


def passes_through(target: Any, args: tuple[Any, ...], meta: Any) -> Value | None:
    """The input that the call returns unchanged, if it is such a call."""
    if target in _ALIASES and isinstance(meta, torch.Tensor) and isinstance(args[0], Value):
        return args[0] if args[0].shape == tuple(meta.shape) and args[0].dtype == meta.dtype else None
    if target in _DROPOUT and not isinstance(meta, (tuple, list)) and (args[1] == 0 or not args[2]):
        return args[0]
    return None


def normalize(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], metas: list[torch.Tensor], builder: Builder) -> tuple[Value, ...]:
    """The results of the call, rewritten where it must be, whose parts are appended to `builder`."""
    add = builder.add
    if target in (aten.view.default, aten._unsafe_view.default):
        return add(aten.reshape.default, args, kwargs, metas)
    if target is aten.broadcast_tensors.default:
        return tuple(
            each if each.shape == tuple(meta.shape) else add(aten.expand.default, (each, list(meta.shape)), {}, [meta])[0]
            for each, meta in zip(args[0], metas, strict=True)
        )
    if target is aten.cross_entropy_loss.default:
        return _cross_entropy(args, metas, builder)
    if target in _DROPOUT:
        return _dropout(args, metas, builder)
    if target is aten.scaled_dot_product_attention.default and _get(args, 4, 0.0):
        return (_attention(args, kwargs, metas[0], builder),)
    if target is aten._native_batch_norm_legit_functional.default and args[5]:
        x, weight, bias, mean, var, _, momentum, eps = args
        out, new_mean, new_var = add(operators.batch_norm, (x, weight, bias, mean, var, momentum, eps), {}, [metas[0], metas[3], metas[4]])
        return out, out, out, new_mean, new_var
    return add(target, args, kwargs, metas)


def _get(args: tuple[Any, ...], index: int, default: Any) -> Any:
    return args[index] if len(args) > index else default


def _cross_entropy(args: tuple[Any, ...], metas: list[torch.Tensor], builder: Builder) -> tuple[Value, ...]:
    add = builder.add
    logits, target, weight, reduction = args[0], args[1], _get(args, 2, None), _get(args, 3, 1)
    ignore_index, smoothing = _get(args, 4, -100), _get(args, 5, 0.0)
    if reduction == 0 or target.dtype.is_floating_point or (smoothing and weight is not None):
        return add(aten.cross_entropy_loss.default, args, {}, metas)
    scalar = metas[0]
    (total,) = add(operators.cross_entropy_sum, (logits, target, weight, ignore_index, smoothing), {}, [scalar])
    if reduction == 2:
        return (total,)
    (count,) = add(operators.valid_count, (target, weight, ignore_index, logits.dtype), {}, [scalar])
    return add(aten.div.Tensor, (total, count), {}, [scalar])


def _dropout(args: tuple[Any, ...], metas: list[torch.Tensor], builder: Builder) -> tuple[Value, ...]:
    arguments = (args[0], builder.random_state(), float(args[1]))
    (out,) = builder.add(operators.keyed_dropout, arguments, {"key": builder.random_key()}, [metas[0]])
    return (out,) * len(metas)


def _attention(args: tuple[Any, ...], kwargs: dict[str, Any], meta: torch.Tensor, builder: Builder) -> Value:
    """softmax(q kᵀ · scale + mask), keyed dropout, · v: attention whose random mask does not depend on the kernel."""
    add = builder.add
    query, key, value, mask, probability = (*args[:3], _get(args, 3, None), args[4])
    scale = kwargs.get("scale") or 1 / math.sqrt(query.shape[-1])
    like = meta.new_empty
    keys = key.shape[:-2] + (key.shape[-1], key.shape[-2])
    scores_meta = like((*query.shape[:-1], key.shape[-2]))
    (turned,) = add(aten.transpose.int, (key, -2, -1), {}, [like(keys)])
    (scores,) = add(aten.matmul.default, (query, turned), {}, [scores_meta])
    (scores,) = add(aten.mul.Tensor, (scores, scale), {}, [scores_meta])
    if _get(args, 5, False):
        mask = _causal_mask(query.shape[-2], key.shape[-2], meta, builder)
    if mask is not None and mask.dtype == torch.bool:
        (outside,) = add(aten.logical_not.default, (mask,), {}, [meta.new_empty(mask.shape, dtype=torch.bool)])
        (scores,) = add(aten.masked_fill.Scalar, (scores, outside, float("-inf")), {}, [scores_meta])
    elif mask is not None:
        (scores,) = add(aten.add.Tensor, (scores, mask), {}, [scores_meta])
    (weights,) = add(aten.softmax.int, (scores, -1), {}, [scores_meta])
    (kept,) = _dropout((weights, probability), [scores_meta], builder)
    (result,) = add(aten.matmul.default, (kept, value), {}, [meta])
    return result


def _causal_mask(queries: int, keys: int, meta: torch.Tensor, builder: Builder) -> Value:
    """bool [queries, keys]: query i sees the keys up to i."""

    def counted(count: int) -> Value:
        return builder.add(aten.arange.default, (count,), {}, [meta.new_empty((count,), dtype=torch.int64)])[0]

    (rows,) = builder.add(aten.unsqueeze.default, (counted(queries), 1), {}, [meta.new_empty((queries, 1), dtype=torch.int64)])
    (mask,) = builder.add(aten.le.Tensor, (counted(keys), rows), {}, [meta.new_empty((queries, keys), dtype=torch.bool)])
    return mask
