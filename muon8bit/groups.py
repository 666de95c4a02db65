"""Parameter groups: what a group must say, and whether Muon can take its parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .config import (
    ADJUST_LR,
    ALGORITHMS,
    BITS,
    BLOCK_SIZES,
    CODEBOOKS,
    DEFAULT_ADAMW_BETAS,
    DEFAULT_ADAMW_EPS,
)
from .orthogonalize import resolve

# How the running optimizer stores and computes: from the constructor, never from a checkpoint.
RUNNING_KEYS = ("bits", "codebook", "block_size")
MUON_ONLY_KEYS = ("momentum", "nesterov", "ns_coefficients", "ns_steps", "adjust_lr_fn", *RUNNING_KEYS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def describe(group: dict[str, Any], group_index: int, index: int) -> str:
    """How errors name a parameter: by its name, else by group, index and shape."""
    if "param_names" in group:
        return repr(group["param_names"][index])
    return f"parameter {index} of group {group_index}, shape {tuple(group['params'][index].shape)}"


def complete_group(group: dict[str, Any], group_index: int) -> dict[str, Any]:
    """A copy of the user's group with its parameters as a list and AdamW's defaults filled in.

    Raises:
        ValueError: for an unknown algorithm, an AdamW group without its own lr, or keys of the other algorithm.
    """
    params = group["params"]
    group = {"algorithm": "muon", **group, "params": [params] if isinstance(params, Tensor) else params}
    if not isinstance(params, set):  # torch's own error says why a set is refused
        group["params"] = list(group["params"])
    where = f"parameter group {group_index}"
    if group["algorithm"] not in ALGORITHMS:
        raise ValueError(f"{where}: algorithm {group['algorithm']!r} is not one of {', '.join(ALGORITHMS)}")
    if group["algorithm"] == "muon":
        foreign = [key for key in ("betas",) if key in group]
    else:
        foreign = [key for key in MUON_ONLY_KEYS if key in group]
        if "lr" not in group:
            raise ValueError(f"{where}: a group with algorithm='adamw' needs its own 'lr' (Muon's rarely fits it)")
        group.setdefault("betas", DEFAULT_ADAMW_BETAS)
        group.setdefault("eps", DEFAULT_ADAMW_EPS)
    if foreign:
        raise ValueError(f"{where}: {', '.join(foreign)} has no meaning for algorithm={group['algorithm']!r}")
    return group


def _require(condition: bool, where: str, key: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{where}{key} must be {allowed}, not {value!r}")


def check_options(options: dict[str, Any], where: str = "") -> None:
    """Check every hyper-parameter in a group or in the defaults; errors name the key and what it may be."""
    o = options
    if isinstance(o["lr"], Tensor) and o["lr"].numel() != 1:
        raise ValueError(f"{where}lr as a tensor must have 1 element, not shape {tuple(o['lr'].shape)}")
    _require(bool(o["lr"] >= 0), where, "lr", o["lr"], ">= 0")
    _require(o["weight_decay"] >= 0, where, "weight_decay", o["weight_decay"], ">= 0")
    _require(o["eps"] > 0, where, "eps", o["eps"], "> 0")
    if "betas" in o:
        valid = len(o["betas"]) == 2 and all(0 <= b < 1 for b in o["betas"])
        _require(valid, where, "betas", o["betas"], "two numbers in [0, 1)")
    if "momentum" in o:
        _require(0 <= o["momentum"] < 1, where, "momentum", o["momentum"], "in [0, 1)")
        _require(
            o["adjust_lr_fn"] in (None, *ADJUST_LR),
            where,
            "adjust_lr_fn",
            o["adjust_lr_fn"],
            f"None or one of {ADJUST_LR}",
        )
        _require(o["bits"] in BITS, where, "bits", o["bits"], f"one of {BITS}")
        _require(o["codebook"] in CODEBOOKS, where, "codebook", o["codebook"], f"one of {CODEBOOKS}")
        _require(
            o["block_size"] in BLOCK_SIZES,
            where,
            "block_size",
            o["block_size"],
            f"one of {BLOCK_SIZES} elements",
        )
        resolve(o["ns_coefficients"], o["ns_steps"])


def check_params(group: dict[str, Any], group_index: int) -> None:
    """Check that the group's algorithm can take each of its parameters; the error names it and the way out."""
    for index, param in enumerate(group["params"]):
        name = describe(group, group_index, index)
        if hasattr(param, "placements"):
            raise NotImplementedError(f"{name} is a DTensor: sharded parameters are not supported yet; use DDP")
        if param.dtype not in DTYPES:
            raise ValueError(f"{name} is {param.dtype}: Muon8bit takes float32, bfloat16 and float16 parameters")
        if group["algorithm"] == "muon" and param.ndim != 2:
            raise ValueError(
                f"{name} has {param.ndim} dimension(s): Muon takes 2-D weight matrices. Build the groups with "
                "muon8bit.param_groups(model, ...), or put it into a group with algorithm='adamw' and its own lr. "
                "If it is a weight matrix that a wrapper has flattened (FSDP1, DeepSpeed ZeRO), unwrap it first"
            )
