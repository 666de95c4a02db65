"""Matrices of a step: which parameter, or piece of one, each is, and which go through the kernels together.

A parameter of three or more dimensions holds matrices over its last two, or, with `flatten`, one matrix of its first
dimension by all others. `split_sizes` cuts each matrix into pieces that are orthogonalized and scaled by their own
shape: pieces of rows are matrices here, pieces of columns are cut while a batch is stepped.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..orthogonalize import Partition
from .group_options import MuonOptions
from .momentum import Momentum
from .second_moment import SecondMoment


class ParamMatrices(NamedTuple):
    """Matrices of one parameter, or one piece of each of them.

    Attributes:
        param_index: the parameter's place in its group.
        key: the hash key of stochastic rounding; None rounds to nearest.
        num_matrices: their number.
        param, grad: views [num_matrices, rows, cols], with `flatten` [1, rows, ...].
        momentum: the momentum as matrices.
        first: the index in the parameter of the first element here.
        pitch: the distance of the matrices in the parameter, in elements.
        factor: None, or the numbers that this step multiplies the gradient by, fp32 [num_matrices, 1, 1 or cols].
        idle: fp32 [num_matrices], 1 for a matrix that this step leaves as it is, else 0; None where all are stepped.
        second: the second moment as matrices, or None.
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
    idle: Tensor | None = None
    second: SecondMoment | None = None

    def matrices(self, start: int, stop: int) -> ParamMatrices:
        """Return views of some of them."""
        return self._replace(
            num_matrices=stop - start,
            param=self.param[start:stop],
            grad=self.grad[start:stop],
            momentum=self.momentum.rows(slice(start, stop), slice(None)),
            first=self.first + start * self.pitch,
            factor=None if self.factor is None else self.factor[start:stop],
            idle=None if self.idle is None else self.idle[start:stop],
            second=None if self.second is None else self.second.matrices(start, stop),
        )

    @property
    def layout(self) -> Hashable:
        """Return a key that is equal for matrices that can go through a kernel together."""
        param, grad = self.param, self.grad
        strides = param.stride()[1:], grad.stride()[1:]
        return param.shape[1:], strides, param.dtype, grad.dtype, param.device, self.momentum.format, self.key is None


