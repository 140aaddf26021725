"""Calls that draw random numbers, rewritten so that each number is a function of the step, a key and its place in the whole tensor.

Noise of a known distribution is drawn by `operators.keyed_draw`; what is then done with it is written out in ordinary operators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.capture import operators
from shardwise.capture.builder import Request
from shardwise.capture.graph import Value

__all__ = ["DROPOUTS", "dropped", "is_random", "rewrite"]

aten = torch.ops.aten

_CHANNEL_DROPOUTS = (aten.feature_dropout.default, aten.feature_alpha_dropout.default)
_DROPOUTS = (aten.dropout.default, aten.native_dropout.default)
# Those whose arguments are a tensor, a probability, and whether it is training.
DROPOUTS = {*_DROPOUTS, *_CHANNEL_DROPOUTS, aten.alpha_dropout.default}

# Operator → the distribution that it draws from, and its parameters: numbers, or names of arguments.
_DRAWS: dict[Any, tuple[str, tuple[float | str, float | str]]] = {
    aten.rand.default: ("uniform", (0.0, 1.0)),
    aten.rand_like.default: ("uniform", (0.0, 1.0)),
    aten.uniform.default: ("uniform", ("from", "to")),
    aten.randn.default: ("normal", (0.0, 1.0)),
    aten.randn_like.default: ("normal", (0.0, 1.0)),
    aten.normal_functional.default: ("normal", ("mean", "std")),
    aten.normal.float_float: ("normal", ("mean", "std")),
    aten.log_normal.default: ("log_normal", ("mean", "std")),
    aten.exponential.default: ("exponential", ("lambd", 0.0)),
    aten.cauchy.default: ("cauchy", ("median", "sigma")),
    aten.geometric.default: ("geometric", ("p", 0.0)),
    aten.bernoulli.p: ("bernoulli", ("p", 1.0)),
    aten.randint.default: ("integers", (0, "high")),
    aten.randint.low: ("integers", ("low", "high")),
    aten.randint_like.default: ("integers", (0, "high")),
    aten.randint_like.low_dtype: ("integers", ("low", "high")),
    getattr(aten.random, "from"): ("integers", ("from", "to")),
    aten.random.to: ("integers", (0, "to")),
}
# Tagged as random for their dropout alone, which `normalize` takes out of them.
_DROPOUT_INSIDE = {
    *(aten.scaled_dot_product_attention.default, aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input),
}


def is_random(target: Any) -> bool:
    """Whether the operator, in a normalised graph, draws random numbers that no key gives: every rank would draw others."""
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()) and target not in _DROPOUT_INSIDE


def rewrite(call: Request) -> Value | None:
    """What the call draws, keyed; None for a call that draws nothing, or from a distribution that is not known."""
    if call.target in _DRAWS and not call.meta.is_complex():
        distribution, named = _DRAWS[call.target]
        return _draw(call, distribution, [call.get(each) if isinstance(each, str) else each for each in named])
    special = _SPECIAL.get(call.target)
    return special(call) if special else None


def _draw(
    call: Request, distribution: str, parameters: Sequence[float], *, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None
) -> Value:
    """Random numbers of the shape and dtype of the call's result, if no others are given."""
    sizes = [int(size) for size in (call.meta.shape if shape is None else shape)]
    meta = call.meta.new_empty(sizes, dtype=dtype or call.meta.dtype)
    state, key = call.builder.random_state(), call.builder.random_key()
    return call.add(operators.keyed_draw, state, sizes, distribution, list(parameters), meta.dtype, key=key, meta=meta)


def dropped(call: Request, x: Value, probability: float, meta: Tensor) -> Value:
    """Dropout of x, which is like `meta`."""
    state, key = call.builder.random_state(), call.builder.random_key()
    return call.add(operators.keyed_dropout, x, state, float(probability), key=key, meta=meta)


def _dropout(call: Request) -> Value:
    return dropped(call, call.args[0], call.args[1], call.meta)


