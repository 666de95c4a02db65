"""AdamW for what Muon does not take (embeddings, head, norms, biases): torch's own with fp32 state, or in 8 bits.

    m  =  beta1 * m + (1 - beta1) * g,   v  =  beta2 * v + (1 - beta2) * g^2              exp_avg, exp_avg_sq
    W  =  (1 - lr * weight_decay) * W  -  lr * (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)

Source: Loshchilov and Hutter, arXiv 1711.05101, as torch.optim.AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..config import EXP_AVG_CODES_KEY, EXP_AVG_KEY, EXP_AVG_SQ_KEY, Options
from . import adamw8bit
from .rounding import rounded

# Bytes alive for each element that goes through copies: parameter and gradient in fp32, rounded, compared, chosen.
_COPY_BYTES = 16
# Elements that torch's CPU kernel computes as one vector, at most; what is left over may be rounded otherwise.
_VECTOR = 16


def step_device(param: Tensor, bits: int = 32) -> torch.device:
    """Where `step` lives: with the parameter on CUDA (the fused kernel reads it there), else on the host; with
    `adamw_bits=bits` 8 on the host, since bitsandbytes takes a number. `param`: the whole parameter."""
    is_read_there = param.device.type == "cuda" and not adamw8bit.is_8bit(param.shape, bits)
    return param.device if is_read_there else torch.device("cpu")


def layout(shape: Sequence[int], bits: int = 32) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """State key -> shape and dtype of its tensor, for a whole parameter of `shape` in a group with `adamw_bits=bits`.

    torch.optim.AdamW's keys: `step` (0-d fp32), `exp_avg` and `exp_avg_sq` (fp32, the parameter's shape); or `step` and
    those of `adamw8.layout`.
    """
    moments = (tuple(shape), torch.float32)
    of_moments = (
        adamw8bit.layout(shape) if adamw8bit.is_8bit(shape, bits) else {EXP_AVG_KEY: moments, EXP_AVG_SQ_KEY: moments}
    )
    return {"step": ((), torch.float32), **of_moments}


def betas_of(group: Mapping[str, Any]) -> tuple[float, float]:
    """Return both betas. A `momentum` in the group, which OneCycleLR and CyclicLR write there, is the first."""
    beta1, beta2 = group["betas"]
    return beta1 if group.get("momentum") is None else group["momentum"], beta2


def is_8bit(state: Mapping[str, Tensor]) -> bool:
    """Whether these moments are in 8 bits. Then `step` is advanced on the host even where `skip` forbids the rest."""
    return EXP_AVG_CODES_KEY in state


def step_(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Tensor]],
    group: dict[str, Any],
    keys: Sequence[int | None],
    places: Sequence[tuple[int, int]],
    options: Options,
) -> None:
    """One AdamW step in place. What is not fp32 and contiguous goes through such copies, chunk by chunk. Of state in 8
    bits a part begins at a multiple of 256 elements.

    `keys`: for each parameter the hash key of stochastic rounding (bf16 only), or None for rounding to nearest;
    `places`: the index of its first element in the whole parameter, of which it may be a part, and that one's number of
    elements. torch's fused kernel walks parameter, gradient and moments by memory order, so all of them are contiguous
    here.
    """
    direct: list[int] = []
    # A number for bitsandbytes, once: on a device it has to be waited for.
    group8 = {**group, "lr": float(group["lr"]), "betas": betas_of(group)} if any(map(is_8bit, states)) else group
    for i, param in enumerate(params):
        if is_8bit(states[i]):
            adamw8bit.step_(param, grads[i], states[i], group8, keys[i], places[i][0], options)
        elif _is_cut_in_vectors(param, grads[i], *places[i]):
            _step_in_vectors(param, grads[i], states[i], group, keys[i], places[i], options)
        elif all(t.dtype == torch.float32 and t.is_contiguous() for t in (param, grads[i])):
            direct.append(i)
        else:
            _step_through_copies(param, grads[i], states[i], group, keys[i], places[i][0], options)
    if direct:
        of = [params[i] for i in direct], [grads[i] for i in direct], [states[i] for i in direct]
        _adamw(*of, group, options)


def copied_bytes(param: Tensor, grad: Tensor, state: Mapping[str, Tensor], options: Options) -> int:
    """Return the bytes of the fp32 copies of a parameter and its gradient that `step_` has at once, if any."""
    if all(t.dtype == torch.float32 and t.is_contiguous() for t in (param, grad)):
        return 0
    chunk = options.workspace_bytes // _COPY_BYTES
    if is_8bit(state):
        chunk = adamw8bit.chunk_size(param.device.type, options.workspace_bytes)
    return 8 * min(param.numel(), chunk)


def _step_through_copies(
    param: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    group: dict[str, Any],
    key: int | None,
    first: int,
    options: Options,
) -> None:
    tensors = (param, grad, state["exp_avg"], state["exp_avg_sq"])
    chunks: Iterable[tuple[Tensor, ...]] = [tensors]
    if param.is_contiguous() and grad.is_contiguous():
        size = max(_VECTOR, options.workspace_bytes // _COPY_BYTES // _VECTOR * _VECTOR)
        chunks = zip(*(t.view(-1).split(size) for t in tensors), strict=True)
    before = state["step"].clone()  # first: the chunk's first element, in the order of indices, not of memory
    for chunk, chunk_grad, exp_avg, exp_avg_sq in chunks:
        copy = chunk.float().contiguous()
        chunk_state = {"step": state["step"].copy_(before), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        _adamw([copy], [chunk_grad.float().contiguous()], [chunk_state], group, options)
        if key is not None:
            copy = rounded(copy, chunk, key, first, options.backend)
        if copy.data_ptr() != chunk.data_ptr():
            chunk.copy_(copy)
        first += chunk.numel()


def _is_cut_in_vectors(param: Tensor, grad: Tensor, first: int, size: int) -> bool:
    """Whether this part of a parameter begins or ends where the CPU's kernel, on the whole, has one vector of 16."""
    stop = first + param.numel()
    is_aligned = first % _VECTOR == 0 and (stop % _VECTOR == 0 or stop == size)
    is_flat = param.is_contiguous() and grad.is_contiguous()
    return param.device.type == "cpu" and is_flat and 0 < param.numel() < size and not is_aligned


