"""Small networks on graphs, points and sets, each with a batch.

Every function returns (model, batch), seeded; `model(**batch)` is the loss. Graphs of a batch have equally many nodes and edges;
edges are pairs of node numbers of a graph's own, [n, edges, 2] (sender, receiver), or of one list of all nodes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "deep_sets",
    "graph_attention",
    "graph_convolution",
    "graph_convolution_dense",
    "graph_isomorphism",
    "graph_transformer",
    "interaction_network",
    "message_passing",
    "pointnet",
    "schnet",
    "set_transformer",
    "temporal_graph",
]

Batch = dict[str, Tensor]
Example = tuple[nn.Module, Batch]

SAMPLES, NODES, EDGES, FEATURES, CLASSES = 4, 8, 24, 16, 4


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _graphs() -> Batch:
    """Graphs with features of nodes and edges, and a class for each node."""
    generator = _generator()
    return {
        "nodes": torch.randn(SAMPLES, NODES, FEATURES, generator=generator),
        "edges": torch.randint(0, NODES, (SAMPLES, EDGES, 2), generator=generator),
        "features": torch.randn(SAMPLES, EDGES, 4, generator=generator),
        "labels": torch.randint(0, CLASSES, (SAMPLES, NODES), generator=generator),
    }


def _joined() -> Batch:
    """The same graphs as one large graph whose nodes are numbered through."""
    batch = _graphs()
    first = NODES * torch.arange(SAMPLES)[:, None, None]
    return {
        "nodes": batch["nodes"].flatten(0, 1),
        "senders": (batch["edges"] + first)[..., 0].flatten(),
        "receivers": (batch["edges"] + first)[..., 1].flatten(),
        "labels": batch["labels"].flatten(),
    }


class DenseConvolution(nn.Module):
    """Neighbours' features by a product with the normalised adjacency matrix."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, hidden), nn.Linear(hidden, CLASSES)

    def forward(self, nodes: Tensor, adjacency: Tensor, labels: Tensor) -> Tensor:
        scale = adjacency.sum(-1).clamp(min=1).rsqrt()
        weights = scale[:, :, None] * adjacency * scale[:, None, :]
        x = F.relu(weights @ self.first(nodes))
        return F.cross_entropy((weights @ self.second(x)).transpose(1, 2), labels)


def graph_convolution_dense() -> Example:
    """Graph convolution by matrix products, one adjacency matrix a sample."""
    torch.manual_seed(0)
    batch = _graphs()
    linked = torch.rand(SAMPLES, NODES, NODES, generator=_generator()) < 0.3
    adjacency = (linked | linked.transpose(1, 2) | torch.eye(NODES, dtype=torch.bool)).float()
    return DenseConvolution().train(), {"nodes": batch["nodes"], "adjacency": adjacency, "labels": batch["labels"]}


