"""Checks a state dict whole before anything is assigned, and keeps every dtype."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._text import in_short, is_same
from ._values import is_choice, shown
from .config import (
    ALGORITHMS,
    BUFFER_KEY,
    DYNAMIC_CODES_KEY,
    EXP_AVG_CODES_KEY,
    EXP_AVG_KEY,
    LINEAR_CODES_KEY,
    STATE_KEYS,
    STEP_KEY,
    why_damaged,
)
from .group_division import BY_NAME, check_division
from .step import rounding
from .step.dense import is_fake, why_not_dense
from .step.local_params import home, layout_of, make_state
from .step.options import (
    AS_SAVED,
    OWN_DEFAULTS,
    RATES_KEY,
    RUNNING_KEYS,
    check_foreign,
    check_options,
    describe,
    group_keys,
)

if TYPE_CHECKING:
    from .distributed import ParamSharding, RankGroup
    from .step.offload import StateOffload

_FORMATS = {
    LINEAR_CODES_KEY: "bits=8, codebook='linear'",
    DYNAMIC_CODES_KEY: "bits=8, codebook='dynamic'",
    BUFFER_KEY: "bits=32",
    EXP_AVG_CODES_KEY: "adamw_bits=8",
    EXP_AVG_KEY: "adamw_bits=32",
}


def checked(
    state_dict: Mapping[str, Any], current: list[dict[str, Any]], rank_group: RankGroup | None, offload: StateOffload
) -> tuple[list[dict[str, Any]], defaultdict[Tensor, dict[str, Any]]]:
    """Check a state dict whole, and return what to assign.

    That is the saved hyper-parameters over the running parameters and format, and copies of the state.

    Args:
        state_dict: with `state` and `param_groups`, as `Optimizer.state_dict` gives it.
        current: the running optimizer's groups; not changed.
        rank_group: the ranks with which it shares its matrices; then of each tensor only this rank's part is kept.
        offload: where its state lives.

    Raises:
        ValueError: names the group, parameter or key that is missing, foreign, or of another value, shape or dtype.
    """
    saved, saved_groups = state_dict.get("state"), state_dict.get("param_groups")
    if not isinstance(saved, Mapping) or not isinstance(saved_groups, Sequence):
        raise ValueError("not an optimizer's state dict: it needs a mapping `state` and a list `param_groups`")
    for i, old in enumerate(saved_groups):
        if not isinstance(old, Mapping) or "params" not in old:
            raise ValueError(f"group {i} of the state dict is not a parameter group: it has no 'params'")
        ids = old["params"]
        if not isinstance(ids, Sequence) or not all(isinstance(param_id, int | str) for param_id in ids):
            raise ValueError(f"group {i} of the state dict has 'params' that are no list of indices or names: {ids!r}")
        if "betas" in old and "algorithm" not in old:
            raise ValueError(
                f"group {i} was saved by an AdamW, whose run Muon8bit does not continue: start fresh, or "
                "take AdamW's exp_avg as the first momentum, by muon8bit.convert_state_dict(..., source='adamw', "
                "like=optimizer) or the command `muon8bit convert --from adamw`"
            )
        if "algorithm" not in old:
            raise ValueError(
                f"group {i} was not saved by Muon8bit: convert it first, with muon8bit.convert_state_dict(..., "
                "source='torch', 'jordan' or 'heavy-ball', like=optimizer) or the command `muon8bit convert --from`"
            )
        if not is_choice(old["algorithm"], ALGORITHMS):
            what = shown(old["algorithm"])
            raise ValueError(f"group {i} of the state dict: algorithm {what} is not one of {', '.join(ALGORITHMS)}")
    check_division(saved_groups, current)
    pairs = list(zip(saved_groups, current, strict=True))
    groups = [_group(old, new, f"group {i}") for i, (old, new) in enumerate(pairs)]
    known: set[int | str] = set()
    for param_id in (param_id for old in saved_groups for param_id in old["params"]):
        if param_id in known:
            raise ValueError(f"the state dict lists the parameter {param_id!r} twice: each is in one group, once")
        known.add(param_id)
    foreign = [key for key in saved if key not in known]
    if foreign:
        raise ValueError(f"the state dict has state for {foreign[0]!r}, which none of its groups lists")
    state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
    without: list[str] = []
    for i, (old, new) in enumerate(pairs):
        for j, (param_id, param) in enumerate(zip(old["params"], new["params"], strict=True)):
            name, tensors = describe(new, i, j), saved.get(param_id, {})
            if not isinstance(tensors, Mapping):
                raise ValueError(f"state of {name} is a {type(tensors).__name__}, expected a mapping of tensors")
            if tensors:
                state[param] = _extras(tensors, param, name)
            if not STATE_KEYS.isdisjoint(tensors):
                layout = rank_group.sharding_of(param, new, name) if rank_group else None
                state[param] |= _tensors(tensors, param, new, name, layout, offload)
            else:  # state is made lazily
                without.append(name)
    if 0 < len(without) < len(known):
        first = ", ".join(without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
        warnings.warn(f"no saved state for {first}: right if it never had a gradient; it starts at zero", stacklevel=4)
    return groups, state


def _group(old: Any, new: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the saved group's hyper-parameters with the running group's parameters.

    Names are the saved ones where the running group has none; other keys of either stay.
    """
    if old["algorithm"] != new["algorithm"]:
        raise ValueError(
            f"{where}: saved with algorithm={old['algorithm']!r}, here it is {new['algorithm']!r}: {AS_SAVED}"
        )
    names = old.get("param_names")
    if names is not None and (not isinstance(names, Sequence) or len(names) != len(old["params"])):
        raise ValueError(
            f"{where}: 'param_names' of the state dict must name {len(old['params'])} parameters: {names!r}"
        )
    if names is not None and "param_names" in new:
        for theirs, ours in zip(old["param_names"], new["param_names"], strict=True):
            if not is_same(str(theirs), str(ours)):
                raise ValueError(
                    f"{where}: the state of {theirs} would go to {ours}; build the groups in the order of the saved "
                    f"'param_names', {BY_NAME}, or rename these in a load_state_dict pre-hook"
                )
    old = {key: _plain(value) for key, value in old.items()}
    # Older checkpoints lack these keys, and some formats turn tuples into lists.
    kept = {key: new[key] for key in ("clip_matrix_norm",) if key in new}
    old = {**OWN_DEFAULTS[new["algorithm"]], **kept, **old}
    if new["algorithm"] == "muon":
        old["split_sizes"] = tuple(old["split_sizes"]) if isinstance(old["split_sizes"], list) else old["split_sizes"]
    missing = [key for key in group_keys(new["algorithm"]) if key not in old]
    if missing:
        raise ValueError(f"{where}: the state dict lacks {', '.join(missing)}")
    for key in RUNNING_KEYS:
        if isinstance(old.get(key), Tensor) or old.get(key) != new.get(key):
            by_option = ", as the same `split_heads` of param_groups does" if key == "split_sizes" else ""
            raise ValueError(
                f"{where}: saved with {key}={in_short(old[key])}, the optimizer has {in_short(new[key])}: construct it "
                f"or its group with {key}={in_short(old[key])}{by_option}, or convert the checkpoint, with "
                "muon8bit.convert_state_dict(..., like=optimizer) or the command `muon8bit convert`"
            )
    own = {key: new[key] for key in ("params", "param_names") if key in new}
    group = {**new, **deepcopy({k: v for k, v in old.items() if k != "params"}), **own}
    if RATES_KEY not in old:  # it was the built-in table
        group.pop(RATES_KEY, None)
    rounding.settle(group, saved=old, running=new)
    for check in (check_options, check_foreign):
        check(group, f"{where} of the state dict: ")
    if "betas" in group:
        group["betas"] = tuple(group["betas"])
    return group


