"""The parts of the models that the peers cut at: embedding, blocks, head; of a U-Net, which cannot be cut in two, the blocks alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.workloads import Batch, Workload

_BLOCKS = {
    "gpt2": ("transformer.h",),
    "llama": ("model.layers",),
    "vit": ("vit.layers",),
    "bert": ("bert.encoder.layer",),
    "unet": ("unet.down_blocks", "unet.up_blocks"),
    "moe": ("model.layers",),
}


def blocks(model: nn.Module, workload: Workload) -> nn.ModuleList:
    """Return the model's blocks, in their order."""
    return nn.ModuleList(block for path in _BLOCKS[workload.family] for block in model.get_submodule(path).children())


def input_of(batch: Batch) -> Tensor:
    """Return the tensor that enters the model: tokens or pixels."""
    return batch["pixel_values"] if "pixel_values" in batch else batch["input_ids"]


def target_of(batch: Batch, workload: Workload) -> Tensor:
    """Return the labels, those of models of the next token moved by one; the last position is ignored."""
    if workload.family in ("vit", "bert"):
        return batch["labels"]
    return F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross-entropy of `logits` [..., classes] for `target` [...]."""
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1))


class Gpt2Embedding(nn.Module):
    """Token plus position."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.wte = model.get_submodule("transformer.wte")
        self.wpe = model.get_submodule("transformer.wpe")

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [batch, sequence] to [batch, sequence, hidden]."""
        return self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]).unsqueeze(0))


class FirstPosition(nn.Module):
    """The class token of an image."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, sequence, hidden] to [batch, hidden]."""
        return hidden[:, 0]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A model cut open; `rotary` makes Llama's position tables, which every stage needs."""

    embedding: nn.Module
    blocks: nn.ModuleList
    head: nn.Module
    rotary: nn.Module | None = None


def parts(model: nn.Module, workload: Workload) -> Parts:
    """Cut `model` open."""
    inner = blocks(model, workload)
    get = model.get_submodule
    if workload.family == "gpt2":
        return Parts(embedding=Gpt2Embedding(model), blocks=inner, head=nn.Sequential(get("transformer.ln_f"), get("lm_head")))
    if workload.family == "bert":
        return Parts(embedding=get("bert.embeddings"), blocks=inner, head=get("cls"))
    if workload.family in ("llama", "moe"):
        head = nn.Sequential(get("model.norm"), get("lm_head"))
        return Parts(embedding=get("model.embed_tokens"), blocks=inner, head=head, rotary=get("model.rotary_emb"))
    head = nn.Sequential(get("vit.layernorm"), FirstPosition(), get("classifier"))
    return Parts(embedding=get("vit.embeddings"), blocks=inner, head=head)


def ends(workload: Workload, speeds: Sequence[float]) -> list[int]:
    """Return the block before which each stage ends, so that all take about equally long at these speeds; each has a block.

    The head counts as part of a block.
    """
    matrices = {"llama": 3, "moe": 6}.get(workload.family, 2)
    block = 4 * workload.hidden**2 + matrices * workload.hidden * workload.ffn
    head = 0 if workload.family == "vit" else workload.hidden * workload.vocabulary
    stages, whole = len(speeds), workload.layers + head / block
    found = [round(whole * sum(speeds[: stage + 1]) / sum(speeds)) for stage in range(stages - 1)] + [workload.layers]
    for stage in range(stages):
        found[stage] = min(max(found[stage], stage + 1), workload.layers - (stages - 1 - stage))
    return found


class Stage(nn.Module):
    """Consecutive blocks, with the embedding before them in the first stage and the head after them in the last."""

    def __init__(self, cut: Parts, first: int, end: int) -> None:
        super().__init__()
        self.embedding = cut.embedding if first == 0 else nn.Identity()
        self.blocks = nn.ModuleList(cut.blocks[first:end])
        self.head = cut.head if end == len(cut.blocks) else nn.Identity()
        self.rotary = cut.rotary

    def forward(self, value: Tensor) -> Tensor:
        """Tokens, pixels or hidden states to hidden states or logits."""
        hidden = self.embedding(value)
        tables = {} if self.rotary is None else {"position_embeddings": self._tables(hidden)}
        for block in self.blocks:
            hidden = block(hidden, **tables)
        return self.head(hidden)

    def _tables(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        assert self.rotary is not None
        return self.rotary(hidden, position_ids=torch.arange(hidden.shape[1]).unsqueeze(0))
