"""All ranks of a small mesh as threads of this process: what an operator's local code says to other ranks goes over the product's own.

Tensors as each rank holds them: `shardwise.sharding.dealing`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from shardwise.runtime import in_process

Result = TypeVar("Result")


def run_ranks(count: int, function: Callable[[int], Result]) -> list[Result]:
    """`function(rank)` on `count` threads that may communicate; the first error of any is raised."""
    return in_process.run_ranks(count, lambda rank, _: function(rank))
