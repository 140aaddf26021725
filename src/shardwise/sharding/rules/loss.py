"""Losses. Cross-entropy over a split vocabulary exchanges a maximum and three sums for each position, never the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shardwise.capture import ctc, operators
from shardwise.capture.graph import Op, fill
from shardwise.sharding.collectives import all_reduce
from shardwise.sharding.rules.build import given
from shardwise.sharding.rules.registry import rule
from shardwise.sharding.rules.shape import simple_dims
from shardwise.sharding.signature import AxisSplit, Call, Dim, Signature, Split, signature

aten = torch.ops.aten


# -- cross-entropy -----------------------------------------------------------------------------------------------------------------------


@rule(operators.cross_entropy_sum, operators.cross_entropy_each)
def cross_entropy(op: Op) -> Signature:
    """n v …, n … -> scalar (or n …): samples and positions stand alone; the vocabulary v may be split by local code.

    Soft targets, which are probabilities, have the logits' dims.
    """
    soft = operators.is_soft(op.inputs[1].dtype)
    found = _of_classes(op, soft=soft)
    splits = {**found.splits, "v": Split(others="I", blocked=False, microbatches=False)}
    linear = (frozenset({1}),) if soft and op.args[4] == 0 else ()
    return replace(found, splits=splits, local=_cross_entropy, linear=linear)


def _of_classes(op: Op, *, soft: bool) -> Signature:
    """n v …, n … and maybe v -> scalar (or n …)."""
    scores = op.inputs[0].shape
    place = min(len(scores) - 1, 1)
    names = [(f"d{index}",) for index in range(len(scores) - 1)]
    classes: list[Dim] = [*names[:place], ("v",), *names[place:]]
    sizes = {f"d{index}": size for index, size in enumerate((*scores[:place], *scores[place + 1 :]))} | {"v": scores[place]}
    inputs = (tuple(classes), tuple(classes if soft else names), *((("v",),) for _ in op.inputs[2:]))
    outputs = tuple(names) if op.outputs[0].shape else ()
    return Signature(inputs=inputs, outputs=(outputs,), sizes=sizes, splits={name[0]: Split() for name in names})


def _cross_entropy(call: Call, tensors: Sequence[Tensor]) -> Any:
    splits = call.splits.get("v", ())
    if not splits:
        return call.run(tensors)
    assert len(splits) == 1, "the vocabulary is split over one axis"
    logits, target, weight, ignore_index, smoothing = fill(call.op.args, list(tensors))
    shares = _Shares(split=splits[0], classes=call.sizes["v"], ignore_index=ignore_index, smoothing=smoothing)
    each: Tensor = _SplitVocabulary.apply(logits, target, weight, shares)
    return each.sum() if call.op.target is operators.cross_entropy_sum else each


@dataclass(frozen=True, kw_only=True)
class _Shares:
    """Which part of `classes` classes is here, and how much of each class is wanted: −Σ share[c] · log p[c] is the loss of a position."""

    split: AxisSplit
    classes: int
    ignore_index: int
    smoothing: float

    def of_label(self, target: Tensor, here: int, weight: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The column of each label among the `here` classes, and its share without smoothing: zero where the label is elsewhere."""
        local = target - self.split.part.start
        column = torch.where((local >= 0) & (local < here), local, 0)
        share = ((column == local) & self.valid(target)).to(dtype) * (1 - self.smoothing)
        return column, share if weight is None else share * weight[column]

    def valid(self, target: Tensor) -> Tensor:
        return target != self.ignore_index

    def of_all(self, target: Tensor, like: Tensor, weight: Tensor | None) -> Tensor | None:
        """The share of every class: of soft targets, or what smoothing gives to each; None where there is none."""
        dim = min(like.dim() - 1, 1)
        floor = self.smoothing / self.classes
        if operators.is_soft(target.dtype):
            share = target * (1 - self.smoothing) + floor
        elif self.smoothing:
            share = (self.valid(target).to(like.dtype) * floor).unsqueeze(dim).expand(like.shape)
        else:
            return None
        return share if weight is None else share * operators.along(weight, like, dim)


