"""What is kept for the backward pass, and what it makes again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.models import gpt2, mlp, unet, vit
from tests.program.support import build, only_stage
from torch import Tensor, fx, nn
from torch.nn import functional as F

from shardwise.capture.export import capture
from shardwise.capture.opaque import OPERATOR
from shardwise.program.joint import JointGraph
from shardwise.program.program import Program
from shardwise.program.recompute import blocks_of
from shardwise.program.trace import Tracer
from shardwise.sharding.collectives import all_reduce_sum
from shardwise.simulate.memory import MemoryUse, memory_use

HIDDEN, SAMPLES, TOKENS, FLOAT = 64, 8, 32, 4
ONE = SAMPLES * TOKENS * HIDDEN * FLOAT  # bytes of what a block is given


def program(layers: int, recompute: str, more: str = "dp=1,tp=1,pp=1,microbatches=1") -> Program:
    return build(gpt2(layers=layers, samples=SAMPLES), f"{more},recompute={recompute}").programs[0]


def use(layers: int, recompute: str) -> MemoryUse:
    return memory_use(program(layers, recompute), "adamw")


def test_a_block_keeps_what_is_promised() -> None:
    """Its input; with products also queries, keys and values, the projection, and the wide layer, 3 + 1 + 4 times as much (the last product
    goes into the sum that the next block is given)."""
    saved = {(layers, kind): use(layers, kind).saved for layers in (2, 3) for kind in ("none", "selective", "full")}
    assert saved[3, "full"] - saved[2, "full"] == ONE
    assert saved[3, "selective"] - saved[2, "selective"] == (1 + 3 + 1 + 4) * ONE
    assert saved[3, "none"] - saved[2, "none"] > 2 * (1 + 3 + 1 + 4) * ONE


def test_one_block_is_made_again_at_a_time() -> None:
    assert use(4, "full").transient == use(2, "full").transient
    assert use(2, "full").transient < use(2, "none").saved
    assert use(4, "selective").total < use(4, "none").total
    assert use(4, "full").total < use(4, "selective").total


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_the_first_blocks_alone(recompute: str) -> None:
    """Each saves as much less, and nothing of the others is made again."""
    saved = [use(4, "none").saved, *(use(4, f"{recompute},recompute_blocks={count}").saved for count in (1, 2, 3, 4))]
    less = {before - after for before, after in pairwise(saved)}
    assert len(less) == 1 and less.pop() > 0 and saved[-1] == use(4, recompute).saved
    programs = build(gpt2(layers=4), f"pp=2,microbatches=1,recompute={recompute},recompute_blocks=1").programs
    for rank, block in ((0, 0), (1, 2)):
        stage = only_stage(programs[rank])
        norms = [node for node in stage.backward.nodes if node.target is torch.ops.aten.native_layer_norm.default]
        assert {node.meta["module"].partition(".ln_")[0] for node in norms} == {f"transformer.h.{block}"}


def test_sums_over_ranks_are_not_made_again() -> None:
    """Neither of products nor, as here, of what was added to them: a residual of which the ranks hold parts."""
    joint = JointGraph(tracer=Tracer(device=torch.device("cpu")))
    x, weight = (joint.placeholder(name, torch.empty(4, 4, device="meta"), grad=True) for name in ("x", "weight"))
    weight.meta["parameter"] = True
    joint.segment = "layer.0"
    (part,) = joint.apply(lambda t: t[0] + t[0] @ t[1], "mm add", [x, weight], grad=True, module="")
    (whole,) = joint.apply(lambda t: all_reduce_sum(t[0], "tp:0,1"), "all_reduce", [part], grad=True, module="")
    (made,) = joint.apply(lambda t: torch.tanh(t[0].exp()), "exp tanh", [whole], grad=True, module="")
    joint.segment = None
    joint.backward([(made, joint.placeholder("seed", torch.empty(4, 4, device="meta"), forward=False))])
    halves = joint.split([made], [joint.cotangents[x]], "selective")
    names = [getattr(node.target, "__name__", "") for node in halves.backward.nodes]
    assert "exp.default" in names and "add.Tensor" not in names
    assert names.count("all_reduce.default") == 1, "of the gradient"
    assert any("all_reduce" in node.name for node in halves.forward.output_node().all_input_nodes[1:])


def test_the_rest_of_the_model_is_kept() -> None:
    """Embedding, last norm and head are in no block."""
    again = Counter(str(node.target) for node in only_stage(program(2, "full")).backward.nodes)
    assert again["aten.addmm.default"] == 2 * 3 + 0, "of each block all products but the last, which nothing needs"
    assert again["aten.embedding.default"] == 0
    assert again["aten.native_layer_norm.default"] == 2 * 2, "not the last one"
    none = Counter(str(node.target) for node in only_stage(program(2, "none")).backward.nodes)
    assert none["aten.addmm.default"] == none["aten.native_layer_norm.default"] == 0
    selective = Counter(str(node.target) for node in only_stage(program(2, "selective")).backward.nodes)
    assert selective["aten.addmm.default"] == 0 and selective["aten.native_layer_norm.default"] == 4


@pytest.mark.parametrize(
    ("example", "blocks"),
    [
        (lambda: vit(layers=2), {"vit.layers.0", "vit.layers.1"}),
        (mlp, {"net"}),
        (unet, {"down1", "down2", "middle", "up2", "open2", "up1", "open1", "head", "pool"}),
    ],
    ids=["a list of layers", "a sequence of single layers is one block", "no list: the model's children"],
)
def test_blocks(example: Any, blocks: set[str]) -> None:
    found = set(blocks_of(capture(*example())).values())
    assert {name.replace("encoder.layer.", "layers.").replace("encoder.layers.", "layers.") for name in found} == blocks


# -- what must not run twice ---------------------------------------------------------------------------------------------------------------


class Noisy(torch.autograd.Function):
    """Draws from torch's own generator: another run would give another result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * torch.rand_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class WithNoise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.norm(Noisy.apply(self.inner(x).tanh())))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(WithNoise() for _ in range(2)), nn.Linear(8, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.mse_loss(self.head(x), y)


