"""Finds the rule of an operator that has none, by running it.

    call ──small──▶ trials ──ways──▶ ways that recombine ──▶ Finding ──check, on fresh numbers──▶ Signature

A way of splitting that cuts inputs becomes a factor: the dims that it cuts are one index, over which the operator is a loop. Ways without
cuts say in which inputs it is linear. Only the operator itself is run on the parts, so nothing that needs communication, or other
constants on a part than on the whole, is found.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count
from math import prod
from pathlib import Path
from string import ascii_lowercase

from shardwise.capture.graph import Op
from shardwise.capture.opaque import Opaque
from shardwise.environment import cache_directory
from shardwise.errors import ShardwiseWarning
from shardwise.sharding.dealing import Mismatch
from shardwise.sharding.finding import Finding, Misfit, whole
from shardwise.sharding.patience import Clock, Trouble, patient
from shardwise.sharding.rule_cache import Entry, cached, call_key, keep
from shardwise.sharding.signature import Dim, Signature, Split
from shardwise.sharding.small import Random, Trial, elements, sizings, trial, trials
from shardwise.sharding.trial import Sample, check_choice, choices, pairs
from shardwise.sharding.types import P, Placement, R, Shard
from shardwise.sharding.ways import Candidate, candidates, too_small, works_on

__all__ = ["Findings", "Way", "check", "discover", "resolved", "ways"]

_MANY = 4  # tensors: with more of them not every combination of splits is tried
_REAL_CHECK = 1 << 18  # elements of a call up to which the rule is checked on the call's own sizes, too
_UNSAFE = {  # on parts of inconsistent sizes these end the process
    *("aten.as_strided.default", "aten.as_strided_scatter.default", "aten._unsafe_index.Tensor", "aten._unsafe_index_put.default"),
    *("aten.lstm.data", "aten.gru.data", "aten.rnn_tanh.data", "aten.rnn_relu.data"),
}
_UNSTEADY = "the rule found for it fails on other numbers"
_NOTHING = "no way of splitting it was found by running it on parts"

# Of this process: call, shapes and cache directory → what was found. It holds no operators, for these hold whole models.
_found: dict[tuple[str, tuple[tuple[int, ...], ...], Path], Entry] = {}


def discover(op: Op, directory: Path | None = None) -> Signature | None:
    """The call's rule, found by running the operator on shards of small random inputs; None where no split is right.

    directory: where findings are kept, by default the user's cache.
    """
    found = resolved(op, directory)
    return found if found.source == "discovered" else None


def resolved(op: Op, directory: Path | None = None) -> Signature:
    """`discover`, or the call kept whole, with the reason. Equal calls are tried once."""
    if (reason := _untriable(op)) is not None:
        return whole(op, reason)
    key = (call_key(op), tuple(value.shape for value in op.inputs), directory or cache_directory())
    if key not in _found or isinstance(op.target, Opaque):  # whose code may hold constants that its key does not tell
        _found[key] = _looked_up(op, key[2])
    entry = _found[key]
    return whole(op, entry.reason) if entry.finding is None else entry.finding.on(op, "discovered")


def _untriable(op: Op) -> str | None:
    """Why running the call on parts would tell nothing, or do harm."""
    if isinstance(op.target, Opaque) and not op.target.pure:
        return "its control flow may depend on values"
    if op.name in _UNSAFE:
        return "it reads memory without looking at sizes"
    return None


def _looked_up(op: Op, directory: Path) -> Entry:
    """What an earlier run found, checked again, else what is found now."""
    kept = cached(op, directory)
    try:
        if kept is not None and (kept.finding is None or patient(partial(_still_right, op, kept.finding))):
            return kept
        found = patient(partial(_searched, op))
    except Trouble as error:
        warnings.warn(f"{op.name} is kept whole: {error}", ShardwiseWarning, stacklevel=2)
        return Entry(finding=None, reason=str(error))
    if found.finding is None and found.reason.startswith(_UNSTEADY):
        warnings.warn(f"{op.name} is kept whole: {found.reason}", ShardwiseWarning, stacklevel=2)
    keep(op, found, directory)
    return found


def _still_right(op: Op, finding: Finding, clock: Clock) -> bool:
    """Whether a finding of an earlier run still passes its check on this call."""
    try:
        accepted = _accepted(op, clock, seed=100)
        if accepted is not None:
            check(op, finding, accepted, clock)
    except (Mismatch, Misfit, Random):
        return False
    return accepted is not None


def _searched(op: Op, clock: Clock) -> Entry:
    """The finding for a call, checked; or why it is kept whole."""
    try:
        accepted = _accepted(op, clock)
        if accepted is None:
            return Entry(finding=None, reason="it refuses small random inputs, or makes nothing of them")
        finding = _finding(op, accepted, clock)
        if not finding.splits and not finding.linear:
            return Entry(finding=None, reason=_NOTHING)
        check(op, finding, _accepted(op, clock, seed=100) or accepted, clock)
    except Random as error:
        return Entry(finding=None, reason=str(error))
    except (Mismatch, Misfit) as error:
        return Entry(finding=None, reason=f"{_UNSTEADY}: {error}")
    return Entry(finding=finding, reason="")


def _accepted(op: Op, clock: Clock, seed: int = 0) -> list[Trial] | None:
    """Trials in the first sizes that the operator takes. Raises Random."""
    schema = getattr(op.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        raise Random("it changes what it reads")
    for sizes in sizings(op):
        clock()
        if found := trials(op, sizes, seed):
            return found
    return None


# -- search ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way of splitting that recombines: the inputs' types and, for every trial, the outputs'. uneven: also in unequal parts."""

    inputs: Candidate
    outputs: tuple[tuple[Placement, ...], ...]
    uneven: bool

    @property
    def cuts(self) -> int:
        """How many tensors it splits."""
        return sum(isinstance(each, Shard) for each in (*self.inputs, *self.outputs[0]))

    @property
    def sums(self) -> frozenset[int]:
        """The inputs that are summands."""
        return frozenset(index for index, each in enumerate(self.inputs) if each == P)


