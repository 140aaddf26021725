"""What one rank of a machine can do while all of its ranks are busy: figures, and how to read between them.

Measured by `shardwise.cluster.probe` or described in a cluster file (`shardwise.cluster.model`). How an operator's time is
composed of these figures is the business of `shardwise.cost`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from typing import Final

from pydantic import BaseModel, ConfigDict, model_validator

__all__ = ["DISTURBED", "IMPLEMENTATIONS", "KERNEL_WORKING_SET_BYTES", "CollectiveRate", "Curve", "MatmulRate", "OptimizerRate", "Rates"]

IMPLEMENTATIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "all_reduce": ("native", "exchange"),
    "all_gather": ("native", "exchange", "all_reduce"),
    "reduce_scatter": ("native", "exchange", "all_reduce"),
    "all_to_all": ("native", "exchange"),
    "broadcast": ("native",),
    "send_recv": ("native",),
    "shift": ("native",),
}
"""Kinds of communication and the implementations of each (`shardwise.runtime.collectives`)."""

DISTURBED: Final = 1.2
"""`Rates.contention` above this says that other processes disturbed the measuring."""

KERNEL_WORKING_SET_BYTES: Final = 3 << 18
"""Bytes that a kernel of `Rates.element_s` has before it: three tensors of 256 KiB, which a core's own cache holds."""


