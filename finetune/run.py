"""What any run holds while it trains, and the steps of setting one up that all scripts share."""

from __future__ import annotations

import platform
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import accelerate
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import get_scheduler

from finetune.errors import InputError
from finetune.loop import Sequences
from finetune.options import Training
from finetune.run_folder import RunFolder

T = TypeVar("T")
# Training a tokenizer and writing a large cache take longer than the usual limit of a collective.
DATA_TIMEOUT = timedelta(hours=12)


@dataclass(kw_only=True)
class Run(ABC):
    """Everything that a run holds while it trains.

    `facts` go into result.json and the checkpoints; `corpus` and `python` of them into every record. `position` counts
    sequences of the shuffled order, `tokens` the targets that were trained on (`unit` is their name in the log),
    `seconds` the time of steps only.
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

    @abstractmethod
    def describe(self, val_loss: float) -> str:
        """A validation loss in words, with whatever compares it."""

    def say(self, text: str) -> None:
        """Print a line on the main process, above the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(text, file=sys.stdout)


def make_accelerator(recipe: Training, folder: RunFolder, precision: str) -> tuple[Accelerator, RunFolder]:
    """The accelerator, and the run's folder: the main process's on all ranks. The main process prints it.

    Args:
        recipe: checked options.
        folder: this rank's folder.
        precision: `auto`, `no` or `bf16`.

    Raises:
        InputError: Accelerate refuses the precision.
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
            kwargs_handlers=[InitProcessGroupKwargs(timeout=DATA_TIMEOUT)],
        )
    except ValueError as error:
        raise InputError("--mixed-precision", f"Accelerate refuses {recipe.mixed_precision!r}: {error}") from None
    folder = replace(folder, path=Path(broadcast_object_list([str(folder.path)])[0]))
    if accelerator.is_main_process:
        print(f"run folder: {folder.path}", flush=True)
    return accelerator, folder


def versions(accelerator: Accelerator) -> dict[str, Any]:
    """Facts of the software that a run depends on."""
    return {
        "world_size": accelerator.num_processes,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }


def first_on_node(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Do the work on one process of every node, then on the others, which find it in the cache.

    Raises:
        InputError: it failed somewhere; all processes raise, so that none waits for another.
    """
    results: list[T] = []
    error = None
    if accelerator.is_local_main_process:
        try:
            results.append(work())
        except InputError as caught:
            error = caught
    failed = [e for e in gather_object([error]) if e is not None]
    accelerator.wait_for_everyone()  # see `finetune.job.leave`
    if failed:
        raise failed[0]
    return results[0] if results else work()


def check_same_run(folder: RunFolder, facts: Mapping[str, Any], named: Mapping[str, tuple[str, str]]) -> None:
    """A checkpoint continues only with the model, text and tokenizer that it was made with.

    Args:
        folder: of the run; without a checkpoint there is nothing to check.
        facts: of this run.
        named: key of the facts -> (option that gives it, what it is).

    Raises:
        InputError: something else.
    """
    if folder.checkpoint is None:
        return
    saved = folder.progress()["facts"]
    if saved["world_size"] != facts["world_size"]:
        raise InputError(
            "--resume",
            f"{folder.checkpoint} is of {saved['world_size']} processes, now there are {facts['world_size']}; launch "
            "as many, or a step would take another batch",
        )
    for key, (option, what) in named.items():
        if saved[key] != facts[key]:
            raise InputError(
                "--resume",
                f"{folder.checkpoint} is of another {what} ({saved[key][:12]}, Python {saved['python']}; now "
                f"{facts[key][:12]}, Python {facts['python']}); give its {option}, or start anew",
            )


def make_scheduler(recipe: Training, optimizer: Optimizer) -> LRScheduler:
    """The recipe's schedule; not prepared by Accelerate, where it would step once per process at every call."""
    options: dict[str, Any] = {}
    if recipe.schedule == "cosine_with_min_lr":
        options = {"min_lr_rate": 0.1}
    elif recipe.schedule == "warmup_stable_decay":
        options = {"num_decay_steps": recipe.decay_steps, "decay_type": "1-sqrt"}
    scheduler: LRScheduler = get_scheduler(
        recipe.schedule, optimizer, recipe.warmup_steps, recipe.max_steps, scheduler_specific_kwargs=options
    )
    return scheduler
