"""CPU time of a step of whole Llamas: Muon8bit against torch.optim.Muon with a fused AdamW, in turns.

    python -m benchmarks.training.cpu_step_time [--old TREE] [--sizes 256x4 ...] [--rounds 15] [--out FILE.json]

fp32 parameters and gradients, one thread. All arms step once in a round, in an order that rotates; `--old` adds those
of another tree, in a process that waits for its turn. Times are CPU times of the process, so that what others do on the
machine counts little. Reported are ratios of medians, torch / ours: above 1, ours is faster. "range" is that of the
ratios of blocks of 5 rounds. "parts" are in units of torch's whole step: Newton-Schulz, the two phases of the momentum,
the update and AdamW, each timed by itself in every third round, and what they leave of the step; "read_write" is one
multiplication in place of all matrices, from memory and in cache. A record is written after each size; of the sizes in
it, those of the same commits and rounds are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.step_time import write_record
from benchmarks.robustness.against_commit import ROOT, commit_of
from benchmarks.training.step_arms import FORMATS, VOCABULARY, StepArms, intermediate
from benchmarks.training.step_parts import StepParts

SIZES = ("256x4", "512x8", "1024x4")
BLOCK = 5  # rounds
EVERY = 3  # rounds: the slower half of the measurements


class OtherTree:
    """Another tree's arms: a process that takes a step when it is told to."""

    def __init__(self, tree: Path) -> None:
        env = {**os.environ, "PYTHONPATH": f"{tree}:{tree / 'kernels'}", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).with_name("step_arms.py"))]
        self._process = subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if self._read() != str(tree / "muon8bit" / "__init__.py"):
            self.close()
            raise RuntimeError(f"the package of {tree} was not the one imported: is there a muon8bit in it?")

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the other tree's process ended with exit code {self._process.wait()}")
        return line.strip()

    def step(self, hidden: int, layers: int, arm: str) -> float:
        """Return the CPU seconds of a step."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{hidden} {layers} {arm}\n")
        self._process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        """Close the process's input, which ends it."""
        self._process.communicate()


def measure(hidden: int, layers: int, rounds: int, other: OtherTree | None) -> dict[str, list[float]]:
    """Return CPU seconds by round of all arms and parts. Those of every third round stand for the two before."""
    arms, parts = StepArms(hidden, layers), StepParts(hidden, layers).parts()
    torchs = ("torch muon", "torch adamw")
    runs: dict[str, Callable[[], float]] = {arm: partial(arms.step, arm) for arm in (*torchs, *FORMATS)}
    if other:
        runs |= {f"old {arm}": partial(other.step, hidden, layers, arm) for arm in FORMATS}
    rarer = {f"{arm} matrices": partial(arms.step, f"{arm} matrices") for arm in FORMATS} | parts
    times: dict[str, list[float]] = {name: [] for name in [*runs, *rarer]}
    for run in [*runs.values(), *rarer.values()]:
        run()
    for index in range(rounds):
        turn = runs if index % EVERY else {**runs, **rarer}
        names = list(turn)
        for name in names[index % len(names) :] + names[: index % len(names)]:
            times[name].append(turn[name]())
        print(f"{hidden}x{layers}: round {index + 1} of {rounds}", file=sys.stderr, flush=True)
    return times


def figures(times: dict[str, list[float]]) -> dict[str, Any]:
    """Return ratios, their ranges over blocks, and the parts of a step."""
    whole = [muon + adamw for muon, adamw in zip(times["torch muon"], times["torch adamw"], strict=True)]
    unit = median(whole)
    found: dict[str, Any] = {"whole": {}, "whole_range": {}, "matrices": {}, "parts": {}}
    for arm in (name for name in times if name.removeprefix("old ") in FORMATS):
        blocks = [slice(start, start + BLOCK) for start in range(0, len(whole), BLOCK)]
        ratios = [median(whole[block]) / median(times[arm][block]) for block in blocks]
        found["whole"][arm] = round(unit / median(times[arm]), 3)
        found["whole_range"][arm] = [round(min(ratios), 3), round(max(ratios), 3)]
    share = {name: median(values) / unit for name, values in times.items()}
    for arm in FORMATS:
        found["matrices"][arm] = round(share["torch muon"] / share[f"{arm} matrices"], 3)
        parts = {name: share[name] for name in ("newton_schulz", "update")}
        parts |= {"stats": share[f"stats {arm}"], "apply": share[f"apply {arm}"], "adamw": share["torch adamw"]}
        found["parts"][arm] = {**parts, "between": share[arm] - sum(parts.values()), "step": share[arm]}
    parts = {"newton_schulz": share["newton_schulz torch"], "adamw": share["torch adamw"]}
    found["parts"]["torch"] = {**parts, "rest": 1 - sum(parts.values()), "step": 1.0}
    found["parts"]["one pass"] = {name: share[name] for name in ("read_write", "read_write in cache")}
    found["parts"] = {arm: {name: round(v, 4) for name, v in of.items()} for arm, of in found["parts"].items()}
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, metavar="TREE", help="a working tree of another commit")
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="HIDDENxLAYERS")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each arm")
    parser.add_argument("--out", type=Path, help="write the record there (JSON)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tree = None if args.old is None else args.old.resolve()
    other = None if tree is None else OtherTree(tree)
    record: dict[str, Any] = {
        "commit": commit_of(ROOT),
        "old": None if tree is None else commit_of(tree),
        "rounds": args.rounds,
        "vocabulary": VOCABULARY,
    }
    results = _recorded(args.out, record)
    for size in args.sizes:
        hidden, layers = map(int, size.split("x"))
        results[size] = {"intermediate": intermediate(hidden), **figures(measure(hidden, layers, args.rounds, other))}
        unit = "median CPU time of torch.optim.Muon + fused AdamW over ours; above 1: ours is faster; parts: of torch's"
        write_record({**record, "sizes": results}, unit, args.out)
    if other:
        other.close()


def _recorded(out: Path | None, record: dict[str, Any]) -> dict[str, Any]:
    """Return the sizes in a record of the same commits and number of rounds."""
    if out is None or not out.exists():
        return {}
    before = json.loads(out.read_text())
    sizes: dict[str, Any] = before["sizes"] if all(before[key] == value for key, value in record.items()) else {}
    return sizes


if __name__ == "__main__":
    main()
