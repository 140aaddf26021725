"""Published measurements of training on real clusters, read from JSON files and brought into one form.

    python benchmarks/published_rows.py --tables DIR               what each file holds, and why rows cannot be used
    python benchmarks/published_rows.py --tables DIR --details     and each row's assumptions and contradictions

A file holds `source`, `hardware`, `notes` and `rows`; sources print other figures under other names (step times, tokens/s, TFLOP/s ...), in
words rather than numbers. A `Row` is what all of them come to. Only fields are read, never file names or row ids: any directory of that
form will do. What a source does not state is None; what was inferred is in `Row.assumed`; what contradicts itself in `Row.contradictions`.

Units: seconds, bytes, bytes/s in each direction, flop/s. A step is one optimizer step on the global batch.

**TFLOP/s.** A source counts either the *model's* flops (3 forwards) or the *hardware's* (4 forwards of a recomputed layer), and the whole
square of attention or its causal half. Where rows of a file have a step time as well, the convention is the one that agrees best with them;
else the words of the row or of the notes decide; else the year: recomputation was counted in 2021 and 2022 (Narayanan et al., SC21,
equation 3), and not since model-flops utilisation became usual (Chowdhery et al., PaLM, 2022). The
causal half is counted only where that fits or is said.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

Json = dict[str, Any]
Stage = int | str | None

GIB = 2**30
TOLERANCE = 0.03  # a printed and a derived time that differ by more contradict each other; sources print two or three digits
FLOP_TOLERANCE = 0.06  # likewise for TFLOP/s: definitions differ by a term or two, such as the head or the router
TIMED_TWICE = 2  # rows with both a step time and TFLOP/s from which a file's convention is told


class TableError(ValueError):
    """A file that is not of the form above. The message begins with file:line."""


# -- what a row comes to -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model's numbers; None where not stated.

    family: decoder, moe, encoder, encoder-decoder, vit, diffusion, cnn, recommender, graph, hybrid or unknown. head_dim and gated (three
    matrices in an MLP, not two) are inferred where not stated. decoder_seq: length on the decoder's side, seq_len being the encoder's.
    moe_ffn: width of one expert; shared_ffn: of the shared one; dense_layers: how many of `layers` have no experts.
    mla: multi-head latent attention. params: as stated, often nominal.
    """

    family: str
    arch: str
    layers: int | None = None
    hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    ffn: int | None = None
    gated: bool = False
    vocab: int | None = None
    seq_len: int | None = None
    decoder_seq: int | None = None
    params: float | None = None
    active_params: float | None = None
    experts: int = 0
    topk: int = 0
    moe_ffn: int = 0
    shared_ffn: int = 0
    dense_layers: int = 0
    mla: bool = False

    @property
    def has_shape(self) -> bool:
        """Whether the numbers suffice to build it."""
        return None not in (self.layers, self.hidden, self.heads, self.ffn, self.seq_len)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The cluster. device: a short name (a100-80g, h100, tpu-v5e), None where none is recognised; device_text: the source's words.

    node_devices: devices in a node; island_devices: that reach each other over the fast link (72 of an NVL72, a TPU slice, else a node).
    intra_bytes_per_s, inter_bytes_per_s: of one device, each direction, where a figure is stated (a vendor's NVLink figure is for both
    directions together and was halved). memory_bytes: a vendor's GB are GiB (nvidia-smi shows 81920 MiB of an A100 80GB). peak_flops: by
    precision, as stated.
    """

    device: str | None
    device_text: str
    devices: int
    node_devices: int | None = None
    island_devices: int | None = None
    intra_bytes_per_s: float | None = None
    inter_bytes_per_s: float | None = None
    intra_text: str = ""
    inter_text: str = ""
    memory_bytes: float | None = None
    peak_flops: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the step is split. cp: context parallel; ep: expert parallel, a part of dp·cp·tp, not a factor of the devices.

    micro_batch: sequences of one microbatch on one data-parallel rank; microbatches: how many of them a step has there.
    zero: 0, 1, 2, 3, "hybrid" (3 inside groups of `shard_devices`, replicas of the groups) or None = not stated.
    recompute: "none", "selective", "full" or None; recompute_text: the source's words.
    precision: fp4, fp8, fp16, bf16, tf32, fp32 or None, the narrowest that matrix products use; precision_text: with its recipe.
    schedule: "1f1b", "interleaved", "gpipe", "zb-1p" ... or None. balance: layers of each stage.
    options: every other setting of the row, by name: overlap, dispatcher, compile, release ...
    """

    tp: int
    pp: int
    dp: int
    cp: int
    ep: int
    virtual_stages: int | None
    micro_batch: int | None
    global_batch: int | None
    microbatches: int | None
    zero: Stage
    shard_devices: int | None
    offload: bool
    recompute: str | None
    recompute_text: str
    sequence_parallel: bool | None
    precision: str | None
    precision_text: str
    schedule: str | None
    balance: tuple[int, ...] = ()
    options: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement.

    step_s: seconds of a step, None where none can be told. kind: what was printed: "step time", "tokens/s", "samples/s", "TFLOP/s", "MFU",
    "days", "layer time" (forward and backward of one layer: no embedding, head or optimizer), "derived" or "".
    memory_bytes: the fullest device's peak; memory_counts: what of it, "device" (all, as nvidia-smi says), "reserved" or "allocated" (by
    the framework's allocator); total_memory_bytes: the sum over devices, where only that is printed. year: of the measurement, where said.
    stage_s: measured times of one microbatch in a stage (TF forward, TB backward of inputs, TW of weights, Tcomm sending).
    tflops: as printed, of one device; mfu: model-flops utilisation, as a share. framework: megatron, maxtext, torchtitan ... where the
    row's or the source's words name one. reason: why the row cannot be predicted from its fields, None where it can (it may have a step
    time all the same).
    """

    file: str
    id: str
    model: Model
    machine: Machine
    layout: Layout
    kind: str = ""
    step_s: float | None = None
    memory_bytes: float | None = None
    memory_counts: str = "allocated"
    year: int | None = None
    total_memory_bytes: float | None = None
    out_of_memory: bool = False
    stage_s: tuple[tuple[str, float], ...] = ()
    tflops: float | None = None
    mfu: float | None = None
    framework: str | None = None
    reason: str | None = None
    assumed: tuple[str, ...] = ()
    contradictions: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether there is a step time to compare a prediction with, and enough to predict it from."""
        return self.reason is None and self.step_s is not None and not self.out_of_memory


