"""Bytes sent part by part of a planned step, by the planner of a working tree of any age: see `host_time`.

    python benchmarks/scaling/parts_of_tree.py FILE.json    # PYTHONPATH is the tree

Parts follow one after the other, each as long as its busiest sender takes. So the sum over all parts of what the
busiest sends, over the sum of what the ranks send on average, says how many times longer the transfers take than they
would if all ranks sent alike.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import muon8bit
from benchmarks.gpu.workloads import MODELS as SMALL_MODELS
from benchmarks.scaling.model import PLANNED_BYTES, matrices_of
from benchmarks.scaling.simulation import MODELS as LARGE_MODELS
from muon8bit.distributed.assignment import Assignment, Matrix, plan
from muon8bit.distributed.matrix_sharding import MatrixSharding, Region

KIND = "cuda_sm90"
MODELS = {**SMALL_MODELS, **LARGE_MODELS}
# Name -> model, GPUs, shards of a replica; 0 for DDP, where every GPU has all of every matrix.
SETTINGS = {
    "8B FSDP on 8": ("Llama-3.1-8B", 8, 8),
    "8B FSDP on 64": ("Llama-3.1-8B", 64, 64),
    "70B FSDP on 64": ("Llama-3.1-70B", 64, 64),
    "8B HSDP 8 x 8": ("Llama-3.1-8B", 64, 8),
    "8B DDP on 8": ("Llama-3.1-8B", 8, 0),
    "1B DDP on 8": ("Llama-3.2-1B", 8, 0),
    "70B FSDP on 512": ("Llama-3.1-70B", 512, 512),
    "405B FSDP on 256": ("Llama-3.1-405B", 256, 256),
}


def planned(name: str, num_gpus: int, num_shards: int) -> Assignment:
    """Return the plan of a model's matrices."""
    if num_shards:
        matrices = matrices_of(MODELS[name], num_shards, num_gpus // num_shards, KIND)
        return plan(matrices, num_gpus, PLANNED_BYTES)
    whole: dict[tuple[int, int], Matrix] = {}
    alone = matrices_of(MODELS[name], 1, 1, KIND)
    for matrix in alone:
        held = (Region((0, matrix.rows), (0, matrix.cols)),) * num_gpus
        whole[matrix[:2]] = matrix._replace(sharding=MatrixSharding(held, held))
    return plan([whole[matrix[:2]] for matrix in alone], num_gpus, PLANNED_BYTES)


def sent_by_part(assignment: Any) -> Iterator[list[int]]:
    """Yield what each rank sends: of the inputs of a round, all at once, and of each part of its updates."""
    num_ranks = len(assignment.load)
    for parts in assignment.rounds:
        # A tree of before parts were cut by rows has tuples of transfers.
        transfers = parts.transfers if hasattr(parts, "transfers") else [t for part in parts for t in part]
        inputs = [0] * num_ranks
        for transfer in transfers:
            for rank, region in transfer.sources.items():
                inputs[rank] += transfer.sent_bytes(region) * (rank != transfer.owner)
        yield inputs
        for number in range(parts.num_parts if hasattr(parts, "num_parts") else len(parts)):
            updates = [0] * num_ranks
            for transfer in transfers if hasattr(parts, "transfers") else parts[number]:
                for rank, region in transfer.targets.items():
                    here = (region, number, parts.num_parts) if hasattr(parts, "num_parts") else (region,)
                    updates[transfer.owner] += transfer.returned_bytes(*here) * (rank != transfer.owner)
            yield updates


def ratio(assignment: Assignment) -> dict[str, float]:
    """Return the busiest sender over the mean, over all parts, and their number."""
    parts = [sent for sent in sent_by_part(assignment) if any(sent)]
    busiest = sum(map(max, parts))
    mean = sum(map(sum, parts)) / len(assignment.load)
    largest = max(map(max, parts))
    return {"ratio": round(busiest / mean, 3), "parts": len(parts), "most_sent_of_a_part": largest}


def main(out: Path) -> None:
    """Write the ratios by setting."""
    found = {name: ratio(planned(*setting)) for name, setting in SETTINGS.items()}
    out.write_text(json.dumps({"package": str(Path(muon8bit.__file__).parents[1]), "settings": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
