"""How an operator call may be split: factors, and the variants that follow from them.

A *factor* is an index over which the call is a nested loop. `linear` is `b… k, n k, n -> b… n`: every dim of every tensor is a product
of factors, outermost first. Splitting one factor on a mesh axis gives each rank a range of the loop; what it needs and makes follows:

    an input that holds the factor          S at that dim
    an input that does not                  R (in a product), or P (a term added to a sum over the factor)
    an output that holds it                 S at that dim
    an output that does not                 P: the factor is summed away

Without a split every input is I and so is every output, or every one R; and a sum P passes through what is linear in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import torch
from torch.utils._pytree import tree_map_only

from shardwise.capture.graph import Op, fill
from shardwise.capture.opaque import Opaque
from shardwise.sharding.types import I, P, Part, Placement, R, Routed, Shard, canonical, part

__all__ = ["AxisSplit", "Call", "Choice", "Dim", "Local", "Signature", "Split", "Variant", "dims", "signature"]

_CPU = torch.device("cpu")

Dim = tuple[str, ...]
Dims = tuple[Dim, ...]
Source = Literal["rule", "declared", "discovered", "whole"]


@dataclass(frozen=True, kw_only=True)
class Split:
    """How one factor may be split.

    addends: inputs without the factor that are terms of the sum over it; they are P.
    others: the type of outputs that do not hold the factor: "P" when it is summed away, "I" when the local code makes them whole on all
    ranks. uneven: ranks may get unequal ranges; blocked: the range may be taken inside each of several blocks.
    ranges: ranks may get a range each; owned: one rank may get the whole factor, and the others nothing.
    microbatches: may be split over microbatches, one after the other (no: local code that communicates).
    mirrored: ranks may get a run from each end; where not said, where they may take blocks.
    """

    addends: frozenset[int] = frozenset()
    others: Literal["P", "I"] = "P"
    uneven: bool = True
    blocked: bool = True
    ranges: bool = True
    owned: bool = False
    microbatches: bool = True
    mirrored: bool | None = None

    def allows(self, pieces: int, blocks: int, ranks: int, owner: int | None) -> bool:
        """Whether `ranks` ranks may divide so many pieces of each of `blocks` blocks, or `owner` have them all."""
        if owner is not None:
            return self.owned and blocks == 1 and owner < ranks
        return self.ranges and pieces >= ranks and (self.uneven or pieces % ranks == 0) and (blocks == 1 or self.blocked)


@dataclass(frozen=True, kw_only=True)
class AxisSplit:
    """A factor split over one mesh axis, for the local code: the range this rank has of what earlier axes left of the factor.

    group: name of the process group along the axis; ranks, rank: its size and this rank's place in it.
    On the sequential axis of microbatches `rank` is None: which one it is, is known only when it runs.
    """

    axis: str
    group: str
    ranks: int
    rank: int | None
    part: Part


@dataclass(frozen=True, kw_only=True)
class Call:
    """An operator call on one rank, for the local code of a rule.

    args, kwargs: the whole call's, with Slots; shapes: local shapes of the outputs; sizes: whole sizes of the factors.
    splits: factor → its splits, outermost axis first. device: where the rank computes.
    """

    op: Op
    shapes: tuple[tuple[int, ...], ...]
    sizes: Mapping[str, int]
    splits: Mapping[str, tuple[AxisSplit, ...]]
    device: torch.device = _CPU

    def run(self, tensors: Sequence[Any], replace: Mapping[int, Any] | None = None, **kwargs: Any) -> Any:
        """The operator itself on local tensors, with constants at the positions in `replace` (and keyword constants) exchanged."""
        args = [(replace or {}).get(index, value) for index, value in enumerate(self.op.args)]
        missing = [value for index, value in sorted((replace or {}).items()) if index >= len(args)]
        filled_args, filled_kwargs = fill((tuple(args + missing), {**self.op.kwargs, **kwargs}), list(tensors))
        if isinstance(self.op.target, Opaque):
            filled_kwargs["shapes"] = self.shapes
        if self.device.type != "cpu":
            filled_args, filled_kwargs = tree_map_only(torch.device, lambda _: self.device, (filled_args, filled_kwargs))
        return self.op.target(*filled_args, **filled_kwargs)


Local = Callable[[Call, Sequence[torch.Tensor]], Any]


def run_as_is(call: Call, tensors: Sequence[torch.Tensor]) -> Any:
    """Local code of most operators: the same operator on what the rank holds."""
    return call.run(tensors)


@dataclass(frozen=True, kw_only=True)
class Signature:
    """How a call may be split.

    inputs, outputs: for each tensor and each dim its factors, outermost first; () for a dim of size 1 that is broadcast or added.
    sizes: of every factor. splits: the factors that may be split, and how; a factor that is absent may not.
    linear: sets of inputs in which the call is jointly linear: these P and the others R make every output P.
    local: what a rank runs; reasons: why factors are missing from `splits` (factor → reason, "*" for all of them).
    source: who says so: a rule of shardwise's, one that the user declared, one found by running the operator, or nobody: it is kept whole.
    """

    inputs: tuple[Dims, ...]
    outputs: tuple[Dims, ...]
    sizes: Mapping[str, int]
    splits: Mapping[str, Split] = field(default_factory=dict)
    linear: tuple[frozenset[int], ...] = ()
    local: Local = run_as_is
    reasons: Mapping[str, str] = field(default_factory=dict)
    source: Source = "rule"

    def __str__(self) -> str:
        left = ", ".join(_text(each) for each in self.inputs)
        right = ", ".join(_text(each) for each in self.outputs)
        return f"{left} -> {right}"


def _text(tensor: Dims) -> str:
    return " ".join("1" if not dim else dim[0] if len(dim) == 1 else f"({' '.join(dim)})" for dim in tensor) or "·"


@dataclass(frozen=True)
class Choice:
    """What an axis does to a call: splits `factor`, read as (blocks, pieces, unit), evenly or in proportion to `shares`, or gives it to the
    rank `owner`, or each rank a run from each end (`mirrored`); or, without a factor, keeps it whole.

    mode: "split", "I", "R", "P" with the number of the set of `linear` inputs that are summands, or "route": `factor`, which is dim 0 of
    all that hold it, is split as `routed` says, and the factor `experts`, where the call has one, into equal parts.
    """

    mode: Literal["split", "I", "R", "P", "route"]
    factor: str = ""
    blocks: int = 1
    unit: int = 1
    linear: int = 0
    owner: int | None = None
    shares: tuple[int, ...] = ()
    routed: Routed | None = None
    experts: str = ""
    mirrored: bool = False

    @property
    def parts(self) -> Choice | None:
        """What it does to a factor that it gives each rank a range of."""
        if self.mode == "route":
            return Choice("split", self.experts) if self.experts else None
        return self if self.mode == "split" else None

    def __str__(self) -> str:
        if self.mode == "route":
            return f"{self.factor} at the experts"
        if self.mode != "split":
            return {"I": "whole", "R": "whole (gradients pending)", "P": "on summands"}[self.mode]
        if self.owner is not None:
            return f"{self.factor} on rank {self.owner}"
        return self.factor + (f" in {self.blocks} blocks" if self.blocks > 1 else "") + (f" by {self.unit}" if self.unit > 1 else "")


@dataclass(frozen=True)
class Variant:
    """A choice and the placements that follow from it on the axis."""

    choice: Choice
    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]


def dims(text: str) -> tuple[Dims, ...]:
    """Reads `b s k, n k` as factors: dims by blanks, tensors by commas, `(h d)` for a product, `1` for a dim without factor."""
    tensors: list[Dims] = []
    for tensor in text.split(","):
        found: list[Dim] = []
        for token in tensor.replace("(", " ( ").replace(")", " ) ").split():
            if token == "(":
                found.append(("(",))
            elif token == ")":
                start = max(index for index, dim in enumerate(found) if dim == ("(",))
                found[start:] = [tuple(name for dim in found[start + 1 :] for name in dim)]
            else:
                found.append(() if token in ("1", "·") else (token,))
        tensors.append(tuple(dim for dim in found))
    return tuple(tensors)


def signature(op: Op, text: str, **more: Any) -> Signature:
    """A Signature from `inputs -> outputs` in the notation of `dims`; sizes are read off the op's tensors.

    A factor that stands alone in a dim gets that dim's size; `sizes=` adds those that never do. Every other keyword is Signature's.
    """
    before, after = text.split("->")
    left, right = dims(before) if before.strip() else (), dims(after)
    sizes = dict(more.pop("sizes", {}))
    for tensor, value in zip((*left, *right), (*op.inputs, *op.outputs), strict=True):
        assert len(tensor) == len(value.shape), f"{op.name}: {_text(tensor)} does not describe {value!r}"
        for dim, size in zip(tensor, value.shape, strict=True):
            if len(dim) == 1:
                sizes.setdefault(dim[0], size)
    return Signature(inputs=left, outputs=right, sizes=sizes, **more)


def variant(op: Op, sig: Signature, choice: Choice, sizes: Mapping[str, int], ranks: int) -> Variant:
    """The placements of the call's tensors under a choice. `sizes`: of the factors, as earlier axes left them."""
    if choice.mode in ("I", "R"):
        keep: Placement = I if choice.mode == "I" else R
        outputs = tuple(keep if value.requires_grad else R for value in op.outputs)
        return Variant(choice, tuple(keep if value.requires_grad else R for value in op.inputs), outputs)
    if choice.mode == "P":
        summands = sig.linear[choice.linear]
        return Variant(choice, tuple(P if index in summands else R for index in range(len(op.inputs))), (P,) * len(op.outputs))
    if choice.mode == "route":
        return Variant(choice, *(tuple(_routed(tensor, choice, sizes, ranks) for tensor in each) for each in (sig.inputs, sig.outputs)))
    split = sig.splits[choice.factor]
    inputs = tuple(
        _placement(tensor, choice, sizes, ranks) or (P if index in split.addends else R) for index, tensor in enumerate(sig.inputs)
    )
    other: Placement = P if split.others == "P" else I
    outputs = tuple(
        _placement(tensor, choice, sizes, ranks) or (other if value.requires_grad or split.others == "P" else R)
        for tensor, value in zip(sig.outputs, op.outputs, strict=True)
    )
    return Variant(choice, inputs, outputs)


