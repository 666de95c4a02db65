"""The matrices of a step: which parameter, or piece of one, each is, and which go through the kernels together.

A parameter of three or more dimensions is a stack of matrices over its last two, or, with `flatten`, one matrix of
its first dimension by all others. `split_sizes` cuts each matrix into pieces that are orthogonalized and scaled by
their own shape.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .momentum import Momentum


class ParamMatrices(NamedTuple):
    """Matrices of one parameter, or one piece of each of them.

    `param` and `grad` are views [num_matrices, rows, cols], with `flatten` [1, rows, ...]. `param_index` is the
    parameter's place in its group. `key` draws the bits of stochastic rounding, None rounds to nearest; `first` is the
    index in the parameter of the first element here, `pitch` the distance of its matrices there, in elements.
    `factor`: None, or what this step multiplies the gradient by, fp32 [num_matrices, 1, 1 or cols].
    """

    param_index: int
    key: int | None
    num_matrices: int
    param: Tensor
    grad: Tensor
    momentum: Momentum
    first: int
    pitch: int
    factor: Tensor | None = None

    def matrices(self, start: int, stop: int) -> ParamMatrices:
        """A part of the stack."""
        part = self.momentum.part(slice(start, stop), slice(None))
        return self._replace(
            num_matrices=stop - start,
            param=self.param[start:stop],
            grad=self.grad[start:stop],
            momentum=part,
            first=self.first + start * self.pitch,
            factor=None if self.factor is None else self.factor[start:stop],
        )

    @property
    def layout(self) -> Hashable:
        """Equal for what can go through a kernel together."""
        param, grad = self.param, self.grad
        strides = param.stride()[1:], grad.stride()[1:]
        return param.shape[1:], strides, param.dtype, grad.dtype, param.device, self.momentum.format, self.key is None


@dataclass(frozen=True)
class MatrixBatch:
    """Stacks of one shape and layout; and `sumsq` of their matrices, fp32 [count]: the squared norms of the
    Newton-Schulz inputs, not finite where the gradient is not, or its norm overflows."""

    stacks: list[ParamMatrices]
    sumsq: Tensor

    @property
    def momenta(self) -> list[Momentum]:
        """The momentum of each stack."""
        return [stack.momentum for stack in self.stacks]

    @property
    def grads(self) -> list[Tensor]:
        """The gradient of each stack, as `gradients` gives it."""
        return gradients(self.stacks)

    def on(self, tensors: Sequence[Tensor] | None) -> MatrixBatch:
        """With the momenta in `tensors`; see `momenta_on`."""
        return MatrixBatch(momenta_on(self.stacks, tensors), self.sumsq)

    def copied(self) -> MatrixBatch:
        """With copies of the momenta, so that what is written there changes no state."""
        return self.on([tensor.clone() for tensor in momentum_tensors(self.stacks)])

    def take(self, other: MatrixBatch) -> None:
        """Write the momenta of the same matrices as `copied` has them; nothing where they are these."""
        if other is not self:
            torch._foreach_copy_(momentum_tensors(self.stacks), momentum_tensors(other.stacks))

    def split(self, size: int) -> Iterator[MatrixBatch]:
        """Its matrices in their order, `size` at a time."""
        done = 0
        for stacks in chunks(self.stacks, size):
            count = sum(stack.num_matrices for stack in stacks)
            yield MatrixBatch(stacks, self.sumsq[done : done + count])
            done += count


def momentum_tensors(stacks: Iterable[ParamMatrices]) -> list[Tensor]:
    """Codes and scales of each stack, as `momenta_on` takes them."""
    return [tensor for stack in stacks for tensor in stack.momentum.tensors]


def momenta_on(stacks: list[ParamMatrices], tensors: Sequence[Tensor] | None) -> list[ParamMatrices]:
    """The stacks with their momenta in other tensors of the same shapes, as `momentum_tensors` orders them; with None
    as they are."""
    if tensors is None:
        return stacks
    given = iter(tensors)
    return [stack._replace(momentum=stack.momentum.on(given)) for stack in stacks]


def chunks(stacks: list[ParamMatrices], size: int) -> Iterator[list[ParamMatrices]]:
    """Cut into lists of `size` matrices in all, the last of fewer."""
    chunk: list[ParamMatrices] = []
    room = size
    for stack in stacks:
        start = 0
        while start < stack.num_matrices:
            stop = min(start + room, stack.num_matrices)
            chunk.append(stack if stop - start == stack.num_matrices else stack.matrices(start, stop))
            start, room = stop, room - (stop - start)
            if room == 0:
                yield chunk
                chunk, room = [], size
    if chunk:
        yield chunk


def stacks_of(
    index: int, param: Tensor, grad: Tensor, momentum: Momentum, group: dict[str, Any], key: int | None, first: int = 0
) -> Iterator[ParamMatrices]:
    """The stacks of one parameter; none of a parameter without elements. `first`: where these are some matrices of a
    larger parameter, the index there of their first element."""
    if param.numel() == 0:
        return
    whole = momentum.stack()
    num_matrices, num_rows, cols = whole.codes.shape
    matrices = row = 0
    for view, grad_view in zip(cut(param, group), cut(grad, group), strict=True):
        count, rows = view.shape[:2]
        part = whole
        if (count, rows) != (num_matrices, num_rows):
            part = whole.part(slice(matrices, matrices + count), slice(row, row + rows))
        start = first + (matrices * num_rows + row) * cols
        yield ParamMatrices(index, key, count, view, grad_view, part, start, num_rows * cols)
        row += rows
        if row == num_rows:
            matrices, row = matrices + count, 0


def cut(tensor: Tensor, group: dict[str, Any]) -> list[Tensor]:
    """Parameter or gradient -> views [count, rows, cols], with `flatten` [1, rows, ...]."""
    stacks = _stacks(tensor, group["flatten"])
    if group["split_sizes"] is None or group["split_dim"] != -2:
        return stacks
    return [piece for stack in stacks for piece in stack.split(group["split_sizes"], 1)]


def _stacks(tensor: Tensor, flatten: bool) -> list[Tensor]:
    if flatten or tensor.ndim == 2:
        return [tensor.unsqueeze(0)]
    if tensor.ndim == 3:
        return [tensor]
    return [stack for part in tensor.unbind(0) for stack in _stacks(part, flatten)]


def gradients(stacks: Iterable[ParamMatrices]) -> list[Tensor]:
    """Return the gradients as a step uses them, [count, rows, cols]: copies where they have a factor.

    A copy has the gradient's dtype, but fp32 for fp16, in which what a GradScaler has scaled up may vanish.
    """
    grads = []
    for stack in stacks:
        (grad,) = flat([stack.grad])
        if stack.factor is not None:
            grad = (grad * stack.factor).to(torch.float32 if grad.dtype == torch.float16 else grad.dtype)
        grads.append(grad)
    return grads


def flat(stacks: Iterable[Tensor]) -> list[Tensor]:
    """Stacks of parameters or gradients as [count, rows, cols]; of a channels_last convolution a copy."""
    return [stack if stack.ndim == 3 else stack.flatten(2) for stack in stacks]
