"""A plan's choices in words."""

from __future__ import annotations

import re

from shardwise.planner.plan import read_choice
from shardwise.sharding.signature import Choice

__all__ = ["operator_words", "parameter_words", "short_name"]

# (operator, factor) → what a rank does. Factors are those of the rules in `shardwise.sharding.rules`.
_FACTORS = {
    ("linear", "n"): "columns split: a rank makes part of the output features",
    ("linear", "k"): "rows split: a rank multiplies part of the input features, then all add up",
    ("embedding", "v"): "rows split: a rank looks up its part of the vocabulary, then all add up",
    ("embedding", "h"): "columns split: a rank has part of every vector",
    ("scaled_dot_product_attention", "b0"): "batch split",
    ("scaled_dot_product_attention", "b1"): "heads split: a rank attends with its heads",
    ("scaled_dot_product_attention", "g"): "groups of heads split: a rank attends with its key heads and their queries",
    ("scaled_dot_product_attention", "r"): "the query heads of each key head split",
    ("scaled_dot_product_attention", "q"): "queries split: a rank attends for part of the sequence",
    ("scaled_dot_product_attention", "e"): "the values' features split",
    ("cross_entropy_sum", "v"): "vocabulary split: the ranks combine their maxima and sums",
    ("group_norm", "g"): "groups split",
    ("batch_norm", "c"): "channels split",
}
_SAME = {"addmm": "linear", "cross_entropy_loss": "cross_entropy_sum", "native_batch_norm": "batch_norm", "cudnn_batch_norm": "batch_norm"}
_GENERAL = {
    "k": "what is summed over is split, then all add up",
    "n": "columns split",
    "m": "rows split",
    "b": "batch split",
    "v": "vocabulary split",
    "h": "features split",
    "c": "channels split",
}
_WHOLE = {
    "I": "whole: every rank computes all of it",
    "R": "whole; the gradients of the ranks are added up",
    "P": "on summands: each rank on its own, added up later",
}


def short_name(operator: str) -> str:
    """`linear` for `aten.linear.default`."""
    return operator.split(".")[1] if "." in operator else operator


def operator_words(operator: str, text: str) -> str:
    """What an operator's choice, as the plan writes it, means."""
    choice = read_choice(text, operator)
    return _WHOLE[choice.mode] if choice.mode != "split" else _factor_words(short_name(operator), choice) + _parts(choice)


def parameter_words(placement: str, operator: str | None, text: str | None) -> str:
    """What a parameter's type means, given the choice of the operator that uses it."""
    if not placement.startswith("S"):
        return "whole: every rank holds all of it"
    choice = read_choice(text, operator or "") if text is not None else None
    if operator is not None and choice is not None and choice.mode == "split":
        return operator_words(operator, text or "")
    dim = re.findall(r"\d+", placement)[0]
    return f"stored split along dim {dim}, gathered for use" if choice is not None else f"dim {dim} split"


def _factor_words(operator: str, choice: Choice) -> str:
    if choice.owner is not None:
        return f"whole table on rank {choice.owner}; the others add zeros"
    known = _FACTORS.get((_SAME.get(operator, operator), choice.factor))
    if known is not None:
        return known
    if match := re.fullmatch(r"[dfob](\d+)", choice.factor):
        return f"dim {match.group(1)} split"
    return _GENERAL.get(choice.factor, f"factor {choice.factor} split")


def _parts(choice: Choice) -> str:
    blocks = f", inside each of {choice.blocks} blocks" if choice.blocks > 1 else ""
    return blocks + (f", in units of {choice.unit}" if choice.unit > 1 else "")
