"""Bytes that one step moves on several ranks, counted by running it, beside the planner's and all-gathering in fp32.

    python -m benchmarks.scaling.traffic --out benchmarks/results/traffic_llama_1b_layer.json

Processes on this machine that talk by gloo, bf16 parameters sharded by rows (FSDP2's `Shard(0)`) or replicated with
`shard_state`, Newton-Schulz in bf16, of which only the iteration is left out: no byte depends on it. Of all-gathering
every momentum in fp32, which each rank would then orthogonalize, `fraction` is what our bytes are.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from benchmarks.gpu.workloads import Llama
from benchmarks.scaling.transfers import bytes_received, bytes_sent, counted_bytes, gathered_bytes, num_gathered
from muon8bit import Muon8bit
from muon8bit.distributed import Gathering, ShardedBatch, exchange

# Of the published config.json of meta-llama/Llama-3.2-1B; one of its layers.
LAYER = Llama(hidden=2048, intermediate=8192, layers=1, kv=8 * 64)
MODES = ("fsdp", "shard_state")


def run(rank: int, num_ranks: int, mode: str, divisor: int, folder: str) -> None:
    """Run one rank: two steps, of which the second is counted, into a file of the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{mode}", rank=rank, world_size=num_ranks)
    exchange.orthogonalize = lambda X, *_: X  # type: ignore[attr-defined]
    mesh = init_device_mesh("cpu", (num_ranks,))
    shapes, params = [(rows // divisor, cols // divisor) for rows, cols in LAYER.linears()], []
    for shape in shapes:
        whole = torch.full(shape, 0.5, dtype=torch.bfloat16)
        placed = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None) if mode == "fsdp" else whole
        params.append(torch.nn.Parameter(placed))
    group = {} if mode == "fsdp" else {"process_group": mesh.get_group(), "shard_state": True}
    optimizer = Muon8bit(params, ns_dtype=torch.bfloat16, **group)

    def step() -> None:
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()

    step()
    rank_group, batches = optimizer._find_rank_group(), list[ShardedBatch]()
    assert rank_group is not None
    gather = rank_group.gathering

    def remembering(given: Sequence[ShardedBatch], flags: torch.Tensor) -> Gathering:
        batches.extend(given)
        return gather(given, flags)

    rank_group.gathering = remembering  # type: ignore[method-assign]
    with counted_bytes() as counted:
        step()
    (plan,) = rank_group._assignments.values()
    sums = gathered_bytes(num_gathered(batches, num_flags=0))
    predicted = {"gathered": sums, "sent": bytes_sent(plan)[rank], "received": bytes_received(plan)[rank]}
    Path(folder, f"{mode}{rank}.json").write_text(json.dumps({"counted": vars(counted), "predicted": predicted}))
    dist.barrier()
    dist.destroy_process_group()


def measure(mode: str, num_ranks: int, divisor: int) -> dict[str, Any]:
    """Count the bytes of all ranks, beside those predicted, and their part of all-gathering every momentum in fp32."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (num_ranks, mode, divisor, folder), nprocs=num_ranks)
        ranks = [json.loads(Path(folder, f"{mode}{rank}.json").read_text()) for rank in range(num_ranks)]
    elements = sum(rows // divisor * (cols // divisor) for rows, cols in LAYER.linears())
    in_fp32 = (num_ranks - 1) * 4 * elements  # received, by all ranks together
    moved = sum(rank["counted"]["received"] + rank["counted"]["gathered"] for rank in ranks)
    return {"mode": mode, "ranks": ranks, "all_gather_fp32_bytes": in_fp32, "fraction": round(moved / in_fp32, 4)}


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 where a count differs from its prediction."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--divisor", type=int, default=1, help="of both sides of every matrix")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    results = [measure(mode, options.ranks, options.divisor) for mode in options.modes]
    record = {
        "command": shlex.join(sys.argv),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "matrices": [[rows // options.divisor, cols // options.divisor] for rows, cols in LAYER.linears()],
        "results": results,
    }
    text = json.dumps(record, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return int(any(rank["counted"] != rank["predicted"] for result in results for rank in result["ranks"]))


if __name__ == "__main__":
    sys.exit(main())
