from __future__ import annotations

import pytest
from pydantic import ValidationError
from tests.clusters import made_up

from shardwise.cluster.rates import IMPLEMENTATIONS, CollectiveRate, Curve, MatmulRate
from shardwise.runtime import collectives


def test_curve_is_straight_on_doubly_logarithmic_paper_and_constant_outside() -> None:
    curve = Curve(sizes=(1, 100), values=(10, 1000))
    assert curve.at(10) == pytest.approx(100)
    assert curve.at(1) == curve.at(0.1) == 10
    assert curve.at(100) == curve.at(1e9) == 1000
    assert Curve.constant(7).at(123) == 7


@pytest.mark.parametrize(("sizes", "values"), [((), ()), ((1, 2), (1,)), ((2, 1), (1, 1)), ((1, 1), (1, 1)), ((1, 2), (1, 0))])
def test_curve_refuses_what_cannot_be_read_between(sizes: tuple[float, ...], values: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError, match="curve wants positive increasing sizes"):
        Curve(sizes=sizes, values=values)


def test_thin_products_are_slower_than_cubes_of_as_many_flops() -> None:
    rate = MatmulRate(
        cubes_flops=Curve(sizes=(1e3, 1e9), values=(1e9, 1e11)),
        thinness=Curve(sizes=(1, 64), values=(0.1, 1.0)),
        batched_flops=Curve.constant(5e10),
    )
    assert rate.flops_per_s(1000, 1000, 1000) == 1e11
    assert rate.flops_per_s(1, 1000, 1000) == rate.flops_per_s(1000, 1, 1000) == rate.flops_per_s(1000, 1000, 1)
    assert rate.flops_per_s(1, 10_000, 100_000) == pytest.approx(1e10)
    assert rate.batched_flops_per_s(8, 8, 8) == 5e10


def _collective(**changed: object) -> CollectiveRate:
    figures = {"kind": "all_reduce", "impl": "native", "ranks": 2, "message_bytes": (100.0, 1100.0, 2100.0), "seconds": (1.0, 2.0, 4.0)}
    return CollectiveRate.model_validate({**figures, **changed})


def test_collective_is_read_between_and_beyond_its_sizes() -> None:
    rate = _collective()
    assert rate.seconds_for(0) == rate.seconds_for(100) == rate.latency_s == 1.0
    assert rate.seconds_for(600) == pytest.approx(1.5)
    assert rate.seconds_for(2100) == 4.0
    assert rate.seconds_for(3100) == pytest.approx(6.0)
    assert rate.bytes_per_s == pytest.approx(500.0)
    assert rate.busy_for(600) == 0.0, "not known"
    busy = _collective(busy_s=(0.1, 0.3, 0.4))
    assert [busy.busy_for(size) for size in (0, 600, 2100, 3100)] == pytest.approx([0.1, 0.2, 0.4, 0.5])


@pytest.mark.parametrize(
    "changed", [{"kind": "gossip"}, {"impl": "ring"}, {"seconds": (1.0,)}, {"message_bytes": (3.0, 2.0, 1.0)}, {"busy_s": (1.0,)}]
)
def test_collective_refuses(changed: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        _collective(**changed)


def test_a_faster_rank_is_faster_in_all_that_it_computes_and_its_links_stay() -> None:
    rates = made_up(2).rates.model_copy(update={"element_s": {"float32": {"gelu": 1e-9}}, "cached_bytes_per_s": (4e10, 2e10)})
    slow = rates.times_as_fast(0.5)
    assert slow.kernel_s("gelu", "float32") == 2e-9
    assert slow.cached_bytes_per_s == (2e10, 1e10)
    assert slow.matmul_of("float32").flops_per_s(4096, 4096, 4096) == rates.matmul_of("float32").flops_per_s(4096, 4096, 4096) / 2
    assert slow.optimizers["adamw"].element_s.at(4096) == 2 * rates.optimizers["adamw"].element_s.at(4096)
    stay = {name for name in type(rates).model_fields if getattr(slow, name) == getattr(rates, name)}
    ratios = {"attention_ragged", "product_ragged", "contention", "cast_bytes", "fresh_from_bytes"}
    assert stay == ratios | {"overlaps_memory", "fuses", "copies_inner", "groups", "collectives"}
    assert slow.times_as_fast(2) == rates


def test_every_implementation_named_here_exists() -> None:
    assert {"all_reduce", "all_gather", "reduce_scatter", "all_to_all"} <= set(IMPLEMENTATIONS)
    assert {name.removeprefix("begin_") for name in collectives.__all__} - {"Finish"} <= set(IMPLEMENTATIONS)
