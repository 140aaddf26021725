"""Which layouts there are for a deep model on equal devices, and what a user pins of them.

    Split      tp × cp × ep, attention, samples, precision  each costs a lowering
      mesh     dp × pp                                       what is left of the devices
        Scheme ZeRO × recomputation × schedule × chunks      the same pieces, put together in another way

All devices are used and all microbatches are equal. What is not pinned is open; pins that contradict each other are found by leaving them
out one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from typing import Any

from shardwise.capture.precision import Precision
from shardwise.cost.routing import Routing
from shardwise.errors import LayoutError
from shardwise.planner.compose import Scheme
from shardwise.planner.lacking import lacking
from shardwise.program.tables import NAMES
from shardwise.sharding.context import ATTENTION, Attention

__all__ = ["Pins", "Space", "Split", "layout_text"]

_TP = (1, 2, 4, 8, 16)
_CP = (1, 2, 4, 8, 16)
_SAMPLES = (1, 2, 4, 8, 16)
_CHUNKS = (2, 4, 8)
_MOST_CHUNKS = 12
_RECOMPUTE = ("none", "selective", "full")
_NUMBERS = ("dp", "cp", "tp", "ep", "pp", "chunks", "zero", "microbatches", "microbatch")


@dataclass(frozen=True, kw_only=True)
class Split:
    """What decides the pieces' costs: ranks that share operators, sequences and experts, how they do attention together, the samples of a
    microbatch, and in which precision."""

    tp: int = 1
    cp: int = 1
    attention: Attention = "gather"
    ep: int = 1
    samples: int = 1
    precision: Precision = "bf16"

    @classmethod
    def of(cls, scheme: Scheme, samples: int) -> Split:
        """That of a layout."""
        sizes = {name: getattr(scheme, name) for name in ("tp", "cp", "attention", "ep", "precision")}
        return cls(**sizes, samples=samples)


@dataclass(frozen=True, kw_only=True)
class Pins:
    """What a user pins of a layout, None where it is open: `"tp=8,pp=16,zero=1,recompute=full"`.

    microbatch: samples of one on a data rank; microbatches: how many; chunks: stages of a pipeline rank; the others as of `Scheme`.
    """

    dp: int | None = None
    cp: int | None = None
    tp: int | None = None
    ep: int | None = None
    pp: int | None = None
    chunks: int | None = None
    zero: int | None = None
    microbatches: int | None = None
    microbatch: int | None = None
    attention: str | None = None
    schedule: str | None = None
    recompute: str | None = None

    @classmethod
    def parse(cls, given: Pins | str | Mapping[str, Any] | None) -> Pins:
        """Reads text or a mapping. Raises LayoutError for what is not understood."""
        if given is None or isinstance(given, Pins):
            return given or cls()
        pairs = dict(given) if isinstance(given, Mapping) else _pairs(given)
        words = {"attention": ATTENTION, "schedule": NAMES, "recompute": _RECOMPUTE}
        for name, value in pairs.items():
            if name in words:
                if value not in words[name]:
                    raise LayoutError(f"{name}={value} in the layout is unknown; there are {', '.join(words[name])}")
            elif name in _NUMBERS:
                pairs[name] = _number(name, value)
            else:
                raise LayoutError(f"{name!r} in the layout is unknown; there are {', '.join((*_NUMBERS, *words))}")
        return cls(**pairs)

    @property
    def named(self) -> dict[str, int | str]:
        """Those that are pinned."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) is not None}

    def without(self, names: Sequence[str]) -> Pins:
        """The others."""
        return replace(self, **dict.fromkeys(names))

    def __str__(self) -> str:
        return ",".join(f"{name}={value}" for name, value in self.named.items())


