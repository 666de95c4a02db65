"""One matrix on its way: the parts of X that go to its owner, and what comes back, by rows in each part of a round."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal, NamedTuple, TypeAlias

import torch

from ..orthogonalize import NSMethod
from ..step.second_moment import Axis, SecondMomentFormat
from .matrix_sharding import MatrixSharding, Region, Span

Strategy: TypeAlias = Literal["gather", "reduce_gram"]


class MatrixStage(NamedTuple):
    """Kind of what is sent besides: for a second moment, and of signs.

    Attributes:
        axis: of the second moment; None without one.
        itemsize: the bytes of the second moment of an element.
        blocks: the scales of a whole row of it; 0 where it is fp32.
        is_sign: signs are sent to the owner, as int8.
    """

    axis: Axis | None
    itemsize: int
    blocks: int
    is_sign: bool

    @classmethod
    def of(cls, cols: int, second: SecondMomentFormat | None, *, is_sign: bool) -> MatrixStage | None:
        """Return that of a matrix of `cols` columns, by the format of its second moment; None for neither."""
        if second is None:
            return cls(None, 0, 0, is_sign) if is_sign else None
        size = second.block_size
        return cls(second.axis, 4 if size is None else 1, 0 if size is None else -(-cols // size), is_sign)


class Matrix(NamedTuple):
    """A matrix [rows, cols] to orthogonalize, by a `method` of `orthogonalize.choose_method(..., tiny=False)`."""

    rows: int
    cols: int
    sharding: MatrixSharding
    method: NSMethod
    stage: MatrixStage | None = None


@dataclass(frozen=True)
class PlannedTransfer:
    """One matrix with its owner, and the parts that are sent to and by it.

    Attributes:
        index: place of the matrix among those that were planned.
        owner: rank that orthogonalizes it.
        cost: what the owner alone does, in the unit of `NSMethod.cost`. With "reduce_gram" that is the iteration: R and
            O are the work of those who hold X.
        turn: how many of its owner's matrices come before it.
    """

    index: int
    matrix: Matrix
    owner: int
    strategy: Strategy
    cost: float
    turn: int = 0

    @cached_property
    def sources(self) -> dict[int, Region]:
        """Return the part that each rank sends to the owner, itself included, in the order of ranks."""
        return self.matrix.sharding.sources(self.owner)

    @property
    def targets(self) -> dict[int, Region]:
        """Return the part that the owner sends to each rank, itself included, in the order of ranks."""
        return self.matrix.sharding.targets

    @property
    def is_gram(self) -> bool:
        """Return whether Gram matrices and factors are sent in place of parts."""
        return self.strategy == "reduce_gram"

    @property
    def is_tall(self) -> bool:
        """Return whether it has more rows than columns."""
        return self.matrix.rows > self.matrix.cols

    @property
    def is_moved(self) -> bool:
        """Return whether anything is communicated."""
        others = *self.sources, *self.targets, *self.moment_sources, *self.vector_holders
        return any(rank != self.owner for rank in others)

    @property
    def sent_dtype(self) -> torch.dtype:
        """Return the dtype of what the owner gets."""
        if self.matrix.stage is not None and self.matrix.stage.is_sign:
            return torch.int8
        return torch.float32 if self.is_gram else self.matrix.method.dtype

    @cached_property
    def moment_sources(self) -> dict[int, Region]:
        """Return disjoint parts of the second moment that cover it, by the rank that sends them to the owner.

        Of that of columns a part is one row, of that of rows one column.
        """
        stage, sharding = self.matrix.stage, self.matrix.sharding
        if stage is None or stage.axis is None:
            return {}
        if stage.axis == "element":
            whole = Region((0, self.matrix.rows), (0, self.matrix.cols))
            return {self.owner: whole} if sharding.param_parts[self.owner] == whole else self.sources
        found: dict[Region, int] = {}
        for rank, region in self.vector_holders.items():
            if region not in found or rank == self.owner:
                found[region] = rank
        return {rank: region for region, rank in sorted(found.items())}

    @cached_property
    def vector_holders(self) -> dict[int, Region]:
        """Return the part that each rank has of a second moment of rows or columns, in the order of ranks."""
        is_row = self.matrix.stage is not None and self.matrix.stage.axis == "row"
        spans = enumerate(self.matrix.sharding.vector_parts)
        return {r: Region(span, (0, 1)) if is_row else Region((0, 1), span) for r, span in spans if span is not None}

    def moment_shapes(self, region: Region) -> list[tuple[tuple[int, int], torch.dtype]]:
        """Return shape and dtype of what is sent to the owner of a part of the second moment."""
        stage = self.matrix.stage
        if stage is None or not stage.blocks:
            return [(region.shape, torch.float32)]
        return [((region.shape[0], stage.blocks), torch.float32), (region.shape, torch.uint8)]

    def result_shapes(self, rank: int) -> list[tuple[int, int]]:
        """Return shapes, fp32, of what a rank gets of a normalization.

        These are the factors of its part of the update, then new scales of its rows, or the numbers that it keeps.
        """
        stage, found = self.matrix.stage, list[tuple[int, int]]()
        if stage is None or stage.axis is None:
            return found
        if rank in self.targets:
            rows, cols = self.targets[rank].shape
            found.append((rows if stage.axis == "row" else 1, cols if stage.axis == "column" else 1))
            found += [(rows, stage.blocks)] if stage.blocks else []
        if rank in self.vector_holders:
            found.append(self.vector_holders[rank].shape)
        return found

    def moment_bytes_of(self, rank: int) -> int:
        """Return the bytes of the second moment that a rank sends to the owner."""
        if rank not in self.moment_sources:
            return 0
        return sum(prod(shape) * dtype.itemsize for shape, dtype in self.moment_shapes(self.moment_sources[rank]))

    def result_bytes(self, rank: int) -> int:
        """Return the bytes that a rank gets of a normalization."""
        return 4 * sum(map(prod, self.result_shapes(rank)))

    def sent_shape(self, region: Region) -> tuple[int, int]:
        """Return the shape of what is sent for a part, in both directions.

        A Gram matrix is sent whole: a triangle would need an index of twice its size.
        """
        side = min(self.matrix.rows, self.matrix.cols)
        return (side, side) if self.is_gram else region.shape

    def sent_bytes(self, region: Region) -> int:
        """Return the bytes that the owner gets for a part."""
        return prod(self.sent_shape(region)) * self.sent_dtype.itemsize

    def returned_rows(self, region: Region, number: int = 0, num_parts: int = 1) -> Span:
        """Return the rows, counted in a part of the matrix, that its owner gives for it in one of `num_parts`.

        A factor goes whole, in the part whose turn it is. So do few rows, which would else all come last.
        """
        size = 1 if self.is_gram else region.shape[0]
        phase = self.turn % num_parts if size < num_parts else 0
        start, stop = ((size * place + phase) // num_parts for place in (number, number + 1))
        side = self.sent_shape(region)[0]
        return (start * side, stop * side) if self.is_gram else (start, stop)

    def returned_bytes(self, region: Region, number: int = 0, num_parts: int = 1) -> int:
        """Return the bytes that the owner gives for a part of the matrix in one of `num_parts`."""
        start, stop = self.returned_rows(region, number, num_parts)
        return (stop - start) * self.sent_shape(region)[1] * self.matrix.method.dtype.itemsize

    @property
    def owner_bytes(self) -> int:
        """Return the bytes that the owner has of it at once: X, or every Gram matrix and the factor.

        At least as many as X has: signs become as much, and ranks keep their parts of X until they get the factor.
        """
        num_bytes = sum(map(self.sent_bytes, self.sources.values()))
        num_bytes = max(num_bytes, self.matrix.rows * self.matrix.cols * self.matrix.method.dtype.itemsize)
        num_bytes += sum(map(self.moment_bytes_of, self.moment_sources))
        return num_bytes + self.returned_bytes(next(iter(self.sources.values()))) if self.is_gram else num_bytes
