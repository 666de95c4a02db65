"""Names the parameters that a checkpoint's groups hold elsewhere than the running optimizer's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ._names import unwrapper
from .step.options import AS_SAVED

_SHOWN = 5


def check_moved(saved: Sequence[Mapping[str, Any]], current: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError if the saved groups name the same parameters but divide them in another way.

    Groups that only stand in another order, or without names, are left to the checks that follow.

    Args:
        saved: `param_groups` of a state dict, each with `algorithm`.
        current: groups of the running optimizer.

    Raises:
        ValueError: names the moved parameters, both their groups, and the way out.
    """
    theirs, ours = _places(saved), _places(current)
    if not theirs or theirs.keys() != ours.keys() or theirs == ours:
        return
    common = Counter((theirs[name], ours[name]) for name in theirs)
    matches: dict[int, int] = {}
    for (old, new), _ in common.most_common():  # each saved group stands for the one that holds most of it
        if saved[old].get("algorithm") == current[new].get("algorithm"):
            matches.setdefault(old, new)
    moved = [name for name in ours if matches.get(theirs[name]) != ours[name]]
    if not moved:
        return
    words = [f"{name} (saved: {_kind(saved[theirs[name]])}; here: {_kind(current[ours[name]])})" for name in moved]
    more = f" and {len(moved) - _SHOWN} more" if len(moved) > _SHOWN else ""
    raise ValueError(
        f"the state dict has {len(moved)} parameters in other groups than this optimizer: "
        f"{', '.join(words[:_SHOWN])}{more}: {AS_SAVED}"
    )


def _places(groups: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return the index of each parameter's group by its name without wrappers; empty where a group has no names."""
    names = [group.get("param_names") for group in groups]
    if not all(isinstance(of_group, Sequence) for of_group in names):
        return {}
    pairs = [(str(name), i) for i, of_group in enumerate(names) for name in of_group or ()]
    unwrapped = unwrapper(name for name, _ in pairs)
    return {unwrapped(name): i for name, i in pairs}


def _kind(group: Mapping[str, Any]) -> str:
    """Say what a group does with its parameters: `adamw, weight decay 0.1`."""
    split = f", split_sizes {tuple(group['split_sizes'])}" if group.get("split_sizes") else ""
    return f"{group.get('algorithm')}, weight decay {group.get('weight_decay')}{split}"
