"""The arithmetic of record in torch: quantize, dequantize and the two-phase momentum step.

Every operation is rounded to fp32 and none is fused, so the Triton kernels give the same codes, scales and
momentum bit for bit. The momentum step takes lists of stacks (see `stacks`); a block is `block_size` consecutive
elements of one row, the last of a row may be shorter. `codebook=None` means an unquantized fp32 momentum: `codes`
are the buffers, `scales` is None.

    m      = beta * ((code * s) / 127) + (1 - beta) * g          dynamic: beta * (map[code] * s) + ...
    s'     = max |m| over the block, 0 if that is below the smallest normal fp32
    code'  = rint((m / s') * 127)                                dynamic: the nearest map entry to m / s'
    u      = beta * m + (1 - beta) * g  if nesterov else  m      what Newton-Schulz sees
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
from .stacks import Rows, batch_shape
from .update_reference import round_stochastic, update_params

__all__ = [
    "dequantize",
    "momentum_apply",
    "momentum_stats",
    "num_blocks",
    "quantize",
    "round_stochastic",
    "update_params",
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
        return codes.float().mul_(scales).div_(scales.new_full((), LINEAR_MAX))
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


def _block_scales(values: Tensor) -> Tensor:
    """The largest magnitude of fp32 [rows, blocks, block], 0 below the floor, NaN if there is one: [rows, blocks].

    The bits of magnitudes, taken as integers, are in the order of the magnitudes with NaN on top; and on CPU integers
    are reduced faster, in short rows four times.
    """
    absmax = values.view(torch.int32).bitwise_and(0x7FFFFFFF).amax(-1).view(torch.float32)
    return absmax.masked_fill_(absmax < SCALE_FLOOR, 0.0)


def quantize(values: Tensor, *, codebook: Codebook, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize finite `values` [rows, cols] (any float dtype) -> codes [rows, cols], fp32 scales [rows, blocks]."""
    rows, cols = values.shape
    codes = torch.empty(rows, cols, dtype=CODE_DTYPES[codebook], device=values.device)
    scales = torch.empty(rows, num_blocks(cols, block_size), dtype=torch.float32, device=values.device)
    for r, c, b, size in _pieces(rows, cols, block_size):
        piece = values[r, c].float().unflatten(1, (-1, size)).contiguous()
        scale = _block_scales(piece)
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
    codes: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    grads: Sequence[Tensor],
    *,
    beta: float,
    nesterov: bool,
    codebook: Codebook | None,
    block_size: int,
) -> Tensor:
    """First phase: read only. What the step needs to know before it writes anything.

    Args:
        codes: stacks [count, rows, cols], int8 (linear), uint8 (dynamic) or fp32 (None).
        scales: stacks [count, rows, blocks], fp32; None with `codebook=None`.
        grads: stacks [count, rows, cols], fp32, bf16 or fp16, any strides.
        beta: momentum factor in [0, 1).

    Returns:
        fp32 [batch, rows, blocks], the sum of u squared; not finite where a gradient is not, or where squares overflow.
    """
    batch, rows, cols = batch_shape(codes)
    sumsq = torch.empty(batch, rows, num_blocks(cols, block_size), dtype=torch.float32, device=codes[0].device)
    out, old, new = sumsq.flatten(0, 1), Rows(codes), Rows(grads)
    old_scales = None if scales is None else Rows(scales)
    for r, c, b, size in _pieces(batch * rows, cols, block_size):
        scale = None if old_scales is None else old_scales[r, b].unsqueeze(-1)
        piece = (old[r, c].unflatten(1, (-1, size)), scale, new[r, c].unflatten(1, (-1, size)))
        m, scaled_grad = _momentum(*piece, beta, codebook)
        u = m.mul_(beta).add_(scaled_grad) if nesterov else m  # in place: fresh memory costs more than arithmetic
        out[r, b] = u.square_().sum(-1)
    return sumsq


def momentum_apply(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    grads: Sequence[Tensor],
    norms: Tensor,
    out: Tensor,
    *,
    beta: float,
    nesterov: bool,
    codebook: Codebook | None,
    block_size: int,
    skip: Tensor | None = None,
) -> None:
    """Second phase: recompute the same momentum and write codes, scales and the Newton-Schulz input.

    Args:
        codes, scales, grads: as in `momentum_stats`; codes and scales are overwritten with the new state.
        norms: fp32 [batch], the positive divisors of u (Frobenius norms, bounded below).
        out: [batch, rows, cols], any float dtype and strides; receives u / norm, divided in fp32, rounded once.
        skip: 0-d fp32; where it is not 0, nothing is written. Here the host waits for it.
    """
    if skip is not None and skip.item() != 0:
        return
    batch, rows, cols = batch_shape(codes)
    old, new, target = Rows(codes), Rows(grads), Rows([out])
    old_scales = None if scales is None else Rows(scales)
    row_norms = norms.repeat_interleave(rows).view(-1, 1, 1)
    for r, c, b, size in _pieces(batch * rows, cols, block_size):
        scale = None if old_scales is None else old_scales[r, b].unsqueeze(-1)
        piece = (old[r, c].unflatten(1, (-1, size)), scale, new[r, c].unflatten(1, (-1, size)))
        m, scaled_grad = _momentum(*piece, beta, codebook)
        u = scaled_grad.add_(m * beta) if nesterov else m
        target[r, c] = (u / row_norms[r]).flatten(1)
        if codebook is None or old_scales is None:
            old[r, c] = m.flatten(1)
            continue
        scale = _block_scales(m)
        old_scales[r, b] = scale
        old[r, c] = _encode(m, scale.unsqueeze(-1), codebook).flatten(1)
