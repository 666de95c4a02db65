"""Products with a symmetric result in Triton: one triangle of tiles is computed, the other is its mirror image.

The lower triangle is cut into squares of BLOCK_N rows, a square into tiles of BLOCK_M rows (all or half of them), and
one program computes a tile. Operands come through tensor descriptors (TMA) where the architecture has them and their
strides allow it, else through pointers. Nothing is tuned at run time: shapes and strides decide the path.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..reference.products import check_operands
from .gemm_tilings import GemmTiling, num_tiles, tiling_for

# Squares of this many rows are walked column by column: programs that run together share their operands in L2.
_GROUP = tl.constexpr(8)


@triton.jit
def _triangle(index):
    """Return row and column of pair number `index` (int32, below 2**27) of 0 <= column <= row, counted row by row.

    Where rounding changes the row at all, it rounds up to the next one: one correction makes it exact.
    """
    row = ((tl.sqrt_rn((8 * index + 1).to(tl.float32)) - 1.0) * 0.5).to(tl.int32)
    row -= (row * (row + 1) // 2 > index).to(tl.int32)
    return row, index - row * (row + 1) // 2


@triton.jit
def _square(index, side, GROUP: tl.constexpr):
    """Return row and column of square number `index` of a lower triangle side x side, counted in groups of rows."""
    row, _ = _triangle(index)
    first = row // GROUP * GROUP
    rows = tl.minimum(GROUP, side - first)
    inside = index - first * (first + 1) // 2
    corner_row, corner_col = _triangle(tl.maximum(inside - first * rows, 0))
    whole = inside < first * rows  # left of the group's own triangle, where all its rows have squares
    return first + tl.where(whole, inside % rows, corner_row), tl.where(whole, inside // rows, first + corner_col)


@triton.jit
def _described(matrix, batch, row, start, TALL: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Load block [ROWS, DEPTH] of an operand through its descriptor; it is zero beyond the operand's end."""
    if TALL:
        block = matrix.load([batch, start, row]).reshape(DEPTH, ROWS).T
    else:
        block = matrix.load([batch, row, start]).reshape(ROWS, DEPTH)
    return block


@triton.jit
def _finish(product, row, col, c, d, alpha, beta, diagonal, n, HAS_D: tl.constexpr, SIDE: tl.constexpr):
    """Add to a square of A B^T, fp32 [SIDE, SIDE] at (row, col), round it, and store it and its mirror image."""
    down, across = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    exists = (row + down < n) & (col + across < n)
    corner = row.to(tl.int64) * n + col
    value = product * alpha
    if HAS_D:
        value += tl.load(d + corner + down * n + across, exists, other=0.0).to(tl.float32) * beta
    value = tl.where(row + down == col + across, value + diagonal, value)
    out = value.to(c.dtype.element_ty)
    mirrored = tl.trans(out)
    # A diagonal square of A B^T need not come out symmetric to the bit where A is not B.
    lower = tl.where((row > col) | (down >= across), out, mirrored)
    tl.store(c + corner + down * n + across, lower, exists)
    exists = (row > col) & (col + down < n) & (row + across < n)
    tl.store(c + (col.to(tl.int64) * n + row) + down * n + across, mirrored, exists)


