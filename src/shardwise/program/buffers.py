"""Buffers that the forward pass changes (running statistics) live where they are changed: a rank that only reads one would never see it
change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shardwise.capture.graph import Graph, Op

__all__ = ["buffer_spans", "far_buffer"]


def buffer_spans(graph: Graph, body: Sequence[Op]) -> dict[int, str]:
    """Indices in the body between what reads a buffer and what changes it → the buffer: a cut there would part them."""
    index = {op: i for i, op in enumerate(body)}
    readers = graph.consumers()
    spans: dict[int, str] = {}
    for name, value in graph.updates.items():
        if value.producer in index:
            touching = [index[value.producer], *(index[op] for op, _ in readers.get(graph.buffers[name], ()) if op in index)]
            spans |= dict.fromkeys(range(min(touching) + 1, max(touching) + 1), name)
    return spans


def far_buffer(graph: Graph, stage_of: Mapping[Op, int], placement: Sequence[int]) -> str:
    """The first buffer that one rank of the pipeline changes and another one reads, in words; "" where there is none.

    placement: stage → the pipeline's rank that has it.
    """
    readers = graph.consumers()
    for name, value in graph.updates.items():
        if value.producer is None or value.producer not in stage_of:
            continue
        changed = stage_of[value.producer]
        for op, _ in readers.get(graph.buffers[name], ()):
            read = stage_of.get(op, changed)
            if placement[read] != placement[changed]:
                return f"buffer {name} is changed in stage {changed} and read by {op.key} in stage {read}, on another rank of the pipeline"
    return ""
