"""State of NorMuon and AdaMuon as their authors' code and Dion's library save it, in the words of torch.optim.Muon.

| who | momentum | second moment | AdamW |
| --- | --- | --- | --- |
| NorMuon's authors | `momentum_buffer`, an average | `second_momentum_buffer` [..., rows, 1] | `use_muon` False |
| AdaMuon's authors | `momentum_buffer`, an average | `v_buffer`, of elements, flat; beta2 is the momentum | none |
| Dion's NorMuon, Muon | `momentum`, a heavy ball | `variance_neuron` [..., rows, 1] | `momentum`, `variance` |

All have the dtype of the parameter or of Newton-Schulz, here fp32. Sources: https://github.com/zichongli5/NorMuon
normuon.py, https://github.com/Chongjie-Si/AdaMuon (the second version; the first one, without signs, has `beta2`),
https://github.com/microsoft/dion normuon.py, muon.py and megabatch_base.py of 2026.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from ..choices import Dialect
from ..config import BUFFER_KEY, EXP_AVG_KEY, EXP_AVG_SQ_KEY, SECOND_MOMENT_KEY

FAMILY = ("normuon", "adamuon", "dion")
# By dialect, the keys of a Muon parameter's state under Muon8bit's names; others stay.
_STATE = {
    "normuon": {"second_momentum_buffer": SECOND_MOMENT_KEY},
    "adamuon": {"v_buffer": SECOND_MOMENT_KEY},
    "dion": {"momentum": BUFFER_KEY, "variance_neuron": SECOND_MOMENT_KEY},
}
_ADAMW_STATE = {"momentum": EXP_AVG_KEY, "variance": EXP_AVG_SQ_KEY}  # Dion's
# What groups do not say: the rule of each.
_SHARED = {"second_moment_eps": 1e-8, "second_moment_eps_form": "add", "sign_momentum": False, "decay_lr_power": 1}
_AUTHORS = {**_SHARED, "nesterov": True, "ns_steps": 5, "ns_coefficients": "jordan"}
_NORMUON = {
    **_AUTHORS,
    "adjust_lr_fn": "original",
    "second_moment": "row",
    "second_moment_eps": 1e-10,
    "rescale": "keep",
    "eps": 1e-7,
}
_ADAMUON = {**_AUTHORS, "adjust_lr_fn": None, "second_moment": "element", "rescale": "rms", "sign_momentum": True}
_DION_NORMUON = {**_SHARED, "second_moment": "row", "rescale": "keep"}
_ADJUST_LR = {"spectral_norm": "spectral", "rms_norm": "match_rms_adamw"}
_BUFFERS = ("update_buffer", "update_buffer_views")  # tensors of AdaMuon's groups, for communication


def is_dions(group: Mapping[str, Any]) -> bool:
    """Return whether a group is one of Dion's NorMuon or Muon, or of the AdamW in them, and not of Dion itself."""
    return group.get("algorithm") in ("normuon", "muon", "adamw") and "mu" in group and "rank_fraction" not in group


def in_torchs_words(
    group: Mapping[str, Any], states: Sequence[Mapping[str, Any]], dialect: Dialect, where: str
) -> dict[str, Any]:
    """Return a group with its options under the names of torch.optim.Muon and Muon8bit, `use_muon` among them.

    Args:
        group: as it was saved.
        states: of its parameters, whose rows are split by `num_heads`.
        dialect: one of `FAMILY`.
        where: how errors call the group.

    Raises:
        ValueError: names the group and the option that was not this optimizer's, or cannot be represented.
    """
    if dialect == "dion":
        return _of_dion(group, states, where)
    if "algorithm" in group:
        raise ValueError(
            f"{where} was saved by {'Dion' if is_dions(group) else 'Muon8bit'}'s: give it as source (--from)"
        )
    group = {key: value for key, value in group.items() if key not in _BUFFERS}
    if not group.get("use_muon", "betas" not in group):
        return group
    if dialect == "normuon":
        if "beta2" not in group:
            raise ValueError(f"{where} has no beta2: it was not saved by NorMuon; give source (--from) jordan or torch")
        return {**_NORMUON, **group}
    if "beta2" in group:
        raise ValueError(
            f"{where} has beta2={group['beta2']!r}, as the first version of AdaMuon, which took no signs and corrected "
            "V for its start: its rule is not AdaMuon8bit's. Start with a fresh optimizer"
        )
    group = {"momentum": 0.95, **group}
    eps = group.pop("eps", 1e-8)
    return {**_ADAMUON, **group, "eps": 1e-7, "second_moment_eps": eps, "beta2": group["momentum"]}


def _of_dion(group: Mapping[str, Any], states: Sequence[Mapping[str, Any]], where: str) -> dict[str, Any]:
    """Return a group of Dion's NorMuon or Muon, or the AdamW beside it, in torch's words."""
    if not is_dions(group):
        raise ValueError(
            f"{where} is none of Dion's NorMuon or Muon, or of the AdamW in them (algorithm "
            f"{group.get('algorithm')!r}): start with a fresh optimizer"
        )
    kept = {key: group[key] for key in ("params", "param_names", "lr", "initial_lr", "weight_decay") if key in group}
    kept |= {"cautious_weight_decay": group.get("cautious_wd", False), "eps": group["epsilon"]}
    if group["algorithm"] == "adamw":
        return {**kept, "betas": (group["beta1"], group["beta2"]), "step": group["step"], "use_muon": False}
    if group["adjust_lr"] not in _ADJUST_LR:
        raise ValueError(
            f"{where} has adjust_lr={group['adjust_lr']!r}, lr without a factor of the shape, which Muon8bit has not: "
            "set 'rms_norm' or 'spectral_norm' there, and lr to what it is without the factor"
        )
    warnings.warn(f"{where} does not say its Newton-Schulz: taken as Dion's default, 'polar_express'", stacklevel=6)
    kept |= {"momentum": group["mu"], "nesterov": group["nesterov"], "ns_coefficients": "polar_express", "ns_steps": 5}
    kept |= {"adjust_lr_fn": _ADJUST_LR[group["adjust_lr"]], "split_sizes": _splits(group, states, where)}
    if group["algorithm"] == "normuon":
        kept |= {**_DION_NORMUON, "beta2": group["muon_beta2"]}
    return {**kept, "use_muon": True}


def _splits(group: Mapping[str, Any], states: Sequence[Mapping[str, Any]], where: str) -> tuple[int, ...] | None:
    """Return the rows of the pieces that are orthogonalized alone: Dion's `split_sizes`, or `num_heads` equal ones."""
    if group.get("split_sizes") is not None:
        return tuple(group["split_sizes"])
    heads = group.get("num_heads") or 1
    if heads == 1:
        return None
    rows = {len(state["momentum"]) for state in states if "momentum" in state}
    if len(rows) > 1:
        raise ValueError(
            f"{where} has num_heads={heads} of matrices with {sorted(rows)} rows: put each into its own group"
        )
    return (rows.pop() // heads,) * heads if rows else None


def in_our_words(state: Mapping[str, Any], algorithm: str, dialect: Dialect) -> dict[str, Any]:
    """Return a parameter's state under Muon8bit's keys."""
    names = _STATE.get(dialect, {}) if algorithm == "muon" else _ADAMW_STATE if dialect == "dion" else {}
    return {names.get(key, key): value for key, value in state.items()}
