"""Update of a batch of parameters in Triton, one pass over parameters and directions; bitwise `reference.update`.

Conversions to and from bf16 work on the bits, also to nearest: the interpreter truncates, and takes subnormal bf16 for
zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..element_moment import ElementMoment
from ..random_bits import ADDED, FINAL_1, FINAL_2, NUM_BYTES, WORD_1, WORD_2
from ..reference.update import check_rounding
from .codes import ROUNDER, widened
from .second_moment import averaged, code_stride, factor_arguments, moment_arguments, over_root
from .tiles import (
    GRID,
    address,
    addresses,
    common_strides,
    flag_of,
    has_flag_each,
    in_row,
    launch,
    lies_across,
    tables_of,
    tile_rows,
    tiling,
    tl_dtype,
    whole_eighths,
)

_WORD_1, _WORD_2, _ADDED = tl.constexpr(WORD_1), tl.constexpr(WORD_2), tl.constexpr(ADDED)
_FINAL_1, _FINAL_2, _NUM_BYTES = tl.constexpr(FINAL_1), tl.constexpr(FINAL_2), tl.constexpr(NUM_BYTES)
# Columns of a tile (not a block of the momentum, whose size the update does not know): 512 bytes of bf16, and few of
# them past the end of a row.
_TILE_COLUMNS = 256
_PIECE_COLUMNS = 64  # where a tensor lies column by column: 32 rows of it, 64 bytes and more
_ROUNDED_TOGETHER = 2048


@triton.jit
def _rotated(words, BY: tl.constexpr):
    return (words << BY) | (words >> (32 - BY))


@triton.jit
def _folded(state, word):
    """Take one more 32-bit word into MurmurHash3's state."""
    return _rotated(state ^ (_rotated(word * _WORD_1, 15) * _WORD_2), 13) * 5 + _ADDED


@triton.jit
def _random_bits(indices, key):
    """Return the hash of int64 element indices under an int32 key: uint32."""
    state = _folded(tl.cast(key, tl.uint32), indices.to(tl.uint32))
    state = _folded(state, (indices >> 32).to(tl.uint32)) ^ _NUM_BYTES
    state = (state ^ (state >> 16)) * _FINAL_1
    state = (state ^ (state >> 13)) * _FINAL_2
    return state ^ (state >> 16)


@triton.jit
def to_bf16(values, indices, key, ROUNDING: tl.constexpr):
    """Round fp32 to bf16: add a half or random bits to the 16 bits that will be cut off; NaN stays NaN."""
    bits = values.to(tl.uint32, bitcast=True)
    noise = _random_bits(indices, key) & 0xFFFF if ROUNDING == "stochastic" else 0x7FFF + ((bits >> 16) & 1)
    cut = tl.where(values == values, bits + noise, bits | 0x400000) >> 16
    return cut.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def moved(old, direction, decay, scale, CAUTIOUS: tl.constexpr):
    """Return old * decay - direction * scale in fp32; a scale of 0 takes no direction, NaN neither."""
    decayed = old * decay
    kept = decayed
    is_zero = scale == 0.0
    update = direction * scale
    if CAUTIOUS:
        kept = tl.where(((update > 0) & (old < 0)) | ((update < 0) & (old > 0)), old, decayed)
    return tl.where(is_zero, decayed, kept - update)


