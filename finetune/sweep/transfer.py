"""Slope of the best learning rate over the width, out of the records of a sweep whose arms have widths. No torch here.

Arms that differ in `width` alone are one series; the rules of `scaling` are series of their own. At the width that the
recipe has without `width` all rules are one: an arm of that width without `scaling` belongs to every series.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from finetune.compare import align
from finetune.config.errors import InputError
from finetune.config.width import WIDTH
from finetune.storage.plots import line_style, new_figure, point_style
from finetune.sweep.fits import (
    RESAMPLES,
    GridLoss,
    Optimum,
    Slope,
    find_optimum,
    grid_losses,
    mean_losses,
    slope_over_width,
)
from finetune.sweep.plan import Results, list_runs
from finetune.sweep.records import loss_of
from finetune.sweep.spec import Sweep, SweepArm

RULE = "scaling"
ENOUGH = (5, 3)  # rates and seeds of a width, fewer of which a note tells


@dataclass(frozen=True)
class WidthSeries:
    """Arms that differ in width alone.

    Args:
        label: the rule, and options that not all arms of the sweep have.
        losses: width -> losses of its grid, ascending; None while runs are open or have failed.
        optima: width -> optimum of its grid; None where there is none.
        slope: None unless every optimum is interior, and there are two widths or more.
    """

    label: str
    losses: Mapping[int, list[GridLoss] | None]
    optima: Mapping[int, Optimum | None]
    slope: Slope | None


def widths_of(arm: SweepArm) -> tuple[int, int]:
    """Return the hidden size of an arm's model, and that of the model as it is written."""
    recipe = vars(arm.recipe)
    own = next((int(recipe["model"][name]) for name in WIDTH if name in recipe["model"]), 0)
    return recipe["width"] or own, own


def list_series(sweep: Sweep, results: Results) -> list[WidthSeries]:
    """Return the series of a sweep, in the order of their first arms.

    Raises:
        InputError: the grids are not full, or no series has two widths.
    """
    if sweep.rates_on_seed is not None:
        raise InputError(str(sweep.file), "--slopes needs all rates on all seeds; leave out `rates_on_seed`")
    groups: dict[tuple[str, str], dict[int, SweepArm]] = {}
    shared: dict[str, dict[int, SweepArm]] = {}
    for arm in sweep.arms.values():
        others = {key: value for key, value in arm.options.items() if key not in ("width", RULE)}
        rest = ", ".join(f"{key}={value}" for key, value in others.items() if not _is_common(sweep, key, value))
        width, own = widths_of(arm)
        rule = str(arm.options.get(RULE, "none"))
        place = shared.setdefault(rest, {}) if width == own else groups.setdefault((rule, rest), {})
        place[width] = arm
    series = []
    for (rule, rest), arms in groups.items():
        both = dict(sorted({**shared.get(rest, {}), **arms}.items()))
        series.append(_read_series(", ".join(filter(None, (rule, rest))), both, results))
    if all(len(each.losses) < 2 for each in series):
        raise InputError(str(sweep.file), "--slopes needs arms of several widths; give them `width`")
    return series


def _is_common(sweep: Sweep, key: str, value: Any) -> bool:
    return all(arm.options.get(key) == value for arm in sweep.arms.values())


def _read_series(label: str, arms: Mapping[int, SweepArm], results: Results) -> WidthSeries:
    losses: dict[int, list[GridLoss] | None] = {width: grid_losses([arm], results) for width, arm in arms.items()}
    optima = {width: None if found is None else find_optimum(found) for width, found in losses.items()}
    known = {width: found for width, found in losses.items() if found is not None}
    is_whole = len(known) > 1 and all(optimum is not None and optimum.is_interior for optimum in optima.values())
    return WidthSeries(label, losses, optima, slope_over_width(known) if is_whole else None)


def of_done_seeds(sweep: Sweep, results: Results) -> Sweep | None:
    """Return the sweep of those seeds alone of which every run is done; None without one."""
    runs = list_runs(sweep, results)
    is_open = {run.seed for run in runs if loss_of(results.get(run)) is None}
    seeds = tuple(sorted({run.seed for run in runs} - is_open))
    arms = {name: replace(arm, seeds=seeds) for name, arm in sweep.arms.items()}
    return replace(sweep, arms=arms) if seeds else None


def slopes_rows(series: list[WidthSeries]) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]], list[str]]:
    """Return the tables, headers first: optimum by width, slope of each series; and what is wrong with the grids.

    The last column of the slopes is what the narrowest width's best rate costs at the widest, by its parabola.
    """
    rows: list[tuple[str, ...]] = [
        ("series", "width", "rates", "seeds", "loss", "best rate", "95% interval", "interior")
    ]
    intervals = ("95%, bootstrap over seeds", "95%, t of the seeds' slopes")
    slopes: list[tuple[str, ...]] = [("series", "slope", *intervals, "cost, nats")]
    notes = []
    for each in series:
        for width, losses in each.losses.items():
            rows.append((each.label, str(width), *_cells(losses, each.optima[width])))
            notes += [f"- {each.label}, width {width}: {text}" for text in _notes(losses, each.optima[width])]
        slope = each.slope
        if slope is None:
            slopes.append((each.label, "-", "-", "-", "-"))
            continue
        ends = slope.by_seed.ends if slope.by_seed else None
        narrowest, *_, widest = each.optima.values()
        cost = _cost(narrowest, widest)
        slopes.append((each.label, f"{slope.value:+.3f}", _interval(slope.bootstrap), _interval(ends), cost))
    return rows, slopes, notes


