"""torch's flight recorder keeps nothing of gloo's collectives: its records would lie between the blocks that a step frees."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch._C._distributed_c10d as c10d
import torch.distributed as dist

from shardwise.runtime.launch import launch

pytestmark = pytest.mark.distributed


def recorded() -> int:
    for _ in range(5):
        dist.all_reduce(torch.ones(3))
    found: dict[str, Any] = json.loads(c10d._dump_fr_trace_json())
    return len(found.get("entries", []))


@pytest.mark.parametrize(("size", "kept"), [(None, False), ("100", True)])
def test_collectives_are_recorded_only_where_the_user_asks_for_it(size: str | None, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_FR_BUFFER_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", size)
    assert [count > 0 for count in launch(recorded, ranks=2, threads=1)] == [kept, kept]
