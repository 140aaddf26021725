"""Memory that a rank did not get: which errors say so, and what the user is told."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator

import psutil
import torch

from shardwise.capture.graph import Graph
from shardwise.errors import OutOfMemory
from shardwise.planner.plan import Plan
from shardwise.planner.smaller import memory_table, smaller_text
from shardwise.runtime.memory import give_back_freed_memory

__all__ = ["explained", "held_bytes", "wanted_bytes"]

_REFUSED = re.compile(r"can't allocate memory|cannot allocate memory|not enough memory|out of memory|std::bad_alloc", re.IGNORECASE)
_BYTES = re.compile(r"tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", re.IGNORECASE)
_UNITS = {"bytes": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


def wanted_bytes(error: BaseException) -> int | None:
    """How much was asked for where an error is about memory, 0 where it does not say; None for other errors."""
    for each in _chain(error):
        if isinstance(each, MemoryError) or _REFUSED.search(str(each)):
            found = _BYTES.search(str(each))
            return int(float(found[1]) * _UNITS[found[2].lower()]) if found else 0
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def explained(plan: Plan, graph: Graph, *, rank: int, where: str, doing: str, wanted: int, held: int) -> OutOfMemory:
    """wanted: bytes that were asked for, 0 where that is unknown; held: by this process then. Call it when the rank's tensors are gone."""
    give_back_freed_memory()
    use = plan.predicted.by_kind[rank] if rank < len(plan.predicted.by_kind) else {}
    asked = f"it asked for {wanted / 1e9:.3g} GB more" if wanted else "it asked for more"
    try:
        way_out = smaller_text(plan, graph)
    except (MemoryError, RuntimeError):
        way_out = (
            "what is left is too little to work out a smaller plan: plan for more ranks, with recompute=full, or a smaller global batch"
        )
    return OutOfMemory(
        f"rank {rank} of {plan.ranks} ({where}) ran out of memory in {doing}: {asked} when it held {held / 1e9:.3g} GB{_limit()}. "
        f"Its plan, {plan.layout}, counts on\n{memory_table(use)}\n{way_out}"
    )


def held_bytes() -> int:
    """What this process holds: on a GPU what is allocated, else its resident memory."""
    return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else int(psutil.Process().memory_info().rss)


def _limit() -> str:
    """The limits that the system was told to keep to."""
    kinds = {"address space": resource.RLIMIT_AS, "data": resource.RLIMIT_DATA}
    limits = [f"{name} of {soft / 1e9:.3g} GB" for name, kind in kinds.items() if (soft := resource.getrlimit(kind)[0]) >= 0]
    return f", limited to {' and '.join(limits)}" if limits else ""
