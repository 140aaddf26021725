"""Small models of the families that shardwise must run, each with a batch: seeded, with sizes that 2 and 4 divide.

Language models ignore some labels, unevenly over the batch, so that a mean over samples is not a mean over valid tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MODELS", "Batch", "Example", "bert", "gpt2", "llama", "mixtral", "mlp", "t5", "unet", "vit"]

Batch = dict[str, Tensor]
Example = tuple[nn.Module, Batch]

VOCABULARY = 256
IGNORED = -100


def llama(*, layers: int = 2, hidden: int = 64, samples: int = 4, sequence: int = 32, key_heads: int = 2) -> Example:
    """With grouped key heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=key_heads,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train(), _tokens(samples, sequence)


def mixtral(*, layers: int = 2, hidden: int = 64, samples: int = 4, sequence: int = 32, experts: int = 4) -> Example:
    """2 of the experts for each token, their products written as one batched product."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=sequence,
        num_local_experts=experts,
        num_experts_per_tok=2,
        use_cache=False,
    )
    config._experts_implementation = "batched_mm"
    return MixtralForCausalLM(config).train(), _tokens(samples, sequence)


def gpt2(*, layers: int = 2, hidden: int = 64, samples: int = 4, sequence: int = 32, dropout: float = 0.0) -> Example:
    """With the embedding tied to the output."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=hidden,
        n_layer=layers,
        n_head=4,
        n_positions=64,
        use_cache=False,
        attn_pdrop=dropout,
        embd_pdrop=dropout,
        resid_pdrop=dropout,
        bos_token_id=1,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config).train(), _tokens(samples, sequence)


def bert(*, layers: int = 2, hidden: int = 64, samples: int = 4, sequence: int = 32, dropout: float = 0.0) -> Example:
    """With one padded sample."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    batch = _tokens(samples, sequence)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][2, sequence // 2 :] = 0
    return BertForMaskedLM(config).train(), batch


def t5(*, layers: int = 1, hidden: int = 32, samples: int = 4, read: int = 14, written: int = 9) -> Example:
    """What is read is longer than what is written; some of both is padding. A bias in buckets of distance."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=hidden,
        d_kv=hidden // 4,
        d_ff=2 * hidden,
        num_layers=layers,
        num_heads=4,
        dropout_rate=0.0,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        decoder_start_token_id=0,
        use_cache=False,
    )
    generator = _generator()
    tokens, labels = (torch.randint(2, VOCABULARY, (samples, length), generator=generator) for length in (read, written))
    mask = torch.ones_like(tokens)
    mask[1, read // 2 :] = 0
    labels[0, 3:] = IGNORED
    return T5ForConditionalGeneration(config).train(), {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def vit(*, layers: int = 2, hidden: int = 64, samples: int = 4) -> Example:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        num_labels=10,
    )
    generator = _generator()
    images, labels = torch.randn(samples, 3, 32, 32, generator=generator), torch.randint(0, 10, (samples,), generator=generator)
    return ViTForImageClassification(config).train(), {"pixel_values": images, "labels": labels}


def mlp(*, hidden: int = 64, samples: int = 8) -> Example:
    torch.manual_seed(0)
    generator = _generator()
    batch = {"x": torch.randn(samples, hidden, generator=generator), "y": torch.randn(samples, 10, generator=generator)}
    return Mlp(hidden), batch


class Mlp(nn.Module):
    """A mean squared error, and one activation in place."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        wide = 4 * hidden
        first, second = nn.Linear(hidden, wide), nn.Linear(wide, wide)
        self.net = nn.Sequential(first, nn.GELU(), second, nn.ReLU(inplace=True), nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, 10))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.net(x), y)


def unet(*, channels: int = 8, samples: int = 4) -> Example:
    torch.manual_seed(0)
    generator = _generator()
    images, labels = torch.randn(samples, 3, 16, 16, generator=generator), torch.randint(0, 4, (samples, 16, 16), generator=generator)
    return Unet(channels).train(), {"x": images, "y": labels}


class Unet(nn.Module):
    """Two levels, batch normalisation, skip connections; a class for each pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down1, self.down2 = _convolved(3, channels), _convolved(channels, 2 * channels)
        self.middle = _convolved(2 * channels, 4 * channels)
        self.open2, self.up2 = nn.ConvTranspose2d(4 * channels, 2 * channels, 2, stride=2), _convolved(4 * channels, 2 * channels)
        self.open1, self.up1 = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2), _convolved(2 * channels, channels)
        self.head = nn.Conv2d(channels, 4, 1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        fine = self.down1(x)
        coarse = self.down2(self.pool(fine))
        deep = self.middle(self.pool(coarse))
        coarse = self.up2(torch.cat([self.open2(deep), coarse], 1))
        fine = self.up1(torch.cat([self.open1(coarse), fine], 1))
        return F.cross_entropy(self.head(fine), y)


def _convolved(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True))


def _tokens(samples: int, sequence: int) -> Batch:
    """Random tokens; the first sample's labels are all ignored, the second's but for a few."""
    tokens = torch.randint(0, VOCABULARY, (samples, sequence), generator=_generator())
    labels = tokens.clone()
    labels[0] = IGNORED
    labels[1, 5:] = IGNORED
    return {"input_ids": tokens, "labels": labels}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


MODELS: dict[str, Callable[[], Example]] = {"llama": llama, "gpt2": gpt2, "bert": bert, "vit": vit, "mlp": mlp, "unet": unet}
