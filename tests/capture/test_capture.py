"""The captured graph is the model: the same loss, gradients and buffer updates; and what cannot be captured is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from tests.models import MODELS, Batch, gpt2, llama, mlp, unet
from torch import Tensor, nn
from torch.nn import functional as F

from shardwise.capture import operators
from shardwise.capture.export import capture
from shardwise.capture.graph import Graph
from shardwise.capture.normalize import RANDOM_STATE
from shardwise.errors import BatchError, CaptureError

TOLERANCE = 1e-10


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def captured(name: str) -> Graph:
    """The graph of a small model, to look at."""
    return capture(*MODELS[name]())


def state_of(model: nn.Module, graph: Graph) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers()), **graph.constants}


def in_double(model: nn.Module, batch: Batch) -> tuple[nn.Module, Batch]:
    return model.double(), {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}


def assert_close(found: Tensor, wanted: Tensor, scale: float, name: str) -> None:
    """By the measure of docs/concepts/numbers.md; `scale` is the norm of all gradients."""
    error = (found - wanted).norm() / max(wanted.norm().item(), 1e-3 * scale)
    assert error <= TOLERANCE, f"{name} is off by {error:.3g}"


def scalar(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.loss


# -- the same numbers --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_graph_equals_the_model(name: str) -> None:
    model, batch = in_double(*MODELS[name]())
    graph = capture(model, batch)
    before = {key: buffer.clone() for key, buffer in model.named_buffers()}
    results = graph.run(state_of(model, graph), batch)
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(results[graph.loss], parameters.values(), allow_unused=True)
    assert all(torch.equal(before[key], buffer) for key, buffer in model.named_buffers()), "the graph changed a buffer in place"

    loss = scalar(model(**batch))
    wanted = torch.autograd.grad(loss, parameters.values(), allow_unused=True)
    scale = torch.stack([gradient.norm() for gradient in wanted if gradient is not None]).norm().item()
    assert_close(results[graph.loss].detach(), loss.detach(), 0.0, "loss")
    for key, mine, eager in zip(parameters, found, wanted, strict=True):
        assert (mine is None) == (eager is None), key
        if mine is not None and eager is not None:
            assert_close(mine, eager, scale, key)
    for key, value in graph.updates.items():
        assert_close(results[value].double(), dict(model.named_buffers())[key].double(), 1.0, key)


def test_every_tensor_is_described_truly() -> None:
    model, batch = gpt2()
    graph = captured("gpt2")
    for name, value in graph.parameters.items():
        parameter = model.get_parameter(name)
        assert (value.shape, value.dtype, value.requires_grad) == (tuple(parameter.shape), parameter.dtype, True)
    for name, value in graph.inputs.items():
        assert (value.shape, value.dtype) == (tuple(batch[name].shape), batch[name].dtype)
    assert graph.loss.shape == () and graph.loss.requires_grad
    assert graph.batch_dims == {"input_ids": 0, "labels": 0} and graph.global_batch == 4


def test_operators_keep_their_level() -> None:
    names = {op.name for op in captured("llama").ops}
    assert {
        "aten.linear.default",
        "aten.scaled_dot_product_attention.default",
        "shardwise.cross_entropy_sum",
        "shardwise.valid_count",
    } <= names


def test_capturing_leaves_the_model_alone() -> None:
    model, batch = unet()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apply = torch.autograd.Function.__dict__["apply"]
    capture(model, batch)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters()) and model.training
    assert torch.autograd.Function.__dict__["apply"] is apply


def test_operators_have_stable_names() -> None:
    first, second = captured("llama"), capture(*llama())
    keys = [op.key for op in first.ops]
    assert len(set(keys)) == len(keys) and keys == [op.key for op in second.ops]
    assert first.fingerprint() == second.fingerprint()
    assert first.fingerprint() != capture(*llama(hidden=32)).fingerprint()
    linear = next(op for op in first.ops if op.module == "model.layers.1.mlp.up_proj")
    assert linear.key == "model.layers.1.mlp.up_proj:aten.linear.default:0"


# -- what a graph tells ------------------------------------------------------------------------------------------------------------------


def test_tied_weights_are_found_once() -> None:
    graph = captured("gpt2")
    assert graph.aliases == {"lm_head.weight": "transformer.wte.weight"}
    assert "lm_head.weight" not in graph.parameters
    readers = [op.name for op, _ in graph.consumers()[graph.parameters["transformer.wte.weight"]]]
    assert sorted(readers) == ["aten.embedding.default", "aten.linear.default"]


def test_buffer_updates_are_found() -> None:
    graph = captured("unet")
    assert set(graph.updates) == {name for name, _ in unet()[0].named_buffers()}
    assert sum(op.target is operators.batch_norm for op in graph.ops) == 5
    assert not captured("llama").updates


def test_repeated_blocks_are_found() -> None:
    (run,) = capture(*llama(layers=3)).blocks
    assert [{op.module.split(".")[2] for op in block} for block in run] == [{"0"}, {"1"}, {"2"}]
    assert [[op.name for op in block] for block in run] == [[op.name for op in run[0]]] * 3


def test_dropout_draws_from_its_own_key() -> None:
    model, batch = gpt2(dropout=0.1)
    graph = capture(model, batch)
    keys = [op.kwargs["key"] for op in graph.ops if op.target in (operators.keyed_dropout, operators.dropped_attention)]
    assert len(keys) == 1 + 3 * 2 and len(set(keys)) == len(keys)

    def loss(step: int) -> float:
        state = torch.tensor([step, 0])
        return graph.run(state_of(model, graph), {**batch, RANDOM_STATE: state})[graph.loss].item()

    assert loss(1) == loss(1) != loss(2)


def test_dropout_drops_its_share() -> None:
    x = torch.ones(200_000, dtype=torch.float64)
    dropped = operators.keyed_dropout(x, torch.tensor([12345, 0]), 0.3, key=1)
    other = operators.keyed_dropout(x, torch.tensor([12345, 0]), 0.3, key=2)
    assert set(dropped.unique().tolist()) == {0.0, 1 / 0.7}
    assert abs((dropped == 0).double().mean().item() - 0.3) < 0.005
    assert abs(((dropped == 0) & (other == 0)).double().mean().item() - 0.09) < 0.005


def test_nothing_is_drawn_without_dropout() -> None:
    assert RANDOM_STATE not in captured("gpt2").inputs
    model, batch = gpt2(dropout=0.1)
    assert RANDOM_STATE not in capture(model.eval(), batch).inputs


def test_frozen_parameters_carry_no_gradient() -> None:
    model, batch = mlp()
    model.net[0].requires_grad_(False)
    graph = capture(model, batch)
    assert [value.requires_grad for value in graph.parameters.values()] == [False] * 2 + [True] * 6
    first = next(op for op in graph.ops if op.module == "net.0")
    assert not first.requires_grad and graph.loss.requires_grad


# -- inputs and outputs ------------------------------------------------------------------------------------------------------------------


def test_one_tensor_under_two_names() -> None:
    model, batch = llama()
    same = {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}
    graph = capture(model, same)
    assert set(graph.inputs) == {"input_ids", "labels"}
    found = graph.run(state_of(model, graph), batch)[graph.loss]
    assert torch.allclose(found, model(**batch).loss)


def test_the_loss_may_be_made_outside() -> None:
    model, batch = mlp()
    graph = capture(model.net, {"input": batch["x"]}, loss=lambda output: output.square().mean())
    found = graph.run(state_of(model.net, graph), {"input": batch["x"]})[graph.loss]
    assert torch.allclose(found, model.net(batch["x"]).square().mean())


def test_an_output_that_is_no_scalar_is_refused() -> None:
    model, batch = mlp()
    with pytest.raises(CaptureError, match=r"Sequential returns a tensor of shape \[8, 10\], not a scalar loss; .* pass loss=callable"):
        capture(model.net, {"input": batch["x"]})
    language, tokens = llama()
    with pytest.raises(CaptureError, match="LlamaForCausalLM returns CausalLMOutputWithPast, not a scalar loss; put labels into the batch"):
        capture(language, {"input_ids": tokens["input_ids"]})


def test_a_loss_without_gradient_is_refused() -> None:
    model, batch = mlp()
    with pytest.raises(CaptureError, match="depends on no parameter"):
        capture(model.requires_grad_(False), batch)


def test_inputs_must_agree_on_the_number_of_samples() -> None:
    model, batch = mlp()
    with pytest.raises(BatchError, match=r"differ in their number of samples: \{'x': 8, 'y': 6\}.*batch_dims"):
        capture(model, {"x": batch["x"], "y": batch["y"][:6]})
    with pytest.raises(BatchError, match=r"batch_dims names \['z'\], which the batch does not hold; it holds \['x', 'y'\]"):
        capture(model, batch, batch_dims={"z": 1})
    assert capture(model, batch, batch_dims={"y": None}).batch_dims == {"x": 0}


class Masked(nn.Module):
    """A soft-capped product, its mask made of a buffer that is a constant of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0, 0.0]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = (x.abs().amax() + 1) * torch.tensor([2.0, 1.0, 2.0, 1.0])
        return F.softplus(self.linear(x) * scale * self.mask).mean()


