"""Which of the simulated layouts is taken."""

from __future__ import annotations

import pytest

from shardwise.planner.layout import Layout
from shardwise.planner.trial import Trial, best_of
from shardwise.simulate.simulator import Simulation


def trial(seconds: float, *mib: int, note: str = "") -> Trial:
    memory = [{"parameters": 3 << 20, "saved": size - 3 << 20} for size in mib]
    simulation = Simulation(step_time_s=seconds, timeline=[], memory=memory, bubble=0.0, communication_s=0.0)
    return Trial(layout=Layout(), simulation=simulation, note=note)


@pytest.mark.parametrize(
    ("trials", "best"),
    [
        ([trial(2.0, 10), trial(1.0, 90), trial(3.0, 5)], 1),
        ([trial(1.0, 90), trial(1.004, 80), trial(1.006, 5)], 1),
        ([trial(1.004, 80), trial(1.0, 90), trial(1.004, 70)], 2),
        ([trial(1.0, 60, 80), trial(1.0, 79, 79)], 1),
        ([trial(1.003, 80), trial(1.002, 80)], 1),
        ([trial(0.5, 90, note="needs too much"), trial(0.502, 40), Trial(layout=Layout())], 1),
    ],
    ids=["the-fastest", "as-fast-and-leaner", "not-next-to-each-other", "by-the-fullest-rank", "as-lean-and-faster", "what-fits"],
)
def test_the_fastest_is_taken_and_of_the_fastest_the_leanest(trials: list[Trial], best: int) -> None:
    assert best_of(trials) is trials[best]


def test_nothing_is_taken_where_nothing_fits() -> None:
    assert best_of([]) is None
    assert best_of([trial(1.0, 9, note="needs too much"), Trial(layout=Layout())]) is None
