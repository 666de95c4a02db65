"""Kernel of the one-launch step of small matrices, which `triton.tiny` launches.

One program does all of one matrix, in two passes over it with the Newton-Schulz iteration in between, on a square of
the small side that stays in registers. The matrix is cut along its long side into tiles of HEIGHT x WIDTH. In a WIDE
matrix (rows are the small side) a block of a row may span several tiles, in a tall one a row is one block: tiles of the
same blocks make a part.

Products are true fp32: Triton writes their multiply-adds itself. Nothing else is fused, as the launch says.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .codes import encode, inverse_of, magnitude_bits, scale_of, widened
from .momentum_kernels import momentum
from .tiles import address, flag_of
from .update import moved, to_bf16

_CHUNK = tl.constexpr(16)


@triton.jit
def _add_product_nt(total, left, right):
    """Return total + left @ right^T of batches, [batch, m, k] and [batch, n, k], in IEEE fp32.

    k is taken in interleaved parts of _CHUNK: a thread loads its rows of a whole part at once, and registers are few.
    """
    if left.shape[-1] > _CHUNK:
        half: tl.constexpr = left.shape[-1] // 2
        left_even, left_odd = tl.split(tl.reshape(left, (left.shape[0], left.shape[1], half, 2)))
        right_even, right_odd = tl.split(tl.reshape(right, (right.shape[0], right.shape[1], half, 2)))
        total = _add_product_nt(total, left_even, right_even)
        total = _add_product_nt(total, left_odd, right_odd)
    else:
        total = tl.dot(left, tl.permute(right, (0, 2, 1)), total, input_precision="ieee")
    return total


@triton.jit
def _product_nt(left, right):
    """Return left @ right^T, [m, k] x [n, k] -> [m, n].

    It is computed as a batch of one: for sm_100, Triton 3.7 makes TF32 of products of matrices, whatever precision they
    ask for.
    """
    k: tl.constexpr = left.shape[1]
    total = tl.zeros((1, left.shape[0], right.shape[0]), tl.float32)
    lefts, rights = tl.reshape(left, (1, left.shape[0], k)), tl.reshape(right, (1, right.shape[0], k))
    return tl.reshape(_add_product_nt(total, lefts, rights), (left.shape[0], right.shape[0]))


@triton.jit
def _polynomial(R, triple):
    """Return aI + bR + cR^2, with a, b, c where `triple` points to."""
    place = tl.arange(0, R.shape[0])
    diagonal = tl.where(place[:, None] == place[None, :], tl.load(triple), 0.0)
    return _product_nt(R, R) * tl.load(triple + 2) + R * tl.load(triple + 1) + diagonal


@triton.jit
def _newton_schulz(R, steps, num_steps):
    """Return Q, by which Q X is the iteration's result, from R = X X^T: Z = aI + bR + cR^2, Q <- ZQ, R <- ZRZ.

    All of these are polynomials of R, hence symmetric: a right factor is its own transpose.
    """
    Z = _polynomial(R, steps)
    Q = Z
    for step in range(1, num_steps):
        R = _product_nt(_product_nt(Z, R), Z)
        Z = _polynomial(R, steps + 3 * step)
        Q = _product_nt(Z, Q)
    return Q


@triton.jit
def _part(part, cols, WIDE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Return a part's rows [HEIGHT], int64, the index of its block in each of them, its first column, and its tiles.

    Tiles are counted that begin before the end of the block and of the row.
    """
    line = tl.arange(0, HEIGHT).to(tl.int64)
    if WIDE:
        block = line * tl.cdiv(cols, BLOCK) + part
        first, num_tiles = part * BLOCK, tl.cdiv(tl.minimum(cols - part * BLOCK, BLOCK), WIDTH)
    else:
        line += part * HEIGHT
        block, first, num_tiles = line, 0, 1
    return line, block, first, num_tiles


