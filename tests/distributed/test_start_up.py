"""`parallelize` with a function that builds the model, and with weights in files, on real ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.clusters import made_up
from tests.models import llama
from torch import Tensor, nn
from typer.testing import CliRunner

import shardwise as sw
from shardwise.cli import app
from shardwise.errors import CaptureError, ShardwiseWarning
from shardwise.runtime.launch import launch

pytestmark = pytest.mark.distributed


def build() -> nn.Module:
    return llama(layers=1)[0]


def adamw(named: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter for _, parameter in named], lr=1e-2)


Begun = tuple[dict[str, Tensor], list[float], Tensor]


def three_ways(plan: sw.Plan, path: Path) -> list[Begun]:
    """(parts at the start, losses of three steps, torch's generator) of a model, of its function, and of files."""
    batch, found = llama(layers=1)[1], []
    for model, weights in ((build(), None), (build, None), (build, path)):
        job = sw.parallelize(model, batch, plan=plan, optimizer=adamw, weights=weights)  # type: ignore[arg-type]
        parts, after = {name: tensor.clone() for name, tensor in job.state.items()}, torch.get_rng_state()
        found.append((parts, [job.step(batch) for _ in range(3)], after))
    return found


def test_three_ways_to_begin_are_one(tmp_path: Path) -> None:
    model, batch = llama(layers=1)
    plan = sw.plan(model, batch, made_up(2), layout="dp=2,zero=3")
    assert isinstance(plan, sw.Plan)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for live, drawn, read in launch(three_ways, (plan, tmp_path), ranks=2, threads=1):
        assert torch.equal(drawn[2], live[2]), "the generator is where an ordinary construction leaves it"
        for other in (drawn, read):
            assert set(live[0]) == set(other[0])
            assert all(torch.equal(other[0][name], tensor) for name, tensor in live[0].items())
            assert other[1] == live[1]


class Asks(nn.Module):
    """What it does depends on values that training changes: capturing it takes a run."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.clipped = nn.Linear(4, 4), Clipped()

    def forward(self, x: Tensor) -> Tensor:
        return self.clipped(self.inner(x)).sum()


class Clipped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        norm = x.norm()
        return x if norm < 8 else x * (8 / norm)


def begin(model: Any, plan: sw.Plan) -> tuple[str, list[float]]:
    """What is warned of, and losses."""
    batch, warned = {"x": torch.ones(2, 4)}, ""
    torch.manual_seed(2)
    if isinstance(model, nn.Module):
        job = sw.parallelize(model, batch, plan=plan, optimizer=adamw)
    else:
        with pytest.warns(ShardwiseWarning) as caught:
            job = sw.parallelize(model, batch, plan=plan, optimizer=adamw)
        warned = str(caught[0].message)
    return warned, [job.step(batch) for _ in range(2)]


def test_a_model_that_takes_a_run_is_built_whole_with_a_warning() -> None:
    torch.manual_seed(2)
    model = Asks()
    plan = sw.plan(model, {"x": torch.ones(2, 4)}, made_up(1), layout="dp=1")
    (warned, losses), (_, expected) = (launch(begin, (each, plan), ranks=1, threads=1)[0] for each in (Asks, model))
    assert losses == expected
    assert "builds the model whole before it takes its part" in warned and "cannot be captured from shapes alone" in warned


def without_values(plan: sw.Plan) -> str:
    model, batch = llama(layers=1)
    with pytest.raises(CaptureError) as caught:
        sw.parallelize(model.to("meta"), batch, plan=plan, optimizer=adamw)
    return str(caught.value)


def test_a_model_without_values_is_refused_with_the_ways_out() -> None:
    plan = sw.plan(*llama(layers=1), made_up(1), layout="dp=1")
    (message,) = launch(without_values, (plan,), ranks=1, threads=1)
    assert "are on the meta device" in message and "the function that builds it, or files with `weights=`" in message


def test_the_command_begins_with_weights(tmp_path: Path) -> None:
    configuration = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    (tmp_path / "config.json").write_text(json.dumps(configuration))
    from shardwise.models import load_model

    model, _ = load_model(f"hf:{tmp_path}/config.json", seed=3)
    plan = sw.plan(*load_model(f"hf:{tmp_path}/config.json", sequence=16, device="meta"), made_up(2), layout="tp=2")
    assert isinstance(plan, sw.Plan)
    plan.save(tmp_path / "plan.json")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    command = ["train", "--model", f"hf:{tmp_path}/config.json", "--plan", str(tmp_path / "plan.json"), "--sequence", "16", "--steps", "2"]
    first = []
    for more in (["--weights", str(tmp_path)], ["--seed", "3"], ["--seed", "0"]):
        done = CliRunner().invoke(app, [*command, *more, "--out", str(tmp_path / "out"), "--json"])
        assert done.exit_code == 0, done.output
        first.append(json.loads(done.stdout)["held_out_loss_before"])
    assert first[0] == first[1] != first[2]
