"""Is a signature right, and is it complete? Both are answered by running the operator.

right      each choice that it offers, on emulated ranks: inputs dealt out by their types, outputs and gradients put together by theirs,
           compared with the operator on whole tensors (`check_rule`)
complete   each way of splitting the inputs that turns out to work is offered, or the signature says why not (`missing_splits`)

What runs the operator on parts is the product's own (`shardwise.sharding.trial`, `ways`), which finds rules with it; here ranks are threads
that can communicate, as the local code of some rules does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

from tests.sharding.emulate import run_ranks

from shardwise.sharding.dealing import Mismatch
from shardwise.sharding.signature import Choice, Signature, Split, choice_for, variant
from shardwise.sharding.trial import Axes, Reference, Sample, check_choice, choices, pairs, reference, sample
from shardwise.sharding.types import P, Placement, Shard, part
from shardwise.sharding.ways import Candidate, candidates, too_small, works_on

__all__ = ["Mismatch", "Sample", "check_rule", "missing_splits", "sample"]

# -- right? ------------------------------------------------------------------------------------------------------------------------------


def check_rule(case: Sample, sig: Signature) -> None:
    """Every choice of the signature on 2 and on 3 ranks, and on two axes at once. Raises Mismatch or AssertionError for a wrong one."""
    check_shape(case, sig)
    whole = reference(case)
    for ranks in (2, 3):
        for choice in choices(sig, ranks):
            _check(case, sig, {"tp": (ranks, choice)}, whole)
    for first, second in pairs(sig):
        _check(case, sig, {"dp": (2, first), "tp": (2, second)}, whole)
    for name, split in sig.splits.items():
        if split.microbatches and sig.sizes[name] % 2 == 0:
            _check(case, sig, {"mb": (2, Choice("split", name))}, whole)


def _check(case: Sample, sig: Signature, axes: Axes, whole: Reference) -> None:
    communicates = any(choice.mode == "split" and not sig.splits[choice.factor].microbatches for _, choice in axes.values())
    if communicates:
        check_choice(case, sig, axes, whole, run_ranks)
    else:
        check_choice(case, sig, axes, whole)


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


# -- complete? ---------------------------------------------------------------------------------------------------------------------------


def missing_splits(case: Sample, sig: Signature) -> dict[str, str]:
    """Ways of giving the ranks parts or summands of the inputs that recombine, which the signature neither offers nor has a reason against.

    Types of the inputs → of the outputs.
    """
    found = {}
    for candidate in candidates(case, blocked=len(case.tensors) == 1):
        if not offered(case, sig, candidate) and not excused(case, sig, candidate) and (outputs := works(case, candidate)) is not None:
            found[", ".join(map(str, candidate))] = ", ".join(map(str, outputs))
    return found


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
        found = works_on(case, op, candidate, whole, 2)
        if found is not None and (too_small(case, candidate, 3) or works_on(case, op, candidate, whole, 3) is not None):
            return found
    return None
