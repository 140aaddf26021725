"""Every sharding rule is run on real parts of tensors: a wrong rule fails, and so does one that leaves out a way of splitting that works.

And since a test that never fails proves nothing, rules are spoilt on purpose to see that it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.sharding.brute_force import Mismatch, Sample, check_rule, missing_splits, sample
from tests.sharding.samples import samples

from shardwise.capture import operators
from shardwise.capture.graph import operator_name
from shardwise.sharding.rules import RULES, signature_of
from shardwise.sharding.signature import Signature, Split, run_as_is

aten = torch.ops.aten

CASES = samples()

_SHAPE_ONLY = "the other tensor's values are not read: capturing it whole costs nothing"
_NORM_WEIGHTS = "a norm's weight and bias are parameters, and no rule makes a parameter a sum"
_COUNTER = "an index that counts is split together with the rows that it counts"
# Ways of splitting that work and are not offered: operator → types of the inputs → why.
LEFT_OUT: dict[str, dict[str, str]] = {
    "aten.zero.default": {"P": "zero is made of anything"},
    "aten.zeros_like.default": {"P": "zero is made of anything"},
    "aten.new_zeros.default": {"P": "zero is made of anything"},
    "aten.type_as.default": dict.fromkeys(("P, P", "S(0), P", "S(1), P"), _SHAPE_ONLY),
    "aten.expand_as.default": {"P, P": _SHAPE_ONLY},
    "aten.view_as.default": {"P, P": _SHAPE_ONLY},
    "aten.reshape_as.default": {"P, P": _SHAPE_ONLY},
    "aten.layer_norm.default": dict.fromkeys(("R, P, P", "R, P"), _NORM_WEIGHTS),
    "aten.rms_norm.default": {"R, P": _NORM_WEIGHTS},
    "aten.group_norm.default": {"R, P, P": _NORM_WEIGHTS},
    "aten.index.Tensor": {"R, S(0), S(0)": _COUNTER},
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_every_rule_has_a_sample() -> None:
    sampled = {case.op.target for case in CASES}
    assert not [operator_name(target) for target in RULES if target not in sampled]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rule_is_right(case: Sample) -> None:
    check_rule(case, signature_of(case.op))


# Operators that read beyond their inputs when the inputs' sizes disagree: what does not work must not be tried.
UNCHECKED = {getattr(getattr(aten, name), form) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu") for form in ("data",)}
UNCHECKED |= {torch.ops.shardwise.recurrent.default, aten._unsafe_index.Tensor, aten._unsafe_index_put.default}


@pytest.mark.parametrize("case", [case for case in CASES if case.op.target not in UNCHECKED], ids=str)
def test_rule_is_complete(case: Sample) -> None:
    found = missing_splits(case, signature_of(case.op))
    unexplained = {inputs: outputs for inputs, outputs in found.items() if inputs not in LEFT_OUT.get(case.op.name, {})}
    assert not unexplained, f"{case}, {signature_of(case.op)}: these work and are neither offered nor explained"


def test_what_is_left_out_still_works() -> None:
    """LEFT_OUT names nothing that a rule has come to offer."""
    cases = [case for case in CASES if case.op.name in LEFT_OUT]
    found = {(case.op.name, inputs) for case in cases for inputs in missing_splits(case, signature_of(case.op))}
    assert found == {(name, inputs) for name, reasons in LEFT_OUT.items() for inputs in reasons}


def test_an_operator_without_a_rule_is_kept_whole() -> None:
    found = signature_of(sample(aten.as_strided.default, torch.randn(4), [4], [1]).op)
    assert (found.source, str(found), found.splits) == ("whole", "d0 -> d1", {})
    assert found.reasons == {"*": "it reads memory without looking at sizes"}


# -- spoilt rules ------------------------------------------------------------------------------------------------------------------------


def first(target: Any, condition: Callable[[Sample], bool] = lambda case: True) -> Sample:
    return next(case for case in CASES if case.op.target is target and condition(case))


def with_split(sig: Signature, name: str, split: Split) -> Signature:
    return replace(sig, splits={**sig.splits, name: split}, reasons={})


SPOILT: dict[str, tuple[Sample, Callable[[Signature], Signature]]] = {
    "the bias is added once a rank": (first(aten.linear.default), lambda sig: with_split(sig, "k", Split())),
    "the weight is taken for a term": (first(aten.linear.default), lambda sig: with_split(sig, "n", Split(addends=frozenset({0})))),
    "a sum is taken for whole": (first(aten.sum.default), lambda sig: with_split(sig, "d0", Split(others="I"))),
    "a sum passes through gelu": (first(aten.gelu.default), lambda sig: replace(sig, linear=(frozenset({0}),))),
    "a sum passes through one term alone": (first(aten.add.Tensor), lambda sig: replace(sig, linear=(frozenset({0}),))),
    "what is normalised is split": (first(aten.layer_norm.default), lambda sig: with_split(sig, "d2", Split())),
    "a softmax that communicates is a softmax of each part": (first(aten.softmax.int), lambda sig: replace(sig, local=run_as_is)),
    "the causal mask is forgotten": (
        first(aten.scaled_dot_product_attention.default, lambda case: len(case.op.args) > 5),
        lambda sig: with_split(sig, "q", Split()),
    ),
    "a mean of means": (first(aten.mean.default), lambda sig: replace(sig, local=run_as_is)),
    "pieces are not blocks": (first(aten.cat.default), lambda sig: replace(sig, outputs=((sig.outputs[0][0], ("n", "pieces")),))),
    "each rank looks up all rows": (first(aten.embedding.default), lambda sig: replace(sig, local=run_as_is)),
    "each rank has statistics of its own": (first(operators.batch_norm), lambda sig: replace(sig, local=run_as_is)),
    "each rank draws from the start": (first(operators.keyed_dropout), lambda sig: replace(sig, local=run_as_is)),
    "each rank has a softmax of its own": (first(operators.cross_entropy_sum), lambda sig: replace(sig, local=run_as_is)),
    "a loss that communicates is cut": (
        first(operators.cross_entropy_sum, lambda case: case.tensors[0].shape[1] % 2 == 0),
        lambda sig: with_split(sig, "v", Split(others="I", blocked=False)),
    ),
    "dims are mixed up": (first(aten.transpose.int), lambda sig: replace(sig, outputs=sig.inputs)),
    "a factor is neither split nor explained": (first(aten.layer_norm.default), lambda sig: replace(sig, reasons={})),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_wrong_rule_is_caught(name: str) -> None:
    case, spoil = SPOILT[name]
    sig = signature_of(case.op)
    check_rule(case, sig)
    with pytest.raises((AssertionError, Mismatch)):
        check_rule(case, spoil(sig))


REMOVED = [
    (target, factor)
    for target, factors in {
        aten.linear.default: ("b0", "b1", "k", "n"),
        aten.matmul.default: ("b0", "m", "k", "n"),
        aten.add.Tensor: ("d0", "d1"),
        aten.scaled_dot_product_attention.default: ("b0", "b1", "q", "e"),
        aten.conv2d.default: ("n", "i", "o"),
        aten.embedding.default: ("d0", "d1", "h"),
        aten.reshape.default: ("f0", "f1"),
        aten.split.Tensor: ("d0", "n"),
        aten.cat.default: ("d0", "n"),
        aten.sum.default: ("d0", "d1"),
        aten.layer_norm.default: ("d0", "d1"),
        aten.index.Tensor: ("d1", "r0"),
        operators.cross_entropy_sum: ("d0",),
        operators.batch_norm: ("c",),
    }.items()
    for factor in factors
]


@pytest.mark.parametrize(("target", "factor"), REMOVED, ids=lambda value: value if isinstance(value, str) else operator_name(value))
def test_a_missing_factor_is_caught(target: Any, factor: str) -> None:
    case = first(target)
    sig = signature_of(case.op)
    assert not missing_splits(case, sig).keys() - LEFT_OUT.get(case.op.name, {}).keys()
    poorer = replace(sig, splits={name: split for name, split in sig.splits.items() if name != factor})
    assert missing_splits(case, poorer).keys() - LEFT_OUT.get(case.op.name, {}).keys()


def test_a_missing_sum_is_caught() -> None:
    case = first(aten.mul.Tensor)
    assert missing_splits(case, replace(signature_of(case.op), linear=())) == {"R, P": "P", "P, R": "P"}
