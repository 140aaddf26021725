"""Cluster files: a machine described by a few figures, in TOML.

    name = "8 × A100"                    # optional, else the file's name
    ranks = 8
    memory_gb = 80                       # of each rank, 1 GB = 10⁹ bytes
    backend = "nccl"                     # optional: "nccl" (default) or "gloo"
    # cores = 2                          # only where the ranks share CPU cores: how many

    [rates]                              # of one rank
    matmul_flops = 190e12                # reached by a large product, flop/s: a number, or a table by dtype
    # matmul_flops = { float32 = 60e12, bfloat16 = 190e12 }
    memory_bytes_per_s = 1.4e12          # streaming, reads and writes together
    call_s = 5e-6                        # fixed time of one operator
    # speeds = [1, 1, 0.5]               # optional, of each rank, relative to these figures

    [link]                               # between two ranks, each direction
    latency_s = 8e-6
    bytes_per_s = 230e9

Ranks on several nodes are counted node by node; `[link]` is then that inside a node:

    nodes = 2                            # of equally many ranks

    [network]                            # between nodes
    latency_s = 50e-6
    bytes_per_s = 3e9                    # of a node, in each direction, all its ranks together

Nodes like this machine need no more than `like = "local:4"` instead of memory_gb, backend, cores, [rates] and [link]: each rank is as one
of four on this machine, which are measured.

All figures are *achieved* ones. Collectives are costed by the ring's formulas over the link (Thakur, Rabenseifner, Gropp:
"Optimization of Collective Communication Operations in MPICH", 2005), for every group size.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shardwise.cluster.rates import IMPLEMENTATIONS, CollectiveRate, Curve, MatmulRate, OptimizerRate, Rates
from shardwise.errors import ClusterError

__all__ = ["DescribedLink", "DescribedMachine", "DescribedRates", "read_machine"]

Positive = Annotated[float, Field(gt=0)]
_CONVOLUTIONS = tuple(part + suffix for part in ("forward", "backward_input", "backward_weight") for suffix in ("", "_transposed"))
_BYTES_PER_GB = 1e9
_GIB = float(1 << 30)
_SMALL_PRODUCT_FLOPS, _SMALL_PRODUCT_PART = 2.0 * 64**3, 0.1  # a guess: one tile of a product fills a tenth of a device
_ATTENTION_PART = 0.5  # of the matmul rate; FlashAttention-2 reports 50 to 73 % of A100's peak (Dao, 2023)


class _Described(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DescribedRates(_Described):
    """``[rates]`` of a cluster file: flop/s, byte/s and s of one rank."""

    matmul_flops: Positive | dict[str, Positive]
    memory_bytes_per_s: Positive
    call_s: Annotated[float, Field(ge=0)] = 5e-6
    speeds: tuple[Positive, ...] = ()


class DescribedLink(_Described):
    """``[link]`` of a cluster file: between two ranks, each direction."""

    latency_s: Annotated[float, Field(ge=0)]
    bytes_per_s: Positive


class DescribedMachine(_Described):
    """A cluster file."""

    name: str = ""
    ranks: Annotated[int, Field(ge=1)]
    memory_gb: Positive | None = None
    backend: Annotated[str, Field(pattern="^(nccl|gloo)$")] = "nccl"
    cores: Annotated[int, Field(ge=1)] | None = None
    rates: DescribedRates | None = None
    link: DescribedLink | None = None
    nodes: Annotated[int, Field(ge=1)] = 1
    network: DescribedLink | None = None
    like: Annotated[str, Field(pattern=r"^local:\d+$")] | None = None

    @model_validator(mode="after")
    def _described_once(self) -> DescribedMachine:
        own = ("memory_gb", "rates", "link")
        if self.like is None and (lacks := [name for name in own if getattr(self, name) is None]):
            raise ValueError(f'key {lacks[0]!r} is missing; the file says memory_gb, [rates] and [link], or like = "local:N"')
        if self.like is not None and (extra := [name for name in (*own, "cores", "backend") if name in self.model_fields_set]):
            raise ValueError(f"like = {self.like!r} and {extra[0]!r} say the same; leave one out")
        if self.ranks % self.nodes:
            raise ValueError(f"nodes = {self.nodes} do not divide ranks = {self.ranks}; nodes have equally many ranks")
        if (self.nodes > 1) != (self.network is not None):
            raise ValueError(f"nodes = {self.nodes} {'want' if self.nodes > 1 else 'need no'} [network], what joins them")
        return self

    @model_validator(mode="after")
    def _speed_of_each(self) -> DescribedMachine:
        if self.rates is None:
            return self
        if self.rates.speeds and len(self.rates.speeds) != self.ranks:
            raise ValueError(f"rates.speeds has {len(self.rates.speeds)} numbers for ranks = {self.ranks}; give one for each rank")
        if len(set(self.rates.speeds)) > 1 and self.cores is not None:
            raise ValueError("rates.speeds differ, but the ranks share cores: leave cores out")
        return self

    @property
    def memory_bytes(self) -> int:
        """Memory of one rank, where the file says it."""
        assert self.memory_gb is not None, "ranks like measured ones have their memory"
        return int(self.memory_gb * _BYTES_PER_GB)

    def described_rates(self, speed: float = 1.0) -> Rates:
        """The figures as a probe would have put them, of a rank that is so many times as fast."""
        own = self.rates
        assert own is not None and self.link is not None, "ranks like measured ones have their rates"
        by_dtype = own.matmul_flops if isinstance(own.matmul_flops, dict) else {"float32": own.matmul_flops}
        faster = {
            "matmul_flops": {dtype: flops * speed for dtype, flops in by_dtype.items()},
            "memory_bytes_per_s": own.memory_bytes_per_s * speed,
            "call_s": own.call_s / speed,
        }
        return _rates(own.model_copy(update=faster), self.link, self.ranks)


def read_machine(path: Path) -> DescribedMachine:
    """Read a cluster file; ClusterError says which key is missing, unknown or wrong."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ClusterError(f'cluster file {path} does not exist; give the path of a .toml file, or "local:N"') from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ClusterError(f"cluster file {path} cannot be read as TOML: {error}") from error
    try:
        return DescribedMachine.model_validate(document)
    except ValidationError as error:
        raise ClusterError(f"cluster file {path}: {'; '.join(_said(problem) for problem in error.errors())}") from error


