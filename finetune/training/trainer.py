"""One training run of any script: train, evaluate, save, stop, continue."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from tqdm import tqdm  # type: ignore[import-untyped]

from finetune.command_line import STARTED, stopped_early
from finetune.config.errors import OtherRankError, StorageError
from finetune.parallel.launcher import tell_launcher
from finetune.parallel.ranks import leave, on_main
from finetune.parallel.stopping import StopSignal
from finetune.storage.checkpoints import named_checkpoints
from finetune.storage.run_dir import write_beside
from finetune.storage.saving import restore, resume_command, save
from finetune.training.expert_load import describe_dead
from finetune.training.measuring import watch
from finetune.training.peak import memory_afterwards
from finetune.training.progress import ProgressLog, write_run_record
from finetune.training.run import Run
from finetune.training.stepping import Step, one_step, read_step, reads_later
from finetune.training.train_step import evaluate
from muon8bit import NonFiniteGradientError

R = TypeVar("R", bound=Run)


def run_job(run: R, finish: Callable[[R], None], script: str) -> int:
    """Run, or continue, one training job. What is printed last says how it ended: why not, or how to go on.

    Args:
        run: set up, before its first step; its folder tells whether to continue from a checkpoint.
        finish: saves what a complete run leaves; called on all ranks.
        script: path of the script, for the command that resumes.

    Returns:
        Exit code: 0 done, 1 a gradient or a validation loss was not finite, the disk is full or saving failed, 124
        --max-minutes have passed, 128 + signal number when stopped.

    Raises:
        InputError: the checkpoint cannot be loaded.
        KeyboardInterrupt: Ctrl-C outside of the loop; how to resume is said.
    """
    code, failure = 1, ""
    try:
        _begin(run, script)
        code = _train(run)
        if code == 0:
            _finish(run, finish)
    except (FloatingPointError, NonFiniteGradientError) as error:
        clip = "--clip-matrix-norm" if run.recipe.release_gradients else "--clip"
        failure = f"step {run.step + 1}: {error}; start anew with a lower --lr, or with {clip}"
        failure += _note_divergence(run, f"step {run.step + 1}: {error}")
    except StorageError as error:
        failure = f"step {run.step}: {error}; {_free_space(run)}{_untouched(run, script)}"
    except OtherRankError as error:
        failure = f"step {run.step}: {error}{_untouched(run, script)}"
    except KeyboardInterrupt:
        ways_out = _untouched(run, script)
        _complain(run, f"stopped{ways_out}" if ways_out else stopped_early(run.folder))
        raise
    run.say(f"run folder: {run.folder.path}")
    if failure:
        code = 1
        _complain(run, failure)
    elif code:
        stopped = f"stopped at step {run.step} of {run.recipe.max_steps} and saved; to resume:"
        run.say(f"{stopped}\n  {resume_command(run, script)}")
        tell_launcher(f"{stopped} {resume_command(run, script)}")
    leave(run.accelerator)
    return code


def _begin(run: Run, script: str) -> None:
    """Continue from the checkpoint, or evaluate the weights before the first step; record the facts of the run."""
    watch(run)
    if run.folder.checkpoint:
        restore(run)
    elif "val_loss_before" not in run.facts:  # fine-tuning has looked already
        run.say(f"validating the model before the first step: {len(run.validation):,} rows")
        val_loss = _measure(run)
        run.facts["val_loss_before"] = val_loss
        run.say(f"step 0: validation {run.describe(val_loss)}")
    try:
        on_main(run.accelerator, lambda: write_run_record(run, Path(script).stem))
    except OSError as error:
        raise StorageError(f"cannot write run.json: {error}") from error


def _finish(run: R, finish: Callable[[R], None]) -> None:
    """Write the results of a complete run, on the main process alone; the others need not hear of a full disk."""
    try:
        finish(run)
        for line in memory_afterwards(run) if run.accelerator.is_main_process else ():
            run.say(line)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write the results: {' '.join(str(error).split())[:200]}") from error


def _note_divergence(run: Run, text: str) -> str:
    """Leave diverged.json, by which programs tell this end of a run from a full disk; return why that failed."""
    try:
        if run.accelerator.is_main_process:
            write_beside(run.folder.diverged_file, json.dumps({"step": run.step + 1, "error": text}))
    except OSError as error:
        return f"; cannot write diverged.json: {error.strerror}"
    return ""


def _complain(run: Run, text: str) -> None:
    """Print on the main process why a run ends, and leave it for the launcher on all."""
    if run.accelerator.is_main_process:
        print(text, file=sys.stderr)
    tell_launcher(text)


def _untouched(run: Run, script: str) -> str:
    """Return how to resume, to be put behind what happened; nothing where there is no checkpoint."""
    if not named_checkpoints(run.folder.path):
        return ""
    return f"\nthe checkpoints before are untouched; to resume:\n  {resume_command(run, script)}"


def _free_space(run: Run) -> str:
    free = shutil.disk_usage(run.folder.path).free
    return f"{free / 2**20:,.0f} MiB are free on the disk of {run.folder.path}"


def _train(run: Run) -> int:
    recipe, accelerator = run.recipe, run.accelerator
    bar = tqdm(
        total=recipe.max_steps,
        initial=run.step,
        disable=not accelerator.is_main_process,
        unit="step",
        mininterval=0.5 if sys.stderr.isatty() else 10,
    )
    stop = StopSignal(STARTED + 60 * recipe.max_minutes if recipe.max_minutes else math.inf)
    progress = ProgressLog(run, stop, bar)
    queued: Step | None = None  # a step that is not read yet
    with stop.listening(), bar:
        while run.step < recipe.max_steps:
            before, queued = queued, None
            try:
                queued = one_step(run)
            finally:  # if it raises for a gradient, that may be of the step before
                if before is not None:
                    progress.log(read_step(run, before))
            done = run.step == recipe.max_steps
            stopped = stop.agreed(accelerator)
            evaluated = done or (run.step % recipe.eval_every == 0 and not stopped)
            saved = done or stopped or run.step % recipe.save_every == 0
            if evaluated or saved or not reads_later(run):
                record, queued = read_step(run, queued), None
                if evaluated:
                    record |= {"val_loss": _evaluate(run), **run.measure_more()}
                    record |= _tell_dead_experts(run)
                progress.log(record)
            if saved:
                stop.agreed(accelerator)  # a checkpoint must not say that metrics are there which the disk did not take
                save(run)
            if stopped and not done:
                return stop.code
    return 0


def _measure(run: Run) -> float:
    """Return the validation loss, and note how long that took."""
    recipe, started = run.recipe, time.perf_counter()
    val_loss = evaluate(run.accelerator, run.model, run.validation, recipe.batch_size, recipe.loss_chunk)
    run.evaluation_seconds.append(time.perf_counter() - started)
    return val_loss


def _tell_dead_experts(run: Run) -> dict[str, Any]:
    """Say which experts got no token since the last evaluation; return it for the record, nothing without experts."""
    if run.balancing is None:
        return {}
    load, since = run.balancing.load, run.balancing.load.since
    dead = load.take_dead(run.step)
    if dead:
        run.say(f"step {run.step}: {describe_dead(dead, since)}")
    return {"dead_experts": dead}


def _evaluate(run: Run) -> float:
    val_loss = _measure(run)
    if not math.isfinite(val_loss):
        run.step -= 1  # it is this step that went wrong
        raise FloatingPointError("the weights that it leaves have no finite validation loss")
    return val_loss
