"""Sample calls of an operator on small tensors, to find out by running it how it may be split.

Dims of equal size keep equal sizes, others get other ones, so that no two dims are taken for each other. Some sizes are divided by the
ranks and some are not, some numbers are about one and some are spread over decades: a limit of ±10 is met, too. An operator that takes no
other sizes than its own is run on those, where they are not too large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardwise.capture.graph import Op, Value
from shardwise.capture.opaque import Opaque
from shardwise.sharding.dealing import Mismatch, inexact, require_same
from shardwise.sharding.trial import Reference, Sample, execute, leaves_of, reference

__all__ = ["Random", "Sizes", "Trial", "elements", "sizings", "trial", "trials"]

Shapes = tuple[tuple[int, ...], ...]
Sizes = Callable[[Sequence[int]], Shapes]  # distinct small numbers → the shapes of the inputs

REAL_ELEMENTS = 1 << 22  # of all tensors together: an operator that takes no other sizes is run on its own up to here
_MANY_RANKS = (2, 3, 4, 8, 16)  # on which an operator that takes no other sizes is tried: constants of its may ask for large parts
_EVENS = tuple(range(4, 64, 2))
_THREES = tuple(range(3, 93, 3))
_NEITHER = tuple(number for number in range(5, 80) if number % 2 and number % 3)
_FEW = 4  # sizes: with more of them they are kept smaller still


class Random(Exception):
    """The operator gives other numbers each time, or changes what it reads: it cannot be compared."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A sample call with its results, to be tried on so many ranks."""

    case: Sample
    whole: Reference
    ranks: tuple[int, ...]


def elements(op: Op) -> int:
    """Of all its tensors."""
    return sum(value.numel for value in (*op.inputs, *op.outputs))


def sizings(op: Op) -> Iterator[Sizes | None]:
    """Ways of making the call small: each size becomes another; multiples stay multiples; None: its own sizes."""
    sizes = sorted({size for value in op.inputs for size in value.shape if size > 1})  # the larger remains the larger
    if not any(0 in value.shape for value in op.inputs) and len(sizes) <= len(_NEITHER):
        yield lambda numbers: _renamed(op, dict(zip(sizes, numbers, strict=False)))
        multiples = _multiples(sizes)
        if any(factor != 1 for _, factor in multiples.values()):
            yield lambda numbers: _renamed(op, _with_multiples(multiples, numbers))
    if elements(op) <= REAL_ELEMENTS:
        yield None


def _renamed(op: Op, renamed: Mapping[int, int]) -> Shapes:
    return tuple(tuple(renamed.get(size, size) for size in value.shape) for value in op.inputs)


