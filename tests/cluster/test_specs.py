from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.cluster.catalog import catalog
from shardwise.cluster.documents import line_of
from shardwise.cluster.machine_files import is_machine_file
from shardwise.cluster.specs import Entry, Spec, machines, parse_spec, read_spec
from shardwise.errors import ClusterError

# ---- one line ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "groups"),
    [
        ("h100:2048x8", [("h100", 2048, 8)]),
        ("a100-80g:16", [("a100-80g", 2, 8)]),
        ("a100-80g:3", [("a100-80g", 1, 3)]),
        ("gb200:8x72", [("gb200", 8, 72)]),
        ("dgx-h100:4", [("h100", 4, 8)]),
        ("dgx-h100:4x2", [("h100", 4, 2)]),
        ("4 dgx-h100", [("h100", 4, 8)]),
        ("h100", [("h100", 1, 1)]),
        ("dgx-h100", [("h100", 1, 8)]),
        ("1x8 a100-80g + 2x4 rtx4090, 25 GbE", [("a100-80g", 1, 8), ("rtx4090", 2, 4)]),
        (" 2 × 4  RTX 4090 ,4x25 GbE", [("rtx4090", 2, 4)]),
        ("h100:2x8+h200:2x8", [("h100", 2, 8), ("h200", 2, 8)]),
        ("3090:2x2", [("rtx3090", 2, 2)]),
    ],
)
def test_lines(line: str, groups: list[tuple[str, int, int]]) -> None:
    found = parse_spec(line)
    assert [(group.device.name, group.nodes, group.per_node) for group in found.groups] == groups
    assert found.name == line.strip()


def test_options() -> None:
    found = parse_spec("h100:64x8, 4xHDR, oversubscribed 2, sharp").levels[-1]
    assert (found.link.name, found.ports, found.oversubscription, found.sharp, found.bytes_per_s) == (
        "infiniband-hdr",
        0.5,
        2,
        True,
        6.25e9,
    )
    assert parse_spec("h100:64x8, oversubscribed 1.5").levels[-1].bytes_per_s == 50e9 / 1.5
    assert parse_spec("h100:64x8, SHARP").levels[-1].link.name == "infiniband-ndr"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "cluster '': here a device or a node is wanted, such as \"h100:2048x8\""),
        (
            "h100:2048y8",
            "is understood up to 'h100:', but not '2048y8': a count is NODESxDEVICES or a number of devices, such as 2x8 or 16",
        ),
        ("h100:", "is understood up to 'h100:', but not '': a count is NODESxDEVICES"),
        ("h100:2x8 NDR", "is understood up to 'h100:', but not '2x8 NDR'"),
        ("h100:0x8", "is understood up to 'h100:', but not '0x8': a count is 1 or more"),
        ("h100:-2", "but not '-2': a count is NODESxDEVICES"),
        ("h100:2²", "but not '2²': a count is NODESxDEVICES"),
        ("1x8 h100 +", r"is understood up to '1x8 h100 \+', but not '': here a device or a node is wanted"),
        ("h100:2x8 + , NDR", r"is understood up to 'h100:2x8 \+', but not ''"),
        ("h100:2x8,", "is understood up to 'h100:2x8,', but not '': here an option is wanted: a link such as NDR, 8xNDR or 25 GbE"),
        ("h100:2x8, NDR, HDR", "is understood up to 'h100:2x8, NDR,', but not 'HDR': one link joins the nodes, and 'NDR' is named already"),
        ("h100:2x8, 0xNDR", "but not '0xNDR': a node has 1 port or more"),
        ("h100:2x8, oversubscribed", "but not 'oversubscribed ': what follows is a number from 1 to 1000, such as oversubscribed 2"),
        ("h100:2x8, oversubscribed 0.5", "a number from 1 to 1000"),
        ("h100:2x8, oversubscribed nan", "a number from 1 to 1000"),
        ("h10:2x8", "cluster 'h10:2x8': no device or node 'h10' is known; is it h100"),
        ("h100:2x8, NDRR", "cluster 'h100:2x8, NDRR': no link 'NDRR' is known; is it NDR"),
        ("h100:12", r"12 h100 do not fill nodes of 8 \(NVIDIA DGX H100\); give 8 or 16, or NODESxDEVICES"),
        ("h100:2x16", "NVIDIA DGX H100 holds 8 h100, not 16; take more nodes of up to 8, or describe the node in a file"),
        ("p3dn:2x16", "AWS p3dn.24xlarge holds 8 v100-32g, not 16; take dgx-2"),
        ("h100:8, NDR", "'h100:8, NDR' is one node, so what joins nodes has no effect: leave it out"),
        ("1x8 a100-80g + 2x4 rtx4090", "different networks .* name what joins them, such as NDR or 25 GbE"),
        ("rtx4090:2x8, SHARP", "do not add up what passes through them"),
        ("tpu-v5e:17", "17 chips form no torus within 16x16; 18 do"),
        ("h100:999999x8", "has 7,999,992 devices, over 1,000,000"),
        ("8xA100", "no device or node '8xA100' is known"),
    ],
)
def test_wrong_lines(line: str, said: str) -> None:
    with pytest.raises(ClusterError, match=said):
        parse_spec(line)


