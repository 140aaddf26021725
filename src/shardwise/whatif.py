"""What another cluster would change: `nodes=129`, `network=2x`, `device=h200`, and how two plans differ."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from shardwise.cluster.catalog import catalog
from shardwise.cluster.model import Cluster, cluster_of
from shardwise.cluster.specs import parse_spec, read_spec
from shardwise.cluster.topology import Level, Machines
from shardwise.errors import ClusterError, LayoutError, PlanError
from shardwise.outlook import Outlook, resized
from shardwise.planner.plan import Infeasible, Plan
from shardwise.planner.proposal import Proposal, WhatIf
from shardwise.planner.reasons import explain, gb, seconds

__all__ = ["Change", "Comparison", "Line", "compare", "load_plan", "usual_changes", "with_what_ifs"]

_EXAMPLES = "nodes=129 (or nodes=+1), network=2x, device=h200, global-batch=3072"
_LARGER = {
    "v100-16g": "a100-40g",
    "v100-32g": "a100-80g",
    "a100-40g": "a100-80g",
    "a100-80g": "h100",
    "h100": "h200",
    "h200": "b200",
    "rtx3090": "rtx4090",
    "rtx4090": "rtx5090",
}


@dataclass(frozen=True, kw_only=True)
class Change:
    """What is changed at once. nodes: how many; more: how many more; network: how many times as fast the links between nodes are."""

    text: str
    nodes: int | None = None
    more: int | None = None
    network: float | None = None
    device: str | None = None
    global_batch: int | None = None

    @classmethod
    def parse(cls, text: str) -> Change:
        """`"nodes=129,network=2x"`. Raises LayoutError for what is not understood."""
        found: dict[str, Any] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, equals, value = (part.strip() for part in item.partition("="))
            if not equals or name not in ("nodes", "network", "device", "global-batch"):
                raise LayoutError(f"{item!r} in what-if {text!r} is not understood; write for example {_EXAMPLES}")
            if name == "device":
                found["device"] = value
            elif name == "network":
                found["network"] = _positive(value.removesuffix("x"), item, text)
            else:
                key = "global_batch" if name == "global-batch" else "more" if value.startswith("+") else "nodes"
                found[key] = _whole(value.removeprefix("+"), item, text)
        if not found:
            raise LayoutError(f"what-if {text!r} changes nothing; write for example {_EXAMPLES}")
        return cls(text=text, **found)

    def of(self, cluster: Cluster) -> Cluster:
        """The changed cluster. Raises ClusterError for one that is not written in one line of one kind of devices."""
        machines = cluster.machines
        nodes = self.nodes if self.nodes is not None else None if self.more is None or machines is None else machines.nodes + self.more
        if nodes is not None:
            cluster = _known(resized(cluster, nodes=nodes), cluster, self.text)
        if self.device is not None:
            spec = read_spec(_known(resized(cluster), cluster, self.text).name)
            entries = tuple(replace(entry, name=self.device) for entry in spec.entries)
            cluster = cluster_of(parse_spec(str(replace(spec, entries=entries)), catalog()))
        if self.network is not None:
            if cluster.machines is None or cluster.machines.nodes == 1:
                raise ClusterError(f"what-if {self.text!r}: no network joins the devices of {cluster.name}")
            cluster = cluster_of(_faster(cluster.machines, self.network))
        return cluster


def _known(found: Cluster | None, cluster: Cluster, text: str) -> Cluster:
    if found is None:
        raise ClusterError(
            f"what-if {text!r} changes a cluster of one kind of nodes, written in one line such as h100:128x8, not {cluster.name}"
        )
    return found


def _whole(value: str, item: str, text: str) -> int:
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise LayoutError(f"{item!r} in what-if {text!r}: {value!r} is not a whole number of 1 or more")
    return int(value)


def _positive(value: str, item: str, text: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0.001 <= number <= 1000:
        raise LayoutError(f"{item!r} in what-if {text!r}: {value!r} is not a number from 0.001 to 1000, such as 2x")
    return number


def _faster(machines: Machines, times: float) -> Machines:
    def level(each: Level) -> Level:
        return replace(each, ports=each.ports * times)

    groups = tuple(replace(group, outside=tuple(map(level, group.outside))) for group in machines.groups)
    return Machines(name=f"{machines.name} with {times:g} × the network", groups=groups)


def usual_changes(cluster: Cluster) -> list[str]:
    """One more node, twice the network, the next larger device of its kind."""
    machines = cluster.machines
    if machines is None or resized(cluster) is None:
        return []
    larger = _LARGER.get(machines.devices[0].name)
    return ["nodes=+1", *(["network=2x"] if machines.nodes > 1 else []), *([f"device={larger}"] if larger else [])]


def with_what_ifs(outlook: Outlook, changes: list[str]) -> Proposal:
    """The outlook's plan, with what each change would give."""
    plan = outlook.proposal()
    found = [_what_if(outlook, Change.parse(text)) for text in changes]
    changed = plan.model_copy(update={"what_if": found})
    return changed.model_copy(update={"explanation": explain(changed, outlook.found[0], outlook.searched)})