@dataclass(frozen=True, kw_only=True)
class FlopConvention:
    """What a file's TFLOP/s count. why: "fit" (rows with both figures agree), "words" or "year"."""

    recompute: bool
    causal: bool
    why: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """One file. year, last_year: the first and the last that its source names; words: its title and its notes."""

    path: Path
    year: int | None
    last_year: int | None
    words: str
    rows: tuple[Row, ...]
    convention: FlopConvention


# -- reading -----------------------------------------------------------------------------------------------------------------------------


def read_directory(folder: Path) -> list[Table]:
    """Every ``*.json`` of a folder. Raises TableError where there is none, or one is not of the form."""
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise TableError(f"{folder}:1: no *.json file here")
    return [read_table(path) for path in paths]


def read_table(path: Path) -> Table:
    """One file. Raises TableError for malformed JSON, for missing `rows`, and for a row that is no object."""
    text = path.read_text()
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise TableError(f"{path}:{error.lineno}: no JSON: {error.msg}") from error
    if not isinstance(content, dict) or "rows" not in content:
        raise TableError(f'{path}:1: no "rows" at the top level')
    line = next((number for number, each in enumerate(text.splitlines(), 1) if '"rows"' in each), 1)
    if not isinstance(content["rows"], list):
        raise TableError(f'{path}:{line}: "rows" is no list')
    for index, raw in enumerate(content["rows"]):
        if not isinstance(raw, dict):
            raise TableError(f"{path}:{line}: row {index} is no object")
    source, hardware, notes = _object(content, "source"), _object(content, "hardware"), str(content.get("notes", ""))
    years = [int(each) for each in re.findall(r"\d{4}", str(source.get("year", "")))]
    year, last_year = min(years, default=None), max(years, default=None)
    title = f"{source.get('title', '')} {source.get('address', '')}"
    counts = read_memory_counts(notes)
    read = [_row(path.name, index, raw, hardware, title) for index, raw in enumerate(content["rows"])]
    pairs = [(raw, replace(row, memory_counts=counts)) for raw, row in zip(content["rows"], read, strict=True)]
    convention = flop_convention(pairs, notes, year)
    rows = tuple(_with_flops(raw, row, convention) for raw, row in pairs)
    return Table(path=path, year=year, last_year=last_year, words=f"{title} {notes}", rows=rows, convention=convention)


def _row(file: str, index: int, raw: Json, hardware: Json, title: str) -> Row:
    """All but what needs the file's TFLOP/s convention."""
    assumed: list[str] = []
    model = read_model(_object(raw, "model"), assumed)
    machine = read_machine(raw, hardware, assumed)
    layout = read_layout(raw, model, machine, assumed)
    kind, step_s, contradictions = measured_step(raw, model, machine, layout)
    measured = _object(raw, "measured")
    if machine.devices and machine.devices != layout.tp * layout.pp * layout.cp * layout.dp:
        product = f"{layout.tp}·{layout.pp}·{layout.cp}·{layout.dp}"
        contradictions.append(f"tp·pp·cp·dp = {product} is not the {machine.devices} devices")
    if layout.tp * layout.cp * layout.dp % layout.ep:
        contradictions.append(f"ep = {layout.ep} does not divide tp·cp·dp = {layout.tp * layout.cp * layout.dp}")
    stage_ms = _object(raw, "per_stage_ms")
    return Row(
        file=file,
        id=str(raw.get("id", f"{Path(file).stem}:{index:03}")),
        model=model,
        machine=machine,
        layout=layout,
        kind=kind,
        step_s=step_s,
        memory_bytes=_memory(measured),
        year=_year(raw),
        total_memory_bytes=_total_memory(measured),
        out_of_memory=_out_of_memory(measured),
        stage_s=tuple((name, value / 1e3) for name, each in stage_ms.items() if (value := _number(each)) is not None),
        tflops=_positive(measured.get("tflops_per_gpu"))
        or _scaled(_positive(measured.get("aggregate_pflops")), 1e3 / max(1, machine.devices)),
        mfu=_positive(measured.get("mfu")),
        framework=read_framework(raw, title),
        assumed=tuple(assumed),
        contradictions=tuple(contradictions),
    )


def _with_flops(raw: Json, row: Row, convention: FlopConvention) -> Row:
    """Takes the step time from TFLOP/s where nothing better was printed, compares the two where something was, and judges the row."""
    contradictions, assumed, kind, step_s = row.contradictions, row.assumed, row.kind, row.step_s
    from_flops = seconds_from_flops(row, convention)
    if step_s is None and from_flops is not None:
        kind, step_s = "TFLOP/s" if row.tflops else "MFU", from_flops
        counted = (
            f"{'hardware' if convention.recompute and row.tflops else 'model'} flops, {'half' if convention.causal else 'all'} of attention"
        )
        assumed = (*assumed, f"{kind} counts {counted} ({convention.why})")
    elif step_s is not None and from_flops is not None and kind != "layer time" and abs(from_flops / step_s - 1) > FLOP_TOLERANCE:
        contradictions = (
            *contradictions,
            f"{kind}: {step_s:.4g} s, but {f'{row.tflops:g} TFLOP/s' if row.tflops else 'MFU'} make {from_flops:.4g} s",
        )
    elif step_s is not None and from_flops is not None and convention.recompute and row.tflops and row.layout.recompute is None:
        row = replace(row, layout=replace(row.layout, recompute="full"))
        assumed = (*assumed, "full recomputation: the TFLOP/s count it")
    row = replace(row, kind=kind, step_s=step_s, assumed=assumed, contradictions=contradictions)
    return replace(row, reason=_reason(raw, row))


def _reason(raw: Json, row: Row) -> str | None:
    model, measured = row.model, _object(raw, "measured")
    if not row.machine.devices:
        return "number of devices not stated"
    if row.machine.device is None:
        return "unknown device"
    if not model.has_shape:
        return f"shape not in the fields ({model.family})"
    if row.layout.global_batch is None:
        return "global batch not stated"
    if row.step_s is None and row.memory_bytes is None and row.total_memory_bytes is None and not row.out_of_memory:
        relative = any("speed" in name or "relative" in name for name in measured)
        return "relative figure only" if relative else "no figure that gives a step time"
    return None


