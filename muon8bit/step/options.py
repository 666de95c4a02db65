"""Options of parameter groups: what each may be, and whether Muon can take the group's parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .._values import FINITE, HUGE, TINY, is_choice, is_limit, is_number, is_rate, shown
from ..config import (
    ADJUST_LR,
    ALGORITHMS,
    BITS,
    BLOCK_SIZES,
    CODEBOOKS,
    DEFAULT_ADAMW_BITS,
    DEFAULT_BETA2,
    DEFAULT_SECOND_MOMENT_EPS,
    EPS_FORMS,
    RESCALES,
    SECOND_MOMENTS,
    ZERO_SLICES,
    Backend,
)
from ..orthogonalize import choose_method, diverges, resolve_coefficients
from ..orthogonalize.rates_table import check_key, parse_key
from .group_options import (
    RESCALED,
    AdamWOptions,
    GroupOptions,
    MuonOptions,
    Options,
    SecondMomentOptions,
    matrix_counts,
)

# How the running optimizer stores and computes: from the constructor, never from a checkpoint.
FORMAT_KEYS = ("bits", "codebook", "block_size", "flatten")
MATRIX_DEFAULTS: dict[str, Any] = {"flatten": False, "split_sizes": None, "split_dim": -2}
# Of the family of Muon: what follows the orthogonalization, and what goes into it.
SECOND_MOMENT_DEFAULTS: dict[str, Any] = {
    "second_moment": None,
    "beta2": DEFAULT_BETA2,
    "second_moment_eps": DEFAULT_SECOND_MOMENT_EPS,
    "second_moment_eps_form": "add",
    "rescale": None,
    "sign_momentum": False,
}
# Keys of a group, by algorithm, that no other optimizer and no older checkpoint has, and what their absence means.
OWN_DEFAULTS: dict[str, dict[str, Any]] = {
    "muon": {
        **MATRIX_DEFAULTS,
        **SECOND_MOMENT_DEFAULTS,
        "clip_matrix_norm": None,
        "maximize": False,
        "cautious_weight_decay": False,
        "decay_lr_power": 1,
        "zero_slices": "step",
    },
    "adamw": {"adamw_bits": DEFAULT_ADAMW_BITS, "maximize": False, "cautious_weight_decay": False},
}
# Keys of torch's optimizers, which have several implementations, and their values where none is asked for.
IMPLEMENTATION_DEFAULTS: dict[str, Any] = dict.fromkeys(("foreach", "fused"))
IMPLEMENTATION_DEFAULTS |= dict.fromkeys(("capturable", "differentiable"), False)
# The ways out of errors about groups that are not those of a checkpoint.
_ARGUMENTS = "`patterns`, `no_decay`, `split_heads` and `routers`"
SAME_GROUPS = f"build the groups as they were saved, by the same {_ARGUMENTS}, those of release 0.1 by routing='0.1'"
AS_SAVED = f"use the same model and {SAME_GROUPS}"
# Key of a Muon group: the measured table of rates, as `RatesTable.key`. Absent: the built-in one.
RATES_KEY = "rates"
# Key of a group that `param_groups(scaling=...)` makes: the optimizer and the `adjust_lr_fn` that its rates are for. An
# optimizer checks it and leaves it out of its groups, so that checkpoints with and without a scaling have equal keys.
SCALED_FOR_KEY = "scaled_for"
# Key of a copy of a group that has one of its parameters: all of them, which decide how each is orthogonalized.
MEMBERS = "members"
RUNNING_KEYS = ("second_moment", *FORMAT_KEYS, "split_sizes", "split_dim", "adamw_bits")
MUON_ONLY_KEYS = (
    *("momentum", "nesterov", "ns_coefficients", "ns_steps", "adjust_lr_fn", "clip_matrix_norm", "decay_lr_power"),
    *FORMAT_KEYS,
    *("split_sizes", "split_dim", "zero_slices"),
    *SECOND_MOMENT_DEFAULTS,
)
ADAMW_ONLY_KEYS = ("betas", "adamw_bits")
_SHARED_KEYS = ("weight_decay", "eps", "maximize", "cautious_weight_decay")
# Arguments of the whole optimizer, or of torch's AdamW but not offered here: ignoring them would change what was asked.
NO_GROUP_KEYS = (
    *("backend", "on_nonfinite", "ns_dtype", "param_rounding", "rounding_seed", "rounding_step"),
    *("workspace_bytes", "state_device", "process_group", "shard_state"),
    "amsgrad",
)
_ROUNDING_KEYS = ("rounding_seed", "rounding_step")
# Keys of a group that a step reads, besides its parameters, its learning rate and the numbers of rounding.
_CACHED_KEYS = (
    *("algorithm", *_SHARED_KEYS, "betas", "adamw_bits"),
    *MUON_ONLY_KEYS,
    *IMPLEMENTATION_DEFAULTS,
    RATES_KEY,
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def group_keys(algorithm: str) -> tuple[str, ...]:
    """Return the hyper-parameters that a group of this algorithm holds."""
    return ("lr", *_SHARED_KEYS, *(ADAMW_ONLY_KEYS if algorithm == "adamw" else MUON_ONLY_KEYS))


def state_format(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what decides the tensors of a Muon group's state, as `SecondMomentFormat.of` takes it."""
    sizes, is_rows = group["split_sizes"] and tuple(group["split_sizes"]), group["split_dim"] == -2
    splits = (sizes, None) if is_rows else (None, sizes)
    return (*(group[key] for key in FORMAT_KEYS), *splits, group["second_moment"])


