"""Calls that are rewritten while capturing, so that later parts meet one form of each thing.

- constants that take another tensor's dtype are made of nothing
- no effect: assertions, casts to the same type, aliases, dropout of nothing
- mean cross-entropy = sum / count, since the two are split differently (the count depends on inputs alone)
- every random number is keyed (`keyed`): a function of the step and of where it stands in the whole tensor
- dropout between the layers of a recurrent network is a call of its own, and so is each of them
- bags of embeddings of one length are rows
- batch normalisation returns its new statistics
- mixtures of experts are products in which each row names its matrix (`experts`)
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shardwise.capture import experts, keyed, operators
from shardwise.capture.builder import Builder, Request
from shardwise.capture.graph import Value
from shardwise.capture.keyed import is_random
from shardwise.capture.recurrent import KINDS, recurrent
from shardwise.errors import CaptureError

__all__ = ["NOISE", "RANDOM_STATE", "is_random", "normalize", "passes_through", "rewriting"]

aten = torch.ops.aten

NOISE = {"aten._assert_tensor_metadata.default", "aten._assert_scalar.default", "aten._assert_async.msg"}

RANDOM_STATE = "__random_state__"

_ALIASES = {
    aten.alias.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.lift_fresh_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.type_as.default,
    aten.view.default,
    aten.reshape.default,
    aten.slice.Tensor,
    aten.expand.default,
}


def passes_through(target: Any, args: tuple[Any, ...], meta: Any) -> Value | None:
    """The input that the call returns unchanged, if it is such a call."""
    if target in _ALIASES and isinstance(meta, torch.Tensor) and isinstance(args[0], Value):
        return args[0] if args[0].shape == tuple(meta.shape) and args[0].dtype == meta.dtype else None
    if target in keyed.DROPOUTS and not isinstance(meta, (tuple, list)) and (args[1] == 0 or not args[2]):
        return args[0]
    return None


def normalize(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], metas: list[torch.Tensor], builder: Builder) -> tuple[Value, ...]:
    """The results of the call, rewritten where it must be, whose parts are appended to `builder`."""
    call = Request(target=target, args=args, kwargs=kwargs, metas=metas, builder=builder)
    for rewrite in (_REWRITES.get(target), keyed.rewrite, experts.rewrite):
        if rewrite is not None and (found := rewrite(call)) is not None:
            return found if isinstance(found, tuple) else (found,) * len(metas)
    return builder.add(target, args, kwargs, metas)


def rewriting(target: Any) -> str | None:
    """In words, what capture makes of the operator's calls; None where it makes nothing else of them."""
    rewrite = _REWRITES.get(target)
    return None if rewrite is None else inspect.getdoc(rewrite)


def _view(call: Request) -> tuple[Value, ...]:
    """A reshape: `aten.reshape.default`."""
    return call.builder.add(aten.reshape.default, call.args, call.kwargs, call.metas)


def _constant(call: Request) -> Value:
    """`aten.zeros.default`, `aten.ones.default` or `aten.full.default`: it takes none of the tensor's values, and may be for all
    microbatches."""
    size, value = call.get("size"), [call.get("fill_value")] if call.target is aten.new_full.default else []
    target = {aten.new_zeros.default: aten.zeros.default, aten.new_ones.default: aten.ones.default}.get(call.target, aten.full.default)
    return call.add(target, list(size), *value, dtype=call.meta.dtype, device=torch.device("cpu"), pin_memory=False)


def _broadcast(call: Request) -> tuple[Value, ...]:
    """Each tensor expanded by itself: `aten.expand.default`."""
    return tuple(_expanded(call, each, meta) for each, meta in zip(call.args[0], call.metas, strict=True))


def _expanded(call: Request, x: Value, meta: torch.Tensor) -> Value:
    return x if x.shape == tuple(meta.shape) else call.add(aten.expand.default, x, list(meta.shape), meta=meta)


def _copy(call: Request) -> Value:
    """`aten.expand.default` of what is copied: what is overwritten does not matter, but its dtype and shape."""
    source, meta = call.args[1], call.meta
    if source.dtype != meta.dtype:
        source = call.add(aten.to.dtype, source, meta.dtype, meta=meta.new_empty(source.shape))
    return _expanded(call, source, meta)


def _promoted(call: Request) -> tuple[Value, ...] | None:
    """Whole numbers that it makes real are cast first: `aten.to.dtype`, in whatever precision the graph is to be."""
    given = [each for each in call.args if isinstance(each, Value)]
    if not call.meta.is_floating_point() or any(each.dtype.is_floating_point or each.dtype.is_complex for each in given):
        return None
    real = call.meta.dtype
    args = tuple(call.add(aten.to.dtype, x, real, meta=call.meta.new_empty(x.shape)) if isinstance(x, Value) else x for x in call.args)
    return call.builder.add(call.target, args, call.kwargs, call.metas)


