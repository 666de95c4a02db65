"""Which form and dtype a shape takes, and how many matrices go together: by shape and device alone.

Free memory or a timing never decides, so a resumed run takes the same path and is bitwise the same run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Literal

import torch

from .coefficients import Schedule

# Matrices with fewer rows than this gain on CPU from batching; above, one fills the cores.
_CPU_BATCH_ROWS = 128
# Below this, CPU products are not limited by the matrix rate: bf16 gains nothing and fp32 is far more accurate.
_CPU_BF16_ROWS = 256


@dataclass(frozen=True)
class Path:
    """The form of the iteration, its dtype, and its cost in fp32 multiply-adds (2 each) at the device's rates."""

    form: Literal["standard", "gram"]
    dtype: torch.dtype
    cost: float


def flops(form: Literal["standard", "gram"], rows: int, cols: int, num_steps: int) -> int:
    """Floating-point operations of the orthogonalization of one matrix, multiply-add = 2."""
    m, n = min(rows, cols), max(rows, cols)
    if form == "standard":
        return num_steps * (4 * m * m * n + 2 * m**3)
    return 4 * m * m * n + 2 * m**3 * (num_steps + (num_steps - 1) + 2 * (num_steps - 1))


@cache
def _bf16_rate(device_type: str) -> float:
    """bf16 over fp32 matrix rate. CPU: oneDNN's kernels by instruction set (measured on AVX512_BF16: 1.9 to 2.1)."""
    if device_type == "cuda":
        return 8.0
    if device_type != "cpu":
        return 1.0
    isa_limit = os.environ.get(
        "ONEDNN_MAX_CPU_ISA", ""
    ).upper()  # oneDNN's own switch: what it may not use is not there
    if torch.cpu._is_amx_tile_supported() and (not isa_limit or "AMX" in isa_limit):
        return 8.0
    if torch.cpu._is_avx512_bf16_supported() and (not isa_limit or "BF16" in isa_limit or "AMX" in isa_limit):
        return 1.95
    return 0.4


def _gram_is_stable(schedule: Schedule) -> bool:
    """Whether fp32 can carry the Gram form through the schedule.

    Rounding gives R eigenvalues near -2^-24 where X is rank-deficient, and a step multiplies them by a^2. Bound from
    runs on ranks 1 and 4: five of Jordan's steps reach .014 (error 1e-3), six .17 (error .015), ten diverge.
    """
    return prod(a for a, _, _ in schedule.steps) ** 2 * 2.0**-24 < 0.1


@cache
def choose(rows: int, cols: int, schedule: Schedule, device_type: str, dtype: torch.dtype | None = None) -> Path:
    """The cheapest path for one matrix [rows, cols].

    Args:
        dtype: restrict to float32 or bfloat16; None leaves both open. The Gram form needs true fp32, which a CPU
            gives, and a schedule that does not amplify rounding too much.
    """
    num_steps, rate = len(schedule.steps), _bf16_rate(device_type)
    if device_type == "cpu" and min(rows, cols) < _CPU_BF16_ROWS:
        rate = min(rate, 0.5)
    paths = [
        Path("standard", torch.bfloat16, flops("standard", rows, cols, num_steps) / rate),
        Path("standard", torch.float32, flops("standard", rows, cols, num_steps)),
    ]
    if device_type == "cpu" and _gram_is_stable(schedule):
        paths.append(Path("gram", torch.float32, flops("gram", rows, cols, num_steps)))
    return min((p for p in paths if dtype in (None, p.dtype)), key=lambda p: p.cost)


def batch_size(rows: int, cols: int, dtype: torch.dtype, device_type: str, budget_bytes: int) -> int:
    """How many matrices [rows, cols] to orthogonalize together: their iterates fit into `budget_bytes`."""
    m, n = min(rows, cols), max(rows, cols)
    if device_type == "cpu" and m >= _CPU_BATCH_ROWS:
        return 1
    live_bytes = dtype.itemsize * (2 * m * n + 3 * m * m)  # X, its successor, and three small products
    return max(1, budget_bytes // max(1, live_bytes))
