r"""Predict whether cheap matrices should stay replicated under DDP: planned from shapes, nothing is run.

    python -m benchmarks.scaling.replicated --out benchmarks/results/replicated.md

Three ways to step a model of which every GPU has all weights and momenta: all matrices divided among the ranks
(`process_group`), none (each rank does all), or each as it is faster by the cost model and a bandwidth.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from benchmarks.gpu.workloads import LORA, MODELS, workloads
from muon8bit.config import DEFAULT_NS_STEPS, DEFAULT_WORKSPACE_BYTES
from muon8bit.orthogonalize import choose_method, resolve_coefficients

KIND = "cuda_sm90"
# Operations of the vendor's fp32 product a second: `NSMethod.cost` over it is a time. Eight times as much in half
# precision are the 400 TFLOP/s of `model.Machine`.
FP32_OPERATIONS = 50e12
ITEMSIZE = 2  # of O as it is sent
# NVLink as in `model.Machine`, and about what PCIe 4.0 x16 carries.
LINKS = {"NVLink": 360e9, "PCIe": 25e9}
NUM_GPUS = (2, 8)
# Of GPT-2's published config.json: hidden size 768, 12 layers; q, k and v are orthogonalized one by one.
GPT2 = Counter({(768, 768): 4 * 12, (3072, 768): 12, (768, 3072): 12})


def models() -> dict[str, Mapping[tuple[int, int], int]]:
    """Return how many matrices of each shape, by model."""
    by_name = {workload.name: workload.matrices() for workload in workloads()}
    return {**{name: by_name[name] for name in (*MODELS, LORA)}, "GPT-2 124M": GPT2}


@dataclass(frozen=True)
class Ways:
    """Milliseconds of a step's Newton-Schulz and transfers: (arithmetic, transfer), latencies of messages left out.

    Attributes:
        divided: every matrix is one rank's.
        replicated: every rank has all; nothing is sent.
        chosen: each shape as it takes less time.
        num_replicated, num_matrices: how many stay with `chosen`, of how many.
    """

    divided: tuple[float, float]
    replicated: tuple[float, float]
    chosen: tuple[float, float]
    num_replicated: int
    num_matrices: int

    def gain(self, *, overlaps: bool) -> float:
        """Return how many times faster `chosen` is than the better of the other two, which a user can have today.

        Args:
            overlaps: transfers hide behind arithmetic, or it behind them; else they follow each other.
        """
        divided, replicated, chosen = (
            max(times) if overlaps else sum(times) for times in (self.divided, self.replicated, self.chosen)
        )
        return min(divided, replicated) / chosen


def ways_of(matrices: Mapping[tuple[int, int], int], num_gpus: int, bytes_a_second: float) -> Ways:
    """Return the times of a model's matrices under DDP."""
    totals, num_replicated = [(0.0, 0.0)] * 3, 0
    for (rows, cols), count in matrices.items():
        alone = count * _seconds(rows, cols, count)
        shared = count / num_gpus * _seconds(rows, cols, -(-count // num_gpus))
        # Every rank receives all of O but what it owns.
        moved = count * ITEMSIZE * rows * cols * (num_gpus - 1) / num_gpus / bytes_a_second
        stays = alone < shared + moved
        num_replicated += count * stays
        times = (shared, moved), (alone, 0.0), (alone, 0.0) if stays else (shared, moved)
        totals = [(old[0] + 1e3 * new[0], old[1] + 1e3 * new[1]) for old, new in zip(totals, times, strict=True)]
    divided, replicated, chosen = totals
    return Ways(divided, replicated, chosen, num_replicated, sum(matrices.values()))


def _seconds(rows: int, cols: int, count: int) -> float:
    """Return the time of one of `count` matrices that are orthogonalized together."""
    coefficients = resolve_coefficients("jordan", DEFAULT_NS_STEPS)
    budget = DEFAULT_WORKSPACE_BYTES
    method = choose_method(rows, cols, coefficients, KIND, tiny=False, count=count, budget_bytes=budget)
    return method.cost / FP32_OPERATIONS


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the Markdown there; else print it")
    out, command = parser.parse_args().out, shlex.join(["python", "-m", "benchmarks.scaling.replicated", *sys.argv[1:]])
    text = f"""# Cheap matrices that stay replicated under DDP

Predicted by the cost model's row of {KIND}, not measured on a GPU yet; by `{command}`.

Milliseconds of a step: Newton-Schulz + transfers, at 400 TFLOP/s in half precision, {LINKS["NVLink"] / 1e9:g} GB/s
(NVLink) or {LINKS["PCIe"] / 1e9:g} GB/s (PCIe), messages without latency.

- divided: every matrix has an owner, as with `process_group`; replicated: every rank does all, as without.
- by a rule: each shape as it takes less.
- gain: of the rule over the better of the other two, where transfers and arithmetic follow each other / where they
  overlap.

| model | GPUs | link | divided | replicated | by a rule | matrices that stay | gain |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""
    for (name, matrices), num_gpus, link in product(models().items(), NUM_GPUS, LINKS):
        ways = ways_of(matrices, num_gpus, LINKS[link])
        times = (f"{one:.2f} + {two:.2f}" for one, two in (ways.divided, ways.replicated, ways.chosen))
        gains = f"{ways.gain(overlaps=False):.3f} / {ways.gain(overlaps=True):.3f}"
        cells = (name, f"{num_gpus}", link, *times, f"{ways.num_replicated} of {ways.num_matrices}", gains)
        text += f"| {' | '.join(cells)} |\n"
    if out:
        out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
