"""Runs an operator on the parts that ranks would hold, and compares with the operator on whole tensors: is a way of splitting it right?

A `Sample` is a call with tensors to try it on. `check_choice` runs one choice of a Signature, forward and backward, on every rank:
inputs are dealt out by their types, outputs and gradients put together by theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor

from shardwise.capture import operators
from shardwise.capture.graph import Op, Slot, Value, call
from shardwise.capture.opaque import Opaque
from shardwise.sharding.dealing import Mismatch, combine, coordinates, distribute, group_along, inexact, require_same
from shardwise.sharding.reshard import dual
from shardwise.sharding.signature import AxisSplit, Call, Choice, Signature, Variant, factor_part, variant
from shardwise.sharding.types import P, Placement, Type, local_shape

__all__ = ["Axes", "Reference", "Sample", "check_choice", "choices", "execute", "leaves_of", "pairs", "reference", "sample", "slotted"]

aten = torch.ops.aten

Axes = dict[str, tuple[int, Choice]]  # axis → (ranks, choice), outermost first
Result = TypeVar("Result")
RunRanks = Callable[[int, Callable[[int], Result]], list[Result]]


# -- calls with tensors ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One call of an operator: the captured form, and the tensors that it reads.

    rewrites: the same call with other constants, for operators whose constants are sizes. slack: times the usual tolerance.
    """

    op: Op
    tensors: tuple[Tensor, ...]
    rewrites: tuple[Op, ...] = ()
    slack: float = 1.0

    @property
    def tolerance(self) -> float:
        """How far results may be off: float64 throughout, or a cast to float32 somewhere."""
        single = (torch.float32, torch.complex64)
        return self.slack * (1e-5 if any(value.dtype in single for value in (*self.op.inputs, *self.op.outputs)) else 1e-10)

    def __str__(self) -> str:
        constants = [repr(value) for value in (*self.op.args, *self.op.kwargs.items()) if not isinstance(value, Slot)]
        return f"{self.op.name}({', '.join([*(str(list(tensor.shape)) for tensor in self.tensors), *constants])})"


def sample(
    target: Callable[..., Any],
    *args: Any,
    frozen: Sequence[int] = (),
    producers: Mapping[int, Op] | None = None,
    rewrites: Sequence[Mapping[int, Any]] = (),
    **kwargs: Any,
) -> Sample:
    """A call as it would be captured.

    frozen: tensors (by number) without gradient; producers: the operators that made tensors, where the rule looks at them;
    rewrites: constants by position, for Sample.rewrites.
    """
    tensors: list[Tensor] = []
    slotted_args, slotted_kwargs = slotted((args, kwargs), tensors)
    inputs = tuple(
        Value(
            name=f"input{index}",
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            requires_grad=inexact(tensor) and index not in frozen,
            producer=(producers or {}).get(index),
        )
        for index, tensor in enumerate(tensors)
    )
    whole = Op(target=target, args=slotted_args, kwargs=slotted_kwargs, inputs=inputs, outputs=(), module="sample")
    tracked = any(value.requires_grad for value in inputs) and target is not aten.detach.default
    whole.outputs = tuple(_output(whole, index, made, tracked) for index, made in enumerate(execute(whole, tensors)))
    others = tuple(_with_constants(whole, constants) for constants in rewrites)
    return Sample(op=whole, tensors=tuple(tensors), rewrites=others)


def _output(op: Op, index: int, made: Tensor, tracked: bool) -> Value:
    return Value(name=f"output{index}", shape=tuple(made.shape), dtype=made.dtype, requires_grad=tracked and inexact(made), producer=op)


def slotted(tree: Any, tensors: list[Tensor]) -> Any:
    """The arguments with every tensor moved to `tensors` and a Slot left in its place."""
    if isinstance(tree, Tensor):
        tensors.append(tree)
        return Slot(len(tensors) - 1)
    if isinstance(tree, (tuple, list)):
        return type(tree)(slotted(item, tensors) for item in tree)
    if isinstance(tree, dict):
        return {name: slotted(item, tensors) for name, item in tree.items()}
    return tree


def _with_constants(op: Op, constants: Mapping[int, Any]) -> Op:
    args = tuple(constants.get(index, value) for index, value in enumerate(op.args))
    return Op(target=op.target, args=args, kwargs=op.kwargs, inputs=op.inputs, outputs=op.outputs, module=op.module)


