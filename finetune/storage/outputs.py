"""Outputs of a finished run: the model, the table of state bytes, the loss plot, the comparison with a bigram."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from finetune.config.checks import counted
from finetune.models.build import parameter_hash
from finetune.models.optimizers import report_state
from finetune.parallel.launch import plain_model, whole_state
from finetune.parallel.ranks import gather
from finetune.setup.prepare import PretrainRun
from finetune.storage.run_dir import folder_beside, write_beside
from finetune.training.expert_load import LOAD_KEYS
from finetune.training.memory import peak_bytes
from finetune.training.progress import plot_run
from finetune.training.run import Run


def finish(run: PretrainRun, further: Mapping[str, Any] | None = None) -> None:
    """Save model/, state_report.json, loss.png and result.json, and print the table and the verdict.

    Args:
        run: after its last step.
        further: more for result.json.
    """
    accelerator = run.accelerator
    state = whole_state(accelerator, run.model)
    hashes = gather(accelerator, parameter_hash(run.model))
    if not accelerator.is_main_process:
        return
    save_model(run.folder.path / "model", plain_model(run.model), state, run.tokenizer)
    val_loss = run.folder.metrics()[-1]["val_loss"]
    bits = run.bits_per_byte(val_loss)
    more = {"bits_per_byte": bits, "parameter_hashes": hashes, **(further or {})}
    write_results(run, more)
    below = "below" if val_loss < run.bigram else "NOT below"
    run.say(f"{summary(run, val_loss)}; {below} the interpolated bigram's {run.bigram:.4f}")


def summary(run: Run, val_loss: float) -> str:
    """Return one line: what was trained, how long, and its validation loss."""
    return (
        f"{run.recipe.optimizer} after {counted(run.step, 'step')}, {run.tokens:,} {run.unit}, {run.seconds:.0f} s: "
        f"validation {run.describe(val_loss)}"
    )


def write_results(run: Run, more: Mapping[str, Any]) -> None:
    """Write state_report.json, loss.png and result.json of a finished run, and print the table of state bytes.

    Args:
        run: after its last step; the main process's.
        more: for result.json.
    """
    path = run.folder.path
    optimizers: list[Any] = [getattr(o, "optimizer", o) for o in run.optimizers]
    record, table = report_state(optimizers)
    write_beside(path / "state_report.json", json.dumps(record | run.facts, indent=1))
    plot_run(run)
    metrics = run.folder.metrics()
    last = metrics[-1]
    health = {} if run.health is None else {"health": run.health.report().to_dict()}
    spectra = [[m["step"], m["spectra"]] for m in metrics if "spectra" in m]
    result = {
        "optimizer": run.recipe.optimizer,
        "step": run.step,
        "val_loss": last["val_loss"],
        **{key: last[key] for key in LOAD_KEYS if key in last},
        "tokens": run.tokens,
        "seconds": run.seconds,
        "evaluation_seconds": statistics.mean(run.evaluation_seconds) if run.evaluation_seconds else None,
        "state_bytes": record["total_bytes"],
        "peak_bytes": peak_bytes(run.accelerator.device),
        **run.release_facts,
        **health,
        **({"spectra": spectra} if spectra else {}),
        **more,
        **run.facts,
    }
    write_beside(path / "result.json", json.dumps(result, indent=1))
    run.say(f"\nstate of the optimizer\n{table}\n")
    if run.health is not None:
        run.say(f"what 8 bits did to the updates\n{run.health.report()}\n")


def save_model(
    path: Path, model: Any, state: Mapping[str, Any] | None, tokenizer: Any, files: Mapping[str, str] | None = None
) -> None:
    """Write model (or adapter) and tokenizer beside, then exchange the folders.

    Args:
        path: the folder that they take.
        model: with `save_pretrained`.
        state: its state dict, or None for its own.
        tokenizer: its tokenizer.
        files: further text files, by name.
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]

    def write(beside: Path) -> None:
        model.save_pretrained(beside, state_dict=state)
        tokenizer.save_pretrained(beside)
        for name, text in (files or {}).items():
            write_beside(beside / name, text)

    replace_folder(path, write)


def replace_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder, and exchange it for the old one, which stays if `write` fails."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    with folder_beside(path) as beside:
        write(beside)
        if path.exists():
            path.rename(old)
    shutil.rmtree(old, ignore_errors=True)
