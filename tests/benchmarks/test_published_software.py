"""What software could do follows from the row's words first, then from framework and year."""

from __future__ import annotations

import json
from math import inf
from pathlib import Path
from typing import Any

import pytest
from benchmarks.published_rows import Row, read_table
from benchmarks.published_software import Software, software_of, unfitted

MODEL = {"layers": 8, "hidden": 1024, "heads": 16, "kv_heads": 16, "ffn": 4096, "vocab": 51200, "seq_len": 1024, "arch": "gpt"}
REST = {"zero_fsdp": "none", "recompute": "none", "precision": "bf16", "measured": {"iter_time_s": 0.1}}


def row(tmp_path: Path, title: str, gpu: str, **more: Any) -> Row:
    document = {
        "source": {"title": title},
        "hardware": {"gpu": gpu, "gpus_per_node": 8},
        "rows": [
            {"id": "a:0", "model": MODEL, "n_gpus": 8, "tp": 2, "pp": 1, "dp": 4, "micro_batch": 1, "global_batch": 32, **REST, **more}
        ],
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document))
    return read_table(path).rows[0]


def found(tmp_path: Path, title: str, gpu: str, year: int, words: str = "", **more: Any) -> Software:
    return software_of(row(tmp_path, title, gpu, **more), year, words)


H100, A100 = "NVIDIA H100-SXM5-80GB", "NVIDIA A100-SXM4-80GB"


@pytest.mark.parametrize(
    ("title", "gpu", "year", "more", "fused"),
    [
        ("Megatron-LM", A100, 2022, {}, False),
        ("Megatron-LM", A100, 2024, {}, True),
        ("Megatron-LM", H100, 2023, {}, True),
        ("JAX: Pax GPT", H100, 2023, {}, False),
        ("JAX: Pax GPT", H100, 2023, {"precision": "TE bf16"}, True),
        ("llm-foundry", A100, 2023, {}, True),
    ],
)
def test_when_attention_is_one_kernel(tmp_path: Path, title: str, gpu: str, year: int, more: dict[str, Any], fused: bool) -> None:
    assert found(tmp_path, title, gpu, year, **more).fused_attention is fused


def test_torch_programs_are_eager_unless_compiled_and_slower_on_new_devices(tmp_path: Path) -> None:
    assert found(tmp_path, "torchtitan", H100, 2024).eager
    assert not found(tmp_path, "torchtitan", H100, 2024, compile=True).eager
    assert found(tmp_path, "llm-foundry", H100, 2023).products < found(tmp_path, "llm-foundry", H100, 2024).products == 1
    assert found(tmp_path, "Megatron-LM", H100, 2023).products == 1


def test_communication_came_to_be_hidden(tmp_path: Path) -> None:
    overlaps = [found(tmp_path, "Megatron-LM", A100, year).overlap for year in (2021, 2023, 2024)]
    assert overlaps == sorted(overlaps) and overlaps[0] == 0
    assert found(tmp_path, "Megatron-LM", H100, 2024).hidden > 0
    assert found(tmp_path, "Megatron-LM", H100, 2024, tp_comm_overlap=False).hidden == 0
    assert found(tmp_path, "torchtitan", H100, 2024).hidden == 0
    assert found(tmp_path, "a log", H100, 2023, words="FP8, TP comm overlap").hidden > 0


def test_what_words_say_of_kernels_and_gathers(tmp_path: Path) -> None:
    assert found(tmp_path, "a chronicle", A100, 2022, words="CUDA_LAUNCH_BLOCKING varies").call_s
    assert found(tmp_path, "a chronicle", A100, 2022).call_s is None
    assert found(tmp_path, "a paper", A100, 2021, zero_fsdp="ZeRO-3 (DeepSpeed)").gather_each
    old, new, other = (
        found(tmp_path, "a paper", A100, year, zero_fsdp=zero)
        for year, zero in ((2021, "ZeRO-3 (DeepSpeed)"), (2022, "ZeRO-3 (DeepSpeed)"), (2021, "FSDP"))
    )
    assert old.part_s > unfitted(old).part_s == new.part_s == other.part_s == 0
    assert found(tmp_path, "a paper", A100, 2020, words="a paper (SC20)").eager, "measured in the year before"
    assert not found(tmp_path, "a manual", A100, 2020).eager


def test_one_channel_joined_two_nodes_ranks_in_nccl_s_first_years(tmp_path: Path) -> None:
    rates = [found(tmp_path, "Megatron-LM", gpu, year).peer_bytes_per_s for gpu, year in ((A100, 2021), (A100, 2022), ("TPU v4", 2021))]
    assert rates == [14e9, inf, inf]
