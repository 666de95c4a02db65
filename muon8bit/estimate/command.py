"""A setup as the command line of the scripts that runs it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..choices import PRESETS
from .advice import Offer
from .classes import model_class
from .optimizers import FAMILY, OURS
from .presets import hub_name
from .setup import Setup

# What the scripts take where nothing is said, of the options that decide about memory, but for those that depend on
# the device or on the script, which are always said.
SCRIPT_DEFAULTS: dict[str, Any] = {
    "optimizer": "muon8bit",
    "adamw_bits": 32,
    "bits": 8,
    "preset": None,
    "mode": "lora",
    "lora_rank": 16,
    "lora_targets": "all-linear",
    "dora": False,
    "block_size": 2048,
    "gradient_accumulation": 1,
    "activation_checkpointing": False,
    "loss_chunk": 0,
    "release_gradients": False,
    "state_device": "device",
    "cautious_weight_decay": False,
    "clip": 1.0,
    "split_heads": "none",
    "routers": "adamw",
}
_ADAPTER = ("lora_rank", "lora_targets", "dora")


@dataclass(frozen=True)
class Script:
    """A script of a checkout and the words that give it the model.

    Attributes:
        name: "pretrain" or "sft"; "" where the scripts cannot train the model.
        words: such as ("--model", "org/name") or ("--recipe", "NAME").
        values: options that these words say already, by their names with underscores.
        remark: what to know before it is run; "" for nothing.
    """

    name: str
    words: tuple[str, ...]
    values: Mapping[str, Any] = field(default_factory=dict)
    remark: str = ""


def script_options(optimizer: str, setup: Setup) -> dict[str, Any]:
    """Return the options of the scripts that make a setup, by their names with underscores; "mode" is `sft`'s alone.

    Args:
        optimizer: of `OPTIMIZERS` or `FAMILY`.
        setup: on any number of GPUs, which are the launcher's.
    """
    options = {
        "optimizer": "muon" if optimizer == "muon_bf16" else optimizer.removesuffix("+adamw8bit"),
        "adamw_bits": 8 if optimizer.endswith("+adamw8bit") else 32,
        "bits": setup.bits if optimizer in OURS else 8,
        "preset": setup.preset if optimizer in FAMILY else None,
        "mode": setup.mode,
        "lora_rank": setup.rank,
        "lora_targets": setup.targets,
        "dora": setup.dora,
        "dtype": setup.dtype,
        "mixed_precision": setup.mixed_precision,
        "block_size": setup.block_size,
        "batch_size": setup.batch,
        "seq_len": setup.seq,
        "gradient_accumulation": setup.accumulation,
        "activation_checkpointing": setup.checkpointing,
        "loss_chunk": setup.loss_chunk or 0,
        "release_gradients": setup.release,
        "state_device": setup.state_device,
        "cautious_weight_decay": setup.cautious,
        "split_heads": setup.split_heads if optimizer in OURS else "none",
        "routers": setup.routers if "muon" in optimizer else "adamw",
    }
    if setup.release:
        options["clip"] = 0  # the global norm needs all gradients at once
    return {key: value for key, value in options.items() if setup.mode != "full" or key not in _ADAPTER}


def command(script: Script, offer: Offer) -> str:
    """Return the command line that runs an offer, with the options that differ from what `script` says or takes."""
    stated = {**SCRIPT_DEFAULTS, **script.values}
    words: list[str] = []
    for key, value in script_options(offer.optimizer, offer.setup).items():
        is_unknown = (script.name, key) in (("pretrain", "mode"), ("", "clip"))
        if is_unknown or (key in stated and stated[key] == value):
            continue
        option = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", str(value)]
    if not script.name and offer.setup.num_gpus > 1:
        words += ["--gpus", str(offer.setup.num_gpus), "--shard", offer.setup.shard]
    return shlex.join([*_program(script, offer.setup), *script.words, *words])


def _program(script: Script, setup: Setup) -> list[str]:
    if not script.name:
        return ["muon8bit", "estimate"]
    if setup.num_gpus == 1:
        return ["python", "-m", f"finetune.{script.name}"]
    config = f"finetune/configs/{setup.shard}.yaml"
    launch = ["accelerate", "launch", "--config_file", config, "--num_processes", str(setup.num_gpus)]
    return [*launch, f"finetune/{script.name}.py"]


def setup_of(options: Mapping[str, Any], *, device: str, num_gpus: int = 1, shard: str = "none") -> Setup:
    """Return the setup that options of the scripts make: what `script_options` gives, with everything resolved.

    Raises:
        ValueError: options that do not go together.
    """
    has_adapter = options["mode"] != "full"
    more: dict[str, Any] = {"device": device, "num_gpus": num_gpus, "shard": shard}
    if has_adapter:
        more |= {"lora": options["lora_rank"], "targets": options["lora_targets"], "dora": options["dora"]}
    return Setup(
        batch=options["batch_size"],
        seq=options["seq_len"],
        dtype=options["dtype"],
        mixed_precision=options["mixed_precision"],
        checkpointing=options["activation_checkpointing"],
        qlora=options["mode"] == "qlora",
        release=options["release_gradients"],
        loss_chunk=options["loss_chunk"] or None,
        accumulation=options["gradient_accumulation"],
        state_device=options["state_device"],
        block_size=options["block_size"],
        cautious=options["cautious_weight_decay"],
        split_heads=options["split_heads"],
        routers=options["routers"],
        bits=options["bits"],
        preset=options["preset"],
        **more,
    )


def column_of(optimizer: str, adamw_bits: int, setup: Setup) -> str:
    """Return which of `OPTIMIZERS` or `FAMILY` the scripts' `--optimizer` and `--adamw-bits` are.

    Raises:
        ValueError: the setup has a preset of another optimizer, or bits that it has no choice of.
    """
    if setup.preset is not None and setup.preset not in PRESETS.get(optimizer, ()):
        known = "; ".join(f"{name} has {', '.join(presets)}" for name, presets in PRESETS.items())
        raise ValueError(f"--preset {setup.preset}: {optimizer} has none of that name; {known}")
    if setup.bits != 8 and optimizer not in OURS:
        raise ValueError(f"--bits {setup.bits}: {optimizer} has no choice of it; give 8, or --optimizer muon8bit")
    if optimizer == "muon" and setup.rank is None and setup.dtype == "bf16":
        return "muon_bf16"  # torch.optim.Muon keeps its momentum in the dtype of the weights
    return f"{optimizer}+adamw8bit" if optimizer in OURS and adamw_bits == 8 else optimizer


def script_for(model: str, config: Any, setup: Setup) -> Script:
    """Return the script that trains a model so, and the words that give it the model.

    Args:
        model: as for `configs.load_config`.
        config: what that gave.
        setup: all weights of a configuration without weights are pretrained; else the model is fine-tuned.
    """
    if model_class(config).own:  # no causal language model, which the scripts train
        return Script("", (model,))
    if setup.mode != "full" and setup.num_shards > 1:
        why = "a sharded adapter is for a loop of your own: the scripts train adapters with --shard ddp"
        return Script("", (model,), remark=why)
    path = Path(model).expanduser()
    folder = path.parent if path.name == "config.json" else path
    has_weights = not folder.is_dir() or any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    if setup.mode == "full" and not has_weights:
        why = "this starts from random ones; for fine-tuning give --model a folder with weights"
        return Script("pretrain", ("--model-config", model), remark=f"no weights in {folder}: {why}")
    is_folder = path.exists() and path.suffix.lower() != ".gguf"
    remark = "" if has_weights else f"no weights in {folder}: put them there, or give --model a folder with weights"
    return Script("sft", ("--model", str(folder) if is_folder else hub_name(model) or model), remark=remark)
