"""The best layout on a cluster of many devices, from a shallow twin of the model.

    every mesh × microbatch × ZeRO × recomputation × schedule ──costs of pieces──▶ estimates ──the best few──▶ simulator ──▶ ranking

Estimates are those of the simulator without waiting: the slowest stage's work, the pipeline's fill, the reductions. A layout is found in
seconds, whatever the number of devices: equal ranks are costed once.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from shardwise.capture.graph import Graph
from shardwise.cluster.model import Cluster
from shardwise.errors import LayoutError
from shardwise.planner.compose import Scheme, compose
from shardwise.planner.pieces import Outline, PieceCost
from shardwise.planner.search import FULL_MEMORY
from shardwise.planner.twins import TwinLayout, split_twin
from shardwise.program.tables import NAMES
from shardwise.program.trace import Tracer
from shardwise.simulate.profile import Profile
from shardwise.simulate.simulator import simulate_profile

__all__ = ["Found", "ScaleSearch"]

_SIMULATED = 8  # layouts, best estimates first
_LARGER = (2, 4)  # samples of a microbatch, tried where single ones do best
_REFINED = 1  # sizes of tp
_CHUNKS = (1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class Found:
    """A layout and what it takes. samples: of a microbatch on a data rank."""

    scheme: Scheme
    samples: int
    estimate_s: float
    memory_bytes: int
    step_time_s: float | None = None
    bubble: float | None = None

    @property
    def seconds(self) -> float:
        """Simulated where it was, else estimated."""
        return self.step_time_s if self.step_time_s is not None else self.estimate_s

    @property
    def runs(self) -> bool:
        """Whether the runtime can run it yet."""
        scheme = self.scheme
        return scheme.zero == 0 and scheme.recompute == "none" and scheme.schedule in NAMES

    def __str__(self) -> str:
        scheme = self.scheme
        words = [f"{name}={getattr(scheme, name)}" for name in ("dp", "cp", "tp", "pp") if getattr(scheme, name) > 1]
        words += [f"microbatches={scheme.microbatches}×{self.samples}", f"schedule={scheme.schedule}"]
        words += [f"chunks={scheme.chunks}"] if scheme.chunks > 1 else []
        words += [f"zero={scheme.zero}"] if scheme.zero else []
        words += [f"recompute={scheme.recompute}"] if scheme.recompute != "none" else []
        return ",".join(words)


@dataclass(kw_only=True)
class ScaleSearch:
    """graph: a thin one, of `global_batch` ≥ the largest microbatch; counts: how many blocks each of its runs really has.

    global_batch: samples of a step. only_runnable: leaves out what the runtime cannot run yet.
    """

    graph: Graph
    counts: Sequence[int]
    cluster: Cluster
    global_batch: int
    only_runnable: bool = False
    tracer: Tracer = field(default_factory=lambda: Tracer(device=torch.device("cpu")))
    costs: dict[tuple[TwinLayout, int], tuple[Outline, tuple[PieceCost, ...]]] = field(default_factory=dict)

    def search(self) -> list[Found]:
        """Layouts that fit, fastest first: the best few simulated, the others estimated. Empty where none fits."""
        single = self._fitting(self.estimates((1,)))
        sizes = list(dict.fromkeys(each.scheme.tp for each in single))[:_REFINED]
        larger = self._fitting(self.estimates(_LARGER, set(sizes)))
        fitting = sorted([*single, *larger], key=lambda each: each.estimate_s)
        best = sorted(map(self.simulated, fitting[:_SIMULATED]), key=lambda each: each.seconds)
        return [*best, *fitting[_SIMULATED:]]

    def _fitting(self, found: Iterable[Found]) -> list[Found]:
        fits = [each for each in found if each.memory_bytes <= self.cluster.memory_bytes * FULL_MEMORY]
        return sorted(fits, key=lambda each: each.estimate_s)

    def estimates(self, samples_of: Sequence[int], tensor: Container[int] | None = None) -> Iterator[Found]:
        """Of every layout with microbatches of so many samples, and these sizes of tp (all where None), without simulating it."""
        for scheme, samples in self.schemes(samples_of):
            if tensor is not None and scheme.tp not in tensor:
                continue
            try:
                profile = self.profile(scheme, samples)
            except LayoutError:
                continue
            memory = max(self._memory(profile, scheme, rank) for rank in {0, scheme.pp - 1})
            yield Found(scheme=scheme, samples=samples, estimate_s=_estimate(profile, scheme), memory_bytes=memory)

    def simulated(self, found: Found) -> Found:
        """With the simulator's figures."""
        step = simulate_profile(self.profile(found.scheme, found.samples), found.scheme.mesh)
        return replace(found, step_time_s=step.step_time_s, bubble=step.bubble, memory_bytes=max(step.memory_bytes))

    def profile(self, scheme: Scheme, samples: int) -> Profile:
        """What the layout's stages take."""
        shape, costs = self.pieces(TwinLayout(tp=scheme.tp, cp=scheme.cp), samples)
        return compose(shape, costs, scheme, self.cluster)

    def pieces(self, split: TwinLayout, samples: int) -> tuple[Outline, tuple[PieceCost, ...]]:
        """The pieces' costs for microbatches of so many samples."""
        if (split, samples) not in self.costs:
            parts = self.graph.global_batch // samples
            self.costs[split, samples] = split_twin(self.graph, self.counts, split, self.cluster, self.tracer, microbatches=parts)
        return self.costs[split, samples]

    def flops(self) -> float:
        """Of products, convolutions and attention in a step, forward and backward."""
        shape, costs = self.pieces(TwinLayout(), 1)
        return self.global_batch * sum(cost.flops * piece.count for piece, cost in zip(shape.pieces, costs, strict=True))

    def schemes(self, samples_of: Sequence[int]) -> Iterator[tuple[Scheme, int]]:
        """Every layout, with the samples of its microbatches."""
        ranks, blocks = self.cluster.ranks, sum(self.counts)
        inside = self.cluster.machines.levels[0].ranks if self.cluster.machines and self.cluster.machines.levels else ranks
        for tp in (size for size in (1, 2, 4, 8, 16) if size <= inside and ranks % size == 0):
            for pp in (size for size in range(1, min(blocks, ranks // tp) + 1) if ranks % (tp * size) == 0):
                dp = ranks // (tp * pp)
                if self.global_batch % dp:
                    continue
                for samples in (each for each in samples_of if self.global_batch // dp % each == 0 and each <= self.graph.global_batch):
                    yield from ((scheme, samples) for scheme in self._of_mesh(dp, tp, pp, self.global_batch // dp // samples, blocks))

    def _of_mesh(self, dp: int, tp: int, pp: int, microbatches: int, blocks: int) -> Iterator[Scheme]:
        chunks = [each for each in _CHUNKS if pp > 1 and microbatches >= pp and pp * each <= blocks] or [1]
        for each in chunks:
            for zero in (0,) if self.only_runnable or dp == 1 else (0, 1, 3) if pp == 1 else (0, 1):
                for recompute in ("none",) if self.only_runnable else ("none", "full"):
                    yield Scheme(
                        dp=dp,
                        tp=tp,
                        pp=pp,
                        chunks=each,
                        microbatches=microbatches,
                        schedule="interleaved" if each > 1 else "1f1b",
                        zero=zero,
                        recompute=recompute,
                    )

    def _memory(self, profile: Profile, scheme: Scheme, rank: int) -> int:
        """Of a pipeline rank, by how many microbatches 1F1B keeps there."""
        own = range(rank, scheme.stages, scheme.pp)
        ahead = (scheme.pp - rank - 1) * 2 + (scheme.chunks - 1) * scheme.pp + 1 if scheme.chunks > 1 else scheme.pp - rank
        flying = min(ahead, scheme.microbatches * scheme.chunks)
        saved = max(profile.stages[stage].saved_bytes for stage in own)
        kinds = profile.stages[own[0]].memory
        summed = ("parameters", "gradients", "optimizer")
        held = sum(profile.stages[stage].memory[kind] for stage in own for kind in summed)
        return held + sum(nbytes for kind, nbytes in kinds.items() if kind not in summed) + flying * saved


def _estimate(profile: Profile, scheme: Scheme) -> float:
    """The slowest rank's work in all microbatches, the fill of the pipeline, and what comes at the end."""
    works = [sum(sum(stage.seconds[kind]) for kind in ("forward", "backward")) for stage in profile.stages]
    by_rank = [sum(works[rank :: scheme.pp]) for rank in range(scheme.pp)]
    hops = sum(edge.transfer_s for edge in profile.edges) * 2
    ends = max(
        sum(sum(profile.stages[stage].seconds[kind]) for stage in range(rank, scheme.stages, scheme.pp) for kind in ("reduce", "update"))
        for rank in range(scheme.pp)
    )
    return max(by_rank) * scheme.microbatches + (sum(by_rank) - max(by_rank) + hops) / scheme.chunks + ends
