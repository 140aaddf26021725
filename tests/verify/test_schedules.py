"""Every schedule gives one device's numbers: loss, every gradient, buffers; on models whose stages share weights, whose forward pass
changes buffers or draws random numbers."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.clusters import made_up
from tests.models import Example, gpt2, mlp, unet, vit
from torch import Tensor, nn

import shardwise as sw
from shardwise.errors import CheckError, LayoutError, PlanError
from shardwise.planner.layout import Layout
from shardwise.planner.plan import Plan
from shardwise.planner.preflight import preflight
from shardwise.planner.search import search
from shardwise.program.actions import Action, Kind
from shardwise.program.trace import Tracer
from shardwise.runtime.executor import Executor
from shardwise.runtime.launch import launch
from shardwise.simulate.memory import memory_use
from shardwise.verify.one_device import Reference, prepare
from shardwise.verify.ranks import Part, Work, on_threads
from shardwise.verify.verify import Lowered, Report, check_lowered, lowered

BOUND = 1e-10
SCHEDULES = {
    "gpipe": 1,
    "1f1b": 1,
    "interleaved": 2,
    "zb-h1": 1,
    "zb-h1, 2 chunks": 2,
    "zb-2p": 1,
    "zb-2p, 2 chunks": 2,
    "zb-v": 2,
}  # and the stages of a rank


def mixtral() -> Example:
    """Tokens go to two of four experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        use_cache=False,
    )
    tokens = torch.randint(0, 64, (4, 8), generator=torch.Generator().manual_seed(1))
    return MixtralForCausalLM(config).train(), {"input_ids": tokens, "labels": tokens.clone()}


MODELS: dict[str, Callable[[], Example]] = {
    "gpt2": lambda: gpt2(layers=2, hidden=32, sequence=8),
    "vit": lambda: vit(layers=2, hidden=32),
    "mixtral": mixtral,
    "unet": lambda: unet(channels=4),
    "dropout": lambda: gpt2(layers=1, hidden=32, sequence=8, dropout=0.2),
}


@dataclass(frozen=True)
class Subject:
    """A model, and what all its layouts share."""

    reference: Reference
    tracer: Tracer = field(default_factory=lambda: Tracer(device=torch.device("cpu")))

    def plan(self, layout: str | dict[str, Any]) -> Plan:
        pinned = Layout.parse(layout)
        graph = self.reference.cast(self.reference.widest)
        found = search(graph, made_up(pinned.ranks), pinned, "adamw", self.reference.name, tracer=self.tracer)
        assert isinstance(found, Plan), str(found)
        return found

    def built(self, plan: Plan) -> Lowered:
        return lowered(self.reference, plan, self.reference.widest, self.tracer)

    def report(self, plan: Plan, *, processes: bool = False) -> Report:
        return check_lowered(self.reference, plan, self.built(plan), processes=processes)


@cache
def subject(name: str) -> Subject:
    return Subject(prepare(*MODELS[name]()))


def layout_of(schedule: str, pp: int, microbatches: int, rest: str = "dp=1,tp=1") -> str:
    return f"{rest},pp={pp},chunks={SCHEDULES[schedule]},microbatches={microbatches},schedule={schedule.partition(',')[0]}"


def same(report: Report) -> None:
    assert report.ok, f"{report.first_difference}\n{report}"
    assert report.dtype is not torch.float64 or report.max_relative_error <= BOUND
    assert any(each.name.startswith("gradient of ") for each in report.differences)


@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_decoder_whose_embedding_is_its_head(schedule: str, pp: int) -> None:
    """The table is on the first stage and the head's: on one rank in zb-v, where that is the last stage, on two in the others."""
    plan = subject("gpt2").plan(layout_of(schedule, pp, 4))
    assert len(plan.stages) == pp * SCHEDULES[schedule]
    same(subject("gpt2").report(plan))
    built = subject("gpt2").built(plan)
    tied = [part for part in built.programs[0].parameters if len(part.stages) > 1]
    groups = {rank for rank, program in built.programs.items() if any(part.name == tied[0].name for part in program.parameters)}
    first, head = tied[0].stages
    own = min(head, 2 * pp - 1 - head) if plan.schedule == "zb-v" else head % pp
    assert len(tied) == 1 and first == 0 and groups == {0, own}
    if pp == 2 or SCHEDULES[schedule] == 1:
        assert groups == ({0} if plan.schedule == "zb-v" else {0, pp - 1})


