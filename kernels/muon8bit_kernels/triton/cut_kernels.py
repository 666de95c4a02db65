"""Kernels of the momentum step of matrices of which there are only some columns here, which `triton.cut` launches.

One program works on what is here of one block of some rows. Where that is more than a tile has room for, it is worked
on in pieces. Scales are those of whole rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import encode, inverse_of, magnitude_bits, scale_of
from .momentum_kernels import momentum, ns_input
from .tiles import address, flag_of


@triton.jit
def _part_of_block(
    rows,
    width,
    first_col,
    num_touched,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return this program's matrix, its block counted from the first touched one, and its columns and rows here.

    Columns are from start to end; rows [ROWS, 1]; EVEN says that parts begin and end at multiples of 16.
    """
    num_tiles = tl.cast((rows - 1) // ROWS + 1, tl.int32)
    program = tl.program_id(0)
    block = program % num_touched
    program = program // num_touched
    row = (program % num_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    start = (first_col // BLOCK + block) * BLOCK - first_col
    end = tl.minimum(start + BLOCK, width)
    start = tl.maximum(start, 0)
    if EVEN:
        start, end = tl.multiple_of(start, 16), tl.multiple_of(end, 16)
    return (program // num_tiles).to(tl.int64), block, start, end, row


@triton.jit(do_not_specialize=["first_col", "num_touched", "num_blocks"])
def stats_cut_kernel(
    table,
    sumsq,
    maxima,
    map_values,
    beta,
    one_minus_beta,
    grad_row_stride,
    grad_col_stride,
    rows,
    width,
    first_col,
    num_touched,
    num_blocks,
    CODE: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    EVEN: tl.constexpr,
    NESTEROV: tl.constexpr,
    CODEBOOK: tl.constexpr,
    ALONG: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the sum of u squared and the largest magnitude of m of what is here of each row's block."""
    matrix, block, start, end, row = _part_of_block(rows, width, first_col, num_touched, EVEN, ROWS, BLOCK)
    row_mask = row < rows
    codes = address(table, matrix, 0, 3, CODE, ALIGNMENT) + row * width
    grad = address(table, matrix, 2, 3, GRAD, ALIGNMENT) + row * grad_row_stride
    scales = address(table, matrix, 1, 3, tl.float32, 1) + (row * num_blocks + first_col // BLOCK + block)
    scale = 0.0 if CODEBOOK is None else tl.load(scales, row_mask, other=0.0)
    total = tl.zeros([ROWS, 1], tl.float32)
    largest = tl.zeros([ROWS, 1], tl.int32)
    for first in range(start, end, COLS):
        col = first + tl.arange(0, COLS)[None, :]
        mask = row_mask & (col < end)
        m, u = momentum(
            codes + col,
            scale,
            map_values,
            grad + col.to(tl.int64) * grad_col_stride,
            mask,
            beta,
            one_minus_beta,
            NESTEROV,
            CODEBOOK,
            ALONG,
        )
        total += tl.sum(u * u, axis=1, keep_dims=True)
        largest = tl.maximum(largest, tl.max(magnitude_bits(m), axis=1, keep_dims=True))
    place = (matrix * rows + row) * num_touched + block
    tl.store(sumsq + place, total, row_mask)
    tl.store(maxima + place, scale_of(largest), row_mask)


@triton.jit(do_not_specialize=["first_col", "num_touched", "num_blocks"])
def apply_cut_kernel(
    table,
    new_scales,
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
    width,
    first_col,
    num_touched,
    num_blocks,
    CODE: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    EVEN: tl.constexpr,
    NESTEROV: tl.constexpr,
    SIGNS: tl.constexpr,
    CODEBOOK: tl.constexpr,
    ALONG: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    EACH: tl.constexpr,
):
    """Write the new codes, u * (1 / norm) to `out`, and the scales of whole rows from `new_scales`."""
    matrix, block, start, end, row = _part_of_block(rows, width, first_col, num_touched, EVEN, ROWS, BLOCK)
    row_mask = row < rows
    codes = address(table, matrix, 0, 3, CODE, ALIGNMENT) + row * width
    grad = address(table, matrix, 2, 3, GRAD, ALIGNMENT) + row * grad_row_stride
    scales = address(table, matrix, 1, 3, tl.float32, 1) + row * num_blocks
    out += matrix * out_stride + row * out_row_stride
    first_block = first_col // BLOCK
    place = first_block + block
    scale = 0.0
    new_scale = 0.0
    if CODEBOOK is not None:
        new_scales += (matrix * rows + row) * num_blocks
        scale = tl.load(scales + place, row_mask, other=0.0)
        new_scale = tl.load(new_scales + place, row_mask, other=0.0)
    inverse = inverse_of(tl.load(norms + matrix))
    # Only the stores depend on the flag: the loads need not wait for its value.
    writes = row_mask if skip is None else row < tl.where(flag_of(skip, matrix, EACH) == 0.0, rows, 0)
    for first in range(start, end, COLS):
        col = first + tl.arange(0, COLS)[None, :]
        mask = row_mask & (col < end)
        m, u = momentum(
            codes + col,
            scale,
            map_values,
            grad + col.to(tl.int64) * grad_col_stride,
            mask,
            beta,
            one_minus_beta,
            NESTEROV,
            CODEBOOK,
            ALONG,
        )
        new = m if CODEBOOK is None else encode(m, new_scale, midpoints, CODEBOOK, ALONG)
        # A small tile's codes, and every row's scale, are held more than once: no warp may write what another has yet
        # to load.
        tl.debug_barrier()
        mask = writes & (col < end)
        tl.store(codes + col, new, mask)
        tl.store(out + col.to(tl.int64) * out_col_stride, ns_input(u, inverse, SIGNS), mask)
    if CODEBOOK is not None:
        tl.store(scales + place, new_scale, writes)
        if block == 0:  # the blocks that nobody here reads
            other = tl.arange(0, BLOCKS)[None, :]
            is_untouched = (other < first_block) | (other >= first_block + num_touched)
            mask = is_untouched & (other < num_blocks)
            tl.store(scales + other, tl.load(new_scales + other, row_mask & mask, other=0.0), writes & mask)
