"""CPU time of a step of NorMuon8bit and AdaMuon8bit over that of Muon8bit, on whole Llamas, in turns.

    python -m benchmarks.training.family_step_time [--sizes 512x8 1024x4] [--rounds 15] [--out FILE.json]

fp32 parameters and gradients, one thread; codebook and block are the same for all. All arms step once in a round, in an
order that rotates. Times are CPU times of the process, so that what others do on the machine counts little. Reported
are ratios of medians, ours over Muon8bit: above 1, it is slower. "range" is that of the ratios of blocks of 5 rounds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.step_time import write_record
from benchmarks.robustness.against_commit import ROOT, commit_of
from benchmarks.training.cpu_step_time import BLOCK
from benchmarks.training.step_arms import VOCABULARY, StepArms, seconds
from muon8bit import AdaMuon8bit, Muon8bit, NorMuon8bit

SIZES = ("512x8", "1024x4")
FORMAT: dict[str, Any] = {"codebook": "dynamic", "block_size": 2048}
ARMS: dict[str, Any] = {
    "muon": Muon8bit,
    **{f"normuon {preset}": (NorMuon8bit, preset) for preset in NorMuon8bit.presets},
    **{f"adamuon {preset}": (AdaMuon8bit, preset) for preset in AdaMuon8bit.presets},
}


def measure(hidden: int, layers: int, rounds: int) -> dict[str, list[float]]:
    """Return CPU seconds by round of all arms; each has taken one step before, which makes its state."""
    model = StepArms(hidden, layers)
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for name, arm in ARMS.items():
        groups = [{"params": model.matrices}, {"params": model.rest, "algorithm": "adamw", "lr": 1e-3}]
        optimizers[name] = Muon8bit(groups, **FORMAT) if name == "muon" else arm[0](groups, preset=arm[1], **FORMAT)
        optimizers[name].step()
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    names = list(ARMS)
    for index in range(rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(seconds(optimizers[name].step))
        print(f"{hidden}x{layers}: round {index + 1} of {rounds}", file=sys.stderr, flush=True)
    return times


def ratios(times: dict[str, list[float]]) -> dict[str, Any]:
    """Return the ratio of each arm to Muon8bit, and its range over blocks of rounds."""
    found, base = {}, times["muon"]
    blocks = [slice(start, start + BLOCK) for start in range(0, len(base), BLOCK)]
    for name, values in times.items():
        of_blocks = [median(values[block]) / median(base[block]) for block in blocks]
        found[name] = {
            "ratio": round(median(values) / median(base), 3),
            "range": [round(min(of_blocks), 3), round(max(of_blocks), 3)],
        }
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="HIDDENxLAYERS")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each arm")
    parser.add_argument("--out", type=Path, help="write the record there (JSON)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    record = {"commit": commit_of(ROOT), "rounds": args.rounds, "vocabulary": VOCABULARY, **FORMAT}
    sizes = {}
    for size in args.sizes:
        hidden, layers = map(int, size.split("x"))
        sizes[size] = ratios(measure(hidden, layers, args.rounds))
        write_record({**record, "sizes": sizes}, "median CPU time of a step over Muon8bit's", args.out)


if __name__ == "__main__":
    main()
