"""Layouts on unlike devices: better than equal parts for all, within each kind's memory, and the best of their form by the simulator."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations, pairwise

import pytest
import torch
from typer.testing import CliRunner

from shardwise import presets
from shardwise.capture.export import capture
from shardwise.cli import app
from shardwise.cluster.model import Cluster
from shardwise.cost.links import link_seconds
from shardwise.errors import LayoutError
from shardwise.outlook import Outlook, Study, Wish
from shardwise.planner.pieces import Outline
from shardwise.planner.plan import Infeasible
from shardwise.planner.scale import Found, ScaleSearch
from shardwise.planner.space import Pins
from shardwise.planner.twins import Twin, TwinLayout
from shardwise.planner.uneven import Costs, Placed, Team, Uneven, UnevenSearch, kinds_of, search_unlike
from shardwise.report.outlook import prospect_of
from shardwise.simulate.simulator import Column, simulate_columns

MIXED = "1x8 h100 + 2x4 a100-80g, 8xHDR"
LAYERS, BATCH = 12, 96


@pytest.fixture(scope="module")
def scale() -> ScaleSearch:
    model, batch = presets.build("gpt3-350m", layers=2, batch_size=4)
    graph = capture(model.to(torch.bfloat16).train(), batch)
    return ScaleSearch(twin=Twin(graph=graph, counts=(LAYERS,)), cluster=Cluster.parse(MIXED), global_batch=BATCH)


@pytest.fixture(scope="module")
def found(scale: ScaleSearch) -> list[Found]:
    return search_unlike(scale, scale.search())


def uneven(scale: ScaleSearch, memory_gb: Sequence[float] = (), layers: int = LAYERS, batch: int = BATCH) -> UnevenSearch:
    """The search for layouts of both kinds. memory_gb: of each kind, where not its own."""
    kinds = kinds_of(scale.cluster)
    if memory_gb:
        limits = [int(each * 1e9) for each in memory_gb]
        kinds = tuple(replace(kind, alone=replace(kind.alone, memory_bytes=limit)) for kind, limit in zip(kinds, limits, strict=True))
    twin = Twin(graph=scale.twin.graph, counts=(layers,), tracer=scale.twin.tracer)

    @cache
    def pieces(tp: int, samples: int) -> tuple[Outline, Sequence[Costs]]:
        return twin.split_on(TwinLayout(tp=tp), [kind.alone for kind in kinds], scale.largest // samples)

    return UnevenSearch(cluster=scale.cluster, kinds=kinds, pieces=pieces, global_batch=batch, largest=2)


def of_form(found: Sequence[Found], form: str) -> list[Placed]:
    return [each for each in found if isinstance(each, Placed) and each.words.startswith(form)]


# -- what is found -------------------------------------------------------------------------------------------------------------------------


def test_better_than_equal_parts_and_than_one_kind_alone(found: list[Found]) -> None:
    best = found[0]
    assert isinstance(best, Placed) and best.words.startswith(("copies", "stages"))
    for form in ("equal", "only=h100", "only=a100"):
        other = min(each.seconds for each in of_form(found, form))
        assert best.seconds < 0.95 * other, (form, best.seconds, other)
    assert best.step_time_s is not None


def test_estimates_are_the_simulators(scale: ScaleSearch) -> None:
    every = uneven(scale).search()
    assert {each.words.partition("=")[0] for each in every} == {"stages", "copies"}
    for each in every[::3]:
        step = each.simulated()
        assert each.estimate_s == pytest.approx(step.step_time_s, rel=0.05), each
        assert each.memory_bytes == pytest.approx(max(step.memory_bytes), rel=1e-6), each


def test_faster_devices_have_more(found: list[Found]) -> None:
    copies = of_form(found, "copies")[0]
    (fast, slow) = copies.places
    assert fast.startswith("8 × h100: ") and slow.startswith("8 × a100-80g: ")
    shares = [int(line.split(" % of the batch")[0].split()[-1]) for line in (fast, slow)]
    assert sum(shares) == 100 and 1.5 < shares[0] / shares[1] < 4
    stages = of_form(found, "stages")[0]
    blocks = {kind: sum(map(int, own.split("+"))) for kind, own in (each.split(":") for each in stages.words[7:].split("|"))}
    assert sum(blocks.values()) == LAYERS and blocks["h100"] > blocks["a100-80g"]


def test_no_rank_holds_more_than_its_own_device_may(scale: ScaleSearch) -> None:
    """A kind with less memory gets fewer blocks than its speed would give it, and what does not fit is left out."""
    search = uneven(scale, memory_gb=(6.0, 80.0))
    tight, wide = search.search(), uneven(scale).search()
    assert tight and tight[0].estimate_s >= wide[0].estimate_s
    assert max(each.memory_bytes for each in wide) > 6e9, "the limit binds"
    limits = {kind.name: kind.limit_bytes for kind in search.kinds}
    for each in tight:
        memory = each.simulated().memory_bytes
        width = len(memory) // each.scheme.pp
        for rank, nbytes in enumerate(memory):
            assert nbytes <= limits[_kind_of(each, rank, width)], (each.words, rank)
    assert not uneven(scale, memory_gb=(1.0, 1.0)).search()


def _kind_of(each: Uneven, rank: int, width: int) -> str:
    """The kind on which a rank of the simulation is: of its stage, or of its copy."""
    form, _, text = each.words.partition("=")
    if form == "stages":
        homes = [kind for kind, own in (part.split(":") for part in text.split("|")) for _ in own.split("+")]
        return homes[rank // width]
    kinds = [part.split(":")[0] for part in text.split("|")]
    return kinds[rank % width // (width // len(kinds))]  # as many ranks of each kind


def test_tensor_groups_stay_in_a_node_of_one_kind(scale: ScaleSearch) -> None:
    every = uneven(scale).search()
    assert {each.scheme.tp for each in every} <= {1, 2, 4}, "the nodes of one kind have four devices"


def test_all_samples_are_shared_out(scale: ScaleSearch) -> None:
    for each in uneven(scale).search():
        if each.words.startswith("copies"):
            sizes = [int(part.rpartition("×")[2]) for part in each.words.split("|")]
            kinds = [number for number, column in enumerate(each.columns)] if len(each.columns) == len(sizes) else []
            if kinds:
                total = sum(column.copies * column.microbatches * size for column, size in zip(each.columns, sizes, strict=True))
                assert total == BATCH, each
        else:
            (column,) = each.columns
            assert column.copies * column.microbatches * each.samples == BATCH


def test_what_runs_today(scale: ScaleSearch) -> None:
    """Copies with equally many microbatches on one stage, and stages."""
    every = replace(uneven(scale), only_runnable=True).search()
    assert {each.words.partition("=")[0] for each in every} == {"stages", "copies"} and not any(each.lacks for each in every)
    for each in every:
        assert len({column.microbatches for column in each.columns}) == 1
        assert each.words.startswith("stages") or each.scheme.pp == 1
    assert any("copies with unequally many microbatches" in each.lacks for each in uneven(scale).search()), "others are marked"


# -- the best of their form ----------------------------------------------------------------------------------------------------------------


def test_cuts_are_the_best_by_the_simulator(scale: ScaleSearch) -> None:
    """Against every cut of a shorter model, with the order of the kinds and all else as they were found."""
    search = uneven(scale, layers=6, batch=32)
    tries = [each for each in search._tries((1,), (1, 2)) if each.stages and each.scheme.pp in (2, 4) and not each.scheme.zero]
    every = [made for each in tries if (made := search._staged(each))]
    assert len(every) >= 12 and {each.scheme.pp for each in every} == {2, 4}
    losses = [each.simulated().step_time_s / min(_all_cuts(search, each)) for each in every]
    assert max(losses) <= 1.05 and sorted(losses)[len(losses) * 3 // 4] <= 1.01, "the formula that is minimised is near the simulator"


def _all_cuts(search: UnevenSearch, each: Uneven) -> list[float]:
    """Simulated steps of every cut whose stages are put together from the same pieces' costs."""
    (column,) = each.columns
    kinds = {kind.name: kind for kind in search.kinds}
    order = [kinds[part.split(":")[0]] for part in each.words[7:].split("|")]
    machines = search.cluster.machines
    assert machines is not None
    team = next(team for team in search.teams if team.kinds == tuple(order))
    width = each.scheme.dp * each.scheme.tp
    seats = [kind for kind in order for _ in range(kind.ranks // width)]
    units = search._units(each.scheme.tp)
    steps = []
    for places in combinations(range(1, len(units)), each.scheme.pp - 1):
        ends = [0, *places, len(units)]
        parts = [tuple({index: units[a:b].count(index) for index in units[a:b]}.items()) for a, b in pairwise(ends)]
        stages = [
            search._profile(team, kind, each.scheme, each.samples, part, stages=True) for kind, part in zip(seats, parts, strict=True)
        ]
        edges = [
            search._edge(team, seats, each.scheme, each.samples, parts[stage][-1][0], stage, first=stage * width)
            for stage in range(each.scheme.pp - 1)
        ]
        profile = column.profile.model_copy(update={"stages": stages, "edges": edges})
        steps.append(simulate_columns([replace(column, profile=profile)], each.scheme.mesh).step_time_s)
    return steps


def test_shares_are_the_best_by_the_simulator(scale: ScaleSearch) -> None:
    """Against every number of microbatches that the copies of the two kinds may have."""
    every = [each for each in uneven(scale).search() if each.words.startswith("copies") and len(each.columns) == 2]
    alike = [each for each in every if len({part.rpartition("×")[2] for part in each.words.split("|")}) == 1][:4]
    assert alike
    for each in alike:
        fast, slow = each.columns
        units = fast.copies * fast.microbatches + slow.copies * slow.microbatches
        steps = []
        for count in range(1, units // slow.copies):
            rest = units - slow.copies * count
            if rest >= fast.copies:
                most = -(-rest // fast.copies)
                columns = [Column(profile=fast.profile, copies=fast.copies, microbatches=most), replace(slow, microbatches=count)]
                steps.append(simulate_columns(columns, each.scheme.mesh).step_time_s)
        assert each.simulated().step_time_s <= min(steps) * 1.001, each


# -- links ---------------------------------------------------------------------------------------------------------------------------------


def test_between_kinds_the_slower_side_sets_the_rate() -> None:
    """Eight devices that share a port and two of four: what passes between them takes what a device of the eight has of it."""
    cluster = Cluster.parse("1x8 a100-80g + 2x2 rtx4090, 1x100 GbE")
    team = Team(kinds=kinds_of(cluster), cluster=cluster)
    assert cluster.machines is not None
    assert team.send_s(1e9, 7, 8) == team.send_s(1e9, 8, 7)
    crossing = cluster.machines.crossing((7, 8))
    assert crossing.bytes_per_s == pytest.approx(12.5e9 / 8)
    assert team.send_s(1e9, 7, 8) == link_seconds("send_recv", 1e9, crossing)
    assert team.send_s(1e9, 8, 10) < 0.3 * team.send_s(1e9, 7, 8)


def test_kinds_alone_are_uniform_clusters() -> None:
    first, second = kinds_of(Cluster.parse("1x8 a100-80g + 2x4 rtx4090 + 1x8 a100-80g, 25 GbE"))
    assert (first.name, first.ranks, second.name, second.ranks) == ("a100-80g", 16, "rtx4090", 8)
    assert first.alone.rates == Cluster.parse("a100-80g:8").rates
    assert second.alone.memory_bytes == Cluster.parse("rtx4090:8").memory_bytes
    assert not second.holds(8) and second.holds(4)
    (only,) = kinds_of(Cluster.parse("h100:2x8"))
    assert only.alone.ranks == 16


# -- the command line ----------------------------------------------------------------------------------------------------------------------


def test_the_command_line_says_which_device_does_what() -> None:
    arguments = ["layouts", "--cluster", "1x8 a100-80g + 2x4 rtx4090, 25 GbE", "--model", "gpt3-125m", "--global-batch", "64"]
    run = CliRunner().invoke(app, [*arguments, "--json"])
    assert run.exit_code == 0, run.output
    layouts = json.loads(run.stdout)["layouts"]
    assert all(each["places"] for each in layouts)
    words = {each["layout"].split(",")[-1].split("=")[0] for each in layouts}
    assert words == {"equal", "only", "stages", "copies"}
    best = {word: min(e["step_time_s"] for e in layouts if f",{word}=" in f",{e['layout'].split(',')[-1]}=") for word in words}
    assert layouts[0]["step_time_s"] == min(best.values()) < best["equal"]


def test_where_equal_parts_do_not_fit() -> None:
    """Unequal ones are compared, where asked for; a page or a file of equal parts there is none."""
    cluster = replace(Cluster.parse("1x2 a100-80g + 1x2 rtx4090, 25 GbE"), memory_bytes=int(2e9))  # of the smallest, for equal parts
    study, wish = Study.of("gpt3-125m"), Wish(global_batch=16)
    assert isinstance(study.outlook(cluster, wish), Infeasible)
    found = study.outlook(cluster, wish, unlike=True)
    assert isinstance(found, Outlook) and not found.found and found.flops > 0
    assert {each.words.partition("=")[0] for each in found.ranked if isinstance(each, Placed)} == {"stages", "copies", "only"}
    with pytest.raises(LayoutError, match="only unequal parts fit"):
        prospect_of(found)
    pinned = study.outlook(cluster, replace(wish, pins=Pins.parse("tp=2")), unlike=True)
    assert isinstance(pinned, Infeasible), "pins are of equal parts"
