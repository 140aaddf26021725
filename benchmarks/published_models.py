"""A shallow twin of a published model: the same blocks, two or three of each kind, on the meta device.

    Model's numbers ──▶ Recipe (a class of transformers, its configuration, how often each block really stands) ──▶ ShallowModel

A decoder is a GPT-2 (learned positions, LayerNorm, biases, plain MLP), a Llama (rotary, RMSNorm, gated MLP; a Qwen3 where queries and keys
are normed) or, rotary and RMSNorm with a plain MLP, an Arcee. With experts it is a Mixtral or Qwen3-MoE, with a shared expert a GLM-4-MoE,
with latent attention a DeepSeek-V3. Encoders are BERTs, encoder-decoders T5s, image models ViTs. ALiBi is taken as learned positions, the
sliding window as none; a second token is not predicted.

Where code of transformers stands in the way of a small and faithful graph it is replaced: RMSNorm and GELU by torch's single operators,
attention (below), the router (no in-place operators, no groups of experts), the keys of latent attention, T5's buckets of positions.
Experts are written as batched products.

**Attention.** Fused: one operator that knows that it is causal, without a mask; dropout of its scores costs it nothing and is left out.
Not fused: scores, mask, softmax and dropout as operators of their own in the model's dtype, as Megatron's fused softmax wrote them until
FlashAttention (Dao et al. 2022, arXiv:2205.14135).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.published_rows import Model

__all__ = ["ShallowModel", "TwinError", "parameters", "twin"]

_BLOCKS = 3  # of a run that a twin has, so that one has equal neighbours on both sides
_VOCABULARY = {"encoder": 30522, "encoder-decoder": 32128, "vit": 1000}  # BERT's, T5's, ImageNet's classes; GPT-2's for any other
_GPT2_VOCABULARY = 50257
_MULTIPLE = 128  # Megatron-LM pads vocabularies to a multiple of this times the tensor ranks (its --make-vocab-size-divisible-by)
_GELU = "gelu_pytorch_tanh"  # one operator, unlike transformers' "gelu_new"
_DROPOUT = 0.1  # Megatron-LM's --hidden-dropout and --attention-dropout, BERT's and T5's
_NO_DROPOUT = re.compile(r"gpt-?3|mpt|bloom")  # GPT-3 as MLPerf and NeMo measure it (175b_mlperf.yaml, 2024); llm-foundry; BLOOM
_ROTARY = re.compile(r"maxtext|nemotron|neox|gpt-?j|falcon|palm|pythia|rotary|rope")
_SQUARED_RELU = re.compile(r"nemotron|squared.?relu|relu2")
_QUERY_NORM = re.compile(r"qwen-?3|qk.?norm")
_QUERY_BIAS = re.compile(r"qwen-?(1\.5|2)")
_PATCH = re.compile(r"/(\d+)\b")
_UNPADDED = 0.5  # of 512: what is no padding in BERT's second phase (Krell et al. 2021, arXiv:2107.02027, table 1: packing factor 2.0)
_T5_TARGETS = 114 / 512  # target tokens for each input token: T5 (arXiv:1910.10683), section 3.1.4
_LATENT = {  # DeepSeek-V3 technical report (arXiv:2412.19437), section 4.2; Kimi K2 has the same
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


class TwinError(ValueError):
    """A model that no twin can be made of. The message says why."""


@dataclass(frozen=True, kw_only=True)
class ShallowModel:
    """module: on the meta device, in training mode; its output has the loss. batch: keyword arguments of its forward.

    counts: how many blocks each run of equal blocks has in the whole model, in the order in which the runs stand.
    """

    module: nn.Module
    batch: dict[str, Tensor]
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """architecture: a class of transformers; values: its configuration; counts: as in ShallowModel. tied: whether the head is the
    embedding, where the stated parameters do not tell."""

    architecture: str
    values: Mapping[str, Any]
    counts: tuple[int, ...]
    tied: bool


def twin(
    model: Model,
    *,
    micro_batch: int,
    dtype: torch.dtype = torch.bfloat16,
    fused_attention: bool = True,
    dropout: float | None = None,
    local_experts: int | None = None,
) -> ShallowModel:
    """A shallow twin of a row's model, its parameters in `dtype`, with a batch of `micro_batch` samples of the row's length.

    dropout: of hidden states and, where attention is not fused, of its scores; None for what the family usually has. local_experts: of
    each layer's experts it holds so many, all if None; the router chooses among all. The head is tied to the embedding or not, whichever
    makes the stated parameters. Raises TwinError for what cannot be built.
    """
    if micro_batch < 1:
        raise TwinError(f"micro_batch={micro_batch} is not 1 or more")
    make = _RECIPES.get(model.family)
    if make is None or not model.has_shape or (model.experts and model.family not in ("decoder", "moe")):
        raise TwinError(f"{_name(model)}: {_why_not(model)}")
    if "unpadded" in model.arch.lower() and model.seq_len:
        model = replace(model, seq_len=round(model.seq_len * _UNPADDED))
    recipe = make(_filled(model, _dropout(model) if dropout is None else dropout))
    local = model.experts if local_experts is None else local_experts
    try:
        made = ShallowModel(module=_built(recipe, fused_attention), batch=_batch(model, micro_batch, dtype), counts=recipe.counts)
        tied = _tied_fits(parameters(made), recipe, model) if model.params and model.family != "vit" else recipe.tied
        if tied != recipe.tied or local != model.experts:
            made = replace(made, module=_built(replace(recipe, tied=tied), fused_attention, local))
    except Exception as error:  # transformers raises many kinds: its own checks of configurations, sizes that do not divide
        raise TwinError(f"{_name(model)}: {recipe.architecture} does not take its numbers: {error}") from error
    for parameter in made.module.parameters():
        parameter.data = parameter.data.to(dtype)
    return made


def _name(model: Model) -> str:
    return model.arch or "a model without a name"


def parameters(made: ShallowModel) -> int:
    """Of the whole model, tied ones once."""
    runs = list(_runs(made.module))
    assert len(runs) == len(made.counts), "a count for each run of equal blocks"
    more = sum((count - length) * numel for (length, numel), count in zip(runs, made.counts, strict=True))
    return sum(each.numel() for each in made.module.parameters()) + more


def _runs(module: nn.Module) -> Iterator[tuple[int, int]]:
    """(how many, parameters of one) of each run of two or more equal blocks, in order."""
    inner: set[nn.Module] = set()
    for blocks in module.modules():
        if not isinstance(blocks, nn.ModuleList) or blocks in inner:
            continue
        inner.update(each for block in blocks for each in block.modules())
        shapes = [[each.shape for each in block.parameters()] for block in blocks]
        starts = [index for index in range(len(shapes)) if index == 0 or shapes[index] != shapes[index - 1]]
        for start, end in zip(starts, (*starts[1:], len(shapes)), strict=True):
            if end - start > 1:
                yield end - start, sum(math.prod(shape) for shape in shapes[start])


def _tied_fits(found: int, recipe: Recipe, model: Model) -> bool:
    """Whether the stated parameters are nearer to those with a tied head. found: those as the recipe has it."""
    assert model.params and model.hidden
    head = recipe.values["vocab_size"] * model.hidden
    tied = found if recipe.tied else found - head
    return abs(tied - model.params) <= abs(tied + head - model.params)


def _why_not(model: Model) -> str:
    if model.experts and model.family in _RECIPES and model.has_shape:
        return f"experts in a model of family {model.family} are not built"
    if model.family not in _RECIPES:
        return {
            "hybrid": "the rows do not state the sizes of its state-space layers",
            "diffusion": "the rows do not state the levels of its U-Net or its conditioning",
        }.get(model.family, f"the rows do not state the shapes of its layers ({model.family})")
    stated = {name: getattr(model, name) for name in ("layers", "hidden", "heads", "ffn", "seq_len")}
    return f"not stated: {', '.join(name for name, value in stated.items() if value is None)}"


# -- recipes -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's numbers, none of them open."""

    arch: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    seq_len: int
    dropout: float
    model: Model


