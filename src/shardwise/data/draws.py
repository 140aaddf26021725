"""Random numbers of data: what a sample draws (crops, flips, masks) follows from its own key, not from what was read before it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["key_of", "own_draws", "seed_draws"]

_MASK = 2**64 - 1


def key_of(*numbers: int) -> int:
    """One number of 63 bits that follows from all of them (constants: splitmix64)."""
    key = 0x9E3779B97F4A7C15
    for number in numbers:
        key = ((key ^ (number & _MASK)) * 0xBF58476D1CE4E5B9) & _MASK
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & _MASK
        key ^= key >> 31
    return key >> 1


@contextmanager
def own_draws() -> Iterator[None]:
    """Within it, torch, numpy and Python draw on the CPU as they are seeded there; behind it, as if nothing had been drawn."""
    held = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(held[0])
        np.random.set_state(held[1])
        random.setstate(held[2])


def seed_draws(key: int) -> None:
    """Of torch, numpy and Python."""
    torch.default_generator.manual_seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    random.seed(key)
