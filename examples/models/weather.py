"""Small weather models, each with a batch: a state on a grid [n, channels, latitude, longitude] to a later one.

Every function returns (model, batch), seeded; `model(**batch)` is the loss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["afno", "conv_lstm", "fourcastnet", "fourier_operator", "global_filter", "mesh_graph", "pangu", "pangu_rolled", "spherical"]

Batch = dict[str, Tensor]
Example = tuple[nn.Module, Batch]

SAMPLES, CHANNELS, HEIGHT, WIDTH = 4, 4, 8, 16


def _states(*shape: int) -> Batch:
    """A state now and a later one."""
    generator = torch.Generator().manual_seed(1)
    shape = shape or (CHANNELS, HEIGHT, WIDTH)
    return {name: torch.randn(SAMPLES, *shape, generator=generator) for name in ("state", "later")}


class Forecast(nn.Module):
    """Squared error of the predicted change, cells weighted by their area."""

    area: Tensor

    def __init__(self, net: nn.Module, height: int = HEIGHT) -> None:
        super().__init__()
        self.net = net
        area = torch.cos((torch.arange(height) + 0.5) / height * math.pi - math.pi / 2)
        self.register_buffer("area", (area / area.mean())[:, None])

    def forward(self, state: Tensor, later: Tensor) -> Tensor:
        return ((state + self.net(state) - later).square() * self.area).mean()


class SpectralConvolution(nn.Module):
    """Multiplies the lowest frequencies by complex matrices; the others become zero."""

    def __init__(self, channels: int, rows: int = 3, columns: int = 5) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.low = nn.Parameter(torch.randn(channels, channels, rows, columns, dtype=torch.cfloat) / channels)
        self.high = nn.Parameter(torch.randn(channels, channels, rows, columns, dtype=torch.cfloat) / channels)

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.fft.rfft2(x)
        out = torch.zeros_like(waves)
        out[..., : self.rows, : self.columns] = torch.einsum("nixy,ioxy->noxy", waves[..., : self.rows, : self.columns], self.low)
        out[..., -self.rows :, : self.columns] = torch.einsum("nixy,ioxy->noxy", waves[..., -self.rows :, : self.columns], self.high)
        return torch.fft.irfft2(out, s=x.shape[-2:])


class FourierOperator(nn.Module):
    """Spectral convolutions beside pointwise ones; the place is a feature."""

    def __init__(self, hidden: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.lift = nn.Conv2d(CHANNELS + 2, hidden, 1)
        self.spectral = nn.ModuleList(SpectralConvolution(hidden) for _ in range(layers))
        self.local = nn.ModuleList(nn.Conv2d(hidden, hidden, 1) for _ in range(layers))
        self.head = nn.Sequential(nn.Conv2d(hidden, 2 * hidden, 1), nn.GELU(), nn.Conv2d(2 * hidden, CHANNELS, 1))

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (torch.linspace(0, 1, size, device=x.device, dtype=x.dtype) for size in x.shape[-2:])
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).expand(len(x), -1, -1, -1)
        x = self.lift(torch.cat([x, grid], 1))
        for spectral, local in zip(self.spectral, self.local, strict=True):
            x = F.gelu(spectral(x) + local(x))
        return self.head(x)


def fourier_operator() -> Example:
    """Fourier neural operator: complex parameters, frequencies written into a slice of zeros."""
    torch.manual_seed(0)
    return Forecast(FourierOperator()).train(), _states()


class AdaptiveFourier(nn.Module):
    """A two-layer network on every frequency, in blocks of channels, real and imaginary parts apart; then shrunk towards zero."""

    def __init__(self, hidden: int, blocks: int = 4, shrink: float = 0.01) -> None:
        super().__init__()
        self.blocks, self.shrink, size = blocks, shrink, hidden // blocks
        self.first = nn.Parameter(0.1 * torch.randn(2, blocks, size, size))
        self.second = nn.Parameter(0.1 * torch.randn(2, blocks, size, size))
        self.first_bias, self.second_bias = nn.Parameter(torch.zeros(2, blocks, size)), nn.Parameter(torch.zeros(2, blocks, size))

    def _multiply(self, real: Tensor, imaginary: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        def product(x: Tensor, part: int) -> Tensor:
            return torch.einsum("...bi,bio->...bo", x, weight[part])

        return product(real, 0) - product(imaginary, 1) + bias[0], product(imaginary, 0) + product(real, 1) + bias[1]

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.fft.rfft2(x, dim=(1, 2), norm="ortho").unflatten(-1, (self.blocks, -1))
        real, imaginary = self._multiply(waves.real, waves.imag, self.first, self.first_bias)
        real, imaginary = self._multiply(real.relu(), imaginary.relu(), self.second, self.second_bias)
        mixed = torch.view_as_complex(F.softshrink(torch.stack([real, imaginary], -1), self.shrink)).flatten(-2)
        return x + torch.fft.irfft2(mixed, s=x.shape[1:3], dim=(1, 2), norm="ortho")


class GlobalFilter(nn.Module):
    """Multiplies every frequency of every channel by a complex number."""

    def __init__(self, hidden: int, height: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(height, width // 2 + 1, hidden, 2))

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.fft.rfft2(x, dim=(1, 2), norm="ortho") * torch.view_as_complex(self.weight)
        return torch.fft.irfft2(waves, s=x.shape[1:3], dim=(1, 2), norm="ortho")


class PatchMixer(nn.Module):
    """Patches of 2 × 2 cells, mixed over the grid by what is given, and over the channels."""

    def __init__(self, mixers: list[nn.Module], hidden: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Conv2d(CHANNELS, hidden, 2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn(HEIGHT // 2, WIDTH // 2, hidden))
        self.mixers = nn.ModuleList(mixers)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2 * len(mixers)))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * hidden, hidden)) for _ in mixers
        )
        self.head = nn.Linear(hidden, CHANNELS * 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1) + self.positions
        for layer, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            x = x + mixer(self.norms[2 * layer](x))
            x = x + mlp(self.norms[2 * layer + 1](x))
        return F.pixel_shuffle(self.head(x).permute(0, 3, 1, 2), 2)


def afno() -> Example:
    """Adaptive Fourier neural operator: block-diagonal layers on frequencies, soft shrinkage."""
    torch.manual_seed(0)
    return Forecast(PatchMixer([AdaptiveFourier(32) for _ in range(2)])).train(), _states()


def global_filter() -> Example:
    """A learned complex filter (kept as real numbers) in the place of attention."""
    torch.manual_seed(0)
    return Forecast(PatchMixer([GlobalFilter(32, HEIGHT // 2, WIDTH // 2) for _ in range(2)])).train(), _states()


class TwoSteps(nn.Module):
    """The network's forecast fed to it again; both steps count."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, state: Tensor, later: Tensor, latest: Tensor) -> Tensor:
        first = state + self.net(state)
        second = first + self.net(first)
        return F.mse_loss(first, later) + F.mse_loss(second, latest)


