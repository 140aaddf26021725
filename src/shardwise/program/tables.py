"""Pipeline schedules as data: for each pipeline rank the order of its slots, where a rank may have several stages (chunks).

    interleaved, 2 ranks, 2 chunks, 4 microbatches
    0  F0 F1 F0.1 F1.1 F2   B0.1 F3   B1.1 F2.1 B0 F3.1 B1   .    B2.1 .    B3.1 B2 B3
    1  .  F0 F1   F0.1 B0.1 F1.1 B1.1 F2   B0   F3 B1   F2.1 B2.1 F3.1 B3.1 B2   B3

F: forward, B: backward, W: the weights' part of the backward pass, where the schedule splits it (B is then the inputs' part); the number
is the microbatch's, `.1` the rank's chunk 1 (chunk 0 has no mark), a dot an idle slot when every slot takes one unit of time.

    zb-h1, 3 ranks, 1 chunk, 5 microbatches
    0  F0 F1 F2 .  .  B0 W0 F3 B1 W1 F4 B2 W2 B3 W3 B4 W4
    1  .  F0 F1 .  B0 F2 B1 W0 F3 B2 W1 F4 B3 W2 B4 W3 W4
    2  .  .  F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 F4 B4 W2 W3 W4

    zb-2p, 3 ranks, 1 chunk, 5 microbatches
    0  F0 F1 F2 F3 F4 B0 W0 B1 W1 B2 W2 B3 W3 B4 W4
    1  .  F0 F1 F2 B0 F3 B1 F4 B2 W0 B3 W1 B4 W2 W3 W4
    2  .  .  F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 W0 W1 W2 W3 W4

    zb-v, 2 ranks, 2 chunks, 3 microbatches
    placement 0 1 1 0
    0  F0 F1 F2   F0.1 B0.1 W0.1 F1.1 B1.1 W1.1 B0 W0   F2.1 B2.1 W2.1 B1   W1 B2 W2
    1  .  F0 F0.1 F1   F1.1 B0.1 W0.1 F2   B0   W0 F2.1 B1.1 W1.1 B1   B2.1 B2 W1 W2.1 W2

m microbatches, p ranks, v chunks a rank (p·v stages); in flight: the most (stage, microbatch) pairs whose saved values a rank holds

    gpipe        v = 1   in flight m                          Huang et al. 2019
    1f1b         v = 1   in flight p                          Narayanan et al. 2019
    interleaved  v ≥ 2   in flight 2(p − 1) + (v − 1)p + 1     Narayanan et al. 2021, "Efficient large-scale …", section 2.2
    zb-h1        v ≥ 1   in flight vp                         Qi et al. 2023, "Zero bubble pipeline parallelism", section 2.3
    zb-2p        v ≥ 1   in flight (v + 1)p − 1               the same, ZB-H2
    zb-v         v = 2   in flight 2p, of half the size       the same, section 6; Qi et al. 2024, "… with controllable memory"

The zero-bubble tables are made for forwards, inputs' parts and weights' parts that take equal time; where they do not, idle slots are left.
A user's own table is text of this form: `read_tables`, `write_tables`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from shardwise.errors import LayoutError
from shardwise.program.actions import Kind
from shardwise.program.schedules import SCHEDULES

__all__ = [
    "NAMES",
    "OWN",
    "Slot",
    "Tables",
    "check_table",
    "in_flight",
    "least_chunks",
    "placed",
    "placement",
    "rank_tables",
    "read_tables",
    "splits",
    "splits_backward",
    "write_tables",
]


class Slot(NamedTuple):
    """One computation of a rank. kind: FORWARD, BACKWARD (its inputs' part where the table has WEIGHT) or WEIGHT; stage: of all p·v."""

    kind: Kind
    stage: int
    microbatch: int


Row = Sequence[Slot]
Tables = Sequence[Row]

# -- the schedules -------------------------------------------------------------------------------------------------------------------------


def _single(name: str) -> Callable[[int, int, int, int], list[Slot]]:
    """A schedule of one stage a rank, from its (kind, microbatch) table."""
    return lambda rank, ranks, chunks, microbatches: [Slot(kind, rank, m) for kind, m in SCHEDULES[name](rank, ranks, microbatches)]


def _turns(ranks: int, chunks: int, microbatches: int) -> list[tuple[int, int]]:
    """(chunk, microbatch) in the order of the forwards: rounds of p microbatches, each through all chunks; the last is filled up."""
    return [(chunk, m) for first in range(0, microbatches, ranks) for chunk in range(chunks) for m in range(first, first + ranks)]


def _interleaved(rank: int, ranks: int, chunks: int, microbatches: int) -> list[Slot]:
    """Forwards ahead: twice the ranks after this one, and all chunks but the last.

    Where p does not divide m, what is too much in the last round is left out: an order without deadlock stays one.
    """
    turns = _turns(ranks, chunks, microbatches)
    forwards = [Slot(Kind.FORWARD, chunk * ranks + rank, m) for chunk, m in turns]
    backwards = [Slot(Kind.BACKWARD, (chunks - 1 - chunk) * ranks + rank, m) for chunk, m in turns]
    ahead = 2 * (ranks - rank - 1) + (chunks - 1) * ranks
    slots = forwards[:ahead]
    for number, backward in enumerate(backwards, start=ahead):
        slots += [*forwards[number : number + 1], backward]
    return [slot for slot in slots if slot.microbatch < microbatches]


def _zero_bubble(limit: int) -> Callable[[int, int, int, int], list[Slot]]:
    """ZB-H1 (limit 1) and ZB-H2 (limit 2), with several chunks in the order of interleaved 1F1B.

    Of the limit·(p − 1) forwards that a rank may hold beside the current one, a rank uses its distance from the end to go ahead, and its
    distance from the beginning to put its weights' parts off.
    """

    def row(rank: int, ranks: int, chunks: int, microbatches: int) -> list[Slot]:
        turns = _turns(ranks, chunks, microbatches)
        forwards = [Slot(Kind.FORWARD, chunk * ranks + rank, m) for chunk, m in turns]
        backwards = [Slot(Kind.BACKWARD, (chunks - 1 - chunk) * ranks + rank, m) for chunk, m in turns]
        ahead, late = limit * (ranks - 1 - rank) + (chunks - 1) * ranks, limit * rank
        slots = forwards[:ahead]
        for number in range(len(turns) + late):
            slots += forwards[ahead + number : ahead + number + 1] + backwards[number : number + 1]
            if number >= late:
                slots.append(backwards[number - late]._replace(kind=Kind.WEIGHT))
        return [slot for slot in slots if slot.microbatch < microbatches]

    return row


def _zb_v(rank: int, ranks: int, chunks: int, microbatches: int) -> list[Slot]:
    """Stages go down the ranks and up again: each rank's second stage turns forwards into backwards early.

    Fewer than 2p − 1 microbatches are filled up and what is too much is left out.
    """
    before, after = rank, ranks - rank
    steady = max(microbatches - 2 * ranks + 1, 0) + before
    phases = [
        (2 * after - 1, "F0"),
        (before, "F1 F0"),
        (after, "F1 B1 W1"),
        (steady, "F0 B0 W0 F1 B1 W1"),
        (after - 1, "B0 W0 F1 B1 W1"),
        (before, "B0 B1"),
        (after, "B0 W0"),
        (before, "W1"),
        (before, "W0"),
    ]
    stage = {"0": rank, "1": 2 * ranks - 1 - rank}
    count: dict[str, int] = {}
    slots: list[Slot] = []
    for times, words in phases:
        for word in words.split() * times:
            count[word] = count.get(word, 0) + 1
            slots.append(Slot(_KINDS[word[0]], stage[word[1]], count[word] - 1))
    return [slot for slot in slots if slot.microbatch < microbatches]


_KINDS = {"F": Kind.FORWARD, "B": Kind.BACKWARD, "W": Kind.WEIGHT}
_LETTERS = {kind: letter for letter, kind in _KINDS.items()}


@dataclass(frozen=True, kw_only=True)
class _Schedule:
    """row: (rank, ranks, chunks, microbatches) → slots; least, most: chunks a rank."""

    row: Callable[[int, int, int, int], list[Slot]]
    least: int = 1
    most: int | None = 1
    splits: bool = False
    turns: bool = False  # stages go down the ranks and up again


_SCHEDULES = {
    "gpipe": _Schedule(row=_single("gpipe")),
    "1f1b": _Schedule(row=_single("1f1b")),
    "interleaved": _Schedule(row=_interleaved, least=2, most=None),
    "zb-h1": _Schedule(row=_zero_bubble(1), most=None, splits=True),
    "zb-2p": _Schedule(row=_zero_bubble(2), most=None, splits=True),
    "zb-v": _Schedule(row=_zb_v, least=2, most=2, splits=True, turns=True),
}
NAMES = tuple(_SCHEDULES)
OWN = "table"  # what a plan calls a schedule that is none of these


def _named(name: str, chunks: int) -> _Schedule:
    least_chunks(name)
    found = _SCHEDULES[name]
    if chunks < found.least or (found.most is not None and chunks > found.most):
        wanted = f"{found.least} or more stages" if found.most is None else "one stage" if found.most == 1 else f"{found.most} stages"
        others = [other for other, each in _SCHEDULES.items() if each.least <= chunks and (each.most is None or each.most >= chunks)]
        raise LayoutError(f"schedule {name} needs {wanted} a rank, not {chunks}; {', '.join(others)} take {chunks}")
    return found


def rank_tables(name: str, ranks: int, chunks: int, microbatches: int) -> list[list[Slot]]:
    """Each pipeline rank's slots in order. Raises LayoutError for an unknown name or a number of chunks that the schedule does not take."""
    row = _named(name, chunks).row
    return [row(rank, ranks, chunks, microbatches) for rank in range(ranks)]


def placement(name: str, ranks: int, chunks: int) -> tuple[int, ...]:
    """Stage → the pipeline rank that has it."""
    down = tuple(range(ranks))
    return down + down[::-1] if _named(name, chunks).turns else down * chunks


def least_chunks(name: str) -> int:
    """How many stages a rank has in the schedule where nobody says. Raises LayoutError for an unknown name."""
    if name not in _SCHEDULES:
        raise LayoutError(f"schedule {name!r} is unknown; there are {', '.join(NAMES)}")
    return _SCHEDULES[name].least


def splits_backward(name: str) -> bool:
    """Whether the schedule performs the weights' part of the backward pass apart. Raises LayoutError for an unknown name."""
    return _named(name, least_chunks(name)).splits


# -- what a table says ---------------------------------------------------------------------------------------------------------------------


def splits(tables: Tables) -> bool:
    """Whether the weights' part of the backward pass has slots of its own."""
    return any(slot.kind is Kind.WEIGHT for row in tables for slot in row)


def placed(tables: Tables) -> dict[int, int]:
    """Stage → the rank that has it."""
    return {slot.stage: rank for rank, row in enumerate(tables) for slot in row}


def in_flight(tables: Tables, saved: Mapping[int, int] | None = None, kept: Mapping[int, int] | None = None) -> list[int]:
    """The most that each rank holds at once of what microbatches keep.

    saved: stage → what one microbatch keeps there from its FORWARD to its BACKWARD (1 if not given: the unit is then one stage's saved
    values of one microbatch); kept: from there to its WEIGHT, where the backward pass is split (as much, if not given).
    """
    apart = splits(tables)

    def change(slot: Slot) -> int:
        forward = saved[slot.stage] if saved else 1
        after = (kept[slot.stage] if kept else forward) if apart else 0
        return {Kind.FORWARD: forward, Kind.BACKWARD: after - forward, Kind.WEIGHT: -after}[slot.kind]

    return [max(accumulate(map(change, row)), default=0) for row in tables]


def _needs(slot: Slot, stages: int) -> Iterator[Slot]:
    """What must be done before."""
    kind, stage, m = slot
    if kind is Kind.FORWARD:
        if stage > 0:
            yield Slot(kind, stage - 1, m)
    elif kind is Kind.BACKWARD:
        yield Slot(Kind.FORWARD, stage, m)
        if stage + 1 < stages:
            yield Slot(kind, stage + 1, m)
    else:
        yield Slot(Kind.BACKWARD, stage, m)


def _played(tables: Tables, stages: int) -> list[list[int]]:
    """When each slot begins if each takes one unit of time and begins as early as it can; a rank that is stuck has fewer than slots."""
    begins: list[list[int]] = [[] for _ in tables]
    ends: dict[Slot, int] = {}
    waiting: dict[Slot, list[int]] = {}
    moving = list(range(len(tables)))
    while moving:
        rank = moving.pop()
        while len(begins[rank]) < len(tables[rank]):
            slot = tables[rank][len(begins[rank])]
            needs = list(_needs(slot, stages))
            if missing := [need for need in needs if need not in ends]:
                waiting.setdefault(missing[0], []).append(rank)
                break
            free = begins[rank][-1] + 1 if begins[rank] else 0
            begins[rank].append(max([free, *(ends[need] for need in needs)]))
            ends[slot] = begins[rank][-1] + 1
            moving += waiting.pop(slot, [])
    return begins


# -- the check -----------------------------------------------------------------------------------------------------------------------------


def check_table(tables: Tables, ranks: int, chunks: int, microbatches: int) -> None:
    """That each stage does each microbatch once each way, in an order that the stages' needs allow and in which no rank waits for ever.

    Raises LayoutError; its text has the grid with the place marked as [F0].
    """
    if len(tables) != ranks:
        raise LayoutError(f"the table has {len(tables)} rows, the pipeline {ranks} ranks; write one row a rank")
    _check_slots(tables, ranks * chunks, microbatches)
    _check_complete(tables, chunks, microbatches)
    _check_order(tables, ranks * chunks)
    _check_progress(tables, ranks * chunks)


def _check_slots(tables: Tables, stages: int, microbatches: int) -> None:
    seen: set[Slot] = set()
    home: dict[int, int] = {}
    for rank, row in enumerate(tables):
        for at, slot in enumerate(row):
            problem = ""
            if slot.kind not in _LETTERS:
                problem = f"{slot.kind} is not of a table, which has {', '.join(_LETTERS)}"
            elif not 0 <= slot.stage < stages:
                problem = f"there is no stage {slot.stage} among {stages}"
            elif not 0 <= slot.microbatch < microbatches:
                problem = f"there is no microbatch {slot.microbatch} among {microbatches}"
            elif home.setdefault(slot.stage, rank) != rank:
                problem = f"stage {slot.stage} is on rank {home[slot.stage]} already"
            elif slot in seen:
                problem = f"it does {_words(slot)} twice"
            if problem:
                raise LayoutError(f"rank {rank}: {problem}:\n{_grid(tables, {rank: at})}")
            seen.add(slot)


def _check_complete(tables: Tables, chunks: int, microbatches: int) -> None:
    kinds = [Kind.FORWARD, Kind.BACKWARD, *([Kind.WEIGHT] if splits(tables) else [])]
    for rank, row in enumerate(tables):
        stages = sorted({slot.stage for slot in row})
        if len(stages) != chunks:
            end = {rank: len(row)}
            raise LayoutError(f"rank {rank} has {len(stages)} stages ({_listed(stages)}), not {chunks}:\n{_grid(tables, end)}")
        there = set(row)
        for slot in (Slot(kind, stage, m) for stage in stages for m in range(microbatches) for kind in kinds):
            if slot not in there:
                raise LayoutError(f"rank {rank} never does {_words(slot)}:\n{_grid(tables, {rank: len(row)})}")


def _check_order(tables: Tables, stages: int) -> None:
    """On each rank alone; what waits for other ranks is played."""
    for rank, row in enumerate(tables):
        place = {slot: at for at, slot in enumerate(row)}
        for at, slot in enumerate(row):
            for need in _needs(slot, stages):
                if place.get(need, -1) > at:
                    raise LayoutError(f"rank {rank} does {_words(slot)} before {_words(need)}:\n{_grid(tables, {rank: at})}")


def _check_progress(tables: Tables, stages: int) -> None:
    begins = _played(tables, stages)
    stuck = {rank: len(begun) for rank, begun in enumerate(begins) if len(begun) < len(tables[rank])}
    if not stuck:
        return
    home = placed(tables)
    done = {slot for row, begun in zip(tables, begins, strict=True) for slot in row[: len(begun)]}
    lines = [f"{len(stuck)} of {len(tables)} ranks would wait for ever:"]
    for rank, at in list(stuck.items())[:_SHOWN]:
        need = next(need for need in _needs(tables[rank][at], stages) if need not in done)
        lines.append(f"  rank {rank} at {_words(tables[rank][at])} waits for {_words(need)} on rank {home[need.stage]}")
    raise LayoutError("\n".join([*lines, _grid(tables, stuck)]))


def _words(slot: Slot) -> str:
    return f"{_LETTERS[slot.kind]}{slot.microbatch} of stage {slot.stage}"


def _listed(stages: Sequence[int]) -> str:
    return ", ".join(map(str, stages)) or "none"


# -- text ----------------------------------------------------------------------------------------------------------------------------------

_SHOWN, _AROUND = 8, 6  # ranks, and slots to each side of a mark, that an error's grid has
_CELL = re.compile(r"([FBW])(\d+)(?:\.(\d+))?")


def _cells(tables: Tables) -> list[list[str]]:
    """Each slot as `F0`, or `F0.1` for the rank's chunk 1."""
    chunk: dict[tuple[int, int], int] = {}
    for rank, row in enumerate(tables):
        for number, stage in enumerate(sorted({slot.stage for slot in row})):
            chunk[rank, stage] = number
    return [[_cell(slot, chunk[rank, slot.stage]) for slot in row] for rank, row in enumerate(tables)]


def _cell(slot: Slot, chunk: int) -> str:
    return f"{_LETTERS.get(slot.kind, slot.kind)}{slot.microbatch}" + (f".{chunk}" if chunk else "")


def _lined_up(labels: Sequence[object], rows: Sequence[Sequence[str]]) -> str:
    """The cells of a column under each other, behind the rows' labels."""
    columns = max(map(len, rows), default=0)
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(columns)]
    first = max((len(str(label)) for label in labels), default=0)
    return "\n".join(
        f"{label!s:<{first}}  {' '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))}".rstrip()
        for label, row in zip(labels, rows, strict=True)
    )


