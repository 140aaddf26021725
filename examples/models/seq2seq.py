"""Small encoder-decoder models, each with a batch: copy one, or plan and run it as it is.

Each function returns `(model, batch)`: the module in training mode, seeded, and the keyword arguments of its forward, whose output
carries the loss. Source and target have unlike lengths, also over the samples; labels of -100 are ignored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "bart",
    "blenderbot",
    "led",
    "longt5",
    "m2m_100",
    "marian",
    "mbart",
    "pegasus",
    "prophetnet",
    "switch_transformers",
    "switch_transformers_noise",
    "t5",
    "transformer",
    "umt5",
]

Batch = dict[str, Tensor]
Example = tuple[nn.Module, Batch]

# The sizes of BART and the models derived from it, and of T5's.
_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "use_cache": False,
}
_T5_SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "use_cache": False,
}
_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}


def _pairs(vocabulary: int = 128, *, samples: int = 4, source: int = 16, target: int = 12, padding: int = 0) -> Batch:
    """Random source tokens with their mask, and random target tokens, of unlike lengths."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, vocabulary, (samples, source), generator=generator)
    labels = torch.randint(3, vocabulary, (samples, target), generator=generator)
    read = torch.arange(source) < torch.randint(source // 2, source + 1, (samples, 1), generator=generator)
    written = torch.arange(target) < torch.randint(1, target + 1, (samples, 1), generator=generator)
    return {"input_ids": tokens.where(read, padding), "attention_mask": read.long(), "labels": labels.where(written, -100)}


def t5() -> Example:
    """Relative bias in buckets, computed in the first layer and used by all; a tied, scaled head."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(**_T5_SIZES, dropout_rate=0.0, relative_attention_num_buckets=8, relative_attention_max_distance=16)
    return T5ForConditionalGeneration(config).train(), _pairs()


def umt5() -> Example:
    """A relative bias in every layer, gated feed-forward, a head of its own, dropout."""
    from transformers import UMT5Config, UMT5ForConditionalGeneration

    torch.manual_seed(0)
    config = UMT5Config(**_T5_SIZES, relative_attention_num_buckets=8, relative_attention_max_distance=16)
    return UMT5ForConditionalGeneration(config).train(), _pairs()


def longt5() -> Example:
    """T5 with local attention in blocks of 4 and summaries of blocks to attend to."""
    from transformers import LongT5Config, LongT5ForConditionalGeneration

    torch.manual_seed(0)
    config = LongT5Config(
        **_T5_SIZES,
        dropout_rate=0.0,
        encoder_attention_type="transient-global",
        local_radius=3,
        global_block_size=4,
        relative_attention_num_buckets=8,
    )
    return LongT5ForConditionalGeneration(config).train(), _pairs()


def _switch_transformers(noise: float) -> Example:
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        **_T5_SIZES,
        dropout_rate=0.0,
        num_experts=4,
        expert_capacity=16,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        router_jitter_noise=noise,
        output_router_logits=True,
    )
    return SwitchTransformersForConditionalGeneration(config).train(), _pairs()


def switch_transformers() -> Example:
    """One expert of four for each token, with a capacity, and the router's losses."""
    return _switch_transformers(noise=0.0)


def switch_transformers_noise() -> Example:
    """Switch with uniform noise on what the router and the experts read, multiplied in place."""
    return _switch_transformers(noise=0.01)


def bart() -> Example:
    """Learned positions, norms after each part, dropout, one embedding for source, target and head."""
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    return BartForConditionalGeneration(BartConfig(**_SIZES, **_SPECIAL, forced_eos_token_id=2)).train(), _pairs()


def mbart() -> Example:
    """Norms before each part; labels shifted around the last sign of each sample."""
    from transformers import MBartConfig, MBartForConditionalGeneration

    torch.manual_seed(0)
    config = MBartConfig(**_SIZES, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2, forced_eos_token_id=2)
    return MBartForConditionalGeneration(config).train(), _pairs()


def pegasus() -> Example:
    """Sinusoidal positions that are not trained, norms before each part, scaled embeddings."""
    from transformers import PegasusConfig, PegasusForConditionalGeneration

    torch.manual_seed(0)
    config = PegasusConfig(**_SIZES, dropout=0.0, pad_token_id=0, eos_token_id=2, forced_eos_token_id=2, decoder_start_token_id=2)
    return PegasusForConditionalGeneration(config).train(), _pairs()


def marian() -> Example:
    """Swish, sinusoidal positions, embeddings shared with the head, a bias of the logits, dropout."""
    from transformers import MarianConfig, MarianMTModel

    torch.manual_seed(0)
    config = MarianConfig(**_SIZES, dropout=0.1, pad_token_id=0, eos_token_id=2, forced_eos_token_id=2, decoder_start_token_id=2)
    return MarianMTModel(config).train(), _pairs()


def m2m_100() -> Example:
    """Positions counted from the tokens that are not padding."""
    from transformers import M2M100Config, M2M100ForConditionalGeneration

    torch.manual_seed(0)
    config = M2M100Config(**_SIZES, **_SPECIAL, dropout=0.0, attention_dropout=0.0, encoder_layerdrop=0.0, decoder_layerdrop=0.0)
    return M2M100ForConditionalGeneration(config).train(), _pairs()


def blenderbot() -> Example:
    """Norms before each part, learned positions, one layer of encoder for two of decoder."""
    from transformers import BlenderbotConfig, BlenderbotForConditionalGeneration

    torch.manual_seed(0)
    sizes = _SIZES | {"encoder_layers": 1}
    config = BlenderbotConfig(**sizes, **_SPECIAL, dropout=0.0, encoder_no_repeat_ngram_size=0, forced_eos_token_id=2)
    return BlenderbotForConditionalGeneration(config).train(), _pairs()


def led() -> Example:
    """BART with sliding windows of 8 source tokens."""
    from transformers import LEDConfig, LEDForConditionalGeneration

    torch.manual_seed(0)
    sizes = {name: size for name, size in _SIZES.items() if name != "max_position_embeddings"}
    config = LEDConfig(
        **sizes, **_SPECIAL, dropout=0.0, attention_window=8, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64
    )
    return LEDForConditionalGeneration(config).train(), _pairs(source=32)


def prophetnet() -> Example:
    """Predicts the next two tokens at once, with two streams in the decoder."""
    from transformers import ProphetNetConfig, ProphetNetForConditionalGeneration

    torch.manual_seed(0)
    config = ProphetNetConfig(
        vocab_size=128,
        hidden_size=32,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
        max_position_embeddings=64,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        num_buckets=8,
        relative_max_distance=16,
        use_cache=False,
    )
    return ProphetNetForConditionalGeneration(config).train(), _pairs()


class _Transformer(nn.Module):
    """nn.Transformer with embeddings and a loss."""

    def __init__(self, vocabulary: int, hidden: int, length: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, hidden), nn.Embedding(length, hidden)
        self.transformer = nn.Transformer(hidden, 4, 2, 2, 2 * hidden, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def _embedded(self, tokens: Tensor) -> Tensor:
        return self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        before = torch.cat([torch.ones_like(labels[:, :1]), labels[:, :-1].clamp(min=0)], 1)
        causal = torch.ones(labels.shape[1], labels.shape[1], dtype=torch.bool, device=labels.device).triu(1)
        padding = attention_mask == 0
        hidden = self.transformer(
            self._embedded(input_ids),
            self._embedded(before),
            tgt_mask=causal,
            tgt_is_causal=True,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten(), label_smoothing=0.1)


def transformer() -> Example:
    """torch's own nn.Transformer, with label smoothing."""
    torch.manual_seed(0)
    return _Transformer(128, 32, 64).train(), _pairs()
