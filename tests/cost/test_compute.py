"""Times worked out by hand on a machine of round figures (conftest.py)."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from shardwise.cluster.model import Cluster, cluster_of
from shardwise.cluster.rates import Curve
from shardwise.cluster.specs import machines
from shardwise.cost.compute import op_flops, op_seconds
from shardwise.cost.optimizer import optimizer_seconds
from shardwise.errors import ShardwiseError

aten = torch.ops.aten
CALL_S, VIEW_S = 1e-6, 1e-7
SUM_S = 2 / 1e10 + 1 / 2e10  # of two tensors, per byte of one


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def seconds(cluster: Cluster, target: Any, *args: Any, **kwargs: Any) -> float:
    return op_seconds(target, args, kwargs, target(*args, **kwargs), cluster)


def traffic_s(read: float, written: float) -> float:
    return read / 1e10 + written / 2e10


def test_products(cluster: Cluster) -> None:
    flops, operands, result = 2.0 * 128 * 256 * 512, 4.0 * (128 + 256) * 512, 4.0 * 128 * 256
    expected = flops / 1e11 + traffic_s(operands, result) + CALL_S
    assert seconds(cluster, aten.mm.default, meta(128, 512), meta(512, 256)) == pytest.approx(expected)
    assert seconds(cluster, aten.matmul.default, meta(2, 64, 512), meta(512, 256)) == pytest.approx(expected)
    for biased in (
        seconds(cluster, aten.addmm.default, meta(256), meta(128, 512), meta(512, 256)),
        seconds(cluster, aten.linear.default, meta(2, 64, 512), meta(256, 512), meta(256)),
    ):
        assert biased == pytest.approx(expected + 4 * 256 / 1e10)
    batched = seconds(cluster, aten.bmm.default, meta(4, 128, 512), meta(4, 512, 256))
    assert batched == pytest.approx(4 * (flops / 5e10 + traffic_s(operands, result)) + CALL_S)
    assert seconds(cluster, aten.matmul.default, meta(2, 2, 128, 512), meta(2, 2, 512, 256)) == pytest.approx(batched)
    double = seconds(cluster, aten.mm.default, meta(128, 512, dtype=torch.float64), meta(512, 256, dtype=torch.float64))
    assert double == pytest.approx(2 * (expected - CALL_S) + CALL_S)


def test_thin_products_are_slow(cluster: Cluster) -> None:
    thin = seconds(cluster, aten.mm.default, meta(1024, 1), meta(1, 1024))
    assert thin == pytest.approx(2 * 1024**2 / 1e10 + traffic_s(2 * 4 * 1024, 4 * 1024**2) + CALL_S)


def test_streaming(cluster: Cluster) -> None:
    x, size = meta(1000, 1000), 4e6
    assert seconds(cluster, aten.add.Tensor, x, x.clone()) == pytest.approx(size * SUM_S + CALL_S)
    assert seconds(cluster, aten.mul_.Tensor, x, x) == pytest.approx(2 * size / 1e10 + CALL_S)
    assert seconds(cluster, aten.add.Tensor, x, meta(1000)) == pytest.approx(size / 1e10 + 4e3 / 1e10 + size / 2e10 + CALL_S)
    assert seconds(cluster, aten.add.Tensor, x, meta(1000, 1).expand(1000, 1000)) == pytest.approx(size * 1.5e-10 + 4e3 / 1e10 + CALL_S)
    assert seconds(cluster, aten.zeros_like.default, x) == pytest.approx(size / 2e10 + CALL_S)


def test_kernels_add_what_they_compute_beyond_streaming(cluster: Cluster) -> None:
    x = meta(1000, 1000)
    assert seconds(cluster, aten.gelu.default, x) == pytest.approx(1e6 * 5e-9 + CALL_S)
    assert seconds(cluster, aten.gelu.default, x, approximate="tanh") == pytest.approx(1e6 * 8e-9 + CALL_S)
    assert seconds(cluster, aten.gelu.default, x.double()) == pytest.approx(1e6 * 50e-9 + CALL_S)


def test_copies_out_of_order_are_slower(cluster: Cluster) -> None:
    x = meta(1000, 1000)
    in_order, turned = (seconds(cluster, aten.clone.default, source, memory_format=torch.contiguous_format) for source in (x, x.t()))
    assert in_order == pytest.approx(4e6 * 1.5e-10 + CALL_S)
    assert turned == pytest.approx(1e6 * 6e-9 + CALL_S)
    heads = meta(8, 256, 4, 64).transpose(1, 2)
    assert seconds(cluster, aten.clone.default, heads, memory_format=torch.contiguous_format) < 1e-9 * heads.numel()


def test_large_results_pay_for_fresh_pages(cluster: Cluster) -> None:
    large, small = meta(9, 1000, 1000), meta(7, 1000, 1000)
    assert seconds(cluster, aten.add.Tensor, large, large) - 36e6 * SUM_S == pytest.approx(36e6 / 1e9 + CALL_S)
    assert seconds(cluster, aten.add.Tensor, small, small) - 28e6 * SUM_S == pytest.approx(CALL_S)
    assert seconds(cluster, aten.add_.Tensor, large, large) == pytest.approx(72e6 / 1e10 + CALL_S)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: (aten.view.default, (x, [-1])),
        lambda x: (aten.t.default, (x,)),
        lambda x: (aten.transpose.int, (x, 0, 1)),
        lambda x: (aten.expand.default, (x, [3, 64, 32])),
        lambda x: (aten.slice.Tensor, (x, 0, 1, 2)),
        lambda x: (aten.split.Tensor, (x, 16, 0)),
        lambda x: (aten.detach.default, (x,)),
        lambda x: (aten._unsafe_view.default, (x, [32, 64])),
    ],
)
def test_views_cost_a_call(cluster: Cluster, view: Callable[[Tensor], tuple[Any, tuple[Any, ...]]]) -> None:
    target, args = view(meta(64, 32))
    assert seconds(cluster, target, *args) == VIEW_S


def test_what_is_no_operator_is_free(cluster: Cluster) -> None:
    assert op_seconds(operator.getitem, ((meta(2), meta(3)), 0), {}, meta(2), cluster) == 0.0
    assert seconds(cluster, aten.empty_like.default, meta(1000, 1000)) == 0.0


def test_attention(cluster: Cluster) -> None:
    query, key, out = meta(2, 4, 256, 64), meta(2, 2, 256, 64), (meta(2, 4, 256, 64), meta(2, 4, 256))
    flops = 4.0 * query.numel() * 256
    rest = traffic_s(4 * 2 * query.numel(), 4 * (query.numel() + 2 * 4 * 256)) + CALL_S
    forward, backward = aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention_for_cpu_backward
    assert op_seconds(forward.default, (query, key, key), {}, out, cluster) == pytest.approx(flops / 4e10 + rest)
    assert op_seconds(forward.default, (query, key, key, 0.0, True), {}, out, cluster) == pytest.approx(flops / 8e10 + rest)
    whole = op_seconds(aten.scaled_dot_product_attention.default, (query, key, key), {"is_causal": True}, query, cluster)
    assert whole == pytest.approx(flops / 8e10 + rest, rel=0.01)
    arguments = (query, query, key, key, query, out[1], 0.0, False)
    found = op_seconds(backward.default, arguments, {}, (query, key, key), cluster)
    assert found == pytest.approx(2.5 * flops / 5e10 + traffic_s(4 * (4 * query.numel() + 2048), 4 * 2 * query.numel()) + CALL_S)
    assert op_flops(backward.default, arguments, {}, (query, key, key)) == 2.5 * flops


def test_attention_over_a_ragged_number_of_keys_is_slower(cluster: Cluster) -> None:
    even, ragged = meta(2, 4, 256, 64), meta(2, 4, 250, 64)
    target = aten._scaled_dot_product_flash_attention_for_cpu.default
    times = [op_seconds(target, (x, x, x), {}, (x, x[..., 0]), cluster) / (x.numel() * x.shape[-2]) for x in (even, ragged)]
    assert times[1] > 1.8 * times[0]


def test_convolution(cluster: Cluster) -> None:
    image, weight = meta(2, 16, 32, 32), meta(64, 16, 3, 3)
    tail = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    result = meta(2, 64, 32, 32)
    flops = 2.0 * result.numel() * 16 * 9
    operands = 4 * (image.numel() + weight.numel())
    forward = op_seconds(aten.convolution.default, (image, weight, None, *tail), {}, result, cluster)
    assert forward == pytest.approx(flops / 1e11 + operands / 1e10 + 4 * result.numel() / 2e10 + CALL_S)
    arguments = (result, image, weight, [64], *tail)
    both, weight_only = (
        op_seconds(
            aten.convolution_backward.default, (*arguments, [wanted, True, False]), {}, (image if wanted else None, weight, None), cluster
        )
        for wanted in (True, False)
    )
    assert both - weight_only == pytest.approx(flops / 5e10 + 4 * image.numel() / 2e10)
    assert op_flops(aten.convolution.default, (image, weight, None, *tail), {}, result) == flops
    assert op_flops(aten.convolution_backward.default, (*arguments, [False, True, False]), {}, (None, weight, None)) == flops


def test_transposed_convolution(cluster: Cluster) -> None:
    image, weight, result = meta(2, 64, 16, 16), meta(64, 32, 2, 2), meta(2, 32, 32, 32)
    arguments = (image, weight, None, [2, 2], [0, 0], [1, 1], True, [0, 0], 1)
    flops = 2.0 * image.numel() * 32 * 4
    found = op_seconds(aten.convolution.default, arguments, {}, result, cluster)
    assert found == pytest.approx(flops / 1e10 + traffic_s(4 * (image.numel() + weight.numel()), 4 * result.numel()) + CALL_S)
    assert op_flops(aten.convolution.default, arguments, {}, result) == flops


def test_embedding_reads_the_rows_that_it_looks_up(cluster: Cluster) -> None:
    table, rows = meta(100_000, 64), meta(10, dtype=torch.int64)
    forward = op_seconds(aten.embedding.default, (table, rows), {}, meta(10, 64), cluster)
    assert forward == pytest.approx(traffic_s(4 * 640 + 80, 4 * 640) + CALL_S)
    backward = op_seconds(aten.embedding_dense_backward.default, (meta(10, 64), rows, 10_000, -1, False), {}, meta(10_000, 64), cluster)
    assert backward == pytest.approx(4 * 640_000 / 2e10 + 2 * 4 * 640 / 1e10 + CALL_S)


def test_flops_are_those_of_torch(cluster: Cluster) -> None:
    left, right = meta(4, 8), meta(8, 16)
    assert op_flops(aten.mm.default, (left, right), {}, meta(4, 16)) == 2 * 4 * 8 * 16
    assert op_flops(aten.linear.default, (left, meta(16, 8)), {}, meta(4, 16)) == 2 * 4 * 8 * 16
    assert op_flops(aten.bmm.default, (meta(3, 4, 8), meta(3, 8, 16)), {}, meta(3, 4, 16)) == 3 * 2 * 4 * 8 * 16
    assert op_flops(aten.add.Tensor, (left, left), {}, left) == 0


def test_fake_tensors_are_quick(cluster: Cluster) -> None:
    """Under 50 µs a call on a quiet machine; the best of several rounds, for the machine is not always."""
    with FakeTensorMode():
        x, weight = torch.empty(2048, 512), torch.empty(512, 512)
        calls = [
            (aten.mm.default, (x, weight), x),
            (aten.gelu_backward.default, (x, x), x),
            (aten.native_layer_norm.default, (x, [512], weight[0], weight[0], 1e-5), (x, x[:, :1], x[:, :1])),
        ]
        rounds = []
        for _ in range(10):
            start = time.perf_counter()
            for target, args, output in calls * 20:
                op_seconds(target, args, {}, output, cluster)
            rounds.append((time.perf_counter() - start) / 60)
    assert min(rounds) < 100e-6


def test_optimizer(cluster: Cluster) -> None:
    assert optimizer_seconds(1_000_000, torch.float32, "adamw", cluster) == pytest.approx(1e-5 + 4e-3)
    assert optimizer_seconds(1_000_000, torch.float64, "adamw", cluster) == pytest.approx(1e-5 + 8e-3)
    assert optimizer_seconds(1, torch.float32, "adamw", cluster) == pytest.approx(1e-5, rel=1e-3)
    with pytest.raises(ShardwiseError, match="no figures of the optimizer 'lion' on round; there are adamw"):
        optimizer_seconds(1, torch.float32, "lion", cluster)


def test_ragged_products_are_slower() -> None:
    h100 = Cluster.parse("h100:1x8")

    def mm(m: int, n: int, k: int) -> float:
        left, right = meta(m, k, dtype=torch.bfloat16), meta(k, n, dtype=torch.bfloat16)
        return seconds(h100, torch.ops.aten.mm.default, left, right) / (m * n * k)

    assert mm(4096, 4096, 4096) < mm(4096, 4096, 4104) < mm(4096, 4096, 4097)


def test_attention_by_kernel_and_device() -> None:
    def attention(device: str, kernel: str, causal: bool) -> float:
        cluster = cluster_of(machines(f"{device}:1x8"), kernel)
        query = meta(1, 16, 8192, 128, dtype=torch.bfloat16)
        return seconds(cluster, torch.ops.aten.scaled_dot_product_attention.default, query, query, query, None, 0.0, causal)

    oldest, middle, newest = (attention("h100", kernel, True) for kernel in ("flash1", "flash2", "flash3"))
    assert oldest > middle > newest == attention("h100", "", True)
    assert 1.9 < attention("h100", "", False) / newest < 2.1, "half of the square"
    flops = 4 * 16 * 8192**2 * 128 / 2
    assert newest == pytest.approx(flops / (0.62 * 989e12), rel=0.1), "610 Tflop/s"
    assert attention("a100-80g", "flash3", True) == attention("a100-80g", "", True), "the newest that it has"


def test_a_kernel_s_own_time_does_not_depend_on_where_its_data_is(cluster: Cluster) -> None:
    """In cache it takes 5 ns an element, of which 0.8 for 8 bytes at the cached rates; a step meets its data cold, at the curves'."""
    cached = replace(cluster, rates=cluster.rates.model_copy(update={"cached_bytes_per_s": (1e10, 1e10)}))
    own = 5e-9 - 4 / 1e10 - 4 / 1e10
    assert seconds(cached, aten.gelu.default, meta(1000, 1000)) == pytest.approx(1e6 * own + traffic_s(4e6, 4e6) + CALL_S)
    plain = 5e-9 - 4 / 1e10 - 4 / 2e10
    assert seconds(cluster, aten.gelu.default, meta(1000, 1000)) == pytest.approx(1e6 * plain + traffic_s(4e6, 4e6) + CALL_S)