def fourcastnet() -> Example:
    """An adaptive Fourier network with dropout, trained on two steps: every parameter is used twice."""
    torch.manual_seed(0)
    latest = torch.randn(SAMPLES, CHANNELS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2))
    return TwoSteps(PatchMixer([AdaptiveFourier(32)], dropout=0.1)).train(), _states() | {"latest": latest}


class SphericalConvolution(nn.Module):
    """A filter for each degree: Fourier over longitudes, Legendre polynomials over latitudes, and back."""

    analysis: Tensor
    synthesis: Tensor

    def __init__(self, channels: int, degrees: int = 6) -> None:
        super().__init__()
        nodes = torch.cos((torch.arange(HEIGHT) + 0.5) / HEIGHT * math.pi)
        polynomials = self._legendre(nodes, degrees)
        self.register_buffer("analysis", torch.linalg.pinv(polynomials))
        self.register_buffer("synthesis", polynomials)
        self.weight = nn.Parameter(torch.randn(channels, channels, degrees, 2) / channels)

    def _legendre(self, x: Tensor, degrees: int) -> Tensor:
        found = [torch.ones_like(x), x]
        for degree in range(1, degrees - 1):
            found.append(((2 * degree + 1) * x * found[-1] - degree * found[-2]) / (degree + 1))
        return torch.stack(found, 1)

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.fft.rfft(x, norm="forward")
        coefficients = torch.einsum("lk,nckm->nclm", self.analysis.to(waves.dtype), waves)
        filtered = torch.einsum("nilm,iol->nolm", coefficients, torch.view_as_complex(self.weight))
        return torch.fft.irfft(torch.einsum("kl,nclm->nckm", self.synthesis.to(waves.dtype), filtered), n=x.shape[-1], norm="forward")


