"""Layouts: what a user pins of a plan, `"tp=2,pp=2,microbatches=4,schedule=1f1b"` or `"dp=4,zero=3,recompute=full"`; what is not named is
searched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import gcd, prod
from pathlib import Path
from typing import Any

from shardwise.errors import BatchError, LayoutError
from shardwise.program.recompute import RECOMPUTE
from shardwise.program.tables import NAMES, OWN, Slot, least_chunks, placement, rank_tables, read_tables
from shardwise.sharding.context import ATTENTION

__all__ = ["Layout", "completions"]

_NUMBERS = ("dp", "cp", "tp", "ep", "pp", "chunks", "microbatches")
_NAMES = (*_NUMBERS, "attention", "schedule", "zero", "shard", "recompute", "recompute_blocks", "shares")
_MOST_ZERO = 3


@dataclass(frozen=True, kw_only=True)
class Layout:
    """dp × cp × tp × pp ranks: copies of the model on parts of the batch, ranks that share each sequence, ranks that share each operator,
    ranks of the pipeline; None: not pinned. ep: how many of the data ranks divide the experts. Where they are not pinned, cp is searched
    where each copy has one sample, or nothing else fits, ep where nothing else fits.

    attention: how the ranks of cp do it together (`shardwise.sharding.context`); all ways are tried where it is not pinned.

    chunks: stages of each pipeline rank, as few as the schedule takes where not pinned. table: the text of a schedule of the user's own.
    schedule: where not pinned 1f1b, or another that promises to be faster. zero: what data ranks divide (0 to 3), in groups of `shard`
    where that is not all of them; recompute: none, selective or full, recompute_blocks: in the first so many blocks of each stage, None: in
    all. Where these are not pinned they are 0 and none, and more where memory would not do, or zero=1 where it promises to be faster.
    shares: in which proportion the copies divide the batch, () evenly; not pinned, evenly where all ranks are alike.
    """

    dp: int | None = None
    cp: int | None = None
    tp: int | None = None
    ep: int | None = None
    pp: int | None = None
    chunks: int | None = None
    microbatches: int | None = None
    attention: str | None = None
    schedule: str | None = None
    table: str = ""
    zero: int | None = None
    shard: int | None = None
    recompute: str | None = None
    recompute_blocks: int | None = None
    shares: tuple[int, ...] | None = None

    @classmethod
    def parse(cls, given: Layout | str | Mapping[str, Any] | None) -> Layout:
        """Reads text or a mapping; `schedule` is a name, or a file with a table. Raises LayoutError for what is not understood."""
        if given is None or isinstance(given, Layout):
            return _with_shares(given or cls())
        pairs: dict[str, Any] = dict(given) if isinstance(given, Mapping) else dict(_pairs(given))
        pairs = {name: _read(name, value) for name, value in pairs.items()}
        if pairs.get("shard") and not pairs.get("zero"):
            raise LayoutError(
                f"shard={pairs['shard']} in the layout says how many ranks divide what zero divides: name zero=1, 2 or 3, too"
            )
        if pairs.get("recompute_blocks") and pairs.get("recompute", "none") == "none":
            raise LayoutError(
                f"recompute_blocks={pairs['recompute_blocks']} in the layout says how many blocks of a stage compute again: name "
                "recompute=selective or full, too"
            )
        if pairs.get("attention") and pairs.get("cp", 1) == 1:
            raise LayoutError(f"attention={pairs['attention']} in the layout says how the ranks of cp share it: name cp=2 or more, too")
        schedule = pairs.get("schedule")
        if schedule is not None and schedule not in NAMES:
            return _with_table(_with_shares(cls(**{**pairs, "schedule": OWN})), str(schedule))
        layout = _with_shares(cls(**pairs))
        if layout.schedule and layout.chunks:
            placement(layout.schedule, layout.pp or 1, layout.chunks)  # refuses a number of chunks that it does not take
        return layout

    @property
    def ranks(self) -> int:
        """Ranks that a complete layout takes."""
        return prod(self.mesh)

    @property
    def mesh(self) -> tuple[int, int, int, int]:
        """(dp, cp, tp, pp) of a complete layout."""
        return self.dp or 1, self.cp or 1, self.tp or 1, self.pp or 1

    @property
    def stages(self) -> int:
        """Of a complete layout."""
        return (self.pp or 1) * (self.chunks or 1)

    @property
    def tables(self) -> list[list[Slot]]:
        """Each pipeline rank's slots, of a complete layout."""
        if self.table:
            return read_tables(self.table)
        assert self.schedule and self.microbatches, f"{self} is not complete"
        return rank_tables(self.schedule, self.pp or 1, self.chunks or 1, self.microbatches)

    def __str__(self) -> str:
        names = [name for name in _NAMES[:-1] if name != "chunks" or (self.chunks or 1) > 1]
        words = [f"{name}={getattr(self, name)}" for name in names if getattr(self, name) is not None]
        return ",".join([*words, *([f"shares={':'.join(map(str, self.shares))}"] if self.shares else [])])


