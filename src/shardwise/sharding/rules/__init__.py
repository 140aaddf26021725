"""Sharding rules, one file for each family of operators."""

from shardwise.sharding.rules import (  # noqa: F401 - each registers its rules
    attention,
    conv,
    create,
    embedding,
    experts,
    fourier,
    indexing,
    interpolate,
    loss,
    matmul,
    norm,
    pieces,
    pointwise,
    position,
    random,
    recurrent,
    reduction,
    scatter,
    shape,
    softmax,
    sorting,
)
from shardwise.sharding.rules.registry import RULES, Rule, rule, signature_of

__all__ = ["RULES", "Rule", "rule", "signature_of"]
