"""Schedules as data: the papers' figures, what every table must be, torch's schedules as an oracle, and users' own tables."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torchs

from shardwise.errors import LayoutError
from shardwise.program import tables as module
from shardwise.program.actions import Kind
from shardwise.program.schedules import SCHEDULES
from shardwise.program.tables import (
    NAMES,
    Slot,
    check_table,
    in_flight,
    placed,
    placement,
    rank_tables,
    read_tables,
    splits,
    splits_backward,
    write_tables,
)

Sizes = tuple[str, int, int, int]
F, B, W = Kind.FORWARD, Kind.BACKWARD, Kind.WEIGHT


@st.composite
def sizes(draw: st.DrawFn) -> Sizes:
    """Name, ranks, chunks, microbatches."""
    name = draw(st.sampled_from(NAMES))
    chunks = draw(
        {"interleaved": st.integers(2, 4), "zb-v": st.just(2), "zb-h1": st.integers(1, 4), "zb-2p": st.integers(1, 3)}.get(name, st.just(1))
    )
    return name, draw(st.integers(1, 7)), chunks, draw(st.integers(1, 15))


def drawn() -> list[tuple[Sizes, str]]:
    """The pictures of the module's docstring."""
    found = re.findall(r"^    (\S+), (\d+) ranks, (\d+) chunks?, (\d+) microbatches\n((?:    \S.*\n)+)", module.__doc__ or "", re.MULTILINE)
    return [((name, int(p), int(v), int(m)), re.sub("^    ", "", text, flags=re.MULTILINE)) for name, p, v, m, text in found]


@pytest.mark.parametrize(("size", "picture"), drawn(), ids=lambda value: value[0] if isinstance(value, tuple) else "")
def test_the_tables_are_those_of_the_pictures(size: Sizes, picture: str) -> None:
    assert write_tables(rank_tables(*size)) == picture
    assert read_tables(picture) == rank_tables(*size)


def test_four_schedules_are_drawn() -> None:
    assert [size[0] for size, _ in drawn()] == ["interleaved", "zb-h1", "zb-2p", "zb-v"]


def test_interleaved_as_in_the_paper() -> None:
    """Narayanan et al. 2021, figure 4, below: 4 devices with 2 chunks each, 8 microbatches; its first device."""
    first = rank_tables("interleaved", 4, 2, 8)[0]
    forwards = "0 1 2 3 0.1 1.1 2.1 3.1 4 5 6"
    assert [f"{slot.microbatch}{'.1' if slot.stage == 4 else ''}" for slot in first[:11]] == forwards.split()
    assert [slot[:2] for slot in first[10:14]] == [(F, 0), (B, 4), (F, 0), (B, 4)]


def test_zero_bubble_as_in_the_paper() -> None:
    """Qi et al. 2023, figure 3: 4 devices, 8 microbatches; H1 above, H2 below: its first and its last device."""
    h1, h2 = rank_tables("zb-h1", 4, 1, 8), rank_tables("zb-2p", 4, 1, 8)
    assert words(h1[0]).startswith("F0 F1 F2 F3 B0 W0 F4 B1 W1 F5")
    assert words(h1[3]).startswith("F0 B0 F1 B1 F2 B2 F3 B3 W0 F4 B4 W1")
    assert words(h2[0]).startswith("F0 F1 F2 F3 F4 F5 F6 B0 W0 F7 B1 W1")
    assert words(h2[3]).startswith("F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 W0 F7 B7 W1")


def words(row: list[Slot]) -> str:
    return " ".join(f"{ {F: 'F', B: 'B', W: 'W'}[slot.kind] }{slot.microbatch}" for slot in row)


# -- what every table is -------------------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(sizes())
def test_every_stage_does_every_microbatch_once_each_way_in_order(size: Sizes) -> None:
    name, ranks, chunks, microbatches = size
    tables = rank_tables(*size)
    check_table(tables, ranks, chunks, microbatches)
    kinds = (F, B, W) if splits_backward(name) else (F, B)
    wanted = {Slot(kind, stage, m) for kind in kinds for stage in range(ranks * chunks) for m in range(microbatches)}
    assert {slot for row in tables for slot in row} == wanted and sum(map(len, tables)) == len(wanted)
    assert splits(tables) == splits_backward(name)
    home = placement(name, ranks, chunks)
    assert [placed(tables)[stage] for stage in range(ranks * chunks)] == list(home)
    assert sorted(home) == sorted(list(range(ranks)) * chunks)
    for row in tables:
        for kind in kinds:
            for stage in {slot.stage for slot in row}:
                assert [slot.microbatch for slot in row if slot[:2] == (kind, stage)] == list(range(microbatches)), "messages are in order"


