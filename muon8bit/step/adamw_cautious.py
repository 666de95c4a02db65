"""AdamW with cautious weight decay: an element decays only where the update moves it towards 0, or not at all.

    u  =  -AdamW(W = 0, weight_decay = 0)                                     the update, which reads no W
    W  =  round(W * (1 - lr * weight_decay if u * W >= 0 else 1)  -  u)       (kernels)

The update comes from a step of a parameter that is zero, in fp32: the difference of a real one before and after would
be 0 wherever it is below half a unit in the last place. So 32-bit and 8-bit moments, and any kernel, go the same way.
Source: Chen et al., arXiv 2510.12402.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from muon8bit_kernels import kernels_for

from . import adamw8bit
from .adamw_chunks import ALIGNMENT, AdamWChunk
from .adamw_small import filled
from .group_options import AdamWOptions
from .muon import factors

# Elements stepped at once on a CPU: a few MiB, and few calls for a large table.
_CPU_PIECE = 2**18
# Bytes alive for each element: its update and its gradient in fp32.
_COPY_BYTES = 8


def step_cautiously(
    chunks: Sequence[AdamWChunk],
    options: AdamWOptions,
    step: Callable[[Sequence[AdamWChunk], AdamWOptions], None],
) -> None:
    """Step chunks of one device in place, some elements at a time; results do not depend on how many.

    Args:
        chunks: any that `adamw.apply` takes.
        options: their group's, with a weight decay above 0.
        step: does a step without cautious weight decay.
    """
    decay = factors(lr=options.lr, weight_decay=options.weight_decay, ratio=1.0)[0]
    half = options.workspace_bytes // 2  # the rest is for what `step` copies
    plain = replace(options, weight_decay=0.0, cautious_weight_decay=False, workspace_bytes=half)
    most = piece_size(chunks[0].param.device.type, options.workspace_bytes)
    kernels = kernels_for(chunks[0].param.device, options.backend)
    for parts in filled((part for chunk in chunks for part in _parts(chunk, most)), most):
        # From -0, so that an update of 0 keeps the sign of a parameter that is 0.
        moved = [torch.full(part.param.shape, -0.0, dtype=torch.float32, device=part.param.device) for part in parts]
        grads = [part.grad.float().contiguous() for part in parts]
        step([replace(part, param=u, grad=g, key=None) for part, u, g in zip(parts, moved, grads, strict=True)], plain)
        for part, update in zip(parts, moved, strict=True):
            if not update.numel():
                continue
            cols = ALIGNMENT if update.numel() % ALIGNMENT == 0 else update.numel()
            param = part.param.contiguous()
            kernels.update_params(
                [param.view(1, -1, cols)],
                update.view(1, -1, cols),
                decay=decay,
                scale=-1.0,
                keys=None if part.key is None else [part.key],
                firsts=[part.first],
                cautious=True,
                skip=options.skip,
            )
            if param is not part.param:
                part.param.copy_(param)


def _parts(chunk: AdamWChunk, most: int) -> Iterator[AdamWChunk]:
    """Give parts of at most `most` elements, each with a step counter that has not been advanced."""
    num_bytes = -(-most * chunk.state_bytes // max(1, chunk.param.numel()))
    parts = list(chunk.split(num_bytes))
    for part in parts[:-1]:
        yield replace(part, state={**part.state, "step": part.state["step"].clone()})
    yield parts[-1]


def piece_size(device_type: str, workspace_bytes: int) -> int:
    """Return how many elements are stepped at once."""
    return _CPU_PIECE if device_type == "cpu" else adamw8bit.chunk_size(device_type, workspace_bytes // 2)


def copied_bytes(chunk: AdamWChunk, options: AdamWOptions) -> int:
    """Return the bytes of updates and copies that `step_cautiously` has at once for a chunk."""
    most = piece_size(chunk.param.device.type, options.workspace_bytes)
    is_cut = chunk.param.is_contiguous() and chunk.grad.is_contiguous()
    return _COPY_BYTES * (min(chunk.param.numel(), most) if is_cut else chunk.param.numel())
