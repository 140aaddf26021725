"""Fourier transforms: linear; transformed dims stay whole."""

from __future__ import annotations

import torch

from shardwise.capture.graph import Op
from shardwise.sharding.rules.build import ALONE, every, given, over, overloads, simple_dims
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.signature import Dim, Signature

aten = torch.ops.aten

_WHOLE = "it is transformed as a whole"


@rule(
    *overloads("_fft_c2c", "_fft_c2r", "_fft_r2c", "fft_fft", "fft_fft2", "fft_fftn", "fft_fftshift", "fft_hfft", "fft_hfft2", "fft_hfftn"),
    *overloads("fft_ifft", "fft_ifft2", "fft_ifftn", "fft_ifftshift", "fft_ihfft", "fft_ihfft2", "fft_ihfftn", "fft_irfft", "fft_irfft2"),
    *overloads("fft_irfftn", "fft_rfft", "fft_rfft2", "fft_rfftn"),
)
def transform(op: Op) -> Signature:
    names = simple_dims(op.inputs[0].shape)
    dims = _transformed(op)
    result: list[Dim] = [(f"out{dim}",) if dim in dims else name for dim, name in enumerate(names)]
    return over(op, [names], [result], whole={f"d{dim}": _WHOLE for dim in dims}, linear=ALONE)


def _transformed(op: Op) -> list[int]:
    """All dims when none are named, or the last ones for which sizes are."""
    rank = len(op.inputs[0].shape)
    dims, sizes = given(op, "dim"), given(op, "s")
    if dims is None and sizes is not None:
        return list(range(rank - len(sizes), rank))
    return every(dims, rank)


@rule(*overloads("istft", "stft"))
def windowed(op: Op) -> Signature:
    """Signals of a batch are independent of each other."""
    source, out = op.inputs[0].shape, op.outputs[0].shape
    batched = len(out if op.target is aten.istft.default else source) - 1
    batch: list[Dim] = [("batch",)] * batched
    signal = [*batch, *simple_dims(source[batched:], "in")]
    result = [*batch, *simple_dims(out[batched:], "out")]
    window = [simple_dims(value.shape, "window") for value in op.inputs[1:]]
    whole = {name: _WHOLE for each in (signal[batched:], *window) for (name,) in each}
    return over(op, [signal, *window], [result], whole=whole, linear=ALONE)