def _pairs(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise LayoutError(f"{item!r} in layout {text!r} is no NAME=VALUE pair; write for example tp=8,pp=16,zero=1")
        if name in found:
            raise LayoutError(f"{name} is named twice in layout {text!r}")
        found[name] = value
    return found


def _number(name: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = -1
    least, most = (0, 3) if name == "zero" else (1, None)
    if number < least or (most is not None and number > most) or (isinstance(value, float) and value != number):
        wanted = "0, 1, 2 or 3" if most else "a whole number of 1 or more"
        raise LayoutError(f"{name}={value} in the layout is not {wanted}")
    return number


def layout_text(scheme: Scheme, samples: int) -> str:
    """The layout in the words of `Pins`; what is as usual is left out, and its precision."""
    words = [f"{name}={getattr(scheme, name)}" for name in ("dp", "cp", "tp", "ep", "pp") if getattr(scheme, name) > 1 or name == "dp"]
    words += [f"attention={scheme.attention}"] if scheme.cp > 1 else []
    words += [f"microbatches={scheme.microbatches}", f"microbatch={samples}"]
    words += [f"schedule={scheme.schedule}"] if scheme.pp > 1 else []
    words += [f"chunks={scheme.chunks}"] if scheme.chunks > 1 else []
    words += [f"zero={scheme.zero}"] if scheme.zero else []
    words += [f"recompute={scheme.recompute}"] if scheme.recompute != "none" else []
    return ",".join(words)


def _gathers(attention: str, cp: int, tp: int) -> bool:
    return attention == "gather"


@dataclass(frozen=True, kw_only=True)
class Space:
    """All layouts of a model on so many ranks.

    near: ranks that the links within a node join, beyond which tp does not go unless it is pinned; blocks: of the model, its stages are
    at most as many; most_samples: of the largest microbatch; routing: how tokens get to experts, None where there are none.
    sequences: whether they can be split; shares: whether attention can be done in a way by so many ranks of cp, and of tp.
    precisions: those that are tried. runnable: only what runs today.
    """

    ranks: int
    near: int
    blocks: int
    global_batch: int
    most_samples: int
    routing: Routing | None = None
    sequences: bool = True
    shares: Callable[[str, int, int], bool] = _gathers
    precisions: Sequence[Precision] = ("bf16",)
    pins: Pins = field(default_factory=Pins)
    runnable: bool = False

    def splits(self) -> Iterator[Split]:
        """Every split that has a mesh."""
        sizes = self._sizes("tp", [size for size in _TP if size <= self.near]), self._sizes("cp", _CP if self.sequences else (1,))
        for precision, tp, cp in product(self.precisions, *sizes):
            for attention, ep, samples in product(self._attentions(cp, tp), self._eps(), self._samples()):
                split = Split(tp=tp, cp=cp, attention=attention, ep=ep, samples=samples, precision=precision)
                if next(self.meshes(split), None) is not None:
                    yield split

    def meshes(self, split: Split) -> Iterator[tuple[int, int]]:
        """(dp, pp) of a split: all devices are used, and the batch is divided evenly."""
        inside = split.tp * split.cp
        if self.ranks % inside:
            return
        left = self.ranks // inside
        pins = self.pins
        for pp in [pins.pp] if pins.pp else (size for size in range(1, min(self.blocks, left) + 1) if left % size == 0):
            dp, rest = divmod(left, pp)
            if rest or (pins.dp or dp) != dp or self.global_batch % (dp * split.samples) or (inside * dp) % split.ep:
                continue
            if (pins.microbatches or 0) in (0, self.global_batch // (dp * split.samples)):
                yield dp, pp

    def plain(self, split: Split, dp: int, pp: int) -> Scheme:
        """The usual scheme of a split on one of its meshes."""
        return Scheme(
            dp=dp,
            tp=split.tp,
            pp=pp,
            cp=split.cp,
            attention=split.attention,
            ep=split.ep,
            routing=self.routing,
            microbatches=self.global_batch // (dp * split.samples),
            precision=split.precision,
        )

    def schemes(self, split: Split, mesh: tuple[int, int] | None = None) -> Iterator[Scheme]:
        """Every scheme of a split, on one of its meshes or on all."""
        for dp, pp in self.meshes(split) if mesh is None else [mesh]:
            plain = self.plain(split, dp, pp)
            for schedule, chunks in self._orders(pp, plain.microbatches):
                for zero in self._zeros(dp * split.cp):
                    for recompute in [self.pins.recompute] if self.pins.recompute else _RECOMPUTE:
                        scheme = replace(plain, chunks=chunks, schedule=schedule, zero=zero, recompute=recompute)
                        if not (self.runnable and lacking(scheme)):
                            yield scheme

    @property
    def experts(self) -> int:
        """Of a block."""
        return self.routing.experts if self.routing else 0

    def check(self) -> None:
        """LayoutError where there is no layout, naming the fewest pins that exclude each other."""
        if self._any():
            return
        left = list(self.pins.named)
        for name in list(left):
            rest = [each for each in left if each != name]
            if not replace(self, pins=self._only(rest))._any():
                left = rest
        named = self._only(left)
        words = [f"{name}={value}" for name, value in named.named.items()]
        if self.runnable and replace(self, runnable=False, pins=named)._any():
            words.append("--runnable")
        what = {0: "no layout is left", 1: f"{''.join(words)} cannot be"}
        raise LayoutError(f"{what.get(len(words)) or ' and '.join(words) + ' contradict each other'}: {self._why(named)}")

    # -- sizes -------------------------------------------------------------------------------------------------------------------------

    def _any(self) -> bool:
        return any(next(self.schemes(split), None) is not None for split in self.splits())

    def _only(self, names: Sequence[str]) -> Pins:
        return self.pins.without([name for name in self.pins.named if name not in names])

    def _sizes(self, name: str, usual: Sequence[int]) -> list[int]:
        pinned = getattr(self.pins, name)
        return [size for size in ([pinned] if pinned else usual) if self.ranks % size == 0]

    def _attentions(self, cp: int, tp: int) -> list[Attention]:
        """In which ways ranks may do it together; none by themselves where one is pinned."""
        if cp == 1:
            return [] if self.pins.attention else ["gather"]
        return [each for each in ATTENTION if self.pins.attention in (None, each) and self.shares(each, cp, tp)]

    def _eps(self) -> list[int]:
        sizes = [self.pins.ep] if self.pins.ep else [1, *(size for size in range(2, self.experts + 1) if self.experts % size == 0)]
        return [size for size in sizes if size == 1 or (self.experts and self.experts % size == 0)]

    def _samples(self) -> list[int]:
        sizes = [self.pins.microbatch] if self.pins.microbatch else sorted({*_SAMPLES, self.most_samples})
        return [size for size in sizes if self.global_batch % size == 0 and self.most_samples % size == 0]

    def _orders(self, pp: int, microbatches: int) -> Iterator[tuple[str, int]]:
        """(schedule, chunks) that a pipeline of so many ranks may have."""
        pins = self.pins
        if pp == 1:
            orders = [("1f1b", 1)]
        else:
            most = self.blocks // pp
            each = sorted({*_CHUNKS, *(size for size in range(2, min(most, _MOST_CHUNKS) + 1) if most % size == 0)})
            if pins.chunks and pins.chunks > 1:
                each = [pins.chunks]
            orders = [(name, 1) for name in ("1f1b", "gpipe", "zb-h1", "zb-2p")]
            orders += [("zb-v", 2)] if most >= 2 else []
            orders += [("interleaved", size) for size in each if size <= most and microbatches >= pp]
        for schedule, chunks in orders:
            if pins.schedule in (None, schedule) and pins.chunks in (None, chunks):
                yield schedule, chunks

    def _zeros(self, replicas: int) -> list[int]:
        usual = [0] if replicas == 1 else [0, 1, 2, 3]
        return [zero for zero in usual if self.pins.zero in (None, zero)]

    # -- why there is none -------------------------------------------------------------------------------------------------------------

    def _why(self, pins: Pins) -> str:
        """In words, for pins that exclude each other."""
        sizes = [value for name in ("dp", "cp", "tp", "pp") if (value := getattr(pins, name))]
        taken = 1
        for size in sizes:
            taken *= size
        named = set(pins.named)
        if (len(sizes) == 4 and taken != self.ranks) or taken > self.ranks:
            return f"they take {taken:,} devices, the cluster has {self.ranks:,}; change one of them, or the cluster"
        if named and named <= {"dp", "cp", "tp", "pp"} and self.ranks % taken:
            return f"{taken:,} does not divide the cluster's {self.ranks:,} devices; pin sizes whose product does"
        free = replace(self, runnable=False, pins=pins)
        first = next((each for split in free.splits() for each in free.schemes(split)), None) if self.runnable else None
        if first is not None:
            return f"the runtime lacks {', '.join(lacking(first))}"
        if (pins.dp and self.global_batch % pins.dp) or {"microbatches", "microbatch"} & named:
            parts = " × ".join(f"{name}={getattr(pins, name)}" for name in ("dp", "microbatches", "microbatch") if getattr(pins, name))
            most = f", and microbatches of up to {self.most_samples} samples are costed" if pins.microbatch else ""
            return f"{parts or 'no division'} must divide a batch of {self.global_batch:,} samples{most}; change one of them, or the batch"
        if pins.schedule or pins.chunks:
            return (
                "gpipe, 1f1b, zb-h1 and zb-2p have one stage a rank (chunks=1), zb-v two, interleaved two or more and at least as many "
                f"microbatches as ranks; all but 1f1b need pp of 2 or more; the model has {self.blocks} blocks for pp × chunks stages"
            )
        if pins.zero:
            return f"zero={pins.zero} divides what data ranks have in common, and there is only one; let dp or cp be 2 or more"
        if pins.ep:
            return f"ep divides the experts of a block ({self.experts or 'this model has none'}) among tp × cp × dp ranks"
        if pins.pp:
            return f"the model has {self.blocks} blocks for pp={pins.pp} stages on {self.ranks:,} devices"
        if pins.attention:
            return f"attention={pins.attention} says how the ranks of cp share it, and none can; leave attention open, or pin another cp"
        if pins.cp and not self.sequences:
            return "the model's inputs have no sequence that could be split"
        return f"no mesh of {self.ranks:,} devices divides a batch of {self.global_batch:,} samples in this way; change the batch"
