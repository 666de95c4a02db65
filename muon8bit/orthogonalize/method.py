"""Choice of the form, the dtype and the products for a shape, and of how many matrices go together.

The shape, the number of matrices of that shape in the group and the table of rates alone decide. Free memory, a timing
or the gradients that are there never decide, so a resumed run chooses the same method and is bitwise the same run, and
so do all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from muon8bit_kernels import TINY_MAX

from .coefficients import Coefficients
from .cost import Form, num_products, operations, triangle_gain, waves
from .products import NUM_PANELS, ProductKind
from .rates import RATES, Rates, at_size
from .stability import fits_fp16, segments

# What one program of the tiny kernel takes, its small side at most TINY_MAX: no more elements (64 x 16384).
TINY_ELEMENTS = 2**20
# Beyond this many elements those of a normalized matrix (1 / sqrt(elements)) are subnormal in fp16. At 8192 x 28672,
# just under it, fp16 still has .16 of the bf16 error (emulated, 1/k spectrum), at 2^32 .56.
_FP16_MAX_ELEMENTS = 2**28
# Squarer matrices have tiny singular values: there the fp16 Gram form with one restart has up to .77 of the bf16 error
# (Gaussian), from here on .45 at most. The standard form is about as cheap for them.
_FP16_GRAM_MIN_ASPECT = 1.25
# Of the kernels around the products, which the one-launch kernel does not need: the momentum's and the update's.
_OTHER_LAUNCHES = 2
# Matrices with fewer rows than this gain on CPU from batching; above, one fills the cores.
_CPU_BATCH_ROWS = 128


@dataclass(frozen=True)
class NSMethod:
    """The way in which matrices of one shape are orthogonalized.

    Attributes:
        form: the iteration's form, `"standard"` or `"gram"`.
        dtype: the dtype of X and every iterate: float32, bfloat16 or float16. Products are accumulated in fp32.
        products: how symmetric products are made, `"vendor"`, `"panels"` or `"kernel"`.
        segments: the numbers of steps between restarts, in the Gram form.
        tiny: the whole step of these matrices fits the one-launch kernel (CUDA, fp32 Gram form).
        cost: time of one matrix, in floating-point operations of the device's fp32 product. It compares methods of one
            shape and device.
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

    It serves benchmarks and tests. `choose_method` raises ValueError where no method has them.
    """
    token = _FORCED.set(attributes)
    try:
        yield
    finally:
        _FORCED.reset(token)


def rates_of(kind: str) -> Rates:
    """Return the rates of a device kind, else of its device type, else of "other"."""
    return RATES.get(kind) or RATES.get(kind.split("_")[0]) or RATES["other"]


def choose_method(
    rows: int,
    cols: int,
    coefficients: Coefficients,
    kind: str,
    dtype: torch.dtype | None = None,
    *,
    tiny: bool = True,
    count: int = 1,
    budget_bytes: int | None = None,
    rates: Rates | None = None,
) -> NSMethod:
    """Return the cheapest method for matrices [rows, cols].

    In half precision fp16 is preferred to bf16, at equal cost: its error is .11 to .17 of that of torch.optim.Muon's
    bf16 in the standard form, .1 to .45 in the Gram form (Gaussian, 1/k and half-rank spectra; emulated in torch, 64 to
    512 rows). Where fp16 cannot hold the iterates or the shape, bf16 runs, in the standard form.

    Args:
        rows, cols: the matrices' shape.
        coefficients: from `resolve_coefficients`. They decide which dtypes carry the Gram form, and with which
            restarts.
        kind: the device kind, from `device_kind`.
        dtype: restricts the choice to float32, bfloat16 or float16. None leaves all open.
        tiny: the caller can take the one-launch kernel.
        count: the number of matrices of this shape in the group, whether they have gradients or not.
        budget_bytes: the workspace's size in bytes, which limits how many of them go together; None limits nothing.
        rates: the rates of the device; None takes the row of `RATES` for its kind.

    Raises:
        ValueError: for fp16 with coefficients whose iterates it cannot hold, or where no method has what `force_method`
            asks for.
    """
    if dtype == torch.float16 and not fits_fp16(coefficients):
        raise ValueError("ns_dtype=torch.float16 cannot hold the iterates of these ns_coefficients: use torch.bfloat16")
    forced = tuple((_FORCED.get() or {}).items())
    together = max(1, count), budget_bytes
    return _cheapest(rows, cols, coefficients, kind, dtype, tiny, together, rates or rates_of(kind), forced)


@cache
def _cheapest(
    rows: int,
    cols: int,
    coefficients: Coefficients,
    kind: str,
    dtype: torch.dtype | None,
    tiny: bool,
    together: tuple[int, int | None],
    rates: Rates,
    forced: tuple[tuple[str, Any], ...],
) -> NSMethod:
    count, budget_bytes = together

    def cost(method: NSMethod) -> float:
        fitting = count
        if budget_bytes is not None and not method.tiny:
            fitting = min(count, batch_size(method, rows, cols, kind, budget_bytes))
        return method_cost(method, rows, cols, len(coefficients.steps), rates, fitting)

    methods = [
        replace(method, cost=cost(method))
        for method in _candidates(rows, cols, coefficients, dtype, tiny, rates)
        if all(getattr(method, name) == value for name, value in forced)
    ]
    if not methods:
        raise ValueError(
            f"no method of a matrix [{rows}, {cols}] on {kind} in {dtype or 'any dtype'} has {dict(forced)}"
        )
    return min(methods, key=lambda method: method.cost)


def _candidates(
    rows: int, cols: int, coefficients: Coefficients, dtype: torch.dtype | None, tiny: bool, rates: Rates
) -> Iterator[NSMethod]:
    """Give the methods that are accurate on this kind of device, of equally cheap ones the preferred first."""
    kinds: list[ProductKind] = ["vendor", *([rates.symmetric_kind] if rates.symmetric_kind else [])]
    small, large = min(rows, cols), max(rows, cols)
    is_unfit_for_fp16 = small * large > _FP16_MAX_ELEMENTS or not fits_fp16(coefficients)
    fits_tiny = rates.tiny is not None and small <= TINY_MAX and small * large <= TINY_ELEMENTS
    for candidate in (torch.float16, torch.bfloat16, torch.float32):
        if dtype not in (None, candidate) or (dtype is None and candidate == torch.float16 and is_unfit_for_fp16):
            continue
        parts = segments(coefficients, candidate) if rates.gram else None
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


def method_cost(method: NSMethod, rows: int, cols: int, num_steps: int, rates: Rates, count: int) -> float:
    """Return the time of one of `count` matrices that go together, in operations of the device's fp32 product.

    Args:
        method: without its cost.
        rows, cols: the matrices' shape.
        num_steps: the number of Newton-Schulz steps.
        rates: the device's row.
        count: the number of matrices in one launch.
    """
    num_segments = max(1, len(method.segments))
    symmetric, other = operations(method.form, rows, cols, num_steps, num_segments)
    if method.tiny:  # each multiprocessor takes one matrix at a time
        program = (symmetric + other) / (rates.tiny or 1.0)
        return (program * waves(count, rates.architecture) + rates.launch) / count
    small = min(rows, cols)
    rate = {torch.float16: at_size(rates.fp16, small), torch.bfloat16: at_size(rates.bf16, small)}.get(method.dtype)
    efficiency = (rates.gram or 1.0) if method.form == "gram" else 1.0
    launches = num_products(method.form, num_steps, num_segments) + _OTHER_LAUNCHES
    gain = 1.0 if method.products == "vendor" else symmetric_gain(small, count, rates) or 1.0
    work = (symmetric / gain + other) / ((rate or 1.0) * efficiency)
    return work + launches * rates.launch / count


def symmetric_gain(n: int, count: int, rates: Rates) -> float | None:
    """Return how many times faster `count` symmetric products [n, n] are than the vendor's, None where none is known.

    Below `rates.min_gain` it counts as none.
    """
    gain = at_size(rates.symmetric, n)
    if gain is not None and rates.triangle is not None:
        gain = min(gain, rates.triangle * triangle_gain(n, count, rates.architecture))
    return None if gain is None or gain < rates.min_gain else gain


def workspace_bytes(method: NSMethod, rows: int, cols: int, kind: str) -> int:
    """Return the bytes of one matrix at the peak of `orthogonalize`.

    X, its successors, the small matrices, casts and copies are counted. The casts of the torch reference of the
    symmetric product are not, nor what a library keeps for itself (cuBLAS' workspace, oneDNN's packing).
    """
    m, n = min(rows, cols), max(rows, cols)
    large, small = m * n, m * m
    num_large = 2  # X and its successor take turns
    on_cpu = kind.startswith("cpu")
    if on_cpu:
        num_large += rows > cols and (method.form == "standard" or method.products == "panels")  # X as contiguous rows
        if method.dtype == torch.float16 or (method.dtype == torch.float32 and m >= _CPU_BATCH_ROWS):
            # Results of casts and of oneDNN's products are new each time.
            num_large += max(0, min(len(method.segments) - 1, 2))
        if method.dtype == torch.float16 and method.form == "standard":
            num_large += 2
    elements = num_large * large
    if method.form == "standard":
        elements += 2 * small  # A, P
    elif len(method.segments) > 1:
        elements += 4 * small  # R, Z, Q and a successor
    else:  # all of them before the last product, and Q with it
        elements = max(elements - large + 4 * small, elements + small)
    if method.products == "panels":
        elements += small // NUM_PANELS
    casts = 4 * (2 * large + small) if on_cpu and method.dtype == torch.float16 else 0
    return elements * method.dtype.itemsize + casts


def batch_size(method: NSMethod, rows: int, cols: int, kind: str, budget_bytes: int) -> int:
    """Return how many matrices [rows, cols] to orthogonalize together within `budget_bytes`; at least 1."""
    if kind.startswith("cpu") and min(rows, cols) >= _CPU_BATCH_ROWS:
        return 1
    return max(1, budget_bytes // max(1, workspace_bytes(method, rows, cols, kind)))


class ColumnPiece(NamedTuple):
    """Columns of matrices that are orthogonalized by themselves.

    Attributes:
        columns: the columns of the matrices.
        method: how they are orthogonalized.
        size: the number of matrices whose columns are orthogonalized together.
    """

    columns: slice
    method: NSMethod
    size: int


class Partition(NamedTuple):
    """The way in which matrices of one shape go through the second phase of a step.

    Attributes:
        size: the number of matrices whose momenta are averaged together, at least 1.
        bytes_per_matrix: the bytes of the workspace that each of them takes.
        pieces: one piece of all columns, or one for each of `widths`.
    """

    size: int
    bytes_per_matrix: int
    pieces: tuple[ColumnPiece, ...]


def partition(
    rows: int,
    cols: int,
    coefficients: Coefficients,
    kind: str,
    budget_bytes: int,
    *,
    dtype: torch.dtype | None = None,
    count: int = 1,
    widths: Sequence[int] | None = None,
    copied_bytes: int = 0,
    rates: Rates | None = None,
    tiny: bool = True,
) -> Partition:
    """Return how many matrices [rows, cols] go together, and by which method, within a workspace of `budget_bytes`.

    Args:
        rows, cols: the matrices' shape.
        coefficients: from `resolve_coefficients`.
        kind: the device kind, from `device_kind`.
        budget_bytes: the workspace's size in bytes.
        dtype: the dtype of Newton-Schulz; None takes the cheapest.
        count: the number of matrices of this shape in the group, whether they have gradients or not.
        widths: the numbers of columns that are orthogonalized by themselves. The fp32 momenta then take one half of the
            budget, Newton-Schulz the other. None means that the matrices are whole.
        copied_bytes: the bytes that each matrix takes besides.
        rates: the rates of the device; None takes the row of `RATES` for its kind.
        tiny: the one-launch kernel may do it.
    """
    forced, tiny = tuple((_FORCED.get() or {}).items()), tiny and widths is None
    numbers = rows, cols, coefficients, kind, budget_bytes, dtype, count, widths, copied_bytes, tiny
    return _partition(*numbers, rates or rates_of(kind), forced)


@cache
def _partition(
    rows: int,
    cols: int,
    coefficients: Coefficients,
    kind: str,
    budget_bytes: int,
    dtype: torch.dtype | None,
    count: int,
    widths: Sequence[int] | None,
    copied_bytes: int,
    tiny: bool,
    rates: Rates,
    _: object,  # what is forced, which `choose_method` reads
) -> Partition:
    pieces, start = [], 0
    if widths is not None:
        budget_bytes //= 2
    for width in widths or (cols,):
        together: dict[str, Any] = {"count": count, "budget_bytes": budget_bytes, "rates": rates}
        method = choose_method(rows, width, coefficients, kind, dtype, tiny=tiny, **together)
        size = batch_size(method, rows, width, kind, budget_bytes)
        pieces.append(ColumnPiece(slice(start, start + width), method, size))
        start += width
    if widths is None:
        one = 0 if method.tiny else workspace_bytes(method, rows, cols, kind)
    else:
        one = 4 * rows * cols
        size = max(1, budget_bytes // one)
    if copied_bytes and one:
        one += copied_bytes
        size = min(size, max(1, budget_bytes // one))
    return Partition(size, one, tuple(pieces))
