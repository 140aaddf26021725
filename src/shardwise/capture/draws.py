"""Random numbers for tensors of which a rank may hold a part: by key and place, or from torch's own generator.

    keyed    a number is a function of (step, key, its element's place in the whole tensor): any layout draws the same ones
    fast     torch's generator, seeded from (step, key, which part this is): another layout draws others

Both are torch operators, so that a traced graph has one node for a draw. The random state, int64 [2], is the number of the step (seed and
step mixed) and the microbatch; it lies on the cpu, where reading it costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Held", "dropped", "fast_draw", "fast_keep", "keyed_draw", "keyed_keep", "whole"]

_LIBRARY = torch.library.Library("shardwise", "FRAGMENT")
_LIBRARY.define("keyed_keep(Tensor rows, Tensor columns, Tensor state, int width, bool runs, int under, int key) -> Tensor")
_LIBRARY.define(
    "keyed_draw(Tensor rows, Tensor columns, Tensor state, int width, str distribution, Scalar[] parameters, ScalarType dtype, int key)"
    " -> Tensor"
)
_LIBRARY.define("fast_keep(Tensor state, int count, int under, int[] seeds, bool each, Device device) -> Tensor")
_LIBRARY.define(
    "fast_draw(Tensor state, int count, str distribution, Scalar[] parameters, ScalarType dtype, int[] seeds, bool each, Device device)"
    " -> Tensor"
)

_WORDS = 1 << 15  # 64-bit words that are made at once for each thread: they stay in its cache
_LANES = 4  # numbers of 16 bits in such a word
_LEVELS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Held:
    """Some elements of a tensor: those at the given places of its rows, which are all dims but the last as one, and of the last dim.

    rows: int64 [r]; columns: int64 [c]; width: size of the whole last dim; shape: of the result, r · c elements.
    runs: whether the columns come in runs of four neighbours that begin at multiples of four, but for the end of the last run.
    """

    rows: Tensor
    columns: Tensor
    width: int
    shape: tuple[int, ...]
    runs: bool


def whole(shape: Sequence[int], device: torch.device) -> Held:
    """All elements of a tensor."""
    width = shape[-1] if shape else 1
    rows, columns = torch.arange(math.prod(shape[:-1]), device=device), torch.arange(width, device=device)
    return Held(rows=rows, columns=columns, width=width, shape=tuple(shape), runs=True)


def keyed_keep(held: Held, state: Tensor, probability: float, key: int) -> Tensor:
    """Which elements dropout keeps: those whose 16 random bits are not under `probability`; bool."""
    kept = torch.ops.shardwise.keyed_keep(held.rows, held.columns, state, held.width, held.runs, _level(probability), key)
    return kept.view(held.shape)


def fast_keep(shape: Sequence[int], state: Tensor, probability: float, seeds: Sequence[int], *, each: bool, device: torch.device) -> Tensor:
    """As `keyed_keep`, from torch's generator; seeds: the key and which part this is; each: whether microbatches draw unlike ones."""
    kept = torch.ops.shardwise.fast_keep(state, math.prod(shape), _level(probability), list(seeds), each, device)
    return kept.view(tuple(shape))


def dropped(x: Tensor, keep: Tensor, probability: float) -> Tensor:
    """Zeroes the other elements, scales these so that the mean stays."""
    return torch.where(keep, x, 0.0) * (1.0 / (1.0 - probability) if probability < 1 else 0.0)


def _level(probability: float) -> int:
    return min(round(probability * _LEVELS), _LEVELS - 1)  # the few that are kept of all are scaled by 0


def keyed_draw(held: Held, state: Tensor, distribution: str, parameters: Sequence[float], dtype: torch.dtype, key: int) -> Tensor:
    """A random number for each element. Made in float64, so that the same place has the same number in every precision.

    uniform (low, high): in [low, high) · normal (mean, deviation) · exponential (rate) · cauchy (median, scale) · log_normal (mean,
    deviation) · geometric (probability) · integers (low, high): in [low, high) · bernoulli (probability of 1, value for 1), 0 otherwise.
    """
    arguments = (held.rows, held.columns, state, held.width, distribution, list(parameters), dtype, key)
    drawn: Tensor = torch.ops.shardwise.keyed_draw(*arguments).view(held.shape)
    return drawn


def fast_draw(
    shape: Sequence[int],
    state: Tensor,
    distribution: str,
    parameters: Sequence[float],
    dtype: torch.dtype,
    seeds: Sequence[int],
    *,
    each: bool,
    device: torch.device,
) -> Tensor:
    """As `keyed_draw`, from torch's generator; seeds, each: as of `fast_keep`."""
    arguments = (state, math.prod(shape), distribution, list(parameters), dtype, list(seeds), each, device)
    drawn: Tensor = torch.ops.shardwise.fast_draw(*arguments).view(tuple(shape))
    return drawn


