"""Machines in one line.

    h100:2048x8                                   2,048 nodes of 8 H100, as they usually come
    a100-80g:16                                   16 devices, in whole nodes
    gb200:8x72                                    8 racks
    dgx-h100:4                                    4 nodes
    1x8 a100-80g + 2x4 rtx4090, 25 GbE            unequal nodes, and what joins them
    h100:64x8, 8xNDR, oversubscribed 2, SHARP     8 ports a node, 2 : 1, with switches that add up

    spec    =  part { "+" part } { "," option }
    part    =  NAME [ ":" count ]  |  count NAME           NAME of a device or of a node
    count   =  NODES "x" DEVICES   |  NUMBER               of devices, or of nodes where the name is a node's
    option  =  [ PORTS "x" ] LINK  |  "oversubscribed" NUMBER  |  "SHARP"

Without a link, nodes are joined by their own network. Without ports, a node has as many as of its own network where that is of the
same kind (InfiniBand, Ethernet), else one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from shardwise.cluster.assemble import Fabric, Part, assemble
from shardwise.cluster.catalog import LIST, Catalog, catalog
from shardwise.cluster.machine_files import read_machines
from shardwise.cluster.topology import Machines
from shardwise.errors import ClusterError

__all__ = ["Entry", "Spec", "machines", "parse_spec", "read_spec"]

_COUNT = re.compile(r"([0-9]+)(?:\s*[x×]\s*([0-9]+))?$")
_COUNT_FIRST = re.compile(r"([0-9]+(?:\s*[x×]\s*[0-9]+)?)\s+(\S.*)$")
_OVERSUBSCRIBED = re.compile(r"oversubscribed\b\s*(.*)$", re.IGNORECASE)
_PORTS = re.compile(r"([0-9]+)\s*[x×]\s*(\S.*)$")
_EXAMPLES = 'such as "h100:2048x8", "a100-80g:16" or "1x8 a100-80g + 2x4 rtx4090, 25 GbE"'


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A part of a line: nodes × per_node of ``name``; or ``number`` devices, or nodes where the name is a node's."""

    name: str
    nodes: int | None = None
    per_node: int | None = None
    number: int | None = None

    def __str__(self) -> str:
        return f"{self.name}:{self.number}" if self.number is not None else f"{self.name}:{self.nodes}x{self.per_node}"


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A line, taken apart. Its text is a line again."""

    entries: tuple[Entry, ...]
    network: str | None = None
    ports: int | None = None
    oversubscription: float = 1.0
    sharp: bool = False

    def __str__(self) -> str:
        options = [
            f"{self.ports}x{self.network}" if self.ports is not None else self.network or "",
            f"oversubscribed {self.oversubscription!r}" if self.oversubscription != 1 else "",
            "SHARP" if self.sharp else "",
        ]
        return ", ".join([" + ".join(map(str, self.entries)), *filter(None, options)])


def machines(spec: str | Path) -> Machines:
    """The machines that a line, or the path of a .toml file (`shardwise.cluster.machine_files`), describes; ClusterError for any other."""
    return read_machines(Path(spec)) if str(spec).endswith(".toml") else parse_spec(str(spec))


def parse_spec(line: str, known: Catalog | None = None) -> Machines:
    """The machines that a line describes; ClusterError says up to where it is understood, and what is wrong there."""
    names = known or catalog()
    spec = read_spec(line)
    try:
        parts = [_part(entry, names) for entry in spec.entries]
        link = None if spec.network is None else names.link(spec.network)
    except ClusterError as error:
        raise ClusterError(f"cluster {line!r}: {error}") from None
    fabric = Fabric(link=link, ports=spec.ports, oversubscription=spec.oversubscription, sharp=spec.sharp)
    return assemble(line.strip(), parts, [] if fabric == Fabric() else [fabric], names)


def read_spec(line: str) -> Spec:
    """A line taken apart, its names not looked up; ClusterError says up to where it is understood."""
    text, *options = line.split(",")
    entries: list[Entry] = []
    understood = ""
    for piece in text.split("+"):
        entries.append(_entry(piece.strip(), line, understood))
        understood += piece + "+"
    spec = Spec(entries=tuple(entries))
    understood = text + ","
    for option in options:
        spec = _with_option(spec, option.strip(), line, understood)
        understood += option + ","
    return spec


def _entry(piece: str, line: str, understood: str) -> Entry:
    first = _COUNT_FIRST.match(piece)
    if first:
        return _counted(first[2].strip(), first[1], line, understood)
    name, colon, count = piece.partition(":")
    if not name.strip():
        raise _stopped(line, understood, piece, f"here a device or a node is wanted, {_EXAMPLES}")
    if not colon:
        return Entry(name=name.strip(), number=1)
    return _counted(name.strip(), count.strip(), line, f"{understood}{name}:")


def _counted(name: str, count: str, line: str, understood: str) -> Entry:
    numbers = _COUNT.match(count)
    if numbers is None:
        raise _stopped(line, understood, count, "a count is NODESxDEVICES or a number of devices, such as 2x8 or 16")
    if 0 in [int(number) for number in numbers.groups() if number is not None]:
        raise _stopped(line, understood, count, "a count is 1 or more")
    if numbers[2] is None:
        return Entry(name=name, number=int(numbers[1]))
    return Entry(name=name, nodes=int(numbers[1]), per_node=int(numbers[2]))


def _with_option(spec: Spec, option: str, line: str, understood: str) -> Spec:
    if option.casefold() == "sharp":
        return replace(spec, sharp=True)
    oversubscribed = _OVERSUBSCRIBED.match(option)
    if oversubscribed:
        return replace(spec, oversubscription=_ratio(oversubscribed[1], line, understood))
    wanted = 'a link such as NDR, 8xNDR or 25 GbE, "oversubscribed 2" or SHARP'
    if not option:
        raise _stopped(line, understood, option, f"here an option is wanted: {wanted}")
    if spec.network is not None:
        raise _stopped(line, understood, option, f"one link joins the nodes, and {spec.network!r} is named already; an option is {wanted}")
    ports = _PORTS.match(option)
    if ports and int(ports[1]) == 0:
        raise _stopped(line, understood, option, "a node has 1 port or more")
    return replace(spec, network=ports[2], ports=int(ports[1])) if ports else replace(spec, network=option)


def _ratio(text: str, line: str, understood: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = 0.0
    if not 1 <= ratio <= 1000:
        raise _stopped(line, understood, f"oversubscribed {text}", "what follows is a number from 1 to 1000, such as oversubscribed 2")
    return ratio


def _stopped(line: str, understood: str, rest: str, why: str) -> ClusterError:
    upto = understood.strip()
    return ClusterError(f"cluster {line!r} is understood up to {upto!r}, but not {rest!r}: {why}" if upto else f"cluster {line!r}: {why}")


def _part(entry: Entry, names: Catalog) -> Part:
    node, is_device = names.home(entry.name)
    if entry.number is None:
        assert entry.nodes is not None and entry.per_node is not None
        return Part(node=node, nodes=entry.nodes, per_node=entry.per_node)
    if not is_device:
        return Part(node=node, nodes=entry.number, per_node=node.devices)
    if entry.number <= node.devices:
        return Part(node=node, nodes=1, per_node=entry.number)
    if entry.number % node.devices:
        below = entry.number - entry.number % node.devices
        raise ClusterError(
            f"{entry.number} {entry.name} do not fill nodes of {node.devices} ({node.label}); "
            f"give {below} or {below + node.devices}, or NODESxDEVICES; `{LIST}` lists other nodes"
        )
    return Part(node=node, nodes=entry.number // node.devices, per_node=node.devices)
