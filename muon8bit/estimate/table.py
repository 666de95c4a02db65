"""Estimates as a table for people and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from .advice import BudgetCheck
from .checkpoint import Report
from .estimator import Estimate, Memory
from .optimizers import LABELS
from .setup import Setup

GIB = 2**30
# Bytes a second that PCIe 4.0 x16 carries, about.
_BUS = 25e9


def gib(num_bytes: int) -> str:
    """Bytes in GiB, or in MiB below a tenth of one: `14.96 GiB`."""
    return f"{num_bytes / GIB:,.2f} GiB" if abs(num_bytes) >= GIB / 10 else f"{num_bytes / 2**20:,.2f} MiB"


def _rich() -> tuple[Any, Any]:
    """Classes of rich: Console, Table."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        raise ImportError("the table needs rich: pip install rich, or give --json") from None
    return Console, Table


def _print(file: IO[str], *things: Any) -> None:
    """As wide as the terminal, or wide enough where there is none."""
    console = _rich()[0](file=file, width=None if file.isatty() else 200, highlight=False)
    for thing in things:
        console.print(thing)


def print_table(
    title: str, estimate: Estimate, verdicts: Mapping[str, BudgetCheck] | None, budget: int | None, file: IO[str]
) -> None:
    """Print one row an optimizer, and below what the figures rest on.

    Raises:
        ImportError: rich is not installed.
    """
    setup = estimate.setup
    first = next(iter(estimate.optimizers.values()))
    table = _rich()[1](title=title, title_justify="left", caption_justify="left", caption=_basis(estimate))
    table.add_column("optimizer")
    is_on_host = any(memory.host_state_bytes for memory in estimate.optimizers.values())
    names = ["weights", "gradients", "state", "workspace", *(["for other GPUs"] if first.communication_bytes else [])]
    names[3:3] = ["on the host", "staged"] if is_on_host else []
    for name in [*names, "activations", "peak", "with checkpointing"]:
        table.add_column(name, justify="right")
    if budget is not None:
        table.add_column(f"in {gib(budget)}")
    for name, memory in estimate.optimizers.items():
        other = None if setup.checkpointing else memory.checkpointed
        chosen = memory.peak(setup.checkpointing)
        sizes = [memory.weights_bytes, memory.gradients_bytes, memory.resident_state_bytes, memory.workspace_bytes]
        sizes[3:3] = [memory.host_state_bytes, memory.staging_bytes] if is_on_host else []
        sizes += [memory.communication_bytes] if memory.communication_bytes else []
        cells = [LABELS[name], *map(gib, [*sizes, chosen.activations_bytes])]
        cells += [f"{gib(chosen.peak_bytes)} ({chosen.phase})", "chosen" if other is None else gib(other.peak_bytes)]
        if verdicts is not None:
            verdict = verdicts[name]
            cells.append(
                f"fits, {gib(verdict.spare_bytes)} left" if verdict.fits else f"{gib(-verdict.spare_bytes)} over"
            )
        table.add_row(*cells)
    lines = [
        f"{LABELS[name]} would fit with: {', or '.join(_ways(verdict)) or 'nothing that was tried'}"
        for name, verdict in (verdicts or {}).items()
        if not verdict.fits
    ]
    _print(file, table, *lines)


def _ways(verdict: BudgetCheck) -> list[str]:
    return [*verdict.changes, *([verdict.together] if verdict.together else [])]


def print_report(report: Report, file: IO[str]) -> None:
    """Print a checkpoint's bytes, and below what other optimizers would take.

    Raises:
        ImportError: rich is not installed.
    """
    title = f"{report.path}: {LABELS[report.optimizer]}"
    table = _rich()[1](title=title, title_justify="left")
    table.add_column("bytes of")
    for name in ("elements", "measured", "predicted", "difference"):
        table.add_column(name, justify="right")
    parts = [*([report.weights] if report.weights else []), *report.state, report.total]
    for part in parts:
        name = f"state of {part.name}" if part in report.state else part.name
        numbers = (part.num_parameters, part.measured_bytes, part.predicted_bytes, part.difference_bytes)
        table.add_row(name, *(f"{number:,}" for number in numbers))
    for name, num_bytes in report.others.items():
        if name != report.optimizer:
            table.add_row(f"state of {LABELS[name]}, it would be", "", "", f"{num_bytes:,}", "")
    _print(file, table, *report.notes)