@pytest.mark.parametrize(("groups", "cast"), [(True, 0.0), (False, 0.0), (False, 6.0)])
def test_products_with_experts(cluster: Cluster, groups: bool, cast: float) -> None:
    """128 rows for each of 8 experts. A rate that grows with a product's size counts them together only where they are one kernel."""
    one = 2.0 * 128 * 256 * 512
    grows = cluster.rates.matmul["float32"].model_copy(update={"cubes_flops": Curve(sizes=(one, 8 * one), values=(1e10, 1e11))})
    rates = cluster.rates.model_copy(update={"matmul": {"float32": grows}, "groups": groups, "cast_bytes": cast})
    x, weight, expert = meta(1024, 512), meta(8, 512, 256), meta(1024, dtype=torch.int64)
    found = seconds(replace(cluster, rates=rates), torch.ops.shardwise.expert_mm.default, x, weight, expert)
    memory = traffic_s(4.0 * (1024 * 512 + 8 * 512 * 256) + 8 * 1024, 4.0 * 1024 * 256)
    moved = 4.0 * (1024 * 512 + 1024 * 256)  # rows are brought together for each expert, and results back
    memory += traffic_s(moved, moved)
    assert found == pytest.approx(8 * one / (1e11 if groups else 1e10) + cast * 1024 * 512 / 1e10 + memory + CALL_S)
