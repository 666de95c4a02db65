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
        symmetric: the speed-up of a symmetric product by `symmetric_kind` over the vendor's, 2 at best; used where
            known.
        gram: the efficiency of the Gram form's small products relative to the standard form's, None without the Gram
            form. Under 1 it is a margin for what nobody measured, as torch.optim.Muon runs the standard form.
    """

    bf16: BySize
    fp16: BySize
    symmetric_kind: ProductKind | None = None
    symmetric: BySize = ()
    gram: float | None = 1.0


# CPU: oneDNN's kernels by instruction set. Measured on AVX512_BF16: bf16 1.8 to 2.1; below 256 rows products are not
# limited by the matrix rate, and bf16 gains nothing. fp16 runs in fp32 and only pays its casts.
# Panels: below 1024 rows their copies cost more than they save (measured at 256 to 2048 rows); from there on
# whole iterations gain 1.17 to 1.27 in bf16 and 1.23 to 1.28 in fp32 (two threads, 1024 and 2048 rows).
_PANELS: BySize = ((1024, 1.2),)
# No GPU has been measured: tensor cores are 8 to 16 times as fast as fp32 by their data sheets, which leaves fp32 to
# whoever asks for it, and the symmetric kernel waits for a row with its gain.
RATES: dict[str, Rates] = {
    "cpu": Rates(bf16=((0, 0.4),), fp16=((0, 0.3),), symmetric_kind="panels", symmetric=_PANELS),
    "cpu_avx512_bf16": Rates(
        bf16=((0, 0.5), (256, 1.85)), fp16=((0, 0.3),), symmetric_kind="panels", symmetric=_PANELS
    ),
    "cpu_amx": Rates(bf16=((0, 0.5), (256, 8.0)), fp16=((0, 0.3),), symmetric_kind="panels", symmetric=_PANELS),
    "cuda": Rates(bf16=((0, 8.0),), fp16=((0, 8.0),), symmetric_kind="kernel", gram=0.9),
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
