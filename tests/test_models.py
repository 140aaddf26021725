"""Model specifications: what they build, and what a wrong one gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.errors import ModelError
from shardwise.models import load_model

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 64,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 32,
}
BERT = {
    "architectures": ["BertForMaskedLM"],
    "model_type": "bert",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
VIT = {
    "architectures": ["ViTForImageClassification"],
    "model_type": "vit",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}


def written(directory: Path, values: Any) -> str:
    path = directory / "config.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return f"hf:{path}"


@pytest.mark.parametrize("values", [LLAMA, GPT2, BERT], ids=lambda values: values["model_type"])
def test_a_language_model_and_its_batch(tmp_path: Path, values: dict[str, Any]) -> None:
    model, batch = load_model(written(tmp_path, values), batch_size=3)
    assert {name: tuple(value.shape) for name, value in batch.items()} == {"input_ids": (3, 32), "labels": (3, 32)}
    assert model.training
    loss = model(**batch).loss
    assert loss.isfinite()


def test_an_image_model_and_its_batch(tmp_path: Path) -> None:
    model, batch = load_model(written(tmp_path, VIT), batch_size=3)
    assert {name: tuple(value.shape) for name, value in batch.items()} == {"pixel_values": (3, 3, 32, 32), "labels": (3,)}
    assert model(**batch).loss.isfinite()


def test_a_masked_models_labels_are_mostly_ignored(tmp_path: Path) -> None:
    _, batch = load_model(written(tmp_path, BERT))
    share = (batch["labels"] != -100).float().mean().item()
    assert 0.05 < share < 0.3


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    spec = written(tmp_path, LLAMA)
    (one, first), (two, second), (other, _) = load_model(spec, seed=1), load_model(spec, seed=1), load_model(spec, seed=2)
    weights = [model.get_input_embeddings().weight for model in (one, two, other)]  # type: ignore[operator]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(first["input_ids"], second["input_ids"])


def test_on_the_meta_device_a_huge_model_takes_no_memory(tmp_path: Path) -> None:
    huge = LLAMA | {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128, "vocab_size": 128256}
    model, batch = load_model(written(tmp_path, huge), device="meta", batch_size=1, sequence=8)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not batch["input_ids"].is_meta


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{", "is not JSON"),
        ([1], "no key `model_type`"),
        ({"architectures": ["LlamaForCausalLM"]}, "no key `model_type`"),
        ({"model_type": "llama"}, "`architectures` must name one class.*it names 0"),
        (LLAMA | {"architectures": ["LlamaForTelepathy"]}, r"no example batch is known for LlamaForTelepathy, only for \*ForCausalLM"),
        (LLAMA | {"architectures": ["LamaForCausalLM"]}, "has no class 'LamaForCausalLM'"),
        (LLAMA | {"model_type": "lama"}, "does not accept this configuration"),
    ],
)
def test_a_wrong_configuration_is_named(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(written(tmp_path, values))


def test_a_sequence_over_the_limit_tells_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"--sequence 33 is longer than .* 32"):
        load_model(written(tmp_path, LLAMA), sequence=33)


def test_a_sequence_for_an_image_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="--sequence 8 has no effect"):
        load_model(written(tmp_path, VIT), sequence=8)


GOOD = """
import torch
from neighbour import WIDTH

def model_and_batch():
    return torch.nn.Linear(WIDTH, 1).eval(), {"input": torch.zeros(2, WIDTH)}
"""


def test_a_users_function(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("WIDTH = 5\n")
    (tmp_path / "mine_good.py").write_text(GOOD)
    model, batch = load_model(f"{tmp_path / 'mine_good.py'}:model_and_batch")
    assert model.training
    assert batch["input"].shape == (2, 5)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def other(): pass", "has no function 'model'"),
        ("def model(): return 3", "it returned a int"),
        ("def model(): return 1, 2, 3", "it returned a tuple of 3"),
        ("def model(): return 1, {}", "the first thing it returned is a int"),
        ("import torch\ndef model(): return torch.nn.Linear(1, 1), {}", "the second thing it returned is a dict of nothing"),
        ("import torch\ndef model(): return torch.nn.Linear(1, 1), {'x': 3}", "a dict of x: int"),
        ("def model(): return 1 / 0", "raised ZeroDivisionError: division by zero"),
        ("import nothing_of_this_name", "importing .* raised ModuleNotFoundError"),
        ("def model(:", "importing .* raised SyntaxError"),
    ],
)
def test_a_wrong_function_is_named(tmp_path: Path, source: str, message: str) -> None:
    path = tmp_path / "mine_wrong.py"
    path.write_text(source)
    with pytest.raises(ModelError, match=message):
        load_model(f"{path}:model")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gpt2", "cannot read the model specification 'gpt2'.*hf:CONFIG.json"),
        ("model.py", "cannot read"),
        ("model.py:", "cannot read"),
        ("nowhere.py:f", "there is no file nowhere.py"),
        ("hf:nowhere.json", "there is no configuration file nowhere.json"),
    ],
)
def test_a_wrong_specification_is_named(spec: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(spec)


def test_a_setting_without_effect_is_refused() -> None:
    with pytest.raises(ModelError, match=r"--sequence 8 has no effect with mine\.py:f"):
        load_model("mine.py:f", sequence=8)
