"""Grids of a telescoping sweep, out of its records: how far they are, their optimum, where they grow. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.config.options import flag
from finetune.sweep.fits import Optimum, find_optimum, grid_losses
from finetune.sweep.plan import results_of
from finetune.sweep.spec import Sweep
from finetune.sweep.telescope import Telescope


@dataclass(frozen=True)
class Stage:
    """The grid of one width, as far as it has come.

    Args:
        width: of the model.
        axes: values of each tuned option, ascending, with those that were added.
        sweep: its runs.
        optimum: of its losses; None while runs are open or have failed, and where all diverged.
        obstacle: why it is no result, with the way out; "" where it is one, or may become one.
    """

    width: int
    axes: tuple[tuple[float, ...], ...]
    sweep: Sweep
    optimum: Optimum | None = None
    obstacle: str = ""

    @property
    def best(self) -> tuple[float, ...] | None:
        """The value of each tuned option at the optimum, to 4 digits; None where the grid is no result."""
        if self.optimum is None or self.optimum.point is None or self.obstacle:
            return None
        return tuple(float(f"{2**x:.4g}") for x in self.optimum.point)


def list_stages(telescope: Telescope, records: Sequence[Mapping[str, Any]], where: str) -> list[Stage]:
    """Return the grids up to the first one that is no result yet.

    Args:
        telescope: the sweep.
        records: of its runs, oldest first.
        where: their file.
    """
    stages: list[Stage] = []
    axes = telescope.first_axes()
    for number, width in enumerate(telescope.widths):
        if stages:
            axes = telescope.next_axes(number, stages[-1].axes, stages[-1].best or ())
        stage = _grown(telescope, width, axes, records, where)
        stages.append(stage)
        if stage.best is None:
            break
    return stages


def _grown(
    telescope: Telescope,
    width: int,
    axes: tuple[tuple[float, ...], ...],
    records: Sequence[Mapping[str, Any]],
    where: str,
) -> Stage:
    """Return a grid with the values that were added while its optimum was at an end."""
    left = telescope.extend
    while True:
        sweep = telescope.sweep(width, axes)
        losses = grid_losses(sweep.arms.values(), results_of(sweep, records, where), telescope.tuned[1:])
        if losses is None:
            return Stage(width, axes, sweep)
        optimum = find_optimum(losses)
        if optimum is None or not any(optimum.edges) or not left:
            return Stage(width, axes, sweep, optimum, _obstacle(telescope, width, axes, optimum))
        axes = tuple(_longer(axis, edge) for axis, edge in zip(axes, optimum.edges, strict=True))
        left -= 1


def _longer(axis: tuple[float, ...], edge: int) -> tuple[float, ...]:
    """Return an axis with one value more at the end that `edge` names: -1 the lower one, 1 the upper one, 0 none."""
    if edge < 0:
        return (float(f"{axis[0] ** 2 / axis[1]:.4g}"), *axis)
    return (*axis, float(f"{axis[-1] ** 2 / axis[-2]:.4g}")) if edge else axis


def _obstacle(telescope: Telescope, width: int, axes: Sequence[Sequence[float]], optimum: Optimum | None) -> str:
    if optimum is None:
        return f"every run at width {width} diverged; give lower --rates and another --output-dir"
    for name, axis, edge in zip(telescope.tuned, axes, optimum.edges, strict=True):
        if edge:
            end, more = ("upper", "higher") if edge > 0 else ("lower", "lower")
            way = f"{more} --rates" if name == "lr" else f"the recipe a {more} {name}"
            return (
                f"the best {flag(name)} at width {width} is at the {end} end of its grid, {axis[0]:g} to {axis[-1]:g}, "
                f"which is no result; raise --extend-rates, or give {way} and another --output-dir"
            )
    if optimum.point is None:
        return (
            f"a quadratic fit to the losses at width {width} has no minimum; give more --seeds or --points, and "
            "another --output-dir"
        )
    return ""
