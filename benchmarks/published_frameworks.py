"""What the frameworks of published measurements hold on a device, and which of its bytes a source printed.

    framework    bytes of a number                                            source
    Megatron     2 + 4 gradient + 12 states ÷ ranks; fp16: gradient 2, and    docs/source/api-guide/dist_optimizer.md; of 2022,
                 4 while the update runs, when activations are freed          megatron/optimizer/optimizer.py
    DeepSpeed    fp16: 2 + 2 gradient + 12 states ÷ ranks, and while the      runtime/zero/stage_1_and_2.py; zero/config.py:
                 update runs, of the rank's own: averaged and flat gradient   reduce_bucket_size 5e8
                 in 16 bits, its float32 copy
    Megatron-    2 + 2 gradient + 12 states, all ÷ ranks                      examples/megatron_fsdp: --grad-reduce-in-bf16
    FSDP
    FSDP, JAX    4 parameter + 4 gradient + 8 states, all ÷ ranks             torch.distributed.fsdp.MixedPrecisionPolicy; MaxText's
                                                                              weight_dtype

What is printed: nvidia-smi counts all of a device; torch's `memory_reserved` not the CUDA context and NCCL's buffers; its
`memory_allocated`, supposed where nothing is said, not the allocator's free blocks either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.published_rows import Row
from benchmarks.published_software import JAX, TORCH, is_compiled, launched

__all__ = ["Holding", "holding_of", "printed_bytes"]

_BUCKET = 5 * 10**8  # numbers: DeepSpeed's reduce_bucket_size unless set otherwise
_LOSS_COMPILED_SINCE = 2025  # torchtitan, components/loss.py


@dataclass(frozen=True, kw_only=True)
class Holding:
    """Fields of a Scheme; see there. over_context: whether the number of ranks among which ZeRO divides leaves those of the context axis
    out, which share in it."""

    gradient_bytes: int = 4
    copied: bool = True
    step_bytes: int = 0
    bucket_bytes: int = 0
    keeps_sent: bool = False
    remade: str = "kernels"
    over_context: bool = False


def holding_of(row: Row, year: int) -> Holding:
    """Of the row's framework, in a source of that year; Megatron's where none is named."""
    framework, divided, half = row.framework or "", row.layout.zero in (3, "hybrid"), row.layout.precision == "fp16"
    if framework == "deepspeed":
        return Holding(
            gradient_bytes=2 if half else 4, step_bytes=8 if half else 0, bucket_bytes=_BUCKET * (2 if half else 4), keeps_sent=True
        )
    if framework in JAX:
        return Holding(copied=False, remade="all")
    if framework in TORCH or divided:
        later = (row.year or max(year, launched(row))) >= _LOSS_COMPILED_SINCE
        remade = "none" if not is_compiled(row) else "all" if later else "blocks"
        return Holding(
            copied=not divided,
            remade=remade,
            over_context=framework == "torchtitan",
            gradient_bytes=2 if framework == "megatron" else 4,
        )
    return Holding(gradient_bytes=2 if half else 4)


def printed_bytes(row: Row, memory: Mapping[str, int]) -> float:
    """Of a device's bytes by kind, those that the row's figure counts."""
    apart = {"device": (), "reserved": ("runtime",), "allocated": ("runtime", "cached")}[row.memory_counts]
    return sum(nbytes for kind, nbytes in memory.items() if kind not in apart)
