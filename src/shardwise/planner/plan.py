"""The plan: a small JSON file, made on any machine and applied on another, readable and editable by hand.

It says which ranks do what by names that survive a new capture: module paths (with `*` for the number of a repeated block), operators and
ordinals; and by factors, not sizes. What the data axes do follows from the model and is not written down.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError, model_validator

from shardwise.capture.blocks import block_pattern
from shardwise.capture.graph import Graph, Op
from shardwise.capture.precision import Precision
from shardwise.cluster.model import Cluster, cluster_of
from shardwise.cluster.specs import machines
from shardwise.errors import ClusterError, LayoutError, PlanError
from shardwise.program.recompute import Recompute
from shardwise.program.tables import OWN, Slot, placed, placement, rank_tables, read_tables
from shardwise.sharding.context import Attention
from shardwise.sharding.signature import Choice
from shardwise.sharding.types import I, P, Placement, R, Shard
from shardwise.simulate.profile import Profile, on_links
from shardwise.simulate.simulator import Mesh, Simulation, simulate_profile
from shardwise.simulate.slow import Slow

__all__ = ["FORMAT_VERSION", "Infeasible", "Plan", "Prediction", "Random", "choice_text", "read_choice", "read_placement", "simulate"]

FORMAT_VERSION = 1

Random = Literal["keyed", "fast"]
_AXES = ("dp", "cp", "tp", "pp")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Prediction(_Strict):
    """What the simulator says of a plan. Seconds and bytes; memory_bytes and by_kind for each rank.

    by_kind: for each rank parameters, gradients, optimizer, saved, transient, buffers and runtime at the peak.
    limit_bytes: what a rank has, the largest where they are not alike; limits: each of them where they are not.
    """

    step_time_s: float
    memory_bytes: list[int]
    by_kind: list[dict[str, int]] = []
    bubble: float = 0.0
    communication_s: float = 0.0
    limit_bytes: int | None = None
    limits: list[int] = []


class Candidate(_Strict):
    """A layout that was considered: its estimate, its simulated time where it got that far, why it was not taken."""

    layout: str
    estimate_s: float | None = None
    step_time_s: float | None = None
    memory_bytes: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Chooser:
    """(kind, message bytes, ranks) → the implementation of a collective, by tables of (bytes up to, implementation).

    Those with equal tables are equal, and what was traced with one serves the other.
    """

    tables: tuple[tuple[str, tuple[tuple[float, str], ...]], ...]

    @staticmethod
    def of(tables: Mapping[str, Sequence[tuple[float, str]]]) -> Chooser:
        """From tables by `kind/ranks`."""
        return Chooser(tuple(sorted((name, tuple((limit, impl) for limit, impl in table)) for name, table in tables.items())))

    def __call__(self, kind: str, message: int, ranks: int) -> str:
        table = next((table for name, table in self.tables if name == f"{kind}/{ranks}"), ())
        return next((impl for limit, impl in table if message <= limit), "native")


class Plan(_Strict):
    """How a model is split.

    fingerprint: of the captured graph that the plan is for. stages: key of each stage's first operator.
    chunks: stages of each pipeline rank. schedule: the name of one, or "table" for the user's own, whose lines `table` has.
    random: "keyed", random numbers are the same in every layout; "fast", they come from torch's generator, seeded for each part.
    precision: that in which operators compute (`shardwise.capture.precision`).
    sequence_dims: where cp splits the sequence, batch input → its sequence dim; attention: how its ranks do that together
    (`shardwise.sharding.context`).
    shares: in which proportion the data ranks divide the samples; [] evenly.
    zero: what the data ranks divide (0 nothing, 1 optimizer states, 2 gradients too, 3 parameters too), shard: in groups of how many, 0: of
    all. recompute: what the backward pass makes again (`shardwise.program.recompute`).
    recompute_blocks: in the first so many blocks of each stage, 0: in all.
    operators, parameters: pattern → choice or type on the tensor axis; what is not named is whole.
    collectives: "kind/ranks" → (up to so many bytes, implementation), measured on the cluster.
    profile: what the stages take, for the simulator.
    ep: of the dp data ranks so many neighbours divide the experts.
    """

    format_version: Literal[1] = 1
    model: str
    fingerprint: str
    cluster: str
    backend: str
    ranks: int
    dp: int
    cp: int = 1
    tp: int
    ep: int = 1
    pp: int
    chunks: int = 1
    microbatches: int
    schedule: str
    table: list[str] = []
    global_batch: int
    optimizer: str
    random: Random = "keyed"
    precision: Precision = "float32"
    zero: Literal[0, 1, 2, 3] = 0
    shard: int = 0
    recompute: Recompute = "none"
    recompute_blocks: NonNegativeInt = 0
    sequence_dims: dict[str, int] = {}
    attention: Attention = "gather"
    shares: list[int] = []
    stages: list[str]
    operators: dict[str, str] = {}
    parameters: dict[str, str] = {}
    collectives: dict[str, list[tuple[float, str]]] = {}
    profile: Profile
    predicted: Prediction
    gap: float = 0.0
    considered: list[Candidate] = []
    explanation: list[str] = []

    @model_validator(mode="after")
    def _sizes_agree(self) -> Plan:
        sizes = {"dp": self.dp, "tp": self.tp, "pp": self.pp} if self.cp == 1 else {name: getattr(self, name) for name in _AXES}
        if prod(sizes.values()) != self.ranks:
            product = " × ".join(f"{name}={size}" for name, size in sizes.items())
            raise ValueError(f"{product} are {prod(sizes.values())} ranks, not ranks={self.ranks}")
        if self.shares and (len(self.shares) != self.dp or min(self.shares) < 1 or self.global_batch % sum(self.shares)):
            raise ValueError(f"shares={self.shares} do not divide global_batch={self.global_batch} among the ranks of dp={self.dp}")
        each = [self.global_batch * share // sum(self.shares) for share in self.shares]
        if any(samples % self.microbatches for samples in each):
            raise ValueError(f"microbatches={self.microbatches} do not divide the data ranks' samples, {each}")
        if self.global_batch < self.dp:
            raise ValueError(f"a global batch of {self.global_batch} leaves some of the ranks on dp={self.dp} without a sample")
        if not self.shares and self.microbatches > 1 and self.global_batch % (self.dp * self.microbatches):
            raise ValueError(f"dp={self.dp} × microbatches={self.microbatches} do not divide global_batch={self.global_batch}")
        equal = self.dp % self.ep == 0 and self.global_batch % self.dp == 0 and not (self.shares or self.shard) if self.ep > 0 else False
        if self.ep != 1 and not equal:
            raise ValueError(
                f"ep={self.ep} must divide dp={self.dp} data ranks with equal parts of global_batch={self.global_batch}, without shares or "
                "shard"
            )
        self._check_schedule()
        if self.attention != "gather" and self.cp == 1:
            raise ValueError(f"attention={self.attention} says how the ranks of cp share it, and cp is 1; use attention=gather")
        data = self.dp * self.cp
        if self.zero and data == 1:
            raise ValueError(
                f"zero={self.zero} divides over data ranks, of which there is one; use zero=0, or plan again with dp=2 or more"
            )
        if self.recompute_blocks and self.recompute == "none":
            raise ValueError(
                f"recompute_blocks={self.recompute_blocks} says how many blocks of a stage compute again, and recompute is none; use "
                "recompute=selective or full"
            )
        if self.shard and (not self.zero or self.shard in (1, data) or data % self.shard):
            raise ValueError(
                f"shard={self.shard} must divide dp · cp={data} data ranks into several groups of two or more, for zero=1 to 3"
            )
        return self

    def _check_schedule(self) -> None:
        if (self.schedule == OWN) != bool(self.table):
            raise ValueError(
                f"schedule={self.schedule} and a table of {len(self.table)} lines: a table of one's own goes with schedule=table"
            )
        try:
            tables = self.tables if self.table else None
            stages = (
                len(placement(self.schedule, self.pp, self.chunks))
                if tables is None
                else len({slot.stage for row in tables for slot in row})
            )
        except LayoutError as error:
            raise ValueError(str(error)) from error
        if tables is not None:
            have = len(tables), stages, 1 + max(slot.microbatch for row in tables for slot in row)
            if have != (self.pp, self.pp * self.chunks, self.microbatches):
                raise ValueError(
                    f"the table is for pp={have[0]}, chunks={have[1] // have[0]}, microbatches={have[2]}, the plan says pp={self.pp}, "
                    f"chunks={self.chunks}, microbatches={self.microbatches}"
                )

    @property
    def layout(self) -> str:
        """The plan in a layout's words."""
        context = f"cp={self.cp}," if self.cp > 1 else ""
        experts = f"ep={self.ep}," if self.ep > 1 else ""
        attention = f"attention={self.attention}," if self.cp > 1 else ""
        chunks = f"chunks={self.chunks}," if self.chunks > 1 else ""
        names = ("zero", "shard", "recompute", "recompute_blocks")
        more = [f",{name}={value}" for name in names if (value := getattr(self, name)) not in (0, "none")]
        more += [f",shares={':'.join(map(str, self.shares))}"] if self.shares else []
        schedule = f"microbatches={self.microbatches},{attention}schedule={self.schedule}{''.join(more)}"
        return f"dp={self.dp},{context}tp={self.tp},{experts}pp={self.pp},{chunks}{schedule}"

    @property
    def tables(self) -> list[list[Slot]]:
        """Each pipeline rank's slots. Raises LayoutError for a schedule that is unknown or does not take the plan's sizes."""
        if self.table:
            return read_tables("\n".join(self.table))
        return rank_tables(self.schedule, self.pp, self.chunks, self.microbatches)

    @property
    def placement(self) -> tuple[int, ...]:
        """Stage → which of the pipeline's ranks has it."""
        home = placed(self.tables)
        return tuple(home[stage] for stage in sorted(home))

    @property
    def mesh(self) -> Mesh:
        """The plan's sizes; those of dp and cp as one, since they do alike."""
        sizes = {"dp": self.dp * self.cp, "tp": self.tp, "pp": self.pp, "chunks": self.chunks, "coupled": self._coupled}
        return Mesh(**sizes, microbatches=self.microbatches, schedule=self.schedule)

    @property
    def _coupled(self) -> int:
        """Neighbouring ranks that do each microbatch together: on the tensor, context and expert axes, and those that gather parameters."""
        near = self.cp * self.ep
        return self.tp * (max(near, self.shard or self.dp * self.cp) if self.zero == 3 else near)

    def chooser(self) -> Chooser:
        """(kind, message bytes, ranks) → implementation."""
        return Chooser.of(self.collectives)

    def save(self, path: str | Path) -> None:
        """Writes plan.json."""
        Path(path).write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads plan.json. Raises PlanError for a damaged file or another format version."""
        try:
            text = Path(path).read_text()
        except OSError as error:
            raise PlanError(f"plan {path} cannot be read: {error.strerror}") from error
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, source: str = "plan") -> Plan:
        """Reads a plan's JSON."""
        import json

        try:
            found: Any = json.loads(text)
        except ValueError as error:
            raise PlanError(f"{source} is no JSON: {error}") from error
        if isinstance(found, dict) and found.get("kind") == "proposal":
            raise PlanError(
                f"{source} is a proposal, made from a few layers: it does not say how each operator is split; "
                "make a plan for the runtime with `shardwise plan --whole --layout ...`"
            )
        version = found.get("format_version") if isinstance(found, dict) else None
        if version != FORMAT_VERSION:
            raise PlanError(f"{source} has format version {version}, this shardwise reads {FORMAT_VERSION}; make the plan again")
        try:
            return cls.model_validate(found)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise PlanError(
                f"{source}: {where}: {first['msg']} (and {error.error_count() - 1} more); repair it or make the plan again"
            ) from error

    def __str__(self) -> str:
        return "\n".join(self.explanation) or self.layout