# -- the model ---------------------------------------------------------------------------------------------------------------------------

_FAMILIES = (  # the first that is found in the words; "unpadded" is no U-Net
    ("diffusion", r"u-?net(?!3d)|diffusion|imagen|\bdit\b|flux"),
    ("recommender", r"dlrm|recommend|embedding model"),
    ("graph", r"\bgnn\b|r-?gat|graph"),
    ("cnn", r"amoebanet|resnet|retinanet|mask.?r-?cnn|\bssd\b|unet3d|efficientnet|\bcnn\b|\bvgg"),
    ("vit", r"\bvit\b|vision transformer|\bvit-"),
    ("encoder-decoder", r"t5|enc-dec|encoder-decoder|\bbart\b|\bul2\b"),
    ("encoder", r"bert|electra"),
    ("hybrid", r"mamba|hybrid|nemotron-?h|\bssm\b|rwkv"),
)
_GATED = (
    r"llama|mistral|mixtral|qwen|deepseek|kimi|gemma|swiglu|geglu|gated|t5-v1\.1|\byi\b|phi-?3|grok|baichuan|glm|internlm|olmo|gpt[-_ ]?oss"
)
# Not hidden / heads: the models' published configurations.
_HEAD_DIM = (("qwen3", 128), ("gemma", 256), ("gpt[-_ ]?oss", 64), ("glm[-_ ]?4", 128), ("t5", 64))
_SHAPES = (  # published configurations of models that a source names without numbers (huggingface.co/Qwen/Qwen3-8B config.json)
    (r"qwen3.?8b", {"layers": 36, "hidden": 4096, "heads": 32, "kv_heads": 8, "ffn": 12288, "vocab": 151936}),
)
_MLA = {"query": 1536, "latent": 512, "plain": 128, "rotated": 64, "value": 128}  # DeepSeek-V3 technical report, 2024, section 4.2


def read_model(raw: Json, assumed: list[str]) -> Model:
    """The model's numbers, from a row's `model`; what is inferred is added to `assumed`."""
    arch = " ".join(dict.fromkeys(str(raw[name]) for name in ("arch", "name") if raw.get(name)))
    words = arch.lower()
    for pattern, shape in _SHAPES:
        if re.search(pattern, words) and not raw.get("hidden"):
            raw = raw | {name: value for name, value in shape.items() if raw.get(name) is None}
            assumed.append("shape of the published model")
    experts = _count(raw.get("experts")) or 0
    family = next((name for name, pattern in _FAMILIES if re.search(pattern, words)), "")
    if not family:
        family = "moe" if experts else "decoder" if raw.get("layers") and raw.get("hidden") else "unknown"
    heads, layers = _count(raw.get("heads")), _count(raw.get("layers"))
    model = Model(
        family=family,
        arch=arch,
        layers=layers,
        hidden=_count(raw.get("hidden")),
        heads=heads,
        kv_heads=_count(raw.get("kv_heads")) or heads,
        ffn=_count(raw.get("ffn")) or _count(raw.get("moe_ffn")),
        vocab=_count(raw.get("vocab")),
        seq_len=_count(raw.get("seq_len")),
        decoder_seq=_count(raw.get("decoder_seq")),
        params=_number(raw.get("params")),
        active_params=_number(raw.get("active_params")),
        experts=experts,
        topk=_count(raw.get("topk")) or (2 if experts else 0),
        moe_ffn=(_count(raw.get("moe_ffn")) or _count(raw.get("ffn")) or 0) if experts else 0,
        shared_ffn=_count(raw.get("shared_ffn")) or 0,
        dense_layers=_count(raw.get("dense_layers")) or 0,
        mla="mla" in re.split(r"\W+", words) or bool(re.search("deepseek.?v[23]|kimi", words)),
    )
    return _inferred(model, _count(raw.get("head_dim")) or _count(raw.get("kv_channels")), words, assumed)


def _inferred(model: Model, head_dim: int | None, words: str, assumed: list[str]) -> Model:
    """Head width and gating: as the family usually has them, unless another choice and only that one gives the stated parameters."""
    if not model.has_shape:
        return replace(model, head_dim=head_dim)
    assert model.hidden is not None and model.heads is not None
    published = next((width for pattern, width in _HEAD_DIM if re.search(pattern, words)), None)
    usual = head_dim or published or model.hidden // model.heads
    gated = bool(re.search(_GATED, words)) or bool(model.experts)
    first = replace(model, head_dim=usual, gated=gated)
    size = re.search(r"(\d+(?:\.\d+)?)\s?b\b", words)
    stated = model.params or (float(size[1]) * 1e9 if size else None)
    error = 0.0 if stated is None or model.vocab is None else _parameters_error(first, stated, positions=True)
    if stated is None or error <= 0.05:
        return first
    widths = (usual,) if head_dim or published else (usual, 64, 128, 256)
    for other in (replace(first, head_dim=width, gated=each) for width in widths for each in sorted({gated, True})):
        if _parameters_error(other, stated) <= (error / 3 if other.head_dim == usual else 0.02):  # a third matrix is 20 to 30 %
            assumed.append(f"head_dim {other.head_dim}, {'gated' if other.gated else 'plain'} MLP, from {stated:.3g} parameters")
            return other
    return first


def _parameters_error(model: Model, stated: float, *, positions: bool = False) -> float:
    """Relative, with the embedding counted once (tied) or twice, and learned positions or none, whichever is nearest."""
    hidden, vocab, seq_len = model.hidden or 0, model.vocab or 0, model.seq_len or 0
    attention, mlp = _layer_parameters(model, active=False)
    layers = 3 * attention + 2 * mlp if model.family == "encoder-decoder" else attention + mlp  # a decoder's layer has two attentions
    extra = (0, seq_len) if positions else (0,)
    return min(abs((layers + (times * vocab + length) * hidden) / stated - 1) for times in (1, 2) for length in extra)


def _layer_parameters(model: Model, *, active: bool) -> tuple[float, float]:
    """Parameters of `layers` attentions and of as many MLPs; `active`: those that a token uses."""
    assert model.layers is not None and model.hidden is not None and model.heads is not None and model.ffn is not None
    hidden, matrices = model.hidden, 3 if model.gated else 2
    attention = _attention_parameters(model) * model.layers
    expert_layers = max(0, model.layers - model.dense_layers) if model.experts else 0
    dense = (model.layers - expert_layers) * matrices * hidden * model.ffn
    used = model.topk if active else model.experts
    sparse = expert_layers * hidden * (matrices * (used * model.moe_ffn + model.shared_ffn) + model.experts)
    return attention, dense + sparse


