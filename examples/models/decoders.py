"""Small decoder-only language models, each with a batch: copy one, or plan and run it as it is.

Each function returns `(model, batch)`: the module in training mode, seeded, and the keyword arguments of its forward, whose output
carries the loss. Labels of -100 are ignored, unevenly over the samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "bloom",
    "codegen",
    "cohere",
    "diffllama",
    "falcon",
    "gemma",
    "gemma2",
    "gemma3",
    "glm",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "granite",
    "llama",
    "llama_frozen",
    "mistral",
    "mpt",
    "nemotron",
    "olmo",
    "olmo2",
    "opt",
    "persimmon",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
    "stablelm",
    "starcoder2",
    "xglm",
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


def llama() -> Example:
    """Grouped key heads, rotary positions, gated feed-forward."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**_SIZES, num_key_value_heads=2)
    return LlamaForCausalLM(config).train(), _tokens()


def llama_frozen() -> Example:
    """Fine-tuning with the embeddings and the first layer frozen, on padded samples."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**_SIZES, num_key_value_heads=2)).train()
    for part in (model.model.embed_tokens, model.model.layers[0]):
        part.requires_grad_(False)
    return model, _tokens(padded=True)


def mistral() -> Example:
    """A sliding window of 8 tokens."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(**_SIZES, num_key_value_heads=2, sliding_window=8)
    return MistralForCausalLM(config).train(), _tokens(sequence=32)


def gpt2() -> Example:
    """Learned positions, a head tied to the embedding, one matrix for query, key and value, dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64, use_cache=False, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).train(), _tokens()


def gpt_neox() -> Example:
    """Attention and feed-forward in parallel; rotary positions on a quarter of each head; heads interleave query, key and value."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(**_SIZES, rotary_pct=0.25, bos_token_id=1, eos_token_id=2)
    return GPTNeoXForCausalLM(config).train(), _tokens(padded=True)


def gptj() -> Example:
    """Interleaved rotary positions from a table that is a buffer."""
    from transformers import GPTJConfig, GPTJForCausalLM

    torch.manual_seed(0)
    config = GPTJConfig(
        vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, use_cache=False, bos_token_id=1, eos_token_id=2
    )
    return GPTJForCausalLM(config).train(), _tokens()


def gpt_neo() -> Example:
    """Layers of global and of local attention in turn."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        max_position_embeddings=64,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPTNeoForCausalLM(config).train(), _tokens(sequence=32)


def opt() -> Example:
    """Learned positions counted from the mask, tied head, dropout."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=128,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        dropout=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    return OPTForCausalLM(config).train(), _tokens(padded=True)


def bloom() -> Example:
    """ALiBi biases; a normalised embedding."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    config = BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4, use_cache=False, **_SPECIAL)
    return BloomForCausalLM(config).train(), _tokens(padded=True)


def falcon() -> Example:
    """One key head for all queries; attention and feed-forward in parallel."""
    from transformers import FalconConfig, FalconForCausalLM

    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, use_cache=False, bos_token_id=1, eos_token_id=2
    )
    return FalconForCausalLM(config).train(), _tokens()


def mpt() -> Example:
    """ALiBi biases and no other bias."""
    from transformers import MptConfig, MptForCausalLM

    torch.manual_seed(0)
    config = MptConfig(vocab_size=128, d_model=32, n_heads=4, n_layers=2, max_seq_len=64, use_cache=False)
    return MptForCausalLM(config).train(), _tokens()


def qwen2() -> Example:
    """Biases on query, key and value alone; a tied head."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(**_SIZES, num_key_value_heads=2, tie_word_embeddings=True)
    return Qwen2ForCausalLM(config).train(), _tokens(padded=True)


def qwen3() -> Example:
    """Normalised queries and keys; heads wider than the hidden size divided by their number."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(**_SIZES, num_key_value_heads=2, head_dim=16)
    return Qwen3ForCausalLM(config).train(), _tokens()


def gemma() -> Example:
    """Scaled embeddings, norms that multiply by 1 + weight, one key head, a tied head."""
    from transformers import GemmaConfig, GemmaForCausalLM

    torch.manual_seed(0)
    config = GemmaConfig(**_SIZES, num_key_value_heads=1, head_dim=8, **_SPECIAL)
    return GemmaForCausalLM(config).train(), _tokens()


def gemma2() -> Example:
    """Soft caps on attention scores and on logits; sliding window and full attention in turn."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(**_SIZES, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=8, **_SPECIAL)
    return Gemma2ForCausalLM(config).train(), _tokens()


