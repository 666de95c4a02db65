"""Factors of the gradients: clipping matrix by matrix, the scale of a GradScaler, the sign of `maximize`.

No gradient enters a momentum with a larger Frobenius norm than the group allows. The update's direction hardly depends
on the size of one gradient, but the momentum remembers a spike for dozens of steps. A norm for each matrix needs no
other gradient, so it works where gradients are released one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from .group_options import MuonOptions
from .matrix_batches import ParamMatrices
from .options import describe


@dataclass(frozen=True)
class Clip:
    """A gradient that is to be clipped in place, as torch's `clip_grad_norm_` does, once a step may write.

    Attributes:
        grad: the gradient of `ParamMatrices`.
        factor: the factor of these `ParamMatrices`.
        by: the numbers that the matrices are multiplied by, fp32 [count, 1, 1] or [count, 1, cols].
        rest: the factor that is left when the gradient has been clipped.
        num_together: the number of matrices that are copied to fp32 at once.
    """

    grad: Tensor
    factor: Tensor
    by: Tensor
    rest: Tensor
    num_together: int

    def apply_(self) -> None:
        """Clip the gradient, without waiting for the device."""
        by = self.by if self.grad.ndim == 3 else self.by.view(-1, *[1] * (self.grad.ndim - 1))
        for part, by_part in zip(self.grad.split(self.num_together), by.split(self.num_together), strict=True):
            part.mul_(by_part)
        self.factor.copy_(self.rest)


def check_not_sharded(group: dict[str, Any], group_index: int) -> None:
    """Raise NotImplementedError, by name, for a sharded parameter in a group with `clip_matrix_norm`."""
    for index, param in enumerate(group["params"]):
        if group.get("clip_matrix_norm") is not None and hasattr(param, "device_mesh"):
            raise NotImplementedError(
                f"{describe(group, group_index, index)} is sharded, and clip_matrix_norm needs the norms of whole "
                "matrices: clip by torch.nn.utils.clip_grad_norm_ instead"
            )


def with_factor(matrices: ParamMatrices, options: MuonOptions) -> tuple[ParamMatrices, Clip | None]:
    """Return the matrices with the factor of their gradient: -1 for `maximize` / scale * min(1, limit / norm).

    The limit holds for each matrix that is orthogonalized by itself, so for every expert of a tensor of experts and
    every piece of `split_sizes`. A gradient whose norm is not finite in fp32 stays as it is, to be found by the step.
    Nothing is changed, and the device is not waited for.

    Args:
        matrices: the matrices of one parameter.
        options: has `grad_scale` on the gradient's device.
    """
    scale, limit = options.grad_scale, options.clip_matrix_norm
    if scale is None and limit is None and not options.maximize:
        return matrices, None
    sign = -1.0 if options.maximize else 1.0
    rest = torch.full((matrices.num_matrices, 1, 1), sign, dtype=torch.float32, device=matrices.grad.device)
    if scale is not None:
        rest = rest / scale
    if limit is None:
        return matrices._replace(factor=rest), None
    # 16 bytes: what CPUs copy to multiply bf16 by fp32, twice; in an eighth of the workspace, beside a result.
    num_together = max(1, options.workspace_bytes // 8 // (16 * max(1, prod(matrices.grad.shape[1:]))))
    pieces = _pieces(matrices.grad, options)
    limits = [_limited(piece, limit, scale, num_together) for piece in pieces]
    by = limits[0]
    if len(pieces) > 1:
        by = torch.cat([of.expand(-1, -1, piece.shape[2]) for of, piece in zip(limits, pieces, strict=True)], 2)
    factor = rest * by
    return matrices._replace(factor=factor), Clip(matrices.grad, factor, by, rest, num_together)


def _pieces(grad: Tensor, options: MuonOptions) -> Sequence[Tensor]:
    """Return a view [count, rows, ...] of each piece that is orthogonalized by itself, in the order of columns."""
    return [grad] if options.column_splits is None else grad.split(options.column_splits, -1)


def _limited(grads: Tensor, limit: float, scale: Tensor | None, num_together: int) -> Tensor:
    """Return min(1, limit / norm), fp32 [count, 1, 1]."""
    parts = grads.split(num_together)
    norms = torch.cat([torch.linalg.vector_norm(part.flatten(1), dim=1, dtype=torch.float32) for part in parts])
    norms = norms.view(-1, 1, 1)
    norms = norms if scale is None else norms / scale
    return torch.where(norms.isfinite(), (limit / norms).clamp(max=1), 1)
