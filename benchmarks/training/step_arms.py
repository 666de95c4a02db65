"""The optimizers that `cpu_step_time` compares, on one model's shapes; as a script, another tree's, step by step.

    PYTHONPATH=TREE:TREE/kernels python step_arms.py

It reads lines "HIDDEN LAYERS ARM", and answers each by the CPU seconds of a step.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import muon8bit
from muon8bit import Muon8bit

VOCABULARY = 1024
FORMATS: dict[str, dict[str, Any]] = {
    "linear": {"codebook": "linear"},
    "dynamic": {"codebook": "dynamic"},
    "bits32": {"bits": 32},
}


def intermediate(hidden: int) -> int:
    """Return 8/3 of the width, rounded up to a multiple of 256 as Llama rounds it."""
    return -(-8 * hidden // 3 // 256) * 256


def matrix_shapes(hidden: int, layers: int) -> dict[tuple[int, int], int]:
    """Return how many hidden matrices of each shape a Llama has."""
    wide = intermediate(hidden)
    return {(hidden, hidden): 4 * layers, (wide, hidden): 2 * layers, (hidden, wide): layers}


def seconds(run: Callable[[], Any]) -> float:
    """Return the CPU time of a call in this process: what others do on the machine is not in it."""
    start = time.process_time()
    run()
    return time.process_time() - start


class StepArms:
    """A Llama's parameters with gradients, and optimizers made when they are asked for; all step the same parameters.

    Arms: `"torch muon"` (bf16 Newton-Schulz, of the matrices), `"torch adamw"` (fused, of the rest), and of
    `FORMATS` the whole model in one optimizer, or with `" matrices"` behind, those alone.
    """

    def __init__(self, hidden: int, layers: int) -> None:
        torch.manual_seed(0)
        shapes = [shape for shape, count in matrix_shapes(hidden, layers).items() for _ in range(count)]
        self.matrices = [nn.Parameter(torch.randn(shape) / hidden**0.5) for shape in shapes]
        self.rest = [nn.Parameter(torch.randn(VOCABULARY, hidden) / hidden**0.5)]
        self.rest += [nn.Parameter(torch.ones(hidden)) for _ in range(2 * layers + 1)]
        for param in [*self.matrices, *self.rest]:
            param.grad = 1e-2 * torch.randn_like(param)
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    def step(self, arm: str) -> float:
        """Take a step, the first time after one that makes the state; returns its CPU seconds."""
        if arm not in self.optimizers:
            self.optimizers[arm] = self._optimizer(arm)
            self.optimizers[arm].step()
        return seconds(self.optimizers[arm].step)

    def _optimizer(self, arm: str) -> torch.optim.Optimizer:
        if arm == "torch muon":
            return torch.optim.Muon(self.matrices)
        if arm == "torch adamw":
            return torch.optim.AdamW(self.rest, betas=(0.9, 0.95), fused=True)
        name, _, only = arm.partition(" ")
        groups: list[dict[str, Any]] = [{"params": self.matrices}]
        groups += [] if only else [{"params": self.rest, "algorithm": "adamw", "lr": 1e-3}]
        return Muon8bit(groups, **FORMATS[name])


def main() -> None:
    torch.set_num_threads(1)
    print(muon8bit.__file__, flush=True)
    size, arms = "", None
    for line in sys.stdin:
        hidden, layers, arm = line.rstrip("\n").split(" ", 2)
        if arms is None or size != f"{hidden} {layers}":
            size, arms = f"{hidden} {layers}", StepArms(int(hidden), int(layers))
        print(arms.step(arm), flush=True)


if __name__ == "__main__":
    main()
