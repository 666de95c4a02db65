"""Count the kernels that torch and Triton launch where ranks hold columns of matrices; nothing is run.

    python -m benchmarks.scaling.launches [--tree OLD] [--out benchmarks/results/launches_tp8.json]

The matrices are those of Llama-3.1-8B that row-parallel layers cut among 8 ranks: 32 output and 32 down projections,
codebook linear, bf16 gradients. Both phases are called on tensors without storage, one matrix at a time and all of a
shape together; a step lies in between. An operation that makes or fills a tensor counts as one kernel, views and
allocations as none. A whole step of all matrices without Newton-Schulz is counted by `step_of_tree`.
`--tree` is another checkout, counted beside this one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

import torch
from muon8bit_kernels import num_blocks, reference
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[2]
RANKS, LAYERS, ROWS, BLOCK = 8, 32, 4096, 2048
WIDTHS = (4096, 14336)  # of the output and the down projection
_NO_KERNEL = ("empty", "detach", "resize", "set_", "_local_scalar_dense")
_LIMIT_S = 300


class LaunchCounter(TorchDispatchMode):
    """Counts the operations of torch that launch a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.total += not (func.is_view or any(word in name for word in _NO_KERNEL))
        return func(*args, **(kwargs or {}))


@contextmanager
def counting() -> Iterator[LaunchCounter]:
    """Count what torch launches, and what Triton would; Triton compiles and launches nothing."""
    counter = LaunchCounter()

    def count_only(*_: Any, **__: Any) -> None:
        counter.total += 1

    with counter:
        if importlib.util.find_spec("triton") is None:
            yield counter
            return
        import triton

        with mock.patch.object(triton.JITFunction, "run", count_only):
            yield counter


def backends() -> dict[str, Any]:
    """Return the modules that may have both phases, by the way they are made; the first is the default on CUDA."""
    import muon8bit_kernels.reference.cut as in_torch

    if importlib.util.find_spec("muon8bit_kernels.triton.cut") is None:
        return {"torch": in_torch}
    import muon8bit_kernels.triton.cut as in_triton

    return {"triton": in_triton, "torch": in_torch}


def launches(kernels: Any, cols: int, rank: int, count: int) -> int:
    """Return the kernels that both phases of `count` matrices launch on one rank, in one call each."""
    width = cols // RANKS
    empty: dict[str, Any] = {"device": "meta"}
    codes = [torch.empty(1, ROWS, width, dtype=torch.int8, **empty) for _ in range(count)]
    scales = [torch.empty(1, ROWS, num_blocks(cols, BLOCK), **empty) for _ in range(count)]
    grads = [torch.empty(1, ROWS, width, dtype=torch.bfloat16, **empty) for _ in range(count)]
    new_scales, norms = torch.empty(count, ROWS, scales[0].shape[2], **empty), torch.empty(count, **empty)
    out = torch.empty(count, ROWS, width, dtype=torch.bfloat16, **empty)
    options = {"first_col": rank * width, "beta": 0.95, "nesterov": True, "codebook": "linear", "block_size": BLOCK}
    with counting() as counter:
        kernels.momentum_stats_cut(codes, scales, grads, **options)
        kernels.momentum_apply_cut(codes, scales, grads, new_scales, norms, out, **options)
    return counter.total


def as_on_cuda() -> Any:
    """Let the reference take as much at once as on CUDA; in a checkout that makes no difference, change nothing."""
    if not hasattr(reference.momentum, "elements_at_once"):
        return mock.patch.object(reference.momentum, "__name__", reference.momentum.__name__)
    size = reference.momentum.elements_at_once(torch.device("cuda"))
    return mock.patch.object(reference.momentum, "elements_at_once", return_value=size)


def count_here() -> dict[str, dict[str, float]]:
    """Return the kernels of a step for each way, the mean of the ranks."""
    result = {}
    with as_on_cuda():
        for name, kernels in backends().items():
            alone = fmean(LAYERS * sum(launches(kernels, cols, r, 1) for cols in WIDTHS) for r in range(RANKS))
            together = fmean(sum(launches(kernels, cols, r, LAYERS) for cols in WIDTHS) for r in range(RANKS))
            result[name] = {"one matrix at a time": alone, "all of a shape together": together}
    return result


def count_tree(tree: Path) -> dict[str, dict[str, float]]:
    """Return `count_here` of another checkout, from a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(str(entry.resolve()) for entry in (tree, tree / "kernels"))
    command = [sys.executable, __file__, "--here"]
    done = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True, timeout=_LIMIT_S)
    if done.returncode != 0:
        raise RuntimeError(f"counting the kernels of {tree} failed: {done.stdout}{done.stderr}")
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    return found


def whole_step(tree: Path) -> int:
    """Return the kernels of a step of a rank, without those of Newton-Schulz."""
    from benchmarks.scaling.host_time import run_in  # which a checkout that is counted alone may not have

    found = run_in(tree.resolve(), "step_of_tree.py", "1", str(LAYERS), "TP 8")["TP 8"]
    return sum(found["triton"].values()) + sum(found["torch"].values())


def main() -> None:
    """Print the counts, or write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, help="root of another checkout")
    parser.add_argument("--out", type=Path, help="write the record there (JSON)")
    parser.add_argument("--here", action="store_true", help="count this checkout alone")
    args = parser.parse_args()
    found: dict[str, Any] = count_here()
    if args.here:
        print(json.dumps(found))
        return
    found["whole step"] = {"without Newton-Schulz": whole_step(ROOT)}
    record: dict[str, Any] = {"command": "python -m benchmarks.scaling.launches", "here": found}
    if args.tree:
        record["other tree"] = old = count_tree(args.tree)
        (before, *_), (now, *_) = old.values(), found.values()
        theirs = whole_step(args.tree)
        old["whole step"] = {"without Newton-Schulz": theirs}
        ratios = {key: round(now[key] / before[key], 4) for key in now}
        ratios |= {"whole step": round(found["whole step"]["without Newton-Schulz"] / theirs, 4)}
        record["here over the other, as by default"] = ratios
    text = json.dumps(record, indent=1) + "\n"
    if args.out:
        args.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
