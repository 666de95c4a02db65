"""Reads the state dicts of Muon8bit, of torch.optim.Muon beside an AdamW, and of heavy-ball Muons.

    Muon8bit, torch, Jordan     m <- beta m + (1 - beta) g
    heavy ball                  b <- beta b + g                so  m = (1 - beta) b  at a fixed beta

Sources: torch.optim.Muon and torch.optim.AdamW. Heavy ball: Moonlight (arXiv 2502.16982) and its public code, whose one
group holds both kinds, told apart by `use_muon` in the state. K. Jordan's Muon, https://github.com/KellerJordan/Muon:
an average since February 2025, when its groups got `weight_decay`. First one group held both kinds as Moonlight's, with
`adamw_lr_ratio` and `adamw_wd`; since MuonWithAuxAdam `use_muon` is in the groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..choices import DIALECTS, Dialect
from ..config import ALGORITHMS, BUFFER_KEY
from ..orthogonalize.coefficients import JORDAN
from ..step.options import MATRIX_DEFAULTS, OWN_DEFAULTS, RUNNING_KEYS, check_options, group_keys
from .adamw import adamw_group
from .entries import Entry, Group, saved_names, saved_state
from .family import FAMILY, in_our_words, in_torchs_words, is_dions

# What other optimizers' groups need not say; `results` settles it.
_UNSAID = {"muon": {"nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn"}, "adamw": {"eps"}}
# Keys of other optimizers' groups that say how they compute, not what.
_DROPPED = ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")
_MOONLIGHT = {
    "muon": {"wd": "weight_decay"},
    "adamw": {"adamw_betas": "betas", "adamw_eps": "eps", "wd": "weight_decay"},
}
_MOONLIGHT_STATE = {"moment1": "exp_avg", "moment2": "exp_avg_sq"}
# What Jordan's groups do not say: his update is torch.optim.Muon's default.
_JORDAN = {"nesterov": True, "ns_steps": 5, "ns_coefficients": JORDAN, "eps": 1e-7, "adjust_lr_fn": "original"}
# Of an AdamW in the same group as Muon, which steps by lr * adamw_lr_ratio.
_INNER_ADAMW = ("adamw_lr_ratio", "adamw_wd", "adamw_betas", "adamw_eps", "adamw_lr")
# Of learning rate schedulers, and of those who count a group's steps.
_SCHEDULERS = ("initial_lr", "max_lr", "min_lr", "base_lr", "max_momentum", "base_momentum", "step")
# Of groups of optimizers that are no Muon as these are.
_DION = ("mu", "rank_fraction", "rank_multiple_of", "epsilon")


def read(
    state_dict: Mapping[str, Any], dialect: Dialect, names: Sequence[str] | None, momentum: float | None
) -> list[Group]:
    """Return the groups of a saved optimizer, Muon's parameters and AdamW's apart; see `convert_state_dict`.

    Raises:
        ValueError: names the group, parameter or key that is missing or foreign.
    """
    if dialect not in DIALECTS:
        raise ValueError(f"source must be one of {DIALECTS}, not {dialect!r}")
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"not an optimizer's state dict but a {type(state_dict).__name__}")
    groups, given = [], None if names is None else iter(names)
    for part, saved in _parts(state_dict, dialect):
        states, saved_groups = saved.get("state"), saved.get("param_groups")
        if not isinstance(states, Mapping) or not isinstance(saved_groups, Sequence):
            raise ValueError(f"{part or 'this'} is no optimizer's state dict: it needs `state` and `param_groups`")
        listed: set[int | str] = set()
        for i, group in enumerate(saved_groups):
            where = f"group {i} of {part}" if part else f"group {i}"
            keys = group.get("params") if isinstance(group, Mapping) else None
            if not isinstance(keys, Sequence) or not all(isinstance(key, int | str) for key in keys):
                raise ValueError(f"{where} is no parameter group: it has no list 'params' of indices or names")
            listed.update(keys)
            if dialect == "muon8bit":
                groups.append(_own_group(group, states, where, given))
            elif dialect == "adamw":
                groups.append(adamw_group(group, states, where, given))
            else:
                groups += _foreign_groups(group, states, where, part, dialect, given, momentum)
        unlisted = [key for key in states if key not in listed]
        if unlisted:
            raise ValueError(f"there is state for {unlisted[0]!r}, which no group {f'of {part} ' * bool(part)}lists")
    if given is not None and next(given, None) is not None:
        raise ValueError("there are more names than saved parameters: give one name each, Muon's before AdamW's")
    return groups


def _parts(state_dict: Mapping[str, Any], dialect: Dialect) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the state dicts inside of one, with their labels."""
    if "param_groups" in state_dict:
        yield "", state_dict
        return
    parts = [part for part in ("muon", "adamw") if isinstance(state_dict.get(part), Mapping)]
    if dialect in ("muon8bit", "adamw") or not parts or len(parts) < len(state_dict):
        found = ", ".join(map(str, list(state_dict)[:5])) or "nothing"
        raise ValueError(
            f"no optimizer's state dict: it needs `state` and `param_groups`, or, saved by torch, state dicts under "
            f"'muon' and 'adamw'; it has {found}"
        )
    for part in parts:
        yield part, state_dict[part]


