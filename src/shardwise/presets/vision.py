"""ViT-22B's kind of vision transformer (Dehghani et al. 2023, arXiv:2302.05442): attention and feed-forward in parallel.

One norm feeds both, their results are added, queries and keys are normalised, and query, key, value and norms have no bias.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ParallelViT"]


class ParallelViT(nn.Module):
    """Classes of images [n, num_channels, image_size, image_size]; a sigmoid for each class. Tokens are pooled by their mean."""

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        num_channels: int,
        hidden_size: int,
        intermediate_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        num_labels: int,
    ) -> None:
        super().__init__()
        self.labels = num_labels
        self.embed = nn.Conv2d(num_channels, hidden_size, patch_size, stride=patch_size)
        self.positions = nn.Parameter(torch.randn((image_size // patch_size) ** 2, hidden_size) * 0.02)
        self.layers = nn.ModuleList(_Layer(hidden_size, intermediate_size, num_attention_heads) for _ in range(num_hidden_layers))
        self.norm = nn.LayerNorm(hidden_size, bias=False)
        self.head = nn.Linear(hidden_size, num_labels)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Tensor:
        """labels: int64 [n]."""
        x = self.embed(pixel_values).flatten(2).transpose(1, 2) + self.positions
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x).mean(1))
        return F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, self.labels).to(logits.dtype))


class _Layer(nn.Module):
    """x + attention(norm(x)) + feed-forward(norm(x))."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, bias=False)
        self.query_norm, self.key_norm = nn.LayerNorm(width // heads, bias=False), nn.LayerNorm(width // heads, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in self.qkv(y).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(self.query_norm(q), self.key_norm(k), v).transpose(1, 2).flatten(2)
        return x + self.out(mixed) + self.down(F.gelu(self.up(y)))
