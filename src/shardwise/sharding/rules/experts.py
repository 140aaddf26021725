"""Products in which each row names its own matrix: split rows, matrices, or within the matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from shardwise.capture import experts
from shardwise.capture.graph import Op
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.signature import Call, Signature, Split, signature


@rule(experts.expert_mm)
def expert_mm(op: Op) -> Signature:
    """s k, e k n, s -> s n. With experts split each rank computes its own experts' rows, and zeros for the others."""
    splits = {name: Split() for name in "skn"} | {"e": Split(blocked=False, microbatches=False)}
    linear = (frozenset({0}), frozenset({1}))
    return signature(op, "s k, e k n, s -> s n", splits=splits, linear=linear, local=_expert_mm)


def _expert_mm(call: Call, tensors: Sequence[Tensor]) -> Any:
    x, weight, expert = tensors
    return experts.expert_mm(x, weight, expert - sum(split.part.start for split in call.splits.get("e", ())))


@rule(experts.group_of_row)
def group_of_row(op: Op) -> Signature:
    reasons = {"g": "the rows of all groups are counted", "s": "made whole: it is cheap"}
    return signature(op, "g -> s", reasons=reasons)
