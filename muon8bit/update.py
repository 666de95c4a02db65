"""The equations of one Muon step of a matrix W [rows, cols] with gradient g.

    m  =  beta * m + (1 - beta) * g                     momentum, decoded from 8 bits       (kernels, state.py)
    u  =  beta * m + (1 - beta) * g  if nesterov else m                                     (kernels)
    O  =  NS(u / max(|u|_F, eps))                       on u BEFORE m is encoded again      (orthogonalize/)
    W  =  round((1 - lr * weight_decay) * W  -  lr * ratio(rows, cols) * O)                 (here, kernels)

`ratio` is `lr_ratio`. Sources: torch.optim.Muon for the arguments and their meaning; Jordan 2024 and Moonlight
(arXiv 2502.16982) for the two ratios; arXiv 2509.23106 for encoding after the orthogonalization.
"""

from __future__ import annotations

from math import sqrt

from muon8bit_kernels import Backend, kernels_for
from torch import Tensor


def lr_ratio(rows: int, cols: int, adjust_lr_fn: str | None) -> float:
    """Factor of lr by shape.

    None or `"original"`: sqrt(max(1, rows / cols)). `"match_rms_adamw"`: 0.2 sqrt(max(rows, cols)), which gives
    the update the RMS of AdamW's (0.2), so that AdamW's lr and weight decay carry over.
    """
    return 0.2 * sqrt(max(rows, cols)) if adjust_lr_fn == "match_rms_adamw" else sqrt(max(1.0, rows / cols))


def frobenius_norm(sumsq: Tensor, *, eps: float, factor: float) -> Tensor:
    """The divisor of the Newton-Schulz input, 0-d fp32: factor * max(sqrt(sumsq), eps)."""
    return sumsq.sqrt().clamp(min=eps).mul(factor)


def update_param_(
    param: Tensor,
    direction: Tensor,
    *,
    lr: float | Tensor,
    weight_decay: float,
    ratio: float,
    backend: Backend | None = None,
    key: int | None = None,
    first: int = 0,
    pitch: int | None = None,
) -> None:
    """W <- (1 - lr * weight_decay) W - lr * ratio * O, in place, computed in fp32, rounded once. lr 0 changes no bit.

    Args:
        param: [rows, cols], fp32, bf16 or fp16, any strides.
        direction: O, [rows, cols], fp32, bf16 or fp16, any strides.
        lr: a float, or a 0-d or 1-element tensor on the CPU or the parameter's device, where it is not waited for.
        weight_decay: per unit of lr.
        ratio: factor of lr by shape, of `lr_ratio`.
        backend: None (by device), `"reference"` or `"triton"`.
        key: hash key of stochastic rounding, bf16 only; None rounds to nearest.
        first, pitch: where `param` is a part of a larger parameter, the index of its first element there, and the
            distance of its rows, both in elements; they choose the random bits. None: `cols`.

    Raises:
        ValueError: for a key with a parameter that is not bf16.
        RuntimeError: for a backend that cannot run.
    """
    if isinstance(lr, Tensor):
        lr = float(lr) if lr.device.type == "cpu" else lr.reshape(()).float()
    kernels_for(param.device, backend).update_param(
        param, direction, decay=1 - lr * weight_decay, scale=lr * ratio, key=key, first=first, pitch=pitch
    )
