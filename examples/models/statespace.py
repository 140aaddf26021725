"""Small state-space, linear-attention, convolutional and recurrent language models, each with a batch: copy one, or run it as it is.

Each function returns `(model, batch)`: the module in training mode, seeded, and the keyword arguments of its forward, whose output is or
carries the loss. All mix tokens by something else than softmax attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "causal_convolution",
    "diagonal_scan",
    "falcon_mamba",
    "fourier_convolution",
    "gated_linear_attention",
    "gru",
    "lstm",
    "mamba",
    "mamba2",
    "min_gru",
    "recurrent_gemma",
    "rwkv",
    "token_mixer",
    "xlstm",
]

Batch = dict[str, Tensor]
Example = tuple[nn.Module, Batch]


def _tokens(vocabulary: int = 128, *, samples: int = 4, sequence: int = 16) -> Batch:
    """Random tokens and their labels: all of the first sample's ignored, most of the second's."""
    tokens = torch.randint(3, vocabulary, (samples, sequence), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[0] = -100
    labels[1, 5:] = -100
    return {"input_ids": tokens, "labels": labels}


def mamba() -> Example:
    """A selective scan, step by step, after a causal convolution."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=128, hidden_size=32, state_size=4, num_hidden_layers=2, use_cache=False, pad_token_id=0)
    return MambaForCausalLM(config).train(), _tokens()


def falcon_mamba() -> Example:
    """Mamba with norms of B, C and the step size."""
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    torch.manual_seed(0)
    config = FalconMambaConfig(vocab_size=128, hidden_size=32, state_size=4, num_hidden_layers=2, use_cache=False, pad_token_id=0)
    return FalconMambaForCausalLM(config).train(), _tokens()


