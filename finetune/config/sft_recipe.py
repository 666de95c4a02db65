"""The recipe of a fine-tuning run, checked before torch is imported, and its defaults with their reasons."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.config.checks import check_ranges, counted, has_own_scale
from finetune.config.errors import InputError
from finetune.config.options import Training, flag, option
from finetune.config.reading import SFT_RECIPES, build, read_values
from finetune.data.columns import parse_columns

NEWCOMER_RECIPE = "smollm2_135m"
# Options that only an adapter has, beside `adapter`, which brings its own values of the first five.
ADAPTER_SHAPE = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "dora")
ADAPTER_OPTIONS = (*ADAPTER_SHAPE, "loraplus_ratio", "adapter", "merge")

NO_ADAPTER = "--mode full trains no adapter; leave it out, or give --mode lora"

# Peak lr by (mode, optimizer) and why. An update of Muon under match_rms_adamw has the RMS of one of AdamW.
MUON_LR = {"full": 2e-5, "lora": 2e-4, "qlora": 2e-4}
ADAMW_LR = {"full": 1e-5, "lora": 2e-4, "qlora": 2e-4}
LR_REASONS = {
    ("full", "muon"): "arXiv 2605.10468 found 2e-5 to 5e-5 best for Muon and 8e-6 to 1e-5 for AdamW",
    ("full", "adamw"): "arXiv 2605.10468 found 8e-6 to 1e-5 best for AdamW and 2e-5 to 5e-5 for Muon",
    ("lora", "muon"): "on LoRA Muon takes about AdamW's lr, 1e-4 to 5e-4 in arXiv 2605.10468; a run of a few dozen "
    "steps wants about ten times as much",
    ("lora", "adamw"): "1e-4 to 5e-4 in arXiv 2605.10468; a run of a few dozen steps wants about ten times as much",
}
WARMUP_SHARE = 0.03
SEQ_LEN = 2048  # tokens, where neither the recipe nor the command line says


@dataclass(frozen=True, kw_only=True)
class SftRecipe(Training):
    """One fine-tuning run. Every field but `name` is also a command-line option."""

    model: str = option(
        None,
        "the base: a folder, a GGUF file, a hub name, or package:NAME for a package's GGUF file",
        section="model",
        unset="none, give one or a --recipe",
    )
    mode: str = option(
        "lora",
        "train all weights, an adapter, or an adapter on an NF4 base",
        *("full", "lora", "qlora"),
        section="model",
    )
    lora_rank: int = option(16, "rank of the adapter", section="model")
    lora_alpha: float = option(None, "scale of the adapter times its rank", section="model", unset="twice the rank")
    lora_dropout: float = option(0.0, "dropout before the adapter", section="model")
    lora_targets: str = option(
        "all-linear", "names of modules to adapt, with commas; all-linear leaves out the head", section="model"
    )
    dora: bool = option(
        False, "DoRA: the adapter learns directions, a vector per matrix learns magnitudes", section="model"
    )
    loraplus_ratio: float = option(1.0, "LoRA+: lr of the B matrices over that of the A matrices", section="optimizer")
    adapter: str | None = option(
        None, "folder of an adapter of this base to train further", section="model", unset="none, a new adapter"
    )
    merge: bool = option(False, "also save the base with the adapter folded in", section="results")
    dtype: str = option(
        "auto",
        "of the base's weights; auto is bf16 for qlora and for lora on a CUDA device, else fp32",
        *("auto", "fp32", "bf16"),
        section="memory",
    )
    resize_embeddings: bool = option(
        False,
        "where the tokenizer has more tokens than the model, give it embeddings for them, the mean of the others; kept "
        "in the cache as a folder, which an adapter names as its base",
        section="model",
    )
    dataset: str = option(
        "stdlib",
        "'stdlib' (functions of this Python's standard library), a .jsonl, .json, .csv or .parquet file of "
        "conversations or instructions, text also as .gz or .zst, a folder of them, or a name for `datasets`",
    )
    dataset_config: str | None = option(None, "configuration of a `datasets` name", unset="its own default")
    split: str = option("train", "split of a `datasets` name")
    columns: str | None = option(
        None,
        "what the dataset calls columns, keys of messages and roles, as in prompt=title,role=from,assistant=bot",
        unset="the names of the known formats",
    )
    limit: int | None = option(None, "take so many rows, drawn by --seed", unset="all rows")
    validation_fraction: float = option(0.05, "share of the examples held out, by the hash of the prompt")
    seq_len: int = option(
        None,
        "tokens kept of an example",
        section="memory",
        unset=f"{SEQ_LEN}, or all that the model takes",
        aliases=("max_length",),
    )
    packing: bool = option(False, "put several examples into a row of --seq-len, kept apart")
    drop_truncated: bool = option(False, "leave out examples whose answer --seq-len cuts off, instead of stopping")
    skip_bad_rows: bool = option(
        False, "leave out rows that cannot be used, and say how many for which reason, instead of stopping"
    )
    turns: str = option("all", "which assistant turns carry loss", "all", "last")
    chat_template: str | None = option(
        None,
        "a Jinja file that replaces the tokenizer's chat template, or a name: of one of several that it has, chatml, "
        "or tulu, which needs no token but the end of text",
        unset="the tokenizer's",
    )
    date: str = option("2024-07-26", "the day that a chat template sees as today")
    epochs: float = option(1.0, "passes over the training examples, without --max-steps", section="length")
    num_answers: int = option(3, "answers to held-out prompts generated before and after", section="results")
    answer_tokens: int = option(64, "tokens of such an answer at most", section="results")
    lr: float = option(
        None, "peak learning rate", section="optimizer", unset="by --mode and --optimizer, the log says why"
    )
    warmup_steps: int = option(
        None,
        "optimizer steps of linear warm-up",
        section="optimizer",
        unset="3 percent of --max-steps; none of fewer than 34",
    )
    max_steps: int = option(None, "optimizer steps in all", section="length", unset="by --epochs")
    weight_decay: float = option(0.0, "decoupled weight decay per unit of lr", section="optimizer")
    batch_size: int = option(8, "rows per micro-batch and rank", section="memory")
    mixed_precision: str = option(
        "auto",
        "what is computed in; auto is bf16 on a CUDA device that has it and for an NF4 base, else no",
        *("auto", "no", "bf16"),
        section="memory",
    )

    @property
    def has_adapter(self) -> bool:
        """Whether the base is frozen and an adapter is trained."""
        return self.mode != "full"


def read_sft_recipe(name_or_path: str) -> dict[str, Any]:
    """Read the values of a recipe, unchecked: a name in `finetune/recipes/sft/`, or the path of a YAML file.

    A chat template's path is taken relative to the recipe, if there is such a file; else it is a template's name.

    Raises:
        InputError: no such recipe, or not a YAML mapping.
    """
    values, origin = read_values(name_or_path, SFT_RECIPES, SftRecipe)
    template = values.get("chat_template")
    beside = Path(origin).resolve().parent
    if isinstance(template, str) and (Path(template).suffix or (beside / template).is_file()):
        values["chat_template"] = str(beside / template)
    return values


def sft_recipe_from(values: Mapping[str, Any], origin: str) -> SftRecipe:
    """Build a recipe from a mapping and check every value.

    Raises:
        InputError: an unknown or missing key, or a value of the wrong type or out of range.
    """
    if not values.get("model"):
        raise InputError("--model", f"{origin} name no model; give one, or --recipe {NEWCOMER_RECIPE}")
    named = {"name": f"{Path(str(values['model'])).name}-{values.get('mode', 'lora')}", **values}
    recipe = build(SftRecipe, named, origin)
    check_ranges(recipe, "lora_rank", "lora_alpha", "loraplus_ratio", "limit", "seq_len", "epochs", "answer_tokens")
    if values.get("lr") is None and has_own_scale(recipe):
        raise InputError("--lr", f"the preset {recipe.preset} of normuon8bit has lr on a scale of its own; give it")
    parse_columns(recipe.columns)
    if recipe.dataset == "stdlib" and recipe.limit is not None:
        raise InputError("--limit", "the standard library is taken whole; leave it out")
    if recipe.dataset == "stdlib" and recipe.columns is not None:
        raise InputError("--columns", "the standard library has no columns; leave it out")
    if recipe.num_answers < 0:
        raise InputError("--num-answers", f"{recipe.num_answers} must not be negative")
    for name in ("validation_fraction", "lora_dropout"):
        value = getattr(recipe, name)
        if not (0 < value < 1 or (value == 0 and name == "lora_dropout")):
            raise InputError(flag(name), f"{value} is not between 0 and 1")
    if recipe.mode == "full" and (recipe.merge or recipe.adapter):
        raise InputError("--merge" if recipe.merge else "--adapter", NO_ADAPTER)
    if recipe.mode == "qlora" and recipe.dtype != "fp32" and recipe.mixed_precision == "no":
        raise InputError("--mixed-precision", "an NF4 base with bf16 embeddings computes in bf16; or give --dtype fp32")
    try:
        datetime.date.fromisoformat(recipe.date)
    except ValueError:
        raise InputError("--date", f"{recipe.date!r} is no day as YYYY-MM-DD") from None
    return recipe


def resolve(recipe: SftRecipe, num_rows: int, num_processes: int) -> tuple[SftRecipe, list[str]]:
    """Replace what was left to be chosen; returns the recipe and lines for the log that say what was chosen and why.

    Args:
        recipe: checked; its lr, warmup_steps, max_steps and lora_alpha may be None.
        num_rows: rows to train on, packed or not.
        num_processes: ranks.
    """
    unset = {name for name in ("lora_alpha", "lr", "max_steps", "warmup_steps") if getattr(recipe, name) is None}
    notes = []
    family = "muon" if "muon" in recipe.optimizer else "adamw"
    chosen: dict[str, Any] = {}
    if "lora_alpha" in unset:
        chosen["lora_alpha"] = 2.0 * recipe.lora_rank
    if "lr" in unset:
        chosen["lr"] = (MUON_LR if family == "muon" else ADAMW_LR)[recipe.mode]
        reason = LR_REASONS["full" if recipe.mode == "full" else "lora", family]
        notes.append(f"lr {chosen['lr']:g}, the default of {recipe.mode} with {recipe.optimizer}: {reason}")
    max_steps = recipe.max_steps
    if "max_steps" in unset:
        rows = recipe.batch_size * recipe.gradient_accumulation * num_processes
        max_steps = chosen["max_steps"] = math.ceil(recipe.epochs * num_rows / rows)
        notes.append(
            f"{counted(max_steps, 'step')} of {counted(rows, 'row')}: {recipe.epochs:g} passes over "
            f"{counted(num_rows, 'row')}"
        )
    if "warmup_steps" in unset:
        left, share = max_steps - recipe.decay_steps, WARMUP_SHARE * max_steps
        # A warm-up's first step has lr 0: one of a few dozen steps is not given away.
        chosen["warmup_steps"] = 0 if share < 1 else max(0, min(math.ceil(share), left - 1))
        less = ", which is less than one" if share < 1 else ""
        notes.append(f"warm-up {counted(chosen['warmup_steps'], 'step')}, {WARMUP_SHARE:.0%} of {max_steps}{less}")
    if recipe.has_adapter and family == "muon" and recipe.lora_rank > 16 and recipe.adapter is None:
        notes.append("note: in arXiv 2605.10468 Muon is ahead of AdamW on LoRA up to rank 16 only")
    return replace(recipe, **chosen), notes
