from __future__ import annotations

import math
import time
from itertools import combinations, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.cluster.assemble import Fabric, Part, assemble, torus_shape
from shardwise.cluster.catalog import catalog, device, link, node
from shardwise.cluster.specs import parse_spec
from shardwise.cluster.topology import Group, Level, Machines
from shardwise.errors import ClusterError

# ---- the oracle: blocks as sets, pairs of ranks one by one -------------------------------------------------------------------------


def _node_ranks(machines: Machines) -> list[tuple[Group, list[int]]]:
    nodes, first = [], 0
    for group in machines.groups:
        for _ in range(group.nodes):
            nodes.append((group, list(range(first, first + group.per_node))))
            first += group.per_node
    return nodes


def _blocks(machines: Machines) -> list[tuple[Level, frozenset[int]]]:
    """All blocks of all levels, those of inner levels first; one for each group that sees it."""
    inside = [
        (level, frozenset(ranks[start : start + level.ranks]))
        for group, ranks in _node_ranks(machines)
        for level in group.inside
        for start in range(0, len(ranks), level.ranks)
    ]
    inside.sort(key=lambda each: len(each[1]))
    everything = range(machines.ranks)
    outside = []
    for depth in range(len(machines.groups[0].outside)):
        for group in machines.groups:
            level = group.outside[depth]
            outside += [(level, frozenset(everything[start : start + level.ranks])) for start in range(0, machines.ranks, level.ranks)]
    return inside + outside


def _joining(machines: Machines, a: int, b: int, blocks: list[tuple[Level, frozenset[int]]]) -> Level:
    """The level that joins two ranks, as the slower of them sees it."""
    found = next(level for level, ranks in blocks if a in ranks and b in ranks)
    seen = [level for rank in (a, b) for level in machines.group_of(rank).levels if (level.name, level.ranks) == (found.name, found.ranks)]
    return min(seen, key=lambda level: level.bytes_per_s)


def _slowest(machines: Machines, ranks: tuple[int, ...], blocks: list[tuple[Level, frozenset[int]]]) -> float:
    return min((_joining(machines, a, b, blocks).bytes_per_s for a, b in combinations(ranks, 2)), default=math.inf)


@st.composite
def _machines(draw: st.DrawFn) -> Machines:
    shape = draw(st.sampled_from(["one kind", "two kinds", "modules", "pods"]))
    count = st.integers(1, 4)
    if shape == "one kind":
        return parse_spec(f"{draw(st.integers(2, 5))}x{draw(st.integers(1, 8))} h100, {draw(st.sampled_from(['NDR', '25 GbE', 'XDR']))}")
    if shape == "two kinds":
        second = draw(st.sampled_from(["2x4 mi250", "3x2 rtx4090", "1x1 a100-80g", "2x8 mi250"]))
        return parse_spec(f"{draw(count)}x{draw(st.sampled_from([1, 2, 3, 8]))} a100-80g + {second}, 25 GbE")
    if shape == "modules":
        return parse_spec(f"mi250:{draw(st.integers(2, 4))}x{draw(st.sampled_from([1, 2, 4, 8]))}")
    pods = [Fabric(name="pod", nodes=2), Fabric(name="site", oversubscription=draw(st.sampled_from([1.0, 4.0])))]
    kinds = [node("dgx-a100"), node("dgx-a100-40g")]
    parts = [Part(node=kinds[index % 2], nodes=draw(count), per_node=2) for index in range(draw(st.integers(2, 3)))]
    if sum(part.nodes for part in parts) == 2:
        pods = pods[1:]
    return assemble("pods", parts, pods, catalog())


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_span_is_what_pairs_of_ranks_say(data: st.DataObject) -> None:
    machines = data.draw(_machines())
    first = data.draw(st.integers(0, machines.ranks - 1))
    count = data.draw(st.integers(1, machines.ranks - first))
    tile = data.draw(st.sampled_from([tile for tile in range(1, count + 1) if count % tile == 0]))
    stride = data.draw(st.sampled_from([stride for stride in range(1, tile + 1) if tile % stride == 0]))
    size = tile // stride
    tiles = [
        tuple(first + start + offset + stride * index for index in range(size))
        for start in range(0, count, tile)
        for offset in range(stride)
    ]
    blocks = _blocks(machines)
    found = machines.span(stride, size, first=first, ranks=count)
    assert found.bytes_per_s == min(_slowest(machines, ranks, blocks) for ranks in tiles)
    assert found.size == size
    assert found in [machines.crossing(ranks) for ranks in tiles]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_crossing_of_any_ranks(data: st.DataObject) -> None:
    machines = data.draw(_machines())
    ranks = tuple(sorted(data.draw(st.sets(st.integers(0, machines.ranks - 1), min_size=1, max_size=12))))
    found, blocks = machines.crossing(ranks), _blocks(machines)
    nodes = [set(ranks) & set(members) for _, members in _node_ranks(machines)]
    assert found.nodes == sum(1 for members in nodes if members)
    assert found.ranks_in_node == max(map(len, nodes))
    assert found.bytes_per_s == _slowest(machines, ranks, blocks)
    joins = {_joining(machines, a, b, blocks).name for a, b in combinations(ranks, 2)}
    assert {hop.level.name for hop in found.hops} == joins
    outermost = next((level for level, members in blocks if set(ranks) <= members), None)
    assert (found.level.name if found.level else None) == (outermost.name if outermost and len(ranks) > 1 else None)
    assert math.prod(hop.parts for hop in found.hops) >= len(ranks)
    assert found == machines.crossing(ranks[::-1])


