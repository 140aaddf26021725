"""Rules found by running an operator: they are right, they are those that people wrote, and what cannot be found is kept whole."""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.sharding.brute_force import Sample, check_rule, offered, sample
from tests.sharding.samples import samples
from torch import Tensor

from shardwise.errors import ShardwiseWarning
from shardwise.sharding import discover, patience, rule_cache
from shardwise.sharding.discover import resolved
from shardwise.sharding.finding import Finding, Misfit, whole
from shardwise.sharding.rules import RULES, signature_of
from shardwise.sharding.signature import Choice, Signature, Split, dims, variant

aten = torch.ops.aten
randn = torch.randn


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of one's own, nothing remembered, one thread."""
    monkeypatch.setenv("SHARDWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(discover, "_found", {})
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


# -- rules that people wrote are found again ---------------------------------------------------------------------------------------------

KNOWN = (
    *(aten.linear.default, aten.addmm.default, aten.bmm.default, aten.matmul.default, aten.add.Tensor, aten.mul.Tensor, aten.gelu.default),
    *(aten.where.self, aten.masked_fill.Scalar, aten.softmax.int, aten.layer_norm.default, aten.group_norm.default, aten.conv2d.default),
    *(aten.scaled_dot_product_attention.default, aten.embedding.default, aten.transpose.int, aten.unsqueeze.default, aten.cat.default),
    *(aten.sum.dim_IntList, aten.mean.dim, aten.gather.default, aten.cumsum.default, aten.avg_pool2d.default),
)


def first_of_each() -> list[Sample]:
    found: dict[Any, Sample] = {}
    for case in samples():
        if case.op.target in KNOWN:
            found.setdefault(case.op.target, case)
    return list(found.values())


CASES = first_of_each()


def test_they_are_all_tried() -> None:
    assert {case.op.target for case in CASES} == set(KNOWN)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_known_rule_is_found(case: Sample) -> None:
    """Everything that is found is right, and offered by the rule that people wrote; what that offers beyond it needs code of its own."""
    found, known = resolved(case.op), signature_of(case.op)
    assert found.source == "discovered", found.reasons
    check_rule(case, found)
    for name in found.splits:
        if found.sizes[name] > 1:
            types = variant(case.op, found, Choice("split", name), found.sizes, 2).inputs
            assert offered(case, known, types), f"{case}, {known}: {types} was found and is not offered"
    if case.op.target not in (aten.layer_norm.default, aten.group_norm.default):  # which do not offer weights that are sums
        assert set(found.linear) <= set(known.linear)


def test_all_of_a_linear_layer_is_found() -> None:
    found = resolved(sample(aten.linear.default, randn(4, 5, 6), randn(9, 6), randn(9)).op)
    assert str(found) == "a b c, d c, d -> a b d"
    assert found.splits == {
        name: Split(blocked=False, addends=frozenset({2} if name == "c" else ())) for name in "abcd"
    }  # with the dim of sums split (Megatron's row) the bias is a summand
    assert found.linear == (frozenset({0, 2}), frozenset({1, 2}))


# -- operators of a user's ---------------------------------------------------------------------------------------------------------------


MM = (randn(4, 5, 6), randn(6, 7))


def differentiated(name: str, function: Callable[..., Tensor]) -> Any:
    """A torch operator that autograd knows nothing of but its backward."""
    namespace = f"shardwise_test::{name}"
    tensors = function.__code__.co_argcount
    schema = f"({', '.join(f'Tensor x{index}' for index in range(tensors))}) -> Tensor"
    operator = torch.library.custom_op(namespace, function, mutates_args=(), schema=schema)

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, gradient: Tensor) -> Any:
        with torch.enable_grad():
            leaves = [each.detach().requires_grad_() for each in ctx.saved_tensors]
            return torch.autograd.grad(function(*leaves), leaves, gradient)

    operator.register_autograd(backward, setup_context=setup)
    return getattr(torch.ops.shardwise_test, name).default


