"""Layouts: what is understood, how pinned ones are completed, and what is said of those that cannot be."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.errors import BatchError, LayoutError
from shardwise.planner.layout import Layout, completions
from shardwise.program.tables import NAMES


def test_text_and_mappings_say_the_same() -> None:
    text = Layout.parse(" tp=2, pp=2,dp=1,microbatches=4 ,schedule=1f1b")
    assert text == Layout(dp=1, tp=2, pp=2, microbatches=4, schedule="1f1b")
    assert Layout.parse({"tp": "2", "pp": 2, "dp": 1, "microbatches": 4, "schedule": "1f1b"}) == text
    assert Layout.parse(text) is text
    assert Layout.parse(None) == Layout.parse("") == Layout()
    assert Layout.parse(str(text)) == text
    assert str(text) == "dp=1,tp=2,pp=2,microbatches=4,schedule=1f1b" and text.ranks == 4


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ("tp", "'tp' in layout 'tp' is no NAME=VALUE pair; write for example tp=2,pp=2"),
        (
            "zp=2",
            (
                "'zp' in the layout is unknown; there are dp, cp, tp, ep, pp, chunks, microbatches, attention, schedule, zero, shard, "
                "recompute, recompute_blocks, shares"
            ),
        ),
        ("zero=4", "zero=4 in the layout is unknown; there are 0, 1, 2, 3"),
        ("recompute=all", "recompute=all in the layout is unknown; there are none, selective, full"),
        (
            "recompute=none,recompute_blocks=2",
            ("recompute_blocks=2 in the layout says how many blocks of a stage compute again: name recompute=selective or full, too"),
        ),
        ("recompute=full,recompute_blocks=0", "recompute_blocks=0 in the layout is not a whole number of 1 or more"),
        ("zero=1,shard=x", "shard=x in the layout is not a whole number of 1 or more"),
        ("dp=4,shard=2", "shard=2 in the layout says how many ranks divide what zero divides: name zero=1, 2 or 3, too"),
        ("shares=3:x", "shares=x in the layout is not a whole number of 1 or more"),
        ("shares=2:0", "shares=0 in the layout is not a whole number of 1 or more"),
        ("dp=3,shares=2:1", "shares=2:1 are of 2 copies, dp=3 has 3; give a share for each copy"),
        ("tp=two", "tp=two in the layout is not a whole number of 1 or more"),
        ("tp=0", "tp=0 in the layout is not a whole number of 1 or more"),
        ("pp=-2", "pp=-2 in the layout is not a whole number of 1 or more"),
        ({"dp": None}, "dp=None in the layout is not a whole number of 1 or more"),
        ({"dp": 2.5}, "dp=2.5 in the layout is not a whole number of 1 or more"),
        (
            "schedule=zigzag",
            f"schedule=zigzag in the layout is unknown; there are {', '.join(NAMES)}, or a file with a table of your own",
        ),
        ("chunks=2,schedule=1f1b", "schedule 1f1b needs one stage a rank, not 2; interleaved, zb-h1, zb-2p, zb-v take 2"),
        ("tp=2,tp=4", "tp is named twice in layout 'tp=2,tp=4'"),
    ],
)
def test_what_is_not_understood(given_: Any, message: str) -> None:
    with pytest.raises(LayoutError, match=f"^{re.escape(message)}$"):
        Layout.parse(given_)


@given(st.sampled_from([1, 2, 3, 4, 6, 8, 12]), st.sampled_from([4, 8, 12, 16]))
def test_completions_are_all_meshes_that_the_batch_allows(ranks: int, samples: int) -> None:
    found = completions(Layout(), ranks, samples, "")
    meshes = {layout.mesh for layout in found}
    sizes = range(1, ranks + 1)
    assert meshes == {(dp, 1, tp, pp) for dp in sizes for tp in sizes for pp in sizes if dp * tp * pp == ranks and samples % dp == 0}
    for layout in found:
        assert layout.ranks == ranks and layout.microbatches and layout.schedule
        assert samples % (layout.mesh[0] * layout.microbatches) == 0
    assert len(set(map(str, found))) == len(found)


def test_what_is_pinned_stays() -> None:
    found = completions(Layout.parse("tp=2,microbatches=2,schedule=gpipe"), 4, 8, "")
    assert {(layout.tp, layout.microbatches, layout.schedule) for layout in found} == {(2, 2, "gpipe")}
    assert {(layout.dp, layout.pp) for layout in found} == {(1, 2), (2, 1)}


def test_one_microbatch_where_more_would_change_the_numbers() -> None:
    assert {layout.microbatches for layout in completions(Layout(), 4, 8, "BatchNorm")} == {1}


@pytest.mark.parametrize(
    ("layout", "ranks", "samples", "obstacle", "error", "message"),
    [
        ("tp=4", 2, 8, "", LayoutError, "layout tp=4 takes 4 ranks, the cluster has 2; lower one of the sizes or name a larger cluster"),
        ("dp=1,tp=4,pp=2", 4, 8, "", LayoutError, "layout dp=1,tp=4,pp=2 takes 8 ranks, the cluster has 4; lower"),
        ("tp=3", 4, 8, "", LayoutError, "layout tp=3 takes 3 ranks, which do not divide the cluster's 4; pin sizes whose product does"),
        ("microbatches=2", 2, 8, "BatchNorm", LayoutError, "microbatches=2 would change the numbers: BatchNorm; use microbatches=1"),
        ("pp=2,dp=1,microbatches=3", 2, 8, "", BatchError, "a batch of 8 cannot be cut into microbatches=3 on dp=1: 8 is no multiple of 3"),
        (
            "dp=2,tp=1,microbatches=8",
            2,
            8,
            "",
            BatchError,
            "a batch of 8 cannot be cut into microbatches=8 on dp=2: 8 is no multiple of 16",
        ),
        ("dp=4", 4, 3, "", BatchError, "a batch of 3 cannot be split over dp=4; change the global batch or dp"),
    ],
)
def test_what_contradicts_itself(layout: str, ranks: int, samples: int, obstacle: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        completions(Layout.parse(layout), ranks, samples, obstacle)


def test_shares_are_proportions() -> None:
    layout = Layout.parse("shares=6:2,tp=2")
    assert (layout.dp, layout.shares, str(layout)) == (2, (3, 1), "dp=2,tp=2,shares=3:1")
    assert Layout.parse({"shares": [6, 2], "tp": 2}) == Layout.parse(str(layout)) == layout
    assert Layout.parse("shares=4:4") == Layout(dp=2, shares=()), "evenly, on unlike ranks, too"
    assert Layout.parse(Layout(shares=(2, 4))) == Layout(dp=2, shares=(1, 2))


def test_shares_are_cut_into_microbatches_that_divide_each() -> None:
    found = completions(Layout.parse("shares=3:1,tp=1,pp=1"), 2, 16, "")
    assert {layout.microbatches for layout in found} == {1, 2, 4}, "of 12 and 4 samples"
    assert {layout.microbatches for layout in completions(Layout.parse("shares=3:1"), 4, 8, "") if layout.pp == 2} == {2}


@pytest.mark.parametrize(
    ("layout", "samples", "message"),
    [
        ("shares=3:1", 6, "shares=3:1 divide a batch of a multiple of 4 samples, not 6; change the global batch or the shares"),
        ("shares=3:1,microbatches=3", 8, "a batch of 8 cannot be cut into microbatches=3 on dp=4: 8 is no multiple of 12"),
    ],
)
def test_shares_that_do_not_divide_the_batch(layout: str, samples: int, message: str) -> None:
    with pytest.raises(BatchError, match=f"^{re.escape(message)}"):
        completions(Layout.parse(layout), 2, samples, "")
