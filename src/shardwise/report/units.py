"""Quantities as people read them: SI units, three digits."""

from __future__ import annotations

__all__ = ["bytes_text", "count_text", "error_text", "rate_text", "seconds_text", "time_unit"]

_SPACE = "\u00a0"  # a number and its unit stay on one line


def seconds_text(seconds: float) -> str:
    """`1.24 s`, `99.3 ms`, `640 µs`."""
    scale, unit = time_unit(seconds)
    return f"{_digits(seconds * scale)}{_SPACE}{unit}"


def time_unit(seconds: float) -> tuple[float, str]:
    """What to multiply seconds of this size with, and the unit's name."""
    if seconds >= 1:
        return 1.0, "s"
    return (1e3, "ms") if seconds >= 1e-3 or seconds == 0 else (1e6, "µs")


def bytes_text(count: float) -> str:
    """`1.71 MB`: powers of 1000."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def count_text(count: float) -> str:
    """`857 k`, `10.1 M`, `405 B` (10⁹)."""
    return _scaled(count, ("", "k", "M", "B", "T")).strip()


def rate_text(per_second: float, what: str) -> str:
    """`829 samples/s`, `1,430 samples/s`, `0.52 samples/s`."""
    return f"{per_second:,.0f} {what}/s" if per_second >= 100 else f"{per_second:.3g} {what}/s"


def error_text(predicted: float, measured: float) -> str:
    """How far the prediction is off: `+4.1 %` where more was predicted than measured."""
    return f"{(predicted / measured - 1) * 100:+.1f}{_SPACE}%".replace("-", "−") if measured else "—"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    return f"{_digits(value)}{_SPACE}{units[power]}"


def _digits(value: float) -> str:
    """Three digits that matter, no exponent, no zeros at the end of a fraction that was not there."""
    if value == int(value) or abs(value) >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"