def _step_in_vectors(
    param: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    group: dict[str, Any],
    key: int | None,
    place: tuple[int, int],
    options: Options,
) -> None:
    """Step a part of a parameter as in the whole: its first and last elements in the vectors that they share there."""
    (first, size), before = place, state["step"].clone()
    stop = first + param.numel()
    body = min(-(-first // _VECTOR) * _VECTOR, stop), max(stop // _VECTOR * _VECTOR if stop < size else stop, first)
    flat = [t.view(-1) for t in (param, grad, state["exp_avg"], state["exp_avg_sq"])]
    for start, end in ((first, body[0]), body, (max(body), stop)):
        if start >= end:
            continue
        own = [t[start - first : end - first] for t in flat]
        low, high = start // _VECTOR * _VECTOR, min(-(-end // _VECTOR) * _VECTOR, size)
        padded = [t.new_zeros(high - low) for t in own] if (low, high) != (start, end) else own
        where = slice(start - low, end - low)
        for inside, t in zip(padded, own, strict=True):
            if inside is not t:
                inside[where] = t
        piece = {"step": state["step"].copy_(before), "exp_avg": padded[2], "exp_avg_sq": padded[3]}
        step_([padded[0]], [padded[1]], [piece], group, [key], [(low, low + len(padded[0]))], options)
        for inside, t in zip(padded, own, strict=True):
            if inside is not t:
                t.copy_(inside[where])


def _adamw(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Tensor]],
    group: dict[str, Any],
    options: Options,
) -> None:
    (beta1, beta2), scale = betas_of(group), options.grad_scale
    fused = all(p.device.type in ("cpu", "cuda") for p in params)
    if scale is not None and not fused:
        grads, scale = [grad / scale for grad in grads], None
    adamw(
        params,
        grads,
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        [],
        [s["step"] for s in states],
        fused=fused,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
        grad_scale=scale,
        found_inf=options.skip,
    )
