"""How much memory glibc's heap takes on a CPU, request by request (malloc/malloc.c: best fit, blocks joined with their free neighbours).

    request ──▶ the smallest hole that has 112 bytes more: of these the block keeps 16, the others are what aligning it to 64 bytes may need
            ──▶ else, if it has 32 MiB or more and the heap's free end has less, memory mapped for it alone, which is given back with it
            ──▶ else the heap's end grows
    freed   ──▶ a hole, one with the holes on its sides, or the heap's free end, which stays (`shardwise.heap` sets that, and the 32 MiB)

So a value that is freed makes room for the next of its size only where nothing smaller has taken a part of it since.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from shardwise.cost.memory import Request
from shardwise.heap import MAPPED_FROM_BYTES

__all__ = ["Heap", "Span"]

_ALIGNING, _KEPT = 112, 16  # bytes beside a request: needed, and kept of them
_LEAST = 32  # of a hole: MINSIZE


class Span(NamedTuple):
    """A block's place in the heap; start -1 where it is mapped alone."""

    start: int
    size: int


@dataclass(kw_only=True)
class Heap:
    """peak_bytes: the most that the heap and what is mapped beside it have been."""

    peak_bytes: int = 0
    _end: int = 0
    _furthest: int = 0
    _mapped: int = 0
    _holes: list[tuple[int, int]] = field(default_factory=list)  # (size, start), ascending
    _starts: dict[int, int] = field(default_factory=dict)  # of holes: start → end
    _ends: dict[int, int] = field(default_factory=dict)  # end → start

    def take(self, size: int) -> Span:
        """A block that holds `size` bytes."""
        place = bisect_left(self._holes, (size + _ALIGNING, -1))
        if place < len(self._holes):
            span = self._within(*self._holes[place], size + _KEPT)
        elif size >= MAPPED_FROM_BYTES and self._furthest - self._end < size + _ALIGNING:
            self._mapped += size
            span = Span(-1, size)
        else:
            span = Span(self._end, size + _KEPT)
            self._end += span.size
            self._furthest = max(self._furthest, self._end)
        self.peak_bytes = max(self.peak_bytes, self._furthest + self._mapped)
        return span

    def give(self, span: Span) -> None:
        """Frees a block."""
        if span.start < 0:
            self._mapped -= span.size
            return
        start, end = span.start, span.start + span.size
        if start in self._ends:
            start = self._ends[start]
            self._fill(start)
        if end in self._starts:
            end = self._fill(end)
        if end == self._end:
            self._end = start
        else:
            self._open(start, end)

    def play(self, asked: Iterable[Request]) -> None:
        """All requests, one after the other; what is given back must have been taken in them."""
        spans: dict[Hashable, Span] = {}
        for who, nbytes in asked:
            if nbytes > 0:
                spans[who] = self.take(nbytes)
            else:
                self.give(spans.pop(who))

    def _within(self, size: int, start: int, wanted: int) -> Span:
        """The first part of a hole; the whole of it where the rest would be too small for a hole."""
        self._fill(start)
        if size - wanted < _LEAST:
            return Span(start, size)
        self._open(start + wanted, start + size)
        return Span(start, wanted)

    def _open(self, start: int, end: int) -> None:
        self._starts[start], self._ends[end] = end, start
        insort(self._holes, (end - start, start))

    def _fill(self, start: int) -> int:
        """Takes a hole out; where it ended."""
        end = self._starts.pop(start)
        del self._ends[end]
        self._holes.pop(bisect_left(self._holes, (end - start, start)))
        return end
