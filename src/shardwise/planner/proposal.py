"""A layout for a known model on a cluster of the catalog, as a small file: what to run, what it would take, and why.

It is found from a few of the model's blocks, so it does not say how each operator is split; a `Plan` does. What of it cannot run yet is
marked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from shardwise.capture.precision import Precision
from shardwise.errors import PlanError

__all__ = ["Alternative", "Forecast", "Parts", "Proposal", "Search", "WhatIf"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Parts(_Strict):
    """Seconds of a step, of a pipeline rank on average; their sum is the step. As of `shardwise.planner.scale.Parts`."""

    compute: float
    recompute: float
    exchange: float
    reduce: float
    update: float
    waiting: float


class Forecast(_Strict):
    """What the simulator says. Seconds, bytes, shares.

    memory_bytes, by_kind: of the fullest rank; limit_bytes: what a layout may take of a device; bubble: share of the ranks' time spent
    waiting; communication_s: exposed, of a rank on average; peak_share: model flop/s ÷ the devices' peak; dollars: of a step, None where
    a price is unknown.
    """

    step_time_s: float
    parts: Parts
    bubble: float
    communication_s: float
    memory_bytes: int
    by_kind: dict[str, int]
    limit_bytes: int
    samples_per_s: float
    tokens_per_s: float | None
    peak_share: float
    dollars: float | None


class Alternative(_Strict):
    """Another layout that fits. more: seconds that each part takes more than the chosen one's."""

    layout: str
    precision: Precision
    step_time_s: float
    memory_bytes: int
    more: Parts
    runnable: bool


class Search(_Strict):
    """How sure it is. lower_bound_s: nothing that was left out takes less; gap: the share of the step that may be lost by that;
    splits, lowered: sizes of tp, cp, ep and microbatches, and precisions, and how many were examined; composed, simulated: layouts;
    seconds: of searching.
    """

    lower_bound_s: float
    gap: float
    splits: int
    lowered: int
    composed: int
    simulated: int
    seconds: float


class WhatIf(_Strict):
    """The best layout after a change, None where none fits."""

    change: str
    cluster: str
    layout: str | None
    step_time_s: float | None
    memory_bytes: int | None
    dollars: float | None
    verdict: str


class Proposal(_Strict):
    """A layout. microbatch: samples of one on a data rank; stages: blocks of each stage in order; price_per_hour: of one device, dollars.

    runnable, because: whether the runtime can run it, and what it lacks. objective: what it is best at.
    """

    format_version: Literal[1] = 1
    kind: Literal["proposal"] = "proposal"
    model: str
    cluster: str
    ranks: int
    global_batch: int
    sequence: int | None
    precision: Precision
    objective: str
    price_per_hour: float | None
    layout: str
    dp: int
    cp: int
    attention: str = "gather"
    tp: int
    ep: int
    pp: int
    chunks: int
    microbatches: int
    microbatch: int
    schedule: str
    zero: int
    recompute: str
    stages: list[int]
    runnable: bool
    because: list[str]
    predicted: Forecast
    search: Search
    binds: str
    others: list[Alternative]
    what_if: list[WhatIf] = []
    sources: list[str] = []
    explanation: list[str] = []

    def save(self, path: str | Path) -> None:
        """Writes plan.json."""
        Path(path).write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Proposal:
        """Reads what `save` wrote. Raises PlanError for a damaged file."""
        try:
            found: Any = json.loads(Path(path).read_text())
        except OSError as error:
            raise PlanError(f"plan {path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise PlanError(f"{path} is no JSON: {error}") from error
        try:
            return cls.model_validate(found)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise PlanError(f"{path}: {where}: {first['msg']}; repair it or make the plan again") from error

    def __str__(self) -> str:
        return "\n".join(self.explanation) or self.layout
