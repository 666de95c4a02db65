"""Failures planted on one of several ranks, and what the step then does: a table of phases and failures.

    python -m benchmarks.robustness.fault_injection             # 2 and 3 ranks, all cases
    python -m benchmarks.robustness.fault_injection --only killed --ranks 2

On gloo ranks of this machine an error is planted in one phase of a step, on the last rank: an exception, an
out-of-memory error, a gradient of a dtype that no step takes, none, or the process is killed or stopped there. Recorded
is, of all ranks that still run, how the step ended, whether parameters, gradients, state and groups are as before, to
the bit, whether the same step can be taken again, and the longest wait. Cases that are in the record are not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from muon8bit import Muon8bit
from muon8bit.distributed import exchange, normalizing, norms, rank_group, rounds, sharded_batch

RECORD = Path(__file__).parents[1] / "results" / "fault_injection.json"
SHAPES = {"a": (24, 40), "b": (30, 16), "c": (9, 50), **{f"d{i}": (12 + i, 30) for i in range(6)}, "bias": (21,)}
# By phase: where the failure is planted, and at which call of that function.
PHASES: dict[str, tuple[Any, str, int]] = {
    "clipping": (sharded_batch, "with_factor", 1),
    "reading": (norms, "sums_of_squares", 1),
    "gathering": (norms.Gathering, "run", 1),
    "first NS": (exchange, "orthogonalize", 1),
    "later NS": (exchange, "orthogonalize", 2),
    "writing": (normalizing, "update_params_", 1),
    "saving": (rank_group.RankGroup, "gather_state", 1),
}
FAILURES = ("exception", "memory", "dtype", "missing gradient", "killed", "stopped")
WAYS = ("process_group", "shard_state", "fully_shard")
# A gradient is looked at when it is read, and there alone; other ways have nothing to do there.
IMPOSSIBLE = {
    "dtype": "gradients are looked at in reading alone",
    "missing gradient": "gradients are looked at in reading alone",
}


def impossible(phase: str, failure: str, way: str) -> str | None:
    """Say why a case does not exist."""
    if failure in IMPOSSIBLE and phase != "reading":
        return IMPOSSIBLE[failure]
    if phase == "clipping" and way == "fully_shard":
        return "clip_matrix_norm is refused for sharded parameters"
    if phase == "saving" and way != "shard_state":
        return "state_dict() communicates nothing"
    return None


def values(seed: int) -> dict[str, Tensor]:
    """Return normal numbers of every shape, the same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def make(way: str) -> tuple[dict[str, torch.nn.Parameter], Muon8bit, Callable[[Tensor], Tensor]]:
    """Return parameters, their optimizer, and how a whole tensor is put where they lie."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def placed(tensor: Tensor) -> Tensor:
        if way == "fully_shard":
            return distribute_tensor(tensor.clone(), mesh, [Shard(0)], src_data_rank=None)
        return tensor.clone()

    params = {name: torch.nn.Parameter(placed(value)) for name, value in values(0).items()}
    hidden = {"params": [(name, param) for name, param in params.items() if name != "bias"]}
    more = {} if way == "fully_shard" else {"process_group": dist.group.WORLD, "shard_state": way == "shard_state"}
    groups: list[dict[str, Any]] = [
        {**hidden, "clip_matrix_norm": None if way == "fully_shard" else 5.0},
        {"params": [("bias", params["bias"])], "algorithm": "adamw", "lr": 0.01},
    ]
    workspace = 32 * 2**20
    return params, Muon8bit(groups, lr=0.02, workspace_bytes=workspace, **more), placed


def everything(params: Mapping[str, torch.nn.Parameter], optimizer: Muon8bit) -> list[Any]:
    """Return copies of this rank's parameters, gradients, state and hyper-parameters."""

    def local(tensor: Tensor | None) -> Tensor | None:
        return tensor.to_local().clone() if isinstance(tensor, DTensor) else None if tensor is None else tensor.clone()

    tensors = [[local(p.detach()), local(p.grad)] for p in params.values()]
    state = [{key: local(value) for key, value in optimizer.state[p].items()} for p in params.values()]
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return [tensors, state, copy.deepcopy(groups)]


