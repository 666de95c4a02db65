"""compile_kernels.py for the one-launch step of small matrices: its cases, the same records and the same script.

    python compile_tiny.py OUTPUT_FOLDER TARGET [NAME ...]

On sm_90 every tile shape; elsewhere the ends of their range. gfx942 is left out: its products have not been looked at.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import compile_kernels
import torch
from compile_kernels import COUNT, empty
from muon8bit_kernels import CODE_DTYPES, triton_tiny

JORDAN = ((3.4445, -4.7750, 2.0315),) * 5


def step(
    rows: int,
    cols: int,
    codebook: str | None = "linear",
    dtype: torch.dtype = torch.bfloat16,
    keys: list[int] | None = None,
    block_size: int = 2048,
) -> None:
    """Gradients and parameters of one dtype, the flag of the step given."""
    codes = empty(COUNT, rows, cols, dtype=torch.float32 if codebook is None else CODE_DTYPES[codebook])
    scales = None if codebook is None else [empty(COUNT, rows, -(-cols // block_size))]
    matrices, norms, skip = [empty(COUNT, rows, cols, dtype=dtype)], empty(1, COUNT).view(COUNT), empty(1, 1).view(())
    options = {"beta": 0.95, "nesterov": True, "codebook": codebook, "block_size": block_size, "steps": JORDAN}
    triton_tiny.step_tiny(
        [codes], scales, matrices, matrices, norms, **options, decay=0.9, scale=0.1, keys=keys, skip=skip
    )


SIGNS = [-5] * COUNT
EVERYWHERE: dict[str, Callable[[], None]] = {
    "tiny-wide-16": lambda: step(16, 2048),
    "tiny-tall-16": lambda: step(2048, 16),
    "tiny-tall-64": lambda: step(2048, 64),
}
ONCE: dict[str, Callable[[], None]] = {
    "tiny-wide-32": lambda: step(32, 2048),
    "tiny-tall-32": lambda: step(2048, 32),
    "tiny-wide-64": lambda: step(64, 2048),
    "tiny-wide-16-dynamic-stochastic": lambda: step(16, 2048, "dynamic", keys=SIGNS),
    "tiny-tall-64-dynamic-stochastic": lambda: step(2048, 64, "dynamic", keys=SIGNS),
    "tiny-wide-64-None-fp32": lambda: step(64, 2048, None, torch.float32),
    "tiny-wide-16-block-64": lambda: step(16, 2048, block_size=64),
}
CASES = {**EVERYWHERE, **ONCE}
TARGETS = ("sm_80", "sm_90", "sm_100")


def names_for(target: str) -> list[str]:
    """The cases to compile for a target."""
    if target not in TARGETS:
        return []
    return list(CASES if target == "sm_90" else EVERYWHERE)


if __name__ == "__main__":
    compile_kernels.CASES.update(CASES)
    compile_kernels.main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:] or names_for(sys.argv[2]))