def empty(
    groups: list[dict[str, Any]], rank_group: RankGroup | None, offload: StateOffload
) -> dict[Tensor, dict[str, Tensor]]:
    """Return uninitialized state of every parameter, of the shapes, dtypes and placements that loading asks for."""
    state = {}
    for i, group in enumerate(groups):
        for j, param in enumerate(group["params"]):
            where = rank_group.sharding_of(param, group, describe(group, i, j)) if rank_group else None
            state[param] = make_state(torch.empty, param, group, where, offload)
    return state


def _tensors(
    tensors: Any, param: Tensor, group: dict[str, Any], name: str, where: ParamSharding | None, offload: StateOffload
) -> dict[str, Tensor]:
    """Check the state of one parameter, and copy it.

    The copies are of this rank's part, on its device, contiguous, in their dtypes.
    """
    layout = layout_of(param, group)
    missing = [key for key in layout if key not in tensors]
    foreign = [key for key in tensors if key in STATE_KEYS and key not in layout]
    if missing or foreign:
        found = next((_FORMATS[key] for key in foreign if key in _FORMATS), None)
        raise ValueError(
            f"state of {name}: missing {missing or 'nothing'}, foreign {foreign or 'nothing'}"
            + (f"; it was saved with {found}: construct the optimizer so" if found else "")
        )
    copies, num_steps = {}, 0.0
    for key, (shape, dtype) in layout.items():
        value, what = tensors[key], f"state of {name}: {key}"
        if key == STEP_KEY and type(number := _plain(value)) in (int, float):
            number = float(number) if abs(number) < 2**63 else inf
            value = torch.tensor(number, dtype=torch.float32, device="cpu")
        if not isinstance(value, Tensor) or why_not_dense(value):
            raise ValueError(f"{what} is a {type(value).__name__}, expected a dense tensor")
        if tuple(value.shape) != shape or value.dtype != dtype:
            raise ValueError(f"{what} is {value.dtype} {tuple(value.shape)}, expected {dtype} {shape}")
        _check_values(value, key, what, num_steps)
        num_steps = value.item() if key == STEP_KEY else num_steps  # it is the first key
        if where is not None:
            value = where.local_part(value, key, what)
        elif hasattr(value, "full_tensor"):
            raise ValueError(f"{what} is sharded, the parameter is not: load value.full_tensor()")
        copies[key] = value.detach().to(
            device=home(key, param, group, offload), copy=True, memory_format=torch.contiguous_format
        )
    return copies if where is None else where.to_dtensors(copies, {key: shape for key, (shape, _) in layout.items()})


