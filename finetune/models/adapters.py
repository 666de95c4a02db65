"""LoRA and DoRA adapters through peft: made, continued, checkpointed and saved."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from finetune.config.errors import InputError
from finetune.config.sft_recipe import SftRecipe
from finetune.data.texts import read_text
from finetune.models.pretrained import base_name, buffer_fingerprint, weight_dtype
from finetune.models.weights import beside_text, first_line
from finetune.parallel.launch import plain_parameters
from finetune.storage.outputs import save_model

# What is told of the base in the folder of an adapter: `mode` and `dtype` of the run, and `weights` and, if
# it has some, `buffers`, its fingerprints.
BASE_FILE = "base.json"
# Elements of each weight that a fingerprint looks at.
SAMPLED = 256
# What a checkpoint holds of a run whose base is frozen.
TRAINABLE_FILE = "trainable.safetensors"


def add_adapter(model: Any, recipe: SftRecipe, base: str) -> Any:
    """Add an adapter to train: a new one from torch's current seed, in fp32, or the recipe's.

    Args:
        model: of `finetune.models.pretrained.load_base`.
        recipe: resolved.
        base: what the model was loaded from, recorded in the adapter.

    Raises:
        InputError: targets that the model has not, or an adapter of another base.
    """
    if recipe.adapter:
        return _continue_adapter(model, Path(recipe.adapter), base)
    targets: Any = recipe.lora_targets
    if targets != "all-linear":
        targets = [name.strip() for name in targets.split(",")]
        names = [name for name, _ in model.named_modules()]
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                raise InputError("--lora-targets", f"the model has no module {target!r}; give names like q_proj,v_proj")
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,  # type: ignore[arg-type]  # a float is a scale like any other
        lora_dropout=recipe.lora_dropout,
        target_modules=targets,
        exclude_modules=_all_of(beside_text(model)),
        use_dora=recipe.dora,
        task_type="CAUSAL_LM",
    )
    try:
        with _quiet():
            return get_peft_model(model, config)
    except ValueError as error:
        raise InputError("--lora-targets", f"peft refuses {recipe.lora_targets!r}: {first_line(error)}") from None


def linears_left_out(model: Any, recipe: SftRecipe) -> list[str]:
    """Name the linear layers that `lora_targets` asks for and that have no adapter; the head is never asked for.

    In a model whose class has stacked experts, peft 0.21 takes `gate_proj`, `up_proj` and `down_proj` for the names of
    the experts' weights, and leaves dense layers of these names and shared experts without an adapter.

    Args:
        model: of `add_adapter`.
        recipe: with which that was called.
    """
    plain = model.get_base_model()
    head, aside = plain.get_output_embeddings(), tuple(f"{name}." for name in beside_text(plain))
    targets = [f".{name.strip()}" for name in recipe.lora_targets.split(",")]
    return [
        name
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and "lora_" not in name
        and not name.endswith(".base_layer")
        and not f"{name}.".startswith(aside)
        and (recipe.lora_targets == "all-linear" or f".{name}".endswith(tuple(targets)))
    ]


def _all_of(modules: Sequence[str]) -> str | None:
    """Return a pattern for peft that matches these modules and all that is in them; None for no modules."""
    return rf"({'|'.join(map(re.escape, modules))})(\..*)?" if modules else None


def base_of_adapter(path: Path, option: str) -> str:
    """Return the base that a saved adapter names.

    Args:
        path: its folder.
        option: that gave it.

    Raises:
        InputError: its configuration cannot be read, or it is neither LoRA nor DoRA.
    """
    try:
        config = json.loads(read_text(path / "adapter_config.json", option))
        base = str(config["base_model_name_or_path"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(option, f"cannot read {path / 'adapter_config.json'}: {error}") from None
    if config.get("peft_type") != "LORA":
        raise InputError(option, f"{path} is of type {config.get('peft_type')}; give a LoRA or DoRA adapter")
    return base


def _continue_adapter(model: Any, path: Path, base: str) -> Any:
    named = base_of_adapter(path, "--adapter")
    if not same_base(named, base):
        raise InputError(
            "--adapter",
            f"{path} was trained on {named}, not on {base}; give that --model, or, if the base has only moved, "
            "correct base_model_name_or_path in its adapter_config.json",
        )
    return load_adapter(model, path, base, "--adapter")


def load_adapter(model: Any, path: Path, base: str, option: str) -> Any:
    """Put a saved adapter on its base, to be trained.

    Args:
        model: the base.
        path: folder of the adapter.
        base: what the model was loaded from.
        option: that gave the adapter.

    Raises:
        InputError: the adapter is damaged, or has weights for another model.
    """
    try:
        with _quiet():
            adapted = PeftModel.from_pretrained(model, str(path), is_trainable=True)
        with safe_open(path / "adapter_model.safetensors", "pt") as saved:
            stray = set(saved.keys()) ^ set(get_peft_model_state_dict(adapted))
    except Exception as error:
        raise InputError(option, f"{path} does not fit {base}: {first_line(error)}") from None
    if stray:  # peft only warns about weights that are missing or have no place
        raise InputError(option, f"{path} does not fit {base}: {sorted(stray)[0]} is only on one side")
    return adapted


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep a warning to ourselves: peft asks transformers for an attribute that is being renamed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def same_base(one: str, other: str) -> bool:
    """Return whether two names are of one base: equal, or paths of one folder."""
    return one == other or (Path(one).exists() and Path(other).exists() and Path(one).samefile(other))


def checkpoint_trainable_only(accelerator: Accelerator) -> None:
    """Let `save_state` and `load_state` of a run with a frozen base move the trainable parameters only."""

    def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
        return {n: p for n, p in plain_parameters(model) if p.requires_grad}

    def save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            tensors = {n: p.detach().cpu().contiguous() for n, p in trainable(models[0]).items()}
            save_file(tensors, Path(folder) / TRAINABLE_FILE)

    def load(models: list[nn.Module], folder: str) -> None:
        params, saved = trainable(models.pop()), load_file(Path(folder) / TRAINABLE_FILE)
        if params.keys() != saved.keys():
            raise ValueError(f"{TRAINABLE_FILE} is of other parameters: {sorted(params.keys() ^ saved.keys())[0]}")
        with torch.no_grad():
            for name, param in params.items():
                param.copy_(saved[name])

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def base_fingerprint(model: nn.Module) -> str:
    """Return the hex SHA-256 of some elements of every weight of a base, with or without an adapter on it.

    The elements are rounded to bf16, so that a base is the same one in fp32 and in bf16. Weights in NF4 are left out:
    what they are differs by the device that rounded them.
    """
    parts = []
    for name, param in plain_parameters(model):
        if "lora_" not in name and param.is_floating_point():
            flat = param.detach().flatten()
            some = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED].to(torch.bfloat16).contiguous().cpu()
            parts.append((base_name(name), some.view(torch.uint8).numpy().tobytes()))
    digest = hashlib.sha256()
    for name, content in sorted(parts):
        digest.update(name.encode() + b"\0" + content)
    return digest.hexdigest()


def save_adapter(model: Any, path: Path, recipe: SftRecipe, tokenizer: Any) -> None:
    """Write the adapter, which names its base, what else is to be known of that, and the tokenizer."""
    dtype = "bf16" if weight_dtype(recipe) == torch.bfloat16 else "fp32"
    record = {"mode": recipe.mode, "dtype": dtype, "weights": base_fingerprint(model)}
    if buffers := buffer_fingerprint(model):
        record["buffers"] = buffers
    save_model(path, model, None, tokenizer, {BASE_FILE: json.dumps(record, indent=1)})
