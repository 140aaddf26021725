"""DTensor plans for the transformers models: which matrix is split by column, which by row. Mixtral's experts stay whole.

GPT-2 multiplies by `Conv1D` (a transposed linear) with query, key and value in one matrix. Both are put into the form that
DTensor's styles understand: a `Linear`, its rows reordered so that an even split gives each rank its own heads.

    rows of the fused matrix        q0 q1 | k0 k1 | v0 v1      (q0: the queries of rank 0's heads)
    reordered, then split in two    q0 k0 v0 | q1 k1 v1
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from transformers.pytorch_utils import Conv1D

from benchmarks.workloads import Workload

_COLUMNS = {
    "gpt2": ("transformer.h.*.attn.c_attn", "transformer.h.*.mlp.c_fc"),
    "llama": tuple(f"model.layers.*.{name}_proj" for name in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")),
    "vit": tuple(f"vit.layers.*.{name}" for name in ("attention.q_proj", "attention.k_proj", "attention.v_proj", "mlp.fc1")),
    "bert": tuple(
        f"bert.encoder.layer.*.{name}"
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense")
    ),
    "moe": tuple(f"model.layers.*.self_attn.{name}_proj" for name in "qkv"),
}
_ROWS = {
    "gpt2": ("transformer.h.*.attn.c_proj", "transformer.h.*.mlp.c_proj"),
    "llama": ("model.layers.*.self_attn.o_proj", "model.layers.*.mlp.down_proj"),
    "vit": ("vit.layers.*.attention.o_proj", "vit.layers.*.mlp.fc2"),
    "bert": ("bert.encoder.layer.*.attention.output.dense", "bert.encoder.layer.*.output.dense"),
    "moe": ("model.layers.*.self_attn.o_proj",),
}
_EMBEDDING = {
    "gpt2": "transformer.wte",
    "llama": "model.embed_tokens",
    "bert": "bert.embeddings.word_embeddings",
    "moe": "model.embed_tokens",
}
_HEAD = {"gpt2": "lm_head", "llama": "lm_head", "bert": "cls.predictions.decoder", "moe": "lm_head"}
TIED = ("gpt2", "bert")
"""Families whose head has the embedding's weight."""


def plan(workload: Workload) -> dict[str, ParallelStyle]:
    """Return the plan for `parallelize_module`."""
    styles: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in _COLUMNS[workload.family]}
    styles |= {name: RowwiseParallel() for name in _ROWS[workload.family]}
    if workload.family in _EMBEDDING:
        styles[_EMBEDDING[workload.family]] = RowwiseParallel(input_layouts=Replicate())
        styles[_HEAD[workload.family]] = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    return styles


def prepare(model: nn.Module, workload: Workload, ranks: int) -> None:
    """Bring GPT-2's matrices into a form that can be split over `ranks`; other models stay as they are."""
    if workload.family != "gpt2":
        return
    for block in model.get_submodule("transformer.h").children():
        attention, mlp = block.get_submodule("attn"), block.get_submodule("mlp")
        attention.c_attn = _linear(attention.c_attn, fused=3, ranks=ranks)
        attention.split_size = workload.hidden // ranks  # type: ignore[assignment]
        for owner, name in ((attention, "c_proj"), (mlp, "c_fc"), (mlp, "c_proj")):
            setattr(owner, name, _linear(owner.get_submodule(name)))


def tie_again(model: nn.Module, workload: Workload) -> None:
    """Give a tied head the embedding's weight again: both are split over the vocabulary."""
    if workload.family in TIED:
        head, embedding = model.get_submodule(_HEAD[workload.family]), model.get_submodule(_EMBEDDING[workload.family])
        head.weight = embedding.weight


def _linear(conv: object, *, fused: int = 1, ranks: int = 1) -> nn.Linear:
    """Return the linear that equals `conv`, its outputs reordered for a split of `fused` matrices over `ranks`."""
    assert isinstance(conv, Conv1D)
    linear = nn.Linear(conv.nx, conv.nf)
    with torch.no_grad():
        linear.weight.copy_(_by_rank(conv.weight.t(), fused, ranks))
        linear.bias.copy_(_by_rank(conv.bias, fused, ranks))
    return linear


def _by_rank(rows: Tensor, fused: int, ranks: int) -> Tensor:
    return rows.unflatten(0, (fused, ranks, -1)).transpose(0, 1).flatten(0, 2)
