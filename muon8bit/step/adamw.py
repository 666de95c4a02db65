"""AdamW for what Muon does not take (embeddings, head, norms, biases): torch's own with fp32 state, or in 8 bits.

    m  =  beta1 * m + (1 - beta1) * g,   v  =  beta2 * v + (1 - beta2) * g^2              exp_avg, exp_avg_sq
    W  =  (1 - lr * weight_decay) * W  -  lr * (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)

Cautious weight decay is in `adamw_cautious`. Source: Loshchilov and Hutter, arXiv 1711.05101, as torch.optim.AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..config import EXP_AVG_CODES_KEY, EXP_AVG_KEY, EXP_AVG_SQ_KEY
from . import adamw8bit
from .adamw_cautious import copied_bytes as cautious_bytes, step_cautiously
from .adamw_chunks import AdamWChunk, pack
from .adamw_small import TOGETHER, is_small, step_together
from .group_options import AdamWOptions
from .offload import NUM_BUFFERS, OffloadTask
from .rounding import round_stochastic

# Bytes alive for each element that goes through copies: parameter and gradient in fp32, rounded, compared, chosen.
_COPY_BYTES = 16
# Elements that torch's CPU kernel computes as one vector, at most; what is left over may be rounded otherwise.
_VECTOR = 16


def step_device(param: Tensor, bits: int = 32) -> torch.device:
    """Return where `step` lives.

    It is with the parameter on CUDA, where the fused kernel reads it, else on the host. With 8-bit moments it is on the
    host, since bitsandbytes takes a number.

    Args:
        param: the whole parameter.
        bits: `adamw_bits` of its group.
    """
    is_read_there = param.device.type == "cuda" and not adamw8bit.is_8bit(param.shape, bits)
    return param.device if is_read_there else torch.device("cpu")


def layout(shape: Sequence[int], bits: int = 32) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return state key -> shape and dtype of its tensor, for a whole parameter of `shape`.

    The keys are torch.optim.AdamW's: `step` (0-d fp32), `exp_avg` and `exp_avg_sq` (fp32, the parameter's shape); or
    `step` and those of `adamw8bit.layout`.

    Args:
        shape: the whole parameter's.
        bits: `adamw_bits` of its group.
    """
    moments = (tuple(shape), torch.float32)
    of_moments = (
        adamw8bit.layout(shape) if adamw8bit.is_8bit(shape, bits) else {EXP_AVG_KEY: moments, EXP_AVG_SQ_KEY: moments}
    )
    return {"step": ((), torch.float32), **of_moments}


def is_8bit(state: Mapping[str, Tensor]) -> bool:
    """Return whether these moments are in 8 bits; then the host advances `step` even where `skip` forbids the rest."""
    return EXP_AVG_CODES_KEY in state


def apply(chunks: Sequence[AdamWChunk], options: AdamWOptions) -> None:
    """Step these chunks of one device in place.

    A parameter or gradient that is not fp32 and contiguous goes through such copies, part by part, small ones together.
    A chunk of state in 8 bits begins at a multiple of 256 elements. torch's fused kernel walks parameter, gradient and
    moments by memory order, so all of them are contiguous here.
    """
    if options.cautious_weight_decay and not (type(options.lr) is float and options.lr == 0):  # then nothing decays
        step_cautiously(chunks, options, apply)
        return
    direct: list[AdamWChunk] = []
    small: list[AdamWChunk] = []
    most = options.workspace_bytes // _COPY_BYTES
    for chunk in chunks:
        if EXP_AVG_CODES_KEY in chunk.state:
            if type(options.lr) is not float:  # bitsandbytes takes a number: on a device it has to be waited for
                options = replace(options, lr=float(options.lr))
            adamw8bit.step_(chunk, options)
        elif chunk.param.device.type == "cpu" and chunk.param.numel() < chunk.size and _is_cut_in_vectors(chunk):
            _step_in_vectors(chunk, options)
        elif all(t.dtype == torch.float32 and t.is_contiguous() for t in (chunk.param, chunk.grad)):
            direct.append(chunk)
        elif is_small(chunk, most):
            small.append(chunk)
        else:
            _step_through_copies(chunk, options)
    if small:
        step_together(small, options, most, _adamw)
    if direct:
        _adamw(direct, options)


def copied_bytes(chunk: AdamWChunk, options: AdamWOptions) -> int:
    """Return the bytes of the fp32 copies of a parameter and its gradient that `apply` has at once, if any."""
    if options.cautious_weight_decay:
        return cautious_bytes(chunk, options)
    if all(t.dtype == torch.float32 and t.is_contiguous() for t in (chunk.param, chunk.grad)):
        return 0
    size = options.workspace_bytes // _COPY_BYTES
    if not is_8bit(chunk.state) and is_small(chunk, size):
        return 8 * min(TOGETHER, size)  # of all that may go with it
    if is_8bit(chunk.state):
        size = adamw8bit.chunk_size(chunk.param.device.type, options.workspace_bytes)
    return 8 * min(chunk.param.numel(), size)


