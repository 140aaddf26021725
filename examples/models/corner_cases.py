"""What models do that is easy to get wrong, one small model for each, with a batch.

Every function returns (model, batch), seeded; `model(**batch)` is the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

__all__ = [
    "affine_grids",
    "batch_of_three",
    "bfloat16",
    "bilinear",
    "boolean_mask",
    "bucketed",
    "channels_last",
    "checkpointed",
    "chunked_loss",
    "complex_rotary",
    "control_flow",
    "cumulative_products",
    "custom_function",
    "custom_operator",
    "data_attribute",
    "detached",
    "double_precision",
    "ema_codebook",
    "embedding_bag",
    "ensemble",
    "expert_loop",
    "folded",
    "forces",
    "frozen",
    "gated_experts",
    "gru_cells",
    "in_place",
    "integer_inputs",
    "lazy_positions",
    "lora",
    "low_rank_einsum",
    "multihead_attention",
    "mutated_buffers",
    "nested_outputs",
    "no_bias_scalar",
    "no_grad_in_place",
    "non_contiguous",
    "numpy_constants",
    "odd_sizes",
    "parameter_list",
    "pixel_shuffle",
    "plain_rnn",
    "python_numbers",
    "random_everything",
    "returned_dict",
    "reversible",
    "ring_buffer",
    "scaled_gradient",
    "scan_loop",
    "shared_parameter",
    "six_heads",
    "sorted_values",
    "spectral_norm",
    "tied_autoencoder",
    "top_k",
    "transformer",
    "transformer_decoder",
    "unused_parameter",
    "value_loop",
    "weight_norm",
]

Batch = dict[str, Any]
Example = tuple[nn.Module, Batch]

SAMPLES, FEATURES, HIDDEN = 4, 16, 32


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _batch(*shape: int, outputs: tuple[int, ...] = (8,), samples: int = SAMPLES) -> Batch:
    """Inputs x and targets y."""
    generator = _generator()
    x = torch.randn(samples, *(shape or (FEATURES,)), generator=generator)
    return {"x": x, "y": torch.randn(samples, *outputs, generator=generator)}


class Regression(nn.Module):
    """Squared error of a network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.net(x), y)


class Apply(nn.Module):
    """A function without parameters, as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _regression(*layers: nn.Module, shape: tuple[int, ...] = (FEATURES,), outputs: tuple[int, ...] = (8,)) -> Example:
    return Regression(nn.Sequential(*layers)).train(), _batch(*shape, outputs=outputs)


# Code of the user's own with a backward of its own.


class StraightThrough(torch.autograd.Function):
    """The sign forward; backward as if it were the identity, clipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() <= 1)


class Binary(nn.Module):
    """A layer whose activations are ±1."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(StraightThrough.apply(self.first(x)))


def custom_function() -> Example:
    """A torch.autograd.Function whose hand-written backward autograd would not give."""
    torch.manual_seed(0)
    return _regression(Binary())


class ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None


class Adversarial(nn.Module):
    """Two heads on shared features; the second's gradient is turned round."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.label, self.domain = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, 8), nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor, y: Tensor, domain: Tensor) -> Tensor:
        features = self.features(x).relu()
        turned = ScaleGradient.apply(features, -0.5)
        return F.mse_loss(self.label(features), y) + F.binary_cross_entropy_with_logits(self.domain(turned)[:, 0], domain)


def scaled_gradient() -> Example:
    """Gradient reversal (domain adaptation) by a torch.autograd.Function in the outermost module."""
    torch.manual_seed(0)
    return Adversarial().train(), _batch() | {"domain": torch.tensor([0.0, 1.0, 1.0, 0.0])}


@torch.library.custom_op("zoo::scaled_tanh", mutates_args=())
def scaled_tanh(x: Tensor, scale: float) -> Tensor:
    """scale · tanh(x), as a kernel of one's own would be called."""
    return scale * torch.tanh(x)


@scaled_tanh.register_fake
def _(x: Tensor, scale: float) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.scale = inputs[1]
    ctx.save_for_backward(output)


def _scaled_tanh_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    (output,) = ctx.saved_tensors
    return gradient * (ctx.scale - output * output / ctx.scale), None


scaled_tanh.register_autograd(_scaled_tanh_backward, setup_context=_save)


def custom_operator() -> Example:
    """torch.library.custom_op with a description for shapes and a registered backward."""
    torch.manual_seed(0)
    return _regression(nn.Linear(FEATURES, HIDDEN), Apply(lambda x: scaled_tanh(x, 2.0)), nn.Linear(HIDDEN, 8))


