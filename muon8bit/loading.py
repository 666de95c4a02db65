"""Checks a state dict whole before anything is assigned, and keeps every dtype."""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from . import adamw
from .config import BUFFER_KEY, DYNAMIC_CODES_KEY, LINEAR_CODES_KEY
from .groups import RUNNING_KEYS, check_options, describe
from .state import Format

_FORMATS = {
    LINEAR_CODES_KEY: "bits=8, codebook='linear'",
    DYNAMIC_CODES_KEY: "bits=8, codebook='dynamic'",
    BUFFER_KEY: "bits=32",
}


def checked_groups(saved: list[dict[str, Any]], current: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The saved groups' hyper-parameters over the running optimizer's parameters and format.

    Raises:
        ValueError: if the groups differ in number, parameters, algorithm or format, or lack a hyper-parameter.
    """
    if len(saved) != len(current):
        raise ValueError(f"the state dict has {len(saved)} parameter groups, the optimizer {len(current)}")
    groups = []
    for i, (old, new) in enumerate(zip(saved, current, strict=True)):
        if len(old["params"]) != len(new["params"]):
            raise ValueError(f"group {i}: {len(old['params'])} parameters saved, {len(new['params'])} here")
        names = list(zip(old.get("param_names", ()), new.get("param_names", ()), strict=False))
        differing = [pair for pair in names if pair[0] != pair[1]]
        if differing:
            raise ValueError(
                f"group {i}: the state of {differing[0][0]!r} would go to {differing[0][1]!r}; build the groups in the "
                "order of the saved 'param_names', or rename these in a load_state_dict pre-hook"
            )
        for key in ("algorithm", *RUNNING_KEYS):
            if old.get(key) != new.get(key):
                raise ValueError(
                    f"group {i}: saved with {key}={old.get(key)!r}, the optimizer has {new.get(key)!r}: construct it "
                    f"with {key}={old.get(key)!r}"
                )
        missing = [key for key in new if key not in old and key not in ("param_names", "initial_lr")]
        if missing:
            raise ValueError(f"group {i}: the state dict lacks {', '.join(missing)}")
        group = {k: v for k, v in deepcopy(old).items() if k != "param_names"}
        if "betas" in group:
            group["betas"] = tuple(group["betas"])
        group["params"] = new["params"]
        if "param_names" in new:
            group["param_names"] = new["param_names"]
        check_options(group, f"group {i} of the state dict: ")
        groups.append(group)
    return groups


def checked_state(
    saved: dict[Any, dict[str, Any]], saved_groups: list[dict[str, Any]], current: list[dict[str, Any]]
) -> defaultdict[Tensor, dict[str, Tensor]]:
    """Copies of the saved tensors by parameter, on its device, in their own dtypes.

    Raises:
        ValueError: names the parameter and the key that is missing, foreign, or of another shape or dtype.
    """
    state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)
    known = set()
    for i, (old, new) in enumerate(zip(saved_groups, current, strict=True)):
        for j, (param_id, param) in enumerate(zip(old["params"], new["params"], strict=True)):
            known.add(param_id)
            tensors = saved.get(param_id)
            if not tensors:  # state is made lazily: a parameter that never had a gradient has none
                continue
            layout = _layout(param, new)
            _check_tensors(tensors, layout, describe(new, i, j))
            state[param] = {key: tensors[key].detach().to(device=_device(param, key), copy=True) for key in layout}
    foreign = [key for key in saved if key not in known]
    if foreign:
        raise ValueError(f"the state dict has state for {foreign[0]!r}, which none of its groups lists")
    return state


def _layout(param: Tensor, group: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    if group["algorithm"] == "adamw":
        moments = (tuple(param.shape), torch.float32)
        return {"step": ((), torch.float32), "exp_avg": moments, "exp_avg_sq": moments}
    return Format.of(param.shape, *(group[k] for k in RUNNING_KEYS)).layout(param.shape)


def _device(param: Tensor, key: str) -> torch.device:
    return adamw.step_device(param) if key == "step" else param.device


def _check_tensors(tensors: dict[str, Any], layout: dict[str, tuple[tuple[int, ...], torch.dtype]], name: str) -> None:
    missing = [key for key in layout if key not in tensors]
    foreign = [key for key in tensors if key not in layout]
    if missing or foreign:
        found = next((_FORMATS[key] for key in foreign if key in _FORMATS), None)
        raise ValueError(
            f"state of {name}: missing {missing or 'nothing'}, foreign {foreign or 'nothing'}"
            + (f"; it was saved with {found}: construct the optimizer so" if found else "")
        )
    for key, (shape, dtype) in layout.items():
        value = tensors[key]
        if not isinstance(value, Tensor):
            raise ValueError(f"state of {name}: {key} is a {type(value).__name__}, expected a tensor")
        if tuple(value.shape) != shape or value.dtype != dtype:
            raise ValueError(f"state of {name}: {key} is {value.dtype} {tuple(value.shape)}, expected {dtype} {shape}")
