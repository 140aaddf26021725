"""Pieces × how a step is run ──▶ Profile: what each stage takes in time and memory, for the simulator.

    seconds of a stage     the sum of its pieces'; recomputation adds the forward pass to the backward pass
    gradients              all-reduced over the data ranks, or reduced to parts of which the updated parameters are gathered (ZeRO)
    ZeRO-3                 parameters gathered before each use, in every microbatch, while the piece before it computes
    memory                 parameters, gradients and states by their dtypes and their division; what microbatches in flight keep

Sources: ZeRO, Rajbhandari et al. 2020; recomputation, Chen et al. 2016 and Korthikanti et al. 2022; 1F1B and interleaving, Narayanan et al.
2021.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from shardwise.cluster.model import Cluster
from shardwise.cost.collectives import collective_cost
from shardwise.errors import LayoutError
from shardwise.planner.pieces import Outline, PieceCost, Work
from shardwise.simulate.profile import EdgeProfile, Profile, StageProfile
from shardwise.simulate.simulator import Mesh

__all__ = ["Scheme", "compose", "divide", "hop_seconds", "recomputed", "stage_profile"]

_STATE_BYTES = 12  # Adam in mixed precision: float32 parameter and two moments
_UPDATE_BYTES = 30  # read and written by the update of one number: gradient 4, states 24, new 16-bit parameter 2
_CONTEXT_BYTES = 1.5e9  # CUDA context, communication buffers, workspaces
_FRAGMENTS = 1.04  # of activations: what the allocator cannot use


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a step is run.

    dp, cp, tp, pp: ranks; ep: over how many of the data ranks experts are divided (the pieces hold one's share of them); chunks: stages of
    each pipeline rank.
    zero: 0 to 3; shard: over how many data ranks ZeRO divides, all of them if 0.
    recompute: "none", "full" (each block keeps what it is given), "selective" (and what its products with weights make) or "alternate"
    (and what every second of these makes).
    gradient_bytes: of a number's gradient in memory and on the link.
    even: stages of equally many blocks, the first and last with what stands before and after them; else stages of equal time.
    overlap: of the last microbatch's backward pass, beside which gradients are reduced; of the first's forward pass, beside which
    updated parameters are gathered; of a piece, beside which ZeRO-3 gathers the next. hidden: of what the ranks of the tensor axis send
    each other, that products hide. gather_each: whether ZeRO-3 gathers each parameter by itself, not a block's together.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    chunks: int = 1
    microbatches: int = 1
    schedule: str = "1f1b"
    zero: int = 0
    shard: int = 0
    recompute: str = "none"
    gradient_bytes: int = 4
    even: bool = False
    overlap: float = 0.85
    hidden: float = 0.0
    gather_each: bool = False

    @property
    def stages(self) -> int:
        """Of the pipeline, all chunks."""
        return self.pp * self.chunks

    @property
    def mesh(self) -> Mesh:
        """For the simulator: data and sequence ranks do alike."""
        return Mesh(dp=self.replicas, tp=self.tp, pp=self.pp, chunks=self.chunks, microbatches=self.microbatches, schedule=self.schedule)

    @property
    def replicas(self) -> int:
        """Ranks over which gradients are summed."""
        return self.dp * self.cp

    @property
    def sharded(self) -> int:
        """Ranks over which ZeRO divides what it divides."""
        return min(self.shard or self.replicas, self.replicas) if self.zero else 1


def divide(shape: Outline, costs: Sequence[PieceCost], scheme: Scheme) -> list[list[tuple[int, int]]]:
    """For each stage its (piece, how many of it), in order. LayoutError where there are more stages than parts."""
    units = [
        (index, _seconds(cost, scheme))
        for index, (piece, cost) in enumerate(zip(shape.pieces, costs, strict=True))
        for _ in range(piece.count)
    ]
    blocks = [place for place, (index, _) in enumerate(units) if shape.pieces[index].count > 1]
    if scheme.stages > max(len(units), 1):
        raise LayoutError(f"pp={scheme.pp} × {scheme.chunks} chunks are more stages than the {len(units)} parts of the model; use fewer")
    if scheme.even and len(blocks) >= scheme.stages:
        each, more = divmod(len(blocks), scheme.stages)
        ends: list[int] = []
        done = 0
        for stage in range(scheme.stages - 1):
            done += each + (stage < more)
            ends.append(blocks[done - 1] + 1)
        ends.append(len(units))
    else:
        ends = _balanced([seconds for _, seconds in units], scheme.stages)
    return [_counted(units[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


def _counted(units: Sequence[tuple[int, float]]) -> list[tuple[int, int]]:
    found: dict[int, int] = {}
    for index, _ in units:
        found[index] = found.get(index, 0) + 1
    return list(found.items())


def _balanced(seconds: Sequence[float], stages: int) -> list[int]:
    """Ends of so many runs of which the longest is as short as can be, by bisection."""
    low, high = max(seconds), sum(seconds)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if _needed(seconds, middle) <= stages else (middle, high)
    ends: list[int] = []
    total = 0.0
    for place, each in enumerate(seconds):
        left = len(seconds) - place
        if total and (total + each > high * (1 + 1e-9) or left <= stages - 1 - len(ends)) and len(ends) < stages - 1:
            ends.append(place)
            total = 0.0
        total += each
    return [*ends, len(seconds)]


def _needed(seconds: Sequence[float], limit: float) -> int:
    runs, total = 1, 0.0
    for each in seconds:
        if total and total + each > limit:
            runs, total = runs + 1, 0.0
        total += each
    return runs


def _seconds(cost: PieceCost, scheme: Scheme) -> float:
    times = 2 if scheme.recompute == "full" else 1
    works = [cost.forward] * times + [cost.backward_input, cost.backward_weight]
    return sum(work.compute_s + work.communicate_s for work in works)


def compose(shape: Outline, costs: Sequence[PieceCost], scheme: Scheme, cluster: Cluster, *, splits_backward: bool = False) -> Profile:
    """The profile of a step. splits_backward: whether the schedule runs the weights' part of the backward pass by itself."""
    stages = divide(shape, costs, scheme)
    made = [_Stage(shape=shape, costs=costs, parts=parts, scheme=scheme, cluster=cluster) for parts in stages]
    profiles = [stage.profile(splits_backward=splits_backward) for stage in made]
    return Profile(stages=profiles, edges=list(_edges(made, scheme, cluster)), cores=None)


