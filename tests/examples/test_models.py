"""The models of examples/models: each is made as its file says, and a sample of them computes a loss."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

FILES = sorted((Path(__file__).resolve().parents[2] / "examples" / "models").glob("[a-z]*.py"))
NEEDED = {"diffusion": "diffusers"}  # file → the package that it takes models from, where the development extras do not have it
EVERY = 15  # so many models apart are those that are run


def load(path: Path) -> ModuleType:
    name = f"example_models_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def functions(path: Path) -> list[str]:
    """Names of the public functions that the file defines."""
    module = load(path)
    made = [name for name, each in vars(module).items() if inspect.isfunction(each) and each.__module__ == module.__name__]
    return [name for name in made if not name.startswith("_") and not inspect.signature(getattr(module, name)).parameters]


ALL = [(path, name) for path in FILES for name in functions(path)]


def made(path: Path, name: str) -> tuple[nn.Module, dict[str, object]]:
    if path.stem in NEEDED:
        pytest.importorskip(NEEDED[path.stem])
    return getattr(load(path), name)()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_says_what_it_holds(path: Path) -> None:
    module = load(path)
    assert module.__doc__ and module.__doc__.strip()
    assert sorted(functions(path)) == sorted(module.__all__)
    assert [name for name in module.__all__ if not (getattr(module, name).__doc__ or "").strip()] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_models_are_in_training_mode_with_a_batch_of_keyword_arguments(path: Path) -> None:
    for name in functions(path):
        model, batch = made(path, name)
        assert isinstance(model, nn.Module) and model.training, name
        assert isinstance(batch, dict) and all(isinstance(key, str) for key in batch), name
        assert any(isinstance(value, Tensor) for value in batch.values()), name
        assert any(parameter.requires_grad for parameter in model.parameters()), name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_second_call_makes_the_same_model(path: Path) -> None:
    name = functions(path)[0]
    (model, batch), (again, other) = made(path, name), made(path, name)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(value, other[key]) for key, value in batch.items() if isinstance(value, Tensor))


@pytest.mark.parametrize(("path", "name"), ALL[::EVERY], ids=lambda each: each if isinstance(each, str) else each.stem)
def test_a_sample_computes_a_finite_loss(path: Path, name: str) -> None:
    model, batch = made(path, name)
    output = model(**batch)
    loss = getattr(output, "loss", output)
    loss = loss["loss"] if isinstance(loss, dict) else loss
    assert loss.numel() == 1 and bool(torch.isfinite(loss.detach())) and loss.requires_grad
