"""The matrices of a step that lie on several ranks, each as this rank sees it, and what must be known of all parts.

Matrices of one parameter group that have one shape and lie alike form a batch, in an order that is the same on all
ranks: so is what they send each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, product
from typing import Any, NamedTuple, Protocol

import torch
from muon8bit_kernels import kernels_for
from torch import Tensor

from ..config import SECOND_MOMENT_KEY, SMALL_WORKSPACE_BYTES
from ..orthogonalize import NSMethod, choose_method, device_kind
from ..step.clipping import Clip, with_factor
from ..step.group_options import MuonOptions
from ..step.matrix_batches import MatrixBatch, ParamMatrices, are_zero, either
from ..step.momentum import Momentum, MomentumFormat
from ..step.muon import frobenius_norm, squares, stats_parts
from ..step.second_moment import SecondMoment, SecondMomentFormat
from .matrix_sharding import Region, Span
from .matrix_slots import MatrixSlot, matrix_slots
from .param_sharding import ParamSharding, Spans
from .planned_transfers import Matrix, MatrixStage


class ShardedMatrix(NamedTuple):
    """One matrix, as this rank sees it.

    Attributes:
        param_index, key: as in `ParamMatrices`.
        number: its place among the matrices of the parameter.
        stack: this rank's part of its momentum, with the gradient there, as a stack of one; None without one.
        param: this rank's part of the parameter, [1, rows, cols], with `flatten` [1, rows, ...]; None without one.
        first: index in the whole parameter of the first element of `param`.
        is_zero: of a matrix of a stack that is skipped where its gradient is zero: whether what this rank has of that
            is, of all of its pieces; 0-d bool. None for any other.
        second: this rank's part of its second moment, as a stack of one; None without one.
    """

    param_index: int
    key: int | None
    number: int
    stack: ParamMatrices | None
    param: Tensor | None
    first: int
    is_zero: Tensor | None
    second: SecondMoment | None


@dataclass
class ShardedBatch:
    """Matrices of one shape, sharding and format.

    Attributes:
        second: the format of second moments.
        sumsq, norms: squared norms of the whole matrices, and what divides them; of `Gathering`, fp32 [members].
        scales: of `Gathering`, where columns are cut the new scales of this rank's rows, fp32 [members, rows, blocks].
        idle: of `Gathering`, 1 for a matrix that no rank steps, else 0, fp32 [members]; None where all are stepped.
    """

    options: MuonOptions
    matrix: Matrix
    format: MomentumFormat
    second: SecondMomentFormat | None = None
    members: list[ShardedMatrix] = field(default_factory=list)
    clips: list[Clip] = field(default_factory=list)
    sumsq: Tensor = field(init=False)
    norms: Tensor = field(init=False)
    scales: Tensor | None = None
    idle: Tensor | None = None

    @property
    def blocks(self) -> int:
        """Return the number of blocks of the momentum in a whole row."""
        return -(-self.matrix.cols // self.format.block_size)

    def is_cut(self, region: Region) -> bool:
        """Return whether a part has but some of the columns."""
        return region.cols != (0, self.matrix.cols)

    def activity(self) -> list[Tensor]:
        """Return 1 where what this rank has of a gradient is not zero, else 0, as fp32 [members]; or nothing.

        It is there where idle matrices are skipped, on all ranks alike.
        """
        are_zero = [member.is_zero for member in self.members if member.is_zero is not None]
        return [1 - torch.stack(are_zero).float()] if are_zero else []

    def skip_of(self, numbers: Sequence[int]) -> Tensor | None:
        """Return None, or fp32, 0-d or one of each of these members: where it is not 0, nothing of that is written."""
        if self.idle is None:
            return self.options.skip
        return either(torch.stack([self.idle[number] for number in numbers]), self.options.skip)

    def set_norms(self, sumsq: Tensor) -> None:
        """Take the squared norms of the whole matrices, fp32 [members]."""
        self.sumsq = sumsq
        self.norms = frobenius_norm(sumsq, eps=self.options.eps, factor=self.options.coefficients.norm_factor)


class _LocalParam(Protocol):
    """The attributes of `step.local_params.LocalParam` that are read here."""

    @property
    def index(self) -> int: ...
    @property
    def key(self) -> int | None: ...
    @property
    def layout(self) -> ParamSharding | None: ...
    @property
    def local(self) -> Tensor: ...
    @property
    def grad(self) -> Tensor: ...
    @property
    def momentum(self) -> Momentum | None: ...
    @property
    def second(self) -> SecondMoment | None: ...


def group_into_batches(params: Sequence[_LocalParam], options: MuonOptions) -> list[ShardedBatch]:
    """Return the matrices of one group, by what they have in common."""
    batches: dict[Any, ShardedBatch] = {}
    for param in params:
        assert param.layout is not None
        assert param.momentum is not None
        format, device = param.momentum.format, device_kind(param.local.device)
        second = None if param.second is None else param.second.format
        zeros = _zero_matrices(param, param.layout) if options.skips_zero_slices and param.grad.ndim > 2 else None
        for slot in matrix_slots(param.layout, options.flatten, options.row_splits, second):
            rows = slot.rows[1] - slot.rows[0]
            if rows * slot.cols == 0:
                continue
            key = rows, slot.cols, id(slot.sharding), format
            if key not in batches:
                method = _method(rows, slot.cols, device, options)
                stage = MatrixStage.of(slot.cols, second, is_sign=options.sign_momentum)
                matrix = Matrix(rows, slot.cols, slot.sharding, method, stage)
                batches[key] = ShardedBatch(options, matrix, format, second)
            member, clip = _sharded_matrix(param, param.layout, param.momentum, slot, options)
            if zeros is not None:
                member = member._replace(is_zero=zeros[slot.lead])
            batches[key].members.append(member)
            batches[key].clips += [] if clip is None else [clip]
    return list(batches.values())


def _method(rows: int, cols: int, device: str, options: MuonOptions) -> NSMethod:
    """Return the method of one process with all these matrices, so that it is the same on any number of ranks."""
    together: dict[str, Any] = {
        "count": options.counts.get((rows, cols), 1),
        "budget_bytes": options.workspace_bytes - SMALL_WORKSPACE_BYTES,
        "rates": options.rates(device),
    }
    return choose_method(rows, cols, options.coefficients, device, options.ns_dtype, tiny=False, **together)


def _sharded_matrix(
    param: _LocalParam,
    sharding: ParamSharding,
    momentum: Momentum,
    slot: MatrixSlot,
    options: MuonOptions,
) -> tuple[ShardedMatrix, Clip | None]:
    """Return this rank's part of a matrix, and how its gradient is to be clipped."""
    rank, flatten = sharding.rank, momentum.format.flatten
    spans = sharding.param_parts[rank]
    momentum_part, param_part = slot.sharding.momentum_parts[rank], slot.sharding.param_parts[rank]
    stack = local = clip = None
    first = 0
    if param_part is not None:
        # Stochastic rounding draws the bits that one process would draw, by the index in the whole parameter.
        local = _cut(param.local, spans, slot, param_part, flatten)
        row = _flat_index((*slot.lead, slot.rows[0] + param_part.rows[0]), sharding.shape)
        first = row * slot.cols + param_part.cols[0]
    if momentum_part is not None:
        grad = _cut(param.grad, spans, slot, momentum_part, flatten)
        rows = _momentum(momentum, sharding.state_parts[rank], slot, momentum_part.rows, flatten)
        stack = ParamMatrices(param.index, param.key, 1, grad, grad, rows, 0, 0)
        if options.clip_matrix_norm is not None or options.grad_scale is not None or options.maximize:
            # Clipped are replicas alone, which are here whole, whatever part of the momentum is.
            whole = _cut(param.grad, spans, slot, param_part or momentum_part, flatten)
            clipped, clip = with_factor(stack._replace(grad=whole), options)
            stack = stack._replace(factor=clipped.factor)
    second = None if param.second is None else _second_moment(param.second, sharding, slot, param_part)
    number = _flat_index(slot.lead, sharding.shape)
    return ShardedMatrix(param.index, param.key, number, stack, local, first, None, second), clip


