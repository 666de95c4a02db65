"""Puts the parameters of a saved optimizer into another's groups and order, by their names."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

from torch.optim import Optimizer

from .._text import collapse, template, unwrapper
from ..config import BUFFER_KEY, DYNAMIC_CODES_KEY, EXP_AVG_CODES_KEY, EXP_AVG_KEY, LINEAR_CODES_KEY
from ..step.options import RATES_KEY, RUNNING_KEYS, SAME_GROUPS
from .entries import Entry, Group

Like = Optimizer | Mapping[str, Any]
# Keys of the tensors that have their parameter's shape.
_OF_ITS_SHAPE = (LINEAR_CODES_KEY, DYNAMIC_CODES_KEY, BUFFER_KEY, EXP_AVG_KEY, EXP_AVG_CODES_KEY)
_ROUNDING = ("rounding_seed", "rounding_step")


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
            shapes: list[tuple[int, ...] | None] = [None] * len(keys)
            if isinstance(optimizer, Optimizer):
                shapes = [tuple(param.shape) for param in optimizer.param_groups[i]["params"]]
            entries = [
                Entry(name, name or f"parameter {key} of {where}", key, algorithm, {}, options, "muon8bit", shape)
                for key, name, shape in zip(keys, names, shapes, strict=True)
            ]
            groups.append(Group(algorithm, options, entries, part))
    return groups


def arrange(
    groups: Sequence[Group], wanted: Sequence[Group], *, drop_moved: bool = False, is_named_by_hand: bool = False
) -> list[Group]:
    """Put the saved entries into the wanted groups.

    Hyper-parameters are the saved ones, and the wanted ones where a group's parameters were saved with several; how
    momenta are stored and cut is as wanted. Without names on either side, groups of equal kinds and sizes are matched
    by position.

    Args:
        groups: the saved ones.
        wanted: those of `targets`.
        drop_moved: leave out the state of what the other algorithm stepped, instead of an error.
        is_named_by_hand: the saved names are the caller's, who may have another order.

    Raises:
        ValueError: names the parameter that one side lacks, steps otherwise, or has in another shape.
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
    found = []
    for slot, match in zip(asked, matched, strict=True):
        if match is None:
            raise ValueError(f"{slot.where} is not saved: build both optimizers from one model")
        _check_shape(slot, match, is_named_by_hand)
        found.append(match)
    rest = iter(_without_moved(asked, found, drop_moved))
    filled = []
    for i, group in enumerate(wanted):
        entries = [
            replace(next(rest), name=slot.name, key=slot.key, algorithm=slot.algorithm) for slot in group.entries
        ]
        filled.append(Group(group.algorithm, _options(group, entries, i), entries, group.part))
    _warn_of_lr(filled, wanted)
    return filled


def _plain_names(entries: Sequence[Entry]) -> list[str]:
    """Return the names of entries that all have one, as the model has them that a wrapper holds."""
    names = [str(entry.name) for entry in entries]
    return list(map(unwrapper(names), names))


def _check_shape(slot: Entry, entry: Entry, is_named_by_hand: bool) -> None:
    """Raise ValueError for a saved state that is not of the parameter's shape, or of none that Muon takes."""
    shape = next(
        (tuple(entry.tensors[key].shape) for key in _OF_ITS_SHAPE if hasattr(entry.tensors.get(key), "shape")), None
    )
    if shape is None:
        return
    start = "names do not fit the saved shapes: " * is_named_by_hand
    way_out = "give them in the order of the saved groups" if is_named_by_hand else "build both from one model"
    if slot.shape is not None and slot.shape != shape:
        raise ValueError(f"{start}{slot.where} is {slot.shape} in `like`, its saved state {shape}: {way_out}")
    if slot.algorithm == "muon" and len(shape) < 2:
        raise ValueError(
            f"{start}the saved state of {slot.where} is {shape}, and `like` has it in a group of muon, which takes "
            f"matrices: {way_out}"
        )


