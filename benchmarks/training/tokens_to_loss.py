"""Tokens to a training loss at each batch size, and their ratios between optimizers, out of a sweep's records.

T_L(B) is the number of tokens after which the exponential average of the training loss, over batches that are seen
once, first falls to L, at a batch of B tokens; R_L(B) is the ratio of two optimizers' T_L(B).
Source: Essential AI 2025, Practical Efficiency of Muon for Pretraining (arXiv 2505.02222), sections 2.4 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from finetune.config.errors import InputError
from finetune.storage.plots import moving_averages
from finetune.sweep.intervals import MeanInterval, mean_interval

BETA = 0.95  # of the average, a step
RESOLVED = 0.05  # half-width of an interval over its ratio, from which on the ratio is not resolved


@dataclass(frozen=True)
class Crossing:
    """Steps, tokens and seconds, of median steps, after which the average of a run first falls to a loss."""

    step: float
    tokens: float
    seconds: float


@dataclass(frozen=True)
class TokenRatio:
    """Ratio of two optimizers' tokens to a loss, over the seeds that both have.

    Args:
        value: geometric mean over seeds.
        ends: of the 95% t-interval of the mean of the seeds' log ratios; None for one seed.
        seeds: their number.
    """

    value: float
    ends: tuple[float, float] | None
    seeds: int

    @property
    def is_resolved(self) -> bool:
        """Whether half of the interval is at most `RESOLVED` of the ratio."""
        return self.ends is not None and (self.ends[1] - self.ends[0]) / 2 <= RESOLVED * self.value


def training_losses(record: Mapping[str, Any]) -> list[float]:
    """Return the training loss of each step of a record.

    Raises:
        InputError: the record has not every step.
    """
    curve = record["metrics"]["training_curve"]
    if [step for step, _ in curve] != list(range(1, len(curve) + 1)):
        raise InputError(record["sweep"] or "the sweep", "tokens to a loss need every step; give `curve_every = 1`")
    return [math.inf if loss is None else loss for _, loss in curve]


def find_crossing(record: Mapping[str, Any], level: float) -> Crossing | None:
    """Return where a run reaches a loss, None where it does not.

    Between the last step above the loss and the first one below it the average counts as a line.
    """
    metrics, averages = record["metrics"], moving_averages(training_losses(record), BETA)
    number = next((i for i, loss in enumerate(averages) if loss <= level), None)
    if number is None:
        return None
    share = 1.0 if number == 0 else (averages[number - 1] - level) / (averages[number - 1] - averages[number])
    step = number + share
    clock = [0.0, *(seconds for _, seconds in metrics["step_seconds"])]
    duration = median(after - before for before, after in pairwise(clock))  # the clock runs on while a run is stopped
    return Crossing(step, step * metrics["tokens"] / metrics["steps"], step * duration)


def lowest_loss(record: Mapping[str, Any]) -> float:
    """Return the lowest average of a run: the least loss that it reaches."""
    return min(moving_averages(training_losses(record), BETA))


def common_levels(records: Sequence[Mapping[str, Any]], count: int, spacing: float) -> list[float]:
    """Return losses that all runs reach, descending: the last is the least one in steps of 0.05 nats."""
    least = math.ceil(max(map(lowest_loss, records)) / 0.05 - 1e-9) * 0.05
    return [round(least + spacing * i, 2) for i in range(count - 1, -1, -1)]


def ratio_of(above: Mapping[int, float], below: Mapping[int, float]) -> TokenRatio | None:
    """Return the ratio of tokens to a loss, seed by seed; None where no seed is in both.

    Args:
        above, below: seed -> tokens.
    """
    logs = [math.log(tokens / below[seed]) for seed, tokens in above.items() if seed in below]
    if not logs:
        return None
    found: MeanInterval = mean_interval(logs)
    ends = None if found.ends is None else (math.exp(found.ends[0]), math.exp(found.ends[1]))
    return TokenRatio(math.exp(found.mean), ends, len(logs))
