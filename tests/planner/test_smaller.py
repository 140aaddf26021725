"""The next smaller plan is one that can be made, and takes what was said."""

from __future__ import annotations

import pytest
import torch
from tests.clusters import made_up
from tests.models import mlp

import shardwise as sw
from shardwise.capture.export import capture
from shardwise.planner.smaller import memory_table, next_smaller, smaller_text
from shardwise.runtime.exhausted import explained, wanted_bytes


@pytest.mark.parametrize(
    ("make", "ranks", "layout", "expected"),
    [
        (lambda: mlp(hidden=512), 2, "dp=2,microbatches=1,zero=0", "microbatches=1,schedule=1f1b,zero=1"),
        (lambda: mlp(samples=16384), 1, "dp=1,microbatches=1", "microbatches=2,schedule=1f1b"),
    ],
)
def test_the_next_smaller_plan_takes_what_was_said(make: object, ranks: int, layout: str, expected: str) -> None:
    model, batch = make()  # type: ignore[operator]
    plan = sw.plan(model, batch, made_up(ranks), layout=layout)
    assert isinstance(plan, sw.Plan)
    found = next_smaller(plan, capture(model, batch))
    assert found is not None and expected in found.layout
    assert found.memory_bytes <= 0.95 * max(plan.predicted.memory_bytes)
    again = sw.plan(model, batch, made_up(ranks), layout=found.layout)
    assert isinstance(again, sw.Plan)
    assert max(again.predicted.memory_bytes) == found.memory_bytes


def test_a_layout_that_was_considered_is_known_to_take_less() -> None:
    model, batch = mlp()
    plan = sw.plan(model, batch, made_up(2))
    assert isinstance(plan, sw.Plan)
    most = max(plan.predicted.memory_bytes)
    others = [
        each.model_copy(update={"memory_bytes": nbytes, "step_time_s": seconds, "note": note})
        for each, nbytes, seconds, note in zip(
            [plan.considered[0]] * 4,
            [most, most // 2, most // 3, most // 4],
            [1.0, 3.0, 2.0, 0.5],
            ["", "", "", "does not fit"],
            strict=True,
        )
    ]
    found = next_smaller(plan.model_copy(update={"considered": others}), capture(model, batch))
    assert found is not None and found.memory_bytes == most // 3


def test_what_is_told_names_rank_stage_and_both_numbers() -> None:
    model, batch = mlp(hidden=256)
    plan = sw.plan(model, batch, made_up(2), layout="dp=2,microbatches=1")
    assert isinstance(plan, sw.Plan)
    graph = capture(model, batch)
    told = str(explained(plan, graph, rank=1, where="stage 0", doing="forward 0 of step 3", wanted=5 * 10**8, held=12 * 10**8))
    assert told.startswith("rank 1 of 2 (stage 0) ran out of memory in forward 0 of step 3: it asked for 0.5 GB more when it held 1.2 GB")
    assert memory_table(plan.predicted.by_kind[1]) in told and smaller_text(plan, graph) in told
    assert "zero=" in told


def test_which_errors_are_about_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert wanted_bytes(caught.value) == 1 << 60
    assert wanted_bytes(MemoryError()) == 0
    assert wanted_bytes(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has")) == 20 << 20
    assert wanted_bytes(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    outer = RuntimeError("in a stage")
    outer.__cause__ = MemoryError()
    assert wanted_bytes(outer) == 0