def test_kept_code_runs_once_and_its_result_is_kept() -> None:
    torch.manual_seed(0)
    built = build((Stack(), {"x": torch.randn(4, 8), "y": torch.randn(4, 2)}), "dp=1,tp=1,pp=1,microbatches=1,recompute=full")
    stage = only_stage(built.programs[0])
    assert sum(node.target is OPERATOR for node in stage.forward.nodes) == 2
    assert not [node for node in stage.backward.nodes if node.target is OPERATOR]
    again = Counter(str(node.target) for node in stage.backward.nodes)
    assert again["aten.tanh.default"] + again["aten.tanh_.default"] >= 2, "but what is around it is made again"


def test_buffers_are_updated_by_the_forward_pass_alone() -> None:
    stage = only_stage(build(unet(), "dp=1,tp=1,pp=1,microbatches=1,recompute=full").programs[0])
    assert sum(binding.kind == "buffer" for binding in stage.forward_outputs) == 15
    assert all(binding.kind in ("parameter", "edge") for binding in stage.backward_outputs)


# -- gathered parameters -------------------------------------------------------------------------------------------------------------------


def gathered_twice(tensors: Sequence[Tensor]) -> Tensor:
    """Stands for a gather, without ranks."""
    return torch.cat([tensors[0], tensors[0]])


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_what_was_gathered_is_gathered_again(recompute: str) -> None:
    """part [2, 4] → weight [4, 4]; two products of x with it and with its transpose."""
    tracer = Tracer(device=torch.device("cpu"))
    joint = JointGraph(tracer=tracer)
    part = joint.placeholder("part", tracer.tensor((2, 4), torch.float64), grad=True)
    part.meta["parameter"] = True
    x = joint.placeholder("x", tracer.tensor((4, 4), torch.float64), grad=True)
    joint.segment = "layer.0"
    (weight,) = joint.apply(gathered_twice, "gather", [part], grad=True, module="", gathers=True)
    (turned,) = joint.apply(lambda t: t[0].t(), "turn", [weight], grad=True, module="")
    (hidden,) = joint.apply(lambda t: t[0] @ t[1], "mm", [x, weight], grad=True, module="")
    (made,) = joint.apply(lambda t: torch.tanh(t[0] @ t[1]), "mm tanh", [hidden, turned], grad=True, module="")
    joint.segment = None
    seed = joint.placeholder("seed", tracer.tensor((4, 4), torch.float64), forward=False)
    joint.backward([(made, seed)])
    halves = joint.split([made], [joint.cotangents[part], joint.cotangents[x]], recompute)

    kept = {node.name for node in halves.forward.output_node().all_input_nodes[1:]}
    assert not any(
        node.name in kept for node in halves.forward.nodes if node.target in (torch.ops.aten.cat.default, torch.ops.aten.t.default)
    )
    assert sum(node.target is torch.ops.aten.cat.default for node in halves.backward.nodes) == 1

    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(rows, 4, dtype=torch.float64, generator=generator, requires_grad=True) for rows in (2, 4)]
    cotangent = torch.randn(4, 4, dtype=torch.float64, generator=generator)
    whole = gathered_twice(values[:1])
    expected = torch.autograd.grad(torch.tanh(values[1] @ whole @ whole.t()), values, cotangent)
    _, *saved = run(halves.forward, [value.detach() for value in values])
    for mine, right in zip(run(halves.backward, [*saved, cotangent]), expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)


def run(graph: fx.Graph, inputs: Sequence[Tensor]) -> list[Any]:
    with torch.no_grad():
        return list(fx.GraphModule(torch.nn.Module(), graph)(*inputs))