def test_regions_without_gradient_and_constants() -> None:
    torch.manual_seed(0)
    model, batch = in_double(Masked(), {"x": torch.randn(3, 4)})
    graph = capture(model, batch)
    assert len(graph.constants) == 1
    assert all(not op.requires_grad for op in graph.ops if op.name == "aten.amax.default")
    found = graph.run(state_of(model, graph), batch)[graph.loss]
    assert torch.allclose(found, model(**batch))


# -- without memory ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_model_on_the_meta_device(name: str) -> None:
    model, batch = MODELS[name]()
    empty = model.to("meta")
    if hasattr(empty, "tie_weights"):
        empty.tie_weights()  # `to("meta")` unties
    described = capture(empty, {key: tensor.to("meta") for key, tensor in batch.items()})
    assert described.fingerprint() == captured(name).fingerprint()


_HUGE = """
import json, os, time
import psutil, torch
from transformers import LlamaConfig, LlamaForCausalLM
from shardwise.capture.export import capture

config = LlamaConfig(vocab_size=128256, hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
                     num_key_value_heads=8, use_cache=False)
with torch.device("meta"):
    model = LlamaForCausalLM(config).train()
    tokens = torch.zeros(8, 4096, dtype=torch.int64)
before, start = psutil.Process().memory_info().rss, time.monotonic()
graph = capture(model, {"input_ids": tokens, "labels": tokens})
numel = sum(value.numel for value in graph.parameters.values())
used = psutil.Process().memory_info().rss - before
print(json.dumps({"bytes": used, "s": time.monotonic() - start, "numel": numel, "blocks": [len(run) for run in graph.blocks]}))
"""


@pytest.mark.slow
def test_a_405b_model_needs_little_memory() -> None:
    done = subprocess.run([sys.executable, "-c", _HUGE], capture_output=True, text=True, timeout=110, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert 400e9 < found["numel"] < 410e9
    assert found["blocks"] == [126]
    assert found["bytes"] < 2**30, f"capturing took {found['bytes'] / 2**20:.0f} MiB and {found['s']:.1f} s"
