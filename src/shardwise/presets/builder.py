"""Builds a preset, whole or with another depth, with a batch for it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from shardwise.cluster.machine import available_memory_bytes
from shardwise.errors import ModelError
from shardwise.presets.batches import MAKERS, Batch, Draw
from shardwise.presets.catalog import Preset, describe, names
from shardwise.presets.denoise import Denoiser

__all__ = ["build"]


def build(
    name: str,
    *,
    layers: int | None = None,
    batch_size: int | None = None,
    sequence: int | None = None,
    seed: int = 0,
    device: str = "meta",
) -> tuple[nn.Module, Batch]:
    """The preset's model, in training mode, and a batch of keyword arguments of its forward, whose output is or has the loss.

    layers: another depth than the published one, of an encoder and a decoder alike; batch_size, sequence: the published ones if None.
    device: on "meta" neither weights nor batch take memory; elsewhere both are random, float32 and int64, of this seed.
    Raises ModelError for a name that no preset has, a setting without effect, a model too large for this machine's memory.
    """
    preset = describe(name)
    values = _with_layers(preset, layers)
    _check_positive(batch_size=batch_size, sequence=sequence)
    if sequence is not None and preset.sequence is None:
        raise ModelError(f"--sequence {sequence} has no effect on {preset.name}. Leave it out.")
    if torch.device(device).type == "cpu":
        _check_memory(preset, _model(preset, values, "meta", seed)[0])
    model, config = _model(preset, values, device, seed)
    batch = MAKERS[preset.batch](config, batch_size or preset.batch_size, sequence or preset.sequence, Draw(device, seed))
    return model, batch


def _with_layers(preset: Preset, layers: int | None) -> dict[str, Any]:
    if layers is None:
        return dict(preset.values)
    if not preset.depth:
        raise ModelError(f"layers={layers} has no effect on {preset.name}: it has no repeated layers. Leave it out.")
    _check_positive(layers=layers)
    return {**preset.values, **dict.fromkeys(preset.depth, layers)}


def _check_positive(**given: int | None) -> None:
    for name, value in given.items():
        if value is not None and value < 1:
            raise ModelError(f"{name}={value} is not 1 or more")


def _model(preset: Preset, values: Mapping[str, Any], device: str, seed: int) -> tuple[nn.Module, Any]:
    """The module, and its configuration with every value as an attribute."""
    package, _, name = preset.architecture.partition(":")
    found = _class(preset.name, package, name)
    torch.manual_seed(seed)
    with torch.device(device):
        if package == "transformers":
            config = found.config_class(**values)
            config.use_cache = False
            return found(config).train(), config
        made = found(**values)
    return (Denoiser(made) if package == "diffusers" else made).train(), SimpleNamespace(**values)


def _class(preset: str, package: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(package), name)
    except ImportError as error:
        raise ModelError(f"{preset} needs the package {package}: pip install 'shardwise[all]'") from error


def _check_memory(preset: Preset, model: nn.Module) -> None:
    """Refuses before anything is allocated."""
    needed, free = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())), available_memory_bytes()
    if needed <= free:
        return
    family = [each for each in map(describe, names()) if each.family == preset.family and 4 * each.parameters < free]
    smaller = f", or take {family[-1].name}" if family else ""
    raise ModelError(
        f"{preset.name}'s weights take {needed / 1e9:.4g} GB in float32, but {free / 1e9:.4g} GB of memory are free. "
        f"Plan it without weights (`shardwise plan`){smaller}."
    )
