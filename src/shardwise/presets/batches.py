"""Example batches: for each kind of model the tensors that a training step of it takes, random on a real device, mere shapes on meta.

A maker gets the model's configuration (any object with its values as attributes), the number of samples, the sequence length where the
model has one, and a `Draw`. The batch dim comes first in every tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shardwise.errors import ModelError

__all__ = ["IGNORED", "MAKERS", "Batch", "Draw", "Maker", "causal", "image_classes", "masked"]

Batch = dict[str, Tensor]

IGNORED = -100  # the label that torch's and transformers' cross-entropy skip
_DEFAULT_SEQUENCE = 256
_MASKED_SHARE = 0.15  # BERT (arXiv:1810.04805), section 3.1
_T5_TARGETS = 114 / 512  # target tokens for each input token when spans are corrupted: T5 (arXiv:1910.10683), section 3.1.4
_SOUND = 16000  # samples in a second at 16 kHz
_CLIP_TOKENS, _CLIP_WIDTH = 77, 1280  # of a Stable Diffusion text; SDXL's pooled text
_SDXL_SIZES = 6  # original, crop and target height and width: SDXL (arXiv:2307.01952), section 2.2
_STEPS = 1000  # of noise


class Draw:
    """Random tensors from one seed; on the meta device only their shapes and dtypes."""

    def __init__(self, device: str = "cpu", seed: int = 0) -> None:
        self.device = torch.device(device)
        self.generator = torch.Generator().manual_seed(seed)

    def integers(self, below: int, *shape: int) -> Tensor:
        """int64, from 0 to below - 1."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=torch.int64, device="meta")
        return torch.randint(0, below, shape, generator=self.generator).to(self.device)

    def normal(self, *shape: int) -> Tensor:
        """float32, of mean 0 and variance 1."""
        if self.device.type == "meta":
            return torch.empty(shape, device="meta")
        return torch.randn(shape, generator=self.generator).to(self.device)

    def labels_of_some(self, tokens: Tensor, share: float) -> Tensor:
        """The tokens as labels, of which all but about this share are ignored."""
        if self.device.type == "meta":
            return torch.empty_like(tokens)
        return torch.where(torch.rand(tokens.shape, generator=self.generator).to(self.device) < share, tokens, IGNORED)


Maker = Callable[[Any, int, int | None, Draw], Batch]


# ---- text and sequences -----------------------------------------------------------------------------------------------------------------


def causal(config: Any, samples: int, sequence: int | None, draw: Draw) -> Batch:
    """Each token is the label of the one before it; the model shifts them."""
    tokens = _tokens(config, samples, sequence, draw)
    return {"input_ids": tokens, "labels": tokens.clone()}


def masked(config: Any, samples: int, sequence: int | None, draw: Draw) -> Batch:
    """15 % of the tokens are to be guessed."""
    tokens = _tokens(config, samples, sequence, draw)
    return {"input_ids": tokens, "labels": draw.labels_of_some(tokens, _MASKED_SHARE)}


def span_corruption(config: Any, samples: int, sequence: int | None, draw: Draw) -> Batch:
    """A text with holes, and what filled them."""
    length = sequence or _DEFAULT_SEQUENCE
    targets = max(1, round(length * _T5_TARGETS))
    return {"input_ids": draw.integers(config.vocab_size, samples, length), "labels": draw.integers(config.vocab_size, samples, targets)}


def _tokens(config: Any, samples: int, sequence: int | None, draw: Draw) -> Tensor:
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if sequence is not None and limit is not None and sequence > limit:
        raise ModelError(f"--sequence {sequence} is longer than the configuration's max_position_embeddings, {limit}.")
    return draw.integers(text.vocab_size, samples, min(_DEFAULT_SEQUENCE, limit or _DEFAULT_SEQUENCE) if sequence is None else sequence)


# ---- images, noise, sound ---------------------------------------------------------------------------------------------------------------


def image_classes(config: Any, samples: int, sequence: int | None, draw: Draw) -> Batch:
    """Pixels and a class for each image."""
    if sequence is not None:
        raise ModelError(f"--sequence {sequence} has no effect on an image model. Leave it out.")
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": draw.normal(samples, config.num_channels, height, width), "labels": draw.integers(config.num_labels, samples)}


def text_denoising(config: Any, samples: int, sequence: int | None, draw: Draw) -> Batch:
    """Noisy latents, how noisy, an embedded text, and the noise; for SDXL also the pooled text and sizes."""
    shape = (samples, config.in_channels, config.sample_size, config.sample_size)
    batch = {
        "sample": draw.normal(*shape),
        "timestep": draw.integers(_STEPS, samples),
        "encoder_hidden_states": draw.normal(samples, _CLIP_TOKENS, config.cross_attention_dim),
        "target": draw.normal(*shape),
    }
    if getattr(config, "addition_embed_type", None) == "text_time":
        batch |= {"text_embeds": draw.normal(samples, _CLIP_WIDTH), "time_ids": draw.normal(samples, _SDXL_SIZES)}
    return batch


def class_denoising(config: Any, samples: int, sequence: int | None, draw: Draw) -> Batch:
    """Noisy latents, how noisy, their class, and the noise."""
    shape = (samples, config.channels, config.size, config.size)
    times, classes = draw.integers(_STEPS, samples), draw.integers(config.classes, samples)
    return {"latents": draw.normal(*shape), "times": times, "classes": classes, "noise": draw.normal(*shape)}


def sound_classes(config: Any, samples: int, sequence: int | None, draw: Draw) -> Batch:
    """Sound of `sequence` samples, and a class for each."""
    return {"input_values": draw.normal(samples, sequence or _SOUND), "labels": draw.integers(config.num_labels, samples)}


def spoken_tokens(config: Any, samples: int, sequence: int | None, draw: Draw) -> Batch:
    """Spectrograms of 30 s, and `sequence` tokens of what was said."""
    length = sequence or config.max_target_positions
    if length > config.max_target_positions:
        raise ModelError(f"--sequence {length} is longer than the configuration's max_target_positions, {config.max_target_positions}.")
    features = draw.normal(samples, config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": features, "labels": draw.integers(config.vocab_size, samples, length)}


# ---- tables and proteins ----------------------------------------------------------------------------------------------------------------


def clicks(config: Any, samples: int, sequence: int | None, draw: Draw) -> Batch:
    """Numbers, a row of each table, and whether the sample was clicked."""
    categories = torch.stack([draw.integers(rows, samples) for rows in config.rows], 1)
    return {"dense": draw.normal(samples, config.bottom[0]), "categories": categories, "clicked": draw.integers(2, samples).float()}


def alignment(config: Any, samples: int, sequence: int | None, draw: Draw) -> Batch:
    """An alignment of proteins of `sequence` residues, its hidden letters, and the bin of each pair's distance."""
    residues = sequence or _DEFAULT_SEQUENCE
    letters = draw.integers(config.letters - 1, samples, config.sequences, residues)
    hidden = draw.labels_of_some(letters, _MASKED_SHARE)
    shown = torch.where(hidden == IGNORED, letters, config.letters - 1)
    return {"alignment": shown, "hidden": hidden, "bins": draw.integers(config.bins, samples, residues, residues)}


MAKERS: dict[str, Maker] = {
    make.__name__: make
    for make in (
        causal,
        masked,
        span_corruption,
        image_classes,
        text_denoising,
        class_denoising,
        sound_classes,
        spoken_tokens,
        clicks,
        alignment,
    )
}