def _zero_matrices(param: _LocalParam, sharding: ParamSharding) -> dict[tuple[int, ...], Tensor]:
    """Return whether what this rank has of the gradient of each matrix of a stack is zero, 0-d bool, by its index.

    That is so too of a matrix of which it has nothing.
    """
    leads = [tuple(range(*span)) for span in sharding.param_parts[sharding.rank][:-2]]
    nothing = torch.ones((), dtype=torch.bool, device=param.grad.device)
    zeros = dict.fromkeys(product(*map(range, sharding.shape[:-2])), nothing)
    if param.grad.numel():
        zeros |= dict(zip(product(*leads), are_zero(param.grad).flatten().unbind(), strict=True))
    return zeros


def _local_rows(spans: Spans, slot: MatrixSlot, rows: Span, flatten: bool) -> tuple[tuple[int, ...], slice]:
    """Return the index of a matrix in the leading dimensions of this rank's tensor, and its rows there."""
    lead = tuple(index - span[0] for index, span in zip(slot.lead, spans, strict=False))
    offset = slot.rows[0] - (spans[0] if flatten else spans[-2])[0]
    return lead, slice(rows[0] + offset, rows[1] + offset)


def _cut(tensor: Tensor, spans: Spans, slot: MatrixSlot, region: Region, flatten: bool) -> Tensor:
    """Return a part of a matrix out of a parameter or gradient with these spans, [1, rows, cols] or [1, rows, ...]."""
    if not slot.lead and region.shape == tensor.shape:  # all of it, as most are
        return tensor.unsqueeze(0)
    lead, rows = _local_rows(spans, slot, region.rows, flatten)
    for index in lead:
        tensor = tensor[index]
    if not flatten and region.shape[1] < tensor.shape[1]:
        offset = spans[-1][0]
        tensor = tensor[:, region.cols[0] - offset : region.cols[1] - offset]
    return tensor[rows].unsqueeze(0)


