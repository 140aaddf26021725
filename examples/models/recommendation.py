"""Small recommendation models, each with a batch: copy one, or plan and run it as it is.

Each function returns `(model, batch)`: the module in training mode, seeded, and the keyword arguments of its forward, whose output is the
loss. Tables are small here; their rows are what a real model splits.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["dcn_v2", "deep_fm", "din", "dlrm", "mmoe", "sasrec", "two_tower", "wide_and_deep"]

Batch = dict[str, Tensor]
Example = tuple[nn.Module, Batch]

_ROWS = (200, 37, 64, 12)  # of each table of categories
_DENSE = 13  # numbers that are no categories


def _clicks(samples: int = 8, *, bag: int = 0) -> Batch:
    """Numbers, one category (or a bag of them) for each table, and whether the sample was clicked."""
    generator = torch.Generator().manual_seed(1)
    shape = (samples, bag) if bag else (samples,)
    categories = torch.stack([torch.randint(0, rows, shape, generator=generator) for rows in _ROWS], 1)
    dense = torch.randn(samples, _DENSE, generator=generator)
    return {"dense": dense, "categories": categories, "clicked": torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1]).repeat(samples // 8)}


def _mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class _Dlrm(nn.Module):
    """Bags of categories summed in their tables, dense numbers through an MLP, then the dot product of each pair of vectors."""

    first: Tensor
    second: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(rows, width, mode="sum") for rows in _ROWS)
        self.bottom = nn.Sequential(_mlp(_DENSE, 32, width), nn.ReLU())
        vectors = len(_ROWS) + 1
        self.top = _mlp(width + vectors * (vectors - 1) // 2, 32, 1)
        lower = torch.tril_indices(vectors, vectors, offset=-1)
        self.register_buffer("first", lower[0], persistent=False)
        self.register_buffer("second", lower[1], persistent=False)

    def forward(self, dense: Tensor, categories: Tensor, clicked: Tensor) -> Tensor:
        bottom = self.bottom(dense)
        vectors = torch.stack([bottom] + [table(categories[:, i]) for i, table in enumerate(self.tables)], 1)
        pairs = torch.bmm(vectors, vectors.transpose(1, 2))[:, self.first, self.second]
        logits = self.top(torch.cat([bottom, pairs], 1)).squeeze(1)
        return F.binary_cross_entropy_with_logits(logits, clicked)


def dlrm() -> Example:
    """Embedding bags of three categories, pairwise dot products, a binary loss."""
    torch.manual_seed(0)
    return _Dlrm(16).train(), _clicks(bag=3)


class _TwoTower(nn.Module):
    """Users and items to unit vectors; each user's item against all items of the batch."""

    def __init__(self, users: int, items: int, width: int) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(users, width), nn.Embedding(items, width, padding_idx=0)
        self.user_tower, self.item_tower = _mlp(2 * width, 32, width), _mlp(width, 32, width)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, user: Tensor, history: Tensor, item: Tensor) -> Tensor:
        seen = (history != 0).unsqueeze(-1)
        mean = (self.items(history) * seen).sum(1) / seen.sum(1).clamp(min=1)
        left = F.normalize(self.user_tower(torch.cat([self.users(user), mean], 1)), dim=-1)
        right = F.normalize(self.item_tower(self.items(item)), dim=-1)
        scores = self.log_scale.exp() * left @ right.t()
        target = torch.arange(scores.shape[0], device=scores.device)
        return (F.cross_entropy(scores, target) + F.cross_entropy(scores.t(), target)) / 2


def two_tower() -> Example:
    """A contrastive loss over the batch, in both directions; histories of unlike lengths."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    history = torch.randint(1, 100, (8, 6), generator=generator)
    history = history.where(torch.arange(6) < torch.randint(0, 7, (8, 1), generator=generator), 0)
    batch = {"user": torch.arange(8) * 5, "history": history, "item": 1 + torch.randperm(99, generator=generator)[:8]}
    return _TwoTower(50, 100, 16).train(), batch


class _Table(nn.Module):
    """One table for all categories, each shifted to its own rows."""

    shift: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(sum(_ROWS), width)
        self.register_buffer("shift", torch.tensor([0, *_ROWS[:-1]]).cumsum(0))

    def forward(self, categories: Tensor) -> Tensor:
        return self.table(categories + self.shift)


class _Cross(nn.Module):
    """x0 * (low-rank matrix of x + bias) + x."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(width, rank, bias=False), nn.Linear(rank, width)

    def forward(self, start: Tensor, x: Tensor) -> Tensor:
        return start * self.wide(self.narrow(x)) + x


