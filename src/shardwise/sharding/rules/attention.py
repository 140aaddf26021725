"""Scaled dot-product attention: batch and heads are independent; the keys' sequence stays whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shardwise.capture.graph import Op, Slot
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.signature import Call, Dim, Signature, Split

aten = torch.ops.aten


@rule(aten.scaled_dot_product_attention.default)
def attention(op: Op) -> Signature:
    """… h q d, … h k d, … h k e, mask -> … h q e; with a causal mask of its own the queries stay whole, too."""
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
    causal = bool(op.argument(5, "is_causal", False))
    splits = {name: Split() for name in sizes if name.startswith("b") or name in ("g", "r", "e")}
    reasons = {"k": "it is normalised as a whole", "d": "it is summed before a softmax"}
    if causal:
        reasons["q"] = "the causal mask counts from the first query"
    else:
        splits["q"] = Split()
    return Signature(
        inputs=tuple(tuple(each) for each in inputs),
        outputs=((*batch, ("q",), ("e",)),),
        sizes=sizes,
        splits=splits,
        linear=(frozenset({2}),),
        local=_attention,
        reasons=reasons,
    )


def _broadcast(shape: Sequence[int], names: Sequence[Dim], whole: Sequence[int]) -> tuple[Dim, ...]:
    """The factors of a tensor that is broadcast to dims `names` of sizes `whole`."""
    shift = len(whole) - len(shape)
    return tuple(() if size == 1 and whole[index + shift] != 1 else names[index + shift] for index, size in enumerate(shape))


def _attention(call: Call, tensors: Sequence[torch.Tensor]) -> Any:
    """The whole head dim sets the scale, also where only a part of it is here."""
    if call.op.kwargs.get("scale") is None:
        return call.run(tensors, scale=call.op.inputs[0].shape[-1] ** -0.5)
    return call.run(tensors)
