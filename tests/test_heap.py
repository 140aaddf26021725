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
usual = [faults() for _ in range(4)]
kept = keep_freed_memory()
print(usual[-1], kept, [faults() for _ in range(4)][-1])
"""


def _run(**variables: str) -> list[str]:
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, "-c", _SCRIPT], check=True, capture_output=True, text=True, env=environment).stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    usual, kept, faults = _run()
    if kept != "True":
        pytest.skip("another C library than glibc")
    assert int(usual)  # what it is for: each round pays for its pages anew, however many the kernel maps at a fault
    assert int(faults) <= 0.1 * int(usual)


def test_the_users_own_settings_stay() -> None:
    assert _run(MALLOC_TRIM_THRESHOLD_="100000")[1] == "False"
    assert _run(GLIBC_TUNABLES="glibc.malloc.trim_threshold=100000")[1] == "False"
