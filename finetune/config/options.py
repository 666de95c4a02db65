"""Options that every script has, and the way from YAML and the command line to a checked record. No torch in here."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import yaml

from finetune.config.errors import InputError
from finetune.data.texts import read_text

TRACKERS = ("tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio")
ROUTINGS = ("0.1", "0.2")  # those of muon8bit.config, which imports torch
# Options that a resumed run may change; every other one is part of what makes the run bitwise the same.
# `dataset` may move to another place: its content is compared by hash.
RESUME_MAY_CHANGE = (
    *("dataset", "max_steps", "save_every", "eval_every", "keep_checkpoints", "max_minutes", "step_timeout", "tracker"),
)
MAX_STEP_TIMEOUT = 10**6  # s; as in muon8bit.config


def option(default: Any, text: str, *choices: Any) -> Any:
    """A field of a recipe that is also a command-line option with this help and these choices."""
    return field(default=default, metadata={"help": text, "choices": choices or None})


@dataclass(frozen=True, kw_only=True)
class Training:
    """What any training run is made of; `name` is the only field here that is no option.

    A subclass may give an option the default None, "chosen when the run is set up": no value of a running recipe is
    None unless its type says so.
    """

    name: str
    optimizer: str = option("muon8bit", "which optimizer trains the model", "muon8bit", "muon", "adamw", "adamw8bit")
    codebook: str = option("linear", "8-bit codebook of muon8bit", "linear", "dynamic")
    block_size: int = option(2048, "elements per scale of muon8bit, a power of two from 64 to 4096")
    routing: str = option(
        "0.2", "release whose rules say what muon8bit and muon train; a resumed run keeps its own", *ROUTINGS
    )
    param_rounding: str | None = option(
        None,
        "how bf16 weights are rounded, embeddings and head too; stochastic, for muon8bit only, keeps updates that are "
        "too small for bf16; default: stochastic for muon8bit, else nearest",
        *("nearest", "stochastic"),
    )
    adamw_bits: int = option(32, "bits of the moments of muon8bit's AdamW part; 8 needs bitsandbytes", 8, 32)
    state_device: str = option(
        "device", "where muon8bit keeps its state: beside the parameters, or in host memory", "device", "cpu"
    )
    step_timeout: float = option(
        60.0, "seconds that a rank waits inside a step of muon8bit for one that was killed, stopped or failed"
    )
    lr: float = option(1e-3, "peak learning rate (RMS of an update is 0.2 of it for hidden matrices)")
    adamw_lr: float | None = option(None, "peak lr of the AdamW part of muon8bit and muon; default: --lr")
    weight_decay: float = option(0.1, "decoupled weight decay per unit of lr")
    clip: float = option(1.0, "largest global gradient norm; 0 turns clipping off")
    clip_matrix_norm: float = option(
        0.0, "largest Frobenius norm of the gradient of each of muon8bit's matrices; 0 is no limit"
    )
    release_gradients: bool = option(
        False,
        "step each parameter in the backward pass and free its gradient at once: muon8bit in one process, without "
        "--gradient-accumulation, and with --clip 0",
    )
    loss_chunk: int = option(0, "tokens whose logits exist at once, recomputed in the backward pass; 0 keeps all")
    schedule: str = option(
        "cosine",
        "learning-rate schedule of transformers",
        *("linear", "cosine", "cosine_with_min_lr", "constant_with_warmup", "warmup_stable_decay"),
    )
    warmup_steps: int = option(0, "optimizer steps of linear warm-up")
    decay_steps: int = option(0, "optimizer steps of decay, for warmup_stable_decay")
    batch_size: int = option(16, "sequences per micro-batch and rank")
    gradient_accumulation: int = option(1, "micro-batches per optimizer step")
    max_steps: int = option(100, "optimizer steps in all")
    eval_every: int = option(50, "optimizer steps between evaluations; the last step is always evaluated")
    save_every: int = option(100, "optimizer steps between checkpoints; the last step is always saved")
    keep_checkpoints: int = option(2, "how many checkpoints stay")
    max_minutes: float = option(
        0.0,
        "after so many minutes since the start finish the step, save, print the command that resumes, and exit with "
        "124; leave time for a step and a save; 0 is no limit",
    )
    mixed_precision: str = option("auto", "auto is bf16 on a CUDA device that has it, else no", "auto", "no", "bf16")
    activation_checkpointing: bool = option(False, "recompute activations in the backward pass")
    seed: int = option(0, "seed of the initial weights and of the data order")
    tracker: str | None = option(None, "Accelerate tracker to log to", *TRACKERS)


R = TypeVar("R", bound=Training)


def option_fields(kind: type[Training]) -> list[dataclasses.Field[Any]]:
    """Fields of a recipe class that are command-line options, in order."""
    return [f for f in dataclasses.fields(kind) if "help" in f.metadata]


def option_type(f: dataclasses.Field[Any]) -> type:
    """Type of an option's value: bool, int, float or str."""
    return {"bool": bool, "int": int, "float": float, "str": str}[str(f.type).split(" ")[0]]