@given(sizes())
def test_how_much_is_in_flight(size: Sizes) -> None:
    name, ranks, chunks, microbatches = size
    bound = {
        "gpipe": microbatches,
        "1f1b": ranks,
        "interleaved": 2 * (ranks - 1) + (chunks - 1) * ranks + 1,
        "zb-h1": chunks * ranks,
        "zb-2p": (chunks + 1) * ranks - 1,
        "zb-v": 2 * ranks,
    }[name]
    found = in_flight(rank_tables(*size))
    assert max(found) <= min(bound, chunks * microbatches)
    if microbatches >= 2 * ranks and microbatches % ranks == 0:
        assert max(found) == min(bound, chunks * microbatches)
    if name == "1f1b":
        assert found == [min(ranks - rank, microbatches) for rank in range(ranks)]


def test_in_flight_counts_bytes() -> None:
    tables = rank_tables("interleaved", 2, 2, 4)
    assert in_flight(tables) == [5, 3]
    assert in_flight(tables, {0: 10, 1: 1, 2: 100, 3: 5}) == [230, 7], "F0 F1 F0.1 F1.1 F2 · F0 F1 F0.1"


def test_the_inputs_part_frees_what_the_weights_part_does_not_read() -> None:
    tables = rank_tables("zb-h1", 3, 1, 5)
    saved, late = dict.fromkeys(range(3), 10), dict.fromkeys(range(3), 4)
    assert in_flight(tables, saved) == [30, 30, 30]
    assert in_flight(tables, saved, late) == [30, 24, 18], "F F F · F F B F · F B F B F, each B leaving 4 of 10"
    assert in_flight(rank_tables("1f1b", 3, 1, 5), saved, late) == [30, 20, 10], "a backward pass that is not split frees all"


@given(sizes())
def test_text_is_read_as_it_was_written(size: Sizes) -> None:
    tables = rank_tables(*size)
    text = write_tables(tables)
    assert read_tables(text) == tables
    assert write_tables(read_tables(text)) == text


@given(st.integers(1, 6), st.integers(1, 12), st.sampled_from(sorted(SCHEDULES)))
def test_what_runs_is_what_is_planned(stages: int, microbatches: int, name: str) -> None:
    tables = rank_tables(name, stages, 1, microbatches)
    assert [[(slot.kind, slot.microbatch) for slot in row] for row in tables] == [
        SCHEDULES[name](stage, stages, microbatches) for stage in range(stages)
    ]


def test_stages_of_the_ranks() -> None:
    assert placement("interleaved", 3, 2) == (0, 1, 2, 0, 1, 2)
    assert placement("zb-v", 3, 2) == (0, 1, 2, 2, 1, 0)
    assert placement("1f1b", 3, 1) == (0, 1, 2)
    assert [name for name in NAMES if splits_backward(name)] == ["zb-h1", "zb-2p", "zb-v"]


@pytest.mark.parametrize(
    ("name", "chunks", "said"),
    [
        ("zigzag", 1, "schedule 'zigzag' is unknown; there are gpipe, 1f1b, interleaved, zb-h1, zb-2p, zb-v"),
        ("interleaved", 1, "schedule interleaved needs 2 or more stages a rank, not 1; gpipe, 1f1b, zb-h1, zb-2p take 1"),
        ("zb-v", 1, "schedule zb-v needs 2 stages a rank, not 1"),
        ("1f1b", 2, "schedule 1f1b needs one stage a rank, not 2; interleaved, zb-h1, zb-2p, zb-v take 2"),
    ],
)
def test_a_schedule_that_there_is_not(name: str, chunks: int, said: str) -> None:
    for ask in (lambda: rank_tables(name, 2, chunks, 4), lambda: placement(name, 2, chunks)):
        with pytest.raises(LayoutError, match=re.escape(said)):
            ask()


def test_whether_an_unknown_schedule_splits() -> None:
    with pytest.raises(LayoutError, match="'zigzag' is unknown"):
        splits_backward("zigzag")


# -- torch's schedules ---------------------------------------------------------------------------------------------------------------------


def as_torchs(size: Sizes) -> dict[int, list[Any]]:
    """Our table in the words of torch.distributed.pipelining."""
    kinds = {F: torchs.FORWARD, B: torchs.BACKWARD_INPUT if splits_backward(size[0]) else torchs.FULL_BACKWARD, W: torchs.BACKWARD_WEIGHT}
    return {
        rank: [torchs._Action(slot.stage, kinds[slot.kind], slot.microbatch) for slot in row] for rank, row in enumerate(rank_tables(*size))
    }


