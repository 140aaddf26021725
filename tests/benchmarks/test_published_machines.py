"""Machines of published measurements: the device's usual node, changed by what a row states."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from benchmarks.published_machines import machines_of
from benchmarks.published_rows import GIB, Machine, read_directory

from shardwise.cluster.model import cluster_of
from shardwise.cluster.topology import Machines
from shardwise.errors import ClusterError

TABLES = os.environ.get("SHARDWISE_PUBLISHED")  # a folder of files of published rows; unset: hand-made rows alone


def of(device: str | None, devices: int = 16, **stated: Any) -> Machines:
    """The machines of a row that states this."""
    return machines_of(Machine(device=device, **({"device_text": device or "", "devices": devices} | stated)))


def links(machines: Machines) -> list[tuple[str, int, float]]:
    """(link, ranks, GB/s of one device) of each level, innermost first."""
    return [(level.link.name, level.ranks, level.bytes_per_s / 1e9) for level in machines.levels]


@pytest.mark.parametrize(
    ("device", "inside", "outside"),
    [
        ("v100-32g", ("nvswitch2", 16, 150), ("infiniband-edr", 32, 6.25)),
        ("a100-80g", ("nvswitch3", 8, 300), ("infiniband-hdr", 32, 25)),
        ("h100", ("nvswitch4", 8, 450), ("infiniband-ndr", 32, 50)),
        ("b200", ("nvswitch5", 8, 900), ("infiniband-ndr", 32, 50)),
        ("b300", ("nvswitch5", 8, 900), ("infiniband-xdr", 32, 100)),
        ("mi300x", ("xgmi-mi300x", 8, 448), ("infiniband-ndr", 32, 50)),
    ],
)
def test_what_is_not_stated_is_as_usual(device: str, inside: tuple[str, int, float], outside: tuple[str, int, float]) -> None:
    assert links(of(device, 32)) == [inside, outside]


def test_stated_rates_are_those_of_one_device() -> None:
    slow = of("a100-80g", node_devices=8, inter_bytes_per_s=6.25e9, inter_text="4 Omni-Path 100 Gb/s links per node")
    assert links(slow) == [("nvswitch3", 8, 300), ("infiniband-edr", 16, 6.25)]
    throttled = of("h100", node_devices=8, intra_bytes_per_s=200e9, intra_text="NVLink 400 GB/s")
    assert links(throttled)[0] == ("nvswitch4-200", 8, 200)
    assert links(of("a100-80g", intra_bytes_per_s=300e9))[0][0] == "nvswitch3"


@pytest.mark.parametrize(
    ("device", "words", "name"),
    [
        ("a100-80g", "1600 Gb/s node-node RoCE", "roce-200"),
        ("h100", "RoCE", "roce-400"),
        ("h100", "8x200 Gb/s GPUDirect-TCPX", "ethernet-100"),
        ("h100", "EFA 3200 Gb/s", "efa-400"),
        ("h100", "400 Gb/s RDMA per GPU", "infiniband-ndr"),
        ("a100-80g", "HDR InfiniBand", "infiniband-hdr"),
    ],
)
def test_a_network_is_of_the_kind_in_the_words(device: str, words: str, name: str) -> None:
    assert links(of(device, inter_text=words, inter_bytes_per_s=25e9))[1] == (name, 16, 25)


@pytest.mark.parametrize(
    ("device", "node", "intra", "link"),
    [
        ("v100-16g", 8, "", "nvlink2"),  # DGX-1
        ("a100-40g", 4, "", "nvlink3"),
        ("h100", 4, "", "nvlink4"),
        ("a100-80g", 8, "PCIe Gen4 32 GB/s", "pcie4"),
        ("h100", 8, "NVLink", "nvswitch4"),
    ],
)
def test_other_nodes_have_other_links(device: str, node: int, intra: str, link: str) -> None:
    assert links(of(device, node_devices=node, island_devices=node, intra_text=intra))[0][:2] == (link, node)


@pytest.mark.parametrize(
    ("devices", "shape"),
    [(1, (1, 1)), (4, (1, 4)), (7, (1, 7)), (8, (1, 8)), (24, (3, 8)), (20, (5, 4)), (9, (9, 1)), (2520, (315, 8))],
)
def test_any_number_of_devices(devices: int, shape: tuple[int, int]) -> None:
    machines = of("a100-80g", devices, node_devices=8, island_devices=8)
    assert (machines.nodes, machines.groups[0].per_node) == shape
    assert machines.ranks == cluster_of(machines).ranks == devices


@pytest.mark.parametrize(("devices", "shape"), [(72, (1, 72)), (144, (2, 72)), (128, (2, 64)), (96, (2, 48)), (8, (1, 8))])
def test_a_rack_is_a_node(devices: int, shape: tuple[int, int]) -> None:
    machines = of("gb200", devices, node_devices=4, island_devices=72)
    assert (machines.nodes, machines.groups[0].per_node) == shape


def test_tpu_slices_are_tori() -> None:
    machines = of("tpu-v4", 384, island_devices=192)
    assert [level.torus for level in machines.levels] == [(4, 6, 8), None]
    assert links(machines) == [("ici-v4", 192, 300), ("tpu-dcn", 384, 6.25)]
    assert [level.torus for level in of("tpu-v5e", 256, island_devices=256).levels] == [(16, 16)]


def test_a_device_with_another_memory_is_like_its_chip() -> None:
    text = "H100 SXM-like, 96GB HBM2e 2.4 TB/s, 500 W limit"
    machines = of("h100-96g", device_text=text, node_devices=8, memory_bytes=96 * GIB, peak_flops=(("bf16", 800e12),))
    (device,) = machines.devices
    assert (device.name, device.memory_bytes, device.memory_bytes_per_s, device.power_w) == ("h100-96g", 96e9, 2.4e12, 500)
    assert (device.peak("bfloat16"), device.peak("float16"), device.peak("fp8")) == (800e12, 800e12, 1978.9e12)
    assert links(machines) == links(of("h100"))


def test_export_versions_have_slower_links() -> None:
    assert links(of("h800"))[0] == ("nvswitch4-200", 8, 200)
    assert links(of("a800-80g"))[0] == ("nvswitch3-200", 8, 200)
    assert of("mi250x").devices[0].memory_bytes == of("mi250").devices[0].memory_bytes


@pytest.mark.parametrize(
    ("device", "stated", "message"),
    [
        (None, {"device_text": "Cerebras CS-2"}, "no device is recognised in 'Cerebras CS-2'"),
        ("p40", {"device_text": "NVIDIA Tesla P40 24GB"}, "NVIDIA Tesla P40 24GB: no device 'p40' is known"),
        ("h100", {"devices": 0}, "how many h100 there are is not stated"),
    ],
)
def test_what_is_not_known_says_so(device: str | None, stated: dict[str, Any], message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        of(device, **stated)


@pytest.mark.skipif(TABLES is None, reason="SHARDWISE_PUBLISHED names no folder")
def test_every_usable_row_has_machines() -> None:
    for machine in {row.machine for table in read_directory(Path(TABLES or "")) for row in table.rows if row.usable}:
        assert cluster_of(machines_of(machine)).ranks == machine.devices
