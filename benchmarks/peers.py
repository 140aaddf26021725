"""Torch's own ways to train on two ranks, each written as its documentation advises, and one process as the reference."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor.parallel import loss_parallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from benchmarks import blocks, tensor_plans
from benchmarks.context import RankContext, StepFunction
from benchmarks.workloads import Batch, Workload, optimizer

MICROBATCHES = 4


def single(context: RankContext) -> StepFunction:
    """The ordinary training loop on one device."""
    return _data_parallel_loop(context.workload.build(), context)


def ddp(context: RankContext) -> StepFunction:
    """DistributedDataParallel; gradients live in its buckets, which saves it a copy."""
    model = DistributedDataParallel(context.workload.build(), gradient_as_bucket_view=True)
    return _data_parallel_loop(model, context)


def fsdp2(context: RankContext) -> StepFunction:
    """FSDP2: each block's parameters are gathered when needed."""
    model = context.workload.build()
    mesh = init_device_mesh("cpu", (context.world_size,))
    for block in blocks.blocks(model, context.workload):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return _data_parallel_loop(model, context)


def _data_parallel_loop(model: nn.Module, context: RankContext) -> StepFunction:
    """Each rank takes its part of the batch; the model's wrapper averages the gradients."""
    adam = optimizer(model.parameters())

    def step(batch: Batch) -> float:
        loss = model(**context.part(batch)).loss
        loss.backward()
        adam.step()
        adam.zero_grad()
        return float(loss.detach())

    return step


def tensor_parallel(context: RankContext) -> StepFunction:
    """DTensor: attention and MLP split by columns, then rows; embedding, head and loss split over the vocabulary."""
    model = context.workload.build()
    mesh = init_device_mesh("cpu", (context.world_size,))
    tensor_plans.prepare(model, context.workload, context.world_size)
    parallelize_module(model, mesh, tensor_plans.plan(context.workload))
    tensor_plans.tie_again(model, context.workload)
    return _whole_batch_loop(model, split_logits=context.workload.family != "vit")


def _whole_batch_loop(model: nn.Module, *, split_logits: bool) -> StepFunction:
    """Every rank works on the whole batch, with its part of the weights."""
    adam = optimizer(model.parameters())

    def losses(batch: Batch) -> torch.Tensor:
        logits = model(blocks.input_of(batch)).logits
        loss = blocks.loss_of(logits, blocks.target_of(batch))
        loss.backward()
        return loss.detach()

    def step(batch: Batch) -> float:
        if split_logits:
            with loss_parallel():
                loss = losses(batch)
        else:
            loss = losses(batch)
        adam.step()
        adam.zero_grad()
        return float(loss)

    return step


def pipeline(context: RankContext) -> StepFunction:
    """Two stages, 1F1B. `pipeline()` cannot split Llama (its rotary tables reach every block), so the stages are ours."""
    stage = _stage(context)
    runtime = PipelineStage(stage, context.rank, context.world_size, torch.device("cpu"))
    schedule = Schedule1F1B(runtime, n_microbatches=MICROBATCHES, loss_fn=blocks.loss_of)
    adam = optimizer(stage.parameters())
    tied = _tied_weight(stage, context)

    def step(batch: Batch) -> float | None:
        losses: list[torch.Tensor] = []
        if context.rank == 0:
            schedule.step(blocks.input_of(batch), return_outputs=False)
        else:
            schedule.step(target=blocks.target_of(batch), losses=losses, return_outputs=False)
        if tied is not None:
            dist.all_reduce(tied.grad)
        adam.step()
        adam.zero_grad()
        return float(torch.stack(losses).detach().mean()) if losses else None

    return step


def _stage(context: RankContext) -> blocks.Stage:
    cut = blocks.parts(context.workload.build(), context.workload)
    middle = first_stage_blocks(context.workload)
    return blocks.Stage(cut, *((0, middle) if context.rank == 0 else (middle, len(cut.blocks))))


def first_stage_blocks(workload: Workload) -> int:
    """Return how many blocks the first of two stages gets, so that both multiply equally much; the head counts as part of a block."""
    matrices = 3 if workload.family == "llama" else 2
    block = 4 * workload.hidden**2 + matrices * workload.hidden * workload.ffn
    head = 0 if workload.family == "vit" else workload.hidden * workload.vocabulary
    return min(workload.layers - 1, max(1, round((workload.layers + head / block) / 2)))


def _tied_weight(stage: blocks.Stage, context: RankContext) -> nn.Parameter | None:
    """Return the weight of which GPT-2 has a copy at both ends, whose gradients must be added; None for other models."""
    if context.workload.family != "gpt2":
        return None
    return stage.get_parameter("embedding.wte.weight" if context.rank == 0 else "head.1.weight")