class Infeasible(_Strict):
    """No layout within the given limits; a result, not an error. It is false, so that `if not plan:` works.

    reasons: what binds, with both numbers; remedy: the smallest change that would fit.
    """

    reasons: list[str]
    remedy: str

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return "\n".join(["No layout fits:", *(f"  {reason}" for reason in self.reasons), f"Smallest change that fits: {self.remedy}"])


def simulate(plan: Plan, slow: Slow | None = None) -> Simulation:
    """A step of the plan on virtual clocks: its time, each rank's memory, and the timeline; what it would be with something slow.

    Raises LayoutError for a slow rank, stage or link that the plan does not have.
    """
    slow = slow or Slow()
    profile = on_links(plan.profile, _slowed(plan, slow.levels), plan.mesh.stage_ranks) if slow.levels else plan.profile
    return simulate_profile(slow.applied(profile), plan.mesh, plan.tables, slow=slow.ranks)


def _slowed(plan: Plan, levels: Mapping[str, float]) -> Cluster:
    """The plan's devices on slower links."""
    try:
        found = machines(plan.cluster)
    except ClusterError as error:
        raise LayoutError(
            f"slow link {next(iter(levels))}: the plan's cluster {plan.cluster} is not of the catalog and has no named links; name two "
            "stages that send to each other, such as 0-1=0.5"
        ) from error
    return cluster_of(found.slowed(levels))


