"""Blocks for unlike stages and samples for unlike copies, against all ways there are."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest

import shardwise as sw
from shardwise.planner.shares import Table, batch_shares, cut_unlike


def all_cuts(units: int, stages: int) -> Iterator[list[int]]:
    for places in combinations(range(1, units), stages - 1):
        yield [*places, units]


def step_s(tables: list[Table], ends: list[int], microbatches: int) -> float:
    each = [float(table[start, end]) for table, start, end in zip(tables, [0, *ends], ends, strict=False)]
    return (microbatches - 1) * max(each) + sum(each) if np.isfinite(max(each)) else np.inf


def random_tables(seed: int, units: int, stages: int, *, tight: bool) -> list[Table]:
    """Units of random work and memory on stages of random speed; every stage has its own limit."""
    random = np.random.default_rng(seed)
    work, bytes_ = random.uniform(0.1, 1.0, units), random.uniform(0.1, 1.0, units)
    tables = []
    for _ in range(stages):
        speed, limit = random.uniform(0.3, 3.0), random.uniform(0.3, 2.0) * bytes_.sum() / stages if tight else np.inf
        table = np.full((units + 1, units + 1), np.inf)
        for start in range(units):
            for end in range(start + 1, units + 1):
                if bytes_[start:end].sum() <= limit:
                    table[start, end] = work[start:end].sum() / speed + 0.01 * random.uniform()
        tables.append(table)
    return tables


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_cuts_are_the_best_there_are(seed: int, tight: bool) -> None:
    random = np.random.default_rng(1000 + seed)
    units, microbatches = int(random.integers(4, 10)), int(random.integers(1, 9))
    stages = int(random.integers(1, min(units, 5)))
    tables = random_tables(seed, units, stages, tight=tight)
    best = min(step_s(tables, ends, microbatches) for ends in all_cuts(units, stages))
    found = cut_unlike(tables, microbatches)
    if not np.isfinite(best):
        assert found is None
    else:
        assert found is not None and found[-1] == units and all(a < b for a, b in zip([0, *found], found, strict=False))
        assert step_s(tables, found, microbatches) == pytest.approx(best, rel=1e-12)


def test_a_stage_of_half_the_speed_gets_half_the_blocks() -> None:
    table = np.array([[float(end - start) if end > start else np.inf for end in range(10)] for start in range(10)])
    assert cut_unlike([table, 2 * table], 100) == [6, 9]
    assert cut_unlike([table, 2 * table], 1) == [8, 9], "with one microbatch nobody waits for the slowest: only the sum counts"


def all_shares(units: int, copies: int) -> Iterator[list[int]]:
    for places in combinations(range(1, units), copies - 1):
        yield [end - start for start, end in zip([0, *places], [*places, units], strict=False)]


@pytest.mark.parametrize("seed", range(60))
def test_shares_are_the_best_there_are(seed: int) -> None:
    random = np.random.default_rng(seed)
    copies = int(random.integers(1, 5))
    units = int(random.integers(copies, 14))
    fill_s = [float(each) for each in random.choice([0.0, 0.5, 3.0], copies)]
    each_s = [float(each) for each in random.uniform(0.1, 4.0, copies)]

    def last(counts: list[int]) -> float:
        return max(fill + count * each for fill, count, each in zip(fill_s, counts, each_s, strict=True))

    found = batch_shares(fill_s, each_s, units)
    assert sum(found) == units and min(found) >= 1
    assert last(found) == pytest.approx(min(map(last, all_shares(units, copies))), rel=1e-12)


def test_shares_follow_the_speeds() -> None:
    assert batch_shares([0.0, 0.0, 0.0], [1.0, 2.0, 4.0], 70) == [40, 20, 10]
    assert sum(batch_shares([0.1] * 4096, [1.0] * 2048 + [1.7] * 2048, 65536)) == 65536


def test_fewer_microbatches_than_copies() -> None:
    with pytest.raises(sw.BatchError, match="2 microbatches leave some of 3 copies without one"):
        batch_shares([0.0] * 3, [1.0] * 3, 2)