class Reversible(nn.Module):
    """Two halves that change each other in turn; each is computed from the other's new value."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleList(nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh()) for _ in range(4))
        self.head = nn.Linear(2 * FEATURES, 8)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for first, second in zip(self.f[::2], self.f[1::2], strict=True):
            a = a + first(b)
            b = b * torch.exp(second(a))
        return self.head(torch.cat([a, b], -1))


def reversible() -> Example:
    """A coupling flow: halves split and joined, slices of a module list."""
    torch.manual_seed(0)
    return _regression(Reversible(), shape=(2 * FEATURES,))


# State.


class Whitened(nn.Module):
    """Running mean and variance by hand, and a counter."""

    mean: Tensor
    variance: Tensor
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("variance", torch.ones(FEATURES))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
                self.variance.lerp_(x.var(0, unbiased=False), 0.1)
                self.steps += 1
        return (x - self.mean) * (self.variance + 1e-5).rsqrt()


def mutated_buffers() -> Example:
    """Buffers changed in place without gradient and read after the change; a counter."""
    torch.manual_seed(0)
    return _regression(nn.Linear(FEATURES, FEATURES), Whitened(), nn.Linear(FEATURES, 8))


class Remembered(nn.Module):
    """A ring of the last eight sizes, written at a place that moves with every call; values are scaled by their mean."""

    sizes: Tensor
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sizes", torch.ones(8), persistent=False)
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.sizes[self.steps % 8] = x.abs().mean()
            self.steps += 1
        return x / self.sizes.mean()


def ring_buffer() -> Example:
    """A buffer written at an index that is itself a buffer."""
    torch.manual_seed(0)
    return _regression(nn.Linear(FEATURES, FEATURES), Remembered(), nn.Linear(FEATURES, 8))


class Codebook(nn.Module):
    """Vector quantisation whose table is no parameter: a moving average of what falls to each entry."""

    table: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, entries: int = 8) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(entries, FEATURES))
        self.register_buffer("counts", torch.ones(entries))
        self.register_buffer("sums", self.table.clone())

    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.cdist(x, self.table).argmin(-1)
        one_hot = F.one_hot(chosen, len(self.table)).to(x.dtype)
        nearest = one_hot @ self.table
        if self.training:
            with torch.no_grad():
                self.counts.mul_(0.9).add_(one_hot.sum(0), alpha=0.1)
                self.sums.mul_(0.9).add_(one_hot.t() @ x, alpha=0.1)
                self.table.copy_(self.sums / self.counts.clamp(min=1e-3)[:, None])
        return x + (nearest - x).detach()


def ema_codebook() -> Example:
    """Buffers that sum over the batch: assignments and their means."""
    torch.manual_seed(0)
    return _regression(nn.Linear(FEATURES, FEATURES), Codebook(), nn.Linear(FEATURES, 8))


class LazyPositions(nn.Module):
    """Positions computed at the first call and kept as a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.positions: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.positions is None:
            self.positions = torch.arange(x.shape[1], device=x.device, dtype=x.dtype).sin()
        return x + self.positions[:, None]


def lazy_positions() -> Example:
    """A tensor made at the first call and kept in the module, but not as a buffer."""
    torch.manual_seed(0)
    return _regression(nn.Linear(FEATURES, HIDDEN), LazyPositions(), nn.Linear(HIDDEN, 8), shape=(6, FEATURES), outputs=(6, 8))


class NumpyTable(nn.Module):
    """A constant tensor from Python numbers and one from NumPy, made in the forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        import numpy as np

        window = torch.from_numpy(np.hanning(x.shape[-1]).astype(np.float32)).to(x)
        return x * window + torch.tensor([0.1, 0.2], device=x.device, dtype=x.dtype).sum()


def numpy_constants() -> Example:
    """Constants that come from NumPy and from lists inside forward."""
    torch.manual_seed(0)
    return _regression(NumpyTable(), nn.Linear(FEATURES, 8))


# Parameters.


class Shared(nn.Module):
    """One layer run four times, one of them with its weight turned."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, 8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.layer(x).tanh()
        return self.head(x @ self.layer.weight)


def shared_parameter() -> Example:
    """A parameter used several times, also transposed."""
    torch.manual_seed(0)
    return _regression(Shared())


def frozen() -> Example:
    """The first layer and a norm's scale are frozen; a gradient must flow through them."""
    torch.manual_seed(0)
    model, batch = _regression(nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 8))
    assert isinstance(model, Regression) and isinstance(model.net, nn.Sequential)
    model.net[1].requires_grad_(False)
    model.net[2].weight.requires_grad_(False)
    return model, batch


