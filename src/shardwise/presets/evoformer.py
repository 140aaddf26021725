"""The Evoformer, AlphaFold 2's trunk (Jumper et al. 2021, supplementary 1.6, algorithms 6 to 15), with two of its losses.

    alignment [n, s, i, c] ──▶ rows (biased by pairs) ──▶ columns ──▶ transition ──┬──▶ alignment   → hidden letters
                                                                                   │ outer product mean
    pairs     [n, i, j, c] ──────────────────────────────────────────────────────▶ + ──▶ triangles ──▶ transition ──▶ pairs → distances

Templates, the extra alignment, recycling and the structure module are left out: together about 5 of AlphaFold's 93 million parameters.
s: sequences of the alignment, i, j, k: residues, c: channels, h: heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Evoformer"]

_RELATIVE = 32  # residues further apart share one embedding: algorithm 4


class Evoformer(nn.Module):
    """Guesses hidden letters of an alignment and the distance of each pair of residues.

    letters: their kinds, the last one stands for a hidden one; sequences: of an alignment; bins: of distance; hidden: of outer products.
    """

    def __init__(
        self,
        *,
        letters: int,
        sequences: int,
        bins: int,
        channels: int,
        pair_channels: int,
        heads: int,
        pair_heads: int,
        head_width: int,
        hidden: int,
        depth: int,
    ) -> None:
        super().__init__()
        self.letters = nn.Embedding(letters, channels)
        self.left, self.right = nn.Embedding(letters, pair_channels), nn.Embedding(letters, pair_channels)
        self.offsets = nn.Embedding(2 * _RELATIVE + 1, pair_channels)
        self.blocks = nn.ModuleList(_Block(channels, pair_channels, heads, pair_heads, head_width, hidden) for _ in range(depth))
        self.head, self.distances = nn.Linear(channels, letters), nn.Linear(pair_channels, bins)

    def forward(self, alignment: Tensor, hidden: Tensor, bins: Tensor) -> Tensor:
        """alignment: int64 [n, s, i], the first row is the protein; hidden: the letters to guess, else -100; bins: int64 [n, i, j]."""
        target, places = alignment[:, 0], torch.arange(alignment.shape[-1], device=alignment.device)
        offsets = (places[:, None] - places[None, :]).clamp(-_RELATIVE, _RELATIVE) + _RELATIVE
        pairs = self.left(target)[:, :, None] + self.right(target)[:, None, :] + self.offsets(offsets)
        x = self.letters(alignment)
        for block in self.blocks:
            x, pairs = block(x, pairs)
        logits = self.distances(pairs)
        logits = logits + logits.transpose(1, 2)
        guessed = F.cross_entropy(self.head(x).flatten(0, 2), hidden.flatten())
        return guessed + F.cross_entropy(logits.permute(0, 3, 1, 2), bins)


class _Block(nn.Module):
    """Algorithm 6."""

    def __init__(self, channels: int, pair_channels: int, heads: int, pair_heads: int, head_width: int, hidden: int) -> None:
        super().__init__()
        self.rows = _Attention(channels, heads, head_width, pair_channels=pair_channels)
        self.columns = _Attention(channels, heads, head_width)
        self.transition = _Transition(channels)
        self.outer = _OuterProductMean(channels, pair_channels, hidden)
        self.outgoing, self.incoming = (_TriangleMultiplication(pair_channels, outgoing=each) for each in (True, False))
        self.starting, self.ending = (_Attention(pair_channels, pair_heads, head_width, triangles=True) for _ in range(2))
        self.pair_transition = _Transition(pair_channels)

    def forward(self, x: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self._dropped(self.rows(x, pairs), 0.15, 1)
        x = x + self.columns(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.transition(x)
        pairs = pairs + self.outer(x)
        pairs = pairs + self._dropped(self.outgoing(pairs), 0.25, 1)
        pairs = pairs + self._dropped(self.incoming(pairs), 0.25, 1)
        pairs = pairs + self._dropped(self.starting(pairs), 0.25, 1)
        pairs = pairs + self._dropped(self.ending(pairs.transpose(1, 2)).transpose(1, 2), 0.25, 2)
        return x, pairs + self.pair_transition(pairs)

    def _dropped(self, x: Tensor, share: float, shared_dim: int) -> Tensor:
        """Dropout whose mask is the same along one dim."""
        return x * F.dropout(torch.ones_like(x.narrow(shared_dim, 0, 1)), share, self.training)


class _Attention(nn.Module):
    """Gated attention along the last but one dim. Algorithms 7, 8, 13 and 14.

    pair_channels: of the pairs that bias its scores, if any; triangles: what it attends to are pairs and bias the scores themselves.
    """

    def __init__(self, channels: int, heads: int, head_width: int, *, pair_channels: int | None = None, triangles: bool = False) -> None:
        super().__init__()
        self.heads, inner = heads, heads * head_width
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * inner, bias=False)
        self.gate, self.out = nn.Linear(channels, inner), nn.Linear(inner, channels)
        self.pair_norm = nn.LayerNorm(pair_channels) if pair_channels else None
        self.bias = nn.Linear(pair_channels or channels, heads, bias=False) if pair_channels or triangles else None

    def forward(self, x: Tensor, pairs: Tensor | None = None) -> Tensor:
        normed = self.norm(x)
        q, k, v = (each.unflatten(-1, (self.heads, -1)) for each in self.qkv(normed).chunk(3, -1))
        scores = torch.einsum("...qhc,...khc->...hqk", q, k) * q.shape[-1] ** -0.5
        if self.bias is not None:
            biasing = normed if self.pair_norm is None else self.pair_norm(pairs)
            scores = scores + self.bias(biasing).permute(0, 3, 1, 2)[:, None]
        mixed = torch.einsum("...hqk,...khc->...qhc", scores.softmax(-1), v).flatten(-2)
        return self.out(self.gate(normed).sigmoid() * mixed)


class _Transition(nn.Sequential):
    """Two linear layers, four times as wide between them. Algorithms 9 and 15."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.LayerNorm(channels), nn.Linear(channels, 4 * channels), nn.ReLU(), nn.Linear(4 * channels, channels))


class _OuterProductMean(nn.Module):
    """[n, s, i, a] → [n, i, j, c]: the mean over the sequences of products of two residues' features. Algorithm 10."""

    def __init__(self, channels: int, pair_channels: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.left, self.right = nn.Linear(channels, hidden), nn.Linear(channels, hidden)
        self.out = nn.Linear(hidden * hidden, pair_channels)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return self.out(torch.einsum("nsia,nsjb->nijab", self.left(normed), self.right(normed)).flatten(-2) / x.shape[1])


class _TriangleMultiplication(nn.Module):
    """The edge i j from the edges i k and j k (outgoing) or k i and k j (incoming). Algorithms 11 and 12."""

    def __init__(self, channels: int, *, outgoing: bool) -> None:
        super().__init__()
        self.equation = "nikc,njkc->nijc" if outgoing else "nkic,nkjc->nijc"
        self.norm, self.norm_out = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.edges, self.gates = nn.Linear(channels, 2 * channels), nn.Linear(channels, 2 * channels)
        self.gate, self.out = nn.Linear(channels, channels), nn.Linear(channels, channels)

    def forward(self, pairs: Tensor) -> Tensor:
        normed = self.norm(pairs)
        left, right = (self.gates(normed).sigmoid() * self.edges(normed)).chunk(2, -1)
        return self.gate(normed).sigmoid() * self.out(self.norm_out(torch.einsum(self.equation, left, right)))
