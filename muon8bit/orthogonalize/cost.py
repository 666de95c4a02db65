"""Work of the orthogonalization of one matrix, counted, not measured: operations, products, and waves of their tiles.

m = min(rows, cols), n = max.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, TypeAlias

import torch
from muon8bit_kernels.triton.gemm_tilings import NUM_PROCESSORS, num_tiles, tiling_for

Form: TypeAlias = Literal["standard", "gram"]


def operations(form: Form, rows: int, cols: int, num_steps: int, num_segments: int = 1) -> tuple[int, int]:
    """Count floating-point operations: of the products with a symmetric result, computed whole, and of the others.

    A multiply-add counts as 2. A cubic step (c = 0) is counted like the others.
    """
    m, n = min(rows, cols), max(rows, cols)
    if form == "standard":  # A and A^2; P X
        return num_steps * (2 * m * m * n + 2 * m**3), num_steps * 2 * m * m * n
    # R; of every step R^2; of every step but a segment's first Z Q, of every one but its last Z R Z.  Q X.
    small = num_steps + 3 * (num_steps - num_segments)
    return num_segments * 2 * m * m * n + small * 2 * m**3, num_segments * 2 * m * m * n


def flops(form: Form, rows: int, cols: int, num_steps: int, *, triangle: bool = False, num_segments: int = 1) -> int:
    """Count the floating-point operations of the orthogonalization of one matrix.

    A multiply-add counts as 2.

    Args:
        form: `"standard"` or `"gram"`.
        rows, cols: the matrix's shape.
        num_steps: the number of Newton-Schulz steps.
        triangle: symmetric products compute one triangle, half of the operations (its diagonal is not counted).
        num_segments: the segments of the Gram form, one more than its restarts.
    """
    symmetric, other = operations(form, rows, cols, num_steps, num_segments)
    return (symmetric // 2 if triangle else symmetric) + other


def num_products(form: Form, num_steps: int, num_segments: int = 1) -> int:
    """Count the matrix products of the orthogonalization of one matrix, each of which is a launch on a GPU."""
    if form == "standard":
        return 3 * num_steps
    return 2 * num_segments + num_steps + 3 * (num_steps - num_segments)


@cache
def triangle_gain(n: int, count: int, architecture: int | None) -> float:
    """Return how many times faster than the whole products the kernel makes `count` symmetric ones, by counting waves.

    Every multiprocessor takes a tile at a time; the products take as long as the one with the most tiles. A tile costs
    its loop along k, at the rate of its tiling, and what follows the loop. The vendor's product is taken to keep all
    multiprocessors equally busy, which no product does: the gain is the lower for it.

    Args:
        n: the side of a result. The depth of the product is taken to be n too; a deeper one gains more.
        count: the number of results that are made in one launch.
        architecture: a key of `NUM_PROCESSORS`.
    """
    tiling, processors = tiling_for(n, count, torch.float16, architecture), NUM_PROCESSORS[architecture]
    most_tiles = -(-num_tiles(n, count, tiling) // processors)
    elements = most_tiles * tiling.block_m * tiling.block_n
    return (count * n * n / processors) / (elements / tiling.rate * (1 + tiling.epilogue / n))


def waves(count: int, architecture: int | None) -> int:
    """Return how often the multiprocessors start over, where each takes one of `count` matrices at a time."""
    return -(-count // NUM_PROCESSORS[architecture])
