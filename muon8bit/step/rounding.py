"""Stochastic rounding in the optimizer: where its seed and step live, and which parameter draws which bits.

`rounding_seed` and `rounding_step` are ints in every parameter group, present only where the optimizer rounds
stochastically; the step counts the steps done, skipped ones left out. Together with a parameter's index over all groups
and an element's index in the parameter they are all that the random bits depend on: see `muon8bit_kernels.random_bits`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from muon8bit_kernels import Backend, kernels_for, rounding_key
from torch import Tensor


def initial(param_rounding: str, seed: int) -> dict[str, int]:
    """Return the keys of stochastic rounding for the groups of a new optimizer; none where it rounds to nearest."""
    return {"rounding_seed": seed, "rounding_step": 0} if param_rounding == "stochastic" else {}


def key_of(param: Tensor, name: str, param_index: int, group: Mapping[str, Any]) -> int | None:
    """Return the hash key of a parameter at this step, an int32.

    It is None where the parameter is rounded to nearest, as float32 is.

    Args:
        param: the parameter.
        name: the parameter's name in errors.
        param_index: its place over all groups.
        group: its group.

    Raises:
        ValueError: for a float16 parameter where the group asks for stochastic rounding.
    """
    if "rounding_seed" not in group:
        return None
    if param.dtype == torch.float16:
        raise ValueError(
            f"{name} is float16: param_rounding='stochastic' is for bfloat16 parameters (float32 ones are not "
            "affected). Convert it to bfloat16, or use param_rounding='nearest'"
        )
    if param.dtype != torch.bfloat16:
        return None
    return rounding_key(group["rounding_seed"], group["rounding_step"], param_index)


def round_stochastic(values: Tensor, old: Tensor, key: int, first: int, backend: Backend | None) -> Tensor:
    """Round contiguous fp32 `values` to bf16 stochastically, which takes 3 bytes an element.

    Args:
        values: the numbers to round.
        old: bf16 in their shape, kept where it is equal: a step with lr 0 loses the sign of a zero, but no bit may
            change.
        key: from `key_of`.
        first: the index of the first value in the whole parameter.
        backend: the kernels.
    """
    new = kernels_for(values.device, backend).round_stochastic(values, key=key, first=first)
    return torch.where(new == old, old, new, out=new)


def round_stochastic_together(
    values: Tensor,
    old: Tensor,
    sizes: Sequence[int],
    keys: Sequence[int],
    firsts: Sequence[int],
    backend: Backend | None,
) -> Tensor:
    """Round as `round_stochastic` rounds each of several tensors, which lie behind each other in flat `values`.

    Args:
        values: fp32 of all of them.
        old: bf16 of all of them.
        sizes, keys, firsts: one for each.
        backend: the kernels.
    """
    kernels, of_each = kernels_for(values.device, backend), zip(values.split(list(sizes)), keys, firsts, strict=True)
    new = torch.cat([kernels.round_stochastic(part, key=key, first=first) for part, key, first in of_each])
    return torch.where(new == old, old, new, out=new)


def advance(groups: Iterable[dict[str, Any]], by: int = 1) -> None:
    """Count a step that was done; with -1 take back one that was not."""
    for group in groups:
        if "rounding_step" in group:
            group["rounding_step"] += by


def settle(group: dict[str, Any], *, saved: Mapping[str, Any], running: Mapping[str, Any]) -> None:
    """Make a loaded group round as the running optimizer does.

    Where that rounds stochastically, seed and step come from the checkpoint if it has them, else the running seed
    starts at step 0. Where it rounds to nearest, the group has neither.
    """
    if "rounding_seed" in running:
        group["rounding_step"] = saved.get("rounding_step", 0)
    else:
        group.pop("rounding_seed", None)
        group.pop("rounding_step", None)
