"""Second moments of matrices on several ranks: their parts go to the owner, which normalizes O; the results come back.

    v, V  ->  owner:   normalize(O, v)   of the whole matrix, as one process does
    factors, new scales  ->  every rank that wants a part of O;   new v  ->  who keeps it

They travel in front of what a round sends anyway: v and V before X, the results before O.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..step.matrix_batches import as_matrices, copy_back
from ..step.muon import lr_ratio, update_params_
from ..step.second_moment import Normalization, SecondMoment, SecondMomentFormat, update_arguments, write_
from .collectives import Kept, PendingExchange
from .matrix_sharding import Region, Span
from .planned_transfers import PlannedTransfer
from .sharded_batch import ShardedBatch, ShardedMatrix

# Bytes, so that what follows in a message lies where its dtype may.
_ALIGNMENT = 16


def padding(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return what is sent behind the second moments to one rank."""
    surplus = -sum(tensor.nbytes for tensor in tensors) % _ALIGNMENT
    return [torch.empty(surplus, dtype=torch.uint8, device=device)] if surplus else []


def moment_padding(owned: Sequence[PlannedTransfer], rank: int) -> int:
    """Return the bytes of what a rank sends behind the second moments of these matrices to their owner."""
    return -sum(plan.moment_bytes_of(rank) for plan in owned) % _ALIGNMENT


def moment_bytes(owned: Sequence[PlannedTransfer], rank: int) -> int:
    """Return the bytes of second moments that a rank sends to the owner of these matrices, with what is behind them."""
    return sum(plan.moment_bytes_of(rank) for plan in owned) + moment_padding(owned, rank)


def sent_moment(plan: PlannedTransfer, second: SecondMoment | None, rank: int) -> list[Tensor]:
    """Return what a rank sends of the second moment of a matrix to its owner."""
    return second.tensors[::-1] if second is not None and rank in plan.moment_sources else []


class MomentParts(NamedTuple):
    """Parts of the second moment of one matrix, as its owner got them: by region scales, if any, and values."""

    plan: PlannedTransfer
    parts: Mapping[Region, Sequence[Tensor]]

    @classmethod
    def read(cls, plan: PlannedTransfer, received: PendingExchange | Kept) -> MomentParts:
        """Read the parts of one matrix, which are the next ones of their ranks."""
        parts = {
            region: [received.read(rank, shape, dtype) for shape, dtype in plan.moment_shapes(region)]
            for rank, region in plan.moment_sources.items()
        }
        return cls(plan, parts)

    def assembled(self, format: SecondMomentFormat) -> SecondMoment:
        """Return the second moment of the whole matrix, as a stack of one."""
        (rows, cols, *_), axis, first = self.plan.matrix, format.axis, next(iter(self.parts.values()))
        if len(self.parts) == 1:
            *scales, values = (tensor.unsqueeze(0) for tensor in first)
            return SecondMoment(values, scales[0] if scales else None, format)
        shape = 1 if axis == "column" else rows, 1 if axis == "row" else cols
        values = first[-1].new_empty(1, *shape)
        scales = [first[0].new_empty(1, rows, first[0].shape[1])] if len(first) > 1 else []
        for region, tensors in self.parts.items():
            values[0][region.slices] = tensors[-1]
            for whole in scales:
                whole[0, slice(*region.rows)] = tensors[0]
        return SecondMoment(values, scales[0] if scales else None, format)


def results_for(plan: PlannedTransfer, found: Normalization, number: int, rank: int) -> list[Tensor]:
    """Return what a rank gets of the normalization of one matrix, number `number` of a batch: `result_shapes`."""
    results, stage = list[Tensor](), plan.matrix.stage
    if rank in plan.targets and stage is not None:
        region, factors = plan.targets[rank], found.factors[number]
        rows = slice(*region.rows)
        if stage.axis == "row":
            factors = factors[rows]
        results.append(factors[:, slice(*region.cols)] if stage.axis == "column" else factors)
        if stage.blocks and found.new is not None:
            results.append(found.new[number, rows])
    if rank in plan.vector_holders and found.new is not None:
        results.append(found.new[number][plan.vector_holders[rank].slices])
    return [result.contiguous() for result in results]


