"""Rates that the hardware gives, and that the momentum kernels reach."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import torch
from muon8bit_kernels import CODE_DTYPES, kernels_for, num_blocks
from muon8bit_kernels.codebooks import Codebook
from torch import Tensor

from benchmarks.gpu.record import Record
from muon8bit.config import BLOCK_SIZES
from muon8bit.tune.measure import HALF, check_finite, product_job
from muon8bit.tune.timing import Clock, Result, TimedJob

COPY, GEMM = "copy", "gemm"
# Momentum kernels: this many matrices of this side, rotated among sets, each several times the cache.
MOMENTUM_COUNT, MOMENTUM_SIDE, MOMENTUM_SETS = 16, 4096, 2
BETA = 0.95


def ceilings(clock: Clock, record: Record) -> dict[str, float]:
    """Measure GB/s of a large copy, and TFLOP/s of a large product of each half-precision dtype.

    Bytes read and written are counted. The product is on random data, the better of those under GEMM.
    """
    dry, section = record.dry, "ceilings"
    num_bytes, n = (2**16, 64) if dry else (2**32, 8192)
    source = torch.randint(-128, 128, (num_bytes,), dtype=torch.int8, device=clock.device)

    def copy_job() -> TimedJob:
        target = torch.empty_like(source)

        def check() -> None:
            if not torch.equal(target, source):
                raise ValueError("the copy is not one")

        return TimedJob(lambda: target.copy_(source), check)

    makers: dict[str, Callable[[], TimedJob]] = {COPY: copy_job}
    for name, dtype in HALF.items():
        makers[f"{GEMM} {name}"] = partial(product_job, clock.device, dtype, 1, n, n, symmetric=False)
    results = clock.turns(makers, rounds=3, repeats=1 if dry else 5, warm_up=2, queued=True)
    rates = {COPY: 2 * num_bytes / results[COPY].ms / 1e6}
    rates |= {name: 2 * n**3 / results[name].ms / 1e9 for name in makers if name != COPY}
    rates[GEMM] = max(rates[f"{GEMM} {name}"] for name in HALF)
    record.measured(section, COPY, "torch", "rate", rates[COPY], "GB/s", f"{num_bytes} bytes read, as many written")
    for name in HALF:
        record.measured(section, f"{GEMM} {name}", "torch", "rate", rates[f"{GEMM} {name}"], "TFLOP/s", f"{n}^3")
    return rates


def momentum_bytes(elements: int, cols: int, block_size: int, codebook: Codebook | None) -> dict[str, int]:
    """Return the least bytes of the two phases on matrices of `cols` columns, `elements` in all.

    Gradients and outputs are bf16. stats reads codes, scales and gradient, and writes a sum for each block; apply reads
    codes, scales and gradient, and writes codes, scales and the Newton-Schulz input.
    """
    code = 4 if codebook is None else 1
    blocks = elements // cols * num_blocks(cols, block_size)
    scales = 0 if codebook is None else 4 * blocks
    return {
        "stats": elements * (code + 2) + scales + 4 * blocks,
        "apply": elements * (2 * code + 2 + 2) + 2 * scales,
    }


def _momentum_job(
    device: torch.device, phase: str, codebook: Codebook | None, block_size: int, count: int, side: int
) -> TimedJob:
    """Return one phase on [count, side, side], from its own state, sets taken in turn; outputs start as NaN."""
    kernels = kernels_for(device)
    options: dict[str, Any] = {"beta": BETA, "nesterov": True, "codebook": codebook, "block_size": block_size}
    sets, outputs = [], list[Tensor]()
    for _ in range(MOMENTUM_SETS):
        shape = (count, side, side)
        grad = torch.randn(shape, device=device, dtype=torch.bfloat16)
        if codebook is None:
            codes, scales = torch.randn(shape, device=device), None
        else:
            dtype = CODE_DTYPES[codebook]
            low, high = (-127, 128) if dtype == torch.int8 else (0, 256)
            codes = torch.randint(low, high, shape, dtype=dtype, device=device)
            scales = [torch.rand(count, side, num_blocks(side, block_size), device=device).add_(0.5)]
        out = torch.full(shape, torch.nan, dtype=torch.bfloat16, device=device)
        sets.append(([codes], scales, [grad], out))
    norms = torch.full((count,), float(side), device=device)
    turn = cycle(sets)

    def stats() -> None:
        codes, scales, grads, _ = next(turn)
        outputs[:] = [kernels.momentum_stats(codes, scales, grads, **options)]

    def apply() -> None:
        codes, scales, grads, out = next(turn)
        kernels.momentum_apply(codes, scales, grads, norms, out, **options)
        outputs[:] = [out, *(scales or codes)]

    return TimedJob(stats if phase == "stats" else apply, lambda: check_finite(outputs))


def momentum(clock: Clock, record: Record, rates: dict[str, float]) -> None:
    """Measure both phases alone: bandwidth and its part of the copy's, for each codebook and block size."""
    dry = record.dry
    count, side = (1, 128) if dry else (MOMENTUM_COUNT, MOMENTUM_SIDE)
    books: tuple[Codebook | None, ...] = ("linear", "dynamic", None)
    for codebook in books:
        makers, sizes = {}, BLOCK_SIZES if codebook else BLOCK_SIZES[-2:-1]
        if not record.begins("momentum", _case(codebook, sizes[0])):
            continue
        for size in sizes:
            for phase in ("stats", "apply"):
                makers[f"{phase} {size}"] = partial(_momentum_job, clock.device, phase, codebook, size, count, side)
        results = clock.turns(makers, rounds=1 if dry else 3, repeats=1 if dry else 10, warm_up=2, queued=True)
        for size in sizes:
            case = _case(codebook, size)
            least = momentum_bytes(count * side * side, side, size, codebook)
            for phase in ("stats", "apply"):
                _bandwidth(record, case, phase, least[phase], results[f"{phase} {size}"], rates)
            _bandwidth_of_both(record, case, sum(least.values()), results, size, rates)
        record.write()


def _case(codebook: Codebook | None, size: int) -> str:
    return f"{codebook}, blocks of {size}" if codebook else "fp32"


def _bandwidth(record: Record, case: str, phase: str, num_bytes: int, result: Result, rates: dict[str, float]) -> None:
    record.counted("momentum", case, phase, "bytes", num_bytes, "bytes", "each input read once, each output written")
    if result.problem:
        record.measured("momentum", case, phase, "of copy", result.problem, "")
        return
    rate = num_bytes / result.ms / 1e6
    record.measured("momentum", case, phase, "time", result.ms, "ms")
    record.measured("momentum", case, phase, "spread", result.spread, "fraction", "of a turn's median")
    record.measured("momentum", case, phase, "rate", rate, "GB/s")
    record.measured("momentum", case, phase, "of copy", rate / rates[COPY], "fraction")


def _bandwidth_of_both(
    record: Record, case: str, num_bytes: int, results: dict[str, Result], size: int, rates: dict[str, float]
) -> None:
    both = [results[f"{phase} {size}"] for phase in ("stats", "apply")]
    if not any(result.problem for result in both):
        rate = num_bytes / sum(result.ms for result in both) / 1e6
        record.measured("momentum", case, "both", "of copy", rate / rates[COPY], "fraction")