def describe(group: dict[str, Any], group_index: int, index: int) -> str:
    """Return a parameter's name for errors, else its group, index and, where it has one, shape."""
    names, param = group.get("param_names"), group["params"][index]
    if isinstance(names, tuple | list) and index < len(names):
        return str(names[index])
    has_shape = not is_lazy(param) and not (param.is_nested and param.layout == torch.strided)
    return f"parameter {index} of group {group_index}" + (f", shape {tuple(param.shape)}" if has_shape else "")


def resolve_options(group: dict[str, Any], group_index: int, running: Options, *, is_rounded: bool) -> GroupOptions:
    """Check what a group says now, and return it: a scheduler or a hand may have written into it since it was made.

    Only values on the host are read. Call it before a step changes anything.

    Args:
        group: complete, its parameters checked by `check_listed`.
        group_index: its place.
        running: the options of the whole optimizer.
        is_rounded: parameters are rounded stochastically.

    Raises:
        ValueError: for a value that a step cannot take; the message names the group, the key, its value, and what it
            may be.
    """
    where, values = f"parameter group {group_index}: ", {key: group[key] for key in _CACHED_KEYS if key in group}
    for key, value in values.items():
        if isinstance(value, list | tuple):
            values[key] = tuple(tuple(v) if isinstance(v, list) else v for v in value)
    of_optimizer = running.ns_dtype, running.backend, running.workspace_bytes
    try:
        options = _resolved(where, *of_optimizer, "lr" in group, **values)
    except TypeError:  # a value that cannot be hashed
        options = _resolved.__wrapped__(where, *of_optimizer, "lr" in group, **values)
    lr = group["lr"]
    if type(lr) is not float or not 0 <= lr < HUGE:
        _check_lr(group, where)
    if is_rounded:
        _check_present(group, _ROUNDING_KEYS, where)
    if is_rounded or "rounding_seed" in group or "rounding_step" in group:
        _check_rounding(group, where)
    if group.get("split_sizes") is not None:
        for index, param in enumerate(group["params"]):
            check_splits(f"{where}{describe(group, group_index, index)}", param, group)
    if isinstance(options, MuonOptions):
        shapes = tuple(param.shape for param in group.get(MEMBERS, group["params"]))
        counts = matrix_counts(shapes, options.flatten, options.row_splits)
        return replace(options, lr=lr, grad_scale=running.grad_scale, counts=counts)
    return replace(options, lr=lr, grad_scale=running.grad_scale)


