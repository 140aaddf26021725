"""Small parts of protein folding networks, each with a batch: what they do to pairs of residues, and to their places in space.

Every function returns (model, batch), seeded; `model(**batch)` is the loss. s: sequences, i, j, k: residues, c: channels, h: heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "evoformer",
    "folding_trunk",
    "invariant_point_attention",
    "outer_products",
    "pair_stack",
    "structure_module",
    "triangle_attention",
]

Batch = dict[str, Tensor]
Example = tuple[nn.Module, Batch]

SAMPLES, SEQUENCES, RESIDUES, BINS = 2, 4, 8, 8


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _pairs(channels: int) -> Batch:
    """Features of pairs [n, i, j, c] and a bin of distance for each."""
    generator = _generator()
    pairs = torch.randn(SAMPLES, RESIDUES, RESIDUES, channels, generator=generator)
    return {"pairs": pairs, "bins": torch.randint(0, BINS, (SAMPLES, RESIDUES, RESIDUES), generator=generator)}


class Attention(nn.Module):
    """Gated attention along the last but one dim, with a bias added to the scores."""

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.gate, self.out = nn.Linear(channels, channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        normed = self.norm(x)
        q, k, v = (each.unflatten(-1, (self.heads, -1)) for each in self.qkv(normed).chunk(3, -1))
        scores = torch.einsum("...qhc,...khc->...hqk", q, k) * q.shape[-1] ** -0.5
        if bias is not None:
            scores = scores + bias
        mixed = torch.einsum("...hqk,...khc->...qhc", scores.softmax(-1), v).flatten(-2)
        return self.out(self.gate(normed).sigmoid() * mixed)


class Transition(nn.Sequential):
    """Two linear layers, four times as wide between them."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.LayerNorm(channels), nn.Linear(channels, 4 * channels), nn.ReLU(), nn.Linear(4 * channels, channels))


