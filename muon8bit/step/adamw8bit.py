"""AdamW with both moments in 8 bits, by bitsandbytes' blockwise update; the layout of the state is our own.

    exp_avg    = signed dynamic map[codes] * scale       one scale for 256 elements, in the order of indices
    exp_avg_sq = unsigned dynamic map[codes] * scale     its code 0 is never stored: see `_update_`

Source: Dettmers et al., arXiv 2110.02861; `bitsandbytes.optim.AdamW8bit`, whose parameters ours equal bit for bit on a
CPU. There its quantizer is coarse (0.50, measured): moments under 2^-15 of their block's largest get codes of about
that size, so that an element without a gradient, in a block that has some, drifts by 0.25 lr in 100 steps. On CUDA
(read in its kernel) codes are the nearest of the moment's sign: an element that had a gradient once keeps 5.5e-7 of its
block's largest first moment, and drifts by some 0.001 lr a step while others there have one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import Any

import torch
from muon8bit_kernels import dynamic_map, dynamic_midpoints, unsigned_dynamic_map, unsigned_dynamic_midpoints
from torch import Tensor

from ..config import (
    ADAMW8_BLOCK_SIZE,
    EXP_AVG_CODES_KEY,
    EXP_AVG_KEY,
    EXP_AVG_SCALES_KEY,
    EXP_AVG_SQ_CODES_KEY,
    EXP_AVG_SQ_KEY,
    EXP_AVG_SQ_SCALES_KEY,
    MIN_ADAMW8_ELEMENTS,
)
from .adamw_chunks import AdamWChunk
from .group_options import AdamWOptions
from .rounding import round_stochastic

# Elements stepped at once: on a CPU few, since bitsandbytes makes five fp32 copies of them; on CUDA many, as each takes
# a dozen launches. There parameter, gradient, codes and what is chosen of them take 16 bytes an element.
_CPU_CHUNK, _CHUNK, _COPY_BYTES = 2**16, 2**22, 16
_KEYS = (
    (EXP_AVG_KEY, EXP_AVG_CODES_KEY, EXP_AVG_SCALES_KEY),
    (EXP_AVG_SQ_KEY, EXP_AVG_SQ_CODES_KEY, EXP_AVG_SQ_SCALES_KEY),
)


def is_8bit(shape: Sequence[int], bits: int) -> bool:
    """Return whether a whole parameter has its moments in 8 bits, by bitsandbytes' rule.

    Args:
        shape: the whole parameter's.
        bits: `adamw_bits` of its group.
    """
    return bits == 8 and prod(shape) >= MIN_ADAMW8_ELEMENTS


def scales_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of a moment's scales, for a parameter of `shape`.

    It is [..., cols / 256] where blocks fill rows, so that both can be sharded alike, else flat.
    """
    if len(shape) > 1 and shape[-1] % ADAMW8_BLOCK_SIZE == 0:
        return (*shape[:-1], shape[-1] // ADAMW8_BLOCK_SIZE)
    return (-(-prod(shape) // ADAMW8_BLOCK_SIZE),)


def layout(shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return state key -> shape and dtype of its tensor, without `step`, for a parameter of `shape` or a part."""
    codes, scales = (tuple(shape), torch.uint8), (scales_shape(shape), torch.float32)
    return {key: of for _, *keys in _KEYS for key, of in zip(keys, (codes, scales), strict=True)}


@cache
def check_available(device_type: str = "") -> None:
    """Check that bitsandbytes can run; a new group is not asked for its device, since models are moved.

    Args:
        device_type: the device whose kernel is looked for; empty for none.

    Raises:
        ImportError: where bitsandbytes cannot be imported; the message names the option.
        NotImplementedError: where its kernel for the device is missing; the message names the option.
    """
    try:
        import bitsandbytes  # noqa: F401  # optional, and slow to import
    except Exception as error:  # it loads a library, which can fail in many ways
        raise ImportError(
            f"adamw_bits=8 needs bitsandbytes, which cannot be imported ({error}): pip install bitsandbytes, or use "
            "adamw_bits=32"
        ) from error
    key = {"cpu": "CPU", "cuda": "CUDA", "xpu": "XPU", "mps": "MPS"}.get(device_type)
    name = "bitsandbytes::optimizer_update_8bit_blockwise"
    if key is not None and not torch._C._dispatch_has_kernel_for_dispatch_key(name, key):
        raise NotImplementedError(
            f"adamw_bits=8: this version of bitsandbytes has no blockwise update on {device_type} (on a CPU since "
            "0.50): upgrade it, or use adamw_bits=32"
        )


def step_(chunk: AdamWChunk, options: AdamWOptions) -> None:
    """Step a parameter, or a part that begins at a multiple of 256 elements, in place, some elements at a time.

    Args:
        chunk: has contiguous or flat state, but for `step` on the host. That is advanced in any case: where
            `options.skip` turns out not to be 0, the caller takes that back. If parameter or gradient is not
            contiguous, both are copied whole.
        options: has the learning rate as a number.
    """
    skip, first = options.skip, chunk.first
    num_steps = int(chunk.state["step"].add_(1))
    moments = [chunk.state[name].view(-1) for _, *names in _KEYS for name in names]  # bitsandbytes gives scales flat
    pieces: Any = [(chunk.param, chunk.grad, *moments)]
    if chunk.param.is_contiguous() and chunk.grad.is_contiguous():
        size = chunk_size(chunk.param.device.type, options.workspace_bytes)
        sizes = (size, size, *(size, size // ADAMW8_BLOCK_SIZE) * 2)
        tensors = zip((chunk.param, chunk.grad, *moments), sizes, strict=True)
        pieces = zip(*(t.view(-1).split(n) for t, n in tensors), strict=True)
    for param, grad, *own in pieces:
        if not param.numel():
            continue
        is_copied = skip is not None or param.dtype != torch.float32 or not param.is_contiguous()
        copy = param.to(torch.float32, copy=True, memory_format=torch.contiguous_format) if is_copied else param
        new = own if skip is None else [t.clone() for t in own]
        _update_(copy.view(-1), _true_grad(grad, options), new, options, num_steps)
        if chunk.key is not None:
            copy = round_stochastic(copy, param, chunk.key, first, options.backend)
        if skip is not None:
            for tensor, changed in zip((param, *own), (copy, *new), strict=True):
                tensor.copy_(torch.where(skip != 0, tensor, changed.to(tensor.dtype)))
        elif is_copied:
            param.copy_(copy)
        first += param.numel()


def _true_grad(grad: Tensor, options: AdamWOptions) -> Tensor:
    """Return the gradient as the step uses it, fp32, flat: without the scale of a GradScaler, negated by `maximize`."""
    grad = grad.float().contiguous().view(-1)
    grad = grad if options.grad_scale is None else grad / options.grad_scale
    return -grad if options.maximize else grad


def chunk_size(device_type: str, workspace_bytes: int) -> int:
    """Return how many elements are stepped at once, a multiple of 256; results do not depend on it."""
    if device_type == "cpu":
        return _CPU_CHUNK
    return min(_CHUNK, workspace_bytes // _COPY_BYTES // ADAMW8_BLOCK_SIZE * ADAMW8_BLOCK_SIZE)


def _update_(param: Tensor, grad: Tensor, moments: Sequence[Tensor], options: AdamWOptions, num_steps: int) -> None:
    """Compute the equations in place: fp32 parameter and gradient, codes and scales of both moments, all flat.

    Weight decay comes first, as in torch: bitsandbytes' CUDA kernel multiplies by it last. That kernel rounds to the
    nearest code too, so that the second moment of an element whose gradients are under 4e-4 of its block's largest
    becomes 0. At the next zero gradient, as most rows of an embedding have it, its first moment would be divided by
    `eps`: with gradients of 1e-2 a step of hundreds of learning rates. So it is kept at the smallest code but 0.
    """
    lr, (beta1, beta2) = options.lr, options.betas
    if options.weight_decay:
        param.mul_(1 - lr * options.weight_decay)
    codes, scales, codes_sq, scales_sq = moments
    maps = dynamic_map(param.device), unsigned_dynamic_map(param.device)
    numbers = beta1, beta2, 0.0, 0.0, options.eps, num_steps, lr
    with _default_stream(param.device):
        torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
            *("adam", grad, param, codes, codes_sq, *numbers, *maps, scales, scales_sq),
            *(0.0, 1.0, False),  # weight decay, gradient scale, whether zero gradients are left out
        )
    codes_sq.clamp_(min=1)


@contextmanager
def _default_stream(device: torch.device) -> Iterator[None]:
    """Let CUDA's default stream wait for the current one, and afterwards the current one for it.

    bitsandbytes launches on the default stream, whichever is torch's current one.
    """
    if device.type != "cuda" or torch.cuda.current_stream(device) == torch.cuda.default_stream(device):
        yield
        return
    current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    default.wait_stream(current)
    yield
    current.wait_stream(default)


def encode(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of `layout` that store finite fp32 `exp_avg` and `exp_avg_sq`.

    Each element gets its nearest code, but a second moment never code 0.
    """
    result: dict[str, Tensor] = {}
    for (key, codes_key, scales_key), midpoints in zip(
        _KEYS, (dynamic_midpoints, unsigned_dynamic_midpoints), strict=True
    ):
        moment = moments[key]
        codes, scales = _encode(moment.reshape(-1), midpoints(moment.device))
        if key == EXP_AVG_SQ_KEY:
            codes.clamp_(min=1)
        result |= {codes_key: codes.view(moment.shape), scales_key: scales.view(scales_shape(moment.shape))}
    return result


def _encode(values: Tensor, midpoints: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes of flat fp32 values, and the largest magnitudes of their blocks."""
    codes, scales = [], []
    for piece in values.split(_CHUNK):
        blocks = torch.nn.functional.pad(piece, (0, -len(piece) % ADAMW8_BLOCK_SIZE)).view(-1, ADAMW8_BLOCK_SIZE)
        largest = blocks.abs().amax(1)
        normalized = blocks / torch.where(largest > 0, largest, 1)[:, None]
        codes.append(torch.bucketize(normalized, midpoints, out_int32=True).view(-1)[: len(piece)].byte())
        scales.append(largest)
    return torch.cat(codes), torch.cat(scales)


def decode(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return fp32 `exp_avg` and `exp_avg_sq`, exactly, from the tensors of `layout`."""
    result: dict[str, Tensor] = {}
    for (key, codes_key, scales_key), values in zip(_KEYS, (dynamic_map, unsigned_dynamic_map), strict=True):
        codes, scales = state[codes_key], state[scales_key].reshape(-1)
        moment = values(codes.device).index_select(0, codes.reshape(-1).int())
        for block, scale in zip(moment.split(_CHUNK), scales.split(_CHUNK // ADAMW8_BLOCK_SIZE), strict=True):
            block.mul_(scale.repeat_interleave(ADAMW8_BLOCK_SIZE)[: len(block)])
        result[key] = moment.view(codes.shape)
    return result
