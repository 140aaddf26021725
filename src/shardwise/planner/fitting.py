"""Lowers and simulates layouts; where one does not fit the ranks' memory, the same with more split, divided and computed again."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import ceil

import torch

from shardwise.planner.choices import layout_choices
from shardwise.planner.estimator import FULL_MEMORY, MOST_ZERO, Estimator, data_ranks
from shardwise.planner.layout import Layout
from shardwise.planner.plan import Chooser
from shardwise.planner.trial import Trial, gigabytes
from shardwise.program.build import build_programs, rank_of
from shardwise.program.recompute import RECOMPUTE, blocks_of
from shardwise.simulate.memory import memory_use
from shardwise.simulate.profile import computing_ranks, profile_programs
from shardwise.simulate.simulator import simulate_profile

__all__ = ["fit", "simulate"]

_THRIFTS = 5  # layouts that divide or compute again more, tried where one does not fit
_NUMBERS_OF_BLOCKS = 4  # that are tried


def fit(run: Estimator, trial: Trial) -> None:
    """Lowers a layout and simulates it; where it does not fit, once more with everything split that can be, then with more divided over
    data ranks and more computed again."""
    simulate(run, trial)
    if trial.note and trial.layout.tp != 1 and not (trial.lean or run.pinned.tp):
        trial.lean, trial.note = True, ""
        run.estimate(trial)
        simulate(run, trial)
    for thrifty in _thriftier(run, trial) if trial.note else ():
        other = _simulated(run, thrifty, lean=trial.lean)
        if not other.note:
            trial.become(_in_fewer_blocks(run, other, trial))
            return


def _simulated(run: Estimator, layout: Layout, *, lean: bool) -> Trial:
    trial = Trial(layout=layout, lean=lean)
    run.estimate_as_it_is(trial)
    if trial.applied:
        simulate(run, trial)
    return trial


def _in_fewer_blocks(run: Estimator, trial: Trial, too_large: Trial) -> Trial:
    """Of a layout that fits, the same with as few blocks of each stage computed again as do, sought from the number that it takes where
    each saves as much (each does, but for what one holds while it computes). too_large: what did not fit, simulated."""
    layout = trial.layout
    if layout.recompute is None or run.pinned.recompute is not None:
        return trial
    assert trial.applied is not None and trial.simulation is not None
    blocks = _most_blocks(run, trial)
    whole = replace(layout, recompute=None)
    kept = too_large if too_large.layout == whole else _simulated(run, whole, lean=trial.lean)
    if kept.simulation is None:
        return trial
    limit = min(run.limits(layout))
    saves = [(most, most - least) for most, least in zip(kept.simulation.memory_bytes, trial.simulation.memory_bytes, strict=True)]
    wanted = max((ceil(blocks * (most - limit) / saved) for most, saved in saves if saved > 0), default=blocks)
    best, too_few, enough, count = trial, 0, blocks, min(max(wanted, 1), blocks - 1)
    for _ in range(_NUMBERS_OF_BLOCKS):
        if not too_few < count < enough:
            break
        fewer = _simulated(run, replace(layout, recompute_blocks=count), lean=trial.lean)
        if fewer.note:
            too_few, count = count, count + 1
        else:
            best, enough, count = fewer, count, count - 1
    return best


def _most_blocks(run: Estimator, trial: Trial) -> int:
    """That a stage has."""
    assert trial.applied is not None
    block, stage = blocks_of(run.graph), trial.applied.cut.stage_of
    counts = Counter(at for _, at in {(block[op], stage[op]) for op in block if op in stage})
    return max(counts.values(), default=0)


def _thriftier(run: Estimator, trial: Trial) -> list[Layout]:
    """Layouts that differ in what is divided and computed again alone and may fit, those that cost least first."""
    assert trial.simulation is not None
    layout, ranks = trial.layout, trial.layout.shard or data_ranks(trial.layout)
    peak = max(trial.simulation.memory, key=lambda use: sum(use.values()))
    zeros = range(layout.zero or 0, MOST_ZERO + 1) if run.pinned.zero is None and ranks > 1 else [layout.zero or 0]
    kinds = RECOMPUTE if run.pinned.recompute is None else [layout.recompute or "none"]
    found = []
    for recompute in kinds:
        for zero in zeros:
            thrifty = replace(layout, zero=zero or None, recompute=None if recompute == "none" else recompute)
            divided = ("optimizer", "gradients", "parameters")[layout.zero or 0 : zero]
            saved = sum(peak[kind] for kind in divided) * (1 - 1 / ranks) + (peak["saved"] if recompute != "none" else 0)
            if thrifty != layout and sum(peak.values()) - saved <= min(run.limits(layout)):
                found.append(thrifty)
    return found if len(found) <= _THRIFTS else [*found[: _THRIFTS - 1], found[-1]]


def simulate(run: Estimator, trial: Trial) -> None:
    """As it is; the note says where it does not fit."""
    assert trial.applied is not None
    mesh, applied, tables = trial.mesh, trial.applied, trial.layout.tables
    (dp, cp, tp, pp), last = trial.layout.mesh, (trial.layout.cp or 1) - 1
    # at each place of the pipeline, of each sort of copy, the rank with the largest parts, and the one whose queries have the most keys
    # before them
    ranks = {rank_of(pipe, d, 0, dp, tp, c=c, cp=cp) for pipe in range(pp) for d in _sorts(run, trial.layout, pipe) for c in (0, last)}
    programs = build_programs(
        applied.assignment,
        applied.cut,
        tables,
        Chooser.of(layout_choices(run.cluster, trial.layout)),
        device=torch.device("cpu"),
        ranks=ranks,
        tracer=run.tracer,
    )
    trial.profile = profile_programs(programs, run.cluster, run.optimizer, trial.layout.shares or ())
    trial.simulation = simulate_profile(trial.profile, mesh, tables)
    for program in programs.values():
        peak, have = memory_use(program, run.optimizer).total, run.cluster.seen_by(computing_ranks(program)).memory_bytes
        if peak > have * FULL_MEMORY:
            trial.note = f"needs {gigabytes(peak)} a rank, {gigabytes(have * FULL_MEMORY)} of {gigabytes(have)} may be used"


def _sorts(run: Estimator, layout: Layout, pipe: int) -> list[int]:
    """The first copy of each share and device."""
    found: dict[object, int] = {}
    for d in range(layout.mesh[0]):
        seen = run.cluster.seen_by(run.block(layout, pipe, d))
        found.setdefault((id(seen.rates), seen.memory_bytes, layout.shares and layout.shares[d]), d)
    return list(found.values())
