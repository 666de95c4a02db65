"""The arithmetic of record in Triton: the functions of `reference`, with its signatures and its bits.

One program works on a tile: one block of each of ROWS consecutive rows. Each operation is rounded to fp32 by itself:
divisions are `tl.div_rn` and every launch passes `enable_fp_fusion=False`. Program indices are widened to 64 bits
before anything is multiplied by a stride. Nothing is tuned at run time, and there are no atomics: the same shapes
take the same path and give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codebooks import (
    CODE_DTYPES,
    LINEAR_MAX,
    SCALE_FLOOR,
    Codebook,
    dynamic_map,
    dynamic_midpoints,
    zero_code,
)
from .reference import num_blocks
from .triton_gemm import symmetric_product
from .triton_tiles import _launch, _tile
from .triton_update import round_stochastic, update_param

__all__ = [
    "dequantize",
    "momentum_apply",
    "momentum_stats",
    "quantize",
    "round_stochastic",
    "symmetric_product",
    "update_param",
]

_LINEAR_MAX = tl.constexpr(float(LINEAR_MAX))
_SCALE_FLOOR = tl.constexpr(float(SCALE_FLOOR))
_ZERO_CODE = tl.constexpr(zero_code("dynamic"))
# Adding and subtracting 1.5 * 2**23 rounds |x| < 2**22 to the nearest integer, ties to even. libdevice.rint would
# do, but the interpreter lacks it.
_ROUNDER = tl.constexpr(12582912.0)
_MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _decode(codes, scale, map_values, CODEBOOK: tl.constexpr):
    """Codes [ROWS, BLOCK] and scale [ROWS, 1] -> fp32 values; `map_values` points to the dynamic map."""
    if CODEBOOK == "linear":
        decoded = tl.div_rn(codes.to(tl.float32) * scale, _LINEAR_MAX)
    else:
        decoded = tl.load(map_values + codes.to(tl.int32)) * scale
    return decoded


@triton.jit
def _encode(values, scale, midpoints, CODEBOOK: tl.constexpr):
    """fp32 values [ROWS, BLOCK] and floored scale [ROWS, 1] -> codes, as int32."""
    ratio = tl.div_rn(values, tl.where(scale == 0.0, float("inf"), scale))
    if CODEBOOK == "linear":
        codes = ((ratio * _LINEAR_MAX + _ROUNDER) - _ROUNDER).to(tl.int32)
    else:
        # Magnitudes number 1..127 from zero: decade d holds 2**d of them, evenly spaced over 10**(d - 6) * (0.1, 1).
        # Number against magnitude is thus a straight line in each decade; the lines get flatter and meet where the
        # decades do, so the least of the seven is the right one. Half a level less makes the guess exact or one too
        # low, with a quarter of a level to spare for rounding; one comparison with the true midpoint decides.
        magnitude = tl.abs(ratio)
        position = magnitude * (1e6 / 0.9) + (8 / 9 - 0.5)
        for d in tl.static_range(1, 7):
            position = tl.minimum(position, magnitude * (1e6 / 0.9 / 5.0**d) + (2.0**d * 8 / 9 - 0.5))
        guess = position.to(tl.int32)
        codes = tl.where(ratio < 0.0, _ZERO_CODE - 1 - guess, _ZERO_CODE + guess)
        codes = tl.minimum(tl.maximum(codes, 0), 255)  # -1.0 is not in the map; and NaN must not index the table
        codes += (ratio > tl.load(midpoints + codes)).to(tl.int32)
    return codes


@triton.jit
def _absmax(values):
    """The largest magnitude of each row of fp32 [ROWS, BLOCK], NaN if there is one: fp32 [ROWS].

    The bits of magnitudes, taken as integers, are in the order of the magnitudes with NaN on top. A maximum of floats
    would drop NaN.
    """
    bits = values.to(tl.int32, bitcast=True) & _MAGNITUDE_BITS
    return tl.max(bits, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def _floored(absmax):
    return tl.where(absmax < _SCALE_FLOOR, 0.0, absmax)


@triton.jit
def _momentum(codes, scale, map_values, grad, beta, one_minus_beta, NESTEROV: tl.constexpr, CODEBOOK: tl.constexpr):
    """The new momentum m and the Newton-Schulz input u of a tile, fp32 [ROWS, BLOCK]."""
    beta = tl.cast(beta, tl.float32)  # torch.compile passes scalars as fp64
    scaled_grad = grad.to(tl.float32) * tl.cast(one_minus_beta, tl.float32)
    old = codes if CODEBOOK is None else _decode(codes, scale, map_values, CODEBOOK)
    m = old * beta + scaled_grad
    u = m * beta + scaled_grad if NESTEROV else m
    return m, u


@triton.jit
def _quantize_kernel(
    values,
    codes,
    scales,
    midpoints,
    values_row_stride,
    values_col_stride,
    rows,
    cols,
    CODEBOOK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, col, mask, block, block_mask = _tile(rows, cols, ROWS, BLOCK)
    tile = tl.load(values + (row * values_row_stride + col * values_col_stride), mask, other=0.0).to(tl.float32)
    scale = _floored(_absmax(tile))
    tl.store(scales + block, scale, block_mask)
    tl.store(codes + (row * cols + col), _encode(tile, scale[:, None], midpoints, CODEBOOK), mask)


@triton.jit
def _dequantize_kernel(
    codes,
    scales,
    map_values,
    values,
    rows,
    cols,
    CODEBOOK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, col, mask, block, block_mask = _tile(rows, cols, ROWS, BLOCK)
    tile = tl.load(codes + (row * cols + col), mask, other=0)
    scale = tl.load(scales + block, block_mask, other=0.0)
    tl.store(values + (row * cols + col), _decode(tile, scale[:, None], map_values, CODEBOOK), mask)


@triton.jit
def _momentum_stats_kernel(
    codes,
    scales,
    grad,
    absmax,
    sumsq,
    map_values,
    beta,
    one_minus_beta,
    grad_row_stride,
    grad_col_stride,
    rows,
    cols,
    NESTEROV: tl.constexpr,
    CODEBOOK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, col, mask, block, block_mask = _tile(rows, cols, ROWS, BLOCK)
    old = tl.load(codes + (row * cols + col), mask, other=0)
    scale = 0.0 if CODEBOOK is None else tl.load(scales + block, block_mask, other=0.0)[:, None]
    g = tl.load(grad + (row * grad_row_stride + col * grad_col_stride), mask, other=0.0)
    m, u = _momentum(old, scale, map_values, g, beta, one_minus_beta, NESTEROV, CODEBOOK)
    # Past the end of a row code 0 of the dynamic codebook has decoded to something.
    m = tl.where(mask, m, 0.0)
    u = tl.where(mask, u, 0.0)
    tl.store(absmax + block, _absmax(m), block_mask)
    tl.store(sumsq + block, tl.sum(u * u, axis=1), block_mask)


@triton.jit
def _momentum_apply_kernel(
    codes,
    scales,
    grad,
    absmax,
    norm,
    out,
    map_values,
    midpoints,
    beta,
    one_minus_beta,
    grad_row_stride,
    grad_col_stride,
    out_row_stride,
    out_col_stride,
    rows,
    cols,
    NESTEROV: tl.constexpr,
    CODEBOOK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, col, mask, block, block_mask = _tile(rows, cols, ROWS, BLOCK)
    old = tl.load(codes + (row * cols + col), mask, other=0)
    scale = 0.0 if CODEBOOK is None else tl.load(scales + block, block_mask, other=0.0)[:, None]
    g = tl.load(grad + (row * grad_row_stride + col * grad_col_stride), mask, other=0.0)
    m, u = _momentum(old, scale, map_values, g, beta, one_minus_beta, NESTEROV, CODEBOOK)
    u = tl.div_rn(u, tl.load(norm))
    if CODEBOOK is None:
        new = m
    else:
        new_scale = _floored(tl.load(absmax + block, block_mask, other=0.0))
        new = _encode(m, new_scale[:, None], midpoints, CODEBOOK)
    # Every warp has its own copy of the scale, and a small tile's codes are held more than once: without the barrier
    # a fast warp would overwrite what a slow one has yet to load.
    tl.debug_barrier()
    tl.store(codes + (row * cols + col), new, mask)
    if CODEBOOK is not None:
        tl.store(scales + block, new_scale, block_mask)
    tl.store(out + (row * out_row_stride + col * out_col_stride), u, mask)


def _check_contiguous(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous for the Triton backend, not of strides {tensor.stride()}")


def quantize(values: Tensor, *, codebook: Codebook, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize finite `values` [rows, cols] (any float dtype and strides) -> codes [rows, cols], fp32 scales
    [rows, blocks]; bitwise `reference.quantize`.

    Raises:
        ValueError: if `block_size` (elements) is not a power of two.
    """
    rows, cols = values.shape
    codes = torch.empty(rows, cols, dtype=CODE_DTYPES[codebook], device=values.device)
    scales = torch.empty(rows, num_blocks(cols, block_size), dtype=torch.float32, device=values.device)
    midpoints = dynamic_midpoints(values.device) if codebook == "dynamic" else None
    _launch(_quantize_kernel, values, block_size, values, codes, scales, midpoints, *values.stride(), CODEBOOK=codebook)
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor, *, codebook: Codebook, block_size: int) -> Tensor:
    """Decode contiguous codes [rows, cols] and fp32 scales [rows, blocks] -> fp32 [rows, cols]; bitwise
    `reference.dequantize`.

    Raises:
        ValueError: if codes or scales are not contiguous, or `block_size` (elements) is not a power of two.
    """
    _check_contiguous(codes=codes, scales=scales)
    rows, cols = codes.shape
    values = torch.empty(rows, cols, dtype=torch.float32, device=codes.device)
    map_values = dynamic_map(codes.device) if codebook == "dynamic" else None
    _launch(_dequantize_kernel, codes, block_size, codes, scales, map_values, values, CODEBOOK=codebook)
    return values


