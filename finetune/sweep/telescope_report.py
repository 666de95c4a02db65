"""Tables, picture and recipe of a telescoping sweep: its costs, and its optima by width. No torch in here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from finetune.compare import align
from finetune.config.reading import RECIPES, read_values
from finetune.config.recipe import Recipe
from finetune.storage.plots import new_figure, save_figure
from finetune.storage.run_dir import write_beside
from finetune.sweep.costs import HOUR, predict
from finetune.sweep.fits import grid_losses, mean_losses
from finetune.sweep.plan import Results
from finetune.sweep.records import latest
from finetune.sweep.stages import Stage
from finetune.sweep.telescope import Telescope
from finetune.sweep.transfer import draw_losses


def costs_text(
    telescope: Telescope,
    stages: Sequence[Stage],
    records: Sequence[Mapping[str, Any]],
    probes: Mapping[str, Mapping[str, Any]],
) -> str:
    """Return a table of core-hours by width, predicted and measured, and what a full grid at the last width costs.

    Args:
        telescope: the sweep.
        stages: of `list_stages`; grids behind them have the sizes that they get without an extension.
        records: of its runs.
        probes: of `run_probes` for `Telescope.costs`; what they lack is not predicted.
    """
    results = latest(records)
    arms = telescope.costs().arms
    each = {w: predict(arms[f"w{w}"], {}, probes.get(f"w{w}")).seconds for w in (*telescope.widths, telescope.to)}
    rows = [("width", "grid", "seeds", "runs", "done", "core-hours of each", "predicted", "measured")]
    predicted: list[float | None] = []
    measured = 0.0
    for number, width in enumerate(telescope.widths):
        stage = stages[number] if number < len(stages) else None
        sizes = tuple(map(len, stage.axes)) if stage else telescope.points_at(number)
        runs, done = math.prod(sizes) * len(telescope.seeds), _seconds(stage, results)
        seconds = each[width]
        predicted.append(None if seconds is None else runs * seconds)
        measured += sum(done)
        grid = " x ".join(map(str, sizes))
        figures = (_hours(seconds), _hours(predicted[-1]), _hours(sum(done)))
        rows.append((str(width), grid, str(len(telescope.seeds)), str(runs), str(len(done)), *figures))
    final = each[telescope.to]
    rows.append((f"{telescope.to}, the run itself", "", "", "1", "", _hours(final), _hours(final), ""))
    whole = None if None in predicted else sum(seconds or 0.0 for seconds in predicted)
    summary = f"the grids: {_hours(whole)} core-hours predicted, {_hours(measured)} measured"
    if final is not None:
        full = math.prod(telescope.points_at(0)) * len(telescope.seeds)
        summary += f"; the first grid at width {telescope.to} would take {_hours(full * final)}"
    return f"{align(rows, left=2)}\n\n{summary}"


def _hours(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds / HOUR:.3f}"


def _seconds(stage: Stage | None, results: Results) -> list[float]:
    """Return the CPU seconds of all runs of a grid that have ended."""
    arms = stage.sweep.arms if stage else {}
    return [record["metrics"]["core_seconds"] for run, record in results.items() if run.arm in arms]


def optima_text(telescope: Telescope, stages: Sequence[Stage]) -> str:
    """Return a table of the optimum by width."""
    rows = [("width", "grid", "loss", *(f"best {name}, with its 95% interval" for name in telescope.tuned))]
    notes = []
    for stage in stages:
        grid = ", ".join(f"{a[0]:g} to {a[-1]:g}" for a in stage.axes)
        optimum = stage.optimum
        if stage.best is None or optimum is None or optimum.point is None:
            rows.append((str(stage.width), grid, "-", *("-" for _ in telescope.tuned)))
            notes.append(f"- {stage.obstacle or f'the grid at width {stage.width} is not done'}")
            continue
        values = []
        for i, best in enumerate(stage.best):
            half = None if optimum.half_widths is None else optimum.half_widths[i]
            x = optimum.point[i]
            ends = "-" if half is None else f"{2 ** (x - half):.3g} to {2 ** (x + half):.3g}"
            values.append(f"{best:g} ({ends})")
        rows.append((str(stage.width), grid, f"{optimum.height:.4f}", *values))
    title = (
        "minimum of a quadratic fit in log2 of each option; the interval is Student's t, of the fit's covariance, a "
        "level for each seed fitted"
    )
    return "\n".join([title, align(rows, left=2), *notes])


def write_recipe(telescope: Telescope, best: Sequence[float], file: Path) -> None:
    """Write the recipe with the values that were found, for the width that they are for.

    Raises:
        OSError: the file cannot be written.
    """
    values, _ = read_values(telescope.recipe, RECIPES, Recipe)
    if values["name"] == Path(telescope.recipe).stem:
        del values["name"]  # the new file's own
    values |= telescope.options(telescope.to) | dict(zip(telescope.tuned, best, strict=True))
    widths = ", ".join(map(str, telescope.widths))
    head = f"# {Path(telescope.recipe).stem} with {', '.join(telescope.tuned)} of grids at widths {widths}; scaling: "
    write_beside(file, f"{head}{telescope.scaling}.\n{yaml.safe_dump(values, sort_keys=False)}")


def plot_rates(telescope: Telescope, stages: Sequence[Stage], records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the loss over the learning rate for each width, at the other options' values nearest to the optimum.

    Args:
        telescope: the sweep.
        stages: those that are results are drawn, with their optimum and its interval.
        records: of its runs.
        path: the .png to write; a reader sees the old picture or the new one.

    Raises:
        OSError: the file cannot be written.
    """
    figure = new_figure(7)
    axes = figure.add_axes((0.1, 0.12, 0.87, 0.8))
    results = latest(records)
    for number, stage in enumerate(stages):
        optimum = stage.optimum
        losses = grid_losses(stage.sweep.arms.values(), results, telescope.tuned[1:])
        if stage.best is None or optimum is None or optimum.point is None or losses is None:
            continue
        means = mean_losses(losses)
        rest = min({point[1:] for point in means}, key=lambda other: math.dist(other, optimum.point[1:]))  # type: ignore[index]
        curve = {point[0]: mean for point, mean in means.items() if point[1:] == rest}
        draw_losses(axes, number, f"width {stage.width}", curve, optimum)
    title = f"{Path(telescope.recipe).stem}, scaling {telescope.scaling}; stars: fitted minima"
    axes.set(xlabel="learning rate (of the recipe's own width)", ylabel="validation loss, nats per token", title=title)
    axes.legend()
    save_figure(figure, path)
