"""Measure steps beside the loss, where it is asked for: what 8 bits did to an update, and spectra."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from finetune.config.errors import InputError
from finetune.training.run import Run
from muon8bit import Muon8bit, QuantizationHealth, QuantizationWarning, spectra

# Of `--health-every`, for each matrix.
MEASURES = ("descent", "update_cosine", "momentum_error", "sign_flips", "zero_codes", "extreme_codes")
DIGITS = 5  # of a measure of `--spectra-every`


def watch(run: Run) -> None:
    """Let a `QuantizationHealth` watch the optimizer, on the main process, before a checkpoint is loaded.

    Raises:
        InputError: no matrix has its momentum in 8 bits.
    """
    if not run.recipe.health_every or not run.accelerator.is_main_process:
        return
    optimizer: Any = getattr(run.optimizers[0], "optimizer", run.optimizers[0])
    assert isinstance(optimizer, Muon8bit)
    warnings.simplefilter("always", QuantizationWarning)  # one for each matrix, all of the same line
    try:
        run.health = QuantizationHealth(optimizer, every=run.recipe.health_every)
    except ValueError as error:
        raise InputError("--health-every", f"{error}; give 0") from None


def weights_before(run: Run) -> dict[str, Tensor]:
    """Return copies of the trained matrices, on the main process, if the next step is one of `--spectra-every`."""
    every = run.recipe.spectra_every
    if not every or (run.step + 1) % every or not run.accelerator.is_main_process:
        return {}
    return {name: weight.clone() for name, weight in _trained_matrices(run).items()}


def measured(run: Run, before: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what the step just taken adds to its record, each only if it was measured.

    Args:
        run: after the step.
        before: of `weights_before`.

    Returns:
        `health`: measures by matrix; `spectra`: of `weights` and `updates`, measures by group of layers.

    Raises:
        FloatingPointError: a weight is not finite.
    """
    latest = () if run.health is None else run.health.latest()
    record: dict[str, Any] = {}
    if latest:
        record["health"] = {of.name: {key: getattr(of, key) for key in MEASURES} for of in latest}
    if before:
        weights = _trained_matrices(run)
        for name, weight in weights.items():
            if not bool(weight.isfinite().all()):
                raise FloatingPointError(f"{name} is not finite")
        updates = {name: weight.float() - before[name].float() for name, weight in weights.items()}
        record["spectra"] = {"weights": _by_group(run, weights), "updates": _by_group(run, updates)}
    return record


def _trained_matrices(run: Run) -> dict[str, Tensor]:
    model: torch.nn.Module = run.accelerator.unwrap_model(run.model)
    named = model.named_parameters()
    return {name: param.detach() for name, param in named if param.requires_grad and param.ndim > 1}


def _by_group(run: Run, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    try:
        groups = spectra(run.accelerator.unwrap_model(run.model), tensors).groups
    except (ValueError, NotImplementedError) as error:
        raise InputError("--spectra-every", f"{error}; give 0") from None
    return {
        group: {key: float(f"{value:.{DIGITS}g}") for key, value in asdict(mean).items()}
        for group, mean in groups.items()
    }
