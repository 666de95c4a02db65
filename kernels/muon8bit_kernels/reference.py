"""The arithmetic of record in torch: quantize, dequantize and the two-phase momentum step.

Every operation is rounded to fp32 and none is fused, so the Triton kernels give the same codes, scales and
momentum bit for bit. Matrices are 2-D here; a block is `block_size` consecutive elements of one row, the last of
a row may be shorter. `codebook=None` means an unquantized fp32 momentum: `codes` is the buffer, `scales` unused.

    m      = beta * ((code * s) / 127) + (1 - beta) * g          dynamic: beta * (map[code] * s) + ...
    s'     = max |m| over the block, 0 if that is below the smallest normal fp32
    code'  = rint((m / s') * 127)                                dynamic: the nearest map entry to m / s'
    u      = beta * m + (1 - beta) * g  if nesterov else  m      what Newton-Schulz sees
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .codebooks import (
    CODE_DTYPES,
    LINEAR_MAX,
    SCALE_FLOOR,
    Codebook,
    dynamic_map,
    dynamic_midpoints,
    dynamic_prefix_codes,
)
from .update_reference import round_stochastic, update_param

__all__ = [
    "dequantize",
    "momentum_apply",
    "momentum_stats",
    "num_blocks",
    "quantize",
    "round_stochastic",
    "update_param",
]

# Elements that one pass works on: its fp32 temporaries stay in a core's cache and bound the workspace.
_CHUNK_ELEMENTS = 2**17


def num_blocks(cols: int, block_size: int) -> int:
    """Blocks in a row of `cols` elements: ceil(cols / block_size)."""
    return -(-cols // block_size)


def _pieces(rows: int, cols: int, block_size: int) -> Iterator[tuple[slice, slice, slice, int]]:
    """Row, column and block ranges that are whole blocks of one length, small enough for the cache."""
    full = cols // block_size * block_size
    step = max(1, _CHUNK_ELEMENTS // max(1, cols))
    for start in range(0, rows, step):
        row_range = slice(start, min(start + step, rows))
        if full:
            yield row_range, slice(0, full), slice(0, full // block_size), block_size
        if full < cols:
            yield row_range, slice(full, cols), slice(full // block_size, None), cols - full


def _decode(codes: Tensor, scales: Tensor, codebook: Codebook) -> Tensor:
    """Codes [rows, blocks, block] and scales [rows, blocks, 1] -> fp32 values."""
    if codebook == "linear":
        # A tensor, since on CUDA torch replaces division by a Python number by multiplication with its reciprocal.
        return (codes * scales).div_(scales.new_full((), LINEAR_MAX))
    return dynamic_map(codes.device)[codes.int()].mul_(scales)


def _encode(values: Tensor, scales: Tensor, codebook: Codebook) -> Tensor:
    """fp32 values [rows, blocks, block] and floored scales [rows, blocks, 1] -> codes."""
    ratio = values / scales.masked_fill(scales == 0, torch.inf)
    if codebook == "linear":
        return ratio.mul_(LINEAR_MAX).round_().to(torch.int8)
    prefix = (ratio.view(torch.int32) >> 16) & 0xFFFF
    codes = dynamic_prefix_codes(values.device)[prefix]
    codes += ratio > dynamic_midpoints(values.device)[codes]
    return codes.to(torch.uint8)


def _floored(absmax: Tensor) -> Tensor:
    return absmax.masked_fill(absmax < SCALE_FLOOR, 0.0)


def quantize(values: Tensor, *, codebook: Codebook, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize finite `values` [rows, cols] (any float dtype) -> codes [rows, cols], fp32 scales [rows, blocks]."""
    rows, cols = values.shape
    codes = torch.empty(rows, cols, dtype=CODE_DTYPES[codebook], device=values.device)
    scales = torch.empty(rows, num_blocks(cols, block_size), dtype=torch.float32, device=values.device)
    for r, c, b, size in _pieces(rows, cols, block_size):
        piece = values[r, c].float().unflatten(1, (-1, size))
        scale = _floored(piece.abs().amax(-1))
        scales[r, b] = scale
        codes[r, c] = _encode(piece, scale.unsqueeze(-1), codebook).flatten(1)
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor, *, codebook: Codebook, block_size: int) -> Tensor:
    """Decode codes [rows, cols] and fp32 scales [rows, blocks] -> fp32 [rows, cols]."""
    rows, cols = codes.shape
    values = torch.empty(rows, cols, dtype=torch.float32, device=codes.device)
    for r, c, b, size in _pieces(rows, cols, block_size):
        decoded = _decode(codes[r, c].unflatten(1, (-1, size)), scales[r, b].unsqueeze(-1), codebook)
        values[r, c] = decoded.flatten(1)
    return values


