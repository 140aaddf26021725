"""Known models at their published sizes: `build("gpt3-175b")`. On the meta device, the default, no weights are allocated.

    presets.toml ──▶ catalog: Preset ──▶ build ──▶ (model, batch)

The data are in presets.toml; the code of a model comes from transformers or diffusers where they have it, else from a file here.
"""

from shardwise.presets.builder import build
from shardwise.presets.catalog import Preset, describe, exists, names, unknown

__all__ = ["Preset", "build", "describe", "exists", "names", "unknown"]
