"""The six optimizers: bytes of their state, and of what a step allocates beyond it, from shapes alone.

`state_bytes` of one tensor of n elements:

    AdamW          8 n + 4                          two fp32 moments, a step counter
    8-bit AdamW    2 n + 8 ceil(n / 256)            codes, fp32 maxima; under 4096 elements 8 n. Once 2048, the two maps
    Muon           4 n, 2 n                         fp32 and bf16 momentum
    Muon8bit       n + 4 rows ceil(cols / block)    codes and scales, fp32 under 8 columns; as `Format.layout` says

Every Muon here has AdamW for what is no hidden matrix: fp32 moments, or with `muon8bit+adamw8bit` 8-bit ones, each with
a step counter and without the maps, which are no state there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..config import (
    DEFAULT_BLOCK_SIZE,
    DEFAULT_NS_STEPS,
    DEFAULT_WORKSPACE_BYTES,
    MIN_ADAMW8_ELEMENTS,
    SMALL_WORKSPACE_BYTES,
    Codebook,
)
from ..orthogonalize import partition, resolve_coefficients, workspace_bytes
from ..orthogonalize.coefficients import JORDAN
from ..report import ADAMW_BYTES, bnb_bytes
from ..step.adamw8bit import chunk_size, is_8bit, layout
from ..step.momentum import MomentumFormat

OPTIMIZERS = ("adamw", "adamw8bit", "muon", "muon_bf16", "muon8bit", "muon8bit+adamw8bit")
LABELS = {
    "adamw": "AdamW",
    "adamw8bit": "8-bit AdamW",
    "muon": "Muon, fp32 state",
    "muon_bf16": "Muon, bf16 state",
    "muon8bit": "Muon8bit",
    "muon8bit+adamw8bit": "Muon8bit + 8-bit AdamW",
}
# torch's 0-d fp32 step counter; bitsandbytes counts in an int.
STEP_BYTES = 4
# bitsandbytes' two maps of 256 fp32 values, shared by all tensors.
BNB_MAPS_BYTES = 2 * 256 * 4
# Pieces of the passes over the momentum on a CPU.
_CPU_PIECE_BYTES = 10 * 2**20


@dataclass(frozen=True)
class Param:
    """A trained parameter: its name, shape, dtype, and how it is routed. `split`: sizes and dimension of the pieces of
    its matrices, or None; `flatten`: one matrix of its first dimension by all others. Of a part of a parameter,
    `whole_elements` is the number of all its elements.
    `block_size`: elements that share a scale of its momentum."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_muon: bool
    split: tuple[tuple[int, ...], int] | None = None
    flatten: bool = False
    whole_elements: int | None = None
    block_size: int = DEFAULT_BLOCK_SIZE

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Of the parameter, or of its gradient."""
        return self.num_elements * self.dtype.itemsize


def momentum_sizes(
    shape: Sequence[int],
    *,
    bits: int = 8,
    codebook: Codebook = "linear",
    block_size: int = DEFAULT_BLOCK_SIZE,
    flatten: bool = False,
) -> list[int]:
    """Bytes of each tensor of Muon8bit's momentum of a parameter of `shape`."""
    size = torch.Size(shape)
    return _sizes(MomentumFormat.of(size, bits, codebook, block_size, flatten).layout(size))


