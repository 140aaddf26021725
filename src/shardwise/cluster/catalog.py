"""Devices, links and nodes that can be bought or rented, with the source of every figure.

    catalog/devices.toml  ─▶ DeviceSpec   memory, bandwidth, peak flop/s by dtype
    catalog/links.toml    ─▶ LinkSpec     bytes/s in each direction, latency
    catalog/nodes.toml    ─▶ NodeSpec     so many of a device, on a link, with so many ports of a network

A figure is a number, or a table `{ value = 80e9, source = "where it stands" }`. Figures that no machine has are refused
(`shardwise.cluster.units`). Names are compared without case, spaces and hyphens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import resources
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from shardwise.cluster.documents import parsed, validated
from shardwise.cluster.units import plausible
from shardwise.errors import ClusterError

__all__ = ["DTYPES", "GIVEN", "LIST", "Catalog", "DeviceSpec", "InnerSpec", "LinkSpec", "NodeSpec", "catalog", "device", "link", "node"]

DTYPES: Final = ("float32", "tf32", "float16", "bfloat16", "fp8")
"""Keys of peak flop/s. tf32 is float32 on tensor cores, fp8 any 8-bit float."""

LIST: Final = "shardwise cluster"
"""The command that lists everything."""

GIVEN: Final = "given"
"""The source of a figure without one: whoever wrote it."""

_FALLBACKS: Final = {"tf32": ("float32",), "float16": ("float32",), "bfloat16": ("float32",), "fp8": ("bfloat16", "float16", "float32")}
_Count = Annotated[int, Field(ge=1)]
_Peak = Annotated[float, BeforeValidator(plausible("peak_flops"))]


class _Spec(BaseModel):
    """sources: by figure, such as ``memory_bytes`` or ``peak_flops.float16``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str = ""
    aliases: tuple[str, ...] = ()
    note: str = ""

    def __hash__(self) -> int:
        return hash((type(self), self.name))

    @property
    def label(self) -> str:
        """The title, else the name."""
        return self.title or self.name


