"""The optimizers: bytes of their state, and of what a step allocates beyond it, from shapes alone.

`state_bytes` of one tensor of n elements:

    AdamW          8 n + 4                          two fp32 moments, a step counter
    8-bit AdamW    2 n + 8 ceil(n / 256)            codes, fp32 maxima; under 4096 elements 8 n. Once 2048, the two maps
    Muon           4 n, 2 n                         fp32 and bf16 momentum
    Muon8bit       n + 4 rows ceil(cols / block)    codes and scales, fp32 under 8 columns; as `Format.layout` says

    NorMuon8bit    Muon8bit's + 4 rows, or 4 cols   by its preset; of each piece of a matrix that is cut
    AdaMuon8bit    twice Muon8bit's, + 4 rows ...   where columns are cut, each piece has blocks of its own

Every Muon here has AdamW for what is no hidden matrix: fp32 moments, or with `muon8bit+adamw8bit` 8-bit ones, each with
a step counter and without the maps, which are no state there. `--bits 32` of Muon8bit and its kin: fp32 for the codes.
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
    Bits,
    SecondMomentKind,
)
from ..orthogonalize import partition, resolve_coefficients, workspace_bytes
from ..orthogonalize.coefficients import JORDAN
from ..report import ADAMW_BYTES, BNB_MAPS_BYTES, STEP_BYTES, bnb_bytes
from ..step.adamw8bit import chunk_size, is_8bit, layout
from ..step.adamw_cautious import piece_size
from ..step.adamw_small import SMALL, TOGETHER
from ..step.local_params import muon_layout

OPTIMIZERS = ("adamw", "adamw8bit", "muon", "muon_bf16", "muon8bit", "muon8bit+adamw8bit")
# Counted where they are asked for.
FAMILY = ("normuon8bit", "normuon8bit+adamw8bit", "adamuon8bit", "adamuon8bit+adamw8bit")
# Muon8bit and what is built on it.
OURS = ("muon8bit", "muon8bit+adamw8bit", *FAMILY)
LABELS = {
    "adamw": "AdamW",
    "adamw8bit": "8-bit AdamW",
    "muon": "Muon, fp32 state",
    "muon_bf16": "Muon, bf16 state",
    "muon8bit": "Muon8bit",
    "muon8bit+adamw8bit": "Muon8bit + 8-bit AdamW",
    "normuon8bit": "NorMuon8bit",
    "normuon8bit+adamw8bit": "NorMuon8bit + 8-bit AdamW",
    "adamuon8bit": "AdaMuon8bit",
    "adamuon8bit+adamw8bit": "AdaMuon8bit + 8-bit AdamW",
}
# Pieces of the passes over the momentum on a CPU.
_CPU_PIECE_BYTES = 10 * 2**20
# Of a direction, and of what the second moment of an element takes on a CPU, measured.
_ELEMENT_MOMENT_BYTES = 4 + 12


@dataclass(frozen=True)
class Param:
    """A trained parameter, or a part of one, and how it is routed.

    Attributes:
        name: in the model.
        shape: of the parameter, or of the part.
        dtype: of the parameter and its gradient.
        is_muon: Muon trains it; else AdamW.
        split: sizes and dimension of the pieces of its matrices, or None.
        flatten: it is one matrix, its first dimension by all others.
        whole_elements: for a part, the elements of the whole parameter; else None.
        block_size: elements that share a scale of its momentum.
        bits: of its momentum in `OURS`, and of AdaMuon8bit's second moment.
        normuon_moment: the statistic that NorMuon8bit has of it, "row" or "shape".
        normuon_coefficients: the `ns_coefficients` of NorMuon8bit.
        num_shards: for a part, the number of parts.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_muon: bool
    split: tuple[tuple[int, ...], int] | None = None
    flatten: bool = False
    whole_elements: int | None = None
    block_size: int = DEFAULT_BLOCK_SIZE
    bits: Bits = 8
    normuon_moment: SecondMomentKind = "row"
    normuon_coefficients: str = "jordan"
    num_shards: int = 1

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter, of which this may be a part by dimension 0."""
        if self.whole_elements is None:
            return self.shape
        return (self.whole_elements // math.prod(self.shape[1:]), *self.shape[1:])

    @property
    def num_elements(self) -> int:
        """Number of elements of the shape."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the parameter, or of its gradient."""
        return self.num_elements * self.dtype.itemsize


def muon_sizes(optimizer: str, param: Param) -> list[int]:
    """Return the bytes of each tensor of a matrix's state in one of `OURS`; of a part, those of the first, the largest.

    The layout is the optimizer's own.
    """
    sizes, dim = param.split or (None, -2)
    splits = (sizes, None) if dim == -2 else (None, sizes)
    format = (param.bits, "linear", param.block_size, param.flatten, *splits, second_moment(optimizer, param))
    layout = muon_layout(torch.Size(param.whole_shape), *format)
    return layout_bytes({key: (cut(shape, param.num_shards), dtype) for key, (shape, dtype) in layout.items()})


