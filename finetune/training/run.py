"""The parts of any run while it trains, and the steps of setting one up that all scripts share."""

from __future__ import annotations

import os
import platform
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import accelerate
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import get_scheduler

from finetune.config.errors import InputError
from finetune.config.options import Training
from finetune.models.optimizers import build_optimizers
from finetune.parallel.launch import check_launch, is_sharded, reduce_in_fp32, replicas
from finetune.parallel.ranks import check_shared, connect
from finetune.parallel.sharding import Weights, spread
from finetune.storage.resuming import choose_checkpoint
from finetune.storage.run_dir import RunFolder
from finetune.training.balancing import Balancing
from finetune.training.train_step import Sequences
from muon8bit import Muon8bit, QuantizationHealth, release_gradients


@dataclass(kw_only=True)
class Run(ABC):
    """Everything that a run holds while it trains.

    `facts` go into run.json, result.json and the checkpoints. `position` counts sequences of the shuffled order,
    `tokens` the targets that were trained on (`unit` is their name in the log), `seconds` the time of steps only.
    `skipped`: with gradient release, the steps in which a gradient was not finite. `evaluation_seconds`: of each
    evaluation in this process. `balancing`: of a model with experts. `health`: on the main
    process, where it was asked for.
    """

    unit: ClassVar[str] = "tokens"
    accelerator: Accelerator
    recipe: Training
    folder: RunFolder
    facts: dict[str, Any]
    tokenizer: Any
    model: nn.Module
    optimizers: list[Optimizer]
    schedulers: list[LRScheduler]
    train: Sequences
    validation: Sequences
    step: int = 0
    position: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: list[int] = field(default_factory=list)
    evaluation_seconds: list[float] = field(default_factory=list)
    balancing: Balancing | None = None
    health: QuantizationHealth | None = None

    @abstractmethod
    def describe(self, val_loss: float) -> str:
        """Describe a validation loss in words, with whatever compares it."""

    def measure_more(self) -> dict[str, Any]:
        """Return what a validation measures beside the loss, for its line of metrics.jsonl."""
        return {}

    @property
    def reference(self) -> tuple[str, float] | None:
        """Name and validation loss, in nats per token, of what the picture compares with; None for nothing."""
        return None

    @property
    def release_facts(self) -> dict[str, int]:
        """What gradient release adds to records and results."""
        return {"num_skipped_steps": len(self.skipped)} if self.recipe.release_gradients else {}

    def say(self, text: str) -> None:
        """Print a line on the main process, above the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(text, file=sys.stdout)


def make_accelerator(recipe: Training, folder: RunFolder, precision: str) -> tuple[Accelerator, RunFolder]:
    """Make the accelerator; return it with the main process's run folder and the checkpoint to continue from.

    Args:
        recipe: checked options.
        folder: this rank's folder.
        precision: `auto`, `no` or `bf16`.

    Raises:
        InputError: Accelerate refuses the precision, the launch does not fit, or every checkpoint is damaged.
    """
    if precision == "auto":
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if has_bf16 else "no"
    try:
        accelerator = Accelerator(
            # Without this Accelerate takes every rank of torchrun on a CPU for a run of its own.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=precision,
            log_with=recipe.tracker,
            project_dir=str(folder.path),
            kwargs_handlers=_backends(),
        )
    except ValueError as error:
        raise InputError("--mixed-precision", f"Accelerate refuses {recipe.mixed_precision!r}: {error}") from None
    check_launch(accelerator, recipe)
    connect(accelerator)
    path, candidates = broadcast_object_list([folder.path, folder.candidates])
    folder = replace(folder, path=path, candidates=candidates)
    if accelerator.is_main_process:
        print(f"run folder: {folder.path}", flush=True)
    check_shared(accelerator, folder.path)
    if candidates:
        choose_checkpoint(accelerator, folder, recipe)
    return accelerator, folder


def _backends() -> list[Any]:
    """Return the backends for the device and the CPU.

    Over the CPU's backend the optimizer and the loop agree without waiting for the device. The list is empty for a
    single process, and where Accelerate takes gloo, or knows better.
    """
    backends = {"cuda": "nccl", "xpu": "xccl"}
    device = torch.accelerator.current_accelerator()
    if device is None or device.type not in backends or int(os.environ.get("LOCAL_RANK", -1)) < 0:
        return []
    return [InitProcessGroupKwargs(backend=f"cpu:gloo,{device.type}:{backends[device.type]}")]


def versions(accelerator: Accelerator) -> dict[str, Any]:
    """Return facts on the software that a run depends on."""
    return {
        "world_size": accelerator.num_processes,
        "parallelism": accelerator.distributed_type.value,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }


def prepare_training(
    accelerator: Accelerator,
    recipe: Training,
    model: nn.Module,
    weights: Weights | None,
    loraplus_ratio: float | None = None,
    make_optimizers: Callable[..., list[Optimizer]] = build_optimizers,
) -> tuple[nn.Module, list[Optimizer], list[LRScheduler]]:
    """Prepare a model as Accelerate and the recipe want it, with its optimizers and their schedules.

    Args:
        accelerator: of `make_accelerator`.
        recipe: resolved.
        model: of `build_once`, with its adapter.
        weights: likewise.
        loraplus_ratio: of `build_optimizers`.
        make_optimizers: builds them, with the arguments of `build_optimizers`.

    Raises:
        InputError: the model, or what is installed, does not allow what the recipe asks for.
    """
    has_bf16 = any(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())
    if has_bf16 and is_sharded(accelerator) and accelerator.mixed_precision != "no":
        raise InputError(
            "--dtype", "FSDP2 with mixed precision would make bf16 weights fp32; give --mixed-precision no, or fp32"
        )
    group = replicas(accelerator, model)
    optimizers = make_optimizers(model, recipe, loraplus_ratio=loraplus_ratio, process_group=group)
    schedulers = [make_scheduler(recipe, optimizer) for optimizer in optimizers]
    reduce_in_fp32(accelerator)
    prepared, *wrapped = accelerator.prepare(model, *optimizers)
    if weights is not None:
        spread(accelerator, prepared, weights)
    if recipe.release_gradients:
        (muon,) = optimizers
        assert isinstance(muon, Muon8bit)
        release_gradients(prepared, muon)
    return prepared, wrapped, schedulers


def make_scheduler(recipe: Training, optimizer: Optimizer) -> LRScheduler:
    """Make the recipe's schedule; Accelerate does not prepare it, else it would step once per process at every call."""
    options: dict[str, Any] = {}
    if recipe.schedule == "cosine_with_min_lr":
        options = {"min_lr_rate": 0.1}
    elif recipe.schedule == "warmup_stable_decay":
        options = {"num_decay_steps": recipe.decay_steps, "decay_type": "1-sqrt"}
    scheduler: LRScheduler = get_scheduler(
        recipe.schedule, optimizer, recipe.warmup_steps, recipe.max_steps, scheduler_specific_kwargs=options
    )
    return scheduler


def follow_schedule(schedulers: Sequence[LRScheduler]) -> bool:
    """Give every group the rate that its schedule has for the next step; return whether any rate was another one.

    A loaded optimizer brings the rates of the schedule that it was saved with, which `--max-steps` may have changed.
    """
    changed = False
    for scheduler in schedulers:
        assert isinstance(scheduler, LambdaLR)  # as all of `get_scheduler` that a recipe may ask for
        factors = [of_step(scheduler.last_epoch) for of_step in scheduler.lr_lambdas]
        for group, base, factor in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, factors, strict=True):
            changed |= group["lr"] != base * factor
            group["lr"] = base * factor
    return changed