@settings(max_examples=60, deadline=None)
@given(sizes())
def test_torchs_validator_and_player_agree(size: Sizes) -> None:
    name, ranks, chunks, microbatches = size
    order = as_torchs(size)
    home = placement(name, ranks, chunks)
    assert torchs._validate_schedule(order, ranks, ranks * chunks, microbatches) == dict(enumerate(home))
    with_messages = torchs._add_send_recv(order, home.__getitem__, ranks * chunks)
    torchs._simulate_comms_compute(with_messages, home.__getitem__, ranks * chunks)  # both raise where they are stuck


@pytest.mark.parametrize(("ranks", "chunks", "microbatches"), [(2, 2, 4), (4, 2, 8), (3, 3, 9), (4, 4, 4), (8, 2, 16)])
def test_interleaved_as_torch_has_it(ranks: int, chunks: int, microbatches: int) -> None:
    """Where p divides m: elsewhere torch makes longer rounds."""
    theirs = SimpleNamespace(n_local_stages=chunks, microbatches_per_round=ranks, pp_group_size=ranks, _n_microbatches=microbatches)
    for rank, row in as_torchs(("interleaved", ranks, chunks, microbatches)).items():
        assert row == without_idle(torchs.ScheduleInterleaved1F1B._calculate_single_rank_operations(theirs, rank))


@pytest.mark.parametrize(
    ("ranks", "chunks", "microbatches"), [(2, 1, 4), (4, 1, 8), (3, 1, 9), (4, 1, 4), (5, 1, 3), (2, 2, 4), (4, 2, 8), (3, 3, 9), (4, 2, 4)]
)
def test_zb_h1_as_torch_has_it(ranks: int, chunks: int, microbatches: int) -> None:
    """Its ZB1P. With several chunks where p divides m: elsewhere torch makes longer rounds."""
    theirs = SimpleNamespace(n_local_stages=chunks, microbatches_per_round=ranks, pp_group_size=ranks, _n_microbatches=microbatches)
    for rank, row in as_torchs(("zb-h1", ranks, chunks, microbatches)).items():
        assert row == without_idle(torchs.ScheduleInterleavedZeroBubble._calculate_single_rank_operations(theirs, rank))


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 3), (2, 4), (4, 12), (3, 2), (4, 7), (6, 5)])
def test_zb_v_as_torch_has_it(ranks: int, microbatches: int) -> None:
    theirs = SimpleNamespace(num_stages=2 * ranks, pp_group_size=ranks, _n_microbatches=microbatches)
    for rank, row in as_torchs(("zb-v", ranks, 2, microbatches)).items():
        assert row == without_idle(torchs.ScheduleZBVZeroBubble._calculate_single_rank_operations(theirs, rank))


@pytest.mark.parametrize(("theirs", "name", "but"), [(torchs.ScheduleGPipe, "gpipe", 0), (torchs.Schedule1F1B, "1f1b", 1)])
def test_one_stage_a_rank_as_torch_has_it(theirs: Any, name: str, but: int) -> None:
    """Its 1F1B leaves the last rank's first microbatch out, which its own validator refuses: that rank is not compared."""
    order = theirs._get_pipeline_order(SimpleNamespace(_num_stages=4, _n_microbatches=9))
    ours = as_torchs((name, 4, 1, 9))
    for rank in range(4 - but):
        assert ours[rank] == [action for action in without_idle(order[rank]) if action.computation_type is not torchs.REDUCE_GRAD]
    if but:
        with pytest.raises(AssertionError, match=r"Rank 3, .* without first running Forward"):
            torchs._validate_schedule(order, 4, 4, 9)


def without_idle(row: list[Any]) -> list[Any]:
    return [action for action in row if action is not None]


# -- users' tables -------------------------------------------------------------------------------------------------------------------------


def test_a_users_table() -> None:
    """Comments, dots and spaces mean nothing; `0:` is a row's name, too."""
    text = """
    # 1f1b by hand
    0:  F0   F1 .  B0 ... B1   # the first rank
    1:  .    F0 B0 F1 B1
    """
    assert read_tables(text) == rank_tables("1f1b", 2, 1, 2)


