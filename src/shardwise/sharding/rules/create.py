"""Operators that make a tensor from nothing, or from another one's shape. They depend on no data and are made whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shardwise.capture.graph import Op
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.rules.shape import simple_dims
from shardwise.sharding.signature import Call, Signature

aten = torch.ops.aten


@rule(
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    aten.eye.default,
    aten.scalar_tensor.default,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.new_full.default,
)
def create(op: Op) -> Signature:
    inputs = tuple(tuple((f"i{n}{d}",) for d in range(len(value.shape))) for n, value in enumerate(op.inputs))
    sizes = {f"i{n}{d}": size for n, value in enumerate(op.inputs) for d, size in enumerate(value.shape)}
    sizes |= {f"d{d}": size for d, size in enumerate(op.outputs[0].shape)}
    return Signature(
        inputs=inputs,
        outputs=(tuple(simple_dims(op.outputs[0].shape)),),
        sizes=sizes,
        local=_create,
        reasons={"*": "made whole: it is cheap"},
    )


def _create(call: Call, tensors: Sequence[torch.Tensor]) -> Any:
    return call.run(tensors)
