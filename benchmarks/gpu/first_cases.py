"""Bits of the kernels on a decisive set of shapes: each case is computed by two backends and compared.

A case makes its inputs on the CPU from a fixed seed and calls a backend on a device. State, scales, output and rounded
parameters are compared bit for bit; sums and products have a bound. The set is chosen so that every kernel, codebook
and layout, sizes that are and are not multiples of 16, and each tiling of the symmetric product come up with few
compilations (`compilations` lists them).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from muon8bit_kernels import ElementMoment, Kernels, reference
from muon8bit_kernels.codebooks import Codebook
from torch import Tensor

from muon8bit.orthogonalize import resolve_coefficients

JORDAN = resolve_coefficients("jordan", 5).steps
BETA, BLOCK, KEYS = 0.95, 2048, [-5, 7, 2**31 - 1]
SUMS, HALF_PRODUCT, FP32_PRODUCT = 1e-4, 1e-2, 1e-3  # bounds of ||ours - theirs|| / ||theirs||


@dataclass
class Found:
    """Results of a case.

    Attributes:
        exact: tensors that have the same bits with every backend.
        close: tensors, and the bound of the norm of their difference over their norm.
    """

    exact: dict[str, Tensor] = field(default_factory=dict)
    close: dict[str, tuple[Tensor, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class BitCase:
    """Function of a backend, a device and whether shapes are to be tiny (for the dry run)."""

    name: str
    run: Callable[[Kernels, torch.device, bool], Found]


def compare(ours: Found, theirs: Found) -> None:
    """Raise ValueError, naming the result, where two backends differ."""
    for name, tensor in ours.exact.items():
        found, expected = tensor.cpu(), theirs.exact[name]
        as_ints = {1: torch.int8, 2: torch.int16, 4: torch.int32}[found.itemsize]
        differing = int((found.contiguous().view(as_ints) != expected.contiguous().view(as_ints)).sum())
        if differing:
            raise ValueError(f"{name}: {differing} of {found.numel()} elements have other bits than the reference")
    for name, (tensor, bound) in ours.close.items():
        expected = theirs.close[name][0].double()
        error = float((tensor.cpu().double() - expected).norm() / expected.norm())
        if not error <= bound:  # NaN is none
            raise ValueError(f"{name}: relative difference {error:.3g} to the reference, bound {bound:.3g}")


def _random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return rows of different sizes, one of them zero."""
    generator = torch.Generator("cpu").manual_seed(seed)
    values = torch.randn(shape, generator=generator, device="cpu")
    values *= torch.logspace(-3, 2, shape[-2], device="cpu").unsqueeze(1)
    values[..., shape[-2] // 2, :] = 0.0
    return values.to(dtype)


def _state(values: Tensor, codebook: Codebook | None, block_size: int, device: torch.device) -> Any:
    """Return stacks of one and of all other matrices: codes, and scales or None."""
    if codebook is None:
        return [values[:1].to(device, copy=True), values[1:].to(device, copy=True)], None
    pairs = [reference.quantize(matrix, codebook=codebook, block_size=block_size) for matrix in values]
    codes, scales = (torch.stack([pair[n] for pair in pairs]) for n in (0, 1))
    return [[t[:1].to(device, copy=True), t[1:].to(device, copy=True)] for t in (codes, scales)]


def _across(tensor: Tensor, across: bool) -> Tensor:
    return tensor.mT.contiguous().mT if across else tensor


def momentum(
    codebook: Codebook | None,
    kernels: Kernels,
    device: torch.device,
    small: bool,
    *,
    block: int = BLOCK,
    shape: tuple[int, int] = (40, 4096),
    grad_dtype: torch.dtype = torch.bfloat16,
    across: bool = False,
    signs: bool = False,
) -> Found:
    """Do both phases of a step of three matrices, with the flag of the step given."""
    rows, cols = (3, shape[1] // 64 + 3) if small else shape
    codes, scales = _state(_random(3, rows, cols, seed=1), codebook, block, device)
    grads = _across(_random(3, rows, cols, seed=2, dtype=grad_dtype), across).to(device)
    stacks = [grads[:1], grads[1:]]
    options: dict[str, Any] = {"beta": BETA, "nesterov": not signs, "codebook": codebook, "block_size": block}
    sums = kernels.momentum_stats(codes, scales, stacks, **options)
    out = torch.empty(3, rows, cols, dtype=torch.float16, device=device)
    norms, skip = torch.tensor([2.0, 0.5, 300.0], device="cpu").to(device), torch.zeros((), device=device)
    kernels.momentum_apply(codes, scales, stacks, norms, out, **options, skip=skip, signs=signs)
    named = {"codes": torch.cat(codes), "out": out} | ({} if scales is None else {"scales": torch.cat(scales)})
    return Found(named, {"sums of squares": (sums, SUMS)})


def cut(codebook: Codebook, kernels: Kernels, device: torch.device, small: bool) -> Found:
    """Do both phases of some columns of matrices, whose scales are those of whole rows."""
    rows, cols, first, width = (3, 100, 40, 30) if small else (40, 5120, 1600, 1600)
    whole, scales = _state(_random(3, rows, cols, seed=3), codebook, BLOCK, device)
    codes = [stack[..., first : first + width].contiguous() for stack in whole]
    grads = [_random(n, rows, width, seed=4, dtype=torch.bfloat16).to(device) for n in (1, 2)]
    options: dict[str, Any] = {"beta": BETA, "nesterov": True, "codebook": codebook, "block_size": BLOCK}
    options["first_col"] = first
    sums, maxima = kernels.momentum_stats_cut(codes, scales, grads, **options)
    out = torch.empty(3, rows, width, dtype=torch.float16, device=device)
    norms, skip = torch.ones(3, device=device), torch.zeros((), device=device)
    kernels.momentum_apply_cut(codes, scales, grads, torch.cat(scales) * 2, norms, out, **options, skip=skip)
    named = {"codes": torch.cat(codes), "scales": torch.cat(scales), "out": out, "maxima": maxima}
    return Found(named, {"sums of squares": (sums, SUMS)})


def quantization(codebook: Codebook, kernels: Kernels, device: torch.device, small: bool) -> Found:
    """Quantize, and decode again."""
    values = _random(3, 70, seed=5) if small else _random(10, BLOCK + 72, seed=5)
    codes, scales = kernels.quantize(values.to(device), codebook=codebook, block_size=BLOCK)
    decoded = kernels.dequantize(codes, scales, codebook=codebook, block_size=BLOCK)
    return Found({"codes": codes, "scales": scales, "decoded": decoded})


def update(
    dtype: torch.dtype,
    kernels: Kernels,
    device: torch.device,
    small: bool,
    *,
    stochastic: bool = False,
    across: bool = False,
    lr_on_device: bool = False,
    factors: bool = False,
) -> Found:
    """Update three matrices by bf16 or fp16 directions, with the flag of the step given."""
    rows, cols = (3, 70) if small else (64 if factors else 40, 4096)
    params = [_random(n, rows, cols, seed=6, dtype=dtype).to(device, copy=True) for n in (1, 2)]
    directions = _across(_random(3, rows, cols, seed=7, dtype=torch.float16), across).to(device)
    how: dict[str, Any] = {"decay": 0.999, "scale": 0.02}
    if lr_on_device:
        how = {name: torch.tensor(value, device="cpu").to(device) for name, value in how.items()}
    how |= {"keys": KEYS, "firsts": [0, 2**33, 11]} if stochastic else {}
    how |= {"factors": _random(3, rows, 1, seed=12).to(device)} if factors else {}
    kernels.update_params(params, directions, **how, skip=torch.zeros((), device=device))
    found = Found({"parameters": torch.cat(params)})
    if stochastic:
        rounded = kernels.round_stochastic(_random(rows, cols, seed=8).to(device), key=-5, first=2**33)
        found.exact["rounded"] = rounded
    return found


def second_moment(kernels: Kernels, device: torch.device, small: bool) -> Found:
    """Find what second moments of elements need, and update three matrices by it; the second one has a zero row."""
    rows, cols = (3, 70) if small else (64, 4096)
    directions = _random(3, rows, cols, seed=13, dtype=torch.float16).to(device)
    params = [_random(n, rows, cols, seed=14, dtype=torch.bfloat16).to(device, copy=True) for n in (1, 2)]
    roots = _random(3, rows, cols, seed=15).abs()
    scales = roots.amax(2, keepdim=True).expand(-1, -1, -(-cols // BLOCK)).contiguous()
    roots = (roots / scales[:, :, :1].clamp(min=1e-30) * 255).round().to(torch.uint8)
    steps = (scales / torch.tensor(255.0, device="cpu")).to(device)
    codes = [roots[:1].to(device, copy=True), roots[1:].to(device, copy=True)]
    moment = ElementMoment(codes, steps, 0.95, 1e-8, is_clamped=False, block_size=BLOCK)
    stats = kernels.second_moment_stats(directions, moment)
    inverses = torch.where(stats[2] > 0, torch.full_like(stats[2], 255.0) / stats[2], 0)
    how: dict[str, Any] = {"decay": 0.999, "scale": 0.02, "factors": _random(3, 1, 1, seed=16).abs().add(1).to(device)}
    how |= {"skip": torch.zeros((), device=device), "moment": moment, "inverses": inverses}
    kernels.update_params(params, directions, **how)
    named = {"largest roots": stats[2], "codes": torch.cat(codes), "parameters": torch.cat(params)}
    return Found(named, {"sums of squares": (stats[:2], SUMS)})


def squares(kernels: Kernels, device: torch.device, small: bool) -> Found:
    """Add up squares of rows."""
    rows, cols = (3, 70) if small else (64, 4096)
    directions = _random(3, rows, cols, seed=17, dtype=torch.float16).to(device)
    return Found({}, {"sums of squares": (kernels.direction_squares(directions, columns=False), SUMS)})


def product(
    dtype: torch.dtype,
    batch: int,
    n: int,
    k: int,
    kernels: Kernels,
    device: torch.device,
    small: bool,
    *,
    tall: bool = False,
    added: bool = True,
) -> Found:
    """Multiply X by its transpose, add D and a diagonal; the reference does it in fp32."""
    if dtype == torch.float32 and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10:
        return Found()  # refused there: it would run in TF32
    n, k = (9, 12) if small else (n, k)
    generator = torch.Generator("cpu").manual_seed(9)
    X = torch.randn(batch, n, k, generator=generator, device="cpu").div_(k**0.5).to(dtype)
    D = torch.randn(batch, n, n, generator=generator, device="cpu")
    D = (D + D.mT).to(dtype)
    is_ours = kernels is not reference or small
    X, D = (t.to(device) if is_ours else t.float() for t in (X, D))
    X = X.mT.contiguous().mT if tall else X
    more: dict[str, Any] = {"D": D, "beta": 0.75, "diagonal": 3.0} if added else {}
    result = kernels.symmetric_product(X, X, alpha=-2.5, **more)
    bound = FP32_PRODUCT if dtype == torch.float32 else HALF_PRODUCT
    asymmetric = (result != result.mT).sum().int() * (kernels is not reference)  # which need not be
    return Found({"elements that are not their mirror image": asymmetric}, {"product": (result, bound)})


def fused(
    rows: int,
    cols: int,
    codebook: Codebook | None,
    kernels: Kernels,
    device: torch.device,
    small: bool,
    *,
    dtype: torch.dtype = torch.bfloat16,
    stochastic: bool = False,
) -> Found:
    """Do the second phase of small matrices in one launch."""
    rows, cols = (min(rows, 80), min(cols, 80)) if small else (rows, cols)
    codes, scales = _state(_random(3, rows, cols, seed=10), codebook, BLOCK, device)
    grads = [_random(n, rows, cols, seed=11, dtype=dtype).to(device) for n in (1, 2)]
    params = [torch.zeros(n, rows, cols, dtype=dtype, device=device) for n in (1, 2)]
    norms = _random(3, rows, cols, seed=11).flatten(1).norm(dim=1).mul(2).to(device)
    options: dict[str, Any] = {"beta": BETA, "nesterov": True, "codebook": codebook, "block_size": BLOCK}
    options |= {"steps": JORDAN, "decay": 0.999, "scale": 1.0, "keys": KEYS if stochastic else None}
    kernels.step_tiny(codes, scales, grads, params, norms, **options, skip=torch.zeros((), device=device))
    named = {"codes": torch.cat(codes)} | ({} if scales is None else {"scales": torch.cat(scales)})
    # Rounding of the products, and of bf16 parameters that it moves over a boundary.
    return Found(named, {"parameters": (torch.cat(params), 2e-2 if dtype == torch.bfloat16 else FP32_PRODUCT)})


def _cases() -> dict[str, Any]:
    books: tuple[Codebook, ...] = ("linear", "dynamic")
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    cases: dict[str, Any] = {f"momentum {book}": partial(momentum, book) for book in (*books, None)}
    cases |= {f"momentum {book}, ragged": partial(momentum, book, shape=(33, 2501)) for book in books}
    cases |= {f"momentum {book}, across": partial(momentum, book, across=True) for book in books}
    cases |= {f"quantize {book}": partial(quantization, book) for book in books}
    cases |= {f"momentum of columns, {book}": partial(cut, book) for book in books}
    return cases | {
        "momentum linear, 8 mod 16": partial(momentum, "linear", shape=(40, 2056)),
        "momentum linear, fp32 gradient": partial(momentum, "linear", grad_dtype=fp32),
        "momentum linear, blocks of 64": partial(momentum, "linear", block=64),
        "momentum dynamic, blocks of 256": partial(momentum, "dynamic", block=256),
        "update fp32": partial(update, fp32),
        "update bf16": partial(update, bf16),
        "update bf16, stochastic": partial(update, bf16, stochastic=True),
        "update bf16, across": partial(update, bf16, across=True),
        "update bf16, lr on the device": partial(update, bf16, lr_on_device=True),
        "momentum dynamic, signs": partial(momentum, "dynamic", shape=(64, 4096), signs=True),
        "update bf16, factors of rows": partial(update, bf16, factors=True),
        "second moments of rows": squares,
        "second moments of elements": second_moment,
        "product fp16, 256": partial(product, fp16, 1, 256, 512),
        "product fp16, 1024": partial(product, fp16, 4, 1024, 1024),
        "product fp16, 4096": partial(product, fp16, 1, 4096, 512),
        "product fp16, 4096, tall": partial(product, fp16, 1, 4096, 512, tall=True),
        "product fp16, 4096, nothing added": partial(product, fp16, 1, 4096, 512, added=False),
        "product bf16, 1024": partial(product, bf16, 4, 1024, 1024),
        "product fp16, 8 mod 16": partial(product, fp16, 2, 1032, 520),
        "product fp16, odd": partial(product, fp16, 2, 513, 333),
        "product fp32": partial(product, fp32, 1, 200, 304),
        "one launch, 16 x 2048": partial(fused, 16, 2048, "linear"),
        "one launch, 2048 x 16": partial(fused, 2048, 16, "linear"),
        "one launch, 2048 x 64, dynamic, stochastic": partial(fused, 2048, 64, "dynamic", stochastic=True),
        "one launch, 64 x 2048, fp32": partial(fused, 64, 2048, None, dtype=fp32),
    }


CASES = [BitCase(name, run) for name, run in _cases().items()]