@lru_cache(maxsize=256, typed=True)  # True is no 1
def _resolved(
    where: str,
    ns_dtype: torch.dtype | None,
    backend: Backend | None,
    workspace_bytes: int,
    has_lr: bool,
    **values: Any,
) -> GroupOptions:
    """Check all that is the same at every step of most runs, and return it with a learning rate of 0."""
    group = {**values, "lr": 0.0} if has_lr else values
    _check_present(group, ("algorithm",), where)
    check_options(group, where)
    check_foreign(group, where)
    shared = {key: group[key] for key in ("lr", *_SHARED_KEYS)}
    shared["cautious_weight_decay"] &= group["weight_decay"] > 0
    shared |= {"ns_dtype": ns_dtype, "backend": backend, "workspace_bytes": workspace_bytes}
    if group["algorithm"] == "adamw":
        beta1, beta2 = group["betas"]
        beta1 = beta1 if group.get("momentum") is None else group["momentum"]
        return AdamWOptions(betas=(beta1, beta2), adamw_bits=group["adamw_bits"], **shared)
    check_schedule(group, ns_dtype, where)
    own = ("momentum", "nesterov", "flatten", "clip_matrix_norm", "decay_lr_power", "sign_momentum")
    second_moment = None
    if group["second_moment"] is not None:
        is_clamped, eps = group["second_moment_eps_form"] == "clamp", float(group["second_moment_eps"])
        second_moment = SecondMomentOptions(group["second_moment"], group["beta2"], eps, is_clamped, group["rescale"])
    sizes, dim = group["split_sizes"], group["split_dim"]
    return MuonOptions(
        coefficients=resolve_coefficients(group["ns_coefficients"], group["ns_steps"]),
        format=tuple(group[key] for key in FORMAT_KEYS),
        state_format=state_format(group),
        row_splits=sizes if dim == -2 else None,
        column_splits=sizes if dim == -1 else None,
        skips_zero_slices=group["zero_slices"] == "skip" and not group["flatten"],
        second_moment=second_moment,
        table=None if group.get(RATES_KEY) is None else parse_key(group[RATES_KEY]),
        adjust_lr_fn=RESCALED if group["rescale"] == "rms" else group["adjust_lr_fn"],
        **{key: group[key] for key in own},
        **shared,
    )


def check_listed(group: dict[str, Any], where: str) -> None:
    """Raise ValueError unless a group lists tensors, and names of them if any."""
    params, names = group.get("params"), group.get("param_names")
    if not isinstance(params, tuple | list) or not all(isinstance(param, Tensor) for param in params):
        raise ValueError(f"{where}params must be a list of tensors, not {shown(params)}")
    if names is not None and not (isinstance(names, tuple | list) and len(names) <= len(params)):
        raise ValueError(f"{where}param_names must be a list of at most {len(params)} names, not {shown(names)}")


def check_schedule(group: dict[str, Any], ns_dtype: torch.dtype | None, where: str) -> None:
    """Raise ValueError for coefficients that this dtype of Newton-Schulz cannot hold: a step is too late for it."""
    if group["algorithm"] != "muon":
        return
    coefficients = resolve_coefficients(group["ns_coefficients"], group["ns_steps"])
    try:
        choose_method(1, 1, coefficients, "cpu", ns_dtype)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None
    if diverges(coefficients):
        raise ValueError(
            f"{where}ns_coefficients let singular values between 0 and 1 grow beyond float32 within "
            f"{len(coefficients.steps)} steps, and parameters would become NaN: take smaller ones, or fewer ns_steps"
        )


def check_foreign(group: dict[str, Any], where: str) -> None:
    """Raise ValueError for a value of the other algorithm: it would be without effect."""
    algorithm = group["algorithm"]
    for key in ADAMW_ONLY_KEYS if algorithm == "muon" else MUON_ONLY_KEYS:
        # OneCycleLR and CyclicLR write a momentum into AdamW's groups too.
        if group.get(key) is not None and (algorithm, key) != ("adamw", "momentum"):
            raise ValueError(f"{where}{key} has no meaning with algorithm={algorithm!r}: it must stay None")


def _check_present(options: dict[str, Any], keys: Sequence[str], where: str) -> None:
    missing = [key for key in keys if key not in options]
    if missing:
        of = f" for algorithm={options['algorithm']!r}" if "algorithm" in options else ""
        raise ValueError(f"{where}{', '.join(missing)} missing: a group holds every option it was made with{of}")


def _check_lr(options: Mapping[str, Any], where: str) -> None:
    lr = options["lr"]
    if not is_rate(lr):
        kind = "a dense 1-element float tensor " if isinstance(lr, Tensor) else ""
        raise ValueError(f"{where}lr must be {kind}>= 0 and {FINITE}, not {shown(lr)}")


def _check_rounding(options: Mapping[str, Any], where: str) -> None:
    for key in _ROUNDING_KEYS:
        value = options.get(key, 0)
        if type(value) is not int or not 0 <= value < 2**64:
            raise ValueError(f"{where}{key} must be an int in 0 .. 2**64 - 1, not {shown(value)}")


