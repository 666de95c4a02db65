"""One optimizer step: told to the device, and read when it is done."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune.training.measuring import measured, weights_before
from finetune.training.run import Run
from finetune.training.train_step import (
    Norms,
    accumulate_gradients,
    begin_balancing,
    clip_gradients,
    step_batches,
    step_targets,
)
from muon8bit import NonFiniteGradientError


@dataclass(frozen=True)
class Step:
    """A step that the device was told to take: what the host knows of it, and where the rest is.

    Attributes:
        step, lr, tokens: of its record.
        targets: of all ranks.
        nats: summed over them, on the device.
        norms: of the gradients; None where they were released.
        num_skipped: steps that the optimizer had skipped before.
        counts: of `Balancing`; None for a model without experts.
        losses: of `Balancing`; None where no loss is added.
        measures: of `measured`.
    """

    step: int
    lr: float
    tokens: int
    targets: int
    nats: Tensor
    norms: Norms | None
    num_skipped: int
    measures: dict[str, Any]
    counts: Tensor | None = None
    losses: Tensor | None = None


def reads_later(run: Run) -> bool:
    """Check whether a step is read when the next one is queued, so that the device never waits for the host.

    A CPU has done its work when a call returns. Released gradients are told bad right after their step.
    """
    return run.accelerator.device.type != "cpu" and not run.recipe.release_gradients


def one_step(run: Run) -> Step:
    """Run one optimizer step; on a device it is queued.

    Raises:
        FloatingPointError, NonFiniteGradientError: a gradient was not finite; on CUDA it may be of the step before.
    """
    recipe, accelerator = run.recipe, run.accelerator
    before = weights_before(run)
    started = time.perf_counter()
    num = recipe.gradient_accumulation
    targets = step_targets(run.train, accelerator, run.position, recipe.batch_size, num)
    batches = list(step_batches(run.train, accelerator, run.position, recipe.batch_size, num))
    lr, num_skipped = _given_rate(run), _num_skipped(run)
    balancing = run.balancing
    if balancing:
        begin_balancing(balancing, run.train, accelerator, run.position, recipe.batch_size, num)
    nats = accumulate_gradients(accelerator, run.model, batches, targets, recipe.loss_chunk, balancing)
    norms = None if recipe.release_gradients else clip_gradients(run.model, recipe.clip)
    if norms is not None and not reads_later(run):
        norms.check(accelerator)
    try:
        for optimizer, scheduler in zip(run.optimizers, run.schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    except NonFiniteGradientError:
        if norms is not None:
            norms.check(accelerator)
        raise
    if balancing:
        balancing.move_biases()
    run.step += 1
    run.position += num * recipe.batch_size * accelerator.num_processes
    run.tokens += targets
    run.seconds += time.perf_counter() - started
    counts, losses = (balancing.counts, balancing.losses) if balancing else (None, None)
    losses = losses if balancing and balancing.has_losses else None
    return Step(
        run.step, float(lr), run.tokens, targets, nats, norms, num_skipped, measured(run, before), counts, losses
    )


def _given_rate(run: Run) -> float:
    """Return the rate of this step, as given for the base width where --scaling makes others of it."""
    group = run.optimizers[0].param_groups[0]
    if getattr(run.recipe, "scaling", "none") == "none":
        return float(group["lr"])
    return float(group["lr"] / group["initial_lr"] * run.recipe.lr)


def read_step(run: Run, step: Step) -> dict[str, Any]:
    """Wait for a step, once, and return its record. `seconds` counts steps only, without evaluation and saving.

    Raises:
        FloatingPointError: its gradient was not finite; `run.step` is then the step before it.
    """
    started = time.perf_counter()
    values = [step.nats] if step.norms is None else [step.nats, step.norms.total.float()]
    nats, *norm = torch.stack(values).tolist()
    loss = nats / max(step.targets, 1)
    taken, run.step = run.step, step.step - 1
    if norm and not math.isfinite(norm[0]):
        assert step.norms is not None
        step.norms.check(run.accelerator)
    if _num_skipped(run) > step.num_skipped:
        _note_skipped(run, loss)
    run.step = taken
    load = _read_load(run, step)
    run.seconds += time.perf_counter() - started
    return {
        "step": step.step,
        "loss": loss,
        "lr": step.lr,
        "grad_norm": norm[0] if norm else None,
        **run.release_facts,
        **load,
        **step.measures,
        "val_loss": None,
        "tokens": step.tokens,
        "seconds": round(run.seconds, 3),
    }


def _read_load(run: Run, step: Step) -> dict[str, float]:
    """Return how a step that is done spread over experts, and its losses of routers; nothing without experts."""
    if run.balancing is None or step.counts is None:
        return {}
    load = run.balancing.load.add(step.counts.tolist())
    if step.losses is None:
        return load
    losses = dict(zip(("aux_loss", "z_loss"), step.losses.tolist(), strict=True))
    return load | {name: loss for name, loss in losses.items() if getattr(run.balancing, name)}


def _num_skipped(run: Run) -> int:
    """Return the steps that the optimizer has skipped in this process; without gradient release it raises instead."""
    wrapper: Any = run.optimizers[0]
    return int(wrapper.optimizer.num_skipped_steps) if run.recipe.release_gradients else 0


def _note_skipped(run: Run, loss: float) -> None:
    """Tell of a gradient that was not finite, before its step is counted. One may be an accident.

    Raises:
        FloatingPointError: the loss is not finite either, or the step before had such a gradient too.
    """
    if not math.isfinite(loss):
        raise FloatingPointError("the loss and its gradient are not finite")
    if run.step in run.skipped:
        raise FloatingPointError("a gradient is not finite, as in the step before; without release it would be named")
    run.skipped.append(run.step + 1)
    run.say(
        f"step {run.step + 1}: a gradient was not finite, and its parameter was left out ({len(run.skipped)} such "
        "steps so far; a second one in a row ends the run)"
    )
