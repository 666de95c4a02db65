"""Update of parameters in torch: decay, step and rounding; `triton.update` gives the same bits.

    W  =  round(W * decay - O * scale)        each operation rounded to fp32, then once to the parameter's dtype

Cautious weight decay (arXiv 2510.12402) takes W in place of W * decay where W and O * scale have opposite signs.

Stochastic rounding to bf16 adds 16 random bits to the 16 that bf16 has no room for, and cuts them off: the upper
neighbour (in magnitude) is taken with the probability that makes the mean exact. Numbers that bf16 holds stay. Signs
are symmetric. A number beyond the largest bf16 goes to it or to infinity. NaN stays NaN. Source: the scheme of Gupta et
al. (arXiv 1502.02551), on the bits of IEEE numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..batches import StackedRows, batch_shape, elements_at_once, known_flag
from ..element_moment import ElementMoment
from ..random_bits import ADDED, FINAL_1, FINAL_2, NUM_BYTES, WORD_1, WORD_2, signed


def _rotate_(words: Tensor, by: int) -> Tensor:
    """Turn int32 bits to the left; torch's right shift copies the sign, and the mask takes it off."""
    low = (words >> (32 - by)).bitwise_and_((1 << by) - 1)
    return words.bitwise_left_shift_(by).bitwise_or_(low)


def _xor_shifted_(words: Tensor, by: int) -> Tensor:
    return words.bitwise_xor_((words >> by).bitwise_and_((1 << (32 - by)) - 1))


def random_bits(indices: Tensor, *, key: int | Tensor) -> Tensor:
    """Return the hash of element indices: int32, the shape of `indices`.

    Args:
        indices: int64, any shape, >= 0.
        key: the int32 of `rounding_key`, or an int32 tensor that broadcasts.
    """
    # The cast keeps the low 32 bits.
    state = _rotate_(indices.to(torch.int32).mul_(signed(WORD_1)), 15).mul_(WORD_2).bitwise_xor_(key)
    _rotate_(state, 13).mul_(5).add_(signed(ADDED))
    # A high word of 0 changes nothing; on CUDA, looking for one would wait.
    if indices.device.type != "cpu" or (indices.numel() and indices.max() >= 2**32):
        high = (indices >> 32).to(torch.int32)
        state.bitwise_xor_(_rotate_(high.mul_(signed(WORD_1)), 15).mul_(WORD_2))
    _rotate_(state, 13).mul_(5).add_(signed(ADDED)).bitwise_xor_(NUM_BYTES)
    _xor_shifted_(state, 16).mul_(signed(FINAL_1))
    _xor_shifted_(state, 13).mul_(signed(FINAL_2))
    return _xor_shifted_(state, 16)


def _rounded(values: Tensor, indices: Tensor, key: int | Tensor) -> Tensor:
    """Return fp32 values as bf16 numbers, still held in fp32; the low half of each element's random bits decides."""
    noise = random_bits(indices, key=key).bitwise_and_(0xFFFF)
    bits = values.contiguous().view(torch.int32)
    rounded = noise.add_(bits).bitwise_and_(-(2**16)).view(torch.float32)
    return torch.where(values.isnan(), values, rounded)


def check_rounding(param: Tensor, keys: Sequence[int] | None) -> None:
    """Raise ValueError where stochastic rounding is asked of a dtype that has none."""
    if keys is not None and param.dtype != torch.bfloat16:
        raise ValueError(f"stochastic rounding is for bfloat16 parameters, not {param.dtype}")


def _decay_cautiously_(values: Tensor, update: Tensor, decay: float | Tensor, opposed: Tensor, factor: Tensor) -> None:
    """Multiply values by `decay` in place, but for those with a sign opposite to that of `update`; NaN has none.

    On a CPU `torch.where` takes a hundred times as long as a product.

    Args:
        values, update: fp32, one shape.
        decay: finite.
        opposed, factor: memory of the same shape.
    """
    torch.sign(update, out=opposed)
    opposed.mul_(torch.sign(values, out=factor)).clamp_(max=0.0)  # -1 where signs are opposite, else 0
    torch.add(opposed, 1.0, out=factor).mul_(decay).sub_(opposed)  # 1 there, else decay, both exactly
    values.mul_(factor)


