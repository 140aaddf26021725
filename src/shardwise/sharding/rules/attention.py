"""Scaled dot-product attention: batch and heads are independent; the keys' sequence stays whole."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from shardwise.capture import draws, operators
from shardwise.capture.graph import Op, Slot, Value
from shardwise.sharding.rules.random import FAST, fast_seeds, held_along, indices_of
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.signature import AxisSplit, Call, Dim, Signature, Split

__all__ = ["attend", "has_dropout", "is_attention", "is_causal", "mask_of", "weight_dims"]

aten = torch.ops.aten


@rule(aten.scaled_dot_product_attention.default, operators.dropped_attention)
def attention(op: Op) -> Signature:
    """… h q d, … h k d, … h k e, mask -> … h q e; a rank that has some queries makes their part of a causal mask. With dropout the random
    state, too, of which a rank draws the numbers of its queries and heads."""
    query = op.inputs[0].shape
    grouped = op.inputs[1].shape[-3] != query[-3] if len(query) > 2 else False
    batch: list[Dim] = [(f"b{index}",) for index in range(len(query) - 2)]
    sizes = {f"b{index}": size for index, size in enumerate(query[:-2])}
    sizes |= {"q": query[-2], "k": op.inputs[1].shape[-2], "d": query[-1], "e": op.inputs[2].shape[-1]}
    if grouped:  # several query heads share a key head: h = (g r)
        last = len(batch) - 1
        groups = op.inputs[1].shape[-3]
        sizes |= {"g": groups, "r": query[-3] // groups}
        sizes.pop(f"b{last}")
        batch[last] = ("g", "r")
    shared: list[Dim] = [("g",) if dim == ("g", "r") else dim for dim in batch]
    keys, values = (_broadcast(value.shape[:-2], shared, [*query[:-3], *value.shape[-3:-2]]) for value in op.inputs[1:3])
    inputs = [(*batch, ("q",), ("d",)), (*keys, ("k",), ("d",)), (*values, ("k",), ("e",))]
    mask = op.argument(3, "attn_mask")
    if isinstance(mask, Slot):
        inputs.append(_broadcast(op.inputs[3].shape, [*batch, ("q",), ("k",)], (*query[:-1], sizes["k"])))
    reasons = {"k": "it is normalised as a whole", "d": "it is summed before a softmax"}
    if has_dropout(op):
        inputs.append((("state",),))
        sizes["state"] = 2
        reasons["state"] = "one state for all"
    splits = {name: Split() for name in sizes if name.startswith("b") or name in ("g", "r", "e")}
    splits["q"] = Split(microbatches=not is_causal(op))
    return Signature(
        inputs=tuple(tuple(each) for each in inputs),
        outputs=((*batch, ("q",), ("e",)),),
        sizes=sizes,
        splits=splits,
        linear=(frozenset({2}),),
        local=attend,
        reasons=reasons,
    )


def is_attention(op: Op) -> bool:
    """Whether it is attention as one operator."""
    return op.target is aten.scaled_dot_product_attention.default or has_dropout(op)


def has_dropout(op: Op) -> bool:
    """Whether it is attention with dropout inside."""
    return op.target is operators.dropped_attention


def is_causal(op: Op) -> bool:
    """Whether each query of an attention sees the keys up to its own."""
    return is_attention(op) and bool(op.argument(5, "is_causal", False))


def mask_of(op: Op) -> Value | None:
    """What an attention adds to the scores, or which keys are seen."""
    return op.inputs[3] if isinstance(op.argument(3, "attn_mask"), Slot) else None


def weight_dims(op: Op) -> tuple[Dim, ...]:
    """The factors of an attention's weights, [..., h, q, k]."""
    return (*attention(op).inputs[0][:-1], ("k",))


def _broadcast(shape: Sequence[int], names: Sequence[Dim], whole: Sequence[int]) -> tuple[Dim, ...]:
    """The factors of a tensor that is broadcast to dims `names` of sizes `whole`."""
    shift = len(whole) - len(shape)
    return tuple(() if size == 1 and whole[index + shift] != 1 else names[index + shift] for index, size in enumerate(shape))


def attend(call: Call, tensors: Sequence[torch.Tensor]) -> Any:
    """Local code of attention to all keys. The whole head dim sets the scale, also where only a part of it is here."""
    if has_dropout(call.op):
        return _attend_dropping(call, tensors)
    given: dict[str, Any] = {}
    if call.op.kwargs.get("scale") is None:
        given["scale"] = call.op.inputs[0].shape[-1] ** -0.5
    if not call.splits.get("q") or not call.op.argument(5, "is_causal", False):
        return call.run(tensors, **given)
    query, key, value = tensors
    rows, seen = _rows(call.sizes["q"], call.splits["q"], query.device)
    seen = min(seen, key.shape[-2])
    mask = torch.arange(seen, device=query.device) <= rows[:, None]
    kept = {name: constant for name, constant in call.op.kwargs.items() if name in ("enable_gqa", "scale")} | given
    return call.op.target(query, key[..., :seen, :], value[..., :seen, :], mask, 0.0, False, **kept)


def _attend_dropping(call: Call, tensors: Sequence[torch.Tensor]) -> Any:
    state, probability = tensors[-1], call.op.args[4]
    weights = _weights(call, tensors)
    dims = weight_dims(call.op)
    along = [indices_of(call, dim, state) for dim in dims]
    held = held_along([prod(call.sizes[name] for name in dim) for dim in dims], along, runs=True)
    keep = draws.keyed_keep(held, state, probability, call.op.kwargs["key"])
    return draws.dropped(weights, keep, probability) @ operators.each_head(tensors[2], tensors[0])


def _weights(call: Call, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    query, key, _, *rest = tensors
    mask, causal, scale = (rest[0] if len(rest) > 1 else None), is_causal(call.op), call.op.args[6]
    if causal and call.splits.get("q"):
        rows, _ = _rows(call.sizes["q"], call.splits["q"], query.device)
        mask, causal = torch.arange(key.shape[-2], device=query.device) <= rows[:, None], False
    return operators.attention_weights(query, key, mask, causal=causal, scale=scale)


def _attend_fast(call: Call, tensors: Sequence[torch.Tensor]) -> Any:
    """As `attend`, dropping by torch's own generator."""
    weights, probability = _weights(call, tensors), call.op.args[4]
    keep = draws.fast_keep(tuple(weights.shape), tensors[-1], probability, **fast_seeds(call))
    return draws.dropped(weights, keep, probability) @ operators.each_head(tensors[2], tensors[0])


FAST[operators.dropped_attention] = _attend_fast


def _rows(size: int, splits: Sequence[AxisSplit], device: torch.device) -> tuple[torch.Tensor, int]:
    """The indices in a whole dim of `size` that this rank has, and how many elements lie up to the last of them."""
    index, end = torch.arange(size, device=device), size
    for split in splits:
        index = index[split.part.indices(device)]
    if all(split.part.blocks == 1 and len(split.part.runs) == 1 for split in splits):
        end = sum(split.part.start for split in splits) + splits[-1].part.length
    return index, end
