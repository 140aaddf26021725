"""How the experts of a published measurement were divided, routed to and computed, from its row's words, else from its software's time."""

from __future__ import annotations

import math
import re

from benchmarks.published_rows import Row
from shardwise.cost.routing import Dispatch, Routing

__all__ = ["expert_ranks", "expert_rates", "local_experts", "routing_of"]

_TOKENS_ONCE_SINCE = 2025  # DeepEP came out that February and Megatron-Core took it up that spring
_DISPATCHES: tuple[tuple[str, Dispatch], ...] = (
    (r"deep-?ep|hybrid-?ep|\bflex\b", "tokens"),
    (r"\ba2a\b(?! overlap)|all-?to-?all(?! overlap)", "rows"),
)
_OVERLAPPED = r"(a2a|all-?to-?all|expert|dispatch)\w* (comm\w* )?overlap|overlap\w*[ -](moe|a2a|expert|all-?to-?all)|dualpipe"
_IN_8_BITS = r"(fp8|8-bit) (dispatch|all-?to-?all|a2a)|dispatch\w* in (fp8|8 bits)"
_GROUPS = ((r"deepseek.?(v3|r1)", (8, 4)), (r"deepseek.?v2(?!.?lite)", (8, 3)))  # n_group, topk_group of their published configurations
_LAUNCH_S = 3e-3  # of a layer with experts: where H100s or B200s would be done in 3 to 6 ms, both passes of Megatron take 9 ms
_DROPS = r"token.?drop|capacity"  # experts of a fixed number of rows: the host need not know how many there are
_NOT_COUNTED = 0.5  # of launching: B200s took 4.7 ms a layer instead of 8.8 where tokens were dropped
_FREE_OF_COUNTS_SINCE = 2026.4  # 8-bit products of all experts in one kernel and whole steps as CUDA graphs, on Blackwell: NVIDIA's 26.06
# Where rows are sent straight to experts, the host splits what it gets by sender and expert and puts it together by expert, there and back
# (Megatron-LM, core/transformer/moe/moe_utils.py, sort_chunks_by_idxs): a view and a place in a concatenation for each.
_CHUNK_S = 4e-6
_COMPILED = ("maxtext", "t5x", "pax")
# Of a number that goes into products with experts in 8 bits, until one kernel did all: read in 16 bits, written along rows and columns
# (4 bytes); rows padded to tiles before the first product and after the last, in both passes (4 · 4 · hidden ÷ (2 · hidden + 3 · ffn)).
_CAST_BYTES = 9.0


def expert_ranks(row: Row) -> int:
    """Over which experts are divided; as many as there can be, where a row says more."""
    layout = row.layout
    return math.gcd(layout.ep, layout.tp * layout.cp * layout.dp) if row.model.experts else 1


def local_experts(row: Row) -> int | None:
    """Of a layer, on a rank; None without experts."""
    return max(1, row.model.experts // expert_ranks(row)) if row.model.experts else None


def expert_rates(row: Row, year: int) -> dict[str, bool | float]:
    """What of `shardwise.cluster.rates.Rates` a row's experts change."""
    if not row.model.experts or _is_free_of_counts(row, year):
        return {}
    return {"groups": False, "cast_bytes": _CAST_BYTES if row.layout.precision in ("fp8", "fp4") else 0.0}


def routing_of(row: Row, year: int) -> Routing | None:
    """How a row's tokens get to their experts: in its words, else as its time's software did it; None without experts."""
    model, words = row.model, " ".join((*(value for _, value in row.layout.options), row.layout.schedule or "")).lower()
    if not model.experts:
        return None
    groups, limit = next((each for pattern, each in _GROUPS if re.search(pattern, model.arch.lower())), (1, 1))
    named = next((kind for pattern, kind in _DISPATCHES if re.search(pattern, words)), None)
    once = year >= _TOKENS_ONCE_SINCE and not (row.machine.device or "").startswith("tpu")
    dispatch: Dispatch = named or ("tokens" if once else "rows")
    return Routing(
        experts=model.experts,
        chosen=model.topk,
        groups=groups,
        limit=limit,
        dispatch=dispatch,
        there_bits=8 if re.search(_IN_8_BITS, words) else None,
        overlapped=bool(re.search(_OVERLAPPED, words)),
        launch_s=_launch_s(row, year, dispatch),
    )


def _launch_s(row: Row, year: int, dispatch: Dispatch) -> float:
    if _is_free_of_counts(row, year):
        return 0.0
    sorts = dispatch == "rows" and expert_ranks(row) > 1 and (local_experts(row) or 1) > 1
    launch_s = _LAUNCH_S + (2 * row.model.experts * _CHUNK_S if sorts else 0.0)
    return launch_s * (_NOT_COUNTED if re.search(_DROPS, row.model.arch.lower()) else 1.0)


def _is_free_of_counts(row: Row, year: int) -> bool:
    """Whether the host never learns how many rows an expert has: its experts' products are one kernel, and the step may be one graph."""
    release = re.fullmatch(r"(\d\d)\.(\d\d).*", dict(row.layout.options).get("release", ""))
    date = 2000 + int(release[1]) + int(release[2]) / 12 if release else year + 0.5
    compiled = row.framework in _COMPILED or (row.machine.device or "").startswith("tpu")
    fused = bool(re.match(r"g?b\d|[gv]r\d", row.machine.device or "")) and row.layout.precision in ("fp8", "fp4")
    return compiled or (fused and date >= _FREE_OF_COUNTS_SINCE)
