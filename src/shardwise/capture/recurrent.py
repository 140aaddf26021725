"""Recurrent layers (LSTM, GRU, plain) as one operator.

Torch's own are traced into the operators of every time step, a thousand for a second of speech. This one stays whole, forward and backward;
the backward runs the forward once more, since what torch keeps between the two has another form on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.capture import rerun

__all__ = ["KINDS", "recurrent"]

aten = torch.ops.aten
KINDS = {
    aten.lstm.input: "lstm",
    aten.gru.input: "gru",
    aten.rnn_tanh.input: "rnn_tanh",
    aten.rnn_relu.input: "rnn_relu",
}
_CALLS = {kind: target for target, kind in KINDS.items()}
_CONSTANTS = "str kind, bool biases, int layers, bool both_ways, bool batch_first"

_LIBRARY = torch.library.Library("shardwise", "FRAGMENT")
_LIBRARY.define(f"recurrent(Tensor x, Tensor[] states, Tensor[] weights, {_CONSTANTS}) -> Tensor[]")
_LIBRARY.define(
    f"recurrent_backward(Tensor[] gradients, Tensor x, Tensor[] states, Tensor[] weights, int[] wanted, {_CONSTANTS}) -> Tensor[]"
)

recurrent = torch.ops.shardwise.recurrent.default


def _run(x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], *constants: Any) -> list[Tensor]:
    kind, biases, layers, both_ways, batch_first = constants
    given = list(states) if kind == "lstm" else states[0]
    return list(_CALLS[kind](x, given, list(weights), biases, layers, 0.0, True, both_ways, batch_first))


@torch.library.impl(_LIBRARY, "recurrent", "CompositeExplicitAutograd")
def _forward(x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], *constants: Any) -> list[Tensor]:
    """x: [t, n, features] (n first with batch_first); states: [layers · ways, n, hidden] each, (h, c) or (h); weights: as torch lists them.

    Returns all outputs, then the last states. There is no dropout between layers.
    """
    with torch.no_grad():
        return [each.contiguous() for each in _run(x, states, weights, *constants)]


@torch.library.impl(_LIBRARY, "recurrent_backward", "CompositeExplicitAutograd")
def _backward(
    gradients: Sequence[Tensor], x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], wanted: Sequence[int], *constants: Any
) -> list[Tensor]:
    split = 1 + len(states)
    return rerun.gradients(
        lambda given: _run(given[0], given[1:split], given[split:], *constants), [x, *states, *weights], gradients, wanted
    )


@torch.library.register_fake("shardwise::recurrent", lib=_LIBRARY)
def _described(x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], *constants: Any) -> list[Tensor]:
    both_ways = constants[3]
    out = x.new_empty((*x.shape[:2], states[0].shape[2] * (1 + both_ways)))
    return [out, *(torch.empty_like(state, memory_format=torch.contiguous_format) for state in states)]


@torch.library.register_fake("shardwise::recurrent_backward", lib=_LIBRARY)
def _backward_described(
    gradients: Sequence[Tensor], x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], wanted: Sequence[int], *constants: Any
) -> list[Tensor]:
    return rerun.described([x, *states, *weights], wanted)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    x, states, weights, *ctx.constants = inputs
    ctx.split = 1 + len(states)
    rerun.remember(ctx, [x, *states, *weights], output)


def _differentiate(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
    split = ctx.split

    def operator(given: list[Tensor], whole: list[Tensor], wanted: list[int]) -> list[Tensor]:
        parts = given[0], given[1:split], given[split:]
        return torch.ops.shardwise.recurrent_backward(whole, *parts, wanted, *ctx.constants)

    each = rerun.backward(ctx, gradients, operator)
    return each[0], each[1:split], each[split:], *(None,) * 5


torch.library.register_autograd("shardwise::recurrent", _differentiate, setup_context=_save, lib=_LIBRARY)
