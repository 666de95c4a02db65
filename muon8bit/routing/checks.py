"""What is wrong with the arguments of `param_groups`, or with the model, and the way out."""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase

from .._text_table import template
from ..config import ALGORITHMS, Algorithm
from .rules import Route


def check_patterns(patterns: Sequence[tuple[str, Algorithm]], no_decay: Sequence[str], names: Sequence[str]) -> None:
    """Raise ValueError for an unknown algorithm and for a pattern that matches no name."""
    if isinstance(no_decay, str):
        raise ValueError(f"no_decay must be a list of patterns, not the string {no_decay!r}")
    if not all(isinstance(p, tuple | list) and len(p) == 2 for p in patterns):  # of a string, each is a string
        raise ValueError(f"patterns must be a list of (pattern, 'muon' | 'adamw') pairs, not {patterns!r}")
    for pattern, algorithm in patterns:
        if algorithm not in ALGORITHMS:
            raise ValueError(f"pattern {pattern!r} asks for {algorithm!r}; it must be one of {ALGORITHMS}")
    for pattern in (*(pattern for pattern, _ in patterns), *no_decay):
        if not any(fnmatchcase(name, pattern) for name in names):
            layers = {template(name): name for name in reversed(names)}
            near = difflib.get_close_matches(template(pattern), layers, n=3, cutoff=0.0)
            raise ValueError(
                f"pattern {pattern!r} matches no parameter (fnmatch over the whole name, case-sensitive); "
                f"near names: {', '.join(layers[name] for name in near)}"
            )


def check_any_matrix(routes: Sequence[Route]) -> None:
    """Raise ValueError if nothing goes to Muon and nothing could; warn where only patterns would send something, as
    in a convolutional network, or an adapter that is no product of matrices."""
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
