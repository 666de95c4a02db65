"""The rank that orthogonalizes each matrix, and the bytes that this moves.

All of it is a pure function of shapes, so that ranks which compute it alone agree.

Every matrix goes to one rank, its owner: the longest first, to the least loaded (LPT; Graham, SIAM J. Appl. Math. 17,
1969); of those that are about as little loaded, to the one whose matrices have the fewest bytes, since these are sent
as long as the busiest owner takes. It gets there, and its update back, in one of two ways:

gather       the parts of X go to the owner, the parts of O = NS(X) come back
reduce_gram  of a matrix cut along its long side: the Gram matrix of every part goes, in fp32, to the owner, which sums
             them and iterates. The factor Q comes back to every rank that needs a part, which makes its own of O = Q X
             (or X Q)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from ..orthogonalize import flops
from .matrix_sharding import Region
from .planned_transfers import Matrix, PlannedTransfer, Strategy
from .rounds import PlannedRound, make_rounds

# Ranks are about as little loaded as the least one within this part of the mean load of all matrices.
_SLACK = 0.02


@dataclass(frozen=True)
class Assignment:
    """The owners of matrices, and the order in which they are sent. Ranks are those of the group.

    Attributes:
        transfers: one a matrix, in the order of the matrices.
        rounds: the transfers, each in one round. What is not moved comes last.
        load: by rank, the sum of the costs of its matrices.
    """

    transfers: tuple[PlannedTransfer, ...]
    rounds: tuple[PlannedRound, ...]
    load: tuple[float, ...]


def plan(matrices: Sequence[Matrix], num_ranks: int, workspace_bytes: int) -> Assignment:
    """Share the matrices out among the ranks.

    A matrix that ranks hold whole is one of theirs, the least loaded's, so what a single rank holds and needs is never
    moved. Any rank may own the others. Ties go to the lowest index and the lowest rank.

    Args:
        matrices: in an order on which all ranks agree.
        num_ranks: of the group.
        workspace_bytes: of matrices that one owner has at once, and of what a rank sends and gets of O at once. It is
            more where a single matrix is larger.

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
    transfers = list(map(PlannedTransfer, range(len(matrices)), matrices, owners, strategies, costs))

    def kind(transfer: PlannedTransfer) -> tuple[bool, float, int, int, str, bool]:
        rows, cols, _, method, _ = transfer.matrix
        return not transfer.is_moved, -method.cost, rows, cols, str(method), not transfer.is_gram

    in_order, turns = sorted(transfers, key=kind), Counter[int]()
    for place, transfer in enumerate(in_order):
        transfers[transfer.index] = in_order[place] = replace(transfer, turn=turns[transfer.owner])
        turns[transfer.owner] += 1
    return Assignment(tuple(transfers), make_rounds(in_order, load, workspace_bytes), tuple(load))


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
    where they are held, and whose owner needs no O for a second moment. Replicas would keep their parts of all owners'
    matrices at once, so there are none.
    """
    rows, cols, sharding, method, stage = matrix
    across = 1 if rows > cols else 0
    if stage is not None or rows == cols or method.form != "gram" or len(method.segments) != 1:
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
    num_bytes, slack = [0] * num_ranks, _SLACK * sum(costs) / num_ranks
    for index in order:
        rows, cols, _, method, _ = matrices[index]
        ranks: Sequence[int] = candidates[index] or range(num_ranks)
        limit = min(load[rank] for rank in ranks) + slack
        owner = min((r for r in ranks if load[r] <= limit), key=lambda rank: (num_bytes[rank], load[rank], rank))
        owners[index] = owner
        load[owner] += costs[index]
        num_bytes[owner] += rows * cols * method.dtype.itemsize
    return owners, load