class OuterProductMean(nn.Module):
    """[n, s, i, a] → [n, i, j, c]: the mean over the sequences of products of two residues' features."""

    def __init__(self, sequence_channels: int, pair_channels: int, hidden: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(sequence_channels)
        self.left, self.right = nn.Linear(sequence_channels, hidden), nn.Linear(sequence_channels, hidden)
        self.out = nn.Linear(hidden * hidden, pair_channels)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        product = torch.einsum("nsia,nsjb->nijab", self.left(normed), self.right(normed)) / x.shape[1]
        return self.out(product.flatten(-2))


class TriangleMultiplication(nn.Module):
    """The edge i j from the edges i k and j k (outgoing) or k i and k j (incoming)."""

    def __init__(self, channels: int, outgoing: bool) -> None:
        super().__init__()
        self.equation = "nikc,njkc->nijc" if outgoing else "nkic,nkjc->nijc"
        self.norm, self.norm_out = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.edges, self.gates = nn.Linear(channels, 2 * channels), nn.Linear(channels, 2 * channels)
        self.gate, self.out = nn.Linear(channels, channels), nn.Linear(channels, channels)

    def forward(self, pairs: Tensor) -> Tensor:
        normed = self.norm(pairs)
        left, right = (self.gates(normed).sigmoid() * self.edges(normed)).chunk(2, -1)
        return self.gate(normed).sigmoid() * self.out(self.norm_out(torch.einsum(self.equation, left, right)))


class TriangleAttention(nn.Module):
    """Attention between the edges that start (or end) at one residue, biased by the third edge of the triangle."""

    def __init__(self, channels: int, starting: bool) -> None:
        super().__init__()
        self.starting = starting
        self.norm, self.bias = nn.LayerNorm(channels), nn.Linear(channels, 4, bias=False)
        self.attention = Attention(channels)

    def forward(self, pairs: Tensor) -> Tensor:
        pairs = pairs if self.starting else pairs.transpose(1, 2)
        bias = torch.einsum("njkh->nhjk", self.bias(self.norm(pairs)))[:, None]
        mixed = self.attention(pairs, bias)
        return mixed if self.starting else mixed.transpose(1, 2)


class PairBlock(nn.Module):
    """Both triangle multiplications, both triangle attentions, a transition; each added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            [
                TriangleMultiplication(channels, outgoing=True),
                TriangleMultiplication(channels, outgoing=False),
                TriangleAttention(channels, starting=True),
                TriangleAttention(channels, starting=False),
                Transition(channels),
            ]
        )

    def forward(self, pairs: Tensor) -> Tensor:
        for part in self.parts:
            pairs = pairs + part(pairs)
        return pairs


class EvoformerBlock(nn.Module):
    """Attention in the rows (biased by the pairs) and in the columns of an alignment, which then changes the pairs."""

    def __init__(self, sequence_channels: int, pair_channels: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.bias = nn.LayerNorm(pair_channels), nn.Linear(pair_channels, 4, bias=False)
        self.rows, self.columns = Attention(sequence_channels), Attention(sequence_channels)
        self.transition = Transition(sequence_channels)
        self.outer = OuterProductMean(sequence_channels, pair_channels)
        self.pairs = PairBlock(pair_channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, alignment: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
        bias = self.bias(self.norm(pairs)).permute(0, 3, 1, 2)[:, None]
        alignment = alignment + self.dropout(self.rows(alignment, bias))
        alignment = alignment + self.columns(alignment.transpose(1, 2)).transpose(1, 2)
        alignment = alignment + self.transition(alignment)
        return alignment, self.pairs(pairs + self.outer(alignment))


class Evoformer(nn.Module):
    """Blocks over an alignment of sequences; predicts hidden letters and the distances of residues."""

    def __init__(self, channels: int = 16, layers: int = 1, letters: int = 24, dropout: float = 0.0) -> None:
        super().__init__()
        self.letters = nn.Embedding(letters, channels)
        self.left, self.right = nn.Embedding(letters, channels), nn.Embedding(letters, channels)
        self.offsets = nn.Embedding(2 * RESIDUES - 1, channels)
        self.blocks = nn.ModuleList(EvoformerBlock(channels, channels, dropout) for _ in range(layers))
        self.head, self.distances = nn.Linear(channels, letters), nn.Linear(channels, BINS)

    def forward(self, alignment: Tensor, letters: Tensor, bins: Tensor) -> Tensor:
        target = alignment[:, 0]
        places = torch.arange(alignment.shape[-1], device=alignment.device)
        offsets = self.offsets(places[:, None] - places[None, :] + RESIDUES - 1)
        pairs = self.left(target)[:, :, None] + self.right(target)[:, None, :] + offsets
        x = self.letters(alignment)
        for block in self.blocks:
            x, pairs = block(x, pairs)
        logits = self.distances(pairs)
        logits = logits + logits.transpose(1, 2)
        guessed = F.cross_entropy(self.head(x).flatten(0, 2), letters.flatten())
        return guessed + F.cross_entropy(logits.permute(0, 3, 1, 2), bins)


def _alignment() -> Batch:
    generator = _generator()
    letters = torch.randint(0, 22, (SAMPLES, SEQUENCES, RESIDUES), generator=generator)
    hidden = torch.rand(letters.shape, generator=generator) < 0.15
    return {
        "alignment": torch.where(hidden, 23, letters),
        "letters": torch.where(hidden, letters, -100),
        "bins": torch.randint(0, BINS, (SAMPLES, RESIDUES, RESIDUES), generator=generator),
    }


def evoformer() -> Example:
    """Rows and columns of an alignment, outer product mean, triangle multiplications and attentions; hidden letters and distances."""
    torch.manual_seed(0)
    return Evoformer().train(), _alignment()


class Recycled(nn.Module):
    """The pair stack run three times on its own result; only the last time has gradients."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(channels, channels), nn.LayerNorm(channels)
        self.block = PairBlock(channels)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(channels, BINS)

    def forward(self, pairs: Tensor, bins: Tensor) -> Tensor:
        start = self.first(pairs)
        found = torch.zeros_like(start)
        with torch.no_grad():
            for _ in range(2):
                found = self.block(start + self.norm(found))
        found = self.block(start + self.dropout(self.norm(found)))
        return F.cross_entropy(self.head(found).permute(0, 3, 1, 2), bins)


def folding_trunk() -> Example:
    """Recycling: two passes without gradient, one with; dropout."""
    torch.manual_seed(0)
    return Recycled().train(), _pairs(16)


class PairStack(nn.Module):
    """Pairs in, bins of distance out."""

    def __init__(self, blocks: nn.Module, channels: int = 16) -> None:
        super().__init__()
        self.blocks, self.head = blocks, nn.Linear(channels, BINS)

    def forward(self, pairs: Tensor, bins: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.blocks(pairs)).permute(0, 3, 1, 2), bins)


