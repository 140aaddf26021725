"""The table of rules: operator → the function that gives a call's signature.

A call is described by the first of these that fits it: its operator's rule, the rule that the user declared for it, the rule that running
it on small parts finds. Without any it is kept whole on every rank: right, and slower.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import prod
from typing import Any

from shardwise.capture.graph import Op, operator_name
from shardwise.errors import RuleError, ShardwiseWarning
from shardwise.sharding.declare import declared_signature
from shardwise.sharding.discover import resolved
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
    """How this call may be split; `source` says who says so. Raises RuleError for a declared rule that does not describe the call."""
    found = RULES.get(op.target)
    if found is not None:
        trouble = "it describes other tensors"
        try:
            sig = found(op)
            if describes(sig, op):
                return sig
            trouble += f" ({sig})"
        except RuleError:
            raise
        except Exception as error:  # a rule that was not made for such a call; it is no use to the user to stop here
            trouble = f"{type(error).__name__}: {error}"
        where = f"{op.name} in {op.module or 'the model'}"
        warnings.warn(f"the rule of {where} does not fit the call and is not used: {trouble}", ShardwiseWarning, stacklevel=2)
    declared = declared_signature(op)
    return resolved(op) if declared is None else declared


def describes(sig: Signature, op: Op) -> bool:
    """Whether the factors of each dim of each tensor multiply to its size."""
    tensors, values = (*sig.inputs, *sig.outputs), (*op.inputs, *op.outputs)
    return (
        len(sig.inputs) == len(op.inputs)
        and len(tensors) == len(values)
        and all(
            tuple(prod(sig.sizes.get(name, 0) for name in dim) for dim in tensor) == tuple(value.shape)
            for tensor, value in zip(tensors, values, strict=True)
        )
    )