def _check_values(value: Tensor, key: str, what: str, num_steps: float) -> None:
    """Raise ValueError for a tensor without values, or with such as no step leaves.

    Of a whole tensor all ranks look at all of it, so that they agree; of a DTensor at their parts.
    """
    local = value.to_local() if hasattr(value, "to_local") else value
    if is_fake(local):
        raise ValueError(f"{what} is on the device meta, without values: load the checkpoint with its values")
    if problem := why_damaged(key, local, num_steps):
        raise ValueError(f"{what} holds {problem}: the checkpoint is damaged")


def _extras(tensors: Mapping[str, Any], param: Tensor, name: str) -> dict[str, Any]:
    """Copy what wrappers keep beside our state, as Lookahead its slow weights; tensors to the parameter's device."""
    copies = {}
    for key, value in tensors.items():
        if key in STATE_KEYS:
            continue
        if isinstance(value, Tensor) and is_fake(value):
            raise ValueError(
                f"state of {name}: {key} is on the device meta, without values: load the checkpoint itself"
            )
        is_plain = isinstance(value, Tensor) and not hasattr(value, "full_tensor")
        copies[key] = value.detach().to(param.device, copy=True) if is_plain else deepcopy(value)
    return copies


def _plain(value: Any) -> Any:
    """Return numbers and arrays of numpy as Python has them, and anything else as it is."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value.tolist() if type(value).__module__ == "numpy" and hasattr(value, "tolist") else value