def _filled(model: Model, dropout: float) -> Shape:
    assert model.layers and model.hidden and model.heads and model.ffn and model.seq_len, "it has a shape"
    vocab = model.vocab or _VOCABULARY.get(model.family, _GPT2_VOCABULARY)
    return Shape(
        arch=model.arch.lower(),
        layers=model.layers,
        hidden=model.hidden,
        heads=model.heads,
        kv_heads=model.kv_heads or model.heads,
        head_dim=model.head_dim or model.hidden // model.heads,
        ffn=model.ffn,
        vocab=vocab if model.family == "vit" else -(-vocab // _MULTIPLE) * _MULTIPLE,
        seq_len=model.seq_len,
        dropout=dropout,
        model=model,
    )


def _dropout(model: Model) -> float:
    """0.1 for GPTs, BERTs and T5s; none for what is rotary or gated, for images, and where configurations are known to have none."""
    arch = model.arch.lower()
    plain = model.family == "decoder" and not model.gated and not _ROTARY.search(arch) and not _NO_DROPOUT.search(arch)
    return _DROPOUT if plain or model.family in ("encoder", "encoder-decoder") else 0.0


def _shown(count: int) -> int:
    return min(count, _BLOCKS)


def _counts(*runs: int) -> tuple[int, ...]:
    """A block that stands alone makes no run."""
    return tuple(count for count in runs if count > 1)


def _decoder(shape: Shape) -> Recipe:
    if shape.model.mla:
        return _latent(shape)
    if shape.model.gated:
        name = "Qwen3ForCausalLM" if _QUERY_NORM.search(shape.arch) else "LlamaForCausalLM"
        biased = {"attention_bias": True} if _QUERY_BIAS.search(shape.arch) else {}
        return _rotary(shape, name, shape.layers, intermediate_size=shape.ffn, **biased)
    square = shape.kv_heads == shape.heads and (shape.heads * shape.head_dim == shape.hidden or shape.hidden % shape.heads)
    if square and not _ROTARY.search(shape.arch):
        return _gpt(shape)
    act = "relu2" if _SQUARED_RELU.search(shape.arch) else _GELU
    return _rotary(shape, "ArceeForCausalLM", shape.layers, intermediate_size=shape.ffn, hidden_act=act)


def _gpt(shape: Shape) -> Recipe:
    """Where the heads do not divide the width, which no program accepts, they are the nearest number that does."""
    heads = min((each for each in range(1, shape.hidden + 1) if shape.hidden % each == 0), key=lambda each: abs(each - shape.heads))
    values = {
        "vocab_size": shape.vocab,
        "n_positions": shape.seq_len,
        "n_embd": shape.hidden,
        "n_layer": _shown(shape.layers),
        "n_head": heads,
        "n_inner": shape.ffn,
        "activation_function": _GELU,
        "resid_pdrop": shape.dropout,
        "embd_pdrop": shape.dropout,
        "attn_pdrop": shape.dropout,
    }
    return Recipe(architecture="GPT2LMHeadModel", values=values, counts=_counts(shape.layers), tied=True)


def _rotary(shape: Shape, architecture: str, *runs: int, tied: bool = False, **more: Any) -> Recipe:
    """A decoder with rotary positions. runs: how many blocks of each kind it has."""
    values = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": sum(map(_shown, runs)),
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.seq_len,
    }
    return Recipe(architecture=architecture, values=values | more, counts=_counts(*runs), tied=tied)


