"""Memory that one step frees is there for the next one, without asking the kernel for it again.

glibc gives the free end of the heap back to the kernel when it is long, and takes large blocks from the kernel one by one; what comes from
the kernel anew is zeroed page by page when it is first written. A step that allocates what the step before freed pays for that every time.

And a step's tensors find the holes that those before have left. torch has tensors aligned, so glibc takes up to 96 bytes more for each and
gives back what was before and after it: a hole is wide enough for the next tensor of that size if these pieces are free again, too. What
the first step makes to last (oneDNN's kernels) would be put into them and keep tensors apart for good: small blocks are set aside for it.

But what is made next takes the pieces first: they wait in the thread's cache of freed blocks (tcache). The description of a tensor's
storage has just the size of the most usual piece, and it lasts as long as its tensor, whose data need not be near. Beside a bucket of
gradients it is what the bucket's message needs, freed by a thread of the transport, in whose cache it stays: then the next step's bucket
needs new memory. So blocks that were set aside are put into the cache before a large value is made, and once a bucket is.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

from shardwise.environment import tunes_malloc

__all__ = ["MAPPED_FROM_BYTES", "join_freed_memory", "keep_freed_memory", "small_blocks_are_set_aside"]

MAPPED_FROM_BYTES = 32 << 20  # glibc's DEFAULT_MMAP_THRESHOLD_MAX on 64 bits; larger blocks leave no holes in the heap
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h, as the man page mallopt(3) names them
_NEVER = 2**31 - 1
_PIECES = range(32, 129, 16)  # bytes in the heap of what is left beside a tensor, and of most blocks that last
_USUAL = (48, 64, 112)  # beside tensors of whole cache lines
_SET_ASIDE = 4096  # of each; a kernel of GELU has about 110 blocks
_SMALLEST = 24  # of 32 bytes in the heap 8 are glibc's
_CACHED = 7  # blocks of each size that a thread's cache holds: glibc's tcache_count
_JOINING = 2000  # bytes of a block for which glibc first joins all that is free and not in a thread's cache: over 1,024


def keep_freed_memory() -> bool:
    """Has this process keep the heap that it frees, and have blocks of less than 32 MiB in it; whether that was done.

    Not where the C library is another than glibc, nor where the user's environment tunes its malloc.
    """
    library = _glibc()
    if library is None:
        return False
    settings = {_M_MMAP_THRESHOLD: MAPPED_FROM_BYTES, _M_TRIM_THRESHOLD: _NEVER}
    kept = all(library.mallopt(name, value) for name, value in settings.items())
    _set_small_blocks_aside()
    return kept


def join_freed_memory(*, quickly: bool = False) -> None:
    """Has the pieces beside the tensors made last joined with what is free beside them as soon as glibc next takes a large block, not put
    to use: blocks set aside take their place in the cache of this thread. Does nothing where none were set aside.

    quickly: the most usual pieces alone, 20 instead of 50 microseconds.
    """
    if not small_blocks_are_set_aside():
        return
    library = _glibc()
    malloc, free = library.malloc, library.free
    free(malloc(_JOINING))
    for size in _USUAL if quickly else _PIECES:
        cached = [malloc(size - 8) for _ in range(_CACHED)]
        others = [malloc(size - 8) for _ in range(_CACHED)]
        for block in (*others, *cached):  # the first fill the cache
            free(block)


def small_blocks_are_set_aside() -> bool:
    """Whether `keep_freed_memory` did so in this process."""
    return _set_small_blocks_aside.cache_info().currsize > 0


@cache
def _glibc() -> Any:
    """None where the C library is another, or the user tunes its malloc."""
    if sys.platform != "linux" or tunes_malloc():
        return None
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return None
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    return library


@cache
def _set_small_blocks_aside() -> None:
    """Frees small blocks that glibc cannot join, as another in use lies after each: 4 MiB, once in a process."""
    library = _glibc()
    aside = []
    for size in _PIECES:
        for _ in range(_SET_ASIDE):
            aside.append(library.malloc(size - 8))
            library.malloc(_SMALLEST)
    for block in aside:
        library.free(block)
