"""A plan file beside options that say otherwise: refused, with both words; beside options that say the same: taken."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.clusters import made_up
from tests.models import mlp
from typer.testing import CliRunner

import shardwise as sw
from shardwise.asked import Asked
from shardwise.cli import app
from shardwise.errors import PlanError

TOML = """
name = "{name}"
ranks = 2
memory_gb = 8
backend = "gloo"

[rates]
matmul_flops = 1e11
memory_bytes_per_s = 1e10

[link]
latency_s = 1e-5
bytes_per_s = 1e9
"""


@pytest.fixture(scope="module")
def plan() -> sw.Plan:
    model, batch = mlp()
    found = sw.plan(model, batch, cluster=made_up(2), layout="dp=2,microbatches=1")
    assert isinstance(found, sw.Plan)
    return found.model_copy(update={"cluster": "local:2"})


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Asked(cluster="local:4"), "p.json is for the cluster local:2, --cluster says local:4: leave the option out, or leave --plan out"),
        (Asked(cluster="h100:1x8"), "p.json is for the cluster local:2, --cluster says h100:1x8"),
        (Asked(layout="tp=2"), "p.json says tp=1, --layout says tp=2"),
        (Asked(layout="dp=2,microbatches=2"), "p.json says microbatches=1, --layout says microbatches=2"),
        (Asked(layout="schedule=gpipe"), "p.json says schedule=1f1b, --layout says schedule=gpipe"),
        (Asked(layout="cp=2"), "p.json says cp=1, --layout says cp=2"),
        (Asked(global_batch=3), r"p.json is for a global batch of \d+, --global-batch says 3"),
        (Asked(random="fast"), "p.json says random='keyed', --random says fast"),
    ],
)
def test_a_contradiction_is_named(plan: sw.Plan, asked: Asked, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        asked.check(plan, Path("p.json"))


@pytest.mark.parametrize(
    "asked", [Asked(), Asked(cluster="local:2"), Asked(layout="dp=2"), Asked(layout="dp=2,tp=1,pp=1,schedule=1f1b"), Asked(random="keyed")]
)
def test_what_agrees_is_taken(plan: sw.Plan, asked: Asked) -> None:
    asked.check(plan, Path("p.json"))


def test_a_cluster_file_is_known_by_its_name(plan: sw.Plan, tmp_path: Path) -> None:
    path = tmp_path / "two.toml"
    path.write_text(TOML.format(name="two rooms"))
    Asked(cluster=str(path)).check(plan.model_copy(update={"cluster": "two rooms"}), Path("p.json"))
    with pytest.raises(PlanError, match="is for the cluster local:2, --cluster says two rooms"):
        Asked(cluster=str(path)).check(plan, Path("p.json"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cluster", "local:4"], "is for the cluster local:2, --cluster says local:4"),
        (["--layout", "tp=2"], "says tp=1, --layout says tp=2"),
        (["--model", "x.py:f"], "--model has no effect beside --plan"),
        (["--sequence", "8"], "--sequence has no effect beside --plan"),
    ],
)
def test_simulate_refuses(plan: sw.Plan, tmp_path: Path, options: list[str], message: str) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    arguments = ["simulate", "--plan", str(path), "--out", str(tmp_path / "trace.json")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    result = CliRunner().invoke(app, [*arguments, *options])
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cluster", "local:4"], "is for the cluster local:2, --cluster says local:4"),
        (["--layout", "pp=2"], "says pp=1, --layout says pp=2"),
        (["--precision", "bf16"], "says precision='float32', --precision says bf16"),
    ],
)
def test_train_refuses_before_a_rank_starts(plan: sw.Plan, tmp_path: Path, options: list[str], message: str) -> None:
    path, model = tmp_path / "plan.json", tmp_path / "asked_model.py"
    plan.save(path)
    model.write_text(
        "import torch\n\ndef model():\n    tokens = torch.zeros(4, 8, dtype=torch.int64)\n"
        '    return torch.nn.Embedding(256, 2), {"input_ids": tokens, "labels": tokens}\n'
    )
    arguments = ["train", "--model", f"{model}:model", "--plan", str(path), "--out", str(tmp_path / "out"), *options]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()