@triton.jit(do_not_specialize=["pitch", "factor_stride", "first_col", "moment_blocks", *GRID])
def _update_kernel(
    table,
    decay,
    scale,
    skip,
    pitch,
    param_row_stride,
    param_col_stride,
    direction_row_stride,
    direction_col_stride,
    rows,
    cols,
    num_blocks,
    num_tiles,
    over_blocks,
    over_tiles,
    factors,
    factor_stride,
    steps,
    inverses,
    beta2,
    one_minus_beta2,
    eps,
    code_row_stride,
    first_col,
    moment_blocks,
    PARAM: tl.constexpr,
    DIRECTION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    EIGHTS: tl.constexpr,
    IN_MEMORY: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    EACH: tl.constexpr,
    ROUNDING: tl.constexpr,
    FACTORS: tl.constexpr,
    CODE: tl.constexpr,
    QUANTIZED: tl.constexpr,
    CLAMPED: tl.constexpr,
    MOMENT_BLOCK: tl.constexpr,
    IN_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update a tile.

    FACTORS names what has one, CODE is the dtype of an element's second moment, None without. With IN_BLOCK a row of
    the tile lies in one block of that: its two numbers are loaded once.
    """
    if EIGHTS:
        cols = cols // 8 * 8
    place, block, row, row_mask = tile_rows(rows, num_blocks, num_tiles, over_blocks, over_tiles, ROWS)
    WIDTH: tl.constexpr = (5 if ROUNDING == "stochastic" else 3) + (0 if CODE is None else 1)
    param = address(table, place, 0, WIDTH, PARAM, ALIGNMENT) + in_row(row, param_row_stride, EIGHTS)
    direction = address(table, place, 1, WIDTH, DIRECTION, ALIGNMENT) + in_row(row, direction_row_stride, EIGHTS)
    decay_value = tl.load(decay) if IN_MEMORY else tl.cast(decay, tl.float32)  # torch.compile passes scalars as fp64
    scale_value = tl.load(scale) if IN_MEMORY else tl.cast(scale, tl.float32)
    # Only the stores depend on the flag: the loads need not wait for its value.
    is_numbered: tl.constexpr = EACH or CODE is not None or FACTORS is not None
    matrix = tl.load(table + (place * WIDTH + WIDTH - 1)) if is_numbered else 0
    writes = row_mask if skip is None else row < tl.where(flag_of(skip, matrix, EACH) == 0.0, rows, 0)
    col = block * BLOCK + tl.arange(0, COLS)[None, :]
    mask = row_mask & (col < cols)
    old = widened(tl.load(param + col * param_col_stride, mask, other=0.0))
    step = widened(tl.load(direction + col * direction_col_stride, mask, other=0.0))
    if CODE is not None:
        codes = address(table, place, WIDTH - 2, WIDTH, CODE, ALIGNMENT) + in_row(row, code_row_stride, EIGHTS) + col
        of_row = (matrix * rows + row) * moment_blocks
        of_block = of_row + (first_col + (block * BLOCK if IN_BLOCK else col)) // MOMENT_BLOCK
        block_mask = row_mask if IN_BLOCK else mask
        code_step = tl.load(steps + of_block, block_mask, other=0.0) if QUANTIZED else 0.0
        moment = averaged(codes, code_step, step, mask, beta2, one_minus_beta2, QUANTIZED)
        root = tl.sqrt_rn(moment)
        step = over_root(step, root, eps, CLAMPED, EXACT=True)
    if FACTORS == "row":
        step = step * tl.load(factors + (matrix * factor_stride + row), row_mask, other=0.0)
    elif FACTORS == "column":
        step = step * tl.load(factors + (matrix * factor_stride + col), col < cols, other=0.0)
    elif FACTORS == "matrix":
        step = step * tl.load(factors + matrix * factor_stride)
    new = moved(old, step, decay_value, scale_value, CAUTIOUS)
    if ROUNDING == "stochastic":
        key = tl.load(table + (place * WIDTH + 2)).to(tl.int32)
        index = tl.load(table + (place * WIDTH + 3)) + (row * pitch + col)
        new = to_bf16(new, index, key, ROUNDING)
    elif ROUNDING == "nearest":
        new = to_bf16(new, 0, 0, ROUNDING)
    if QUANTIZED:
        inverse = tl.load(inverses + of_block, block_mask, other=0.0)
    # A small tile's elements are held more than once: no warp may write what another has yet to load.
    tl.debug_barrier()
    tl.store(param + col * param_col_stride, new, writes & (col < cols))
    if CODE is not None:
        if QUANTIZED:
            code = (root * inverse + ROUNDER).to(tl.int32, bitcast=True) & 0xFF  # the nearest integer, at most 255
            moment = tl.maximum(code, (root > 0.0).to(tl.int32)).to(tl.uint8)
        tl.store(codes, moment, writes & (col < cols))


@triton.jit(do_not_specialize=["key", "first", *GRID])
def _round_stochastic_kernel(
    values,
    out,
    key,
    first,
    rows,
    cols,
    num_blocks,
    num_tiles,
    over_blocks,
    over_tiles,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _, block, row, row_mask = tile_rows(rows, num_blocks, num_tiles, over_blocks, over_tiles, ROWS)
    col = block * BLOCK + tl.arange(0, COLS)[None, :]
    mask, index = row_mask & (col < cols), row * cols + col
    new = to_bf16(tl.load(values + index, mask, other=0.0), tl.cast(first, tl.int64) + index, key, "stochastic")
    tl.store(out + index, new, mask)


def update_params(
    params: Sequence[Tensor],
    directions: Tensor | Sequence[Tensor],
    *,
    decay: float | Tensor,
    scale: float | Tensor,
    keys: Sequence[int] | None = None,
    firsts: Sequence[int] | None = None,
    pitch: int | None = None,
    cautious: bool = False,
    skip: Tensor | None = None,
    factors: Tensor | None = None,
    moment: ElementMoment | None = None,
    inverses: Tensor | None = None,
) -> None:
    """Update param <- param * decay - direction * scale in place, in fp32, rounded once to the parameters' dtype.

    The results are bitwise those of `reference.update_params`.

    Args:
        params: stacks [count, rows, cols], fp32, bf16 or fp16, any strides, row and column stride the same in all.
        directions: [matrices, rows, cols], or a list of stacks [count, rows, cols] of as many matrices; any of these
            dtypes, any strides, row and column stride the same in all.
        decay: 1 - lr * weight_decay; a float, or a 0-d fp32 tensor on the parameters' device.
        scale: lr times the factor of the shape; as `decay`. Where it is 0, `directions` is not looked at.
        keys: one of `rounding_key` a matrix: bf16 is rounded stochastically. None rounds to nearest, ties to even.
        firsts: with keys, the global index of element [0, 0] of each matrix; None means 0.
        pitch: the difference of the global indices of elements [1, 0] and [0, 0]; None means cols.
        cautious: as in `reference.update_params`.
        skip: fp32 on the device, 0-d or [matrices]; unless it is zero, nothing is written.
        factors: fp32 [matrices, rows, 1], [matrices, 1, cols] or [matrices, 1, 1], which the directions are multiplied
            by first.
        moment: of each element, which is averaged, divides its direction, and is written.
        inverses: with quantized moments, fp32 [matrices, rows, blocks]: 255 over their new scales, 0 where these are 0.

    Raises:
        ValueError: for keys with parameters that are not bf16, for stacks that are not alike, or if `directions`,
            `keys`, `firsts` or `skip` is not of as many matrices.
    """
    first, shape = params[0], params[0].shape[1:]
    check_rounding(first, keys)
    param_strides = common_strides("params", params, shape)
    stacks = [directions] if isinstance(directions, Tensor) else directions
    columns = [addresses(params), addresses(stacks)]
    count, num_directions = map(len, columns)
    direction_strides = common_strides("directions", stacks, shape)
    if num_directions != count:
        raise ValueError(f"{num_directions} directions for {count} matrices {tuple(shape)}")
    if keys is not None:
        columns += [list(keys), [0] * count if firsts is None else list(firsts)]
    across = lies_across(param_strides) or lies_across(direction_strides)
    width, row_strides = _PIECE_COLUMNS if across else _TILE_COLUMNS, [param_strides[0], direction_strides[0]]
    alignments = {0: 16, 1: 16}
    if moment is not None:
        alignments[len(columns)] = 16
        columns.append(addresses(moment.codes))
        row_strides.append(code_stride(moment))
        width = min(width, moment.block_size)
    how = factor_arguments(factors) | moment_arguments(moment, inverses)
    in_memory = isinstance(decay, Tensor) or isinstance(scale, Tensor)
    if in_memory:
        decay, scale = (torch.as_tensor(f, dtype=torch.float32, device=first.device) for f in (decay, scale))
    tiles, eights = tiling(shape, width), whole_eighths(shape[1], *row_strides)
    for table, aligned in tables_of(columns, alignments if across or shape[1] % 8 == 0 else {}, first.device):
        launch(
            _update_kernel,
            first,
            len(table),
            tiles,
            table,
            decay,
            scale,
            skip,
            shape[1] if pitch is None else pitch,
            *param_strides,
            *direction_strides,
            **how,
            IN_BLOCK=moment is not None and moment.block_size % tiles.BLOCK == moment.first_col % tiles.BLOCK == 0,
            PARAM=tl_dtype(first),
            DIRECTION=tl_dtype(stacks[0]),
            ALIGNMENT=16 if aligned else 1,
            EIGHTS=eights,
            IN_MEMORY=in_memory,
            CAUTIOUS=cautious,
            EACH=has_flag_each(skip, count),
            ROUNDING="stochastic" if keys is not None else "nearest" if first.dtype == torch.bfloat16 else None,
        )


def round_stochastic(values: Tensor, *, key: int, first: int = 0) -> Tensor:
    """Round fp32 `values` (any shape, contiguous) to bf16 of the same shape; bitwise `reference.round_stochastic`.

    Args:
        values: the numbers to round stochastically.
        key: from `rounding_key`.
        first: the global element index of the first value; the others follow in order.
    """
    rounded = torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)
    matrix = values.view(1, -1)
    tiles = tiling(matrix.shape, _ROUNDED_TOGETHER)
    launch(_round_stochastic_kernel, matrix, 1, tiles, values, rounded, key, first)
    return rounded
