"""Lists of stacks: the matrices that a kernel call works on.

A stack is a view [count, rows, cols] of one tensor: a matrix is a stack of one, a tensor of experts one of many. A call
takes a list of stacks of equal rows and columns for each argument, and numbers their matrices through: a batch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


def batch_shape(stacks: Sequence[Tensor]) -> tuple[int, int, int]:
    """Return the number of matrices in all stacks, their rows and their columns."""
    return sum(len(stack) for stack in stacks), stacks[0].shape[1], stacks[0].shape[2]


def elements_at_once(device: torch.device) -> int:
    """Return how many elements one pass of the reference works on, which bounds its fp32 temporaries.

    On a CPU they stay in a core's cache. On CUDA every operation of a pass is a launch: of 2^24 elements it takes tens
    of microseconds, several times what the host needs for it.
    """
    return 2**24 if device.type == "cuda" else 2**19


def known_flag(skip: Tensor | None, rows: int) -> tuple[bool, Tensor | None]:
    """Return whether the host knows that nothing is to be written, and the flags as `StackedRows.write` takes them.

    There are none where the host knows that everything is.

    Args:
        skip: None, fp32 0-d, or [matrices].
        rows: of each matrix.
    """
    if skip is None:
        return False, None
    if skip.device.type == "cpu":
        num_skipped = int(skip.count_nonzero())
        if num_skipped in (0, skip.numel()):
            return num_skipped > 0, None
    return False, skip if skip.ndim == 0 else skip.repeat_interleave(rows).unsqueeze(1)


class StackedRows:
    """Rows of a list of stacks, numbered through, as if they were those of one matrix."""

    def __init__(self, stacks: Sequence[Tensor]) -> None:
        self._parts: list[Tensor] = []
        for stack in stacks:
            if stack.shape[0] == 1 or stack.stride(0) == stack.shape[1] * stack.stride(1):
                self._parts.append(stack.flatten(0, 1))
            else:
                self._parts.extend(stack.unbind(0))
        self._starts = list(accumulate((part.shape[0] for part in self._parts), initial=0))

    def _views(self, rows: slice, cols: slice) -> list[Tensor]:
        """Return views of these rows and columns, tensor by tensor."""
        first, last = bisect_right(self._starts, rows.start) - 1, bisect_left(self._starts, rows.stop)
        views = self._parts[first:last]
        if cols.stop - cols.start < views[0].shape[1]:
            views = [view[:, cols] for view in views]
        if rows.stop < self._starts[last]:
            views[-1] = views[-1][: rows.stop - self._starts[last - 1]]
        if rows.start > self._starts[first]:
            views[0] = views[0][rows.start - self._starts[first] :]
        return views

    def in_place(self, rows: slice) -> Tensor | None:
        """Return these rows, whole, as one view; None where they lie in several tensors."""
        views = self._views(rows, slice(0, self._parts[0].shape[1]))
        return views[0] if len(views) == 1 else None

    def read(self, rows: slice, cols: slice, out: Tensor, *, factor: float | None = None) -> Tensor:
        """Copy to `out` [rows, cols] of any dtype, multiplied there by `factor`, and return it."""
        views = self._views(rows, cols)
        # First turned where it lies column by column in another dtype: torch does both at once up to 4 times as slowly.
        views = [v.contiguous() if v.dtype != out.dtype and v.stride(1) != 1 else v for v in views]
        if len(views) > 1:
            torch.cat(views, out=out)
        elif factor is not None and views[0].dtype == out.dtype:
            return torch.mul(views[0], factor, out=out)
        else:
            out.copy_(views[0])
        return out if factor is None else out.mul_(factor)

    def write(self, rows: slice, cols: slice, values: Tensor, skip: Tensor | None = None) -> None:
        """Copy `values` [rows, cols], of any dtype, to where the rows lie; where `skip` is not 0, nothing.

        `skip` is 0-d, or [n, 1] for all n rows of the stacks.
        """
        views = self._views(rows, cols)
        if skip is not None:
            old = views[0] if len(views) == 1 else torch.cat(views)
            written = (skip if skip.ndim == 0 else skip[rows]) == 0
            values = torch.where(written, values.to(old.dtype), old)
        if len(views) == 1:
            views[0].copy_(values)
        else:  # converted at once: that runs on all cores
            torch._foreach_copy_(views, values.to(views[0].dtype).split([view.shape[0] for view in views]))
