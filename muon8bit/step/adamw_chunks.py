"""An AdamW group's step as jobs. State that lives elsewhere comes in pieces: it is 8 bytes an element, and embeddings
are large."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from ..config import Options
from . import adamw
from .commit import Commit
from .offload import NUM_BUFFERS, OffloadTask

# Pieces begin at multiples of this many elements: whole vectors of every kernel, and whole blocks of an 8-bit state.
ALIGNMENT = 4096


@dataclass(frozen=True)
class AdamWChunk:
    """A parameter, or from element `first` on a flat part of one of `size` elements, with its gradient and state; `key`
    is that of stochastic rounding. `is_last`: no later part has the same step counter."""

    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    key: int | None
    first: int
    size: int
    is_last: bool = True

    @property
    def state_bytes(self) -> int:
        return sum(tensor.numel() * tensor.itemsize for tensor in self.state.values())

    def split(self, num_bytes: int) -> Iterator[AdamWChunk]:
        """Flat parts with at most so many bytes of state, or `ALIGNMENT` elements; whole where its elements or those of
        its gradient do not lie in their order. A tensor of the state that has fewer elements than the parameter, one
        for every so many, is cut at the same places; one without dimensions is in every part."""
        num_elements = self.param.numel()
        size = max(ALIGNMENT, num_bytes * num_elements // max(1, self.state_bytes) // ALIGNMENT * ALIGNMENT)
        if num_elements <= size or not (self.param.is_contiguous() and self.grad.is_contiguous()):
            yield self
            return
        for start in range(0, num_elements, size):
            stop = min(start + size, num_elements)
            yield AdamWChunk(
                self.param.view(-1)[start:stop],
                self.grad.view(-1)[start:stop],
                {name: _cut(tensor, start, stop, num_elements) for name, tensor in self.state.items()},
                self.key,
                self.first + start,
                self.size,
                self.is_last and stop == num_elements,
            )


def _cut(tensor: Tensor, start: int, stop: int, num_elements: int) -> Tensor:
    """What belongs to these elements of a parameter."""
    if tensor.ndim == 0:
        return tensor
    per = -(-num_elements // tensor.numel())  # elements of the parameter for one of the tensor
    if ALIGNMENT % per:
        raise ValueError(f"a state of {tensor.numel()} elements for {num_elements} cannot be cut at {start}")
    return tensor.view(-1)[start // per : -(-stop // per)]


def jobs(
    pieces: Sequence[AdamWChunk], group: dict[str, Any], options: Options, commit: Commit, *, is_staged: bool
) -> Iterator[OffloadTask]:
    """The step of parameters of one device, together where they are small. Of `options.workspace_bytes` staged state
    takes one half, the copies that AdamW makes the other; the result is bitwise the same."""
    if not pieces:
        return
    if not is_staged:
        yield _job(pieces, group, options, commit)
        return
    buffer = options.workspace_bytes // 2 // NUM_BUFFERS
    options = replace(options, workspace_bytes=options.workspace_bytes // 2)
    for together in _packed((part for piece in pieces for part in piece.split(buffer)), buffer):
        yield _job(together, group, options, commit)


def _packed(pieces: Iterable[AdamWChunk], num_bytes: int) -> Iterator[list[AdamWChunk]]:
    """In lists of at most so many bytes of state, or of one piece."""
    together: list[AdamWChunk] = []
    filled = 0
    for piece in pieces:
        if together and filled + piece.state_bytes > num_bytes:
            yield together
            together, filled = [], 0
        together.append(piece)
        filled += piece.state_bytes
    yield together


def _job(pieces: Sequence[AdamWChunk], group: dict[str, Any], options: Options, commit: Commit) -> OffloadTask:
    tensors = [(piece, tensor) for piece in pieces for tensor in piece.state.values()]
    written = [tensor for piece, tensor in tensors if tensor.ndim > 0 or (piece.is_last and _is_counter_staged(piece))]
    # Each part starts from the old counter, so that only the last may write it.
    read = [tensor for piece, tensor in tensors if tensor.ndim == 0 and not piece.is_last and _is_counter_staged(piece)]
    run = partial(_step, pieces, group, options, commit, len(written))
    copies = max(adamw.copied_bytes(piece.param, piece.grad, piece.state, options) for piece in pieces)
    return OffloadTask(pieces[0].param.device, run, written, read, copies)


def _is_counter_staged(piece: AdamWChunk) -> bool:
    """Where torch's fused kernel reads the counter on the device; else it is advanced on the host."""
    return not adamw.is_8bit(piece.state) and adamw.step_device(piece.param).type != "cpu"


def _states(
    pieces: Sequence[AdamWChunk], written: Iterator[Tensor], read: Iterator[Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Their states, of staged tensors in the order of `_job`."""
    for piece in pieces:
        state = {}
        for name, tensor in piece.state.items():
            if tensor.ndim > 0:
                state[name] = next(written)
            elif _is_counter_staged(piece):
                state[name] = next(written if piece.is_last else read)
            else:
                state[name] = tensor if piece.is_last else tensor.clone()
        yield state


def _step(
    pieces: Sequence[AdamWChunk],
    group: dict[str, Any],
    options: Options,
    commit: Commit,
    num_written: int,
    staged: Sequence[Tensor] | None,
) -> None:
    commit()
    states = [piece.state for piece in pieces]
    if staged is not None:
        states = list(_states(pieces, iter(staged[:num_written]), iter(staged[num_written:])))
    adamw.step_(
        [piece.param for piece in pieces],
        [piece.grad for piece in pieces],
        states,
        group,
        [piece.key for piece in pieces],
        [(piece.first, piece.size) for piece in pieces],
        options,
    )
