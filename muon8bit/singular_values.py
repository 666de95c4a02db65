"""Spectra of weights or of updates: how evenly their singular values are spread, by matrix and by group of layers.

Of the singular values s_1 >= ... >= s_n > 0 of a matrix, with q_i = s_i^2 / sum s^2:

    entropy         =  -sum q log q / log n         1 where all are equal: the more isotropic, the higher
    effective_rank  =  exp(-sum q log q)            1 .. n
    top_energy      =  sum of the largest 10 q
    quartile_ratio  =  Q3 of s^2 / Q1 of s^2        1 where all are equal

n counts what is not 0: above max(rows, cols) * 2^-23 of the largest, the rounding of fp32. Source: arXiv 2509.26030
(which models learn rare classes), which averages them over the layers of a group: QK, VO, W_in, W_gate, W_out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ._text import render, unwrapper
from .routing import Piece, matrix_pieces, pieces_of

TOP = 10  # singular values in `top_energy`
CHUNK_BYTES = 2**28  # of matrices that are decomposed together, in fp32


@dataclass(frozen=True)
class Spectrum:
    """Measures of the singular values of one matrix, or their means over several; all are 0 for a zero matrix.

    Attributes:
        entropy: normalized, in 0 .. 1; 1 for a matrix of rank 1, whose only singular value is as even as can be.
        effective_rank: in 1 .. n.
        top_energy: share of the squared norm in the 10 largest singular values, in 0 .. 1.
        quartile_ratio: at least 1; quartiles as torch.quantile interpolates them.
        rank: n, the singular values that are not 0.
    """

    entropy: float
    effective_rank: float
    top_energy: float
    quartile_ratio: float
    rank: float


@dataclass(frozen=True)
class MatrixSpectrum:
    """Spectrum of one matrix.

    Attributes:
        name: of the parameter; a matrix of a stack has its number behind it, a piece of a fused one too.
        group: QK, VO, W_in, W_gate, W_out, or its own name.
        shape: rows and columns.
        spectrum: its measures.
    """

    name: str
    group: str
    shape: tuple[int, int]
    spectrum: Spectrum


@dataclass(frozen=True)
class Spectra:
    """Spectra of all matrices of a model; `str()` is a table of the groups' means.

    Attributes:
        matrices: in the model's order.
    """

    matrices: tuple[MatrixSpectrum, ...]

    @property
    def groups(self) -> dict[str, Spectrum]:
        """Group -> mean of each measure over its matrices, in the order of first appearance."""
        members: dict[str, list[Spectrum]] = {}
        for matrix in self.matrices:
            members.setdefault(matrix.group, []).append(matrix.spectrum)
        return {group: _mean(spectra) for group, spectra in members.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able record: `groups` and `matrices`, by name."""
        matrices = {
            of.name: {"group": of.group, "shape": list(of.shape), **asdict(of.spectrum)} for of in self.matrices
        }
        return {"groups": {group: asdict(mean) for group, mean in self.groups.items()}, "matrices": matrices}

    def __str__(self) -> str:
        counts = {group: sum(of.group == group for of in self.matrices) for group in self.groups}
        rows = [
            (group, str(counts[group]), *(f"{value:.4g}" for value in astuple(mean)))
            for group, mean in self.groups.items()
        ]
        header = ("group", "matrices", "entropy", "effective rank", f"top-{TOP} energy", "Q75/25", "rank")
        return render(header, rows, "<>>>>>>")


