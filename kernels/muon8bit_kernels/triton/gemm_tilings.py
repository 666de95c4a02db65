"""Tilings of symmetric products, by shape and architecture alone; nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GemmTiling:
    """Elements of a tile (block_m x block_n) and of a step along k, warps, pipeline stages.

    `rate` is the share of the tensor cores that the traffic in shared memory leaves busy, by counting bytes. `epilogue`
    is what follows the loop along k, in the elements along k that take as long: instructions of all warps over four a
    cycle, and 2048 multiply-adds a cycle. Both compare tilings and products, and are not measured.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    rate: float = 1.0
    epilogue: float = 200.0


# Half precision, by compute capability. All of them compile without spilling for either order of the operands, by
# Triton 3.6.0 and 3.7.1. Through pointers 128 x 256 does not.
TILINGS: dict[int | None, tuple[GemmTiling, ...]] = {
    80: (GemmTiling(64, 64, 64, 4, 4, 0.6), GemmTiling(128, 128, 32, 4, 4, 0.9)),
    90: (
        GemmTiling(64, 64, 64, 4, 4, 0.5, 205.0),
        GemmTiling(128, 128, 64, 4, 3, 0.8, 128.0),
        GemmTiling(128, 256, 64, 8, 4, 1.0, 173.0),
    ),
    100: (GemmTiling(64, 64, 64, 4, 4, 0.4), GemmTiling(128, 128, 64, 8, 4, 0.7), GemmTiling(128, 256, 64, 8, 4)),
}
# Any other: within the 99 KiB of shared memory that consumer GPUs give a program.
TILINGS[None] = (TILINGS[80][0], GemmTiling(128, 128, 32, 8, 4, 0.8))
FP32_TILING = GemmTiling(64, 64, 32, 4, 3)
# Where rows do not begin at multiples of 16 bytes, every element has an address of its own, and where the architecture
# has descriptors but the strides forbid them, addresses take the registers that wgmma needs: larger tiles spill.
UNALIGNED_TILING = GemmTiling(64, 64, 32, 4, 3)
# Compute capabilities whose operands come through descriptors.
DESCRIBED = (90, 100)
# Multiprocessors of A100, H100 and H200, B200, and of a large consumer GPU; constants, not the device's own number, so
# that a product takes one path on all variants of an architecture.
NUM_PROCESSORS: dict[int | None, int] = {80: 108, 90: 132, 100: 148, None: 128}


def architecture_of(capability: tuple[int, int]) -> int | None:
    """Return the key of TILINGS for a compute capability of NVIDIA's, (major, minor)."""
    return 80 if capability == (8, 0) else {9: 90, 10: 100}.get(capability[0])


def num_tiles(n: int, batch: int, tiling: GemmTiling) -> int:
    """Return how many tiles (block_m x block_n) a symmetric product computes for `batch` results [n, n]."""
    side = -(-n // tiling.block_n)
    return batch * (tiling.block_n // tiling.block_m) * side * (side + 1) // 2


def tiling_for(
    n: int,
    batch: int,
    dtype: torch.dtype,
    architecture: int | None,
    *,
    is_aligned: bool = True,
    is_described: bool = True,
) -> GemmTiling:
    """Return the tiling for `batch` results [n, n]: the least time for the processor that gets the most tiles.

    A result keeps 52% of 132 processors busy at n = 1024, 55% at 2048, 76% at 3072, all at 4096; 16 results of 1024
    keep 81% of them busy, 64 results 97%. Below about 60% the full product, which cuts evenly, is no slower.

    Args:
        n: the side of a result.
        batch: the number of results.
        dtype: the operands' dtype.
        architecture: a key of TILINGS.
        is_aligned: addresses are multiples of 16 bytes, and n, k and strides of 8 elements.
        is_described: the operands can come through descriptors, where the architecture has them.
    """
    if dtype == torch.float32:
        return FP32_TILING
    if not is_aligned or (architecture in DESCRIBED and not is_described):
        return UNALIGNED_TILING

    def time(tiling: GemmTiling) -> float:
        most_tiles = -(-num_tiles(n, batch, tiling) // NUM_PROCESSORS[architecture])
        return most_tiles * tiling.block_m * tiling.block_n / tiling.rate

    return min(TILINGS[architecture], key=lambda tiling: (time(tiling), -tiling.block_n))
