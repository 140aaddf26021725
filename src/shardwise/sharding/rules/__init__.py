"""Sharding rules, one file for each family of operators."""

from shardwise.sharding.rules import attention, conv, create, embedding, indexing, loss, matmul, norm, pointwise, random, reduction, shape
from shardwise.sharding.rules.registry import RULES, Rule, rule, signature_of

__all__ = ["RULES", "Rule", "rule", "signature_of"]

_ = (attention, conv, create, embedding, indexing, loss, matmul, norm, pointwise, random, reduction, shape)