def _cross_entropy(call: Request) -> Value:
    """`shardwise.cross_entropy_sum` or `shardwise.cross_entropy_each`.

    A mean of labels divides by the count of valid ones, a mean of probabilities by that of the positions.
    """
    logits, target, weight = call.args[0], call.args[1], call.get("weight")
    arguments = (logits, target, weight, call.get("ignore_index"), call.get("label_smoothing"))
    if call.get("reduction") == 0:
        return call.add(operators.cross_entropy_each, *arguments)
    total = call.add(operators.cross_entropy_sum, *arguments)
    if call.get("reduction") == 1 and operators.is_soft(target.dtype):
        return call.add(aten.div.Tensor, total, logits.numel // logits.shape[min(len(logits.shape) - 1, 1)])
    return _over_valid(call, total) if call.get("reduction") == 1 else total


def _negative_log_likelihood(call: Request) -> Value:
    """`shardwise.nll_sum`, which a mean divides by `shardwise.valid_count`, or `shardwise.nll_each`."""
    arguments = (*call.args[:2], call.get("weight"), call.get("ignore_index"))
    if call.get("reduction") == 0:
        return call.add(operators.nll_each, *arguments)
    total = call.add(operators.nll_sum, *arguments)
    return _over_valid(call, total) if call.get("reduction") == 1 else total


def _over_valid(call: Request, total: Value) -> Value:
    count = call.add(operators.valid_count, call.args[1], call.get("weight"), call.get("ignore_index"), call.meta.dtype)
    return call.add(aten.div.Tensor, total, count)


def _embedding(call: Request) -> Value | None:
    """Sparse gradients become dense ones."""
    if not call.get("sparse"):
        return None
    return call.add(aten.embedding.default, *call.args[:2], call.get("padding_idx"), call.get("scale_grad_by_freq"))


def _embedding_bag(call: Request) -> Value:
    """`shardwise.bag_of_rows` where all bags have one length (offsets that count in steps of it), else `shardwise.bag_of_runs`."""
    weight, index, starts = call.args[:3]
    scale, mode = call.get("per_sample_weights"), ("sum", "mean", "max")[call.get("mode")]
    padding = None if call.target is aten.embedding_bag.default else call.get("padding_idx")
    if padding is not None and padding < 0:  # counted from the end; but in the inner operator it means none
        padding = None if call.target is aten._embedding_bag.default else padding + weight.shape[0]
    rest = (mode, padding, bool(call.get("scale_grad_by_freq")))
    length = _step(starts, index.numel)
    if length is None or call.get("include_last_offset"):
        return call.add(operators.bag_of_runs, weight, index, starts, scale, *rest, bool(call.get("include_last_offset")))
    sizes = [index.numel // length, length]
    index = call.add(aten.reshape.default, index, sizes, meta=call.meta.new_empty(sizes, dtype=index.dtype))
    if scale is not None:
        scale = call.add(aten.reshape.default, scale, sizes, meta=call.meta.new_empty(sizes, dtype=scale.dtype))
    return call.add(operators.bag_of_rows, weight, index, scale, *rest)


def _step(starts: Value, end: int) -> int | None:
    """n, if `starts` is 0, n, 2n, … up to the end."""
    made = starts.producer
    if made is None or made.target is not aten.arange.start_step or made.args[:2] != (0, end) or end % made.args[2]:
        return None
    return int(made.args[2])


def _recurrent(call: Request) -> tuple[Value, ...]:
    """`shardwise.recurrent.default`; with dropout between its layers, one for each of them and the dropout."""
    x, states, weights, biases, layers, probability, training, both_ways, batch_first = call.args
    given = list(states) if isinstance(states, (tuple, list)) else [states]

    def run(x: Value, states: list[Value], weights: Sequence[Value], layers: int, metas: list[torch.Tensor]) -> tuple[Value, ...]:
        constants = (KINDS[call.target], biases, layers, both_ways, batch_first)
        return call.builder.add(recurrent, (x, states, list(weights), None, *constants), {}, metas)

    if not probability or not training or layers == 1:
        return run(x, given, weights, layers, call.metas)
    ways, each = 1 + both_ways, len(weights) // layers
    like = [call.meta, *(meta.new_empty((ways, *meta.shape[1:])) for meta in call.metas[1:])]
    kept: list[list[Value]] = []
    for layer in range(layers):
        own = [_layer_of(call, state, layer * ways, ways) for state in given]
        x, *last = run(x, own, weights[layer * each : (layer + 1) * each], 1, like)
        kept.append(last)
        if layer < layers - 1:
            x = keyed.dropped(call, x, probability, call.meta)
    joined = zip(zip(*kept, strict=True), call.metas[1:], strict=True)
    return (x, *(call.add(aten.cat.default, list(found), 0, meta=meta) for found, meta in joined))


def _layer_of(call: Request, state: Value, start: int, ways: int) -> Value:
    return call.add(aten.slice.Tensor, state, 0, start, start + ways, meta=call.meta.new_empty((ways, *state.shape[1:])))


def _weight_norm(call: Request) -> Value:
    """`shardwise.weight_norm`, whose gradient is made of plain operators."""
    return call.add(operators.weight_norm, *call.args[:2], call.get("dim"))


def _own_statistics(call: Request) -> Value:
    """`shardwise.batch_norm_alone`: the batch's own statistics, of which none are kept."""
    return call.add(operators.batch_norm_alone, *call.args[:3], call.get("eps"))


def _batch_norm(call: Request) -> Value | tuple[Value, ...]:
    """`shardwise.batch_norm_fixed` with statistics that are given; `shardwise.batch_norm` with the batch's own, of which it returns the new
    running ones."""
    x, weight, bias, mean, var = call.args[:5]
    if call.target is aten._native_batch_norm_legit_no_training.default or not call.get("training"):
        return call.add(operators.batch_norm_fixed, x, weight, bias, mean, var, call.get("eps"))
    out, *statistics = _with_running(call, operators.batch_norm)
    return (out, out, out, *statistics)


def _with_running(call: Request, operator: Any) -> tuple[Value, ...]:
    """The result and the new running statistics."""
    metas = [call.meta, *(call.meta.new_empty(value.shape) for value in call.args[3:5])]
    return call.builder.add(operator, (*call.args[:5], call.get("momentum"), call.get("eps")), {}, metas)


def _instance_norm(call: Request) -> Value | None:
    """`shardwise.batch_norm_fixed` with statistics that are given; `shardwise.instance_norm` where running ones change.

    Exporting does not see that they do.
    """
    mean, var = call.args[3:5]
    if not call.get("use_input_stats"):
        return call.add(operators.batch_norm_fixed, *call.args[:5], call.get("eps"))
    if mean is None:
        return None
    if (update := getattr(call.builder, "update", None)) is None:
        raise CaptureError("instance normalisation changes its running statistics; build it with track_running_stats=False")
    out, new_mean, new_var = _with_running(call, operators.instance_norm)
    update(mean, new_mean)
    update(var, new_var)
    return out


def _attention(call: Request) -> Value | None:
    """With dropout `shardwise.dropped_attention`, whose random mask does not depend on the kernel."""
    query, key, value = call.args[:3]
    if not call.get("dropout_p"):
        return None
    scale = call.get("scale") or 1 / math.sqrt(query.shape[-1])
    constants = float(call.get("dropout_p")), bool(call.get("is_causal")), scale
    state, number = call.builder.random_state(), call.builder.random_key()
    return call.add(operators.dropped_attention, query, key, value, call.get("attn_mask"), *constants, state, key=number)


def _slice_scatter(call: Request) -> Value | None:
    """Torch has no derivative of it for complex numbers: what is before, the new part and what is after, joined."""
    x, part, dim = call.args[0], call.args[1], call.get("dim")
    start, stop, _ = slice(call.get("start"), call.get("end")).indices(x.shape[dim])
    if not call.meta.is_complex() or call.get("step") != 1:
        return None
    ends = [(0, start), (stop, x.shape[dim])]
    before, after = ([_part(call, x, dim, *end)] if end[1] > end[0] else [] for end in ends)
    pieces = [*before, part, *after]
    return call.add(aten.cat.default, pieces, dim) if len(pieces) > 1 else part


def _part(call: Request, x: Value, dim: int, start: int, stop: int) -> Value:
    meta = call.meta.new_empty([stop - start if d == dim % len(x.shape) else size for d, size in enumerate(x.shape)])
    return call.add(aten.slice.Tensor, x, dim, start, stop, meta=meta)


_Rewritten = Value | tuple[Value, ...] | None
# Operator → what is made of it; None: it stays, or another rewriting may have it.
_REWRITES: dict[Any, Callable[[Request], _Rewritten]] = {
    **dict.fromkeys((aten.view.default, aten._unsafe_view.default), _view),
    aten.copy.default: _copy,
    **dict.fromkeys((aten.new_zeros.default, aten.new_ones.default, aten.new_full.default), _constant),
    aten.broadcast_tensors.default: _broadcast,
    aten.cross_entropy_loss.default: _cross_entropy,
    **dict.fromkeys((aten.nll_loss_nd.default, aten.nll_loss.default, aten.nll_loss2d.default), _negative_log_likelihood),
    aten.embedding.default: _embedding,
    **dict.fromkeys((aten.embedding_bag.default, aten.embedding_bag.padding_idx, aten._embedding_bag.default), _embedding_bag),
    aten.scaled_dot_product_attention.default: _attention,
    **dict.fromkeys((aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input), _recurrent),
    **dict.fromkeys((aten._weight_norm.default, aten._weight_norm_interface.default), _weight_norm),
    **dict.fromkeys((aten._native_batch_norm_legit_functional.default, aten._native_batch_norm_legit_no_training.default), _batch_norm),
    aten._native_batch_norm_legit.no_stats: _own_statistics,
    aten.instance_norm.default: _instance_norm,
    aten.slice_scatter.default: _slice_scatter,
    **dict.fromkeys(
        (aten.div.Tensor, aten.div.Scalar, aten.mul.Tensor, aten.mul.Scalar, aten.pow.Scalar, aten.pow.Tensor_Scalar), _promoted
    ),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar), _promoted),
    **dict.fromkeys((aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default, aten.exp.default, aten.log.default), _promoted),
    **dict.fromkeys((aten.sin.default, aten.cos.default, aten.tanh.default, aten.sigmoid.default), _promoted),
}
