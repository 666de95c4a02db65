"""Figures of a page as SVG: curves with bands over seeds, losses by rate, and bars. No torch in here.

Lines differ in style as well as in colour, so that a page can be read in black and white.
"""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from finetune.page.runs import Line, PageRun
from finetune.storage.plots import color_of, line_style, point_style

MARKED_POINTS, MOST_POINTS = 20, 1000  # of a curve: so few are marked, and more cannot be told apart

_SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
}


@dataclass(frozen=True)
class CurveFigure:
    """A figure of values over steps, which a page has if a run has them.

    Args:
        title: of the figure.
        keys: names of values in metrics.jsonl; of two, the lower and the upper edge of a band.
        label: of the vertical axis, with its unit.
        caption: one sentence on what is shown.
        is_log: whether the axis is logarithmic.
        is_count: whether the values are whole numbers from 0 on.
    """

    title: str
    keys: tuple[str, ...]
    label: str
    caption: str = ""
    is_log: bool = False
    is_count: bool = False


@dataclass(frozen=True)
class DrawnFigure:
    """A figure that is drawn.

    Args:
        title: its heading.
        svg: the element, which has its alternative text.
        caption: what a reader must know of it; may be empty.
    """

    title: str
    svg: str
    caption: str


CURVES = (
    CurveFigure("Validation loss", ("val_loss",), "validation loss (nats per {unit})"),
    CurveFigure("Training loss", ("loss",), "training loss (nats per {unit})", "Averaged over steps."),
    CurveFigure("Learning rate", ("lr",), "learning rate", "Of the optimizer's first group."),
    CurveFigure(
        "Gradient norm", ("grad_norm",), "norm of the gradient", "Before clipping; averaged over steps.", is_log=True
    ),
    CurveFigure(
        "Expert load", ("expert_load_cv",), "variation of the experts' load", "Deviation over mean; 0 is an even load."
    ),
    CurveFigure(
        "Shares of experts",
        ("expert_share_min", "expert_share_max"),
        "share of a layer's tokens",
        "From the least loaded expert of any layer to the most loaded one.",
    ),
    CurveFigure(
        "Dead experts", ("dead_experts",), "experts without a token", "Since the evaluation before.", is_count=True
    ),
    CurveFigure(
        *("Descent kept in 8 bits", ("health/descent",), "share of the descent kept"),
        "Of the watched matrix that keeps least; sound runs keep more than .97, AdaMuon .80.",
    ),
    CurveFigure(
        *("Cosine of 8-bit updates", ("health/update_cosine",), "cosine with the update in 32 bits"),
        "Least of the watched matrices.",
    ),
    CurveFigure(
        *("Error of 8-bit momenta", ("health/momentum_error",), "relative error of the momentum"),
        "Greatest of the watched matrices.",
    ),
    CurveFigure(
        *("Flipped signs", ("health/sign_flips",), "share of elements with a flipped sign"),
        "Greatest of the watched matrices.",
    ),
    CurveFigure(
        *("Codes that are 0", ("health/zero_codes",), "share of zero codes"), "Greatest of the watched matrices."
    ),
    CurveFigure("Balance loss", ("aux_loss",), "balance loss of the routers"),
    CurveFigure("z-loss", ("z_loss",), "z-loss of the routers"),
)

# Measures of --spectra-every, a panel for each group of layers.
SPECTRA = tuple(
    CurveFigure(f"{name} of {kind}", (f"spectra/{kind}/{measure}/",), label, caption)
    for name, measure, label, caption in (
        ("Entropy", "entropy", "normalized SVD entropy", "1 where all singular values are equal."),
        ("Top-10 energy", "top_energy", "share of the 10 largest", "Of the squares of singular values."),
    )
    for kind in ("weights", "updates")
)