# ---- random bits -------------------------------------------------------------------------------------------------------------------

_WEYL, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64 (Steele, Lea and Flood, 2014)


def _signed(number: int) -> int:
    """The int64 with the same 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


def _mixed(*numbers: int) -> int:
    """64 bits that depend on all of the numbers."""
    state = 0
    for number in numbers:
        state = (state + _WEYL ^ number) % 2**64
        state = (state ^ state >> 30) * _FIRST % 2**64
        state = (state ^ state >> 27) * _SECOND % 2**64
        state ^= state >> 31
    return state


def _bits(rows: Tensor, columns: Tensor, salt: int) -> Tensor:
    """64 random bits for each sum of a row's and a column's number: steps of splitmix64, the second of them salted."""
    x = rows[:, None] + columns[None]
    shifted = torch.bitwise_right_shift(x, 32)
    x.bitwise_xor_(shifted).mul_(_signed(_FIRST)).add_(salt)
    x.bitwise_xor_(torch.bitwise_right_shift(x, 29, out=shifted)).mul_(_signed(_SECOND))
    return x.bitwise_xor_(torch.bitwise_right_shift(x, 32, out=shifted).bitwise_and_(0xFFFFFFFF))


@dataclass(frozen=True, kw_only=True)
class _Stream:
    """The random words of one operator in one step; `per_row` of them to a row of the whole tensor."""

    step: int
    key: int
    per_row: int

    def words(self, rows: Tensor, columns: Tensor, number: int = 0) -> Tensor:
        """Those at places (row, column), [rows, columns]; other numbers give other words."""
        start, salt = (_signed(_mixed(self.step, self.key, 2 * number + each)) for each in range(2))
        return _bits(rows * _signed(self.per_row * _WEYL), columns * _signed(_WEYL) + start, salt)


def _pieces(rows: Tensor, columns: Tensor) -> Iterator[tuple[slice, slice]]:
    """A matrix in pieces that fit the cache; on other devices than the cpu, whole."""
    height, width = rows.numel(), columns.numel()
    most = _WORDS * torch.get_num_threads() if rows.device.type == "cpu" else max(height * width, 1)
    wide = min(max(width, 1), most)
    high = max(1, most // wide)
    for top in range(0, height, high):
        for left in range(0, width, wide):
            yield slice(top, top + high), slice(left, left + wide)


# ---- keyed -------------------------------------------------------------------------------------------------------------------------


@torch.library.impl(_LIBRARY, "keyed_keep", "CompositeExplicitAutograd")
def _keyed_keep(rows: Tensor, columns: Tensor, state: Tensor, width: int, runs: bool, under: int, key: int) -> Tensor:
    stream = _Stream(step=int(state[0]), key=key, per_row=-(-width // _LANES))
    keep = torch.empty(rows.numel(), columns.numel(), dtype=torch.bool, device=rows.device)
    words = columns[::_LANES] // _LANES if runs else columns // _LANES
    for down, across in _pieces(rows, words):
        bits = stream.words(rows[down], words[across])
        if runs:
            places = slice(across.start * _LANES, min(across.stop * _LANES, columns.numel()))
            lanes = bits.view(torch.int16)[:, : places.stop - places.start]
        else:
            places = across
            lanes = (bits >> (columns[across] % _LANES * 16)).to(torch.int16)
        torch.ge(lanes, under - _LEVELS // 2, out=keep[down, places])
    return keep


@torch.library.impl(_LIBRARY, "keyed_draw", "CompositeExplicitAutograd")
def _keyed_draw(
    rows: Tensor, columns: Tensor, state: Tensor, width: int, distribution: str, parameters: Sequence[float], dtype: torch.dtype, key: int
) -> Tensor:
    stream = _Stream(step=int(state[0]), key=key, per_row=width)
    drawn = torch.empty(rows.numel(), columns.numel(), dtype=dtype, device=rows.device)
    for down, across in _pieces(rows, columns):

        def bits(number: int, down: slice = down, across: slice = across) -> Tensor:
            return stream.words(rows[down], columns[across], number)

        drawn[down, across] = _numbers(bits, distribution, parameters, dtype)
    return drawn


def _numbers(bits: Callable[[int], Tensor], distribution: str, parameters: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Numbers made of random words; `bits` gives as many of these as are asked for."""
    first, second = (*parameters, 0.0)[:2]
    if distribution == "integers":
        return _integers(bits(0), int(first), int(second)).to(dtype)
    if distribution == "bernoulli":
        return (_upper(bits(0), 31) < round(first * 2**31)).to(dtype) * second
    if distribution == "uniform":
        return _uniform(bits(0), dtype) * (second - first) + first
    if distribution in ("normal", "log_normal"):
        value = _normal(bits) * second + first
        return (value if distribution == "normal" else value.exp()).to(dtype)
    above_zero = 1.0 - _uniform(bits(0), torch.float64)
    if distribution == "exponential":
        return (-torch.log(above_zero) / first).to(dtype).clamp_min(torch.finfo(dtype).tiny)
    if distribution == "geometric":
        return torch.ceil(torch.log(above_zero) / math.log1p(-first)).clamp_min(1.0).to(dtype)
    assert distribution == "cauchy", distribution
    return (first + second * torch.tan(math.pi * (above_zero - 0.5))).to(dtype)


