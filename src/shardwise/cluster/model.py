"""Clusters: how many ranks there are, what each can hold, and what it can do."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from shardwise.cluster.described import DescribedMachine, read_machine
from shardwise.cluster.machine import available_cores, available_memory_bytes
from shardwise.cluster.machine_files import is_machine_file
from shardwise.cluster.network import Network
from shardwise.cluster.rates import Rates
from shardwise.cluster.roofline import device_rates
from shardwise.cluster.specs import machines
from shardwise.cluster.topology import Machines
from shardwise.errors import ClusterError

__all__ = ["Cluster", "Device", "cluster_of", "slowest"]

_ACCEPTED = (
    'accepted are a Cluster, "local:N" (N ranks sharing this machine), devices of the catalog ("h100:2048x8": 2,048 nodes of 8; '
    '"1x8 a100-80g + 2x4 rtx4090, 25 GbE"; `shardwise cluster` lists them) and the path of a .toml file describing a machine'
)


@dataclass(frozen=True, kw_only=True)
class Device:
    """What one rank computes on."""

    name: str
    memory_bytes: int
    rates: Rates


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Ranks.

    name: as it was asked for ("local:4") or as its file says. backend: torch.distributed's ("gloo", "nccl").
    cores: CPU cores that the ranks share, None where each rank has a device of its own.
    memory_bytes, rates: of each rank, of the smallest and of the slowest where they are not alike. machines: what they are and what joins
    them, where they are of the catalog.
    unlike: where the ranks are not all alike, in their order (how many, what each of them computes on); () where they are.
    network: what joins nodes, where the ranks are on several and not of the catalog.
    """

    name: str
    ranks: int
    backend: str
    cores: int | None
    memory_bytes: int
    rates: Rates
    machines: Machines | None = None
    unlike: tuple[tuple[int, Device], ...] = ()
    network: Network | None = None

    @property
    def threads_per_rank(self) -> int:
        """Threads that a rank computes with: an equal share of the cores, at least 1."""
        return max(1, (self.cores or 1) // self.ranks)

    @property
    def devices(self) -> tuple[Device, ...]:
        """The device of each rank."""
        if self.unlike:
            return tuple(device for count, device in self.unlike for _ in range(count))
        return tuple(Device(name=f"{self.name}/{rank}", memory_bytes=self.memory_bytes, rates=self.rates) for rank in range(self.ranks))

    def seen_by(self, ranks: Iterable[int]) -> Cluster:
        """The cluster as these ranks see it, which wait for each other: the memory of the smallest, the rates of the slowest of them."""
        if not self.unlike:
            return self
        ends = list(accumulate(count for count, _ in self.unlike))
        found = [self.unlike[number][1] for number in sorted({bisect_right(ends, rank) for rank in ranks})]
        return replace(self, memory_bytes=min(device.memory_bytes for device in found), rates=slowest(device.rates for device in found))

    def with_memory(self, memory_bytes: int) -> Cluster:
        """The cluster, had each rank so much."""
        unlike = tuple((count, replace(device, memory_bytes=memory_bytes)) for count, device in self.unlike)
        return replace(self, memory_bytes=memory_bytes, unlike=unlike)

    def with_speeds(self, speeds: Sequence[float]) -> Cluster:
        """The cluster, did its ranks compute so many times as fast, each in turn; links stay.

        Raises ClusterError where there is not a positive speed for each rank, ranks share cores, or the devices are of the catalog, which
        has their speeds.
        """
        if self.machines is not None:
            raise ClusterError(f"cluster {self.name}: its devices are of the catalog; give others there (`shardwise cluster` lists them)")
        if len(speeds) != self.ranks or min(speeds) <= 0:
            raise ClusterError(f"cluster {self.name}: {self.ranks} ranks want as many positive speeds, not {list(speeds)}")
        if self.cores is not None and self.cores < self.ranks:
            raise ClusterError(f"cluster {self.name}: {self.ranks} ranks share {self.cores} cores, so none has its own speed; take fewer")
        found = [replace(device, rates=device.rates.times_as_fast(speed)) for device, speed in zip(self.devices, speeds, strict=True)]
        unlike = tuple((1, device) for device in found) if self.unlike or len(set(speeds)) > 1 else ()
        return replace(self, cores=None, rates=slowest(device.rates for device in found), unlike=unlike)

    @classmethod
    def parse(cls, spec: Cluster | str | Path, *, refresh: bool = False) -> Cluster:
        """The cluster that a specification names.

        ``"local:N"`` measures this machine where that was not done before (or again, with ``refresh``), which takes seconds and
        starts N processes; a described machine measures nothing. Raises ClusterError for anything that is not accepted.
        """
        if isinstance(spec, Cluster):
            return spec
        text = str(spec)
        if text.startswith("local:"):
            return _local(text, refresh)
        if text.endswith(".toml"):
            path = Path(text)
            return cluster_of(machines(path)) if is_machine_file(path) else _described(path)
        if not text.strip():
            raise ClusterError(f"cluster {text!r} is not understood: {_ACCEPTED}")
        return cluster_of(machines(text))


def _local(spec: str, refresh: bool) -> Cluster:
    from shardwise.cluster.probe import local_rates  # loads all that measures: only where asked for

    count = spec.removeprefix("local:")
    if not (count.isascii() and count.isdigit()) or int(count) < 1:
        raise ClusterError(f'cluster {spec!r}: {count!r} is not a number of ranks; give 1 or more, such as "local:4"')
    ranks = int(count)
    return Cluster(
        name=spec,
        ranks=ranks,
        backend="gloo",
        cores=available_cores(),
        memory_bytes=available_memory_bytes() // ranks,
        rates=local_rates(ranks, refresh=refresh),
    )


def slowest(rates: Iterable[Rates]) -> Rates:
    """Those of the least flop/s in large products (bfloat16's where they are known)."""
    return min(rates, key=lambda each: each.matmul_of("bfloat16").cubes_flops.values[-1])


def cluster_of(found: Machines, attention: str = "", fitted: bool = True) -> Cluster:
    """Devices of the catalog. What is equal for all ranks is that of the slowest and of the smallest of them.

    attention, fitted: as in `shardwise.cluster.roofline.device_rates`.
    """
    rates = {device: device_rates(device, attention, fitted) for device in found.devices}
    groups = [
        (group.ranks, Device(name=group.device.name, memory_bytes=group.device.memory_bytes, rates=rates[group.device]))
        for group in found.groups
    ]
    return Cluster(
        name=found.name,
        ranks=found.ranks,
        backend="nccl",
        cores=None,
        memory_bytes=min(device.memory_bytes for _, device in groups),
        rates=slowest(device.rates for _, device in groups),
        machines=found,
        unlike=tuple(groups) if len(found.devices) > 1 else (),
    )


def _described(path: Path) -> Cluster:
    machine = read_machine(path)
    name = machine.name or path.stem
    if machine.like is not None:
        return _alike(name, machine, Cluster.parse(machine.like))
    assert machine.rates is not None and machine.memory_bytes is not None
    speeds = machine.rates.speeds
    rates = {speed: machine.described_rates(speed) for speed in (*speeds, 1.0)}
    each = [(1, Device(name=f"{name}/{rank}", memory_bytes=machine.memory_bytes, rates=rates[speed])) for rank, speed in enumerate(speeds)]
    return Cluster(
        name=name,
        ranks=machine.ranks,
        backend=machine.backend,
        cores=machine.cores,
        memory_bytes=machine.memory_bytes,
        rates=rates[min(speeds, default=1.0)],
        unlike=tuple(each) if len(set(speeds)) > 1 else (),
        network=_network(machine),
    )


def _alike(name: str, machine: DescribedMachine, measured: Cluster) -> Cluster:
    """Ranks like those measured here, on as many of their cores, and with as much memory, for each."""
    cores = None if measured.cores is None else max(1, measured.cores * machine.ranks // measured.ranks)
    return replace(measured, name=name, ranks=machine.ranks, cores=cores, network=_network(machine))


def _network(machine: DescribedMachine) -> Network | None:
    joined = machine.network
    if joined is None:
        return None
    return Network(node_ranks=machine.ranks // machine.nodes, latency_s=joined.latency_s, bytes_per_s=joined.bytes_per_s)
