"""Formats of AdaMuon's state, simulated: each gives back in fp32 what would be read at the next step.

`linear` and `dynamic` are the shipped codes, by the arithmetic of record. The others exist here only:

- `bf16`: the momentum in bf16, as other implementations keep it.
- `linear9`: 9-bit linear codes, what a sign bit beside 8-bit codes costs.
- `linear+sign`: a sign bit beside the codes; a code of 0 is read as 0, and its sign counts where u is 0.
- `linear+quarter`: the same bit; a code of 0 is read as a quarter of a code step with that sign.
- `square`: 8-bit codes c of value (c / 127)^2 with their sign: finer than linear below a quarter of the scale.
- `half`: 256 odd multiples of 1/255 of the scale, so no code for 0 and no bit beside; an exact 0 becomes positive.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from muon8bit_kernels.codebooks import Codebook
from muon8bit_kernels.reference.momentum import dequantize, quantize
from torch import Tensor

BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
# Small enough that a gradient of any size outweighs it in u, large enough to keep its sign in fp32.
ONLY_SIGN = 2.0**-60


class SimulatedFormat(NamedTuple):
    """A codebook, and the length of its blocks in elements of a row (0: no blocks)."""

    codebook: str
    block_size: int

    @property
    def name(self) -> str:
        """Name in records: codebook and block size."""
        return f"{self.codebook} {self.block_size}" if self.block_size else self.codebook

    def in_rows_of(self, cols: int) -> SimulatedFormat:
        """Return the same format with blocks no longer than a row."""
        return self._replace(block_size=min(self.block_size, cols))

    def bytes_per_param(self, cols: int) -> float:
        """Return the bytes of codes, scales and bits beside them over the elements of a row of `cols`."""
        if not self.block_size:
            return 2.0
        bits = 9 if self.codebook in ("linear9", "linear+sign", "linear+quarter") else 8
        return bits / 8 + 4 * -(-cols // self.block_size) / cols


SHIPPED = [SimulatedFormat(codebook, block) for codebook in ("linear", "dynamic") for block in BLOCK_SIZES]
TRIED = [
    SimulatedFormat(codebook, block)
    for codebook in ("linear+sign", "linear+quarter", "linear9", "square", "half")
    for block in (256, 2048)
]
FORMATS = [*SHIPPED, SimulatedFormat("bf16", 0), *TRIED]


def _in_blocks(values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return values [rows, cols] over the largest magnitude of their blocks, and these: [rows, blocks, block] and 1."""
    blocks = torch.nn.functional.pad(values, (0, -values.shape[1] % block_size)).unflatten(1, (-1, block_size))
    scales = blocks.abs().amax(2, keepdim=True)
    return blocks / scales.where(scales > 0, torch.inf), scales


def kept(m: Tensor, form: SimulatedFormat) -> Tensor:
    """Return what an fp32 momentum [..., rows, cols] is read as once it was stored in a format."""
    codebook, block_size = form
    if codebook == "bf16":
        return m.bfloat16().float()
    flat = m.flatten(0, -2)
    block_size = min(block_size, flat.shape[1])  # the same blocks, without padding
    if codebook in ("linear", "dynamic"):
        book: Codebook = "linear" if codebook == "linear" else "dynamic"
        codes, scales = quantize(flat, codebook=book, block_size=block_size)
        return dequantize(codes, scales, codebook=book, block_size=block_size).view_as(m)
    ratios, scales = _in_blocks(flat, block_size)
    if codebook == "half":
        values = ((ratios * 127.5).floor().clamp(-128, 127) * 2 + 1) / 255
    elif codebook == "linear9":
        values = (ratios * 255).round() / 255
    elif codebook == "square":
        values = ratios.sign() * ((ratios.abs().sqrt() * 127).round() / 127).square()
    else:
        values = (ratios * 127).round() / 127
        zero = 0.25 / 127 if codebook == "linear+quarter" else ONLY_SIGN
        values = values.where(values != 0, ratios.sign() * zero)
    return (values * scales).flatten(1)[:, : m.shape[-1]].reshape(m.shape)


def kept_square(V: Tensor, block_size: int, codebook: str = "linear") -> Tensor:
    """Return what a second moment [..., rows, cols] is read as once its root was stored in 8 bits.

    Unsigned linear codes of sqrt(V) over the largest of the block, at least 1 where V is above 0. Of `codebook` "plain"
    the codes are V's own.
    """
    root = V if codebook == "plain" else V.sqrt()
    ratios, scales = _in_blocks(root.flatten(0, -2), min(block_size, V.shape[-1]))
    codes = (ratios * 255).round().clamp(min=1) * (ratios > 0)
    values = (codes / 255 * scales).flatten(1)[:, : V.shape[-1]].reshape(V.shape)
    return values if codebook == "plain" else values.square()