def stage_profile(
    shape: Outline,
    costs: Sequence[PieceCost],
    parts: Sequence[tuple[int, int]],
    scheme: Scheme,
    cluster: Cluster,
    *,
    between: Cluster | None = None,
    apart: int = 0,
) -> StageProfile:
    """One stage: so many of each piece (`divide`), with the costs of the devices that it is on, `cluster`.

    between, apart: where the data ranks are not neighbours inside `cluster`: what joins them, and how many ranks there are from one to the
    next.
    """
    stage = _Stage(shape=shape, costs=costs, parts=parts, scheme=scheme, cluster=cluster, between=between, apart=apart)
    return stage.profile(splits_backward=False)


def hop_seconds(nbytes: float, tp: int, cluster: Cluster, send: Callable[[float], float]) -> float:
    """Of a message from stage to stage. A message that all tensor ranks have whole is sent in parts and put together beyond, where that is
    faster (Narayanan et al. 2021, section 4.1). send: bytes → seconds from one rank to its neighbour; cluster: of the tensor ranks."""
    return min(send(nbytes), send(nbytes / tp) + collective_cost("all_gather", nbytes, tp, cluster).seconds)


def _edges(made: Sequence[_Stage], scheme: Scheme, cluster: Cluster) -> Iterator[EdgeProfile]:
    stride = scheme.dp * scheme.cp * scheme.tp

    def send(nbytes: float) -> float:
        return collective_cost("send_recv", nbytes, 2, cluster, stride).seconds

    for number, stage in enumerate(made[:-1]):
        nbytes = stage.costs[stage.parts[-1][0]].sent
        seconds = hop_seconds(nbytes, scheme.tp, cluster, send) if scheme.pp > 1 else 0.0
        yield EdgeProfile(name=f"h→{number + 1}", source=number, target=number + 1, nbytes=nbytes, transfer_s=seconds, requires_grad=True)


