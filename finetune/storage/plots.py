"""Pictures of losses over steps, of one run or several, and the style of lines in every picture. No torch in here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Steps over which a training loss is averaged in a picture: this share of all, and never more than so many.
SMOOTHED_SHARE, SMOOTHED_AT_MOST = 0.05, 100
# Okabe and Ito's colours without the palest, and dashes: 7 x 8 lines that differ, eight of them in black and white too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8A6D00", "#000000", "#56B4E9")
DASHES: tuple[Any, ...] = (
    *("-", (0, (6, 2)), (0, (1.2, 1.4)), (0, (7, 2, 1.2, 2)), (0, (3, 1.2))),
    *((0, (12, 3)), (0, (7, 2, 1.2, 2, 1.2, 2)), (0, (1.2, 4))),
)
MARKERS = "os^DvPX<"
MOST_LINES = len(COLORS) * len(DASHES)


@dataclass(frozen=True)
class LossCurve:
    """Losses of one run, in nats per token or target.

    Args:
        name: of the run.
        metrics: records of metrics.jsonl, in the order of their steps.
        before: validation loss of the weights before the first step; None where it is not known.
    """

    name: str
    metrics: Sequence[dict[str, Any]]
    before: float | None = None

    @property
    def training(self) -> tuple[list[int], list[float]]:
        """Return steps and training losses."""
        return [m["step"] for m in self.metrics], [m["loss"] for m in self.metrics]

    @property
    def validation(self) -> tuple[list[int], list[float]]:
        """Return steps and validation losses, from step 0 on."""
        found = [] if self.before is None else [(0, self.before)]
        found += [(m["step"], m["val_loss"]) for m in self.metrics if m.get("val_loss") is not None]
        return [step for step, _ in found], [loss for _, loss in found]

    @property
    def expert_load(self) -> tuple[list[int], list[float]]:
        """Return steps and coefficients of variation of the load of experts; nothing for a model without experts."""
        found = [(m["step"], m["expert_load_cv"]) for m in self.metrics if "expert_load_cv" in m]
        return [step for step, _ in found], [value for _, value in found]


def smooth(values: Sequence[float]) -> list[float]:
    """Return the exponential moving averages of losses, each divided by the weight of what it has seen.

    The first value is the first loss itself. The average spans `SMOOTHED_SHARE` of all values.
    """
    span = min(SMOOTHED_AT_MOST, max(1.0, SMOOTHED_SHARE * len(values)))
    return moving_averages(values, 1 - 2 / (span + 1))


def moving_averages(values: Sequence[float], beta: float) -> list[float]:
    """Return the exponential moving averages of values, each divided by the weight of what it has seen."""
    averages, total, weight = [], 0.0, 0.0
    for value in values:
        total = beta * total + (1 - beta) * value
        weight = beta * weight + (1 - beta)
        averages.append(total / weight)
    return averages


def spectra_values(spectra: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Return `spectra/KIND/MEASURE/GROUP` -> value, of the `spectra` of a step; kinds are weights and updates."""
    return {
        f"spectra/{kind}/{measure}/{group}": value
        for kind, groups in spectra.items()
        for group, measures in groups.items()
        for measure, value in measures.items()
    }


def color_of(number: int) -> str:
    """Return the colour of one line among several."""
    return COLORS[number % len(COLORS)]


def line_style(number: int) -> dict[str, Any]:
    """Return colour, dashes and width of one line among several, as arguments of matplotlib's `plot`."""
    return {"color": color_of(number), "ls": DASHES[number % len(DASHES)], "lw": 1.5}


def point_style(number: int) -> dict[str, Any]:
    """Return colour and marker of points of one kind among several, as arguments of matplotlib's `plot`."""
    return {"color": color_of(number), "marker": MARKERS[number % len(MARKERS)]}


def new_figure(width: float, height: float = 4.5, layout: Any = None) -> Any:
    """Return an empty figure without a window, of this size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a figure as .png; a reader sees the old picture or the new one.

    Raises:
        OSError: the file cannot be written.
    """
    beside = path.with_name(f".{path.name}")
    figure.savefig(beside, dpi=120, format="png", metadata=metadata)
    beside.replace(path)


def plot_losses(
    curves: Sequence[LossCurve], path: Path, title: str, reference: tuple[str, float] | None = None
) -> None:
    """Draw smoothed training losses and validation losses over steps; of a single run also the losses as they are.

    Where a model has experts, their load stands below.

    Args:
        curves: of the runs.
        path: the .png to write; a reader sees the old picture or the new one.
        title: of the figure.
        reference: name and height of a line, in nats per token; not drawn where the height is NaN.

    Raises:
        OSError: the file cannot be written.
    """
    has_load = any(curve.expert_load[0] for curve in curves)
    figure = new_figure(7, 6 if has_load else 4.5)
    axes = figure.add_axes((0.1, 0.37, 0.87, 0.57) if has_load else (0.1, 0.11, 0.87, 0.81))
    if has_load:
        _plot_loads(figure.add_axes((0.1, 0.09, 0.87, 0.22), sharex=axes), curves)
    alone = len(curves) == 1
    for number, curve in enumerate(curves):
        color = color_of(number)
        steps, losses = curve.training
        if alone:
            axes.plot(steps, losses, color=color, lw=0.8, alpha=0.3)
        smoothed = smooth(losses)
        what = "training" if smoothed == losses else "training, smoothed"  # as a short run's losses are
        axes.plot(steps, smoothed, color=color, lw=1.2, label=what if alone else curve.name)
        label = "validation" if alone else "validation, dashed" if number == len(curves) - 1 else None
        axes.plot(*curve.validation, "o--", color=COLORS[1] if alone else color, ms=4, label=label)
    if reference is not None and math.isfinite(reference[1]):
        axes.axhline(reference[1], color="gray", ls=":", label=reference[0])
    axes.set(xlabel=None if has_load else "step", ylabel="nats per token", title=title)
    axes.legend()
    save_figure(figure, path)


def _plot_loads(axes: Any, curves: Sequence[LossCurve]) -> None:
    """Draw smoothed coefficients of variation of the load of experts; of a single run also as they are."""
    for number, curve in enumerate(curves):
        steps, values = curve.expert_load
        if len(curves) == 1:
            axes.plot(steps, values, color=COLORS[0], lw=0.8, alpha=0.3)
        axes.plot(steps, smooth(values), color=color_of(number), lw=1.2)
    axes.set(xlabel="step", ylabel="load of experts, CV")
    axes.set_ylim(bottom=0)