def _upper(bits: Tensor, count: int) -> Tensor:
    """The upper bits of each word, as a number that is not negative."""
    return (bits >> (64 - count)) & (2**count - 1)


def _integers(bits: Tensor, low: int, high: int) -> Tensor:
    count = high - low
    return low + ((_upper(bits, 31) * count) >> 31 if count <= 2**31 else _upper(bits, 62) % count)


def _uniform(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in [0, 1) with as many random bits as `dtype` has digits: in a smaller type those of float64, cut off."""
    digits = min(1 - round(math.log2(torch.finfo(dtype).eps)), 53)
    exact = torch.float64 if digits > 24 else torch.float32
    return (_upper(bits, digits).to(exact) * 2.0**-digits).to(dtype)


def _normal(bits: Callable[[int], Tensor]) -> Tensor:
    """Standard normal numbers in float64 (Box and Muller, 1958)."""
    radius = torch.sqrt(-2.0 * torch.log(1.0 - _uniform(bits(0), torch.float64)))
    return radius * torch.cos((2.0 * math.pi) * _uniform(bits(1), torch.float64))


# ---- fast --------------------------------------------------------------------------------------------------------------------------


def _generator(state: Tensor, seeds: Sequence[int], each: bool, device: torch.device) -> torch.Generator:
    step, microbatch = state.tolist()
    generator = torch.Generator(device)
    generator.manual_seed(_mixed(step, *seeds, *([microbatch] if each else [])))
    return generator


@torch.library.impl(_LIBRARY, "fast_keep", "CompositeExplicitAutograd")
def _fast_keep(state: Tensor, count: int, under: int, seeds: Sequence[int], each: bool, device: torch.device) -> Tensor:
    words = torch.empty(-(-count // _LANES), dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=_generator(state, seeds, each, device))
    return words.view(torch.int16)[:count] >= under - _LEVELS // 2


@torch.library.impl(_LIBRARY, "fast_draw", "CompositeExplicitAutograd")
def _fast_draw(
    state: Tensor,
    count: int,
    distribution: str,
    parameters: Sequence[float],
    dtype: torch.dtype,
    seeds: Sequence[int],
    each: bool,
    device: torch.device,
) -> Tensor:
    drawn, generator = torch.empty(count, dtype=dtype, device=device), _generator(state, seeds, each, device)
    first, second = (*parameters, 0.0)[:2]
    if distribution == "integers":
        return drawn.random_(int(first), int(second), generator=generator)
    if distribution == "bernoulli":
        drawn.bernoulli_(first, generator=generator)
        return drawn if second == 1 else drawn.mul_(second)
    if distribution in ("exponential", "geometric"):
        return getattr(drawn, f"{distribution}_")(first, generator=generator)
    return getattr(drawn, f"{distribution}_")(first, second, generator=generator)


# ---- descriptions ------------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("shardwise::keyed_keep", lib=_LIBRARY)
def _described_keep(rows: Tensor, columns: Tensor, state: Tensor, width: int, runs: bool, under: int, key: int) -> Tensor:
    return rows.new_empty(rows.shape[0], columns.shape[0], dtype=torch.bool)


@torch.library.register_fake("shardwise::keyed_draw", lib=_LIBRARY)
def _described_draw(
    rows: Tensor, columns: Tensor, state: Tensor, width: int, distribution: str, parameters: Sequence[float], dtype: torch.dtype, key: int
) -> Tensor:
    return rows.new_empty(rows.shape[0], columns.shape[0], dtype=dtype)


@torch.library.register_fake("shardwise::fast_keep", lib=_LIBRARY)
def _described_fast_keep(state: Tensor, count: int, under: int, seeds: Sequence[int], each: bool, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=torch.bool, device=device)


@torch.library.register_fake("shardwise::fast_draw", lib=_LIBRARY)
def _described_fast_draw(
    state: Tensor,
    count: int,
    distribution: str,
    parameters: Sequence[float],
    dtype: torch.dtype,
    seeds: Sequence[int],
    each: bool,
    device: torch.device,
) -> Tensor:
    return torch.empty(count, dtype=dtype, device=device)