def _own_group(group: Mapping[str, Any], states: Mapping[Any, Any], where: str, given: Iterator[str] | None) -> Group:
    """Return a group saved by Muon8bit."""
    _check_not_dions(group, where)
    if "algorithm" not in group:
        if "betas" in group and "momentum" not in group:
            raise ValueError(
                f"{where} was saved by an AdamW, whose run Muon8bit does not continue: start fresh, or take its "
                "exp_avg as the first momentum, by source (--from) adamw; beside a Muon's it is read by source torch"
            )
        raise ValueError(
            f"{where} was not saved by Muon8bit: give source (--from) torch, jordan, heavy-ball, normuon or adamuon"
        )
    algorithm = group["algorithm"]
    if algorithm not in ALGORITHMS:
        raise ValueError(f"{where}: algorithm {algorithm!r} is not one of {', '.join(ALGORITHMS)}")
    options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    options = {**OWN_DEFAULTS[algorithm], **options}
    missing = [key for key in group_keys(algorithm) if key not in options]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    check_options(options, f"{where}: ")
    entries = []
    for key, name in zip(group["params"], saved_names(group, where, given), strict=True):
        described = name or f"parameter {key} of {where}"
        entries.append(Entry(name, described, key, algorithm, saved_state(states, key, described), options, "muon8bit"))
    return Group(algorithm, options, entries)


def _foreign_groups(
    group: Mapping[str, Any],
    states: Mapping[Any, Any],
    where: str,
    part: str,
    dialect: Dialect,
    given: Iterator[str] | None,
    momentum: float | None,
) -> list[Group]:
    """Return a group saved by another optimizer, as one group of Muon or AdamW or as one of each."""
    if dialect in FAMILY and part != "adamw":
        states_of = [saved_state(states, key, where) for key in group["params"]]
        group = in_torchs_words(group, states_of, dialect, where)
    _check_author(group, where, dialect)
    members: dict[str, list[tuple[int | str, str, Mapping[str, Any]]]] = {"muon": [], "adamw": []}
    for key, name in zip(group["params"], saved_names(group, where, given), strict=True):
        if name is None:
            raise ValueError(
                f"{where} has no 'param_names', and parameters are matched by name: give names, one a saved parameter"
            )
        state = saved_state(states, key, name)
        algorithm = part or _algorithm(group, state, name)
        state = {_MOONLIGHT_STATE.get(k, k): value for k, value in state.items() if k != "use_muon"}
        state = in_our_words(state, algorithm, dialect)
        if algorithm == "adamw" and state and "step" in group:  # as pytorch_optimizer counts
            state = {"step": group["step"], **state}
        members[algorithm].append((key, name, state))
    groups = []
    for algorithm, found in members.items():
        if found or (part == algorithm):
            options = _foreign_options(group, algorithm, where, dialect, momentum)
            entries = [Entry(name, name, key, algorithm, state, options, dialect) for key, name, state in found]
            groups.append(Group(algorithm, options, entries))
    return groups


