"""What a finished run leaves: the model, the table of state bytes, the loss plot, the comparison with a bigram."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers.utils.logging import disable_progress_bar

from finetune.models import parameter_hash
from finetune.optimizers import report_state
from finetune.prepare import Run
from finetune.run_folder import folder_beside, write_beside


def nats_to_bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Bits per UTF-8 byte of text, which unlike nats per token compares across tokenizers."""
    return nats_per_token / math.log(2) / bytes_per_token


def finish(run: Run) -> None:
    """Save model/, state_report.json, loss.png and result.json, and print the table and the verdict."""
    accelerator = run.accelerator
    state = accelerator.get_state_dict(run.model)
    hashes = gather_object([parameter_hash(accelerator.unwrap_model(run.model))])
    if not accelerator.is_main_process:
        return
    path = run.folder.path
    _replace_model(path / "model", accelerator.unwrap_model(run.model), state, run.tokenizer)
    optimizers: list[Any] = [getattr(o, "optimizer", o) for o in run.optimizers]
    record, table = report_state(optimizers)
    write_beside(path / "state_report.json", json.dumps(record | run.facts, indent=1))
    metrics = run.folder.metrics()
    plot_losses(metrics, run.bigram, f"{run.recipe.name}, {run.recipe.optimizer}", path / "loss.png")
    val_loss = metrics[-1]["val_loss"]
    bits = nats_to_bits_per_byte(val_loss, run.cache.bytes_per_token)
    result = {
        "optimizer": run.recipe.optimizer,
        "step": run.step,
        "val_loss": val_loss,
        "bits_per_byte": bits,
        "tokens": run.tokens,
        "seconds": run.seconds,
        "parameter_hashes": hashes,
        **run.facts,
    }
    write_beside(path / "result.json", json.dumps(result, indent=1))
    run.say(f"\nstate of the optimizer\n{table}\n")
    below = "below" if val_loss < run.bigram else "NOT below"
    run.say(
        f"{run.recipe.optimizer} after {run.step} steps, {run.tokens:,} tokens, {run.seconds:.0f} s: validation "
        f"{val_loss:.4f} nats per token, {bits:.4f} bits per byte; {below} the interpolated bigram's {run.bigram:.4f}"
    )


def _replace_model(path: Path, model: Any, state: dict[str, Any], tokenizer: Any) -> None:
    """Write model and tokenizer beside, then exchange the folders."""
    disable_progress_bar()  # type: ignore[no-untyped-call]
    old = path.with_name(".model.old")
    if path.exists():
        path.rename(old)
    with folder_beside(path) as beside:
        model.save_pretrained(beside, state_dict=state)
        tokenizer.save_pretrained(beside)
    if old.exists():
        for file in old.iterdir():
            file.unlink()
        old.rmdir()


def plot_losses(metrics: list[dict[str, Any]], bigram: float, title: str, path: Path) -> None:
    """Plot training and validation loss over steps, with the bigram's as a line.

    Args:
        metrics: records of metrics.jsonl; losses in nats per token.
        bigram: validation loss of the interpolated bigram, nats per token.
        title: of the figure.
        path: the .png to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([m["step"] for m in metrics], [m["loss"] for m in metrics], lw=1, label="training")
    evaluated = [m for m in metrics if m["val_loss"] is not None]
    axes.plot([m["step"] for m in evaluated], [m["val_loss"] for m in evaluated], "o-", label="validation")
    axes.axhline(bigram, color="gray", ls="--", label="interpolated bigram")
    axes.set(xlabel="step", ylabel="nats per token", title=title)
    axes.legend()
    beside = path.with_name(".loss.png")
    figure.savefig(beside, dpi=120, format="png")
    beside.replace(path)
