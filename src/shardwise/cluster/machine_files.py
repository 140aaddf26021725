"""Machines in a TOML file.

    name = "two rooms"                       # optional, else the file's name

    [[groups]]                               # nodes in the order of their ranks
    nodes = 32
    node = "dgx-h100"                        # of the catalog, or of [nodes] below

    [[groups]]
    nodes = 32
    device = "mine"                          # of the catalog, or of [devices] below
    per_node = 8                             # where no node says how many
    link = "nvswitch4"                       # joins them; left out, they come in the device's usual node

    [[levels]]                               # what joins the nodes, innermost first; left out, the nodes' own network
    name = "room"
    nodes = 32                               # how many nodes one block joins; the last level joins all
    link = "NDR"
    ports = 8                                # of each node; left out, as many as it has of a network of that kind, else one
    sharp = true

    [[levels]]
    name = "site"
    link = "NDR"
    oversubscription = 4

    [devices.mine]                           # figures in bytes, bytes/s and flop/s: a number, or { value = 80e9, source = "…" }
    memory_bytes = 64e9
    memory_bytes_per_s = 2e12
    peak_flops = { float32 = 30e12, bfloat16 = 400e12 }

    [links.fast]
    kind = "ethernet"
    link_bytes_per_s = 12.5e9                # of one port, in each direction
    latency_s = 5e-6

    [nodes.box]
    device = "mine"
    devices = 4
    link = "pcie5"
    network = "fast"
    ports = 2                                # of all its devices together

Figures that no machine has are refused (`shardwise.cluster.units`). A level without link or ports has those of the level inside it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from shardwise.cluster.assemble import Fabric, Part, assemble
from shardwise.cluster.catalog import Catalog, DeviceSpec, LinkSpec, NodeSpec, catalog, named
from shardwise.cluster.documents import line_of, parsed, validated
from shardwise.cluster.topology import Machines
from shardwise.errors import ClusterError

__all__ = ["FileSpec", "GroupEntry", "LevelEntry", "is_machine_file", "read_machines"]

_Count = Annotated[int, Field(ge=1)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GroupEntry(_Table):
    """``[[groups]]``: nodes of one kind. Either node, or device with per_node and perhaps link, network and ports of a node of its own."""

    nodes: _Count = 1
    node: str | None = None
    device: str | None = None
    per_node: _Count | None = None
    link: str | None = None
    network: str | None = None
    ports: _Count | None = None

    @model_validator(mode="after")
    def _one_way(self) -> GroupEntry:
        if (self.node is None) == (self.device is None):
            raise ValueError("it wants either node or device")
        own = [name for name in ("network", "ports") if getattr(self, name) is not None]
        if self.link is None and own:
            raise ValueError(f"{own[0]} goes with link, where the group describes a node of its own; else name it in [[levels]]")
        if self.link is not None and (self.device is None or self.per_node is None):
            raise ValueError("a node of its own wants device, per_node and link")
        return self


class LevelEntry(_Table):
    """``[[levels]]``: what joins nodes."""

    name: str
    nodes: _Count | None = None
    link: str | None = None
    ports: _Count | None = None
    oversubscription: Annotated[float, Field(ge=1, le=1000)] = 1.0
    sharp: bool = False


class FileSpec(_Table):
    """A file of machines."""

    name: str = ""
    groups: Annotated[list[GroupEntry], Field(min_length=1)]
    levels: list[LevelEntry] = []
    devices: Annotated[dict[str, DeviceSpec], BeforeValidator(named)] = {}
    links: Annotated[dict[str, LinkSpec], BeforeValidator(named)] = {}
    nodes: Annotated[dict[str, NodeSpec], BeforeValidator(named)] = {}


def is_machine_file(path: Path) -> bool:
    """Whether a TOML file describes machines in this form, not one machine by what it reaches (`shardwise.cluster.described`)."""
    try:
        return "groups" in tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return False  # whoever reads it says what is wrong


def read_machines(path: Path) -> Machines:
    """The machines that a file describes; ClusterError says which line, key and value is wrong, and what is accepted."""
    file = f"cluster file {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ClusterError(f"{file} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(f"{file} cannot be read: {error}") from error
    spec = validated(FileSpec, parsed(text, file), text, file)
    names = catalog().with_more(Catalog(devices=spec.devices, links=spec.links, nodes=spec.nodes))
    parts, fabrics = [], []
    for node in spec.nodes.values():
        with _located(file, text, ("nodes", node.name)):
            _resolve(node, names)
    for index, entry in enumerate(spec.groups):
        with _located(file, text, ("groups", index)):
            parts.append(_part(entry, names))
    for index, level in enumerate(spec.levels):
        with _located(file, text, ("levels", index)):
            fabrics.append(_fabric(level, names))
    try:
        return assemble(spec.name or path.stem, parts, fabrics, names)
    except ClusterError as error:
        raise ClusterError(f"{file}: {error}") from None


@contextmanager
def _located(file: str, text: str, place: tuple[str | int, ...]) -> Iterator[None]:
    try:
        yield
    except ClusterError as error:
        raise ClusterError(f"{file}: line {line_of(text, place)}: {error}") from None


def _resolve(node: NodeSpec, names: Catalog) -> None:
    """All that a node names is known."""
    names.device(node.device)
    for link in (node.link, *(inner.link for inner in node.inner), *([node.network] if node.network else [])):
        names.link(link)


def _part(entry: GroupEntry, names: Catalog) -> Part:
    node = _node(entry, names)
    _resolve(node, names)
    return Part(node=node, nodes=entry.nodes, per_node=entry.per_node or node.devices)


def _node(entry: GroupEntry, names: Catalog) -> NodeSpec:
    if entry.node is not None:
        return names.node(entry.node)
    assert entry.device is not None
    device = names.device(entry.device)
    if entry.link is not None:
        assert entry.per_node is not None
        title = f"a node of {entry.per_node} {device.name}"
        return NodeSpec(
            name=title, device=device.name, devices=entry.per_node, link=entry.link, network=entry.network, ports=entry.ports or 1
        )
    if device.node is None:
        raise ClusterError(f"device {device.name!r} has no usual node: give link, and per_node, of the group's own")
    return names.node(device.node)


def _fabric(entry: LevelEntry, names: Catalog) -> Fabric:
    return Fabric(
        name=entry.name,
        nodes=entry.nodes,
        link=None if entry.link is None else names.link(entry.link),
        ports=entry.ports,
        oversubscription=entry.oversubscription,
        sharp=entry.sharp,
    )
