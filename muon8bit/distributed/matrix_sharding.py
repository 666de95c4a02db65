"""The parts of a matrix that each rank has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeAlias

Span: TypeAlias = tuple[int, int]  # half open


class Region(NamedTuple):
    """Part of one matrix, in its rows and columns; never empty."""

    rows: Span
    cols: Span

    @property
    def shape(self) -> tuple[int, int]:
        """Return how many rows and columns it has."""
        return self.rows[1] - self.rows[0], self.cols[1] - self.cols[0]

    @property
    def slices(self) -> tuple[slice, slice]:
        """Return the index of its elements in the whole matrix."""
        return slice(*self.rows), slice(*self.cols)


@dataclass(frozen=True)
class MatrixSharding:
    """The parts of matrices of one shape that lie alike, by rank of the group; None where a rank has none.

    Attributes:
        momentum_parts: of the momentum, and so of the Newton-Schulz input. Different parts are disjoint and cover the
            matrix; replicas repeat them, in the same order of ranks.
        param_parts: of the parameter, and so of the update that the rank needs.
        vector_parts: where a second moment has a number a row or column, the rows or columns whose numbers it has.
    """

    momentum_parts: tuple[Region | None, ...]
    param_parts: tuple[Region | None, ...]
    vector_parts: tuple[Span | None, ...] = ()

    @cached_property
    def holders(self) -> dict[Region, list[int]]:
        """Return the ranks that hold each part of the momentum, in ascending order."""
        holders: dict[Region, list[int]] = {}
        for rank, region in enumerate(self.momentum_parts):
            if region is not None:
                holders.setdefault(region, []).append(rank)
        return holders

    @cached_property
    def targets(self) -> dict[int, Region]:
        """Return the part of the update that each rank needs, in the order of ranks."""
        return {rank: region for rank, region in enumerate(self.param_parts) if region is not None}

    def sources(self, owner: int) -> dict[int, Region]:
        """Return disjoint parts that cover the matrix, by the rank that sends them to `owner`, in the order of ranks.

        The owner gives its own part, the others come from its replica. Replica n has the n-th holder of every part. The
        ranks that hold nothing are divided evenly among the replicas.
        """
        holders, part = self.holders, self.momentum_parts[owner]
        if part is not None:
            replica = holders[part].index(owner)
        else:
            idle = [rank for rank, region in enumerate(self.momentum_parts) if region is None]
            replica = idle.index(owner) * max(map(len, holders.values()), default=0) // len(idle)
        return dict(sorted((ranks[min(replica, len(ranks) - 1)], region) for region, ranks in holders.items()))

    def check_tiling(self, rows: int, cols: int) -> None:
        """Raise ValueError where the parts are not the cells of [rows, cols] cut into bands and bands into columns."""
        bands: dict[Span, list[Span]] = {}
        for region in sorted(self.holders):
            bands.setdefault(region.rows, []).append(region.cols)
        if rows * cols and not (_is_chain(list(bands), rows) and all(_is_chain(band, cols) for band in bands.values())):
            raise ValueError(
                f"the held parts of a matrix [{rows}, {cols}] are no tiling of it: {sorted(self.holders)[:4]}"
            )


def _is_chain(spans: list[Span], length: int) -> bool:
    """Return whether sorted spans cover [0, length), each beginning where the last ended."""
    ends = [0, *(stop for _, stop in spans)]
    return [start for start, _ in spans] == ends[:-1] and ends[-1] == length
