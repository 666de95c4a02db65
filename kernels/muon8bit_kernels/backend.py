"""Backends: their names, and the functions that each provides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias

from torch import Tensor

from .codebooks import Codebook
from .element_moment import ElementMoment

Backend: TypeAlias = Literal["reference", "triton"]


class Kernels(Protocol):
    """Functions that a backend provides; those of `reference` document shapes and dtypes."""

    def quantize(self, values: Tensor, *, codebook: Codebook, block_size: int) -> tuple[Tensor, Tensor]:
        """Return the codes and scales of a matrix."""

    def dequantize(self, codes: Tensor, scales: Tensor, *, codebook: Codebook, block_size: int) -> Tensor:
        """Return the fp32 values of codes and scales."""

    def momentum_stats(
        self,
        codes: Sequence[Tensor],
        scales: Sequence[Tensor] | None,
        grads: Sequence[Tensor],
        *,
        beta: float,
        nesterov: bool,
        codebook: Codebook | None,
        block_size: int,
    ) -> Tensor:
        """Return the sums of squares of the new momentum; nothing is written."""

    def momentum_apply(
        self,
        codes: Sequence[Tensor],
        scales: Sequence[Tensor] | None,
        grads: Sequence[Tensor],
        norms: Tensor | None,
        out: Tensor | None,
        *,
        beta: float,
        nesterov: bool,
        codebook: Codebook | None,
        block_size: int,
        skip: Tensor | None = None,
        signs: bool = False,
    ) -> None:
        """Write codes, scales and, unless `norms` and `out` are None, the Newton-Schulz input."""

    def momentum_stats_cut(
        self,
        codes: Sequence[Tensor],
        scales: Sequence[Tensor] | None,
        grads: Sequence[Tensor],
        *,
        first_col: int,
        beta: float,
        nesterov: bool,
        codebook: Codebook | None,
        block_size: int,
    ) -> tuple[Tensor, Tensor]:
        """Return sums of squares and largest magnitudes of some columns of the new momentum; nothing is written."""

    def momentum_apply_cut(
        self,
        codes: Sequence[Tensor],
        scales: Sequence[Tensor] | None,
        grads: Sequence[Tensor],
        new_scales: Tensor | None,
        norms: Tensor,
        out: Tensor,
        *,
        first_col: int,
        beta: float,
        nesterov: bool,
        codebook: Codebook | None,
        block_size: int,
        skip: Tensor | None = None,
        signs: bool = False,
    ) -> None:
        """Write codes, scales and the Newton-Schulz input of some columns."""

    def direction_squares(self, directions: Tensor, *, columns: bool) -> Tensor:
        """Return the sums of squares of each row or column."""

    def second_moment_stats(self, directions: Tensor, moment: ElementMoment) -> Tensor:
        """Return sums of squares and maxima of blocks of directions over their second moments; nothing is written."""

    def update_params(
        self,
        params: Sequence[Tensor],
        directions: Tensor | Sequence[Tensor],
        *,
        decay: float | Tensor,
        scale: float | Tensor,
        keys: Sequence[int] | None = None,
        firsts: Sequence[int] | None = None,
        pitch: int | None = None,
        cautious: bool = False,
        skip: Tensor | None = None,
        factors: Tensor | None = None,
        moment: ElementMoment | None = None,
        inverses: Tensor | None = None,
    ) -> None:
        """Update parameters in place: decay, step and rounding."""

    def symmetric_product(
        self,
        A: Tensor,
        B: Tensor,
        *,
        alpha: float = 1.0,
        D: Tensor | None = None,
        beta: float = 0.0,
        diagonal: float = 0.0,
    ) -> Tensor:
        """Return alpha * A B^T + beta * D + diagonal * I, where that is symmetric."""

    def step_tiny(
        self,
        codes: Sequence[Tensor],
        scales: Sequence[Tensor] | None,
        grads: Sequence[Tensor],
        params: Sequence[Tensor],
        norms: Tensor,
        *,
        beta: float,
        nesterov: bool,
        codebook: Codebook | None,
        block_size: int,
        steps: Sequence[tuple[float, float, float]],
        decay: float | Tensor,
        scale: float | Tensor,
        keys: Sequence[int] | None = None,
        firsts: Sequence[int] | None = None,
        pitch: int | None = None,
        cautious: bool = False,
        skip: Tensor | None = None,
    ) -> None:
        """Do the second phase of the step of matrices with a small side."""

    def round_stochastic(self, values: Tensor, *, key: int, first: int = 0) -> Tensor:
        """Round fp32 values to bf16 stochastically."""
