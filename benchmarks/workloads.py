"""The models that are timed, and their batches: equal in every process that asks for them.

`FULL` holds the shapes that results are reported for; `MEDIUM` the same families in a size that takes a tenth, where many layouts are to
be run; `SMALL` in one that trains in milliseconds, to try the harness itself. Dropout is off everywhere, so that the losses of all
contestants can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import ModelOutput

SEED = 1234
LEARNING_RATE = 1e-4  # without a warm-up, 1e-3 makes a rounding of the weights a difference of 1e-4 in the fourth loss

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One model shape and its training data; what a family does not have (`sequence` of images, `experts` of all but `moe`) is unused."""

    family: str
    layers: int = 8
    hidden: int = 512
    ffn: int = 2048
    heads: int = 8
    vocabulary: int = 8192
    sequence: int = 256
    image: int = 224
    patch: int = 16
    classes: int = 1000
    experts: int = 8
    channels: tuple[int, ...] = ()
    batch_size: int = 16

    def build(self) -> nn.Module:
        """Return the model in training mode, float32, with the same weights in every process."""
        torch.manual_seed(SEED)
        return _MODELS[self.family](self).train()

    def batch(self, index: int) -> Batch:
        """Return the global batch of training step `index`, the same in every process."""
        generator = torch.Generator().manual_seed(SEED + 1 + index)
        return _BATCHES.get(self.family, _tokens)(self, generator)


def optimizer(parameters: object) -> torch.optim.Optimizer:
    """Return the optimizer that every contestant uses."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE)  # type: ignore[arg-type]


def _gpt2(shape: Workload) -> nn.Module:
    config = GPT2Config(
        n_layer=shape.layers,
        n_embd=shape.hidden,
        n_inner=shape.ffn,
        n_head=shape.heads,
        n_positions=shape.sequence,
        vocab_size=shape.vocabulary,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # its class name does not tell transformers, which would warn
    return model


def _llama(shape: Workload) -> nn.Module:
    config = LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.sequence,
        vocab_size=shape.vocabulary,
        attention_dropout=0.0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def _vit(shape: Workload) -> nn.Module:
    config = ViTConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_attention_heads=shape.heads,
        image_size=shape.image,
        patch_size=shape.patch,
        num_labels=shape.classes,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    return ViTForImageClassification(config)


def _bert(shape: Workload) -> nn.Module:
    config = BertConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.sequence,
        vocab_size=shape.vocabulary,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    return BertForMaskedLM(config)


def _moe(shape: Workload) -> nn.Module:
    """Mixtral: two of the experts for each token; no loss of its router's, which peers would count by ranks."""
    config = MixtralConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        num_local_experts=shape.experts,
        num_experts_per_tok=2,
        max_position_embeddings=shape.sequence,
        vocab_size=shape.vocabulary,
        attention_dropout=0.0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return MixtralForCausalLM(config)


@dataclass
class Denoised(ModelOutput):
    """What `Denoiser` returns."""

    loss: Tensor | None = None


class Denoiser(nn.Module):
    """diffusers' U-Net, trained to tell the noise in an image."""

    def __init__(self, shape: Workload) -> None:
        from diffusers import UNet2DModel

        super().__init__()
        levels = len(shape.channels)
        self.unet = UNet2DModel(
            sample_size=shape.image,
            block_out_channels=shape.channels,
            layers_per_block=2,
            down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
            norm_num_groups=8,
            attention_head_dim=8,
        )

    def forward(self, sample: Tensor, timestep: Tensor, target: Tensor) -> Denoised:
        """sample, target [batch, 3, image, image]; timestep [batch]."""
        return Denoised(loss=F.mse_loss(self.unet(sample, timestep, return_dict=False)[0], target))


_MODELS: dict[str, Callable[[Workload], nn.Module]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "vit": _vit,
    "bert": _bert,
    "unet": Denoiser,
    "moe": _moe,
}


