import os
import subprocess
import sys

import pytest

_SCRIPT = """
import resource
import torch
from shardwise.heap import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(4 << 20) for _ in range(4)]
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
print(keep_freed_memory(), [faults() for _ in range(4)][-1])
"""
_FRESH = """
import torch
from shardwise.cluster.probe_compute import fresh_bytes_per_s
from shardwise.cluster.timing import Stopwatch
from shardwise.heap import keep_freed_memory

torch.set_num_threads(1)
keep_freed_memory()
before = fresh_bytes_per_s(Stopwatch(budget_s=0.3))
tensors = [torch.ones(7 << 20) for _ in range(16)]
del tensors
print(before, fresh_bytes_per_s(Stopwatch(budget_s=0.3)))
"""
_BLOCKS = """
import ctypes
import torch
from shardwise.heap import keep_freed_memory

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

library = ctypes.CDLL(None)
library.mallinfo2.restype = Heap
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
keep_freed_memory()
sizes = [size - 8 for size in range(32, 129, 16)] * 4000
before = library.mallinfo2()
for size in sizes:
    library.malloc(size)
after = library.mallinfo2()
print(after.arena - before.arena, before.keepcost - after.keepcost)
"""
_BUCKETS = """
import ctypes
import sys
import torch
from shardwise.heap import join_freed_memory, keep_freed_memory

library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
print(keep_freed_memory())
lasts = [torch.ones(1 << 18)]
for _ in range(8):
    bucket = torch.empty(5 << 20)
    if "joined" in sys.argv:
        join_freed_memory()
    for size in range(32, 129, 16):
        library.malloc(size - 8)
    print(bucket.data_ptr())
    del bucket
"""
_PAGES = 4 * (16 << 20) // os.sysconf("SC_PAGE_SIZE")


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")


def _run(script: str = _SCRIPT, *arguments: str, **variables: str) -> list[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], check=True, capture_output=True, text=True, env=environment
    ).stdout.split()


@on_linux
def test_freed_memory_is_used_again_without_page_faults() -> None:
    kept, faults = _run()
    if kept != "True":
        pytest.skip("another C library than glibc")
    assert int(faults) <= 0.02 * _PAGES, "without it some kernels map one page at a fault, others four"


def test_the_users_own_settings_stay() -> None:
    assert _run(MALLOC_TRIM_THRESHOLD_="100000")[0] == "False"
    assert _run(GLIBC_TUNABLES="glibc.malloc.trim_threshold=100000")[0] == "False"
    assert _run(GLIBC_TUNABLES="glibc.malloc.tcache_count=0")[0] == _run()[0], "this says nothing about the kernel's memory"


@on_linux
def test_new_pages_are_measured_whatever_the_heap_has_free() -> None:
    before, after = map(float, _run(_FRESH))
    assert before / 5 < after < before * 5, "a result in the heap's free end takes no new page: over 50 times the rate"


@on_linux
def test_small_blocks_are_set_aside() -> None:
    """What lasts is put there, and neither into the heap's free end, where tensors will be, nor beyond it."""
    if _run()[0] != "True":
        pytest.skip("another C library than glibc")
    grown, taken = map(int, _run(_BLOCKS))
    assert grown == 0 and taken == 0


@on_linux
def test_what_a_message_needs_does_not_keep_buckets_apart() -> None:
    """Small blocks that last are made right after each bucket, which is freed then: the next one finds its place again."""
    kept, *places = _run(_BUCKETS, "joined")
    if kept != "True":
        pytest.skip("another C library than glibc")
    assert len(set(places)) <= 2
    assert len(set(_run(_BUCKETS)[1:])) > 4, "without it hardly any does"