class Convolution(nn.Module):
    """Messages along a list of edges, added up at the receivers (index_add), scaled by degrees."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, hidden), nn.Linear(hidden, CLASSES)
        self.dropout = nn.Dropout(0.1)

    def _gathered(self, x: Tensor, senders: Tensor, receivers: Tensor) -> Tensor:
        degree = x.new_ones(len(x)).index_add(0, receivers, x.new_ones(len(receivers)))
        scaled = x * degree.rsqrt()[:, None]
        return (scaled.index_add(0, receivers, scaled[senders])) * degree.rsqrt()[:, None]

    def forward(self, nodes: Tensor, senders: Tensor, receivers: Tensor, labels: Tensor) -> Tensor:
        x = self.dropout(F.relu(self._gathered(self.first(nodes), senders, receivers)))
        return F.cross_entropy(self._gathered(self.second(x), senders, receivers), labels)


def graph_convolution() -> Example:
    """Graph convolution by index_add on one large graph: its first dims are nodes and edges, as many of each."""
    torch.manual_seed(0)
    batch = _joined()
    few = slice(0, SAMPLES * NODES)  # so that nodes and edges have one length
    return Convolution().train(), batch | {"senders": batch["senders"][few], "receivers": batch["receivers"][few]}


class GraphAttention(nn.Module):
    """Softmax over the edges that end at a node: largest score by scatter_reduce, sums by scatter_add."""

    def __init__(self, before: int, after: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(before, after, bias=False)
        self.sender, self.receiver = (nn.Parameter(0.1 * torch.randn(heads, after // heads)) for _ in range(2))

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        x = self.project(nodes).unflatten(-1, (self.heads, -1))
        senders, receivers = (edges[..., side, None].expand(-1, -1, self.heads) for side in (0, 1))
        scores = (x * self.sender).sum(-1).gather(1, senders) + (x * self.receiver).sum(-1).gather(1, receivers)
        scores = F.leaky_relu(scores, 0.2)
        start = scores.new_full(x.shape[:3], float("-inf"))
        largest = start.scatter_reduce(1, receivers, scores.detach(), reduce="amax", include_self=False)
        powers = (scores - largest.gather(1, receivers)).exp()
        sums = torch.zeros_like(start).scatter_add(1, receivers, powers)
        weights = powers / sums.gather(1, receivers)
        wide = senders[..., None].expand(-1, -1, -1, x.shape[-1])
        messages = weights[..., None] * x.gather(1, wide)
        target = receivers[..., None].expand_as(messages)
        return torch.zeros_like(x).scatter_add(1, target, messages).flatten(2)


class AttentionNetwork(nn.Module):
    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList([GraphAttention(FEATURES, hidden), GraphAttention(hidden, hidden)])
        self.head = nn.Linear(hidden, CLASSES)

    def forward(self, nodes: Tensor, edges: Tensor, labels: Tensor) -> Tensor:
        for layer in self.layers:
            nodes = F.elu(layer(nodes, edges))
        return F.cross_entropy(self.head(nodes).transpose(1, 2), labels)


def graph_attention() -> Example:
    """Attention over edges: scatter_reduce (largest), gather, scatter_add."""
    torch.manual_seed(0)
    batch = _graphs()
    return AttentionNetwork().train(), {name: batch[name] for name in ("nodes", "edges", "labels")}


class Isomorphism(nn.Module):
    """A node's features and the sum of its neighbours', through networks with batch normalisation; a class for each graph."""

    def __init__(self, hidden: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.zeros(layers))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(FEATURES if i == 0 else hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, hidden))
            for i in range(layers)
        )
        self.head = nn.Linear(hidden, CLASSES)

    def forward(self, nodes: Tensor, edges: Tensor, label: Tensor) -> Tensor:
        rows = torch.arange(len(nodes), device=nodes.device)[:, None]
        for own, layer in zip(self.own, self.layers, strict=True):
            sent = nodes[rows, edges[..., 0]]
            gathered = torch.zeros_like(nodes).index_put((rows, edges[..., 1]), sent, accumulate=True)
            nodes = layer(((1 + own) * nodes + gathered).flatten(0, 1)).unflatten(0, (len(nodes), -1))
        return F.cross_entropy(self.head(nodes.sum(1)), label)


def graph_isomorphism() -> Example:
    """Sums of neighbours by index_put with accumulation, batch normalisation over all nodes."""
    torch.manual_seed(0)
    batch = _graphs()
    return Isomorphism().train(), {"nodes": batch["nodes"], "edges": batch["edges"], "label": batch["labels"][:, 0].clone()}


class MessagePassing(nn.Module):
    """Edge features make a matrix for each edge's message; a GRU cell takes in the sum; the parameters serve every step."""

    def __init__(self, hidden: int = FEATURES, steps: int = 3) -> None:
        super().__init__()
        self.steps = steps
        self.matrices = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, hidden * hidden))
        self.cell = nn.GRUCell(hidden, hidden)
        self.gate, self.out = nn.Linear(2 * hidden, CLASSES), nn.Linear(hidden, CLASSES)

    def forward(self, nodes: Tensor, edges: Tensor, features: Tensor, target: Tensor) -> Tensor:
        start, state, size = nodes, nodes.flatten(0, 1), nodes.shape[-1]
        matrices = self.matrices(features).unflatten(-1, (size, size))
        senders, receivers = (edges[..., side, None].expand(-1, -1, size) for side in (0, 1))
        for _ in range(self.steps):
            messages = torch.einsum("neij,nej->nei", matrices, nodes.gather(1, senders))
            summed = torch.zeros_like(nodes).scatter_add(1, receivers, messages)
            state = self.cell(summed.flatten(0, 1), state)
            nodes = state.unflatten(0, nodes.shape[:2])
        gate = self.gate(torch.cat([nodes, start], -1)).sigmoid()
        return F.l1_loss((gate * self.out(nodes)).sum(1), target)


