"""Puts the parameters of a saved optimizer into another's groups and order, by their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from .._text import unwrapper
from ..step.options import AS_SAVED, RUNNING_KEYS
from .entries import Entry, Group

Like = Optimizer | Mapping[str, Any]


def targets(like: Like, dialect: str) -> list[Group]:
    """Return the groups to fill: their entries have names and keys, no state.

    Raises:
        ValueError: if `like` is not of that kind.
    """
    parts: Mapping[str, Any] = {"": like}
    if dialect == "torch":
        if not isinstance(like, Mapping) or not like or like.keys() - {"muon", "adamw"}:
            raise ValueError("like: with target='torch' give a dict of optimizers or state dicts: 'muon' and 'adamw'")
        parts = like
    groups = []
    for part, optimizer in parts.items():
        described = optimizer.state_dict() if isinstance(optimizer, Optimizer) else optimizer
        if not isinstance(described, Mapping) or not isinstance(described.get("param_groups"), Sequence):
            raise ValueError("like: an optimizer or the state dict of one is needed, with `param_groups`")
        for i, group in enumerate(described["param_groups"]):
            where = f"{part} group {i} of like" if part else f"group {i} of like"
            algorithm = part or group.get("algorithm")
            if algorithm is None:
                raise ValueError(f"{where} is not of a Muon8bit: it has no 'algorithm'")
            options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            keys = group["params"]
            names = group.get("param_names", [key if isinstance(key, str) else None for key in keys])
            entries = [
                Entry(name, name or f"parameter {key} of {where}", key, algorithm, {}, options, "muon8bit")
                for key, name in zip(keys, names, strict=True)
            ]
            groups.append(Group(algorithm, options, entries, part))
    return groups


def arrange(groups: Sequence[Group], wanted: Sequence[Group]) -> list[Group]:
    """Put the saved entries into the wanted groups.

    Hyper-parameters are the saved ones, how momenta are stored and cut the wanted ones. Without names on either side,
    groups of equal kinds and sizes are matched by position.

    Raises:
        ValueError: names the parameter that one side lacks or steps otherwise, or the hyper-parameter that parameters
            of one wanted group do not share.
    """
    saved = [entry for group in groups for entry in group.entries]
    asked = [entry for group in wanted for entry in group.entries]
    if all(entry.name for entry in (*saved, *asked)):
        saved_names, asked_names = _plain_names(saved), _plain_names(asked)
        by_name: dict[str, Entry] = {}
        for name, entry in zip(saved_names, saved, strict=True):
            if by_name.setdefault(name, entry) is not entry:
                raise ValueError(f"{entry.name} is saved twice: give the names of one model's parameters")
        frozen = {name for name, entry in by_name.items() if entry.dialect == "adamw" and not entry.tensors}
        lost = by_name.keys() - set(asked_names) - frozen
        if lost:
            raise ValueError(f"{min(lost)} is saved, but `like` does not have it: build both from one model")
        matched = [by_name.get(name) for name in asked_names]
    else:
        if [(g.algorithm, len(g.entries)) for g in groups] != [(g.algorithm, len(g.entries)) for g in wanted]:
            raise ValueError(
                "the groups differ, and without parameter names on both sides nothing else can match them: build the "
                "optimizer from (name, parameter) pairs, and give the names of the saved parameters"
            )
        matched = list(saved)
    found = iter(matched)
    return [_filled(group, [next(found) for _ in group.entries]) for group in wanted]


def _plain_names(entries: Sequence[Entry]) -> list[str]:
    """Return the names of entries that all have one, as the model has them that a wrapper holds."""
    names = [str(entry.name) for entry in entries]
    return list(map(unwrapper(names), names))


def _filled(group: Group, found: Sequence[Entry | None]) -> Group:
    """Return a wanted group with the saved entries under its own keys."""
    entries = []
    for slot, entry in zip(group.entries, found, strict=True):
        if entry is None:
            raise ValueError(f"{slot.where} is not saved: build both optimizers from one model")
        if entry.algorithm != group.algorithm and entry.dialect != "adamw":
            is_start = group.algorithm == "muon" and entry.dialect != "muon8bit"
            hint = "; from an AdamW over the whole model a run starts by source (--from) adamw" * is_start
            raise ValueError(
                f"{slot.where} was stepped by {entry.algorithm}, `like` has it in a group of {group.algorithm}: "
                f"{AS_SAVED}{hint}"
            )
        entries.append(
            Entry(slot.name, entry.where, slot.key, group.algorithm, entry.tensors, entry.options, entry.dialect)
        )
    own = {key: group.options[key] for key in RUNNING_KEYS if key in group.options}
    options = {key: value for key, value in group.options.items() if key not in ("rounding_seed", "rounding_step")}
    if entries and entries[0].dialect != "adamw":  # from which a run starts with options of its own
        saved = [{k: v for k, v in entry.options.items() if k not in RUNNING_KEYS} for entry in entries]
        for entry, other in zip(entries[1:], saved[1:], strict=True):
            unequal = sorted(key for key in other.keys() | saved[0].keys() if other.get(key) != saved[0].get(key))
            if unequal:
                raise ValueError(
                    f"{entries[0].where} and {entry.where} were saved with different {', '.join(unequal)}, but share a "
                    f"group of `like`: {AS_SAVED}"
                )
        options = {**options, **saved[0]}
    return Group(group.algorithm, {**options, **own}, entries, group.part)
