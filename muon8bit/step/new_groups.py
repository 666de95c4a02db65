"""Completion and checks of a group that is added: its keys, and whether its algorithm can take its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from .._values import is_choice, shown
from ..config import ALGORITHMS, DEFAULT_ADAMW_BETAS, DEFAULT_ADAMW_BITS, DEFAULT_ADAMW_EPS
from . import adamw8bit
from .dense import is_overlapping, why_not_dense, why_not_written
from .options import (
    ADAMW_ONLY_KEYS,
    DTYPES,
    MUON_ONLY_KEYS,
    NO_GROUP_KEYS,
    SCALED_FOR_KEY,
    check_splits,
    describe,
    group_keys,
)


def complete_group(group: dict[str, Any], group_index: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the user's group with its parameters as a list and AdamW's defaults filled in.

    Keys of the other algorithm stand at None, so that generic code finds every key of an optimizer's defaults.

    Args:
        group: the user's.
        group_index: its place.
        arguments: the optimizer's arguments, which wrappers may have put into the group.

    Raises:
        ValueError: for an unknown algorithm, an AdamW group without its own lr, or keys of the other algorithm.
    """
    if "params" not in group:
        raise ValueError(f"parameter group {group_index} has no 'params': give the tensors, or (name, tensor) pairs")
    params = group["params"]
    group = {"algorithm": "muon", **group, "params": [params] if isinstance(params, Tensor) else params}
    if not isinstance(params, set):  # torch's own error says why a set is refused
        group["params"] = list(group["params"])
    where = f"parameter group {group_index}"
    if not is_choice(group["algorithm"], ALGORITHMS):
        raise ValueError(f"{where}: algorithm {shown(group['algorithm'])} is not one of {', '.join(ALGORITHMS)}")
    if isinstance(group.get("split_sizes"), list):
        group["split_sizes"] = tuple(group["split_sizes"])
    known = {"params", *group_keys(group["algorithm"])}
    for key in set(group) - known:
        close = get_close_matches(key, known, n=1, cutoff=0.85)
        if close:
            raise ValueError(f"{where}: unknown key {key!r}, did you mean {close[0]!r}?")
    if group["algorithm"] == "muon":
        other: tuple[str, ...] = ADAMW_ONLY_KEYS
    else:
        other = MUON_ONLY_KEYS
        if is_choice(group.get("adamw_bits"), (8,)) and is_choice(group.get("codebook"), ("linear",)):
            raise ValueError(
                f"{where}: codebook='linear' beside adamw_bits=8 is refused: linear 8 bits store the second moment of "
                "small gradients as 0, by which the step is then divided, and it blows up. AdamW's moments are in the "
                "dynamic maps: leave codebook out, or use adamw_bits=32"
            )
        if "lr" not in group:
            raise ValueError(f"{where}: a group with algorithm='adamw' needs its own 'lr' (Muon's rarely fits it)")
        group.setdefault("betas", DEFAULT_ADAMW_BETAS)
        group.setdefault("eps", DEFAULT_ADAMW_EPS)
        group.setdefault("adamw_bits", DEFAULT_ADAMW_BITS)
    foreign = [key for key in other if group.get(key) is not None] + [key for key in NO_GROUP_KEYS if key in group]
    if foreign:
        hint = ""
        if all(key in arguments and type(group[key]) is type(arguments[key]) for key in foreign):
            hint = (
                ". If it is there by ZeroRedundancyOptimizer, which puts its arguments into every group: give them in "
                "the groups of their algorithm, or use Muon8bit without it, with process_group and shard_state=True"
            )
        raise ValueError(f"{where}: {', '.join(foreign)} has no meaning in a group of {group['algorithm']!r}{hint}")
    return {**group, **dict.fromkeys(MUON_ONLY_KEYS)} if group["algorithm"] == "adamw" else group


