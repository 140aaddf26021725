"""DiT, a diffusion transformer over latents with a class for each (Peebles and Xie 2022, arXiv:2212.09748).

diffusers' own has the embeddings of time and class in every layer; in the paper all layers share them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Dit"]

_FREQUENCIES = 128  # of the time's embedding, a cosine and a sine each


class Dit(nn.Module):
    """Finds the noise in latents [n, channels, size, size]; its loss is the mean squared error of that noise.

    patch: side of a token, in latents. The variances, which the paper also learns, are computed but not trained.
    """

    positions: Tensor

    def __init__(self, *, size: int, channels: int, patch: int, width: int, depth: int, heads: int, classes: int) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.register_buffer("positions", _grid(size // patch, width), persistent=False)
        self.time = nn.Sequential(nn.Linear(2 * _FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(classes + 1, width)  # the last one is no class, for guidance
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(depth))
        self.norm, self.modulate = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False), nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, patch * patch * 2 * channels)

    def forward(self, latents: Tensor, times: Tensor, classes: Tensor, noise: Tensor) -> Tensor:
        """times: int64 [n], 0 to 999; classes: int64 [n]; noise: of the shape of latents."""
        x = self.embed(latents).flatten(2).transpose(1, 2) + self.positions
        condition = F.silu(self.time(_waves(times.to(x.dtype))) + self.classes(classes))
        for layer in self.layers:
            x = layer(x, condition)
        shift, scale = self.modulate(condition)[:, None].chunk(2, -1)
        found = self.head(self.norm(x) * (1 + scale) + shift)[..., : self.head.out_features // 2]
        return F.mse_loss(found, _patches(noise, self.patch))


class _Layer(nn.Module):
    """Attention and feed-forward, each shifted, scaled and gated by the condition."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulate = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulate(condition)[:, None].chunk(6, -1)
        q, k, v = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in self.qkv(self.norm1(x) * (1 + scale1) + shift1).chunk(3, -1)
        )
        x = x + gate1 * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + gate2 * self.down(F.gelu(self.up(self.norm2(x) * (1 + scale2) + shift2), approximate="tanh"))


def _patches(images: Tensor, patch: int) -> Tensor:
    """[n, c, h, w] → [n, tokens, c · patch · patch]."""
    n, c, h, w = images.shape
    return images.reshape(n, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, c * patch * patch)


def _waves(times: Tensor) -> Tensor:
    """Cosines and sines of the times [n] at falling frequencies: [n, 2 · frequencies]."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(_FREQUENCIES, dtype=times.dtype, device=times.device) / _FREQUENCIES)
    angles = times[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def _grid(side: int, width: int) -> Tensor:
    """Fixed positions [side², width]: half of the width for the row, half for the column."""
    frequencies = 10000 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], -1)
    rows, columns = waves[:, None].expand(side, side, -1), waves[None].expand(side, side, -1)
    return torch.cat([columns, rows], -1).flatten(0, 1)
