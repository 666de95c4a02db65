"""Second moment of each element of a batch of directions O, and its arithmetic of record in torch.

    V      =  (code * step)^2,  step = scale / 255
    V      =  beta2 * V + (1 - beta2) * O^2
    O'     =  O / (sqrt(V) + eps)   or   O / sqrt(max(V, eps)),   0 where that divisor is 0
    code'  =  max(rint(sqrt(V) * (255 / scale')), 1 where V > 0),   scale' = max sqrt(V) of the block

Codes are unsigned, and linear in the square root: the second moment of orthogonalized directions spans few powers of
two. The code 0, by which a direction would be divided, stands for 0 alone. Every operation is rounded to fp32, none is
fused.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from .batches import StackedRows

SQRT_MAX = 255.0


class Room(NamedTuple):
    """Memory of one pass, since fresh memory costs more than arithmetic: fp32 [2, rows, cols] and fp64 [rows, cols]."""

    narrow: Tensor
    wide: Tensor


class ElementMoment(NamedTuple):
    """Second moments of a batch, stored as codes of their square roots, or in fp32.

    Attributes:
        codes: stacks [count, rows, cols], uint8, or the fp32 second moments; any strides.
        steps: fp32 [batch, rows, blocks], the square root that a code of 1 stands for; None where it is fp32.
        beta2: the factor of the exponential moving average, in [0, 1).
        eps: what is added to the square root, or, with `is_clamped`, bounds the second moment from below.
        is_clamped: the form of eps.
        block_size: the number of elements of a row that share a scale, and, also of fp32, a sum.
        first_col: the column of whole rows that is the first one here.
    """

    codes: Sequence[Tensor]
    steps: Tensor | None
    beta2: float
    eps: float
    is_clamped: bool
    block_size: int
    first_col: int = 0

    def room(self, num_rows: int, cols: int) -> Room:
        """Return the memory that the methods below use for so many rows at once."""
        device = self.codes[0].device
        narrow = torch.empty(2, num_rows, cols, dtype=torch.float32, device=device)
        return Room(narrow, torch.empty(num_rows, cols, dtype=torch.float64, device=device))

    def averaged(self, rows: slice, directions: Tensor, room: Room) -> tuple[Tensor, Tensor]:
        """Return the new second moment of some rows and its root, fp32 [rows, cols].

        Args:
            rows: of all matrices, numbered through.
            directions: O, fp32 [rows, cols].
            room: from `room`, for so many rows or more.
        """
        V, squares = (buffer[: len(directions)] for buffer in room.narrow)
        V = StackedRows(self.codes).read(rows, slice(0, directions.shape[1]), V)
        if self.steps is not None:
            V.mul_(self._by_column(self.steps, rows, V.shape[1])).square_()
        V.mul_(self.beta2).add_(torch.mul(directions, directions, out=squares).mul_(1.0 - self.beta2))
        return V, root(V, squares, room.wide[: len(directions)])

    def divide_(self, directions: Tensor, roots: Tensor) -> Tensor:
        """Divide directions in place by the roots of their second moments, which are lost; by 0 they become 0.

        The root of a bounded number is the bounded root, since roots are correctly rounded.
        """
        if self.is_clamped:
            roots.clamp_(min=sqrt(torch.tensor(self.eps, dtype=torch.float32).item()))
        else:
            roots.add_(self.eps)
        return directions.div_(roots if self.eps > 0 else roots.masked_fill_(roots == 0, torch.inf))

    def write_and_divide_(
        self, rows: slice, directions: Tensor, inverses: Tensor | None, skip: Tensor | None, room: Room
    ) -> None:
        """Write the new second moments of some rows, and divide their directions, fp32 [rows, cols], in place.

        Args:
            rows: of all matrices, numbered through.
            directions: O, then O'.
            inverses: fp32 [batch, rows, blocks], 255 over the new scales, 0 where these are 0; None where it is fp32.
            skip: 0-d fp32, or [rows of all matrices, 1]; where it is not 0, nothing is written.
            room: as in `averaged`.
        """
        V, roots = self.averaged(rows, directions, room)
        if inverses is not None:
            codes = torch.mul(roots, self._by_column(inverses, rows, V.shape[1]), out=V).round_()
            signs = room.wide.view(-1).view(torch.float32)[: roots.numel()].view(roots.shape)
            V = torch.maximum(codes, torch.sign(roots, out=signs), out=V)
        StackedRows(self.codes).write(rows, slice(0, V.shape[1]), V, skip)
        self.divide_(directions, roots)

    def _by_column(self, blocks: Tensor, rows: slice, cols: int) -> Tensor:
        """Return numbers of blocks [batch, rows, blocks] for the columns of some rows, [rows, cols or 1]."""
        of_rows = blocks.flatten(0, 1)[rows]
        if of_rows.shape[1] == 1:
            return of_rows
        columns = torch.arange(self.first_col, self.first_col + cols, device=blocks.device)
        return of_rows[:, columns // self.block_size]


def steps_of(scales: Tensor) -> Tensor:
    """Return the square roots that codes of 1 stand for, of fp32 scales."""
    # By a tensor: on CUDA torch multiplies by the reciprocal of a number.
    return scales / torch.tensor(SQRT_MAX, device=scales.device)


def inverses_of(scales: Tensor) -> Tensor:
    """Return 255 over fp32 scales, by which roots become codes; 0 where these are 0."""
    return torch.where(scales > 0, SQRT_MAX / scales, 0)


def root(values: Tensor, out: Tensor | None = None, wide: Tensor | None = None) -> Tensor:
    """Return the square roots of fp32 values, correctly rounded, in `out` if it is given.

    On CPUs torch takes those of a vector library, a fifth of which are neighbours. Rounded from fp64 they are right:
    no root of an fp32 number lies that close to the middle of two. `wide` is room for these.
    """
    out = torch.empty_like(values) if out is None else out
    if values.device.type != "cpu":
        return torch.sqrt(values, out=out)
    wide = values.double() if wide is None else wide.copy_(values)
    return out.copy_(wide.sqrt_())
