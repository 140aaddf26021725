"""Look-ups in a table: split the indices, the table's columns, or its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.capture.graph import Op
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.rules.shape import simple_dims
from shardwise.sharding.signature import Call, Signature, Split

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
