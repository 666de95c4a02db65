"""The kernels as operators of torch (`torch.ops.muon8bit`), so that `torch.compile` and fake tensors understand them.

One call serves a batch, never a matrix. Arguments are those of `reference`, tensors by position and numbers by keyword;
besides, `scales` is empty where the codes are an fp32 buffer, `decay` and `scale` are 0-d tensors (on the CPU read at
once; on the parameters' device never waited for), `keys`, `first_indices` and `row_stride` are those of `RandomBits`,
and `backend` is that of `kernels_for`, whose errors apply.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor
from torch.library import custom_op

from .batches import batch_shape
from .dispatch import kernels_for
from .reference import num_blocks

# torch reads the schema from these annotations, and does not read `X | None` in strings on every supported version.
# ruff: noqa: UP045


@custom_op("muon8bit::momentum_stats", mutates_args=())
def momentum_stats(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    beta: float,
    nesterov: bool,
    codebook: Optional[str],
    block_size: int,
    backend: Optional[str] = None,
) -> Tensor:
    """Compute the first phase of the momentum step, read only: fp32 [batch, rows, blocks], sums of u squared."""
    options: dict[str, Any] = {"nesterov": nesterov, "codebook": codebook, "block_size": block_size}
    return kernels_for(grads[0].device, backend).momentum_stats(codes, scales or None, grads, beta=beta, **options)


@momentum_stats.register_fake
def _(codes, scales, grads, *, beta, nesterov, codebook, block_size, backend=None):  # type: ignore[no-untyped-def]  # noqa: ARG001
    batch, rows, cols = batch_shape(codes)
    return grads[0].new_empty(batch, rows, num_blocks(cols, block_size), dtype=torch.float32)


@custom_op("muon8bit::momentum_apply", mutates_args=("codes", "scales", "out"))
def momentum_apply(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    grads: Sequence[Tensor],
    norms: Tensor,
    out: Tensor,
    skip: Optional[Tensor],
    *,
    beta: float,
    nesterov: bool,
    codebook: Optional[str],
    block_size: int,
    backend: Optional[str] = None,
) -> None:
    """Write codes, scales and the Newton-Schulz input `out`: the second phase of the momentum step."""
    options: dict[str, Any] = {"nesterov": nesterov, "codebook": codebook, "block_size": block_size, "skip": skip}
    kernels_for(out.device, backend).momentum_apply(codes, scales or None, grads, norms, out, beta=beta, **options)


@custom_op("muon8bit::update_params", mutates_args=("params",))
def update_params(
    params: Sequence[Tensor],
    directions: Tensor,
    decay: Tensor,
    scale: Tensor,
    skip: Optional[Tensor],
    *,
    keys: Optional[Sequence[int]] = None,
    first_indices: Optional[Sequence[int]] = None,
    row_stride: Optional[int] = None,
    backend: Optional[str] = None,
) -> None:
    """Write param <- param * decay - direction * scale."""
    options: dict[str, Any] = {"keys": keys, "firsts": first_indices, "pitch": row_stride, "skip": skip}
    factors = (decay, scale) if decay.device.type != "cpu" else (decay.item(), scale.item())
    options |= dict(zip(("decay", "scale"), factors, strict=True))
    kernels_for(directions.device, backend).update_params(params, directions, **options)


@custom_op("muon8bit::step_tiny", mutates_args=("codes", "scales", "params"))
def step_tiny(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    norms: Tensor,
    decay: Tensor,
    scale: Tensor,
    skip: Optional[Tensor],
    *,
    beta: float,
    nesterov: bool,
    codebook: Optional[str],
    block_size: int,
    coefficients: Sequence[float],
    keys: Optional[Sequence[int]] = None,
    first_indices: Optional[Sequence[int]] = None,
    row_stride: Optional[int] = None,
    backend: Optional[str] = None,
) -> None:
    """Do the second phase of matrices with a small side, whole; `coefficients`: a, b, c of every Newton-Schulz step."""
    options: dict[str, Any] = {"keys": keys, "firsts": first_indices, "pitch": row_stride, "skip": skip}
    factors = (decay, scale) if decay.device.type != "cpu" else (decay.item(), scale.item())
    options |= dict(zip(("decay", "scale"), factors, strict=True))
    options |= {"beta": beta, "nesterov": nesterov, "codebook": codebook, "block_size": block_size}
    steps = [(a, b, c) for a, b, c in zip(*(coefficients[i::3] for i in range(3)), strict=True)]
    kernels_for(norms.device, backend).step_tiny(codes, scales or None, grads, params, norms, steps=steps, **options)


@custom_op("muon8bit::symmetric_product", mutates_args=())
def symmetric_product(
    A: Tensor,
    B: Tensor,
    D: Optional[Tensor],
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    diagonal: float = 0.0,
    backend: Optional[str] = None,
) -> Tensor:
    """Compute alpha * A B^T + beta * D + diagonal * I, symmetric: [batch, n, n]."""
    kernels = kernels_for(A.device, backend)
    return kernels.symmetric_product(A, B, alpha=alpha, D=D, beta=beta, diagonal=diagonal)


@symmetric_product.register_fake
def _(A, B, D, *, alpha=1.0, beta=0.0, diagonal=0.0, backend=None):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return A.new_empty(A.shape[0], A.shape[1], A.shape[1])


@custom_op("muon8bit::round_stochastic", mutates_args=())
def round_stochastic(values: Tensor, *, key: int, first_index: int, backend: Optional[str] = None) -> Tensor:
    """Round fp32 `values` to bf16 of the same shape stochastically."""
    return kernels_for(values.device, backend).round_stochastic(values, key=key, first=first_index)


@round_stochastic.register_fake
def _(values, *, key, first_index, backend=None):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return torch.empty_like(values, dtype=torch.bfloat16)


@momentum_apply.register_fake
@update_params.register_fake
@step_tiny.register_fake
def _(*args, **options):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return None
