"""Whole step of small matrices in torch: momentum, Newton-Schulz in Gram form, update; `triton.tiny` does the same.

    R = X X^T;   each step  Z = aI + bR + cR^2,  Q <- ZQ,  R <- ZRZ;   O = Q X

X is u / norm with its small side first. All of it is fp32, which needs no restart. Source: Zhang, Amsel, Chen, Dao 2026
(the Gram form of Newton-Schulz).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ..batches import batch_shape, known_flag
from ..codebooks import Codebook
from .momentum import momentum_apply
from .update import check_rounding, update_params

# The small side: what one Triton program keeps of the Gram matrix in registers.
TINY_MAX = 64
# Rounding gives R eigenvalues near -2^-24 where X is rank-deficient, and a step multiplies them by a^2. What they may
# reach: five of Jordan's steps reach .014, Polar Express .058, six of Jordan's .17; ten diverge.
MAX_GROWTH = 0.1


def check_tiny(rows: int, cols: int, steps: Sequence[tuple[float, float, float]]) -> None:
    """Check that `step_tiny` takes these matrices and coefficients.

    Args:
        rows, cols: the matrices' shape.
        steps: one (a, b, c) a Newton-Schulz step.

    Raises:
        ValueError: if the small side exceeds `TINY_MAX`, if there are no steps, or if they amplify rounding too much
            for a Gram form without a restart.
    """
    if min(rows, cols) > TINY_MAX:
        raise ValueError(f"step_tiny takes matrices with a side of at most {TINY_MAX}, not [{rows}, {cols}]")
    growth = prod(a for a, _, _ in steps) ** 2 * 2.0**-24
    if not steps or growth >= MAX_GROWTH:
        raise ValueError(f"step_tiny cannot carry the steps {list(steps)}: rounding grows to {growth:.2g}")


def _polynomial(R: Tensor, a: float, b: float, c: float) -> Tensor:
    """Return aI + bR + cR^2."""
    Z = (R @ R).mul_(c).add_(R, alpha=b)
    Z.diagonal(dim1=-2, dim2=-1).add_(a)
    return Z


def _directions(X: Tensor, steps: Sequence[tuple[float, float, float]]) -> Tensor:
    """Return Q X for fp32 X [batch, rows, cols], rows <= cols."""
    R = X @ X.mT
    Z = _polynomial(R, *steps[0])
    Q = Z
    for triple in steps[1:]:
        R = Z @ R @ Z
        Z = _polynomial(R, *triple)
        Q = Z @ Q
    return Q @ X


def step_tiny(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    norms: Tensor,
    *,
    beta: float,
    nesterov: bool,
    codebook: Codebook | None,
    block_size: int,
    steps: Sequence[tuple[float, float, float]],
    decay: float | Tensor,
    scale: float | Tensor,
    keys: Sequence[int] | None = None,
    firsts: Sequence[int] | None = None,
    pitch: int | None = None,
    cautious: bool = False,
    skip: Tensor | None = None,
) -> None:
    """Do the second phase of the step of matrices with a small side: codes, scales and parameters are overwritten.

    Args:
        codes: stacks [count, rows, cols], int8 (linear), uint8 (dynamic) or fp32 (None); rows or cols at most 64.
        scales: stacks [count, rows, blocks], fp32; None with `codebook=None`.
        grads, params: stacks [count, rows, cols], fp32, bf16 or fp16, any strides.
        norms: fp32 [batch], the positive divisors of u (Frobenius norms, bounded below).
        beta, nesterov, codebook, block_size: as in `momentum_stats`.
        steps: one (a, b, c) a Newton-Schulz step.
        decay, scale, keys, firsts, pitch, cautious: as in `update_params`; `scale` is lr times the factor of the shape.
        skip: fp32, 0-d or [batch], one a matrix; where it is not 0, nothing is written.

    Raises:
        ValueError: if both sides exceed 64, for steps that fp32 does not carry (`check_tiny`), or for keys with
            parameters that are not bf16.
    """
    batch, rows, cols = batch_shape(codes)
    check_tiny(rows, cols, steps)
    check_rounding(params[0], keys)
    is_over, _ = known_flag(skip, rows)
    if is_over:
        return
    X = torch.zeros(batch, rows, cols, dtype=torch.float32, device=norms.device)  # as which skipped matrices stay
    options = {"beta": beta, "nesterov": nesterov, "block_size": block_size, "skip": skip}
    momentum_apply(codes, scales, grads, norms, X, codebook=codebook, **options)  # type: ignore[arg-type]
    O = _directions(X, steps) if rows <= cols else _directions(X.mT, steps).mT  # noqa: E741
    factors = {"decay": decay, "scale": scale, "cautious": cautious, "skip": skip}
    update_params(params, O, keys=keys, firsts=firsts, pitch=pitch, **factors)  # type: ignore[arg-type]