def _mixture(shape: Shape) -> Recipe:
    model = shape.model
    if model.mla:
        return _latent(shape)
    dense, sparse = _dense_first(shape)
    if model.shared_ffn:
        more = {"first_k_dense_replace": _shown(dense), "use_qk_norm": bool(_QUERY_NORM.search(shape.arch)), **_routed(model)}
        return _rotary(shape, "Glm4MoeForCausalLM", dense, sparse, **more, **_experts(shape))
    if dense or _QUERY_NORM.search(shape.arch):
        first = list(range(_shown(dense)))
        return _rotary(shape, "Qwen3MoeForCausalLM", dense, sparse, num_experts=model.experts, mlp_only_layers=first, **_experts(shape))
    return _rotary(
        shape,
        "MixtralForCausalLM",
        sparse,
        intermediate_size=model.moe_ffn,
        num_local_experts=model.experts,
        num_experts_per_tok=model.topk,
    )


def _latent(shape: Shape) -> Recipe:
    """DeepSeek-V3, whose every layer is dense where the model has no experts."""
    model = shape.model
    dense, sparse = _dense_first(shape) if model.experts else (shape.layers, 0)
    experts = {**_routed(model), **_experts(shape)} if model.experts else {}
    values: dict[str, Any] = {"intermediate_size": shape.ffn, "first_k_dense_replace": _shown(dense), **_LATENT, **experts}
    recipe = _rotary(shape, "DeepseekV3ForCausalLM", dense, sparse, **values)
    alone = {"head_dim": _LATENT["qk_rope_head_dim"], "num_key_value_heads": shape.heads}  # what is rotated; every head has its own key
    return Recipe(architecture=recipe.architecture, values={**recipe.values, **alone}, counts=recipe.counts, tied=recipe.tied)


def _dense_first(shape: Shape) -> tuple[int, int]:
    """Layers without and with experts; those without come first."""
    return shape.model.dense_layers, shape.layers - shape.model.dense_layers


