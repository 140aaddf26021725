"""Small mixtures of experts, each with a batch: copy one, or plan and run it as it is.

Each function returns `(model, batch)`: the module in training mode, seeded, and the keyword arguments of its forward, whose output
carries the loss. Most add the router's load-balancing loss. Experts are computed in one of these forms, named where it matters:
a Python loop ("eager"), a batched matrix product for each token's experts ("batched_mm"), one grouped product over sorted tokens
("grouped_mm", the default of transformers), dispatch and combine by one-hot products with a capacity (GShard), all experts for all tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "bmm_experts",
    "capacity_experts",
    "dbrx",
    "deepseek_v2",
    "deepseek_v3",
    "dense_experts",
    "gpt_oss",
    "granitemoe",
    "jamba",
    "mixtral",
    "mixtral_batched",
    "mixtral_loop",
    "nllb_moe",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_moe_batched",
    "qwen3_next",
]

Batch = dict[str, Tensor]
Example = tuple[nn.Module, Batch]

# The sizes of these models, under the names that most configurations use.
_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "use_cache": False,
}
_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _tokens(vocabulary: int = 128, *, samples: int = 4, sequence: int = 16, padded: bool = False) -> Batch:
    """Random tokens and their labels: all of the first sample's ignored, most of the second's; padded: unlike lengths, and a mask."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, vocabulary, (samples, sequence), generator=generator)
    labels = tokens.clone()
    labels[0] = -100
    labels[1, 5:] = -100
    if not padded:
        return {"input_ids": tokens, "labels": labels}
    lengths = torch.randint(sequence // 2, sequence + 1, (samples, 1), generator=generator)
    real = torch.arange(sequence) < lengths
    return {"input_ids": tokens.where(real, 0), "attention_mask": real.long(), "labels": labels.where(real, -100)}


def _mixtral(**settings: Any) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.02)
    return MixtralForCausalLM._from_config(config, **settings).train()


def mixtral() -> Example:
    """Two of four experts for each token; the router's loss leaves padding out."""
    return _mixtral(), _tokens(padded=True)


def mixtral_loop() -> Example:
    """Mixtral with a loop over the experts that were chosen."""
    return _mixtral(experts_implementation="eager"), _tokens()


def mixtral_batched() -> Example:
    """Mixtral with each token's expert weights gathered for a batched product."""
    return _mixtral(experts_implementation="batched_mm"), _tokens()


def qwen2_moe() -> Example:
    """An expert for all tokens, with a gate, beside the routed ones."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        **_SIZES,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
        num_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
    )
    return Qwen2MoeForCausalLM(config).train(), _tokens()


def _qwen3_moe(**settings: Any) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **_SIZES,
        head_dim=8,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=[0],
        output_router_logits=True,
    )
    return Qwen3MoeForCausalLM._from_config(config, **settings).train()


def qwen3_moe() -> Example:
    """A dense first layer, then eight experts whose two weights are normalised."""
    return _qwen3_moe(), _tokens(padded=True)


def qwen3_moe_batched() -> Example:
    """Qwen3-MoE with each token's expert weights gathered for a batched product."""
    return _qwen3_moe(experts_implementation="batched_mm"), _tokens()


def qwen3_next() -> Example:
    """A gated delta rule (linear attention in chunks) and gated full attention in turn; routed and shared experts."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(0)
    config = Qwen3NextConfig(
        **_SIZES,
        head_dim=8,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        layer_types=["linear_attention", "full_attention"],
        output_router_logits=True,
    )
    return Qwen3NextForCausalLM(config).train(), _tokens()


def olmoe() -> Example:
    """Eight experts, three for each token; queries and keys normalised over all heads."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    config = OlmoeConfig(**_SIZES, **_SPECIAL, num_experts=8, num_experts_per_tok=3, output_router_logits=True)
    return OlmoeForCausalLM(config).train(), _tokens()