# ---- by hand -----------------------------------------------------------------------------------------------------------------------


def test_two_thousand_nodes() -> None:
    machines = parse_spec("h100:2048x8")
    assert (machines.ranks, machines.nodes, machines.uniform) == (16_384, 2048, True)
    assert [(level.name, level.ranks, level.link.name) for level in machines.levels] == [
        ("node", 8, "nvswitch4"), ("cluster", 16_384, "infiniband-ndr"),
    ]  # fmt: skip
    assert [level.bytes_per_s for level in machines.levels] == [450e9, 50e9]
    assert [level.sharp for level in machines.levels] == [True, False]
    assert machines.memory_bytes == 16_384 * 80_000_000_000
    assert machines.peak_flops("bfloat16") == pytest.approx(16_384 * 989.4e12)
    assert machines.price_per_hour == pytest.approx(16_384 * 6.88)
    within, across, all_of_them = machines.span(1, 8), machines.span(8, 2048), machines.span(1, 16_384)
    assert [(hop.level.name, hop.parts) for hop in within.hops] == [("node", 8)]
    assert [(hop.level.name, hop.parts) for hop in across.hops] == [("cluster", 2048)]
    assert [(hop.level.name, hop.parts) for hop in all_of_them.hops] == [("node", 8), ("cluster", 2048)]
    assert (within.ranks_in_node, across.ranks_in_node, all_of_them.ranks_in_node) == (8, 1, 8)
    assert (within.bytes_per_s, across.bytes_per_s, across.latency_s) == (450e9, 50e9, 2.7e-6)


def test_large_machines_answer_quickly() -> None:
    machines = parse_spec("h100:12500x8")
    start = time.process_time()
    assert machines.span(2, 4).level == machines.levels[0]
    assert machines.span(8, 12_500).nodes == 12_500
    assert machines.span(1, 100_000).nodes == 12_500
    assert time.process_time() - start < 5
    assert machines.span(1, 100_000) is machines.span(1, 100_000)


def test_a_group_that_does_not_fit_nodes() -> None:
    """Of six ranks each, two groups are cut by the border of a node: as 2 + 4 and 4 + 2."""
    machines = parse_spec("h100:3x8")
    cut = machines.span(1, 6)
    assert (cut.nodes, cut.ranks_in_node, cut.bytes_per_s) == (2, 4, 50e9)
    assert [(hop.level.name, hop.parts) for hop in cut.hops] == [("node", 4), ("cluster", 2)]
    assert machines.span(1, 6, first=0, ranks=6).nodes == 1