class _Sourced(_Spec):
    sources: Mapping[str, str] = {}

    @model_validator(mode="before")
    @classmethod
    def _take_sources(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        sources: dict[str, str] = dict(values.get("sources", {}))
        return {**{key: _figure(key, value, sources) for key, value in values.items()}, "sources": sources}

    def source(self, figure: str) -> str:
        """Where a figure stands; GIVEN where nobody said."""
        return self.sources.get(figure, GIVEN)

    def figures(self) -> dict[str, float]:
        """All figures that are known, by the names that `source` takes."""
        found: dict[str, float] = {}
        for key, value in self:
            for name, figure in ((f"{key}.{inner}", each) for inner, each in value.items()) if key == "peak_flops" else ((key, value),):
                if isinstance(figure, int | float) and not isinstance(figure, bool):
                    found[name] = figure
        return found


def _figure(key: str, value: Any, sources: dict[str, str]) -> Any:
    """The number of `{ value, source }`, whose source is put with the others."""
    if not isinstance(value, Mapping) or key == "sources":
        return value
    if set(value) == {"value", "source"}:
        sources[key] = str(value["source"])
        return value["value"]
    return {inner: _figure(f"{key}.{inner}", each, sources) for inner, each in value.items()}


class DeviceSpec(_Sourced):
    """What one rank computes on.

    memory_bytes; memory_bytes_per_s: of its main memory; peak_flops: dense flop/s by DTYPES, float32 always;
    cores: SMs, compute units, TensorCores or CPU cores; power_w; price_per_hour: US dollars, list price on demand;
    node: the machine that it usually comes in.
    """

    memory_bytes: Annotated[int, BeforeValidator(plausible("memory_bytes"))]
    memory_bytes_per_s: Annotated[float, BeforeValidator(plausible("memory_bytes_per_s"))]
    peak_flops: Mapping[str, _Peak]
    cores: _Count | None = None
    power_w: Annotated[float, BeforeValidator(plausible("power_w"))] | None = None
    price_per_hour: Annotated[float, BeforeValidator(plausible("price_per_hour"))] | None = None
    node: str | None = None

    @model_validator(mode="after")
    def _dtypes(self) -> DeviceSpec:
        unknown = [dtype for dtype in self.peak_flops if dtype not in DTYPES]
        if unknown or "float32" not in self.peak_flops:
            wrong = f"no dtype {unknown[0]!r} is known" if unknown else "float32 is missing"
            raise ValueError(f"peak_flops: {wrong}; it takes float32, and {', '.join(DTYPES[1:])} where the device has them")
        return self

    def peak(self, dtype: str) -> float:
        """Dense flop/s of products in ``dtype``, one of DTYPES or torch's 8-bit floats; the rate of what computes it where the device
        does not know it: float32 for bfloat16 on a V100. ClusterError for any other dtype."""
        key = "fp8" if dtype.startswith("float8") else dtype
        for each in (key, *_FALLBACKS.get(key, ())):
            if each in self.peak_flops:
                return self.peak_flops[each]
        raise ClusterError(f"no peak of dtype {dtype!r} is known for {self.name}; known are {', '.join(DTYPES)}")


class LinkSpec(_Sourced):
    """What joins devices.

    links: how many of them a device has; link_bytes_per_s: of one, in each direction; latency_s: of one step between neighbours;
    shape: "switch", any pair at the full rate; "mesh", links straight to peers; "torus", to the nearest neighbours; "bus", through
    the host. reduction: whether its switches add up what passes through them.
    """

    kind: Literal["nvlink", "nvswitch", "pcie", "infiniband", "ethernet", "xgmi", "ici", "memory"]
    shape: Literal["switch", "mesh", "torus", "bus"] = "switch"
    links: _Count = 1
    link_bytes_per_s: Annotated[float, BeforeValidator(plausible("link_bytes_per_s"))]
    latency_s: Annotated[float, BeforeValidator(plausible("latency_s"))]
    reduction: Literal["never", "optional", "always"] = "never"

    @property
    def bytes_per_s(self) -> float:
        """Of one device, in each direction, over all its links."""
        return self.links * self.link_bytes_per_s


class InnerSpec(BaseModel):
    """A smaller set of neighbours within a node: ``devices`` of them, joined by ``link``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    devices: _Count
    link: str


class NodeSpec(_Spec):
    """A machine: ``devices`` of ``device`` joined by ``link``.

    inner: smaller sets within, innermost first; network, ports: what leads out of it, and how many ports of it all its devices
    have together; torus: the largest shape of its link; joins: what the set is called ("node", "rack", "slice").
    """

    device: str
    devices: _Count
    link: str
    inner: tuple[InnerSpec, ...] = ()
    network: str | None = None
    ports: _Count = 1
    torus: tuple[_Count, ...] | None = None
    joins: str = "node"
    source: str = GIVEN

    @model_validator(mode="after")
    def _shapes(self) -> NodeSpec:
        if self.torus is not None and math.prod(self.torus) != self.devices:
            raise ValueError(f"torus {list(self.torus)} holds {math.prod(self.torus)} devices, not {self.devices}")
        return self


_S = TypeVar("_S", bound=_Spec)


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """By name. Look-ups raise ClusterError with the nearest names."""

    devices: Mapping[str, DeviceSpec] = field(default_factory=dict)
    links: Mapping[str, LinkSpec] = field(default_factory=dict)
    nodes: Mapping[str, NodeSpec] = field(default_factory=dict)

    def device(self, name: str) -> DeviceSpec:
        """The device of that name or alias."""
        return _found(self.devices, name, "device")

    def link(self, name: str) -> LinkSpec:
        """The link of that name or alias, such as "nvswitch4", "NDR" or "25 GbE"."""
        return _found(self.links, name, "link")

    def node(self, name: str) -> NodeSpec:
        """The node of that name or alias."""
        return _found(self.nodes, name, "node")

    def home(self, name: str) -> tuple[NodeSpec, bool]:
        """The node of that name, or the usual one of the device of that name; and whether the name was a device's."""
        both: dict[str, DeviceSpec | NodeSpec] = {**self.nodes, **self.devices}
        found = _found(both, name, "device or node")
        if isinstance(found, NodeSpec):
            return found, False
        if found.node is None:
            raise ClusterError(f"device {found.name!r} has no usual node: name a node, or give the node's link in the file")
        return self.node(found.node), True

    def with_more(self, more: Catalog) -> Catalog:
        """Both; where names are equal, those of ``more``."""
        return Catalog(devices={**self.devices, **more.devices}, links={**self.links, **more.links}, nodes={**self.nodes, **more.nodes})


def _found(specs: Mapping[str, _S], name: str, what: str) -> _S:
    wanted = _plain(name)
    for spec in specs.values():
        if wanted in map(_plain, (spec.name, *spec.aliases)):
            return spec
    near = _near(specs.values(), wanted)
    hint = f"is it {' or '.join(near)}? " if near else ""
    raise ClusterError(f"no {what} {name!r} is known; {hint}`{LIST}` lists all")


def _near(specs: Iterable[_Spec], wanted: str) -> list[str]:
    """Up to three specs by the name of theirs that is nearest: those that begin so, then those that are spelled alike."""
    names = {_plain(each): (each, spec.name) for spec in specs for each in (spec.name, *spec.aliases)}
    begun = [each for each in names if wanted and each.startswith(wanted)]
    found: dict[str, str] = {}
    for each in (*begun, *get_close_matches(wanted, names, 9, cutoff=0.5)):
        name, spec = names[each]
        found.setdefault(spec, name)
    return list(found.values())[:3]


def _plain(name: str) -> str:
    return "".join(char for char in name.casefold() if char not in " -_")


class _Devices(BaseModel):
    entries: dict[str, DeviceSpec]


class _Links(BaseModel):
    entries: dict[str, LinkSpec]


class _Nodes(BaseModel):
    entries: dict[str, NodeSpec]


def named(tables: Any) -> Any:
    """Tables by name, each told its name."""
    if not isinstance(tables, Mapping):
        return tables
    return {name: {**body, "name": name} if isinstance(body, Mapping) else body for name, body in tables.items()}


@functools.cache
def catalog() -> Catalog:
    """All that is shipped, read once."""
    return Catalog(devices=_read("devices", _Devices).entries, links=_read("links", _Links).entries, nodes=_read("nodes", _Nodes).entries)


_F = TypeVar("_F", _Devices, _Links, _Nodes)


def _read(name: str, model: type[_F]) -> _F:
    file = f"catalog/{name}.toml"
    text = resources.files("shardwise.cluster").joinpath("catalog", f"{name}.toml").read_text(encoding="utf-8")
    return validated(model, {"entries": named(parsed(text, file))}, text, file)


def device(name: str) -> DeviceSpec:
    """A device of the catalog; ClusterError for an unknown name."""
    return catalog().device(name)


def link(name: str) -> LinkSpec:
    """A link of the catalog; ClusterError for an unknown name."""
    return catalog().link(name)


def node(name: str) -> NodeSpec:
    """A node of the catalog; ClusterError for an unknown name."""
    return catalog().node(name)
