"""The rank that orthogonalizes each matrix, and the bytes that this moves.

All of it is a pure function of shapes, so that ranks which compute it alone agree.

Every matrix goes to one rank, its owner: the longest first, to the least loaded (LPT; Graham, SIAM J. Appl. Math. 17,
1969). It gets there, and its update back, in one of two ways:

gather       the parts of X go to the owner, the parts of O = NS(X) come back
reduce_gram  of a matrix cut along its long side: the Gram matrix of every part goes, in fp32, to the owner, which sums
             them and iterates. The factor Q comes back to every rank that needs a part, which makes its own of O = Q X
             (or X Q)
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import inf, prod
from typing import Literal, NamedTuple, TypeAlias

import torch

from ..orthogonalize import NSMethod, flops
from .matrix_sharding import MatrixSharding, Region

Strategy: TypeAlias = Literal["gather", "reduce_gram"]

# More rounds are taken where they are cheaper by this factor, and rounds are even to this factor. Messages and smaller
# batches have their price too.
_EVENNESS = 1.1


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
    """

    index: int
    matrix: Matrix
    owner: int
    strategy: Strategy
    cost: float

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

    def returned_bytes(self, region: Region) -> int:
        """Return the bytes that the owner gives for a part."""
        return prod(self.sent_shape(region)) * self.matrix.method.dtype.itemsize

    @property
    def owner_bytes(self) -> int:
        """Return the bytes that the owner has of it at once: X, or every Gram matrix and the factor."""
        num_bytes = sum(map(self.sent_bytes, self.sources.values()))
        return num_bytes + self.returned_bytes(next(iter(self.sources.values()))) if self.is_gram else num_bytes


@dataclass(frozen=True)
class Assignment:
    """The owners of matrices, and the order in which they are sent. Ranks are those of the group.

    Attributes:
        transfers: one a matrix, in the order of the matrices.
        rounds: the transfers, each in one round, to be gathered together. In a round all matrices of one owner have one
            shape, strategy and method, and at most `workspace_bytes` (or there is one). What is not moved comes last. A
            round consists of the parts that are returned together, a part is sorted by owners.
        load: by rank, the sum of the costs of its matrices.
    """

    transfers: tuple[PlannedTransfer, ...]
    rounds: tuple[tuple[tuple[PlannedTransfer, ...], ...], ...]
    load: tuple[float, ...]


def plan(matrices: Sequence[Matrix], num_ranks: int, workspace_bytes: int) -> Assignment:
    """Share the matrices out among the ranks.

    A matrix that ranks hold whole is one of theirs, the least loaded's, so what a single rank holds and needs is never
    moved. Any rank may own the others. Ties go to the lowest index and the lowest rank.

    Args:
        matrices: in an order on which all ranks agree.
        num_ranks: of the group.
        workspace_bytes: of matrices that one owner has at once, and of parts that a rank has (see `_parts`).

    Raises:
        ValueError: for a sharding over another number of ranks, or one whose held parts are no tiling of the matrix.
    """
    for index, matrix in enumerate(matrices):
        sharding = matrix.sharding
        if not len(sharding.momentum_parts) == len(sharding.param_parts) == num_ranks:
            raise ValueError(f"matrix {index} is sharded over {len(sharding.momentum_parts)} ranks, not {num_ranks}")
        sharding.check_tiling(matrix.rows, matrix.cols)
    # Strategies before owners: what the owner alone does, by which ranks are loaded, depends on them.
    strategies = [choose_strategy(matrix) for matrix in matrices]
    costs = [owner_cost(matrix, strategy) for matrix, strategy in zip(matrices, strategies, strict=True)]
    owners, load = _assign(matrices, costs, num_ranks)
    transfers = tuple(map(PlannedTransfer, range(len(matrices)), matrices, owners, strategies, costs))
    rounds = _rounds(transfers, load, workspace_bytes)
    return Assignment(transfers, tuple(tuple(_parts(members, workspace_bytes)) for members in rounds), tuple(load))


def owner_cost(matrix: Matrix, strategy: Strategy) -> float:
    """Return what the owner alone does: see `PlannedTransfer.cost`."""
    method = matrix.method
    if strategy == "gather":
        return method.cost
    small, large = sorted(matrix[:2])
    return method.cost * (1 - 4 * small * small * large / flops("gram", small, large, sum(method.segments)))


@cache
def choose_strategy(matrix: Matrix) -> Strategy:
    """Return "reduce_gram" where that is possible and moves fewer bytes, whoever the owner is; else "gather".

    It is possible for the Gram form without restart, of a matrix cut along its long side alone, whose parts are needed
    where they are held. Replicas would keep their parts of all owners' matrices at once, so there are none.
    """
    rows, cols, sharding, method = matrix
    across = 1 if rows > cols else 0
    if rows == cols or method.form != "gram" or len(method.segments) != 1:
        return "gather"
    if any(region[across] != (0, matrix[across]) or len(ranks) > 1 for region, ranks in sharding.holders.items()):
        return "gather"
    parts = zip(sharding.momentum_parts, sharding.param_parts, strict=True)
    if any(needed not in (None, held) for held, needed in parts):
        return "gather"
    gather, gram = (PlannedTransfer(0, matrix, 0, strategy, 0.0) for strategy in ("gather", "reduce_gram"))
    saved = [0] * len(sharding.momentum_parts)
    for region, (rank,) in sharding.holders.items():
        saved[rank] += gather.sent_bytes(region) - gram.sent_bytes(region)
    for rank, region in sharding.targets.items():
        saved[rank] += gather.returned_bytes(region) - gram.returned_bytes(region)
    # The owner's own part is not moved.
    return "reduce_gram" if all(sum(saved) > saved_by_owner for saved_by_owner in saved) else "gather"


