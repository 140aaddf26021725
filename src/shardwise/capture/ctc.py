"""Connectionist temporal classification as one operator with a result of fixed shape.

Torch's own keeps a table for its backward whose size depends on the longest label sequence, so that it cannot be captured when the lengths
are tensors. This one makes the table again in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["ctc_losses"]

_ARGUMENTS = "Tensor log_probs, Tensor targets, Tensor input_lengths, Tensor target_lengths, int blank, bool zero_infinity"


def _losses(log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor, blank: int, zero_infinity: bool) -> Tensor:
    """The loss of each sample, [n]; as torch.nn.functional.ctc_loss without reduction.

    log_probs: [t, n, classes]; targets: [n, s], or all samples' labels one after the other; lengths: int [n].
    """
    return torch.nn.functional.ctc_loss(log_probs, targets, input_lengths, target_lengths, blank, "none", zero_infinity)


def _gradient(gradient: Tensor, log_probs: Tensor, *rest: Any) -> Tensor:
    *others, blank, zero_infinity = rest
    losses, table = torch.ops.aten._ctc_loss.Tensor(log_probs, *others, blank, zero_infinity)
    result: Tensor = torch.ops.aten._ctc_loss_backward.Tensor(
        gradient.contiguous(), log_probs, *others, losses, table, blank, zero_infinity
    )
    return result


ctc_losses = torch.library.custom_op("shardwise::ctc_losses", _losses, mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor")
_backward = torch.library.custom_op(
    "shardwise::ctc_losses_backward", _gradient, mutates_args=(), schema=f"(Tensor gradient, {_ARGUMENTS}) -> Tensor"
)


@ctc_losses.register_fake
def _(log_probs: Tensor, *rest: Any) -> Tensor:
    return log_probs.new_empty(log_probs.shape[1])


@_backward.register_fake
def _(gradient: Tensor, log_probs: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(log_probs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.constants = inputs[4:]


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(gradient, *ctx.saved_tensors, *ctx.constants), *(None,) * 5


ctc_losses.register_autograd(_differentiate, setup_context=_save)
