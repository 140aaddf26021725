from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shardwise.cluster import machine
from shardwise.cluster.described import read_machine
from shardwise.cluster.model import Cluster
from shardwise.errors import ClusterError

FILE = """
ranks = 4
memory_gb = 80
[rates]
matmul_flops = { float32 = 60e12, bfloat16 = 190e12 }
memory_bytes_per_s = 1.4e12
[link]
latency_s = 1e-5
bytes_per_s = 200e9
"""


def _written(directory: Path, text: str) -> Path:
    path = directory / "box.toml"
    path.write_text(text)
    return path


def test_described_machine_needs_no_measurement(tmp_path: Path) -> None:
    cluster = Cluster.parse(_written(tmp_path, FILE))
    assert (cluster.name, cluster.ranks, cluster.backend, cluster.cores) == ("box", 4, "nccl", None)
    assert cluster.memory_bytes == 80_000_000_000
    assert cluster.threads_per_rank == 1
    assert cluster.rates.matmul_of("bfloat16").flops_per_s(4096, 4096, 4096) == 190e12
    assert cluster.rates.matmul_of("float16").flops_per_s(4096, 4096, 4096) == 60e12
    assert [device.memory_bytes for device in cluster.devices] == [80_000_000_000] * 4
    assert Cluster.parse(cluster) is cluster
    assert Cluster.parse(str(tmp_path / "box.toml")) == cluster


def test_described_ring(tmp_path: Path) -> None:
    """All-reduce of a ring of 4: 6 steps, 6/4 of the message over each link."""
    rates = read_machine(_written(tmp_path, FILE)).described_rates()
    ring = next(rate for rate in rates.collectives if (rate.kind, rate.ranks) == ("all_reduce", 4))
    assert ring.seconds_for(4e9) == pytest.approx(6e-5 + 1.5 * 4e9 / 200e9)
    assert {rate.ranks for rate in rates.collectives} == {2, 4}


def test_speeds_given_later_are_those_of_a_file(tmp_path: Path) -> None:
    with_speeds = FILE.replace("[link]", "speeds = [1, 1, 2, 0.5]\n[link]")
    told = Cluster.parse(_written(tmp_path, with_speeds))
    assert Cluster.parse(_written(tmp_path, FILE)).with_speeds([1, 1, 2, 0.5]) == told


@pytest.mark.parametrize(
    ("speeds", "cores", "said"),
    [
        ([1, 0.5], None, r"cluster box: 4 ranks want as many positive speeds, not \[1, 0.5\]"),
        ([1, 1, 1, 0], None, r"4 ranks want as many positive speeds, not \[1, 1, 1, 0\]"),
        ([1, 1, 1, 0.5], 2, "cluster box: 4 ranks share 2 cores, so none has its own speed; take fewer"),
    ],
)
def test_speeds_that_no_rank_can_have(tmp_path: Path, speeds: list[float], cores: int | None, said: str) -> None:
    cluster = replace(Cluster.parse(_written(tmp_path, FILE)), cores=cores)
    with pytest.raises(ClusterError, match=said):
        cluster.with_speeds(speeds)


def test_devices_of_the_catalog_have_their_speeds() -> None:
    with pytest.raises(ClusterError, match="cluster h100:8: its devices are of the catalog; give others there"):
        Cluster.parse("h100:8").with_speeds([1] * 8)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("ranks = 4", "", "key 'ranks' is missing"),
        ("ranks = 4", "ranks = 0", "key 'ranks' is 0: .* greater than or equal to 1"),
        ("ranks = 4", "ranks = 4\ncolour = 1", "key 'colour' is unknown; known are name, ranks, memory_gb"),
        ("latency_s", "latency_ms", "key 'link.latency_s' is missing; key 'link.latency_ms' is unknown; known are latency_s, bytes_per_s"),
        ("1.4e12", '"fast"', "key 'rates.memory_bytes_per_s' is 'fast'"),
        ("ranks = 4", "ranks = ", "cannot be read as TOML"),
        ("ranks = 4", 'ranks = 4\nbackend = "mpi"', "key 'backend' is 'mpi'"),
    ],
)
def test_wrong_files(tmp_path: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(ClusterError, match=said):
        Cluster.parse(_written(tmp_path, FILE.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("local:0", "'0' is not a number of ranks; give 1 or more"),
        ("local:x", "'x' is not a number of ranks"),
        ("local:-2", "'-2' is not a number of ranks"),
        ("local:", "'' is not a number of ranks"),
        ("local:²", "'²' is not a number of ranks"),
        ("", "cluster '' is not understood: accepted are a Cluster, \"local:N\""),
        ("h1000:2x8", "h100"),
        ("nowhere.toml", "cluster file nowhere.toml does not exist"),
    ],
)
def test_wrong_specifications(spec: str, said: str) -> None:
    with pytest.raises(ClusterError, match=said):
        Cluster.parse(spec)


def test_local_shares_memory_and_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = read_machine(_written(tmp_path, FILE)).described_rates()
    asked: list[tuple[int, bool]] = []
    monkeypatch.setattr("shardwise.cluster.probe.local_rates", lambda ranks, refresh: asked.append((ranks, refresh)) or rates)
    monkeypatch.setattr("shardwise.cluster.model.available_memory_bytes", lambda: 40_000)
    monkeypatch.setattr("shardwise.cluster.model.available_cores", lambda: 8)
    cluster = Cluster.parse("local:4", refresh=True)
    assert asked == [(4, True)]
    assert (cluster.ranks, cluster.memory_bytes, cluster.cores, cluster.threads_per_rank) == (4, 10_000, 8, 2)


def test_this_machine_says_what_it_is() -> None:
    assert machine.available_cores() >= 1
    assert machine.available_memory_bytes() > 1 << 20
    assert machine.processor_name()
    assert machine.processor_name() == machine.processor_name()


def test_a_container_limits_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    whole = machine.available_memory_bytes()
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert machine.available_memory_bytes() == 3000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available_memory_bytes() > min(whole, 1 << 20)