def execute(op: Op, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The operator on tensors of any shapes that it takes."""
    return tuple(op.target.run(tensors)) if isinstance(op.target, Opaque) else call(op, list(tensors))


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The operator on whole tensors: its outputs, a gradient for each output, and the inputs' gradients."""

    outputs: tuple[Tensor, ...]
    seeds: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


def reference(case: Sample) -> Reference:
    """Runs the sample whole, forward and backward."""
    leaves = leaves_of(case.tensors, case.op)
    outputs = execute(case.op, leaves)
    seeds = tuple(torch.randn_like(out) if inexact(out) else torch.zeros(out.shape) for out in outputs)
    return Reference(outputs=tuple(out.detach() for out in outputs), seeds=seeds, gradients=gradients_of(outputs, seeds, leaves))


def leaves_of(tensors: Sequence[Tensor], op: Op) -> list[Tensor]:
    """Copies of the tensors that require a gradient where the operator's inputs do."""
    return [tensor.detach().clone().requires_grad_(value.requires_grad) for tensor, value in zip(tensors, op.inputs, strict=True)]


def gradients_of(outputs: Sequence[Tensor], seeds: Sequence[Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of every leaf; zero where none flows."""
    live = [(out, seed) for out, seed in zip(outputs, seeds, strict=True) if out.requires_grad]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not live or not wanted:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    found = iter(torch.autograd.grad([out for out, _ in live], wanted, [seed for _, seed in live], allow_unused=True))
    each = ((next(found) if leaf.requires_grad else None) for leaf in leaves)
    return tuple(torch.zeros_like(leaf) if gradient is None else gradient for gradient, leaf in zip(each, leaves, strict=True))


# -- choices of a signature --------------------------------------------------------------------------------------------------------------


def choices(sig: Signature, ranks: int) -> Iterator[Choice]:
    """Everything that a planner may choose, blocks and units in a few sizes."""
    yield from (Choice("R"), Choice("I"), *(Choice("P", linear=number) for number in range(len(sig.linear))))
    for name, split in sig.splits.items():
        size = sig.sizes[name]
        for blocks, unit in _readings(size, ranks, split.blocked):
            if split.allows(size // (blocks * unit), blocks, ranks, None):
                yield Choice("split", name, blocks, unit)
        if split.owned:
            yield from (Choice("split", name, owner=owner) for owner in range(ranks))


def _readings(size: int, ranks: int, blocked: bool) -> list[tuple[int, int]]:
    """(blocks, unit) that leave each rank a piece: neither, the smallest of each, both."""
    fits = [n for n in range(2, size) if size % n == 0 and size // n >= ranks][:1]
    both = [(n, m) for n in fits for m in range(2, size) if size % (n * m) == 0 and size // (n * m) >= ranks][:1]
    found = [(1, 1), *((1, n) for n in fits)] + ([*((n, 1) for n in fits), *both] if blocked else [])
    return [(blocks, unit) for blocks, unit in found if size // (blocks * unit) >= ranks]


def pairs(sig: Signature) -> Iterator[tuple[Choice, Choice]]:
    """A factor on one axis, and on the other any factor (of what is left), or a sum passing through.

    The outer axis splits a factor unevenly only where that leaves all ranks the same strides: where it is not one of several in a dim.
    """
    mixed = {name for tensor in (*sig.inputs, *sig.outputs) for dim in tensor if len(dim) > 1 for name in dim}
    outer = [
        name
        for name, size in sig.sizes.items()
        if name in sig.splits and sig.splits[name].ranges and size > 1 and (size % 2 == 0 or name not in mixed)
    ]
    for first in outer:
        if sig.sizes[first] % 2 and not sig.splits[first].uneven:
            continue
        for second, split in sig.splits.items():
            size = sig.sizes[second] // 2 if first == second else sig.sizes[second]
            if split.allows(size, 1, 2, None) and (first != second or split.blocked):
                yield Choice("split", first), Choice("split", second)
            if split.owned and first != second:
                yield Choice("split", first), Choice("split", second, owner=1)
        for number in range(len(sig.linear)):
            yield Choice("split", first), Choice("P", linear=number)


@dataclass(frozen=True, kw_only=True)
class _Emulation:
    """One call on all ranks."""

    case: Sample
    sig: Signature
    axes: Axes
    variants: Mapping[str, Variant] = field(default_factory=dict)

    @property
    def mesh(self) -> dict[str, int]:
        return {axis: ranks for axis, (ranks, _) in self.axes.items()}

    def type_of(self, index: int, side: str) -> dict[str, Placement]:
        return {axis: getattr(each, side)[index] for axis, each in self.variants.items()}

    def local_call(self, place: Mapping[str, int]) -> Call:
        """As shardwise.program.lower makes it; on the sequential axis `mb` all ranks run the code of the first."""
        sizes = dict(self.sig.sizes)
        splits: dict[str, list[AxisSplit]] = {}
        for axis, (ranks, choice) in self.axes.items():
            if choice.mode == "split":
                rank = None if axis == "mb" else place[axis]
                held = factor_part(choice, sizes[choice.factor], ranks, rank or 0)
                found = AxisSplit(axis=axis, group=group_along(self.mesh, axis, place), ranks=ranks, rank=rank, part=held)
                splits.setdefault(choice.factor, []).append(found)
                sizes[choice.factor] = held.length
        op = self.case.op
        shapes = tuple(local_shape(value.shape, self.type_of(index, "outputs"), self.mesh, place) for index, value in enumerate(op.outputs))
        return Call(op=op, shapes=shapes, sizes=self.sig.sizes, splits={name: tuple(found) for name, found in splits.items()})


def _emulation(case: Sample, sig: Signature, axes: Axes) -> _Emulation:
    sizes = dict(sig.sizes)
    variants: dict[str, Variant] = {}
    for axis, (ranks, choice) in axes.items():
        variants[axis] = variant(case.op, sig, choice, sizes, ranks)
        if choice.mode == "split":
            sizes[choice.factor] = factor_part(choice, sizes[choice.factor], ranks, 0).length
    return _Emulation(case=case, sig=sig, axes=axes, variants=variants)


def _in_turn(count: int, work: Callable[[int], Any]) -> list[Any]:
    return [work(rank) for rank in range(count)]


def check_choice(case: Sample, sig: Signature, axes: Axes, whole: Reference, run_ranks: RunRanks[Any] = _in_turn) -> None:
    """Runs one choice (or one for each axis) on all ranks, forward and backward. Raises Mismatch when a number differs.

    run_ranks: runs a function of the rank on each; it must emulate collectives where the local code of the signature has some.
    """
    run = _emulation(case, sig, axes)
    if _adds_booleans(run):
        return
    label = f"{case}, {sig}: " + ", ".join(f"{axis}={ranks} takes {choice}" for axis, (ranks, choice) in axes.items())
    inputs = [distribute(tensor, run.type_of(index, "inputs"), run.mesh) for index, tensor in enumerate(case.tensors)]
    seeds = [distribute(seed, _dual(run.type_of(index, "outputs")), run.mesh) for index, seed in enumerate(whole.seeds)]
    try:
        results = run_ranks(prod(run.mesh.values()), lambda rank: _on_rank(run, rank, inputs, seeds))
    except Mismatch:
        raise
    except Exception as error:
        raise Mismatch(f"{label}: {type(error).__name__}: {error}") from error
    for index, wanted in enumerate(whole.outputs):
        found = combine([outputs[index] for outputs, _ in results], run.type_of(index, "outputs"), run.mesh, wanted.shape, case.tolerance)
        require_same(found, wanted, f"{label}: output {index}", case.tolerance)
    for index, wanted in enumerate(whole.gradients):
        if case.op.inputs[index].requires_grad:
            held = [gradients[index] for _, gradients in results]
            found = combine(held, _dual(run.type_of(index, "inputs")), run.mesh, wanted.shape, case.tolerance)
            require_same(found, wanted, f"{label}: gradient of input {index}", case.tolerance)


def _adds_booleans(run: _Emulation) -> bool:
    """Truth values are no summands: no operator makes them so."""
    values = enumerate(run.case.op.inputs)
    return any(value.dtype == torch.bool and P in run.type_of(index, "inputs").values() for index, value in values)


def _dual(type_: Type) -> dict[str, Placement]:
    return {axis: dual(placement) for axis, placement in type_.items()}


def _on_rank(run: _Emulation, rank: int, inputs: list[list[Tensor]], seeds: list[list[Tensor]]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """One rank's outputs and gradients."""
    place = coordinates(run.mesh)[rank]
    local = run.local_call(place)
    leaves = leaves_of(_of_microbatch([held[rank] for held in inputs], run.case.op, place), run.case.op)
    made = run.sig.local(local, leaves)
    outputs = list(made) if isinstance(made, (tuple, list)) else [made]
    shapes = tuple(tuple(out.shape) for out in outputs)
    if shapes != local.shapes:
        raise Mismatch(f"{run.case}, {run.sig}: rank {rank} makes {shapes}, not {local.shapes}")
    return [out.detach() for out in outputs], gradients_of(outputs, [held[rank] for held in seeds], leaves)


def _of_microbatch(tensors: list[Tensor], op: Op, place: Mapping[str, int]) -> list[Tensor]:
    """The random state says which microbatch this is."""
    if (state := operators.KEYED.get(op.target)) is not None and "mb" in place:
        tensors[state] = torch.stack([tensors[state][0], torch.tensor(place["mb"])])
    return tensors