def message_passing() -> Example:
    """Edge features, a recurrent cell shared by all steps, a gated sum over the nodes."""
    torch.manual_seed(0)
    batch = _graphs()
    target = torch.randn(SAMPLES, CLASSES, generator=_generator())
    return MessagePassing().train(), {name: batch[name] for name in ("nodes", "edges", "features")} | {"target": target}


class SchNet(nn.Module):
    """Atoms in space: filters from distances (radial basis functions, a smooth cut-off); energy and forces."""

    centres: Tensor

    def __init__(self, hidden: int = 32, layers: int = 2, kinds: int = 8, cutoff: float = 4.0) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.kinds = nn.Embedding(kinds, hidden)
        self.register_buffer("centres", torch.linspace(0, cutoff, 16))
        self.filters = nn.ModuleList(nn.Sequential(nn.Linear(16, hidden), nn.Softplus(), nn.Linear(hidden, hidden)) for _ in range(layers))
        self.before = nn.ModuleList(nn.Linear(hidden, hidden, bias=False) for _ in range(layers))
        self.after = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, hidden), nn.Softplus(), nn.Linear(hidden, hidden)) for _ in range(layers)
        )
        self.head = nn.Linear(hidden, 1)

    def forward(self, kinds: Tensor, places: Tensor, energy: Tensor) -> Tensor:
        apart = places[:, :, None] - places[:, None, :]
        distances = (apart.square().sum(-1) + 1e-12).sqrt()
        basis = torch.exp(-4 * (distances[..., None] - self.centres).square())
        near = 0.5 * (torch.cos(distances * torch.pi / self.cutoff) + 1) * (distances < self.cutoff)
        near = near * (1 - torch.eye(places.shape[1], device=places.device))
        x = self.kinds(kinds)
        for filters, before, after in zip(self.filters, self.before, self.after, strict=True):
            weights = filters(basis) * near[..., None]
            x = x + after((weights * before(x)[:, None]).sum(2))
        return F.huber_loss(self.head(x).sum((1, 2)), energy)


def schnet() -> Example:
    """Distances of all pairs, radial basis functions, a cut-off; a sum over the atoms."""
    torch.manual_seed(0)
    generator = _generator()
    batch = {
        "kinds": torch.randint(0, 8, (SAMPLES, NODES), generator=generator),
        "places": 2 * torch.randn(SAMPLES, NODES, 3, generator=generator),
        "energy": torch.randn(SAMPLES, generator=generator),
    }
    return SchNet().train(), batch


