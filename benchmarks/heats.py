"""Heats: where not all contestants fit the memory at once, some race first and others later, the reference in every heat.

heat 1:  ours ddp fsdp2 tp        ours tells how fast the machine is in each heat: what was measured in a slow
heat 2:  ours 1f1b single …       one counts as if all had been equally fast
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import psutil

from benchmarks.race import Record
from benchmarks.verdict import Sample

RANK_BYTES = 200 * 2**20
"""What a rank has for itself before its model exists: Python's objects and the libraries' pages that it writes."""
MEMORY_SHARE = 0.85
"""Of the memory that is free, what the contestants of one heat may take together, were all at their peak at once."""

Heat = Mapping[str, Record]
"""What was measured of contestants that raced each other, by name."""


def free_bytes() -> int:
    """What a heat may take of this machine's memory."""
    return int(psutil.virtual_memory().available * MEMORY_SHARE)


def heats(team_bytes: Mapping[str, float], limit_bytes: float) -> list[list[str]]:
    """Who races whom, in the order given: the first of all in every heat, the others once, all of a heat together within the limit.

    team_bytes: by name, of all ranks of a contestant together. At least one other is in each heat, whatever it takes.
    """
    reference, *others = team_bytes
    groups = [[reference]]
    for name in others:
        if len(groups[-1]) > 1 and sum(team_bytes[each] for each in (*groups[-1], name)) > limit_bytes:
            groups.append([reference])
        groups[-1].append(name)
    return groups


def together(done: Sequence[Heat], reference: str) -> dict[str, Record]:
    """What each contestant came to over the heats that it took part in.

    Heats run at different times, on a machine that may be faster or slower then. The reference takes part in all of them: the seconds of
    a heat are multiplied by what makes its median there that over all heats.
    """
    factors = _factors([_counted(heat[reference].samples) for heat in done])
    found: dict[str, Record] = {}
    for heat, factor in zip(done, factors, strict=True):
        for name, record in heat.items():
            scaled = [replace(sample, seconds=sample.seconds * factor) for sample in record.samples]
            known = found.setdefault(name, Record())
            known.samples += scaled
            known.peak_bytes = _larger(known.peak_bytes, record.peak_bytes)
            known.set_up_peak_bytes = _larger(known.set_up_peak_bytes, record.set_up_peak_bytes)
            known.failure = known.failure or record.failure
    return found


def _counted(samples: Iterable[Sample]) -> list[float]:
    return [sample.seconds for sample in samples if sample.counts]


def _factors(of_each_heat: Sequence[Sequence[float]]) -> list[float]:
    """For each heat, median over all ÷ median within; 1 where nothing counts."""
    everything = [seconds for heat in of_each_heat for seconds in heat]
    return [statistics.median(everything) / statistics.median(heat) if heat else 1.0 for heat in of_each_heat]


def _larger(one: Sequence[int], other: Sequence[int]) -> list[int]:
    return list(map(max, one, other)) if one and other else list(one or other)
