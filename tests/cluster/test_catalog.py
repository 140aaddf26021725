from __future__ import annotations

import re

import pytest
from pydantic import ValidationError

from shardwise.cluster.catalog import DTYPES, GIVEN, Catalog, DeviceSpec, LinkSpec, NodeSpec, catalog, device, link, node
from shardwise.cluster.units import QUANTITIES
from shardwise.errors import ClusterError

DEVICES, LINKS, NODES = catalog().devices.values(), catalog().links.values(), catalog().nodes.values()
WANTED = (
    "v100-16g v100-32g a100-40g a100-80g h100 h100-pcie h200 h20 b200 gb200 b300 gb300 l40s rtx3090 rtx4090 rtx5090 mi250 mi300x "
    "mi325x mi355x tpu-v4 tpu-v5e tpu-v5p tpu-v6e tpu-v7 cpu"
)


def _mine(**changed: object) -> DeviceSpec:
    figures = {"name": "mine", "memory_bytes": 80e9, "memory_bytes_per_s": 2e12, "peak_flops": {"float32": 20e12}}
    return DeviceSpec.model_validate({**figures, **changed})


@pytest.mark.parametrize("name", WANTED.split())
def test_devices_are_there(name: str) -> None:
    assert device(name).name == name


@pytest.mark.parametrize("spec", [*DEVICES, *LINKS], ids=lambda spec: spec.name)
def test_every_figure_has_a_source(spec: DeviceSpec | LinkSpec) -> None:
    figures = spec.figures()
    assert set(spec.sources) == set(figures)
    for figure in figures:
        assert re.search(r"(19|20)\d\d|estimate|NCCL|roadmap|^one ", spec.source(figure)), figure


@pytest.mark.parametrize("spec", NODES, ids=lambda spec: spec.name)
def test_nodes_name_what_exists(spec: NodeSpec) -> None:
    assert spec.source != GIVEN
    assert device(spec.device).name == spec.device
    assert spec.network is not None
    for name in (spec.link, spec.network, *(inner.link for inner in spec.inner)):
        assert link(name).name == name
    assert (spec.torus is not None) == (link(spec.link).shape == "torus")
    assert all(spec.devices % inner.devices == 0 for inner in spec.inner)


@pytest.mark.parametrize("spec", DEVICES, ids=lambda spec: spec.name)
def test_devices_are_physical(spec: DeviceSpec) -> None:
    peaks = spec.peak_flops
    order = [peaks[dtype] for dtype in ("float32", "tf32", "float16", "fp8") if dtype in peaks]
    assert order == sorted(order)
    if "float16" in peaks and "bfloat16" in peaks:
        assert peaks["float16"] == peaks["bfloat16"]
    assert spec.node is not None and node(spec.node).device == spec.name
    assert 1e-3 < spec.memory_bytes / spec.memory_bytes_per_s < 2, "memory is read through in well under two seconds"
    assert spec.title and spec.cores


@pytest.mark.parametrize(
    ("name", "dense_bfloat16"),
    [("a100-80g", 312e12), ("h100", 989.4e12), ("b200", 2.25e15), ("l40s", 362.05e12), ("rtx4090", 165.2e12), ("mi300x", 1307.4e12)],
)
def test_peaks_are_dense_and_accumulate_in_float32(name: str, dense_bfloat16: float) -> None:
    assert device(name).peak("bfloat16") == dense_bfloat16


def test_relations_between_devices() -> None:
    assert device("mi250").memory_bytes * 2 == 128e9
    assert device("a100-40g").peak_flops == device("a100-80g").peak_flops
    assert device("a100-40g").memory_bytes_per_s < device("a100-80g").memory_bytes_per_s
    for worse, better in (("h100-pcie", "h100"), ("b200", "gb200"), ("b300", "gb300"), ("rtx3090", "rtx4090"), ("rtx4090", "rtx5090")):
        assert all(peak <= device(better).peak_flops[dtype] for dtype, peak in device(worse).peak_flops.items())
    for consumer in ("rtx3090", "rtx4090", "rtx5090"):
        assert device(consumer).peak("float16") == pytest.approx(2 * device(consumer).peak("float32"), rel=0.01)
        assert device(consumer).price_per_hour is None


