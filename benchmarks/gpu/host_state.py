"""`step()` with the state on the host against state on the device: time, memory, and what the bus carries.

Both arms step the same tensors; the tests marked gpu say that they leave the same bits.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu.optimizers import MUON_LR, Arm, Tensors, make_job
from benchmarks.gpu.record import Record
from benchmarks.gpu.workloads import MODELS, workloads
from muon8bit import Muon8bit
from muon8bit.estimate.host import bus_bytes
from muon8bit.estimate.optimizers import Param
from muon8bit.tune.timing import Clock, TimedJob

ON_DEVICE, ON_HOST = "state on the device", "state on the host"
PLACES = {
    ON_DEVICE: Arm(lambda ps: Muon8bit(ps, lr=MUON_LR), 1.01),
    ON_HOST: Arm(lambda ps: Muon8bit(ps, lr=MUON_LR, state_device="cpu"), 0.01),
}
COPY = "copy of pinned memory"
_COPY_BYTES, _DRY_COPY_BYTES = 2**28, 2**12


def host_state(clock: Clock, record: Record) -> None:
    """Measure the rates of the bus, then each model's hidden matrices."""
    if record.begins("host", COPY):
        _rates(clock, record)
    for workload in workloads(record.dry):
        if workload.name not in MODELS or not record.begins("host", workload.name):
            continue
        print(f"host: {workload.name}", flush=True)
        tensors = Tensors.random(workload.shapes, clock.device)
        makers = {name: partial(make_job, arm, tensors) for name, arm in PLACES.items()}
        results = clock.turns(makers, rounds=1 if record.dry else 3, repeats=1 if record.dry else 3)
        for name, result in results.items():
            if result.problem:
                record.measured("host", workload.name, name, "time", result.problem, "")
                continue
            record.measured("host", workload.name, name, "time", result.ms, "ms", workload.note)
            record.measured("host", workload.name, name, "spread", result.spread, "fraction", "of a turn's median")
            peak = _peak_bytes(clock, PLACES[name], tensors) / 2**20
            record.measured("host", workload.name, name, "peak", peak, "MiB", "above parameters and gradients")
            if not results[ON_DEVICE].problem:
                ratio = result.ms / results[ON_DEVICE].ms
                record.measured("host", workload.name, name, "ratio", ratio, "times", f"its time over {ON_DEVICE}")
        params = [Param("", shape, torch.bfloat16, True) for shape in workload.shapes]
        moved = bus_bytes("muon8bit", params)
        record.counted("host", workload.name, ON_HOST, "bytes", moved, "bytes", "over the bus in a step")
        record.write()


def _rates(clock: Clock, record: Record) -> None:
    """Measure copies of pinned memory to the device and back: what the bus can carry."""
    is_cuda = clock.device.type == "cuda"
    size = _DRY_COPY_BYTES if record.dry else _COPY_BYTES
    host = torch.ones(size, dtype=torch.uint8, pin_memory=is_cuda)
    device = torch.empty(size, dtype=torch.uint8, device=clock.device)

    def check() -> None:
        if not bool((device == 1).all()):
            raise ValueError("the copy did not arrive")

    copies = {"to the device": (device, host), "to the host": (host, device)}
    device.copy_(host)
    makers = {
        name: partial(TimedJob, partial(target.copy_, source, non_blocking=True), check)
        for name, (target, source) in copies.items()
    }
    for name, result in clock.turns(makers, rounds=1, repeats=1 if record.dry else 7).items():
        rate = result.problem or size / result.ms / 1e6
        record.measured("host", COPY, name, "rate", rate, "" if result.problem else "GB/s", f"{size} bytes")


def _peak_bytes(clock: Clock, arm: Arm, tensors: Tensors) -> int:
    """Return the most bytes of state and workspace on the device during a step; 0 on a CPU."""
    if clock.device.type != "cuda":
        return 0
    before = torch.cuda.memory_allocated(clock.device)
    job = make_job(arm, tensors)
    job.run()
    clock.synchronize()
    torch.cuda.reset_peak_memory_stats(clock.device)
    job.run()
    clock.synchronize()
    return torch.cuda.max_memory_allocated(clock.device) - before
