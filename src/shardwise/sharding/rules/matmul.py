"""Products of matrices: split a batch dim, the rows, the columns, or what is summed over."""

from __future__ import annotations

import torch

from shardwise.capture.graph import Op
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.signature import Signature, Split, signature

aten = torch.ops.aten


@rule(aten.linear.default)
def linear(op: Op) -> Signature:
    """b… k, n k, n -> b… n; with k split (Megatron's row) the added bias is a summand."""
    batch = " ".join(f"b{index}" for index in range(len(op.inputs[0].shape) - 1))
    bias = len(op.inputs) == 3
    splits = {name: Split() for name in [*batch.split(), "n"]} | {"k": Split(addends=frozenset({2} if bias else ()))}
    linear_in = (frozenset({0, 2}), frozenset({1, 2})) if bias else (frozenset({0}), frozenset({1}))
    text = f"{batch} k, n k{', n' if bias else ''} -> {batch} n"
    return signature(op, text, splits=splits, linear=linear_in)


@rule(aten.addmm.default)
def addmm(op: Op) -> Signature:
    """n, m k, k n -> m n (the added term is broadcast)."""
    added = _broadcast(op.inputs[0].shape, ("m", "n"), op.outputs[0].shape)
    splits = {"m": Split(), "n": Split(), "k": Split(addends=frozenset({0}))}
    return signature(op, f"{added}, m k, k n -> m n", splits=splits, linear=(frozenset({0, 1}), frozenset({0, 2})))


@rule(aten.mm.default)
def mm(op: Op) -> Signature:
    splits = {name: Split() for name in "mkn"}
    return signature(op, "m k, k n -> m n", splits=splits, linear=(frozenset({0}), frozenset({1})))


@rule(aten.bmm.default)
def bmm(op: Op) -> Signature:
    splits = {name: Split() for name in "bmkn"}
    return signature(op, "b m k, b k n -> b m n", splits=splits, linear=(frozenset({0}), frozenset({1})))


@rule(aten.baddbmm.default)
def baddbmm(op: Op) -> Signature:
    added = _broadcast(op.inputs[0].shape, ("b", "m", "n"), op.outputs[0].shape)
    splits = {"b": Split(), "m": Split(), "n": Split(), "k": Split(addends=frozenset({0}))}
    return signature(op, f"{added}, b m k, b k n -> b m n", splits=splits, linear=(frozenset({0, 1}), frozenset({0, 2})))


@rule(aten.matmul.default)
def matmul(op: Op) -> Signature:
    """… m k, … k n -> … m n with broadcast batch dims; either side may be a vector."""
    left, right = (value.shape for value in op.inputs)
    rows, columns = (["m"] if len(left) > 1 else []), (["n"] if len(right) > 1 else [])
    batch_sizes = op.outputs[0].shape[: len(op.outputs[0].shape) - len(rows) - len(columns)]
    batch = tuple(f"b{index}" for index in range(len(batch_sizes)))
    first = [*_broadcast(left[:-2], batch, batch_sizes).split(), *rows, "k"]
    second = [*_broadcast(right[:-2], batch, batch_sizes).split(), "k", *columns]
    text = f"{' '.join(first)}, {' '.join(second)} -> {' '.join([*batch, *rows, *columns])}"
    splits = {name: Split() for name in (*batch, *rows, *columns, "k")}
    return signature(op, text, splits=splits, linear=(frozenset({0}), frozenset({1})))


def _broadcast(shape: tuple[int, ...], names: tuple[str, ...], sizes: tuple[int, ...]) -> str:
    """The factors of a tensor that is broadcast to dims `names` of `sizes`: `1` where it has size 1 and they do not."""
    kept = list(zip(names, sizes, strict=True))[len(names) - len(shape) :]
    return " ".join("1" if size == 1 and whole != 1 else name for size, (name, whole) in zip(shape, kept, strict=True))