def _cost(narrowest: Optimum | None, widest: Optimum | None) -> str:
    if narrowest is None or narrowest.point is None or widest is None or widest.point is None:
        return "-"
    return f"{widest.curvature[0] * (narrowest.point[0] - widest.point[0]) ** 2:.4f}"


def slopes_text(series: list[WidthSeries]) -> str:
    """Return the tables and notes of `slopes_rows` as text."""
    rows, slopes, notes = slopes_rows(series)
    head = "minimum of a parabola in log2 of the rate; interval of the fit's covariance, with a level for each seed"
    tail = (
        f"slope of log2 of the best rate over log2 of the width; bootstrap: {RESAMPLES:,} resamples of the seeds, the "
        "same at all widths; of 3 seeds it has about their least and largest slope as ends, which cover 3 of 4 times; "
        "cost: how far the widest width's parabola is above its minimum at the best rate of the narrowest one"
    )
    return "\n\n".join(
        [f"{head}\n{align(rows, left=1)}", f"{tail}\n{align(slopes, left=1)}", *filter(None, ["\n".join(notes)])]
    )


def _notes(losses: list[GridLoss] | None, optimum: Optimum | None) -> list[str]:
    """Return what is wrong with the grid of a width."""
    if losses is None:
        return ["runs are open or failed"]
    if optimum is None:
        return ["every run diverged; give lower `rates`"]
    notes = []
    if optimum.edges[0]:
        end, more = ("upper", "higher") if optimum.edges[0] > 0 else ("lower", "lower")
        notes.append(f"the best rate is at the {end} end of its grid, which is no result; add {more} `rates`")
    elif optimum.point is None:
        notes.append("a parabola through the losses has no minimum; add `rates` or `seeds`")
    if any(count < least for count, least in zip(_counts(losses), ENOUGH, strict=True)):
        notes.append(f"fewer than {ENOUGH[0]} rates x {ENOUGH[1]} seeds")
    return notes


def _counts(losses: list[GridLoss]) -> tuple[int, int]:
    """Return the numbers of rates and of seeds."""
    return len({each.point for each in losses}), len({each.seed for each in losses})


def _cells(losses: list[GridLoss] | None, optimum: Optimum | None) -> tuple[str, ...]:
    if losses is None:
        return ("-",) * 6
    counts = tuple(map(str, _counts(losses)))
    if optimum is None or optimum.point is None:
        return (*counts, "-", "-", "-", "NO")
    x, half = optimum.point[0], optimum.half_widths[0] if optimum.half_widths else None
    ends = "-" if half is None else f"{2 ** (x - half):.3g} to {2 ** (x + half):.3g}"
    return (*counts, f"{optimum.height:.4f}", f"{2**x:.4g}", ends, "yes" if optimum.is_interior else "NO")


def _interval(ends: tuple[float, float] | None) -> str:
    return "not resolved" if ends is None else f"{ends[0]:+.3f} to {ends[1]:+.3f}"


def draw_losses(axes: Any, number: int, label: str, losses: Mapping[float, float], optimum: Optimum | None) -> None:
    """Draw the losses of one grid over its learning rates, and a star with its interval at the fitted minimum.

    Args:
        axes: of matplotlib.
        number: of the grid, which has the color.
        label: of the grid.
        losses: log2 of a rate -> mean loss; infinite ones are left out.
        optimum: of the grid; its first axis is the rate. None, or one without a minimum: no star.
    """
    style = line_style(number) | point_style(number)
    curve = [(2**x, loss) for x, loss in sorted(losses.items()) if math.isfinite(loss)]
    axes.plot(*zip(*curve, strict=True), ms=4, label=label, **style)
    if optimum is not None and optimum.point is not None and optimum.height is not None:
        x, half = optimum.point[0], optimum.half_widths[0] if optimum.half_widths else 0.0
        spread = [[2**x - 2 ** (x - half)], [2 ** (x + half) - 2**x]]
        axes.errorbar([2**x], [optimum.height], xerr=spread, fmt="*", color=style["color"], ms=11, capsize=3)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")


def slopes_figure(series: list[WidthSeries]) -> Any:
    """Return a figure of matplotlib: the loss over the learning rate for each width, a panel a series."""
    figure = new_figure(4.5 * len(series))
    panels = figure.subplots(1, len(series), sharey=True, squeeze=False)[0]
    for axes, each in zip(panels, series, strict=True):
        for number, (width, losses) in enumerate(each.losses.items()):
            if losses is not None:
                means = {point[0]: mean for point, mean in mean_losses(losses).items()}
                draw_losses(axes, number, f"width {width}", means, each.optima[width])
        slope = "no slope" if each.slope is None else f"slope {each.slope.value:+.2f}"
        axes.set(xlabel="learning rate", title=f"{each.label}: {slope}")
        if axes.lines:
            axes.legend()
    panels[0].set_ylabel("validation loss, nats per token")
    figure.tight_layout()
    return figure