class _DcnV2(nn.Module):
    """Cross layers and a deep network, in parallel."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.table = _Table(width)
        size = _DENSE + width * len(_ROWS)
        self.norm = nn.BatchNorm1d(_DENSE)
        self.cross = nn.ModuleList(_Cross(size, 8) for _ in range(layers))
        self.deep = nn.Sequential(_mlp(size, 32, 32), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(size + 32, 1)

    def forward(self, dense: Tensor, categories: Tensor, clicked: Tensor) -> Tensor:
        start = torch.cat([self.norm(dense), self.table(categories).flatten(1)], 1)
        x = start
        for cross in self.cross:
            x = cross(start, x)
        logits = self.head(torch.cat([x, self.deep(start)], 1)).squeeze(1)
        return F.binary_cross_entropy_with_logits(logits, clicked, pos_weight=logits.new_tensor(2.0))


def dcn_v2() -> Example:
    """A low-rank cross network beside a deep one, batch norm of the numbers, dropout, a weighted binary loss."""
    torch.manual_seed(0)
    return _DcnV2(8, 3).train(), _clicks()


class _DeepFm(nn.Module):
    """First order, second order (square of the sum minus sum of the squares) and a deep network, added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _Table(1), _Table(width)
        self.linear, self.numbers = nn.Linear(_DENSE, 1), nn.Parameter(torch.randn(_DENSE, width) * 0.1)
        self.deep = _mlp(width * (len(_ROWS) + _DENSE), 32, 1)

    def forward(self, dense: Tensor, categories: Tensor, clicked: Tensor) -> Tensor:
        vectors = torch.cat([self.second(categories), dense[..., None] * self.numbers], 1)
        pairs = (vectors.sum(1).square() - vectors.square().sum(1)).sum(1) / 2
        first = self.first(categories).sum((1, 2)) + self.linear(dense).squeeze(1)
        chance = torch.sigmoid(first + pairs + self.deep(vectors.flatten(1)).squeeze(1))
        return F.binary_cross_entropy(chance, clicked)


def deep_fm() -> Example:
    """A factorisation machine and a deep network on shared vectors; the binary loss of a sigmoid."""
    torch.manual_seed(0)
    return _DeepFm(8).train(), _clicks()


class _WideAndDeep(nn.Module):
    """A linear model of crossed categories and a deep network, added."""

    def __init__(self, width: int, crossed: int) -> None:
        super().__init__()
        self.crossed = crossed
        self.wide = nn.EmbeddingBag(crossed, 1, mode="sum")
        self.tables = nn.ModuleList(nn.Embedding(rows, width) for rows in _ROWS)
        self.deep = _mlp(_DENSE + width * len(_ROWS), 32, 16, 1)

    def forward(self, dense: Tensor, categories: Tensor, clicked: Tensor) -> Tensor:
        first, second = torch.triu_indices(len(_ROWS), len(_ROWS), offset=1, device=categories.device)
        pairs = (categories[:, first] * 1009 + categories[:, second] * 31 + first) % self.crossed
        vectors = [table(categories[:, i]) for i, table in enumerate(self.tables)]
        logits = self.wide(pairs) + self.deep(torch.cat([dense, *vectors], 1))
        return F.binary_cross_entropy_with_logits(logits.squeeze(1), clicked)


def wide_and_deep() -> Example:
    """Pairs of categories hashed into one wide table, beside a deep network."""
    torch.manual_seed(0)
    return _WideAndDeep(8, 100).train(), _clicks()