def _check_not_dions(group: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for a group of Dion's, which calls its algorithm by a key of that name as Muon8bit does."""
    if is_dions(group):
        raise ValueError(f"{where} was saved by Dion's NorMuon or Muon: give source (--from) dion")
    if found := [key for key in _DION if key in group]:
        raise ValueError(
            f"{where} has {', '.join(found)}, as Dion's optimizers have: their state is not read, start "
            "with a fresh optimizer"
        )


def _check_author(group: Mapping[str, Any], where: str, dialect: Dialect) -> None:
    """Raise ValueError for a group whose keys are those of an optimizer with another momentum."""
    _check_not_dions(group, where)
    if "algorithm" in group:
        raise ValueError(f"{where} was saved by Muon8bit: give source (--from) muon8bit")
    if "beta2" in group and dialect not in FAMILY:
        raise ValueError(f"{where} has beta2, as NorMuon has: give source (--from) normuon")
    if "dampening" in group:
        raise ValueError(f"{where} was saved by torch.optim.SGD, which is no Muon: start with a fresh optimizer")
    is_jordans = "use_muon" in group or ("adamw_lr_ratio" in group and "weight_decay" in group)
    if is_jordans and dialect == "heavy-ball":
        raise ValueError(
            f"{where} was saved by K. Jordan's Muon, or one like it, whose momentum is an average since February 2025: "
            "give source (--from) jordan"
        )
    if "adamw_lr_ratio" in group and "weight_decay" in group and dialect == "torch":
        raise ValueError(f"{where} was saved by K. Jordan's Muon: give source (--from) jordan")
    if "adamw_betas" in group and not is_jordans and dialect != "heavy-ball":
        raise ValueError(f"{where} was saved by a Muon with a heavy-ball momentum: give source (--from) heavy-ball")
    known = {*group_keys("muon"), *group_keys("adamw"), *_INNER_ADAMW, *_SCHEDULERS, *_DROPPED, *MATRIX_DEFAULTS}
    unknown = sorted(group.keys() - known - {"params", "param_names", "use_muon", "wd"})
    if unknown and dialect != "torch":
        raise ValueError(
            f"{where} has {', '.join(unknown)}, which no release has that {dialect} is about: who saved it? Take these "
            "keys out if they do not say how it steps"
        )


def _algorithm(group: Mapping[str, Any], state: Mapping[str, Any], name: str) -> str:
    """Tell whether Muon or AdamW steps a parameter of an optimizer that can do both."""
    flag = group.get("use_muon", state.get("use_muon"))
    if flag is None and (state or "adamw_betas" not in group):
        flag = BUFFER_KEY in state if state else "betas" not in group
    if not isinstance(flag, bool):
        raise ValueError(f"{name}: neither its state nor its group's 'use_muon' says whether Muon or AdamW steps it")
    return "muon" if flag else "adamw"


def _foreign_options(
    group: Mapping[str, Any], algorithm: str, where: str, dialect: Dialect, momentum: float | None
) -> dict[str, Any]:
    """Return the group's hyper-parameters under Muon8bit's names."""
    renamed, foreign = _MOONLIGHT[algorithm], {*_DROPPED, "params", "param_names", "use_muon", "step"}
    if "adamw_lr_ratio" in group:  # of Jordan's first releases, before an average was taken without decay too
        group = {"weight_decay": 0.0, **_JORDAN, **group}
        if algorithm == "adamw":
            lr, decay = group["lr"] * group["adamw_lr_ratio"], group.get("adamw_wd", 0.0)
            group = {**group, "lr": lr, "weight_decay": decay}
    elif dialect == "jordan":
        group = {**(_JORDAN if algorithm == "muon" else {}), **group}
    elif "adamw_betas" in group:  # Moonlight's, whose factor of lr is not an option
        group = {"adjust_lr_fn": "match_rms_adamw", **group}
    foreign |= {*_INNER_ADAMW} - renamed.keys()
    foreign |= {*_JORDAN, "momentum"} - {"eps"} if algorithm == "adamw" else {"betas"}
    foreign |= {"eps"} if algorithm == "adamw" and "adamw_eps" in group else set()
    options = {renamed.get(key, key): value for key, value in group.items() if key not in foreign}
    decoupled = group.get("decoupled_weight_decay", True) or not group.get("weight_decay")
    refused = [key for key in ("amsgrad", "maximize") if group.get(key)] + ([] if decoupled else ["L2 weight decay"])
    if refused:
        raise ValueError(f"{where} was stepped with {', '.join(refused)}, which Muon8bit does not do")
    if algorithm == "muon" and momentum is not None and options.setdefault("momentum", momentum) != momentum:
        raise ValueError(f"{where} has momentum={options['momentum']!r}: leave the option {momentum!r} out")
    unneeded = {*RUNNING_KEYS, *OWN_DEFAULTS[algorithm]}
    missing = sorted({*group_keys(algorithm)} - _UNSAID[algorithm] - unneeded - options.keys())
    if missing:
        way_out = "; give its momentum" if missing == ["momentum"] and dialect == "heavy-ball" else ""
        raise ValueError(f"{where} lacks {', '.join(missing)}: is it a group of {algorithm}?{way_out}")
    return options
