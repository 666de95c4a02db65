"""A plan as the step follows it: round by round the matrices, with who sends and who wants what of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch

from .assignment import Assignment
from .matrix_sharding import Region, ShardPiece
from .route import Matrix, Route, returned_bytes, sent_bytes
from .sharded_batch import ShardedBatch, ShardedMatrix


class PlannedTransfer(NamedTuple):
    """One matrix in a round, as planned."""

    number: int
    owner: int
    route: Route
    sources: tuple[ShardPiece, ...]
    targets: tuple[ShardPiece, ...]


# Of one plan, round by round: its matrices, those of an owner together, cut into the parts that go back at once.
Timetable: TypeAlias = list[list[list[PlannedTransfer]]]


def timetable(plan: Assignment) -> Timetable:
    """What `write` does of a plan."""

    def stops(part: Iterable[int]) -> list[PlannedTransfer]:
        found = (PlannedTransfer(i, plan.owners[i], plan.routes[i], plan.sources(i), plan.targets(i)) for i in part)
        return sorted(found, key=lambda stop: (stop.owner, stop.number))

    return [[stops(part) for part in plan.parts(number)] for number in range(len(plan.rounds))]


@dataclass(frozen=True)
class Transfer:
    """One matrix in a round, as this rank sees it: the `place`-th of its bundle."""

    stop: PlannedTransfer
    bundle: ShardedBatch
    place: int

    @property
    def owner(self) -> int:
        return self.stop.owner

    @property
    def is_gram(self) -> bool:
        return self.stop.route == "gram"

    @property
    def member(self) -> ShardedMatrix:
        return self.bundle.members[self.place]

    @property
    def matrix(self) -> Matrix:
        return self.bundle.matrix

    @property
    def is_tall(self) -> bool:
        return self.matrix.rows > self.matrix.cols

    @property
    def small(self) -> int:
        """Rows of its Gram matrix."""
        return min(self.matrix.rows, self.matrix.cols)

    def sent_shape(self, region: Region) -> tuple[int, int]:
        """Of what travels for a region, either way."""
        if self.is_gram:
            return self.small, self.small
        return region.rows[1] - region.rows[0], region.cols[1] - region.cols[0]

    @property
    def sent_dtype(self) -> torch.dtype:
        return torch.float32 if self.is_gram else self.matrix.path.dtype

    def sent_bytes(self, region: Region) -> int:
        return sent_bytes(self.matrix, self.stop.route, region)

    def returned_bytes(self, region: Region) -> int:
        return returned_bytes(self.matrix, self.stop.route, region)

    def source(self, rank: int) -> Region | None:
        """What this rank sends of it."""
        return next((piece.region for piece in self.stop.sources if piece.rank == rank), None)

    def target(self, rank: int) -> Region | None:
        """What this rank wants of it."""
        return next((piece.region for piece in self.stop.targets if piece.rank == rank), None)
