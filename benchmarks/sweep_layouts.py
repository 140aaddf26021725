"""All layouts of a model that the planner can emit for this machine, each as a saved plan, with the one that it chooses by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.workloads import Workload
from shardwise.capture.export import capture
from shardwise.cluster.model import Cluster
from shardwise.errors import ShardwiseError
from shardwise.planner.layout import Layout, completions
from shardwise.planner.plan import Plan, simulate
from shardwise.planner.search import search
from shardwise.program.tables import NAMES
from shardwise.program.trace import Tracer
from shardwise.simulate.simulator import Simulation

OPTIMIZER = "adamw"
USUAL = "1f1b"


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One plan. actions: what the simulator says that each kind of action takes, s, the mean over the ranks; memory_bytes: of each rank."""

    name: str
    path: Path
    chosen: bool
    step_time_s: float
    memory_bytes: tuple[int, ...]
    actions: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A layout that there is no plan for, and why."""

    layout: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Space:
    """What there is to run, the plan that was chosen among it, and what cannot be."""

    plans: tuple[Planned, ...]
    refused: tuple[Refused, ...]


def every_layout(ranks: int, samples: int) -> list[Layout]:
    """Every complete layout that can be pinned, but for those that only save memory (ZeRO, recomputation), and each way of running it once:
    schedules that order the computations alike are one, and without a pipeline there is one schedule."""
    found: dict[object, Layout] = {}
    for pinned in _pins(ranks):
        for layout in completions(pinned, ranks, samples, ""):
            if layout.schedule == USUAL or layout.mesh[-1] > 1:
                found.setdefault((layout.mesh, layout.microbatches, str(layout.tables)), layout)
    return list(found.values())


def _pins(ranks: int) -> Iterator[Layout]:
    """What the planner does not search by itself."""
    for name in sorted(NAMES, key=lambda name: name != USUAL):
        yield from (Layout(cp=cp, schedule=name) for cp in range(1, ranks + 1) if ranks % cp == 0)


def plan_all(workload: Workload, ranks: int, folder: Path, only: str = "") -> Space:
    """Plans every layout (of those whose text holds `only`) and lets the planner choose; the plans are saved in the folder."""
    planner = _Planner(workload, ranks)
    chosen = planner.plan(Layout())
    if isinstance(chosen, Refused):
        raise RuntimeError(f"no plan for this workload: {chosen.reason}")
    made = [planner.plan(layout) for layout in every_layout(ranks, planner.graph.global_batch) if only in str(layout)]
    plans = {plan.layout: plan for plan in made if isinstance(plan, Plan)}
    if not any(_same(plan, chosen) for plan in plans.values()):
        plans[f"{chosen.layout}, as chosen" if chosen.layout in plans else chosen.layout] = chosen
    return Space(
        plans=tuple(_saved(name, plan, chosen, folder / f"{number}.json") for number, (name, plan) in enumerate(plans.items())),
        refused=tuple(each for each in made if isinstance(each, Refused)),
    )


class _Planner:
    """Captures once; what one plan traced serves the next."""

    def __init__(self, workload: Workload, ranks: int) -> None:
        self.model = workload.family
        self.graph = capture(workload.build(), workload.batch(0))
        self.cluster, self.tracer = Cluster.parse(f"local:{ranks}"), Tracer(device=torch.device("cpu"))

    def plan(self, layout: Layout) -> Plan | Refused:
        try:
            made = search(self.graph, self.cluster, layout, OPTIMIZER, self.model, tracer=self.tracer)
        except ShardwiseError as error:
            return Refused(layout=str(layout), reason=str(error))
        return made if isinstance(made, Plan) else Refused(layout=str(layout), reason=made.reasons[0])


def _same(one: Plan, other: Plan) -> bool:
    """Whether they say that the same is run. A pinned layout may be another: what can be split is split even where it does not pay."""
    fields = ("layout", "stages", "operators", "parameters", "collectives")
    return all(getattr(one, name) == getattr(other, name) for name in fields)


def _saved(name: str, plan: Plan, chosen: Plan, path: Path) -> Planned:
    plan.save(path)
    simulation = simulate(plan)
    return Planned(
        name=name,
        path=path,
        chosen=_same(plan, chosen),
        step_time_s=simulation.step_time_s,
        memory_bytes=tuple(simulation.memory_bytes),
        actions=_by_kind(simulation),
    )


def _by_kind(simulation: Simulation) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for span in simulation.timeline:
        kind = span.action.kind.value
        seconds[kind] = seconds.get(kind, 0.0) + (span.end_s - span.start_s) / len(simulation.memory)
    return seconds
