"""A run's report on its memory: the peak estimated before it, the peak measured after it, the state saved."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from accelerate import Accelerator

from finetune.config.estimated import memory_options
from finetune.config.options import Training
from finetune.parallel.launch import is_sharded, plain_model
from finetune.training.memory import peak_bytes
from finetune.training.run import Run
from muon8bit import Muon8bit, estimate, state_report

# Peaks of this process by model and setup: a trace takes seconds, and a test or a sweep runs the same model again.
_PEAKS: dict[tuple[str, Any, str], int] = {}


def estimated_peak(run: Run) -> str:
    """Return the line that gives the peak of a run on each device, as `muon8bit estimate --recipe` counts it.

    Args:
        run: set up; its random state is left as it is.
    """
    recipe, accelerator = run.recipe, run.accelerator
    model: Any = plain_model(run.model)
    config = deepcopy(model.config)  # which building it on the meta device changes
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        setup, column = _setup(recipe, accelerator)
        key = (config.to_json_string(), setup, column)
        if key not in _PEAKS:
            with torch.random.fork_rng(devices=[]):
                _PEAKS[key] = estimate.Estimator(config).memory(column, setup).peak_bytes
    except (ValueError, ImportError) as error:
        return f"estimated peak: not known, {error}"
    place = "" if accelerator.num_processes == 1 else " on each device"
    return f"estimated peak: {estimate.gib(_PEAKS[key])} of tensors{place}, with full rows of {setup.seq} tokens"


def _setup(recipe: Training, accelerator: Accelerator) -> tuple[estimate.Setup, str]:
    is_cuda = accelerator.device.type == "cuda"
    options = memory_options(recipe, is_cuda, has_bf16=accelerator.mixed_precision == "bf16")
    num = accelerator.num_processes
    shard = "none" if num == 1 else "fsdp2" if is_sharded(accelerator) else "ddp"
    setup = estimate.setup_of(options, device="cuda" if is_cuda else "cpu", num_gpus=num, shard=shard)
    return setup, estimate.column_of(options["optimizer"], options["adamw_bits"], setup)


def memory_afterwards(run: Run) -> list[str]:
    """Return the lines of a finished run: on CUDA the measured peak, and of Muon8bit the bytes that it saves.

    Args:
        run: after its last step; of the process that prints.
    """
    lines = []
    if run.accelerator.device.type == "cuda":
        measured = peak_bytes(run.accelerator.device)
        lines.append(f"measured peak: {estimate.gib(measured)} allocated on {run.accelerator.device}")
    optimizer: Any = getattr(run.optimizers[0], "optimizer", run.optimizers[0])
    if isinstance(optimizer, Muon8bit):
        report = state_report(optimizer)
        adamw = report.baselines["adamw_fp32"]
        saved = estimate.gib(adamw - report.total_bytes)
        of_rank = ", on this rank" if report.is_sharded else ""
        lines.append(
            f"bytes saved: the state of {run.recipe.optimizer} takes {estimate.gib(report.total_bytes)}, AdamW's would "
            f"take {estimate.gib(adamw)}, {saved} more{of_rank}"
        )
    return lines
