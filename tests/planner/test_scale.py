"""The search for many devices against trying everything: no bound is above what the simulator says, nothing is faster than the best."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import Example, bert, gpt2, llama, mixtral
from typer.testing import CliRunner

import shardwise as sw
from shardwise.capture.export import capture
from shardwise.capture.precision import Precision
from shardwise.cli import app
from shardwise.cluster.model import Cluster
from shardwise.cost.routing import Routing
from shardwise.outlook import Outlook, Study, Wish
from shardwise.planner import scale, twins, unfit
from shardwise.planner.bounds import SchemeBound, least_memory, memory_bound
from shardwise.planner.compose import Scheme
from shardwise.planner.estimator import FULL_MEMORY
from shardwise.planner.plan import Infeasible
from shardwise.planner.scale import Found, ScaleSearch
from shardwise.planner.space import Pins, Split
from shardwise.planner.twins import Twin
from shardwise.program.tables import in_flight, rank_tables
from shardwise.simulate.profile import Profile, StageProfile
from shardwise.simulate.simulator import peak_memory

MODELS: dict[str, Callable[[], Example]] = {
    "llama": lambda: llama(layers=3, hidden=256, samples=2, sequence=128),
    "gpt2": lambda: gpt2(layers=3, samples=2),
    "gpt2, any precision": lambda: gpt2(layers=3, samples=2),
    "bert": lambda: bert(layers=3, hidden=128),
    "mixtral": lambda: mixtral(layers=3, samples=2, experts=4),
    "mixtral, launched": lambda: mixtral(layers=3, samples=2, experts=4),
}
ROUTINGS = {
    "mixtral": Routing(experts=4, chosen=2),
    "mixtral, launched": Routing(experts=4, chosen=2, overlapped=True, launch_s=4e-4),
}
SPACES = [
    ("llama", "a100-80g:1x4", 6, "cp=1,microbatch=1"),
    ("gpt2", "rtx4090:2x2, 25 GbE", 4, "microbatch=1,recompute=none"),
    ("gpt2", "rtx4090:2x1, 25 GbE", 4, "microbatch=1"),
    ("gpt2, any precision", "rtx4090:2x1, 25 GbE", 4, "recompute=none"),
    ("bert", "h100:2x4", 8, "tp=2,cp=1,recompute=none"),
    ("mixtral", "h100:2x2", 4, "cp=1,microbatch=1,recompute=none"),
    ("mixtral, launched", "h100:2x2", 4, "cp=1,tp=1"),
]
Space = tuple[str, str, int, str]


@cache
def made(space: Space) -> ScaleSearch:
    model, line, blocks, pins = space
    twin, whole = (_twin(model, dtype, blocks) for dtype in (torch.bfloat16, torch.float32))
    others: dict[Precision, Twin] = {"float32": whole} if model.endswith("any precision") else {}
    cluster, pinned, routing = Cluster.parse(line), Pins.parse(pins), ROUTINGS.get(model)
    return ScaleSearch(twin=twin, others=others, cluster=cluster, global_batch=8, budget_s=1e9, pins=pinned, routing=routing)


def _twin(model: str, dtype: torch.dtype, blocks: int) -> Twin:
    module, batch = MODELS[model]()
    return Twin(graph=capture(module.to(dtype), batch), counts=(blocks,))


@cache
def everything(space: Space) -> list[Found]:
    """Every scheme of the space, simulated."""
    search = made(space)
    bounded = [search.bounded(scheme, split.samples) for split in search.space.splits() for scheme in search.space.schemes(split)]
    return [search.simulated(each) for each in bounded if each is not None]


def with_memory(space: Space, share: float) -> ScaleSearch:
    """On devices that hold this share of the space's layouts."""
    sizes = sorted(each.memory_bytes for each in everything(space))
    search = made(space)
    return replace(search, cluster=replace(search.cluster, memory_bytes=int(sizes[int(share * (len(sizes) - 1))] / FULL_MEMORY) + 1))


