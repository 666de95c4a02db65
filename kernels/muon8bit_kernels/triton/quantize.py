"""Quantize and dequantize one matrix in Triton: the functions of `reference`, with its signatures and its bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codebooks import CODE_DTYPES, Codebook, dynamic_map, dynamic_midpoints
from ..reference import num_blocks
from .codes import decode, encode, load_codes, magnitude_bits, scale_of
from .tiles import GRID, check_rows_contiguous, launch, tile_rows, tiling


@triton.jit(do_not_specialize=GRID)
def _quantize_kernel(
    values,
    codes,
    scales,
    midpoints,
    values_row_stride,
    values_col_stride,
    rows,
    cols,
    num_blocks,
    num_tiles,
    over_blocks,
    over_tiles,
    CODEBOOK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _, block, row, row_mask = tile_rows(rows, num_blocks, num_tiles, over_blocks, over_tiles, ROWS)
    col = block * BLOCK + tl.arange(0, COLS)[None, :]
    mask = row_mask & (col < cols)
    tile = tl.load(values + (row * values_row_stride + col * values_col_stride), mask, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(magnitude_bits(tile), axis=1, keep_dims=True))
    tl.store(scales + (row * num_blocks + block), scale, row_mask)
    tl.store(codes + (row * cols + col), encode(tile, scale, midpoints, CODEBOOK), mask)


@triton.jit(do_not_specialize=GRID)
def _dequantize_kernel(
    codes,
    scales,
    map_values,
    values,
    rows,
    cols,
    num_blocks,
    num_tiles,
    over_blocks,
    over_tiles,
    CODEBOOK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _, block, row, row_mask = tile_rows(rows, num_blocks, num_tiles, over_blocks, over_tiles, ROWS)
    col = block * BLOCK + tl.arange(0, COLS)[None, :]
    mask = row_mask & (col < cols)
    tile = load_codes(codes + (row * cols + col), mask, CODEBOOK)
    scale = tl.load(scales + (row * num_blocks + block), row_mask, other=0.0)
    tl.store(values + (row * cols + col), decode(tile, scale, map_values, CODEBOOK), mask)


def quantize(values: Tensor, *, codebook: Codebook, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize finite `values` [rows, cols] (any float dtype and strides); bitwise `reference.quantize`.

    Returns:
        Codes [rows, cols] and fp32 scales [rows, blocks].

    Raises:
        ValueError: if `block_size` (elements) is not a power of two.
    """
    rows, cols = values.shape
    codes = torch.empty(rows, cols, dtype=CODE_DTYPES[codebook], device=values.device)
    scales = torch.empty(rows, num_blocks(cols, block_size), dtype=torch.float32, device=values.device)
    midpoints = dynamic_midpoints(values.device) if codebook == "dynamic" else None
    tiles = tiling((rows, cols), block_size)
    launch(_quantize_kernel, values, 1, tiles, values, codes, scales, midpoints, *values.stride(), CODEBOOK=codebook)
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor, *, codebook: Codebook, block_size: int) -> Tensor:
    """Decode contiguous codes [rows, cols] and fp32 scales [rows, blocks] to fp32; bitwise `reference.dequantize`.

    Raises:
        ValueError: if codes or scales are not contiguous, or `block_size` (elements) is not a power of two.
    """
    rows, cols = codes.shape
    check_rows_contiguous("codes", [codes.unsqueeze(0)], codes.shape)
    check_rows_contiguous("scales", [scales.unsqueeze(0)], (rows, num_blocks(cols, block_size)))
    values = torch.empty(rows, cols, dtype=torch.float32, device=codes.device)
    map_values = dynamic_map(codes.device) if codebook == "dynamic" else None
    tiles = tiling((rows, cols), block_size)
    launch(_dequantize_kernel, codes, 1, tiles, codes, scales, map_values, values, CODEBOOK=codebook)
    return values