class Unused(nn.Module):
    """A layer that is never called and one whose result is multiplied by nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.dropped = nn.Linear(FEATURES, 8), nn.Linear(FEATURES, 8), nn.Linear(FEATURES, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.dropped(x)
        return self.used(x)


def unused_parameter() -> Example:
    """Parameters without a gradient."""
    torch.manual_seed(0)
    return _regression(Unused())


class Lora(nn.Module):
    """A frozen layer and a trained product of two thin matrices."""

    def __init__(self, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(FEATURES, HIDDEN).requires_grad_(False)
        self.down, self.up = nn.Linear(FEATURES, rank, bias=False), nn.Linear(rank, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.up(F.dropout(self.down(x), 0.1, self.training))


def lora() -> Example:
    """Low-rank adapters: rank 2, so that 4 devices cannot share it evenly; dropout as a function."""
    torch.manual_seed(0)
    return _regression(Lora(), nn.ReLU(), nn.Linear(HIDDEN, 8))


class Autoencoder(nn.Module):
    """The decoder's weights are the encoder's, turned."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(FEATURES, 8)
        self.bias = nn.Parameter(torch.zeros(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return F.mse_loss(F.linear(self.encoder(x).relu(), self.encoder.weight.t(), self.bias), x)


def tied_autoencoder() -> Example:
    """One weight used as it is and transposed."""
    torch.manual_seed(0)
    return Autoencoder().train(), {"x": _batch()["x"]}


class ParameterList(nn.Module):
    """Parameters in a list and a dict, stacked in the forward pass; one of them a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.ParameterList(nn.Parameter(torch.randn(FEATURES)) for _ in range(8))
        self.extra = nn.ParameterDict({"scale": nn.Parameter(torch.tensor(0.5)), "shift": nn.Parameter(torch.zeros(8))})

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.stack(list(self.columns), 1) * self.extra["scale"] + self.extra["shift"]


def parameter_list() -> Example:
    """A matrix stacked of parameters; a scalar parameter."""
    torch.manual_seed(0)
    return _regression(ParameterList())


class Scalars(nn.Module):
    """Nothing but numbers: one weight of size one in every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.power = nn.Parameter(torch.ones(1)), nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return (self.scale * x).abs().add(0.1).pow(self.power)


def no_bias_scalar() -> Example:
    """Parameters of one element; nothing to split but the batch."""
    torch.manual_seed(0)
    return _regression(Scalars(), outputs=(FEATURES,))


def weight_norm() -> Example:
    """Weights made from a direction and a length in every forward pass."""
    torch.manual_seed(0)
    first, last = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, 8)
    return _regression(parametrizations.weight_norm(first), nn.Tanh(), parametrizations.weight_norm(last, dim=-1))


def spectral_norm() -> Example:
    """Weights divided by their largest singular value; a step of power iteration changes buffers."""
    torch.manual_seed(0)
    first, last = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, 8)
    return _regression(parametrizations.spectral_norm(first), nn.LeakyReLU(0.1), parametrizations.spectral_norm(last))


# Precision, inputs, outputs.


class Mixed(nn.Module):
    """bfloat16 weights; norms, softmax and the loss in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(FEATURES, HIDDEN), nn.Parameter(torch.ones(HIDDEN))
        self.qkv, self.head = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.embed(x.bfloat16())
        wide = x.float()
        x = (wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).bfloat16() * self.norm
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = (q @ k.transpose(1, 2)).float().softmax(-1).to(v.dtype)
        return F.mse_loss(self.head(x + weights @ v).float(), y)


def bfloat16() -> Example:
    """Parameters in bfloat16, reductions in float32."""
    torch.manual_seed(0)
    return Mixed().bfloat16().train(), _batch(6, FEATURES, outputs=(6, 8))


class InDouble(nn.Module):
    """The sum that must be exact is made in float64."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.double() - x.double().mean(-1, keepdim=True)).square().sum(-1, keepdim=True).sqrt().to(x.dtype) * x


def double_precision() -> Example:
    """A part of the model in float64."""
    torch.manual_seed(0)
    return _regression(nn.Linear(FEATURES, HIDDEN), InDouble(), nn.Linear(HIDDEN, 8))


class Counting(nn.Module):
    """Reads whole numbers of several types, truth values, and bits."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.weight = nn.Embedding(16, 8), nn.Parameter(torch.randn(4))

    def forward(self, numbers: Tensor, small: Tensor, flags: Tensor, y: Tensor) -> Tensor:
        x = self.table((numbers + small.long()) % 16)
        bits = (small[..., None] >> torch.arange(4, device=small.device, dtype=small.dtype)) & 1
        x = x * (bits.float() @ self.weight)[..., None]
        x = torch.where(flags[..., None], x, -x) + (~flags).sum(1)[:, None, None] * 0.1
        return F.mse_loss(x.mean(1), y)


def integer_inputs() -> Example:
    """int64, uint8 and bool inputs; bits and remainders."""
    torch.manual_seed(0)
    generator = _generator()
    numbers, small = (torch.randint(0, 16, (SAMPLES, 6), generator=generator) for _ in range(2))
    flags = torch.rand(SAMPLES, 6, generator=generator) < 0.5
    return Counting().train(), {"numbers": numbers, "small": small.to(torch.uint8), "flags": flags, "y": _batch()["y"]}


def channels_last() -> Example:
    """Images and weights whose memory runs over the channels first."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(288, 8))
    batch = _batch(4, 8, 8)
    batch["x"] = batch["x"].contiguous(memory_format=torch.channels_last)
    return Regression(net).to(memory_format=torch.channels_last).train(), batch  # type: ignore[call-overload]


def non_contiguous() -> Example:
    """Inputs that are views (turned, every second); steps and flips in the model."""
    torch.manual_seed(0)
    batch = _batch(6, 2 * FEATURES, outputs=(8, 6))
    net = nn.Sequential(nn.Linear(FEATURES, FEATURES), Apply(lambda x: x.transpose(1, 2)[..., ::2].flip(1)), nn.Linear(3, 8))
    batch["x"] = batch["x"][..., ::2]
    batch["y"] = torch.randn(SAMPLES, 8, FEATURES, generator=_generator()).transpose(1, 2)
    return Regression(net).train(), batch


