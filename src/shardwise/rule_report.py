"""`shardwise rules`: which operators have rules, and how one of them would be split."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from shardwise.capture.graph import Op, operator_name
from shardwise.capture.normalize import rewriting
from shardwise.errors import RuleError
from shardwise.sharding.rules import RULES, signature_of
from shardwise.sharding.rules.examples import Example, example, example_call
from shardwise.sharding.signature import Choice, Signature, Split, variant

__all__ = ["Factor", "KnownRule", "ShownRule", "known_rules", "listing", "show_rule", "targets_named"]

_RANKS = 2  # over which the shown types split a factor


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class KnownRule(_Frozen):
    """A line of the table. family: the file of rules; doc: in one line."""

    operator: str
    family: str
    doc: str


class Factor(_Frozen):
    """A factor of a call. how: "split", "summed", "made whole" or "whole"; inputs, outputs: types over the ranks; note: limits, or why
    not."""

    name: str
    size: int
    how: str
    inputs: list[str] = []
    outputs: list[str] = []
    note: str = ""


class ShownRule(_Frozen):
    """How a call would be split. source: "rule", "declared", "discovered", "whole" or "rewritten" (capture leaves no such call).
    linear: sets of inputs that may be summands."""

    operator: str
    family: str
    doc: str
    call: str = ""
    source: str = "rule"
    signature: str = ""
    factors: list[Factor] = []
    linear: list[list[int]] = []

    def __str__(self) -> str:
        lines = [f"{self.operator}" + (f"  (rules/{self.family}.py)" if self.family else ""), *_indented(self.doc)]
        if self.source == "rewritten":
            return "\n".join(lines)
        if not self.signature:
            return "\n".join([*lines, "  no example of it is known: give a call with --shapes and --args"])
        said = {"rule": "", "declared": " (declared)", "discovered": " (found by running it)", "whole": " (kept whole)"}[self.source]
        lines += ["", f"  {self.call}", f"  {self.signature}{said}", ""]
        width = max((len(each.name) + len(str(each.size)) for each in self.factors), default=0)
        for each in self.factors:
            types = f"{', '.join(each.inputs)} -> {', '.join(each.outputs)}" if each.inputs or each.outputs else ""
            head = f"  {each.name}={each.size}".ljust(width + 5)
            lines.append("  ".join(part for part in (f"{head}{each.how}", types, f"({each.note})" if each.note else "") if part))
        sums = ["input " + " and ".join(map(str, each)) + (" together" if len(each) > 1 else "") for each in self.linear]
        lines.append(f"  sums pass through it in {', or in '.join(sums)}" if sums else "  no sum passes through it: it is not linear")
        if any(each.inputs or each.outputs for each in self.factors):
            lines.append("  S(d): dim d is split over the ranks; R: whole on each; P: each has a summand; I: whole, its gradient, too")
        return "\n".join(lines)


def _indented(text: str) -> list[str]:
    return [f"  {line}".rstrip() for line in text.splitlines()]


def known_rules() -> list[KnownRule]:
    """All operators with rules, by family and name."""
    found = [
        KnownRule(operator=operator_name(target), family=_family(rule), doc=_doc(rule).split("\n")[0]) for target, rule in RULES.items()
    ]
    return sorted(found, key=lambda each: (each.family, each.operator))


def _family(rule: Callable[..., Any]) -> str:
    return rule.__module__.rsplit(".", 1)[-1]


def _doc(rule: Callable[..., Any]) -> str:
    """The rule's own words, else its file's."""
    return inspect.getdoc(rule) or (inspect.getdoc(sys.modules.get(rule.__module__)) or "").split("\n")[0]


def listing(rules: list[KnownRule]) -> str:
    """A line for each, to be read and searched."""
    widths = [max(len(each.operator) for each in rules), max(len(each.family) for each in rules)]
    return "\n".join(f"{each.operator:{widths[0]}}  {each.family:{widths[1]}}  {each.doc}".rstrip() for each in rules)


def targets_named(name: str) -> list[Any]:
    """The operators that a user means: `aten.linear.default`, `aten::linear`, `linear`, or the beginning of a name.

    Raises RuleError when there is none, with those of similar name.
    """
    wanted = name.replace("::", ".")
    names = {operator_name(target): target for target in RULES}
    for fits in (
        lambda each: each == wanted,
        lambda each: each.rsplit(".", 1)[0] == wanted or each.split(".")[1] == wanted,
        lambda each: each.startswith(wanted) or each.split(".", 1)[1].startswith(wanted),
    ):
        if found := sorted(filter(fits, names)):
            return [names[each] for each in found]
    if (target := _torch_operator(wanted)) is not None:
        return [target]
    near = get_close_matches(wanted, [*names, *(each.split(".")[1] for each in names)], 3)
    raise RuleError(f"no operator {name} is known" + (f"; is it one of {', '.join(near)}?" if near else "; `shardwise rules` lists them"))


def _torch_operator(name: str) -> Any:
    """An operator of torch's without a rule, if there is such a one."""
    parts = name.split(".")
    if len(parts) not in (2, 3):
        return None
    packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
    overloads = packet.overloads() if packet is not None else []
    wanted = parts[2] if len(parts) == 3 else "default" if "default" in overloads else next(iter(overloads), "")
    return getattr(packet, wanted) if wanted in overloads else None


