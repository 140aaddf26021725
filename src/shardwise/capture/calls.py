"""Calls that exporting would not follow, in operators that it follows.

F.ctc_loss                   an operator of ours (`ctc`): torch's makes a table whose shape depends on the data
F.gaussian_nll_loss          without its question whether all variances are positive
bincount(x, minlength=n)     n sums: as many as the data say otherwise. A number beyond n is an error when it runs
x[:, i], i a tensor          index_select: torch would ask i for its value
x.data                       x.detach()
torch.autograd.grad          refused here, where the code that does so is known
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from shardwise.capture.ctc import ctc_losses
from shardwise.capture.packed import Packed

__all__ = ["GRADIENTS", "TakesGradients", "followable", "plain_checkpoints"]

GRADIENTS = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)


class TakesGradients(Exception):
    """The forward pass asks for gradients."""


@contextmanager
def followable() -> Iterator[None]:
    """Inside, such calls are other calls, and torch.distributions ask no question about their arguments' values.

    For the code that is exported: torch.export asks the values of places itself, unless this is entered after it.
    """
    distribution: Any = torch.distributions.Distribution
    checks = distribution._validate_args
    distribution.set_default_validate_args(False)
    try:
        packed = Packed()
        with (
            plain_checkpoints(),
            _cumulative_averages(),
            packed.packing() if torch.compiler.is_exporting() else nullcontext(),
            _Followable(packed),
        ):
            yield
    finally:
        distribution.set_default_validate_args(checks)


@contextmanager
def plain_checkpoints() -> Iterator[None]:
    """Inside, torch.utils.checkpoint with use_reentrant=True runs its function as it is; torch.autograd.grad cannot go through it."""
    kind: Any = CheckpointFunction
    kind.apply = staticmethod(lambda function, preserve, *args: function(*args))
    try:
        yield
    finally:
        del kind.apply


@contextmanager
def _cumulative_averages() -> Iterator[None]:
    """Inside, BatchNorm with momentum=None divides by a tensor, the number of batches."""
    original = _BatchNorm.forward

    def forward(self: Any, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        if self.momentum is not None or not self.training or not self.track_running_stats:
            return original(self, input)
        self._check_input_dim(input)
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        out = F.batch_norm(input, mean, var, self.weight, self.bias, True, 1.0, self.eps)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            for running, new in ((self.running_mean, mean), (self.running_var, var)):
                running.add_((new - running) / self.num_batches_tracked)
        return out

    _BatchNorm.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        _BatchNorm.forward = original  # type: ignore[method-assign]


class _Followable(TorchFunctionMode):
    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.packed = packed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in GRADIENTS and torch.compiler.is_exporting():
            raise TakesGradients("it takes gradients in its forward pass (torch.autograd.grad, torch.func.grad)")
        if func == _GET_DATA:
            return args[0].detach()
        if func == _SET_DATA and args[1].untyped_storage()._cdata == args[0].untyped_storage()._cdata:
            return None  # what `x.data *= y` does at its end
        if (made := self.packed.call(func, args, kwargs)) is not NotImplemented:
            return made
        instead = _INSTEAD.get(func)
        return func(*args, **kwargs) if instead is None else instead(*args, **kwargs)


_GET_DATA, _SET_DATA = Tensor.data.__get__, Tensor.data.__set__  # type: ignore[attr-defined]


def _ctc_loss(*args: Any, **kwargs: Any) -> Tensor:
    """As torch's: `mean` divides each sample's loss by its number of labels."""
    call = inspect.signature(F.ctc_loss).bind(*args, **kwargs)
    call.apply_defaults()
    log_probs, targets, input_lengths, target_lengths, blank, reduction, zero_infinity = call.arguments.values()
    single = log_probs.dim() == 2
    if single:
        log_probs, targets = log_probs[:, None], targets[None] if targets.dim() else targets
    lengths = [torch.as_tensor(each, device=targets.device, dtype=torch.int64).reshape(-1) for each in (input_lengths, target_lengths)]
    losses = ctc_losses(log_probs, targets, *lengths, blank, zero_infinity)
    if reduction in ("none", 0):  # torch.ctc_loss counts them
        return losses[0] if single else losses
    if reduction in ("sum", 2):
        return losses.sum()
    return (losses / lengths[1].clamp_min(1).to(losses.dtype)).mean()


def _gaussian_nll_loss(
    input: Tensor,  # noqa: A002 (torch's name)
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """As torch's: a variance below eps counts as eps, and gets the gradient."""
    var = var if isinstance(var, Tensor) else torch.full_like(input, var)
    if var.shape != input.shape and var.shape == input.shape[:-1]:
        var = var.unsqueeze(-1)
    var = var + (var.clamp(min=eps) - var).detach()
    losses = 0.5 * (torch.log(var) + (input - target) ** 2 / var)
    losses = losses + 0.5 * math.log(2 * math.pi) if full else losses
    return losses.mean() if reduction == "mean" else losses.sum() if reduction == "sum" else losses


def _bincount(input: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:  # noqa: A002 (torch's name)
    if not minlength:
        return torch.bincount(input, weights)
    ones = torch.ones_like(input, dtype=torch.int64) if weights is None else weights
    return torch.zeros(minlength, dtype=ones.dtype, device=input.device).scatter_add(0, input.long(), ones)


def _getitem(x: Tensor, index: Any) -> Tensor:
    entries = list(index) if isinstance(index, tuple) else [index]
    simple = all(each is None or each is ... or isinstance(each, (int, slice)) or _is_place(each) for each in entries)
    if not simple or not any(map(_is_place, entries)):
        return x[index]
    dim, taken = 0, sum(each is not None and each is not ... for each in entries)
    for number, each in enumerate(entries):
        if each is ...:
            dim += x.dim() - taken
        elif each is not None:
            if isinstance(each, Tensor):
                place = each.long().reshape(1)
                x = x.index_select(dim, torch.where(place < 0, place + x.shape[dim], place))
                entries[number] = 0
            dim += 1
    return x[tuple(entries)]


def _is_place(entry: Any) -> bool:
    """A tensor with one whole number."""
    return isinstance(entry, Tensor) and entry.dim() == 0 and not entry.is_floating_point() and entry.dtype is not torch.bool


_INSTEAD: dict[Any, Callable[..., Any]] = {
    F.ctc_loss: _ctc_loss,
    torch.ctc_loss: _ctc_loss,
    F.gaussian_nll_loss: _gaussian_nll_loss,
    torch.bincount: _bincount,
    Tensor.bincount: _bincount,
    Tensor.__getitem__: _getitem,
}