def test_relations_between_links() -> None:
    assert [link(f"nvlink{generation}").bytes_per_s for generation in (2, 3, 4, 5)] == [150e9, 300e9, 450e9, 900e9]
    assert all(link(f"nvswitch{generation}").bytes_per_s == link(f"nvlink{generation}").bytes_per_s for generation in (2, 3, 4, 5))
    assert [link(rate).bytes_per_s for rate in ("EDR", "HDR", "NDR", "XDR")] == [12.5e9, 25e9, 50e9, 100e9]
    assert [link(f"{gigabits} GbE").bytes_per_s * 8 for gigabits in (10, 25, 100, 200, 400)] == [1e10, 2.5e10, 1e11, 2e11, 4e11]
    for slower, faster in (("pcie3", "pcie4"), ("pcie4", "pcie5")):
        assert link(faster).bytes_per_s == pytest.approx(2 * link(slower).bytes_per_s, rel=1e-3)
    assert link("nvl72").bytes_per_s * 2 * 72 == pytest.approx(130e12, rel=0.01)
    assert [link(name).reduction for name in ("nvswitch3", "nvswitch4", "nvl72", "NDR", "25 GbE")] == [
        "never", "always", "always", "optional", "never",
    ]  # fmt: skip
    assert link("25 GbE RoCE").latency_s < link("25 GbE").latency_s
    for name, torus_links in (("ici-v4", 6), ("ici-v5e", 4), ("ici-v5p", 6), ("ici-v6e", 4)):
        assert link(name).links == torus_links


def test_names_are_told_apart() -> None:
    known = catalog()
    for specs in ({**known.devices, **known.nodes}, known.links):
        names = [re.sub(r"[ _-]", "", name.casefold()) for spec in specs.values() for name in (spec.name, *spec.aliases)]
        assert len(names) == len(set(names))
    assert device("H100 SXM") == device("h100") == device("H_100")
    assert link("ndr") == link("infiniband-ndr")
    assert catalog() is known


@pytest.mark.parametrize(
    ("look_up", "name", "said"),
    [
        (device, "h10", r"no device 'h10' is known; is it h100 .*`shardwise cluster` lists all"),
        (device, "a100", r"is it a100-40g or a100-80g or "),
        (link, "NDRR", r"no link 'NDRR' is known; is it NDR"),
        (node, "dgx-h10", r"no node 'dgx-h10' is known; is it dgx-h100"),
        (device, "zebra", r"no device 'zebra' is known; `shardwise cluster` lists all"),
        (catalog().home, "dgxh10", r"no device or node 'dgxh10' is known; is it dgx-h100"),
    ],
)
def test_unknown_names(look_up: object, name: str, said: str) -> None:
    assert callable(look_up)
    with pytest.raises(ClusterError, match=said):
        look_up(name)


def test_peak_of_a_dtype_that_a_device_does_not_know() -> None:
    old, new, tpu = device("v100-16g"), device("h100"), device("tpu-v5e")
    assert old.peak("bfloat16") == old.peak("tf32") == old.peak("float32") == 15.7e12
    assert old.peak("fp8") == old.peak("float16") == 125e12
    assert new.peak("float8_e4m3fn") == new.peak("float8_e5m2") == new.peak("fp8")
    assert tpu.peak("fp8") == tpu.peak("bfloat16")
    with pytest.raises(ClusterError, match=r"no peak of dtype 'int8' is known for h100; known are float32, tf32"):
        new.peak("int8")


def test_figures_with_and_without_source() -> None:
    spec = _mine(memory_bytes={"value": 64e9, "source": "its box"}, peak_flops={"float32": 2e12, "tf32": {"value": 4e12, "source": "ours"}})
    assert spec.memory_bytes == 64_000_000_000 and isinstance(spec.memory_bytes, int)
    assert spec.figures() == {"memory_bytes": 64e9, "memory_bytes_per_s": 2e12, "peak_flops.float32": 2e12, "peak_flops.tf32": 4e12}
    assert [spec.source(figure) for figure in spec.figures()] == ["its box", GIVEN, GIVEN, "ours"]
    assert spec.label == "mine"