def _attention_parameters(model: Model) -> float:
    assert model.hidden is not None and model.heads is not None
    if model.mla:
        each = _MLA["plain"] + _MLA["rotated"]
        query = _MLA["query"] * (model.hidden + model.heads * each)
        latent = model.hidden * (_MLA["latent"] + _MLA["rotated"]) + _MLA["latent"] * model.heads * (_MLA["plain"] + _MLA["value"])
        return query + latent + model.heads * _MLA["value"] * model.hidden
    width = model.head_dim or model.hidden // model.heads
    return model.hidden * width * 2.0 * (model.heads + (model.kv_heads or model.heads))


def forward_flops(model: Model, *, causal: bool) -> tuple[float, float, float]:
    """Of one sequence: all layers' matrix products, attention's scores and values, and the head. causal: a decoder's scores count half.

    Encoder-decoders: each of `layers` is there twice, once on seq_len, once (with a second attention) on decoder_seq.
    """
    assert model.seq_len is not None and model.heads is not None and model.hidden is not None and model.layers is not None
    attention, mlp = _layer_parameters(model, active=True)
    width = _MLA["plain"] + _MLA["rotated"] + _MLA["value"] if model.mla else 2 * (model.head_dim or model.hidden // model.heads)
    square = 2.0 * width * model.heads * model.layers  # flops of one query with one key
    length = model.seq_len
    half = 0.5 if causal and model.family in ("decoder", "moe", "hybrid") else 1.0
    if model.family == "encoder-decoder":
        other = model.decoder_seq or model.seq_len
        layers = 2 * (length * (attention + mlp) + other * (2 * attention + mlp))
        return layers, square * (length**2 + other**2 + length * other), 2.0 * other * model.hidden * (model.vocab or 0)
    return 2 * length * (attention + mlp), square * length**2 * half, 2.0 * length * model.hidden * (model.vocab or 0)


# -- the machine -------------------------------------------------------------------------------------------------------------------------

_TPU = re.compile(r"\btpu[ -]?v?(\d)([ep]?)|\b(?:v(\d)([ep])(?=[ -]|$))|(trillium)|(ironwood)")
_GPU = re.compile(
    r"(?<![a-z0-9])(gb\d{3}|gh200|mi\d{3}[ax]?|gaudi ?\d|[rg]tx ?[a-z]?\d{4}|[abhpv]\d{2,3}[sg]?|l40s?|l4|t4|k80)(?![0-9a-z])"
)
_SIZES = {"a100": None, "v100": None, "p100": None, "h100": 80, "a800": 80, "h800": 80}  # GB that needs no suffix; others have one size
_PRECISIONS = ("bf16", "fp16", "fp8", "fp4", "fp32", "tf32")


def device_name(*texts: str) -> str | None:
    """A short name, from the first text that names a device: a100-80g, h100, gb200, tpu-v5e, mi300x ... None where none does."""
    for text in texts:
        words = text.lower().replace("_", " ")
        tpu = _TPU.search(words)
        if tpu:
            return "tpu-v6e" if tpu[5] else "tpu-v7" if tpu[6] else f"tpu-v{tpu[1] or tpu[3]}{tpu[2] or tpu[4] or ''}"
        gpu = _GPU.search(words)
        if gpu:
            name = gpu[1].replace(" ", "")
            form = "-pcie" if "pcie" in words and "sxm" not in words else "-nvl" if re.search(r"h\d00 ?nvl\b", words) else ""
            size = next((each for each in map(_device_gb, texts) if each), None)
            keep = name in _SIZES and size is not None and size != _SIZES[name]
            return f"{name}{form}-{size}g" if keep else name + form
    return None


def _device_gb(text: str) -> int | None:
    """Memory in a device's name: 80 for "A100-SXM4-80GB", "a100_80gb" and "A100 80G 400Gbps", none for "400 Gb/s"."""
    found = re.search(r"(?<![\d.])(\d{1,3})\s?g(?:i?b)?(?![a-z/])", text.lower().replace("_", " "))
    return int(found[1]) if found else None


def _hardware_of(raw: Json, hardware: Json) -> Json:
    """The part of `hardware` that a row ran on: by its `system`, else by a device that another of its texts names."""
    common = {name: value for name, value in hardware.items() if not isinstance(value, dict)}
    parts = {name: value for name, value in hardware.items() if isinstance(value, dict)}
    if not parts:
        return common
    system = str(raw.get("system"))
    if system in parts:
        return common | {"gpu": system} | parts[system]
    known = {name: device_name(name, str(part.get("gpu", ""))) for name, part in parts.items()}
    for text in (raw.get("system"), raw.get("gpu"), raw.get("where"), raw.get("note")):
        device = device_name(str(text or ""))
        if device is not None:
            exact = [name for name in parts if known[name] == device]
            alike = [name for name in parts if _short(known[name]) == _short(device)]
            return common | {"gpu": str(text)} | next((parts[name] for name in exact + alike), {})
    return common | next(iter(parts.values())) if len(parts) == 1 else common


def _short(device: str | None) -> str | None:
    """Without memory and form: a100 for a100-80g."""
    return device if device is None or device.startswith("tpu") else device.split("-")[0]


def read_machine(raw: Json, hardware: Json, assumed: list[str]) -> Machine:
    """The cluster of a row, from its own fields before the file's `hardware`."""
    part = _hardware_of(raw, hardware) | {name: raw[name] for name in ("gpu", "gpus_per_node", "intra_node", "inter_node") if raw.get(name)}
    system, text = str(raw.get("system") or ""), str(part.get("gpu") or "")
    device = device_name(text, system)
    if device in ("a100", "v100"):
        device = {"a100": "a100-80g", "v100": "v100-32g"}[device]
        assumed.append(f"memory of {device}")
    devices = _devices(raw)
    gpus = re.search(r"(\d+) GPUs", system)
    node = _count(part.get("gpus_per_node")) or (int(gpus[1]) if gpus else None)
    rack = re.search(r"NVL(\d+)\b", text)
    domain = _count(part.get("nvlink_domain")) or (int(rack[1]) if rack and device and device.startswith("g") else None)
    slices = _count(raw.get("slices"))
    island = devices // slices if slices else domain or node
    inter = str(part.get("inter_node") or (system if re.search(r"\d\s?gb(?:/s|ps)", system, re.I) else ""))
    intra = str(part.get("intra_node") or "")
    return Machine(
        device=device,
        device_text=text or system,
        devices=devices,
        node_devices=node,
        island_devices=island,
        intra_bytes_per_s=intra_link(intra),
        inter_bytes_per_s=inter_link(inter, node),
        intra_text=intra,
        inter_text=inter,
        memory_bytes=_scaled(_device_gb(text) or _device_gb(system), GIB),
        peak_flops=tuple((name, each * 1e12) for name in _PRECISIONS if (each := _number(part.get(f"peak_tflops_{name}"))) is not None),
    )


def intra_link(text: str) -> float | None:
    """Bytes/s of one device, each direction, inside a node. NVLink's usual figure (600 GB/s of an A100) is both directions' sum."""
    found = re.search(r"(\d+(?:\.\d+)?)\s?([GT])B/s", text)
    if not found:
        return None
    bytes_per_s = float(found[1]) * {"G": 1e9, "T": 1e12}[found[2]]
    one_way = re.search(r"unidirectional|(?:each|per|one) (?:direction|way)", text, re.I)
    return bytes_per_s / 2 if re.search(r"nvlink|nvswitch|infinity fabric|xgmi", text, re.I) and not one_way else bytes_per_s


def inter_link(text: str, node_devices: int | None) -> float | None:
    """Bytes/s of one device, each direction, between nodes: "8x400 Gb/s", "4 links of 100 Gb/s", "400 Gb/s per node", "... per GPU"."""
    found = re.search(r"(\d+(?:\.\d+)?)\s?([GT])(b|B)(?:it)?(?:/s|ps)", text)
    if not found:
        return None
    rate = float(found[1]) * {"G": 1e9, "T": 1e12}[found[2]] / (8 if found[3] == "b" else 1)
    if re.search(r"per[ -](?:gpu|device|chip|accelerator)", text, re.I):
        return rate
    before = text[: found.start()]
    count = re.findall(r"(?<![\w.])(\d+)\s?[x×]", before) or re.findall(r"(?<![\w.-])(\d+)\s[a-zA-Z]", before)
    return None if node_devices is None else rate * (int(count[-1]) if count else 1) / node_devices


_FRAMEWORKS = r"maxtext|t5x|pax|torchtitan|deepspeed|zero-\d+b|llm-foundry|fms-fsdp|torchgpipe|hugectr|automodel|nemo|megatron|tpu-recipes"


def read_framework(raw: Json, title: str) -> str | None:
    """The framework that a row's words name, else its source's title and address; NeMo trains with Megatron's layers, ZeRO-100B is
    DeepSpeed's first form, and a stage of ZeRO by its number is DeepSpeed's, too."""
    own = " ".join(str(raw.get(name) or "") for name in ("framework", "zero_fsdp", "kernel", "where"))
    for words in (own.lower(), title.lower()):
        found = re.search(_FRAMEWORKS, words)
        if found:
            return {"nemo": "megatron", "tpu-recipes": "maxtext"}.get(found[0], "deepspeed" if found[0].startswith("zero") else found[0])
    zero = str(raw.get("zero_fsdp") or "").lower()
    return "deepspeed" if re.search(r"\bzero\W?[0-3]\b", zero) and not re.search("fsdp|distributed", zero) else None


# -- the layout --------------------------------------------------------------------------------------------------------------------------

_READ = {"id", "model", "n_gpus", "tp", "pp", "dp", "cp", "ep", "virtual_stages", "micro_batch", "global_batch", "zero_fsdp", "recompute"}
_READ |= {"sequence_parallel", "precision", "measured", "derived", "schedule", "system", "slices", "per_stage_ms", "from_memory", "date"}
_SCHEDULES = ("zb-v", "zb-h1", "zb-h2", "zb-1p", "zb-2p", "gpipe", "dualpipe", "interleaved", "1f1b-i", "1f1b")  # in this order
_ALIASES = {"zb-1p": "zb-h1", "zb-h2": "zb-2p"}  # the same but for who put them in order: a solver, or the paper
_ONE_STAGE = ("gpipe", "zb-h1", "zb-2p")


def read_layout(raw: Json, model: Model, machine: Machine, assumed: list[str]) -> Layout:
    """How a row's step was split. Missing degrees are 1; dp, microbatches and the global batch are inferred from the others."""
    tp, pp, cp, ep = (_count(raw.get(name)) or 1 for name in ("tp", "pp", "cp", "ep"))
    dp = _count(raw.get("dp"))
    if dp is None:
        dp = max(1, machine.devices // (tp * pp * cp))
        assumed.append(f"dp {dp}: the devices that are left")
    micro, batch, microbatches = _batches(raw, model, dp, assumed)
    zero, shard = read_zero(raw.get("zero_fsdp"), machine, tp * pp)
    virtual, balance = raw.get("virtual_stages"), _object(raw, "model").get("balance")
    if isinstance(virtual, str) and "max" in virtual.lower() and model.layers:
        virtual = math.ceil(model.layers / pp)  # one layer a chunk
        assumed.append(f"{virtual} virtual stages: a layer each")
    words = re.sub(r"[^a-z0-9]", "", str(raw.get("schedule") or "").lower())
    schedule = next((name for name in _SCHEDULES if name.replace("-", "") in words), None)
    return Layout(
        tp=tp,
        pp=pp,
        dp=dp,
        cp=cp,
        ep=ep,
        virtual_stages=_count(virtual),
        micro_batch=micro,
        global_batch=batch,
        microbatches=microbatches,
        zero=zero,
        shard_devices=shard,
        offload="offload" in f"{raw.get('zero_fsdp')} {raw.get('recompute')}".lower(),
        recompute=read_recompute(raw.get("recompute")),
        recompute_text=str(raw.get("recompute") or ""),
        sequence_parallel=raw["sequence_parallel"] if isinstance(raw.get("sequence_parallel"), bool) else None,
        precision=read_precision(raw.get("precision")),
        precision_text=str(raw.get("precision") or ""),
        schedule="interleaved" if schedule == "1f1b-i" else schedule,
        balance=tuple(balance) if isinstance(balance, list) else (),
        options=tuple(sorted(_options(raw))),
    )


def schedule_of(layout: Layout) -> tuple[str, int]:
    """The schedule that a row was run with, by the name that `shardwise.program.tables` has for it, and the stages of a pipeline rank.

    Of one with several stages a rank whose number is not stated there are two, the fewest. Schedules that are not known, such as DualPipe,
    and rows that name none: interleaved where a rank has several stages, else 1f1b.
    """
    chunks, named = layout.virtual_stages or 1, _ALIASES.get(layout.schedule or "", layout.schedule)
    if layout.pp == 1:
        return "1f1b", 1
    if named == "zb-v":
        return named, 2
    if named in _ONE_STAGE:
        return named, 1
    return ("interleaved", max(2, chunks)) if chunks > 1 or named == "interleaved" else ("1f1b", 1)


def _batches(raw: Json, model: Model, dp: int, assumed: list[str]) -> tuple[int | None, int | None, int | None]:
    """Sequences of a microbatch and of a step, and microbatches of a step on one data-parallel rank."""
    micro, batch, accumulated = (_count(raw.get(name)) for name in ("micro_batch", "global_batch", "grad_accum"))
    measured = _object(raw, "measured")
    seconds, tokens = _number(measured.get("iter_time_s")), _number(measured.get("tokens_per_s"))
    tokens = tokens or _scaled(measured.get("tokens_per_s_per_gpu"), _devices(raw))
    if batch is None and micro and accumulated:
        batch = micro * accumulated * dp
        assumed.append(f"global batch {batch}: microbatches × accumulation × dp")
    elif batch is None and seconds and tokens and model.seq_len:
        batch = round(seconds * tokens / model.seq_len)
        assumed.append(f"global batch {batch}: tokens/s × step time")
    if micro is None and batch and accumulated and batch % (dp * accumulated) == 0:
        micro = batch // (dp * accumulated)
        assumed.append(f"micro batch {micro}: from the accumulation")
    return micro, batch, max(1, round(batch / dp / micro)) if batch and micro else None


def read_zero(text: Any, machine: Machine, parallel: int) -> tuple[Stage, int | None]:
    """ZeRO stage, and how many devices one copy of the parameters is spread over (None: not stated, that is all data-parallel ones).

    machine: for its slices; parallel: tp · pp. A "distributed optimizer" is stage 1, FSDP stage 3; sharding inside an island or a group,
    with replicas of it, is "hybrid".
    """
    if text is None:
        return None, None
    words = str(text).lower()
    inner = re.search(r"(?:fsdp|degree|shard\w*)\D{0,3}(\d+)", re.sub(r"fsdp[12]\b", "fsdp", words))
    degree = int(inner[1]) if inner else None
    replicas = re.search(r"x dp (\d+)", words)
    stage = re.search(r"zero\W{0,2}(?:stage\W?)?([0-3])(?!\d)", words)
    if re.search(r"hsdp|hybrid", words) or (replicas and int(replicas[1]) > 1):
        return "hybrid", degree or machine.island_devices
    if "in slice" in words and not replicas and (machine.island_devices or machine.devices) < machine.devices:
        return "hybrid", machine.island_devices
    if degree and "(+dp)" in words.replace(" ", ""):
        return (3 if degree * parallel == machine.devices else "hybrid"), degree
    if stage:
        return int(stage[1]), degree
    if re.search(r"shard_grad_op|pos ?\+ ?g\b", words):
        return 2, degree
    if "fsdp" in words or "full_shard" in words:
        return 3, degree
    if re.search(r"^(none|no)\b", words):
        return 0, None
    if re.search(r"distributed.{0,7}lamb", words):
        return 1, degree or machine.node_devices  # apex's divides its states inside a node and sums between nodes
    if re.search(r"distributed.{0,7}(optimizer|adam)", words):
        return 1, degree
    return (0, None) if re.search(r"\bd?dp\b", words) else (None, None)


def read_recompute(value: Any) -> str | None:
    """none, selective or full; None where it is not stated, or only that there is some policy.

    Selective means that matrix products are kept (attention's core, norms and activations are recomputed, or chosen operators); GPipe's
    checkpointing of all but the last microbatch is full, and so is a policy that keeps inputs and one projection alone.
    """
    if isinstance(value, bool):
        return "full" if value else "none"
    words = str(value or "").lower()
    if not words or re.search(r"not (recorded|stated)|unknown|custom", words):
        return None
    if re.search(r"^(none|no|off)\b", words):
        return "none"
    if re.search(r"selective|\bsac\b|minimal|core|save_", words):
        return "selective"
    return "full" if re.search(r"full|checkpoint|offloaded|block|uniform|every layer", words) else None


def read_precision(value: Any) -> str | None:
    """The narrowest format named: fp4, fp8, then 16 bits as first named, tf32, fp32. "Mixed" alone is fp16, as it was when it meant one."""
    words = str(value or "").lower()
    for pattern, name in ((r"fp4|float4", "fp4"), (r"fp8|float8|int8", "fp8")):
        if re.search(pattern, words):
            return name
    found = re.search(r"bf16|bfloat16|fp16|float16|half|tf32|fp32|float32|single", words)
    if found:
        return {"bf": "bf16", "ha": "fp16", "tf": "tf32", "si": "fp32"}.get(found[0][:2], "fp32" if "32" in found[0] else "fp16")
    return "fp16" if "mixed" in words or "amp" in words else None


def _options(raw: Json) -> Iterator[tuple[str, str]]:
    """Settings that no other field holds; of where a figure stands only what it says of an optimisation being on or off."""
    for name, value in raw.items():
        if name not in _READ and value not in (None, "") and name != "where":
            yield name, json.dumps(value) if isinstance(value, dict | list) else str(value)
    for what, state in re.findall(r"([\w/]+) (on|off)\b", str(raw.get("where", "")), re.I):
        yield what, state.lower()


# -- the measurement ---------------------------------------------------------------------------------------------------------------------


def measured_step(raw: Json, model: Model, machine: Machine, layout: Layout) -> tuple[str, float | None, list[str]]:
    """What was printed, the step time that it gives (TFLOP/s and MFU not looked at), and contradictions.

    The printed step time counts first, then the source's own conversion if it agrees with ours, then ours.
    """
    measured, derived = _object(raw, "measured"), _positive(_object(raw, "derived").get("iter_time_s"))
    layer_ms = _positive(measured.get("layer_total_ms"))
    if layer_ms is not None:
        return "layer time", layer_ms / 1e3, []
    found = list(_conversions(measured, model, machine, layout))
    printed = _positive(measured.get("iter_time_s"))
    if printed is not None:
        found.insert(0, ("step time", printed))
    contradictions = [
        f"{kind}: {other:.4g} s, but {found[0][0]}: {found[0][1]:.4g} s"
        for kind, other in found[1:]
        if abs(other / found[0][1] - 1) > TOLERANCE
    ]
    if derived is None:
        return (*found[0], contradictions) if found else ("", None, contradictions)
    if not found:
        return "TFLOP/s" if any("flop" in name for name in measured) else "derived", derived, contradictions
    if abs(derived / found[0][1] - 1) > TOLERANCE:
        contradictions.append(f"derived: {derived:.4g} s, but {found[0][0]}: {found[0][1]:.4g} s")
        return (*found[0], contradictions)
    return found[0][0], found[0][1] if printed is not None else derived, contradictions


def _conversions(measured: Json, model: Model, machine: Machine, layout: Layout) -> Iterator[tuple[str, float]]:
    """(what was printed, seconds of a step) for every rate that a row has."""
    sequences, tokens = layout.global_batch, (layout.global_batch or 0) * (model.seq_len or 0)
    for name, value in measured.items():
        rate = _positive(value)
        days = re.fullmatch(r"train_days_(\d+)B_tokens", name)
        if days and rate and tokens:
            yield "days", rate * 86400 * tokens / (float(days[1]) * 1e9)
        found = re.fullmatch(r"(tokens|samples|sequences|images)_per_s(_per_(?:gpu|device|chip))?", name)
        work = tokens if found and found[1] == "tokens" else sequences
        if found and rate and work and (machine.devices or not found[2]):
            yield f"{'tokens' if found[1] == 'tokens' else 'samples'}/s", work / (rate * (machine.devices if found[2] else 1))


def flop_convention(pairs: Sequence[tuple[Json, Row]], notes: str, year: int | None) -> FlopConvention:
    """What the TFLOP/s of these rows count: see the module's docstring."""
    both = [row for _, row in pairs if row.step_s is not None and row.tflops and row.kind != "layer time"]
    both = [row for row in both if row.model.has_shape and row.layout.global_batch]
    choices = [FlopConvention(recompute=recompute, causal=causal, why="fit") for causal in (False, True) for recompute in (False, True)]
    if len(both) >= TIMED_TWICE:
        errors = [_misfit(both, choice) for choice in choices]
        best = min(range(len(choices)), key=lambda index: (round(errors[index], 2), index))
        if errors[best] <= FLOP_TOLERANCE:
            return choices[best]
    words = " ".join(
        [notes, *(f"{raw.get('tflops_definition', '')} {_object(raw, 'derived').get('formula', '')}" for raw, _ in pairs)]
    ).lower()
    causal = bool(re.search(r"(?<!non-)(?<!non)causal (half|attention)|half of (the )?attention", words))
    if re.search(r"exclud\w* (recompute|remat)", words):
        return FlopConvention(recompute=False, causal=causal, why="words")
    if re.search(r"(count|includ|incl\.)\w*[^.;]{0,40}recomput", words):
        return FlopConvention(recompute=True, causal=causal, why="words")
    return FlopConvention(recompute=year in (2021, 2022), causal=causal, why="year")


def _misfit(rows: Iterable[Row], convention: FlopConvention) -> float:
    return statistics.median(abs(math.log((seconds_from_flops(row, convention) or math.inf) / (row.step_s or math.inf))) for row in rows)


def seconds_from_flops(row: Row, convention: FlopConvention) -> float | None:
    """Step time that a row's TFLOP/s mean, or the model flops of its utilisation; None without those, a shape or a batch."""
    peaks = dict(row.machine.peak_flops)
    peak = (
        peaks.get("bf16", peaks.get("fp16")) if row.layout.precision in ("bf16", "fp16") else None
    )  # in fp8 a share may be of either peak
    flops_per_s = row.tflops * 1e12 if row.tflops else (row.mfu or 0.0) * (peak or 0.0)
    if not flops_per_s or not row.machine.devices or not row.model.has_shape or not row.layout.global_batch:
        return None
    layers, scores, head = forward_flops(row.model, causal=convention.causal)
    again = row.layout.recompute if convention.recompute and row.tflops else "none"
    flops = 3 * (layers + scores + head) + (scores if again == "selective" else layers + scores if again in ("full", None) else 0)
    return row.layout.global_batch * flops / (flops_per_s * row.machine.devices)


def _memory(measured: Json) -> float | None:
    """Peak bytes of the fullest device. Sources that print "GB" often mean GiB: 7 % more."""
    for name, unit in (("peak_mem_gib", GIB), ("peak_mem_gb", 1e9), ("peak_mem_mib", 2**20), ("peak_mem_bytes", 1)):
        if _number(measured.get(name)) is not None:
            return _scaled(measured[name], unit)
    return None


def read_memory_counts(notes: str) -> str:
    """What printed memory counts, in the words of a source's notes: see `Row`."""
    words = notes.lower()
    if re.search(r"nvidia-smi|nvml|cuda context", words):
        return "device"
    return "reserved" if re.search(r"\breserved\b", words) else "allocated"


def _year(raw: Json) -> int | None:
    """Of a row's date, or of the document in which it stands (2024-12, 202412)."""
    dated = re.search(r"\b(20[12]\d)-\d", str(raw.get("date") or ""))
    found = dated or re.search(r"(?<!\d)(20[12]\d)-?(?:0[1-9]|1[0-2])(?!\d)", str(raw.get("where") or ""))
    return int(found[1]) if found else None


def _total_memory(measured: Json) -> float | None:
    """Bytes of all devices together, where parts are printed so; both must be there."""
    parts = [value for name, value in measured.items() if name.endswith("_gib_total")]
    values = [_number(value) for value in parts]
    return None if not values or None in values else sum(value for value in values if value is not None) * GIB


def _out_of_memory(measured: Json) -> bool:
    return measured.get("oom") is True or any(
        isinstance(value, str) and re.search(r"\boom\b|out of memory", value, re.I) for value in measured.values()
    )


# -- sweeps ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Rows that differ by layout alone; each has a step time, and no two have one layout."""

    file: str
    rows: tuple[Row, ...]


_SAME = ("release", "round", "version", "compile", "task", "kernel")  # options that are software, not layout
_REMARKS = ("flag", "tflops_definition", "unit_note", "grad_accum", "local_batch", "extra")  # options that say nothing of the step
_LAYOUT_FIELDS = [each.name for each in fields(Layout) if each.name not in ("options", "precision_text", "microbatches", "global_batch")]


def sweeps(rows: Iterable[Row]) -> list[Sweep]:
    """Groups of a file's rows with one model, machine, global batch, precision and software release, in at least two layouts.

    Rows that ran out of memory are left out; of rows with one layout the one with the median time stands for all.
    """
    groups: dict[tuple[Any, ...], list[list[Row]]] = {}
    for row in rows:
        if row.step_s is not None and not row.out_of_memory and row.layout.global_batch is not None:
            same = tuple(each for each in row.layout.options if each[0] in _SAME)
            shape = replace(row.model, arch="")
            key = (row.file, row.kind == "layer time", shape, row.machine, row.layout.global_batch, row.layout.precision_text.lower(), same)
            layouts = groups.setdefault(key, [])
            alike = next((each for each in layouts if _alike(each[0].layout, row.layout)), None)
            if alike is None:
                layouts.append([row])
            else:
                alike.append(row)
    return [Sweep(file=key[0], rows=tuple(map(_median, layouts))) for key, layouts in groups.items() if len(layouts) > 1]


def _median(rows: Sequence[Row]) -> Row:
    return sorted(rows, key=lambda row: row.step_s or 0.0)[(len(rows) - 1) // 2]


def _alike(one: Layout, other: Layout) -> bool:
    """Whether two layouts differ in nothing that both sources state."""
    ours, theirs = ([None if getattr(each, name) in ("", ()) else getattr(each, name) for name in _LAYOUT_FIELDS] for each in (one, other))
    options = [{name: value for name, value in each.options if name not in (*_SAME, *_REMARKS)} for each in (one, other)]
    return options[0] == options[1] and all(mine == his or None in (mine, his) for mine, his in zip(ours, theirs, strict=True))


# -- small readers -----------------------------------------------------------------------------------------------------------------------


def _number(value: Any) -> float | None:
    """A finite number, also from text that is nothing else; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _positive(value: Any) -> float | None:
    """A positive number; None for anything else."""
    number = _number(value)
    return number if number is not None and number > 0 else None


def _count(value: Any) -> int | None:
    """A positive whole number (96.0 is one); None for anything else."""
    number = _number(value)
    return int(number) if number is not None and number > 0 and number == int(number) else None


def _scaled(value: Any, unit: float) -> float | None:
    number = _number(value)
    return None if number is None else number * unit


def _devices(raw: Json) -> int:
    """Of a row; 0 where neither their number nor all degrees are stated."""
    degrees = [_count(raw.get(name)) for name in ("tp", "pp", "dp")]
    return _count(raw.get("n_gpus")) or (0 if None in degrees else math.prod(filter(None, degrees)) * (_count(raw.get("cp")) or 1))


def _object(raw: Json, name: str) -> Json:
    """A row's part, {} where it is missing or null."""
    return raw[name] if isinstance(raw.get(name), dict) else {}


# -- the table ---------------------------------------------------------------------------------------------------------------------------


def summary(tables: Sequence[Table]) -> str:
    """A line a file: rows; of them normalised, with a step time, with memory, out of memory; its sweeps and the rows in them; the rest."""
    names = ("rows", "norm.", "time", "mem.", "OOM")
    head = f"{'file':44} {' '.join(f'{name:>5}' for name in names)} {'sweeps':>10} {'contr.':>6}  {'TFLOP/s count':26} not normalised"
    lines = [_line(table.path.name, table.rows, f"{_counted(table.convention):26}") for table in tables]
    rows = [row for table in tables for row in table.rows]
    return "\n".join([head, *lines, _line(f"all {len(tables)} files", rows, " " * 26)])


def _line(name: str, rows: Sequence[Row], note: str) -> str:
    found = sweeps(rows)
    reasons = Counter(row.reason for row in rows if row.reason is not None)
    counts = (
        sum(row.reason is None for row in rows),
        sum(row.usable for row in rows),
        sum(row.memory_bytes is not None or row.total_memory_bytes is not None for row in rows),
        sum(row.out_of_memory for row in rows),
    )
    numbers = " ".join(f"{each:5}" for each in (len(rows), *counts))
    swept = f"{len(found)} of {sum(len(each.rows) for each in found)}" if found else "-"
    rest = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    contradicted = sum(bool(row.contradictions) for row in rows)
    return f"{name:44} {numbers} {swept:>10} {contradicted:6}  {note} {rest}".rstrip()


def _counted(convention: FlopConvention) -> str:
    return f"{'hardware' if convention.recompute else 'model'}{', causal' if convention.causal else ''} ({convention.why})"


def details(tables: Sequence[Table]) -> str:
    """What was assumed of rows and what contradicts itself, each text once a file with the rows that it is true of."""
    lines = []
    for table in tables:
        texts: dict[str, list[str]] = {}
        for row in table.rows:
            for text in (*(f"assumed: {each}" for each in row.assumed), *(f"contradiction: {each}" for each in row.contradictions)):
                texts.setdefault(text, []).append(row.id.rsplit(":", 1)[-1])
        if texts:
            lines.append(f"\n{table.path.name}")
            lines += [f"  {text}  [{len(ids)}: {', '.join(ids[:6])}{' ...' if len(ids) > 6 else ''}]" for text, ids in texts.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True, help="folder of *.json files")
    parser.add_argument("--details", action="store_true", help="also print assumptions and contradictions")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless --least of the rows can be used")
    parser.add_argument("--least", type=float, default=0.9, help="share of rows with a step time and all that a prediction needs")
    options = parser.parse_args()
    try:
        tables = read_directory(options.tables)
    except TableError as error:
        sys.exit(str(error))
    rows = [row for table in tables for row in table.rows]
    print(summary(tables))
    if options.details:
        print(details(tables))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if options.check and sum(row.usable for row in rows) < options.least * len(rows):
        sys.exit(f"fewer than {options.least:.0%} of {len(rows)} rows can be used")


if __name__ == "__main__":
    main()
