"""presets.toml as `Preset`s, found by name.

A model's entry completes its family's: values are merged, any other key of the model replaces the family's.
"""

from __future__ import annotations

import difflib
import functools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from shardwise.errors import ModelError

__all__ = ["Preset", "describe", "exists", "names", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model at a published size.

    architecture: `package:Class`; values: its configuration; batch: which maker of `batches` makes its batch.
    depth: the values that count layers; first_layers: how many at the start are unlike the rest, which repeat with `period`.
    batch_size: samples of a step; sequence: tokens of a sample (sound: samples at 16 kHz; proteins: residues), None where it has none.
    parameters: as published, tied ones once; source: paper and table.
    """

    name: str
    family: str
    aliases: tuple[str, ...] = ()
    architecture: str
    values: Mapping[str, Any]
    batch: str
    batch_size: int
    sequence: int | None = None
    depth: tuple[str, ...] = ()
    first_layers: int = 0
    period: int = 1
    parameters: float
    source: str
    note: str = ""

    @property
    def layers(self) -> int | None:
        """As published; of an encoder and a decoder, each one's. None for a model without repeated layers."""
        return self.values[self.depth[0]] if self.depth else None

    @property
    def shallow(self) -> int | None:
        """The fewest layers that hold every kind of layer, the repeated ones twice: what must be captured to know the whole model."""
        return self.first_layers + 2 * self.period if self.depth else None

    def __str__(self) -> str:
        layers = f", {self.layers} layers" if self.depth else ""
        samples = f"{self.batch_size} x {self.sequence}" if self.sequence else f"{self.batch_size}"
        return f"{self.name}: {self.parameters / 1e9:.4g} B parameters{layers}, batch {samples}; {self.source}"


def names() -> tuple[str, ...]:
    """Of all presets, families together, small ones first."""
    return tuple(_catalog())


def describe(name: str) -> Preset:
    """The preset of that name or alias; case, hyphens, underscores and spaces do not count. Raises ModelError, with the nearest names."""
    if (found := _by_key().get(_key(name))) is None:
        raise ModelError(unknown(name))
    return found


def exists(name: str) -> bool:
    """Whether a preset has that name or alias."""
    return _key(name) in _by_key()


def unknown(name: str) -> str:
    """What to say about a name that no preset has."""
    keys = _by_key()
    near = dict.fromkeys(keys[key].name for key in difflib.get_close_matches(_key(name), keys, n=6, cutoff=0.5))
    nearest = f" Nearest: {', '.join(near)}." if near else ""
    return f"there is no preset {name!r}.{nearest} `python -m shardwise.presets` lists all {len(names())}."


@functools.cache
def _catalog() -> Mapping[str, Preset]:
    document = tomllib.loads(files("shardwise.presets").joinpath("presets.toml").read_text(encoding="utf-8"))
    return MappingProxyType({name: _preset(name, document["families"], entry) for name, entry in document["models"].items()})


def _preset(name: str, families: Mapping[str, Any], entry: Mapping[str, Any]) -> Preset:
    family = families[entry["family"]]
    merged = {**family, **entry, "values": MappingProxyType({**family.get("values", {}), **entry.get("values", {})})}
    tuples = {key: tuple(merged[key]) for key in ("aliases", "depth") if key in merged}
    return Preset(name=name, **{**merged, **tuples})


@functools.cache
def _by_key() -> Mapping[str, Preset]:
    return {_key(name): preset for preset in _catalog().values() for name in (preset.name, *preset.aliases)}


def _key(name: str) -> str:
    return re.sub(r"[-_\s]", "", name.lower())