def show_rule(target: Any, shapes: str | None = None, args: str = "") -> ShownRule:
    """How a call of the operator would be split; an example call where no shapes are given.

    Raises RuleError when the operator does not take the shapes.
    """
    rule = RULES.get(target)
    if rule is None and (becomes := rewriting(target)) is not None:
        doc = f"It needs no rule: capture makes other operators of it.\n{becomes}"
        return ShownRule(operator=operator_name(target), family="", doc=doc, source="rewritten")
    doc = "No rule of shardwise's: it is run on small parts to find one." if rule is None else _doc(rule)
    shown = ShownRule(operator=operator_name(target), family=_family(rule) if rule else "", doc=doc)
    op = _first_call(target, args) if shapes is None else example_call(target, Example(shapes=shapes, args=args))
    return shown if op is None else shown.model_copy(update=_described(op, signature_of(op)))


def _first_call(target: Any, args: str) -> Op | None:
    """The first of the examples that the operator, and its rule, take."""
    for given in example(target):
        try:
            op = example_call(target, Example(shapes=given.shapes, args=args or given.args))
            if target not in RULES or RULES[target](op):
                return op
        except Exception:  # a guess that did not fit
            continue
    return None


def _described(op: Op, sig: Signature) -> dict[str, Any]:
    made = ", ".join(str(list(value.shape)) for value in op.outputs)
    arguments = [repr(each) for each in op.args] + [f"{name}={value!r}" for name, value in op.kwargs.items()]
    for index, value in reversed(list(enumerate(op.inputs))):
        arguments = [each.replace(f"%{index}", str(list(value.shape))) for each in arguments]
    return {
        "call": f"{op.name}({', '.join(arguments)}) -> {made}",
        "source": sig.source,
        "signature": str(sig),
        "factors": [_factor(op, sig, name) for name in _in_order(sig)],
        "linear": [sorted(each) for each in sig.linear],
    }


def _in_order(sig: Signature) -> list[str]:
    """The factors as they stand in the dims; then those that stand in none."""
    return list(dict.fromkeys([*(name for tensor in (*sig.inputs, *sig.outputs) for dim in tensor for name in dim), *sig.sizes]))


def _factor(op: Op, sig: Signature, name: str) -> Factor:
    split, size = sig.splits.get(name), sig.sizes[name]
    if split is None:
        return Factor(name=name, size=size, how="whole", note=sig.reasons.get(name, sig.reasons.get("*", "")))
    held = any(name in dim for tensor in sig.outputs for dim in tensor)
    how = "split" if held else "summed" if split.others == "P" else "made whole"
    if size < _RANKS:
        return Factor(name=name, size=size, how=how, note="of this size it cannot be")
    types = variant(op, sig, Choice("split", name, owner=None if split.ranges else 0), sig.sizes, _RANKS)
    return Factor(
        name=name, size=size, how=how, inputs=list(map(repr, types.inputs)), outputs=list(map(repr, types.outputs)), note=_limits(split)
    )


def _limits(split: Split) -> str:
    said = {
        "equal parts only": not split.uneven,
        "or all of it on one rank": split.owned and split.ranges,
        "only all of it on one rank": not split.ranges,
        "the ranks communicate": not split.microbatches,
        f"{'inputs' if len(split.addends) > 1 else 'input'} {', '.join(map(str, sorted(split.addends)))} summed": bool(split.addends),
    }
    return "; ".join(text for text, holds in said.items() if holds)