def test_a_users_placement() -> None:
    """Neighbouring stages on one rank."""
    tables = read_tables("placement 0 0 1 1\n0  F0 F0.1 B0.1 B0\n1  F0 F0.1 B0.1 B0\n")
    assert placed(tables) == {0: 0, 1: 0, 2: 1, 3: 1}
    assert write_tables(tables) == "placement 0 0 1 1\n0  F0 F0.1 .  .    .    .  B0.1 B0\n1  .  .    F0 F0.1 B0.1 B0\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# nothing", "the table has no rows; write one line a rank, such as `0  F0 F1 B0 B1`"),
        ("0  F0 B0\n2  F0 B0", "line 2 of the table begins with '2'; it is the row of rank 1 and begins with 1"),
        (
            "0  F0 F1 X1 B0",
            "line 1 of the table has 'X1', which is no F0, B0, W0 (F0.1 for chunk 1) and no dot:\n  0 F0 F1 [X1] B0",
        ),
        (
            "placement 0 1 1\n0  F0 B0\n1  F0 B0",
            "line 1 of the table is `placement 0 1 1`; it names the rank of each of the 2 stages, each of the ranks 0 to 1 once",
        ),
        (
            "placement 0 1 x 0\n0  F0 F0.1 B0.1 B0\n1  F0 F0.1 B0.1 B0",
            "`placement 0 1 x 0`; it names the rank of each of the 4 stages, each of the ranks 0 to 1 2 times",
        ),
        ("0  F0 B0 F0", "rank 0: it does F0 of stage 0 twice:\n  rank 0  F0 B0 [F0] end"),
        ("0  F0 F1 B0\n1  F0 B0 F1 B1", "rank 0 never does B1 of stage 0:\n  rank 0"),
        ("0  F0 F1 B0 B1 W0", "rank 0 never does W1 of stage 0:\n  rank 0  F0 F1 B0 B1 W0 [end]"),
        ("0  F0 F0.1 B0.1 B0\n1  F0 B0", "rank 1 has 1 stages (1), not 2:\n"),
        ("0  F0 B0\n1", "rank 1 has 0 stages (none), not 1:\n"),
        ("0  B0 F0", "rank 0 does B0 of stage 0 before F0 of stage 0:\n  rank 0  [B0] F0 end"),
        ("0  F0 W0 B0", "rank 0 does W0 of stage 0 before B0 of stage 0:\n"),
        ("0  F0 F0.1 B0 B0.1", "rank 0 does B0 of stage 0 before B0 of stage 1:\n"),
        (
            "0  F0 B0 F1 B1\n1  F0 F1 B0 B1",
            """2 of 2 ranks would wait for ever:
  rank 0 at B0 of stage 0 waits for B0 of stage 1 on rank 1
  rank 1 at F1 of stage 1 waits for F1 of stage 0 on rank 0
  rank 0  F0 [B0] F1 B1 end
  rank 1  F0 [F1] B0 B1 end""",
        ),
    ],
)
def test_what_is_wrong_with_a_users_table(text: str, said: str) -> None:
    with pytest.raises(LayoutError) as caught:
        read_tables(text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ([[Slot(F, 0, 0), Slot(B, 0, 0)]], "the table has 1 rows, the pipeline 2 ranks; write one row a rank"),
        ([[Slot(F, 0, 0)], [Slot(F, 2, 0)]], "rank 1: there is no stage 2 among 2:\n"),
        ([[Slot(F, 0, 1)], [Slot(F, 1, 0)]], "rank 0: there is no microbatch 1 among 1:\n"),
        ([[Slot(F, 0, 0)], [Slot(F, 0, 0)]], "rank 1: stage 0 is on rank 0 already:\n"),
        ([[Slot(Kind.SEND, 0, 0)], []], "rank 0: send is not of a table, which has forward, backward, weight:\n"),
    ],
)
def test_what_is_wrong_with_slots(tables: list[list[Slot]], said: str) -> None:
    with pytest.raises(LayoutError) as caught:
        check_table(tables, 2, 1, 1)
    assert said in str(caught.value)


def test_a_long_table_is_shown_around_the_place() -> None:
    tables = rank_tables("1f1b", 12, 1, 40)
    del tables[9][50]
    with pytest.raises(LayoutError) as caught:
        check_table(tables, 12, 1, 40)
    first, *grid = str(caught.value).splitlines()
    assert re.fullmatch(r"rank 9 never does [FB]\d+ of stage 9:", first)
    assert len(grid) == 1 and grid[0].startswith("  rank 9  … ") and grid[0].endswith("[end]"), "the ranks that are right are not shown"


@settings(max_examples=100, deadline=None)
@given(sizes(), st.data())
def test_two_slots_exchanged(size: Sizes, data: st.DataObject) -> None:
    """Either the order serves as well, or the check says what is wrong."""
    _, ranks, chunks, microbatches = size
    tables = rank_tables(*size)
    row = tables[data.draw(st.integers(0, ranks - 1))]
    one, other = (data.draw(st.integers(0, len(row) - 1)) for _ in range(2))
    row[one], row[other] = row[other], row[one]
    try:
        check_table(tables, ranks, chunks, microbatches)
    except LayoutError as error:
        said = str(error)
    else:
        said = "[]"
        assert read_tables(write_tables(tables)) == tables
    assert "[" in said, "the place is marked"
