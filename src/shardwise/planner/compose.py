"""Pieces × how a step is run ──▶ Profile: what each stage takes in time and memory, for the simulator.

    seconds of a stage     the sum of its pieces'; recomputation adds the forward pass to the backward pass
    gradients              all-reduced over the data ranks, or reduced to parts of which the updated parameters are gathered (ZeRO)
    ZeRO-2                 gradients reduced to parts in every microbatch, while the piece before it computes
    ZeRO-3                 parameters gathered, too, before each use, in every microbatch, while the piece before it computes
    memory                 parameters, gradients and states by their dtypes and their division; what microbatches in flight keep

Sources: ZeRO, Rajbhandari et al. 2020; recomputation, Chen et al. 2016 and Korthikanti et al. 2022; 1F1B and interleaving, Narayanan et al.
2021.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf

from shardwise.capture.precision import Precision
from shardwise.cluster.model import Cluster
from shardwise.cost.collectives import collective_cost, crossing_of
from shardwise.cost.routing import Routing, routing_seconds
from shardwise.errors import LayoutError
from shardwise.planner.pieces import Outline, PieceCost, Work
from shardwise.program.tables import placement
from shardwise.sharding.context import Attention
from shardwise.simulate.profile import EdgeProfile, Profile, StageProfile
from shardwise.simulate.simulator import Mesh

__all__ = [
    "CONTEXT_BYTES",
    "Scheme",
    "backward_work",
    "compose",
    "divide",
    "forward_work",
    "hop_seconds",
    "recomputed",
    "routed_seconds",
    "stage_memory",
    "stage_profile",
]

_COPYING = 0.15  # of a device computes nothing while rows are copied: DeepEP's 20 of 132 multiprocessors of an H100
_UPDATE_BYTES = 28  # read and written by the update of one number: gradient 4, float32 value and moments 24; beside: a 16-bit value
CONTEXT_BYTES = 1.65e9  # CUDA context and kernels: 1,573 MiB on an A100 (BigScience, tr11-176B-ml/chronicles-prequel.md, 2022)
_RESTART_S = 100e-6  # from a device's rest to its first kernels: the host returns, launches a message and then the next pass
_COMMUNICATOR_BYTES = 0.2e9  # NCCL: 4 MiB buffers (NCCL_BUFFSIZE) × 16 channels × ring, tree up and tree down


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a step is run.

    dp, cp, tp, pp: ranks; chunks: stages of each pipeline rank; attention: how the ranks of cp do it together, as of plans.
    ep: over how many consecutive tensor, context and data ranks experts are divided, each whole on one rank (the pieces hold one rank's
    share of them); routing: how tokens get there, wanted where ep > 1.
    zero: 0 to 3; shard: over how many data ranks ZeRO divides, all of them if 0.
    recompute: what a block computes again, a policy of `planner/keeping.py`; remade: what is made again anyhow, as said
    there, and "blocks" for all within blocks alone; None for what the cluster's rates say of fused kernels.
    precision: in which operators compute, as of plans; the pieces are of a model in it. gradient_bytes: of a number's gradient in memory
    and on the link. copied: whether a 16-bit value is held beside the float32 one; step_bytes: that the update takes beside, of the numbers
    that the rank updates.
    bucket_bytes: at most, of gradients that are put together to be reduced. keeps_sent: whether a stage's result is held until its backward
    pass, though nothing of that reads it (Korthikanti et al. 2022, appendix B).
    even: stages of equally many blocks, the first and last with what stands before and after them, which count as a block each where only
    so all stages have as many; else stages of equal time.
    overlap: of the last microbatch's backward pass, beside which gradients are reduced; of the first's forward pass, beside which
    updated parameters are gathered; of a piece, beside which ZeRO-3 gathers the next. hidden: of what the ranks of the tensor axis send
    each other, that products hide. gather_each: whether ZeRO-3 gathers each matrix by itself, not a block's parameters together; part_s:
    that the host takes meanwhile for each rank's part of it.
    waits: whether a rank computes nothing until what it sends to the next stage is there. whole_messages: whether every tensor rank sends
    all of a message that all of them have. peer_bytes_per_s: that the library which sends takes at most from
    a rank to one in another node.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    attention: Attention = "gather"
    ep: int = 1
    routing: Routing | None = None
    chunks: int = 1
    microbatches: int = 1
    schedule: str = "1f1b"
    zero: int = 0
    shard: int = 0
    recompute: str = "none"
    remade: str | None = None
    precision: Precision = "bf16"
    gradient_bytes: int = 4
    copied: bool = True
    step_bytes: int = 0
    bucket_bytes: int = 0
    keeps_sent: bool = False
    even: bool = False
    overlap: float = 0.85
    hidden: float = 0.0
    gather_each: bool = False
    part_s: float = 0.0
    waits: bool = False
    whole_messages: bool = False
    peer_bytes_per_s: float = inf

    def __post_init__(self) -> None:
        if self.ep > 1 and (self.routing is None or self.tp * self.replicas % self.ep):
            missing = "without its routing" if self.routing is None else f"does not divide tp·cp·dp = {self.tp * self.replicas}"
            raise LayoutError(f"ep={self.ep} {missing}: give the experts of a layer and how many a token has, and a divisor of the ranks")

    @property
    def state_bytes(self) -> int:
        """Of a number, beside what operators read: Adam's two moments, and in mixed precision its float32 value."""
        return 8 if self.precision == "float32" else 12

    @property
    def stages(self) -> int:
        """Of the pipeline, all chunks."""
        return self.pp * self.chunks

    @property
    def mesh(self) -> Mesh:
        """For the simulator: data and sequence ranks do alike."""
        sizes = {"dp": self.replicas, "tp": self.tp, "pp": self.pp, "chunks": self.chunks, "coupled": self.coupled}
        return Mesh(**sizes, microbatches=self.microbatches, schedule=self.schedule)

    @property
    def coupled(self) -> int:
        """Neighbouring ranks that do each microbatch together: those that share operators, sequences, experts, or gather parameters."""
        return self.tp * max(self.cp, self.ep, self.sharded if self.zero == 3 else 1)

    @property
    def replicas(self) -> int:
        """Ranks over which gradients are summed."""
        return self.dp * self.cp

    @property
    def sharded(self) -> int:
        """Ranks over which ZeRO divides what it divides."""
        return min(self.shard or self.replicas, self.replicas) if self.zero else 1

    @property
    def expert_copies(self) -> int:
        """Ranks that hold the same experts, `expert_stride` ranks apart."""
        return self.replicas if self.ep == 1 else max(1, self.tp * self.replicas // self.ep)

    @property
    def expert_stride(self) -> int:
        """Where experts are not divided they lie as the rest does."""
        return self.tp if self.ep == 1 else self.ep

    @property
    def expert_sharded(self) -> int:
        """Ranks over which ZeRO divides what experts take: of those that it divides the rest over, the ones that hold the same."""
        return max(1, self.expert_copies * self.sharded // self.replicas)


def divide(shape: Outline, costs: Sequence[PieceCost], scheme: Scheme) -> list[list[tuple[int, int]]]:
    """For each stage its (piece, how many of it), in order. LayoutError where there are more stages than parts."""
    units: list[tuple[int, float]] = []
    for index, (piece, cost) in enumerate(zip(shape.pieces, costs, strict=True)):
        units += [(index, _seconds(cost, scheme))] * piece.count
    blocks = [place for place, (index, _) in enumerate(units) if shape.pieces[index].count > 1]
    if scheme.stages > max(len(units), 1):
        raise LayoutError(f"pp={scheme.pp} × {scheme.chunks} chunks are more stages than the {len(units)} parts of the model; use fewer")
    if scheme.even and len(blocks) >= scheme.stages:
        each, more = divmod(len(blocks), scheme.stages)
        inner: list[int] = []
        done = 0
        for stage in range(scheme.stages - 1):
            done += each + (stage > 0 if more == scheme.stages - 2 else stage < more)
            inner.append(blocks[done - 1] + 1)
        ends = (*inner, len(units))
    else:
        ends = _balanced(tuple(seconds for _, seconds in units), scheme.stages)
    return [_counted(units[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


def _counted(units: Sequence[tuple[int, float]]) -> list[tuple[int, int]]:
    found: dict[int, int] = {}
    for index, _ in units:
        found[index] = found.get(index, 0) + 1
    return list(found.items())


@lru_cache(maxsize=4096)
def _balanced(seconds: tuple[float, ...], stages: int) -> tuple[int, ...]:
    """Ends of so many runs of which the longest is as short as can be, by bisection. Many schemes of a split divide it alike."""
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
    return (*ends, len(seconds))


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
    stages = [tuple(parts) for parts in divide(shape, costs, scheme)]
    each = {
        parts: _Stage(shape=shape, costs=costs, parts=parts, scheme=scheme, cluster=cluster).profile(splits_backward=splits_backward)
        for parts in dict.fromkeys(stages)  # most are alike
    }
    sent = [costs[parts[-1][0]].sent for parts in stages[:-1]]
    profile = Profile(stages=[each[parts] for parts in stages], edges=list(_edges(sent, scheme, cluster)), cores=None)
    return _waiting(profile, scheme) if scheme.waits else profile


def _waiting(profile: Profile, scheme: Scheme) -> Profile:
    """Sending as part of the pass that made the message, after which the device rests; between stages of one rank nothing is sent."""
    home = placement(scheme.schedule, scheme.pp, scheme.chunks)
    sent = [edge.transfer_s + _RESTART_S if home[edge.source] != home[edge.target] else 0.0 for edge in profile.edges]
    stages = [
        stage.model_copy(
            update={"seconds": stage.seconds | {"forward": _longer(stage, "forward", on), "backward": _longer(stage, "backward", back)}}
        )
        for stage, on, back in zip(profile.stages, [*sent, 0.0], [0.0, *sent], strict=True)
    ]
    return profile.model_copy(update={"stages": stages, "edges": [edge.model_copy(update={"transfer_s": 0.0}) for edge in profile.edges]})


def _longer(stage: StageProfile, kind: str, seconds: float) -> tuple[float, float]:
    compute_s, communicate_s = stage.seconds[kind]
    return compute_s, communicate_s + seconds


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
    next; experts are not divided then (ep = 1).
    """
    stage = _Stage(shape=shape, costs=costs, parts=parts, scheme=scheme, cluster=cluster, between=between, apart=apart)
    return stage.profile(splits_backward=False)


def stage_memory(
    shape: Outline, costs: Sequence[PieceCost], parts: Sequence[tuple[int, int]], scheme: Scheme, cluster: Cluster
) -> tuple[dict[str, int], int]:
    """(bytes by kind, bytes that a microbatch keeps) of a stage, as its profile says; its times are not costed for it."""
    stage = _Stage(shape=shape, costs=costs, parts=parts, scheme=scheme, cluster=cluster)
    return stage.memory(), stage.saved()


def hop_seconds(nbytes: float, tp: int, cluster: Cluster, send: Callable[[float], float]) -> float:
    """Of a message from stage to stage. A message that all tensor ranks have whole is sent in parts and put together beyond, where that is
    faster (Narayanan et al. 2021, section 4.1). send: bytes → seconds from one rank to its neighbour; cluster: of the tensor ranks."""
    return min(send(nbytes), send(nbytes / tp) + collective_cost("all_gather", nbytes, tp, cluster).seconds)


def _edges(sent: Sequence[int], scheme: Scheme, cluster: Cluster) -> Iterator[EdgeProfile]:
    """sent: bytes that each stage but the last sends on."""
    stride = scheme.dp * scheme.cp * scheme.tp
    apart = scheme.pp > 1 and cluster.machines is not None and crossing_of(cluster.machines, 2, stride).nodes > 1

    def send(nbytes: float) -> float:
        seconds = collective_cost("send_recv", nbytes, 2, cluster, stride).seconds
        return max(seconds, nbytes / scheme.peer_bytes_per_s) if apart else seconds

    whole = 1 if scheme.whole_messages else scheme.tp
    hops = {nbytes: 0.0 if scheme.pp == 1 else hop_seconds(nbytes, whole, cluster, send) for nbytes in set(sent)}
    for number, nbytes in enumerate(sent):
        hop_s = hops[nbytes]
        yield EdgeProfile(name=f"h→{number + 1}", source=number, target=number + 1, nbytes=nbytes, transfer_s=hop_s, requires_grad=True)


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
            yield self.costs[index], count, self.scheme.recompute if self._is_block(index) else "none"

    def _is_block(self, index: int) -> bool:
        return self.shape.pieces[index].count > 1

    def _sum(self, field: str) -> int:
        return sum(getattr(cost, field) * count for cost, count, _ in self._each())

    def _parameters(self) -> int:
        """What two pieces hold once."""
        here = {index for index, _ in self.parts}
        return self._sum("parameters") - sum(size for index in here for other, size in self.costs[index].tied.items() if other in here)

    def profile(self, *, splits_backward: bool) -> StageProfile:
        forward = backward = weight = Work()
        for cost, count, again in self._each():
            gathered, scattered, routed = self._gather(cost), self._scatter(cost), routed_seconds(cost, self.scheme, self.cluster)
            inputs, weights = backward_work(cost, self.scheme, again, routed, apart=splits_backward)
            forward += _times(self._beside(forward_work(cost, self.scheme, routed), gathered), count)
            if splits_backward:
                backward += _times(self._beside(inputs, gathered), count)
                weight += _times(self._beside(weights, scattered), count)
            else:
                backward += _times(self._beside(inputs, gathered + scattered), count)
        prelude = Work()
        for cost, _, _ in self._each():
            prelude += cost.prelude
            forward += cost.shared
        seconds = {
            "prelude": prelude,
            "forward": forward,
            "backward": backward,
            "reduce": Work(communicate_s=self._reduce((backward + weight).compute_s)),
            "update": Work(compute_s=self._update()),
        } | ({"weight": weight} if splits_backward else {})
        return StageProfile(
            seconds={kind: (work.compute_s, work.communicate_s) for kind, work in seconds.items()},
            memory=self.memory(),
            saved_bytes=self.saved(),
            kept_bytes=sum(cost.held.late * count for cost, count, _ in self._each()) if splits_backward else 0,
            reduces=["dp"] if self.scheme.replicas > 1 else [],
            parameters=self._parameters() * self.scheme.tp,
        )

    # -- communication -----------------------------------------------------------------------------------------------------------------

    def _over_data(self, kind: str, numbers: float, experts: float, item: int) -> float:
        """Of so many numbers, among them experts', over the ranks that ZeRO divides, or all replicas."""
        scheme = self.scheme
        scheme, cluster, stride = self.scheme, self.between or self.cluster, self.apart or self.scheme.tp
        ranks, copies = (scheme.sharded, scheme.expert_sharded) if scheme.zero else (scheme.replicas, scheme.expert_copies)
        dense = collective_cost(kind, (numbers - experts) * item, ranks, cluster, stride).seconds
        apart = self.apart or scheme.expert_stride
        return dense + (collective_cost(kind, experts * item, copies, cluster, apart).seconds if experts else 0.0)

    def _across(self, numbers: float, experts: float, item: int) -> float:
        """Between replicas of what ZeRO divides."""
        scheme, cluster, total = self.scheme, self.between or self.cluster, 0.0
        if not scheme.zero:
            return total
        for part, held, shards, stride in (
            (numbers - experts, scheme.replicas, scheme.sharded, self.apart or scheme.tp),
            (experts, scheme.expert_copies, scheme.expert_sharded, self.apart or scheme.expert_stride),
        ):
            each = part * item / shards
            total += collective_cost("all_reduce", each, held // shards, cluster, stride * shards).seconds if part else 0.0
        return total

    def _beside(self, work: Work, collective_s: float) -> Work:
        return _beside(work, collective_s, self.scheme.overlap)

    def _gather(self, cost: PieceCost) -> float:
        return self._by_piece("all_gather", cost, cost.parameters, cost.item) if self.scheme.zero == 3 else 0.0

    def _scatter(self, cost: PieceCost) -> float:
        trained = cost.parameters - cost.frozen
        return self._by_piece("reduce_scatter", cost, trained, self.scheme.gradient_bytes) if self._keeps_parts else 0.0

    def _by_piece(self, kind: str, cost: PieceCost, numbers: int, item: int) -> float:
        """What ZeRO sends for each piece in each pass."""
        messages = max(1, cost.matrices) if self.scheme.gather_each else 1
        parts_s = self.scheme.part_s * self.scheme.sharded
        return messages * (self._over_data(kind, numbers / messages, cost.experts / messages, item) + parts_s)

    @property
    def _keeps_parts(self) -> bool:
        """Whether gradients are reduced to parts in every microbatch, since nobody has room for whole ones."""
        return self.scheme.zero == 3 or (self.scheme.zero == 2 and self.scheme.microbatches > 1)

    def _reduce(self, backward_s: float) -> float:
        """What is left of the reductions when the last microbatch's backward pass has ended."""
        scheme, trained, experts = self.scheme, self._parameters() - self._sum("frozen"), self._sum("experts")
        item, summed = scheme.gradient_bytes, self._sum("pending") - (self._sum("pending_experts") if scheme.ep > 1 else 0)
        pending = collective_cost("all_reduce", summed * item, scheme.tp, self.cluster).seconds
        if scheme.zero == 3:
            return pending + self._across(trained, experts, item)
        if scheme.replicas == scheme.expert_copies == 1:
            return pending
        if scheme.zero == 0:
            reduced, gathered = self._over_data("all_reduce", trained, experts, item), 0.0
        else:
            scattered = 0.0 if self._keeps_parts else self._over_data("reduce_scatter", trained, experts, item)
            reduced = scattered + self._across(trained, experts, item)
            gathered = self._over_data("all_gather", self._parameters(), experts, self._item())
        hidden = scheme.overlap * backward_s
        forward_s = sum(cost.forward.compute_s * count for cost, count, _ in self._each())
        return pending + max(reduced - hidden, reduced * 0.05) + max(gathered - scheme.overlap * forward_s, gathered * 0.05)

    def _item(self) -> int:
        return max((cost.item for cost, _, _ in self._each()), default=2)

    def _update(self) -> float:
        numbers, written = self._states(), 0 if self.scheme.precision == "float32" else 2
        return numbers * (_UPDATE_BYTES + written) / self.cluster.rates.read_bytes_per_s.at(1e9)

    def _states(self) -> float:
        """Numbers whose states a rank has."""
        return self._share(self._parameters() - self._sum("frozen"))

    def _share(self, numbers: float) -> float:
        """What ZeRO leaves a rank of so many numbers, among them experts': those are divided among fewer ranks, having fewer copies."""
        experts = self._sum("experts")
        return (numbers - experts) / self.scheme.sharded + experts / self.scheme.expert_sharded

    # -- memory ------------------------------------------------------------------------------------------------------------------------

    def _remade(self, index: int) -> str:
        found = self.scheme.remade or ("all" if self.cluster.rates.fuses else "none")
        return found if found != "blocks" else "all" if self._is_block(index) else "none"

    def saved(self) -> int:
        """Bytes that a microbatch keeps for its backward pass."""
        sent = self.costs[self.parts[-1][0]].sent if self.scheme.keeps_sent else 0
        shared = sum(self.costs[index].held.shared for index, _ in self.parts)
        return sent + shared + sum(kept * count for (_, count, _), (kept, _, _) in zip(self._each(), self._held(), strict=True))

    def _held(self) -> Iterator[tuple[int, int, int]]:
        """Of each kind of piece what one keeps of a microbatch, the most beside, and what the allocator takes beside both."""
        for (index, _), (cost, _, again) in zip(self.parts, self._each(), strict=True):
            remade = self._remade(index)
            yield cost.held.kept(again, remade), cost.held.beside(again, remade), cost.held.cached[remade]

    def memory(self) -> dict[str, int]:
        """Bytes by kind, without what microbatches in flight keep."""
        scheme, parameters, frozen = self.scheme, self._parameters(), self._sum("frozen")
        trained, held = parameters - frozen, parameters if self.scheme.copied else frozen
        beside = max(beside for _, beside, _ in self._held())
        return {
            "parameters": int((self._share(held) if scheme.zero == 3 and scheme.copied else held) * self._item()),
            "gradients": int((self._share(trained) if scheme.zero >= 2 else trained) * scheme.gradient_bytes),
            "optimizer": int(self._states() * (scheme.state_bytes + scheme.step_bytes)),
            "saved": 0,
            "transient": beside,
            "cached": max(each + cached for _, each, cached in self._held()) - beside,
            "gathered": self._gathered() + min(scheme.bucket_bytes if scheme.replicas > 1 else 0, trained * scheme.gradient_bytes),
            "runtime": int(CONTEXT_BYTES + self._communicators() * _COMMUNICATOR_BYTES),
        }

    def _gathered(self) -> int:
        """Of parameters that ZeRO-3 divides, those that are whole: what is no block all the time, else a block; and as much for what
        comes first and the next block, gathered into memory of their own (torch, distributed/fsdp/_fully_shard/_fsdp_param_group.py)."""
        if self.scheme.zero < 3:
            return 0
        ends = sum(self.costs[index].parameters for index, _ in self.parts if not self._is_block(index))
        block = max((self.costs[index].parameters for index, _ in self.parts if self._is_block(index)), default=0)
        return 2 * (ends + block) * self._item()

    def _communicators(self) -> int:
        scheme = self.scheme
        return sum(ranks > 1 for ranks in (scheme.tp, scheme.cp, scheme.ep, scheme.replicas)) + 2 * (scheme.pp > 1)


def recomputed(cost: PieceCost, recompute: str) -> Work:
    """What the backward pass computes once more."""
    products = Work(compute_s=cost.forward.compute_s - cost.light.compute_s)
    alternate = cost.light + _times(products, 0.5)
    again = {
        "none": Work(),
        "pointwise": cost.pointwise,
        "attention": cost.light,
        "selective": cost.light,
        "alternate": alternate,
        "full": cost.forward,
    }
    return again[recompute]


def routed_seconds(cost: PieceCost, scheme: Scheme, cluster: Cluster) -> float:
    """Of a microbatch's tokens on their way to their experts' ranks and back, once."""
    routing = scheme.routing
    if routing is None or scheme.ep == 1 or not cost.routed:
        return 0.0
    return routing_seconds(routing, cost.routed / routing.chosen, cost.row, cost.item, scheme.ep, cluster)


def forward_work(cost: PieceCost, scheme: Scheme, routed_s: float) -> Work:
    """A piece's forward pass, ZeRO's messages not counted. routed_s: of `routed_seconds`."""
    return _launched(cost, _routed(_shown(cost.forward, scheme), routed_s, scheme), 1, scheme)


def backward_work(cost: PieceCost, scheme: Scheme, recompute: str, routed_s: float, *, apart: bool) -> tuple[Work, Work]:
    """A piece's backward pass, (inputs' part with what is computed again, weights' part), ZeRO's messages not counted. apart: whether the
    two are run by themselves; else the first is both."""
    passes = 2 if recompute == "full" else 1  # in which tokens go to experts
    inputs = _routed(_shown(cost.backward_input + recomputed(cost, recompute), scheme), passes * routed_s, scheme)
    if apart:
        return _launched(cost, inputs, passes, scheme), _launched(cost, cost.backward_weight, 1, scheme)
    return _launched(cost, inputs + cost.backward_weight, passes + 1, scheme), Work()


def _shown(work: Work, scheme: Scheme) -> Work:
    """Without the communication that products hide."""
    return Work(compute_s=work.compute_s, communicate_s=work.communicate_s * (1 - scheme.hidden))


def _routed(work: Work, routed_s: float, scheme: Scheme) -> Work:
    """With routing, after it or beside it; what copies the rows computes nothing meanwhile."""
    if scheme.routing is None or not scheme.routing.overlapped:
        return work + Work(communicate_s=routed_s)
    return _beside(work + Work(compute_s=_COPYING * routed_s), routed_s, scheme.overlap)


def _beside(work: Work, collective_s: float, overlap: float) -> Work:
    """A collective that runs while the work does: what it takes longer, and the part that never hides."""
    total = overlap * (work.compute_s + work.communicate_s)
    return Work(compute_s=work.compute_s, communicate_s=work.communicate_s + max(collective_s - total, (1 - overlap) * collective_s))


def _launched(cost: PieceCost, work: Work, passes: int, scheme: Scheme) -> Work:
    """Not done before the host has launched it."""
    if scheme.routing is None or not cost.routed:
        return work
    waits = passes * scheme.routing.launch_s - work.compute_s - work.communicate_s
    return work + Work(compute_s=max(0.0, waits))


def _times(work: Work, count: float) -> Work:
    return Work(compute_s=work.compute_s * count, communicate_s=work.communicate_s * count)
