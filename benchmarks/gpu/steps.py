"""`step()` of every arm on the workloads, and of ours and torch.optim.Muon on each shape class alone."""

from __future__ import annotations

from functools import partial

from benchmarks.gpu.optimizers import (
    ADAMUON,
    ARMS,
    BITS32,
    DYNAMIC,
    LINEAR,
    MUON_BF16,
    NORMUON,
    Tensors,
    make_job,
)
from benchmarks.gpu.record import Record
from benchmarks.gpu.roofline import count
from benchmarks.gpu.workloads import Workload, shape_classes, workloads
from muon8bit.orthogonalize import device_kind
from muon8bit.tune.timing import Clock, Result

FLOOR = "floor"
# A step of torch.optim.Muon with more operations than this takes a good part of a second: fewer of them.
_LONG_FLOPS = 1e14
_WATCHED = (LINEAR, DYNAMIC, BITS32, NORMUON, ADAMUON, MUON_BF16)  # the memory of their steps


def steps(clock: Clock, record: Record, rates: dict[str, float]) -> None:
    """Measure times, host times and extra memory of every arm on every workload, and add the floor."""
    for workload in workloads(record.dry):
        if not record.begins("steps", workload.name):
            continue
        print(f"steps: {workload.name}", flush=True)
        results = _run(clock, record, workload, list(ARMS))
        _add("steps", record, workload, results)
        for arm, result in results.items():
            if not result.problem:
                record.measured(
                    "steps", workload.name, arm, "host time", result.median_host_ms, "ms", "until it returned"
                )
                extra = result.extra_bytes / 2**20
                record.measured("steps", workload.name, arm, "extra memory", extra, "MiB", "peak inside step()")
        counts = count(workload, device_kind(clock.device))
        floor = counts.floor_ms(rates)
        case = workload.name
        record.counted("steps", case, FLOOR, "operations", counts.least, "FLOP", "one triangle, the cheaper form")
        record.counted("steps", case, LINEAR, "operations", counts.planned, "FLOP", "of the planned paths")
        record.counted("steps", case, MUON_BF16, "operations", counts.torch_flops, "FLOP")
        record.counted("steps", case, FLOOR, "bytes", counts.num_bytes, "bytes")
        record.counted("steps", case, FLOOR, "FLOP ceiling", counts.ceiling, "times", "over torch.optim.Muon")
        record.measured("steps", case, FLOOR, "time", floor, "ms", "from this run's ceilings")
        for arm, result in results.items():
            if not result.problem:
                record.measured("steps", case, arm, "over floor", result.ms / floor, "times")
        record.write()


def shapes(clock: Clock, record: Record) -> None:
    """Measure each distinct shape alone: no class may be slower than torch.optim.Muon."""
    for workload in shape_classes(record.dry):
        if not record.begins("shapes", workload.name):
            continue
        results = _run(clock, record, workload, [LINEAR, DYNAMIC, MUON_BF16])
        _add("shapes", record, workload, results)
        record.write()


def memory(clock: Clock, record: Record) -> None:
    """Measure the peak inside `step()` of ours and torch.optim.Muon on every workload, without timing."""
    for workload in workloads(record.dry):
        if not record.begins("memory", workload.name):
            continue
        tensors = Tensors.random(workload.shapes, clock.device)
        makers = {name: partial(make_job, ARMS[name], tensors) for name in _WATCHED}
        for name, result in clock.turns(makers, rounds=1, repeats=1).items():
            extra = result.problem or result.extra_bytes / 2**20
            record.measured("memory", workload.name, name, "extra memory", extra, "MiB", "peak inside step()")
        record.write()


def _run(clock: Clock, record: Record, workload: Workload, names: list[str]) -> dict[str, Result]:
    tensors = Tensors.random(workload.shapes, clock.device)
    makers = {name: partial(make_job, ARMS[name], tensors) for name in names}
    if record.dry:
        return clock.turns(makers, rounds=1, repeats=1)
    long = count(workload, device_kind(clock.device)).torch_flops > _LONG_FLOPS
    return clock.turns(makers, rounds=3, repeats=2 if long else 7, warm_up=1 if long else 2)


def _add(section: str, record: Record, workload: Workload, results: dict[str, Result]) -> None:
    """Add the time of each arm, and how many times this step (linear) it takes."""
    ours = results[LINEAR]
    for arm, result in results.items():
        if result.problem:
            record.measured(section, workload.name, arm, "time", result.problem, "")
            continue
        record.measured(section, workload.name, arm, "time", result.ms, "ms", workload.note)
        record.measured(section, workload.name, arm, "spread", result.spread, "fraction", "of a turn's median")
        if not ours.problem:
            ratio = result.ms / ours.ms
            record.measured(section, workload.name, arm, "ratio", ratio, "times", "its time over this, linear")
