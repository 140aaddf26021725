"""What collectives take on the links between nodes, against the bytes that each message of them carries out of its node."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.clusters import made_up

from shardwise.cluster.model import Cluster
from shardwise.cluster.network import Network
from shardwise.cost.collectives import collective_seconds
from shardwise.cost.network import network_seconds, sent_seconds
from shardwise.errors import ClusterError
from shardwise.simulate.profile import Profile, StageProfile
from shardwise.simulate.simulator import Mesh, simulate_profile


def ring(ranks: list[int], nbytes: float, rounds: int) -> list[tuple[int, int, float]]:
    """Messages (from, to, bytes): in each of n - 1 steps everybody passes 1/n on."""
    n = len(ranks)
    return [(ranks[i], ranks[(i + 1) % n], nbytes / n) for _ in range(rounds * (n - 1)) for i in range(n)]


def pairs(ranks: list[int], nbytes: float, rounds: int) -> list[tuple[int, int, float]]:
    """Everybody sends 1/n to everybody."""
    return [(one, other, nbytes / len(ranks)) for _ in range(rounds) for one in ranks for other in ranks if one != other]


MESSAGES = {
    ("all_reduce", "native"): lambda ranks, nbytes: ring(ranks, nbytes, 2),
    ("all_reduce", "exchange"): lambda ranks, nbytes: pairs(ranks, 2 * nbytes if len(ranks) == 2 else nbytes, 1 if len(ranks) == 2 else 2),
    ("all_gather", "native"): lambda ranks, nbytes: ring(ranks, nbytes, 1),
    ("all_gather", "exchange"): lambda ranks, nbytes: pairs(ranks, nbytes, 1),
    ("all_gather", "all_reduce"): lambda ranks, nbytes: ring(ranks, nbytes, 2),
    ("reduce_scatter", "native"): lambda ranks, nbytes: ring(ranks, nbytes, 1),
    ("reduce_scatter", "exchange"): lambda ranks, nbytes: pairs(ranks, nbytes, 1),
    ("reduce_scatter", "all_reduce"): lambda ranks, nbytes: ring(ranks, nbytes, 2),
    ("all_to_all", "exchange"): lambda ranks, nbytes: pairs(ranks, nbytes, 1),
}


@pytest.mark.parametrize(("kind", "impl"), MESSAGES)
@pytest.mark.parametrize(("nodes", "node_ranks"), [(2, 2), (2, 4), (4, 2), (2, 1)])
def test_the_busiest_node_sends_what_its_messages_carry(kind: str, impl: str, nodes: int, node_ranks: int) -> None:
    network, total, nbytes = Network(node_ranks=node_ranks, latency_s=0.0, bytes_per_s=1e9), nodes * node_ranks, 1e8
    for size in (each for each in (2, 4, 8) if total % each == 0):
        for stride in (each for each in (1, 2, 4) if total % (each * size) == 0):
            sent = [0.0] * nodes
            for block in range(0, total, size * stride):
                for first in range(block, block + stride):
                    for source, target, part in MESSAGES[kind, impl](list(range(first, first + size * stride, stride)), nbytes):
                        if network.node(source) != network.node(target):
                            sent[network.node(source)] += part
            found = network_seconds(kind, impl, nbytes, size, stride, network)
            assert found == pytest.approx(max(sent) / 1e9), (size, stride)


def test_latency_counts_messages_in_turn() -> None:
    network = Network(node_ranks=2, latency_s=1e-3, bytes_per_s=1e12)
    assert network_seconds("all_reduce", "native", 0, 4, 1, network) == pytest.approx(6e-3)
    assert network_seconds("all_reduce", "exchange", 0, 2, 2, network) == pytest.approx(1e-3)
    assert network_seconds("all_reduce", "native", 0, 2, 1, network) == 0.0, "inside a node"
    assert sent_seconds(1e9, 2, network) == pytest.approx(1e-3 + 2e-3)


FILE = """
ranks = 4
nodes = 2
memory_gb = 4
backend = "gloo"
cores = 2
[rates]
matmul_flops = 50e9
memory_bytes_per_s = 10e9
[link]
latency_s = 50e-6
bytes_per_s = 1e9
[network]
latency_s = 200e-6
bytes_per_s = 1e8
"""


def parsed(tmp_path: Path, text: str) -> Cluster:
    (tmp_path / "c.toml").write_text(text)
    return Cluster.parse(tmp_path / "c.toml")


def test_a_file_with_nodes_costs_what_crosses_them(tmp_path: Path) -> None:
    cluster = parsed(tmp_path, FILE)
    assert cluster.network == Network(node_ranks=2, latency_s=200e-6, bytes_per_s=1e8)
    inside, across = (collective_seconds("all_reduce", "native", 1e7, 2, cluster, stride) for stride in (1, 2))
    assert inside == pytest.approx(1e7 / 1e9, rel=0.05)
    assert across == pytest.approx(2 * 1e7 / 1e8, rel=0.05), "two pairs share the link"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("nodes = 2", "nodes = 3"), "nodes = 3 do not divide ranks = 4"),
        (("nodes = 2", ""), r"nodes = 1 need no \[network\]"),
        (("[network]\nlatency_s = 200e-6\nbytes_per_s = 1e8", ""), r"nodes = 2 want \[network\]"),
        (("memory_gb = 4", ""), r"key 'memory_gb' is missing; the file says memory_gb, \[rates\] and \[link\], or like"),
        (("memory_gb = 4", 'memory_gb = 4\nlike = "local:4"'), "like = 'local:4' and 'memory_gb' say the same; leave one out"),
        (("memory_gb = 4", 'like = "h100"'), "'like'"),
    ],
)
def test_what_contradicts_itself_is_refused(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=message):
        parsed(tmp_path, FILE.replace(*change))


def test_ranks_like_measured_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shardwise.cluster import model

    measured = made_up(2, cores=2)
    monkeypatch.setattr(model, "_local", lambda spec, refresh: measured)
    text = 'ranks = 8\nnodes = 4\nlike = "local:2"\n[network]\nlatency_s = 1e-4\nbytes_per_s = 1e8\n'
    cluster = parsed(tmp_path, text)
    assert (cluster.ranks, cluster.cores, cluster.memory_bytes, cluster.rates) == (8, 8, measured.memory_bytes, measured.rates)
    assert cluster.network is not None and cluster.network.node_ranks == 2


@pytest.mark.parametrize(("nodes", "expected_s"), [(1, 4.0), (2, 8.0)])
def test_ranks_share_the_cores_of_their_own_node(nodes: int, expected_s: float) -> None:
    """Two stages of two ranks, one microbatch; two cores. While the first stage computes, the other node's core is idle."""
    stage = StageProfile(seconds={"forward": (1.0, 0.0), "backward": (1.0, 0.0)}, memory={})
    edges = [{"name": "x", "source": 0, "target": 1, "nbytes": 8, "transfer_s": 0.0, "requires_grad": True}]
    profile = Profile.model_validate({"stages": [stage, stage], "edges": edges, "cores": 2, "nodes": nodes})
    mesh = Mesh(dp=2, tp=1, pp=2, microbatches=1, schedule="1f1b")
    assert simulate_profile(profile, mesh).step_time_s == pytest.approx(expected_s)