def _experts(shape: Shape) -> dict[str, Any]:
    """What configurations of Qwen3-MoE, GLM-4-MoE and DeepSeek-V3 call alike."""
    return {
        "intermediate_size": shape.ffn,
        "moe_intermediate_size": shape.model.moe_ffn,
        "num_experts_per_tok": shape.model.topk,
        "norm_topk_prob": True,
    }


def _routed(model: Model) -> dict[str, Any]:
    """Experts, and the shared one's width in widths of them; it is as wide as one where that is not stated."""
    return {"n_routed_experts": model.experts, "n_shared_experts": max(1, round((model.shared_ffn or model.moe_ffn) / model.moe_ffn))}


def _encoder(shape: Shape) -> Recipe:
    values = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": _shown(shape.layers),
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": shape.seq_len,
        "hidden_dropout_prob": shape.dropout,
        "attention_probs_dropout_prob": shape.dropout,
    }
    return Recipe(architecture="BertForMaskedLM", values=values, counts=_counts(shape.layers), tied=True)


def _encoder_decoder(shape: Shape) -> Recipe:
    """The first block of each side holds the relative positions of all, so that it belongs to no run."""
    values = {
        "vocab_size": shape.vocab,
        "d_model": shape.hidden,
        "d_kv": shape.head_dim,
        "d_ff": shape.ffn,
        "num_layers": 1 + _shown(shape.layers - 1),
        "num_decoder_layers": 1 + _shown(shape.layers - 1),
        "num_heads": shape.heads,
        "feed_forward_proj": f"gated-{_GELU}" if shape.model.gated else "relu",
        "dropout_rate": shape.dropout,
        "decoder_start_token_id": 0,
    }
    rest = shape.layers - 1
    return Recipe(architecture="T5ForConditionalGeneration", values=values, counts=_counts(rest, rest), tied=True)


def _images(shape: Shape) -> Recipe:
    values = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": _shown(shape.layers),
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.ffn,
        "image_size": _image_size(shape.model),
        "patch_size": _patch(shape.model),
        "num_labels": shape.vocab,
        "hidden_dropout_prob": shape.dropout,
        "attention_probs_dropout_prob": shape.dropout,
    }
    return Recipe(architecture="ViTForImageClassification", values=values, counts=_counts(shape.layers), tied=False)


def _patch(model: Model) -> int:
    found = _PATCH.search(model.arch)
    return int(found[1]) if found else 16


def _image_size(model: Model) -> int:
    """Of a square image that makes the tokens, with or without one for the class."""
    return math.isqrt(model.seq_len or 0) * _patch(model)


_RECIPES: dict[str, Callable[[Shape], Recipe]] = {
    "decoder": _decoder,
    "moe": _mixture,
    "encoder": _encoder,
    "encoder-decoder": _encoder_decoder,
    "vit": _images,
}


# -- building ----------------------------------------------------------------------------------------------------------------------------


def _built(recipe: Recipe, fused_attention: bool, local_experts: int | None = None) -> nn.Module:
    found, name = _class(recipe.architecture), _attention_name(fused_attention)
    config = found.config_class(**recipe.values, tie_word_embeddings=recipe.tied, bos_token_id=None, eos_token_id=None)
    config.use_cache = False
    config._attn_implementation, config._experts_implementation = name, "batched_mm"
    with torch.device("meta"):
        module: nn.Module = found(config)
        for part in list(module.modules()):
            _simplify(part, config, local_experts)
    return module.train()