def deepseek_v2() -> Example:
    """Keys and values from a low rank; experts chosen within the best of two groups; shared experts; a dense first layer."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV2Config(
        **_SIZES | {"num_key_value_heads": 4},
        moe_intermediate_size=32,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        topk_method="group_limited_greedy",
        n_group=2,
        topk_group=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        **_SPECIAL,
    )
    return DeepseekV2ForCausalLM(config).train(), _tokens()


def deepseek_v3() -> Example:
    """Sigmoid scores with a correction that is a buffer; experts chosen within the best of two groups; low-rank attention."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV3Config(
        **_SIZES | {"num_key_value_heads": 4},
        moe_intermediate_size=32,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        **_SPECIAL,
    )
    return DeepseekV3ForCausalLM(config).train(), _tokens(padded=True)


def phimoe() -> Example:
    """Two experts chosen one after the other, with a sparse mixer's own gradient."""
    from transformers import PhimoeConfig, PhimoeForCausalLM

    torch.manual_seed(0)
    config = PhimoeConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.0, output_router_logits=True)
    return PhimoeForCausalLM(config).train(), _tokens()


def granitemoe() -> Example:
    """Scaled residuals and logits; experts in one tensor, tokens sorted by expert and split by the counts."""
    from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

    torch.manual_seed(0)
    config = GraniteMoeConfig(
        **_SIZES,
        **_SPECIAL,
        num_local_experts=4,
        num_experts_per_tok=2,
        attention_multiplier=0.35,
        logits_scaling=2.0,
        output_router_logits=True,
    )
    return GraniteMoeForCausalLM(config).train(), _tokens()