_COUNTS = st.integers(1, 5000)
_ENTRIES = st.one_of(
    st.builds(Entry, name=st.sampled_from(sorted(catalog().devices)), number=_COUNTS),
    st.builds(Entry, name=st.sampled_from(sorted(catalog().nodes)), nodes=_COUNTS, per_node=_COUNTS),
)


@st.composite
def _specs(draw: st.DrawFn) -> Spec:
    network = draw(st.none() | st.sampled_from(sorted(name for each in catalog().links.values() for name in (each.name, *each.aliases))))
    return Spec(
        entries=tuple(draw(st.lists(_ENTRIES, min_size=1, max_size=3))),
        network=network,
        ports=None if network is None else draw(st.none() | st.integers(1, 64)),
        oversubscription=draw(st.floats(1, 1000)),
        sharp=draw(st.booleans()),
    )


@given(_specs())
def test_a_spec_is_a_line_again(spec: Spec) -> None:
    assert read_spec(str(spec)) == spec


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(["h100", "a100-80g", "mi300x", "dgx-b200"]), st.integers(2, 40), st.integers(1, 8), st.sampled_from(["NDR", "25 GbE"])
)
def test_both_orders_are_the_same_machines(name: str, nodes: int, per_node: int, network: str) -> None:
    one, other = parse_spec(f"{name}:{nodes}x{per_node}, {network}"), parse_spec(f"{nodes}x{per_node} {name},{network}")
    assert one.groups == other.groups
    assert one.ranks == nodes * per_node


@given(st.text(alphabet="h10ax: +,NDR8.²", max_size=20))
def test_any_line_is_machines_or_a_cluster_error(line: str) -> None:
    try:
        ranks = parse_spec(line).ranks
    except ClusterError:
        return
    assert ranks >= 1


# ---- files -------------------------------------------------------------------------------------------------------------------------

FILE = """\
name = "two rooms"

[[groups]]
nodes = 32
node = "dgx-h100"

[[groups]]
nodes = 32
device = "mine"
per_node = 8
link = "nvswitch4"

[[levels]]
name = "room"
nodes = 32
link = "NDR"
ports = 8
sharp = true

[[levels]]
name = "site"
oversubscription = 4

[devices.mine]
memory_bytes = 64e9
memory_bytes_per_s = { value = 2e12, source = "our benchmark" }
peak_flops = { float32 = 30e12, bfloat16 = 400e12 }

[links.fast]
kind = "ethernet"
link_bytes_per_s = 12.5e9
latency_s = 5e-6

[nodes.box]
device = "mine"
devices = 4
link = "pcie5"
network = "fast"
ports = 2
"""


def _written(directory: Path, text: str) -> Path:
    path = directory / "rooms.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file(tmp_path: Path) -> None:
    found = machines(_written(tmp_path, FILE))
    assert (found.name, found.ranks, found.nodes) == ("two rooms", 512, 64)
    assert [group.device.name for group in found.groups] == ["h100", "mine"]
    for group in found.groups:
        assert [(level.name, level.ranks, level.bytes_per_s, level.sharp) for level in group.levels] == [
            ("node", 8, 450e9, True), ("room", 256, 50e9, True), ("site", 512, 12.5e9, False),
        ]  # fmt: skip
    assert found.group_of(256).device.source("memory_bytes_per_s") == "our benchmark"
    assert found.span(8, 32).level == found.groups[0].outside[0]
    assert found.span(256, 2).bytes_per_s == 12.5e9


def test_a_file_of_little(tmp_path: Path) -> None:
    found = machines(str(_written(tmp_path, '[[groups]]\nnodes = 2\ndevice = "h100"\n')))
    assert found.name == "rooms"
    assert found.groups == parse_spec("h100:2x8").groups


