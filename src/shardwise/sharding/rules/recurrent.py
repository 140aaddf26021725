"""Recurrent layers and cells: samples are independent, all else depends on all that came before."""

from __future__ import annotations

from typing import Any

import torch

from shardwise.capture.graph import Op
from shardwise.capture.recurrent import recurrent
from shardwise.sharding.rules.build import given, positions
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.signature import Dim, Signature, Split

aten = torch.ops.aten
_DEPENDS = "each step reads all of the one before it"


@rule(recurrent)
def layers(op: Op) -> Signature:
    """t n i (or n t i), states l n h, weights, lengths n -> t n o, states l n h"""
    place = 0 if given(op, "batch_first") else 1
    return _samples(op, {"x": place, "states": 1, "lengths": 0}, [place, *(1 for _ in op.outputs[1:])])


@rule(aten.lstm_cell.default, aten.gru_cell.default, aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default)
def cells(op: Op) -> Signature:
    """n i, states n h, weights -> states n h"""
    return _samples(op, {"input": 0, "hx": 0}, [0 for _ in op.outputs])


@rule(aten.lstm.data, aten.gru.data, aten.rnn_tanh.data, aten.rnn_relu.data)
def packed_layers(op: Op) -> Signature:
    """Sequences packed by length lie across one another."""
    return _samples(op, {}, [None for _ in op.outputs], reason="the samples of a packed sequence lie across one another")


def _samples(op: Op, places: dict[str, int], results: list[Any], reason: str = _DEPENDS) -> Signature:
    """The dim of samples, n, by arguments' names and for each result; all other dims stay whole."""
    found = {index: place for name, place in places.items() for index in positions(op, name)}
    tensors: list[tuple[Dim, ...]] = []
    sizes: dict[str, int] = {}
    for number, value in enumerate((*op.inputs, *op.outputs)):
        place = found.get(number) if number < len(op.inputs) else results[number - len(op.inputs)]
        names = [f"t{number}d{dim}" if dim != place else "n" for dim in range(len(value.shape))]
        sizes |= dict(zip(names, value.shape, strict=True))
        tensors.append(tuple((name,) for name in names))
    return Signature(
        inputs=tuple(tensors[: len(op.inputs)]),
        outputs=tuple(tensors[len(op.inputs) :]),
        sizes=sizes,
        splits={"n": Split()} if "n" in sizes else {},
        reasons={name: reason for name in sizes if name != "n"},
    )
