"""Kernels of the two-phase momentum step, which `triton.momentum` launches.

One program works on a tile, whole blocks of one matrix, so that the new scales need nothing from other programs. Where
a tensor lies column by column the tile is too tall for registers: it is worked on in pieces, and the second pass over
them reads again what has just been read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import decode, encode, inverse_of, load_codes, magnitude_bits, scale_of
from .tiles import GRID, address, flag_of, in_row, tile_rows


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
    ALONG: tl.constexpr = True,
):
    """Return the new momentum m and the Newton-Schulz input u of a piece, fp32 [ROWS, COLS]; 0 outside of `mask`.

    `codes` and `grad` are pointers.
    """
    old = decode(load_codes(codes, mask, CODEBOOK), scale, map_values, CODEBOOK, ALONG)
    beta = tl.cast(beta, tl.float32)  # torch.compile passes scalars as fp64
    scaled_grad = tl.load(grad, mask, other=0.0).to(tl.float32) * tl.cast(one_minus_beta, tl.float32)
    m = old * beta + scaled_grad
    u = m * beta + scaled_grad if NESTEROV else m
    return m, u


@triton.jit
def ns_input(u, inverse, SIGNS: tl.constexpr):
    """Return what Newton-Schulz gets of u [ROWS, COLS], fp32: u * inverse, or the signs."""
    return (u > 0.0).to(tl.float32) - (u < 0.0).to(tl.float32) if SIGNS else u * inverse


@triton.jit(do_not_specialize=GRID)
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
    num_blocks,
    num_tiles,
    over_blocks,
    over_tiles,
    CODE: tl.constexpr,
    GRAD: tl.constexpr,
    CODE_ALIGNMENT: tl.constexpr,
    GRAD_ALIGNMENT: tl.constexpr,
    EIGHTS: tl.constexpr,
    NESTEROV: tl.constexpr,
    CODEBOOK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the sum of u squared of each row's block."""
    if EIGHTS:
        cols = cols // 8 * 8
    place, block, row, row_mask = tile_rows(rows, num_blocks, num_tiles, over_blocks, over_tiles, ROWS)
    codes = address(table, place, 0, 4, CODE, CODE_ALIGNMENT) + in_row(row, cols, EIGHTS)
    scales = address(table, place, 1, 4, tl.float32, 1)
    grad = address(table, place, 2, 4, GRAD, GRAD_ALIGNMENT) + in_row(row, grad_row_stride, EIGHTS)
    matrix = tl.load(table + (place * 4 + 3))
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
            COLS == BLOCK,
        )
        total += tl.sum(u * u, axis=1, keep_dims=True)
    tl.store(sumsq + ((matrix * rows + row) * num_blocks + block), total, row_mask)


@triton.jit(do_not_specialize=GRID)
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
    num_blocks,
    num_tiles,
    over_blocks,
    over_tiles,
    CODE: tl.constexpr,
    GRAD: tl.constexpr,
    CODE_ALIGNMENT: tl.constexpr,
    GRAD_ALIGNMENT: tl.constexpr,
    EIGHTS: tl.constexpr,
    NESTEROV: tl.constexpr,
    SIGNS: tl.constexpr,
    CODEBOOK: tl.constexpr,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the new codes and scales, and u * (1 / norm), or the sign of u, to `out` unless it and `norms` are None."""
    if EIGHTS:
        cols = cols // 8 * 8
    place, block, row, row_mask = tile_rows(rows, num_blocks, num_tiles, over_blocks, over_tiles, ROWS)
    codes = address(table, place, 0, 4, CODE, CODE_ALIGNMENT) + in_row(row, cols, EIGHTS)
    scales = address(table, place, 1, 4, tl.float32, 1) + (row * num_blocks + block)
    grad = address(table, place, 2, 4, GRAD, GRAD_ALIGNMENT) + in_row(row, grad_row_stride, EIGHTS)
    matrix = tl.load(table + (place * 4 + 3))
    out = None if out is None else out + (matrix * out_stride + in_row(row, out_row_stride, EIGHTS))
    scale = 0.0 if CODEBOOK is None else tl.load(scales, row_mask, other=0.0)
    inverse = 0.0 if out is None else inverse_of(tl.load(norms + matrix))
    # Only the stores depend on the flag: the loads need not wait for its value.
    writes = row_mask if skip is None else row < tl.where(flag_of(skip, matrix, EACH) == 0.0, rows, 0)
    first, new_scale = block * BLOCK, scale
    end = BLOCK if COLS == BLOCK else tl.minimum(BLOCK, cols - first)
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
                COLS == BLOCK,
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
            COLS == BLOCK,
        )
        mask = writes & (col < cols)
        if out is not None:
            tl.store(out + col * out_col_stride, ns_input(u, inverse, SIGNS), mask)  # so that u leaves its registers
        if CODEBOOK is not None and COLS == BLOCK:
            new_scale = scale_of(tl.max(magnitude_bits(m), axis=1, keep_dims=True))
        # Every warp has its own copy of the scale, and a small tile's codes are held more than once: without the
        # barrier a fast warp would overwrite what a slow one has yet to load.
        tl.debug_barrier()
        if CODEBOOK is not None and COLS == BLOCK:
            tl.store(scales, new_scale, writes)  # now, so that the addresses leave their registers, too
        new = m if CODEBOOK is None else encode(m, new_scale, midpoints, CODEBOOK, COLS == BLOCK)
        tl.store(codes + col, new, mask)
    if CODEBOOK is not None and COLS < BLOCK:
        tl.store(scales, new_scale, writes)