def _what_if(outlook: Outlook, change: Change) -> WhatIf:
    cluster = change.of(outlook.cluster)
    wanted = outlook.wish if change.global_batch is None else replace(outlook.wish, global_batch=change.global_batch)
    now = outlook.found[0]
    try:
        found = outlook.study.outlook(cluster, wanted)
    except LayoutError as error:
        found = Infeasible(reasons=[str(error)], remedy="")
    if isinstance(found, Infeasible):
        verdict = f"no layout: {found.reasons[0]}"
        return WhatIf(
            change=change.text, cluster=cluster.name, layout=None, step_time_s=None, memory_bytes=None, dollars=None, verdict=verdict
        )
    best = found.found[0]
    per_sample = (now.seconds / outlook.search.global_batch) / (best.seconds / found.search.global_batch)
    times = f"{per_sample:.2f} × as fast" if abs(per_sample - 1) >= 0.005 else "as fast as now"
    dollars, before = found.dollars(best), outlook.dollars(now)
    cost = "" if dollars is None or before is None else f", {dollars / before:.2f} × the cost of a step"
    idle = "; better leave what is more idle" if per_sample < 0.995 and cluster.ranks > outlook.cluster.ranks else ""
    return WhatIf(
        change=change.text,
        cluster=cluster.name,
        layout=str(best),
        step_time_s=best.seconds,
        memory_bytes=best.memory_bytes,
        dollars=dollars,
        verdict=f"{seconds(best.seconds)} a step, {times}{cost}, {gb(best.memory_bytes)} with {best}{idle}",
    )


