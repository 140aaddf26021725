"""Memory that one step frees is there for the next one, without asking the kernel for it again.

glibc gives the free end of the heap back to the kernel when it is long, and takes large blocks from the kernel one by one; what comes from
the kernel anew is zeroed page by page when it is first written. A step that allocates what the step before freed pays for that every time.
"""

from __future__ import annotations

import ctypes
import sys

from shardwise.environment import tunes_malloc

__all__ = ["MAPPED_FROM_BYTES", "keep_freed_memory"]

MAPPED_FROM_BYTES = 32 << 20  # glibc's DEFAULT_MMAP_THRESHOLD_MAX on 64 bits; larger blocks leave no holes in the heap
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h, as the man page mallopt(3) names them
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Has this process keep the heap that it frees, and have blocks of less than 32 MiB in it; whether that was done.

    Not where the C library is another than glibc, nor where the user's environment tunes its malloc.
    """
    if sys.platform != "linux" or tunes_malloc():
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    settings = {_M_MMAP_THRESHOLD: MAPPED_FROM_BYTES, _M_TRIM_THRESHOLD: _NEVER}
    return all(library.mallopt(name, value) for name, value in settings.items())