def flag(name: str) -> str:
    """The option of a field: `batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


def read_values(name_or_path: str, folder: Path) -> tuple[dict[str, Any], str]:
    """Values of a recipe, and where they are from: a name in `folder`, or the path of a YAML file.

    Raises:
        InputError: no such recipe, or not a YAML mapping.
    """
    path = folder / f"{name_or_path}.yaml"
    if not path.is_file():
        path = Path(name_or_path).expanduser()
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise InputError("--recipe", f"no recipe {name_or_path!r}; give one of {known}, or a YAML file")
    try:
        values = yaml.safe_load(read_text(path, "--recipe"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a day like 2024-13-45
        raise InputError("--recipe", f"cannot read {path}: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(values, dict):
        raise InputError("--recipe", f"{path} holds no mapping of options")
    values = {str(key): value for key, value in values.items()}
    values.setdefault("name", path.stem)
    return values, str(path)


def saved_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the recipe that a run's folder holds: runs of release 0.1 recorded no routing."""
    return {"routing": "0.1", **values}


def build(kind: type[R], values: Mapping[str, Any], origin: str) -> R:
    """A recipe of a mapping; YAML's `1e-3`, which it reads as text, is taken as a number.

    Raises:
        InputError: an unknown key, or a value of the wrong type, not among its choices or not finite.
    """
    options = {f.name: f for f in option_fields(kind)}
    unknown = sorted(set(values) - {f.name for f in dataclasses.fields(kind)})
    if unknown:
        raise InputError("--recipe", f"{origin} has the unknown key {unknown[0]!r}; see --help for the keys")
    clean = dict(values)
    for key, value in values.items():
        if key in options and not (value is None and options[key].default is None):
            clean[key] = _typed(key, value, option_type(options[key]), origin)
    recipe = kind(**clean)
    for key, f in options.items():
        choices, value = f.metadata["choices"], getattr(recipe, key)
        if choices and value is not None and value not in choices:
            raise InputError(flag(key), f"{value!r} is not one of {', '.join(map(str, choices))}")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(flag(key), f"{value} is not a finite number")
    return recipe


def _typed(key: str, value: Any, kind: type, origin: str) -> Any:
    if kind is float and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if kind is str and type(value) is datetime.date:  # YAML's reading of an unquoted 2024-07-26
        return value.isoformat()
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(flag(key), f"{value!r} in {origin} is not of type {kind.__name__}")
    return value


def check_ranges(recipe: Training, *more_positive: str) -> None:
    """Check the options of `Training` against their ranges, and that `more_positive` are above 0 or None.

    Raises:
        InputError: names the option.
    """
    positive = ("lr", "adamw_lr", "batch_size", "gradient_accumulation", "max_steps", "eval_every", "save_every")
    for name in (*positive, "keep_checkpoints", "step_timeout", *more_positive):
        value = getattr(recipe, name)
        if value is not None and value <= 0:
            raise InputError(flag(name), f"{value} must be above 0")
    not_negative = ("weight_decay", "clip", "clip_matrix_norm", "loss_chunk", "warmup_steps", "decay_steps", "seed")
    for name in (*not_negative, "max_minutes"):
        value = getattr(recipe, name)
        if value is not None and value < 0:
            raise InputError(flag(name), f"{value} must not be negative")
    if recipe.step_timeout >= MAX_STEP_TIMEOUT:
        raise InputError("--step-timeout", f"{recipe.step_timeout} must be below {MAX_STEP_TIMEOUT} s")
    _check_muon8bit_only(recipe)
    _check_release(recipe)
    if recipe.tracker and find_spec(recipe.tracker) is None:
        raise InputError("--tracker", f"{recipe.tracker!r} is not installed; install it, or leave it out")
    if recipe.block_size not in (64, 128, 256, 512, 1024, 2048, 4096):
        raise InputError("--block-size", f"{recipe.block_size} is not a power of two from 64 to 4096")
    if recipe.max_steps is not None and (recipe.warmup_steps or 0) + recipe.decay_steps > recipe.max_steps:
        raise InputError(
            "--warmup-steps",
            f"{recipe.warmup_steps} steps of warm-up and {recipe.decay_steps} of decay exceed --max-steps "
            f"{recipe.max_steps}; lower --warmup-steps, or raise --max-steps",
        )
    if recipe.schedule == "warmup_stable_decay" and recipe.decay_steps == 0:
        raise InputError("--decay-steps", "warmup_stable_decay needs it above 0")


def _check_muon8bit_only(recipe: Training) -> None:
    """Refuse what the other optimizers cannot do."""
    if recipe.optimizer == "muon8bit":
        return
    asked = {
        "--param-rounding": (recipe.param_rounding == "stochastic", "give nearest"),
        "--clip-matrix-norm": (recipe.clip_matrix_norm > 0, "give 0"),
        "--release-gradients": (recipe.release_gradients, "give --no-release-gradients"),
        "--adamw-bits": (recipe.adamw_bits != 32, "give 32"),
        "--state-device": (recipe.state_device != "device", "give device"),
        "--step-timeout": (recipe.step_timeout != 60, "give 60"),
    }
    for name, (is_asked, way_out) in asked.items():
        if is_asked:
            raise InputError(name, f"{recipe.optimizer} cannot do it; {way_out}, or --optimizer muon8bit")


def _check_release(recipe: Training) -> None:
    """Refuse what needs all gradients, or several of one parameter, at once; `check_launch` refuses several ranks."""
    if recipe.release_gradients and recipe.gradient_accumulation > 1:
        raise InputError(
            "--release-gradients",
            f"a gradient is used and freed in its own backward pass, so that --gradient-accumulation "
            f"{recipe.gradient_accumulation} has nothing to add to; give --gradient-accumulation 1, or "
            "--no-release-gradients",
        )
    if recipe.release_gradients and recipe.clip:
        raise InputError(
            "--release-gradients",
            f"the global norm of --clip, here {recipe.clip:g}, needs all gradients at once; give --clip 0, and "
            "--clip-matrix-norm where a limit is wanted",
        )