# -- two plans -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Line:
    """A figure of two plans, as text; differs: whether it is not the same."""

    name: str
    first: str
    second: str

    @property
    def differs(self) -> bool:
        return self.first != self.second


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two plans side by side. lines: what they say; parts: part of a step → seconds that the second takes more; verdict: in words."""

    first: str
    second: str
    lines: list[Line]
    parts: dict[str, float]
    verdict: str

    def table(self) -> Table:
        """What differs is marked."""
        table = Table("", "", self.first, self.second, box=None)
        for line in self.lines:
            table.add_row("≠" if line.differs else "", line.name, line.first, line.second)
        return table

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "plans": [self.first, self.second],
            "differs": {line.name: [line.first, line.second] for line in self.lines if line.differs},
            "same": {line.name: line.first for line in self.lines if not line.differs},
            "seconds_more": self.parts,
            "verdict": self.verdict,
        }


def compare(first: Path, second: Path) -> Comparison:
    """Two plan files of either kind. Raises PlanError for a file that is none."""
    plans = [load_plan(path) for path in (first, second)]
    figures = [_figures(plan) for plan in plans]
    names = list(dict.fromkeys(name for each in figures for name in each))
    lines = [Line(name=name, first=figures[0].get(name, "–"), second=figures[1].get(name, "–")) for name in names]
    parts = [_parts(plan) for plan in plans]
    more = {name: parts[1].get(name, 0.0) - parts[0].get(name, 0.0) for name in dict.fromkeys([*parts[0], *parts[1]])}
    return Comparison(
        first=str(first), second=str(second), lines=lines, parts=more, verdict=_verdict(plans, more, (str(first), str(second)))
    )


def load_plan(path: Path) -> Plan | Proposal:
    """A plan file of either kind. Raises PlanError for a file that is none."""
    try:
        return Proposal.load(path)
    except PlanError:
        return Plan.load(path)


def _figures(plan: Plan | Proposal) -> dict[str, str]:
    axes = ("dp", "cp", "attention", "tp", "ep", "pp", "chunks", "microbatches", "microbatch", "schedule", "zero", "recompute")
    found = {name: str(getattr(plan, name)) for name in ("model", "cluster", "ranks", "global_batch", "precision")}
    found |= {name: str(getattr(plan, name)) for name in axes if hasattr(plan, name)}
    predicted = plan.predicted
    if isinstance(plan, Proposal):
        memory, kinds = plan.predicted.memory_bytes, plan.predicted.by_kind
        found["runs"] = "yes" if plan.runnable else "no"
    else:
        memory = max(plan.predicted.memory_bytes)
        kinds = plan.predicted.by_kind[plan.predicted.memory_bytes.index(memory)] if plan.predicted.by_kind else {}
        found["runs"] = "yes"
    found |= {
        "step": seconds(predicted.step_time_s),
        "samples/s": f"{plan.global_batch / predicted.step_time_s:,.4g}",
        "waiting": f"{predicted.bubble:.1%}",
        "communication": seconds(predicted.communication_s),
        "memory": gb(memory),
    }
    found |= {f"  {kind}": gb(nbytes) for kind, nbytes in kinds.items()}
    if isinstance(plan, Proposal) and plan.predicted.dollars is not None:
        found["dollars a step"] = f"{plan.predicted.dollars:,.4g}"
    return found


def _parts(plan: Plan | Proposal) -> dict[str, float]:
    if isinstance(plan, Proposal):
        return plan.predicted.parts.model_dump()
    waiting = plan.predicted.bubble * plan.predicted.step_time_s
    talk = min(plan.predicted.communication_s, plan.predicted.step_time_s - waiting)
    return {"compute": plan.predicted.step_time_s - waiting - talk, "exchange": talk, "waiting": waiting}


def _verdict(plans: list[Plan | Proposal], more: dict[str, float], names: tuple[str, str]) -> str:
    rates = [plan.predicted.step_time_s / plan.global_batch for plan in plans]
    if abs(rates[1] / rates[0] - 1) < 0.001:
        return "both are as fast"
    quick = 0 if rates[0] < rates[1] else 1
    sign = 1 if quick == 0 else -1
    gains = sorted(((sign * value, name) for name, value in more.items()), reverse=True)
    words = [
        f"{seconds(value)} less {_NOUNS.get(name, name)}" for value, name in gains if value > 0.002 * plans[quick].predicted.step_time_s
    ]
    costs = [
        f"{seconds(-value)} more {_NOUNS.get(name, name)}" for value, name in gains if -value > 0.002 * plans[quick].predicted.step_time_s
    ]
    why = ", ".join(words[:3]) + (f", for {', '.join(costs[:2])}" if costs else "")
    batches = "" if plans[0].global_batch == plans[1].global_batch else " a sample"
    return f"{names[quick]} is {rates[1 - quick] / rates[quick]:.3f} × as fast{batches}: {why or 'a smaller batch'}"


_NOUNS = {
    "compute": "computing",
    "recompute": "recomputing",
    "exchange": "communication within the passes",
    "reduce": "reducing of gradients",
    "update": "updating",
    "waiting": "waiting",
}