def test_a_bus_is_slower_than_the_network() -> None:
    """Eight ports of 400 Gb/s lead out of a node whose devices talk over PCI Express 4: two in a node are the slower pair."""
    machines = parse_spec("rtx4090:2x8, 8xNDR")
    assert machines.span(1, 16).bytes_per_s == machines.levels[0].bytes_per_s < machines.levels[1].bytes_per_s
    assert machines.span(8, 2).bytes_per_s == 50e9


def test_unequal_nodes_share_their_ports() -> None:
    machines = parse_spec("1x8 a100-80g + 2x4 rtx4090, 25 GbE")
    assert (machines.ranks, machines.nodes, machines.uniform) == (16, 3, False)
    assert [machines.group_of(rank).device.name for rank in (0, 7, 8, 15)] == ["a100-80g", "a100-80g", "rtx4090", "rtx4090"]
    assert [machines.node_of(rank) for rank in (0, 7, 8, 11, 12, 15)] == [0, 0, 1, 1, 2, 2]
    assert machines.devices == (device("a100-80g"), device("rtx4090"))
    assert machines.span(8, 2).bytes_per_s == 25e9 / 8 / 8
    assert machines.crossing([8, 12]).bytes_per_s == 25e9 / 8 / 4
    assert machines.crossing([8, 9]).bytes_per_s == link("pcie4").bytes_per_s
    assert machines.span(1, 2).bytes_per_s == machines.span(1, 4).bytes_per_s == link("pcie4").bytes_per_s
    assert machines.span(1, 2, first=0, ranks=8).bytes_per_s == 300e9
    assert [level.ports for level in machines.levels] == [1 / 8]
    assert machines.price_per_hour is None
    assert machines.peak_flops("fp8") == 8 * 312e12 + 8 * 330.3e12
    assert machines.crossing([3, 3]).level is None
    assert (machines.crossing([3]).bytes_per_s, machines.crossing([3]).latency_s) == (math.inf, 0)


def test_dies_of_a_module_are_nearer() -> None:
    machines = parse_spec("mi250:4x8")
    assert [level.name for level in machines.levels] == ["module", "node", "cluster"]
    assert [machines.span(1, size).bytes_per_s for size in (2, 8, 32)] == [200e9, 150e9, 12.5e9]
    mixed = parse_spec("1x8 a100-80g + 2x4 mi250, 25 GbE").crossing([0, 1, 2, 8, 9])
    assert [(hop.level.name, hop.level.link.name, hop.parts) for hop in mixed.hops] == [
        ("module", "xgmi-mi250-package", 2), ("node", "nvswitch3", 3), ("cluster", "ethernet-25", 2),
    ]  # fmt: skip
    near, far = machines.crossing([0, 1]).level, machines.crossing([1, 2]).level
    assert near and far and (near.name, far.name) == ("module", "node")


def test_racks_and_slices() -> None:
    racks = parse_spec("gb200:8x72")
    assert [(level.name, level.ranks, level.sharp) for level in racks.levels] == [("rack", 72, True), ("cluster", 576, False)]
    assert racks.span(1, 72).bytes_per_s == 900e9
    slices = parse_spec("tpu-v5p:2x512")
    assert [(level.name, level.torus) for level in slices.levels] == [("slice", (8, 8, 8)), ("cluster", None)]
    assert slices.levels[1].bytes_per_s * 8 == 50e9
    assert parse_spec("tpu-v4-pod").levels[0].torus == (16, 16, 16)


def test_pods_of_nodes() -> None:
    fabrics = [Fabric(name="pod", nodes=4, sharp=True), Fabric(name="site", oversubscription=2)]
    machines = assemble("site", [Part(node=node("dgx-h100"), nodes=10, per_node=8)], fabrics, catalog())
    assert [(level.name, level.ranks, level.bytes_per_s, level.sharp) for level in machines.levels] == [
        ("node", 8, 450e9, True), ("pod", 32, 50e9, True), ("site", 80, 25e9, False),
    ]  # fmt: skip
    assert [(hop.level.name, hop.parts) for hop in machines.span(1, 80).hops] == [("node", 8), ("pod", 4), ("site", 3)]
    assert machines.span(8, 2).bytes_per_s == 50e9
    assert machines.span(16, 5).bytes_per_s == 25e9


