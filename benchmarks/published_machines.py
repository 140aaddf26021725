"""The machines of a published measurement, from the catalog of devices, links and nodes.

    device by name ──▶ its usual node (links inside, network outside) ──▶ changed by what the row states ──▶ Machines

What a row does not state is as in the device's usual node. A node is what its fast link joins: a server, a rack of an NVL72, a TPU slice.
Devices that fill no whole nodes are spread evenly, as batch systems do: 128 of racks of 72 are two racks of 64.
"""

from __future__ import annotations

import re
from dataclasses import replace

from benchmarks.published_rows import GIB, Machine
from shardwise.cluster.assemble import Fabric, Part, assemble
from shardwise.cluster.catalog import Catalog, DeviceSpec, LinkSpec, NodeSpec, catalog
from shardwise.cluster.topology import Group, Machines
from shardwise.errors import ClusterError

__all__ = ["machines_of"]

_STRAIGHT = {  # switched link → what joins at most so many devices without switches: DGX-1, HGX A100 4-GPU, HGX H100 4-GPU
    "nvswitch2": ("nvlink2", 8),
    "nvswitch3": ("nvlink3", 4),
    "nvswitch4": ("nvlink4", 4),
}
_PCIE = {"v100": "pcie3", "a100": "pcie4", "h100": "pcie5", "h200": "pcie5"}  # data sheets of the PCIe boards
_KIN = {"a800": "a100-80g", "h800": "h100", "gh200": "h100", "mi250x": "mi250"}  # the same chips, but for memory and a few per cent of peak
_SLOWER_NVLINK = {"a800": 200e9, "h800": 200e9}  # bytes/s of a device, each direction: NVIDIA A800 and H800 data sheets, 400 GB/s both ways
_PRECISIONS = {"fp32": "float32", "tf32": "tf32", "fp16": "float16", "bf16": "bfloat16", "fp8": "fp8"}
_NETWORKS = (  # words of a network, the first found; {} is the rate in Gb/s of a port of the usual network
    (r"\bedr\b|omni-?path", "infiniband-edr"),
    (r"\bhdr\b", "infiniband-hdr"),
    (r"\bndr\b", "infiniband-ndr"),
    (r"\bxdr\b", "infiniband-xdr"),
    (r"infiniband|\bib\b", None),
    (r"roce|slingshot", "roce-{}"),
    (r"\befa\b", "efa-{}"),
    (r"tcp|ethernet|\d ?gbe\b", "ethernet-100"),
)
_LARGEST_PORT = {"roce": 400, "efa": 400}  # Gb/s, of those in the catalog
_SAME = 0.02  # figures that differ by less are one figure, rounded


def machines_of(machine: Machine) -> Machines:
    """The machines that a row ran on, as many devices as it says. Raises ClusterError where device or number are unknown."""
    names = catalog()
    if machine.device is None:
        raise ClusterError(f"no device is recognised in {machine.device_text!r}")
    if machine.devices < 1:
        raise ClusterError(f"how many {machine.device} there are is not stated")
    device = _device(machine, names)
    home = names.node(device.node or "")
    links = [_inside(machine, home, names)]
    node = _node(machine, home, device, links[0])
    known = names.with_more(Catalog(devices={device.name: device}, links={each.name: each for each in links}, nodes={node.name: node}))
    per_node = _per_node(machine.devices, min(machine.island_devices or node.devices, node.devices))
    nodes = machine.devices // per_node
    network = _network(machine, home, names)
    fabrics = [Fabric(link=network)] if nodes > 1 else []
    found = assemble(f"{device.name}:{nodes}x{per_node}", [Part(node=node, nodes=nodes, per_node=per_node)], fabrics, known)
    rate = machine.inter_bytes_per_s or _usual_rate(home, names)
    return replace(found, groups=tuple(_with_rate(group, rate / network.bytes_per_s) for group in found.groups))


def _with_rate(group: Group, ports: float) -> Group:
    return replace(group, outside=tuple(replace(level, ports=ports) for level in group.outside))


# -- devices -----------------------------------------------------------------------------------------------------------------------------


def _device(machine: Machine, names: Catalog) -> DeviceSpec:
    """Of the catalog, or the nearest of the same chip with what the row says of it."""
    assert machine.device is not None
    try:
        return names.device(machine.device)
    except ClusterError as error:
        chip = _chip(machine.device)
        kin = _of_chip(_KIN.get(chip, chip), names)
        if kin is None:
            raise ClusterError(f"{machine.device_text or machine.device}: {error}") from None
        return _changed(kin, machine)


def _chip(device: str) -> str:
    """Without the memory: h100 for h100-96g."""
    return re.sub(r"-\d+g$", "", device)


