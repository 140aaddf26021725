"""What a simulated step would be if something were slow or failed: in the words of the command line, and as figures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from shardwise.cluster.model import Cluster, cluster_of
from shardwise.errors import LayoutError, PlanError, ShardwiseError
from shardwise.outlook import Outlook, Study, Wish
from shardwise.planner.plan import Infeasible
from shardwise.planner.proposal import Proposal
from shardwise.planner.scale import Found, ScaleSearch
from shardwise.planner.space import Pins
from shardwise.report.units import bytes_text, seconds_text
from shardwise.simulate.failures import Failures, Goodput, goodput
from shardwise.simulate.simulator import Simulation, simulate_profile
from shardwise.simulate.slow import Slow

__all__ = ["Outcome", "Scenario", "layout_of", "read_duration", "simulate_layout"]

_UNITS = {"ms": 1e-3, "": 1.0, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)", re.IGNORECASE)
_LISTED = 16  # ranks whose memory is printed one by one


def read_duration(text: str, name: str = "duration") -> float:
    """Seconds of `90`, `90s`, `15min`, `3h`, `2d`. Raises ShardwiseError, in which `name` is what was asked for."""
    read = _DURATION.fullmatch(text.strip())
    try:
        return float(read[1]) * _UNITS[read[2].lower()]  # type: ignore[index]
    except (TypeError, ValueError, KeyError):
        raise ShardwiseError(f"{name} {text!r} is no duration; write a number and one of ms, s, min, h, d, such as 30s or 50000h") from None


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """slow: what is slower than it should be. mtbf_s: mean time between failures of one device, job_mtbf_s: of the whole job, one of the
    two; checkpoint_s, every_s, restart_s as of `Failures`. Raises ShardwiseError for figures that do not go together."""

    slow: Slow = field(default_factory=Slow)
    mtbf_s: float | None = None
    job_mtbf_s: float | None = None
    checkpoint_s: float | None = None
    every_s: float | None = None
    restart_s: float | None = None

    def __post_init__(self) -> None:
        rest = {"--checkpoint": self.checkpoint_s, "--checkpoint-every": self.every_s, "--restart": self.restart_s}
        if self.mtbf_s is not None and self.job_mtbf_s is not None:
            raise ShardwiseError("--mtbf is of one device, --job-mtbf of the whole job; give one of the two")
        if self.fails and self.checkpoint_s is None:
            raise ShardwiseError("what failures cost depends on what a checkpoint takes; add --checkpoint, such as --checkpoint 30s")
        if not self.fails and (idle := [name for name, value in rest.items() if value is not None]):
            raise ShardwiseError(f"{idle[0]} has no effect without --mtbf, the mean time between failures of a device, or --job-mtbf")

    @classmethod
    def parse(
        cls,
        *,
        ranks: Sequence[str] = (),
        stages: Sequence[str] = (),
        links: Sequence[str] = (),
        times: Mapping[str, str | None] | None = None,
    ) -> Scenario:
        """From words: those of `Slow.parse`, and durations by their options: mtbf, job-mtbf, checkpoint, checkpoint-every, restart."""
        given = {name: read_duration(text, f"--{name}") for name, text in (times or {}).items() if text is not None}
        read = {f"{name.removeprefix('checkpoint-').replace('-', '_')}_s": seconds for name, seconds in given.items()}
        return cls(slow=Slow.parse(ranks, stages, links), **read)

    @property
    def fails(self) -> bool:
        """Whether failures are asked for."""
        return self.mtbf_s is not None or self.job_mtbf_s is not None

    def failures(self, devices: int) -> Failures | None:
        """Of a job on so many devices."""
        if not self.fails:
            return None
        assert self.checkpoint_s is not None
        rest = {"checkpoint_s": self.checkpoint_s, "every_s": self.every_s, "restart_s": self.restart_s or 0.0}
        if self.mtbf_s is not None:
            return Failures.of_devices(self.mtbf_s, devices, **rest)  # type: ignore[arg-type]
        return Failures(mtbf_s=self.job_mtbf_s or 0.0, **rest)  # type: ignore[arg-type]

    def outcome(self, step: Simulation, healthy: Simulation) -> Outcome:
        """step: simulated with what is slow; healthy: without."""
        failures = self.failures(len(step.memory))
        left = None if failures is None else goodput(failures, step.step_time_s)
        return Outcome(step=step, healthy_s=healthy.step_time_s, failures=failures, goodput=left)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """step: with what is slow; healthy_s: a step's seconds without; goodput: what failures leave, None where nothing fails."""

    step: Simulation
    healthy_s: float
    failures: Failures | None = None
    goodput: Goodput | None = None

    def as_json(self) -> dict[str, Any]:
        """Seconds, bytes, shares."""
        found: dict[str, Any] = {
            "step_time_s": self.step.step_time_s,
            "healthy_step_time_s": self.healthy_s,
            "bubble": self.step.bubble,
            "communication_s": self.step.communication_s,
            "memory_bytes": self.step.memory_bytes,
        }
        if self.goodput is not None and self.failures is not None:
            left = asdict(self.goodput) | {"step_time_s": self.goodput.step_time_s if self.goodput.useful else None}
            found["failures"] = {"job_mtbf_s": self.failures.mtbf_s, **left}
        return found

    def lines(self) -> dict[str, str]:
        """For people: what → how much."""
        step, memory = self.step, self.step.memory_bytes
        found = {"step": seconds_text(step.step_time_s)}
        if step.step_time_s != self.healthy_s:
            found["as it should be"] = f"{seconds_text(self.healthy_s)}: what is slow costs {step.step_time_s / self.healthy_s - 1:.1%}"
        found["ranks wait"] = f"{step.bubble:.1%} of their time"
        each = list(map(bytes_text, memory))
        fullest = f"{bytes_text(max(memory))} on {'each' if len(set(each)) == 1 else 'the fullest'} of {len(memory):,} ranks"
        found["memory"] = fullest if len(memory) > _LISTED or len(set(each)) == 1 else ", ".join(each)
        if self.goodput is not None and self.failures is not None:
            found |= _failure_lines(self.failures, self.goodput)
        return {name: text.replace("\u00a0", " ") for name, text in found.items()}


