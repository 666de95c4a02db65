r"""Plan of who would orthogonalize what, and what would move, for large models on many GPUs: planned, nothing is run.

    python -m benchmarks.scaling.simulation --out benchmarks/results/scale_simulation.md \
        --json benchmarks/results/scale_simulation.json

The planner is the one that `Muon8bit.step()` uses. Bytes and balance are counted; times are predicted from the rates
given by `--tflops`, `--node-gb-s` and `--network-gb-s`, of which nothing was measured here.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.workloads import Llama
from benchmarks.scaling.model import Machine, SimulatedStep, shards_of, simulate

# Of the published config.json of meta-llama/Llama-3.1-8B, -70B and -405B; embeddings, head and norms are AdamW's.
MODELS = {
    "Llama-3.1-8B": Llama(hidden=4096, intermediate=14336, layers=32, kv=8 * 128),
    "Llama-3.1-70B": Llama(hidden=8192, intermediate=28672, layers=80, kv=8 * 128),
    "Llama-3.1-405B": Llama(hidden=16384, intermediate=53248, layers=126, kv=8 * 128),
}
NUM_GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


def gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g}"


def table(rows: Sequence[SimulatedStep]) -> str:
    head = (
        "| model (matrices) | GPUs | shards x replicas | balance | parts | busiest "
        "| mean / most sent / most received, GB | row sums, GB "
        "| all-gather fp32, GB | Moonlight mean / most, GB | state, GB | arithmetic / transfer, ms "
        "| Moonlight's, ms |\n"
        f"|{' --- |' * 13}\n"
    )
    lines = []
    for r in rows:
        cells = [
            f"{r.model} ({r.num_matrices})",
            f"{r.num_gpus}",
            f"{r.num_shards} x {r.num_gpus // r.num_shards}",
            f"{r.balance:.3f}",
            f"{r.num_rounds} + {r.num_parts}",
            f"{r.busiest:.3f}",
            f"{gb(r.mean_bytes)} / {gb(r.most_sent_bytes)} / {gb(r.most_received_bytes)}",
            gb(r.sums_bytes),
            gb(r.gathered_fp32_bytes),
            f"{gb(r.moonlight_mean_bytes)} / {gb(r.moonlight_most_bytes)}",
            gb(r.state_bytes),
            f"{r.arithmetic_ms:.0f} / {r.transfer_ms:.0f}",
            f"{r.moonlight_arithmetic_ms:.0f} / {r.moonlight_transfer_ms:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |\n")
    return head + "".join(lines)


def markdown(rows: Sequence[SimulatedStep], machine: Machine, kind: str, command: str) -> str:
    return f"""# One step on many GPUs, planned

Nothing here was run or measured: bytes and balance are the planner's, times follow from assumed rates.
By `{command}`, {date.today().isoformat()}, torch {torch.__version__}.

Assumed: paths of `{kind}`, products at {machine.tflops:g} TFLOP/s a GPU, {machine.node_gb_s:g} GB/s each way to the
other GPUs of a node of {machine.node_size} and {machine.network_gb_s:g} GB/s each way over the network, no latencies
(data sheets of an H100 SXM: 989 TFLOP/s dense in bf16, 450 GB/s NVLink, a 400 Gb/s adapter a GPU).

- balance: the most loaded rank's arithmetic over the mean. Above 1 it is idle time of the others.
- parts: all-to-alls one after the other, of X + of O. busiest: what the busiest sender sends over the mean, summed over
  them: how many times longer they take than if all sent alike. Parts are taken to have equal shares of the rows.
- GB (10^9 bytes) are of one rank and one step. Ours: X to the owner and O back, in half precision. Row sums: received
  in the all-gather of which norms are made, on top. All-gather fp32: received, every momentum to every rank of a
  replica.
- Moonlight: every rank gathers in bf16 the matrices of which its flat ZeRO-1 range has a part, orthogonalizes each
  whole, and keeps its part (our reading of arXiv 2502.16982), inside each replica. On the row shards of FSDP2 every
  rank has a part of every matrix: half of the all-gather's bytes, and all of the arithmetic on every rank.
- state: 8-bit momentum of the matrices, of the rank that has most.
- arithmetic / transfer: round after round, each as long as its slowest rank takes; part after part, likewise (row sums
  aside). They overlap but for the first and the last round.

{table(rows)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--gpus", nargs="+", type=int, default=list(NUM_GPUS))
    parser.add_argument("--kind", default="cuda_sm90", help="device kind that the paths are for")
    parser.add_argument("--tflops", type=float, default=Machine.tflops, help="products of a GPU in half precision")
    parser.add_argument("--node-gb-s", type=float, default=Machine.node_gb_s, help="of a GPU in its node, each way")
    parser.add_argument("--network-gb-s", type=float, default=Machine.network_gb_s, help="of a GPU, each way")
    parser.add_argument("--node-size", type=int, default=Machine.node_size, help="GPUs of a node")
    parser.add_argument("--out", type=Path, help="write the Markdown there; else print it")
    parser.add_argument("--json", type=Path, help="write every figure there")
    args = parser.parse_args()
    machine = Machine(args.tflops, args.node_gb_s, args.network_gb_s, args.node_size)
    rows = []
    for name, num_gpus in product(args.models, args.gpus):
        for num_shards in sorted({num_gpus, min(num_gpus, shards_of(MODELS[name]))}, reverse=True):
            if num_gpus % num_shards:
                parser.error(f"--gpus {num_gpus} is no multiple of the {num_shards} of a replica of {name}")
            rows.append(simulate(name, MODELS[name], num_gpus, num_shards, args.kind, machine))
    command = shlex.join(["python", *sys.orig_argv[1:]])
    text = markdown(rows, machine, args.kind, command)
    if args.out:
        args.out.write_text(text)
    else:
        print(text)
    if args.json:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        assumed: dict[str, Any] = {"kind": args.kind, **asdict(machine)}
        record = {"command": command, "date": date.today().isoformat(), "versions": versions, "assumed": assumed}
        figures = [{k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(row).items()} for row in rows]
        args.json.write_text(json.dumps({**record, "rows": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
