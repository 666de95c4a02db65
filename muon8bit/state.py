"""The momentum of one parameter as one object. Nobody else touches codes and scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from muon8bit_kernels import CODE_DTYPES, Backend, Codebook, kernels_for, num_blocks, zero_code
from torch import Tensor

from .config import BUFFER_KEY, DYNAMIC_CODES_KEY, LINEAR_CODES_KEY, MIN_QUANTIZED_COLUMNS, SCALES_KEY

_CODES_KEYS: dict[Codebook | None, str] = {
    "linear": LINEAR_CODES_KEY,
    "dynamic": DYNAMIC_CODES_KEY,
    None: BUFFER_KEY,
}


@dataclass(frozen=True)
class Format:
    """How a momentum is stored: `codebook` None means fp32; `block_size` in elements; a row, which no block leaves,
    is the last dimension, or all but the first with `flatten`."""

    codebook: Codebook | None
    block_size: int
    flatten: bool = False

    @classmethod
    def of(cls, shape: torch.Size, bits: int, codebook: Codebook, block_size: int, flatten: bool) -> Format:
        """The format of a parameter of `shape`: fp32 for bits=32, or if a row is too short to be worth a scale."""
        quantized = bits == 8 and prod(shape[1:] if flatten else shape[-1:]) >= MIN_QUANTIZED_COLUMNS
        return cls(codebook if quantized else None, block_size, flatten)

    def layout(self, shape: torch.Size) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """State key -> shape and dtype of its tensor, for a parameter of `shape`."""
        dtype = torch.float32 if self.codebook is None else CODE_DTYPES[self.codebook]
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {_CODES_KEYS[self.codebook]: (tuple(shape), dtype)}
        if self.codebook is not None:
            first_of_row = 1 if self.flatten else len(shape) - 1
            blocks = num_blocks(prod(shape[first_of_row:]), self.block_size)
            layout[SCALES_KEY] = ((*shape[:first_of_row], blocks), torch.float32)
        return layout


@dataclass(frozen=True)
class Momentum:
    """Momentum of one parameter: codes (int8, uint8 or fp32) of its shape and, if quantized, fp32 scales
    [..., rows, blocks]; `rows` gives those of a 2-D part, over the same memory."""

    codes: Tensor
    scales: Tensor | None
    format: Format

    @classmethod
    def zeros(cls, shape: torch.Size, format: Format, device: torch.device) -> Momentum:
        """A zero momentum."""
        tensors = {k: torch.zeros(s, dtype=d, device=device) for k, (s, d) in format.layout(shape).items()}
        momentum = cls.from_state(tensors, format)
        if format.codebook is not None:
            momentum.codes.fill_(zero_code(format.codebook))
        return momentum

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], format: Format) -> Momentum:
        """The momentum whose tensors lie in `optimizer.state[param]`; they are shared, not copied."""
        return cls(state[_CODES_KEYS[format.codebook]], state.get(SCALES_KEY), format)

    def to_state(self) -> dict[str, Tensor]:
        """Its tensors under their public keys."""
        state = {_CODES_KEYS[self.format.codebook]: self.codes}
        return state if self.scales is None else {**state, SCALES_KEY: self.scales}

    def rows(self, which: slice) -> Momentum:
        """The part of these rows, counted through all matrices: codes [rows, cols], scales [rows, blocks], views."""
        codes = self.codes.flatten(1) if self.format.flatten else self.codes.flatten(0, -2)
        return Momentum(codes[which], None if self.scales is None else self.scales.flatten(0, -2)[which], self.format)

    def stats(self, grad: Tensor, *, beta: float, nesterov: bool, backend: Backend | None) -> tuple[Tensor, Tensor]:
        """Read-only phase, all matrices at once: per row and block, fp32 [rows, blocks], the maximum of the new |m|
        and the sum of squares of the NS input. `grad` has the parameter's shape."""
        whole = self.rows(slice(None))
        return kernels_for(self.codes.device, backend).momentum_stats(
            whole.codes,
            whole.scales,
            grad.reshape(whole.codes.shape),
            beta=beta,
            nesterov=nesterov,
            codebook=self.format.codebook,
            block_size=self.format.block_size,
        )

    def apply(
        self,
        grad: Tensor,
        absmax: Tensor,
        norm: Tensor,
        out: Tensor,
        *,
        beta: float,
        nesterov: bool,
        backend: Backend | None,
    ) -> None:
        """Writing phase of a part [rows, cols]: the new momentum into codes and scales, u / norm into `out`."""
        kernels_for(self.codes.device, backend).momentum_apply(
            self.codes,
            self.scales,
            grad,
            absmax,
            norm,
            out,
            beta=beta,
            nesterov=nesterov,
            codebook=self.format.codebook,
            block_size=self.format.block_size,
        )
