"""Which ranks a chart shows."""

from __future__ import annotations

from shardwise.simulate.simulator import Mesh

__all__ = ["MOST_RANKS", "omitted_text", "shown_ranks"]

MOST_RANKS = 24  # rows that a person still reads


def shown_ranks(mesh: Mesh) -> list[int]:
    """All, or of a large layout the first of each place in the pipeline (those of one do alike); of many places some, evenly spaced."""
    if mesh.stage_ranks * mesh.pp <= MOST_RANKS:
        return list(range(mesh.stage_ranks * mesh.pp))
    pipes = min(mesh.pp, MOST_RANKS)
    return [round(at * (mesh.pp - 1) / max(1, pipes - 1)) * mesh.stage_ranks for at in range(pipes)]


def omitted_text(mesh: Mesh) -> str:
    """Says so where ranks are left out."""
    ranks, shown = mesh.stage_ranks * mesh.pp, len(shown_ranks(mesh))
    if shown == ranks:
        return ""
    each = "the first of each stage" if shown >= mesh.pp else f"the first of {shown} of {mesh.pp} places in the pipeline"
    return f" Shown are {shown:,} of {ranks:,} ranks, {each}."
