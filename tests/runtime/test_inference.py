"""Eval mode on the ranks that train: the loss and everything that the model returns, as on one device. Ranks are threads here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tests.clusters import made_up
from tests.models import Example, bert, gpt2, llama, unet, vit
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import shardwise as sw
from shardwise.capture.export import capture, capture_inference, loss_of
from shardwise.capture.state import state_of
from shardwise.errors import PlanError
from shardwise.planner.apply import apply_plan
from shardwise.planner.inference import apply_to_inference
from shardwise.planner.layout import Layout
from shardwise.program.build import build_programs
from shardwise.runtime.in_process import run_ranks
from shardwise.runtime.inference import Inference
from shardwise.runtime.job import step_key
from shardwise.runtime.transport import Transport
from shardwise.runtime.weights import own_part

CPU = torch.device("cpu")
LAYOUTS = [
    "dp=2,microbatches=1",
    "dp=2,microbatches=2",
    "tp=2",
    "pp=2,microbatches=2",
    "dp=2,tp=2,microbatches=1",
    "tp=2,pp=2,microbatches=4",
    "dp=2,pp=2,microbatches=2",
    "pp=2,schedule=zb-v,microbatches=4",
    "dp=2,zero=1,microbatches=1",
    "dp=2,zero=2,microbatches=2",
    "dp=2,zero=3,microbatches=1",
    "dp=2,tp=2,zero=3,microbatches=2",
    "dp=4,zero=3,shard=2,microbatches=1",
    "shares=3:1,tp=1,pp=1,microbatches=2",
]


def answered(example: Example, layout: str, inputs: dict[str, Any], wanted: Callable[[Any], Any] | None = None) -> list[Any]:
    """What each rank returns."""
    model, batch = example
    plan = sw.plan(model, batch, made_up(Layout.parse(layout).ranks), layout)
    assert isinstance(plan, sw.Plan), str(plan)
    trained = apply_plan(plan, graph := capture(model, batch))
    model.eval()
    inferring, structure = capture_inference(model, inputs, wanted=wanted, changing=graph.updates)
    state = state_of(model, inferring)
    model.train()
    found = apply_to_inference(plan, inferring, trained)
    for name, value in inferring.parameters.items():
        held, kept = (each.produced(of) for each, of in ((found.applied.assignment, value), (trained.assignment, graph.parameters[name])))
        assert held == kept, f"{name} is not where training keeps it"
    programs = build_programs(found.applied.assignment, found.applied.cut, found.tables, plan.chooser(), device=CPU)
    assert len(programs) == plan.ranks

    def rank(number: int, transport: Transport) -> Any:
        program = programs[number]
        own = {part.name: own_part(state[part.name], part, program, CPU) for part in (*program.parameters, *program.buffers)}
        inference = Inference.of(found, program, own, transport, plan.chooser(), CPU)
        parts = {name: inference.part(value, inputs[name]) for name, value in inferring.inputs.items() if not name.startswith("__")}
        return structure.filled(inference.run(parts, step_key(0, 1)))

    return run_ranks(plan.ranks, rank)


def expected(model: nn.Module, inputs: dict[str, Any], wanted: Callable[[Any], Any] | None = None) -> Any:
    model.eval()
    with torch.no_grad():
        output = model(**inputs)
    model.train()
    return output if wanted is None else wanted(output)


def check(example: Example, layout: str, inputs: dict[str, Any], wanted: Callable[[Any], Any] | None = None, bound: float = 1e-10) -> None:
    whole, structure = pytree.tree_flatten(expected(example[0], inputs, wanted))
    for output in answered(example, layout, inputs, wanted):
        leaves, formed = pytree.tree_flatten(output)
        assert formed == structure
        for one, other in zip(leaves, whole, strict=True):
            if isinstance(other, Tensor):
                torch.testing.assert_close(one, other, rtol=bound, atol=bound)
            else:
                assert one == other


class Several(nn.Module):
    """Dropout, BatchNorm, and outputs of all kinds: per sample, of the whole batch, of no sample, of the inputs alone, and no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.5)
        self.second, self.last = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Any]:
        hidden = self.drop(self.norm(self.first(x)).relu())
        scores = self.last(torch.tanh(self.second(hidden)))
        found: dict[str, Any] = {"scores": scores, "pair": [hidden.transpose(0, 1), scores.argmax(1)], "name": "several", "nothing": None}
        found |= {"total": scores.sum(), "weight": self.last.weight, "positive": x > 0, "count": x.shape[1], "again": scores}
        if y is not None:
            found["loss"] = nn.functional.cross_entropy(scores, y)
        return found


