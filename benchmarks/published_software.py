"""What the software of a published measurement could do, from what its row and source say, else from its framework and year.

Kernels and overlaps differ more between frameworks and years than devices of one generation do: attention as one kernel or as many, in
which generation; elementwise operators fused or one by one; communication beside computation or after it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import inf

from benchmarks.published_rows import Row

__all__ = ["JAX", "TORCH", "Software", "is_compiled", "launched", "software_of", "unfitted"]

TORCH = ("torchtitan", "llm-foundry", "fms-fsdp", "composer", "torch", "fsdp")  # programs of PyTorch's own operators
_JAX = ("pax", "t5x")  # XLA writes scores and softmax out unless told otherwise
JAX = (*_JAX, "maxtext")
_FUSED_SINCE = 2024  # frameworks came to fuse attention by default ...
_FUSED_EARLIER = {"llm-foundry": 2023, "torchtitan": 2023, "maxtext": 2023}
_BEFORE_FUSED = ("v100", "a100", "tpu-v4")  # ... on devices of that time; for later ones all fuse it
_LAUNCHED = {"v100": 2017, "a100": 2020, "h100": 2022, "h200": 2024, "b200": 2025, "gb200": 2025, "b300": 2025, "gb300": 2025}
_YOUNG = 0.82  # of products' rate that PyTorch's operators reach in a device's first year: MPT on H100, 2023, against Megatron-LM, 2024
_OVERLAP = {2022: 0.0, 2023: 0.25}  # until that year: Megatron-LM 3.0 reduced gradients after the backward pass, NeMo 23 partly beside it
_OVERLAP_NOW = 0.85
_ALWAYS_OVERLAPS = ("maxtext",)  # XLA's latency-hiding scheduler
_DISTRIBUTED_SINCE = 2023  # Megatron's distributed optimizer in all of NVIDIA's recipes
_OVERLAPS_TENSORS_SINCE = 2024  # Megatron-LM's README and NeMo's recipes
_EAGER_UNTIL = 2019  # then Megatron-LM fused softmax, biases and dropout
_BLOCKING_S = 50e-6  # between two kernels where the host waits for the first before it launches the second
_POINTWISE = r"^(?!.*(core|attn|attention)).*\b(norm|layernorm|act|moe_act|mla_up_proj|swiglu)\b"
_HIDDEN = 0.5  # of what tensor ranks send, by Transformer Engine's user buffers
_PARTS_UNTIL = 2021  # then DeepSpeed's ZeRO-3 came to gather into one tensor (its 0.6, zero/partition_parameters.py)
# Until then it, and torch below it, named and copied each rank's part of a matrix by itself, the device waiting (_allgather_param there;
# torch's ProcessGroupNCCL.cpp, allgather of a list): fitted to Narayanan et al. 2021, table 2.
_PART_S = 30e-6
_ONE_CHANNEL_UNTIL = 2021  # between two nodes' ranks, in NCCL before 2.12 (src/graph/paths.cc, ncclTopoGetNchannels) ...
_CHANNEL_BYTES_PER_S = 14e9  # ... and what one carries, as NCCL reckons (there: NCCL_P2P_PER_CHANNEL_NET_BW)
_WAITS_UNTIL = 2022  # then Megatron-LM's interleaved schedule came to compute while it sends (its --no-overlap-p2p-communication)


@dataclass(frozen=True, kw_only=True)
class Software:
    """fused_attention, attention: whether it is one kernel, and of which generation (`shardwise.cluster.roofline`; "" for the newest).

    eager: every elementwise operator is a kernel. copies_inner: as in `shardwise.cluster.rates.Rates`. products: share of the usual rate of
    products. overlap, hidden, gather_each, part_s, waits, whole_messages, peer_bytes_per_s: as in `shardwise.planner.compose.Scheme`.
    selective: what "selective" recomputation is there; recompute: what there is where nothing is said. call_s: a kernel's fixed time, None
    for the usual. zero: the stage where a row says nothing of it. validates_later: whether schedules that split the backward pass do
    without a synchronisation between steps, as their authors' do (Qi et al. 2023, section 4).
    """

    fused_attention: bool
    attention: str
    eager: bool
    copies_inner: bool
    products: float
    overlap: float
    hidden: float
    gather_each: bool
    part_s: float
    selective: str
    recompute: str
    call_s: float | None
    zero: int
    waits: bool
    whole_messages: bool
    peer_bytes_per_s: float
    validates_later: bool


def software_of(row: Row, year: int, words: str = "") -> Software:
    """year: of the source; words: its title and its remarks on all rows."""
    framework, options = row.framework or "", dict(row.layout.options)
    year -= bool(re.search(r"\(SC\d\d\)", words))  # a conference's papers were measured in the year before
    said = " ".join((row.layout.precision_text, row.layout.recompute_text, *options.values())).lower()
    torch, deepspeed = framework in TORCH, "deepspeed" in framework or "deepspeed" in said
    young = torch and year - launched(row) <= 1
    overlap = _OVERLAP_NOW if "mlperf" in words.lower() else next((share for last, share in _OVERLAP.items() if year <= last), _OVERLAP_NOW)
    return Software(
        fused_attention=_fused(row, year, framework, said),
        attention="flash1" if framework == "llm-foundry" and year <= 2023 else "flash2" if torch else "",
        eager=(torch and not is_compiled(row)) or year <= _EAGER_UNTIL,
        copies_inner=torch,  # Megatron-LM has the sequence first, XLA lays tensors out as collectives want them
        products=_YOUNG if young else 1.0,
        overlap=_OVERLAP_NOW if torch or framework in _ALWAYS_OVERLAPS else overlap,
        hidden=_HIDDEN if _overlaps_tensors(framework, year, options, words) else 0.0,
        gather_each=deepspeed,
        part_s=_PART_S if deepspeed and year <= _PARTS_UNTIL else 0.0,
        selective=_selective(row, framework, torch),
        recompute="alternate" if framework == "torchtitan" else "selective" if row.layout.recompute_text else "none",
        zero=1 if framework == "megatron" and year >= _DISTRIBUTED_SINCE else 0,
        call_s=_BLOCKING_S if "CUDA_LAUNCH_BLOCKING" in words else None,
        waits=not torch and framework not in JAX and year <= _WAITS_UNTIL,
        whole_messages=options.get("scatter/gather", "").lower() == "off",
        peer_bytes_per_s=_CHANNEL_BYTES_PER_S if year <= _ONE_CHANNEL_UNTIL and not (row.machine.device or "").startswith("tpu") else inf,
        validates_later=not torch,
    )


def launched(row: Row) -> int:
    """The year since which the row's device is to be had; 0 where that is not known."""
    return _LAUNCHED.get(re.sub(r"-.*", "", row.machine.device or ""), 0)


