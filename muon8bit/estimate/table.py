"""Estimates as a table for people and as a picture."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from .._text import gib, render
from .advice import Advice, BudgetCheck, Offer, untried
from .checkpoint import Report
from .estimator import Estimate, Memory
from .optimizers import LABELS
from .setup import Setup

GIB = 2**30
WIDTH = 80  # columns
# Bytes a second that PCIe 4.0 x16 carries, about.
_BUS = 25e9


def print_table(
    title: str, estimate: Estimate, verdicts: Mapping[str, BudgetCheck] | None, budget: int | None, file: IO[str]
) -> None:
    """Print what all optimizers share, one row an optimizer, and what the figures rest on, in lines of 80 columns."""
    setup = estimate.setup
    first = next(iter(estimate.optimizers.values()))
    _paragraph(title, file)
    trained = "all" if estimate.num_trained == estimate.num_parameters else f"{estimate.num_trained:,}"
    active = estimate.costs.active_parameters
    partly = "" if active in (None, estimate.num_parameters) else f", {active:,} of them active for a token"
    counted = f"{estimate.num_parameters:,} parameters{partly}, {trained} of them trained"
    _paragraph(f"{counted}. With every optimizer:", file)
    for name, num_bytes in _shared(first, setup).items():
        print(f"  {name:42} {gib(num_bytes):>12}", file=file)
    print(file=file)
    is_on_host = any(memory.host_state_bytes for memory in estimate.optimizers.values())
    header = ["optimizer", "state", "workspace", *(["host", "staged"] if is_on_host else []), "peak in", "peak"]
    header += [] if budget is None else [f"in {gib(budget)}"]
    rows = [_row(name, memory, setup, verdicts, is_on_host) for name, memory in estimate.optimizers.items()]
    sizes = header.index("peak in") - 1
    print(render(header, rows, "<" + ">" * sizes + "<" + ">" * (len(header) - sizes - 2)), file=file)
    print(file=file)
    for line in _basis(estimate):
        _paragraph(line, file)


def _paragraph(text: str, file: IO[str]) -> None:
    print(textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False), file=file)


def _shared(memory: Memory, setup: Setup) -> dict[str, int]:
    """Return the bytes that are the same with every optimizer, by their labels."""
    chosen = memory.peak(setup.checkpointing)
    shared = {"weights": memory.weights_bytes, "gradients": memory.gradients_bytes}
    shared |= {"for other GPUs": memory.communication_bytes} if memory.communication_bytes else {}
    shared["activations at most"] = chosen.activations_bytes
    if memory.checkpointed is not None and not setup.checkpointing:
        shared["  with --activation-checkpointing"] = memory.checkpointed.activations_bytes
    return shared


def _row(
    name: str, memory: Memory, setup: Setup, verdicts: Mapping[str, BudgetCheck] | None, is_on_host: bool
) -> list[str]:
    chosen = memory.peak(setup.checkpointing)
    host = [gib(memory.host_state_bytes), gib(memory.staging_bytes)] if is_on_host else []
    cells = [LABELS[name], gib(memory.resident_state_bytes), gib(memory.workspace_bytes), *host]
    cells += [chosen.phase, gib(chosen.peak_bytes)]
    if verdicts is not None:
        spare = verdicts[name].spare_bytes
        cells.append("fits" if verdicts[name].fits else f"{gib(-spare)} over")
    return cells


def print_offers(
    advice: Advice,
    commands: Sequence[str],
    optimizer: str,
    budget: int,
    note: str,
    file: IO[str],
    *,
    setup: Setup,
    remarks: Sequence[str],
) -> None:
    """Print what fits a budget as commands of the scripts, each with its peak.

    Args:
        advice: of `advice.advise`.
        commands: one for each offer.
        optimizer: that was asked for, of `OPTIMIZERS` or `FAMILY`.
        budget: bytes.
        note: what the budget was taken for, of `setup.parse_budget`.
        file: where to.
        setup: that was asked for.
        remarks: for each offer what to know of its command, or "".
    """
    print(file=file)
    if note:
        _paragraph(note, file)
    if not advice.offers:
        _paragraph(f"{LABELS[optimizer]} would fit in {gib(budget)} with nothing that was tried.", file)
        if advice.least is not None:
            _paragraph(f"The least takes {_offered(advice.least)}.", file)
        _paragraph("Not tried:", file)
        for way in untried(setup):
            print(textwrap.fill(way, WIDTH, initial_indent="- ", subsequent_indent="  "), file=file)
        return
    _paragraph(f"Fits in {gib(budget)}, as commands in a checkout; add --dataset and what else you want:", file)
    for offer, command, remark in zip(advice.offers, commands, remarks, strict=True):
        print(file=file)
        for text in filter(None, (_offered(offer), remark)):
            print(textwrap.fill(text, WIDTH, initial_indent="# ", subsequent_indent="#   "), file=file)
        print(_continued(command), file=file)


def _offered(offer: Offer) -> str:
    """Return an offer in words: `14.14 GiB at the peak + 3.40 GiB of host memory: Muon8bit, ...`."""
    host = f" + {gib(offer.host_bytes)} of host memory" if offer.host_bytes else ""
    return f"{gib(offer.peak_bytes)} at the peak{host}: {LABELS[offer.optimizer]}, {describe(offer.setup)}"


def _continued(command: str) -> str:
    """Cut a command line before options, with backslashes, into lines of at most 80 columns."""
    lines = [""]
    for part in re.split(r" (?=--)", command):
        if lines[-1] and len(lines[-1]) + len(part) + 3 > WIDTH:
            lines[-1] += " \\"
            lines.append("    " + part)
        else:
            lines[-1] += (" " if lines[-1] else "") + part
    return "\n".join(lines)


def print_report(report: Report, file: IO[str]) -> None:
    """Print a checkpoint's bytes, and below what other optimizers would take."""
    print(f"{report.path}: {LABELS[report.optimizer]}\n", file=file)
    rows = []
    parts = [*([report.weights] if report.weights else []), *report.state, report.total]
    for part in parts:
        name = f"state of {part.name}" if part in report.state else part.name
        numbers = (part.num_parameters, part.measured_bytes, part.predicted_bytes, part.difference_bytes)
        rows.append([name, *(f"{number:,}" for number in numbers)])
    for name, num_bytes in report.others.items():
        if name != report.optimizer:
            rows.append([f"{LABELS[name]}, would be", "", "", f"{num_bytes:,}", ""])
    print(render(["bytes of", "elements", "measured", "predicted", "difference"], rows, "<>>>>"), file=file)
    for note in report.notes:
        _paragraph(note, file)


