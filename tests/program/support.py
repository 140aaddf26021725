"""All ranks' programs of a small model, planned for a made-up cluster."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from tests.clusters import made_up
from tests.models import Example
from torch import fx

from shardwise.capture.export import capture
from shardwise.capture.graph import Graph
from shardwise.planner.apply import Applied, apply_plan
from shardwise.planner.layout import Layout
from shardwise.planner.plan import Infeasible, Plan
from shardwise.planner.search import search
from shardwise.program.build import build_programs
from shardwise.program.program import Program, StageProgram

__all__ = ["Built", "build", "copied_graph", "copied_programs", "only_stage"]


@dataclass(frozen=True, kw_only=True)
class Built:
    """A plan and what is made of it."""

    graph: Graph
    plan: Plan
    applied: Applied
    programs: dict[int, Program]
    choose: Callable[[str, int, int], str]


def build(example: Example, layout: str) -> Built:
    """layout: of a mesh and microbatches; what else it does not name is the usual, so that only one is planned."""
    model, batch = example
    graph = capture(model, batch)
    pinned = Layout.parse(layout)
    usual = "interleaved" if (pinned.chunks or 1) > 1 else "1f1b"
    pinned = replace(pinned, schedule=pinned.schedule or usual, zero=pinned.zero or 0)
    plan = search(graph, made_up(pinned.ranks), pinned, "adamw", type(model).__name__)
    assert not isinstance(plan, Infeasible)
    applied = apply_plan(plan, graph)
    choose = plan.chooser()
    programs = build_programs(applied.assignment, applied.cut, plan.tables, choose, device=torch.device("cpu"))
    return Built(graph=graph, plan=plan, applied=applied, programs=programs, choose=choose)


def copied_programs(programs: dict[int, Program]) -> dict[int, Program]:
    """Programs whose lists can be changed; the graphs are shared."""
    copies = {}
    for rank, program in programs.items():
        copies[rank] = copy.copy(program)
        copies[rank].stages = {number: copy.copy(stage) for number, stage in program.stages.items()}
        owners = [(copies[rank], ("actions", "edges")), *((stage, ("parameters", "buffers")) for stage in copies[rank].stages.values())]
        for owner, names in owners:
            for name in names:
                setattr(owner, name, list(getattr(owner, name)))
    return copies


def copied_graph(graph: fx.Graph) -> fx.Graph:
    """A graph whose nodes can be changed."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    return copied


def only_stage(program: Program) -> StageProgram:
    """Of a rank that has one."""
    (stage,) = program.stages.values()
    return stage
