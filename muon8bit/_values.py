"""Checks of what was given for an option, whatever it is: numbers, choices, rates; and its text in errors."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from math import inf
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .step.dense import is_fake, is_faking, why_not_dense

# Of fp32, in which steps compute: the smallest normal number, and the largest.
TINY, HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
# How errors call the numbers that `is_number` takes.
FINITE = "finite in float32"
_MAX_SHOWN = 100  # letters
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)


def is_number(value: Any, high: float = HUGE) -> bool:
    """Return whether it is a number that torch takes, numpy's too (no bool, no fraction), with 0 <= value < high."""
    is_taken = isinstance(value, int | float) or (isinstance(value, Real) and type(value).__module__ == "numpy")
    if isinstance(value, bool) or not is_taken or (isinstance(value, Integral) and int(value) >= 2**63):
        return False
    return bool(0 <= value < high)


def is_limit(value: Any) -> bool:
    """Return whether it is None or a number > 0 of any size."""
    return value is None or (is_number(value, high=inf) and value > 0)


def is_choice(value: Any, allowed: Sequence[Any]) -> bool:
    """Return whether it is one of these values, of the same type: True is no 1."""
    return any(type(value) is type(choice) and value == choice for choice in allowed)


def is_rate(lr: Any) -> bool:
    """Return whether it is a learning rate: a number, or a dense 1-element float tensor.

    One elsewhere than on the host is not waited for.
    """
    if not isinstance(lr, Tensor):
        return is_number(lr)
    if why_not_dense(lr) or lr.numel() != 1 or not lr.is_floating_point():
        return False
    return lr.device.type != "cpu" or is_fake(lr) or is_faking() or 0 <= lr.item() < HUGE


def shown(value: Any) -> str:
    """Return what errors show of a value: its repr, cut, or its type where it has none; for an odd number a hint."""
    text = reprlib.repr(value)
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        return f"{text}, a string: give the number (YAML takes 1e-3 for a string, 1.0e-3 for a number)"
    if isinstance(value, Integral) and abs(int(value)) >= 2**63:
        return f"{text}, an integer beyond 64 bits: give a float"
    return f"{text[:_MAX_SHOWN]}..." if len(text) > _MAX_SHOWN else text


def check_is_params(params: Any) -> None:
    """Check that an optimizer was given parameters, not the model or a dict of them; iterates over nothing.

    Raises:
        TypeError: says what to give instead.
    """
    if isinstance(params, torch.nn.Module):
        raise TypeError(
            "Muon8bit takes parameters, not a model: Muon8bit(muon8bit.param_groups(model, lr=...)) takes those"
        )
    if isinstance(params, Mapping):
        raise TypeError(
            f"Muon8bit takes (name, tensor) pairs or groups, not a {type(params).__name__}: give a group in a list, "
            "and model.named_parameters() in place of a dict of parameters"
        )


def check_named(group: Mapping[str, Any], index: int, groups: Sequence[Mapping[str, Any]]) -> None:
    """Check that a group gives names to all parameters or to none, as the groups before it do.

    Args:
        group: with its parameters in a list, as tensors or (name, tensor) pairs.
        index: its place behind `groups`.
        groups: of the optimizer.

    Raises:
        ValueError: names the group and the way out.
    """
    params, where = group["params"], f"parameter group {index}"
    num_named = sum(isinstance(param, tuple) for param in params)
    if 0 < num_named < len(params):
        raise ValueError(
            f"{where}: {num_named} of its {len(params)} params are (name, tensor) pairs: give pairs for all, as "
            "model.named_parameters() does, or for none"
        )
    has_names = num_named > 0 or "param_names" in group
    if groups and has_names != ("param_names" in groups[0]):
        with_or_without, way_out = ("with", "tensors") if has_names else ("without", "(name, tensor) pairs")
        raise ValueError(
            f"{where} is {with_or_without} names, unlike the groups before it: give {way_out} as its params"
        )