def _grid(tables: Tables, marks: Mapping[int, int]) -> str:
    """The slots around the marked ones, which stand in one column; a rank without a mark is shown around the place of the first mark."""
    ranks = list(range(len(tables))) if len(tables) <= _SHOWN else sorted(marks)[:_SHOWN]
    cells = _cells(tables)
    common = next(iter(marks.values()))
    places = {rank: marks.get(rank, common) for rank in ranks}
    before = min(_AROUND, max(places.values()))
    rows = []
    for rank, at in places.items():
        row = [*cells[rank], "end"]
        if rank in marks:
            row[at] = f"[{row[at]}]"
        shown = row[max(0, at - before) : at + _AROUND + 1]
        first = ["…" if at > before else ""] if max(places.values()) > before else []
        rows.append([*first, *([""] * (before - at)), *shown, *(["…"] if at + _AROUND + 1 < len(row) else [])])
    return _lined_up([f"  rank {rank}" for rank in ranks], rows)


def write_tables(tables: Tables) -> str:
    """The grid as text, one line a rank, as drawn above. `read_tables` reads it.

    Where the stages do not go round the ranks (0 1 2 0 1 2 …) a first line `placement 0 1 2 2 1 0` names each stage's rank.
    Raises LayoutError for what `check_table` finds.
    """
    home = placed(tables)
    microbatches = len({slot.microbatch for row in tables for slot in row})
    check_table(tables, len(tables), len(home) // max(1, len(tables)), microbatches)
    stages = [home[stage] for stage in sorted(home)]
    rows = []
    for cells, begins in zip(_cells(tables), _played(tables, len(home)), strict=True):
        row = ["."] * (begins[-1] + 1 if begins else 0)
        for cell, begin in zip(cells, begins, strict=True):
            row[begin] = cell
        rows.append(row)
    head = [] if stages == _round(len(tables), len(stages)) else [f"placement {' '.join(map(str, stages))}"]
    return "\n".join([*head, _lined_up(range(len(rows)), rows)]) + "\n"


def _round(ranks: int, stages: int) -> list[int]:
    return [stage % ranks for stage in range(stages)]


def read_tables(text: str) -> list[list[Slot]]:
    """A table as `write_tables` writes it; dots and the number of spaces mean nothing, `#` begins a comment.

    Raises LayoutError for what cannot be read, and for what `check_table` finds.
    """
    lines = [(number, words) for number, line in enumerate(text.splitlines(), start=1) if (words := line.partition("#")[0].split())]
    head = lines.pop(0) if lines and lines[0][1][0] == "placement" else None
    if not lines:
        raise LayoutError("the table has no rows; write one line a rank, such as `0  F0 F1 B0 B1`")
    cells = [_read_row(number, words, rank) for rank, (number, words) in enumerate(lines)]
    found = [cell for row in cells for cell in row]
    chunks = 1 + max((chunk for _, _, chunk in found), default=0)
    stages = _read_placement(head, len(cells), chunks)
    own = [[stage for stage, home in enumerate(stages) if home == rank] for rank in range(len(cells))]
    tables = [[Slot(kind, own[rank][chunk], m) for kind, m, chunk in row] for rank, row in enumerate(cells)]
    check_table(tables, len(cells), chunks, 1 + max((m for _, m, _ in found), default=0))
    return tables


def _read_row(number: int, words: list[str], rank: int) -> list[tuple[Kind, int, int]]:
    """(kind, microbatch, chunk) of each cell."""
    if words[0].rstrip(":") != str(rank):
        raise LayoutError(f"line {number} of the table begins with {words[0]!r}; it is the row of rank {rank} and begins with {rank}")
    row = []
    for at, word in enumerate(words[1:], start=1):
        read = _CELL.fullmatch(word)
        if read:
            row.append((_KINDS[read[1]], int(read[2]), int(read[3] or 0)))
        elif word.strip("."):
            marked = " ".join([*words[max(0, at - _AROUND) : at], f"[{word}]", *words[at + 1 : at + 1 + _AROUND]])
            raise LayoutError(f"line {number} of the table has {word!r}, which is no F0, B0, W0 (F0.1 for chunk 1) and no dot:\n  {marked}")
    return row


def _read_placement(head: tuple[int, list[str]] | None, ranks: int, chunks: int) -> list[int]:
    """Stage → rank."""
    if head is None:
        return _round(ranks, ranks * chunks)
    number, (_, *words) = head
    stages = [int(word) if word.isdigit() else -1 for word in words]
    if any(stages.count(rank) != chunks for rank in range(ranks)) or len(stages) != ranks * chunks:
        raise LayoutError(
            f"line {number} of the table is `placement {' '.join(words)}`; it names the rank of each of the {ranks * chunks} stages, "
            f"each of the ranks 0 to {ranks - 1} {'once' if chunks == 1 else f'{chunks} times'}"
        )
    return stages