def is_same(left: Any, right: Any) -> bool:
    """Return whether two such copies are equal, to the bit."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(is_same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(is_same, left, right))
    return bool(left == right)


def fail(failure: str) -> None:
    """Fail here."""
    if failure == "exception":
        raise RuntimeError("planted")
    if failure == "memory":
        raise torch.OutOfMemoryError("planted")
    os.kill(os.getpid(), signal.SIGKILL if failure == "killed" else signal.SIGSTOP)


def planted(phase: str, failure: str) -> Callable[[], None]:
    """Plant a failure in a phase; returns what takes it away."""
    owner, name, call = PHASES[phase]
    original, calls = getattr(owner, name), []

    def function(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            fail(failure)
        return original(*args, **kwargs)

    setattr(owner, name, function)
    return lambda: setattr(owner, name, original)


def one_round_a_matrix() -> None:
    """Plan every matrix into a round of its own, so that there is a later Newton-Schulz."""
    rounds.round_bytes = lambda *_: 1


def on_rank(rank: int, num_ranks: int, path: str, case: tuple[str, str, str], timeout_s: float) -> None:
    """Run one case; this rank's outcome into a file, if it lives."""
    phase, failure, way = case
    torch.set_num_threads(1)
    wait = timedelta(seconds=8 * timeout_s)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=num_ranks, timeout=wait)
    one_round_a_matrix()
    params, optimizer, placed = make(way)
    is_bad = rank == num_ranks - 1

    def set_grads(seed: int) -> None:
        for name, value in values(seed).items():
            params[name].grad = placed(value)

    def act() -> None:
        optimizer.consolidate_state_dict() if phase == "saving" else optimizer.step()

    set_grads(1)
    optimizer.step()
    optimizer.step_timeout = timeout_s
    optimizer.consolidate_state_dict()
    saved = copy.deepcopy(optimizer.state_dict())
    set_grads(2)
    undo: Callable[[], None] = lambda: None  # noqa: E731
    grad = params["a"].grad
    if is_bad and failure == "dtype":
        params["a"].grad_dtype = None
        params["a"].grad = grad.to(torch.complex64)  # type: ignore[union-attr]
    elif is_bad and failure == "missing gradient":
        params["a"].grad = None
    elif is_bad:
        undo = planted(phase, failure)
    before = everything(params, optimizer)
    found: dict[str, Any] = {"error": None}
    start = time.monotonic()
    try:
        act()
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    found["seconds"] = time.monotonic() - start
    found["as_before"] = is_same(everything(params, optimizer), before)
    undo()
    params["a"].grad = grad
    found["refuses"] = False
    try:
        optimizer._check_not_failed()
    except RuntimeError:
        found["refuses"] = True
    found["retry"] = False
    if found["refuses"]:  # a loaded state alone does not mend the transfers
        optimizer.load_state_dict(copy.deepcopy(saved))
        try:
            act()
        except RuntimeError as error:
            found["refuses"] = "start the job again" in str(error)
    if failure not in ("killed", "stopped") and not found["refuses"]:
        act()
        found["retry"] = True
    Path(f"{path}/rank{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # a group that has lost a rank cannot be taken down in order


def run_case(num_ranks: int, case: tuple[str, str, str], timeout_s: float) -> dict[str, Any]:
    """Run a case on ranks; what those that live have found, together."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.tensor", "muon8bit"])
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=on_rank, args=(rank, num_ranks, folder, case, timeout_s))
            for rank in range(num_ranks)
        ]
        for process in ranks:
            process.start()
        survivors = ranks[:-1] if case[1] in ("killed", "stopped") else ranks
        for process in survivors:
            process.join(120 + 8 * timeout_s)
        for process in ranks:
            process.kill()
            process.join()
        files = [Path(folder) / f"rank{ranks.index(process)}.json" for process in survivors]
        if not all(file.is_file() for file in files):
            return {"outcome": "a rank hangs or has crashed", "waits_at_most_the_timeout": False}
        found = [json.loads(file.read_text()) for file in files]
    return {
        "outcome": [of_rank["error"] for of_rank in found],
        "all_raise": all(of_rank["error"] for of_rank in found),
        "waits_at_most_the_timeout": max(of_rank["seconds"] for of_rank in found) <= timeout_s + 2,
        "bitwise_as_before": all(of_rank["as_before"] for of_rank in found),
        "refuses_to_go_on": all(of_rank["refuses"] for of_rank in found),
        "retry_works": all(of_rank["retry"] for of_rank in found),
    }


def table(record: Mapping[str, Any]) -> str:
    """Return the record as a Markdown table."""
    head = ("case", "all raise", "within the timeout", "as before", "refuses", "retry works", "first error elsewhere")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    keys = ("all_raise", "waits_at_most_the_timeout", "bitwise_as_before", "refuses_to_go_on", "retry_works")
    for name, found in record.items():
        if "impossible" in found:
            lines.append(f"| {name} | impossible: {found['impossible']} |" + " |" * (len(head) - 2))
            continue
        marks = ["yes" if found.get(key) else "no" for key in keys]
        outcome = found["outcome"]
        lines.append(f"| {name} | " + " | ".join([*marks, str(outcome[0] if outcome else outcome)]) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run what is missing and write the record and its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 3])
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--only", nargs="*", choices=FAILURES, default=list(FAILURES))
    parser.add_argument("--timeout", type=float, default=8.0, help="step_timeout, in seconds")
    parser.add_argument("--record", type=Path, default=RECORD)
    options = parser.parse_args()
    record = json.loads(options.record.read_text()) if options.record.is_file() else {}
    for num_ranks in options.ranks:
        for way in options.ways:
            for phase in PHASES:
                for failure in options.only:
                    name = f"{num_ranks} ranks, {way}, {phase}, {failure}"
                    if name in record:
                        continue
                    reason = impossible(phase, failure, way)
                    case = (phase, failure, way)
                    record[name] = {"impossible": reason} if reason else run_case(num_ranks, case, options.timeout)
                    print(name, json.dumps(record[name]), flush=True)
                    options.record.write_text(json.dumps(record, indent=1) + "\n")
                    options.record.with_suffix(".md").write_text(table(record))
    return 0 if all("impossible" in of or of["waits_at_most_the_timeout"] for of in record.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
