"""What a backend is: the names of the backends, and the functions that each has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias

from torch import Tensor

from .codebooks import Codebook

Backend: TypeAlias = Literal["reference", "triton"]


class Kernels(Protocol):
    """What a backend provides; the functions of `reference` document shapes and dtypes."""

    def quantize(self, values: Tensor, *, codebook: Codebook, block_size: int) -> tuple[Tensor, Tensor]: ...

    def dequantize(self, codes: Tensor, scales: Tensor, *, codebook: Codebook, block_size: int) -> Tensor: ...

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
    ) -> Tensor: ...

    def momentum_apply(
        self,
        codes: Sequence[Tensor],
        scales: Sequence[Tensor] | None,
        grads: Sequence[Tensor],
        norms: Tensor,
        out: Tensor,
        *,
        beta: float,
        nesterov: bool,
        codebook: Codebook | None,
        block_size: int,
        skip: Tensor | None = None,
    ) -> None: ...

    def update_params(
        self,
        params: Sequence[Tensor],
        directions: Tensor,
        *,
        decay: float | Tensor,
        scale: float | Tensor,
        keys: Sequence[int] | None = None,
        firsts: Sequence[int] | None = None,
        pitch: int | None = None,
        skip: Tensor | None = None,
    ) -> None: ...

    def symmetric_product(
        self,
        A: Tensor,
        B: Tensor,
        *,
        alpha: float = 1.0,
        D: Tensor | None = None,
        beta: float = 0.0,
        diagonal: float = 0.0,
    ) -> Tensor: ...

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
        skip: Tensor | None = None,
    ) -> None: ...

    def round_stochastic(self, values: Tensor, *, key: int, first: int = 0) -> Tensor: ...