class _SasRec(nn.Module):
    """A causal transformer over the items seen; the next item against one that was not."""

    def __init__(self, items: int, width: int, length: int) -> None:
        super().__init__()
        self.items, self.positions = nn.Embedding(items, width, padding_idx=0), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, seen: Tensor, following: Tensor, other: Tensor) -> Tensor:
        length = seen.shape[1]
        x = self.items(seen) * self.items.embedding_dim**0.5 + self.positions(torch.arange(length, device=seen.device))
        causal = torch.ones(length, length, dtype=torch.bool, device=seen.device).triu(1)
        hidden = self.layers(x, mask=causal)
        good, bad = ((hidden * self.items(items)).sum(-1) for items in (following, other))
        loss = F.softplus(-good) + F.softplus(bad)
        real = (following != 0).to(loss.dtype)
        return (loss * real).sum() / real.sum()


def sasrec() -> Example:
    """Sequences of unlike lengths, one table for input and output, a mean over real places alone."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    walks = torch.randint(1, 100, (4, 17), generator=generator)
    walks = walks.where(torch.arange(17) < torch.tensor([[17], [5], [11], [3]]), 0)
    other = torch.randint(1, 100, (4, 16), generator=generator)
    return _SasRec(100, 32, 16).train(), {"seen": walks[:, :-1].clone(), "following": walks[:, 1:].clone(), "other": other}


class _Din(nn.Module):
    """The history weighted by a small network of each past item and the candidate."""

    def __init__(self, items: int, width: int) -> None:
        super().__init__()
        self.items = nn.Embedding(items, width, padding_idx=0)
        self.weigh = nn.Sequential(nn.Linear(4 * width, 16), nn.PReLU(), nn.Linear(16, 1))
        self.head = nn.Sequential(nn.Linear(2 * width, 32), nn.BatchNorm1d(32), nn.PReLU(32), nn.Linear(32, 2))

    def forward(self, history: Tensor, item: Tensor, clicked: Tensor) -> Tensor:
        past, candidate = self.items(history), self.items(item)
        both = candidate[:, None].expand_as(past)
        weights = self.weigh(torch.cat([past, both, past - both, past * both], -1)).squeeze(-1)
        weights = weights.masked_fill(history == 0, -1e9).softmax(-1)
        pooled = torch.einsum("bl,bld->bd", weights, past)
        return F.nll_loss(F.log_softmax(self.head(torch.cat([pooled, candidate], 1)), -1), clicked)


def din() -> Example:
    """Attention over the history by an MLP, PReLU, batch norm, a two-class loss."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    history = torch.randint(1, 100, (8, 10), generator=generator)
    history = history.where(torch.arange(10) < torch.randint(1, 11, (8, 1), generator=generator), 0)
    batch = {"history": history, "item": torch.randint(1, 100, (8,), generator=generator), "clicked": torch.arange(8) % 3 % 2}
    return _Din(100, 16).train(), batch


class _Mmoe(nn.Module):
    """Experts shared by two tasks, each with a gate over them; the second task counts only where the first one happened."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.table = _Table(width)
        size = _DENSE + width * len(_ROWS)
        self.experts = nn.ModuleList(_mlp(size, 32, 16) for _ in range(experts))
        self.gates = nn.ModuleList(nn.Linear(size, experts) for _ in range(2))
        self.towers = nn.ModuleList(_mlp(16, 8, 1) for _ in range(2))

    def forward(self, dense: Tensor, categories: Tensor, clicked: Tensor, paid: Tensor) -> Tensor:
        x = torch.cat([dense, self.table(categories).flatten(1)], 1)
        made = torch.stack([expert(x) for expert in self.experts], 1)
        click, pay = (
            tower((gate(x).softmax(-1)[:, None] @ made).squeeze(1)).squeeze(1) for gate, tower in zip(self.gates, self.towers, strict=True)
        )
        paying = F.huber_loss(pay, paid, reduction="none") * clicked
        return F.binary_cross_entropy_with_logits(click, clicked) + paying.sum() / clicked.sum().clamp(min=1)


def mmoe() -> Example:
    """Several tasks on gated shared experts, one of them on few samples."""
    torch.manual_seed(0)
    batch = _clicks()
    return _Mmoe(8, 3).train(), {**batch, "paid": torch.linspace(0, 3, 8)}
