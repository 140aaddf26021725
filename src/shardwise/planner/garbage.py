"""How often Python looks for garbage while planning."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["young_garbage_alone"]

_YOUNG, _NEVER = 50_000, 1 << 30  # objects made until the young are looked through; such passes until the older are, too


@contextmanager
def young_garbage_alone() -> Iterator[None]:
    """Planning makes millions of small objects that live until it ends: looking through them again and again takes a fifth of its time.
    Each is looked at once, for what traces leave behind must go: every further one takes the longer for it."""
    thresholds = gc.get_threshold()
    if thresholds[0]:
        gc.set_threshold(_YOUNG, _NEVER, _NEVER)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
