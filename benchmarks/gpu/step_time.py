"""Time `Muon8bit.step()` against `torch.optim.Muon.step()`, interleaved, and write a record.

    python -m benchmarks.gpu.step_time [--isa AVX512_CORE] [--out benchmarks/results/NAME.json]

One matrix a shape, and the 64 matrices of a LoRA model, fp32 parameters and gradients. Only ratios of medians are
printed for a CPU: absolute times of a shared machine mean little. `--isa` is oneDNN's ONEDNN_MAX_CPU_ISA: both sides
then run as on a CPU without the later instructions (AVX512_CORE: no bf16 instructions).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from datetime import date
from math import exp, log
from pathlib import Path
from statistics import fmean, median
from typing import Any

SHAPES = ((1024, 1024), (256, 1024), (4096, 1024), (1024, 4096), (2048, 8192))
LORA = [(16, 2048), (2048, 16)] * 32
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_tile")


def cpu_flags() -> list[str]:
    """Return the instruction-set flags that decide matrix rates, as the kernel lists them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    return [flag for flag in FLAGS if flag in flags]


def interleaved(arms: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each arm; the arms take turns, after one warm-up each."""
    for arm in arms.values():
        arm()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            start = time.perf_counter()
            arm()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def write_record(figures: dict[str, Any], unit: str, out: Path | None) -> None:
    """Print figures with what they depend on, as JSON, and write them to `out`."""
    import torch

    record = {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "cpu": {"machine": platform.machine(), "flags": cpu_flags(), "threads": torch.get_num_threads()},
        "unit": unit,
        **figures,
    }
    text = json.dumps(record, indent=2)
    print(text)
    if out:
        out.write_text(text + "\n")


def measure(shapes: list[tuple[int, int]], rounds: int) -> dict[str, float]:
    """Return the ratios of torch.optim.Muon's median step time to that of each of ours, above 1: ours is faster.

    Each step is of one optimizer for all these matrices.
    """
    import torch

    from muon8bit import Muon8bit

    torch.manual_seed(0)
    arms: dict[str, torch.optim.Optimizer] = {}
    for name in ("torch", "linear", "dynamic", "bits32"):
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        for param in params:
            param.grad = torch.randn_like(param)
        if name == "torch":
            arms[name] = torch.optim.Muon(params)
        elif name == "bits32":
            arms[name] = Muon8bit(params, bits=32)
        else:
            arms[name] = Muon8bit(params, codebook=name)
    times = interleaved({name: optimizer.step for name, optimizer in arms.items()}, rounds)
    return {name: times["torch"] / times[name] for name in arms if name != "torch"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", help="ONEDNN_MAX_CPU_ISA for both sides, e.g. AVX512_CORE")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each arm")
    parser.add_argument("--out", type=Path, help="write the record there (JSON)")
    args = parser.parse_args()
    if args.isa:
        os.environ["ONEDNN_MAX_CPU_ISA"] = args.isa  # before torch is imported
    ratios = {f"{rows}x{cols}": measure([(rows, cols)], args.rounds) for rows, cols in SHAPES}
    lora = measure(LORA, args.rounds)
    means = {arm: exp(fmean(log(r[arm]) for r in ratios.values())) for arm in next(iter(ratios.values()))}
    figures = {
        "onednn_max_cpu_isa": args.isa,
        "ratios": {shape: {arm: round(v, 3) for arm, v in r.items()} for shape, r in ratios.items()},
        "geometric_mean": {arm: round(v, 3) for arm, v in means.items()},
        "lora_64_matrices": {arm: round(v, 3) for arm, v in lora.items()},
    }
    unit = "median time of torch.optim.Muon over ours, interleaved; above 1: ours is faster"
    write_record(figures, unit, args.out)


if __name__ == "__main__":
    main()
