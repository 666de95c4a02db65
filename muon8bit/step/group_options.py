"""Options of a parameter group for one step, frozen; `options.resolve_options` makes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from ..config import Backend, Codebook, Rescale, SecondMomentKind
from ..orthogonalize import Coefficients, Rates, RatesTable

# `MuonOptions.adjust_lr_fn` where `rescale="rms"` has given the direction its size.
RESCALED = "rescaled"
AnyOptions = TypeVar("AnyOptions", bound="Options")


@dataclass(frozen=True)
class Options:
    """Options of the whole optimizer, besides those of its groups.

    Attributes:
        ns_dtype: the dtype of Newton-Schulz; None takes the cheapest.
        backend: the kernels.
        workspace_bytes: the bytes that a step may allocate at once.
        skip: for one step, None, or 0-d fp32 on the device at hand; where it is not 0, nothing is written.
        grad_scale: for one step, None, or 1-element fp32 on the device at hand, which gradients are to be divided by.
    """

    ns_dtype: torch.dtype | None
    backend: Backend | None
    workspace_bytes: int
    skip: Tensor | None = None
    grad_scale: Tensor | None = None

    def on(self: AnyOptions, device: torch.device, skip: Tensor | None = None) -> AnyOptions:
        """Return the same for one device, whose `skip` is given."""
        scale = self.grad_scale
        if scale is not None and scale.device != device:
            scale = scale.to(device, non_blocking=True)
        return self if scale is self.grad_scale and skip is None else replace(self, grad_scale=scale, skip=skip)


@dataclass(frozen=True)
class SecondMomentOptions:
    """Keys of a Muon group that say how O is divided by its second moment; `step.second_moment` has the equations.

    Attributes:
        kind: `second_moment`.
        beta2: its averaging factor.
        eps, is_clamped: `second_moment_eps` and whether its form is `"clamp"`.
        rescale: the norm that the quotient gets.
    """

    kind: SecondMomentKind
    beta2: float
    eps: float
    is_clamped: bool
    rescale: Rescale | None


@dataclass(frozen=True, kw_only=True)
class MuonOptions(Options):
    """Keys of a Muon group, checked, and the options of the optimizer.

    Attributes:
        cautious_weight_decay: as in the group; False where `weight_decay` is 0.
        coefficients: resolved from `ns_coefficients` and `ns_steps`.
        row_splits, column_splits: the sizes of the pieces of each matrix that are orthogonalized by themselves, where
            `split_sizes` are given.
        skips_zero_slices: a matrix of a stack whose gradient is zero is not stepped.
        second_moment: how O is divided by its second moment; None leaves it.
        sign_momentum: Newton-Schulz gets the signs of its input.
        table: the measured rates by which methods are chosen; None for the built-in ones.
        counts: the number of matrices, or of pieces of rows, of each [rows, cols] in the group, whether they have
            gradients or not, and wherever they lie.
    """

    lr: float | Tensor
    weight_decay: float
    momentum: float
    nesterov: bool
    coefficients: Coefficients
    eps: float
    adjust_lr_fn: str | None
    format: tuple[int, Codebook, int, bool]  # the values of FORMAT_KEYS
    state_format: tuple[Any, ...]  # from `options.state_format`
    flatten: bool
    row_splits: tuple[int, ...] | None
    column_splits: tuple[int, ...] | None
    clip_matrix_norm: float | None
    maximize: bool
    cautious_weight_decay: bool
    decay_lr_power: int
    skips_zero_slices: bool
    second_moment: SecondMomentOptions | None
    sign_momentum: bool
    table: RatesTable | None
    counts: Mapping[tuple[int, int], int] = field(default_factory=dict, compare=False)

    def rates(self, kind: str) -> Rates | None:
        """Return the measured rates of a device kind; None for the built-in ones."""
        return self.table.rates if self.table is not None and self.table.kind == kind else None


@dataclass(frozen=True, kw_only=True)
class AdamWOptions(Options):
    """Keys of an AdamW group, checked, and the options of the optimizer.

    A `momentum` in the group, which OneCycleLR and CyclicLR write there, is the first of `betas`.

    Attributes:
        cautious_weight_decay: as in the group; False where `weight_decay` is 0.
    """

    lr: float | Tensor
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    adamw_bits: int
    maximize: bool
    cautious_weight_decay: bool = False


GroupOptions: TypeAlias = MuonOptions | AdamWOptions


@lru_cache(maxsize=64)
def matrix_counts(
    shapes: Sequence[torch.Size], flatten: bool, row_splits: Sequence[int] | None
) -> Mapping[tuple[int, int], int]:
    """Return how many matrices of each [rows, cols], or pieces of their rows, parameters of these shapes hold."""
    counts: Counter[tuple[int, int]] = Counter()
    for shape in shapes:
        rows, cols = (shape[0], prod(shape[1:])) if flatten else shape[-2:]
        for size in row_splits or (rows,):
            counts[size, cols] += 1 if flatten else prod(shape[:-2])
    return counts