def several(samples: int = 8) -> Example:
    torch.manual_seed(0)
    model = Several().double()
    model(torch.randn(64, 6, dtype=torch.float64) * 3 + 1)  # running statistics that are not those of the start
    return model, {"x": torch.randn(samples, 6, dtype=torch.float64), "y": torch.randint(0, 4, (samples,))}


def resized(batch: dict[str, Tensor], samples: int) -> dict[str, Tensor]:
    return {name: value[torch.arange(samples) % len(value)] * (1 if value.dtype == torch.int64 else 1.1) for name, value in batch.items()}


def the_loss(model: nn.Module) -> Callable[[Any], Tensor]:
    return partial(loss_of, loss=None, model=model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_that_a_model_returns(layout: str) -> None:
    model, batch = several()
    if "microbatches=1" not in layout:  # BatchNorm trains with one only
        layout = layout.partition(",microbatches")[0] + ",microbatches=1"
    check((model, batch), layout, {"x": batch["x"]})


@pytest.mark.parametrize("samples", [1, 5, 13])
@pytest.mark.parametrize("layout", ["dp=2,microbatches=1", "dp=2,pp=2,microbatches=1", "dp=2,tp=2,zero=3,microbatches=1"])
def test_a_batch_of_another_size(layout: str, samples: int) -> None:
    """Also of fewer samples than data ranks."""
    model, batch = several()
    check((model, batch), layout, {"x": resized(batch, samples)["x"]})
    check((model, batch), layout, resized(batch, samples), the_loss(model))


LANGUAGE = [
    "tp=2,pp=2,microbatches=4",
    "pp=2,schedule=zb-v,microbatches=4",
    "dp=2,tp=2,zero=3,microbatches=2",
    "dp=2,cp=2,tp=1,microbatches=1",
]


@pytest.mark.parametrize("layout", [*LANGUAGE, "shares=3:1,tp=1,pp=1,microbatches=2"])
def test_loss_and_scores_of_a_language_model(layout: str) -> None:
    """Tied weights, dropout that is off in eval mode, labels that are ignored."""
    model, batch = gpt2(layers=2, samples=8, sequence=16, dropout=0.3)
    check((model, batch), layout, batch, the_loss(model), 1e-5)
    check((model, batch), layout, {"input_ids": batch["input_ids"]}, bound=1e-5)


@pytest.mark.parametrize("make", [bert, vit, unet])
@pytest.mark.parametrize("layout", ["tp=2,pp=2,microbatches=1", "dp=2,microbatches=1"])
def test_families_and_an_incomplete_batch(make: Callable[..., Example], layout: str) -> None:
    model, batch = make(samples=4)
    check((model, batch), layout, resized(batch, 3), the_loss(model), 1e-5)


def test_another_length_of_the_sequence() -> None:
    model, batch = llama(samples=4, sequence=32)
    shorter = {name: value[:, :12] for name, value in batch.items()}
    for layout in ("tp=2,pp=2,microbatches=2", "cp=2,tp=1"):
        check((model, batch), layout, shorter, the_loss(model), 1e-5)


class Other(nn.Module):
    """Eval mode reads at its end what training reads at its beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return (x if self.training else x @ self.layers[0].weight + first).square().mean()


def test_what_training_keeps_elsewhere_is_refused() -> None:
    torch.manual_seed(0)
    example = Other().double(), {"x": torch.randn(4, 8, dtype=torch.float64)}
    check(example, "tp=2", example[1])
    with pytest.raises(PlanError, match=r"reads layers\.0\.weight in stage 1.*in training stage 0 holds it: plan with pp=1"):
        answered(example, "pp=2,microbatches=1", example[1])
