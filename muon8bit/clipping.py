"""Clipping matrix by matrix: no gradient enters a momentum with a larger Frobenius norm than the group allows.

The update's direction hardly depends on the size of one gradient, but the momentum remembers a spike for dozens of
steps. A norm for each matrix needs no other gradient, so it works where gradients are released one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .groups import describe
from .stacks import cut


def clip_matrices_(groups: Sequence[dict[str, Any]], workspace_bytes: int) -> None:
    """Scale gradients in place, as torch's `clip_grad_norm_` does: g <- min(1, clip_matrix_norm / |g|_F) * g.

    Of each matrix that is orthogonalized by itself, so of every expert of a stack and every piece of `split_sizes`. A
    gradient whose norm is not finite in fp32 stays as it is, to be found by the step. Does not wait for the device.

    Args:
        groups: parameter groups; those without `clip_matrix_norm` are left alone.
        workspace_bytes: to be allocated at once for copies in fp32, as long as one matrix needs no more.

    Raises:
        NotImplementedError: names a sharded parameter.
    """
    for group_index, group in enumerate(groups):
        max_norm = group.get("clip_matrix_norm")
        if max_norm is None:
            continue
        for index, param in enumerate(group["params"]):
            if hasattr(param, "device_mesh"):
                raise NotImplementedError(
                    f"{describe(group, group_index, index)} is sharded, and clip_matrix_norm needs the norms of whole "
                    "matrices: clip by torch.nn.utils.clip_grad_norm_ instead"
                )
            if param.grad is not None and not param.grad.is_sparse:
                for matrices in _matrices(param.grad, group, workspace_bytes):
                    _clip_(matrices, max_norm)


def _matrices(grad: Tensor, group: dict[str, Any], workspace_bytes: int) -> Iterator[Tensor]:
    """Views [count, rows, ...] of the matrices that are orthogonalized by themselves, a part at a time."""
    for stack in cut(grad, group):
        pieces: Sequence[Tensor] = [stack]
        if group["split_sizes"] is not None and group["split_dim"] == -1:
            pieces = stack.split(group["split_sizes"], -1)
        for piece in pieces:
            if piece.numel():
                # 16: what CPUs copy to multiply bf16 by fp32, twice
                yield from piece.split(max(1, workspace_bytes // (16 * piece[0].numel())))


def _clip_(matrices: Tensor, max_norm: float) -> None:
    norms = torch.linalg.vector_norm(matrices, dim=tuple(range(1, matrices.ndim)), keepdim=True, dtype=torch.float32)
    factors = torch.where(norms.isfinite(), (max_norm / norms).clamp(max=1), 1)
    matrices.mul_(factors)