def ways(tried: Sequence[Trial], options: Iterator[Candidate], clock: Clock) -> list[Way]:
    """Those that recombine in every trial, on every number of ranks that divides what is split; the others say whether uneven parts do."""
    return [way for candidate in options if (way := _way(tried, candidate, clock)) is not None]


def _way(tried: Sequence[Trial], candidate: Candidate, clock: Clock) -> Way | None:
    outputs: list[tuple[Placement, ...]] = []
    uneven: list[bool] = []
    for each in tried:
        made = None
        for ranks in each.ranks:
            if too_small(each.case, candidate, ranks):
                continue
            clock()
            even = _divides(each.case, candidate, ranks)
            if not even and uneven and not uneven[-1]:
                continue
            found = works_on(each.case, each.case.op, candidate, each.whole, ranks)
            if even and found is None:
                return None
            if not even:
                uneven.append(found is not None)
            made = found or made
        if made is not None:
            outputs.append(made)
        elif not outputs:
            return None
        else:
            outputs.append(())
    return Way(inputs=candidate, outputs=tuple(outputs), uneven=all(uneven) and bool(uneven))


def _divides(case: Sample, candidate: Candidate, ranks: int) -> bool:
    return all(tensor.shape[each.dim] % ranks == 0 for tensor, each in zip(case.tensors, candidate, strict=True) if isinstance(each, Shard))


def _options(op: Op, case: Sample) -> Iterator[Candidate]:
    """All candidates of an operator with few tensors; of others each dim alone, equal dims together, and each sum alone."""
    if len(case.tensors) <= _MANY:
        return candidates(case)
    return iter(dict.fromkeys(_plain_candidates(op, case)))


def _plain_candidates(op: Op, case: Sample) -> Iterator[Candidate]:
    numbers = range(len(case.tensors))
    data = [index for index in numbers if op.inputs[index].kind not in ("parameter", "buffer")]
    sizes = sorted({size for tensor in case.tensors for size in tensor.shape if size > 1})
    for size in sizes:
        for group in (data, numbers):
            first = {index: case.tensors[index].shape.index(size) for index in group if size in case.tensors[index].shape}
            if first:
                yield tuple(Shard(first[index]) if index in first else R for index in numbers)
    for index, tensor in enumerate(case.tensors):
        chosen: list[Placement] = [Shard(dim) for dim, size in enumerate(tensor.shape) if size > 1]
        for each in (*chosen, *((P,) if op.inputs[index].requires_grad else ())):
            yield tuple(each if other == index else R for other in numbers)


# -- from ways to factors ----------------------------------------------------------------------------------------------------------------


def _finding(op: Op, tried: Sequence[Trial], clock: Clock) -> Finding:
    found = ways(tried, _options(op, tried[0].case), clock)
    cutting = sorted((way for way in found if way.cuts and _has_cuts(way)), key=lambda way: (-way.cuts, len(way.sums), not way.uneven))
    builder = Findings(op=op, tried=tried)
    for way in cutting:
        builder.take(way)
    sums = [way.sums for way in found if not _has_cuts(way) and all(out == P for made in way.outputs for out in made)]
    return builder.finding(tuple(sorted(sums, key=lambda each: (len(each), sorted(each)))))


def _has_cuts(way: Way) -> bool:
    return any(isinstance(each, Shard) for each in way.inputs)


