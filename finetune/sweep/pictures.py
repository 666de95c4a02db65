"""Pictures of sweeps: losses over learning rates in log2, with fitted minima. No torch in here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.sweep.fits import Optimum, mean_losses
from finetune.sweep.transfer import WidthSeries


def new_figure(width: float) -> Any:
    """Return an empty figure of this width in inches, without a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.5))
    FigureCanvasAgg(figure)
    return figure


def draw_losses(axes: Any, number: int, label: str, losses: Mapping[float, float], optimum: Optimum | None) -> None:
    """Draw the losses of one grid over its learning rates, and a star with its interval at the fitted minimum.

    Args:
        axes: of matplotlib.
        number: of the grid, which has the color.
        label: of the grid.
        losses: log2 of a rate -> mean loss; infinite ones are left out.
        optimum: of the grid; its first axis is the rate. None, or one without a minimum: no star.
    """
    color = f"C{number % 10}"
    curve = [(2**x, loss) for x, loss in sorted(losses.items()) if math.isfinite(loss)]
    axes.plot(*zip(*curve, strict=True), "o-", color=color, lw=1.2, ms=4, label=label)
    if optimum is not None and optimum.point is not None and optimum.height is not None:
        x, half = optimum.point[0], optimum.half_widths[0] if optimum.half_widths else 0.0
        spread = [[2**x - 2 ** (x - half)], [2 ** (x + half) - 2**x]]
        axes.errorbar([2**x], [optimum.height], xerr=spread, fmt="*", color=color, ms=11, capsize=3)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as .png; a reader sees the old picture or the new one.

    Raises:
        OSError: the file cannot be written.
    """
    beside = path.with_name(f".{path.name}")
    figure.savefig(beside, dpi=120, format="png")
    beside.replace(path)


def plot_series(series: list[WidthSeries], path: Path) -> None:
    """Draw the loss over the learning rate for each width, a panel a series.

    Raises:
        OSError: the file cannot be written.
    """
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
    save_figure(figure, path)
