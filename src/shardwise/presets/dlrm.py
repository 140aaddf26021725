"""DLRM, the deep learning recommendation model (Naumov et al. 2019, arXiv:1906.00091): huge tables, small networks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Dlrm"]


class Dlrm(nn.Module):
    """A row of each table and the numbers through an MLP; the dot product of every pair of these vectors goes into a second MLP.

    rows: of each table; width: of a row and of the bottom MLP's result; bottom: sizes from the numbers on; top: sizes after the products.
    """

    first: Tensor
    second: Tensor

    def __init__(self, *, rows: Sequence[int], width: int, bottom: Sequence[int], top: Sequence[int]) -> None:
        super().__init__()
        vectors = len(rows) + 1
        pairs = vectors * (vectors - 1) // 2
        self.tables = nn.ModuleList(nn.Embedding(count, width) for count in rows)
        self.bottom = nn.Sequential(*_linears(*bottom), nn.ReLU())
        self.top = nn.Sequential(*_linears(width + pairs, *top))
        first, second = torch.tril_indices(vectors, vectors, offset=-1)
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("second", second, persistent=False)

    def forward(self, dense: Tensor, categories: Tensor, clicked: Tensor) -> Tensor:
        """dense: [n, numbers]; categories: int64 [n, tables]; clicked: 0 or 1 [n]."""
        numbers = self.bottom(dense)
        vectors = torch.stack([numbers, *(table(categories[:, i]) for i, table in enumerate(self.tables))], 1)
        products = torch.bmm(vectors, vectors.transpose(1, 2))[:, self.first, self.second]
        logits = self.top(torch.cat([numbers, products], 1)).squeeze(1)
        return F.binary_cross_entropy_with_logits(logits, clicked)


def _linears(*sizes: int) -> list[nn.Module]:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return layers[:-1]
