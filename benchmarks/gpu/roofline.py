"""The least time of a step on the measured ceilings: the planner's operations and the bytes that must move."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu.rates import COPY, GEMM, momentum_bytes
from benchmarks.gpu.workloads import Workload
from muon8bit.config import DEFAULT_BLOCK_SIZE, DEFAULT_NS_STEPS, DEFAULT_WORKSPACE_BYTES
from muon8bit.orthogonalize import NSMethod, choose_method, flops, resolve_coefficients

_SCHEDULE = resolve_coefficients("jordan", DEFAULT_NS_STEPS)
_STEPS = len(_SCHEDULE.steps)
# The Gram form in half precision, whose one restart makes two segments.
_SEGMENTS = 2


@dataclass(frozen=True)
class OperationCounts:
    """Operations and bytes of one step of a workload, linear codebook, bf16 parameters and gradients.

    A multiply-add is 2 operations.

    Attributes:
        least: the cheaper form, in half precision, of each symmetric product one triangle: the FLOP ceiling's.
        planned: what the planner's paths for the device do.
        torch_flops: torch.optim.Muon's.
        momentum_bytes, ns_bytes, update_bytes: least bytes of each phase.
    """

    least: int
    planned: int
    torch_flops: int
    momentum_bytes: int
    ns_bytes: int
    update_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.momentum_bytes + self.ns_bytes + self.update_bytes

    @property
    def ceiling(self) -> float:
        """How many times faster than torch.optim.Muon the step can be, at equal rate per operation."""
        return self.torch_flops / self.least

    def floor_ms(self, rates: dict[str, float]) -> float:
        """Return the least time of the phases, which follow each other.

        Each takes the larger of its bytes at the copy's bandwidth and its operations at the product's rate.
        """
        bandwidth, rate = rates[COPY] * 1e6, rates[GEMM] * 1e9  # a millisecond's
        iteration = max(self.least / rate, self.ns_bytes / bandwidth)
        return iteration + (self.momentum_bytes + self.update_bytes) / bandwidth


def _planned(path: NSMethod, rows: int, cols: int) -> int:
    segments = max(1, len(path.segments))
    return flops(path.form, rows, cols, _STEPS, triangle=path.products == "kernel", num_segments=segments)


def count(workload: Workload, kind: str) -> OperationCounts:
    """Sum over the matrices of a workload, paths as on a device of this `device_kind`."""
    least = planned = theirs = moved = ns = update = 0
    for (rows, cols), number in workload.matrices().items():
        standard = flops("standard", rows, cols, _STEPS, triangle=True)
        least += number * min(standard, flops("gram", rows, cols, _STEPS, triangle=True, num_segments=_SEGMENTS))
        together = {"count": number, "budget_bytes": DEFAULT_WORKSPACE_BYTES}
        planned += number * _planned(choose_method(rows, cols, _SCHEDULE, kind, **together), rows, cols)
        theirs += number * flops("standard", rows, cols, _STEPS)
        elements = number * rows * cols
        moved += sum(momentum_bytes(elements, cols, DEFAULT_BLOCK_SIZE, "linear").values())
        ns += elements * (2 + 2)  # input and result, half precision
        update += elements * (2 + 2 + 2)  # result, parameter read and written
    return OperationCounts(least, planned, theirs, moved, ns, update)
