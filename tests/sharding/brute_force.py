"""Is a signature right, and is it complete? Both are answered by running the operator.

right      each choice that it offers, on emulated ranks: inputs dealt out by their types, outputs and gradients put together by theirs,
           compared with the operator on whole tensors (`check_rule`)
complete   each way of splitting the inputs that turns out to work is offered, or the signature says why not (`missing_splits`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from typing import Any

import torch
from tests.sharding.emulate import assert_same, combine, coordinates, distribute, group_along, run_ranks
from torch import Tensor

from shardwise.capture import operators
from shardwise.capture.graph import Op, Slot, Value, call
from shardwise.sharding.reshard import dual
from shardwise.sharding.signature import AxisSplit, Call, Choice, Signature, Split, Variant, choice_for, factor_part, variant
from shardwise.sharding.types import P, Placement, R, Shard, Type, local_shape, part

aten = torch.ops.aten

Axes = dict[str, tuple[int, Choice]]


# -- sample calls ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One call of an operator: the captured form, and the tensors that it reads.

    rewrites: the same call with other constants, for operators whose constants are sizes; tried when searching for missing splits.
    """

    op: Op
    tensors: tuple[Tensor, ...]
    rewrites: tuple[Op, ...] = ()

    @property
    def tolerance(self) -> float:
        """How far results may be off: float64 throughout, or a cast to float32 somewhere."""
        return 1e-5 if any(value.dtype == torch.float32 for value in (*self.op.inputs, *self.op.outputs)) else 1e-10

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
    """A sample call.

    frozen: tensors (by number) without gradient; producers: the operators that made tensors, where the rule looks at them;
    rewrites: constants by position, for Sample.rewrites.
    """
    tensors: list[Tensor] = []
    slotted_args, slotted_kwargs = _slotted((args, kwargs), tensors)
    inputs = tuple(
        Value(
            name=f"input{index}",
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            requires_grad=tensor.is_floating_point() and index not in frozen,
            producer=(producers or {}).get(index),
        )
        for index, tensor in enumerate(tensors)
    )
    whole = Op(target=target, args=slotted_args, kwargs=slotted_kwargs, inputs=inputs, outputs=(), module="sample")
    tracked = any(value.requires_grad for value in inputs) and target is not aten.detach.default
    whole.outputs = tuple(_output(whole, index, made, tracked) for index, made in enumerate(call(whole, tensors)))
    others = tuple(_with_constants(whole, constants) for constants in rewrites)
    return Sample(op=whole, tensors=tuple(tensors), rewrites=others)


def _output(op: Op, index: int, made: Tensor, tracked: bool) -> Value:
    requires_grad = tracked and made.is_floating_point()
    return Value(name=f"output{index}", shape=tuple(made.shape), dtype=made.dtype, requires_grad=requires_grad, producer=op)


def _slotted(tree: Any, tensors: list[Tensor]) -> Any:
    if isinstance(tree, Tensor):
        tensors.append(tree)
        return Slot(len(tensors) - 1)
    if isinstance(tree, (tuple, list)):
        return type(tree)(_slotted(item, tensors) for item in tree)
    if isinstance(tree, dict):
        return {name: _slotted(item, tensors) for name, item in tree.items()}
    return tree


def _with_constants(op: Op, constants: Mapping[int, Any]) -> Op:
    args = tuple(constants.get(index, value) for index, value in enumerate(op.args))
    return Op(target=op.target, args=args, kwargs=op.kwargs, inputs=op.inputs, outputs=op.outputs, module=op.module)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The operator on whole tensors: its outputs, a gradient for each output, and the inputs' gradients."""

    outputs: tuple[Tensor, ...]
    seeds: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


def reference(case: Sample) -> Reference:
    leaves = _leaves(case.tensors, case.op)
    outputs = call(case.op, leaves)
    seeds = tuple(torch.randn_like(out) if out.is_floating_point() else torch.zeros(out.shape) for out in outputs)
    return Reference(outputs=tuple(out.detach() for out in outputs), seeds=seeds, gradients=_gradients(outputs, seeds, leaves))


