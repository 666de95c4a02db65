"""The matrices of a step that lie on several ranks, each as this rank sees it, and what must be known of all parts.

Matrices of one parameter group that have one shape and lie alike form a bundle, in an order that is the same on all
ranks: so is what travels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..config import Options
from ..orthogonalize import Coefficients, choose_method, device_kind, resolve_coefficients
from ..step import momentum
from ..step.clipping import Clip, with_factor
from ..step.matrix_batches import ParamMatrices, chunks, gradients
from ..step.momentum import Momentum, MomentumFormat
from ..step.update import frobenius_norm
from .assignment import Matrix
from .matrix_sharding import Region, Span
from .param_sharding import ParamSharding, Spans
from .places import MatrixSlot, places


class ShardedMatrix(NamedTuple):
    """One matrix. `held`: this rank's part of its momentum with the gradient there, a stack of one; `param`: its part
    of the parameter, [1, rows, cols], with `flatten` [1, rows, ...]; None without such a part. `param_index` and `key`
    as in `ParamMatrices`; `first`: index in the whole parameter of the first element of `param`."""

    param_index: int
    key: int | None
    held: ParamMatrices | None
    param: Tensor | None
    first: int


@dataclass
class ShardedBatch:
    """Matrices of one shape, spread and format. From `gather`: `sumsq` and `norms`, fp32 [members], and where columns
    are cut `scales`, fp32 [members, rows, blocks], the new ones of this rank's rows."""

    group: dict[str, Any]
    group_index: int
    matrix: Matrix
    format: MomentumFormat
    coefficients: Coefficients
    members: list[ShardedMatrix]
    norms: Tensor
    sumsq: Tensor
    scales: Tensor | None = None
    clips: list[Clip] = field(default_factory=list)

    @property
    def blocks(self) -> int:
        """Blocks of the momentum in a whole row."""
        return -(-self.matrix.cols // self.format.block_size)

    @property
    def average(self) -> dict[str, Any]:
        """How the momentum is averaged."""
        return {"beta": self.group["momentum"], "nesterov": self.group["nesterov"]}

    def settle(self, sumsq: Tensor) -> None:
        """Take the squared norms of the whole matrices, fp32 [members]."""
        self.sumsq = sumsq
        self.norms = frobenius_norm(sumsq, eps=self.group["eps"], factor=self.coefficients.norm_factor)


class MatrixPart(Protocol):
    """A parameter that lies on several ranks, with this rank's tensors: momentum as held, the others as wanted."""

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


def bundled(
    parts: Sequence[MatrixPart], group: dict[str, Any], group_index: int, options: Options
) -> list[ShardedBatch]:
    """The matrices of one group, sorted into bundles."""
    coefficients = resolve_coefficients(group["ns_coefficients"], group["ns_steps"])
    found: dict[Any, ShardedBatch] = {}
    for part in parts:
        assert part.layout is not None
        assert part.momentum is not None
        kind, format = device_kind(part.local.device), part.momentum.format
        for place in places(part.layout, group["flatten"], group["split_sizes"]):
            rows, sharding = place.rows[1] - place.rows[0], place.sharding
            if rows * place.cols == 0:
                continue
            key = rows, place.cols, id(sharding), format
            if key not in found:
                method = choose_method(rows, place.cols, coefficients, kind, options.ns_dtype, tiny=False)
                matrix = Matrix(rows, place.cols, sharding, method)
                none = torch.empty(0, dtype=torch.float32, device=part.local.device)
                found[key] = ShardedBatch(group, group_index, matrix, format, coefficients, [], none, none)
            member, clip = _member(part, part.layout, part.momentum, place, group, options)
            found[key].members.append(member)
            found[key].clips += [] if clip is None else [clip]
    return list(found.values())


def _member(
    part: MatrixPart,
    layout: ParamSharding,
    momentum: Momentum,
    place: MatrixSlot,
    group: dict[str, Any],
    options: Options,
) -> tuple[ShardedMatrix, Clip | None]:
    rank, flatten = layout.rank, momentum.format.flatten
    held_region, wanted_region = place.sharding.held[rank], place.sharding.wanted[rank]
    wanted, held, first, clip = None, None, 0, None
    if wanted_region is not None:
        wanted = _cut(part.local, layout.wanted[rank], place, wanted_region, flatten)
        shape = layout.shape[:1] if flatten else layout.shape[:-1]
        index = (*place.lead, place.rows[0] + wanted_region.rows[0])
        row = sum(i * prod(shape[dim + 1 :]) for dim, i in enumerate(index))
        first = row * place.cols + wanted_region.cols[0]
    if held_region is not None:
        grad = _cut(part.grad, layout.wanted[rank], place, held_region, flatten)
        of_part = _momentum(momentum, layout.held[rank], place, held_region.rows, flatten)
        held = ParamMatrices(part.index, part.key, 1, grad, grad, of_part, 0, 0)
        # Clipped are replicas alone, which are here whole, whatever part of the momentum is.
        whole = _cut(part.grad, layout.wanted[rank], place, wanted_region or held_region, flatten)
        of_whole, clip = with_factor(held._replace(grad=whole), group, options)
        held = held._replace(factor=of_whole.factor)
    return ShardedMatrix(part.index, part.key, held, wanted, first), clip


def _local_rows(spans: Spans, place: MatrixSlot, rows: Span, flatten: bool) -> tuple[tuple[int, ...], slice]:
    """Where rows of a matrix lie in this rank's tensor: its index in the leading dimensions, and the rows there."""
    lead = tuple(index - span[0] for index, span in zip(place.lead, spans, strict=False))
    offset = place.rows[0] - (spans[0] if flatten else spans[-2])[0]
    return lead, slice(rows[0] + offset, rows[1] + offset)


def _cut(tensor: Tensor, spans: Spans, place: MatrixSlot, region: Region, flatten: bool) -> Tensor:
    """The region of a matrix out of a parameter or gradient with these spans: [1, rows, cols] or [1, rows, ...]."""
    lead, rows = _local_rows(spans, place, region.rows, flatten)
    for index in lead:
        tensor = tensor[index]
    if not flatten and region.cols[1] - region.cols[0] < tensor.shape[1]:
        offset = spans[-1][0]
        tensor = tensor[:, region.cols[0] - offset : region.cols[1] - offset]
    return tensor[rows].unsqueeze(0)


def _momentum(momentum: Momentum, spans: Spans, place: MatrixSlot, rows: Span, flatten: bool) -> Momentum:
    """The part of these rows of a matrix, as a stack of one."""
    lead, where = _local_rows(spans, place, rows, flatten)
    sizes = [stop - start for start, stop in spans]
    index = sum(i * prod(sizes[dim + 1 : len(lead)]) for dim, i in enumerate(lead))
    return momentum.stack().part(slice(index, index + 1), where)


def runs(members: Sequence[ShardedMatrix]) -> Iterator[list[ParamMatrices]]:
    """What this rank holds of them, cut where strides differ: each run can go through a kernel together."""
    stacks = [member.held for member in members if member.held is not None]
    for _, run in groupby(stacks, key=lambda stack: stack.layout):
        yield list(run)


def sums_of_squares(bundle: ShardedBatch, region: Region, options: Options) -> list[Tensor]:
    """fp32 [members, rows, blocks] of the region that this rank holds of them: `state.stats` of their momenta; and
    where its columns are not all, and quantized, the largest magnitudes of the blocks that they touch."""
    found: list[list[Tensor]] = [[], []]
    for stacks in runs(bundle.members):
        size = max(1, options.workspace_bytes // (4 * prod(stacks[0].grad.shape[1:])))
        for chunk in chunks(stacks, size):
            momenta, grads = [stack.momentum for stack in chunk], gradients(chunk)
            if is_cut(region, bundle.matrix):
                numbers = momentum.cut_stats(momenta, grads, first_col=region.cols[0], **bundle.average)
                for kind, values in zip(found, numbers, strict=True):
                    kind.append(values)
            else:
                found[0].append(momentum.stats(momenta, grads, **bundle.average, backend=options.backend))
    sums, maxima = (values[0] if len(values) == 1 else torch.cat(values) if values else None for values in found)
    assert sums is not None
    return [sums] if maxima is None or bundle.format.codebook is None else [sums, maxima]


def is_cut(region: Region, matrix: Matrix) -> bool:
    """Whether these are not all columns."""
    return region.cols != (0, matrix.cols)