def _step_through_copies(chunk: AdamWChunk, options: AdamWOptions) -> None:
    tensors = (chunk.param, chunk.grad, chunk.state["exp_avg"], chunk.state["exp_avg_sq"])
    parts: Iterable[tuple[Tensor, ...]] = [tensors]
    if chunk.param.is_contiguous() and chunk.grad.is_contiguous():
        size = max(_VECTOR, options.workspace_bytes // _COPY_BYTES // _VECTOR * _VECTOR)
        parts = zip(*(t.view(-1).split(size) for t in tensors), strict=True)
    step, first = chunk.state["step"], chunk.first  # of the part, in the order of indices, not of memory
    before = None  # the counter, from which every part starts
    for param, grad, exp_avg, exp_avg_sq in parts:
        copy = param.float().contiguous()
        if before is not None:
            step.copy_(before)
        elif param.numel() < chunk.param.numel():
            before = step.clone()
        state = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        _adamw([replace(chunk, param=copy, grad=grad.float().contiguous(), state=state)], options)
        if chunk.key is not None:
            copy = round_stochastic(copy, param, chunk.key, first, options.backend)
        if copy.data_ptr() != param.data_ptr():
            param.copy_(copy)
        first += param.numel()


def _is_cut_in_vectors(chunk: AdamWChunk) -> bool:
    """Return whether this part begins or ends inside a vector of 16 that the CPU's kernel takes from the whole."""
    stop = chunk.first + chunk.param.numel()
    is_aligned = chunk.first % _VECTOR == 0 and (stop % _VECTOR == 0 or stop == chunk.size)
    return chunk.param.is_contiguous() and chunk.grad.is_contiguous() and chunk.param.numel() > 0 and not is_aligned


def _step_in_vectors(chunk: AdamWChunk, options: AdamWOptions) -> None:
    """Step a slice so that it gets the bits that it would get in the whole parameter.

    torch's CPU kernel works on vectors of 16 and rounds the remainder differently, so that elements at both ends are
    stepped inside the zero-padded vector that they belong to in the whole.
    """
    first, size, before = chunk.first, chunk.size, chunk.state["step"].clone()
    stop = first + chunk.param.numel()
    body = min(-(-first // _VECTOR) * _VECTOR, stop), max(stop // _VECTOR * _VECTOR if stop < size else stop, first)
    flat = [t.view(-1) for t in (chunk.param, chunk.grad, chunk.state["exp_avg"], chunk.state["exp_avg_sq"])]
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
        param, grad, exp_avg, exp_avg_sq = padded
        state = {"step": chunk.state["step"].copy_(before), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        apply([replace(chunk, param=param, grad=grad, state=state, first=low, size=low + len(param))], options)
        for inside, t in zip(padded, own, strict=True):
            if inside is not t:
                t.copy_(inside[where])


def _adamw(chunks: Sequence[AdamWChunk], options: AdamWOptions) -> None:
    grads, scale = [chunk.grad for chunk in chunks], options.grad_scale
    fused = all(chunk.param.device.type in ("cpu", "cuda") for chunk in chunks)
    if scale is not None and not fused:
        grads, scale = [grad / scale for grad in grads], None
    adamw(
        [chunk.param for chunk in chunks],
        grads,
        [chunk.state["exp_avg"] for chunk in chunks],
        [chunk.state["exp_avg_sq"] for chunk in chunks],
        [],
        [chunk.state["step"] for chunk in chunks],
        fused=fused,
        amsgrad=False,
        beta1=options.betas[0],
        beta2=options.betas[1],
        lr=options.lr,
        weight_decay=options.weight_decay,
        eps=options.eps,
        maximize=options.maximize,
        grad_scale=scale,
        found_inf=options.skip,
    )


def offload_tasks(
    chunks: Sequence[AdamWChunk], options: AdamWOptions, commit: Callable[[], None], *, is_moved: bool
) -> Iterator[OffloadTask]:
    """Give tasks that step these chunks of one device, small ones together.

    State that is moved there takes one half of the workspace, the copies that AdamW makes the other; the result is
    bitwise the same.
    """
    lists: Iterable[Sequence[AdamWChunk]] = [chunks]
    if is_moved:
        options = replace(options, workspace_bytes=options.workspace_bytes // 2)
        lists = pack(chunks, options.workspace_bytes // NUM_BUFFERS)
    for together in lists:
        tensors = [(chunk, tensor) for chunk in together for tensor in chunk.state.values()]
        written = [t for chunk, t in tensors if t.ndim > 0 or (chunk.is_last and _is_counter_staged(chunk))]
        # Each part starts from the old counter, so that only the last may write it.
        read = [t for chunk, t in tensors if t.ndim == 0 and not chunk.is_last and _is_counter_staged(chunk)]
        run = partial(_apply_staged, together, options, commit, len(written))
        yield OffloadTask(together[0].param.device, run, written, read)


def _is_counter_staged(chunk: AdamWChunk) -> bool:
    """Return whether torch's fused kernel reads the counter on the device; else it is advanced on the host."""
    return not is_8bit(chunk.state) and step_device(chunk.param).type != "cpu"


def _apply_staged(
    chunks: Sequence[AdamWChunk],
    options: AdamWOptions,
    commit: Callable[[], None],
    num_written: int,
    staged: Sequence[Tensor] | None,
) -> None:
    """Step chunks with their state in these tensors, in the order of `offload_tasks`; None leaves it where it is."""
    commit()
    if staged is None:
        apply(chunks, options)
        return
    written, read = iter(staged[:num_written]), iter(staged[num_written:])
    on_device = []
    for chunk in chunks:
        state = {}
        for name, tensor in chunk.state.items():
            if tensor.ndim > 0:
                state[name] = next(written)
            elif _is_counter_staged(chunk):
                state[name] = next(written if chunk.is_last else read)
            else:
                state[name] = tensor if chunk.is_last else tensor.clone()
        on_device.append(replace(chunk, state=state))
    apply(on_device, options)