def _routed(tensor: Dims, choice: Choice, sizes: Mapping[str, int], ranks: int) -> Placement:
    if (choice.factor,) in tensor[:1]:
        assert choice.routed is not None
        return choice.routed
    return (_placement(tensor, choice.parts, sizes, ranks) if choice.parts else None) or R


def _placement(tensor: Dims, choice: Choice, sizes: Mapping[str, int], ranks: int) -> Shard | None:
    for index, dim in enumerate(tensor):
        if choice.factor in dim:
            place = dim.index(choice.factor)
            outer, inner = prod(sizes[name] for name in dim[:place]), prod(sizes[name] for name in dim[place + 1 :])
            whole = outer * sizes[choice.factor] * inner
            if choice.owner is not None:
                return Shard(index, owner=choice.owner)
            made = Shard(index, outer * choice.blocks, choice.unit * inner, shares=choice.shares, mirrored=choice.mirrored)
            return canonical(made, whole, ranks)
    return None


def choice_for(sig: Signature, tensor: Dims, shard: Shard, sizes: Mapping[str, int]) -> Choice | None:
    """The choice that splits this tensor (of the call) as `shard` says, if one factor does."""
    dim = tensor[shard.dim]
    if shard.owner is not None:
        owned = len(dim) == 1 and dim[0] in sig.splits and sig.splits[dim[0]].owned
        return Choice("split", dim[0], owner=shard.owner) if owned else None
    total = prod(sizes[name] for name in dim)
    pieces = total // (shard.blocks * shard.unit)
    outer = 1
    for name in dim:
        inner = total // (outer * sizes[name])
        fits = shard.blocks % outer == 0 and shard.unit % inner == 0 and name in sig.splits
        if fits and (shard.blocks // outer) * pieces * (shard.unit // inner) == sizes[name] and pieces > 1:
            blocks, unit = shard.blocks // outer, shard.unit // inner
            return Choice("split", name, blocks, unit) if sig.splits[name].ranges and (blocks == 1 or sig.splits[name].blocked) else None
        outer *= sizes[name]
    return None


def factor_part(choice: Choice, size: int, ranks: int, rank: int) -> Part:
    """The range of a factor of `size` that `rank` has under the choice."""
    return part(size, Shard(0, choice.blocks, choice.unit, choice.owner, choice.shares, choice.mirrored), ranks, rank)