def _with_table(layout: Layout, source: str) -> Layout:
    """With the table of a file, and the sizes that it is for."""
    path = Path(source)
    if not path.is_file():
        raise LayoutError(f"schedule={source} in the layout is unknown; there are {', '.join(NAMES)}, or a file with a table of your own")
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise LayoutError(f"the table {source} cannot be read: {error}") from error
    try:
        tables = read_tables(text)
    except LayoutError as error:
        raise LayoutError(f"{source}: {error}") from error
    slots = [slot for row in tables for slot in row]
    sizes = {
        "pp": len(tables),
        "chunks": len({slot.stage for slot in slots}) // len(tables),
        "microbatches": 1 + max(slot.microbatch for slot in slots),
    }
    for name, size in sizes.items():
        if getattr(layout, name) not in (None, size):
            raise LayoutError(
                f"{name}={getattr(layout, name)} in the layout, but the table {source} is for {name}={size}; leave {name} out"
            )
    return replace(layout, table=text, pp=sizes["pp"], chunks=sizes["chunks"], microbatches=sizes["microbatches"])


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise LayoutError(f"{item!r} in layout {text!r} is no NAME=VALUE pair; write for example tp=2,pp=2")
        if name in seen:
            raise LayoutError(f"{name} is named twice in layout {text!r}")
        seen.add(name)
        yield name, value


def _numbers(value: Any) -> tuple[int, ...]:
    """`6:2` or [6, 2]."""
    parts = value.split(":") if isinstance(value, str) else list(value) if isinstance(value, Iterable) else [value]
    return tuple(_positive("shares", part) for part in parts)