class Interaction(nn.Module):
    """Edges and nodes of one large graph updated in turn, an aggregate by mean, maximum and minimum; then one number for each graph."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.edge = nn.Sequential(nn.Linear(2 * FEATURES, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        self.node = nn.Sequential(nn.Linear(FEATURES + 3 * hidden, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))

    def forward(self, nodes: Tensor, senders: Tensor, receivers: Tensor, labels: Tensor) -> Tensor:
        messages = self.edge(torch.cat([nodes[senders], nodes[receivers]], -1))
        index = receivers[:, None].expand_as(messages)
        start = messages.new_zeros(len(nodes), messages.shape[-1])
        gathered = [start.scatter_reduce(0, index, messages, reduce=how, include_self=False) for how in ("mean", "amax", "amin")]
        return F.cross_entropy(self.node(torch.cat([nodes, *gathered], -1)), labels)


def interaction_network() -> Example:
    """Mean, maximum and minimum over a node's edges by scatter_reduce, with gradients."""
    torch.manual_seed(0)
    batch = _joined()
    few = slice(0, SAMPLES * NODES)
    return Interaction().train(), batch | {"senders": batch["senders"][few], "receivers": batch["receivers"][few]}


class PointNet(nn.Module):
    """A network on every point, the maximum over the points; a learned 3 × 3 transform first, kept near a rotation."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.transform = nn.Sequential(nn.Conv1d(3, hidden, 1), nn.BatchNorm1d(hidden), nn.ReLU())
        self.matrix = nn.Linear(hidden, 9)
        self.points = nn.Sequential(nn.Conv1d(3, hidden, 1), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Conv1d(hidden, 64, 1))
        self.head = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))

    def forward(self, points: Tensor, label: Tensor) -> Tensor:
        identity = torch.eye(3, device=points.device, dtype=points.dtype)
        matrix = self.matrix(self.transform(points).amax(2)).reshape(-1, 3, 3) + identity
        features = self.points(torch.bmm(matrix, points)).max(2).values
        apart = torch.linalg.matrix_norm(matrix @ matrix.transpose(1, 2) - identity).mean()
        return F.cross_entropy(self.head(features), label) + 1e-3 * apart


def pointnet() -> Example:
    """The maximum over points, convolutions of width one, a matrix norm in the loss."""
    torch.manual_seed(0)
    generator = _generator()
    points, label = torch.randn(SAMPLES, 3, 32, generator=generator), torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
    return PointNet().train(), {"points": points, "label": label}


def _sets() -> Batch:
    """Sets of uneven size, padded, with a number each."""
    generator = _generator()
    members = torch.randn(SAMPLES, NODES, FEATURES, generator=generator)
    there = torch.arange(NODES) < torch.tensor([8, 3, 5, 6])[:, None]
    return {"members": members, "there": there, "target": torch.randn(SAMPLES, generator=generator)}


class DeepSets(nn.Module):
    """Sum, mean and maximum over the members that are there."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.member = nn.Sequential(nn.Linear(FEATURES, hidden), nn.Tanh(), nn.Linear(hidden, hidden))
        self.whole = nn.Sequential(nn.Linear(3 * hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1))

    def forward(self, members: Tensor, there: Tensor, target: Tensor) -> Tensor:
        x = self.member(members)
        total = (x * there[..., None]).sum(1)
        largest = x.masked_fill(~there[..., None], float("-inf")).amax(1)
        pooled = torch.cat([total, total / there.sum(1, keepdim=True), largest], -1)
        return F.mse_loss(self.whole(pooled).squeeze(-1), target)


def deep_sets() -> Example:
    """Sets of uneven size: masked sum, mean and maximum."""
    torch.manual_seed(0)
    return DeepSets().train(), _sets()


class Induced(nn.Module):
    """Attention of a set to a few learned points, and of the set to these."""

    def __init__(self, hidden: int, points: int = 4) -> None:
        super().__init__()
        self.points = nn.Parameter(0.1 * torch.randn(points, hidden))
        self.inward = nn.MultiheadAttention(hidden, 4, batch_first=True)
        self.outward = nn.MultiheadAttention(hidden, 4, batch_first=True, dropout=0.1)
        self.norm, self.mlp = nn.LayerNorm(hidden), nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, missing: Tensor) -> Tensor:
        points = self.points.expand(len(x), -1, -1)
        points = points + self.inward(points, x, x, key_padding_mask=missing, need_weights=False)[0]
        x = self.norm(x + self.outward(x, points, points, need_weights=False)[0])
        return x + F.relu(self.mlp(x))


