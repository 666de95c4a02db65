"""Display of a run while it trains: metrics.jsonl, the progress bar, the tracker, and loss.png as it grows."""

from __future__ import annotations

import json
import math
import time
from typing import Any

from finetune.parallel.stopping import StopSignal
from finetune.storage.plots import LossCurve, plot_losses, spectra_values
from finetune.storage.run_dir import write_beside
from finetune.training.expert_load import LOAD_KEYS
from finetune.training.memory import peak_bytes
from finetune.training.run import Run

PLOT_EVERY_S = 10.0  # between two pictures of a run that goes on; one takes a fraction of a second


def write_run_record(run: Run, script: str) -> None:
    """Write run.json: what is true of the whole run, and so is not on the lines of metrics.jsonl.

    Raises:
        OSError: the disk is full, or fails.
    """
    record = {
        "script": script,
        "name": run.recipe.name,
        "optimizer": run.recipe.optimizer,
        "trained_parameters": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        "device": str(run.accelerator.device),
        "mixed_precision": run.accelerator.mixed_precision,
        **run.facts,
    }
    write_beside(run.folder.path / "run.json", json.dumps(record, indent=1))


def in_words(health: dict[str, dict[str, float]]) -> str:
    """Return a line on the `health` of a step: the matrix that keeps least of the descent."""
    name = min(health, key=lambda of: health[of]["descent"])
    kept, cosine = health[name]["descent"], health[name]["update_cosine"]
    return f"8-bit momenta keep {kept:.2%} of the descent and more, least in {name} (cosine {cosine:.3f})"


def plot_run(run: Run) -> None:
    """Write loss.png: training loss, smoothed and as it is, and validation losses from step 0 on.

    Raises:
        OSError: the disk is full, or fails.
    """
    curve = LossCurve(run.recipe.name, run.folder.metrics(), run.facts.get("val_loss_before"))
    title = f"{run.recipe.name}, {run.recipe.optimizer}"
    plot_losses([curve], run.folder.path / "loss.png", title, run.reference)


class ProgressLog:
    """Takes the records of steps, on the main process; on the others it does nothing.

    Args:
        run: that trains.
        stop: is told of a disk that takes no metrics; the other processes hear of it when all agree next.
        bar: of tqdm.
    """

    def __init__(self, run: Run, stop: StopSignal, bar: Any) -> None:
        self.run, self.stop, self.bar = run, stop, bar
        self._tokens, self._seconds = run.tokens, run.seconds  # of the step before
        self._plot_at = -math.inf

    def log(self, record: dict[str, Any]) -> None:
        """Write, show and track one record of `finetune.training.stepping.read_step`."""
        run = self.run
        if not run.accelerator.is_main_process:
            return
        try:
            run.folder.append_metrics(record)
        except OSError as error:
            self.stop.error = f"cannot write metrics.jsonl: {error}"
        speed = record["tokens"] / run.seconds
        shown = {"loss": f"{record['loss']:.3f}", "lr": f"{record['lr']:.2e}", "tok_s": f"{speed:.0f}"}
        if "expert_load_cv" in record:
            shown["load_cv"] = f"{record['expert_load_cv']:.2f}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        self._track(record)
        self._plot(record)
        if "health" in record:
            run.say(f"step {record['step']}: {in_words(record['health'])}")
        if record["val_loss"] is not None:
            run.say(f"step {record['step']}: validation {run.describe(record['val_loss'])}")

    def _plot(self, record: dict[str, Any]) -> None:
        is_last = record["step"] == self.run.recipe.max_steps  # whose picture is one of the results
        if record["val_loss"] is None or is_last or time.monotonic() < self._plot_at:
            return
        try:
            plot_run(self.run)
        except OSError as error:  # a run need not end for want of a picture
            self.run.say(f"step {record['step']}: cannot write loss.png: {error}")
        self._plot_at = time.monotonic() + PLOT_EVERY_S

    def _track(self, record: dict[str, Any]) -> None:
        """Give the tracker the record, the speed of this step alone in `unit` per second, and the peak in bytes.

        The measures of `--health-every` are `health/MEASURE/MATRIX`, those of `--spectra-every`
        `spectra/KIND/MEASURE/GROUP`, with weights and updates as kinds.
        """
        run = self.run
        keys = ("loss", "lr", "grad_norm", "num_skipped_steps", "val_loss", *LOAD_KEYS)
        scalars = {key: record[key] for key in keys if isinstance(record.get(key), int | float)}
        for name, measures in record.get("health", {}).items():
            scalars |= {f"health/{measure}/{name}": value for measure, value in measures.items()}
        scalars |= spectra_values(record.get("spectra", {}))
        tokens, seconds = record["tokens"] - self._tokens, run.seconds - self._seconds
        self._tokens, self._seconds = record["tokens"], run.seconds
        if run.recipe.tracker:
            scalars |= {f"{run.unit}_per_second": tokens / seconds, "peak_bytes": peak_bytes(run.accelerator.device)}
        run.accelerator.log(scalars, step=record["step"])
