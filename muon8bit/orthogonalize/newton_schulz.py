"""Newton-Schulz iteration, standard and Gram form.

X: input [rows, cols] or a batch of such, rows <= cols, Frobenius norm at most 1.   A, R: [rows, rows], X X^T.
P: the step's polynomial bA + cA^2.   Q: product of the steps' polynomials, so that the result is Q X.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .coefficients import Triple

# From this many rows on, oneDNN's fp32 product is the faster on CPU (x86, measured; below, the BLAS is).
_ONEDNN_MIN_ROWS = 64


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


def _polynomial(gram: Tensor, b: float, c: float) -> Tensor:
    """bA + cA^2 of a symmetric A [..., n, n]."""
    if c == 0.0:  # the cubic iteration; a bf16 `addmm` with alpha=0 is some 200 times slower on CPU
        return gram * b
    if gram.dtype == torch.float32:
        return matmul_nt(gram, gram).mul_(c).add_(gram, alpha=b)
    return (
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        if gram.ndim == 3
        else torch.addmm(gram, gram, gram, beta=b, alpha=c)
    )


def standard(X: Tensor, steps: Sequence[Triple]) -> Tensor:
    """X <- aX + (bA + cA^2) X with A = X X^T. In half precision each sum is rounded once, as in torch.optim.Muon."""
    for a, b, c in steps:
        P = _polynomial(matmul_nt(X, X), b, c)
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
    R = matmul_nt(X, X)
    Q: Tensor | None = None
    for index, (a, b, c) in enumerate(steps):
        Z = _polynomial(R, b, c)
        Z.diagonal(dim1=-2, dim2=-1).add_(a)
        # All of these are polynomials of R, hence symmetric and commuting.
        Q = Z if Q is None else matmul_nt(Z, Q)
        if index + 1 < len(steps):
            R = matmul_nt(matmul_nt(Z, R), Z)
    assert Q is not None
    return matmul_nt(Q, X.mT)
