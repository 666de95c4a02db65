"""A recipe's rates at the width of its model as written, and at the width that is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from finetune.config.errors import InputError
from finetune.config.recipe import Recipe, read_recipe, recipe_from
from finetune.models.build import model_config
from finetune.models.optimizers import make_groups
from muon8bit import ParamGroups

__all__ = ["InputError", "transferred"]


def transferred(name_or_path: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return shapes, initialization and rates of a recipe's parameters, at its width and at `asked["width"]`.

    Args:
        name_or_path: of the recipe.
        asked: options by their names with underscores, `width` and `scaling` among them.

    Returns:
        `optimizer`, `base_width`, `width`, and `parameters`: rows of parameters that differ only in the numbers of
        their names, with `init_factor` of the standard deviation. lr in the recipe's unit, decay per unit of lr.

    Raises:
        InputError: as the script itself would.
    """
    recipe: Recipe = recipe_from({**asdict(read_recipe(name_or_path)), **asked}, "the options")
    base = replace(recipe, width=None)
    made = [_groups(each) for each in (base, recipe)]
    (of_base, rates_of_base), (groups, rates) = made
    shapes = {route.name: route.shape for route in of_base.routes}
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for route in groups.routes:
        assert route.scale is not None
        row = {
            "role": route.role,
            "algorithm": "adamw" if recipe.optimizer.startswith("adamw") else route.algorithm,
            "base_shape": shapes[route.name],
            "shape": route.shape,
            "init_factor": route.scale.init,
            "base_lr": rates_of_base[route.name][0],
            "lr": rates[route.name][0],
            "base_weight_decay": rates_of_base[route.name][1],
            "weight_decay": rates[route.name][1],
        }
        kind = ".".join("*" if part.isdigit() else part for part in route.name.split("."))
        rows.setdefault((kind, *row.values()), {"parameter": kind, **row})
    widths = [model_config(each).hidden_size for each in (base, recipe)]
    return {
        "optimizer": recipe.optimizer,
        "rule": recipe.scaling,
        "base_width": widths[0],
        "width": widths[1],
        "parameters": list(rows.values()),
    }


def _groups(recipe: Any) -> tuple[ParamGroups, dict[str, tuple[float, float]]]:
    """Return the groups of a recipe's model on the meta device, and name -> lr and weight decay."""
    causal: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model: nn.Module = causal.from_config(model_config(recipe))
    groups = make_groups(model, recipe)
    return groups, {n: (float(g["lr"]), float(g["weight_decay"])) for g in groups for n, _ in g["params"]}
