"""Random mixes of everything that a layout can say are verified, and what is drawn covers it all."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from benchmarks.mixes import Mixed, draw, examine, summary

from benchmarks import mixes
from shardwise.capture.precision import Precision
from shardwise.planner.layout import Layout
from shardwise.program.recompute import RECOMPUTE
from shardwise.program.tables import NAMES
from shardwise.sharding.context import ATTENTION
from shardwise.verify.coverage import Row


def test_all_that_a_layout_can_say_is_drawn() -> None:
    source = random.Random(1)
    drawn = [Layout.parse(draw(source)) for _ in range(400)]
    assert {each.mesh for each in drawn} == set(mixes.MESHES)
    assert {each.schedule for each in drawn} == {None, *NAMES}
    assert {each.zero for each in drawn} == {None, 1, 2, 3}
    assert {each.recompute for each in drawn} == set(RECOMPUTE)
    assert any(each.shard == 2 for each in drawn) and {each.ep for each in drawn} == {None}
    assert {each.attention for each in drawn} == {None, *ATTENTION} and {each.shares for each in drawn} == {None, (3, 1)}
    assert {each.chunks for each in drawn} == {None, 2, 3}
    assert {each.ep for each in (Layout.parse(draw(source, experts=True)) for _ in range(100))} == {None, 2, 4}


@pytest.mark.parametrize(
    ("model", "precision"),
    [("decoders.gpt2", "float32"), ("decoders.gpt2", "bf16"), ("encoders.bert_masked", "float32"), ("corner_cases.transformer", "float32")],
)
def test_mixes_give_the_numbers_of_one_device(model: str, precision: Precision, made_up_machine: None) -> None:
    source = random.Random(model)
    family, name = model.split(".")
    found = examine(family, name, tuple(draw(source) for _ in range(5)), precision)
    text, _ = summary([found])
    assert "0 wrong" in text, found.rows
    assert any(row.status == "verified" for row in found.rows)
    assert any(row.status == "verified" for row in found.low) == (precision != "float32")


def row(status: str, error: float | None = None) -> Row:
    return Row(layout="dp=2", status=status, error=error)  # type: ignore[arg-type]


def test_the_summary_counts() -> None:
    fine = Mixed(model="a.b", rows=[row("verified", 1e-16), row("verified", 2e-15), row("infeasible")], seconds=1.0)
    assert summary([fine]) == ("2 of 3 mixes verified, largest relative error 2.0e-15; 1 refused, 0 wrong", True)
    assert not summary([replace(fine, rows=[row("verified", 1e-16), *[row("infeasible")] * 2])])[1]
    assert not summary([fine, replace(fine, rows=[row("differs", 0.1)])])[1]
    assert not summary([fine, replace(fine, rows=[row("failed")])])[1]
    text, well = summary([replace(fine, precision="bf16", low=[row("verified", 1e-2), row("infeasible")])])
    assert well and text.endswith("1 refused, 0 wrong; 1 of 1 in 16 bits as near as one device")
    assert not summary([replace(fine, precision="bf16", low=[row("differs", 0.5)])])[1]