class Spherical(nn.Module):
    """Spherical convolutions and pointwise networks."""

    def __init__(self, hidden: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.lift, self.head = nn.Conv2d(CHANNELS, hidden, 1), nn.Conv2d(hidden, CHANNELS, 1)
        self.spectral = nn.ModuleList(SphericalConvolution(hidden) for _ in range(layers))
        self.norms = nn.ModuleList(nn.InstanceNorm2d(hidden, affine=True) for _ in range(layers))
        self.local = nn.ModuleList(nn.Conv2d(hidden, hidden, 1) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        for spectral, norm, local in zip(self.spectral, self.norms, self.local, strict=True):
            x = x + F.gelu(local(norm(spectral(x))))
        return self.head(x)


def spherical() -> Example:
    """Spherical Fourier operator: rfft, a Legendre transform by einsum on complex numbers, instance norm."""
    torch.manual_seed(0)
    return Forecast(Spherical()).train(), _states()


class MeshGraph(nn.Module):
    """Grid → mesh, messages along the mesh's edges, mesh → grid; the edges are fixed, the same for every sample."""

    cell_to_mesh: Tensor
    cells: Tensor
    senders: Tensor
    receivers: Tensor
    places: Tensor

    def __init__(self, hidden: int = 32, mesh: int = 12, layers: int = 2) -> None:
        super().__init__()
        cells, self.mesh = HEIGHT * WIDTH, mesh
        generator = torch.Generator().manual_seed(3)
        self.register_buffer("cell_to_mesh", torch.randint(0, mesh, (2 * cells,), generator=generator))
        self.register_buffer("cells", torch.arange(cells).repeat(2))
        self.register_buffer("senders", torch.randint(0, mesh, (4 * mesh,), generator=generator))
        self.register_buffer("receivers", torch.arange(mesh).repeat_interleave(4))
        self.register_buffer("places", torch.randn(4 * mesh, 3, generator=generator))
        self.embed, self.nodes = nn.Linear(CHANNELS, hidden), nn.Parameter(0.1 * torch.randn(mesh, hidden))
        self.edge_embed = nn.Linear(3, hidden)
        self.edge_updates = nn.ModuleList(_mlp(3 * hidden, hidden) for _ in range(layers))
        self.node_updates = nn.ModuleList(_mlp(2 * hidden, hidden) for _ in range(layers))
        self.decode = _mlp(2 * hidden, hidden)
        self.head = nn.Linear(hidden, CHANNELS)

    def forward(self, state: Tensor) -> Tensor:
        cells = self.embed(state.flatten(2).transpose(1, 2))
        nodes = self.nodes.expand(len(state), -1, -1).index_add(1, self.cell_to_mesh, cells[:, self.cells])
        edges = self.edge_embed(self.places).expand(len(state), -1, -1)
        for edge_update, node_update in zip(self.edge_updates, self.node_updates, strict=True):
            edges = edges + edge_update(torch.cat([edges, nodes[:, self.senders], nodes[:, self.receivers]], -1))
            gathered = torch.zeros_like(nodes).index_add(1, self.receivers, edges)
            nodes = nodes + node_update(torch.cat([nodes, gathered], -1))
        index = self.cells[:, None].expand(len(state), -1, nodes.shape[-1])
        received = torch.zeros_like(cells).scatter_add(1, index, nodes[:, self.cell_to_mesh])
        out = self.head(cells + self.decode(torch.cat([cells, received], -1)))
        return out.transpose(1, 2).unflatten(2, state.shape[2:])


def _mlp(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(before, after), nn.SiLU(), nn.Linear(after, after), nn.LayerNorm(after))


def mesh_graph() -> Example:
    """GraphCast's shape: encoder, processor and decoder by index_add and scatter_add along fixed edges."""
    torch.manual_seed(0)
    return Forecast(MeshGraph()).train(), _states()


class EarthBlock(nn.Module):
    """Attention in boxes of height levels, latitudes and longitudes, rolled; the bias depends on the latitude of the box."""

    mask: Tensor | None

    def __init__(self, hidden: int, grid: tuple[int, int, int], box: tuple[int, int, int], rolled: bool, heads: int = 4) -> None:
        super().__init__()
        self.grid, self.box, self.heads = grid, box, heads
        self.shift = tuple(-(size // 2) for size in box) if rolled else (0, 0, 0)
        cells = math.prod(box)
        boxes = tuple(size // part for size, part in zip(grid, box, strict=True))
        self.bias = nn.Parameter(0.02 * torch.randn(boxes[0] * boxes[1], 1, heads, cells, cells))
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))
        self.register_buffer("mask", self._mask() if rolled else None)

    def _boxes(self, x: Tensor) -> Tensor:
        """[n, z, y, x, c] → [n, boxes of z and y, boxes of x, cells, c]."""
        (z, y, w), (a, b, c) = x.shape[1:4], self.box
        split = x.reshape(len(x), z // a, a, y // b, b, w // c, c, -1)
        return split.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(len(x), (z // a) * (y // b), w // c, a * b * c, -1)

    def _joined(self, boxes: Tensor) -> Tensor:
        (z, y, w), (a, b, c) = self.grid, self.box
        split = boxes.reshape(len(boxes), z // a, y // b, w // c, a, b, c, -1)
        return split.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(len(boxes), z, y, w, -1)

    def _mask(self) -> Tensor:
        """Forbids attention between cells that only the roll made neighbours; longitudes are a ring."""
        number = torch.zeros(1, *self.grid, 1)
        for dim, (size, part) in enumerate(zip(self.grid[:2], self.box[:2], strict=True)):
            place = torch.arange(size)
            region = (place >= size - part).int() + (place >= size - part // 2).int()
            number = number * 3 + region.reshape([-1 if each == dim + 1 else 1 for each in range(5)])
        cells = self._boxes(number)[..., 0]
        return torch.where(cells[..., :, None] == cells[..., None, :], 0.0, -100.0)[:, :, :, None]

    def forward(self, x: Tensor) -> Tensor:
        boxes = self._boxes(torch.roll(self.norm1(x), self.shift, (1, 2, 3)))
        q, k, v = self.qkv(boxes).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-3, -2).unbind(0)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + self.bias
        if self.mask is not None:
            scores = scores + self.mask
        mixed = self._joined(self.out((scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2)))
        x = x + torch.roll(mixed, [-size for size in self.shift], (1, 2, 3))
        return x + self.mlp(self.norm2(x))


class Pangu(nn.Module):
    """Levels of the air as a third dim: patches by a 3D convolution, boxes, half the resolution between the blocks."""

    def __init__(self, rolled: bool, hidden: int = 16) -> None:
        super().__init__()
        self.embed = nn.Conv3d(CHANNELS, hidden, (2, 2, 2), stride=(2, 2, 2))
        fine, coarse, box = (2, 4, 8), (2, 2, 4), (2, 2, 4)
        self.fine = nn.Sequential(EarthBlock(hidden, fine, box, False), EarthBlock(hidden, fine, box, rolled))
        self.shrink = nn.Sequential(nn.LayerNorm(4 * hidden), nn.Linear(4 * hidden, 2 * hidden, bias=False))
        self.coarse = EarthBlock(2 * hidden, coarse, box, False)
        self.grow = nn.Linear(2 * hidden, 4 * hidden, bias=False)
        self.head = nn.ConvTranspose3d(2 * hidden, CHANNELS, (2, 2, 2), stride=(2, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(self.embed(x).permute(0, 2, 3, 4, 1))
        count, z, y, w, hidden = fine.shape
        quads = fine.reshape(count, z, y // 2, 2, w // 2, 2, hidden).transpose(3, 4).flatten(4)
        grown = self.grow(self.coarse(self.shrink(quads)))
        opened = grown.reshape(count, z, y // 2, w // 2, 2, 2, hidden).transpose(3, 4).reshape(fine.shape)
        return self.head(torch.cat([fine, opened], -1).permute(0, 4, 1, 2, 3))


def pangu() -> Example:
    """Attention in three-dimensional boxes, merging and splitting of cells, 3D convolutions."""
    torch.manual_seed(0)
    return Forecast(Pangu(rolled=False)).train(), _states(CHANNELS, 4, HEIGHT, WIDTH)


def pangu_rolled() -> Example:
    """The same with boxes rolled by half their size, and a mask."""
    torch.manual_seed(0)
    return Forecast(Pangu(rolled=True)).train(), _states(CHANNELS, 4, HEIGHT, WIDTH)


class ConvLstm(nn.Module):
    """A recurrent network whose products are convolutions; predicts the frame after each."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.hidden = hidden
        self.gates = nn.Conv2d(CHANNELS + hidden, 4 * hidden, 3, padding=1)
        self.head = nn.Conv2d(hidden, CHANNELS, 1)

    def forward(self, frames: Tensor) -> Tensor:
        state = frames.new_zeros(len(frames), self.hidden, *frames.shape[3:])
        cell, made = torch.zeros_like(state), []
        for frame in frames[:, :-1].unbind(1):
            enter, forget, out, new = self.gates(torch.cat([frame, state], 1)).chunk(4, 1)
            cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
            state = out.sigmoid() * cell.tanh()
            made.append(self.head(state))
        return F.mse_loss(torch.stack(made, 1), frames[:, 1:])


def conv_lstm() -> Example:
    """A loop over time with one convolution for all gates: a parameter used once a frame."""
    torch.manual_seed(0)
    frames = torch.randn(SAMPLES, 5, CHANNELS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    return ConvLstm().train(), {"frames": frames}