@torch.no_grad()
def spectra(model: nn.Module | Mapping[str, Tensor], updates: Mapping[str, Tensor] | None = None) -> Spectra:
    """Return the spectra of a model's hidden matrices, or of updates of them.

    Matrices are those that `param_groups` sends to Muon by its own rules, frozen ones too: each of a stack by itself,
    fused weights by the pieces that are known. Singular values are computed in fp32 on each tensor's device, 256 MiB of
    matrices at a time.

    Args:
        model: with values; or name -> tensor [..., rows, cols] of any float dtype, whose names alone tell the groups.
        updates: name -> tensor of the parameter's shape, as gradients or differences of weights, to be decomposed in
            place of the weights. Matrices without one are left out, and so are updates of other parameters.

    Raises:
        TypeError: for a model that is neither.
        ValueError: for a model without a matrix, or updates of none; for an update of no parameter, or of another
            shape; for a tensor that is not finite or has no values, by name.
        NotImplementedError: for a sharded parameter, by name.
    """
    if isinstance(model, nn.Module):
        found = [(piece, piece.param) for piece in matrix_pieces(model)]
        if updates is not None:
            found = list(_of_updates(model, [piece for piece, _ in found], updates))
    elif isinstance(model, Mapping) and updates is None:
        named = [(name, tensor) for name, tensor in model.items() if tensor.ndim > 1]
        found = [(piece, tensor) for name, tensor in named for piece in pieces_of(name, tensor)]
    else:
        kind = type(model).__name__
        raise TypeError(f"spectra takes a module, or a mapping of names to tensors, not a {kind}: give the model")
    if not found:
        raise ValueError("no matrix to look at: all parameters are embeddings, heads, routers, or have one dimension")
    return Spectra(tuple(of for piece, tensor in found for of in _of_piece(piece, tensor)))


def _of_updates(
    model: nn.Module, pieces: Sequence[Piece], updates: Mapping[str, Tensor]
) -> Iterator[tuple[Piece, Tensor]]:
    """Give the pieces that have an update, with it."""
    unwrapped = unwrapper(name for name, _ in model.named_parameters())
    shapes = {unwrapped(name): tuple(param.shape) for name, param in model.named_parameters(remove_duplicate=False)}
    by_name = {unwrapped(name): update for name, update in updates.items()}
    for name, update in by_name.items():
        if name not in shapes:
            raise ValueError(f"updates: {name} is no parameter of the model; leave it out. It has: {_some(shapes)}")
        if tuple(update.shape) != shapes[name]:
            raise ValueError(f"updates: {name} has shape {tuple(update.shape)}, its parameter {shapes[name]}")
    return ((piece, by_name[piece.param_name]) for piece in pieces if piece.param_name in by_name)


def _some(names: Iterable[str]) -> str:
    """Return the first names, for an error."""
    first = list(names)
    return ", ".join(first[:3]) + (", ..." if len(first) > 3 else "")


def _of_piece(piece: Piece, tensor: Tensor) -> Iterator[MatrixSpectrum]:
    """Give the spectrum of a matrix, or of each of a stack, chunk by chunk."""
    if hasattr(tensor, "device_mesh"):
        raise NotImplementedError(
            f"{piece.param_name} is sharded, and singular values need whole matrices: give a mapping of name to "
            "tensor.full_tensor(), or the model before fully_shard"
        )
    if tensor.is_meta:
        raise ValueError(f"{piece.param_name} has no values, being on the device meta: load the weights first")
    matrices = piece.of(tensor.detach())
    count, rows, cols = matrices.shape
    size = max(1, CHUNK_BYTES // max(1, 4 * rows * cols))
    for first in range(0, count, size):
        values = matrices[first : first + size].float()
        if not bool(values.isfinite().all()):
            raise ValueError(f"{piece.param_name} holds NaN or Inf, and has no spectrum")
        for number, s in enumerate(torch.linalg.svdvals(values), first):
            name = f"{piece.name}, matrix {number}" if count > 1 else piece.name
            yield MatrixSpectrum(name, piece.group, (rows, cols), measure(s.double().cpu(), max(rows, cols)))


def measure(s: Tensor, longest: int) -> Spectrum:
    """Return the measures of singular values s [min(rows, cols)], float64, descending.

    Args:
        s: of one matrix.
        longest: its longer side, by which the rounding of the largest value grows.
    """
    s = s[s > s[:1] * longest * torch.finfo(torch.float32).eps]
    if len(s) == 0:
        return Spectrum(0.0, 0.0, 0.0, 0.0, 0)
    squares = s.square()
    q = squares / squares.sum()
    nats = float(-(q * q.log()).sum())
    first, third = torch.quantile(squares, torch.tensor([0.25, 0.75], dtype=s.dtype)).tolist()
    entropy = nats / math.log(len(s)) if len(s) > 1 else 1.0
    return Spectrum(entropy, math.exp(nats), float(q[:TOP].sum()), third / first, len(s))


def _mean(spectra: Sequence[Spectrum]) -> Spectrum:
    """Return the mean of each measure."""
    names = [field.name for field in fields(Spectrum)]
    return Spectrum(*(math.fsum(getattr(of, name) for of in spectra) / len(spectra) for name in names))
