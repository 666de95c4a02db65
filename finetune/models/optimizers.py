"""The arms of a comparison. Muon's and AdamW's parameters are the same in every arm that has both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from finetune.config.errors import InputError
from finetune.config.options import FAMILY, Training
from finetune.config.recipe import Recipe
from finetune.models.build import make_scaling
from muon8bit import AdaMuon8bit, Muon8bit, NorMuon8bit, ParamGroups, Scaling, param_groups, state_report

# Of AdamW in every arm: the defaults of `param_groups`.
BETAS = (0.9, 0.95)
_CLASSES: dict[str, type[Muon8bit]] = {"muon8bit": Muon8bit, "normuon8bit": NorMuon8bit, "adamuon8bit": AdaMuon8bit}


def build_optimizers(
    model: nn.Module,
    recipe: Training,
    *,
    loraplus_ratio: float | None = None,
    process_group: ProcessGroup | None = None,
    patterns: Sequence[tuple[str, Any]] = (),
) -> list[Optimizer]:
    """Build the optimizers that together train every parameter of the model that requires a gradient.

    `muon8bit` is one optimizer for the whole model, and so are `normuon8bit` and `adamuon8bit`, of which all that is
    said of it is true too, but that their presets say how lr depends on a matrix's shape; `muon` is torch.optim.Muon
    (fp32 momentum) for the 2-D weights that `param_groups` routes to Muon, fused ones as one matrix, and
    torch.optim.AdamW for the rest; `adamw` and `adamw8bit` (bitsandbytes) take everything. Norms and biases are not
    decayed in any of them.
    lr and decay as in `Training`; `muon8bit` rounds bf16 weights stochastically unless it says "nearest", the others
    to nearest. With gradient release `muon8bit` skips and counts gradients that are not finite; else it raises.

    Args:
        model: on any device.
        recipe: resolved.
        loraplus_ratio: lr of LoRA factors B over that of A, in every arm; None for equal ones.
        process_group: ranks with equal parameters, among which `muon8bit` divides the orthogonalization; None for none.
        patterns: of `param_groups`, in every arm.

    Raises:
        InputError: nothing for Muon in the model, no factor B, no bf16 weight to round stochastically, nothing for
            AdamW in 8 bits, bitsandbytes is missing, or --scaling has no rule for the model or the optimizer.
    """
    ratio = loraplus_ratio
    options: Any = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    groups = make_groups(model, recipe, loraplus_ratio=loraplus_ratio, patterns=patterns)
    is_scaled = groups.routes[0].scale is not None
    if recipe.optimizer in FAMILY:
        return [_muon8bit(groups, recipe, process_group)]
    adamw_lr = recipe.lr if recipe.adamw_lr is None else recipe.adamw_lr
    takes_one_rate = is_scaled and recipe.optimizer != "muon"
    for group in groups:
        given = recipe.lr if group["algorithm"] == "muon" or takes_one_rate else adamw_lr
        group["raise"] = 1.0 if group["lr"] == given else group["lr"] / given if is_scaled else ratio
    if recipe.optimizer == "muon":
        matrices = [group for group in groups if group["algorithm"] == "muon"]
        rest = [group for group in groups if group["algorithm"] == "adamw"]
        flat = [{**_rates(g), "params": [(n, p) for n, p in g["params"] if p.ndim == 2]} for g in matrices]
        rest += [{**g, "params": [(n, p) for n, p in g["params"] if p.ndim > 2]} for g in matrices]  # stacked experts
        if is_scaled and (stacks := [n for g in matrices for n, p in g["params"] if p.ndim > 2]):
            why = f"muon trains stacked experts as {stacks[0]} by AdamW, at Muon's rate; give --optimizer muon8bit"
            raise InputError("--scaling", why)
        options["adjust_lr_fn"] = "match_rms_adamw"
        optimizers: list[Optimizer] = [torch.optim.Muon([group for group in flat if group["params"]], **options)]
        if others := _plain([group for group in rest if group["params"]], adamw_lr):
            optimizers.append(torch.optim.AdamW(others, lr=adamw_lr, betas=BETAS))
        return optimizers
    everything = _plain(groups, recipe.lr)
    if recipe.optimizer == "adamw":
        return [torch.optim.AdamW(everything, lr=recipe.lr, betas=BETAS)]
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise InputError("--optimizer", f"adamw8bit needs bitsandbytes ({error}): pip install bitsandbytes") from None
    for group in everything:  # bitsandbytes takes no (name, tensor) pairs
        group["params"] = [param for _, param in group["params"]]
    adamw8bit: Any = vars(optim)["AdamW8bit"]
    return [adamw8bit(everything, lr=recipe.lr, betas=BETAS)]


def make_groups(
    model: nn.Module,
    recipe: Training,
    *,
    loraplus_ratio: float | None = None,
    patterns: Sequence[tuple[str, Any]] = (),
) -> ParamGroups:
    """Return the groups of `muon8bit.param_groups` for a recipe, with the rates of its width.

    Args:
        model: on any device.
        recipe: resolved.
        loraplus_ratio, patterns: as in `build_optimizers`.

    Raises:
        InputError: nothing for Muon in the model, no factor B, or --scaling has no rule for the model.
    """
    options: Any = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    more: Any = {
        "routing": recipe.routing,
        "adamw_lr": recipe.adamw_lr,
        "adamw_betas": BETAS,
        "adamw_bits": recipe.adamw_bits,
        "split_heads": None if recipe.split_heads == "none" else recipe.split_heads,
        "routers": recipe.routers,
    }
    try:
        scaling = make_scaling(recipe) if isinstance(recipe, Recipe) else None
        if scaling is not None:
            more |= _scaled(recipe, scaling)
        return param_groups(model, **options, **more, loraplus_ratio=loraplus_ratio, patterns=patterns)
    except InputError:
        raise
    except ValueError as error:
        named = {"loraplus_ratio=": "--loraplus-ratio", "split_heads=": "--split-heads", "routers=": "--routers"}
        named |= dict.fromkeys(("scaling:", "base:"), "--scaling")
        option = next((option for text, option in named.items() if str(error).startswith(text)), "--optimizer")
        raise InputError(option, str(error)) from None


def _muon8bit(groups: list[dict[str, Any]], recipe: Training, process_group: ProcessGroup | None) -> Muon8bit:
    has_bf16 = any(param.dtype == torch.bfloat16 for group in groups for _, param in group["params"])
    if recipe.param_rounding == "stochastic" and not has_bf16:
        raise InputError(
            "--param-rounding",
            "the weights that are trained here are fp32, as an adapter's always are, and stochastic rounds bf16 ones; "
            "leave it out, or train bf16 weights by --dtype bf16",
        )
    if recipe.adamw_bits == 8 and all(group["algorithm"] == "muon" for group in groups):
        raise InputError("--adamw-bits", "AdamW trains nothing here, as with most adapters; give 32")
    options: Any = {
        "lr": recipe.lr,
        "weight_decay": recipe.weight_decay,
        "bits": recipe.bits,
        "block_size": recipe.block_size,
        "clip_matrix_norm": recipe.clip_matrix_norm or None,
        "param_rounding": recipe.param_rounding or ("stochastic" if has_bf16 else "nearest"),
        "state_device": None if recipe.state_device == "device" else recipe.state_device,
        "step_timeout": recipe.step_timeout,
        "on_nonfinite": "skip" if recipe.release_gradients else "raise",
    }
    options |= {} if recipe.codebook is None else {"codebook": recipe.codebook}
    if recipe.optimizer == "muon8bit":
        options["cautious_weight_decay"] = recipe.cautious_weight_decay
    else:
        options["preset"] = recipe.preset or "paper"
        for group in groups:
            group.pop("adjust_lr_fn", None)  # the preset's
    try:
        return _CLASSES[recipe.optimizer](groups, **options, process_group=process_group)
    except ImportError as error:  # of bitsandbytes, which adamw_bits=8 needs
        raise InputError("--adamw-bits", str(error)) from None


def _rates(group: dict[str, Any]) -> dict[str, Any]:
    return {key: group[key] for key in ("lr", "weight_decay")}


def _scaled(recipe: Training, scaling: Scaling) -> dict[str, Any]:
    """Return the arguments of `param_groups` that a rule of width needs of an optimizer."""
    more: dict[str, Any] = {"scaling": scaling}
    if recipe.optimizer == "normuon8bit":
        more["adjust_lr_fn"] = NorMuon8bit.presets[recipe.preset or "paper"].get("adjust_lr_fn", "match_rms_adamw")
    if recipe.optimizer in ("adamw", "adamw8bit"):
        more["adamw_lr"] = None  # they have one rate
    return more


def _plain(groups: list[dict[str, Any]], lr: float) -> list[dict[str, Any]]:
    """Return groups for torch.optim.AdamW: with weight decay before without, raised or scaled lr by themselves."""
    plain: dict[tuple[bool, float, float], dict[str, Any]] = {}
    for group in groups:
        key = (group["weight_decay"] == 0, group["raise"], group["weight_decay"])
        new = {"params": [], "lr": lr * group["raise"], "weight_decay": group["weight_decay"]}
        plain.setdefault(key, new)["params"] += group["params"]
    return [plain[key] for key in sorted(plain)]


def report_state(optimizers: list[Optimizer]) -> tuple[dict[str, Any], str]:
    """Measure the state bytes of all optimizers: (JSON-able record, table). With one optimizer, its `state_report`."""
    reports = [state_report(optimizer) for optimizer in optimizers]
    if len(reports) == 1:
        return reports[0].to_dict(), str(reports[0])
    record = {
        "total_bytes": sum(report.total_bytes for report in reports),
        "optimizers": [
            {"optimizer": type(optimizer).__name__, **report.to_dict()}
            for optimizer, report in zip(optimizers, reports, strict=True)
        ],
    }
    return record, "\n\n".join(
        f"{type(optimizer).__name__}\n{report}" for optimizer, report in zip(optimizers, reports, strict=True)
    )