@pytest.mark.parametrize("spec", [*DEVICES, *LINKS, *NODES], ids=lambda spec: spec.name)
def test_specs_survive_json(spec: DeviceSpec | LinkSpec | NodeSpec) -> None:
    again = type(spec).model_validate_json(spec.model_dump_json())
    assert again == spec and hash(again) == hash(spec)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"memory_bytes": 80}, r"at least 1e\+08 bytes; did you write GB for bytes\? That would be 8e\+10"),
        ({"memory_bytes": 80_000}, r"did you write MB for bytes\? That would be 8e\+10"),
        ({"memory_bytes": 80e18}, r"at most 2e\+12 bytes; did you write bytes for GB, and scale them\? That would be 8e\+10"),
        ({"memory_bytes": 3e12}, r"at most 2e\+12 bytes$"),
        ({"memory_bytes_per_s": 3350}, r"did you write GB/s for bytes/s\? That would be 3.35e\+12"),
        ({"memory_bytes_per_s": 3.35}, r"did you write GB/s for bytes/s\? That would be 3.35e\+09"),
        ({"memory_bytes_per_s": 30e12}, r"at most 2e\+13 bytes/s"),
        ({"peak_flops": {"float32": 0}}, r"at least 1e\+09 flop/s$"),
        ({"peak_flops": {"float32": 67}}, r"did you write Tflop/s for flop/s\? That would be 6.7e\+13"),
        ({"peak_flops": {"float32": 30e15}}, r"at most 2e\+16 flop/s"),
        ({"peak_flops": {"float32": float("nan")}}, r"it has to be at most"),
        ({"peak_flops": {"float16": 1e12}}, r"float32 is missing; it takes float32, and tf32"),
        ({"peak_flops": {"float32": 1e12, "fp16": 2e12}}, r"no dtype 'fp16' is known"),
        ({"power_w": 0.7}, r"did you write kW for W\? That would be 700"),
        ({"price_per_hour": -1}, r"at least 0.001 dollars an hour"),
        ({"cores": 0}, r"greater than or equal to 1"),
        ({"colour": "green"}, r"Extra inputs are not permitted"),
    ],
)
def test_devices_that_cannot_be(changed: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        _mine(**changed)
    assert any(re.search(said, problem["msg"]) for problem in caught.value.errors())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"link_bytes_per_s": 3.2e12}, r"at most 2e\+12 bytes/s; did you write bits/s for bytes/s\? That would be 4e\+11"),
        ({"link_bytes_per_s": 50}, r"did you write GB/s for bytes/s\? That would be 5e\+10"),
        ({"latency_s": 5}, r"at most 0.1 s; did you write µs for s\? That would be 5e-06"),
        ({"latency_s": 0}, r"at least 1e-09 s$"),
        ({"kind": "string"}, r"Input should be 'nvlink'"),
    ],
)
def test_links_that_cannot_be(changed: dict[str, object], said: str) -> None:
    figures = {"name": "wire", "kind": "ethernet", "link_bytes_per_s": 1e9, "latency_s": 1e-5}
    with pytest.raises(ValidationError) as caught:
        LinkSpec.model_validate({**figures, **changed})
    assert any(re.search(said, problem["msg"]) for problem in caught.value.errors())


def test_every_catalog_figure_is_far_from_the_bounds_that_catch_slips() -> None:
    """A bound that a slip by 1,000 would not cross catches nothing."""
    for spec in (*DEVICES, *LINKS):
        for figure, value in spec.figures().items():
            quantity = QUANTITIES.get(figure.split(".")[0])
            assert quantity is None or quantity.objection(value) == ""
    assert all(QUANTITIES["memory_bytes"].objection(spec.memory_bytes * factor) for spec in DEVICES for factor in (1e-9, 1e-6, 1e3))
    assert all(QUANTITIES["peak_flops"].objection(peak * 1e-12) for spec in DEVICES for peak in spec.peak_flops.values())


def test_a_torus_has_as_many_devices_as_its_node() -> None:
    with pytest.raises(ValidationError, match=r"torus \[2, 3\] holds 6 devices, not 8"):
        NodeSpec(name="odd", device="tpu-v4", devices=8, link="ici-v4", torus=(2, 3))


def test_more_can_be_known() -> None:
    mine = _mine()
    more = catalog().with_more(Catalog(devices={"mine": mine, "h100": _mine(name="h100")}))
    assert more.device("mine") is mine
    assert more.device("h100").memory_bytes_per_s == 2e12 != device("h100").memory_bytes_per_s
    with pytest.raises(ClusterError, match="device 'mine' has no usual node: name a node"):
        more.home("mine")
    assert set(DTYPES) >= set(mine.peak_flops)