def odd_sizes() -> Example:
    """Sizes that 2 and 4 do not divide: 30 features, 131 words, 7 tokens."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 131, (SAMPLES, 8), generator=_generator())
    return OddLanguage().train(), {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


class OddLanguage(nn.Module):
    """A language model with tied words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(131, 30)
        self.layer, self.norm = nn.Sequential(nn.Linear(30, 45), nn.GELU(), nn.Linear(45, 30)), nn.LayerNorm(30)
        self.bias = nn.Parameter(torch.zeros(131))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.words(tokens)
        x = self.norm(x + self.layer(x).cumsum(1) / 7)
        return F.cross_entropy(F.linear(x, self.words.weight, self.bias).transpose(1, 2), labels)


def six_heads() -> Example:
    """Six heads of five, for four devices; three groups of keys."""
    torch.manual_seed(0)
    return SixHeads().train(), _batch(6, 30, outputs=(6, 30))


class SixHeads(nn.Module):
    """Grouped causal attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(30, 30), nn.Linear(30, 30), nn.Linear(30, 30)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (6, 5)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (6, 5)).transpose(1, 2).chunk(2, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return F.mse_loss(self.out(mixed.transpose(1, 2).flatten(2)), y)


def batch_of_three() -> Example:
    """Three samples, for two or four devices."""
    torch.manual_seed(0)
    model, _ = _regression(nn.Linear(FEATURES, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 8))
    return model, _batch(samples=3)


class Heads(nn.Module):
    """Returns everything: losses in nested lists and dicts; the whole under "loss"."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.heads = nn.Linear(FEATURES, HIDDEN), nn.ModuleDict({"a": nn.Linear(HIDDEN, 8), "b": nn.Linear(HIDDEN, 8)})

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        hidden = self.first(x).relu()
        made = {name: head(hidden) for name, head in self.heads.items()}
        parts = [F.mse_loss(each, y) for each in made.values()]
        return {"loss": torch.stack(parts).sum(), "parts": parts, "made": made, "shape": x.shape}


def returned_dict() -> Example:
    """A dict with "loss" and other outputs, some no tensors."""
    torch.manual_seed(0)
    return Heads().train(), _batch()


class Wrapped:
    """A result that is no tree of tensors."""

    def __init__(self, loss: Tensor, logits: Tensor) -> None:
        self.loss, self.logits = loss, logits


class NestedOutputs(nn.Module):
    """Layers that hand over tuples and objects of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.LSTM(FEATURES, HIDDEN, batch_first=True), nn.Linear(3 * HIDDEN, 8)

    def forward(self, x: Tensor, y: Tensor) -> Wrapped:
        out, (hidden, cell) = self.recurrent(x)
        logits = self.head(torch.cat([out[:, -1], hidden[0], cell[0]], -1))
        return Wrapped(F.mse_loss(logits, y), logits)


def nested_outputs() -> Example:
    """An object with `.loss` that torch knows nothing of; all three results of an LSTM."""
    torch.manual_seed(0)
    return NestedOutputs().train(), _batch(5, FEATURES)


class PythonNumbers(nn.Module):
    """Numbers and a choice among the batch's values."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(FEATURES, 8)

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0, kind: str = "square") -> Tensor:
        error = self.net(x) * scale - y
        return error.square().mean() if kind == "square" else error.abs().mean()


def python_numbers() -> Example:
    """Values of the batch that are no tensors."""
    torch.manual_seed(0)
    return PythonNumbers().train(), _batch() | {"scale": 0.5, "kind": "absolute"}


# Control flow and shapes that depend on values.


class OnlyIfPositive(nn.Module):
    """Chooses between two layers by a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.first(x).relu()
        return self.second(x).tanh()


def control_flow() -> Example:
    """`if x.sum() > 0` in a layer."""
    torch.manual_seed(0)
    return _regression(nn.Linear(FEATURES, HIDDEN), OnlyIfPositive(), nn.Linear(HIDDEN, 8))


class UntilSmall(nn.Module):
    """Repeats a layer until the change is small, at most five times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(5):
            change = 0.3 * self.layer(x).tanh()
            x = x + change
            if change.abs().max().item() < 0.25:
                break
        return x


def value_loop() -> Example:
    """A loop that ends by a value (`.item()`)."""
    torch.manual_seed(0)
    return _regression(nn.Linear(FEATURES, HIDDEN), UntilSmall(), nn.Linear(HIDDEN, 8))


