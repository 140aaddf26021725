"""Attention in a ring: each rank has a part of the queries and of the keys, and the keys and values go round (Liu et al., Ring Attention
with Blockwise Transformers, 2023).

    step 0   rank 0: its queries × keys of 0     rank 1: … × keys of 1     rank 2: … × keys of 2      meanwhile keys go on to the next rank
    step 1                          of 2                        of 0                        of 1
    step 2                          of 1                        of 2                        of 0

What each block of keys gives is put together by the logarithms of the sums of exponentials, so the result is that of all keys at once. A
rank holds two blocks of keys and values: the one that it computes with and the one that arrives. In the backward pass they go round again,
and behind each block the sum of its gradients, which gets home with the last step.

Under a causal mask ranks have a run of tokens from each end of the sequence, so that in each step all have the same to do: all of their
queries see the first run of a rank before them and not its second, and of a rank behind them the second run of their queries sees all.

    rank 0: 0 7     rank 1: 1 6     rank 2: 2 5     rank 3: 3 4        rank 1 with the keys of 0: (1 6) × 0, of 2: 6 × (2 5)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from shardwise.capture import draws
from shardwise.capture.graph import Op
from shardwise.sharding.collectives import begin_shift, end_shift
from shardwise.sharding.rules.attention import attend, has_dropout, is_causal, mask_of, weight_dims
from shardwise.sharding.rules.random import held_along, indices_of
from shardwise.sharding.signature import Call, Signature, Split
from shardwise.sharding.types import Shard, part

__all__ = ["around", "ring_signature"]

aten = torch.ops.aten


def ring_signature(op: Op, sig: Signature) -> Signature | str:
    """Attention whose queries and keys are split together, as factor `q`; where it cannot be, why."""
    query, key, value = op.inputs[:3]
    if len(query.shape) != 4 or query.shape[0] != key.shape[0] or query.shape[1] % key.shape[1] or key.shape[:3] != value.shape[:3]:
        return "its queries and keys are not of the form [samples, heads, tokens, features]"
    if query.shape[2] != key.shape[2]:
        return f"it has {query.shape[2]} queries and {key.shape[2]} keys"
    mask = mask_of(op)
    if mask is not None and mask.requires_grad:
        return "its mask has a gradient"
    keys = [tuple(("q",) if dim == ("k",) else dim for dim in tensor) for tensor in sig.inputs[1:3]]
    reasons = {name: why for name, why in sig.reasons.items() if name != "k"}
    return replace(
        sig,
        inputs=(sig.inputs[0], *keys, *sig.inputs[3:]),
        splits={**sig.splits, "q": Split(microbatches=False, blocked=False, mirrored=True)},
        linear=(),
        local=around,
        reasons=reasons | ({"k": "it is normalised as a whole"} if mask is not None else {}),
    )


def around(call: Call, tensors: Sequence[Tensor]) -> Any:
    """Local code of attention in a ring."""
    splits = call.splits.get("q", ())
    if not splits:
        return attend(call, tensors)
    (split,) = splits
    assert split.rank is not None
    shard = Shard(0, mirrored=len(split.part.runs) > 1)
    query, key, value = tensors[:3]
    mask = None if mask_of(call.op) is None else _added(tensors[3], query.dtype)
    scale = call.op.args[6] if has_dropout(call.op) else call.op.kwargs.get("scale")
    ring = _Ring(
        group=split.group,
        rank=split.rank,
        runs=tuple(part(call.sizes["q"], shard, split.ranks, rank).runs for rank in range(split.ranks)),
        scale=call.op.inputs[0].shape[-1] ** -0.5 if scale is None else scale,
        causal=is_causal(call.op),
        drops=call if has_dropout(call.op) else None,
    )
    return _RingAttention.apply(query, key, value, mask, tensors[-1] if has_dropout(call.op) else None, ring)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to the scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask.logical_not(), float("-inf"))


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """The queries from `first` on see the keys up to `upto`; causal: each those up to its own."""

    first: int
    upto: int
    causal: bool


@dataclass(frozen=True, kw_only=True)
class _Ring:
    """One rank's place. runs: of each rank, the tokens that it has, (from, to) in order; drops: the call, where it drops weights."""

    group: str
    rank: int
    runs: tuple[tuple[tuple[int, int], ...], ...]
    scale: float
    causal: bool
    drops: Call | None = None

    @property
    def probability(self) -> float:
        """Of dropping a weight."""
        return 0.0 if self.drops is None else self.drops.op.args[4]

    def keep(self, seen: _Seen, source: int, state: Tensor | None) -> Tensor | None:
        """Which weights of these queries and that rank's keys are kept; None where all are."""
        if self.drops is None or state is None:
            return None
        call, parts = self.drops, self.runs[source]
        dims = weight_dims(call.op)
        along = [indices_of(call, dim, state) for dim in dims[:-1]]
        columns = torch.cat([torch.arange(*run, device=call.device) for run in parts])[: seen.upto]
        along = [*along[:-1], along[-1][seen.first :], columns]
        shape = [prod(call.sizes[name] for name in dim) for dim in dims]
        fours = all(number % 4 == 0 for run in parts for number in run)
        return draws.keyed_keep(held_along(shape, along, runs=fours), state, self.probability, call.op.kwargs["key"])

    @property
    def ranks(self) -> int:
        return len(self.runs)

    @property
    def lengths(self) -> list[int]:
        return [sum(end - start for start, end in runs) for runs in self.runs]

    def source(self, step: int) -> int:
        """Whose keys are here."""
        return (self.rank - step) % self.ranks

    def seen(self, source: int) -> _Seen | None:
        """Which of this rank's queries see which of that one's keys; None where none do."""
        every = self.lengths[source]
        if not self.causal or source == self.rank:
            return _Seen(first=0, upto=every, causal=self.causal)
        if source < self.rank:
            start, end = self.runs[source][0]
            return _Seen(first=0, upto=end - start, causal=False)
        start, end = self.runs[self.rank][0]
        return _Seen(first=end - start, upto=every, causal=False) if len(self.runs[self.rank]) > 1 else None

    def columns(self, mask: Tensor | None, source: int) -> Tensor | None:
        """What of a mask is of that rank's keys."""
        if mask is None or mask.shape[-1] == 1:
            return mask
        parts = [mask.narrow(-1, start, end - start) for start, end in self.runs[source]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def begin(self, x: Tensor, step: int) -> Tensor:
        return begin_shift(x, self.group, 2, self.lengths, step, self.rank)

    def end(self, ticket: Tensor, x: Tensor, step: int) -> Tensor:
        return end_shift(ticket, x, 2, self.lengths, step, self.rank)


class _RingAttention(torch.autograd.Function):
    """query [b, h, q, d], key [b, g, k, d], value [b, g, k, e], this rank's parts; mask: added to scores, [.., q, all keys], or None."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, state: Tensor | None, ring: _Ring) -> Tensor:
        held, width = torch.cat([key, value], -1), key.shape[-1]
        total: tuple[Tensor, Tensor] | None = None
        for step in range(ring.ranks):
            source, last = ring.source(step), step == ring.ranks - 1
            ticket = None if last else ring.begin(held, step)
            if (seen := ring.seen(source)) is not None:
                found = _block(ring, seen, query, held, width, mask, source, state).forward()
                total = found if total is None else _together(total, found, seen.first)
            if ticket is not None:
                held = ring.end(ticket, held, step)
        assert total is not None
        out, sums = total[0].to(query.dtype), total[1]
        ctx.ring, ctx.width = ring, width
        ctx.save_for_backward(query, key, value, out, sums, mask, state)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, out, sums, mask, state = ctx.saved_tensors
        ring, width = ctx.ring, ctx.width
        gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
        held, dtype = torch.cat([key, value], -1), _summed_dtype(query.dtype)
        of_query: Tensor | None = None
        sent: Tensor | None = None  # the sum of the gradients of the block before, on its way to the next rank
        moving: Tensor | None = None
        for step in range(ring.ranks):
            source, last = ring.source(step), step == ring.ranks - 1
            ticket = None if last else ring.begin(held, step)
            found: Tensor | None = None
            if (seen := ring.seen(source)) is not None:
                rows = [each[:, :, seen.first :] for each in (gradient, out, sums)]
                of_q, of_k, of_v = _block(ring, seen, query, held, width, mask, source, state).backward(*rows)
                of_query = of_q.to(dtype) if of_query is None else _rows_added(of_query, of_q.to(dtype), seen.first)
                found = torch.cat([of_k.to(dtype), of_v.to(dtype)], -1)
                if unseen := held.shape[2] - seen.upto:
                    found = torch.nn.functional.pad(found, (0, 0, 0, unseen))
            if moving is not None and sent is not None:
                arrived = ring.end(moving, sent, step - 1)
                found = arrived if found is None else arrived + found
            sent = torch.zeros_like(held, dtype=dtype) if found is None else found
            moving = ring.begin(sent, step)
            if ticket is not None:
                held = ring.end(ticket, held, step)
        assert moving is not None and sent is not None and of_query is not None
        home = ring.end(moving, sent, ring.ranks - 1)
        of_key, of_value = home[..., :width].to(key.dtype), home[..., width:].to(value.dtype)
        return of_query.to(query.dtype), of_key, of_value, None, None, None


def _summed_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which the blocks' parts are added up."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _together(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], first: int) -> tuple[Tensor, Tensor]:
    """(result, logarithm of the sum of exponentials) over two blocks of keys, of which a row may have none; the other's rows are those
    from `first` on."""
    if first:
        rows = _together((one[0][:, :, first:], one[1][:, :, first:]), other, 0)
        return torch.cat([one[0][:, :, :first], rows[0]], 2), torch.cat([one[1][:, :, :first], rows[1]], 2)
    sums = torch.logaddexp(one[1], other[1])
    shares = [torch.where(each.isneginf(), 0.0, (each - sums).exp())[..., None] for each in (one[1], other[1])]
    return one[0] * shares[0] + other[0] * shares[1], sums


def _rows_added(total: Tensor, rows: Tensor, first: int) -> Tensor:
    """The sum, of which `rows` are those from `first` on."""
    return total + rows if not first else torch.cat([total[:, :, :first], total[:, :, first:] + rows], 2)


def _block(
    ring: _Ring, seen: _Seen, query: Tensor, held: Tensor, width: int, mask: Tensor | None, source: int, state: Tensor | None
) -> _Block:
    """What of a rank's queries and of another's keys and values goes together."""
    key, value = (each[:, :, : seen.upto] for each in (held[..., :width], held[..., width:]))
    return _Block(
        scale=ring.scale,
        causal=seen.causal,
        query=query[:, :, seen.first :],
        key=key,
        value=value,
        mask=ring.columns(mask, source),
        keep=ring.keep(seen, source, state),
        probability=ring.probability,
    )


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Queries with one block of keys and values; heads of keys serve several of queries each."""

    scale: float
    causal: bool
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    keep: Tensor | None
    probability: float

    def forward(self) -> tuple[Tensor, Tensor]:
        """(result, logarithm of the sum of exponentials of each row), in the dtype in which blocks are added up."""
        key, value = self._each_head(self.key), self._each_head(self.value)
        dtype = _summed_dtype(self.query.dtype)
        if self._fused:
            out, sums = aten._scaled_dot_product_flash_attention_for_cpu(self.query, key, value, 0.0, self.causal, scale=self.scale)
            return out.to(dtype), sums.to(dtype)
        scores = self._scores(key)
        sums = scores.logsumexp(-1)
        return self._dropped(_exponentials(scores, sums)).to(value.dtype) @ value, sums

    def backward(self, gradient: Tensor, out: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value. out, sums: over all blocks."""
        key, value = self._each_head(self.key), self._each_head(self.value)
        if self._fused:
            of_q, of_k, of_v = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gradient, self.query, key, value, out, sums, 0.0, self.causal, scale=self.scale
            )
            return of_q, self._each_key(of_k), self._each_key(of_v)
        weights = _exponentials(self._scores(key), sums)
        of_weights = self._dropped(gradient @ value.mT) - (gradient * out).sum(-1, keepdim=True)
        of_scores = (weights * of_weights * self.scale).to(key.dtype)
        return (
            of_scores @ key,
            self._each_key(of_scores.mT @ self.query),
            self._each_key(self._dropped(weights).to(gradient.dtype).mT @ gradient),
        )

    def _dropped(self, x: Tensor) -> Tensor:
        return x if self.keep is None else draws.dropped(x, self.keep, self.probability)

    @property
    def _fused(self) -> bool:
        return self.mask is None and self.keep is None and self.query.device.type == "cpu" and self.key.shape[-1] == self.value.shape[-1]

    def _scores(self, key: Tensor) -> Tensor:
        scores = (self.query @ key.mT).to(_summed_dtype(self.query.dtype)) * self.scale
        if self.causal:
            place = torch.arange(scores.shape[-1], device=scores.device)
            scores = scores.masked_fill(place[None] > place[:, None], float("-inf"))
        return scores if self.mask is None else scores + self.mask

    def _each_head(self, x: Tensor) -> Tensor:
        """Of the keys, or values, those of each query head."""
        each = self.query.shape[1] // x.shape[1]
        return x if each == 1 else x.repeat_interleave(each, 1)

    def _each_key(self, x: Tensor) -> Tensor:
        """A sum over the query heads that have one head of keys."""
        each = x.shape[1] // self.key.shape[1]
        return x if each == 1 else x.unflatten(1, (-1, each)).sum(2)


def _exponentials(scores: Tensor, sums: Tensor) -> Tensor:
    """Of the scores less their rows' sums; 0 in rows of which no key is seen."""
    sums = sums[..., None]
    return (scores - torch.where(sums.isneginf(), 0.0, sums)).exp()
