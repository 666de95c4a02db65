"""The matrices of a step: which parameter, or piece of one, each is, and which go through the kernels together.

A parameter of three or more dimensions is a stack of matrices over its last two, or, with `flatten`, one matrix of
its first dimension by all others. `split_sizes` cuts each matrix into pieces that are orthogonalized and scaled by
their own shape.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .state import Momentum


@dataclass(frozen=True, eq=False)
class Stack:
    """Matrices of one parameter, or one piece of each of them.

    `param` and `grad` are views [count, rows, cols], with `flatten` [1, rows, ...]. `key` draws the bits of stochastic
    rounding, None rounds to nearest; `first` is the index of the first element in the parameter, `pitch` the distance
    of its matrices there, in elements.
    """

    name: str
    param: Tensor
    grad: Tensor
    momentum: Momentum
    key: int | None
    first: int
    pitch: int

    def __len__(self) -> int:
        return len(self.param)

    @property
    def bucket_key(self) -> Hashable:
        """Equal for what can go through a kernel together."""
        layouts = [(t.shape[1:], t.stride()[1:], t.dtype) for t in (self.param, self.grad)]
        return *layouts[0], *layouts[1], self.param.device, self.momentum.format, self.key is None

    def matrices(self, which: slice) -> Stack:
        """A part of the stack."""
        start, stop, _ = which.indices(len(self))
        part = self.momentum.part(slice(start, stop), slice(None))
        first = self.first + start * self.pitch
        return replace(self, param=self.param[start:stop], grad=self.grad[start:stop], momentum=part, first=first)

    def firsts(self, offset: int = 0) -> list[int]:
        """The index in the parameter of element [0, offset] of each matrix."""
        return [self.first + i * self.pitch + offset for i in range(len(self))]


@dataclass(frozen=True)
class Bucket:
    """Stacks of one shape and layout, and what the first phase found: `sumsq`, fp32 [batch], the squared norms of
    their Newton-Schulz inputs; not finite where the gradient is not, or its norm overflows."""

    stacks: list[Stack]
    sumsq: Tensor

    def batches(self, size: int) -> Iterator[Bucket]:
        """Its matrices in their order, `size` at a time."""
        start = 0
        for stacks in chunks(self.stacks, size):
            stop = start + sum(map(len, stacks))
            yield Bucket(stacks, self.sumsq[start:stop])
            start = stop


def chunks(stacks: Sequence[Stack], size: int) -> Iterator[list[Stack]]:
    """Cut into lists of `size` matrices in all, the last of fewer."""
    chunk: list[Stack] = []
    room = size
    for stack in stacks:
        start = 0
        while start < len(stack):
            part = stack.matrices(slice(start, start + room))
            chunk.append(part)
            start, room = start + len(part), room - len(part)
            if room == 0:
                yield chunk
                chunk, room = [], size
    if chunk:
        yield chunk


def stacks_of(
    name: str, param: Tensor, grad: Tensor, momentum: Momentum, group: dict[str, Any], key: int | None
) -> Iterator[Stack]:
    """The stacks of one parameter; none of a parameter without elements."""
    if param.numel() == 0:
        return
    whole = momentum.stack()
    _, num_rows, cols = whole.codes.shape
    sizes = group["split_sizes"] if group["split_dim"] == -2 else None
    done = 0
    for part, part_grad in zip(*(_as_stacks(t, group["flatten"]) for t in (param, grad)), strict=True):
        row = 0
        for size in sizes or (num_rows,):
            rows = slice(row, row + size)
            piece = whole.part(slice(done, done + len(part)), rows)
            first = (done * num_rows + row) * cols
            yield Stack(name, part[:, rows], part_grad[:, rows], piece, key, first, num_rows * cols)
            row += size
        done += len(part)


def _as_stacks(tensor: Tensor, flatten: bool) -> list[Tensor]:
    """Views [count, rows, cols] of the matrices of `tensor`, in order; with `flatten` [1, rows, ...]."""
    if flatten or tensor.ndim == 2:
        return [tensor.unsqueeze(0)]
    if tensor.ndim == 3:
        return [tensor]
    return [stack for part in tensor.unbind(0) for stack in _as_stacks(part, flatten)]


def flat(stacks: Sequence[Stack], name: str) -> list[Tensor]:
    """Parameters or gradients as [count, rows, cols]; of a channels_last convolution a copy."""
    return [getattr(stack, name).flatten(2) for stack in stacks]