def pair_stack() -> Example:
    """Two whole blocks on pairs."""
    torch.manual_seed(0)
    return PairStack(nn.Sequential(PairBlock(16), PairBlock(16))).train(), _pairs(16)


def triangle_attention() -> Example:
    """Triangle attention alone, around the starting and the ending residue."""
    torch.manual_seed(0)
    return PairStack(nn.Sequential(TriangleAttention(16, True), TriangleAttention(16, False))).train(), _pairs(16)


class OuterProducts(nn.Module):
    """Sums of products written in every way einsum allows."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.bilinear = nn.Parameter(torch.randn(channels, channels, 4) / channels)
        self.mix = nn.Parameter(torch.randn(4, 4))
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pairs = torch.einsum("nia,abh,njb->nijh", x, self.bilinear, y)  # three inputs
        traces = torch.einsum("niih->nh", pairs)  # a diagonal, summed
        diagonals = torch.einsum("niih->nih", pairs)  # a diagonal, kept
        mixed = torch.einsum("...h,hg->...g", pairs, self.mix)  # any dims in front
        scaled = torch.einsum("nijh,h->nhij", mixed, self.scale)  # none summed, turned
        squares = torch.einsum("nhij,nhij->n", scaled, scaled)  # all summed but one
        outer = torch.einsum("na,nb->nab", traces, diagonals.sum(1))  # an outer product
        means = torch.einsum("nab->", outer) / outer.numel()  # all summed
        chained = torch.einsum("nhik,nhkj->nhij", scaled, scaled)  # a batched matrix product
        return squares.mean() / pairs[0].numel() + means.square() + torch.einsum("nhij,nhji->n", chained, scaled).tanh().mean()


def outer_products() -> Example:
    """einsum of all forms: three inputs, diagonals, traces, ellipsis, turned, outer, whole sums."""
    torch.manual_seed(0)
    generator = _generator()
    x, y = (torch.randn(4, 6, 8, generator=generator) for _ in range(2))
    return OuterProducts().train(), {"x": x, "y": y}


class InvariantPointAttention(nn.Module):
    """Attention by features, by pairs and by the distance of points that each residue holds in a frame of its own."""

    def __init__(self, channels: int = 16, pair_channels: int = 8, heads: int = 4, points: int = 2) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.placed = nn.Linear(channels, 3 * heads * points * 3, bias=False)
        self.bias = nn.Linear(pair_channels, heads)
        self.weights = nn.Parameter(torch.zeros(heads))
        self.out = nn.Linear(channels + heads * (pair_channels + 4 * points), channels)

    def forward(self, x: Tensor, pairs: Tensor, rotations: Tensor, shifts: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        local = self.placed(x).unflatten(-1, (3, self.heads, self.points, 3))
        q_at, k_at, v_at = (torch.einsum("nixy,nithpy->nithpx", rotations, local) + shifts[:, :, None, None, None]).unbind(2)
        distances = (q_at[:, :, None] - k_at[:, None, :]).square().sum((-1, -2))
        scores = torch.einsum("nihc,njhc->nijh", q, k) * q.shape[-1] ** -0.5 + self.bias(pairs) - F.softplus(self.weights) * distances / 2
        weights = (scores * 3**-0.5).softmax(2)
        seen = torch.einsum("nijh,njhpx->nihpx", weights, v_at) - shifts[:, :, None, None]
        seen = torch.einsum("niyx,nihpy->nihpx", rotations, seen)  # back into the residue's own frame
        mixed = torch.einsum("nijh,njhc->nihc", weights, v)
        edges = torch.einsum("nijh,nijc->nihc", weights, pairs)
        lengths = (seen.square().sum(-1) + 1e-8).sqrt()
        return self.out(torch.cat([mixed.flatten(2), edges.flatten(2), seen.flatten(2), lengths.flatten(2)], -1))


def _rotations(quaternions: Tensor) -> Tensor:
    """Rotation matrices [..., 3, 3] of quaternions [..., 4]."""
    w, x, y, z = F.normalize(quaternions, dim=-1).unbind(-1)
    rows = [
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], -1),
        torch.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], -1),
        torch.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1),
    ]
    return torch.stack(rows, -2)


class Placed(nn.Module):
    """Invariant point attention in given frames, then a place for each residue, relative to its frame."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.attention, self.norm = InvariantPointAttention(channels), nn.LayerNorm(channels)
        self.head = nn.Linear(channels, 3)

    def forward(self, x: Tensor, pairs: Tensor, quaternions: Tensor, shifts: Tensor, places: Tensor) -> Tensor:
        rotations = _rotations(quaternions)
        x = self.norm(x + self.attention(x, pairs, rotations, shifts))
        guess = torch.einsum("nixy,niy->nix", rotations, self.head(x)) + shifts
        return F.mse_loss(guess, places)


