"""Plans with random="fast": masks from torch's generator, equal where ranks must hold equal values and unlike everywhere else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.clusters import made_up
from torch import Tensor, fx, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import shardwise as sw
from shardwise.capture.export import capture
from shardwise.capture.graph import Graph, Op
from shardwise.capture.state import state_of
from shardwise.cli import app
from shardwise.errors import PlanError, VerifyError
from shardwise.planner.apply import Applied, apply_plan
from shardwise.program.build import build_programs
from shardwise.program.program import Program
from shardwise.runtime.executor import Executor
from shardwise.runtime.gradients import Gradients
from shardwise.runtime.in_process import run_ranks
from shardwise.runtime.job import batch_part, step_key
from shardwise.runtime.transport import Transport
from shardwise.runtime.weights import own_part
from shardwise.sharding.rules.random import FAST

CPU = torch.device("cpu")
LAYOUT = "dp=2,tp=2,microbatches=2"
FAST_OPERATORS = (torch.ops.shardwise.fast_keep.default, torch.ops.shardwise.fast_draw.default)

Model = tuple[nn.Module, dict[str, Tensor]]


class Noisy(nn.Module):
    """Attention and a feed-forward network with dropout in and after both, and one vector of noise for all samples."""

    def __init__(self, probability: float = 0.3) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)
        self.probability = probability

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=self.probability).transpose(1, 2).flatten(-2)
        x = x + F.dropout(self.out(attended), self.probability)
        inner = F.dropout(F.gelu(self.up(x)), self.probability)
        x = x + F.dropout(self.down(inner), self.probability) + 0.1 * torch.rand(64)
        return F.mse_loss(x, y)


def noisy() -> Model:
    torch.manual_seed(0)
    return Noisy(), {"x": torch.randn(8, 16, 64), "y": torch.randn(8, 16, 64)}


def fast_plan(example: Model, layout: str, ranks: int) -> sw.Plan:
    found = sw.plan(*example, made_up(ranks), layout, random="fast")
    assert isinstance(found, sw.Plan)
    return found


class Recorder(fx.Interpreter):
    """Runs a stage's forward graph and keeps what it drew."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(fx.GraphModule(nn.Module(), graph))
        self.drawn: list[list[Tensor]] = []

    def forward(self, inputs: list[Any]) -> list[Any]:
        self.drawn.append([])
        return list(self.run(inputs))

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target in FAST_OPERATORS:
            self.drawn[-1].append(result.clone())
        return result


@dataclass(frozen=True, kw_only=True)
class Ran:
    """One rank's steps. drawn: step → microbatch → random operator → what it drew; losses: what the rank adds to each step's."""

    program: Program
    drawn: list[list[list[Tensor]]]
    losses: list[float]
    state: dict[str, Tensor]
    gradients: dict[str, Tensor]


def run(example: Model, plan: sw.Plan, steps: int, learning_rate: float = 0.0) -> tuple[Graph, Applied, list[Ran]]:
    """The plan on threads, with plain gradient descent."""
    model, batch = example
    graph = capture(model, batch)
    applied = apply_plan(plan, graph)
    programs = build_programs(applied.assignment, applied.cut, plan.tables, plan.chooser(), device=CPU)
    whole = state_of(model, graph)

    def rank(number: int, transport: Transport) -> Ran:
        program = programs[number]
        state = {part.name: own_part(whole[part.name], part, program, CPU).clone() for part in program.parameters}
        gradients = Gradients(program, transport, CPU)
        executor = Executor(program, state, gradients, transport, CPU)
        ((stage, graphs),) = program.stages.items()
        recorder = Recorder(graphs.forward)
        executor.forward = {stage: recorder.forward}

        def update() -> None:
            for name, gradient in gradients.of.items():
                state[name].sub_(gradient, alpha=learning_rate)

        part = batch_part(graph, plan, program, batch, CPU)
        losses = [executor.step(part, step_key(0, step), update) for step in range(1, steps + 1)]
        each = len(recorder.drawn) // steps
        drawn = [recorder.drawn[step * each : (step + 1) * each] for step in range(steps)]
        return Ran(program=program, drawn=drawn, losses=losses, state=state, gradients=dict(gradients.of))

    return graph, applied, run_ranks(plan.ranks, rank)


@pytest.fixture(scope="module")
def ran() -> tuple[Graph, Applied, list[Ran]]:
    """With a dropout and the noise whole on the ranks of the tensor axis, which a plan may say, too."""
    plan = fast_plan(noisy(), LAYOUT, 4)
    keys = [op.key for op in random_operators(capture(*noisy()))]
    whole = dict.fromkeys(keys[-2:], "R")
    return run(noisy(), plan.model_copy(update={"operators": plan.operators | whole}), steps=2)


def random_operators(graph: Graph) -> list[Op]:
    return [op for op in graph.ops if op.target in FAST]


def splits(applied: Applied, op: Op, axis: str) -> bool:
    return applied.assignment.variants[op][axis].choice.mode == "split"


def test_every_kind_of_split_is_there(ran: tuple[Graph, Applied, list[Ran]]) -> None:
    graph, applied, _ = ran
    kinds = {tuple(splits(applied, op, axis) for axis in ("dp", "mb", "tp")) for op in random_operators(graph)}
    assert kinds >= {(True, True, True), (True, True, False), (False, False, False)}