def choice_text(choice: Choice) -> str:
    """`n`, `n blocks=3`, `v owner=1`, `I`, `R`, `P`."""
    if choice.mode != "split":
        return choice.mode if choice.linear == 0 else f"{choice.mode}{choice.linear}"
    if choice.owner is not None:
        return f"{choice.factor} owner={choice.owner}"
    extra = "".join(f" {name}={value}" for name, value in (("blocks", choice.blocks), ("unit", choice.unit)) if value != 1)
    return f"{choice.factor}{extra}"


def read_choice(text: str, key: str) -> Choice:
    """The choice that `choice_text` wrote. Raises PlanError."""
    if match := re.fullmatch(r"([IR])|P(\d*)", text):
        return Choice(match.group(1)) if match.group(1) else Choice("P", linear=int(match.group(2) or 0))  # type: ignore[arg-type]
    if match := re.fullmatch(r"(\w+) owner=(\d+)", text):
        return Choice("split", match.group(1), owner=int(match.group(2)))
    if match := re.fullmatch(r"(\w+)(?: blocks=(\d+))?(?: unit=(\d+))?", text):
        return Choice("split", match.group(1), int(match.group(2) or 1), int(match.group(3) or 1))
    raise PlanError(f"choice {text!r} of {key} is not understood; write a factor, `factor blocks=3`, `factor owner=0`, I, R or P")