def draw_figures(lines: Sequence[Line]) -> list[DrawnFigure]:
    """Draw all figures for which a run has values, curves first.

    Args:
        lines: at most `MOST_LINES` that are drawn.
    """
    drawn = [(line, number) for number, line in enumerate(line for line in lines if line.is_drawn)]
    unit = "token" if {run.versions.get("script") for line in lines for run in line.runs} <= {"pretrain"} else "target"
    figures = [_draw_curves(figure, drawn, unit) for figure in CURVES]
    figures.insert(2, _draw_rates(lines, unit))
    figures += [_draw_groups(figure, drawn) for figure in SPECTRA]
    figures += [
        _draw_bars("Optimizer state", "state (MiB)", drawn, lambda run: _mib(run.values.get("state_bytes"))),
        _draw_bars("Peak of memory", "peak (MiB)", drawn, lambda run: _mib(run.values.get("peak_bytes"))),
        _draw_bars(
            *("Step time", "step time (ms)", drawn, _median_ms),
            caption="Median over steps without the first; thin lines: from the 10th to the 90th percentile.",
            spread=_spread_ms,
        ),
    ]
    return [figure for figure in figures if figure is not None]


def band(runs: Sequence[PageRun], key: str) -> list[tuple[int, float, float, float]]:
    """Return step, mean, lowest and highest value over runs, at the steps that all runs with this value have.

    A value that is not finite in one run is NaN here.
    """
    curves = [dict(zip(*run.curves[key], strict=True)) for run in runs if key in run.curves]
    points = []
    for step in sorted(set.intersection(*map(set, curves))) if curves else ():
        values = [curve[step] for curve in curves]
        if not all(map(math.isfinite, values)):
            values = [math.nan]
        points.append((step, statistics.fmean(values), min(values), max(values)))
    every = max(1, math.ceil(len(points) / MOST_POINTS))
    return points[::every] + ([] if (len(points) - 1) % every == 0 else points[-1:])


def _new_axes(num_lines: int, height: float = 3.3) -> Any:
    """Return the axes of a new figure, with room for a legend of so many lines; `height` in inches."""
    return _new_panels(1, num_lines, height)[0]


def _new_panels(num: int, num_lines: int, height: float) -> list[Any]:
    """Return the axes of a new figure, three beside each other, with one scale for all; `height` in inches of each."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(_SETTINGS):
        columns = min(num, 3)
        rows = math.ceil(num / columns)
        figure = Figure(figsize=(6.4, rows * height + 0.21 * math.ceil(num_lines / 2)), layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for lowest, unused in zip(panels[num - columns :], panels[num:], strict=False):
            lowest.tick_params(labelbottom=True)
            unused.set_axis_off()
        return list(panels[:num])


def _set_whole_ticks(axis: Any) -> None:
    """Let an axis of steps or counts have ticks at whole numbers alone, one where it is short."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))


def _draw_curves(figure: CurveFigure, drawn: Sequence[tuple[Line, int]], unit: str) -> DrawnFigure | None:
    found = [(line, number, [band(line.runs, key) for key in figure.keys]) for line, number in drawn]
    found = [entry for entry in found if all(entry[2])]
    if not found:
        return None
    axes = _new_axes(len(found) if len(drawn) > 1 else 0)
    label, told, has_bands = figure.label.format(unit=unit), [], False
    are_few = max(len(bands[0]) for _, _, bands in found) <= MARKED_POINTS
    for line, number, bands in found:
        steps = [point[0] for point in bands[0]]
        lower, upper = ([point[2] for point in bands[0]], [point[3] for point in bands[-1]])
        style = line_style(number)
        if lower != upper:
            axes.fill_between(steps, lower, upper, color=style["color"], alpha=0.2, lw=0)
        if len(bands) == 1:
            means = [point[1] for point in bands[0]]
            few = {**point_style(number), "ms": 4} if are_few else {}
            axes.plot(steps, means, label=_named(line), **style | few)
            told.append(f"{line.name}: {means[0]:.4g} at step {steps[0]}, {means[-1]:.4g} at step {steps[-1]}")
            has_bands |= lower != upper
        else:
            axes.plot(steps, lower, **style)
            axes.plot(steps, upper, label=_named(line), **style)
            told.append(f"{line.name}: {lower[-1]:.4g} to {upper[-1]:.4g} at step {steps[-1]}")
    axes.set(xlabel="step", ylabel=label)
    _set_whole_ticks(axes.xaxis)
    if figure.is_count:
        axes.set_ylim(bottom=0)
        _set_whole_ticks(axes.yaxis)
    if figure.is_log and all(point[2] > 0 for _, _, bands in found for points in bands for point in points):
        axes.set_yscale("log")
        for axis_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis_formatter("{x:g}")
    caption = " ".join(filter(None, [figure.caption, "Bands: lowest to highest over seeds." if has_bands else ""]))
    return _finish(axes, figure.title, f"{label} over steps. {'; '.join(told)}.", caption, len(drawn) > 1)


