"""Look-ups in a table: split the indices, the table's columns, or its rows, or keep the whole table on one rank. Of rows that other ranks
have a rank makes zeros: a summand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.capture import operators
from shardwise.capture.graph import Op, fill
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.rules.shape import simple_dims
from shardwise.sharding.signature import Call, Signature, Split, signature

aten = torch.ops.aten

_ROWS = Split(blocked=False, owned=True, microbatches=False)
_TABLE = Split(blocked=False, ranges=False, owned=True, microbatches=False)  # whole tables only
_COUNTED = "a row's gradient is divided by the number of its look-ups"


@rule(aten.embedding.default)
def embedding(op: Op) -> Signature:
    """v h, … -> … h. With rows split a rank looks up those that it has and gives zero for the others: a summand.

    Gradients scaled by how often a row is looked up need all indices at once.
    """
    table, index = op.inputs[0].shape, op.inputs[1].shape
    names = simple_dims(index)
    sizes = {f"d{dim}": size for dim, size in enumerate(index)} | {"v": table[0], "h": table[1]}
    counted = bool(op.argument(3, "scale_grad_by_freq", False))
    looked_up = [f"d{dim}" for dim in range(len(index))]
    splits = {"v": _TABLE} if counted else {name: Split() for name in looked_up} | {"v": _ROWS}
    return Signature(
        inputs=((("v",), ("h",)), tuple(names)),
        outputs=((*names, ("h",)),),
        sizes=sizes,
        splits=splits | {"h": Split()},
        linear=(frozenset({0}),),
        local=_embedding,
        reasons=dict.fromkeys([*looked_up, "v"], _COUNTED) if counted else {},
    )


def _embedding(call: Call, tensors: Sequence[Tensor]) -> Any:
    rows = call.splits.get("v", ())
    if not rows or _whole_table(call):
        return call.run(tensors)
    table, index = tensors
    if not table.shape[0]:
        return _nothing(call, table)
    start = 0
    for split in rows:
        start += split.part.start
    padding = call.op.argument(2, "padding_idx", -1)
    local = index - start
    here = (local >= 0) & (local < table.shape[0])
    padded = padding - start if 0 <= padding - start < table.shape[0] else -1
    found = aten.embedding.default(table, torch.where(here, local, 0), padded)
    return torch.where(here.unsqueeze(-1), found, torch.zeros((), dtype=found.dtype, device=found.device))


def _whole_table(call: Call) -> bool:
    """Whether this rank has all rows."""
    return call.splits["v"][-1].part.length == call.sizes["v"]


def _nothing(call: Call, table: Tensor) -> Tensor:
    """What a rank without rows adds: zeros, with a gradient for its empty table."""
    return table.new_zeros(call.shapes[0]) + table.sum()


@rule(operators.bag_of_rows)
def bag_of_rows(op: Op) -> Signature:
    """v h, b n, b n -> b h: the rows that a bag names are added up, and each rank may have some of them."""
    mode, _, counted = op.args[3:]
    splits = {"b": Split(), "h": Split(), "v": _TABLE if mode == "max" else _ROWS}
    if mode == "sum":
        splits["n"] = Split()
    reasons = {} if mode == "sum" else {"n": "a bag's rows are compared or counted as a whole"}
    reasons |= {"v": "a maximum is no sum"} if mode == "max" else {}
    if counted:
        splits, reasons = {"h": Split(), "v": _TABLE}, dict.fromkeys("bnv", _COUNTED)
    scaled = len(op.inputs) == 3
    linear = () if mode == "max" else (frozenset({0}), *((frozenset({2}),) if scaled else ()))
    text = f"v h, b n{', b n' if scaled else ''} -> b h"
    return signature(op, text, splits=splits, reasons=reasons, linear=linear, local=_bag_of_rows)


def _bag_of_rows(call: Call, tensors: Sequence[Tensor]) -> Any:
    rows = call.splits.get("v", ())
    if not rows or _whole_table(call):
        return call.run(tensors)
    weight, index, scale, mode, padding, _ = fill(call.op.args, list(tensors))
    if not weight.shape[0]:
        return _nothing(call, weight)
    local = index - sum(split.part.start for split in rows)
    here = (local >= 0) & (local < weight.shape[0])
    counts = here if padding is None else here & (index != padding)
    wanted = counts.to(weight.dtype) if scale is None else scale * counts.to(weight.dtype)
    if mode == "mean":
        valid = torch.full_like(index, index.shape[1])[:, :1] if padding is None else (index != padding).sum(1, keepdim=True)
        wanted = wanted / valid.clamp_min(1)
    return operators.bag_of_rows(weight, torch.where(here, local, 0), wanted, "sum", None, False)


@rule(operators.bag_of_runs)
def bag_of_runs(op: Op) -> Signature:
    """v h, n, b, n -> b h: bags lie across one another in the indices, which stay whole."""
    mode, _, counted = op.args[4:7]
    scaled = len(op.inputs) == 4
    rows = mode == "sum" and not counted
    reasons = {"n": "bags are runs of it", "o": "they count in all indices", "b": "bags are runs of the indices"}
    if not rows:
        reasons["v"] = _COUNTED if counted else "a bag's rows are compared or counted as a whole"
    linear = () if mode == "max" else (frozenset({0}), *((frozenset({3}),) if scaled else ()))
    text = f"v h, n, o{', n' if scaled else ''} -> b h"
    splits = {"h": Split(), "v": _ROWS if rows else _TABLE}
    return signature(op, text, splits=splits, reasons=reasons, linear=linear, local=_bag_of_runs)


def _bag_of_runs(call: Call, tensors: Sequence[Tensor]) -> Any:
    rows = call.splits.get("v", ())
    if not rows or _whole_table(call):
        return call.run(tensors)
    weight, index, starts, scale, mode, padding, _, last = fill(call.op.args, list(tensors))
    if not weight.shape[0]:
        return _nothing(call, weight)
    local = index - sum(split.part.start for split in rows)
    here = (local >= 0) & (local < weight.shape[0])
    counts = (here if padding is None else here & (index != padding)).to(weight.dtype)
    wanted = counts if scale is None else scale * counts
    return operators.bag_of_runs(weight, torch.where(here, local, 0), starts, wanted, mode, None, False, last)