def _of_rows(factors: Tensor, numbers: slice, rows: int) -> Tensor:
    """Return the factors [batch, rows or 1, cols or 1] of some rows of all matrices: [numbers, cols or 1]."""
    if factors.shape[1] == rows:
        return factors.flatten(0, 1)[numbers]
    return factors[torch.arange(numbers.start, numbers.stop, device=factors.device) // rows, 0]


def update_params(
    params: Sequence[Tensor],
    directions: Tensor | Sequence[Tensor],
    *,
    decay: float | Tensor,
    scale: float | Tensor,
    keys: Sequence[int] | None = None,
    firsts: Sequence[int] | None = None,
    pitch: int | None = None,
    cautious: bool = False,
    skip: Tensor | None = None,
    factors: Tensor | None = None,
    moment: ElementMoment | None = None,
    inverses: Tensor | None = None,
) -> None:
    """Update param <- param * decay - direction * scale in place, in fp32, rounded once to the parameter's dtype.

    Args:
        params: stacks [count, rows, cols] of one dtype, fp32, bf16 or fp16, any strides.
        directions: [batch, rows, cols], or a list of stacks [count, rows, cols] of as many matrices; any of these
            dtypes, any strides.
        decay: 1 - lr * weight_decay; a float, rounded to fp32, or a 0-d fp32 tensor on the parameters' device.
        scale: lr times the factor of the shape; as `decay`. Where it is 0 in fp32, `directions` is not looked at, so
            that with decay 1 every bit stays, the sign of a zero too.
        keys: one of `rounding_key` a matrix: bf16 is rounded stochastically. None rounds to nearest, ties to even.
        firsts: with keys, the global index of element [0, 0] of each matrix; None means 0.
        pitch: the difference of the global indices of elements [1, 0] and [0, 0]; None means cols.
        cautious: an element whose sign is opposite to that of its direction * scale does not decay.
        skip: fp32, 0-d or [batch], one a matrix; where it is not 0, nothing is written.
        factors: fp32 [batch, rows, 1], [batch, 1, cols] or [batch, 1, 1], which the directions are multiplied by first.
        moment: of each element, which is averaged, divides its direction, and is written.
        inverses: with quantized moments, fp32 [batch, rows, blocks]: 255 over their new scales, 0 where these are 0.

    Raises:
        ValueError: for keys with parameters that are not bf16.
    """
    if keys is not None:
        check_rounding(params[0], keys)
    batch, rows, cols = batch_shape(params)
    is_over, skip = known_flag(skip, rows)
    if is_over:
        return
    if not isinstance(scale, Tensor):  # in fp32, as a kernel gets it: 1e-46 is 0 there
        scale = torch.tensor(scale, dtype=torch.float32, device="cpu").item()
    towards = StackedRows([directions] if isinstance(directions, Tensor) else directions)
    old, device, every = StackedRows(params), params[0].device, slice(0, cols)
    if keys is not None:
        row_keys = torch.tensor(keys, dtype=torch.int32, device=device).repeat_interleave(rows).unsqueeze(1)
        row_starts = torch.tensor(firsts or [0] * batch, dtype=torch.int64, device=device).unsqueeze(1)
        row_starts = (row_starts + torch.arange(rows, device=device) * (pitch or cols)).view(-1, 1)
        columns = torch.arange(cols, device=device)
    can_be_in_place = params[0].dtype == torch.float32 and not isinstance(scale, Tensor) and skip is None
    num_rows = min(batch * rows, max(1, elements_at_once(device) // max(1, cols)))
    # Fresh memory costs more than arithmetic.
    buffers = torch.empty(4 if cautious else 2, num_rows, cols, device=device, dtype=torch.float32)
    room = None if moment is None else moment.room(num_rows, cols)
    for start in range(0, batch * rows, num_rows):
        r = slice(start, min(start + num_rows, batch * rows))
        new, scratch, *more = (buffer[: r.stop - start] for buffer in buffers)
        view = old.in_place(r) if can_be_in_place else None
        new = old.read(r, every, new) if view is None else view
        is_zero = not isinstance(scale, Tensor) and scale == 0
        update = None if is_zero and moment is None else towards.read(r, every, scratch)
        if moment is not None and room is not None and update is not None:
            moment.write_and_divide_(r, update, inverses, skip, room)
        if factors is not None and update is not None:
            update.mul_(_of_rows(factors, r, rows))
        update = None if is_zero or update is None else update.mul_(scale)
        if cautious and update is not None:
            _decay_cautiously_(new, update, decay, *more)
        else:
            new.mul_(decay)
        if update is not None and isinstance(scale, Tensor):
            new = torch.where(scale == 0, new, new - update)
        elif update is not None:
            new.sub_(update)
        if keys is not None:
            new = _rounded(new, row_starts[r] + columns, row_keys[r])
        if new is not view:
            old.write(r, every, new, skip)


def round_stochastic(values: Tensor, *, key: int, first: int = 0) -> Tensor:
    """Round fp32 `values` (any shape, contiguous) to bf16 of the same shape stochastically.

    Args:
        values: the numbers to round.
        key: from `rounding_key`.
        first: the global element index of the first value; the others follow in order.
    """
    rounded = torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)
    size = elements_at_once(values.device)
    for piece, out in zip(values.view(-1).split(size), rounded.view(-1).split(size), strict=True):
        indices = torch.arange(first, first + len(piece), device=values.device)
        out.copy_(_rounded(piece, indices, key))
        first += len(piece)
    return rounded
