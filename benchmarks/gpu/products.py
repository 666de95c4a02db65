"""Symmetric products and whole orthogonalizations: our kernel and the vendor's, the Gram and the standard form.

What is found here belongs into the table `muon8bit.orthogonalize.rates.RATES`, which chooses the paths.
"""

from __future__ import annotations

from functools import partial
from itertools import cycle

import torch
from muon8bit_kernels import kernels_for
from torch import Tensor

from benchmarks.gpu.record import Record, as_number
from benchmarks.gpu.timing import Clock, Result, TimedJob
from muon8bit.orthogonalize import (
    NSMethod,
    choose_method,
    device_kind,
    flops,
    force_method,
    orthogonalize,
    resolve_coefficients,
)
from muon8bit.orthogonalize.method import rates_of

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = {**HALF, "fp32": torch.float32}
# Sizes of symmetric products; the batch fills the chip where one product does not.
SIZES = (256, 512, 1024, 2048, 3072, 4096, 8192)
_BATCH_ELEMENTS, _LARGEST_BATCH = 2**25, 64
# Shapes of whole orthogonalizations, and how many: k and v, gate and up of the models, experts.
PATH_SHAPES = ((8, 512, 2048), (8, 1024, 4096), (64, 1024, 2048), (2, 3072, 8192), (2, 4096, 14336), (4, 2048, 2048))
VENDOR, SYMMETRIC = "vendor", "symmetric"
_SCHEDULE = resolve_coefficients("jordan", 5)