class MatrixBatch:
    """Matrices of one shape and layout, as the kernels take them: lists of tensors [count, rows, cols].

    Args:
        members: the matrices; all lists are in their order.
        options: their group's.
        sumsq: squared norms of the Newton-Schulz inputs, fp32 [num_matrices], not finite where the gradient is not, or
            its norm overflows. With None it is made here, for the first phase to fill.
        partition: how the second phase goes.
        norms: what divides the Newton-Schulz inputs, fp32 [num_matrices], once the second phase has begun.
        skip: from then on None, or fp32, 0-d or [num_matrices]; where it is not 0, nothing is written.
        is_staged: the momenta here are copies that are written back when the step has used them.

    Attributes:
        codes: int8, uint8, or fp32 where the momentum is not quantized.
        scales: fp32 [count, rows, blocks]; empty where the momentum is not quantized.
        momentum_tensors: codes and scales, as `with_tensors` takes them.
        second_moments: as matrices; none where the group has none.
        num_matrices: the number of matrices in all lists together.
        rows, cols: the shape of each matrix.
        averaging: how the kernels average the momenta, and in which format these are.
    """

    def __init__(
        self,
        members: Sequence[ParamMatrices],
        options: MuonOptions,
        sumsq: Tensor | None = None,
        partition: Partition | None = None,
        norms: Tensor | None = None,
        skip: Tensor | None = None,
        *,
        is_staged: bool = False,
    ) -> None:
        first = members[0]
        self.members, self.options, self.partition, self.is_staged = members, options, partition, is_staged
        self.norms, self.skip = norms, skip
        self.format, self.device, self.has_factors = first.momentum.format, first.grad.device, first.factor is not None
        self.codes = [member.momentum.codes for member in members]
        self.scales = [member.momentum.scales for member in members if member.momentum.scales is not None]
        self.momentum_tensors = [*self.codes, *self.scales]
        self.second_moments = [member.second for member in members if member.second is not None]
        form = {"codebook": self.format.codebook, "block_size": self.format.block_size}
        self.averaging: dict[str, Any] = {"beta": options.momentum, "nesterov": options.nesterov, **form}
        self.num_matrices = sum(member.num_matrices for member in members)
        _, self.rows, self.cols = self.codes[0].shape
        if sumsq is None:
            sumsq = torch.empty(self.num_matrices, dtype=torch.float32, device=self.device)
        self.sumsq = sumsq

    @property
    def state_tensors(self) -> list[Tensor]:
        """Return the tensors of the momenta and of the second moments, as `with_tensors` takes them."""
        return [*self.momentum_tensors, *(tensor for moment in self.second_moments for tensor in moment.tensors)]

    def with_tensors(self, tensors: Sequence[Tensor] | None = None, *, is_staged: bool = False) -> MatrixBatch:
        """Return the same batch with its momenta, or all of its state, in other tensors of the same shapes.

        With None these are copies of its momenta.
        """
        if tensors is None:
            tensors = [tensor.clone() for tensor in self.momentum_tensors]
        num_codes, num_tensors = len(self.codes), len(self.momentum_tensors)
        pairs = zip_longest(tensors[:num_codes], tensors[num_codes:num_tensors])
        momenta = [Momentum(codes, scales, self.format) for codes, scales in pairs]
        members = [m._replace(momentum=momentum) for m, momentum in zip(self.members, momenta, strict=True)]
        if len(tensors) > num_tensors:
            rest = iter(tensors[num_tensors:])
            members = [m._replace(second=m.second and m.second.with_tensors(rest)) for m in members]
        how = self.sumsq, self.partition, self.norms, self.skip
        return MatrixBatch(members, self.options, *how, is_staged=is_staged)

    def skip_idle(self) -> None:
        """Add the flags of idle matrices to `skip`."""
        idle = [
            self.sumsq.new_zeros(member.num_matrices) if member.idle is None else member.idle for member in self.members
        ]
        self.skip = either(torch.cat(idle), self.skip)

    def grads(self) -> list[Tensor]:
        """Return the gradients as a step uses them, [count, rows, cols]; they are copies where they have a factor.

        A copy has the gradient's dtype, but fp32 for fp16, in which a number that a GradScaler has scaled up may
        vanish.
        """
        grads = [member.grad if member.grad.ndim == 3 else member.grad.flatten(2) for member in self.members]
        factors = [member.factor for member in self.members if member.factor is not None]
        if not factors:
            return grads
        dtype = torch.float32 if grads[0].dtype == torch.float16 else grads[0].dtype
        return [(grad * factor).to(dtype) for grad, factor in zip(grads, factors, strict=True)]

    def random_bits(self, first_column: int = 0) -> dict[str, Any]:
        """Return the numbers on which random bits depend, as the kernels take them, for columns from `first_column` on.

        It is empty where parameters are rounded to nearest.
        """
        keys = [member.key for member in self.members if member.key is not None for _ in range(member.num_matrices)]
        if not keys:
            return {}
        firsts = [m.first + i * m.pitch + first_column for m in self.members for i in range(m.num_matrices)]
        return {"keys": keys, "firsts": firsts, "pitch": self.cols}

    def split(self, size: int) -> list[MatrixBatch]:
        """Cut into batches of at most `size` matrices, in their order."""
        if size >= self.num_matrices:
            return [self]
        parts, members, first, room = [], [], 0, size
        for member in self.members:
            start = 0
            while start < member.num_matrices:
                stop = min(start + room, member.num_matrices)
                members.append(member.matrices(start, stop) if stop - start < member.num_matrices else member)
                start, room = stop, room - (stop - start)
                if room == 0:
                    parts.append(self._part(members, slice(first, first + size)))
                    members, first, room = [], first + size, size
        if members:
            parts.append(self._part(members, slice(first, None)))
        return parts

    def _part(self, members: Sequence[ParamMatrices], numbers: slice) -> MatrixBatch:
        """Return a batch of some of the matrices."""
        norms = None if self.norms is None else self.norms[numbers]
        skip = self.skip if self.skip is None or self.skip.ndim == 0 else self.skip[numbers]
        return MatrixBatch(members, self.options, self.sumsq[numbers], self.partition, norms, skip)


