"""Operations and bytes of the orthogonalization of one matrix, counted, not measured. m = min(rows, cols), n = max."""

from __future__ import annotations

from typing import Literal, TypeAlias

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