def _multiples(sizes: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Size → (base, factor): 96 is three times 32."""
    found: dict[int, tuple[int, int]] = {}
    for size in sizes:
        near = [other for other in found if size % other == 0 and size // other <= 8]
        base, factor = found[near[-1]] if near else (size, 1)
        found[size] = (base, factor * (size // near[-1])) if near else (size, 1)
    return found


def _with_multiples(multiples: Mapping[int, tuple[int, int]], numbers: Sequence[int]) -> dict[int, int]:
    bases = dict(zip([size for size, (base, _) in multiples.items() if size == base], numbers, strict=False))
    return {size: bases[base] * factor for size, (base, factor) in multiples.items()}


def trials(op: Op, sizes: Sizes | None, seed: int = 0) -> list[Trial]:
    """Calls in several sizes; none when the operator refuses such sizes. Raises Random."""
    if sizes is None:
        real = tuple(value.shape for value in op.inputs)
        needed = [trial(op, real, _MANY_RANKS, seed=seed), trial(op, real, (2,), seed=seed + 1, wide=True)]
        more = []
    else:
        few = len({size for value in op.inputs for size in value.shape}) <= _FEW
        threes = sizes(_THREES[1:] if few else _THREES)
        needed = [trial(op, sizes(_EVENS), (2,), seed=seed), trial(op, threes, (3,), seed=seed + 1, wide=True)]
        odd = sizes(_NEITHER)
        more = [trial(op, odd, (2, 3), seed=seed + 2), trial(op, odd, (2,), seed=seed + 3, wide=True)] if None not in needed else []
    found = [each for each in (*needed, *more) if each is not None]
    return found if None not in needed and _telling(found) else []


def trial(op: Op, shapes: Shapes, ranks: tuple[int, ...], *, seed: int, wide: bool = False) -> Trial | None:
    """The call on random inputs of these shapes, in float64 where the operator takes it. None when it refuses. Raises Random.

    wide: numbers spread over decades, as far as the results remain finite.
    """
    for double in (True, False):
        for values in (*(_WIDE if wide else ()), *_PLAIN):
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                case = _case(op, shapes, values, double)
                if case is None:
                    continue
                whole = reference(case)
                if _usable(whole, strict=values in _WIDE):
                    return Trial(case=case, whole=whole, ranks=ranks)
    return None


def _normal(shape: Sequence[int]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _spread(decades: float) -> Callable[[Sequence[int]], Tensor]:
    return lambda shape: _normal(shape) * 10 ** (torch.rand(shape, dtype=torch.float64) * (decades + 1) - 1)


def _unit(shape: Sequence[int]) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) * 0.8 + 0.1


def _large(shape: Sequence[int]) -> Tensor:
    return _normal(shape).abs() + 1.5


_PLAIN: tuple[Callable[[Sequence[int]], Tensor], ...] = (_normal, lambda shape: _normal(shape).abs() + 0.5, _unit, _large)
_WIDE = (_spread(3.0), _spread(1.5), _spread(0.7))


def _case(op: Op, shapes: Shapes, values: Callable[[Sequence[int]], Tensor], double: bool) -> Sample | None:
    """The call on such tensors; None when the operator does not take them, or makes other tensors of them than of its own."""
    numbers = [size for shape in shapes for size in shape if size > 1]
    high = min(numbers, default=2)
    tensors = tuple(_tensor(value, shape, values, high, double) for value, shape in zip(op.inputs, shapes, strict=True))
    small = _resized(op, tensors, double)
    leaves = leaves_of(tensors, small)
    try:
        made = execute(small, leaves)
        again = execute(small, leaves_of(tensors, small))
    except Exception:  # whatever an operator raises when it does not like its inputs
        return None
    _require_pure(tensors, leaves, made, again)
    if len(made) != len(op.outputs) or any(len(out.shape) != len(value.shape) for out, value in zip(made, op.outputs, strict=True)):
        return None
    small.outputs = tuple(
        replace(value, shape=tuple(out.shape), dtype=out.dtype, producer=small) for out, value in zip(made, op.outputs, strict=True)
    )
    return Sample(op=small, tensors=tensors, slack=1.0 if values not in _WIDE else 1e3 if double else 10.0)


def _tensor(value: Value, shape: Sequence[int], values: Callable[[Sequence[int]], Tensor], high: int, double: bool) -> Tensor:
    if value.dtype.is_complex:
        return torch.complex(values(shape), values(shape)).to(torch.complex128 if double else value.dtype)
    if value.dtype.is_floating_point:
        return values(shape).to(torch.float64 if double else torch.float32)
    if value.dtype == torch.bool:
        return torch.rand(shape) > 0.4
    return torch.randint(0, high, shape).to(value.dtype)


def _resized(op: Op, tensors: Sequence[Tensor], double: bool) -> Op:
    inputs = tuple(
        replace(value, shape=tuple(tensor.shape), dtype=tensor.dtype, producer=None)
        for value, tensor in zip(op.inputs, tensors, strict=True)
    )
    target = op.target.cast(torch.float64) if isinstance(op.target, Opaque) and double else op.target
    return Op(target=target, args=op.args, kwargs=op.kwargs, inputs=inputs, outputs=(), module=op.module)


def _require_pure(tensors: Sequence[Tensor], leaves: Sequence[Tensor], made: Sequence[Tensor], again: Sequence[Tensor]) -> None:
    for before, after in zip(tensors, leaves, strict=True):
        if not torch.equal(before, after.detach()):
            raise Random("it changes what it reads")
    try:
        for one, other in zip(made, again, strict=True):
            require_same(other.detach(), one.detach(), "")
    except (Mismatch, ValueError) as error:
        raise Random("it makes other numbers each time it runs") from error


def _usable(whole: Reference, *, strict: bool) -> bool:
    """Whether such results can be compared: they are numbers. strict: all of them finite."""
    every = [tensor for tensor in (*whole.outputs, *whole.gradients) if inexact(tensor) and tensor.numel()]
    if any(tensor.isnan().any() or not tensor.isfinite().any() for tensor in every):
        return False
    return not strict or all(bool(tensor.isfinite().all()) for tensor in every)


def _telling(found: Sequence[Trial]) -> bool:
    """Whether every result was something else than zero, or truth values and whole numbers something else than all the same, once."""
    return all(any(_varied(each.whole.outputs[index]) for each in found) for index in range(len(found[0].whole.outputs)))


def _varied(out: Tensor) -> bool:
    if inexact(out):
        return bool(out.any()) or not out.numel()
    return out.numel() < 2 or bool((out != out.flatten()[0]).any())
