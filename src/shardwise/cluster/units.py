"""Which figures of a machine can be true, and which slip of units explains one that cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["QUANTITIES", "Quantity", "plausible"]


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """low, high: no machine of 2026 is outside. unit: what the figures are in. slips: units written by mistake, likeliest first, and
    how many of ``unit`` one of them is."""

    low: float
    high: float
    unit: str
    slips: tuple[tuple[str, float], ...] = ()

    def objection(self, value: float) -> str:
        """Why ``value`` cannot be, with the probable slip of units; empty where it can."""
        if self.low <= value <= self.high:
            return ""
        bound = f"at least {self.low:g}" if value < self.low else f"at most {self.high:g}"
        return f"it has to be {bound} {self.unit}{self._slip(value)}"

    def _slip(self, value: float) -> str:
        for unit, factor in self.slips:
            if self.low <= value * factor <= self.high:
                return f"; did you write {unit}? That would be {value * factor:g}"
        return ""


_BYTES = (("GB for bytes", 1e9), ("MB for bytes", 1e6), ("TB for bytes", 1e12), ("bytes for GB, and scale them", 1e-9))
_RATES = (("GB/s for bytes/s", 1e9), ("TB/s for bytes/s", 1e12), ("MB/s for bytes/s", 1e6), ("bytes/s for GB/s, and scale them", 1e-9))
_FLOPS = (("Tflop/s for flop/s", 1e12), ("Pflop/s for flop/s", 1e15), ("flop/s for Tflop/s, and scale them", 1e-12))

QUANTITIES: Final[dict[str, Quantity]] = {
    "memory_bytes": Quantity(low=1e8, high=2e12, unit="bytes", slips=_BYTES),
    "memory_bytes_per_s": Quantity(low=1e9, high=20e12, unit="bytes/s", slips=_RATES),
    "peak_flops": Quantity(low=1e9, high=20e15, unit="flop/s", slips=_FLOPS),
    "link_bytes_per_s": Quantity(low=1e6, high=2e12, unit="bytes/s", slips=(*_RATES[:3], ("bits/s for bytes/s", 1 / 8), _RATES[3])),
    "latency_s": Quantity(low=1e-9, high=0.1, unit="s", slips=(("µs for s", 1e-6), ("ns for s", 1e-9))),
    "power_w": Quantity(low=1, high=20e3, unit="W", slips=(("kW for W", 1e3), ("mW for W", 1e-3))),
    "price_per_hour": Quantity(low=1e-3, high=1e3, unit="dollars an hour"),
}


def plausible(quantity: str) -> Callable[[Any], Any]:
    """A check for pydantic, before it converts: the value as it is, or ValueError where it is a number that cannot be."""

    def check(value: Any) -> Any:
        wrong = QUANTITIES[quantity].objection(value) if isinstance(value, int | float) else ""
        if wrong:
            raise ValueError(wrong)
        return value

    return check