def _with_shares(layout: Layout) -> Layout:
    """Its dp is that of its shares; these without common divisor, and none where they are equal."""
    shares = layout.shares
    if not shares:
        return layout
    if layout.dp not in (None, len(shares)):
        text = ":".join(map(str, shares))
        raise LayoutError(f"shares={text} are of {len(shares)} copies, dp={layout.dp} has {layout.dp}; give a share for each copy")
    least = tuple(share // gcd(*shares) for share in shares)
    return replace(layout, dp=len(shares), shares=least if len(set(least)) > 1 else ())


def _read(name: str, value: Any) -> Any:
    """What is given for a name; a schedule as it is."""
    known = {"zero": range(_MOST_ZERO + 1), "recompute": RECOMPUTE, "attention": ATTENTION}
    if name in (*_NUMBERS, "shard", "recompute_blocks"):
        return _positive(name, value)
    if name == "shares":
        return _numbers(value)
    if name in known:
        if str(value) not in map(str, known[name]):
            raise LayoutError(f"{name}={value} in the layout is unknown; there are {', '.join(map(str, known[name]))}")
        return int(value) if name == "zero" else value
    if name != "schedule":
        raise LayoutError(f"{name!r} in the layout is unknown; there are {', '.join(_NAMES)}")
    return value


def _positive(name: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1 or (isinstance(value, float) and value != number):
        raise LayoutError(f"{name}={value} in the layout is not a whole number of 1 or more")
    return number


def completions(layout: Layout, ranks: int, samples: int, obstacle: str) -> list[Layout]:
    """All complete layouts on `ranks` ranks for a batch of `samples` that agree with what is pinned.

    obstacle: why the batch must not be cut into microbatches, "" when it may be.
    Raises LayoutError and BatchError when none is left, saying which two things contradict each other.
    """
    layout = _without_defaults(layout)
    pinned = layout.ranks
    if pinned > ranks:
        raise LayoutError(f"layout {layout} takes {pinned} ranks, the cluster has {ranks}; lower one of the sizes or name a larger cluster")
    free = [name for name in ("dp", "tp", "pp") if getattr(layout, name) is None]
    if free and ranks % pinned:
        raise LayoutError(f"layout {layout} takes {pinned} ranks, which do not divide the cluster's {ranks}; pin sizes whose product does")
    meshes = [layout] if not free else list(_fill(layout, free, ranks // pinned))
    meshes = _with_experts(layout, meshes)
    meshes = [_in_groups(mesh) for mesh in meshes if _divides(mesh)] or _refuse_zero(layout, meshes)
    found = [complete for mesh in meshes for complete in _microbatched(mesh, layout, samples, obstacle)]
    if not found:
        _explain(layout, meshes, samples, obstacle)
    return found


def _without_defaults(layout: Layout) -> Layout:
    """What says no more than leaving it out would."""
    return replace(
        layout,
        cp=None if layout.cp == 1 else layout.cp,
        ep=None if layout.ep == 1 else layout.ep,
        zero=layout.zero or None,
        recompute=None if layout.recompute == "none" else layout.recompute,
    )


def _with_experts(layout: Layout, meshes: list[Layout]) -> list[Layout]:
    """Those whose data ranks ep divides. Raises LayoutError where there are none, and where something does not go with ep."""
    if not layout.ep:
        return meshes
    for name, value in (("shares", layout.shares), ("shard", layout.shard)):
        if value:
            raise LayoutError(
                f"{name} in layout {layout} is not possible with ep={layout.ep}: experts' ranks take equal parts; leave it out"
            )
    counts = sorted({mesh.dp or 1 for mesh in meshes})
    if found := [mesh for mesh in meshes if (mesh.dp or 1) % layout.ep == 0]:
        return found
    raise LayoutError(
        f"ep={layout.ep} divides the experts among data ranks, of which layout {layout} has {', '.join(map(str, counts))}; "
        f"pin dp={layout.ep} or a multiple of it"
    )


def _divides(mesh: Layout) -> bool:
    """Whether there are ranks that can divide what the layout wants divided."""
    data = (mesh.dp or 1) * (mesh.cp or 1)
    return not mesh.zero or (data > 1 and data % (mesh.shard or 1) == 0 and mesh.shard != 1)


def _in_groups(mesh: Layout) -> Layout:
    """One group of all data ranks needs no naming."""
    return replace(mesh, shard=None) if mesh.shard == (mesh.dp or 1) * (mesh.cp or 1) else mesh


def _refuse_zero(layout: Layout, meshes: list[Layout]) -> list[Layout]:
    counts = ", ".join(map(str, sorted({(mesh.dp or 1) * (mesh.cp or 1) for mesh in meshes})))
    if layout.shard:
        raise LayoutError(
            f"shard={layout.shard} in layout {layout} divides no number of data ranks that there can be ({counts}) into groups of two or "
            "more; pin a dp that it divides"
        )
    raise LayoutError(f"zero={layout.zero} divides over data ranks, of which layout {layout} has {counts}; pin dp=2 or more, or zero=0")


def _fill(layout: Layout, free: list[str], left: int) -> Iterator[Layout]:
    if len(free) == 1:
        yield _with(layout, free[0], left)
        return
    for size in range(1, left + 1):
        if left % size == 0:
            yield from _fill(_with(layout, free[0], size), free[1:], left // size)


def _with(layout: Layout, name: str, size: int) -> Layout:
    changed: dict[str, Any] = {name: size}
    return replace(layout, **changed)


def _microbatched(mesh: Layout, pinned: Layout, samples: int, obstacle: str) -> Iterator[Layout]:
    assert mesh.dp and mesh.pp
    parts = sum(mesh.shares or ()) or mesh.dp
    if samples < parts or (samples % parts and (mesh.shares or mesh.ep or not pinned.dp)):
        return
    each = samples // parts if samples % parts == 0 else 1  # what does not divide the batch is not cut into microbatches
    useful = [1] if obstacle else _useful_counts(each, mesh.pp)
    counts = [pinned.microbatches] if pinned.microbatches else useful
    for count in counts:
        if each % count == 0 and (count == 1 or not obstacle):
            schedule = pinned.schedule or ("interleaved" if (pinned.chunks or 1) > 1 else "1f1b")
            yield replace(mesh, microbatches=count, schedule=schedule, chunks=pinned.chunks or least_chunks(schedule))


def _useful_counts(samples: int, stages: int) -> list[int]:
    """Without stages one microbatch is fastest, and more only save memory; with them, from as many as stages to four times that."""
    divisors = [count for count in range(1, samples + 1) if samples % count == 0]
    if stages == 1:
        return [count for count in divisors if count in (1, 2, 4, 16)]
    return [count for count in divisors if stages <= count <= 4 * stages] or divisors


def _explain(layout: Layout, meshes: list[Layout], samples: int, obstacle: str) -> None:
    if layout.microbatches and layout.microbatches > 1 and obstacle:
        raise LayoutError(f"microbatches={layout.microbatches} would change the numbers: {obstacle}; use microbatches=1")
    if layout.shares and samples % sum(layout.shares):
        shares, total = ":".join(map(str, layout.shares)), sum(layout.shares)
        raise BatchError(
            f"shares={shares} divide a batch of a multiple of {total} samples, not {samples}; change the global batch or the shares"
        )
    if layout.microbatches:
        parts = sorted({sum(mesh.shares or ()) or mesh.dp or 1 for mesh in meshes})
        raise BatchError(
            f"a batch of {samples} cannot be cut into microbatches={layout.microbatches} on dp={' or '.join(map(str, parts))}: "
            f"{samples} is no multiple of {layout.microbatches * parts[0]}; change the global batch or the number of microbatches"
        )
    raise BatchError(f"a batch of {samples} cannot be split over dp={meshes[0].dp}; change the global batch or dp")
