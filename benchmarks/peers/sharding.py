"""Two gloo processes with FSDP2 against one process, then their checkpoint in one process.

`python -m benchmarks.peers.sharding SUBJECT RANK FOLDER` is one of the two.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from benchmarks.peers.matrices import LEAST_COSINE, OneMatrix, make_grads, take_step
from benchmarks.peers.rules import cosine
from benchmarks.peers.subjects import Subject

ROOT = Path(__file__).resolve().parents[2]
NUM_RANKS, NUM_STEPS, TIMEOUT_S = 2, 3, 600


def check_sharding(subject: Subject) -> dict[str, Any]:
    """Compare the third update of two ranks with one process's, and the fourth with that after resharding to one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        failure = _run_ranks(subject, folder)
        sharded = {i: np.load(file) for i in range(NUM_STEPS + 1) if (file := folder / f"update{i}.npy").exists()}
        model, grads, updates = OneMatrix(), make_grads(NUM_STEPS), []
        optimizer = subject.make(list(model.named_parameters()))
        for i, grad in enumerate(grads):
            updates.append(take_step(optimizer, model.weight, grad, seed=i))
        if NUM_STEPS - 1 not in sharded:
            return {"outcome": failure, "passed": False}
        value = cosine(updates[-1], sharded[NUM_STEPS - 1])
        result: dict[str, Any] = {"cosine": value, "outcome": "", "passed": value >= LEAST_COSINE and not failure}
        if failure:
            return result | {"outcome": failure}
        try:
            result["reshard_cosine"] = cosine(_resharded(subject, folder, model.weight.shape), sharded[NUM_STEPS])
        except (Exception, CheckpointException) as error:
            cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            return result | {"outcome": describe_error(cause), "passed": False}
        result["passed"] &= result["reshard_cosine"] >= LEAST_COSINE
        return result


def _run_ranks(subject: Subject, folder: Path) -> str:
    """Run both processes; return why one failed, "" where none did."""
    words = [sys.executable, "-m", "benchmarks.peers.sharding", json.dumps(asdict(subject))]
    ranks = [
        subprocess.Popen(
            [*words, str(rank), str(folder)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for rank in range(NUM_RANKS)
    ]
    failure = ""
    for rank in ranks:
        try:
            _, errors = rank.communicate(timeout=TIMEOUT_S)
            if rank.returncode and not failure:
                told = next((line for line in reversed(errors.splitlines()) if "Error" in line), "failed")
                failure = told.removeprefix(f"[rank{ranks.index(rank)}]: ")[:200]
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.communicate()
            failure = failure or f"no end within {TIMEOUT_S} s"
    return failure


def describe_error(error: BaseException) -> str:
    """Return type and first line of an error."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


def run_rank(subject: Subject, rank: int, folder: Path) -> None:
    """Step a sharded matrix, save each update whole, and a checkpoint before the last one."""
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=NUM_RANKS, timeout=timedelta(seconds=300))
    assert dist.get_world_size() == NUM_RANKS
    model: nn.Module = OneMatrix()
    fully_shard(model)
    param: Any = model.weight
    optimizer = subject.make(list(model.named_parameters()))
    for i, grad in enumerate(make_grads(NUM_STEPS + 1)):
        if i == NUM_STEPS:
            param.grad = None
            dcp.save(
                {"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=str(folder / "checkpoint")
            )
            _save(rank, folder / "before.npy", param.full_tensor())
        before = param.full_tensor()
        param.grad = distribute_tensor(grad, param.device_mesh, param.placements)
        torch.manual_seed(i)
        optimizer.step()
        _save(rank, folder / f"update{i}.npy", before - param.full_tensor())
    dist.barrier()
    dist.destroy_process_group()


def _save(rank: int, file: Path, value: torch.Tensor) -> None:
    if rank == 0:
        np.save(file, value.detach().double().numpy())


def _resharded(subject: Subject, folder: Path, shape: torch.Size) -> np.ndarray:
    """Return the update that one process takes from the two ranks' checkpoint."""
    model = OneMatrix(shape=(shape[0], shape[1]))
    model.weight.data.copy_(torch.from_numpy(np.load(folder / "before.npy")))
    optimizer = subject.make(list(model.named_parameters()))
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=str(folder / "checkpoint"), no_dist=True)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return take_step(optimizer, model.weight, make_grads(NUM_STEPS + 1)[-1], seed=NUM_STEPS)


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    run_rank(Subject(**json.loads(sys.argv[1])), int(sys.argv[2]), Path(sys.argv[3]))