class ExpertLoop(nn.Module):
    """Each token goes to its two best experts: a loop over the experts that were chosen at all."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, experts, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN)) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(flat).softmax(-1).topk(2, -1)
        out = torch.zeros_like(flat)
        hit = F.one_hot(chosen, len(self.experts)).sum((0, 1)).nonzero()
        for number in hit.flatten().tolist():
            token, rank = torch.where(chosen == number)
            out.index_add_(0, token, self.experts[number](flat[token]) * weights[token, rank, None])
        return out.reshape(x.shape)


def expert_loop() -> Example:
    """A Python loop over the experts that tokens chose (nonzero, tolist), index_add_ in place."""
    torch.manual_seed(0)
    return _regression(nn.Linear(FEATURES, HIDDEN), ExpertLoop(), nn.Linear(HIDDEN, 8), shape=(6, FEATURES), outputs=(6, 8))


class GatedExperts(nn.Module):
    """All experts see all tokens; their results are weighted; the load is kept in a buffer."""

    load: Tensor

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Parameter(0.1 * torch.randn(HIDDEN, experts))
        self.up, self.down = (nn.Parameter(0.1 * torch.randn(experts, HIDDEN, HIDDEN)) for _ in range(2))
        self.register_buffer("load", torch.zeros(experts))

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ self.gate
        kept = scores.topk(2, -1).indices
        weights = torch.full_like(scores, float("-inf")).scatter(-1, kept, scores.gather(-1, kept)).softmax(-1)
        self.load.add_(F.one_hot(kept, self.gate.shape[1]).sum((0, 1, 2)).to(self.load.dtype))
        each = torch.einsum("eth,ehk->etk", F.gelu(torch.einsum("nsh,ehk->ensk", x, self.up)).flatten(1, 2), self.down)
        return torch.einsum("etk,te->tk", each, weights.flatten(0, 1)).reshape(x.shape)


def gated_experts() -> Example:
    """Dense experts by einsum, the two best by scatter of scores, a counter of load."""
    torch.manual_seed(0)
    return _regression(nn.Linear(FEATURES, HIDDEN), GatedExperts(), nn.Linear(HIDDEN, 8), shape=(6, FEATURES), outputs=(6, 8))


class OnlySeen(nn.Module):
    """Runs its layer on the tokens that are seen, and writes them back."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[seen] = self.layer(x[seen]).relu()
        return out


class Packed(nn.Module):
    """A class for each sample from its seen tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.packed, self.head = OnlySeen(), nn.Linear(FEATURES, 8)

    def forward(self, x: Tensor, seen: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.head(self.packed(x, seen).sum(1) / seen.sum(1, keepdim=True)), y)


def boolean_mask() -> Example:
    """x[mask] in a layer: a size that depends on values."""
    torch.manual_seed(0)
    seen = torch.arange(6) < torch.tensor([6, 2, 3, 5])[:, None]
    return Packed().train(), _batch(6, FEATURES) | {"seen": seen}


# Gradients.


class Checkpointed(nn.Module):
    """Blocks whose values are computed again for the backward pass; with dropout, which must be drawn alike."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.GELU(), nn.Dropout(0.1)) for _ in range(3))
        self.head = nn.Linear(FEATURES, 8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return self.head(x)


def checkpointed() -> Example:
    """torch.utils.checkpoint in the model, with dropout."""
    torch.manual_seed(0)
    return _regression(Checkpointed())


class Detached(nn.Module):
    """Values without gradient in the middle: a no_grad region, detach, and a gate of both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        with torch.no_grad():
            scale = hidden.std(-1, keepdim=True) + self.second(hidden).abs().mean()
            with torch.enable_grad():
                inner = self.second(hidden)
        stopped = inner.detach()
        return self.head(inner / scale + stopped * hidden)


def detached() -> Example:
    """torch.no_grad and torch.enable_grad regions, detach; a parameter used with and without gradient."""
    torch.manual_seed(0)
    return _regression(Detached())


class Teacher(nn.Module):
    """A network with batch normalisation compared with itself on other inputs, there without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(inplace=True), nn.Linear(HIDDEN, 8))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.net(y)
        return F.mse_loss(self.net(x), wanted)


def no_grad_in_place() -> Example:
    """A no_grad region beside operators that change values in place; parameters used in and outside it."""
    torch.manual_seed(0)
    return Teacher().train(), _batch(outputs=(FEATURES,))


class BehindAutograd(nn.Module):
    """`.data`: a running mean updated through it, and scores masked through it, as code written for older versions of torch does."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(FEATURES, FEATURES)
        self.register_buffer("mean", torch.zeros(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(x)
        self.mean.data.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        scores.data.masked_fill_(x.data < 0, -10.0)
        return scores.softmax(-1) * (x - self.mean)


def data_attribute() -> Example:
    """Tensors read and changed through `.data`."""
    torch.manual_seed(0)
    return _regression(nn.Linear(FEATURES, FEATURES), BehindAutograd(), nn.Linear(FEATURES, 8))


class Slope(nn.Module):
    """The gradient of a network's sum to its input, which is differentiated again in training: forces of an energy."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return slope


def forces() -> Example:
    """torch.autograd.grad in the forward pass (forces, gradient penalties, differential equations): that submodule is one operator."""
    torch.manual_seed(0)
    return _regression(Slope(), nn.Linear(FEATURES, 8))