@triton.jit(do_not_specialize=["pitch", "num_steps"])
def step_tiny_kernel(
    table,
    norms,
    maxima,
    steps,
    skip,
    map_values,
    midpoints,
    beta,
    one_minus_beta,
    decay,
    scale,
    num_steps,
    pitch,
    grad_row_stride,
    grad_col_stride,
    param_row_stride,
    param_col_stride,
    rows,
    cols,
    CODE: tl.constexpr,
    GRAD: tl.constexpr,
    PARAM: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    NESTEROV: tl.constexpr,
    CODEBOOK: tl.constexpr,
    IN_MEMORY: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    EACH: tl.constexpr,
    ROUNDING: tl.constexpr,
    WIDE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step one matrix: read its momentum, iterate on the Gram matrix, then write codes, scales and parameters."""
    SMALL: tl.constexpr = HEIGHT if WIDE else WIDTH
    SQUARES: tl.constexpr = HEIGHT * WIDTH // (SMALL * SMALL)
    COLUMNS: tl.constexpr = 7 if ROUNDING == "stochastic" else 5
    if skip is not None:  # a pointer, when there is one
        number = tl.load(table + (tl.program_id(0).to(tl.int64) * COLUMNS + COLUMNS - 1)) if EACH else 0
        if flag_of(skip, number, EACH) != 0.0:
            return
    place = tl.program_id(0).to(tl.int64)
    matrix = tl.load(table + (place * COLUMNS + COLUMNS - 1))
    codes = address(table, place, 0, COLUMNS, CODE, ALIGNMENT)
    scales = address(table, place, 1, COLUMNS, tl.float32, 1)
    grad = address(table, place, 2, COLUMNS, GRAD, ALIGNMENT)
    param = address(table, place, 3, COLUMNS, PARAM, ALIGNMENT)
    decay_value = tl.load(decay) if IN_MEMORY else tl.cast(decay, tl.float32)  # torch.compile passes scalars as fp64
    scale_value = tl.load(scale) if IN_MEMORY else tl.cast(scale, tl.float32)
    inverse = inverse_of(tl.load(norms + matrix))
    num_parts = tl.cdiv(cols, BLOCK) if WIDE else tl.cdiv(rows, HEIGHT)
    if CODEBOOK is not None:
        maxima += matrix * rows * tl.cdiv(cols, BLOCK)
    in_row = tl.arange(0, WIDTH).to(tl.int64)

    # A tile is so many squares; their products are summed apart, for a thread then reads less per multiplication.
    R = tl.zeros((SQUARES, SMALL, SMALL), tl.float32)
    for part in range(num_parts):
        line, block, first, num_tiles = _part(part, cols, WIDE, HEIGHT, WIDTH, BLOCK)
        exists = line < rows
        row = line[:, None]
        old_scale = 0.0 if CODEBOOK is None else tl.load(scales + block, exists, other=0.0)[:, None]
        largest = tl.zeros((HEIGHT,), tl.int32)
        for tile in range(num_tiles):
            col = (first + tile * WIDTH + in_row)[None, :]
            m, u = momentum(
                codes + (row * cols + col),
                old_scale,
                map_values,
                grad + (row * grad_row_stride + col * grad_col_stride),
                exists[:, None] & (col < cols),
                beta,
                one_minus_beta,
                NESTEROV,
                CODEBOOK,
            )
            largest = tl.maximum(largest, tl.max(magnitude_bits(m), axis=1))
            X = u * inverse
            if WIDE:
                squares = tl.permute(tl.reshape(X, (SMALL, SQUARES, SMALL)), (1, 0, 2))
            else:
                squares = tl.permute(tl.reshape(X, (SQUARES, SMALL, SMALL)), (0, 2, 1))
            R = _add_product_nt(R, squares, squares)
        if CODEBOOK is not None:
            tl.store(maxima + block, largest, exists)
    Q = _newton_schulz(tl.sum(R, axis=0), steps, num_steps)
    tl.debug_barrier()  # the maxima are read by other threads than wrote them

    for part in range(num_parts):
        line, block, first, num_tiles = _part(part, cols, WIDE, HEIGHT, WIDTH, BLOCK)
        exists = line < rows
        row = line[:, None]
        old_scale, new_scale = 0.0, tl.zeros((HEIGHT,), tl.float32)
        if CODEBOOK is not None:
            old_scale = tl.load(scales + block, exists, other=0.0)[:, None]
            new_scale = scale_of(tl.load(maxima + block, exists, other=0))
        for tile in range(num_tiles):
            col = (first + tile * WIDTH + in_row)[None, :]
            mask = exists[:, None] & (col < cols)
            m, u = momentum(
                codes + (row * cols + col),
                old_scale,
                map_values,
                grad + (row * grad_row_stride + col * grad_col_stride),
                mask,
                beta,
                one_minus_beta,
                NESTEROV,
                CODEBOOK,
            )
            new = m if CODEBOOK is None else encode(m, new_scale[:, None], midpoints, CODEBOOK)
            X = u * inverse
            direction = tl.permute(_product_nt(tl.permute(X, (1, 0)), Q), (1, 0)) if WIDE else _product_nt(X, Q)
            places = param + (row * param_row_stride + col * param_col_stride)
            old = widened(tl.load(places, mask, other=0.0))
            updated = moved(old, direction, decay_value, scale_value, CAUTIOUS)
            if ROUNDING == "stochastic":
                key = tl.load(table + (place * COLUMNS + 4)).to(tl.int32)
                index = tl.load(table + (place * COLUMNS + 5)) + (row * pitch + col)
                updated = to_bf16(updated, index, key, ROUNDING)
            elif ROUNDING == "nearest":
                updated = to_bf16(updated, 0, 0, ROUNDING)
            # Codes, scales and parameters may be held more than once: no warp may write what another has yet to load.
            tl.debug_barrier()
            tl.store(codes + (row * cols + col), new, mask)
            tl.store(places, updated, mask)
        if CODEBOOK is not None:
            tl.store(scales + block, new_scale, exists)
