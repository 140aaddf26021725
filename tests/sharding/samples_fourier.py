"""Sample calls of Fourier transforms."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tests.sharding.brute_force import Sample, sample
from tests.sharding.make import complex_numbers, x

__all__ = ["fourier_samples"]

aten = torch.ops.aten

_OF_COMPLEX = ("fft", "ifft", "irfft", "hfft")  # hfft: of half of a signal that is its own mirrored conjugate


def fourier_samples() -> Iterator[Sample]:
    for name in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft"):
        make = complex_numbers if name in _OF_COMPLEX else x
        yield sample(_op(name), make(4, 6))
        yield sample(_op(name), make(4, 3, 6), 5, 1, norm="ortho")
        yield sample(_op(f"{name}2"), make(4, 3, 6))
        yield sample(_op(f"{name}2"), make(4, 3, 6), [4, 3], [0, -1])
        yield sample(_op(f"{name}n"), make(4, 5))
        yield sample(_op(f"{name}n"), make(4, 3, 6), s=[2, 5])
        yield sample(_op(f"{name}n"), make(4, 3, 6), dim=[1])
    yield sample(aten.fft_fft.default, x(4, 6))
    for name in ("fftshift", "ifftshift"):
        yield sample(_op(name), x(4, 5))
        yield sample(_op(name), complex_numbers(4, 5), [-1])
    yield sample(aten._fft_r2c.default, x(4, 6), [1], 0, True)
    yield sample(aten._fft_c2r.default, complex_numbers(4, 4), [1], 2, 6)
    yield sample(aten._fft_c2c.default, complex_numbers(4, 3, 5), [0, 2], 0, True)
    yield from _windowed()


def _op(name: str) -> torch._ops.OpOverload:
    return getattr(aten, f"fft_{name}").default


def _windowed() -> Iterator[Sample]:
    window = torch.hann_window(8, dtype=torch.float64)
    for shape in ((4, 32), (32,)):
        yield sample(aten.stft.default, x(*shape), 8, 4, 8, window, return_complex=True, frozen=(1,))
    yield sample(aten.stft.center, x(4, 32), 8, 4, return_complex=True)
    yield sample(aten.istft.default, complex_numbers(4, 5, 9), 8, 4, 8, window, frozen=(1,))
    yield sample(aten.istft.default, complex_numbers(5, 9), 8, 2)
