"""Who orthogonalizes what, and what that moves: a pure function of shapes, so that ranks which compute it alone agree.

Every matrix goes to one rank, its owner: the longest first, to the least loaded (LPT; Graham, SIAM J. Appl. Math. 17,
1969).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

from .matrix_sharding import ShardPiece, whole_holders
from .route import (
    Matrix,
    Route,
    choose_route,
    in_flight_bytes,
    is_moved,
    owner_cost,
    returned_bytes,
    sent_bytes,
    sources,
    targets,
)

# More rounds are taken where they are cheaper by this factor, and rounds are even to this factor. Messages and smaller
# batches have their price too.
_EVENNESS = 1.1


@dataclass(frozen=True)
class Assignment:
    """Of `plan`. Ranks are those of the group, matrices are meant by their index in `matrices`.

    Attributes:
        matrices: what was planned.
        owners: by matrix, the rank that orthogonalizes it.
        routes: by matrix.
        rounds: the matrices, each in one round, to be moved together. In a round all matrices of one owner have one
            shape, route and path, and at most `workspace_bytes` (or there is one). What is not moved comes last.
        load: by rank, the sum of `Path.cost` of its matrices; on the route "gram" of the iteration alone, since all
            holders share the rest.
        workspace_bytes: the budget of `rounds` and `parts`.
    """

    matrices: tuple[Matrix, ...]
    owners: tuple[int, ...]
    routes: tuple[Route, ...]
    rounds: tuple[tuple[int, ...], ...]
    load: tuple[float, ...]
    workspace_bytes: int

    def sources(self, index: int) -> tuple[ShardPiece, ...]:
        """Disjoint pieces that cover the matrix, in the order of ranks: the owner's own, the others of its replica."""
        return sources(self.matrices[index], self.owners[index])

    def targets(self, index: int) -> tuple[ShardPiece, ...]:
        """What every rank wants of O, the owner included, in the order of ranks."""
        return targets(self.matrices[index])

    def transfers(self, index: int) -> Iterator[tuple[int, int, int]]:
        """(from rank, to rank, bytes) of every message: to the owner, and back."""
        matrix, owner, route = self.matrices[index], self.owners[index], self.routes[index]
        for piece in self.sources(index):
            if piece.rank != owner:
                yield piece.rank, owner, sent_bytes(matrix, route, piece.region)
        for piece in self.targets(index):
            if piece.rank != owner:
                yield owner, piece.rank, returned_bytes(matrix, route, piece.region)

    def bytes_sent(self) -> tuple[int, ...]:
        """By rank, of the payload of all transfers."""
        return self._bytes(end=0)

    def bytes_received(self) -> tuple[int, ...]:
        """By rank, of the payload of all transfers."""
        return self._bytes(end=1)

    def _bytes(self, end: int) -> tuple[int, ...]:
        totals = [0] * len(self.load)
        for index in range(len(self.matrices)):
            for transfer in self.transfers(index):
                totals[transfer[end]] += transfer[2]
        return tuple(totals)

    def parts(self, number: int) -> Iterator[tuple[int, ...]]:
        """Round `number` cut so that no rank has more than `workspace_bytes` of pieces of X at once, nor of O.

        One part where all ranks hold equal shares of matrices within the budget. Where a replica or every rank wants a
        large share, the matrices of all owners together are more than it should take. A part has one matrix at least.
        """
        num_ranks, part = len(self.load), list[int]()
        totals = [0] * (2 * num_ranks)
        for index in self.rounds[number]:
            matrix, route = self.matrices[index], self.routes[index]
            sizes = [(piece.rank, sent_bytes(matrix, route, piece.region)) for piece in self.sources(index)]
            for rank, region in self.targets(index):
                sizes.append((num_ranks + rank, returned_bytes(matrix, route, region)))
            if part and any(totals[place] + size > self.workspace_bytes for place, size in sizes):
                yield tuple(part)
                part, totals = [], [0] * (2 * num_ranks)
            part.append(index)
            for place, size in sizes:
                totals[place] += size
        if part:
            yield tuple(part)