def either(flags: Tensor, flag: Tensor | None) -> Tensor:
    """Return which of these fp32 flags are set, or all where the 0-d one is."""
    return flags if flag is None else torch.maximum(flags, flag)


def are_zero(grads: Tensor) -> Tensor:
    """Return which matrices of [..., rows, cols] are all zero, bool [...], on their device; a NaN is not zero.

    On a CPU the norm takes 50 times as long as both ends, of which neither makes copies.
    """
    if grads.device.type == "cpu":
        return (grads.amax((-2, -1)) == 0) & (grads.amin((-2, -1)) == 0)
    largest: Tensor = torch.linalg.vector_norm(grads, torch.inf, (-2, -1))
    return largest == 0


def group_into_batches(matrices: Iterable[ParamMatrices], options: MuonOptions) -> list[MatrixBatch]:
    """Return batches of matrices that can go through the kernels together, in the order of first appearance."""
    alike: dict[Hashable, list[ParamMatrices]] = {}
    for member in matrices:
        alike.setdefault(member.layout, []).append(member)
    return [MatrixBatch(members, options) for members in alike.values()]


def matrices_of(
    index: int,
    param: Tensor,
    grad: Tensor,
    momentum: Momentum,
    options: MuonOptions,
    key: int | None,
    first: int = 0,
    second: SecondMoment | None = None,
) -> list[ParamMatrices]:
    """Return the matrices of one parameter; none for a parameter without elements.

    Args:
        index: the parameter's place in its group.
        param, grad: its tensors.
        momentum: its momentum.
        options: its group's.
        key: the hash key of stochastic rounding; None rounds to nearest.
        first: where these are some matrices of a larger parameter, the index there of their first element.
        second: its second moment, or None.
    """
    if param.numel() == 0:
        return []
    whole, second, idle = momentum.as_matrices(), second and second.as_matrices(), None
    num_matrices, num_rows, cols = whole.codes.shape
    if options.skips_zero_slices and param.ndim > 2:
        idle = are_zero(grad).float().flatten()
    found, matrix, row, piece = [], 0, 0, 0
    for view, grad_view in _cut(param, grad, options):
        count, rows = view.shape[:2]
        part = whole
        if (count, rows) != (num_matrices, num_rows):
            part = whole.rows(slice(matrix, matrix + count), slice(row, row + rows))
        start = first + (matrix * num_rows + row) * cols
        flags = None if idle is None else idle[matrix : matrix + count]
        moment = second and second.rows(slice(matrix, matrix + count), slice(row, row + rows), piece)
        of = ParamMatrices(index, key, count, view, grad_view, part, start, num_rows * cols, idle=flags, second=moment)
        found.append(of)
        row, piece = row + rows, piece + 1
        if row == num_rows:
            matrix, row, piece = matrix + count, 0, 0
    return found


def _cut(param: Tensor, grad: Tensor, options: MuonOptions) -> list[tuple[Tensor, Tensor]]:
    """Return views of parameter and gradient, [count, rows, cols], with `flatten` [1, rows, ...]."""
    if options.flatten or param.ndim == 2:
        views = [(param.unsqueeze(0), grad.unsqueeze(0))]
    elif param.ndim == 3:
        views = [(param, grad)]
    else:
        return [of for pair in zip(param.unbind(0), grad.unbind(0), strict=True) for of in _cut(*pair, options)]
    if options.row_splits is None:
        return views
    return [of for pair in views for of in zip(*(t.split(options.row_splits, 1) for t in pair), strict=True)]


def as_matrices(views: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return parameters [count, rows, ...] as [count, rows, cols], to be written: themselves, or for `copy_back`."""
    return views if views[0].ndim == 3 else [view.flatten(2) for view in views]


def copy_back(views: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """Copy what was written from `as_matrices` to the parameters, where it is not in their memory."""
    for view, param in zip(views, params, strict=True):
        if param.data_ptr() != view.data_ptr():
            view.copy_(param.view(view.shape))
