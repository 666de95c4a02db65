"""Where a matrix lies: its pieces by rank, their replicas, and which of them make up the whole."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, TypeAlias

Span: TypeAlias = tuple[int, int]  # half open


class Region(NamedTuple):
    """Part of one matrix, in its coordinates."""

    rows: Span
    cols: Span

    @property
    def num_elements(self) -> int:
        return (self.rows[1] - self.rows[0]) * (self.cols[1] - self.cols[0])


class ShardPiece(NamedTuple):
    """What a rank sends or receives of a matrix; never empty."""

    rank: int
    region: Region


@dataclass(frozen=True)
class MatrixSharding:
    """Where matrices of one shape lie that lie alike, by rank of the group; None: nothing. Hashable, to be shared.

    Attributes:
        held: part of the Newton-Schulz input that the rank computes (its shard of the momentum). Different parts are
            disjoint and cover the matrix; replicas repeat them, in the same order of ranks.
        wanted: part of O that the rank needs (its shard of the parameter).
    """

    held: tuple[Region | None, ...]
    wanted: tuple[Region | None, ...]


@cache
def pieces(regions: tuple[Region | None, ...]) -> tuple[ShardPiece, ...]:
    """In the order of ranks."""
    return tuple(ShardPiece(rank, region) for rank, region in enumerate(regions) if region and region.num_elements)


@cache
def whole_holders(rows: int, cols: int, spread: MatrixSharding) -> tuple[int, ...]:
    """The ranks that hold all of the matrix [rows, cols]."""
    whole = Region((0, rows), (0, cols))
    return tuple(rank for rank, region in pieces(spread.held) if region == whole)


@cache
def holders(rows: int, cols: int, spread: MatrixSharding) -> dict[Region, list[int]]:
    """The ranks that hold each part, ascending.

    Raises:
        ValueError: where the parts are not the cells of rows cut into bands and bands cut into columns.
    """
    found: dict[Region, list[int]] = {}
    for rank, region in pieces(spread.held):
        found.setdefault(region, []).append(rank)
    bands: dict[Span, list[Span]] = {}
    for region in sorted(found):
        bands.setdefault(region.rows, []).append(region.cols)
    if rows * cols and not (_is_chain(list(bands), rows) and all(_is_chain(band, cols) for band in bands.values())):
        raise ValueError(f"the held parts of a matrix [{rows}, {cols}] are no tiling of it: {sorted(found)[:4]}")
    return found


def _is_chain(spans: list[Span], length: int) -> bool:
    """Whether sorted spans cover [0, length), each beginning where the last ended."""
    ends = [0, *(stop for _, stop in spans)]
    return [start for start, _ in spans] == ends[:-1] and ends[-1] == length


def cover(rows: int, cols: int, spread: MatrixSharding, rank: int) -> tuple[ShardPiece, ...]:
    """Every part once, in the order of ranks: what `rank` itself holds, the others from its replica."""
    return _cover(rows, cols, spread, _replica(holders(rows, cols, spread), spread.held, rank))


def _replica(ranks_of: dict[Region, list[int]], held: tuple[Region | None, ...], rank: int) -> int:
    """Replica n has the n-th holder of every part, and of the ranks without one as many as the others."""
    region = held[rank]
    if region in ranks_of:
        return ranks_of[region].index(rank)
    idle = [other for other, region in enumerate(held) if region not in ranks_of]
    return idle.index(rank) * max(map(len, ranks_of.values()), default=0) // len(idle)


@cache
def _cover(rows: int, cols: int, spread: MatrixSharding, replica: int) -> tuple[ShardPiece, ...]:
    found = holders(rows, cols, spread).items()
    return tuple(sorted(ShardPiece(ranks[min(replica, len(ranks) - 1)], region) for region, ranks in found))