def _leaves(tensors: Sequence[Tensor], op: Op) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_(value.requires_grad) for tensor, value in zip(tensors, op.inputs, strict=True)]


def _gradients(outputs: Sequence[Tensor], seeds: Sequence[Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of every leaf; zero where none flows."""
    live = [(out, seed) for out, seed in zip(outputs, seeds, strict=True) if out.requires_grad]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not live or not wanted:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    found = iter(torch.autograd.grad([out for out, _ in live], wanted, [seed for _, seed in live], allow_unused=True))
    each = ((next(found) if leaf.requires_grad else None) for leaf in leaves)
    return tuple(torch.zeros_like(leaf) if gradient is None else gradient for gradient, leaf in zip(each, leaves, strict=True))


# -- right? ------------------------------------------------------------------------------------------------------------------------------


def check_rule(case: Sample, sig: Signature) -> None:
    """Every choice of the signature on 2 and on 3 ranks, and on two axes at once. Raises AssertionError for a wrong one."""
    check_shape(case, sig)
    whole = reference(case)
    for ranks in (2, 3):
        for choice in choices(sig, ranks):
            check_choice(case, sig, {"tp": (ranks, choice)}, whole)
    for first, second in pairs(sig):
        check_choice(case, sig, {"dp": (2, first), "tp": (2, second)}, whole)
    for name, split in sig.splits.items():
        if split.microbatches and sig.sizes[name] % 2 == 0:
            check_choice(case, sig, {"mb": (2, Choice("split", name))}, whole)


def check_shape(case: Sample, sig: Signature) -> None:
    """The factors of each dim multiply to its size, and each factor of an input can be split or has a reason."""
    tensors, values = (*sig.inputs, *sig.outputs), (*case.op.inputs, *case.op.outputs)
    assert len(tensors) == len(values), f"{case}: {sig} has another number of tensors"
    for tensor, value in zip(tensors, values, strict=True):
        sizes = tuple(prod(sig.sizes[name] for name in dim) for dim in tensor)
        assert sizes == value.shape, f"{case}: {sig} describes {list(sizes)}, not {value!r}"
    used = {name for tensor in sig.inputs for dim in tensor for name in dim if sig.sizes[name] > 1}
    silent = {name for name in used if name not in sig.splits and name not in sig.reasons and "*" not in sig.reasons}
    assert not silent, f"{case}: {sig} neither splits {sorted(silent)} nor says why"
    assert not set(sig.splits) - set(sig.sizes), f"{case}: {sig} splits factors that it does not have"


def choices(sig: Signature, ranks: int) -> Iterator[Choice]:
    """Everything that a planner may choose, blocks and units in a few sizes."""
    yield from (Choice("R"), Choice("I"), *(Choice("P", linear=number) for number in range(len(sig.linear))))
    for name, split in sig.splits.items():
        size = sig.sizes[name]
        for blocks, unit in _readings(size, ranks, split.blocked):
            if split.uneven or size // (blocks * unit) % ranks == 0:
                yield Choice("split", name, blocks, unit)


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
    outer = [name for name, size in sig.sizes.items() if name in sig.splits and size > 1 and (size % 2 == 0 or name not in mixed)]
    for first in outer:
        if sig.sizes[first] % 2 and not sig.splits[first].uneven:
            continue
        for second, split in sig.splits.items():
            size = sig.sizes[second] // 2 if first == second else sig.sizes[second]
            if size >= 2 and (split.uneven or size % 2 == 0) and (first != second or split.blocked):
                yield Choice("split", first), Choice("split", second)
        for number in range(len(sig.linear)):
            yield Choice("split", first), Choice("P", linear=number)


@dataclass(frozen=True, kw_only=True)
class Emulation:
    """One call on emulated ranks: axis → (ranks, choice), outermost first."""

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


def emulation(case: Sample, sig: Signature, axes: Axes) -> Emulation:
    sizes = dict(sig.sizes)
    variants: dict[str, Variant] = {}
    for axis, (ranks, choice) in axes.items():
        variants[axis] = variant(case.op, sig, choice, sizes, ranks)
        if choice.mode == "split":
            sizes[choice.factor] = factor_part(choice, sizes[choice.factor], ranks, 0).length
    return Emulation(case=case, sig=sig, axes=axes, variants=variants)


def check_choice(case: Sample, sig: Signature, axes: Axes, whole: Reference) -> None:
    """Runs one choice (or one for each axis) on all ranks, forward and backward. Raises AssertionError when a number differs."""
    run = emulation(case, sig, axes)
    if _adds_booleans(run):
        return
    label = f"{case}, {sig}: " + ", ".join(f"{axis}={ranks} takes {choice}" for axis, (ranks, choice) in axes.items())
    inputs = [distribute(tensor, run.type_of(index, "inputs"), run.mesh) for index, tensor in enumerate(case.tensors)]
    seeds = [distribute(seed, _dual(run.type_of(index, "outputs")), run.mesh) for index, seed in enumerate(whole.seeds)]
    try:
        results = _on_all_ranks(run, inputs, seeds)
    except Exception as error:
        raise AssertionError(f"{label}: {type(error).__name__}: {error}") from error
    for index, wanted in enumerate(whole.outputs):
        found = combine([outputs[index] for outputs, _ in results], run.type_of(index, "outputs"), run.mesh, wanted.shape, case.tolerance)
        assert_same(found, wanted, f"{label}: output {index}", case.tolerance)
    for index, wanted in enumerate(whole.gradients):
        if case.op.inputs[index].requires_grad:
            held = [gradients[index] for _, gradients in results]
            found = combine(held, _dual(run.type_of(index, "inputs")), run.mesh, wanted.shape, case.tolerance)
            assert_same(found, wanted, f"{label}: gradient of input {index}", case.tolerance)


def _adds_booleans(run: Emulation) -> bool:
    """Truth values are no summands: no operator makes them so."""
    values = enumerate(run.case.op.inputs)
    return any(value.dtype == torch.bool and P in run.type_of(index, "inputs").values() for index, value in values)


def _dual(type_: Type) -> dict[str, Placement]:
    return {axis: dual(placement) for axis, placement in type_.items()}


def _on_all_ranks(run: Emulation, inputs: list[list[Tensor]], seeds: list[list[Tensor]]) -> list[tuple[list[Tensor], tuple[Tensor, ...]]]:
    """Each rank's outputs and gradients."""
    places = coordinates(run.mesh)
    communicates = any(choice.mode == "split" and not run.sig.splits[choice.factor].microbatches for _, choice in run.axes.values())

    def work(rank: int) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        local = run.local_call(places[rank])
        leaves = _leaves(_of_microbatch([held[rank] for held in inputs], run.case.op, places[rank]), run.case.op)
        made = run.sig.local(local, leaves)
        outputs = list(made) if isinstance(made, (tuple, list)) else [made]
        shapes = tuple(tuple(out.shape) for out in outputs)
        assert shapes == local.shapes, f"rank {rank} makes {shapes}, not {local.shapes}"
        return [out.detach() for out in outputs], _gradients(outputs, [held[rank] for held in seeds], leaves)

    return run_ranks(len(places), work) if communicates else [work(rank) for rank in range(len(places))]


def _of_microbatch(tensors: list[Tensor], op: Op, place: Mapping[str, int]) -> list[Tensor]:
    """The random state says which microbatch this is."""
    if op.target is operators.keyed_dropout and "mb" in place:
        tensors[1] = torch.stack([tensors[1][0], torch.tensor(place["mb"])])
    return tensors


# -- complete? ---------------------------------------------------------------------------------------------------------------------------

Candidate = tuple[Placement, ...]


def missing_splits(case: Sample, sig: Signature) -> dict[str, str]:
    """Ways of giving the ranks parts or summands of the inputs that recombine, which the signature neither offers nor has a reason against.

    Types of the inputs → of the outputs.
    """
    found = {}
    for candidate in candidates(case):
        if not offered(case, sig, candidate) and not excused(case, sig, candidate) and (outputs := works(case, candidate)) is not None:
            found[", ".join(map(str, candidate))] = ", ".join(map(str, outputs))
    return found


def candidates(case: Sample) -> Iterator[Candidate]:
    """For each input a dim that is split (several inputs: dims of equal size), a sum, or the whole; not all whole."""
    alone = len(case.tensors) == 1
    options: list[list[Placement]] = []
    for tensor, value in zip(case.tensors, case.op.inputs, strict=True):
        sums: list[Placement] = [P] if value.requires_grad else []
        options.append([R, *sums, *_shards(tensor, blocked=alone)])
    for candidate in product(*options):
        sizes = {tensor.shape[each.dim] for tensor, each in zip(case.tensors, candidate, strict=True) if isinstance(each, Shard)}
        if len(sizes) < 2 and any(each != R for each in candidate):
            yield candidate


def _shards(tensor: Tensor, *, blocked: bool) -> list[Shard]:
    """Every dim; in every number of blocks, too."""
    counts = {dim: range(1, size if blocked else 2) for dim, size in enumerate(tensor.shape)}
    return [Shard(dim, blocks) for dim, size in enumerate(tensor.shape) for blocks in counts[dim] if size % blocks == 0 and size > blocks]


def offered(case: Sample, sig: Signature, candidate: Candidate) -> bool:
    """Whether some choice of the signature takes the inputs so."""
    if not any(isinstance(each, Shard) for each in candidate):
        return frozenset(index for index, each in enumerate(candidate) if each == P) in sig.linear
    alike = (variant(case.op, sig, choice, sig.sizes, 2) for choice in _choices_like(case, sig, candidate))
    return any(_same_types(case, candidate, each.inputs) for each in alike)


def _choices_like(case: Sample, sig: Signature, candidate: Candidate) -> Iterator[Choice]:
    index, shard = next((index, each) for index, each in enumerate(candidate) if isinstance(each, Shard))
    size = case.tensors[index].shape[shard.dim]
    for unit in range(1, size):
        if size % (shard.blocks * unit) == 0:
            choice = choice_for(sig, sig.inputs[index], Shard(shard.dim, shard.blocks, unit), sig.sizes)
            if choice is not None:
                yield choice


def _same_types(case: Sample, first: Candidate, second: Sequence[Placement]) -> bool:
    return all(_same(tensor.shape, one, other) for tensor, one, other in zip(case.tensors, first, second, strict=True))


def _same(shape: Sequence[int], one: Placement, other: Placement) -> bool:
    if not isinstance(one, Shard) or not isinstance(other, Shard):
        return one == other
    held = [[part(shape[each.dim], each, 2, rank).indices().tolist() for rank in range(2)] for each in (one, other)]
    return one.dim == other.dim and held[0] == held[1]


def excused(case: Sample, sig: Signature, candidate: Candidate) -> bool:
    """Whether the signature has a reason against the factor that the candidate splits (no single one: against any of the dim)."""
    if not any(isinstance(each, Shard) for each in candidate):
        return False
    everything = replace(sig, splits={name: Split() for name in sig.sizes})
    names = {choice.factor for choice in _choices_like(case, everything, candidate)}
    if not names:
        names = {name for tensor, each in zip(sig.inputs, candidate, strict=True) if isinstance(each, Shard) for name in tensor[each.dim]}
    return "*" in sig.reasons or bool(names & set(sig.reasons))


def works(case: Sample, candidate: Candidate) -> tuple[Placement, ...] | None:
    """The outputs' placements if the operator itself, on 2 and on 3 ranks, recombines forward and backward."""
    whole = reference(case)
    for op in (case.op, *case.rewrites):
        found = _works_on(case, op, candidate, whole, 2)
        if found is not None and (_too_small(case, candidate, 3) or _works_on(case, op, candidate, whole, 3) is not None):
            return found
    return None


def _too_small(case: Sample, candidate: Candidate, ranks: int) -> bool:
    split = [(tensor.shape[each.dim], each.blocks) for tensor, each in zip(case.tensors, candidate, strict=True) if isinstance(each, Shard)]
    return any(size // blocks < ranks for size, blocks in split)


def _works_on(case: Sample, op: Op, candidate: Candidate, whole: Reference, ranks: int) -> tuple[Placement, ...] | None:
    mesh = {"tp": ranks}
    inputs = [distribute(tensor, {"tp": each}, mesh) for tensor, each in zip(case.tensors, candidate, strict=True)]
    leaves = [_leaves([held[rank] for held in inputs], op) for rank in range(ranks)]
    try:
        made = [call(op, each) for each in leaves]
    except (RuntimeError, IndexError, ValueError, NotImplementedError):
        return None
    if any(len(each) != len(whole.outputs) for each in made):
        return None
    outputs = [_recombined([each[index].detach() for each in made], out, case.tolerance) for index, out in enumerate(whole.outputs)]
    placements = tuple(each for each in outputs if each is not None)
    if len(placements) < len(outputs):
        return None
    seeds = [_dealt(seed, placements[index], [each[index] for each in made]) for index, seed in enumerate(whole.seeds)]
    gradients = [_gradients(made[rank], [held[rank] for held in seeds], leaves[rank]) for rank in range(ranks)]
    for index, (wanted, each) in enumerate(zip(whole.gradients, candidate, strict=True)):
        held = [found[index] for found in gradients]
        if op.inputs[index].requires_grad and not _agree(held, {"tp": dual(each)}, mesh, wanted, case.tolerance):
            return None
    return placements


def _agree(held: list[Tensor], type_: Type, mesh: Mapping[str, int], wanted: Tensor, tolerance: float) -> bool:
    try:
        assert_same(combine(held, type_, mesh, wanted.shape, tolerance), wanted, "", tolerance)
    except AssertionError:
        return False
    return True


def _recombined(parts: list[Tensor], wanted: Tensor, tolerance: float) -> Placement | None:
    """How these parts make up the whole: joined along a dim (in blocks), or added."""
    if wanted.is_floating_point() and all(each.shape == wanted.shape for each in parts) and _same_values(sum(parts), wanted, tolerance):
        return P
    for dim, size in enumerate(wanted.shape):
        if sum(each.shape[dim] for each in parts) != size or any(_other_sizes(each, dim) != _other_sizes(wanted, dim) for each in parts):
            continue
        for blocks in range(1, size + 1):
            fits = all(each.shape[dim] and each.shape[dim] % blocks == 0 for each in parts)
            if fits and _same_values(_blocked_cat(parts, dim, blocks), wanted, tolerance):
                return Shard(dim, blocks)
    return None


def _same_values(found: Any, wanted: Tensor, tolerance: float) -> bool:
    return _agree([found], {}, {}, wanted, tolerance)


def _other_sizes(tensor: Tensor, dim: int) -> tuple[int, ...]:
    return (*tensor.shape[:dim], *tensor.shape[dim + 1 :])


def _blocked_cat(parts: Sequence[Tensor], dim: int, blocks: int) -> Tensor:
    opened = [each.unflatten(dim, (blocks, -1)) for each in parts]
    return torch.cat(opened, dim + 1).flatten(dim, dim + 1)


def _dealt(seed: Tensor, placement: Placement, parts: Sequence[Tensor]) -> list[Tensor]:
    """Each rank's gradient of an output, in the sizes that its parts have."""
    if not isinstance(placement, Shard) or not seed.shape:
        return [seed] * len(parts)
    opened = seed.unflatten(placement.dim, (placement.blocks, -1))
    pieces = opened.split([each.shape[placement.dim] // placement.blocks for each in parts], placement.dim + 1)
    return [each.flatten(placement.dim, placement.dim + 1) for each in pieces]