OPERATORS = {
    "gated": (lambda x, gate: torch.softmax(x, -1) * gate, (randn(4, 5, 6), randn(6)), "a b c, c -> a b c", {"a", "b"}, {(1,)}),
    "rows": (lambda x: x / x.norm(dim=-1, keepdim=True), (randn(4, 6),), "a b -> a b", {"a"}, set()),
    "energy": (lambda x: (x * x).sum(), (randn(4, 6),), "a b -> ·", {"a", "b"}, set()),
    "total": (lambda x: x.sum(0), (randn(4, 6),), "a b -> b", {"a", "b"}, {(0,)}),
    "flat": (
        lambda x, y: (x @ y).flatten(0, 1),
        (randn(4, 5, 6), randn(6, 7)),
        "a b c, c d -> (a b) d",
        {"a", "b", "c", "d"},
        {(0,), (1,)},
    ),
    "far_limit": (lambda x: x.clamp(-20, 20), (randn(4, 6),), "a b -> a b", {"a", "b"}, set()),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_a_custom_operator(name: str) -> None:
    function, tensors, text, split, linear = OPERATORS[name]
    case = sample(differentiated(name, function), *(each.double() for each in tensors))
    found = signature_of(case.op)
    assert (found.source, str(found), set(found.splits)) == ("discovered", text, split)
    assert {tuple(sorted(each)) for each in found.linear} == linear
    check_rule(case, found)
    assert set(found.reasons) == set(found.sizes) - split


def test_parts_that_must_be_equal() -> None:
    """An operator that takes no odd sizes is tried on its own, on many ranks: on eight it would get single elements and refuse them."""

    def halves(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)

    found = resolved(sample(halves, randn(6, 8)).op)
    assert {name: split.uneven for name, split in found.splits.items()} == {"a": True}


def test_an_operator_that_takes_only_its_own_sizes() -> None:
    def fixed(x: Tensor) -> Tensor:
        return x.reshape(4, 2, 8).softmax(1)

    found = resolved(sample(fixed, randn(4, 16)).op)
    assert found.source == "whole"  # on parts it would need other constants

    def of_sixteen(x: Tensor) -> Tensor:
        assert x.shape[-1] == 16
        return x.softmax(-1)

    found = resolved(sample(of_sixteen, randn(6, 16)).op)
    assert (found.source, list(found.splits)) == ("discovered", ["a"])


def test_many_tensors() -> None:
    """Of a call with many tensors the batch and the last weight's columns are found, though not every combination is tried."""

    def network(x: Tensor, mask: Tensor, *weights: Tensor) -> Tensor:
        for weight in weights:
            x = torch.tanh(x @ weight)
        return x * mask

    case = sample(network, randn(4, 6), torch.rand(4, 1) > 0.5, *(randn(6, 6) for _ in range(4)))
    found = resolved(case.op)
    assert (found.source, str(found), list(found.splits)) == ("discovered", "a b, a 1, b b, b b, b b, b c -> a c", ["a", "c"])


# -- what is kept whole ------------------------------------------------------------------------------------------------------------------


def noisy(x: Tensor) -> Tensor:
    return x + torch.randn(())


def mixes(x: Tensor) -> Tensor:
    return x.cumsum(0).softmax(1) * x.amax()


def changes(x: Tensor, count: Tensor) -> Tensor:
    count += 1
    return x * 1.0


WHOLE: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], str]] = {
    "random": (noisy, (randn(4, 6),), "other numbers each time"),
    "mixes all": (mixes, (randn(4, 6),), "no way of splitting it"),
    "changes an input": (changes, (randn(4, 6), torch.tensor(0)), "changes what it reads"),
    "always zero": (lambda x: torch.relu(-x.abs() - 1), (randn(4, 6),), "makes nothing of them"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_kept_whole(name: str) -> None:
    function, tensors, reason = WHOLE[name]
    case = sample(function, *tensors)
    found = signature_of(case.op)
    assert found.source == "whole" and not found.splits and not found.linear
    assert reason in found.reasons["*"]
    if name == "mixes all":
        check_rule(case, found)


def test_an_operator_that_hangs_or_crashes_is_kept_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PATIENCE_S", 0.2)
    monkeypatch.setattr(patience, "_GRACE_S", 0.1)

    def hangs(x: Tensor) -> Tensor:
        if x.shape[0] != 33:
            time.sleep(60)
        return x + 1

    def crashes(x: Tensor) -> Tensor:
        if x.shape[0] != 33:
            ctypes.string_at(0)
        return x + 1

    for function, reason in ((hangs, "does not return"), (crashes, "SIGSEGV")):
        with pytest.warns(ShardwiseWarning, match=f"shardwise.{function.__name__} is kept whole: .*{reason}"):
            found = resolved(sample(function, randn(33, 4)).op)
        assert found.source == "whole"


def test_it_also_runs_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where processes cannot be forked, and without the caller's modes."""
    monkeypatch.setattr(patience, "_may_fork", lambda: False)
    op = sample(aten.mm.default, randn(4, 6), randn(6, 5)).op
    state = torch.get_rng_state()
    with torch.no_grad():
        assert resolved(op).source == "discovered"
    assert torch.equal(torch.get_rng_state(), state)


def test_a_rule_that_does_not_fit_its_call_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    case = sample(aten.square.default, randn(4, 6))

    def raising(op: Any) -> Signature:
        raise IndexError("tuple index out of range")

    for wrong, message in (
        (raising, "IndexError: tuple index out of range"),
        (lambda op: Signature(inputs=(), outputs=(), sizes={}), "it describes other tensors"),
    ):
        monkeypatch.setitem(RULES, aten.square.default, wrong)
        with pytest.warns(
            ShardwiseWarning, match=f"the rule of aten.square.default in sample does not fit the call and is not used: {message}"
        ):
            assert signature_of(case.op).source == "discovered"


# -- what is kept between runs -----------------------------------------------------------------------------------------------------------


def cached_file(directory: Path) -> Path:
    (found,) = (directory / "rules").iterdir()
    return found


def test_a_finding_is_kept_and_checked_when_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    op = sample(aten.linear.default, randn(4, 6), randn(9, 6), randn(9)).op
    first = resolved(op, tmp_path)
    searched: list[Any] = []
    monkeypatch.setattr(discover, "_found", {})
    monkeypatch.setattr(discover, "_searched", lambda op, clock: searched.append(op))
    assert resolved(op, tmp_path) == first and not searched
    assert resolved(sample(aten.linear.default, randn(8, 10), randn(3, 10), randn(3)).op, tmp_path).sizes["a"] == 8

    path = cached_file(tmp_path)
    spoilt = json.loads(path.read_text())
    spoilt["splits"]["b"]["addends"] = []  # the bias would be added once a rank
    path.write_text(json.dumps(spoilt))
    monkeypatch.undo()
    monkeypatch.setattr(discover, "_found", {})
    assert resolved(op, tmp_path) == first
    assert json.loads(path.read_text())["splits"]["b"]["addends"] == [2]


@pytest.mark.parametrize("content", [b"", b"{", b'{"key": "another"}', b"\xff\xfe", b'{"key": "k", "shapes": [], "signature": "a"}'])
def test_a_damaged_file_is_written_anew(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    op = sample(aten.mm.default, randn(4, 6), randn(6, 5)).op
    first = resolved(op, tmp_path)
    path = cached_file(tmp_path)
    good = path.read_bytes()
    path.write_bytes(content)
    monkeypatch.setattr(discover, "_found", {})
    assert resolved(op, tmp_path) == first
    assert path.read_bytes() == good


def test_that_an_operator_is_kept_whole_is_kept_for_its_shapes(tmp_path: Path) -> None:
    op = sample(mixes, randn(4, 6)).op
    assert resolved(op, tmp_path).source == "whole"
    kept = rule_cache.cached(op, tmp_path)
    assert kept is not None and kept.finding is None and "no way" in kept.reason
    assert rule_cache.cached(sample(mixes, randn(4, 8)).op, tmp_path) is None


def test_a_directory_that_cannot_be_written_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert resolved(sample(aten.mm.default, randn(4, 6), randn(6, 5)).op, tmp_path / "file").source == "discovered"


def test_the_key_tells_versions_constants_and_dims_of_one_apart() -> None:
    def keys(*calls: Sample) -> int:
        return len({rule_cache.call_key(case.op) for case in calls})

    softmax = aten.softmax.int
    assert keys(sample(softmax, randn(4, 6), 0), sample(softmax, randn(8, 2), 0)) == 1
    assert keys(sample(softmax, randn(4, 6), 0), sample(softmax, randn(4, 6), 1), sample(softmax, randn(4, 1), 0)) == 3
    assert keys(sample(softmax, randn(4, 6), 0), sample(softmax, randn(4, 6).double(), 0), sample(softmax, randn(4, 6), 0, frozen=[0])) == 3


# -- findings ----------------------------------------------------------------------------------------------------------------------------


def test_a_finding_fits_every_size() -> None:
    found = Finding(inputs=dims("b (h d), h d"), outputs=dims("b (h d)"))
    op = sample(lambda x, y: (x.unflatten(-1, y.shape) * y).flatten(-2), randn(4, 15), randn(5, 3)).op
    assert found.on(op, "discovered").sizes == {"b": 4, "h": 5, "d": 3}


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ("a b, b", "a b", "it describes 3 tensors, and there are 2"),
        ("a", "a b", "a tensor of 1 dims, and input0:float32.4, 6. has 2"),
        ("(a c) b", "(a c) b", "the sizes of a, c do not follow"),
        ("a a", "a a", "a=6 is not the 4|a=4 is not the 6"),
    ],
)
def test_a_finding_that_does_not_fit(inputs: str, outputs: str, message: str) -> None:
    op = sample(aten.square.default, randn(4, 6)).op
    with pytest.raises(Misfit, match=message):
        Finding(inputs=dims(inputs), outputs=dims(outputs)).on(op, "discovered")


def test_whole_describes_every_tensor() -> None:
    op = sample(aten.mm.default, randn(4, 6), randn(6, 5)).op
    found = whole(op, "because")
    assert str(found) == "d0 d1, d2 d3 -> d4 d5" and found.reasons == {"*": "because"}
    check_rule(sample(aten.mm.default, randn(4, 6), randn(6, 5)), found)
