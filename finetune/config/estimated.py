"""A recipe's demands on memory, as `muon8bit estimate` takes them. No torch in here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.config.errors import InputError
from finetune.config.options import Training, flag
from finetune.config.reading import RECIPES, SFT_RECIPES, no_recipe, read_values
from finetune.config.recipe import SEQ_LEN, Recipe, recipe_from
from finetune.config.sft_recipe import SEQ_LEN as SFT_SEQ_LEN, SftRecipe, read_sft_recipe, sft_recipe_from
from finetune.data.texts import read_text

__all__ = ["InputError", "memory_options", "read_any_recipe"]

_SHARED = (
    *("optimizer", "adamw_bits", "block_size", "batch_size", "seq_len", "gradient_accumulation", "state_device"),
    *("activation_checkpointing", "loss_chunk", "release_gradients", "cautious_weight_decay", "clip"),
    *("split_heads", "routers", "bits", "preset"),
)


def read_any_recipe(name_or_path: str, typed: Mapping[str, Any]) -> tuple[str, Training]:
    """Return the script of a recipe, "pretrain" or "sft", and the recipe with the options that were typed.

    Args:
        name_or_path: a recipe of either script, or a YAML file. One whose `model` is a mapping is for `pretrain`.
        typed: options by their names with underscores.

    Raises:
        InputError: as the script itself would.
    """
    is_sft = (SFT_RECIPES / f"{name_or_path}.yaml").is_file()
    if not is_sft and not (RECIPES / f"{name_or_path}.yaml").is_file():
        if not Path(name_or_path).expanduser().is_file():
            raise no_recipe(name_or_path, None)
        is_sft = not isinstance(read_values(name_or_path, SFT_RECIPES, SftRecipe)[0].get("model"), dict)
    kind: type[Training] = SftRecipe if is_sft else Recipe
    script = "sft" if is_sft else "pretrain"
    known = {f.name for f in dataclasses.fields(kind)}
    for key in typed:
        if key not in known:
            raise InputError(flag(key), f"{name_or_path} is a recipe of {script}, which has no such option")
    if is_sft:
        return script, sft_recipe_from({**read_sft_recipe(name_or_path), **typed}, name_or_path)
    values, origin = read_values(name_or_path, RECIPES, Recipe)
    return script, recipe_from({**values, **typed}, origin)


def memory_options(recipe: Training, is_cuda: bool, has_bf16: bool) -> dict[str, Any]:
    """Return the options that decide about memory, each resolved but `seq_len`, which may be None.

    Keys: the options' names with underscores; `usual_seq_len`, tokens where `seq_len` is None and the model takes as
    much; `model`, a name, a folder or a mapping of a config.json.

    Args:
        recipe: checked.
        is_cuda: whether it runs on a CUDA device.
        has_bf16: whether that computes in bf16.
    """
    options = {key: getattr(recipe, key) for key in _SHARED}
    precision = recipe.mixed_precision
    automatic = "bf16" if is_cuda and has_bf16 else "no"
    if isinstance(recipe, SftRecipe):
        is_half = recipe.mode == "qlora" or (recipe.mode == "lora" and is_cuda)
        dtype = recipe.dtype if recipe.dtype != "auto" else "bf16" if is_half else "fp32"
        automatic = "bf16" if (recipe.mode, dtype) == ("qlora", "bf16") else automatic
        options |= {"model": recipe.model, "mode": recipe.mode, "usual_seq_len": SFT_SEQ_LEN, **_adapter(recipe)}
    else:
        assert isinstance(recipe, Recipe)
        dtype = recipe.dtype
        options |= {"model": recipe.init_from or recipe.sized_model, "mode": "full", "usual_seq_len": SEQ_LEN}
    return options | {"dtype": dtype, "mixed_precision": automatic if precision == "auto" else precision}


def _adapter(recipe: SftRecipe) -> dict[str, Any]:
    """Return rank, targets and kind of the adapter: the recipe's, or those of the adapter that is trained further."""
    if recipe.adapter is None:
        return {"lora_rank": recipe.lora_rank, "lora_targets": recipe.lora_targets, "dora": recipe.dora}
    file = Path(recipe.adapter) / "adapter_config.json"
    try:
        config = json.loads(read_text(file, "--adapter"))
        targets = config["target_modules"]
        dora = bool(config.get("use_dora", False))
        names = targets if isinstance(targets, str) else ",".join(targets)
        return {"lora_rank": int(config["r"]), "lora_targets": names, "dora": dora}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError("--adapter", f"cannot read {file}: {error}") from None