def _failure_lines(failures: Failures, left: Goodput) -> dict[str, str]:
    steps = f"{left.steps:,} step{'s' if left.steps > 1 else ''}"
    chosen = "" if failures.every_s is not None else ", which wastes least"
    return {
        "a failure": f"every {_long(failures.mtbf_s)}, on average",
        "a checkpoint": f"every {_long(left.interval_s)} ({steps}){chosen}",
        "useful": f"{left.useful:.1%} of all time; {left.checkpoints:.1%} checkpoints, {left.lost:.1%} lost, {left.restarts:.1%} restarts",
        "step, all in": seconds_text(left.step_time_s) if left.useful else "none ever lasts: checkpoint more often",
    }


def _long(seconds: float) -> str:
    """Of minutes and more."""
    for unit in ("d", "h", "min"):
        if seconds >= 1.5 * _UNITS[unit]:
            value = seconds / _UNITS[unit]
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return seconds_text(seconds)


def simulate_layout(search: ScaleSearch, found: Found, slow: Slow | None = None) -> Simulation:
    """A step of a layout for many devices; what it would be with something slow.

    Slow levels are costed again, each operator split as the planner would split it on such links. Raises LayoutError for a slow rank, stage
    or link that is not there.
    """
    slow = slow or Slow()
    if slow.levels:
        machines = search.cluster.machines
        if machines is None:
            raise LayoutError(f"slow link {next(iter(slow.levels))}: {search.cluster.name} is not of the catalog and has no named links")
        search = replace(search, cluster=cluster_of(machines.slowed(slow.levels)))
    profile = slow.applied(search.composed(found.scheme, found.samples))
    return simulate_profile(profile, found.scheme.mesh, slow=slow.ranks)


_PINNED = ("dp", "cp", "tp", "ep", "pp", "chunks", "zero", "microbatches", "microbatch", "schedule", "recompute")


def layout_of(study: Study, plan: Proposal) -> Outlook:
    """A proposal's layout, costed again; the study is of its model. Raises PlanError where it fits no more."""
    names = (*_PINNED, "attention") if plan.cp > 1 else _PINNED
    pins = Pins(**{name: getattr(plan, name) for name in names})
    wish = Wish(global_batch=plan.global_batch, pins=pins, price_per_hour=plan.price_per_hour, precision=plan.precision)
    found = study.outlook(Cluster.parse(plan.cluster), wish)
    if isinstance(found, Infeasible):
        raise PlanError(f"the plan's layout {plan.layout} no longer fits {plan.cluster}: {found.reasons[0]}; make the plan again")
    return found
