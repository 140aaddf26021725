"""A rank that is asked to end (Ctrl-C, SIGTERM) notes it and goes on: its loop saves after the step that all ranks are in, and ends."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interrupts"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Within it `number` is that of the last signal that asked for the end, 0 before; heeded=False: signals do what they would have done.

    For the main thread.
    """

    def __init__(self, *, heeded: bool) -> None:
        self.number = 0
        self._signals = _SIGNALS if heeded else ()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        self._before = {each: signal.signal(each, self._note) for each in self._signals}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
