"""Plan files: read back as written, edited by hand, damaged, and for something else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.clusters import made_up
from tests.models import llama, mlp

import shardwise as sw
from shardwise.capture.export import capture
from shardwise.capture.graph import Graph
from shardwise.planner.apply import apply_plan
from shardwise.planner.plan import by_pattern, choice_text, looked_up, read_choice, read_placement
from shardwise.planner.preflight import preflight
from shardwise.sharding.signature import Choice
from shardwise.sharding.types import I, R, Shard


@pytest.fixture(scope="module")
def graph() -> Graph:
    return capture(*mlp())


@pytest.fixture(scope="module")
def plan() -> sw.Plan:
    found = sw.plan(*mlp(), made_up(4), "tp=2,pp=2,microbatches=2")
    assert isinstance(found, sw.Plan)
    return found


def edited(plan: sw.Plan, change: Callable[[dict[str, Any]], None]) -> str:
    document = json.loads(plan.model_dump_json())
    change(document)
    return json.dumps(document)


def test_a_saved_plan_comes_back(plan: sw.Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    assert sw.Plan.load(path) == plan
    document = json.loads(path.read_text())
    assert document["format_version"] == 1 and document["stages"][0].startswith("net.0:")
    assert sw.simulate(sw.Plan.load(path)).step_time_s == plan.predicted.step_time_s


def test_equal_blocks_have_one_entry() -> None:
    two, three = (sw.plan(*llama(layers=layers), made_up(2), "tp=2") for layers in (2, 3))
    assert isinstance(two, sw.Plan) and isinstance(three, sw.Plan)
    assert two.parameters.keys() == three.parameters.keys()
    assert set(two.operators) == set(three.operators)
    assert "model.layers.*.mlp.down_proj.weight" in two.parameters


def test_a_choice_made_by_hand_is_honoured(plan: sw.Plan, graph: Graph) -> None:
    """Megatron's column and row exchanged: the program changes, and still goes together."""

    def change(document: dict[str, Any]) -> None:
        key = next(key for key in document["operators"] if "net.0:" in key or "net.*:" in key)
        document["operators"] = dict.fromkeys(document["operators"], "I") | {key: "k"}
        document["parameters"] = dict.fromkeys(document["parameters"], "I") | {"net.0.weight": "S(1)"}

    by_hand = sw.Plan.parse(edited(plan, change))
    applied = apply_plan(by_hand, graph)
    value = graph.parameters["net.0.weight"]
    assert applied.assignment.sources[value]["tp"] == Shard(1)
    first = next(op for op in graph.ops if value in op.inputs)
    assert applied.assignment.variants[first]["tp"].choice == Choice("split", "k")
    programs = preflight(by_hand, graph)
    part = next(part for part in programs[1].parameters if part.name == "net.0.weight")
    assert part.local == (256, 32)
    assert "torch.ops.shardwise.all_reduce" in str(programs[0])


def test_cuts_made_by_hand_are_honoured(plan: sw.Plan, graph: Graph) -> None:
    third = next(op.key for op in graph.ops if op.module == "net.4")
    by_hand = sw.Plan.parse(edited(plan, lambda document: document.update(stages=[document["stages"][0], third])))
    applied = apply_plan(by_hand, graph)
    assert {op.module for op, stage in applied.cut.stage_of.items() if stage == 1} >= {"net.4", "net.6"}
    assert [*preflight(by_hand, graph)[2].stages] == [1]


def key_of(document: dict[str, Any], part: str = "linear") -> str:
    return next(key for key in document["operators"] if part in key)


