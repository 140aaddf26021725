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
_PACKED = {"lstm": aten.lstm.data, "gru": aten.gru.data, "rnn_tanh": aten.rnn_tanh.data, "rnn_relu": aten.rnn_relu.data}
_CONSTANTS = "str kind, bool biases, int layers, bool both_ways, bool batch_first"

_LIBRARY = torch.library.Library("shardwise", "FRAGMENT")
_LIBRARY.define(f"recurrent(Tensor x, Tensor[] states, Tensor[] weights, Tensor? lengths, {_CONSTANTS}) -> Tensor[]")
_LIBRARY.define(
    "recurrent_backward(Tensor[] gradients, Tensor x, Tensor[] states, Tensor[] weights, Tensor? lengths, int[] wanted, "
    f"{_CONSTANTS}) -> Tensor[]"
)

recurrent = torch.ops.shardwise.recurrent.default


def _run(x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], lengths: Tensor | None, *constants: Any) -> list[Tensor]:
    if lengths is not None and len(lengths):
        return _run_packed(x, states, weights, lengths, *constants)
    kind, biases, layers, both_ways, batch_first = constants
    given = list(states) if kind == "lstm" else states[0]
    return list(_CALLS[kind](x, given, list(weights), biases, layers, 0.0, True, both_ways, batch_first))


def _run_packed(x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], lengths: Tensor, *constants: Any) -> list[Tensor]:
    """Every sample ends at its length, where the way back begins; zeros beyond."""
    kind, biases, layers, both_ways, batch_first = constants
    n, t = (0, 1) if batch_first else (1, 0)
    descending, order = torch.sort(lengths.cpu(), descending=True)
    order = order.to(x.device)
    back = torch.argsort(order)
    data, sizes = aten._pack_padded_sequence.default(x.index_select(n, order), descending, batch_first)
    given = [state.index_select(1, order) for state in states]
    rows, *last = _PACKED[kind](data, sizes, given if kind == "lstm" else given[0], list(weights), biases, layers, 0.0, True, both_ways)
    out, _ = aten._pad_packed_sequence.default(rows, sizes, batch_first, 0.0, x.shape[t])
    return [out.index_select(n, back), *(state.index_select(1, back) for state in last)]


@torch.library.impl(_LIBRARY, "recurrent", "CompositeExplicitAutograd")
def _forward(x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], lengths: Tensor | None, *constants: Any) -> list[Tensor]:
    """x: [t, n, features] (n first with batch_first); states: [layers · ways, n, hidden] each, (h, c) or (h); weights: as torch lists them.

    lengths: int64 [n], steps of each sample, all t if None. Returns all outputs, then the last states. There is no dropout between layers.
    """
    with torch.no_grad():
        return [each.contiguous() for each in _run(x, states, weights, lengths, *constants)]


@torch.library.impl(_LIBRARY, "recurrent_backward", "CompositeExplicitAutograd")
def _backward(
    gradients: Sequence[Tensor],
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    wanted: Sequence[int],
    *constants: Any,
) -> list[Tensor]:
    split = 1 + len(states)
    return rerun.gradients(
        lambda given: _run(given[0], given[1:split], given[split:], lengths, *constants), [x, *states, *weights], gradients, wanted
    )


@torch.library.register_fake("shardwise::recurrent", lib=_LIBRARY)
def _described(x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], lengths: Tensor | None, *constants: Any) -> list[Tensor]:
    both_ways = constants[3]
    out = x.new_empty((*x.shape[:2], states[0].shape[2] * (1 + both_ways)))
    return [out, *(torch.empty_like(state, memory_format=torch.contiguous_format) for state in states)]


@torch.library.register_fake("shardwise::recurrent_backward", lib=_LIBRARY)
def _backward_described(
    gradients: Sequence[Tensor],
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    wanted: Sequence[int],
    *constants: Any,
) -> list[Tensor]:
    return rerun.described([x, *states, *weights], wanted)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    x, states, weights, ctx.lengths, *ctx.constants = inputs
    ctx.split = 1 + len(states)
    rerun.remember(ctx, [x, *states, *weights], output)


def _differentiate(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
    split = ctx.split

    def operator(given: list[Tensor], whole: list[Tensor], wanted: list[int]) -> list[Tensor]:
        parts = given[0], given[1:split], given[split:]
        return torch.ops.shardwise.recurrent_backward(whole, *parts, ctx.lengths, wanted, *ctx.constants)

    each = rerun.backward(ctx, gradients, operator)
    return each[0], each[1:split], each[split:], *(None,) * 6


torch.library.register_autograd("shardwise::recurrent", _differentiate, setup_context=_save, lib=_LIBRARY)
