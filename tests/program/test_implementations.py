"""Every collective of a program, those in rules' local code too, has the implementation that the plan's tables name for its message."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from tests.models import Example, gpt2, unet
from tests.program.support import build
from torch import fx

from shardwise.planner.plan import Chooser
from shardwise.program.build import build_programs
from shardwise.program.program import Program
from shardwise.sharding.collectives import COLLECTIVES
from shardwise.simulate.traffic import traffic_of


@pytest.mark.parametrize(("example", "layout"), [(gpt2, "dp=1,tp=2,pp=1,microbatches=1"), (unet, "dp=2,tp=1,pp=1,microbatches=1")])
def test_the_tables_are_followed(example: Callable[[], Example], layout: str) -> None:
    what = build(example(), layout)
    sizes = sorted({traffic_of(node).nbytes for node in collectives(what.programs)})
    limit = sizes[(len(sizes) - 1) // 2]  # bytes up to which the backend's own is taken
    tables = {f"{kind}/2": [(float(limit), "native"), (1e18, "exchange")] for kind in set(COLLECTIVES.values())}
    choose = Chooser.of(tables)  # type: ignore[arg-type]
    programs = build_programs(what.applied.assignment, what.applied.cut, what.plan.tables, choose, device=torch.device("cpu"))
    found = {(str(node.args[-1]), traffic_of(node).nbytes <= limit) for node in collectives(programs)}
    assert found == {("native", True)} | ({("exchange", False)} if len(sizes) > 1 else set())
    assert len(sizes) > 1 or example is gpt2


def collectives(programs: dict[int, Program]) -> Iterator[fx.Node]:
    for program in programs.values():
        for stage in program.stages.values():
            for graph in stage.graphs.values():
                yield from (node for node in graph.nodes if node.target in COLLECTIVES)