def plan(matrices: Sequence[Matrix], num_ranks: int, workspace_bytes: int) -> Assignment:
    """Share the matrices out among the ranks.

    A matrix that ranks hold whole is one of theirs, the least loaded's, so what a single rank holds and wants is never
    moved. Any rank may own the others. Ties go to the lowest index and the lowest rank.

    Args:
        matrices: in an order on which all ranks agree.
        num_ranks: of the group.
        workspace_bytes: of matrices that one owner has in flight, and of pieces that a rank has (see `Plan.parts`).

    Raises:
        ValueError: for a spread over another number of ranks, or one whose held parts are no tiling of the matrix.
    """
    for index, matrix in enumerate(matrices):
        if not len(matrix.spread.held) == len(matrix.spread.wanted) == num_ranks:
            raise ValueError(f"matrix {index} is spread over {len(matrix.spread.held)} ranks, not {num_ranks}")
    routes = tuple(choose_route(matrix) for matrix in matrices)
    costs = [owner_cost(matrix, route) for matrix, route in zip(matrices, routes, strict=True)]
    owners, load = _assign(matrices, costs, num_ranks)
    rounds = _rounds(matrices, owners, routes, costs, load, workspace_bytes)
    return Assignment(tuple(matrices), owners, routes, rounds, load, workspace_bytes)


def gathered_bytes(num_sums: Sequence[int]) -> int:
    """Bytes that each rank receives, and in a ring sends, of an all-gather of `num_sums[rank]` fp32 numbers a rank,
    padded to the longest: the sums of squares that a step's norms are made of, one a row and block, and its flags."""
    return 4 * (len(num_sums) - 1) * max(num_sums, default=0)


def _assign(
    matrices: Sequence[Matrix], costs: Sequence[float], num_ranks: int
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Owners by matrix, loads by rank."""
    owners, load = [0] * len(matrices), [0.0] * num_ranks
    candidates = [whole_holders(matrix.rows, matrix.cols, matrix.spread) for matrix in matrices]
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
    return tuple(owners), tuple(load)


def _rounds(
    matrices: Sequence[Matrix],
    owners: Sequence[int],
    routes: Sequence[Route],
    costs: Sequence[float],
    load: Sequence[float],
    workspace_bytes: int,
) -> tuple[tuple[int, ...], ...]:
    """Every owner's matrices, kind by kind, cut by the budget; its n-th cut belongs to round n.

    A round takes as long as its slowest owner. Where that costs much, costly cuts are cut again, in more rounds.
    """

    def kind(index: int) -> tuple[bool, float, int, int, str, Route]:
        matrix = matrices[index]
        stays = not is_moved(matrix, owners[index])
        return stays, -matrix.path.cost, matrix.rows, matrix.cols, f"{matrix.path}", routes[index]

    order = sorted((kind(index), index) for index in range(len(matrices)))

    def cut(largest_cost: float) -> tuple[list[list[int]], float]:
        """Rounds, and their cost one after the other."""
        rounds, slowest = list[list[int]](), list[float]()
        last: dict[int, tuple[object, int, int, float]] = {}  # by owner: kind, round, bytes and cost of its last cut
        for key, index in order:
            owner, size = owners[index], in_flight_bytes(matrices[index], routes[index])
            last_key, number, num_bytes, cost = last.get(owner, (None, -1, 0, 0.0))
            if last_key != key or num_bytes + size > workspace_bytes or cost + costs[index] > largest_cost:
                number, num_bytes, cost = number + 1, 0, 0.0
            if number == len(rounds):
                rounds.append([])
                slowest.append(0.0)
            rounds[number].append(index)
            last[owner] = key, number, num_bytes + size, cost + costs[index]
            slowest[number] = max(slowest[number], cost + costs[index])
        return rounds, sum(slowest)

    rounds, cost = cut(inf)
    if rounds:
        evener, lower_cost = cut(_EVENNESS * max(*costs, max(load) / len(rounds)))
        rounds = evener if _EVENNESS * lower_cost < cost else rounds
    return tuple(tuple(sorted(members)) for members in rounds)