class Ensemble(nn.Module):
    """Four small networks at once by torch.vmap over their stacked parameters, each seeing its own choice of the features."""

    def __init__(self, members: int = 4) -> None:
        super().__init__()
        self.first, self.bias = nn.Parameter(torch.randn(members, HIDDEN, FEATURES) * 0.2), nn.Parameter(torch.zeros(members, HIDDEN))
        self.second = nn.Parameter(torch.randn(members, 8, HIDDEN) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        def member(first: Tensor, bias: Tensor, second: Tensor) -> Tensor:
            return F.linear(F.silu(F.linear(x, first, bias)), second)

        return torch.vmap(member)(self.first, self.bias, self.second).mean(0)


def ensemble() -> Example:
    """torch.vmap over stacked parameters."""
    torch.manual_seed(0)
    return _regression(nn.Linear(FEATURES, FEATURES), Ensemble())


class InPlace(nn.Module):
    """Changes its own values in place: activations, slices, sums, fills."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden += 1
        hidden[:, :4] *= 2
        hidden[:, 4:8] = hidden[:, 8:12].clone()
        hidden[:, 12].zero_()
        hidden.view(len(x), 2, -1)[:, 1].mul_(0.5)
        hidden.masked_fill_(hidden > 3, 3.0)
        return self.head(F.relu_(hidden))


def in_place() -> Example:
    """In-place operators on slices and views, with gradients through them."""
    torch.manual_seed(0)
    return _regression(InPlace())


class ChunkedLoss(nn.Module):
    """The head is run on pieces of the tokens, and the losses are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, 64)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        hidden, counted = self.first(x).relu().flatten(0, 1), (labels != -100).sum()
        total = hidden.new_zeros(())
        for part, wanted in zip(hidden.split(10), labels.flatten().split(10), strict=True):
            total = total + F.cross_entropy(self.head(part), wanted, reduction="sum")
        return total / counted.clamp(min=1)


def chunked_loss() -> Example:
    """Cross entropy by pieces that cross the samples, the last one shorter."""
    torch.manual_seed(0)
    labels = torch.randint(0, 64, (SAMPLES, 6), generator=_generator())
    labels[1, 2:] = labels[3, :3] = -100
    return ChunkedLoss().train(), {"x": _batch(6, FEATURES)["x"], "labels": labels}


# Layers of torch.nn.


class SelfAttention(nn.Module):
    """nn.MultiheadAttention with a causal and a padding mask, giving its weights too."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(FEATURES, 4, batch_first=True, add_bias_kv=True)
        self.head = nn.Linear(FEATURES, 8)

    def forward(self, x: Tensor, missing: Tensor, y: Tensor) -> Tensor:
        causal = torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device), 1)
        mixed, weights = self.attention(x, x, x, attn_mask=causal, key_padding_mask=missing)
        return F.mse_loss(self.head(mixed), y) + weights.square().sum(-1).mean()


def multihead_attention() -> Example:
    """nn.MultiheadAttention with both masks, bias of keys and values, and weights in the loss."""
    torch.manual_seed(0)
    missing = torch.arange(6) >= torch.tensor([6, 3, 4, 5])[:, None]
    return SelfAttention().train(), _batch(6, FEATURES, outputs=(6, 8)) | {"missing": missing}


def transformer() -> Example:
    """nn.TransformerEncoder in training, norms first, dropout."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(FEATURES, 4, HIDDEN, dropout=0.1, activation="gelu", batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(FEATURES), enable_nested_tensor=False)
    return _regression(encoder, nn.Linear(FEATURES, 8), shape=(6, FEATURES), outputs=(6, 8))


class Translation(nn.Module):
    """nn.Transformer, sequence first, with a generated mask."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(64, FEATURES, padding_idx=0)
        self.transformer = nn.Transformer(FEATURES, 4, 1, 1, HIDDEN, dropout=0.0)
        self.head = nn.Linear(FEATURES, 64)

    def forward(self, source: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        source, target = (self.words(each).transpose(0, 1) for each in (source, target))
        mask = nn.Transformer.generate_square_subsequent_mask(len(target), device=source.device, dtype=source.dtype)
        return F.cross_entropy(self.head(self.transformer(source, target, tgt_mask=mask)).permute(1, 2, 0), labels, ignore_index=0)


def transformer_decoder() -> Example:
    """nn.Transformer with sequences first: the batch is dim 1 inside; padding_idx."""
    torch.manual_seed(0)
    generator = _generator()
    source, target, labels = (torch.randint(1, 64, (SAMPLES, 6), generator=generator) for _ in range(3))
    labels[1, 3:] = target[1, 4:] = 0
    return Translation().train(), {"source": source, "target": target, "labels": labels}


class Pair(nn.Module):
    """nn.Bilinear of the two halves."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(8, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(*x.chunk(2, -1))


def bilinear() -> Example:
    """nn.Bilinear."""
    torch.manual_seed(0)
    return _regression(Pair())


class Cells(nn.Module):
    """nn.GRUCell and nn.LSTMCell over time, the second fed by the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.GRUCell(FEATURES, HIDDEN), nn.LSTMCell(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(len(x), HIDDEN)
        state = (torch.zeros_like(hidden), torch.zeros_like(hidden))
        for step in range(x.shape[1]):
            hidden = self.first(x[:, step], hidden)
            state = self.second(hidden, state)
        return self.head(state[0])


def gru_cells() -> Example:
    """A loop over time of nn.GRUCell and nn.LSTMCell."""
    torch.manual_seed(0)
    return _regression(Cells(), shape=(5, FEATURES))


class Recurrent(nn.Module):
    """nn.RNN with a given first state, sequence first."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.layer = nn.Parameter(torch.zeros(2, HIDDEN)), nn.RNN(FEATURES, HIDDEN, num_layers=2, nonlinearity="relu")
        self.head = nn.Linear(HIDDEN, 8)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.layer(x.transpose(0, 1), self.start[:, None].expand(-1, len(x), -1).contiguous())
        return self.head(out[-1])


