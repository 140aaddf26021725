"""Rules that users declare in one line: read, tried on small tensors, and dropped when they are wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.sharding.brute_force import check_rule, sample
from torch import Tensor

import shardwise as sw
from shardwise.errors import RuleError, ShardwiseWarning
from shardwise.sharding import declare
from shardwise.sharding.rules import signature_of

randn = torch.randn


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No declarations, nothing remembered, one thread."""
    monkeypatch.setenv("SHARDWISE_CACHE", str(tmp_path))
    monkeypatch.setattr(declare, "_DECLARED", {})
    monkeypatch.setattr(declare, "_found", {})
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x @ weight.T if bias is None else x @ weight.T + bias


def gated(x: Tensor, gate: Tensor) -> Tensor:
    return torch.softmax(x, -1) * gate


def heads(x: Tensor, gate: Tensor) -> Tensor:
    return (x.unflatten(-1, gate.shape) * gate).flatten(-2)


def repeated(x: Tensor) -> Tensor:
    return x.unsqueeze(0).expand(3, -1).contiguous()


Case = tuple[Callable[..., Tensor], str, str, tuple[Tensor, ...], str, set[str]]

RIGHT: dict[str, Case] = {
    "linear": (linear, "b k, n k -> b n", "", (randn(4, 6), randn(9, 6)), "b k, n k -> b n", {"b", "k", "n"}),
    "with a bias": (linear, "b k, n k, n -> b n", "", (randn(4, 6), randn(9, 6), randn(9)), "b k, n k, n -> b n", {"b", "k", "n"}),
    "the sum is kept whole": (linear, "b k, n k -> b n", "k", (randn(4, 6), randn(9, 6)), "b k, n k -> b n", {"b", "n"}),
    "any dims": (linear, "... k, n k -> ... n", "k", (randn(2, 4, 6), randn(9, 6)), "e0 e1 k, n k -> e0 e1 n", {"e0", "e1", "n"}),
    "a product": (heads, "b (h d), h d -> b (h d)", "d", (randn(4, 15), randn(5, 3)), "b (h d), h d -> b (h d)", {"b", "h"}),
    "broadcast": (gated, "b k, b k -> b k", "k", (randn(4, 6), randn(1, 6)), "b k, 1 k -> b k", {"b"}),
    "only in the result": (repeated, "b -> n b", "", (randn(4),), "b -> n b", {"b"}),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_rule(name: str) -> None:
    function, text, kept, tensors, signature, splits = RIGHT[name]
    sw.declare_rule(function, text, whole=kept)
    case = sample(function, *(each.double() for each in tensors))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = signature_of(case.op)
    assert (found.source, str(found), set(found.splits)) == ("declared", signature, splits)
    check_rule(case, found)
    assert set(found.reasons) >= set(kept.split())


def test_what_is_added_once_is_a_summand() -> None:
    sw.declare_rule(linear, "b k, n k, n -> b n")
    found = signature_of(sample(linear, randn(4, 6), randn(9, 6), randn(9)).op)
    assert found.splits["k"].addends == {2} and found.splits["n"].addends == set()
    assert found.linear == (frozenset({0, 2}), frozenset({1, 2}))


def test_an_operator_of_torch_library() -> None:
    @torch.library.custom_op("shardwise_test::declared_row", mutates_args=())
    def row(x: Tensor) -> Tensor:
        return x.softmax(-1)

    operator = torch.ops.shardwise_test.declared_row
    for name in ("shardwise_test::declared_row", "shardwise_test.declared_row.default", operator, operator.default):
        declare._DECLARED.clear()
        sw.declare_rule(name, "b n -> b n", whole=["n"])
        assert signature_of(sample(operator.default, randn(4, 6), frozen=[0]).op).source == "declared"


WRONG: dict[str, tuple[Callable[..., Tensor], str, tuple[Tensor, ...], str]] = {
    "what is normalised is split": (gated, "b k, k -> b k", (randn(4, 6), randn(6)), 'split over k .*whole="k" would keep it whole'),
    "dims are mixed up": (gated, "k b, b -> k b", (randn(4, 6), randn(6)), "split over b "),
    "the result is transposed": (lambda x: x.T.contiguous(), "a b -> a b", (randn(6, 6),), "split over a |describe|is not"),
    "random": (lambda x: x + torch.randn(()), "a -> a", (randn(6),), "other numbers each time"),
    "nothing to try": (lambda x: x * float("nan"), "a -> a", (randn(6),), "refuses small random inputs"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_dropped(name: str) -> None:
    function, text, tensors, message = WRONG[name]
    sw.declare_rule(function, text)
    op = sample(function, *tensors).op
    with pytest.warns(
        ShardwiseWarning, match=rf"the declared rule '{text}' of shardwise\..* is dropped and the operator kept whole: .*({message})"
    ):
        found = signature_of(op)
    assert (found.source, found.splits, found.linear) == ("whole", {}, ())
    with warnings.catch_warnings():  # it is said once
        warnings.simplefilter("error")
        assert signature_of(op) == found


@pytest.mark.parametrize(
    ("text", "kept", "message"),
    [
        ("b k, n k", "", r"must read `inputs -> outputs`, as in declare_rule\("),
        ("a -> b -> c", "", "must read `inputs -> outputs`"),
        ("a ->", "", "must read `inputs -> outputs`"),
        ("a b) -> a", "", "a closing bracket too many"),
        ("(a b -> a", "", "an opening bracket too many"),
        ("a-b -> a", "", "'a-b' is no name of a factor"),
        ("a -> a", "n", "whole names n, which 'a -> a' of mylib.op.default does not have; it has a"),
    ],
)
def test_a_text_that_cannot_be_read(text: str, kept: str, message: str) -> None:
    with pytest.raises(RuleError, match=message):
        sw.declare_rule("mylib::op", text, whole=kept)


def test_an_operator_with_a_rule_or_several_forms() -> None:
    with pytest.raises(RuleError, match=r"aten\.linear\.default has a rule of shardwise's own.*shardwise rules aten\.linear\.default"):
        sw.declare_rule("aten::linear", "b k, n k -> b n")
    with pytest.raises(RuleError, match=r"aten.add is several operators: .*; declare one of them, as aten\.add\."):
        sw.declare_rule(torch.ops.aten.add, "a, a -> a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("b k, n k -> b n", r"has 2 tensors where the call in sample reads 3: \[input0:float32\[4, 6\], .*; write the dims of each, as in"),
        ("b k, n k, n -> b n, n", "has 2 tensors where the call in sample makes 1"),
        ("b k, n, n -> b n", r"has 1 dims for input1:float32\[9, 6\], which has 2; an example: declare_rule"),
        ("b k, k n, n -> b n", r"does not describe its call in sample: k=9 is not the 6 of input0|does not describe its call .*is not the"),
        ("(b c) k, n k, n -> (b c) n", "the sizes of b, c do not follow from the shapes"),
    ],
)
def test_a_rule_that_does_not_describe_the_call(text: str, message: str) -> None:
    sw.declare_rule(linear, text)
    with pytest.raises(RuleError, match=message):
        signature_of(sample(linear, randn(4, 6), randn(9, 6), randn(9)).op)


def test_a_later_declaration_replaces_an_earlier_one() -> None:
    op = sample(linear, randn(4, 6), randn(9, 6)).op
    kept: Any = {"n", "b", "k"}
    for whole in ("n", "b n", ""):
        sw.declare_rule(linear, "b k, n k -> b n", whole=whole)
        assert set(signature_of(op).splits) == kept - set(whole.split())
