"""A layout on its way to a plan: estimated, then lowered and simulated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from operator import itemgetter

from shardwise.planner.apply import Applied
from shardwise.planner.layout import Layout
from shardwise.planner.plan import Candidate
from shardwise.simulate.profile import Profile
from shardwise.simulate.simulator import Mesh, Simulation

__all__ = ["Trial", "best_of", "first_of_each", "gigabytes"]

_ALIKE = 1.005  # times the fastest: the simulator cannot tell steps apart that are closer


@dataclass(kw_only=True)
class Trial:
    """A complete layout. lean: whether everything is split that can be, since memory binds; memory_binds: whether even so parameters,
    gradients and states do not fit."""

    layout: Layout
    applied: Applied | None = None
    gap: float = 0.0
    estimate_s: float = float("inf")
    profile: Profile | None = None
    simulation: Simulation | None = None
    note: str = ""
    lean: bool = False
    memory_binds: bool = False

    @property
    def mesh(self) -> Mesh:
        """The layout's sizes, as the simulator takes them: ranks along cp do alike, as those along dp."""
        layout = self.layout
        assert layout.dp and layout.tp and layout.pp and layout.microbatches and layout.schedule, f"{layout} is not complete"
        data = layout.dp * (layout.cp or 1)
        return Mesh(
            dp=data, tp=layout.tp, pp=layout.pp, chunks=layout.chunks or 1, microbatches=layout.microbatches, schedule=layout.schedule
        )

    def become(self, other: Trial) -> None:
        """Goes on as another trial."""
        for each in fields(self):
            setattr(self, each.name, getattr(other, each.name))

    @property
    def simulated_s(self) -> float:
        return self.simulation.step_time_s if self.simulation else float("inf")

    @property
    def pace(self) -> float:
        """Simulated seconds for each that was estimated."""
        return self.simulated_s / self.estimate_s

    def candidate(self) -> Candidate:
        simulation = self.simulation
        return Candidate(
            layout=str(self.layout),
            estimate_s=self.estimate_s if self.applied else None,
            step_time_s=simulation.step_time_s if simulation else None,
            memory_bytes=max(simulation.memory_bytes) if simulation else None,
            note=self.note,
        )


def best_of(trials: Iterable[Trial]) -> Trial | None:
    """Of those that fit, the fastest; of those that are as fast, the one whose fullest rank takes least memory."""
    fitting = [(trial, trial.simulation) for trial in trials if trial.simulation and not trial.note]
    fastest_s = min((simulation.step_time_s for _, simulation in fitting), default=0.0)
    alike = [(max(each.memory_bytes), each.step_time_s, trial) for trial, each in fitting if each.step_time_s <= _ALIKE * fastest_s]
    return min(alike, key=itemgetter(0, 1))[-1] if alike else None


def first_of_each(ranked: Iterable[Trial]) -> list[Trial]:
    """Of each mesh."""
    found: dict[tuple[int, ...], Trial] = {}
    for trial in ranked:
        found.setdefault(trial.layout.mesh, trial)
    return list(found.values())


def gigabytes(nbytes: float) -> str:
    """For messages."""
    return f"{nbytes / 1e9:.3g} GB"
