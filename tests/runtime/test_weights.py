"""Every rank's parts are the same ones, bit by bit, from a whole model, from its construction put off, and from files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.clusters import made_up
from tests.models import Example, gpt2, llama, mlp, unet
from torch import Tensor, nn

import shardwise as sw
from shardwise.capture.deferred import defer
from shardwise.capture.export import capture
from shardwise.capture.state import state_of, tensors_of
from shardwise.checkpoint.safetensors import Checkpoint
from shardwise.errors import CaptureError, WeightsError
from shardwise.planner.apply import apply_plan
from shardwise.planner.layout import Layout
from shardwise.program.build import build_programs
from shardwise.program.program import Program
from shardwise.runtime.weights import DeferredWeights, FileWeights, LiveWeights, own_indices, own_part

CPU = torch.device("cpu")


def wide() -> Example:
    """Sizes that 3 and 4 ranks do not divide."""
    return llama(layers=2, hidden=72, samples=6)


CASES: list[tuple[Callable[[], Example], str]] = [
    (llama, "tp=2,pp=2"),
    (wide, "tp=4"),
    (wide, "tp=3"),
    (gpt2, "pp=2"),  # tied over two stages
    (gpt2, "dp=2,tp=2,zero=3"),
    (mlp, "dp=3,zero=3"),
    (llama, "dp=4,zero=3,shard=2"),
    (unet, "tp=2"),
    (unet, "dp=2,zero=1"),
]


def programs_of(model: nn.Module, batch: dict[str, Tensor], layout: str) -> tuple[sw.Plan, dict[int, Program]]:
    plan = sw.plan(model, batch, made_up(Layout.parse(layout).ranks), layout=layout)
    assert isinstance(plan, sw.Plan)
    applied = apply_plan(plan, capture(model, batch))
    return plan, build_programs(applied.assignment, applied.cut, plan.tables, plan.chooser(), device=CPU)


def saved(model: nn.Module, path: Path) -> Path:
    """As a checkpoint has them: tied ones once."""
    state = model.state_dict()
    first = {id_: name for name, id_ in reversed([(name, tensor.data_ptr()) for name, tensor in state.items()])}
    save_file({name: state[name].contiguous() for name in first.values()}, path)
    return path


@pytest.mark.parametrize(("make", "layout"), CASES)
def test_parts_are_the_same_from_everywhere(make: Callable[[], Example], layout: str, tmp_path: Path) -> None:
    model, batch = make()
    _, programs = programs_of(model, batch, layout)
    deferred = defer(make)
    graph = capture(deferred.model, batch)
    live, drawn = LiveWeights(state_of(model, capture(model, batch))), DeferredWeights(deferred, graph.constants)
    files = FileWeights(Checkpoint(saved(model, tmp_path / "w.safetensors")), graph, deferred.model, drawn)
    for program in programs.values():
        parts = [*program.parameters, *program.buffers]
        expected = live.parts(parts, program, CPU)
        for found in (drawn.parts(parts, program, CPU), files.parts(parts, program, CPU)):
            assert set(found) == set(expected)
            for name, tensor in expected.items():
                assert torch.equal(found[name], tensor), (program.rank, name)
                assert found[name].is_contiguous() and found[name].untyped_storage().nbytes() == tensor.nbytes
        for part in parts:
            indices = own_indices(part, program)
            whole = torch.arange(torch.Size(part.shape).numel()).view(part.shape)
            cut = whole
            for dim, index in enumerate(indices):
                cut = cut.index_select(dim, index)
            assert torch.equal(cut, own_part(whole, part, program, CPU)), part.name


class Buffered(nn.Module):
    """A buffer that is saved, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("kept", torch.rand(4))
        self.register_buffer("passing", torch.rand(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x) * self.kept + self.passing).sum()


def test_buffers_come_from_where_they_are(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model, batch = Buffered(), {"x": torch.ones(2, 4)}
    path = saved(model, tmp_path / "w.safetensors")
    deferred = defer(Buffered)
    torch.manual_seed(6)
    graph, others = capture(deferred.model, batch), Buffered()
    files = FileWeights(Checkpoint(path), graph, deferred.model, LiveWeights(tensors_of(others, graph)))
    found = files.whole(graph.buffers)
    assert torch.equal(found["kept"], model.kept) and torch.equal(found["passing"], others.passing)
    with pytest.raises(CaptureError, match=r"passing and 0 more tensors of the model are on the meta device.*function that builds it"):
        FileWeights(Checkpoint(path), graph, deferred.model, LiveWeights(tensors_of(deferred.model, graph))).whole(["passing"])


def changed(tensors: dict[str, Tensor], tmp_path: Path) -> FileWeights:
    model, batch = Buffered(), {"x": torch.ones(2, 4)}
    graph = capture(model, batch)
    state = {name: tensor for name, tensor in {**model.state_dict(), **tensors}.items() if tensor is not None}
    save_file(state, tmp_path / "w.safetensors")
    return FileWeights(Checkpoint(tmp_path), graph, model, LiveWeights(state_of(model, graph)))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"inner.bias": torch.zeros(5)}, r"inner\.bias in .* is float32 \[5\], inner\.bias of the model is float32 \[4\]"),
        ({"inner.bias": torch.zeros(4, dtype=torch.bfloat16)}, r"inner\.bias in .* is bfloat16 \[4\], .* of the model is float32 \[4\]"),
        ({"inner.bias": None, "kept": None}, r"holds 1 tensors that are not those of the model: it lacks inner\.bias, kept;"),
        ({"outer.bias": torch.zeros(4)}, r"holds 4 tensors .*: the model has no outer\.bias"),
        ({"inner.bias": None, "bias": torch.zeros(4)}, r"it lacks inner\.bias and the model has no bias"),
    ],
)
def test_weights_of_another_model_are_refused(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=message):
        changed(tensors, tmp_path)


def test_a_buffer_that_is_not_saved_may_be_there(tmp_path: Path) -> None:
    assert "passing" not in changed({"passing": torch.zeros(4)}, tmp_path).entries


def test_tied_tensors_that_differ_are_refused(tmp_path: Path) -> None:
    model, batch = gpt2(layers=1)
    graph, state = capture(model, batch), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for differs in (False, True):
        state["lm_head.weight"][3, 3] += differs
        save_file(state, tmp_path / "w.safetensors")
        weights = FileWeights(Checkpoint(tmp_path), graph, model, LiveWeights(state_of(model, graph)))
        _, programs = programs_of(model, batch, "tp=2")
        found = [weights, *programs.values()]
        if differs:
            with pytest.raises(
                WeightsError, match=r"transformer\.wte\.weight and lm_head\.weight are one tensor in the model and two unequal"
            ):
                [weights.parts(program.parameters, program, CPU) for program in programs.values()]
        else:
            assert len(found) == 3 and [weights.parts(program.parameters, program, CPU) for program in programs.values()]
