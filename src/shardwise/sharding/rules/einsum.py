"""Sums of products written with letters: every letter is a factor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardwise.capture.graph import Op
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.signature import Dim, Signature, Split

aten = torch.ops.aten

_DIAGONAL = "a diagonal is taken: it stands in two dims of one tensor"


@rule(aten.einsum.default)
def einsum(op: Op) -> Signature:
    """A letter of the result is kept, any other is summed away; `...` are as many factors as there are dims."""
    operands, result = read_equation(op.args[0], [len(value.shape) for value in op.inputs])
    return product_of(op, operands, result)


def product_of(op: Op, operands: Sequence[Sequence[str]], result: Sequence[str]) -> Signature:
    """The signature of a product of the op's inputs, summed over every factor that the result does not hold.

    An input whose dim is 1 where others have more is broadcast. A factor that stands twice in one tensor stays whole.
    """
    sizes: dict[str, int] = {}
    for names, value in zip((*operands, result), (*op.inputs, *op.outputs), strict=True):
        for name, size in zip(names, value.shape, strict=True):
            sizes[name] = max(sizes.get(name, 1), size)
    twice = {name for names in operands for name in names if list(names).count(name) > 1}
    return Signature(
        inputs=tuple(_dims(names, value.shape, sizes) for names, value in zip(operands, op.inputs, strict=True)),
        outputs=(_dims(result, op.outputs[0].shape, sizes),),
        sizes=sizes,
        splits={name: Split() for name in sizes if name not in twice},
        linear=tuple(frozenset({index}) for index in range(len(op.inputs))),
        reasons=dict.fromkeys(twice, _DIAGONAL),
    )


def _dims(names: Sequence[str], shape: Sequence[int], sizes: dict[str, int]) -> tuple[Dim, ...]:
    return tuple((name,) if size == sizes[name] else () for name, size in zip(names, shape, strict=True))


def read_equation(equation: str, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """The factors of each operand (of `ranks[i]` dims) and of the result; those of `...` are e0, e1, …, aligned at the right.

    Without `->` the result has the dims of `...` and then the letters that occur once, in order, as torch has it.
    """
    before, arrow, after = equation.replace(" ", "").partition("->")
    terms = before.split(",")
    most = max((rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True) if "..." in term), default=0)
    operands = [_letters(term, most, rank) for term, rank in zip(terms, ranks, strict=True)]
    if arrow:
        return operands, _letters(after, most, len(after.replace("...", "")) + most)
    letters = [letter for letter in before if letter.isalpha()]
    once = sorted(letter for letter in set(letters) if letters.count(letter) == 1)
    return operands, [*(f"e{index}" for index in range(most)), *once]


def _letters(term: str, most: int, rank: int) -> list[str]:
    left, dots, right = term.partition("...")
    covered = rank - len(left) - len(right) if dots else 0
    return [*left, *(f"e{most - covered + index}" for index in range(covered)), *right]
