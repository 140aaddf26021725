"""Ours: shardwise with the layout that it chooses (or one pinned with `--layout`)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.context import RankContext
from benchmarks.processes import Child, receive
from benchmarks.scenarios import PLAIN, Scenario
from benchmarks.workloads import Batch, Workload, optimizer

if TYPE_CHECKING:  # imported by the ranks of ours alone
    from shardwise.cluster.model import Cluster

_PLAN_TIMEOUT_S = 300.0
_STATE = 4  # a parameter, its gradient and AdamW's two moments
_LATENCY_S = 100e-6  # of a message over a link between hosts


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the plan promised: seconds a step, and the peak bytes of each rank; state_bytes: of the whole model with gradients and AdamW."""

    text: str
    layout: str = ""
    step_time_s: float
    memory_bytes: tuple[float, ...]
    state_bytes: float = 0.0


def make_plan(
    workload: Workload, ranks: int, layout: str | None, path: Path, scenario: Scenario = PLAIN, link_bytes_per_s: float | None = None
) -> Prediction:
    """Plan as a user does, on one process before any rank starts; save the plan for the ranks. link_bytes_per_s: between two hosts."""
    import shardwise as sw

    model = workload.build()
    plan = sw.plan(model, workload.batch(0), cluster=_cluster(ranks, scenario, link_bytes_per_s), layout=layout)
    if not isinstance(plan, sw.Plan):
        raise RuntimeError(f"no plan for this workload: {plan}")
    plan.save(path)
    predicted = plan.predicted
    return Prediction(
        text=str(plan),
        layout=plan.layout,
        step_time_s=float(predicted.step_time_s),
        memory_bytes=_per_rank(predicted.memory_bytes, ranks),
        state_bytes=_STATE * sum(parameter.nbytes for parameter in model.parameters()),
    )


def plan_apart(*wanted: object) -> Prediction:
    """`make_plan` in a process of its own, which leaves no memory or threads behind in this one."""
    return _from_a_child(_send_plan, *wanted)


def plan_anew(workload: Workload, ranks: int, layout: str, scenario: Scenario = PLAIN, link_bytes_per_s: float | None = None) -> Prediction:
    """What the layout promises with this machine measured once more; the figures that are kept stay."""
    with tempfile.TemporaryDirectory() as folder:
        return _from_a_child(_send_plan_anew, Path(folder), workload, ranks, layout, Path(folder) / "plan.json", scenario, link_bytes_per_s)


def _from_a_child(serve: Callable[..., None], *wanted: object) -> Prediction:
    planner = Child("the planner", serve, *wanted)
    try:
        found: Prediction = receive([planner], _PLAN_TIMEOUT_S, "the plan")[0]
    finally:
        planner.end()
    return found


def _send_plan(pipe: Connection, *wanted: object) -> None:
    pipe.send(make_plan(*wanted))  # type: ignore[arg-type]


def _send_plan_anew(pipe: Connection, folder: Path, *wanted: object) -> None:
    os.environ["SHARDWISE_CACHE"] = str(folder)
    _send_plan(pipe, *wanted)


def _cluster(ranks: int, scenario: Scenario, link_bytes_per_s: float | None) -> Cluster:
    """This machine, and what the scenario changes about it."""
    from shardwise.cluster.model import Cluster
    from shardwise.cluster.network import Network

    found = Cluster.parse(f"local:{ranks}")
    if scenario.data_bytes is not None:
        found = found.with_memory(scenario.data_bytes)
    if scenario.last_speed != 1:
        found = found.with_speeds(scenario.speeds(ranks))
    if link_bytes_per_s is not None:
        found = replace(found, network=Network(node_ranks=ranks // 2, latency_s=_LATENCY_S, bytes_per_s=link_bytes_per_s))
    return found


def _per_rank(memory: float | Sequence[float], ranks: int) -> tuple[float, ...]:
    return tuple(float(size) for size in memory) if isinstance(memory, Sequence) else (float(memory),) * ranks


@dataclass(frozen=True)
class OurStep:
    """A job's step, which can say what its actions took."""

    job: Any

    def __call__(self, batch: Batch) -> float:
        """Take one step on the global batch."""
        loss: float = self.job.step(batch)
        return loss

    def actions(self) -> dict[str, float]:
        """Seconds by kind, waiting included."""
        seconds: dict[str, float] = {}
        for event in self.job.events:
            kind = event.action.kind.value
            seconds[kind] = seconds.get(kind, 0.0) + event.end_s - event.start_s
        return seconds


def build(context: RankContext) -> OurStep:
    """Return the job's step: it takes the global batch and returns the global loss on every rank."""
    import shardwise as sw

    assert context.plan_path is not None
    plan = sw.Plan.load(context.plan_path)
    job = sw.parallelize(context.workload.build(), context.workload.batch(0), plan=plan, optimizer=optimizer, compile=context.compiled)
    return OurStep(job)
