"""The kernels as operators of torch (`torch.ops.muon8bit`), so that `torch.compile` and fake tensors understand them.

One call serves a batch, never a matrix. Arguments are those of `reference` and `update_reference`; besides, `scales` is
empty where the codes are an fp32 buffer, `decay` and `scale` are 0-d tensors (on the CPU read at once; on the
parameters' device never waited for), and `backend` is that of `kernels_for`, whose errors apply.
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
    beta: float,
    nesterov: bool,
    codebook: Optional[str],
    block_size: int,
    backend: Optional[str],
) -> Tensor:
    """First phase of the momentum step, read only: fp32 [batch, rows, blocks], sums of u squared."""
    kernels, options = kernels_for(grads[0].device, backend), _options(beta, nesterov, codebook, block_size)
    return kernels.momentum_stats(codes, scales or None, grads, **options)


@momentum_stats.register_fake
def _(codes, scales, grads, beta, nesterov, codebook, block_size, backend):  # type: ignore[no-untyped-def]  # noqa: ARG001
    batch, rows, cols = batch_shape(codes)
    return grads[0].new_empty(batch, rows, num_blocks(cols, block_size), dtype=torch.float32)


@custom_op("muon8bit::momentum_apply", mutates_args=("codes", "scales", "out"))
def momentum_apply(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    grads: Sequence[Tensor],
    norms: Tensor,
    out: Tensor,
    beta: float,
    nesterov: bool,
    codebook: Optional[str],
    block_size: int,
    skip: Optional[Tensor],
    backend: Optional[str],
) -> None:
    """Second phase of the momentum step: writes codes, scales and the Newton-Schulz input `out`."""
    kernels, options = kernels_for(out.device, backend), _options(beta, nesterov, codebook, block_size)
    kernels.momentum_apply(codes, scales or None, grads, norms, out, **options, skip=skip)


@custom_op("muon8bit::update_params", mutates_args=("params",))
def update_params(
    params: Sequence[Tensor],
    directions: Tensor,
    decay: Tensor,
    scale: Tensor,
    keys: Optional[Sequence[int]],
    firsts: Optional[Sequence[int]],
    pitch: Optional[int],
    skip: Optional[Tensor],
    backend: Optional[str],
) -> None:
    """Writes param <- param * decay - direction * scale."""
    options: dict[str, Any] = {"decay": _number(decay), "scale": _number(scale)}
    kernels_for(directions.device, backend).update_params(
        params, directions, **options, keys=keys, firsts=firsts, pitch=pitch, skip=skip
    )


@custom_op("muon8bit::step_tiny", mutates_args=("codes", "scales", "params"))
def step_tiny(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    norms: Tensor,
    beta: float,
    nesterov: bool,
    codebook: Optional[str],
    block_size: int,
    coefficients: Sequence[float],
    decay: Tensor,
    scale: Tensor,
    keys: Optional[Sequence[int]],
    firsts: Optional[Sequence[int]],
    pitch: Optional[int],
    skip: Optional[Tensor],
    backend: Optional[str],
) -> None:
    """The second phase of matrices with a small side, whole. `coefficients`: a, b, c of every Newton-Schulz step."""
    options = _options(beta, nesterov, codebook, block_size) | {"keys": keys, "firsts": firsts, "pitch": pitch}
    steps = [(a, b, c) for a, b, c in zip(*(coefficients[i::3] for i in range(3)), strict=True)]
    factors: dict[str, Any] = {"decay": _number(decay), "scale": _number(scale)}
    kernels = kernels_for(norms.device, backend)
    kernels.step_tiny(codes, scales or None, grads, params, norms, **options, **factors, steps=steps, skip=skip)


@custom_op("muon8bit::symmetric_product", mutates_args=())
def symmetric_product(
    A: Tensor, B: Tensor, alpha: float, D: Optional[Tensor], beta: float, diagonal: float, backend: Optional[str]
) -> Tensor:
    """alpha * A B^T + beta * D + diagonal * I, symmetric: [batch, n, n]."""
    kernels = kernels_for(A.device, backend)
    return kernels.symmetric_product(A, B, alpha=alpha, D=D, beta=beta, diagonal=diagonal)


@symmetric_product.register_fake
def _(A, B, alpha, D, beta, diagonal, backend):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return A.new_empty(A.shape[0], A.shape[1], A.shape[1])


@custom_op("muon8bit::round_stochastic", mutates_args=())
def round_stochastic(values: Tensor, key: int, first: int, backend: Optional[str]) -> Tensor:
    """fp32 `values` -> bf16 of the same shape, rounded stochastically."""
    return kernels_for(values.device, backend).round_stochastic(values, key=key, first=first)


@round_stochastic.register_fake
def _(values, key, first, backend):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return torch.empty_like(values, dtype=torch.bfloat16)


@momentum_apply.register_fake
@update_params.register_fake
@step_tiny.register_fake
def _(*args):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return None


def _options(beta: float, nesterov: bool, codebook: str | None, block_size: int) -> dict[str, Any]:
    return {"beta": beta, "nesterov": nesterov, "codebook": codebook, "block_size": block_size}


def _number(factor: Tensor) -> float | Tensor:
    return float(factor) if factor.device.type == "cpu" else factor
