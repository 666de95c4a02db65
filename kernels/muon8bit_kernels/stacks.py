"""Lists of stacks: what a kernel call works on.

A stack is a view [count, rows, cols] of one tensor: a matrix is a stack of one, a tensor of experts one of many. A call
takes a list of stacks of equal rows and columns for each argument, and numbers their matrices through: a batch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


def batch_shape(stacks: Sequence[Tensor]) -> tuple[int, int, int]:
    """Number of matrices in all stacks, their rows and their columns."""
    return sum(len(stack) for stack in stacks), stacks[0].shape[1], stacks[0].shape[2]


class Rows:
    """The rows of a list of stacks, numbered through, as if they were those of one matrix.

    Rows of one tensor are read as a view, those of several as a copy; what is assigned goes to where the rows lie.
    """

    def __init__(self, stacks: Sequence[Tensor]) -> None:
        self._parts: list[Tensor] = []
        for stack in stacks:
            if len(stack) == 1 or stack.stride(0) == stack.shape[1] * stack.stride(1):
                self._parts.append(stack.flatten(0, 1))
            else:
                self._parts.extend(stack.unbind(0))
        self._starts = list(accumulate((len(part) for part in self._parts), initial=0))

    def _views(self, rows: slice, cols: slice) -> list[Tensor]:
        first = bisect_right(self._starts, rows.start) - 1
        views = []
        for part, start in zip(self._parts[first:], self._starts[first:], strict=False):
            if start >= rows.stop:
                break
            views.append(part[max(rows.start - start, 0) : rows.stop - start, cols])
        return views

    def __getitem__(self, where: tuple[slice, slice]) -> Tensor:
        views = self._views(*where)
        return views[0] if len(views) == 1 else torch.cat(views)

    def __setitem__(self, where: tuple[slice, slice], values: Tensor) -> None:
        views = self._views(*where)
        for view, piece in zip(views, values.split([len(view) for view in views]), strict=True):
            if view.data_ptr() != piece.data_ptr():
                view.copy_(piece)
