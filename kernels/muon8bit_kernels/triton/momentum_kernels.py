"""Kernels of the two-phase momentum step, which `triton.momentum` launches.

One program works on a tile, whole blocks of one matrix, so that the new scales need nothing from other programs. Where
a tensor lies column by column the tile is too tall for registers: it is worked on in pieces, and the second pass over
them reads again what has just been read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import decode, encode, inverse_of, load_codes, magnitude_bits, scale_of
from .tiles import address, tile_rows


@triton.jit
def momentum(
    codes,
    scale,
    map_values,
    grad,
    mask,
    beta,
    one_minus_beta,
    NESTEROV: tl.constexpr,
    CODEBOOK: tl.constexpr,
):
    """Return the new momentum m and the Newton-Schulz input u of a piece, fp32 [ROWS, COLS]; 0 outside of `mask`.

    `codes` and `grad` are pointers.
    """
    old = decode(load_codes(codes, mask, CODEBOOK), scale, map_values, CODEBOOK)
    beta = tl.cast(beta, tl.float32)  # torch.compile passes scalars as fp64
    scaled_grad = tl.load(grad, mask, other=0.0).to(tl.float32) * tl.cast(one_minus_beta, tl.float32)
    m = old * beta + scaled_grad
    u = m * beta + scaled_grad if NESTEROV else m
    return m, u


@triton.jit
def stats_kernel(
    table,
    sumsq,
    map_values,
    beta,
    one_minus_beta,
    grad_row_stride,
    grad_col_stride,
    rows,
    cols,
    CODE: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    NESTEROV: tl.constexpr,
    CODEBOOK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the sum of u squared of each row's block."""
    matrix, block, row, row_mask = tile_rows(rows, cols, ROWS, BLOCK)
    codes = address(table, matrix, 0, 3, CODE, ALIGNED) + row * cols
    scales = address(table, matrix, 1, 3, tl.float32, False)
    grad = address(table, matrix, 2, 3, GRAD, ALIGNED) + row * grad_row_stride
    num_blocks = tl.cdiv(cols, BLOCK)
    scale = 0.0 if CODEBOOK is None else tl.load(scales + (row * num_blocks + block), row_mask, other=0.0)
    first = block * BLOCK
    total = tl.zeros([ROWS, 1], tl.float32)
    for start in range(0, BLOCK if COLS == BLOCK else tl.minimum(BLOCK, cols - first), COLS):
        col = first + start + tl.arange(0, COLS)[None, :]
        _, u = momentum(
            codes + col,
            scale,
            map_values,
            grad + col * grad_col_stride,
            row_mask & (col < cols),
            beta,
            one_minus_beta,
            NESTEROV,
            CODEBOOK,
        )
        total += tl.sum(u * u, axis=1, keep_dims=True)
    tl.store(sumsq + ((matrix * rows + row) * num_blocks + block), total, row_mask)


@triton.jit
def apply_kernel(
    table,
    norms,
    out,
    skip,
    map_values,
    midpoints,
    beta,
    one_minus_beta,
    grad_row_stride,
    grad_col_stride,
    out_stride,
    out_row_stride,
    out_col_stride,
    rows,
    cols,
    CODE: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    NESTEROV: tl.constexpr,
    CODEBOOK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the new codes and scales, and u * (1 / norm) to `out`."""
    matrix, block, row, row_mask = tile_rows(rows, cols, ROWS, BLOCK)
    codes = address(table, matrix, 0, 3, CODE, ALIGNED) + row * cols
    scales = address(table, matrix, 1, 3, tl.float32, False) + (row * tl.cdiv(cols, BLOCK) + block)
    grad = address(table, matrix, 2, 3, GRAD, ALIGNED) + row * grad_row_stride
    out += matrix * out_stride + row * out_row_stride
    scale = 0.0 if CODEBOOK is None else tl.load(scales, row_mask, other=0.0)
    inverse = inverse_of(tl.load(norms + matrix))
    # Only the stores depend on the flag: the loads need not wait for its value.
    writes = row_mask if skip is None else row < tl.where(tl.load(skip) == 0.0, rows, 0)
    first = block * BLOCK
    end = BLOCK if COLS == BLOCK else tl.minimum(BLOCK, cols - first)
    new_scale = scale
    if CODEBOOK is not None and COLS < BLOCK:
        largest = tl.zeros([ROWS, 1], tl.int32)
        for start in range(0, end, COLS):
            col = first + start + tl.arange(0, COLS)[None, :]
            m, _ = momentum(
                codes + col,
                scale,
                map_values,
                grad + col * grad_col_stride,
                row_mask & (col < cols),
                beta,
                one_minus_beta,
                NESTEROV,
                CODEBOOK,
            )
            largest = tl.maximum(largest, tl.max(magnitude_bits(m), axis=1, keep_dims=True))
        new_scale = scale_of(largest)
    for start in range(0, end, COLS):
        col = first + start + tl.arange(0, COLS)[None, :]
        m, u = momentum(
            codes + col,
            scale,
            map_values,
            grad + col * grad_col_stride,
            row_mask & (col < cols),
            beta,
            one_minus_beta,
            NESTEROV,
            CODEBOOK,
        )
        if CODEBOOK is not None and COLS == BLOCK:
            new_scale = scale_of(tl.max(magnitude_bits(m), axis=1, keep_dims=True))
        new = m if CODEBOOK is None else encode(m, new_scale, midpoints, CODEBOOK)
        # Every warp has its own copy of the scale, and a small tile's codes are held more than once: without the
        # barrier a fast warp would overwrite what a slow one has yet to load.
        tl.debug_barrier()
        mask = writes & (col < cols)
        tl.store(codes + col, new, mask)
        tl.store(out + col * out_col_stride, u * inverse, mask)
    if CODEBOOK is not None:
        tl.store(scales, new_scale, writes)