@pytest.mark.parametrize("name", ["vit", "mixtral"])
@pytest.mark.parametrize(("schedule", "pp"), [*((each, 2) for each in SCHEDULES), ("interleaved", 4), ("zb-v", 4), ("zb-h1", 4)])
def test_other_models(name: str, schedule: str, pp: int) -> None:
    same(subject(name).report(subject(name).plan(layout_of(schedule, pp, 4))))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_statistics_that_the_forward_pass_changes(schedule: str) -> None:
    """BatchNorm: one microbatch, and its buffers are what one device's are."""
    report = subject("unet").report(subject("unet").plan(layout_of(schedule, 2, 1)))
    same(report)
    assert sum(each.name.startswith("buffer ") for each in report.differences) == 3 * 5, "mean, variance and count of 5 layers"


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("gpt2", layout_of("zb-h1, 2 chunks", 2, 2, "dp=2,tp=1")),
        ("gpt2", layout_of("interleaved", 2, 2, "dp=1,tp=2")),
        ("gpt2", layout_of("zb-v", 2, 2, "dp=1,tp=2")),
        ("gpt2", layout_of("zb-2p", 2, 1, "dp=1,tp=1,cp=2")),
        ("gpt2", "dp=1,tp=1,pp=1,chunks=3,microbatches=4,schedule=interleaved"),
        ("dropout", layout_of("zb-v", 2, 4)),
        ("dropout", layout_of("interleaved", 2, 2, "dp=2,tp=1")),
    ],
)
def test_with_other_axes_and_with_random_numbers(name: str, layout: str) -> None:
    same(subject(name).report(subject(name).plan(layout)))


@pytest.mark.parametrize(("schedule", "pp", "microbatches"), [("interleaved", 4, 6), ("zb-v", 4, 3), ("zb-h1, 2 chunks", 4, 6)])
def test_microbatches_that_are_no_multiple_of_the_ranks(schedule: str, pp: int, microbatches: int) -> None:
    model = Subject(prepare(*mlp(hidden=16, samples=microbatches)))
    same(model.report(model.plan(layout_of(schedule, pp, microbatches))))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "schedule"), [("gpt2", "zb-v"), ("gpt2", "interleaved"), ("mixtral", "zb-h1"), ("unet", "zb-h1, 2 chunks")]
)
def test_on_processes(name: str, schedule: str) -> None:
    same(subject(name).report(subject(name).plan(layout_of(schedule, 2, 1 if name == "unet" else 4)), processes=True))


# -- what a plan of a schedule says --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_memory_of_a_plan_is_that_of_its_programs(schedule: str) -> None:
    """Simulated from the plan's profile, and counted on the programs' own actions."""
    plan = subject("gpt2").plan(layout_of(schedule, 2, 4))
    programs = subject("gpt2").built(plan).programs
    for rank, program in programs.items():
        assert plan.predicted.by_kind[rank] == memory_use(program, "adamw").by_kind()
    assert sw.simulate(plan).memory_bytes == plan.predicted.memory_bytes


def test_what_a_split_backward_pass_keeps_is_counted() -> None:
    """ZB-2p puts the weights' parts off longer than ZB-H1, which keeps something that 1F1B does not."""
    whole, early, late = (subject("gpt2").plan(layout_of(name, 4, 4)) for name in ("1f1b", "zb-h1", "zb-2p"))
    assert all(stage.kept_bytes == 0 for stage in whole.profile.stages) and all(stage.kept_bytes > 0 for stage in early.profile.stages)
    assert late.predicted.by_kind[1]["saved"] > early.predicted.by_kind[1]["saved"] > whole.predicted.by_kind[1]["saved"]


class Even(nn.Module):
    """16 equal layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.ReLU()) for _ in range(16)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def test_bubbles_are_those_that_the_schedules_promise() -> None:
    """Of 4 ranks' step 3 of 11 parts are bubbles in 1F1B with 8 microbatches, half of that with two stages a rank, a third in ZB-H1."""
    model = Subject(prepare(Even(), {"x": torch.randn(256, 256)}))
    bubbles = {name: model.plan(layout_of(name, 4, 8)).predicted.bubble for name in ("1f1b", "interleaved", "zb-h1", "zb-v")}
    assert bubbles["1f1b"] == pytest.approx(3 / 11, abs=0.1)
    assert bubbles["interleaved"] < 0.75 * bubbles["1f1b"]
    assert bubbles["zb-h1"] < 0.75 * bubbles["1f1b"]
    assert bubbles["zb-v"] < 0.5 * bubbles["1f1b"]