def _momentum(
    codes: Tensor, scales: Tensor | None, grad: Tensor, beta: float, codebook: Codebook | None
) -> tuple[Tensor, Tensor]:
    """The new momentum m and (1 - beta) * g of one piece, fp32 [rows, blocks, block], both freshly allocated."""
    scaled_grad = grad.float() * (1.0 - beta)
    decayed = codes * beta if scales is None or codebook is None else _decode(codes, scales, codebook).mul_(beta)
    return decayed.add_(scaled_grad), scaled_grad


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
    """First phase: read only. What the step needs to know before it writes anything.

    Args:
        codes: int8 (linear), uint8 (dynamic) or fp32 (None) [rows, cols].
        scales: fp32 [rows, blocks], or None with `codebook=None`.
        grad: fp32, bf16 or fp16 [rows, cols], any strides.
        beta: momentum factor in [0, 1).

    Returns:
        `absmax`, the maximum of |m|, not finite where m holds a NaN or Inf; and `sumsq`, the sum of u squared;
        both fp32 [rows, blocks].
    """
    rows, cols = codes.shape
    absmax = torch.empty(rows, num_blocks(cols, block_size), dtype=torch.float32, device=codes.device)
    sumsq = torch.empty_like(absmax)
    for r, c, b, size in _pieces(rows, cols, block_size):
        scale = None if scales is None else scales[r, b].unsqueeze(-1)
        piece = (codes[r, c].unflatten(1, (-1, size)), scale, grad[r, c].unflatten(1, (-1, size)))
        m, scaled_grad = _momentum(*piece, beta, codebook)
        absmax[r, b] = torch.maximum(m.amin(-1).neg_(), m.amax(-1)).abs_()  # all propagate NaN; abs for -0.0
        u = m.mul_(beta).add_(scaled_grad) if nesterov else m  # in place: fresh memory costs more than arithmetic
        sumsq[r, b] = u.square_().sum(-1)
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
    """Second phase: recompute the same momentum and write codes, scales and the Newton-Schulz input.

    Args:
        codes, scales: as in `momentum_stats`; overwritten with the new state.
        absmax: of `momentum_stats`; becomes the scales.
        norm: 0-d fp32, the positive divisor of u (its Frobenius norm, bounded below).
        out: [rows, cols], any float dtype and strides; receives u / norm, divided in fp32, rounded once.
    """
    rows, cols = codes.shape
    for r, c, b, size in _pieces(rows, cols, block_size):
        scale = None if scales is None else scales[r, b].unsqueeze(-1)
        piece = (codes[r, c].unflatten(1, (-1, size)), scale, grad[r, c].unflatten(1, (-1, size)))
        m, scaled_grad = _momentum(*piece, beta, codebook)
        u = scaled_grad.add_(m * beta) if nesterov else m
        out[r, c] = (u / norm).flatten(1)
        if codebook is None or scales is None:
            codes[r, c] = m.flatten(1)
            continue
        new_scale = _floored(absmax[r, b])
        scales[r, b] = new_scale
        codes[r, c] = _encode(m, new_scale.unsqueeze(-1), codebook).flatten(1)
