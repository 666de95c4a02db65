"""Parabolas through losses on a grid: the optimum with its uncertainty, and its slope over the width. No torch here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.sweep.intervals import MeanInterval, mean_interval, t_quantile
from finetune.sweep.plan import Results
from finetune.sweep.records import loss_of
from finetune.sweep.spec import SweepArm, SweepRun

# A parabola holds near its minimum: of a larger grid these many values of each axis, those around the lowest loss.
WINDOW = 5
RESAMPLES = 10_000


@dataclass(frozen=True)
class GridLoss:
    """The loss of one run of a grid, infinite where it diverged; `point` is the log2 of each tuned value."""

    point: tuple[float, ...]
    seed: int
    loss: float


@dataclass(frozen=True)
class Optimum:
    """The minimum of a quadratic fit to the losses of a grid.

    Args:
        lowest: the point of the lowest mean over seeds.
        point: the minimum of the fit; None where it has none.
        half_widths: of the 95% t-intervals of `point`, from the covariance of the fit, in which each seed has a level
            of its own; None where there are no more losses than coefficients.
        edges: of each axis -1 or 1 where the optimum is at the lower or upper end of the grid, else 0.
        height: mean over seeds of the fit at `point`.
        curvature: coefficients of the squares, one an axis; losses per log2 squared.
    """

    lowest: tuple[float, ...]
    point: tuple[float, ...] | None
    half_widths: tuple[float, ...] | None
    edges: tuple[int, ...]
    height: float | None = None
    curvature: tuple[float, ...] = ()

    @property
    def is_interior(self) -> bool:
        """Whether the grid has its optimum inside."""
        return self.point is not None and not any(self.edges)


def grid_losses(arms: Iterable[SweepArm], results: Results, others: Sequence[str] = ()) -> list[GridLoss] | None:
    """Return the losses of a grid; None while runs are open or have failed.

    Args:
        arms: of the grid, which have the same rates and seeds.
        results: of the sweep.
        others: options in which the arms differ, the axes behind that of the rate.
    """
    losses = []
    for arm in arms:
        rest = [math.log2(arm.options[name]) for name in others]
        for rate, seed in itertools.product(arm.rates, arm.seeds):
            loss = loss_of(results.get(SweepRun(arm.name, rate, seed)))
            if loss is None:
                return None
            losses.append(GridLoss((math.log2(rate), *rest), seed, loss))
    return losses


def mean_losses(losses: Sequence[GridLoss]) -> dict[tuple[float, ...], float]:
    """Return the mean over seeds at each point, infinite where one diverged."""
    found: dict[tuple[float, ...], list[float]] = {}
    for each in losses:
        found.setdefault(each.point, []).append(each.loss)
    return {point: sum(values) / len(values) for point, values in sorted(found.items())}


def find_optimum(losses: Sequence[GridLoss]) -> Optimum | None:
    """Return the minimum of a quadratic fit with all products of the axes, and whether the grid has it inside.

    It has where neither the lowest mean nor the minimum of the fit is at an end of an axis. Runs that diverged count
    as values that were tried, and are left out of the fit.

    Args:
        losses: of a full grid on the same seeds, at least three values an axis.

    Returns:
        The optimum; None where all diverged.
    """
    means = mean_losses(losses)
    lowest = min(means, key=lambda point: (means[point], point))
    if math.isinf(means[lowest]):
        return None
    axes = [sorted(set(values)) for values in zip(*means, strict=True)]
    edges = [(x == axis[-1]) - (x == axis[0]) for x, axis in zip(lowest, axes, strict=True)]
    near = [_window(axis, x) for axis, x in zip(axes, lowest, strict=True)]
    usable = [
        each
        for each in losses
        if math.isfinite(means[each.point]) and all(x in axis for x, axis in zip(each.point, near, strict=True))
    ]
    fit = _fit(usable, np.array(lowest))
    if fit is None:
        return Optimum(lowest, None, None, tuple(edges))
    point, half_widths, height, curvature = fit
    for i, (x, axis) in enumerate(zip(point, axes, strict=True)):
        edges[i] = edges[i] or int(x >= axis[-1]) - int(x <= axis[0])
    return Optimum(lowest, point, half_widths, tuple(edges), height, curvature)


def _window(axis: Sequence[float], around: float) -> Sequence[float]:
    start = min(max(0, axis.index(around) - WINDOW // 2), max(0, len(axis) - WINDOW))
    return axis[start : start + WINDOW]


def _fit(losses: Sequence[GridLoss], origin: Any) -> tuple[Any, ...] | None:
    """Return point, half-widths, height and curvature of the minimum of a fit; None where it has none."""
    x = np.array([each.point for each in losses]) - origin
    y = np.array([each.loss for each in losses])
    seeds = sorted({each.seed for each in losses})
    k = x.shape[1]
    pairs = [(i, j) for i in range(k) for j in range(i, k)]
    levels = np.array([[each.seed == seed for seed in seeds] for each in losses], dtype=float)
    design = np.hstack([levels, x, np.stack([x[:, i] * x[:, j] for i, j in pairs], axis=1)])
    found, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    slopes, squares = found[len(seeds) : len(seeds) + k], found[len(seeds) + k :]
    hessian = np.zeros((k, k))
    for (i, j), value in zip(pairs, squares, strict=True):
        hessian[i, j] += value
        hessian[j, i] += value
    if rank < design.shape[1] or np.linalg.eigvalsh(hessian)[0] <= 0:
        return None
    inverse = np.linalg.inv(hessian)
    at = -inverse @ slopes
    height = float(found[: len(seeds)].mean() + slopes @ at / 2)
    half_widths, freedom = None, len(y) - rank
    if freedom > 0:
        change = [np.eye(k)[i] for i in range(k)]  # of the gradient at the minimum, by each coefficient
        change += [np.eye(k)[i] * at[j] + np.eye(k)[j] * at[i] for i, j in pairs]
        jacobian = -inverse @ np.stack(change, axis=1)
        variance = float(np.sum((y - design @ found) ** 2)) / freedom
        covariance = variance * np.linalg.inv(design.T @ design)[len(seeds) :, len(seeds) :]
        errors = np.sqrt(np.diag(jacobian @ covariance @ jacobian.T))
        half_widths = tuple(float(error) * t_quantile(0.975, freedom) for error in errors)
    curvature = tuple(float(hessian[i, i]) / 2 for i in range(k))
    return tuple(float(value) for value in at + origin), half_widths, height, curvature


@dataclass(frozen=True)
class Slope:
    """Slope of the log2 of the best rate over the log2 of the width.

    Args:
        value: by least squares through the optima of the means over seeds.
        bootstrap: ends of the 95% interval of resampled seeds, the same ones at all widths; None where a parabola of
            more than one resample in 40 has no minimum, or there is one seed.
        by_seed: mean and t-interval of the slopes of single seeds; None where one of them has none.
    """

    value: float
    bootstrap: tuple[float, float] | None
    by_seed: MeanInterval | None


def slope_over_width(losses: Mapping[int, Sequence[GridLoss]]) -> Slope | None:
    """Return the slope through the optima of several widths.

    Args:
        losses: width -> losses of a grid of rates, on seeds that all widths have.

    Returns:
        The slope; None where a parabola of the means has no minimum.
    """
    seeds = sorted(set.intersection(*({each.seed for each in found} for found in losses.values())))
    position = np.log2(np.array(list(losses), dtype=float))
    weights = position - position.mean()
    weights /= weights @ weights
    tables = [_table(found, seeds) for found in losses.values()]

    def slopes(shares: Any) -> Any:
        """Return the slope of each row of weights of the seeds [..., seeds]; NaN where one has no minimum."""
        return np.stack([_vertices(x, y @ shares.T) for x, y in tables], axis=1) @ weights

    count = len(seeds)
    (value,) = slopes(np.full((1, count), 1 / count))
    if not math.isfinite(value):
        return None
    each = slopes(np.eye(count))
    by_seed = mean_interval([float(slope) for slope in each]) if np.isfinite(each).all() else None
    drawn = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    found = slopes(np.stack([(drawn == i).mean(axis=1) for i in range(count)], axis=1))
    usable = found[np.isfinite(found)]
    is_resolved = count > 1 and len(usable) >= 0.975 * RESAMPLES
    low, high = (float(end) for end in np.quantile(usable, (0.025, 0.975))) if is_resolved else (math.nan, math.nan)
    return Slope(float(value), (low, high) if is_resolved else None, by_seed)


def _table(losses: Sequence[GridLoss], seeds: Sequence[int]) -> tuple[Any, Any]:
    """Return the rates in log2 [rates] and their losses [rates, seeds], of those that the fit of the means takes."""
    means = {point: mean for point, mean in mean_losses(losses).items() if math.isfinite(mean)}
    lowest = min(means, key=lambda point: (means[point], point))
    rates = _window([x for (x,) in means], lowest[0])
    known = {(each.point[0], each.seed): each.loss for each in losses}
    return np.array(rates), np.array([[known[rate, seed] for seed in seeds] for rate in rates])


def _vertices(x: Any, y: Any) -> Any:
    """Return the minimum of the parabola through each column of y [rates, n]; NaN where it has none."""
    middle = x.mean()
    design = np.stack([np.ones_like(x), x - middle, (x - middle) ** 2], axis=1)
    _, slope, square = np.linalg.pinv(design) @ y
    return np.where(square > 0, middle - slope / (2 * np.where(square > 0, square, 1.0)), np.nan)
