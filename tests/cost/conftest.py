from __future__ import annotations

import pytest

from shardwise.cluster.model import Cluster
from shardwise.cluster.rates import CollectiveRate, Curve, MatmulRate, OptimizerRate, Rates


def _constant(value: float) -> Curve:
    return Curve.constant(value)


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    """Round figures, so that times can be worked out by hand."""
    matmul = MatmulRate(cubes_flops=_constant(1e11), thinness=Curve(sizes=(1, 64), values=(0.1, 1.0)), batched_flops=_constant(5e10))
    slow = MatmulRate(cubes_flops=_constant(5e10), thinness=_constant(1), batched_flops=_constant(25e9))
    rates = Rates(
        matmul={"float32": matmul, "float64": slow},
        attention_flops={
            "forward": _constant(4e10),
            "backward": _constant(5e10),
            "forward_causal": _constant(8e10),
            "backward_causal": _constant(1e11),
        },
        attention_ragged=0.5,
        convolution_flops={
            "forward": _constant(1e11),
            "forward_transposed": _constant(1e10),
            "backward_input": _constant(5e10),
            "backward_weight": _constant(25e9),
        },
        read_bytes_per_s=_constant(1e10),
        write_bytes_per_s=_constant(2e10),
        fresh_bytes_per_s=1e9,
        fresh_from_bytes=32e6,
        element_s={"float32": {"gelu": 5e-9, "gelu_tanh": 8e-9, "transposed": 6e-9, "add": 1e-12}, "float64": {"gelu": 50e-9}},
        call_s=1e-6,
        view_s=1e-7,
        collectives=(
            CollectiveRate(kind="all_reduce", impl="native", ranks=2, message_bytes=(0, 1e6), seconds=(1e-4, 2e-3)),
            CollectiveRate(kind="all_reduce", impl="exchange", ranks=2, message_bytes=(0, 1e6), seconds=(5e-4, 1e-3)),
            CollectiveRate(kind="all_reduce", impl="native", ranks=4, message_bytes=(0, 1e6), seconds=(3e-4, 6e-3)),
            CollectiveRate(kind="broadcast", impl="native", ranks=2, message_bytes=(0, 1e6), seconds=(1e-4, 1e-3)),
            CollectiveRate(kind="send_recv", impl="native", ranks=2, message_bytes=(0, 1e6), seconds=(1e-4, 1e-3)),
        ),
        optimizers={"adamw": OptimizerRate(fixed_s=1e-5, element_s=Curve(sizes=(4e3, 4e6), values=(1e-9, 4e-9)))},
    )
    return Cluster(name="round", ranks=4, backend="gloo", cores=2, memory_bytes=1 << 30, rates=rates)
