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
_PAGES = 4 * (16 << 20) // os.sysconf("SC_PAGE_SIZE")


def _run(**variables: str) -> list[str]:
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, "-c", _SCRIPT], check=True, capture_output=True, text=True, env=environment).stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    kept, faults = _run()
    if kept != "True":
        pytest.skip("another C library than glibc")
    assert int(faults) <= 0.02 * _PAGES, "without it some kernels map one page at a fault, others four"


def test_the_users_own_settings_stay() -> None:
    assert _run(MALLOC_TRIM_THRESHOLD_="100000")[0] == "False"
    assert _run(GLIBC_TUNABLES="glibc.malloc.trim_threshold=100000")[0] == "False"
