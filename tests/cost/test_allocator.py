"""The allocator's bytes, by hand and against the bound that any allocator keeps."""

from __future__ import annotations

import random

from shardwise.cost.allocator import Block, CachingAllocator

MIB = 2**20


def test_a_loss_in_float32_takes_four_values_of_it_and_the_logits() -> None:
    """Logits; in float32; their logarithms, kept; the gradients of both: neither fits into what the logits leave."""
    allocator = CachingAllocator()
    logits = allocator.take(100 * MIB)
    wide = allocator.take(200 * MIB)
    kept = allocator.take(200 * MIB)
    allocator.give(wide)
    allocator.give(logits)
    first = allocator.take(200 * MIB)
    assert allocator.reserved_bytes == 500 * MIB, "it has taken the place of the logits in float32"
    second = allocator.take(200 * MIB)
    assert allocator.reserved_bytes == 700 * MIB
    for block in (first, kept):
        allocator.give(block)
    narrow = allocator.take(100 * MIB)
    assert allocator.reserved_bytes == 700 * MIB and narrow.size == 100 * MIB, "in the place of the logits"
    allocator.give(second)


def test_a_freed_block_serves_smaller_requests_and_is_whole_again_after_them() -> None:
    allocator = CachingAllocator()
    allocator.give(allocator.take(300 * MIB))
    parts = [allocator.take(100 * MIB) for _ in range(3)]
    assert allocator.reserved_bytes == 300 * MIB
    for part in (parts[1], parts[0], parts[2]):
        allocator.give(part)
    assert allocator.take(300 * MIB).size == 300 * MIB and allocator.reserved_bytes == 300 * MIB


def test_segments_are_as_large_as_torchs() -> None:
    """kSmallBuffer, kLargeBuffer and kRoundLarge of c10/cuda/CUDACachingAllocator.cpp."""
    for size, segment in ((1, 2), (MIB, 2), (MIB + 1, 20), (10 * MIB - 512, 20), (10 * MIB, 10), (11 * MIB, 12), (33 * MIB + 5, 34)):
        allocator = CachingAllocator()
        allocator.take(size)
        assert allocator.reserved_bytes == segment * MIB, size


def test_blocks_never_overlap_and_reuse_is_never_beyond_what_was_taken() -> None:
    """Random requests: what is held fits into what was reserved, free and held blocks fill it, and all freed leaves whole segments."""
    rng = random.Random(0)
    allocator = CachingAllocator()
    held: list[tuple[Block, int]] = []
    for _ in range(3000):
        if held and rng.random() < 0.5:
            allocator.give(held.pop(rng.randrange(len(held)))[0])
        else:
            size = int(10 ** rng.uniform(2, 8))
            held.append((allocator.take(size), size))
        assert all(block.size >= size and not block.free for block, size in held)
        free = sum(size for pool in allocator._free.values() for size, _, _ in pool)
        assert sum(block.size for block, _ in held) + free == allocator.reserved_bytes
    for block, _ in held:
        allocator.give(block)
    assert all(block.before is None and block.after is None for pool in allocator._free.values() for _, _, block in pool)
