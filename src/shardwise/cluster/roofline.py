"""What a device of the catalog reaches of what its data sheet promises: its figures as a probe would have measured them.

    products     peak × reach of the device × what a product of that size and thinness keeps of it
    attention    the same, times what fused attention keeps of products (FlashAttention-2 reports 50 to 73 % of an A100's peak)
    the rest     memory bandwidth × 0.85 (STREAM on HBM reaches 85 to 92 % of the data sheet's)

The constants were fitted on published measurements (`benchmarks/published.py`); each says what it stands for.
"""

from __future__ import annotations

import re
from functools import cache

from shardwise.cluster.catalog import DeviceSpec
from shardwise.cluster.rates import Curve, MatmulRate, OptimizerRate, Rates

__all__ = ["device_rates"]

# Share of the dense 16-bit peak that the largest products reach. Clocks fall under load the more, the more power the peak wants.
_REACH = {
    "v100": 0.76,
    "a100": 0.72,
    "h100": 0.74,
    "h200": 0.74,
    "b200": 0.72,
    "b300": 0.72,
    "gb200": 0.75,
    "gb300": 0.75,
    "tpu": 0.85,
    "tpu-v6e": 0.77,
    "mi": 0.55,
}
_OTHER_REACH = 0.75
_POWER_W = {"h100": 700.0, "h200": 700.0, "b200": 1000.0}  # at which the reach was found; a device that may take less is slower
_POWER_EXPONENT = 0.7  # clocks by power, between proportional and the cube root of a CMOS circuit's
_FP8_REACH = 0.84  # of what 16-bit products reach, for doubled peak: casts and scales
_BANDWIDTH_REACH = 0.85
_HALF_PRODUCT_S = 12e-6  # a product that takes this long at full rate runs at half of it: waves of tiles, start and end
_HALF_THIN = 48.0  # the smallest of m, n, k at which a product reaches half of its rate
_ATTENTION: dict[str, dict[str, tuple[float, float]]] = {
    "flash1": {"ampere": (0.40, 0.31), "hopper": (0.28, 0.21)},
    "flash2": {"ampere": (0.56, 0.44), "hopper": (0.35, 0.29), "blackwell": (0.17, 0.14)},
    "flash3": {"hopper": (0.62, 0.48), "blackwell": (0.55, 0.42)},
}
"""Kernel → architecture → share of the dense 16-bit peak, forward and backward; the half that a causal mask hides is not computed.
flash1: FlashAttention as a Triton program, as llm-foundry ran it. flash2: Dao 2023, figures 4 to 7: on an A100 some 180 and 140 Tflop/s,
on an H100 and, by the same instructions, a B200 340 and 280. flash3: Shah et al. 2024, figures 5 and 6, and cuDNN: 610 and 470 Tflop/s on
an H100."""
_ARCHITECTURES = {"hopper": "h", "blackwell": "b|gb|rtx5", "ampere": "a|rtx3|rtx4|l40"}
_OTHER_ATTENTION = (0.72, 0.58)  # of products' rate
_RAGGED = ((64, 0.85), (8, 0.35))
"""Of products: tiles of 64 elements are filled; 16 bytes are what tensor cores load at once (NVIDIA, Matrix Multiplication Background
User's Guide, section 3)."""
_CALL_S = 5e-6  # kernels queue up: what is left is the gap between two
_OPTIMIZER_BYTES = {
    "sgd": 12,
    "sgd_momentum": 20,
    "adam": 28,
    "adamw": 28,
}  # an element, float32: parameter, gradient, states, read and written


@cache
def device_rates(device: DeviceSpec, attention: str = "", fitted: bool = True) -> Rates:
    """All figures of one rank on the device. Collectives are not among them: they depend on where the ranks are.

    attention: which kernel computes it, of flash1, flash2, flash3; the newest for the device where none is named.
    fitted: whether products reach what published steps show, or what is usual of any device.
    """
    bandwidth = device.memory_bytes_per_s * _BANDWIDTH_REACH
    matmul = {dtype: _matmul(_reached(device, dtype, fitted)) for dtype in ("float32", "tf32", "float16", "bfloat16", "fp8")}
    base = _reached(device, "float32", fitted)
    forward, backward = (Curve.constant(base * share) for share in _attention(device, attention, fitted))
    convolution = Curve(sizes=(1.0, 64.0), values=(base / 64, base * 0.7))
    parts = [part + suffix for part in ("forward", "backward_input", "backward_weight") for suffix in ("", "_transposed")]
    return Rates(
        matmul=matmul,
        attention_flops={
            "forward": forward,
            "backward": backward,
            "forward_causal": forward.times(2),
            "backward_causal": backward.times(2),
        },
        convolution_flops=dict.fromkeys(parts, convolution),
        read_bytes_per_s=Curve.constant(bandwidth),
        write_bytes_per_s=Curve.constant(bandwidth),
        fresh_bytes_per_s=bandwidth,
        fresh_from_bytes=float("inf"),
        element_s={},
        product_ragged=_RAGGED,
        call_s=_CALL_S,
        view_s=0.0,
        collectives=(),
        optimizers={
            kind: OptimizerRate(fixed_s=0.0, element_s=Curve.constant(count / bandwidth)) for kind, count in _OPTIMIZER_BYTES.items()
        },
        overlaps_memory=True,
        fuses=True,
        copies_inner=True,
        groups=True,
    )


def _attention(device: DeviceSpec, kernel: str, fitted: bool) -> tuple[float, float]:
    """Forward and backward, of the rate of products."""
    architecture = next((name for name, words in _ARCHITECTURES.items() if re.match(rf"({words})\d", device.name)), "")
    known = [name for name, found in _ATTENTION.items() if architecture in found]
    if not known:
        return _OTHER_ATTENTION
    forward, backward = _ATTENTION[kernel if kernel in known else known[-1]][architecture]
    reach = _usual_reach(device, fitted)
    return forward / reach, backward / reach


def _family(device: DeviceSpec) -> str:
    return max((family for family in _REACH if device.name.startswith(family)), key=len, default="")


def _usual_reach(device: DeviceSpec, fitted: bool) -> float:
    return _REACH.get(_family(device), _OTHER_REACH) if fitted else _OTHER_REACH


def _reached(device: DeviceSpec, dtype: str, fitted: bool) -> float:
    """Flop/s of the largest products."""
    reach, family = _usual_reach(device, fitted), _family(device)
    if device.power_w is not None and (usual := _POWER_W.get(family)):
        reach *= min(1.0, device.power_w / usual) ** _POWER_EXPONENT
    return device.peak(dtype) * reach * (_FP8_REACH if fitted and dtype == "fp8" and "fp8" in device.peak_flops else 1.0)


def _matmul(flops: float) -> MatmulRate:
    half = flops * _HALF_PRODUCT_S
    sizes = [half * 4.0**power for power in range(-6, 8)]
    cubes = Curve(sizes=tuple(sizes), values=tuple(flops * size / (size + half) for size in sizes))
    thin = [float(2**power) for power in range(13)]
    return MatmulRate(
        cubes_flops=cubes,
        thinness=Curve(sizes=tuple(thin), values=tuple(size / (size + _HALF_THIN) for size in thin)),
        batched_flops=Curve(sizes=(2.0 * 64**3, 2.0 * 2048**3), values=(flops / 4, flops * 0.85)),
    )