@dataclass(kw_only=True)
class Findings:
    """The factors taken so far. inputs: (tensor, dim) → the way that cuts it; outputs: (tensor, dim) → its ways, outermost first."""

    op: Op
    tried: Sequence[Trial]
    inputs: dict[tuple[int, int], Way] = field(default_factory=dict)
    outputs: dict[tuple[int, int], list[Way]] = field(default_factory=dict)

    def take(self, way: Way) -> None:
        """Makes the way a factor, unless others have its dims already."""
        places = _places(way.inputs)
        if any(place in self.inputs for place in places):
            return
        made = {place: self._inserted(place, way) for place in _places(way.outputs[0])}
        if any(each is None for each in made.values()):
            return
        self.inputs |= dict.fromkeys(places, way)
        self.outputs |= {place: each for place, each in made.items() if each is not None}

    def _inserted(self, place: tuple[int, int], way: Way) -> list[Way] | None:
        """The dim's ways with this one at its place: the parts lie in as many blocks as the factors outside it have combinations."""
        inner = [*self.outputs.get(place, []), way]
        inner.sort(key=lambda each: self._blocks(each, place, 0))
        for number in range(len(self.tried)):
            outer = 1
            for each in inner:
                if self._blocks(each, place, number) not in (outer, 0):
                    return None
                outer *= self._size(each, number)
            if self._made_size(place, number) % outer:
                return None
        return inner

    def _blocks(self, way: Way, place: tuple[int, int], number: int) -> int:
        """In how many blocks the way cuts the output dim in a trial; 0 where that trial did not try it."""
        made = way.outputs[number]
        if not made:
            return 0
        placed = made[place[0]]
        return placed.blocks if isinstance(placed, Shard) and placed.dim == place[1] else -1

    def _size(self, way: Way, number: int) -> int:
        index, dim = _places(way.inputs)[0]
        return self.tried[number].case.tensors[index].shape[dim]

    def _made_size(self, place: tuple[int, int], number: int) -> int:
        return self.tried[number].whole.outputs[place[0]].shape[place[1]]

    def finding(self, linear: tuple[frozenset[int], ...]) -> Finding:
        """Factors named by letters in the order of the dims; dims that nothing cuts have factors of their own, by size."""
        names = _Names()
        inputs = tuple(
            tuple(self._input_dim(index, dim, size, names) for dim, size in enumerate(value.shape))
            for index, value in enumerate(self.op.inputs)
        )
        outputs = tuple(
            tuple(self._output_dim((index, dim), size, names) for dim, size in enumerate(value.shape))
            for index, value in enumerate(self.op.outputs)
        )
        taken = {names.of(id(way)): way for way in self.inputs.values()}
        splits = {name: Split(addends=way.sums, uneven=way.uneven, blocked=False) for name, way in sorted(taken.items())}
        used = dict.fromkeys(name for tensor in inputs for dim in tensor for name in dim)
        reasons = {name: _NOTHING for name in used if name not in splits}
        return Finding(inputs=inputs, outputs=outputs, splits=splits, linear=linear, reasons=reasons)

    def _input_dim(self, index: int, dim: int, size: int, names: _Names) -> Dim:
        way = self.inputs.get((index, dim))
        if way is not None:
            return (names.of(id(way)),)
        return () if size == 1 else (names.of(tuple(each.case.tensors[index].shape[dim] for each in self.tried)),)

    def _output_dim(self, place: tuple[int, int], size: int, names: _Names) -> Dim:
        inner = self.outputs.get(place, [])
        numbers = range(len(self.tried))
        left = tuple(self._made_size(place, number) // prod(self._size(way, number) for way in inner) for number in numbers)
        rest = () if all(each == 1 for each in left) else (names.of(left),)
        return (*(names.of(id(way)) for way in inner), *rest)


class _Names:
    """Letters, in the order in which they are asked for."""

    def __init__(self) -> None:
        self._letters = chain(ascii_lowercase, (f"f{number}" for number in count()))
        self._known: dict[object, str] = {}

    def of(self, thing: object) -> str:
        if thing not in self._known:
            self._known[thing] = next(self._letters)
        return self._known[thing]


def _places(types: Sequence[Placement]) -> list[tuple[int, int]]:
    return [(index, each.dim) for index, each in enumerate(types) if isinstance(each, Shard)]


# -- check -------------------------------------------------------------------------------------------------------------------------------


def check(op: Op, finding: Finding, tried: Sequence[Trial], clock: Clock) -> None:
    """Runs every choice that the finding offers, each alone and two at a time. Raises Mismatch or Misfit for a wrong one."""
    for number, each in enumerate(tried):
        sig = finding.on(each.case.op, "discovered")
        for ranks in each.ranks:
            _check_choices(each, sig, ranks, clock)
        for first, second in pairs(sig) if number == 0 else ():
            clock()
            check_choice(each.case, sig, {"dp": (2, first), "tp": (2, second)}, each.whole)
    sig = finding.on(op, "discovered")
    real = trial(op, tuple(value.shape for value in op.inputs), (2,), seed=200) if elements(op) <= _REAL_CHECK else None
    if real is not None:
        _check_choices(real, sig, 2, clock)


def _check_choices(tried: Trial, sig: Signature, ranks: int, clock: Clock) -> None:
    for choice in choices(sig, ranks):
        clock()
        check_choice(tried.case, sig, {"tp": (ranks, choice)}, tried.whole)
