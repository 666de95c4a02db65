"""Writes groups of entries as state dicts: momenta in the asked format, everything checked where it is read."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import (
    BUFFER_KEY,
    DEFAULT_ADAMW_EPS,
    DEFAULT_BLOCK_SIZE,
    DEFAULT_EPS,
    DEFAULT_NS_STEPS,
    DYNAMIC_CODES_KEY,
    LINEAR_CODES_KEY,
    SECOND_KEYS,
    why_damaged,
)
from ..orthogonalize import resolve_coefficients
from ..orthogonalize.coefficients import JORDAN
from ..step.momentum import Momentum, MomentumFormat
from ..step.options import (
    FORMAT_KEYS,
    IMPLEMENTATION_DEFAULTS,
    MUON_ONLY_KEYS,
    OWN_DEFAULTS,
    RUNNING_KEYS,
    check_options,
)
from .adamw import first_momentum
from .entries import Change, Entry, Group, dense, is_finite
from .moments import checked_moments, moments
from .second_moments import second_moment

Keep = Callable[[Tensor], Any]

_DEFAULT_FORMAT: dict[str, dict[str, Any]] = {
    "muon": {"bits": 8, "codebook": "linear", "block_size": DEFAULT_BLOCK_SIZE, **OWN_DEFAULTS["muon"]},
    "adamw": OWN_DEFAULTS["adamw"],
}
# What every group of Muon8bit has besides, at the only value that it may have.
_IDLE: dict[str, dict[str, Any]] = {
    "muon": IMPLEMENTATION_DEFAULTS,
    "adamw": {**IMPLEMENTATION_DEFAULTS, **dict.fromkeys(MUON_ONLY_KEYS)},
}
# What torch.optim.Muon and its kin do where their groups do not say.
_UNSAID: dict[str, dict[str, Any]] = {
    "muon": {
        "nesterov": True,
        "ns_coefficients": JORDAN,
        "eps": DEFAULT_EPS,
        "ns_steps": DEFAULT_NS_STEPS,
        "adjust_lr_fn": None,
    },
    "adamw": {"eps": DEFAULT_ADAMW_EPS},
}
_WORDS = {
    "torch": "torch.optim.Muon's",
    "jordan": "Jordan's Muon's",
    "heavy-ball": "heavy-ball Muon's",
    "normuon": "NorMuon's",
    "adamuon": "AdaMuon's",
    "dion": "Dion's heavy-ball",
    "adamw": "AdamW's exp_avg",
}
_CODES_KEYS = (LINEAR_CODES_KEY, DYNAMIC_CODES_KEY, BUFFER_KEY)


def stored(group: Group, format_options: Mapping[str, Any], index: int) -> Group:
    """Return the group with every option that Muon8bit has, checked.

    Its format is its own or the default one, under the options given. What others leave unsaid is as torch.optim.Muon
    does it, with a warning.

    Raises:
        ValueError: names the group and the hyper-parameter.
    """
    unsaid = {key: value for key, value in _UNSAID[group.algorithm].items() if key not in group.options}
    if unsaid:
        taken = ", ".join(f"{key}={value!r}" for key, value in unsaid.items())
        warnings.warn(f"group {index} does not say {', '.join(unsaid)}: taken as {taken}", stacklevel=4)
    defaults = _DEFAULT_FORMAT[group.algorithm]
    asked = {key: value for key, value in format_options.items() if key in defaults}
    options = {**defaults, **_IDLE[group.algorithm], **unsaid, **group.options, **asked}
    check_options({**options, "algorithm": group.algorithm}, f"group {index}: ")
    return Group(group.algorithm, options, group.entries, group.part)


def own(groups: Sequence[Group], keep: Keep, *, new_second_moment: bool = False) -> tuple[dict[str, Any], set[Change]]:
    """Return Muon8bit's state dict, and which formats became which.

    With `new_second_moment` a second moment that is not saved starts at zero.
    """
    result: dict[str, Any] = {"state": {}, "param_groups": []}
    changes: set[Change] = set()
    keys = _keys(groups)
    for group in groups:
        ids = [next(keys) for _ in group.entries]
        for key, entry in zip(ids, group.entries, strict=True):
            if entry.tensors:
                result["state"][key] = _kept(_state(entry, group.options, changes, new_second_moment), keep)
        result["param_groups"].append({**_named(group), "algorithm": group.algorithm, "params": ids})
    return result, changes


def torchs(groups: Sequence[Group], keep: Keep) -> tuple[dict[str, Any], set[Change]]:
    """Return state dicts of torch.optim.Muon and torch.optim.AdamW under 'muon' and 'adamw', and the changes of format.

    Either is there only if it has a group.
    """
    optimizers = {"muon": torch.optim.Muon([torch.empty(1, 1)]), "adamw": torch.optim.AdamW([torch.empty(1)])}
    result: dict[str, Any] = {}
    changes: set[Change] = set()
    for part, optimizer in optimizers.items():
        members = [group for group in groups if group.algorithm == part]
        if not members:
            continue
        named = [_torch_options(_named(group)) for group in members]
        result[part] = {"state": {}, "param_groups": []}
        keys = _keys(members)
        for group, own_options in zip(members, named, strict=True):
            ids = [next(keys) for _ in group.entries]
            for key, entry in zip(ids, group.entries, strict=True):
                if entry.tensors:
                    state = _torch_state(entry, group.options, changes)
                    result[part]["state"][key] = _kept(state, keep)
            options = {**optimizer.defaults, **own_options}
            result[part]["param_groups"].append({**options, "params": ids})
    return result, changes


def _kept(state: Mapping[str, Tensor], keep: Keep) -> dict[str, Any]:
    return {name: keep(tensor) for name, tensor in state.items()}


def _keys(groups: Sequence[Group]) -> Iterator[int | str]:
    """Yield ids of the entries in their order: the names that are ids already, else indices, as torch counts them."""
    for index, entry in enumerate(entry for group in groups for entry in group.entries):
        yield entry.key if isinstance(entry.key, str) else index


def _named(group: Group) -> dict[str, Any]:
    """Return the group's options, with the names of its parameters if all have one."""
    names = [entry.name for entry in group.entries]
    return {**group.options, **({"param_names": names} if names and None not in names else {})}