def mamba2() -> Example:
    """The scan in chunks of 8 as matrix products, with heads and groups."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=128,
        hidden_size=32,
        num_heads=8,
        head_dim=8,
        state_size=8,
        n_groups=2,
        chunk_size=8,
        num_hidden_layers=2,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Mamba2ForCausalLM(config).train(), _tokens()


def rwkv() -> Example:
    """A weighted key-value average with decay, step by step, and tokens mixed with the one before."""
    from transformers import RwkvConfig, RwkvForCausalLM

    torch.manual_seed(0)
    config = RwkvConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, context_length=32, use_cache=False)
    return RwkvForCausalLM(config).train(), _tokens()


def recurrent_gemma() -> Example:
    """A gated linear recurrence and local attention in turn."""
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    torch.manual_seed(0)
    config = RecurrentGemmaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        lru_width=32,
        attention_window_size=8,
        block_types=["recurrent", "attention"],
        use_cache=False,
    )
    return RecurrentGemmaForCausalLM(config).train(), _tokens()


def xlstm() -> Example:
    """Matrix memories with exponential gates, in chunks."""
    from transformers import xLSTMConfig, xLSTMForCausalLM

    torch.manual_seed(0)
    config = xLSTMConfig(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=2,
        num_heads=4,
        chunk_size=16,
        mode="train",
        autocast_kernel_dtype="float32",
        use_cache=False,
    )
    return xLSTMForCausalLM(config).train(), _tokens(sequence=32)


class _LanguageModel(nn.Module):
    """Embedding, blocks of a token mixer and a feed-forward, a head; the mixer maps [sample, token, hidden] to the same."""

    def __init__(self, mixer: Callable[[], nn.Module], *, vocabulary: int = 128, hidden: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.mixers = nn.ModuleList(nn.Sequential(nn.LayerNorm(hidden), mixer()) for _ in range(layers))
        self.feeds = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, vocabulary)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for mixer, feed in zip(self.mixers, self.feeds, strict=True):
            x = x + mixer(x)
            x = x + feed(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _scan(decay: Tensor, values: Tensor) -> Tensor:
    """h[t] = decay[t] * h[t-1] + values[t] along dim 1, by doubling: log2(T) steps on whole tensors."""
    step, length = 1, values.shape[1]
    while step < length:
        values = torch.cat([values[:, :step], values[:, step:] + decay[:, step:] * values[:, :-step]], 1)
        decay = torch.cat([decay[:, :step], decay[:, step:] * decay[:, :-step]], 1)
        step *= 2
    return values


class _DiagonalScan(nn.Module):
    """S5-like: a diagonal state of `state` numbers for each channel, with input-dependent steps."""

    def __init__(self, hidden: int, state: int) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.log(1 + torch.arange(state).float()).expand(hidden, state).clone())
        self.step, self.write, self.read = nn.Linear(hidden, hidden), nn.Linear(hidden, state), nn.Linear(hidden, state)
        self.skip = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        step = F.softplus(self.step(x))[..., None]
        states = _scan(torch.exp(-step * self.log_rate.exp()), step * self.write(x)[:, :, None] * x[..., None])
        return torch.einsum("btds,bts->btd", states, self.read(x)) + self.skip * x


def diagonal_scan() -> Example:
    """A diagonal linear recurrence by doubling."""
    torch.manual_seed(0)
    return _LanguageModel(lambda: _DiagonalScan(32, 4)).train(), _tokens()


class _FourierConvolution(nn.Module):
    """S4D: the recurrence as a convolution with a kernel of decaying cosines, by Fourier transforms."""

    def __init__(self, hidden: int, state: int) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.full((hidden, state), 0.5).log())
        self.frequency = nn.Parameter(torch.pi * torch.arange(state).float().expand(hidden, state).clone())
        self.read = nn.Parameter(torch.randn(hidden, state))
        self.log_step = nn.Parameter(torch.empty(hidden, 1).uniform_(-4, -1))
        self.skip, self.out = nn.Parameter(torch.ones(hidden)), nn.Linear(hidden, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        time = torch.arange(length, device=x.device) * self.log_step.exp()
        waves = torch.exp(-self.log_rate.exp()[..., None] * time[:, None]) * torch.cos(self.frequency[..., None] * time[:, None])
        kernel = torch.fft.rfft((self.read[..., None] * waves).sum(1), n=2 * length)
        signal = torch.fft.rfft(x.transpose(1, 2), n=2 * length)
        mixed = torch.fft.irfft(signal * kernel, n=2 * length)[..., :length].transpose(1, 2) + self.skip * x
        return F.glu(self.out(F.gelu(mixed)))


def fourier_convolution() -> Example:
    """S4D: a long convolution by Fourier transforms, and a gated output."""
    torch.manual_seed(0)
    return _LanguageModel(lambda: _FourierConvolution(32, 4)).train(), _tokens()


class _GatedLinearAttention(nn.Module):
    """Decayed linear attention: scores are multiplied by exp of differences of cumulated log gates."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.queries, self.keys, self.values = (nn.Linear(hidden, hidden, bias=False) for _ in range(3))
        self.forget, self.gate, self.out = nn.Linear(hidden, heads), nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.norm = nn.GroupNorm(heads, hidden)

    def forward(self, x: Tensor) -> Tensor:
        samples, length, hidden = x.shape
        q, k, v = (each(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (self.queries, self.keys, self.values))
        logs = F.logsigmoid(self.forget(x)).cumsum(1).transpose(1, 2)
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        decay = (logs[..., :, None] - logs[..., None, :]).masked_fill(~causal, float("-inf")).exp()
        mixed = ((q @ k.transpose(-1, -2)) * decay) @ v
        mixed = self.norm(mixed.transpose(1, 2).reshape(samples * length, hidden)).view(samples, length, hidden)
        return self.out(mixed * F.silu(self.gate(x)))


def gated_linear_attention() -> Example:
    """Linear attention with data-dependent decay from a cumulative sum; a group norm for each head."""
    torch.manual_seed(0)
    return _LanguageModel(lambda: _GatedLinearAttention(32, 4)).train(), _tokens()


class _CausalConvolution(nn.Module):
    """A gated depthwise convolution that sees no later token, with growing steps between taps."""

    def __init__(self, hidden: int, taps: int, dilation: int) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(hidden, 2 * hidden), nn.Linear(hidden, hidden)
        self.reach = (taps - 1) * dilation
        self.convolution = nn.Conv1d(hidden, hidden, taps, groups=hidden, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.inner(x).chunk(2, -1)
        value = self.convolution(F.pad(value.transpose(1, 2), (self.reach, 0))).transpose(1, 2)
        return self.out(value * torch.sigmoid(gate))


def causal_convolution() -> Example:
    """Gated depthwise convolutions, padded on the left."""
    torch.manual_seed(0)
    return _LanguageModel(lambda: _CausalConvolution(32, 3, 2)).train(), _tokens()


class _MinGru(nn.Module):
    """minGRU: gates depend on the input alone, so that the recurrence is a cumulative log-sum-exp."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gate, self.candidate = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        gate, candidate = self.gate(x), self.candidate(x)
        positive = torch.where(candidate >= 0, candidate + 0.5, torch.sigmoid(candidate))
        kept = -F.softplus(gate).cumsum(1)
        return torch.exp(kept + torch.logcumsumexp(positive.log() - F.softplus(-gate) - kept, 1))


def min_gru() -> Example:
    """A recurrence without state in its gates, in logarithms."""
    torch.manual_seed(0)
    return _LanguageModel(lambda: _MinGru(32)).train(), _tokens()


class _TokenMixer(nn.Module):
    """MLP-Mixer made causal: one lower-triangular matrix over tokens for each of a few groups of channels."""

    def __init__(self, groups: int, length: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(groups, length, length) * length**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.unflatten(-1, (self.mix.shape[0], -1))
        return torch.einsum("gts,bsgc->btgc", self.mix.tril(), grouped).flatten(2)


def token_mixer() -> Example:
    """Tokens mixed by learned lower-triangular matrices."""
    torch.manual_seed(0)
    return _LanguageModel(lambda: _TokenMixer(4, 16)).train(), _tokens()


class _Recurrent(nn.Module):
    """An nn.LSTM or nn.GRU language model."""

    def __init__(self, kind: type[nn.Module], vocabulary: int, hidden: int, **settings: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.body = kind(hidden, hidden, num_layers=2, batch_first=True, **settings)
        self.head = nn.Linear(hidden * (2 if settings.get("bidirectional") else 1), vocabulary)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        hidden, _ = self.body(self.embedding(input_ids))
        return F.cross_entropy(self.head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def lstm() -> Example:
    """torch's own LSTM of two layers."""
    torch.manual_seed(0)
    return _Recurrent(nn.LSTM, 128, 32).train(), _tokens()


def gru() -> Example:
    """torch's own GRU of two layers, in both directions."""
    torch.manual_seed(0)
    return _Recurrent(nn.GRU, 128, 32, bidirectional=True).train(), _tokens()
