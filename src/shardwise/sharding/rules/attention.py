"""Scaled dot-product attention: batch and heads are independent; the keys' sequence stays whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shardwise.capture.graph import Op, Slot
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.signature import AxisSplit, Call, Dim, Signature, Split

aten = torch.ops.aten


@rule(aten.scaled_dot_product_attention.default)
def attention(op: Op) -> Signature:
    """… h q d, … h k d, … h k e, mask -> … h q e; a rank that has some queries makes their part of a causal mask."""
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
    splits["q"] = Split(microbatches=not causal)
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


def _rows(size: int, splits: Sequence[AxisSplit], device: torch.device) -> tuple[torch.Tensor, int]:
    """The indices in a whole dim of `size` that this rank has, and how many elements lie up to the last of them."""
    index, end = torch.arange(size, device=device), size
    for split in splits:
        part = split.part
        blocks, places = torch.arange(part.blocks, device=device), torch.arange(part.start, part.stop, device=device)
        index = index[(blocks[:, None] * part.block + places).reshape(-1)]
    if all(split.part.blocks == 1 for split in splits):
        end = sum(split.part.start for split in splits) + splits[-1].part.length
    return index, end
