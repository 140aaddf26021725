"""Seconds of an optimizer's step over one parameter."""

from __future__ import annotations

from typing import Final

import torch

from shardwise.cluster.model import Cluster
from shardwise.errors import ShardwiseError

__all__ = ["optimizer_seconds"]

_FLOAT32_BYTES: Final = 4


def optimizer_seconds(numel: int, dtype: torch.dtype, kind: str, cluster: Cluster) -> float:
    """Time, s, of one step of torch.optim's ``kind`` (adamw, adam, sgd, sgd_momentum; fused, as the runtime
    uses it) over a parameter of ``numel`` elements. Raises ShardwiseError for a kind without figures."""
    rates = cluster.rates.optimizers
    if kind not in rates:
        raise ShardwiseError(f"no figures of the optimizer {kind!r} on {cluster.name}; there are {', '.join(rates)}")
    size = numel * dtype.itemsize
    return rates[kind].fixed_s + size / _FLOAT32_BYTES * rates[kind].element_s.at(size)