def set_operator(text: str) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["operators"].update({key_of(document): text})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_operator("n;"), r"choice 'n;' of net\.\S+ is not understood; write a factor, `factor blocks=3`, `factor owner=0`, I, R or P"),
        (set_operator("z"), r"net\.\S+ cannot be split over 'z': it is none of its splittable factors; it can over b0, n, k"),
        (set_operator("n blocks=7"), r"n of 256 in 7 blocks by 1 has \d+ pieces, which tp=2 does not divide"),
        (set_operator("P9"), r"net\.\S+ is not linear in its inputs: it cannot work on summands; choose I or R"),
        (lambda d: d["parameters"].update({"net.0.weight": "X"}), r"type 'X' of net\.0\.weight is not understood; write S\(0\)"),
        (lambda d: d["stages"].pop(), r"the plan has pp=2 but names 1 stage starts"),
        (lambda d: d["stages"].reverse(), r"which must be in the order of the model"),
        (lambda d: d.update(stages=["net.0:x:0", "net.9:y:0"]), r"the plan begins a stage at net\.0:x:0, which the model does not have"),
        (
            lambda d: d.update(fingerprint="0" * 16),
            r"the plan was made for Mlp with fingerprint 0000.* plan again for this model and batch",
        ),
        (
            lambda d: d["operators"].update({"net.0.gone:aten.linear.default:0": "n"}),
            r"names operator net\.0\.gone:\S+, which the model does not have",
        ),
        (lambda d: d["parameters"].update({"net.0.wieght": "S(0)"}), r"names parameter net\.0\.wieght, which the model does not have"),
        (lambda d: d["parameters"].update({"net.0.weight": "S(2)"}), r"net\.0\.weight \[256, 64\] cannot be kept as S\(2\)"),
        (
            lambda d: d["parameters"].update({"net.0.weight": "S(0, blocks=7)"}),
            r"net\.0\.weight \[256, 64\] cannot be kept as S\(0, blocks=7\)",
        ),
    ],
)
def test_edits_that_the_model_cannot_follow(plan: sw.Plan, graph: Graph, change: Callable[[dict[str, Any]], None], message: str) -> None:
    with pytest.raises(sw.PlanError, match=message):
        apply_plan(sw.Plan.parse(edited(plan, change)), graph)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "p.json is no JSON: "),
        ("", "p.json is no JSON: "),
        ("[1]", "p.json has format version None, this shardwise reads 1; make the plan again"),
        ('{"format_version": 2}', "p.json has format version 2, this shardwise reads 1; make the plan again"),
        ('{"format_version": 1}', r"p.json: \w+: Field required \(and \d+ more\); repair it or make the plan again"),
    ],
)
def test_damaged_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(sw.PlanError, match=message):
        sw.Plan.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(dp="many"), "plan: dp: Input should be a valid integer"),
        (lambda d: d.update(tpp=2), "plan: tpp: Extra inputs are not permitted"),
        (lambda d: d["predicted"].pop("step_time_s"), "plan: predicted.step_time_s: Field required"),
    ],
)
def test_damaged_entries_are_named(plan: sw.Plan, change: Callable[[dict[str, Any]], None], message: str) -> None:
    with pytest.raises(sw.PlanError, match=re.escape(message)):
        sw.Plan.parse(edited(plan, change))


def test_choices_and_types_are_read_as_they_are_written() -> None:
    for choice in (Choice("I"), Choice("R"), Choice("P"), Choice("P", linear=1), Choice("split", "n"), Choice("split", "d0", 3, 16)):
        assert read_choice(choice_text(choice), "op") == choice
    for placement in (I, R, Shard(0), Shard(1, 3), Shard(0, 1, 16), Shard(2, 2, 4)):
        assert read_placement(repr(placement), "w") == placement


def test_patterns_stand_for_equal_entries() -> None:
    entries = [("h.0.fc", "n"), ("h.1.fc", "n"), ("h.2.fc", "k"), ("head", "v")]
    found = by_pattern(entries)
    assert found == {"h.*.fc": "n", "h.2.fc": "k", "head": "v"}
    assert [looked_up(found, key) for key, _ in entries] == ["n", "n", "k", "v"]
    assert looked_up(found, "tail") is None
