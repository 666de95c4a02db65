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
    address,
    addresses,
    common_strides,
    divided,
    in_row,
    launch,
    lies_across,
    tables_of,
    tile_rows,
    tiling,
    tl_dtype,
    whole_eighths,
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
def averaged(codes, step, direction, mask, beta2, one_minus_beta2, QUANTIZED: tl.constexpr):
    """Return the new second moment of fp32 directions [ROWS, COLS]; `codes` are pointers to the old one."""
    if QUANTIZED:
        root = tl.load(codes, mask, other=0).to(tl.float32) * step
        old = root * root
    else:
        old = tl.load(codes, mask, other=0.0)
    weight = tl.cast(one_minus_beta2, tl.float32)  # torch.compile passes scalars as fp64
    return old * tl.cast(beta2, tl.float32) + direction * direction * weight


@triton.jit
def over_root(direction, root, eps, CLAMPED: tl.constexpr, EXACT: tl.constexpr):
    """Return directions over the roots of their second moments; 0 where these and eps are 0.

    The root of the larger of V and eps is the larger of their roots: one root an element will do. With EXACT the
    quotient is correctly rounded.
    """
    bound = tl.cast(eps, tl.float32)
    divisor = tl.maximum(root, tl.sqrt_rn(bound)) if CLAMPED else root + bound
    divisor = tl.where(divisor == 0.0, float("inf"), divisor)
    return tl.div_rn(direction, divisor) if EXACT else direction / divisor


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
    ALIGNMENT: tl.constexpr,
    EIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store of each row's block the sums of squares of O' and of O, and the largest root of a second moment."""
    if EIGHTS:
        cols = cols // 8 * 8
    listed, block, row, row_mask = tile_rows(rows, num_blocks, num_tiles, over_blocks, over_tiles, ROWS)
    codes = address(table, listed, 0, 2, CODE, ALIGNMENT) + in_row(row, code_row_stride, EIGHTS)
    matrix = tl.load(table + (listed * 2 + 1))
    directions += in_row(matrix, stride, EIGHTS) + in_row(row, row_stride, EIGHTS)
    place = (matrix * rows + row) * num_blocks + block
    step = tl.load(steps + place, row_mask, other=0.0) if QUANTIZED else 0.0
    first = block * BLOCK
    squares, plain = tl.zeros([ROWS, 1], tl.float32), tl.zeros([ROWS, 1], tl.float32)
    largest = tl.zeros([ROWS, 1], tl.float32)
    for start in range(0, BLOCK if COLS == BLOCK else tl.minimum(BLOCK, cols - first), COLS):
        col = first + start + tl.arange(0, COLS)[None, :]
        mask = row_mask & (col < cols)
        direction = widened(tl.load(directions + col * col_stride, mask, other=0.0))
        moment = averaged(codes + col, step, direction, mask, beta2, one_minus_beta2, QUANTIZED)
        # Only added up: exact roots and quotients take twice the instructions. A subnormal V may count as 0.
        normal = over_root(direction, tl.sqrt(moment), eps, CLAMPED, EXACT=False)
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


def _moment_constants(moment: ElementMoment) -> dict[str, Any]:
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


def factor_arguments(factors: Tensor | None) -> dict[str, Any]:
    """Return what the update kernel takes for factors of directions."""
    if factors is None:
        return {"factors": None, "factor_stride": 0, "FACTORS": None}
    factors = factors.contiguous()
    kind = "row" if factors.shape[1] > 1 else "column" if factors.shape[2] > 1 else "matrix"
    return {"factors": factors, "factor_stride": factors.stride(0), "FACTORS": kind}


def moment_arguments(moment: ElementMoment | None, inverses: Tensor | None) -> dict[str, Any]:
    """Return what the update kernel takes for second moments of elements."""
    if moment is None:
        names = "beta2", "one_minus_beta2", "eps", "code_row_stride", "first_col", "moment_blocks"
        constants: dict[str, Any] = {"CODE": None, "QUANTIZED": False, "CLAMPED": False, "MOMENT_BLOCK": 1}
        return {"steps": None, "inverses": None, **dict.fromkeys(names, 0), **constants}
    return {
        "steps": moment.steps,
        "inverses": inverses,
        "beta2": float(moment.beta2),
        "one_minus_beta2": 1.0 - moment.beta2,
        "eps": float(moment.eps),
        "code_row_stride": code_stride(moment),
        "first_col": moment.first_col,
        "moment_blocks": 0 if moment.steps is None else moment.steps.shape[2],
        "MOMENT_BLOCK": moment.block_size,
        **_moment_constants(moment),
    }


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
    across, row_stride = lies_across(strides), code_stride(moment)
    eights = not across and whole_eighths(cols, strides[0], directions.stride(0), row_stride)
    alignments = {0: 16} if across or cols % 8 == 0 else {}
    for table, aligned in tables_of([addresses(moment.codes)], alignments, directions.device):
        launch(
            _stats_kernel,
            directions,
            len(table),
            tiling((rows, cols), moment.block_size, across=across),
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
            row_stride,
            **_moment_constants(moment),
            ALIGNMENT=16 if aligned else 1,
            EIGHTS=eights,
        )
    return found