def _of_chip(name: str, names: Catalog) -> DeviceSpec | None:
    """The device of that name, whatever its memory."""
    alike = [each for each in names.devices.values() if re.fullmatch(rf"{re.escape(name)}(-\d+g)?", each.name)]
    return max(alike, key=lambda each: each.memory_bytes, default=None)


def _changed(device: DeviceSpec, machine: Machine) -> DeviceSpec:
    """With a row's name, memory (GB as in the catalog: 10⁹) and peaks, and the bandwidth (TB/s) and power (W) in its words."""
    peaks = {_PRECISIONS[name]: flops for name, flops in machine.peak_flops if name in _PRECISIONS}
    if "bfloat16" in peaks:
        peaks.setdefault("float16", peaks["bfloat16"])
    bandwidth = re.search(r"(\d+(?:\.\d+)?)\s?TB/s", machine.device_text)
    power = re.search(r"(\d{2,4})\s?W\b", machine.device_text)
    changes = {
        "name": machine.device,
        "title": machine.device_text,
        "aliases": (),
        "memory_bytes": int(machine.memory_bytes / GIB * 1e9) if machine.memory_bytes else device.memory_bytes,
        "memory_bytes_per_s": float(bandwidth[1]) * 1e12 if bandwidth else device.memory_bytes_per_s,
        "peak_flops": {**device.peak_flops, **peaks},
        "power_w": float(power[1]) if power else device.power_w,
        "price_per_hour": None,
        "note": f"{device.label} with what the source says of it",
    }
    return device.model_copy(update=changes)


# -- nodes -------------------------------------------------------------------------------------------------------------------------------


def _node(machine: Machine, home: NodeSpec, device: DeviceSpec, link: LinkSpec) -> NodeSpec:
    """The device's usual node, of another size or link where the row says so. A TPU's is the pod, of which slices are cut."""
    size = home.devices if home.torus else machine.island_devices or machine.node_devices or home.devices
    if (size, device.name, link.name) == (home.devices, home.device, home.link):
        return home
    inner = home.inner if link.name == home.link else ()
    return home.model_copy(
        update={"name": f"{home.name}-{size}", "device": device.name, "devices": size, "link": link.name, "inner": inner, "aliases": ()}
    )


def _per_node(devices: int, most: int) -> int:
    """Of each node, all alike: as many as fit; a multiple of 8 or else a power of two where whole nodes do not make the number."""
    if devices <= most or devices % most == 0:
        return min(devices, most)
    sizes = [size for size in range(1, most + 1) if devices % size == 0]
    return max((size for size in sizes if size % 8 == 0), default=0) or max(size for size in sizes if size & (size - 1) == 0)


def _inside(machine: Machine, home: NodeSpec, names: Catalog) -> LinkSpec:
    """What joins the devices of a node."""
    name, words = home.link, machine.intra_text.lower()
    straight, most = _STRAIGHT.get(name, (name, 0))
    if (machine.island_devices or machine.node_devices or home.devices) <= most:
        name = straight
    if "pci" in words and not re.search("nvlink|nvswitch", words):
        name = _PCIE.get(_chip(home.device), name)
    link = names.link(name)
    if lines := re.search(r"(\d+) (?:inter-gpu )?(?:connects|links)\b", words):
        return _with_links(link, int(lines[1]))
    rate = machine.intra_bytes_per_s or _SLOWER_NVLINK.get(_chip(machine.device or ""), link.bytes_per_s)
    if abs(rate / link.bytes_per_s - 1) < _SAME:
        return link
    changes = {"name": f"{name}-{rate / 1e9:g}", "title": f"{link.label}, {rate / 1e9:g} GB/s of a device", "aliases": ()}
    return link.model_copy(update={**changes, "link_bytes_per_s": rate / link.links})


def _with_links(link: LinkSpec, links: int) -> LinkSpec:
    """As many of them as the source says a device has."""
    return link.model_copy(update={"name": f"{link.name}-{links}", "title": f"{links} × {link.label}", "aliases": (), "links": links})


# -- between nodes -----------------------------------------------------------------------------------------------------------------------


def _network(machine: Machine, home: NodeSpec, names: Catalog) -> LinkSpec:
    """The kind of network in the row's words; the usual one of the node where they name none."""
    usual = names.link(home.network or "")
    for pattern, name in _NETWORKS:
        if re.search(pattern, machine.inter_text.lower()):
            if name is None:
                break
            port = min(round(usual.bytes_per_s * 8 / 1e9), _LARGEST_PORT.get(name.split("-")[0], 0))
            return names.link(name.format(port))
    return usual


def _usual_rate(home: NodeSpec, names: Catalog) -> float:
    """Bytes/s of one device, each direction, out of its usual node."""
    return names.link(home.network or "").bytes_per_s * home.ports / home.devices
