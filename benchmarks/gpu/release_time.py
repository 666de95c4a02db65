"""Time a step with released gradients against an ordinary one, interleaved, and write a record.

    python -m benchmarks.gpu.release_time [--out NAME.json]

Both arms run the same backward, of a loss that costs next to nothing, and `step()`: the seven matrices of each layer of
a Llama, fp32. Of a CPU only the ratio is printed: absolute times of a shared machine mean little.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.gpu.step_time import interleaved, write_record
from muon8bit import Muon8bit, release_gradients

ARMS = ("ordinary", "released")
CASES = ((24, 64), (8, 512), (4, 1024))  # layers, width; the other side of a layer's MLP is 4 times that


def arm(layers: int, hidden: int, is_released: bool) -> Callable[[], None]:
    """Return one training step of `layers` layers of width `hidden`: backward and `step()`."""
    torch.manual_seed(0)
    shapes = [(hidden, hidden)] * 4 + [(4 * hidden, hidden)] * 2 + [(hidden, 4 * hidden)]
    model = nn.ParameterList([torch.randn(shape) for _ in range(layers) for shape in shapes])
    optimizer = Muon8bit(model.parameters(), on_nonfinite="skip")
    if is_released:
        release_gradients(model, optimizer)

    def step() -> None:
        torch.stack([param.square().sum() for param in model]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each arm")
    parser.add_argument("--out", type=Path, help="write the record there (JSON)")
    args = parser.parse_args()
    rows = []
    for layers, hidden in CASES:
        times = interleaved({name: arm(layers, hidden, name == "released") for name in ARMS}, args.rounds)
        rows.append({"layers": layers, "hidden": hidden, "ratio": round(times["released"] / times["ordinary"], 3)})
    unit = "median time of a step with released gradients over that of an ordinary one; above 1: release costs"
    write_record({"rows": rows}, unit, args.out)


if __name__ == "__main__":
    main()
