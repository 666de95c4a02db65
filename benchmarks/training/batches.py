"""Batch study of a sweep: tokens, operations and seconds to a training loss, and ratios between optimizers.

    python -m benchmarks.training.batches benchmarks/sweeps/batches.toml [--losses 4.0,3.8] [--picture FILE.png]
    python -m benchmarks.training.batches benchmarks/sweeps/batches.toml --page docs/results/batch-size.md

Out of the sweep's records alone; its arms differ in optimizer, bits and batch size. An arm counts at its best rate, on
all of its seeds. The compute-time frontier is operations, in all, over steps, which follow each other.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.training.tokens_to_loss import (
    Crossing,
    TokenRatio,
    common_levels,
    find_crossing,
    ratio_of,
)
from finetune.command_line import run_script
from finetune.config.errors import InputError
from finetune.data.texts import read_text
from finetune.evidence.arms import fill_marks, markdown
from finetune.storage.plots import color_of, line_style, new_figure, point_style, save_figure
from finetune.storage.run_dir import write_beside
from finetune.sweep.plan import Results, choose_rate
from finetune.sweep.reading import read_sweep
from finetune.sweep.runner import SweepFolder
from finetune.sweep.spec import Sweep, SweepArm, SweepRun
from muon8bit import param_groups
from muon8bit.config import DEFAULT_NS_STEPS, DEFAULT_WORKSPACE_BYTES
from muon8bit.orthogonalize import choose_method, flops, resolve_coefficients

PAIRS = (("adamw", "muon8bit 32"), ("muon8bit 32", "muon8bit 8"))
NUM_LEVELS, SPACING = 3, 0.2  # losses that are taken where none are given, in nats per token
_SCHEDULE = resolve_coefficients("jordan", DEFAULT_NS_STEPS)


@dataclass(frozen=True)
class BatchArm:
    """An arm at its best rate.

    Args:
        arm: the arm.
        records: seed -> record of its run; empty while its rate is not chosen.
        obstacle: why it counts for nothing, in a sentence; "" where it counts.
    """

    arm: SweepArm
    records: Mapping[int, Mapping[str, Any]]
    obstacle: str

    @property
    def optimizer(self) -> str:
        """The optimizer, with the bits of its momentum."""
        recipe = self.arm.recipe
        return f"{recipe.optimizer} {recipe.bits}" if "8bit" in recipe.optimizer else recipe.optimizer

    @property
    def batch_tokens(self) -> int:
        """Tokens of a step."""
        recipe = vars(self.arm.recipe)
        return int(recipe["batch_size"] * recipe["gradient_accumulation"] * recipe["seq_len"])

    @cached_property
    def operations(self) -> tuple[int, int]:
        """Operations of the model for a token, and of orthogonalization for a step; a multiply-add is 2.

        The model's are 6 for each parameter that a token is multiplied by, the output head's included. Newton-Schulz is
        counted by the method that the planner chooses on a CPU. Nothing is counted of elementwise work and attention.
        """
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        from finetune.models.build import model_config

        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(model_config(self.arm.recipe))  # type: ignore[arg-type]
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        looked_up = 0 if head is embedding else embedding.numel()  # not multiplied; without storage tied ones are two
        params = sum(p.numel() for p in model.parameters()) - looked_up
        shapes: Counter[tuple[int, int]] = Counter()
        for group in param_groups(model, lr=1e-3) if "muon" in self.arm.recipe.optimizer else ():
            if group["algorithm"] == "muon":
                for _, param in group["params"]:
                    shapes[param.shape[-2], param.shape[-1]] += param[..., 0, 0].numel()
        return 6 * params, sum(_iteration(*shape, number) * number for shape, number in shapes.items())


def _iteration(rows: int, cols: int, number: int) -> int:
    """Return the operations of one matrix among `number` of its shape."""
    method = choose_method(rows, cols, _SCHEDULE, "cpu", count=number, budget_bytes=DEFAULT_WORKSPACE_BYTES)
    segments = max(1, len(method.segments))
    return flops(method.form, rows, cols, DEFAULT_NS_STEPS, num_segments=segments)


def read_arms(sweep: Sweep, results: Results) -> list[BatchArm]:
    """Return the arms, those without a result with what is in the way."""
    arms = []
    for arm in sweep.arms.values():
        choice = choose_rate(sweep, arm, results)
        runs = {seed: results.get(SweepRun(arm.name, choice.best, seed)) for seed in arm.seeds}
        found = {seed: record for seed, record in runs.items() if record and record["status"] == "finished"}
        obstacle = choice.obstacle or ("" if choice.best is not None else "its rate is not chosen yet")
        if not obstacle and len(found) < len(arm.seeds):
            obstacle = f"{len(found)} of {len(arm.seeds)} seeds finished"
        arms.append(BatchArm(arm, found, obstacle))
    return arms


def crossings(arm: BatchArm, level: float) -> dict[int, Crossing] | None:
    """Return seed -> where its run reaches a loss; None where one does not."""
    found = {seed: find_crossing(record, level) for seed, record in arm.records.items()}
    known = {seed: crossing for seed, crossing in found.items() if crossing is not None}
    return known if known and len(known) == len(found) and not arm.obstacle else None


def costs_table(arms: Sequence[BatchArm], levels: Sequence[float]) -> str:
    """Return the table of T_L(B) with its compute and time, means over seeds."""
    rows = []
    for arm in arms:
        for level in levels:
            found = crossings(arm, level)
            cells = ["-"] * 5
            if found is not None:
                tokens, steps, seconds = (
                    fmean(values)
                    for values in zip(*((c.tokens, c.step, c.seconds) for c in found.values()), strict=True)
                )
                model, iteration = (count / 1e12 for count in arm.operations)
                cells = [
                    f"{tokens:,.0f}",
                    f"{steps:.1f}",
                    f"{model * tokens:.2f}",
                    f"{iteration * steps:.2f}",
                    f"{seconds:.0f}",
                ]
            rows.append((arm.optimizer, f"{arm.batch_tokens:,}", f"{level:.2f}", *cells))
    head = ("optimizer", "batch", "L", "tokens", "steps", "model TFLOP", "Newton-Schulz TFLOP", "seconds")
    return markdown(head, rows)


def ratios(
    arms: Sequence[BatchArm], levels: Sequence[float]
) -> Iterator[tuple[str, str, int, float, TokenRatio | None]]:
    """Yield the two optimizers, tokens of a batch, loss, and the ratio of their tokens to it."""
    by_place = {(arm.optimizer, arm.batch_tokens): arm for arm in arms}
    for above, below in PAIRS:
        for level in levels:
            for batch in sorted({arm.batch_tokens for arm in arms}):
                pair = [by_place.get((name, batch)) for name in (above, below)]
                found = [crossings(arm, level) if arm else None for arm in pair]
                tokens = [{seed: c.tokens for seed, c in each.items()} for each in found if each is not None]
                yield above, below, batch, level, ratio_of(*tokens) if len(tokens) == 2 else None


def ratios_table(arms: Sequence[BatchArm], levels: Sequence[float]) -> str:
    """Return the table of R_L(B)."""
    rows = []
    for above, below, batch, level, ratio in ratios(arms, levels):
        cells: tuple[str, ...] = ("-", "-", "-", "no result")
        if ratio is not None:
            ends = "-" if ratio.ends is None else f"{ratio.ends[0]:.3f} to {ratio.ends[1]:.3f}"
            cells = (f"{ratio.value:.3f}", ends, str(ratio.seeds), "" if ratio.is_resolved else "not resolved")
        rows.append((above, below, f"{level:.2f}", f"{batch:,}", *cells))
    return markdown(("tokens of", "over those of", "L", "batch", "ratio", "95% interval", "seeds", ""), rows)


def plot(arms: Sequence[BatchArm], levels: Sequence[float], path: Path) -> None:
    """Draw the ratios over the batch, and operations over steps to the lowest loss."""
    figure = new_figure(10)
    left, right = figure.subplots(1, 2)
    found = [row for row in ratios(arms, levels) if row[4] is not None and row[4].ends is not None]
    for number, (above, below) in enumerate(PAIRS):
        for nth, level in enumerate(levels):
            rows = [(batch, r) for a, b, batch, at, r in found if (a, b, at) == (above, below, level) and r and r.ends]
            if rows:
                spread = [[r.value - r.ends[0] for _, r in rows], [r.ends[1] - r.value for _, r in rows]]  # type: ignore[index]
                values = [batch for batch, _ in rows], [r.value for _, r in rows]
                style = line_style(nth) | point_style(nth) | {"color": color_of(number)}
                label = f"{above} / {below}, {level:.2f}"
                left.errorbar(*values, yerr=spread, ms=4, capsize=3, label=label, **style)
    for number, name in enumerate(dict.fromkeys(arm.optimizer for arm in arms)):
        points = []
        for arm in arms:
            reached = crossings(arm, levels[-1]) if arm.optimizer == name else None
            if reached is not None:
                model, iteration = arm.operations
                steps, tokens = fmean(c.step for c in reached.values()), fmean(c.tokens for c in reached.values())
                points.append((steps, (model * tokens + iteration * steps) / 1e12))
        if points:
            right.plot(*zip(*points, strict=True), ms=4, label=name, **line_style(number) | point_style(number))
    left.axhline(1, color="gray", lw=0.8)
    left.set(xscale="log", xlabel="batch, tokens", ylabel="ratio of tokens to a loss")
    right.set(
        xscale="log", yscale="log", xlabel="steps", ylabel="TFLOP", title=f"to a training loss of {levels[-1]:.2f}"
    )
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    figure.tight_layout()
    save_figure(figure, path)


def _work(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("batches", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", metavar="FILE.toml", help="the sweep")
    parser.add_argument("--losses", metavar="X,X", help="descending; default: three that all runs reach, 0.2 apart")
    parser.add_argument("--output-dir", metavar="FOLDER", help="folder of the sweep's runs; default: runs/sweep-NAME")
    parser.add_argument("--picture", metavar="FILE.png", help="default: none")
    parser.add_argument("--page", metavar="FILE.md", type=Path, help="put the tables between the marks of this page")
    options = parser.parse_args(argv)
    sweep = read_sweep(options.file)
    arms = read_arms(sweep, SweepFolder.of(sweep, options.output_dir).results(sweep))
    counted = [record for arm in arms if not arm.obstacle for record in arm.records.values()]
    if not counted:
        raise InputError(options.file, "has no arm with all seeds at its best rate yet; run the sweep")
    levels = common_levels(counted, NUM_LEVELS, SPACING)
    if options.losses:
        try:
            levels = sorted(map(float, options.losses.split(",")), reverse=True)
        except ValueError:
            raise InputError("--losses", f"{options.losses!r} is no list of numbers with commas between them") from None
    tables = {"ratios": ratios_table(arms, levels), "costs": costs_table(arms, levels)}
    if options.page is None:
        print(*tables.values(), *(f"- {arm.arm.name}: {arm.obstacle}" for arm in arms if arm.obstacle), sep="\n\n")
    else:
        write_beside(options.page, fill_marks(read_text(options.page, "--page"), tables, tables.__getitem__))
    if options.picture:
        plot(arms, levels, Path(options.picture))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables. Returns the exit code: 0, or 2 for bad input, told in one sentence."""
    return run_script(lambda: _work(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
