"""Which form, dtype and products a shape takes: by shape and the table of rates alone.

Free memory or a timing never decides, so a resumed run takes the same path and is bitwise the same run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from muon8bit_kernels import TINY_MAX

from .coefficients import Coefficients
from .cost import Form, operations
from .products import ProductKind
from .rates import Rates, at_size, rates_of
from .stability import fits_fp16, segments

# What one program of the tiny kernel takes, its small side at most TINY_MAX: no more elements (64 x 16384), since it
# has one multiprocessor whatever the size.
TINY_ELEMENTS = 2**20
# Beyond this many elements those of a normalized matrix (1 / sqrt(elements)) are subnormal in fp16. At 8192 x 28672,
# just under it, fp16 still has .16 of the bf16 error (emulated, 1/k spectrum), at 2^32 .56.
_FP16_MAX_ELEMENTS = 2**28
# Squarer matrices have tiny singular values: there the fp16 Gram form with one restart has up to .77 of the bf16 error
# (Gaussian), from here on .45 at most. The standard form is about as cheap for them.
_FP16_GRAM_MIN_ASPECT = 1.25


@dataclass(frozen=True)
class NSMethod:
    """How a shape is orthogonalized.

    Attributes:
        form: of the iteration, `"standard"` or `"gram"`.
        dtype: of X and every iterate: float32, bfloat16 or float16; accumulated in fp32.
        products: how symmetric products are made, `"vendor"`, `"panels"` or `"kernel"`.
        segments: of the Gram form, the numbers of steps between its restarts.
        tiny: the whole step of these matrices fits the one-launch kernel (CUDA, fp32 Gram form).
        cost: floating-point operations over the device's relative rate: compares paths of one shape and device.
    """

    form: Form
    dtype: torch.dtype
    products: ProductKind = "vendor"
    segments: tuple[int, ...] = ()
    tiny: bool = False
    cost: float = field(default=0.0, compare=False)


_FORCED: ContextVar[dict[str, Any] | None] = ContextVar("_FORCED", default=None)


@contextmanager
def force_method(**attributes: Any) -> Iterator[None]:
    """Let `choose_method` take only methods with these attributes of `NSMethod`, as `force_method(products="kernel")`.

    For benchmarks and tests. `choose_method` raises ValueError where no path has them.
    """
    token = _FORCED.set(attributes)
    try:
        yield
    finally:
        _FORCED.reset(token)


def choose_method(
    rows: int, cols: int, schedule: Coefficients, kind: str, dtype: torch.dtype | None = None, *, tiny: bool = True
) -> NSMethod:
    """The cheapest path for matrices [rows, cols].

    In half precision fp16 is preferred to bf16, at equal cost: its error is .11 to .17 of that of torch.optim.Muon's
    bf16 in the standard form, .1 to .45 in the Gram form (Gaussian, 1/k and half-rank spectra; emulated in torch, 64 to
    512 rows). Where fp16 cannot hold the schedule or the shape, bf16 runs, in the standard form.

    Args:
        schedule: of `resolve`; says which dtypes carry the Gram form, and with which restarts.
        kind: of `device_kind`.
        dtype: restrict to float32, bfloat16 or float16; None leaves all open.
        tiny: whether the caller can take the one-launch kernel.

    Raises:
        ValueError: for fp16 with a schedule whose iterates it cannot hold, or a `force_method` that does not exist.
    """
    if dtype == torch.float16 and not fits_fp16(schedule):
        raise ValueError("ns_dtype=torch.float16 cannot hold the iterates of these ns_coefficients: use torch.bfloat16")
    forced = tuple((_FORCED.get() or {}).items())
    return _cheapest(rows, cols, schedule, kind, dtype, tiny, rates_of(kind), forced)


@cache
def _cheapest(
    rows: int,
    cols: int,
    schedule: Coefficients,
    kind: str,
    dtype: torch.dtype | None,
    tiny: bool,
    rates: Rates,
    forced: tuple[tuple[str, Any], ...],
) -> NSMethod:
    paths = [
        replace(path, cost=_cost(path, rows, cols, len(schedule.steps), rates))
        for path in _candidates(rows, cols, schedule, kind, dtype, tiny, rates)
        if all(getattr(path, name) == value for name, value in forced)
    ]
    if not paths:
        raise ValueError(f"no path of a matrix [{rows}, {cols}] on {kind} in {dtype or 'any dtype'} has {dict(forced)}")
    return min(paths, key=lambda path: path.cost)


def _candidates(
    rows: int, cols: int, schedule: Coefficients, kind: str, dtype: torch.dtype | None, tiny: bool, rates: Rates
) -> Iterator[NSMethod]:
    """The paths that are accurate on this kind of device; of equal ones the preferred first."""
    kinds: list[ProductKind] = ["vendor", *([rates.symmetric_kind] if rates.symmetric_kind else [])]
    small, large = min(rows, cols), max(rows, cols)
    is_unfit_for_fp16 = small * large > _FP16_MAX_ELEMENTS or not fits_fp16(schedule)
    fits_tiny = kind.startswith("cuda") and small <= TINY_MAX and small * large <= TINY_ELEMENTS
    for candidate in (torch.float16, torch.bfloat16, torch.float32):
        if dtype not in (None, candidate) or (dtype is None and candidate == torch.float16 and is_unfit_for_fp16):
            continue
        parts = segments(schedule, candidate) if rates.gram else None
        if candidate == torch.float16 and large < _FP16_GRAM_MIN_ASPECT * small:
            parts = None
        for products in kinds:
            if products == "kernel" and candidate == torch.float32:
                continue  # on sm_100 Triton would make it TF32
            yield NSMethod("standard", candidate, products)
            if parts:
                yield NSMethod("gram", candidate, products, parts)
        if candidate == torch.float32 and parts and len(parts) == 1 and tiny and fits_tiny:
            yield NSMethod("gram", candidate, "vendor", parts, tiny=True)


def _cost(path: NSMethod, rows: int, cols: int, num_steps: int, rates: Rates) -> float:
    """The cost function: operations over relative rates. A launch of many tiny matrices is cheaper than any."""
    if path.tiny:
        return 0.0
    small = min(rows, cols)
    rate = {torch.float16: at_size(rates.fp16, small), torch.bfloat16: at_size(rates.bf16, small)}.get(path.dtype)
    gain = None if path.products == "vendor" else at_size(rates.symmetric, small)
    symmetric, other = operations(path.form, rows, cols, num_steps, max(1, len(path.segments)))
    efficiency = (rates.gram or 1.0) if path.form == "gram" else 1.0
    return (symmetric / (gain or 1.0) + other) / ((rate or 1.0) * efficiency)