def test_equal_where_values_are_and_unlike_elsewhere(ran: tuple[Graph, Applied, list[Ran]]) -> None:
    graph, applied, ranks = ran
    for number, op in enumerate(random_operators(graph)):
        axes = [axis for axis in ("dp", "tp") if splits(applied, op, axis)]
        parts: dict[tuple[int, ...], Tensor] = {}
        for one in ranks:
            for microbatch, drawn in enumerate(one.drawn[0]):
                place = (*(one.program.coordinates[axis] for axis in axes), *([microbatch] if splits(applied, op, "mb") else []))
                known = parts.setdefault(place, drawn[number])
                assert torch.equal(known, drawn[number]), f"{op.key} at {place}"
        found = list(parts.values())
        assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i]), f"{op.key}: two parts are equal"


def test_each_step_and_operator_draws_anew(ran: tuple[Graph, Applied, list[Ran]]) -> None:
    first, second = ran[2][0].drawn
    assert all(not torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    alike = [each for each in first[0] if each.dtype is torch.bool]
    assert all(not torch.equal(a[:512], b[:512]) for i, a in enumerate(alike) for b in alike[:i])


def test_the_right_share_is_kept(ran: tuple[Graph, Applied, list[Ran]]) -> None:
    for one in ran[2]:
        for keep in (each for step in one.drawn for drawn in step for each in drawn if each.dtype is torch.bool):
            assert abs(float(keep.double().mean()) - 0.7) < 5 * (0.21 / keep.numel()) ** 0.5


class Linear(nn.Module):
    """Linear in its parameters: the loss is the sum of all parameters times their gradients, if both passes see one mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 64)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.layer(x), 0.5).mean()


@pytest.mark.parametrize("layout", ["dp=2,microbatches=2,zero=0", "tp=2"])
def test_forward_and_backward_see_one_mask(layout: str) -> None:
    torch.manual_seed(0)
    example: Model = (Linear(), {"x": torch.randn(8, 16)})
    _, _, ranks = run(example, fast_plan(example, layout, 2), steps=1)
    loss = sum(one.losses[0] for one in ranks if one.program.counts_loss)
    products: dict[tuple[str, int], float] = {}
    for one in ranks:
        for part in one.program.parameters:
            split = any(repr(placement).startswith("S") for placement in part.type.values())
            place = one.program.rank if split else 0
            products[part.name, place] = float((one.state[part.name] * one.gradients[part.name]).sum())
    assert sum(products.values()) == pytest.approx(loss, rel=1e-5) and loss != 0


def test_training_runs_and_the_loss_falls() -> None:
    _, _, ranks = run(noisy(), fast_plan(noisy(), "dp=2,tp=2,microbatches=2", 4), steps=30, learning_rate=0.5)
    losses = [sum(one.losses[step] for one in ranks if one.program.counts_loss) for step in range(30)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


# -- saying so -----------------------------------------------------------------------------------------------------------------------------


def test_a_plan_says_so(tmp_path: Path) -> None:
    plan = fast_plan(noisy(), "tp=2", 2)
    plan.save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["random"] == "fast"
    assert sw.Plan.load(tmp_path / "plan.json") == plan
    assert "Random  fast, from torch's own generator on each rank: 5 operators draw other numbers than one device does" in str(plan)
    keyed = sw.plan(*noisy(), made_up(2), "tp=2")
    assert isinstance(keyed, sw.Plan) and keyed.random == "keyed" and "Random" not in str(keyed)


@pytest.mark.parametrize(
    "refused",
    [
        lambda: sw.plan(*noisy(), made_up(2), "tp=2", random="quick"),  # type: ignore[arg-type]
        lambda: sw.Plan.parse(fast_plan(noisy(), "tp=2", 2).model_dump_json().replace('"fast"', '"quick"')),
    ],
)
def test_other_words_are_refused(refused: Callable[[], object]) -> None:
    with pytest.raises(PlanError, match=r"random.*'keyed' or 'fast'"):
        refused()


def test_verify_refuses_it_where_it_makes_a_difference() -> None:
    with pytest.raises(VerifyError, match=r"random='fast': its random numbers are meant to differ.*random='keyed'"):
        sw.verify(*noisy(), plan=fast_plan(noisy(), "tp=2", 2), processes=False)
    torch.manual_seed(0)
    example: Model = (Noisy(0.0), {"x": torch.randn(4, 16, 64), "y": torch.randn(4, 16, 64)})
    example[0].forward = lambda x, y: F.mse_loss(example[0].out(x), y)
    plan = fast_plan(example, "dp=2", 2)
    assert "the model has no operator that this would make faster" in str(plan)
    report = sw.verify(*example, plan=plan, processes=False)
    assert not isinstance(report, sw.Infeasible) and report.ok


MODEL = """
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.drop, self.head = torch.nn.Embedding(256, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 256)

    def forward(self, input_ids, labels):
        return torch.nn.functional.cross_entropy(self.head(self.drop(self.embed(input_ids))).flatten(0, 1), labels.flatten())


def model_and_batch():
    ids = torch.zeros(4, 16, dtype=torch.long)
    return Net(), {"input_ids": ids, "labels": ids}
"""


def test_the_command_line_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardwise.cluster.model.Cluster.parse", lambda text: made_up(2))
    (tmp_path / "net.py").write_text(MODEL)
    options = ["--model", f"{tmp_path / 'net.py'}:model_and_batch", "--layout", "dp=2"]

    def shardwise(*arguments: str) -> Any:
        return CliRunner().invoke(app, list(arguments))

    made = shardwise("plan", *options, "--random", "fast", "--out", str(tmp_path / "plan.json"))
    assert made.exit_code == 0, made.output
    assert "Random  fast" in made.output and sw.Plan.load(tmp_path / "plan.json").random == "fast"
    against = shardwise("train", *options[:2], "--plan", str(tmp_path / "plan.json"), "--random", "keyed", "--out", str(tmp_path))
    assert against.exit_code == 2 and "random='fast'" in against.output and "--random says keyed" in against.output
