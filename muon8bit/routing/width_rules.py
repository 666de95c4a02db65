"""Rules by which learning rate, weight decay and initialization of a parameter follow the width of a model.

Every factor is relative to a base: 1 where the shape is the base's. With r_in, r_out the ratios of a matrix's inputs
and outputs to the base's, and r the one of both that is farther from 1:

    role             init (sd)   lr, Muon's raw O            lr, elementwise   decay lr * wd
    hidden           r_in^-1/2   spectral: (r_out/r_in)^1/2  1/r_in            spectral 1/r   essential 1/r_in
    router, head     1/r_in      as hidden                   1/r_in            spectral 1/r   essential r_in^-1/2
    embedding        1           -                           1                 spectral 1/r   essential r^-1/2
    vector           1           -                           1                 as embedding
    final norm       1/r         -                           1/r               as embedding

Elementwise are the steps of AdamW, and AdaMuon's. "essential" gives a matrix of Muon 0.2 sqrt(max(rows, cols)) / r_in
on its raw O. What `adjust_lr_fn` multiplies for the shape anyway is divided out. The final norm is that before a head
tied to the embedding, for which it takes the factor.

Source: "spectral": arXiv 2512.05620, table 1 and sections 3.2, 3.4. "essential": arXiv 2505.02222, figure 5 with its
multipliers folded into initialization and rate: a weight a * w, w ~ N(0, b), by Adam with lr c is one of sd a sqrt(b)
by Adam with lr a * c; the decay is inside of the rate, so that a weight decays by c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, sqrt
from typing import TypeAlias

from ..choices import ScalingRule
from ..step.muon import lr_ratio

Matrix: TypeAlias = tuple[float, float]  # rows, columns


@dataclass(frozen=True)
class ScaleFactors:
    """Factors of one parameter, relative to the base.

    `init` multiplies the standard deviation with which it starts, `lr` the learning rate, `weight_decay` the decay per
    unit of lr; `fan_in` is the ratio of its inputs.
    """

    role: str
    init: float = 1.0
    lr: float = 1.0
    weight_decay: float = 1.0
    fan_in: float = 1.0

    @property
    def is_off_base(self) -> bool:
        """Whether a factor is not 1."""
        return (self.init, self.lr, self.weight_decay, self.fan_in) != (1, 1, 1, 1)


def scale_factors(
    rule: ScalingRule,
    role: str,
    *,
    outputs: float,
    inputs: float,
    pieces: Sequence[tuple[Matrix, Matrix]] = (),
    is_transposed: bool = False,
    adjust_lr_fn: str | None = None,
) -> ScaleFactors:
    """Return the factors of a parameter.

    Args:
        rule: see the head of this module.
        role: "hidden", "router", "head", "embedding", "vector" or "final norm"; a tied embedding is an embedding.
        outputs, inputs: ratios of the parameter's to the base's; equal for a vector.
        pieces: the matrices that Muon takes it for, each with the base's; none where its steps are elementwise.
        is_transposed: they are stored [inputs, outputs].
        adjust_lr_fn: the factor that Muon multiplies.

    Raises:
        ValueError: pieces whose rates would differ.
    """
    width = max(inputs, outputs, key=lambda ratio: abs(log(ratio)))
    is_read = role in ("router", "head")
    init = {"hidden": inputs**-0.5, "final norm": 1 / width}.get(role, 1 / inputs if is_read else 1.0)
    if pieces:
        rates = [_muon_rate(rule, piece, base, is_transposed, adjust_lr_fn) for piece, base in pieces]
        if max(rates) - min(rates) > 1e-9 * max(rates):
            raise ValueError(f"its pieces would have learning rates from {min(rates):g} to {max(rates):g} times lr")
        rate = rates[0]
    else:
        rate = {"hidden": 1 / inputs, "final norm": 1 / width}.get(role, 1 / inputs if is_read else 1.0)
    decay = 1 / width
    if rule == "essential":
        decay = 1 / inputs if role == "hidden" else (inputs if is_read else width) ** -0.5
    return ScaleFactors(role, *map(_rounded, (init, rate, decay / rate, inputs)))


def _muon_rate(rule: ScalingRule, piece: Matrix, base: Matrix, is_transposed: bool, adjust_lr_fn: str | None) -> float:
    """Return the factor of the lr of a matrix beside what `adjust_lr_fn` multiplies, here and in the base."""
    rows, cols = (size / of_base for size, of_base in zip(piece, base, strict=True))
    outputs, inputs = (cols, rows) if is_transposed else (rows, cols)
    asked = sqrt(outputs / inputs)
    if rule == "essential":
        asked = lr_ratio(*piece, "match_rms_adamw") / lr_ratio(*base, "match_rms_adamw") / inputs
    return asked / (lr_ratio(*piece, adjust_lr_fn) / lr_ratio(*base, adjust_lr_fn))


def _rounded(factor: float) -> float:
    """Return a factor without the noise of its last digits, so that parameters with equal ones share a group."""
    return float(f"{factor:.12g}")
