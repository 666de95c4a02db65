"""Time over torch.optim.Muon that the cost model predicts for Newton-Schulz of the models; nothing is run.

    python -m benchmarks.gpu.predicted [--kind cuda_sm90] [--out benchmarks/results/predicted.md]

torch.optim.Muon is bf16, standard form, by the vendor's products of one matrix at a time, at the table's rate for them.
Its launches, and what batches gain over single matrices, are left out, while ours are counted; so are the phases around
Newton-Schulz.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.gpu.workloads import MODELS, workloads
from muon8bit.config import DEFAULT_NS_STEPS, DEFAULT_WORKSPACE_BYTES
from muon8bit.orthogonalize import (
    RATES,
    NSMethod,
    batch_size,
    choose_method,
    flops,
    method_cost,
    rates_of,
    resolve_coefficients,
    symmetric_gain,
)

_SCHEDULE = resolve_coefficients("jordan", DEFAULT_NS_STEPS)
_THEIRS = NSMethod("standard", torch.bfloat16)


@dataclass(frozen=True)
class Prediction:
    """Times in operations of the device's fp32 product, and operations, ours and torch.optim.Muon's."""

    ours: float = 0.0
    theirs: float = 0.0
    our_flops: int = 0
    their_flops: int = 0

    def __add__(self, other: Prediction) -> Prediction:
        """Return the sums."""
        times = self.ours + other.ours, self.theirs + other.theirs
        return Prediction(*times, self.our_flops + other.our_flops, self.their_flops + other.their_flops)

    @property
    def time_ratio(self) -> float:
        """Return torch.optim.Muon's time over ours."""
        return self.theirs / self.ours

    @property
    def flop_ratio(self) -> float:
        """Return torch.optim.Muon's operations over ours."""
        return self.their_flops / self.our_flops


def predict(rows: int, cols: int, number: int, kind: str) -> tuple[NSMethod, Prediction]:
    """Return the method of `number` matrices [rows, cols] in one group, and their prediction."""
    together = {"count": number, "budget_bytes": DEFAULT_WORKSPACE_BYTES}
    method = choose_method(rows, cols, _SCHEDULE, kind, **together)
    steps, parts = DEFAULT_NS_STEPS, max(1, len(method.segments))
    # A launch at a time for each matrix: their rate says what a large product takes, not what a launch costs them.
    theirs = method_cost(_THEIRS, rows, cols, steps, replace(rates_of(kind), launch=0.0), 1)
    ours = flops(method.form, rows, cols, steps, triangle=method.products == "kernel", num_segments=parts)
    counts = number * ours, number * flops("standard", rows, cols, steps)
    return method, Prediction(number * method.cost, number * theirs, *counts)


def alone(rows: int, cols: int, kind: str) -> float:
    """Return torch.optim.Muon's time over ours for one matrix, the launches of both counted."""
    rates, steps = rates_of(kind), DEFAULT_NS_STEPS
    return method_cost(_THEIRS, rows, cols, steps, rates, 1) / choose_method(rows, cols, _SCHEDULE, kind).cost


def ceiling(matrices: Mapping[tuple[int, int], int]) -> float:
    """Return the least operations over torch.optim.Muon's: the cheaper form, of symmetric products one triangle."""
    least = theirs = 0
    for (rows, cols), number in matrices.items():
        standard = flops("standard", rows, cols, DEFAULT_NS_STEPS, triangle=True)
        gram = flops("gram", rows, cols, DEFAULT_NS_STEPS, triangle=True, num_segments=2)
        least += number * min(standard, gram)
        theirs += number * flops("standard", rows, cols, DEFAULT_NS_STEPS)
    return theirs / least


def table(kinds: Mapping[str, str]) -> str:
    """Return the tables in Markdown: whole models by each kind (label to device kind), and shapes by the last kind."""
    head = ["model", *[f"time, {label} | FLOP, {label}" for label in kinds], "FLOP ceiling"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * (2 * len(kinds) + 2) + "|"]
    shapes = ["| model | shape | matrices | method | gain | time | FLOP | time, one alone |", "| --- " * 8 + "|"]
    last = list(kinds.values())[-1]
    for workload in workloads()[: len(MODELS)]:
        cells = [workload.name]
        for kind in kinds.values():
            parts = [predict(*shape, number, kind)[1] for shape, number in workload.matrices().items()]
            whole = sum(parts, Prediction())
            cells += [f"{whole.time_ratio:.3f}", f"{whole.flop_ratio:.3f}"]
        lines.append("| " + " | ".join([*cells, f"{ceiling(workload.matrices()):.2f}"]) + " |")
        for (rows, cols), number in workload.matrices().items():
            method, of_shape = predict(rows, cols, number, last)
            together = min(number, batch_size(method, rows, cols, last, DEFAULT_WORKSPACE_BYTES))
            gain = symmetric_gain(min(rows, cols), together, rates_of(last)) if method.products == "kernel" else None
            how = f"{method.form}, {str(method.dtype).removeprefix('torch.')}, {method.products}"
            shown = [workload.name, f"{rows} x {cols}", str(number), how, "-" if gain is None else f"{gain:.2f}"]
            ratios = of_shape.time_ratio, of_shape.flop_ratio, alone(rows, cols, last)
            shapes.append("| " + " | ".join([*shown, *[f"{ratio:.3f}" for ratio in ratios]]) + " |")
    return "\n".join([*lines, "", *shapes]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="cuda_sm90", help="device kind, a key of the table of rates")
    parser.add_argument("--out", type=Path, help="write the tables there; else print them")
    args = parser.parse_args()
    row = rates_of(args.kind)
    # The table without a gain of the symmetric product and without launches: operations alone.
    RATES["vendor"] = replace(row, symmetric=(), triangle=None, launch=0.0, tiny=None)
    text = (
        "# Predicted time of Newton-Schulz over torch.optim.Muon\n\n"
        f"By the cost model with the table's row of {args.kind}, margins included; not measured on a GPU yet.\n"
        "Ratios: torch.optim.Muon's over ours, above 1 ours is less. By `python -m benchmarks.gpu.predicted`.\n\n"
        + table({"vendor's products": "vendor", "this row": args.kind})
        + f"\nThe row: `{row}`\n"
    )
    if args.out:
        args.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
