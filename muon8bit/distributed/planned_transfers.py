"""One matrix on its way: the parts of X that go to its owner, and what comes back, by rows in each part of a round."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal, NamedTuple, TypeAlias

import torch

from ..orthogonalize import NSMethod
from .matrix_sharding import MatrixSharding, Region, Span

Strategy: TypeAlias = Literal["gather", "reduce_gram"]


class Matrix(NamedTuple):
    """A matrix [rows, cols] to orthogonalize, by a `method` of `orthogonalize.choose_method(..., tiny=False)`."""

    rows: int
    cols: int
    sharding: MatrixSharding
    method: NSMethod


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
        return any(rank != self.owner for rank in (*self.sources, *self.targets))

    @property
    def sent_dtype(self) -> torch.dtype:
        """Return the dtype of what the owner gets."""
        return torch.float32 if self.is_gram else self.matrix.method.dtype

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
        """Return the bytes that the owner has of it at once: X, or every Gram matrix and the factor."""
        num_bytes = sum(map(self.sent_bytes, self.sources.values()))
        return num_bytes + self.returned_bytes(next(iter(self.sources.values()))) if self.is_gram else num_bytes
