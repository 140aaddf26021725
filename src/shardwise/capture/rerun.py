"""Operators that run their code once more for its gradients.

    forward     `remember`      keeps the inputs, which of them want a gradient, and what the results were
    backward    `backward`      a gradient for every result (zeros where none came) → one for every input that wants it
                `gradients`     inside the operator that makes those: the code again, with autograd on

The gradients are an operator of their own, so that a trace shows it as one node; `described` says what it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["backward", "described", "gradients", "remember"]

Code = Callable[[list[Tensor]], Sequence[Tensor]]
# inputs, the results' gradients, which inputs want one → theirs
Gradients = Callable[[list[Tensor], list[Tensor], list[int]], Sequence[Tensor]]


def remember(ctx: Any, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """For `backward`."""
    ctx.wanted = [index for index, each in enumerate(inputs) if each.requires_grad]
    ctx.results = [(each.shape, each.dtype, each.device) for each in results]
    ctx.save_for_backward(*inputs)


def backward(ctx: Any, given: Sequence[Tensor | None], operator: Gradients) -> list[Tensor | None]:
    """Every input's gradient, None where it wants none; given: the results' gradients."""
    inputs = list(ctx.saved_tensors)
    whole = [
        torch.zeros(shape, dtype=dtype, device=device) if gradient is None else gradient
        for gradient, (shape, dtype, device) in zip(given, ctx.results, strict=True)
    ]
    found = dict(zip(ctx.wanted, operator(inputs, whole, ctx.wanted), strict=True))
    return [found.get(index) for index in range(len(inputs))]


def gradients(code: Code, inputs: Sequence[Tensor], given: Sequence[Tensor], wanted: Sequence[int]) -> list[Tensor]:
    """Runs the code and asks for the gradients of its `wanted` inputs: contiguous, in memory of their own, zeros where none flows."""
    with torch.enable_grad():
        leaves = [each.detach().requires_grad_(index in wanted) for index, each in enumerate(inputs)]
        made = code(leaves)
    live = [(result, gradient) for result, gradient in zip(made, given, strict=True) if result.requires_grad]
    asked = [leaves[index] for index in wanted]
    outputs, seeds = [result for result, _ in live], [gradient for _, gradient in live]
    found = torch.autograd.grad(outputs, asked, seeds, allow_unused=True) if live else [None] * len(asked)
    return [
        torch.zeros_like(leaf, memory_format=torch.contiguous_format)
        if gradient is None
        else gradient.clone(memory_format=torch.contiguous_format)
        for leaf, gradient in zip(asked, found, strict=True)
    ]


def described(inputs: Sequence[Tensor], wanted: Sequence[int]) -> list[Tensor]:
    """What `gradients` returns, without values."""
    return [torch.empty_like(inputs[index], memory_format=torch.contiguous_format) for index in wanted]
