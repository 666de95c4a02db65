"""One step of 8-bit Muon for one matrix, in plain torch: read this first.

    m   =  decode(codes, scales)                            blocks of a row share a scale
    m   =  momentum * m + (1 - momentum) * g
    u   =  momentum * m + (1 - momentum) * g  if nesterov else m
    O   =  orthogonalize(u / max(|u|_F, eps))               of the exact u, before m is encoded again
    W   =  (1 - lr * weight_decay) * W - lr * ratio * O
    codes, scales  =  encode(m)

The optimizer does not call this module. Its tests hold every backend to it: codes and scales bit for bit, parameters to
a stated bound. Left out are batches, splits, the Gram form of Newton-Schulz, stochastic rounding and several ranks.

Sources: torch.optim.Muon for the arguments; K. Jordan 2024 for Newton-Schulz; Moonlight (arXiv 2502.16982) for
`match_rms_adamw`; Dettmers et al. (arXiv 2110.02861) for the dynamic codebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from muon8bit_kernels.codebooks import CODE_DTYPES, Codebook, dynamic_map, dynamic_midpoints, zero_code
from torch import Tensor

JORDAN = ((3.4445, -4.7750, 2.0315),) * 5


def zero_state(param: Tensor, *, codebook: Codebook = "linear", block_size: int = 2048) -> tuple[Tensor, Tensor]:
    """Return codes [rows, cols] and scales [rows, blocks] of a momentum of zeros for `param`.

    `codebook` and `block_size` are as in `muon_step`, here and below.
    """
    rows, cols = param.shape
    codes = torch.full((rows, cols), zero_code(codebook), dtype=CODE_DTYPES[codebook], device=param.device)
    return codes, torch.zeros(rows, -(-cols // block_size), device=param.device, dtype=torch.float32)


def decode(codes: Tensor, scales: Tensor, *, codebook: Codebook = "linear", block_size: int = 2048) -> Tensor:
    """Return the momentum, fp32 [rows, cols], of codes [rows, cols] and fp32 scales [rows, blocks].

    `codebook` and `block_size` are those with which it was encoded.
    """
    scale = scales.repeat_interleave(block_size, 1)[:, : codes.shape[1]]
    if codebook == "linear":
        return codes.float() * scale / 127
    return dynamic_map(codes.device)[codes.long()] * scale


def encode(m: Tensor, *, codebook: Codebook = "linear", block_size: int = 2048) -> tuple[Tensor, Tensor]:
    """Return codes [rows, cols], int8 (linear) or uint8 (dynamic), and fp32 scales [rows, blocks] of fp32 m.

    A scale is the largest magnitude in `block_size` columns of a row, a code the nearest value of the `codebook`.
    """
    blocks = torch.nn.functional.pad(m, (0, -m.shape[1] % block_size)).unflatten(1, (-1, block_size))
    scales = blocks.abs().amax(2)
    scales[scales < torch.finfo(torch.float32).tiny] = 0  # a block without a normal number is stored as zeros
    ratio = blocks / scales.where(scales > 0, torch.inf).unsqueeze(2)
    midpoints = dynamic_midpoints(m.device)[:-1]  # between neighbours of the map: the nearest one is taken
    codes = (ratio * 127).round() if codebook == "linear" else torch.bucketize(ratio, midpoints)
    return codes.flatten(1)[:, : m.shape[1]].to(CODE_DTYPES[codebook]), scales


def orthogonalize(
    u: Tensor, coefficients: Sequence[tuple[float, float, float]] = JORDAN, *, eps: float = 1e-7
) -> Tensor:
    """Return the Newton-Schulz iteration's result for u [rows, cols]: near the nearest semi-orthogonal matrix.

    `coefficients` has a triple for each step. `eps` bounds the norm that u is divided by.
    """
    is_tall = u.shape[0] > u.shape[1]
    X: Tensor = u.mT if is_tall else u
    X = X / torch.linalg.vector_norm(X).clamp(min=eps)
    for a, b, c in coefficients:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if is_tall else X


@torch.no_grad()
def muon_step(
    param: Tensor,
    grad: Tensor,
    codes: Tensor,
    scales: Tensor,
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_coefficients: Sequence[tuple[float, float, float]] = JORDAN,
    eps: float = 1e-7,
    adjust_lr_fn: str | None = None,
    codebook: Codebook = "linear",
    block_size: int = 2048,
) -> tuple[Tensor, Tensor, Tensor]:
    """Take one step of one matrix.

    Args:
        param: W, [rows, cols], fp32, bf16 or fp16.
        grad: g, its shape.
        codes, scales: of the momentum, as `zero_state` or the last step returned them.
        lr, weight_decay, momentum, nesterov, ns_coefficients, eps, adjust_lr_fn, codebook, block_size: as in
            `Muon8bit`; `ns_coefficients` as one triple a step.

    Returns:
        W, codes and scales after the step, new tensors of the same dtypes.
    """
    rows, cols = param.shape
    g = (1 - momentum) * grad.float()
    m = momentum * decode(codes, scales, codebook=codebook, block_size=block_size) + g
    u = momentum * m + g if nesterov else m
    direction = orthogonalize(u, ns_coefficients, eps=eps)
    ratio = 0.2 * sqrt(max(rows, cols)) if adjust_lr_fn == "match_rms_adamw" else sqrt(max(1, rows / cols))
    new = (1 - lr * weight_decay) * param.float() - lr * ratio * direction
    return new.to(param.dtype), *encode(m, codebook=codebook, block_size=block_size)