def moments_sizes(shape: Sequence[int], bits: int, whole_elements: int | None = None) -> list[int]:
    """Bytes of each tensor of Muon8bit's AdamW state of a parameter of `shape`, or of such a part of one, in a group
    with `adamw_bits=bits`."""
    if is_8bit(shape if whole_elements is None else (whole_elements,), bits):
        return [STEP_BYTES, *_sizes(layout(shape))]
    return [STEP_BYTES, *[ADAMW_BYTES // 2 * math.prod(shape)] * 2]


def adamw_bits(optimizer: str) -> int:
    """Of the AdamW part of one of `OPTIMIZERS` that is a Muon."""
    return 8 if optimizer == "muon8bit+adamw8bit" else 32


def _sizes(layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> list[int]:
    return [math.prod(shape) * dtype.itemsize for shape, dtype in layout.values()]


def state_bytes(optimizer: str, params: Sequence[Param]) -> int:
    """Bytes of the state of one of `OPTIMIZERS` after its first step: the true bytes that `state_report` measures."""
    if optimizer == "adamw":
        return sum(ADAMW_BYTES * p.num_elements + STEP_BYTES for p in params)
    if optimizer == "adamw8bit":
        maps = BNB_MAPS_BYTES if any(p.num_elements >= MIN_ADAMW8_ELEMENTS for p in params) else 0
        return maps + sum(bnb_bytes(p.num_elements) for p in params)
    num_bytes = 0
    for p in params:
        if not p.is_muon:
            num_bytes += sum(moments_sizes(p.shape, adamw_bits(optimizer), p.whole_elements))
        elif optimizer in ("muon", "muon_bf16"):
            num_bytes += (4 if optimizer == "muon" else 2) * p.num_elements
        else:
            num_bytes += sum(momentum_sizes(p.shape, block_size=p.block_size, flatten=p.flatten))
    return num_bytes


def step_bytes(
    optimizer: str,
    params: Sequence[Param],
    kind: str,
    *,
    budget: int = DEFAULT_WORKSPACE_BYTES,
    is_staged: bool = False,
) -> int:
    """The most that a step allocates at once beyond state and gradients, freed before it returns.

    torch's AdamW: on CUDA nothing, with fused=True (its default there copies one moment of all tensors); on a CPU two
    of the largest tensor beside one of the next, if that came before. Muon8bit's AdamW, which `muon_bf16` has on bf16
    weights too: nothing, or two fp32 copies of what is not fp32. torch.optim.Muon: matrix by matrix, update, two bf16
    iterates and two small matrices. Muon8bit: batches within `budget`, its `workspace_bytes`. bitsandbytes' 8-bit AdamW
    works in place; Muon8bit's too, on pieces that it copies: on CUDA, where the verdict on the gradients is not waited
    for, always, on a CPU what is not fp32. What bitsandbytes' CPU kernel allocates inside is not counted.

    Args:
        optimizer: of `OPTIMIZERS`.
        kind: device kind of `orthogonalize.device_kind`.
        budget: in bytes.
        is_staged: Muon8bit's state comes from the host; its AdamW part then leaves half of the budget to that.
    """
    rest = [p for p in params if optimizer == "adamw" or not p.is_muon]
    matrices = [p for p in params if p.is_muon]
    if optimizer == "adamw8bit":
        return 0
    if optimizer == "adamw":
        return _torch_adamw_bytes(rest, kind)
    if optimizer == "muon":
        return max(_torch_adamw_bytes(rest, kind), _torch_muon_bytes(matrices))
    copied = max((p.num_elements for p in rest if p.dtype != torch.float32), default=0)
    adamw_budget = budget // 2 if is_staged else budget
    copies = 8 * min(copied, adamw_budget // 16)
    if optimizer == "muon_bf16":
        in_fp32 = [p for p in rest if p.dtype == torch.float32]
        return max(copies, _torch_adamw_bytes(in_fp32, kind), _torch_muon_bytes(matrices))
    if optimizer == "muon8bit+adamw8bit":
        copies = max((_adamw8_bytes(p, kind, adamw_budget) for p in rest), default=0)
    return max(copies, _muon8bit_bytes(matrices, kind, budget))


def _adamw8_bytes(param: Param, kind: str, budget: int) -> int:
    """Of a piece: fp32 parameter and gradient, or on CUDA fp32 parameter, codes, and what is chosen of one of them."""
    device_type = "cpu" if kind.startswith("cpu") else kind
    if device_type == "cpu" and param.dtype == torch.float32:
        return 0
    return (8 if device_type == "cpu" else 10) * min(param.num_elements, chunk_size(device_type, budget))


def _torch_adamw_bytes(params: Sequence[Param], kind: str) -> int:
    if not kind.startswith("cpu"):
        return 0
    sizes = sorted((4 * p.num_elements for p in params), reverse=True)
    return sum(sizes[:1] + sizes[:2])


def matrix_shapes(param: Param) -> Counter[tuple[int, int]]:
    """How many matrices of each [rows, cols] the parameter holds, splits left out."""
    if param.flatten:
        return Counter({(param.shape[0], math.prod(param.shape[1:])): 1})
    return Counter({(param.shape[-2], param.shape[-1]): math.prod(param.shape[:-2])})


def _torch_muon_bytes(params: Sequence[Param]) -> int:
    most = 0
    for param in params:
        for rows, cols in matrix_shapes(param):
            update = rows * cols * param.dtype.itemsize  # with bf16 it is the first iterate too
            most = max(most, update + 2 * (2 * rows * cols + 2 * min(rows, cols) ** 2))
    return most


def _muon8bit_bytes(params: Sequence[Param], kind: str, budget: int) -> int:
    coefficients = resolve_coefficients(JORDAN, DEFAULT_NS_STEPS)
    whole: Counter[tuple[int, int]] = Counter()
    cut: Counter[tuple[int, int, tuple[int, ...]]] = Counter()
    for param in params:
        for (rows, cols), count in matrix_shapes(param).items():
            if param.split is None:
                whole[rows, cols] += count
            elif param.split[1] == -2:
                whole.update({(size, cols): param.split[0].count(size) * count for size in set(param.split[0])})
            else:
                cut[rows, cols, param.split[0]] += count
    most = 0
    budget -= SMALL_WORKSPACE_BYTES
    for (rows, cols), count in whole.items():
        how = partition(rows, cols, coefficients, kind, budget, count=count)
        if how.bytes_per_matrix:
            most = max(most, min(count, how.size) * how.bytes_per_matrix, _piece_bytes(rows * cols, kind))
    for (rows, cols, widths), count in cut.items():
        how = partition(rows, cols, coefficients, kind, budget, count=count, widths=widths)
        momenta = min(count, how.size)
        for width, (_, method, size) in zip(widths, how.pieces, strict=True):
            iterated = min(momenta, size) * workspace_bytes(method, rows, width, kind)
            most = max(most, momenta * how.bytes_per_matrix + iterated)
    return most


def _piece_bytes(num_elements: int, kind: str) -> int:
    """Newton-Schulz input and the piece of the momentum that is decoded on a CPU."""
    return 4 * num_elements + min(4 * num_elements, _CPU_PIECE_BYTES) if kind.startswith("cpu") else 0
