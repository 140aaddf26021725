"""How much of a device torch's caching allocator takes, request by request (c10/cuda/CUDACachingAllocator.cpp).

    request ──▶ the smallest free block that holds it, the rest of which is a free block again
            ──▶ else a new segment of the device's memory: 2 MiB for requests of up to 1 MiB, 20 MiB for less than 10, else multiples of 2
    freed   ──▶ a free block, one with its free neighbours of the segment; no segment is given back

So a value that is freed makes room for smaller ones, but not for a larger one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

__all__ = ["Block", "CachingAllocator"]

_MIB = 2**20
_LEAST = 512  # bytes: kMinBlockSize
_SMALL = _MIB  # kSmallSize: the largest request of the small pool; and the least rest of a large block that is a block
_SMALL_SEGMENT, _LARGE_SEGMENT, _LARGE, _STEP = 2 * _MIB, 20 * _MIB, 10 * _MIB, 2 * _MIB  # kSmallBuffer, kLargeBuffer, kMinLargeAlloc, …


@dataclass(eq=False, kw_only=True)
class Block:
    """A part of a segment between its neighbours there."""

    size: int
    small: bool
    free: bool = False
    before: Block | None = None
    after: Block | None = None


@dataclass(kw_only=True)
class CachingAllocator:
    """reserved_bytes: taken from the device so far."""

    reserved_bytes: int = 0
    _free: dict[bool, list[tuple[int, int, Block]]] = field(default_factory=lambda: {True: [], False: []})

    def take(self, size: int) -> Block:
        """A block that holds `size` bytes."""
        size = max(_LEAST, -(-size // _LEAST) * _LEAST)
        small = size <= _SMALL
        pool = self._free[small]
        place = bisect_left(pool, size, key=lambda each: each[0])
        block = pool.pop(place)[2] if place < len(pool) else self._segment(size, small)
        block.free = False
        rest = block.size - size
        if rest >= (_LEAST if small else _SMALL + 1):
            block.size = size
            block.after = Block(size=rest, small=small, before=block, after=block.after)
            if block.after.after:
                block.after.after.before = block.after
            self._keep(block.after)
        return block

    def give(self, block: Block) -> None:
        """Frees a block."""
        for other in (block.before, block.after):
            if other is not None and other.free:
                pool = self._free[block.small]
                pool.pop(bisect_left(pool, (other.size, id(other)), key=lambda each: each[:2]))
                first, last = (other, block) if other is block.before else (block, other)
                block.size += other.size
                block.before, block.after = first.before, last.after
                if block.before:
                    block.before.after = block
                if block.after:
                    block.after.before = block
        self._keep(block)

    def _segment(self, size: int, small: bool) -> Block:
        taken = _SMALL_SEGMENT if small else _LARGE_SEGMENT if size < _LARGE else -(-size // _STEP) * _STEP
        self.reserved_bytes += taken
        return Block(size=taken, small=small)

    def _keep(self, block: Block) -> None:
        block.free = True
        insort(self._free[block.small], (block.size, id(block), block), key=lambda each: each[:2])
