"""Rates of a GPU: which jobs are timed, and the row of the table that their times make.

products   X X^T [n, n] by the vendor in each dtype, and by the symmetric kernel, one and a batch that fills the chip
forms      whole orthogonalizations in the Gram form and in the standard form
launch     small products one after the other, the host's work included
tiny       the one-launch kernel, one matrix on each multiprocessor
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
from muon8bit_kernels import kernels_for
from muon8bit_kernels.triton.gemm_tilings import NUM_PROCESSORS, architecture_of
from torch import Tensor

from ..orthogonalize import NSMethod, Rates, flops, orthogonalize, resolve_coefficients, segments, triangle_gain
from .timing import Clock, TimedJob

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = {**HALF, "fp32": torch.float32}
VENDOR, SYMMETRIC = "vendor", "symmetric"
LAUNCH, TINY, TINY_SHAPE, NUM_LAUNCHES, SMALL_SIDE = "launch", "tiny", (16, 4096), 64, 64
BATCH_ELEMENTS, LARGEST_BATCH = 2**25, 64
# A gain that was measured on tiles of few waves says little about the rate of a tile.
_LEAST_WAVES_SIDE = 1024
_SCHEDULE = resolve_coefficients("jordan", 5)


@dataclass(frozen=True)
class Plan:
    """The sizes that are measured: sides of products, shapes of forms, and the turns of each job."""

    sizes: Sequence[int] = (512, 1024, 2048, 3072, 4096, 8192)
    forms: Sequence[tuple[int, int, int]] = ((8, 1024, 4096), (2, 3072, 8192))
    rounds: int = 2
    repeats: int = 3


DRY_PLAN = Plan(sizes=(8, 16), forms=((2, 8, 32),), rounds=1, repeats=1)


def check_finite(tensors: Sequence[Tensor]) -> None:
    """Raise ValueError for a result that is not finite: it was not written, or is wrong."""
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


def form_job(device: torch.device, method: NSMethod, batch: int, rows: int, cols: int) -> TimedJob:
    """Return the job of the orthogonalization of `batch` matrices [rows, cols]."""
    inputs = [torch.randn(batch, rows, cols, device=device).div_((rows * cols) ** 0.5).to(method.dtype) for _ in "ab"]
    turn, work, last = cycle(inputs), torch.empty_like(inputs[0]), list[Tensor]()

    def run() -> None:
        last[:] = [orthogonalize(work.copy_(next(turn)), _SCHEDULE, method)]  # which overwrites its input

    return TimedJob(run, lambda: check_finite(last))


def _launch_job(device: torch.device) -> TimedJob:
    """Return the job of `NUM_LAUNCHES` products too small to fill anything, one after the other."""
    X = torch.randn(SMALL_SIDE, SMALL_SIDE, device=device).to(torch.float16)
    last: list[Tensor] = []

    def run() -> None:
        for _ in range(NUM_LAUNCHES):
            last[:] = [X @ X.mT]

    return TimedJob(run, lambda: check_finite(last))


def _tiny_job(device: torch.device, count: int) -> TimedJob:
    """Return the job of the whole step of `count` matrices by the one-launch kernel."""
    shape = (count, *TINY_SHAPE)
    codes = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
    scales = torch.rand(count, TINY_SHAPE[0], 2, device=device).add_(0.5)
    grad, param = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    norms = torch.full((count,), 256.0, device=device)
    kernels = kernels_for(device)

    def run() -> None:
        options: dict[str, Any] = {"beta": 0.95, "nesterov": True, "codebook": "linear", "block_size": 2048}
        tensors = [codes], [scales], [grad], [param], norms
        kernels.step_tiny(*tensors, steps=_SCHEDULE.steps, decay=1.0, scale=1e-3, **options)

    return TimedJob(run, lambda: check_finite([param]))


def batches(n: int) -> list[int]:
    """Return the numbers of results [n, n] that are measured together: one, and what fills the chip."""
    return sorted({1, max(1, min(LARGEST_BATCH, BATCH_ELEMENTS // n**2))})


def _method(form: str) -> NSMethod:
    if form == "standard":
        return NSMethod("standard", torch.float16)
    return NSMethod("gram", torch.float16, "vendor", segments(_SCHEDULE, torch.float16) or ())


def jobs(device: torch.device, architecture: int | None, plan: Plan) -> list[dict[str, Callable[[], TimedJob]]]:
    """Return the jobs by name, in sets whose jobs take turns."""
    sets: list[dict[str, Callable[[], TimedJob]]] = []
    for n in plan.sizes:
        for batch in batches(n):
            sets.append({})
            for name, dtype in DTYPES.items():
                for arm in (VENDOR, SYMMETRIC) if name in HALF else (VENDOR,):
                    make = partial(product_job, device, dtype, batch, n, n, symmetric=arm == SYMMETRIC)
                    sets[-1][f"{arm} {name} {batch} x {n}"] = make
    for batch, rows, cols in plan.forms:
        arms = {form: partial(form_job, device, _method(form), batch, rows, cols) for form in ("gram", "standard")}
        sets.append({f"{form} {batch} x ({rows}, {cols})": make for form, make in arms.items()})
    sets.append({LAUNCH: partial(_launch_job, device)})
    if device.type == "cuda":
        sets.append({TINY: partial(_tiny_job, device, NUM_PROCESSORS[architecture])})
    return sets


def measure(clock: Clock, kind: str, plan: Plan | None = None) -> Rates:
    """Measure the jobs on the clock's device, and return its row.

    Args:
        clock: its `turns` runs and times jobs.
        kind: the device kind, from `device_kind`.
        plan: the sizes; None takes those of `muon8bit tune`, about a minute.

    Raises:
        RuntimeError: names the first job that failed, with its error.
    """
    plan = Plan() if plan is None else plan
    capability = re.fullmatch(r"cuda_sm(\d+)(\d)", kind)
    architecture = None if capability is None else architecture_of((int(capability[1]), int(capability[2])))
    times: dict[str, float] = {}
    for makers in jobs(clock.device, architecture, plan):
        queued = LAUNCH not in makers
        results = clock.turns(makers, rounds=plan.rounds, repeats=plan.repeats, warm_up=2, queued=queued)
        for name, result in results.items():
            if result.problem:
                raise RuntimeError(f"{name} could not be measured: {result.problem}")
            times[name] = result.ms
    return rates_of_times(times, architecture, plan)


def rates_of_times(times: Mapping[str, float], architecture: int | None, plan: Plan) -> Rates:
    """Return the row of a table for the times of jobs, in ms by name.

    Of several figures of one size the least counts, one matrix or a batch, bf16 or fp16; the gain at most is that of
    the batch.
    """
    half: dict[str, list[tuple[int, float]]] = {"bf16": [], "fp16": []}
    symmetric, triangle = [], []
    for n in plan.sizes:
        counts = batches(n)
        for name, pairs in half.items():
            speeds = [times[f"{VENDOR} fp32 {c} x {n}"] / times[f"{VENDOR} {name} {c} x {n}"] for c in counts]
            pairs.append((n if pairs else 0, round(min(speeds), 3)))
        gains = {
            c: min(times[f"{VENDOR} {name} {c} x {n}"] / times[f"{SYMMETRIC} {name} {c} x {n}"] for name in HALF)
            for c in counts
        }
        symmetric.append((n, round(gains[counts[-1]], 3)))
        if n >= _LEAST_WAVES_SIDE:
            triangle += [gain / triangle_gain(n, count, architecture) for count, gain in gains.items()]
    relative = []
    for batch, rows, cols in plan.forms:
        work = {"standard": flops("standard", rows, cols, 5), "gram": flops("gram", rows, cols, 5, num_segments=2)}
        speed = {form: work[form] / times[f"{form} {batch} x ({rows}, {cols})"] for form in work}
        relative.append(speed["gram"] / speed["standard"])
    largest = max(n for n in plan.sizes if n <= 4096)
    fp32 = 2 * largest**3 * batches(largest)[-1] / times[f"{VENDOR} fp32 {batches(largest)[-1]} x {largest}"]  # by ms
    tiny = flops("gram", *TINY_SHAPE, 5) / times[TINY] / fp32 if TINY in times else None
    return Rates(
        bf16=tuple(half["bf16"]),
        fp16=tuple(half["fp16"]),
        symmetric_kind="kernel",
        symmetric=tuple(symmetric),
        triangle=round(min(triangle), 3) if triangle else None,
        gram=round(min(1.0, *relative), 3),
        launch=round(times[LAUNCH] / NUM_LAUNCHES * fp32),
        tiny=None if tiny is None else float(f"{tiny:.3g}"),
        architecture=architecture,
    )
