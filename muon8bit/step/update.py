"""The equations of one Muon step of a matrix W [rows, cols] with gradient g.

    m  =  beta * m + (1 - beta) * g                     momentum, decoded from 8 bits       (kernels, state.py)
    u  =  beta * m + (1 - beta) * g  if nesterov else m                                     (kernels)
    O  =  NS(u / max(|u|_F, eps))                       on u BEFORE m is encoded again      (orthogonalize/)
    W  =  round((1 - lr * weight_decay) * W  -  lr * ratio(rows, cols) * O)                 (here, kernels)

`ratio` is `lr_ratio`. Sources: torch.optim.Muon for the arguments and their meaning; Jordan 2024 and Moonlight
(arXiv 2502.16982) for the two ratios; arXiv 2509.23106 for encoding after the orthogonalization.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from muon8bit_kernels import Backend, ops
from torch import Tensor

_LEAST_NORM = 2.0**-60  # of a Newton-Schulz input that counts as one: see `frobenius_norm`


def lr_ratio(rows: int, cols: int, adjust_lr_fn: str | None) -> float:
    """Factor of lr by shape.

    None or `"original"`: sqrt(max(1, rows / cols)). `"match_rms_adamw"`: 0.2 sqrt(max(rows, cols)), which gives
    the update the RMS of AdamW's (0.2), so that AdamW's lr and weight decay carry over.
    """
    return 0.2 * sqrt(max(rows, cols)) if adjust_lr_fn == "match_rms_adamw" else sqrt(max(1.0, rows / cols))


def frobenius_norm(sumsq: Tensor, *, eps: float, factor: float) -> Tensor:
    """Return the divisors of Newton-Schulz inputs, fp32, the shape of `sumsq`: factor * max(sqrt(sumsq), eps).

    An eps under 2^-60 counts as that. Elements under 2^-74.5 have squares that are 0 in fp32, so that a matrix of up to
    2^29 of them may have a norm of 2^-60 where `sumsq` is 0; divided by less, Newton-Schulz would blow it up.
    """
    return sumsq.sqrt().clamp(min=max(eps, _LEAST_NORM)).mul(factor)


def factors(*, lr: float | Tensor, weight_decay: float, ratio: float) -> tuple[Tensor, Tensor]:
    """1 - lr * weight_decay and lr * ratio, 0-d: fp64 on the CPU, or fp32 where `lr` is, which is not waited for.

    Args:
        lr: a float, or a 0-d or 1-element tensor on the CPU or the parameters' device.
        weight_decay: per unit of lr.
        ratio: factor of lr by shape, of `lr_ratio`.
    """
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        rate = lr.reshape(()).float()
    else:
        rate = torch.tensor(float(lr), dtype=torch.float64, device="cpu")
    return 1 - rate * weight_decay, rate * ratio


def update_params_(
    params: Sequence[Tensor],
    directions: Tensor,
    decay: Tensor,
    scale: Tensor,
    *,
    keys: Sequence[int] | None = None,
    firsts: Sequence[int] | None = None,
    pitch: int | None = None,
    skip: Tensor | None = None,
    backend: Backend | None = None,
) -> None:
    """W <- decay * W - scale * O, in place, computed in fp32, rounded once. Scale 0 and decay 1 change no bit.

    Args:
        params: stacks [count, rows, cols] of one dtype, fp32, bf16 or fp16, any strides.
        directions: O, [batch, rows, cols], fp32, bf16 or fp16, any strides.
        decay, scale: of `factors`.
        keys: hash keys of stochastic rounding, one a matrix, bf16 only; None rounds to nearest.
        firsts, pitch: where the matrices are parts of larger parameters, the index there of the first element of
            each, and the distance of their rows, both in elements; they choose the random bits.
        skip: None, or 0-d fp32 on the device; where it is not 0, nothing is written.
        backend: None (by device), `"reference"` or `"triton"`.

    Raises:
        ValueError: for keys with parameters that are not bf16.
        RuntimeError: for a backend that cannot run.
    """
    ops.update_params(params, directions, decay, scale, keys, firsts, pitch, skip, backend)
