"""A rank's membership in the job: joining the process group, leaving it, and not outliving the parent."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from weakref import WeakKeyDictionary

import psutil
import torch
import torch.distributed as dist

from shardwise._torch import register_group
from shardwise.cluster.machine import available_cores
from shardwise.environment import RankEnvironment, rank_environment, record_no_messages, use_interface
from shardwise.errors import ClusterError
from shardwise.heap import keep_freed_memory
from shardwise.sharding.collectives import group_name

__all__ = ["create_groups", "die_with_parent", "join_group", "process_group", "threads_per_rank"]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def threads_per_rank(ranks: int) -> int:
    """An equal share of this machine's cores, at least one."""
    return max(1, available_cores() // ranks)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when `parent` (a pid) ends, however it ends. Linux only; elsewhere nothing."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)


@contextmanager
def process_group(*, timeout_s: float, threads: int | None = None, backend: str = "gloo") -> Iterator[RankEnvironment]:
    """Join the job that the environment describes, and leave it at the end of the block.

    timeout_s: how long any collective, send or receive may wait. threads: for torch's operators, None leaves them as they are.
    A group that exists already (the user's own) is used, and left to its owner.
    Raises ClusterError outside a job and where the port is taken.
    """
    place = _place()
    if threads is not None:
        torch.set_num_threads(threads)
    owner = join_group(timeout_s, backend=backend)
    yield place
    if owner:  # not after an error: peers may be waiting, and the end of this process tells them
        dist.destroy_process_group()


def join_group(timeout_s: float, *, backend: str = "gloo") -> bool:
    """Join the job that the environment describes unless a group exists already; whether it was joined here. Freed memory is kept."""
    keep_freed_memory()
    joined = dist.is_initialized()
    if (dist.get_backend() if joined else backend) == "gloo":
        record_no_messages()
    if joined:
        return False
    _join(_place(), timeout_s=timeout_s, backend=backend)
    return True


def _place() -> RankEnvironment:
    place = rank_environment()
    if place is None:
        raise ClusterError(
            "this process was started by no launcher: RANK and WORLD_SIZE are not set. "
            "Start it with `torchrun --nproc-per-node N script.py`, or let `shardwise train` start the ranks."
        )
    return place


def _join(place: RankEnvironment, *, timeout_s: float, backend: str) -> None:
    if backend == "gloo" and (interface := interface_towards(place.master_address)) is not None:
        use_interface(interface)
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        dist.barrier()  # a rank that was done and left while others still connect would make them fail
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise port_in_use(place.master_address, place.master_port) from error
        raise


def interface_towards(address: str) -> str | None:
    """The network interface by which this machine reaches the job's first one, None where that is this machine alone.

    Left to itself gloo takes the interface of the address that this machine's name stands for, often 127.0.0.1, where no other node
    finds it.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing: the system chooses the way
            own = probe.getsockname()[0]
    except OSError:
        return None
    found = [name for name, addresses in psutil.net_if_addrs().items() if any(each.address == own for each in addresses)]
    return None if own.startswith("127.") or not found else found[0]


def port_in_use(host: str, port: int) -> ClusterError:
    """The error for a rendezvous port that another process holds."""
    return ClusterError(
        f"port {port} on {host} is already in use by another process. "
        "Choose another (`--port N`, torchrun: `--master-port N`), or 0 for any free one."
    )


_created: WeakKeyDictionary[dist.ProcessGroup | None, set[str]] = WeakKeyDictionary()  # the world → names, as torch's own registry has them


def create_groups(groups: Sequence[tuple[str, tuple[int, ...]]], timeout_s: float = 300.0) -> None:
    """Creates the process groups of the whole job, in the same order on every rank.

    groups: (axis, ranks) of all ranks' programs, each once; those that an earlier job of this process has created are used again.
    timeout_s: how long a wait in them may take; torch's default is half an hour.
    """
    known = _created.setdefault(dist.group.WORLD, set())
    for axis, ranks in groups:
        name = group_name(axis, ranks)
        if len(ranks) == 1 or name in known:
            continue
        known.add(name)
        group = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout_s), group_desc=name)
        if dist.get_rank() in ranks:
            register_group(name, group)
