"""One training run of any script: train, evaluate, save, stop, continue."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from tqdm import tqdm  # type: ignore[import-untyped]

from finetune.checkpoints import named_checkpoints
from finetune.command_line import STARTED
from finetune.errors import StorageError
from finetune.loop import Stop, accumulate_gradients, clip_gradients, evaluate, step_batches, total_targets
from finetune.run import Run
from finetune.saving import restore, resume_command, save
from muon8bit import NonFiniteGradientError

R = TypeVar("R", bound=Run)
_ENDED_GROUPS: list[Any] = []


def run_job(run: R, finish: Callable[[R], None], script: str) -> int:
    """Run, or continue, one training job.

    Args:
        run: set up, before its first step; its folder tells whether to continue from a checkpoint.
        finish: saves what a complete run leaves; called on all ranks.
        script: path of the script, for the command that resumes.

    Returns:
        Exit code: 0 done, 1 a gradient or a validation loss was not finite or the disk is full, 124 --max-minutes have
        passed, 128 + signal number when stopped.

    Raises:
        InputError: the checkpoint cannot be loaded.
    """
    if run.folder.checkpoint:
        restore(run)
    try:
        code = _train(run, script)
        if code == 0:
            _finish(run, finish)
    except (FloatingPointError, NonFiniteGradientError) as error:
        clip = "--clip-matrix-norm" if run.recipe.release_gradients else "--clip"
        _complain(run, f"step {run.step + 1}: {error}; start anew with a lower --lr, or with {clip}")
        code = 1
    except StorageError as error:
        _complain(run, f"step {run.step}: {error}; {_free_space(run)}")
        if run.accelerator.is_main_process and named_checkpoints(run.folder.path):
            _complain(run, f"the checkpoints before are untouched; to resume:\n  {resume_command(run, script)}")
        code = 1
    run.say(f"run folder: {run.folder.path}")
    leave(run)
    return code


def _finish(run: R, finish: Callable[[R], None]) -> None:
    """What a complete run leaves is written by the main process alone; the others need not hear of a full disk."""
    try:
        finish(run)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write the results: {' '.join(str(error).split())[:200]}") from error


def _complain(run: Run, text: str) -> None:
    if run.accelerator.is_main_process:
        print(text, file=sys.stderr)


def _free_space(run: Run) -> str:
    free = shutil.disk_usage(run.folder.path).free
    return f"{free / 2**20:,.0f} MiB are free on the disk of {run.folder.path}"


def leave(run: Run) -> None:
    """Shut down trackers and the process group, all ranks together.

    The group's object is kept until the process ends. Its destructor, which holds the interpreter's lock, waits for
    gloo's threads, and one of those may still need the lock to free a gathered tensor: neither would ever end (seen
    with torch 2.13 on a busy machine, where the last reference was the model's).
    """
    run.accelerator.wait_for_everyone()
    if torch.distributed.is_initialized():
        _ENDED_GROUPS.append(torch.distributed.group.WORLD)
    run.accelerator.end_training()


def _train(run: Run, script: str) -> int:
    recipe, accelerator = run.recipe, run.accelerator
    bar = tqdm(
        total=recipe.max_steps,
        initial=run.step,
        disable=not accelerator.is_main_process,
        unit="step",
        mininterval=0.5 if sys.stderr.isatty() else 10,
    )
    stop = Stop(STARTED + 60 * recipe.max_minutes if recipe.max_minutes else math.inf)
    with stop.listening(), bar:
        while run.step < recipe.max_steps:
            record = _one_step(run)
            done = run.step == recipe.max_steps
            stopped = stop.agreed(accelerator)
            if done or (run.step % recipe.eval_every == 0 and not stopped):
                val_loss = evaluate(accelerator, run.model, run.validation, recipe.batch_size, recipe.loss_chunk)
                if not math.isfinite(val_loss):
                    run.step -= 1  # it is this step that went wrong
                    raise FloatingPointError("the weights that it leaves have no finite validation loss")
                record["val_loss"] = val_loss
            _log(run, stop, record, bar)
            if done or stopped or run.step % recipe.save_every == 0:
                stop.agreed(accelerator)  # a checkpoint must not say that metrics are there which the disk did not take
                save(run)
            if stopped and not done:
                run.say(f"stopped at step {run.step} of {recipe.max_steps} and saved; to resume:")
                run.say("  " + resume_command(run, script))
                return stop.code
    return 0


def _one_step(run: Run) -> dict[str, Any]:
    """One optimizer step; returns its record. `seconds` counts steps only, without evaluation and saving."""
    recipe, accelerator = run.recipe, run.accelerator
    started = time.perf_counter()
    num = recipe.gradient_accumulation
    batches = list(step_batches(run.train, accelerator, run.position, recipe.batch_size, num))
    lr, num_skipped = run.optimizers[0].param_groups[0]["lr"], _num_skipped(run)
    loss = accumulate_gradients(accelerator, run.model, batches, recipe.loss_chunk)
    grad_norm = None if recipe.release_gradients else clip_gradients(run.model, recipe.clip)
    for optimizer, scheduler in zip(run.optimizers, run.schedulers, strict=True):
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    if _num_skipped(run) > num_skipped:
        _note_skipped(run, loss)
    run.step += 1
    run.position += num * recipe.batch_size * accelerator.num_processes
    run.tokens += total_targets(accelerator, batches)
    run.seconds += time.perf_counter() - started
    return {
        "step": run.step,
        "loss": loss,
        "lr": float(lr),
        "grad_norm": grad_norm,
        **run.release_facts,
        "val_loss": None,
        "tokens": run.tokens,
        "seconds": round(run.seconds, 3),
        "corpus": run.facts["corpus"],
        "python": run.facts["python"],
    }


def _num_skipped(run: Run) -> int:
    """Steps that the optimizer has skipped in this process; without gradient release it raises instead."""
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


def _log(run: Run, stop: Stop, record: dict[str, Any], bar: Any) -> None:
    if not run.accelerator.is_main_process:
        return
    try:
        run.folder.append_metrics(record)
    except OSError as error:  # the other ranks hear of it when all agree next
        stop.error = error
    speed = run.tokens / run.seconds
    bar.set_postfix(loss=f"{record['loss']:.3f}", lr=f"{record['lr']:.2e}", tok_s=f"{speed:.0f}", refresh=False)
    bar.update()
    keys = ("loss", "lr", "grad_norm", "num_skipped_steps", "val_loss")
    scalars = {key: record[key] for key in keys if record.get(key) is not None}
    run.accelerator.log(scalars, step=run.step)
    if record["val_loss"] is not None:
        run.say(f"step {run.step}: validation {run.describe(record['val_loss'])}")