def is_compiled(row: Row) -> bool:
    """Whether a row says that a compiler has fused its operators."""
    options = dict(row.layout.options)
    return next((value for name, value in options.items() if "compile" in name), "").lower() in ("true", "yes", "on", "full", "model")


def _selective(row: Row, framework: str, torch: bool) -> str:
    """Where modules are named and attention is not among them, its core is kept (Megatron-Core's --recompute-modules)."""
    if framework == "torchtitan":
        return "alternate"
    if re.search(_POINTWISE, row.layout.recompute_text.lower()):
        return "pointwise"
    return "selective" if torch or framework in JAX else "attention"


def _fused(row: Row, year: int, framework: str, words: str) -> bool:
    """Whether attention is one kernel."""
    if re.search(r"\bte\b|transformer.?engine|flash|cudnn", words):
        return True
    device = row.machine.device or ""
    if framework in _JAX and not device.startswith("tpu"):
        return False
    return not device.startswith(_BEFORE_FUSED) or year >= _FUSED_EARLIER.get(framework, _FUSED_SINCE)


def _overlaps_tensors(framework: str, year: int, options: dict[str, str], words: str) -> bool:
    said = options.get("tp_comm_overlap", "").lower()
    usual = framework == "megatron" and year >= _OVERLAPS_TENSORS_SINCE
    return said == "true" or (not said and (usual or bool(re.search(r"tp comm(unication)? overlap", words, re.IGNORECASE))))


def unfitted(software: Software) -> Software:
    """With nothing that was read off measured steps: products at their usual rate, gradients beside the backward pass, no other overlap."""
    kernel = "flash2" if software.attention == "flash1" else software.attention
    return replace(software, attention=kernel, products=1.0, overlap=_OVERLAP_NOW, hidden=0.0, call_s=None, part_s=0.0)
