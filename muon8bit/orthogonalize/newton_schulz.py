"""Newton-Schulz iteration of X [rows, cols], rows <= cols, or a batch of such, Frobenius norm at most 1.

    A = X X^T,   P = bA + cA^2,   X <- aX + P X                     standard form: every step on X
    R = X X^T,   Z = aI + bR + cR^2,   Q <- Z Q,   R <- Z R Z       Gram form: steps on the small side [rows, rows] ...
                                       X <- Q X                     ... and X once a segment

(a, b, c) are the step's coefficients, Q starts as I. A, P, R, Z, Q are symmetric, and those of one segment commute:
they are polynomials of one matrix. A segment ends with a restart, which makes R anew from X.
Sources: Jordan 2024 (standard); Zhang, Amsel, Chen, Dao 2026 (Gram form and restarts).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from muon8bit_kernels import Backend
from torch import Tensor

from .coefficients import Coefficients, Triple
from .method import NSMethod
from .products import Products, accumulating_in_fp32


def orthogonalize(X: Tensor, coefficients: Coefficients, method: NSMethod, backend: Backend | None = None) -> Tensor:
    """Orthogonalize a batch by Newton-Schulz, whatever autocast and the process's fp32 precision say.

    Args:
        X: [batch, rows, cols] in `method.dtype`, each matrix with Frobenius norm at most 1. It is overwritten.
        coefficients: one triple a step.
        method: from `choose_method`.
        backend: runs the kernel that `method.products == "kernel"` asks for: None (by device), `"reference"` or
            `"triton"`.

    Returns:
        [batch, rows, cols] in `method.dtype`, perhaps in the memory of X. Singular values end near 0.7 to 1.2 (Jordan's
        coefficients).
    """
    products = Products(method.products, backend)
    wide = X.mT if X.shape[-2] > X.shape[-1] else X
    # A batch of one as a plain matrix: the 2-D products are the faster ones.
    matrix = wide[0] if len(wide) == 1 else wide
    if X.device.type == "cpu" and (method.form == "standard" or method.products == "panels"):
        # oneDNN is up to some 100 times slower on panels of a transposed view, and into one.
        matrix = matrix.contiguous()
    with torch.autocast(X.device.type, enabled=False), accumulating_in_fp32(method.dtype):
        if method.form == "gram":
            out = gram(matrix, coefficients.steps, products, method.segments)
        else:
            out = standard(matrix, coefficients.steps, products)
    out = out.view(wide.shape)
    return out.mT if X.shape[-2] > X.shape[-1] else out


def standard(X: Tensor, steps: Sequence[Triple], products: Products) -> Tensor:
    """Run all steps in the standard form; X may be overwritten."""
    spare = None
    for a, b, c in steps:
        P = products.polynomial(X, b, c)
        spare, X = X, products.advance(P, X, a, spare)
        del P
    return X


def gram(X: Tensor, steps: Sequence[Triple], products: Products, segments: Sequence[int]) -> Tensor:
    """Run all steps in the Gram form, with restarts after each number in `segments`; X may be overwritten."""
    spare, first = None, 0
    for count in segments:
        Q = factor(products.symmetric(X, X), steps[first : first + count], products)
        spare, X = X, products.apply(Q, X, spare)
        first += count
        del Q
    return X


def factor(R: Tensor, steps: Sequence[Triple], products: Products) -> Tensor:
    """Return the Q of one segment, [..., rows, rows], from the Gram matrix R of X; R stays as it is."""
    Q: Tensor | None = None
    for index, (a, b, c) in enumerate(steps):
        Z = products.symmetric(R, R, alpha=c, D=R, beta=b, diagonal=a)
        Q = Z if Q is None else products.symmetric(Z, Q)
        if index + 1 < len(steps):
            R = products.symmetric(Z, R)
            R = products.symmetric(R, Z)
    assert Q is not None
    return Q
