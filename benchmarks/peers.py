"""Torch's own ways to train on several ranks, each written as its documentation advises, and one process as the reference."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle
from torch.distributed.tensor.parallel import loss_parallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from benchmarks import blocks, tensor_plans
from benchmarks.context import RankContext, StepFunction
from benchmarks.workloads import Batch, optimizer

MICROBATCHES = 4
Schedule = PipelineScheduleSingle | PipelineScheduleMulti


# -- each rank a part of the batch ---------------------------------------------------------------------------------------------------------


def single(context: RankContext) -> StepFunction:
    """The ordinary training loop on one device."""
    model = context.workload.build()
    _compile([model], context)
    return _data_parallel_loop(model, context)


def ddp(context: RankContext) -> StepFunction:
    """DistributedDataParallel; gradients live in its buckets, which saves it a copy."""
    model = context.workload.build()
    _compile([model], context)
    return _data_parallel_loop(DistributedDataParallel(model, gradient_as_bucket_view=True), context)


def fsdp2(context: RankContext) -> StepFunction:
    """FSDP2: each block's parameters are gathered when needed."""
    model = context.workload.build()
    _fully_shard(model, context, init_device_mesh("cpu", (context.world_size,)))
    return _data_parallel_loop(model, context)


def _fully_shard(model: nn.Module, context: RankContext, mesh: DeviceMesh) -> None:
    inner = blocks.blocks(model, context.workload)
    _compile(inner, context)
    for block in inner:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _compile(modules: Iterable[nn.Module], context: RankContext) -> None:
    if context.compiled:
        for module in modules:
            module.compile()


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


# -- each rank a part of every matrix ------------------------------------------------------------------------------------------------------


def tensor_parallel(context: RankContext) -> StepFunction:
    """DTensor: attention and MLP split by columns, then rows; embedding, head and loss split over the vocabulary."""
    model = context.workload.build()
    _split_tensors(model, context, init_device_mesh("cpu", (context.world_size,)))
    _compile(blocks.blocks(model, context.workload), context)
    return _split_loss_loop(model, context, rank=0, copies=1)


