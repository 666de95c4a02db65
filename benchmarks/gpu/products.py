"""Symmetric products and whole orthogonalizations: our kernel and the vendor's, the Gram and the standard form.

`install` puts what `muon8bit tune` measures into the table `muon8bit.orthogonalize.RATES`, which chooses the paths.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial

import torch

from benchmarks.gpu.record import DRY, Record
from muon8bit.orthogonalize import (
    RATES,
    Rates,
    choose_method,
    device_kind,
    flops,
    force_method,
    rates_of,
    resolve_coefficients,
)
from muon8bit.tune.measure import (
    BATCH_ELEMENTS,
    DRY_PLAN,
    DTYPES,
    HALF,
    LARGEST_BATCH,
    SYMMETRIC,
    VENDOR,
    form_job,
    measure,
    product_job,
)
from muon8bit.tune.timing import Clock, Result

# Sizes of symmetric products; the batch fills the chip where one product does not.
SIZES = (256, 512, 1024, 2048, 3072, 4096, 8192)
# Shapes of whole orthogonalizations, and how many: k and v, gate and up of the models, experts.
PATH_SHAPES = ((8, 512, 2048), (8, 1024, 4096), (64, 1024, 2048), (2, 3072, 8192), (2, 4096, 14336), (4, 2048, 2048))
_SCHEDULE = resolve_coefficients("jordan", 5)


def products(clock: Clock, record: Record) -> None:
    """Measure X X^T by the symmetric kernel and by the vendor's product.

    It is [n, n], of one matrix and of a batch that fills the chip. Rates are those of the whole product, 2 n^3
    operations, whatever the kernel leaves out: so they compare as times do.
    """
    dry = record.dry
    for n in tuple(size // 32 for size in SIZES[:3]) if dry else SIZES:
        for batch in sorted({1, 2 if dry else max(1, min(LARGEST_BATCH, BATCH_ELEMENTS // n**2))}):
            for name, dtype in DTYPES.items():
                case = f"{name}, {batch} x {n}"
                if not record.begins("products", case):
                    continue
                arms = [VENDOR, SYMMETRIC] if name in HALF else [VENDOR]
                makers = {
                    arm: partial(product_job, clock.device, dtype, batch, n, n, symmetric=arm == SYMMETRIC)
                    for arm in arms
                }
                results = clock.turns(makers, rounds=1 if dry else 3, repeats=1 if dry else 5, warm_up=2, queued=True)
                _add_products(record, case, batch * 2 * n**3, results)
                record.write()


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
        case = f"{batch} x ({rows}, {cols})"
        if not record.begins("paths", case):
            continue
        makers, chosen = {}, {}
        for form in ("standard", "gram"):
            for made_by in dict.fromkeys((VENDOR, rates_of(kind).symmetric_kind or VENDOR)):
                with force_method(form=form, products=made_by):
                    path = choose_method(rows, cols, _SCHEDULE, kind, dtype, tiny=False)
                arm = f"{form}, {VENDOR if made_by == VENDOR else SYMMETRIC}"
                chosen[arm], makers[arm] = path, partial(form_job, clock.device, path, batch, rows, cols)
        dry = record.dry
        results = clock.turns(makers, rounds=1 if dry else 3, repeats=1 if dry else 5, warm_up=2, queued=True)
        for arm, result in results.items():
            record.measured("paths", case, arm, "time", result.problem or result.ms, "ms", str(dtype))
            path = chosen[arm]
            whole = batch * flops(path.form, rows, cols, 5, num_segments=max(1, len(path.segments)))
            if not result.problem:
                record.measured(
                    "paths", case, arm, "rate", whole / result.ms / 1e9, "TFLOP/s", "of products made whole"
                )
        record.write()


def install(clock: Clock, record: Record) -> None:
    """Install the row of RATES of this device, as `muon8bit tune` measures it: later sections choose by it.

    It is the row of an earlier call of the day, if there is one, so that all calls choose alike. A dry run measures
    tiny sizes and installs nothing.
    """
    kind = device_kind(clock.device)
    known = record.text("rates", "row as JSON", kind, "tune")
    if known != "-" and not record.dry:
        RATES[kind] = _row_of(known)
        return
    row = measure(clock, kind, DRY_PLAN if record.dry else None)
    if not record.dry:
        RATES[kind] = row
    record.restart("rates")
    record.measured("rates", kind, "tune", "row", DRY if record.dry else repr(row), "", "installed for what follows")
    text = json.dumps(asdict(row))
    record.measured("rates", kind, "tune", "row as JSON", DRY if record.dry else text, "")


def _row_of(text: str) -> Rates:
    values = json.loads(text).items()
    return Rates(**{k: tuple(tuple(pair) for pair in v) if isinstance(v, list) else v for k, v in values})
