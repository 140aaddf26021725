"""Which implementation of each collective was measured to be fastest, for the groups that a layout has."""

from __future__ import annotations

from shardwise.cluster.model import Cluster
from shardwise.cost.collectives import fastest, step_of
from shardwise.planner.layout import Layout

__all__ = ["layout_choices", "measured_choices"]


def layout_choices(cluster: Cluster, layout: Layout) -> dict[str, list[tuple[float, str]]]:
    """As `measured_choices`, for the groups that a layout has."""
    dp, cp, tp, _ = layout.mesh
    ep = layout.ep or 1
    groups = {layout.shard, dp * cp // layout.shard} if layout.shard else set()
    groups |= {ep, dp // ep, dp // ep * cp} if ep > 1 else set()
    return measured_choices(cluster, {dp, cp, dp * cp, tp, 2} | groups if layout.ranks > 1 else set())


def measured_choices(cluster: Cluster, sizes: set[int]) -> dict[str, list[tuple[float, str]]]:
    """For each kind of collective and group size, which implementation is fastest up to how many bytes."""
    tables: dict[str, list[tuple[float, str]]] = {}
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
        for ranks in sorted(sizes - {1}):
            table: list[tuple[float, str]] = []
            for power in range(step_of(0), step_of(float("inf")) + 1):
                impl = fastest(kind, 2.0**power, ranks, cluster)
                table = [*(table[:-1] if table and table[-1][1] == impl else table), (2.0**power, impl)]
            tables[f"{kind}/{ranks}"] = [*table[:-1], (1e18, table[-1][1])]
    return tables