def check_scaled_for(scaled_for: Any, group: Mapping[str, Any], where: str) -> None:
    """Check that the rates of a scaled Muon group are for the update that the group's options make.

    Args:
        scaled_for: of `SCALED_FOR_KEY`: the optimizer and the `adjust_lr_fn` that the rates are for; None where the
            group was not scaled.
        group: complete.
        where: begins the error.

    Raises:
        ValueError: the update is another optimizer's, or has another factor of the shape; the key's value is no pair.
    """
    if scaled_for is None or group["algorithm"] != "muon":
        return
    if not isinstance(scaled_for, tuple | list) or len(scaled_for) != 2:
        raise ValueError(
            f"{where}{SCALED_FOR_KEY} is {shown(scaled_for)}; it must be an optimizer and its adjust_lr_fn, as "
            "param_groups writes them: leave it to param_groups(..., scaling=...)"
        )
    optimizer, adjust = scaled_for
    rule = {None: "muon8bit", "element": "adamuon8bit"}.get(group["second_moment"], "normuon8bit")
    if optimizer != rule:
        raise ValueError(
            f"{where}lr and weight_decay are scaled for {optimizer!r}, and the update here is that of {rule!r}: "
            f"build the groups with muon8bit.Scaling(..., optimizer={rule!r})"
        )
    taken = "match_rms_adamw" if group["rescale"] == "rms" else group["adjust_lr_fn"] or "original"
    if rule != "adamuon8bit" and taken != (adjust or "original"):
        raise ValueError(
            f"{where}lr and weight_decay are scaled for adjust_lr_fn={adjust!r}, and the update here has the size of "
            f"{taken!r}: build them by param_groups(..., adjust_lr_fn={taken!r})"
        )


def check_params(group: dict[str, Any], group_index: int) -> None:
    """Check that the group's algorithm can take each of its parameters; the error names it and the way out."""
    if group.get("adamw_bits") == 8:
        adamw8bit.check_available()
    seen = set()
    for index, param in enumerate(group["params"]):
        name = describe(group, group_index, index)
        if param in seen:
            raise ValueError(f"{name} appears twice in its group: list it once")
        seen.add(param)
        check_not_partitioned(param, name)
        if is_lazy(param):
            raise ValueError(f"{name} has no shape yet: call its lazy module once before the optimizer is made")
        if problem := why_not_dense(param):
            raise ValueError(f"{name} is a {problem} tensor: Muon8bit takes dense parameters")
        if problem := why_not_written(param):
            raise ValueError(f"{name} is {problem}: Muon8bit takes parameters with memory of their own")
        if is_overlapping(param):
            raise ValueError(f"{name} is an expanded tensor, whose elements share memory: clone it first")
        if param.dtype not in DTYPES:
            raise ValueError(f"{name} is {param.dtype}: Muon8bit takes float32, bfloat16 and float16 parameters")
        if group["algorithm"] == "muon" and param.ndim < 2:
            raise ValueError(
                f"{name} has {param.ndim} dimension(s): Muon takes weight matrices. Build the groups with "
                "muon8bit.param_groups(model, ...), for LoRA+ with its loraplus_ratio, or put it into a group with "
                "algorithm='adamw' and its own lr. "
                "If it is a weight matrix that a wrapper has flattened (FSDP1, DeepSpeed ZeRO), unwrap it first"
            )
        if group["algorithm"] == "muon" and group["split_sizes"] is not None:
            check_splits(name, param, group)


def check_not_partitioned(param: Tensor, name: str) -> None:
    """Raise NotImplementedError, by name, for the parameters of DeepSpeed ZeRO and FSDP1, which are flattened parts."""
    if hasattr(param, "ds_id") or hasattr(param, "ds_tensor"):
        raise NotImplementedError(
            f"{name} is partitioned by DeepSpeed ZeRO, which flattens the matrices that Muon needs whole. Shard the "
            "model by torch.distributed.fsdp.fully_shard (FSDP2), or use DDP"
        )
    if type(param).__name__ == "FlatParameter" or hasattr(param, "_is_flat_param"):
        raise NotImplementedError(
            f"{name} is flattened by FSDP1: several matrices in one vector. Shard the model by "
            "torch.distributed.fsdp.fully_shard (FSDP2; in Accelerate fsdp_version: 2)"
        )
