"""A made-up machine with constant rates: tests that plan measure nothing, and get the same plan everywhere."""

from __future__ import annotations

from shardwise.cluster.described import DescribedLink, DescribedMachine, DescribedRates
from shardwise.cluster.model import Cluster

__all__ = ["made_up"]


def made_up(
    ranks: int, *, cores: int | None = None, memory_gb: float = 8.0, link_bytes_per_s: float = 2e9, latency_s: float = 2e-6
) -> Cluster:
    """`ranks` ranks of 100 Gflop/s, 10 GB/s memory and a link of 2 GB/s; each with a device of its own unless `cores` says otherwise."""
    machine = DescribedMachine(
        ranks=ranks,
        memory_gb=memory_gb,
        backend="gloo",
        cores=cores,
        rates=DescribedRates(matmul_flops=1e11, memory_bytes_per_s=1e10, call_s=2e-6),
        link=DescribedLink(latency_s=latency_s, bytes_per_s=link_bytes_per_s),
    )
    rates = machine.described_rates()
    return Cluster(name=f"made-up:{ranks}", ranks=ranks, backend="gloo", cores=cores, memory_bytes=machine.memory_bytes, rates=rates)
