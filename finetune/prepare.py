"""From a checked recipe to everything that a run holds, before its first step."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import accelerate
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object, set_seed
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import get_scheduler

from finetune.bigram import bigram_loss
from finetune.corpus import open_corpus
from finetune.errors import InputError
from finetune.models import build_model, check_vocabulary, config_hash, model_config
from finetune.optimizers import build_optimizers
from finetune.recipe import Recipe
from finetune.run_folder import RunFolder
from finetune.tokens import TokenCache, check_size, load_tokenizer, token_cache, train_tokenizer

T = TypeVar("T")
# Training a tokenizer and writing a large cache take longer than the usual limit of a collective.
DATA_TIMEOUT = timedelta(hours=12)


@dataclass
class Run:
    """Everything that a run holds while it trains; `position` counts sequences of the shuffled order."""

    accelerator: Accelerator
    recipe: Recipe
    folder: RunFolder
    facts: dict[str, Any]
    tokenizer: Any
    cache: TokenCache
    model: nn.Module
    optimizers: list[Optimizer]
    schedulers: list[LRScheduler]
    step: int = 0
    position: int = 0
    tokens: int = 0
    seconds: float = 0.0
    bigram: float = float("nan")

    def say(self, text: str) -> None:
        """Print a line on the main process, above the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(text, file=sys.stdout)


def _precision(asked: str) -> str:
    if asked != "auto":
        return asked
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


def _accelerator(recipe: Recipe, folder: RunFolder) -> Accelerator:
    try:
        return Accelerator(
            # Without this Accelerate takes every rank of torchrun on a CPU for a run of its own.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=_precision(recipe.mixed_precision),
            log_with=recipe.tracker,
            project_dir=str(folder.path),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=DATA_TIMEOUT)],
        )
    except ValueError as error:
        raise InputError("--mixed-precision", f"Accelerate refuses {recipe.mixed_precision!r}: {error}") from None


def set_up(recipe: Recipe, folder: RunFolder) -> Run:
    """Data, model, optimizers and folder of a run; the main process prints what they are.

    Args:
        recipe: checked options.
        folder: where to write; the main process's is taken on all ranks.

    Raises:
        InputError: bad input, on all ranks alike; nothing was written but the cache.
    """
    accelerator = _accelerator(recipe, folder)
    folder = replace(folder, path=Path(broadcast_object_list([str(folder.path)])[0]))
    if accelerator.is_main_process:
        print(f"run folder: {folder.path}", flush=True)
    set_seed(recipe.seed)
    config = model_config(recipe)
    tokenizer, cache, facts = _first_on_node(accelerator, lambda: _prepare_data(recipe, config, accelerator))
    _check_same_run(folder, facts)
    model = build_model(recipe, config, tokenizer)
    optimizers = build_optimizers(model, recipe)
    schedulers = [_scheduler(recipe, optimizer) for optimizer in optimizers]
    prepared = accelerator.prepare(model, *optimizers)
    run = Run(accelerator, recipe, folder, facts, tokenizer, cache, prepared[0], list(prepared[1:]), schedulers)
    if accelerator.is_main_process:
        folder.create(recipe)
        run.bigram, weight = bigram_loss(cache.train, cache.validation, len(tokenizer))
        facts |= {"bigram_val_loss": run.bigram, "bigram_weight": weight}
        _introduce(run, sum(p.numel() for p in model.parameters()))
    if recipe.tracker:
        accelerator.init_trackers(recipe.name)
    return run


def _introduce(run: Run, num_parameters: int) -> None:
    accelerator, cache = run.accelerator, run.cache
    run.say(
        f"world size {accelerator.num_processes} on {accelerator.device}, {torch.get_num_threads()} threads, "
        f"mixed precision {accelerator.mixed_precision}\n"
        f"corpus {run.facts['corpus'][:12]}: {len(cache.train):,} training tokens, "
        f"{len(cache.validation):,} for validation, {cache.bytes_per_token:.2f} bytes per token\n"
        f"model {num_parameters:,} parameters, optimizer {run.recipe.optimizer}, "
        f"interpolated bigram {run.bigram:.4f} nats per token"
    )


def _first_on_node(accelerator: Accelerator, work: Callable[[], T]) -> T:
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


def _prepare_data(recipe: Recipe, config: Any, accelerator: Accelerator) -> tuple[Any, TokenCache, dict[str, Any]]:
    """Tokenizer, token cache, and the facts that every record of the run carries."""
    corpus = open_corpus(recipe)
    if accelerator.is_main_process:
        print(f"text: {corpus.label}, corpus {corpus.hash[:12]}; tokenizing what is not in the cache", flush=True)
    name = recipe.tokenizer or recipe.init_from or str(train_tokenizer(corpus, config.vocab_size))
    tokenizer = load_tokenizer(name)
    check_vocabulary(config, tokenizer)
    sequences = recipe.max_steps * recipe.batch_size * recipe.gradient_accumulation * accelerator.num_processes
    cache = token_cache(corpus, tokenizer, sequences * recipe.seq_len if corpus.endless else None)
    check_size(cache, recipe.seq_len)
    facts = {
        "corpus": corpus.hash,
        "tokenizer": cache.meta["tokenizer"],
        "model_config": config_hash(config),
        "world_size": accelerator.num_processes,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }
    return tokenizer, cache, facts


def _check_same_run(folder: RunFolder, facts: dict[str, Any]) -> None:
    """A checkpoint continues only with the model, text and tokenizer that it was made with."""
    if folder.checkpoint is None:
        return
    saved = folder.progress()["facts"]
    if saved["world_size"] != facts["world_size"]:
        raise InputError(
            "--resume",
            f"{folder.checkpoint} is of {saved['world_size']} processes, now there are {facts['world_size']}; launch "
            "as many, or a step would take another batch",
        )
    for key, option, what in (
        ("model_config", "--model-config", "model"),
        ("corpus", "--dataset", "corpus"),
        ("tokenizer", "--tokenizer", "tokenizer"),
    ):
        if saved[key] != facts[key]:
            raise InputError(
                "--resume",
                f"{folder.checkpoint} is of another {what} ({saved[key][:12]}, Python {saved['python']}; now "
                f"{facts[key][:12]}, Python {facts['python']}); give its {option}, or start anew",
            )


def _scheduler(recipe: Recipe, optimizer: Optimizer) -> LRScheduler:
    # Not prepared by Accelerate: a prepared scheduler steps once per process at every call.
    options: dict[str, Any] = {}
    if recipe.schedule == "cosine_with_min_lr":
        options = {"min_lr_rate": 0.1}
    elif recipe.schedule == "warmup_stable_decay":
        options = {"num_decay_steps": recipe.decay_steps, "decay_type": "1-sqrt"}
    scheduler: LRScheduler = get_scheduler(
        recipe.schedule, optimizer, recipe.warmup_steps, recipe.max_steps, scheduler_specific_kwargs=options
    )
    return scheduler
