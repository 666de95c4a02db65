"""One step of 8-bit Muon for one matrix, in plain torch: read this first.

    m   =  decode(codes, scales)                            blocks of a row share a scale
    m   =  momentum * m + (1 - momentum) * g
    u   =  momentum * m + (1 - momentum) * g  if nesterov else m
    O   =  orthogonalize(u / max(|u|_F, eps))               of the exact u, before m is encoded; AdaMuon: of sign(u)
    v   =  beta2 * v + (1 - beta2) * mean(O^2)              NorMuon: over a row or column; AdaMuon: each element's O^2
    O   =  O / (sqrt(v) + eps)                              scaled to the norm that O had, or to 0.2 sqrt(rows cols)
    W   =  (1 - lr * weight_decay) * W - lr * ratio * O
    codes, scales  =  encode(m)

The optimizer does not call this module. Its tests hold every backend to it: codes and scales bit for bit, parameters to
a stated bound. Left out are batches, splits, the Gram form of Newton-Schulz, stochastic rounding and several ranks.

Sources: torch.optim.Muon for the arguments; K. Jordan 2024 for Newton-Schulz; Moonlight (arXiv 2502.16982) for
`match_rms_adamw`; Dettmers et al. (arXiv 2110.02861) for the dynamic codebook; 2510.05491 NorMuon; 2507.11005 AdaMuon.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from muon8bit_kernels.codebooks import CODE_DTYPES, Codebook, dynamic_map, dynamic_midpoints, zero_code
from torch import Tensor
from torch.linalg import vector_norm

Coefficients = Sequence[tuple[float, float, float]]
JORDAN = ((3.4445, -4.7750, 2.0315),) * 5


def zero_state(param: Tensor, *, codebook: Codebook = "linear", block_size: int = 2048) -> tuple[Tensor, Tensor]:
    """Return codes [rows, cols] and scales [rows, blocks] of a momentum of zeros for `param`.

    `codebook` and `block_size` are as in `muon_step`, here and below.
    """
    rows, cols = param.shape
    codes = torch.full((rows, cols), zero_code(codebook), dtype=CODE_DTYPES[codebook], device=param.device)
    return codes, torch.zeros(rows, -(-cols // block_size), device=param.device, dtype=torch.float32)


def decode(codes: Tensor, scales: Tensor, *, codebook: Codebook = "linear", block_size: int = 2048) -> Tensor:
    """Return the fp32 momentum of codes [rows, cols] and scales [rows, blocks] of a codebook and block_size."""
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


def orthogonalize(u: Tensor, coefficients: Coefficients = JORDAN, *, eps: float = 1e-7) -> Tensor:
    """Return the Newton-Schulz iteration's result for u [rows, cols]: near the nearest semi-orthogonal matrix.

    `coefficients` has a triple for each step. `eps` bounds the norm that u is divided by.
    """
    is_tall = u.shape[0] > u.shape[1]
    X: Tensor = u.mT if is_tall else u
    X = X / vector_norm(X).clamp(min=eps)
    for a, b, c in coefficients:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if is_tall else X


def normalize(
    update: Tensor, v: Tensor, beta2: float, second_moment_eps: float, second_moment_eps_form: str, rescale: str | None
) -> tuple[Tensor, Tensor]:
    """Return an update [rows, cols] divided by the root of its second moment, and that moment v after the step.

    fp32 v begins as zeros: [rows, 1] for `second_moment="row"`, and for "shape" if rows >= cols, else [1, cols]; for
    "element" [rows, cols]. beta2, second_moment_eps, second_moment_eps_form and rescale are keys of a group.
    """
    v = beta2 * v + (1 - beta2) * update.square().sum_to_size(v.shape) * (v.numel() / update.numel())
    root = v.sqrt() + second_moment_eps if second_moment_eps_form == "add" else v.clamp(min=second_moment_eps).sqrt()
    out = update / root.clamp(min=1e-30)  # where it was always 0 it stays 0
    norms = {None: vector_norm(out), "keep": vector_norm(update), "rms": 0.2 * sqrt(update.numel())}
    return out * (norms[rescale] / vector_norm(out).clamp(min=1e-30)), v


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
    ns_coefficients: Coefficients = JORDAN,
    eps: float = 1e-7,
    adjust_lr_fn: str | None = None,
    codebook: Codebook = "linear",
    block_size: int = 2048,
    v: Tensor | None = None,
    beta2: float = 0.95,
    second_moment_eps: float = 1e-8,
    second_moment_eps_form: str = "add",
    rescale: str | None = None,
    sign_momentum: bool = False,
) -> tuple[Tensor, ...]:
    """Take one step of one matrix.

    Args:
        param, grad: W and g, [rows, cols], fp32, bf16 or fp16.
        codes, scales: of the momentum, as `zero_state` or the last step returned them.
        v: the second moment, see `normalize`; None: the update is taken as it is.
        lr, weight_decay, momentum, nesterov, ns_coefficients, eps, adjust_lr_fn, codebook, block_size: as in
            `Muon8bit`; `ns_coefficients` as one triple a step.
        beta2, second_moment_eps, second_moment_eps_form, rescale, sign_momentum: as there.

    Returns:
        W, codes, scales and, if there is one, v after the step, new tensors of the same dtypes.
    """
    rows, cols = param.shape
    g = (1 - momentum) * grad.float()
    m = momentum * decode(codes, scales, codebook=codebook, block_size=block_size) + g
    u = momentum * m + g if nesterov else m
    update = orthogonalize(u.sign() if sign_momentum else u, ns_coefficients, eps=eps)
    if v is not None:
        update, v = normalize(update, v, beta2, second_moment_eps, second_moment_eps_form, rescale)
    ratios = {"match_rms_adamw": 0.2 * sqrt(max(rows, cols)), "spectral": sqrt(rows / cols)}
    ratio = 1 if rescale == "rms" else ratios.get(adjust_lr_fn or "", sqrt(max(1, rows / cols)))
    new = (1 - lr * weight_decay) * param.float() - lr * ratio * update
    moment = () if v is None else (v,)
    return new.to(param.dtype), *encode(m, codebook=codebook, block_size=block_size), *moment