def _torch_state(entry: Entry, options: Mapping[str, Any], changes: set[Change]) -> dict[str, Tensor]:
    """Return one parameter's state as torch stores it; its Muon takes whole matrices only."""
    if entry.algorithm == "adamw":
        return moments(entry, 32, changes)
    if options["split_sizes"] is not None:
        raise ValueError(f"{entry.where} is cut by split_sizes={options['split_sizes']}: torch.optim.Muon cannot")
    momentum, source = _momentum(entry)
    if momentum.codes.ndim != 2:
        raise ValueError(f"{entry.where} has {momentum.codes.ndim} dimensions: torch.optim.Muon takes matrices only")
    if entry.dialect != "torch":
        changes.add(("the momentum was", source, _WORDS["torch"]))
    return {BUFFER_KEY: _values(entry, momentum)}


def _torch_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's options without those that torch lacks; a schedule of coefficients as one triple.

    Raises:
        ValueError: for coefficients that differ by step, clipping, or another weight decay than torch's.
    """
    if options.get("clip_matrix_norm") is not None:
        raise ValueError("torch.optim.Muon has no clip_matrix_norm: set it to None in the groups first")
    if options["algorithm"] == "muon" and options.get("maximize"):
        raise ValueError("torch.optim.Muon has no maximize: set it to False in the groups first, and negate the loss")
    if options.get("cautious_weight_decay"):
        raise ValueError("torch's optimizers have no cautious_weight_decay: set it to False in the groups first")
    if options.get("second_moment") is not None or options.get("sign_momentum"):
        what = "sign_momentum" if options.get("second_moment") is None else "second_moment"
        raise ValueError(
            f"torch.optim.Muon has no {what}, which these groups have: convert to a plain Muon8bit first, by like "
            "(--like) its state dict, which leaves second moments out"
        )
    if options.get("adjust_lr_fn") == "spectral":
        raise ValueError("torch.optim.Muon has no adjust_lr_fn='spectral': set another in the groups first, and its lr")
    if options.get("decay_lr_power") not in (None, 1):
        raise ValueError(
            "torch.optim.Muon decays by lr, not by its square: set decay_lr_power to 1 in the groups first, and "
            "weight_decay to lr times what it is"
        )
    own = {*RUNNING_KEYS, *OWN_DEFAULTS["muon"], *OWN_DEFAULTS["adamw"], *IMPLEMENTATION_DEFAULTS} - {"maximize"}
    own |= {"maximize"} if options["algorithm"] == "muon" else {*MUON_ONLY_KEYS}
    unknown = {*own, "algorithm", "rounding_seed", "rounding_step"}
    result = {key: value for key, value in options.items() if key not in unknown}
    if "ns_coefficients" in result:
        schedule = resolve_coefficients(result["ns_coefficients"], result["ns_steps"])
        if len(set(schedule.steps)) > 1 or schedule.norm_factor != 1.0:
            raise ValueError(f"ns_coefficients={result['ns_coefficients']!r} differ by step: torch.optim.Muon has one")
        result["ns_coefficients"] = schedule.steps[0]
    return result


def _state(
    entry: Entry, options: Mapping[str, Any], changes: set[Change], new_second_moment: bool
) -> dict[str, Tensor]:
    """Return one parameter's state in the format of `options`."""
    if entry.algorithm == "adamw":
        return moments(entry, options["adamw_bits"], changes)
    momentum, source = _momentum(entry)
    shape = momentum.codes.shape
    format = MomentumFormat.of(shape, *(options[key] for key in FORMAT_KEYS))
    # Block sizes are powers of two: where the layouts are equal, so are the blocks.
    second = second_moment(entry, shape, options, changes, is_new=new_second_moment)
    if entry.dialect == "muon8bit" and format.layout(shape) == momentum.format.layout(shape):
        return {**momentum.to_state(), **second}
    changes.add(("the momentum was", source, format.options))
    return {**Momentum.encode(_values(entry, momentum), format).to_state(), **second}