@pytest.mark.parametrize("share", [1.0, 0.3, 0.02])
@pytest.mark.parametrize("space", SPACES, ids=str)
def test_the_best_is_found(space: Space, share: float) -> None:
    search = with_memory(space, share)
    fits = [each for each in everything(space) if each.memory_bytes <= search.limit_bytes]
    assert 0 < len(fits) <= len(everything(space))
    found = search.search()
    assert found.best_s == pytest.approx(min(each.seconds for each in fits), rel=1e-12)
    assert found.gap == 0, "it is proven"
    assert found.simulated < len(everything(space)) / 2, "and not by simulating everything"


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_no_bound_is_above_the_simulated(space: Space) -> None:
    search = made(space)
    for each in everything(space):
        assert each.bound_s <= each.seconds * (1 + 1e-9), f"stages of {each}"
        shape, costs = search.pieces(each.split)
        bound = SchemeBound(shape=shape, costs=costs, cluster=search.cluster)
        assert bound.seconds(each.scheme) <= each.seconds * (1 + 1e-9), f"pieces of {each}"
        shape, whole = search.perfect(each.split)
        plain = replace(each.scheme, recompute="none", schedule="1f1b", chunks=1, zero=0)
        bound = SchemeBound(shape=shape, costs=whole, cluster=search.cluster)
        assert bound.seconds(plain) <= each.seconds * (1 + 1e-9), f"whole model, {each}"
        bounded = search.bounded(each.scheme, each.samples)
        assert bounded is not None and bounded.memory_bytes <= each.memory_bytes, f"memory of {each}"
        assert least_memory(shape, costs, each.scheme, search.cluster) == bounded.memory_bytes, f"memory of {each} without a profile"
        peaks = peak_memory(search.composed(each.scheme, each.samples), each.scheme.mesh)
        assert max(peaks, key=lambda use: sum(use.values())) == each.memory, f"memory of {each} without a clock"
    for split in search.space.splits():
        least = min(each.memory_bytes for each in everything(space) if each.split == split)
        exact = replace(search, cluster=replace(search.cluster, memory_bytes=int(least / FULL_MEMORY) + 1))
        assert exact.may_fit(split), f"memory of the whole model, {split}"


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_the_parts_of_a_step_add_up(space: Space) -> None:
    for each in everything(space)[::5]:
        assert each.parts is not None
        parts = each.parts
        added = parts.compute + parts.recompute + parts.exchange + parts.reduce + parts.update + parts.waiting
        assert added == pytest.approx(each.seconds, rel=1e-6), str(each)
        assert (parts.recompute > 0) == (each.scheme.recompute != "none")


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zb-h1", "zb-2p", "zb-v"])
def test_the_bound_of_memory_counts_each_stage_of_a_rank(schedule: str) -> None:
    """Against the schedules' tables: never above, and near the peak also where one stage, such as the output alone, keeps nothing."""
    made_up = random.Random(0)
    for _ in range(50):
        ranks, microbatches = made_up.randint(2, 5), made_up.randint(1, 12)
        chunks = {"interleaved": made_up.randint(2, 4), "zb-v": 2}.get(schedule, 1)
        saved = {stage: made_up.randint(1, 100) for stage in range(ranks * chunks)} | {ranks * chunks - 1: 0}
        held = dict.fromkeys(("parameters", "gradients", "optimizer"), 0)
        stages = [StageProfile(seconds={}, memory=held, saved_bytes=nbytes) for nbytes in saved.values()]
        scheme = Scheme(pp=ranks, chunks=chunks, microbatches=microbatches, schedule=schedule)
        bound = memory_bound(Profile(stages=stages, edges=[], cores=None), scheme)
        tables = rank_tables(schedule, ranks, chunks, microbatches)
        peaks = in_flight(tables, saved, dict.fromkeys(saved, 0))
        assert bound <= max(peaks[0], peaks[-1])
        assert bound >= 0.5 * max(peaks[0], peaks[-1]), scheme


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_the_first_split_that_is_looked_at_is_among_the_best(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is expected of splits that are not lowered is near what they take."""
    monkeypatch.setattr(scale, "_LOWERED", 0)
    found = replace(made(space), budget_s=None).search()
    assert found.lowered == 1
    assert found.best_s <= 1.1 * min(each.seconds for each in everything(space))


def test_memory_decides() -> None:
    """With less of it another layout is the best, and the fastest that was put together and does not fit is remembered."""
    pairs = [tuple(with_memory(space, share).search() for share in (1.0, 0.02)) for space in SPACES]
    assert all(scarce.best_s >= roomy.best_s and roomy.tight is None for roomy, scarce in pairs)
    assert any(scarce.best_s > roomy.best_s for roomy, scarce in pairs)
    assert any(scarce.tight is not None for _, scarce in pairs)


def test_less_time_leaves_a_gap_that_is_true() -> None:
    search = made(SPACES[0])
    hasty = replace(search, budget_s=1e-6).search()
    best = search.search().best_s
    assert hasty.found, "something is found in any time"
    assert hasty.lower_s <= best * (1 + 1e-9), "the bound is one"
    assert hasty.best_s * (1 - hasty.gap) <= best * (1 + 1e-9)


def test_only_what_runs() -> None:
    only = replace(made(SPACES[0]), only_runnable=True, pins=Pins.parse("tp=2,cp=1")).search()
    assert only.found and all(each.runs for each in only.found)


def test_pins_are_kept() -> None:
    pinned = replace(made(SPACES[0]), pins=Pins.parse("pp=2,zero=1,schedule=1f1b")).search()
    assert pinned.found
    assert all((each.scheme.pp, each.scheme.zero, each.scheme.schedule) == (2, 1, "1f1b") for each in pinned.found)


def test_zero_2_reduces_in_every_microbatch() -> None:
    """It has no whole gradients to wait with (Rajbhandari et al. 2020, section 5.2)."""
    search = made(SPACES[0])
    once, often = (
        search.simulated(found)
        for zero in (1, 2)
        for scheme in replace(search, pins=Pins.parse(f"dp=4,microbatches=2,recompute=none,zero={zero}")).space.schemes(Split())
        if (found := search.bounded(scheme, 1))
    )
    assert once.parts is not None and often.parts is not None
    assert often.memory["gradients"] == pytest.approx(once.memory["gradients"] / 4, rel=0.01)
    assert often.parts.exchange > once.parts.exchange


# -- known models --------------------------------------------------------------------------------------------------------------------------


@cache
def study() -> Study:
    return Study.of("gpt3-125m")


def looked(line: str, **wish: Any) -> Outlook:
    found = study().outlook(Cluster.parse(line), Wish(global_batch=64, **wish))
    assert isinstance(found, Outlook), str(found)
    return found


def test_parameters_decide_the_flops() -> None:
    """Six for each parameter and token beside attention (Kaplan et al. 2020, section 2.1)."""
    tokens, parameters = 64 * 2048, 125e6
    assert looked("a100-80g:8", pins=Pins(pp=1)).flops == pytest.approx(6 * parameters * tokens, rel=0.4)


@pytest.mark.parametrize(
    ("line", "precision", "searched"),
    [
        ("a100-80g:8", None, ("bf16",)),
        ("v100-32g:8", None, ("fp16",)),  # it has no fast products in bfloat16
        ("v100-32g:8", "any", ("fp16", "float32")),
        ("a100-80g:8", "any", ("bf16", "float32")),
        ("v100-32g:8", "bf16", ("bf16",)),
        ("a100-80g:8", "float32", ("float32",)),
    ],
)
def test_the_faster_16_bit_format_is_taken(line: str, precision: Any, searched: tuple[str, ...]) -> None:
    """The other could be no better at anything; float32 where it is asked for."""
    assert study().search(Cluster.parse(line), Wish(precision=precision)).space.precisions == searched


def test_a_slower_format_takes_longer() -> None:
    steps = {precision: looked("v100-32g:8", precision=precision).found[0] for precision in ("bf16", "fp16", "float32")}
    assert steps["fp16"].seconds < 0.7 * min(steps["bf16"].seconds, steps["float32"].seconds)
    assert steps["fp16"].memory_bytes < steps["float32"].memory_bytes
    best = looked("v100-32g:8", precision="any").found[0]
    assert best.scheme.precision == "fp16" and best.seconds == steps["fp16"].seconds


def test_a_model_that_fits_in_one_precision_alone() -> None:
    """A parameter, its gradient and its states take 16 bytes in float32 and 18 in mixed precision; activations twice as many."""
    short, line = Study.of("gpt3-125m", sequence=64), "rtx4090:1x1"

    def held(precision: Any) -> Found:
        found = short.outlook(Cluster.parse(line), Wish(global_batch=1, precision=precision))
        assert isinstance(found, Outlook)
        return found.found[0]

    numbers, kinds = {}, ("parameters", "gradients", "optimizer")
    for precision, nbytes in (("bf16", 18), ("float32", 16)):
        numbers[precision] = sum(held(precision).memory[kind] for kind in kinds) / nbytes
    assert numbers["bf16"] == pytest.approx(numbers["float32"], rel=1e-6) and 120e6 < numbers["bf16"] < 170e6
    most, least = held("bf16").memory_bytes, held("float32").memory_bytes
    assert least < most
    between = replace(Cluster.parse(line), memory_bytes=int((most + least) / 2 / FULL_MEMORY))
    assert isinstance(short.outlook(between, Wish(global_batch=1, pins=Pins(recompute="none"))), Infeasible)
    found = short.outlook(between, Wish(global_batch=1, precision="any", pins=Pins(recompute="none")))
    assert isinstance(found, Outlook) and found.found[0].scheme.precision == "float32"
    assert found.proposal().precision == "float32" and "float32" in found.proposal().explanation[0]


def test_objectives() -> None:
    throughput, cost = looked("a100-80g:4x8"), looked("a100-80g:4x8", objective="cost")
    assert throughput.cluster.ranks == 32
    assert cost.dollars(cost.found[0]) <= throughput.dollars(throughput.found[0])  # type: ignore[operator]
    few = looked("a100-80g:4x8", objective="devices")
    assert few.cluster.ranks == 8, "a node is enough"
    step_s = throughput.found[0].seconds
    more = looked("a100-80g:4x8", objective="devices", within_s=step_s * 1.6)
    assert more.found[0].seconds <= step_s * 1.6 and 8 < more.cluster.ranks <= 32
    assert looked("a100-80g:4x8", objective="latency").found[0].seconds <= step_s
    never = study().outlook(Cluster.parse("a100-80g:4x8"), Wish(global_batch=64, objective="devices", within_s=step_s / 100))
    assert isinstance(never, Infeasible) and "within" in str(never)


def test_a_price_of_ones_own() -> None:
    listed, own = looked("a100-80g:8"), looked("a100-80g:8", price_per_hour=1.0)
    assert own.dollars(own.found[0]) == pytest.approx(8 * own.found[0].seconds / 3600)
    assert listed.dollars(listed.found[0]) == pytest.approx(3.4309 * 8 * listed.found[0].seconds / 3600, rel=1e-3)


def test_wishes_that_mean_nothing_are_refused() -> None:
    with pytest.raises(sw.LayoutError, match=r"objective 'fame' is unknown; there are throughput, latency, cost, devices"):
        Wish(objective="fame")  # type: ignore[arg-type]
    with pytest.raises(sw.LayoutError, match=r"within 3 s is asked for, which objective 'throughput' does not use"):
        Wish(within_s=3.0)
    with pytest.raises(sw.LayoutError, match=r"precision 'half' is unknown; there are float32, bf16, fp16, any"):
        Wish(precision="half")  # type: ignore[arg-type]
    with pytest.raises(sw.LayoutError, match="budget_s=-1 is not above 0"):
        Wish(budget_s=-1.0)


def test_what_does_not_fit_says_what_would() -> None:
    pins = {"zero": "0", "recompute": "none", "pp": "1", "tp": "1", "cp": "1", "microbatch": "1"}

    def on(memory_bytes: float, pins: dict[str, str]) -> Outlook | Infeasible:
        cluster = replace(Cluster.parse("rtx4090:1x2"), memory_bytes=int(memory_bytes))
        return study().outlook(cluster, Wish(global_batch=8, pins=Pins.parse(pins)))

    fits = on(24e9, pins)
    assert isinstance(fits, Outlook)
    needed = fits.found[0].memory_bytes / FULL_MEMORY
    found = on(needed * 0.9, pins)
    assert isinstance(found, Infeasible)
    assert f"of a device's {needed * 0.9 / 1e9:.3g} GB a layout may take" in str(found)
    assert "optimizer" in found.reasons[0]
    words = found.remedy.split(" instead")[0].partition("=")
    assert words[0] in pins, found.remedy
    assert isinstance(on(needed * 0.9, pins | {words[0]: words[2]}), Outlook), f"the remedy {found.remedy} is one"
    hopeless = on(needed / 3, pins)
    assert isinstance(hopeless, Infeasible) and "devices" in hopeless.remedy


@pytest.mark.parametrize("pins", ["", "zero=0,recompute=none", "tp=1,pp=1,zero=3,recompute=full"])
@pytest.mark.parametrize("memory_gb", [0.1, 1.75, 2.0])
def test_what_does_not_fit_is_known_from_little_work(pins: str, memory_gb: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is analysed once; lowered are the whole and the leanest splits; put together is a layout for each change that may do."""
    done: Counter[str] = Counter()

    def counted(module: Any, name: str) -> None:
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **named: (done.update([name]), function(*args, **named))[1])

    counted(scale, "compose")
    counted(twins, "piece_costs_on")
    counted(twins, "analyse")
    counted(unfit, "_fits")
    fresh = replace(study(), twins={"bf16": Twin(graph=study().twin().graph, counts=study().twin().counts)})
    cluster = replace(Cluster.parse("rtx4090:1x2"), memory_bytes=int(memory_gb * 1e9))
    found = fresh.outlook(cluster, Wish(global_batch=8, pins=Pins.parse(pins)))
    assert isinstance(found, Infeasible) and "the leanest layout, dp=" in found.reasons[0]
    assert done["analyse"] == 1
    assert 1 <= done["piece_costs_on"] <= 3, "the whole, the leanest split as pinned, and that of a change that would do"
    assert 1 <= done["compose"] <= 1 + done["_fits"]


