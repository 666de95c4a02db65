"""Negative controls: optimizers whose state is rounded after each step as no shipped class does it.

Every step of ours reads the momentum that was kept, and updates by the exact one before it is kept again. So a fp32
optimizer whose state is rounded in place behind each step is, to the bit, an optimizer that keeps it in these codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from finetune.evidence.options import DYNAMIC_MLP_OUT, MUON_ON, EvidenceRecipe
from finetune.models.optimizers import build_optimizers

PLACEBO = 1e-7  # relative; an fp32 value has 6e-8
ADAMW_BLOCK, ADAMW_LEAST = 256, 4096  # elements, of a block and of a tensor that is rounded, as in bitsandbytes
Rounding = Callable[[Tensor], Tensor]


def round_by_row(values: Tensor, levels: int) -> Tensor:
    """Round to codes of -levels to levels with one scale a row, the largest magnitude, and back.

    Args:
        values: fp32 [..., rows, cols].
        levels: 127 for 8 bits, 7 for 4.
    """
    return _rounded(values, values.abs().amax(-1, keepdim=True), levels)


def round_by_tensor(values: Tensor, levels: int) -> Tensor:
    """Round to codes of -levels to levels with one scale for the whole tensor, and back."""
    return _rounded(values, values.abs().amax(), levels)


def round_by_block(values: Tensor, levels: int, block_size: int = ADAMW_BLOCK) -> Tensor:
    """Round to codes of 0 to levels with one scale for `block_size` elements of the flattened tensor, and back.

    A tensor below `ADAMW_LEAST` elements stays as it is.

    Args:
        values: fp32, of any shape, not negative.
        levels: 255 for 8 bits without a sign.
        block_size: in elements; the last block may be shorter.
    """
    if values.numel() < ADAMW_LEAST:
        return values
    blocks = values.flatten().split(block_size)
    return torch.cat([_rounded(block, block.amax(), levels) for block in blocks]).view_as(values)


def _rounded(values: Tensor, scales: Tensor, levels: int) -> Tensor:
    codes = (values / torch.where(scales > 0, scales, 1.0) * levels).round()
    return codes * scales / levels


ROUNDINGS: dict[str, tuple[str, Rounding]] = {
    "muon-linear4-row": ("momentum_buffer", lambda values: round_by_row(values, 7)),
    "muon-int8-tensor": ("momentum_buffer", lambda values: round_by_tensor(values, 127)),
    "adamw-linear8": ("exp_avg_sq", lambda values: round_by_block(values, 255)),
}


def build_control(model: nn.Module, recipe: EvidenceRecipe, **more: Any) -> list[Optimizer]:
    """Build the optimizers of an evidence recipe: those of pretraining, with its further options.

    Args:
        model: on any device.
        recipe: checked by `check_options`.
        more: other arguments of `build_optimizers`.
    """
    patterns = (*MUON_ON[recipe.muon_on], *(DYNAMIC_MLP_OUT if recipe.dynamic_mlp_out else ()))
    optimizers = build_optimizers(model, recipe, patterns=patterns, **more)
    if recipe.optimizer == "muon8bit":
        for group in optimizers[0].param_groups:
            if group["algorithm"] == "muon":
                group |= {"nesterov": recipe.nesterov, "adjust_lr_fn": recipe.adjust_lr_fn}
    if recipe.control == "placebo":
        _perturb_once(optimizers[0], recipe.seed)
    elif recipe.control is not None:
        keep_rounded(optimizers[0], *ROUNDINGS[recipe.control])
    return optimizers


def keep_rounded(optimizer: Optimizer, key: str, rounded: Rounding) -> None:
    """Round the state of this key behind each step of an optimizer, in place."""

    @torch.no_grad()
    def hook(stepped: Optimizer, *_: Any) -> None:
        for state in stepped.state.values():
            if key in state:
                state[key].copy_(rounded(state[key]))

    optimizer.register_step_post_hook(hook)


def _perturb_once(optimizer: Optimizer, seed: int) -> None:
    """Multiply each momentum by 1 + `PLACEBO` z behind the step that makes it, z of a standard normal distribution.

    A resumed run finds its momenta made, and so perturbs none.
    """
    fresh: set[Tensor] = set()

    def before(stepped: Optimizer, *_: Any) -> None:
        every = (param for group in stepped.param_groups for param in group["params"])
        fresh.update(param for param in every if not stepped.state.get(param))

    @torch.no_grad()
    def after(stepped: Optimizer, *_: Any) -> None:
        generator = torch.Generator().manual_seed(seed)
        for param, state in stepped.state.items():
            if param in fresh and "momentum_buffer" in state:
                momentum: Tensor = state["momentum_buffer"]
                z = torch.randn(momentum.shape, generator=generator).to(momentum.device)
                momentum.mul_(1 + PLACEBO * z)
        fresh.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
