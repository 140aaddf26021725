"""Operators that make a tensor from nothing, or from another one's shape: the same numbers everywhere are made in parts, others whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.capture.graph import Op
from shardwise.sharding.rules.build import apart, over, overloads, run_named, simple_dims
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.signature import Call, Signature, Split

aten = torch.ops.aten

_CONSTANT = ("empty.memory_format", "empty_permuted.default", "full.default", "ones.default", "zeros.default")
_LIKE = ("new_empty", "new_full", "new_ones", "new_zeros")
_WINDOWS = (
    *("bartlett_window.default", "bartlett_window.periodic", "blackman_window.default", "blackman_window.periodic"),
    *("hamming_window.default", "hamming_window.periodic", "hamming_window.periodic_alpha", "hamming_window.periodic_alpha_beta"),
    *("hann_window.default", "hann_window.periodic", "kaiser_window.beta", "kaiser_window.default", "kaiser_window.periodic"),
)
_COUNTING = (
    *(
        "arange.default",
        "arange.start",
        "arange.start_step",
        "range.default",
        "range.step",
        "eye.default",
        "eye.m",
        "scalar_tensor.default",
    ),
    *("fft_fftfreq.default", "fft_rfftfreq.default", "linspace.default", "logspace.default", "tril_indices.default"),
    "triu_indices.default",
)
_BETWEEN = ("linspace.Scalar_Tensor", "linspace.Tensor_Scalar", "linspace.Tensor_Tensor")
_BETWEEN_LOGS = ("logspace.Scalar_Tensor", "logspace.Tensor_Scalar", "logspace.Tensor_Tensor")


@rule(*overloads(*_CONSTANT, *_LIKE))
def constant(op: Op) -> Signature:
    """Every rank makes its part. Of another tensor only the dtype is read."""
    names = simple_dims(op.outputs[0].shape)
    others = [simple_dims(value.shape, "other") for value in op.inputs]
    whole = {name: "only its dtype is read" for other in others for (name,) in other}
    return over(op, others, [names], splits={name: Split() for (name,) in names}, whole=whole, local=_constant)


def _constant(call: Call, tensors: Sequence[Tensor]) -> Any:
    return run_named(call, tensors, size=list(call.shapes[0]))


@rule(*overloads(*_COUNTING, *_WINDOWS, *_BETWEEN, *_BETWEEN_LOGS, "empty_strided.default", "new_empty_strided.default"))
def counted(op: Op) -> Signature:
    return apart(op, "made whole: it is cheap")
