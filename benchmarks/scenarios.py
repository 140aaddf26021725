"""Where the layout matters: races under conditions that make an obvious layout a bad one.

wide-vocabulary  a narrow model of 131,072 tokens, few of them in a batch: its table outweighs its layers, and its gradients a step's work
memory-limit     each rank's data may grow by 1.5 GiB (RLIMIT_DATA): less than the state of the model, which one process cannot train then
slow-rank        the last rank has half the speed (see throttle.py)
shaped-link      the ranks are on two hosts (see hosts.py), with 1 Gbit/s between them, and a batch so small that gradients take long

Of gpt2's peers on two ranks the limit leaves 1F1B and interleaved 1F1B with a batch of 8 (FSDP2 and tensor parallelism sometimes, for a
step), none beyond the second step with 12; DDP and one process cannot train with any. A batch of 8 is raced, `--batch-size` takes another.

All contestants race under the same conditions. Those that a memory limit ends, ours excepted, are told with their error and left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.hosts import Hosts
from benchmarks.workloads import Workload

_TEXT = ("gpt2", "llama", "bert")


@dataclass(frozen=True, kw_only=True)
class Host:
    """Where a rank runs: the network namespace, its device, and the address of the first rank's host."""

    namespace: str
    device: str
    first_address: str


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A condition. width: times that of the workload's layers; shape: what else it changes; families: that it is for, () all.

    data_bytes: by which each rank's data may grow. last_speed: of the last rank. link_bytes_per_s: between two hosts, each direction.
    """

    width: float = 1.0
    shape: Mapping[str, int] = field(default_factory=dict)
    families: tuple[str, ...] = ()
    data_bytes: int | None = None
    last_speed: float = 1.0
    link_bytes_per_s: float | None = None

    def of(self, workload: Workload) -> Workload:
        """The workload that is raced."""
        wide: dict[str, Any] = {name: int(self.width * getattr(workload, name)) for name in ("hidden", "ffn", "heads")}
        return replace(workload, **wide, **self.shape)

    def speeds(self, ranks: int) -> tuple[float, ...]:
        """Of each of several ranks; one process alone is not slowed down."""
        return (1.0,) * (ranks - 1) + (self.last_speed if ranks > 1 else 1.0,)

    @contextmanager
    def hosts(self) -> Iterator[Hosts | None]:
        """Two hosts with this link, where the scenario is about one."""
        if self.link_bytes_per_s is None:
            yield None
            return
        with Hosts() as hosts:
            hosts.shape(self.link_bytes_per_s)
            yield hosts


def host_of(rank: int, ranks: int, hosts: Hosts | None) -> Host | None:
    """The first half of the ranks is on the first host."""
    if hosts is None:
        return None
    number = 2 * rank // ranks
    return Host(namespace=hosts.names[number], device=hosts.devices[number], first_address=hosts.addresses[0])


PLAIN = Scenario()
FULL = {
    "wide-vocabulary": Scenario(width=0.5, shape={"layers": 4, "vocabulary": 131072, "sequence": 64, "batch_size": 4}, families=_TEXT),
    "memory-limit": Scenario(width=2, shape={"sequence": 128, "batch_size": 8}, families=_TEXT, data_bytes=3 << 29),
    "slow-rank": Scenario(last_speed=0.5),
    "shaped-link": Scenario(shape={"sequence": 128, "batch_size": 4}, link_bytes_per_s=125e6),
}
SMALL = {
    "wide-vocabulary": Scenario(shape={"vocabulary": 4096}, families=_TEXT),
    "memory-limit": Scenario(width=12, shape={"layers": 12}, families=_TEXT, data_bytes=288 << 20),
    "slow-rank": FULL["slow-rank"],
    "shaped-link": FULL["shaped-link"],
}