class ReceivedNormalization(NamedTuple):
    """Numbers of the normalization of one matrix that a rank has got, fp32.

    Attributes:
        factors: of its part of O, [rows, 1], [1, cols] or [1, 1]; None where it has none.
        scales: of the second moment of elements, the new ones of its rows [rows, blocks]; None where it is fp32.
        vector: the new second moment of rows [rows, 1] or columns [1, cols] that it keeps, or None.
    """

    factors: Tensor | None
    scales: Tensor | None
    vector: Tensor | None

    @classmethod
    def read(cls, plan: PlannedTransfer, rank: int, received: PendingExchange | Kept) -> ReceivedNormalization:
        """Read what this rank gets for one matrix, copied: what it was received with is let go part by part."""
        results = [received.read(plan.owner, shape, torch.float32).clone() for shape in plan.result_shapes(rank)]
        vector = results.pop() if rank in plan.vector_holders else None
        factors, scales = (*results, None, None)[:2]
        return cls(factors, scales, vector)


def write_vectors(batch: ShardedBatch, numbers: Sequence[int], received: Sequence[ReceivedNormalization]) -> None:
    """Write the new second moments of rows or columns of these members of a batch, where this rank keeps any."""
    moments = [second for number in numbers if (second := batch.members[number].second) is not None]
    vectors = [one.vector for one in received if one.vector is not None]
    if vectors:
        write_(moments, torch.stack(vectors), batch.skip_of(numbers))


class PartialUpdate(NamedTuple):
    """Normalization of some rows of this rank's parts of matrices, for one launch.

    Attributes:
        arguments: what `update_params` takes.
        moments, new: what `write_` takes.
    """

    arguments: dict[str, Any]
    moments: list[SecondMoment]
    new: Tensor | None

    @classmethod
    def of(
        cls,
        batch: ShardedBatch,
        numbers: Sequence[int],
        received: Sequence[ReceivedNormalization],
        rows: Span,
        region: Region,
    ) -> PartialUpdate:
        """Take these rows, counted in this rank's part `region`, of these members of a batch."""
        options, here = batch.options.second_moment, slice(*rows)
        assert options is not None
        assert batch.second is not None
        factors = torch.stack([one.factors for one in received if one.factors is not None])
        if batch.second.axis != "element":
            return cls({"factors": factors[:, here] if batch.second.axis == "row" else factors}, [], None)
        seconds = [second for number in numbers if (second := batch.members[number].second) is not None]
        moments = [second.rows(slice(0, 1), here, 0) for second in seconds]
        scales = [one.scales[here] for one in received if one.scales is not None]
        new = torch.stack(scales) if scales else None
        arguments = update_arguments(Normalization(factors, new), moments, options, region.cols[0])
        return cls(arguments, moments, new)


def update_members(
    members: list[ShardedMatrix],
    directions: list[Tensor],
    batch: ShardedBatch,
    rows: Span,
    numbers: list[int],
    partial: PartialUpdate | None,
) -> None:
    """Update these rows of the parts of these parameters, scaled by the whole shape.

    Args:
        members: the matrices.
        directions: stacks [count, rows, cols] of as many matrices.
        batch: theirs.
        rows: counted in the part.
        numbers: of the matrices in the batch.
        partial: how their directions are normalized.
    """
    matrix, options, skip = batch.matrix, batch.options, batch.skip_of(numbers)
    how = dict[str, Any]() if partial is None else partial.arguments
    if members[0].key is not None:
        keys, firsts = [member.key for member in members], [m.first + rows[0] * matrix.cols for m in members]
        how |= {"keys": keys, "firsts": firsts, "pitch": matrix.cols}
    views = [member.param[:, slice(*rows)] for member in members if member.param is not None]
    params = as_matrices(views)
    update_params_(params, directions, lr_ratio(matrix.rows, matrix.cols, options.adjust_lr_fn), options, skip, **how)
    if partial is not None and partial.moments:
        write_(partial.moments, partial.new, skip)
    if params is not views:
        copy_back(views, params)
