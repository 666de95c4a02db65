"""One training run of any script: train, evaluate, save, stop, continue."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from safetensors import SafetensorError
from tqdm import tqdm  # type: ignore[import-untyped]

from finetune.command_line import STARTED
from finetune.config.errors import OtherRankError, StorageError
from finetune.parallel.ranks import leave
from finetune.parallel.stopping import StopSignal
from finetune.storage.checkpoints import named_checkpoints
from finetune.storage.saving import restore, resume_command, save
from finetune.training.run import Run
from finetune.training.stepping import Step, one_step, read_step, reads_later
from finetune.training.train_step import evaluate
from muon8bit import NonFiniteGradientError

R = TypeVar("R", bound=Run)


def run_job(run: R, finish: Callable[[R], None], script: str) -> int:
    """Run, or continue, one training job.

    Args:
        run: set up, before its first step; its folder tells whether to continue from a checkpoint.
        finish: saves what a complete run leaves; called on all ranks.
        script: path of the script, for the command that resumes.

    Returns:
        Exit code: 0 done, 1 a gradient or a validation loss was not finite, the disk is full or saving failed, 124
        --max-minutes have passed, 128 + signal number when stopped.

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
        _tell_of_checkpoints(run, script)
        code = 1
    except OtherRankError as error:
        _complain(run, f"step {run.step}: {error}")
        _tell_of_checkpoints(run, script)
        code = 1
    run.say(f"run folder: {run.folder.path}")
    leave(run.accelerator)
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


def _tell_of_checkpoints(run: Run, script: str) -> None:
    if run.accelerator.is_main_process and named_checkpoints(run.folder.path):
        _complain(run, f"the checkpoints before are untouched; to resume:\n  {resume_command(run, script)}")


def _free_space(run: Run) -> str:
    free = shutil.disk_usage(run.folder.path).free
    return f"{free / 2**20:,.0f} MiB are free on the disk of {run.folder.path}"


def _train(run: Run, script: str) -> int:
    recipe, accelerator = run.recipe, run.accelerator
    bar = tqdm(
        total=recipe.max_steps,
        initial=run.step,
        disable=not accelerator.is_main_process,
        unit="step",
        mininterval=0.5 if sys.stderr.isatty() else 10,
    )
    stop = StopSignal(STARTED + 60 * recipe.max_minutes if recipe.max_minutes else math.inf)
    queued: Step | None = None  # a step that is not read yet
    with stop.listening(), bar:
        while run.step < recipe.max_steps:
            before, queued = queued, None
            try:
                queued = one_step(run)
            finally:  # if it raises for a gradient, that may be of the step before
                if before is not None:
                    _log(run, stop, read_step(run, before), bar)
            done = run.step == recipe.max_steps
            stopped = stop.agreed(accelerator)
            evaluated = done or (run.step % recipe.eval_every == 0 and not stopped)
            saved = done or stopped or run.step % recipe.save_every == 0
            if evaluated or saved or not reads_later(run):
                record, queued = read_step(run, queued), None
                if evaluated:
                    record["val_loss"] = _evaluate(run)
                _log(run, stop, record, bar)
            if saved:
                stop.agreed(accelerator)  # a checkpoint must not say that metrics are there which the disk did not take
                save(run)
            if stopped and not done:
                run.say(f"stopped at step {run.step} of {recipe.max_steps} and saved; to resume:")
                run.say("  " + resume_command(run, script))
                return stop.code
    return 0


def _evaluate(run: Run) -> float:
    recipe = run.recipe
    val_loss = evaluate(run.accelerator, run.model, run.validation, recipe.batch_size, recipe.loss_chunk)
    if not math.isfinite(val_loss):
        run.step -= 1  # it is this step that went wrong
        raise FloatingPointError("the weights that it leaves have no finite validation loss")
    return val_loss


def _log(run: Run, stop: StopSignal, record: dict[str, Any], bar: Any) -> None:
    if not run.accelerator.is_main_process:
        return
    try:
        run.folder.append_metrics(record)
    except OSError as error:  # the other ranks hear of it when all agree next
        stop.error = error
    speed = record["tokens"] / run.seconds
    bar.set_postfix(loss=f"{record['loss']:.3f}", lr=f"{record['lr']:.2e}", tok_s=f"{speed:.0f}", refresh=False)
    bar.update()
    keys = ("loss", "lr", "grad_norm", "num_skipped_steps", "val_loss")
    scalars = {key: record[key] for key in keys if record.get(key) is not None}
    run.accelerator.log(scalars, step=record["step"])
    if record["val_loss"] is not None:
        run.say(f"step {record['step']}: validation {run.describe(record['val_loss'])}")
