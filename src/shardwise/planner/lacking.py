"""What the runtime cannot run yet of a layout: the one list of it. When it can, its line goes."""

from __future__ import annotations

from collections.abc import Callable

from shardwise.planner.compose import Scheme

__all__ = ["lacking"]

_LACKS: tuple[tuple[Callable[[Scheme], bool], str], ...] = (
    (
        lambda scheme: scheme.ep > 1 and (scheme.tp > 1 or scheme.cp > 1),
        "experts divided over tensor and context ranks, too, and whole there (ep={0.ep} with tp={0.tp}, cp={0.cp})",
    ),
    (lambda scheme: scheme.ep > 1 and scheme.dp % scheme.ep > 0, "experts divided over a part of the data ranks (ep={0.ep}, dp={0.dp})"),
)


def lacking(scheme: Scheme) -> list[str]:
    """What of the layout does not run yet; empty where all of it does."""
    return [words.format(scheme) for holds, words in _LACKS if holds(scheme)]
