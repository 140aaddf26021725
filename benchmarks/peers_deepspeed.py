"""DeepSpeed's ways to train on several ranks, on CPUs over gloo. Its operators in C++, for GPUs, offloading and inference, are not built.

Imported by its ranks alone, where the package is installed:

    DS_BUILD_OPS=0 DS_ACCELERATOR=cpu pip install --no-build-isolation "shardwise[deepspeed]"
"""

from __future__ import annotations

import io
import os
import warnings
from contextlib import redirect_stdout
from itertools import pairwise
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
from deepspeed.pipe import PipelineModule

from benchmarks import blocks
from benchmarks.context import RankContext, StepFunction
from benchmarks.peers import MICROBATCHES
from benchmarks.workloads import Batch, optimizer

_BUCKET_ELEMENTS = 1 << 23  # 32 MiB, as DDP's are about; its own default is 2 GB, allocated ahead

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # sums for inference alone; else compiled before the first step
deepspeed.logger.setLevel("ERROR")
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # it calls what torch has renamed since


def zero2(context: RankContext) -> StepFunction:
    """ZeRO-2: each rank keeps its part of the gradients and of the optimizer's state."""
    return _zero(context, stage=2)


def zero3(context: RankContext) -> StepFunction:
    """ZeRO-3: of the parameters, too."""
    return _zero(context, stage=3)


def _zero(context: RankContext, *, stage: int) -> StepFunction:
    model = context.workload.build()
    if context.compiled:
        model.compile()
    samples = context.workload.batch_size // context.world_size
    engine = _engine(
        model, train_micro_batch_size_per_gpu=samples, zero_optimization={"stage": stage, "reduce_bucket_size": _BUCKET_ELEMENTS}
    )

    def step(batch: Batch) -> float:
        loss = engine(**context.part(batch)).loss
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    return step


def pipeline(context: RankContext) -> StepFunction:
    """A stage a rank, 1F1B: for models whose ends share no weight."""
    deepspeed.init_distributed("gloo", dist_init_required=False)
    workload, microbatches = context.workload, max(MICROBATCHES, context.world_size)
    cut, ends = blocks.parts(workload.build(), workload), [0, *blocks.ends(workload, context.speeds)]
    stages = [blocks.Stage(cut, first, end) for first, end in pairwise(ends)]
    with redirect_stdout(io.StringIO()):  # it prints its stages
        model = PipelineModule(stages, num_stages=context.world_size, loss_fn=blocks.loss_of, partition_method="uniform")
    if context.compiled:
        model.compile()
    samples = workload.batch_size // microbatches
    engine = _engine(model, train_micro_batch_size_per_gpu=samples, gradient_accumulation_steps=microbatches)

    def step(batch: Batch) -> float:
        inputs, targets = blocks.input_of(batch), blocks.target_of(batch, workload)
        return float(engine.train_batch(iter(zip(inputs.chunk(microbatches), targets.chunk(microbatches), strict=True))))

    return step


def _engine(model: Any, **config: object) -> Any:
    """gradient_clipping: its default is 1. steps_per_print: never."""
    config |= {"gradient_clipping": 0.0, "steps_per_print": 1 << 30}
    return deepspeed.initialize(model=model, optimizer=optimizer(model.parameters()), config=config)[0]