class _SplitVocabulary(torch.autograd.Function):
    """The cross-entropy of each position over logits [n, classes of this rank, …]; equal on all ranks of the group.

    Σ share[c] · (log Σ exp z − z[c]): the sums of share, share · z and exp z go over the ranks.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, shares: _Shares) -> Tensor:
        dim = min(logits.dim() - 1, 1)
        highest = all_reduce(logits.amax(dim), shares.split.group, "max")
        shifted = logits - highest.unsqueeze(dim)
        exponentials = shifted.exp()
        every = shares.of_all(target, logits, weight)
        sums = [exponentials.sum(dim), *(torch.zeros_like(highest),) * 2]
        if every is not None:
            sums[1:] = [every.sum(dim), (every * shifted).sum(dim)]
        if not operators.is_soft(target.dtype):
            column, share = shares.of_label(target, logits.shape[dim], weight, logits.dtype)
            label = shifted.gather(dim, column.unsqueeze(dim)).squeeze(dim)
            sums[1:] = [sums[1] + share, sums[2] + torch.where(share != 0, share * label, 0.0)]
        exponential, total, wanted = all_reduce(torch.stack(sums), shares.split.group, "sum").unbind(0)
        log_sum = exponential.log()
        ctx.shares = shares
        ctx.save_for_backward(exponentials / exponential.unsqueeze(dim), total, target, weight, shifted, log_sum)
        return total * log_sum - wanted

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        softmax, total, target, weight, shifted, log_sum = ctx.saved_tensors
        dim = min(softmax.dim() - 1, 1)
        scale = gradient.unsqueeze(dim)
        result = softmax * (total.unsqueeze(dim) * scale)
        every = ctx.shares.of_all(target, softmax, weight)
        if every is not None:
            result = result - every * scale
        for_target = None
        if not operators.is_soft(target.dtype):
            column, share = ctx.shares.of_label(target, softmax.shape[dim], weight, softmax.dtype)
            result = result.scatter_add(dim, column.unsqueeze(dim), -(share * gradient).unsqueeze(dim))
        elif ctx.needs_input_grad[1]:
            for_target = (log_sum.unsqueeze(dim) - shifted) * (scale * (1 - ctx.shares.smoothing))
            for_target = for_target if weight is None else for_target * operators.along(weight, softmax, dim)
        return result, for_target, None, None


@rule(operators.nll_sum, operators.nll_each)
def negative_log_likelihood(op: Op) -> Signature:
    """n v …, n … -> scalar (or n …). With v split each rank adds up the labels that it has."""
    found = _of_classes(op, soft=False)
    splits = {**found.splits, "v": Split(blocked=False, microbatches=False)}
    return replace(found, splits=splits, local=_negative_log_likelihood, linear=(frozenset({0}),))


def _negative_log_likelihood(call: Call, tensors: Sequence[Tensor]) -> Any:
    start = sum(split.part.start for split in call.splits.get("v", ()))
    scores, target, weight, ignore_index = fill(call.op.args, list(tensors))
    local = target - start
    here = (target != ignore_index) & (local >= 0) & (local < scores.shape[min(scores.dim() - 1, 1)])
    return call.op.target(scores, torch.where(here, local, -1), weight, -1)


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
    if "v" in sizes:
        splits["v"] = Split(blocked=False, microbatches=False)
    return Signature(inputs=inputs, outputs=((),), sizes=sizes, splits=splits, local=_valid_count, linear=_in_weight(op))


def _in_weight(op: Op) -> tuple[frozenset[int], ...]:
    return (frozenset({1}),) if len(op.inputs) == 2 else ()


def _valid_count(call: Call, tensors: Sequence[Tensor]) -> Any:
    """With classes split each rank adds up the weights of the labels that it has."""
    splits = call.splits.get("v", ())
    if not splits:
        return call.run(tensors)
    target, weight = tensors
    local = target - sum(split.part.start for split in splits)
    here = (target != call.op.args[2]) & (local >= 0) & (local < weight.shape[0])
    return operators.valid_count(torch.where(here, local, -1), weight, -1, call.op.args[3])


# -- losses of each element, or of each sample -------------------------------------------------------------------------------------------

_ELEMENTWISE = [
    aten.mse_loss.default,
    aten.smooth_l1_loss.default,
    aten.l1_loss.default,
    aten.huber_loss.default,
    aten.soft_margin_loss.default,
    aten.binary_cross_entropy.default,
    aten.binary_cross_entropy_with_logits.default,
    aten.kl_div.default,
    aten.poisson_nll_loss.default,
    aten.hinge_embedding_loss.default,
    aten.margin_ranking_loss.default,
]
# Operator → how many of its inputs are vectors for each sample; further ones are numbers for each sample, or weights of classes.
_OF_SAMPLES: dict[Any, int] = {
    aten.cosine_embedding_loss.default: 2,
    aten.triplet_margin_loss.default: 3,
    aten.multilabel_margin_loss.default: 2,
    aten.multi_margin_loss.default: 1,
}


@rule(*_ELEMENTWISE)
def elementwise_loss(op: Op) -> Signature:
    """Every dim of the (broadcast) inputs is summed away, or kept without reduction; a mean divides by the whole count."""
    whole = torch.broadcast_shapes(*(value.shape for value in op.inputs))
    names = simple_dims(whole)
    sizes = {f"d{dim}": size for dim, size in enumerate(whole)}
    return Signature(
        inputs=tuple(_broadcast(value.shape, names, whole) for value in op.inputs),
        outputs=(tuple(names) if op.outputs[0].shape else (),),
        sizes=sizes,
        splits={name: Split() for name in sizes},
        local=_loss,
    )


def _broadcast(shape: Sequence[int], names: Sequence[Dim], whole: Sequence[int]) -> tuple[Dim, ...]:
    shift = len(whole) - len(shape)
    return tuple(() if size != whole[dim + shift] else names[dim + shift] for dim, size in enumerate(shape))


@rule(*_OF_SAMPLES)
def loss_of_samples(op: Op) -> Signature:
    """n v, … -> n: the vector of each sample is compared as a whole."""
    vectors = _OF_SAMPLES[op.target]
    batch: list[Dim] = [(f"n{dim}",) for dim in range(len(op.inputs[0].shape) - 1)]
    inputs = [(*batch, ("v",))] * vectors
    inputs += [tuple(batch) if index == vectors else (("v",),) for index in range(vectors, len(op.inputs))]
    sizes = {name[0]: size for name, size in zip([*batch, ("v",)], op.inputs[0].shape, strict=True)}
    alike = all(tuple(sizes[dim[0]] for dim in dims) == value.shape for dims, value in zip(inputs, op.inputs, strict=True))
    if not alike:
        return _as_a_whole(op)
    return Signature(
        inputs=tuple(inputs),
        outputs=(tuple(batch) if op.outputs[0].shape else (),),
        sizes=sizes,
        splits={name[0]: Split() for name in batch},
        reasons={"v": "a sample's vector is compared as a whole"},
        local=_loss,
    )


@rule(ctc.ctc_losses._opoverload)
def ctc_losses(op: Op) -> Signature:
    """t n v, n s, n, n -> n; labels in one run belong to no sample's row."""
    one_run = len(op.inputs[1].shape) == 1
    reasons = {"t": "a sequence is aligned as a whole", "v": "any class may be met", "s": "labels are aligned as a whole"}
    if one_run:
        reasons["n"] = "the labels of all samples lie in one run"
    text = "t n v, s, n, n -> n" if one_run else "t n v, n s, n, n -> n"
    return signature(op, text, splits={} if one_run else {"n": Split()}, reasons=reasons)


def _as_a_whole(op: Op) -> Signature:
    """Nothing is split."""
    tensors = [tuple((f"t{n}d{dim}",) for dim in range(len(value.shape))) for n, value in enumerate((*op.inputs, *op.outputs))]
    sizes = {f"t{n}d{dim}": size for n, value in enumerate((*op.inputs, *op.outputs)) for dim, size in enumerate(value.shape)}
    inputs, outputs = tuple(tensors[: len(op.inputs)]), tuple(tensors[len(op.inputs) :])
    return Signature(inputs=inputs, outputs=outputs, sizes=sizes, reasons={"*": "inputs are broadcast"})


def _loss(call: Call, tensors: Sequence[Tensor]) -> Any:
    """reduction: 0 none, 1 mean, 2 sum. A mean's count is a product of the factors that are summed away.

    Of contiguous tensors: for others torch describes gradients with other strides than its kernels give them.
    """
    result = call.run([tensor.contiguous() for tensor in tensors])
    if given(call.op, "reduction") != 1:
        return result
    share = 1.0
    for splits in call.splits.values():
        for split in splits:
            share *= split.part.length / split.part.size
    return result if share == 1.0 else result * share
