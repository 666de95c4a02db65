"""Measured speeds of matrix products by device, from which the method is chosen.

A benchmark installs its own by assignment, before the first step: `RATES["cuda_sm90"] = Rates(...)`. The keys are those
of `device_kind`. A kind without a row falls back to that of its device type, then to "other". Methods depend on this
table and on shapes alone, so a resumed run needs the same table.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import torch

from .products import ProductKind

# (smallest number of rows, value) in rising order; rows = min(rows, cols). No value applies below the first.
BySize: TypeAlias = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Rates:
    """Speeds relative to the vendor's fp32 product of the same size on the same device.

    Attributes:
        bf16, fp16: the speed of the vendor's products in that dtype.
        symmetric_kind: how symmetric products save work here, `"panels"`, `"kernel"`, or None.
        symmetric: the speed-up of a symmetric product by `symmetric_kind` over the vendor's, 2 at best, where enough
            matrices go together; used where known.
        triangle: the speed of the kernel's loop over a tile relative to the vendor's, by which the gain that waves of
            tiles allow is multiplied (`cost.triangle_gain`); the gain is never over `symmetric`. None leaves waves out.
        min_gain: the least gain by which the symmetric product is taken. Over 1 it is a margin for what nobody
            measured.
        gram: the efficiency of the Gram form's small products relative to the standard form's, None without the Gram
            form. Under 1 it is a margin for what nobody measured, as torch.optim.Muon runs the standard form.
        launch: the time of one product that is too small to fill the device, its launch and torch's work for it
            included, in operations of the vendor's fp32 product.
        tiny: the speed of one program of the one-launch kernel relative to the vendor's fp32 product on the whole
            device; None without that kernel.
        architecture: the key of the kernels' tilings and numbers of multiprocessors; None for any other GPU.
    """

    bf16: BySize
    fp16: BySize
    symmetric_kind: ProductKind | None = None
    symmetric: BySize = ()
    triangle: float | None = None
    min_gain: float = 1.0
    gram: float | None = 1.0
    launch: float = 0.0
    tiny: float | None = None
    architecture: int | None = None


# CPU: oneDNN's kernels by instruction set. Measured on AVX512_BF16: bf16 1.8 to 2.1; below 256 rows products are not
# limited by the matrix rate, and bf16 gains nothing. fp16 runs in fp32 and only pays its casts.
# Panels: below 1024 rows their copies cost more than they save (measured at 256 to 2048 rows); from there on
# whole iterations gain 1.17 to 1.27 in bf16 and 1.23 to 1.28 in fp32 (two threads, 1024 and 2048 rows).
_PANELS: BySize = ((1024, 1.2),)
# CUDA, not measured on a GPU yet. Tensor cores are 8 to 16 times as fast as fp32 by their data sheets, which leaves
# fp32 to whoever asks for it. A launch: 8 us at 50 TFLOP/s of fp32. One-launch kernel: [64, 16384], 2.8e8 operations,
# in 3 ms on one multiprocessor, by counted instructions.
_LAUNCH, _TINY = 4e8, 0.0018
_HALF: BySize = ((0, 8.0),)
# sm_90, not measured on a GPU yet: the lower ends of what the counted instructions and waves let expect over cuBLAS,
# 1.2 to 1.35 at 2048 rows, 1.3 to 1.45 at 3072, 1.35 to 1.5 from 4096 on. 0.9 is 1.35 over the 1.5 that waves allow
# one matrix of 4096 rows.
_TRIANGLE: BySize = ((2048, 1.2), (3072, 1.3), (4096, 1.35))
RATES: dict[str, Rates] = {
    "cpu": Rates(bf16=((0, 0.4),), fp16=((0, 0.3),), symmetric_kind="panels", symmetric=_PANELS),
    "cpu_avx512_bf16": Rates(
        bf16=((0, 0.5), (256, 1.85)), fp16=((0, 0.3),), symmetric_kind="panels", symmetric=_PANELS
    ),
    "cpu_amx": Rates(bf16=((0, 0.5), (256, 8.0)), fp16=((0, 0.3),), symmetric_kind="panels", symmetric=_PANELS),
    "cuda": Rates(bf16=_HALF, fp16=_HALF, symmetric_kind="kernel", gram=0.9, launch=_LAUNCH, tiny=_TINY),
    "cuda_sm90": Rates(
        bf16=_HALF,
        fp16=_HALF,
        symmetric_kind="kernel",
        symmetric=_TRIANGLE,
        triangle=0.9,
        min_gain=1.15,
        gram=0.9,
        launch=_LAUNCH,
        tiny=_TINY,
        architecture=90,
    ),
    "other": Rates(bf16=((0, 1.0),), fp16=((0, 0.9),), gram=None),
}


def at_size(values: BySize, rows: int) -> float | None:
    """Return the value that applies to this many rows, None below the first size."""
    found = None
    for smallest, value in values:
        if rows >= smallest:
            found = value
    return found


@cache
def device_kind(device: torch.device) -> str:
    """Return a key for `RATES`, as `"cpu"`, `"cpu_avx512_bf16"`, `"cpu_amx"`, `"cuda_sm90"` or `"rocm"`.

    Devices other than the CPU and CUDA's give their type.
    """
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "rocm"
        major, minor = torch.cuda.get_device_capability(device)
        return f"cuda_sm{major}{minor}"
    if device.type != "cpu":
        return device.type
    # oneDNN's own switch: what it may not use is not there.
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if torch.cpu._is_amx_tile_supported() and (not limit or "AMX" in limit):
        return "cpu_amx"
    if torch.cpu._is_avx512_bf16_supported() and (not limit or "BF16" in limit or "AMX" in limit):
        return "cpu_avx512_bf16"
    return "cpu"