def test_levels_between_nodes_inherit() -> None:
    ndr, hdr = link("NDR"), link("HDR")
    fabrics = [Fabric(name="room", nodes=2, link=ndr, ports=2), Fabric(name="floor", nodes=4), Fabric(name="site", link=hdr)]
    machines = assemble("site", [Part(node=node("rtx4090-box"), nodes=8, per_node=8)], fabrics, catalog())
    assert [(level.link.name, level.ports) for level in machines.levels[1:]] == [
        ("infiniband-ndr", 2 / 8), ("infiniband-ndr", 2 / 8), ("infiniband-hdr", 2 / 8),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "ports"),
    [
        ("dgx-h100:2", 1),
        ("h100:2x4", 1),
        ("p4d:2", 0.5),
        ("p4d:2x2", 1),
        ("p5:2", 4),
        ("rtx4090:2x8", 1 / 8),
        ("rtx4090:2x2", 1 / 2),
        ("rtx4090:2x1", 1),
        ("dgx-h100:2, HDR", 1),
        ("dgx-h100:2, 25 GbE", 1 / 8),
        ("dgx-h100:2, 4xNDR", 1 / 2),
        ("h100:2x4, 8xNDR", 2),
        ("tpu-v5p:2x512", 2),
    ],
)
def test_ports_of_each_device(line: str, ports: float) -> None:
    assert parse_spec(line).levels[-1].ports == ports


@pytest.mark.parametrize(
    ("ranks", "largest", "shape"),
    [
        (256, (16, 16), (16, 16)),
        (8, (16, 16), (2, 4)),
        (17, (16, 16), None),
        (26, (16, 16), (2, 13)),
        (8960, (16, 20, 28), (16, 20, 28)),
        (64, (16, 16, 16), (4, 4, 4)),
        (1, (16, 16), (1, 1)),
    ],
)
def test_torus_shapes(ranks: int, largest: tuple[int, ...], shape: tuple[int, ...] | None) -> None:
    assert torus_shape(ranks, largest) == shape


