"""Random operators: the draw depends on an element's index in the whole tensor, so any split of it gives the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from shardwise.capture import operators
from shardwise.capture.graph import Op
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.rules.shape import simple_dims
from shardwise.sharding.signature import AxisSplit, Call, Signature, Split

_STATE = {"state": "one state for all"}


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
        reasons=_STATE,
    )


def _dropout(call: Call, tensors: Sequence[Tensor]) -> Any:
    x, state = tensors
    index = global_index(call, call.op.inputs[0].shape, state, x.device)
    return operators.drop(x, index, state[0], call.op.args[2], call.op.kwargs["key"])


@rule(operators.keyed_draw, operators.keyed_permutation)
def draw(op: Op) -> Signature:
    """Made from nothing: every dim may be split, by whoever reads it."""
    shape = op.outputs[0].shape
    return Signature(
        inputs=((("state",),),),
        outputs=(tuple(simple_dims(shape)),),
        sizes={f"d{index}": size for index, size in enumerate(shape)} | {"state": 2},
        splits={f"d{index}": Split() for index in range(len(shape))},
        local=_draw,
        reasons=_STATE,
    )


def _draw(call: Call, tensors: Sequence[Tensor]) -> Any:
    (state,) = tensors
    index = global_index(call, call.op.outputs[0].shape, state, state.device)
    if call.op.target is operators.keyed_permutation:
        return call.run(tensors)[index]
    distribution, parameters, dtype = call.op.args[2:]
    return operators.draw(index, state[0], distribution, parameters, dtype, call.op.kwargs["key"])


@rule(operators.keyed_multinomial)
def multinomial(op: Op) -> Signature:
    """Each row chooses for itself."""
    rows = simple_dims(op.inputs[0].shape[:-1])
    sizes = {f"d{index}": size for index, size in enumerate(op.inputs[0].shape[:-1])}
    return Signature(
        inputs=((*rows, ("classes",)), (("state",),)),
        outputs=((*rows, ("draws",)),),
        sizes=sizes | {"classes": op.inputs[0].shape[-1], "draws": op.outputs[0].shape[-1], "state": 2},
        splits={name: Split() for name in sizes},
        local=_multinomial,
        reasons=_STATE | {"classes": "one is chosen from all of them", "draws": "each depends on those before it"},
    )


def _multinomial(call: Call, tensors: Sequence[Tensor]) -> Any:
    probabilities, state = tensors
    count, replacement = call.op.args[2:]
    columns = count if replacement else probabilities.shape[-1]
    index = global_index(call, (*call.op.inputs[0].shape[:-1], columns), state, probabilities.device)
    return operators.choose(probabilities, index, state[0], count, replacement, call.op.kwargs["key"])


def global_index(call: Call, shape: Sequence[int], state: Tensor, device: torch.device) -> Tensor:
    """The index in a whole tensor of `shape`, whose dims are the factors d0, d1, …, of each element that this rank holds."""
    index = torch.zeros((), dtype=torch.int64, device=device)
    for dim, size in enumerate(shape):
        along = global_indices(size, call.splits.get(f"d{dim}", ()), state[1], device)
        index = index + (along * prod(shape[dim + 1 :])).reshape([-1] + [1] * (len(shape) - dim - 1))
    return index


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
