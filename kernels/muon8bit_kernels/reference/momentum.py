"""Arithmetic of record in torch: quantize, dequantize and the two-phase momentum step.

Every operation is rounded to fp32 and none is fused, so the Triton kernels give the same codes, scales and momentum bit
for bit. The momentum step takes lists of stacks (see `batches`); a block is `block_size` consecutive elements of one
row, the last of a row may be shorter. `codebook=None` means an unquantized fp32 momentum: `codes` are the buffers,
`scales` is None.

    m      = beta * ((code * s) / 127) + (1 - beta) * g          dynamic: beta * (map[code] * s) + ...
    s'     = max |m| over the block, 0 if that is below the smallest normal fp32
    code'  = rint((m / s') * 127)                                dynamic: the nearest map entry to m / s'
    u      = beta * m + (1 - beta) * g  if nesterov else  m      what Newton-Schulz sees
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..batches import StackedRows, batch_shape, elements_at_once, known_flag
from ..codebooks import (
    CODE_DTYPES,
    LINEAR_MAX,
    SCALE_FLOOR,
    Codebook,
    dynamic_guesses,
    dynamic_map,
)


def num_blocks(cols: int, block_size: int) -> int:
    """Return the number of blocks in a row of `cols` elements: ceil(cols / block_size)."""
    return -(-cols // block_size)


class _Piece(NamedTuple):
    """Rows of a matrix, columns and blocks of equally long blocks in them, and the blocks' length."""

    rows: slice
    cols: slice
    blocks: slice
    block: int

    def of(self, buffer: Tensor) -> Tensor:
        """Return room for the piece in a flat buffer: [rows, cols]."""
        num_rows, num_cols = self.rows.stop - self.rows.start, self.cols.stop - self.cols.start
        return buffer[: num_rows * num_cols].view(num_rows, num_cols)


