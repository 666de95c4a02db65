"""How a matrix gets to its owner and back, by bytes and operations.

move    pieces of X to the owner; pieces of O = NS(X) back
gram    of a matrix cut along its long side: the Gram matrix of every piece, in fp32, to the owner, which sums them
        and iterates; the factor Q back to every rank that wants a piece, which makes its own of O = Q X or X Q
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Literal, NamedTuple, TypeAlias

from ..orthogonalize import NSMethod, flops
from .matrix_sharding import MatrixSharding, Region, ShardPiece, cover, holders, pieces

Route: TypeAlias = Literal["move", "gram"]

# Partial Gram matrices are sent whole: a triangle would need an index of twice its size.
_GRAM_ITEMSIZE = 4


class Matrix(NamedTuple):
    """A matrix [rows, cols] to orthogonalize; `path` of `orthogonalize.choose_method(..., tiny=False)`."""

    rows: int
    cols: int
    spread: MatrixSharding
    path: NSMethod


def sources(matrix: Matrix, owner: int) -> tuple[ShardPiece, ...]:
    """Disjoint pieces that cover the matrix, in the order of ranks: the owner's own, the others of its replica."""
    return cover(matrix.rows, matrix.cols, matrix.spread, owner)


def targets(matrix: Matrix) -> tuple[ShardPiece, ...]:
    """What every rank wants, the owner included, in the order of ranks."""
    return pieces(matrix.spread.wanted)


def is_moved(matrix: Matrix, owner: int) -> bool:
    """Whether anything is communicated."""
    return any(piece.rank != owner for piece in (*sources(matrix, owner), *targets(matrix)))


def sent_bytes(matrix: Matrix, route: Route, region: Region) -> int:
    """Of what the holder of a piece sends to the owner."""
    if route == "gram":
        return _GRAM_ITEMSIZE * min(matrix.rows, matrix.cols) ** 2
    return region.num_elements * matrix.path.dtype.itemsize


def returned_bytes(matrix: Matrix, route: Route, region: Region) -> int:
    """Of what the owner sends to a rank that wants a piece."""
    num_elements = min(matrix.rows, matrix.cols) ** 2 if route == "gram" else region.num_elements
    return num_elements * matrix.path.dtype.itemsize


def in_flight_bytes(matrix: Matrix, route: Route) -> int:
    """Of what the owner has of one matrix: X; or every partial Gram matrix, and the factor."""
    if route == "gram":
        num_sources = len(holders(matrix.rows, matrix.cols, matrix.spread))
        return min(matrix.rows, matrix.cols) ** 2 * (num_sources * _GRAM_ITEMSIZE + matrix.path.dtype.itemsize)
    return matrix.rows * matrix.cols * matrix.path.dtype.itemsize


def owner_cost(matrix: Matrix, route: Route) -> float:
    """Of what the owner alone does, in the unit of `Path.cost`."""
    path = matrix.path
    if route == "move":
        return path.cost
    small, large = sorted((matrix.rows, matrix.cols))
    # R = X X^T and O = Q X are the holders'.
    return path.cost * (1 - 4 * small * small * large / flops("gram", small, large, sum(path.segments)))


@cache
def choose_route(matrix: Matrix) -> Route:
    """ "gram" where the path allows it (Gram form, no restart) and fewer bytes are moved, whoever the owner is."""
    rows, cols, spread, path = matrix
    across = 1 if rows > cols else 0
    held, wanted = dict(pieces(spread.held)), dict(pieces(spread.wanted))
    if rows == cols or path.form != "gram" or len(path.segments) != 1:
        return "move"
    if any(region[across] != (0, matrix[across]) for region in held.values()):
        return "move"
    if any(held.get(rank) != region for rank, region in wanted.items()):
        return "move"
    if len(holders(rows, cols, spread)) < len(held):  # replicas would keep their parts of all owners' matrices at once
        return "move"

    def saved(size: Callable[[Matrix, Route, Region], int], region: Region | None) -> int:
        return size(matrix, "move", region) - size(matrix, "gram", region) if region else 0

    saved_bytes = sum(saved(sent_bytes, region) for region in holders(rows, cols, spread))
    saved_bytes += sum(saved(returned_bytes, region) for region in wanted.values())
    own = (saved(sent_bytes, held.get(r)) + saved(returned_bytes, wanted.get(r)) for r in range(len(spread.held)))
    return "gram" if all(saved_bytes > bytes_of_owner for bytes_of_owner in own) else "move"