def _draw_groups(figure: CurveFigure, drawn: Sequence[tuple[Line, int]]) -> DrawnFigure | None:
    """Draw a measure of spectra over steps, a panel for each group of layers that a run has."""
    (start,) = figure.keys
    keys = (key for line, _ in drawn for run in line.runs for key in run.curves if key.startswith(start))
    groups = list(dict.fromkeys(keys))
    if not groups:
        return None
    panels, told = _new_panels(len(groups), len(drawn) if len(drawn) > 1 else 0, 2.1), []
    for axes, key in zip(panels, groups, strict=True):
        axes.set_title(key.removeprefix(start), fontsize=10)
        axes.grid(visible=True, color="#dddddd", lw=0.6)
        for line, number in drawn:
            points = band(line.runs, key)
            if not points:
                continue
            steps, means, lower, upper = map(list, zip(*points, strict=True))
            if lower != upper:
                axes.fill_between(steps, lower, upper, color=color_of(number), alpha=0.2, lw=0)
            label = _named(line) if axes is panels[0] else None
            axes.plot(steps, means, label=label, ms=3, **line_style(number) | point_style(number))
            told.append(f"{line.name}, {key.removeprefix(start)}: {means[-1]:.4g} at step {steps[-1]}")
    _set_whole_ticks(panels[0].xaxis)  # which the others share
    panels[0].figure.supxlabel("step", fontsize=10)
    panels[0].figure.supylabel(figure.label, fontsize=10)
    alt = f"{figure.label} over steps, by group of layers. {'; '.join(told)}."
    return _finish(panels[0], figure.title, alt, figure.caption, len(drawn) > 1)


def _draw_rates(lines: Sequence[Line], unit: str) -> DrawnFigure | None:
    """Draw final validation losses over learning rates, of arms that have several rates."""
    arms: dict[str, dict[float, list[float]]] = {}
    for line in lines:
        losses = [run.values["val_loss"] for run in line.runs if run.values["val_loss"] is not None]
        if line.runs[0].rate and losses and all(map(math.isfinite, losses)):
            arms.setdefault(line.arm, {}).setdefault(line.runs[0].rate, []).extend(losses)
    arms = {arm: dict(sorted(rates.items())) for arm, rates in arms.items()}
    if all(len(rates) < 2 for rates in arms.values()):
        return None
    axes, told = _new_axes(len(arms)), []
    for number, (arm, rates) in enumerate(arms.items()):
        means = [statistics.fmean(losses) for losses in rates.values()]
        ranges = [[m - min(v) for m, v in zip(means, rates.values(), strict=True)]]
        ranges.append([max(v) - m for m, v in zip(means, rates.values(), strict=True)])
        style = line_style(number) | point_style(number)
        axes.errorbar(list(rates), means, ranges, label=arm, ms=5, capsize=3, **style)
        best = min(range(len(means)), key=means.__getitem__)
        told.append(f"{arm}: lowest {means[best]:.4g} at {list(rates)[best]:g}")
    axes.set_xscale("log")
    rates_shown = sorted({rate for rates in arms.values() for rate in rates})
    labelled = _far_apart(rates_shown)
    axes.set_xticks(rates_shown, [f"{rate:g}" if rate in labelled else "" for rate in rates_shown], rotation=30)
    axes.minorticks_off()
    label = f"validation loss (nats per {unit})"
    axes.set(xlabel="peak learning rate", ylabel=label)
    caption = "After the last step; means over seeds, bars from the lowest to the highest."
    return _finish(axes, "Loss by learning rate", f"{label} by learning rate. {'; '.join(told)}.", caption, True)


