"""The least time of a step on the measured ceilings: the planner's operations and the bytes that must move."""

from __future__ import annotations

from dataclasses import dataclass

from bench.rates import COPY, GEMM, momentum_bytes
from bench.workloads import Workload
from muon8bit.config import DEFAULT_BLOCK_SIZE, DEFAULT_NS_STEPS
from muon8bit.orthogonalize import choose, flops, resolve

_SCHEDULE = resolve("jordan", DEFAULT_NS_STEPS)


@dataclass(frozen=True)
class Counts:
    """Of one step of a workload, linear codebook, bf16 parameters and gradients: operations (multiply-add = 2) that
    the planner counts for its paths and for torch.optim.Muon's, and least bytes of each phase."""

    flops: int
    torch_flops: int
    momentum_bytes: int
    ns_bytes: int
    update_bytes: int

    @property
    def ceiling(self) -> float:
        """How many times faster than torch.optim.Muon the step can be, at equal rate per operation."""
        return self.torch_flops / self.flops

    def floor_ms(self, rates: dict[str, float]) -> float:
        """The phases follow each other: each takes the larger of its bytes at the copy's bandwidth and its operations
        at the product's rate."""
        bandwidth, rate = rates[COPY] * 1e6, rates[GEMM] * 1e9  # a millisecond's
        iteration = max(self.flops / rate, self.ns_bytes / bandwidth)
        return iteration + (self.momentum_bytes + self.update_bytes) / bandwidth


def count(workload: Workload, device_type: str) -> Counts:
    """Sum over the matrices of a workload."""
    ours = theirs = moved = ns = update = 0
    for (rows, cols), number in workload.matrices().items():
        path = choose(rows, cols, _SCHEDULE, device_type)
        ours += number * flops(path.form, rows, cols, len(_SCHEDULE.steps))
        theirs += number * flops("standard", rows, cols, len(_SCHEDULE.steps))
        elements = number * rows * cols
        moved += sum(momentum_bytes(elements, cols, DEFAULT_BLOCK_SIZE, "linear").values())
        ns += elements * (2 + 2)  # input and result, half precision
        update += elements * (2 + 2 + 2)  # result, parameter read and written
    return Counts(ours, theirs, moved, ns, update)