@dataclass(frozen=True, kw_only=True)
class _Stage:
    shape: Outline
    costs: Sequence[PieceCost]
    parts: Sequence[tuple[int, int]]
    scheme: Scheme
    cluster: Cluster
    between: Cluster | None = None
    apart: int = 0

    def _each(self) -> Iterator[tuple[PieceCost, int, str]]:
        """(cost, how many, how it is recomputed)."""
        for index, count in self.parts:
            yield self.costs[index], count, self.scheme.recompute if self.shape.pieces[index].count > 1 else "none"

    def _sum(self, field: str) -> int:
        return sum(getattr(cost, field) * count for cost, count, _ in self._each())

    def profile(self, *, splits_backward: bool) -> StageProfile:
        forward = backward = weight = Work()
        for cost, count, again in self._each():
            gathered, routed = self._gather(cost), self._route(cost)
            forward += _times(_beside(self._shown(cost.forward) + routed, gathered, self.scheme.overlap), count)
            inputs = self._shown(cost.backward_input + recomputed(cost, again)) + routed + (routed if again == "full" else Work())
            scattered = self._scatter(cost)
            if splits_backward:
                backward, weight = backward + _times(inputs, count), weight + _times(cost.backward_weight, count)
            else:
                backward += _times(_beside(inputs + cost.backward_weight, gathered + scattered, self.scheme.overlap), count)
        prelude = Work()
        for cost, _, _ in self._each():
            prelude += cost.prelude
        saved = int(self._saved() * _FRAGMENTS)
        seconds = {
            "prelude": prelude,
            "forward": forward,
            "backward": backward,
            "reduce": Work(communicate_s=self._reduce((backward + weight).compute_s)),
            "update": Work(compute_s=self._update()),
        } | ({"weight": weight} if splits_backward else {})
        return StageProfile(
            seconds={kind: (work.compute_s, work.communicate_s) for kind, work in seconds.items()},
            memory=self._memory(),
            saved_bytes=saved,
            kept_bytes=saved if splits_backward else 0,
            parameters=self._sum("parameters") * self.scheme.tp,
        )

    def _shown(self, work: Work) -> Work:
        """Without the communication that products hide."""
        return Work(compute_s=work.compute_s, communicate_s=work.communicate_s * (1 - self.scheme.hidden))

    # -- communication -----------------------------------------------------------------------------------------------------------------

    def _over_data(self, kind: str, nbytes: float) -> float:
        """Over the ranks that ZeRO divides, or all replicas."""
        scheme = self.scheme
        ranks = scheme.sharded if scheme.zero else scheme.replicas
        return collective_cost(kind, nbytes, ranks, self.between or self.cluster, self.apart or scheme.tp).seconds

    def _across(self, nbytes: float) -> float:
        """Between replicas of what ZeRO divides."""
        scheme = self.scheme
        copies = scheme.replicas // scheme.sharded if scheme.zero else 1
        apart = (self.apart or scheme.tp) * scheme.sharded
        return collective_cost("all_reduce", nbytes / scheme.sharded, copies, self.between or self.cluster, apart).seconds

    def _route(self, cost: PieceCost) -> Work:
        """Rows to the experts' ranks and back."""
        if self.scheme.ep == 1 or not cost.routed:
            return Work()
        each = collective_cost("all_to_all", cost.routed / 2, self.scheme.ep, self.cluster, self.scheme.tp).seconds
        return Work(communicate_s=2 * each)

    def _gather(self, cost: PieceCost) -> float:
        messages = max(1, cost.tensors) if self.scheme.gather_each else 1
        return messages * self._over_data("all_gather", cost.parameters * cost.item / messages) if self.scheme.zero == 3 else 0.0

    def _scatter(self, cost: PieceCost) -> float:
        trained = cost.parameters - cost.frozen
        messages = max(1, cost.tensors) if self.scheme.gather_each else 1
        return (
            messages * self._over_data("reduce_scatter", trained * self.scheme.gradient_bytes / messages) if self.scheme.zero == 3 else 0.0
        )

    def _reduce(self, backward_s: float) -> float:
        """What is left of the reductions when the last microbatch's backward pass has ended."""
        scheme, trained = self.scheme, self._sum("parameters") - self._sum("frozen")
        gradients = (trained - self._sum("experts") * (1 - 1 / scheme.ep)) * scheme.gradient_bytes
        pending = collective_cost("all_reduce", self._sum("pending") * scheme.gradient_bytes, scheme.tp, self.cluster).seconds
        if scheme.zero == 3:
            return pending + self._across(gradients)
        if scheme.replicas == 1:
            return pending
        if scheme.zero == 0:
            reduced, gathered = self._over_data("all_reduce", gradients), 0.0
        else:
            reduced = self._over_data("reduce_scatter", gradients) + self._across(gradients)
            gathered = self._over_data("all_gather", self._sum("parameters") * self._item())
        hidden = scheme.overlap * backward_s
        forward_s = sum(cost.forward.compute_s * count for cost, count, _ in self._each())
        return pending + max(reduced - hidden, reduced * 0.05) + max(gathered - scheme.overlap * forward_s, gathered * 0.05)

    def _item(self) -> int:
        return max((cost.item for cost, _, _ in self._each()), default=2)

    def _update(self) -> float:
        numbers = self._states()
        return numbers * _UPDATE_BYTES / self.cluster.rates.read_bytes_per_s.at(1e9)

    def _states(self) -> float:
        """Numbers whose states a rank has: those of experts are divided among fewer ranks, being fewer."""
        trained, experts = self._sum("parameters") - self._sum("frozen"), self._sum("experts")
        return (trained - experts) / self.scheme.sharded + experts / max(1, self.scheme.sharded // self.scheme.ep)

    # -- memory ------------------------------------------------------------------------------------------------------------------------

    def _saved(self) -> int:
        return sum(_kept(cost, again) * count for cost, count, again in self._each())

    def _memory(self) -> dict[str, int]:
        scheme, parameters, frozen = self.scheme, self._sum("parameters"), self._sum("frozen")
        trained, item = parameters - frozen, self._item()
        largest = max((cost.parameters for cost, _, _ in self._each()), default=0)
        again = max((cost.saved - _kept(cost, once_more) for cost, _, once_more in self._each()), default=0)
        share = scheme.sharded
        gathered = 2 * largest * item if scheme.zero == 3 else 0
        return {
            "parameters": parameters * item // (share if scheme.zero == 3 else 1),
            "gradients": trained * scheme.gradient_bytes // (share if scheme.zero >= 2 else 1),
            "optimizer": int(self._states() * _STATE_BYTES),
            "saved": 0,
            "transient": int((max((cost.transient for cost, _, _ in self._each()), default=0) + again) * _FRAGMENTS) + gathered,
            "runtime": int(_CONTEXT_BYTES),
        }


def recomputed(cost: PieceCost, recompute: str) -> Work:
    """What the backward pass computes once more."""
    products = Work(compute_s=cost.forward.compute_s - cost.light.compute_s)
    return {"none": Work(), "selective": cost.light, "alternate": cost.light + _times(products, 0.5), "full": cost.forward}[recompute]


def _kept(cost: PieceCost, recompute: str) -> int:
    """Bytes that a microbatch keeps."""
    made = {"selective": cost.made, "alternate": cost.made // 2, "full": 0}
    return cost.saved if recompute == "none" else min(cost.saved, cost.entered + made[recompute])


def _times(work: Work, count: float) -> Work:
    return Work(compute_s=work.compute_s * count, communicate_s=work.communicate_s * count)


def _beside(work: Work, collective_s: float, overlap: float) -> Work:
    """A collective that runs while the work does: what it takes longer, and the part that never hides."""
    total = overlap * (work.compute_s + work.communicate_s)
    return Work(compute_s=work.compute_s, communicate_s=work.communicate_s + max(collective_s - total, (1 - overlap) * collective_s))