def check_finite(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        if not tensor.isfinite().all():
            raise ValueError(f"a result {tuple(tensor.shape)} {tensor.dtype} is not finite, or was not written")


def product_job(device: torch.device, dtype: torch.dtype, batch: int, n: int, k: int, symmetric: bool) -> TimedJob:
    """Return the job of X X^T [batch, n, n] by our kernel or by the vendor's.

    X is random with rows of unit norm; sets are taken in turn.
    """
    sets = [torch.randn(batch, n, k, device=device, dtype=dtype).div_(k**0.5) for _ in range(2)]
    turn, kernels = cycle(sets), kernels_for(device)
    last: list[Tensor] = []

    def run() -> None:
        X = next(turn)
        last[:] = [kernels.symmetric_product(X, X) if symmetric else X @ X.mT]

    return TimedJob(run, lambda: check_finite(last))


def products(clock: Clock, record: Record) -> None:
    """Measure X X^T by the symmetric kernel and by the vendor's product.

    It is [n, n], of one matrix and of a batch that fills the chip. Rates are those of the whole product, 2 n^3
    operations, whatever the kernel leaves out: so they compare as times do.
    """
    dry = record.dry
    for n in tuple(size // 32 for size in SIZES[:3]) if dry else SIZES:
        for batch in sorted({1, 2 if dry else max(1, min(_LARGEST_BATCH, _BATCH_ELEMENTS // n**2))}):
            for name, dtype in DTYPES.items():
                arms = [VENDOR, SYMMETRIC] if name in HALF else [VENDOR]
                makers = {
                    arm: partial(product_job, clock.device, dtype, batch, n, n, symmetric=arm == SYMMETRIC)
                    for arm in arms
                }
                results = clock.turns(makers, rounds=1 if dry else 3, repeats=1 if dry else 5, warm_up=2, queued=True)
                _add_products(record, f"{name}, {batch} x {n}", batch * 2 * n**3, results)


def _add_products(record: Record, case: str, operations: int, results: dict[str, Result]) -> None:
    for arm, result in results.items():
        rate = result.problem or operations / result.ms / 1e9
        record.measured("products", case, arm, "rate", rate, "TFLOP/s", "of 2 n^3 operations a product")
    if len(results) == 2 and not any(result.problem for result in results.values()):
        gain = results[VENDOR].ms / results[SYMMETRIC].ms
        record.measured("products", case, SYMMETRIC, "gain", gain, "times", "the vendor's time over it")


def paths(clock: Clock, record: Record) -> None:
    """Measure whole orthogonalizations of batches by either form, with either product."""
    kind = device_kind(clock.device)
    dtype = torch.float16 if clock.device.type == "cuda" else torch.float32
    for batch, rows, cols in [(2, r // 32, c // 32) for _, r, c in PATH_SHAPES] if record.dry else PATH_SHAPES:
        makers, chosen = {}, {}
        for form in ("standard", "gram"):
            for made_by in dict.fromkeys((VENDOR, rates_of(kind).symmetric_kind or VENDOR)):
                with force_method(form=form, products=made_by):
                    path = choose_method(rows, cols, _SCHEDULE, kind, dtype, tiny=False)
                arm = f"{form}, {VENDOR if made_by == VENDOR else SYMMETRIC}"
                chosen[arm], makers[arm] = path, partial(_path_job, clock.device, path, batch, rows, cols)
        dry = record.dry
        results = clock.turns(makers, rounds=1 if dry else 3, repeats=1 if dry else 5, warm_up=2, queued=True)
        for arm, result in results.items():
            case = f"{batch} x ({rows}, {cols})"
            record.measured("paths", case, arm, "time", result.problem or result.ms, "ms", str(dtype))
            path = chosen[arm]
            whole = batch * flops(path.form, rows, cols, 5, num_segments=max(1, len(path.segments)))
            if not result.problem:
                record.measured(
                    "paths", case, arm, "rate", whole / result.ms / 1e9, "TFLOP/s", "of products made whole"
                )


def _path_job(device: torch.device, path: NSMethod, batch: int, rows: int, cols: int) -> TimedJob:
    sets = [torch.randn(batch, rows, cols, device=device).div_((rows * cols) ** 0.5) for _ in range(2)]
    inputs = [X.to(path.dtype) for X in sets]
    turn, work, last = cycle(inputs), torch.empty_like(inputs[0]), list[Tensor]()

    def run() -> None:
        last[:] = [orthogonalize(work.copy_(next(turn)), _SCHEDULE, path)]  # which overwrites its input

    return TimedJob(run, lambda: check_finite(last))


def rates_row(record: Record, kind: str) -> str:
    """Return the row of RATES that the sections `products` and `paths` measured, to be put there by hand.

    The least gain of a size, one matrix or a batch, bf16 or fp16; half precision over fp32 likewise; the Gram form's
    rate over the standard form's, the least of the shapes. The words "not measured" where a figure is missing.
    """
    best: dict[str, dict[int, float]] = {"bf16": {}, "fp16": {}, SYMMETRIC: {}}

    def least(key: str, size: int, value: float | None) -> None:
        if value is not None:
            best[key][size] = min(value, best[key].get(size, value))

    for row in record.find("products", "rate", arm=VENDOR):
        name, _, which = row.case.partition(", ")
        size, rate = int(which.split()[-1]), as_number(row.value)
        if name in HALF:
            fp32 = record.number("products", "rate", f"fp32, {which}", VENDOR)
            least(name, size, None if rate is None or fp32 is None else rate / fp32)
            least(SYMMETRIC, size, record.number("products", "gain", row.case, SYMMETRIC))
    relative = []
    for row in record.find("paths", "rate", arm=f"gram, {VENDOR}"):
        gram, standard = as_number(row.value), record.number("paths", "rate", row.case, f"standard, {VENDOR}")
        relative += [gram / standard] if gram is not None and standard is not None else []
    if not (all(best.values()) and relative):
        return "not measured"
    sized = {key: tuple((size, round(value, 2)) for size, value in sorted(by.items())) for key, by in best.items()}
    return (
        f'"{kind}": Rates(bf16={sized["bf16"]}, fp16={sized["fp16"]}, symmetric_kind="kernel", '
        f"symmetric={sized[SYMMETRIC]}, gram={round(min(relative), 2)}),"
    )