def describe(setup: Setup) -> str:
    """The setup in words: `batch 1 x 2048 tokens, bf16, LoRA 16`."""
    words = [f"batch {setup.batch} x {setup.seq} tokens", setup.dtype]
    if setup.qlora:
        words[-1] = "NF4 base"
    if setup.rank is not None:
        words.append(f"LoRA of rank {setup.rank}")
    if setup.checkpointing:
        words.append("activation checkpointing")
    if setup.release:
        words.append("gradients released")
    if setup.loss_chunk is not None:
        words.append(f"loss by {setup.loss_chunk} tokens")
    if setup.accumulation > 1:
        words.append(f"{setup.accumulation} micro-batches a step")
    if setup.state_device == "cpu":
        words.append("Muon8bit's state on the host")
    if setup.num_gpus > 1:
        words.append(f"{setup.num_gpus} GPUs, {setup.shard}: each GPU's own")
    return ", ".join(words)


def _basis(estimate: Estimate) -> str:
    lines = [
        f"{estimate.num_parameters:,} parameters, {estimate.num_trained:,} of them trained. State, weights and "
        "gradients: exact. Activations: counted over one pass of the modeling code on tensors without content.",
        "The peak is what is alive at once in the phase that it names, at most the sum of its row.",
        "Not counted: the CUDA context (about 0.5 GiB), fragmentation, libraries' own buffers.",
        *estimate.notes,
    ]
    if estimate.setup.device == "cuda":
        more = gib(4 * estimate.num_trained // estimate.setup.num_shards)
        lines.append(f"AdamW is torch's with fused=True: by default it copies a moment of all tensors, {more} more.")
    if estimate.setup.dtype == "bf16" and estimate.setup.rank is None:
        lines.append("AdamW's moments count as fp32; torch.optim.AdamW on bf16 weights keeps bf16 ones, half of that.")
    if estimate.setup.release:
        lines.append(
            "Gradients released: by muon8bit.release_gradients for Muon8bit; the others need code of your own."
        )
    moved = [memory.bus_bytes for memory in estimate.optimizers.values() if memory.bus_bytes]
    if moved:
        lines.append(
            f"State on the host: Muon8bit's, the others have no such option; {min(moved) / 1e9:.3g} to "
            f"{max(moved) / 1e9:.3g} GB over the bus in a step, {min(moved) / _BUS:.2g} to {max(moved) / _BUS:.2g} s "
            "at 25 GB/s (PCIe 4.0 x16, an estimate), of which the update hides a part. torch rounds each pinned tensor "
            "up to a power of two bytes."
        )
    elif estimate.setup.state_device == "cpu":
        lines.append("State on the host changes nothing on a CPU, where it is already.")
    if estimate.setup.num_shards > 1:
        lines.append("Sharded figures were not checked against a run.")
        if estimate.setup.accumulation > 1:
            whole = (estimate.setup.autocast or estimate.setup.weight_dtype).itemsize * estimate.num_trained
            lines.append(
                f"Each micro-batch is added to the shards, as the scripts do; under no_sync a GPU keeps {gib(whole)} "
                "of whole gradients between them."
            )
    return "\n".join(lines)


def plot(path: Path, title: str, estimate: Estimate, budget: int | None) -> None:
    """A PNG: a bar for each optimizer, stacked by what takes the bytes at the peak, and the budget as a line.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    labels = [LABELS[name] for name in estimate.optimizers]
    bottom = [0.0] * len(labels)
    for part in ("weights", "state", "gradients, activations and workspace"):
        heights = [_part(memory, part, estimate.setup) / GIB for memory in estimate.optimizers.values()]
        axes.bar(labels, heights, bottom=bottom, label=part)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    if budget is not None:
        axes.axhline(budget / GIB, color="black", linestyle="--", label=f"budget {gib(budget)}")
    axes.set_ylabel("GiB at the peak")
    axes.set_title(f"{title}\n{describe(estimate.setup)}", fontsize=10)
    axes.tick_params(axis="x", labelrotation=20)
    axes.legend()
    figure.savefig(path, format="png", dpi=120)


def _part(memory: Memory, part: str, setup: Setup) -> int:
    known: dict[str, Any] = {"weights": memory.weights_bytes, "state": memory.resident_state_bytes}
    peak = memory.peak(setup.checkpointing).peak_bytes
    return int(known.get(part, peak - memory.weights_bytes - memory.resident_state_bytes))
