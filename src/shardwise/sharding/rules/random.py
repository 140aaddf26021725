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
from shardwise.sharding.signature import AxisSplit, Call, Signature, Split

__all__ = ["FAST", "fast"]

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
    one = torch.zeros(1, dtype=torch.int64, device=call.device)
    rows, local = one, tuple(each.numel() for each in along)
    for size, each in zip(shape[:-1], along[:-1], strict=True):
        rows = (rows[:, None] * size + each[None]).reshape(-1)
    if not shape:
        return Held(rows=rows, columns=one, width=1, shape=local, runs=True)
    return Held(rows=rows, columns=along[-1], width=shape[-1], shape=local, runs=_in_fours(splits[-1]))


def _in_fours(splits: Sequence[AxisSplit]) -> bool:
    """Whether a rank holds of a dim, split so, whole runs of four neighbours, each from a multiple of four on (but for the dim's end)."""
    parts = [split.part for split in splits]
    if len(parts) == 1 and parts[0].blocks == 1 and splits[0].rank is not None:
        return parts[0].start % 4 == 0
    return all(number % 4 == 0 for part in parts for number in (part.start, part.stop, part.block if part.blocks > 1 else 0))


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


# ---- fast --------------------------------------------------------------------------------------------------------------------------


def fast(op: Op, sig: Signature) -> Signature:
    """The signature with local code that draws from torch's own generator, where there is such code for the operator."""
    return replace(sig, local=FAST[op.target]) if op.target in FAST else sig


def _fast_dropout(call: Call, tensors: Sequence[Tensor]) -> Any:
    x, state = tensors
    probability = call.op.args[2]
    return draws.dropped(x, draws.fast_keep(call.shapes[0], state, probability, **_seeds(call)), probability)


def _fast_draw(call: Call, tensors: Sequence[Tensor]) -> Any:
    distribution, parameters, dtype = call.op.args[2:]
    return draws.fast_draw(call.shapes[0], tensors[0], distribution, parameters, dtype, **_seeds(call))


def _seeds(call: Call) -> Mapping[str, Any]:
    """Equal on ranks that hold the same part, and for all microbatches unless these split the call."""
    splits = [split for _, found in sorted(call.splits.items()) for split in found]
    places = [split.rank for split in splits if split.rank is not None]
    return {"seeds": [call.op.kwargs["key"], *places], "each": len(places) < len(splits), "device": call.device}


FAST = {operators.keyed_dropout: _fast_dropout, operators.keyed_draw: _fast_draw}
