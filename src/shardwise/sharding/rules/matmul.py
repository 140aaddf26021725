"""Products of matrices: split a batch dim, the rows, the columns, or what is summed over."""

from __future__ import annotations

from typing import Any

import torch

from shardwise.capture.graph import Op
from shardwise.sharding.rules.einsum import product_of
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.signature import Dim, Signature, Split, signature

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


@rule(aten.matmul.default, aten.linalg_matmul.default)
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


@rule(aten.dot.default, aten.vdot.default, aten.mv.default, aten.outer.default, aten.ger.default, aten.inner.default)
def vectors(op: Op) -> Signature:
    """k, k -> · and m k, k -> m and m, n -> m n; `inner` sums over the last dims of both: a… k, b… k -> a… b…"""
    left, right = (len(value.shape) for value in op.inputs)
    if op.target in (aten.outer.default, aten.ger.default):
        return product_of(op, ("m", "n"), "mn")
    rows = [f"a{index}" for index in range(left - 1)]
    columns = [f"b{index}" for index in range(right - 1)]
    if min(left, right) == 0:  # a number times a tensor
        names = [f"d{index}" for index in range(max(left, right))]
        return product_of(op, [names if left else [], names if right else []], names)
    return product_of(op, [[*rows, "k"], [*columns, "k"]], [*rows, *columns])


@rule(aten.linalg_vecdot.default)
def vecdot(op: Op) -> Signature:
    """… k …, … k … -> … … with broadcasting."""
    ranks = [len(value.shape) for value in op.inputs]
    whole = [f"d{index}" for index in range(max(ranks))]
    summed = whole[op.kwargs.get("dim", -1) % len(whole)]
    return product_of(op, [whole[len(whole) - rank :] for rank in ranks], [name for name in whole if name != summed])


@rule(aten.tensordot.default)
def tensordot(op: Op) -> Signature:
    """The dims listed for both tensors are summed, the others kept in order."""
    firsts, seconds = op.args[2], op.args[3]
    left, right = ([f"{letter}{dim}" for dim in range(len(value.shape))] for letter, value in zip("ab", op.inputs, strict=True))
    kept = [name for dim, name in enumerate(left) if dim - len(left) not in firsts and dim not in firsts]
    kept += [name for dim, name in enumerate(right) if dim - len(right) not in seconds and dim not in seconds]
    for first, second in zip(firsts, seconds, strict=True):
        right[second] = left[first]
    return product_of(op, [left, right], kept)


@rule(aten.chain_matmul.default, aten.linalg_multi_dot.default)
def chain(op: Op) -> Signature:
    """m0 m1, m1 m2, …; the first and the last may be vectors."""
    ranks = [len(value.shape) for value in op.inputs]
    names = [[f"m{index}", f"m{index + 1}"] for index in range(len(ranks))]
    names[0], names[-1] = names[0][-ranks[0] :], names[-1][: ranks[-1]]
    return product_of(op, names, [*names[0][: ranks[0] - 1], *names[-1][1:]])


_PRODUCTS: dict[Any, tuple[str, tuple[str, ...]]] = {
    aten.addmv.default: ("m k, k", ("m",)),
    aten.addr.default: ("m, n", ("m", "n")),
    aten.addbmm.default: ("b m k, b k n", ("m", "n")),
}


@rule(*_PRODUCTS)
def with_term(op: Op) -> Signature:
    """A (broadcast) term plus `m k, k -> m`, `m, n -> m n` or `b m k, b k n -> m n`."""
    product, result = _PRODUCTS[op.target]
    term = _broadcast(op.inputs[0].shape, result, op.outputs[0].shape)
    names = set(product.replace(",", "").split())
    splits = {name: Split(addends=frozenset() if name in result else frozenset({0})) for name in names}
    text = f"{term}, {product} -> {' '.join(result)}"
    return signature(op, text, splits=splits, linear=(frozenset({0, 1}), frozenset({0, 2})))


@rule(aten.bilinear.default)
def bilinear(op: Op) -> Signature:
    """b… i, b… j, o i j, o -> b… o"""
    batch = " ".join(f"b{index}" for index in range(len(op.inputs[0].shape) - 1))
    bias = len(op.inputs) == 4
    addends = frozenset({3} if bias else ())
    splits = {name: Split() for name in [*batch.split(), "o"]} | {name: Split(addends=addends) for name in "ij"}
    text = f"{batch} i, {batch} j, o i j{', o' if bias else ''} -> {batch} o"
    return signature(op, text, splits=splits, linear=tuple(addends | {index} for index in range(3)))


