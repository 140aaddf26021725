"""A graph in another precision: every cast to a smaller float becomes one to `dtype`, for the proof in float64."""

from __future__ import annotations

from typing import Any

import torch

from shardwise.capture.graph import Check, Graph, Op, Value
from shardwise.capture.opaque import Opaque

__all__ = ["cast_graph", "cast_tensor"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def cast_tensor(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in `dtype` (complex numbers: of two such), or itself if it is one of whole numbers or truth values."""
    return tensor.to(_exchanged(tensor.dtype, dtype))


def _exchanged(old: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """What `old` becomes."""
    if old.is_complex:
        return torch.complex128 if dtype is torch.float64 else torch.complex64
    return dtype if old in _FLOATS else old


def cast_graph(graph: Graph, dtype: torch.dtype) -> Graph:
    """The same computation with every real tensor in `dtype`."""
    new: dict[Value, Value] = {}

    def value_of(value: Value) -> Value:
        if value not in new:
            new[value] = Value(
                name=value.name, shape=value.shape, dtype=_exchanged(value.dtype, dtype), kind=value.kind, requires_grad=value.requires_grad
            )
        return new[value]

    sources = {kind: {name: value_of(v) for name, v in group.items()} for kind, group in _sources(graph).items()}
    ops: dict[Op, Op] = {}
    for op in graph.ops:
        inputs, outputs = tuple(map(value_of, op.inputs)), tuple(map(value_of, op.outputs))
        ops[op] = Op(
            target=op.target.cast(dtype) if isinstance(op.target, Opaque) else op.target,
            args=_cast(op.args, dtype),
            kwargs=_cast(op.kwargs, dtype) | _made_in(op, dtype),
            inputs=inputs,
            outputs=outputs,
            module=op.module,
            key=op.key,
        )
        for value in outputs:
            value.producer = ops[op]
    return Graph(
        parameters=sources["parameters"],
        buffers=sources["buffers"],
        inputs=sources["inputs"],
        ops=list(ops.values()),
        loss=new[graph.loss],
        aliases=graph.aliases,
        updates={name: new[value] for name, value in graph.updates.items()},
        blocks=[[[ops[op] for op in block] for block in run] for run in graph.blocks],
        batch_dims=graph.batch_dims,
        constants={name: cast_tensor(tensor, dtype) for name, tensor in graph.constants.items()},
        kept=graph.kept,
        checks=[Check(value=value_of(each.value), expected=each.expected, module=each.module) for each in graph.checks],
    )


def _made_in(op: Op, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of an operator that makes real numbers from none and was not told in which: torch's default is no cast."""
    if not isinstance(op.target, torch._ops.OpOverload) or not op.outputs[0].dtype.is_floating_point:
        return {}
    if any(value.dtype.is_floating_point or value.dtype.is_complex for value in op.inputs):
        return {}
    place = next((place for place, each in enumerate(op.target._schema.arguments) if each.name == "dtype"), None)
    return {} if place is None or op.argument(place, "dtype") is not None else {"dtype": _exchanged(op.outputs[0].dtype, dtype)}


def _sources(graph: Graph) -> dict[str, dict[str, Value]]:
    return {"parameters": graph.parameters, "buffers": graph.buffers, "inputs": graph.inputs}


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    """The constants with every real dtype exchanged."""
    if isinstance(tree, torch.dtype):
        return _exchanged(tree, dtype)
    if isinstance(tree, (tuple, list)):
        return type(tree)(_cast(item, dtype) for item in tree)
    if isinstance(tree, dict):
        return {name: _cast(item, dtype) for name, item in tree.items()}
    return tree
