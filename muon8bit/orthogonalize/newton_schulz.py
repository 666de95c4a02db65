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

from torch import Tensor

from .coefficients import Triple
from .products import Products


def standard(X: Tensor, steps: Sequence[Triple], products: Products) -> Tensor:
    """All steps in the standard form; X may be overwritten."""
    spare = None
    for a, b, c in steps:
        P = products.polynomial(X, b, c)
        spare, X = X, products.advance(P, X, a, spare)
        del P
    return X


def gram(X: Tensor, steps: Sequence[Triple], products: Products, segments: Sequence[int]) -> Tensor:
    """All steps in the Gram form, `segments` of them between restarts; X may be overwritten."""
    spare, first = None, 0
    for count in segments:
        Q = factor(products.symmetric(X, X), steps[first : first + count], products)
        spare, X = X, products.apply(Q, X, spare)
        first += count
        del Q
    return X


def factor(R: Tensor, steps: Sequence[Triple], products: Products) -> Tensor:
    """Q of one segment from the Gram matrix of X, [..., rows, rows]; R stays as it is."""
    Q: Tensor | None = None
    for index, (a, b, c) in enumerate(steps):
        Z = products.symmetric(R, R, alpha=c, D=R, beta=b, diagonal=a)
        Q = Z if Q is None else products.symmetric(Z, Q)
        if index + 1 < len(steps):
            R = products.symmetric(Z, R)
            R = products.symmetric(R, Z)
    assert Q is not None
    return Q