def check_options(options: dict[str, Any], where: str = "") -> None:
    """Check every hyper-parameter in a group or in the defaults.

    Raises:
        ValueError: for a value that is not allowed; the message names the key, its value, and what it may be.
    """

    def require(key: str, valid: bool, allowed: str) -> None:
        if not valid:
            is_own = bool(where) and key in (*MUON_ONLY_KEYS, *ADAMW_ONLY_KEYS)
            of = f" in a group with algorithm={algorithm!r}" if is_own else ""
            raise ValueError(f"{where}{key} must be {allowed}{of}, not {shown(options[key])}")

    algorithm = options.get("algorithm", "muon")
    require("algorithm", is_choice(algorithm, ALGORITHMS), f"one of {ALGORITHMS}")
    _check_present(options, group_keys(algorithm), where)
    _check_lr(options, where)
    require("weight_decay", is_number(options["weight_decay"]), f">= 0 and {FINITE}")
    require("eps", is_number(options["eps"]) and options["eps"] > 0, f"> 0 and {FINITE}")
    for key in ("maximize", "cautious_weight_decay"):
        require(key, is_choice(options[key], (True, False)), "True or False")
    for key in IMPLEMENTATION_DEFAULTS:
        valid = is_choice(options.get(key), (None, False))
        require(key, valid, "None or False (Muon8bit chooses its kernels by device and shape)")
    _check_rounding(options, where)
    if algorithm == "adamw":
        require("eps", options["eps"] >= TINY, f"at least {TINY:.4g}, below which fp32 may divide by zero")
        betas = options["betas"]
        valid = isinstance(betas, tuple | list) and len(betas) == 2 and all(is_number(b, high=1) for b in betas)
        require("betas", valid, "two numbers in [0, 1)")
        bits = options["adamw_bits"]
        require("adamw_bits", is_choice(bits, BITS), f"one of {BITS}")
        cycled = options.get("momentum")  # by OneCycleLR and CyclicLR: it stands in for betas[0]
        require("momentum", cycled is None or is_number(cycled, high=1), "None or in [0, 1), in place of betas[0]")
        return
    require("momentum", is_number(options["momentum"], high=1), "in [0, 1)")
    require("clip_matrix_norm", is_limit(options["clip_matrix_norm"]), f"None or > 0 and {FINITE}")
    require("decay_lr_power", is_choice(options["decay_lr_power"], (1, 2)), "1 or 2")
    require("nesterov", is_choice(options["nesterov"], (True, False, 0, 1)), "True or False")
    choices = {"bits": BITS, "codebook": CODEBOOKS, "block_size": BLOCK_SIZES, "zero_slices": ZERO_SLICES}
    for key, allowed in choices.items():
        require(key, is_choice(options[key], allowed), f"one of {allowed}")
    sizes = options["split_sizes"]
    is_sizes = isinstance(sizes, tuple | list) and len(sizes) > 0 and all(type(n) is int and n > 0 for n in sizes)
    require("split_sizes", sizes is None or is_sizes, "None or positive ints")
    require("split_dim", is_choice(options["split_dim"], (-2, -1)), "one of (-2, -1), a dimension of the matrix")
    require("flatten", isinstance(options["flatten"], bool), "True or False")
    require("split_dim", not (sizes and options["flatten"] and options["split_dim"] == -1), "-2 beside flatten=True")
    require("adjust_lr_fn", is_choice(options["adjust_lr_fn"], (None, *ADJUST_LR)), f"None or one of {ADJUST_LR}")
    for key, allowed in (("second_moment", SECOND_MOMENTS), ("rescale", RESCALES)):
        require(key, is_choice(options[key], (None, *allowed)), f"None or one of {allowed}")
    require("second_moment_eps_form", is_choice(options["second_moment_eps_form"], EPS_FORMS), f"one of {EPS_FORMS}")
    require("beta2", is_number(options["beta2"], high=1), "in [0, 1)")
    require("second_moment_eps", is_number(options["second_moment_eps"]), f">= 0 and {FINITE}")
    require("sign_momentum", is_choice(options["sign_momentum"], (True, False)), "True or False")
    is_alone = options["second_moment"] is None
    require("rescale", not (is_alone and options["rescale"]), "None where second_moment is None")
    try:
        resolve_coefficients(options["ns_coefficients"], options["ns_steps"])
        check_key(options.get(RATES_KEY))
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None


def check_splits(name: str, param: Tensor, group: dict[str, Any]) -> None:
    """Raise ValueError if the pieces do not fill the dimension of each matrix that they split."""
    shape = (param.shape[0], prod(param.shape[1:])) if group["flatten"] else tuple(param.shape)
    sizes, dim = group["split_sizes"], group["split_dim"]
    if sum(sizes) != shape[dim]:
        raise ValueError(
            f"{name} of shape {shape}: split_sizes {tuple(sizes)} sum to {sum(sizes)}, but dimension {dim} has "
            f"{shape[dim]} elements. Give the sizes of its own pieces, or split_dim={-3 - dim}, or put it into a "
            "group without split_sizes"
        )
