"""Builds the model that a command line names, with an example batch for it.

    gpt3-175b           a preset: a known model at its published size (`python -m shardwise.presets` lists all); random weights
    hf:config.json      a transformers configuration: its `architectures` names the class; random weights
    file.py:function    a function of the user's own that returns (model, batch)

Nothing is downloaded, unpickled or executed but the file that was named.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from shardwise import presets
from shardwise.errors import ModelError
from shardwise.presets import batches
from shardwise.presets.batches import Batch

__all__ = ["Batch", "call_function", "load_model"]

_FORMS = (
    "Use PRESET (such as gpt3-175b), hf:CONFIG.json (a transformers configuration) "
    "or FILE.py:FUNCTION (a function that returns the model and an example batch)."
)
_DEFAULT_BATCH = 8


def load_model(
    spec: str,
    *,
    batch_size: int | None = None,
    sequence: int | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[nn.Module, Batch]:
    """The model that `spec` names, in training mode, and an example batch (int64 and float32 tensors on the CPU, batch dim first).

    batch_size: of a configuration's batch, 8 if None; sequence: of a language model, in tokens, 256 or the configuration's limit
    if None; a preset has its published ones. device="meta" allocates no weights of a configuration's or preset's model, and no batch of
    a preset, which may be huge. Raises ModelError naming the part of `spec` that is wrong.
    """
    if spec.startswith("hf:"):
        return _from_configuration(Path(spec[3:]), batch_size or _DEFAULT_BATCH, sequence, seed, device)
    path, colon, function = spec.rpartition(":")
    if not colon and not function.endswith(".py"):
        return _from_preset(function, batch_size, sequence, seed, device)
    if not colon or not path.endswith(".py") or not function:
        raise ModelError(f"cannot read the model specification {spec!r}. {_FORMS}")
    if sequence is not None:
        raise ModelError(
            f"--sequence {sequence} has no effect with {spec}: its function makes the batch. Leave it out, or change the function."
        )
    return _from_function(Path(path), function, seed)


# ---- a preset -------------------------------------------------------------------------------------------------------------------------


def _from_preset(name: str, batch_size: int | None, sequence: int | None, seed: int, device: str) -> tuple[nn.Module, Batch]:
    if not presets.exists(name):
        raise ModelError(f"cannot read the model specification {name!r}: {presets.unknown(name)} {_FORMS}")
    return presets.build(name, batch_size=batch_size, sequence=sequence, seed=seed, device=device)


# ---- a user's own function ------------------------------------------------------------------------------------------------------------


def _from_function(path: Path, name: str, seed: int) -> tuple[nn.Module, Batch]:
    return _checked(_called(path, name, "model, batch", seed), f"{path}:{name}")


def call_function(spec: str) -> Any:
    """What the function of FILE.py:FUNCTION returns. Raises ModelError where there is none, or it raises."""
    path, _, name = spec.rpartition(":")
    return _called(Path(path), name, "dataset")


def _called(path: Path, name: str, returned: str, seed: int = 0) -> Any:
    function = getattr(_import_file(path), name, None)
    if not callable(function):
        raise ModelError(f"{path} has no function {name!r}. Define `def {name}(): ... return {returned}` there.")
    torch.manual_seed(seed)
    try:
        return function()
    except Exception as error:
        raise ModelError(f"{path}:{name} raised {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ModelError(f"there is no file {path}. {_FORMS}")
    name = path.stem
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules.setdefault(name, module)  # dataclasses and torch.export look classes up there
    sys.path.insert(0, str(path.resolve().parent))  # so that it may import its neighbours, as `python file.py` does
    try:
        found.loader.exec_module(module)
    except Exception as error:
        raise ModelError(f"importing {path} raised {type(error).__name__}: {error}") from error
    return module


def _checked(result: Any, origin: str) -> tuple[nn.Module, Batch]:
    expected = f"{origin} must return (model, batch): an nn.Module and a dict of tensors that are its keyword arguments"
    if not isinstance(result, tuple) or len(result) != 2:
        raise ModelError(f"{expected}; it returned {_described(result)}.")
    model, batch = result
    if not isinstance(model, nn.Module):
        raise ModelError(f"{expected}; the first thing it returned is {_described(model)}.")
    if not isinstance(batch, Mapping) or not batch or not all(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(dict(batch))):
        raise ModelError(f"{expected}; the second thing it returned is {_described(batch)}.")
    return model.train(), dict(batch)


def _described(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    if isinstance(value, Mapping):
        return "a dict of " + (", ".join(f"{key}: {type(one).__name__}" for key, one in value.items()) or "nothing")
    return f"a {type(value).__name__}"


# ---- a transformers configuration ---------------------------------------------------------------------------------------------------


def _from_configuration(path: Path, batch_size: int, sequence: int | None, seed: int, device: str) -> tuple[nn.Module, Batch]:
    values = _read_configuration(path)
    architecture = _architecture(values, path)
    make_batch = _batch_maker(architecture, path)
    config = _configuration(values, path)
    torch.manual_seed(seed)
    with torch.device(device):
        model = _model_class(architecture, path)(config)
    batch = make_batch(config, batch_size, sequence, batches.Draw("cpu", seed))
    return model.train(), batch


def _read_configuration(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(f"there is no configuration file {path}. {_FORMS}")
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise ModelError(f'{path} is no transformers configuration: it has no key `model_type` (such as "llama").')
    return values


def _architecture(values: dict[str, Any], path: Path) -> str:
    names = values.get("architectures") or []
    if len(names) != 1:
        raise ModelError(f'{path}: `architectures` must name one class, such as ["LlamaForCausalLM"]; it names {len(names)}.')
    return str(names[0])


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise ModelError("hf: needs the package transformers: pip install 'shardwise[all]'") from error
    return transformers


def _configuration(values: dict[str, Any], path: Path) -> Any:
    rest = {key: value for key, value in values.items() if key != "model_type"}
    try:
        config = _transformers().AutoConfig.for_model(values["model_type"], **rest)
    except Exception as error:  # transformers raises many kinds: unknown model types, values that fail its own checks
        raise ModelError(f"{path}: transformers does not accept this configuration: {error}") from error
    config.use_cache = False
    return config


def _model_class(architecture: str, path: Path) -> Callable[[Any], nn.Module]:
    found = getattr(_transformers(), architecture, None)
    if found is None:
        raise ModelError(f"{path}: transformers {_transformers().__version__} has no class {architecture!r}.")
    return found


def _batch_maker(architecture: str, path: Path) -> batches.Maker:
    for suffix, make in _BATCHES.items():
        if architecture.endswith(suffix):
            return make
    known = ", ".join(f"*{suffix}" for suffix in _BATCHES)
    raise ModelError(
        f"{path}: no example batch is known for {architecture}, only for {known}. Use FILE.py:FUNCTION and return a batch of your own."
    )


_BATCHES: dict[str, batches.Maker] = {
    "ForCausalLM": batches.causal,
    "LMHeadModel": batches.causal,
    "ForMaskedLM": batches.masked,
    "ForImageClassification": batches.image_classes,
}
