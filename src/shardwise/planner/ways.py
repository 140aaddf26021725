"""The same layout done another way: in another schedule, or with its optimizer states divided over its data ranks (ZeRO-1).

Every mesh is tried in the usual way first: in 1F1B, with nothing divided. What it would take in another way is estimated from the split of
its operators, times what the simulator found the estimate to be off by; what promises to be worth it is lowered and simulated, a few of
them even where the first is as fast as it promised: promises are hardly apart, steps and memory are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter

from shardwise.planner.estimator import Estimator, data_ranks
from shardwise.planner.fitting import simulate
from shardwise.planner.layout import Layout
from shardwise.planner.trial import Trial, first_of_each
from shardwise.program.tables import NAMES, least_chunks

__all__ = ["other_ways"]

_WORTH = 0.97  # times the best of the usual way: what another must promise
_MOST = 3  # other schedules, and as many divisions, that are simulated
_BASES = 6  # meshes of which they are


def other_ways(run: Estimator, ranked: Sequence[Trial]) -> list[Trial]:
    """Those that promised to be faster than all that was simulated, simulated: whether they are or not. ranked: by their estimates."""
    tried: list[Trial] = []
    for ways in (_schedules, _divisions):
        fitting = [trial for trial in (*ranked, *tried) if trial.simulation and not trial.note]
        if not fitting:
            return tried
        best = min(fitting, key=lambda trial: trial.simulated_s)
        bases = [*fitting, *(trial for trial in first_of_each(ranked)[:_BASES] if trial.simulation is None)]
        promises = [
            (run.promise(base, layout) * (base if base.simulation else best).pace, layout, base.lean)
            for base in bases
            for layout in ways(run.pinned, base.layout)
        ]
        for promised_s, layout, lean in sorted(promises, key=itemgetter(0))[:_MOST]:
            if promised_s > _WORTH * best.simulated_s:
                break
            trial = Trial(layout=layout, lean=lean)
            run.estimate_as_it_is(trial)
            if trial.applied:
                simulate(run, trial)
            tried.append(trial)
    return tried


def _schedules(pinned: Layout, layout: Layout) -> list[Layout]:
    if layout.pp == 1 or pinned.schedule or pinned.chunks:
        return []
    return [replace(layout, schedule=name, chunks=least_chunks(name)) for name in NAMES if name != layout.schedule]


def _divisions(pinned: Layout, layout: Layout) -> list[Layout]:
    return [replace(layout, zero=1)] if pinned.zero is None and not layout.zero and data_ranks(layout) > 1 else []