@triton.jit
def _symmetric_product_kernel(
    a,
    b,
    c,
    d,
    alpha,
    beta,
    diagonal,
    n,
    k,
    a_batch_stride,
    a_row_stride,
    a_col_stride,
    b_batch_stride,
    b_row_stride,
    b_col_stride,
    HAS_D: tl.constexpr,
    DESCRIBED: tl.constexpr,
    A_TALL: tl.constexpr,
    B_TALL: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    side = tl.cdiv(n, BLOCK_N)
    num_squares = side * (side + 1) // 2
    PARTS: tl.constexpr = BLOCK_N // BLOCK_M
    tile = tl.program_id(0) % (num_squares * PARTS)
    batch = tl.program_id(0) // (num_squares * PARTS)
    row, col = _square(tile // PARTS, side, _GROUP)
    row = row * BLOCK_N + tile % PARTS * BLOCK_M
    col = col * BLOCK_N
    if row >= n:  # of the last square only the upper part exists
        return
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DESCRIBED:
        for start in range(0, k, BLOCK_K):
            left = _described(a, batch, row, start, A_TALL, BLOCK_M, BLOCK_K)
            right = _described(b, batch, col, start, B_TALL, BLOCK_N, BLOCK_K)
            product = tl.dot(left, right.T, product, input_precision="ieee")
    else:
        down, across, depth = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :], tl.arange(0, BLOCK_K)
        a += batch.to(tl.int64) * a_batch_stride + row.to(tl.int64) * a_row_stride
        b += batch.to(tl.int64) * b_batch_stride + col.to(tl.int64) * b_row_stride
        left_places = a + (down.to(tl.int64) * a_row_stride + depth[None, :].to(tl.int64) * a_col_stride)
        right_places = b + (across.to(tl.int64) * b_row_stride + depth[:, None].to(tl.int64) * b_col_stride)
        for start in range(0, k, BLOCK_K):
            left_exists, right_exists = row + down < n, col + across < n
            if TAIL:
                left_exists &= depth[None, :] < k - start
                right_exists &= depth[:, None] < k - start
            left = tl.load(left_places, left_exists, other=0.0)
            right = tl.load(right_places, right_exists, other=0.0)
            product = tl.dot(left, right, product, input_precision="ieee")
            left_places += BLOCK_K * tl.cast(a_col_stride, tl.int64)
            right_places += BLOCK_K * tl.cast(b_col_stride, tl.int64)
    alpha = tl.cast(alpha, tl.float32)  # torch.compile passes scalars as fp64
    beta = tl.cast(beta, tl.float32)
    diagonal = tl.cast(diagonal, tl.float32)
    c += batch.to(tl.int64) * n * n
    if HAS_D:
        d += batch.to(tl.int64) * n * n
    if PARTS == 1:
        _finish(product, row, col, c, d, alpha, beta, diagonal, n, HAS_D, BLOCK_M)
    else:
        first, second = product.reshape(BLOCK_M, 2, BLOCK_M).permute(0, 2, 1).split()
        _finish(first, row, col, c, d, alpha, beta, diagonal, n, HAS_D, BLOCK_M)
        if row > col:  # else it lies above the diagonal
            col += BLOCK_M
            _finish(second, row, col, c, d, alpha, beta, diagonal, n, HAS_D, BLOCK_M)


def _architecture(device: torch.device) -> int | None:
    """Return the device's key of TILINGS."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 80 if (major, minor) == (8, 0) else {9: 90, 10: 100}.get(major)


def _is_tall(matrix: Tensor) -> bool:
    """Return whether n, not k, is the contiguous dimension of [batch, n, k]."""
    return matrix.stride(2) != 1 and matrix.shape[2] > 1


def _descriptor(matrix: Tensor, block_rows: int, block_k: int) -> TensorDescriptor | None:
    """Return a descriptor of [batch, n, k] in blocks of one matrix, or None if TMA cannot take it.

    It is a descriptor of [batch, k, n] if the matrix is tall.
    """
    view, block = (matrix.mT, [block_k, block_rows]) if _is_tall(matrix) else (matrix, [block_rows, block_k])
    batch, rows, cols = view.shape
    strides = [view.stride(0) if batch > 1 else rows * view.stride(1), view.stride(1), 1]
    aligned = all(stride > 0 and stride * view.itemsize % 16 == 0 for stride in strides[:2])
    if view.numel() == 0 or view.stride(2) != 1 or not aligned or view.data_ptr() % 16:
        return None
    return TensorDescriptor(view, [batch, rows, cols], strides, [1, *block])


def _launch(
    A: Tensor,
    B: Tensor,
    D: Tensor | None,
    factors: tuple[float, float, float],
    tiling: GemmTiling,
    with_descriptors: bool,
) -> Tensor:
    """Run the kernel with (alpha, beta, diagonal) in this tiling, through descriptors if asked for and possible."""
    batch, n, k = A.shape
    C = torch.empty(batch, n, n, dtype=A.dtype, device=A.device)
    if C.numel() == 0:
        return C
    left = _descriptor(A, tiling.block_m, tiling.block_k) if with_descriptors else None
    right = _descriptor(B, tiling.block_n, tiling.block_k) if with_descriptors else None
    described = left is not None and right is not None
    with torch.cuda.device_of(A):  # Triton launches on the current device, wherever its arguments are
        _symmetric_product_kernel[(num_tiles(n, batch, tiling),)](
            left if described else A,
            right if described else B,
            C,
            D,
            *factors,
            n,
            k,
            *A.stride(),
            *B.stride(),
            HAS_D=D is not None,
            DESCRIBED=described,
            A_TALL=_is_tall(A),
            B_TALL=_is_tall(B),
            TAIL=k % tiling.block_k != 0,
            BLOCK_M=tiling.block_m,
            BLOCK_N=tiling.block_n,
            BLOCK_K=tiling.block_k,
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
        )
    return C


def symmetric_product(
    A: Tensor,
    B: Tensor,
    *,
    alpha: float = 1.0,
    D: Tensor | None = None,
    beta: float = 0.0,
    diagonal: float = 0.0,
) -> Tensor:
    """Return alpha * A B^T + beta * D + diagonal * I in one launch, where that is symmetric; the caller guarantees it.

    The result is symmetric to the bit: its upper triangle is the mirror image of the lower one.

    Args:
        A, B: [batch, n, k], fp32, bf16 or fp16, either k or n contiguous (A may be the transposed view of a tall
            matrix); may be the same tensor. Fast where the address and the other strides are multiples of 16 bytes.
        D: [batch, n, n], contiguous, dtype of A, or None; only its lower triangle is looked at.
        alpha, beta, diagonal: factors without unit. With beta 0 `D` is not looked at.

    Returns:
        [batch, n, n], contiguous, dtype of A. Accumulated (fp32 without TF32) and added in fp32, rounded once.

    Raises:
        ValueError: for shapes, dtypes, devices or strides other than these, and for fp32 on compute capability 10.
    """
    check_operands(A, B, D)
    architecture = _architecture(A.device)
    if architecture == 100 and A.dtype == torch.float32:
        # Triton 3.7 compiles an IEEE product of matrices to tcgen05 in TF32 there, without a word.
        raise ValueError("float32 is not supported on compute capability 10, where it would run in TF32")
    tiling = tiling_for(A.shape[1], A.shape[0], A.dtype, architecture)
    with_descriptors = architecture in (90, 100) and A.dtype != torch.float32
    return _launch(A, B, D if beta != 0.0 else None, (alpha, beta, diagonal), tiling, with_descriptors)
