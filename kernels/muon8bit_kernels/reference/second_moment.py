"""Sums over orthogonalized directions in torch, from which their second moments follow; see `element_moment`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..batches import StackedRows, elements_at_once
from ..element_moment import ElementMoment


def direction_squares(directions: Tensor, *, columns: bool) -> Tensor:
    """Return the sums of squares of each row, fp32 [batch, rows], or with `columns` of each column, [batch, cols].

    Args:
        directions: [batch, rows, cols], fp32, bf16 or fp16, any strides.
        columns: add over the rows.
    """
    batch, rows, cols = directions.shape
    sums = torch.zeros(batch, cols if columns else rows, dtype=torch.float32, device=directions.device)
    at_once = elements_at_once(directions.device)
    num_rows = max(1, min(rows, at_once // max(1, cols)))
    num_matrices = max(1, at_once // max(1, rows * cols))
    for first in range(0, batch, num_matrices):
        matrices = slice(first, first + num_matrices)
        for start in range(0, rows, num_rows):
            r = slice(start, start + num_rows)
            values = directions[matrices, r].to(torch.float32, copy=True).square_()
            if columns:
                sums[matrices] += values.sum(1)
            else:
                sums[matrices, r] = values.sum(2)
    return sums


def second_moment_stats(directions: Tensor, moment: ElementMoment) -> Tensor:
    """Return what must be known of whole matrices before their second moments are written; nothing is.

    Args:
        directions: O, [batch, rows, cols], fp32, bf16 or fp16, any strides.
        moment: of whole rows.

    Returns:
        fp32 [3, batch, rows, blocks]: of each block the sum of O'^2, the sum of O^2, and the largest sqrt(V).
    """
    batch, rows, cols = directions.shape
    num_blocks, device, every = -(-cols // moment.block_size), directions.device, slice(0, cols)
    found = torch.empty(3, batch * rows, num_blocks, dtype=torch.float32, device=device)
    num_rows, towards = min(batch * rows, max(1, elements_at_once(device) // max(1, cols))), StackedRows([directions])
    buffer, room = torch.empty(num_rows, cols, dtype=torch.float32, device=device), moment.room(num_rows, cols)
    for start in range(0, batch * rows, num_rows):
        r = slice(start, min(start + num_rows, batch * rows))
        O = towards.read(r, every, buffer[: r.stop - start])  # noqa: E741
        V, roots = moment.averaged(r, O, room)
        found[2, r] = _by_block(roots, moment.block_size, torch.amax)
        found[1, r] = _by_block(torch.mul(O, O, out=V), moment.block_size, torch.sum)
        found[0, r] = _by_block(moment.divide_(O, roots).square_(), moment.block_size, torch.sum)
    return found.view(3, batch, rows, num_blocks)


def _by_block(values: Tensor, size: int, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Reduce the blocks of values [rows, cols]: [rows, blocks]."""
    full = values.shape[1] // size * size
    parts = [reduce(values[:, :full].unflatten(1, (-1, size)), 2)] if full else []
    if full < values.shape[1]:
        parts.append(reduce(values[:, full:], 1).unsqueeze(1))
    return torch.cat(parts, 1)
