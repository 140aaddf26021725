"""The builder of integer programs."""

from __future__ import annotations

import random
from itertools import product

import pytest

from shardwise.planner.ilp import Problem


def test_a_solver_writes_nothing_to_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    """Not even from C, beside what `--json` prints."""
    problem = Problem()
    problem.constrain([(problem.variable(1.0, integer=True), 1.0), (problem.variable(2.0, integer=True), 1.0)], 1.0, 1.0)
    assert problem.solve() is not None
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("unit", [1.0, 1e-9, 1e6])
@pytest.mark.parametrize("seed", range(5))
def test_solutions_are_the_best_of_all(seed: int, unit: float) -> None:
    """Six choices of which three at most, and two never together, whatever the costs are counted in; None where nothing is allowed."""
    chance = random.Random(seed)
    costs = [unit * chance.uniform(-1.0, 1.0) for _ in range(6)]
    problem = Problem()
    chosen = [problem.variable(cost, integer=True) for cost in costs]
    problem.constrain([(x, 1.0) for x in chosen], 1.0, 3.0)
    problem.constrain([(chosen[0], 1.0), (chosen[1], 1.0)], high=1.0)
    allowed = [picked for picked in product((0, 1), repeat=6) if 1 <= sum(picked) <= 3 and picked[0] + picked[1] <= 1]
    best = min(sum(x * cost for x, cost in zip(picked, costs, strict=True)) for picked in allowed)
    solution = problem.solve()
    assert solution is not None
    assert solution.objective == pytest.approx(best, rel=2e-3)
    assert sum(solution.values[x] * cost for x, cost in zip(chosen, costs, strict=True)) == pytest.approx(solution.objective)
    problem.constrain([(x, 1.0) for x in chosen], 4.0)
    assert problem.solve() is None