class _Figures(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")  # JSON has no infinity of its own


class Curve(_Figures):
    """A positive quantity measured at a few increasing sizes; straight between them on doubly logarithmic paper, constant outside."""

    sizes: tuple[float, ...]
    values: tuple[float, ...]

    @model_validator(mode="after")
    def _valid(self) -> Curve:
        increasing = all(a < b for a, b in zip(self.sizes, self.sizes[1:], strict=False))
        if not self.sizes or len(self.sizes) != len(self.values) or not increasing or min(*self.sizes, *self.values) <= 0:
            raise ValueError(f"a curve wants positive increasing sizes and as many positive values, not {self.sizes} and {self.values}")
        return self

    @classmethod
    def through(cls, points: Mapping[float, float]) -> Curve:
        """The curve through points, given as size: value in any order."""
        return cls(sizes=tuple(sorted(points)), values=tuple(points[size] for size in sorted(points)))

    @classmethod
    def constant(cls, value: float) -> Curve:
        """The same value for every size."""
        return cls(sizes=(1.0,), values=(value,))

    def times(self, factor: float) -> Curve:
        """Another curve, so many times as high."""
        return Curve(sizes=self.sizes, values=tuple(factor * value for value in self.values))

    def at(self, size: float) -> float:
        """The value at ``size``."""
        sizes, values = self.sizes, self.values
        if size <= sizes[0]:
            return values[0]
        if size >= sizes[-1]:
            return values[-1]
        right = bisect_right(sizes, size)
        part = math.log(size / sizes[right - 1]) / math.log(sizes[right] / sizes[right - 1])
        return values[right - 1] * math.pow(values[right] / values[right - 1], part)


class MatmulRate(_Figures):
    """Rate of matrix products of one dtype.

    cubes_flops: flop/s of products m = n = k, by their flops (2·m·n·k).
    thinness: what a product keeps of that when its smallest of m, n, k is small, by that smallest (1 for cubes).
    batched_flops: flop/s of batched products, by the flops of one matrix of the batch.
    """

    cubes_flops: Curve
    thinness: Curve
    batched_flops: Curve

    def flops_per_s(self, m: int, n: int, k: int) -> float:
        """Rate, flop/s, of an (m, k) by (k, n) product."""
        return self.cubes_flops.at(2.0 * m * n * k) * self.thinness.at(min(m, n, k))

    def times_as_fast(self, speed: float) -> MatmulRate:
        """That of a rank that computes so many times as fast."""
        faster = {"cubes_flops": self.cubes_flops.times(speed), "batched_flops": self.batched_flops.times(speed)}
        return self.model_copy(update=faster)

    def batched_flops_per_s(self, m: int, n: int, k: int) -> float:
        """Rate, flop/s, of a batch of (m, k) by (k, n) products."""
        return self.batched_flops.at(2.0 * m * n * k)


class CollectiveRate(_Figures):
    """Seconds of one implementation of one kind of communication within groups of ``ranks``, all groups of that size busy at once.

    message_bytes: the largest tensor that a rank holds before or after (`shardwise.cost.collectives` spells it out).
    seconds: of each size, what it adds to computing before it; straight lines between, the last line continued beyond. busy_s: likewise, of
    a core's time that a rank takes meanwhile, for its copies and its part of the transport, and of a shift for what slows the computing
    beside it; empty where that is not known, or done by other hardware.
    """

    kind: str
    impl: str
    ranks: int
    message_bytes: tuple[float, ...]
    seconds: tuple[float, ...]
    busy_s: tuple[float, ...] = ()

    @property
    def latency_s(self) -> float:
        """Time of the smallest message, s."""
        return self.seconds[0]

    @property
    def bytes_per_s(self) -> float:
        """Slope between the two largest messages, byte/s: what each further byte costs."""
        return (self.message_bytes[-1] - self.message_bytes[-2]) / max(self.seconds[-1] - self.seconds[-2], 1e-12)

    def seconds_for(self, message_bytes: float) -> float:
        """Time of a message, s."""
        return self._read(self.seconds, message_bytes)

    def busy_for(self, message_bytes: float) -> float:
        """Time of a core that a rank takes for a message, s."""
        return self._read(self.busy_s, message_bytes) if self.busy_s else 0.0

    def _read(self, seconds: tuple[float, ...], message_bytes: float) -> float:
        sizes = self.message_bytes
        if message_bytes <= sizes[0]:
            return seconds[0]
        right = min(bisect_right(sizes, message_bytes), len(sizes) - 1)
        part = (message_bytes - sizes[right - 1]) / (sizes[right] - sizes[right - 1])
        return seconds[right - 1] + part * max(seconds[right] - seconds[right - 1], 0.0)

    @model_validator(mode="after")
    def _valid(self) -> CollectiveRate:
        if self.kind not in IMPLEMENTATIONS or self.impl not in IMPLEMENTATIONS[self.kind]:
            raise ValueError(f"no implementation {self.impl!r} of {self.kind!r}; there are {dict(IMPLEMENTATIONS)}")
        increasing = all(a < b for a, b in zip(self.message_bytes, self.message_bytes[1:], strict=False))
        if len(self.message_bytes) < 2 or len(self.message_bytes) != len(self.seconds) or not increasing:
            raise ValueError(f"{self.kind} ({self.impl}): two or more increasing sizes and as many times, not {self.message_bytes}")
        if self.busy_s and len(self.busy_s) != len(self.seconds):
            raise ValueError(f"{self.kind} ({self.impl}): {len(self.seconds)} times, but {len(self.busy_s)} times of a core")
        return self


class OptimizerRate(_Figures):
    """One step of an optimizer over one parameter: ``fixed_s`` + elements × ``element_s`` (by the parameter's bytes)."""

    fixed_s: float
    element_s: Curve

    def times_as_fast(self, speed: float) -> OptimizerRate:
        """That of a rank that computes so many times as fast."""
        return OptimizerRate(fixed_s=self.fixed_s / speed, element_s=self.element_s.times(1 / speed))


class Rates(_Figures):
    """All figures of one rank. Keys of ``dtype`` are torch's names without the ``torch.``; float32 is always there.

    matmul: by dtype.
    attention_flops: flop/s of fused attention by number of keys; keys ``forward``, ``backward``, each also with ``_causal`` (then the
        flops counted are those of the whole square, of which about half is computed).
    attention_ragged: what is left of these rates when the number of keys is no multiple of 16.
    product_ragged: (number, what is left of a product's rate when one of its dims is no multiple of it), the largest number first.
    convolution_flops: flop/s by the smaller of output channels a group and (input channels a group × kernel size); keys ``forward``,
        ``backward_input``, ``backward_weight``, each also with ``_transposed``.
    read_bytes_per_s, write_bytes_per_s: of streaming kernels, by working set in bytes, none of it in a core's own cache; a read costs
        1/read, a write to another tensor than those read 1/write more.
    cached_bytes_per_s: the same two in cache, where `element_s` is measured; None: as the curves say.
    fresh_bytes_per_s, fresh_from_bytes: results of at least ``fresh_from_bytes`` are mapped anew by the allocator at every call, and
        their pages zeroed by the kernel at this rate.
    element_s: for each dtype, seconds per element of a kernel whose data, of
        KERNEL_WORKING_SET_BYTES, is in cache (`shardwise.cluster.probe_kernels` has the names).
    call_s, view_s: one ATen call's fixed time, and that of a view, after other work.
    collectives: each (kind, implementation, group size) measured.
    optimizers: by ``adamw``, ``adam``, ``sgd``, ``sgd_momentum``.
    overlaps_memory: whether arithmetic and memory traffic of an operator overlap. fuses: whether chains of elementwise operators run as
        one kernel (`shardwise.cost.fusion`). copies_inner: whether what is gathered or scattered along another dim than the first is
        copied into place (measured figures have that in them).
    groups: whether all products of a layer's experts run as one kernel.
    cast_bytes: what kernels of their own read and write to cast and pad one number that goes into products with experts.
    contention: wall time ÷ CPU time while measuring; well above 1 when other processes disturbed it.
    """

    matmul: Mapping[str, MatmulRate]
    attention_flops: Mapping[str, Curve]
    attention_ragged: float = 1.0
    product_ragged: tuple[tuple[int, float], ...] = ()
    convolution_flops: Mapping[str, Curve]
    read_bytes_per_s: Curve
    write_bytes_per_s: Curve
    cached_bytes_per_s: tuple[float, float] | None = None
    fresh_bytes_per_s: float
    fresh_from_bytes: float
    element_s: Mapping[str, Mapping[str, float]]
    call_s: float
    view_s: float
    collectives: tuple[CollectiveRate, ...]
    optimizers: Mapping[str, OptimizerRate]
    contention: float = 1.0
    overlaps_memory: bool = False
    fuses: bool = False
    copies_inner: bool = False
    groups: bool = False
    cast_bytes: float = 0.0

    @property
    def disturbed(self) -> bool:
        """Whether other processes had so much of the machine while it was measured that times predicted from this may be far off."""
        return self.contention > DISTURBED

    def matmul_of(self, dtype: str) -> MatmulRate:
        """The rate of a dtype; float32's for one that was not measured."""
        return self.matmul.get(dtype) or self.matmul["float32"]

    def times_as_fast(self, speed: float) -> Rates:
        """Those of a rank that computes so many times as fast; links stay."""
        cached = self.cached_bytes_per_s
        faster = {
            "matmul": {dtype: rate.times_as_fast(speed) for dtype, rate in self.matmul.items()},
            "attention_flops": {name: curve.times(speed) for name, curve in self.attention_flops.items()},
            "convolution_flops": {name: curve.times(speed) for name, curve in self.convolution_flops.items()},
            "read_bytes_per_s": self.read_bytes_per_s.times(speed),
            "write_bytes_per_s": self.write_bytes_per_s.times(speed),
            "cached_bytes_per_s": None if cached is None else (cached[0] * speed, cached[1] * speed),
            "fresh_bytes_per_s": self.fresh_bytes_per_s * speed,
            "element_s": {dtype: {name: each / speed for name, each in found.items()} for dtype, found in self.element_s.items()},
            "call_s": self.call_s / speed,
            "view_s": self.view_s / speed,
            "optimizers": {name: rate.times_as_fast(speed) for name, rate in self.optimizers.items()},
        }
        return self.model_copy(update=faster)

    def kernel_s(self, kernel: str, dtype: str) -> float:
        """Seconds per element of a kernel; float32's for a dtype that was not measured, 0 for a kernel that was not."""
        seconds = self.element_s.get(dtype, {}).get(kernel)
        return self.element_s.get("float32", {}).get(kernel, 0.0) if seconds is None else seconds