def _assign(matrices: Sequence[Matrix], costs: Sequence[float], num_ranks: int) -> tuple[list[int], list[float]]:
    """Return owners by matrix, and loads by rank."""
    owners, load = [0] * len(matrices), [0.0] * num_ranks
    candidates = [m.sharding.holders.get(Region((0, m.rows), (0, m.cols)), []) for m in matrices]
    # Where there is no choice first: these are loads from the start.
    order = sorted(range(len(matrices)), key=lambda i: (len(candidates[i]) != 1, -costs[i], i))
    heap = [(0.0, rank) for rank in range(num_ranks)]  # every rank once, at its load or an earlier, smaller one
    for index in order:
        if candidates[index]:
            owner = min(candidates[index], key=lambda rank: (load[rank], rank))
        else:
            while heap[0][0] != load[heap[0][1]]:
                heapq.heapreplace(heap, (load[heap[0][1]], heap[0][1]))
            owner = heap[0][1]
        owners[index] = owner
        load[owner] += costs[index]
    return owners, load


def _rounds(
    transfers: Sequence[PlannedTransfer], load: Sequence[float], workspace_bytes: int
) -> list[list[PlannedTransfer]]:
    """Cut every owner's matrices, kind by kind, by the budget; its n-th cut belongs to round n.

    A round takes as long as its slowest owner. Where that costs much, costly cuts are cut again, in more rounds.
    """

    def kind(transfer: PlannedTransfer) -> tuple[bool, float, int, int, str, bool]:
        rows, cols, _, method = transfer.matrix
        return not transfer.is_moved, -method.cost, rows, cols, str(method), not transfer.is_gram

    in_order = sorted(((kind(transfer), transfer) for transfer in transfers), key=lambda pair: pair[0])
    rounds, cost = _cut(in_order, workspace_bytes, inf)
    if rounds:
        largest = max(*(transfer.cost for transfer in transfers), max(load) / len(rounds))
        evener, lower_cost = _cut(in_order, workspace_bytes, _EVENNESS * largest)
        rounds = evener if _EVENNESS * lower_cost < cost else rounds
    return [sorted(members, key=lambda transfer: transfer.index) for members in rounds]


def _cut(
    in_order: Sequence[tuple[object, PlannedTransfer]], workspace_bytes: int, largest_cost: float
) -> tuple[list[list[PlannedTransfer]], float]:
    """Return rounds, and their cost one after the other.

    Args:
        in_order: the transfers with their kinds, sorted by these.
        workspace_bytes: of one owner in one round, or it has one matrix there.
        largest_cost: of one owner in one round, likewise.
    """
    rounds, slowest = list[list[PlannedTransfer]](), list[float]()
    last: dict[int, tuple[object, int, int, float]] = {}  # by owner: kind, round, bytes and cost of its last cut
    for kind, transfer in in_order:
        last_kind, number, num_bytes, cost = last.get(transfer.owner, (None, -1, 0, 0.0))
        num_bytes, cost = num_bytes + transfer.owner_bytes, cost + transfer.cost
        if last_kind != kind or num_bytes > workspace_bytes or cost > largest_cost:
            number, num_bytes, cost = number + 1, transfer.owner_bytes, transfer.cost
        if number == len(rounds):
            rounds.append([])
            slowest.append(0.0)
        rounds[number].append(transfer)
        slowest[number] = max(slowest[number], cost)
        last[transfer.owner] = kind, number, num_bytes, cost
    return rounds, sum(slowest)


def _parts(members: Sequence[PlannedTransfer], workspace_bytes: int) -> Iterator[tuple[PlannedTransfer, ...]]:
    """Cut a round so that no rank has more than `workspace_bytes` of parts of X at once, nor of O.

    It stays whole where all ranks hold equal shares of matrices within the budget. Where a replica or every rank needs
    a large share, the matrices of all owners together are more than it should take. A part has one matrix at least.
    """
    part, totals = list[PlannedTransfer](), Counter[tuple[str, int]]()
    for transfer in members:
        sizes = {("X", rank): transfer.sent_bytes(region) for rank, region in transfer.sources.items()}
        sizes |= {("O", rank): transfer.returned_bytes(region) for rank, region in transfer.targets.items()}
        if part and any(totals[key] + size > workspace_bytes for key, size in sizes.items()):
            yield _by_owner(part)
            part, totals = [], Counter()
        part.append(transfer)
        totals.update(sizes)
    yield _by_owner(part)


def _by_owner(part: Sequence[PlannedTransfer]) -> tuple[PlannedTransfer, ...]:
    return tuple(sorted(part, key=lambda transfer: transfer.owner))