def momentum_stats(
    codes: Tensor,
    scales: Tensor | None,
    grad: Tensor,
    *,
    beta: float,
    nesterov: bool,
    codebook: Codebook | None,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """First phase: read only. `reference.momentum_stats`; absmax is bitwise, sumsq differs by the order of addition.

    Args:
        codes: int8 (linear), uint8 (dynamic) or fp32 (None) [rows, cols], contiguous.
        scales: fp32 [rows, blocks], contiguous, or None with `codebook=None`.
        grad: fp32, bf16 or fp16 [rows, cols], any strides.
        beta: momentum factor in [0, 1).

    Returns:
        `absmax`, the maximum of |m|, not finite where m holds a NaN or Inf; and `sumsq`, the sum of u squared;
        both fp32 [rows, blocks].

    Raises:
        ValueError: if codes or scales are not contiguous, or `block_size` (elements) is not a power of two.
    """
    _check_contiguous(codes=codes, scales=scales)
    rows, cols = codes.shape
    absmax = torch.empty(rows, num_blocks(cols, block_size), dtype=torch.float32, device=codes.device)
    sumsq = torch.empty_like(absmax)
    map_values = dynamic_map(codes.device) if codebook == "dynamic" else None
    _launch(
        _momentum_stats_kernel,
        codes,
        block_size,
        codes,
        scales,
        grad,
        absmax,
        sumsq,
        map_values,
        float(beta),
        1.0 - beta,
        *grad.stride(),
        NESTEROV=nesterov,
        CODEBOOK=codebook,
    )
    return absmax, sumsq


def momentum_apply(
    codes: Tensor,
    scales: Tensor | None,
    grad: Tensor,
    absmax: Tensor,
    norm: Tensor,
    out: Tensor,
    *,
    beta: float,
    nesterov: bool,
    codebook: Codebook | None,
    block_size: int,
) -> None:
    """Second phase: recompute the same momentum and write codes, scales and the Newton-Schulz input; bitwise
    `reference.momentum_apply`.

    Args:
        codes, scales: as in `momentum_stats`; overwritten with the new state.
        absmax: of `momentum_stats`, contiguous; becomes the scales.
        norm: 0-d fp32, the positive divisor of u (its Frobenius norm, bounded below).
        out: [rows, cols], any float dtype and strides; receives u / norm, divided in fp32, rounded once.

    Raises:
        ValueError: if codes, scales or absmax are not contiguous, or `block_size` (elements) is not a power of two.
    """
    _check_contiguous(codes=codes, scales=scales, absmax=absmax)
    map_values = dynamic_map(codes.device) if codebook == "dynamic" else None
    midpoints = dynamic_midpoints(codes.device) if codebook == "dynamic" else None
    _launch(
        _momentum_apply_kernel,
        codes,
        block_size,
        codes,
        scales,
        grad,
        absmax,
        norm,
        out,
        map_values,
        midpoints,
        float(beta),
        1.0 - beta,
        *grad.stride(),
        *out.stride(),
        NESTEROV=nesterov,
        CODEBOOK=codebook,
    )
