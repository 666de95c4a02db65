"""What a run is made of: a frozen record, read from YAML, overridden by options, checked before torch is imported."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from finetune.errors import InputError

RECIPES = Path(__file__).resolve().parent / "recipes"
DEFAULT_RECIPE = "llama_4m"

TRACKERS = ("tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio")
# Options that a resumed run may change; every other one is part of what makes the run bitwise the same.
# `dataset` may move to another place: its content is compared by hash.
RESUME_MAY_CHANGE = ("dataset", "max_steps", "save_every", "eval_every", "keep_checkpoints", "tracker")


def _option(default: Any, text: str, *choices: str) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices or None})


@dataclass(frozen=True)
class Recipe:
    """One training run. Every field but `name` and `model` is also a command-line option.

    `model` is the content of a transformers `config.json`, `model_type` included.
    """

    name: str
    model: dict[str, Any]
    dataset: str = _option(
        "stdlib",
        "'stdlib' (source text of this Python's standard library), a .txt, .jsonl or .parquet file, "
        "a folder of them, a dataset saved on disk, or a name for `datasets`",
    )
    dataset_config: str | None = _option(None, "configuration of a `datasets` name, such as sample-10BT")
    text_column: str = _option("text", "column that holds the text in .jsonl, .parquet and `datasets`")
    split: str = _option("train", "split of a `datasets` name")
    streaming: bool = _option(False, "read a `datasets` name as a stream, only as far as the run needs")
    validation_fraction: float = _option(0.02, "share of the text held out: by file, or by row hash")
    tokenizer: str | None = _option(None, "folder or name of a tokenizer; default: train a byte-level BPE")
    init_from: str | None = _option(None, "folder or name of a pretrained model to continue from")
    optimizer: str = _option("muon8bit", "which optimizer trains the model", "muon8bit", "muon", "adamw", "adamw8bit")
    codebook: str = _option("linear", "8-bit codebook of muon8bit", "linear", "dynamic")
    block_size: int = _option(2048, "elements per scale of muon8bit, a power of two from 64 to 4096")
    lr: float = _option(1e-3, "peak learning rate (RMS of an update is 0.2 of it for hidden matrices)")
    adamw_lr: float | None = _option(None, "peak lr of the AdamW part of muon8bit and muon; default: --lr")
    weight_decay: float = _option(0.1, "decoupled weight decay per unit of lr")
    clip: float = _option(1.0, "largest global gradient norm; 0 turns clipping off")
    schedule: str = _option(
        "cosine",
        "learning-rate schedule of transformers",
        *("linear", "cosine", "cosine_with_min_lr", "constant_with_warmup", "warmup_stable_decay"),
    )
    warmup_steps: int = _option(0, "optimizer steps of linear warm-up")
    decay_steps: int = _option(0, "optimizer steps of decay, for warmup_stable_decay")
    batch_size: int = _option(16, "sequences per micro-batch and rank")
    gradient_accumulation: int = _option(1, "micro-batches per optimizer step")
    seq_len: int = _option(256, "tokens per sequence")
    max_steps: int = _option(100, "optimizer steps in all")
    eval_every: int = _option(50, "optimizer steps between evaluations; the last step is always evaluated")
    save_every: int = _option(100, "optimizer steps between checkpoints; the last step is always saved")
    keep_checkpoints: int = _option(2, "how many checkpoints stay")
    mixed_precision: str = _option("auto", "auto is bf16 on a CUDA device that has it, else no", "auto", "no", "bf16")
    activation_checkpointing: bool = _option(False, "recompute activations in the backward pass")
    seed: int = _option(0, "seed of the initial weights and of the data order")
    tracker: str | None = _option(None, "Accelerate tracker to log to", *TRACKERS)


def option_fields() -> list[dataclasses.Field[Any]]:
    """Fields of `Recipe` that are command-line options, in order."""
    return [f for f in dataclasses.fields(Recipe) if f.name not in ("name", "model")]


def option_type(f: dataclasses.Field[Any]) -> type:
    """Type of an option's value: bool, int, float or str."""
    return {"bool": bool, "int": int, "float": float, "str": str}[str(f.type).split(" ")[0]]


