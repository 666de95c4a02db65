"""Whole step of small matrices in one launch, one program a matrix; `reference.tiny` does the same in torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..codebooks import Codebook, dynamic_map, dynamic_midpoints
from ..reference import num_blocks
from ..reference.tiny import check_tiny
from ..reference.update import check_rounding
from .tiles import addresses, check_rows_contiguous, common_strides, has_flag_each, tables_of, tl_dtype
from .tiny_kernel import step_tiny_kernel

# Eight warps with 16 elements a thread, and 16-byte loads of the codes: 256 columns of 16 rows, 64 of 64.
_TILE_ELEMENTS = 4096
_ELEMENTS_PER_WARP = 512
# Left alone, ptxas spills some of them to come down to 128; with any bound from 160 on it gets there without.
_MAX_REGISTERS = 224
_MIN_SMALL = 16  # the least that a product takes
_MIN_BLOCK = 64


class TinyTiling(NamedTuple):
    """Cut of a matrix into tiles of HEIGHT x WIDTH along its long side, with blocks of BLOCK columns."""

    WIDE: bool
    HEIGHT: int
    WIDTH: int
    BLOCK: int
    num_warps: int


def tiny_tiling(rows: int, cols: int, block_size: int) -> TinyTiling:
    """Return the tiles of matrices [rows, cols] with min(rows, cols) <= 64, and blocks of `block_size` elements.

    Raises:
        ValueError: if `block_size` is not a power of two, or under 64.
    """
    if block_size < _MIN_BLOCK or block_size & (block_size - 1):
        raise ValueError(f"block_size must be a power of two from {_MIN_BLOCK} on for step_tiny, not {block_size}")
    small = max(_MIN_SMALL, triton.next_power_of_2(min(rows, cols)))
    tile = _TILE_ELEMENTS // small
    if rows > cols:
        return TinyTiling(False, tile, small, max(small, block_size), _TILE_ELEMENTS // _ELEMENTS_PER_WARP)
    # A row of one block may be shorter than a tile; a tile is never longer than a block.
    block = max(tile, triton.next_power_of_2(cols)) if cols <= block_size else block_size
    tile = min(tile, block)
    return TinyTiling(True, small, tile, block, small * tile // _ELEMENTS_PER_WARP)


@lru_cache(maxsize=64)
def _steps_on(device: torch.device, steps: tuple[tuple[float, float, float], ...]) -> Tensor:
    """Return the coefficients as fp32 [steps, 3] on the device, copied there once."""
    return torch.tensor(steps, dtype=torch.float32, device=device)


def step_tiny(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    norms: Tensor,
    *,
    beta: float,
    nesterov: bool,
    codebook: Codebook | None,
    block_size: int,
    steps: Sequence[tuple[float, float, float]],
    decay: float | Tensor,
    scale: float | Tensor,
    keys: Sequence[int] | None = None,
    firsts: Sequence[int] | None = None,
    pitch: int | None = None,
    cautious: bool = False,
    skip: Tensor | None = None,
) -> None:
    """Do the second phase of the step of matrices with a small side: codes, scales and parameters are overwritten.

    Codes and scales are bitwise those of `reference.step_tiny`; parameters differ by the rounding of products.

    Args:
        codes: stacks [count, rows, cols] of contiguous matrices, int8 (linear), uint8 (dynamic) or fp32 (None); rows or
            cols at most 64.
        scales: stacks [count, rows, blocks], fp32, contiguous but for the first stride; None with `codebook=None`.
        grads, params: stacks [count, rows, cols], fp32, bf16 or fp16, any strides, row and column stride the same in
            all of an argument.
        norms: fp32 [matrices], contiguous: the positive divisors of u (Frobenius norms, bounded below).
        beta, nesterov, codebook: as in `momentum_stats`.
        block_size: the number of elements that share a scale, a power of two from 64 on.
        steps: one (a, b, c) a Newton-Schulz step.
        decay, scale, keys, firsts, pitch, cautious: as in `update_params`; `scale` is lr times the factor of the shape.
        skip: fp32 on the device, 0-d or [matrices]; unless it is zero, nothing is written.

    Raises:
        ValueError: if both sides exceed 64, for steps that fp32 does not carry (`check_tiny`), another `block_size`,
            keys with parameters that are not bf16, stacks of one argument that are not alike, or arguments of different
            numbers of matrices.
    """
    first, shape = codes[0], codes[0].shape[1:]
    rows, cols = shape
    check_tiny(rows, cols, steps)
    check_rounding(params[0], keys)
    tiles = tiny_tiling(rows, cols, block_size)
    check_rows_contiguous("codes", codes, shape)
    blocks_shape = rows, num_blocks(cols, block_size)
    columns = [addresses(codes), addresses(codes), addresses(grads), addresses(params)]
    if scales is not None:
        check_rows_contiguous("scales", scales, blocks_shape)
        columns[1] = addresses(scales)
    count = len(columns[0])
    if keys is not None:
        columns += [list(keys), [0] * count if firsts is None else list(firsts)]
    if norms.shape != (count,) or any(len(column) != count for column in columns):
        counts = [len(column) for column in columns]
        raise ValueError(f"{len(norms)} norms for {counts} codes, scales, grads, params, keys and firsts")
    strides = (*common_strides("grads", grads, shape), *common_strides("params", params, shape))
    if count * rows * cols == 0:
        return
    in_memory = isinstance(decay, Tensor) or isinstance(scale, Tensor)
    if in_memory:
        decay, scale = (torch.as_tensor(f, dtype=torch.float32, device=first.device) for f in (decay, scale))
    maxima = None if codebook is None else torch.empty(count, *blocks_shape, dtype=torch.int32, device=first.device)
    tables = tables_of(columns, {0: 16, 2: 16, 3: 16}, first.device)
    with torch.cuda.device_of(first):  # Triton launches on the current device, wherever its arguments are
        for table, aligned in tables:
            step_tiny_kernel[(len(table),)](
                table,
                norms.contiguous(),
                maxima,
                _steps_on(first.device, tuple((a, b, c) for a, b, c in steps)),
                skip,
                dynamic_map(first.device) if codebook == "dynamic" else None,
                dynamic_midpoints(first.device) if codebook == "dynamic" else None,
                float(beta),
                1.0 - beta,
                decay,
                scale,
                len(steps),
                cols if pitch is None else pitch,
                *strides,
                rows,
                cols,
                CODE=tl_dtype(first),
                GRAD=tl_dtype(grads[0]),
                PARAM=tl_dtype(params[0]),
                ALIGNMENT=16 if aligned else 1,
                NESTEROV=nesterov,
                CODEBOOK=codebook,
                IN_MEMORY=in_memory,
                CAUTIOUS=cautious,
                EACH=has_flag_each(skip, count),
                ROUNDING="stochastic" if keys is not None else "nearest" if params[0].dtype == torch.bfloat16 else None,
                **tiles._asdict(),
                num_stages=1,  # with loads that run ahead, 64 rows spill registers
                maxnreg=_MAX_REGISTERS,
                enable_fp_fusion=False,
            )
