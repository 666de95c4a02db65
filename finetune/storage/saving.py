"""The checkpoint of a run: written by all processes, sealed, named; read back; and the command that does so."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

from accelerate.utils import DistributedType

from finetune.config.checks import counted
from finetune.config.errors import InputError, OtherRankError, StorageError
from finetune.parallel.ranks import write_together
from finetune.storage.checkpoints import PROGRESS_FILE, file_names, partial_checkpoint, seal_files
from finetune.training.run import Run, follow_schedule


def save(run: Run) -> None:
    """Save a checkpoint of the step that is done; all ranks together, each hashes a part of the files.

    Raises:
        StorageError: the disk does not take it, on all ranks; earlier checkpoints are as they were.
        RanksError: another failure, such as a device's, likewise.
    """
    accelerator, folder = run.accelerator, run.folder
    rank, world = accelerator.process_index, accelerator.num_processes
    partial = partial_checkpoint(folder.path, run.step)

    def seal() -> dict[str, dict[str, object]]:
        return seal_files(partial, file_names(partial)[rank::world])

    def finish() -> None:
        if accelerator.is_main_process:
            folder.finish_checkpoint(partial, files, run.recipe.keep_checkpoints)

    try:
        write_together(accelerator, lambda: _write_files(run, partial))
        parts = write_together(accelerator, seal)
        files = {name: entry for part in parts for name, entry in part.items()}
        write_together(accelerator, finish)
    except (StorageError, OtherRankError) as error:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        raise type(error)(f"cannot save a checkpoint: {error}") from error.__cause__


def _write_files(run: Run, partial: Path) -> None:
    run.accelerator.save_state(str(partial))
    if run.accelerator.is_main_process:
        record = {
            "step": run.step,
            "max_steps": run.recipe.max_steps,  # which the schedule of this step had
            "position": run.position,
            "tokens": run.tokens,
            "seconds": run.seconds,
            "skipped": run.skipped,
            "optimizer": run.recipe.optimizer,
            "schedulers": [scheduler.state_dict() for scheduler in run.schedulers],
            "facts": run.facts,
            **({"expert_load": run.balancing.load.state()} if run.balancing else {}),
        }
        (partial / PROGRESS_FILE).write_text(json.dumps(record, indent=1))


def restore(run: Run) -> None:
    """Take everything from the checkpoint that was chosen; all ranks together.

    Raises:
        InputError: it does not fit this run.
    """
    record = run.folder.progress()
    try:
        run.accelerator.load_state(str(run.folder.checkpoint))
    except Exception as error:
        first = " ".join(str(error).split())[:200]
        raise InputError(
            "--resume",
            f"cannot load {run.folder.checkpoint} ({first}); give an earlier checkpoint of {run.folder.path}",
        ) from error
    for scheduler, state in zip(run.schedulers, record["schedulers"], strict=True):
        scheduler.load_state_dict(state)
    has_other_lr = follow_schedule(run.schedulers)
    run.step, run.position = record["step"], record["position"]
    run.tokens, run.seconds = record["tokens"], record["seconds"]
    run.skipped = record.get("skipped", [])  # older checkpoints are of runs that skip nothing
    if run.balancing:
        run.balancing.load.restore(record.get("expert_load"), run.step)
    if "val_loss_before" in record["facts"]:  # which pretraining of release 0.1 did not look at
        run.facts["val_loss_before"] = record["facts"]["val_loss_before"]
    run.say(f"resumed from {run.folder.checkpoint} at step {run.step}")
    schedule, steps = run.recipe.schedule, run.recipe.max_steps
    is_longer_or_shorter = record.get("max_steps", steps) != steps and schedule != "constant_with_warmup"
    if has_other_lr or is_longer_or_shorter:
        run.say(f"the {schedule} schedule of lr is that of {counted(steps, 'step')} from step {run.step + 1} on")


def resume_command(run: Run, script: str) -> str:
    """Return the command that continues a run, launched as it is; words in capitals are the reader's to replace."""
    accelerator = run.accelerator
    world = accelerator.num_processes
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if accelerator.distributed_type == DistributedType.NO:
        launcher = [sys.executable]
    elif accelerator.distributed_type == DistributedType.FSDP:
        launcher = ["accelerate", "launch", "--config_file", "CONFIG", "--num_processes", str(world)]
    elif local < world:
        nodes = ["--nnodes", str(world // local), "--node_rank", "NODE_RANK", "--master_addr", "ADDRESS"]
        launcher = ["torchrun", *nodes, "--nproc_per_node", str(local)]
    else:
        launcher = ["torchrun", "--nproc_per_node", str(world)]
    return shlex.join([*launcher, script, "--resume", str(run.folder.path)])
