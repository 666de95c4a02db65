"""Sums over orthogonalized directions in Triton; `reference.second_moment` but for the order of addition."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..element_moment import ElementMoment
from .codes import widened
from .tiles import (
    GRID,
    addresses,
    common_strides,
    divided,
    launch,
    lies_across,
    table_of,
    tile_rows,
    tiling,
    tl_dtype,
)

_TILE_COLUMNS = 256
_PIECE_COLUMNS = 64  # where directions lie column by column


@triton.jit(do_not_specialize=GRID)
def _squares_kernel(
    directions,
    sums,
    stride,
    row_stride,
    col_stride,
    rows,
    cols,
    num_blocks,
    num_tiles,
    over_blocks,
    over_tiles,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the sums of squares of each row's block, or of each column's tile of rows."""
    matrix, block, row, row_mask = tile_rows(rows, num_blocks, num_tiles, over_blocks, over_tiles, ROWS)
    col = block * BLOCK + tl.arange(0, COLS)[None, :]
    mask = row_mask & (col < cols)
    values = widened(tl.load(directions + matrix * stride + row * row_stride + col * col_stride, mask, other=0.0))
    if COLUMNS:
        tile = divided(tl.program_id(0), over_blocks).to(tl.int64)  # of all matrices
        tl.store(sums + (tile * cols + col), tl.sum(values * values, axis=0, keep_dims=True), col < cols)
    else:
        total = tl.sum(values * values, axis=1, keep_dims=True)
        tl.store(sums + ((matrix * rows + row) * num_blocks + block), total, row_mask)


@triton.jit
def averaged(codes, step, direction, mask, beta2, one_minus_beta2, eps, QUANTIZED: tl.constexpr, CLAMPED: tl.constexpr):
    """Return the new second moment of directions [ROWS, COLS], and these over its root, fp32; `codes` are pointers."""
    if QUANTIZED:
        root = tl.load(codes, mask, other=0).to(tl.float32) * step
        old = root * root
    else:
        old = tl.load(codes, mask, other=0.0)
    weight = tl.cast(one_minus_beta2, tl.float32)  # torch.compile passes scalars as fp64
    moment = old * tl.cast(beta2, tl.float32) + direction * direction * weight
    bound = tl.cast(eps, tl.float32)
    divisor = tl.sqrt_rn(tl.maximum(moment, bound)) if CLAMPED else tl.sqrt_rn(moment) + bound
    return moment, tl.div_rn(direction, tl.where(divisor == 0.0, float("inf"), divisor))


@triton.jit(do_not_specialize=GRID)
def _stats_kernel(
    table,
    directions,
    steps,
    found,
    found_stride,
    beta2,
    one_minus_beta2,
    eps,
    stride,
    row_stride,
    col_stride,
    code_row_stride,
    rows,
    cols,
    num_blocks,
    num_tiles,
    over_blocks,
    over_tiles,
    CODE: tl.constexpr,
    QUANTIZED: tl.constexpr,
    CLAMPED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store of each row's block the sums of squares of O' and of O, and the largest second moment."""
    matrix, block, row, row_mask = tile_rows(rows, num_blocks, num_tiles, over_blocks, over_tiles, ROWS)
    codes = tl.load(table + matrix).to(tl.pointer_type(CODE)) + row * code_row_stride
    directions += matrix * stride + row * row_stride
    place = (matrix * rows + row) * num_blocks + block
    step = tl.load(steps + place, row_mask, other=0.0) if QUANTIZED else 0.0
    first = block * BLOCK
    squares, plain = tl.zeros([ROWS, 1], tl.float32), tl.zeros([ROWS, 1], tl.float32)
    largest = tl.zeros([ROWS, 1], tl.float32)
    for start in range(0, BLOCK if COLS == BLOCK else tl.minimum(BLOCK, cols - first), COLS):
        col = first + start + tl.arange(0, COLS)[None, :]
        mask = row_mask & (col < cols)
        direction = widened(tl.load(directions + col * col_stride, mask, other=0.0))
        moment, normal = averaged(codes + col, step, direction, mask, beta2, one_minus_beta2, eps, QUANTIZED, CLAMPED)
        squares += tl.sum(normal * normal, axis=1, keep_dims=True)
        plain += tl.sum(direction * direction, axis=1, keep_dims=True)
        largest = tl.maximum(largest, tl.max(moment, axis=1, keep_dims=True))
    tl.store(found + place, squares, row_mask)
    tl.store(found + found_stride + place, plain, row_mask)
    tl.store(found + 2 * found_stride + place, tl.sqrt_rn(largest), row_mask)


def direction_squares(directions: Tensor, *, columns: bool) -> Tensor:
    """Return the sums of squares of each row, fp32 [batch, rows], or with `columns` of each column, [batch, cols].

    Args:
        directions: [batch, rows, cols], fp32, bf16 or fp16, any strides.
        columns: add over the rows.
    """
    batch, rows, cols = directions.shape
    strides = common_strides("directions", [directions], directions.shape[1:])
    tiles = tiling((rows, cols), _PIECE_COLUMNS if lies_across(strides) else _TILE_COLUMNS)
    parts = (-(-rows // tiles.ROWS), cols) if columns else (rows, -(-cols // tiles.BLOCK))
    sums = torch.empty(batch, *parts, dtype=torch.float32, device=directions.device)
    launch(_squares_kernel, directions, batch, tiles, directions, sums, directions.stride(0), *strides, COLUMNS=columns)
    return sums.sum(1 if columns else 2)


def moment_constants(moment: ElementMoment) -> dict[str, Any]:
    """Return the constants by which kernels take a second moment."""
    return {
        "CODE": tl_dtype(moment.codes[0]),
        "QUANTIZED": moment.steps is not None,
        "CLAMPED": moment.is_clamped,
    }


def code_stride(moment: ElementMoment) -> int:
    """Return the row stride of the codes, in elements.

    Raises:
        ValueError: if the elements of a row do not lie side by side.
    """
    row_stride, col_stride = common_strides("codes", moment.codes, moment.codes[0].shape[1:])
    if col_stride != 1:
        raise ValueError(f"codes of a second moment must have contiguous rows, not {moment.codes[0].stride()}")
    return row_stride


def second_moment_stats(directions: Tensor, moment: ElementMoment) -> Tensor:
    """Return what must be known of whole matrices before their second moments are written; nothing is.

    Args:
        directions: O, [batch, rows, cols], fp32, bf16 or fp16, any strides.
        moment: of whole rows, which lie row by row.

    Returns:
        fp32 [3, batch, rows, blocks]: of each block the sum of O'^2, the sum of O^2, and the largest sqrt(V).
    """
    batch, rows, cols = directions.shape
    strides = common_strides("directions", [directions], directions.shape[1:])
    shape = 3, batch, rows, -(-cols // moment.block_size)
    found = torch.empty(shape, dtype=torch.float32, device=directions.device)
    table = table_of([[place] for place in addresses(moment.codes)], directions.device)
    launch(
        _stats_kernel,
        directions,
        batch,
        tiling((rows, cols), moment.block_size, across=lies_across(strides)),
        table,
        directions,
        moment.steps,
        found,
        found.stride(0),
        float(moment.beta2),
        1.0 - moment.beta2,
        float(moment.eps),
        directions.stride(0),
        *strides,
        code_stride(moment),
        **moment_constants(moment),
    )
    return found
