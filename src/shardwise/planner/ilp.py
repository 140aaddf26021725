"""A small builder of integer linear programs over HiGHS."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import highspy
import numpy as np

__all__ = ["Problem", "Solution"]

_INFINITY = highspy.kHighsInf


class _Silent(highspy.Highs):
    """Writes nothing to stdout, where `--json` goes: HiGHS 1.16 prints a banner when `Highs.__init__` enables callbacks, its last step."""

    def enableCallbacks(self) -> None:  # noqa: N802  # highspy's name
        self.silent()
        super().enableCallbacks()


@dataclass(frozen=True, kw_only=True)
class Solution:
    """values of the variables; objective; gap: (objective − proven bound) / objective, 0 when proven optimal."""

    values: np.ndarray
    objective: float
    gap: float


@dataclass(kw_only=True)
class Problem:
    """minimise Σ cost · x over variables in [0, 1], some of them integer, under linear constraints."""

    costs: list[float] = field(default_factory=list)
    integer: list[bool] = field(default_factory=list)
    rows: list[tuple[list[int], list[float], float, float]] = field(default_factory=list)

    def variable(self, cost: float, *, integer: bool = False) -> int:
        """A new variable; its number."""
        self.costs.append(cost)
        self.integer.append(integer)
        return len(self.costs) - 1

    def constrain(self, terms: Iterable[tuple[int, float]], low: float = -_INFINITY, high: float = _INFINITY) -> None:
        """low ≤ Σ coefficient · variable ≤ high."""
        variables, coefficients = zip(*terms, strict=True)
        self.rows.append((list(variables), list(coefficients), low, high))

    def solve(self, time_limit_s: float = 20.0, relative_gap: float = 1e-3) -> Solution | None:
        """The best solution found in the time; None when there is none. HiGHS's tolerances are absolute, so it gets costs of about 1."""
        solver = _Silent()
        solver.setOptionValue("time_limit", time_limit_s)
        solver.setOptionValue("mip_rel_gap", relative_gap)
        solver.setOptionValue("mip_abs_gap", 0.0)
        solver.setOptionValue("threads", 1)
        unit = float(np.median([abs(cost) for cost in self.costs if cost] or [1.0]))
        solver.passModel(self._model(unit))
        solver.run()
        info = solver.getInfo()
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            return None
        values = np.asarray(solver.getSolution().col_value)
        return Solution(values=values, objective=unit * float(info.objective_function_value), gap=max(0.0, float(info.mip_gap)))

    def _model(self, unit: float) -> highspy.HighsLp:
        model = highspy.HighsLp()
        columns = len(self.costs)
        model.num_col_, model.num_row_ = columns, len(self.rows)
        model.col_cost_ = np.asarray(self.costs, dtype=np.double) / unit
        model.col_lower_, model.col_upper_ = np.zeros(columns), np.ones(columns)
        model.row_lower_ = np.asarray([row[2] for row in self.rows], dtype=np.double)
        model.row_upper_ = np.asarray([row[3] for row in self.rows], dtype=np.double)
        matrix = model.a_matrix_
        matrix.format_ = highspy.MatrixFormat.kRowwise
        matrix.start_ = np.cumsum([0, *(len(row[0]) for row in self.rows)])
        matrix.index_ = np.concatenate([row[0] for row in self.rows]).astype(np.int32)
        matrix.value_ = np.concatenate([row[1] for row in self.rows]).astype(np.double)
        model.integrality_ = [highspy.HighsVarType.kInteger if each else highspy.HighsVarType.kContinuous for each in self.integer]
        return model