def flag(name: str) -> str:
    """The option of a field: `batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


def read_recipe(name_or_path: str) -> Recipe:
    """Read and validate a recipe: a name in `finetune/recipes/`, or the path of a YAML file.

    Raises:
        InputError: no such recipe, not YAML, an unknown key, a value of the wrong type or out of range.
    """
    path = RECIPES / f"{name_or_path}.yaml"
    if not path.is_file():
        path = Path(name_or_path).expanduser()
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise InputError("--recipe", f"no recipe {name_or_path!r}; give one of {known}, or a YAML file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError("--recipe", f"cannot read {path}: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise InputError("--recipe", f"{path} holds no mapping of options")
    values.setdefault("name", path.stem)
    return recipe_from(values, str(path))


def recipe_from(values: dict[str, Any], origin: str) -> Recipe:
    """Build a recipe from a mapping; YAML's `1e-3`, which it reads as text, is taken as a number.

    Raises:
        InputError: an unknown or missing key, or a value of the wrong type or out of range.
    """
    types = {f.name: (option_type(f), "None" in str(f.type)) for f in option_fields()}
    unknown = sorted(set(values) - set(types) - {"name", "model"})
    if unknown:
        raise InputError("--recipe", f"{origin} has the unknown key {unknown[0]!r}; see --help for the keys")
    if not isinstance(values.get("model"), dict) or "model_type" not in values["model"]:
        raise InputError("--recipe", f"{origin} needs a mapping `model` with the keys of a config.json")
    clean = dict(values)
    for key, value in values.items():
        if key in types and not (value is None and types[key][1]):
            clean[key] = _typed(key, value, types[key][0], origin)
    return validate(Recipe(**clean))


def _typed(key: str, value: Any, kind: type, origin: str) -> Any:
    if kind is float and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(flag(key), f"{value!r} in {origin} is not of type {kind.__name__}")
    return value


def validate(recipe: Recipe) -> Recipe:
    """Check every value against its range and its choices; returns the recipe.

    Raises:
        InputError: names the option.
    """
    for f in option_fields():
        choices, value = f.metadata["choices"], getattr(recipe, f.name)
        if choices and value is not None and value not in choices:
            raise InputError(flag(f.name), f"{value!r} is not one of {', '.join(choices)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(flag(f.name), f"{value} is not a finite number")
    positive = ("lr", "batch_size", "gradient_accumulation", "seq_len", "max_steps", "eval_every")
    for name in (*positive, "save_every", "keep_checkpoints", "adamw_lr"):
        value = getattr(recipe, name)
        if value is not None and value <= 0:
            raise InputError(flag(name), f"{value} must be above 0")
    for name in ("weight_decay", "clip", "warmup_steps", "decay_steps", "seed"):
        if getattr(recipe, name) < 0:
            raise InputError(flag(name), f"{getattr(recipe, name)} must not be negative")
    if recipe.tracker and find_spec(recipe.tracker) is None:
        raise InputError("--tracker", f"{recipe.tracker!r} is not installed; install it, or leave it out")
    if recipe.block_size not in (64, 128, 256, 512, 1024, 2048, 4096):
        raise InputError("--block-size", f"{recipe.block_size} is not a power of two from 64 to 4096")
    if not 0 < recipe.validation_fraction < 1:
        raise InputError("--validation-fraction", f"{recipe.validation_fraction} is not between 0 and 1")
    if recipe.warmup_steps + recipe.decay_steps > recipe.max_steps:
        raise InputError(
            "--warmup-steps",
            f"{recipe.warmup_steps} steps of warm-up and {recipe.decay_steps} of decay exceed --max-steps "
            f"{recipe.max_steps}; lower --warmup-steps, or raise --max-steps",
        )
    if recipe.schedule == "warmup_stable_decay" and recipe.decay_steps == 0:
        raise InputError("--decay-steps", "warmup_stable_decay needs it above 0")
    longest = recipe.model.get("max_position_embeddings")
    if recipe.init_from is None and isinstance(longest, int) and recipe.seq_len > longest:
        raise InputError("--seq-len", f"{recipe.seq_len} exceeds the model's max_position_embeddings {longest}")
    return recipe


def read_model_config(path: str) -> dict[str, Any]:
    """Read a transformers `config.json`, given as the file or the folder that holds it.

    Raises:
        InputError: unreadable, not JSON, or without `model_type`.
    """
    file = Path(path).expanduser()
    file = file / "config.json" if file.is_dir() else file
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError("--model-config", f"cannot read {file}: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError("--model-config", f"{file} has no `model_type`; give a transformers config.json")
    return config