def _without_moved(asked: Sequence[Entry], found: Sequence[Entry], drop_moved: bool) -> list[Entry]:
    """Return the saved entries; of those that the other algorithm stepped without state, with a warning.

    Raises:
        ValueError: names the first of them without `drop_moved`.
    """
    pairs = list(zip(asked, found, strict=True))
    is_moved = [slot.algorithm != entry.algorithm and entry.dialect != "adamw" for slot, entry in pairs]
    moved = list(compress(pairs, is_moved))
    if not moved:
        return list(found)
    slot, entry = moved[0]
    if not drop_moved:
        is_start = slot.algorithm == "muon" and entry.dialect != "muon8bit"
        hint = "; from an AdamW over the whole model a run starts by source (--from) adamw" * is_start
        raise ValueError(
            f"{slot.where} was stepped by {entry.algorithm}, `like` has it in a group of {slot.algorithm}: start it "
            f"without state by drop_moved=True (--drop-moved), or {SAME_GROUPS}{hint}"
        )
    kinds: dict[tuple[str, str], list[str]] = {}
    for slot, entry in moved:
        way = f"from {entry.algorithm} to {slot.algorithm}"
        kinds.setdefault((template(slot.where), way), []).append(slot.where)
    words = ", ".join(f"{collapse(names)} ({way})" for (_, way), names in kinds.items())
    warnings.warn(f"without their state, as it is another algorithm's: {words}", stacklevel=4)
    empty = [replace(e, tensors={}, options={k: e.options[k] for k in _ROUNDING if k in e.options}) for _, e in pairs]
    return [empty[i] if is_moved[i] else entry for i, entry in enumerate(found)]


def _options(group: Group, entries: Sequence[Entry], index: int) -> dict[str, Any]:
    """Return the options of a wanted group: the saved ones where its parameters were saved with one value.

    Where they were saved with several, that of `like` stays, with a warning. lr goes with that from which a scheduler
    started. Entries without lr begin anew; seed and step of stochastic rounding are those of the whole optimizer.
    """
    own = {key: group.options[key] for key in RUNNING_KEYS if key in group.options}
    wanted = {key: value for key, value in group.options.items() if key not in _ROUNDING}
    moment = group.options.get("second_moment")
    others_of = [e for e in entries if "lr" in e.options and e.options.get("second_moment") != moment]
    if others_of and group.algorithm == "muon" and not any(e.dialect == "adamw" for e in others_of):
        was = others_of[0].options.get("second_moment")
        warnings.warn(
            f"group {index} has all options of `like`, lr too, since it has second_moment={moment!r} and "
            f"{others_of[0].where} was saved with {was!r}",
            stacklevel=4,
        )
    is_other = {id(entry) for entry in others_of}
    continued = [e for e in entries if "lr" in e.options and e.dialect != "adamw" and id(e) not in is_other]
    if not continued:
        rounding = {key: entry.options[key] for entry in entries for key in _ROUNDING if key in entry.options}
        return {**wanted, **rounding, **own}
    saved = [{k: v for k, v in entry.options.items() if k not in RUNNING_KEYS} for entry in continued]
    if any(entry.dialect == "muon8bit" and RATES_KEY not in entry.options for entry in continued):
        wanted.pop(RATES_KEY, None)  # it was the built-in table
    unequal: set[str] = set()
    others = []
    for entry, other in zip(continued, saved, strict=True):
        keys = {key for key in other.keys() | saved[0].keys() if other.get(key) != saved[0].get(key)}
        others += [(entry, other)] * bool(keys - unequal)
        unequal |= keys
    if unequal:
        values = [f"{entry.where} {_shown(other, unequal)}" for entry, other in ((continued[0], saved[0]), *others)]
        unequal |= {"lr", "initial_lr"} if unequal & {"lr", "initial_lr"} else set()
        warnings.warn(
            f"group {index} has {_shown(wanted, unequal)} of `like`, as its parameters were saved with several: "
            f"{', '.join(values)}",
            stacklevel=4,
        )
    return {**wanted, **{key: value for key, value in saved[0].items() if key not in unequal}, **own}


def _warn_of_lr(filled: Sequence[Group], wanted: Sequence[Group]) -> None:
    """Warn where the lr, or that from which a scheduler started, is the saved one and `like` has another."""
    words = []
    for i, (group, other) in enumerate(zip(filled, wanted, strict=True)):
        kept, asked = (of.options.get("initial_lr", of.options["lr"]) for of in (group, other))
        if kept != asked and group.entries:
            more = ", ..." * (len(group.entries) > 1)
            words.append(f"group {i} ({group.entries[0].where}{more}) has {float(kept):g}, in `like` {float(asked):g}")
    if words:
        warnings.warn(f"lr is the saved one: {', '.join(words)}; set another after loading", stacklevel=4)


def _shown(options: Mapping[str, Any], keys: Iterable[str]) -> str:
    return ", ".join(f"{key}={options[key]!r}" for key in sorted(keys) if key in options)
