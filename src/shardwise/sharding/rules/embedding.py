"""Look-ups in a table: split the indices, the table's columns, or its rows. Of rows that other ranks have a rank makes zeros: a summand."""

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


@rule(aten.embedding.default)
def embedding(op: Op) -> Signature:
    """v h, … -> … h. With rows split a rank looks up those that it has and gives zero for the others: a summand.

    Gradients scaled by how often a row is looked up need all indices at once.
    """
    table, index = op.inputs[0].shape, op.inputs[1].shape
    names = simple_dims(index)
    sizes = {f"d{dim}": size for dim, size in enumerate(index)} | {"v": table[0], "h": table[1]}
    splits = {f"d{dim}": Split() for dim in range(len(index))} | {"v": Split(blocked=False, microbatches=False)}
    counted = bool(op.argument(3, "scale_grad_by_freq", False))
    reasons = dict.fromkeys(splits, "a row's gradient is divided by the number of its look-ups") if counted else {}
    return Signature(
        inputs=((("v",), ("h",)), tuple(names)),
        outputs=((*names, ("h",)),),
        sizes=sizes,
        splits={"h": Split()} if counted else splits | {"h": Split()},
        linear=(frozenset({0}),),
        local=_embedding,
        reasons=reasons,
    )


def _embedding(call: Call, tensors: Sequence[Tensor]) -> Any:
    rows = call.splits.get("v", ())
    if not rows:
        return call.run(tensors)
    table, index = tensors
    start = 0
    for split in rows:
        start += split.part.start
    padding = call.op.argument(2, "padding_idx", -1)
    local = index - start
    here = (local >= 0) & (local < table.shape[0])
    padded = padding - start if 0 <= padding - start < table.shape[0] else -1
    found = aten.embedding.default(table, torch.where(here, local, 0), padded)
    return torch.where(here.unsqueeze(-1), found, torch.zeros((), dtype=found.dtype, device=found.device))


_COUNTED = "a row's gradient is divided by the number of its look-ups"


@rule(operators.bag_of_rows)
def bag_of_rows(op: Op) -> Signature:
    """v h, b n, b n -> b h: the rows that a bag names are added up, and each rank may have some of them."""
    mode, _, counted = op.args[3:]
    splits = {"b": Split(), "h": Split()}
    if mode == "sum":
        splits["n"] = Split()
    if mode != "max":
        splits["v"] = Split(blocked=False, microbatches=False)
    reasons = {} if mode == "sum" else {"n": "a bag's rows are compared or counted as a whole"}
    reasons |= {"v": "a maximum is no sum"} if mode == "max" else {}
    if counted:
        splits, reasons = {"h": Split()}, dict.fromkeys("bnv", _COUNTED)
    scaled = len(op.inputs) == 3
    linear = () if mode == "max" else (frozenset({0}), *((frozenset({2}),) if scaled else ()))
    text = f"v h, b n{', b n' if scaled else ''} -> b h"
    return signature(op, text, splits=splits, reasons=reasons, linear=linear, local=_bag_of_rows)


def _bag_of_rows(call: Call, tensors: Sequence[Tensor]) -> Any:
    rows = call.splits.get("v", ())
    if not rows:
        return call.run(tensors)
    weight, index, scale, mode, padding, _ = fill(call.op.args, list(tensors))
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
    counted = op.args[6]
    scaled = len(op.inputs) == 4
    reasons = {
        "n": "bags are runs of it",
        "o": "they count in all indices",
        "b": "bags are runs of the indices",
        "v": "give bags one length",
    }
    linear = () if op.args[4] == "max" else (frozenset({0}), *((frozenset({3}),) if scaled else ()))
    text = f"v h, n, o{', n' if scaled else ''} -> b h"
    return signature(op, text, splits={"h": Split()}, reasons=reasons | ({"v": _COUNTED} if counted else {}), linear=linear)