def _values(entry: Entry, momentum: Momentum) -> Tensor:
    """Return the exponential moving average, fp32."""
    values = momentum.decode()
    if entry.dialect in ("heavy-ball", "dion"):
        values = values * (1 - entry.options["momentum"])
    if not is_finite(values):
        raise ValueError(f"state of {entry.where}: its momentum holds NaN or Inf: the checkpoint is damaged")
    return values


def _momentum(entry: Entry) -> tuple[Momentum, str]:
    """Return the saved momentum, checked but for its values, and its format in words."""
    if entry.dialect == "adamw":
        tensors = first_momentum(checked_moments(entry))
        return Momentum.from_state(tensors, MomentumFormat(None, DEFAULT_BLOCK_SIZE)), _WORDS["adamw"]
    found = [key for key in _CODES_KEYS if key in entry.tensors]
    if len(found) != 1 or (entry.dialect != "muon8bit" and found != [BUFFER_KEY]):
        listed = ", ".join(map(str, entry.tensors))
        raise ValueError(f"state of {entry.where} has {listed}: that is no momentum of {entry.dialect}'s")
    codes = dense(entry, found[0])
    if entry.dialect == "muon8bit":
        format = MomentumFormat.of(codes.shape, *(entry.options[key] for key in FORMAT_KEYS))
        words = format.options
    else:
        codes, format, words = codes.float(), MomentumFormat(None, DEFAULT_BLOCK_SIZE), _WORDS[entry.dialect]
        if codes.ndim != 2 and not (codes.ndim == 3 and entry.dialect in ("normuon", "dion")):
            raise ValueError(
                f"{entry.where} has {codes.ndim} dimensions: only matrices come from {_WORDS[entry.dialect]}"
            )
    layout = format.layout(codes.shape)
    if entry.tensors.keys() - set(SECOND_KEYS) != layout.keys():
        listed = ", ".join(map(str, entry.tensors))
        raise ValueError(
            f"state of {entry.where} has {listed}; by its group ({words}) {', '.join(layout)} are expected"
        )
    tensors = {found[0]: codes}
    for key, (shape, dtype) in layout.items():
        value = tensors.setdefault(key, dense(entry, key))
        if tuple(value.shape) != shape or value.dtype != dtype:
            raise ValueError(
                f"state of {entry.where}: {key} is {value.dtype} {tuple(value.shape)}, expected {dtype} {shape}"
            )
        if problem := why_damaged(key, value):
            raise ValueError(f"state of {entry.where}: {key} holds {problem}: the checkpoint is damaged")
    return Momentum.from_state(tensors, format), words
