"""Newton-Schulz iteration, standard and Gram form.

X: input [rows, cols] or a batch of such, rows <= cols, Frobenius norm at most 1.   A, R: [rows, rows], X X^T.
P: the step's polynomial bA + cA^2.   Q: product of the steps' polynomials, so that the result is Q X.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .coefficients import Triple

# From this many rows on, oneDNN's fp32 product is the faster on CPU (x86, measured; below, the BLAS is).
_ONEDNN_MIN_ROWS = 64
# A symmetric result is computed by its lower row panels on CPU: 10/16 of the products. Below this size the
# copies cost more than they save (measured at 256, 512, 1024 and 2048 rows).
_CPU_PANELS = 4
_CPU_PANELS_MIN_ROWS = 1024


def matmul_nt(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right^T`, [..., m, k] x [..., n, k] -> [..., m, n].

    fp32 matrices on CPU go to oneDNN, which torch's `matmul` leaves to the BLAS; there MKL was 2.3 times slower on an
    AVX-512 AMD machine. Both accumulate in fp32.
    """
    large_fp32 = (
        left.ndim == 2 and left.dtype == torch.float32 and min(left.shape[0], right.shape[0]) >= _ONEDNN_MIN_ROWS
    )
    if left.device.type == "cpu" and large_fp32 and torch.backends.mkldnn.is_available():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
        return product
    return left @ right.mT


def _panels(matrix: Tensor) -> Iterator[tuple[slice, slice]]:
    """Row panels of a symmetric result and the columns up to its diagonal; one whole panel where that pays less."""
    rows = matrix.shape[-2]
    count = _CPU_PANELS if matrix.ndim == 2 and matrix.device.type == "cpu" and rows >= _CPU_PANELS_MIN_ROWS else 1
    edges = [rows * i // count for i in range(count + 1)]
    for start, stop in pairwise(edges):
        yield slice(start, stop), slice(0, stop)


def _mirror(panels: list[tuple[slice, slice, Tensor]]) -> Tensor:
    """Assemble a symmetric matrix from its lower panels."""
    if len(panels) == 1:
        return panels[0][2]
    out = panels[-1][2].new_empty(panels[-1][1].stop, panels[-1][1].stop)
    for rows, cols, panel in panels:
        out[rows, cols] = panel
        out[: rows.start, rows] = panel[:, : rows.start].T
    return out


def symmetric_nt(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right^T` where that is symmetric, [..., n, k] x [..., n, k] -> [..., n, n]."""
    panels = list(_panels(left))
    if len(panels) > 1:  # oneDNN is some 100 times slower on a panel of a transposed view
        left, right = left.contiguous(), right.contiguous()
    return _mirror([(r, c, matmul_nt(left[..., r, :], right[..., c, :])) for r, c in panels])


def _polynomial(A: Tensor, b: float, c: float) -> Tensor:
    """bA + cA^2 of a symmetric A [..., n, n]."""
    if c == 0.0:  # the cubic iteration; a bf16 `addmm` with alpha=0 is some 200 times slower on CPU
        return A * b
    if A.dtype == torch.float32:
        return symmetric_nt(A, A).mul_(c).add_(A, alpha=b)
    if A.ndim == 3:
        return torch.baddbmm(A, A, A, beta=b, alpha=c)
    return _mirror([(r, k, torch.addmm(A[r, k], A[r], A[:, k], beta=b, alpha=c)) for r, k in _panels(A)])


def standard(X: Tensor, steps: Sequence[Triple]) -> Tensor:
    """X <- aX + (bA + cA^2) X with A = X X^T. In half precision each sum is rounded once, as in torch.optim.Muon."""
    for a, b, c in steps:
        P = _polynomial(symmetric_nt(X, X), b, c)
        if X.dtype == torch.float32:
            X = matmul_nt(P, X.mT).add_(X, alpha=a)
        else:
            X = torch.baddbmm(X, P, X, beta=a) if X.ndim == 3 else torch.addmm(X, P, X, beta=a)
    return X


def gram(X: Tensor, steps: Sequence[Triple]) -> Tensor:
    """Iterate on the small [rows, rows] side: R = X X^T once, then Z = aI + bR + cR^2, Q <- ZQ, R <- ZRZ.

    True fp32 only (no TF32): without a restart half precision fails on spectra like 1/k.
    Source: Zhang, Amsel, Chen, Dao 2026 (the Gram form of Newton-Schulz).
    """
    R = symmetric_nt(X, X)
    Q: Tensor | None = None
    for index, (a, b, c) in enumerate(steps):
        Z = _polynomial(R, b, c)
        Z.diagonal(dim1=-2, dim2=-1).add_(a)
        # All of these are polynomials of R, hence symmetric and commuting.
        Q = Z if Q is None else symmetric_nt(Z, Q)
        if index + 1 < len(steps):
            R = symmetric_nt(symmetric_nt(Z, R), Z)
    assert Q is not None
    return matmul_nt(Q, X.mT)