def test_a_backward_pass_that_is_not_split_has_one_graph() -> None:
    whole, parts = (subject("gpt2").built(subject("gpt2").plan(layout_of(name, 2, 4))).programs[0] for name in ("1f1b", "zb-h1"))
    assert whole.stages[0].weight is None and parts.stages[0].weight is not None
    assert not any(action.kind is Kind.WEIGHT for action in whole.actions)
    text = str(parts)
    assert text.count("def forward(") == 4 and "# the weights' part of backward, once a microbatch" in text


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    plan = subject("gpt2").plan(layout_of("zb-v", 2, 4))
    plan.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert read == plan and (read.chunks, read.schedule, read.placement) == (2, "zb-v", (0, 1, 1, 0))
    assert read.layout == "dp=1,tp=1,pp=2,chunks=2,microbatches=4,schedule=zb-v"
    text = (tmp_path / "plan.json").read_text()
    for change, said in [
        (('"zb-v"', '"zigzag"'), "schedule 'zigzag' is unknown; there are gpipe"),
        (('"chunks": 2', '"chunks": 3'), "schedule zb-v needs 2 stages a rank, not 3"),
        (('"zb-v"', '"table"'), "a table of one's own goes with schedule=table"),
    ]:
        with pytest.raises(PlanError, match=re.escape(said)):
            Plan.parse(text.replace(*change))
    fewer = plan.model_copy(update={"stages": plan.stages[:3]})
    with pytest.raises(PlanError, match=re.escape("the plan has pp=2 × chunks=2 but names 3 stage starts")):
        preflight(fewer, subject("gpt2").reference.cast(torch.float64), same_fingerprint=False)


# -- a table of one's own ------------------------------------------------------------------------------------------------------------------

OWN = """
placement 0 0 1 1   # neighbouring stages on one rank
0  F0 F0.1 F1 F1.1 .    .  B0.1 B0 W0 B1.1 W0.1 B1 W1.1 W1
1  .  .    F0 F0.1 B0.1 B0 F1 F1.1 B1.1 B1 W0.1 W0 W1 W1.1
"""


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text(OWN)
    plan = subject("gpt2").plan(f"dp=1,tp=1,schedule={tmp_path / 'own.txt'}")
    assert (plan.pp, plan.chunks, plan.microbatches, plan.schedule, plan.placement) == (2, 2, 2, "table", (0, 0, 1, 1))
    assert "\n".join(plan.table) == OWN.rstrip("\n")
    read = Plan.parse(plan.model_dump_json())
    assert read == plan
    same(subject("gpt2").report(read))
    program = subject("gpt2").built(read).programs[1]
    computed = [(action.kind, action.stage, action.microbatch) for action in program.actions if not action.edge and action.stage >= 0]
    assert computed == list(read.tables[1])
    assert len(program.local_edges) >= 1 and {action.edge for action in program.actions if action.edge}.isdisjoint(program.local_edges)


