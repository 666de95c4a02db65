"""Momentum of one parameter as one object. Nobody else touches codes and scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import NamedTuple

import torch
from muon8bit_kernels import CODE_DTYPES, Codebook, kernels_for, num_blocks, zero_code
from torch import Tensor

from ..config import BUFFER_KEY, DYNAMIC_CODES_KEY, LINEAR_CODES_KEY, MIN_QUANTIZED_COLUMNS, SCALES_KEY

_CODES_KEYS: dict[Codebook | None, str] = {
    "linear": LINEAR_CODES_KEY,
    "dynamic": DYNAMIC_CODES_KEY,
    None: BUFFER_KEY,
}
_DTYPES: dict[Codebook | None, torch.dtype] = {
    "linear": CODE_DTYPES["linear"],
    "dynamic": CODE_DTYPES["dynamic"],
    None: torch.float32,
}


@dataclass(frozen=True)
class MomentumFormat:
    """The way in which a momentum is stored.

    Attributes:
        codebook: `"linear"` or `"dynamic"`; None means fp32.
        block_size: the number of elements that share a scale. No block leaves its row.
        flatten: a row is all dimensions but the first, instead of the last one.
    """

    codebook: Codebook | None
    block_size: int
    flatten: bool = False

    @classmethod
    @cache
    def of(cls, shape: torch.Size, bits: int, codebook: Codebook, block_size: int, flatten: bool) -> MomentumFormat:
        """Return the format for a parameter of `shape`: fp32 for bits=32, or if a row is not worth a scale."""
        quantized = bits == 8 and prod(shape[1:] if flatten else shape[-1:]) >= MIN_QUANTIZED_COLUMNS
        return cls(codebook if quantized else None, block_size, flatten)

    @property
    def options(self) -> str:
        """Return the arguments that ask for it: `bits=8, codebook='linear', block_size=2048` or `bits=32`."""
        if self.codebook is None:
            return "bits=32"
        return f"bits=8, codebook={self.codebook!r}, block_size={self.block_size}"

    def layout(self, shape: torch.Size) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return state key -> shape and dtype of its tensor, for a parameter of `shape`."""
        codes = tuple(shape), _DTYPES[self.codebook]
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {_CODES_KEYS[self.codebook]: codes}
        if self.codebook is not None:
            first_of_row = 1 if self.flatten else len(shape) - 1
            blocks = num_blocks(prod(shape[first_of_row:]), self.block_size)
            layout[SCALES_KEY] = ((*shape[:first_of_row], blocks), torch.float32)
        return layout


class Momentum(NamedTuple):
    """Momentum of one parameter, or, from `as_matrices`, its matrices over the same memory.

    Attributes:
        codes: int8, uint8 or fp32, of the parameter's shape, or [count, rows, cols].
        scales: None where the momentum is not quantized, else fp32 [..., rows, blocks], or [count, rows, blocks].
        format: how it is stored.
    """

    codes: Tensor
    scales: Tensor | None
    format: MomentumFormat

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], format: MomentumFormat) -> Momentum:
        """Return the momentum whose tensors lie in `optimizer.state[param]`; they are shared, not copied."""
        return cls(state[_CODES_KEYS[format.codebook]], state.get(SCALES_KEY), format)

    def clear_(self) -> None:
        """Set zeroed tensors to a momentum of zero."""
        if self.format.codebook is not None:
            self.codes.fill_(zero_code(self.format.codebook))

    def to_state(self) -> dict[str, Tensor]:
        """Return its tensors under their public keys."""
        state = {_CODES_KEYS[self.format.codebook]: self.codes}
        return state if self.scales is None else {**state, SCALES_KEY: self.scales}

    @classmethod
    def encode(cls, values: Tensor, format: MomentumFormat) -> Momentum:
        """Encode finite fp32 `values`, of the parameter's shape; unquantized, it shares their memory."""
        if format.codebook is None:
            return cls(values, None, format)
        scales_shape, _ = format.layout(values.shape)[SCALES_KEY]
        kernels = kernels_for(values.device)
        rows = values.reshape(_rows_cols(values, scales_shape))
        codes, scales = kernels.quantize(rows, codebook=format.codebook, block_size=format.block_size)
        return cls(codes.view(values.shape), scales.view(scales_shape), format)

    def decode(self) -> Tensor:
        """Return its values, fp32, of the parameter's shape; unquantized, the same memory."""
        if self.scales is None or self.format.codebook is None:
            return self.codes
        kernels, options = kernels_for(self.codes.device), {"block_size": self.format.block_size}
        rows = self.codes.reshape(_rows_cols(self.codes, self.scales.shape))
        scales = self.scales.reshape(len(rows), self.scales.shape[-1])
        return kernels.dequantize(rows, scales, codebook=self.format.codebook, **options).view(self.codes.shape)

    def as_matrices(self) -> Momentum:
        """Return the momentum as views of matrices: codes [count, rows, cols], scales [count, rows, blocks]."""
        if self.codes.ndim == 2:
            scales = None if self.scales is None else self.scales.unsqueeze(0)
            return Momentum(self.codes.unsqueeze(0), scales, self.format)
        rows, cols = (1, self.codes.shape[0]), prod(self.codes.shape[1:])
        if not self.format.flatten:
            rows, cols = (prod(self.codes.shape[:-2]), self.codes.shape[-2]), self.codes.shape[-1]
        scales = None if self.scales is None else self.scales.view(*rows, -1)
        return Momentum(self.codes.view(*rows, cols), scales, self.format)

    def rows(self, matrices: slice, rows: slice) -> Momentum:
        """Return views of these rows of these matrices, for a momentum that `as_matrices` gave."""
        scales = None if self.scales is None else self.scales[matrices, rows]
        return Momentum(self.codes[matrices, rows], scales, self.format)


def _rows_cols(values: Tensor, scales_shape: Sequence[int]) -> tuple[int, int]:
    """Return how many rows the blocks of these scales [..., rows, blocks] lie in, and the elements of a row."""
    first_of_row = len(scales_shape) - 1
    return prod(values.shape[:first_of_row]), prod(values.shape[first_of_row:])
