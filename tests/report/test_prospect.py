"""The page about a layout for many devices, as text and as figures."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import plotly.graph_objects as go
import pytest
from tests.report.prospects import LAYOUT, LIMIT_BYTES, prospect
from tests.report.test_page import read

from shardwise.cluster.specs import machines
from shardwise.report.layouts import tradeoff_figure
from shardwise.report.placement import Sizes, placement
from shardwise.report.prospect import write_prospect
from shardwise.report.ranks import omitted_text, shown_ranks
from shardwise.report.timeline import timeline_figure
from shardwise.simulate.simulator import Mesh


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prospect") / "report.html"
    write_prospect(path, prospect("a100-80g:128x8", dp=16, tp=8, pp=8, chunks=2, microbatches=16))
    return path.read_text(encoding="utf-8")


def test_loads_nothing_and_escapes(page: str) -> None:
    reader = read(page)
    assert reader.loads == [] and "default-src 'none'" in page
    assert not {"link", "img", "iframe"} & set(reader.tags)
    assert "gpt3-<175b> on a100-80g:128x8" in reader.text and "It is <so> because" in reader.text
    assert "<b>=" not in page.replace("&lt;b&gt;=", "").replace("\\u003cb>=", "")


def test_says_what_it_takes(page: str) -> None:
    text = read(page).text
    for said in ("tp 8", "49%", "$12.3 a step", "of 73.6", "301 layouts were put together, 1 of them simulated; 30 do not fit"):
        assert said in text, said
    assert "1 to 15" in text, "equal stages in one row"
    assert LAYOUT in text and "8 more" in text
    assert "Shown are 8 of 1,024 ranks" in text
    assert "rank 0 computes 1.3 times as long" in text


def test_axes_name_the_links_that_they_cross() -> None:
    drawn = placement(machines("h100:16x8"), Sizes(dp=4, cp=1, tp=8, pp=4))
    rows = [row.split("</td><td>") for row in drawn.split("<tr><td>")[1:]]
    found = {row[0]: (row[1], row[2], row[3].split(" (")[0]) for row in rows}
    assert found == {"tp": ("8", "1", "node"), "dp": ("4", "8", "cluster"), "pp": ("4", "32", "cluster")}


@pytest.mark.parametrize(
    ("cluster", "sizes"),
    [
        ("h100:2x8", Sizes(dp=2, cp=1, tp=4, pp=2)),
        ("h100:2048x8", Sizes(dp=128, cp=2, tp=8, pp=8)),
        ("1x8 a100-80g + 2x4 rtx4090, 25 GbE", Sizes(dp=16, cp=1, tp=1, pp=1)),
        ("gb200:4x72", Sizes(dp=4, cp=1, tp=8, pp=9)),
        ("h100:8", Sizes(dp=1, cp=1, tp=8, pp=1)),
        ("h100:10000x8", Sizes(dp=10000, cp=1, tp=8, pp=1)),
    ],
)
def test_every_node_is_drawn_or_counted(cluster: str, sizes: Sizes) -> None:
    found = machines(cluster)
    drawn = placement(found, sizes)
    shown = drawn.count('class="node"')
    gaps = [int(part.split("</b>")[0].replace(",", "")) for part in drawn.split("<b>")[1:]]
    assert shown + sum(gaps) == found.nodes
    if found.nodes > 6:
        squares = drawn.count("<rect")
        assert squares == found.nodes if found.nodes <= 4096 else squares <= 4096
    assert len(drawn) < 2_500_000


def test_places_are_those_of_the_programs() -> None:
    """rank = ((stage · dp + d) · cp + c) · tp + t, as `shardwise.program.build` numbers them."""
    from shardwise.program.build import rank_of

    sizes = Sizes(dp=3, cp=2, tp=4, pp=5)
    for rank in range(120):
        stage, d, c, t = sizes.place(rank)
        assert rank_of(stage, d, t, 3, 4, c=c, cp=2) == rank
    assert sizes.words(119) == "stage 4 · dp 2 · cp 1 · tp 3"
    assert Sizes(dp=1, cp=1, tp=1, pp=1).words(0) == "all of the model"


@pytest.mark.parametrize(("pp", "shown"), [(2, 2), (24, 24), (96, 24)])
def test_one_rank_of_each_stage_is_shown(pp: int, shown: int) -> None:
    mesh = Mesh(dp=8, tp=8, pp=pp, microbatches=8, schedule="1f1b")
    ranks = shown_ranks(mesh)
    assert len(set(ranks)) == shown and ranks[0] == 0 and ranks[-1] == 64 * (pp - 1)
    assert all(rank % 64 == 0 for rank in ranks)
    assert f"Shown are {shown} of {64 * pp:,} ranks" in omitted_text(mesh)


def test_very_long_steps_are_drawn_in_part() -> None:
    found = prospect("h100:8x8", dp=1, tp=8, pp=8, chunks=4, microbatches=128)
    figure = timeline_figure(shown_ranks(found.mesh), found.simulation)
    bars = sum(len(each["x"]) for each in figure["data"])
    assert 2000 < bars <= 8 * 601 < len(found.simulation.timeline)
    gap = next(each for each in figure["data"] if each["name"] == "not drawn")
    assert len(gap["x"]) == 8 and "more actions of rank 0, in the same order, are not drawn" in gap["hovertext"][0]
    ends = max(
        base + length for each in figure["data"] if each["type"] == "bar" for base, length in zip(each["base"], each["x"], strict=True)
    )
    assert ends == pytest.approx(found.simulation.step_time_s), "the last action is drawn"


def test_every_layout_is_a_point_and_those_that_do_not_fit_are_marked() -> None:
    found = prospect("h100:4x8", dp=4, tp=8, pp=1)
    figure = tradeoff_figure(found.points, LIMIT_BYTES)
    go.Figure(figure)
    counts = {each["name"]: len(each["x"]) for each in figure["data"]}
    assert counts == Counter(each.kind for each in found.points)
    assert figure["data"][-1]["name"] == "chosen", "drawn last, above the others"
    wrong = next(each for each in figure["data"] if each["name"] == "does not fit")
    assert all("does not fit" in text and "zero=" in text for text in wrong["hovertext"])
    assert min(wrong["y"]) > figure["layout"]["shapes"][0]["y0"] == LIMIT_BYTES
    assert figure["layout"]["xaxis"]["type"] == "log", "from 1 to 11 times the best"


def test_written_again_is_the_same(tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        write_prospect(tmp_path / name, prospect("h100:2x8", dp=2, tp=8, pp=1))
    assert (tmp_path / "a.html").read_text() == (tmp_path / "b.html").read_text()