def read_placement(text: str, key: str) -> Placement:
    """The type that a placement's repr wrote. Raises PlanError."""
    if text in ("I", "R", "P"):
        known: dict[str, Placement] = {"I": I, "R": R, "P": P}
        return known[text]
    if match := re.fullmatch(r"S\((\d+), owner=(\d+)\)", text):
        return Shard(int(match.group(1)), owner=int(match.group(2)))
    if match := re.fullmatch(r"S\((\d+)(?:, blocks=(\d+))?(?:, unit=(\d+))?\)", text):
        return Shard(int(match.group(1)), int(match.group(2) or 1), int(match.group(3) or 1))
    raise PlanError(f"type {text!r} of {key} is not understood; write S(0), S(1, blocks=3), S(0, owner=1), R or I")


def by_pattern(entries: Iterable[tuple[str, str]]) -> dict[str, str]:
    """(key, text) pairs as one entry for each pattern; keys that differ from their pattern's first get one of their own."""
    found: dict[str, str] = {}
    for key, text in entries:
        pattern = block_pattern(key)
        if found.setdefault(pattern, text) != text:
            found[key] = text
    return found


def looked_up(entries: dict[str, str], key: str) -> str | None:
    """The entry of a key: its own, else its pattern's."""
    return entries.get(key, entries.get(block_pattern(key)))


def op_with_key(graph: Graph, key: str) -> Op:
    """The operator that a plan names. Raises PlanError."""
    for op in graph.ops:
        if op.key == key:
            return op
    raise PlanError(f"the plan begins a stage at {key}, which the model does not have; make the plan again")