@rule(aten._trilinear.default)
def trilinear(op: Op) -> Signature:
    """A sum of products of three tensors, each with dims of size 1 put in where it lacks one."""
    rank = len(op.inputs[0].shape) + len(op.args[3])
    names = [f"d{dim}" for dim in range(rank)]
    operands = [[name for dim, name in enumerate(names) if dim not in expanded] for expanded in op.args[3:6]]
    return product_of(op, operands, [name for dim, name in enumerate(names) if dim not in op.args[6]])


_MATRIX = [
    aten.linalg_inv.default,
    aten.linalg_inv_ex.default,
    aten.inverse.default,
    aten.linalg_det.default,
    aten.det.default,
    aten.logdet.default,
    aten.linalg_slogdet.default,
    aten.slogdet.default,
    aten.linalg_cholesky.default,
    aten.linalg_cholesky_ex.default,
    aten.cholesky.default,
    aten.cholesky_inverse.default,
    aten.linalg_qr.default,
    aten.linalg_svd.default,
    aten.svd.default,
    aten.linalg_svdvals.default,
    aten.linalg_eigh.default,
    aten.linalg_eigvalsh.default,
    aten.linalg_matrix_exp.default,
    aten.matrix_exp.default,
    aten.matrix_power.default,
    aten.linalg_matrix_power.default,
    aten.linalg_pinv.atol_rtol_tensor,
    aten.linalg_pinv.atol_rtol_float,
    aten.linalg_pinv.default,
    aten.pinverse.default,
    aten.linalg_lu_factor.default,
    aten.linalg_lu.default,
    aten.linalg_cond.default,
    aten.linalg_matrix_rank.atol_rtol_tensor,
]
_SOLVES: dict[Any, int] = {  # operator → the right-hand side, in which it is linear
    aten.linalg_solve.default: 1,
    aten.linalg_solve_triangular.default: 1,
    aten.triangular_solve.default: 0,
    aten.cholesky_solve.default: 0,
    aten.linalg_lu_solve.default: 2,
}


@rule(*_MATRIX)
def matrices(op: Op) -> Signature:
    """One matrix for each index of the batch dims; it stays whole."""
    batch: list[Dim] = [(f"b{dim}",) for dim in range(len(op.inputs[0].shape) - 2)]
    return _whole_matrices(op, batch)


@rule(*_SOLVES)
def solve(op: Op) -> Signature:
    """A x = B for each index of the batch dims."""
    batch: list[Dim] = [(f"b{dim}",) for dim in range(len(op.inputs[0].shape) - 2)]
    if any(value.shape[: len(batch)] != op.inputs[0].shape[: len(batch)] or len(value.shape) < 2 for value in op.inputs):
        batch = []  # one is broadcast, or holds vectors
    alone = op.target is not aten.triangular_solve.default  # which returns the matrix, too
    return _whole_matrices(op, batch, (frozenset({_SOLVES[op.target]}),) if alone else ())


def _whole_matrices(op: Op, batch: list[Dim], linear: tuple[frozenset[int], ...] = ()) -> Signature:
    """Every tensor has the batch dims first; its other dims stay whole."""
    sizes = {name[0]: size for name, size in zip(batch, op.inputs[0].shape, strict=False)}
    tensors: list[tuple[Dim, ...]] = []
    for number, value in enumerate((*op.inputs, *op.outputs)):
        rest: list[Dim] = [(f"t{number}d{dim}",) for dim in range(len(batch), len(value.shape))]
        sizes |= {name[0]: size for name, size in zip(rest, value.shape[len(batch) :], strict=True)}
        tensors.append((*batch, *rest))
    return Signature(
        inputs=tuple(tensors[: len(op.inputs)]),
        outputs=tuple(tensors[len(op.inputs) :]),
        sizes=sizes,
        splits={name[0]: Split() for name in batch},
        linear=linear,
        reasons={name: "a matrix is treated as a whole" for name in sizes if name.startswith("t")},
    )


def _broadcast(shape: tuple[int, ...], names: tuple[str, ...], sizes: tuple[int, ...]) -> str:
    """The factors of a tensor that is broadcast to dims `names` of `sizes`: `1` where it has size 1 and they do not."""
    kept = list(zip(names, sizes, strict=True))[len(names) - len(shape) :]
    return " ".join("1" if size == 1 and whole != 1 else name for size, (name, whole) in zip(shape, kept, strict=True))