def fsdp2_tensor_parallel(context: RankContext) -> StepFunction:
    """DTensor's tensor parallelism on pairs of ranks, FSDP2 over the pairs."""
    model = context.workload.build()
    copies = context.world_size // 2
    mesh = init_device_mesh("cpu", (copies, 2), mesh_dim_names=("dp", "tp"))
    _split_tensors(model, context, mesh["tp"])
    _fully_shard(model, context, mesh["dp"])
    return _split_loss_loop(model, context, rank=context.rank // 2, copies=copies)


def _split_tensors(model: nn.Module, context: RankContext, mesh: DeviceMesh) -> None:
    tensor_plans.prepare(model, context.workload, mesh.size())
    parallelize_module(model, mesh, tensor_plans.plan(context.workload))
    tensor_plans.tie_again(model, context.workload)


def _split_loss_loop(model: nn.Module, context: RankContext, *, rank: int, copies: int) -> StepFunction:
    """Every rank works on the whole batch of its copy of the model, with its part of the weights."""
    adam = optimizer(model.parameters())
    workload = context.workload

    def losses(batch: Batch) -> torch.Tensor:
        logits = model(blocks.input_of(batch)).logits
        loss = blocks.loss_of(logits, blocks.target_of(batch, workload))
        loss.backward()
        return loss.detach()

    def step(batch: Batch) -> float:
        own = context.part(batch, rank, copies)
        if workload.family == "vit":
            loss = losses(own)
        else:
            with loss_parallel():
                loss = losses(own)
        adam.step()
        adam.zero_grad()
        return float(loss)

    return step


# -- each rank a part of the layers --------------------------------------------------------------------------------------------------------


def pipeline(context: RankContext) -> StepFunction:
    """A stage a rank, 1F1B. `pipeline()` cannot split Llama (its rotary tables reach every block), so the stages are ours."""
    return _Pipe(context, copies=1, chunks=1).step


def interleaved(context: RankContext) -> StepFunction:
    """Two stages a rank, interleaved 1F1B."""
    return _Pipe(context, copies=1, chunks=2).step


def ddp_pipeline(context: RankContext) -> StepFunction:
    """Two stages, 1F1B, each with a copy for half of the batch; DDP averages the copies' gradients."""
    return _Pipe(context, copies=context.world_size // 2, chunks=1).step


class _Pipe:
    """The pipelines of a [copies, ranks of a pipeline] mesh, seen from one rank."""

    def __init__(self, context: RankContext, *, copies: int, chunks: int) -> None:
        self.context, self.copies = context, copies
        length = context.world_size // copies
        mesh = init_device_mesh("cpu", (copies, length), mesh_dim_names=("dp", "pp"))
        self.copy, self.place, self.last = context.rank // length, context.rank % length, length - 1
        self.parts = self._stages(length, chunks)
        stages = []
        for number, part in self.parts.items():
            part = (
                part if copies == 1 else DistributedDataParallel(part, process_group=mesh["dp"].get_group(), gradient_as_bucket_view=True)
            )
            stages.append(PipelineStage(part, number, length * chunks, torch.device("cpu"), group=mesh["pp"].get_group()))
        self.schedule = self._schedule(stages, max(MICROBATCHES, length))
        self.adam = optimizer([parameter for part in self.parts.values() for parameter in part.parameters()])
        self.ends = [dist.new_group([copy * length, (copy + 1) * length - 1]) for copy in range(copies)][self.copy]
        self.tied = self._tied_weight(length * chunks)

    def _stages(self, length: int, chunks: int) -> dict[int, blocks.Stage]:
        """This rank's stages by number: every `length`-th from its place on."""
        workload = self.context.workload
        ends = [0, *blocks.ends(workload, [min(self.context.speeds[place::length]) for place in range(length)] * chunks)]
        cut = blocks.parts(workload.build(), workload)
        found = {
            number: blocks.Stage(cut, ends[number], ends[number + 1]) for number in range(length * chunks) if number % length == self.place
        }
        _compile(found.values(), self.context)
        return found

    def _schedule(self, stages: list[PipelineStage], microbatches: int) -> Schedule:
        if len(stages) == 1:
            return Schedule1F1B(stages[0], n_microbatches=microbatches, loss_fn=blocks.loss_of)
        return ScheduleInterleaved1F1B(stages, n_microbatches=microbatches, loss_fn=blocks.loss_of)  # type: ignore[arg-type]

    def _tied_weight(self, stages: int) -> nn.Parameter | None:
        """The weight of which both ends have a copy, whose gradients must be added; None for models without, and between the ends."""
        names = {
            "gpt2": ("embedding.wte.weight", "head.1.weight"),
            "bert": ("embedding.word_embeddings.weight", "head.predictions.decoder.weight"),
        }
        if self.context.workload.family not in names or self.place not in (0, self.last):
            return None
        first, last = names[self.context.workload.family]
        return self.parts[0].get_parameter(first) if self.place == 0 else self.parts[stages - 1].get_parameter(last)

    def step(self, batch: Batch) -> float | None:
        own = self.context.part(batch, self.copy, self.copies)
        losses: list[torch.Tensor] = []
        given = {"target": blocks.target_of(own, self.context.workload), "losses": losses} if self.place == self.last else {}
        inputs = (blocks.input_of(own),) if self.place == 0 else ()
        self.schedule.step(*inputs, **given, return_outputs=False)  # type: ignore[arg-type]
        if self.tied is not None:
            dist.all_reduce(self.tied.grad, group=self.ends)
        self.adam.step()
        self.adam.zero_grad()
        return float(torch.stack(losses).detach().mean()) if losses else None
