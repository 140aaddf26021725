"""Losses. Cross-entropy over a split vocabulary exchanges a maximum, a sum and the label's logit, never the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.capture import operators
from shardwise.capture.graph import Op
from shardwise.sharding.collectives import all_reduce
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.rules.shape import simple_dims
from shardwise.sharding.signature import AxisSplit, Call, Signature, Split

aten = torch.ops.aten


@rule(operators.cross_entropy_sum)
def cross_entropy_sum(op: Op) -> Signature:
    """n v …, n … -> scalar: samples and positions are summed away; the vocabulary v may be split by local code."""
    logits, target = op.inputs[0].shape, op.inputs[1].shape
    batched = len(logits) > 1
    names = [(f"d{index}",) for index in range(len(target))]
    scores = [*names[:1], ("v",), *names[1:]] if batched else [("v",)]
    sizes = {f"d{index}": size for index, size in enumerate(target)} | {"v": logits[1 if batched else 0]}
    splits = {f"d{index}": Split() for index in range(len(target))}
    weighted, smoothing = len(op.inputs) == 3, op.args[4]
    reasons = {}
    if weighted or smoothing or len(logits) != 2:
        reasons["v"] = "class weights, label smoothing or image-like logits need it whole"
    else:
        splits["v"] = Split(others="I", blocked=False, microbatches=False)
    inputs = (tuple(scores), tuple(names), *(((("v",),),) if weighted else ()))
    return Signature(inputs=inputs, outputs=((),), sizes=sizes, splits=splits, local=_cross_entropy, reasons=reasons)


def _cross_entropy(call: Call, tensors: Sequence[Tensor]) -> Any:
    splits = call.splits.get("v", ())
    if not splits:
        return call.run(tensors)
    assert len(splits) == 1, "the vocabulary is split over one axis"
    logits, target = tensors
    return _SplitVocabulary.apply(logits, target, splits[0], call.op.args[3])


class _SplitVocabulary(torch.autograd.Function):
    """Sum of cross-entropies over logits [n, vocabulary of this rank]; equal on all ranks of the group."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, split: AxisSplit, ignore_index: int) -> Tensor:
        highest = all_reduce(logits.amax(1), split.group, "max")
        shifted = logits - highest[:, None]
        exponentials = shifted.exp()
        local = target - split.part.start
        here = (local >= 0) & (local < logits.shape[1])
        column = torch.where(here, local, 0)
        label = torch.where(here, shifted.gather(1, column[:, None])[:, 0], 0.0)
        both = all_reduce(torch.stack([exponentials.sum(1), label]), split.group, "sum")
        valid = target != ignore_index
        ctx.save_for_backward(exponentials / both[0][:, None], column, here & valid, valid)
        return torch.where(valid, both[0].log() - both[1], 0.0).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        softmax, column, here, valid = ctx.saved_tensors
        scaled = softmax * (valid.to(softmax.dtype) * gradient)[:, None]
        return scaled.scatter_add(1, column[:, None], -(here.to(softmax.dtype) * gradient)[:, None]), None, None, None


@rule(operators.valid_count)
def valid_count(op: Op) -> Signature:
    target = op.inputs[0].shape
    names = simple_dims(target)
    sizes = {f"d{index}": size for index, size in enumerate(target)}
    inputs: tuple[Any, ...] = (tuple(names),)
    if len(op.inputs) == 2:
        inputs = (tuple(names), (("v",),))
        sizes["v"] = op.inputs[1].shape[0]
    splits = {f"d{index}": Split() for index in range(len(target))}
    return Signature(inputs=inputs, outputs=((),), sizes=sizes, splits=splits, reasons={"v": "any class may be met"})


@rule(aten.mse_loss.default, aten.smooth_l1_loss.default, aten.l1_loss.default, aten.binary_cross_entropy_with_logits.default)
def elementwise_loss(op: Op) -> Signature:
    """Every dim is summed away (or kept, without reduction); a mean divides by the whole count."""
    names = simple_dims(op.inputs[0].shape)
    sizes = {f"d{index}": size for index, size in enumerate(op.inputs[0].shape)}
    same = all(value.shape == op.inputs[0].shape for value in op.inputs)
    splits = {name: Split() for name in sizes} if same else {}
    inputs = tuple(tuple(names) if same else tuple((f"w{n}{d}",) for d in range(len(value.shape))) for n, value in enumerate(op.inputs))
    if not same:
        sizes |= {f"w{n}{d}": size for n, value in enumerate(op.inputs) for d, size in enumerate(value.shape)}
    outputs = tuple(names) if op.outputs[0].shape else ()
    reasons = {} if same else {"*": "inputs are broadcast"}
    return Signature(inputs=inputs, outputs=(outputs,), sizes=sizes, splits=splits, local=_loss, reasons=reasons)


def _reduction_place(op: Op) -> int:
    return 4 if op.target is aten.binary_cross_entropy_with_logits.default else 2


def _loss(call: Call, tensors: Sequence[Tensor]) -> Any:
    """reduction: 0 none, 1 mean, 2 sum."""
    result = call.run(tensors)
    if call.op.argument(_reduction_place(call.op), "reduction", 1) != 1:
        return result
    local = tensors[0].numel()
    return result if local == call.op.inputs[0].numel else result * (local / call.op.inputs[0].numel)
