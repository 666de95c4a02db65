"""Tiles of a matrix and how kernels are launched over them; shared by the Triton kernels.

A tile is one block of columns of each of ROWS consecutive rows. Nothing is tuned at run time: the same shapes take the
same path and give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import num_blocks

# 128 threads with 16 one-byte codes each: one 16-byte load a thread.
_TILE_ELEMENTS = 2048
_ELEMENTS_PER_WARP = 512


@triton.jit
def _tile(rows, cols, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [ROWS, 1] and columns [1, BLOCK] of this program's tile and which elements exist; then the indices [ROWS] of
    its blocks and which of those exist."""
    num_blocks = tl.cast((cols - 1) // BLOCK + 1, tl.int32)  # fits, as the grid does; dividing 64 bits is slow
    program = tl.program_id(0)
    block = (program % num_blocks).to(tl.int64)
    row = (program // num_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = block * BLOCK + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    return row[:, None], col[None, :], mask, row * num_blocks + block, row < rows


def _tiling(rows: int, cols: int, block_size: int) -> tuple[int, int, int]:
    """ROWS and BLOCK of a tile, and its warps: from the shape alone."""
    if block_size < 1 or block_size & (block_size - 1):
        raise ValueError(f"block_size must be a power of two for the Triton backend, not {block_size}")
    block = min(block_size, triton.next_power_of_2(cols))
    tile_rows = min(triton.next_power_of_2(rows), max(1, _TILE_ELEMENTS // block))
    return tile_rows, block, min(max(1, tile_rows * block // _ELEMENTS_PER_WARP), 8)


def _launch(kernel: Any, matrix: Tensor, block_size: int, *args: Tensor | float | None, **constants: Any) -> None:
    """Run `kernel(*args, rows, cols)` over the tiles of `matrix`, on its device."""
    rows, cols = matrix.shape
    if matrix.numel() == 0:
        return
    tile_rows, block, num_warps = _tiling(rows, cols, block_size)
    grid = (triton.cdiv(rows, tile_rows) * num_blocks(cols, block),)
    constants |= {"ROWS": tile_rows, "BLOCK": block, "num_warps": num_warps, "enable_fp_fusion": False}
    with torch.cuda.device_of(matrix):  # Triton launches on the current device, wherever its arguments are
        kernel[grid](*args, rows=rows, cols=cols, **constants)
