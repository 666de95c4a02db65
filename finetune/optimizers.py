"""The four arms of a comparison. Muon's and AdamW's parameters are the same in every arm that has both."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from finetune.errors import InputError
from finetune.options import Training
from muon8bit import Muon8bit, param_groups, state_report


def build_optimizers(model: nn.Module, recipe: Training) -> list[Optimizer]:
    """Optimizers that together train every parameter of the model that requires a gradient.

    `muon8bit` is one optimizer for the whole model; `muon` is torch.optim.Muon (fp32 momentum) for the 2-D weights
    that `param_groups` routes to Muon, fused ones as one matrix, and torch.optim.AdamW for the rest; `adamw` and
    `adamw8bit` (bitsandbytes) take everything. Norms and biases are not decayed in any of them.
    lr and decay as in `Training`.

    Raises:
        InputError: nothing for Muon in the model, or bitsandbytes is not installed.
    """
    try:
        groups = param_groups(model, lr=recipe.lr, weight_decay=recipe.weight_decay, adamw_lr=recipe.adamw_lr)
    except ValueError as error:
        raise InputError("--optimizer", str(error)) from None
    if recipe.optimizer == "muon8bit":
        codebook: Any = recipe.codebook
        return [
            Muon8bit(
                groups,
                lr=recipe.lr,
                weight_decay=recipe.weight_decay,
                codebook=codebook,
                block_size=recipe.block_size,
            )
        ]
    matrices = [group for group in groups if group["algorithm"] == "muon"]
    rest = [group for group in groups if group["algorithm"] == "adamw"]
    betas = rest[0]["betas"]
    if recipe.optimizer == "muon":
        plain = [{"params": [(n, p) for n, p in g["params"] if p.ndim == 2]} for g in matrices]
        rest += [{**g, "params": [(n, p) for n, p in g["params"] if p.ndim > 2]} for g in matrices]  # stacked experts
        options: Any = {"weight_decay": recipe.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        return [
            torch.optim.Muon([group for group in plain if group["params"]], lr=recipe.lr, **options),
            torch.optim.AdamW(_plain([g for g in rest if g["params"]], rest[0]["lr"]), lr=rest[0]["lr"], betas=betas),
        ]
    everything = _plain(groups, recipe.lr)
    if recipe.optimizer == "adamw":
        return [torch.optim.AdamW(everything, lr=recipe.lr, betas=betas)]
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise InputError("--optimizer", f"adamw8bit needs bitsandbytes: {error}; install it") from None
    for group in everything:  # bitsandbytes takes no (name, tensor) pairs
        group["params"] = [param for _, param in group["params"]]
    adamw8bit: Any = vars(optim)["AdamW8bit"]
    return [adamw8bit(everything, lr=recipe.lr, betas=betas)]


def _plain(groups: list[dict[str, Any]], lr: float) -> list[dict[str, Any]]:
    """Groups of torch.optim.AdamW: one with weight decay, one without."""
    plain = []
    for decays in (True, False):
        chosen = [g for g in groups if (g["weight_decay"] > 0) == decays]
        if chosen:
            params = [pair for g in chosen for pair in g["params"]]
            plain.append({"params": params, "lr": lr, "weight_decay": chosen[0]["weight_decay"]})
    return plain


def report_state(optimizers: list[Optimizer]) -> tuple[dict[str, Any], str]:
    """State bytes of all optimizers: (JSON-able record, table). With one optimizer, its `state_report`."""
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
