"""Means, standard deviations and intervals of Student's t over seeds. No torch in here."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class MeanInterval:
    """A mean of `count` values, with their standard deviation and a two-sided 95% t-interval; None below two values."""

    count: int
    mean: float
    deviation: float | None
    half_width: float | None

    @property
    def ends(self) -> tuple[float, float] | None:
        """Lower and upper end."""
        return None if self.half_width is None else (self.mean - self.half_width, self.mean + self.half_width)


def mean_interval(values: Sequence[float]) -> MeanInterval:
    """Return mean, sample standard deviation (n - 1) and interval of values, at least one."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return MeanInterval(count, mean, None, None)
    deviation = statistics.stdev(values)
    return MeanInterval(count, mean, deviation, t_quantile(0.975, count - 1) * deviation / math.sqrt(count))


def interval_of(values: Mapping[int, float]) -> MeanInterval | None:
    """Return mean and interval of values by seed; None where there is none, or one is not finite."""
    usable = bool(values) and all(map(math.isfinite, values.values()))
    return mean_interval(list(values.values())) if usable else None


@functools.cache
def t_quantile(probability: float, degrees: int) -> float:
    """Return a quantile of Student's t with a whole number of degrees of freedom, for probabilities from 0.5 to 1.

    Source: bisection of `t_probability`.
    """
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def t_probability(t: float, degrees: int) -> float:
    """Return P(T <= t) of Student's t with a whole number of degrees of freedom, for t of 0 and more.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4: finite sums in the angle.
    """
    angle = math.atan(t / math.sqrt(degrees))
    cosine = math.cos(angle)
    is_odd = degrees % 2
    term, total = (cosine if is_odd else 1.0), 0.0
    for k in range(1 + is_odd, degrees, 2):  # powers of the cosine: 1, 3, ... for odd degrees, else 0, 2, ...
        total += term
        term *= cosine**2 * k / (k + 1)
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if is_odd else math.sin(angle) * total
    return 0.5 + inside / 2
