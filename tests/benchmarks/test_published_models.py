"""Shallow twins of published models: as large as the whole model says, captured from shapes alone, with the attention asked for."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.published_models import ShallowModel, TwinError, parameters, twin
from benchmarks.published_rows import Model, read_directory
from torch import nn

from shardwise.capture.export import capture
from shardwise.capture.graph import Graph

TABLES = os.environ.get("SHARDWISE_PUBLISHED")  # a folder of files of published rows; unset: the models below alone

GPT = Model(family="decoder", arch="gpt", layers=96, hidden=12288, heads=96, ffn=49152, vocab=51200, seq_len=2048, params=174.6e9)
LLAMA = Model(
    family="decoder",
    arch="llama3",
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=8,
    ffn=14336,
    gated=True,
    vocab=128256,
    seq_len=8192,
    params=8.03e9,
)
DEEPSEEK = Model(
    family="moe",
    arch="deepseek_v3",
    layers=61,
    hidden=7168,
    heads=128,
    ffn=18432,
    gated=True,
    vocab=129280,
    seq_len=4096,
    params=671e9,
    experts=256,
    topk=8,
    moe_ffn=2048,
    shared_ffn=2048,
    dense_layers=3,
    mla=True,
)
MIXTRAL = replace(LLAMA, family="moe", arch="mixtral 8x7b", vocab=32000, params=46.7e9, experts=8, topk=2, moe_ffn=14336)
T5 = Model(
    family="encoder-decoder",
    arch="t5-v1.1-large",
    layers=24,
    hidden=1024,
    heads=16,
    head_dim=64,
    ffn=2816,
    gated=True,
    seq_len=512,
    params=783e6,
)
BERT = Model(family="encoder", arch="bert-large", layers=24, hidden=1024, heads=16, ffn=4096, vocab=30522, seq_len=512, params=340e6)

# Model, the class it is built of, and the runs of equal blocks: (in the twin, in the model). Parameters are the published ones.
FAMILIES: dict[str, tuple[Model, str, list[tuple[int, int]]]] = {
    "gpt": (GPT, "GPT2LMHeadModel", [(3, 96)]),
    "llama": (LLAMA, "LlamaForCausalLM", [(3, 32)]),
    "qwen3": (
        replace(LLAMA, arch="qwen3 8b", layers=36, head_dim=128, ffn=12288, vocab=151936, params=8.19e9),
        "Qwen3ForCausalLM",
        [(3, 36)],
    ),
    "nemotron": (
        replace(GPT, arch="nemotron4 (squared-ReLU)", layers=32, hidden=6144, heads=48, kv_heads=8, ffn=24576, vocab=256000, params=15.6e9),
        "ArceeForCausalLM",
        [(3, 32)],
    ),
    "mixtral": (MIXTRAL, "MixtralForCausalLM", [(3, 32)]),
    "qwen3-moe": (
        replace(
            MIXTRAL,
            arch="qwen3 moe",
            layers=48,
            hidden=2048,
            kv_heads=4,
            head_dim=128,
            ffn=6144,
            vocab=151936,
            params=30.5e9,
            experts=128,
            topk=8,
            moe_ffn=768,
        ),
        "Qwen3MoeForCausalLM",
        [(3, 48)],
    ),
    "glm-4.5-air": (
        replace(
            MIXTRAL,
            arch="glm-4.5-air",
            layers=46,
            heads=96,
            head_dim=128,
            ffn=10944,
            vocab=151552,
            params=106e9,
            experts=128,
            topk=8,
            moe_ffn=1408,
            shared_ffn=1408,
            dense_layers=1,
        ),
        "Glm4MoeForCausalLM",
        [(3, 45)],
    ),
    "deepseek": (DEEPSEEK, "DeepseekV3ForCausalLM", [(3, 3), (3, 58)]),
    "kimi": (
        replace(DEEPSEEK, arch="kimi_k2", heads=64, vocab=163840, params=1.04e12, experts=384, dense_layers=1),
        "DeepseekV3ForCausalLM",
        [(3, 60)],
    ),
    "bert": (BERT, "BertForMaskedLM", [(3, 24)]),
    "t5": (T5, "T5ForConditionalGeneration", [(3, 23), (3, 23)]),
    "vit": (
        Model(family="vit", arch="vit-B/16", layers=12, hidden=768, heads=12, ffn=3072, seq_len=197, params=86.6e6),
        "ViTForImageClassification",
        [(3, 12)],
    ),
}


def captured(made: ShallowModel) -> Graph:
    return capture(made.module, made.batch)


def names(graph: Graph) -> Counter[str]:
    """How often each operator stands in the second block of the first run."""
    return Counter(op.name.split(".")[1] for op in graph.blocks[0][1])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_twin_is_captured_and_as_large_as_the_model(name: str) -> None:
    model, architecture, runs = FAMILIES[name]
    made = twin(model, micro_batch=2)
    assert type(made.module).__name__ == architecture and made.module.training
    assert parameters(made) == pytest.approx(model.params, rel=0.05)
    assert all(each.is_meta and each.dtype == torch.bfloat16 for each in made.module.parameters())
    assert {len(each) for each in made.batch.values()} == {2} and all(each.is_meta for each in made.batch.values())
    graph = captured(made)
    assert not graph.kept
    assert [(len(run), count) for run, count in zip(graph.blocks, made.counts, strict=True)] == runs


@pytest.mark.parametrize("layers", [1, 2])
def test_a_model_of_few_blocks_has_them_all(layers: int) -> None:
    made = twin(replace(GPT, layers=layers, params=None), micro_batch=1)
    assert made.counts == ((2,) if layers == 2 else ())
    assert [len(run) for run in captured(made).blocks] == list(made.counts)
    assert parameters(made) == sum(each.numel() for each in made.module.parameters())


# -- attention ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [GPT, LLAMA, DEEPSEEK], ids=["gpt", "llama", "deepseek"])
def test_fused_attention_is_one_causal_operator(model: Model) -> None:
    graph = captured(twin(model, micro_batch=1))
    (attention,) = (op for op in graph.blocks[0][1] if "scaled_dot_product" in op.name)
    assert attention.argument(5, "is_causal", False) is True
    assert len(attention.inputs) == 3  # no mask
    assert names(graph)["softmax"] == 0


def test_attention_before_it_was_fused_is_written_out() -> None:
    graph = captured(twin(GPT, micro_batch=1, fused_attention=False))
    found = names(graph)
    assert found["scaled_dot_product_attention"] == 0
    assert (found["matmul"], found["softmax"]) == (2, 1)
    (scores,) = (op.outputs[0] for op in graph.blocks[0][1] if op.name.startswith("aten.softmax"))
    assert scores.shape == (1, 96, 2048, 2048) and scores.dtype == torch.bfloat16


def test_t5_s_position_bias_keeps_its_attention_from_being_fused() -> None:
    encoder, decoder = (Counter(op.name for op in run[1]) for run in captured(twin(T5, micro_batch=1)).blocks)
    fused = "aten.scaled_dot_product_attention.default"
    assert (encoder[fused], decoder[fused]) == (0, 1)  # what the decoder sees of the encoder has no bias


def dropped(made: ShallowModel) -> Counter[str]:
    return Counter(op.name for op in captured(made).blocks[0][1] if "dropout" in op.name)


@pytest.mark.parametrize(
    ("arch", "fused", "dropout", "count"),
    [
        ("gpt", True, None, 2),  # after attention and after the MLP
        ("gpt", False, None, 3),  # and of the scores
        ("gpt", False, 0.0, 0),
        ("mpt", True, None, 0),
        ("gpt3 175b", True, None, 0),
        ("gpt3 175b", True, 0.1, 2),
    ],
)
def test_dropout_is_that_of_the_family(arch: str, fused: bool, dropout: float | None, count: int) -> None:
    made = twin(replace(GPT, arch=arch), micro_batch=1, fused_attention=fused, dropout=dropout)
    assert dropped(made).total() == count


SMALL = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": None, "head_dim": 16, "ffn": 96, "vocab": 128, "seq_len": 16, "params": None}


def on_cpu(model: Model, *, fused: bool) -> ShallowModel:
    """With random parameters and tokens, in float64."""
    made = twin(model, micro_batch=2, fused_attention=fused, dropout=0.0, dtype=torch.float64)
    module = made.module.to_empty(device="cpu").double()
    torch.manual_seed(0)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.normal_(0, 0.1)
    batch = {name: torch.randint(0, 128, each.shape) for name, each in made.batch.items()}
    return ShallowModel(module=module, batch=batch, counts=made.counts)


def loss(made: ShallowModel) -> float:
    return made.module(**made.batch).loss.item()


@pytest.mark.parametrize(("model", "kv_heads"), [(GPT, 4), (LLAMA, 2), (T5, 4)], ids=["gpt", "llama", "t5"])
@pytest.mark.parametrize("fused", [True, False])
def test_both_attentions_compute_what_the_library_s_does(model: Model, kv_heads: int, fused: bool) -> None:
    made = on_cpu(replace(model, **(SMALL | {"kv_heads": kv_heads})), fused=fused)
    ours = loss(made)
    made.module.set_attn_implementation("eager")  # type: ignore[operator]
    assert loss(made) == pytest.approx(ours, rel=1e-12)


def test_latent_keys_and_values_are_the_library_s() -> None:
    small: dict[str, Any] = SMALL | {"kv_heads": 4, "experts": 8, "topk": 2, "moe_ffn": 32, "shared_ffn": 32, "dense_layers": 1}
    made = on_cpu(replace(DEEPSEEK, **small), fused=False)
    ours = loss(made)
    replaced = [part for part in made.module.modules() if "expand_kv" in vars(part)]
    assert len(replaced) == 2
    for part in replaced:
        del part.expand_kv
    assert loss(made) == pytest.approx(ours, rel=1e-12)


# -- numbers -----------------------------------------------------------------------------------------------------------------------------


def test_experts_are_one_graph() -> None:
    found = names(captured(twin(MIXTRAL, micro_batch=1)))
    assert (found["expert_mm"], found["topk"]) == (2, 1)


def test_a_rank_s_experts_leave_the_router_and_the_rows_whole() -> None:
    whole, local = (captured(twin(DEEPSEEK, micro_batch=1, local_experts=held)) for held in (None, 4))
    for graph, held in ((whole, 256), (local, 4)):
        first, _ = (op for op in graph.blocks[1][1] if "expert_mm" in op.name)
        assert first.inputs[0].shape == (4096 * 8, 7168) and first.inputs[1].shape == (held, 7168, 4096)
        (topk,) = (op for op in graph.blocks[1][1] if "topk" in op.name)
        assert topk.inputs[0].shape == (4096, 256)


@pytest.mark.parametrize(("vocab", "padded"), [(None, 50304), (50257, 50304), (51200, 51200)])
def test_a_vocabulary_is_padded(vocab: int | None, padded: int) -> None:
    made = twin(replace(GPT, vocab=vocab, params=None), micro_batch=1)
    assert made.module.get_parameter("lm_head.weight").shape[0] == padded


@pytest.mark.parametrize(("params", "tied"), [(1.236e9, True), (1.498e9, False), (None, False)])
def test_the_head_is_tied_where_that_fits_the_parameters(params: float | None, tied: bool) -> None:
    llama_1b = replace(LLAMA, layers=16, hidden=2048, head_dim=64, ffn=8192, params=params)
    module = twin(llama_1b, micro_batch=1).module
    assert (module.get_parameter("lm_head.weight") is module.get_parameter("model.embed_tokens.weight")) is tied


def test_heads_that_do_not_divide_the_width_are_the_nearest_that_do() -> None:
    module: Any = twin(replace(GPT, hidden=13824, heads=80, ffn=55296, params=None), micro_batch=1).module
    assert module.config.n_head == 72


def test_heads_narrower_than_their_share_of_the_width_are_rotary() -> None:
    module: Any = twin(replace(GPT, heads=32, head_dim=256, params=None), micro_batch=1).module
    assert type(module).__name__ == "ArceeForCausalLM" and module.config.head_dim == 256


def test_batches_have_the_row_s_lengths() -> None:
    assert twin(T5, micro_batch=3).batch["labels"].shape == (3, 114)
    assert twin(replace(T5, decoder_seq=128), micro_batch=3).batch["decoder_input_ids"].shape == (3, 128)
    image = Model(family="vit", arch="vit-G/14", layers=4, hidden=128, heads=2, ffn=256, seq_len=257)
    pixels = twin(image, micro_batch=5, dtype=torch.float32).batch["pixel_values"]
    assert pixels.shape == (5, 3, 224, 224) and pixels.dtype == torch.float32


@pytest.mark.parametrize(
    ("model", "micro_batch", "message"),
    [
        (Model(family="cnn", arch="amoebanet-d"), 1, r"amoebanet-d: the rows do not state the shapes of its layers \(cnn\)"),
        (Model(family="hybrid", arch="mamba2"), 1, "mamba2: .* state-space"),
        (Model(family="diffusion", arch="unet"), 1, "unet: .* U-Net"),
        (replace(GPT, ffn=None, seq_len=None), 1, "gpt: not stated: ffn, seq_len"),
        (replace(T5, experts=8), 1, "experts in a model of family encoder-decoder"),
        (replace(BERT, heads=15), 1, "bert-large: BertForMaskedLM does not take its numbers: .*15"),
        (GPT, 0, "micro_batch=0 is not 1 or more"),
    ],
)
def test_what_cannot_be_built_says_why(model: Model, micro_batch: int, message: str) -> None:
    with pytest.raises(TwinError, match=message):
        twin(model, micro_batch=micro_batch)


# -- real tables -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(TABLES is None, reason="SHARDWISE_PUBLISHED names no folder")
def test_every_published_model_with_a_shape_is_built_to_size() -> None:
    models = {row.model for table in read_directory(Path(TABLES or "")) for row in table.rows if row.model.has_shape}
    stated = [model for model in models if model.params]
    off = [model.arch for model in stated if abs(parameters(twin(model, micro_batch=1)) / (model.params or 1) - 1) > 0.05]
    assert len(off) <= 0.05 * len(stated), off
    for model in models - set(stated):
        assert isinstance(twin(model, micro_batch=1).module, nn.Module)
