"""The one place where environment variables are read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["RankEnvironment", "cache_directory", "rank_environment", "record_no_messages", "tunes_malloc", "use_interface"]


@dataclass(frozen=True, kw_only=True)
class RankEnvironment:
    """What torchrun (or our launcher) tells a process about its place in the job."""

    rank: int
    ranks: int
    local_rank: int
    master_address: str
    master_port: int


def rank_environment() -> RankEnvironment | None:
    """This process' place in the job, or None when no launcher started it."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    return RankEnvironment(
        rank=int(os.environ["RANK"]),
        ranks=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        master_address=os.environ.get("MASTER_ADDR", "localhost"),
        master_port=int(os.environ.get("MASTER_PORT", "0")),
    )


def use_interface(name: str) -> None:
    """Has gloo connect ranks over this network interface, unless $GLOO_SOCKET_IFNAME names another."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def record_no_messages() -> None:
    """Has torch's flight recorder keep no record of gloo's collectives, unless $TORCH_FR_BUFFER_SIZE asks for some.

    A record that outlasts its step lies between blocks that are freed: no hole is whole again, and the heap grows from step to step.
    """
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:  # its older name
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "0")


def tunes_malloc() -> bool:
    """Whether the user tells glibc's malloc when to take memory from the kernel and when to give it back."""
    names = ("trim_threshold", "mmap_threshold", "mmap_max", "top_pad")
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return any(os.environ.get(f"MALLOC_{name.upper()}_") or f"glibc.malloc.{name}=" in tunables for name in names)


def cache_directory() -> Path:
    """Where measured figures are kept: $SHARDWISE_CACHE, else $XDG_CACHE_HOME/shardwise, else ~/.cache/shardwise."""
    chosen = os.environ.get("SHARDWISE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardwise"
