"""What a contestant is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, runtime_checkable

from benchmarks.scenarios import PLAIN, Host, Scenario
from benchmarks.workloads import Batch, Workload

StepFunction = Callable[[Batch], float | None]
"""Takes one optimizer step on the *global* batch; returns the mean loss of this rank's part, or None if it has none.
The parts are equal, so the mean over the ranks that have one is the global loss."""


@runtime_checkable
class Recording(Protocol):
    """A step function that can say more."""

    def __call__(self, batch: Batch) -> float | None:
        """As of `StepFunction`."""

    def actions(self) -> Mapping[str, float]:
        """What each kind of action took in the last step, s."""


@dataclass(frozen=True, kw_only=True)
class RankContext:
    """One rank's place: `plan_path` is the saved plan for ours, and None for the peers; `compiled`: with torch.compile; `host`: where there
    are two."""

    rank: int
    world_size: int
    workload: Workload
    plan_path: Path | None = None
    compiled: bool = False
    scenario: Scenario = PLAIN
    host: Host | None = None

    @property
    def speeds(self) -> tuple[float, ...]:
        """Of each rank of this contestant."""
        return self.scenario.speeds(self.world_size)

    def part(self, batch: Batch, rank: int | None = None, ranks: int | None = None) -> Batch:
        """Return this rank's slice of the global batch, or that of one of so many."""
        parts, own = ranks or self.world_size, self.rank if rank is None else rank
        return {name: value.chunk(parts)[own] for name, value in batch.items()}


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to train the model: `builder` is `module:function`, called in each rank with its context.

    layout: ours that divides the model alike, with {n} ranks or {h}, half of them ("" none). ranks, threads: 0 as many as the race is for.
    least: it needs so many ranks; chunks: and so many blocks for each. families: that it can train, () all. package: that it needs besides
    torch. may_fail: whether the race goes on without it.
    """

    name: str
    title: str
    builder: str
    layout: str = ""
    ranks: int = 0
    threads: int = 1
    least: int = 2
    chunks: int = 0
    families: tuple[str, ...] = ()
    package: str = "torch"
    compiled: bool = False
    is_peer: bool = True
    may_fail: bool = False

    @property
    def base(self) -> str:
        """Its name, compiled or not."""
        return self.name.removesuffix(_COMPILED)

    def at(self, ranks: int) -> Contestant:
        """The same in a race of so many ranks."""
        return replace(self, ranks=self.ranks or ranks, threads=self.threads or ranks, layout=self.layout.format(n=ranks, h=ranks // 2))

    def divides_as(self, layout: str) -> bool:
        """Whether it divides the model as this layout does, whatever that says of an order which this one's leaves open."""
        own, given = (dict(pair.split("=", 1) for pair in text.split(",") if "=" in pair) for text in (self.layout, layout))
        order = {"microbatches", "schedule"} - own.keys()
        return bool(own) and own == {name: value for name, value in given.items() if name not in order}


OURS = "ours"
SINGLE = "single"
_COMPILED = "+compile"
_BLOCKS = ("gpt2", "llama", "vit", "bert", "moe")
"""Families that are a chain of blocks: torch's pipelines and plans for tensors need that."""
_DEEPSPEED = "benchmarks.peers_deepspeed"
CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant(name=OURS, title="shardwise", builder="benchmarks.ours:build", is_peer=False),
        Contestant(name="ddp", title="torch DDP", builder="benchmarks.peers:ddp", layout="dp={n}"),
        Contestant(name="fsdp2", title="torch FSDP2", builder="benchmarks.peers:fsdp2", layout="dp={n},zero=3"),
        Contestant(name="tp", title="torch tensor-parallel", builder="benchmarks.peers:tensor_parallel", layout="tp={n}", families=_BLOCKS),
        Contestant(
            name="1f1b", title="torch 1F1B pipeline", builder="benchmarks.peers:pipeline", layout="pp={n}", chunks=1, families=_BLOCKS
        ),
        Contestant(
            name="interleaved",
            title="torch interleaved 1F1B",
            builder="benchmarks.peers:interleaved",
            layout="pp={n},chunks=2,schedule=interleaved",
            chunks=2,
            families=_BLOCKS,
        ),
        Contestant(
            name="fsdp2+tp",
            title="torch FSDP2 × tensor-parallel",
            builder="benchmarks.peers:fsdp2_tensor_parallel",
            layout="dp={h},tp=2,zero=3",
            least=4,
            families=_BLOCKS,
        ),
        Contestant(
            name="ddp+1f1b",
            title="torch DDP × 1F1B",
            builder="benchmarks.peers:ddp_pipeline",
            layout="dp={h},pp=2",
            least=4,
            families=_BLOCKS,
        ),
        Contestant(
            name="deepspeed-zero2", title="DeepSpeed ZeRO-2", builder=f"{_DEEPSPEED}:zero2", layout="dp={n},zero=2", package="deepspeed"
        ),
        Contestant(
            name="deepspeed-zero3", title="DeepSpeed ZeRO-3", builder=f"{_DEEPSPEED}:zero3", layout="dp={n},zero=3", package="deepspeed"
        ),
        Contestant(
            name="deepspeed-pp",
            title="DeepSpeed pipeline",
            builder=f"{_DEEPSPEED}:pipeline",
            layout="pp={n}",
            chunks=1,
            families=("llama", "vit", "moe"),
            package="deepspeed",
        ),
        Contestant(name=SINGLE, title="one process, all threads", builder="benchmarks.peers:single", ranks=1, threads=0, is_peer=False),
    )
}


def missing_packages() -> list[str]:
    """Packages that contestants need, and that are not installed."""
    return sorted({each.package for each in CONTESTANTS.values() if find_spec(each.package) is None})


def contestants(workload: Workload, ranks: int, *, compiled: Sequence[str] = (), limited: bool = False) -> dict[str, Contestant]:
    """All that can train this model on so many ranks, by name; those named also as `NAME+compile`, with torch.compile. What torch.compile
    cannot do, or a limit that the ranks have does not let happen, may fail, ours excepted."""
    lacking = missing_packages()
    found: dict[str, Contestant] = {}
    for each in CONTESTANTS.values():
        if each.least > ranks or (each.families and workload.family not in each.families) or each.chunks * ranks > workload.layers:
            continue
        if each.package in lacking:
            continue
        found[each.name] = replace(each.at(ranks), may_fail=limited and each.name != OURS)
        if each.name in compiled:
            title, may_fail = f"{each.title}, compiled", each.name != OURS
            more = replace(found[each.name], name=each.name + _COMPILED, title=title, compiled=True, may_fail=may_fail)
            found[more.name] = more
    return found