def _class(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def _simplify(part: Any, config: Any, local_experts: int | None) -> None:
    """Replaces what would make a graph larger than need be."""
    for name, norm in list(part.named_children()):
        if hasattr(norm, "variance_epsilon"):
            setattr(part, name, nn.RMSNorm(norm.weight.shape[0], eps=norm.variance_epsilon))
    if hasattr(part, "gate") and hasattr(part, "experts"):
        held = local_experts or config.num_local_experts
        part.gate = _Router(config.num_local_experts, config.hidden_size, config.num_experts_per_tok, held)
        for weight in list(part.experts._parameters):
            whole = part.experts._parameters[weight]
            setattr(part.experts, weight, nn.Parameter(whole.new_empty(held, *whole.shape[1:])))
    if hasattr(part, "expand_kv"):
        part.expand_kv = _Expand(part)
    if hasattr(part, "relative_attention_bias"):
        part._relative_position_bucket = _bucket


class _Router(nn.Module):
    """Each token's experts and their weights, which add up to one. `held` of them are there: a rank gets as many rows as it sends."""

    def __init__(self, experts: int, hidden: int, chosen: int, held: int) -> None:
        super().__init__()
        self.weight, self.chosen, self.held = nn.Parameter(torch.empty(experts, hidden)), chosen, held

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[…, hidden] → logits [n, experts], weights and experts [n, chosen]."""
        logits = F.linear(x.reshape(-1, x.shape[-1]), self.weight)
        scores, experts = torch.topk(torch.softmax(logits, -1, dtype=torch.float32), self.chosen)
        local = experts if self.held == logits.shape[-1] else experts % self.held
        return logits, (scores / scores.sum(-1, keepdim=True)).to(x.dtype), local


def _bucket(distance: Tensor, *, num_buckets: int, **_: Any) -> Tensor:
    """Which of T5's position biases a distance has: here each near one has its own, and all far ones share the last."""
    half = num_buckets // 2
    return distance.clamp(-half, half - 1) + half


class _Expand:
    """Latent attention's [n, 1, s, rank] and rotated part [n, 1, s, r] → keys [n, heads, s, k + r] and values [n, heads, s, v]."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention

    def __call__(self, latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
        attention = self.attention
        both = attention.kv_b_proj(latent.squeeze(1)).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        keys, values = both.split([attention.qk_nope_head_dim, attention.v_head_dim], -1)
        return torch.cat([keys, rotated.expand(-1, attention.num_heads, -1, -1)], -1), values


def _batch(model: Model, samples: int, dtype: torch.dtype) -> dict[str, Tensor]:
    assert model.seq_len
    if model.family == "vit":
        size = _image_size(model)
        pixels = torch.empty(samples, 3, size, size, dtype=dtype, device="meta")
        return {"pixel_values": pixels, "labels": _tokens(samples)}
    tokens = _tokens(samples, model.seq_len)
    if model.family == "encoder-decoder":
        length = model.decoder_seq or max(1, round(model.seq_len * _T5_TARGETS))
        return {"input_ids": tokens, "decoder_input_ids": _tokens(samples, length), "labels": _tokens(samples, length)}
    return {"input_ids": tokens, "labels": tokens.clone()}


def _tokens(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


# -- attention ---------------------------------------------------------------------------------------------------------------------------


def _attention_name(fused: bool) -> str:
    """The name under which transformers knows an attention, which it is told first."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name, attention, mask = ("published_fused", _fused, _no_mask) if fused else ("published_written", _written, _hidden)
    if name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(name, attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask)
    return name


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def _hidden(*, q_length: int, kv_length: int, mask_function: Any, device: torch.device, **_: Any) -> Tensor | None:
    """bool [q_length, kv_length]: what a causal query does not see, made once for all layers; None where all see all."""
    from transformers.masking_utils import bidirectional_mask_function

    return None if mask_function is bidirectional_mask_function else _future(q_length, kv_length, device)


def _future(queries: int, keys: int, device: torch.device) -> Tensor:
    return torch.arange(keys, device=device) > torch.arange(queries, device=device).unsqueeze(1)


def _fused(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    *,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [n, heads, q, k], key [n, key heads, s, k], value [n, key heads, s, v] → [n, q, heads, v]."""
    causal = getattr(module, "is_causal", False)
    if _bias(module, position_bias) is not None:  # no fused kernel has its gradient
        mask = _future(query.shape[-2], key.shape[-2], query.device) if causal else None
        return _written(module, query, key, value, mask, scaling=scaling, position_bias=position_bias, dropout=dropout)
    width, narrow = (key.shape[-1] + value.shape[-1]) // 2, value.shape[-1]
    if width != narrow:  # torch fuses equal widths alone: with the mean width the products and the bytes are as many
        query, key, value = query[..., :width], key[..., :width], F.pad(value, (0, width - narrow))
    grouped = query.shape[1] != key.shape[1]
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scaling, enable_gqa=grouped)
    return mixed.narrow(-1, 0, narrow).transpose(1, 2) if width != narrow else mixed.transpose(1, 2), None


def _written(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The same with every intermediate result."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    scores = torch.matmul(query, key.transpose(-1, -2))
    if scaling != 1:
        scores = scores * (scaling or query.shape[-1] ** -0.5)
    if (bias := _bias(module, position_bias)) is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(mask, torch.finfo(scores.dtype).min)
    weights = F.dropout(torch.softmax(scores, -1), dropout, module.training)
    return torch.matmul(weights, value).transpose(1, 2), None


def _bias(module: Any, position_bias: Tensor | None) -> Tensor | None:
    """T5's; in attention to the encoder it is zero."""
    return None if getattr(module, "is_decoder", False) and not module.is_causal else position_bias
