"""`torchrun` on two hosts: network namespaces of this machine, joined by one link."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.hosts import Hosts, why_not
from tests.clusters import made_up
from typer.testing import CliRunner

import shardwise as sw
from shardwise.cli import app
from shardwise.runtime.group import interface_towards

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(300)]

CONFIGURATION = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
CLUSTER = """
name = "two hosts"
ranks = 4
nodes = 2
memory_gb = 4
backend = "gloo"
[rates]
matmul_flops = 50e9
memory_bytes_per_s = 10e9
[link]
latency_s = 50e-6
bytes_per_s = 1e9
[network]
latency_s = 200e-6
bytes_per_s = 125e6
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(reason)
    with Hosts() as made:
        yield made


def test_the_link_has_the_rate_that_was_set(hosts: Hosts) -> None:
    hosts.shape(50e6)
    assert hosts.measured_bytes_per_s(1 << 26) == pytest.approx(50e6, rel=0.1)
    hosts.shape(None)
    assert hosts.measured_bytes_per_s(1 << 28) > 200e6


@pytest.mark.parametrize("layout", ["tp=2,pp=2", "dp=4,zero=3"])
def test_training_on_two_hosts_is_training_on_one(hosts: Hosts, layout: str, tmp_path: Path) -> None:
    """The loop of `shardwise train`, started by torchrun on each host."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGURATION))
    (tmp_path / "two.toml").write_text(CLUSTER)
    (tmp_path / "text.txt").write_bytes(bytes(range(256)) * 100)
    hosts.shape(125e6)
    out = tmp_path / "out"
    command = ["-m", "shardwise", "train", "--model", f"hf:{tmp_path}/config.json", "--data", f"{tmp_path}/text.txt", "--steps", "3"]
    command += ["--sequence", "16", "--cluster", f"{tmp_path}/two.toml", "--layout", layout, "--out", str(out), "--json"]
    done = hosts.finished(hosts.torchrun(2, command, CUDA_VISIBLE_DEVICES=""), timeout_s=250)
    assert [code for code, _ in done] == [0, 0], "\n".join(text for _, text in done)
    found = json.loads((out / "training.json").read_text())
    assert sw.Plan.load(out / "plan.json").cluster == "two hosts"
    assert len(found["memory_bytes"]) == 4
    assert found["losses"] == pytest.approx(one_device(tmp_path), rel=1e-5)


def one_device(folder: Path) -> list[float]:
    """The same steps on one rank of this machine."""
    from shardwise.models import load_model

    plan = sw.plan(*load_model(f"hf:{folder}/config.json", sequence=16, device="meta"), made_up(1), layout="dp=1")
    assert isinstance(plan, sw.Plan)
    plan.save(folder / "one.json")
    command = ["train", "--model", f"hf:{folder}/config.json", "--data", f"{folder}/text.txt", "--steps", "3", "--sequence", "16"]
    done = CliRunner().invoke(app, [*command, "--plan", f"{folder}/one.json", "--out", f"{folder}/one", "--json"])
    assert done.exit_code == 0, done.output
    losses: list[float] = json.loads((folder / "one" / "training.json").read_text())["losses"]
    return losses


def test_a_host_whose_ranks_die_is_named_and_none_waits(hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(
        "import os, sys\n"
        "import torch, torch.distributed as dist\n"
        "from shardwise.runtime.group import join_group\n"
        "join_group(20.0)\n"
        "if dist.get_rank() == 3:\n"
        "    sys.exit('rank 3 has had enough')\n"
        "dist.all_reduce(torch.ones(1))\n"
    )
    done = hosts.finished(hosts.torchrun(2, [str(tmp_path / "rank.py")], port=29511), timeout_s=200)
    assert all(code != 0 for code, _ in done)
    assert "rank 3 has had enough" in done[1][1]


def test_ranks_take_the_interface_that_leads_to_the_first_host(hosts: Hosts) -> None:
    code = "from shardwise.runtime.group import interface_towards as i; import sys; print(i(sys.argv[1]), i('127.0.0.1'))"
    for host in range(2):
        ((_, output),) = hosts.finished([hosts.start(host, [sys.executable, "-c", code, hosts.addresses[0]])], 200)
        assert output.split()[-2:] == [hosts.devices[host], "None"]


def test_nothing_is_left_of_hosts() -> None:
    if reason := why_not():
        pytest.skip(reason)
    names = Path("/run/netns")
    made = Hosts()
    with made:
        sleeper = made.start(0, ["sleep", "60"])
        assert all((names / name).exists() for name in made.names)
    assert sleeper.poll() is not None
    assert not any((names / name).exists() for name in made.names)


def test_this_machine_alone_needs_no_interface() -> None:
    assert interface_towards("127.0.0.1") is None
    assert interface_towards("no.such.host.invalid") is None