def _momentum(momentum: Momentum, spans: Spans, slot: MatrixSlot, rows: Span, flatten: bool) -> Momentum:
    """Return these rows of a matrix out of a momentum with these spans, as a stack of one."""
    if not slot.lead and rows[1] - rows[0] == momentum.codes.shape[0]:  # all of it, as most are
        return momentum.as_matrices()
    lead, local_rows = _local_rows(spans, slot, rows, flatten)
    index = _flat_index(lead, [stop - start for start, stop in spans])
    return momentum.as_matrices().rows(slice(index, index + 1), local_rows)


def _second_moment(
    second: SecondMoment, sharding: ParamSharding, slot: MatrixSlot, part: Region | None
) -> SecondMoment | None:
    """Return what this rank has of the second moment of a matrix, as a stack of one."""
    rank, axis, flatten = sharding.rank, second.format.axis, second.format.flatten
    if axis == "element":
        if part is None:
            return None
        spans, rows = sharding.param_parts[rank], part.rows
    else:
        span = slot.sharding.vector_parts[rank]
        if span is None:
            return None
        shape, _ = second.format.layout(torch.Size(sharding.shape))[SECOND_MOMENT_KEY]
        spans = sharding.second_parts(SECOND_MOMENT_KEY, shape)[rank]
        if axis == "column":
            index = _flat_index(_local_rows(spans, slot, (0, 0), flatten)[0], [b - a for a, b in spans])
            piece = slot.piece - spans[-2][0]
            return second.as_matrices().rows(slice(index, index + 1), slice(0, 0), piece)
        rows = span
    lead, local_rows = _local_rows(spans, slot, rows, flatten)
    index = _flat_index(lead, [stop - start for start, stop in spans])
    return second.as_matrices().rows(slice(index, index + 1), local_rows, 0)


def _flat_index(index: Sequence[int], shape: Sequence[int]) -> int:
    """Return the place of an index in the first dimensions of a shape, counted through."""
    flat = 0
    for place, size in zip(index, shape, strict=False):
        flat = flat * size + place
    return flat


def sums_of_squares(batch: ShardedBatch, region: Region) -> list[Tensor]:
    """Return the `muon.squares` of what this rank holds of the matrices, fp32 [members, rows, blocks].

    Where its columns are not all, and quantized, the largest magnitudes of the blocks that they touch come second.
    """
    sums, maxima = list[Tensor](), list[Tensor]()
    members = [member.stack for member in batch.members if member.stack is not None]
    for _, run in groupby(members, key=lambda stack: stack.layout):  # where strides differ a kernel cannot take both
        for part in stats_parts(MatrixBatch(list(run), batch.options)):
            if batch.is_cut(region):
                tensors = part.codes, part.scales or None, part.grads()
                kernels = kernels_for(part.device, part.options.backend)
                numbers = kernels.momentum_stats_cut(*tensors, first_col=region.cols[0], **part.averaging)
                sums.append(numbers[0])
                maxima.append(numbers[1])
            else:
                sums.append(squares(part))
    has_scales = maxima and batch.format.codebook is not None
    return [torch.cat(sums), torch.cat(maxima)] if has_scales else [torch.cat(sums)]