@given(st.integers(1, 600))
@settings(max_examples=60, deadline=None)
def test_torus_shapes_hold_their_ranks(ranks: int) -> None:
    largest = (4, 8, 16)
    shape = torus_shape(ranks, largest)
    fits = [(a, b, ranks // (a * b)) for a in range(1, 5) for b in range(1, 9) if ranks % (a * b) == 0 and ranks // (a * b) <= 16]
    assert (shape is None) == (not fits)
    assert shape is None or (math.prod(shape) == ranks and all(a <= b for a, b in zip(shape, largest, strict=True)))


def test_questions_without_answer() -> None:
    machines = parse_spec("h100:2x8")
    for stride, size in ((0, 2), (1, 0), (3, 2), (1, 32)):
        with pytest.raises(ValueError, match=r"groups of \d+ ranks, \d+ apart, do not tile ranks 0 to 15 of 16"):
            machines.span(stride, size)
    with pytest.raises(ValueError, match="do not tile ranks 8 to 23 of 16"):
        machines.span(1, 2, first=8, ranks=16)
    with pytest.raises(ValueError, match="no rank 16 among 16"):
        machines.group_of(16)
    with pytest.raises(ValueError, match="at least one rank"):
        machines.crossing([])


def test_levels_that_do_not_nest() -> None:
    with pytest.raises(ClusterError, match="blocks of 3 ranks are not made of whole blocks of 2 ranks"):
        parse_spec("mi250:4x3")
    with pytest.raises(ClusterError, match="cluster 'none' has no devices"):
        Machines(name="none", groups=())


@pytest.mark.parametrize(
    ("parts", "fabrics", "said"),
    [
        ([("dgx-h100", 1, 8)], [Fabric()], "is one node, so what joins nodes has no effect: leave it out"),
        ([("dgx-h100", 4, 8)], [Fabric(name="pod"), Fabric()], "level 'pod' is not the outermost: it joins 2 to 3 of 4 nodes"),
        ([("dgx-h100", 4, 8)], [Fabric(name="pod", nodes=4), Fabric()], "level 'pod' is not the outermost"),
        ([("dgx-h100", 4, 8)], [Fabric(nodes=3)], "level 'cluster' is the outermost: it joins all 4 nodes, not 3"),
        ([("dgx-h100", 4, 8), ("dgx-a100", 4, 4)], [Fabric(nodes=2, link=link("NDR")), Fabric()], "nodes of equally many devices"),
        ([("dgx-h100", 6, 8)], [Fabric(nodes=2), Fabric(nodes=3), Fabric()], "24 ranks are not made of whole blocks of 16 ranks"),
        ([("dgx-h100", 2, 8), ("dgx-a100", 2, 8)], [], "different networks .NVIDIA DGX H100 infiniband-ndr, NVIDIA DGX A100"),
        ([("dgx-h100", 2, 8)], [Fabric(link=link("25 GbE"), sharp=True)], "do not add up what passes through them: leave SHARP out"),
        ([("dgx-h100", 2, 0)], [], "2 nodes of 0 devices are none"),
    ],
)
def test_parts_that_do_not_fit(parts: list[tuple[str, int, int]], fabrics: list[Fabric], said: str) -> None:
    with pytest.raises(ClusterError, match=said):
        assemble("mix", [Part(node=node(name), nodes=nodes, per_node=each) for name, nodes, each in parts], fabrics, catalog())


# ---- parts of machines ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "1x8 a100-80g + 2x4 rtx4090, 25 GbE",
        "2x8 h100 + 1x4 l40s + 3x2 rtx4090, 100 GbE, oversubscribed 2",
        "a100-80g:8 + rtx4090:4, 25 GbE",
    ],
)
def test_parts_of_machines_are_joined_as_the_whole_is(line: str) -> None:
    """Of groups in any order, every pair of ranks is joined by the same link at the same rate."""
    whole = parse_spec(line)
    firsts = [sum(group.ranks for group in whole.groups[:number]) for number in range(len(whole.groups))]
    for size in range(1, len(whole.groups) + 1):
        for numbers in permutations(range(len(whole.groups)), size):
            part = whole.only(numbers)
            places = [firsts[number] + rank for number in numbers for rank in range(whole.groups[number].ranks)]
            assert part.ranks == len(places)
            assert [part.group_of(rank).device for rank in range(part.ranks)] == [whole.group_of(place).device for place in places]
            for a, b in combinations(range(part.ranks), 2):
                mine, theirs = part.crossing((a, b)), whole.crossing((places[a], places[b]))
                assert (mine.bytes_per_s, mine.latency_s, mine.nodes) == (theirs.bytes_per_s, theirs.latency_s, theirs.nodes)


def test_a_part_under_one_switch_does_not_cross_the_others() -> None:
    name, nic = node("dgx-h100"), link("NDR")
    parts = [Part(node=name, nodes=4, per_node=8), Part(node=node("dgx-a100"), nodes=4, per_node=8)]
    fabrics = [Fabric(name="pod", nodes=4, link=nic), Fabric(link=nic, oversubscription=4.0)]
    whole = assemble("two pods", parts, fabrics, catalog())
    alone = whole.only((1,))
    assert alone.crossing((0, 31)).bytes_per_s == 4 * whole.crossing((0, 63)).bytes_per_s
    assert [level.ranks for level in alone.levels] == [8, 32]
    with pytest.raises(ClusterError, match="cannot be put in another order"):
        whole.only((1, 0))


def test_kinds_of_devices() -> None:
    machines = parse_spec("1x8 a100-80g + 2x4 rtx4090 + 1x4 a100-80g, 25 GbE")
    assert machines.kinds == ((0, 2), (1,))
    assert [device.name for device in machines.devices] == ["a100-80g", "rtx4090"]
    assert machines.only(machines.kinds[0]).ranks == 12
