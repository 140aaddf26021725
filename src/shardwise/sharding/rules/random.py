"""Random operators: the draw depends on an element's index in the whole tensor, so any split of it gives the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.capture import operators
from shardwise.capture.graph import Op
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.rules.shape import simple_dims
from shardwise.sharding.signature import AxisSplit, Call, Signature, Split


@rule(operators.keyed_dropout)
def dropout(op: Op) -> Signature:
    shape = op.inputs[0].shape
    names = simple_dims(shape)
    sizes = {f"d{index}": size for index, size in enumerate(shape)} | {"state": 2}
    splits = {f"d{index}": Split() for index in range(len(shape))}
    return Signature(
        inputs=(tuple(names), (("state",),)),
        outputs=(tuple(names),),
        sizes=sizes,
        splits=splits,
        linear=(frozenset({0}),),
        local=_dropout,
        reasons={"state": "one state for all"},
    )


def _dropout(call: Call, tensors: Sequence[Tensor]) -> Any:
    x, state = tensors
    shape = call.op.inputs[0].shape
    index: Any = 0
    for dim, size in enumerate(shape):
        along = global_indices(size, call.splits.get(f"d{dim}", ()), state[1], x.device)
        index = index * size + along.reshape([-1] + [1] * (len(shape) - dim - 1))
    return operators.drop(x, index, state[0], call.op.args[2], call.op.kwargs["key"])


def global_indices(size: int, splits: Sequence[AxisSplit], microbatch: Tensor, device: torch.device) -> Tensor:
    """The indices in a whole dim of `size` of the elements that this rank holds, int64 [local]."""
    index = torch.arange(size, device=device)
    for split in splits:
        part = split.part
        rows = torch.arange(part.blocks, device=device)[:, None] * part.block + torch.arange(part.start, part.stop, device=device)[None]
        if split.rank is None:
            rows = rows + microbatch * (part.stop - part.start)
        index = index[rows.reshape(-1)]
    return index
