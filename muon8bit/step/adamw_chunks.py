"""Parameters of an AdamW group with their state, and parts of them.

State that lives on the host comes in parts, since it is 8 bytes an element, and embeddings are large.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

# Pieces begin at multiples of this many elements: whole vectors of every kernel, and whole blocks of an 8-bit state.
ALIGNMENT = 4096


@dataclass(frozen=True)
class AdamWChunk:
    """A parameter with its gradient, or a flat part of one.

    Attributes:
        param, grad: the tensors of these elements.
        state: the tensors of `adamw.layout`, for the same elements.
        key: the hash key of stochastic rounding (bf16 only); None rounds to nearest.
        first: the index in the whole parameter of the first element here.
        size: the number of elements of the whole parameter.
        is_last: no later part has the same step counter.
    """

    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    key: int | None
    first: int
    size: int
    is_last: bool = True

    @property
    def state_bytes(self) -> int:
        """Return the bytes of its state."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self.state.values())

    def split(self, num_bytes: int) -> Iterator[AdamWChunk]:
        """Give flat parts with at most `num_bytes` of state, or `ALIGNMENT` elements.

        The chunk stays whole where its elements or those of its gradient do not lie in their order. A tensor of the
        state that has fewer elements than the parameter, one for every so many, is cut at the same places; one without
        dimensions is in every part.
        """
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
    """Return the part of a state tensor that belongs to these elements of a parameter."""
    if tensor.ndim == 0:
        return tensor
    # Elements of the parameter for one of the tensor: a power of two, of which the last may have fewer.
    per = 1 << (-(-num_elements // tensor.numel()) - 1).bit_length()
    if ALIGNMENT % per or -(-num_elements // per) != tensor.numel():
        raise ValueError(f"a state of {tensor.numel()} elements for {num_elements} cannot be cut at {start}")
    return tensor.view(-1)[start // per : -(-stop // per)]


def pack(chunks: Iterable[AdamWChunk], num_bytes: int) -> Iterator[list[AdamWChunk]]:
    """Give chunks in lists of at most `num_bytes` of state, or of one; larger ones are split."""
    together: list[AdamWChunk] = []
    filled = 0
    for chunk in (part for whole in chunks for part in whole.split(num_bytes)):
        if together and filled + chunk.state_bytes > num_bytes:
            yield together
            together, filled = [], 0
        together.append(chunk)
        filled += chunk.state_bytes
    if together:
        yield together