def _far_apart(rates: Sequence[float]) -> set[float]:
    """Return those of ascending rates whose labels do not overlap on a log axis: both ends, and at most 9 between."""
    first, last = rates[0], rates[-1]
    kept, ratio = [first], (last / first) ** 0.1 * (1 - 1e-9)
    for rate in rates[1:-1]:
        if rate / kept[-1] >= ratio and last / rate >= ratio:
            kept.append(rate)
    return {*kept, last}


def _mib(num_bytes: float | None) -> float | None:
    return None if num_bytes is None else num_bytes / 2**20


def _median_ms(run: PageRun) -> float | None:
    return statistics.median(run.step_ms) if run.step_ms else None


def _spread_ms(run: PageRun) -> tuple[float, float]:
    deciles = statistics.quantiles(run.step_ms, n=10, method="inclusive") if len(run.step_ms) > 1 else run.step_ms
    return deciles[0], deciles[-1]


def _draw_bars(
    title: str,
    label: str,
    drawn: Sequence[tuple[Line, int]],
    value_of: Callable[[PageRun], float | None],
    caption: str = "",
    spread: Callable[[PageRun], tuple[float, float]] | None = None,
) -> DrawnFigure | None:
    """Draw a bar for each line: the mean over its runs that have the value."""
    found = []
    for line, _ in drawn:
        runs = [run for run in line.runs if value_of(run) is not None]
        if runs:
            spreads = [spread(run) for run in runs] if spread else []
            found.append((line.name, statistics.fmean(map(value_of, runs)), spreads))  # type: ignore[arg-type]
    if not found:
        return None
    axes = _new_axes(0, 0.9 + 0.32 * len(found))
    names, values, all_spreads = zip(*found, strict=True)
    places = range(len(found))
    axes.barh(places, values, height=0.62, color="#b8cfe0", edgecolor="black", lw=0.7)
    for place, spreads in zip(places, all_spreads, strict=True):
        if spreads:
            axes.plot([min(low for low, _ in spreads), max(high for _, high in spreads)], [place] * 2, "k-", lw=1)
    texts = [f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in values]
    ends = [max([value, *(high for _, high in s)]) for value, s in zip(values, all_spreads, strict=True)]
    for place, end, text in zip(places, ends, texts, strict=True):
        axes.annotate(text, (end, place), (4, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, max(ends) * 1.18 or 1)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    told = "; ".join(f"{name}: {text}" for name, text in zip(names, texts, strict=True))
    return _finish(axes, title, f"{label}. {told}.", caption, False)


def _named(line: Line) -> str:
    return line.name if len(line.runs) == 1 else f"{line.name} ({len(line.runs)} seeds)"


def _finish(axes: Any, title: str, alt: str, caption: str, has_legend: bool) -> DrawnFigure:
    axes.grid(visible=True, color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    if has_legend:
        axes.figure.legend(loc="outside lower center", ncols=2, frameon=False, handlelength=3.6, fontsize=9)
    return DrawnFigure(title, _svg(axes.figure, title, alt), caption)


def _svg(figure: Any, title: str, alt: str) -> str:
    """Return a figure as an SVG element, the same bytes for the same figure."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({**_SETTINGS, "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    head = re.sub(r' (width|height)="[^"]*"', "", text[: text.index(">")])
    return f'{head} role="img" aria-label="{escape(alt)}"{text[text.index(">") :]}'.strip()
