"""`shardwise rules`: the list, and how a call would be split."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from shardwise.capture import operators
from shardwise.capture.normalize import _REWRITES, rewriting
from shardwise.cli import app
from shardwise.errors import RuleError
from shardwise.rule_report import known_rules, show_rule, targets_named
from shardwise.sharding import discover
from shardwise.sharding.rules import RULES
from shardwise.sharding.rules.examples import EXAMPLES, Example, example_call

aten = torch.ops.aten


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["rules", *arguments])


def test_all_operators_are_listed() -> None:
    lines = run().output.splitlines()
    assert len(lines) == len(RULES)
    (linear,) = (line for line in lines if line.startswith("aten.linear.default "))
    assert linear.split()[1] == "matmul" and "Megatron's row" in linear
    listed = json.loads(run("--json").output)
    assert {"operator": "aten.mm.default", "family": "matmul"}.items() <= next(
        e for e in listed if e["operator"] == "aten.mm.default"
    ).items()
    assert all(each.doc for each in known_rules())


def test_how_a_linear_layer_is_split() -> None:
    for name in ("linear", "aten.linear.default", "aten::linear", "aten.linear"):
        result = run(name)
        assert result.exit_code == 0
        lines = result.output.splitlines()
        assert lines[0] == "aten.linear.default  (rules/matmul.py)"
        assert "  b0 b1 k, n k, n -> b0 b1 n" in lines
        assert "  k=6   summed  S(2), S(1), P -> P  (input 2 summed)" in lines
        assert "  n=9   split  R, S(0), S(0) -> S(2)" in lines
        assert "  sums pass through it in input 0 and 2 together, or in input 1 and 2 together" in lines


def test_a_call_of_one_s_own() -> None:
    (found,) = json.loads(run("layer_norm", "--shapes", "4,8 8 8", "--args", "[8], eps=1e-6", "--json").output)
    assert found["call"] == "aten.layer_norm.default([4, 8], [8], [8], [8], eps=1e-06) -> [4, 8]"
    by_name = {each["name"]: each for each in found["factors"]}
    assert by_name["d0"]["how"] == "split" and by_name["d0"]["inputs"] == ["S(0)", "R", "R"]
    assert by_name["d1"]["how"] == "whole" or "communicate" in by_name["d1"]["note"]
    assert found["linear"] == [] and "no sum passes" in str(show_rule(aten.layer_norm.default))


def test_constants_alone_go_with_the_example() -> None:
    assert show_rule(aten.softmax.int, args="0").call == "aten.softmax.int([4, 5, 6], 0, None) -> [4, 5, 6]"


def test_several_operators_of_a_name() -> None:
    assert [str(target) for target in targets_named("conv2d")] == ["aten.conv2d.default", "aten.conv2d.padding"]
    assert {str(target) for target in targets_named("aten.soft")} >= {"aten.softmax.int", "aten.softplus.default"}
    assert targets_named("shardwise.batch_norm") == [operators.batch_norm]


def test_an_operator_without_a_rule_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDWISE_CACHE", str(tmp_path))
    monkeypatch.setattr(discover, "_found", {})

    @torch.library.custom_op("shardwise_test::reported", mutates_args=())
    def reported(x: torch.Tensor) -> torch.Tensor:
        return x.softmax(-1)

    reported.register_autograd(lambda ctx, gradient: gradient, setup_context=lambda ctx, inputs, output: None)
    text = run("shardwise_test::reported", "--shapes", "4,6").output
    assert "No rule of shardwise's: it is run on small parts to find one." in text
    assert "a b -> a b (found by running it)" in text and "b=6  whole  (no way of splitting it was found" in text


def test_what_capture_rewrites_needs_no_rule() -> None:
    lines = run("aten.embedding_bag").output.splitlines()
    assert lines[0] == "aten.embedding_bag.default"
    assert lines[1] == "  It needs no rule: capture makes other operators of it."
    assert "shardwise.bag_of_rows" in lines[2] and "shardwise.bag_of_runs" in lines[2]
    (told,) = json.loads(run("aten.embedding_bag.padding_idx", "--json").output)
    assert told["source"] == "rewritten" and not told["signature"]
    assert show_rule(aten.embedding.default).source == "rule", "rewritten sometimes, and split where it is not"


@pytest.mark.parametrize("target", [target for target in _REWRITES if target not in RULES], ids=str)
def test_what_is_made_of_an_operator_has_rules(target: Any) -> None:
    named = re.findall(r"`([\w.]+)`", rewriting(target) or "")
    assert named and all(set(targets_named(each)) <= set(RULES) for each in named), "its description names operators that are split"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["liner"], "no operator liner is known; is it one of linear"),
        (["xyzzyxyzzy"], "`shardwise rules` lists them"),
        (["aten.no_such_operator"], "no operator aten.no_such_operator is known"),
        (
            ["linear", "--shapes", "4,5 9,7"],
            r"does not take the shapes '4,5 9,7' and constants '': .*; its form: aten::linear",
        ),
        (["linear", "--shapes", "4;5"], r"shapes '4;5' are not understood \(.*\); write them as .4,5,6 9,6 9. or"),
        (["linear", "--shapes", "4,5:text"], "shapes '4,5:text' are not understood"),
        (["softmax", "--shapes", "4,5", "--args", "dim="], "constants 'dim=' are not understood"),
        (["linear", "--shapes", "4,5 9,5 9 9"], "takes no 4 tensors and 0 constants"),
    ],
)
def test_wrong_input(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert re.search(message, result.stderr)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_is_a_call_that_its_rule_describes(name: str) -> None:
    for target in (target for target in RULES if (str(target) if hasattr(target, "_schema") else f"shardwise.{target.__name__}") == name):
        shown = show_rule(target)
        assert shown.signature and shown.source == "rule", name
        assert len({each.name for each in shown.factors}) == len(shown.factors)


def test_types_and_scalars_in_a_call() -> None:
    op = example_call(aten.to.dtype, Example(shapes="4,6:bool", args="torch.float64"))
    assert (op.inputs[0].dtype, op.outputs[0].dtype) == (torch.bool, torch.float64)
    assert example_call(aten.add.Tensor, Example(shapes="4 -")).inputs[1].shape == ()
    with pytest.raises(RuleError, match="constants 'open' are not understood"):
        example_call(aten.relu.default, Example(shapes="4", args="open"))