def second_moment(optimizer: str, param: Param) -> SecondMomentKind | None:
    """Return the `second_moment` of a matrix's group in one of `OURS`."""
    if optimizer.startswith("normuon8bit"):
        return param.normuon_moment
    return "element" if optimizer.startswith("adamuon8bit") else None


def ns_coefficients(optimizer: str, param: Param) -> str:
    """Return the `ns_coefficients` of a matrix's group in one of `OURS`."""
    return param.normuon_coefficients if optimizer.startswith("normuon8bit") else "jordan"


def cut(shape: tuple[int, ...], num_shards: int) -> tuple[int, ...]:
    """Return the shape of the largest part of a tensor whose dimension 0 is cut into equal parts, rounded up."""
    return (math.ceil(shape[0] / num_shards), *shape[1:]) if shape else shape


def moments_sizes(shape: Sequence[int], bits: int, whole_elements: int | None = None) -> list[int]:
    """Return the bytes of each tensor of Muon8bit's AdamW state, in a group with `adamw_bits=bits`.

    Args:
        shape: of the parameter, or of a part of one.
        bits: 8 or 32.
        whole_elements: for a part, the elements of the whole parameter.
    """
    if is_8bit(shape if whole_elements is None else (whole_elements,), bits):
        return [STEP_BYTES, *layout_bytes(layout(shape))]
    return [STEP_BYTES, *[ADAMW_BYTES // 2 * math.prod(shape)] * 2]


def adamw_bits(optimizer: str) -> int:
    """Return the `adamw_bits` of a Muon among `OPTIMIZERS`."""
    return 8 if optimizer.endswith("+adamw8bit") else 32


def layout_bytes(layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> list[int]:
    """Return the bytes of each tensor of a layout."""
    return [math.prod(shape) * dtype.itemsize for shape, dtype in layout.values()]


def state_bytes(optimizer: str, params: Sequence[Param]) -> int:
    """Return the true bytes of an optimizer's state after its first step, as `state_report` measures them.

    Args:
        optimizer: of `OPTIMIZERS` or `FAMILY`.
        params: the trained ones, or parts of them.
    """
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
            num_bytes += sum(muon_sizes(optimizer, p))
    return num_bytes


def step_bytes(
    optimizer: str,
    params: Sequence[Param],
    kind: str,
    *,
    budget: int = DEFAULT_WORKSPACE_BYTES,
    is_staged: bool = False,
    is_cautious: bool = False,
) -> int:
    """Return the most bytes that a step allocates at once beyond state and gradients, and frees before it returns.

        torch's AdamW           CUDA: nothing, with fused=True (its default there copies one moment of all tensors)
                                CPU: two tensors of the largest size, and one of the next, if that came before
        Muon8bit's AdamW        fp32: nothing; else two fp32 copies; `muon_bf16` has this AdamW on bf16 weights too
        torch.optim.Muon        matrix by matrix: update, two bf16 iterates and two small matrices
        Muon8bit                batches within `budget`, its `workspace_bytes`
        AdaMuon8bit             CPU: a batch of directions, and 12 bytes an element of the second moment
        bitsandbytes' AdamW     nothing; what its CPU kernel allocates inside is not counted
        Muon8bit's 8-bit AdamW  copies of pieces: on a CPU of tensors that are not fp32, on CUDA always, since the step
                                does not wait for the check of the gradients
        Muon8bit's, cautious    pieces of fp32 updates, of gradients that are not fp32, and what applying them takes

    Args:
        optimizer: of `OPTIMIZERS` or `FAMILY`.
        params: the trained ones.
        kind: device kind of `orthogonalize.device_kind`.
        budget: in bytes.
        is_staged: Muon8bit's state comes from the host; its AdamW part then leaves half of the budget to the staging.
        is_cautious: Muon8bit's `cautious_weight_decay`.
    """
    rest = [p for p in params if optimizer == "adamw" or not p.is_muon]
    matrices = [p for p in params if p.is_muon]
    if optimizer == "adamw8bit":
        return 0
    if optimizer == "adamw":
        return _torch_adamw_bytes(rest, kind)
    if optimizer == "muon":
        return max(_torch_adamw_bytes(rest, kind), _torch_muon_bytes(matrices))
    through_copies = [p.num_elements for p in rest if p.dtype != torch.float32]
    together = sum(number for number in through_copies if number <= SMALL)
    copied = max([min(together, TOGETHER), *through_copies])
    adamw_budget = budget // 2 if is_staged else budget
    copies = 8 * min(copied, adamw_budget // 16)
    if optimizer == "muon_bf16":
        in_fp32 = [p for p in rest if p.dtype == torch.float32]
        return max(copies, _torch_adamw_bytes(in_fp32, kind), _torch_muon_bytes(matrices))
    if adamw_bits(optimizer) == 8:
        copies = max((_adamw8_bytes(p, kind, adamw_budget) for p in rest), default=0)
    if is_cautious:
        copies = _cautious_bytes(rest, kind, adamw_bits(optimizer), adamw_budget)
    return max(copies, _muon8bit_bytes(matrices, kind, budget, optimizer))


def _adamw8_bytes(param: Param, kind: str, budget: int) -> int:
    """Return the bytes that the largest piece is copied into.

    On a CPU these are the fp32 parameter and gradient. On CUDA they are the fp32 parameter, the codes, and the choice
    between old and new values of one of these tensors.
    """
    device_type = "cpu" if kind.startswith("cpu") else kind
    if device_type == "cpu" and param.dtype == torch.float32:
        return 0
    return (8 if device_type == "cpu" else 10) * min(param.num_elements, chunk_size(device_type, budget))


def _cautious_bytes(params: Sequence[Param], kind: str, bits: int, budget: int) -> int:
    """Return the bytes of the largest piece of AdamW's cautious weight decay.

    For each element these are its update, its gradient where that is not fp32, and on a CPU two buffers and two signs,
    on CUDA in 8 bits what `_adamw8_bytes` counts.
    """
    is_cpu = kind.startswith("cpu")
    per_element = 4 + 4 * any(p.dtype != torch.float32 for p in params) + (16 if is_cpu else 10 * (bits == 8))
    return per_element * min(sum(p.num_elements for p in params), piece_size("cpu" if is_cpu else kind, budget))


def _torch_adamw_bytes(params: Sequence[Param], kind: str) -> int:
    if not kind.startswith("cpu"):
        return 0
    sizes = sorted((4 * p.num_elements for p in params), reverse=True)
    return sum(sizes[:1] + sizes[:2])


def matrix_shapes(param: Param) -> Counter[tuple[int, int]]:
    """Count the matrices of each [rows, cols] that the parameter holds, without regard to splits."""
    if param.flatten:
        return Counter({(param.shape[0], math.prod(param.shape[1:])): 1})
    return Counter({(param.shape[-2], param.shape[-1]): math.prod(param.shape[:-2])})


def row_pieces(param: Param) -> Counter[tuple[int, int]]:
    """Count the matrices of each [rows, cols], or the pieces of their rows where `split` cuts these."""
    if param.split is None or param.split[1] != -2:
        return matrix_shapes(param)
    sizes, shapes = Counter(param.split[0]), matrix_shapes(param)
    return Counter({(size, cols): n * count for (_, cols), count in shapes.items() for size, n in sizes.items()})


def _torch_muon_bytes(params: Sequence[Param]) -> int:
    most = 0
    for param in params:
        for rows, cols in matrix_shapes(param):
            update = rows * cols * param.dtype.itemsize  # with bf16 it is the first iterate too
            most = max(most, update + 2 * (2 * rows * cols + 2 * min(rows, cols) ** 2))
    return most


def _muon8bit_bytes(params: Sequence[Param], kind: str, budget: int, optimizer: str) -> int:
    is_adamuon = optimizer.startswith("adamuon8bit")
    coefficients = resolve_coefficients(ns_coefficients(optimizer, params[0]) if params else JORDAN, DEFAULT_NS_STEPS)
    whole: Counter[tuple[int, int]] = Counter()
    cut: Counter[tuple[int, int, tuple[int, ...]]] = Counter()
    for param in params:
        if param.split is not None and param.split[1] == -1:
            cut.update({(*shape, param.split[0]): count for shape, count in matrix_shapes(param).items()})
        else:
            whole.update(row_pieces(param))
    most = 0
    budget -= SMALL_WORKSPACE_BYTES
    for (rows, cols), count in whole.items():
        how = partition(rows, cols, coefficients, kind, budget, count=count, tiny=not is_adamuon)
        if is_adamuon and kind.startswith("cpu"):
            most = max(most, min(count, how.size) * _ELEMENT_MOMENT_BYTES * rows * cols)
        if how.bytes_per_matrix:
            most = max(most, min(count, how.size) * how.bytes_per_matrix, _piece_bytes(rows * cols, kind))
    for (rows, cols, widths), count in cut.items():
        how = partition(rows, cols, coefficients, kind, budget, count=count, widths=widths, tiny=not is_adamuon)
        momenta = min(count, how.size)
        for width, (_, method, size) in zip(widths, how.pieces, strict=True):
            iterated = min(momenta, size) * workspace_bytes(method, rows, width, kind)
            most = max(most, momenta * how.bytes_per_matrix + iterated)
    return most


def _piece_bytes(num_elements: int, kind: str) -> int:
    """Return the bytes of the Newton-Schulz input and of the piece of the momentum that is decoded on a CPU."""
    return 4 * num_elements + min(4 * num_elements, _CPU_PIECE_BYTES) if kind.startswith("cpu") else 0
