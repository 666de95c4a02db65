"""Options that every script has, as fields of a record that --help and the page of options are made from. No torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

TRACKERS = ("tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio")
ROUTINGS = ("0.1", "0.2")  # those of muon8bit.config, which imports torch, as are the next two
SPLIT_HEADS = ("none", "head", "head_kv")  # none: None
ROUTERS = ("adamw", "muon")
SCALINGS = ("none", "spectral", "essential")  # none: None
# Presets of the optimizers that have some: those of muon8bit.family.
PRESETS = {"normuon8bit": ("paper", "official", "dion", "modded"), "adamuon8bit": ("paper", "official")}
FAMILY = ("muon8bit", *PRESETS)  # Muon8bit and what is built on it
# Options that a resumed run may change; every other one is part of what makes the run bitwise the same.
# `dataset` may move to another place: its content is compared by hash.
RESUME_MAY_CHANGE = (
    *("dataset", "max_steps", "save_every", "eval_every", "keep_checkpoints", "max_minutes", "step_timeout", "tracker"),
    *("health_every", "spectra_every"),
    "merge",
)


# Sections of --help and of the page of options, in this order.
SECTIONS = ("model", "data", "optimizer", "memory", "length", "results")


def option(
    default: Any,
    text: str,
    *choices: Any,
    section: str = "data",
    unset: str | None = None,
    aliases: tuple[str, ...] = (),
) -> Any:
    """Make a field of a recipe that is also a command-line option.

    Args:
        default: its value where neither the recipe nor the command line gives one.
        text: what it does, with the unit of a number; `option_help` appends the default.
        choices: the values that it may have; none: any of its type.
        section: one of `SECTIONS`.
        unset: where the default is None, what is taken then.
        aliases: names that it had before, as keys; recipes and command lines may use them.
    """
    assert section in SECTIONS, section
    more = {"section": section, "unset": unset, "aliases": aliases}
    return field(default=default, metadata={"help": text, "choices": choices or None, **more})


@dataclass(frozen=True, kw_only=True)
class Training:
    """Options of any training run; `name` is the only field here that is no option.

    A subclass may give an option the default None, "chosen when the run is set up": no value of a running recipe is
    None unless its type says so.
    """

    name: str
    optimizer: str = option(
        "muon8bit",
        "which optimizer trains the model",
        *(*FAMILY, "muon", "adamw", "adamw8bit"),
        section="optimizer",
    )
    preset: str | None = option(
        None,
        "version of normuon8bit or adamuon8bit; official (of normuon8bit), dion and modded have lr on scales of their "
        "own",
        *dict.fromkeys(name for names in PRESETS.values() for name in names),
        section="optimizer",
        unset="paper for these two",
    )
    lr: float = option(
        1e-3,
        "peak learning rate (RMS of an update is 0.2 of it for hidden matrices)",
        section="optimizer",
    )
    adamw_lr: float | None = option(
        None, "peak lr of the AdamW part of muon8bit and muon", section="optimizer", unset="--lr"
    )
    weight_decay: float = option(0.1, "decoupled weight decay per unit of lr", section="optimizer")
    schedule: str = option(
        "cosine",
        "learning-rate schedule of transformers",
        *("linear", "cosine", "cosine_with_min_lr", "constant_with_warmup", "warmup_stable_decay"),
        section="optimizer",
    )
    warmup_steps: int = option(0, "optimizer steps of linear warm-up", section="optimizer")
    decay_steps: int = option(0, "optimizer steps of decay, for warmup_stable_decay", section="optimizer")
    clip: float = option(1.0, "largest global gradient norm; 0 turns clipping off", section="optimizer")
    clip_matrix_norm: float = option(
        0.0,
        "largest Frobenius norm of the gradient of each of muon8bit's matrices; 0 is no limit",
        section="optimizer",
    )
    cautious_weight_decay: bool = option(
        False,
        "decay only where the update moves a weight towards 0, or not at all: muon8bit's matrices and its AdamW part",
        section="optimizer",
    )
    bits: int = option(
        8,
        "bits of the momentum of muon8bit, normuon8bit and adamuon8bit, and of the last one's second moment",
        *(8, 32),
        section="optimizer",
    )
    codebook: str | None = option(
        None,
        "codebook of the momentum in 8 bits",
        *("linear", "dynamic"),
        section="optimizer",
        unset="dynamic for adamuon8bit, else linear",
    )
    block_size: int = option(
        2048,
        "elements per scale of muon8bit, a power of two from 64 to 4096",
        section="optimizer",
    )
    param_rounding: str | None = option(
        None,
        "how bf16 weights are rounded, embeddings and head too; stochastic, for muon8bit only, keeps updates that are "
        "too small for bf16",
        *("nearest", "stochastic"),
        section="optimizer",
        unset="stochastic for muon8bit, else nearest",
    )
    routing: str = option(
        "0.2",
        "release whose rules say what muon8bit and muon train; a resumed run keeps its own",
        *ROUTINGS,
        section="optimizer",
    )
    split_heads: str = option(
        "none",
        "latent attention (MLA), of muon8bit alone: head cuts q_b_proj and kv_b_proj by head, head_kv also keys from "
        "values",
        *SPLIT_HEADS,
        section="optimizer",
    )
    routers: str = option(
        "adamw", "what trains the matrices of MoE routers, of muon8bit and muon", *ROUTERS, section="optimizer"
    )
    router_aux_loss: float = option(
        0.0,
        "weight of the balance loss of mixtures of experts, of each sequence as in DeepSeek-V3; 0 is none",
        section="optimizer",
    )
    router_z_loss: float = option(
        0.0,
        "weight of the z-loss of mixtures of experts, which keeps the logits of routers small; 0 is none",
        section="optimizer",
    )
    step_timeout: float = option(
        60.0,
        "seconds that a rank waits inside a step of muon8bit for one that was killed, stopped or failed",
        section="optimizer",
    )
    batch_size: int = option(16, "sequences per micro-batch and rank", section="memory")
    gradient_accumulation: int = option(1, "micro-batches per optimizer step", section="memory")
    mixed_precision: str = option(
        "auto",
        "what is computed in; auto is bf16 on a CUDA device that has it, else no",
        *("auto", "no", "bf16"),
        section="memory",
    )
    activation_checkpointing: bool = option(False, "recompute activations in the backward pass", section="memory")
    loss_chunk: int = option(
        0,
        "tokens whose logits exist at once, recomputed in the backward pass; 0 keeps all",
        section="memory",
    )
    release_gradients: bool = option(
        False,
        "step each parameter in the backward pass and free its gradient at once: muon8bit in one process, without "
        "--gradient-accumulation, and with --clip 0",
        section="memory",
    )
    adamw_bits: int = option(
        32, "bits of the moments of muon8bit's AdamW part; 8 needs bitsandbytes", 8, 32, section="memory"
    )
    state_device: str = option(
        "device",
        "where muon8bit keeps its state: beside the parameters, or in host memory",
        *("device", "cpu"),
        section="memory",
    )
    max_steps: int = option(100, "optimizer steps in all", section="length")
    max_minutes: float = option(
        0.0,
        "after so many minutes since the start finish the step, save, print the command that resumes, and exit with "
        "124; leave time for a step and a save; 0 is no limit",
        section="length",
    )
    seed: int = option(0, "seed of the initial weights and of the data order", section="length")
    eval_every: int = option(
        50, "optimizer steps between evaluations; the last step is always evaluated", section="results"
    )
    save_every: int = option(
        100, "optimizer steps between checkpoints; the last step is always saved", section="results"
    )
    health_every: int = option(
        0,
        "optimizer steps between measurements of what 8 bits do to the updates of four matrices of muon8bit; 0 leaves "
        "them out",
        section="results",
    )
    spectra_every: int = option(
        0,
        "optimizer steps between measurements of how even the singular values of the trained matrices and of their "
        "updates are, by group of layers; 0 leaves them out",
        section="results",
    )
    keep_checkpoints: int = option(2, "how many checkpoints stay", section="results")
    tracker: str | None = option(None, "Accelerate tracker to log to", *TRACKERS, section="results", unset="none")


def option_fields(kind: type[Training]) -> list[dataclasses.Field[Any]]:
    """Return the fields of a recipe class that are command-line options, in order."""
    return [f for f in dataclasses.fields(kind) if "help" in f.metadata]


def option_type(f: dataclasses.Field[Any]) -> type:
    """Return the type of an option's value: bool, int, float or str."""
    return {"bool": bool, "int": int, "float": float, "str": str}[str(f.type).split(" ")[0]]


def flag(name: str) -> str:
    """Return the command-line option of a field: `batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


def shown_default(f: dataclasses.Field[Any]) -> str:
    """Return an option's default in words."""
    if f.default is None:
        return str(f.metadata["unset"])
    if option_type(f) is bool:
        return "on" if f.default else "off"
    return f"{f.default:g}" if isinstance(f.default, float) else str(f.default)


def option_help(f: dataclasses.Field[Any]) -> str:
    """Return the line of --help: what an option does, in which unit, its default, and its former names."""
    former = "".join(f"; also {flag(name)}" for name in f.metadata["aliases"])
    return f"{f.metadata['help']} (default: {shown_default(f)}{former})"