def test_a_table_that_contradicts_the_layout_or_itself(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text(OWN)
    with pytest.raises(LayoutError, match=re.escape(f"pp=4 in the layout, but the table {path} is for pp=2; leave pp out")):
        Layout.parse(f"pp=4,schedule={path}")
    path.write_text(OWN.replace("F1 F1.1 B1.1 B1 W0.1", "B1 B1.1 F1.1 F1 W0.1"))
    with pytest.raises(LayoutError) as caught:
        Layout.parse({"schedule": str(path)})
    first, *grid = str(caught.value).splitlines()
    assert first == f"{path}: rank 1 does B1 of stage 2 before F1 of stage 2:" and "[B1]" in grid[1]
    plan = subject("mixtral").plan(layout_of("zb-h1", 2, 4))
    with pytest.raises(PlanError, match="the table is for pp=2, chunks=2, microbatches=2, the plan says pp=2, chunks=1, microbatches=4"):
        Plan.parse(plan.model_copy(update={"schedule": "table", "table": OWN.splitlines()}).model_dump_json())


# -- the same, bit by bit ------------------------------------------------------------------------------------------------------------------


def bits(parts: list[Part]) -> list[Tensor]:
    return [tensor for part in parts for tensor in (torch.tensor(part.loss), *part.gradients.values(), *part.buffers.values())]


@pytest.mark.parametrize(("schedule", "rest"), [("zb-v", "dp=1,tp=1"), ("interleaved", "dp=2,tp=1"), ("zb-h1, 2 chunks", "dp=1,tp=2")])
def test_a_program_that_runs_twice_gives_the_same_bits(schedule: str, rest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where ranks are held up at random."""
    reference = subject("gpt2").reference
    plan = subject("gpt2").plan(layout_of(schedule, 2, 2, rest))
    built = lowered(reference, plan, torch.float32)
    whole = reference.step(torch.float32)
    work = Work.of(built.graph, plan, reference.state, reference.batch, torch.float32, reference.seed, whole.gradients)
    first = on_threads(work, built.programs)
    perform = Executor._perform
    draw = random.Random(0)

    def held_up(self: Executor, action: Action) -> None:
        time.sleep(draw.choice([0, 0, 0.001, 0.01]))
        perform(self, action)

    monkeypatch.setattr(Executor, "_perform", held_up)
    for _ in range(2):
        again = on_threads(work, built.programs)
        assert all(torch.equal(one, other) for one, other in zip(bits(first), bits(again), strict=True))


def _trained(plan: Plan, seed: int) -> tuple[list[float], list[Tensor]]:
    """Two steps and the loss before and after, on a rank that is held up at random; its parameters."""
    perform, draw = Executor._perform, random.Random(torch.distributed.get_rank() * 7 + seed)

    def held_up(self: Executor, action: Action) -> None:
        time.sleep(draw.choice([0, 0, 0.002, 0.01]) if seed else 0)
        perform(self, action)

    Executor._perform = held_up  # type: ignore[method-assign]
    model, batch = MODELS["gpt2"]()
    job = sw.parallelize(model, batch, plan=plan, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
    losses = [job.eval(batch), job.step(batch), job.step(batch), job.eval(batch)]
    assert [event.action for event in job.events] == job.program.actions
    return losses, [job.state[part.name].clone() for part in job.program.parameters]


@pytest.mark.distributed
def test_training_and_evaluating_on_processes() -> None:
    """Weights of the first and the last stage are tied; those on one rank stay one tensor."""
    model, batch = MODELS["gpt2"]()
    plan = sw.plan(model, batch, made_up(2), layout_of("zb-v", 2, 4))
    assert isinstance(plan, Plan)
    runs = [launch(_trained, (plan, seed), ranks=2, threads=1) for seed in (0, 1)]
    for calm, delayed in zip(*runs, strict=True):
        assert calm[0] == delayed[0] and all(torch.equal(one, other) for one, other in zip(calm[1], delayed[1], strict=True))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), [model(**batch).loss.item()]
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    losses.append(model(**batch).loss.item())
    assert losses[-1] < losses[0]
    for found, _ in runs[0]:
        assert found == pytest.approx(losses, rel=1e-5)


# -- buffers and microbatches --------------------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One BatchNorm at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.middle = nn.BatchNorm1d(8), nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.middle(self.norm(x))).pow(3).mean()


def twice() -> Example:
    torch.manual_seed(0)
    return Twice().train(), {"x": torch.randn(8, 8)}


def test_a_buffer_that_two_stages_change_needs_one_rank() -> None:
    model = Subject(prepare(*twice()))
    same(model.report(model.plan("dp=1,tp=1,pp=2,microbatches=1")))  # cut where both are on one side
    alone = model.plan("dp=1,tp=1,pp=1,chunks=2,microbatches=1")
    same(model.report(alone))
    keys = [op.key for op in model.reference.graph.ops]
    starts = [keys[0], *(next(key for key in keys if key.startswith(f"middle.{number}:")) for number in (1, 4))]
    last = [key for key in keys if key.startswith("norm:aten.add")][-1]  # which counts the batches
    there = alone.model_copy(update={"ranks": 2, "pp": 2, "schedule": "zb-v", "stages": [*starts, last]})
    same(model.report(there))
    with pytest.raises(
        CheckError, match=r"in stage 3 and read by .* in stage 0, .* not see the change; cut the stages so that one rank has both"
    ):
        model.built(there.model_copy(update={"schedule": "interleaved"}))


def test_microbatches_that_an_edit_must_not_make() -> None:
    plan = subject("unet").plan(layout_of("1f1b", 2, 1))
    with pytest.raises(
        PlanError, match=r"microbatches=2 would change the numbers: the forward pass changes the buffer .*; use microbatches=1"
    ):
        subject("unet").built(plan.model_copy(update={"microbatches": 2}))