def gemma3() -> Example:
    """Two rotary tables: one for layers with a sliding window, one for full attention."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        **_SIZES,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        **_SPECIAL,
    )
    return Gemma3ForCausalLM(config).train(), _tokens(padded=True)


def phi() -> Example:
    """Attention and feed-forward in parallel from one norm; rotary positions on half of each head; dropout on the residual."""
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    config = PhiConfig(**_SIZES, resid_pdrop=0.1, bos_token_id=1, eos_token_id=2)
    return PhiForCausalLM(config).train(), _tokens()


def phi3() -> Example:
    """One matrix for query, key and value, one for gate and up."""
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    config = Phi3Config(**_SIZES, num_key_value_heads=2, **_SPECIAL)
    return Phi3ForCausalLM(config).train(), _tokens()


def persimmon() -> Example:
    """Squared ReLU, layer norms of queries and keys, partial rotary positions."""
    from transformers import PersimmonConfig, PersimmonForCausalLM

    torch.manual_seed(0)
    config = PersimmonConfig(**_SIZES, **_SPECIAL)
    return PersimmonForCausalLM(config).train(), _tokens()


def stablelm() -> Example:
    """Layer norms with biases, partial rotary positions, a norm for each head."""
    from transformers import StableLmConfig, StableLmForCausalLM

    torch.manual_seed(0)
    config = StableLmConfig(**_SIZES, num_key_value_heads=2, qk_layernorm=True, bos_token_id=1, eos_token_id=2)
    return StableLmForCausalLM(config).train(), _tokens()


def olmo() -> Example:
    """Six heads of 8; norms without parameters; clipped queries, keys and values."""
    from transformers import OlmoConfig, OlmoForCausalLM

    torch.manual_seed(0)
    config = OlmoConfig(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        clip_qkv=4.0,
        use_cache=False,
        **_SPECIAL,
    )
    return OlmoForCausalLM(config).train(), _tokens()


def olmo2() -> Example:
    """Norms after attention and feed-forward; queries and keys normalised over all heads together."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    torch.manual_seed(0)
    config = Olmo2Config(**_SIZES, **_SPECIAL)
    return Olmo2ForCausalLM(config).train(), _tokens()


def cohere() -> Example:
    """Attention and feed-forward in parallel, scaled logits, interleaved rotary positions, a norm for each head."""
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    config = CohereConfig(**_SIZES, num_key_value_heads=2, use_qk_norm=True, **_SPECIAL)
    return CohereForCausalLM(config).train(), _tokens()


def starcoder2() -> Example:
    """A vocabulary of 131, which nothing divides; plain feed-forward with biases; a sliding window; dropout on the residual."""
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    torch.manual_seed(0)
    sizes = _SIZES | {"vocab_size": 131}
    config = Starcoder2Config(**sizes, num_key_value_heads=2, sliding_window=8, residual_dropout=0.1, bos_token_id=1, eos_token_id=2)
    return Starcoder2ForCausalLM(config).train(), _tokens(131)


def codegen() -> Example:
    """Query, value and key in the order of four devices in one matrix."""
    from transformers import CodeGenConfig, CodeGenForCausalLM

    torch.manual_seed(0)
    config = CodeGenConfig(
        vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, use_cache=False, bos_token_id=1, eos_token_id=2
    )
    return CodeGenForCausalLM(config).train(), _tokens()


def granite() -> Example:
    """Scaled embeddings, attention, residuals and logits."""
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    config = GraniteConfig(
        **_SIZES,
        num_key_value_heads=2,
        embedding_multiplier=12.0,
        attention_multiplier=0.125,
        residual_multiplier=0.22,
        logits_scaling=8.0,
        **_SPECIAL,
    )
    return GraniteForCausalLM(config).train(), _tokens()


def xglm() -> Example:
    """Sinusoidal positions from a table, scaled embeddings, dropout."""
    from transformers import XGLMConfig, XGLMForCausalLM

    torch.manual_seed(0)
    config = XGLMConfig(
        vocab_size=128,
        d_model=32,
        ffn_dim=64,
        num_layers=2,
        attention_heads=4,
        max_position_embeddings=64,
        dropout=0.1,
        use_cache=False,
        **_SPECIAL,
    )
    return XGLMForCausalLM(config).train(), _tokens(padded=True)


def smollm3() -> Example:
    """Every second layer without positions."""
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    torch.manual_seed(0)
    config = SmolLM3Config(**_SIZES, num_key_value_heads=2, no_rope_layers=[1, 0], **_SPECIAL)
    return SmolLM3ForCausalLM(config).train(), _tokens()


def glm() -> Example:
    """Rotary positions on half of each head, interleaved; one matrix for gate and up."""
    from transformers import GlmConfig, GlmForCausalLM

    torch.manual_seed(0)
    config = GlmConfig(**_SIZES, num_key_value_heads=2, head_dim=8, **_SPECIAL)
    return GlmForCausalLM(config).train(), _tokens(padded=True)


def nemotron() -> Example:
    """Squared ReLU without a gate; layer norms that multiply by 1 + weight."""
    from transformers import NemotronConfig, NemotronForCausalLM

    torch.manual_seed(0)
    config = NemotronConfig(**_SIZES, num_key_value_heads=2, **_SPECIAL)
    return NemotronForCausalLM(config).train(), _tokens()


def diffllama() -> Example:
    """Differential attention: one softmax minus a learned multiple of another."""
    from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

    torch.manual_seed(0)
    config = DiffLlamaConfig(**_SIZES, num_key_value_heads=2, **_SPECIAL)
    return DiffLlamaForCausalLM(config).train(), _tokens()
