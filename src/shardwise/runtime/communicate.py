"""Gives the program's collective operators (`torch.ops.shardwise.*`) their implementation: torch.distributed."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from shardwise._torch import find_group, register_group
from shardwise.runtime import collectives
from shardwise.sharding.collectives import LIBRARY, group_name

__all__ = ["create_groups"]


def _all_reduce(x: Tensor, group: str, op: str, impl: str) -> Tensor:
    return collectives.all_reduce(x, find_group(group), impl, reduction=op)  # type: ignore[arg-type]


def _all_gather(x: Tensor, group: str, dim: int, sizes: Sequence[int], impl: str) -> Tensor:
    return collectives.all_gather(x, dim, sizes, find_group(group), impl)


def _reduce_scatter(x: Tensor, group: str, dim: int, sizes: Sequence[int], rank: int, impl: str) -> Tensor:
    return collectives.reduce_scatter(x, dim, sizes, find_group(group), impl)


def _all_to_all(
    x: Tensor, group: str, split_dim: int, split_sizes: Sequence[int], cat_dim: int, cat_sizes: Sequence[int], rank: int, impl: str
) -> Tensor:
    return collectives.all_to_all(x, split_dim, split_sizes, cat_dim, cat_sizes, find_group(group), impl)


for _name, _function in (
    ("all_reduce", _all_reduce),
    ("all_gather", _all_gather),
    ("reduce_scatter", _reduce_scatter),
    ("all_to_all", _all_to_all),
):
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")


def create_groups(groups: Sequence[tuple[str, tuple[int, ...]]], timeout_s: float = 300.0) -> dict[str, Any]:
    """Creates the process groups of the whole job, in the same order on every rank; those of this rank by axis.

    groups: (axis, ranks) of all ranks' programs, each once. timeout_s: how long a wait in them may take; torch's default is half an hour.
    """
    mine: dict[str, Any] = {}
    for axis, ranks in groups:
        if len(ranks) == 1:
            continue
        name = group_name(axis, ranks)
        group = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout_s), group_desc=name)
        if dist.get_rank() in ranks:
            register_group(name, group)
            mine[name] = group
    return mine
