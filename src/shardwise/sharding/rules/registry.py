"""The table of rules: operator → the function that gives a call's signature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shardwise.capture.graph import Op, operator_name
from shardwise.errors import RuleError
from shardwise.sharding.signature import Signature

__all__ = ["RULES", "Rule", "rule", "signature_of"]

Rule = Callable[[Op], Signature]

RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Registers the decorated function as the rule of `targets`."""

    def register(function: Rule) -> Rule:
        for target in targets:
            assert target not in RULES, f"{operator_name(target)} has two rules"
            RULES[target] = function
        return function

    return register


def signature_of(op: Op) -> Signature:
    """How this call may be split. Raises RuleError, naming the operator and module, when it has no rule."""
    found = RULES.get(op.target)
    if found is None:
        raise RuleError(
            f"{op.name} in {op.module or 'the model'} has no sharding rule; it reads {list(op.inputs)} and makes {list(op.outputs)}. "
            f"Add a rule with @shardwise.sharding.rules.rule({op.name})"
        )
    return found(op)
