"""The recipe of a pretraining run: a frozen record, read from YAML, overridden by options, checked before torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from finetune.config.checks import check_ranges
from finetune.config.errors import InputError
from finetune.config.options import SCALINGS, Training, option
from finetune.config.reading import RECIPES, build, read_values
from finetune.config.width import model_of_width
from finetune.data.texts import read_text

DEFAULT_RECIPE = "llama_4m"
SEQ_LEN = 256  # tokens, where neither the recipe nor the command line says


@dataclass(frozen=True, kw_only=True)
class Recipe(Training):
    """One pretraining run. Every field but `name` and `model` is also a command-line option.

    `model` is the content of a transformers `config.json`, `model_type` included; `sized_model` is that of `width`.
    """

    model: dict[str, Any]
    init_from: str | None = option(
        None,
        "folder or name of a pretrained model to continue from",
        section="model",
        unset="none, random weights",
    )
    width: int | None = option(
        None,
        "hidden size of the model: heads and intermediate sizes change in proportion, the size of a head does not",
        section="model",
        unset="as the recipe's model is written",
    )
    scaling: str = option(
        "none",
        "rule by which --lr, --adamw-lr, --weight-decay and the initial weights, as given for the width at which the "
        "recipe's model is written, are carried to --width",
        *SCALINGS,
        section="optimizer",
    )
    tokenizer: str | None = option(
        None, "folder or name of a tokenizer", section="model", unset="train a byte-level BPE on the text"
    )
    dtype: str = option(
        "fp32",
        "of the weights and their gradients; bf16 has no fp32 copy",
        *("fp32", "bf16"),
        section="memory",
    )
    router_bias_rate: float = option(
        0.0,
        "step of the bias by which experts are chosen against their load (e_score_correction_bias of DeepSeek-V3), "
        "after each optimizer step; 0 leaves it",
        section="optimizer",
    )
    dataset: str = option(
        "stdlib",
        "'stdlib' (source text of this Python's standard library), a .txt, .jsonl or .parquet file, a folder of "
        "them, a .json or .csv file, a .gz or .zst of rows, a dataset saved on disk, or a name for `datasets`",
    )
    dataset_config: str | None = option(
        None, "configuration of a `datasets` name, such as sample-10BT", unset="its own default"
    )
    text_column: str = option("text", "column that holds the text in rows")
    split: str = option("train", "split of a `datasets` name")
    streaming: bool = option(False, "read a `datasets` name as a stream, only as far as the run needs")
    validation_fraction: float = option(0.02, "share of the text held out: by file, or by row hash")
    seq_len: int = option(
        None, "tokens of a sequence", section="memory", unset=f"{SEQ_LEN}, or all that the model takes"
    )

    @property
    def sized_model(self) -> dict[str, Any]:
        """The model at the width that is asked for."""
        return self.model if self.width is None else model_of_width(self.model, self.width)


R = TypeVar("R", bound=Recipe)


def read_recipe(name_or_path: str, kind: type[R] = Recipe) -> R:  # type: ignore[assignment]
    """Read and validate a recipe of this kind: a name in `finetune/recipes/`, or the path of a YAML file.

    Raises:
        InputError: no such recipe, not YAML, an unknown key, a value of the wrong type or out of range.
    """
    return recipe_from(*read_values(name_or_path, RECIPES, kind), kind)


def recipe_from(values: dict[str, Any], origin: str, kind: type[R] = Recipe) -> R:  # type: ignore[assignment]
    """Build a recipe of this kind from a mapping and check every value.

    Raises:
        InputError: an unknown or missing key, a value of the wrong type or out of range, or a width that the model
            cannot have.
    """
    if not isinstance(values.get("model"), dict) or "model_type" not in values["model"]:
        raise InputError("--recipe", f"{origin} needs a mapping `model` with the keys of a config.json")
    recipe = build(kind, values, origin)
    check_ranges(recipe, "seq_len")
    if not 0 < recipe.validation_fraction < 1:
        raise InputError("--validation-fraction", f"{recipe.validation_fraction} is not between 0 and 1")
    if recipe.width is not None:
        if recipe.init_from is not None:
            raise InputError("--width", "--init-from brings a model of its own width; leave one of them out")
        model_of_width(recipe.model, recipe.width)
    if recipe.scaling != "none":
        _check_scaling(recipe)
    longest = recipe.model.get("max_position_embeddings")
    if recipe.init_from is None and isinstance(longest, int) and 0 < longest < (recipe.seq_len or 0):
        raise InputError("--seq-len", f"{recipe.seq_len} exceeds the model's max_position_embeddings {longest}")
    return recipe


def _check_scaling(recipe: Recipe) -> None:
    """Refuse a rule of width for what has none."""
    if recipe.init_from is not None:
        raise InputError("--scaling", "it is for fresh weights, and --init-from brings some; give --scaling none")
    if recipe.preset == "modded":
        raise InputError(
            "--scaling",
            "the preset modded of normuon8bit decays by the square of lr, for which there is no rule; give another "
            "--preset, or --scaling none",
        )


def read_model_config(path: str) -> dict[str, Any]:
    """Read a transformers `config.json`, given as the file or the folder that holds it.

    Raises:
        InputError: unreadable, not JSON, or without `model_type`.
    """
    file = Path(path).expanduser()
    file = file / "config.json" if file.is_dir() else file
    try:
        config = json.loads(read_text(file, "--model-config"))
    except (ValueError, RecursionError) as error:
        raise InputError("--model-config", f"cannot read {file}: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError("--model-config", f"{file} has no `model_type`; give a transformers config.json")
    return config