def _residues() -> Batch:
    generator = _generator()
    return {
        "x": torch.randn(SAMPLES, RESIDUES, 16, generator=generator),
        "pairs": torch.randn(SAMPLES, RESIDUES, RESIDUES, 8, generator=generator),
        "places": torch.randn(SAMPLES, RESIDUES, 3, generator=generator),
    }


def invariant_point_attention() -> Example:
    """Distances of points in rotated frames inside the scores."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(2)
    frames = {name: torch.randn(SAMPLES, RESIDUES, size, generator=generator) for name, size in (("quaternions", 4), ("shifts", 3))}
    return Placed().train(), _residues() | frames


class StructureModule(nn.Module):
    """Frames moved step by step by one shared layer; the loss compares places seen from every frame, clamped."""

    def __init__(self, channels: int = 16, steps: int = 2) -> None:
        super().__init__()
        self.steps = steps
        self.attention, self.norm = InvariantPointAttention(channels), nn.LayerNorm(channels)
        self.transition, self.move = Transition(channels), nn.Linear(channels, 6)
        nn.init.normal_(self.move.weight, std=0.1)

    def forward(self, x: Tensor, pairs: Tensor, places: Tensor) -> Tensor:
        rotations = torch.eye(3, device=x.device, dtype=x.dtype).expand(*x.shape[:2], 3, 3)
        shifts = torch.zeros(*x.shape[:2], 3, device=x.device, dtype=x.dtype)
        for _ in range(self.steps):
            x = self.norm(x + self.attention(x, pairs, rotations, shifts))
            x = x + self.transition(x)
            turn, move = self.move(x).chunk(2, -1)
            shifts = shifts + torch.einsum("nixy,niy->nix", rotations, move)
            rotations = rotations @ _rotations(F.pad(turn, (1, 0), value=1.0))
        seen = torch.einsum("niyx,nijy->nijx", rotations, shifts[:, None, :] - shifts[:, :, None])
        wanted = torch.einsum("niyx,nijy->nijx", rotations.detach(), places[:, None, :] - places[:, :, None])
        return ((seen - wanted).square().sum(-1) + 1e-4).sqrt().clamp(max=10.0).mean() / 10


def structure_module() -> Example:
    """One layer used in every step, rotations composed, a clamped loss over all pairs of frames and places."""
    torch.manual_seed(0)
    return StructureModule().train(), _residues()