def _said(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"] == "missing":
        return f"key {key!r} is missing"
    if problem["type"] == "extra_forbidden":
        return f"key {key!r} is unknown; known are {_known(problem['loc'][:-1])}"
    return f"key {key!r} is {problem['input']!r}: {problem['msg']}"


def _known(place: tuple[str | int, ...]) -> str:
    tables: dict[tuple[str | int, ...], type[BaseModel]] = {
        (): DescribedMachine,
        ("rates",): DescribedRates,
        ("link",): DescribedLink,
        ("network",): DescribedLink,
    }
    return ", ".join(tables[place].model_fields)


def _rates(rates: DescribedRates, link: DescribedLink, ranks: int) -> Rates:
    by_dtype = rates.matmul_flops if isinstance(rates.matmul_flops, dict) else {"float32": rates.matmul_flops}
    by_dtype.setdefault("float32", min(by_dtype.values()))
    matmul = {dtype: _matmul(flops) for dtype, flops in by_dtype.items()}
    fused = Curve.constant(by_dtype["float32"] * _ATTENTION_PART)
    bandwidth = Curve.constant(rates.memory_bytes_per_s)
    return Rates(
        matmul=matmul,
        attention_flops={"forward": fused, "backward": fused, "forward_causal": fused.times(2), "backward_causal": fused.times(2)},
        convolution_flops=dict.fromkeys(_CONVOLUTIONS, fused),
        read_bytes_per_s=bandwidth,
        write_bytes_per_s=bandwidth,
        fresh_bytes_per_s=rates.memory_bytes_per_s,
        fresh_from_bytes=float("inf"),
        element_s={},
        call_s=rates.call_s,
        view_s=rates.call_s,
        collectives=_collectives(link, ranks),
        optimizers=_optimizers(rates),
    )


def _matmul(flops: float) -> MatmulRate:
    small = _SMALL_PRODUCT_PART * flops
    cubes = Curve(sizes=(_SMALL_PRODUCT_FLOPS, 1e3 * _SMALL_PRODUCT_FLOPS), values=(small, flops))
    return MatmulRate(cubes_flops=cubes, thinness=Curve(sizes=(1, 64), values=(1 / 64, 1.0)), batched_flops=Curve.constant(flops))


def _optimizers(rates: DescribedRates) -> dict[str, OptimizerRate]:
    """Float32 words that a step reads and writes for each element: parameter, gradient and state, were it one kernel."""
    words = {"sgd": 3, "sgd_momentum": 5, "adam": 7, "adamw": 7}
    return {
        kind: OptimizerRate(fixed_s=rates.call_s, element_s=Curve.constant(4 * count / rates.memory_bytes_per_s))
        for kind, count in words.items()
    }


def _collectives(link: DescribedLink, ranks: int) -> tuple[CollectiveRate, ...]:
    groups = [group for group in range(2, ranks + 1) if ranks % group == 0]
    found = [_collective(kind, link, group) for group in groups for kind in IMPLEMENTATIONS if kind != "send_recv"]
    return (*found, _collective("send_recv", link, 2))


def _collective(kind: str, link: DescribedLink, ranks: int) -> CollectiveRate:
    """A ring: (steps, part of the message that crosses each link)."""
    steps, part = {
        "all_reduce": (2 * (ranks - 1), 2 * (ranks - 1) / ranks),
        "broadcast": (ranks - 1, 1.0),
        "send_recv": (1, 1.0),
        "shift": (1, 1.0),
    }.get(kind, (ranks - 1, (ranks - 1) / ranks))
    latency = max(steps * link.latency_s, 1e-9)
    seconds = (latency, latency + part * _GIB / link.bytes_per_s)
    return CollectiveRate(kind=kind, impl="native", ranks=ranks, message_bytes=(0.0, _GIB), seconds=seconds)