def describe(setup: Setup) -> str:
    """Describe the setup in words: `batch 1 x 2048 tokens, bf16, LoRA 16`."""
    words = [f"batch {setup.batch} x {setup.seq} tokens", setup.dtype]
    if setup.qlora:
        words[-1] = f"NF4 base, {setup.dtype} beside"
    if setup.rank is None and setup.mixed_precision == "bf16":
        words[-1] += " computed in bf16"
    if setup.rank is not None:
        words.append(f"{'DoRA' if setup.dora else 'LoRA'} of rank {setup.rank}")
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
    if setup.cautious:
        words.append("cautious weight decay")
    if setup.bits == 32:
        words.append("Muon8bit's state in 32 bits")
    if setup.num_gpus > 1:
        words.append(f"{setup.num_gpus} GPUs, {setup.shard}: each GPU's own")
    return ", ".join(words)


def _basis(estimate: Estimate) -> list[str]:
    lines = [
        "State, weights and gradients: exact. Activations: counted over one pass of the modeling code on tensors "
        "without content. The peak is what is alive at once in the phase that it names.",
        "Not counted: the CUDA context (about 0.5 GiB), fragmentation, libraries' own buffers.",
        f"A checkpoint of the scripts takes {gib(estimate.optimizers['muon8bit'].checkpoint_bytes)} on disk with "
        f"Muon8bit: the {'weights' if estimate.setup.rank is None else 'adapter'} and the state.",
        *_generating(estimate),
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
    return lines


def _generating(estimate: Estimate) -> list[str]:
    cached = estimate.costs.cache_bytes
    if cached is None:
        return []
    dtype = "bf16" if estimate.setup.dtype == "bf16" else "fp32"
    return [f"While it generates text, a token takes {cached:,} bytes of KV cache in {dtype}."]


def plot(path: Path, title: str, estimate: Estimate, budget: int | None) -> None:
    """Write a PNG: a bar for each optimizer, stacked by what takes the bytes at the peak, and the budget as a line.

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
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, format="png", dpi=120)


def _part(memory: Memory, part: str, setup: Setup) -> int:
    known: dict[str, Any] = {"weights": memory.weights_bytes, "state": memory.resident_state_bytes}
    peak = memory.peak(setup.checkpointing).peak_bytes
    return int(known.get(part, peak - memory.weights_bytes - memory.resident_state_bytes))