def test_what_fits_alone_is_found_behind_many_that_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the schemes that are put together of each split are all used up by faster ones that do not fit."""
    monkeypatch.setattr(scale, "_COMPOSED", 1)
    monkeypatch.setattr(scale, "_AHEAD", 1)
    search = replace(with_memory(SPACES[0], 0.0), budget_s=None)
    fits = [each for each in everything(SPACES[0]) if each.memory_bytes <= search.limit_bytes]
    assert len(fits) < 5
    assert search.search().best_s == pytest.approx(min(each.seconds for each in fits), rel=1e-9)


def test_a_search_for_what_cannot_fit_lowers_nothing() -> None:
    cluster = replace(Cluster.parse("rtx4090:1x2"), memory_bytes=int(1.7e9))
    found = study().search(cluster, Wish(global_batch=8)).search()
    assert not found.found and found.lowered == 0 and found.composed == 0


def test_a_known_model_in_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    command = ["--model", "gpt3-125m", "--cluster", "a100-80g:8", "--global-batch", "64", "--layout", "cp=1,microbatch=4"]
    run = CliRunner().invoke(app, ["plan", *command, "--out", str(out)])
    assert run.exit_code == 0, run.output
    assert max(map(len, run.stdout.replace(str(out), "plan.json").splitlines())) <= 100
    plan = json.loads(out.read_text())
    assert plan["kind"] == "proposal" and 0.05 < plan["predicted"]["peak_share"] < 0.8
    assert plan["runnable"] == (plan["because"] == [])
    assert sum(plan["predicted"]["parts"].values()) == pytest.approx(plan["predicted"]["step_time_s"], rel=1e-6)
    assert sum(plan["stages"]) == 12 and len(plan["stages"]) == plan["pp"] * plan["chunks"]
    assert any(source.startswith("a100-80g memory_bytes") for source in plan["sources"])
    with pytest.raises(sw.PlanError, match="is a proposal, made from a few layers"):
        sw.Plan.load(out)
    table = CliRunner().invoke(app, ["layouts", *command, "--json"])
    first = json.loads(table.stdout)["layouts"][0]
    assert first["precision"] == plan["precision"] == "bf16" and first["layout"] == plan["layout"]
    assert first["step_time_s"] == pytest.approx(plan["predicted"]["step_time_s"])


def test_what_another_cluster_would_change() -> None:
    from shardwise.whatif import with_what_ifs

    plan = with_what_ifs(looked("a100-80g:8", pins=Pins(cp=1, microbatch=4)), ["nodes=2,device=h100", "global-batch=128"])
    larger, longer = plan.what_if
    assert "h100:2x8" in larger.cluster and larger.step_time_s < plan.predicted.step_time_s  # type: ignore[operator]
    assert longer.step_time_s > plan.predicted.step_time_s  # type: ignore[operator]
    assert f"nodes=2,device=h100: {larger.verdict}"[:60] in " ".join(" ".join(plan.explanation).split())


def test_plans_side_by_side(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    plans = [looked("a100-80g:8", pins=Pins.parse(pins)).proposal() for pins in ("cp=1,microbatch=4", "dp=1,tp=8,cp=1")]
    for path, plan in zip(paths, plans, strict=True):
        plan.save(path)
    assert plans[0].predicted.step_time_s < plans[1].predicted.step_time_s
    shown = CliRunner().invoke(app, ["compare", *map(str, paths)])
    assert shown.exit_code == 0 and f"{paths[0]} is" in shown.stdout.replace("\n", ""), shown.output
    document = json.loads(CliRunner().invoke(app, ["compare", *map(str, paths), "--json"]).stdout)
    assert document["differs"]["tp"] == [str(plans[0].tp), "8"]
    assert document["same"]["model"] == "gpt3-125m" and document["same"]["precision"] == "bf16"
    more = sum(document["seconds_more"].values())
    assert more == pytest.approx(plans[1].predicted.step_time_s - plans[0].predicted.step_time_s, rel=1e-6)


def test_a_model_that_fits_nowhere_says_so() -> None:
    run = CliRunner().invoke(app, ["layouts", "--model", "gpt3-175b", "--cluster", "rtx4090:4", "--global-batch", "4", "--runnable"])
    assert run.exit_code == 3, run.output
    assert "the leanest layout" in run.stderr and "times as many devices" in run.stderr


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["plan", "--model", "hf:x.json", "--cluster", "local:2", "--objective", "cost"])
    assert run.exit_code == 2 and "--objective has no effect here" in run.stderr
    run = CliRunner().invoke(app, ["plan", "--model", "hf:x.json", "--cluster", "local:2", "--precision", "any"])
    assert run.exit_code == 2 and "--precision any is for a known model" in run.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nodes", "'nodes' in what-if 'nodes' is not understood; write for example nodes=129"),
        ("nodes=x", "'x' is not a whole number"),
        ("network=0", "'0' is not a number from 0.001 to 1000"),
        ("colour=red", "is not understood"),
        ("", "changes nothing"),
    ],
)
def test_what_ifs_that_are_not_understood(change: str, message: str) -> None:
    from shardwise.whatif import Change

    with pytest.raises(sw.LayoutError, match=message):
        Change.parse(change)


def test_a_faster_network_is_one() -> None:
    from shardwise.whatif import Change

    before = Cluster.parse("a100-80g:4x8")
    after = Change.parse("network=2x").of(before)
    assert before.machines is not None and after.machines is not None
    assert after.machines.levels[-1].bytes_per_s == 2 * before.machines.levels[-1].bytes_per_s
    assert after.machines.levels[0] == before.machines.levels[0]
    assert Change.parse("nodes=+1").of(before).ranks == 40
    assert Change.parse("device=h200").of(before).name == "h200:4x8"


def test_a_plan_for_thousands_says_where_to_look() -> None:
    model, batch = llama(layers=2)
    with pytest.raises(sw.LayoutError, match=r"has 1024 ranks, more than the 64 .* `shardwise layouts`"):
        sw.plan(model, batch, "h100:128x8")
