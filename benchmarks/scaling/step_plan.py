"""Work of a step, counted from shapes: operations of Newton-Schulz, bytes of the phases around it.

    stats    reads codes, scales and gradient; writes one sum a block
    apply    reads codes, scales, gradient and one norm; writes codes, scales and X
    update   reads O and the parameter; writes the parameter

A matrix on the tiny path does apply, iteration and update at once: X and O never leave the chip.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from muon8bit.config import DEFAULT_BLOCK_SIZE, DEFAULT_WORKSPACE_BYTES, MIN_QUANTIZED_COLUMNS
from muon8bit.orthogonalize import Coefficients, choose_method, flops, segments

# How many matrices of each [rows, cols].
Matrices = Mapping[tuple[int, int], int]


@dataclass(frozen=True)
class StepPlan:
    """Counts of one step.

    Attributes:
        flops: of Newton-Schulz on the chosen paths, multiply-add = 2; a symmetric product by triangle counts half,
            also where panels do 10/16.
        torch_flops: of torch.optim.Muon's, the standard form.
        stats_bytes, apply_bytes, update_bytes: least bytes that each phase moves.
    """

    flops: int
    torch_flops: int
    stats_bytes: int
    apply_bytes: int
    update_bytes: int

    @property
    def num_bytes(self) -> int:
        """Least bytes of all phases."""
        return self.stats_bytes + self.apply_bytes + self.update_bytes


def plan(
    matrices: Matrices,
    schedule: Coefficients,
    kind: str,
    *,
    bits: int = 8,
    block_size: int = DEFAULT_BLOCK_SIZE,
    grad_dtype: torch.dtype = torch.bfloat16,
    param_dtype: torch.dtype = torch.bfloat16,
    ns_dtype: torch.dtype | None = None,
) -> StepPlan:
    """Count one step of these matrices on a device kind (of `orthogonalize.device_kind`, present or not)."""
    ours = theirs = stats = apply = update = 0
    for (rows, cols), count in matrices.items():
        path = choose_method(rows, cols, schedule, kind, ns_dtype, count=count, budget_bytes=DEFAULT_WORKSPACE_BYTES)
        num_steps, num_segments = len(schedule.steps), max(1, len(path.segments))
        triangle = path.products != "vendor"
        ours += count * flops(path.form, rows, cols, num_steps, triangle=triangle, num_segments=num_segments)
        theirs += count * flops("standard", rows, cols, num_steps)
        quantized = bits == 8 and cols >= MIN_QUANTIZED_COLUMNS
        elements, blocks = rows * cols, rows * -(-cols // block_size)
        codes, scales = elements * (1 if quantized else 4), 4 * blocks * quantized
        grad, param = elements * grad_dtype.itemsize, elements * param_dtype.itemsize
        direction = 0 if path.tiny else elements * path.dtype.itemsize
        stats += count * (codes + scales + grad + 4 * blocks)
        apply += count * (2 * codes + 2 * scales + grad + 4 + direction)
        update += count * (direction + 2 * param)
    return StepPlan(ours, theirs, stats, apply, update)


def flop_ceiling(matrices: Matrices, schedule: Coefficients) -> float:
    """Return how many times fewer operations than torch.optim.Muon's Newton-Schulz half precision can do.

    The count is of the cheaper form of each shape, of every symmetric product one triangle, with the restarts that fp16
    needs. It is a ratio of times at equal rate.

    Raises:
        ValueError: where fp16 cannot hold the schedule.
    """
    parts = segments(schedule, torch.float16)
    if parts is None:
        raise ValueError("fp16 cannot hold the iterates of this schedule, so it has no Gram form in half precision")
    ours = theirs = 0
    for (rows, cols), count in matrices.items():
        standard = flops("standard", rows, cols, len(schedule.steps), triangle=True)
        gram = flops("gram", rows, cols, len(schedule.steps), triangle=True, num_segments=len(parts))
        ours += count * min(standard, gram)
        theirs += count * flops("standard", rows, cols, len(schedule.steps))
    return theirs / ours
