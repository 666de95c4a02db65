"""Small AdamW tensors that go through fp32 copies, many at once.

Norms, biases and gates in bf16 are many and tiny: alone each of them takes 15 kernels on a GPU. Here parameters and
gradients of one dtype are laid behind each other in one fp32 tensor each, of which torch's fused kernel takes views. It
computes each tensor as it would alone, to the bit: those whose sizes are multiples of 4 come first, so that all of them
are as aligned as a tensor of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from .adamw_chunks import AdamWChunk
from .group_options import AdamWOptions
from .rounding import round_stochastic_together

# Elements of a small tensor, and of all that go together, at most.
SMALL, TOGETHER = 2**16, 2**20
_ALIGNED = 4  # elements of 16 bytes, which the fused kernel takes at once where a tensor begins and ends at them


def is_small(chunk: AdamWChunk, most: int) -> bool:
    """Return whether a chunk goes with others, which may have `most` elements in all."""
    param, grad = chunk.param, chunk.grad
    is_dense = param.is_contiguous() and grad.is_contiguous()
    return param.dtype != torch.float32 and is_dense and 0 < param.numel() <= min(SMALL, most)


def step_together(
    chunks: Sequence[AdamWChunk],
    options: AdamWOptions,
    most: int,
    step: Callable[[Sequence[AdamWChunk], AdamWOptions], None],
) -> None:
    """Step small chunks of one device in place.

    Args:
        chunks: those that `is_small` says so of.
        options: their group's.
        most: the number of elements that go together at most.
        step: does a step of chunks that are contiguous fp32.
    """
    alike: dict[object, list[AdamWChunk]] = {}
    for chunk in sorted(chunks, key=lambda chunk: chunk.param.numel() % _ALIGNED != 0):
        alike.setdefault((chunk.param.dtype, chunk.grad.dtype, chunk.key is None), []).append(chunk)
    for members in alike.values():
        for together in filled(members, min(TOGETHER, most)):
            _step(together, options, step)


def filled(chunks: Iterable[AdamWChunk], most: int) -> Iterator[list[AdamWChunk]]:
    """Give chunks in lists of at most `most` elements, or of one."""
    together: list[AdamWChunk] = []
    number = 0
    for chunk in chunks:
        if together and number + chunk.param.numel() > most:
            yield together
            together, number = [], 0
        together.append(chunk)
        number += chunk.param.numel()
    yield together


def _step(
    chunks: list[AdamWChunk],
    options: AdamWOptions,
    step: Callable[[Sequence[AdamWChunk], AdamWOptions], None],
) -> None:
    params, sizes = [chunk.param.view(-1) for chunk in chunks], [chunk.param.numel() for chunk in chunks]
    values = torch.cat(params).float()
    grads = torch.cat([chunk.grad.view(-1) for chunk in chunks]).float().split(sizes)
    copies = []
    for chunk, value, grad in zip(chunks, values.split(sizes), grads, strict=True):
        state = {name: t if t.ndim == 0 and name == "step" else t.view(-1) for name, t in chunk.state.items()}
        copies.append(replace(chunk, param=value, grad=grad, state=state))
    step(copies, options)
    keys = [chunk.key for chunk in chunks if chunk.key is not None]
    if keys:
        old, firsts = torch.cat(params), [chunk.first for chunk in chunks]
        new = round_stochastic_together(values, old, sizes, keys, firsts, options.backend)
    else:
        new = values.to(params[0].dtype)
    torch._foreach_copy_(params, list(new.split(sizes)))