def _pieces(rows: int, cols: int, block_size: int, device: torch.device) -> Iterator[_Piece]:
    """Give all of a matrix, in pieces as large as one pass takes on the device."""
    full = cols // block_size * block_size
    step = max(1, elements_at_once(device) // max(1, cols))
    for start in range(0, rows, step):
        row_range = slice(start, min(start + step, rows))
        if full:
            yield _Piece(row_range, slice(0, full), slice(0, full // block_size), block_size)
        if full < cols:
            yield _Piece(row_range, slice(full, cols), slice(full // block_size, full // block_size + 1), cols - full)


def _buffers(num: int, rows: int, cols: int, device: torch.device) -> Tensor:
    """Return fp32 [num, elements], room for any piece of [rows, cols] or of some of its columns.

    The pieces use it one after the other: fresh memory costs more than arithmetic.
    """
    size = min(rows * cols, max(elements_at_once(device), cols))
    return torch.empty(num, size, device=device, dtype=torch.float32)


def _decode_(values: Tensor, scales: Tensor, codebook: Codebook) -> Tensor:
    """Decode codes, given as fp32 numbers [rows, blocks, block], in place; the scales are [rows, blocks]."""
    if codebook == "linear":
        # A tensor, since on CUDA torch replaces division by a Python number by multiplication with its reciprocal.
        return values.mul_(scales.unsqueeze(-1)).div_(scales.new_full((), LINEAR_MAX))
    torch.index_select(dynamic_map(values.device), 0, values.int().view(-1), out=values.view(-1))
    return values.mul_(scales.unsqueeze(-1))


def _encode_(values: Tensor, scales: Tensor, codebook: Codebook) -> Tensor:
    """Return the codes, as numbers, of fp32 values [rows, blocks, block], which are lost.

    The scales are [rows, blocks] and floored.
    """
    ratio = values.div_(scales.masked_fill(scales == 0, torch.inf).unsqueeze(-1))
    if codebook == "linear":
        return ratio.mul_(LINEAR_MAX).round_()
    # On CPU `index_select` by int32 from a small table is several times as fast as indexing.
    guesses, midpoints = dynamic_guesses(values.device)
    index = (ratio.view(torch.int32).view(-1) >> 16).add_(32768)
    codes = guesses.index_select(0, index)
    codes += ratio.view(-1) > midpoints.index_select(0, index)
    return codes.view(values.shape)


def _block_scales(values: Tensor) -> Tensor:
    """Return the largest magnitude of each block of fp32 [rows, blocks, block]: [rows, blocks].

    It is 0 below the floor, and NaN where the block has one. The bits of magnitudes, taken as integers, are in the
    order of the magnitudes with NaN on top; and on CPU integers are reduced faster, in short rows four times.
    """
    absmax = values.view(torch.int32).bitwise_and(0x7FFFFFFF).amax(-1).view(torch.float32)
    return absmax.masked_fill_(absmax < SCALE_FLOOR, 0.0)


def quantize(values: Tensor, *, codebook: Codebook, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize finite `values` [rows, cols] (any float dtype) -> codes [rows, cols], fp32 scales [rows, blocks]."""
    rows, cols = values.shape
    codes = torch.empty(rows, cols, dtype=CODE_DTYPES[codebook], device=values.device)
    scales = torch.empty(rows, num_blocks(cols, block_size), dtype=torch.float32, device=values.device)
    (buffer,) = _buffers(1, rows, cols, values.device)
    for piece in _pieces(rows, cols, block_size, values.device):
        copy = piece.of(buffer).copy_(values[piece.rows, piece.cols]).unflatten(1, (-1, piece.block))
        scales[piece.rows, piece.blocks] = scale = _block_scales(copy)
        codes[piece.rows, piece.cols] = _encode_(copy, scale, codebook).flatten(1)
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor, *, codebook: Codebook, block_size: int) -> Tensor:
    """Decode codes [rows, cols] and fp32 scales [rows, blocks] -> fp32 [rows, cols]."""
    rows, cols = codes.shape
    values = torch.empty(rows, cols, dtype=torch.float32, device=codes.device)
    (buffer,) = _buffers(1, rows, cols, codes.device)
    for piece in _pieces(rows, cols, block_size, codes.device):
        copy = piece.of(buffer).copy_(codes[piece.rows, piece.cols]).unflatten(1, (-1, piece.block))
        values[piece.rows, piece.cols] = _decode_(copy, scales[piece.rows, piece.blocks], codebook).flatten(1)
    return values


@dataclass(frozen=True)
class _State:
    """Tensors and numbers of one momentum step; see `momentum_stats`."""

    codes: StackedRows
    scales: StackedRows | None
    grads: StackedRows
    beta: float
    codebook: Codebook | None

    def momentum(self, piece: _Piece, m: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return the new momentum m and (1 - beta) * g of one piece, in these flat buffers: [rows, blocks, block]."""
        shape = (-1, piece.block)
        m = self.codes.read(piece.rows, piece.cols, piece.of(m)).unflatten(1, shape)
        if self.scales is not None and self.codebook is not None:
            scales = m.new_empty(m.shape[:2])
            _decode_(m, self.scales.read(piece.rows, piece.blocks, scales), self.codebook)
        g = self.grads.read(piece.rows, piece.cols, piece.of(g), factor=1.0 - self.beta).unflatten(1, shape)
        return m.mul_(self.beta).add_(g), g


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
    """Compute the first phase of the step, which reads only: all that the step must know before it writes.

    Args:
        codes: stacks [count, rows, cols], int8 (linear), uint8 (dynamic) or fp32 (None).
        scales: stacks [count, rows, blocks], fp32; None with `codebook=None`.
        grads: stacks [count, rows, cols], fp32, bf16 or fp16, any strides.
        beta: the momentum factor in [0, 1).
        nesterov: u is beta * m + (1 - beta) * g instead of m.
        codebook: `"linear"`, `"dynamic"`, or None for an fp32 momentum.
        block_size: the number of elements that share a scale.

    Returns:
        fp32 [batch, rows, blocks], the sum of u squared; not finite where a gradient is not, or where squares overflow.
    """
    batch, rows, cols = batch_shape(codes)
    sumsq = torch.empty(batch, rows, num_blocks(cols, block_size), dtype=torch.float32, device=codes[0].device)
    state = _State(
        StackedRows(codes), None if scales is None else StackedRows(scales), StackedRows(grads), beta, codebook
    )
    buffers = _buffers(2, batch * rows, cols, sumsq.device)
    for piece in _pieces(batch * rows, cols, block_size, sumsq.device):
        m, scaled_grad = state.momentum(piece, *buffers)
        u = m.mul_(beta).add_(scaled_grad) if nesterov else m
        sumsq.flatten(0, 1)[piece.rows, piece.blocks] = u.square_().sum(-1)
    return sumsq


def momentum_apply(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    grads: Sequence[Tensor],
    norms: Tensor | None,
    out: Tensor | None,
    *,
    beta: float,
    nesterov: bool,
    codebook: Codebook | None,
    block_size: int,
    skip: Tensor | None = None,
    signs: bool = False,
) -> None:
    """Write codes, scales and the Newton-Schulz input from the same momentum, recomputed: the second phase of the step.

    Args:
        codes, scales, grads, beta, nesterov, codebook, block_size: as in `momentum_stats`. Codes and scales are
            overwritten with the new state.
        norms: fp32 [batch], the positive divisors of u (Frobenius norms, bounded below); None without `out`.
        out: [batch, rows, cols], any float dtype and strides; receives u * (1 / norm), in fp32, rounded once. With None
            codes and scales alone are written.
        skip: fp32, 0-d or [batch], one a matrix; where it is not 0, nothing is written, `out` neither.
        signs: `out` receives the sign of u, -1, 0 or 1, instead; it may be int8.

    Raises:
        ValueError: if `norms` or `out` alone is None.
    """
    if (norms is None) != (out is None):
        raise ValueError("norms and out go together: give both, or None for both")
    batch, rows, cols = batch_shape(codes)
    is_over, skip = known_flag(skip, rows)
    if is_over:
        return
    state = _State(
        StackedRows(codes), None if scales is None else StackedRows(scales), StackedRows(grads), beta, codebook
    )
    buffers = _buffers(2 if out is None else 3, batch * rows, cols, codes[0].device)
    if norms is not None and out is not None:
        inverses = norms.reciprocal().clamp_(max=torch.finfo(torch.float32).max)  # a zero momentum stays zero
        row_inverses, target = inverses.repeat_interleave(rows).view(-1, 1, 1), StackedRows([out])
    for piece in _pieces(batch * rows, cols, block_size, codes[0].device):
        m, scaled_grad = state.momentum(piece, *buffers[:2])
        if out is not None:
            u = piece.of(buffers[2]).view(m.shape)
            blended = torch.mul(m, beta, out=u).add_(scaled_grad) if nesterov else m
            if signs:
                torch.sign(blended, out=u)
            else:
                torch.mul(blended, row_inverses[piece.rows], out=u)
            target.write(piece.rows, piece.cols, u.flatten(1), skip)
        if state.scales is not None and codebook is not None:
            scale = _block_scales(m)
            state.scales.write(piece.rows, piece.blocks, scale, skip)
            m = _encode_(m, scale, codebook)
        state.codes.write(piece.rows, piece.cols, m.flatten(1), skip)
