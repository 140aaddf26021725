"""Published measurements: how the words of a row become numbers, and how predictions are compared with them."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from benchmarks.published_rows import (
    GIB,
    FlopConvention,
    Machine,
    Row,
    Table,
    TableError,
    details,
    device_name,
    forward_flops,
    inter_link,
    intra_link,
    read_directory,
    read_memory_counts,
    read_model,
    read_precision,
    read_recompute,
    read_table,
    read_zero,
    summary,
    sweeps,
)
from benchmarks.published_stats import kendall_tau, mean, median_absolute_percentage_error, ranked_pairs, regret

ROOT = Path(__file__).resolve().parents[2]
TABLES = os.environ.get("SHARDWISE_PUBLISHED")  # a folder of files of this form; unset: hand-made rows alone are read

GPT = {"layers": 4, "hidden": 256, "heads": 8, "kv_heads": 8, "ffn": 1024, "vocab": 1000, "seq_len": 128, "params": None, "arch": "gpt"}
A100 = {
    "gpu": "NVIDIA A100-SXM4-80GB",
    "peak_tflops_bf16": 312,
    "gpus_per_node": 8,
    "intra_node": "NVLink3 600 GB/s",
    "inter_node": "8x200 Gb/s",
}
MODEL = FlopConvention(recompute=False, causal=False, why="fit")


def raw_row(measured: dict[str, Any] | None = None, **changed: Any) -> dict[str, Any]:
    """A row as a file has it: 16 devices, tp 2, pp 2, dp 4, 32 sequences of 128 tokens a step, 2 s each unless told otherwise."""
    row = {"id": "a:0", "model": GPT, "n_gpus": 16, "tp": 2, "pp": 2, "dp": 4, "cp": 1, "ep": 1, "virtual_stages": 1, "micro_batch": 2}
    row |= {"global_batch": 32, "zero_fsdp": "none", "recompute": "full", "sequence_parallel": False, "precision": "fp16"}
    return row | {"measured": {"iter_time_s": 2.0} if measured is None else measured} | changed


def read(tmp_path: Path, *rows: dict[str, Any], hardware: Any = A100, name: str = "a.json", **top: Any) -> Table:
    """These rows, written to a file and read from it."""
    path = tmp_path / name
    path.write_text(json.dumps({"source": {"year": 2024}, "hardware": hardware, "rows": list(rows)} | top))
    return read_table(path)


def read_one(tmp_path: Path, *arguments: Any, hardware: Any = A100, **changed: Any) -> Row:
    """The row that `raw_row` makes."""
    return read(tmp_path, raw_row(*arguments, **changed), hardware=hardware).rows[0]


# -- devices and links -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("a100_40gb", "a100-40g"),
        ("A100 80G 400Gbps", "a100-80g"),
        ("NVIDIA V100-SXM3-32GB (DGX-2)", "v100-32g"),
        ("A3 VM H100-80GB (8 GPUs, 8x200 Gb/s)", "h100"),
        ("H100-SXM5-80GB", "h100"),
        ("NVIDIA H100 SXM-like, 96GB HBM2e 2.4 TB/s, 500 W limit", "h100-96g"),
        ("H100 PCIe 80GB", "h100-pcie"),
        ("H100 NVL 94GB", "h100-nvl-94g"),
        ("NVIDIA H200", "h200"),
        ("B200 HGX 8-GPU", "b200"),
        ("DGX-GB300", "gb300"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA Tesla P40 24GB", "p40"),
        ("L40S", "l40s"),
        ("RTX 4090", "rtx4090"),
        ("TPU v4", "tpu-v4"),
        ("TPU v5e", "tpu-v5e"),
        ("tpu-v5p", "tpu-v5p"),
        ("v5e-256", "tpu-v5e"),
        ("TPU v6e (Trillium)", "tpu-v6e"),
        ("Trillium", "tpu-v6e"),
        ("Cerebras CS-2", None),
        ("Baseline", None),
        ("v4.0", None),
        ("400 Gb/s", None),
    ],
)
def test_a_device_has_a_short_name(text: str, name: str | None) -> None:
    assert device_name(text) == name


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("NVLink3 + NVSwitch (600 GB/s per GPU bidirectional)", 300e9),
        ("NVLink4 900 GB/s", 450e9),
        ("NVLink5 1.8 TB/s", 900e9),
        ("NVLink 450 GB/s each direction", 450e9),
        ("PCIe Gen4 32 GB/s", 32e9),
        ("NVLink (SXM)", None),
        ("", None),
    ],
)
def test_links_inside_a_node(text: str, bytes_per_s: float | None) -> None:
    assert intra_link(text) == bytes_per_s


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("8x400 Gb/s IB NDR", 50e9),
        ("8x ConnectX-7 IB NDR 400 Gb/s per node", 50e9),
        ("8x Mellanox 200 Gb/s HDR InfiniBand HCAs per node (compute), 3-level fat tree", 25e9),
        ('4 Omni-Path 100 Gb/s links per node (README: "4 OmniPath links")', 6.25e9),
        ("1600 Gb/s node-node RoCE", 25e9),
        ("800 Gb/s per node (paper section 10.1)", 12.5e9),
        ("400 Gb/s RDMA per GPU", 50e9),
        ("A100 80G 400Gbps", 6.25e9),
        ("HDR InfiniBand (not stated in source)", None),
        ("single node", None),
    ],
)
def test_links_between_nodes_of_8(text: str, bytes_per_s: float | None) -> None:
    assert inter_link(text, 8) == bytes_per_s


def test_a_node_s_link_is_unknown_where_its_devices_are() -> None:
    assert inter_link("400 Gb/s per node", None) is None
    assert inter_link("400 Gb/s per GPU", None) == 50e9


def test_a_machine_is_read(tmp_path: Path) -> None:
    machine = read_one(tmp_path).machine
    assert (machine.device, machine.devices, machine.node_devices, machine.island_devices) == ("a100-80g", 16, 8, 8)
    assert (machine.intra_bytes_per_s, machine.inter_bytes_per_s) == (300e9, 25e9)
    assert machine.memory_bytes == 80 * GIB and machine.peak_flops == (("bf16", 312e12),)


SEVERAL = {
    "old": {"gpu": "V100-SXM2-16GB", "gpus_per_node": 4},
    "DGX-GB200": {"gpu": "GB200 (NVL72)", "gpus_per_node": 4},
    "H100": {"gpu": "H100-SXM5-80GB", "gpus_per_node": 8, "nvlink_domain": 8},
}


@pytest.mark.parametrize(
    ("changed", "device", "island"),
    [
        ({"system": "DGX-GB200"}, "gb200", 72),  # a part's name
        ({"system": "GB200"}, "gb200", 72),  # a device of a part
        ({"where": "readme, H100 table"}, "h100", 8),
        ({"system": "TPU v5p", "slices": 2}, "tpu-v5p", 8),  # of no part; an island is a slice
        ({"system": "L40S"}, "l40s", None),
        ({}, None, None),
    ],
)
def test_a_row_finds_its_part_of_the_hardware(tmp_path: Path, changed: dict[str, Any], device: str | None, island: int | None) -> None:
    row = read_one(tmp_path, hardware=SEVERAL, **changed)
    assert (row.machine.device, row.machine.island_devices) == (device, island)
    assert (row.reason == "unknown device") is (device is None)


def test_a_system_that_names_no_device_leaves_the_only_hardware(tmp_path: Path) -> None:
    assert read_one(tmp_path, system="Baseline").machine.device == "a100-80g"
    assert read_one(tmp_path, system="Baseline", hardware={"DGX": A100}).machine.device == "a100-80g"


def test_a_memory_that_is_not_stated_is_assumed(tmp_path: Path) -> None:
    row = read_one(tmp_path, hardware={"gpu": "A100"})
    assert row.machine.device == "a100-80g" and row.machine.memory_bytes is None and row.assumed == ("memory of a100-80g",)


# -- layouts -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stage", "spread"),
    [
        ("none", 0, None),
        ("none (no distributed optimizer)", 0, None),
        ("DP", 0, None),
        ("DDP", 0, None),
        ("ZeRO-0", 0, None),
        ("ZeRO-1", 1, None),
        ("ZeRO stage 2", 2, None),
        ("distributed optimizer (overlap_grad_sync, overlap_param_sync on)", 1, None),
        ("distributed_fused_adam", 1, None),
        ("DP, distributed LAMB", 1, None),
        ("not stated (--overlap-param-gather => distributed optimizer likely)", 1, None),
        ("ZeRO-100B (Pos+g, ZeRO-R)", 2, None),
        ("SHARD_GRAD_OP", 2, None),
        ("ZeRO-3 (DeepSpeed, no model parallel)", 3, None),
        ("PyTorch FSDP1 FULL_SHARD, MP mode PURE", 3, None),
        ("Megatron-FSDP", 3, None),
        ("FSDP2 (ZeRO-3) degree 32", 3, 32),
        ("FSDP2 degree 8", 3, 8),
        ("FSDP 256", 3, 256),
        ("FSDP 64 in slice x DP 1 across slices", 3, 64),
        ("FSDP 64 in slice x DP 2 across slices (DCN)", "hybrid", 64),
        ("FSDP 8 in node x DP 4", "hybrid", 8),
        ("HSDP", "hybrid", 32),
        ("FSDP in slice", "hybrid", 32),
        ("MaxText FSDP=64 (+DP)", "hybrid", 64),
        ("MaxText FSDP=128 (+DP)", 3, 128),
        ("embedding model parallel (HugeCTR auto sharding)", None, None),
        (None, None, None),
    ],
)
def test_zero_stages(text: str | None, stage: int | str | None, spread: int | None) -> None:
    machine = Machine(device="h100", device_text="", devices=128, island_devices=32)
    assert read_zero(text, machine, 1) == (stage, spread)


@pytest.mark.parametrize(
    ("value", "recompute"),
    [
        ("full AC", "full"),
        ("full (every layer input stored)", "full"),
        ("checkpoint except_last", "full"),
        ("qkv_proj_offloaded", "full"),
        (True, "full"),
        ("selective (attention core)", "selective"),
        ("selective: norm, act", "selective"),
        ("per-op SAC", "selective"),
        ("minimal_flash", "selective"),
        ("none", "none"),
        (False, "none"),
        ("see paxml configs (not recorded)", None),
        ("custom", None),
        (None, None),
    ],
)
def test_recomputation(value: Any, recompute: str | None) -> None:
    assert read_recompute(value) == recompute


@pytest.mark.parametrize(
    ("value", "precision"),
    [
        ("BF16", "bf16"),
        ("bfloat16", "bf16"),
        ("amp_bf16", "bf16"),
        ("TE bf16", "bf16"),
        ("bf16 (peak 989 implied by MFU)", "bf16"),
        ("fp16 mixed", "fp16"),
        ("fp16/bf16 mixed", "fp16"),
        ("mixed", "fp16"),
        ("fp16/fp8 mixed", "fp8"),
        ("float8 rowwise", "fp8"),
        ("FP8-CS", "fp8"),
        ("mxfp8_cublas", "fp8"),
        ("NVFP4 (bf16 tail)", "fp4"),
        ("fp32", "fp32"),
        ("TF32", "tf32"),
        (None, None),
    ],
)
def test_precisions(value: Any, precision: str | None) -> None:
    assert read_precision(value) == precision


def test_a_layout_is_read(tmp_path: Path) -> None:
    layout = read_one(tmp_path, schedule="ZB-2p", async_tp=True, note="", where="Figure 18: scatter/gather OFF").layout
    assert (layout.tp, layout.pp, layout.dp, layout.cp, layout.ep, layout.microbatches) == (2, 2, 4, 1, 1, 4)
    assert (layout.zero, layout.recompute, layout.sequence_parallel, layout.schedule) == (0, "full", False, "zb-2p")
    assert layout.options == (("async_tp", "True"), ("scatter/gather", "off"))


@pytest.mark.parametrize(("text", "name"), [("1F1B", "1f1b"), ("1F1B-I", "interleaved"), ("GPipe", "gpipe"), ("plain", None), (None, None)])
def test_schedules(tmp_path: Path, text: str | None, name: str | None) -> None:
    assert read_one(tmp_path, schedule=text).layout.schedule == name


def test_what_is_not_stated_is_inferred_and_said(tmp_path: Path) -> None:
    row = read_one(tmp_path, dp=None, cp=None, global_batch=None, grad_accum=3)
    assert (row.layout.dp, row.layout.cp, row.layout.global_batch, row.layout.microbatches) == (4, 1, 24, 3)
    assert row.assumed == ("dp 4: the devices that are left", "global batch 24: microbatches × accumulation × dp")
    row = read_one(tmp_path, {"iter_time_s": 2.0, "tokens_per_s_per_gpu": 128.0}, global_batch=None)
    assert row.layout.global_batch == 32  # 2 s · 128 tokens/s · 16 devices / 128 tokens
    row = read_one(tmp_path, micro_batch=None, grad_accum=4)
    assert row.layout.micro_batch == 2 and row.usable
    row = read_one(tmp_path, n_gpus=None)
    assert row.machine.devices == 16
    row = read_one(tmp_path, micro_batch=96.0, global_batch=384)
    assert row.layout.micro_batch == 96
    row = read_one(tmp_path, virtual_stages="max: one layer per chunk")
    assert row.layout.virtual_stages == 2


def test_degrees_that_do_not_make_the_devices_contradict(tmp_path: Path) -> None:
    assert read_one(tmp_path, dp=3).contradictions == ("tp·pp·cp·dp = 2·2·1·3 is not the 16 devices",)
    assert read_one(tmp_path, ep=16).contradictions == ("ep = 16 does not divide tp·cp·dp = 8",)


# -- models ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "family"),
    [
        ({}, "decoder"),
        ({"experts": 8}, "moe"),
        ({"arch": "bert-large (MLPerf, unpadded, seq<=512)"}, "encoder"),
        ({"arch": "t5-v1.1-large encoder-decoder"}, "encoder-decoder"),
        ({"arch": "vit-B/16"}, "vit"),
        ({"arch": "stable diffusion v2 base U-Net (865M)"}, "diffusion"),
        ({"arch": "amoebanet-d (18,256) 224x224"}, "cnn"),
        ({"arch": "DLRM-DCNv2 (26 tables)"}, "recommender"),
        ({"arch": "R-GAT on IGBH-full"}, "graph"),
        ({"arch": "something", "layers": None}, "unknown"),
    ],
)
def test_families(changed: dict[str, Any], family: str) -> None:
    assert read_model(GPT | changed, []).family == family


def test_flops_are_those_of_the_literature() -> None:
    model = read_model(GPT, [])
    layers, scores, head = forward_flops(model, causal=False)
    tokens, hidden = 128, 256  # Narayanan et al., SC21, eq. 3, without its recomputation: 72 B s l h² (1 + s/6h + V/12lh)
    assert 3 * (layers + scores + head) == pytest.approx(
        72 * tokens * 4 * hidden**2 * (1 + tokens / (6 * hidden) + 1000 / (12 * 4 * hidden))
    )
    assert forward_flops(model, causal=True) == (layers, scores / 2, head)
    assert forward_flops(read_model(GPT | {"arch": "bert"}, []), causal=True) == (layers, scores, head)


def test_an_encoder_decoder_has_both_sides() -> None:
    whole = forward_flops(read_model(GPT | {"arch": "t5", "head_dim": 32, "decoder_seq": 128}, []), causal=False)
    decoder = forward_flops(read_model(GPT, []), causal=False)
    assert whole[1] == pytest.approx(3 * decoder[1]) and 2 < whole[0] / decoder[0] < 3


def _published(**changed: Any) -> dict[str, Any]:
    return GPT | {"seq_len": 4096} | changed


@pytest.mark.parametrize(
    ("raw", "active", "head_dim", "gated"),
    [
        (_published(arch="llama3", layers=32, hidden=4096, heads=32, ffn=14336, vocab=128256, params=8.03e9), 7.5e9, 128, True),
        (
            _published(arch="qwen3 moe", layers=94, hidden=4096, heads=64, kv_heads=4, ffn=12288, vocab=151936, params=235e9)
            | {"experts": 128, "topk": 8, "moe_ffn": 1536},
            22e9,
            128,
            True,
        ),
        (
            _published(arch="deepseek_v3 moe mla", layers=61, hidden=7168, heads=128, kv_heads=128, ffn=18432, vocab=129280, params=671e9)
            | {"experts": 256, "topk": 8, "moe_ffn": 2048, "shared_ffn": 2048, "dense_layers": 3},
            37e9,
            56,
            True,
        ),
        # 52 · 10⁹ parameters only if the heads are narrower than hidden / heads = 384; its parameters are in the name alone
        (_published(arch="maxtext 52b", layers=32, hidden=12288, heads=32, kv_heads=32, ffn=49152, vocab=32000), 52e9, 256, False),
        # and 3 · 10⁹ only if the MLPs have three matrices
        (_published(arch="t5 3B", layers=24, hidden=2048, heads=32, ffn=5120, vocab=29184, params=3e9), 2.8e9, 64, True),
    ],
)
def test_heads_and_gating_are_those_that_give_the_parameters(raw: dict[str, Any], active: float, head_dim: int, gated: bool) -> None:
    raw["kv_heads"] = 8 if raw["arch"] == "llama3" else raw.get("kv_heads", raw["heads"]) if raw["arch"] != "t5 3B" else 32
    model = read_model(raw, [])
    assert (model.head_dim, model.gated) == (head_dim, gated)
    if model.family != "encoder-decoder":
        layers, _, head = forward_flops(model, causal=False)
        assert (layers + head) / 2 / 4096 == pytest.approx(active, rel=0.03)


@pytest.mark.parametrize(("arch", "head_dim"), [("gpt_oss moe", 64), ("GPT-OSS 120B", 64), ("glm_4 moe", 128), ("gptoss", 64)])
def test_names_are_known_however_their_words_are_joined(arch: str, head_dim: int) -> None:
    """GPT-OSS and GLM-4.5 have heads that do not divide the width."""
    shape = {"layers": 36, "hidden": 2880, "heads": 64, "kv_heads": 8, "ffn": 2880, "seq_len": 4096, "experts": 128, "topk": 4}
    model = read_model(shape | {"arch": arch}, [])
    assert (model.head_dim, model.gated) == (head_dim, True)


def test_parameters_with_learned_positions_change_nothing() -> None:
    assumed: list[str] = []
    raw = _published(layers=12, hidden=768, heads=12, kv_heads=12, ffn=3072, vocab=50368, seq_len=32768, params=148_717_824)
    assert not read_model(raw, assumed).gated and not assumed


def test_a_known_model_without_numbers_has_its_published_shape(tmp_path: Path) -> None:
    nothing = dict.fromkeys(("hidden", "heads", "kv_heads", "ffn", "vocab"))
    row = read_one(tmp_path, model=GPT | nothing | {"arch": "qwen3 8b", "layers": 36})
    assert row.model.hidden == 4096 and row.assumed == ("shape of the published model",) and row.usable


# -- what was measured -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measured", "kind"),
    [
        ({"iter_time_s": 2.0}, "step time"),
        ({"iter_time_s": "2.0"}, "step time"),
        ({"tokens_per_s": 2048.0}, "tokens/s"),
        ({"tokens_per_s_per_gpu": 128}, "tokens/s"),
        ({"samples_per_s": 16.0}, "samples/s"),
        ({"samples_per_s_per_gpu": 1.0}, "samples/s"),
        ({"sequences_per_s": 16.0}, "samples/s"),
        ({"train_days_300B_tokens": 300e9 / 4096 * 2 / 86400}, "days"),
        ({"layer_forward_ms": 700.0, "layer_total_ms": 2000.0}, "layer time"),
    ],
)
def test_every_figure_becomes_a_step_time(tmp_path: Path, measured: dict[str, Any], kind: str) -> None:
    row = read_one(tmp_path, measured)
    assert (row.kind, row.step_s) == (kind, pytest.approx(2.0)) and row.usable and not row.contradictions


def test_the_source_s_own_conversion_is_taken_if_it_agrees(tmp_path: Path) -> None:
    row = read_one(tmp_path, {"tokens_per_s": 2048.0}, derived={"iter_time_s": 2.01})
    assert row.step_s == 2.01 and not row.contradictions
    row = read_one(tmp_path, {"tokens_per_s": 2048.0}, derived={"iter_time_s": 4.0})
    assert row.step_s == 2.0 and row.contradictions == ("derived: 4 s, but tokens/s: 2 s",)
    row = read_one(tmp_path, {"iter_time_s": 2.0, "samples_per_s": 8.0})
    assert row.step_s == 2.0 and row.contradictions == ("samples/s: 4 s, but step time: 2 s",)
    row = read_one(tmp_path, {"frobs": 1}, derived={"iter_time_s": 4.0})
    assert (row.kind, row.step_s) == ("derived", 4.0)


@pytest.mark.parametrize(
    ("measured", "memory", "total"),
    [
        ({"peak_mem_gib": 2}, 2 * GIB, None),
        ({"peak_mem_gb": 2}, 2e9, None),
        ({"model_mem_gib_total": 1, "peak_activation_gib_total": 3}, None, 4 * GIB),
        ({"model_mem_gib_total": 1, "peak_activation_gib_total": None}, None, None),
    ],
)
def test_memory(tmp_path: Path, measured: dict[str, Any], memory: float | None, total: float | None) -> None:
    row = read_one(tmp_path, measured)
    assert (row.memory_bytes, row.total_memory_bytes, row.step_s, row.usable) == (memory, total, None, False)
    assert (row.reason is None) is (memory is not None or total is not None)


@pytest.mark.parametrize("measured", [{"oom": True}, {"iter_time_s": "OOM"}, {"iter_time_s": 2.0, "oom": True}])
def test_out_of_memory(tmp_path: Path, measured: dict[str, Any]) -> None:
    row = read_one(tmp_path, measured)
    assert row.out_of_memory and not row.usable and row.reason is None


def test_stage_times_are_seconds(tmp_path: Path) -> None:
    row = read_one(tmp_path, per_stage_ms={"TF": 18.5, "TB": 18.0, "note": "profiled"})
    assert row.stage_s == (("TF", 0.0185), ("TB", 0.018))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"measured": {"speedup": 1.7}}, "relative figure only"),
        ({"measured": {}}, "no figure that gives a step time"),
        ({"global_batch": None}, "global batch not stated"),
        ({"n_gpus": None, "dp": None}, "number of devices not stated"),
        ({"model": GPT | {"hidden": None}}, "shape not in the fields (unknown)"),
        ({"model": {"arch": "resnet-50"}}, "shape not in the fields (cnn)"),
        ({"model": None}, "shape not in the fields (unknown)"),
    ],
)
def test_rows_that_cannot_be_predicted_say_why(tmp_path: Path, changed: dict[str, Any], reason: str) -> None:
    changed = {"measured": {"tokens_per_s": 2048.0}} | changed
    row = read_one(tmp_path, **changed)
    assert row.reason == reason and not row.usable


# -- TFLOP/s -----------------------------------------------------------------------------------------------------------------------------


def tflops(convention: FlopConvention, seconds: float, recompute: str = "full") -> float:
    """Of one of 16 devices, for GPT with 32 sequences a step."""
    layers, scores, head = forward_flops(read_model(LONG, []), causal=convention.causal)
    again = {"full": layers + scores, "selective": scores, "none": 0.0}[recompute] if convention.recompute else 0.0
    return 32 * (3 * (layers + scores + head) + again) / seconds / 16 / 1e12


LONG = GPT | {"seq_len": 1024}  # long enough that half of attention shows
CONVENTIONS = [FlopConvention(recompute=recompute, causal=causal, why="fit") for recompute in (False, True) for causal in (False, True)]


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_rows_with_both_figures_tell_the_convention_of_the_others(tmp_path: Path, convention: FlopConvention) -> None:
    both = [raw_row({"iter_time_s": each, "tflops_per_gpu": tflops(convention, each)}, model=LONG) for each in (2.0, 3.0)]
    table = read(tmp_path, *both, raw_row({"tflops_per_gpu": tflops(convention, 5.0)}, model=LONG))
    assert table.convention == convention
    assert table.rows[2].step_s == pytest.approx(5.0) and table.rows[2].kind == "TFLOP/s" and table.rows[2].usable
    assert not any(row.contradictions for row in table.rows)


@pytest.mark.parametrize(
    ("notes", "year", "expected"),
    [
        ("TFLOP/s excludes remat and counts non-causal attention", 2020, (False, False, "words")),
        ("Model TFLOP/s excludes recompute; causal attention halves", 2024, (False, True, "words")),
        ("TFLOP/s counts hardware FLOPs incl. full activation recomputation", 2024, (True, False, "words")),
        ("TFLOP/s definition (with or without recompute) not stated.", 2020, (False, False, "year")),
        ("TFLOP/s definition (with or without recompute) not stated.", 2022, (True, False, "year")),
        ("", "2023-2024", (False, False, "year")),
        ("", None, (False, False, "year")),
    ],
)
def test_else_the_words_decide_else_the_year(tmp_path: Path, notes: str, year: Any, expected: tuple[bool, bool, str]) -> None:
    table = read(tmp_path, raw_row({"tflops_per_gpu": 0.1}), notes=notes, source={"year": year})
    assert (table.convention.recompute, table.convention.causal, table.convention.why) == expected


def test_selective_recomputation_repeats_attention_alone(tmp_path: Path) -> None:
    hardware = FlopConvention(recompute=True, causal=False, why="words")
    row = raw_row({"tflops_per_gpu": tflops(hardware, 2.0, "selective")}, recompute="selective", model=LONG)
    assert read(tmp_path, row, notes="counts recomputation").rows[0].step_s == pytest.approx(2.0)


def test_flops_that_contradict_the_time_are_reported(tmp_path: Path) -> None:
    rows = [raw_row({"iter_time_s": each, "tflops_per_gpu": tflops(MODEL, 2.0)}, model=LONG) for each in (2.0, 2.0, 1.0)]
    contradictions = [row.contradictions for row in read(tmp_path, *rows).rows]
    assert contradictions[:2] == [(), ()] and "make 2 s" in contradictions[2][0]


def test_flops_that_count_recomputation_tell_that_there_was_one(tmp_path: Path) -> None:
    hardware = FlopConvention(recompute=True, causal=False, why="fit")
    rows = [raw_row({"iter_time_s": 2.0, "tflops_per_gpu": tflops(hardware, 2.0)}, model=LONG, recompute=None) for _ in range(2)]
    assert [row.layout.recompute for row in read(tmp_path, *rows).rows] == ["full", "full"]


def test_utilisation_becomes_a_step_time(tmp_path: Path) -> None:
    row = read_one(tmp_path, {"mfu": tflops(MODEL, 2.0) / 312}, model=LONG)
    assert (row.kind, row.step_s) == ("MFU", pytest.approx(2.0))
    assert read_one(tmp_path, {"mfu": 0.5}, precision="fp8").step_s is None  # of which peak?


# -- sweeps ------------------------------------------------------------------------------------------------------------------------------


def test_a_sweep_is_of_rows_that_differ_by_layout_alone(tmp_path: Path) -> None:
    table = read(
        tmp_path,
        raw_row(tp=2, dp=4, id="a"),
        raw_row(tp=4, dp=2, id="b"),
        raw_row(tp=4, dp=2, precision="bf16", id="other precision"),
        raw_row(tp=4, dp=2, global_batch=64, id="other batch"),
        raw_row(tp=4, dp=2, model=GPT | {"layers": 6}, id="other model"),
        raw_row(tp=4, dp=2, release="2", id="other release"),
        raw_row({"iter_time_s": 1.0, "oom": True}, tp=8, dp=1, id="out of memory"),
        raw_row({}, tp=8, dp=1, id="no time"),
    )
    assert [[row.id for row in sweep.rows] for sweep in sweeps(table.rows)] == [["a", "b"]]
    other = tuple(replace(row, file="other") for row in table.rows)
    assert [sweep.file for sweep in sweeps((*table.rows, *other))] == ["a.json", "other"]


def test_of_one_layout_the_median_stands_for_all(tmp_path: Path) -> None:
    rows = [raw_row({"iter_time_s": each}, id=str(each)) for each in (5.0, 1.0, 2.0)]
    assert sweeps(read(tmp_path, *rows).rows) == []
    (sweep,) = sweeps(read(tmp_path, *rows, raw_row(sequence_parallel=True, id="other")).rows)
    assert [row.id for row in sweep.rows] == ["2.0", "other"]


def test_what_one_row_leaves_unstated_is_no_difference(tmp_path: Path) -> None:
    assert sweeps(read(tmp_path, raw_row(), raw_row(recompute=None, sequence_parallel=None, flag="suspect")).rows) == []
    assert len(sweeps(read(tmp_path, raw_row(), raw_row(zero_fsdp="ZeRO-1")).rows)) == 1
    assert len(sweeps(read(tmp_path, raw_row(), raw_row(dispatcher="DeepEP")).rows)) == 1


# -- files -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"rows": [\n{"id": 1},\n]}', "a.json:3: no JSON"),
        ("[]", 'a.json:1: no "rows"'),
        ('{"source": {}}', 'a.json:1: no "rows"'),
        ('{"notes": "",\n"rows": {}}', 'a.json:2: "rows" is no list'),
        ('{"notes": "",\n"rows": [3]}', "a.json:2: row 0 is no object"),
    ],
)
def test_a_file_of_another_form_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(TableError, match=message.replace("[", r"\[")):
        read_directory(tmp_path)


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"no \*\.json file"):
        read_directory(tmp_path)


def test_names_of_files_and_rows_mean_nothing(tmp_path: Path) -> None:
    one = read(tmp_path, raw_row(), raw_row({"tflops_per_gpu": 0.1}), name="b.json").rows
    other = read(tmp_path, raw_row(id="x"), raw_row({"tflops_per_gpu": 0.1}, id="y"), name="c.json").rows
    assert [replace(row, file="", id="") for row in one] == [replace(row, file="", id="") for row in other]


def test_an_empty_row_is_a_row_with_a_reason(tmp_path: Path) -> None:
    row = read(tmp_path, {}, hardware=None).rows[0]
    assert row.reason == "number of devices not stated" and row.id == "a:000"


@pytest.mark.parametrize("junk", [None, "", 0, -1, "n/a", [], {"a": 1}, True, 3.5])
def test_junk_is_no_crash(tmp_path: Path, junk: Any) -> None:
    rates = ("tokens_per_s", "tokens_per_s_per_gpu", "tflops_per_gpu", "mfu", "iter_time_s", "layer_total_ms", "peak_mem_gb")
    rows = [raw_row() | {name: junk} for name in raw_row()] + [raw_row(model=GPT | {name: junk}) for name in GPT]
    rows += [raw_row({name: junk}, derived={"iter_time_s": junk}, n_gpus=count) for name in rates for count in (16, None)]
    table = read(
        tmp_path, *rows, *(raw_row(**{name: junk}) for name in ("system", "where", "slices", "schedule", "grad_accum", "per_stage_ms"))
    )
    assert summary([table]) and isinstance(sweeps(table.rows), list)
    assert all(row.step_s is None or row.step_s > 0 for row in table.rows)


def test_the_summary_counts(tmp_path: Path) -> None:
    rows = (raw_row(), raw_row({"peak_mem_gb": 1.0}, tp=4, dp=2), raw_row(tp=4, dp=2), raw_row(system="Abacus", model={"arch": "abacus"}))
    table = read(tmp_path, *rows, raw_row({"oom": True}))
    head, line, total = summary([table]).splitlines()
    assert head.split()[:6] == ["file", "rows", "norm.", "time", "mem.", "OOM"]
    assert line.split()[:9] == ["a.json", "5", "4", "2", "1", "1", "1", "of", "2"] and line.endswith("1 shape not in the fields (unknown)")
    assert total.startswith("all 1 files")
    assert "tp·pp·cp·dp" in details([read(tmp_path, raw_row(dp=3))])


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line."""
    command = [sys.executable, str(ROOT / "benchmarks" / "published_rows.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)


def test_the_command_line(tmp_path: Path) -> None:
    read(tmp_path, raw_row(), raw_row({}))
    found = run("--tables", str(tmp_path), "--details", "--json", str(tmp_path / "out.txt"))
    assert found.returncode == 0 and "a.json" in found.stdout
    assert [row["step_s"] for row in json.loads((tmp_path / "out.txt").read_text())] == [2.0, None]
    assert run("--tables", str(tmp_path), "--check", "--least", "0.5").returncode == 0
    refused = run("--tables", str(tmp_path), "--check")
    assert refused.returncode == 1 and "fewer than 90% of 2 rows" in refused.stderr
    (tmp_path / "b.json").write_text("{}")
    refused = run("--tables", str(tmp_path))
    assert refused.returncode == 1 and 'b.json:1: no "rows"' in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.skipif(TABLES is None, reason="SHARDWISE_PUBLISHED names no folder")
def test_a_folder_of_published_tables() -> None:
    tables = read_directory(Path(str(TABLES)))
    rows = [row for table in tables for row in table.rows]
    assert len({(row.file, row.id) for row in rows}) == len(rows)
    assert sum(row.usable for row in rows) >= 0.8 * len(rows)
    for row in rows:
        if row.usable and row.kind != "layer time":
            assert row.step_s is not None and row.layout.global_batch is not None
            flops = 3 * sum(forward_flops(row.model, causal=True)) * row.layout.global_batch
            assert 1e-3 * 12e12 < flops / row.step_s / row.machine.devices < 5e15, row  # between a lame P40 and a GB300 in fp4
    for sweep in sweeps(rows):
        assert len(sweep.rows) > 1 and len({row.layout for row in sweep.rows}) == len(sweep.rows)


# -- statistics --------------------------------------------------------------------------------------------------------------------------


def brute_force_tau(xs: list[int], ys: list[int]) -> float | None:
    """By its definition, pair by pair."""
    concordant = discordant = only_x = only_y = 0
    for (x, y), (other_x, other_y) in combinations(zip(xs, ys, strict=True), 2):
        if x == other_x or y == other_y:
            only_x += x == other_x and y != other_y
            only_y += y == other_y and x != other_x
        elif (x < other_x) == (y < other_y):
            concordant += 1
        else:
            discordant += 1
    pairs = concordant + discordant
    if pairs + only_x == 0 or pairs + only_y == 0:
        return None
    return (concordant - discordant) / math.sqrt((pairs + only_x) * (pairs + only_y))


def test_tau_is_what_brute_force_finds() -> None:
    draw = random.Random(0)
    for _ in range(300):
        count = draw.randint(0, 8)
        xs, ys = ([draw.randint(1, 4) for _ in range(count)] for _ in range(2))
        expected = brute_force_tau(xs, ys)
        assert kendall_tau(xs, ys) == (expected if expected is None else pytest.approx(expected)), (xs, ys)


@pytest.mark.parametrize(
    ("predicted", "measured", "tau"),
    [([1, 2, 3], [10, 20, 30], 1.0), ([1, 2, 3], [30, 20, 10], -1.0), ([1, 1, 1], [1, 2, 3], None), ([1], [1], None), ([], [], None)],
)
def test_tau_of_simple_cases(predicted: list[float], measured: list[float], tau: float | None) -> None:
    assert kendall_tau(predicted, measured) == tau


def test_tau_b_counts_ties() -> None:
    assert kendall_tau([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(5 / math.sqrt(5 * 6))


def test_the_median_error() -> None:
    assert median_absolute_percentage_error([1.1, 2.0, 6.0], [1.0, 4.0, 4.0]) == pytest.approx(0.5)
    assert math.isnan(median_absolute_percentage_error([], []))


def test_pairs_that_noise_decides_are_not_ranked() -> None:
    measured = [1.0, 1.02, 1.5, 2.0]
    assert ranked_pairs([1.0, 0.9, 1.5, 2.0], measured, 0.03) == (5, 5)
    assert ranked_pairs([1.0, 0.9, 1.5, 2.0], measured, 0.0) == (5, 6)
    assert ranked_pairs([1.0, 1.0, 2.0, 1.5], measured, 0.03) == (4, 5)
    assert ranked_pairs([1.0, 1.0], [1.0, 2.0], 0.03) == (0, 1), "a tie is no ranking"
    assert ranked_pairs([1.0], [1.0], 0.03) == (0, 0)


def test_regret() -> None:
    assert regret([1.0, 2.0], [4.0, 5.0]) == 0.0
    assert regret([2.0, 1.0], [4.0, 5.0]) == pytest.approx(0.25)
    assert regret([1.0, 1.0], [4.0, 5.0]) == pytest.approx(0.125)  # a draw: either may be taken
    with pytest.raises(ValueError, match="at least one pair"):
        regret([], [])


def test_the_mean_leaves_out_what_is_no_number() -> None:
    assert mean([1.0, None, math.nan, 3.0]) == 2.0 and math.isnan(mean([None]))


@pytest.mark.parametrize("statistic", [median_absolute_percentage_error, kendall_tau, regret])
def test_statistics_refuse_what_does_not_fit(statistic: Any) -> None:
    with pytest.raises(ValueError, match="1 predictions for 2 measurements"):
        statistic([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="must be positive"):
        statistic([1.0], [0.0])


@pytest.mark.parametrize(
    ("notes", "counts"),
    [
        ("memory (nvidia-smi style, max over ranks)", "device"),
        ("peak GB incl. CUDA context", "device"),
        ("Memory is max over ranks (GiB, PyTorch reserved/active as logged)", "reserved"),
        ("Memory is max over stages.", "allocated"),
    ],
)
def test_what_printed_memory_counts(notes: str, counts: str) -> None:
    assert read_memory_counts(notes) == counts
