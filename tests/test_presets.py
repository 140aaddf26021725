"""Presets: their sizes are the published ones, their batches fit, they can be captured without weights."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

from shardwise import presets
from shardwise.capture.export import capture
from shardwise.errors import ModelError
from shardwise.models import load_model
from shardwise.presets import builder
from shardwise.presets.batches import MAKERS

FAMILIES = {presets.describe(name).family: name for name in reversed(presets.names())}  # family → its smallest
TEXTLESS = ("vit-b16", "dit-xl2", "stable-diffusion-1", "dlrm")  # without a sequence

# Twins of one layer, run on real tensors: one for each kind of batch.
RUN = {
    "gpt3-125m": {"layers": 1, "sequence": 16},
    "bert-base": {"layers": 1, "sequence": 16},
    "t5-small": {"layers": 1, "sequence": 32},
    "vit-b16": {"layers": 1},
    "wav2vec2-base": {"layers": 1, "sequence": 2000},
    "whisper-tiny": {"layers": 1, "sequence": 8},
    "dit-xl2": {"layers": 1},
    "evoformer": {"layers": 1, "sequence": 16},
}


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", presets.names())
def test_the_parameters_are_as_many_as_published(name: str) -> None:
    model, batch = presets.build(name)
    assert model.training
    assert parameters(model) == pytest.approx(presets.describe(name).parameters, rel=0.02)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers(), *batch.values()))
    assert {len(tensor) for tensor in batch.values()} == {presets.describe(name).batch_size}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shallow_twin_is_captured_from_shapes_alone(family: str) -> None:
    preset = presets.describe(FAMILIES[family])
    layers = None if preset.layers is None else min(preset.shallow or 1, 4)
    model, batch = presets.build(preset.name, layers=layers if family != "stable-diffusion" else 1, batch_size=2)
    graph = capture(model, batch)
    assert graph.global_batch == 2
    assert not graph.kept
    assert graph.blocks or preset.layers is None or family == "stable-diffusion"
    trained = [name for name, value in graph.parameters.items() if value.requires_grad]
    assert len(trained) > 0.9 * len(list(model.parameters()))


@pytest.mark.parametrize(("name", "settings"), RUN.items(), ids=RUN)
def test_a_twin_of_one_layer_runs(name: str, settings: dict[str, int]) -> None:
    model, batch = presets.build(name, batch_size=2, device="cpu", **settings)
    output = model(**batch)
    loss = output if isinstance(output, torch.Tensor) else output.loss
    assert loss.isfinite()


def test_dlrm_computes_pairs_of_vectors() -> None:
    from shardwise.presets.dlrm import Dlrm

    model = Dlrm(rows=[7, 5], width=4, bottom=[3, 4], top=[8, 1])
    assert model.top[0].in_features == 4 + 3  # three vectors, so three pairs
    batch = {"dense": torch.randn(6, 3), "categories": torch.tensor([[6, 4]] * 6), "clicked": torch.ones(6)}
    model(**batch).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["gpt3-175b", "llama3-405b", "t5-11b", "deepseek-v3"])
def test_parameters_grow_by_a_layer_at_a_time(name: str) -> None:
    """So that a whole model is known from shallow twins of it."""
    preset = presets.describe(name)
    assert preset.layers is not None
    first = preset.first_layers
    few = [parameters(presets.build(name, layers=first + count)[0]) for count in (1, 2, 3)]
    one, other = (after - before for before, after in pairwise(few))
    assert one == other
    assert few[0] + (preset.layers - first - 1) * one == parameters(presets.build(name)[0])


def test_names_and_aliases_are_unique() -> None:
    every = [presets.describe(name) for name in presets.names()]
    spoken = [name.lower().replace("-", "") for each in every for name in (each.name, *each.aliases)]
    assert len(set(spoken)) == len(spoken)
    assert all(each.source and each.batch in MAKERS for each in every)


@pytest.mark.parametrize("name", ["gpt3-175b", "GPT-3-175B", "gpt3_175b", "GPT-3"])
def test_names_are_read_as_people_write_them(name: str) -> None:
    assert presets.describe(name).name == "gpt3-175b"


def test_a_preset_describes_itself() -> None:
    preset = presets.describe("llama3-405b")
    assert (preset.layers, preset.batch_size, preset.sequence, preset.shallow) == (126, 2048, 8192, 2)
    assert str(preset).startswith("llama3-405b: 405.9 B parameters, 126 layers, batch 2048 x 8192; Grattafiori")
    assert presets.describe("dlrm").layers is None


def test_the_list_of_presets() -> None:
    listed = subprocess.run([sys.executable, "-m", "shardwise.presets", "llama3"], capture_output=True, text=True, check=True).stdout
    assert "llama3-405b" in listed
    assert "gpt3" not in listed


# ---- as a model specification -----------------------------------------------------------------------------------------------------------


def test_a_specification_without_colon_is_a_preset() -> None:
    model, batch = load_model("gpt3-175b", batch_size=8, device="meta")
    assert parameters(model) == pytest.approx(175e9, rel=0.01)
    assert batch["input_ids"].shape == (8, 2048)


def test_an_unknown_name_gets_the_nearest_and_the_way_to_all() -> None:
    with pytest.raises(ModelError, match=r"'gpt3-170b'.* Nearest: .*gpt3-175b.*`python -m shardwise\.presets` lists all .*hf:CONFIG\.json"):
        load_model("gpt3-170b")
    with pytest.raises(ModelError, match=r"there is no preset 'lama3-8b'\. Nearest: llama3-8b"):
        presets.build("lama3-8b")
    with pytest.raises(ModelError, match=r"there is no preset 'zzz'\. `python"):
        presets.describe("zzz")


def test_a_model_larger_than_memory_is_refused_before_it_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "available_memory_bytes", lambda: 10**10)
    with pytest.raises(ModelError, match=r"llama2-13b's weights take 52\.0. GB in float32, but 10 GB .*`shardwise plan`\)\.$"):
        load_model("llama2-13b")
    with pytest.raises(ModelError, match=r"or take gpt3-1\.3b\."):
        load_model("gpt3-175b")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gpt3-125m", {"sequence": 4096}, r"--sequence 4096 is longer than .* 2048"),
        ("whisper-tiny", {"sequence": 449}, r"--sequence 449 is longer than .* 448"),
        *((name, {"sequence": 8}, "--sequence 8 has no effect on") for name in TEXTLESS),
        ("dlrm", {"layers": 3}, "layers=3 has no effect on dlrm"),
        ("gpt3-125m", {"layers": 0}, "layers=0 is not 1 or more"),
        ("gpt3-125m", {"batch_size": 0}, "batch_size=0 is not 1 or more"),
        ("gpt3-125m", {"sequence": -1}, "sequence=-1 is not 1 or more"),
    ],
)
def test_a_wrong_setting_is_refused(name: str, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        presets.build(name, **settings)  # type: ignore[arg-type]


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ModelError, match=r"sdxl needs the package diffusers: pip install 'shardwise\[all\]'"):
        presets.build("sdxl")
