"""Random operators: the draw depends on an element's index in the whole tensor, so any split of it gives the same numbers.

For a plan with random="fast" some get other local code: torch's generator, seeded with the places of the parts that the rank holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shardwise.capture import draws, operators
from shardwise.capture.draws import Held
from shardwise.capture.graph import Op
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.rules.shape import simple_dims
from shardwise.sharding.signature import AxisSplit, Call, Dim, Signature, Split
from shardwise.sharding.types import Part

__all__ = ["FAST", "fast", "fast_seeds", "held_along", "in_fours", "indices_of"]

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
    probability, key = call.op.args[2], call.op.kwargs["key"]
    return draws.dropped(x, draws.keyed_keep(held_part(call, call.op.inputs[0].shape, state), state, probability, key), probability)


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
    held = held_part(call, call.op.outputs[0].shape, state)
    if call.op.target is operators.keyed_permutation:
        return call.run(tensors).to(call.device)[held.columns]
    distribution, parameters, dtype = call.op.args[2:]
    return draws.keyed_draw(held, state, distribution, parameters, dtype, call.op.kwargs["key"])


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
    held = held_part(call, (*call.op.inputs[0].shape[:-1], columns), state)
    return operators.choose(probabilities, held, state, count, replacement, call.op.kwargs["key"])


def held_part(call: Call, shape: Sequence[int], state: Tensor) -> Held:
    """Which elements this rank holds of a whole tensor of `shape`, whose dims are the factors d0, d1, …"""
    splits = [call.splits.get(f"d{dim}", ()) for dim in range(len(shape))]
    along = [global_indices(size, split, state[1], call.device) for size, split in zip(shape, splits, strict=True)]
    if not shape:
        one = torch.zeros(1, dtype=torch.int64, device=call.device)
        return Held(rows=one, columns=one, width=1, shape=(), runs=True)
    return held_along(shape, along, runs=in_fours([split.part for split in splits[-1]], inside=_inside(splits[-1])))


def held_along(shape: Sequence[int], along: Sequence[Tensor], *, runs: bool) -> Held:
    """The elements of a whole tensor of `shape` at the given indices of each dim. runs: as of `Held`."""
    rows = torch.zeros(1, dtype=torch.int64, device=along[-1].device)
    for size, each in zip(shape[:-1], along[:-1], strict=True):
        rows = (rows[:, None] * size + each[None]).reshape(-1)
    return Held(rows=rows, columns=along[-1], width=shape[-1], shape=tuple(each.numel() for each in along), runs=runs)


def _inside(splits: Sequence[AxisSplit]) -> bool:
    """Whether the rank's part of a dim is the same in all microbatches."""
    return all(split.rank is not None for split in splits)


def in_fours(parts: Sequence[Part], *, inside: bool = True) -> bool:
    """Whether a rank holds of a dim, split so, whole runs of four neighbours, each from a multiple of four on (but for the dim's end).
    inside: whether it is the same part in all microbatches."""
    if len(parts) == 1 and parts[0].blocks == 1 and inside and len(parts[0].runs) == 1:
        return parts[0].start % 4 == 0
    return all(number % 4 == 0 for part in parts for number in (part.start, part.stop, *part.more, part.block if part.blocks > 1 else 0))


def global_indices(size: int, splits: Sequence[AxisSplit], microbatch: Tensor, device: torch.device) -> Tensor:
    """The indices in a whole dim of `size` of the elements that this rank holds, int64 [local]."""
    index = torch.arange(size, device=device)
    for split in splits:
        part = split.part
        rows = part.indices(device)
        if split.rank is None:
            rows = rows + microbatch * (part.stop - part.start)
        index = index[rows]
    return index


def indices_of(call: Call, dim: Dim, state: Tensor) -> Tensor:
    """The indices that this rank holds of a dim that is a product of factors, int64 [local]."""
    index = torch.zeros(1, dtype=torch.int64, device=call.device)
    for name in dim:
        each = global_indices(call.sizes[name], call.splits.get(name, ()), state[1], call.device)
        index = (index[:, None] * call.sizes[name] + each[None]).reshape(-1)
    return index


# ---- fast --------------------------------------------------------------------------------------------------------------------------


def fast(op: Op, sig: Signature) -> Signature:
    """The signature with local code that draws from torch's own generator, where there is such code for the operator."""
    return replace(sig, local=FAST[op.target]) if op.target in FAST else sig


def _fast_dropout(call: Call, tensors: Sequence[Tensor]) -> Any:
    x, state = tensors
    probability = call.op.args[2]
    return draws.dropped(x, draws.fast_keep(call.shapes[0], state, probability, **fast_seeds(call)), probability)


def _fast_draw(call: Call, tensors: Sequence[Tensor]) -> Any:
    distribution, parameters, dtype = call.op.args[2:]
    return draws.fast_draw(call.shapes[0], tensors[0], distribution, parameters, dtype, **fast_seeds(call))


def fast_seeds(call: Call) -> Mapping[str, Any]:
    """Equal on ranks that hold the same part, and for all microbatches unless these split the call."""
    splits = [split for _, found in sorted(call.splits.items()) for split in found]
    places = [split.rank for split in splits if split.rank is not None]
    return {"seeds": [call.op.kwargs["key"], *places], "each": len(places) < len(splits), "device": call.device}


FAST = {operators.keyed_dropout: _fast_dropout, operators.keyed_draw: _fast_draw}