def test_nodes_of_a_file(tmp_path: Path) -> None:
    own = FILE.split("[[groups]]")[0] + '[[groups]]\nnodes = 3\nnode = "box"\n' + FILE[FILE.index("[devices.mine]") :]
    found = machines(_written(tmp_path, own))
    assert [(level.link.name, level.ranks, level.bytes_per_s) for level in found.levels][1:] == [("fast", 12, 6.25e9)]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "two', 'name = = "two', r"cannot be read as TOML: Invalid value \(at line 1, column 8\)"),
        ("nodes = 32\nnode", "nodes = 0\nnode", r"line 4: key 'groups.1.nodes' is 0: Input should be greater than or equal to 1"),
        ("per_node = 8", "per_node = 'x'", r"line 10: key 'groups.2.per_node' is 'x': Input should be a valid integer"),
        ("memory_bytes = 64e9", "memory_bytes = 64", r"line 25: key 'devices.mine.memory_bytes' is 64: .* did you write GB for bytes\?"),
        ("memory_bytes = 64e9", "memory_bytes = 64e18", r"is 6.4e\+19: .* did you write bytes for GB, and scale them\?"),
        ("memory_bytes = 64e9\n", "", r"line 24: key 'devices.mine.memory_bytes' is missing"),
        (
            "memory_bytes = ",
            "memory_gb = ",
            r"line 25: key 'devices.mine.memory_gb' is unknown; known are title, aliases, note, memory_bytes,",
        ),
        ("value = 2e12", "value = 2000", r"line 26: key 'devices.mine.memory_bytes_per_s' is 2000: .* did you write GB/s for bytes/s\?"),
        ("bfloat16 = 400e12", "bfloat16 = 0", r"line 27: key 'devices.mine.peak_flops.bfloat16' is 0: it has to be at least 1e\+09 flop/s"),
        (
            "bfloat16 =",
            "bf16 =",
            r"line 24: key 'devices.mine': peak_flops: no dtype 'bf16' is known; it takes float32, and tf32, float16,",
        ),
        ('kind = "ethernet"', 'kind = "wire"', r"line 30: key 'links.fast.kind' is 'wire': Input should be 'nvlink', 'nvswitch'"),
        ("latency_s = 5e-6", "latency_s = 5", r"line 32: key 'links.fast.latency_s' is 5: .* did you write µs for s\?"),
        ("oversubscription = 4", "oversubscription = 0.5", r"line 22: key 'levels.2.oversubscription' is 0.5: Input should be greater"),
        ("ports = 2", "prots = 2", r"line 39: key 'nodes.box.prots' is unknown; known are title, .* ports"),
        ("[[groups]]", "[[group]]", r"line 3: key 'group' is unknown; known are name, groups, levels, devices, links, nodes"),
        ('node = "dgx-h100"', 'node = "dgx-h10"', r"line 3: no node 'dgx-h10' is known; is it dgx-h100"),
        ('node = "dgx-h100"', "", r"line 3: key 'groups.1': it wants either node or device"),
        ('node = "dgx-h100"', 'device = "mine"', r"line 3: device 'mine' has no usual node: give link"),
        ("per_node = 8\n", "", r"line 7: key 'groups.2': a node of its own wants device, per_node and link"),
        ('link = "nvswitch4"', "ports = 2", r"line 7: key 'groups.2': ports goes with link"),
        ('link = "NDR"', 'link = "NDRR"', r"line 13: no link 'NDRR' is known; is it NDR"),
        ('link = "pcie5"', 'link = "pcie9"', r"line 34: no link 'pcie9' is known"),
        ("nodes = 32\nlink", "nodes = 64\nlink", r"level 'room' is not the outermost: it joins 2 to 63 of 64 nodes"),
    ],
)
def test_wrong_files(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in FILE
    with pytest.raises(ClusterError, match=f"cluster file .*rooms.toml.*{said}"):
        machines(_written(tmp_path, FILE.replace(old, new, 1)))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"nowhere\.toml does not exist"):
        machines("nowhere.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ClusterError, match=r"bytes\.toml cannot be read"):
        machines(tmp_path / "bytes.toml")


def test_which_form_a_file_has(tmp_path: Path) -> None:
    for text, is_one in (("groups = []", True), ("ranks = 8\n[rates]\n", False), ("groups = [", False)):
        (tmp_path / "file.toml").write_text(text)
        assert is_machine_file(tmp_path / "file.toml") is is_one
    assert not is_machine_file(tmp_path / "nowhere.toml")


def test_lines_of_keys() -> None:
    assert [line_of(FILE, place) for place in ((), ("groups", 1, "nodes"), ("levels", 0), ("devices", "mine"), ("groups", 7, "nodes"))] == [
        0, 8, 13, 24, 4,
    ]  # fmt: skip
    assert line_of("# memory = 1\nmemory = 2", ("memory",)) == 2