def _tokens(shape: Workload, generator: torch.Generator) -> Batch:
    """Text-like tokens: rare ones are rarer, and every odd position follows from the one before, so that the loss can fall."""
    size = (shape.batch_size, shape.sequence)
    tokens = (shape.vocabulary * torch.rand(size, generator=generator) ** 4).long()
    tokens[:, 1::2] = (7 * tokens[:, 0::2] + 1) % shape.vocabulary
    return {"input_ids": tokens, "labels": tokens.clone()}


def _images(shape: Workload, generator: torch.Generator) -> Batch:
    """Noise whose brightness tells the class; few classes occur, so that the loss can fall."""
    labels = torch.randint(min(10, shape.classes), (shape.batch_size,), generator=generator)
    noise = torch.randn(shape.batch_size, 3, shape.image, shape.image, generator=generator)
    return {"pixel_values": noise + labels.view(-1, 1, 1, 1) / 5 - 1, "labels": labels}


def _masked(shape: Workload, generator: torch.Generator) -> Batch:
    """Tokens of which an eighth is hidden, equally many in each sample: then the mean over samples is that over ranks."""
    tokens = _tokens(shape, generator)["input_ids"]
    hidden = torch.rand(tokens.shape, generator=generator).argsort(1)[:, : max(1, shape.sequence // 8)]
    labels = torch.full_like(tokens, -100).scatter(1, hidden, tokens.gather(1, hidden))
    return {"input_ids": tokens.scatter(1, hidden, 0), "labels": labels}


def _noised(shape: Workload, generator: torch.Generator) -> Batch:
    """Smooth images with noise, more at later times."""
    size = (shape.batch_size, 3, shape.image, shape.image)
    image = torch.linspace(-1, 1, shape.image).expand(size)
    noise = torch.randn(size, generator=generator)
    timestep = torch.randint(1000, (shape.batch_size,), generator=generator)
    share = (timestep / 1000).view(-1, 1, 1, 1)
    return {"sample": (1 - share).sqrt() * image + share.sqrt() * noise, "timestep": timestep, "target": noise}


_BATCHES: dict[str, Callable[[Workload, torch.Generator], Batch]] = {"vit": _images, "bert": _masked, "unet": _noised}

FULL = {
    "gpt2": Workload(family="gpt2"),
    "llama": Workload(family="llama", ffn=1376),
    "vit": Workload(family="vit", hidden=384, ffn=1536),
    "bert": Workload(family="bert"),
    "unet": Workload(family="unet", image=32, channels=(64, 128, 128)),
    "moe": Workload(family="moe", layers=4, ffn=688),
}
MEDIUM = {
    "gpt2": Workload(family="gpt2", layers=6, hidden=256, ffn=1024, heads=4, vocabulary=4096, sequence=128),
    "llama": Workload(family="llama", layers=6, hidden=256, ffn=688, heads=4, vocabulary=4096, sequence=128),
    "vit": Workload(family="vit", layers=6, hidden=256, ffn=1024, heads=4, image=128),
    "bert": Workload(family="bert", layers=6, hidden=256, ffn=1024, heads=4, vocabulary=4096, sequence=128),
    "unet": Workload(family="unet", image=16, channels=(32, 64)),
    "moe": Workload(family="moe", layers=3, hidden=256, ffn=344, heads=4, vocabulary=4096, sequence=128),
}
SMALL = {
    "gpt2": Workload(family="gpt2", layers=2, hidden=32, ffn=128, heads=4, vocabulary=64, sequence=16),
    "llama": Workload(family="llama", layers=2, hidden=32, ffn=96, heads=4, vocabulary=64, sequence=16),
    "vit": Workload(family="vit", layers=2, hidden=32, ffn=128, heads=4, image=32, patch=8, classes=16),
    "bert": Workload(family="bert", layers=2, hidden=32, ffn=128, heads=4, vocabulary=64, sequence=16),
    "unet": Workload(family="unet", image=8, channels=(8, 16)),
    "moe": Workload(family="moe", layers=2, hidden=32, ffn=48, heads=4, vocabulary=64, sequence=16),
}