def _channel_dropout(call: Request) -> Value:
    x, kept = call.args[0], 1.0 - call.args[1]
    noise = _draw(call, "bernoulli", (kept, 1.0 / kept if kept else 0.0), shape=_channels(x))
    return call.add(aten.mul.Tensor, x, noise)


def _alpha_dropout(call: Request) -> Value:
    """That which keeps the mean and variance of self-normalising networks: elements, or channels, become −alpha before it is scaled."""
    x, probability = call.args[0], float(call.args[1])
    kept, alpha = 1.0 - probability, 1.7580993408473766  # scale · alpha of SELU
    scale = 1.0 / math.sqrt((alpha * alpha * probability + 1.0) * kept) if kept else 0.0
    shape = _channels(x) if call.target in _CHANNEL_DROPOUTS else x.shape
    noise, like = _draw(call, "bernoulli", (kept, 1.0), shape=shape), call.meta.new_empty(tuple(shape))
    shift = call.add(aten.mul.Tensor, noise, alpha * scale, meta=like)
    shift = call.add(aten.add.Tensor, shift, alpha * scale * (probability - 1.0), meta=like)
    factor = call.add(aten.mul.Tensor, noise, scale, meta=like)
    return call.add(aten.add.Tensor, call.add(aten.mul.Tensor, x, factor), shift)


def _channels(x: Value) -> list[int]:
    return [*x.shape[:2], *(1 for _ in x.shape[2:])]


def _bernoulli(call: Request) -> Value:
    """1 with the probability that stands there."""
    probability = call.get("p") if call.target is aten.bernoulli.Tensor else call.args[0]
    number = _draw(call, "uniform", (0.0, 1.0), dtype=probability.dtype)
    under = call.add(aten.lt.Tensor, number, probability, meta=call.meta.new_empty(call.meta.shape, dtype=torch.bool))
    return call.add(aten.to.dtype, under, call.meta.dtype)


def _normal(call: Request) -> Value:
    """mean + deviation · noise, through which no gradient flows."""
    value = _draw(call, "normal", (0.0, 1.0))
    for operator, term in ((aten.mul.Tensor, call.get("std")), (aten.add.Tensor, call.get("mean"))):
        if isinstance(term, Value):
            term = call.add(aten.detach.default, term, meta=call.meta.new_empty(term.shape))
        value = call.add(operator, value, term)
    return value


def _rrelu(call: Request) -> Value:
    """x where positive; elsewhere x times a slope that is random in training, else the middle one."""
    x, lower, upper = call.args[0], call.get("lower"), call.get("upper")
    if not call.get("training"):
        return call.add(aten.leaky_relu.default, x, (lower + upper) / 2)
    slope = _draw(call, "uniform", (lower, upper))
    below = call.add(aten.le.Scalar, x, 0, meta=call.meta.new_empty(call.meta.shape, dtype=torch.bool))
    return call.add(aten.mul.Tensor, x, call.add(aten.where.ScalarOther, below, slope, 1.0))


def _permutation(call: Request) -> Value:
    state, key = call.builder.random_state(), call.builder.random_key()
    return call.add(operators.keyed_permutation, state, call.args[0], call.meta.dtype, key=key)


def _multinomial(call: Request) -> Value:
    state, key = call.builder.random_state(), call.builder.random_key()
    return call.add(operators.keyed_multinomial, call.args[0], state, call.args[1], call.get("replacement"), key=key)


_SPECIAL = {
    **dict.fromkeys(_DROPOUTS, _dropout),
    aten.feature_dropout.default: _channel_dropout,
    **dict.fromkeys((aten.alpha_dropout.default, aten.feature_alpha_dropout.default), _alpha_dropout),
    **dict.fromkeys((aten.bernoulli.default, aten.bernoulli.Tensor), _bernoulli),
    **dict.fromkeys((aten.normal.Tensor_Tensor, aten.normal.Tensor_float, aten.normal.float_Tensor), _normal),
    aten.rrelu.default: _rrelu,
    aten.randperm.default: _permutation,
    aten.multinomial.default: _multinomial,
}