def plain_rnn() -> Example:
    """nn.RNN with a learned first state."""
    torch.manual_seed(0)
    return _regression(Recurrent(), shape=(5, FEATURES))


class Bags(nn.Module):
    """Sums of embeddings, one bag a row, weighted; and an embedding with a largest norm of gradients by frequency."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(32, 8, mode="sum")
        self.words = nn.Embedding(32, 8, padding_idx=0, scale_grad_by_freq=True)

    def forward(self, numbers: Tensor, weights: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.bag(numbers, per_sample_weights=weights) + self.words(numbers).mean(1), y)


def embedding_bag() -> Example:
    """nn.EmbeddingBag with weights; nn.Embedding with padding_idx and gradients scaled by how often a word occurs."""
    torch.manual_seed(0)
    numbers = torch.randint(0, 6, (SAMPLES, 5), generator=_generator())
    return Bags().train(), {"numbers": numbers, "weights": _batch(5)["x"], "y": _batch()["y"]}


# Operators.


class Rotary(nn.Module):
    """Attention whose queries and keys are turned as complex numbers."""

    turns: Tensor

    def __init__(self, length: int = 6) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(FEATURES, 3 * FEATURES), nn.Linear(FEATURES, 8)
        angles = torch.outer(torch.arange(length), 100.0 ** -torch.linspace(0, 1, 2))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def _turned(self, x: Tensor) -> Tensor:
        numbers = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(numbers * self.turns).flatten(-2).type_as(x)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return self.head(F.scaled_dot_product_attention(self._turned(q), self._turned(k), v).transpose(1, 2).flatten(2))


def complex_rotary() -> Example:
    """Rotary positions by complex numbers (view_as_complex, view_as_real), a complex buffer."""
    torch.manual_seed(0)
    return _regression(Rotary(), shape=(6, FEATURES), outputs=(6, 8))


class Sorted(nn.Module):
    """Sorts each row, takes medians and quantiles, and undoes the order again."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.linspace(0.5, 1.5, FEATURES)), nn.Linear(FEATURES + 3, 8)

    def forward(self, x: Tensor) -> Tensor:
        values, order = x.sort(-1, descending=True)
        back = (values * self.weight).gather(-1, order.argsort(-1))
        middle = back.median(-1, keepdim=True).values
        return self.head(torch.cat([back, middle, back.quantile(0.75, -1, keepdim=True), back.kthvalue(3, -1, keepdim=True).values], -1))


def sorted_values() -> Example:
    """sort, argsort, gather, median, quantile, kthvalue."""
    torch.manual_seed(0)
    return _regression(nn.Linear(FEATURES, FEATURES), Sorted())


class TopK(nn.Module):
    """Keeps the four largest values of each row, by their indices, and the largest over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(FEATURES, 8)

    def forward(self, x: Tensor) -> Tensor:
        values, where = x.topk(4, -1)
        kept = torch.zeros_like(x).scatter(-1, where, values.softmax(-1))
        return self.head(kept + x.max(0).values + torch.cummax(x, -1).values)


def top_k() -> Example:
    """topk, scatter, a maximum over the batch, cummax."""
    torch.manual_seed(0)
    return _regression(nn.Linear(FEATURES, FEATURES), TopK())


class Bucketed(nn.Module):
    """Numbers to buckets with embeddings: fixed and learned limits, and a histogram."""

    limits: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("limits", torch.linspace(-1.5, 1.5, 7))
        self.coarse, self.fine = nn.Embedding(8, 8), nn.Embedding(FEATURES + 1, 8)

    def forward(self, x: Tensor) -> Tensor:
        fine = torch.searchsorted(x.detach().sort(-1).values, x.detach() * 0.5, right=True)
        return (self.coarse(torch.bucketize(x, self.limits)) + self.fine(fine)).mean(1)


def bucketed() -> Example:
    """bucketize by a buffer, searchsorted in each row."""
    torch.manual_seed(0)
    return _regression(Bucketed())


class Rendered(nn.Module):
    """Light along a ray: what is left after each piece (cumprod), differences, sums."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 4))

    def forward(self, x: Tensor) -> Tensor:
        colours, density = self.net(x).split((3, 1), -1)
        lengths = torch.diff(x[..., 0], dim=-1, append=x[:, -1:, 0] + 1).abs()
        opaque = 1 - torch.exp(-F.softplus(density.squeeze(-1)) * lengths)
        left = torch.cumprod(torch.cat([torch.ones_like(opaque[:, :1]), 1 - opaque[:, :-1] + 1e-10], -1), -1)
        return ((opaque * left)[..., None] * colours.sigmoid()).sum(1) + torch.logcumsumexp(opaque, 1)[:, -1:]


def cumulative_products() -> Example:
    """cumprod, diff and logcumsumexp along a ray (radiance fields)."""
    torch.manual_seed(0)
    return _regression(Rendered(), shape=(6, 3), outputs=(3,))


