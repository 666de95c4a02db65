"""Tells by names how the groups of a state dict and those of an optimizer divide the parameters differently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ._text import collapse, in_short, template, unwrapper
from .step.options import AS_SAVED, OWN_DEFAULTS, RATES_KEY, SAME_GROUPS

_Groups = Sequence[Mapping[str, Any]]

BY_NAME = "take the state over by name with muon8bit.convert_state_dict(saved, like=optimizer)"
_SHOWN = 5  # moved parameters that an error names, layers of one kind together
# Keys of a group that say nothing about where its parameters belong.
_NOT_COMPARED = {"params", "param_names", "lr", "initial_lr", "rounding_seed", "rounding_step", RATES_KEY}


def check_division(saved: _Groups, current: _Groups) -> None:
    """Check that each saved group has as many parameters as the current one in its place.

    Args:
        saved: `param_groups` of a state dict, each with `algorithm`.
        current: groups of the running optimizer.

    Raises:
        ValueError: names the parameters that stand in other groups, with what differs between the two, or the first
            that one side lacks or whose group has another place, and the way out.
    """
    theirs, ours = _places(saved), _places(current)
    is_named = bool(theirs and ours)
    foreign = _foreign(theirs, ours) if is_named else ""
    if is_named and not foreign and (moved := _moved(theirs, ours, saved, current)):
        kinds: dict[tuple[str, str], list[str]] = {}
        for name in moved:
            difference = _difference(saved[theirs[name]], current[ours[name]])
            kinds.setdefault((template(name), difference), []).append(name)
        words = [f"{collapse(names)} ({difference})" for (_, difference), names in kinds.items()]
        more = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
        count = f"{len(moved)} parameters in other groups" if len(moved) > 1 else "1 parameter in another group"
        raise ValueError(
            f"the state dict has {count} than this optimizer: {', '.join(words[:_SHOWN])}{more}: {BY_NAME}, or "
            f"{SAME_GROUPS}"
        )
    if is_named and not foreign and (other := next((name for name in ours if theirs[name] != ours[name]), None)):
        raise ValueError(
            f"the state dict has its groups in another order: {other} is in its group {theirs[other]}, here in group "
            f"{ours[other]}: {BY_NAME}, or {SAME_GROUPS}"
        )
    if len(saved) != len(current):
        raise ValueError(
            f"the state dict has {len(saved)} parameter groups, the optimizer {len(current)}{foreign}: {AS_SAVED}"
        )
    for i, (old, new) in enumerate(zip(saved, current, strict=True)):
        if len(old["params"]) != len(new["params"]):
            numbers = f"{len(old['params'])} parameters saved, {len(new['params'])} here"
            raise ValueError(f"group {i}: {numbers}{foreign}: {AS_SAVED}")


def _places(groups: _Groups) -> dict[str, int]:
    """Return the index of each parameter's group by its name without wrappers; empty where a group has no names."""
    names = [group.get("param_names") for group in groups]
    if not all(isinstance(of_group, Sequence) for of_group in names):
        return {}
    pairs = [(str(name), i) for i, of_group in enumerate(names) for name in of_group or ()]
    unwrapped = unwrapper(name for name, _ in pairs)
    return {unwrapped(name): i for name, i in pairs}


def _foreign(theirs: Mapping[str, int], ours: Mapping[str, int]) -> str:
    """Name the first parameter that one side lacks; empty if there is none."""
    lost, new = ([name for name in one if name not in other] for one, other in ((theirs, ours), (ours, theirs)))
    words = [f"{names[0]} is only {where}" for names, where in ((lost, "saved"), (new, "here")) if names]
    return f" ({', '.join(words)})" if words else ""


def _moved(theirs: Mapping[str, int], ours: Mapping[str, int], saved: _Groups, current: _Groups) -> list[str]:
    """Return the parameters outside of the current group that their saved group has become.

    That is one of its algorithm, with equal options rather than others, and then with most of its parameters.
    """
    common = Counter((theirs[name], ours[name]) for name in ours)
    pairs = [pair for pair in common if saved[pair[0]].get("algorithm") == current[pair[1]].get("algorithm")]
    pairs.sort(key=lambda pair: (bool(_unequal(saved[pair[0]], current[pair[1]])), -common[pair]))
    matches: dict[int, int] = {}
    for old, new in pairs:
        if old not in matches and new not in matches.values():
            matches[old] = new
    return [name for name in ours if matches.get(theirs[name]) != ours[name]]


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Say what a saved and a current group do differently: `saved: adamw, lr=0.005; here: adamw, lr=0.001`."""
    unequal, algorithms = _unequal(old, new), (old["algorithm"], new["algorithm"])
    if not unequal and algorithms[0] == algorithms[1]:
        return f"{algorithms[0]} with equal options, but beside other parameters"
    there, here = (
        ", ".join([algorithm, *(f"{key}={in_short(pair[i])}" for key, pair in unequal.items())])
        for i, algorithm in enumerate(algorithms)
    )
    return f"saved: {there}; here: {here}"


def _unequal(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the options that differ between a saved and a current group, with both values.

    The lr is that from which a scheduler started, where one did.
    """
    keys = ["weight_decay", "split_sizes"]
    if old["algorithm"] == new["algorithm"]:
        old = {**OWN_DEFAULTS[old["algorithm"]], **old}
        keys = sorted((old.keys() & new.keys()) - _NOT_COMPARED)
    pairs = {
        "lr": (_base_lr(old), _base_lr(new)),
        **{key: (_plain(old.get(key)), _plain(new.get(key))) for key in keys},
    }
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _base_lr(group: Mapping[str, Any]) -> Any:
    return _plain(group.get("initial_lr", group.get("lr")))


def _plain(value: Any) -> Any:
    """Return tensors and arrays as numbers, and lists as tuples, so that they can be compared and shown."""
    if isinstance(value, Tensor) or (type(value).__module__ == "numpy" and hasattr(value, "tolist")):
        value = value.tolist()
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value
