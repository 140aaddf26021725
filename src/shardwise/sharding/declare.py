"""Rules in one line, declared by the user.

    declare_rule("mylib::gated_norm", "b n, n -> b n", whole="n")

Every factor may be split but those named in `whole`: held by an output it is split there, summed away it makes sums. Which inputs are terms
of a sum, and whether parts may be uneven, is found by running the operator; a declared rule is tried on small inputs before anything is
split by it, and dropped when it is wrong.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from math import prod
from typing import Any

import torch

from shardwise.capture.graph import Op, Value, operator_name
from shardwise.capture.opaque import Opaque
from shardwise.errors import RuleError, ShardwiseWarning
from shardwise.sharding.dealing import Mismatch
from shardwise.sharding.discover import check, ways
from shardwise.sharding.finding import Finding, Misfit, whole
from shardwise.sharding.patience import Clock, Trouble, patient
from shardwise.sharding.rule_cache import call_key
from shardwise.sharding.signature import Choice, Dims, Signature, Split, dims
from shardwise.sharding.small import Random, Sizes, Trial, sizings, trials
from shardwise.sharding.trial import check_choice
from shardwise.sharding.types import P, R

__all__ = ["Declared", "declare_rule", "declared_signature"]

_MANY, _MANY_SETS = 4, 64  # inputs that are summands together, and sets of them, that are tried
_EXAMPLE = 'declare_rule("mylib::linear", "b k, n k -> b n", whole="k")'
_DECLARED: dict[str, Declared] = {}
_found: dict[tuple[Declared, str, tuple[tuple[int, ...], ...]], Finding | str] = {}  # of this process: what came of trying them
_FACTOR = re.compile(r"[A-Za-z_]\w*|\.\.\.|1")


@dataclass(frozen=True, kw_only=True)
class Declared:
    """name: of the operator, as in `Op.name`; inputs, outputs: as `shardwise.sharding.signature.dims` reads them; `...` for any dims."""

    name: str
    text: str
    inputs: tuple[Dims, ...]
    outputs: tuple[Dims, ...]
    whole: frozenset[str]

    def __str__(self) -> str:
        return f"declared rule {self.text!r} of {self.name}"


def declare_rule(operator: Any, text: str, *, whole: str | Sequence[str] = ()) -> None:
    """Says how an operator may be split: its dims as factors, and which factors must stay whole.

    operator: `torch.ops.mylib.op.default`, or its name "mylib::op". text: dims of its tensors `inputs -> outputs`: letters by blanks,
    tensors by commas, `(h d)` for a dim that is a product, `1` for one that is broadcast, `...` for any number of leading dims.
    whole: factors that cannot be split, "k" or "k n". A later declaration replaces an earlier one.
    Raises RuleError when the text cannot be read, or the operator has a rule of shardwise's, which this one would not replace.

    >>> declare_rule("mylib::gated_norm", "b n, n -> b n", whole="n")
    """
    from shardwise.sharding.rules.registry import RULES  # which stands on this module

    name = _name_of(operator)
    if any(operator_name(target) == name for target in RULES):
        raise RuleError(f"{name} has a rule of shardwise's own, which a declared one would not replace; see `shardwise rules {name}`")
    inputs, outputs = _read(name, text)
    kept = frozenset(whole.split() if isinstance(whole, str) else whole)
    used = {factor for tensor in (*inputs, *outputs) for dim in tensor for factor in dim}
    if unknown := sorted(kept - used):
        raise RuleError(f"whole names {', '.join(unknown)}, which {text!r} of {name} does not have; it has {', '.join(sorted(used))}")
    _DECLARED[name] = Declared(name=name, text=text, inputs=inputs, outputs=outputs, whole=kept)


def _name_of(operator: Any) -> str:
    """As in `Op.name`."""
    if isinstance(operator, torch._ops.OpOverloadPacket):
        overloads = operator.overloads()
        if len(overloads) != 1:
            raise RuleError(f"{operator} is several operators: {', '.join(overloads)}; declare one of them, as {operator}.{overloads[0]}")
        return str(getattr(operator, overloads[0]))
    if not isinstance(operator, str):
        return operator_name(operator)
    name = operator.replace("::", ".")
    return name if name.count(".") != 1 or name.startswith("shardwise.") else f"{name}.default"


def _read(name: str, text: str) -> tuple[tuple[Dims, ...], tuple[Dims, ...]]:
    before, arrow, after = text.partition("->")
    if not arrow or "->" in after or not after.strip():
        raise RuleError(f"rule {text!r} of {name} must read `inputs -> outputs`, as in {_EXAMPLE}")
    for token in re.findall(r"[^\s,()]+", f"{before} {after}"):
        if not _FACTOR.fullmatch(token):
            raise RuleError(f"rule {text!r} of {name}: {token!r} is no name of a factor, nor 1 nor ...; an example: {_EXAMPLE}")
    try:
        found = dims(before) if before.strip() else (), dims(after)
    except ValueError as error:
        raise RuleError(f"rule {text!r} of {name} has a closing bracket too many; an example: {_EXAMPLE}") from error
    every = [token for tensor in (*found[0], *found[1]) for dim in tensor for token in dim]
    if "(" in every:
        raise RuleError(f"rule {text!r} of {name} has an opening bracket too many; an example: {_EXAMPLE}")
    return found


# -- on a call ---------------------------------------------------------------------------------------------------------------------------


def declared_signature(op: Op) -> Signature | None:
    """The call's signature after its operator's declared rule, tried; whole where that is wrong; None where none was declared.

    Raises RuleError when the rule does not describe the call's tensors.
    """
    given = _DECLARED.get(op.name)
    if given is None:
        return None
    fitted = _fitted(given, op)
    key = (fitted, call_key(op), tuple(value.shape for value in op.inputs))
    if key not in _found or isinstance(op.target, Opaque):  # whose code may hold constants that its key does not tell
        _found[key] = _tried(fitted, op)
    found = _found[key]
    return whole(op, found) if isinstance(found, str) else found.on(op, "declared")


def _fitted(given: Declared, op: Op) -> Declared:
    """The rule with its `...` written out and `1` for what is broadcast. Raises RuleError."""
    sides = (("reads", given.inputs, op.inputs), ("makes", given.outputs, op.outputs))
    for verb, tensors, values in sides:
        if len(tensors) != len(values):
            raise RuleError(
                f"the {given} has {len(tensors)} tensors where the call in {op.module or 'the model'} {verb} {len(values)}: "
                f"{list(values)}; write the dims of each, as in {_EXAMPLE}"
            )
    spread = {place: _spread(tensor, value, given) for place, tensor, value in _places(given, op)}
    fitted = replace(
        given,
        inputs=tuple(spread["input", index] for index in range(len(op.inputs))),
        outputs=tuple(spread["output", index] for index in range(len(op.outputs))),
    )
    sizes = _alone(fitted, op)
    broadcast = {place: _broadcast(tensor, value, sizes) for place, tensor, value in _places(fitted, op)}
    fitted = replace(
        fitted,
        inputs=tuple(broadcast["input", index] for index in range(len(op.inputs))),
        outputs=tuple(broadcast["output", index] for index in range(len(op.outputs))),
    )
    try:
        Finding(inputs=fitted.inputs, outputs=fitted.outputs).on(op, "declared")
    except Misfit as error:
        raise RuleError(f"the {given} does not describe its call in {op.module or 'the model'}: {error}") from error
    return fitted


def _places(given: Declared, op: Op) -> Iterator[tuple[tuple[str, int], Dims, Value]]:
    for index, (tensor, value) in enumerate(zip(given.inputs, op.inputs, strict=True)):
        yield ("input", index), tensor, value
    for index, (tensor, value) in enumerate(zip(given.outputs, op.outputs, strict=True)):
        yield ("output", index), tensor, value


def _spread(tensor: Dims, value: Value, given: Declared) -> Dims:
    more = len(value.shape) - sum(dim != ("...",) for dim in tensor)
    if more < 0 or (more and ("...",) not in tensor):
        raise RuleError(f"the {given} has {len(tensor)} dims for {value!r}, which has {len(value.shape)}; an example: {_EXAMPLE}")
    found: list[tuple[str, ...]] = []
    for dim in tensor:
        found += [(f"e{number}",) for number in range(more)] if dim == ("...",) else [dim]
    return tuple(found)


def _alone(given: Declared, op: Op) -> Mapping[str, int]:
    """The largest size of every factor that is alone in a dim."""
    sizes: dict[str, int] = {}
    for _, tensor, value in _places(given, op):
        for dim, size in zip(tensor, value.shape, strict=True):
            if len(dim) == 1:
                sizes[dim[0]] = max(sizes.get(dim[0], 0), size)
    return sizes


def _broadcast(tensor: Dims, value: Value, sizes: Mapping[str, int]) -> Dims:
    return tuple(() if size == 1 and len(dim) == 1 and sizes[dim[0]] > 1 else dim for dim, size in zip(tensor, value.shape, strict=True))


def _tried(given: Declared, op: Op) -> Finding | str:
    """The rule as it was found to work, or why it is dropped."""
    try:
        return patient(partial(_finding, given, op))
    except (Mismatch, Misfit, Random, Trouble) as error:
        warnings.warn(f"the {given} is dropped and the operator kept whole: {error}", ShardwiseWarning, stacklevel=2)
        return f"its declared rule is wrong: {error}"


def _finding(given: Declared, op: Op, clock: Clock) -> Finding:
    """Raises Mismatch for a factor that cannot be split so."""
    bare = Finding(inputs=given.inputs, outputs=given.outputs)
    sizes = bare.on(op, "declared").sizes
    accepted = _accepted(given, op, sizes, clock)
    held = {name for tensor in given.inputs for dim in tensor for name in dim}
    reasons = dict.fromkeys(given.whole, "its declaration keeps it whole") | {
        name: "only a result holds it" for name in sizes if name not in held
    }
    splits = {name: _split(bare, op, accepted, name, clock) for name, size in sizes.items() if size > 1 and name not in reasons}
    found = replace(bare, splits=splits, linear=_linear(op, accepted, clock), reasons=reasons)
    check(op, found, accepted, clock)
    return found


def _accepted(given: Declared, op: Op, sizes: Mapping[str, int], clock: Clock) -> list[Trial]:
    """Trials with every factor small; where the operator refuses those, as for a call without any rule."""
    for chosen in (_factor_sizes(given, sizes), *sizings(op)):
        clock()
        if found := trials(op, chosen):
            return found
    raise Mismatch("the operator refuses small random inputs, so that the rule cannot be tried")


def _factor_sizes(given: Declared, sizes: Mapping[str, int]) -> Sizes:
    held = {name for tensor in given.inputs for dim in tensor for name in dim if sizes[name] > 1}
    names = sorted(held, key=lambda name: (sizes[name], name))

    def shapes(numbers: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        small = dict(zip(names, numbers, strict=False))
        return tuple(tuple(prod(small.get(name, 1) for name in dim) for dim in tensor) for tensor in given.inputs)

    return shapes


def _split(bare: Finding, op: Op, accepted: Sequence[Trial], name: str, clock: Clock) -> Split:
    """How splitting a factor works out; of the inputs without it as few as possible are summands."""
    held = [any(name in dim for dim in tensor) for tensor in bare.inputs]
    free = [index for index, has in enumerate(held) if not has and op.inputs[index].requires_grad]
    first: Mismatch | None = None
    for number in range(min(len(free), _MANY) + 1):
        for sums in combinations(free, number):
            split = Split(addends=frozenset(sums), uneven=False, blocked=False)
            finding = replace(bare, splits={name: split})
            try:
                _try(finding, accepted, name, clock, even=True)
            except Mismatch as error:
                first = first or error
                continue
            try:
                return replace(split, uneven=_try(finding, accepted, name, clock, even=False))
            except Mismatch:
                return split
    raise Mismatch(f'split over {name} the parts do not make up the whole (whole="{name}" would keep it whole): {first}')


def _try(finding: Finding, accepted: Sequence[Trial], name: str, clock: Clock, *, even: bool) -> bool:
    """Whether there was a trial that splits the factor evenly, or unevenly. Raises Mismatch when one fails."""
    tried = False
    for each in accepted:
        sig = finding.on(each.case.op, "declared")
        for ranks in each.ranks:
            size = sig.sizes[name]
            if size >= ranks and (size % ranks == 0) == even:
                clock()
                check_choice(each.case, sig, {"tp": (ranks, Choice("split", name))}, each.whole)
                tried = True
    return tried


def _linear(op: Op, accepted: Sequence[Trial], clock: Clock) -> tuple[frozenset[int], ...]:
    """The sets of inputs in which the operator is linear."""
    grads = [index for index, value in enumerate(op.inputs) if value.requires_grad]
    sets = [sums for number in range(1, min(len(grads), _MANY) + 1) for sums in combinations(grads, number)]
    options = [tuple(P if index in sums else R for index in range(len(op.inputs))) for sums in sets[:_MANY_SETS]]
    found = ways(accepted, iter(options), clock)
    return tuple(way.sums for way in found if all(out == P for made in way.outputs for out in made))
