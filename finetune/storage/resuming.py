"""Which checkpoint a resumed run continues from, and that it is the same run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator

from finetune.config.errors import InputError
from finetune.config.options import Training
from finetune.parallel.ranks import gather
from finetune.storage.checkpoints import find_damage
from finetune.storage.run_dir import RunFolder


def choose_checkpoint(accelerator: Accelerator, folder: RunFolder, recipe: Training) -> None:
    """Set `folder.checkpoint` to the first candidate that is undamaged, on all ranks alike; says what it skips.

    The ranks share the reading. All see one folder, so all must be given the main process's candidates.

    Raises:
        InputError: all candidates are damaged, or nothing is left to do after that step; on all ranks.
    """
    skipped = []
    for candidate in folder.candidates:
        damages = gather(accelerator, find_damage(candidate, accelerator.process_index, accelerator.num_processes))
        damage = next((found for found in damages if found is not None), None)
        if damage is None:
            folder.checkpoint = candidate
            break
        skipped.append(f"{candidate}: {damage}")
    if folder.checkpoint is None:
        raise InputError("--resume", "; ".join(skipped) + "; give another checkpoint, or start anew without --resume")
    if accelerator.is_main_process:
        for text in skipped:
            print(f"skipped the checkpoint {text}", flush=True)
    unfinished = folder.step == recipe.max_steps and folder.is_evaluated() and not folder.is_finished()
    if folder.step >= recipe.max_steps and not unfinished:
        raise InputError("--resume", f"{folder.path} is already at step {folder.step}; raise --max-steps")


def check_same_run(folder: RunFolder, facts: Mapping[str, Any], named: Mapping[str, tuple[str, str]]) -> None:
    """Check that a checkpoint goes on with the model, text and tokenizer that it was made with.

    Args:
        folder: of the run; without a checkpoint there is nothing to check.
        facts: of this run.
        named: key of the facts -> (option that gives it, what it is). One that the checkpoint's version did not record
            is not compared.

    Raises:
        InputError: something else.
    """
    if folder.checkpoint is None:
        return
    saved = folder.progress()["facts"]
    launched = [f"{facts_['world_size']} processes ({facts_['parallelism']})" for facts_ in (saved, facts)]
    if launched[0] != launched[1]:
        raise InputError(
            "--resume",
            f"{folder.checkpoint} is of {launched[0]}, now there are {launched[1]}; launch it as it was, or a step "
            "would take another batch",
        )
    for key, (option, what) in named.items():
        if key in saved and saved[key] != facts.get(key):
            raise InputError(
                "--resume",
                f"{folder.checkpoint} is of another {what} ({saved[key][:12]}, Python {saved['python']}; now "
                f"{facts.get(key, 'none')[:12]}, Python {facts['python']}); give its {option}, or start anew",
            )
