"""Errors in the arguments of `param_groups`, or in the model, and the way out."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from .._values import FINITE, TINY, is_choice, is_number, is_rate, shown
from ..config import BITS, ROUTERS, SPLIT_HEADS
from .rules import Route


def check_arguments(
    model: Any,
    *,
    lr: Any,
    weight_decay: Any,
    adamw_lr: Any,
    adamw_betas: Any,
    adamw_eps: Any,
    adamw_bits: Any,
    split_heads: Any,
    routers: Any,
) -> None:
    """Check the arguments of `param_groups` that become values of groups.

    Raises:
        TypeError: if `model` is no module.
        ValueError: names the argument, its value, and what it may be.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            "param_groups takes the model, whose modules and names it reads: param_groups(model, lr=...), not a "
            f"{type(model).__name__}"
        )
    betas = adamw_betas
    is_pair = isinstance(betas, tuple | list) and len(betas) == 2 and all(is_number(beta, high=1) for beta in betas)
    rules: tuple[tuple[str, Any, bool, str], ...] = (
        ("lr", lr, is_rate(lr), f">= 0 and {FINITE}"),
        ("weight_decay", weight_decay, is_number(weight_decay), f">= 0 and {FINITE}"),
        ("adamw_lr", adamw_lr, adamw_lr is None or is_rate(adamw_lr), f"None, or >= 0 and {FINITE}"),
        ("adamw_betas", betas, is_pair, "two numbers in [0, 1)"),
        ("adamw_eps", adamw_eps, is_number(adamw_eps) and adamw_eps >= TINY, f"at least {TINY:.4g}"),
        ("adamw_bits", adamw_bits, is_choice(adamw_bits, BITS), f"one of {BITS}"),
        ("split_heads", split_heads, is_choice(split_heads, (None, *SPLIT_HEADS)), f"None or one of {SPLIT_HEADS}"),
        ("routers", routers, is_choice(routers, ROUTERS), f"one of {ROUTERS}"),
    )
    for name, value, is_valid, allowed in rules:
        if not is_valid:
            raise ValueError(f"{name} must be {allowed}, not {shown(value)}")


def check_any_matrix(routes: Sequence[Route]) -> None:
    """Raise ValueError if nothing goes to Muon and nothing could.

    Where only patterns would send something, as in a convolutional network, or an adapter that is no product of
    matrices, it is a warning.
    """
    trainable = [route for route in routes if route.algorithm is not None]
    if any(route.algorithm == "muon" for route in trainable):
        return
    message = _why_no_matrix(routes)
    if not any(route.flatten or route.is_adapter or "pattern" in route.flag for route in trainable):
        raise ValueError(message)
    warnings.warn(message, stacklevel=3)


def _why_no_matrix(routes: Sequence[Route]) -> str:
    """Say why a model has nothing for Muon, and what to do."""
    trainable = [route for route in routes if route.algorithm is not None]
    if not trainable:
        return f"no matrix for Muon: all {len(routes)} parameters are frozen (requires_grad False)"
    largest = max(trainable, key=lambda route: route.num_elements)
    if all(len(route.shape) < 2 for route in trainable) and len(trainable) < len(routes):
        return (
            f"no matrix for Muon: all {len(trainable)} trainable parameters are vectors (largest: {largest.name} "
            f"{largest.shape}), the matrices are frozen: use torch.optim.AdamW, or let matrices train too"
        )
    if all(len(route.shape) < 2 for route in trainable):
        return (
            f"no matrix for Muon: all {len(trainable)} trainable parameters are 1-D (largest: {largest.name} "
            f"{largest.shape}), as where FSDP1 or DeepSpeed flattened them: train with DDP, which "
            "leaves matrices whole"
        )
    reasons = Counter(re.sub(r", shared with .*", "", route.reason) for route in trainable)
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    return (
        f"no matrix for Muon among {len(trainable)} trainable parameters ({counts}): use torch.optim.AdamW, "
        "or send matrices to 'muon' by `patterns`"
    )


def check_ratio(ratio: float | None, routes: Sequence[Route]) -> None:
    """Raise ValueError for a ratio of LoRA+ that is no positive number, or that no parameter would take."""
    if ratio is None:
        return
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < math.inf:
        raise ValueError(f"loraplus_ratio must be None or a finite number > 0, not {ratio!r}")
    if not any(route.is_lora_b and route.algorithm is not None for route in routes):
        raise ValueError(
            f"loraplus_ratio={ratio:g}, but the model has no trainable LoRA factor B (a parameter '*.lora_B.*'): wrap "
            "it with peft.get_peft_model first, or leave loraplus_ratio out"
        )
