"""Which rank may hold which table whole: many tables, of sizes that differ, are spread so that the ranks hold about as much each."""

from __future__ import annotations

from collections.abc import Mapping

from shardwise.capture.graph import Graph, Op, Value
from shardwise.sharding.signature import Signature

__all__ = ["table_owners"]


def table_owners(graph: Graph, signatures: Mapping[Op, Signature], ranks: int) -> dict[Op, int]:
    """The look-ups whose table may be kept whole on one rank → that rank; none where the tables are too few or too unequal for that.

    The largest table first, each goes to the rank that holds least (Graham, "Bounds on multiprocessing timing anomalies", 1969: at most
    4/3 of the best). A table larger than a rank's even share is left out: its rows or columns are better divided.
    """
    lookups = {op: op.inputs[0] for op in graph.ops if any(split.owned for split in signatures[op].splits.values())}
    readers = graph.consumers()
    tables = {
        table: [op for op, _ in readers[table]]
        for table in dict.fromkeys(lookups.values())
        if table.kind == "parameter" and all(op in lookups for op, _ in readers[table])
    }
    while tables and max(table.nbytes for table in tables) * ranks > sum(table.nbytes for table in tables):
        del tables[max(tables, key=lambda table: table.nbytes)]
    held = [0] * ranks
    owners: dict[Value, int] = {}
    for table in sorted(tables, key=lambda table: -table.nbytes):
        owners[table] = rank = held.index(min(held))
        held[rank] += table.nbytes
    fullest_first = {rank: place for place, rank in enumerate(sorted(range(ranks), key=lambda rank: -held[rank]))}
    return {op: fullest_first[owners[table]] for table, ops in tables.items() for op in ops}
