"""Momentum step of matrices of which there are only some columns here, in torch.

Blocks lie on the grid of the whole matrix, so that one may be cut: the largest magnitudes of its parts are known here,
its scale only when they have been compared. Otherwise the step is `reference.momentum`, to the bit. Codes and gradients
are stacks [count, rows, width], columns `first_col` onwards of the matrix; scales are those of whole rows, [count,
rows, blocks].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..batches import StackedRows, batch_shape, known_flag
from ..codebooks import Codebook
from .momentum import _block_scales, _buffers, _encode_, _Piece, _pieces, _State


def touched_blocks(first_col: int, width: int, block_size: int) -> slice:
    """Return the blocks of a whole row that these columns lie in."""
    return slice(first_col // block_size, -(-(first_col + width) // block_size))


def _cut(first_col: int, width: int, block_size: int) -> Iterator[tuple[slice, slice]]:
    """Give columns here with their blocks of the row: the rest of a cut block, then all that begin with a block."""
    head = min(-first_col % block_size, width)
    for cols in (slice(0, head), slice(head, width)):
        if cols.stop > cols.start:
            yield cols, touched_blocks(first_col + cols.start, cols.stop - cols.start, block_size)


def _walk(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    grads: Sequence[Tensor],
    beta: float,
    codebook: Codebook | None,
    first_col: int,
    block_size: int,
) -> Iterator[tuple[_State, _Piece, slice, int, Tensor, Tensor]]:
    """Give the state and each piece of it, with its momentum.

    Yields:
        The state, the piece, its columns here, its first block in the row, and m and (1 - beta) * g there.
    """
    batch, rows, width = batch_shape(codes)
    buffers = _buffers(2, batch * rows, width, codes[0].device)
    for cols, blocks in _cut(first_col, width, block_size):
        here = [[t[..., cols] for t in stacks] for stacks in (codes, grads)]
        of_blocks = None if scales is None else StackedRows([t[..., blocks] for t in scales])
        state = _State(StackedRows(here[0]), of_blocks, StackedRows(here[1]), beta, codebook)
        for piece in _pieces(batch * rows, cols.stop - cols.start, block_size, codes[0].device):
            m, scaled_grad = state.momentum(piece, *buffers)
            there = slice(cols.start + piece.cols.start, cols.start + piece.cols.stop)
            yield state, piece, there, blocks.start + piece.blocks.start, m, scaled_grad


def momentum_stats_cut(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    grads: Sequence[Tensor],
    *,
    first_col: int,
    beta: float,
    nesterov: bool,
    codebook: Codebook | None,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Compute the first phase of the step, which reads only.

    Args:
        codes, scales, grads, beta, nesterov, codebook, block_size: as in `reference.momentum_stats`.
        first_col: the place of these columns in the whole matrix.

    Returns:
        Two of fp32 [batch, rows, touched blocks], for the part of each touched block: the sum of u squared, not finite
        where a gradient is not; and the largest magnitude of m, 0 if that is below the smallest normal fp32.
    """
    batch, rows, width = batch_shape(codes)
    touched = touched_blocks(first_col, width, block_size)
    shape = 2, batch * rows, touched.stop - touched.start
    sums, maxima = torch.empty(shape, dtype=torch.float32, device=codes[0].device)
    walk = _walk(codes, scales, grads, beta, codebook, first_col, block_size)
    for _, piece, _, block, m, scaled_grad in walk:
        where = piece.rows, slice(block - touched.start, block - touched.start + m.shape[1])
        maxima[where] = _block_scales(m)
        u = m.mul_(beta).add_(scaled_grad) if nesterov else m
        sums[where] = u.square_().sum(-1)
    return sums.view(batch, rows, -1), maxima.view(batch, rows, -1)


def momentum_apply_cut(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    grads: Sequence[Tensor],
    new_scales: Tensor | None,
    norms: Tensor,
    out: Tensor,
    *,
    first_col: int,
    beta: float,
    nesterov: bool,
    codebook: Codebook | None,
    block_size: int,
    skip: Tensor | None = None,
    signs: bool = False,
) -> None:
    """Write codes, scales and the Newton-Schulz input: the second phase of the step.

    Args:
        codes, scales, grads, beta, nesterov, codebook, block_size: as in `reference.momentum_apply`.
        new_scales: fp32 [batch, rows, blocks], the maxima of whole blocks; None with `codebook=None`.
        norms: fp32 [batch], the positive divisors of u.
        out: [batch, rows, width], any float dtype and strides.
        first_col: the place of these columns in the whole matrix.
        skip: fp32, 0-d or [batch], one a matrix; where it is not 0, nothing is written, `out` neither.
        signs: `out` receives the sign of u, -1, 0 or 1, instead; it may be int8.
    """
    _, rows, _ = batch_shape(codes)
    is_over, skip = known_flag(skip, rows)
    if is_over:
        return
    inverses = norms.reciprocal().clamp_(max=torch.finfo(torch.float32).max)
    row_inverses, target = inverses.repeat_interleave(rows).view(-1, 1, 1), StackedRows([out])
    of_rows = None if new_scales is None else new_scales.flatten(0, 1)
    for state, piece, cols, block, m, scaled_grad in _walk(codes, scales, grads, beta, codebook, first_col, block_size):
        u = (m * beta).add_(scaled_grad) if nesterov else m.clone()
        u = u.sign_() if signs else u.mul_(row_inverses[piece.rows])
        target.write(piece.rows, cols, u.flatten(1), skip)
        if of_rows is not None and codebook is not None:
            m = _encode_(m, of_rows[piece.rows, block : block + m.shape[1]], codebook)
        state.codes.write(piece.rows, piece.cols, m.flatten(1), skip)
    if scales is not None and of_rows is not None:
        StackedRows(scales).write(slice(0, len(of_rows)), slice(0, of_rows.shape[1]), of_rows, skip)