class Folded(nn.Module):
    """Overlapping patches by unfold (of both kinds), changed and put back by fold."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(2 * 9, 2 * 9), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.layer(F.unfold(x, 3, padding=1, stride=2).transpose(1, 2))
        joined = F.fold(patches.transpose(1, 2), (8, 8), 3, padding=1, stride=2)
        windows = joined.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)
        return self.head(windows).mean((1, 2, 3))


def folded() -> Example:
    """unfold and fold of overlapping patches, Tensor.unfold."""
    torch.manual_seed(0)
    return _regression(Folded(), shape=(2, 8, 8))


def pixel_shuffle() -> Example:
    """Channels to pixels and back, nearest and bicubic resizing, reflection and circular padding."""
    torch.manual_seed(0)
    return _regression(
        nn.Conv2d(2, 16, 3, padding=1, padding_mode="reflect"),
        nn.PixelShuffle(2),
        nn.PReLU(4),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.PixelUnshuffle(2),
        nn.ChannelShuffle(4),
        nn.Upsample(scale_factor=2, mode="bicubic"),
        nn.AdaptiveMaxPool2d(4),
        nn.LocalResponseNorm(3),
        nn.Flatten(),
        nn.Linear(256, 8),
        shape=(2, 8, 8),
    )


class Warped(nn.Module):
    """A spatial transformer: an affine map for each image, a grid of it, and samples along the grid."""

    def __init__(self) -> None:
        super().__init__()
        self.locate = nn.Linear(128, 6)
        nn.init.normal_(self.locate.weight, std=0.01)
        with torch.no_grad():
            self.locate.bias.copy_(torch.tensor([1.0, 0, 0, 0, 1, 0]))
        self.head = nn.Linear(128, 8)

    def forward(self, x: Tensor) -> Tensor:
        matrices = self.locate(x.flatten(1)).reshape(-1, 2, 3)
        warped = F.grid_sample(x, F.affine_grid(matrices, list(x.shape), align_corners=False), align_corners=False, padding_mode="border")
        return self.head(warped.flatten(1))


def affine_grids() -> Example:
    """affine_grid and grid_sample."""
    torch.manual_seed(0)
    return _regression(Warped(), shape=(2, 8, 8))


class LowRank(nn.Module):
    """Products written as matmul of one, two and three dims, dot, outer, kron, tensordot."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(FEATURES, 4)), nn.Parameter(torch.randn(4, 8))
        self.c = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.linalg.multi_dot([self.a, torch.diag(self.c), self.b])
        small = torch.kron(self.b[:2, :2], self.b[2:, :4])
        twisted = torch.tensordot(x.unflatten(-1, (4, 4)), small.reshape(4, 1, 8), ([2], [0])).sum((1, 2))
        return torch.addmm(self.b.mean(0), x, weight) + (x @ self.a @ self.c)[:, None] + small.sum() * torch.dot(self.c, self.c) + twisted


def low_rank_einsum() -> Example:
    """multi_dot, diag, kron, addmm, products with vectors, dot."""
    torch.manual_seed(0)
    return _regression(LowRank())


class Scan(nn.Module):
    """A linear recurrence over time, written as a Python loop over slices and stacked again."""

    def __init__(self) -> None:
        super().__init__()
        self.decay, self.inward, self.outward = nn.Parameter(torch.zeros(HIDDEN)), nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, 8)

    def forward(self, x: Tensor) -> Tensor:
        inputs, keep = self.inward(x), self.decay.sigmoid()
        state, states = torch.zeros_like(inputs[:, 0]), []
        for now in inputs.unbind(1):
            state = keep * state + (1 - keep) * now
            states.append(state)
        return self.outward(torch.stack(states, 1))


def scan_loop() -> Example:
    """A recurrence as a Python loop: unbind and stack."""
    torch.manual_seed(0)
    return _regression(Scan(), shape=(6, FEATURES), outputs=(6, 8))


class Random(nn.Module):
    """Draws of many kinds: noise, dropout of channels, permutations, choices, relaxed choices."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, 8)
        self.alpha, self.channels, self.leaky = nn.AlphaDropout(0.1), nn.Dropout1d(0.2), nn.RReLU()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.leaky(self.alpha(self.first(x)))
        hidden = self.channels(hidden[:, :, None]).squeeze(-1)
        hidden = hidden + 0.1 * torch.randn_like(hidden) + 0.1 * torch.rand(hidden.shape[-1], device=x.device)
        hidden = hidden * torch.bernoulli(torch.full_like(hidden, 0.9)) + torch.empty_like(hidden).uniform_(-0.1, 0.1)
        hidden = hidden + 0.1 * hidden[torch.randperm(len(x), device=x.device)]
        mixed = hidden * torch.normal(1.0, 0.1, (len(x), 1), device=x.device)
        return self.head(mixed + F.gumbel_softmax(mixed, tau=0.5, hard=True))


def random_everything() -> Example:
    """randn_like, rand, bernoulli, uniform_, normal, randperm, gumbel_softmax, RReLU, dropout of channels and AlphaDropout."""
    torch.manual_seed(0)
    return _regression(Random())