class SetTransformer(nn.Module):
    """Induced attention blocks, then pooling by attention with a learned query."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(FEATURES, hidden), nn.ModuleList(Induced(hidden) for _ in range(2))
        self.seed, self.pool = nn.Parameter(torch.randn(1, hidden)), nn.MultiheadAttention(hidden, 4, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, members: Tensor, there: Tensor, target: Tensor) -> Tensor:
        x = self.embed(members)
        for block in self.blocks:
            x = block(x, ~there)
        pooled = self.pool(self.seed.expand(len(x), -1, -1), x, x, key_padding_mask=~there, need_weights=False)[0]
        return F.mse_loss(self.head(pooled).flatten(), target)


def set_transformer() -> Example:
    """nn.MultiheadAttention with a padding mask, learned queries, dropout on attention."""
    torch.manual_seed(0)
    return SetTransformer().train(), _sets()


class GraphTransformer(nn.Module):
    """Attention of all nodes; steps between two nodes choose a bias, degrees an embedding."""

    def __init__(self, hidden: int = 32, heads: int = 4, farthest: int = 5, degrees: int = 16) -> None:
        super().__init__()
        self.heads = heads
        self.embed, self.degrees = nn.Linear(FEATURES, hidden), nn.Embedding(degrees, hidden)
        self.bias = nn.Embedding(farthest, heads)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2))
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, CLASSES)

    def forward(self, nodes: Tensor, steps: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(nodes) + self.degrees((steps == 1).sum(-1))
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(steps).permute(0, 3, 1, 2))
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return F.cross_entropy(self.head(self.norms[1](x)).transpose(1, 2), labels)


def graph_transformer() -> Example:
    """A trained bias of attention, looked up by the distance of two nodes; counts as indices."""
    torch.manual_seed(0)
    batch = _graphs()
    steps = torch.randint(0, 5, (SAMPLES, NODES, NODES), generator=_generator())
    return GraphTransformer().train(), {"nodes": batch["nodes"], "steps": steps, "labels": batch["labels"]}


class TemporalGraph(nn.Module):
    """Nodes with a memory (a buffer): events read it, predict whether they are true, and change it."""

    memory: Tensor
    last: Tensor

    def __init__(self, nodes: int = 32, hidden: int = 16) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(nodes, hidden))
        self.register_buffer("last", torch.zeros(nodes))
        self.rate = nn.Parameter(torch.rand(4))
        self.cell = nn.GRUCell(hidden + 4 + 4, hidden)
        self.head = nn.Bilinear(hidden, hidden, 1)

    def forward(self, sources: Tensor, targets: Tensor, times: Tensor, features: Tensor, true: Tensor) -> Tensor:
        passed = torch.cos((times - self.last[sources])[:, None] * self.rate)
        mine = self.cell(torch.cat([self.memory[targets], features, passed], 1), self.memory[sources])
        logits = self.head(mine, self.memory[targets]).squeeze(1)
        with torch.no_grad():
            self.memory.index_copy_(0, sources, mine)
            self.last.index_copy_(0, sources, times)
        return F.binary_cross_entropy_with_logits(logits, true)


def temporal_graph() -> Example:
    """A memory in buffers that the forward pass changes by index_copy_; a bilinear head."""
    torch.manual_seed(0)
    generator = _generator()
    model = TemporalGraph().train()
    model.memory.normal_(generator=generator)
    batch = {
        "sources": torch.randperm(32, generator=generator)[:8],
        "targets": torch.randint(0, 32, (8,), generator=generator),
        "times": torch.rand(8, generator=generator),
        "features": torch.randn(8, 4, generator=generator),
        "true": torch.randint(0, 2, (8,), generator=generator).float(),
    }
    return model, batch
