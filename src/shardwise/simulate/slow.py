"""What if something were slower than it should be: ranks, stages, links between stages.

A rank or stage that computes `factor` times as long is a throttled device; a link that keeps a `share` of its rate is a bad cable. The
levels of links that a whole cluster has (`Machines.slowed`) are costed again instead, since what they hide beside computing changes, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from shardwise.errors import LayoutError
from shardwise.simulate.profile import EdgeProfile, Profile, StageProfile

__all__ = ["Slow"]

_RANKS = re.compile(r"(\d+)(?:-(\d+))?")
_EDGE = re.compile(r"(\d+)-(\d+)")


@dataclass(frozen=True, kw_only=True)
class Slow:
    """ranks: rank → how many times as long it computes; stages: the same for all ranks of a stage; both 1 or more.

    edges: (stage, stage) → the share of its rate, in (0, 1], that the link between two stages keeps, in both directions; levels: the same
    for a level of the cluster's links, by name. LayoutError for other figures.
    """

    ranks: Mapping[int, float] = field(default_factory=dict)
    stages: Mapping[int, float] = field(default_factory=dict)
    edges: Mapping[tuple[int, int], float] = field(default_factory=dict)
    levels: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, factors in (("rank", self.ranks), ("stage", self.stages)):
            for number, factor in factors.items():
                _check_factor(f"slow {what} {number}={factor:g}", factor)
        named = {f"{a}-{b}": share for (a, b), share in self.edges.items()} | dict(self.levels)
        for name, share in named.items():
            _check_share(f"slow link {name}={share:g}", share)

    def __bool__(self) -> bool:
        return bool(self.ranks or self.stages or self.edges or self.levels)

    @classmethod
    def parse(cls, ranks: Iterable[str] = (), stages: Iterable[str] = (), links: Iterable[str] = ()) -> Slow:
        """From the command line's words: ranks `3=1.3` or `8-15=1.3`, stages `2=1.3`, links `0-1=0.5` between stages or `network=0.5`, a
        level. LayoutError for what is not understood."""
        found: dict[int, float] = {}
        for text in ranks:
            name, factor = _pair("rank", text, "3=1.3 or 8-15=1.3: how many times as long they compute")
            read = _RANKS.fullmatch(name)
            if read is None or int(read[2] or read[1]) < int(read[1]):
                raise LayoutError(f"slow rank {text!r} names no ranks; write 3=1.3, or 8-15=1.3 for several")
            found |= dict.fromkeys(range(int(read[1]), int(read[2] or read[1]) + 1), factor)
        staged = dict(_pair("stage", text, "2=1.3: how many times as long it computes") for text in stages)
        if wrong := [name for name in staged if not name.isdigit()]:
            raise LayoutError(f"slow stage {wrong[0]!r} is no number; write 2=1.3")
        linked = dict(_pair("link", text, "network=0.5 or 0-1=0.5: the share of its rate that is left") for text in links)
        edges = {(int(read[1]), int(read[2])): share for name, share in linked.items() if (read := _EDGE.fullmatch(name))}
        levels = {name: share for name, share in linked.items() if not _EDGE.fullmatch(name)}
        return cls(ranks=found, stages={int(name): factor for name, factor in staged.items()}, edges=edges, levels=levels)

    def applied(self, profile: Profile) -> Profile:
        """The profile with what is said of stages and edges; LayoutError for a stage or edge that it does not have."""
        for stage in self.stages:
            if not 0 <= stage < len(profile.stages):
                raise LayoutError(f"slow stage {stage} is not among the {len(profile.stages)} stages; they are counted from 0")
        ends = {(edge.source, edge.target) for edge in profile.edges}
        shares = {(min(pair), max(pair)): share for pair, share in self.edges.items()}
        for source, target in shares:
            if (source, target) not in ends:
                known = ", ".join(f"{a}-{b}" for a, b in sorted(ends)[:8]) or "none"
                raise LayoutError(f"slow link {source}-{target} joins no stages that send to each other; there are {known}")
        stages = [_slower(stage, self.stages.get(number, 1.0)) for number, stage in enumerate(profile.stages)]
        edges = [_narrower(edge, shares.get((edge.source, edge.target), 1.0)) for edge in profile.edges]
        return profile.model_copy(update={"stages": stages, "edges": edges})


def _slower(stage: StageProfile, factor: float) -> StageProfile:
    seconds = {kind: (compute_s * factor, communicate_s) for kind, (compute_s, communicate_s) in stage.seconds.items()}
    return stage if factor == 1 else stage.model_copy(update={"seconds": seconds})


def _narrower(edge: EdgeProfile, share: float) -> EdgeProfile:
    return edge if share == 1 else edge.model_copy(update={"transfer_s": edge.transfer_s / share})


def _pair(what: str, text: str, wanted: str) -> tuple[str, float]:
    name, equals, value = (part.strip() for part in text.partition("="))
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not name or not equals or number != number:
        raise LayoutError(f"slow {what} {text!r} is no NAME=NUMBER; write {wanted}")
    return name, number


def _check_factor(said: str, factor: float) -> None:
    if not 1 <= factor < float("inf"):
        raise LayoutError(f"{said}: a slow rank takes 1 or more times as long; 1.3 is 30 % more")


def _check_share(said: str, share: float) -> None:
    if not 0 < share <= 1:
        raise LayoutError(f"{said}: a slow link keeps a share of its rate, more than 0 and at most 1; 0.5 is half of it")
