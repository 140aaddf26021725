"""Attention in a ring by itself: ranks as threads, against attention to all keys at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shardwise.capture.graph import Op
from shardwise.runtime.in_process import run_ranks
from shardwise.runtime.transport import Transport
from shardwise.sharding.collectives import group_name
from shardwise.sharding.rules import signature_of
from shardwise.sharding.rules.ring import ring_signature
from shardwise.sharding.signature import AxisSplit, Call, Signature
from shardwise.sharding.trial import sample
from shardwise.sharding.types import Shard, join, part, take

RANKS, SHARD = 3, Shard(2, mirrored=True)


def ringed(op: Op) -> Signature:
    found = ring_signature(op, signature_of(op))
    assert isinstance(found, Signature), found
    return found


def around(rank: int, op: Op, tensors: list[Tensor], seed: Tensor) -> list[Tensor]:
    """A rank's part of the result and of the gradients."""
    size = tensors[0].shape[2]
    mine = part(size, Shard(0, mirrored=True), RANKS, rank)
    split = AxisSplit(axis="cp", group=group_name("cp", range(RANKS)), ranks=RANKS, rank=rank, part=mine)
    sig = ringed(op)
    shape = (*tensors[0].shape[:2], mine.length, tensors[2].shape[3])
    call = Call(op=op, shapes=(shape,), sizes=sig.sizes, splits={"q": (split,)})
    leaves = [take(each, SHARD, RANKS, rank).clone().requires_grad_() for each in tensors]
    result = sig.local(call, leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves, take(seed, SHARD, RANKS, rank))]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 1.5e-2)], ids=str)
def test_the_parts_are_those_of_attention_to_all_keys(dtype: torch.dtype, bound: float) -> None:
    """17 causal tokens over 3 ranks, two query heads for each of keys; in half precision blocks are added up in float32."""
    torch.manual_seed(0)
    shapes = [(2, 4, 17, 8), (2, 2, 17, 8), (2, 2, 17, 8)]
    tensors, seed = [torch.randn(shape).to(dtype) for shape in shapes], torch.randn(2, 4, 17, 8).to(dtype)
    target = torch.ops.aten.scaled_dot_product_attention.default
    op = sample(target, *tensors, None, 0.0, True, enable_gqa=True).op

    def work(rank: int, transport: Transport) -> list[Tensor]:
        return around(rank, op, tensors, seed)

    found = [join(list(parts), SHARD).double() for parts in zip(*run_ranks(RANKS, work), strict=True)]
    leaves = [each.double().requires_grad_() for each in tensors]
    result = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    wanted = [result.detach(), *torch.autograd.grad(result, leaves, seed.double())]
    for mine, right in zip(found, wanted, strict=True):
        assert (mine - right).norm() / right.norm() < bound