def gpt_oss() -> Example:
    """Attention sinks, a sliding window in turn, clamped gates, biases in router and experts."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        **_SIZES, **_SPECIAL, head_dim=8, sliding_window=8, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True
    )
    return GptOssForCausalLM(config).train(), _tokens()


def jamba() -> Example:
    """Mamba and attention layers, dense and expert feed-forwards, in turn."""
    from transformers import JambaConfig, JambaForCausalLM

    torch.manual_seed(0)
    config = JambaConfig(
        **_SIZES,
        **_SPECIAL,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        num_experts_per_tok=2,
        mamba_d_state=4,
        mamba_d_conv=4,
        use_mamba_kernels=False,
        output_router_logits=True,
    )
    return JambaForCausalLM(config).train(), _tokens()


def dbrx() -> Example:
    """Layer norms without bias, clipped queries, keys and values, experts in stacked matrices."""
    from transformers import DbrxConfig, DbrxForCausalLM

    torch.manual_seed(0)
    config = DbrxConfig(
        vocab_size=128,
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"hidden_size": 32, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        use_cache=False,
        output_router_logits=True,
    )
    return DbrxForCausalLM(config).train(), _tokens()


def nllb_moe() -> Example:
    """An encoder-decoder whose second layers have experts, two for each token, with a capacity."""
    from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration

    torch.manual_seed(0)
    config = NllbMoeConfig(
        vocab_size=128,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        num_experts=4,
        expert_capacity=32,
        dropout=0.0,
        attention_dropout=0.0,
        moe_token_dropout=0.0,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        decoder_start_token_id=2,
        output_router_logits=True,
        use_cache=False,
        **_SPECIAL,
    )
    return NllbMoeForConditionalGeneration(config).train(), _tokens(padded=True)


class _Experts(nn.Module):
    """Feed-forwards in stacked matrices, for tokens [expert, slot, hidden]."""

    def __init__(self, experts: int, hidden: int, wide: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, hidden, wide) * hidden**-0.5)
        self.up_bias = nn.Parameter(torch.zeros(experts, 1, wide))
        self.down = nn.Parameter(torch.randn(experts, wide, hidden) * wide**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.bmm(F.gelu(torch.baddbmm(self.up_bias, tokens, self.up)), self.down)


def _balance(scores: Tensor, chosen: Tensor) -> Tensor:
    """The load-balancing loss: share of tokens times mean score, over experts; scores [token, expert], chosen one-hot likewise."""
    return scores.shape[1] * (chosen.mean(0) * scores.mean(0)).sum()


class _CapacityLayer(nn.Module):
    """GShard: each expert takes its first `capacity` tokens; the others keep their residual alone."""

    def __init__(self, hidden: int, experts: int, capacity: int) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, hidden, 2 * hidden) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(experts, 2 * hidden, hidden) * (2 * hidden) ** -0.5)
        self.capacity = capacity

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.flatten(0, 1)
        scores = self.router(tokens).softmax(-1)
        chosen = F.one_hot(scores.argmax(-1), scores.shape[1]).to(x.dtype)
        place = (chosen.cumsum(0) - 1) * chosen
        slot = F.one_hot(place.sum(-1).long().clamp(max=self.capacity), self.capacity + 1)[:, : self.capacity].to(x.dtype)
        dispatch = torch.einsum("te,tc->tec", chosen, slot)
        combine = torch.einsum("te,tec->tec", scores, dispatch)
        held = torch.einsum("tec,td->ecd", dispatch, tokens)
        made = torch.einsum("ecf,efd->ecd", torch.einsum("ecd,edf->ecf", held, self.up).relu(), self.down)
        return x + torch.einsum("tec,ecd->td", combine, made).view_as(x), _balance(scores, chosen)


class _GatheredLayer(nn.Module):
    """The tokens that like an expert best are gathered to it (expert choice), computed in one batched product and scattered back."""

    def __init__(self, hidden: int, experts: int, capacity: int) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, experts)
        self.experts = _Experts(experts, hidden, 2 * hidden)
        self.capacity = capacity

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.flatten(0, 1)
        scores = self.router(tokens).softmax(-1)
        weights, index = scores.t().topk(self.capacity, dim=-1)
        made = self.experts(tokens[index]) * weights[..., None]
        summed = torch.zeros_like(tokens).index_add(0, index.flatten(), made.flatten(0, 1))
        return x + summed.view_as(x), torch.logsumexp(self.router(tokens), -1).square().mean()


class _DenseLayer(nn.Module):
    """All experts for all tokens, weighted by the two best scores, the rest zero."""

    def __init__(self, hidden: int, experts: int, chosen: int) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, experts)
        self.experts = _Experts(experts, hidden, 2 * hidden)
        self.chosen = chosen

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.flatten(0, 1)
        logits = self.router(tokens)
        best, index = logits.topk(self.chosen, dim=-1)
        weights = torch.zeros_like(logits).scatter(1, index, best.softmax(-1))
        made = self.experts(tokens.expand(weights.shape[1], *tokens.shape))
        return x + (made * weights.t()[..., None]).sum(0).view_as(x), _balance(logits.softmax(-1), (weights > 0).to(x.dtype))


class _Classifier(nn.Module):
    """Embedding, layers that return (hidden, the router's loss), norms, a head over tokens."""

    def __init__(self, vocabulary: int, hidden: int, layers: list[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.mix = nn.ModuleList(nn.Conv1d(hidden, hidden, 3, padding=2, groups=hidden) for _ in layers)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in layers)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        extra = x.new_zeros(())
        for mix, norm, layer in zip(self.mix, self.norms, self.layers, strict=True):
            x = x + mix(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
            x, router = layer(norm(x))
            extra = extra + router
        loss = F.cross_entropy(self.head(x[:, :-1]).flatten(0, 1), labels[:, 1:].flatten())
        return loss + 0.01 * extra


def capacity_experts() -> Example:
    """GShard: one expert for each token up to a capacity, dispatched and combined by one-hot products."""
    torch.manual_seed(0)
    return _Classifier(128, 32, [_CapacityLayer(32, 4, capacity=20) for _ in range(2)]).train(), _tokens()


def bmm_experts() -> Example:
    """Experts choose their tokens: gather, a batched product over experts, scatter; a loss on the router's logits."""
    torch.manual_seed(0)
    return _Classifier(128, 32, [_GatheredLayer(32, 4, capacity=24) for _ in range(2)]).train(), _tokens()


def dense_experts() -> Example:
    """Every expert computes every token; the weights of all but two are zero."""
    torch.manual_seed(0)
    return _Classifier(128, 32, [_DenseLayer(32, 4, chosen=2) for _ in range(2)]).train(), _tokens()
