"""Shardings of matrices, as torch's chunking lays shards out."""

from __future__ import annotations

from math import prod

from muon8bit.distributed.matrix_sharding import MatrixSharding, Region, Span


def chunks(length: int, num_ranks: int) -> list[Span]:
    """Return spans as torch.chunk cuts: all as long as the first, the last shorter, then empty ones."""
    size = -(-length // num_ranks)
    return [(min(r * size, length), min((r + 1) * size, length)) for r in range(num_ranks)]


def grid(rows: int, cols: int, row_ranks: int, col_ranks: int = 1, replicas: int = 1) -> tuple[Region | None, ...]:
    """Return a region for each rank of a mesh [replicas, row_ranks, col_ranks]."""
    cells = [Region(r, c) for r in chunks(rows, row_ranks) for c in chunks(cols, col_ranks)]
    return tuple(cell if prod(cell.shape) else None for cell in cells) * replicas


def sharded(rows: int, cols: int, row_ranks: int, col_ranks: int = 1, replicas: int = 1) -> MatrixSharding:
    parts = grid(rows, cols, row_ranks, col_ranks, replicas)
    return MatrixSharding(parts, parts)


def replicated(rows: int, cols: int, num_ranks: int) -> MatrixSharding:
    """Return the sharding of data parallel."""
    return sharded(rows, cols, 1, replicas=num_ranks)


def sharded_state(rows: int, cols: int, num_ranks: int) -> MatrixSharding:
    """Return the sharding of data parallel with the momentum sharded over its rows."""
    return MatrixSharding(grid(rows, cols, num_ranks), grid(rows, cols, 1, replicas=num_ranks))


def expert(rows: int, cols: int, holders: list[int], num_ranks: int) -> MatrixSharding:
    """Return the sharding of a matrix that lies whole on some of the ranks."""
    whole = Region((0, rows), (0, cols))
    held = tuple(whole if rank in holders else None for rank in range(num_ranks))
    return MatrixSharding(held, held)
